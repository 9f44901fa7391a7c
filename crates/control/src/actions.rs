//! What a step of a plan does, outside of the store: each with its deadline, and with an outcome that says what is known.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use model::audit::Asking;
use model::cell::CellState;
use model::persisted::Execution;
use model::plan::run::Outcome;
use model::plan::{Action, Http, Mode};
use model::switchover::{Ending, Kind};
use pg::admin::{Admin, AdminLogin};
use pg::connection::QueryError;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::time::timeout;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use crate::control::Control;
use crate::requests::{ControlError, FailoverRequest, FenceRequest, SwitchoverRequest};

/// Bytes that are kept of what a program or a server says.
const SAID_LEN_MAX: usize = 500;
/// Largest file with a token.
const TOKEN_LEN_MAX: u64 = 16 * 1024;

/// What is being done, for whoever it is done by.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Doing {
    pub(crate) app: String,
    pub(crate) plan: String,
    pub(crate) execution: u64,
    pub(crate) step: String,
    /// The same, however often it is sent: what is known by it was done already.
    pub(crate) key: String,
    pub(crate) mode: Mode,
    /// It undoes what the step has done.
    pub(crate) is_undo: bool,
    /// The cell that is active now, and the epoch.
    pub(crate) active: Option<String>,
    pub(crate) epoch: u64,
    #[serde(skip)]
    pub(crate) by: String,
    /// Safety rules that are gone on in spite of.
    #[serde(skip)]
    pub(crate) overrides: BTreeSet<String>,
}

pub(crate) async fn perform(
    control: &Control,
    doing: &Doing,
    action: &Action,
    limit: Duration,
) -> Outcome {
    match action {
        Action::Activate { .. } | Action::Fence { .. } | Action::Unfence { .. } => {
            execute(control, doing, action).await
        }
        Action::Http(http) => call(doing, http, limit).await,
        Action::Exec { argv } => run(doing, argv, limit).await,
        Action::Sql { app, cell, database, text } => {
            ask(control, (app, cell.as_deref()), database, text, limit).await
        }
        Action::Wait { ms } => {
            tokio::time::sleep(Duration::from_millis(*ms)).await;
            Outcome::Done(String::new())
        }
    }
}

/// An execution of its own, found again by its key.
async fn execute(control: &Control, doing: &Doing, action: &Action) -> Outcome {
    let reason = format!("step `{}` of execution {}", doing.step, doing.execution);
    let (by, key) = (doing.by.clone(), Some(doing.key.clone()));
    let overrides = doing.overrides.clone();
    let asking = Asking { by, reason: Some(reason), key: key.clone(), if_epoch: None, overrides };
    let key = key.as_deref();
    // Asked again after a crash, it is told what became of it, whatever state its cells are in by now.
    let done = match action {
        Action::Activate { app, to, deadline_ms, on_timeout, allow_data_loss } => {
            match doing.mode {
                Mode::Graceful => {
                    let (to, deadline_ms, on_timeout) = (to.clone(), *deadline_ms, *on_timeout);
                    let is_same = |one: &Execution| (one.kind, &one.to) == (Kind::Switchover, &to);
                    let request = SwitchoverRequest {
                        to: to.clone(),
                        dry_run: false,
                        deadline_ms,
                        on_timeout,
                    };
                    let act = control.switchover(app, request, asking);
                    control.once(app, key, is_same, act).await
                }
                Mode::Ungraceful => {
                    let (to, allow_data_loss) = (to.clone(), *allow_data_loss);
                    let is_same = |one: &Execution| (one.kind, &one.to) == (Kind::Failover, &to);
                    let request =
                        FailoverRequest { to: to.clone(), allow_data_loss, dry_run: false };
                    let act = control.fail_over(app, request, false, asking);
                    control.once(app, key, is_same, act).await
                }
            }
        }
        Action::Fence { app, cell, all, deadline_ms, on_timeout } => {
            let (all, deadline_ms, on_timeout) = (*all, *deadline_ms, *on_timeout);
            let kind = if all { Kind::FenceAll } else { Kind::Fence };
            let is_same = |one: &Execution| (one.kind, &one.to) == (kind, cell);
            let request = FenceRequest { all, deadline_ms, on_timeout };
            control.once(app, key, is_same, control.fence(app, cell, request, asking)).await
        }
        Action::Unfence { app, cell } => {
            let is_same = |one: &Execution| (one.kind, &one.to) == (Kind::Unfence, cell);
            control.once(app, key, is_same, control.unfence(app, cell, asking)).await
        }
        Action::Http(_) | Action::Exec { .. } | Action::Sql { .. } | Action::Wait { .. } => {
            return Outcome::NotDone("it is no execution of its own".into());
        }
    };
    outcome_of(action, done)
}

