//! Captures, traces and mirrors: what they see, what they miss, and that nobody else notices them.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use common::capture::{Capture, Seen, begin, counts, read, tshark};
use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, Ram};
use common::scene::Scene;
use common::traffic::{BROADCAST, frame, mac};
use common::{long, wait_for};
use rustix::process::Signal;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);
/// Long enough for what must not come.
const A_WHILE: Duration = Duration::from_millis(300);

fn daemon(ports: usize) -> Daemon {
    Daemon::start(&DaemonOptions {
        ports,
        ..DaemonOptions::default()
    })
}

fn rams(count: usize) -> Vec<Ram> {
    let rams = (0..count).map(|_| Ram::new(GuestOptions::default()));
    rams.collect()
}

/// Guests on the ports, in order, which the switch knows as `mac(1)`, `mac(2)` and so on.
fn guests<'r>(daemon: &Daemon, rams: &'r [Ram]) -> Vec<Guest<'r>> {
    let mut guests: Vec<Guest<'r>> = rams.iter().map(Guest::new).collect();
    for (n, guest) in guests.iter_mut().enumerate() {
        guest.attach(&daemon.sockets()[n]);
        let port = format!("p{n}");
        wait_for(&port, || daemon.state(&port).0 == "running");
    }
    daemon.settle();
    for n in 0..guests.len() {
        guests[n].send(&frame(BROADCAST, mac(n as u8 + 1), 0, 60));
        let others = guests
            .iter_mut()
            .enumerate()
            .filter(|(other, _)| *other != n);
        for (_, other) in others {
            assert!(other.receive(SOON).is_some());
        }
    }
    guests
}

fn do_it(daemon: &Daemon, args: &[&str]) -> String {
    let (code, said) = daemon.try_pollux(args);
    assert_eq!(code, 0, "{args:?}: {said}");
    said
}

/// The observers, by name and counters, as the API tells.
fn observers(daemon: &Daemon) -> Vec<Value> {
    let socket = daemon.dir().join("api.sock");
    let client = pollux::api::client::Client::new(socket);
    let all = client.get("/v1/observers").unwrap().value().unwrap();
    all.as_array().unwrap().clone()
}

fn bytes_of(seen: &[Seen], port: &str, direction: &str) -> Vec<Vec<u8>> {
    let of = |one: &&Seen| one.port == port && one.direction == direction;
    seen.iter()
        .filter(of)
        .map(|one| one.bytes.clone())
        .collect()
}

#[test]
fn a_capture_is_byte_for_byte_what_was_sent_and_delivered() {
    let daemon = daemon(2);
    let rams = rams(2);
    let mut guests = guests(&daemon, &rams);
    let capture = Capture::start(&daemon, "p0.pcapng", &["p0"]);
    let all = Capture::start(&daemon, "all.pcapng", &["all"]);
    let short = Capture::start(&daemon, "short.pcapng", &["p0", "--snaplen", "100"]);
    let sizes = [60, 64, 127, 128, 129, 200, 1514, 2036, 9000];
    let (mut there, mut back) = (Vec::new(), Vec::new());
    for n in 0..300 {
        let size = sizes[n as usize % sizes.len()];
        for (from, to, sent) in [(0, 1, &mut there), (1, 0, &mut back)] {
            let bytes = frame(mac(to as u8 + 1), mac(from as u8 + 1), n, size);
            // In one piece, or in several.
            let cuts: &[usize] = if n % 2 == 0 { &[] } else { &[12, 30, 50] };
            while !guests[from].try_send_cut(&bytes, cuts) {}
            assert_eq!(guests[to].receive(SOON).as_ref(), Some(&bytes));
            sent.push(bytes);
        }
    }
    let (captured, missed, file) = capture.end();
    assert_eq!((captured, missed), (600, 0));
    let seen = read(&file);
    assert_eq!(bytes_of(&seen, "p0", "1"), there);
    assert_eq!(bytes_of(&seen, "p0", "2"), back);
    // Nanoseconds, ascending, and of now.
    let times: Vec<f64> = seen.iter().map(|one| one.time.parse().unwrap()).collect();
    assert!(times.is_sorted());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    assert!((now.unwrap().as_secs_f64() - times[0]).abs() < 300.0);
    let fine = seen.iter().filter(|one| !one.time.ends_with("000"));
    assert!(fine.count() > 300, "the clock has no nanoseconds");
    // Each frame on both ports.
    let (captured, missed, file) = all.end();
    assert_eq!((captured, missed), (1200, 0));
    let seen = read(&file);
    for (port, direction, sent) in [("p0", "1", &there), ("p1", "2", &there), ("p1", "1", &back)] {
        assert_eq!(
            &bytes_of(&seen, port, direction),
            sent,
            "{port} {direction}"
        );
    }
    // Cut off, with their lengths.
    let (_, _, file) = short.end();
    let seen = read(&file);
    for (one, sent) in seen.iter().filter(|one| one.direction == "1").zip(&there) {
        assert_eq!(
            (one.len, &one.bytes[..]),
            (sent.len(), &sent[..sent.len().min(100)])
        );
    }
    assert_eq!(observers(&daemon), Vec::<Value>::new());
    daemon.stop();
}

