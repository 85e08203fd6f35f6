//! Several threads that deliver into one receive ring, with nothing else in the loop.
//!
//! There is no driver: whoever has published makes the same buffers available again, 32 at once as drivers do. So the figure
//! is the cost of claim, fill, commit and publish, and of the two cores' contention for them. One thread alone has every
//! line of ring and buffers in its own cache, which beside a driver it never has.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crossbeam_utils::CachePadded;
use pollux::virtio::driver::RingAreas;
use pollux::virtio::{Claim, NoClaim, ReceiveQueue};
use serde_json::{Value, json};

use crate::rig::Rig;
use crate::{Effort, median, plan};

/// Header and the longest frame.
const FRAME: [u8; 1512] = [0x5a; 1512];
const HEADER: usize = 12;
/// Bytes of the frames; of the long ones the copy outweighs the rest.
const SIZES: [usize; 2] = [64, 1500];
/// Buffers that are made available at once.
const RETURNED: u64 = 32;
/// Offset of the available index.
const INDEX: usize = 2;

/// A receive ring whose buffers come back by themselves.
struct Recycled<'m> {
    queue: ReceiveQueue,
    areas: RingAreas<'m>,
    /// Twice the available index, in 64 bits; odd while somebody moves it. One line: it is not what is measured.
    available: CachePadded<AtomicU64>,
}

/// What one thread did.
#[derive(Clone, Copy, Default)]
struct Done {
    frames: u64,
    claims: u64,
    failed: u64,
}

impl Recycled<'_> {
    /// Makes available again what is published; another thread that is at it does it for us.
    fn recycle(&self) {
        let end = || self.queue.published() + u64::from(self.queue.size());
        let now = self.available.load(Ordering::Relaxed);
        if now & 1 != 0 || end() < now / 2 + RETURNED {
            return;
        }
        let (idle, busy) = (Ordering::Relaxed, Ordering::Acquire);
        if self
            .available
            .compare_exchange(now, now | 1, busy, idle)
            .is_ok()
        {
            let end = end();
            let available = &self.areas.available;
            available.store_u16(INDEX, end as u16, Ordering::Release);
            self.available.store(2 * end, Ordering::Release);
        }
    }

    fn deliver(&self, frames: usize, size: usize, until: Instant) -> Done {
        let lengths = vec![size as u32; frames];
        let frame = &FRAME[..HEADER + size];
        let mut claim = Claim::new();
        let mut done = Done::default();
        loop {
            for _ in 0..256 {
                match self.queue.claim(lengths.iter().copied(), &mut claim) {
                    Ok(()) => {
                        for index in 0..claim.frames() {
                            let whole = claim.whole(index, frame.len()).unwrap();
                            whole.write_bytes(0, frame);
                        }
                        self.queue.commit(&claim);
                        done.frames += claim.frames() as u64;
                        done.claims += 1;
                    }
                    Err(NoClaim::Contended) => done.failed += 1,
                    Err(NoClaim::Full) => {}
                    Err(other) => panic!("{other:?}"),
                }
                self.recycle();
            }
            if Instant::now() >= until {
                return done;
            }
        }
    }
}

/// Million frames a second of `threads` threads, and failed claims per thousand.
fn sample(threads: usize, frames: usize, size: usize, effort: &Effort) -> (f64, f64) {
    let rig = Rig::new(plan(2, size), &[(0, 1), (1, 0)]).unwrap();
    let _guests = rig.guests().unwrap();
    let ring = Recycled {
        queue: rig.receive_queue(1),
        areas: rig.receive_areas(1),
        available: CachePadded::new(AtomicU64::new(0)),
    };
    let ring = &ring;
    let start = Instant::now();
    let done: Vec<Done> = std::thread::scope(|scope| {
        let threads = (0..threads).map(|n| {
            scope.spawn(move || {
                effort.pin(n);
                ring.deliver(frames, size, start + effort.time)
            })
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let seconds = start.elapsed().as_secs_f64();
    let total = done.iter().fold(Done::default(), |sum, done| Done {
        frames: sum.frames + done.frames,
        claims: sum.claims + done.claims,
        failed: sum.failed + done.failed,
    });
    let tries = (total.claims + total.failed) as f64;
    let failed = total.failed as f64 * 1000.0 / tries;
    (total.frames as f64 / seconds / 1e6, failed)
}

pub(crate) fn measure(frames: &[usize], effort: &Effort) -> Value {
    let kinds = SIZES
        .iter()
        .flat_map(|&size| frames.iter().map(move |&frames| (frames, size)));
    let rows = kinds.map(|(frames, size)| {
        let both = |_| [1, 2].map(|threads| sample(threads, frames, size, effort));
        let rounds: Vec<_> = (0..effort.rounds)
            .map(both)
            .map(|[one, two]| (one, two))
            .collect();
        json!({
            "frames": frames,
            "size": size,
            "one_mpps": median(rounds.iter().map(|(one, _)| one.0)),
            "two_mpps": median(rounds.iter().map(|(_, two)| two.0)),
            "ratio": median(rounds.iter().map(|(one, two)| two.0 / one.0)),
            "failed_per_1000": median(rounds.iter().map(|(_, two)| two.1)),
        })
    });
    rows.collect()
}
