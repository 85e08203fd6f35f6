//! Rings as they are set up: sizes, places, orders and repetitions of messages, split and packed.

use super::*;

fn with_memory(packed: bool) -> Peer {
    Peer::with_memory(SessionOptions::new(1), packed)
}

fn refusal(peer: &Peer) -> String {
    // Whatever came before has been done by the time of its answer.
    peer.queue_num();
    peer.status.snapshot().state
}

#[test]
fn sizes_of_packed_rings_are_any_up_to_the_largest() {
    for negotiated in [false, true] {
        let mut peer = Peer::new();
        let features = peer.negotiate() | PACKED;
        if negotiated {
            peer.frontend.set_features(features).unwrap();
        }
        for (size, refused) in [
            (0, 1),
            (32769, 1),
            (65535, 1),
            (65536, 1),
            (0x1_0100, 1),
            (u32::MAX, 1),
            (1, 0),
            (3, 0),
            (320, 0),
            (32767, 0),
            (32768, 0),
        ] {
            peer.send_ring(FrontendReq::SET_VRING_NUM, NEED_REPLY, 0, size);
            assert_eq!(peer.reply(), Some(refused), "{size}");
        }
        peer.leave();
    }
}

#[test]
fn a_size_for_a_packed_ring_is_none_for_a_split_one() {
    let mut peer = Peer::new();
    let features = peer.negotiate();
    // It may still become a packed ring.
    peer.send_ring(FrontendReq::SET_VRING_NUM, NEED_REPLY, 0, 320);
    assert_eq!(peer.reply(), Some(0));
    peer.frontend.set_features(features).unwrap();
    peer.share_memory();
    peer.frontend
        .set_vring_addr(0, &Peer::addresses(0))
        .unwrap();
    peer.frontend.set_vring_kick(0, &peer.calls[0]).unwrap();
    let state = refusal(&peer);
    assert!(!peer.started(0) && state.contains("320 entries"), "{state}");
    peer.send_ring(FrontendReq::SET_VRING_NUM, NEED_REPLY, 0, 320);
    assert_eq!(peer.reply(), Some(1));
    peer.frontend.set_vring_num(0, ENTRIES).unwrap();
    assert!(peer.started(0));
    peer.leave();
}

/// Bytes of a descriptor area.
const DESCRIPTORS: u64 = 16 * ENTRIES as u64;

/// Descriptors, available and used ring, from a ring's good addresses.
type Misplace = fn(&mut VringConfigData);

