//! Clients of different kinds that work all the time and check what they get back.
//!
//! Each session holds state of one kind and looks, again and again, whether it is still what it was. A client
//! that writes keeps count of what was acknowledged, so that afterwards every commit can be looked for.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pg::connect::Login;
use pg::stream::Keepalive;
use pg::{Address, Connection, Target};
use tls::{ClientTls, SslMode};
use tokio::task::JoinSet;
use tokio::time::timeout;
use wire::backend::{self, Backend};
use wire::frame::{self, Side};
use wire::frontend;

use super::Dsn;

/// Between two statements of one client.
const BEAT: Duration = Duration::from_millis(5);
/// A statement that takes longer has failed.
const STATEMENT_MAX: Duration = Duration::from_secs(60);

/// What a session holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Writer,
    Settings,
    Prepared,
    Listener,
    Locks,
    Transactions,
}

const KINDS: [Kind; 6] =
    [Kind::Writer, Kind::Settings, Kind::Prepared, Kind::Listener, Kind::Locks, Kind::Transactions];

#[derive(Debug, Default)]
struct Counts {
    statements: AtomicU64,
    commits: AtomicU64,
    notifications: AtomicU64,
    errors: Mutex<Vec<String>>,
    /// The longest gap between two acknowledged statements of each client since it was last asked for.
    gaps: Mutex<Vec<f64>>,
}

pub(crate) struct Workload {
    counts: Arc<Counts>,
    stopping: Arc<AtomicBool>,
    measuring: Arc<AtomicU64>,
    clients: JoinSet<()>,
    pub(crate) sessions: usize,
}

/// What the clients saw.
pub(crate) struct Summary {
    pub(crate) statements: u64,
    pub(crate) commits: u64,
    pub(crate) notifications: u64,
    pub(crate) errors: Vec<String>,
}

pub(crate) async fn connect(dsn: &Dsn, name: &str) -> Result<Connection, String> {
    let tls = ClientTls::load(SslMode::Disable, None, None).map_err(|e| e.to_string())?;
    let address = Address { host: "127.0.0.1".into(), port: dsn.port };
    let target =
        Target { address, tls, keepalive: Keepalive::default(), timeout: Duration::from_secs(30) };
    let param = |name: &str, value: &str| (name.as_bytes().to_vec(), value.as_bytes().to_vec());
    let params = vec![
        param("user", "postgres"),
        param("database", "postgres"),
        param("application_name", name),
    ];
    target.login(&Login { params, credential: None }).await.map_err(|e| crate::config::chain(&e))
}

async fn run(connection: &mut Connection, sql: &str) -> Result<Option<String>, String> {
    match timeout(STATEMENT_MAX, connection.value(sql)).await {
        Ok(result) => result.map_err(|error| format!("`{sql}`: {}", crate::config::chain(&error))),
        Err(_) => Err(format!("`{sql}`: no answer within {STATEMENT_MAX:?}")),
    }
}

pub(crate) async fn create_tables(dsn: &Dsn) -> Result<(), String> {
    let mut connection = connect(dsn, "demo set-up").await?;
    run(&mut connection, "CREATE TABLE IF NOT EXISTS orders (client int, number bigint, PRIMARY KEY (client, number))")
        .await
        .map(drop)
}

/// Acknowledged commits that a server has.
pub(crate) async fn commits_on(dsn: &Dsn) -> Result<u64, String> {
    let mut connection = connect(dsn, "demo check").await?;
    let found = run(&mut connection, "SELECT count(*) FROM orders").await?;
    found.and_then(|text| text.parse().ok()).ok_or_else(|| "no count".into())
}

impl Workload {
    pub(crate) async fn start(dsn: &Dsn, sessions: usize) -> Result<Workload, String> {
        let counts = Arc::new(Counts::default());
        let stopping = Arc::new(AtomicBool::new(false));
        let measuring = Arc::new(AtomicU64::new(0));
        let mut clients = JoinSet::new();
        for number in 0..sessions {
            let kind = KINDS[number % KINDS.len()];
            let mut connection = connect(dsn, &format!("demo {kind:?}").to_lowercase()).await?;
            let client =
                Client { kind, number, counts: counts.clone(), measuring: measuring.clone() };
            client.set_up(&mut connection).await?;
            let stopping = stopping.clone();
            clients.spawn(async move { client.work(connection, &stopping).await });
        }
        Ok(Workload { counts, stopping, measuring, clients, sessions })
    }

