//! Guests whose memory is slow to touch: holes that are punched under a poll thread, and pages that
//! it has to make. Such a guest pays for itself; bystanders on the same poll thread lose nothing,
//! and it touches no such page again.
//!
//! What must be is asserted by counters, not by times: other tests run beside.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::guest::{Guest, GuestOptions, Ram};
use common::scene::{Scene, VICTIM};
use common::traffic::{Bystanders, frame, mac};
use common::{long, wait_for, wait_for_within};
use pollux::memory::SharedMemory;
use pollux::virtio::driver::Buffer;
use rustix::fs::FallocateFlags;
use serde_json::Value;

const PAGE: usize = 4096;
/// `BUDGET_US` of `sys::pages`, in seconds.
const BUDGET: f64 = 0.05;
/// Memory that a hole is punched into while frames come out of it.
const HOLE: usize = 1 << 30;
/// Pieces of a frame, each in a page of its own.
const PIECES: usize = 60;
/// Frames of so many pieces that are sent at once.
const FRAMES: usize = 17;
const LIMIT: Duration = Duration::from_secs(60);

/// A guest's memory with `more` bytes behind what it needs.
fn ram(options: GuestOptions, more: usize) -> (Ram, usize) {
    let usual = Ram::len(&options);
    let memory = SharedMemory::create(usual + more, true).unwrap();
    (Ram::of(memory, options), usual)
}

fn punch(ram: &Ram, start: usize, len: usize) {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(ram.memory.file(), hole, start as u64, len as u64).unwrap();
}

/// What a poll thread says of its slow faults: how many, and how long they took.
fn slow_faults(daemon: &Daemon, slow: bool) -> (u64, f64) {
    let threads = daemon.poll_threads();
    let threads = threads.as_array().unwrap();
    let thread = threads.iter().find(|thread| thread["slow_ports"] == slow);
    thread.map_or((0, 0.0), |thread| {
        let count = thread["slow_faults"].as_u64();
        (
            count.unwrap(),
            thread["slow_fault_seconds"].as_f64().unwrap(),
        )
    })
}

/// The shared thread has not waited for the guest's memory since then. Healthy guests use some
/// pages for the first time meanwhile: each has a few hundred buffers.
fn assert_unbothered(daemon: &Daemon, (faults, seconds): (u64, f64)) {
    let (now, took) = slow_faults(daemon, false);
    assert!(now - faults < 500, "{} page faults more", now - faults);
    assert!(took - seconds < BUDGET, "{} s more", took - seconds);
}

/// Nobody else is taken for slow: neither receivers of the slow guest nor bystanders.
fn assert_others_normal(daemon: &Daemon) {
    let ports = daemon.json(&["port", "list", "--json"]);
    for port in ports.as_array().unwrap() {
        let expected = if port["name"] == VICTIM {
            "slow"
        } else {
            "normal"
        };
        assert_eq!(port["memory"], expected, "{port}");
    }
}

fn is_slow(daemon: &Daemon) -> bool {
    daemon.port(VICTIM)["memory"] == "slow"
}

/// The port is served by the thread of slow ports, and everybody can see it.
fn assert_shown(daemon: &Daemon) {
    daemon.assert_logged("guest memory is slow to touch");
    let shown = |args: &[&str]| String::from_utf8_lossy(&daemon.pollux(args).stdout).into_owned();
    assert!(shown(&["port", "show", VICTIM]).contains("slow, by poll-slow for"));
    assert!(shown(&["poll", "list"]).contains(" slow "));
    let port = daemon.port(VICTIM);
    assert!(port["memory_slow_seconds"].as_f64().is_some());
    assert!(port["statistics"]["slow_faults"].as_u64().unwrap() > 0);
    wait_for("the queue to be on the slow thread", || {
        let threads = daemon.poll_threads();
        let on_it = |thread: &Value| {
            let queues = thread["queues"].as_array().unwrap();
            queues.iter().any(|queue| queue["port"] == VICTIM)
        };
        let threads = threads.as_array().unwrap();
        threads
            .iter()
            .all(|thread| on_it(thread) == (thread["slow_ports"] == true))
    });
    // It is nobody else's, and nothing for an operator to move.
    let number = daemon.poll_threads();
    let number = number.as_array().unwrap().len() - 1;
    let number = number.to_string();
    for args in [
        ["poll", "remove", &number].as_slice(),
        &["poll", "move", "p0", &number],
        &["poll", "move", VICTIM, "0"],
    ] {
        let (code, said) = daemon.try_pollux(args);
        assert!(code == 5 && said.contains("poll-slow"), "{code} {said}");
    }
}

