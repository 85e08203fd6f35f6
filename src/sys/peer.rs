//! Who is at the other end of a unix socket, and what users and groups are called.
//!
//! The kernel recorded the credentials when the peer connected. So a process that changes its user
//! afterwards deceives nobody, and neither does another process that gets its number.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The peer's credentials when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// Process id in our PID namespace; 0 if the process is in another namespace.
    pub pid: i32,
}

impl Peer {
    /// Returns the credentials of the peer of a connected unix socket.
    pub fn of(socket: impl AsFd) -> io::Result<Peer> {
        // rustix's call is not used: its type cannot hold a pid of 0.
        let mut credentials = libc::ucred {
            pid: 0,
            uid: 0,
            gid: 0,
        };
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: `credentials` is valid for writing `len` bytes.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut credentials).cast(),
                &mut len,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Peer {
            uid: credentials.uid,
            gid: credentials.gid,
            pid: credentials.pid,
        })
    }
}

/// Returns the peer's supplementary groups at the time when it connected.
pub fn supplementary_groups(socket: impl AsFd) -> io::Result<Vec<u32>> {
    let fd = socket.as_fd().as_raw_fd();
    let mut groups = vec![0u32; 32];
    loop {
        let mut len = libc::socklen_t::try_from(groups.len() * size_of::<u32>())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        let place = groups.as_mut_ptr().cast();
        // SAFETY: `groups` is valid for writing `len` bytes.
        let result =
            unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERGROUPS, place, &mut len) };
        let count = len as usize / size_of::<u32>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // ERANGE: `len` has been set to the number of bytes that are needed.
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

/// Returns the id of a group, or `None` if there is no group of that name. A number is the id
/// itself, unless a group has this number as its name, as with `chgrp`.
pub fn group_id(name: &str) -> io::Result<Option<u32>> {
    let found = look_up(name, |name, buffer| {
        // SAFETY: all zeroes is a valid group (null pointers, gid 0).
        let mut entry: libc::group = unsafe { std::mem::zeroed() };
        let mut found = std::ptr::null_mut();
        let (place, len) = (buffer.as_mut_ptr(), buffer.len());
        // SAFETY: all pointers are valid for the call; `buffer` for writing its length.
        let code = unsafe { libc::getgrnam_r(name.as_ptr(), &mut entry, place, len, &mut found) };
        (code, (!found.is_null()).then_some(entry.gr_gid))
    })?;
    Ok(found.or_else(|| name.parse().ok()))
}

/// Returns the id of a user, or `None` if there is no user of that name.
pub fn user_id(name: &str) -> io::Result<Option<u32>> {
    look_up(name, |name, buffer| {
        // SAFETY: all zeroes is a valid passwd (null pointers, uid 0).
        let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
        let mut found = std::ptr::null_mut();
        let (place, len) = (buffer.as_mut_ptr(), buffer.len());
        // SAFETY: all pointers are valid for the call; `buffer` for writing its length.
        let code = unsafe { libc::getpwnam_r(name.as_ptr(), &mut entry, place, len, &mut found) };
        (code, (!found.is_null()).then_some(entry.pw_uid))
    })
}

/// Calls `ask` with ever larger buffers, because the length of an entry is not known in advance.
fn look_up(
    name: &str,
    ask: impl Fn(&CString, &mut [libc::c_char]) -> (libc::c_int, Option<u32>),
) -> io::Result<Option<u32>> {
    const MAX_BUFFER_BYTES: usize = 1 << 20;
    let Ok(name) = CString::new(name) else {
        return Ok(None);
    };
    let mut buffer = vec![0; 4096];
    loop {
        match ask(&name, &mut buffer) {
            // Some databases report "not found" as an error.
            (0, id) => return Ok(id),
            (libc::ENOENT | libc::ESRCH, _) => return Ok(None),
            (libc::EINTR, _) => {}
            (libc::ERANGE, _) if buffer.len() < MAX_BUFFER_BYTES => {
                let more = buffer.len() * 4;
                buffer.resize(more, 0);
            }
            (code, _) => return Err(io::Error::from_raw_os_error(code)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (socket, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(&socket).unwrap();
        assert_eq!(peer.pid.unsigned_abs(), std::process::id());
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert_eq!(peer.gid, rustix::process::getegid().as_raw());
    }

    #[test]
    fn groups_are_those_of_this_process() {
        let (socket, _other) = UnixStream::pair().unwrap();
        let own = rustix::process::getgroups().unwrap();
        let own: Vec<u32> = own.into_iter().map(|gid| gid.as_raw()).collect();
        assert_eq!(supplementary_groups(&socket).unwrap(), own);
    }

    #[test]
    fn what_is_not_a_socket_has_no_peer() {
        let file = crate::sys::memfd::create("pollux-test", 8).unwrap();
        assert!(Peer::of(&file).is_err());
        assert!(supplementary_groups(&file).is_err());
    }

    #[test]
    fn names_are_looked_up() {
        assert_eq!(user_id("root").unwrap(), Some(0));
        assert_eq!(group_id("root").unwrap(), Some(0));
        for unknown in ["no-such-name-here", "", "nul\0inside"] {
            assert_eq!(user_id(unknown).unwrap(), None);
            assert_eq!(group_id(unknown).unwrap(), None);
        }
    }
}
