//! Random operations on rings of both kinds, against independent implementations of them.
//!
//! * Transmit queues, split: `virtio_queue::Queue` on memory with the same bytes. Packed:
//!   `packed_reference`. The same driver works on both memories; chains, used elements, positions
//!   and wishes for calls and kicks must be equal.
//! * Receive queues: a list of buffers that frames are poured into, which says what comes back and
//!   with which content; the same other implementations return that on rings that must have the
//!   same bytes.
//! * Restarts, and garbage in place of a ring.
//! * Events of a whole newly visible run, exhaustively for small rings; several producers on one
//!   receive queue.
//!
//! Every test prints its seed; `POLLUX_SEED` repeats it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../support/guest.rs"]
mod guest;
#[path = "../packed_reference/mod.rs"]
mod packed_reference;

mod calls;
mod producers;
mod receive;
mod reference;
mod starts;
mod transmit;

/// Numbers that depend on nothing but the seed (Knuth's MMIX generator).
struct Random(u64);

impl Random {
    /// A number below `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// Runs `test` for `rounds` seeds, or for the one of `POLLUX_SEED`.
fn with_seeds(rounds: u64, test: impl Fn(&mut Random)) {
    if let Ok(seed) = std::env::var("POLLUX_SEED") {
        return test(&mut Random(seed.parse().unwrap()));
    }
    let now = std::time::UNIX_EPOCH.elapsed().unwrap();
    for seed in (now.as_nanos() as u64..).take(rounds as usize) {
        println!("POLLUX_SEED={seed}");
        test(&mut Random(seed));
    }
}

/// The numbers below `bound` in any order.
fn shuffled(bound: u16, random: &mut Random) -> Vec<u16> {
    let mut numbers: Vec<u16> = (0..bound).collect();
    for at in (1..numbers.len()).rev() {
        numbers.swap(at, random.below(at as u64 + 1) as usize);
    }
    numbers
}
