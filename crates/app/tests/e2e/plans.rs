//! Plans on real servers: approved, done, undone, drilled, cut off at every point and taken up again.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Installation, run, shown, value};

const POLL: Duration = Duration::from_millis(50);
const WAIT_MAX: Duration = Duration::from_secs(90);

/// A step that writes a line, and one that takes it back.
fn notes(installation: &Installation) -> PathBuf {
    installation.dir.join("notes")
}

fn noted(installation: &Installation) -> Vec<String> {
    let text = std::fs::read_to_string(notes(installation)).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// A step that writes `text` to the notes, and how that is undone.
fn note(installation: &Installation, name: &str) -> String {
    let file = notes(installation);
    let exec = |text: &str| {
        format!("[\"/bin/sh\", \"-c\", \"echo {text} $HOLDFAST_STEP >> {}\"]", file.display())
    };
    format!(
        "[[app.plan.step]]\nname = \"{name}\"\ntimeout = \"2s\"\nexec = {}\nundo = {{ exec = {} }}\n",
        exec("do"),
        exec("undo")
    )
}

fn activate(to: &str, more: &str) -> String {
    format!(
        "[[app.plan.step]]\nname = \"switch\"\nactivate = \"{to}\"\ndeadline = \"10s\"\n{more}\n"
    )
}

/// Adds these plans to the application.
pub(crate) fn plan(installation: &mut Installation, text: &str) {
    installation.reconfigure(|config| format!("{config}\n{text}"));
}

fn wait_for(installation: &Installation, id: &str, what: &str) -> String {
    let deadline = Instant::now() + WAIT_MAX;
    loop {
        let text = shown(&installation.holdfast(&["executions", id]));
        if text.contains(what) {
            return text;
        }
        assert!(Instant::now() < deadline, "no `{what}`: {text}");
        std::thread::sleep(POLL);
    }
}

#[tokio::test]
async fn a_plan_is_approved_and_does_all_that_it_says() {
    let mut installation = Installation::start("plan");
    let hook = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/hook", hook.local_addr().unwrap());
    let called = std::thread::spawn(move || {
        let (mut stream, _) = hook.accept().unwrap();
        let mut got = Vec::new();
        let mut part = [0; 4096];
        while !String::from_utf8_lossy(&got).contains('}') {
            let len = stream.read(&mut part).unwrap();
            got.extend_from_slice(&part[..len]);
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nseen").unwrap();
        String::from_utf8_lossy(&got).into_owned()
    });
    let text = [
        "[[app.plan]]\nname = \"to-b\"\nobjective = \"5m\"\n".to_owned(),
        "[[app.plan.step]]\nname = \"go\"\napproval = \"anybody\"\n".into(),
        activate("b", ""),
        "[[app.plan.step]]\nname = \"then\"\n".into(),
        format!("parallel = [{{ name = \"hook\", http = {{ url = \"{url}\" }} }}, "),
        "{ name = \"mark\", sql = \"INSERT INTO public.marks VALUES (1)\" }]\n".into(),
        "[[app.plan.step]]\nname = \"not-now\"\nwait = \"1s\"\n".into(),
        "only_if = [{ cell = \"a\", is = [\"active\"] }]\n".into(),
    ]
    .concat();
    plan(&mut installation, &text);
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE marks (n int); SET work_mem = '7MB'").await;

    let listed = shown(&installation.holdfast(&["plans", "shop"]));
    assert!(listed.contains("to-b, within 5m:") && listed.contains("  hook"), "{listed}");
    let dry = installation.holdfast(&["execute", "shop", "to-b", "--dry-run"]);
    let dry_text = shown(&dry);
    assert!(dry.status.success(), "{dry_text}");
    assert!(dry_text.contains("skipped: `a` of `shop` is passive, not active"), "{dry_text}");
    assert!(shown(&installation.holdfast(&["executions"])).lines().count() == 1);

    let begun = installation.holdfast(&["execute", "shop", "to-b", "--reason", "patch day"]);
    let text = shown(&begun);
    assert!(!begun.status.success() && text.contains("next: holdfast approve 1 go"), "{text}");
    assert_eq!(installation.active(), "a");
    let status = shown(&installation.holdfast(&["status", "shop"]));
    assert!(status.contains("! plan `to-b`: step `go` is asking"), "{status}");
    let second = shown(&installation.holdfast(&["execute", "shop", "to-b"]));
    assert!(second.contains("execution 1 carries out a plan"), "{second}");

    let approved = shown(&installation.holdfast(&["approve", "1"]));
    assert!(approved.contains("approved by local"), "{approved}");
    let text = wait_for(&installation, "1", "\ncompleted, ");
    assert!(text.contains("objective 5m: met"), "{text}");
    assert!(text.contains("200 OK seen") && text.contains("execution 2: switchover"), "{text}");
    assert!(text.contains("skipped"), "{text}");
    assert_eq!(installation.active(), "b");
    assert_eq!(value(&mut client, "SHOW work_mem").await, "7MB");
    assert_eq!(value(&mut client, "SELECT count(*) FROM marks").await, "1");
    let request = called.join().unwrap();
    assert!(request.contains("idempotency-key: plan:"), "{request}");
    assert!(request.contains("\"active\":\"b\"") && request.contains("\"epoch\":2"), "{request}");
    let audit = shown(&installation.holdfast(&["audit"]));
    assert!(audit.contains("patch day") && audit.contains("approve"), "{audit}");
    assert!(audit.contains("each as it was written"), "{audit}");
}

#[tokio::test]
async fn what_a_plan_has_done_is_undone_when_it_fails_and_after_a_drill() {
    let mut installation = Installation::start("plan-undo");
    let fails = "[[app.plan.step]]\nname = \"fails\"\nexec = [\"/bin/false\"]\n";
    let text = [
        "[[app.plan]]\nname = \"fails\"\non_failure = \"undo\"\n".to_owned(),
        note(&installation, "first"),
        activate("b", "undo = { back = true }"),
        fails.into(),
        "[[app.plan]]\nname = \"drills\"\n".into(),
        note(&installation, "second"),
        activate("b", ""),
    ]
    .concat();
    plan(&mut installation, &text);
    let mut client = installation.connect().await;
    run(&mut client, "SET work_mem = '7MB'").await;
    let failed = installation.holdfast(&["execute", "shop", "fails"]);
    let text = shown(&failed);
    assert!(!failed.status.success() && text.contains("undone in part, "), "{text}");
    assert!(text.contains("left as they are: fails"), "who knows what that did: {text}");
    assert!(text.contains("reason: step `fails` failed"), "{text}");
    assert_eq!(noted(&installation), ["do first", "undo first"]);
    assert_eq!(installation.active(), "a");

    let drilled = installation.holdfast(&["execute", "shop", "drills", "--drill"]);
    let text = shown(&drilled);
    assert!(drilled.status.success() && text.contains("undone, "), "{text}");
    assert_eq!(noted(&installation)[2..], ["do second", "undo second"]);
    assert_eq!(installation.active(), "a");
    assert_eq!(value(&mut client, "SHOW work_mem").await, "7MB");
    let all = shown(&installation.holdfast(&["executions"]));
    assert_eq!(all.matches("switchover: ").count(), 4, "{all}");
}

/// The process ends before, in, and after each step, and within the switchover: nothing is done twice, nothing is left out, and
/// what may have been done is left to a person.
#[tokio::test]
async fn a_plan_that_is_cut_off_goes_on_and_does_nothing_twice() {
    for (name, at) in [
        ("begin", "plan:begin"),
        ("end", "plan:end"),
        ("hold", "hold:begin"),
        ("grant", "grant:begin"),
        ("promote", "promote:end"),
    ] {
        let mut installation = Installation::start(&format!("plan-cut-{name}"));
        let text = [
            "[[app.plan]]\nname = \"p\"\n".into(),
            activate("b", ""),
            note(&installation, "after"),
        ];
        plan(&mut installation, &text.concat());
        crate::support::signal(installation.pid(), "KILL");
        installation.wait_crashed();
        installation.restart(&[("HOLDFAST_CRASH_AT", at)]);
        let _ = installation.holdfast(&["execute", "shop", "p", "--detach"]);
        installation.wait_crashed();
        installation.restart(&[]);
        let text = match at {
            // What was taken back has failed, and is tried again when somebody says so.
            "hold:begin" => {
                let text = wait_for(&installation, "1", "next: holdfast retry 1 switch");
                assert!(text.contains("aborted, nothing changed"), "{at}: {text}");
                let _ = installation.holdfast(&["retry", "1"]);
                wait_for(&installation, "1", "\ncompleted, ")
            }
            _ => wait_for(&installation, "1", "\ncompleted, "),
        };
        assert_eq!(installation.active(), "b", "{at}: {text}");
        assert_eq!(noted(&installation), ["do after"], "{at}");
    }
}

#[tokio::test]
async fn a_step_that_may_have_been_done_waits_for_a_person() {
    let mut installation = Installation::start("plan-doubt");
    let text = ["[[app.plan]]\nname = \"p\"\n".to_owned(), note(&installation, "once")];
    plan(&mut installation, &text.concat());
    crate::support::signal(installation.pid(), "KILL");
    installation.wait_crashed();
    installation.restart(&[("HOLDFAST_CRASH_AT", "plan:end")]);
    let _ = installation.holdfast(&["execute", "shop", "p", "--detach"]);
    installation.wait_crashed();
    assert_eq!(noted(&installation), ["do once"]);
    installation.restart(&[]);
    let text = wait_for(&installation, "1", "next: holdfast retry 1 once");
    assert!(text.contains("look whether it was"), "{text}");
    // Who looks finds that it was.
    let skipped = shown(&installation.holdfast(&["skip", "1", "--reason", "it is in the notes"]));
    assert!(skipped.contains("skipped by local: it is in the notes"), "{skipped}");
    wait_for(&installation, "1", "\ncompleted, ");
    assert_eq!(noted(&installation), ["do once"]);
}

#[tokio::test]
async fn whoever_has_begun_a_plan_does_not_approve_it() {
    let mut installation = Installation::start("plan-roles");
    let mut tokens = String::new();
    let people = [("alice", "operator"), ("bob", "approver"), ("root", "admin")];
    for (name, role) in people {
        let file = installation.dir.join(name);
        std::fs::write(&file, format!("{name}-secret\n")).unwrap();
        let file = file.display();
        tokens.push_str(&format!(
            "[[control.token]]\nname = \"{name}\"\nrole = \"{role}\"\nfile = \"{file}\"\n\n"
        ));
    }
    let text =
        "[[app.plan]]\nname = \"p\"\n[[app.plan.step]]\nname = \"go\"\napproval = \"other\"\n";
    installation.reconfigure(|config| {
        format!("{}\n{text}", config.replacen("[[app]]", &format!("{tokens}[[app]]"), 1))
    });
    let ask = |who: &str, args: &[&str]| {
        let file = installation.dir.join(who).display().to_string();
        shown(&installation.holdfast(&[args, &["--token-file", &file]].concat()))
    };
    let refused = ask("bob", &["execute", "shop", "p"]);
    assert!(refused.contains("`bob` is approver, this takes operator"), "{refused}");
    let _ = ask("root", &["execute", "shop", "p"]);
    let refused = ask("alice", &["approve", "1"]);
    assert!(refused.contains("`alice` is operator, this takes approver"), "{refused}");
    let refused = ask("root", &["approve", "1"]);
    assert!(refused.contains("`root` has begun execution 1: another person approves"), "{refused}");
    let approved = ask("bob", &["approve", "1"]);
    assert!(approved.contains("approved by bob"), "{approved}");
    wait_for(&installation, "1", "\ncompleted, ");
}

/// What was being done when control ended goes on to its time limit at most, and is undone only after.
#[tokio::test]
async fn nothing_is_undone_while_it_may_still_be_done() {
    let mut installation = Installation::start("plan-late");
    let file = notes(&installation).display().to_string();
    let text = format!(
        "[[app.plan]]\nname = \"p\"\non_failure = \"undo\"\n\
         [[app.plan.step]]\nname = \"slow\"\ntimeout = \"4s\"\n\
         exec = [\"/bin/sh\", \"-c\", \"echo begun >> {file}; sleep 2; echo did >> {file}; sleep 60; echo late >> {file}\"]\n\
         undo = {{ exec = [\"/bin/sh\", \"-c\", \"echo undone >> {file}\"] }}\n"
    );
    plan(&mut installation, &text);
    let _ = installation.holdfast(&["execute", "shop", "p", "--detach"]);
    while noted(&installation).is_empty() {
        std::thread::sleep(POLL);
    }
    crate::support::signal(installation.pid(), "KILL");
    installation.wait_crashed();
    installation.restart(&[]);
    let text = wait_for(&installation, "1", "undone, ");
    assert!(text.contains("look whether it was"), "{text}");
    assert_eq!(noted(&installation), ["begun", "did", "undone"]);
}

#[tokio::test]
async fn what_a_plan_writes_by_sql_is_fenced_as_what_clients_write() {
    let mut installation = Installation::start("plan-sql");
    let sql = |cell: &str| {
        format!(
            "[[app.plan.step]]\nname = \"write-{cell}\"\nsql = \"INSERT INTO public.t VALUES (1)\"\ncell = \"{cell}\"\n"
        )
    };
    let fence = "[[app.plan.step]]\nname = \"fence\"\nfence = \"a\"\n";
    let text = ["[[app.plan]]\nname = \"p\"\n", fence, &sql("a")].concat();
    plan(&mut installation, &text);
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE t (n int)").await;
    let text = shown(&installation.holdfast(&["execute", "shop", "p"]));
    assert!(text.contains("cannot execute INSERT in a read-only transaction"), "{text}");
    assert_eq!(value(&mut client, "SELECT count(*) FROM t").await, "0");
}

#[tokio::test]
async fn a_drill_undoes_only_what_it_has_done() {
    let mut installation = Installation::start("plan-drill");
    let text = "[[app.plan]]\nname = \"p\"\n[[app.plan.step]]\nname = \"fence\"\nfence = \"a\"\n";
    plan(&mut installation, text);
    let fenced = installation.holdfast(&["fence", "shop", "a"]);
    assert!(fenced.status.success(), "{}", shown(&fenced));
    let drilled = installation.holdfast(&["execute", "shop", "p", "--drill"]);
    let text = shown(&drilled);
    assert!(drilled.status.success() && text.contains("undone, "), "{text}");
    let status = shown(&installation.holdfast(&["status", "shop"]));
    assert!(status.contains("cell `a` is fenced, nothing takes writes"), "{status}");
}

#[tokio::test]
async fn a_plan_begins_by_itself_when_its_server_dies_and_not_too_often() {
    let mut installation = Installation::start("plan-trigger");
    let text = [
        "[[app.plan]]\nname = \"lost\"\n".to_owned(),
        "[[app.plan.trigger]]\non = [\"DeadPrimary\", \"PrimaryHung\"]\nafter = \"1s\"\n".into(),
        note(&installation, "page"),
        activate("b", "only_if = [{ cell = \"b\", is = \"passive\" }]"),
        "[[app.plan.step]]\nname = \"back\"\nactivate = \"a\"\n".into(),
        "only_if = [{ cell = \"a\", is = \"active\" }]\n".into(),
    ];
    plan(&mut installation, &text.concat());
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE t (n int); INSERT INTO t VALUES (7)").await;
    installation.signal_server("a", "KILL");
    let text = wait_for(&installation, "1", "\ncompleted, ");
    assert!(text.contains("ungraceful") && text.contains("failover from `a` to `b`"), "{text}");
    assert_eq!(installation.active(), "b");
    let mut client = installation.connect().await;
    assert_eq!(value(&mut client, "SELECT n FROM t").await, "7");
    assert_eq!(noted(&installation), ["do page"]);
    let audit = shown(&installation.holdfast(&["audit"]));
    assert!(audit.contains("the server is dead (DeadPrimary)"), "{audit}");
    // Not twice in ten minutes.
    let deadline = Instant::now() + WAIT_MAX;
    while !shown(&installation.holdfast(&["status", "shop"])).contains("streams") {
        assert!(Instant::now() < deadline);
    }
    installation.signal_server("b", "KILL");
    while !shown(&installation.holdfast(&["status", "shop"]))
        .contains("plan `lost` does not begin by itself")
    {
        let status = shown(&installation.holdfast(&["status", "shop"]));
        assert!(Instant::now() < deadline, "{status}");
        std::thread::sleep(POLL);
    }
    assert_eq!(noted(&installation), ["do page"]);
}

#[tokio::test]
async fn a_plan_begins_by_an_alarm_that_is_red() {
    let mut installation = Installation::start("plan-alarm");
    let bad = installation.dir.join("bad");
    let text = [
        format!(
            "[[app.alarm]]\nname = \"file\"\nexec = [\"/bin/sh\", \"-c\", \"[ $HOLDFAST_STEP = file ] && [ ! -e {} ]\"]\n",
            bad.display()
        ),
        "every = \"200ms\"\nred_after = 2\n".into(),
        "[[app.alarm]]\nname = \"rows\"\nsql = \"SELECT count(*) > 0 FROM public.t\"\n".into(),
        "every = \"200ms\"\n".into(),
        "[[app.plan]]\nname = \"away\"\n[[app.plan.trigger]]\nalarms = [\"file\"]\n".into(),
        "mode = \"graceful\"\n".into(),
        activate("b", ""),
    ];
    plan(&mut installation, &text.concat());
    let status = || shown(&installation.holdfast(&["status", "shop"]));
    let wait = |words: &[&str]| {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            let status = status();
            if status.lines().any(|line| words.iter().all(|word| line.contains(word))) {
                return;
            }
            assert!(Instant::now() < deadline, "{words:?} is not in:\n{status}");
            std::thread::sleep(POLL);
        }
    };
    wait(&["file", "green"]);
    // There is no such table.
    wait(&["rows", "unknown", "does not exist"]);
    run(&mut installation.connect().await, "CREATE TABLE t (n int)").await;
    wait(&["! alarm `rows` is red", "f"]);
    run(&mut installation.connect().await, "INSERT INTO t VALUES (7)").await;
    wait(&["rows", "green"]);
    assert_eq!(installation.active(), "a");
    std::fs::write(&bad, "").unwrap();
    let text = wait_for(&installation, "1", "\ncompleted, ");
    assert!(text.contains("graceful") && text.contains("switchover from `a` to `b`"), "{text}");
    let audit = shown(&installation.holdfast(&["audit"]));
    assert!(audit.contains("alarm `file` is red"), "{audit}");
    // It is red still, and the plan does not begin again.
    wait(&["plan `away` does not begin by itself"]);
    // What is taken up anew is not known at first.
    std::fs::remove_file(&bad).unwrap();
    let path = installation.config();
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("name = \"rows\"", "name = \"other\"")).unwrap();
    let applied = shown(&installation.holdfast(&["apply"]));
    assert!(applied.contains("alarm"), "{applied}");
    wait(&["other", "green"]);
    assert!(!status().contains("rows"));
}

