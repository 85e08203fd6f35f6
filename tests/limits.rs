//! What the system refuses at run time is an answer: it costs whoever asked for it, and nothing
//! stays behind. And what frontends and operators make the switch do keeps off the poll threads'
//! CPUs, at a pace.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, Ram};
use common::many::{ManyQueues, ManyRam};
use common::traffic::{Exchange, attach};
use common::wait_for;
use vhost::vhost_user::message::FrontendReq;

/// A user without any other process; limits of threads do not hold for root.
const USER: u32 = 61_234;

fn daemon(ports: usize) -> Daemon {
    let root = rustix::process::geteuid().is_root();
    Daemon::start(&DaemonOptions {
        ports,
        user: root.then_some(USER),
        ..DaemonOptions::default()
    })
}

/// A soft limit of a daemon, lowered until this is dropped. Its own user does that, who may.
struct Lowered {
    pid: String,
    what: &'static str,
    before: String,
}

impl Lowered {
    /// `what` by its names in `prlimit` and in `/proc`.
    fn to(daemon: &Daemon, (what, name): (&'static str, &str), limit: usize) -> Lowered {
        let pid = daemon.pid().to_string();
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        let before = line.unwrap().split_whitespace().next().unwrap().to_string();
        let lowered = Lowered { pid, what, before };
        lowered.set(&limit.to_string());
        lowered
    }

    /// No thread can be made.
    fn threads(daemon: &Daemon) -> Lowered {
        Lowered::to(daemon, ("nproc", "Max processes"), 0)
    }

    fn set(&self, soft: &str) {
        let mut command = Command::new("prlimit");
        command.args(["--pid", &self.pid, &format!("--{}={soft}:", self.what)]);
        if rustix::process::geteuid().is_root() {
            command.uid(USER).gid(USER);
        }
        assert!(command.status().unwrap().success(), "{command:?}");
    }
}

impl Drop for Lowered {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.set(&self.before);
        }
    }
}

/// The head and body of an answer of the API.
fn get(daemon: &Daemon, path: &str) -> String {
    let mut stream = UnixStream::connect(daemon.dir().join("api.sock")).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn without_threads_each_request_is_refused_and_nothing_is_kept() {
    let daemon = daemon(3);
    let rams = [(); 2].map(|()| Ram::new(GuestOptions::default()));
    let guests = attach(&daemon, &rams, 0);
    let mut exchange = Exchange::new(guests, 1, &[(0, 1), (1, 0)], 8, 200);
    exchange.meet();
    let none = Lowered::threads(&daemon);
    // More of each than there may be at once.
    for _ in 0..40 {
        for path in [
            "/v1/ports/p0",
            "/v1/events",
            "/v1/capture",
            "/v1/trace?port=p0&count=1",
        ] {
            let answer = get(&daemon, path);
            assert!(answer.starts_with("HTTP/1.1 503 "), "{path}: {answer}");
            assert!(answer.contains("a thread ("), "{path}: {answer}");
        }
        exchange.exchange(20);
    }
    // A frontend is hung up on, and may come again.
    let mut refused = UnixStream::connect(&daemon.sockets()[2]).unwrap();
    assert_eq!(refused.read(&mut [0; 1]).unwrap(), 0);
    daemon.assert_logged("a session cannot have a thread");
    assert!(daemon.log().contains("TasksMax="), "{}", daemon.log());
    exchange.exchange(1000);
    drop(none);

    for _ in 0..40 {
        let answer = get(&daemon, "/v1/ports/p0");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
    let captured = daemon.try_pollux(&["capture", "p0", "--seconds", "1"]);
    assert_eq!(captured.0, 0, "{}", captured.1);
    let observers = get(&daemon, "/v1/observers");
    assert!(observers.ends_with("\r\n\r\n[]"), "{observers}");
    let ram = Ram::new(GuestOptions::default());
    let mut guest = Guest::new(&ram);
    guest.attach(&daemon.sockets()[2]);
    wait_for("the guest", || daemon.state("p2").0 == "running");
    exchange.drain();
    guest.detach();
    drop(exchange);
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    daemon.stop();
}

/// The limit that leaves the daemon so many descriptors. A limit is one of numbers, of which some
/// are free in between.
fn limit_of_descriptors(daemon: &Daemon, left: usize) -> usize {
    let open = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
    let number = |entry: std::io::Result<std::fs::DirEntry>| {
        let name = entry.unwrap().file_name();
        name.to_str().unwrap().parse::<usize>().unwrap()
    };
    let open: std::collections::BTreeSet<usize> = open.map(number).collect();
    let mut free = (0..).filter(|number| !open.contains(number));
    free.nth(left).unwrap()
}

#[test]
fn a_poll_thread_that_cannot_be_made_is_refused_by_the_name_of_the_limit() {
    let daemon = daemon(1);
    // The connection of the request, and one more.
    let files = ("nofile", "Max open files");
    let few = Lowered::to(&daemon, files, limit_of_descriptors(&daemon, 2));
    // As often as there are numbers for poll threads, and more.
    for _ in 0..80 {
        let (code, said) = daemon.try_pollux(&["poll", "add"]);
        assert_eq!(code, 1, "{said}");
        assert!(
            said.contains("a descriptor (") && said.contains("LimitNOFILE="),
            "{said}"
        );
    }
    drop(few);
    assert_eq!(daemon.try_pollux(&["poll", "add"]).0, 0);
    let threads = daemon.poll_threads();
    let numbers = threads.as_array().unwrap().iter();
    let numbers: Vec<_> = numbers.map(|thread| &thread["thread"]).collect();
    assert_eq!(numbers, [0, 1]);
    daemon.stop();
}

/// The threads of a daemon by name, with the CPUs that each may use.
fn places(daemon: &Daemon) -> BTreeMap<String, String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    tasks
        .flatten()
        .filter_map(|task| {
            let status = std::fs::read_to_string(task.path().join("status")).ok()?;
            let field = |name: &str| {
                let value = status.lines().find_map(|line| line.strip_prefix(name));
                value.unwrap().trim().to_string()
            };
            Some((field("Name:"), field("Cpus_allowed_list:")))
        })
        .collect()
}

#[test]
fn threads_that_do_not_poll_keep_off_the_poll_threads_cpus() {
    let all = places_of_this_test();
    let [first, .., last] = all[..] else {
        eprintln!("SKIPPED: there is one CPU");
        return;
    };
    let list = |cpus: &[usize]| cpus_as_list(cpus);
    let daemon = Daemon::start(&DaemonOptions {
        ports: 1,
        args: vec!["--poll-cpus".into(), last.to_string()],
        ..DaemonOptions::default()
    });
    let ram = Ram::new(GuestOptions::default());
    let mut guest = Guest::new(&ram);
    guest.attach(&daemon.sockets()[0]);
    let check = |polls: &[(&str, usize)]| {
        let rest = all.iter().copied();
        let rest: Vec<_> = rest
            .filter(|cpu| polls.iter().all(|(_, taken)| taken != cpu))
            .collect();
        let rest = list(if rest.is_empty() { &all } else { &rest });
        let places = places(&daemon);
        for name in ["pollux", "api", "log", "reaper", "closer", "session-p0"] {
            assert_eq!(places[name], rest, "{name} of {places:?}");
        }
        for (name, cpu) in polls {
            assert_eq!(places[*name], cpu.to_string(), "{name} of {places:?}");
        }
    };
    check(&[("poll-0", last)]);
    let added = daemon.try_pollux(&["poll", "add", "--cpu", &first.to_string()]);
    assert_eq!(added.0, 0, "{}", added.1);
    check(&[("poll-0", last), ("poll-1", first)]);
    assert_eq!(daemon.try_pollux(&["poll", "remove", "0"]).0, 0);
    check(&[("poll-1", first)]);
    guest.detach();
    drop(guest);
    daemon.stop();
}

fn places_of_this_test() -> Vec<usize> {
    pollux::sys::affinity::allowed_cpus().unwrap()
}

/// In the kernel's form: `0-3,8`.
fn cpus_as_list(cpus: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &cpu in cpus {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => runs.push((cpu, cpu)),
        }
    }
    let runs = runs.iter().map(|(first, last)| {
        if first == last {
            first.to_string()
        } else {
            format!("{first}-{last}")
        }
    });
    runs.collect::<Vec<_>>().join(",")
}

