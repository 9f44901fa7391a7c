//! The first packet of a client: a decision never changes with bytes that come later, and nothing is waited for
//! beyond the limit.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wire::startup::{self, First, PACKET_LEN_MAX};

fuzz_target!(|bytes: &[u8]| {
    let whole = startup::first(bytes);
    let max = usize::try_from(PACKET_LEN_MAX).expect("a small number");
    for end in (0..bytes.len().min(8)).chain([bytes.len() / 2, bytes.len().saturating_sub(1)]) {
        match (startup::first(bytes.get(..end).unwrap_or_default()), &whole) {
            (Ok(None), _) => (),
            (early, whole) => assert_eq!(&early, whole, "decided at {end} bytes"),
        }
    }
    let (packet, len) = match whole {
        Ok(Some(found)) => found,
        Ok(None) => return assert!(bytes.len() < max, "{} bytes and no decision", bytes.len()),
        Err(_) => return,
    };
    assert!(len <= bytes.len() && len <= max);

    let mut out = Vec::new();
    match &packet {
        First::Ssl => startup::ssl_request(&mut out),
        First::GssEnc => startup::gssenc_request(&mut out),
        First::Cancel { pid, secret } => {
            startup::cancel_request(&mut out, *pid, secret);
            assert_eq!(out, bytes[..len]);
        }
        First::Startup(startup) => {
            for (name, _) in &startup.params {
                let last = startup.params.iter().rfind(|(other, _)| other == name);
                let text = std::str::from_utf8(name).unwrap_or_default();
                assert!(text.is_empty() || startup.param(text) == last.map(|(_, value)| *value));
            }
            startup::startup_message(&mut out, startup.version, startup.params.iter().copied());
            assert_eq!(out, bytes[..len]);
        }
    }
    assert_eq!(startup::first(&out), Ok(Some((packet, out.len()))));
});