#[test]
fn lines_filters_and_limits() {
    let daemon = daemon(2);
    let rams = rams(2);
    let mut guests = guests(&daemon, &rams);
    let mut run = |args: &[&str], frames: u64| -> String {
        let mut process = begin(&daemon, &[&["capture"], args].concat());
        for n in 0..frames {
            guests[0].send(&frame(mac(2), mac(1), n, 80));
            guests[1].receive(SOON).unwrap();
            guests[1].send(&frame(mac(1), mac(2), n, 90));
            guests[0].receive(SOON).unwrap();
        }
        assert_eq!(
            process.wait(SOON).unwrap().code(),
            Some(0),
            "{}",
            process.words()
        );
        process.out.text()
    };
    let text = run(&["p1", "--count", "3", "--direction", "rx"], 3);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    // The client's number, not that of the frames in the buffers.
    let ends = "ends: it has as many frames as asked for; 3 frames, ";
    daemon.assert_logged(&format!("capture \"capture-1\" {ends}"));
    for line in lines {
        let words = "p1:0 rx 52:54:00:00:01:02 > 52:54:00:00:01:01, ethertype 0x88b5, length 90";
        assert!(line.ends_with(words), "{line}");
    }
    let text = run(
        &[
            "all",
            "--count",
            "2",
            "--json",
            "--filter",
            "less 80 and ether dst 52:54:00:00:01:02",
        ],
        2,
    );
    let frames: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(frames.len(), 2, "{text}");
    assert_eq!(
        (&frames[0]["port"], &frames[0]["direction"]),
        (&"p0".into(), &"rx".into())
    );
    assert_eq!(
        (&frames[1]["port"], &frames[1]["direction"]),
        (&"p1".into(), &"tx".into())
    );
    assert_eq!(
        (&frames[1]["length"], &frames[1]["queue"]),
        (&80.into(), &0.into())
    );
    assert_eq!(frames[0]["bytes"].as_str().unwrap().len(), 160);
    // By time, with nothing to be seen.
    assert_eq!(run(&["p0", "--seconds", "1", "--filter", "arp"], 3), "");
    for (args, code, words) in [
        (vec!["capture", "p7"], 4, "no such port \"p7\""),
        (
            vec!["capture", "p0", "--filter", "tcp or"],
            2,
            "is missing at the end",
        ),
        (vec!["capture", "p0", "--snaplen", "0"], 2, "1..=65549"),
        (
            vec!["capture", "p0", "--direction", "up"],
            2,
            "use rx, tx or both",
        ),
        (vec!["capture", "p0", "--rotate", "1M"], 2, "--write"),
        (
            vec!["capture", "p0", "-w", "/no/such/file"],
            5,
            "cannot write to",
        ),
        (vec!["trace", "p7"], 4, "no such port \"p7\""),
        (vec!["trace", "p0", "--count", "0"], 2, "1..=10000"),
        (
            vec!["trace", "all"],
            2,
            "a trace follows the frames of one port",
        ),
        (
            vec!["mirror", "add", "m", "--from", "all", "--to", "p0"],
            2,
            "a mirror names each of its ports; `all` is for captures",
        ),
        (
            vec!["mirror", "add", "m", "--from", "p0", "--to", "all"],
            2,
            "a mirror names each of its ports",
        ),
        (
            vec!["mirror", "add", "m", "--from", "p0,p0", "--to", "p1"],
            2,
            "port \"p0\" is named twice",
        ),
        (
            vec!["capture", "p0", "-w", "-", "--rotate", "1M"],
            2,
            "--rotate is for files",
        ),
        (
            vec!["mirror", "add", "m", "--from", "p0", "--to", "p0"],
            2,
            "port \"p0\" cannot get copies of its own frames",
        ),
        (
            vec!["mirror", "add", "m", "--from", "p0", "--to", "p9"],
            4,
            "no such port \"p9\"",
        ),
        (
            vec!["mirror", "add", "m/m", "--from", "p0", "--to", "p1"],
            2,
            "mirror name",
        ),
        (vec!["mirror", "remove", "m"], 4, "no such mirror \"m\""),
        (vec!["mirror", "remove", "m", "--if-exists"], 0, ""),
    ] {
        let (status, said) = daemon.try_pollux(&args);
        assert_eq!(status, code, "{args:?}: {said}");
        assert!(said.contains(words), "{args:?}: {said}");
    }
    daemon.stop();
}

