//! The admin database: the poolers' dialect over the simple query protocol, so that psql can look inside.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use wire::backend::{self, Report, TxStatus};
use wire::frontend::{self, Frontend};
use wire::sqlstate::SqlState;

use crate::login::Client;
use crate::proxy::Shared;

/// Longest command that is read.
const COMMAND_LEN_MAX: usize = 16 * 1024;

const TOPICS: [&str; 11] = [
    "CELLS", "CLIENTS", "CONFIG", "HELP", "PINS", "POOLS", "RULES", "SERVERS", "SESSIONS", "STATS",
    "VERSION",
];

/// Runs until the client leaves.
pub(crate) async fn run(mut client: Client, shared: Arc<Shared>) {
    let mut out = Vec::new();
    backend::authentication_ok(&mut out);
    let version = concat!("15.0 (Holdfast ", env!("CARGO_PKG_VERSION"), ")");
    let params = [
        ("server_version", version),
        ("client_encoding", "UTF8"),
        ("server_encoding", "UTF8"),
        ("DateStyle", "ISO"),
    ];
    for (name, value) in params {
        backend::parameter_status(&mut out, name.as_bytes(), value.as_bytes());
    }
    backend::key_data(&mut out, 0, &[0; 4]);
    backend::ready(&mut out, TxStatus::Idle);
    let mut sent = client.send(&out).await;
    let mut skipping = false;
    while sent.is_ok() {
        let Ok((tag, body)) = client.message(COMMAND_LEN_MAX).await else { return };
        let mut out = Vec::new();
        match frontend::read(tag, &body) {
            Ok(Frontend::Query { sql }) => {
                answer(&mut out, &shared, &String::from_utf8_lossy(sql)).await;
                backend::ready(&mut out, TxStatus::Idle);
            }
            Ok(Frontend::Terminate) => return,
            Ok(Frontend::Sync) => {
                skipping = false;
                backend::ready(&mut out, TxStatus::Idle);
            }
            Ok(Frontend::Flush) => (),
            Ok(_) if skipping => (),
            Ok(_) => {
                skipping = true;
                let message = "the admin database takes simple queries only";
                Report::error(SqlState::FEATURE_NOT_SUPPORTED, message).write_error(&mut out);
            }
            Err(error) => {
                let report = Report::fatal(SqlState::PROTOCOL_VIOLATION, error.to_string());
                let _ = client.refuse::<()>(report).await;
                return;
            }
        }
        sent = client.send(&out).await;
    }
}

struct Table {
    columns: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn write(&self, out: &mut Vec<u8>) {
        backend::row_description_text(out, &self.columns);
        for row in &self.rows {
            let cells: Vec<Option<&[u8]>> = row.iter().map(|cell| Some(cell.as_bytes())).collect();
            backend::data_row(out, &cells);
        }
    }
}

async fn answer(out: &mut Vec<u8>, shared: &Shared, sql: &str) {
    let command = sql.trim().trim_end_matches(';').trim();
    let words: Vec<String> = command.split_whitespace().map(str::to_ascii_uppercase).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] => backend::empty_query(out),
        ["SHOW", topic] => match show(shared, topic).await {
            Some(table) => {
                table.write(out);
                backend::command_complete(out, "SHOW");
            }
            None => {
                let message = format!("`{topic}` cannot be shown");
                Report::error(SqlState::UNDEFINED_OBJECT, message)
                    .hint(format!("SHOW {}", TOPICS.join(" | ")))
                    .write_error(out);
            }
        },
        ["KILL", id] => kill(out, shared, id).await,
        _ => Report::error(SqlState::SYNTAX_ERROR, format!("unknown command `{command}`"))
            .hint(format!("SHOW {} or KILL <session>", TOPICS.join(" | ")))
            .write_error(out),
    }
}

async fn kill(out: &mut Vec<u8>, shared: &Shared, id: &str) {
    let id = id.parse().ok();
    let known = shared.views().await.iter().any(|view| Some(view.id) == id);
    let (Some(id), true) = (id, known) else {
        Report::error(SqlState::UNDEFINED_OBJECT, "no such session")
            .hint("SHOW SESSIONS")
            .write_error(out);
        return;
    };
    let report = Report::fatal(
        SqlState::ADMIN_SHUTDOWN,
        "terminating connection due to administrator command",
    );
    for engine in &shared.engines {
        engine.send(crate::engine::Command::End(crate::engine::Want::One(id), report.clone()));
    }
    backend::command_complete(out, "KILL");
}