#[test]
fn rings_that_are_misplaced_do_not_start() {
    const UNALIGNED: &str = "not aligned";
    const OUTSIDE: &str = "outside of guest memory";
    let both: &[(Misplace, &str)] = &[
        // In no region, and with its end in none.
        (|at| at.desc_table_addr = 0x1000, OUTSIDE),
        (|at| at.avail_ring_addr = USER + 4 * SIZE, OUTSIDE),
        (|at| at.desc_table_addr = USER + 2 * SIZE - 16, OUTSIDE),
        (
            |at| at.desc_table_addr = USER + 2 * SIZE - DESCRIPTORS + 16,
            OUTSIDE,
        ),
        (|at| at.used_ring_addr = USER + 2 * SIZE, OUTSIDE),
        // Across two regions that touch, in addresses of the frontend as in the guest's.
        (|at| at.desc_table_addr = USER + SIZE - 16, OUTSIDE),
        (|at| at.desc_table_addr = u64::MAX - 15, OUTSIDE),
        (|at| at.avail_ring_addr = u64::MAX - 3, OUTSIDE),
        (|at| at.used_ring_addr = u64::MAX - 3, OUTSIDE),
    ];
    for packed in [false, true] {
        let places = |misplace: Misplace| {
            let mut at = Peer::addresses(0);
            misplace(&mut at);
            at
        };
        let bad = both.iter().map(|(misplace, why)| (places(*misplace), *why));
        let mut bad: Vec<_> = bad.collect();
        if packed {
            // Two bytes are enough for a split ring.
            bad.push((places(|at| at.avail_ring_addr += 2), UNALIGNED));
        } else {
            // Only the event index is missing behind its last entry.
            let end = 4 + 2 * u64::from(ENTRIES);
            let mut at = Peer::addresses(0);
            at.avail_ring_addr = USER + 2 * SIZE - end;
            bad.push((at, OUTSIDE));
            bad.push((
                places(|at| at.used_ring_addr = USER + 2 * SIZE - 4),
                OUTSIDE,
            ));
        }
        for (at, why) in bad {
            let place = [at.desc_table_addr, at.avail_ring_addr, at.used_ring_addr];
            let what = format!("packed: {packed}, {place:x?}");
            // Addresses before memory, and behind it.
            for early in [false, true] {
                let mut peer = Peer::new();
                let features = peer.negotiate_kind(packed);
                peer.frontend.set_features(features).unwrap();
                peer.frontend.set_vring_num(0, ENTRIES).unwrap();
                peer.frontend.set_vring_kick(0, &peer.calls[0]).unwrap();
                let share = || {
                    let regions = [peer.region(0, 0, SIZE), peer.region(SIZE, SIZE, SIZE)];
                    peer.frontend.set_mem_table(&regions).unwrap();
                };
                if early {
                    peer.frontend.set_vring_addr(0, &at).unwrap();
                    share();
                } else {
                    share();
                    let refused = peer.frontend.set_vring_addr(0, &at).is_err();
                    assert_eq!(refused, why == OUTSIDE, "{what}");
                }
                let state = refusal(&peer);
                assert!(!peer.started(0), "{what}");
                assert!(!early || state.contains(why), "{what}: {state}");
                peer.frontend
                    .set_vring_addr(0, &Peer::addresses(0))
                    .unwrap();
                assert!(peer.started(0), "after {what}");
                peer.leave();
            }
        }
    }
}

#[test]
fn rings_may_end_where_their_region_ends() {
    // With the event indexes behind the last entries, as they are negotiated; packed rings have but
    // four bytes.
    for (packed, available, used) in [(false, 6 + 2 * 256, 6 + 8 * 256), (true, 4, 4)] {
        let places: [&dyn Fn(&mut VringConfigData); 3] = [
            &|at| at.desc_table_addr = USER + SIZE - DESCRIPTORS,
            &|at| at.avail_ring_addr = USER + SIZE - available,
            // The next place that is aligned.
            &|at| at.used_ring_addr = (USER + SIZE - used) & !3,
        ];
        for place in places {
            let peer = with_memory(packed);
            let mut at = Peer::addresses(0);
            place(&mut at);
            peer.frontend.set_vring_num(0, ENTRIES).unwrap();
            peer.frontend.set_vring_addr(0, &at).unwrap();
            peer.frontend.set_vring_kick(0, &peer.calls[0]).unwrap();
            assert!(peer.started(0), "packed: {packed}");
            peer.leave();
        }
    }
}

#[test]
fn a_packed_ring_whose_base_is_behind_its_end_does_not_start() {
    for slot in [ENTRIES, ENTRIES + 1, 0x7fff] {
        // In either lap.
        for base in [base_at(true, slot), base_at(true, slot) & !0x8000_8000] {
            let peer = with_memory(true);
            peer.start_ring(0, base);
            let state = refusal(&peer);
            assert!(!peer.started(0), "{base:#x}");
            let why = format!("ring base {base:#x} is outside the ring");
            assert!(state.contains(&why), "{state}");
            // A better base is all that it lacks.
            let last = base_at(true, ENTRIES - 1);
            peer.send_ring(FrontendReq::SET_VRING_BASE, NEED_REPLY, 0, last);
            assert_eq!(peer.reply(), Some(0));
            assert!(peer.started(0));
            assert_eq!(peer.frontend.get_vring_base(0).unwrap(), last);
            peer.leave();
        }
    }
}

