//! From a new socket to a session: TLS, cancel requests, the startup packet, authentication, and the login to
//! the server in the client's place.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use model::proxies::Cancel;
use pg::connect::{ConnectError, Login};
use pg::connection::Connection;
use pg::stream::Stream;
use tls::{Handshake, certificate};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use wire::backend::{self, Report, TxStatus};
use wire::frame::{self, Side};
use wire::frontend;
use wire::scram::{self, Credential, ServerStart};
use wire::sqlstate::SqlState;
use wire::startup::{self, First, Startup, TLS_HANDSHAKE_BYTE, Version};

use crate::app::{App, Cell, Params};
use crate::auth::{AuthError, Check};
use crate::console;
use crate::engine::Command;
use crate::pool::Sharing;
use crate::pool::keeper::Learned;
use crate::proxy::{Place, Shared};
use crate::session::{Identity, Leg, Session};

/// The admin database.
pub(crate) const CONSOLE_DATABASE: &str = "holdfast";
/// Requests for encryption that one connection may make: one for GSS, one for TLS.
const NEGOTIATIONS_MAX: usize = 3;

/// A client during its login.
pub(crate) struct Client {
    pub(crate) stream: Stream,
    pub(crate) received: Vec<u8>,
    peer: SocketAddr,
    certificate: Option<Vec<u8>>,
}

/// The client is gone or has been told why it is refused.
pub(crate) struct Refused;

type Outcome<T> = Result<T, Refused>;

impl Client {
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> Outcome<()> {
        self.stream.write_all(bytes).await.map_err(|_| Refused)
    }

    pub(crate) async fn refuse<T>(&mut self, report: Report) -> Outcome<T> {
        tracing::info!(peer = %self.peer, state = %report.sqlstate, reason = report.message, "client is refused");
        let mut out = Vec::new();
        report.write_error(&mut out);
        self.send(&out).await?;
        self.stream.close().await;
        Err(Refused)
    }

    async fn read_more(&mut self) -> Outcome<()> {
        match self.stream.read(&mut self.received).await {
            Ok(len) if len > 0 => Ok(()),
            _ => Err(Refused),
        }
    }

    /// The next message, whole. Before the login ends, none is longer than an authentication message.
    pub(crate) async fn message(&mut self, len_max: usize) -> Outcome<(u8, Vec<u8>)> {
        loop {
            match frame::whole(Side::Frontend, &self.received) {
                Ok(Some((tag, body, len))) => {
                    let body = body.to_vec();
                    self.received.drain(..len);
                    return Ok((tag, body));
                }
                Ok(None) if self.received.len() <= len_max => self.read_more().await?,
                Ok(None) => {
                    let report = Report::fatal(SqlState::PROTOCOL_VIOLATION, "message is too long");
                    return self.refuse(report).await;
                }
                Err(error) => {
                    return self
                        .refuse(Report::fatal(SqlState::PROTOCOL_VIOLATION, error.to_string()))
                        .await;
                }
            }
        }
    }
}

/// Runs a connection up to the hand-over to an engine. The caller has the deadline.
pub(crate) async fn run(socket: TcpStream, peer: SocketAddr, shared: Arc<Shared>, place: Place) {
    let stream = Stream::from_tcp(socket);
    let client = Client { stream, received: Vec::new(), peer, certificate: None };
    // Whoever is refused has been told; there is nobody else to tell.
    let _ = connection(client, &shared, place).await;
}

