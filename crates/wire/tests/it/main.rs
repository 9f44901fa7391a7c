//! Properties of the codec: what is written is read back, whatever the split; what is cut or changed is an
//! error, never a panic.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use wire::backend::{self, Backend, Report, TxStatus};
use wire::frame::{self, Side};
use wire::frontend::{self, Bind, Frontend, FunctionCall, Target};
use wire::sqlstate::SqlState;

fn text() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(1u8..=255, 0..40)
}

fn values() -> impl Strategy<Value = Vec<Option<Vec<u8>>>> {
    let value = proptest::option::of(proptest::collection::vec(any::<u8>(), 0..50));
    proptest::collection::vec(value, 0..6)
}

fn borrowed(values: &[Option<Vec<u8>>]) -> Vec<Option<&[u8]>> {
    values.iter().map(Option::as_deref).collect()
}

/// The only message in `bytes`, which every shorter prefix does not hold.
fn only(side: Side, bytes: &[u8]) -> (u8, &[u8]) {
    for end in 0..bytes.len() {
        assert_eq!(frame::whole(side, &bytes[..end]), Ok(None), "{end} of {} bytes", bytes.len());
    }
    let (tag, body, len) = frame::whole(side, bytes).unwrap().unwrap();
    assert_eq!(len, bytes.len());
    (tag, body)
}

proptest! {
    #[test]
    fn parse_and_query_round_trip(name in text(), sql in text(), types in proptest::collection::vec(any::<u32>(), 0..9)) {
        let mut out = Vec::new();
        frontend::parse(&mut out, &name, &sql, &types);
        let (tag, body) = only(Side::Frontend, &out);
        prop_assert_eq!(frontend::parse_head(body), Ok((&name[..], &sql[..])));
        prop_assert_eq!(frontend::read(tag, body), Ok(Frontend::Parse { name: &name, sql: &sql, types }));
        let mut out = Vec::new();
        frontend::query(&mut out, &sql);
        let (tag, body) = only(Side::Frontend, &out);
        prop_assert_eq!(frontend::read(tag, body), Ok(Frontend::Query { sql: &sql }));
    }

    #[test]
    fn bind_and_function_call_round_trip(portal in text(), statement in text(), params in values(),
            formats in proptest::collection::vec(0i16..2, 0..4), function: u32) {
        let bind = Bind { portal: &portal, statement: &statement, param_formats: formats.clone(),
            params: borrowed(&params), result_formats: formats.clone() };
        let mut out = Vec::new();
        frontend::bind(&mut out, &bind);
        let (tag, body) = only(Side::Frontend, &out);
        prop_assert_eq!(frontend::read(tag, body), Ok(Frontend::Bind(bind)));
        let call = FunctionCall { function, arg_formats: formats, args: borrowed(&params), result_format: 1 };
        let mut out = Vec::new();
        frontend::function_call(&mut out, &call);
        let (tag, body) = only(Side::Frontend, &out);
        prop_assert_eq!(frontend::read(tag, body), Ok(Frontend::FunctionCall(call)));
    }

    #[test]
    fn names_and_copy_round_trip(name in text(), data in proptest::collection::vec(any::<u8>(), 0..200), rows: i32) {
        for target in [Target::Statement(&name), Target::Portal(&name)] {
            let mut out = Vec::new();
            frontend::describe(&mut out, target);
            let (tag, body) = only(Side::Frontend, &out);
            prop_assert_eq!(frontend::read(tag, body), Ok(Frontend::Describe(target)));
        }
        let mut out = Vec::new();
        frontend::execute(&mut out, &name, rows);
        let (tag, body) = only(Side::Frontend, &out);
        prop_assert_eq!(frontend::read(tag, body), Ok(Frontend::Execute { portal: &name, rows_max: rows }));
        let mut out = Vec::new();
        frontend::copy_data(&mut out, &data);
        let (tag, body) = only(Side::Frontend, &out);
        prop_assert_eq!(frontend::read(tag, body), Ok(Frontend::CopyData(&data)));
        let mut out = Vec::new();
        frontend::sasl_initial(&mut out, &name, &data);
        let (_, body) = only(Side::Frontend, &out);
        prop_assert_eq!(frontend::read_sasl_initial(body), Ok((&name[..], &data[..])));
    }

    #[test]
    fn server_messages_round_trip(name in text(), value in text(), row in values(), pid: i32) {
        let mut out = Vec::new();
        backend::parameter_status(&mut out, &name, &value);
        let (tag, body) = only(Side::Backend, &out);
        prop_assert_eq!(backend::read(tag, body), Ok(Backend::ParameterStatus { name: &name, value: &value }));
        let mut out = Vec::new();
        backend::data_row(&mut out, &borrowed(&row));
        let (tag, body) = only(Side::Backend, &out);
        prop_assert_eq!(backend::read(tag, body), Ok(Backend::DataRow(borrowed(&row))));
        let mut out = Vec::new();
        backend::notification(&mut out, pid, &name, &value);
        let (tag, body) = only(Side::Backend, &out);
        prop_assert_eq!(backend::read(tag, body),
            Ok(Backend::Notification { pid, channel: &name, payload: &value }));
        let mut out = Vec::new();
        backend::key_data(&mut out, pid, &value);
        let (tag, body) = only(Side::Backend, &out);
        prop_assert_eq!(backend::read(tag, body), Ok(Backend::KeyData { pid, secret: &value }));
    }

    #[test]
    fn arbitrary_bodies_never_panic(tag: u8, body in proptest::collection::vec(any::<u8>(), 0..120)) {
        let _ = frontend::read(tag, &body);
        let _ = backend::read(tag, &body);
        let _ = frontend::read_sasl_initial(&body);
        let _ = wire::startup::first(&body);
        let _ = frame::whole(Side::Frontend, &body);
        let _ = frame::whole(Side::Backend, &body);
    }

    #[test]
    fn a_changed_byte_never_panics(at: prop::sample::Index, to: u8, params in values()) {
        let mut out = Vec::new();
        frontend::bind_text(&mut out, b"p", b"s", &borrowed(&params));
        let at = at.index(out.len());
        out[at] = to;
        if let Ok(Some((tag, body, _))) = frame::whole(Side::Frontend, &out) {
            let _ = frontend::read(tag, body);
        }
    }
}

