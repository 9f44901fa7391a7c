//! The protocol state between a client and a server that answers as `src/backend/tcop/postgres.c` and
//! `CopyGetData` do, with every message late by any amount. At a safe point the server has nothing left to do
//! or to say; with a client that keeps to the manual, the reverse is true as well, so that no wait is for ever.
//!
//! A violation is shown as a transcript in the notation of `session/protocol/tests.rs`.

#![no_main]

use std::collections::VecDeque;

use libfuzzer_sys::fuzz_target;
use model::session::Protocol;
use model::session::protocol::{Note, Unnamed};
use wire::backend::TxStatus;
use wire::sqlstate::SqlState;

/// A message of the client on its way: the tag, the first two bytes of its body, and which one it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Message {
    tag: u8,
    first: u8,
    second: u8,
    /// It is or runs a COPY FROM STDIN.
    copies: bool,
    undecodable: bool,
    id: usize,
}

#[derive(Debug, Clone, Copy)]
enum Answer {
    Ready(TxStatus),
    /// Whether its code says that bytes could not be decoded.
    Error {
        undecoded: bool,
    },
    Other(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Copying {
    No,
    Simple,
    Extended,
}

struct Server {
    inbox: VecDeque<Message>,
    outbox: VecDeque<Answer>,
    tx: TxStatus,
    copying: Copying,
    /// Everything until the next Sync is ignored.
    skipping: bool,
    /// Extended messages ran since the last Sync: their implicit transaction is open.
    implicit: bool,
    /// The Parse that the unnamed statement is of.
    unnamed: Option<usize>,
    dead: bool,
}

impl Server {
    fn say(&mut self, tags: &[u8]) {
        self.outbox.extend(tags.iter().map(|tag| Answer::Other(*tag)));
    }

    fn ready(&mut self) {
        self.implicit = false;
        self.outbox.push_back(Answer::Ready(self.tx));
    }

    fn fail(&mut self) {
        if self.tx == TxStatus::InTransaction {
            self.tx = TxStatus::Failed;
        }
        self.outbox.push_back(Answer::Error { undecoded: false });
    }

    /// A message, or a text that is known to a statement only, is not of the encoding that it should be.
    fn fail_undecoded(&mut self) {
        self.fail();
        if let Some(error) = self.outbox.back_mut() {
            *error = Answer::Error { undecoded: true };
        }
    }

    /// BEGIN, COMMIT and ROLLBACK are statements like any other here.
    fn complete(&mut self, chance: u8) {
        self.say(b"C");
        match chance & 3 {
            1 => self.tx = TxStatus::InTransaction,
            2 => self.tx = TxStatus::Idle,
            _ => (),
        }
    }

    fn query(&mut self, copies: bool, chance: u8) {
        match (copies, chance % 4) {
            (_, 0) => self.fail(),
            (true, 1) => {
                self.say(b"TDCG");
                self.copying = Copying::Simple;
                return;
            }
            (true, _) => {
                self.say(b"G");
                self.copying = Copying::Simple;
                return;
            }
            (false, 1) => self.say(b"I"),
            (false, 2) => self.say(b"HdcC"),
            (false, _) => self.complete(chance >> 2),
        }
        self.ready();
    }

    fn execute(&mut self, copies: bool, chance: u8) {
        match (copies, chance % 8) {
            (_, 0) => self.skip(),
            (true, _) => {
                self.say(b"G");
                self.copying = Copying::Extended;
            }
            (false, 1) => self.say(b"I"),
            (false, 2) => self.say(b"HdcC"),
            (false, 3) => self.say(b"Ds"),
            (false, 4) => self.say(b"DC"),
            (false, _) => self.complete(chance >> 3),
        }
    }

    fn skip(&mut self) {
        self.fail();
        self.skipping = true;
    }

    fn end_copy(&mut self, done: bool) {
        let was = std::mem::replace(&mut self.copying, Copying::No);
        match (was, done) {
            (Copying::Simple, done) => {
                if done {
                    self.say(b"C")
                } else {
                    self.fail()
                }
                self.ready();
            }
            (_, true) => self.say(b"C"),
            (_, false) => self.skip(),
        }
    }

    /// Reads one message, or fails in the middle of a COPY without reading any: a trigger, a cancel request.
    fn turn(&mut self, chance: u8) {
        if self.copying != Copying::No && chance & 7 == 7 {
            return self.end_copy(false);
        }
        let Some(message) = self.inbox.pop_front() else { return };
        if self.copying != Copying::No {
            return match message.tag {
                b'd' if chance & 1 == 0 => (),
                b'd' | b'f' => self.end_copy(false),
                b'c' => self.end_copy(chance & 1 == 0),
                b'S' | b'H' => (),
                // Synchronization is lost, which ends the connection.
                _ => self.dead = true,
            };
        }
        if self.skipping && message.tag != b'S' {
            return;
        }
        let extended = b"PBDEC".contains(&message.tag);
        self.implicit |= extended;
        let fails = chance % 5 == 4;
        match (message.tag, message.first) {
            (b'Q', _) if message.undecodable => {
                self.fail_undecoded();
                self.ready();
            }
            (b'P', 0) if message.undecodable => {
                self.fail_undecoded();
                self.skipping = true;
            }
            (b'Q', _) => {
                self.unnamed = None;
                self.query(message.copies, chance);
            }
            (b'F', _) => {
                if fails {
                    self.fail()
                } else {
                    self.say(b"V")
                }
                self.ready();
            }
            (b'S', _) => {
                self.skipping = false;
                if fails {
                    self.fail();
                }
                self.ready();
            }
            (b'P', 0) => {
                self.unnamed = None;
                if fails && chance > 40 {
                    self.skipping = true;
                    return self.fail_undecoded();
                }
                if fails {
                    return self.skip();
                }
                self.unnamed = Some(message.id);
                self.say(b"1");
            }
            (b'E', _) => self.execute(message.copies, chance),
            _ if extended && fails => self.skip(),
            (b'P', _) => self.say(b"1"),
            (b'B', _) => self.say(b"2"),
            (b'D', b'S') => self.say(if chance & 1 == 0 { b"tn" } else { b"tT" }),
            (b'D', _) => self.say(if chance & 1 == 0 { b"n" } else { b"T" }),
            (b'C', kind) => {
                if kind == b'S' && message.second == 0 {
                    self.unnamed = None;
                }
                self.say(b"3");
            }
            // Flush, and what is left of a COPY that failed.
            _ => (),
        }
    }

    /// Nothing to do and nothing to say, whatever stray COPY data it will still ignore.
    fn is_done(&self) -> bool {
        let ignored = |message: &Message| b"dcfH".contains(&message.tag);
        self.copying == Copying::No
            && !self.skipping
            && !self.implicit
            && self.outbox.is_empty()
            && self.inbox.iter().all(ignored)
    }
}

/// What a client that keeps to the manual may send next: it knows which of its statements are COPY, waits for
/// the answer to such a one before it sends anything but a Sync, ends the COPY, and then owes a Sync whatever
/// it sent before, as libpq does.
#[derive(Default)]
struct Manners {
    batch_open: bool,
    unready: usize,
    copy: Copy,
}

#[derive(Default)]
enum Copy {
    #[default]
    None,
    Asked {
        extended: bool,
        synced: bool,
    },
    Sending {
        extended: bool,
    },
    OwesSync,
}

impl Manners {
    fn allow(&self, message: &Message) -> bool {
        match (&self.copy, message.tag) {
            (Copy::Sending { .. }, tag) => b"dcf".contains(&tag),
            (Copy::OwesSync, tag) => tag == b'S',
            (Copy::Asked { extended, synced }, tag) => tag == b'S' && *extended && !synced,
            (Copy::None, b'd' | b'c' | b'f') => false,
            (Copy::None, b'Q' | b'F') if self.batch_open => false,
            (Copy::None, _) => !message.copies || self.unready == 0,
        }
    }

    fn on_sent(&mut self, message: &Message) {
        self.batch_open |= b"PBDEC".contains(&message.tag);
        self.unready += usize::from(b"QFS".contains(&message.tag));
        match (message.tag, &self.copy) {
            (b'S', copy) => {
                self.batch_open = false;
                self.copy = match copy {
                    Copy::Asked { .. } => Copy::Asked { extended: true, synced: true },
                    _ => Copy::None,
                };
            }
            (b'c' | b'f', Copy::Sending { extended: true }) => self.copy = Copy::OwesSync,
            (b'c' | b'f', _) => self.copy = Copy::None,
            (tag, _) if message.copies => {
                self.copy = Copy::Asked { extended: tag == b'E', synced: false };
            }
            _ => (),
        }
    }

    fn on_heard(&mut self, tag: u8) {
        match (tag, &self.copy) {
            (b'G', Copy::Asked { extended, .. }) => {
                self.copy = Copy::Sending { extended: *extended };
            }
            (b'E', Copy::Asked { .. }) => self.copy = Copy::None,
            (b'Z', _) => self.unready = self.unready.saturating_sub(1),
            _ => (),
        }
    }
}

/// The bytes of an input, one choice each.
struct Choices<'a>(std::slice::Iter<'a, u8>);

impl Choices<'_> {
    fn next(&mut self) -> Option<u8> {
        self.0.next().copied()
    }
}