async fn connection(mut client: Client, shared: &Arc<Shared>, place: Place) -> Outcome<()> {
    let packet = Box::pin(first_packet(&mut client, shared)).await?;
    let Ok(Some((First::Startup(startup), _))) = startup::first(&packet) else {
        return Err(Refused);
    };
    let request = Request::read(&mut client, &startup).await?;
    if shared.config.tls_required && !client.stream.is_tls() {
        let report = Report::fatal(SqlState::INVALID_AUTHORIZATION, "TLS is required")
            .hint("connect with sslmode=require or higher");
        return client.refuse(report).await;
    }
    negotiate_version(&mut client, &startup).await?;
    if request.database == CONSOLE_DATABASE {
        return Box::pin(console(client, shared, request, place)).await;
    }
    let Some(app) = shared.app_of(&request.database) else {
        let report = Report::fatal(
            SqlState::INVALID_CATALOG_NAME,
            format!("database \"{}\" does not exist", request.database),
        )
        .detail("no application of this proxy has it");
        return client.refuse(report).await;
    };
    // Authentication reads from the server, so it waits for the gate as the login does.
    let mut cell = app.pass_gate().await.ok_or(Refused)?;
    if let Some(why) = app.refuses_logins() {
        let hint = format!("`holdfast status {}` says what to do", app.name);
        let report = Report::fatal(SqlState::CANNOT_CONNECT_NOW, why).hint(hint);
        return client.refuse(report).await;
    }
    let check = loop {
        match app.while_at(&cell, app.auth.check(&request.user, &cell.target)).await {
            Some(check) => break check,
            None => cell = app.pass_gate().await.ok_or(Refused)?,
        }
    };
    let credential =
        Box::pin(authenticate(&mut client, shared, &app, check, &request.user)).await?;
    Box::pin(attach(client, shared, app, request, credential, startup.version, place)).await
}

async fn console(
    mut client: Client,
    shared: &Arc<Shared>,
    request: Request,
    place: Place,
) -> Outcome<()> {
    if !shared.config.admin_users.contains(&request.user) {
        let report = Report::fatal(
            SqlState::INVALID_AUTHORIZATION,
            format!("user \"{}\" may not use the admin database", request.user),
        )
        .hint("`admin_users` in the configuration lists who may");
        return client.refuse(report).await;
    }
    let Some(app) = shared.apps.first().cloned() else { return Err(Refused) };
    // The console must work while an application is held, so any cell will do for the verifier, but one that is lost.
    let cell = app.active().or_else(|| app.cells.values().find(|cell| !app.is_lost(cell)).cloned());
    let Some(cell) = cell else { return Err(Refused) };
    let check = app.auth.check(&request.user, &cell.target);
    let check = app.unless_lost(&cell, check).await.unwrap_or(Err(AuthError::Lost));
    Box::pin(authenticate(&mut client, shared, &app, check, &request.user)).await?;
    let shared = shared.clone();
    // The session lasts longer than a login may take.
    tokio::spawn(async move {
        let _place = place;
        console::run(client, shared).await;
    });
    Ok(())
}

/// What a startup packet asks for.
struct Request {
    user: String,
    database: String,
    params: Vec<(Vec<u8>, Vec<u8>)>,
    replication: bool,
}

impl Request {
    async fn read(client: &mut Client, startup: &Startup<'_>) -> Outcome<Request> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let Some(user) = startup.param("user").filter(|user| !user.is_empty()) else {
            let message = "no PostgreSQL user name specified in startup packet";
            return client.refuse(Report::fatal(SqlState::INVALID_AUTHORIZATION, message)).await;
        };
        let database = startup.param("database").filter(|name| !name.is_empty()).unwrap_or(user);
        let replication = startup.param("replication").is_some_and(|value| {
            !matches!(value.to_ascii_lowercase().as_slice(), b"" | b"false" | b"off" | b"no" | b"0")
        });
        let own = |(name, value): &(&[u8], &[u8])| (name.to_vec(), value.to_vec());
        let params = startup
            .params
            .iter()
            .filter(|(name, _)| !name.starts_with(b"_pq_."))
            .map(own)
            .collect();
        Ok(Request { user: text(user), database: text(database), params, replication })
    }
}

