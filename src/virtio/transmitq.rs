//! A transmitq: chains that the driver made available, taken and completed by one poll thread at a
//! time.
//!
//! Its state is relaxed atomics, not fields behind `&mut`: the queue moves between poll threads by
//! two topology publications (without an owner, acknowledged, then with the new one), whose
//! barriers order it.

use std::iter::once;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use super::chain::{ChainError, Direction, Windows};
use super::claim::Publish;
use super::{Broken, BrokenMark, Head, Ring, RingSetup, SetupError};
use crate::memory::Window;

/// What a take found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Nothing available.
    Nothing,
    /// A chain of this many bytes; its buffers were appended.
    Chain {
        /// Sum of the buffers' lengths, in bytes.
        len: u32,
    },
    /// A chain that cannot be used; it is returned with length 0 in its turn like any other.
    Malformed(ChainError),
}

/// A full barrier that was made: behind used indices, before looks at drivers' event words. The
/// driver stores its event, then looks at the index (virtio 1.2 §2.7.7.2, §2.8.10); without the
/// barrier both sides may miss the other. One serves any number of queues; one for each would wait
/// for each one's lines alone.
#[derive(Debug)]
pub struct FullBarrier(());

impl FullBarrier {
    /// Makes one.
    #[inline(always)]
    pub fn new() -> Self {
        fence(Ordering::SeqCst);
        FullBarrier(())
    }
}

impl Default for FullBarrier {
    fn default() -> Self {
        FullBarrier::new()
    }
}

/// A started transmitq. Alone on its lines: its owner writes to it for every chain, and the
/// neighbour may be anybody's.
#[derive(Debug)]
#[repr(align(128))]
pub struct TransmitQueue {
    ring: Ring,
    /// Next position to take.
    next: AtomicU64,
    /// Positions before this one are returned to the driver.
    completed: AtomicU64,
    /// Positions before this one were completed when the driver's wish for a call was last looked
    /// at.
    asked: AtomicU64,
    size: u16,
    /// A call that is owed whatever the driver says: its ring has started.
    call_wanted: AtomicBool,
    broken: BrokenMark,
    header: usize,
}

impl TransmitQueue {
    /// Starts the ring. The driver is called once: it may sleep on work finished before a restart.
    pub fn start(setup: &RingSetup) -> Result<Self, SetupError> {
        let (ring, position) = Ring::start(setup)?;
        ring.want_kicks(false, position);
        Ok(TransmitQueue {
            ring,
            next: AtomicU64::new(position),
            completed: AtomicU64::new(position),
            asked: AtomicU64::new(position),
            size: setup.size,
            call_wanted: AtomicBool::new(true),
            broken: BrokenMark::default(),
            header: setup.features.header(),
        })
    }

    /// Bytes of the virtio-net header before each frame.
    #[inline(always)]
    pub fn header(&self) -> usize {
        self.header
    }

    /// Next position to take.
    #[inline(always)]
    pub fn position(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// The end of what is available now: one acquire load of the driver's line, once a burst.
    ///
    /// At most one ring beyond what is completed, or a driver that raises its index without waiting
    /// for used entries would make us forget chains in flight.
    #[inline(always)]
    pub fn available_to(&self) -> u64 {
        let next = self.position();
        if self.broken.is_set() {
            return next;
        }
        match self.ring.available_to(next) {
            Ok(end) => end.min(self.completed() + u64::from(self.size)),
            Err(broken) => {
                self.broken.set(broken);
                next
            }
        }
    }

    /// Whether so many chains are known to be available before `end`, which
    /// [`TransmitQueue::available_to`] gave. Of a packed ring that is never known.
    #[inline(always)]
    pub fn surely_holds(&self, chains: u64, end: u64) -> bool {
        end - self.position() >= chains && self.ring.knows_its_end()
    }

    /// Asks for the line that says whether something is available: a queue that is looked at soon.
    #[inline(always)]
    pub fn prefetch_available(&self) {
        self.ring.prefetch_available(self.position());
    }

    /// Asks for what taking and completing the next chain will need, if there is one; a little
    /// later.
    #[inline(always)]
    pub fn prefetch_next(&self) {
        self.ring.prefetch_next(self.position());
    }

    /// Takes the next chain before `end` (from [`TransmitQueue::available_to`]) if it is one usable
    /// buffer: how most are.
    #[inline(always)]
    pub fn take_single(&self, end: u64) -> Option<Window<'_>> {
        let position = self.position();
        if position >= end {
            return None;
        }
        let (head, window) = self.ring.take_single(position)?;
        self.taken(position, head);
        Some(window)
    }

