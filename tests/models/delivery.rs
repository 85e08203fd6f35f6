//! (a) Producers deliver through `Claims` into a model ring; a driver consumes, arms its event, and
//! sleeps.
//!
//! Checked: no slot lost or doubled; the used index never goes back; no entry visible before its
//! data; a claim visible as a whole; no call missed; everything published when all are done.
//! Included once for every `claim.rs`.

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use super::claim::{Claims, Publish, Published};
use crate::delivery_models::{Fault, Kind, Scenario};
use crate::sync::Shared;

/// What stands at a position once it is filled: first position and length of its claim, and the
/// frame's number.
#[derive(Clone, Copy, Default)]
struct Entry {
    first: u64,
    count: u64,
    frame: u64,
}

struct Ring {
    kind: Kind,
    size: u64,
    fault: Fault,
    /// The driver offers positions before this one.
    available: AtomicU64,
    /// Split: `used.idx`.
    used: AtomicU64,
    /// Packed: by slot, the position whose element was written last, plus one.
    flags: Box<[AtomicU64]>,
    /// Buffer and used element by slot.
    entries: Box<[Shared<Entry>]>,
    /// Packed: elements, which the publisher writes.
    elements: Box<[Shared<Entry>]>,
    /// Every position before this one was published, as the holders of the token know it.
    visible: Shared<u64>,
    /// The driver wants a call when this position becomes visible.
    event: AtomicU64,
    /// The call eventfd.
    called: AtomicBool,
    /// For the mutant that tests the event against its own claim.
    own: loom::sync::Mutex<Vec<(loom::thread::ThreadId, u64, u64)>>,
}

impl Ring {
    fn new(scenario: &Scenario) -> Self {
        let size = scenario.size;
        let offered = scenario.start + if scenario.hasty { 64 * size } else { size };
        Ring {
            kind: scenario.kind,
            size,
            fault: scenario.fault,
            available: AtomicU64::new(offered),
            used: AtomicU64::new(scenario.start),
            flags: (0..size).map(|_| AtomicU64::new(0)).collect(),
            entries: (0..size).map(|_| Shared::new(Entry::default())).collect(),
            elements: (0..size).map(|_| Shared::new(Entry::default())).collect(),
            visible: Shared::new(scenario.start),
            event: AtomicU64::new(scenario.start),
            called: AtomicBool::new(false),
            own: loom::sync::Mutex::new(Vec::new()),
        }
    }

    fn slot(&self, position: u64) -> usize {
        (position % self.size) as usize
    }

    fn fill(&self, p: u64, n: u64, frame: u64) {
        for position in p..p + n {
            self.entries[self.slot(position)].set(Entry {
                first: p,
                count: n,
                frame,
            });
        }
    }

    /// Whether the driver finds `position` used.
    fn is_used(&self, position: u64) -> bool {
        match self.kind {
            Kind::Split => self.used.load(Ordering::Acquire) > position,
            Kind::Packed => self.flags[self.slot(position)].load(Ordering::Acquire) == position + 1,
        }
    }

    fn element(&self, position: u64) -> Entry {
        match self.kind {
            Kind::Split => self.entries[self.slot(position)].get(),
            Kind::Packed => {
                let element = self.elements[self.slot(position)].get();
                // The data, too, not only the used element.
                assert_eq!(self.entries[self.slot(position)].get().frame, element.frame);
                element
            }
        }
    }

    fn write_flags(&self, position: u64) {
        let order = match self.fault {
            Fault::RelaxedFlags => Ordering::Relaxed,
            _ => Ordering::Release,
        };
        self.flags[self.slot(position)].store(position + 1, order);
    }
}

impl Publish for Ring {
    fn publish(&self, from: u64, to: u64) {
        assert_eq!(self.visible.get(), from, "published in order, once");
        assert!(from < to, "published in order, once");
        self.visible.set(to);
        match self.kind {
            Kind::Split => {
                let order = match self.fault {
                    Fault::RelaxedIndex => Ordering::Relaxed,
                    _ => Ordering::Release,
                };
                self.used.store(to, order);
            }
            Kind::Packed => {
                for position in from..to {
                    let slot = self.slot(position);
                    self.elements[slot].set(self.entries[slot].get());
                }
                if self.fault == Fault::FirstFlagsFirst {
                    self.write_flags(from);
                }
                for position in from + 1..to {
                    self.write_flags(position);
                }
                self.write_flags(from);
            }
        }
    }

