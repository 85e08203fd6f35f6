//! What one port can cost the others: slow calls, stuck threads, full rings, storms of messages and
//! connections.
//!
//! `POLLUX_LONG=1` runs as many rounds as the acceptance asks for.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::fs;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, RECEIVE, Ram};
use common::holdings::{descriptors, limit_descriptors};
use common::park::Parked;
use common::traffic::{Bystanders, frame, mac, read};
use common::waiters::hang_waiters;
use common::{long, wait_for};
use pollux::virtio::driver::RingLayout;

/// Ports 0 and 1 are the bystanders', 2 the victim's or culprit's, 3 its correspondent's.
const CULPRIT: usize = 2;
const SINK: usize = 3;

fn daemon(args: &[&str]) -> Daemon {
    Daemon::start(&DaemonOptions {
        ports: 4,
        args: args.iter().map(|arg| arg.to_string()).collect(),
        ..DaemonOptions::default()
    })
}

fn bystanders(daemon: &Daemon) -> Bystanders {
    Bystanders::start([&daemon.sockets()[0], &daemon.sockets()[1]])
}

fn attached<'m>(daemon: &Daemon, ram: &'m Ram, port: usize) -> Guest<'m> {
    let mut guest = Guest::new(ram);
    guest.attach(&daemon.sockets()[port]);
    guest
}

/// The numbers of the frames from `from` that have come.
fn arrived(guest: &mut Guest<'_>, from: u8) -> Vec<u64> {
    let frames = std::iter::from_fn(|| guest.try_receive());
    let labels = frames.map(|bytes| read(&bytes));
    let ours = labels.filter(|label| label.from == mac(from));
    ours.map(|label| label.sequence).collect()
}

// ---- slow calls ---------------------------------------------------------------------------------

#[test]
fn a_call_descriptor_with_20000_waiters_is_signalled_by_its_own_session() {
    let mut daemon = daemon(&[]);
    let bystanders = bystanders(&daemon);
    let sink_ram = Ram::new(GuestOptions::default());
    let mut sink = attached(&daemon, &sink_ram, SINK);
    let ram = Ram::new(GuestOptions {
        calls: true,
        event_idx: false,
        ..GuestOptions::default()
    });
    let mut guest = Guest::new(&ram);
    let waiters = hang_waiters(&guest.calls[RECEIVE], 142);
    guest.attach(&daemon.sockets()[CULPRIT]);
    let mut number = 0;
    // Each frame wants a call.
    let mut exchange = |guest: &mut Guest<'_>, frames: u64| {
        for _ in 0..frames {
            number += 1;
            wait_for("a frame to the port with the slow call", || {
                sink.try_send(&frame(mac(3), mac(4), number, 100));
                guest.try_send(&frame(mac(4), mac(3), number, 100));
                arrived(&mut sink, 3);
                arrived(guest, 4).contains(&number)
            });
        }
    };
    wait_for("the calls to be deferred", || {
        exchange(&mut guest, 10);
        daemon.port("p2")["calls"] == "deferred"
    });
    let count = |daemon: &Daemon, what: &str| daemon.port("p2")["statistics"][what].as_u64();
    let slow = count(&daemon, "slow_calls").unwrap();
    assert_eq!(slow, 1, "after a slow batch, which names nobody");
    daemon.assert_logged("calls are slow");
    let shown = daemon.pollux(&["port", "show", "p2"]).stdout;
    assert!(String::from_utf8_lossy(&shown).contains("deferred to the session"));
    // From now on the poll thread pays nothing, and the driver is called all the same.
    let deferred = count(&daemon, "deferred_calls").unwrap();
    let _ = guest.calls[RECEIVE].read();
    exchange(&mut guest, 300);
    bystanders.go_on(200);
    assert_eq!(count(&daemon, "slow_calls"), Some(slow));
    wait_for("the deferred calls", || {
        count(&daemon, "deferred_calls").unwrap() > deferred
    });
    wait_for("a call", || guest.calls[RECEIVE].read().is_ok());
    // A new session of the same port does not begin anew.
    guest.detach();
    guest.attach(&daemon.sockets()[CULPRIT]);
    exchange(&mut guest, 10);
    assert_eq!(count(&daemon, "slow_calls"), Some(slow));
    assert_eq!(daemon.port("p0")["calls"], "direct");
    daemon.assert_alive();
    bystanders.finish();
    drop((guest, sink, waiters));
    daemon.stop();
}

