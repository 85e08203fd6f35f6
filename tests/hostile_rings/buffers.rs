//! Buffers of chains in rings of both kinds.

use super::*;

#[test]
fn a_chain_of_more_pieces_than_are_kept_is_returned() {
    let pieces = MAX_CHAIN + 1;
    for packed in KINDS {
        for write in [false, true] {
            let guest = Guest::new(2048, features(packed));
            let make = if write { writable } else { readable };
            let chain: Vec<Piece> = (0..pieces).map(|_| make(GOOD, 1)).collect();
            if write {
                // Reading it was enough for a claim.
                let queue = start_receive(&guest);
                let mut driver = guest.driver();
                let ids = [&chain[..], &[writable(GOOD, ROOM)]].map(|chain| driver.post(chain));
                assert_eq!(deliver(&queue, &[frame(7, 1500)]), (1, None));
                assert_eq!(driver.reap_all(), [(ids[0], 0), (ids[1], 1512)]);
                receive_lives(&guest, &queue, &mut driver);
            } else {
                check_transmit(&guest, Taken::Malformed(ChainError::TooManyBuffers), &chain);
            }
        }
    }
}

#[test]
fn a_chain_of_as_many_pieces_as_are_kept_passes() {
    for packed in KINDS {
        let guest = Guest::new(1024, features(packed));
        let pieces = [readable(GOOD, 2); MAX_CHAIN];
        let queue = start_transmit(&guest);
        let mut driver = guest.driver();
        let id = driver.post(&pieces);
        assert_eq!(take_burst(&queue), [chain(2 * MAX_CHAIN as u32)]);
        queue.complete(queue.position());
        assert_eq!(driver.reap_all(), [(id, 0)]);
        transmit_lives(&guest, &queue, &mut driver);
    }
}

#[test]
fn a_buffer_across_two_regions_counts_as_two_pieces() {
    for packed in KINDS {
        let guest = Guest::new(2048, features(packed));
        let mut pieces = [readable(GOOD, 2); MAX_CHAIN];
        pieces[MAX_CHAIN / 2] = readable(SEAM - 1, 2);
        check_transmit(
            &guest,
            Taken::Malformed(ChainError::TooManyBuffers),
            &pieces,
        );
    }
}

/// Numbers of pieces that drivers and other backends stop at, and the most that are kept.
const COUNTS: [usize; 13] = [
    2, 19, 63, 64, 65, 66, 100, 128, 200, 255, 256, 1023, MAX_CHAIN,
];

/// Where `count` pieces of one chain lie and how long they are: the header is the first one, or cut
/// at `cut`; no two touch.
fn places(count: usize, cut: usize) -> Vec<(u64, u32)> {
    let rest = (FRAME + HEADER - cut) / (count - 1);
    let len = |n| match n {
        0 => cut,
        n if n + 1 == count => FRAME + HEADER - cut - rest * (count - 2),
        _ => rest,
    };
    let at = |n: usize| DATA + 0x10_0000 + 300 * n as u64;
    let long = DATA + 0x10_0000 - 0x1000;
    (0..count)
        .map(|n| (if len(n) > 300 { long } else { at(n) }, len(n) as u32))
        .collect()
}

/// Bytes of a frame in them.
const FRAME: usize = 1400;

/// A chain of these, as it is or in a table.
fn chain_of(guest: &Guest, pieces: Vec<Piece>, table: bool) -> Vec<Piece> {
    if table {
        vec![guest.table(DATA, &pieces)]
    } else {
        pieces
    }
}

/// Kinds of ring, whether the chain is in a table, number of its pieces, bytes of the first one.
fn forms() -> impl Iterator<Item = (bool, bool, usize, usize)> {
    let kinds = KINDS
        .into_iter()
        .flat_map(|packed| [(packed, false), (packed, true)]);
    kinds.flat_map(|(packed, table)| {
        let counts = COUNTS
            .into_iter()
            .flat_map(|count| [(count, 1), (count, 11), (count, 12), (count, 70)]);
        counts.map(move |(count, cut)| (packed, table, count, cut))
    })
}

