//! Indirect tables.

use super::*;

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
        let guest = Guest::new(SIZE, features);
        let before = frame(0xa5, 300);
        guest.write(DATA + 0x1000, &before);
        let table = guest.table(DATA, &[writable(DATA + 0x1000, 300)]);
        check_receive(&guest, &[table]);
        assert_eq!(guest.read(DATA + 0x1000, 300), before);
    }
}

#[test]
fn a_table_behind_a_buffer_is_read_in_a_split_ring_and_returns_the_chain_in_a_packed_one() {
    for packed in KINDS {
        // §2.7.5.3.2 allows it, §2.8.7 does not.
        let guest = Guest::new(SIZE, features(packed));
        let table = guest.table(DATA, &[readable(GOOD, 50), readable(GOOD, 30)]);
        let expected = if packed {
            Taken::Malformed(ChainError::Indirect)
        } else {
            chain(90)
        };
        check_transmit(&guest, expected, &[readable(GOOD, 10), table]);

        let guest = Guest::new(SIZE, features(packed));
        let inside = DATA + 0x1000;
        let table = guest.table(DATA, &[writable(inside, 400)]);
        let pieces = [writable(GOOD + 0x1000, 100), table];
        if packed {
            guest.write(inside, &frame(0xa5, 400));
            check_receive(&guest, &pieces);
            assert_eq!(guest.read(inside, 400), frame(0xa5, 400));
        } else {
            let queue = start_receive(&guest);
            let mut driver = guest.driver();
            let id = driver.post(&pieces);
            assert_eq!(deliver(&queue, &[frame(3, 300)]), (1, None));
            assert_eq!(driver.reap_all(), [(id, 312)]);
            assert_eq!(guest.read(inside, 212), frame(3, 300)[88..]);
            receive_lives(&guest, &queue, &mut driver);
        }
    }
}

#[test]
fn a_table_inside_its_own_frame_is_sent_as_it_stands() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        guest.write(DATA, &frame(9, 300));
        let entries = [readable(DATA, 100), readable(DATA + 100, 200)];
        let table = guest.table(DATA + 64, &entries);
        let queue = start_transmit(&guest);
        let mut driver = guest.driver();
        let id = driver.post(&[table]);
        assert_eq!(take_bytes(&queue), guest.read(DATA, 300));
        queue.complete(queue.position());
        assert_eq!(driver.reap_all(), [(id, 0)]);
        transmit_lives(&guest, &queue, &mut driver);
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
        let mut pieces = [readable(HOLE, 0); MAX_CHAIN];
        pieces[MAX_CHAIN - 1] = readable(GOOD, 70);
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
