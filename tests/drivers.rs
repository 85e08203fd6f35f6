//! Drivers that are old, and that come back as others.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::time::Duration;

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, RECEIVE, Ram, TRANSMIT};
use common::traffic::{Bystanders, Exchange, attach, frame, mac};
use common::{long, wait_for};

const LIMIT: Duration = Duration::from_secs(20);

fn daemon(ports: usize) -> Daemon {
    Daemon::start(&DaemonOptions {
        ports,
        ..DaemonOptions::default()
    })
}

fn split() -> GuestOptions {
    GuestOptions::default()
}

fn packed() -> GuestOptions {
    GuestOptions {
        packed: true,
        ..split()
    }
}

/// A driver that knows neither VIRTIO_F_VERSION_1 nor mergeable buffers: headers of 10 bytes.
fn legacy() -> GuestOptions {
    GuestOptions {
        legacy: true,
        mergeable: false,
        event_idx: false,
        ..split()
    }
}

/// The same with mergeable buffers: headers of 12 bytes.
fn legacy_mergeable() -> GuestOptions {
    GuestOptions {
        legacy: true,
        receive_len: 100,
        ..split()
    }
}

/// Frames of a port that were dropped for a reason.
fn dropped(daemon: &Daemon, port: &str, reason: &str) -> u64 {
    let drops = daemon.drops(port);
    let counts = drops.iter().filter(|(name, _)| name.contains(reason));
    counts.map(|(_, count)| count).sum()
}

// ---- legacy drivers -----------------------------------------------------------------------------

#[test]
fn legacy_and_modern_guests_exchange_frames_of_every_length() {
    let daemon = daemon(4);
    let rams = [legacy(), split(), legacy_mergeable(), packed()].map(Ram::new);
    let guests = attach(&daemon, &rams, 0);
    let flows: Vec<(usize, usize)> = (0..4)
        .flat_map(|from| (0..4).map(move |to| (from, to)))
        .filter(|(from, to)| from != to)
        .collect();
    let mut exchange = Exchange::new(guests, 1, &flows, 4, 60);
    exchange.meet();
    for len in [
        22, 59, 60, 61, 64, 115, 116, 117, 118, 119, 127, 128, 129, 200, 1514, 2036,
    ] {
        exchange.set(4, len);
        exchange.exchange(500);
        exchange.drain();
    }
    drop(exchange);
    daemon.stop();
}

/// Where to cut a header and what follows it: once everywhere, everywhere at once, and with empty
/// pieces in between.
fn cuts(header: usize) -> Vec<Vec<usize>> {
    let mut all: Vec<Vec<usize>> = (1..header + 20).map(|cut| vec![cut]).collect();
    all.push((1..=header + 14).collect());
    all.push((1..=header).collect());
    all.push((2..=header + 30).step_by(2).collect());
    all.push(vec![0, 0, 3, 3, header, header]);
    all
}

#[test]
fn a_header_may_be_in_any_pieces() {
    let daemon = daemon(3);
    for options in [legacy(), legacy_mergeable(), split(), packed()] {
        let rams = [options, split(), legacy()].map(Ram::new);
        let mut guests = attach(&daemon, &rams, 0);
        let mut sequence = 0;
        for cuts in cuts(options.header()) {
            for len in [60, 300] {
                sequence += 1;
                // Nobody has learned the second one: both receive it.
                let sent = frame(mac(2), mac(1), sequence, len);
                assert!(guests[0].try_send_cut(&sent, &cuts));
                for receiver in &mut guests[1..] {
                    let came = receiver.receive(LIMIT);
                    assert_eq!(came.as_ref(), Some(&sent), "{options:?} {cuts:?}");
                }
            }
        }
        drop(guests);
        wait_for("the ports", || {
            daemon.ports().iter().all(|port| port["state"] == "waiting")
        });
    }
    daemon.stop();
}

