//! Guest memory: tables and single regions, good and bad, and what becomes of the rings in them.

use super::*;

const PAGE: u64 = 4096;

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
    for region in [
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

/// A region of a page that cannot be used, behind the others.
fn on_a_disk(peer: &Peer, file: &File) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        mmap_handle: file.as_raw_fd(),
        ..peer.region(4 * SIZE, 0, PAGE)
    }
}

#[test]
fn a_region_that_cannot_be_used_is_acknowledged_and_the_rest_goes_on() {
    let file = File::open("/proc/self/maps").unwrap();
    for packed in [false, true] {
        let mut peer = Peer::up(packed);
        let (main, region) = (peer.region(0, 0, SIZE), on_a_disk(&peer, &file));
        peer.frontend.set_mem_table(&[region, main]).unwrap();
        let snapshot = peer.status.snapshot();
        assert!(snapshot.working && peer.started(0) && peer.started(1));
        let unusable = &snapshot.memory_unusable;
        assert_eq!((unusable.len(), unusable[0].size), (1, PAGE));
        assert!(unusable[0].cause.contains("is on a file system of type"));
        let said = "guest memory of 4 KiB at 0x400000 cannot be used: the region's file is on a";
        assert!(peer.said(said), "{:?}", peer.sink.events);
        // Later regions arrive, and what cannot be used comes and goes.
        let later = peer.region(8 * SIZE, SIZE, SIZE);
        peer.frontend.add_mem_region(&later).unwrap();
        assert_eq!(peer.device().unwrap().memory.len_bytes(), 2 * SIZE);
        peer.frontend.remove_mem_region(&region).unwrap();
        assert!(peer.status.snapshot().memory_unusable.is_empty());
        peer.frontend.add_mem_region(&region).unwrap();
        assert_eq!(peer.status.snapshot().memory_unusable.len(), 1);
        assert!(
            peer.frontend
                .remove_mem_region(&on_a_disk(&peer, &file))
                .is_ok()
        );
        peer.share_memory();
        assert!(peer.started(0) && peer.started(1));
        peer.leave();
    }
}

#[test]
fn a_ring_in_memory_that_cannot_be_used_says_so() {
    let file = File::open("/proc/self/maps").unwrap();
    for packed in [false, true] {
        let peer = Peer::up(packed);
        let mut rings = peer.region(0, 0, SIZE);
        rings.mmap_handle = file.as_raw_fd();
        let other = peer.region(4 * SIZE, SIZE, SIZE);
        // All of it, or that of the rings.
        for (table, state) in [
            (
                vec![rings, other],
                "receiveq 0 not started: it lies in guest memory that cannot be",
            ),
            (
                vec![rings],
                "guest memory of 1 MiB at 0x0 cannot be used: the region's file is on",
            ),
        ] {
            peer.frontend.set_mem_table(&table).unwrap();
            let snapshot = peer.status.snapshot();
            assert!(!snapshot.working && !peer.started(0));
            assert!(snapshot.state.contains(state), "{}", snapshot.state);
            assert!(snapshot.state.contains("of type"), "{}", snapshot.state);
            // What is set there is no error of the frontend's.
            let mut places = Peer::addresses(0);
            places.desc_table_addr += 2 * RING;
            peer.frontend.set_vring_addr(0, &places).unwrap();
            peer.frontend
                .set_vring_addr(0, &Peer::addresses(0))
                .unwrap();
            places.desc_table_addr = USER + 6 * SIZE;
            places.avail_ring_addr = USER + 7 * SIZE;
            places.used_ring_addr = USER + 8 * SIZE;
            let outside = peer.frontend.set_vring_addr(0, &places);
            assert_eq!(outside.is_err(), table.len() == 2);
            peer.frontend
                .set_vring_addr(0, &Peer::addresses(0))
                .unwrap();
            peer.share_memory();
            assert_eq!(peer.status.snapshot().state, "running");
        }
        peer.leave();
    }
}

#[test]
fn a_refused_region_stays_the_reason_beside_other_memory() {
    let mut peer = Peer::with_memory(SessionOptions::new(1), false);
    let beyond = peer.region(4 * SIZE, SIZE, 2 * SIZE);
    assert!(peer.frontend.add_mem_region(&beyond).is_err());
    let state = peer.status.snapshot().state;
    assert!(state.starts_with("guest memory not usable"), "{state}");
    peer.leave();
    // Also while the port runs.
    let mut peer = Peer::up(false);
    let beyond = peer.region(4 * SIZE, SIZE, 2 * SIZE);
    assert!(peer.frontend.add_mem_region(&beyond).is_err());
    let snapshot = peer.status.snapshot();
    let refused = snapshot.memory_refused.as_ref();
    assert!(snapshot.working && refused.is_some_and(|why| why.contains("beyond the file")));
    peer.share_memory();
    assert_eq!(peer.status.snapshot().memory_refused, None);
    peer.leave();
}

