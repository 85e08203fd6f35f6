//! Drivers that misbehave, one misdeed a test, against the device side of both kinds of ring.
//!
//! Every test asserts the outcome, that each chain the device took comes back exactly once with the right length (the
//! drivers in `support/guest.rs` panic at a second return), and that the next good chain passes where the ring lives on.
//! An impossible ring is [`Broken`] instead: nothing more is taken from it, and what was taken still comes back.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../support/guest.rs"]
mod guest;
#[path = "../packed_reference/mod.rs"]
mod packed_reference;

use std::sync::atomic::{AtomicBool, Ordering};

use guest::*;
use packed_reference::{AVAIL, Desc, EVENT_DESC, NEXT, USED, WRITE};
use pollux::virtio::chain::{ChainError, MAX_CHAIN_WINDOWS, Windows};
use pollux::virtio::{
    Broken, Claim, FullBarrier, NoClaim, ReceiveQueue, RingFeatures, SetupError, Taken,
    TransmitQueue,
};

const SIZE: u16 = 8;
const KINDS: [bool; 2] = [false, true];
/// Addresses of a buffer that is always good.
const GOOD: u64 = DATA + 0x8_0000;
const GOOD_LEN: u32 = 100;
/// A buffer long enough for any frame here.
const ROOM: u32 = 2048;

type Pieces<'m> = Windows<'m, 256>;

/// Takes what is available, one burst; what was found, in order.
fn take_burst(queue: &TransmitQueue) -> Vec<Taken> {
    let end = queue.available_to();
    let mut found = Vec::new();
    let mut windows = Pieces::new();
    loop {
        windows.clear();
        match take(queue, end, &mut windows) {
            Taken::Nothing => return found,
            taken => found.push(taken),
        }
        assert!(
            found.len() <= usize::from(queue.size()),
            "a pass is bounded by the ring"
        );
    }
}

fn chain(len: u32) -> Taken {
    Taken::Chain { len }
}

/// The bytes of the next chain.
fn take_bytes(queue: &TransmitQueue) -> Vec<u8> {
    let mut windows = Pieces::new();
    let taken = take(queue, queue.available_to(), &mut windows);
    let mut bytes = Vec::new();
    for window in &windows {
        let mut piece = vec![0; window.len()];
        window.read_bytes(0, &mut piece);
        bytes.extend(piece);
    }
    assert_eq!(taken, chain(bytes.len() as u32));
    bytes
}

fn start_transmit(guest: &Guest) -> TransmitQueue {
    TransmitQueue::start(&guest.setup(0x8000)).unwrap()
}

fn start_receive(guest: &Guest) -> ReceiveQueue {
    ReceiveQueue::start(&guest.setup(0x8000)).unwrap()
}

/// Posts a chain and a good one behind it: the first is found to be `expected`, the second passes, both come back once
/// with length 0, and so does a whole further lap.
fn check_transmit(guest: &Guest, expected: Taken, pieces: &[Piece]) {
    let packed = guest.features.packed;
    let queue = start_transmit(guest);
    let mut driver = guest.driver();
    let odd = driver.post(pieces);
    let good = driver.post(&[readable(GOOD, GOOD_LEN)]);
    let found = take_burst(&queue);
    assert_eq!(found, [expected, chain(GOOD_LEN)], "packed: {packed}");
    assert_eq!(driver.reap(), None, "nothing returns before completion");
    queue.complete(queue.position());
    assert_eq!(
        driver.reap_all(),
        [(odd, 0), (good, 0)],
        "packed: {packed}, {expected:?}"
    );
    assert_eq!(queue.broken(), None);
    transmit_lives(guest, &queue, &mut driver);
}

/// A lap and a half of good chains pass.
fn transmit_lives(guest: &Guest, queue: &TransmitQueue, driver: &mut Driver<'_>) {
    for _ in 0..guest.size() / 2 * 3 {
        let id = driver.post(&[readable(GOOD, GOOD_LEN)]);
        assert_eq!(take_burst(queue), [chain(GOOD_LEN)]);
        queue.complete(queue.position());
        assert_eq!(driver.reap_all(), [(id, 0)]);
    }
    assert_eq!(driver.free(), guest.size());
}

fn transmit_refuses(features: RingFeatures, error: ChainError, pieces: &[Piece]) {
    let guest = Guest::new(SIZE, features);
    check_transmit(&guest, Taken::Malformed(error), pieces);
}

/// Posts a chain that no frame may use, then a good buffer: a frame goes into the second, the first comes back with
/// length 0 in its turn.
fn check_receive(guest: &Guest, pieces: &[Piece]) {
    check_receive_of(guest, pieces, 300);
}

fn check_receive_of(guest: &Guest, pieces: &[Piece], len: u32) {
    let queue = start_receive(guest);
    let mut driver = guest.driver();
    let odd = driver.post(pieces);
    let good = driver.post(&[writable(GOOD, ROOM)]);
    let frame = frame(7, len as usize);
    let mut claim = Claim::new();
    queue.claim([len].into_iter(), &mut claim).unwrap();
    assert_eq!((claim.frames(), claim.bad_buffers()), (1, 1));
    fill(&claim, 0, &frame);
    assert_eq!(driver.reap(), None, "nothing returns before the commit");
    queue.commit(&claim);
    assert_eq!(driver.reap_all(), [(odd, 0), (good, len + 12)]);
    assert_eq!(guest.read(GOOD + HEADER as u64, len), frame);
    receive_lives(guest, &queue, &mut driver);
}

