//! Sessions of frontends that mean harm, or are broken.

use super::*;

const BAD_INDEXES: [u32; 5] = [7, 8, 0x1_0000, 0x1_0001, u32::MAX];

#[test]
fn ring_indexes_are_compared_at_full_width() {
    for request in [
        FrontendReq::SET_VRING_NUM,
        FrontendReq::SET_VRING_BASE,
        FrontendReq::SET_VRING_ENABLE,
    ] {
        let mut peer = Peer::new();
        peer.negotiate();
        for index in BAD_INDEXES {
            peer.send_ring(request, NEED_REPLY, index, 1);
            assert_eq!(peer.reply(), Some(1), "{request:?} {index:#x}");
        }
        assert_eq!(
            peer.status
                .snapshot()
                .rings
                .iter()
                .filter(|r| r.size.is_some())
                .count(),
            0
        );
        peer.send_ring(request, 0, 0x1_0000, 1);
        assert!(
            peer.refused()
                .contains("ring 65536 was named, but there are 7")
        );
    }
    for index in BAD_INDEXES {
        let mut peer = Peer::new();
        peer.negotiate();
        peer.send_ring(FrontendReq::GET_VRING_BASE, NEED_REPLY, index, 0);
        assert!(peer.refused().contains("was named, but there are 7"));
        let peer = Peer::new();
        let mut body = [0; 40];
        body[..4].copy_from_slice(&index.to_ne_bytes());
        peer.send(FrontendReq::SET_VRING_ADDR as u32, 0, &body);
        assert!(peer.refused().contains("was named, but there are 7"));
    }
}

#[test]
fn ring_sizes() {
    // A packed ring's size need not be a power of two.
    let mut peer = Peer::with(SessionOptions {
        queue_pairs: 1,
        features: OFFERED_FEATURES & !PACKED,
        records: None,
    });
    peer.negotiate();
    for size in [0, 3, 320, 32767, 65535, 65536, 0x1_0100, u32::MAX] {
        peer.send_ring(FrontendReq::SET_VRING_NUM, NEED_REPLY, 0, size);
        assert_eq!(peer.reply(), Some(1), "{size}");
    }
    for size in [1, 2, 256, 32768] {
        peer.send_ring(FrontendReq::SET_VRING_NUM, NEED_REPLY, 0, size);
        assert_eq!(peer.reply(), Some(0), "{size}");
    }
    assert!(peer.said("receiveq 0 cannot have 4294967295 entries"));
    peer.leave();
}

#[test]
fn enable_takes_zero_and_one() {
    let mut peer = Peer::new();
    peer.negotiate();
    for value in [2, 255, u32::MAX] {
        peer.send_ring(FrontendReq::SET_VRING_ENABLE, NEED_REPLY, 0, value);
        assert_eq!(peer.reply(), Some(1));
    }
    peer.send(FrontendReq::SET_VRING_ENABLE as u32, NEED_REPLY, &[0; 12]);
    assert!(peer.refused().contains("SET_VRING_ENABLE with 12 bytes"));
}

#[test]
fn a_running_ring_is_not_changed() {
    for packed in [false, true] {
        let peer = Peer::up(packed);
        let before = peer.pair(0).receive.unwrap().queue;
        // Of these a packed ring could have any, were it not running.
        for size in [128, 320, 3] {
            peer.send_ring(FrontendReq::SET_VRING_NUM, NEED_REPLY, 0, size);
            assert_eq!(peer.reply(), Some(1), "packed: {packed}, {size}");
        }
        peer.send_ring(FrontendReq::SET_VRING_BASE, NEED_REPLY, 0, 9);
        assert_eq!(peer.reply(), Some(1));
        let far = VringConfigData {
            used_ring_addr: USER + SIZE - 4,
            desc_table_addr: USER + SIZE - 16,
            ..Peer::addresses(0)
        };
        assert!(peer.frontend.set_vring_addr(0, &far).is_err());
        assert!(Arc::ptr_eq(&before, &peer.pair(0).receive.unwrap().queue));
        assert_eq!(peer.status.snapshot().rings[0].size, Some(ENTRIES));
        // A place that exists: the ring restarts there, where it stood.
        peer.frontend
            .set_vring_addr(0, &Peer::addresses(4))
            .unwrap();
        assert!(!Arc::ptr_eq(&before, &peer.pair(0).receive.unwrap().queue));
        drop(before);
        let stands = peer.frontend.get_vring_base(0).unwrap();
        assert_eq!(stands, base_at(packed, 0));
        peer.leave();
    }
}