// ---- acknowledgements ---------------------------------------------------------------------------

/// How often `text` was logged.
fn logged(daemon: &Daemon, text: &str) -> usize {
    daemon.log().matches(text).count()
}

#[test]
fn a_poll_thread_that_does_not_acknowledge_is_named_and_nothing_is_answered() {
    let mut daemon = daemon(&["--idle", "busy"]);
    let ram = Ram::new(GuestOptions::default());
    let mut guest = attached(&daemon, &ram, CULPRIT);
    daemon.settle();
    let thread = daemon.poll_threads()[0].clone();
    assert_eq!(thread["state"], "busy");
    let parked = Parked::poll_thread(&daemon, 0);
    let answered = AtomicBool::new(false);
    let frontend = guest.frontend.take().unwrap();
    std::thread::scope(|scope| {
        // The switch may answer this only when nobody uses the ring any more.
        scope.spawn(|| {
            frontend.get_vring_base(RECEIVE as u32).unwrap();
            answered.store(true, Ordering::SeqCst);
        });
        wait_for("the thread to be overdue", || {
            daemon.poll_threads()[0]["state"] == "overdue"
        });
        daemon.assert_logged("poll-0 has not taken over");
        let shown = daemon.pollux(&["poll", "list"]).stdout;
        assert!(String::from_utf8_lossy(&shown).contains("overdue"));
        let stats = daemon.stats();
        assert!(
            stats["poll_threads"][0]["overdue_seconds"]
                .as_f64()
                .unwrap()
                >= 1.0
        );
        // The daemon goes on with everything else.
        let spec = format!("p9,socket={}", daemon.dir().join("p9.sock").display());
        assert!(daemon.pollux(&["port", "add", &spec]).status.success());
        assert!(!answered.load(Ordering::SeqCst));
        drop(parked);
        wait_for("the answer", || answered.load(Ordering::SeqCst));
    });
    daemon.assert_logged("poll-0 has taken over again");
    assert_eq!(logged(&daemon, "has not taken over"), 1);
    assert_eq!(logged(&daemon, "has taken over again"), 1);
    let thread = daemon.poll_threads()[0].clone();
    assert_eq!(thread["state"], "busy");
    assert!(thread["overdue_seconds"].is_null());
    assert!(
        thread["acknowledge_latency"]["max_seconds"]
            .as_f64()
            .unwrap()
            >= 1.0
    );
    daemon.assert_alive();
    drop(guest);
    daemon.stop();
}

#[test]
fn acknowledgements_are_timed_while_awake_only() {
    let latency = |daemon: &Daemon| daemon.poll_threads()[0]["acknowledge_latency"].clone();
    let change = |daemon: &Daemon| {
        for n in 0..10 {
            let name = format!("extra{n}");
            let spec = format!("{name},socket={}", daemon.dir().join(&name).display());
            assert!(daemon.pollux(&["port", "add", &spec]).status.success());
            daemon.settle();
        }
    };
    let asleep = daemon(&[]);
    change(&asleep);
    let seen = latency(&asleep);
    let awake = daemon(&["--idle", "busy"]);
    let before = latency(&awake)["count"].as_u64().unwrap_or(0);
    change(&awake);
    let after = latency(&awake);
    assert_eq!(after["count"].as_u64().unwrap() - before, 10);
    let value = |name: &str| after[name].as_f64().unwrap();
    assert!(value("p50_seconds") > 0.0);
    assert!(value("p50_seconds") <= value("p99_seconds"));
    assert!(value("p99_seconds") <= value("max_seconds"));
    // A thread without queues sleeps through all of it.
    assert!(seen.is_null(), "{seen}");
    asleep.stop();
    awake.stop();
}