fn receive_lives(guest: &Guest, queue: &ReceiveQueue, driver: &mut Driver<'_>) {
    for tag in 0..guest.size() / 2 * 3 {
        let id = driver.post(&[writable(GOOD, ROOM)]);
        let frame = frame(tag as u8, 64);
        assert_eq!(deliver(queue, std::slice::from_ref(&frame)), (1, None));
        assert_eq!(driver.reap_all(), [(id, 76)]);
        assert_eq!(guest.read(GOOD + HEADER as u64, 64), frame);
    }
    assert_eq!(driver.free(), guest.size());
    assert_eq!(queue.broken(), None);
}

fn receive_refuses(features: RingFeatures, pieces: &[Piece]) {
    check_receive(&Guest::new(SIZE, features), pieces);
}

/// The same misdeed in both directions.
fn both_refuse(
    features: RingFeatures,
    error: ChainError,
    make: impl Fn(fn(u64, u32) -> Piece) -> Vec<Piece>,
) {
    transmit_refuses(features, error, &make(readable));
    receive_refuses(features, &make(writable));
}

// Split rings: the available ring.

#[test]
fn buffers_touched_ahead_have_their_pages_and_stay_as_they_are() {
    use std::os::unix::fs::MetadataExt;
    const PAGE: u64 = 4096;
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        assert!(!queue.touch_buffers(), "none is posted");
        let (seen, fresh) = (vec![7; 100], DATA + 0x10_0000);
        guest.write(GOOD, &seen);
        let blocks = || guest.memory.file().metadata().unwrap().blocks();
        // Malformed, usable, without any page of its own, and far longer than any frame.
        driver.post(&[readable(GOOD, GOOD_LEN)]);
        driver.post(&[writable(GOOD, ROOM)]);
        driver.post(&[writable(fresh, 3 * PAGE as u32)]);
        driver.post(&[writable(fresh + 0x4_0000, 1 << 19)]);
        let before = blocks();
        assert!(queue.touch_buffers());
        let pages = (blocks() - before) * 512 / PAGE;
        assert!((3 + 17..=3 + 18).contains(&pages), "{pages} pages");
        assert_eq!(guest.read(GOOD, 100), seen);
        assert_eq!(
            guest.read(fresh, 3 * PAGE as u32),
            vec![0; 3 * PAGE as usize]
        );
        assert_eq!(queue.broken(), None);
        let frames = [frame(1, 64), frame(2, 64)];
        assert_eq!(deliver(&queue, &frames), (2, None));
    }
}

#[test]
fn an_available_index_further_ahead_than_the_ring_breaks_it_and_nothing_is_taken() {
    let guest = Guest::new(SIZE, features(false));
    let ahead = SIZE + 1;
    let broken = Some(Broken::AvailableIndex { ahead, size: SIZE });
    let queue = start_transmit(&guest);
    let mut driver = guest.driver();
    driver.split().set_idx(ahead);
    assert_eq!(take_burst(&queue), []);
    assert_eq!(queue.broken(), broken);
    // Healing by itself would take entries that nobody wrote.
    driver.split().set_idx(1);
    assert_eq!(take_burst(&queue), []);
    assert!(queue.arm(), "a broken ring keeps nobody awake");

    let queue = start_receive(&guest);
    driver.split().set_idx(ahead);
    assert_eq!(deliver(&queue, &[frame(0, 60)]), (0, Some(NoClaim::Broken)));
    assert_eq!(queue.broken(), broken);
    assert_eq!(driver.reap(), None);
}

#[test]
fn an_available_index_that_moves_back_breaks_the_ring_and_takes_nothing_twice() {
    let guest = Guest::new(SIZE, features(false));
    let queue = start_transmit(&guest);
    let mut driver = guest.driver();
    let heads: Vec<u16> = (0..3)
        .map(|_| driver.post(&[readable(GOOD, GOOD_LEN)]))
        .collect();
    assert_eq!(take_burst(&queue).len(), 3);
    driver.split().set_idx(1);
    assert_eq!(take_burst(&queue), []);
    assert!(matches!(
        queue.broken(),
        Some(Broken::AvailableIndex { ahead: 65534, .. })
    ));
    queue.complete(queue.position());
    let returned: Vec<u16> = driver.reap_all().iter().map(|used| used.0).collect();
    assert_eq!(returned, heads, "what was taken comes back all the same");
}

#[test]
fn chains_offered_again_before_they_came_back_are_not_taken_again() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let queue = start_transmit(&guest);
        let mut driver = guest.driver();
        for _ in 0..SIZE {
            driver.post(&[readable(GOOD, GOOD_LEN)]);
        }
        assert_eq!(take_burst(&queue).len(), usize::from(SIZE));
        offer_everything_again(&guest, &mut driver);
        assert_eq!(take_burst(&queue), [], "packed: {packed}");
        queue.complete(queue.position());
        assert_eq!(driver.reap_all().len(), usize::from(SIZE));
        assert_eq!(queue.broken(), None);
    }
}

