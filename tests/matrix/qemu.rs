//! A cell of Linux in QEMU: it answers numbered pings of a scripted guest, and floods it with pktgen's frames.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::assert_negotiated;
use crate::cells::{Cell, SIZES};
use crate::common::daemon::{Daemon, DaemonOptions};
use crate::common::guest::{Guest, GuestOptions, Ram};
use crate::common::process::Process;
use crate::common::{pause, wait_for_within};

/// Addresses of Linux and of the scripted guest.
const LINUX: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const OURS: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
const LINUX_IP: [u8; 4] = [10, 0, 0, 1];
const NET: &str = "10.0.0";
/// Ethernet, IP, ICMP echo.
const HEADERS: usize = 42;
/// Pings of each length, several times as many as a ring has entries; and how many may be on their way: Linux drops
/// answers beyond what its ICMP socket may hold, about ten of 9000 bytes.
const PINGS: u16 = 1000;
const WINDOW: u16 = 4;
/// Addresses that pings come from, in turn: a flow each, so that several receive queues of Linux are used.
const FLOWS: u16 = 16;
/// pktgen's mark at the start of its UDP payload; a number follows it.
const PKTGEN: [u8; 4] = [0xbe, 0x9b, 0xe9, 0x55];
/// A guest without hardware virtualisation is slow, also to boot.
const LIMIT: Duration = Duration::from_secs(180);

/// A QEMU guest and the directory to talk to it through.
struct Linux {
    process: Process,
    dir: PathBuf,
}

pub(crate) fn run(cell: &Cell) {
    let daemon = Daemon::start(&DaemonOptions {
        ports: 2,
        queues: cell.queues,
        ..DaemonOptions::default()
    });
    let linux = Linux::start(cell, &daemon);
    let ram = Ram::new(GuestOptions::default());
    let mut guest = Guest::new(&ram);
    guest.attach(&daemon.sockets()[1]);
    linux.ask(&format!(
        "ip link set eth0 mtu 9000 up && ip address add {NET}.1/24 dev eth0 && \
         for n in $(seq 2 {}); do arp -s {NET}.$n {} || exit 1; done",
        FLOWS + 1,
        name(OURS)
    ));
    wait_for_within(LIMIT, "both ports to run", || {
        ["p0", "p1"]
            .iter()
            .all(|name| daemon.port(name)["state"] == "running")
    });
    daemon.settle();
    assert_negotiated(cell, &daemon.port("p0"));

    let mut sent = 0;
    for size in cell.sizes() {
        ping(&mut guest, *size);
        sent += u64::from(PINGS);
    }
    let mut dropped = 0;
    if cell.sizes().len() < SIZES.len() {
        // Linux posts no buffer that would hold it: dropped, counted, and nothing else happens.
        guest.send(&echo_request(SIZES[3], 0));
        dropped = 1;
        ping(&mut guest, 60);
        sent += u64::from(PINGS);
    }
    assert_spread(&daemon, cell.queues);
    let (frames, lost) = flood(&linux, &mut guest, &daemon);

    // Each side's counters, the other's, and those of the switch.
    let port = |name: &str| daemon.port(name)["statistics"].clone();
    let count = |counts: &Value, name: &str| {
        counts["frames"]
            .as_u64()
            .unwrap_or_else(|| panic!("{name}"))
    };
    wait_for_within(LIMIT, "the counters", || {
        count(&port("p0")["rx"], "rx") == sent + frames
    });
    assert_eq!(count(&port("p0")["tx"], "tx"), sent);
    assert_eq!(count(&port("p1")["rx"], "rx"), sent + dropped);
    assert_eq!(count(&port("p1")["tx"], "tx"), sent + frames - lost);
    assert_eq!(linux.counter("rx_packets"), sent);
    assert_eq!(linux.counter("tx_packets"), sent + frames);
    let drops = |name: &str, reason: &str| {
        let drops = &port(name)["tx"]["drops"];
        let all: u64 = drops
            .as_object()
            .unwrap()
            .values()
            .filter_map(Value::as_u64)
            .sum();
        let one = drops[reason].as_u64().unwrap_or(0);
        assert_eq!(all, one, "{name}: {drops}");
        one
    };
    assert_eq!(drops("p0", "egress_too_long"), dropped);
    assert_eq!(drops("p1", "egress_ring_full"), lost);
    wait_for_within(LIMIT, "every transmit buffer to come back", || {
        guest.in_flight() == 0
    });
    drop(linux);
    drop(guest);
    daemon.stop();
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("qemu")
        .join(name)
}