#[tokio::test]
async fn people_stop_a_plan_and_have_it_go_on_or_back() {
    let mut installation = Installation::start("plan-people");
    let text = [
        "[[app.plan]]\nname = \"p\"\n".to_owned(),
        note(&installation, "one"),
        "[[app.plan.step]]\nname = \"go\"\napproval = \"anybody\"\n".into(),
        "[[app.plan.step]]\nname = \"only-so\"\nexec = [\"/bin/true\"]\nmode = \"ungraceful\"\n"
            .into(),
        "[[app.plan.step]]\nname = \"wait\"\nwait = \"1s\"\n".into(),
        note(&installation, "two"),
    ];
    plan(&mut installation, &text.concat());
    let _ = installation.holdfast(&["execute", "shop", "p"]);
    let declined = shown(&installation.holdfast(&["decline", "1"]));
    assert!(declined.contains("declined by local"), "{declined}");
    let skip = shown(&installation.holdfast(&["skip", "1", "go"]));
    assert!(skip.contains("step `go` is failed: it cannot be skipped"), "{skip}");
    let _ = installation.holdfast(&["mode", "1", "ungraceful"]);
    let _ = installation.holdfast(&["retry", "1"]);
    wait_for(&installation, "1", "next: holdfast approve 1 go");
    let _ = installation.holdfast(&["pause", "1"]);
    let _ = installation.holdfast(&["approve", "1"]);
    let status = shown(&installation.holdfast(&["status", "shop"]));
    assert!(status.contains("! plan `p` is paused: holdfast resume 1"), "{status}");
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(noted(&installation), ["do one"]);
    let _ = installation.holdfast(&["resume", "1"]);
    let text = wait_for(&installation, "1", "\ncompleted, ");
    assert!(!text.contains("skipped"), "{text}");
    assert_eq!(noted(&installation), ["do one", "do two"]);

    let _ = installation.holdfast(&["execute", "shop", "p"]);
    let _ = installation.holdfast(&["cancel", "2", "--reason", "wrong day"]);
    let text = wait_for(&installation, "2", "\nundone, ");
    assert!(text.contains("reason: cancelled by local: wrong day"), "{text}");
    assert_eq!(noted(&installation)[2..], ["do one", "undo one"]);
    let late = shown(&installation.holdfast(&["approve", "2", "go"]));
    assert!(late.contains("execution 2 has ended: undone"), "{late}");
}