#[test]
fn an_error_report_reads_back_with_its_fields() {
    let report = Report::fatal(SqlState::ADMIN_SHUTDOWN, "server is shutting down")
        .detail("cell `a` is fenced")
        .hint("connect again");
    let mut out = Vec::new();
    report.write_error(&mut out);
    let (tag, body) = only(Side::Backend, &out);
    let Backend::Error(fields) = backend::read(tag, body).unwrap() else { panic!() };
    assert_eq!(fields.sqlstate(), Some(SqlState::ADMIN_SHUTDOWN));
    assert_eq!(fields.message(), "server is shutting down");
    assert_eq!(fields.field(b'H'), Some(&b"connect again"[..]));
    assert_eq!(fields.field(b'V'), Some(&b"FATAL"[..]));
}

#[test]
fn login_messages_read_back() {
    let mut out = Vec::new();
    backend::authentication_sasl(&mut out, &["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"]);
    let (tag, body) = only(Side::Backend, &out);
    let mechanisms = vec![&b"SCRAM-SHA-256-PLUS"[..], b"SCRAM-SHA-256"];
    let expected = Backend::Authentication(backend::Authentication::Sasl { mechanisms });
    assert_eq!(backend::read(tag, body), Ok(expected));
    let mut out = Vec::new();
    backend::negotiate_version(&mut out, 2, &[b"_pq_.thing"]);
    let (tag, body) = only(Side::Backend, &out);
    let expected = Backend::NegotiateVersion { version: 2, options: vec![b"_pq_.thing"] };
    assert_eq!(backend::read(tag, body), Ok(expected));
    for status in [TxStatus::Idle, TxStatus::InTransaction, TxStatus::Failed] {
        let mut out = Vec::new();
        backend::ready(&mut out, status);
        let (tag, body) = only(Side::Backend, &out);
        assert_eq!(backend::read(tag, body), Ok(Backend::Ready(status)));
    }
}

#[test]
fn a_list_is_not_sized_by_its_announced_count() {
    // A Bind that announces 32,767 parameters and ends there.
    let body = [0, 0, 0, 0, 0x7f, 0xff];
    assert!(frontend::read(b'B', &body).is_err());
}
