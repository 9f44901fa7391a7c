//! Sessions that share servers and speak the protocol message by message: names, halves of batches, whatever comes in
//! pieces.

use pg::Connection;
use wire::frontend::{self, Target};

use crate::support::{Installation, console, extended, run, value};

/// Names that look like the servers' own, and messages that do not end: whoever sends them harms nobody else.
#[tokio::test]
async fn hostile_names_harm_nobody() {
    let installation = Installation::start_pooled("pool-names", 1);
    let mut other = installation.connect().await;
    // Whatever number its statements get, one is called as it is.
    let mut one = installation.connect().await;
    for pool in 1..5 {
        for number in 1..40 {
            let name = format!("holdfast_{pool}_{number}");
            let mut out = Vec::new();
            frontend::parse(&mut out, name.as_bytes(), b"SELECT $1::int", &[]);
            frontend::sync(&mut out);
            // Too few parameters: the error says the name.
            frontend::bind_text(&mut out, b"", name.as_bytes(), &[]);
            frontend::sync(&mut out);
            one.send(&out).await.unwrap();
            one.answers().await.unwrap();
            let error = one.answers().await.unwrap_err().to_string();
            assert!(error.contains(&format!("\"{name}\"")), "{name}: {error}");
        }
    }
    // A Parse of a name that is taken, and has no end.
    let mut out = Vec::new();
    frontend::parse(&mut out, b"a", b"SELECT 1", &[]);
    frontend::sync(&mut out);
    out.extend_from_slice(b"P\0\0\0\x05a");
    frontend::sync(&mut out);
    one.send(&out).await.unwrap();
    one.answers().await.unwrap();
    assert!(one.answers().await.unwrap_err().to_string().contains("08P01"));
    assert_eq!(value(&mut one, "SELECT 1").await, "1");
    for (tag, body) in
        [(b'D', b"Sholdfast_1_1".as_slice()), (b'C', b"Sholdfast_1_1"), (b'D', b"Sa"), (b'C', b"S")]
    {
        let mut rude = installation.connect().await;
        let mut out = vec![tag];
        out.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        out.extend_from_slice(body);
        frontend::sync(&mut out);
        rude.send(&out).await.unwrap();
        assert!(rude.answers().await.is_err(), "{}", char::from(tag));
        assert_eq!(value(&mut other, "SELECT 1").await, "1");
    }
}

/// The messages of a batch, up to its ReadyForQuery: tags, and SQLSTATEs of errors.
async fn tags(connection: &mut Connection) -> String {
    let mut shown = String::new();
    loop {
        let message = connection.receive().await.unwrap();
        shown.push(char::from(message.tag));
        if let wire::backend::Backend::Error(fields) = message.view().unwrap() {
            shown.push_str(&fields.sqlstate().unwrap().to_string());
        }
        if message.tag == b'Z' {
            return shown;
        }
    }
}

/// A statement is judged although the names before it come in pieces, whatever they are.
#[tokio::test]
async fn names_that_come_in_pieces_hide_nothing() {
    let installation = Installation::start_pooled("pool-pieces", 1);
    let mut other = installation.connect().await;
    let mut one = installation.connect().await;
    let portal = vec![b'p'; 9_500];
    let mut out = Vec::new();
    frontend::parse(&mut out, b"", b"SELECT set_config('app.leak', 'secret', false)", &[]);
    frontend::bind_text(&mut out, &portal, b"", &[]);
    frontend::execute(&mut out, &portal, 0);
    frontend::sync(&mut out);
    let (first, rest) = out.split_at(9_000);
    one.send(first).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    one.send(rest).await.unwrap();
    one.answers().await.unwrap();
    let look = "SELECT current_setting('app.leak', true)";
    assert_eq!(value(&mut one, look).await, "secret");
    assert_eq!(other.value(look).await.unwrap(), None);
    // Names that have no end are refused before anything of them reaches a server.
    let mut out = Vec::new();
    frontend::bind_text(&mut out, &vec![b'p'; 200_000], b"", &[]);
    let mut of_parse = Vec::new();
    frontend::parse(&mut of_parse, &vec![b'n'; 200_000], b"SELECT 1", &[]);
    for bytes in [&out[..70_000], &of_parse[..70_000]] {
        let mut rude = installation.connect().await;
        rude.send(bytes).await.unwrap();
        let told = rude.receive().await.unwrap();
        let wire::backend::Backend::Error(fields) = told.view().unwrap() else { panic!() };
        assert_eq!(fields.sqlstate().unwrap().to_string(), "08P01");
        assert!(fields.message().contains("at most 65536 is allowed"), "{}", fields.message());
    }
    assert_eq!(value(&mut other, "SELECT 1").await, "1");
}