/// A process that ends with its test.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(program: &str, args: &[&str]) -> Ends {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ends(command.spawn().unwrap())
}

/// A name server that takes updates of `example.org` by a key, and what it says of `db`.
fn knot(dir: &Path, port: u16) -> Ends {
    std::fs::create_dir_all(dir).unwrap();
    let (shown, secret) = (dir.display(), "c2VzYW1lIG9wZW4gc2VzYW1lIG9wZW4gc2VzYW1lIQ==");
    let conf = format!(
        "server:\n  rundir: {shown}\n  listen: 127.0.0.1@{port}\n\
         database:\n  storage: {shown}\n\
         key:\n  - id: holdfast\n    algorithm: hmac-sha256\n    secret: {secret}\n\
         acl:\n  - id: update\n    key: holdfast\n    action: update\n\
         zone:\n  - domain: example.org\n    storage: {shown}\n    file: zone\n    acl: update\n"
    );
    std::fs::write(dir.join("knot.conf"), conf).unwrap();
    let zone = "example.org. 60 SOA ns.example.org. x.example.org. 1 60 60 60 60\n\
        example.org. 60 NS ns.example.org.\nns.example.org. 60 A 127.0.0.1\n\
        db.example.org. 5 A 10.0.0.1\ndb.example.org. 5 A 10.0.0.9\n";
    std::fs::write(dir.join("zone"), zone).unwrap();
    let key = |name: &str, secret: &str| {
        let text =
            format!("key \"holdfast\" {{\n\talgorithm hmac-sha256;\n\tsecret \"{secret}\";\n}};\n");
        std::fs::write(dir.join(name), text).unwrap();
    };
    key("key", secret);
    key("wrong", "d3Jvbmcgd3Jvbmcgd3Jvbmcgd3Jvbmcgd3Jvbmcgd3I=");
    let server = start("/usr/sbin/knotd", &["-c", dir.join("knot.conf").to_str().unwrap()]);
    let deadline = Instant::now() + WAIT_MAX;
    while !addresses(dir).contains("10.0.0.1") {
        assert!(Instant::now() < deadline, "knotd does not serve its zone: {}", addresses(dir));
        std::thread::sleep(POLL);
    }
    server
}

