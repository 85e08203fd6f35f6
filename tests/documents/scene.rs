//! Where the commands of one block are run: a directory in place of `/run/pollux`, a daemon with
//! ports, and what is beside.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;

use crate::common::guest::{Guest, GuestOptions, Ram};
use crate::common::process::Process;
use crate::common::{cpus, memory_tempdir, pause, short_tempdir, wait_for};
use crate::extract::root;

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_pollux");
/// An emulated guest boots within it, and a benchmark is built.
const LIMIT: Duration = Duration::from_secs(600);
/// What ends only at Ctrl-C goes on for longer than this.
const MOMENT: Duration = Duration::from_secs(1);

/// See the module.
pub(crate) struct Scene {
    pub(crate) dir: tempfile::TempDir,
    /// Rings' records, in memory.
    _records: tempfile::TempDir,
    daemon: Option<Process>,
    /// Children that go on beside what is run.
    pub(crate) beside: Vec<Process>,
    /// Variables that lines of the block have set.
    variables: String,
}

impl Scene {
    pub(crate) fn new() -> Scene {
        let dir = short_tempdir();
        fs::create_dir(dir.path().join("run")).unwrap();
        Scene {
            dir,
            _records: memory_tempdir(),
            daemon: None,
            beside: Vec::new(),
            variables: String::new(),
        }
    }

    fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    pub(crate) fn socket(&self, port: &str) -> PathBuf {
        self.run_dir().join(format!("{port}.sock"))
    }

    /// The command as it can be run here: the paths of a system are those of the scene, and what
    /// takes long or wants a large machine is made smaller.
    pub(crate) fn adapt(&self, text: &str) -> String {
        let (first, second) = cpus();
        let group = rustix::process::getegid().as_raw();
        let profile = if cfg!(debug_assertions) {
            "dev"
        } else {
            "bench"
        };
        let ours = [
            ("target/release/pollux ", "pollux ".to_string()),
            ("/run/pollux", self.run_dir().display().to_string()),
            (
                "/tmp/vm1",
                self.dir.path().join("vm1").display().to_string(),
            ),
            ("--api-group netadmin", format!("--api-group {group}")),
            ("--poll-cpus 2-3", format!("--poll-cpus {first}-{second}")),
            ("--poll-cpus 2,3", format!("--poll-cpus {first},{second}")),
            ("--cpu 3", format!("--cpu {second}")),
            ("{\"cpu\":3}", format!("{{\"cpu\":{second}}}")),
            // A refusal is an answer to curl, unless it is told otherwise.
            ("curl -s", "curl --fail -s".to_string()),
            ("--seconds 60", "--seconds 1".to_string()),
            // An emulated guest shares its CPUs with other tests.
            ("qemu/ask ", "qemu/ask --timeout 300 ".to_string()),
            (" blast 5 ", " blast 1 ".to_string()),
            (
                "cargo bench ",
                format!("cargo bench --locked --profile {profile} "),
            ),
            ("--ports 2,8,32,128,512", "--ports 2,8".to_string()),
            ("--ports 64", "--ports 4".to_string()),
            (
                "--seconds 2 --rounds 5",
                "--seconds 0.1 --rounds 1".to_string(),
            ),
            (
                "--seconds 0.1 --rounds 7",
                "--seconds 0.01 --rounds 1".to_string(),
            ),
            ("--cpus 0,1", format!("--cpus {first},{second}")),
        ];
        let mut text = text.to_string();
        for (theirs, ours) in ours {
            text = text.replace(theirs, &ours);
        }
        // A CPU has one poll thread at most: where all have one, the next is not pinned.
        let cpus = std::thread::available_parallelism().map_or(1, |count| count.get());
        let third = if cpus > 2 { "--cpu 2 " } else { "" };
        text = text.replace("--cpu 4 ", third);
        if cfg!(debug_assertions) {
            text = text.replace("cargo build --release", "cargo build");
        }
        text
    }

    /// A shell with the command, in a process group of its own.
    pub(crate) fn spawn(&self, text: &str) -> Process {
        let place = |of: &str| text.starts_with(of);
        let from_root = ["cargo ", "qemu/", "benches/", "kill "]
            .into_iter()
            .any(place);
        let binaries = Path::new(BINARY).parent().unwrap().display();
        let mut shell = shell();
        shell.arg("-c").arg(format!("{}{text}", self.variables));
        shell.current_dir(if from_root { root() } else { self.dir.path() });
        shell.env(
            "PATH",
            format!("{binaries}:{}", std::env::var("PATH").unwrap()),
        );
        shell.env("POLLUX_API_SOCKET", self.run_dir().join("api.sock"));
        shell.env_remove("POLLUX_LOG").process_group(0);
        Process::spawn(text, &mut shell)
    }

    /// Runs the command to its end, which must be a success. What it printed.
    pub(crate) fn run(&mut self, text: &str) -> String {
        let adapted = self.adapt(text);
        if let Some((name, _)) = adapted.split_once('=')
            && name.bytes().all(|byte| byte.is_ascii_uppercase())
        {
            self.variables += &format!("{adapted}\n");
        }
        let mut process = self.spawn(&adapted);
        let status = process.wait(LIMIT);
        let words = process.words();
        assert!(
            status.is_some_and(|status| status.success()),
            "{text}: {status:?}{words}"
        );
        process.out.text()
    }

    /// Runs the command until Ctrl-C, which it must end at, in order.
    pub(crate) fn interrupt(&self, text: &str) {
        let mut process = self.spawn(&self.adapt(text));
        std::thread::sleep(MOMENT);
        assert_eq!(
            process.ended(),
            None,
            "{text} has ended by itself{}",
            process.words()
        );
        signal_group(&process, Signal::INT);
        let status = process.wait(LIMIT).expect("it ends at Ctrl-C");
        assert!(is_ctrl_c(status), "{text}: {status}{}", process.words());
    }

