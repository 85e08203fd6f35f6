//! Guests and ports that come, go, die and misbehave, while bystanders exchange frames and must not
//! lose one.
//!
//! `POLLUX_LONG=1` runs as many cycles as the acceptance asks for.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, RECEIVE, Ram, TRANSMIT};
use common::holdings::Holdings;
use common::process::Process;
use common::traffic::{Bystanders, Exchange, frame, mac, read};
use common::{long, pause, wait_for};
use pollux::bench::frontend::Frontend;
use rustix::process::Signal;
use vhost::vhost_user::message::FrontendReq;

/// Ports 0 and 1 are the bystanders', 2 the victim's, 3 its correspondent's.
const VICTIM: usize = 2;
const SINK: usize = 3;
/// Socket and kind of the guest that a child of the test plays.
const VICTIM_SOCKET: &str = "POLLUX_TEST_VICTIM";
const VICTIM_CYCLE: &str = "POLLUX_TEST_VICTIM_CYCLE";
const LIMIT: Duration = Duration::from_secs(20);

fn daemon() -> Daemon {
    Daemon::start(&DaemonOptions {
        ports: 4,
        ..DaemonOptions::default()
    })
}

fn bystanders(daemon: &Daemon) -> Bystanders {
    Bystanders::start([&daemon.sockets()[0], &daemon.sockets()[1]])
}

/// What a client command answered: exit code and everything it said.
fn pollux(daemon: &Daemon, arguments: &[&str]) -> (i32, String) {
    let output = daemon.pollux(arguments);
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.code().unwrap(),
        String::from_utf8(said).unwrap(),
    )
}

fn state(daemon: &Daemon, port: &str) -> String {
    daemon.port(port)["state"].as_str().unwrap().to_string()
}

/// xorshift64: enough for moments of death.
struct Random(u64);

impl Random {
    fn new() -> Random {
        let now = std::time::SystemTime::now();
        let since = now.duration_since(std::time::UNIX_EPOCH).unwrap();
        let seed = std::env::var("POLLUX_SEED")
            .ok()
            .and_then(|s| s.parse().ok());
        let seed = seed.unwrap_or(since.as_nanos() as u64 | 1);
        println!("POLLUX_SEED={seed}");
        Random(seed)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Every kind of guest in turn.
fn kind(cycle: usize) -> GuestOptions {
    match cycle % 4 {
        0 => GuestOptions::default(),
        1 => GuestOptions::cloud_hypervisor(),
        2 => GuestOptions {
            packed: true,
            ..GuestOptions::default()
        },
        _ => GuestOptions {
            mergeable: false,
            event_idx: false,
            calls: true,
            ..GuestOptions::default()
        },
    }
}

// ---- frontends that die -------------------------------------------------------------------------

/// The body of the child that [`killed_guests_leave_nothing_behind`] kills; no test by itself.
#[test]
fn victim() {
    let Some(socket) = std::env::var_os(VICTIM_SOCKET) else {
        return;
    };
    let cycle: usize = std::env::var(VICTIM_CYCLE).unwrap().parse().unwrap();
    let ram = Ram::new(kind(cycle));
    let mut guest = Guest::new(&ram);
    guest.attach(Path::new(&socket));
    // Talks until it is killed, and at most 16 frames ahead of its correspondent.
    let (mut sent, mut answered) = (0, 0);
    let mut last = Instant::now();
    loop {
        let from = cycle as u64 * 1_000_000;
        while let Some(bytes) = guest.try_receive() {
            let label = read(&bytes);
            if label.from == mac(4) && label.sequence >= from {
                answered = answered.max(label.sequence - from + 1);
                last = Instant::now();
            }
        }
        // Until the switch has taken the port over, frames may get lost.
        if last.elapsed() > Duration::from_millis(100) {
            sent = answered;
            last = Instant::now();
        }
        if sent < answered + 16 {
            guest.try_send(&frame(mac(4), mac(3), from + sent, 300));
            sent += 1;
        } else {
            pause();
        }
    }
}

fn start_victim(socket: &Path, cycle: usize) -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "victim", "--nocapture"]);
    command.env(VICTIM_SOCKET, socket);
    command.env(VICTIM_CYCLE, cycle.to_string());
    Process::spawn("victim", &mut command)
}

