//! The `pollux` binary under test, with its ports in a directory of its own.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use super::process::Process;
use super::{memory_tempdir, short_tempdir, socket_path, wait_for};

const BINARY: &str = env!("CARGO_BIN_EXE_pollux");

/// How to start a daemon.
#[derive(Debug, Clone, Default)]
pub(crate) struct DaemonOptions {
    /// Ports `p0`, `p1`, …, with sockets of the same names.
    pub(crate) ports: usize,
    /// Queue pairs of each port; 0 is the default.
    pub(crate) queues: u16,
    /// Drivers may reset one ring.
    pub(crate) ring_reset: bool,
    /// Pollux connects, the frontends listen.
    pub(crate) client: bool,
    /// Whose process it is, if not the test's.
    pub(crate) user: Option<u32>,
    /// Further arguments of `pollux run`.
    pub(crate) args: Vec<String>,
}

/// A running daemon; killed on drop.
#[derive(Debug)]
pub(crate) struct Daemon {
    process: Process,
    dir: tempfile::TempDir,
    /// Where its packed rings keep their records, unless the test says where.
    records: tempfile::TempDir,
    sockets: Vec<PathBuf>,
}

impl Daemon {
    /// Starts it and waits until its API answers and knows all ports.
    pub(crate) fn start(options: &DaemonOptions) -> Daemon {
        Daemon::start_in(short_tempdir(), options)
    }

    /// The same in a directory that a frontend may already listen in.
    pub(crate) fn start_in(dir: tempfile::TempDir, options: &DaemonOptions) -> Daemon {
        let records = memory_tempdir();
        let mut command = match options.user {
            None => Command::new(BINARY),
            Some(user) => as_user(user, [dir.path(), records.path()]),
        };
        command.arg("run").arg("--api-socket");
        command.arg(dir.path().join("api.sock"));
        if !options.args.iter().any(|arg| arg == "--ring-state") {
            command.arg("--ring-state").arg(records.path());
        }
        let sockets: Vec<PathBuf> = (0..options.ports)
            .map(|n| socket_path(dir.path(), n))
            .collect();
        for (n, socket) in sockets.iter().enumerate() {
            let mode = if options.client { "client" } else { "server" };
            command.arg("--port").arg(format!(
                "p{n},socket={},mode={mode},queues={},ring-reset={}",
                socket.display(),
                options.queues.max(1),
                if options.ring_reset { "on" } else { "off" }
            ));
        }
        command.args(&options.args);
        let mut daemon = Daemon {
            process: Process::spawn("pollux", &mut command),
            dir,
            records,
            sockets,
        };
        daemon.wait_for_api();
        // They are made after that.
        wait_for("the ports", || daemon.ports().len() == options.ports);
        daemon
    }

    fn wait_for_api(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let listed = self.pollux(&["port", "list", "--json"]);
            let ports = serde_json::from_slice::<Vec<Value>>(&listed.stdout);
            // They are added after the API has begun to answer.
            if listed.status.success() && ports.is_ok_and(|p| p.len() >= self.sockets.len()) {
                return;
            }
            self.assert_alive();
            assert!(
                Instant::now() < deadline,
                "the API does not answer after 10 s{}",
                self.process.words()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs a client command against this daemon.
    pub(crate) fn pollux(&self, args: &[&str]) -> Output {
        Command::new(BINARY)
            .args(args)
            .arg("--api-socket")
            .arg(self.dir.path().join("api.sock"))
            .output()
            .expect("pollux runs")
    }

    /// The same for a command that may be refused: exit code, and everything it said.
    pub(crate) fn try_pollux(&self, args: &[&str]) -> (i32, String) {
        let output = self.pollux(args);
        let said = [output.stdout, output.stderr].concat();
        let code = output.status.code().expect("an exit code");
        (code, String::from_utf8_lossy(&said).into_owned())
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let output = self.pollux(args);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success(),
            "pollux {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error}: {text}"))
    }

    /// `pollux port list --json`, parsed.
    pub(crate) fn ports(&self) -> Vec<Value> {
        match self.json(&["port", "list", "--json"]) {
            Value::Array(ports) => ports,
            other => panic!("not an array: {other}"),
        }
    }

    /// `pollux port show NAME --json`, parsed.
    pub(crate) fn port(&self, name: &str) -> Value {
        self.json(&["port", "show", name, "--json"])
    }

    /// `pollux poll list --json`, parsed.
    pub(crate) fn poll_threads(&self) -> Value {
        self.json(&["poll", "list", "--json"])
    }

    /// `pollux stats --json`, parsed.
    pub(crate) fn stats(&self) -> Value {
        self.json(&["stats", "--json"])
    }

    /// A port's state, and why it does not work, if it says so.
    pub(crate) fn state(&self, name: &str) -> (String, String) {
        let port = self.port(name);
        let text = |key: &str| port[key].as_str().unwrap_or_default().to_string();
        (text("state"), text("reason"))
    }

    /// One drop counter of a port: `direction` is `rx` or `tx`.
    pub(crate) fn dropped(&self, name: &str, direction: &str, reason: &str) -> u64 {
        let port = self.port(name);
        let drops = &port["statistics"][direction]["drops"];
        drops[reason].as_u64().unwrap_or(0)
    }

