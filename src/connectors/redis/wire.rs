//! One connection: RESP2 over TCP, TLS or a Unix socket.
//!
//! Calls are encoded straight from Arrow into the bytes to send, and no task runs beside the caller, which is why
//! this is not the driver's own connection. Every wait has a limit. After any error the connection must be dropped:
//! a reply may still be on its way.

use std::io;
use std::time::Duration;

use redis::ConnectionAddr;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::encode::command;
use super::fault::Fault;
use super::tls::{self, TlsConnector};

/// For name look-up, connection and log-in together.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For one reply, and for handing one call to the network. A script that took longer may still run.
pub(super) const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

const READ_CHUNK: usize = 16 * 1024;
/// Redis' own limit for one string.
const MAX_BULK: usize = 512 * 1024 * 1024;
const MAX_DEPTH: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    Status(String),
    /// An error from the server; begins with its code in capitals.
    Error(String),
    Integer(i64),
    Bulk(Vec<u8>),
    Null,
    Array(Vec<Reply>),
}

impl Reply {
    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Status(text) => Some(text),
            Self::Bulk(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send + Sync {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync> Stream for T {}

/// Where to connect and as whom. Has no `Debug`, as the password is in it.
pub(crate) struct Address {
    pub(super) addr: ConnectionAddr,
    pub(super) user: Option<String>,
    pub(super) password: Option<String>,
    pub(super) database: i64,
    /// Of a `rediss://` address.
    pub(super) tls: Option<TlsConnector>,
}

pub(super) struct Wire {
    /// The server is a node of a cluster: it holds some slots only.
    pub(super) clustered: bool,
    stream: Box<dyn Stream>,
    received: Vec<u8>,
    /// How much of `received` has been parsed.
    parsed: usize,
}

impl Wire {
    /// Connects and logs in.
    ///
    /// # Errors
    /// `PermissionDenied` when the server refuses the user, password or database; `ResourceBusy` when it is not ready; `TimedOut`; what [`tls::fault`] knows; any other kind from the network.
    pub(super) async fn connect(address: &Address) -> io::Result<Self> {
        within(CONNECT_TIMEOUT, "connecting", async {
            let stream: Box<dyn Stream> = match (&address.addr, &address.tls) {
                (ConnectionAddr::Tcp(host, port), None) => Box::new(tcp(host, *port).await?),
                (ConnectionAddr::Tcp(host, port), Some(connector)) => {
                    Box::new(tls::connect(connector, host, tcp(host, *port).await?).await?)
                }
                #[cfg(unix)]
                (ConnectionAddr::Unix(path), None) => Box::new(tokio::net::UnixStream::connect(path).await?),
                _ => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidInput,
                        "this kind of address is not supported",
                    ));
                }
            };
            let mut wire = Self { clustered: false, stream, received: Vec::new(), parsed: 0 };
            wire.log_in(address).await?;
            Ok(wire)
        })
        .await
    }

    async fn log_in(&mut self, address: &Address) -> io::Result<()> {
        let mut commands: Vec<Vec<String>> = Vec::new();
        if let Some(password) = &address.password {
            let mut auth = vec!["AUTH".to_owned()];
            auth.extend(address.user.clone());
            auth.push(password.clone());
            commands.push(auth);
        }
        if address.database != 0 {
            commands.push(vec!["SELECT".to_owned(), address.database.to_string()]);
        }
        commands.push(vec!["PING".to_owned()]);
        for words in commands {
            if let Reply::Error(error) = self.ask(&words).await? {
                let kind = match Fault::of(&error).lasts_at_log_in() {
                    true => io::ErrorKind::PermissionDenied,
                    false => io::ErrorKind::ResourceBusy,
                };
                return Err(io::Error::new(kind, error));
            }
        }
        // Every user may ask. Servers before Redis 6 do not know the command; their clusters answer MOVED later.
        let Reply::Array(facts) = self.ask(&["HELLO"]).await? else { return Ok(()) };
        let mode = facts.chunks_exact(2).find(|fact| fact[0].text() == Some("mode"));
        self.clustered = mode.and_then(|fact| fact[1].text()) == Some("cluster");
        Ok(())
    }

