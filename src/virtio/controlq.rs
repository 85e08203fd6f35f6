//! A controlq (virtio 1.2 §5.1.6.5): commands that the driver made available, each returned with
//! its answer.
//!
//! Its session alone takes and completes, one command after the other. Its state is atomic for
//! those who ask where it stands.

use std::iter::once;
use std::sync::atomic::{AtomicU64, Ordering};

use super::chain::Windows;
use super::claim::Publish;
use super::{Broken, BrokenMark, FullBarrier, Head, Ring, RingSetup, SetupError};

/// A command, as the driver wrote it; its windows are those of the walk.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    head: Head,
    /// Of its windows the first so many are what is commanded, the others room for the answer.
    /// `None`: the chain cannot be read, or has no such room, and there is no answer.
    pub asked: Option<usize>,
    /// The chain begins with room to write: no command does, but every buffer of a receiveq.
    pub is_room: bool,
}

/// A started controlq.
#[derive(Debug)]
pub struct ControlQueue {
    ring: Ring,
    /// The next command; those before it are returned to the driver.
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

    /// The next command, which stays where it is until [`ControlQueue::complete`]; its buffers are
    /// in `windows`.
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

    /// Returns the command with so many bytes of answer. Says whether its driver is to be called.
    pub fn complete(&self, command: Command, answered: u32) -> bool {
        let (from, head) = (self.next(), command.head);
        let to = from + u64::from(head.span);
        self.ring.write_used(from, once((head, answered)));
        self.ring.publish(from, to);
        self.next.store(to, Ordering::Relaxed);
        let _used_before_event = FullBarrier::new();
        self.ring.wants_call(from, to)
    }

    /// Asks for kicks, and says whether it is safe to sleep: nothing became available meanwhile.
    pub fn arm(&self) -> bool {
        if self.broken.is_set() {
            return true;
        }
        let next = self.next();
        self.ring.want_kicks(true, next);
        // What is wrong with the ring is found by the next take.
        !self.has_available()
    }

    /// Whether a command is available. A ring that is impossible counts as used.
    pub fn has_available(&self) -> bool {
        self.ring.has_available(self.next()).unwrap_or(true)
    }

    /// See [`Ring::is_blank`].
    pub fn is_blank(&self) -> bool {
        self.ring.is_blank()
    }

    /// Why the ring is broken, if it is.
    pub fn broken(&self) -> Option<Broken> {
        self.broken.get()
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The answer to GET_VRING_BASE.
    pub fn base(&self) -> u32 {
        self.ring.base(self.next())
    }
}