#[test]
fn dropped_frames_are_captured_with_their_reason() {
    let daemon = daemon(3);
    let rams = rams(2);
    let mut guests = guests(&daemon, &rams);
    let nobody = "52:54:00:00:01:99";
    do_it(&daemon, &["fdb", "add", nobody, "--port", "p2"]);
    let capture = Capture::start(&daemon, "drops.pcapng", &["all", "--drops"]);
    let entry = Capture::start(
        &daemon,
        "rx.pcapng",
        &["p0", "--drops", "--direction", "rx"],
    );
    let to_itself = frame(mac(1), mac(1), 1, 70);
    let from_nobody = frame(mac(2), BROADCAST, 2, 71);
    let link_local = frame([1, 0x80, 0xc2, 0, 0, 0xe], mac(1), 3, 72);
    let unconnected = frame([0x52, 0x54, 0, 0, 1, 0x99], mac(1), 4, 73);
    for bytes in [&to_itself, &from_nobody, &link_local, &unconnected] {
        guests[0].send(bytes);
    }
    // Shorter than a header: there are no bytes to be shown.
    guests[0].send_raw(12 + 13);
    guests[0].send(&frame(mac(2), mac(1), 5, 60));
    assert!(guests[1].receive(SOON).is_some());
    let (captured, _, file) = capture.end();
    assert_eq!(captured, 5);
    let seen: Vec<_> = read(&file)
        .into_iter()
        .map(|one| (one.port, one.direction, one.comment, one.len, one.bytes))
        .collect();
    let dropped = |port: &str, direction: &str, reason: &str, len: usize, bytes: Vec<u8>| {
        (
            port.to_string(),
            direction.to_string(),
            reason.to_string(),
            len,
            bytes,
        )
    };
    assert_eq!(
        seen.iter()
            .filter(|one| one.2 == "rx_short_frame")
            .collect::<Vec<_>>(),
        [&dropped("p0", "1", "rx_short_frame", 13, Vec::new())]
    );
    for expected in [
        dropped("p0", "1", "same_port", 70, to_itself),
        dropped("p0", "1", "rx_bad_source", 71, from_nobody),
        dropped("p0", "1", "link_local_filtered", 72, link_local),
        dropped("p2", "2", "egress_not_ready", 73, unconnected),
    ] {
        assert!(seen.contains(&expected), "{expected:?}\n{seen:?}");
    }
    let (captured, _, _) = entry.end();
    assert_eq!(captured, 4);
    daemon.stop();
}

/// Frames that each port has counted.
fn frames(daemon: &Daemon) -> Vec<u64> {
    let count = |port: &Value| -> u64 {
        let of = |direction| port["statistics"][direction]["frames"].as_u64().unwrap();
        ["rx", "tx"].into_iter().map(of).sum()
    };
    daemon.ports().iter().map(count).collect()
}

/// Packet blocks in a file, as `pcap-file` reads them.
fn packets(path: &std::path::Path) -> u64 {
    let file = std::fs::File::open(path).unwrap();
    let mut reader = pcap_file::pcapng::PcapNgReader::new(std::io::BufReader::new(file)).unwrap();
    let mut count = 0;
    while let Some(block) = reader.next_block() {
        count += u64::from(matches!(
            block.unwrap(),
            pcap_file::pcapng::Block::EnhancedPacket(_)
        ));
    }
    count
}

