//! What a switch does with frames, seen by guests on the ports of a running daemon.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::time::Duration;

use common::daemon::{Daemon, DaemonOptions};
use common::events::Events;
use common::guest::{Guest, GuestOptions, Ram};
use common::traffic::{BROADCAST, Exchange, Mac, frame, mac, read};
use common::wait_for;
use pollux::bench::frontend::Order;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);

fn daemon(ports: usize) -> Daemon {
    Daemon::start(&DaemonOptions {
        ports,
        ..DaemonOptions::default()
    })
}

fn rams<const N: usize>(options: GuestOptions) -> [Ram; N] {
    [(); N].map(|()| Ram::new(options))
}

/// A guest on each port.
fn attach<'m>(daemon: &Daemon, rams: &'m [Ram]) -> Vec<Guest<'m>> {
    let attached = rams.iter().zip(daemon.sockets()).map(|(ram, socket)| {
        let mut guest = Guest::new(ram);
        guest.attach(socket);
        guest
    });
    let guests = attached.collect();
    daemon.settle();
    guests
}

/// The number of the next frame that a guest receives. Frames of one sender come in order, so this
/// also says that none came before it.
fn next(guest: &mut Guest<'_>) -> Option<u64> {
    guest.receive(LIMIT).map(|bytes| read(&bytes).sequence)
}

fn send(guest: &mut Guest<'_>, to: Mac, from: Mac, sequence: u64) {
    guest.send(&frame(to, from, sequence, 64));
}

/// `(address, port)` of each entry of the forwarding table.
fn fdb(daemon: &Daemon) -> Vec<(String, String)> {
    let output = daemon.pollux(&["fdb", "list", "--json"]);
    let entries: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let text = |entry: &Value, key: &str| entry[key].as_str().unwrap().to_string();
    entries
        .iter()
        .map(|entry| (text(entry, "mac"), text(entry, "port")))
        .collect()
}

