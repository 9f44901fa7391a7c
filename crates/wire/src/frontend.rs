//! Messages of the client. Views borrow the body; encoders append to a buffer.

use crate::read::{Malformed, Reader};
use crate::write::{self, message};

/// One message of the client, seen in its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frontend<'a> {
    Query {
        sql: &'a [u8],
    },
    Parse {
        name: &'a [u8],
        sql: &'a [u8],
        types: Vec<u32>,
    },
    Bind(Bind<'a>),
    Describe(Target<'a>),
    Execute {
        portal: &'a [u8],
        rows_max: i32,
    },
    Close(Target<'a>),
    Sync,
    Flush,
    FunctionCall(FunctionCall<'a>),
    CopyData(&'a [u8]),
    CopyDone,
    CopyFail {
        reason: &'a [u8],
    },
    /// Password, SASL initial response, SASL response or GSS response: what it is depends on what was asked.
    Password(&'a [u8]),
    Terminate,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind<'a> {
    pub portal: &'a [u8],
    pub statement: &'a [u8],
    pub param_formats: Vec<i16>,
    pub params: Vec<Option<&'a [u8]>>,
    pub result_formats: Vec<i16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionCall<'a> {
    pub function: u32,
    pub arg_formats: Vec<i16>,
    pub args: Vec<Option<&'a [u8]>>,
    pub result_format: i16,
}

/// What Describe and Close name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target<'a> {
    Statement(&'a [u8]),
    Portal(&'a [u8]),
}

/// The name and the text of a Parse, without its types: all that inspection needs, and no allocation.
///
/// # Errors
/// The name or the text does not end.
pub fn parse_head(body: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    let mut reader = Reader::new(body);
    Ok((reader.cstr("statement name")?, reader.cstr("query")?))
}

/// Reads the body of a message with `tag`.
///
/// # Errors
/// The body is not what the tag announces, or the tag is not one of the client's.
pub fn read(tag: u8, body: &[u8]) -> Result<Frontend<'_>, Malformed> {
    let mut r = Reader::new(body);
    let message = match tag {
        b'Q' => Frontend::Query { sql: r.cstr("query")? },
        b'P' => {
            let (name, sql) = (r.cstr("statement name")?, r.cstr("query")?);
            let count = r.count16("parameter type count")?;
            let types = many(count, || r.u32("parameter type"))?;
            Frontend::Parse { name, sql, types }
        }
        b'B' => {
            let (portal, statement) = (r.cstr("portal name")?, r.cstr("statement name")?);
            let count = r.count16("parameter format count")?;
            let param_formats = many(count, || r.i16("parameter format"))?;
            let count = r.count16("parameter count")?;
            let params = many(count, || r.value("parameter"))?;
            let count = r.count16("result format count")?;
            let result_formats = many(count, || r.i16("result format"))?;
            Frontend::Bind(Bind { portal, statement, param_formats, params, result_formats })
        }
        b'D' => Frontend::Describe(target(&mut r)?),
        b'C' => Frontend::Close(target(&mut r)?),
        b'E' => Frontend::Execute { portal: r.cstr("portal name")?, rows_max: r.i32("row limit")? },
        b'S' => Frontend::Sync,
        b'H' => Frontend::Flush,
        b'X' => Frontend::Terminate,
        b'F' => {
            let function = r.u32("function")?;
            let count = r.count16("argument format count")?;
            let arg_formats = many(count, || r.i16("argument format"))?;
            let count = r.count16("argument count")?;
            let args = many(count, || r.value("argument"))?;
            let result_format = r.i16("result format")?;
            Frontend::FunctionCall(FunctionCall { function, arg_formats, args, result_format })
        }
        b'd' => Frontend::CopyData(r.rest()),
        b'c' => Frontend::CopyDone,
        b'f' => Frontend::CopyFail { reason: r.cstr("reason")? },
        b'p' => Frontend::Password(r.rest()),
        other => return Err(Malformed::Value { what: "message type", value: i64::from(other) }),
    };
    r.end()?;
    Ok(message)
}

/// Reads `count` items. The list grows with the bytes that are there, never by the announced count.
fn many<T>(
    count: usize,
    mut item: impl FnMut() -> Result<T, Malformed>,
) -> Result<Vec<T>, Malformed> {
    let mut items = Vec::new();
    for _ in 0..count {
        items.push(item()?);
    }
    Ok(items)
}

fn target<'a>(r: &mut Reader<'a>) -> Result<Target<'a>, Malformed> {
    match r.u8("kind")? {
        b'S' => r.cstr("statement name").map(Target::Statement),
        b'P' => r.cstr("portal name").map(Target::Portal),
        other => Err(Malformed::Value { what: "kind", value: i64::from(other) }),
    }
}

/// A SASL initial response: the mechanism and the first message.
///
/// # Errors
/// The mechanism does not end or the message is shorter than announced.
pub fn read_sasl_initial(body: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    let mut r = Reader::new(body);
    let mechanism = r.cstr("mechanism")?;
    let response = r.value("response")?.unwrap_or_default();
    r.end()?;
    Ok((mechanism, response))
}

pub fn query(out: &mut Vec<u8>, sql: &[u8]) {
    message(out, b'Q', |out| write::cstr(out, sql));
}

pub fn parse(out: &mut Vec<u8>, name: &[u8], sql: &[u8], types: &[u32]) {
    message(out, b'P', |out| {
        write::cstr(out, name);
        write::cstr(out, sql);
        write::count16(out, types.len());
        types.iter().for_each(|oid| out.extend_from_slice(&oid.to_be_bytes()));
    });
}

pub fn bind(out: &mut Vec<u8>, bind: &Bind<'_>) {
    message(out, b'B', |out| {
        write::cstr(out, bind.portal);
        write::cstr(out, bind.statement);
        formats(out, &bind.param_formats);
        values(out, &bind.params);
        formats(out, &bind.result_formats);
    });
}

/// A Bind with text parameters and text results, all that Holdfast's own SQL uses.
pub fn bind_text(out: &mut Vec<u8>, portal: &[u8], statement: &[u8], params: &[Option<&[u8]>]) {
    message(out, b'B', |out| {
        write::cstr(out, portal);
        write::cstr(out, statement);
        formats(out, &[]);
        values(out, params);
        formats(out, &[]);
    });
}

fn formats(out: &mut Vec<u8>, formats: &[i16]) {
    write::count16(out, formats.len());
    formats.iter().for_each(|format| out.extend_from_slice(&format.to_be_bytes()));
}

fn values(out: &mut Vec<u8>, values: &[Option<&[u8]>]) {
    write::count16(out, values.len());
    values.iter().for_each(|value| write::value(out, *value));
}

pub fn describe(out: &mut Vec<u8>, target: Target<'_>) {
    message(out, b'D', |out| write_target(out, target));
}

pub fn close(out: &mut Vec<u8>, target: Target<'_>) {
    message(out, b'C', |out| write_target(out, target));
}

fn write_target(out: &mut Vec<u8>, target: Target<'_>) {
    let (kind, name) = match target {
        Target::Statement(name) => (b'S', name),
        Target::Portal(name) => (b'P', name),
    };
    out.push(kind);
    write::cstr(out, name);
}

pub fn execute(out: &mut Vec<u8>, portal: &[u8], rows_max: i32) {
    message(out, b'E', |out| {
        write::cstr(out, portal);
        out.extend_from_slice(&rows_max.to_be_bytes());
    });
}

pub fn sync(out: &mut Vec<u8>) {
    message(out, b'S', |_| ());
}

/// How many ReadyForQuery a server sends for these whole messages (PostgreSQL manual, "Message Flow").
pub fn answers_to(messages: &[u8]) -> usize {
    let (mut rest, mut count) = (messages, 0);
    while let [tag, a, b, c, d, ..] = rest {
        count += usize::from(matches!(tag, b'Q' | b'S' | b'F'));
        let len = usize::try_from(u32::from_be_bytes([*a, *b, *c, *d])).unwrap_or(usize::MAX);
        rest = rest.get(len.saturating_add(1)..).unwrap_or_default();
    }
    count
}

pub fn flush(out: &mut Vec<u8>) {
    message(out, b'H', |_| ());
}

pub fn terminate(out: &mut Vec<u8>) {
    message(out, b'X', |_| ());
}

pub fn function_call(out: &mut Vec<u8>, call: &FunctionCall<'_>) {
    message(out, b'F', |out| {
        out.extend_from_slice(&call.function.to_be_bytes());
        formats(out, &call.arg_formats);
        values(out, &call.args);
        out.extend_from_slice(&call.result_format.to_be_bytes());
    });
}

pub fn copy_data(out: &mut Vec<u8>, data: &[u8]) {
    message(out, b'd', |out| out.extend_from_slice(data));
}

pub fn copy_done(out: &mut Vec<u8>) {
    message(out, b'c', |_| ());
}

pub fn copy_fail(out: &mut Vec<u8>, reason: &[u8]) {
    message(out, b'f', |out| write::cstr(out, reason));
}

pub fn password(out: &mut Vec<u8>, password: &[u8]) {
    message(out, b'p', |out| write::cstr(out, password));
}

pub fn sasl_initial(out: &mut Vec<u8>, mechanism: &[u8], response: &[u8]) {
    message(out, b'p', |out| {
        write::cstr(out, mechanism);
        write::value(out, Some(response));
    });
}

pub fn sasl_response(out: &mut Vec<u8>, response: &[u8]) {
    message(out, b'p', |out| out.extend_from_slice(response));
}
