//! Speaks to the API of a running Holdfast.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Global;

/// A switchover may wait for its deadline and for the old server to come back.
const WAIT_MAX: Duration = Duration::from_secs(3_600);
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long one of several nodes may take to say that it lives, and to be read.
const ALIVE_MAX: Duration = Duration::from_secs(2);
const READ_MAX: Duration = Duration::from_secs(20);
/// Largest answer that is read.
const ANSWER_LEN_MAX: u64 = 256 * 1024 * 1024;

const PAUSE: Duration = Duration::from_millis(200);

/// What is sent, each time it is.
struct Request<'a> {
    global: &'a Global,
    path: &'a str,
    /// None: it only reads.
    body: Option<String>,
    token: Option<String>,
    /// With it, what is sent twice is done once.
    key: Option<String>,
}

enum Failure {
    /// Nothing was done there.
    Elsewhere(String),
    /// It may have been done.
    Lost(String),
    Here(String),
}

/// The answer as text, or the reason in words. Of several nodes the one that is control answers; whoever is not has done
/// nothing, so the next may be asked, and so it may be where what is done twice is done once.
fn send(request: &Request<'_>) -> Result<String, String> {
    let apis: Vec<&str> = request.global.api.split(',').map(str::trim).collect();
    let began = Instant::now();
    let mut is_lost = false;
    loop {
        let mut failures = Vec::new();
        for api in &apis {
            match send_to(api, request, apis.len() > 1) {
                Ok(text) => return Ok(text),
                Err(Failure::Elsewhere(why)) => failures.push(why),
                Err(Failure::Lost(why)) if request.key.is_some() => {
                    is_lost = true;
                    failures.push(why);
                }
                // It only reads.
                Err(Failure::Lost(why)) if request.body.is_none() && apis.len() > 1 => {
                    failures.push(why);
                }
                Err(Failure::Lost(why) | Failure::Here(why)) => return Err(why),
            }
        }
        let limit = match is_lost || apis.len() > 1 {
            true => request.global.patience,
            false => Duration::ZERO,
        };
        if began.elapsed() >= limit {
            let failures = failures.join("; ");
            return Err(match request.key.as_ref().filter(|_| is_lost) {
                Some(key) => format!(
                    "{failures}; what became of it is not known: the same command with `--key {key}` asks again"
                ),
                None => failures,
            });
        }
        std::thread::sleep(PAUSE);
    }
}

fn agent(limit: Duration) -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_global(Some(limit))
        .timeout_connect(Some(CONNECT_MAX.min(limit)))
        .http_status_as_error(false)
        .build()
        .into()
}

/// `is_one_of_several`: whoever stands still is not waited for.
fn send_to(api: &str, request: &Request<'_>, is_one_of_several: bool) -> Result<String, Failure> {
    if is_one_of_several {
        let url = format!("{}/liveness", api.trim_end_matches('/'));
        agent(ALIVE_MAX)
            .get(&url)
            .call()
            .map_err(|error| Failure::Elsewhere(format!("`{url}` does not answer: {error}")))?;
    }
    let limit = if is_one_of_several && request.body.is_none() { READ_MAX } else { WAIT_MAX };
    let agent = agent(limit);
    let url = format!("{}{}", api.trim_end_matches('/'), request.path);
    let lost = |error: ureq::Error| {
        let text = format!(
            "`{url}` does not answer: {error}; is Holdfast running there? `--api` says where it is"
        );
        match error {
            ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => {
                Failure::Elsewhere(text)
            }
            ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                Failure::Elsewhere(text)
            }
            _ => Failure::Lost(text),
        }
    };
    let mut response = match &request.body {
        Some(body) => {
            let mut post = agent.post(&url).header("content-type", "application/json");
            if let Some(token) = &request.token {
                post = post.header("authorization", token);
            }
            if let Some(key) = &request.key {
                post = post.header("idempotency-key", key);
            }
            if let Some(epoch) = request.global.if_epoch {
                post = post.header("if-match", format!("\"epoch-{epoch}\""));
            }
            if let Some(reason) = &request.global.reason {
                post = post.query("reason", reason);
            }
            if !request.global.overrides.is_empty() {
                post = post.query("override", request.global.overrides.join(","));
            }
            post.send(body).map_err(lost)?
        }
        None => {
            let mut get = agent.get(&url);
            if let Some(token) = &request.token {
                get = get.header("authorization", token);
            }
            get.call().map_err(lost)?
        }
    };
    let status = response.status();
    let text = response.body_mut().with_config().limit(ANSWER_LEN_MAX).read_to_string();
    let text = text.map_err(lost)?;
    if status.is_success() {
        return Ok(text);
    }
    let answer = serde_json::from_str::<serde_json::Value>(&text).unwrap_or_default();
    let why = answer.get("error").and_then(|value| value.as_str());
    let why = why.map_or_else(|| format!("{status}: {text}"), str::to_owned);
    Err(match (answer.get("elsewhere"), status) {
        (Some(_), _) => Failure::Elsewhere(why),
        // Control has ended while it did this.
        (None, ureq::http::StatusCode::BAD_GATEWAY) => Failure::Lost(why),
        (None, _) => Failure::Here(why),
    })
}

fn token(global: &Global) -> Result<Option<String>, String> {
    let Some(file) = &global.token_file else { return Ok(None) };
    let text =
        std::fs::read_to_string(file).map_err(|error| format!("`{}`: {error}", file.display()))?;
    Ok(Some(format!("Bearer {}", text.trim())))
}

/// A key that nobody else has.
fn new_key() -> Result<String, String> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut random| std::io::Read::read_exact(&mut random, &mut bytes))
        .map_err(|error| format!("no key can be made: {error}"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| format!("the answer cannot be read: {error}"))
}

pub(crate) fn get<T: DeserializeOwned>(global: &Global, path: &str) -> Result<T, String> {
    let token = token(global)?;
    read(&send(&Request { global, path, body: None, token, key: None })?)
}

/// Of what may not be done twice: if the answer is lost, nobody knows whether it was.
pub(crate) fn post<T: DeserializeOwned>(
    global: &Global,
    path: &str,
    body: &impl Serialize,
) -> Result<T, String> {
    let body = Some(serde_json::to_string(body).map_err(|error| error.to_string())?);
    read(&send(&Request { global, path, body, token: token(global)?, key: None })?)
}

/// Of a change that is done once, however often it is asked for.
pub(crate) fn change<T: DeserializeOwned>(
    global: &Global,
    path: &str,
    body: &impl Serialize,
) -> Result<T, String> {
    let body = Some(serde_json::to_string(body).map_err(|error| error.to_string())?);
    let key = Some(global.key.clone().map_or_else(new_key, Ok)?);
    read(&send(&Request { global, path, body, token: token(global)?, key })?)
}