async fn show(shared: &Shared, topic: &str) -> Option<Table> {
    Some(match topic {
        "SESSIONS" => Table {
            columns: vec![
                "id",
                "app",
                "user",
                "database",
                "application_name",
                "client",
                "tls",
                "cell",
                "server",
                "pid",
                "state",
                "connected_s",
                "idle_s",
                "moves",
                "pins",
                "pool",
            ],
            rows: shared
                .views()
                .await
                .into_iter()
                .map(|v| {
                    let pins = v.pins.join("; ");
                    vec![
                        v.id.to_string(),
                        v.app,
                        v.user,
                        v.database,
                        v.application_name,
                        v.client,
                        v.tls.to_string(),
                        v.cell,
                        v.server,
                        v.backend_pid.to_string(),
                        v.state,
                        v.connected_s.to_string(),
                        v.idle_s.to_string(),
                        v.moves.to_string(),
                        pins,
                        v.pool,
                    ]
                })
                .collect(),
        },
        "CLIENTS" => Table {
            columns: vec![
                "id",
                "user",
                "database",
                "client",
                "tls",
                "state",
                "bytes_in",
                "bytes_out",
                "requests",
            ],
            rows: shared
                .views()
                .await
                .into_iter()
                .map(|v| {
                    vec![
                        v.id.to_string(),
                        v.user,
                        v.database,
                        v.client,
                        v.tls.to_string(),
                        v.state,
                        v.bytes_in.to_string(),
                        v.bytes_out.to_string(),
                        v.requests.to_string(),
                    ]
                })
                .collect(),
        },
        "SERVERS" => Table {
            columns: vec!["session", "app", "cell", "server", "pid", "user", "database", "state"],
            rows: shared
                .views()
                .await
                .into_iter()
                .filter(|v| !v.server.is_empty())
                .map(|v| {
                    vec![
                        v.id.to_string(),
                        v.app,
                        v.cell,
                        v.server,
                        v.backend_pid.to_string(),
                        v.user,
                        v.database,
                        v.state,
                    ]
                })
                .collect(),
        },
        "POOLS" => Table {
            columns: vec![
                "app", "user", "database", "idle", "lent", "kept", "opening", "waiting", "failure",
            ],
            rows: shared
                .pools()
                .await
                .into_iter()
                .map(|pool| {
                    let counts = [pool.idle, pool.lent, pool.kept, pool.opening, pool.waiting];
                    let mut row = vec![pool.app, pool.user, pool.database];
                    row.extend(counts.iter().map(usize::to_string));
                    row.push(pool.failure);
                    row
                })
                .collect(),
        },
        "PINS" => Table {
            columns: vec!["session", "user", "application_name", "pin"],
            rows: shared
                .views()
                .await
                .into_iter()
                .flat_map(|v| {
                    let (id, user, name) = (v.id.to_string(), v.user, v.application_name);
                    v.pins
                        .into_iter()
                        .map(move |pin| vec![id.clone(), user.clone(), name.clone(), pin])
                })
                .collect(),
        },
        "CELLS" => Table {
            columns: vec!["app", "cell", "server", "serves", "state", "epoch", "sessions"],
            rows: cells(shared).await,
        },
        "RULES" => Table {
            columns: vec![
                "app",
                "rule",
                "states",
                "classes",
                "roles",
                "databases",
                "disposition",
                "accepted",
                "refused",
                "held",
                "shadowed",
            ],
            rows: shared.apps.iter().flat_map(|app| app.rules()).collect(),
        },
        "STATS" => {
            let sum = |read: &dyn Fn(&crate::engine::Counters) -> u64| {
                shared.engines.iter().map(|engine| read(&engine.counters)).sum::<u64>().to_string()
            };
            let one = |name: &str, value: String| vec![name.to_owned(), value];
            Table {
                columns: vec!["name", "value"],
                rows: vec![
                    one("logins", shared.metrics.logins.load(Ordering::Relaxed).to_string()),
                    one(
                        "logins_failed",
                        shared.metrics.logins_failed.load(Ordering::Relaxed).to_string(),
                    ),
                    one("cancels", shared.metrics.cancels.load(Ordering::Relaxed).to_string()),
                    one("requests", sum(&|c| c.requests.load(Ordering::Relaxed))),
                    one("bytes_in", sum(&|c| c.bytes_in.load(Ordering::Relaxed))),
                    one("bytes_out", sum(&|c| c.bytes_out.load(Ordering::Relaxed))),
                    one("sessions_ended", sum(&|c| c.ended.load(Ordering::Relaxed))),
                    one("servers_lost", sum(&|c| c.lost_server.load(Ordering::Relaxed))),
                    one("protocol_errors", sum(&|c| c.protocol_errors.load(Ordering::Relaxed))),
                ],
            }
        }
        "CONFIG" => {
            let limits = &shared.config.limits;
            let one = |name: &str, value: String| vec![name.to_owned(), value];
            Table {
                columns: vec!["name", "value"],
                rows: vec![
                    one("clients_max", limits.clients_max.to_string()),
                    one("logins_max", limits.logins_max.to_string()),
                    one("login_timeout", format!("{:?}", limits.login_timeout)),
                    one("idle_timeout", format!("{:?}", limits.idle_timeout)),
                    one("moves_at_once", limits.moves_at_once.to_string()),
                    one("engines", shared.engines.len().to_string()),
                    one("tls", shared.config.tls.is_some().to_string()),
                ],
            }
        }
        "VERSION" => Table {
            columns: vec!["version"],
            rows: vec![vec![concat!("Holdfast ", env!("CARGO_PKG_VERSION")).to_owned()]],
        },
        "HELP" => Table {
            columns: vec!["command"],
            rows: TOPICS.iter().map(|topic| vec![format!("SHOW {topic}")]).collect(),
        },
        _ => return None,
    })
}

async fn cells(shared: &Shared) -> Vec<Vec<String>> {
    let views = shared.views().await;
    let mut rows = Vec::new();
    for app in &shared.apps {
        let active = app.active().map(|cell| cell.name.clone());
        for (name, cell) in &app.cells {
            let sessions =
                views.iter().filter(|view| view.app == app.name && view.cell == *name).count();
            let serves = Some(name) == active.as_ref();
            let address = cell.target.address.to_string();
            let regime = app.regime_now();
            // Of others the proxy is told nothing.
            let known = serves.then(|| (regime.state.to_string(), regime.epoch.to_string()));
            let (state, epoch) = known.unwrap_or_default();
            rows.push(vec![
                app.name.clone(),
                name.clone(),
                address,
                serves.to_string(),
                state,
                epoch,
                sessions.to_string(),
            ]);
        }
    }
    rows
}
