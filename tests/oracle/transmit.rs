//! Transmit queues of both kinds, against another implementation of the device on a memory with the
//! same bytes.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use pollux::virtio::chain::{ChainError, MAX_CHAIN, Windows};
use pollux::virtio::{FullBarrier, RingFeatures, Taken, TransmitQueue};

use crate::guest::*;
use crate::packed_reference::{EVENT_DESC, EVENT_ENABLE, NEXT, WRITE};
use crate::reference::{Reference, common_bytes, post_both, set_event};
use crate::{Random, shuffled, with_seeds};

/// What both devices must find in a chain.
#[derive(Debug)]
enum Expected {
    Good,
    /// We refuse it; the reference silently yields this many buffers of it.
    Bad(ChainError, usize),
}

/// Most descriptors of a chain: some of them are of two pieces, and a chain has no more than 1024.
const LONG_CHAIN: u64 = 700;
/// Places for tables of so many.
const LONG_TABLES: u64 = 32;

/// Our queue and the reference, each on a memory of its own.
struct Twins<'g> {
    ours: &'g Guest,
    theirs: &'g Guest,
    queue: &'g TransmitQueue,
    reference: Reference<'g>,
    drivers: [Driver<'g>; 2],
    expected: VecDeque<Expected>,
    /// Ends of the chains in flight.
    ends: VecDeque<u64>,
    tables: u64,
}

impl<'g> Twins<'g> {
    fn new(ours: &'g Guest, theirs: &'g Guest, queue: &'g TransmitQueue, base: u16) -> Self {
        let drivers = [ours.driver_at(base), theirs.driver_at(base)];
        assert!(
            queue.take_call_wanted(&FullBarrier::new()),
            "the driver is called at the start"
        );
        Twins {
            ours,
            theirs,
            queue,
            reference: Reference::new(theirs, base),
            drivers,
            expected: VecDeque::new(),
            ends: VecDeque::new(),
            tables: 0,
        }
    }

    fn pieces(&self, random: &mut Random, most: u64) -> Vec<Piece> {
        let piece = |random: &mut Random| {
            let len = match random.below(6) {
                0 => 0,
                1 => random.between(1, 12),
                2 => random.between(1, 70_000),
                _ => random.between(1, 2000),
            };
            let addr = match random.below(8) {
                0 => SEAM - random.below(3000).min(len),
                1 => HOLE - len,
                _ => DATA + random.below(0x10_0000),
            };
            readable(addr, len as u32)
        };
        let count = random.between(1, most);
        (0..count).map(|_| piece(random)).collect()
    }

    /// Writes a table into both memories.
    fn table(&mut self, pieces: &[Piece]) -> Piece {
        // More places than chains in flight at once: of long ones, than are not taken yet.
        let at = if pieces.len() > 16 {
            assert!(self.expected.len() < LONG_TABLES as usize);
            DATA + 0x16_0000 + (self.tables % LONG_TABLES) * 0x4000
        } else {
            DATA + 0x12_0000 + (self.tables % 1024) * 0x100
        };
        self.tables += 1;
        self.ours.table(at, pieces);
        self.theirs.table(at, pieces)
    }

    fn post(&mut self, random: &mut Random) {
        let free = u64::from(self.drivers[0].free());
        if free == 0 {
            return;
        }
        let long = random.chance(20) && self.expected.len() < LONG_TABLES as usize;
        let most = if long { LONG_CHAIN } else { 8 };
        let pieces = if random.chance(3) && self.ours.size() <= 1024 {
            let mut buffers = self.pieces(random, most);
            if self.ours.features.packed && random.chance(3) {
                // DPDK's driver does, and nobody writes there.
                buffers[0].flags |= WRITE;
            }
            vec![self.table(&buffers)]
        } else {
            self.pieces(random, free.min(most))
        };
        post_both(&mut self.drivers, &pieces, random);
        self.expected.push_back(Expected::Good);
    }

    /// Posts a packed chain that no driver may post. The reference checks neither addresses nor
    /// directions, and takes every table as it comes.
    fn post_malformed_packed(&mut self, random: &mut Random) {
        let good = readable(DATA, 64);
        let mut pieces = vec![good; random.between(1, 3) as usize];
        let (any, count) = (random.below(pieces.len() as u64) as usize, pieces.len());
        let expected = match random.below(6) {
            0 => {
                pieces[any].addr = HOLE;
                Expected::Bad(ChainError::Unmapped(HOLE), count)
            }
            1 => {
                pieces[any].flags = WRITE;
                Expected::Bad(ChainError::Direction, count)
            }
            // A table beside other descriptors: with NEXT, or behind one.
            2 => {
                pieces.push(good);
                let at = random.below(pieces.len() as u64) as usize;
                pieces[at] = self.table(&[good; 2]);
                Expected::Bad(ChainError::Indirect, count + 2)
            }
            3 => {
                pieces = vec![self.table(&[good; 2])];
                let (len, entries) =
                    [(0, 0), (31, 1), (33, 2), (16 * 1025, 1025)][random.below(4) as usize];
                pieces[0].len = len;
                Expected::Bad(ChainError::Indirect, entries)
            }
            4 => {
                let inner = self.table(&[good]);
                let mut entries = [good; 3];
                entries[any] = inner;
                pieces = vec![self.table(&entries)];
                Expected::Bad(ChainError::Indirect, 3)
            }
            _ => {
                let mut entries = [good; 3];
                entries[any].addr = HOLE;
                pieces = vec![self.table(&entries)];
                Expected::Bad(ChainError::Unmapped(HOLE), 3)
            }
        };
        if pieces.len() <= usize::from(self.drivers[0].free()) {
            post_both(&mut self.drivers, &pieces, random);
            self.expected.push_back(expected);
        }
    }