/// Answers requests for encryption and cancel requests, until a startup packet is whole.
async fn first_packet(client: &mut Client, shared: &Arc<Shared>) -> Outcome<Vec<u8>> {
    for _ in 0..=NEGOTIATIONS_MAX {
        if client.received.is_empty() {
            client.read_more().await?;
        }
        // TLS without a request (PostgreSQL 17, `sslnegotiation=direct`).
        if client.received.first() == Some(&TLS_HANDSHAKE_BYTE) && !client.stream.is_tls() {
            let alpn = start_tls(client, shared).await?;
            if !alpn {
                let message = "received direct SSL connection request without ALPN protocol negotiation extension";
                return client.refuse(Report::fatal(SqlState::PROTOCOL_VIOLATION, message)).await;
            }
            continue;
        }
        let (answer, len) = loop {
            match startup::first(&client.received) {
                Ok(None) => client.read_more().await?,
                Ok(Some((First::Startup(_), len))) => {
                    let packet = client.received.get(..len).unwrap_or_default().to_vec();
                    client.received.drain(..len);
                    return Ok(packet);
                }
                Ok(Some((First::Cancel { pid, secret }, _))) => {
                    let secret = secret.to_vec();
                    let asked = Cancel { pid, secret };
                    if !cancel(shared, &asked).await
                        && let Some(strays) = shared.strays.get()
                    {
                        // It may be lost, as any.
                        let _ = strays.try_send(asked);
                    }
                    return Err(Refused);
                }
                Ok(Some((First::Ssl, len))) => {
                    let offers = shared.config.tls.is_some() && !client.stream.is_tls();
                    break (if offers { b'S' } else { b'N' }, len);
                }
                Ok(Some((First::GssEnc, len))) => break (b'N', len),
                Err(error) => {
                    let report = Report::fatal(SqlState::PROTOCOL_VIOLATION, error.to_string());
                    return client.refuse(report).await;
                }
            }
        };
        client.received.drain(..len);
        // Bytes behind the request were sent before the answer: somebody else may have put them there
        // (CVE-2021-23214).
        if answer == b'S' && !client.received.is_empty() {
            let message = "received unencrypted data after SSL request";
            return client.refuse(Report::fatal(SqlState::PROTOCOL_VIOLATION, message)).await;
        }
        client.send(&[answer]).await?;
        if answer == b'S' {
            start_tls(client, shared).await?;
        }
    }
    client
        .refuse(Report::fatal(SqlState::PROTOCOL_VIOLATION, "too many requests for encryption"))
        .await
}

async fn start_tls(client: &mut Client, shared: &Arc<Shared>) -> Outcome<bool> {
    let Some(tls) = &shared.config.tls else { return Err(Refused) };
    let handshake = Handshake::server(tls).map_err(|_| Refused)?;
    let received = std::mem::take(&mut client.received);
    let done = client.stream.handshake(Box::new(handshake), received, &mut client.received).await;
    match done {
        Ok((certificate, alpn)) => {
            client.certificate = certificate;
            Ok(alpn)
        }
        Err(error) => {
            tracing::info!(peer = %client.peer, error = &error as &dyn std::error::Error, "TLS did not come about");
            Err(Refused)
        }
    }
}

/// A later minor version, or protocol options, are answered with what there is.
async fn negotiate_version(client: &mut Client, startup: &Startup<'_>) -> Outcome<()> {
    let options: Vec<&[u8]> = startup
        .params
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| name.starts_with(b"_pq_."))
        .collect();
    if startup.version <= Version::V3_2 && options.is_empty() {
        return Ok(());
    }
    // The number is the whole version, whatever the manual's "minor" says (`SendNegotiateProtocolVersion`).
    let version = startup.version.min(Version::V3_2);
    let mut out = Vec::new();
    backend::negotiate_version(&mut out, i32::try_from(version.0).unwrap_or(0), &options);
    client.send(&out).await
}

/// Gives whether it is for one of our sessions.
pub(crate) async fn cancel(shared: &Arc<Shared>, Cancel { pid, secret }: &Cancel) -> bool {
    let Some((id, engine)) = shared.session_of_key(*pid, secret) else { return false };
    let (tx, rx) = oneshot::channel();
    engine.send(Command::Cancel(id, tx));
    let Ok(Some(to)) = rx.await else { return true };
    shared.metrics.cancels.fetch_add(1, Ordering::Relaxed);
    if let Err(error) = to.cell.target.cancel(to.pid, &to.secret).await {
        tracing::warn!(session = id, %error, "cancel request cannot be forwarded");
    }
    to.under_way.fetch_sub(1, Ordering::AcqRel);
    true
}

