//! Where a server listens: a host and a port, or the directory of its Unix socket.

use std::path::PathBuf;

/// As libpq: a host that begins with `/` is the directory of a Unix socket.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    pub host: String,
    pub port: u16,
}

impl Address {
    /// Reads `host:port`, `[v6]:port` or `/directory:port`; the port may be left out (5432).
    pub fn read(text: &str) -> Option<Address> {
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
                (host, port.parse().ok()?)
            }
            Some(_) => (text, 5432),
            None => (text, 5432),
        };
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        (!host.is_empty() && port != 0).then(|| Address { host: host.to_owned(), port })
    }

    /// The path of the Unix socket, if it is one.
    pub fn socket_path(&self) -> Option<PathBuf> {
        self.host
            .starts_with('/')
            .then(|| PathBuf::from(format!("{}/.s.PGSQL.{}", self.host, self.port)))
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Address { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_what_they_write() {
        for text in ["db:5433", "10.0.0.1:5432", "[::1]:6432", "/run/postgresql:5432"] {
            assert_eq!(Address::read(text).unwrap().to_string(), text);
        }
        assert_eq!(Address::read("db").unwrap().port, 5432);
        assert_eq!(Address::read("::1").unwrap().host, "::1");
        assert_eq!(Address::read("db:0"), None);
        assert_eq!(Address::read("db:x"), None);
        let socket = Address::read("/run/postgresql:5433").unwrap().socket_path().unwrap();
        assert_eq!(socket, PathBuf::from("/run/postgresql/.s.PGSQL.5433"));
    }
}