#[test]
fn buffers_offered_again_while_claims_are_open_are_not_claimed_again() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        let ids: Vec<u16> = (0..SIZE)
            .map(|_| driver.post(&[writable(GOOD, ROOM)]))
            .collect();
        let lengths = std::iter::repeat_n(60, usize::from(SIZE));
        let mut open = Claim::new();
        queue.claim(lengths.clone(), &mut open).unwrap();
        offer_everything_again(&guest, &mut driver);
        // Two claims of the same slots would stick, and the queue with them.
        let refused = queue.claim(lengths, &mut Claim::new());
        assert_eq!(refused, Err(NoClaim::Full), "packed: {packed}");
        queue.commit(&open);
        assert_eq!(queue.published(), open.end());
        let used: Vec<(u16, u32)> = ids.iter().map(|&id| (id, 72)).collect();
        assert_eq!(driver.reap_all(), used);
        assert_eq!(queue.broken(), None);
    }
}

/// All descriptors made available once more, a lap later.
fn offer_everything_again(guest: &Guest, driver: &mut Driver<'_>) {
    if !guest.features.packed {
        let again = driver.split().idx.wrapping_add(SIZE);
        return driver.split().set_idx(again);
    }
    for slot in 0..SIZE {
        let (addr, len) = (GOOD, GOOD_LEN);
        let (id, flags) = (slot, USED);
        driver.packed().write_raw(
            slot,
            Desc {
                addr,
                len,
                id,
                flags,
            },
        );
    }
}

#[test]
fn a_head_outside_the_table_breaks_the_ring_behind_the_good_chains() {
    let guest = Guest::new(SIZE, features(false));
    let queue = start_transmit(&guest);
    let mut driver = guest.driver();
    let good = driver.post(&[readable(GOOD, GOOD_LEN)]);
    driver.split().offer_raw(SIZE);
    let broken = Some(Broken::Head {
        head: SIZE,
        size: SIZE,
    });
    assert_eq!(take_burst(&queue), [chain(GOOD_LEN)]);
    assert_eq!(queue.broken(), broken);
    queue.complete(queue.position());
    assert_eq!(driver.reap_all(), [(good, 0)]);

    let guest = Guest::new(SIZE, features(false));
    let queue = start_receive(&guest);
    let mut driver = guest.driver();
    driver.split().offer_raw(SIZE);
    assert_eq!(deliver(&queue, &[frame(0, 60)]), (0, Some(NoClaim::Broken)));
    assert_eq!(queue.broken(), broken);
    assert_eq!(queue.published(), 0);
}

#[test]
fn a_used_ring_that_the_guest_rewrites_is_never_read_back() {
    let guest = Guest::new(SIZE, features(false));
    let queue = start_transmit(&guest);
    let mut driver = guest.driver();
    for turn in 0..20_u16 {
        let used = driver.split().areas.used;
        for offset in (0..used.len() - 1).step_by(2) {
            used.store_u16(offset, 0x5a5a, Ordering::Relaxed);
        }
        let head = driver.post(&[readable(GOOD, GOOD_LEN)]);
        assert_eq!(take_burst(&queue), [chain(GOOD_LEN)]);
        queue.complete(queue.position());
        assert_eq!(used.load_u16(IDX, Ordering::Relaxed), turn + 1);
        assert_eq!(driver.reap(), Some((head, 0)));
    }
}

// Split rings: links.

/// Posts a prepared split chain in both directions; `link` gives flags and next of its last descriptor.
fn bad_link(error: ChainError, lens: &[u32], link: fn(&Guest) -> (u16, u16)) {
    for write in [false, true] {
        let guest = Guest::new(SIZE, features(false));
        let (flags, next) = link(&guest);
        let direction = if write { WRITE } else { 0 };
        let pieces: Vec<Piece> = lens
            .iter()
            .map(|&len| Piece {
                addr: DATA,
                len,
                flags: direction,
            })
            .collect();
        let mut driver = guest.driver();
        let split = driver.split();
        let head = split.prepare(&pieces, flags, next);
        split.offer_raw(head);
        if write {
            let queue = start_receive(&guest);
            let mut claim = Claim::new();
            queue.claim([9000].into_iter(), &mut claim).unwrap();
            assert_eq!((claim.frames(), claim.bad_buffers()), (0, 1));
            queue.commit(&claim);
            assert_eq!(driver.reap_all(), [(head, 0)]);
            receive_lives(&guest, &queue, &mut driver);
        } else {
            let queue = start_transmit(&guest);
            assert_eq!(take_burst(&queue), [Taken::Malformed(error)]);
            queue.complete(queue.position());
            assert_eq!(driver.reap_all(), [(head, 0)]);
            transmit_lives(&guest, &queue, &mut driver);
        }
    }
}

#[test]
fn a_next_outside_the_table_returns_the_chain() {
    bad_link(ChainError::NextOutside(SIZE), &[64], |_| (NEXT, SIZE));
    bad_link(ChainError::NextOutside(0xffff), &[64, 64], |_| {
        (NEXT, 0xffff)
    });
}

#[test]
fn a_chain_that_loops_ends_after_as_many_hops_as_the_ring_has_entries() {
    bad_link(ChainError::Loop, &[64], |_| (NEXT, 0));
    bad_link(ChainError::Loop, &[64, 64, 64], |_| (NEXT, 0));
}

