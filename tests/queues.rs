//! Guests with many queue pairs: all that the protocol can name, and ones that enable and disable
//! them under traffic.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::collections::BTreeMap;
use std::time::Instant;

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, Ram};
use common::many::{ENTRIES, ManyQueues, ManyRam};
use common::traffic::{Bystanders, Mac, frame, mac, read};
use common::{long, wait_for};

/// All pairs whose rings SET_VRING_KICK can name.
const MOST: u16 = 128;

/// The address of a guest with many queues, or one of many of them: each is a flow of its own.
fn address(guest: u8, flow: u16) -> Mac {
    let [high, low] = flow.to_be_bytes();
    [0x52, 0x54, 1, guest, high, low]
}

fn daemon(ports: usize, queues: u16) -> Daemon {
    let daemon = Daemon::start(&DaemonOptions {
        ports,
        queues,
        ..DaemonOptions::default()
    });
    // Frames to a port are delivered by both.
    assert_eq!(daemon.try_pollux(&["poll", "add"]).0, 0);
    daemon
}

fn wait_until_running(daemon: &Daemon, ports: &[&str]) {
    wait_for("the ports to run", || {
        ports.iter().all(|port| daemon.state(port).0 == "running")
    });
    daemon.settle();
}

fn count(daemon: &Daemon, port: &str, what: &str) -> u64 {
    let count = daemon.port(port).pointer(what).and_then(|n| n.as_u64());
    count.unwrap_or_else(|| panic!("{what} of {port}"))
}

#[test]
fn all_queues_that_the_protocol_can_name_carry_frames() {
    let daemon = daemon(2, MOST);
    let rams = [ManyRam::new(MOST), ManyRam::new(MOST)];
    let mut one = ManyQueues::attach(&rams[0], &daemon.sockets()[0]);
    let mut other = ManyQueues::attach(&rams[1], &daemon.sockets()[1]);
    wait_until_running(&daemon, &["p0", "p1"]);
    // Where it is: its frames are not flooded then.
    assert!(other.try_send(0, &frame(mac(9), address(2, 0), 0, 60)));
    wait_for("an address", || {
        daemon.stats()["fdb"]["entries"].as_u64() == Some(1)
    });
    // Each transmit queue in turn, until every receive queue has had frames; each flow stays in
    // one.
    let mut queue_of: BTreeMap<u16, u16> = BTreeMap::new();
    let (mut sent, mut got, mut used) = (0_u64, 0_u64, [0_u64; MOST as usize]);
    let begin = Instant::now();
    while used.contains(&0) || sent < 20 * u64::from(MOST) {
        assert!(begin.elapsed().as_secs() < 60, "{used:?}");
        for pair in 0..MOST {
            // 1024 flows: none of 128 queues is left out for ever. A flow has one sending queue, so
            // it is in order.
            let flow = (sent % 1024) as u16;
            assert_eq!(flow % MOST, pair);
            assert!(one.try_send(pair, &frame(address(2, 0), address(1, flow), sent, 300)));
            sent += 1;
        }
        wait_for("the frames of a round", || {
            for pair in 0..MOST {
                while let Some(frame) = other.try_receive(pair) {
                    let label = read(&frame);
                    let flow = (label.sequence % 1024) as u16;
                    assert_eq!(label.from, address(1, flow));
                    assert_eq!(*queue_of.entry(flow).or_insert(pair), pair, "flow {flow}");
                    assert!(
                        label.sequence >= sent - u64::from(MOST),
                        "a frame of an old round"
                    );
                    used[usize::from(pair)] += 1;
                    got += 1;
                }
            }
            got == sent
        });
    }
    wait_for("all buffers", || {
        (0..MOST).all(|pair| one.in_flight(pair) == 0)
    });
    let rings = daemon.port("p0")["session"]["rings"].clone();
    assert_eq!(rings.as_array().unwrap().len(), 256, "{rings}");
    assert_eq!(count(&daemon, "p1", "/statistics/tx/frames"), sent);
    daemon.stop();
}

/// A guest with four pairs, one that sends to it in a window that one receive ring could hold, and
/// what came.
struct Party<'m> {
    many: ManyQueues<'m>,
    sender: Guest<'m>,
    sent: u64,
    came: Vec<bool>,
    received: u64,
}

/// Pairs of the guest whose queues are switched.
const PAIRS: u16 = 4;
const FLOWS: u64 = 32;