fn name(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[test]
fn unknown_addresses_are_flooded_and_learned_ones_are_not() {
    let daemon = daemon(3);
    let rams = rams::<3>(GuestOptions::default());
    let mut guests = attach(&daemon, &rams);
    // 1 is unknown: everybody but the sender.
    send(&mut guests[0], mac(2), mac(1), 1);
    assert_eq!(next(&mut guests[1]), Some(1));
    assert_eq!(next(&mut guests[2]), Some(1));
    // 1 is known since its frame: nobody else.
    send(&mut guests[1], mac(1), mac(2), 2);
    assert_eq!(next(&mut guests[0]), Some(2));
    // So is 2 now. The broadcast behind it is what the third one receives first.
    send(&mut guests[0], mac(2), mac(1), 3);
    send(&mut guests[0], BROADCAST, mac(1), 4);
    assert_eq!(next(&mut guests[1]), Some(3));
    assert_eq!(next(&mut guests[1]), Some(4));
    assert_eq!(next(&mut guests[2]), Some(4));
    // Neither broadcasts nor floods came back to their sender: this is what it receives next.
    send(&mut guests[2], mac(1), mac(3), 5);
    assert_eq!(next(&mut guests[0]), Some(5));
    let mut found = fdb(&daemon);
    found.sort();
    let known = [(1, "p0"), (2, "p1"), (3, "p2")].map(|(n, port)| (name(mac(n)), port.to_string()));
    assert_eq!(found, known);
    let lost: Vec<_> = (0..3)
        .flat_map(|n| daemon.drops(&format!("p{n}")))
        .filter(|(_, count)| *count != 0)
        .collect();
    assert_eq!(lost, []);
    drop(guests);
    daemon.stop();
}

#[test]
fn a_frame_to_an_address_on_its_own_port_goes_nowhere() {
    let daemon = daemon(2);
    let rams = rams::<2>(GuestOptions::default());
    let mut guests = attach(&daemon, &rams);
    send(&mut guests[0], BROADCAST, mac(1), 1);
    send(&mut guests[0], BROADCAST, mac(7), 2);
    assert_eq!(next(&mut guests[1]), Some(1));
    assert_eq!(next(&mut guests[1]), Some(2));
    // 7 is on the same port.
    send(&mut guests[0], mac(7), mac(1), 3);
    send(&mut guests[0], BROADCAST, mac(1), 4);
    assert_eq!(next(&mut guests[1]), Some(4));
    send(&mut guests[1], mac(1), mac(2), 5);
    assert_eq!(next(&mut guests[0]), Some(5));
    drop(guests);
    daemon.stop();
}

#[test]
fn a_static_entry_stays_until_another_one_is_to_replace_it() {
    let daemon = daemon(3);
    let rams = rams::<3>(GuestOptions::default());
    let mut guests = attach(&daemon, &rams);
    // A learned one gives way without a word.
    send(&mut guests[2], BROADCAST, mac(9), 1);
    assert_eq!(next(&mut guests[0]), Some(1));
    let address = name(mac(9));
    let add = |port: &str, more: &[&str]| {
        let args = ["fdb", "add", &address, "--port", port];
        daemon.try_pollux(&[&args[..], more].concat())
    };
    assert_eq!(add("p0", &[]), (0, String::new()));
    for port in ["p0", "p1"] {
        let (code, said) = add(port, &[]);
        assert_eq!(code, 5, "{said}");
        let words = format!("{address} has a static entry already, on port \"p0\"; --replace");
        assert!(said.contains(&words), "{said}");
    }
    assert_eq!(fdb(&daemon), [(address.clone(), "p0".to_string())]);
    assert_eq!(add("p1", &["--replace"]), (0, String::new()));
    assert_eq!(fdb(&daemon), [(address.clone(), "p1".to_string())]);
    // There are no VLANs: neither as an option, nor as a column.
    assert_eq!(add("p1", &["--replace", "--vlan", "5"]).0, 2);
    let table = daemon.try_pollux(&["fdb", "list"]).1;
    assert!(!table.contains("VLAN"), "{table}");
    drop(guests);
    daemon.stop();
}

#[test]
fn group_addresses_are_never_learned_and_link_local_ones_not_forwarded() {
    let daemon = daemon(3);
    let rams = rams::<3>(GuestOptions::default());
    let mut guests = attach(&daemon, &rams);
    let group = [0x53, 0x54, 0, 0, 1, 1];
    send(&mut guests[0], mac(2), group, 1);
    // Spanning tree, LLDP and their kin end at the first bridge (IEEE 802.1D).
    for last in 0..16 {
        send(&mut guests[0], [0x01, 0x80, 0xc2, 0, 0, last], mac(1), 2);
    }
    send(&mut guests[0], BROADCAST, mac(1), 3);
    for guest in &mut guests[1..] {
        assert_eq!(next(guest), Some(3));
    }
    assert_eq!(
        fdb(&daemon)
            .iter()
            .filter(|(mac, _)| *mac == name(group))
            .count(),
        0
    );
    // Multicast above that range is flooded.
    send(&mut guests[0], [0x01, 0x80, 0xc2, 0, 0, 0x10], mac(1), 4);
    assert_eq!(next(&mut guests[2]), Some(4));
    drop(guests);
    daemon.stop();
}

#[test]
fn an_address_that_moves_is_followed() {
    let daemon = daemon(3);
    let rams = rams::<3>(GuestOptions::default());
    let mut guests = attach(&daemon, &rams);
    send(&mut guests[0], BROADCAST, mac(9), 1);
    assert_eq!(next(&mut guests[1]), Some(1));
    assert_eq!(next(&mut guests[2]), Some(1));
    send(&mut guests[2], mac(9), mac(3), 2);
    assert_eq!(next(&mut guests[0]), Some(2));
    // A live migration ends like this: the same address speaks elsewhere.
    send(&mut guests[1], BROADCAST, mac(9), 3);
    assert_eq!(next(&mut guests[2]), Some(3));
    assert_eq!(next(&mut guests[0]), Some(3));
    send(&mut guests[2], mac(9), mac(3), 4);
    assert_eq!(next(&mut guests[1]), Some(4));
    send(&mut guests[2], BROADCAST, mac(3), 5);
    assert_eq!(next(&mut guests[0]), Some(5));
    assert!(fdb(&daemon).contains(&(name(mac(9)), "p1".to_string())));
    drop(guests);
    daemon.stop();
}

#[test]
fn an_address_that_is_in_use_twice_is_told_of_but_not_without_end() {
    let daemon = daemon(2);
    let rams = rams::<2>(GuestOptions::default());
    let mut guests = attach(&daemon, &rams);
    let events = Events::of(&daemon);
    let mut say = |guest: usize, address: Mac| {
        send(&mut guests[guest], BROADCAST, address, 1);
        assert_eq!(next(&mut guests[1 - guest]), Some(1));
    };
    // Each of these moves to p1, once.
    for n in 20..40 {
        say(0, mac(n));
        say(1, mac(n));
    }
    let twice = mac(9);
    for _ in 0..5 {
        say(0, twice);
        say(1, twice);
    }
    for (port, other) in [("p0", "p1"), ("p1", "p0")] {
        wait_for("the moving address", || {
            let moving = &daemon.port(port)["moving_address"];
            moving["mac"] == name(twice).as_str() && moving["other_port"] == other
        });
        let (_, text) = daemon.try_pollux(&["port", "show", port]);
        let line = format!("moving address    {} to and from {other}, ", name(twice));
        assert!(text.contains(&line), "{text}");
    }
    let moved = |port: &str| daemon.port(port)["statistics"]["moved_addresses"].clone();
    assert_eq!((moved("p0"), moved("p1")), (4.into(), 25.into()));
    assert_eq!(daemon.stats()["fdb"]["counters"]["moved"], 29);
    // Of twenty addresses five are told of now; the others are a number in the next minute.
    let told = events.messages("p1", "mac_moved");
    assert_eq!(told.len(), 5, "{told:?}");
    assert!(
        told.iter()
            .all(|text| text.contains("has moved here from p0"))
    );
    drop(guests);
    daemon.stop();
}

#[test]
fn addresses_of_a_frontend_that_has_gone_are_forgotten() {
    let daemon = daemon(3);
    let rams = rams::<3>(GuestOptions::default());
    let mut guests = attach(&daemon, &rams);
    send(&mut guests[0], BROADCAST, mac(9), 1);
    assert_eq!(next(&mut guests[1]), Some(1));
    assert_eq!(next(&mut guests[2]), Some(1));
    let set = name(mac(8));
    assert_eq!(
        daemon.try_pollux(&["fdb", "add", &set, "--port", "p0"]).0,
        0
    );
    guests[0].detach();
    wait_for("the frontend to be gone", || {
        daemon.state("p0").0 == "waiting"
    });
    daemon.settle();
    // It listens at p1 by now, and has not said a word there.
    send(&mut guests[2], mac(9), mac(3), 2);
    assert_eq!(next(&mut guests[1]), Some(2));
    assert_eq!(daemon.dropped("p0", "tx", "egress_not_ready"), 0);
    // What the operator has set stays, and so does what was learned elsewhere.
    let (set, learned) = ((set, "p0".to_string()), (name(mac(3)), "p2".to_string()));
    assert_eq!(fdb(&daemon), [learned, set]);
    // It comes back after all, and is known with its first frame.
    guests[0].attach(&daemon.sockets()[0]);
    daemon.settle();
    send(&mut guests[0], mac(3), mac(9), 3);
    assert_eq!(next(&mut guests[2]), Some(3));
    send(&mut guests[2], mac(9), mac(3), 4);
    send(&mut guests[2], BROADCAST, mac(3), 5);
    assert_eq!(next(&mut guests[0]), Some(4));
    assert_eq!(next(&mut guests[1]), Some(5));
    drop(guests);
    daemon.stop();
}

/// Frames of several sizes in closed loops both ways, and counters that agree with them.
fn sizes_pass(options: GuestOptions, sizes: &[usize]) {
    let daemon = daemon(2);
    let rams = rams::<2>(options);
    let guests = attach(&daemon, &rams);
    let mut exchange = Exchange::new(guests, 1, &[(0, 1), (1, 0)], 0, 64);
    let (mut frames, mut bytes) = (0, 0);
    for &len in sizes {
        exchange.set(8, len);
        exchange.exchange(400);
        exchange.drain();
        let sent = exchange.flows[0].sent - frames;
        frames += sent;
        bytes += sent * len as u64;
    }
    for (port, from, to) in [("p0", "rx", "tx"), ("p1", "tx", "rx")] {
        let statistics = |direction: &str, what: &str| {
            daemon.port(port)["statistics"][direction][what]
                .as_u64()
                .unwrap()
        };
        wait_for("the counters", || statistics(from, "frames") == frames);
        assert_eq!(statistics(from, "bytes"), bytes, "{port} {from}");
        assert_eq!(
            statistics(to, "frames"),
            exchange.flows[1].sent,
            "{port} {to}"
        );
        let lost: u64 = daemon.drops(port).iter().map(|(_, count)| count).sum();
        assert_eq!(lost, 0, "{port}: {:?}", daemon.drops(port));
    }
    drop(exchange);
    daemon.stop();
}

#[test]
fn every_size_arrives_intact_in_large_buffers() {
    for (mergeable, in_order) in [(false, false), (true, true)] {
        let options = GuestOptions {
            mergeable,
            in_order,
            receive_len: 9216,
            ..GuestOptions::default()
        };
        sizes_pass(options, &[60, 64, 1514, 9000]);
    }
}

#[test]
fn frames_are_spread_over_small_mergeable_buffers() {
    let options = GuestOptions {
        receive_len: 1024,
        event_idx: false,
        ..GuestOptions::default()
    };
    sizes_pass(options, &[60, 1011, 1012, 1013, 1514, 9000]);
}

#[test]
fn every_size_arrives_intact_over_packed_rings() {
    for mergeable in [false, true] {
        let options = GuestOptions {
            packed: true,
            mergeable,
            order: Order::CloudHypervisor,
            receive_len: if mergeable { 2048 } else { 9216 },
            ..GuestOptions::default()
        };
        sizes_pass(options, &[60, 64, 1514, 9000]);
    }
}

#[test]
fn a_frame_without_room_is_counted_and_the_next_one_passes() {
    let daemon = daemon(2);
    let options = GuestOptions {
        mergeable: false,
        receive_len: 1024,
        ..GuestOptions::default()
    };
    let rams = rams::<2>(options);
    let mut guests = attach(&daemon, &rams);
    guests[0].send(&frame(mac(2), mac(1), 1, 1514));
    send(&mut guests[0], mac(2), mac(1), 2);
    assert_eq!(next(&mut guests[1]), Some(2));
    let lost: u64 = daemon.drops("p1").iter().map(|(_, count)| count).sum();
    assert_eq!(lost, 1, "{:?}", daemon.drops("p1"));
    drop(guests);
    daemon.stop();
}