#[test]
fn a_loop_of_empty_buffers_ends_too() {
    bad_link(ChainError::Loop, &[0], |_| (NEXT, 0));
    bad_link(ChainError::Loop, &[0, 0, 0], |_| (NEXT, 1));
}

#[test]
fn a_chain_that_goes_on_behind_its_last_legal_hop_is_returned() {
    bad_link(ChainError::Loop, &[64; SIZE as usize], |_| (NEXT, 0));
}

#[test]
fn a_packed_chain_without_an_end_breaks_the_ring() {
    for write in [0, WRITE] {
        let guest = Guest::new(SIZE, features(true));
        let mut driver = guest.driver();
        for slot in 0..SIZE {
            let (addr, len, id) = (GOOD, 64, 0);
            let flags = AVAIL | NEXT | write;
            driver.packed().write_raw(
                slot,
                Desc {
                    addr,
                    len,
                    id,
                    flags,
                },
            );
        }
        let broken = Some(Broken::EndlessChain { size: SIZE });
        let queue = start_transmit(&guest);
        assert_eq!(take_burst(&queue), []);
        assert_eq!(queue.broken(), broken);
        assert_eq!(queue.position(), queue.completed());
        let queue = start_receive(&guest);
        let refused = deliver(&queue, &[frame(0, 1000)]);
        assert_eq!(refused, (0, Some(NoClaim::Broken)));
        assert_eq!(queue.broken(), broken);
        assert_eq!(driver.reap(), None);
    }
}

// Both kinds: buffers.

#[test]
fn a_chain_of_more_pieces_than_are_kept_is_returned() {
    let pieces = MAX_CHAIN_WINDOWS + 1;
    for packed in KINDS {
        for write in [false, true] {
            let guest = Guest::new(128, features(packed));
            let make = if write { writable } else { readable };
            let chain: Vec<Piece> = (0..pieces).map(|_| make(GOOD, 8)).collect();
            if write {
                check_receive_of(&guest, &chain, 600);
            } else {
                check_transmit(&guest, Taken::Malformed(ChainError::TooManyBuffers), &chain);
            }
        }
    }
}

#[test]
fn a_chain_of_as_many_pieces_as_are_kept_passes() {
    for packed in KINDS {
        let guest = Guest::new(128, features(packed));
        let pieces = [readable(GOOD, 2); MAX_CHAIN_WINDOWS];
        check_transmit(&guest, chain(2 * MAX_CHAIN_WINDOWS as u32), &pieces);
    }
}

#[test]
fn a_chain_without_a_byte_is_a_chain_of_length_zero() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        check_transmit(&guest, chain(0), &[readable(GOOD, 0); 3]);
        receive_refuses(features(packed), &[writable(GOOD, 0); 3]);
    }
}

#[test]
fn a_buffer_too_short_for_header_and_frame_is_returned_unused() {
    for packed in KINDS {
        for len in [1, 12, 71] {
            receive_refuses(features(packed), &[writable(GOOD, len)]);
        }
    }
}

#[test]
fn a_header_in_pieces_of_any_size_is_read_in_order() {
    for packed in KINDS {
        for count in 1..=12 {
            let guest = Guest::new(16, features(packed));
            let bytes = frame(3, 76);
            guest.write(DATA, &bytes);
            let last = 12 - (count - 1);
            let mut pieces: Vec<Piece> = (0..count - 1).map(|i| readable(DATA + i, 1)).collect();
            pieces.push(readable(DATA + count - 1, last as u32));
            pieces.push(readable(DATA + 12, 64));
            let queue = start_transmit(&guest);
            guest.driver().post(&pieces);
            assert_eq!(take_bytes(&queue), bytes, "packed: {packed}, {count}");
        }
    }
}

#[test]
fn a_sum_of_lengths_above_32_bits_is_returned() {
    for packed in KINDS {
        // Sparse: nobody touches it.
        let region = 1 << 28;
        let guest = Guest::with_len(32, features(packed), region);
        let pieces = [readable(START, region as u32); 17];
        check_transmit(&guest, Taken::Malformed(ChainError::TooLong), &pieces);
    }
}

#[test]
fn a_chain_longer_than_any_frame_is_reported_with_its_length() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let len = 65535 + 12 + 1;
        check_transmit(&guest, chain(len), &[readable(DATA, len)]);
    }
}

#[test]
fn a_buffer_of_four_gigabytes_is_returned() {
    for packed in KINDS {
        let error = ChainError::Unmapped(DATA);
        transmit_refuses(features(packed), error, &[readable(DATA, u32::MAX)]);
        receive_refuses(features(packed), &[writable(DATA, u32::MAX)]);
    }
}

#[test]
fn an_empty_buffer_at_a_bad_address_is_skipped() {
    for packed in KINDS {
        for at in 0..3 {
            for addr in [0, HOLE, u64::MAX] {
                let guest = Guest::new(SIZE, features(packed));
                let mut pieces = vec![readable(GOOD, 50), readable(GOOD + 50, 30)];
                pieces.insert(at, readable(addr, 0));
                check_transmit(&guest, chain(80), &pieces);
            }
        }
    }
}

#[test]
fn a_buffer_whose_end_wraps_is_returned() {
    for packed in KINDS {
        let addr = u64::MAX - 10;
        both_refuse(features(packed), ChainError::Unmapped(addr), |make| {
            vec![make(GOOD, 20), make(addr, 100)]
        });
        // The wrapped end would lie inside the guest's memory.
        let len = (START + 0x1000).wrapping_sub(addr) as u32;
        both_refuse(features(packed), ChainError::Unmapped(addr), |make| {
            vec![make(addr, len)]
        });
    }
}