/// Clients that leave in the middle of something, or stop there, leave a server that others can use, or none.
#[tokio::test]
async fn half_a_batch_holds_nobody_up() {
    let installation = Installation::start_pooled("pool-halves", 1);
    let mut last = installation.connect().await;
    run(&mut last, "CREATE TABLE t (n int)").await;
    let batch = |sync: bool| {
        let mut out = Vec::new();
        frontend::parse(&mut out, b"", b"INSERT INTO t VALUES (1)", &[]);
        frontend::bind_text(&mut out, b"", b"", &[]);
        frontend::execute(&mut out, b"", 0);
        if sync {
            frontend::sync(&mut out);
        }
        out
    };
    let mut half_execute = batch(false);
    half_execute.truncate(half_execute.len() - 4);
    let mut goodbye = batch(false);
    frontend::terminate(&mut goodbye);
    let mut odd_goodbye = Vec::new();
    frontend::query(&mut odd_goodbye, b"SELECT pg_sleep(0.1)");
    odd_goodbye.extend_from_slice(&[b'X', 0, 0, 0, 8, 1, 2, 3, 4]);
    let cases = [
        ("no sync", batch(false)),
        ("a second one without", [batch(true), batch(false)].concat()),
        ("goodbye", goodbye),
        ("half a message", half_execute),
        ("a flush with a body", b"H\0\0\0\x05x".to_vec()),
        ("data that nobody waits for", b"d\0\0\0\x68x".to_vec()),
        ("a goodbye with a body", odd_goodbye),
    ];
    for (name, bytes) in cases {
        let mut one = installation.connect().await;
        one.send(&bytes).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(30)).await;
        drop(one);
        assert_eq!(value(&mut last, "SELECT 2").await, "2", "{name}");
    }
    assert_eq!(value(&mut last, "SELECT count(*) FROM t").await, "1");
    // One that stays, and says no more.
    let mut slow = Vec::new();
    for bytes in [b"Q\0\0\0\x20SELE".as_slice(), b"P\0\0\0\x20", b"B"] {
        let mut one = installation.connect().await;
        one.send(bytes).await.unwrap();
        slow.push(one);
        assert_eq!(value(&mut last, "SELECT 3").await, "3");
    }
}

/// A name stands for one statement, however long it or its text is.
#[tokio::test]
async fn a_name_is_taken_once() {
    let installation = Installation::start_pooled("pool-taken", 1);
    let mut direct = installation.direct("a").await;
    let mut pooled = installation.connect().await;
    let long = format!("SELECT 5 /* {} */", "x".repeat(20_000));
    let longer = format!("SELECT 6 /* {} */", "x".repeat(150_000));
    let (full, cut) = (vec![b'n'; 70], vec![b'n'; 63]);
    let texts = ["SELECT 7", &long, &longer];
    let names = [b"a".as_slice(), b"b", b"c", &full, &cut];
    for first in texts {
        for second in texts {
            for (at, name) in names.iter().enumerate() {
                let mut seen = Vec::new();
                for one in [&mut direct, &mut pooled] {
                    let mut out = Vec::new();
                    let other = if at == 4 { &full } else { *name };
                    frontend::parse(&mut out, name, first.as_bytes(), &[]);
                    frontend::sync(&mut out);
                    frontend::parse(&mut out, other, second.as_bytes(), &[]);
                    frontend::sync(&mut out);
                    frontend::bind_text(&mut out, b"", name, &[]);
                    frontend::execute(&mut out, b"", 0);
                    frontend::sync(&mut out);
                    frontend::close(&mut out, Target::Statement(other));
                    frontend::sync(&mut out);
                    frontend::bind_text(&mut out, b"", name, &[]);
                    frontend::sync(&mut out);
                    one.send(&out).await.unwrap();
                    let mut shown = String::new();
                    for _ in 0..5 {
                        shown += &tags(one).await;
                    }
                    seen.push(shown);
                }
                let (first, second) = (first.len(), second.len());
                assert_eq!(seen[0], seen[1], "{} {first} {second}", name.len());
            }
        }
    }
}

/// Half a message behind a whole one keeps nobody waiting for longer than a moment.
#[tokio::test]
async fn half_a_message_behind_a_whole_one_frees_its_server() {
    let installation = Installation::start_pooled("pool-behind", 1);
    let mut last = installation.connect().await;
    for half in [b"Q".as_slice(), b"S\0\0", b"D\0\0\0\x08S"] {
        let mut one = installation.connect().await;
        let mut out = Vec::new();
        frontend::query(&mut out, b"SELECT 1");
        out.extend_from_slice(half);
        one.send(&out).await.unwrap();
        one.answers().await.unwrap();
        assert_eq!(value(&mut last, "SELECT 2").await, "2");
    }
}

