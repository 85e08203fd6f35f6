//! Split rings against `virtio_queue::Queue`, packed rings against a small device of our own.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::packed::{AVAIL, USED};
use super::*;
use crate::memory::SharedMemory;

const SIZE: u16 = 8;

fn features(packed: bool, event_idx: bool, in_order: bool) -> RingFeatures {
    RingFeatures {
        packed,
        event_idx,
        in_order,
        indirect: true,
        version_1: true,
        ..Default::default()
    }
}

fn memory() -> SharedMemory {
    SharedMemory::create(1 << 16, true).unwrap()
}

fn areas(memory: &SharedMemory, size: u16, packed: bool) -> RingAreas<'_> {
    let layout = RingLayout::new(size, packed);
    RingAreas::zeroed(memory.window(0, layout.len).unwrap(), &layout).unwrap()
}

/// Bytes a device is told to have written into the chain that starts at `address`.
fn written(address: u64) -> u32 {
    (address as u32) & 0xffff
}

/// `virtio_queue`'s device over a second mapping of the same memory.
struct SplitDevice {
    memory: GuestMemoryMmap,
    queue: Queue,
}

impl SplitDevice {
    fn new(memory: &SharedMemory, size: u16, event_idx: bool) -> Self {
        let file = FileOffset::new(memory.file().try_clone().unwrap(), 0);
        let range = (GuestAddress(0), memory.len(), Some(file));
        let layout = RingLayout::new(size, false);
        let mut queue = Queue::new(size).unwrap();
        queue.set_size(size);
        queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(layout.available as u64))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(layout.used as u64))
            .unwrap();
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        SplitDevice {
            memory: GuestMemoryMmap::from_ranges_with_files([range]).unwrap(),
            queue,
        }
    }

    /// Takes one chain: its head and its buffers.
    fn take(&mut self) -> Option<(u16, Vec<Buffer>)> {
        let chain = self.queue.pop_descriptor_chain(&self.memory)?;
        let head = chain.head_index();
        let buffers = chain
            .map(|d| Buffer {
                address: d.addr().0,
                len: d.len(),
                writable: d.is_write_only(),
            })
            .collect();
        Some((head, buffers))
    }

    fn give_back(&mut self, head: u16, len: u32) {
        self.queue.add_used(&self.memory, head, len).unwrap();
    }
}

/// A device for packed rings that does one thing after the other and checks what it reads.
struct PackedDevice<'m> {
    ring: Window<'m>,
    driver_event: Window<'m>,
    device_event: Window<'m>,
    size: u16,
    next: (u16, bool),
    used: (u16, bool),
}

impl<'m> PackedDevice<'m> {
    fn new(areas: RingAreas<'m>) -> Self {
        PackedDevice {
            ring: areas.descriptors,
            driver_event: areas.available,
            device_event: areas.used,
            size: areas.size,
            next: (0, true),
            used: (0, true),
        }
    }

    fn advance(&self, (index, wrap): (u16, bool), by: u16) -> (u16, bool) {
        let index = index + by;
        if index >= self.size {
            (index - self.size, !wrap)
        } else {
            (index, wrap)
        }
    }

    /// Takes one chain: its id, its number of ring entries and its buffers.
    fn take(&mut self) -> Option<(u16, u16, Vec<Buffer>)> {
        let mut place = self.next;
        let mut buffers = Vec::new();
        let mut entries = 0;
        loop {
            let at = usize::from(place.0) * DESC_SIZE;
            let flags = self.ring.load_u16(at + 14, Ordering::Acquire);
            let available = (flags & AVAIL != 0) == place.1 && (flags & USED != 0) != place.1;
            if !available {
                assert!(entries == 0, "a chain is available as a whole");
                return None;
            }
            buffers.push(Buffer {
                address: self.ring.load_u64(at, Ordering::Relaxed),
                len: self.ring.load_u32(at + 8, Ordering::Relaxed),
                writable: flags & DESC_WRITE != 0,
            });
            entries += 1;
            place = self.advance(place, 1);
            if flags & DESC_NEXT == 0 {
                self.next = place;
                let id = self.ring.load_u16(at + 12, Ordering::Relaxed);
                return Some((id, entries, buffers));
            }
        }
    }