    /// Posts a split chain that no driver may post. `virtio_queue` checks neither addresses nor
    /// directions, and shortens a chain at its first impossible link.
    fn post_malformed(&mut self, random: &mut Random) {
        if self.ours.features.packed {
            return self.post_malformed_packed(random);
        }
        if self.drivers[0].free() < 3 {
            return;
        }
        let size = self.ours.size();
        let good = readable(DATA, 64);
        let mut pieces = vec![good; random.between(1, 3) as usize];
        let count = pieces.len();
        let (mut flags, mut next) = (0, 0);
        let expected = match random.below(6) {
            0 => {
                (flags, next) = (NEXT, size);
                Expected::Bad(ChainError::NextOutside(size), count)
            }
            1 => {
                pieces = vec![self.table(&[good; 2])];
                pieces[0].len -= 1;
                Expected::Bad(ChainError::Indirect, 0)
            }
            2 => {
                pieces[0].addr = HOLE;
                Expected::Bad(ChainError::Unmapped(HOLE), count)
            }
            3 => {
                pieces[count - 1].flags = WRITE;
                Expected::Bad(ChainError::Direction, count)
            }
            4 => {
                let inner = self.table(&[good]);
                pieces = vec![self.table(&[good, inner])];
                Expected::Bad(ChainError::Indirect, 1)
            }
            _ => return self.post_loop(),
        };
        self.offer(&pieces, flags, next);
        self.expected.push_back(expected);
    }

    /// A chain whose one descriptor is its own successor: the reference takes it as many times as
    /// the ring is long.
    fn post_loop(&mut self) {
        let head = self.drivers[0].split().next_head();
        let empty = [readable(DATA, 0)];
        self.offer(&empty, NEXT, head);
        let count = usize::from(self.ours.size());
        let error = if count > MAX_CHAIN {
            ChainError::TooManyBuffers
        } else {
            ChainError::Loop
        };
        self.expected.push_back(Expected::Bad(error, count));
    }

    fn offer(&mut self, pieces: &[Piece], flags: u16, next: u16) {
        for driver in &mut self.drivers {
            let driver = driver.split();
            let head = driver.prepare(pieces, flags, next);
            driver.offer_raw(head);
        }
    }

    fn take(&mut self) {
        let mut windows = Windows::<'_, MAX_CHAIN>::new();
        let taken = take(self.queue, self.queue.available_to(), &mut windows);
        let theirs = self.reference.take(self.theirs);
        let Some(expected) = self.expected.pop_front() else {
            assert_eq!((taken, theirs), (Taken::Nothing, None));
            return;
        };
        let theirs = theirs.unwrap();
        self.ends.push_back(self.queue.position());
        match expected {
            Expected::Bad(error, count) => {
                assert_eq!(taken, Taken::Malformed(error));
                assert_eq!((theirs.len(), windows.len()), (count, 0), "{error:?}");
            }
            Expected::Good => {
                let len = theirs.iter().map(|buffer| buffer.1).sum();
                assert_eq!(taken, Taken::Chain { len });
                let ours: Vec<(usize, usize)> =
                    windows.iter().map(|w| (w.address(), w.len())).collect();
                assert_eq!(ours, host_places(self.ours, &theirs));
            }
        }
    }

    fn complete(&mut self, random: &mut Random) {
        if self.ends.is_empty() {
            return;
        }
        let count = random.between(1, self.ends.len() as u64) as usize;
        self.complete_oldest(count);
    }

    fn complete_oldest(&mut self, count: usize) {
        let end = self.ends.drain(..count).next_back().unwrap();
        self.queue.complete(end);
        let event_idx = self.ours.features.event_idx;
        let call = self.reference.complete(&vec![0; count], event_idx);
        assert_eq!(self.queue.take_call_wanted(&FullBarrier::new()), call);
        self.compare_rings();
    }

    fn compare_rings(&self) {
        let unreturned = self.queue.completed()..self.queue.position();
        assert!(
            common_bytes(self.ours, unreturned.clone()) == common_bytes(self.theirs, unreturned),
            "the rings have the same bytes"
        );
    }

    fn reap(&mut self) {
        let [ours, theirs] = &mut self.drivers;
        assert_eq!(ours.reap_all(), theirs.reap_all());
    }

