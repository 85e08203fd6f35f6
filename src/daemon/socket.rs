//! A port's socket: listening (server mode) or connecting (client mode). No operation blocks
//! control.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, recv,
    shutdown, socket_with,
};
use rustix::time::Timespec;

use crate::api::ControlError;
use crate::config::PortSpec;
use crate::sys::listen::SocketFile;
use crate::sys::peer;

/// Most frontends that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Why a port's socket cannot be used. Each message names the path and what to do.
#[derive(Debug, thiserror::Error)]
pub(super) enum SocketError {
    /// A process listens on the path.
    #[error("{path:?} is in use: another process listens on it")]
    Live {
        /// The socket.
        path: PathBuf,
    },
    /// The path exists and is not a socket.
    #[error("{path:?} exists and is not a socket; remove it or choose another path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The directory is missing.
    #[error("directory {dir:?} does not exist; create it first")]
    NoDirectory {
        /// The directory.
        dir: PathBuf,
    },
    /// The group does not exist.
    #[error("group {group:?} does not exist (socket-group of {path:?})")]
    NoGroup {
        /// The group.
        group: String,
        /// The socket.
        path: PathBuf,
    },
    /// Another error of the system.
    #[error("cannot {what} {path:?}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl From<SocketError> for ControlError {
    /// Maps an obstacle or an exhausted limit to a conflict. Other system errors are internal
    /// errors.
    fn from(error: SocketError) -> ControlError {
        let text = error.to_string();
        match &error {
            SocketError::System { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::AddrInUse
                | io::ErrorKind::StorageFull
                | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::ReadOnlyFilesystem => ControlError::Conflict { text },
                _ => match Errno::from_io_error(source) {
                    Some(Errno::MFILE | Errno::NFILE) => ControlError::Conflict { text },
                    _ => ControlError::Internal(text),
                },
            },
            _ => ControlError::Conflict { text },
        }
    }
}

/// A listening socket. Its file is removed with it.
#[derive(Debug)]
pub(super) struct Listener {
    listener: UnixListener,
    _file: SocketFile,
}

impl Listener {
    /// Listens on the port's path. Replaces a stale socket file. Refuses a path on which a process
    /// listens.
    pub(super) fn bind(spec: &PortSpec) -> Result<Self, SocketError> {
        let path = &spec.socket;
        let group = match &spec.socket_group {
            Some(name) => Some(group_id(name, path)?),
            None => None,
        };
        clear_stale(path)?;
        let made = SocketFile::listen(path, spec.socket_mode, group, BACKLOG);
        let (file, listener) = made.map_err(|error| SocketError::System {
            what: error.what,
            path: path.clone(),
            source: error.source,
        })?;
        Ok(Listener {
            listener,
            _file: file,
        })
    }

    /// Stops new connections, and returns the frontends that wait. (Some stay in the socket if no
    /// descriptor is left.)
    pub(super) fn end(&self) -> impl Iterator<Item = UnixStream> {
        // The shutdown cannot fail for a listening socket.
        let _ = shutdown(&self.listener, Shutdown::Both);
        std::iter::from_fn(|| self.accept().ok().flatten())
    }

    /// Returns the socket for another thread to close, because frontends may still wait in it.
    /// Removes its file.
    pub(super) fn into_socket(self) -> UnixListener {
        self.listener
    }

    /// Returns the next frontend that waits, if any. After an error the frontend still waits. The
    /// usual error is that no descriptor is left.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(Some(stream));
                }
                // The frontend has disconnected again.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl std::os::fd::AsRawFd for Listener {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.listener.as_raw_fd()
    }
}

fn group_id(name: &str, path: &Path) -> Result<u32, SocketError> {
    let path = path.to_path_buf();
    match peer::group_id(name) {
        Ok(Some(id)) => Ok(id),
        Ok(None) => Err(SocketError::NoGroup {
            group: name.to_string(),
            path,
        }),
        Err(source) => Err(SocketError::System {
            what: "look up the group of",
            path,
            source,
        }),
    }
}

/// Removes a socket file on which nobody listens. Returns an error if the path is in use otherwise.
fn clear_stale(path: &Path) -> Result<(), SocketError> {
    let data = match std::fs::symlink_metadata(path) {
        Ok(data) => data,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
            return match dir {
                Some(dir) if !dir.is_dir() => Err(SocketError::NoDirectory {
                    dir: dir.to_path_buf(),
                }),
                _ => Ok(()),
            };
        }
        // A component of the path is not a directory, or may not be searched.
        Err(source) => {
            return Err(SocketError::System {
                what: "look at",
                path: path.to_path_buf(),
                source,
            });
        }
    };
    let path_buf = path.to_path_buf();
    // A symbolic link is not followed: anyone who may write the directory could point it anywhere.
    if !data.file_type().is_socket() {
        return Err(SocketError::NotASocket { path: path_buf });
    }
    let failed = |what| {
        let path = path_buf.clone();
        move |source| SocketError::System { what, path, source }
    };
    match start_connect(path).map_err(|error| (error.kind(), error)) {
        // Connection refused: nobody listens.
        Err((io::ErrorKind::ConnectionRefused, _)) => {
            std::fs::remove_file(path).map_err(failed("remove the stale socket"))
        }
        Ok(_) | Err((io::ErrorKind::WouldBlock, _)) => Err(SocketError::Live { path: path_buf }),
        // Somebody may listen. The connection may be forbidden, no descriptor may be left, or the
        // socket has another type.
        Err((_, error)) => Err(failed("look who listens on")(error)),
    }
}

/// Connects without waiting. A listener with a full backlog (a stopped VM) gives an error like any
/// other failure.
pub(super) fn start_connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Whether the peer has sent an HTTP request: its client mistook a port's socket for the API
/// socket.
pub(super) fn is_api_client(stream: &UnixStream) -> bool {
    let mut start = [0; 4];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let methods = [b"GET ", b"POST", b"PATC", b"DELE"];
    recv(stream, &mut start, flags).is_ok() && methods.contains(&&start)
}

/// Whether the peer of a stream has hung up.
pub(super) fn hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let gone = PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR;
    matches!(poll(&mut fds, Some(&now)), Ok(1)) && fds[0].revents().intersects(gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(path: &Path) -> PortSpec {
        format!("p,socket={}", path.display()).parse().unwrap()
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let first = Listener::bind(&spec(&path)).unwrap();
        let error = Listener::bind(&spec(&path)).unwrap_err();
        assert!(matches!(error, SocketError::Live { .. }), "{error}");
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_in_the_way_and_a_missing_directory_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "mine").unwrap();
        assert!(matches!(
            Listener::bind(&spec(&file)),
            Err(SocketError::NotASocket { .. })
        ));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
        let missing = dir.path().join("no/s");
        assert!(matches!(
            Listener::bind(&spec(&missing)),
            Err(SocketError::NoDirectory { .. })
        ));
    }

    #[test]
    fn frontends_that_wait_when_a_listener_ends_are_handed_out_and_no_more_come() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&spec(&path)).unwrap();
        let waiting = [(); 3].map(|()| UnixStream::connect(&path).unwrap());
        let mut handed_out = listener.end();
        for stream in &waiting {
            assert!(!hung_up(stream));
            drop(handed_out.next().unwrap());
            assert!(hung_up(stream));
        }
        let late = UnixStream::connect(&path).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::ConnectionRefused);
        assert!(handed_out.next().is_none());
    }

    #[test]
    fn a_hang_up_is_seen() {
        let (a, b) = UnixStream::pair().unwrap();
        assert!(!hung_up(&a));
        drop(b);
        assert!(hung_up(&a));
    }
}