    fn give_back(&mut self, id: u16, entries: u16, len: u32) {
        let at = usize::from(self.used.0) * DESC_SIZE;
        self.ring.store_u32(at + 8, len, Ordering::Relaxed);
        self.ring.store_u16(at + 12, id, Ordering::Relaxed);
        let flags = if self.used.1 { AVAIL | USED } else { 0 };
        self.ring.store_u16(at + 14, flags, Ordering::Release);
        self.used = self.advance(self.used, entries);
    }
}

#[test]
fn layouts_keep_the_areas_apart_and_aligned() {
    let split = RingLayout::new(256, false);
    assert_eq!((split.available, split.available_len), (4096, 518));
    assert_eq!((split.used, split.used_len), (4672, 2054));
    assert_eq!(split.len, 6784);
    let packed = RingLayout::new(256, true);
    assert_eq!((packed.available, packed.used), (4096, 4160));
    assert_eq!(packed.len, 4224);
}

#[test]
fn event_is_passed_across_the_wrap_and_not_before() {
    assert!(passes_event(0, 2, 65534));
    assert!(passes_event(1, 2, 65534));
    assert!(!passes_event(2, 2, 65534));
    assert!(!passes_event(65533, 2, 65534));
}

#[test]
fn split_chains_reach_an_independent_device_and_come_back() {
    let memory = memory();
    let mut ring = DriverRing::new(areas(&memory, SIZE, false), features(false, false, false));
    let mut device = SplitDevice::new(&memory, SIZE, false);
    let chain = [Buffer::readable(0x8000, 12), Buffer::writable(0x9000, 60)];
    assert!(ring.post(&chain, 77));
    assert!(device.take().is_none(), "not published yet");
    ring.publish();
    assert!(ring.needs_kick());
    let (head, seen) = device.take().unwrap();
    assert_eq!(seen, chain);
    device.give_back(head, 60);
    assert_eq!(ring.reap(), Some(Used { token: 77, len: 60 }));
    assert_eq!(ring.reap(), None);
    assert_eq!(ring.free(), SIZE);
}

#[test]
fn split_indirect_tables_are_read_by_an_independent_device() {
    let memory = memory();
    let mut ring = DriverRing::new(areas(&memory, SIZE, false), features(false, false, false));
    let mut device = SplitDevice::new(&memory, SIZE, false);
    let table = memory.window(0x4000, 64).unwrap();
    let chain = [
        Buffer::readable(0x8000, 12),
        Buffer::readable(0x9000, 60),
        Buffer::writable(0xa000, 8),
    ];
    assert!(ring.post_indirect(&table, 0x4000, &chain, 5));
    ring.publish();
    let (head, seen) = device.take().unwrap();
    assert_eq!(seen, chain);
    device.give_back(head, 8);
    assert_eq!(ring.reap(), Some(Used { token: 5, len: 8 }));
}

#[test]
fn split_event_index_asks_for_one_kick_and_one_call() {
    let memory = memory();
    let mut ring = DriverRing::new(areas(&memory, SIZE, false), features(false, true, false));
    let mut device = SplitDevice::new(&memory, SIZE, true);
    // The device arms for the very next buffer; the one after it needs no kick.
    device.queue.enable_notification(&device.memory).unwrap();
    for wanted in [true, false] {
        assert!(ring.post_one(Buffer::readable(0x8000, 60), 0));
        ring.publish();
        assert_eq!(ring.needs_kick(), wanted);
    }
    assert!(!ring.enable_calls());
    for wanted in [true, false] {
        let (head, _) = device.take().unwrap();
        device.give_back(head, 0);
        assert_eq!(
            device.queue.needs_notification(&device.memory).unwrap(),
            wanted
        );
    }
    assert!(ring.enable_calls(), "work is already there");
    ring.suppress_calls();
    assert!(ring.reap().is_some());
}

#[test]
fn a_full_ring_refuses_and_takes_again_after_reaping() {
    for packed in [false, true] {
        let memory = memory();
        let mut ring =
            DriverRing::new(areas(&memory, SIZE, packed), features(packed, false, false));
        let buffer = Buffer::readable(0x8000, 60);
        (0..u32::from(SIZE)).for_each(|token| assert!(ring.post_one(buffer, token)));
        assert!(!ring.post_one(buffer, 99));
        assert!(!ring.post(&[buffer, buffer], 99));
        assert_eq!((ring.free(), ring.outstanding()), (0, SIZE));
    }
}

