//! Holdfast's own connection to a server: safe `search_path`, own timeouts, and the questions that switching
//! and watching need.

use std::time::Duration;

use model::Lsn;
use model::agent::Postmaster;
use model::proxies::Answer;
use tokio::time::timeout;
use wire::scram::{Credential, Verifier};

use crate::connect::{ConnectError, Login, Target};
use crate::connection::{Connection, QueryError};

/// Who Holdfast is on a server.
#[derive(Debug, Clone)]
pub struct AdminLogin {
    pub user: String,
    pub database: String,
    pub credential: Option<Credential>,
}

impl AdminLogin {
    fn login(&self) -> Login {
        let options = "-c search_path=pg_catalog -c statement_timeout=30s -c lock_timeout=5s \
            -c idle_in_transaction_session_timeout=60s -c default_transaction_read_only=off \
            -c synchronous_commit=local -c row_security=off";
        self.login_with("holdfast", options)
    }

    /// For what somebody else has written: a fence is in its way, and its commits wait for standbys as those of clients do.
    pub fn login_as_client(&self, limit: Duration) -> Login {
        // Milliseconds, in an int4.
        let limit = limit.as_millis().min(i32::MAX as u128);
        let options = format!("-c search_path=pg_catalog -c statement_timeout={limit}");
        self.login_with("holdfast plan", &options)
    }

    fn login_with(&self, name: &str, options: &str) -> Login {
        let param = |name: &str, value: &str| (name.as_bytes().to_vec(), value.as_bytes().to_vec());
        Login {
            params: vec![
                param("user", &self.user),
                param("database", &self.database),
                param("application_name", name),
                param("client_encoding", "UTF8"),
                param("options", options),
            ],
            credential: self.credential.clone(),
        }
    }
}

/// An open admin connection.
#[derive(Debug)]
pub struct Admin {
    pub connection: Connection,
    /// Longest wait for an answer.
    pub wait: Duration,
}

/// Where a server stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerStatus {
    pub in_recovery: bool,
    /// On a primary the end of the WAL that is written out, on a standby what is replayed.
    pub lsn: Lsn,
    pub version: u32,
    pub system_identifier: String,
    /// On a standby: its walreceiver streams.
    pub streaming: bool,
}

/// Whether it is in recovery, its timeline as the begin of a WAL file's name, and whether its files say that it is read-only:
/// this connection has it otherwise for itself.
const PROOF: &str = "SELECT pg_catalog.pg_is_in_recovery(), \
    CASE WHEN pg_catalog.pg_is_in_recovery() THEN '' \
        ELSE pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()) END, \
    (SELECT setting FROM pg_catalog.pg_file_settings WHERE name = 'default_transaction_read_only' \
        AND error IS NULL ORDER BY seqno DESC LIMIT 1)";

impl Admin {
    /// What the server says of whether it is still what it was.
    ///
    /// # Errors
    /// As [`Admin::rows`], or the answer is of another shape.
    pub async fn proof(&mut self) -> Result<Answer, QueryError> {
        let rows = self.rows(PROOF).await?;
        let [is_in_recovery, file, read_only] =
            rows.first().map(Vec::as_slice).ok_or(QueryError::Shape)?
        else {
            return Err(QueryError::Shape);
        };
        let is_in_recovery = is_in_recovery.as_deref() == Some("t");
        let timeline =
            file.as_deref().and_then(|file| u32::from_str_radix(file.get(..8)?, 16).ok());
        let is_read_only =
            read_only.as_deref().is_some_and(|text| !matches!(text, "off" | "false" | "no" | "0"));
        let timeline = match timeline {
            Some(timeline) => timeline,
            None if is_in_recovery => 0,
            None => return Err(QueryError::Shape),
        };
        Ok(Answer { is_in_recovery, timeline, is_read_only })
    }

    /// # Errors
    /// The server cannot be reached or refuses the login.
    pub async fn connect(target: &Target, login: &AdminLogin) -> Result<Admin, ConnectError> {
        let connection = target.login(&login.login()).await?;
        Ok(Admin { connection, wait: Duration::from_secs(35) })
    }

