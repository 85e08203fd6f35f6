//! Chains of many pieces, and what they cost those beside them.

use super::*;
use crate::poll::deliver::BARREN_CLAIMS;
use crate::virtio::chain::MAX_CHAIN;

/// Where tables lie: behind all transmit buffers.
const TABLE: usize = RAM - 32 * 1024;

/// A table of as many entries as there may be, each of which is this buffer.
fn table<'m>(vm: &Vm<'m>, buffer: Buffer) -> (Window<'m>, u64, Vec<Buffer>) {
    let window = vm.ram.window(TABLE, 16 * MAX_CHAIN).unwrap();
    (window, BASE + TABLE as u64, vec![buffer; MAX_CHAIN])
}

/// Features with tables.
fn with_tables(packed: bool) -> RingFeatures {
    RingFeatures {
        indirect: true,
        ..features(packed)
    }
}

#[test]
fn a_ring_full_of_chains_of_nothing_does_not_delay_others_by_more_than_one_of_them() {
    for packed in [false, true] {
        let rams = rams::<4>();
        let mut vms = vms_with(&rams, with_tables(packed));
        let topology = topology(&vms, 1, |_| 0);
        let mut tools = Threads::new(1);
        let mut passes = tools.passes(&topology);
        let (window, address, entries) = table(&vms[0], Buffer::readable(BASE, 0));
        let mut posted = 0;
        while vms[0].transmit.post_indirect(&window, address, &entries, 0) {
            posted += 1;
        }
        assert_eq!(posted, ALL);
        vms[0].transmit.publish();
        for turn in 1..=ALL as u64 {
            // Of a chain of its own, too, which the others' must not have used up the room for.
            assert_eq!(vms[2].send(3, 60, 1), 1);
            passes[0].run(0, || true);
            assert_eq!(vms[3].take(8), 1, "the small frame of pass {turn}");
            vms[3].give_back();
            let done = std::iter::from_fn(|| vms[0].transmit.reap()).count();
            assert_eq!(done, 1, "chains of nothing in pass {turn}");
            assert_eq!(vms[0].drops(DropReason::RxMalformedChain), turn);
        }
    }
}

#[test]
fn a_receiver_of_buffers_of_nothing_costs_a_pass_a_few_of_them() {
    for packed in [false, true] {
        let rams = rams::<4>();
        let mut vms = vms_with(&rams, with_tables(packed));
        let topology = topology(&vms, 1, |_| 0);
        let mut tools = Threads::new(1);
        let mut passes = tools.passes(&topology);
        for _ in 0..ALL / 64 {
            vms[0].send(1, 60, 64);
            passes[0].run(0, || true);
        }
        assert_eq!(vms[1].take(usize::MAX), ALL);
        let (window, address, entries) = table(&vms[1], Buffer::writable(BASE, 0));
        while vms[1].receive.post_indirect(&window, address, &entries, 0) {}
        vms[1].receive.publish();
        for turn in 1..=8 {
            assert_eq!(vms[0].send(1, 60, 1) + vms[2].send(3, 60, 1), 2);
            passes[0].run(0, || true);
            assert_eq!(vms[3].take(8), 1, "the frame beside it");
            let bad = std::iter::from_fn(|| vms[1].receive.reap()).count();
            // At first, of what a short ring keeps back, and at the end of the pass.
            let most = 3 * BARREN_CLAIMS as usize;
            assert!((1..=most).contains(&bad), "{bad} in pass {turn}");
        }
    }
}

/// Frames of as many pieces as there may be, from a sender and into buffers of such, with others in
/// between.
#[test]
fn frames_of_the_most_pieces_pass_in_their_order_with_others_between_them() {
    for packed in [false, true] {
        let rams = rams::<3>();
        let mut vms = vms_with(&rams, with_tables(packed));
        let topology = topology(&vms, 1, |_| 0);
        let mut tools = Threads::new(1);
        let mut passes = tools.passes(&topology);
        let len = 4 * MAX_CHAIN;
        let frame: Vec<u8> = [&[0; NET_HDR_SIZE][..], &mac(1), &mac(0), &[8, 0]].concat();
        let frame: Vec<u8> = frame
            .into_iter()
            .chain((0..).map(|n: usize| (n % 251) as u8))
            .take(len)
            .collect();
        let from = vms[0].ram.window(TRANSMIT, len).unwrap();
        from.write_bytes(0, &frame);
        let (window, address, _) = table(&vms[0], Buffer::readable(BASE, 0));
        let entries: Vec<Buffer> = (0..MAX_CHAIN)
            .map(|n| Buffer::readable(BASE + (TRANSMIT + 4 * n) as u64, 4))
            .collect();
        for _ in 0..5 {
            assert!(vms[0].transmit.post_indirect(&window, address, &entries, 0));
        }
        vms[0].transmit.publish();
        assert_eq!(vms[2].send(1, 60, 5), 5);
        for _ in 0..8 {
            passes[0].run(0, || true);
        }
        let (mut long, mut short) = (0, 0);
        while let Some(used) = vms[1].receive.reap() {
            let at = |token: u32| 2 * RING + token as usize * BUFFER;
            if used.len == 60 + NET_HDR_SIZE as u32 {
                short += 1;
                continue;
            }
            // Of 4096 bytes, in two buffers.
            let rest = vms[1].receive.reap().unwrap();
            let mut bytes = vec![0; len];
            let (first, second) = bytes.split_at_mut(used.len as usize);
            vms[1]
                .ram
                .window(at(used.token), first.len())
                .unwrap()
                .read_bytes(0, first);
            vms[1]
                .ram
                .window(at(rest.token), second.len())
                .unwrap()
                .read_bytes(0, second);
            assert!(
                bytes[NET_HDR_SIZE..] == frame[NET_HDR_SIZE..],
                "packed: {packed}"
            );
            long += 1;
        }
        assert_eq!((long, short), (5, 5));
        assert_eq!(vms[0].outcomes(), []);
        assert_eq!(std::iter::from_fn(|| vms[0].transmit.reap()).count(), 5);
    }
}

/// Buffers of many pieces that hold too little are read once a burst, not once a frame.
#[test]
fn a_receiver_of_long_chains_that_are_too_short_costs_a_burst_one_of_them() {
    for packed in [false, true] {
        let rams = rams::<2>();
        let features = RingFeatures {
            mergeable: false,
            ..with_tables(packed)
        };
        let mut vms = vms_with(&rams, features);
        let topology = topology(&vms, 1, |_| 0);
        let mut tools = Threads::new(1);
        let mut passes = tools.passes(&topology);
        for _ in 0..ALL / 64 {
            vms[0].send(1, 60, 64);
            passes[0].run(0, || true);
        }
        assert_eq!(vms[1].take(usize::MAX), ALL);
        let (window, address, entries) = table(&vms[1], Buffer::writable(BASE, 1));
        while vms[1].receive.post_indirect(&window, address, &entries, 0) {}
        vms[1].receive.publish();
        vms[0].send(1, 1500, 1);
        // This one would fit.
        vms[0].send(1, 60, 1);
        passes[0].run(0, || true);
        assert_eq!(vms[1].drops(DropReason::EgressTooLong), 2);
        assert!(vms[1].receive.reap().is_none());
        vms[0].send(1, 60, 1);
        passes[0].run(0, || true);
        assert!(vms[1].receive.reap().is_some());
    }
}
