//! Budgets of a pass, receivers without room, and what becomes of a frame otherwise.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::frame::BURST_FRAMES;

// ---- budgets ------------------------------------------------------------------------------------

#[test]
fn the_largest_chains_do_not_delay_small_frames_by_more_than_one_of_them() {
    let rams = rams::<4>();
    let mut vms = vms(&rams, false);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    assert_eq!(vms[0].send(1, MAX_FRAME, 64), 64);
    for turn in 1..=3 {
        vms[2].send(3, 60, 1);
        passes[0].run(0, || true);
        assert_eq!(vms[3].take(8), 1, "the small frame of pass {turn}");
        let done = std::iter::from_fn(|| vms[0].transmit.reap()).count();
        assert_eq!(done, 1, "large frames of pass {turn}");
    }
    // Small frames are limited by their number.
    vms[2].send(3, 60, 200);
    passes[0].run(0, || true);
    let taken = vms[3].take(usize::MAX);
    assert!(
        (1..=64).contains(&taken),
        "{taken} small frames in one pass"
    );
}

// ---- full receivers -----------------------------------------------------------------------------

#[test]
fn a_receiver_that_returns_nothing_does_not_take_the_places_of_another_one() {
    let rams = rams::<4>();
    let mut vms = vms(&rams, false);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    // Both are full; for one of them frames were dropped. Twelve passes: the next one begins with
    // the first guest.
    for (to, bursts) in [(1, 8), (2, 4)] {
        for _ in 0..bursts {
            vms[0].send(to, 60, 64);
            passes[0].run(0, || true);
        }
    }
    assert_eq!(vms[2].drops(DropReason::EgressRingFull), 0);
    // The other one returns buffers just after its frame found none, and before the pass ends.
    assert_eq!(vms[0].send(1, 60, 64), 64);
    assert_eq!(vms[3].send(2, 60, 1) + vms[3].send(1, 60, 63), 64);
    let receiver = std::cell::RefCell::new(&mut vms[2]);
    let bursts = std::cell::Cell::new(0);
    passes[0].run(0, || {
        bursts.set(bursts.get() + 1);
        if bursts.get() == 2 {
            let mut vm = receiver.borrow_mut();
            assert_eq!(vm.take(1), 1);
            vm.give_back();
        }
        true
    });
    assert_eq!(bursts.get(), 2);
    // Its frame was held, and found the buffer.
    assert_eq!(vms[2].drops(DropReason::EgressRingFull), 0);
    assert_eq!(vms[2].take(usize::MAX), ALL);
}

// ---- outcomes -----------------------------------------------------------------------------------

#[test]
fn every_outcome_has_a_counter_of_its_own() {
    let rams = rams::<4>();
    let mut vms = vms(&rams, false);
    // The third one was disabled, with its address still known.
    vms[2].disable();
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    // A ring that says that 300 of its 256 entries are available.
    vms[3].available().store_u16(0, 300, Ordering::Release);
    for _ in 0..3 {
        for to in [1, 2, 3] {
            vms[0].send(to, 60, 100);
            for _ in 0..2 {
                passes[0].run(0, || true);
            }
        }
    }
    let full = (DropReason::EgressRingFull, 300 - 256);
    assert_eq!(vms[1].outcomes(), [full]);
    assert_eq!(vms[2].outcomes(), [(DropReason::EgressNotReady, 300)]);
    assert_eq!(vms[3].outcomes(), [(DropReason::EgressRingBroken, 300)]);
    assert_eq!(vms[0].outcomes(), []);
    assert!(vms[3].queue().broken().is_some());
    assert_eq!(vms[1].queue().broken(), None);
}

