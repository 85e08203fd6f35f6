//! Linux in QEMU through everything that happens to a guest: its daemon is killed, its driver goes
//! and comes back, with other rings, too, firmware runs before it, and another guest comes after
//! it. A scripted guest exchanges pings with it in a closed loop, and what either side has sent the
//! other must have received.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::time::{Duration, Instant};

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, Ram};
use common::linux::{Echo, LIMIT, Linux, LinuxOptions, echo_request};
use common::netboot::BootServer;
use common::{long, memory_tempdir, pause, short_tempdir, wait_for_within};
use serde_json::Value;

/// The port of Linux. It comes after the scripted guest's, which thus misses none of its frames.
const PORT: &str = "linux";
/// That of the scripted guest.
const OURS: &str = "p0";

/// A daemon, the scripted guest, and what was true when the counters of Linux began.
struct Scene<'m> {
    daemon: Option<Daemon>,
    options: DaemonOptions,
    _state: tempfile::TempDir,
    echo: Echo<'m>,
    /// Pings sent, sent again, answers received, and answers that QEMU has thrown away.
    began: [u64; 4],
    /// The daemon was killed since.
    killed: bool,
}

impl<'m> Scene<'m> {
    fn new(ram: &'m Ram) -> Scene<'m> {
        let state = memory_tempdir();
        let options = DaemonOptions {
            ports: 1,
            args: vec![
                "--ring-state".into(),
                state.path().to_str().unwrap().to_string(),
            ],
            ..DaemonOptions::default()
        };
        let daemon = Daemon::start_in(short_tempdir(), &options);
        let mut guest = Guest::new(ram);
        guest.attach(&daemon.sockets()[0]);
        let scene = Scene {
            daemon: Some(daemon),
            options,
            _state: state,
            echo: Echo::new(guest),
            began: [0; 4],
            killed: false,
        };
        scene.add_port();
        scene
    }

    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    fn add_port(&self) {
        let socket = self.daemon().dir().join("linux.sock");
        let spec = format!("{PORT},socket={},queues=2", socket.display());
        let (code, said) = self.daemon().try_pollux(&["port", "add", &spec]);
        assert_eq!(code, 0, "{said}");
    }

    fn start(&self, dir: &str, options: &LinuxOptions) -> Linux {
        let own = self.daemon().dir();
        Linux::start(&own.join(dir), &own.join("linux.sock"), options)
    }

    fn wait_until_running(&self) {
        wait_for_within(LIMIT, "the guest's port to run", || {
            self.daemon().state(PORT).0 == "running"
        });
        self.daemon().settle();
    }

    /// Linux has another card, whose counters begin anew.
    fn begin(&mut self, linux: &Linux) {
        linux.configure();
        self.wait_until_running();
        self.began = self.counts(linux);
        self.killed = false;
    }

    fn counts(&self, linux: &Linux) -> [u64; 4] {
        let echo = &self.echo;
        let received = echo.answered + echo.repeated;
        [echo.sent, echo.resent, received, linux.thrown_away()]
    }

    /// Kills the daemon in the midst of pings, and starts another one.
    fn kill(&mut self) {
        self.kill_and(|| {});
    }

    /// The same; something happens while there is none.
    fn kill_and(&mut self, meanwhile: impl FnOnce()) {
        let dir = self.daemon.take().unwrap().kill();
        meanwhile();
        self.daemon = Some(Daemon::start_in(dir, &self.options));
        let socket = self.daemon().sockets()[0].clone();
        self.echo.guest.detach();
        self.echo.guest.attach_receiving(&socket);
        self.daemon().settle();
        self.add_port();
        self.wait_until_running();
        self.echo.guest.attach_transmitting();
        self.echo.recover();
        self.killed = true;
    }

    /// Every frame that either guest has sent, the other one has received, but those that QEMU has
    /// thrown away; and once, unless a daemon was killed between delivery and completion. The
    /// daemon has dropped so many, for this reason.
    fn check(&mut self, linux: &Linux, what: &str, drops: (u64, &str)) {
        self.echo.drain();
        let deadline = Instant::now() + Duration::from_secs(20);
        let said = loop {
            // Answers to what came twice may still be on their way.
            self.echo.receive();
            let [rx, tx] = linux.counters(["rx_packets", "tx_packets"]);
            let now = self.counts(linux);
            let [sent, resent, received, thrown] = [0, 1, 2, 3].map(|n| now[n] - self.began[n]);
            let said = format!(
                "{what}: {sent} pings sent, {resent} again; Linux received {rx}, answered {tx}, of which QEMU threw away \
                 {thrown}; {received} received"
            );
            // QEMU takes nothing itself out of packed rings.
            assert!(thrown == 0 || !self.is_packed(), "{said}");
            let all = if self.killed {
                // Each ping that came, with those that came twice; each answer, but those.
                rx >= sent + resent && resent <= thrown && tx == rx && received + thrown >= tx
            } else {
                [rx, tx, received] == [sent; 3] && [resent, thrown] == [0; 2]
            };
            if all {
                break said;
            }
            assert!(Instant::now() < deadline, "{said}");
            pause();
        };
        println!("{said}");
        let counted: Vec<_> = [PORT, OURS]
            .iter()
            .flat_map(|port| self.daemon().drops(port))
            .filter(|(_, count)| *count > 0)
            .collect();
        match counted.as_slice() {
            [] => assert_eq!(drops.0, 0, "{what}"),
            [(name, count)] => {
                assert!(name.ends_with(drops.1), "{what}: {name}");
                assert_eq!(*count, drops.0, "{what}: {name}");
            }
            more => panic!("{what}: {more:?}"),
        }
    }

    /// Frames for a guest without a driver are dropped and counted, and never seen by the next one.
    fn send_in_vain(&mut self, drops: &mut u64) {
        wait_for_within(LIMIT, "its rings to stop", || {
            self.rings().iter().all(|ring| ring["state"] != "running")
        });
        self.daemon().settle();
        for n in 0..10 {
            // Numbers far away: an answer would not pass.
            self.echo
                .guest
                .send(&echo_request(100, self.echo.sent + (1 << 14) + n));
        }
        *drops += 10;
        let reason = "egress_not_ready";
        wait_for_within(LIMIT, reason, || {
            self.daemon().dropped(PORT, "tx", reason) == *drops
        });
    }

    fn rings(&self) -> Vec<Value> {
        let port = self.daemon().port(PORT);
        port["session"]["rings"].as_array().unwrap().clone()
    }

    fn is_packed(&self) -> bool {
        self.rings().iter().any(|ring| ring["kind"] == "packed")
    }

    /// The kinds that its first receive ring has had, by the log from there on, without
    /// repetitions.
    fn kinds_since(&self, from: usize) -> Vec<String> {
        let log = self.daemon().log();
        let started = log[from..].lines().filter_map(|line| {
            let (_, what) = line.split_once("receiveq 0 started: ")?;
            let (kind, rest) = what.split_once(',')?;
            rest.contains(PORT).then(|| kind.to_string())
        });
        let mut kinds: Vec<String> = started.collect();
        kinds.dedup();
        kinds
    }

    /// The rings are these, and no others.
    fn assert_rings(&self, options: &LinuxOptions) {
        let rings = self.rings();
        assert_eq!(rings.len(), 2 * usize::from(options.queues), "{rings:?}");
        for ring in rings {
            let kind = if options.packed { "packed" } else { "split" };
            assert_eq!(ring["kind"], kind, "{ring}");
            assert_eq!(ring["size"], options.entries, "{ring}");
            assert_eq!(ring["state"], "running", "{ring}");
        }
    }

    fn stop(self) {
        drop(self.echo);
        self.daemon.unwrap().stop();
    }
}

/// The life of a guest and the beginning of its successor's.
fn life(packed: bool) {
    let options = LinuxOptions {
        packed,
        queues: 2,
        lone: true,
        ..LinuxOptions::default()
    };
    let ram = Ram::new(GuestOptions {
        packed,
        ..GuestOptions::default()
    });
    let mut scene = Scene::new(&ram);
    let linux = scene.start("linux", &options);
    scene.begin(&linux);
    scene.assert_rings(&options);
    for size in [60, 1514, 9000] {
        scene.echo.set_size(size);
        scene.echo.exchange(400);
    }
    scene.echo.set_size(200);
    scene.check(&linux, "first", (0, ""));

    // The daemon is killed in the midst of it.
    for cycle in 0..if long() { 100 } else { 3 } {
        scene.echo.run(300 + cycle % 10 * 37);
        scene.kill();
        scene.echo.run(100);
    }
    scene.assert_rings(&options);
    scene.check(&linux, "killed", (0, ""));

    // The driver is unloaded and loaded again, by module and by device.
    let mut drops = 0;
    for (go, come) in [
        ("rmmod virtio_net", "insmod /modules/virtio_net.ko"),
        (
            "cd /sys/bus/virtio/drivers/virtio_net && ls -d virtio* >/tmp/device && cat /tmp/device >unbind",
            "cat /tmp/device >/sys/bus/virtio/drivers/virtio_net/bind",
        ),
    ] {
        linux.ask(go);
        scene.send_in_vain(&mut drops);
        linux.ask(come);
        scene.begin(&linux);
        scene.assert_rings(&options);
        scene.echo.exchange(600);
        scene.check(&linux, go, (drops, "egress_not_ready"));
    }

    // Other queues.
    for queues in [1, 2] {
        linux.ask(&format!("ethtool -L eth0 combined {queues}"));
        scene.daemon().settle();
        let before = linux.received_by_queue();
        scene.echo.exchange(600);
        let after = linux.received_by_queue();
        let by_queue = after
            .iter()
            .zip(&before)
            .map(|(after, before)| after - before);
        let by_queue: Vec<u64> = by_queue.collect();
        assert_eq!(by_queue.len(), queues, "{by_queue:?}");
        assert_eq!(by_queue.iter().sum::<u64>(), 600, "{by_queue:?}");
        assert!(by_queue.iter().all(|n| *n > 0), "{by_queue:?}");
        scene.check(&linux, "queues", (drops, "egress_not_ready"));
    }

    // And again with the driver that was loaded last, whose rings began anew.
    scene.echo.run(200);
    scene.kill();
    scene.echo.exchange(600);
    scene.assert_rings(&options);
    scene.check(&linux, "killed again", (0, ""));

    // Its driver is loaded again while there is no daemon: nothing is on its way, and the rings are
    // others, also in the same place.
    scene.echo.drain();
    scene.kill_and(|| {
        linux.ask("rmmod virtio_net");
        linux.ask("insmod /modules/virtio_net.ko");
    });
    scene.begin(&linux);
    scene.assert_rings(&options);
    scene.echo.exchange(600);
    scene.check(&linux, "reset while killed", (0, ""));

    // Another guest with other rings, and fewer, at the same port.
    drop(linux);
    let options = LinuxOptions {
        packed: !packed,
        mergeable: false,
        queues: 1,
        entries: 1024,
        ..LinuxOptions::default()
    };
    let linux = scene.start("other", &options);
    scene.begin(&linux);
    scene.assert_rings(&options);
    scene.echo.exchange(1500);
    scene.check(&linux, "successor", (0, ""));
    drop(linux);
    scene.stop();
}

#[test]
fn a_guest_with_split_rings_loses_nothing_in_all_its_life() {
    life(false);
}

#[test]
fn a_guest_with_packed_rings_loses_nothing_in_all_its_life() {
    life(true);
}

/// Without VIRTIO_F_VERSION_1 the header has 10 bytes unless buffers are mergeable, and 12 then.
#[test]
fn a_guest_with_a_legacy_card_loses_nothing() {
    let ram = Ram::new(GuestOptions::default());
    for mergeable in [false, true] {
        let options = LinuxOptions {
            mergeable,
            lone: true,
            legacy: true,
            ..LinuxOptions::default()
        };
        let mut scene = Scene::new(&ram);
        let linux = scene.start("linux", &options);
        scene.begin(&linux);
        scene.assert_rings(&options);
        let agreed = scene.daemon().port(PORT)["session"]["features"].to_string();
        assert!(!agreed.contains("version_1"), "{agreed}");
        assert_eq!(agreed.contains("mrg_rxbuf"), mergeable, "{agreed}");
        // Linux without offloads has buffers for frames of 1514 bytes, and longer ones only if they
        // are mergeable.
        for size in [60, 1514, if mergeable { 9000 } else { 700 }] {
            scene.echo.set_size(size);
            scene.echo.exchange(300);
        }
        scene.check(&linux, "legacy", (0, ""));
        scene.echo.set_size(200);
        scene.echo.run(200);
        scene.kill();
        scene.echo.exchange(300);
        scene.check(&linux, "killed", (0, ""));
        drop(linux);
        scene.stop();
    }
}

/// Serves a guest's firmware until Linux answers.
fn boot(scene: &mut Scene<'_>, server: &mut BootServer, linux: &Linux) {
    let began = Instant::now();
    let (mut requests, mut answers) = (0, 0);
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| linux.ask("true"));
        while !asked.is_finished() {
            let Some(frame) = scene.echo.guest.try_receive() else {
                pause();
                continue;
            };
            requests += 1;
            if let Some(answer) = server.answer(&frame) {
                scene.echo.guest.send(&answer);
                answers += 1;
            }
        }
        asked.join().unwrap();
    });
    println!(
        "booted over the network in {:?}: {requests} frames there, {answers} back",
        began.elapsed()
    );
}

