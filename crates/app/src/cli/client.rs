//! Speaks to the API of a running Holdfast.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Global;

/// A switchover may wait for its deadline and for the old server to come back.
const WAIT_MAX: Duration = Duration::from_secs(3_600);
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Largest answer that is read.
const ANSWER_LEN_MAX: u64 = 256 * 1024 * 1024;

/// The answer as text, or the reason in words. Of several nodes the one that is control answers; whoever is not has done
/// nothing, so the next may be asked.
fn send(global: &Global, method: &str, path: &str, body: Option<String>) -> Result<String, String> {
    let mut others = Vec::new();
    for api in global.api.split(',').map(str::trim) {
        match send_to(api, global, method, path, body.clone()) {
            Ok(text) => return Ok(text),
            Err(Failure::Elsewhere(why)) => others.push(why),
            Err(Failure::Here(why)) => return Err(why),
        }
    }
    Err(others.join("; "))
}

enum Failure {
    /// Nothing was done there.
    Elsewhere(String),
    Here(String),
}

fn send_to(
    api: &str,
    global: &Global,
    method: &str,
    path: &str,
    body: Option<String>,
) -> Result<String, Failure> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(WAIT_MAX))
        .timeout_connect(Some(CONNECT_MAX))
        .http_status_as_error(false)
        .build()
        .into();
    let url = format!("{}{path}", api.trim_end_matches('/'));
    let token = match &global.token_file {
        Some(file) => {
            let text = std::fs::read_to_string(file)
                .map_err(|error| Failure::Here(format!("`{}`: {error}", file.display())))?;
            Some(format!("Bearer {}", text.trim()))
        }
        None => None,
    };
    let unreachable = |error: ureq::Error| {
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
            _ => Failure::Here(text),
        }
    };
    let mut response = if method == "POST" {
        let mut request = agent.post(&url).header("content-type", "application/json");
        if let Some(token) = &token {
            request = request.header("authorization", token);
        }
        request.send(body.unwrap_or_default()).map_err(unreachable)?
    } else {
        agent.get(&url).call().map_err(unreachable)?
    };
    let status = response.status();
    let text = response
        .body_mut()
        .with_config()
        .limit(ANSWER_LEN_MAX)
        .read_to_string()
        .map_err(unreachable)?;
    if status.is_success() {
        return Ok(text);
    }
    let answer = serde_json::from_str::<serde_json::Value>(&text).unwrap_or_default();
    let why = answer.get("error").and_then(|value| value.as_str());
    let why = why.map_or_else(|| format!("{status}: {text}"), str::to_owned);
    Err(match answer.get("elsewhere") {
        Some(_) => Failure::Elsewhere(why),
        None => Failure::Here(why),
    })
}

fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| format!("the answer cannot be read: {error}"))
}

pub(crate) fn get<T: DeserializeOwned>(global: &Global, path: &str) -> Result<T, String> {
    read(&send(global, "GET", path, None)?)
}

pub(crate) fn post<T: DeserializeOwned>(
    global: &Global,
    path: &str,
    body: &impl Serialize,
) -> Result<T, String> {
    let body = serde_json::to_string(body).map_err(|error| error.to_string())?;
    read(&send(global, "POST", path, Some(body))?)
}