#[test]
fn at_full_rate_every_frame_is_captured_or_counted_as_missed() {
    let daemon = daemon(2);
    let capture = Capture::start(&daemon, "all.pcapng", &["all"]);
    let slow = Capture::start(&daemon, "slow.pcapng", &["p0"]);
    slow.process.signal(Signal::STOP);
    let seconds = if long() { "20" } else { "3" };
    let mut load = Command::new(env!("CARGO_BIN_EXE_pollux"));
    load.args(["bench", "--json", "--size", "64", "--seconds", seconds]);
    for socket in daemon.sockets() {
        load.arg("--attach").arg(socket);
    }
    let load = load.stdout(Stdio::piped()).spawn().unwrap();
    // A thread that comes later has its buffers, too.
    std::thread::sleep(Duration::from_millis(500));
    do_it(&daemon, &["poll", "add"]);
    do_it(&daemon, &["poll", "move", "p1", "1"]);
    let output = load.wait_with_output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for count in ["lost", "corrupt", "duplicated", "out_of_order"] {
        assert_eq!(report[count], 0, "{count}: {report}");
    }
    // The guests have gone, so nothing is counted any more.
    wait_for("the guests to leave", || {
        daemon.ports().iter().all(|port| port["session"].is_null())
    });
    daemon.settle();
    let frames = frames(&daemon);
    let (captured, missed, file) = capture.end();
    println!("{frames:?} frames, {captured} captured, {missed} missed");
    assert_eq!(captured + missed, frames.iter().sum::<u64>());
    assert!(captured > 10_000, "{captured}");
    assert_eq!(packets(&file), captured);
    slow.process.signal(Signal::CONT);
    let (captured, missed, file) = slow.end();
    // Its own: a frame that came when one guest had gone is not counted by both ports.
    assert_eq!(captured + missed, frames[0]);
    assert!(missed > 0, "a reader that stands still misses something");
    assert_eq!(packets(&file), captured);
    daemon.stop();
}

#[test]
fn observers_come_and_go_and_are_killed_while_nobody_loses_a_frame() {
    let scene = Scene::new();
    let daemon = &scene.daemon;
    let ram = Ram::new(GuestOptions::default());
    let mut sink = Guest::new(&ram);
    scene.attach_sink(&mut sink);
    let killed = Capture::start(daemon, "killed.pcapng", &["p0"]);
    let stopped = Capture::start(daemon, "stopped.pcapng", &["p0"]);
    // Its destination takes what there is room for, and nothing of it comes out again.
    do_it(
        daemon,
        &["mirror", "add", "m", "--from", "p0", "--to", "p3"],
    );
    scene.bystanders.go_on(2000);
    assert_eq!(observers(daemon).len(), 3);
    stopped.process.signal(Signal::STOP);
    killed.process.signal(Signal::KILL);
    wait_for("the killed client's observer to go", || {
        observers(daemon).len() == 2
    });
    scene.bystanders.go_on(2000);
    for turn in 0..if long() { 200 } else { 20 } {
        let name = format!("turn{turn}");
        let capture = Capture::start(daemon, &name, &["all"]);
        do_it(
            daemon,
            &["mirror", "add", &name, "--from", "p0,p1", "--to", "p3"],
        );
        scene.bystanders.go_on(50);
        do_it(daemon, &["mirror", "remove", &name]);
        let (captured, _, _) = capture.end();
        assert!(captured > 0);
    }
    stopped.process.signal(Signal::CONT);
    let (captured, missed, file) = stopped.end();
    assert!(captured + missed > 2000);
    assert_eq!(packets(&file), captured);
    let mirrors: Vec<Value> =
        serde_json::from_str(&do_it(daemon, &["mirror", "list", "--json"])).unwrap();
    let statistics = &mirrors[0]["statistics"];
    assert!(
        statistics["captured"].as_u64().unwrap() >= 256,
        "{statistics}"
    );
    assert!(statistics["missed"].as_u64().unwrap() > 0, "{statistics}");
    // What the mirror missed is no port's drop.
    assert_eq!(daemon.dropped("p3", "tx", "egress_ring_full"), 0);
    do_it(daemon, &["mirror", "remove", "m"]);
    assert_eq!(observers(daemon), Vec::<Value>::new());
    scene.finish();
}