/// Sends back what comes from the victim, and returns the newest number.
fn answer(sink: &mut Guest<'_>) -> Option<u64> {
    let mut newest = None;
    while let Some(bytes) = sink.try_receive() {
        let label = read(&bytes);
        if label.from == mac(3) && label.to == mac(4) {
            sink.try_send(&frame(mac(3), mac(4), label.sequence, 300));
            newest = newest.max(Some(label.sequence));
        }
    }
    newest
}

#[test]
fn killed_guests_leave_nothing_behind() {
    let cycles = if long() { 200 } else { 20 };
    let mut random = Random::new();
    let mut daemon = daemon();
    let bystanders = bystanders(&daemon);
    let ram = Ram::new(GuestOptions::default());
    let mut sink = Guest::new(&ram);
    sink.attach(&daemon.sockets()[SINK]);
    wait_for("the sink", || state(&daemon, "p3") == "running");
    let before = Holdings::of(&daemon);
    for cycle in 0..cycles {
        let mut victim = start_victim(&daemon.sockets()[VICTIM], cycle);
        let first = cycle as u64 * 1_000_000;
        wait_for("a frame of the victim", || {
            assert_eq!(victim.ended(), None, "{}", victim.words());
            answer(&mut sink).is_some_and(|number| number >= first)
        });
        // In the middle of its traffic, a random while later.
        let end = Instant::now() + Duration::from_micros(random.below(20_000));
        while Instant::now() < end {
            answer(&mut sink);
        }
        drop(victim);
        bystanders.go_on(20);
    }
    daemon.assert_alive();
    before.wait_for_return(&daemon);
    bystanders.finish();
    drop(sink);
    daemon.stop();
}

#[test]
fn a_frontend_that_is_stopped_costs_nobody_and_goes_on_afterwards() {
    let mut daemon = daemon();
    let bystanders = bystanders(&daemon);
    let ram = Ram::new(GuestOptions::default());
    let mut sink = Guest::new(&ram);
    sink.attach(&daemon.sockets()[SINK]);
    let before = Holdings::of(&daemon);
    let mut victim = start_victim(&daemon.sockets()[VICTIM], 0);
    let mut newest = None;
    wait_for("a frame of the victim", || {
        assert_eq!(victim.ended(), None, "{}", victim.words());
        newest = answer(&mut sink);
        newest.is_some()
    });
    victim.signal(Signal::STOP);
    // What is sent to it is dropped at its port, once its ring is full.
    wait_for("its ring to be full", || {
        for _ in 0..100 {
            newest = newest.max(answer(&mut sink));
            sink.try_send(&frame(mac(3), mac(4), 0, 300));
        }
        daemon.dropped("p2", "tx", "egress_ring_full") > 0
    });
    let end = Instant::now() + Duration::from_secs(if long() { 60 } else { 2 });
    while Instant::now() < end {
        bystanders.go_on(50);
        assert_eq!(state(&daemon, "p2"), "running");
    }
    newest = newest.max(answer(&mut sink));
    victim.signal(Signal::CONT);
    wait_for("a frame of the victim that goes on", || {
        answer(&mut sink) > newest
    });
    // Stopped once more, its port goes as quickly as any.
    victim.signal(Signal::STOP);
    assert_eq!(pollux(&daemon, &["port", "remove", "p2"]).0, 0);
    let spec = format!("p2,socket={}", daemon.sockets()[VICTIM].display());
    assert_eq!(pollux(&daemon, &["port", "add", &spec]).0, 0);
    before.wait_for_return(&daemon);
    drop(victim);
    daemon.assert_alive();
    bystanders.finish();
    drop(sink);
    daemon.stop();
}

#[test]
fn a_frontend_may_reconnect_every_100_ms_for_ever() {
    let daemon = daemon();
    let bystanders = bystanders(&daemon);
    let sink_ram = Ram::new(GuestOptions::default());
    let mut sink = Guest::new(&sink_ram);
    sink.attach(&daemon.sockets()[SINK]);
    let ram = Ram::new(GuestOptions::cloud_hypervisor());
    let mut guest = Guest::new(&ram);
    for round in 0..if long() { 300 } else { 20 } {
        let began = Instant::now();
        // The predecessor may not be cleaned up yet: the next one waits, and is served.
        guest.detach();
        guest.attach(&daemon.sockets()[VICTIM]);
        let mut sent = 0;
        wait_for("a frame after a reconnection", || {
            sent += u64::from(guest.try_send(&frame(mac(4), mac(3), round, 100)));
            answer(&mut sink) == Some(round)
        });
        assert!(sent > 0);
        while began.elapsed() < Duration::from_millis(100) {
            pause();
        }
    }
    bystanders.finish();
    drop((guest, sink));
    daemon.stop();
}

