//! What a driver writes into the rings beside the descriptors.

use super::*;

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
