//! Poll threads without work: what each does by its own policy, and how fast the first frame after
//! a sleep is.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, Ram};
use common::traffic::{frame, mac};
use common::wait_for;
use pollux::api::client::{Client, ClientError};
use serde_json::json;

/// The first frame after a sleep may take so long, of CPU and wake-up time.
const FIRST_FRAME: Duration = Duration::from_micros(200);

fn daemon(args: &[&str]) -> Daemon {
    Daemon::start(&DaemonOptions {
        ports: 2,
        args: args.iter().map(|arg| arg.to_string()).collect(),
        ..DaemonOptions::default()
    })
}

fn do_it(daemon: &Daemon, args: &[&str]) -> String {
    let (code, said) = daemon.try_pollux(args);
    assert_eq!(code, 0, "{args:?}: {said}");
    said
}

/// One figure of each poll thread.
fn of_threads(daemon: &Daemon, key: &str) -> Vec<String> {
    let threads = daemon.poll_threads();
    let threads = threads.as_array().unwrap().iter();
    threads
        .map(|thread| thread[key].as_str().unwrap().to_string())
        .collect()
}

fn wait_until(daemon: &Daemon, states: &[&str]) {
    wait_for(&format!("{states:?}"), || {
        of_threads(daemon, "state") == states
    });
}

fn passes(daemon: &Daemon, thread: usize) -> u64 {
    daemon.poll_threads()[thread]["passes"].as_u64().unwrap()
}

/// A thread polls, without any work.
fn assert_polls(daemon: &Daemon, thread: usize) {
    let before = passes(daemon, thread);
    wait_for("passes without work", || {
        passes(daemon, thread) > before + 1000
    });
}

#[test]
fn each_thread_has_a_policy_of_its_own_that_changes_at_run_time() {
    let daemon = daemon(&["--idle", "adaptive:20"]);
    do_it(&daemon, &["poll", "add", "--idle", "busy"]);
    do_it(&daemon, &["poll", "add"]);
    assert_eq!(
        of_threads(&daemon, "idle"),
        ["adaptive:20", "busy", "adaptive:20"]
    );
    wait_until(&daemon, &["asleep", "busy", "asleep"]);
    assert_polls(&daemon, 1);
    // One that sleeps, and one that polls, told something else.
    for (thread, idle) in [("2", "busy"), ("1", "adaptive:0")] {
        let setting = format!("idle={idle}");
        let said = do_it(&daemon, &["poll", "set", &setting, "--thread", thread]);
        assert_eq!(said, format!("rebalance=off {setting} thread={thread}\n"));
    }
    wait_until(&daemon, &["asleep", "asleep", "busy"]);
    assert_polls(&daemon, 2);
    let said = do_it(&daemon, &["poll", "set", "idle=adaptive"]);
    assert_eq!(said, "rebalance=off idle=adaptive:50\n");
    wait_until(&daemon, &["asleep"; 3]);
    assert_eq!(of_threads(&daemon, "idle"), ["adaptive:50"; 3]);
    daemon.stop();
}

#[test]
fn settings_that_make_no_sense_change_nothing() {
    let daemon = daemon(&["--idle", "adaptive:20"]);
    for (args, expected, said) in [
        ("idle=busy --thread 7", 4, "no such poll thread 7"),
        ("rebalance=auto --thread 0", 2, "--thread is for idle="),
        ("--thread 0", 2, "idle=POLICY, which is missing"),
        ("idle=busy idle=busy", 2, "once"),
    ] {
        let words: Vec<&str> = ["poll", "set"].into_iter().chain(args.split(' ')).collect();
        let (code, text) = daemon.try_pollux(&words);
        assert_eq!(code, expected, "{args}: {text}");
        assert!(text.contains(said), "{args}: {text}");
    }
    let client = Client::new(daemon.dir().join("api.sock"));
    for (patch, expected, said) in [
        (json!({"thread": 0}), 400, "without idle"),
        (
            json!({"thread": 0, "rebalance": "auto"}),
            400,
            "without idle",
        ),
        (
            json!({"thread": 7, "rebalance": "auto"}),
            400,
            "without idle",
        ),
        (
            json!({"thread": 7, "idle": "busy", "rebalance": "auto"}),
            404,
            "no such poll thread 7",
        ),
    ] {
        match client.patch("/v1/poll", &patch) {
            Err(ClientError::Refused { status, error }) => {
                assert_eq!(status, expected, "{patch}: {error:?}");
                assert!(error.message.contains(said), "{patch}: {error:?}");
            }
            other => panic!("{patch}: {other:?}"),
        }
    }
    let said = do_it(&daemon, &["poll", "set"]);
    assert_eq!(said, "rebalance=off idle=adaptive:20\n");
    assert_eq!(of_threads(&daemon, "idle"), ["adaptive:20"]);
    daemon.stop();
}

#[test]
fn threads_start_with_the_policies_of_the_command_line() {
    let (first, second) = common::cpus();
    let cpus = format!("{first},{second}");
    let daemon = daemon(&["--poll-cpus", &cpus, "--idle", "adaptive:20,busy"]);
    assert_eq!(of_threads(&daemon, "idle"), ["adaptive:20", "busy"]);
    // Those are for the threads of the command line. One that is added has the default, or what it
    // is told.
    do_it(&daemon, &["poll", "add"]);
    do_it(&daemon, &["poll", "add", "--idle", "adaptive:30"]);
    assert_eq!(
        of_threads(&daemon, "idle"),
        ["adaptive:20", "busy", "adaptive:50", "adaptive:30"]
    );
    let said = do_it(&daemon, &["poll", "set"]);
    assert_eq!(said, "rebalance=off idle=adaptive:50\n");
    wait_until(&daemon, &["asleep", "busy", "asleep", "asleep"]);
    daemon.stop();
}

/// How long the thread was ready to run, and had no CPU.
fn waited(task: &str) -> Duration {
    let text = fs::read_to_string(format!("{task}/schedstat")).unwrap();
    Duration::from_nanos(text.split(' ').nth(1).unwrap().parse().unwrap())
}

#[test]
fn the_first_frame_after_a_second_of_sleep_is_there_within_200_microseconds() {
    let daemon = daemon(&[]);
    let rams = [(); 2].map(|()| Ram::new(GuestOptions::default()));
    let mut guests = common::traffic::attach(&daemon, &rams, 0);
    let (other, guest) = (guests.pop().unwrap(), guests.pop().unwrap());
    let (mut other, mut guest): (Guest<'_>, Guest<'_>) = (other, guest);
    let tid = daemon.poll_threads()[0]["tid"].as_u64().unwrap();
    let task = format!("/proc/{}/task/{tid}", daemon.pid());
    let mut best = Duration::MAX;
    for number in 0..5 {
        wait_until(&daemon, &["asleep"]);
        sleep(Duration::from_secs(1));
        let before = waited(&task);
        let start = Instant::now();
        guest.send(&frame(mac(2), mac(1), number, 100));
        while other.try_receive().is_none() {
            assert!(start.elapsed() < Duration::from_secs(10), "no frame came");
            std::hint::spin_loop();
        }
        let taken = start.elapsed();
        // What other programs had of the CPU is not the switch's. Nor is it this test's, whose
        // thread may lose its own: the least of five tells.
        best = best.min(taken.saturating_sub(waited(&task) - before));
    }
    assert!(best < FIRST_FRAME, "{best:?}");
    daemon.stop();
}
