//! Links between descriptors.

use super::*;

/// Posts a prepared split chain in both directions; `link` gives flags and next of its last
/// descriptor.
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
fn a_loop_of_empty_buffers_in_the_largest_ring_is_followed_no_further_than_the_longest_chain() {
    let guest = Guest::new(32768, features(false));
    let mut driver = guest.driver();
    let empty = vec![readable(DATA, 0); 32768];
    let split = driver.split();
    let head = split.prepare(&empty, NEXT, 0);
    split.offer_raw(head);
    let queue = start_transmit(&guest);
    let mut windows = Pieces::new();
    let taken = queue.take(queue.available_to(), &mut windows);
    assert_eq!(taken, Taken::Malformed(ChainError::TooManyBuffers));
    assert_eq!(windows.read(), MAX_CHAIN as u32);
    queue.complete(queue.position());
    assert_eq!(driver.reap_all(), [(head, 0)]);
    assert_eq!(queue.broken(), None);
}

#[test]
fn a_packed_chain_is_returned_whole_where_its_end_is_near_and_breaks_the_ring_where_it_is_far() {
    for (count, broken) in [
        (MAX_CHAIN + 1, None),
        (4 * MAX_CHAIN, None),
        (4 * MAX_CHAIN + 1, Some(Broken::EndlessChain { size: 4096 })),
    ] {
        let guest = Guest::new(32768, features(true));
        let queue = start_transmit(&guest);
        let mut driver = guest.driver();
        let id = driver.post(&vec![readable(GOOD, 1); count]);
        let mut windows = Pieces::new();
        let taken = queue.take(queue.available_to(), &mut windows);
        assert_eq!(queue.broken(), broken);
        if broken.is_none() {
            assert_eq!(taken, Taken::Malformed(ChainError::TooManyBuffers));
            assert_eq!((windows.len(), windows.read()), (0, count as u32));
            queue.complete(queue.position());
            assert_eq!(driver.reap_all(), [(id, 0)]);
        }
    }
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
