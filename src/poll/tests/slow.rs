//! Ports whose memory is slow to touch: who finds that, who pays, and the way around.

use super::*;
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

/// The pages of a sender's frames go again and again; another one's do not.
#[test]
fn memory_that_is_slow_is_charged_to_its_port_and_then_avoided() {
    const LEN: u32 = 60_000;
    let rams = rams::<3>();
    let mut vms = vms(&rams, false);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    let begun = Instant::now();
    let mut faults = 0;
    while vms[0].port.pages.pace() == Pace::Normal {
        assert!(begun.elapsed().as_secs() < 60, "nobody is charged");
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let start = TRANSMIT as u64 + 4096;
        fallocate(rams[0].file(), hole, start, (LEN + 4096).into()).unwrap();
        vms[0].send(2, LEN, 1);
        vms[1].send(2, 60, 1);
        passes[0].watch().look(Some(1_000_000));
        // A few pages are enough here.
        passes[0].watch().long_ns = 20_000;
        passes[0].run_watched(0, || true);
        vms[2].take(usize::MAX);
        vms[2].give_back();
        faults += 1;
    }
    assert!(faults > 10, "one of many");
    assert!(vms[0].port.pages.faults() > 100);
    // Faults are counted by thread: one in memory of our own may fall into a long step of another
    // port's.
    assert!(vms[1].port.pages.faults() < vms[0].port.pages.faults() / 10);
    assert_eq!(vms[1].port.pages.pace(), Pace::Normal);
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