impl<'m> Party<'m> {
    /// On the ports 2 and 3.
    fn new(daemon: &Daemon, many: &'m ManyRam, sender: &'m Ram) -> Party<'m> {
        let many = ManyQueues::attach(many, &daemon.sockets()[2]);
        let mut sender = Guest::new(sender);
        sender.attach(&daemon.sockets()[3]);
        wait_until_running(daemon, &["p2", "p3"]);
        let mut party = Party {
            many,
            sender,
            sent: 0,
            came: Vec::new(),
            received: 0,
        };
        // Where it is.
        assert!(party.many.try_send(0, &frame(mac(9), address(2, 0), 0, 60)));
        wait_for("a frame of the guest", || {
            party.sender.try_receive().is_some()
        });
        party
    }

    fn send(&mut self) -> bool {
        let number = self.sent;
        let from = address(3, (number % FLOWS) as u16);
        let sent = self
            .sender
            .try_send(&frame(address(2, 0), from, number, 200));
        if sent {
            self.sent += 1;
            self.came.push(false);
        }
        sent
    }

    /// Looks into all queues: what was delivered before a queue was disabled is there still.
    fn receive(&mut self) {
        for pair in 0..PAIRS {
            while let Some(frame) = self.many.try_receive(pair) {
                let label = read(&frame);
                let number = label.sequence as usize;
                assert_eq!(label.from, address(3, (label.sequence % FLOWS) as u16));
                assert!(
                    !std::mem::replace(&mut self.came[number], true),
                    "frame {number} twice"
                );
                self.received += 1;
            }
        }
    }

    /// Sends as long as so many frames fit into one queue whatever becomes of them, and receives.
    fn turn(&mut self) {
        while self.sent - self.received < u64::from(ENTRIES) / 2 && self.send() {}
        self.receive();
    }

    fn drain(&mut self) {
        wait_for("every frame", || {
            self.receive();
            self.received == self.sent && self.sender.in_flight() == 0
        });
    }
}

#[test]
fn a_change_of_the_number_of_queues_loses_nothing() {
    let daemon = daemon(4, PAIRS);
    let (many, sender) = (ManyRam::new(PAIRS), Ram::new(GuestOptions::default()));
    let mut party = Party::new(&daemon, &many, &sender);
    for change in 0..if long() { 2000 } else { 100 } {
        // As Linux does for `ethtool -L eth0 combined N`: the first N pairs.
        let wanted = [1, 4, 2, 3][change % 4];
        for pair in 0..PAIRS {
            party.many.enable(pair, pair < wanted);
            party.turn();
        }
        let until = party.received + 100;
        while party.received < until {
            party.turn();
        }
    }
    party.drain();
    for (port, direction) in [("p2", "tx"), ("p3", "rx")] {
        let drops = daemon.port(port)["statistics"][direction]["drops"].clone();
        assert_eq!(drops, serde_json::json!({}), "{port}");
    }
    // And what the guest sends on the queues that it has enabled.
    for sequence in 0..400_u64 {
        let pair = (sequence % 3) as u16;
        let sent = party
            .many
            .try_send(pair, &frame(mac(9), address(2, pair), sequence, 100));
        assert!(sent);
        wait_for("a frame of the guest", || {
            let came = party.sender.try_receive();
            came.is_some_and(|bytes| read(&bytes).sequence == sequence)
        });
    }
    daemon.stop();
}

#[test]
fn a_guest_that_toggles_its_queues_all_the_time_costs_itself_alone() {
    let daemon = daemon(4, PAIRS);
    let bystanders = Bystanders::start([&daemon.sockets()[0], &daemon.sockets()[1]]);
    let (many, sender) = (ManyRam::new(PAIRS), Ram::new(GuestOptions::default()));
    let mut party = Party::new(&daemon, &many, &sender);
    let toggles = if long() { 10_000 } else { 1000 };
    for toggle in 0..toggles {
        // All of them at times: then it is the guest that wants no frames.
        let pair = (toggle / 2 % usize::from(PAIRS)) as u16;
        party.many.enable(pair, toggle % 2 == 1);
        // More than it takes: the sender goes on, whatever becomes of its frames.
        for _ in 0..8 {
            party.send();
        }
        party.receive();
        if toggle % 100 == 0 {
            bystanders.go_on(10);
        }
    }
    // Whatever did not come was counted as dropped for want of a queue or of room in it.
    wait_for("every frame to arrive or to be counted", || {
        party.receive();
        let drops = daemon.port("p2")["statistics"]["tx"]["drops"].clone();
        let drops = drops.as_object().unwrap().values();
        let dropped: u64 = drops.map(|count| count.as_u64().unwrap()).sum();
        party.received + dropped == party.sent && party.sender.in_flight() == 0
    });
    assert!(party.received > 100, "{} of {}", party.received, party.sent);
    // Nothing of it stays: all queues are enabled now.
    daemon.settle();
    let (sent, received) = (party.sent, party.received);
    for _ in 0..200 {
        let next = party.sent + 1;
        while party.sent < next {
            party.send();
        }
        let until = received + (party.sent - sent);
        wait_for("a frame", || {
            party.receive();
            party.received == until
        });
    }
    bystanders.go_on(100);
    bystanders.finish();
    daemon.stop();
}

