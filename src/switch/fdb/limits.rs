//! Limits of one port in the FDB: how many addresses it holds, and how many it takes from other
//! ports in a second.
//!
//! There are three words a slot. They change only when an entry appears, moves or goes. A refusal
//! writes nothing, so a flood of new addresses costs other threads no cache line. Compare-and-swaps
//! are tried a few times, never until they succeed: an address that is not learned now is learned
//! from its next frame.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::super::PortRef;

/// Attempts of a compare-and-swap before a frame goes on without its source being learned.
const ATTEMPTS: usize = 8;

/// Whether a port may have one more entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    Granted,
    /// The port holds as many entries as it may.
    Quota,
    /// The slot belongs to a later port, or does not exist.
    Gone,
    /// Other threads were faster too many times.
    Contended,
}

#[derive(Default)]
struct PortLimits {
    /// Generation (upper half) and number of its learned entries.
    entries: AtomicU64,
    /// Second (upper half) and number of moves in it.
    moves: AtomicU64,
    /// Number of addresses that the slot's present port ever took from other ports.
    moved: AtomicU64,
}

fn pack(upper: u32, lower: u32) -> u64 {
    u64::from(upper) << 32 | u64::from(lower)
}

fn unpack(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

/// `a` after `b`, modulo 2^32: 1 is after `u32::MAX`.
pub(super) fn is_after(a: u32, b: u32) -> bool {
    a.wrapping_sub(b) as i32 > 0
}

pub(super) struct Limits {
    ports: Box<[PortLimits]>,
    per_port: u32,
    moves_per_second: u32,
}

impl Limits {
    pub(super) fn new(slots: usize, per_port: u32, moves_per_second: u32) -> Limits {
        let ports = (0..slots).map(|_| PortLimits::default()).collect();
        Limits {
            ports,
            per_port,
            moves_per_second,
        }
    }

    /// Counts one more entry for `port`, if the port may have one.
    pub(super) fn admit(&self, port: PortRef) -> Admission {
        let Some(limits) = self.ports.get(usize::from(port.slot)) else {
            return Admission::Gone;
        };
        let mut word = limits.entries.load(Relaxed);
        for _ in 0..ATTEMPTS {
            let (generation, count) = unpack(word);
            let count = if port.generation == generation {
                count
            } else if is_after(port.generation, generation) {
                // The first entry of a new port: entries that are left of the slot's last port do
                // not count.
                0
            } else {
                return Admission::Gone;
            };
            if count >= self.per_port {
                return Admission::Quota;
            }
            let next = pack(port.generation, count + 1);
            match limits
                .entries
                .compare_exchange_weak(word, next, Relaxed, Relaxed)
            {
                Ok(_) => return Admission::Granted,
                Err(actual) => word = actual,
            }
        }
        Admission::Contended
    }

    /// Counts one entry less for `port`. The attempts are not bounded, because a lost release would
    /// shrink the port's quota for good. Each repetition means that another thread succeeded.
    pub(super) fn release(&self, port: PortRef) {
        let Some(limits) = self.ports.get(usize::from(port.slot)) else {
            return;
        };
        // `Err` means that the count belongs to another port of the slot: nothing to do.
        let _ = limits.entries.fetch_update(Relaxed, Relaxed, |word| {
            let (generation, count) = unpack(word);
            (generation == port.generation && count > 0).then(|| pack(generation, count - 1))
        });
    }

    /// Refuses entries of `port`'s generation from now on.
    pub(super) fn close(&self, port: PortRef) {
        let Some(limits) = self.ports.get(usize::from(port.slot)) else {
            return;
        };
        let _ = limits.entries.fetch_update(Relaxed, Relaxed, |word| {
            let (generation, _) = unpack(word);
            (!is_after(generation, port.generation))
                .then(|| pack(port.generation.wrapping_add(1), 0))
        });
        // A thread that was admitted just before may count a move of the slot's last port for its
        // next one.
        limits.moved.store(0, Relaxed);
    }

    /// Counts an address that moved to `slot`.
    pub(super) fn moved(&self, slot: u16) {
        if let Some(limits) = self.ports.get(usize::from(slot)) {
            limits.moved.fetch_add(1, Relaxed);
        }
    }

    /// Returns how many addresses have moved to `slot` since its present port came.
    pub(super) fn moved_to(&self, slot: u16) -> u64 {
        let limits = self.ports.get(usize::from(slot));
        limits.map_or(0, |limits| limits.moved.load(Relaxed))
    }

    /// Takes one of the moves that `slot` has in this second.
    pub(super) fn take_move(&self, slot: u16, now_s: u32) -> bool {
        let Some(limits) = self.ports.get(usize::from(slot)) else {
            return false;
        };
        let mut word = limits.moves.load(Relaxed);
        for _ in 0..ATTEMPTS {
            let (second, count) = unpack(word);
            // A thread whose clock is behind counts into the second that another thread has begun.
            let (second, count) = if is_after(now_s, second) {
                (now_s, 0)
            } else {
                (second, count)
            };
            if count >= self.moves_per_second {
                return false;
            }
            let next = pack(second, count + 1);
            match limits
                .moves
                .compare_exchange_weak(word, next, Relaxed, Relaxed)
            {
                Ok(_) => return true,
                Err(actual) => word = actual,
            }
        }
        false
    }

    /// Returns the number of learned entries that are counted for `port`.
    pub(super) fn count(&self, port: PortRef) -> u32 {
        let limits = self.ports.get(usize::from(port.slot));
        let (generation, count) = unpack(limits.map_or(0, |limits| limits.entries.load(Relaxed)));
        if generation == port.generation {
            count
        } else {
            0
        }
    }
}
