//! Messages of the client: what is read and encoded again is the same bytes, and what is encoded is read back.

#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use wire::frame::{self, Side};
use wire::frontend::{self, Bind, Frontend, FunctionCall, Target};

#[derive(Debug, Arbitrary)]
enum Input<'a> {
    Read { tag: u8, body: &'a [u8] },
    Write { name: &'a [u8], text: &'a [u8], value: Option<&'a [u8]>, count: u8 },
}

fn encode(message: &Frontend<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    match message {
        Frontend::Query { sql } => frontend::query(&mut out, sql),
        Frontend::Parse { name, sql, types } => frontend::parse(&mut out, name, sql, types),
        Frontend::Bind(bind) => frontend::bind(&mut out, bind),
        Frontend::Describe(target) => frontend::describe(&mut out, *target),
        Frontend::Execute { portal, rows_max } => frontend::execute(&mut out, portal, *rows_max),
        Frontend::Close(target) => frontend::close(&mut out, *target),
        Frontend::Sync => frontend::sync(&mut out),
        Frontend::Flush => frontend::flush(&mut out),
        Frontend::FunctionCall(call) => frontend::function_call(&mut out, call),
        Frontend::CopyData(data) => frontend::copy_data(&mut out, data),
        Frontend::CopyDone => frontend::copy_done(&mut out),
        Frontend::CopyFail { reason } => frontend::copy_fail(&mut out, reason),
        // A response has no frame of its own inside the message, unlike a password.
        Frontend::Password(data) => frontend::sasl_response(&mut out, data),
        Frontend::Terminate => frontend::terminate(&mut out),
    }
    out
}

fn read(tag: u8, body: &[u8]) {
    if let Ok((mechanism, response)) = frontend::read_sasl_initial(body) {
        let mut out = Vec::new();
        frontend::sasl_initial(&mut out, mechanism, response);
        assert_eq!(
            frontend::read_sasl_initial(&out[frame::HEADER_LEN..]),
            Ok((mechanism, response))
        );
    }
    let Ok(message) = frontend::read(tag, body) else { return };
    if let Frontend::Parse { name, sql, .. } = &message {
        assert_eq!(frontend::parse_head(body), Ok((*name, *sql)));
    }
    let out = encode(&message);
    let (again, bytes, len) = frame::whole(Side::Frontend, &out).expect("a header").expect("whole");
    assert_eq!((again, bytes, len), (tag, body, out.len()));
    assert_eq!(frontend::read(again, bytes), Ok(message));
}

#[track_caller]
fn reads_back(message: &Frontend<'_>) {
    let out = encode(message);
    let (tag, body, len) = frame::whole(Side::Frontend, &out).expect("a header").expect("whole");
    assert_eq!(len, out.len());
    // Not `assert_eq`, which would show lists of many thousands.
    match frontend::read(tag, body) {
        Ok(again) => assert!(again == *message, "another `{}`", char::from(tag)),
        Err(error) => panic!("`{}` of ours is refused: {error}", char::from(tag)),
    }
}

fuzz_target!(|input: Input<'_>| {
    let (name, text, value, count) = match input {
        Input::Read { tag, body } => return read(tag, body),
        Input::Write { name, text, value, count } => (name, text, value, count),
    };
    // Text of the protocol ends at its first zero byte.
    let [name, text] = [name, text].map(|t| t.split(|b| *b == 0).next().unwrap_or_default());
    // As many as a count of two bytes can say, or a few.
    let many = if count == u8::MAX { usize::from(u16::MAX) } else { usize::from(count) };
    let formats = vec![1; many];
    reads_back(&Frontend::Parse { name, sql: text, types: vec![u32::from(count); many] });
    reads_back(&Frontend::Bind(Bind {
        portal: name,
        statement: text,
        param_formats: formats.clone(),
        params: vec![value; many],
        result_formats: formats.clone(),
    }));
    reads_back(&Frontend::FunctionCall(FunctionCall {
        function: u32::from(count),
        arg_formats: formats,
        args: vec![value; many],
        result_format: 0,
    }));
    for target in [Target::Statement(name), Target::Portal(name)] {
        reads_back(&Frontend::Describe(target));
        reads_back(&Frontend::Close(target));
    }
    reads_back(&Frontend::Query { sql: text });
    reads_back(&Frontend::CopyFail { reason: text });
});