    /// Begins to measure gaps anew, and gives those measured so far, in milliseconds.
    pub(crate) async fn take_gaps(&self) -> Vec<f64> {
        self.measuring.fetch_add(1, Ordering::SeqCst);
        // Each client hands in its longest gap at its next statement.
        tokio::time::sleep(Duration::from_millis(300)).await;
        std::mem::take(&mut *self.counts.gaps.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn errors(&self) -> usize {
        self.counts.errors.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(crate) async fn stop(mut self) -> Summary {
        self.stopping.store(true, Ordering::SeqCst);
        while self.clients.join_next().await.is_some() {}
        let errors =
            std::mem::take(&mut *self.counts.errors.lock().unwrap_or_else(PoisonError::into_inner));
        Summary {
            statements: self.counts.statements.load(Ordering::SeqCst),
            commits: self.counts.commits.load(Ordering::SeqCst),
            notifications: self.counts.notifications.load(Ordering::SeqCst),
            errors,
        }
    }
}

struct Client {
    kind: Kind,
    number: usize,
    counts: Arc<Counts>,
    measuring: Arc<AtomicU64>,
}

impl Client {
    async fn set_up(&self, c: &mut Connection) -> Result<(), String> {
        let n = self.number;
        match self.kind {
            Kind::Writer | Kind::Transactions => (),
            Kind::Settings => {
                run(c, &format!("SET work_mem = '{}kB'", 4_096 + n)).await?;
                run(c, "SET search_path = public, pg_temp").await?;
                run(c, "SET TIME ZONE '<+02:30>-02:30'").await?;
                run(c, &format!("SET app.client = 'client {n}'")).await?;
            }
            Kind::Prepared => {
                run(c, &format!("PREPARE doubled (int) AS SELECT $1 * 2 + {n}")).await?;
                let mut out = Vec::new();
                frontend::parse(&mut out, b"tripled", b"SELECT $1::int * 3", &[]);
                frontend::sync(&mut out);
                c.send(&out).await.map_err(|e| e.to_string())?;
                c.answers().await.map_err(|e| e.to_string())?;
            }
            Kind::Listener => drop(run(c, &format!("LISTEN \"Channel {n}\"")).await?),
            Kind::Locks => {
                run(c, &format!("SELECT pg_advisory_lock({n}), pg_advisory_lock({n})")).await?;
                run(c, &format!("SELECT pg_advisory_lock_shared(-1, {n})")).await?;
            }
        }
        Ok(())
    }

    async fn work(self, mut connection: Connection, stopping: &AtomicBool) {
        let (mut beat, mut number) = (Instant::now(), 0u64);
        let (mut longest, mut measured) = (0.0f64, self.measuring.load(Ordering::SeqCst));
        while !stopping.load(Ordering::SeqCst) {
            number += 1;
            if let Err(error) = self.step(&mut connection, number).await {
                let mut errors = self.counts.errors.lock().unwrap_or_else(PoisonError::into_inner);
                errors.push(format!("{:?} {}: {error}", self.kind, self.number));
                return;
            }
            self.counts.statements.fetch_add(1, Ordering::Relaxed);
            longest = longest.max(beat.elapsed().as_secs_f64() * 1_000.0);
            beat = Instant::now();
            let asked = self.measuring.load(Ordering::SeqCst);
            if asked != measured {
                measured = asked;
                self.counts.gaps.lock().unwrap_or_else(PoisonError::into_inner).push(longest);
                longest = 0.0;
            }
            tokio::time::sleep(BEAT).await;
        }
    }

    async fn step(&self, c: &mut Connection, number: u64) -> Result<(), String> {
        let n = self.number;
        match self.kind {
            Kind::Writer => {
                run(c, &format!("INSERT INTO orders VALUES ({n}, {number})")).await?;
                self.counts.commits.fetch_add(1, Ordering::Relaxed);
            }
            Kind::Transactions => {
                run(c, "BEGIN").await?;
                run(c, &format!("INSERT INTO orders VALUES ({n}, {number})")).await?;
                tokio::time::sleep(BEAT).await;
                run(c, "COMMIT").await?;
                self.counts.commits.fetch_add(1, Ordering::Relaxed);
            }
            Kind::Settings => {
                let sql = "SELECT concat_ws('|', current_setting('work_mem'), current_setting('search_path'), \
                    current_setting('TimeZone'), current_setting('app.client', true))";
                let expected = format!("{}kB|public, pg_temp|<+02:30>-02:30|client {n}", 4_096 + n);
                expect(run(c, sql).await?, &expected)?;
            }
            Kind::Prepared => {
                expect(
                    run(c, &format!("EXECUTE doubled ({number})")).await?,
                    &(number * 2 + n as u64).to_string(),
                )?;
                let mut out = Vec::new();
                let param = number.to_string();
                frontend::bind_text(&mut out, b"", b"tripled", &[Some(param.as_bytes())]);
                frontend::execute(&mut out, b"", 0);
                frontend::sync(&mut out);
                c.send(&out).await.map_err(|e| e.to_string())?;
                let answers =
                    timeout(STATEMENT_MAX, c.answers()).await.map_err(|e| e.to_string())?;
                let answers = answers.map_err(|e| e.to_string())?;
                let row = answers.into_iter().next().and_then(|a| a.rows.into_iter().next());
                expect(
                    row.and_then(|row| row.into_iter().next()).flatten(),
                    &(number * 3).to_string(),
                )?;
            }
            Kind::Listener => {
                run(c, &format!("NOTIFY \"Channel {n}\", '{number}'")).await?;
                let aside = std::mem::take(&mut c.aside);
                let payloads = payloads(&aside);
                if payloads != [number.to_string()] {
                    return Err(format!(
                        "expected the notification {number} once, got {payloads:?}"
                    ));
                }
                self.counts.notifications.fetch_add(1, Ordering::Relaxed);
            }
            Kind::Locks => {
                let sql = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()";
                expect(run(c, sql).await?, "2")?;
            }
        }
        Ok(())
    }
}

fn expect(found: Option<String>, expected: &str) -> Result<(), String> {
    match found {
        Some(found) if found == expected => Ok(()),
        found => Err(format!("expected `{expected}`, got {found:?}")),
    }
}

/// Payloads of the notifications among messages.
fn payloads(mut messages: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    while let Ok(Some((tag, body, len))) = frame::whole(Side::Backend, messages) {
        if let Ok(Backend::Notification { payload, .. }) = backend::read(tag, body) {
            found.push(String::from_utf8_lossy(payload).into_owned());
        }
        messages = messages.get(len..).unwrap_or_default();
    }
    found
}
