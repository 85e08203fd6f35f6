//! Waking a thread of our own that sleeps in epoll.
//!
//! The eventfd is nobody else's, so reading and writing it cannot block.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use vmm_sys_util::eventfd::EventFd;

use super::refused::{Wanted, refused};

/// A bell: rung by any thread, heard by the one that watches it.
#[derive(Debug)]
pub struct Wake(EventFd);

impl Wake {
    /// A bell that nobody rang yet.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        event
            .map(Wake)
            .map_err(|error| refused(Wanted::Descriptor, error))
    }

    /// Makes the descriptor readable. Ringing again before anybody heard changes nothing.
    pub fn wake(&self) {
        // Fails only when the counter is full, which is readable, too.
        let _ = self.0.write(1);
    }

    /// Makes it unreadable, and says whether somebody had rung. Look for work *after* this.
    pub fn drain(&self) -> bool {
        self.0.read().is_ok()
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self` is.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

impl AsRawFd for Wake {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ringing_twice_is_heard_once() {
        let wake = Wake::new().unwrap();
        assert!(!wake.drain());
        wake.wake();
        wake.wake();
        assert!(wake.drain());
        assert!(!wake.drain());
    }
}
