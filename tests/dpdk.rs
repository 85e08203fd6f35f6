//! DPDK's virtio-user driver, an independent implementation of the frontend, through Pollux.
//!
//! *Closed loop*: testpmd sends a fixed number of frames on each of its two ports and sends back
//! whatever arrives. The loop holds fewer frames than a ring has buffers, so no ring can fill up
//! and nothing may ever be dropped. After the run testpmd only receives: what was in flight must
//! arrive, in exactly the number that was put in, and over the whole run each port must have
//! received what the other one sent. That shows: none of millions of frames lost and none
//! duplicated (a loss and a duplication that cancel out would go unnoticed), none of another
//! length. It says nothing of contents and order.
//!
//! *Journey*: numbered frames from a pcap file go in at one port, into a pcap file at the other, in
//! both directions at once; the files are compared. That shows: each frame once, unchanged, in
//! order within its flow, at all lengths.
//!
//! What a variant of the driver may change is tried in all combinations by `tests/matrix`.
//!
//! Three seconds for each closed loop, 30 with `POLLUX_LONG=1`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::backend::Backend;
use common::daemon::{Daemon, DaemonOptions};
use common::journey::Journey;
use common::testpmd::{Counters, Testpmd, TestpmdOptions, VirtioUser, counter, mac};
use common::{long, short_tempdir, wait_for};

/// Frames of testpmd's first bursts.
const BURST: u64 = 32;
/// Frames in flight in each direction: half of what a ring holds, so that none can run full, even
/// while the driver has not yet posted its buffers again.
const WINDOW: u64 = 512;

/// Each test uses both cores.
fn exclusive() -> MutexGuard<'static, ()> {
    static EXCLUSIVE: Mutex<()> = Mutex::new(());
    EXCLUSIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run_time() -> Duration {
    Duration::from_secs(if long() { 30 } else { 3 })
}

/// testpmd with two ports of this kind that send to each other.
fn loop_options(port: &VirtioUser, sockets: &[std::path::PathBuf]) -> TestpmdOptions {
    TestpmdOptions {
        vdevs: (0..2).map(|n| port.vdev(n, &sockets[n])).collect(),
        queues: port.queues,
        txd: port.queue_size,
        rxd: port.queue_size,
        args: vec![
            format!("--eth-peer=0,{}", mac(1)),
            format!("--eth-peer=1,{}", mac(0)),
        ],
        ..TestpmdOptions::default()
    }
}

fn received(ports: &[Counters]) -> Vec<u64> {
    ports
        .iter()
        .map(|port| counter(port, "RX-packets"))
        .collect()
}

/// The first frames may come before the other port's rings are running; from one full burst in both
/// directions on, nothing may be lost.
fn warm_up(testpmd: &mut Testpmd) {
    let deadline = Instant::now() + Duration::from_secs(10);
    testpmd.command("set fwd rxonly");
    loop {
        testpmd.command("clear port stats all");
        testpmd.command("start tx_first 1");
        sleep(Duration::from_millis(200));
        testpmd.stop_forwarding();
        let got = received(&testpmd.stats());
        if got == [BURST, BURST] {
            return;
        }
        assert!(Instant::now() < deadline, "no burst passes: {got:?}");
    }
}

