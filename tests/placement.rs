//! Poll threads that come and go, and queues that change hands, under guests that check every
//! frame.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use common::daemon::{Daemon, DaemonOptions};
use common::events::Events;
use common::{cpus, long, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Seconds of a load that is ended by [`end`]: what is done meanwhile takes as long as the machine
/// lets it.
const UNTIL_ENDED: u64 = 600;

/// A load on all ports of a daemon, for so many seconds.
fn load(sockets: &[PathBuf], args: &[&str], seconds: u64) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pollux"));
    command.args(["bench", "--json", "--seconds", &seconds.to_string()]);
    for socket in sockets {
        command.arg("--attach").arg(socket);
    }
    command.args(args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits for the end of a load, and for its verdict: nothing lost, changed, doubled or out of
/// order.
fn assert_whole(load: Child) -> Value {
    let output = load.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let words = String::from_utf8_lossy(&output.stderr);
    let report: Value =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}{words}"));
    for count in [
        "lost",
        "corrupt",
        "duplicated",
        "out_of_order",
        "unaccounted",
    ] {
        assert_eq!(report[count], 0, "{count}: {report}");
    }
    assert!(report["received"].as_u64().unwrap() > 1000, "{report}");
    report
}

/// Ends a load, which is judged like one that came to its end.
fn end(load: Child) -> Value {
    kill_process(Pid::from_child(&load), Signal::INT).unwrap();
    assert_whole(load)
}

fn do_it(daemon: &Daemon, args: &[&str]) -> String {
    let (code, said) = daemon.try_pollux(args);
    assert_eq!(code, 0, "{args:?}: {said}");
    said
}

/// Numbers of the poll threads that there are.
fn threads(daemon: &Daemon) -> Vec<u64> {
    let threads = daemon.poll_threads();
    let threads = threads.as_array().unwrap().iter();
    threads
        .map(|thread| thread["thread"].as_u64().unwrap())
        .collect()
}

/// The queues of a poll thread, as `port:pair`.
fn queues(daemon: &Daemon, number: u64) -> Vec<String> {
    let threads = daemon.poll_threads();
    let mut threads = threads.as_array().unwrap().iter();
    let thread = threads.find(|thread| thread["thread"] == number).unwrap();
    let queues = thread["queues"].as_array().unwrap().iter();
    let mut names: Vec<String> = queues
        .map(|queue| format!("{}:{}", queue["port"].as_str().unwrap(), queue["queue"]))
        .collect();
    names.sort();
    names
}

/// A daemon with two poll threads. They share a processor with each other: the load has the other
/// one.
fn two_threads(ports: usize, queues: u16, more: &[&str]) -> Daemon {
    let daemon = Daemon::start(&DaemonOptions {
        ports,
        queues,
        args: more.iter().map(|arg| arg.to_string()).collect(),
        ..DaemonOptions::default()
    });
    do_it(&daemon, &["poll", "add"]);
    assert_eq!(threads(&daemon), [0, 1]);
    daemon
}

fn wait_for_load(daemon: &Daemon) {
    wait_for("the load", || {
        let ports = daemon.stats()["ports"].clone();
        let mut ports = ports.as_array().unwrap().iter();
        ports.all(|port| port["statistics"]["rx"]["frames"].as_u64().unwrap() > 100)
    });
}

#[test]
fn queues_change_hands_under_load_without_loss_or_reordering() {
    let daemon = two_threads(2, 1, &[]);
    let events = Events::of(&daemon);
    let load = load(daemon.sockets(), &[], UNTIL_ENDED);
    wait_for_load(&daemon);
    let mut moves = 0;
    for turn in 0..if long() { 1000 } else { 60 } {
        let to = (turn % 2).to_string();
        let said = do_it(&daemon, &["poll", "move", "p0", &to]);
        moves += u64::from(said == "1 queue moved\n");
        let number = turn % 2;
        assert!(
            queues(&daemon, number).contains(&"p0:0".to_string()),
            "{said}"
        );
        assert!(!queues(&daemon, 1 - number).contains(&"p0:0".to_string()));
    }
    assert!(moves >= 59, "{moves}");
    // With both on one thread, and each on its own.
    do_it(&daemon, &["poll", "move", "p1:0", "0"]);
    end(load);
    events.wait("p0", "queue_moved");
    daemon.stop();
}

#[test]
fn poll_threads_come_and_go_under_load() {
    let daemon = two_threads(4, 2, &[]);
    let args = ["--guests", "4", "--queues", "2"];
    let load = load(daemon.sockets(), &args, UNTIL_ENDED);
    wait_for_load(&daemon);
    for _ in 0..10 {
        do_it(&daemon, &["poll", "remove", "1"]);
        assert_eq!(threads(&daemon), [0]);
        assert_eq!(queues(&daemon, 0).len(), 8);
        do_it(&daemon, &["poll", "add"]);
        assert_eq!(threads(&daemon), [0, 1]);
        do_it(&daemon, &["poll", "move", "p2", "1"]);
        do_it(&daemon, &["poll", "move", "p3:1", "1"]);
        assert_eq!(queues(&daemon, 1), ["p2:0", "p2:1", "p3:1"]);
        do_it(&daemon, &["poll", "remove", "0"]);
        assert_eq!(threads(&daemon), [1]);
        do_it(&daemon, &["poll", "add"]);
        assert_eq!(threads(&daemon), [0, 1]);
    }
    end(load);
    daemon.stop();
}

#[test]
fn flows_of_several_queues_arrive_whole_and_in_order() {
    for ring in ["split", "packed"] {
        let daemon = two_threads(4, 4, &[]);
        let args = [
            "--guests",
            "4",
            "--queues",
            "4",
            "--pattern",
            "all",
            "--ring",
            ring,
        ];
        let load = load(daemon.sockets(), &args, UNTIL_ENDED);
        wait_for_load(&daemon);
        let ring_positions = |port: &str| -> Vec<u64> {
            let rings = daemon.port(port)["session"]["rings"].clone();
            let rings = rings.as_array().unwrap().iter();
            let receive = rings.filter(|ring| ring["direction"] == "tx");
            receive
                .map(|ring| ring["position"].as_u64().unwrap())
                .collect()
        };
        // Twelve flows for each port, by addresses of their own: none of four queues is left out by
        // chance for long.
        wait_for("all receive queues", || {
            let used = ring_positions("p0");
            used.len() == 4 && used.iter().filter(|position| **position > 100).count() >= 3
        });
        end(load);
        daemon.stop();
    }
}

#[test]
fn a_loaded_thread_gives_a_queue_away_by_itself() {
    let daemon = two_threads(4, 1, &["--rebalance", "auto"]);
    for port in ["p0", "p1", "p2", "p3"] {
        do_it(&daemon, &["poll", "move", port, "0"]);
    }
    let events = Events::of(&daemon);
    // Long frames: they cost a switch much and a client little, so the thread is busy even where
    // others want its CPU.
    let args = [
        "--guests",
        "4",
        "--size",
        "9000",
        "--ring-size",
        "1024",
        "--mergeable",
        "on",
    ];
    let load = load(daemon.sockets(), &args, UNTIL_ENDED);
    wait_for("a queue to move", || !queues(&daemon, 1).is_empty());
    wait_for("the reason", || {
        let of_ports = (0..4).flat_map(|port| events.of_port(&format!("p{port}")));
        let mut reasons = of_ports.filter(|(kind, _)| kind == "queue_moved");
        reasons.any(|(_, message)| message.contains("% busy"))
    });
    end(load);
    assert_eq!(
        do_it(&daemon, &["poll", "set"]),
        "rebalance=auto idle=adaptive:50\n"
    );
    assert_eq!(
        do_it(
            &daemon,
            &["poll", "set", "rebalance=off", "idle=adaptive:20"]
        ),
        "rebalance=off idle=adaptive:20\n"
    );
    daemon.stop();
}

#[test]
fn a_pinned_port_stays_where_it_is_pinned() {
    let daemon = two_threads(1, 1, &[]);
    let spec = |name: &str, poll: &str| {
        let socket = daemon.dir().join(name);
        format!("{name},socket={},poll={poll}", socket.display())
    };
    do_it(&daemon, &["port", "add", &spec("pinned", "1")]);
    let (code, said) = daemon.try_pollux(&["poll", "move", "pinned", "0"]);
    assert_eq!(code, 5, "{said}");
    assert!(said.contains("pinned to poll threads 1"), "{said}");
    let (code, said) = daemon.try_pollux(&["poll", "remove", "1"]);
    assert_eq!(code, 5, "{said}");
    assert!(
        said.contains("\"pinned\" is pinned to poll thread 1 alone"),
        "{said}"
    );
    let (code, said) = daemon.try_pollux(&["port", "add", &spec("nowhere", "7")]);
    assert_eq!(code, 4, "{said}");
    assert!(said.contains("poll thread 7"), "{said}");
    // With two it goes to the other one.
    do_it(&daemon, &["port", "remove", "pinned"]);
    do_it(&daemon, &["port", "add", &spec("pinned", "0+1")]);
    do_it(&daemon, &["poll", "remove", "0"]);
    daemon.stop();
}

#[test]
fn what_cannot_be_is_refused_in_words() {
    let (poll, _) = cpus();
    let pinned = vec!["--poll-cpus".to_string(), poll.to_string()];
    let daemon = Daemon::start(&DaemonOptions {
        ports: 1,
        args: pinned,
        ..DaemonOptions::default()
    });
    let cpu = poll.to_string();
    for (args, code, words) in [
        (
            vec!["poll", "add", "--cpu", "4000"],
            2,
            "CPU 4000 does not exist",
        ),
        (
            vec!["poll", "add", "--cpu", &cpu],
            5,
            "has a poll thread already, number 0",
        ),
        (vec!["poll", "remove", "0"], 5, "the last one"),
        (vec!["poll", "remove", "3"], 4, "no such poll thread 3"),
        (vec!["poll", "move", "p0", "3"], 4, "no such poll thread 3"),
        (vec!["poll", "move", "p9", "0"], 4, "no such port \"p9\""),
        (vec!["poll", "move", "p0:5", "0"], 2, "queue pairs 0 to 0"),
    ] {
        let (status, said) = daemon.try_pollux(&args);
        assert_eq!(status, code, "{args:?}: {said}");
        assert!(said.contains(words), "{args:?}: {said}");
    }
    // All there can be, and one more.
    for _ in 1..32 {
        do_it(&daemon, &["poll", "add"]);
    }
    let (code, said) = daemon.try_pollux(&["poll", "add"]);
    assert_eq!(code, 5, "{said}");
    assert!(said.contains("32 poll threads are the most"), "{said}");
    daemon.stop();
}

#[test]
fn a_port_that_goes_away_takes_its_moves_with_it() {
    let daemon = two_threads(2, 1, &[]);
    let mut load = load(daemon.sockets(), &[], UNTIL_ENDED);
    wait_for_load(&daemon);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Moved, gone or no such port: each is an answer, none is a wait.
            for turn in 0..40 {
                let to = (turn % 2).to_string();
                let (code, said) = daemon.try_pollux(&["poll", "move", "p0", &to]);
                assert!([0, 4, 5].contains(&code), "{code}: {said}");
            }
        });
        wait_for("a few moves", || {
            daemon.log().matches("to poll-").count() > 3
        });
        do_it(&daemon, &["port", "remove", "p0"]);
    });
    // One of its guests has lost its switch: it has nothing to say.
    load.kill().unwrap();
    load.wait().unwrap();
    assert_eq!(threads(&daemon), [0, 1]);
    do_it(&daemon, &["poll", "remove", "1"]);
    daemon.stop();
}

#[test]
fn guests_come_back_with_other_numbers_of_queues_and_other_rings() {
    let daemon = two_threads(2, 4, &[]);
    for (number, ring, size) in [
        (4, "packed", "320"),
        (1, "split", "64"),
        (2, "packed", "100"),
        (4, "split", "1024"),
        (1, "packed", "256"),
    ] {
        let count = number.to_string();
        let args = ["--queues", &count, "--ring", ring, "--ring-size", size];
        let load = load(daemon.sockets(), &args, 1);
        wait_for("the queues", || {
            queues(&daemon, 0).len() + queues(&daemon, 1).len() == 2 * number
        });
        assert_whole(load);
        wait_for("the ports", || {
            daemon.ports().iter().all(|port| port["state"] == "waiting")
        });
        assert_eq!(queues(&daemon, 0).len() + queues(&daemon, 1).len(), 0);
    }
    daemon.stop();
}