/// Checks the client, and gives what it is to be logged in with.
async fn authenticate(
    client: &mut Client,
    shared: &Arc<Shared>,
    app: &App,
    check: Result<Check, AuthError>,
    user: &str,
) -> Outcome<Option<Credential>> {
    if let Some(tls) = &shared.config.tls
        && tls.client_cert == tls::config::ClientCert::VerifyFull
    {
        let name = client.certificate.as_deref().and_then(certificate::common_name);
        if name.as_deref() != Some(user) {
            let report = Report::fatal(
                SqlState::INVALID_AUTHORIZATION,
                format!("certificate authentication failed for user \"{user}\""),
            );
            return client.refuse(report).await;
        }
    }
    let check = match check {
        Ok(check) => check,
        Err(error) => {
            tracing::error!(
                app = app.name,
                error = &error as &dyn std::error::Error,
                "clients cannot be checked"
            );
            let report =
                Report::fatal(SqlState::CANNOT_CONNECT_NOW, "clients cannot be checked now");
            return client.refuse(report).await;
        }
    };
    let (verifier, password) = match check {
        Check::Trust => return Ok(None),
        Check::Scram { verifier, password } => (verifier, password),
    };
    let end_point = match &shared.config.tls {
        Some(tls) if client.stream.is_tls() => tls.end_point.clone(),
        _ => None,
    };
    let mut out = Vec::new();
    match &end_point {
        Some(_) => {
            backend::authentication_sasl(&mut out, &[scram::MECHANISM_PLUS, scram::MECHANISM])
        }
        None => backend::authentication_sasl(&mut out, &[scram::MECHANISM]),
    }
    client.send(&out).await?;
    let first = sasl_message(client).await?;
    let Ok((mechanism, first)) = frontend::read_sasl_initial(&first) else {
        let report = Report::fatal(SqlState::PROTOCOL_VIOLATION, "malformed SASL message");
        return client.refuse(report).await;
    };
    let Ok(nonce) = scram::nonce() else { return Err(Refused) };
    let start = ServerStart::new(verifier, nonce, end_point);
    let (challenge, state) = match start.on_client_first(mechanism, first) {
        Ok(challenge) => challenge,
        Err(error) => {
            return client
                .refuse(Report::fatal(SqlState::PROTOCOL_VIOLATION, error.to_string()))
                .await;
        }
    };
    let mut out = Vec::new();
    backend::authentication_sasl_continue(&mut out, challenge.as_bytes());
    client.send(&out).await?;
    let last = sasl_message(client).await?;
    match state.on_client_final(&last) {
        Ok((signature, keys)) => {
            let mut out = Vec::new();
            backend::authentication_sasl_final(&mut out, signature.as_bytes());
            client.send(&out).await?;
            Ok(Some(password.map_or(Credential::Keys(keys), Credential::Password)))
        }
        Err(error) => {
            app.auth.forget(user);
            tracing::info!(user, peer = %client.peer, %error, "client cannot prove who it is");
            let message = format!("password authentication failed for user \"{user}\"");
            client.refuse(Report::fatal(SqlState::INVALID_PASSWORD, message)).await
        }
    }
}

async fn sasl_message(client: &mut Client) -> Outcome<Vec<u8>> {
    let len_max = usize::try_from(frame::AUTH_LEN_MAX).unwrap_or(usize::MAX);
    match client.message(len_max).await? {
        (b'p', body) => Ok(body),
        (tag, _) => {
            let message = format!("expected SASL response, got message type {tag}");
            client.refuse(Report::fatal(SqlState::PROTOCOL_VIOLATION, message)).await
        }
    }
}