#[test]
fn features_that_were_not_offered() {
    let mut peer = Peer::new();
    let features = peer.negotiate();
    peer.send(
        FrontendReq::SET_FEATURES as u32,
        NEED_REPLY,
        &(features | 1).to_ne_bytes(),
    );
    assert_eq!(peer.reply(), Some(1));
    assert!(peer.refused().contains("only 0x"));
    // Bits that speak of what a frontend tells its guest, and each other one.
    let configuration = [3, 5, 16, 62, 63];
    for bit in (0..u64::BITS).filter(|bit| OFFERED_FEATURES >> bit & 1 == 0) {
        let mut peer = Peer::new();
        let features = peer.negotiate() | 1 << bit;
        let taken = configuration.contains(&bit);
        let body = features.to_ne_bytes();
        peer.send(FrontendReq::SET_FEATURES as u32, NEED_REPLY, &body);
        assert_eq!(peer.reply(), Some(u64::from(!taken)), "bit {bit}");
        if taken {
            assert_eq!(peer.status.snapshot().features, Some(features));
            peer.leave();
        }
    }
    let peer = Peer::new();
    peer.send(
        FrontendReq::SET_PROTOCOL_FEATURES as u32,
        0,
        &u64::MAX.to_ne_bytes(),
    );
    assert!(
        peer.refused()
            .contains("0xffffffffffffffff were acknowledged")
    );
}

#[test]
fn ring_features_do_not_change_under_a_ring() {
    for packed in [false, true] {
        // The event index, and the kind of ring itself.
        for bit in [1 << 29, PACKED] {
            let peer = Peer::up(packed);
            let changed = peer.status.snapshot().features.unwrap() ^ bit;
            peer.send(
                FrontendReq::SET_FEATURES as u32,
                NEED_REPLY,
                &changed.to_ne_bytes(),
            );
            assert_eq!(peer.reply(), Some(1), "packed: {packed}, {bit:#x}");
            assert!(peer.refused().contains("while rings run"));
        }
    }
}

#[test]
fn a_legacy_driver_is_served() {
    // VIRTIO_F_NOTIFY_ON_EMPTY and VIRTIO_F_ANY_LAYOUT, which later versions of virtio do not name
    // any more.
    let legacy = 1 << 24 | 1 << 27;
    let mut peer = Peer::new();
    peer.send(FrontendReq::GET_FEATURES as u32, 0, &[]);
    assert_eq!(peer.reply().unwrap() & legacy, legacy);
    peer.negotiate();
    for features in [1 << 30, 1 << 30 | legacy] {
        peer.frontend.set_features(features).unwrap();
        peer.share_memory();
        peer.start_ring(0, 0);
        assert!(peer.started(0));
        assert_eq!(peer.device().unwrap().features, features);
        peer.frontend.get_vring_base(0).unwrap();
    }
    peer.leave();
}

#[test]
fn unknown_requests() {
    let known = [
        FrontendReq::SET_LOG_FD,
        FrontendReq::SEND_RARP,
        FrontendReq::NET_SET_MTU,
        FrontendReq::IOTLB_MSG,
        FrontendReq::SET_VRING_ENDIAN,
        FrontendReq::VRING_KICK,
        FrontendReq::SET_STATUS,
    ];
    let mut peer = Peer::new();
    peer.negotiate();
    for request in known
        .map(u32::from)
        .into_iter()
        .chain([0, 45, 1000, u32::MAX])
    {
        peer.send(request, NEED_REPLY, &[0; 8]);
        assert_eq!(peer.reply(), Some(1), "{request}");
    }
    peer.send(FrontendReq::GET_STATUS as u32, NEED_REPLY, &[]);
    assert!(peer.refused().contains("GET_STATUS is not supported"));
    for request in [0, 20, 45, u32::MAX] {
        let mut peer = Peer::new();
        peer.negotiate();
        peer.send(request, 0, &[0; 8]);
        assert!(peer.refused().contains("is not supported"));
        // Asked for, but not negotiated.
        let peer = Peer::new();
        peer.send(request, NEED_REPLY, &[0; 8]);
        assert!(peer.refused().contains("is not supported"));
    }
}