impl Linux {
    fn start(cell: &Cell, daemon: &Daemon) -> Linux {
        let dir = daemon.dir().join("linux");
        let mut command = Command::new(script("guest"));
        command.arg("--dir").arg(&dir);
        command.arg("--socket").arg(&daemon.sockets()[0]);
        command.args(["--queues", &cell.queues.to_string()]);
        command.args(["--mrg-rxbuf", if cell.mergeable { "on" } else { "off" }]);
        if cell.packed {
            command.arg("--packed");
        }
        let linux = Linux {
            process: Process::spawn("qemu/guest", &mut command),
            dir,
        };
        linux.ask("true");
        linux
    }

    /// Runs a command in the guest; what it prints.
    fn ask(&self, command: &str) -> String {
        let seconds = LIMIT.as_secs().to_string();
        let asked = Command::new(script("ask"))
            .args(["--timeout", &seconds])
            .arg(&self.dir)
            .arg(command)
            .output()
            .expect("qemu/ask runs");
        assert!(
            asked.status.success(),
            "{command}: {}{}",
            String::from_utf8_lossy(&asked.stderr),
            self.process.words()
        );
        String::from_utf8(asked.stdout).expect("text")
    }

    fn counter(&self, name: &str) -> u64 {
        let text = self.ask("counters");
        let mut lines = text.lines().filter_map(|line| line.split_once(' '));
        let found = lines.find(|(key, _)| *key == name).expect("a counter");
        found.1.parse().expect("a number")
    }
}

/// Pings have come to each receive queue of Linux; split rings tell, a packed one's position goes in circles.
fn assert_spread(daemon: &Daemon, queues: u16) {
    let rings = daemon.port("p0")["session"]["rings"].clone();
    let receive = rings.as_array().expect("rings").iter();
    let receive = receive.filter(|ring| ring["direction"] == "tx" && ring["kind"] == "split");
    for ring in receive {
        let least = u64::from(PINGS) / u64::from(8 * queues);
        assert!(ring["position"].as_u64() > Some(least), "{ring}");
    }
}

/// Sends numbered pings of `size` bytes; each must be answered once, in order within its flow, with what it said.
fn ping(guest: &mut Guest<'_>, size: usize) {
    let (mut asked, mut answered) = (0, 0);
    let mut next: Vec<u16> = (0..FLOWS).collect();
    let mut last = Instant::now();
    while answered < PINGS {
        while asked < PINGS
            && asked - answered < WINDOW
            && guest.try_send(&echo_request(size, asked))
        {
            asked += 1;
        }
        let Some(frame) = guest.try_receive() else {
            assert!(
                last.elapsed() < LIMIT,
                "{size} bytes: {answered} of {asked} pings answered"
            );
            pause();
            continue;
        };
        // The addresses change places, the kind of message and its sum change.
        let flow = frame.get(33).map_or(0, |last| last.wrapping_sub(2));
        let number = next
            .get_mut(usize::from(flow))
            .expect("one of our addresses");
        let request = echo_request(size, *number);
        let expected_reply = reply_to(&request, &frame);
        assert!(
            frame == expected_reply,
            "{size} bytes: an answer is not that to ping {number}: {frame:02x?}"
        );
        *number += FLOWS;
        answered += 1;
        last = Instant::now();
    }
}

