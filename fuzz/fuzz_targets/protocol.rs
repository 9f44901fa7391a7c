//! The protocol state fed with messages in any order, as no server would send them: it stays bounded, never
//! claims a safe point while anything is under way, and never forgets that the answers were out of step.

#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use model::session::Protocol;
use model::session::protocol::{Note, REQUESTS_MAX};
use wire::backend::TxStatus;
use wire::sqlstate::SqlState;

const FRONTEND: &[u8] = b"QPBEDCFSHXdcfp";
const BACKEND: &[u8] = b"ZEC123TtnDIsGHWdcVNSAKRv";
const BEGINS: &[u8] = b"QPBEDCFSH";

#[derive(Debug, Arbitrary)]
enum Step {
    Client {
        tag: u8,
        first: Option<u8>,
        second: Option<u8>,
    },
    /// The same message over and over: what fills the queue.
    Pipeline {
        tag: u8,
        times: u16,
    },
    Server {
        tag: u8,
        status: Option<u8>,
    },
    Shrink,
}

/// What is known from outside.
#[derive(Default)]
struct Seen {
    /// Requests passed on since the last time nothing was running: the queue is never longer.
    passed: usize,
    /// A request was passed on and no ReadyForQuery has come since.
    unready: bool,
    out_of_step: bool,
}

fn on_client(
    protocol: &mut Protocol,
    seen: &mut Seen,
    tag: u8,
    first: Option<u8>,
    second: Option<u8>,
) {
    // As the relay does: at the limit the client is not read.
    if protocol.is_full() {
        return;
    }
    let note = protocol.on_frontend(tag, first, second);
    assert!(note == Note::Nothing || (tag == b'P' && first == Some(0)));
    if BEGINS.contains(&tag) && tag != b'H' {
        seen.unready = true;
    }
    seen.passed += 1;
}

fn check(protocol: &Protocol, seen: &mut Seen) {
    let (safe, quiet) = (protocol.is_safe_point(), protocol.is_quiet());
    assert!(!safe || (quiet && protocol.status() == TxStatus::Idle));
    assert!(!quiet || (!protocol.is_running() && !protocol.is_out_of_step()));
    assert!(!quiet || !seen.unready, "quiet before a ReadyForQuery");
    assert_eq!(protocol.occupation() == "idle", safe);
    assert!(protocol.is_out_of_step() || !seen.out_of_step, "out of step is for good");
    seen.out_of_step = protocol.is_out_of_step();
    if !protocol.is_running() {
        seen.passed = 0;
    }
    assert!(!protocol.is_full() || seen.passed >= REQUESTS_MAX);
    for tag in FRONTEND {
        // Data of a COPY, a goodbye and a password never wait: something that is under way waits for them.
        assert!(BEGINS.contains(tag) || !protocol.must_wait(*tag));
        assert!(!safe || protocol.must_wait(*tag) == BEGINS.contains(tag));
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let (mut protocol, mut seen) = (Protocol::new(), Seen::default());
    let pick = |tags: &[u8], n: u8| tags[usize::from(n) % tags.len()];
    for step in steps {
        match step {
            Step::Client { tag, first, second } => {
                on_client(&mut protocol, &mut seen, pick(FRONTEND, tag), first, second);
            }
            Step::Pipeline { tag, times } => {
                for _ in 0..times {
                    on_client(&mut protocol, &mut seen, pick(FRONTEND, tag), None, None);
                }
            }
            Step::Server { tag, status } => {
                let tag = pick(BACKEND, tag);
                let status = status.and_then(|n| TxStatus::from_byte(pick(b"ITE?", n)));
                match (tag, status) {
                    (b'E', Some(_)) => {
                        protocol.on_backend_error(Some(SqlState::CHARACTER_NOT_IN_REPERTOIRE));
                    }
                    _ => {
                        protocol.on_backend(tag, status);
                    }
                }
                seen.unready &= tag != b'Z';
                assert!(tag != b'Z' || status.is_none() || status == Some(protocol.status()));
            }
            Step::Shrink => {
                let before = protocol.clone();
                protocol.shrink();
                assert_eq!(protocol, before);
            }
        }
        check(&protocol, &mut seen);
    }
});