/// One closed loop with frames of `size` bytes, `window` of them in flight in each direction.
fn closed_loop(testpmd: &mut Testpmd, size: u64, window: u64, time: Duration) {
    testpmd.command(&format!("set txpkts {size}"));
    warm_up(testpmd);
    testpmd.command("clear port stats all");
    testpmd.command("clear port xstats all");
    testpmd.command("set fwd mac");
    testpmd.command(&format!("start tx_first {}", window / BURST));
    sleep(time);
    let forwarding = testpmd.stop_forwarding();
    let at_stop = testpmd.stats();

    testpmd.command("set fwd rxonly");
    testpmd.command("start");
    sleep(Duration::from_millis(300));
    testpmd.stop_forwarding();
    let at_end = testpmd.stats();
    let by_size = testpmd.xstats();

    for (n, port) in forwarding.iter().enumerate() {
        assert_eq!(counter(port, "RX-dropped"), 0, "testpmd, port {n}");
        assert_eq!(counter(port, "TX-dropped"), 0, "testpmd, port {n}");
    }
    for n in 0..2 {
        let rounds = counter(&at_stop[n], "RX-packets") / window;
        assert!(rounds >= 20, "port {n}: the loop went round {rounds} times");
        let drained = counter(&at_end[n], "RX-packets") - counter(&at_stop[n], "RX-packets");
        assert_eq!(drained, window, "port {n}, {size} bytes: frames in flight");
        assert_eq!(
            counter(&at_end[n], "RX-packets"),
            counter(&at_end[1 - n], "TX-packets"),
            "port {n}, {size} bytes: received here, sent by the other"
        );
        assert_eq!(
            counter(&at_end[n], "RX-bytes"),
            counter(&at_end[n], "RX-packets") * size,
            "port {n}: bytes"
        );
        for error in ["RX-missed", "RX-errors", "RX-nombuf", "TX-errors"] {
            assert_eq!(counter(&at_end[n], error), 0, "port {n}: {error}");
        }
        assert_eq!(
            counter(&by_size[n], &size_class(size)),
            counter(&by_size[n], "rx_q0_good_packets"),
            "port {n}: frames of the class of {size} bytes"
        );
    }
    let total: u64 = received(&at_stop).iter().sum();
    let rate = total as f64 / time.as_secs_f64() / 1e6;
    println!("{size} bytes: {total} frames, {rate:.2} Mpps, none lost");
}

/// The driver's own histogram of lengths.
fn size_class(size: u64) -> String {
    let class = match size {
        64 => "64",
        65..=127 => "65_127",
        128..=255 => "128_255",
        256..=511 => "256_511",
        512..=1023 => "512_1023",
        1024..=1518 => "1024_1518",
        _ => "1519_max",
    };
    format!("rx_q0_size_{class}_packets")
}

/// Closed loops of all sizes through one pair of ports, Pollux listening.
fn closed_loops(port: &VirtioUser, time: Duration) {
    let backend = Backend::listening(2);
    let mut testpmd = Testpmd::start(&loop_options(port, backend.sockets()));
    for size in [64, 300, 1500] {
        let window = WINDOW.min(u64::from(port.queue_size) / 2);
        closed_loop(&mut testpmd, size, window, time);
    }
    backend.assert_no_drops();
    testpmd.quit();
    backend.stop();
}

#[test]
fn a_closed_loop_loses_nothing() {
    let _guard = exclusive();
    closed_loops(&VirtioUser::default(), run_time());
}

#[test]
fn a_closed_loop_with_mergeable_buffers_loses_nothing() {
    let _guard = exclusive();
    let port = VirtioUser {
        mergeable: true,
        ..VirtioUser::default()
    };
    closed_loops(&port, run_time());
}

#[test]
fn a_closed_loop_with_packed_rings_loses_nothing() {
    let _guard = exclusive();
    let port = VirtioUser {
        packed: true,
        ..VirtioUser::default()
    };
    closed_loops(&port, run_time());
}

#[test]
fn a_closed_loop_of_the_in_order_driver_loses_nothing() {
    let _guard = exclusive();
    let port = VirtioUser {
        in_order: true,
        ..VirtioUser::default()
    };
    closed_loops(&port, Duration::from_secs(1));
}

#[test]
fn a_closed_loop_of_the_vectorized_driver_loses_nothing() {
    let _guard = exclusive();
    let port = VirtioUser {
        vectorized: true,
        ..VirtioUser::default()
    };
    closed_loops(&port, Duration::from_secs(1));
}

