//! A server that dies, hangs, lies or refuses at any message of a move: the session stays what it was, where it was or
//! where it goes; only one whose own connection was hit may end, and is told. Nothing is left behind.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pg::Connection;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use wire::frame::{self, HEADER_LEN, Side};
use wire::frontend;

use crate::support::{Installation, run, shown, signal, value};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The connection is cut.
    Cut,
    /// Nothing comes any more.
    Hang,
    /// A statement is answered by an error.
    Refuse,
    /// A bit of an answer is another.
    Lie,
}

#[derive(Debug, Clone, Copy)]
struct Armed {
    fault: Fault,
    /// Messages that pass before.
    left: u64,
    /// The first connection that may be hit.
    from: u64,
}

/// Stands between Holdfast and a server.
#[derive(Clone)]
struct Relay {
    armed: Arc<Mutex<Option<Armed>>>,
    hit: Arc<Mutex<Option<u64>>>,
    connections: Arc<AtomicU64>,
    /// Connections by the port from which they reach the server.
    ports: Arc<Mutex<HashMap<String, u64>>>,
    /// What hangs ends when this changes.
    release: Arc<watch::Sender<u64>>,
}

impl Relay {
    async fn start(server: u16) -> (Relay, u16) {
        let relay = Relay {
            armed: Arc::default(),
            hit: Arc::default(),
            connections: Arc::default(),
            ports: Arc::default(),
            release: Arc::new(watch::Sender::new(0)),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let own = relay.clone();
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else { continue };
                let id = own.connections.fetch_add(1, Ordering::SeqCst);
                let port = server.local_addr().unwrap().port().to_string();
                own.ports.lock().unwrap().insert(port, id);
                tokio::spawn(own.clone().carry(id, client, server));
            }
        });
        (relay, port)
    }

    async fn carry(self, id: u64, client: TcpStream, server: TcpStream) {
        client.set_nodelay(true).unwrap();
        server.set_nodelay(true).unwrap();
        let ((from_client, to_client), (from_server, to_server)) =
            (client.into_split(), server.into_split());
        tokio::select! {
            () = self.pass(id, from_client, to_server, Side::Frontend) => (),
            () = self.pass(id, from_server, to_client, Side::Backend) => (),
        }
    }

    async fn pass(&self, id: u64, mut from: OwnedReadHalf, mut to: OwnedWriteHalf, side: Side) {
        let (mut bytes, mut is_startup) = (Vec::new(), side == Side::Frontend);
        loop {
            let len = if is_startup {
                let len = bytes.first_chunk::<4>().map(|len| u32::from_be_bytes(*len));
                len.and_then(|len| usize::try_from(len).ok()).filter(|len| bytes.len() >= *len)
            } else {
                frame::whole(side, &bytes).unwrap().map(|(_, _, len)| len)
            };
            let Some(len) = len else {
                match from.read_buf(&mut bytes).await {
                    Ok(read) if read > 0 => continue,
                    _ => return,
                }
            };
            let mut message: Vec<u8> = bytes.drain(..len).collect();
            if !std::mem::take(&mut is_startup) {
                match self.fault_at(id, side, &message) {
                    None => (),
                    Some(Fault::Cut) => return,
                    Some(Fault::Hang) => {
                        let _ = self.release.subscribe().changed().await;
                        return;
                    }
                    Some(Fault::Refuse) => {
                        let name = message[HEADER_LEN..].split(|byte| *byte == 0).next().unwrap();
                        let mut refused = Vec::new();
                        frontend::parse(&mut refused, name, b"SELECT 1/0", &[]);
                        message = refused;
                    }
                    Some(Fault::Lie) => {
                        if let Some(last) = message.get_mut(HEADER_LEN..).and_then(<[u8]>::last_mut)
                        {
                            *last ^= 1;
                        }
                    }
                }
            }
            if to.write_all(&message).await.is_err() {
                return;
            }
        }
    }

    fn fault_at(&self, id: u64, side: Side, message: &[u8]) -> Option<Fault> {
        let mut place = self.armed.lock().unwrap();
        let armed = place.as_mut()?;
        let counts = match (armed.fault, side, message[0]) {
            (Fault::Refuse, Side::Frontend, b'P') => true,
            // Most rows are of settings, one like the other.
            (Fault::Cut | Fault::Hang, Side::Backend, tag) => !matches!(tag, b'D' | b'S'),
            // Rows of three columns are of SHOW ALL.
            (Fault::Lie, Side::Backend, b'D') => message.get(5..7) != Some(&[0, 3]),
            (Fault::Lie, Side::Backend, tag) => matches!(tag, b'C' | b'Z'),
            _ => false,
        };
        if !counts || id < armed.from {
            return None;
        }
        if armed.left > 0 {
            armed.left -= 1;
            return None;
        }
        let fault = armed.fault;
        *place = None;
        *self.hit.lock().unwrap() = Some(id);
        Some(fault)
    }

    /// The fault strikes once, after so many messages.
    fn arm(&self, fault: Fault, left: u64, from: u64) {
        *self.hit.lock().unwrap() = None;
        *self.armed.lock().unwrap() = Some(Armed { fault, left, from });
    }

    /// Gives the connection that was hit.
    fn disarm(&self) -> Option<u64> {
        *self.armed.lock().unwrap() = None;
        self.release.send_modify(|count| *count += 1);
        self.hit.lock().unwrap().take()
    }
}

/// The connection on which a session stands.
async fn connection_of(relay: &Relay, subject: &mut Subject, admin: &mut Connection) -> u64 {
    let pid = value(&mut subject.connection, "SELECT pg_backend_pid()").await;
    let port = format!("SELECT client_port FROM pg_stat_activity WHERE pid = {pid}");
    let port = value(admin, &port).await;
    relay.ports.lock().unwrap()[&port]
}