struct Run {
    protocol: Protocol,
    server: Server,
    /// None for a client that sends what it likes.
    manners: Option<Manners>,
    /// The Parse whose text the relay holds.
    kept: Option<usize>,
    transcript: String,
    /// A COPY has failed where only the next answer tells how far it was read.
    doubted: bool,
    sent: usize,
}

impl Run {
    fn send(&mut self, choice: u8, variant: u8) {
        let tag = b"QPBEDCFSHdcf"[usize::from(choice) % 12];
        let (first, second) = match (tag, variant & 3) {
            (b'P', 0 | 1) | (b'B' | b'E', _) => (0, 0),
            (b'D', 0 | 1) | (b'C', 0) => (b'S', b'x'),
            (b'C', 1) => (b'S', 0),
            (b'D' | b'C', _) => (b'P', 0),
            _ => (b'n', 0),
        };
        let copies = b"QE".contains(&tag) && variant & 4 == 4;
        let undecodable = variant & 24 == 24;
        let message = Message { tag, first, second, copies, undecodable, id: self.sent };
        if self.manners.as_ref().is_some_and(|manners| !manners.allow(&message)) {
            return;
        }
        self.sent += 1;
        let shown = |byte: u8| if byte == 0 { ':' } else { char::from(byte) };
        self.transcript += &format!(" >{}", char::from(tag));
        if b"PDC".contains(&tag) {
            self.transcript.push(shown(first));
        }
        if tag == b'C' {
            self.transcript.push(shown(second));
        }
        let note = self.protocol.on_frontend(tag, Some(first), Some(second));
        if note == Note::KeepUnnamed {
            self.kept = Some(message.id);
        }
        if let Some(manners) = &mut self.manners {
            manners.on_sent(&message);
        }
        self.server.inbox.push_back(message);
    }