    /// Starts the daemon by the command, which is one of `pollux run`.
    pub(crate) fn start(&mut self, text: &str) {
        assert!(self.daemon.is_none(), "{text}: there is one");
        self.daemon = Some(self.spawn(&self.adapt(text)));
        let ready = self.daemon.as_ref().unwrap();
        let said = ready.err.wait("ready", 0, Duration::from_secs(20));
        assert!(said.is_some(), "{text}{}", ready.words());
    }

    /// A daemon with ports, for blocks that start none.
    pub(crate) fn start_usual(&mut self) {
        let ports = ["vm1", "vm2", "probe"]
            .map(|name| format!(" --port {name},socket=/run/pollux/{name}.sock"));
        let records = self._records.path().display().to_string();
        self.start(&format!(
            "pollux run --ring-state {records}{}",
            ports.concat()
        ));
    }

    /// State of a port.
    pub(crate) fn state(&self, port: &str) -> String {
        let shown = self.spawn(&format!("pollux port show {port} --json"));
        let text = shown.out.wait("\n}", 0, Duration::from_secs(20));
        let text = text.unwrap_or_else(|| panic!("{port}{}", shown.words()));
        let port: Value = serde_json::from_str(text.trim()).unwrap();
        port["state"].as_str().unwrap().to_string()
    }

    pub(crate) fn wait_until(&self, port: &str, what: &str, mut is: impl FnMut(&str) -> bool) {
        wait_for(&format!("{port} to be {what}"), || is(&self.state(port)));
    }

    /// Guests at vm1 and vm2 that send each other frames, beside all that is run from here on.
    pub(crate) fn start_traffic(&mut self) {
        let sockets = ["vm1", "vm2"].map(|port| self.socket(port).display().to_string());
        let command = format!(
            "pollux bench --json --window 8 --seconds 86000 --attach {}",
            sockets.join(",")
        );
        self.beside.push(self.spawn(&command));
        self.wait_until("vm2", "running", |state| state == "running");
    }

    /// Ends all, the daemon in order.
    pub(crate) fn stop(mut self) {
        for mut process in self.beside.drain(..) {
            if process.ended().is_none() {
                signal_group(&process, Signal::TERM);
                process.wait(Duration::from_secs(20));
            }
        }
        if let Some(mut daemon) = self.daemon.take() {
            daemon.signal(Signal::TERM);
            let status = daemon.wait(Duration::from_secs(20));
            let code = status.and_then(|status| status.code());
            assert_eq!(code, Some(0), "the daemon's end{}", daemon.words());
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // After a failure: whatever the shells have started goes with them.
        for process in self.beside.iter_mut().chain(&mut self.daemon) {
            if process.ended().is_none() {
                signal_group(process, Signal::KILL);
            }
        }
    }
}

/// A shell that Ctrl-C ends, also where whoever started the tests ignores it, as `&` in a script
/// does.
pub(crate) fn shell() -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal=INT,QUIT", "bash"]);
    command
}

/// As the terminal does: to all that run in the foreground.
pub(crate) fn signal_group(process: &Process, signal: Signal) {
    let id = i32::try_from(process.pid()).ok().and_then(Pid::from_raw);
    kill_process_group(id.unwrap(), signal).unwrap();
}

/// In order, or by the signal.
fn is_ctrl_c(status: ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt;
    [Some(0), Some(130)].contains(&status.code()) || status.signal() == Some(2)
}

/// Runs `what` while a guest at vm2 answers for the address 10.0.0.2.
pub(crate) fn beside_responder(scene: &mut Scene, what: impl FnOnce(&mut Scene)) {
    let ram = Ram::new(GuestOptions::default());
    let mut guest = Guest::new(&ram);
    guest.attach(&scene.socket("vm2"));
    let done = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                match guest.try_receive().and_then(|frame| answer(&frame)) {
                    Some(answer) => guest.send(&answer),
                    None => pause(),
                }
            }
        });
        let _stop = crate::common::Stop(&done);
        what(scene);
    });
}

/// To a question for 10.0.0.2's address, and to a ping.
fn answer(frame: &[u8]) -> Option<Vec<u8>> {
    const OURS: [u8; 6] = crate::common::linux::OURS;
    const ADDRESS: [u8; 4] = crate::common::linux::OUR_IP;
    let mut answer = frame.to_vec();
    let (target, asker) = match (frame.get(12..14)?, frame.get(20..22)?) {
        ([8, 6], [0, 1]) => (frame.get(38..42)?, frame.get(22..32)?),
        ([8, 0], _) if frame.get(23) == Some(&1) && frame.get(34) == Some(&8) => {
            (frame.get(30..34)?, &frame[26..30])
        }
        _ => return None,
    };
    if target != ADDRESS {
        return None;
    }
    answer.copy_within(6..12, 0);
    answer[6..12].copy_from_slice(&OURS);
    if asker.len() == 10 {
        answer[21] = 2;
        answer[22..28].copy_from_slice(&OURS);
        answer[28..32].copy_from_slice(&ADDRESS);
        answer[32..42].copy_from_slice(asker);
    } else {
        answer[26..30].copy_from_slice(&ADDRESS);
        answer[30..34].copy_from_slice(asker);
        // An echo becomes a reply: the sum grows by what the type has lost (RFC 1624).
        answer[34] = 0;
        let sum = u16::from_be_bytes([answer[36], answer[37]]);
        let (sum, carry) = sum.overflowing_add(0x0800);
        answer[36..38].copy_from_slice(&(sum + u16::from(carry)).to_be_bytes());
    }
    Some(answer)
}