#[test]
fn a_frame_may_be_in_as_many_pieces_as_its_ring_has_entries() {
    let daemon = daemon(2);
    for options in [split(), packed()] {
        let options = GuestOptions {
            entries: 1024,
            receive_len: 2048,
            ..options
        };
        let rams = [options, split()].map(Ram::new);
        let mut guests = attach(&daemon, &rams, 0);
        for (sequence, count) in (1..).zip([63, 64, 65, 66, 256, 257, 1023, 1024]) {
            // The header, then single bytes, then the rest.
            let cuts: Vec<usize> = (0..count - 1).map(|n| options.header() + n).collect();
            let sent = frame(mac(2), mac(1), sequence, 1400);
            assert!(guests[0].try_send_cut(&sent, &cuts));
            let came = guests[1].receive(LIMIT);
            assert_eq!(came, Some(sent), "{count} pieces, {options:?}");
            wait_for("the chain to come back", || guests[0].in_flight() == 0);
        }
        drop(guests);
        wait_for("the ports", || {
            daemon.ports().iter().all(|port| port["state"] == "waiting")
        });
    }
    assert_eq!(dropped(&daemon, "p0", ""), 0);
    daemon.stop();
}

#[test]
fn chains_that_end_within_the_header_are_returned_and_counted() {
    let daemon = daemon(2);
    for (options, shortest) in [(legacy(), 10), (legacy_mergeable(), 12), (packed(), 12)] {
        let before = dropped(&daemon, "p0", "rx_malformed_chain");
        let rams = [options, split()].map(Ram::new);
        let mut guests = attach(&daemon, &rams, 0);
        for len in 1..shortest {
            guests[0].send_raw(len);
        }
        // The header and nothing, or too little, behind it.
        guests[0].send_raw(shortest);
        guests[0].send_raw(shortest + 13);
        let sent = frame(mac(2), mac(1), 7, 60);
        guests[0].send(&sent);
        assert_eq!(guests[1].receive(LIMIT), Some(sent));
        wait_for("every chain to come back", || guests[0].in_flight() == 0);
        let malformed = dropped(&daemon, "p0", "rx_malformed_chain") - before;
        assert_eq!(malformed, shortest as u64 - 1, "{options:?}");
        drop(guests);
        wait_for("the ports", || {
            daemon.ports().iter().all(|port| port["state"] == "waiting")
        });
    }
    daemon.stop();
}

#[test]
fn a_legacy_driver_that_wants_no_calls_is_called_when_a_ring_is_empty() {
    let daemon = daemon(2);
    for event_idx in [false, true] {
        let options = GuestOptions {
            event_idx,
            entries: 16,
            ..legacy()
        };
        let rams = [options, split()].map(Ram::new);
        let mut guests = attach(&daemon, &rams, 0);
        let called = |guest: &Guest<'_>, which: usize| guest.calls[which].read().is_ok();
        for which in [RECEIVE, TRANSMIT] {
            wait_for("the call of a start", || called(&guests[0], which));
        }
        // Nothing is left in its transmitq once this one is taken.
        guests[0].send(&frame(mac(2), mac(1), 1, 100));
        wait_for("the call of an empty transmitq", || {
            called(&guests[0], TRANSMIT)
        });
        assert!(guests[1].receive(LIMIT).is_some());
        for number in 0..16 {
            assert!(!called(&guests[0], RECEIVE), "after {number} frames");
            guests[1].send(&frame(mac(1), mac(2), number, 100));
            wait_for("the frame to be taken", || guests[1].in_flight() == 0);
            daemon.settle();
        }
        wait_for("the call of an empty receiveq", || {
            called(&guests[0], RECEIVE)
        });
        drop(guests);
        wait_for("the ports", || {
            daemon.ports().iter().all(|port| port["state"] == "waiting")
        });
    }
    daemon.stop();
}

// ---- other drivers in the same guest ------------------------------------------------------------

