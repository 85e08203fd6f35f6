//! Habits of other frontends, which DPDK's backend puts up with.

use super::*;

/// Dragonball acknowledges MTU or MAC, which are not offered: what the device's configuration says
/// is its own.
#[test]
fn features_of_the_configuration_are_taken_as_dragonball_sends_them() {
    for more in [1 << 3, 1 << 3 | 1 << 17, 1 << 5] {
        let mut peer = Peer::new();
        let features = peer.negotiate() & (1 << 30 | 1 << 32) | more;
        peer.frontend.set_features(features).unwrap();
        peer.share_memory();
        for ring in 0..2 {
            peer.start_ring(ring, 0);
            peer.frontend.set_vring_enable(ring, true).unwrap();
        }
        assert_eq!(peer.status.snapshot().state, "running", "{more:#x}");
        peer.leave();
    }
}

#[test]
fn acknowledgements_come_without_get_features() {
    let peer = Peer::new();
    let ack = |request: FrontendReq, body: &[u8]| {
        peer.send(request as u32, NEED_REPLY, body);
        peer.reply()
    };
    let protocol = (Protocol::REPLY_ACK | Protocol::MQ).bits().to_ne_bytes();
    assert_eq!(ack(FrontendReq::SET_PROTOCOL_FEATURES, &protocol), Some(0));
    assert_eq!(ack(FrontendReq::SET_OWNER, &[]), Some(0));
    let ring = |index: u32, value: u32| [index, value].map(u32::to_ne_bytes).concat();
    // What the crate reads and what the session reads, taken and refused; and a value, which stands
    // for itself.
    assert_eq!(ack(FrontendReq::SET_VRING_NUM, &ring(0, 256)), Some(0));
    assert_eq!(ack(FrontendReq::SET_VRING_NUM, &ring(0, 0)), Some(1));
    assert_eq!(ack(FrontendReq::SET_VRING_ENABLE, &ring(0, 1)), Some(0));
    assert_eq!(ack(FrontendReq::SET_VRING_ENABLE, &ring(0, 2)), Some(1));
    assert_eq!(ack(FrontendReq::GET_QUEUE_NUM, &[]), Some(3));
    // From here on the crate answers: once, not twice.
    assert_eq!(ack(FrontendReq::GET_FEATURES, &[]), Some(OFFERED_FEATURES));
    assert_eq!(ack(FrontendReq::SET_OWNER, &[]), Some(0));
    assert_eq!(peer.queue_num(), Some(3));
    peer.leave();
}

/// libkrun's reset: ENABLE 0 for each ring and no GET_VRING_BASE, then everything anew.
#[test]
fn disabled_rings_are_set_up_anew_as_libkrun_does() {
    for packed in [false, true] {
        // The same features, and others; the same size, and another.
        for (changed, size) in [(0, ENTRIES), (0, 128), (1 << 29, ENTRIES), (1 << 29, 128)] {
            let mut peer = Peer::up(packed);
            let features = peer.status.snapshot().features.unwrap() ^ changed;
            for ring in 0..2 {
                peer.frontend.set_vring_enable(ring, false).unwrap();
            }
            let before = peer.pair(0);
            // What the driver before had used; a new one begins with zeros.
            peer.frontend.set_owner().unwrap();
            peer.share_memory();
            peer.frontend.set_features(features).unwrap();
            for ring in 0..2 {
                peer.frontend.set_vring_num(ring, size).unwrap();
                peer.send_ring(
                    FrontendReq::SET_VRING_BASE,
                    NEED_REPLY,
                    ring as u32,
                    base_at(packed, 0),
                );
                assert_eq!(peer.reply(), Some(0));
                peer.frontend
                    .set_vring_addr(ring, &Peer::addresses(ring + 2))
                    .unwrap();
                assert!(!peer.started(ring), "its driver has not kicked yet");
                let kick = &peer.calls[ring + 8];
                peer.frontend.set_vring_kick(ring, kick).unwrap();
                peer.frontend
                    .set_vring_call(ring, &peer.calls[ring])
                    .unwrap();
                peer.frontend.set_vring_enable(ring, true).unwrap();
            }
            assert_eq!(peer.status.snapshot().state, "running");
            let after = peer.pair(0);
            let (old, new) = (before.transmit.unwrap(), after.transmit.unwrap());
            assert!(!Arc::ptr_eq(&old.queue, &new.queue));
            assert_eq!(new.queue.size(), size);
            assert!(new.call.is_some() && new.kick.is_some());
            peer.leave();
        }
    }
}

/// Only what the frontend has disabled is given up for such a message, and all of it for other
/// features.
#[test]
fn rings_in_use_are_not_set_up_anew() {
    let mut peer = Peer::up(false);
    peer.frontend.set_vring_enable(0, false).unwrap();
    peer.send_ring(FrontendReq::SET_VRING_NUM, NEED_REPLY, 1, 128);
    assert_eq!(peer.reply(), Some(1));
    let changed = peer.status.snapshot().features.unwrap() ^ 1 << 29;
    let body = changed.to_ne_bytes();
    peer.send(FrontendReq::SET_FEATURES as u32, NEED_REPLY, &body);
    assert_eq!(peer.reply(), Some(1));
    assert!(peer.refused().contains("while rings run"));
}
