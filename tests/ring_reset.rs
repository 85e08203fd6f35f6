//! Drivers that reset one ring of a running device (virtio 1.2 §2.6.1), beside traffic and in the
//! middle of it.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, RECEIVE, Ram, TRANSMIT};
use common::traffic::{self, Bystanders, Exchange, acquainted, attach, frame, mac};
use common::{Stop, long, pause, wait_for};
use pollux::bench::frontend::Frontend;

const LIMIT: Duration = Duration::from_secs(20);

fn split() -> GuestOptions {
    GuestOptions {
        ring_reset: true,
        ..GuestOptions::default()
    }
}

fn packed() -> GuestOptions {
    GuestOptions {
        packed: true,
        ..split()
    }
}

/// Many laps, and with packed rings of a size that is no power of two.
fn small_rings() -> [GuestOptions; 2] {
    [split(), packed()].map(|options| GuestOptions {
        entries: if options.packed { 100 } else { 128 },
        ..options
    })
}

fn resetting_daemon(ports: usize) -> Daemon {
    Daemon::start(&DaemonOptions {
        ports,
        ring_reset: true,
        ..DaemonOptions::default()
    })
}

#[test]
fn a_reset_of_one_ring_is_offered_where_the_port_says_so() {
    let ram = Ram::new(split());
    let without = Daemon::start(&DaemonOptions {
        ports: 1,
        ..DaemonOptions::default()
    });
    for (daemon, offered) in [(without, false), (resetting_daemon(1), true)] {
        let mut guest = Guest::new(&ram);
        guest.attach(&daemon.sockets()[0]);
        let shown = daemon.pollux(&["port", "show", "p0"]).stdout;
        let shown = String::from_utf8(shown).unwrap();
        assert_eq!(shown.contains("ring_reset"), offered, "{shown}");
        drop(guest);
        daemon.stop();
    }
}

/// Sends numbered frames one way and resets, again and again, a ring that they do not use.
fn reset_beside_traffic(options: GuestOptions, which: usize) {
    let daemon = resetting_daemon(4);
    let bystanders = Bystanders::start([&daemon.sockets()[0], &daemon.sockets()[1]]);
    let rams = [options, split()].map(Ram::new);
    let guests = attach(&daemon, &rams, 2);
    let mut exchange = Exchange::new(guests, 3, &[(0, 1), (1, 0)], 8, 100);
    exchange.meet();
    let sizes = [options.entries, 16, 128, options.entries];
    for entries in sizes
        .into_iter()
        .cycle()
        .take(if long() { 400 } else { 40 })
    {
        exchange.exchange(200);
        exchange.drain();
        // Frames that the reset has nothing to do with are on their way.
        let (from, to) = if which == RECEIVE { (0, 1) } else { (1, 0) };
        let names = [mac(3), mac(4)];
        let sent: Vec<Vec<u8>> = (0..8)
            .map(|number| frame(names[to], names[from], 1 << 40 | number, 100))
            .collect();
        for (number, bytes) in sent.iter().enumerate() {
            exchange.guests[from].send(bytes);
            if number == 3 {
                exchange.guests[0].reset_ring(which, entries);
            }
        }
        for bytes in &sent {
            let came = exchange.guests[to].receive(LIMIT);
            assert_eq!(came.as_ref(), Some(bytes));
        }
        // And the ring itself works again, with its new size.
        daemon.settle();
        exchange.forgive_silence();
    }
    bystanders.finish();
    exchange.drain();
    drop(exchange);
    daemon.stop();
}

#[test]
fn a_receiveq_is_reset_while_its_device_sends() {
    for options in [split(), packed()] {
        reset_beside_traffic(options, RECEIVE);
    }
}

#[test]
fn a_transmitq_is_reset_while_its_device_receives() {
    for options in [split(), packed()] {
        reset_beside_traffic(options, TRANSMIT);
    }
}

// ---- in the middle of traffic -------------------------------------------------------------------