fn outcome_of(action: &Action, done: Result<Execution, ControlError>) -> Outcome {
    match done {
        Ok(execution) => {
            let why = execution.reason.clone().map_or(String::new(), |why| format!(": {why}"));
            let ending = execution.ending.map_or("under way", Ending::name);
            let text = format!("{}: {ending}{why}", execution.says());
            match execution.ending {
                Some(Ending::Completed | Ending::CompletedWithoutRejoin) => Outcome::Done(text),
                Some(Ending::Aborted) => Outcome::NotDone(text),
                Some(Ending::Stuck) | None => Outcome::Unknown(text),
            }
        }
        // It is what it was to become.
        Err(error @ ControlError::AlreadyActive { .. }) => Outcome::Done(error.to_string()),
        Err(error @ ControlError::NotActive { state, .. })
            if matches!(
                (action, state),
                (Action::Fence { all: false, .. }, CellState::Fenced)
                    | (Action::Fence { all: true, .. }, CellState::Passive)
            ) =>
        {
            Outcome::Done(error.to_string())
        }
        Err(error @ ControlError::NotFenced { state: CellState::Active, .. }) => {
            Outcome::Done(error.to_string())
        }
        Err(error @ ControlError::Record(_)) => Outcome::Unknown(model::chain(&error)),
        Err(error) => Outcome::NotDone(model::chain(&error)),
    }
}

fn said(text: &str) -> String {
    let text = text.trim();
    match text.char_indices().nth(SAID_LEN_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// The bearer token in a file.
///
/// # Errors
/// It cannot be read.
pub(crate) fn token_of(path: &str) -> Result<String, String> {
    let failed = |error: std::io::Error| format!("`{path}`: {error}");
    let len = std::fs::metadata(path).map_err(failed)?.len();
    if len > TOKEN_LEN_MAX {
        return Err(format!("`{path}` has {len} bytes, a token at most {TOKEN_LEN_MAX}"));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    Ok(text.trim().to_owned())
}

/// The roots that this system trusts.
fn tls_config() -> TlsConfig {
    let found = rustls_native_certs::load_native_certs().certs;
    let roots: Vec<_> =
        found.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).collect();
    let provider = rustls::crypto::ring::default_provider();
    TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&roots))
        .unversioned_rustls_crypto_provider(std::sync::Arc::new(provider))
        .build()
}

async fn call(doing: &Doing, http: &Http, limit: Duration) -> Outcome {
    let (doing, http) = (doing.clone(), http.clone());
    let called = tokio::task::spawn_blocking(move || call_now(&doing, &http, limit));
    called.await.unwrap_or_else(|error| Outcome::Unknown(error.to_string()))
}

