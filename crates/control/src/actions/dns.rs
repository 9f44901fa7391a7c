//! Makes the records of a name what they are to be, by a dynamic update (RFC 2136) that is signed (TSIG, RFC 8945).

use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hickory_proto::op::{Message, OpCode, Query, ResponseCode, UpdateMessage};
use hickory_proto::rr::rdata::tsig::TsigAlgorithm;
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType, TSigner};
use model::plan::Dns;
use model::plan::run::Outcome;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::secret_of;

/// How far the two clocks may be apart, in seconds; as `nsupdate` has it.
const FUDGE_S: u16 = 300;

/// The key in a file as `tsig-keygen` writes it: `key "name" { algorithm hmac-sha256; secret "..."; };`
///
/// # Errors
/// It cannot be read, or is of another shape. The secret is not in the text.
pub(crate) fn key_of(path: &str) -> Result<TSigner, String> {
    let text = secret_of(path)?;
    let wrong = |what: &str| format!("`{path}` holds no key as `tsig-keygen` writes it: {what}");
    let words: Vec<&str> = text
        .split(|c: char| c.is_whitespace() || "{};".contains(c))
        .filter(|word| !word.is_empty())
        .map(|word| word.trim_matches('"'))
        .collect();
    let after = |name: &str| {
        let at = words.iter().position(|word| *word == name)?;
        words.get(at + 1).copied()
    };
    let name = after("key").ok_or_else(|| wrong("no `key`"))?;
    let algorithm = match after("algorithm") {
        Some("hmac-sha256") => TsigAlgorithm::HmacSha256,
        Some("hmac-sha384") => TsigAlgorithm::HmacSha384,
        Some("hmac-sha512") => TsigAlgorithm::HmacSha512,
        _ => return Err(wrong("`algorithm` must be hmac-sha256, hmac-sha384 or hmac-sha512")),
    };
    let secret = after("secret").ok_or_else(|| wrong("no `secret`"))?;
    let secret = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, secret)
        .map_err(|_| wrong("its `secret` is not base64"))?;
    let name = Name::from_str(name).map_err(|_| wrong("its name is no domain name"))?;
    TSigner::new(secret, algorithm, name, FUDGE_S).map_err(|error| wrong(&error.to_string()))
}

/// The update that makes the records of a name of one type these.
fn message(dns: &Dns) -> Result<Message, String> {
    let name_of = |text: &str| {
        let mut name =
            Name::from_str(text).map_err(|error| format!("`{text}` is no domain name: {error}"))?;
        name.set_fqdn(true);
        Ok::<_, String>(name)
    };
    let (zone, name) = (name_of(&dns.zone)?, name_of(&dns.name)?);
    let kind = RecordType::from_str(&dns.kind)
        .map_err(|error| format!("`{}` is no type of records: {error}", dns.kind))?;
    let mut query = Query::new();
    query.set_name(zone).set_query_class(DNSClass::IN).set_query_type(RecordType::SOA);
    let mut message = Message::query();
    message.metadata.op_code = OpCode::Update;
    message.metadata.recursion_desired = false;
    UpdateMessage::add_zone(&mut message, query);
    // Those that are there go, in the same update (RFC 2136, 2.5.2).
    let mut gone = Record::update0(name.clone(), 0, kind);
    gone.dns_class = DNSClass::ANY;
    message.add_update(gone);
    for value in &dns.values {
        let wrong = || format!("`{value}` is no value of a record of type {kind}");
        let data = match kind {
            RecordType::A => RData::A(A(value.parse().map_err(|_| wrong())?)),
            RecordType::AAAA => RData::AAAA(AAAA(value.parse().map_err(|_| wrong())?)),
            RecordType::CNAME => RData::CNAME(CNAME(name_of(value)?)),
            _ => return Err(format!("records of type {kind} are not written; A, AAAA, CNAME are")),
        };
        message.add_update(Record::from_rdata(name.clone(), dns.ttl_s, data));
    }
    Ok(message)
}

pub(super) async fn update(dns: &Dns, limit: Duration) -> Outcome {
    let made = message(dns).and_then(|message| {
        let signer = dns.key_file.as_deref().map(key_of).transpose()?;
        Ok((message, signer))
    });
    match made {
        Ok((message, signer)) => {
            let late =
                |_| Outcome::Unknown(format!("`{}` has not answered within {limit:?}", dns.server));
            timeout(limit, send(dns, message, signer)).await.unwrap_or_else(late)
        }
        Err(why) => Outcome::NotDone(why),
    }
}