#[test]
fn misaligned_rings_end_their_session() {
    let bad: [Misplace; 3] = [
        |at| at.desc_table_addr += 8,
        |at| at.avail_ring_addr += 1,
        |at| at.used_ring_addr += 2,
    ];
    for (packed, misplace) in [false, true].into_iter().flat_map(|p| bad.map(|m| (p, m))) {
        let peer = with_memory(packed);
        peer.frontend.set_vring_num(0, ENTRIES).unwrap();
        let mut at = Peer::addresses(0);
        misplace(&mut at);
        assert!(peer.frontend.set_vring_addr(0, &at).is_err());
        assert!(peer.refused().contains("SET_VRING_ADDR: invalid message"));
    }
}

/// All orders of these numbers.
fn orders(of: &[usize]) -> Vec<Vec<usize>> {
    if of.is_empty() {
        return vec![Vec::new()];
    }
    let each = of.iter().enumerate().flat_map(|(at, first)| {
        let rest = [&of[..at], &of[at + 1..]].concat();
        let mut all = orders(&rest);
        all.iter_mut().for_each(|order| order.insert(0, *first));
        all
    });
    each.collect()
}

#[test]
fn set_up_messages_may_come_in_any_order() {
    let orders = orders(&[0, 1, 2, 3, 4, 5]).into_iter().enumerate();
    for (packed, (turn, order)) in orders.flat_map(|order| [(false, order.clone()), (true, order)])
    {
        let mut peer = Peer::new();
        let features = peer.negotiate_kind(packed);
        if turn % 2 == 0 {
            peer.send_ring(FrontendReq::SET_VRING_ENABLE, NEED_REPLY, 0, 1);
            assert_eq!(peer.reply(), Some(0));
        }
        if !packed {
            peer.poke(0, USED + 2, 3);
        }
        let base = base_at(packed, 3);
        // A ring starts without a base, too; behind the start it comes too late.
        let late = order[5] == 4;
        for (at, step) in order.iter().enumerate() {
            assert_eq!(peer.started(0), late && at == 5, "{order:?}");
            match step {
                0 => peer.frontend.set_features(features).unwrap(),
                1 => peer.share_memory(),
                2 => peer.frontend.set_vring_num(0, ENTRIES).unwrap(),
                3 => {
                    let at = Peer::addresses(0);
                    peer.frontend.set_vring_addr(0, &at).unwrap();
                }
                4 => {
                    peer.send_ring(FrontendReq::SET_VRING_BASE, NEED_REPLY, 0, base);
                    assert_eq!(peer.reply(), Some(u64::from(late)));
                }
                _ => peer.frontend.set_vring_kick(0, &peer.calls[8]).unwrap(),
            }
        }
        assert!(peer.started(0), "packed: {packed}, {order:?}");
        let ring = peer.pair(0).receive.unwrap();
        assert_eq!(ring.enabled, turn % 2 == 0);
        drop(ring);
        let expected = if packed && late { 0x8000_8000 } else { base };
        let found = peer.frontend.get_vring_base(0).unwrap();
        assert_eq!(found, expected, "packed: {packed}, {order:?}");
        peer.leave();
    }
}

