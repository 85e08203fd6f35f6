//! Ports whose memory is slow to touch: who finds that, who pays, and the way around.

use super::*;
use crate::frame::BURST_FRAMES;
use crate::sys::pages::Pace;
use crate::topology::detour::Detour;
use rustix::fs::{FallocateFlags, fallocate};

/// Poll thread 1 serves slow ports.
const SLOW_THREAD: usize = 1;

/// Guest 1 is a slow one; its transmit queue belongs to thread 1.
fn slow_topology(vms: &[Vm<'_>], detour: &Arc<Detour>) -> Topology {
    let own = |slot| usize::from(slot == 1 && vms[1].port.pages.pace() == Pace::Slow);
    topology(vms, 2, own).with_detour(Some(detour))
}

fn threads() -> Threads {
    let mut threads = Threads::new(2);
    threads.watches[SLOW_THREAD] = Watch::new(&threads.clock, None, true);
    threads
}

/// Lengths of the frames that have come.
fn lengths(vm: &mut Vm<'_>) -> Vec<usize> {
    let used = std::iter::from_fn(|| vm.receive.reap());
    used.map(|used| used.len as usize - NET_HDR_SIZE).collect()
}

#[test]
fn frames_to_a_slow_port_arrive_by_the_detour_in_order() {
    for packed in [false, true] {
        let rams = rams::<2>();
        let mut vms = vms(&rams, packed);
        vms[1].port.pages.set_pace(Pace::Slow);
        let detour = Arc::new(Detour::default());
        let slow = slow_topology(&vms, &detour);
        let mut tools = threads();
        let mut passes = tools.passes(&slow);
        for len in [61, 62, 1500] {
            vms[0].send(1, len, 1);
            passes[0].run(0, || true);
        }
        assert_eq!(
            lengths(&mut vms[1]),
            [0; 0],
            "nobody else touches its memory"
        );
        assert!(vms[0].transmit.reap().is_some(), "the sender has them back");
        assert!(passes[SLOW_THREAD].run_slow(0, || true));
        assert_eq!(lengths(&mut vms[1]), [61, 62, 1500]);
        // And from it, a few at a time.
        vms[1].send(0, 100, 20);
        let mut came = 0;
        while passes[SLOW_THREAD].run_slow(0, || true) {
            came += lengths(&mut vms[0]).len();
        }
        assert_eq!(came, 20);
        // On the way back what has been sent before comes first.
        vms[0].send(1, 63, 1);
        passes[0].run(0, || true);
        drop(passes);
        vms[1].port.pages.set_pace(Pace::Returning);
        let returning = slow_topology(&vms, &detour);
        let mut passes = tools.passes(&returning);
        vms[0].send(1, 64, 1);
        passes[0].run(0, || true);
        assert_eq!(lengths(&mut vms[1]), [0; 0]);
        assert!(!detour.is_empty());
        passes[SLOW_THREAD].run_slow(0, || true);
        assert_eq!(lengths(&mut vms[1]), [63, 64]);
        assert!(detour.is_empty());
        vms[0].send(1, 65, 1);
        passes[0].run(0, || true);
        assert_eq!(lengths(&mut vms[1]), [65]);
        assert_eq!((vms[0].outcomes(), vms[1].outcomes()), (vec![], vec![]));
    }
}

#[test]
fn a_port_on_its_way_back_does_not_wait_for_frames_to_a_slow_one() {
    let rams = rams::<3>();
    let mut vms = vms(&rams, false);
    for vm in &vms[1..] {
        vm.port.pages.set_pace(Pace::Slow);
    }
    let detour = Arc::new(Detour::default());
    let slow = slow_topology(&vms, &detour);
    let mut tools = threads();
    let mut passes = tools.passes(&slow);
    vms[0].send(2, 61, 1);
    passes[0].run(0, || true);
    drop(passes);
    vms[1].port.pages.set_pace(Pace::Returning);
    let returning = slow_topology(&vms, &detour);
    let mut passes = tools.passes(&returning);
    vms[0].send(1, 62, 1);
    passes[0].run(0, || true);
    assert_eq!(lengths(&mut vms[1]), [62]);
    assert!(!detour.is_empty(), "the frame to guest 2 is under way");
}

#[test]
fn a_detour_that_is_full_drops_and_counts() {
    const LEN: u32 = 60_000;
    let rams = rams::<2>();
    let mut vms = vms(&rams, false);
    vms[1].port.pages.set_pace(Pace::Slow);
    let detour = Arc::new(Detour::default());
    let slow = slow_topology(&vms, &detour);
    let mut tools = threads();
    let mut passes = tools.passes(&slow);
    vms[0].send(1, LEN, 40);
    while passes[0].run(0, || true) {}
    let room = (1 << 20) / (LEN as u64 + 10);
    let missed = vms[1].drops(DropReason::EgressMemorySlow);
    assert_eq!(missed, 40 - room);
    // The port goes, and what was under way to it with it.
    drop(passes);
    let gone = Topology::build(
        &[vms[0].entry()],
        slow.since.clone(),
        slow.fdb.clone(),
        |_, _| Some(0),
    );
    let gone = Topology {
        detour: Some(detour.clone()),
        ..gone
    };
    let mut passes = tools.passes(&gone);
    while passes[SLOW_THREAD].run_slow(0, || true) {}
    assert!(detour.is_empty());
    assert_eq!(lengths(&mut vms[1]), [0; 0]);
}

/// Bytes of a long frame.
const LONG: u32 = 60_000;
/// Steps from this length on are looked at here, in nanoseconds: a few pages are enough.
const LONG_NS: u64 = 20_000;

/// Takes away what is in the guest's memory there: the next touch of each page is a page fault.
fn punch(ram: &SharedMemory, start: usize, len: usize) {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(ram.file(), hole, start as u64, len as u64).unwrap();
}

/// The first use of a page is no attack, and is not looked for here: receive buffers are touched as
/// sessions do it, and long frames of guest 1 to guest 2 use the thread's own memory.
fn warm_up(vms: &mut [Vm<'_>], pass: &mut Pass<'_, '_>) {
    vms.iter()
        .for_each(|vm| assert!(vm.queue().touch_buffers()));
    alarm(pass);
    let egress = pass.context().topology.port(2).unwrap();
    for _ in 0..2 {
        vms[1].send(2, LONG, 1);
        pass.run_watched(0, || true);
        let used = std::iter::from_fn(|| vms[2].receive.reap());
        vms[2].kept = used.map(|used| used.token).collect();
        vms[2].give_back();
        // The next one is copied into private memory first.
        pass.watch().suspect(egress.into());
    }
    for vm in vms {
        assert_eq!(vm.port.pages.pace(), Pace::Normal);
        vm.port.pages.set_pace(Pace::Normal);
    }
}

fn alarm(pass: &mut Pass<'_, '_>) {
    pass.watch().long_ns = LONG_NS;
    pass.watch().look(Some(1_000_000));
}

/// Guest 0 makes the switch touch new pages again and again (`again`), beside honest traffic of
/// guest 1. Returns once guest 0 is marked, and after how many rounds.
fn until_marked(
    vms: &mut [Vm<'_>],
    pass: &mut Pass<'_, '_>,
    mut again: impl FnMut(&mut Vm<'_>, &mut Pass<'_, '_>),
) -> usize {
    warm_up(vms, pass);
    let honest = [1, 2].map(|other: usize| vms[other].port.clone());
    let honest = honest.each_ref().map(|port| &port.pages);
    let before = honest.map(|pages| pages.faults());
    let begun = Instant::now();
    let mut rounds = 0;
    while vms[0].port.pages.pace() == Pace::Normal {
        assert!(begun.elapsed().as_secs() < 60, "nobody is charged");
        again(&mut vms[0], pass);
        // Beyond their heads, so that copies read the sender's memory.
        vms[1].send(2, 1000, 1);
        alarm(pass);
        pass.run_watched(0, || true);
        vms[2].take(usize::MAX);
        vms[2].give_back();
        rounds += 1;
    }
    for (pages, before) in honest.iter().zip(before) {
        assert_eq!((pages.faults(), pages.pace()), (before, Pace::Normal));
    }
    rounds
}

/// The pages of a sender's frames go again and again; another one's do not.
#[test]
fn memory_that_is_slow_is_charged_to_its_port_and_then_avoided() {
    let rams = rams::<3>();
    let mut vms = vms(&rams, false);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    let rounds = until_marked(&mut vms, &mut passes[0], |vm, _| {
        punch(vm.ram, TRANSMIT + 4096, LONG as usize + 4096);
        vm.send(2, LONG, 1);
    });
    assert!(rounds > 10, "one of many");
    assert!(vms[0].port.pages.faults() > 100);
    // It is left alone, in either direction, until control has taken it away.
    let before = vms[0].outcomes();
    vms[0].send(2, 60, 1);
    vms[1].send(0, 60, 1);
    passes[0].run_watched(0, || true);
    assert_eq!(vms[0].transmit.outstanding(), 1, "nobody has looked");
    assert_eq!(vms[1].transmit.outstanding(), 1);
    assert!(vms[1].transmit.reap().is_some());
    assert_eq!(vms[0].drops(DropReason::EgressMemorySlow), 1);
    assert!(
        before
            .iter()
            .all(|(reason, _)| *reason == DropReason::RxMemorySlow)
    );
}

/// The pages go between the touch at their sender's expense and the copy into the receiver's
/// memory: it is the sender who is charged, however long the copy waits.
#[test]
fn a_copy_that_waits_for_its_senders_memory_is_not_the_receivers_expense() {
    let rams = rams::<3>();
    let mut vms = vms(&rams, false);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    warm_up(&mut vms, &mut passes[0]);
    let receiver = vms[2].port.clone();
    let before = receiver.pages.faults();
    let mut rounds = 0;
    while vms[0].port.pages.pace() == Pace::Normal {
        rounds += 1;
        assert!(rounds < 100_000, "nobody is charged");
        vms[0].send(2, LONG, 1);
        alarm(&mut passes[0]);
        // As `run_watched` does it, with a hole in between.
        passes[0].watch().pass();
        let ingress = &topology.plans[0].queues[0];
        assert!(passes[0].read(ingress, 0, BURST_FRAMES, 0));
        punch(vms[0].ram, TRANSMIT + 4096, LONG as usize + 4096);
        passes[0].forward_loaded(0);
        passes[0].complete_watched(ingress);
        passes[0].delivery.settle();
        let used = std::iter::from_fn(|| vms[2].receive.reap());
        vms[2].kept = used.map(|used| used.token).collect();
        vms[2].give_back();
    }
    assert_eq!(receiver.pages.faults(), before);
    assert_eq!(receiver.pages.pace(), Pace::Normal);
}

/// A thread that goes to sleep writes to the rings of its queues.
#[test]
fn rings_that_are_slow_to_arm_are_their_ports_expense() {
    let rams = rams::<3>();
    let features = RingFeatures {
        event_idx: true,
        ..features(false)
    };
    let mut vms = vms_with(&rams, features);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    // The page of the transmitq's used ring. Nobody has used that ring yet.
    let page = RING + RingLayout::new(ENTRIES, false).used / 4096 * 4096;
    until_marked(&mut vms, &mut passes[0], |vm, pass| {
        punch(vm.ram, page, 4096);
        alarm(pass);
        pass.watch().long_ns = 0;
        pass.arm();
        pass.disarm();
    });
    assert!(!passes[0].arm(), "a port that is avoided is not armed");
}

/// Each step is short, and all of a pass are not.
#[test]
fn many_queues_with_a_few_new_pages_each_are_one_ports_expense() {
    let rams = rams::<3>();
    let mut vms = vms(&rams, false);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    let ingress = &topology.plans[0].queues[0];
    until_marked(&mut vms, &mut passes[0], |vm, pass| {
        alarm(pass);
        let stats = pass.delivery.tools.stats;
        pass.watch().pass();
        for _ in 0..64 {
            punch(vm.ram, TRANSMIT, 4096);
            pass.watch().begin(ingress.into());
            vm.ram.window(TRANSMIT, 1).unwrap().write_bytes(0, &[1]);
            pass.watch().charge(ingress.into(), stats);
        }
    });
}