async fn send(dns: &Dns, mut message: Message, signer: Option<TSigner>) -> Outcome {
    let server = &dns.server;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let id = message.metadata.id;
    let mut verifier = None;
    if let Some(signer) = &signer {
        match message.finalize(signer, now) {
            Ok(made) => verifier = made,
            Err(error) => return Outcome::NotDone(format!("it cannot be signed: {error}")),
        }
    }
    let bytes = match message.to_vec() {
        Ok(bytes) => bytes,
        Err(error) => return Outcome::NotDone(format!("it cannot be written: {error}")),
    };
    let Ok(len) = u16::try_from(bytes.len()) else {
        return Outcome::NotDone(format!("it has {} bytes, at most 65535 are sent", bytes.len()));
    };
    let mut stream = match TcpStream::connect(server).await {
        Ok(stream) => stream,
        Err(error) => return Outcome::NotDone(format!("`{server}` cannot be reached: {error}")),
    };
    let talk = async {
        stream.write_all(&[&len.to_be_bytes()[..], &bytes].concat()).await?;
        let mut answer = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = match talk.await {
        Ok(answer) => answer,
        Err(error) => return Outcome::Unknown(format!("`{server}` does not answer: {error}")),
    };
    let read = match Message::from_vec(&answer) {
        Ok(read) if read.metadata.id == id => read,
        Ok(_) => return Outcome::Unknown(format!("`{server}` answers another question")),
        Err(error) => return Outcome::Unknown(format!("`{server}` answers no DNS: {error}")),
    };
    let code = read.metadata.response_code;
    if code != ResponseCode::NoError {
        // An update is done as a whole, or not at all (RFC 2136, 3.7).
        return Outcome::NotDone(format!("`{server}` refuses: {code}"));
    }
    if let Some(Err(error)) = verifier.map(|mut verifier| verifier.verify(&answer)) {
        return Outcome::Unknown(format!("`{server}` answers with a wrong signature: {error}"));
    }
    let values = dns.values.join(", ");
    Outcome::Done(format!("{} {} is {values}", dns.name, dns.kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dns(values: &[&str]) -> Dns {
        Dns {
            server: "127.0.0.1:1".into(),
            zone: "example.org".into(),
            name: "db.example.org".into(),
            kind: "A".into(),
            values: values.iter().map(|value| (*value).to_owned()).collect(),
            ttl_s: 5,
            key_file: None,
        }
    }

    #[test]
    fn an_update_replaces_what_is_there() {
        let bytes = message(&dns(&["10.0.0.1", "10.0.0.2"])).unwrap().to_vec().unwrap();
        let read = Message::from_vec(&bytes).unwrap();
        assert_eq!(read.metadata.op_code, OpCode::Update);
        let updates: Vec<String> = read.authorities.iter().map(ToString::to_string).collect();
        assert_eq!(updates.len(), 3, "{updates:?}");
        assert!(updates[0].contains("ANY") && updates[2].contains("10.0.0.2"), "{updates:?}");
        for wrong in [dns(&["10.0.0"]), Dns { kind: "MX".into(), ..dns(&["x"]) }] {
            assert!(message(&wrong).is_err());
        }
    }

    #[test]
    fn a_key_is_read_as_tsig_keygen_writes_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let write = |text: &str| {
            std::fs::write(&path, text).unwrap();
            key_of(path.to_str().unwrap())
        };
        let key = write(
            "key \"holdfast\" {\n\talgorithm hmac-sha256;\n\tsecret \"c2VzYW1lIG9wZW4=\";\n};\n",
        );
        let key = key.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(
            (key.key(), key.signer_name().to_string()),
            (&b"sesame open"[..], "holdfast.".into())
        );
        for wrong in [
            "",
            "key \"x\" { algorithm md5; secret \"c2Vz\"; };",
            "key \"x\" { algorithm hmac-sha256; secret \"?c2Vz\"; };",
        ] {
            let error = write(wrong).err().unwrap();
            assert!(!error.contains("c2Vz"), "{error}");
        }
    }
}