#[test]
fn a_split_device_that_returns_what_it_has_not_is_found_out() {
    let memory = memory();
    let areas = areas(&memory, SIZE, false);
    let mut ring = DriverRing::new(areas, features(false, false, false));
    assert!(ring.post_one(Buffer::readable(0x8000, 60), 1));
    ring.publish();
    areas.used.store_u32(4, 5, Ordering::Relaxed);
    areas.used.store_u16(2, 1, Ordering::Release);
    assert_eq!(ring.reap(), None);
    assert_eq!(ring.fault(), Some(RingFault::NotOutstanding { id: 5 }));
}

#[test]
fn a_split_index_that_runs_ahead_is_found_out() {
    let memory = memory();
    let areas = areas(&memory, SIZE, false);
    let mut ring = DriverRing::new(areas, features(false, false, false));
    assert!(ring.post_one(Buffer::readable(0x8000, 60), 1));
    ring.publish();
    areas.used.store_u16(2, 3, Ordering::Release);
    assert_eq!(ring.reap(), None);
    let fault = RingFault::TooMany {
        returned: 3,
        outstanding: 1,
    };
    assert_eq!(ring.fault(), Some(fault));
}

#[test]
fn a_packed_chain_is_hidden_until_published() {
    let memory = memory();
    let areas = areas(&memory, SIZE, true);
    let mut ring = DriverRing::new(areas, features(true, false, false));
    let mut device = PackedDevice::new(areas);
    let chain = [Buffer::readable(0x8000, 12), Buffer::writable(0x9000, 60)];
    assert!(ring.post(&chain, 3));
    assert!(ring.post_one(Buffer::writable(0xa000, 60), 4));
    assert!(device.take().is_none());
    assert_eq!(ring.base(), 0x8000_8000);
    ring.publish();
    assert_eq!(ring.base(), 0x8003_8003);
    let (id, entries, seen) = device.take().unwrap();
    assert_eq!((entries, &seen[..]), (2, &chain[..]));
    device.give_back(id, entries, 60);
    assert_eq!(ring.reap(), Some(Used { token: 3, len: 60 }));
    assert_eq!(ring.reap(), None);
}

#[test]
fn one_used_descriptor_returns_a_whole_packed_batch_in_order() {
    let memory = memory();
    let areas = areas(&memory, SIZE, true);
    let mut ring = DriverRing::new(areas, features(true, false, true));
    let mut device = PackedDevice::new(areas);
    let mut token = 0;
    // More than one lap, so that ids and positions wrap.
    for _ in 0..5 {
        for t in token..token + 3 {
            assert!(ring.post_one(Buffer::readable(0x8000, 60), t));
        }
        ring.publish();
        let last = (0..3).filter_map(|_| device.take()).last().unwrap();
        device.give_back(last.0, 3, 0);
        for t in token..token + 3 {
            assert_eq!(ring.reap().map(|used| used.token), Some(t));
        }
        assert_eq!(ring.reap(), None);
        token += 3;
    }
    assert_eq!(ring.fault(), None);
}

#[test]
fn packed_events_are_honoured() {
    let memory = memory();
    let areas = areas(&memory, SIZE, true);
    let mut ring = DriverRing::new(areas, features(true, true, false));
    let device = PackedDevice::new(areas);
    let mut kick = |word: u32| {
        device.device_event.store_u32(0, word, Ordering::Relaxed);
        assert!(ring.post_one(Buffer::readable(0x8000, 60), 0));
        ring.publish();
        ring.needs_kick()
    };
    assert!(kick(0), "always");
    assert!(!kick(1 << 16), "never");
    assert!(kick(0x8002 | 2 << 16), "at entry 2, first lap");
    assert!(!kick(0x8002 | 2 << 16), "entry 2 has passed");
    assert!(!kick(0x0002 | 2 << 16), "at entry 2, second lap");
    ring.suppress_calls();
    assert_eq!(device.driver_event.load_u16(2, Ordering::Relaxed), 1);
    assert!(!ring.enable_calls());
    assert_eq!(device.driver_event.load_u32(0, Ordering::Relaxed), 0x2_8000);
}