    /// Runs a query of one statement and gives its rows.
    ///
    /// # Errors
    /// The server refuses it, the connection is lost, or no answer comes in time.
    pub async fn rows(&mut self, sql: &str) -> Result<Vec<crate::connection::Row>, QueryError> {
        timeout(self.wait, self.connection.rows(sql))
            .await
            .unwrap_or(Err(QueryError::Timeout(self.wait)))
    }

    /// # Errors
    /// As [`Admin::rows`].
    pub async fn value(&mut self, sql: &str) -> Result<Option<String>, QueryError> {
        timeout(self.wait, self.connection.value(sql))
            .await
            .unwrap_or(Err(QueryError::Timeout(self.wait)))
    }

    /// # Errors
    /// As [`Admin::rows`].
    pub async fn status(&mut self) -> Result<ServerStatus, QueryError> {
        let sql = "SELECT pg_is_in_recovery(), \
            CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END, \
            current_setting('server_version_num'), (SELECT system_identifier FROM pg_control_system()), \
            EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')";
        let rows = self.rows(sql).await?;
        let cell = |at: usize| {
            rows.first().and_then(|row| row.get(at)).and_then(Option::as_deref).unwrap_or("")
        };
        Ok(ServerStatus {
            in_recovery: cell(0) == "t",
            lsn: Lsn::read(cell(1)).unwrap_or_default(),
            version: cell(2).parse().unwrap_or(0),
            system_identifier: cell(3).to_owned(),
            streaming: cell(4) == "t",
        })
    }

    /// What the server's own lock file says; none where our role may not read it.
    ///
    /// # Errors
    /// As [`Admin::value`].
    pub async fn postmaster(&mut self) -> Result<Option<Postmaster>, QueryError> {
        let may = "SELECT has_function_privilege('pg_read_file(text)', 'execute')";
        if self.value(may).await?.as_deref() != Some("t") {
            return Ok(None);
        }
        let text = self.value("SELECT pg_read_file('postmaster.pid')").await?;
        Ok(text.as_deref().and_then(Postmaster::read))
    }

    /// The end of the WAL that is flushed: it is on the disk, whatever becomes of the server, and nothing behind it was acknowledged.
    ///
    /// # Errors
    /// As [`Admin::rows`], or the server answers with no position.
    pub async fn flush_lsn(&mut self) -> Result<Lsn, QueryError> {
        let text = self.value("SELECT pg_current_wal_flush_lsn()").await?;
        text.as_deref().and_then(Lsn::read).ok_or(QueryError::Unexpected(b'D'))
    }

    /// # Errors
    /// As [`Admin::rows`].
    pub async fn replayed_lsn(&mut self) -> Result<Lsn, QueryError> {
        let text = self.value("SELECT pg_last_wal_replay_lsn()").await?;
        text.as_deref().and_then(Lsn::read).ok_or(QueryError::Unexpected(b'D'))
    }

    /// The SCRAM verifier of a role, if it may log in with a password and has one of that kind.
    ///
    /// # Errors
    /// As [`Admin::rows`].
    pub async fn verifier(
        &mut self,
        query: &str,
        user: &str,
    ) -> Result<Option<Verifier>, QueryError> {
        let mut out = Vec::new();
        Connection::add_statement(&mut out, "", query, &[user]);
        wire::frontend::sync(&mut out);
        let ask = async {
            self.connection.ask(&out).await?;
            self.connection.answers().await
        };
        let answers =
            timeout(self.wait, ask).await.unwrap_or(Err(QueryError::Timeout(self.wait)))?;
        let row = answers.into_iter().next().and_then(|answer| answer.rows.into_iter().next());
        // As pgbouncer's auth_query: the user, then the password.
        let password = row.and_then(|row| row.into_iter().nth(1)).flatten();
        Ok(password.as_deref().and_then(Verifier::read))
    }
}