// ---- full and broken rings ----------------------------------------------------------------------

fn drops(daemon: &Daemon, port: &str, reason: &str) -> u64 {
    let port = daemon.port(port);
    port["statistics"]["tx"]["drops"][reason]
        .as_u64()
        .unwrap_or(0)
}

#[test]
fn a_flooder_and_a_paced_sender_share_a_slow_receiver_across_poll_threads() {
    let (first, second) = common::cpus();
    let mut daemon = daemon(&["--poll-cpus", &format!("{first},{second}")]);
    let rams = [(); 4].map(|()| Ram::new(GuestOptions::default()));
    let mut receiver = attached(&daemon, &rams[0], 0);
    // The slots decide: the flooder's queue is the first thread's, the paced one's the second
    // thread's.
    let mut flooder = attached(&daemon, &rams[2], 2);
    let mut paced = attached(&daemon, &rams[3], 3);
    daemon.settle();
    let threads = daemon.poll_threads();
    let owns = |thread: usize, port: &str| threads[thread]["queues"].to_string().contains(port);
    assert!(owns(0, "p2") && owns(1, "p3") || first == second);
    wait_for("the receiver to be known", || {
        receiver.try_send(&frame([0xff; 6], mac(1), 0, 60));
        !arrived(&mut flooder, 1).is_empty() && !arrived(&mut paced, 1).is_empty()
    });
    let flood = frame(mac(1), mac(3), 0, 60);
    let rounds = if long() { 10_000 } else { 1000 };
    let (mut received, mut sent, mut came) = (0, 0, 0);
    while sent < rounds {
        // Many more than the receiver takes, which is 16 a turn.
        for _ in 0..64 {
            flooder.try_send(&flood);
        }
        for _ in 0..16 {
            let Some(bytes) = receiver.try_receive() else {
                break;
            };
            received += 1;
            came += u64::from(read(&bytes).from == mac(4));
        }
        // One in a hundred, once the flood stands; one at a time, for its poll thread may wait for
        // a CPU.
        let due = received > 1000 + 100 * sent && paced.in_flight() == 0;
        if due && paced.try_send(&frame(mac(1), mac(4), sent, 60)) {
            sent += 1;
        }
    }
    // What comes behind the last one of them.
    wait_for("what is on its way", || {
        paced.try_send(&frame(mac(1), mac(4), rounds, 60));
        let numbers = arrived(&mut receiver, 4);
        came += numbers.iter().filter(|number| **number < rounds).count() as u64;
        numbers.contains(&rounds)
    });
    let lost = rounds - came;
    assert!(
        lost * 100 < rounds,
        "{lost} of {rounds} paced frames were lost"
    );
    assert!(drops(&daemon, "p0", "egress_ring_full") > 0, "no flood");
    daemon.assert_alive();
    drop((receiver, flooder, paced));
    daemon.stop();
}