#[test]
fn a_configuration_space_is_not_offered_and_not_answered() {
    let mut peer = Peer::new();
    peer.negotiate();
    let offered = peer.frontend.get_protocol_features().unwrap();
    assert!(!offered.contains(Protocol::CONFIG));
    // Nor does it help to negotiate it all the same.
    peer.send(
        FrontendReq::SET_PROTOCOL_FEATURES as u32,
        NEED_REPLY,
        &(offered | Protocol::CONFIG).bits().to_ne_bytes(),
    );
    assert_eq!(peer.reply(), Some(1));
    assert!(peer.refused().contains("features 0x"));
    // In the space, empty, too long, across its end, and far behind it; of which no bytes may come
    // back.
    for (offset, size) in [(0, 12), (0, 0), (0, 257), (8, 12), (u32::MAX, 256)] {
        for request in [FrontendReq::GET_CONFIG, FrontendReq::SET_CONFIG] {
            let mut peer = Peer::new();
            peer.negotiate();
            let mut body = [offset, size, 0].map(u32::to_ne_bytes).concat();
            body.resize(body.len() + size as usize, 0xff);
            peer.send(request as u32, NEED_REPLY, &body);
            assert_eq!(peer.reply(), None, "{request:?} {offset} {size}");
            let why = format!("{request:?}: inactive protocol operation");
            assert!(peer.refused().contains(&why), "{request:?}");
        }
    }
}

#[test]
fn an_acknowledgement_that_was_not_negotiated_does_not_come() {
    for protocol in [None, Some(Protocol::MQ | Protocol::CONFIGURE_MEM_SLOTS)] {
        let mut peer = Peer::new();
        peer.frontend.get_features().unwrap();
        if let Some(protocol) = protocol {
            peer.frontend.get_protocol_features().unwrap();
            peer.frontend.set_protocol_features(protocol).unwrap();
        }
        let features = OFFERED_FEATURES & !PACKED;
        // Those that the crate answers, and one that the session does.
        peer.send(FrontendReq::SET_OWNER as u32, NEED_REPLY, &[]);
        peer.send(
            FrontendReq::SET_FEATURES as u32,
            NEED_REPLY,
            &features.to_ne_bytes(),
        );
        peer.send_ring(FrontendReq::SET_VRING_NUM, NEED_REPLY, 0, ENTRIES.into());
        peer.send_ring(FrontendReq::SET_VRING_ENABLE, NEED_REPLY, 0, 1);
        // The next answer is that of the next question.
        peer.send(FrontendReq::GET_FEATURES as u32, NEED_REPLY, &[]);
        assert_eq!(peer.reply(), Some(OFFERED_FEATURES));
        let snapshot = peer.status.snapshot();
        assert_eq!(snapshot.features, Some(features));
        assert!(snapshot.rings[0].enabled && snapshot.rings[0].size == Some(ENTRIES));
        // Neither for what is refused: that ends the session.
        peer.send_ring(FrontendReq::SET_VRING_ENABLE, NEED_REPLY, 0, 2);
        assert_eq!(peer.reply(), None);
        assert!(peer.refused().contains("SET_VRING_ENABLE with value 2"));
    }
}

#[test]
fn bad_headers() {
    for (request, flags, size) in [
        (1, 0_u32, 0_u32),
        (1, 2, 0),
        (1, 5, 0),
        (1, 0x11, 0),
        (1, 1, 4097),
        (1, 1, u32::MAX),
        (77, 1, u32::MAX),
    ] {
        let peer = Peer::new();
        let bytes = [request, flags, size].map(u32::to_ne_bytes).concat();
        (&peer.stream).write_all(&bytes).unwrap();
        peer.refused();
    }
    // Sizes that do not fit the request.
    for (request, size) in [
        (1, 8),
        (2, 0),
        (2, 16),
        (5, 0),
        (5, 8),
        (8, 4),
        (9, 0),
        (12, 0),
        (37, 8),
    ] {
        let peer = Peer::new();
        peer.send(request, 0, &vec![0; size]);
        peer.refused();
    }
}

