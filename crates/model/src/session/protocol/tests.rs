//! Transcripts: `>` is passed to the server, `<` comes from it. The last line says where the session stands.

use super::*;

/// Plays messages written as `>Q`, `>P:` (unnamed Parse), `>Pn` (named), `>DS`, `>CSx`, `<1`, `<ZI`, ...
pub(super) fn play(transcript: &str) -> Protocol {
    let mut protocol = Protocol::new();
    play_on(&mut protocol, transcript);
    protocol
}

fn play_on(protocol: &mut Protocol, transcript: &str) {
    for word in transcript.split_whitespace() {
        let bytes = word.as_bytes();
        let named = |at: usize| bytes.get(at).map(|b| if *b == b':' { 0 } else { *b });
        match bytes[0] {
            b'>' => {
                protocol.on_frontend(bytes[1], named(2), named(3));
            }
            _ => {
                let status = bytes.get(2).and_then(|byte| TxStatus::from_byte(*byte));
                protocol.on_backend(bytes[1], status);
            }
        }
    }
}

#[track_caller]
fn safe(transcript: &str) {
    let protocol = play(transcript);
    assert!(protocol.is_safe_point() && !protocol.is_doubtful(), "{transcript}: {protocol:?}");
}

#[track_caller]
fn doubtful(transcript: &str) {
    let protocol = play(transcript);
    assert!(protocol.is_safe_point() && protocol.is_doubtful(), "{transcript}: {protocol:?}");
}

#[track_caller]
fn unsafe_(transcript: &str) {
    let protocol = play(transcript);
    assert!(!protocol.is_safe_point(), "{transcript}: {protocol:?}");
    assert!(!protocol.is_out_of_step(), "{transcript}: {protocol:?}");
}

#[test]
fn a_simple_query_is_under_way_until_it_is_ready() {
    unsafe_(">Q");
    unsafe_(">Q <T <D <C");
    safe(">Q <T <D <C <ZI");
    unsafe_(">Q <C <ZT");
    safe(">Q <E <ZE");
}

#[test]
fn a_failed_transaction_can_go_on_from_a_savepoint_only() {
    let mut protocol = play(">Q <C <ZT >Q <C");
    protocol.on_savepoint();
    play_on(&mut protocol, "<ZT >Q <E <ZE");
    assert!(!protocol.is_safe_point());
    play_on(&mut protocol, ">Q <C <ZI >Q <C <ZT >Q <E <ZE");
    assert!(protocol.is_safe_point() && !protocol.is_idle());
    assert!(protocol.must_wait(b'Q'));
}

#[test]
fn a_ready_that_answers_an_earlier_sync_is_not_the_end() {
    unsafe_(">P: >B >E >S >P: >B >E >S <1 <2 <C <ZI");
    safe(">P: >B >E >S >P: >B >E >S <1 <2 <C <ZI <1 <2 <C <ZI");
}

#[test]
fn a_batch_without_its_sync_is_not_the_end() {
    unsafe_(">P: >B >E >H <1 <2 <C");
    safe(">P: >B >E >H <1 <2 <C >S <ZI");
}

#[test]
fn an_error_takes_off_what_the_server_skips() {
    safe(">P: >B >E >S <1 <E <ZI");
    safe(">P: >B >DP >E >S <E <ZI");
    unsafe_(">P: >B >E <E");
    unsafe_(">P: >B >E <E >Pn >B >E");
    safe(">P: >B >E <E >Pn >B >E >S <ZI");
    unsafe_(">P: >E >S >P: >E >S <E <ZI");
    safe(">P: >E >S >P: >E >S <E <ZI <1 <C <ZI");
}

#[test]
fn a_query_that_is_sent_while_the_server_skips_is_skipped_too() {
    safe(">P: >E <E >Q >S <ZI");
}

#[test]
fn describe_of_a_statement_is_answered_by_its_second_message() {
    unsafe_(">Pn >DS <1 <t");
    safe(">Pn >DS >S <1 <t <n <ZI");
    safe(">Pn >DS >S <1 <t <T <ZI");
}

#[test]
fn copy_in_by_a_simple_query_ends_with_ready() {
    unsafe_(">Q <G >d >d >c");
    safe(">Q <G >d >d >c <C <ZI");
    safe(">Q <G >d >f <E <ZI");
    safe(">Q <G >d <E >d >c <ZI");
    safe(">Q <G >d >c <E <ZI");
    safe(">Q <G >d <E <ZI >d >c");
}

#[test]
fn a_sync_inside_an_extended_copy_is_answered_by_nothing_or_in_doubt() {
    unsafe_(">P: >B >E >S <1 <2 <G >d >c <C");
    safe(">P: >B >E >S <1 <2 <G >d >c >S <C <ZI");
    doubtful(">P: >B >E >S <1 <2 <G >d >c >S <E <ZI");
    doubtful(">P: >B >E >S <1 <2 <G >d <E >d >c >S <ZI");
}

#[test]
fn copy_out_and_a_suspended_portal_end_with_ready() {
    safe(">Q <H <d <d <c <C <ZI");
    unsafe_(">B >E >H <2 <D <s");
    unsafe_(">B >E >S <2 <D <s <ZT");
}

