//! `[control.etcd]`: one of several nodes, of which one is control.

use std::time::Duration;

use model::lease::Terms;
use store::etcd::{EtcdConfig, EtcdLogin, EtcdTls};

use super::reader::{Mistakes, Table};
use super::secret_file;

/// How long a node counts on the seat after a beat.
const SEAT: Terms = Terms { length: Duration::from_secs(2) };

/// What a node needs to know besides what control does.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) etcd: EtcdConfig,
    /// Of the seat.
    pub(crate) terms: Terms,
}

pub(super) fn read(control: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<Node> {
    let mut table = control.table(mistakes, "etcd")?;
    let span = table.span_of("node");
    let node = table.required_text(mistakes, "node");
    if !node.is_empty() && !model::proxies::is_name(&node) {
        let text = format!(
            "`control.etcd.node` is made of letters, digits, `-`, `_` and `.`, it is `{node}`"
        );
        mistakes.add(span, text);
    }
    let mut endpoints = Vec::new();
    let found = table.texts(mistakes, "endpoints").unwrap_or_default();
    if found.is_empty() {
        mistakes.add(
            table.span(),
            "`control.etcd.endpoints` names each member, such as \"http://10.0.0.1:2379\"",
        );
    }
    let ca = table.path(mistakes, "ca");
    for (text, span) in found {
        let text = text.trim_end_matches('/');
        match text.split_once("://") {
            Some(("https", rest)) if !rest.is_empty() && ca.is_none() => {
                mistakes.add(span, format!("`{text}` needs `ca`, the authority of etcd's certificate"));
            }
            Some(("http" | "https", rest)) if !rest.is_empty() && !rest.contains('/') => (),
            _ => mistakes.add(span, format!("`control.etcd.endpoints` must hold addresses such as \"http://10.0.0.1:2379\", `{text}` is none")),
        }
        endpoints.push(text.to_owned());
    }
    let identity = [table.path(mistakes, "cert"), table.path(mistakes, "key")];
    let identity = match identity {
        [Some(cert), Some(key)] => Some((cert, key)),
        [None, None] => None,
        _ => {
            mistakes.add(table.span(), "`cert` and `key` go together");
            None
        }
    };
    if identity.is_some() && ca.is_none() {
        mistakes
            .add(table.span(), "`cert` and `key` need `ca`, the authority of etcd's certificate");
    }
    let login = read_login(&mut table, mistakes);
    let span = table.span_of("prefix");
    let prefix = table.text(mistakes, "prefix").unwrap_or_else(|| "/holdfast/".into());
    if !prefix.starts_with('/') || !prefix.ends_with('/') {
        let text = format!("`control.etcd.prefix` begins and ends with `/`, it is `{prefix}`");
        mistakes.add(span, text);
    }
    let length = table.duration(mistakes, "lease").unwrap_or(SEAT.length);
    if !Terms::LENGTHS.contains(&length) {
        let (min, max) = (Terms::LENGTHS.start(), Terms::LENGTHS.end());
        let text =
            format!("`control.etcd.lease` is {length:?}, between {min:?} and {max:?} is accepted");
        mistakes.add(table.span_of("lease"), text);
    }
    table.end(mistakes);
    let terms = Terms { length };
    let etcd = EtcdConfig {
        endpoints,
        prefix,
        node,
        tls: ca.map(|ca| EtcdTls { ca, identity }),
        login,
        // Another member is asked in time.
        attempt_max: terms.renew_every(),
        total_max: length,
    };
    Some(Node { etcd, terms })
}

fn read_login(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<EtcdLogin> {
    let user = table.text(mistakes, "user");
    let span = table.span_of("password_file");
    let file = table.path(mistakes, "password_file");
    match (user, file) {
        (Some(user), Some(path)) => {
            let password = secret_file(&path, span, mistakes)?;
            Some(EtcdLogin { user, password: password.expose().to_owned() })
        }
        (None, None) => None,
        _ => {
            mistakes.add(table.span(), "`user` and `password_file` go together");
            None
        }
    }
}