#[test]
fn rings_move_over_to_new_memory_where_they_stood() {
    for packed in [false, true] {
        let peer = Peer::up(packed);
        // Not where every ring starts.
        let stands = base_at(packed, 3);
        for ring in 0..2 {
            base_of(ring, &peer);
            if !packed {
                peer.poke(ring as u64, USED + 2, 3);
            }
            peer.start_ring(ring, stands);
        }
        let before = peer.pair(0).receive.unwrap().queue;
        let settled = peer.sink.settled.load(Ordering::SeqCst);
        peer.frontend
            .set_mem_table(&[peer.region(0, 0, 2 * SIZE)])
            .unwrap();
        assert!(peer.sink.settled.load(Ordering::SeqCst) > settled);
        let after = peer.pair(0).receive.unwrap();
        assert!(!Arc::ptr_eq(&before, &after.queue) && after.enabled && after.call.is_some());
        assert_eq!(after.queue.base(), stands);
        assert_eq!(peer.device().unwrap().memory.len_bytes(), 2 * SIZE);
        drop((before, after));

        // A table in which the transmitq is not any more.
        peer.frontend
            .set_mem_table(&[peer.region(0, 0, RING)])
            .unwrap();
        assert!(peer.started(0) && !peer.started(1));
        let state = peer.status.snapshot().state;
        assert!(
            state.contains("transmitq 0 not started: it lies outside of guest memory"),
            "{state}"
        );
        // And back.
        peer.share_memory();
        assert!(peer.started(0) && peer.started(1));
        assert_eq!(peer.status.snapshot().state, "running");
        assert_eq!((base_of(0, &peer), base_of(1, &peer)), (stands, stands));
        peer.leave();
    }
}

#[test]
fn regions_come_and_go() {
    let mut peer = Peer::up(false);
    let extra = peer.region(4 * SIZE, SIZE, SIZE);
    peer.frontend.add_mem_region(&extra).unwrap();
    assert_eq!(peer.device().unwrap().memory.len_bytes(), 2 * SIZE);
    peer.frontend.remove_mem_region(&extra).unwrap();
    assert!(peer.started(0) && peer.started(1));
    peer.frontend
        .remove_mem_region(&peer.region(0, 0, SIZE))
        .unwrap();
    assert!(peer.device().is_none());
    assert_eq!(peer.status.snapshot().memory_bytes, 0);
    peer.leave();
}

/// SET_MEM_TABLE with regions of a page each, one behind the other.
fn table(regions: u32) -> Vec<u8> {
    let mut body = [regions, 0].map(u32::to_ne_bytes).concat();
    for at in (0..u64::from(regions)).map(|region| region * PAGE) {
        body.extend([at, PAGE, USER + at, at].map(u64::to_ne_bytes).concat());
    }
    body
}

/// ADD_MEM_REG and REM_MEM_REG.
fn single(region: &VhostUserMemoryRegionInfo) -> Vec<u8> {
    let words = [
        0,
        region.guest_phys_addr,
        region.memory_size,
        region.userspace_addr,
        region.mmap_offset,
    ];
    words.map(u64::to_ne_bytes).concat()
}

#[test]
fn a_table_has_as_many_regions_as_descriptors_and_at_most_32() {
    let mut peer = Peer::new();
    peer.memory = memfd::create("vu-one-table", SIZE).unwrap();
    peer.negotiate();
    let send = |regions: u32, files: usize| {
        let files = vec![peer.memory.as_raw_fd(); files];
        peer.send_with(
            FrontendReq::SET_MEM_TABLE,
            NEED_REPLY,
            &table(regions),
            &files,
        );
    };
    for (regions, files) in [(0, 0), (0, 1), (1, 2), (2, 1), (31, 32), (32, 31), (33, 32)] {
        send(regions, files);
        assert_eq!(peer.reply(), Some(1), "{regions} regions, {files} files");
        // Behind the answer, and before the next one.
        peer.queue_num();
        assert_eq!(peer.status.snapshot().memory_regions, 0);
        assert_eq!(descriptors("vu-one-table"), 1);
    }
    for regions in [1, 32] {
        send(regions, regions as usize);
        assert_eq!(peer.reply(), Some(0));
        assert_eq!(peer.status.snapshot().memory_regions, regions as usize);
        assert_eq!(descriptors("vu-one-table"), 1);
    }
    send(33, 33);
    let why = peer.refused();
    assert!(why.contains("more than 32 file descriptors"), "{why}");
    assert_eq!(
        (descriptors("vu-one-table"), mappings("vu-one-table")),
        (0, 0)
    );
}

