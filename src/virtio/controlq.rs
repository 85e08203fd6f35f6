//! A controlq (virtio 1.2 §5.1.6.5): takes commands that the driver made available, and returns
//! each with its answer.
//!
//! Only the session takes and completes commands, one after the other. The position is atomic
//! because other threads read it.

use std::iter::once;
use std::sync::atomic::{AtomicU64, Ordering};

use super::chain::Windows;
use super::claim::Publish;
use super::{Broken, BrokenMark, FullBarrier, Head, Ring, RingSetup, SetupError};

/// A command that was taken. Its buffers are in the windows given to [`ControlQueue::take`].
#[derive(Clone, Copy, Debug)]
pub struct Command {
    head: Head,
    /// Number of windows, from the first on, that hold the command. The windows behind them are
    /// room for the answer. `None` if the chain cannot be read or has no such room: then there is
    /// no answer.
    pub asked: Option<usize>,
    /// Whether the chain begins with room to write. No command does, but every buffer of a receiveq
    /// does.
    pub is_room: bool,
}

/// A started controlq.
#[derive(Debug)]
pub struct ControlQueue {
    ring: Ring,
    /// Position of the next command. Commands before it are returned to the driver.
    next: AtomicU64,
    size: u16,
    broken: BrokenMark,
}

impl ControlQueue {
    /// Starts the ring. Kicks are wanted from the first [`ControlQueue::arm`] on.
    pub fn start(setup: &RingSetup) -> Result<Self, SetupError> {
        let (ring, position) = Ring::start(setup)?;
        Ok(ControlQueue {
            ring,
            next: AtomicU64::new(position),
            size: setup.size,
            broken: BrokenMark::default(),
        })
    }

    fn next(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Reads the next command into `windows`. The command stays the next one until
    /// [`ControlQueue::complete`]. Returns `None` if no command is available or the ring is broken.
    pub fn take<'m, const N: usize>(&'m self, windows: &mut Windows<'m, N>) -> Option<Command> {
        windows.clear();
        if self.broken.is_set() {
            return None;
        }
        let next = self.next();
        let read = self.ring.available_to(next).and_then(|end| {
            if end == next {
                return Ok(None);
            }
            self.ring.read_command(next, windows)
        });
        match read {
            Ok(None) => None,
            Ok(Some((chain, answer))) => Some(Command {
                head: chain.head,
                asked: answer.filter(|_| chain.len.is_ok()),
                is_room: chain.len.is_ok() && answer == Some(0),
            }),
            Err(broken) => {
                self.broken.set(broken);
                None
            }
        }
    }

    /// Returns the command to the driver with `answered` bytes of answer. Returns whether the
    /// driver is to be called.
    pub fn complete(&self, command: Command, answered: u32) -> bool {
        let (from, head) = (self.next(), command.head);
        let to = from + u64::from(head.span);
        self.ring.write_used(from, once((head, answered)));
        self.ring.publish(from, to);
        self.next.store(to, Ordering::Relaxed);
        let _used_before_event = FullBarrier::new();
        self.ring.wants_call(from, to)
    }

    /// Asks for kicks. Returns whether it is safe to sleep: nothing became available meanwhile.
    pub fn arm(&self) -> bool {
        if self.broken.is_set() {
            return true;
        }
        let next = self.next();
        self.ring.want_kicks(true, next);
        // The next take finds an impossible ring, and marks it broken.
        !self.has_available()
    }

    /// Whether a command is available. Returns `true` for an impossible ring.
    pub fn has_available(&self) -> bool {
        self.ring.has_available(self.next()).unwrap_or(true)
    }

    /// See [`Ring::is_blank`].
    pub fn is_blank(&self) -> bool {
        self.ring.is_blank()
    }

    /// Returns why the ring is broken, or `None`.
    pub fn broken(&self) -> Option<Broken> {
        self.broken.get()
    }

    /// Returns the number of entries of the ring.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Returns the answer to GET_VRING_BASE.
    pub fn base(&self) -> u32 {
        self.ring.base(self.next())
    }
}