    fn hear(&mut self) {
        let Some(answer) = self.server.outbox.pop_front() else { return };
        let tag = match answer {
            Answer::Ready(status) => {
                self.transcript += &format!(" <Z{}", char::from(status.byte()));
                self.protocol.on_backend(b'Z', Some(status));
                b'Z'
            }
            Answer::Error { undecoded } => {
                self.transcript += if undecoded { " <E(undecoded)" } else { " <E" };
                let code = SqlState::CHARACTER_NOT_IN_REPERTOIRE;
                let other = SqlState::SYNTAX_ERROR;
                self.protocol.on_backend_error(Some(if undecoded { code } else { other }));
                b'E'
            }
            Answer::Other(tag) => {
                self.transcript += &format!(" <{}", char::from(tag));
                self.protocol.on_backend(tag, None);
                tag
            }
        };
        if let Some(manners) = &mut self.manners {
            manners.on_heard(tag);
        }
    }

    fn check(&mut self) {
        self.doubted |= self.protocol.is_doubtful();
        let (protocol, server, transcript) = (&self.protocol, &self.server, &self.transcript);
        if protocol.is_safe_point() && !protocol.is_doubtful() {
            assert!(server.is_done(), "no safe point, the server is not done:{transcript}");
            // No savepoint is ever said to be there, so nothing is left of a transaction that has failed.
            assert_ne!(server.tx, TxStatus::InTransaction, "no safe point:{transcript}");
            assert_eq!(server.tx, protocol.status(), "no safe point:{transcript}");
            let right = match protocol.unnamed() {
                Unnamed::Absent => server.unnamed.is_none(),
                Unnamed::Last => server.unnamed.is_some() && server.unnamed == self.kept,
                // Also said where it may be so: it pins.
                Unnamed::Earlier => true,
            };
            assert!(right, "{:?} is not what the server keeps:{transcript}", protocol.unnamed());
        }
        if self.manners.is_some() {
            // After a COPY that failed only the server knows where it stands; who pipelines on from there is pinned.
            if protocol.is_out_of_step() && self.doubted {
                return;
            }
            assert!(!protocol.is_out_of_step(), "out of step:{transcript}");
            let quiet = protocol.is_quiet() && protocol.status() == server.tx;
            assert!(quiet || !server.is_done(), "never quiet again: {protocol:?}:{transcript}");
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices(data.iter());
    let Some(manners) = choices.next() else { return };
    let mut run = Run {
        protocol: Protocol::new(),
        server: Server {
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            tx: TxStatus::Idle,
            copying: Copying::No,
            skipping: false,
            implicit: false,
            unnamed: None,
            dead: false,
        },
        manners: (manners & 1 == 0).then(Manners::default),
        kept: None,
        transcript: String::new(),
        doubted: false,
        sent: 0,
    };
    while let Some(choice) = choices.next() {
        match choice % 3 {
            0 => run.send(choice / 3, choices.next().unwrap_or_default()),
            1 => run.server.turn(choice / 3),
            _ => run.hear(),
        }
        if run.server.dead {
            return;
        }
        run.check();
    }
});
