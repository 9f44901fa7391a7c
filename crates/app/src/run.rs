//! Starts control and proxy in one process and connects them: orders go one way, reports the other.

use std::sync::Arc;
use std::time::Duration;

use control::{Ask, Control, ControlError, Seated};
use model::audit::Asking;
use model::proxies::CANCELS_MAX;
use proxy::{Proxy, StartError};
use store::StoreError;
use store::embedded::EmbeddedStore;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::signal::unix::Signal;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::api;
use crate::config::{Agents, Config};
use crate::loaded::{self, Loaded};

/// Orders that may wait for the proxy; control sends one at a time for each application.
const ORDERS_MAX: usize = 16;
/// How long running requests may take to end at a shutdown.
pub(crate) const GRACE: Duration = Duration::from_secs(5);

#[derive(Debug, Error)]
pub(crate) enum RunError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Record(#[from] control::records::RecordError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Proxy(#[from] StartError),
    #[error("cannot listen on `{address}` for agents")]
    Agents { address: std::net::SocketAddr, source: std::io::Error },
    #[error("the name `{name}` cannot be taken on this host")]
    Name { name: String, source: std::io::Error },
    #[error("a part of control has ended")]
    Ended,
    #[error("cannot listen on `{address}` for the API")]
    Api { address: std::net::SocketAddr, source: std::io::Error },
}

/// A running process: what the configuration names.
pub(crate) struct Running {
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) api: std::net::SocketAddr,
    tasks: JoinSet<()>,
}

impl Running {
    /// Starts everything. Executions that a crash cut off are brought to their end before clients get in.
    ///
    /// # Errors
    /// The store is in use or damaged, or an address is taken.
    pub(crate) async fn start(
        config: Config,
        loaded: Option<(Arc<Loaded>, Signal)>,
    ) -> Result<Running, RunError> {
        let store = Arc::new(EmbeddedStore::open(&config.control.state_dir)?);
        let (orders, incoming) = mpsc::channel::<Ask>(ORDERS_MAX);
        let seat = Seated::alone(store)?;
        let control = Control::open(config.control.clone(), seat, Some(orders))?;
        // Logins wait at the gate until recovery has said which cell is active.
        let nobody = control.config.apps.keys().map(|app| (app.clone(), String::new())).collect();
        let proxy = Arc::new(Proxy::start(config.proxy.clone(), &nobody).await?);
        let mut tasks = JoinSet::new();
        tasks.spawn(carry_orders(proxy.clone(), incoming));
        tasks.spawn(pass_cancels_on(proxy.clone(), control.clone()));
        take_up(&control, config.agents, &mut tasks).await?;
        let address = config.api.listen;
        let listener =
            TcpListener::bind(address).await.map_err(|source| RunError::Api { address, source })?;
        watch(&control, &mut tasks);
        let api = listener.local_addr().unwrap_or(address);
        let access = config.api.access.clone();
        let file = loaded.as_ref().map(|(loaded, _)| loaded.clone());
        let state = api::State::new(Some(proxy.clone()), control.clone(), access, file);
        if let Some((loaded, hangups)) = loaded {
            let its = loaded.clone();
            proxy.rereads_by(Box::new(move |app| its.rules(app)));
            tasks.spawn(on_hangup(loaded, Some(control.clone()), hangups));
        }
        tasks.spawn(async move {
            if let Err(error) = axum::serve(listener, api::routes(state)).await {
                tracing::error!(%error, "the API has ended");
            }
        });
        Ok(Running { proxy, api, tasks })
    }

    /// Ends everything, running requests first.
    pub(crate) async fn stop(mut self) {
        self.proxy.stop(GRACE).await;
        self.tasks.shutdown().await;
    }
}

/// Cancel requests go to the proxy of their session, whichever they have come to.
async fn pass_cancels_on(proxy: Arc<Proxy>, control: Arc<Control>) {
    let mut strays = proxy.strays();
    let there = async {
        while let Some(cancel) = strays.recv().await {
            control.cancel_elsewhere(cancel);
        }
    };
    let (told, mut cancels) = mpsc::channel(CANCELS_MAX);
    let here = async {
        while let Some(cancel) = cancels.recv().await {
            proxy.cancel(&cancel).await;
        }
    };
    tokio::join!(there, here, control.hear_cancels(told));
}

/// Serves agents and proxies, and brings to its end what was cut off, before clients get in.
///
/// # Errors
/// An address is taken, or the store cannot be used.
pub(crate) async fn take_up(
    control: &Arc<Control>,
    agents: Option<Agents>,
    tasks: &mut JoinSet<()>,
) -> Result<(), RunError> {
    if let Some(agents) = agents {
        let address = agents.listen;
        // Before recovery, which may need them.
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(|source| RunError::Agents { address, source })?;
        let control = control.clone();
        tasks.spawn(async move {
            if let Err(error) = api::agents::serve(listener, agents.tls, control).await {
                tracing::error!(%error, "agents are served no more");
            }
        });
    }
    for app in control.in_order()? {
        // A rejoin may copy for hours: it is taken up by whoever watches, and nobody waits for it.
        if control.rejoining(&app, &control.application(&app)?).is_none() {
            control.recover(&app).await?;
        }
        serve(control, &app).await?;
        control.settled(&app);
    }
    Ok(())
}

/// Looks at the active cell of each application from now on.
pub(crate) fn watch(control: &Arc<Control>, tasks: &mut JoinSet<()>) {
    for app in control.config.apps.keys() {
        tasks.spawn(control::watch::run(control.clone(), app.clone()));
        tasks.spawn(control::plans::run(control.clone(), app.clone()));
        tasks.spawn(control::alarms::run(control.clone(), app.clone()));
    }
}

/// Lets clients of an application in.
async fn serve(control: &Control, app: &str) -> Result<(), ControlError> {
    let Some(control::Served { cell, state, epoch }) = control.served_cell(app)? else {
        tracing::error!(app, "application has no active cell; its clients wait");
        return Ok(());
    };
    if !state.takes_writes() {
        tracing::warn!(app, cell, %state, "application takes no writes");
    }
    let (app, to) = (app.to_owned(), cell.clone());
    let order = model::barrier::Order::Release { app: app.clone(), to, state, epoch };
    let report = control.order(order).await;
    if let Some(error) = report.error {
        tracing::error!(app, cell, error, "application cannot be served");
    }
    Ok(())
}

/// Takes up the configuration file at each SIGHUP. Whoever is one of several nodes has the proxies' done when asked.
pub(crate) async fn on_hangup(
    loaded: Arc<Loaded>,
    control: Option<Arc<Control>>,
    mut hangups: Signal,
) {
    while hangups.recv().await.is_some() {
        let taken = match &control {
            Some(control) => loaded::take_up(&loaded, control).await,
            None => loaded.apply(),
        };
        let changes = match taken {
            Ok(changes) => changes.says(),
            Err(why) => {
                tracing::error!("nothing is taken up: {why}");
                continue;
            }
        };
        tracing::info!("{changes}");
        let Some(control) = &control else { continue };
        if let Err(error) = control.note_configuration(Asking::own("SIGHUP"), changes) {
            tracing::error!(error = model::chain(&error), "that is not in the audit");
        }
    }
}

async fn carry_orders(proxy: Arc<Proxy>, mut incoming: mpsc::Receiver<Ask>) {
    let mut mover = proxy.mover();
    while let Some((order, reply)) = incoming.recv().await {
        // Whoever asked may have gone; the order is obeyed all the same.
        let _ = reply.send(mover.obey(order).await);
    }
}
