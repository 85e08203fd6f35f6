//! When a driver is called: for a whole newly visible run, and on legacy drivers' terms.

use std::sync::atomic::Ordering;

use pollux::virtio::chain::Windows;
use pollux::virtio::{Claim, FullBarrier, ReceiveQueue, RingFeatures, Taken, TransmitQueue};

use crate::guest::*;
use crate::packed_reference::{self, EVENT_DESC};

/// Two claims; the later one is committed first and stays hidden behind the other. Says whether the
/// driver was called when both became visible together.
fn called_for_both(queue: &ReceiveQueue, first: usize, second: usize) -> bool {
    let lengths = |count| std::iter::repeat_n(60, count);
    let (mut one, mut two) = (Claim::new(), Claim::new());
    queue.claim(lengths(first), &mut one).unwrap();
    queue.claim(lengths(second), &mut two).unwrap();
    assert_eq!((one.frames(), two.frames()), (first, second));
    assert!(queue.take_call_wanted(), "the start's call");
    queue.commit(&two);
    assert!(!queue.take_call_wanted(), "nothing is visible yet");
    queue.commit(&one);
    assert_eq!(queue.published(), two.end());
    queue.take_call_wanted()
}

/// All rings of up to five entries, all starts, all pairs of claims.
fn for_all_pairs(packed: bool, test: impl Fn(&Guest, u16, usize, usize)) {
    for size in 2..=5_u16 {
        if !packed && !size.is_power_of_two() {
            continue;
        }
        let features = RingFeatures {
            event_idx: true,
            ..features(packed)
        };
        let words = (0..size).flat_map(|slot| [slot, slot | 0x8000]);
        let starts: Vec<u16> = if packed {
            words.collect()
        } else {
            (65530..=65535).chain(0..2).collect()
        };
        for start in starts {
            for first in 1..usize::from(size) {
                for second in 1..=usize::from(size) - first {
                    test(&Guest::new(size, features), start, first, second);
                }
            }
        }
    }
}

#[test]
fn a_driver_armed_inside_another_threads_claim_on_a_packed_ring_is_called() {
    for_all_pairs(true, |guest, start, first, second| {
        let size = guest.size();
        for word in (0..size).flat_map(|slot| [slot, slot | 0x8000]) {
            let mut driver = guest.driver_at(start);
            let place = driver.packed().next();
            guest.write(START, &vec![0; 16 * usize::from(size)]);
            let queue = ReceiveQueue::start(&guest.setup(u32::from(start))).unwrap();
            for _ in 0..size {
                driver.post(&[writable(DATA, 100)]);
            }
            driver.packed().set_event(word, EVENT_DESC);
            let moved = (first + second) as u16;
            let expected = packed_reference::wants_call(&guest.areas(), place, moved, true);
            let called = called_for_both(&queue, first, second);
            assert_eq!(called, expected, "{size} {place:?} {moved} {word:#x}");
        }
    });
}

#[test]
fn a_driver_armed_inside_another_threads_claim_on_a_split_ring_is_called() {
    for_all_pairs(false, |guest, start, first, second| {
        for event in 0..=guest.size() + 2 {
            let event = start.wrapping_sub(1).wrapping_add(event);
            let mut driver = guest.driver_at(start);
            let queue = ReceiveQueue::start(&guest.setup(0)).unwrap();
            for _ in 0..guest.size() {
                driver.post(&[writable(DATA, 100)]);
            }
            driver.split().set_event(event);
            let expected = (0..(first + second) as u16).any(|i| start.wrapping_add(i) == event);
            let called = called_for_both(&queue, first, second);
            assert_eq!(called, expected, "{} {start} {event}", guest.size());
        }
    });
}

/// The first word of the available ring: the driver wants no calls.
const NO_INTERRUPT: u16 = 1;

/// VIRTIO_F_NOTIFY_ON_EMPTY, of legacy drivers: a call when everything available is used, whatever
/// else was asked for.
#[test]
fn a_legacy_driver_is_called_when_its_ring_is_empty_if_it_wants_that() {
    for (notify_on_empty, event_idx) in [(false, false), (false, true), (true, false), (true, true)]
    {
        for start in [0_u16, 1, 65534] {
            let features = RingFeatures {
                indirect: true,
                event_idx,
                notify_on_empty,
                ..RingFeatures::default()
            };
            let guest = Guest::new(4, features);
            let suppress = |driver: &mut Driver<'_>| {
                if event_idx {
                    driver.split().set_event(start.wrapping_sub(1));
                } else {
                    guest
                        .areas()
                        .available
                        .store_u16(0, NO_INTERRUPT, Ordering::Relaxed);
                }
            };

            let mut driver = guest.driver_at(start);
            let queue = ReceiveQueue::start(&guest.setup(0)).unwrap();
            suppress(&mut driver);
            assert!(queue.take_call_wanted(), "the start's call");
            let deliver = |count| {
                let mut claim = Claim::new();
                queue
                    .claim(std::iter::repeat_n(60, count), &mut claim)
                    .unwrap();
                assert_eq!(claim.frames(), count);
                queue.commit(&claim);
                queue.take_call_wanted()
            };
            for _ in 0..4 {
                driver.post(&[writable(DATA, 100)]);
            }
            assert!(!deliver(1));
            assert!(!deliver(2));
            assert_eq!(deliver(1), notify_on_empty);
            driver.reap_all();
            driver.post(&[writable(DATA, 100)]);
            assert_eq!(deliver(1), notify_on_empty);
            // The last of several threads makes all of it visible.
            driver.reap_all();
            for _ in 0..3 {
                driver.post(&[writable(DATA, 100)]);
            }
            let (mut one, mut two) = (Claim::new(), Claim::new());
            queue.claim(std::iter::repeat_n(60, 2), &mut one).unwrap();
            queue.claim(std::iter::once(60), &mut two).unwrap();
            queue.commit(&two);
            assert!(!queue.take_call_wanted());
            queue.commit(&one);
            assert_eq!(queue.take_call_wanted(), notify_on_empty);

            let mut driver = guest.driver_at(start);
            let queue = TransmitQueue::start(&guest.setup(0)).unwrap();
            suppress(&mut driver);
            assert!(
                queue.take_call_wanted(&FullBarrier::new()),
                "the start's call"
            );
            for _ in 0..3 {
                driver.post(&[readable(DATA, 100)]);
            }
            let mut windows = Windows::<16>::new();
            let end = queue.available_to();
            while take(&queue, end, &mut windows) != Taken::Nothing {}
            queue.complete(u64::from(start) + 2);
            assert!(!queue.take_call_wanted(&FullBarrier::new()));
            // More came meanwhile: not empty.
            driver.post(&[readable(DATA, 100)]);
            queue.complete(u64::from(start) + 3);
            assert!(!queue.take_call_wanted(&FullBarrier::new()));
            queue.take(queue.available_to(), &mut windows);
            queue.complete(u64::from(start) + 4);
            assert_eq!(queue.take_call_wanted(&FullBarrier::new()), notify_on_empty);
        }
    }
}
