//! Sessions of frontends that mean well, in the orders that real ones use.

use super::*;

/// ENABLE, CALL and ERR come before everything else, some messages twice.
#[test]
fn qemu_order() {
    let mut peer = Peer::new();
    assert!(
        peer.status
            .snapshot()
            .state
            .contains("features not negotiated")
    );
    let features = peer.negotiate();
    assert_eq!(peer.frontend.get_queue_num().unwrap(), 3);
    for ring in 0..2 {
        peer.frontend
            .set_vring_call(ring, &peer.calls[ring])
            .unwrap();
        peer.frontend.set_vring_err(ring, &peer.calls[2]).unwrap();
        for _ in 0..3 {
            peer.send_ring(FrontendReq::SET_VRING_ENABLE, NEED_REPLY, ring as u32, 1);
            assert_eq!(peer.reply(), Some(0));
        }
    }
    peer.frontend.set_features(features).unwrap();
    assert!(
        peer.status
            .snapshot()
            .state
            .contains("memory-backend-memfd,share=on")
    );
    peer.share_memory();
    for ring in 0..2 {
        assert!(!peer.started(ring));
        peer.start_ring(ring, 0);
        assert!(peer.started(ring));
    }
    let pair = peer.pair(0);
    assert!(
        pair.receive
            .is_some_and(|ring| ring.enabled && ring.call.is_some())
    );
    assert!(
        pair.transmit
            .is_some_and(|ring| ring.enabled && ring.kick.is_some())
    );
    let snapshot = peer.status.snapshot();
    assert!(
        snapshot.working && snapshot.state == "running",
        "{snapshot:?}"
    );
    assert_eq!((snapshot.memory_regions, snapshot.memory_bytes), (1, SIZE));
    assert!(matches!(peer.leave(), SessionEnd::Disconnected));
}

/// Memory slot by slot, ADDR before BASE, base = avail_idx, KICK before CALL, ENABLE last.
#[test]
fn cloud_hypervisor_order() {
    let mut peer = Peer::new();
    let features = peer.negotiate();
    peer.frontend.set_features(features).unwrap();
    assert_eq!(peer.frontend.get_max_mem_slots().unwrap(), 509);
    peer.frontend
        .add_mem_region(&peer.region(0, 0, SIZE))
        .unwrap();
    for ring in 0..2 {
        peer.poke(ring as u64, USED + 2, 7);
        peer.frontend.set_vring_num(ring, ENTRIES).unwrap();
        peer.frontend
            .set_vring_addr(ring, &Peer::addresses(ring))
            .unwrap();
        peer.frontend.set_vring_base(ring, 20).unwrap();
        peer.frontend
            .set_vring_kick(ring, &peer.calls[ring + 8])
            .unwrap();
        peer.frontend
            .set_vring_call(ring, &peer.calls[ring])
            .unwrap();
    }
    assert!(
        peer.status
            .snapshot()
            .state
            .contains("receiveq 0 not enabled")
    );
    assert!(peer.pair(0).receive.is_some_and(|ring| !ring.enabled));
    for ring in 0..2 {
        peer.frontend.set_vring_enable(ring, true).unwrap();
    }
    assert!(peer.status.snapshot().working);
    assert!(peer.said("transmitq 0 starts at its used index 7, not at the base 20"));
    assert_eq!(base_of(0, &peer), 7);
    peer.leave();
}

/// Every message boundary of a whole life, with the descriptors counted afterwards.
#[test]
fn disconnect_at_every_boundary() {
    for (packed, name) in [(false, "vu-boundary-split"), (true, "vu-boundary-packed")] {
        for steps in 0..=STEPS {
            let mut peer = Peer::new();
            peer.memory = memfd::create(name, 2 * SIZE).unwrap();
            let id = id_of(&peer.calls[0]);
            run_steps(&mut peer, packed, steps);
            let (memory, calls) = (
                peer.memory.try_clone().unwrap(),
                peer.calls[0].try_clone().unwrap(),
            );
            assert!(matches!(peer.leave(), SessionEnd::Disconnected));
            // Ours only: what the peer held went with it.
            assert_eq!(descriptors(&id), 1);
            drop((memory, calls));
            assert_eq!((descriptors(name), mappings(name)), (0, 0));
        }
    }
}

const STEPS: usize = 15;

