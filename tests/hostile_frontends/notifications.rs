//! Call descriptors that change while poll threads use them.

use super::*;
use crate::common::daemon::Daemon;
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

/// A busy guest and a quiet one replace their descriptors in turn, so that the numbers of the one's are the other's next.
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
                // One because it is new, which the descriptor before may not have had, and those for frames.
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