/// Statements that are too long to be looked at do not meet those of other sessions.
#[tokio::test]
async fn long_statements_see_nothing_of_others() {
    let installation = Installation::start_pooled("pool-long", 1);
    let mut other = installation.connect().await;
    let mut out = Vec::new();
    frontend::parse(&mut out, b"s", b"SELECT 'a secret'", &[]);
    frontend::sync(&mut out);
    extended(&mut other, &out).await;
    let look = |len| {
        let look = "SELECT count(*) FROM pg_prepared_statements WHERE statement ~ 'secret'";
        format!("{look} AND name <> 'long' /* {} */", "x".repeat(len))
    };
    let mut one = installation.connect().await;
    assert_eq!(value(&mut one, &look(200_000)).await, "0");
    let mut out = Vec::new();
    frontend::bind_text(&mut out, b"", b"s", &[]);
    frontend::execute(&mut out, b"", 0);
    frontend::sync(&mut out);
    assert_eq!(extended(&mut other, &out).await, [Some("a secret".to_owned())]);
    for len in [20_000, 200_000] {
        let mut one = installation.connect().await;
        let mut out = Vec::new();
        frontend::parse(&mut out, b"long", look(len).as_bytes(), &[]);
        frontend::bind_text(&mut out, b"", b"long", &[]);
        frontend::execute(&mut out, b"", 0);
        frontend::sync(&mut out);
        assert_eq!(extended(&mut one, &out).await, [Some("0".to_owned())], "{len}");
    }
}

/// What is skipped behind an error has not been done: neither a statement that was let go of nor one that was made for a
/// DEALLOCATE. And whoever leaves leaves no session behind.
#[tokio::test]
async fn what_is_skipped_holds_no_server() {
    let installation = Installation::start_pooled("pool-skipped", 2);
    let mut secret = installation.connect().await;
    let mut out = Vec::new();
    frontend::parse(&mut out, b"s", b"SELECT 'a secret of another'", &[]);
    frontend::sync(&mut out);
    extended(&mut secret, &out).await;
    let fails = |out: &mut Vec<u8>| {
        frontend::parse(out, b"", b"SELECT 1/0", &[]);
        frontend::bind_text(out, b"", b"", &[]);
        frontend::execute(out, b"", 0);
    };
    // Statements of others that were to be let go of are let go of later.
    let mut one = installation.connect().await;
    let look =
        b"SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%another'".as_slice();
    for _ in 0..2 {
        let mut out = Vec::new();
        fails(&mut out);
        frontend::parse(&mut out, b"", look, &[]);
        frontend::bind_text(&mut out, b"", b"", &[]);
        frontend::execute(&mut out, b"", 0);
        frontend::sync(&mut out);
        one.send(&out).await.unwrap();
        assert!(one.answers().await.is_err());
        assert_eq!(value(&mut one, std::str::from_utf8(look).unwrap()).await, "0");
    }
    drop(one);
    // A DEALLOCATE behind an error, on a server that lacks the statement.
    let mut holder = installation.connect().await;
    let mut one = installation.connect().await;
    let mut out = Vec::new();
    frontend::parse(&mut out, b"a", b"SELECT 56", &[]);
    frontend::sync(&mut out);
    extended(&mut one, &out).await;
    run(&mut holder, "BEGIN").await;
    let mut out = Vec::new();
    fails(&mut out);
    frontend::query(&mut out, b"DEALLOCATE a");
    frontend::sync(&mut out);
    one.send(&out).await.unwrap();
    assert!(one.answers().await.is_err());
    run(&mut holder, "COMMIT").await;
    drop(one);
    // A client that leaves without having read that its session keeps a server.
    let mut one = installation.connect().await;
    let mut out = Vec::new();
    frontend::parse(&mut out, b"z", b"SELECT '5'", &[]);
    frontend::sync(&mut out);
    extended(&mut one, &out).await;
    let mut out = Vec::new();
    frontend::query(&mut out, b"SET TimeZone = 'Asia/Tokyo'");
    frontend::terminate(&mut out);
    one.send(&out).await.unwrap();
    drop(one);
    drop(secret);
    drop(holder);
    let mut admin = console(&installation).await;
    while admin.query("SHOW SESSIONS").await.unwrap().iter().any(|answer| !answer.rows.is_empty()) {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let (mut one, mut other) = (installation.connect().await, installation.connect().await);
    run(&mut one, "BEGIN").await;
    run(&mut other, "BEGIN").await;
}
