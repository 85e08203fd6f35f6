//! HTTP on a unix socket, on a thread of its own.
//!
//! One thread runs all connections. Each call into [`Control`] and each endless answer blocks, so
//! each has a thread of its own. Their number is bounded. If the system has no thread for a
//! request, the answer is 503. Access is checked twice: by the socket file's mode and group, and by
//! the peer's credentials on connect. Every connection carries one request. Its head and body are
//! limited in size and time, unread answers in time, and connections in number. So a client can at
//! worst use up the API, never the switch.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::conn::{Patience, WriteDeadline};
use super::routes;
use super::socket::ApiSocket;
use super::{Control, types::ApiError};
use crate::config::MAX_SOCKET_PATH;
use crate::sys::peer;
use crate::sys::thread::spawn;

/// Most connections served at once. Further connections are answered with 503.
pub const MAX_CONNECTIONS: usize = 64;
/// Most headers of a request.
const MAX_HEADERS: usize = 64;
/// Most bytes of a request's head.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Longest time in which a client may send the head of its request.
const HEAD_LIMIT: Duration = Duration::from_secs(5);
/// Longest time for which a client may leave an answer unread.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// Longest time for which requests may continue after a stop.
const STOP_LIMIT: Duration = Duration::from_secs(1);
/// Most connections at once that are being told of their refusal.
const MAX_REFUSALS: usize = 16;
/// Longest time in which a refused client may read the reason.
const REFUSAL_LIMIT: Duration = Duration::from_millis(500);

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The path cannot be the path of a unix socket.
    #[error(
        "API socket {path:?} is {len} bytes long, a unix socket takes 1 to {MAX_SOCKET_PATH} bytes \
         without a zero; give another with --api-socket"
    )]
    Path {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Another pollux answers on the path.
    #[error("another pollux answers on {path:?}; stop it, or give this one another --api-socket")]
    Live {
        /// The path.
        path: PathBuf,
    },
    /// Another process listens on the path, and is not known to be a pollux.
    #[error("another process listens on {path:?}; stop it, or give this one another --api-socket")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The directory is missing.
    #[error("directory {dir:?} of the API socket does not exist; create it first")]
    NoDirectory {
        /// The directory.
        dir: PathBuf,
    },
    /// The path exists and is not a socket.
    #[error("{path:?} exists and is not a socket; remove it, or give another --api-socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The group does not exist.
    #[error("group {0:?} of --api-group does not exist on this system")]
    Group(String),
    /// The group database cannot be read.
    #[error("cannot look up group {group:?}")]
    GroupLookup {
        /// The group.
        group: String,
        /// Why.
        source: io::Error,
    },
    /// The socket cannot be created.
    #[error("cannot listen on API socket {path:?}")]
    Bind {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The thread or its event loop cannot be created.
    #[error("cannot start the API thread")]
    Thread(#[source] io::Error),
}

/// The running API server. Drop stops it.
#[derive(Debug)]
pub struct Server {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    socket: Option<ApiSocket>,
}

impl Server {
    /// Serves `control` on `path` to root, this process's own user and members of `group`.
    pub fn start(
        path: &Path,
        group: Option<&str>,
        control: Arc<dyn Control>,
    ) -> Result<Server, ServerError> {
        let group = group.map(find_group).transpose()?;
        let (socket, listener) = ApiSocket::bind(path, group)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ServerError::Thread)?;
        let (stop, stopped) = watch::channel(false);
        let admission = Admission {
            own: rustix::process::geteuid().as_raw(),
            group,
        };
        let router = routes::router(control, stopped.clone());
        let thread = spawn("api", move || {
            run(runtime, listener, router, admission, stopped);
        })
        .map_err(ServerError::Thread)?;
        Ok(Server {
            stop,
            thread: Some(thread),
            socket: Some(socket),
        })
    }

    /// Ends event streams, lets running requests finish for at most `STOP_LIMIT`, and removes the
    /// socket.
    pub fn stop(mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        // The socket goes first, so that nobody connects to a daemon that no longer answers.
        drop(self.socket.take());
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.finish();
    }
}

fn find_group(name: &str) -> Result<u32, ServerError> {
    peer::group_id(name)
        .map_err(|source| ServerError::GroupLookup {
            group: name.to_string(),
            source,
        })?
        .ok_or_else(|| ServerError::Group(name.to_string()))
}

/// The users that may use the API.
#[derive(Clone, Copy, Debug)]
struct Admission {
    own: u32,
    group: Option<u32>,
}

impl Admission {
    fn admits(&self, uid: u32, gid: u32, groups: impl FnOnce() -> Vec<u32>) -> bool {
        uid == 0
            || uid == self.own
            || self
                .group
                .is_some_and(|group| gid == group || groups().contains(&group))
    }

    fn admits_peer(&self, stream: &UnixStream) -> bool {
        let Ok(peer) = stream.peer_cred() else {
            return false;
        };
        // If the peer's groups cannot be read, only its uid and gid count.
        self.admits(peer.uid(), peer.gid(), || {
            peer::supplementary_groups(stream.as_fd()).unwrap_or_default()
        })
    }
}

fn run(
    runtime: Runtime,
    listener: StdListener,
    router: Router,
    admission: Admission,
    stopped: watch::Receiver<bool>,
) {
    // A call that hangs in control does not delay the stop, because nobody waits for its thread.
    runtime.block_on(async move {
        match UnixListener::from_std(listener) {
            Ok(listener) => serve(listener, router, admission, stopped).await,
            Err(error) => tracing::error!(%error, "the API socket cannot be polled"),
        }
    });
}

async fn serve(
    listener: UnixListener,
    router: Router,
    admission: Admission,
    mut stopped: watch::Receiver<bool>,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let refusals = Arc::new(Semaphore::new(MAX_REFUSALS));
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = tasks.join_next() => continue,
            _ = stopped.changed() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // One cause is a lack of descriptors. The listener then stays readable, so a pause
                // avoids a busy loop.
                tracing::warn!(%error, "an API connection cannot be accepted");
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let refusal = if admission.admits_peer(&stream) {
            match slots.clone().try_acquire_owned() {
                Ok(slot) => {
                    tasks.spawn(connection(stream, router.clone(), slot, stopped.clone()));
                    continue;
                }
                Err(_) => Refusal::Busy,
            }
        } else {
            Refusal::Forbidden
        };
        // Beyond `MAX_REFUSALS`, connections are closed without an answer.
        if let Ok(slot) = refusals.clone().try_acquire_owned() {
            tasks.spawn(refuse(stream, refusal, slot));
        }
    }
    drop(listener);
    let _ = timeout(STOP_LIMIT, async {
        while tasks.join_next().await.is_some() {}
    })
    .await;
}

