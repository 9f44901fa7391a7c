//! Calls somebody by HTTP.

use std::time::Duration;

use model::plan::Http;
use model::plan::alarm::Checked;
use model::plan::run::Outcome;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::{Doing, SAID_LEN_MAX, said, secret_of};

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

pub(super) async fn call(doing: &Doing, http: &Http, limit: Duration) -> Outcome {
    let Answer { status, text } = match send(doing, http, limit).await {
        Ok(answer) => answer,
        Err(outcome) => return outcome,
    };
    match status {
        200..=299 => Outcome::Done(text),
        // Somebody between, or nobody, knows what became of it (RFC 9110, 15.5.9 and 15.6).
        408 | 425 | 500..=599 => Outcome::Unknown(text),
        _ => Outcome::Failed(text),
    }
}

/// Whoever answers anything but that all is well says that it is not.
pub(super) async fn check(doing: &Doing, http: &Http, limit: Duration) -> (Checked, String) {
    match send(doing, http, limit).await {
        Ok(Answer { status: 200..=299, text }) => (Checked::Good, text),
        Ok(Answer { text, .. }) => (Checked::Bad, text),
        Err(
            Outcome::Done(why)
            | Outcome::Already(why)
            | Outcome::NotDone(why)
            | Outcome::Failed(why)
            | Outcome::Unknown(why),
        ) => (Checked::Unanswered, why),
    }
}

struct Answer {
    status: u16,
    text: String,
}

/// # Errors
/// There is no answer.
async fn send(doing: &Doing, http: &Http, limit: Duration) -> Result<Answer, Outcome> {
    let (doing, http) = (doing.clone(), http.clone());
    let sent = tokio::task::spawn_blocking(move || send_now(&doing, &http, limit));
    sent.await.unwrap_or_else(|error| Err(Outcome::Unknown(error.to_string())))
}

fn send_now(doing: &Doing, http: &Http, limit: Duration) -> Result<Answer, Outcome> {
    let token = http.token_file.as_deref().map(secret_of).transpose().map_err(Outcome::NotDone)?;
    let body = match &http.body {
        Some(body) => body.clone(),
        // Who only asks says nothing (RFC 9110, 9.3.1).
        None if http.method == "GET" => String::new(),
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
    if let Some(token) = &token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let request = match request.body(body) {
        Ok(request) => request,
        Err(error) => return Err(Outcome::NotDone(format!("no request can be made: {error}"))),
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
            let text = format!("`{}` does not answer: {error}", http.shown_url());
            return Err(if is_sent { Outcome::Unknown(text) } else { Outcome::NotDone(text) });
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
    // Some say again what they were sent.
    let text = match token.as_deref().filter(|token| !token.is_empty()) {
        Some(token) => text.replace(token, "***"),
        None => text,
    };
    let text = format!("{status} {}", said(&text)).trim().to_owned();
    Ok(Answer { status: status.as_u16(), text })
}

#[cfg(test)]
mod tests {
    use super::super::doing;
    use super::*;

    #[tokio::test]
    async fn an_answer_but_a_good_one_is_a_bad_one() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let serve = std::thread::spawn(move || {
            ["200 OK", "503 Service Unavailable", "302 Found"].map(|status| {
                let (mut socket, _) = listener.accept().unwrap();
                let mut request = [0; 4096];
                let len = std::io::Read::read(&mut socket, &mut request).unwrap();
                let answer = format!(
                    "HTTP/1.1 {status}\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhm"
                );
                std::io::Write::write_all(&mut socket, answer.as_bytes()).unwrap();
                String::from_utf8_lossy(&request[..len]).into_owned()
            })
        });
        let url = format!("http://127.0.0.1:{port}/health");
        let http = Http { method: "GET".into(), url, body: None, token_file: None };
        let long = Duration::from_secs(20);
        assert_eq!(check(&doing(), &http, long).await, (Checked::Good, "200 OK hm".into()));
        for _ in 0..2 {
            let (checked, text) = check(&doing(), &http, long).await;
            assert_eq!(checked, Checked::Bad, "{text}");
        }
        let [request, ..] = serve.join().unwrap();
        assert!(request.starts_with("GET /health ") && request.ends_with("\r\n\r\n"), "{request}");
        // Nobody listens any more.
        let (checked, text) = check(&doing(), &http, long).await;
        assert_eq!(checked, Checked::Unanswered, "{text}");
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
