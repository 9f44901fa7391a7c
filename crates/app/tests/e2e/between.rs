//! Sessions that move between two servers that are no copies of each other: types have other OIDs there, and with
//! `HOLDFAST_TEST_BINDIR` the servers are of two majors.

use std::process::Command;

use pg::Connection;
use wire::frontend;

use crate::kinds::{KINDS, ROLES};
use crate::support::{HOLDFAST, Installation, Second, connect, extended, run, shown, value};

fn mood(connection: &mut Connection) -> impl Future<Output = Vec<Option<String>>> {
    let mut out = Vec::new();
    frontend::bind_text(&mut out, b"", b"moods", &[Some(b"{sad,happy}"), Some(b"5")]);
    frontend::execute(&mut out, b"", 0);
    frontend::sync(&mut out);
    async move { extended(connection, &out).await }
}

#[tokio::test]
async fn sessions_move_between_servers_whose_types_have_other_oids() {
    let here = Installation::start_on_system("between-a");
    let there = Installation::start("between-b");
    run(&mut there.direct("a").await, "CREATE TYPE in_the_way AS ENUM ('x')").await;
    for one in [&here, &there] {
        let mut direct = one.direct("a").await;
        run(&mut direct, ROLES).await;
        run(
            &mut direct,
            "CREATE SCHEMA odd; CREATE TYPE odd.\"Mood \"\"x\" AS ENUM ('sad', 'happy')",
        )
        .await;
    }
    let servers = [here.facts.servers["a"], there.facts.servers["a"]];
    let app = "auth = \"trust\"\nsslmode = \"disable\"";
    let between = Second::start(&here.dir.join("between"), "", app, servers);
    let mut sessions = Vec::new();
    for (name, set_up, look) in KINDS.iter().filter(|(name, ..)| *name != "locks of every form") {
        let mut session = connect(between.port, "postgres", None).await.unwrap();
        for sql in *set_up {
            run(&mut session, sql).await;
        }
        let before = value(&mut session, look).await;
        sessions.push((name, look, before, session));
    }
    let mut typed = connect(between.port, "postgres", None).await.unwrap();
    let mut out = Vec::new();
    let sql = b"SELECT ($1)[2]::text || pg_typeof($1) || $2 FROM (VALUES (1)) v WHERE ($1)[1] < odd.\"Mood \"\"x\" 'happy'";
    let oid: u32 =
        value(&mut typed, "SELECT 'odd.\"Mood \"\"x\"[]'::regtype::oid").await.parse().unwrap();
    frontend::parse(&mut out, b"moods", sql, &[oid, 23]);
    frontend::sync(&mut out);
    extended(&mut typed, &out).await;
    let before = mood(&mut typed).await;
    let output = Command::new(HOLDFAST)
        .args(["--api", &between.api, "move", "shop", "--all", "--to", "b"])
        .output()
        .unwrap();
    let text = shown(&output);
    for (name, look, before, session) in &mut sessions {
        assert_eq!(value(session, look).await, *before, "{name}: {text}");
    }
    assert_eq!(mood(&mut typed).await, before);
    let port = value(&mut typed, "SELECT inet_server_port()").await;
    assert_eq!(port, there.facts.servers["a"].to_string(), "{text}");
    let now = value(&mut typed, "SELECT 'odd.\"Mood \"\"x\"[]'::regtype::oid").await;
    assert_ne!(now, oid.to_string(), "the test needs other OIDs");
    // Values of sequences are another server's, a notification of this one does not arrive there, and from 18 a NOT NULL
    // of a temporary object is a constraint with a name.
    let reasons = ["currval", "no answer", "a temporary object"];
    let stays = |line: &&str| reasons.iter().any(|reason| line.contains(reason));
    let stays = text.lines().filter(stays).count();
    let all = sessions.len() + 1;
    assert!(text.contains(&format!("{} of {all} sessions moved", all - stays)), "{text}");
}
