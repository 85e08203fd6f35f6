//! Sessions of frontends that mean harm, or are broken.

use super::*;

const BAD_INDEXES: [u32; 5] = [4, 5, 0x1_0000, 0x1_0001, u32::MAX];

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
                .contains("ring 65536 was named, but there are 4")
        );
    }
    for index in BAD_INDEXES {
        let mut peer = Peer::new();
        peer.negotiate();
        peer.send_ring(FrontendReq::GET_VRING_BASE, NEED_REPLY, index, 0);
        assert!(peer.refused().contains("was named, but there are 4"));
        let peer = Peer::new();
        let mut body = [0; 40];
        body[..4].copy_from_slice(&index.to_ne_bytes());
        peer.send(FrontendReq::SET_VRING_ADDR as u32, 0, &body);
        assert!(peer.refused().contains("was named, but there are 4"));
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
    let mut peer = Peer::new();
    peer.negotiate();
    peer.frontend.set_features(1 << 30).unwrap();
    peer.share_memory();
    peer.start_ring(0, 0);
    assert!(peer.started(0));
    peer.leave();
}

#[test]
fn private_memory_is_named() {
    let mut body = vec![1, 0, 0, 0, 0, 0, 0, 0];
    for word in [0, SIZE, USER, 0] {
        body.extend_from_slice(&word.to_ne_bytes());
    }
    let mut peer = Peer::new();
    peer.negotiate();
    peer.send(FrontendReq::SET_MEM_TABLE as u32, NEED_REPLY, &body);
    assert_eq!(peer.reply(), Some(1));
    // The crate acknowledges before the session has noted why; it answers this one afterwards.
    peer.queue_num();
    let state = peer.status.snapshot().state;
    assert!(state.starts_with("guest memory not shared"), "{state}");
    assert!(state.contains("memory-backend-memfd,share=on") && state.contains("shared=on"));
    // It may still do better.
    peer.share_memory();
    assert!(!peer.status.snapshot().state.contains("shared"));
    peer.send(FrontendReq::SET_MEM_TABLE as u32, 0, &body);
    assert!(peer.refused().contains("guest memory not shared"));
}

#[test]
fn memory_that_is_no_memory() {
    let mut peer = Peer::new();
    peer.negotiate();
    let pipe = std::io::pipe().unwrap().0;
    for region in [
        VhostUserMemoryRegionInfo {
            mmap_handle: pipe.as_raw_fd(),
            ..peer.region(0, 0, SIZE)
        },
        VhostUserMemoryRegionInfo {
            userspace_addr: u64::MAX - 4096,
            ..peer.region(0, 0, SIZE)
        },
        VhostUserMemoryRegionInfo {
            memory_size: u64::MAX,
            ..peer.region(0, 0, SIZE)
        },
        peer.region(0, 1, SIZE),
        peer.region(0, SIZE, 2 * SIZE),
        VhostUserMemoryRegionInfo {
            guest_phys_addr: u64::MAX,
            ..peer.region(0, 0, SIZE)
        },
    ] {
        assert!(peer.frontend.add_mem_region(&region).is_err());
    }
    assert!(
        peer.status
            .snapshot()
            .state
            .starts_with("guest memory not usable")
    );
    peer.frontend
        .add_mem_region(&peer.region(0, 0, SIZE))
        .unwrap();
    // Once for each queue pair, as old QEMU does; but not another region in its place.
    let same = peer.region(0, 0, SIZE);
    peer.frontend.add_mem_region(&same).unwrap();
    let overlapping = VhostUserMemoryRegionInfo {
        userspace_addr: same.userspace_addr + 4096,
        ..same
    };
    assert!(peer.frontend.add_mem_region(&overlapping).is_err());
    peer.leave();
}

#[test]
fn only_eventfds_are_taken() {
    let mut peer = Peer::new();
    peer.negotiate();
    let (reader, _writer) = std::io::pipe().unwrap();
    // The crate's frontend sends only its eventfd type, so one is turned into a pipe.
    let disguised = EventFd::new(0).unwrap();
    let number = disguised.as_raw_fd();
    assert_eq!(
        crate::sys::eventfd::dup_over(reader.as_raw_fd(), number),
        number
    );
    assert!(peer.frontend.set_vring_call(0, &disguised).is_err());
    assert!(peer.frontend.set_vring_kick(0, &disguised).is_err());
    assert!(peer.frontend.set_vring_err(0, &disguised).is_ok());
    assert!(peer.said("only eventfds are taken"));
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

#[test]
fn descriptors_where_none_belong() {
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;
    let file = memfd::create("vu-stray", 8).unwrap();
    let header = |request: u32, size: u32| [request, 1, size].map(u32::to_ne_bytes).concat();
    let enable = [header(18, 8), vec![0; 8]].concat();
    for (bytes, why) in [
        // The crate refuses, the session refuses, nobody knows it.
        (header(1, 0), "GET_FEATURES: invalid message"),
        (enable, "SET_VRING_ENABLE is not supported"),
        (header(99, 0), "request 99 is not supported"),
    ] {
        let peer = Peer::new();
        peer.stream
            .send_with_fd(&bytes[..], file.as_raw_fd())
            .unwrap();
        assert!(peer.refused().contains(why));
    }
    // Inside a header, and inside a body.
    let peer = Peer::new();
    peer.stream
        .send_with_fd(&header(5, 8)[..3], file.as_raw_fd())
        .unwrap();
    (&peer.stream).write_all(&header(5, 8)[3..]).unwrap();
    assert!(peer.refused().contains("split by file descriptors"));
    let peer = Peer::new();
    (&peer.stream).write_all(&header(2, 8)).unwrap();
    peer.stream
        .send_with_fd(&[0; 4][..], file.as_raw_fd())
        .unwrap();
    (&peer.stream).write_all(&[0; 4]).unwrap();
    peer.refused();
    // More than a message may have, and just as many as it may.
    for (count, why) in [
        (253, "more than 32 file descriptors"),
        (33, "more than 32 file descriptors"),
        (32, "invalid message"),
    ] {
        let peer = Peer::new();
        let many = vec![file.as_raw_fd(); count];
        let message = [header(5, 8), vec![0; 8]].concat();
        peer.stream.send_with_fds(&[&message[..]], &many).unwrap();
        assert!(peer.refused().contains(why), "{count}");
    }
    assert_eq!(descriptors("vu-stray"), 1);
}