/// Does the first `steps` messages of a life.
fn run_steps(peer: &mut Peer, packed: bool, steps: usize) {
    let features = OFFERED_FEATURES & if packed { u64::MAX } else { !PACKED };
    let base = base_at(packed, 0);
    let all: [&dyn Fn(&mut Peer); STEPS] = [
        &|p| assert_eq!(p.frontend.get_features().unwrap(), OFFERED_FEATURES),
        &|p| {
            assert!(
                p.frontend
                    .get_protocol_features()
                    .unwrap()
                    .contains(Protocol::REPLY_ACK)
            )
        },
        &|p| {
            p.frontend
                .set_protocol_features(Protocol::REPLY_ACK | Protocol::MQ)
                .unwrap()
        },
        &|p| p.frontend.set_owner().unwrap(),
        &|p| {
            p.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            p.frontend.set_features(features).unwrap();
        },
        &|p| p.share_memory(),
        &|p| p.frontend.set_vring_num(0, ENTRIES).unwrap(),
        &|p| p.send_ring(FrontendReq::SET_VRING_BASE, 0, 0, base),
        &|p| p.frontend.set_vring_addr(0, &Peer::addresses(0)).unwrap(),
        &|p| p.frontend.set_vring_call(0, &p.calls[0]).unwrap(),
        &|p| p.frontend.set_vring_kick(0, &p.calls[0]).unwrap(),
        &|p| p.frontend.set_vring_enable(0, true).unwrap(),
        &|p| p.share_memory(),
        &|p| assert_eq!(base_of(0, p), base),
        &|p| p.start_ring(0, base),
    ];
    for step in &all[..steps] {
        step(peer);
    }
}

#[test]
fn a_stopped_ring_stays_stopped_and_says_the_same_again() {
    for packed in [false, true] {
        let peer = Peer::up(packed);
        let start = base_at(packed, 0);
        let queue = peer.pair(0).transmit.unwrap().queue;
        assert_eq!((base_of(1, &peer), queue.base()), (start, start));
        assert!(!peer.started(1) && peer.started(0));
        let status = peer.status.snapshot();
        assert!(
            status
                .state
                .contains("transmitq 0 not started: the driver has not started it")
        );
        assert_eq!(base_of(1, &peer), start);
        // The frontend sends everything again, with another base.
        if !packed {
            peer.poke(1, USED + 2, 3);
        }
        let base = base_at(packed, 3);
        peer.start_ring(1, base);
        assert!(peer.started(1));
        assert_eq!(peer.pair(0).transmit.unwrap().queue.base(), base);
        assert_eq!((base_of(1, &peer), base_of(1, &peer)), (base, base));
        assert!(!peer.started(1));
        peer.leave();
    }
}

#[test]
fn a_ring_never_set_up_answers_its_base() {
    for packed in [false, true] {
        let mut peer = Peer::new();
        let features = peer.negotiate_kind(packed);
        peer.frontend.set_features(features).unwrap();
        // Where it would start: for a packed ring that is the first lap.
        let start = base_at(packed, 0);
        assert_eq!((base_of(0, &peer), base_of(0, &peer)), (start, start));
        let told = base_at(packed, 77);
        peer.send_ring(FrontendReq::SET_VRING_BASE, 0, 1, told);
        assert_eq!((base_of(1, &peer), base_of(1, &peer)), (told, told));
        // A frontend restores what it saved, and the ring starts there without a word.
        peer.share_memory();
        peer.start_ring(0, start);
        assert!(peer.started(0) && !peer.said("not at the base"));
        assert_eq!(base_of(0, &peer), start);
        peer.leave();
    }
    // Before the features it may still be of either kind.
    let mut peer = Peer::new();
    peer.negotiate();
    assert_eq!(base_of(0, &peer), 0);
    peer.leave();
}

#[test]
fn what_does_not_concern_a_ring_leaves_it_alone() {
    for packed in [false, true] {
        let mut peer = Peer::up(packed);
        let before = peer.pair(0);
        peer.frontend.set_vring_call(0, &peer.calls[5]).unwrap();
        peer.frontend
            .set_vring_addr(0, &Peer::addresses(0))
            .unwrap();
        peer.frontend.set_vring_enable(0, false).unwrap();
        assert!(peer.pair(0).receive.is_some_and(|ring| !ring.enabled));
        peer.frontend.set_vring_enable(0, true).unwrap();
        // VIRTIO_F_ANY_LAYOUT.
        let changed = peer.status.snapshot().features.unwrap() ^ 1 << 27;
        peer.frontend.set_features(changed).unwrap();
        assert_eq!(peer.device().unwrap().features, changed);
        let after = peer.pair(0);
        let (before, after) = (before.receive.unwrap(), after.receive.unwrap());
        assert!(Arc::ptr_eq(&before.queue, &after.queue));
        assert!(!Arc::ptr_eq(&before.call.unwrap(), &after.call.unwrap()));
        peer.leave();
    }
}

