//! What each sender gets of a receiver that cannot take everything.

use super::*;

const FLOODER: usize = 0;
const PACED: usize = 1;
const RECEIVER: usize = 2;

/// A flooder, and a sender of 1 % of what the receiver takes. `suspect`: the receiver's memory may
/// be slow, so that each frame is copied into private memory first.
fn flood_beside_paced(packed: bool, threads: usize, returned_at_once: usize, suspect: bool) {
    let rams = rams::<3>();
    let mut vms = vms(&rams, packed);
    let topology = topology(&vms, threads, |slot| usize::from(slot) % threads);
    let mut tools = Threads::new(threads);
    let mut passes = tools.passes(&topology);
    for pass in &mut passes {
        if suspect {
            let receiver = topology.port(RECEIVER as u16).unwrap();
            pass.watch().suspect(receiver.into());
        }
    }
    // The receiver takes 8 frames a step, the flooder offers eight times as many.
    let (mut paced, mut taken) = (0, 0);
    for step in 0..20_000 {
        vms[FLOODER].send(2, 60, 64);
        if step > 100 && step % 12 == 0 {
            paced += vms[PACED].send(2, 60, 1) as u64;
        }
        // Neither thread always goes first.
        let count = passes.len();
        for turn in 0..count {
            let pass = &mut passes[(turn + step / 7) % count];
            match suspect {
                true => pass.run_watched(0, || true),
                false => pass.run(0, || true),
            };
        }
        if step % (returned_at_once / 8) == 0 {
            taken += vms[RECEIVER].take(returned_at_once);
            vms[RECEIVER].give_back();
        }
    }
    let came = vms[RECEIVER].from[PACED];
    assert!(
        (paced - came) * 100 < paced,
        "{came} of {paced} paced frames came"
    );
    // Nothing of the receiver's capacity is lost.
    assert!(taken as f64 > 0.97 * 20_000.0 * 8.0, "{taken} frames taken");
    let full = vms[RECEIVER].drops(DropReason::EgressRingFull);
    assert!(full > 20_000 * 50, "{full} frames found the ring full");
    assert_eq!(vms[RECEIVER].drops(DropReason::EgressContended), 0);
}

#[test]
fn a_flooder_leaves_a_paced_sender_its_share_on_one_thread() {
    for packed in [false, true] {
        flood_beside_paced(packed, 1, 8, false);
        flood_beside_paced(packed, 1, 128, false);
        flood_beside_paced(packed, 1, 128, true);
    }
}

#[test]
fn a_flooder_leaves_a_paced_sender_its_share_on_two_threads() {
    for packed in [false, true] {
        flood_beside_paced(packed, 2, 8, false);
        flood_beside_paced(packed, 2, 128, false);
    }
}

#[test]
fn a_ring_behind_an_open_claim_is_not_taken_for_one_that_stands_still() {
    let rams = rams::<1>();
    let vms = vms(&rams, true);
    let queue = vms[0].queue();
    let mut claim = Claim::new();
    queue.claim(std::iter::once(60), &mut claim).unwrap();
    let begun = Instant::now();
    while begun.elapsed().as_millis() < 300 {
        queue.refused();
    }
    assert_eq!(queue.kept(), 32);
    queue.commit(&claim);
    while queue.kept() == 32 {
        queue.refused();
        assert!(begun.elapsed().as_secs() < 20, "it never stands still");
    }
}

#[test]
fn a_ring_that_was_never_full_is_filled_to_the_last_buffer() {
    let rams = rams::<2>();
    let mut vms = vms(&rams, false);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    for _ in 0..10 {
        assert_eq!(vms[0].send(1, 60, ALL), ALL);
        for _ in 0..4 {
            passes[0].run(0, || true);
        }
        assert_eq!(vms[1].take(usize::MAX), ALL);
        vms[1].give_back();
    }
    assert_eq!(vms[1].drops(DropReason::EgressRingFull), 0);
}

#[test]
fn a_sender_alone_goes_on_when_its_receiver_posts_fewer_buffers_than_before() {
    let rams = rams::<2>();
    let mut vms = vms(&rams, false);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    vms[0].send(1, 60, ALL);
    for _ in 0..5 {
        passes[0].run(0, || true);
    }
    vms[0].send(1, 60, 64);
    passes[0].run(0, || true);
    assert!(vms[1].drops(DropReason::EgressRingFull) > 0);
    // Twenty buffers from now on, fewer than the eighth that is kept.
    vms[1].take(20);
    let mut rest = vms[1].kept.clone();
    let begun = Instant::now();
    let mut came = 0;
    while came < 1000 {
        assert!(begun.elapsed().as_secs() < 20, "only {came} frames came");
        vms[1].kept = std::mem::take(&mut rest);
        vms[1].give_back();
        vms[0].send(1, 60, 64);
        passes[0].run(0, || true);
        came += vms[1].take(20);
        rest = std::mem::take(&mut vms[1].kept);
        rest.truncate(20);
    }
}
