//! A transmitq: chains that the driver made available, taken and completed by one poll thread at a
//! time.
//!
//! Its state is relaxed atomics, not fields behind `&mut`, because the queue moves between poll
//! threads. A move takes two topologies: one without an owner, which the old owner acknowledges,
//! then one with the new owner. The barriers of these publications order the state.

use std::iter::once;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use super::chain::{ChainError, Direction, Windows};
use super::claim::Publish;
use super::{Broken, BrokenMark, Head, Ring, RingSetup, SetupError};
use crate::memory::Window;

/// What a take found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// No chain is available.
    Nothing,
    /// A chain whose buffers were appended to the windows.
    Chain {
        /// Sum of the buffers' lengths, in bytes.
        len: u32,
    },
    /// A chain that cannot be used. It goes back with length 0, in its turn like any other.
    Malformed(ChainError),
}

/// Proof of a full barrier between the stores of used indices and the looks at drivers' event
/// words. The driver stores its event, then looks at the index (virtio 1.2 §2.7.7.2, §2.8.10).
/// Without the barrier both sides may miss each other. One barrier serves any number of queues. A
/// barrier for each queue would wait for the lines of each queue separately.
#[derive(Debug)]
pub struct FullBarrier(());

impl FullBarrier {
    /// Executes a full barrier.
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

/// A started transmitq. Aligned to 128 bytes, so that it has its cache lines for itself: its owner
/// writes to it for every chain, and another thread may own its neighbour.
#[derive(Debug)]
#[repr(align(128))]
pub struct TransmitQueue {
    ring: Ring,
    /// Next position to take.
    next: AtomicU64,
    /// Positions before this one are returned to the driver.
    completed: AtomicU64,
    /// Positions before this one were complete when the driver's event was last read.
    asked: AtomicU64,
    size: u16,
    /// A call is owed whatever the driver's event says, because the ring has started.
    call_wanted: AtomicBool,
    broken: BrokenMark,
    header: usize,
}

impl TransmitQueue {
    /// Starts the ring. The driver is called once, because it may sleep on work finished before a
    /// restart.
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

    /// Returns the bytes of the virtio-net header before each frame.
    #[inline(always)]
    pub fn header(&self) -> usize {
        self.header
    }

    /// Next position to take.
    #[inline(always)]
    pub fn position(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Returns the end of what is available now. Costs one acquire load of the driver's line, so
    /// once a burst.
    ///
    /// The end is at most one ring size behind the completed position. Otherwise a driver that
    /// raises its index without waiting for used entries would make us forget chains in flight.
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

    /// Whether at least `chains` chains are known to be available before `end`, which
    /// [`TransmitQueue::available_to`] returned. Never known of a packed ring.
    #[inline(always)]
    pub fn surely_holds(&self, chains: u64, end: u64) -> bool {
        end - self.position() >= chains && self.ring.knows_its_end()
    }

    /// Prefetches the line that says whether something is available. For a queue that is looked at
    /// soon.
    #[inline(always)]
    pub fn prefetch_available(&self) {
        self.ring.prefetch_available(self.position());
    }

    /// Prefetches what taking and completing the next chain will need, if there is one. To be
    /// called some time after [`TransmitQueue::prefetch_available`].
    #[inline(always)]
    pub fn prefetch_next(&self) {
        self.ring.prefetch_next(self.position());
    }

    /// Takes the next chain before `end` (from [`TransmitQueue::available_to`]) if it is one usable
    /// buffer. Most chains are.
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

    /// Takes the next chain before `end`, of any form, and appends its buffers to `windows`.
    /// `windows` needs room for [`MAX_CHAIN`](super::chain::MAX_CHAIN) pieces: a good chain without
    /// room counts as malformed.
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

    /// Moves the position behind the chain at `position`, whose used element is written. The
    /// element's place is free: what was there one lap earlier is published, see
    /// [`TransmitQueue::available_to`].
    #[inline(always)]
    fn taken(&self, position: u64, head: Head) {
        // A packed chain may reach past the `end` of a take, because `end` counts descriptors.
        self.next
            .store(position + u64::from(head.span), Ordering::Relaxed);
    }

    /// Positions before this one are returned to the driver.
    #[inline(always)]
    pub fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }

    /// Returns every chain before `end` to the driver, in available order and with one publication.
    /// `end` must be the end of a chain. Returns whether there was any chain.
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

    /// Whether the driver is to be called now: for what was completed before the barrier, or
    /// because the ring has started.
    #[inline(always)]
    pub fn take_call_wanted(&self, _after: &FullBarrier) -> bool {
        let (from, to) = (self.asked.load(Ordering::Relaxed), self.completed());
        let mut wanted = false;
        if from != to {
            self.asked.store(to, Ordering::Relaxed);
            // Without a call descriptor this is not called for many laps. The driver's event has 16
            // bits only, so `from` must not be further back than one ring.
            let from = from.max(to.saturating_sub(self.size.into()));
            wanted = self.ring.wants_call(from, to);
        }
        // One owner at a time, so no atomic exchange is needed.
        if self.call_wanted.load(Ordering::Relaxed) {
            self.call_wanted.store(false, Ordering::Relaxed);
            wanted = true;
        }
        wanted
    }

    /// Asks for kicks. Returns whether it is safe to sleep: nothing became available meanwhile.
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

    /// Asks for no more kicks: undoes [`TransmitQueue::arm`].
    pub fn disarm(&self) {
        self.ring.want_kicks(false, self.position());
    }

    /// Whether a chain is available that was not taken yet. Returns `true` for an impossible ring.
    pub fn has_available(&self) -> bool {
        self.ring.has_available(self.position()).unwrap_or(true)
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

    /// Returns the answer to GET_VRING_BASE, once every poll thread has let go of the queue.
    pub fn base(&self) -> u32 {
        self.ring.base(self.completed())
    }
}
