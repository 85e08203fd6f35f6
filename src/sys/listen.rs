//! A listening unix socket whose file has the right mode and group before anybody can connect.
//!
//! Mode and group of the file are set between `bind` and `listen`, when connections are still
//! refused. So the socket is never open to all. The umask, which belongs to the whole process, is
//! not changed. Mode and group are set through a descriptor of the bound file. A change by path
//! would be unsafe: whoever may write to the directory could replace the file by a link, and the
//! change would follow the link to a file of the attacker's choice.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, chmod, chownat, fstat, open};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};

/// Why a socket does not listen.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} it")]
pub struct ListenError {
    /// What was attempted, as in "cannot … it".
    pub what: &'static str,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

fn failed(what: &'static str) -> impl Fn(rustix::io::Errno) -> ListenError {
    move |errno| ListenError {
        what,
        source: errno.into(),
    }
}

/// The file of a socket that this process bound. The file is removed on drop, unless another file
/// has its place by then.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode of the file.
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    /// Listens on `path`. The socket is non-blocking. Without `mode` the umask decides; without
    /// `group` the directory or the process does.
    pub fn listen(
        path: &Path,
        mode: Option<u32>,
        group: Option<u32>,
        backlog: i32,
    ) -> Result<(SocketFile, UnixListener), ListenError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket: OwnedFd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(failed("listen on"))?;
        let address = SocketAddrUnix::new(path).map_err(failed("listen on"))?;
        bind(&socket, &address).map_err(failed("listen on"))?;
        // From here on, dropping the file removes it.
        let file = SocketFile {
            path: path.to_path_buf(),
            identity: identity(path),
        };
        if mode.is_some() || group.is_some() {
            set_access(path, mode, group)?;
        }
        listen(&socket, backlog).map_err(failed("listen on"))?;
        Ok((file, UnixListener::from(socket)))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let data = std::fs::symlink_metadata(path).ok()?;
    Some((data.dev(), data.ino()))
}

/// Sets group and mode of a socket file of our own. A link, somebody else's file, and a file with a
/// second name are refused.
fn set_access(path: &Path, mode: Option<u32>, group: Option<u32>) -> Result<(), ListenError> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::empty()).map_err(failed("look at"))?;
    let found = fstat(&file).map_err(failed("look at"))?;
    let is_ours = FileType::from_raw_mode(found.st_mode) == FileType::Socket
        && found.st_uid == rustix::process::geteuid().as_raw()
        && found.st_nlink == 1;
    if !is_ours {
        return Err(ListenError {
            what: "keep",
            source: io::Error::other("something else was put in its place"),
        });
    }
    // The group is set first: the mode may be meant for this group alone.
    if let Some(group) = group {
        let group = Some(Gid::from_raw(group));
        chownat(&file, "", None, group, AtFlags::EMPTY_PATH).map_err(failed("set the group of"))?;
    }
    if let Some(mode) = mode {
        // fchmod does not work on an O_PATH descriptor. Its name in /proc leads to the file itself.
        let place = format!("/proc/self/fd/{}", file.as_raw_fd());
        chmod(place, Mode::from_raw_mode(mode)).map_err(failed("set the mode of"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixStream;

    fn mode_of(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_socket_has_its_mode_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for mode in [0o600, 0o666, 0o620] {
            let (file, listener) = SocketFile::listen(&path, Some(mode), None, 1).unwrap();
            assert_eq!(mode_of(&path), mode);
            UnixStream::connect(&path).unwrap();
            drop((file, listener));
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_socket_that_was_replaced_meanwhile_is_not_unlinked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let made = SocketFile::listen(&path, None, None, 1).unwrap();
        std::fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        drop(made);
        assert!(path.exists());
        drop(other);
    }

    #[test]
    fn a_path_that_is_taken_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        std::fs::write(&path, "mine").unwrap();
        let error = SocketFile::listen(&path, Some(0o600), None, 1).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    }

    #[test]
    fn what_was_put_in_place_of_the_socket_keeps_its_mode_and_group() {
        let dir = tempfile::tempdir().unwrap();
        let (path, target) = (dir.path().join("s"), dir.path().join("target"));
        let _target = UnixListener::bind(&target).unwrap();
        let before = mode_of(&target);
        let refused = || {
            let error = set_access(&path, Some(0o777), Some(4242)).unwrap_err();
            assert_eq!(error.what, "keep");
        };
        // A link to a socket of ours, a second name of it, and a plain file.
        symlink(&target, &path).unwrap();
        refused();
        std::fs::remove_file(&path).unwrap();
        std::fs::hard_link(&target, &path).unwrap();
        refused();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        refused();
        assert_eq!(mode_of(&target), before);
        assert_ne!(std::fs::metadata(&target).unwrap().gid(), 4242);
    }

    #[test]
    fn a_failure_behind_the_bind_takes_the_file_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        // Not a group at all: -1 means "leave it", everything else is root's to give.
        if rustix::process::geteuid().is_root() {
            eprintln!("root may give any group: tested where the daemon has no descriptor left");
            return;
        }
        let error = SocketFile::listen(&path, None, Some(0), 1).unwrap_err();
        assert_eq!(error.what, "set the group of");
        assert!(!path.exists());
    }
}
