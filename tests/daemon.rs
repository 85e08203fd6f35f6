//! The daemon's own life: signals, a second instance, silence, and its death while guests keep
//! their rings.
//!
//! `POLLUX_LONG=1` runs as many cycles as the acceptance asks for.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, RECEIVE, Ram};
use common::traffic::{Exchange, frame, mac};
use common::{long, memory_tempdir, short_tempdir};
use pollux::bench::frontend::Frontend;
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(20);

fn options(ports: usize) -> DaemonOptions {
    DaemonOptions {
        ports,
        ..DaemonOptions::default()
    }
}

#[test]
fn signals_end_the_daemon_quickly_with_guests_attached() {
    for signal in [Signal::TERM, Signal::INT] {
        let daemon = Daemon::start(&options(4));
        let rams = [(); 2].map(|()| Ram::new(GuestOptions::default()));
        let guests = rams.iter().zip(daemon.sockets()).map(|(ram, socket)| {
            let mut guest = Guest::new(ram);
            guest.attach(socket);
            guest
        });
        let mut exchange = Exchange::new(guests.collect(), 1, &[(0, 1), (1, 0)], 8, 100);
        exchange.meet();
        exchange.exchange(100);
        // One that has only connected, and one in the middle of a message.
        let silent = Frontend::connect(&daemon.sockets()[2], LIMIT).unwrap();
        let half = Frontend::connect(&daemon.sockets()[3], LIMIT).unwrap();
        std::io::Write::write_all(&mut half.stream(), &[1, 0, 0, 0, 1]).unwrap();
        daemon.stop_by(signal);
        drop((exchange, silent, half));
    }
}

#[test]
fn a_second_daemon_is_refused_by_the_name_of_the_socket() {
    let daemon = Daemon::start(&options(4));
    let api = daemon.dir().join("api.sock");
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_pollux"))
            .arg("run")
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, said) = run(&["--api-socket", api.to_str().unwrap()]);
    assert_eq!(code, 5, "{said}");
    assert!(said.contains(api.to_str().unwrap()), "{said}");
    let other = daemon.dir().join("other.sock");
    let port = format!("x,socket={}", daemon.sockets()[0].display());
    let (code, said) = run(&["--api-socket", other.to_str().unwrap(), "--port", &port]);
    assert_eq!(code, 5, "{said}");
    assert!(
        said.contains(daemon.sockets()[0].to_str().unwrap()),
        "{said}"
    );
    assert!(said.contains("another process listens"), "{said}");
    // The first one has lost neither.
    assert_eq!(daemon.ports().len(), 4);
    assert!(!other.exists());
    daemon.stop();
}

/// Clock ticks of user and system time.
fn ticks(daemon: &Daemon) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
    let rest = stat.rsplit_once(')').unwrap().1;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // Fields 14 and 15 of proc(5); the rest begins with the third.
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn silent_guests_cost_next_to_nothing_and_the_next_frame_arrives() {
    let daemon = Daemon::start(&options(4));
    let rams = [(); 2].map(|()| Ram::new(GuestOptions::default()));
    let guests = rams.iter().zip(daemon.sockets()).map(|(ram, socket)| {
        let mut guest = Guest::new(ram);
        guest.attach(socket);
        guest
    });
    let mut exchange = Exchange::new(guests.collect(), 1, &[(0, 1), (1, 0)], 8, 100);
    exchange.meet();
    for _ in 0..3 {
        exchange.exchange(100);
        exchange.drain();
        let (before, began) = (ticks(&daemon), Instant::now());
        std::thread::sleep(Duration::from_secs(2));
        let used =
            (ticks(&daemon) - before) as f64 / rustix::param::clock_ticks_per_second() as f64;
        let share = used / began.elapsed().as_secs_f64();
        assert!(share < 0.02, "{:.1} % of a core", share * 100.0);
        exchange.forgive_silence();
    }
    exchange.exchange(1);
    exchange.drain();
    drop(exchange);
    daemon.stop();
}

// ---- death and resurrection ---------------------------------------------------------------------

/// Three ports, and a directory for the state of their rings: in memory, which the directory of a
/// test may not be.
fn with_ring_state() -> (tempfile::TempDir, DaemonOptions) {
    let state = memory_tempdir();
    let ring_state = ["--ring-state", state.path().to_str().unwrap()];
    let options = DaemonOptions {
        args: ring_state.map(str::to_string).to_vec(),
        ..options(3)
    };
    (state, options)
}

/// Poll threads of a daemon, its two senders on one or each on its own.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Threads {
    One,
    Two,
}

