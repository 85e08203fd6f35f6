//! Rings that run and whose drivers put nothing into them; frontends that want more queue pairs.

use super::*;

/// A look at rings comes every two seconds.
fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The driver puts a buffer into a ring.
fn post(peer: &Peer, ring: u64, packed: bool) {
    if packed {
        // AVAIL in the flags of the first descriptor.
        peer.poke(ring, 14, 1 << 7);
    } else {
        peer.poke(ring, AVAILABLE + 2, 1);
    }
}

#[test]
fn a_port_whose_rings_never_change_says_so_until_they_do() {
    for packed in [false, true] {
        for ring in 0..2 {
            let peer = Peer::up(packed);
            let state = || peer.status.snapshot().state;
            wait_for("silence", || !peer.status.snapshot().working);
            assert!(state().contains("put nothing into any ring"), "{}", state());
            // What is wrong with private memory shows when its driver kicks.
            peer.calls[8 + ring as usize].write(1).unwrap();
            wait_for("kicks", || state().contains("although the driver kicks"));
            assert!(state().contains("share=on"), "{}", state());
            wait_for("an event", || peer.said("although the driver kicks"));
            post(&peer, ring, packed);
            wait_for("use", || peer.status.snapshot().working);
            assert_eq!(state(), "running");
            peer.leave();
        }
    }
}

#[test]
fn kicks_for_rings_with_something_in_them_are_no_sign_of_private_memory() {
    for packed in [false, true] {
        let peer = Peer::up(packed);
        // The tables of a driver that has made its rings, and filled none.
        peer.poke(0, 16, 1);
        peer.calls[8].write(1).unwrap();
        wait_for("silence", || !peer.status.snapshot().working);
        let state = peer.status.snapshot().state;
        assert!(state.contains("put nothing into any ring"), "{state}");
        peer.leave();
    }
}

#[test]
fn a_receive_queue_that_never_had_a_buffer_is_left_out_until_it_has_one() {
    for packed in [false, true] {
        let mut peer = Peer::with_memory(SessionOptions::new(2), packed);
        for ring in 0..4 {
            peer.start_ring(ring, base_at(packed, 0));
            peer.frontend.set_vring_enable(ring, true).unwrap();
        }
        let taken = |pair: usize| peer.pair(pair).receive.is_some_and(|queue| queue.enabled);
        let left_out = || {
            let rings = peer.status.snapshot().rings;
            let out = rings.iter().filter(|ring| ring.left_out);
            out.map(|ring| ring.ring.index).collect::<Vec<_>>()
        };
        assert!(taken(0) && taken(1));
        // Not while there is none that is served.
        wait_for("silence", || !peer.status.snapshot().working);
        assert!(taken(0) && taken(1) && left_out().is_empty());
        post(&peer, 0, packed);
        wait_for("it to be left out", || !taken(1));
        assert!(taken(0));
        wait_for("the status", || left_out() == [2]);
        assert_eq!(peer.status.snapshot().state, "running");
        post(&peer, 2, packed);
        wait_for("it to be taken in", || taken(1));
        wait_for("the status", || left_out().is_empty());
        peer.leave();
    }
}

#[test]
fn a_frontend_that_leaves_after_the_number_of_queues_wants_more() {
    let mut peer = Peer::with(SessionOptions::new(3));
    peer.negotiate();
    assert_eq!(peer.queue_num(), Some(3));
    let end = peer.leave();
    assert!(
        matches!(end, SessionEnd::AskedForQueues { pairs: 3 }),
        "{end}"
    );
    assert!(
        end.to_string()
            .contains("number of queue pairs (3 offered)"),
        "{end}"
    );
    // One that does not ask, or comes further, has other reasons.
    let mut peer = Peer::new();
    peer.negotiate();
    assert!(matches!(peer.leave(), SessionEnd::Disconnected));
    let mut peer = Peer::new();
    let features = peer.negotiate();
    peer.queue_num();
    peer.frontend.set_features(features).unwrap();
    assert!(matches!(peer.leave(), SessionEnd::Disconnected));
}
