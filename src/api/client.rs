//! The blocking client of the commands: one request, one connection, one answer.
//!
//! The errors of the client say what is at the other end of the path: nobody, a daemon that
//! refuses, something that is no pollux, or a pollux of another version.

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use super::routes::observe::OBSERVER;
use super::types::ApiError;

/// How long a command waits for an answer. This must be longer than the server waits for the daemon
/// (`CALL_LIMIT`).
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// A second signal within this time counts as the first one. Ctrl-C and `timeout` signal a whole
/// process group, and a parent such as tshark passes the signal on.
const SAME_SIGNAL: Duration = Duration::from_secs(1);
/// Largest answer that is read, in bytes.
const MAX_ANSWER: usize = 64 << 20;
/// Longest line of a stream, in bytes.
const MAX_LINE: usize = 1 << 20;
/// In the daemon's `Server:` header the version follows this prefix.
const PRODUCT: &str = "pollux/";
const OURS: &str = env!("CARGO_PKG_VERSION");

/// Why there is no usable answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the path.
    #[error(
        "no pollux daemon answers on {path:?}; start one with: pollux run --port NAME,socket=PATH"
    )]
    NoDaemon {
        /// The socket.
        path: PathBuf,
    },
    /// The socket's mode or a directory above it denies access.
    #[error(
        "no permission to use the API socket {path:?}; be root, the daemon's user or a member of \
         the group given to it with --api-group"
    )]
    Denied {
        /// The socket.
        path: PathBuf,
    },
    /// The path cannot be the path of a unix socket.
    #[error("{path:?} cannot be the path of a unix socket: it takes 1 to 107 bytes without a zero")]
    BadPath {
        /// The path.
        path: PathBuf,
    },
    /// The peer accepts the connection and sends nothing.
    #[error("whatever listens on {path:?} gave no answer within {seconds} s")]
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long the client waited, in seconds.
        seconds: u64,
    },
    /// The peer answers, but is not a pollux daemon.
    #[error("whatever listens on {path:?} is not a pollux daemon: {what}")]
    NotPollux {
        /// The socket.
        path: PathBuf,
        /// What the peer did.
        what: &'static str,
    },
    /// The daemon is a pollux of another version, and does not understand this command or is not
    /// understood.
    #[error(
        "the daemon on {path:?} is pollux {theirs}, which does not understand this command of \
         pollux {OURS}; use the command of the daemon's version"
    )]
    OtherVersion {
        /// The socket.
        path: PathBuf,
        /// The daemon's version.
        theirs: String,
    },
    /// The daemon understood the request and refuses.
    #[error("{}", .error.message)]
    Refused {
        /// HTTP status.
        status: u16,
        /// The daemon's error.
        error: ApiError,
    },
    /// The peer closed the connection without an answer. A port's socket does so with HTTP.
    #[error(
        "whatever listens on {path:?} hung up without an answer: that is no API socket (a port's?), \
         or its daemon has just ended"
    )]
    HungUp {
        /// The socket.
        path: PathBuf,
    },
    /// The daemon ended the connection before the answer was complete.
    #[error("the daemon on {path:?} ended the connection before its answer was complete")]
    Cut {
        /// The socket.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot talk to {path:?}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// How a capture ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaptureEnd {
    /// The stream ended as a whole: the daemon ended it, or the receiver of the chunks told the
    /// client to stop.
    Whole,
    /// The daemon was asked to end the stream, but the rest of the stream did not come.
    BrokenOff,
}

/// A client of the daemon behind one socket.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
    limit: Duration,
}

/// A complete answer.
#[derive(Clone, Debug)]
pub struct Answer {
    path: PathBuf,
    theirs: String,
    bytes: Bytes,
}

impl Answer {
    /// Returns the body as JSON. Null if the body is empty.
    pub fn value(&self) -> Result<Value, ClientError> {
        if self.bytes.is_empty() {
            return Ok(Value::Null);
        }
        self.read()
    }

    /// Parses the body as a type of the API.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        serde_json::from_slice(&self.bytes).map_err(|_| not_understood(&self.path, &self.theirs))
    }
}

fn not_understood(path: &Path, theirs: &str) -> ClientError {
    if theirs == OURS {
        let what = "its answer is not what this version sends";
        return ClientError::NotPollux {
            path: path.into(),
            what,
        };
    }
    ClientError::OtherVersion {
        path: path.into(),
        theirs: theirs.into(),
    }
}