/// Kills the daemon at any instruction, but not while a buffer is back at its sender whose frame
/// nobody sees yet. That is so where a poll thread lost its processor with an open claim a
/// millisecond ago, and chains no longer wait for it (`completed_early`): what dies with it then is
/// lost.
fn kill(daemon: Daemon, exchange: &mut Exchange<'_>) -> tempfile::TempDir {
    let deadline = Instant::now() + LIMIT;
    loop {
        daemon.freeze();
        if !exchange.is_ahead() {
            return daemon.kill();
        }
        daemon.thaw();
        assert!(Instant::now() < deadline, "completed early for ever");
        exchange.exchange(50);
    }
}

/// The switch has all receive buffers of a guest, each of them once: as many frames of one buffer
/// as there are come in different ones, while none is posted again.
fn assert_every_receive_buffer_is_there(
    exchange: &mut Exchange<'_>,
    from: usize,
    to: usize,
    entries: u16,
) {
    while exchange.guests[to].try_receive().is_some() {}
    let name = |guest: usize| mac(1 + guest as u8);
    let mut used = BTreeSet::new();
    for number in 0..u64::from(entries) {
        exchange.guests[from].send(&frame(name(to), name(from), number, 60));
        let token = exchange.guests[to].returned(RECEIVE).token;
        assert!(used.insert(token), "buffer {token} came twice");
    }
    assert_eq!(used.len(), usize::from(entries));
}

/// Three guests, two of which send into the third, keep their rings while their daemon is killed
/// and started anew.
///
/// A frame that was delivered but not completed comes again; none is lost, and no buffer is
/// returned twice (the guests check that at every step).
fn survive_the_daemon(guest: GuestOptions, threads: Threads, kills: u32) {
    let (_state, options) = with_ring_state();
    let start = |dir| {
        let daemon = Daemon::start_in(dir, &options);
        if threads == Threads::Two {
            assert!(daemon.pollux(&["poll", "add"]).status.success());
            assert!(daemon.pollux(&["poll", "move", "p1", "1"]).status.success());
        }
        daemon
    };
    let mut daemon = start(short_tempdir());
    let rams = [(); 3].map(|()| Ram::new(guest));
    let guests = rams.iter().zip(daemon.sockets()).map(|(ram, socket)| {
        let mut guest = Guest::new(ram);
        guest.attach(socket);
        guest
    });
    let flows = [(0, 2), (1, 2), (2, 0)];
    let mut exchange = Exchange::new(guests.collect(), 1, &flows, 16, 200);
    exchange.may_repeat = true;
    exchange.meet();
    // Every fourth is a clean end, at which guests keep their rings all the same.
    for cycle in 0..kills + kills / 3 {
        exchange.exchange(500 + u64::from(cycle) * 37 % 200);
        let dir = if cycle % 4 == 3 {
            daemon.end()
        } else {
            kill(daemon, &mut exchange)
        };
        daemon = start(dir);
        for (guest, socket) in exchange.guests.iter_mut().zip(daemon.sockets()) {
            guest.detach();
            guest.attach_receiving(socket);
        }
        // A switch drops what is sent to a port without a guest: all are there before one sends.
        daemon.settle();
        exchange.guests.iter().for_each(Guest::attach_transmitting);
        exchange.forgive_silence();
        let on_second = daemon.poll_threads()[1]["queues"].to_string();
        let apart = on_second.contains("p1") && !on_second.contains("p0");
        assert_eq!(apart, threads == Threads::Two, "of the two senders");
    }
    exchange.exchange(500);
    exchange.drain();
    for flow in &exchange.flows {
        assert_eq!(flow.received, flow.sent);
    }
    println!("{:?}", exchange.flows);
    daemon.settle();
    for (from, to) in [(0, 2), (2, 0), (0, 1)] {
        assert_every_receive_buffer_is_there(&mut exchange, from, to, guest.entries);
    }
    drop(exchange);
    daemon.stop();
}

fn kills() -> u32 {
    if long() { 100 } else { 9 }
}

#[test]
fn guests_of_qemu_lose_nothing_when_the_daemon_is_killed() {
    survive_the_daemon(GuestOptions::default(), Threads::One, kills());
}

#[test]
fn guests_of_cloud_hypervisor_lose_nothing_when_the_daemon_is_killed() {
    survive_the_daemon(GuestOptions::cloud_hypervisor(), Threads::One, kills());
}

fn packed() -> GuestOptions {
    GuestOptions {
        packed: true,
        ..GuestOptions::default()
    }
}

#[test]
fn guests_with_packed_rings_lose_nothing_when_the_daemon_is_killed() {
    survive_the_daemon(packed(), Threads::One, kills());
}

