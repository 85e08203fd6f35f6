//! Transmit queues of both kinds, against another implementation of the device on a memory with the same bytes.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use pollux::virtio::chain::{ChainError, Windows};
use pollux::virtio::{FullBarrier, RingFeatures, Taken, TransmitQueue};
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::guest::*;
use crate::packed_reference::{self, Device, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, NEXT, Place};
use crate::{Random, with_seeds};

/// The other implementation of the device.
enum Reference<'g> {
    Split {
        queue: Box<Queue>,
        memory: GuestMemoryMmap,
        taken: VecDeque<u16>,
    },
    Packed {
        device: Device<'g>,
        taken: VecDeque<(u16, u16, u32)>,
    },
}

impl<'g> Reference<'g> {
    fn new(guest: &'g Guest, base: u16) -> Self {
        if guest.features.packed {
            let place = Place {
                slot: base & 0x7fff,
                wrap: base & 0x8000 != 0,
            };
            return Reference::Packed {
                device: Device::new(guest.areas(), place),
                taken: VecDeque::new(),
            };
        }
        let file = |offset| FileOffset::new(guest.memory.file().try_clone().unwrap(), offset);
        let len = LEN as usize;
        let memory = GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(START), len, Some(file(LEN))),
            (GuestAddress(SEAM), len, Some(file(0))),
        ])
        .unwrap();
        let (descriptors, available, used) = guest.places();
        let mut queue = Queue::new(guest.size()).unwrap();
        queue.set_size(guest.size());
        queue
            .try_set_desc_table_address(GuestAddress(descriptors))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(available))
            .unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        queue.set_event_idx(guest.features.event_idx);
        queue.set_next_avail(base);
        queue.set_next_used(base);
        queue.set_ready(true);
        queue.disable_notification(&memory).unwrap();
        Reference::Split {
            queue: Box::new(queue),
            memory,
            taken: VecDeque::new(),
        }
    }

    /// Takes a chain: the addresses and lengths of its buffers.
    fn take(&mut self, guest: &'g Guest) -> Option<Vec<(u64, u32)>> {
        match self {
            Reference::Split {
                queue,
                memory,
                taken,
            } => {
                let chain = queue.pop_descriptor_chain(&*memory)?;
                taken.push_back(chain.head_index());
                Some(chain.map(|d| (d.addr().0, d.len())).collect())
            }
            Reference::Packed { device, taken } => {
                let chain = device.pop(|addr, len| guest.at(addr, len))?;
                taken.push_back((chain.id, chain.span, 0));
                Some(chain.buffers)
            }
        }
    }

    /// Returns the oldest `count` chains; whether the driver wants a call.
    fn complete(&mut self, count: usize, event_idx: bool) -> bool {
        match self {
            Reference::Split {
                queue,
                memory,
                taken,
            } => {
                for head in taken.drain(..count) {
                    queue.add_used(&*memory, head, 0).unwrap();
                }
                queue.needs_notification(&*memory).unwrap()
            }
            Reference::Packed { device, taken } => {
                let chains: Vec<(u16, u16, u32)> = taken.drain(..count).collect();
                device.complete(&chains, event_idx)
            }
        }
    }

    /// Asks for kicks; whether something is available already.
    fn arm(&mut self) -> bool {
        match self {
            Reference::Split { queue, memory, .. } => queue.enable_notification(&*memory).unwrap(),
            Reference::Packed { device, .. } => device.has_available(),
        }
    }

    fn disarm(&mut self) {
        if let Reference::Split { queue, memory, .. } = self {
            queue.disable_notification(&*memory).unwrap();
        }
    }

    /// What GET_VRING_BASE would say of the next position to take.
    fn next(&self) -> u16 {
        match self {
            Reference::Split { queue, .. } => queue.next_avail(),
            Reference::Packed { device, .. } => device.next().word(),
        }
    }
}

