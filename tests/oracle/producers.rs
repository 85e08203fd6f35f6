//! Several producers on one receive queue, and a driver that sleeps.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pollux::virtio::claim::Published;
use pollux::virtio::{NoClaim, ReceiveQueue, RingFeatures};

use crate::guest::*;
use crate::{Random, with_seeds};

const PRODUCERS: usize = 3;
const FRAMES: usize = 2000;
const BUFFER: u32 = 256;
const PATIENCE: Duration = Duration::from_secs(20);

/// A frame that says who sent it, as its how many-eth, in a pattern over all its length.
fn numbered(producer: usize, number: usize, len: usize) -> Vec<u8> {
    let mut bytes = frame((producer * 31 + number) as u8, len);
    bytes[0] = producer as u8;
    bytes[1..5].copy_from_slice(&(number as u32).to_le_bytes());
    bytes
}

fn produce(queue: &ReceiveQueue, producer: usize, longest: usize, seed: u64, called: &Called) {
    let mut random = Random(seed);
    let start = Instant::now();
    let mut sent = 0;
    while sent < FRAMES {
        // Where the driver failed, nobody makes room any more.
        assert!(start.elapsed() < PATIENCE, "the driver makes no room");
        let count = random.between(1, 8).min((FRAMES - sent) as u64) as usize;
        let frames: Vec<Vec<u8>> = (sent..sent + count)
            .map(|number| {
                numbered(
                    producer,
                    number,
                    random.between(14, longest as u64) as usize,
                )
            })
            .collect();
        let (done, reason) = deliver(queue, &frames);
        assert_ne!(reason, Some(NoClaim::Broken));
        assert_ne!(reason, Some(NoClaim::TooLong));
        while queue.publish() == Published::Again {}
        if queue.take_call_wanted() {
            called.signal();
        }
        sent += done;
        if done == 0 {
            std::thread::yield_now();
        }
    }
}

/// A call that wakes the driver.
struct Called {
    flag: AtomicBool,
    driver: std::thread::Thread,
    signals: AtomicUsize,
}

impl Called {
    fn signal(&self) {
        self.signals.fetch_add(1, Ordering::Relaxed);
        self.flag.store(true, Ordering::Release);
        self.driver.unpark();
    }

    /// Sleeps until called; a call that never comes is the failure looked for.
    fn wait(&self) {
        let start = Instant::now();
        while !self.flag.swap(false, Ordering::Acquire) {
            assert!(start.elapsed() < PATIENCE, "a lost wake-up");
            std::thread::park_timeout(Duration::from_secs(1));
        }
    }
}

/// The driver: posts what it can, takes what came, sleeps when there is nothing.
struct Consumer<'g> {
    guest: &'g Guest,
    driver: Driver<'g>,
    places: Vec<u64>,
    by_id: HashMap<u16, u64>,
    numbers: [usize; PRODUCERS],
}

impl<'g> Consumer<'g> {
    fn new(guest: &'g Guest, base: u16) -> Self {
        let places = (0..u64::from(guest.size())).map(|i| DATA + i * u64::from(BUFFER));
        Consumer {
            guest,
            driver: guest.driver_at(base),
            places: places.collect(),
            by_id: HashMap::new(),
            numbers: [0; PRODUCERS],
        }
    }

    fn post(&mut self) {
        while let Some(place) = self.places.pop() {
            let id = self.driver.post(&[writable(place, BUFFER)]);
            self.by_id.insert(id, place);
        }
    }

    fn bytes(&mut self, (id, len): (u16, u32)) -> Vec<u8> {
        let place = self.by_id.remove(&id).unwrap();
        self.places.push(place);
        self.guest.read(place, len)
    }

    /// Takes one frame; its buffers became visible together.
    fn take(&mut self) -> bool {
        let Some(first) = self.driver.reap() else {
            return false;
        };
        let mut bytes = self.bytes(first);
        for _ in 1..u16::from_le_bytes([bytes[10], bytes[11]]) {
            let next = self.driver.reap().expect("a frame is visible as a whole");
            bytes.extend(self.bytes(next));
        }
        let frame = &bytes[HEADER..];
        let producer = usize::from(frame[0]);
        let expected = numbered(producer, self.numbers[producer], frame.len());
        assert!(frame == expected, "frame {}", self.numbers[producer]);
        self.numbers[producer] += 1;
        true
    }

    fn run(&mut self, called: &Called) {
        while self.numbers != [FRAMES; PRODUCERS] {
            self.post();
            if !self.take() && !self.driver.arm(true) {
                called.wait();
            }
        }
    }
}

fn several_producers(size: u16, packed: bool, base: u16, random: &mut Random) {
    let features = RingFeatures {
        event_idx: true,
        ..features(packed)
    };
    let guest = Guest::new(size, features);
    let mut consumer = Consumer::new(&guest, base);
    let queue = ReceiveQueue::start(&guest.setup(u32::from(base))).unwrap();
    let longest = (usize::from(size) * BUFFER as usize - HEADER).min(1000);
    let called = Called {
        flag: AtomicBool::new(false),
        driver: std::thread::current(),
        signals: AtomicUsize::new(0),
    };
    std::thread::scope(|scope| {
        for producer in 0..PRODUCERS {
            let (queue, called, seed) = (&queue, &called, random.below(1 << 30));
            scope.spawn(move || produce(queue, producer, longest, seed, called));
        }
        consumer.run(&called);
    });
    assert!(called.signals.load(Ordering::Relaxed) > 0);
    assert_eq!(queue.broken(), None);
}

#[test]
fn several_producers_deliver_every_frame_whole_in_order_and_wake_the_driver_split() {
    with_seeds(1, |random| {
        for size in [1, 2, 8, 256] {
            several_producers(size, false, 65500, random);
        }
    });
}

#[test]
fn several_producers_deliver_every_frame_whole_in_order_and_wake_the_driver_packed() {
    with_seeds(1, |random| {
        for size in [1, 2, 3, 8, 320] {
            several_producers(size, true, size - 1, random);
        }
    });
}