/// Logs in to the server as the client, tells it what the server said, and hands the session to an engine.
async fn attach(
    mut client: Client,
    shared: &Arc<Shared>,
    app: Arc<App>,
    request: Request,
    credential: Option<Credential>,
    version: Version,
    place: Place,
) -> Outcome<()> {
    let identity = Arc::new(Identity {
        user: request.user,
        database: request.database,
        params: request.params,
        credential,
        peer: client.peer.to_string(),
        tls: client.stream.is_tls(),
        replication: request.replication,
    });
    let (cell, counted, Begun { server, sharing }) = loop {
        // From here on the session counts, so that a move waits for it; the gate is looked at afterwards.
        app.sessions.fetch_add(1, Ordering::SeqCst);
        let counted = Counted(&app);
        if let Some(cell) = app.active()
            && let Some(begun) = begin(&mut client, shared, &app, &cell, &identity).await?
        {
            break (cell, counted, begun);
        }
        drop(counted);
        app.pass_gate().await.ok_or(Refused)?;
    };
    if app.lifts_fence(&server.params).await {
        let why = "a login that sets `default_transaction_read_only` to off is refused in a cell that takes no writes";
        let report = Report::fatal(SqlState::READ_ONLY_SQL_TRANSACTION, why)
            .hint("leave it out of the connection's options, and of the role's and the database's defaults");
        return client.refuse(report).await;
    }
    let id = shared.next_id();
    let client_pid = if server.pid == 0 { shared.own_pid(id) } else { server.pid };
    let secret_len = if version >= Version::V3_2 { 32 } else { 4 };
    let Some(secret) = shared.new_secret(secret_len) else { return Err(Refused) };
    let mut out = Vec::new();
    backend::authentication_ok(&mut out);
    for (name, value) in server.params.iter() {
        backend::parameter_status(&mut out, name.as_bytes(), value.as_bytes());
    }
    backend::key_data(&mut out, client_pid, &secret);
    out.extend_from_slice(&server.aside);
    backend::ready(&mut out, TxStatus::Idle);
    client.send(&out).await?;

    let received = std::mem::take(&mut client.received);
    let client =
        Leg::new(client.stream.into_parts().map_err(|_| Refused)?, received, Side::Frontend);
    std::mem::forget(counted);
    let session = Session {
        id,
        app: app.clone(),
        cell,
        identity,
        client,
        server: server.leg,
        protocol: model::session::Protocol::new(),
        params: server.params,
        hints: Default::default(),
        unnamed: Vec::new(),
        unnamed_too_long: false,
        has_prepared: false,
        names: Default::default(),
        has_prepared_by_sql: false,
        had_deallocated: false,
        had_hidden_code: false,
        has_closed: false,
        cuts_seen: 0,
        has_lost_names: false,
        has_lifted_fence: false,
        confined: None,
        restyled: false,
        beneath: None,
        unnamed_restyled: false,
        long: None,
        client_pid,
        client_secret: secret.into(),
        backend_pid: server.pid,
        backend_secret: server.secret.into(),
        client_gone: false,
        goodbye_said: false,
        carry_waits: true,
        server_gone: false,
        server_said_why: false,
        cancels: Arc::default(),
        wanted: false,
        bytes_in: 0,
        bytes_out: 0,
        requests: 0,
        connected_at: shared.clock.seconds(),
        active_at: shared.clock.seconds(),
        moves: 0,
        stilled: Vec::new(),
        held_since: None,
        place,
        sharing,
        edits: Vec::new(),
    };
    shared.begin(Box::new(session));
    Ok(())
}

/// What a session begins with.
struct Begun {
    server: Attached,
    sharing: Option<Box<Sharing>>,
}

/// The server that it is attached to, and what that has said.
struct Attached {
    leg: Leg,
    /// 0 while there is no server.
    pid: i32,
    secret: Vec<u8>,
    params: Params,
    /// What the server has said besides.
    aside: Vec<u8>,
}

impl Attached {
    /// # Errors
    /// The server has not answered what we have asked.
    fn of(mut connection: Connection, app: &App) -> Result<Attached, String> {
        let (pid, secret) = (connection.pid, std::mem::take(&mut connection.secret));
        let params = app.share(std::mem::take(&mut connection.params));
        let aside = std::mem::take(&mut connection.aside);
        let (server, unread) = connection.into_stream().map_err(|error| error.to_string())?;
        let parts = server.into_parts().map_err(|error| error.to_string())?;
        let leg = Leg::new(parts, unread, Side::Backend);
        Ok(Attached { leg, pid, secret, params, aside })
    }

    /// Not attached yet, and told what others of its kind were told.
    fn nowhere(params: Params) -> Attached {
        Attached { leg: Leg::vacant(), pid: 0, secret: Vec::new(), params, aside: Vec::new() }
    }
}

/// What a session begins with, unless the answers to our questions would be read as those to the client's.
async fn attached(client: &mut Client, connection: Connection, app: &App) -> Outcome<Attached> {
    match Attached::of(connection, app) {
        Ok(attached) => Ok(attached),
        Err(error) => {
            tracing::warn!(app = app.name, error, "a server does not answer at a login");
            let report = Report::fatal(SqlState::CONNECTION_FAILURE, error);
            client.refuse(report).await
        }
    }
}