fn call_now(doing: &Doing, http: &Http, limit: Duration) -> Outcome {
    let token = match http.token_file.as_deref().map(token_of).transpose() {
        Ok(token) => token,
        Err(why) => return Outcome::NotDone(why),
    };
    let body = match &http.body {
        Some(body) => body.clone(),
        None => serde_json::to_string(doing).unwrap_or_default(),
    };
    let mut agent = ureq::Agent::config_builder()
        .timeout_global(Some(limit))
        .http_status_as_error(false)
        .max_redirects(0);
    if http.url.starts_with("https:") {
        agent = agent.tls_config(tls_config());
    }
    let agent: ureq::Agent = agent.build().into();
    let mut request = ureq::http::Request::builder()
        .method(http.method.as_str())
        .uri(http.url.as_str())
        .header("content-type", "application/json")
        .header("idempotency-key", doing.key.as_str());
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let request = match request.body(body) {
        Ok(request) => request,
        Err(error) => return Outcome::NotDone(format!("no request can be made: {error}")),
    };
    let mut response = match agent.run(request) {
        Ok(response) => response,
        Err(error) => {
            let is_sent = !matches!(
                &error,
                ureq::Error::HostNotFound
                    | ureq::Error::ConnectionFailed
                    | ureq::Error::BadUri(_)
                    | ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect)
            ) && !matches!(&error, ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::ConnectionRefused);
            let text = format!("`{}` does not answer: {error}", http.url);
            return if is_sent { Outcome::Unknown(text) } else { Outcome::NotDone(text) };
        }
    };
    let status = response.status();
    let limit = u64::try_from(SAID_LEN_MAX * 4).unwrap_or(u64::MAX);
    let mut text = String::new();
    // Whatever is longer, or no text, is not shown.
    let _ = std::io::Read::read_to_string(
        &mut std::io::Read::take(response.body_mut().as_reader(), limit),
        &mut text,
    );
    let text = format!("{status} {}", said(&text));
    match status.is_success() {
        true => Outcome::Done(text.trim().to_owned()),
        false => Outcome::Failed(text.trim().to_owned()),
    }
}

/// Reads all, and keeps the begin.
async fn read_begin(from: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>) {
    let Some(mut from) = from else { return };
    let mut part = [0; 4096];
    while let Ok(len @ 1..) = from.read(&mut part).await {
        if kept.len() < SAID_LEN_MAX * 4 {
            kept.extend_from_slice(&part[..len]);
        }
    }
}

async fn run(doing: &Doing, argv: &[String], limit: Duration) -> Outcome {
    let Some((program, args)) = argv.split_first() else {
        return Outcome::NotDone("there is no program".into());
    };
    let spawned = Command::new(program)
        .args(args)
        .env("HOLDFAST_APP", &doing.app)
        .env("HOLDFAST_PLAN", &doing.plan)
        .env("HOLDFAST_EXECUTION", doing.execution.to_string())
        .env("HOLDFAST_STEP", &doing.step)
        .env("HOLDFAST_KEY", &doing.key)
        .env("HOLDFAST_MODE", doing.mode.name())
        .env("HOLDFAST_UNDO", if doing.is_undo { "1" } else { "0" })
        .env("HOLDFAST_ACTIVE", doing.active.as_deref().unwrap_or_default())
        .env("HOLDFAST_EPOCH", doing.epoch.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .process_group(0)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return Outcome::NotDone(format!("`{program}` cannot be started: {error}")),
    };
    let group = child.id().and_then(|id| rustix::process::Pid::from_raw(id.try_into().ok()?));
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (mut said_out, mut said_err) = (Vec::new(), Vec::new());
    let wait = async {
        let says =
            async { tokio::join!(read_begin(out, &mut said_out), read_begin(err, &mut said_err)) };
        tokio::pin!(says);
        tokio::select! {
            status = child.wait() => {
                // What it has started itself may hold these open after its end.
                const REST_MAX: Duration = Duration::from_millis(500);
                let _ = timeout(REST_MAX, says).await;
                status
            }
            _ = &mut says => child.wait().await,
        }
    };
    let status = match timeout(limit, wait).await {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => return Outcome::Unknown(format!("`{program}`: {error}")),
        Err(_) => {
            // What it has started goes with it.
            if let Some(group) = group {
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            }
            let _ = child.kill().await;
            return Outcome::Unknown(format!("`{program}` has not ended within {limit:?}: killed"));
        }
    };
    let says = [said_out, said_err].map(|text| said(&String::from_utf8_lossy(&text)));
    match (status.success(), says) {
        (true, [out, _]) => Outcome::Done(out),
        (false, [out, err]) => {
            let says = if err.is_empty() { out } else { err };
            Outcome::Failed(format!("`{program}`: {status}: {says}"))
        }
    }
}