#[test]
fn a_closed_loop_loses_nothing_where_the_frontend_listens() {
    let _guard = exclusive();
    let dir = short_tempdir();
    let port = VirtioUser {
        server: true,
        ..VirtioUser::default()
    };
    let sockets: Vec<_> = (0..2).map(|n| common::socket_path(dir.path(), n)).collect();
    // It listens on its first socket and opens the second once the first is connected.
    let mut testpmd = Testpmd::spawn(&loop_options(&port, &sockets));
    let backend = Backend::connecting(dir, 2, 1);
    testpmd.wait_ready();
    closed_loop(&mut testpmd, 64, WINDOW, run_time());
    backend.assert_no_drops();
    testpmd.quit();
    backend.stop();
}

/// DPDK's virtio-user as server: the port that comes second after a kill keeps what waited in its
/// ring. What the first one sends while the other is not there has no destination.
#[test]
fn frames_of_virtio_user_as_server_survive_a_kill_of_the_switch() {
    let _guard = exclusive();
    let mut dir = short_tempdir();
    let port = VirtioUser {
        server: true,
        ..VirtioUser::default()
    };
    let sockets = [0, 1].map(|n| common::socket_path(dir.path(), n));
    let second = format!("p1,socket={},mode=client,queues=1", sockets[1].display());
    let mut testpmd = Testpmd::spawn(&loop_options(&port, &sockets));
    for round in 0..4 {
        let mut daemon = Daemon::start_in(
            dir,
            &DaemonOptions {
                ports: 1,
                client: true,
                ..DaemonOptions::default()
            },
        );
        if round > 0 {
            // It has sent what waited in its ring, to nobody.
            wait_for("the first port", || daemon.state("p0").0 == "running");
        }
        assert_eq!(daemon.try_pollux(&["port", "add", &second]).0, 0);
        if round == 0 {
            testpmd.wait_ready();
            testpmd.command("start");
        }
        for name in ["p0", "p1"] {
            wait_for(name, || daemon.state(name).0 == "running");
        }
        if round > 0 {
            let frames = || daemon.port("p1")["statistics"]["rx"]["frames"].as_u64();
            wait_for("what waited at the second port", || frames() > Some(0));
            assert_eq!(daemon.dropped("p1", "rx", "rx_disabled_queue"), 0);
            assert_eq!(daemon.dropped("p0", "rx", "rx_disabled_queue"), 0);
        }
        // A loop of its own for every round: the first port's part of the last one is lost.
        testpmd.command("stop");
        testpmd.command("start tx_first 8");
        let before = daemon.port("p1")["statistics"]["rx"]["frames"]
            .as_u64()
            .unwrap();
        wait_for("the loop", || {
            daemon.port("p1")["statistics"]["rx"]["frames"].as_u64() > Some(before + 10_000)
        });
        daemon.assert_alive();
        dir = daemon.kill();
    }
    testpmd.kill();
}

/// The driver posts a chain of a descriptor for each segment, and one for the header: more than 64,
/// and fewer than its ring has entries.
#[test]
fn frames_of_120_segments_arrive() {
    const LEN: u64 = 64 + 119 * 10;
    let _guard = exclusive();
    for packed in [false, true] {
        let port = VirtioUser {
            mergeable: true,
            packed,
            ..VirtioUser::default()
        };
        let backend = Backend::listening(2);
        let mut options = loop_options(&port, backend.sockets());
        options.forward_mode = "rxonly";
        // Frames of several segments must be asked for.
        options.args.push("--tx-offloads=0x8000".to_string());
        options
            .args
            .push(format!("--txpkts=64{}", ",10".repeat(119)));
        let mut testpmd = Testpmd::start(&options);
        for _ in 0..3 {
            testpmd.command("clear port stats all");
            testpmd.command("start tx_first 1");
            sleep(Duration::from_millis(300));
            testpmd.stop_forwarding();
            let ports = testpmd.stats();
            for n in 0..2 {
                let came = counter(&ports[n], "RX-packets");
                assert_eq!(came, counter(&ports[1 - n], "TX-packets"), "port {n}");
                // A ring has room for eight of these chains.
                assert!((8..=BURST).contains(&came), "port {n}: {came}");
                assert_eq!(counter(&ports[n], "RX-bytes"), came * LEN, "port {n}");
            }
        }
        backend.assert_no_drops();
        testpmd.quit();
        backend.stop();
    }
}