#[test]
fn observers_end_with_their_port() {
    let scene = Scene::new();
    let daemon = &scene.daemon;
    let rams = rams(2);
    let (mut victim, mut sink) = (Guest::new(&rams[0]), Guest::new(&rams[1]));
    scene.attach_sink(&mut sink);
    scene.attach_victim(&mut victim, &mut sink);
    let mut captures = [
        Capture::start(daemon, "one.pcapng", &["p2", "--direction", "rx"]),
        Capture::start(daemon, "two.pcapng", &["p2", "--drops"]),
    ];
    let all = Capture::start(daemon, "all.pcapng", &["all", "--direction", "rx"]);
    do_it(
        daemon,
        &["mirror", "add", "from", "--from", "p2", "--to", "p1"],
    );
    do_it(
        daemon,
        &["mirror", "add", "to", "--from", "p3", "--to", "p2"],
    );
    do_it(
        daemon,
        &["mirror", "add", "stays", "--from", "p2,p3", "--to", "p1"],
    );
    let mut trace = Command::new(env!("CARGO_BIN_EXE_pollux"));
    trace.args(["trace", "p2", "--count", "1000", "--api-socket"]);
    trace.arg(daemon.dir().join("api.sock"));
    let mut trace = common::process::Process::spawn("trace", &mut trace);
    wait_for("the trace", || observers(daemon).len() == 7);
    daemon.settle();
    for number in 1..50 {
        scene.passes(&mut victim, &mut sink, number);
    }
    do_it(daemon, &["port", "remove", "p2"]);
    for capture in &mut captures {
        let (code, words) = capture.ended();
        assert_eq!(code, Some(4), "{words}");
        assert!(words.contains("port removed: p2"), "{words}");
        // The file is whole, and says why it ends.
        let text = std::fs::read(&capture.file).unwrap();
        assert!(text.windows(12).any(|part| part == b"port removed"));
    }
    assert_eq!(counts(&captures[0].process), (49, 0));
    assert_eq!(packets(&captures[0].file), 49);
    assert_eq!(
        trace.wait(SOON).unwrap().code(),
        Some(4),
        "{}",
        trace.words()
    );
    assert_eq!(trace.out.text().lines().count(), 49, "{}", trace.words());
    let mut left: Vec<String> = observers(daemon)
        .iter()
        .map(|one| one["name"].as_str().unwrap().to_string())
        .collect();
    left.sort();
    assert_eq!(left.len(), 2, "{left:?}");
    assert_eq!(left[1], "stays");
    do_it(daemon, &["port", "remove", "p3"]);
    wait_for("the mirror to end", || observers(daemon).len() == 1);
    daemon.assert_logged("mirror \"stays\" ends: port removed");
    // The bystanders send as fast as they can: it may miss some.
    let (captured, _, file) = all.end();
    assert_eq!(packets(&file), captured);
    let seen = read(&file);
    assert!(
        seen.iter().any(|one| one.port == "p2"),
        "the name of a port that is gone"
    );
    scene.finish();
}

#[test]
fn a_full_disk_ends_the_capture_and_nothing_else() {
    let scene = Scene::new();
    let daemon = &scene.daemon;
    let mut full = begin(daemon, &["capture", "p0", "-w", "/dev/full"]);
    let code = full.wait(SOON).unwrap().code();
    assert_eq!(code, Some(1), "{}", full.words());
    assert!(
        full.err.text().contains("No space left on device"),
        "{}",
        full.words()
    );
    wait_for("its observer to go", || observers(daemon).is_empty());
    scene.finish();
}

#[test]
fn a_daemon_that_stops_ends_its_captures_in_order() {
    let daemon = daemon(2);
    let rams = rams(2);
    let mut guests = guests(&daemon, &rams);
    let mut capture = Capture::start(&daemon, "end.pcapng", &["all"]);
    guests[0].send(&frame(mac(2), mac(1), 1, 60));
    guests[1].receive(SOON).unwrap();
    let dir = daemon.end();
    let (code, words) = capture.ended();
    assert_eq!(code, Some(3), "{words}");
    assert!(
        words.contains("the daemon stops; 2 frames captured, 0 missed"),
        "{words}"
    );
    assert_eq!(packets(&capture.file), 2);
    drop(dir);
}

