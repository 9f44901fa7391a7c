//! Tells an HAProxy something by its runtime API (its management guide, "Unix Socket commands").

use std::time::Duration;

use model::plan::run::Outcome;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::{SAID_LEN_MAX, said};

/// `address` is a socket's path, or host and port. One command is sent; no answer but an empty one says that it was done.
pub(super) async fn tell(address: &str, command: &str, limit: Duration) -> Outcome {
    let talk = async {
        let failed = |error: std::io::Error| {
            Outcome::NotDone(format!("`{address}` cannot be reached: {error}"))
        };
        match address.starts_with('/') {
            true => match UnixStream::connect(address).await {
                Ok(stream) => say(stream, address, command).await,
                Err(error) => failed(error),
            },
            false => match TcpStream::connect(address).await {
                Ok(stream) => say(stream, address, command).await,
                Err(error) => failed(error),
            },
        }
    };
    let late = |_| Outcome::Unknown(format!("`{address}` has not answered within {limit:?}"));
    timeout(limit, talk).await.unwrap_or_else(late)
}

async fn say(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    address: &str,
    command: &str,
) -> Outcome {
    let lost = |error: std::io::Error| Outcome::Unknown(format!("`{address}`: {error}"));
    if let Err(error) = stream.write_all(format!("{command}\n").as_bytes()).await {
        return lost(error);
    }
    let mut answer = Vec::new();
    let limit = u64::try_from(SAID_LEN_MAX * 4).unwrap_or(u64::MAX);
    // It closes after one command.
    if let Err(error) = (&mut stream).take(limit).read_to_end(&mut answer).await {
        return lost(error);
    }
    let answer = String::from_utf8_lossy(&answer);
    match answer.trim() {
        "" => Outcome::Done(String::new()),
        answer => Outcome::Failed(said(answer)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever answers so, once.
    fn answers(text: &'static str) -> String {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            use std::io::{Read, Write};
            let (mut stream, _) = listener.accept().unwrap();
            let mut command = [0; 100];
            let len = stream.read(&mut command).unwrap();
            assert_eq!(&command[..len], b"set server be/a state maint\n");
            stream.write_all(text.as_bytes()).unwrap();
        });
        address
    }

    #[tokio::test]
    async fn only_silence_says_that_it_was_done() {
        let command = "set server be/a state maint";
        let limit = Duration::from_secs(30);
        assert_eq!(tell(&answers("\n"), command, limit).await, Outcome::Done(String::new()));
        let failed = tell(&answers("No such server.\n\n"), command, limit).await;
        assert_eq!(failed, Outcome::Failed("No such server.".into()));
        let missing = tell("/no/such/socket", command, limit).await;
        assert!(matches!(missing, Outcome::NotDone(_)), "{missing:?}");
    }
}