#[test]
fn guests_with_packed_rings_of_any_size_and_small_buffers_lose_nothing_when_the_daemon_is_killed() {
    // Frames of 200 bytes over three buffers each; no event index.
    let guest = GuestOptions {
        entries: 320,
        receive_len: 80,
        event_idx: false,
        in_order: true,
        ..packed()
    };
    survive_the_daemon(guest, Threads::One, kills());
}

#[test]
fn two_poll_threads_into_packed_rings_lose_nothing_when_the_daemon_is_killed() {
    survive_the_daemon(packed(), Threads::Two, kills());
}

#[test]
fn two_poll_threads_into_one_receiver_lose_nothing_when_the_daemon_is_killed() {
    survive_the_daemon(GuestOptions::default(), Threads::Two, kills());
}

/// A guest with packed rings, and one with split rings, whose daemon is killed in the middle of
/// their lives; `lost` does something to the records of packed rings. The guest with the packed
/// rings has started anew when this returns, and all is as it was.
fn start_anew(while_away: bool, lost: impl Fn(&Path)) {
    let (state, options) = with_ring_state();
    let daemon = Daemon::start_in(short_tempdir(), &options);
    let rams = [packed(), GuestOptions::default(), GuestOptions::default()].map(Ram::new);
    let attach = |guest: &mut Guest<'_>, daemon: &Daemon, port: usize| {
        guest.detach();
        guest.attach(&daemon.sockets()[port]);
    };
    let mut guests: Vec<Guest<'_>> = rams.iter().map(Guest::new).collect();
    for (port, guest) in guests.iter_mut().enumerate() {
        attach(guest, &daemon, port);
    }
    let flows = [(0, 1), (1, 0), (1, 2), (2, 1)];
    let mut exchange = Exchange::new(guests, 1, &flows, 16, 200);
    exchange.meet();
    // A lap and a part of one.
    exchange.exchange(900);
    exchange.drain();
    let mut guests = exchange.guests;
    let records = fs::read_dir(state.path()).unwrap().count();
    assert_eq!(records, 2);
    let daemon = Daemon::start_in(
        {
            let dir = daemon.kill();
            lost(state.path());
            dir
        },
        &options,
    );
    if while_away {
        guests[0] = Guest::new(&rams[0]);
    }
    for (port, guest) in guests.iter_mut().enumerate() {
        attach(guest, &daemon, port);
    }
    daemon.settle();
    if !while_away {
        // Whatever becomes of these, nobody else feels it.
        for number in 0..8 {
            guests[0].try_send(&frame(mac(2), mac(1), number, 100));
            guests[1].try_send(&frame(mac(1), mac(2), number, 100));
        }
        daemon.settle();
        let others = guests.drain(1..).collect();
        let mut pair = Exchange::new(others, 2, &[(0, 1), (1, 0)], 16, 200);
        pair.meet();
        pair.exchange(500);
        pair.drain();
        guests.append(&mut pair.guests);
        guests[0].reboot(packed());
        daemon.settle();
        while guests[1].try_receive().is_some() {}
    }
    let mut exchange = Exchange::new(guests, 1, &flows, 16, 300);
    exchange.meet();
    exchange.exchange(900);
    exchange.drain();
    let log = daemon.log();
    assert!(!log.contains("panicked") && !log.contains("ERROR"), "{log}");
    drop(exchange);
    daemon.stop();
}

#[test]
fn a_guest_that_resets_while_its_daemon_is_away_starts_anew() {
    start_anew(true, |_| {});
}

#[test]
fn a_guest_whose_records_are_lost_is_healed_by_its_driver() {
    start_anew(false, |state| {
        for entry in fs::read_dir(state).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
    });
}

#[test]
fn changes_of_ports_are_timed_in_control_and_on_the_poll_threads() {
    let daemon = Daemon::start(&DaemonOptions {
        ports: 2,
        // A thread that sleeps takes nothing over.
        args: vec!["--idle".into(), "busy".into()],
        ..DaemonOptions::default()
    });
    assert!(daemon.pollux(&["port", "remove", "p1"]).status.success());
    daemon.settle();
    let output = daemon.pollux(&["stats", "--json"]).stdout;
    let stats: serde_json::Value = serde_json::from_slice(&output).unwrap();
    assert_eq!(stats["port_add"]["count"], 2);
    assert_eq!(stats["port_remove"]["count"], 1);
    let thread = &stats["poll_threads"][0];
    let taken_over = thread["takeover_length"]["count"].as_u64().unwrap();
    assert!((1..=3).contains(&taken_over), "{thread}");
    assert!(thread["off_cpu_seconds"].as_f64().unwrap() >= 0.0);
    assert_eq!(thread["busy_seconds"], 0.0, "there was no frame");
    daemon.stop();
}