/// What healthy frames to and from the slow port do: arrive, in order.
fn assert_served(scene: &Scene, guest: &mut Guest<'_>, sink: &mut Guest<'_>) {
    wait_for("its transmit buffers", || guest.in_flight() == 0);
    while sink.try_receive().is_some() {}
    while guest.try_receive().is_some() {}
    for number in 0..100 {
        scene.passes(guest, sink, 1000 + number);
        scene.reaches(guest, sink, 2000 + number);
    }
}

/// Frames that lie in the hole, with more bytes than are read before they are delivered.
fn frames_in(guest: &Guest<'_>, start: usize) -> Vec<Vec<Buffer>> {
    let frame = |n: usize| {
        // Far apart, so that none is near another one.
        let at = start + n * (HOLE / 64);
        vec![Buffer::readable(guest.address(at), 1512)]
    };
    (0..64).map(frame).collect()
}

/// Punches the hole while frames are sent from within; says how long that took, in seconds.
fn attack(guest: &mut Guest<'_>, ram: &Ram, start: usize) -> f64 {
    ram.memory.window(start, HOLE).unwrap().touch();
    std::thread::scope(|scope| {
        let punching = scope.spawn(|| {
            let begun = Instant::now();
            punch(ram, start, HOLE);
            begun.elapsed().as_secs_f64()
        });
        while !punching.is_finished() {
            guest.post_chains(frames_in(guest, start));
        }
        punching.join().unwrap()
    })
}

/// How long bystanders stood still, as a thread of its own sees it. Counted with `--long` only:
/// elsewhere other tests keep their CPUs from them.
struct Standstills(Option<(mpsc::Sender<()>, JoinHandle<Vec<f64>>)>);

impl Standstills {
    fn watch(bystanders: &Bystanders) -> Standstills {
        let progress = bystanders.progress();
        Standstills(long().then(|| {
            let (stop, stopped) = mpsc::channel();
            let watcher = std::thread::spawn(move || {
                let (mut at, mut since, mut stands) = (0, Instant::now(), Vec::new());
                while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                    std::thread::sleep(Duration::from_millis(1));
                    let now = progress.load(Ordering::Relaxed);
                    if now != at {
                        stands.push(since.elapsed().as_secs_f64());
                        (at, since) = (now, Instant::now());
                    }
                }
                stands
            });
            (stop, watcher)
        }))
    }

    /// They stood still for half the length of a hole, or longer, so often at most.
    fn assert_at_most(self, most: usize, hole: f64) {
        if let Some((stop, watcher)) = self.0 {
            stop.send(()).unwrap();
            let stands = watcher.join().unwrap();
            let long: Vec<_> = stands.iter().filter(|it| **it > hole / 2.0).collect();
            println!("stood still for {long:?} s; a hole takes {hole} s");
            assert!(long.len() <= most, "{long:?}");
        }
    }
}

