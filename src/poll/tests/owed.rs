//! Transmit chains whose frames stand behind another thread's open claim.

use super::*;
use crate::poll::owed::HOLD_NS;
use crate::virtio::claim::Published;

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
        // Of each claim of another thread one burst is behind; of the third one also what came later.
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
        // The oldest wait for no more than they must, the others for all that was behind a claim then.
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
    let rams = rams::<2>();
    let mut vms = vms(&rams, false);
    let queue = queue_of(&vms[1]);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    let pass = &mut passes[0];
    let open = claim(&queue);
    let begun = Instant::now();
    vms[0].send(1, 60, 3);
    while completed(&mut vms[0]) == 0 {
        pass.run(0, || true);
    }
    let waited = begun.elapsed().as_nanos();
    assert!(waited >= u128::from(HOLD_NS), "{waited} ns");
    for _ in 0..5 {
        vms[0].send(1, 60, 2);
        pass.run(0, || true);
        assert_eq!(completed(&mut vms[0]), 2);
    }
    assert_eq!(vms[1].take(1), 0);
    // It goes on: from here on chains wait again.
    assert_eq!(queue.commit(&open), Published::Clean);
    assert_eq!(vms[1].take(16), 1 + 3 + 10);
    let open = claim(&queue);
    vms[0].send(1, 60, 2);
    pass.run(0, || true);
    assert_eq!(completed(&mut vms[0]), 0);
    // A thread that leaves its topology, and cannot wait any longer, settles all the same.
    pass.settle();
    assert_eq!(completed(&mut vms[0]), 2);
    assert!(!pass.owes());
    assert_eq!(queue.commit(&open), Published::Clean);
    drop(passes);
    assert_eq!(tools.stats[0].completed_early.get(), 2);
}