/// Where a frame goes is decided and done in one view of the switch. One that is published in
/// between, in which its port is disabled or gone, counts from the next burst on: then the frame is
/// lost to that port alone, or for a station that nobody knows.
#[test]
fn a_port_that_goes_before_a_delivery_is_told_apart_from_one_without_room() {
    let rams = rams::<4>();
    let mut vms = vms(&rams, false);
    let before = topology(&vms, 1, |_| 0);
    vms[2].disable();
    let ports = |slots: &[usize]| -> Vec<PortEntry> {
        slots.iter().map(|slot| vms[*slot].entry()).collect()
    };
    let without_one = successor(&before, &ports(&[0, 2, 3]));
    let without_others = successor(&without_one, &ports(&[0, 2]));
    let mut tools = Threads::new(1);
    let first = BURST_FRAMES - 4;
    assert_eq!(vms[0].send(1, 60, first), first);
    assert_eq!(vms[0].send(2, 60, 10), 10);
    let mut passes = tools.passes(&before);
    let asked = std::cell::Cell::new(0);
    passes[0].run(0, || {
        asked.set(asked.get() + 1);
        false
    });
    drop(passes);
    // The first burst alone, whole, although its topology is out of date.
    assert_eq!(asked.get(), 1);
    assert_eq!(vms[1].take(usize::MAX), first);
    assert_eq!(vms[2].take(usize::MAX), 4);
    assert!(vms.iter().all(|vm| vm.outcomes().is_empty()));
    // What came later is of the next topology.
    vms[0].send(1, 60, 5);
    tools.passes(&without_one)[0].run(0, || true);
    assert_eq!(vms[2].outcomes(), [(DropReason::EgressNotReady, 6)]);
    assert_eq!(vms[3].take(usize::MAX), 5);
    assert_eq!(vms[0].outcomes(), []);
    vms[0].send(1, 60, 7);
    tools.passes(&without_others)[0].run(0, || true);
    assert_eq!(vms[0].outcomes(), [(DropReason::NoDestination, 7)]);
    // Neither of the two rings was full, or touched.
    assert_eq!(vms[2].outcomes(), [(DropReason::EgressNotReady, 6)]);
    assert_eq!(vms[1].outcomes(), []);
    assert_eq!(vms[1].take(usize::MAX) + vms[2].take(usize::MAX), 0);
}

#[test]
fn a_sender_that_was_marked_before_the_thread_came_is_not_taken_from() {
    let rams = rams::<2>();
    let mut vms = vms(&rams, false);
    let topology = topology(&vms, 1, |_| 0);
    vms[0].device.memory.fault_mark().set();
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    assert_eq!(vms[0].send(1, 60, 5), 5);
    passes[0].run(0, || true);
    vms[1].take(usize::MAX);
    assert_eq!((vms[1].from[0], vms[0].transmit.outstanding()), (0, 5));
}

/// A poll thread is about to claim, eight times, and each time another one has claimed and
/// published before it does.
#[test]
fn a_claim_that_another_poll_thread_always_wins_is_counted_and_harms_nothing() {
    for packed in [false, true] {
        let rams = rams::<3>();
        let mut vms = vms(&rams, packed);
        let topology = topology(&vms, 2, |slot| usize::from(slot == 1));
        let mut tools = Threads::new(2);
        let mut passes = tools.passes(&topology);
        let (mut second, mut first) = (passes.pop().unwrap(), passes.pop().unwrap());
        let [loser, winner, receiver] = &mut vms[..] else {
            unreachable!("three guests")
        };
        let queue = receiver.device.pairs[0].receive.clone().unwrap().queue;
        let lost = Arc::new(AtomicU64::new(0));
        let (stop, mut before) = (AtomicBool::new(false), 0);
        std::thread::scope(|scope| {
            let stop = Stop(&stop);
            scope.spawn(|| {
                while !stop.0.load(Ordering::Relaxed) {
                    winner.send(2, 60, 8);
                    second.run(0, || true);
                    receiver.take(usize::MAX);
                    receiver.give_back();
                }
            });
            assert_eq!(loser.send(2, 60, 3), 3);
            before = park::tries().claims;
            park::set_rival(Some({
                let (queue, lost) = (queue.clone(), lost.clone());
                Box::new(move || {
                    // More than one claim can be open meanwhile: one was made since.
                    let (seen, begun) = (queue.published(), Instant::now());
                    while queue.published() < seen + 64 {
                        assert!(begun.elapsed().as_secs() < 20, "nobody else claims");
                        std::thread::yield_now();
                    }
                    lost.fetch_add(1, Ordering::Relaxed);
                })
            }));
            first.run(0, || true);
            park::set_rival(None);
        });
        // Four tries of a claim, and four at the end of the pass. One may have ended before it came
        // to the swap: the other thread had gone past it while it read.
        assert_eq!(park::tries().claims - before, 8);
        assert!((1..=8).contains(&lost.load(Ordering::Relaxed)));
        // Undisturbed, its frames arrive.
        assert_eq!(loser.send(2, 60, 5), 5);
        first.run(0, || true);
        receiver.take(usize::MAX);
        assert_eq!(receiver.drops(DropReason::EgressContended), 3);
        assert_eq!(receiver.from[0], 5);
        assert_eq!(queue.broken(), None);
        for reason in DropReason::ALL {
            let expected = if reason == DropReason::EgressContended {
                3
            } else {
                0
            };
            assert_eq!(receiver.drops(reason), expected, "{reason:?}");
        }
        // Its sender has all its buffers again.
        assert_eq!(std::iter::from_fn(|| loser.transmit.reap()).count(), 5);
        assert_eq!(loser.transmit.outstanding(), 0);
    }
}

/// Ends the other thread, also when an assertion fails.
struct Stop<'s>(&'s AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
