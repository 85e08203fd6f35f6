//! Random operations on rings of both kinds, against independent implementations of them.
//!
//! * Transmit queues, split: `virtio_queue::Queue` on memory with the same bytes. Packed: `packed_reference`. The same
//!   driver works on both memories; chains, used elements, positions and wishes for calls and kicks must be equal.
//! * Receive queues: a list of buffers that frames are poured into, which says what comes back and with which content.
//! * Restarts, and garbage in place of a ring.
//! * Events of a whole newly visible run, exhaustively for small rings; several producers on one receive queue.
//!
//! Every test prints its seed; `POLLUX_SEED` repeats it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/guest.rs"]
mod guest;
mod packed_reference;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use guest::*;
use packed_reference::{Device, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, NEXT, Place};
use pollux::virtio::chain::{ChainError, Windows};
use pollux::virtio::claim::Published;
use pollux::virtio::{
    Claim, FullBarrier, NoClaim, ReceiveQueue, RingFeatures, Taken, TransmitQueue,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

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

/// What a posted receive buffer is to the model.
struct Posted {
    id: u16,
    pieces: Vec<Piece>,
    len: u32,
    /// Wholly in memory and long enough to be used.
    good: bool,
}

/// Bytes below which a buffer is returned unused: header and the shortest frame.
const SHORTEST: u32 = 72;
/// What buffers are filled with before they are posted.
const UNTOUCHED: u8 = 0xee;

/// Frames are poured into buffers in the order in which these were posted.
struct ReceiveModel<'g> {
    guest: &'g Guest,
    queue: &'g ReceiveQueue,
    driver: Driver<'g>,
    /// Places for buffers, each in use by at most one.
    places: Vec<u64>,
    posted: VecDeque<Posted>,
    tag: u8,
}

impl<'g> ReceiveModel<'g> {
    fn new(guest: &'g Guest, queue: &'g ReceiveQueue, base: u16) -> Self {
        let places = (0..u64::from(guest.size().min(256))).map(|i| DATA + i * 0x1000);
        ReceiveModel {
            guest,
            queue,
            driver: guest.driver_at(base),
            places: places.collect(),
            posted: VecDeque::new(),
            tag: 0,
        }
    }

    fn post(&mut self, random: &mut Random) {
        let free = u64::from(self.driver.free());
        let Some(place) = (free > 0).then(|| self.places.pop()).flatten() else {
            return;
        };
        // A long buffer may be in pieces; short ones are not, or a frame would need more pieces than a claim keeps.
        let (len, most) = match random.below(12) {
            0 => (random.between(1, 71), 1),
            1..=4 => (random.between(72, 300), 1),
            _ => (random.between(300, 2048), 4),
        };
        let tabled = random.chance(3);
        let most = if tabled { most } else { most.min(free) };
        let mut pieces = split_up(place, len, random.between(1, most), random);
        let unmapped = random.chance(20);
        if unmapped {
            pieces[0].addr = HOLE;
        }
        self.guest.write(place, &vec![UNTOUCHED; len as usize]);
        let table = place + 0xf00;
        let id = if tabled {
            self.driver.post(&[self.guest.table(table, &pieces)])
        } else {
            self.driver.post(&pieces)
        };
        pieces[0].addr = place;
        self.posted.push_back(Posted {
            id,
            len: len as u32,
            good: !unmapped && len as u32 >= SHORTEST,
            pieces,
        });
    }