/// Turns until GET_VRING_BASE has stopped a ring, which is asked for once `seen` has grown by 300;
/// returns the answer.
fn stop_amid(frontend: &Frontend, which: usize, seen: &AtomicU64, mut turn: impl FnMut()) -> u32 {
    let after = seen.load(Ordering::Relaxed) + 300;
    thread::scope(|scope| {
        let stopper = scope.spawn(|| {
            wait_for("the traffic", || seen.load(Ordering::Relaxed) >= after);
            frontend.get_vring_base(which as u32).unwrap()
        });
        while !stopper.is_finished() {
            turn();
        }
        stopper.join().unwrap()
    })
}

fn assert_untouched(guest: &Guest<'_>, which: usize, before: &[u8]) {
    let now = guest.contents_without(1 - which);
    let changed: Vec<usize> = (0..now.len()).filter(|&at| now[at] != before[at]).collect();
    assert!(
        changed.is_empty(),
        "written to after its ring stopped: {changed:x?}"
    );
}

/// Sends numbered frames to `mac(3)` until it is told to stop; returns how many.
fn flood(sender: &mut Guest<'_>, stop: &AtomicBool) -> u64 {
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        if sender.try_send(&frame(mac(3), mac(4), sent, 200)) {
            sent += 1;
        } else {
            pause();
        }
    }
    wait_for("the last of the flood", || sender.in_flight() == 0);
    sent
}

fn reset_a_receiveq_amid_its_frames(options: GuestOptions) {
    let daemon = resetting_daemon(4);
    let rams = [options, split()].map(Ram::new);
    let (bystanders, mut guest, mut sender) = acquainted(&daemon, rams.each_ref());
    guest.reset_ring(RECEIVE, options.entries);
    let known: u64 = drops(&daemon).values().sum();
    let (stop, total) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut last = None;
    let mut take = |guest: &mut Guest<'_>| {
        while let Some(bytes) = guest.try_receive() {
            let number = Some(traffic::read(&bytes).sequence);
            assert!(number > last, "{number:?} after {last:?}");
            last = number;
            total.fetch_add(1, Ordering::Relaxed);
        }
    };
    let sent = thread::scope(|scope| {
        let stop = Stop(&stop);
        let flood = scope.spawn(|| flood(&mut sender, stop.0));
        for _ in 0..rounds() {
            let frontend = guest.frontend.take().unwrap();
            let began = total.load(Ordering::Relaxed);
            let base = stop_amid(&frontend, RECEIVE, &total, || take(&mut guest));
            // Became visible before the answer.
            take(&mut guest);
            let frames = total.load(Ordering::Relaxed) - began;
            assert_eq!(base, guest.base_after(RECEIVE, frames));
            let before = guest.contents_without(TRANSMIT);
            bystanders.go_on(50);
            assert_untouched(&guest, RECEIVE, &before);
            guest.start_anew(frontend, RECEIVE, options.entries);
        }
        drop(stop);
        flood.join().unwrap()
    });
    take(&mut guest);
    // All that did not arrive was counted.
    let lost = drops(&daemon).values().sum::<u64>() - known;
    assert_eq!(
        sent,
        total.load(Ordering::Relaxed) + lost,
        "{:?}",
        drops(&daemon)
    );
    bystanders.finish();
    drop((guest, sender));
    daemon.stop();
}

/// What was not sent into the third port, by reason.
fn drops(daemon: &Daemon) -> BTreeMap<String, u64> {
    let port = daemon.port("p2");
    let drops = port["statistics"]["tx"]["drops"].as_object().unwrap();
    drops
        .iter()
        .map(|(reason, count)| (reason.clone(), count.as_u64().unwrap()))
        .collect()
}

fn rounds() -> u64 {
    if long() { 200 } else { 20 }
}

#[test]
fn a_receiveq_is_reset_amid_its_frames() {
    for options in small_rings() {
        reset_a_receiveq_amid_its_frames(options);
    }
}