impl Client {
    /// A client of the daemon on `path`. It connects anew for each request.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Client {
            path: path.into(),
            limit: ANSWER_LIMIT,
        }
    }

    /// Returns a client that waits for `limit` for each answer.
    pub fn with_limit(self, limit: Duration) -> Self {
        Client { limit, ..self }
    }

    /// Sends a GET request.
    pub fn get(&self, target: &str) -> Result<Answer, ClientError> {
        self.request(Method::GET, target, Bytes::new())
    }

    /// Sends a DELETE request.
    pub fn delete(&self, target: &str) -> Result<Answer, ClientError> {
        self.request(Method::DELETE, target, Bytes::new())
    }

    /// Sends a POST request with `body` as JSON.
    pub fn post(&self, target: &str, body: &impl Serialize) -> Result<Answer, ClientError> {
        self.request(Method::POST, target, self.json(body)?)
    }

    /// Sends a PATCH request with `body` as JSON.
    pub fn patch(&self, target: &str, body: &impl Serialize) -> Result<Answer, ClientError> {
        self.request(Method::PATCH, target, self.json(body)?)
    }

    /// Reads a stream by GET. Calls `line` for each line, until `line` says to stop or the daemon
    /// ends the stream.
    pub fn stream_lines(
        &self,
        target: &str,
        mut line: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<(), ClientError> {
        self.block_on(async {
            let (_, response) = self.send(Method::GET, target, Bytes::new()).await?;
            let mut body = response.into_body();
            let mut pending = Vec::new();
            while let Some(frame) = body.frame().await {
                let Ok(data) = frame.map_err(|_| self.cut())?.into_data() else {
                    continue;
                };
                pending.extend_from_slice(&data);
                while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                    let whole: Vec<u8> = pending.drain(..=end).collect();
                    let text = String::from_utf8_lossy(&whole[..end]);
                    if line(&text).is_break() {
                        return Ok(());
                    }
                }
                if pending.len() > MAX_LINE {
                    return Err(self.not_pollux("a line without end"));
                }
            }
            Ok(())
        })
    }

    /// Reads a capture by GET. Calls `begun` with the name of the observer, then `chunk` for each
    /// chunk, until `chunk` says to stop or the daemon ends the stream. SIGINT or SIGTERM asks the
    /// daemon to end the stream, after everything captured until then. One more signal after a
    /// second breaks off. Once the daemon was asked, a missing end is no error.
    pub fn stream_bytes(
        &self,
        target: &str,
        begun: impl FnOnce(&str),
        mut chunk: impl FnMut(&[u8]) -> ControlFlow<()>,
    ) -> Result<CaptureEnd, ClientError> {
        self.block_on(async {
            let handler = |kind| signal(kind).map_err(|error| self.io(error));
            let mut interrupt = handler(SignalKind::interrupt())?;
            let mut terminate = handler(SignalKind::terminate())?;
            let (_, response) = self.send(Method::GET, target, Bytes::new()).await?;
            let name = response.headers().get(OBSERVER);
            let name = name.and_then(|name| name.to_str().ok()).unwrap_or_default();
            let name = name.to_string();
            begun(&name);
            let end = format!("/v1/observers/{name}");
            let (mut body, mut asked) = (response.into_body(), None::<Instant>);
            loop {
                let frame = tokio::select! {
                    frame = body.frame() => Some(frame),
                    _ = interrupt.recv() => None,
                    _ = terminate.recv() => None,
                };
                let Some(frame) = frame else {
                    if asked.is_some_and(|at| at.elapsed() > SAME_SIGNAL) {
                        return Ok(CaptureEnd::BrokenOff);
                    }
                    if asked.is_none() {
                        // Errors are ignored: the stream may have ended by itself. What it has
                        // written is still read.
                        let _ = self.send(Method::DELETE, &end, Bytes::new()).await;
                        asked = Some(Instant::now());
                    }
                    continue;
                };
                let data = match frame {
                    None => return Ok(CaptureEnd::Whole),
                    Some(Ok(frame)) => frame.into_data(),
                    Some(Err(_)) if asked.is_some() => return Ok(CaptureEnd::BrokenOff),
                    Some(Err(_)) => return Err(self.cut()),
                };
                if data.is_ok_and(|data| chunk(&data).is_break()) {
                    return Ok(CaptureEnd::Whole);
                }
            }
        })
    }

    fn json(&self, body: &impl Serialize) -> Result<Bytes, ClientError> {
        serde_json::to_vec(body)
            .map(Bytes::from)
            .map_err(|error| self.io(error.into()))
    }

    fn request(&self, method: Method, target: &str, body: Bytes) -> Result<Answer, ClientError> {
        self.block_on(async {
            let (theirs, response) = self.send(method, target, body).await?;
            let reading = Limited::new(response.into_body(), MAX_ANSWER).collect();
            let body = timeout(self.limit, reading)
                .await
                .map_err(|_| self.silent())?;
            Ok(Answer {
                path: self.path.clone(),
                theirs,
                bytes: body.map_err(|_| self.cut())?.to_bytes(),
            })
        })
    }

    /// Sends a request. Returns a success with its body unread. Any other status is an error.
    async fn send(
        &self,
        method: Method,
        target: &str,
        body: Bytes,
    ) -> Result<(String, Response<Incoming>), ClientError> {
        let response = timeout(self.limit, self.exchange(method, target, body))
            .await
            .map_err(|_| self.silent())??;
        let theirs = response
            .headers()
            .get(header::SERVER)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix(PRODUCT))
            .ok_or_else(|| self.not_pollux("another program answers"))?
            .to_string();
        let status = response.status();
        if status.is_success() {
            return Ok((theirs, response));
        }
        let reading = Limited::new(response.into_body(), MAX_ANSWER).collect();
        let body = timeout(self.limit, reading)
            .await
            .map_err(|_| self.silent())?;
        let body = body.map_err(|_| self.cut())?.to_bytes();
        let error: ApiError =
            serde_json::from_slice(&body).map_err(|_| not_understood(&self.path, &theirs))?;
        let no_route = matches!(error.code.as_str(), "no_such_route" | "method_not_allowed");
        if no_route && theirs != OURS {
            return Err(not_understood(&self.path, &theirs));
        }
        if status == StatusCode::FORBIDDEN {
            return Err(ClientError::Denied {
                path: self.path.clone(),
            });
        }
        Err(ClientError::Refused {
            status: status.as_u16(),
            error,
        })
    }

    async fn exchange(
        &self,
        method: Method,
        target: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|error| self.connect_error(error))?;
        let hung_up = || ClientError::HungUp {
            path: self.path.clone(),
        };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|_| hung_up())?;
        // Errors of the connection reach the client through the sender.
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(target)
            // HTTP/1.1 requires a host, and a unix socket has none.
            .header(header::HOST, "localhost")
            .header(
                header::USER_AGENT,
                concat!("pollux/", env!("CARGO_PKG_VERSION")),
            );
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request
            .body(Full::new(body))
            .map_err(|error| self.io(io::Error::other(error)))?;
        sender.send_request(request).await.map_err(|error| {
            if error.is_parse() || error.is_parse_too_large() {
                self.not_pollux("it does not speak HTTP")
            } else {
                hung_up()
            }
        })
    }

    fn block_on<T>(
        &self,
        future: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| self.io(error))?
            .block_on(future)
    }

    fn connect_error(&self, error: io::Error) -> ClientError {
        let path = self.path.clone();
        match error.kind() {
            io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::NotADirectory => ClientError::NoDaemon { path },
            io::ErrorKind::PermissionDenied => ClientError::Denied { path },
            io::ErrorKind::InvalidInput => ClientError::BadPath { path },
            _ => ClientError::Io {
                path,
                source: error,
            },
        }
    }

    fn io(&self, source: io::Error) -> ClientError {
        ClientError::Io {
            path: self.path.clone(),
            source,
        }
    }

    fn cut(&self) -> ClientError {
        ClientError::Cut {
            path: self.path.clone(),
        }
    }

    fn silent(&self) -> ClientError {
        ClientError::Silent {
            path: self.path.clone(),
            seconds: self.limit.as_secs(),
        }
    }

    fn not_pollux(&self, what: &'static str) -> ClientError {
        ClientError::NotPollux {
            path: self.path.clone(),
            what,
        }
    }
}