/// Processes that follow each other at the same ports.
fn come_back(port: &VirtioUser) {
    let backend = Backend::listening(2);
    let options = loop_options(port, backend.sockets());
    for (round, clean) in (1..).zip([true, false, true]) {
        let mut testpmd = Testpmd::start(&options);
        closed_loop(&mut testpmd, 64, WINDOW, Duration::from_millis(500));
        testpmd.command("set fwd mac");
        testpmd.command("start tx_first 1");
        if clean {
            testpmd.stop_forwarding();
            testpmd.quit();
        } else {
            testpmd.kill();
        }
        let Backend::Pollux(daemon) = &backend else {
            continue;
        };
        wait_for("the ports", || {
            daemon.ports().iter().all(|port| port["state"] == "waiting")
        });
        // A process that was killed leaves the records of its packed rings for the next one, whose
        // rings are others.
        let records = if clean || !port.packed { 0 } else { 4 };
        assert_eq!(daemon.records().len(), records, "{:?}", daemon.records());
        let start = if port.packed {
            "at 0x80008000"
        } else {
            "at 0x0"
        };
        wait_for("the starts of four rings a round in the log", || {
            daemon.log().matches(" started: ").count() >= 4 * round
        });
        let log = daemon.log();
        let mut starts = log.lines().filter(|line| line.contains(" started: "));
        assert!(starts.all(|line| line.contains(start)), "{log}");
    }
    backend.stop();
}

#[test]
fn a_frontend_comes_back_after_a_clean_end_and_after_a_kill() {
    let _guard = exclusive();
    come_back(&VirtioUser::default());
}

#[test]
fn a_frontend_with_packed_rings_comes_back_after_a_clean_end_and_after_a_kill() {
    let _guard = exclusive();
    let port = VirtioUser {
        packed: true,
        ..VirtioUser::default()
    };
    come_back(&port);
}

/// Numbered frames of all usual lengths through two ports, in both directions at once.
fn journey(port: &VirtioUser, small_buffers: bool) {
    let journey = Journey {
        port: port.clone(),
        sizes: (60..=1514).collect(),
        // With small buffers, no more than one receive ring takes at four buffers each: the driver
        // takes up to 32 buffers out of it in a turn, but sends 32 frames.
        batch: match (small_buffers, long()) {
            (true, _) => 250,
            (false, true) => 400_000,
            (false, false) => 40_000,
        },
        batches: 1,
        txd: 256,
        burst: 32,
        // 128 bytes of each are headroom: a frame of 1514 bytes takes four of them.
        mbuf_size: small_buffers.then_some(512),
        limit: Duration::from_secs(if long() { 120 } else { 30 }),
    };
    journey.run(|_, _| {});
}

#[test]
fn frames_of_all_lengths_arrive_unchanged_and_in_order() {
    let _guard = exclusive();
    journey(&VirtioUser::default(), false);
}

#[test]
fn frames_of_all_lengths_arrive_unchanged_in_mergeable_buffers() {
    let _guard = exclusive();
    let port = VirtioUser {
        mergeable: true,
        ..VirtioUser::default()
    };
    journey(&port, false);
}

#[test]
fn frames_that_span_several_mergeable_buffers_arrive_unchanged() {
    let _guard = exclusive();
    let port = VirtioUser {
        mergeable: true,
        ..VirtioUser::default()
    };
    journey(&port, true);
}
