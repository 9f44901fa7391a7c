//! The two facts that PostgreSQL takes out of a certificate: the hash that SCRAM binds to, and the common name.
//!
//! A walk over DER that never reads past what it was given; anything unexpected is "none".

use ring::digest;

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OID: u8 = 0x06;
const EXPLICIT_0: u8 = 0xa0;
const OID_COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
/// 1.2.840.113549.1.1: the RSA signatures; the last byte names the hash.
const OID_RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
/// 1.2.840.10045.4.3: ECDSA with SHA-2; the last byte names the hash.
const OID_ECDSA_SHA2: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03];
/// 1.2.840.10045.4.1: ECDSA with SHA-1.
const OID_ECDSA_SHA1: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01];

/// One element split off: its tag, its content, and what follows.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (len, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x83 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (bytes.iter().fold(0, |len, byte| len << 8 | usize::from(*byte)), rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(len)?;
    Some((tag, content, rest))
}

fn expect(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, content, rest) = element(der)?;
    (found == tag).then_some((content, rest))
}

/// The `tls-server-end-point` hash (RFC 5929, 4.1): of the whole certificate, by the hash of its signature,
/// SHA-256 in place of MD5 and SHA-1. None where the signature names no hash, as with Ed25519.
pub fn end_point_hash(der: &[u8]) -> Option<Vec<u8>> {
    let (certificate, _) = expect(der, SEQUENCE)?;
    let (_, after_tbs) = expect(certificate, SEQUENCE)?;
    let (algorithm, _) = expect(after_tbs, SEQUENCE)?;
    let (oid, _) = expect(algorithm, OID)?;
    let hash = match oid {
        _ if oid == OID_ECDSA_SHA1 => &digest::SHA256,
        _ => match oid.split_last()? {
            (4 | 5 | 11, family) if family == OID_RSA => &digest::SHA256,
            (12, family) if family == OID_RSA => &digest::SHA384,
            (13, family) if family == OID_RSA => &digest::SHA512,
            (2, family) if family == OID_ECDSA_SHA2 => &digest::SHA256,
            (3, family) if family == OID_ECDSA_SHA2 => &digest::SHA384,
            (4, family) if family == OID_ECDSA_SHA2 => &digest::SHA512,
            _ => return None,
        },
    };
    Some(digest::digest(hash, der).as_ref().to_vec())
}

/// The subject's common name, as `clientcert=verify-full` compares it with the user.
pub fn common_name(der: &[u8]) -> Option<String> {
    let (certificate, _) = expect(der, SEQUENCE)?;
    let (mut tbs, _) = expect(certificate, SEQUENCE)?;
    if let Some((EXPLICIT_0, _, rest)) = element(tbs) {
        tbs = rest;
    }
    // Serial number, signature, issuer, validity; the subject stands after them.
    for _ in 0..4 {
        tbs = element(tbs)?.2;
    }
    let (mut subject, _) = expect(tbs, SEQUENCE)?;
    let mut found = None;
    while !subject.is_empty() {
        let (set, rest) = expect(subject, SET)?;
        subject = rest;
        let (pair, _) = expect(set, SEQUENCE)?;
        let (oid, value) = expect(pair, OID)?;
        if oid == OID_COMMON_NAME {
            let (_, text, _) = element(value)?;
            // A zero byte inside is the old trick of `user\0.evil.example`; no such name is believed.
            let text = std::str::from_utf8(text).ok().filter(|text| !text.contains('\0'))?;
            found = Some(text.to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn certificate(algorithm: &'static rcgen::SignatureAlgorithm) -> Vec<u8> {
        let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["db.example".into()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "org");
        params.distinguished_name.push(rcgen::DnType::CommonName, "alice");
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn the_common_name_is_found() {
        let der = certificate(&rcgen::PKCS_ECDSA_P256_SHA256);
        assert_eq!(common_name(&der), Some("alice".into()));
    }

    #[test]
    fn the_end_point_hash_follows_the_signature() {
        let len = |algorithm| end_point_hash(&certificate(algorithm)).map(|hash| hash.len());
        assert_eq!(len(&rcgen::PKCS_ECDSA_P256_SHA256), Some(32));
        assert_eq!(len(&rcgen::PKCS_ECDSA_P384_SHA384), Some(48));
        assert_eq!(len(&rcgen::PKCS_ED25519), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = end_point_hash(&bytes);
            let _ = common_name(&bytes);
        }

        #[test]
        fn a_cut_or_changed_certificate_never_panics(at: prop::sample::Index, to: u8) {
            let mut der = certificate(&rcgen::PKCS_ECDSA_P256_SHA256);
            let at = at.index(der.len());
            let _ = common_name(&der[..at]);
            der[at] = to;
            let _ = (common_name(&der), end_point_hash(&der));
        }
    }
}
