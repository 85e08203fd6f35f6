//! No false sharing: what one thread writes for each burst or pass lies on cache lines that no
//! other thread writes, nor reads for anything else. Lines count in pairs, since processors fetch
//! them so.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use pollux::bench::plan::FlowCounters;
use pollux::stats::{MAX_POLL_THREADS, PortStats, ThreadStats};
use pollux::virtio::claim::Claims;
use pollux::virtio::{ReceiveQueue, TransmitQueue};

/// Two cache lines.
const PAIR: usize = 128;

/// Whether values of this type, wherever they are allocated, share no pair of lines with anything
/// else.
fn is_alone<T>() -> bool {
    align_of::<T>() >= PAIR && size_of::<T>().is_multiple_of(PAIR)
}

#[test]
fn the_words_of_a_claim_are_apart() {
    // Claim position, published position, token and call mark, each written by whichever thread
    // delivers, and the tags' place, which is only read: five pairs of lines, for no two would fit
    // into one.
    assert!(is_alone::<Claims>());
    assert_eq!(size_of::<Claims>(), 5 * PAIR);
    assert!(is_alone::<ReceiveQueue>(), "it holds its claims in place");
    assert!(is_alone::<TransmitQueue>());
}

#[test]
fn counters_of_two_threads_are_apart() {
    let stats = PortStats::new();
    let places: Vec<usize> = (0..MAX_POLL_THREADS)
        .map(|thread| std::ptr::from_ref(stats.thread(thread)).addr())
        .collect();
    for pair in places.windows(2) {
        assert_eq!(pair[0] % PAIR, 0, "{places:x?}");
        assert_ne!(pair[0] / PAIR, pair[1] / PAIR, "{places:x?}");
        let end = pair[0] + size_of_val(stats.thread(0)) - 1;
        assert!(end / PAIR < pair[1] / PAIR, "{places:x?}");
    }
    assert!(is_alone::<ThreadStats>());
}

#[test]
fn the_two_ends_of_a_flow_are_apart() {
    // Else the load generator would measure itself.
    let flow = FlowCounters::default();
    let [sent, received] = [&flow.sent, &flow.received].map(|end| std::ptr::from_ref(end).addr());
    assert!(is_alone::<FlowCounters>());
    assert_ne!(sent / PAIR, received / PAIR);
}
