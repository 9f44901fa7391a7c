//! Targets on which a session cannot be what it was: it stays, and says why; nothing is left there.

use pg::Connection;

use crate::support::{Installation, Second, connect, run, shown, value};

/// Nobody but the one who asks.
async fn is_alone(there: &mut Connection) -> bool {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' \
        AND application_name <> 'holdfast'";
    value(there, count).await == "1"
}

#[tokio::test]
async fn a_session_stays_where_the_target_lacks_what_it_needs() {
    let here = Installation::start_on_system("targets-a");
    let there = Installation::start_on_system("targets-b");
    let (mut a, mut b) = (here.direct("a").await, there.direct("a").await);
    for one in [&mut a, &mut b] {
        run(one, "CREATE ROLE app LOGIN; GRANT CREATE, TEMP ON DATABASE postgres TO app").await;
    }
    run(&mut a, "CREATE ROLE reader; GRANT reader TO app; CREATE SCHEMA hs; GRANT USAGE ON SCHEMA hs TO app").await;
    run(&mut a, "CREATE EXTENSION hstore SCHEMA hs; CREATE TYPE mood AS ENUM ('sad')").await;
    run(&mut a, "CREATE TABLE only_here (n int); GRANT SELECT ON only_here TO app").await;
    let servers = [here.facts.servers["a"], there.facts.servers["a"]];
    let app = "auth = \"trust\"\nsslmode = \"disable\"";
    let proxy = Second::start(&here.dir.join("targets"), "", app, servers);
    let move_all = || {
        let args = ["--api", &proxy.api, "move", "shop", "--all", "--to", "b", "--deadline", "20s"];
        std::process::Command::new(crate::support::HOLDFAST).args(args).output().unwrap()
    };
    let cases = [
        ("SET ROLE reader", "role \"reader\" does not exist", "SELECT current_user", "reader"),
        (
            "CREATE TEMP TABLE h (x hs.hstore); INSERT INTO h VALUES ('a=>1')",
            "schema \"hs\" does not exist",
            "SELECT x OPERATOR(hs.->) 'a' FROM h",
            "1",
        ),
        (
            "CREATE TEMP TABLE m (x mood); INSERT INTO m VALUES ('sad')",
            "type \"public.mood\" does not exist",
            "SELECT x FROM m",
            "sad",
        ),
        (
            "PREPARE p AS SELECT count(*) FROM only_here",
            "relation \"only_here\" does not exist",
            "EXECUTE p",
            "0",
        ),
        (
            "SET default_text_search_config = 'simple'; SET search_path = hs",
            "",
            "SHOW search_path",
            "hs",
        ),
    ];
    for (set_up, reason, look, expected) in cases {
        let mut session = connect(proxy.port, "app", None).await.unwrap();
        run(&mut session, set_up).await;
        let output = move_all();
        let text = shown(&output);
        assert_eq!(output.status.success(), reason.is_empty(), "{set_up}: {text}");
        assert!(text.contains(reason), "{set_up}: {text}");
        assert_eq!(value(&mut session, look).await, expected, "{set_up}");
        let stands = value(&mut session, "SELECT inet_server_port()").await;
        assert_eq!(stands, servers[usize::from(reason.is_empty())].to_string());
        drop(session);
        while !is_alone(&mut b).await {}
    }
    // No connection is free for it.
    run(&mut b, "ALTER ROLE app CONNECTION LIMIT 0").await;
    let mut session = connect(proxy.port, "app", None).await.unwrap();
    run(&mut session, "SET work_mem = '5MB'").await;
    let text = shown(&move_all());
    assert!(text.contains("too many connections for role \"app\""), "{text}");
    assert_eq!(value(&mut session, "SHOW work_mem").await, "5MB");
    run(&mut b, "ALTER ROLE app CONNECTION LIMIT -1").await;
    // The disk takes no more.
    let pid = std::fs::read_to_string(there.dir.join("a/postmaster.pid")).unwrap();
    let limit = |bytes: &str| {
        // Only its own user may.
        let by = ["runuser", "-u", "postgres", "--", "prlimit"];
        let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap());
        let command = if owner == 0 { &by[..] } else { &by[4..] };
        let status = std::process::Command::new(command[0])
            .args(&command[1..])
            .args([&format!("--pid={}", pid.lines().next().unwrap()), &format!("--fsize={bytes}")])
            .status()
            .unwrap();
        assert!(status.success());
    };
    limit("20000000:unlimited");
    let rows = "CREATE TEMP TABLE big AS SELECT g AS n, repeat('x', 1000) AS x FROM generate_series(1, 30000) g";
    run(&mut session, rows).await;
    let text = shown(&move_all());
    assert!(text.contains("(53100)"), "{text}");
    assert_eq!(value(&mut session, "SELECT count(*) FROM big").await, "30000");
    limit("unlimited:unlimited");
    while !is_alone(&mut b).await {}
    let output = move_all();
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(
        value(&mut session, "SELECT concat(count(*), max(length(x))) FROM big").await,
        "300001000"
    );
    let stands = value(&mut session, "SELECT inet_server_port()").await;
    assert_eq!(stands, servers[1].to_string());
}