async fn ask(
    control: &Control,
    (app, cell): (&str, Option<&str>),
    database: &str,
    text: &str,
    limit: Duration,
) -> Outcome {
    let cell = match (cell, control.application(app)) {
        (Some(cell), _) => cell.to_owned(),
        (None, Ok(application)) => match application.active() {
            Some(active) => active.to_owned(),
            None => return Outcome::NotDone(format!("application `{app}` has no active cell")),
        },
        (None, Err(error)) => return Outcome::NotDone(model::chain(&error)),
    };
    let server = control.servers(app).ok().and_then(|servers| servers.cells.get(&cell));
    let Some(server) = server else {
        return Outcome::NotDone(format!("cell `{cell}` of `{app}` is not configured"));
    };
    let login = AdminLogin { database: database.to_owned(), ..server.admin.clone() };
    let connect = timeout(limit, Admin::connect(&server.target, &login));
    let mut admin = match connect.await {
        Ok(Ok(admin)) => admin,
        Ok(Err(error)) => return Outcome::NotDone(model::chain(&error)),
        Err(_) => return Outcome::NotDone(format!("`{cell}` takes no login within {limit:?}")),
    };
    admin.wait = limit;
    let limit_it = format!("SET statement_timeout = {}", limit.as_millis());
    if let Err(error) = admin.rows(&limit_it).await {
        return Outcome::NotDone(model::chain(&error));
    }
    match admin.rows(text).await {
        Ok(rows) => {
            let first = rows.first().map(|row| {
                let values = row.iter().map(|value| value.as_deref().unwrap_or("NULL"));
                values.collect::<Vec<_>>().join(" | ")
            });
            Outcome::Done(said(&first.unwrap_or_default()))
        }
        // It may have committed before.
        Err(error @ QueryError::Server { .. }) => Outcome::Failed(model::chain(&error)),
        Err(error) => Outcome::Unknown(model::chain(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doing() -> Doing {
        Doing {
            app: "shop".into(),
            plan: "p".into(),
            execution: 7,
            step: "s".into(),
            key: "k".into(),
            mode: Mode::Graceful,
            is_undo: false,
            active: Some("a".into()),
            epoch: 3,
            by: "alice".into(),
            overrides: BTreeSet::new(),
        }
    }

    async fn sh(text: &str, limit_ms: u64) -> Outcome {
        let argv = ["/bin/sh", "-c", text].map(str::to_owned);
        run(&doing(), &argv, Duration::from_millis(limit_ms)).await
    }

    #[tokio::test]
    async fn a_program_is_told_what_is_done_and_its_end_is_told() {
        let long = 60_000;
        let says = "echo $HOLDFAST_APP $HOLDFAST_STEP $HOLDFAST_KEY $HOLDFAST_ACTIVE";
        assert_eq!(sh(says, long).await, Outcome::Done("shop s k a".into()));
        let failed = sh("echo out; echo why >&2; exit 3", long).await;
        assert!(matches!(&failed, Outcome::Failed(text) if text.ends_with("exit status: 3: why")));
        let much = sh("yes | head -c 1000000", long).await;
        assert!(matches!(&much, Outcome::Done(text) if text.len() < 600));
        assert!(matches!(sh("sleep 600", 50).await, Outcome::Unknown(_)));
        // One that it leaves behind is not waited for.
        assert_eq!(sh("sleep 600 & echo x", long).await, Outcome::Done("x".into()));
        let missing = run(&doing(), &["/no/such".to_owned()], Duration::from_secs(1)).await;
        assert!(matches!(missing, Outcome::NotDone(_)));
    }

    #[tokio::test]
    async fn what_was_not_sent_is_known_not_to_be_done() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let http = |port: u16| Http {
            method: "POST".into(),
            url: format!("http://127.0.0.1:{port}/"),
            body: None,
            token_file: None,
        };
        // Somebody listens, and says nothing.
        let unanswered = call(&doing(), &http(port), Duration::from_millis(200)).await;
        assert!(matches!(unanswered, Outcome::Unknown(_)), "{unanswered:?}");
        drop(listener);
        let refused = call(&doing(), &http(port), Duration::from_secs(5)).await;
        assert!(matches!(refused, Outcome::NotDone(_)), "{refused:?}");
    }
}