    fn arm(&mut self) {
        assert_eq!(!self.queue.arm(), self.reference.arm());
        if self.ours.features.packed {
            let area = self.ours.areas().used.load_u32(0, Ordering::Relaxed);
            if self.ours.features.event_idx {
                let wanted = u32::from(self.reference.next()) | u32::from(EVENT_DESC) << 16;
                assert_eq!(area, wanted);
            } else {
                assert_eq!(area >> 16, u32::from(EVENT_ENABLE));
            }
        } else {
            self.compare_rings();
        }
        self.queue.disarm();
        self.reference.disarm();
    }

    fn run(&mut self, random: &mut Random, steps: u32) {
        for _ in 0..steps {
            match random.below(10) {
                0..=2 => self.post(random),
                3 => self.post_malformed(random),
                4..=6 => self.take(),
                7 => self.complete(random),
                8 => self.reap(),
                _ if random.chance(3) => self.arm(),
                _ => set_event(self.ours, &mut self.drivers, random),
            }
        }
        while !self.expected.is_empty() {
            self.take();
        }
        // What GET_VRING_BASE answers once everything is back.
        let next = self.reference.next();
        while !self.ends.is_empty() {
            self.complete(random);
        }
        assert_eq!(self.queue.base() as u16, next);
        self.reap();
        assert_eq!(self.drivers[0].free(), self.ours.size());
        assert_eq!(self.queue.broken(), None);
    }
}

/// Where guest buffers are mapped here, region by region.
fn host_places(guest: &Guest, buffers: &[(u64, u32)]) -> Vec<(usize, usize)> {
    let mut places = Vec::new();
    for &(addr, len) in buffers {
        let whole = guest.map.windows(addr, len, |window| {
            places.push((window.address(), window.len()));
            true
        });
        assert!(whole);
    }
    places
}

fn transmit_like_the_reference(
    size: u16,
    packed: bool,
    base: u16,
    random: &mut Random,
    steps: u32,
) {
    let features = RingFeatures {
        event_idx: random.chance(2),
        ..features(packed)
    };
    let (ours, theirs) = (Guest::new(size, features), Guest::new(size, features));
    // The driver zeroes and numbers the ring before the device starts.
    drop(ours.driver_at(base));
    let queue = TransmitQueue::start(&ours.setup(u32::from(base))).unwrap();
    Twins::new(&ours, &theirs, &queue, base).run(random, steps);
}

#[test]
fn split_transmit_queues_do_what_virtio_queue_does() {
    with_seeds(20, |random| {
        for size in [1, 2, 4, 16, 256, 32768] {
            let base = random.below(65536) as u16;
            let steps = if size > 1000 { 300 } else { 1500 };
            transmit_like_the_reference(size, false, base, random, steps);
            let near_the_wrap = 65535 - random.below(40) as u16;
            transmit_like_the_reference(size, false, near_the_wrap, random, steps);
        }
    });
}

#[test]
fn packed_transmit_queues_do_what_the_specification_says() {
    with_seeds(20, |random| {
        for size in [1, 2, 3, 7, 16, 320, 997, 32767, 32768] {
            let steps = if size > 1000 { 300 } else { 1500 };
            let wrap = random.below(2) as u16 * 0x8000;
            let anywhere = random.below(u64::from(size)) as u16;
            transmit_like_the_reference(size, true, anywhere | wrap, random, steps);
            let near_the_wrap = size - 1 - random.below(u64::from(size).min(9)) as u16;
            transmit_like_the_reference(size, true, near_the_wrap | wrap, random, steps);
        }
    });
}

/// All descriptors of a ring are out at once, and come back in one run.
fn a_whole_ring(size: u16, base: u16, random: &mut Random) {
    let features = RingFeatures {
        event_idx: true,
        ..features(true)
    };
    let (ours, theirs) = (Guest::new(size, features), Guest::new(size, features));
    drop(ours.driver_at(base));
    let queue = TransmitQueue::start(&ours.setup(u32::from(base))).unwrap();
    let mut twins = Twins::new(&ours, &theirs, &queue, base);
    let ids = shuffled(size, random);
    for lap in 0..3 {
        for &id in &ids {
            // The first lap of single descriptors, then some chains of several.
            let most = if lap == 0 { 1 } else { 3 };
            let most = twins.drivers[0].free().min(most);
            if most == 0 {
                break;
            }
            let pieces = twins.pieces(random, u64::from(most));
            for driver in &mut twins.drivers {
                driver.packed().post(id, &pieces);
            }
            twins.expected.push_back(Expected::Good);
        }
        assert_eq!(twins.drivers[0].free(), 0);
        let before = queue.position();
        while !twins.expected.is_empty() {
            twins.take();
        }
        assert_eq!(queue.position() - before, u64::from(size));
        set_event(&ours, &mut twins.drivers, random);
        twins.complete_oldest(twins.ends.len());
        twins.reap();
        assert_eq!(twins.drivers[0].free(), size);
    }
}

#[test]
fn a_packed_transmit_queue_of_the_largest_sizes_has_all_its_descriptors_out_at_once() {
    with_seeds(1, |random| {
        for size in [3, 320, 32767, 32768] {
            a_whole_ring(size, 0x8000, random);
            let anywhere = random.below(u64::from(size)) as u16;
            a_whole_ring(size, anywhere, random);
        }
    });
}