fn reset_a_transmitq_amid_its_frames(options: GuestOptions) {
    let daemon = resetting_daemon(4);
    let rams = [options, split()].map(Ram::new);
    let (bystanders, mut guest, mut receiver) = acquainted(&daemon, rams.each_ref());
    guest.reset_ring(TRANSMIT, options.entries);
    let arrived = AtomicU64::new(0);
    for round in 0..rounds() {
        // Numbers that no other life of the ring uses: what was left in it must not come later.
        let first = round << 32;
        let began = arrived.load(Ordering::Relaxed);
        let take = |receiver: &mut Guest<'_>| {
            while let Some(bytes) = receiver.try_receive() {
                let number = traffic::read(&bytes).sequence;
                assert_eq!(
                    number,
                    first + arrived.fetch_add(1, Ordering::Relaxed) - began
                );
            }
        };
        let mut next = first;
        let frontend = guest.frontend.take().unwrap();
        let base = stop_amid(&frontend, TRANSMIT, &arrived, || {
            if guest.try_send(&frame(mac(4), mac(3), next, 200)) {
                next += 1;
            }
            take(&mut receiver);
        });
        // What was taken has arrived before the answer.
        take(&mut receiver);
        let frames = arrived.load(Ordering::Relaxed) - began;
        assert_eq!(base, guest.base_after(TRANSMIT, frames));
        let before = guest.contents_without(RECEIVE);
        bystanders.go_on(50);
        assert_untouched(&guest, TRANSMIT, &before);
        assert_eq!(receiver.try_receive(), None);
        guest.start_anew(frontend, TRANSMIT, options.entries);
    }
    bystanders.finish();
    drop((guest, receiver));
    daemon.stop();
}

#[test]
fn a_transmitq_is_reset_amid_its_frames() {
    for options in small_rings() {
        reset_a_transmitq_amid_its_frames(options);
    }
}

#[test]
fn a_ring_that_was_reset_still_calls() {
    let daemon = resetting_daemon(2);
    let options = GuestOptions {
        calls: true,
        ..packed()
    };
    let rams = [options, split()].map(Ram::new);
    let mut guests = attach(&daemon, &rams, 0);
    // A start makes one call; the next is for the frame.
    for reset in [false, true] {
        if reset {
            guests[0].reset_ring(RECEIVE, 64);
        }
        wait_for("the call of a start", || {
            guests[0].calls[RECEIVE].read().is_ok()
        });
    }
    // The call of a start may come before all poll threads know of the ring.
    daemon.settle();
    guests[1].send(&frame(mac(1), mac(2), 1, 100));
    assert!(guests[0].receive(LIMIT).is_some());
    wait_for("the call of a frame", || {
        guests[0].calls[RECEIVE].read().is_ok()
    });
    drop(guests);
    daemon.stop();
}

#[test]
fn there_are_records_of_packed_rings_that_run_and_of_no_others() {
    let daemon = resetting_daemon(2);
    let rams = [packed(), split()].map(Ram::new);
    let mut guests = attach(&daemon, &rams, 0);
    let both = ["p0.0", "p0.1"];
    assert_eq!(daemon.records(), both);
    for (options, wanted) in [(split(), &[][..]), (packed(), &both)] {
        guests[0].reboot(options);
        daemon.settle();
        assert_eq!(daemon.records(), wanted, "{options:?}");
    }
    for which in [RECEIVE, TRANSMIT] {
        guests[0].reset_ring(which, 64);
        daemon.settle();
        assert_eq!(daemon.records(), both);
        let frontend = guests[0].frontend.as_ref().unwrap();
        frontend.get_vring_base(which as u32).unwrap();
        // It is forgotten once the answer is on its way.
        let other = [both[1 - which]];
        wait_for("the end of a record", || daemon.records() == other);
        guests[0].reboot(packed());
        daemon.settle();
        assert_eq!(daemon.records(), both);
    }
    drop(guests);
    daemon.stop();
}
