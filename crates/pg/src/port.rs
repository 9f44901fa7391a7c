//! A TCP port that is kept for a server that is started later.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicU16, Ordering};

use socket2::{Domain, Socket, Type};

/// Below the range that the system gives outgoing connections (`net.ipv4.ip_local_port_range`), so that none of them
/// takes it.
const FIRST: u16 = 16_384;
const COUNT: u16 = 16_000;

/// A port of 127.0.0.1 that no other `Port` has, in whichever process, and that nobody listened on when it was taken.
///
/// It is bound and not listened on. Linux lets a second socket be bound beside it where both have `SO_REUSEADDR`, which
/// servers set before they bind (PostgreSQL: `StreamServerPort` in `src/backend/libpq/pqcomm.c`); whoever looks for a
/// port here binds without it, and is refused.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _bound: Socket,
}

impl Port {
    /// The next that is free. The error is that of the last one tried.
    pub fn reserve() -> io::Result<Port> {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        // Processes that look together begin apart, so that few meet.
        let begin = (std::process::id() % u32::from(COUNT)).wrapping_mul(97);
        let mut last = None;
        for _ in 0..COUNT {
            let next = begin + u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
            let number = FIRST + u16::try_from(next % u32::from(COUNT)).unwrap_or(0);
            match Port::bind(number) {
                Ok(port) => return Ok(port),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()))
    }

    fn bind(number: u16) -> io::Result<Port> {
        let bound = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        bound.bind(&SocketAddrV4::new(Ipv4Addr::LOCALHOST, number).into())?;
        bound.set_reuse_address(true)?;
        Ok(Port { number, _bound: bound })
    }

    pub fn number(&self) -> u16 {
        self.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_kept_from_others_and_not_from_its_server() {
        let port = Port::reserve().unwrap();
        assert!(Port::bind(port.number()).is_err());
        let server = std::net::TcpListener::bind(("127.0.0.1", port.number())).unwrap();
        assert!(Port::bind(port.number()).is_err());
        std::net::TcpStream::connect(("127.0.0.1", port.number())).unwrap();
        drop(server);
        // A server that is started again finds it as it was.
        std::net::TcpListener::bind(("127.0.0.1", port.number())).unwrap();
    }
}