/// What both devices must find in a chain.
#[derive(Debug)]
enum Expected {
    Good,
    /// We refuse it; the reference silently yields this many buffers of it.
    Bad(ChainError, usize),
}

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
        // More places than chains in flight at once.
        let at = DATA + 0x12_0000 + (self.tables % 1024) * 0x100;
        self.tables += 1;
        self.ours.table(at, pieces);
        self.theirs.table(at, pieces)
    }

    fn post(&mut self, random: &mut Random) {
        let free = u64::from(self.drivers[0].free());
        if free == 0 {
            return;
        }
        let pieces = if random.chance(3) && self.ours.size() <= 1024 {
            let buffers = self.pieces(random, 8);
            vec![self.table(&buffers)]
        } else {
            self.pieces(random, free.min(6))
        };
        if self.ours.features.packed {
            let ids = self.drivers[0].packed().free_ids();
            let id = ids[random.below(ids.len() as u64) as usize];
            for driver in &mut self.drivers {
                driver.packed().post(id, &pieces);
            }
        } else {
            for driver in &mut self.drivers {
                driver.post(&pieces);
            }
        }
        self.expected.push_back(Expected::Good);
    }

    /// Posts a split chain that no driver may post. `virtio_queue` checks neither addresses nor directions, and shortens
    /// a chain at its first impossible link.
    fn post_malformed(&mut self, random: &mut Random) {
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
                pieces[count - 1].flags = packed_reference::WRITE;
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

    /// A chain whose one descriptor is its own successor: the reference takes it as many times as the ring is long.
    fn post_loop(&mut self) {
        let head = self.drivers[0].split().next_head();
        let empty = [readable(DATA, 0)];
        self.offer(&empty, NEXT, head);
        let count = usize::from(self.ours.size());
        self.expected
            .push_back(Expected::Bad(ChainError::Loop, count));
    }

    fn offer(&mut self, pieces: &[Piece], flags: u16, next: u16) {
        for driver in &mut self.drivers {
            let driver = driver.split();
            let head = driver.prepare(pieces, flags, next);
            driver.offer_raw(head);
        }
    }

    fn take(&mut self) {
        let mut windows = Windows::<'_, 256>::new();
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
        let end = self.ends.drain(..count).next_back().unwrap();
        self.queue.complete(end);
        let event_idx = self.ours.features.event_idx;
        let call = self.reference.complete(count, event_idx);
        assert_eq!(self.queue.take_call_wanted(&FullBarrier::new()), call);
        self.compare_rings();
    }

    fn compare_rings(&self) {
        let bytes = |guest: &Guest| {
            // The packed reference asks for no kicks: the event areas are compared in `arm`.
            let descriptors = 16 * usize::from(guest.size());
            let mut bytes = guest.ring_bytes();
            if guest.features.packed {
                bytes.truncate(descriptors);
            } else {
                // What is to be returned for chains that were taken is there already; the index does not show it.
                let elements = (guest.places().2 - START) as usize + 4;
                for position in self.queue.completed()..self.queue.position() {
                    let at = elements + 8 * (position % u64::from(guest.size())) as usize;
                    bytes[at..at + 8].fill(0);
                }
            }
            bytes
        };
        assert!(
            bytes(self.ours) == bytes(self.theirs),
            "the rings have the same bytes"
        );
    }

    fn reap(&mut self) {
        let [ours, theirs] = &mut self.drivers;
        assert_eq!(ours.reap_all(), theirs.reap_all());
    }

    fn set_event(&mut self, random: &mut Random) {
        let size = self.ours.size();
        if self.ours.features.packed {
            let used = self.drivers[0].packed().used();
            let place = used.after(random.below(2 * u64::from(size)).min(500) as u16, size);
            let flags =
                [EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC, EVENT_DESC][random.below(4) as usize];
            for driver in &mut self.drivers {
                driver.packed().set_event(place.word(), flags);
            }
        } else if self.ours.features.event_idx {
            let idx = self.drivers[0].split().idx;
            let event = idx
                .wrapping_sub(size)
                .wrapping_add(random.below(2 * u64::from(size)) as u16);
            for driver in &mut self.drivers {
                driver.split().set_event(event);
            }
        }
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
        let malformed = !self.ours.features.packed;
        for _ in 0..steps {
            match random.below(10) {
                0..=2 => self.post(random),
                3 if malformed => self.post_malformed(random),
                3..=6 => self.take(),
                7 => self.complete(random),
                8 => self.reap(),
                _ if random.chance(3) => self.arm(),
                _ => self.set_event(random),
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
        for size in [1, 2, 3, 7, 16, 320, 32768] {
            let steps = if size > 1000 { 300 } else { 1500 };
            let wrap = random.below(2) as u16 * 0x8000;
            let anywhere = random.below(u64::from(size)) as u16;
            transmit_like_the_reference(size, true, anywhere | wrap, random, steps);
            let near_the_wrap = size - 1 - random.below(u64::from(size).min(9)) as u16;
            transmit_like_the_reference(size, true, near_the_wrap | wrap, random, steps);
        }
    });
}