async fn connection(
    stream: UnixStream,
    router: Router,
    _slot: OwnedSemaphorePermit,
    mut stopped: watch::Receiver<bool>,
) {
    let patience = Patience::default();
    let router = router.layer(Extension(patience.clone()));
    let io = TokioIo::new(WriteDeadline::new(stream, WRITE_LIMIT, patience));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        // One request for each connection. An idle connection would hold a slot.
        .keep_alive(false)
        .serve_connection(io, TowerToHyperService::new(router));
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        _ = stopped.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "an API connection ended early");
    }
}

#[derive(Clone, Copy, Debug)]
enum Refusal {
    Forbidden,
    Busy,
}

/// Answers without parsing the request, and waits until the client has read the answer.
async fn refuse(mut stream: UnixStream, refusal: Refusal, _slot: OwnedSemaphorePermit) {
    let (status, error) = match refusal {
        Refusal::Forbidden => (
            "403 Forbidden",
            ApiError {
                code: "forbidden".into(),
                message: "this user may not use the API".into(),
                hint: Some(
                    "be root, the daemon's user or a member of the group given with --api-group"
                        .into(),
                ),
            },
        ),
        Refusal::Busy => (
            "503 Service Unavailable",
            ApiError {
                code: "busy".into(),
                message: format!("{MAX_CONNECTIONS} API connections are open already"),
                hint: Some("close some, event streams among them, and try again".into()),
            },
        ),
    };
    let body = serde_json::to_string(&error).unwrap_or_default();
    let answer = format!(
        "HTTP/1.1 {status}\r\nserver: {}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        routes::SERVER,
        body.len()
    );
    let _ = timeout(REFUSAL_LIMIT, async {
        // A client that gets an answer before it has sent its request sees a connection error.
        let _ = timeout(REFUSAL_LIMIT / 2, stream.readable()).await;
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        let mut rest = [0u8; 1024];
        while stream.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_the_own_user_and_the_group_are_admitted_and_nobody_else() {
        let with_group = Admission {
            own: 1000,
            group: Some(50),
        };
        let none = Vec::new;
        assert!(with_group.admits(0, 0, none));
        assert!(with_group.admits(1000, 1000, none));
        assert!(with_group.admits(2000, 50, none));
        assert!(with_group.admits(2000, 2000, || vec![7, 50]));
        assert!(!with_group.admits(2000, 2000, || vec![7]));
        let without = Admission {
            own: 1000,
            group: None,
        };
        assert!(!without.admits(2000, 0, || vec![0]));
    }
}
