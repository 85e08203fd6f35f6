//! Who is who: groups by name, and the groups of a unix socket's peer.
//!
//! Both go through the C library or the kernel, because `/etc/group` is not the only source of
//! groups (NSS) and `/proc/PID/status` may describe another process by the time it is read.

use std::ffi::CString;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Largest buffer tried for a group entry; it holds the names of all members.
const MAX_GROUP_BUFFER: usize = 1 << 20;
/// NGROUPS_MAX of Linux.
const MAX_GROUPS: usize = 65536;

/// The numeric id of a group given by name or number; `None` if there is no such group.
pub fn group_id(name: &str) -> io::Result<Option<u32>> {
    if let Ok(id) = name.parse::<u32>() {
        return Ok(Some(id));
    }
    let Ok(c_name) = CString::new(name) else {
        return Ok(None);
    };
    let mut buffer: Vec<libc::c_char> = vec![0; 4096];
    loop {
        let mut group = MaybeUninit::<libc::group>::zeroed();
        let mut found: *mut libc::group = std::ptr::null_mut();
        // SAFETY: `c_name` is zero-terminated, `group`, `buffer` and `found` live across the call,
        // and the length given is the buffer's own.
        let code = unsafe {
            libc::getgrnam_r(
                c_name.as_ptr(),
                group.as_mut_ptr(),
                buffer.as_mut_ptr(),
                buffer.len(),
                &mut found,
            )
        };
        match code {
            0 if found.is_null() => return Ok(None),
            0 => {
                // SAFETY: zeroed above (all fields are integers or pointers, for which zero is a
                // value) and filled by getgrnam_r, which reported a hit.
                return Ok(Some(unsafe { group.assume_init() }.gr_gid));
            }
            libc::ERANGE if buffer.len() < MAX_GROUP_BUFFER => buffer.resize(buffer.len() * 2, 0),
            libc::EINTR => {}
            // What the C library answers for "not found" on some systems.
            libc::ENOENT | libc::ESRCH => return Ok(None),
            code => return Err(io::Error::from_raw_os_error(code)),
        }
    }
}

/// The supplementary groups of a connected unix socket's peer, as they were when it connected.
pub fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut bytes = (groups.len() * size_of::<libc::gid_t>()) as libc::socklen_t;
        // SAFETY: the pointer and length describe `groups`, which lives across the call.
        let code = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &mut bytes,
            )
        };
        let count = bytes as usize / size_of::<libc::gid_t>();
        if code == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // ERANGE: the kernel has stored the length it needs.
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() || count > MAX_GROUPS
        {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn groups_are_found_by_name_and_number() {
        assert_eq!(group_id("root").unwrap(), Some(0));
        assert_eq!(group_id("4242").unwrap(), Some(4242));
        assert_eq!(group_id("no-such-group-here").unwrap(), None);
        assert_eq!(group_id("with\0zero").unwrap(), None);
    }

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (a, _b) = UnixStream::pair().unwrap();
        let mine = rustix::process::getgroups().unwrap();
        let peer = peer_groups(a.as_fd()).unwrap();
        assert_eq!(peer.len(), mine.len());
    }
}