#[test]
fn a_frame_sent_from_any_number_of_pieces_is_read_whole() {
    for (packed, table, count, cut) in forms() {
        let guest = Guest::new(1024, features(packed));
        let bytes = frame(count as u8, FRAME + HEADER);
        let places = places(count, cut);
        let mut at = 0;
        for (addr, len) in &places {
            guest.write(*addr, &bytes[at..at + *len as usize]);
            at += *len as usize;
        }
        let pieces = places.iter().map(|(addr, len)| readable(*addr, *len));
        let chain = chain_of(&guest, pieces.collect(), table);
        let queue = start_transmit(&guest);
        let mut driver = guest.driver();
        let id = driver.post(&chain);
        assert_eq!(take_bytes(&queue), bytes, "{packed} {table} {count} {cut}");
        queue.complete(queue.position());
        assert_eq!(driver.reap_all(), [(id, 0)]);
    }
}

#[test]
fn a_receive_buffer_of_any_number_of_pieces_is_filled_whole() {
    for (packed, table, count, cut) in forms() {
        let guest = Guest::new(1024, features(packed));
        let places = places(count, cut);
        let pieces = places.iter().map(|(addr, len)| writable(*addr, *len));
        let chain = chain_of(&guest, pieces.collect(), table);
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        let id = driver.post(&chain);
        let sent = frame(count as u8, FRAME);
        assert_eq!(deliver(&queue, std::slice::from_ref(&sent)), (1, None));
        assert_eq!(driver.reap_all(), [(id, (FRAME + HEADER) as u32)]);
        let found = places
            .iter()
            .flat_map(|(addr, len)| guest.read(*addr, *len));
        let found: Vec<u8> = found.skip(HEADER).collect();
        assert!(found == sent, "{packed} {table} {count} {cut}");
    }
}

#[test]
fn a_frame_over_buffers_of_many_pieces_gets_as_many_as_a_claim_has_room_for() {
    // 64 pieces of 16 bytes are a buffer of 1 KiB.
    for packed in KINDS {
        for (buffers, fits) in [(8, true), (17, true), (19, false)] {
            let guest = Guest::new(2048, features(packed));
            let queue = start_receive(&guest);
            let mut driver = guest.driver();
            for buffer in 0..24 {
                let at = |n: u64| DATA + 0x10_0000 + 0x1000 * buffer + 32 * n;
                let pieces: Vec<Piece> = (0..64).map(|n| writable(at(n), 16)).collect();
                driver.post(&pieces);
            }
            let sent = frame(3, 1024 * buffers - HEADER);
            let expected = if fits {
                (1, None)
            } else {
                (0, Some(NoClaim::TooLong))
            };
            assert_eq!(deliver(&queue, std::slice::from_ref(&sent)), expected);
            assert_eq!(driver.reap_all().len(), if fits { buffers } else { 0 });
        }
    }
}

#[test]
fn frames_for_buffers_of_many_pieces_are_claimed_for_one_after_the_other() {
    for packed in KINDS {
        let guest = Guest::new(2048, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        for n in 0..3 {
            let at = |piece: u64| DATA + 0x10_0000 * n + 4 * piece;
            let pieces: Vec<Piece> = (0..600).map(|piece| writable(at(piece), 3)).collect();
            driver.post(&pieces);
        }
        let frames = [1, 2, 3].map(|tag| frame(tag, 1700));
        assert_eq!(deliver(&queue, &frames), (3, None));
        let lens: Vec<u32> = driver.reap_all().iter().map(|(_, len)| *len).collect();
        assert_eq!(lens, [1712; 3]);
        assert_eq!(queue.broken(), None);
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
fn an_empty_receive_buffer_at_a_bad_address_is_skipped() {
    for packed in KINDS {
        for at in 0..3 {
            for addr in [0, HOLE, u64::MAX] {
                let guest = Guest::new(SIZE, features(packed));
                let queue = start_receive(&guest);
                let mut driver = guest.driver();
                let mut pieces = vec![writable(GOOD, 50), writable(GOOD + 50, 300)];
                pieces.insert(at, writable(addr, 0));
                let id = driver.post(&pieces);
                let next = driver.post(&[writable(GOOD + 0x1000, ROOM)]);
                // Longer than the first buffer, so that all of it is looked at.
                let long = frame(5, 400);
                assert_eq!(deliver(&queue, std::slice::from_ref(&long)), (1, None));
                assert_eq!(driver.reap_all(), [(id, 350), (next, 62)]);
                assert_eq!(guest.read(GOOD + HEADER as u64, 338), long[..338]);
                assert_eq!(guest.read(GOOD + 0x1000, 62), long[338..]);
                receive_lives(&guest, &queue, &mut driver);
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
            // The first piece holds header and frame, but is shorter than the shortest buffer that
            // is used.
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