    /// One command, one reply.
    pub(super) async fn ask<A: AsRef<[u8]>>(&mut self, arguments: &[A]) -> io::Result<Reply> {
        let mut bytes = Vec::new();
        command(&mut bytes, arguments);
        self.send(&bytes).await?;
        self.reply().await
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        // TLS keeps what it could not hand to the network at once.
        let all = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        within(RESPONSE_TIMEOUT, "sending", all).await
    }

    pub(super) async fn reply(&mut self) -> io::Result<Reply> {
        within(RESPONSE_TIMEOUT, "waiting for a reply", async {
            loop {
                if let Some((reply, length)) = parse(&self.received[self.parsed..], 0)? {
                    self.parsed += length;
                    if self.parsed == self.received.len() {
                        self.received.clear();
                        self.parsed = 0;
                    }
                    return Ok(reply);
                }
                self.received.drain(..self.parsed);
                self.parsed = 0;
                self.received.reserve(READ_CHUNK.max(self.received.len()));
                if self.stream.read_buf(&mut self.received).await? == 0 {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the server closed the connection",
                    ));
                }
            }
        })
        .await
    }
}

async fn tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn within<T>(limit: Duration, doing: &str, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => {
            let text = format!("{doing} took more than {} s", limit.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        }
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the server does not speak the Redis protocol")
}

/// The first reply in `bytes` and its length; `None` when it is not complete.
fn parse(bytes: &[u8], depth: usize) -> io::Result<Option<(Reply, usize)>> {
    let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") else { return Ok(None) };
    let line = std::str::from_utf8(&bytes[1..end.max(1)]).map_err(|_| malformed())?;
    let body = end + 2;
    let reply = match bytes[0] {
        b'+' => Reply::Status(line.to_owned()),
        b'-' => Reply::Error(line.to_owned()),
        b':' => Reply::Integer(line.parse().map_err(|_| malformed())?),
        b'$' if line == "-1" => Reply::Null,
        b'*' if line == "-1" => Reply::Null,
        b'$' => {
            let length: usize = line.parse().map_err(|_| malformed())?;
            if length > MAX_BULK {
                return Err(malformed());
            }
            let Some(content) = bytes.get(body..body + length + 2) else { return Ok(None) };
            return Ok(Some((Reply::Bulk(content[..length].to_vec()), body + length + 2)));
        }
        b'*' if depth < MAX_DEPTH => {
            let count: usize = line.parse().map_err(|_| malformed())?;
            let (mut items, mut at) = (Vec::new(), body);
            for _ in 0..count {
                let Some((item, length)) = parse(&bytes[at..], depth + 1)? else { return Ok(None) };
                items.push(item);
                at += length;
            }
            return Ok(Some((Reply::Array(items), at)));
        }
        _ => return Err(malformed()),
    };
    Ok(Some((reply, body)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_parse_whole_and_never_early() {
        let bytes = b"*5\r\n$3\r\na\r\n\r\n:-7\r\n$-1\r\n+OK\r\n*1\r\n-ERR no\r\n";
        let expected = Reply::Array(vec![
            Reply::Bulk(b"a\r\n".to_vec()),
            Reply::Integer(-7),
            Reply::Null,
            Reply::Status("OK".into()),
            Reply::Array(vec![Reply::Error("ERR no".into())]),
        ]);
        for cut in 0..bytes.len() {
            assert_eq!(parse(&bytes[..cut], 0).unwrap(), None, "cut at {cut}");
        }
        assert_eq!(parse(bytes, 0).unwrap(), Some((expected, bytes.len())));
        assert!(parse(b"HTTP/1.1 400\r\n", 0).is_err());
    }
}