#[test]
fn reset_forgets_rings_and_keeps_memory() {
    let mut peer = Peer::up(false);
    peer.frontend.reset_device().unwrap();
    assert!(peer.device().is_none());
    let snapshot = peer.status.snapshot();
    assert_eq!((snapshot.features, snapshot.memory_bytes), (None, SIZE));
    peer.frontend.set_features(OFFERED_FEATURES).unwrap();
    peer.start_ring(0, 0);
    assert!(peer.pair(0).receive.is_some_and(|ring| !ring.enabled));
    peer.leave();
}

/// No descriptor means that both sides poll; without the protocol feature bit all rings are
/// enabled.
#[test]
fn rings_without_descriptors_and_without_enable() {
    for packed in [false, true] {
        let peer = Peer::new();
        let kind = if packed { PACKED } else { 0 };
        let features = peer.frontend.get_features().unwrap() & !PACKED | kind;
        peer.frontend.set_features(features & !(1 << 30)).unwrap();
        peer.share_memory();
        for ring in 0..2 {
            peer.frontend.set_vring_num(ring, ENTRIES).unwrap();
            peer.frontend
                .set_vring_addr(ring, &Peer::addresses(ring))
                .unwrap();
            peer.send(
                FrontendReq::SET_VRING_KICK as u32,
                0,
                &(0x100 | ring as u64).to_ne_bytes(),
            );
        }
        // A reply to wait for that changes nothing.
        base_of(3, &peer);
        let pair = peer.pair(0);
        assert!(
            pair.receive
                .is_some_and(|ring| ring.enabled && ring.call.is_none())
        );
        assert!(
            pair.transmit
                .is_some_and(|ring| ring.enabled && ring.kick.is_none() && ring.call.is_none())
        );
        peer.leave();
    }
}

#[test]
fn several_pairs_are_offered_with_mq() {
    let mut peer = Peer::with(SessionOptions::new(4));
    let features = peer.negotiate();
    assert_ne!(features & (1 << 22), 0);
    assert_eq!(peer.queue_num(), Some(4));
    peer.frontend.set_features(features).unwrap();
    peer.share_memory();
    for ring in 0..8 {
        peer.start_ring(ring, 0);
        peer.frontend.set_vring_enable(ring, true).unwrap();
        // The controlq is known for one by the transmitq that it has not.
        let waits = ring > 0 && ring % 2 == 0;
        assert_eq!(peer.started(ring), !waits);
        assert!(waits || peer.started(ring - ring % 2));
    }
    peer.leave();
}

#[test]
fn more_queues_than_offered_are_told_so() {
    let peer = Peer::up(false);
    assert_eq!(OFFERED_FEATURES & (1 << 22), 0);
    assert_eq!(peer.queue_num(), Some(3));
    peer.start_ring(3, 0);
    assert_eq!(peer.device().unwrap().pairs.len(), 1);
    let state = peer.status.snapshot().state;
    assert!(
        state.contains("transmitq 1 not started: more queue pairs are used than the 1"),
        "{state}"
    );
    assert!(peer.said("transmitq 1 not started"));
    peer.leave();
}

#[test]
fn packed_rings_only_where_offered() {
    let split_only = SessionOptions {
        queue_pairs: 1,
        features: OFFERED_FEATURES & !PACKED,
        records: None,
    };
    let peer = Peer::with(split_only);
    assert_eq!(peer.frontend.get_features().unwrap() & PACKED, 0);
    peer.leave();
    let mut peer = Peer::new();
    assert_ne!(peer.frontend.get_features().unwrap() & PACKED, 0);
    let features = peer.negotiate() | PACKED;
    peer.frontend.set_features(features).unwrap();
    peer.share_memory();
    peer.frontend.set_vring_num(0, 200).unwrap();
    peer.frontend
        .set_vring_addr(0, &Peer::addresses(0))
        .unwrap();
    // 32 bits, of which the crate's frontend sends only 16.
    peer.send_ring(FrontendReq::SET_VRING_BASE, NEED_REPLY, 0, 0x8005_8005);
    assert_eq!(peer.reply(), Some(0));
    peer.frontend.set_vring_kick(0, &peer.calls[0]).unwrap();
    assert!(peer.started(0));
    assert_eq!(base_of(0, &peer), 0x8005_8005);
    peer.leave();
}

#[test]
fn a_session_can_be_stopped_from_outside() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let stopper = Stopper::new(&theirs).unwrap();
    let sink = Arc::new(Double::default());
    let thread = std::thread::spawn(move || {
        serve(theirs, SessionOptions::new(1), sink, SessionStatus::new())
    });
    stopper.stop();
    assert!(matches!(thread.join().unwrap(), SessionEnd::Disconnected));
    stopper.stop();
    drop(ours);
}