#[test]
fn a_mirror_sends_whole_copies_once_and_teaches_nothing() {
    let daemon = daemon(4);
    let rams = rams(4);
    let mut guests = guests(&daemon, &rams);
    do_it(
        &daemon,
        &["mirror", "add", "both", "--from", "p0", "--to", "p2"],
    );
    // What arrives at p2 by the first mirror is not mirrored again, nor is it frames of p2's own.
    do_it(
        &daemon,
        &["mirror", "add", "again", "--from", "p2", "--to", "p3"],
    );
    do_it(
        &daemon,
        &["mirror", "add", "back", "--from", "p2", "--to", "p0"],
    );
    let capture = Capture::start(&daemon, "monitor.pcapng", &["p2"]);
    let mut expected = Vec::new();
    for (n, size) in (0..200).zip([60, 129, 1514, 9000].into_iter().cycle()) {
        for (from, to) in [(0, 1), (1, 0)] {
            let bytes = frame(mac(to as u8 + 1), mac(from as u8 + 1), n, size);
            guests[from].send(&bytes);
            assert_eq!(guests[to].receive(SOON).as_ref(), Some(&bytes));
            assert_eq!(guests[2].receive(SOON).as_ref(), Some(&bytes));
            expected.push(bytes);
        }
    }
    assert_eq!(guests[2].receive(A_WHILE), None);
    assert_eq!(guests[3].receive(A_WHILE), None);
    let (captured, missed, file) = capture.end();
    assert_eq!((captured, missed), (400, 0));
    assert_eq!(bytes_of(&read(&file), "p2", "2"), expected);
    let fdb: Vec<Value> =
        serde_json::from_str(&do_it(&daemon, &["fdb", "list", "--json"])).unwrap();
    for entry in fdb {
        let (port, mac) = (
            entry["port"].as_str().unwrap(),
            entry["mac"].as_str().unwrap(),
        );
        let number: u8 = port[1..].parse().unwrap();
        assert!(
            mac.ends_with(&format!("{:02x}", number + 1)),
            "{mac} on {port}"
        );
    }
    // A short copy of one direction.
    do_it(&daemon, &["mirror", "remove", "both"]);
    let short = ["--direction", "tx", "--snaplen", "64"];
    let add = ["mirror", "add", "short", "--from", "p0,p1", "--to", "p2"];
    do_it(&daemon, &[&add[..], &short[..]].concat());
    let (there, back) = (frame(mac(2), mac(1), 1, 500), frame(mac(1), mac(2), 2, 600));
    guests[0].send(&there);
    assert_eq!(guests[2].receive(SOON).unwrap(), there[..64]);
    guests[1].send(&back);
    assert_eq!(guests[2].receive(SOON).unwrap(), back[..64]);
    assert_eq!(guests[2].receive(A_WHILE), None);
    let table = do_it(&daemon, &["mirror", "list"]);
    let mut rows = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    assert!(
        rows.any(|row| row == ["short", "p0,p1", "p2", "tx", "64", "2", "0"]),
        "{table}"
    );
    daemon.stop();
}

#[test]
fn a_trace_tells_what_becomes_of_each_frame() {
    let daemon = daemon(3);
    let rams = rams(3);
    let mut guests = guests(&daemon, &rams);
    let mut trace = Command::new(env!("CARGO_BIN_EXE_pollux"));
    trace.args(["trace", "p0", "--count", "6", "--api-socket"]);
    trace.arg(daemon.dir().join("api.sock"));
    let mut trace = common::process::Process::spawn("trace", &mut trace);
    wait_for("the trace", || observers(&daemon).len() == 1);
    // Other ports' frames are not followed.
    guests[1].send(&frame(mac(3), mac(2), 0, 60));
    guests[2].receive(SOON).unwrap();
    guests[0].send(&frame(mac(2), mac(1), 1, 60));
    wait_for("one frame, of several steps", || {
        observers(&daemon)[0]["statistics"]["captured"] == 1
    });
    guests[0].send(&frame(BROADCAST, mac(1), 2, 61));
    guests[0].send(&frame(mac(1), mac(1), 3, 62));
    guests[0].send(&frame(mac(3), mac(77), 4, 63));
    guests[0].send(&frame(mac(3), mac(2), 5, 64));
    guests[0].send_raw(12 + 13);
    assert_eq!(
        trace.wait(SOON).unwrap().code(),
        Some(0),
        "{}",
        trace.words()
    );
    let text = trace.out.text();
    let lines: Vec<&str> = text.lines().collect();
    let expected = [
        "length 60 | learned: known | destination: p1 | unicast | p1:0 delivered",
        "length 61 | learned: known | destination: unknown | flood | p1:0 delivered, p2:0 delivered",
        "length 62 | learned: known | destination: p0 (its own) | drop | p0:0 dropped (same_port)",
        "length 63 | learned: new | destination: p2 | unicast | p2:0 delivered",
        "length 64 | learned: moved | destination: p2 | unicast | p2:0 delivered",
        "length 13 | learned: nothing | destination: unknown | drop | p0:0 dropped (rx_short_frame)",
    ];
    assert_eq!(lines.len(), expected.len(), "{text}");
    for part in expected {
        let found = lines
            .iter()
            .any(|line| line.contains("p0:0 | ") && line.ends_with(part));
        assert!(found, "{part}\n{text}");
    }
    let ends = "ends: it has as many frames as asked for;";
    daemon.assert_logged(&format!("trace \"trace-1\" {ends} 6 frames, 0 missed"));
    // More of them than were asked for are in its buffers.
    let mut trace = Command::new(env!("CARGO_BIN_EXE_pollux"));
    trace.args(["trace", "p0", "--count", "1", "--json", "--api-socket"]);
    trace.arg(daemon.dir().join("api.sock"));
    let mut trace = common::process::Process::spawn("trace", &mut trace);
    wait_for("the trace", || observers(&daemon).len() == 1);
    for n in 0..100 {
        guests[0].send(&frame(mac(3), mac(1), n, 60));
        guests[2].receive(SOON).unwrap();
    }
    assert_eq!(trace.wait(SOON).unwrap().code(), Some(0));
    let last: Value = serde_json::from_str(trace.out.text().lines().last().unwrap()).unwrap();
    assert_eq!((&last["kind"], &last["frames"]), (&"end".into(), &1.into()));
    daemon.assert_logged(&format!("trace \"trace-2\" {ends} 1 frames, "));
    daemon.stop();
}

