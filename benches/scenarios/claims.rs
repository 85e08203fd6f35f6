//! Several threads that deliver into one receive ring, with nothing else in the loop.
//!
//! There is no driver: whoever has published makes the same buffers available again. So the figure is the cost of claim,
//! fill, commit and publish, and of the two cores' contention for them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use pollux::virtio::driver::RingAreas;
use pollux::virtio::{Claim, NoClaim, ReceiveQueue};
use serde_json::{Value, json};

use crate::rig::Rig;
use crate::{Effort, median, plan};

const FRAME: [u8; 76] = [0x5a; 76];
const LEN: u32 = 64;
/// Offset of the available index.
const INDEX: usize = 2;

/// A receive ring whose buffers come back by themselves.
struct Recycled<'m> {
    queue: ReceiveQueue,
    areas: RingAreas<'m>,
    busy: AtomicBool,
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
        if !self.busy.swap(true, Ordering::AcqRel) {
            let end = self.queue.published() + u64::from(self.queue.size());
            let available = &self.areas.available;
            available.store_u16(INDEX, end as u16, Ordering::Release);
            self.busy.swap(false, Ordering::AcqRel);
        }
    }

    fn deliver(&self, frames: usize, until: Instant) -> Done {
        let lengths = vec![LEN; frames];
        let mut claim = Claim::new();
        let mut done = Done::default();
        loop {
            for _ in 0..256 {
                match self.queue.claim(lengths.iter().copied(), &mut claim) {
                    Ok(()) => {
                        for index in 0..claim.frames() {
                            let whole = claim.whole(index, FRAME.len()).unwrap();
                            whole.write_bytes(0, &FRAME);
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
fn sample(threads: usize, frames: usize, effort: &Effort) -> (f64, f64) {
    let rig = Rig::new(plan(2, 64), &[(0, 1), (1, 0)]).unwrap();
    let _guests = rig.guests().unwrap();
    let ring = Recycled {
        queue: rig.receive_queue(1),
        areas: rig.receive_areas(1),
        busy: AtomicBool::new(false),
    };
    let ring = &ring;
    let start = Instant::now();
    let done: Vec<Done> = std::thread::scope(|scope| {
        let threads = (0..threads).map(|n| {
            scope.spawn(move || {
                effort.pin(n);
                ring.deliver(frames, start + effort.time)
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
    let rows = frames.iter().map(|&frames| {
        let rounds: Vec<_> = (0..effort.rounds)
            .map(|_| (sample(1, frames, effort), sample(2, frames, effort)))
            .collect();
        json!({
            "frames": frames,
            "one_mpps": median(rounds.iter().map(|(one, _)| one.0)),
            "two_mpps": median(rounds.iter().map(|(_, two)| two.0)),
            "ratio": median(rounds.iter().map(|(one, two)| two.0 / one.0)),
            "failed_per_1000": median(rounds.iter().map(|(_, two)| two.1)),
        })
    });
    rows.collect()
}
