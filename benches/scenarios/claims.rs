//! Several threads that deliver into one receive ring, with nothing else in the loop.
//!
//! There is no driver: whoever has published makes the same buffers available again, 32 at once as
//! drivers do. So the figure is the cost of claim, fill, commit and publish, and of the two cores'
//! contention for them. One thread alone has every line of ring and buffers in its own cache, which
//! beside a driver it never has. How much of two threads' loss is the machine's is what
//! [`Unprotected`] says: the same copies with nothing to keep them from going wrong.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crossbeam_utils::CachePadded;
use pollux::memory::SharedMemory;
use pollux::virtio::claim::Published;
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
/// Entries of the rings.
const RING: usize = 256;
/// Offset of the available index.
const INDEX: usize = 2;

/// A receive ring whose buffers come back by themselves.
struct Recycled<'m> {
    queue: ReceiveQueue,
    areas: RingAreas<'m>,
    /// Twice the available index, in 64 bits; odd while somebody moves it. One line: it is not what
    /// is measured.
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
        let mut owed = Published::Clean;
        loop {
            for _ in 0..256 {
                match self.queue.claim(lengths.iter().copied(), &mut claim) {
                    Ok(()) => {
                        for index in 0..claim.frames() {
                            let whole = claim.whole(index, frame.len()).unwrap();
                            whole.write_bytes(0, frame);
                        }
                        owed = self.queue.commit(&claim);
                        done.frames += claim.frames() as u64;
                        done.claims += 1;
                    }
                    Err(NoClaim::Contended) => done.failed += 1,
                    Err(NoClaim::Full) => {}
                    Err(other) => panic!("{other:?}"),
                }
                // As a poll thread does before its pass ends: nobody else publishes what is left
                // over here.
                if owed == Published::Again {
                    owed = self.queue.publish();
                }
                self.recycle();
            }
            if Instant::now() >= until {
                return done;
            }
        }
    }
}

/// The bound: positions are shared out by one addition, lines asked for, frames copied, elements
/// written, another addition, the index. Nobody looks for room, for what the driver wants or for
/// what others have filled.
struct Unprotected {
    next: CachePadded<AtomicU64>,
    filled: CachePadded<AtomicU64>,
    index: CachePadded<AtomicU64>,
    used: Box<[AtomicU64]>,
    memory: SharedMemory,
}

/// Lines of a buffer, as guests have them for short frames: the header at the end of the first.
const LINES: usize = 3;
const LINE: usize = 64;

impl Unprotected {
    fn new() -> Self {
        let position = || CachePadded::new(AtomicU64::new(0));
        Unprotected {
            next: position(),
            filled: position(),
            index: position(),
            used: (0..RING).map(|_| AtomicU64::new(0)).collect(),
            memory: SharedMemory::create(RING * LINES * LINE, false).unwrap(),
        }
    }

    fn deliver(&self, frames: usize, until: Instant) -> Done {
        let mut done = Done::default();
        let frame = &FRAME[..HEADER + SIZES[0]];
        let buffer = |place| place * LINES * LINE + LINE - HEADER;
        let buffers = (0..RING).map(|at| self.memory.window(buffer(at), frame.len()).unwrap());
        let buffers: Vec<_> = buffers.collect();
        while Instant::now() < until {
            for _ in 0..256 {
                let position = self.next.fetch_add(frames as u64, Ordering::AcqRel);
                let places = (position..).take(frames).map(|at| at as usize % RING);
                for place in places.clone() {
                    buffers[place].prefetch_write_all();
                }
                for place in places.clone() {
                    buffers[place].write_bytes(0, frame);
                }
                for place in places {
                    self.used[place].store(position, Ordering::Relaxed);
                }
                let filled = self.filled.fetch_add(frames as u64, Ordering::AcqRel);
                self.index.store(filled, Ordering::Release);
                done.frames += frames as u64;
                done.claims += 1;
            }
        }
        done
    }
}

/// Million frames a second of `threads` that all `deliver`, and failed claims per thousand.
fn timed(threads: usize, effort: &Effort, deliver: impl Fn(Instant) -> Done + Sync) -> (f64, f64) {
    let (start, deliver) = (Instant::now(), &deliver);
    let done: Vec<Done> = std::thread::scope(|scope| {
        let threads = (0..threads).map(|n| {
            scope.spawn(move || {
                effort.pin(n);
                deliver(start + effort.time)
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
    let tries = (total.claims + total.failed).max(1) as f64;
    let failed = total.failed as f64 * 1000.0 / tries;
    (total.frames as f64 / seconds / 1e6, failed)
}

/// One sample of claims.
fn sample(threads: usize, frames: usize, size: usize, effort: &Effort) -> (f64, f64) {
    let rig = Rig::new(plan(2, size), &[(0, 1), (1, 0)]).unwrap();
    let _guests = rig.guests().unwrap();
    let ring = Recycled {
        queue: rig.receive_queue(1),
        areas: rig.receive_areas(1),
        available: CachePadded::new(AtomicU64::new(0)),
    };
    timed(threads, effort, |until| ring.deliver(frames, size, until))
}

/// One sample without any protection.
fn unprotected(threads: usize, frames: usize, effort: &Effort) -> (f64, f64) {
    let ring = Unprotected::new();
    timed(threads, effort, |until| ring.deliver(frames, until))
}

/// Two threads against one, in turn.
fn against_one(
    (frames, size): (usize, usize),
    effort: &Effort,
    sample: impl Fn(usize) -> (f64, f64),
) -> Value {
    let both = |_| [1, 2].map(&sample);
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
}

pub(crate) fn measure(frames: &[usize], effort: &Effort) -> Value {
    let kinds = SIZES
        .iter()
        .flat_map(|&size| frames.iter().map(move |&frames| (frames, size)));
    let claims = kinds.map(|(frames, size)| {
        let one = |threads| sample(threads, frames, size, effort);
        against_one((frames, size), effort, one)
    });
    let bound = frames.iter().map(|&frames| {
        let one = |threads| unprotected(threads, frames, effort);
        against_one((frames, SIZES[0]), effort, one)
    });
    json!({
        "claims": claims.collect::<Vec<_>>(),
        "unprotected": bound.collect::<Vec<_>>(),
    })
}
