//! A daemon with two bystanders that exchange frames all the time, a victim's port, and its
//! correspondent's.

use std::path::Path;
use std::time::Duration;

use super::daemon::{Daemon, DaemonOptions};
use super::guest::{Guest, GuestOptions, Ram};
use super::traffic::{Bystanders, frame, mac, read};
use super::wait_for;

/// Name of the port where something is done to the switch, and of the one that its frames go to.
pub(crate) const VICTIM: &str = "p2";
pub(crate) const SINK: &str = "p3";
/// For a frame that should arrive soon; tests share their CPUs.
const LIMIT: Duration = Duration::from_secs(20);

/// Bystanders are `mac(1)` and `mac(2)`, the victim is `mac(3)`, its correspondent `mac(4)`.
#[derive(Debug)]
pub(crate) struct Scene {
    pub(crate) daemon: Daemon,
    pub(crate) bystanders: Bystanders,
}

impl Scene {
    pub(crate) fn new() -> Scene {
        Scene::with(&DaemonOptions::default())
    }

    pub(crate) fn with(options: &DaemonOptions) -> Scene {
        let daemon = Daemon::start(&DaemonOptions {
            ports: options.ports.max(4),
            ..options.clone()
        });
        let bystanders = Bystanders::start([&daemon.sockets()[0], &daemon.sockets()[1]]);
        Scene { daemon, bystanders }
    }

    pub(crate) fn victim(&self) -> &Path {
        &self.daemon.sockets()[2]
    }

    /// Attaches the victim's correspondent.
    pub(crate) fn attach_sink(&self, sink: &mut Guest<'_>) {
        sink.attach(&self.daemon.sockets()[3]);
        self.wait_until_running(SINK);
    }

    /// Attaches the victim; frames pass from it to `sink` when this returns.
    pub(crate) fn attach_victim(&self, guest: &mut Guest<'_>, sink: &mut Guest<'_>) {
        guest.attach(self.victim());
        self.wait_until_running(VICTIM);
        self.passes(guest, sink, 0);
    }

    pub(crate) fn wait_until_running(&self, port: &str) {
        wait_for(port, || self.daemon.state(port).0 == "running");
        self.daemon.settle();
    }

    /// A frame of the victim, which arrives at `sink`.
    pub(crate) fn passes(&self, guest: &mut Guest<'_>, sink: &mut Guest<'_>, number: u64) {
        guest.send(&frame(mac(4), mac(3), number, 100));
        assert_eq!(next(sink, 3), number, "a frame of the victim");
    }

    /// A frame to the victim, which arrives.
    pub(crate) fn reaches(&self, guest: &mut Guest<'_>, sink: &mut Guest<'_>, number: u64) {
        sink.send(&frame(mac(3), mac(4), number, 100));
        assert_eq!(next(guest, 4), number, "a frame to the victim");
    }

    /// A guest of the usual kind is served on the victim's port, and goes.
    pub(crate) fn serves(&self, sink: &mut Guest<'_>) {
        let ram = Ram::new(GuestOptions::default());
        let mut guest = Guest::new(&ram);
        self.attach_victim(&mut guest, sink);
        self.reaches(&mut guest, sink, 9);
        guest.detach();
        self.wait_until_left();
    }

    /// The victim's session has ended.
    pub(crate) fn wait_until_left(&self) {
        wait_for("the session's end", || {
            self.daemon.state(VICTIM).0 == "waiting"
        });
    }

    /// The bystanders have lost nothing, and the daemon ends well and without having reported an
    /// error of its own.
    pub(crate) fn finish(mut self) {
        self.bystanders.go_on(100);
        self.bystanders.finish();
        self.daemon.assert_alive();
        let log = self.daemon.log();
        assert!(!log.contains("ERROR") && !log.contains("panicked"), "{log}");
        self.daemon.stop();
    }
}

/// Number of the next frame that comes from `mac(from)`; there may be floods of others'.
pub(crate) fn next(guest: &mut Guest<'_>, from: u8) -> u64 {
    loop {
        let bytes = guest.receive(LIMIT).expect("a frame arrives");
        let label = read(&bytes);
        if label.from == mac(from) {
            return label.sequence;
        }
    }
}