/// Bystanders have 0.95 of the rate that they have beside a guest that punches holes as well and
/// sends nothing.
fn assert_rate_is_kept(bystanders: &Bystanders, mut attack: impl FnMut()) {
    let rate = |work: &mut dyn FnMut()| {
        let (frames, begun) = (bystanders.frames(), Instant::now());
        work();
        (bystanders.frames() - frames) as f64 / begun.elapsed().as_secs_f64()
    };
    let idle = SharedMemory::create(HOLE, true).unwrap();
    let mut idle = || {
        idle.window(0, HOLE).unwrap().touch();
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        std::thread::scope(|scope| {
            let file = idle.file();
            let punching =
                scope.spawn(move || rustix::fs::fallocate(file, hole, 0, HOLE as u64).unwrap());
            while !punching.is_finished() {
                std::hint::spin_loop();
            }
        });
    };
    let mut ratios: Vec<f64> = (0..9)
        .map(|_| {
            let beside = rate(&mut idle);
            rate(&mut attack) / beside
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    println!("rate of bystanders beside the attack: {ratios:.2?}");
    assert!(ratios[4] >= 0.95, "{ratios:?}");
}

/// A hole is punched into a GiB, again and again, while frames are sent from within.
#[test]
fn a_hole_that_is_punched_keeps_a_shared_thread_waiting_once() {
    let scene = Scene::new();
    let sink_ram = Ram::new(GuestOptions::default());
    let mut sink = Guest::new(&sink_ram);
    scene.attach_sink(&mut sink);
    let (ram, start) = ram(GuestOptions::default(), HOLE);
    let mut guest = Guest::new(&ram);
    scene.attach_victim(&mut guest, &mut sink);
    let daemon = &scene.daemon;
    let attack = |guest: &mut Guest<'_>| attack(guest, &ram, start);
    let (seconds, longest) = {
        let watched = Standstills::watch(&scene.bystanders);
        let (mut longest, deadline) = (0.0_f64, Instant::now() + LIMIT);
        while !is_slow(daemon) {
            assert!(Instant::now() < deadline, "it is never found");
            longest = longest.max(attack(&mut guest));
        }
        assert_shown(daemon);
        // The first wait may name nobody, and the second one may leave sender or receiver.
        watched.assert_at_most(3, longest);
        (slow_faults(daemon, false).1, longest)
    };
    let before = slow_faults(daemon, false);
    let watched = Standstills::watch(&scene.bystanders);
    for _ in 0..3 {
        attack(&mut guest);
    }
    watched.assert_at_most(0, longest);
    wait_for_within(LIMIT, "the slow thread's faults", || {
        slow_faults(daemon, true).0 > 0
    });
    scene.bystanders.go_on(1000);
    assert_unbothered(daemon, before);
    assert!(
        seconds <= longest + BUDGET,
        "{seconds} s of waiting for holes of {longest} s at most"
    );
    if long() {
        assert_rate_is_kept(&scene.bystanders, || {
            attack(&mut guest);
        });
    }
    assert_served(&scene, &mut guest, &mut sink);
    assert_others_normal(daemon);
    drop((guest, sink));
    scene.finish();
}

/// Frames in many pieces, each in a page that does not exist, until the switch has made more than
/// there can be.
#[test]
fn pages_without_end_are_made_by_the_slow_thread_until_the_session_ends() {
    let scene = Scene::new();
    let sink_ram = Ram::new(GuestOptions::default());
    let mut sink = Guest::new(&sink_ram);
    scene.attach_sink(&mut sink);
    let options = GuestOptions {
        entries: 1024,
        ..GuestOptions::default()
    };
    let fresh = FRAMES * PIECES * PAGE;
    let (ram, start) = ram(options, fresh);
    let mut guest = Guest::new(&ram);
    scene.attach_victim(&mut guest, &mut sink);
    // Known, so that what is sent to it is not flooded.
    scene.reaches(&mut guest, &mut sink, 1);
    let daemon = &scene.daemon;
    let head = [&[0; 12][..], &frame(mac(4), mac(3), 1, 60)].concat();
    let round = |guest: &mut Guest<'_>, sink: &mut Guest<'_>| {
        punch(&ram, start, fresh);
        let chains = (0..FRAMES).map(|n| {
            let (at, _) = guest.transmit_buffer(1000);
            guest.transmit_memory(1000).write_bytes(0, &head);
            let pieces = (1..PIECES).map(|piece| {
                let at = start + (n * PIECES + piece) * PAGE;
                Buffer::readable(guest.address(at), 20)
            });
            let first = Buffer::readable(at, head.len() as u32);
            std::iter::once(first).chain(pieces).collect()
        });
        let chains: Vec<Vec<Buffer>> = chains.collect();
        guest.post_chains(chains);
        let deadline = Instant::now() + LIMIT;
        while guest.in_flight() > 0 && !guest.is_cut_off() {
            assert!(Instant::now() < deadline, "chains do not come back");
            while sink.try_receive().is_some() {}
            std::thread::yield_now();
        }
    };
    let deadline = Instant::now() + LIMIT;
    while !is_slow(daemon) {
        assert!(Instant::now() < deadline, "it is never found");
        (0..10).for_each(|_| round(&mut guest, &mut sink));
    }
    assert_shown(daemon);
    let before = slow_faults(daemon, false);
    round(&mut guest, &mut sink);
    scene.bystanders.go_on(1000);
    assert_unbothered(daemon, before);
    assert_served(&scene, &mut guest, &mut sink);
    let deadline = Instant::now() + LIMIT;
    while !guest.is_cut_off() {
        assert!(Instant::now() < deadline, "it goes on for ever");
        round(&mut guest, &mut sink);
    }
    scene.wait_until_left();
    let (_, reason) = daemon.state(VICTIM);
    assert!(reason.contains("holes are punched"), "{reason}");
    assert_unbothered(daemon, before);
    // The next session is a slow one, too, and is served.
    guest.attach(scene.victim());
    scene.wait_until_running(VICTIM);
    assert!(is_slow(daemon));
    drop((guest, sink));
    scene.finish();
}