#[test]
fn a_second_live_frontend_is_refused_and_the_first_goes_on() {
    let daemon = daemon();
    let rams = [(); 3].map(|()| Ram::new(GuestOptions::default()));
    let guests = rams[..2].iter().zip(daemon.sockets()).map(|(ram, socket)| {
        let mut guest = Guest::new(ram);
        guest.attach(socket);
        guest
    });
    let mut exchange = Exchange::new(guests.collect(), 1, &[(0, 1), (1, 0)], 8, 100);
    exchange.meet();
    let mut second = Guest::new(&rams[2]);
    for _ in 0..4 {
        let refused = second.try_attach(&daemon.sockets()[0]);
        assert!(refused.is_err());
    }
    exchange.exchange(1000);
    exchange.drain();
    wait_for("the count", || {
        daemon.port("p0")["second_frontend"]["refused"] == 4
    });
    let (_, text) = pollux(&daemon, &["port", "show", "p0"]);
    assert!(
        text.contains("second frontend   refused 4 times in "),
        "{text}"
    );
    // Once, and then how many there were.
    drop((exchange, second));
    daemon.assert_logged("a second frontend was refused 4 times in ");
    let log = daemon.log();
    let told = log
        .matches("a second frontend was refused: one is connected")
        .count();
    assert_eq!(told, 1, "{log}");
    assert!(daemon.port("p0")["second_frontend"].is_null());
    daemon.stop();
}

#[test]
fn frontends_that_crowd_each_other_out_beside_a_live_one_are_told_of() {
    let daemon = daemon();
    let ram = Ram::new(GuestOptions::default());
    let mut guest = Guest::new(&ram);
    guest.attach(&daemon.sockets()[VICTIM]);
    let mut others = Vec::new();
    wait_for("the refusal", || {
        // Each comes before there is an end to the doubt about the one before it.
        others.push(UnixStream::connect(&daemon.sockets()[VICTIM]).unwrap());
        daemon.log().contains("a second frontend was refused")
    });
    drop((guest, others));
    daemon.stop();
}

// ---- ports that come and go ---------------------------------------------------------------------

/// How far a frontend has come when its port is removed.
const STAGES: [&str; 6] = [
    "connected",
    "negotiated",
    "features",
    "memory",
    "one ring",
    "running",
];

/// Brings a frontend to a stage.
fn advance(guest: &mut Guest<'_>, socket: &Path, stage: &str) {
    if stage == "running" {
        return guest.attach(socket);
    }
    let frontend = if stage == "connected" {
        Frontend::connect(socket, LIMIT).unwrap()
    } else {
        guest.negotiate(socket).unwrap()
    };
    guest.frontend = Some(frontend);
    let features = guest.frontend.as_ref().unwrap().features();
    let region = guest.region();
    let reached = STAGES.iter().position(|name| *name == stage).unwrap();
    if reached >= 2 {
        guest
            .frontend
            .as_mut()
            .unwrap()
            .set_features(features)
            .unwrap();
    }
    let frontend = guest.frontend.as_ref().unwrap();
    if reached >= 3 {
        frontend.set_mem_table(&[region]).unwrap();
    }
    if reached >= 4 {
        guest.start_ring(frontend, TRANSMIT).unwrap();
    }
}