/// What a guest's drivers are, one after the other: firmware, kernels, a driver loaded again with
/// other rings.
fn lives() -> Vec<GuestOptions> {
    let sized = |entries, options| GuestOptions { entries, ..options };
    vec![
        // SeaBIOS, iPXE; then a kernel.
        sized(16, legacy()),
        packed(),
        sized(64, split()),
        sized(100, packed()),
        sized(100, packed()),
        // Loaded again with other features, and with other rings.
        GuestOptions {
            in_order: true,
            mergeable: false,
            ..packed()
        },
        sized(24, packed()),
        split(),
        GuestOptions {
            event_idx: false,
            calls: true,
            ..sized(32, legacy_mergeable())
        },
        packed(),
    ]
}

#[test]
fn a_guest_comes_back_with_another_driver_and_nothing_of_the_last_one() {
    let daemon = daemon(4);
    let bystanders = Bystanders::start([&daemon.sockets()[0], &daemon.sockets()[1]]);
    let largest = GuestOptions {
        receive_len: 2048,
        ..split()
    };
    let rams = [(); 2].map(|()| Ram::new(largest));
    let mut guests = attach(&daemon, &rams, 2);
    let mut correspondent = guests.pop().unwrap();
    let mut guest = guests.pop().unwrap();
    for round in 0..if long() { 20 } else { 2 } {
        for (life, options) in lives().into_iter().enumerate() {
            let options = GuestOptions {
                receive_len: 2048,
                ..options
            };
            // In the middle of traffic to it and from it, some of which is lost with its rings, and
            // some of which comes late: from other addresses, so that nobody takes it for what
            // follows.
            for number in 0..8 {
                correspondent.try_send(&frame(mac(3), mac(5), number, 100));
                guest.try_send(&frame(mac(4), mac(6), number, 100));
            }
            if (round + life) % 3 == 2 {
                // Over another connection, once the switch has let go of the last one: until then
                // it may finish a frame in what is the new driver's memory.
                guest.detach();
                wait_for("the end of the session", || {
                    daemon.port("p2")["session"].is_null()
                });
                daemon.settle();
                guest = Guest::with(&rams[0], options);
                guest.attach(&daemon.sockets()[2]);
            } else {
                guest.reboot(options);
            }
            daemon.settle();
            // What the last life left on its way is not for this one.
            while correspondent.try_receive().is_some() {}
            let flows = [(0, 1), (1, 0)];
            let window = 4.min(u64::from(options.entries));
            let mut exchange = Exchange::new(vec![guest, correspondent], 3, &flows, window, 300);
            exchange.meet();
            exchange.exchange(300);
            exchange.drain();
            let mut guests = exchange.guests;
            correspondent = guests.pop().unwrap();
            guest = guests.pop().unwrap();
            bystanders.go_on(20);
        }
    }
    bystanders.finish();
    drop((guest, correspondent));
    daemon.stop();
}

// ---- records of packed rings --------------------------------------------------------------------

#[test]
fn the_records_of_a_port_go_with_it_unless_a_guest_is_there_to_go_on() {
    let daemon = daemon(2);
    let rams = [packed(), split()].map(Ram::new);
    let mut exchange = Exchange::new(attach(&daemon, &rams, 0), 1, &[(0, 1), (1, 0)], 16, 200);
    exchange.meet();
    exchange.exchange(900);
    exchange.drain();
    let spec = format!("p0,socket={}", daemon.sockets()[0].display());
    let remove = || assert_eq!(daemon.try_pollux(&["port", "remove", "p0"]).0, 0);
    let add = || assert_eq!(daemon.try_pollux(&["port", "add", &spec]).0, 0);
    // Its guest's rings go on, should the port come back.
    remove();
    assert_eq!(daemon.records(), ["p0.0", "p0.1"]);
    add();
    exchange.guests[0].detach();
    exchange.guests[0].attach(&daemon.sockets()[0]);
    daemon.settle();
    exchange.forgive_silence();
    exchange.exchange(900);
    exchange.drain();
    // Its frontend is gone, and nobody will.
    exchange.guests[0].detach();
    wait_for("the end of the session", || {
        daemon.port("p0")["session"].is_null()
    });
    assert_eq!(daemon.records(), ["p0.0", "p0.1"]);
    remove();
    assert_eq!(daemon.records(), [""; 0]);
    drop(exchange);
    daemon.stop();
}