    /// The buffers that the frame ends up in and those returned unused on the way, with what is written to each; whether
    /// it is delivered at all.
    fn pour(&mut self, frame_len: usize) -> (Vec<(Posted, u32)>, bool) {
        let mut back = Vec::new();
        'again: loop {
            let mut left = frame_len as u32 + HEADER as u32;
            for count in 0..self.posted.len() {
                let buffer = &self.posted[count];
                if !buffer.good {
                    let unused = self.posted.drain(..=count);
                    back.extend(unused.map(|buffer| (buffer, 0)));
                    continue 'again;
                }
                if !self.guest.features.mergeable && buffer.len < left {
                    return (back, false);
                }
                left -= left.min(buffer.len);
                if left == 0 {
                    let mut left = frame_len as u32 + HEADER as u32;
                    for buffer in self.posted.drain(..=count) {
                        let len = left.min(buffer.len);
                        left -= len;
                        back.push((buffer, len));
                    }
                    return (back, true);
                }
            }
            return (back, false);
        }
    }

    fn deliver(&mut self, random: &mut Random) {
        let longest = if self.guest.features.mergeable {
            4000
        } else {
            2200
        };
        let mut frames = Vec::new();
        for _ in 0..random.between(1, 40) {
            self.tag = self.tag.wrapping_add(1);
            frames.push(frame(self.tag, random.between(14, longest) as usize));
        }
        let (delivered, reason) = deliver(self.queue, &frames);
        assert_ne!(reason, Some(NoClaim::Broken));
        for (index, frame) in frames.iter().enumerate() {
            let (back, fits) = self.pour(frame.len());
            assert_eq!(fits, index < delivered, "frame {index}, {reason:?}");
            self.check(&back, fits.then_some(frame));
            if !fits {
                break;
            }
        }
        assert_eq!(self.driver.reap(), None, "nothing else came back");
    }

    /// Used elements and content of the buffers of one frame.
    fn check(&mut self, back: &[(Posted, u32)], frame: Option<&Vec<u8>>) {
        let mut content = Vec::new();
        for (buffer, len) in back {
            assert_eq!(self.driver.reap(), Some((buffer.id, *len)));
            let mut bytes = Vec::new();
            for piece in &buffer.pieces {
                bytes.extend(self.guest.read(piece.addr, piece.len));
            }
            let (written, rest) = bytes.split_at(*len as usize);
            content.extend_from_slice(written);
            assert!(rest.iter().all(|&byte| byte == UNTOUCHED));
            self.places.push(buffer.pieces[0].addr);
        }
        let Some(frame) = frame else {
            return;
        };
        let count = back.iter().filter(|(_, len)| *len > 0).count() as u16;
        assert_eq!(content[10..12], count.to_le_bytes(), "num_buffers");
        assert_eq!(content[HEADER..], frame[..]);
    }
}

/// A buffer of `len` bytes as `count` pieces.
fn split_up(place: u64, len: u64, count: u64, random: &mut Random) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut at = 0;
    for _ in 1..count {
        let piece = random.between(1, (len - at) / 2);
        pieces.push(writable(place + at, piece as u32));
        at += piece;
    }
    pieces.push(writable(place + at, (len - at) as u32));
    pieces
}

fn receive_like_the_model(size: u16, packed: bool, base: u16, random: &mut Random) {
    let features = RingFeatures {
        mergeable: random.chance(2),
        event_idx: random.chance(2),
        ..features(packed)
    };
    let guest = Guest::new(size, features);
    drop(guest.driver_at(base));
    let queue = ReceiveQueue::start(&guest.setup(u32::from(base))).unwrap();
    let mut model = ReceiveModel::new(&guest, &queue, base);
    for _ in 0..200 {
        for _ in 0..random.below(40) {
            model.post(random);
        }
        model.deliver(random);
    }
    assert_eq!(queue.broken(), None);
}

#[test]
fn split_receive_queues_fill_buffers_like_the_model() {
    with_seeds(10, |random| {
        for size in [1, 2, 16, 64, 256] {
            let base = 65535 - random.below(100) as u16;
            receive_like_the_model(size, false, base, random);
        }
    });
}

#[test]
fn packed_receive_queues_fill_buffers_like_the_model() {
    with_seeds(10, |random| {
        for size in [1, 2, 3, 16, 320, 32768] {
            let near_the_wrap = size - 1 - random.below(u64::from(size).min(100)) as u16;
            let wrap = random.below(2) as u16 * 0x8000;
            receive_like_the_model(size, true, near_the_wrap | wrap, random);
        }
    });
}