#[test]
fn a_message_in_pieces_is_one_message() {
    let peer = Peer::new();
    let bytes = [FrontendReq::SET_VRING_ENABLE as u32, 1, 8, 0, 1]
        .map(u32::to_ne_bytes)
        .concat();
    for byte in bytes {
        (&peer.stream).write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    // A body apart from its header, for the crate to read; and two messages at once.
    (&peer.stream)
        .write_all(&[2_u32, 1, 8].map(u32::to_ne_bytes).concat())
        .unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let two = [
        (1_u64 << 30).to_ne_bytes().to_vec(),
        [1_u32, 1, 0].map(u32::to_ne_bytes).concat(),
    ];
    (&peer.stream).write_all(&two.concat()).unwrap();
    assert_eq!(peer.reply(), Some(OFFERED_FEATURES));
    assert_eq!(peer.status.snapshot().features, Some(1 << 30));
    peer.leave();
}

#[test]
fn half_a_message_then_silence() {
    for bytes in [1, 11, 12, 15] {
        let peer = Peer::new();
        let whole = [2_u32, 1, 8, 0, 0].map(u32::to_ne_bytes).concat();
        (&peer.stream).write_all(&whole[..bytes]).unwrap();
        assert!(peer.refused().contains("incomplete"));
        let peer = Peer::new();
        (&peer.stream).write_all(&whole[..bytes]).unwrap();
        assert!(matches!(peer.leave(), SessionEnd::Disconnected));
    }
    // Silence alone is no fault.
    let peer = Peer::new();
    std::thread::sleep(Duration::from_millis(500));
    assert!(peer.frontend.get_features().is_ok());
    peer.leave();
}

#[test]
fn replies_that_nobody_reads() {
    let peer = Peer::new();
    peer.stream.set_nonblocking(true).unwrap();
    let message = [1_u32, 1, 0].map(u32::to_ne_bytes).concat();
    while (&peer.stream).write_all(&message).is_ok() {}
    assert!(peer.refused().contains("has read no reply"));
}

#[test]
fn an_impossible_ring_is_shown() {
    let peer = Peer::up(false);
    peer.poke(1, AVAILABLE + 2, 1000);
    let queue = peer.pair(0).transmit.unwrap().queue;
    queue.available_to();
    let snapshot = peer.status.snapshot();
    assert!(
        snapshot.state.starts_with("ring broken: transmitq 0"),
        "{}",
        snapshot.state
    );
    assert!(!snapshot.working);
    drop(queue);
    // It heals with its next start.
    peer.frontend.get_vring_base(1).unwrap();
    peer.poke(1, AVAILABLE + 2, 0);
    peer.start_ring(1, 0);
    assert_eq!(peer.status.snapshot().state, "running");
    peer.leave();
}

#[test]
fn a_flood_of_refusals_does_not_fill_the_log() {
    let mut peer = Peer::new();
    peer.negotiate();
    for _ in 0..2000 {
        peer.send_ring(FrontendReq::SET_VRING_NUM, NEED_REPLY, 0, 0);
        assert_eq!(peer.reply(), Some(1));
    }
    assert!(peer.sink.events.lock().unwrap().len() < 700);
    peer.leave();
}

#[test]
fn enable_in_a_loop_leaves_nothing_behind() {
    for packed in [false, true] {
        let peer = Peer::up(packed);
        let before = peer.pair(0).receive.unwrap().queue;
        for turn in 0..2000_u32 {
            peer.send_ring(FrontendReq::SET_VRING_ENABLE, NEED_REPLY, 0, turn % 2);
            assert_eq!(peer.reply(), Some(0));
            // One post a change, and no ring starts again.
            let posts = peer.sink.posts.load(Ordering::SeqCst);
            assert!(
                posts <= 8 + u64::from(turn),
                "{posts} posts in {turn} turns"
            );
        }
        let after = peer.pair(0).receive.unwrap();
        assert!(after.enabled && Arc::ptr_eq(&before, &after.queue));
        drop((before, after));
        peer.leave();
    }
}
