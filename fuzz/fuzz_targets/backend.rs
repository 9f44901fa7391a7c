//! Messages of the server: what is read and can be encoded again is the same message, and what is encoded is
//! read back.

#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use wire::backend::{self, Authentication, Backend, Report};
use wire::frame::{self, Side};
use wire::sqlstate::SqlState;

#[derive(Debug, Arbitrary)]
enum Input<'a> {
    Read { tag: u8, body: &'a [u8] },
    Write { text: &'a str, detail: Option<&'a str>, value: Option<&'a [u8]>, count: u8 },
}

/// None for messages that Holdfast only ever reads.
fn encode(message: &Backend<'_>) -> Option<Vec<u8>> {
    let mut buffer = Vec::new();
    let out = &mut buffer;
    match message {
        Backend::Authentication(Authentication::Ok) => backend::authentication_ok(out),
        Backend::Authentication(Authentication::Sasl { mechanisms }) => {
            let names: Option<Vec<&str>> =
                mechanisms.iter().map(|name| std::str::from_utf8(name).ok()).collect();
            backend::authentication_sasl(out, &names?);
        }
        Backend::Authentication(Authentication::SaslContinue(data)) => {
            backend::authentication_sasl_continue(out, data);
        }
        Backend::Authentication(Authentication::SaslFinal(data)) => {
            backend::authentication_sasl_final(out, data);
        }
        Backend::ParameterStatus { name, value } => backend::parameter_status(out, name, value),
        Backend::KeyData { pid, secret } => backend::key_data(out, *pid, secret),
        Backend::Ready(status) => backend::ready(out, *status),
        Backend::Notification { pid, channel, payload } => {
            backend::notification(out, *pid, channel, payload);
        }
        Backend::NegotiateVersion { version, options } => {
            backend::negotiate_version(out, *version, options);
        }
        Backend::DataRow(values) => backend::data_row(out, values),
        Backend::CommandComplete { tag } => {
            backend::command_complete(out, std::str::from_utf8(tag).ok()?);
        }
        Backend::EmptyQuery => backend::empty_query(out),
        _ => return None,
    }
    Some(buffer)
}

fn read(tag: u8, body: &[u8]) {
    let Ok(message) = backend::read(tag, body) else { return };
    if let Backend::Error(fields) | Backend::Notice(fields) = &message {
        assert!(fields.0.iter().all(|(code, text)| *code != 0 && !text.contains(&0)));
        let _ = (fields.sqlstate().map(|code| code.to_string()), fields.message());
    }
    let Some(out) = encode(&message) else { return };
    let (again, bytes, len) = frame::whole(Side::Backend, &out).expect("a header").expect("whole");
    assert_eq!((again, len), (tag, out.len()));
    assert_eq!(bytes, body);
    assert_eq!(backend::read(again, bytes), Ok(message));
}

fn decoded(out: &[u8]) -> Backend<'_> {
    let (tag, body, len) = frame::whole(Side::Backend, out).expect("a header").expect("whole");
    assert_eq!(len, out.len());
    backend::read(tag, body).expect("own messages are well formed")
}

fuzz_target!(|input: Input<'_>| {
    let (text, detail, value, count) = match input {
        Input::Read { tag, body } => return read(tag, body),
        Input::Write { text, detail, value, count } => (text, detail, value, count),
    };
    // Text of the protocol ends at its first zero byte.
    let cut = |text: &str| text.split('\0').next().unwrap_or_default().to_owned();
    let mut report = Report::error(SqlState::INTERNAL_ERROR, text);
    report.detail = detail.map(str::to_owned);
    let (mut error, mut notice) = (Vec::new(), Vec::new());
    report.write_error(&mut error);
    report.write_notice(&mut notice);
    let (Backend::Error(fields), Backend::Notice(same)) = (decoded(&error), decoded(&notice))
    else {
        panic!("an error is an error, and a notice a notice");
    };
    assert_eq!(fields, same);
    assert_eq!((fields.sqlstate(), fields.message()), (Some(SqlState::INTERNAL_ERROR), cut(text)));
    assert_eq!(fields.field(b'D').map(<[u8]>::to_vec), detail.map(|text| cut(text).into_bytes()));

    // As many as a count of two bytes can say, or a few.
    let many = if count == u8::MAX { usize::from(u16::MAX) } else { usize::from(count) };
    let (mut row, mut columns) = (Vec::new(), Vec::new());
    backend::data_row(&mut row, &vec![value; many]);
    assert!(decoded(&row) == Backend::DataRow(vec![value; many]), "another row");
    backend::row_description_text(&mut columns, &vec![text; many]);
    let Backend::RowDescription(columns) = decoded(&columns) else { panic!("columns are columns") };
    assert_eq!(columns.len(), many);
    assert!(columns.iter().all(|column| column.name == cut(text).as_bytes()));
});
