//! Accepts connections, as many as are allowed, and hands each to its login.

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::time::{Duration, sleep, timeout};
use wire::backend::Report;
use wire::sqlstate::SqlState;

use crate::login;
use crate::proxy::Shared;

/// Wait after an accept that failed for want of descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Runs until the task is dropped.
pub(crate) async fn run(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        // A login's place is taken before the connection, so that a flood waits in the kernel's backlog.
        let Ok(permit) = shared.logins.clone().acquire_owned().await else { return };
        let (mut socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection did not succeed");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        if let Err(error) = shared.config.keepalive.apply(&socket) {
            tracing::debug!(%error, "socket options cannot be set");
            continue;
        }
        let Some(place) = shared.take_place() else {
            let max = shared.config.limits.clients_max;
            let report =
                Report::fatal(SqlState::TOO_MANY_CONNECTIONS, "sorry, too many clients already")
                    .detail(format!("`clients_max` of the proxy is {max}"));
            let mut out = Vec::new();
            report.write_error(&mut out);
            tokio::spawn(async move {
                // The client is told after it has spoken, or it would not read the answer.
                let mut first = [0; 512];
                let talk = async {
                    let _ = tokio::io::AsyncReadExt::read(&mut socket, &mut first).await;
                    let _ = tokio::io::AsyncWriteExt::write_all(&mut socket, &out).await;
                };
                let _ = timeout(Duration::from_secs(5), talk).await;
                drop(permit);
            });
            continue;
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            let limit = shared.config.limits.login_timeout;
            let login = login::run(socket, peer, shared.clone(), place);
            if timeout(limit, Box::pin(login)).await.is_err() {
                tracing::debug!(%peer, ?limit, "login did not end in time");
            }
            drop(permit);
        });
    }
}