#[test]
fn a_port_is_removed_in_every_stage_and_its_name_and_socket_are_free_at_once() {
    let daemon = daemon();
    let bystanders = bystanders(&daemon);
    let sink_ram = Ram::new(GuestOptions::default());
    let mut sink = Guest::new(&sink_ram);
    sink.attach(&daemon.sockets()[SINK]);
    let socket = &daemon.sockets()[VICTIM];
    let spec = format!("p{VICTIM},socket={}", socket.display());
    let before = Holdings::of(&daemon);
    for cycle in 0..if long() { 20 } else { 2 } {
        for stage in STAGES {
            let ram = Ram::new(kind(cycle));
            let mut guest = Guest::new(&ram);
            advance(&mut guest, socket, stage);
            // Traffic to the port, as far as it takes any.
            for number in 0..50 {
                sink.try_send(&frame(mac(3), mac(4), number, 300));
            }
            assert_eq!(pollux(&daemon, &["port", "remove", "p2"]).0, 0, "{stage}");
            assert_eq!(pollux(&daemon, &["port", "show", "p2"]).0, 4, "{stage}");
            assert!(!socket.exists(), "{stage}");
            let (code, said) = pollux(&daemon, &["port", "add", &spec]);
            assert_eq!(code, 0, "{stage}: {said}");
            wait_for("the session to be cut off", || guest.is_cut_off());
            // The next tenant of name, socket and slot works.
            let ram = Ram::new(GuestOptions::default());
            let mut next = Guest::new(&ram);
            next.attach(socket);
            wait_for("a frame of the next tenant", || {
                next.try_send(&frame(mac(4), mac(3), 7, 100));
                answer(&mut sink) == Some(7)
            });
        }
        bystanders.go_on(20);
    }
    before.wait_for_return(&daemon);
    bystanders.finish();
    drop(sink);
    daemon.stop();
}

#[test]
fn ports_come_and_go_a_hundred_times_under_traffic() {
    let daemon = daemon();
    let bystanders = bystanders(&daemon);
    let before = Holdings::of(&daemon);
    for n in 0..if long() { 1000 } else { 100 } {
        let name = format!("extra{}", n % 3);
        let socket = daemon.dir().join(&name);
        let spec = format!("{name},socket={}", socket.display());
        assert_eq!(pollux(&daemon, &["port", "add", &spec]).0, 0);
        assert_eq!(pollux(&daemon, &["port", "remove", &name]).0, 0);
    }
    before.wait_for_return(&daemon);
    bystanders.finish();
    daemon.stop();
}

// ---- hostile frontends --------------------------------------------------------------------------

/// Calls block from the start, or from the middle of the traffic on.
fn calls_that_block(from_the_start: bool) {
    let mut daemon = daemon();
    let bystanders = bystanders(&daemon);
    let sink_ram = Ram::new(GuestOptions::default());
    let mut sink = Guest::new(&sink_ram);
    sink.attach(&daemon.sockets()[SINK]);
    let before = Holdings::of(&daemon);
    let ram = Ram::new(GuestOptions {
        calls: true,
        event_idx: false,
        ..GuestOptions::default()
    });
    let mut guest = Guest::new(&ram);
    if from_the_start {
        guest.block_calls();
    }
    guest.attach(&daemon.sockets()[VICTIM]);
    // Each of these wants a call.
    for number in 0..200 {
        if number == 50 && !from_the_start {
            guest.block_calls();
        }
        let mut came = false;
        wait_for("a frame over the port with the full call", || {
            came |= guest.try_send(&frame(mac(4), mac(3), number, 100));
            answer(&mut sink) == Some(number)
        });
    }
    bystanders.go_on(200);
    assert_eq!(state(&daemon, "p2"), "running");
    daemon.assert_alive();
    drop(guest);
    before.wait_for_return(&daemon);
    bystanders.finish();
    drop(sink);
    daemon.stop();
}

#[test]
fn a_call_descriptor_that_blocks_stops_nobody() {
    calls_that_block(true);
    calls_that_block(false);
}

#[test]
fn notification_descriptors_that_are_no_eventfds_are_refused() {
    let daemon = daemon();
    let (reader, writer) = std::io::pipe().unwrap();
    let file = fs::File::create(daemon.dir().join("file")).unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    let ram = Ram::new(GuestOptions::default());
    let guest = Guest::new(&ram);
    for fd in [reader.as_fd(), writer.as_fd(), file.as_fd(), socket.as_fd()] {
        for request in [FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_KICK] {
            let frontend = guest.negotiate(&daemon.sockets()[VICTIM]).unwrap();
            let body = (RECEIVE as u64).to_le_bytes();
            let refused = frontend.tell(request, &body, &[fd.as_raw_fd()]);
            let refused = format!("{:?}", refused.unwrap_err());
            assert!(refused.contains("Refused"), "{request:?}: {refused}");
            // The session goes on.
            assert!(frontend.get_features().is_ok(), "{request:?}");
        }
    }
    daemon.assert_logged("only eventfds are taken");
    daemon.stop();
}
