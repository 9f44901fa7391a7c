//! The questions and answers of etcd's JSON gateway (`etcdserverpb`, `rpc.proto`): bytes are base64, numbers of 64 bits are
//! text.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Revision;

fn to_base64<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&BASE64_STANDARD.encode(bytes))
}

fn from_base64<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(from)?;
    BASE64_STANDARD.decode(text).map_err(serde::de::Error::custom)
}

fn number_to_text<S: Serializer>(number: &u64, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(number)
}

fn number_from_text<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map_err(serde::de::Error::custom)
}

/// The first key after all that begin with this.
pub(super) fn end_of(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    // All keys.
    vec![0]
}

#[derive(Debug, Default, Serialize)]
pub(super) struct RangeQuestion {
    #[serde(serialize_with = "to_base64")]
    pub(super) key: Vec<u8>,
    #[serde(serialize_with = "to_base64", skip_serializing_if = "Vec::is_empty")]
    pub(super) range_end: Vec<u8>,
    /// 0: all.
    pub(super) limit: usize,
    /// 0: the newest.
    #[serde(serialize_with = "number_to_text")]
    pub(super) revision: u64,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub(super) struct Header {
    #[serde(deserialize_with = "number_from_text")]
    pub(super) cluster_id: u64,
    #[serde(deserialize_with = "number_from_text")]
    pub(super) revision: u64,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub(super) struct KeyValue {
    #[serde(deserialize_with = "from_base64")]
    pub(super) key: Vec<u8>,
    #[serde(deserialize_with = "from_base64")]
    pub(super) value: Vec<u8>,
    #[serde(deserialize_with = "number_from_text")]
    pub(super) mod_revision: u64,
}

/// What an answer says of the store as a whole.
pub(super) trait Answer {
    fn header(&self) -> &Header;
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RangeAnswer {
    pub(super) header: Header,
    pub(super) kvs: Vec<KeyValue>,
    pub(super) more: bool,
}

impl Answer for RangeAnswer {
    fn header(&self) -> &Header {
        &self.header
    }
}

#[derive(Debug, Serialize)]
pub(super) struct Compare {
    target: &'static str,
    result: &'static str,
    #[serde(serialize_with = "to_base64")]
    key: Vec<u8>,
    #[serde(serialize_with = "number_to_text")]
    mod_revision: u64,
}

impl Compare {
    /// A key that does not exist has revision 0.
    pub(super) fn revision(key: Vec<u8>, seen: Option<Revision>) -> Compare {
        let mod_revision = seen.map_or(0, |seen| seen.0);
        Compare { target: "MOD", result: "EQUAL", key, mod_revision }
    }
}

#[derive(Debug, Serialize)]
pub(super) enum Operation {
    #[serde(rename = "request_range")]
    Range(RangeQuestion),
    #[serde(rename = "request_put")]
    Put(Put),
    #[serde(rename = "request_delete_range")]
    Delete(Delete),
}

#[derive(Debug, Serialize)]
pub(super) struct Put {
    #[serde(serialize_with = "to_base64")]
    key: Vec<u8>,
    #[serde(serialize_with = "to_base64")]
    value: Vec<u8>,
}

#[derive(Debug, Serialize)]
pub(super) struct Delete {
    #[serde(serialize_with = "to_base64")]
    key: Vec<u8>,
}

impl Operation {
    pub(super) fn get(key: Vec<u8>) -> Operation {
        Operation::Range(RangeQuestion { key, ..RangeQuestion::default() })
    }

    pub(super) fn put(key: Vec<u8>, value: Vec<u8>) -> Operation {
        Operation::Put(Put { key, value })
    }

    pub(super) fn delete(key: Vec<u8>) -> Operation {
        Operation::Delete(Delete { key })
    }
}

#[derive(Debug, Serialize)]
pub(super) struct TxnQuestion {
    pub(super) compare: Vec<Compare>,
    pub(super) success: Vec<Operation>,
    pub(super) failure: Vec<Operation>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TxnAnswer {
    header: Header,
    pub(super) succeeded: bool,
    responses: Vec<Response>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Response {
    response_range: Option<RangeAnswer>,
}

impl TxnAnswer {
    pub(super) fn revision(&self) -> Revision {
        Revision(self.header.revision)
    }

    /// What the question at this place has found.
    pub(super) fn found(&self, at: usize) -> Option<KeyValue> {
        self.responses.get(at)?.response_range.as_ref()?.kvs.first().cloned()
    }
}

impl Answer for TxnAnswer {
    fn header(&self) -> &Header {
        &self.header
    }
}

#[derive(Serialize)]
pub(super) struct LoginQuestion<'a> {
    pub(super) name: &'a str,
    pub(super) password: &'a str,
}

#[derive(Deserialize)]
pub(super) struct LoginAnswer {
    pub(super) token: String,
}

/// Why etcd does not do it; `code` is gRPC's.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Refusal {
    pub(super) code: u32,
    pub(super) message: String,
    pub(super) error: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_before_what_does_not_begin_with_it() {
        assert_eq!(end_of(b"ab"), b"ac");
        assert_eq!(end_of(&[b'a', 255]), b"b");
        assert_eq!(end_of(&[255, 255]), [0]);
    }

    #[test]
    fn what_etcd_leaves_out_is_nothing() {
        let text = r#"{"header":{"cluster_id":"14841639068965178418","revision":"7"},"responses":[{"response_range":{"header":{"revision":"7"}}}]}"#;
        let answer: TxnAnswer = serde_json::from_str(text).unwrap();
        assert!(!answer.succeeded && answer.found(0).is_none() && answer.found(1).is_none());
        assert_eq!(answer.header().cluster_id, 14_841_639_068_965_178_418);
    }
}