    /// Takes the next chain before `end`, whatever it is, appending its buffers. `windows` should
    /// have room for [`MAX_CHAIN`](super::chain::MAX_CHAIN), or a chain may be malformed for want
    /// of it.
    pub fn take<'m, const N: usize>(&'m self, end: u64, windows: &mut Windows<'m, N>) -> Taken {
        let position = self.position();
        if position >= end {
            return Taken::Nothing;
        }
        match self
            .ring
            .read_chain(position, Direction::Read, u32::MAX, windows)
        {
            Ok(Some(chain)) => {
                self.ring.write_used(position, once((chain.head, 0)));
                self.taken(position, chain.head);
                match chain.len {
                    Ok(len) => Taken::Chain { len },
                    Err(error) => Taken::Malformed(error),
                }
            }
            Ok(None) => Taken::Nothing,
            Err(broken) => {
                self.broken.set(broken);
                Taken::Nothing
            }
        }
    }

    /// The chain at `position` is taken, and its used element written: a lap earlier its place is
    /// published, see [`TransmitQueue::available_to`].
    #[inline(always)]
    fn taken(&self, position: u64, head: Head) {
        // A packed chain may reach past the `end` of a take, which counts descriptors.
        self.next
            .store(position + u64::from(head.span), Ordering::Relaxed);
    }

    /// Positions before this one are returned to the driver.
    #[inline(always)]
    pub fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }

    /// Returns every chain before `end`, which is the end of one, to the driver: in available
    /// order, with one store of the used index. Says whether there were any.
    #[inline(always)]
    pub fn complete(&self, end: u64) -> bool {
        let start = self.completed();
        if end <= start {
            return false;
        }
        self.ring.publish(start, end);
        self.completed.store(end, Ordering::Relaxed);
        true
    }

    /// Whether the driver is to be called now, for what was completed before the barrier or because
    /// the ring has started.
    #[inline(always)]
    pub fn take_call_wanted(&self, _after: &FullBarrier) -> bool {
        let (from, to) = (self.asked.load(Ordering::Relaxed), self.completed());
        let mut wanted = false;
        if from != to {
            self.asked.store(to, Ordering::Relaxed);
            // Without a call descriptor nobody asks, for many laps, and the driver's event has 16
            // bits.
            let from = from.max(to.saturating_sub(self.size.into()));
            wanted = self.ring.wants_call(from, to);
        }
        // One owner at a time: no exchange is needed.
        if self.call_wanted.load(Ordering::Relaxed) {
            self.call_wanted.store(false, Ordering::Relaxed);
            wanted = true;
        }
        wanted
    }

    /// Asks for kicks, and says whether it is safe to sleep: nothing became available meanwhile.
    pub fn arm(&self) -> bool {
        if self.broken.is_set() {
            return true;
        }
        let next = self.position();
        self.ring.want_kicks(true, next);
        match self.ring.has_available(next) {
            Ok(available) => !available,
            Err(broken) => {
                self.broken.set(broken);
                true
            }
        }
    }

    /// Takes [`TransmitQueue::arm`] back.
    pub fn disarm(&self) {
        self.ring.want_kicks(false, self.position());
    }

    /// Whether a chain is available that was not taken yet. A ring that is impossible counts as
    /// used.
    pub fn has_available(&self) -> bool {
        self.ring.has_available(self.position()).unwrap_or(true)
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

    /// The answer to GET_VRING_BASE, once every poll thread has let go of the queue.
    pub fn base(&self) -> u32 {
        self.ring.base(self.completed())
    }
}