#[test]
fn a_buffer_in_a_hole_is_returned_and_the_ring_lives_on() {
    for packed in KINDS {
        for addr in [0, START - 1, HOLE, HOLE + 0x1000] {
            both_refuse(features(packed), ChainError::Unmapped(addr), |make| {
                vec![make(addr, 100)]
            });
        }
    }
}

#[test]
fn the_last_byte_of_memory_is_good_and_one_past_it_is_not() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        check_transmit(&guest, chain(100), &[readable(HOLE - 100, 100)]);
        both_refuse(features(packed), ChainError::Unmapped(HOLE - 99), |make| {
            vec![make(HOLE - 99, 100)]
        });
    }
}

#[test]
fn a_buffer_across_two_regions_is_copied_in_two_pieces() {
    for packed in KINDS {
        for before in [1, 12, 99] {
            let guest = Guest::new(SIZE, features(packed));
            let bytes = frame(9, 100);
            guest.write(SEAM - before, &bytes);
            let queue = start_transmit(&guest);
            guest.driver().post(&[readable(SEAM - before, 100)]);
            assert_eq!(take_bytes(&queue), bytes);

            let guest = Guest::new(SIZE, features(packed));
            let queue = start_receive(&guest);
            let mut driver = guest.driver();
            let id = driver.post(&[writable(SEAM - before, 300)]);
            assert_eq!(deliver(&queue, std::slice::from_ref(&bytes)), (1, None));
            assert_eq!(driver.reap_all(), [(id, 112)]);
            assert_eq!(guest.read(SEAM - before + 12, 100), bytes);
            receive_lives(&guest, &queue, &mut driver);
        }
    }
}

#[test]
fn a_writable_buffer_in_a_transmit_chain_returns_it() {
    for packed in KINDS {
        let (read, write) = (readable(GOOD, 50), writable(GOOD, 50));
        // The last one is also readable behind writable, which no driver may do.
        for pieces in [vec![write], vec![read, write], vec![write, read]] {
            transmit_refuses(features(packed), ChainError::Direction, &pieces);
        }
    }
}

#[test]
fn direction_in_a_packed_table_counts_for_a_receiveq_only() {
    // DPDK's driver leaves WRITE on parts of every frame of several pieces.
    for pieces in [
        [writable(GOOD, 12), readable(GOOD + 12, 50)],
        [readable(GOOD, 12), writable(GOOD + 12, 50)],
    ] {
        let guest = Guest::new(SIZE, features(true));
        let table = guest.table(DATA, &pieces);
        check_transmit(&guest, chain(62), &[table]);
    }
    // A receiveq's buffers are to be written, all of them.
    let guest = Guest::new(SIZE, features(true));
    let table = guest.table(DATA, &[readable(GOOD, 100), writable(GOOD + 100, 300)]);
    check_receive(&guest, &[table]);
}

#[test]
fn a_readable_buffer_in_a_receive_chain_is_never_written() {
    for packed in KINDS {
        let (read, write) = (readable(DATA, 100), writable(GOOD, 100));
        for pieces in [vec![read], vec![read, write], vec![write, read]] {
            let guest = Guest::new(SIZE, features(packed));
            let before = frame(0xa5, 100);
            guest.write(DATA, &before);
            check_receive(&guest, &pieces);
            assert_eq!(guest.read(DATA, 100), before);
        }
    }
}

#[test]
fn reserved_descriptor_flags_are_ignored() {
    // Bits 7 and 15 mean something in a packed ring.
    let reserved = 0x7f78;
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let mut piece = readable(GOOD, 50);
        piece.flags |= reserved;
        check_transmit(&guest, chain(100), &[piece, piece]);
    }
}

#[test]
fn the_length_of_a_short_buffer_counts_all_its_pieces() {
    for packed in KINDS {
        for mergeable in [false, true] {
            // The first piece holds header and frame, but is shorter than the shortest buffer that is used.
            let features = RingFeatures {
                mergeable,
                ..features(packed)
            };
            let guest = Guest::new(SIZE, features);
            let queue = start_receive(&guest);
            let mut driver = guest.driver();
            let id = driver.post(&[writable(DATA, 60), writable(GOOD, 1500)]);
            assert_eq!(deliver(&queue, &[frame(1, 42)]), (1, None));
            assert_eq!(driver.reap_all(), [(id, 54)], "packed: {packed}");
        }
    }
}

// Receive queues: too little room.

