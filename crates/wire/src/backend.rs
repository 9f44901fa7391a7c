//! Messages of the server. Views borrow the body; encoders append to a buffer.

use crate::read::{Malformed, Reader};
use crate::sqlstate::SqlState;
use crate::write::{self, message};

/// One message of the server, seen in its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend<'a> {
    Authentication(Authentication<'a>),
    ParameterStatus { name: &'a [u8], value: &'a [u8] },
    KeyData { pid: i32, secret: &'a [u8] },
    Ready(TxStatus),
    Error(Fields<'a>),
    Notice(Fields<'a>),
    Notification { pid: i32, channel: &'a [u8], payload: &'a [u8] },
    NegotiateVersion { version: i32, options: Vec<&'a [u8]> },
    RowDescription(Vec<Column<'a>>),
    DataRow(Vec<Option<&'a [u8]>>),
    ParameterDescription(Vec<u32>),
    CommandComplete { tag: &'a [u8] },
    EmptyQuery,
    ParseComplete,
    BindComplete,
    CloseComplete,
    NoData,
    PortalSuspended,
    FunctionResult(Option<&'a [u8]>),
    CopyIn(CopyFormat),
    CopyOut(CopyFormat),
    CopyBoth(CopyFormat),
    CopyData(&'a [u8]),
    CopyDone,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authentication<'a> {
    Ok,
    CleartextPassword,
    Md5Password {
        salt: [u8; 4],
    },
    Sasl {
        mechanisms: Vec<&'a [u8]>,
    },
    SaslContinue(&'a [u8]),
    SaslFinal(&'a [u8]),
    /// Kerberos, GSS and SSPI, which Holdfast does not answer.
    Other(i32),
}

/// The status byte of ReadyForQuery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TxStatus {
    Idle,
    InTransaction,
    Failed,
}

impl TxStatus {
    pub fn from_byte(byte: u8) -> Option<TxStatus> {
        match byte {
            b'I' => Some(TxStatus::Idle),
            b'T' => Some(TxStatus::InTransaction),
            b'E' => Some(TxStatus::Failed),
            _ => None,
        }
    }

    pub fn byte(self) -> u8 {
        match self {
            TxStatus::Idle => b'I',
            TxStatus::InTransaction => b'T',
            TxStatus::Failed => b'E',
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column<'a> {
    pub name: &'a [u8],
    pub table: u32,
    pub attribute: i16,
    pub type_oid: u32,
    pub type_len: i16,
    pub type_modifier: i32,
    pub format: i16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyFormat {
    pub overall: u8,
    pub columns: Vec<i16>,
}

/// The fields of an error or a notice, by their code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fields<'a>(pub Vec<(u8, &'a [u8])>);

impl<'a> Fields<'a> {
    pub fn field(&self, code: u8) -> Option<&'a [u8]> {
        self.0.iter().find(|(c, _)| *c == code).map(|(_, value)| *value)
    }

    pub fn sqlstate(&self) -> Option<SqlState> {
        self.field(b'C').and_then(|code| code.try_into().ok()).map(SqlState)
    }

    /// The primary message, with bytes that are not UTF-8 replaced.
    pub fn message(&self) -> String {
        String::from_utf8_lossy(self.field(b'M').unwrap_or_default()).into_owned()
    }
}

/// Reads the body of a message with `tag`.
///
/// # Errors
/// The body is not what the tag announces, or the tag is not one of the server's.
pub fn read(tag: u8, body: &[u8]) -> Result<Backend<'_>, Malformed> {
    let mut r = Reader::new(body);
    let message = match tag {
        b'R' => Backend::Authentication(authentication(&mut r)?),
        b'S' => Backend::ParameterStatus { name: r.cstr("name")?, value: r.cstr("value")? },
        b'K' => Backend::KeyData { pid: r.i32("process id")?, secret: r.rest() },
        b'Z' => {
            let byte = r.u8("status")?;
            let status = TxStatus::from_byte(byte)
                .ok_or(Malformed::Value { what: "status", value: i64::from(byte) })?;
            Backend::Ready(status)
        }
        b'E' => Backend::Error(fields(&mut r)?),
        b'N' => Backend::Notice(fields(&mut r)?),
        b'A' => Backend::Notification {
            pid: r.i32("process id")?,
            channel: r.cstr("channel")?,
            payload: r.cstr("payload")?,
        },
        b'v' => {
            let (version, count) = (r.i32("version")?, r.i32("option count")?);
            let mut options = Vec::new();
            for _ in 0..count {
                options.push(r.cstr("option")?);
            }
            Backend::NegotiateVersion { version, options }
        }
        b'T' => {
            let mut columns = Vec::new();
            for _ in 0..r.count16("column count")? {
                columns.push(column(&mut r)?);
            }
            Backend::RowDescription(columns)
        }
        b'D' => {
            let mut values = Vec::new();
            for _ in 0..r.count16("column count")? {
                values.push(r.value("column")?);
            }
            Backend::DataRow(values)
        }
        b't' => {
            let mut types = Vec::new();
            for _ in 0..r.count16("parameter count")? {
                types.push(r.u32("parameter type")?);
            }
            Backend::ParameterDescription(types)
        }
        b'C' => Backend::CommandComplete { tag: r.cstr("tag")? },
        b'I' => Backend::EmptyQuery,
        b'1' => Backend::ParseComplete,
        b'2' => Backend::BindComplete,
        b'3' => Backend::CloseComplete,
        b'n' => Backend::NoData,
        b's' => Backend::PortalSuspended,
        b'V' => Backend::FunctionResult(r.value("result")?),
        b'G' => Backend::CopyIn(copy_format(&mut r)?),
        b'H' => Backend::CopyOut(copy_format(&mut r)?),
        b'W' => Backend::CopyBoth(copy_format(&mut r)?),
        b'd' => Backend::CopyData(r.rest()),
        b'c' => Backend::CopyDone,
        other => return Err(Malformed::Value { what: "message type", value: i64::from(other) }),
    };
    r.end()?;
    Ok(message)
}

fn authentication<'a>(r: &mut Reader<'a>) -> Result<Authentication<'a>, Malformed> {
    Ok(match r.i32("authentication kind")? {
        0 => Authentication::Ok,
        3 => Authentication::CleartextPassword,
        5 => {
            let salt = r.bytes(4, "salt")?;
            Authentication::Md5Password {
                salt: salt.try_into().map_err(|_| Malformed::Short("salt"))?,
            }
        }
        10 => {
            let mut mechanisms = Vec::new();
            loop {
                match r.cstr("mechanism")? {
                    b"" => break,
                    name => mechanisms.push(name),
                }
            }
            Authentication::Sasl { mechanisms }
        }
        11 => Authentication::SaslContinue(r.rest()),
        12 => Authentication::SaslFinal(r.rest()),
        other => {
            r.rest();
            Authentication::Other(other)
        }
    })
}

fn fields<'a>(r: &mut Reader<'a>) -> Result<Fields<'a>, Malformed> {
    let mut fields = Vec::new();
    loop {
        match r.u8("field code")? {
            0 => return Ok(Fields(fields)),
            code => fields.push((code, r.cstr("field")?)),
        }
    }
}

fn column<'a>(r: &mut Reader<'a>) -> Result<Column<'a>, Malformed> {
    Ok(Column {
        name: r.cstr("column name")?,
        table: r.u32("table")?,
        attribute: r.i16("attribute")?,
        type_oid: r.u32("type")?,
        type_len: r.i16("type length")?,
        type_modifier: r.i32("type modifier")?,
        format: r.i16("format")?,
    })
}

fn copy_format(r: &mut Reader<'_>) -> Result<CopyFormat, Malformed> {
    let overall = r.u8("copy format")?;
    let mut columns = Vec::new();
    for _ in 0..r.count16("column count")? {
        columns.push(r.i16("column format")?);
    }
    Ok(CopyFormat { overall, columns })
}

fn auth(out: &mut Vec<u8>, kind: i32, rest: &[u8]) {
    message(out, b'R', |out| {
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(rest);
    });
}

pub fn authentication_ok(out: &mut Vec<u8>) {
    auth(out, 0, &[]);
}

pub fn authentication_sasl(out: &mut Vec<u8>, mechanisms: &[&str]) {
    let mut list = Vec::new();
    mechanisms.iter().for_each(|name| write::cstr(&mut list, name.as_bytes()));
    list.push(0);
    auth(out, 10, &list);
}

pub fn authentication_sasl_continue(out: &mut Vec<u8>, data: &[u8]) {
    auth(out, 11, data);
}

pub fn authentication_sasl_final(out: &mut Vec<u8>, data: &[u8]) {
    auth(out, 12, data);
}

pub fn parameter_status(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    message(out, b'S', |out| {
        write::cstr(out, name);
        write::cstr(out, value);
    });
}

pub fn parse_complete(out: &mut Vec<u8>) {
    message(out, b'1', |_| ());
}

pub fn close_complete(out: &mut Vec<u8>) {
    message(out, b'3', |_| ());
}

pub fn key_data(out: &mut Vec<u8>, pid: i32, secret: &[u8]) {
    message(out, b'K', |out| {
        out.extend_from_slice(&pid.to_be_bytes());
        out.extend_from_slice(secret);
    });
}

pub fn ready(out: &mut Vec<u8>, status: TxStatus) {
    message(out, b'Z', |out| out.push(status.byte()));
}

pub fn negotiate_version(out: &mut Vec<u8>, version: i32, options: &[&[u8]]) {
    message(out, b'v', |out| {
        out.extend_from_slice(&version.to_be_bytes());
        let count = i32::try_from(options.len()).expect("a startup packet has few options");
        out.extend_from_slice(&count.to_be_bytes());
        options.iter().for_each(|option| write::cstr(out, option));
    });
}

/// An error or notice as Holdfast reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub severity: &'static str,
    pub sqlstate: SqlState,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

impl Report {
    /// An error after which the session goes on.
    pub fn error(sqlstate: SqlState, message: impl Into<String>) -> Report {
        Report { severity: "ERROR", sqlstate, message: message.into(), detail: None, hint: None }
    }

    /// An error after which the connection is closed.
    pub fn fatal(sqlstate: SqlState, message: impl Into<String>) -> Report {
        Report { severity: "FATAL", ..Report::error(sqlstate, message) }
    }

    pub fn detail(mut self, detail: impl Into<String>) -> Report {
        self.detail = Some(detail.into());
        self
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Report {
        self.hint = Some(hint.into());
        self
    }

    pub fn write_error(&self, out: &mut Vec<u8>) {
        message(out, b'E', |out| self.write_fields(out));
    }

    pub fn write_notice(&self, out: &mut Vec<u8>) {
        message(out, b'N', |out| self.write_fields(out));
    }

    fn write_fields(&self, out: &mut Vec<u8>) {
        let mut field = |code: u8, text: &str| {
            out.push(code);
            write::cstr(out, text.as_bytes());
        };
        field(b'S', self.severity);
        field(b'V', self.severity);
        field(b'C', self.sqlstate.as_str());
        field(b'M', &self.message);
        if let Some(detail) = &self.detail {
            field(b'D', detail);
        }
        if let Some(hint) = &self.hint {
            field(b'H', hint);
        }
        out.push(0);
    }
}

/// A RowDescription of text columns, as the admin console answers.
pub fn row_description_text(out: &mut Vec<u8>, names: &[&str]) {
    const TEXT_OID: u32 = 25;
    message(out, b'T', |out| {
        write::count16(out, names.len());
        for name in names {
            write::cstr(out, name.as_bytes());
            out.extend_from_slice(&0u32.to_be_bytes());
            out.extend_from_slice(&0i16.to_be_bytes());
            out.extend_from_slice(&TEXT_OID.to_be_bytes());
            out.extend_from_slice(&(-1i16).to_be_bytes());
            out.extend_from_slice(&(-1i32).to_be_bytes());
            out.extend_from_slice(&0i16.to_be_bytes());
        }
    });
}

pub fn data_row(out: &mut Vec<u8>, values: &[Option<&[u8]>]) {
    message(out, b'D', |out| {
        write::count16(out, values.len());
        values.iter().for_each(|value| write::value(out, *value));
    });
}

pub fn command_complete(out: &mut Vec<u8>, tag: &str) {
    message(out, b'C', |out| write::cstr(out, tag.as_bytes()));
}

pub fn empty_query(out: &mut Vec<u8>) {
    message(out, b'I', |_| ());
}

pub fn notification(out: &mut Vec<u8>, pid: i32, channel: &[u8], payload: &[u8]) {
    message(out, b'A', |out| {
        out.extend_from_slice(&pid.to_be_bytes());
        write::cstr(out, channel);
        write::cstr(out, payload);
    });
}