#[test]
fn queues_that_were_never_configured_get_nothing_however_enabled() {
    let daemon = daemon(4, 8);
    let bystanders = Bystanders::start([&daemon.sockets()[0], &daemon.sockets()[1]]);
    let (many, sender) = (ManyRam::new(PAIRS), Ram::new(GuestOptions::default()));
    let mut party = Party::new(&daemon, &many, &sender);
    // Offered but never configured; then never offered, up to the last that kicks could name.
    for ring in (2 * PAIRS..16).chain([16, 17, 40, 254, 255]) {
        let enabled = party.many.frontend.set_vring_enable(u32::from(ring), true);
        assert!(enabled.is_ok() || ring >= 16, "ring {ring}: {enabled:?}");
    }
    daemon.settle();
    while party.received < 1000 {
        party.turn();
    }
    party.drain();
    assert_eq!(count(&daemon, "p2", "/statistics/tx/frames"), party.sent);
    let rings = daemon.port("p2")["session"]["rings"].clone();
    let running = rings.as_array().unwrap().iter();
    let running = running.filter(|ring| ring["state"] == "running").count();
    assert_eq!(running, 2 * usize::from(PAIRS), "{rings}");
    bystanders.go_on(100);
    bystanders.finish();
    daemon.stop();
}

/// As QEMU does that is to have more queue pairs than are offered: it asks, gives up, and tries
/// again at once.
#[test]
fn a_frontend_that_wants_more_pairs_is_the_reason_as_long_as_it_tries() {
    let daemon = daemon(1, 1);
    let socket = &daemon.sockets()[0];
    let ram = Ram::new(GuestOptions::default());
    let mut guest = Guest::new(&ram);
    let said = "number of queue pairs (1 offered); if it needs more: pollux port set p0 queues=N";
    for _ in 0..5 {
        let frontend = guest.negotiate(socket).unwrap();
        drop(frontend);
        wait_for("the reason", || daemon.state("p0").1.contains(said));
        let again = guest.negotiate(socket).unwrap();
        assert_eq!(daemon.state("p0").0, "negotiating");
        assert!(daemon.state("p0").1.contains(said));
        drop(again);
    }
    daemon.assert_logged(said);
    guest.attach(socket);
    wait_until_running(&daemon, &["p0"]);
    assert_eq!(daemon.state("p0").1, "");
    daemon.stop();
}

/// A driver whose frontend hands its controlq over says how many receive queues are to get frames
/// (virtio 1.2 §5.1.6.5.5): none beyond them from the answer on, also while it commands without
/// end, and every frame arrives.
#[test]
fn receive_queues_beyond_those_that_were_commanded_get_nothing() {
    let daemon = daemon(4, PAIRS);
    let bystanders = Bystanders::start([&daemon.sockets()[0], &daemon.sockets()[1]]);
    let ram = ManyRam::new(PAIRS);
    let mut many = ManyQueues::attach_commanding(&ram, &daemon.sockets()[2]);
    let sender_ram = Ram::new(GuestOptions::default());
    let mut sender = Guest::new(&sender_ram);
    sender.attach(&daemon.sockets()[3]);
    wait_until_running(&daemon, &["p2", "p3"]);
    assert!(many.try_send(0, &frame(mac(9), address(2, 0), 0, 60)));
    wait_for("a frame of the guest", || sender.try_receive().is_some());
    let mut sent = 0;
    // Of a driver that has said nothing yet it is the first alone, once it has said anything.
    assert_eq!(many.command(&[0, 0, 1]), 0);
    for pairs in [1, PAIRS, 2, 1, 3, PAIRS] {
        assert_eq!(many.command(&[4, 0, pairs as u8, 0]), 0);
        let mut used = [0; PAIRS as usize];
        for _ in 0..8 {
            for flow in 0..FLOWS {
                assert!(sender.try_send(&frame(address(2, 0), address(3, flow as u16), sent, 200)));
                sent += 1;
            }
            for _ in 0..20 {
                assert_eq!(many.command(&[0, 0, 1]), 0);
            }
            let mut came = 0;
            wait_for("the frames of a round", || {
                for pair in 0..PAIRS {
                    while many.try_receive(pair).is_some() {
                        used[usize::from(pair)] += 1;
                        came += 1;
                    }
                }
                came == FLOWS
            });
        }
        let unused = used.iter().position(|count| *count == 0);
        assert_eq!(unused.unwrap_or(used.len()), usize::from(pairs), "{used:?}");
    }
    for wrong in [0, PAIRS + 1] {
        assert_eq!(many.command(&[4, 0, wrong as u8, 0]), 1);
    }
    let rings = daemon.port("p2")["session"]["rings"].clone();
    assert_eq!(rings[8]["direction"], "control", "{rings}");
    bystanders.finish();
    daemon.stop();
}
