//! A cell of Linux in QEMU: it answers numbered pings of a scripted guest, and floods it with
//! pktgen's frames.

use serde_json::Value;

use crate::assert_negotiated;
use crate::cells::{Cell, SIZES};
use crate::common::daemon::{Daemon, DaemonOptions};
use crate::common::guest::{Guest, GuestOptions, Ram};
use crate::common::linux::{Echo, HEADERS, LIMIT, Linux, LinuxOptions, OURS, echo_request, name};
use crate::common::{pause, wait_for_within};

/// Pings of each length, several times as many as a ring has entries.
const PINGS: u64 = 1000;

/// pktgen's mark at the start of its UDP payload; a number follows it.
const PKTGEN: [u8; 4] = [0xbe, 0x9b, 0xe9, 0x55];
pub(crate) fn run(cell: &Cell) {
    let daemon = Daemon::start(&DaemonOptions {
        ports: 2,
        queues: cell.queues,
        ..DaemonOptions::default()
    });
    let options = LinuxOptions {
        packed: cell.packed,
        mergeable: cell.mergeable,
        queues: cell.queues,
        ..LinuxOptions::default()
    };
    let linux = Linux::start(&daemon.dir().join("linux"), &daemon.sockets()[0], &options);
    let ram = Ram::new(GuestOptions {
        packed: cell.packed,
        ..GuestOptions::default()
    });
    let mut guest = Guest::new(&ram);
    guest.attach(&daemon.sockets()[1]);
    linux.configure();
    wait_for_within(LIMIT, "both ports to run", || {
        ["p0", "p1"]
            .iter()
            .all(|name| daemon.port(name)["state"] == "running")
    });
    daemon.settle();
    assert_negotiated(cell, &daemon.port("p0"));

    let mut echo = Echo::new(guest);
    for size in cell.sizes() {
        echo.set_size(*size);
        echo.exchange(PINGS);
    }
    let mut dropped = 0;
    if cell.sizes().len() < SIZES.len() {
        // Linux posts no buffer that would hold it: dropped, counted, and nothing else happens.
        echo.guest.send(&echo_request(SIZES[3], 0));
        dropped = 1;
        echo.set_size(60);
        echo.exchange(PINGS);
    }
    let (sent, mut guest) = (echo.sent, echo.guest);
    assert_eq!(echo.repeated, 0);
    assert_spread(&linux, cell.queues, sent);
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
    let counted = linux.counters(["rx_packets", "tx_packets"]);
    assert_eq!(counted, [sent, sent + frames]);
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

/// Pings have come to each receive queue of Linux, by its own counters.
fn assert_spread(linux: &Linux, queues: u16, sent: u64) {
    let by_queue = linux.received_by_queue();
    assert_eq!(by_queue.len(), usize::from(queues), "{by_queue:?}");
    assert_eq!(by_queue.iter().sum::<u64>(), sent, "{by_queue:?}");
    let least = sent / u64::from(8 * queues);
    assert!(by_queue.iter().all(|n| *n > least), "{by_queue:?}");
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

/// pktgen in Linux towards the scripted guest. Returns what it sent, and what the switch dropped
/// since the scripted guest was too slow; all else has arrived, in order.
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
