//! SCRAM against a peer in the middle who may replace or change any message: a side succeeds only if what the
//! other side really said arrived as it was said.

#![no_main]

use std::num::NonZeroU32;
use std::sync::LazyLock;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use wire::scram::{Binding, ClientFirst, Credential, Keys, ServerStart, Verifier};

const SALT: &[u8] = b"saltsaltsaltsalt";
/// One iteration: what is tried here is the exchange, not the derivation.
const ITERATIONS: NonZeroU32 = NonZeroU32::MIN;

static KEYS: LazyLock<Keys> = LazyLock::new(|| Keys::of_password("sesame", SALT, ITERATIONS));
static VERIFIER: LazyLock<Verifier> =
    LazyLock::new(|| Verifier::of_password("sesame", SALT, ITERATIONS));

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    client: Channel,
    server: Channel,
    mechanism: Change<'a>,
    client_first: Change<'a>,
    server_first: Change<'a>,
    client_final: Change<'a>,
    server_final: Change<'a>,
    verifier: &'a str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
enum Channel {
    Plain,
    Unoffered,
    Bound,
    BoundElsewhere,
}

/// What becomes of a message on its way.
#[derive(Debug, Arbitrary)]
enum Change<'a> {
    Keep,
    Replace(&'a [u8]),
    Flip { at: u8, bits: u8 },
    Insert { at: u8, bytes: &'a [u8] },
    Cut(u8),
}

impl Change<'_> {
    fn of(&self, message: &str) -> Vec<u8> {
        let mut bytes = message.as_bytes().to_vec();
        match *self {
            Change::Keep => (),
            Change::Replace(other) => bytes = other.to_vec(),
            Change::Flip { at, bits } => {
                if let Some(byte) = bytes.get_mut(usize::from(at)) {
                    *byte ^= bits;
                }
            }
            Change::Insert { at, bytes: more } => {
                let at = usize::from(at).min(bytes.len());
                bytes.splice(at..at, more.iter().copied());
            }
            Change::Cut(len) => bytes.truncate(usize::from(len)),
        }
        bytes
    }
}

fn end_point(channel: Channel) -> Option<Vec<u8>> {
    match channel {
        Channel::Plain | Channel::Unoffered => None,
        Channel::Bound => Some(vec![7; 32]),
        Channel::BoundElsewhere => Some(vec![8; 32]),
    }
}

fuzz_target!(|input: Input<'_>| {
    if let Some(verifier) = Verifier::read(input.verifier) {
        assert_eq!(Verifier::read(&verifier.to_string()), Some(verifier));
    }

    let binding = match (input.client, end_point(input.client)) {
        (_, Some(hash)) => Binding::EndPoint(hash),
        (Channel::Unoffered, None) => Binding::Unoffered,
        (_, None) => Binding::None,
    };
    let server = ServerStart::new(VERIFIER.clone(), "servernonce".into(), end_point(input.server));
    let (mechanism, said_first, client) =
        ClientFirst::start(Credential::Keys(KEYS.clone()), binding, "clientnonce".into());
    let heard_mechanism = input.mechanism.of(mechanism);
    let heard_first = input.client_first.of(&said_first);
    let challenged = server.on_client_first(&heard_mechanism, &heard_first);

    // Where the server gives up, the one in the middle still may try the client.
    let said_challenge = challenged.as_ref().map_or("", |(challenge, _)| challenge);
    let heard_challenge = input.server_first.of(said_challenge);
    let proved = client.on_server_first(&heard_challenge);
    let said_proof = proved.as_ref().map_or("", |(proof, _)| proof).to_owned();
    let heard_proof = input.client_final.of(&said_proof);

    let unchanged = heard_mechanism == mechanism.as_bytes()
        && heard_first == said_first.as_bytes()
        && heard_challenge == said_challenge.as_bytes()
        && heard_proof == said_proof.as_bytes();
    let suits = match input.client {
        Channel::Plain => true,
        Channel::Unoffered => end_point(input.server).is_none(),
        Channel::Bound | Channel::BoundElsewhere => input.client == input.server,
    };
    let signed = challenged.and_then(|(_, server)| server.on_client_final(&heard_proof));
    if unchanged && suits {
        assert_eq!(signed.as_ref().map(|(_, keys)| keys), Ok(&*KEYS));
    } else {
        assert!(signed.is_err(), "the server was satisfied by a changed exchange");
    }

    let said_signature = signed.map_or(String::new(), |(signature, _)| signature);
    let heard_signature = input.server_final.of(&said_signature);
    if let Ok((_, client)) = proved {
        let satisfied = client.on_server_final(&heard_signature).is_ok();
        // What follows the signature is an extension, which a client may ignore.
        let first = heard_signature.split(|byte| *byte == b',').next().unwrap_or_default();
        let right = !said_signature.is_empty() && first == said_signature.as_bytes();
        assert_eq!(satisfied, right && std::str::from_utf8(&heard_signature).is_ok());
    }
});