#[test]
fn one_region_more_than_there_are_slots_is_refused() {
    let mut peer = Peer::new();
    peer.negotiate();
    let slots = peer.frontend.get_max_mem_slots().unwrap();
    let page = |peer: &Peer, at: u64| peer.region(at * PAGE, at * PAGE, PAGE);
    for at in 0..slots {
        let region = page(&peer, at);
        peer.frontend.add_mem_region(&region).unwrap();
    }
    let (first, more) = (page(&peer, 0), page(&peer, slots));
    for _ in 0..2 {
        assert!(peer.frontend.add_mem_region(&more).is_err());
        let regions = peer.status.snapshot().memory_regions;
        assert_eq!(regions as u64, slots);
    }
    // Where one goes, there is room for one.
    peer.frontend.remove_mem_region(&first).unwrap();
    peer.frontend.add_mem_region(&more).unwrap();
    peer.leave();
}

#[test]
fn a_region_without_its_descriptor_or_with_two_is_refused() {
    for (files, why) in [
        (0, "guest memory not shared"),
        (2, "ADD_MEM_REG: invalid parameters"),
    ] {
        let mut peer = Peer::new();
        peer.memory = memfd::create("vu-single", SIZE).unwrap();
        peer.negotiate();
        let (body, files) = (
            single(&peer.region(0, 0, SIZE)),
            vec![peer.memory.as_raw_fd(); files],
        );
        peer.send_with(FrontendReq::ADD_MEM_REG, NEED_REPLY, &body, &files);
        assert!(peer.refused().contains(why));
        assert_eq!((descriptors("vu-single"), mappings("vu-single")), (0, 0));
    }
}

#[test]
fn a_region_is_removed_though_a_descriptor_comes_with_the_message() {
    let stray = memfd::create("vu-removed", 8).unwrap();
    for packed in [false, true] {
        let mut peer = Peer::up(packed);
        let extra = peer.region(4 * SIZE, SIZE, SIZE);
        peer.frontend.add_mem_region(&extra).unwrap();
        assert_eq!(peer.device().unwrap().memory.len_bytes(), 2 * SIZE);
        let file = [stray.as_raw_fd()];
        peer.send_with(FrontendReq::REM_MEM_REG, NEED_REPLY, &single(&extra), &file);
        assert_eq!(peer.reply(), Some(0));
        assert_eq!(peer.device().unwrap().memory.len_bytes(), SIZE);
        assert!(peer.started(0) && peer.started(1));
        // Closed while the session goes on.
        peer.queue_num();
        assert_eq!(descriptors("vu-removed"), 1);
        peer.leave();
    }
}

#[test]
fn tables_that_change_a_thousand_times_leave_nothing_behind() {
    for (packed, name) in [(false, "vu-tables-split"), (true, "vu-tables-packed")] {
        let mut peer = Peer::up(packed);
        peer.memory = memfd::create(name, 2 * SIZE).unwrap();
        peer.share_memory();
        let (main, extra) = (peer.region(0, 0, SIZE), peer.region(4 * SIZE, SIZE, SIZE));
        for turn in 0..1000 {
            // Another table, the first one again, a region more and less, one that is none, and
            // that of the rings.
            match turn % 4 {
                0 => drop(peer.frontend.set_mem_table(&[main, extra]).unwrap()),
                1 => drop(peer.frontend.add_mem_region(&extra).unwrap()),
                2 => assert!(peer.frontend.remove_mem_region(&extra).is_err()),
                _ => {
                    peer.frontend.remove_mem_region(&main).unwrap();
                    assert!(peer.device().is_none());
                    peer.frontend.add_mem_region(&main).unwrap();
                }
            }
            peer.share_memory();
            assert!(peer.started(0) && peer.started(1), "{turn}");
            // The file is closed as soon as it is mapped: the one that is left is ours.
            assert_eq!((mappings(name), descriptors(name)), (1, 1), "{turn}");
        }
        for ring in 0..2 {
            let stands = peer.frontend.get_vring_base(ring).unwrap();
            assert_eq!(stands, base_at(packed, 0));
        }
        peer.leave();
        assert_eq!(mappings(name), 0);
    }
}