#[test]
fn a_mirror_copies_a_frame_once_however_many_of_its_ports_see_it() {
    let daemon = daemon(4);
    let rams = rams(4);
    let mut guests = guests(&daemon, &rams);
    let add = ["mirror", "add", "ids", "--from", "p0,p1", "--to", "p2"];
    do_it(&daemon, &add);
    for n in 0..50 {
        for (from, to) in [(0, 1), (1, 0)] {
            let bytes = frame(mac(to as u8 + 1), mac(from as u8 + 1), n, 200);
            guests[from].send(&bytes);
            assert_eq!(guests[to].receive(SOON).as_ref(), Some(&bytes));
            assert_eq!(guests[2].receive(SOON).as_ref(), Some(&bytes));
        }
    }
    // Flooded to both, and to p2 itself.
    let flood = frame(BROADCAST, mac(4), 50, 200);
    guests[3].send(&flood);
    for guest in [0, 1, 2, 2] {
        assert_eq!(guests[guest].receive(SOON).as_ref(), Some(&flood));
    }
    assert_eq!(guests[2].receive(A_WHILE), None);
    let statistics = &observers(&daemon)[0]["statistics"];
    assert_eq!(
        (&statistics["captured"], &statistics["missed"]),
        (&101.into(), &0.into())
    );
    daemon.stop();
}

#[test]
fn a_capture_goes_on_in_the_next_file() {
    let daemon = daemon(2);
    let rams = rams(2);
    let mut guests = guests(&daemon, &rams);
    let all = Capture::start(&daemon, "all", &["p0", "--rotate", "20K"]);
    let few = Capture::start(&daemon, "few", &["p0", "--rotate", "20K", "--keep", "2"]);
    let mut sent = Vec::new();
    for n in 0..200 {
        let bytes = frame(mac(2), mac(1), n, 500);
        guests[0].send(&bytes);
        guests[1].receive(SOON).unwrap();
        sent.push(bytes);
    }
    all.end();
    few.end();
    let files = |name: &str| {
        let name = name.to_string();
        (0..).map(move |n| match n {
            0 => name.clone(),
            n => format!("{name}.{n}"),
        })
    };
    let mut found = Vec::new();
    for name in files("all").take_while(|name| daemon.dir().join(name).exists()) {
        let file = daemon.dir().join(name);
        assert!(std::fs::metadata(&file).unwrap().len() <= 21_000);
        found.extend(read(&file).into_iter().map(|one| one.bytes));
    }
    assert_eq!(found, sent);
    let kept = files("few")
        .take(20)
        .filter(|name| daemon.dir().join(name).exists());
    assert_eq!(kept.count(), 2);
    daemon.stop();
}

/// Our extcap program where tshark looks for it, until it is dropped.
struct Installed(std::path::PathBuf);