#[test]
fn a_claim_that_others_always_win_is_contended_and_harms_nothing() {
    for packed in KINDS {
        let guest = Guest::new(64, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        for n in 0..64 {
            driver.post(&[writable(DATA + 2048 * n, 2048)]);
        }
        let won = std::cell::Cell::new(0);
        // Whoever asks for the length of its frame finds that another thread has claimed meanwhile.
        let lengths = std::iter::once(100).inspect(|_| {
            let mut other = Claim::new();
            queue.claim(std::iter::once(60), &mut other).unwrap();
            queue.commit(&other);
            won.set(won.get() + 1);
        });
        let mut claim = Claim::new();
        assert_eq!(
            queue.claim(lengths, &mut claim).unwrap_err(),
            NoClaim::Contended
        );
        assert!((4..10).contains(&won.get()), "{} tries", won.get());
        assert_eq!(queue.published(), won.get());
        assert_eq!(queue.broken(), None);
        // Alone, it gets what it wants.
        queue.claim(std::iter::once(100), &mut claim).unwrap();
        assert_eq!((claim.frames(), claim.end()), (1, won.get() + 1));
    }
}

#[test]
fn an_empty_receive_ring_refuses_frames_for_ever_and_delivers_the_next_one() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        for _ in 0..1000 {
            assert_eq!(deliver(&queue, &[frame(0, 60)]), (0, Some(NoClaim::Full)));
        }
        receive_lives(&guest, &queue, &mut driver);
    }
}

#[test]
fn a_frame_that_needs_more_buffers_than_are_posted_publishes_nothing() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        let post =
            |driver: &mut Driver<'_>, i: u64| driver.post(&[writable(DATA + 0x1000 * i, 100)]);
        let mut ids = vec![post(&mut driver, 0), post(&mut driver, 1)];
        let long = frame(5, 288);
        for _ in 0..3 {
            assert_eq!(
                deliver(&queue, std::slice::from_ref(&long)),
                (0, Some(NoClaim::Full)),
                "packed: {packed}"
            );
            assert_eq!(driver.reap(), None);
        }
        ids.push(post(&mut driver, 2));
        assert_eq!(deliver(&queue, std::slice::from_ref(&long)), (1, None));
        let used: Vec<(u16, u32)> = ids.iter().map(|&id| (id, 100)).collect();
        assert_eq!(driver.reap_all(), used);
        assert_eq!(guest.read(DATA + 10, 2), [3, 0], "num_buffers");
    }
}

#[test]
fn a_frame_that_needs_more_buffers_than_the_ring_has_is_too_long() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        for _ in 0..SIZE {
            driver.post(&[writable(GOOD, 100)]);
        }
        let long = frame(5, 100 * usize::from(SIZE));
        assert_eq!(deliver(&queue, &[long]), (0, Some(NoClaim::TooLong)));
        assert_eq!(driver.reap(), None);
        assert_eq!(deliver(&queue, &[frame(5, 88)]), (1, None));
        assert_eq!(driver.reap_all().len(), 1);
    }
}

#[test]
fn a_frame_longer_than_an_unmergeable_buffer_leaves_the_buffer_where_it_is() {
    for packed in KINDS {
        let features = RingFeatures {
            mergeable: false,
            ..features(packed)
        };
        let guest = Guest::new(SIZE, features);
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        let id = driver.post(&[writable(GOOD, 100)]);
        driver.post(&[writable(GOOD, 200)]);
        assert_eq!(
            deliver(&queue, &[frame(0, 150)]),
            (0, Some(NoClaim::TooLong))
        );
        assert_eq!(driver.reap(), None);
        assert_eq!(deliver(&queue, &[frame(0, 88)]), (1, None));
        assert_eq!(driver.reap_all(), [(id, 100)]);
    }
}

#[test]
fn a_ring_full_of_one_byte_buffers_is_returned_in_bounded_steps() {
    for packed in KINDS {
        let guest = Guest::new(1024, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        let ids: Vec<u16> = (0..1024)
            .map(|_| driver.post(&[writable(GOOD, 1)]))
            .collect();
        let mut claims = 0;
        let mut claim = Claim::new();
        while queue.claim([1000].into_iter(), &mut claim).is_ok() {
            assert_eq!(claim.frames(), 0);
            assert!((1..=128).contains(&claim.bad_buffers()));
            queue.commit(&claim);
            claims += 1;
        }
        assert!((8..=16).contains(&claims), "{claims} claims");
        let used: Vec<(u16, u32)> = ids.iter().map(|&id| (id, 0)).collect();
        assert_eq!(driver.reap_all(), used);
        receive_lives(&guest, &queue, &mut driver);
    }
}

#[test]
fn a_bad_chain_inside_a_mergeable_frame_returns_what_was_read_for_it() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        let mut ids = vec![
            driver.post(&[writable(DATA, 100)]),
            driver.post(&[writable(HOLE, 100)]),
        ];
        ids.extend((2..5).map(|i| driver.post(&[writable(DATA + 0x1000 * i, 100)])));
        assert_eq!(deliver(&queue, &[frame(2, 250)]), (1, None));
        let lens = [0, 0, 100, 100, 62];
        let used: Vec<(u16, u32)> = ids.into_iter().zip(lens).collect();
        assert_eq!(driver.reap_all(), used, "packed: {packed}");
        assert_eq!(guest.read(DATA + 0x2000 + 10, 2), [3, 0], "num_buffers");
    }
}

// Packed rings.

/// Writes a one-buffer descriptor as it is.
fn write_desc(driver: &mut Driver<'_>, slot: u16, id: u16, flags: u16) {
    let (addr, len) = (GOOD, GOOD_LEN);
    let desc = Desc {
        addr,
        len,
        id,
        flags,
    };
    driver.packed().write_raw(slot, desc);
}

