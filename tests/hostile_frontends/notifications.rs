//! Notification descriptors that change while poll threads use them, or are not there, and kicks
//! without end.

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::common::daemon::Daemon;
use crate::common::long;
use crate::common::traffic::{Exchange, attach};

/// New call descriptors for both rings of each frontend.
fn replace_calls(frontends: &[Frontend; 2]) -> [[EventFd; 2]; 2] {
    frontends.each_ref().map(|frontend| {
        [RECEIVE, TRANSMIT].map(|which| {
            let call = EventFd::new(EFD_NONBLOCK).unwrap();
            frontend.set_vring_call(which as u32, &call).unwrap();
            call
        })
    })
}

/// Waits for so many calls; returns how many have come.
fn calls(call: &EventFd, wanted: u64) -> u64 {
    let mut came = 0;
    wait_for("calls by a new descriptor", || {
        came += call.read().unwrap_or(0);
        came >= wanted
    });
    came
}

/// How many of them the daemon has. (It opens other descriptors while sessions go on.)
fn eventfds(daemon: &Daemon) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
    let links = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    links
        .filter(|link| link.to_string_lossy() == "anon_inode:[eventfd]")
        .count()
}

/// A busy guest and a quiet one replace their descriptors in turn, so that the numbers of the one's
/// are the other's next.
fn replace_under_traffic(busy: GuestOptions) {
    let scene = Scene::with(&DaemonOptions {
        ports: 5,
        ..DaemonOptions::default()
    });
    let quiet = GuestOptions {
        calls: false,
        ..busy
    };
    let rams = [busy, quiet, quiet].map(Ram::new);
    let mut guests = attach(&scene.daemon, &rams, 2);
    let mut third = guests.pop().unwrap();
    let mut exchange = Exchange::new(guests, 3, &[(0, 1), (1, 0)], 8, 200);
    exchange.meet();
    exchange.exchange(50);
    while third.try_receive().is_some() {}
    let held = eventfds(&scene.daemon);
    let guests = [&mut exchange.guests[0], &mut third];
    let frontends = guests.map(|guest| guest.frontend.take().unwrap());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let replacing = scope.spawn(|| {
            let _over = Stop(&over);
            let mut last: Vec<EventFd> = Vec::new();
            for turn in 0..if long() { 20_000 } else { 300 } {
                let [busy, quiet] = replace_calls(&frontends);
                // One because it is new, which the descriptor before may not have had, and those
                // for frames.
                busy.iter().for_each(|call| assert!(calls(call, 3) >= 3));
                quiet.iter().for_each(|call| assert_eq!(calls(call, 1), 1));
                let stray = last.iter().filter(|call| call.read().is_ok()).count();
                assert_eq!(stray, 0, "turn {turn}");
                last = quiet.into();
            }
        });
        while !over.load(Ordering::Relaxed) {
            exchange.turn();
        }
        replacing.join().unwrap();
    });
    // Not a frame was lost, and the next ones pass.
    exchange.drain();
    exchange.exchange(100);
    exchange.drain();
    wait_for("the old descriptors to go", || {
        eventfds(&scene.daemon) <= held
    });
    for port in [VICTIM, "p3", "p4"] {
        let drops = scene.daemon.drops(port);
        assert!(
            drops.iter().all(|(_, count)| *count == 0),
            "{port}: {drops:?}"
        );
    }
    drop((exchange, third, frontends));
    scene.finish();
}

#[test]
fn a_call_descriptor_that_is_replaced_under_traffic_is_called_and_no_other_ports_is() {
    for options in kinds() {
        replace_under_traffic(GuestOptions {
            calls: true,
            event_idx: false,
            ..options
        });
    }
}

#[test]
fn call_and_kick_descriptors_are_replaced_under_traffic_and_none_is_left() {
    scene(|scene, sink| {
        let ram = Ram::new(GuestOptions {
            event_idx: false,
            calls: true,
            ..GuestOptions::default()
        });
        let mut guest = Guest::new(&ram);
        scene.attach_victim(&mut guest, sink);
        let frontend = guest.frontend.take().unwrap();
        let held = Holdings::of(&scene.daemon).fds;
        let stop = AtomicBool::new(false);
        let mut sent = 0;
        std::thread::scope(|scope| {
            let stop = &stop;
            scope.spawn(move || {
                for turn in 0..if long() { 100_000 } else { 1_000 } {
                    let fd = EventFd::new(EFD_NONBLOCK).unwrap();
                    frontend.set_vring_call(turn % 2, &fd).unwrap();
                    frontend.set_vring_kick(turn % 2, &fd).unwrap();
                }
                stop.store(true, Ordering::Relaxed);
                frontend
            });
            // Kicks are for the descriptor that was there first: the ring is polled while it has
            // traffic, and the last of its frames needs none behind another port's.
            while !stop.load(Ordering::Relaxed) {
                sent += u64::from(guest.try_send(&frame(mac(4), mac(3), sent, 100)));
                while sink.try_receive().is_some() {}
                sink.try_send(&frame(mac(3), mac(4), sent, 100));
                while guest.try_receive().is_some() {}
            }
        });
        assert!(sent > 0);
        last_end(scene);
        while sink.try_receive().is_some() {}
        wait_for("the old descriptors to go", || {
            Holdings::of(&scene.daemon).fds <= held
        });
    });
}

#[test]
fn a_guest_without_descriptors_is_polled_and_called_by_nobody() {
    scene(|scene, sink| {
        let ram = Ram::new(GuestOptions::default());
        let mut guest = Guest::new(&ram);
        let mut frontend = guest.negotiate(scene.victim()).unwrap();
        frontend.set_features(frontend.features()).unwrap();
        frontend.set_mem_table(&[guest.region()]).unwrap();
        for which in [RECEIVE, TRANSMIT] {
            let queue = guest.queue(which);
            frontend
                .set_vring_num(queue.index, u32::from(queue.size))
                .unwrap();
            frontend.set_vring_base(queue.index, queue.base).unwrap();
            frontend.set_vring_addr(&queue).unwrap();
            // Bit 8: there is no descriptor.
            let none = (u64::from(queue.index) | 1 << 8).to_le_bytes();
            frontend
                .tell(FrontendReq::SET_VRING_KICK, &none, &[])
                .unwrap();
            frontend
                .tell(FrontendReq::SET_VRING_CALL, &none, &[])
                .unwrap();
            frontend.set_vring_enable(queue.index, true).unwrap();
        }
        guest.frontend = Some(frontend);
        scene.wait_until_running(VICTIM);
        for number in 0..50 {
            scene.passes(&mut guest, sink, number);
            scene.reaches(&mut guest, sink, number);
        }
        assert!(guest.calls.iter().all(|call| call.read().is_err()));
        guest.detach();
        last_end(scene);
    });
}

#[test]
fn a_storm_of_kicks_delays_nobody() {
    with_victim(GuestOptions::default(), |scene, guest, sink| {
        let stop = AtomicBool::new(false);
        let kick = guest.kicks[TRANSMIT].try_clone().unwrap();
        std::thread::scope(|scope| {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = kick.write(1);
                }
            });
            scene.bystanders.go_on(500);
            scene.passes(guest, sink, 1);
            stop.store(true, Ordering::Relaxed);
        });
    });
}
