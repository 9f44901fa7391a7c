//! Questions and answers by mutual TLS, on one connection or on several.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pg::Address;
use tls::mutual::Mutual;
use tokio::net::TcpListener;
use tokio::sync::Barrier;
use tokio::task::{AbortHandle, JoinSet};

use crate::server::{Bytes, answer};
use crate::{Client, ClientError, Controls, Peer, Who};

const PATH: &str = "/ask";
const LIMIT: Duration = Duration::from_secs(20);

fn mutual(dir: &Path) -> Mutual {
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    let ca = params.self_signed(&key).unwrap();
    let authority = rcgen::Issuer::new(params, key);
    let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, "somebody");
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = params.signed_by(&key, &authority).unwrap();
    let file = |name: &str, text: String| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (ca, cert) = (file("ca", ca.pem()), file("cert", cert.pem()));
    Mutual::load(&cert, &file("key", key.serialize_pem()), &ca).unwrap()
}

/// One who answers by where he was asked from: `together` only when so many ask at a time, `never` not at all.
struct Answering {
    controls: Arc<Controls>,
    task: AbortHandle,
}

impl Answering {
    async fn start(server: Mutual, client: Mutual, together: usize) -> Answering {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address =
            Address { host: "127.0.0.1".into(), port: listener.local_addr().unwrap().port() };
        let barrier = Arc::new(Barrier::new(together));
        let respond = move |who: Who, text: Bytes| {
            let barrier = barrier.clone();
            async move {
                assert_eq!(who.peer, Peer::Named("somebody".into()));
                match &*text {
                    br#""together""# => {
                        let _ = barrier.wait().await;
                    }
                    br#""never""# => std::future::pending().await,
                    _ => (),
                }
                Ok(serde_json::to_vec(&who.address).unwrap())
            }
        };
        let task = tokio::spawn(answer(listener, Some(server), PATH, respond)).abort_handle();
        Answering { controls: Controls::new(vec![address], Some(client)), task }
    }

    /// From where each of these questions was asked, all at a time.
    async fn ask_all(&self, text: &'static str, count: usize) -> BTreeSet<SocketAddr> {
        let mut asking = JoinSet::new();
        for _ in 0..count {
            let mut client = self.controls.client();
            asking.spawn(async move { ask(&mut client, text).await.unwrap() });
        }
        asking.join_all().await.into_iter().collect()
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn ask(client: &mut Client, text: &str) -> Result<SocketAddr, ClientError> {
    client.post(PATH, &text, LIMIT).await
}

#[tokio::test]
async fn all_ask_at_a_time_on_one_connection() {
    let dir = tempfile::tempdir().unwrap();
    let mutual = mutual(dir.path());
    let answering = Answering::start(mutual.clone(), mutual, 8).await;
    let first = ask(&mut answering.controls.client(), "first").await.unwrap();
    assert_eq!(answering.ask_all("together", 8).await, BTreeSet::from([first]));
}

#[tokio::test]
async fn whoever_speaks_no_http2_has_a_connection_each() {
    let dir = tempfile::tempdir().unwrap();
    let mutual = mutual(dir.path());
    let mut earlier = mutual.clone();
    Arc::make_mut(&mut earlier.server).alpn_protocols.clear();
    let answering = Answering::start(earlier, mutual.clone(), 3).await;
    assert_eq!(answering.ask_all("together", 3).await.len(), 3);
    let mut earlier = mutual.clone();
    Arc::make_mut(&mut earlier.client).alpn_protocols.clear();
    let answering = Answering::start(mutual, earlier, 3).await;
    assert_eq!(answering.ask_all("together", 3).await.len(), 3);
}

#[tokio::test]
async fn nobody_else_asks_where_a_question_was_not_answered() {
    let dir = tempfile::tempdir().unwrap();
    let mutual = mutual(dir.path());
    let answering = Answering::start(mutual.clone(), mutual, 2).await;
    let first = ask(&mut answering.controls.client(), "first").await.unwrap();
    // Waits for one who asks on another connection, and is not cut off itself.
    let mut waits = answering.controls.client();
    assert_eq!(ask(&mut waits, "else").await.unwrap(), first);
    let mut asking = JoinSet::new();
    asking.spawn(async move { ask(&mut waits, "together").await.unwrap() });
    let mut unanswered = answering.controls.client();
    let late = unanswered.post::<_, SocketAddr>(PATH, &"never", Duration::from_millis(50)).await;
    assert!(matches!(late, Err(ClientError::Late { .. })), "{late:?}");
    let second = ask(&mut unanswered, "together").await.unwrap();
    assert_ne!(second, first);
    assert_eq!(asking.join_all().await, [first]);
    assert_eq!(ask(&mut answering.controls.client(), "then").await.unwrap(), second);
}