#[test]
fn messages_that_are_repeated_leave_nothing_behind() {
    for (packed, name) in [(false, "vu-again-split"), (true, "vu-again-packed")] {
        let mut peer = Peer::new();
        peer.memory = memfd::create(name, 2 * SIZE).unwrap();
        let features = peer.negotiate_kind(packed);
        for turn in 0..1000_u16 {
            peer.frontend.set_owner().unwrap();
            peer.frontend.set_features(features).unwrap();
            let size = if packed { turn + 1 } else { 1 << (turn % 16) };
            peer.frontend.set_vring_num(0, size).unwrap();
            peer.send_ring(FrontendReq::SET_VRING_BASE, NEED_REPLY, 0, turn.into());
            assert_eq!(peer.reply(), Some(0));
            peer.share_memory();
            for ring in 0..4 {
                let call = &peer.calls[0];
                peer.frontend.set_vring_call(ring, call).unwrap();
                peer.frontend.set_vring_err(ring, call).unwrap();
            }
        }
        // Ours alone; and of the call ours, and one a ring.
        assert_eq!((descriptors(name), mappings(name)), (1, 1));
        assert_eq!(descriptors(&id_of(&peer.calls[0])), 5);
        for ring in 0..2 {
            peer.start_ring(ring, base_at(packed, 0));
            peer.frontend.set_vring_enable(ring, true).unwrap();
            assert!(peer.started(ring));
        }
        peer.leave();
        assert_eq!(mappings(name), 0);
    }
}

#[test]
fn owners_come_late_twice_or_never() {
    for packed in [false, true] {
        let peer = with_memory(packed);
        peer.start_ring(0, 0);
        peer.frontend.set_owner().unwrap();
        peer.frontend.set_owner().unwrap();
        assert!(peer.started(0));
        // The specification would rather have it ignored.
        peer.frontend.reset_owner().unwrap();
        assert!(peer.started(0));
        peer.leave();
        let peer = Peer::new();
        let features = peer.frontend.get_features().unwrap();
        let packed = if packed { PACKED } else { 0 };
        peer.frontend
            .set_features(features & !PACKED | packed)
            .unwrap();
        peer.share_memory();
        peer.start_ring(0, 0);
        // An answer behind all that.
        peer.frontend.get_vring_base(3).unwrap();
        assert!(peer.started(0));
        peer.leave();
    }
}

#[test]
fn protocol_features_may_be_set_again_and_shrink() {
    let mut peer = Peer::up(false);
    let all = peer.frontend.get_protocol_features().unwrap();
    for features in [all, Protocol::MQ | Protocol::REPLY_ACK, all] {
        peer.frontend.set_protocol_features(features).unwrap();
        assert!(peer.started(0) && peer.started(1));
    }
    // Without acknowledgements from here on: a refusal ends the session.
    peer.frontend.set_protocol_features(Protocol::MQ).unwrap();
    peer.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
    assert_eq!(peer.queue_num(), Some(3));
    assert!(peer.started(0));
    peer.send_ring(FrontendReq::SET_VRING_NUM, NEED_REPLY, 0, 7);
    assert!(peer.refused().contains("cannot have 7 entries"));
}

#[test]
fn a_log_address_means_nothing_where_no_log_is_offered() {
    for packed in [false, true] {
        let peer = with_memory(packed);
        let at = VringConfigData {
            flags: 1,
            log_addr: Some(u64::MAX - 7),
            ..Peer::addresses(0)
        };
        peer.frontend.set_vring_num(0, ENTRIES).unwrap();
        peer.frontend.set_vring_addr(0, &at).unwrap();
        peer.frontend.set_vring_kick(0, &peer.calls[0]).unwrap();
        assert!(peer.started(0));
        peer.leave();
    }
}

#[test]
fn a_split_base_is_counted_in_16_bits() {
    let peer = with_memory(false);
    peer.poke(0, USED + 2, 5);
    peer.frontend.set_vring_num(0, ENTRIES).unwrap();
    peer.send_ring(FrontendReq::SET_VRING_BASE, NEED_REPLY, 0, 0xffff_0005);
    assert_eq!(peer.reply(), Some(0));
    peer.frontend
        .set_vring_addr(0, &Peer::addresses(0))
        .unwrap();
    peer.frontend.set_vring_kick(0, &peer.calls[0]).unwrap();
    assert!(peer.started(0) && !peer.said("not at the base"));
    assert_eq!(peer.frontend.get_vring_base(0).unwrap(), 5);
    peer.leave();
}
