//! Rings that stop and start again, and rings full of garbage.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use pollux::virtio::chain::Windows;
use pollux::virtio::claim::Published;
use pollux::virtio::{Claim, ReceiveQueue, RingFeatures, Taken, TransmitQueue};

use crate::guest::*;
use crate::packed_reference::Place;
use crate::{Random, with_seeds};

/// Delivers, stops and starts again several times over the same ring; `base` makes of the answer to
/// GET_VRING_BASE what a frontend sends at the next start.
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

/// Sends, stops in the middle of a burst and starts again: chains that were taken and not returned
/// are there once more.
fn transmit_restarts(size: u16, packed: bool, base: impl Fn(u32) -> u32) {
    let guest = Guest::new(size, features(packed));
    let mut driver = guest.driver();
    let mut next = if packed { 0x8000 } else { 0 };
    let mut place = Place::FIRST;
    for turn in 0..6 * u32::from(size) {
        let mut chains = VecDeque::new();
        // Chains of one descriptor and of two.
        while driver.free() > 0 {
            let most = driver.free().min(1 + turn as u16 % 2);
            let pieces = [readable(DATA, 100), readable(DATA + 100, 50)];
            let id = driver.post(&pieces[..usize::from(most)]);
            chains.push_back((id, most));
        }
        let take_all = |queue: &TransmitQueue, most: usize| {
            let mut windows = Windows::<'_, 256>::new();
            let mut taken = 0;
            while taken < most && take(queue, queue.available_to(), &mut windows) != Taken::Nothing
            {
                windows.clear();
                taken += 1;
            }
            taken
        };
        let queue = TransmitQueue::start(&guest.setup(next)).unwrap();
        let taken = 1 + turn as usize % chains.len();
        assert_eq!(take_all(&queue, taken), taken);
        let completed = (turn as usize / 2) % (taken + 1);
        let spans = chains.iter().take(completed).map(|(_, descriptors)| {
            let span = if packed { *descriptors } else { 1 };
            u64::from(span)
        });
        queue.complete(queue.completed() + spans.sum::<u64>());
        for _ in 0..completed {
            let (id, descriptors) = chains.pop_front().unwrap();
            assert_eq!(driver.reap(), Some((id, 0)), "{turn}");
            place = place.after(descriptors, size);
        }
        assert_eq!(driver.reap(), None, "{turn}");
        if packed {
            let word = u32::from(place.word());
            assert_eq!(queue.base(), word | word << 16, "{turn}");
        }
        next = base(queue.base());
        drop(queue);

        let queue = TransmitQueue::start(&guest.setup(next)).unwrap();
        assert_eq!(take_all(&queue, usize::MAX), chains.len(), "{turn}");
        queue.complete(queue.position());
        for (id, descriptors) in chains {
            assert_eq!(driver.reap(), Some((id, 0)), "{turn}");
            place = place.after(descriptors, size);
        }
        assert_eq!(driver.free(), size, "{turn}");
        next = base(queue.base());
    }
}

#[test]
fn chains_that_were_taken_and_not_returned_are_there_again_after_a_start() {
    for size in [1, 2, 8] {
        transmit_restarts(size, false, |base| base);
        transmit_restarts(size, false, |_| 0);
    }
    for size in [1, 2, 3, 8] {
        transmit_restarts(size, true, |base| base);
        transmit_restarts(size, true, |base| base & 0xffff);
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
