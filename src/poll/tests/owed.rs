//! Transmit chains whose frames stand behind another thread's open claim.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::kicks::give_kick;
use super::*;
use crate::frame::BURST_FRAMES;
use crate::poll::owed::{HOLD_NS, ROOM};
use crate::virtio::claim::Published;

/// How long chains are held at least, in nanoseconds; two clocks do not run alike.
const HELD: u128 = HOLD_NS as u128 * 9 / 10;

/// The receive queue of a guest.
fn queue_of(vm: &Vm<'_>) -> Arc<ReceiveQueue> {
    vm.device.pairs[0].receive.as_ref().unwrap().queue.clone()
}

/// Another thread's claim for one frame.
fn claim(queue: &ReceiveQueue) -> Claim<'_> {
    let mut claim = Claim::new();
    let frame = std::iter::once(60);
    queue.claim_leaving(frame, 0, &mut claim).unwrap();
    assert_eq!(claim.frames(), 1);
    claim
}

/// Chains that are back at their driver.
fn completed(vm: &mut Vm<'_>) -> usize {
    std::iter::from_fn(|| vm.transmit.reap()).count()
}

fn all_completed(vms: &mut [Vm<'_>]) -> usize {
    vms.iter_mut().map(completed).sum()
}

#[test]
fn chains_wait_from_pass_to_pass_until_their_frames_are_published() {
    for packed in [false, true] {
        let rams = rams::<4>();
        let mut vms = vms(&rams, packed);
        let queue = queue_of(&vms[1]);
        let topology = topology(&vms, 1, |_| 0);
        let mut tools = Threads::new(1);
        let mut passes = tools.passes(&topology);
        let pass = &mut passes[0];
        // Of each claim of another thread one burst is behind; of the third one also what came
        // later.
        let mut claims = Vec::new();
        for (behind, frames) in [(1, 3), (2, 4), (3, 5), (3, 6)] {
            if claims.len() < behind {
                claims.push(claim(&queue));
            }
            vms[0].send(1, 60, frames);
            vms[2].send(3, 60, frames);
            assert!(pass.run(0, || true));
            // Others' frames are there, and their chains back.
            assert_eq!((vms[3].take(8), completed(&mut vms[2])), (frames, frames));
            assert_eq!((vms[1].take(1), completed(&mut vms[0])), (0, 0));
            assert!(pass.owes());
        }
        // The oldest wait for no more than they must, the others for all that was behind a claim
        // then.
        for (claim, (came, back)) in claims.iter().zip([(4, 3), (5, 0), (12, 15)]) {
            assert!(!pass.run(0, || true), "waiting is no work");
            assert_eq!(completed(&mut vms[0]), 0);
            assert_eq!(queue.commit(claim), Published::Clean);
            pass.run(0, || true);
            assert_eq!((vms[1].take(16), completed(&mut vms[0])), (came, back));
        }
        assert!(!pass.owes());
        drop(passes);
        assert_eq!(tools.stats[0].completed_early.get(), 0, "packed={packed}");
    }
}

#[test]
fn chains_do_not_wait_for_ever_and_those_that_come_later_not_at_all() {
    let rams = rams::<4>();
    let mut vms = vms(&rams, false);
    let late = queue_of(&vms[1]);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    tools.hold_ns = HOLD_NS;
    let mut passes = tools.passes(&topology);
    let pass = &mut passes[0];
    let open = claim(&late);
    let begun = Instant::now();
    vms[0].send(1, 60, 3);
    while completed(&mut vms[0]) == 0 {
        pass.run(0, || true);
    }
    let waited = begun.elapsed().as_nanos();
    assert!(waited >= HELD, "{waited} ns");
    for _ in 0..5 {
        vms[0].send(1, 60, 2);
        pass.run(0, || true);
        assert_eq!(completed(&mut vms[0]), 2);
    }
    assert_eq!(vms[1].take(1), 0);
    // It goes on: from here on chains wait again.
    assert_eq!(late.commit(&open), Published::Clean);
    assert_eq!(vms[1].take(16), 1 + 3 + 10);
    let open = claim(&late);
    vms[0].send(1, 60, 2);
    pass.run(0, || true);
    assert_eq!(completed(&mut vms[0]), 0);
    assert_eq!(late.commit(&open), Published::Clean);
    drop(passes);
    assert_eq!(tools.stats[0].completed_early.get(), 1);
}

#[test]
fn a_thread_that_leaves_its_topology_and_cannot_wait_settles_all_the_same() {
    let rams = rams::<4>();
    let mut vms = vms(&rams, false);
    let queues = [1, 2].map(|at: usize| queue_of(&vms[at]));
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    let pass = &mut passes[0];
    let _open = queues.each_ref().map(|queue| claim(queue));
    for to in [1, 2] {
        vms[0].send(to, 60, 2);
    }
    pass.run(0, || true);
    assert_eq!(completed(&mut vms[0]), 0);
    pass.settle();
    assert_eq!(completed(&mut vms[0]), 4);
    assert!(!pass.owes());
    drop(passes);
    assert_eq!(tools.stats[0].completed_early.get(), 1);
}

#[test]
fn one_queue_that_stands_still_is_given_up_and_no_other() {
    let rams = rams::<4>();
    let mut vms = vms(&rams, false);
    let (late, other) = (queue_of(&vms[2]), queue_of(&vms[3]));
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    tools.hold_ns = HOLD_NS;
    let mut passes = tools.passes(&topology);
    let pass = &mut passes[0];
    let _open = claim(&late);
    vms[0].send(2, 60, 1);
    pass.run(0, || true);
    let begun = Instant::now();
    while begun.elapsed().as_nanos() <= 2 * HELD {}
    // What comes now is not late.
    let open = claim(&other);
    vms[1].send(3, 60, 1);
    pass.run(0, || true);
    assert_eq!((completed(&mut vms[0]), completed(&mut vms[1])), (1, 0));
    assert!(pass.owes());
    assert_eq!(other.commit(&open), Published::Clean);
    pass.run(0, || true);
    assert_eq!(completed(&mut vms[1]), 1);
    drop(passes);
    assert_eq!(tools.stats[0].completed_early.get(), 1);
}

/// 199 senders have a frame each behind another thread's claim. Where it `ends` amid the pass, two
/// bursts are behind it, and behind a second one all that follow. Returns how many chains come back
/// in that pass and after it, and how often some did early.
fn many_senders(ends: bool) -> ([usize; 2], u64) {
    let rams: Vec<SharedMemory> = (0..200).map(|_| ram()).collect();
    let mut vms = vms(&rams, false);
    let queue = queue_of(&vms[0]);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    let pass = &mut passes[0];
    let first = claim(&queue);
    for vm in &mut vms[1..] {
        vm.send(0, 60, 1);
    }
    let (bursts, second) = (Cell::new(0), RefCell::new(None));
    pass.run(0, || {
        bursts.set(bursts.get() + 1);
        if ends && bursts.get() == 2 {
            *second.borrow_mut() = Some(claim(&queue));
            assert_eq!(queue.commit(&first), Published::Clean);
        }
        true
    });
    let at_once = all_completed(&mut vms[1..]);
    let open = second.take().unwrap_or(first);
    assert_eq!(queue.commit(&open), Published::Clean);
    pass.run(0, || true);
    let later = all_completed(&mut vms[1..]);
    drop(passes);
    ([at_once, later], tools.stats[0].completed_early.get())
}

#[test]
fn more_senders_than_there_is_room_for_do_not_wait_and_are_counted() {
    assert_eq!(many_senders(false), ([199 - ROOM, ROOM], 1));
}

#[test]
fn room_is_made_of_waits_that_have_ended() {
    let behind_first = 2 * BURST_FRAMES;
    assert_eq!(many_senders(true), ([behind_first, 199 - behind_first], 0));
}

// ---- what else waits for them -------------------------------------------------------------------

/// A poll thread is asked for something while chains of its wait for a claim, which is committed
/// then, or is not.
fn asked_while_chains_wait(stops: bool, commits: bool) {
    let rams = rams::<2>();
    let mut vms = vms(&rams, false);
    let queue = queue_of(&vms[1]);
    let topology = topology(&vms, 1, |_| 0);
    let mut next = Some(successor(&topology, &[vms[0].entry(), vms[1].entry()]));
    let (mut publisher, shared, poller) = poller(topology, IdlePolicy::Busy);
    let acknowledgements = publisher.acknowledgements();
    let open = claim(&queue);
    vms[0].send(1, 60, 3);
    let (begun, mut answered, mut turns) = (Instant::now(), None, 0);
    poller.run_with(|| {
        turns += 1;
        if turns == 2 {
            // One pass has taken the frames.
            if stops {
                shared.stop.store(true, Ordering::Relaxed);
            } else {
                publisher.publish(next.take().unwrap());
            }
        } else if commits && turns == 6 {
            assert_eq!(queue.commit(&open), Published::Clean);
        }
        if turns > 2 && !stops && acknowledgements.reached(publisher.generation()) {
            answered.get_or_insert_with(|| (begun.elapsed(), completed(&mut vms[0])));
            shared.stop.store(true, Ordering::Relaxed);
        }
    });
    let (waited, back) = answered.unwrap_or_else(|| (begun.elapsed(), completed(&mut vms[0])));
    let long = waited.as_nanos() >= HELD;
    assert!(long || commits && turns >= 6, "{waited:?}, {turns} turns");
    assert_eq!(back, 3);
    if !commits {
        assert_eq!(shared.stats.completed_early.get(), 1);
    }
}

#[test]
fn a_change_of_the_switch_waits_for_chains_and_not_for_ever() {
    for commits in [true, false] {
        asked_while_chains_wait(false, commits);
    }
}

#[test]
fn a_thread_ends_when_no_chain_waits_and_not_never() {
    for commits in [true, false] {
        asked_while_chains_wait(true, commits);
    }
}

#[test]
fn a_thread_does_not_sleep_while_chains_wait() {
    let rams = rams::<2>();
    let mut vms = vms(&rams, false);
    // One that does not kick must be polled.
    let _kicks: Vec<OwnedFd> = vms.iter_mut().map(give_kick).collect();
    let queue = queue_of(&vms[1]);
    let topology = topology(&vms, 1, |_| 0);
    let (_publisher, shared, mut poller) = poller(topology, IdlePolicy::Adaptive(Duration::ZERO));
    let _open = claim(&queue);
    vms[0].send(1, 60, 3);
    let begun = Instant::now();
    poller.drain();
    let waited = begun.elapsed().as_nanos();
    assert!(waited >= HELD, "{waited} ns");
    assert_eq!(completed(&mut vms[0]), 3);
    assert_eq!(shared.stats.completed_early.get(), 1);
}
