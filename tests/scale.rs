//! Many ports: 512 of them in one daemon, with a guest at each.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, DaemonOptions};
use common::holdings::Holdings;
use common::many::{ManyQueues, ManyRam};
use common::traffic::{BROADCAST, Bystanders, frame, read};
use common::wait_for_within;
use pollux::api::client::Client;
use serde_json::json;

const PORTS: usize = 512;
/// With the tests' optimisation, and other tests beside it.
const LIMIT: Duration = Duration::from_secs(120);
/// Who sends to all of them.
const ASKER: [u8; 6] = [2, 0, 0, 0, 7, 7];
/// The first bytes of everybody else's address.
const ANSWERER: [u8; 4] = [2, 0, 0, 1];
/// What a port with a guest may take, beyond the guest's memory.
const PORT_KIB: u64 = 256;
/// Changes of which the median is taken, and how often that is tried: tests share their CPUs.
const CHANGES: usize = 51;
const ATTEMPTS: usize = 5;

fn attach<'m>(rams: &'m [ManyRam], daemon: &Daemon, from: usize) -> Vec<ManyQueues<'m>> {
    let sockets = daemon.sockets()[from..].iter();
    let guests: Vec<_> = rams
        .iter()
        .zip(sockets)
        .map(|(ram, socket)| ManyQueues::attach(ram, socket))
        .collect();
    wait_for_within(LIMIT, "the ports to run", || {
        let ports = daemon.ports();
        let running = ports.iter().filter(|port| port["state"] == "running");
        running.count() == guests.len()
    });
    daemon.settle();
    guests
}

/// Time from the request for another port to the answer; the port goes again.
fn add(client: &Client, dir: &Path) -> Duration {
    let spec = json!({"name": "new", "socket": dir.join("new")});
    let began = Instant::now();
    client.post("/v1/ports", &spec).unwrap();
    let took = began.elapsed();
    client.delete("/v1/ports/new").unwrap();
    took
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Medians of adding a port to either daemon, in turn.
fn medians(daemons: [&Daemon; 2]) -> [Duration; 2] {
    let clients = daemons.map(|daemon| Client::new(daemon.dir().join("api.sock")));
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..CHANGES {
        for ((client, daemon), times) in clients.iter().zip(daemons).zip(&mut times) {
            times.push(add(client, daemon.dir()));
        }
    }
    times.map(median)
}

/// Resident KiB of a daemon that are not its guests' memory.
fn own_kib(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let kib = |name: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    kib("VmRSS:") - kib("RssShmem:")
}

#[test]
fn the_513th_port_takes_no_longer_than_twice_the_second_and_all_of_them_work() {
    let with = |ports| DaemonOptions {
        ports,
        ..DaemonOptions::default()
    };
    let (few, many) = (Daemon::start(&with(1)), Daemon::start(&with(PORTS)));
    // The first two ports are for guests that do something.
    let rams: Vec<ManyRam> = (0..PORTS - 2).map(|_| ManyRam::new(1)).collect();
    let (own, others) = rams.split_first().unwrap();
    let empty = Holdings::of(&many);
    let alone = attach(std::slice::from_ref(own), &few, 0);
    let mut idle = attach(others, &many, 3);
    // At the least a connection and a mapping of memory each.
    let full = Holdings::of(&many);
    assert!(full.fds >= empty.fds + idle.len(), "{empty:?} {full:?}");
    assert!(full.mappings >= idle.len(), "{full:?}");
    let each = (own_kib(&many) - own_kib(&few)) / PORTS as u64;
    assert!(each < PORT_KIB, "a port takes {each} KiB");

    let mut tried = Vec::new();
    let fast = (0..ATTEMPTS).any(|_| {
        let [second, last] = medians([&few, &many]);
        tried.push((second, last));
        last <= 2 * second
    });
    println!("the second port, and the 513th: {tried:?}");
    assert!(fast, "{tried:?}");

    // Frames pass as ever, also to the last port, while others come and go.
    let bystanders = Bystanders::start([&many.sockets()[0], &many.sockets()[1]]);
    let client = Client::new(many.dir().join("api.sock"));
    for _ in 0..10 {
        add(&client, many.dir());
    }
    let hello = frame(BROADCAST, ASKER, 0, 60);
    assert!(idle[0].try_send(0, &hello));
    // Each answers the one that has asked, which receives every answer once.
    let (asker, answerers) = idle.split_first_mut().unwrap();
    let mut answers = HashSet::new();
    for (n, guest) in answerers.iter_mut().enumerate() {
        wait_for_within(LIMIT, "a broadcast at every port", || {
            let frame = guest.try_receive(0);
            frame.is_some_and(|frame| frame == hello)
        });
        let [high, low] = (n as u16).to_be_bytes();
        let own = [&ANSWERER[..], &[high, low]].concat().try_into().unwrap();
        let answer = frame(ASKER, own, n as u64, 60);
        assert!(guest.try_send(0, &answer), "guest {n}");
        wait_for_within(LIMIT, "an answer of every port", || {
            // Bystanders may be flooded.
            let came = asker.try_receive(0);
            came.filter(|came| came[6..10] == ANSWERER)
                .is_some_and(|came| {
                    assert_eq!(came, answer);
                    answers.insert(read(&came).sequence)
                })
        });
        assert_ne!(guest.try_receive(0).as_ref(), Some(&hello), "guest {n}");
    }
    assert_eq!(answers.len(), answerers.len());
    wait_for_within(LIMIT, "every buffer to come back", || {
        idle.iter_mut().all(|guest| guest.in_flight(0) == 0)
    });
    bystanders.go_on(100);
    bystanders.finish();
    drop((alone, idle));
    few.stop();
    // What the guests had is given back.
    wait_for_within(LIMIT, "the ports to be free", || {
        let ports = many.ports();
        ports.iter().all(|port| port["state"] == "waiting")
    });
    empty.wait_for_return(&many);
    many.stop();
}