#[test]
fn a_removed_port_ends_its_session() {
    let peer = Peer::up(false);
    peer.sink.gone.store(true, Ordering::SeqCst);
    assert!(peer.frontend.get_vring_base(0).is_err());
    assert!(matches!(peer.ended(), SessionEnd::PortGone));
}

#[test]
fn a_transmitq_waits_for_its_first_enable_and_is_discarded_from_only_when_disabled() {
    let mut peer = Peer::new();
    let features = peer.negotiate();
    peer.frontend.set_features(features).unwrap();
    peer.share_memory();
    for ring in 0..2 {
        peer.start_ring(ring, 0);
    }
    let transmit = |peer: &Peer| {
        let device = peer.device().unwrap();
        device.pairs[0].transmit.as_ref().map(|queue| queue.enabled)
    };
    assert_eq!(transmit(&peer), None);
    peer.frontend.set_vring_enable(1, true).unwrap();
    assert_eq!(transmit(&peer), Some(true));
    peer.frontend.set_vring_enable(1, false).unwrap();
    assert_eq!(transmit(&peer), Some(false));
    peer.leave();
}

/// DPDK's virtio-user in server mode: ENABLE 0 and GET_VRING_BASE of each ring first, ENABLE 1
/// last.
#[test]
fn a_transmitq_that_was_disabled_while_it_did_not_run_waits_all_the_same() {
    let mut peer = Peer::new();
    let features = peer.negotiate();
    let transmit = |peer: &Peer| {
        let device = peer.device().unwrap();
        device.pairs[0].transmit.as_ref().map(|queue| queue.enabled)
    };
    for ring in 0..2 {
        // Before the features are set, which the crate's frontend does not do.
        peer.send_ring(FrontendReq::SET_VRING_ENABLE, NEED_REPLY, ring, 0);
        assert_eq!(peer.reply(), Some(0));
        peer.frontend.get_vring_base(ring as usize).unwrap();
    }
    peer.frontend.set_features(features).unwrap();
    peer.share_memory();
    for turn in 0..3 {
        for ring in 0..2 {
            peer.start_ring(ring, 0);
        }
        assert_eq!(transmit(&peer), None, "turn {turn}: it waits");
        peer.frontend.set_vring_enable(1, true).unwrap();
        assert_eq!(transmit(&peer), Some(true));
        // Disabled while it runs, or once it has been stopped.
        if turn == 0 {
            peer.frontend.set_vring_enable(1, false).unwrap();
            assert_eq!(transmit(&peer), Some(false));
        }
        for ring in 0..2 {
            peer.frontend.get_vring_base(ring).unwrap();
            peer.frontend.set_vring_enable(ring, false).unwrap();
        }
    }
    peer.leave();
}

/// virtio 1.2 §2.8.1, vhost-user "GET_VRING_BASE": slot and wrap counter of what is available, then
/// of what is used.
#[test]
fn both_halves_of_a_packed_base() {
    let start = |base: u32| {
        let mut peer = Peer::new();
        let features = peer.negotiate() | PACKED;
        peer.frontend.set_features(features).unwrap();
        peer.share_memory();
        for ring in 0..2 {
            peer.start_ring(ring, 0);
            let asked = [ring as u32, base].map(u32::to_ne_bytes).concat();
            // At a stop, and again before the next start.
            peer.frontend.get_vring_base(ring).unwrap();
            peer.send(FrontendReq::SET_VRING_BASE as u32, NEED_REPLY, &asked);
            assert_eq!(peer.reply(), Some(0));
            peer.frontend
                .set_vring_kick(ring, &peer.calls[ring + 8])
                .unwrap();
        }
        peer
    };
    // As virtio-user says it, with the wrap counter of what is used left out; and slot 5 in a later
    // lap.
    for (asked, found) in [
        (0x8000, 0x8000_8000),
        (5, 0x0005_0005),
        (0x7_8007, 0x8007_8007),
    ] {
        let peer = start(asked);
        for (ring, name) in ["receiveq 0", "transmitq 0"].iter().enumerate() {
            let expected = format!("{name} starts at {found:#x}, not at the base {asked:#x}");
            assert_eq!(peer.said(&expected), asked != found, "{asked:#x}");
            assert_eq!(base_of(ring, &peer), found);
        }
        peer.leave();
    }
    let peer = start(0x8003_8003);
    assert!(!peer.said("not at the base"));
    assert_eq!(base_of(0, &peer), 0x8003_8003);
    peer.leave();
}