    /// Waits until every poll thread works with everything that frontends have asked for so far: an
    /// attachment is answered before that.
    pub(crate) fn settle(&self) {
        // What is answered first comes after the frontends' messages, and before its own turn's
        // publication.
        self.ports();
        super::wait_for("the poll threads", || {
            let threads = self.poll_threads();
            let threads = threads.as_array().expect("an array");
            threads
                .iter()
                .all(|thread| thread["generation"] == thread["acknowledged_generation"])
        });
    }

    /// All drops of a port, whatever the direction and the reason, with their names.
    pub(crate) fn drops(&self, name: &str) -> Vec<(String, u64)> {
        let mut found = Vec::new();
        collect_drops("", false, &self.port(name), &mut found);
        found
    }

    /// The sockets of its ports, in order.
    pub(crate) fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    /// The directory with its sockets.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The files with the records of its packed rings, unless the test has chosen where they are.
    pub(crate) fn records(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.records.path()).expect("our directory");
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<String> = names
            .map(|name| name.into_string().expect("text"))
            .collect();
        names.sort();
        names
    }

    /// The daemon's process id, for looking into `/proc`.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its log so far.
    pub(crate) fn log(&self) -> String {
        self.process.err.text()
    }

    /// Waits until the daemon has logged this: its log comes through a pipe, later than what it
    /// did.
    pub(crate) fn assert_logged(&self, text: &str) {
        wait_for(text, || self.log().contains(text));
    }

    /// Fails with the end of the log if the daemon has ended.
    pub(crate) fn assert_alive(&mut self) {
        if let Some(status) = self.process.ended() {
            panic!("pollux ended ({status}){}", self.process.words());
        }
    }

    /// SIGTERM: ends soon, with exit code 0 and without leaving a socket behind.
    pub(crate) fn stop(self) {
        self.stop_by(Signal::TERM);
    }

    /// SIGSTOP; all its threads stand when this returns.
    pub(crate) fn freeze(&self) {
        self.process.signal(Signal::STOP);
        wait_for("all threads to stand", || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid()));
            tasks.expect("its threads").flatten().all(|task| {
                let stat = std::fs::read_to_string(task.path().join("stat"));
                stat.is_ok_and(|stat| {
                    let state = stat.rsplit_once(") ");
                    state.is_some_and(|(_, rest)| rest.starts_with('T'))
                })
            })
        });
    }

    /// SIGCONT.
    pub(crate) fn thaw(&self) {
        self.process.signal(Signal::CONT);
    }

    /// SIGKILL; what it leaves in its directory stays there.
    pub(crate) fn kill(self) -> tempfile::TempDir {
        let Daemon { process, dir, .. } = self;
        drop(process);
        dir
    }

    /// The same as [`Daemon::stop`]; its directory stays for the next one.
    pub(crate) fn end(mut self) -> tempfile::TempDir {
        self.process.signal(Signal::TERM);
        let status = self.process.wait(Duration::from_secs(20));
        assert!(status.is_some_and(|status| status.success()), "{status:?}");
        self.assert_records_were_kept();
        self.dir
    }

    /// The same as [`Daemon::stop`] by another signal.
    pub(crate) fn stop_by(mut self, signal: Signal) {
        self.assert_alive();
        self.process.signal(signal);
        // It takes milliseconds. But io_destroy(2), at the end of each poll thread, waits for the
        // kernel's grace period: for seconds where a dozen threads want a CPU.
        let status = self.process.wait(Duration::from_secs(20));
        let words = self.process.words();
        let status = status.unwrap_or_else(|| panic!("still there long after {signal:?}{words}"));
        assert_eq!(status.code(), Some(0), "exit code after {signal:?}{words}");
        let left: Vec<PathBuf> = std::fs::read_dir(self.dir.path())
            .expect("our directory")
            .map(|entry| entry.expect("an entry").path())
            .filter(|path| path.extension().is_some_and(|end| end == "sock"))
            .collect();
        assert_eq!(left, Vec::<PathBuf>::new(), "sockets left behind");
        self.assert_records_were_kept();
    }

    /// No ring did without its record: it would take other paths than those that are shipped.
    fn assert_records_were_kept(&self) {
        let log = self.log();
        assert!(!log.contains("will not survive"), "{log}");
    }
}

/// The program as another user, whose these directories are from now on; in the first is a copy of
/// it that this user can reach. (`cp` makes it: a file that one of our own threads writes may be
/// open in a child of another one.)
fn as_user(user: u32, [dir, records]: [&Path; 2]) -> Command {
    let program = dir.join("pollux");
    let copied = Command::new("cp").arg(BINARY).arg(&program).status();
    assert!(copied.is_ok_and(|status| status.success()), "no copy");
    for place in [dir, records] {
        std::os::unix::fs::chown(place, Some(user), Some(user)).expect("root may");
    }
    let mut command = Command::new(program);
    command.uid(user).gid(user);
    command
}

/// Every number at or below a key that speaks of drops.
fn collect_drops(path: &str, inside: bool, value: &Value, found: &mut Vec<(String, u64)>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let inside = inside || key.contains("drop");
                collect_drops(&format!("{path}/{key}"), inside, value, found);
            }
        }
        Value::Array(values) => {
            for (n, value) in values.iter().enumerate() {
                collect_drops(&format!("{path}/{n}"), inside, value, found);
            }
        }
        Value::Number(number) if inside => {
            found.push((path.to_string(), number.as_u64().unwrap_or(u64::MAX)));
        }
        _ => {}
    }
}