/// A session with some of everything, and what has been taken from its cursor.
struct Subject {
    connection: Connection,
    fetched: usize,
}

const SET_UP: &[&str] = &[
    "SET work_mem = '5MB'; SET app.uid = 'me'",
    "CREATE TEMP TABLE mine (n int PRIMARY KEY, x text); INSERT INTO mine VALUES (1, 'one'), (2, NULL)",
    "CREATE TEMP TABLE fleeting (n int) ON COMMIT DELETE ROWS",
    "SELECT nextval('s')",
    "PREPARE p AS SELECT x FROM mine WHERE n = 1",
    "DECLARE c SCROLL CURSOR WITH HOLD FOR SELECT g FROM generate_series(1, 5) g; FETCH 3 FROM c",
    "DECLARE d NO SCROLL CURSOR WITH HOLD FOR SELECT g FROM generate_series(1, 100000) g LIMIT 4000",
    "LISTEN jobs",
];

impl Subject {
    async fn new(installation: &Installation) -> Subject {
        let mut connection = installation.connect().await;
        for sql in SET_UP {
            run(&mut connection, sql).await;
        }
        Subject { connection, fetched: 0 }
    }

    /// Whether it is alive; then it must be what it was.
    async fn is_alive(&mut self, when: &str) -> bool {
        let connection = &mut self.connection;
        if connection.query("SELECT 1").await.is_err() {
            return false;
        }
        self.fetched += 1;
        let looks = [
            ("SHOW work_mem", "5MB".to_owned()),
            ("SELECT current_setting('app.uid')", "me".into()),
            ("SELECT count(*) || max(x) FROM mine", "2one".into()),
            ("EXECUTE p", "one".into()),
            ("FETCH RELATIVE 0 FROM c", "3".into()),
            ("FETCH d", self.fetched.to_string()),
            ("SELECT string_agg(c, ',') FROM pg_listening_channels() c", "jobs".into()),
            ("SELECT currval('s') = lastval()", "t".into()),
            ("SELECT string_agg(name, ' ') FROM pg_prepared_statements", "p".into()),
        ];
        for (sql, wanted) in looks {
            assert_eq!(value(connection, sql).await, wanted, "{when}: {sql}");
        }
        true
    }
}

/// Strikes at every message, or at one of `step` in the test run; `HOLDFAST_FAULTS` strikes at all.
async fn strike(fault: Fault, step: u64, name: &str) {
    let mut installation = Installation::start(name);
    signal(installation.pid(), "KILL");
    installation.wait_crashed();
    let (relay, port) = Relay::start(installation.facts.servers["a"]).await;
    let config = std::fs::read_to_string(installation.config()).unwrap();
    let server = format!("server = \"127.0.0.1:{}\"", installation.facts.servers["a"]);
    let config = config.replacen(&server, &format!("server = \"127.0.0.1:{port}\""), 1);
    let own = "[[app]]\nmove_answer_timeout = \"300ms\"";
    std::fs::write(installation.config(), config.replacen("[[app]]", own, 1)).unwrap();
    installation.restart(&[]);
    let mut admin = installation.direct("a").await;
    run(&mut admin, "CREATE SEQUENCE s").await;
    let step = if std::env::var_os("HOLDFAST_FAULTS").is_some() { 1 } else { step };
    let mut subject = Subject::new(&installation).await;
    let (mut struck, mut ended, mut stayed) = (0, 0, 0);
    for left in (0_u64..).step_by(usize::try_from(step).unwrap()) {
        let when = format!("{fault:?} at message {left}");
        let before = relay.connections.load(Ordering::SeqCst);
        let own = connection_of(&relay, &mut subject, &mut admin).await;
        // A lie about the session itself is believed; one about its copy must not be.
        relay.arm(fault, left, if fault == Fault::Lie { before } else { 0 });
        let args = ["move", "shop", "--all", "--to", "a"];
        let output = installation.holdfast_in_background(&args).await.unwrap();
        let hit = relay.disarm();
        let moved = output.status.success();
        stayed += u64::from(!moved);
        if !subject.is_alive(&when).await {
            // Its old connection, or the new one at its very end.
            assert!(hit == Some(own) || moved, "{when}: killed; {}", shown(&output));
            ended += 1;
            subject = Subject::new(&installation).await;
        }
        nothing_is_left(&mut admin, &when).await;
        if hit.is_none() {
            assert!(moved, "{when}: {}", shown(&output));
            break;
        }
        struck += 1;
    }
    eprintln!("{fault:?}: struck {struck} times, stayed {stayed} times, ended {ended} times");
    assert!(struck > 5 && stayed > 0, "{fault:?}: struck {struck}, stayed {stayed}");
}

/// The session's own connection and the one that asks are all there is.
async fn nothing_is_left(admin: &mut Connection, when: &str) {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'";
    for _ in 0..300 {
        if value(admin, count).await == "2" {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let all = "SELECT string_agg(state || ' ' || query, '\n') FROM pg_stat_activity WHERE backend_type = 'client backend'";
    panic!("{when}: {}", value(admin, all).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_cut_off_at_any_message_of_a_move() {
    strike(Fault::Cut, 23, "cut").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_at_any_message_of_a_move() {
    strike(Fault::Hang, 151, "hang").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_refuses_any_statement_of_a_move() {
    strike(Fault::Refuse, 3, "refuse").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_lies_in_any_message_about_a_copy() {
    strike(Fault::Lie, 17, "lie").await;
}