#[test]
fn descriptors_of_the_other_lap_are_not_available() {
    let guest = Guest::new(SIZE, features(true));
    let (transmit, receive) = (start_transmit(&guest), start_receive(&guest));
    let mut driver = guest.driver();
    // Both set is used in this lap, neither is fresh memory, USED alone is available in the other lap.
    for flags in [0, USED, AVAIL | USED] {
        for slot in 0..SIZE {
            write_desc(&mut driver, slot, slot, flags | WRITE);
        }
        assert_eq!(take_burst(&transmit), []);
        assert!(transmit.arm());
        let refused = deliver(&receive, &[frame(0, 60)]);
        assert_eq!(refused, (0, Some(NoClaim::Full)));
    }
    assert_eq!((transmit.broken(), receive.broken()), (None, None));
}

#[test]
fn buffer_ids_are_echoed_and_index_nothing() {
    let guest = Guest::new(SIZE, features(true));
    let queue = start_transmit(&guest);
    let mut driver = guest.driver();
    let ids = [SIZE, 0xffff, 3, 3];
    for (slot, id) in (0..).zip(ids) {
        write_desc(&mut driver, slot, id, AVAIL);
    }
    assert_eq!(take_burst(&queue), [chain(GOOD_LEN); 4]);
    queue.complete(queue.position());
    let ring = guest.areas().descriptors;
    for (slot, id) in (0..).zip(ids) {
        assert_eq!(ring.load_u16(slot * 16 + 12, Ordering::Relaxed), id);
        let flags = ring.load_u16(slot * 16 + 14, Ordering::Relaxed);
        assert_eq!(flags, AVAIL | USED);
    }
}

#[test]
fn a_descriptor_that_flips_is_used_as_it_was_read_once() {
    let guest = Guest::new(SIZE, features(true));
    let stop = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let ring = guest.areas().descriptors;
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                for len in [100, u32::MAX, 0, 1 << 20] {
                    ring.store_u32(8, len, Ordering::Relaxed);
                }
            }
        });
        for _ in 0..2000 {
            write_desc(&mut guest.driver(), 0, 0, AVAIL);
            let queue = start_transmit(&guest);
            let mut windows = Pieces::new();
            let taken = take(&queue, queue.available_to(), &mut windows);
            let sum: usize = windows.iter().map(|window| window.len()).sum();
            match taken {
                Taken::Chain { len } => assert_eq!(sum, len as usize),
                other => assert_eq!(other, Taken::Malformed(ChainError::Unmapped(GOOD))),
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn garbage_in_the_event_area_costs_at_most_a_spare_call() {
    for event_idx in [false, true] {
        let features = RingFeatures {
            event_idx,
            ..features(true)
        };
        let guest = Guest::new(SIZE, features);
        let queue = start_transmit(&guest);
        let mut driver = guest.driver();
        for (word, flags) in [(0, 3), (0xffff, 3), (0x7fff, 0xfffc)] {
            driver.packed().set_event(word, flags);
            driver.post(&[readable(GOOD, GOOD_LEN)]);
            assert_eq!(take_burst(&queue).len(), 1);
            queue.take_call_wanted(&FullBarrier::new());
            queue.complete(queue.position());
            assert!(
                queue.take_call_wanted(&FullBarrier::new()),
                "reserved flags count as enabled"
            );
            assert_eq!(driver.reap_all().len(), 1);
        }
        // A descriptor that the ring does not have: no access, no panic, no matter which answer.
        for word in [0x7fff, 0xffff, SIZE] {
            driver.packed().set_event(word, EVENT_DESC);
            driver.post(&[readable(GOOD, GOOD_LEN)]);
            take_burst(&queue);
            queue.complete(queue.position());
        }
        driver.reap_all();
        driver.packed().set_event(0, 0);
        transmit_lives(&guest, &queue, &mut driver);
    }
}

#[test]
fn a_base_that_disagrees_with_the_ring_idles() {
    let guest = Guest::new(SIZE, features(true));
    let mut driver = guest.driver();
    for _ in 0..SIZE {
        driver.post(&[readable(GOOD, GOOD_LEN)]);
    }
    let queue = TransmitQueue::start(&guest.setup(0)).unwrap();
    assert_eq!(take_burst(&queue), [], "wrap counter 0, descriptors of 1");
    assert!(queue.arm());
    assert_eq!(queue.broken(), None);
    let outside = u32::from(SIZE) | 0x8000;
    let refused = TransmitQueue::start(&guest.setup(outside)).map(|_| ());
    assert_eq!(refused, Err(SetupError::Base(outside)));
}

#[test]
fn in_order_was_promised_and_ids_come_out_of_order_yet_return_in_ring_order() {
    let features = RingFeatures {
        in_order: true,
        ..features(true)
    };
    let guest = Guest::new(SIZE, features);
    let queue = start_transmit(&guest);
    let mut driver = guest.driver();
    for lap in 0..3 {
        let ids = [5, 0, 7, 2, 6, 1, 4, 3].map(|id| (id + lap) % SIZE);
        for id in ids {
            driver.packed().post(id, &[readable(GOOD, GOOD_LEN)]);
        }
        assert_eq!(take_burst(&queue).len(), usize::from(SIZE));
        queue.complete(queue.position());
        assert_eq!(driver.reap_all(), ids.map(|id| (id, 0)));
    }
}

#[test]
fn one_bad_chain_among_four_harms_none_of_the_others() {
    for packed in KINDS {
        for bad in 0..4 {
            let guest = Guest::new(SIZE, features(packed));
            let queue = start_transmit(&guest);
            let mut driver = guest.driver();
            let mut expected = [chain(GOOD_LEN); 4];
            expected[bad] = Taken::Malformed(ChainError::Unmapped(HOLE));
            let ids: Vec<(u16, u32)> = (0..4)
                .map(|i| if i == bad { HOLE } else { GOOD })
                .map(|addr| (driver.post(&[readable(addr, GOOD_LEN)]), 0))
                .collect();
            assert_eq!(take_burst(&queue), expected);
            queue.complete(queue.position());
            assert_eq!(driver.reap_all(), ids);
        }
    }
}

// Indirect tables.

#[test]
fn an_indirect_table_with_a_bad_length_returns_the_chain() {
    for packed in KINDS {
        for len in [0, 1, 15, 17, 16 * 1025, 16 * 65535, 1 << 28] {
            let pieces = [indirect(DATA, len)];
            transmit_refuses(features(packed), ChainError::Indirect, &pieces);
            receive_refuses(features(packed), &pieces);
        }
    }
}

#[test]
fn an_indirect_descriptor_with_next_returns_the_whole_chain() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let table = guest.table(DATA, &[readable(GOOD, 50)]);
        // Posted as a chain of two, the first one has NEXT.
        let pieces = [table, readable(GOOD, 50)];
        check_transmit(&guest, Taken::Malformed(ChainError::Indirect), &pieces);
        receive_refuses(features(packed), &pieces);
    }
}