/// One step of a random run.
#[derive(Clone, Debug)]
enum Step {
    Post(u16),
    Publish,
    /// The device takes a chain.
    Take,
    /// The device returns the n-th of those it has (the oldest in order).
    Return(usize),
    Reap,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1..4u16).prop_map(Step::Post),
        3 => Just(Step::Publish),
        4 => Just(Step::Take),
        4 => (0..8usize).prop_map(Step::Return),
        4 => Just(Step::Reap),
    ];
    proptest::collection::vec(step, 1..400)
}

fn buffers(token: u32, count: u16) -> Vec<Buffer> {
    (0..count)
        .map(|i| Buffer::writable(0x1_0000 * u64::from(i + 1) + u64::from(token & 0xffff), 100))
        .collect()
}

proptest! {
    /// Whatever the order of the device's answers, tokens and lengths come back as given.
    #[test]
    fn packed_rings_return_every_token(steps in steps(), size in 1..13u16, in_order: bool) {
        let memory = memory();
        let areas = areas(&memory, size, true);
        let mut ring = DriverRing::new(areas, features(true, false, in_order));
        let mut device = PackedDevice::new(areas);
        let (mut held, mut expected) = (VecDeque::new(), VecDeque::new());
        let mut token = 0;
        for step in steps {
            match step {
                Step::Post(count) => if ring.post(&buffers(token, count), token) { token += 1 },
                Step::Publish => ring.publish(),
                Step::Take => held.extend(device.take()),
                Step::Return(n) if !held.is_empty() => {
                    let n = if in_order { 0 } else { n % held.len() };
                    let (id, entries, seen) = held.remove(n).unwrap();
                    device.give_back(id, entries, written(seen[0].address));
                    expected.push_back(written(seen[0].address));
                }
                Step::Return(_) => {}
                Step::Reap => {
                    let used = ring.reap();
                    prop_assert_eq!(used.map(|u| u.len), expected.pop_front());
                    prop_assert!(used.is_none_or(|u| u.token & 0xffff == u.len));
                }
            }
            prop_assert_eq!(ring.fault(), None);
        }
    }

    /// The same against an independent device, from an index at which everything wraps.
    #[test]
    fn split_rings_return_every_token(steps in steps(), start: u16, in_order: bool) {
        let memory = memory();
        let split = SplitRing::new(areas(&memory, SIZE, false), features(false, false, in_order));
        let mut ring = DriverRing::Split(split.starting_at(start));
        let mut device = SplitDevice::new(&memory, SIZE, false);
        device.queue.set_next_avail(start);
        device.queue.set_next_used(start);
        let (mut held, mut expected) = (VecDeque::new(), VecDeque::new());
        let mut token = 0;
        for step in steps {
            match step {
                Step::Post(count) => if ring.post(&buffers(token, count), token) { token += 1 },
                Step::Publish => ring.publish(),
                Step::Take => held.extend(device.take()),
                Step::Return(n) if !held.is_empty() => {
                    let n = if in_order { 0 } else { n % held.len() };
                    let (head, seen) = held.remove(n).unwrap();
                    device.give_back(head, written(seen[0].address));
                    expected.push_back(written(seen[0].address));
                }
                Step::Return(_) => {}
                Step::Reap => {
                    let used = ring.reap();
                    prop_assert_eq!(used.map(|u| u.len), expected.pop_front());
                    prop_assert!(used.is_none_or(|u| u.token & 0xffff == u.len));
                }
            }
            prop_assert_eq!(ring.fault(), None);
        }
    }
}

#[test]
fn guest_bytes_are_the_same_through_both_mappings() {
    let memory = memory();
    let device = SplitDevice::new(&memory, SIZE, false);
    device
        .memory
        .write_obj(0xabcd_u16, GuestAddress(0x100))
        .unwrap();
    let word = memory.window(0x100, 2).unwrap();
    assert_eq!(word.load_u16(0, Ordering::Relaxed), 0xabcd);
}