#[test]
fn function_calls_and_empty_queries_are_counted() {
    unsafe_(">F <V");
    safe(">F <V <ZI");
    safe(">F <E <ZI");
    safe(">Q <I <ZI");
    safe(">P: >B >E >S <1 <2 <I <ZI");
}

#[test]
fn asynchronous_messages_answer_nothing() {
    safe("<S <A <N");
    unsafe_(">Q <S <A <N");
}

#[test]
fn an_answer_that_was_not_asked_for_is_noticed() {
    for transcript in ["<ZI", "<1", "<C", ">Q <1", ">Pn <2"] {
        assert!(play(transcript).is_out_of_step(), "{transcript}");
    }
}

#[test]
fn the_unnamed_statement_is_known_exactly() {
    let unnamed = |transcript| play(transcript).unnamed();
    assert_eq!(unnamed(""), Unnamed::Absent);
    assert_eq!(unnamed(">P: >S <1 <ZI"), Unnamed::Last);
    assert_eq!(unnamed(">Pn >S <1 <ZI"), Unnamed::Absent);
    assert_eq!(unnamed(">P: >S <1 <ZI >Q <C <ZI"), Unnamed::Absent);
    assert_eq!(unnamed(">P: >S <E <ZI"), Unnamed::Absent);
    assert_eq!(unnamed(">P: >B >E >S <1 <2 <E <ZI"), Unnamed::Last);
    assert_eq!(unnamed(">P: >P: >S <1 <1 <ZI"), Unnamed::Last);
    assert_eq!(unnamed(">P: >P: >S <1 <E <ZI"), Unnamed::Absent);
    assert_eq!(unnamed(">P: >B >P: >S <1 <E <ZI"), Unnamed::Earlier);
    assert_eq!(unnamed(">P: >B >P: >S <E <ZI"), Unnamed::Absent);
    assert_eq!(unnamed(">P: >CS: >S <1 <3 <ZI"), Unnamed::Absent);
    assert_eq!(unnamed(">P: >CSx >S <1 <3 <ZI"), Unnamed::Last);
}

#[test]
fn an_unnamed_statement_outlives_what_the_server_could_not_read() {
    let undecoded = Some(SqlState::CHARACTER_NOT_IN_REPERTOIRE);
    let failed = |before: &str, after: &str| {
        let mut protocol = play(before);
        protocol.on_backend_error(undecoded);
        play_on(&mut protocol, after);
        assert!(protocol.is_safe_point());
        protocol.unnamed()
    };
    assert_eq!(failed(">P: >S <1 <ZI >P: >S", "<ZI"), Unnamed::Earlier);
    assert_eq!(failed(">P: >S", "<ZI"), Unnamed::Absent);
    assert_eq!(failed(">P: >S <1 <ZI >Q", "<ZI"), Unnamed::Earlier);
    assert_eq!(failed(">P: >S <1 <ZI >Q", "<ZI >Q <C <ZI"), Unnamed::Absent);
    let mut protocol = play(">P: >S <1 <ZI >P: >S");
    protocol.on_backend_error(Some(SqlState::SYNTAX_ERROR));
    assert_eq!(protocol.unnamed(), Unnamed::Absent);
}

/// What fuzzing against a model of the server has found.
#[test]
fn a_copy_that_ends_oddly_is_never_a_safe_point_too_early() {
    // A batch behind the Sync of a COPY is open.
    unsafe_(">E <G >d >c >S >P: >B >E <C <ZI <1 <2 <C");
    safe(">E <G >d >c >S >P: >B >E <C <ZI <1 <2 <C >S <ZI");
    // CopyFail, or CopyDone, without data: the Sync before it was ignored, or not.
    doubtful(">E >S <G >f >S <E <ZI");
    safe(">E >S <G >f >S <E <ZI <ZI");
    safe(">E >S <G >f >S <E <ZI >Q <C <ZI");
    // The same with data, where a trigger has failed before any was read.
    doubtful(">E >S <G >d >c >S <E <ZI");
    safe(">E >S <G >d >c >S <E <ZI <ZI");
    safe(">E >S <G >d >c >S <E <ZI >P: >B >E >S <1 <2 <C <ZI");
    safe(">E >S <G >d >c >S <E <ZI >Q <ZI <C <ZI");
    // The server may have read the Sync before it failed, also where no data came.
    doubtful(">E >S <G <E >c >S <ZI");
    safe(">E >S <G <E <ZI");
    safe(">E >S <G <E <E <ZI");
    // Clients that harm only themselves.
    doubtful(">E <G >d >S <E >S <ZI");
    unsafe_(">E >c >S <G >c >S <C <ZI");
    safe(">E >c >S <G >c >S <C <ZI <ZI");
    // The end of a COPY where there is none.
    safe(">P: >B >E >c >S <1 <2 <C <ZI");
    safe(">Q >c <C <ZI");
    assert!(play("<G").is_out_of_step());
    assert!(play(">E >Q >S <G >P: <E").is_out_of_step());
    assert!(play(">E >S <G <E >CSx <ZI").is_out_of_step());
}

#[test]
fn the_queue_is_bounded() {
    let mut protocol = Protocol::new();
    for _ in 0..REQUESTS_MAX {
        assert!(!protocol.is_full());
        protocol.on_frontend(b'S', None, None);
    }
    assert!(protocol.is_full());
}