#[test]
fn a_ring_that_its_driver_breaks_is_counted_logged_once_shown_and_healed() {
    let daemon = daemon(&[]);
    let bystanders = bystanders(&daemon);
    let sink_ram = Ram::new(GuestOptions::default());
    let mut sink = attached(&daemon, &sink_ram, SINK);
    let ram = Ram::new(GuestOptions::default());
    let mut guest = attached(&daemon, &ram, CULPRIT);
    wait_for("the guests to meet", || {
        guest.try_send(&frame(mac(4), mac(3), 1, 60));
        sink.try_send(&frame(mac(3), mac(4), 1, 60));
        let (there, back) = (arrived(&mut sink, 3), arrived(&mut guest, 4));
        !there.is_empty() && !back.is_empty()
    });
    // More available entries than the ring has.
    let index = RingLayout::new(256, false).available + 2;
    let available = ram.memory.window(index, 2).unwrap();
    let ahead = available.load_u16(0, Ordering::Acquire).wrapping_add(300);
    available.store_u16(0, ahead, Ordering::Release);
    wait_for("the frames to be counted", || {
        sink.try_send(&frame(mac(3), mac(4), 2, 60));
        drops(&daemon, "p2", "egress_ring_broken") > 100
    });
    wait_for("the state", || daemon.port("p2")["state"] == "broken");
    let reason = daemon.port("p2")["reason"].to_string();
    assert!(reason.contains("receiveq 0: available index"), "{reason}");
    daemon.assert_logged("receiveq 0 broken");
    bystanders.go_on(100);
    // The driver resets its device.
    guest.detach();
    let fresh = Ram::new(GuestOptions::default());
    let mut guest = attached(&daemon, &fresh, CULPRIT);
    wait_for("a frame after the reset", || {
        sink.try_send(&frame(mac(3), mac(4), 3, 60));
        arrived(&mut guest, 4).contains(&3)
    });
    // Its transmitq is enabled last.
    wait_for("the state", || daemon.port("p2")["state"] == "running");
    assert_eq!(logged(&daemon, "receiveq 0 broken"), 1);
    bystanders.finish();
    drop((guest, sink));
    daemon.stop();
}

#[test]
fn frames_for_a_port_that_was_just_disabled_are_told_from_those_for_a_full_one() {
    let daemon = daemon(&[]);
    let rams = [(); 2].map(|()| Ram::new(GuestOptions::default()));
    let mut sink = attached(&daemon, &rams[0], SINK);
    let mut guest = attached(&daemon, &rams[1], CULPRIT);
    wait_for("the guests to meet", || {
        guest.try_send(&frame(mac(4), mac(3), 1, 60));
        sink.try_send(&frame(mac(3), mac(4), 1, 60));
        let (there, back) = (arrived(&mut sink, 3), arrived(&mut guest, 4));
        !there.is_empty() && !back.is_empty()
    });
    // 256 buffers, and none comes back.
    wait_for("the full ring", || {
        sink.try_send(&frame(mac(3), mac(4), 2, 60));
        drops(&daemon, "p2", "egress_ring_full") > 0
    });
    assert_eq!(drops(&daemon, "p2", "egress_not_ready"), 0);
    let frontend = guest.frontend.as_ref().unwrap();
    frontend.set_vring_enable(RECEIVE as u32, false).unwrap();
    daemon.settle();
    let full = drops(&daemon, "p2", "egress_ring_full");
    wait_for("the disabled ring", || {
        sink.try_send(&frame(mac(3), mac(4), 3, 60));
        drops(&daemon, "p2", "egress_not_ready") > 0
    });
    assert_eq!(drops(&daemon, "p2", "egress_ring_full"), full);
    assert_eq!(daemon.port("p2")["state"], "negotiating");
    assert!(!daemon.log().contains("broken"));
    drop((guest, sink));
    daemon.stop();
}

// ---- storms -------------------------------------------------------------------------------------

