//! A transmitq: chains that the driver made available, taken and completed by one poll thread at a time.
//!
//! Its state is relaxed atomics, not fields behind `&mut`: the queue moves between poll threads by two
//! topology publications (without an owner, acknowledged, then with the new one), whose barriers order it.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::chain::{ChainError, Direction, Windows};
use super::claim::Publish;
use super::{Broken, BrokenMark, Head, Ring, RingSetup, SetupError};

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

/// A started transmitq.
#[derive(Debug)]
pub struct TransmitQueue {
    ring: Ring,
    /// Next position to take.
    next: AtomicU64,
    /// Positions before this one are returned to the driver.
    completed: AtomicU64,
    /// Positions before this one were completed when the driver's wish for a call was last looked at.
    asked: AtomicU64,
    size: u16,
    /// Taken chains by position: id and span. A power of two of places, so that none is found by division.
    taken: Box<[AtomicU32]>,
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
            taken: (0..setup.size.next_power_of_two())
                .map(|_| AtomicU32::new(0))
                .collect(),
            call_wanted: AtomicBool::new(true),
            broken: BrokenMark::default(),
            header: setup.features.header(),
        })
    }

    #[inline(always)]
    fn slot(&self, position: u64) -> &AtomicU32 {
        &self.taken[position as usize & (self.taken.len() - 1)]
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
    /// At most one ring beyond what is completed, or a driver that raises its index without waiting for
    /// used entries would make us forget chains in flight.
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

    /// Asks for the line that says whether something is available: a queue that is looked at soon.
    #[inline(always)]
    pub fn prefetch_available(&self) {
        self.ring.prefetch_available(self.position());
    }

    /// Asks for what taking and completing the next chain will need, if there is one; a little later.
    #[inline(always)]
    pub fn prefetch_next(&self) {
        self.ring.prefetch_next(self.position());
    }

    /// Takes the next chain before `end` (from [`TransmitQueue::available_to`]), appending its buffers.
    #[inline(always)]
    pub fn take<'m, const N: usize>(&'m self, end: u64, windows: &mut Windows<'m, N>) -> Taken {
        let position = self.position();
        if position >= end {
            return Taken::Nothing;
        }
        if let Some((head, window)) = self.ring.single(position, Direction::Read)
            && windows.try_push(window).is_ok()
        {
            self.taken(position, head);
            return Taken::Chain {
                len: window.len() as u32,
            };
        }
        self.take_chain(position, windows)
    }

    /// Takes a chain of several buffers, or what is none.
    fn take_chain<'m, const N: usize>(
        &'m self,
        position: u64,
        windows: &mut Windows<'m, N>,
    ) -> Taken {
        match self
            .ring
            .read_chain(position, Direction::Read, u32::MAX, windows)
        {
            Ok(Some(chain)) => {
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

    #[inline(always)]
    fn taken(&self, position: u64, head: Head) {
        self.slot(position).store(head.pack(), Ordering::Relaxed);
        // A packed chain may reach past the `end` of a take, which counts descriptors.
        self.next
            .store(position + u64::from(head.span), Ordering::Relaxed);
    }

    /// Positions before this one are returned to the driver.
    #[inline(always)]
    pub fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }

    /// Returns every chain before `end` to the driver, in available order, with one store of the used index.
    pub fn complete(&self, end: u64) {
        let start = self.completed();
        if end <= start {
            return;
        }
        let mut position = start;
        while position < end {
            let head = Head::unpack(self.slot(position).load(Ordering::Relaxed));
            self.ring.write_used(position, head, 0);
            position += u64::from(head.span);
        }
        self.ring.publish(start, end);
        self.completed.store(end, Ordering::Relaxed);
    }

    /// Whether the driver is to be called now.
    ///
    /// Between the last [`TransmitQueue::complete`] and this the caller makes a full barrier: the driver stores its event,
    /// then looks at the used index, as in `Claims::try_publish`. One is enough for all queues of a pass; one for each would
    /// wait for each one's lines alone.
    #[inline(always)]
    pub fn take_call_wanted(&self) -> bool {
        let (from, to) = (self.asked.load(Ordering::Relaxed), self.completed());
        let mut wanted = false;
        if from != to {
            self.asked.store(to, Ordering::Relaxed);
            // Without a call descriptor nobody asks, for many laps, and the driver's event has 16 bits.
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
