//! Why attaching to a backend failed, in sentences that say what to do.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::WireError;
use crate::virtio::features::Unmet;

/// Why a frontend could not attach.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No such file.
    #[error("{0}: there is no such socket; is the backend running, and is the path the same?")]
    Missing(PathBuf),
    /// The file is there, and nobody listens.
    #[error("{0}: nobody listens on this socket; a backend that has ended may have left it behind")]
    Refused(PathBuf),
    /// Something else than a socket.
    #[error("{0}: this is no socket; --attach takes the paths that the backend listens on")]
    NoSocket(PathBuf),
    /// Connecting or listening failed otherwise.
    #[error("{path}: cannot use this socket")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// In server mode, nobody came.
    #[error("{path}: no backend connected within {seconds} s")]
    NobodyCame {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// The conversation failed.
    #[error("{path}: cannot talk vhost-user with the backend")]
    Wire {
        /// The socket.
        path: PathBuf,
        /// What went wrong.
        source: WireError,
    },
    /// The backend does not offer what was asked for.
    #[error("{path}: the backend does not offer {name}")]
    FeatureMissing {
        /// The socket.
        path: PathBuf,
        /// The feature, and the option that avoids it.
        name: &'static str,
    },
    /// The backend offers what it must not.
    #[error("{path}: the backend offers {unmet}; a guest's driver refuses such a card")]
    ImpossibleOffer {
        /// The socket.
        path: PathBuf,
        /// The feature, and what is missing.
        unmet: Unmet,
    },
    /// The backend has fewer queue pairs.
    #[error("{path}: the backend has {offered} queue pairs, {wanted} are wanted (--queues)")]
    TooFewQueues {
        /// The socket.
        path: PathBuf,
        /// As answered to GET_QUEUE_NUM.
        offered: u64,
        /// As asked for.
        wanted: u64,
    },
}

impl AttachError {
    /// Why `path` could not be connected to.
    pub(super) fn connecting(path: &Path, source: io::Error) -> Self {
        let file = std::fs::metadata(path);
        let is_socket = file.is_ok_and(|file| file.file_type().is_socket());
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::NotFound => AttachError::Missing(path),
            io::ErrorKind::ConnectionRefused if is_socket => AttachError::Refused(path),
            io::ErrorKind::ConnectionRefused => AttachError::NoSocket(path),
            _ => AttachError::Socket { path, source },
        }
    }
}
