//! A stream gives the same messages, and the same fault at the same byte, however it was cut on its way; and
//! what a header announces sizes nothing.

#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use wire::frame::{self, FrameError, HEADER_LEN, Header, LARGE_LEN_MAX, Scanner, Side, Step};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    backend: bool,
    parts: Vec<Part<'a>>,
    cuts: Vec<u8>,
}

#[derive(Debug, Arbitrary)]
enum Part<'a> {
    Bytes(&'a [u8]),
    Message { tag: u8, body: &'a [u8] },
}

/// What a stream held: its headers, where the last whole or begun one ended, and the fault that stopped it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    headers: Vec<Header>,
    passed: usize,
    fault: Option<FrameError>,
}

fn scan<'a>(side: Side, pieces: impl Iterator<Item = &'a [u8]>) -> Seen {
    let (mut scanner, mut carry) = (Scanner::new(side), Vec::new());
    let mut seen = Seen { headers: Vec::new(), passed: 0, fault: None };
    for piece in pieces {
        carry.extend_from_slice(piece);
        let mut at = 0;
        loop {
            match scanner.peek(&carry[at..]) {
                Ok(Step::Incomplete) => break,
                Ok(Step::Frame(header)) => {
                    assert!(scanner.at_boundary());
                    assert!(header.body_len <= LARGE_LEN_MAX);
                    scanner.enter(header);
                    seen.headers.push(header);
                    at += HEADER_LEN;
                }
                Ok(Step::Body(len)) => {
                    assert!(len > 0 && len <= carry.len() - at);
                    scanner.pass(len);
                    at += len;
                }
                Err(fault) => {
                    seen.fault = Some(fault);
                    break;
                }
            }
        }
        carry.drain(..at);
        seen.passed += at;
        if seen.fault.is_some() {
            return seen;
        }
        assert!(carry.len() < HEADER_LEN, "more than a header is waited for");
    }
    seen
}

fn pieces<'a>(mut bytes: &'a [u8], cuts: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    let mut cuts = cuts.iter();
    std::iter::from_fn(move || {
        let len = cuts.next().map_or(bytes.len(), |cut| usize::from(*cut).min(bytes.len()));
        let (piece, rest) = bytes.split_at(len);
        let ended = bytes.is_empty();
        bytes = rest;
        (!ended).then_some(piece)
    })
}

fuzz_target!(|input: Input<'_>| {
    let side = if input.backend { Side::Backend } else { Side::Frontend };
    let mut bytes = Vec::new();
    for part in &input.parts {
        match part {
            Part::Bytes(raw) => bytes.extend_from_slice(raw),
            Part::Message { tag, body } => {
                let len = u32::try_from(body.len() + 4).expect("an input is short");
                bytes.push(*tag);
                bytes.extend_from_slice(&len.to_be_bytes());
                bytes.extend_from_slice(body);
            }
        }
    }
    let seen = scan(side, std::iter::once(&bytes[..]));
    assert_eq!(scan(side, pieces(&bytes, &input.cuts)), seen);
    assert_eq!(scan(side, bytes.chunks(1)), seen);

    let (mut rest, mut count) = (&bytes[..], 0);
    let fault = loop {
        match frame::whole(side, rest) {
            Ok(Some((tag, body, len))) => {
                let header = seen.headers[count];
                assert_eq!((header.tag, usize::try_from(header.body_len)), (tag, Ok(body.len())));
                assert_eq!(len, HEADER_LEN + body.len());
                rest = &rest[len..];
                count += 1;
            }
            Ok(None) => break None,
            Err(fault) => break Some(fault),
        }
    };
    assert_eq!(fault, seen.fault);
    // The scanner also shows the header of a message whose body is not all there.
    assert!(seen.headers.len() - count <= 1);
});
