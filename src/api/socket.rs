//! The API's listening socket. It is taken only if nobody answers on it, and its file is never left
//! behind.
//!
//! A lock file beside the socket decides between two daemons that start at the same moment. Under
//! the lock, a socket that refuses connections is stale and is replaced. If a socket accepts, the
//! new daemon fails and names the path.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::server::ServerError;
use crate::config::MAX_SOCKET_PATH;
use crate::sys::listen::SocketFile;

const SOCKET_MODE: u32 = 0o660;
const DIRECTORY_MODE: u32 = 0o750;
/// Connections that the kernel queues before `connect` fails. The server also takes connections
/// beyond its limit, to refuse them.
const BACKLOG: i32 = 64;

/// A bound, listening socket file. Drop removes the file.
#[derive(Debug)]
pub(super) struct ApiSocket {
    /// Removed before the lock file.
    file: Option<SocketFile>,
    lock_path: PathBuf,
    // Held while this process owns the socket.
    _lock: File,
}

impl ApiSocket {
    /// Takes `path` for this process. Returns an error if it is in use.
    pub(super) fn bind(
        path: &Path,
        group: Option<u32>,
    ) -> Result<(ApiSocket, UnixListener), ServerError> {
        let bytes = path.as_os_str().as_encoded_bytes();
        if bytes.is_empty() || bytes.contains(&0) || bytes.len() > MAX_SOCKET_PATH {
            return Err(ServerError::Path {
                path: path.into(),
                len: bytes.len(),
            });
        }
        let bind_error = |source| ServerError::Bind {
            path: path.into(),
            source,
        };
        make_parent(path, group, default_socket().as_deref())?;
        let mut lock_path = OsString::from(path);
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);
        let lock = lock(&lock_path).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => ServerError::Live { path: path.into() },
            _ => bind_error(source),
        })?;
        let made = replace_stale(path).and_then(|()| {
            SocketFile::listen(path, Some(SOCKET_MODE), group, BACKLOG)
                .map_err(|error| bind_error(error.source))
        });
        let (file, listener) = made.inspect_err(|_| {
            let _ = fs::remove_file(&lock_path);
        })?;
        let socket = ApiSocket {
            file: Some(file),
            lock_path,
            _lock: lock,
        };
        Ok((socket, listener))
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        drop(self.file.take());
        // The lock is still held. A daemon that waits for it notices the missing file and retries.
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// Returns the default path of the API socket: under `/run` for root, under the runtime directory
/// for other users. `None` if that directory is not known.
pub fn default_socket() -> Option<PathBuf> {
    let directory = if rustix::process::geteuid().is_root() {
        PathBuf::from("/run")
    } else {
        PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty())?)
    };
    Some(directory.join("pollux/api.sock"))
}

/// Creates the directory of the default path if it is missing. Other directories are not created,
/// as with ports: a typo in a name is an error and does not create a directory.
fn make_parent(path: &Path, group: Option<u32>, default: Option<&Path>) -> Result<(), ServerError> {
    let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) else {
        return Ok(());
    };
    match fs::metadata(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // For any other problem, binding the socket reports the error.
        _ => return Ok(()),
    }
    if default != Some(path) {
        return Err(ServerError::NoDirectory { dir: parent.into() });
    }
    let made = DirBuilder::new().mode(DIRECTORY_MODE).create(parent);
    // Without this, members of the group could not reach the socket inside the directory.
    let made = made.and_then(|()| match group {
        Some(_) => chown(parent, None, group),
        None => Ok(()),
    });
    made.map_err(|source| ServerError::Bind {
        path: path.into(),
        source,
    })
}

/// Locks `path`. Fails with `WouldBlock` while another process holds the lock.
fn lock(path: &Path) -> io::Result<File> {
    loop {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        // The previous holder may have removed the file between our open and our lock. Nobody else
        // would see such a lock, so this case retries.
        let opened = file.metadata()?;
        match fs::metadata(path) {
            Ok(named) if (named.dev(), named.ino()) == (opened.dev(), opened.ino()) => {
                return Ok(file);
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
}

fn replace_stale(path: &Path) -> Result<(), ServerError> {
    let bind_error = |source| ServerError::Bind {
        path: path.into(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(bind_error(error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(ServerError::NotASocket { path: path.into() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(bind_error)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(bind_error(error)),
        // The socket accepts, has a full backlog, or has another type: it is in use.
        _ => Err(ServerError::InUse { path: path.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_the_default_directory_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let default = dir.path().join("pollux/api.sock");
        let typo = dir.path().join("polux/api.sock");
        let error = make_parent(&typo, None, Some(&default)).unwrap_err();
        assert!(matches!(error, ServerError::NoDirectory { .. }), "{error}");
        assert!(make_parent(&typo, None, None).is_err());
        make_parent(&default, None, Some(&default)).unwrap();
        let made = default.parent().unwrap();
        let mode = fs::metadata(made).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, DIRECTORY_MODE);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        // A missing parent of that directory is not created.
        let deep = dir.path().join("no/pollux/api.sock");
        let error = make_parent(&deep, None, Some(&deep)).unwrap_err();
        assert!(matches!(error, ServerError::Bind { .. }), "{error}");
    }
}