/// The address that a ping comes from.
fn our_ip(number: u16) -> [u8; 4] {
    [10, 0, 0, 2 + (number % FLOWS) as u8]
}

/// An ICMP echo request of `size` bytes with a number, and bytes that follow from it.
fn echo_request(size: usize, number: u16) -> Vec<u8> {
    let mut frame = [&LINUX[..], &OURS[..], &[8, 0]].concat();
    let total = (size - 14) as u16;
    let mut ip = [
        &[0x45, 0][..],
        &total.to_be_bytes(),
        &[0, 0, 0x40, 0, 64, 1, 0, 0],
    ]
    .concat();
    ip.extend(our_ip(number));
    ip.extend(LINUX_IP);
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(ip);
    let mut icmp = vec![8, 0, 0, 0, 0x50, 0x4c];
    icmp.extend(number.to_be_bytes());
    icmp.extend((HEADERS..size).map(|at| (usize::from(number) * 31 + at * 7) as u8));
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    frame.extend(icmp);
    frame
}

/// What Linux must answer to `request`; the IP header's number and time to live are its own affair.
fn reply_to(request: &[u8], answer: &[u8]) -> Vec<u8> {
    let mut reply = request.to_vec();
    reply[..6].copy_from_slice(&OURS);
    reply[6..12].copy_from_slice(&LINUX);
    reply[26..30].copy_from_slice(&LINUX_IP);
    reply[30..34].copy_from_slice(&request[26..30]);
    for own in [15..16, 18..23] {
        reply[own.clone()].copy_from_slice(&answer[own]);
    }
    reply[24..26].fill(0);
    let sum = checksum(&reply[14..34]);
    reply[24..26].copy_from_slice(&sum.to_be_bytes());
    reply[34] = 0;
    reply[36..38].fill(0);
    let sum = checksum(&reply[34..]);
    reply[36..38].copy_from_slice(&sum.to_be_bytes());
    reply
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// What has come of pktgen's frames.
#[derive(Default)]
struct Arrivals {
    came: u64,
    next: u32,
}

impl Arrivals {
    fn receive(&mut self, guest: &mut Guest<'_>) {
        while let Some(frame) = guest.try_receive() {
            assert_eq!(frame.len(), 60, "{frame:02x?}");
            assert_eq!(frame[HEADERS..HEADERS + 4], PKTGEN, "{frame:02x?}");
            let number = [46, 47, 48, 49].map(|at| frame[at]);
            let number = u32::from_be_bytes(number);
            assert!(number >= self.next, "{number}, but {} is next", self.next);
            self.came += 1;
            self.next = number + 1;
        }
    }
}

/// pktgen in Linux towards the scripted guest. Returns what it sent, and what the switch dropped since the scripted guest
/// was too slow; all else has arrived, in order.
fn flood(linux: &Linux, guest: &mut Guest<'_>, daemon: &Daemon) -> (u64, u64) {
    let mut arrivals = Arrivals::default();
    let text = std::thread::scope(|scope| {
        let asked = scope.spawn(|| linux.ask(&format!("blast 1 60 {}", name(OURS))));
        while !asked.is_finished() {
            arrivals.receive(guest);
            pause();
        }
        asked.join().expect("pktgen runs")
    });
    let mut lines = text.lines();
    let sent = lines.find_map(|line| line.strip_prefix("frames "));
    let sent: u64 = sent.expect("a count").parse().expect("a number");
    assert!(sent > 1000, "pktgen sent {sent} frames");
    let mut lost = 0;
    wait_for_within(LIMIT, "every frame to arrive or to be counted", || {
        arrivals.receive(guest);
        let drops = &daemon.port("p1")["statistics"]["tx"]["drops"];
        lost = drops["egress_ring_full"].as_u64().unwrap_or(0);
        arrivals.came + lost == sent
    });
    (sent, lost)
}

/// An address as text.
fn name(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
