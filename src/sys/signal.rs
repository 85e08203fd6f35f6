//! Signals as events of the control loop.
//!
//! SIGTERM and SIGINT are blocked in `main` before any thread starts, so every thread inherits the
//! mask. A signalfd makes them readable. SIGBUS stays unblocked everywhere (see `memory::fence`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A signal that asks the daemon to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM, as sent by the service manager.
    Terminate,
    /// SIGINT, Ctrl-C.
    Interrupt,
}

/// Blocks SIGTERM and SIGINT in the calling thread and in those that it starts from now on. For
/// threads that start before [`Signals::block`], which makes the signals readable.
pub fn hold() -> io::Result<()> {
    block().map(drop)
}

fn block() -> io::Result<libc::sigset_t> {
    // SAFETY: all zeroes is a valid, empty set.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: `set` is valid, and these are signal numbers.
        check(unsafe { libc::sigaddset(&mut set, signal) })?;
    }
    // SAFETY: `set` is valid for reading; the old mask is not asked for.
    let code = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
    if code != 0 {
        return Err(io::Error::from_raw_os_error(code));
    }
    Ok(set)
}

/// A signalfd from which the blocked signals are read.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks SIGTERM and SIGINT in the calling thread and in those that it starts from now on, and
    /// ignores SIGPIPE. To be called from `main` before any thread starts.
    pub fn block() -> io::Result<Signals> {
        ignore_sigpipe()?;
        let set = block()?;
        let flags = libc::SFD_NONBLOCK | libc::SFD_CLOEXEC;
        // SAFETY: `set` is valid for reading; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Signals(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Returns the next pending signal, if any. Never blocks.
    pub fn next_pending(&self) -> Option<Signal> {
        // `ssi_signo` is the first field of the kernel's record.
        let mut record = [0u8; size_of::<libc::signalfd_siginfo>()];
        let len = rustix::io::read(&self.0, &mut record[..]).ok()?;
        if len != record.len() {
            return None;
        }
        let number = u32::from_ne_bytes(*record.first_chunk()?);
        match i32::try_from(number).ok()? {
            libc::SIGTERM => Some(Signal::Terminate),
            libc::SIGINT => Some(Signal::Interrupt),
            _ => None,
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Ignores SIGPIPE: writing to a socket whose peer is gone must be an error, not the end of the
/// process. Rust's runtime ignores it in Rust programs, but not where this library is part of
/// another program.
fn ignore_sigpipe() -> io::Result<()> {
    // SAFETY: ignoring a signal runs no code of ours.
    let before = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    if before == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_to_a_blocking_thread_are_read() {
        let thread = std::thread::spawn(|| {
            let signals = Signals::block().unwrap();
            assert_eq!(signals.next_pending(), None);
            // Raised for this thread only, which has them blocked.
            for (number, signal) in [
                (libc::SIGTERM, Signal::Terminate),
                (libc::SIGINT, Signal::Interrupt),
            ] {
                // SAFETY: raises a blocked signal for the calling thread.
                assert_eq!(unsafe { libc::raise(number) }, 0);
                assert_eq!(signals.next_pending(), Some(signal));
            }
            assert_eq!(signals.next_pending(), None);
        });
        thread.join().unwrap();
    }
}