    fn wants_call(&self, from: u64, to: u64) -> bool {
        let event = self.event.load(Ordering::Relaxed);
        if self.fault == Fault::OwnRange {
            let me = loom::thread::current().id();
            let own = self.own.lock().unwrap();
            return own.iter().any(|(thread, first, end)| {
                *thread == me && (*first.max(&from)..*end.min(&to)).contains(&event)
            });
        }
        (from..to).contains(&event)
    }
}

/// One poll thread: claims for each of `frames` (numbers of buffers), then settles and calls.
/// Returns what was delivered.
fn produce(claims: &Claims, ring: &Ring, frames: &[u64], name: u64) -> Vec<u64> {
    let mut delivered = Vec::new();
    let mut last = Published::Clean;
    for (index, &n) in frames.iter().enumerate() {
        // As in ReceiveQueue::claim: bounded tries, and fewer frames when the ring is full.
        for _ in 0..3 {
            let p = claims.next();
            let available = ring.available.load(Ordering::Acquire);
            if p + n > available.min(p + claims.room(p)) {
                break;
            }
            if !claims.try_claim(p, n as u16) {
                continue;
            }
            let frame = name * 10 + index as u64;
            if ring.fault == Fault::OwnRange {
                let me = loom::thread::current().id();
                ring.own.lock().unwrap().push((me, p, p + n));
            }
            if ring.fault == Fault::CommitFirst {
                claims.commit(p, n as u16);
                ring.fill(p, n, frame);
            } else {
                ring.fill(p, n, frame);
                claims.commit(p, n as u16);
            }
            delivered.push(frame);
            last = claims.try_publish(ring);
            break;
        }
    }
    while last == Published::Again {
        last = claims.try_publish(ring);
    }
    if claims.take_call_wanted() {
        ring.called.swap(true, Ordering::AcqRel);
    }
    delivered
}

/// The driver: position of the next used entry, frames received, and whether it sleeps.
struct Driver {
    next: u64,
    frames: Vec<u64>,
    asleep: bool,
}

impl Driver {
    fn consume(&mut self, ring: &Ring) {
        while ring.is_used(self.next) {
            let first = ring.element(self.next);
            assert_eq!(
                first.first, self.next,
                "a claim begins where the last ended"
            );
            for position in self.next..self.next + first.count {
                assert!(ring.is_used(position), "a claim is visible as a whole");
                let entry = ring.element(position);
                assert_eq!((entry.first, entry.frame), (first.first, first.frame));
            }
            self.frames.push(first.frame);
            self.next += first.count;
            // The buffers are offered again, one lap later.
            ring.available
                .store(self.next + ring.size, Ordering::Release);
        }
    }

    fn run(mut self, ring: &Ring, rounds: usize) -> Self {
        for _ in 0..rounds {
            ring.called.swap(false, Ordering::AcqRel);
            self.consume(ring);
            ring.event.store(self.next, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if !ring.is_used(self.next) {
                self.asleep = true;
                break;
            }
        }
        self
    }
}

pub fn run(scenario: &Scenario) {
    let claims = Arc::new(Claims::new(scenario.size as u16, scenario.start));
    let ring = Arc::new(Ring::new(scenario));
    let driver = Driver {
        next: scenario.start,
        frames: Vec::new(),
        asleep: false,
    };
    let producers: Vec<_> = scenario.producers[1..]
        .iter()
        .enumerate()
        .map(|(name, &frames)| {
            let (claims, ring) = (claims.clone(), ring.clone());
            loom::thread::spawn(move || produce(&claims, &ring, frames, name as u64 + 2))
        })
        .collect();
    let rounds = scenario.driver_rounds;
    let driver = {
        let ring = ring.clone();
        loom::thread::spawn(move || driver.run(&ring, rounds))
    };
    let mut sent = produce(&claims, &ring, scenario.producers[0], 1);
    for producer in producers {
        sent.extend(producer.join().unwrap());
    }
    let mut driver = driver.join().unwrap();

    assert_eq!(claims.published(), claims.next(), "everything is published");
    if scenario.hasty {
        // Its buffers were overwritten, at its own risk; the queue must not stick.
        return;
    }
    assert!(
        !(driver.asleep && ring.is_used(driver.next)) || ring.called.load(Ordering::Acquire),
        "the driver sleeps on work, and nobody called"
    );
    driver.consume(&ring);
    assert_eq!(
        driver.next,
        claims.published(),
        "the driver found all of it"
    );
    let mut received = driver.frames;
    received.sort_unstable();
    sent.sort_unstable();
    assert_eq!(received, sent, "every frame once");
}