/// Begins a session on a cell. None if the application goes on elsewhere meanwhile: the client was told nothing yet.
async fn begin(
    client: &mut Client,
    shared: &Shared,
    app: &App,
    cell: &Arc<Cell>,
    identity: &Arc<Identity>,
) -> Outcome<Option<Begun>> {
    let Some(()) = app.while_at(cell, app.learn_catalog(cell, &identity.database)).await else {
        return Ok(None);
    };
    let pool = match app.pool {
        Some(_) if !identity.replication => {
            app.pools.of(&identity.user, &identity.database, &identity.params)
        }
        _ => None,
    };
    let Some(mut pool) = pool else {
        let Some(connection) = log_in(client, shared, app, cell, identity).await? else {
            return Ok(None);
        };
        let server = attached(client, connection, app).await?;
        return Ok(Some(Begun { server, sharing: None }));
    };
    pool.knows(identity);
    // One of a kind logs in, the others wait to be told what it was told.
    let one = match pool.welcome(cell) {
        Some(_) => None,
        None => Some(pool.welcoming.lock().await),
    };
    let mut next = None;
    let server = match pool.welcome(cell) {
        Some(welcome) => Attached::nowhere(welcome.params.clone()),
        None => {
            let Some(mut connection) = log_in(client, shared, app, cell, identity).await? else {
                return Ok(None);
            };
            let aside = std::mem::take(&mut connection.aside);
            let learned = pool.learn(app, cell, identity, &mut connection);
            let Some(learned) = app.while_at(cell, learned).await else { return Ok(None) };
            connection.aside = aside;
            match learned {
                Ok(Learned::Same(_)) => (),
                Ok(Learned::Other { here, .. }) => {
                    // Those who were there before keep what they had; this one has what it was told.
                    app.pools.retire_one(&pool);
                    let (user, database) = (&identity.user, &identity.database);
                    if let Some(other) = app.pools.of(user, database, &identity.params) {
                        other.knows(identity);
                        other.know(&here);
                        next = Some(other);
                    }
                }
                Err(error) => {
                    tracing::warn!(app = app.name, error, "a session cannot share servers");
                }
            }
            attached(client, connection, app).await?
        }
    };
    drop(one);
    if let Some(next) = next {
        pool = next;
    }
    let sharing = pool.welcome(cell).map(|_| Box::new(Sharing::new(pool)));
    Ok(Some(Begun { server, sharing }))
}

/// Logs in to the server. What it refuses, the client is told. None if the application goes on elsewhere meanwhile.
async fn log_in(
    client: &mut Client,
    shared: &Shared,
    app: &App,
    cell: &Arc<Cell>,
    identity: &Identity,
) -> Outcome<Option<Connection>> {
    let login = Login { params: identity.params.clone(), credential: identity.credential.clone() };
    let error = match app.while_at(cell, cell.target.login(&login)).await {
        None => return Ok(None),
        Some(Ok(connection)) => return Ok(Some(connection)),
        Some(Err(error)) => error,
    };
    if matches!(&error, ConnectError::Refused { sqlstate, .. } if *sqlstate == SqlState::INVALID_PASSWORD)
    {
        app.auth.forget(&identity.user);
    }
    shared.metrics.logins_failed.fetch_add(1, Ordering::Relaxed);
    if let Some(raw) = error.raw_error() {
        let mut out = Vec::new();
        if error.after_authentication() {
            backend::authentication_ok(&mut out);
        }
        out.extend_from_slice(raw);
        client.send(&out).await?;
        client.stream.close().await;
        return Err(Refused);
    }
    tracing::warn!(
        app = app.name,
        error = &error as &dyn std::error::Error,
        "server cannot be reached"
    );
    client.refuse(Report::fatal(SqlState::CONNECTION_FAILURE, error.to_string())).await
}

/// Takes the session off the count if its login does not come to an end.
struct Counted<'a>(&'a App);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.sessions.fetch_sub(1, Ordering::SeqCst);
    }
}