#[test]
fn a_guest_boots_over_the_network_and_again_with_packed_rings() {
    let options = LinuxOptions {
        packed: true,
        netboot: true,
        lone: true,
        ..LinuxOptions::default()
    };
    let ram = Ram::new(GuestOptions::default());
    let mut scene = Scene::new(&ram);
    let linux = scene.start("linux", &options);
    wait_for_within(LIMIT, "the guest", || {
        scene.daemon().state(PORT).0 != "waiting"
    });
    let cmdline = String::from_utf8(linux.boot_file("cmdline")).unwrap();
    let files = ["kernel", "initramfs"].map(|name| linux.boot_file(name));
    let [kernel, initramfs] = files;
    let mut server = BootServer::new(kernel, initramfs, &cmdline);
    let mut booting = 0;
    for round in 1..3 {
        boot(&mut scene, &mut server, &linux);
        assert_eq!(server.loaded, [round; 3]);
        assert!(server.leases >= round);
        // Everything that either side sent has passed: the firmware gave up none of its frames.
        scene.begin(&linux);
        scene.assert_rings(&options);
        wait_for_within(
            LIMIT,
            "split rings of the firmware, packed ones then",
            || scene.kinds_since(booting) == ["split", "packed"],
        );
        scene.echo.exchange(600);
        scene.check(&linux, "booted", (0, ""));
        if round == 1 {
            scene.echo.run(200);
            scene.kill();
            scene.echo.exchange(200);
            scene.check(&linux, "killed", (0, ""));
            wait_for_within(LIMIT, "the new daemon's log", || {
                scene.kinds_since(0) == ["packed"]
            });
            booting = scene.daemon().log().len();
            linux.reboot();
        }
    }
    drop(linux);
    scene.stop();
}