/// Delivers, stops and starts again several times over the same ring; `base` makes of the answer to GET_VRING_BASE what a
/// frontend sends at the next start.
fn restarts(size: u16, packed: bool, base: impl Fn(u32) -> u32) {
    let guest = Guest::new(size, features(packed));
    let mut driver = guest.driver();
    let mut next = if packed { 0x8000 } else { 0 };
    for turn in 0..3 * u32::from(size) {
        let queue = ReceiveQueue::start(&guest.setup(next)).unwrap();
        assert!(queue.take_call_wanted(), "a call at every start");
        let mut ids = Vec::new();
        while driver.free() > 0 {
            ids.push(driver.post(&[writable(DATA, 100)]));
        }
        // An open claim that nobody commits: its buffers are there again after the restart.
        let delivered = 1 + turn as usize % ids.len();
        deliver(&queue, &vec![frame(1, 60); delivered]);
        let _ = queue.claim([60].into_iter(), &mut Claim::new());
        queue.publish();
        assert_eq!(driver.reap_all().len(), delivered, "{turn}");
        next = base(queue.base());
        drop(queue);
        let queue = ReceiveQueue::start(&guest.setup(next)).unwrap();
        let rest = ids.len() - delivered;
        let (count, _) = deliver(&queue, &vec![frame(2, 60); ids.len()]);
        assert_eq!((count, driver.reap_all().len()), (rest, rest), "{turn}");
        next = base(queue.base());
    }
}

#[test]
fn a_queue_that_starts_again_goes_on_where_it_stopped() {
    for size in [1, 2, 8] {
        restarts(size, false, |base| base);
        // virtio-user says 0 at every start; the ring itself knows better.
        restarts(size, false, |_| 0);
    }
    for size in [1, 2, 3, 8] {
        restarts(size, true, |base| base);
        // Only the half of what is available counts.
        restarts(size, true, |base| base & 0xffff);
    }
}

/// Garbage that is now and then nearly a descriptor.
fn garbage_piece(random: &mut Random, size: u16) -> (Piece, u16, u16) {
    let addr = match random.below(8) {
        0 => HOLE - random.below(200),
        1 => SEAM - random.below(200),
        2 => START + random.below(16 * u64::from(size)),
        3 => random.below(1 << 31) << 33 | random.below(1 << 31),
        _ => DATA + random.below(0x1000),
    };
    let len = match random.below(6) {
        0 => 0,
        1 => random.below(1 << 31) as u32 * 2,
        2 => 16 * random.below(20) as u32,
        _ => random.below(3000) as u32,
    };
    let flags = random.below(1 << 16) as u16;
    // Tables and links are rarer than a random bit.
    let flags = if random.chance(2) { flags & !5 } else { flags };
    let link = random.below(u64::from(size) + 1 + size as u64 / 8) as u16;
    (Piece { addr, len, flags }, flags, link)
}

fn write_garbage(guest: &Guest, random: &mut Random) {
    let size = guest.size();
    for _ in 0..random.below(2 * u64::from(size)) {
        let (piece, flags, link) = garbage_piece(random, size);
        let index = random.below(u64::from(size)) as u16;
        guest.table_entry(START, index, piece, flags, link);
        let (piece, flags, link) = garbage_piece(random, size);
        guest.table_entry(DATA, random.below(64) as u16, piece, flags, link);
    }
    let available = guest.areas().available;
    if guest.features.packed {
        available.store_u32(0, random.below(1 << 31) as u32, Ordering::Relaxed);
        return;
    }
    for slot in 0..usize::from(size) {
        let bound = u64::from(size) + u64::from(random.chance(50));
        let head = random.below(bound) as u16;
        available.store_u16(ENTRIES + 2 * slot, head, Ordering::Relaxed);
    }
    let idx = available.load_u16(IDX, Ordering::Relaxed);
    let step = random.below(u64::from(size) / 2 + 2) as u16;
    available.store_u16(IDX, idx.wrapping_add(step), Ordering::Relaxed);
}

