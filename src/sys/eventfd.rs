//! The notification descriptors that a frontend hands over.
//!
//! The protocol would allow pipes and other descriptors. Only eventfds are taken: kernel AIO, which
//! signals calls, signals only eventfds, and the reader of a pipe could block the switch. The
//! frontend holds the same file description, and may fill the eventfd or make it blocking at any
//! time. So no thread reads or writes such an eventfd directly. A call ([`super::call`]) is
//! signalled by [`super::aio::Caller`], and a kick is watched by [`super::epoll::Sleeper`].

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

/// The kernel's name for an eventfd in /proc. Names of real files start with a slash, so no file
/// has this name.
const EVENTFD: &[u8] = b"anon_inode:[eventfd]";

/// Why a descriptor is not taken for notifications.
#[derive(Debug, thiserror::Error)]
pub enum NotEventFd {
    /// The descriptor is something else.
    #[error("descriptor {fd} is no eventfd")]
    Other {
        /// The number it has here.
        fd: i32,
    },
    /// /proc does not say what the descriptor is.
    #[error("what descriptor {fd} is cannot be read from /proc/self/fd")]
    Unknown {
        /// The number it has here.
        fd: i32,
        /// Why not.
        #[source]
        source: Errno,
    },
}

pub(super) fn eventfd(file: File) -> Result<OwnedFd, NotEventFd> {
    let fd = file.as_raw_fd();
    let target = rustix::fs::readlink(format!("/proc/self/fd/{fd}"), Vec::new())
        .map_err(|source| NotEventFd::Unknown { fd, source })?;
    if target.as_bytes() == EVENTFD {
        // A received descriptor would stay open in a child process. A failure is ignored, because
        // the switch starts no child process.
        let _ = rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::CLOEXEC);
        Ok(file.into())
    } else {
        Err(NotEventFd::Other { fd })
    }
}

/// The eventfd by which the driver kicks the device.
#[derive(Debug)]
pub struct KickFd {
    fd: OwnedFd,
    /// The eventfd's count when it came, because QEMU's eventfds begin with 1. `None` if the count
    /// is unknown.
    first: Option<u64>,
}

impl KickFd {
    /// Takes the descriptor if it is an eventfd. Otherwise closes it and returns an error.
    pub fn new(file: File) -> Result<Self, NotEventFd> {
        let fd = eventfd(file)?;
        let first = count(&fd);
        Ok(KickFd { fd, first })
    }

    /// Whether the driver is known to have kicked since the descriptor came. Nobody reads the
    /// eventfd, so its count only grows.
    pub fn was_kicked(&self) -> bool {
        self.first
            .is_some_and(|first| count(&self.fd).is_some_and(|count| count > first))
    }
}

impl AsFd for KickFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Returns the count of an eventfd, if /proc tells. Reading the eventfd could block, and would
/// reset the count.
fn count(fd: &OwnedFd) -> Option<u64> {
    let info = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let info = std::fs::read_to_string(info).ok()?;
    let mut lines = info.lines();
    let count = lines.find_map(|line| line.strip_prefix("eventfd-count:"))?;
    u64::from_str_radix(count.trim(), 16).ok()
}

/// Makes descriptor `to` a copy of `from`, whatever `to` was. With this a test passes one kind of
/// descriptor off as another.
#[cfg(test)]
pub(crate) fn dup_over(from: i32, to: i32) -> i32 {
    // SAFETY: both descriptors are open and the test's own.
    unsafe { libc::dup2(from, to) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd as make};

    #[test]
    fn an_eventfd_is_taken() {
        let plain = make(0, EventfdFlags::CLOEXEC).unwrap();
        let semaphore = make(0, EventfdFlags::SEMAPHORE).unwrap();
        assert!(KickFd::new(plain.into()).is_ok());
        assert!(KickFd::new(semaphore.into()).is_ok());
        let inherited = make(0, EventfdFlags::empty()).unwrap();
        let kick = KickFd::new(inherited.into()).unwrap();
        let flags = rustix::io::fcntl_getfd(&kick).unwrap();
        assert_eq!(flags, rustix::io::FdFlags::CLOEXEC);
    }

    #[test]
    fn kicks_are_seen_and_what_was_there_before_is_none() {
        for first in [0, 1, 300] {
            let event = make(first, EventfdFlags::CLOEXEC).unwrap();
            let kick = KickFd::new(event.try_clone().unwrap().into()).unwrap();
            assert!(!kick.was_kicked(), "{first}");
            rustix::io::write(&event, &1_u64.to_ne_bytes()).unwrap();
            assert!(kick.was_kicked() && kick.was_kicked(), "{first}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let (reader, writer) = std::io::pipe().unwrap();
        let socket = std::os::unix::net::UnixStream::pair().unwrap().0;
        let named = crate::sys::memfd::create("anon_inode:[eventfd]", 8).unwrap();
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC);
        for fd in [
            OwnedFd::from(reader),
            writer.into(),
            socket.into(),
            named.into(),
            epoll.unwrap(),
        ] {
            assert!(matches!(
                KickFd::new(fd.into()),
                Err(NotEventFd::Other { .. })
            ));
        }
    }

    #[test]
    fn a_real_file_cannot_pose_as_an_eventfd() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("anon_inode:[eventfd]")).unwrap();
        assert!(KickFd::new(file).is_err());
    }
}
