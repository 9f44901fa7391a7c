//! One of several nodes of which one is control: it waits for the seat, does what control does while it has it, and ends all
//! of that with it. Its API answers all the time, if only that another node is control.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State as Extract};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use control::{Control, Seated};
use pg::clock;
use serde_json::json;
use store::Store;
use store::etcd::EtcdStore;
use tokio::net::TcpListener;
use tokio::runtime::{Handle, Runtime};
use tokio::signal::unix::Signal;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tower::ServiceExt;

use crate::api::{self, ApiError};
use crate::config::{NodeConfig, chain};
use crate::loaded::Loaded;
use crate::run::{RunError, on_hangup, take_up, watch};

/// After a tenure that ended by a failure, until the next.
const PAUSE: Duration = Duration::from_secs(1);
/// How long what is going on may take to end when this node leaves the seat.
const GRACE: Duration = Duration::from_secs(2);

/// What answers the API while this node is control, and on which runtime.
type Answers = Arc<Mutex<Option<(Router, Handle)>>>;

pub(crate) struct Node {
    config: NodeConfig,
    loaded: Arc<Loaded>,
    store: Arc<dyn Store>,
    answers: Answers,
    pub(crate) api: std::net::SocketAddr,
    serving: JoinSet<()>,
}

impl Node {
    /// # Errors
    /// An address is taken, or etcd does not answer.
    pub(crate) async fn start(
        config: NodeConfig,
        loaded: Arc<Loaded>,
        hangups: Signal,
    ) -> Result<Node, RunError> {
        // The address first: a second process of this node is to find it taken, not to take the name from the one that runs.
        let address = config.api.listen;
        let listener =
            TcpListener::bind(address).await.map_err(|source| RunError::Api { address, source })?;
        let api = listener.local_addr().unwrap_or(address);
        let run =
            u64::from(std::process::id()) << 32 | (clock::now().0.as_millis() & 0xffff_ffff) as u64;
        let store: Arc<dyn Store> = Arc::new(EtcdStore::open(config.node.etcd.clone(), run)?);
        let answers = Answers::default();
        let routes = routes(answers.clone(), config.node.etcd.node.clone());
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            if let Err(error) = axum::serve(listener, routes).await {
                tracing::error!(%error, "the API has ended");
            }
        });
        // The audit is written by whoever is control; here it stands in the log.
        serving.spawn(on_hangup(loaded.clone(), None, hangups));
        Ok(Node { config, loaded, store, answers, api, serving })
    }

    /// Takes the seat again and again, until `stop` resolves.
    pub(crate) async fn run(
        mut self,
        stop: impl Future<Output = Result<(), String>>,
    ) -> Result<(), String> {
        tokio::pin!(stop);
        loop {
            let take = Seated::take(
                self.store.clone(),
                &self.config.node.etcd.node,
                self.config.node.terms,
            );
            let seat = tokio::select! {
                // Whoever starts this process again has the name from then on.
                seat = take => seat.map_err(|error| chain(&error))?,
                stopped = &mut stop => {
                    self.serving.shutdown().await;
                    return stopped;
                }
            };
            tracing::warn!(tenure = seat.tenure().0, "this node is control");
            // Whatever is begun in a tenure ends with it.
            let runtime = crate::cli::runtime()?;
            let (failed, failure) = oneshot::channel();
            let (config, held, answers) = (self.config.clone(), seat.clone(), self.answers.clone());
            let loaded = self.loaded.clone();
            runtime.spawn(async move {
                let error = Box::pin(hold_office((config, loaded), held, &answers)).await;
                let _ = failed.send(chain(&error));
            });
            let (why, stopped) = tokio::select! {
                why = seat.hold() => (why, None),
                why = failure => (why.unwrap_or_else(|_| "control has ended".into()), None),
                stopped = &mut stop => ("this node stops".into(), Some(stopped)),
            };
            *self.answers.lock().unwrap_or_else(PoisonError::into_inner) = None;
            tracing::warn!(tenure = seat.tenure().0, why, "this node is not control any more");
            end(runtime).await;
            // If it had come to that only just before.
            *self.answers.lock().unwrap_or_else(PoisonError::into_inner) = None;
            // Also if others have it already: then it says nothing.
            if seat.is_valid() {
                seat.leave();
            }
            if let Some(stopped) = stopped {
                self.serving.shutdown().await;
                return stopped;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Ends every task, wherever it waits.
async fn end(runtime: Runtime) {
    // Dropping it here would wait on a thread that others need.
    let _ = tokio::task::spawn_blocking(move || runtime.shutdown_timeout(GRACE)).await;
}

/// Does what control does. Gives why it does it no more.
async fn hold_office(
    config: (NodeConfig, Arc<Loaded>),
    seat: Arc<Seated>,
    answers: &Answers,
) -> RunError {
    match try_office(config, seat, answers).await {
        Ok(()) => RunError::Ended,
        Err(error) => error,
    }
}

async fn try_office(
    (config, loaded): (NodeConfig, Arc<Loaded>),
    seat: Arc<Seated>,
    answers: &Answers,
) -> Result<(), RunError> {
    // Whoever was control before had been asked to take up what is in this file as well.
    match loaded.apply() {
        Ok(changes) if changes.is_empty() => (),
        Ok(changes) => tracing::info!("{}", changes.says()),
        Err(why) => tracing::error!("the configuration is as it was: {why}"),
    }
    let control = Control::open(config.control.anew(), seat, None)?;
    let mut tasks = JoinSet::new();
    // People may see what is recovered, and have it wait.
    let access = config.api.access.clone();
    let state = api::State::new(None, control.clone(), access, Some(loaded));
    let routes = (api::routes(state), Handle::current());
    *answers.lock().unwrap_or_else(PoisonError::into_inner) = Some(routes);
    take_up(&control, Some(config.agents), &mut tasks).await?;
    watch(&control, &mut tasks);
    // None of them ever should.
    tasks.join_next().await;
    Ok(())
}

fn routes(answers: Answers, node: String) -> Router {
    Router::new()
        .route("/liveness", get(|| async { "alive\n" }))
        .fallback(answer)
        .with_state((answers, node))
}

async fn answer(
    Extract((answers, node)): Extract<(Answers, String)>,
    request: Request,
) -> Response {
    let routes = answers.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let Some((routes, runtime)) = routes else { return elsewhere(&node) };
    // What it begins ends with the tenure.
    let answered = runtime.spawn(routes.oneshot(request)).await;
    match answered {
        Ok(Ok(response)) => response,
        Ok(Err(never)) => match never {},
        Err(_) => {
            let text = format!("node `{node}` is not control any more: look what became of it");
            ApiError(StatusCode::BAD_GATEWAY, text).into_response()
        }
    }
}

/// The command line asks the next node.
fn elsewhere(node: &str) -> Response {
    let text = format!("node `{node}` is not control at the moment");
    (StatusCode::SERVICE_UNAVAILABLE, axum::Json(json!({ "error": text, "elsewhere": true })))
        .into_response()
}