fn survives_garbage(size: u16, packed: bool, random: &mut Random) {
    let features = RingFeatures {
        mergeable: random.chance(2),
        event_idx: random.chance(2),
        ..features(packed)
    };
    let guest = Guest::new(size, features);
    let base = if packed { 0x8000 } else { 0 };
    let transmit = TransmitQueue::start(&guest.setup(base)).unwrap();
    let receive = ReceiveQueue::start(&guest.setup(base)).unwrap();
    for step in 0..40 {
        write_garbage(&guest, random);
        let before = transmit.position();
        let mut windows = Windows::<'_, 256>::new();
        while take(&transmit, transmit.available_to(), &mut windows) != Taken::Nothing {
            windows.clear();
        }
        // The last packed chain may reach a lap further.
        let bound = u64::from(size) * if packed { 2 } else { 1 };
        assert!(transmit.position() - transmit.completed() <= bound);
        assert!(transmit.position() >= before);
        if random.chance(3) {
            transmit.complete(transmit.position());
        }
        transmit.arm();
        let len = random.between(14, 5000) as usize;
        deliver(&receive, &vec![frame(step, len); 5]);
        // One claimer: everything it committed is visible.
        assert_eq!(receive.publish(), Published::Clean);
    }
}

#[test]
fn garbage_in_a_ring_is_survived() {
    with_seeds(100, |random| {
        for packed in [false, true] {
            for size in [1, 4, 64] {
                survives_garbage(size, packed, random);
            }
            survives_garbage(if packed { 320 } else { 256 }, packed, random);
        }
    });
}

/// Two claims; the later one is committed first and stays hidden behind the other. Says whether the driver was called
/// when both became visible together.
fn called_for_both(queue: &ReceiveQueue, first: usize, second: usize) -> bool {
    let lengths = |count| std::iter::repeat_n(60, count);
    let (mut one, mut two) = (Claim::new(), Claim::new());
    queue.claim(lengths(first), &mut one).unwrap();
    queue.claim(lengths(second), &mut two).unwrap();
    assert_eq!((one.frames(), two.frames()), (first, second));
    assert!(queue.take_call_wanted(), "the start's call");
    queue.commit(&two);
    assert!(!queue.take_call_wanted(), "nothing is visible yet");
    queue.commit(&one);
    assert_eq!(queue.published(), two.end());
    queue.take_call_wanted()
}

/// All rings of up to five entries, all starts, all pairs of claims.
fn for_all_pairs(packed: bool, test: impl Fn(&Guest, u16, usize, usize)) {
    for size in 2..=5_u16 {
        if !packed && !size.is_power_of_two() {
            continue;
        }
        let features = RingFeatures {
            event_idx: true,
            ..features(packed)
        };
        let words = (0..size).flat_map(|slot| [slot, slot | 0x8000]);
        let starts: Vec<u16> = if packed {
            words.collect()
        } else {
            (65530..=65535).chain(0..2).collect()
        };
        for start in starts {
            for first in 1..usize::from(size) {
                for second in 1..=usize::from(size) - first {
                    test(&Guest::new(size, features), start, first, second);
                }
            }
        }
    }
}

#[test]
fn a_driver_armed_inside_another_threads_claim_on_a_packed_ring_is_called() {
    for_all_pairs(true, |guest, start, first, second| {
        let size = guest.size();
        for word in (0..size).flat_map(|slot| [slot, slot | 0x8000]) {
            let mut driver = guest.driver_at(start);
            let place = driver.packed().next();
            guest.write(START, &vec![0; 16 * usize::from(size)]);
            let queue = ReceiveQueue::start(&guest.setup(u32::from(start))).unwrap();
            for _ in 0..size {
                driver.post(&[writable(DATA, 100)]);
            }
            driver.packed().set_event(word, EVENT_DESC);
            let moved = (first + second) as u16;
            let expected = packed_reference::wants_call(&guest.areas(), place, moved, true);
            let called = called_for_both(&queue, first, second);
            assert_eq!(called, expected, "{size} {place:?} {moved} {word:#x}");
        }
    });
}