fn addresses(dir: &Path) -> String {
    let mut command = Command::new("/usr/sbin/knotc");
    command.arg("-c").arg(dir.join("knot.conf")).args(["zone-read", "example.org", "db", "A"]);
    shown(&command.output().unwrap())
}

/// What an HAProxy says to a command.
fn haproxy_says(socket: &Path, command: &str) -> String {
    let Ok(mut stream) = std::os::unix::net::UnixStream::connect(socket) else {
        return String::new();
    };
    stream.write_all(format!("{command}\n").as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[tokio::test]
async fn names_and_load_balancers_go_where_the_application_goes() {
    let mut installation = Installation::start("plan-around");
    let dns = installation.dir.join("knot");
    let port = free_port();
    let _knot = knot(&dns, port);
    let socket = installation.dir.join("haproxy.sock");
    let conf = installation.dir.join("haproxy.cfg");
    let servers = "server a 127.0.0.1:1 weight 1\n  server b 127.0.0.1:2 weight 0\n";
    let text = format!(
        "global\n  stats socket {} level admin\ndefaults\n  mode tcp\n  timeout connect 1s\n  timeout client 1s\n  timeout server 1s\nbackend be\n  {servers}",
        socket.display()
    );
    std::fs::write(&conf, text).unwrap();
    let _haproxy = start("/usr/sbin/haproxy", &["-db", "-f", conf.to_str().unwrap()]);
    let deadline = Instant::now() + WAIT_MAX;
    while haproxy_says(&socket, "show info").is_empty() {
        assert!(Instant::now() < deadline, "haproxy does not answer");
        std::thread::sleep(POLL);
    }

    let record = |value: &str, key: &str| {
        format!(
            "dns = {{ server = \"127.0.0.1:{port}\", zone = \"example.org\", name = \"db.example.org\", value = [\"{value}\"], key_file = \"{}\" }}",
            dns.join(key).display()
        )
    };
    let weight = |server: &str, weight: u8| {
        format!(
            "haproxy = {{ address = \"{}\", command = \"set weight be/{server} {weight}\" }}",
            socket.display()
        )
    };
    let text = [
        "[[app.plan]]\nname = \"to-b\"\non_failure = \"undo\"\n".to_owned(),
        format!("[[app.plan.step]]\nname = \"names\"\n{}\n", record("10.0.0.2", "key")),
        format!("undo = {{ {} }}\n", record("10.0.0.1", "key")),
        format!("[[app.plan.step]]\nname = \"b-up\"\n{}\n", weight("b", 7)),
        format!("undo = {{ {} }}\n", weight("b", 0)),
        format!("[[app.plan.step]]\nname = \"typo\"\n{}\n", weight("c", 1)),
        "mode = \"ungraceful\"\n".into(),
        "[[app.plan]]\nname = \"wrong-key\"\n".into(),
        format!("[[app.plan.step]]\nname = \"names\"\n{}\n", record("10.0.0.3", "wrong")),
    ];
    plan(&mut installation, &text.concat());
    let done = installation.holdfast(&["execute", "shop", "to-b"]);
    assert!(done.status.success(), "{}", shown(&done));
    let found = addresses(&dns);
    assert!(found.contains("10.0.0.2") && !found.contains("10.0.0.1"), "{found}");
    assert!(haproxy_says(&socket, "get weight be/b").starts_with("7 "));
    // A name that nobody knows: all of it goes back.
    let failed = shown(&installation.holdfast(&["execute", "shop", "to-b", "--ungraceful"]));
    assert!(failed.contains("No such server"), "{failed}");
    let found = addresses(&dns);
    assert!(found.contains("10.0.0.1") && !found.contains("10.0.0.2"), "{found}");
    assert!(haproxy_says(&socket, "get weight be/b").starts_with("0 "));
    let refused = shown(&installation.holdfast(&["execute", "shop", "wrong-key"]));
    assert!(refused.contains("refuses: "), "{refused}");
    assert!(addresses(&dns).contains("10.0.0.1"));
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}