#[test]
fn ten_thousand_enables_and_memory_tables_are_few_publications_and_delay_nobody() {
    let mut daemon = daemon(&[]);
    let bystanders = bystanders(&daemon);
    let sink_ram = Ram::new(GuestOptions::default());
    let mut sink = attached(&daemon, &sink_ram, SINK);
    let ram = Ram::new(GuestOptions::default());
    let mut guest = attached(&daemon, &ram, CULPRIT);
    let frontend = guest.frontend.take().unwrap();
    let generation = |daemon: &Daemon| daemon.stats()["generation"].as_u64().unwrap();
    let rounds: u32 = if long() { 10_000 } else { 1000 };
    for storm in ["enables", "memory tables"] {
        let (before, begun) = (generation(&daemon), Instant::now());
        for round in 0..rounds {
            match storm {
                "enables" => frontend
                    .set_vring_enable(RECEIVE as u32, round % 2 == 1)
                    .unwrap(),
                _ => frontend.set_mem_table(&[guest.region()]).unwrap(),
            }
            // Under load, some of it towards the culprit.
            guest.try_send(&frame(mac(4), mac(3), 0, 60));
            sink.try_send(&frame(mac(3), mac(4), 0, 60));
            arrived(&mut sink, 3);
            arrived(&mut guest, 4);
        }
        let allowed = 300 + begun.elapsed().as_millis() as u64;
        let publications = generation(&daemon) - before;
        assert!(
            publications <= allowed,
            "{publications} publications for {rounds} {storm}, {allowed} allowed"
        );
        bystanders.go_on(100);
    }
    guest.frontend = Some(frontend);
    wait_for("a frame after the storms", || {
        guest.try_send(&frame(mac(4), mac(3), 7, 60));
        arrived(&mut sink, 3).contains(&7)
    });
    daemon.assert_alive();
    bystanders.finish();
    drop((guest, sink));
    daemon.stop();
}

#[test]
fn a_connect_loop_fills_no_log() {
    let daemon = daemon(&[]);
    let bystanders = bystanders(&daemon);
    let begun = Instant::now();
    let mut connections = 0;
    wait_for("the log to be limited", || {
        // Each one is a session, or is refused beside the one before.
        drop(UnixStream::connect(&daemon.sockets()[CULPRIT]));
        connections += 1;
        connections % 10 == 0 && daemon.log().contains("more events not shown")
    });
    let allowed = 702 + 2 * begun.elapsed().as_millis() as usize / 250;
    let lines = logged(&daemon, "port=\"p2\"").max(logged(&daemon, "port=p2"));
    assert!(
        (500..=allowed).contains(&lines),
        "{lines} lines for {connections} connections"
    );
    bystanders.go_on(100);
    // The port still serves an honest one.
    let ram = Ram::new(GuestOptions::default());
    let guest = attached(&daemon, &ram, CULPRIT);
    wait_for("the state", || daemon.port("p2")["state"] == "running");
    bystanders.finish();
    drop(guest);
    daemon.stop();
}

/// What the daemon's first thread, control, has run so far.
fn control_time(daemon: &Daemon) -> Duration {
    let pid = daemon.pid();
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/schedstat")).unwrap();
    let nanos = text.split(' ').next().unwrap().parse().unwrap();
    Duration::from_nanos(nanos)
}

#[test]
fn without_a_descriptor_left_frontends_wait_and_control_sleeps() {
    let mut daemon = daemon(&[]);
    let bystanders = bystanders(&daemon);
    let open = descriptors(&daemon);
    limit_descriptors(&daemon, (0..).find(|fd| !open.contains(fd)));
    let mut waiting = Vec::new();
    wait_for("the last descriptor", || {
        waiting.push(UnixStream::connect(&daemon.sockets()[CULPRIT]).unwrap());
        let log = daemon.log();
        log.contains("cannot be accepted") || log.contains("no descriptor left")
    });
    let (ran, begun) = (control_time(&daemon), Instant::now());
    bystanders.go_on(100);
    while begun.elapsed() < Duration::from_secs(1) {
        common::pause();
    }
    let share = (control_time(&daemon) - ran).as_secs_f64() / begun.elapsed().as_secs_f64();
    assert!(
        share < 0.1,
        "control runs {:.0} % of the time",
        share * 100.0
    );
    drop(waiting);
    limit_descriptors(&daemon, None);
    let ram = Ram::new(GuestOptions::default());
    let guest = attached(&daemon, &ram, CULPRIT);
    wait_for("the state", || daemon.port("p2")["state"] == "running");
    daemon.assert_alive();
    bystanders.finish();
    drop(guest);
    daemon.stop();
}
