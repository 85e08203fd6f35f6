//! What only a packed ring can be.

use super::*;

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
    // Both set is used in laps of wrap counter 1 and fresh in the others, neither the other way
    // round; one alone is available in its lap.
    for (base, other) in [(0x8000, USED), (0, AVAIL)] {
        let mut driver = guest.driver_at(base);
        let setup = guest.setup(base.into());
        let transmit = TransmitQueue::start(&setup).unwrap();
        let receive = ReceiveQueue::start(&setup).unwrap();
        for flags in [0, other, AVAIL | USED] {
            for slot in 0..SIZE {
                write_desc(&mut driver, slot, slot, flags | WRITE);
            }
            assert_eq!(take_burst(&transmit), []);
            assert!(transmit.arm());
            let refused = deliver(&receive, &[frame(0, 60)]);
            assert_eq!(refused, (0, Some(NoClaim::Full)));
        }
        assert_eq!((transmit.broken(), receive.broken()), (None, None));
        // The other one's are taken.
        for slot in 0..SIZE {
            write_desc(&mut driver, slot, slot, other ^ (AVAIL | USED));
        }
        assert_eq!(take_burst(&transmit).len(), usize::from(SIZE));
    }
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

    let queue = start_receive(&guest);
    for (slot, id) in (0..).zip(ids) {
        write_desc(&mut driver, slot, id, AVAIL | WRITE);
    }
    assert_eq!(deliver(&queue, &vec![frame(1, 70); 4]), (4, None));
    for (slot, id) in (0..).zip(ids) {
        assert_eq!(ring.load_u16(slot * 16 + 12, Ordering::Relaxed), id);
        assert_eq!(ring.load_u32(slot * 16 + 8, Ordering::Relaxed), 82);
        let flags = ring.load_u16(slot * 16 + 14, Ordering::Relaxed);
        assert_eq!(flags, AVAIL | USED | WRITE);
    }
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
    let mut driver = guest.driver();
    for _ in 0..SIZE {
        driver.post(&[writable(GOOD, ROOM)]);
    }
    let queue = ReceiveQueue::start(&guest.setup(0)).unwrap();
    let refused = deliver(&queue, &[frame(1, 60)]);
    assert_eq!(refused, (0, Some(NoClaim::Full)));
    assert_eq!((queue.broken(), driver.reap()), (None, None));
    let outside = u32::from(SIZE) | 0x8000;
    let refused = TransmitQueue::start(&guest.setup(outside)).map(|_| ());
    assert_eq!(refused, Err(SetupError::Base(outside)));
    let refused = ReceiveQueue::start(&guest.setup(outside)).map(|_| ());
    assert_eq!(refused, Err(SetupError::Base(outside)));
}

#[test]
fn in_order_was_promised_and_ids_come_out_of_order_yet_return_in_ring_order() {
    let features = RingFeatures {
        in_order: true,
        ..features(true)
    };
    let ids_of = |lap: u16| [5, 0, 7, 2, 6, 1, 4, 3].map(|id| (id + lap) % SIZE);
    let guest = Guest::new(SIZE, features);
    let queue = start_transmit(&guest);
    let mut driver = guest.driver();
    for lap in 0..3 {
        let ids = ids_of(lap);
        for id in ids {
            driver.packed().post(id, &[readable(GOOD, GOOD_LEN)]);
        }
        assert_eq!(take_burst(&queue).len(), usize::from(SIZE));
        queue.complete(queue.position());
        assert_eq!(driver.reap_all(), ids.map(|id| (id, 0)));
    }

    let guest = Guest::new(SIZE, features);
    let queue = start_receive(&guest);
    let mut driver = guest.driver();
    for lap in 0..3 {
        let ids = ids_of(lap);
        for id in ids {
            driver.packed().post(id, &[writable(GOOD, ROOM)]);
        }
        let frames: Vec<Vec<u8>> = (0..SIZE).map(|n| frame(1, 60 + usize::from(n))).collect();
        assert_eq!(deliver(&queue, &frames), (usize::from(SIZE), None));
        let lens = (72..).take(usize::from(SIZE));
        let used: Vec<(u16, u32)> = ids.into_iter().zip(lens).collect();
        assert_eq!(driver.reap_all(), used);
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