#[test]
fn a_driver_armed_inside_another_threads_claim_on_a_split_ring_is_called() {
    for_all_pairs(false, |guest, start, first, second| {
        for event in 0..=guest.size() + 2 {
            let event = start.wrapping_sub(1).wrapping_add(event);
            let mut driver = guest.driver_at(start);
            let queue = ReceiveQueue::start(&guest.setup(0)).unwrap();
            for _ in 0..guest.size() {
                driver.post(&[writable(DATA, 100)]);
            }
            driver.split().set_event(event);
            let expected = (0..(first + second) as u16).any(|i| start.wrapping_add(i) == event);
            let called = called_for_both(&queue, first, second);
            assert_eq!(called, expected, "{} {start} {event}", guest.size());
        }
    });
}

/// The first word of the available ring: the driver wants no calls.
const NO_INTERRUPT: u16 = 1;

/// VIRTIO_F_NOTIFY_ON_EMPTY, of legacy drivers: a call when everything available is used, whatever else was asked for.
#[test]
fn a_legacy_driver_is_called_when_its_ring_is_empty_if_it_wants_that() {
    for (notify_on_empty, event_idx) in [(false, false), (false, true), (true, false), (true, true)]
    {
        for start in [0_u16, 1, 65534] {
            let features = RingFeatures {
                indirect: true,
                event_idx,
                notify_on_empty,
                ..RingFeatures::default()
            };
            let guest = Guest::new(4, features);
            let suppress = |driver: &mut Driver<'_>| {
                if event_idx {
                    driver.split().set_event(start.wrapping_sub(1));
                } else {
                    guest
                        .areas()
                        .available
                        .store_u16(0, NO_INTERRUPT, Ordering::Relaxed);
                }
            };

            let mut driver = guest.driver_at(start);
            let queue = ReceiveQueue::start(&guest.setup(0)).unwrap();
            suppress(&mut driver);
            assert!(queue.take_call_wanted(), "the start's call");
            let deliver = |count| {
                let mut claim = Claim::new();
                queue
                    .claim(std::iter::repeat_n(60, count), &mut claim)
                    .unwrap();
                assert_eq!(claim.frames(), count);
                queue.commit(&claim);
                queue.take_call_wanted()
            };
            for _ in 0..4 {
                driver.post(&[writable(DATA, 100)]);
            }
            assert!(!deliver(1));
            assert!(!deliver(2));
            assert_eq!(deliver(1), notify_on_empty);
            driver.reap_all();
            driver.post(&[writable(DATA, 100)]);
            assert_eq!(deliver(1), notify_on_empty);
            // The last of several threads makes all of it visible.
            driver.reap_all();
            for _ in 0..3 {
                driver.post(&[writable(DATA, 100)]);
            }
            let (mut one, mut two) = (Claim::new(), Claim::new());
            queue.claim(std::iter::repeat_n(60, 2), &mut one).unwrap();
            queue.claim(std::iter::once(60), &mut two).unwrap();
            queue.commit(&two);
            assert!(!queue.take_call_wanted());
            queue.commit(&one);
            assert_eq!(queue.take_call_wanted(), notify_on_empty);

            let mut driver = guest.driver_at(start);
            let queue = TransmitQueue::start(&guest.setup(0)).unwrap();
            suppress(&mut driver);
            assert!(
                queue.take_call_wanted(&FullBarrier::new()),
                "the start's call"
            );
            for _ in 0..3 {
                driver.post(&[readable(DATA, 100)]);
            }
            let mut windows = Windows::<16>::new();
            let end = queue.available_to();
            while take(&queue, end, &mut windows) != Taken::Nothing {}
            queue.complete(u64::from(start) + 2);
            assert!(!queue.take_call_wanted(&FullBarrier::new()));
            // More came meanwhile: not empty.
            driver.post(&[readable(DATA, 100)]);
            queue.complete(u64::from(start) + 3);
            assert!(!queue.take_call_wanted(&FullBarrier::new()));
            queue.take(queue.available_to(), &mut windows);
            queue.complete(u64::from(start) + 4);
            assert_eq!(queue.take_call_wanted(&FullBarrier::new()), notify_on_empty);
        }
    }
}

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