#[test]
fn a_table_inside_a_table_returns_the_chain() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let inner = guest.table(DATA + 0x1000, &[readable(GOOD, 50)]);
        let outer = guest.table(DATA, &[readable(GOOD, 50), inner]);
        check_transmit(&guest, Taken::Malformed(ChainError::Indirect), &[outer]);
    }
}

#[test]
fn a_table_that_was_not_negotiated_returns_the_chain() {
    for packed in KINDS {
        let features = RingFeatures {
            indirect: false,
            ..features(packed)
        };
        let guest = Guest::new(SIZE, features);
        let table = guest.table(DATA, &[readable(GOOD, 50)]);
        check_transmit(&guest, Taken::Malformed(ChainError::Indirect), &[table]);
    }
}

#[test]
fn a_table_in_a_hole_returns_the_chain() {
    for packed in KINDS {
        for addr in [HOLE, HOLE - 16, u64::MAX - 15] {
            let pieces = [indirect(addr, 32)];
            transmit_refuses(features(packed), ChainError::Unmapped(addr), &pieces);
            receive_refuses(features(packed), &pieces);
        }
    }
}

#[test]
fn a_split_table_that_loops_or_leads_outside_returns_the_chain() {
    for (from, next, error) in [
        (1, 0, ChainError::Loop),
        (1, 1, ChainError::Loop),
        (0, 2, ChainError::NextOutside(2)),
    ] {
        let guest = Guest::new(SIZE, features(false));
        let table = guest.table(DATA, &[readable(GOOD, 8); 2]);
        guest.table_entry(DATA, from, readable(GOOD, 8), NEXT, next);
        check_transmit(&guest, Taken::Malformed(error), &[table]);
    }
}

#[test]
fn next_flags_and_ids_in_a_packed_table_mean_nothing() {
    let guest = Guest::new(SIZE, features(true));
    let table = guest.table(DATA, &[readable(GOOD, 8); 3]);
    for index in 0..3 {
        guest.table_entry(DATA, index, readable(GOOD, 8), NEXT, 0xffff);
    }
    check_transmit(&guest, chain(24), &[table]);
}

#[test]
fn a_table_longer_than_the_ring_passes_up_to_the_limit() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let mut pieces = [readable(HOLE, 0); 256];
        pieces[255] = readable(GOOD, 70);
        let table = guest.table(DATA, &pieces);
        check_transmit(&guest, chain(70), &[table]);
    }
}

#[test]
fn an_unaligned_table_is_read_like_any_other() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let table = guest.table(DATA + 3, &[readable(GOOD, 8), readable(GOOD, 9)]);
        check_transmit(&guest, chain(17), &[table]);
    }
}

#[test]
fn a_table_that_is_the_ring_itself_returns_the_chain() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let pieces = [indirect(START, 16 * u32::from(SIZE))];
        check_transmit(&guest, Taken::Malformed(ChainError::Indirect), &pieces);
        receive_refuses(features(packed), &pieces);
    }
}

#[test]
fn a_receive_buffer_over_its_own_table_is_written_as_it_was_read() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let table = guest.table(DATA, &[writable(DATA, 100), writable(GOOD, 100)]);
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        let id = driver.post(&[table]);
        assert_eq!(deliver(&queue, &[frame(4, 150)]), (1, None));
        assert_eq!(driver.reap_all(), [(id, 162)]);
        assert_eq!(guest.read(GOOD, 62), frame(4, 150)[88..]);
        receive_lives(&guest, &queue, &mut driver);
    }
}

#[test]
fn buffers_over_the_ring_itself_reach_only_this_guest() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        for _ in 0..SIZE {
            driver.post(&[writable(START, 1500)]);
        }
        // Whatever it becomes: bounded, and inside the guest's own memory.
        for tag in 0..32 {
            deliver(&queue, &[frame(tag, 1488)]);
        }
    }
}
