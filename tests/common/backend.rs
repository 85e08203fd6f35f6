//! The backend that a frontend test attaches to: Pollux, unless `POLLUX_TEST_BACKEND` names one of
//! the starters in `benches/backends` (`testpmd`, `ovs`).
//!
//! That variable serves to check the tests themselves: what they demand of Pollux, another
//! implementation must be able to pass.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use super::daemon::{Daemon, DaemonOptions};
use super::process::Process;
use super::{cpus, short_tempdir, socket_path};

/// A running backend with ports `p0`, `p1`, ….
#[derive(Debug)]
pub(crate) enum Backend {
    /// The program under test.
    Pollux(Daemon),
    /// Another implementation.
    Other(Starter),
}

/// What went through each port.
#[derive(Debug)]
pub(crate) struct Carried {
    /// Frames in each direction.
    pub(crate) frames: u64,
    /// Descriptors that its driver used for what it sent: with indirect descriptors, and without
    /// them.
    pub(crate) sent: [u64; 2],
    /// Descriptors of the buffers that it received in.
    pub(crate) received: u64,
}

impl Carried {
    /// Whether a port has carried just this.
    fn is_by(&self, port: &Value) -> bool {
        let (statistics, session) = (&port["statistics"], &port["session"]);
        let features = session["features"].as_array().expect("features");
        let indirect = features.iter().any(|name| name == "indirect_desc");
        let sent = self.sent[usize::from(!indirect)];
        let rings = session["rings"].as_array().expect("rings");
        statistics["rx"]["frames"] == self.frames
            && statistics["tx"]["frames"] == self.frames
            && statistics["bad_buffers"] == 0
            && have_passed(rings, "rx", self.frames, sent)
            && have_passed(rings, "tx", self.received, self.received)
    }
}

/// Whether so many chains, or descriptors, have passed in the rings of a direction, as far as their
/// positions tell: those of split rings count chains up to 65536, those of packed rings descriptors
/// up to two laps.
fn have_passed(rings: &[Value], direction: &str, chains: u64, descriptors: u64) -> bool {
    let (mut passed, mut wanted, mut end) = (0, 0, 1);
    for ring in rings.iter().filter(|ring| ring["direction"] == direction) {
        assert_eq!(ring["state"], "running", "{ring}");
        let position = ring["position"].as_u64().expect("a position");
        if ring["kind"] == "split" {
            passed += position;
            (wanted, end) = (chains, 1 << 16);
        } else {
            // A slot, and the wrap counter, which is set in the first lap.
            let size = ring["size"].as_u64().expect("a size");
            let lap = if position & 0x8000 == 0 { size } else { 0 };
            passed += lap + (position & 0x7fff);
            (wanted, end) = (descriptors, 2 * size);
        }
    }
    assert!(end > 1, "no ring: {direction}");
    passed % end == wanted % end
}

/// A starter of `benches/backends`, which stops its backend on SIGTERM.
#[derive(Debug)]
pub(crate) struct Starter {
    process: Process,
    /// Where the sockets are; kept until the backend has ended.
    _dir: tempfile::TempDir,
    sockets: Vec<PathBuf>,
}

impl Starter {
    fn start(
        name: &str,
        dir: tempfile::TempDir,
        (ports, queues): (usize, u16),
        client: bool,
    ) -> Starter {
        let starter = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("benches/backends")
            .join(name);
        let mut command = Command::new(starter);
        command.arg("--dir").arg(dir.path());
        command.args(["--ports", &ports.to_string()]);
        command.args(["--queues", &queues.to_string()]);
        command.args(["--cpu", &cpus().0.to_string()]);
        command.args(["--mode", if client { "client" } else { "server" }]);
        let process = Process::spawn(name, &mut command);
        let ready = process.out.wait("ready\n", 0, Duration::from_secs(60));
        assert!(ready.is_some(), "{name} is not ready{}", process.words());
        Starter {
            process,
            sockets: (0..ports).map(|n| socket_path(dir.path(), n)).collect(),
            _dir: dir,
        }
    }