/// Messages that a port takes at once, and a second then, as docs/operating.md says.
const BURST: u32 = 16_384;
const RATE: u32 = 2_000;

#[test]
fn messages_without_end_are_taken_at_a_pace_and_a_start_is_not_slowed() {
    const FRONTENDS: usize = 8;
    const MORE: u32 = 4_000;
    let daemon = Daemon::start(&DaemonOptions {
        ports: FRONTENDS + 1,
        queues: 128,
        ..DaemonOptions::default()
    });
    let paced = |port: usize| {
        let port = daemon.port(&format!("p{port}"));
        port["statistics"]["paced_messages"].as_u64().unwrap()
    };
    // All queue pairs that there are, attached in the longest order of messages.
    let ram = ManyRam::new(128);
    let honest = ManyQueues::attach(&ram, &daemon.sockets()[FRONTENDS]);
    assert_eq!(paced(FRONTENDS), 0);
    drop(honest);
    std::thread::scope(|scope| {
        for socket in &daemon.sockets()[..FRONTENDS] {
            scope.spawn(move || {
                let begun = Instant::now();
                ask(&UnixStream::connect(socket).unwrap(), BURST + MORE);
                // However fast the machine is.
                let least = Duration::from_secs(1) * MORE / RATE;
                assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
            });
        }
    });
    // It is the port's: who comes back has no other burst.
    let before = paced(0);
    wait_for("a message that waits", || {
        let stream = UnixStream::connect(&daemon.sockets()[0]).unwrap();
        ask(&stream, BURST / 2);
        paced(0) > before
    });
    daemon.stop();
}

/// GET_FEATURES so many times, 64 at once.
fn ask(mut stream: &UnixStream, times: u32) {
    let request = [FrontendReq::GET_FEATURES as u32, 1, 0].map(u32::to_le_bytes);
    let requests = request.concat().repeat(64);
    for _ in 0..times.div_ceil(64) {
        stream.write_all(&requests).unwrap();
        stream.read_exact(&mut [0; 64 * 20]).unwrap();
    }
}