impl Installed {
    /// In a directory that the environment may name; for root tshark knows its own only.
    fn new(dir: &std::path::Path) -> Installed {
        let folders = tshark(&["-G", "folders"]);
        let own = folders
            .lines()
            .find_map(|line| line.strip_prefix("Extcap path:"));
        let dir = match own.filter(|_| rustix::process::geteuid().is_root()) {
            Some(own) => std::path::PathBuf::from(own.trim()),
            None => dir.to_path_buf(),
        };
        std::fs::create_dir_all(&dir).unwrap();
        let place = dir.join(format!("pollux-{}", std::process::id()));
        let program = concat!(env!("CARGO_MANIFEST_DIR"), "/wireshark/pollux");
        std::fs::copy(program, &place).unwrap();
        Installed(place)
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn tshark_reads_a_pipe_and_finds_the_interfaces() {
    let scene = Scene::new();
    let daemon = &scene.daemon;
    let socket = daemon.dir().join("api.sock");
    let pollux = env!("CARGO_BIN_EXE_pollux");
    let mut capture = Command::new(pollux);
    capture.args(["capture", "p0", "-w", "-", "--api-socket"]);
    capture
        .arg(&socket)
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut capture = capture.spawn().unwrap();
    let mut reader = Command::new("tshark");
    reader.args([
        "-l", "-n", "-i", "-", "-c", "20", "-T", "fields", "-e", "eth.type",
    ]);
    reader.stdin(capture.stdout.take().unwrap());
    let output = reader.output().unwrap();
    // It holds our end of the pipe.
    drop(reader);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(
        text.lines().filter(|line| *line == "0x88b5").count(),
        20,
        "{text}"
    );
    // The pipe has broken, which is no error.
    assert_eq!(capture.wait().unwrap().code(), Some(0));

    let extcap = daemon.dir().join("extcap");
    std::fs::create_dir(&extcap).unwrap();
    let _installed = Installed::new(&extcap);
    let path = std::path::Path::new(pollux)
        .parent()
        .unwrap()
        .display()
        .to_string();
    let with_extcap = |args: &[&str]| {
        let mut command = Command::new("tshark");
        command.args(args).env("WIRESHARK_EXTCAP_DIR", &extcap);
        command.env("POLLUX_API_SOCKET", &socket);
        command.env("PATH", format!("{path}:{}", std::env::var("PATH").unwrap()));
        let output = command.output().unwrap();
        let said = [&output.stdout[..], &output.stderr[..]].concat();
        String::from_utf8_lossy(&said).into_owned()
    };
    let list = with_extcap(&["-D"]);
    for line in [
        "pollux-all (Pollux: all ports)",
        "pollux-p0 (Pollux: port p0)",
    ] {
        assert!(list.contains(line), "{list}");
    }
    let file = daemon.dir().join("extcap.pcapng");
    let name = file.to_str().unwrap();
    let said = with_extcap(&[
        "-i",
        "pollux-p0",
        "-f",
        "ether proto 0x88b5",
        "-c",
        "20",
        "-w",
        name,
    ]);
    assert_eq!(read(&file).len(), 20, "{said}");
    let types = tshark(&["-r", name, "-T", "fields", "-e", "eth.type"]);
    assert!(types.lines().all(|line| line == "0x88b5"), "{types}");
    wait_for("the observers to go", || observers(daemon).is_empty());
    scene.finish();
}

#[test]
fn a_flood_of_captures_meets_its_limit() {
    let scene = Scene::new();
    let daemon = &scene.daemon;
    let captures: Vec<_> = (0..16)
        .map(|_| begin(daemon, &["capture", "p0", "--filter", "arp"]))
        .collect();
    let (code, said) = daemon.try_pollux(&["capture", "p0"]);
    assert_eq!(code, 5, "{said}");
    assert!(
        said.contains("16 captures and traces are open already"),
        "{said}"
    );
    for n in 0..16 {
        let name = format!("m{n}");
        do_it(
            daemon,
            &["mirror", "add", &name, "--from", "p0", "--to", "p3"],
        );
    }
    let (code, said) = daemon.try_pollux(&["mirror", "add", "m", "--from", "p0", "--to", "p3"]);
    assert_eq!(code, 5, "{said}");
    assert!(said.contains("32 observers are the most"), "{said}");
    scene.bystanders.go_on(500);
    drop(captures);
    wait_for("the captures to go", || observers(daemon).len() == 16);
    scene.finish();
}