    fn stop(mut self) {
        let words = self.process.words();
        assert!(self.process.ended().is_none(), "it died{words}");
        self.process.signal(Signal::TERM);
        let status = self.process.wait(Duration::from_secs(20));
        let code = status.and_then(|status| status.code());
        assert_eq!(code, Some(0), "its stop{}", self.process.words());
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        // Killed, it could not stop what it started.
        if self.process.ended().is_none() {
            self.process.signal(Signal::TERM);
            self.process.wait(Duration::from_secs(20));
        }
    }
}

impl Backend {
    /// Starts a backend that listens on `ports` sockets.
    pub(crate) fn listening(ports: usize) -> Backend {
        Backend::start(short_tempdir(), (ports, 1), false)
    }

    /// The same with `p0.sock`, … in `dir`, and so many queue pairs each.
    pub(crate) fn listening_in(dir: tempfile::TempDir, ports: usize, queues: u16) -> Backend {
        Backend::start(dir, (ports, queues), false)
    }

    /// Starts a backend that connects to frontends listening on `p0.sock`, … in `dir`.
    pub(crate) fn connecting(dir: tempfile::TempDir, ports: usize, queues: u16) -> Backend {
        Backend::start(dir, (ports, queues), true)
    }

    fn start(dir: tempfile::TempDir, (ports, queues): (usize, u16), client: bool) -> Backend {
        if let Ok(name) = std::env::var("POLLUX_TEST_BACKEND") {
            return Backend::Other(Starter::start(&name, dir, (ports, queues), client));
        }
        let options = DaemonOptions {
            ports,
            queues,
            client,
            args: vec!["--poll-cpus".to_string(), cpus().0.to_string()],
            ..DaemonOptions::default()
        };
        Backend::Pollux(Daemon::start_in(dir, &options))
    }

    /// The sockets of its ports.
    pub(crate) fn sockets(&self) -> &[PathBuf] {
        match self {
            Backend::Pollux(daemon) => daemon.sockets(),
            Backend::Other(starter) => &starter.sockets,
        }
    }

    /// Waits until all ports forward.
    pub(crate) fn wait_ready(&self, ports: usize) {
        match self {
            Backend::Pollux(daemon) => {
                super::wait_for("all ports to run", || {
                    (0..ports).all(|n| daemon.port(&format!("p{n}"))["state"] == "running")
                });
                daemon.settle();
            }
            // Open vSwitch needs this long after the negotiation until a port forwards.
            Backend::Other(_) => std::thread::sleep(Duration::from_secs(1)),
        }
    }

    /// Pollux counted so many frames in and out of each port, no drop and no unusable buffer; it
    /// took and gave back each buffer once, as far as the positions of rings tell. Other backends
    /// are not asked.
    pub(crate) fn assert_carried(&self, carried: &Carried) {
        self.assert_no_drops();
        let Backend::Pollux(daemon) = self else {
            return;
        };
        for n in 0..daemon.sockets().len() {
            // The last buffers may be on their way back.
            let deadline = Instant::now() + Duration::from_secs(20);
            loop {
                let port = daemon.port(&format!("p{n}"));
                if carried.is_by(&port) {
                    break;
                }
                assert!(Instant::now() < deadline, "p{n}: {carried:?}: {port}");
                super::pause();
            }
        }
    }

    /// Pollux counted no drop at all; other backends are not asked.
    pub(crate) fn assert_no_drops(&self) {
        let Backend::Pollux(daemon) = self else {
            return;
        };
        for n in 0..daemon.sockets().len() {
            let name = format!("p{n}");
            let statistics = &daemon.port(&name)["statistics"];
            // Reasons that never occurred are left out, but the object they would stand in is
            // there.
            for direction in ["rx", "tx"] {
                assert!(statistics[direction]["drops"].is_object(), "{statistics}");
            }
            let counted = daemon.drops(&name);
            let nonzero: Vec<_> = counted.iter().filter(|(_, drops)| *drops != 0).collect();
            assert!(nonzero.is_empty(), "port p{n} dropped: {nonzero:?}");
        }
    }

    /// Stops it; it must still have been alive, and end in order.
    pub(crate) fn stop(self) {
        match self {
            Backend::Pollux(daemon) => daemon.stop(),
            Backend::Other(starter) => starter.stop(),
        }
    }
}
