//! Errors of the system in an operator's words: what was asked for, why it was refused, and which
//! limit to raise.

use std::io;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A thread.
    Thread,
    /// A descriptor: a socket, an eventfd, an epoll.
    Descriptor,
    /// A context of asynchronous I/O, through which poll threads call drivers.
    AsyncIo,
}

/// Returns the error with two additions: what was asked for, and which limit is reached.
pub fn refused(wanted: Wanted, error: io::Error) -> io::Error {
    let what = match wanted {
        Wanted::Thread => "a thread",
        Wanted::Descriptor => "a descriptor",
        Wanted::AsyncIo => "a context of asynchronous I/O",
    };
    let remedy = error.raw_os_error().and_then(|code| remedy(wanted, code));
    let remedy = remedy.map(|text| format!("; {text}")).unwrap_or_default();
    io::Error::new(error.kind(), format!("{what} ({error}){remedy}"))
}

fn remedy(wanted: Wanted, code: i32) -> Option<&'static str> {
    Some(match (wanted, code) {
        (Wanted::AsyncIo, libc::EAGAIN) => {
            "the limit fs.aio-max-nr is used up: raise it, as by sysctl -w fs.aio-max-nr=1048576"
        }
        (Wanted::AsyncIo, libc::ENOSYS | libc::EPERM) => {
            "io_setup must be allowed: look at the seccomp filter, and for CONFIG_AIO in the kernel"
        }
        (Wanted::Thread, libc::EAGAIN) => {
            "a limit of threads or mappings is used up: raise TasksMax= (pids.max), ulimit -u, \
             kernel.threads-max or vm.max_map_count"
        }
        (_, libc::EMFILE) => {
            "the limit of open descriptors is used up: raise LimitNOFILE= (ulimit -Hn)"
        }
        (_, libc::ENFILE) => {
            "the limit of open files of the whole system is used up: raise fs.file-max"
        }
        (_, libc::ENOMEM) => "there is no memory: raise MemoryMax=, or stop something else",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_what_was_asked_for_and_the_limit() {
        let said = |wanted, code| refused(wanted, io::Error::from_raw_os_error(code)).to_string();
        for (wanted, code, what, limit) in [
            (
                Wanted::AsyncIo,
                libc::EAGAIN,
                "asynchronous I/O",
                "sysctl -w fs.aio-max-nr=",
            ),
            (Wanted::AsyncIo, libc::EPERM, "asynchronous I/O", "seccomp"),
            (Wanted::Thread, libc::EAGAIN, "a thread", "TasksMax="),
            (
                Wanted::Descriptor,
                libc::EMFILE,
                "a descriptor",
                "LimitNOFILE=",
            ),
            (
                Wanted::Descriptor,
                libc::ENFILE,
                "a descriptor",
                "fs.file-max",
            ),
            (Wanted::Thread, libc::ENOMEM, "a thread", "MemoryMax="),
        ] {
            let text = said(wanted, code);
            assert!(text.starts_with(what) || text.contains(what), "{text}");
            assert!(text.contains(limit), "{text}");
            assert!(text.contains("os error"), "{text}");
        }
        // Nothing is invented for what is not known.
        assert!(!said(Wanted::Thread, libc::EINVAL).contains(';'));
    }
}
