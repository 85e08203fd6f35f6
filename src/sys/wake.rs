//! Waking a thread of our own that sleeps in epoll.
//!
//! No other process has the eventfd, so reading and writing it cannot block.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use vmm_sys_util::eventfd::EventFd;

use super::refused::{Wanted, refused};

/// A bell: any thread rings it, and one thread watches it.
#[derive(Debug)]
pub struct Wake(EventFd);

impl Wake {
    /// Makes a bell that was not rung yet.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        event
            .map(Wake)
            .map_err(|error| refused(Wanted::Descriptor, error))
    }

    /// Rings the bell: makes the descriptor readable. A second ring before the first one was taken
    /// changes nothing.
    pub fn wake(&self) {
        // Fails only if the counter is full. Then the descriptor is readable, too.
        let _ = self.0.write(1);
    }

    /// Makes the descriptor unreadable. Returns whether the bell was rung. Look for work *after*
    /// this.
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
