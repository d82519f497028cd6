//! A client of HTTP/1.1 that does as little as possible, so that it takes little from the servers beside it.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream as BlockingStream};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The most that an answer takes.
const ANSWER_BYTES: usize = 16 << 10;

/// The time limit of a request outside of the load.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Returns the bytes of a request.
pub fn request(method: &str, path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    let head = "host: 127.0.0.1\r\ncontent-type: application/json";
    format!("{method} {path} HTTP/1.1\r\n{head}\r\ncontent-length: {length}\r\n\r\n{body}").into_bytes()
}

/// A connection that is kept open.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    pub async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            buffer: vec![0; ANSWER_BYTES],
        })
    }

    /// Sends a request and reads its answer. Returns the status.
    pub async fn ask(&mut self, request: &[u8]) -> io::Result<u16> {
        self.stream.write_all(request).await?;
        let mut length = 0;
        loop {
            let read = self.stream.read(&mut self.buffer[length..]).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            length += read;
            if let Some(answer) = Answer::parse(&self.buffer[..length])? {
                return Ok(answer.status);
            }
        }
    }
}

/// Sends a request on a connection of its own. Returns the status and the body.
pub fn ask_once(address: SocketAddr, request: &[u8]) -> io::Result<(u16, String)> {
    let mut stream = BlockingStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(request)?;
    let mut bytes = Vec::new();
    let mut piece = vec![0; ANSWER_BYTES];
    loop {
        let read = stream.read(&mut piece)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(&piece[..read]);
        if let Some(answer) = Answer::parse(&bytes)? {
            return Ok((answer.status, String::from_utf8_lossy(answer.body).into_owned()));
        }
    }
}

/// A complete answer.
struct Answer<'a> {
    status: u16,
    body: &'a [u8],
}

impl<'a> Answer<'a> {
    /// Returns the answer, or `None` if it is not complete.
    fn parse(bytes: &'a [u8]) -> io::Result<Option<Self>> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
            return Ok(None);
        };
        let head = std::str::from_utf8(&bytes[..end]).map_err(|_| invalid())?;
        let status = head.get(9..12).and_then(|status| status.parse().ok());
        let lengths = head.lines().filter_map(|line| line.split_once(':'));
        let mut lengths = lengths.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        let length = lengths.next().and_then(|(_, length)| length.trim().parse().ok());
        let (Some(status), Some(length)) = (status, length) else {
            return Err(invalid());
        };
        let body = bytes[end + 4..].get(..length);
        Ok(body.map(|body| Self { status, body }))
    }
}
