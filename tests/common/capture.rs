//! `pollux capture` as a process of its own, and what is in its files, as tshark reads them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use super::daemon::Daemon;
use super::process::Process;

/// For an end that should come soon; tests share their CPUs.
const LIMIT: Duration = Duration::from_secs(20);

/// A capture that runs.
#[derive(Debug)]
pub(crate) struct Capture {
    pub(crate) process: Process,
    pub(crate) file: PathBuf,
}

impl Capture {
    /// Starts `pollux capture` into a file of this name; it has begun when this returns.
    pub(crate) fn start(daemon: &Daemon, name: &str, args: &[&str]) -> Capture {
        let file = daemon.dir().join(name);
        let mut all = args.to_vec();
        let path = file.to_str().expect("a plain path").to_string();
        all.extend(["-w", &path]);
        Capture {
            process: begin(daemon, &[&["capture"], &all[..]].concat()),
            file,
        }
    }

    /// Ends it as Ctrl-C does; returns the frames captured and those missed, as it says.
    pub(crate) fn end(mut self) -> (u64, u64, PathBuf) {
        self.process.signal(Signal::INT);
        let status = self.process.wait(LIMIT);
        let words = self.process.words();
        assert!(status.is_some_and(|status| status.success()), "{words}");
        let (captured, missed) = counts(&self.process);
        (captured, missed, self.file)
    }

    /// Waits until it ends by itself; exit code, and what it said.
    pub(crate) fn ended(&mut self) -> (Option<i32>, String) {
        let status = self.process.wait(LIMIT);
        let words = self.process.words();
        let status = status.unwrap_or_else(|| panic!("the capture goes on{words}"));
        (status.code(), words)
    }
}

/// Starts a client command that says when it has begun.
pub(crate) fn begin(daemon: &Daemon, args: &[&str]) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pollux"));
    command.args(args);
    command
        .arg("--api-socket")
        .arg(daemon.dir().join("api.sock"));
    let process = Process::spawn("capture", &mut command);
    let begun = process.err.wait("has begun", 0, LIMIT);
    assert!(begun.is_some(), "{}", process.words());
    process
}

/// What `N frames captured, M missed` says.
pub(crate) fn counts(process: &Process) -> (u64, u64) {
    let said = process.err.wait("missed", 0, LIMIT);
    let said = said.unwrap_or_else(|| panic!("no count{}", process.words()));
    let line = said.lines().last().unwrap_or_default();
    let words: Vec<&str> = line.split([' ', ':', ';', ',']).collect();
    let before = |word: &str| {
        let at = words.iter().position(|other| *other == word);
        let number = at.and_then(|at| words[..at].iter().rev().find_map(|w| w.parse().ok()));
        number.unwrap_or_else(|| panic!("{line}"))
    };
    (before("captured"), before("missed"))
}

/// Runs tshark, which must succeed; returns what it prints.
pub(crate) fn tshark(args: &[&str]) -> String {
    let output = Command::new("tshark").args(args).output();
    let output = output.expect("tshark runs; Debian's package is called tshark");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "tshark {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A frame as tshark reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) port: String,
    /// 1 is inbound, 2 outbound.
    pub(crate) direction: String,
    pub(crate) comment: String,
    pub(crate) len: usize,
    /// Seconds since 1970, as they are printed.
    pub(crate) time: String,
    pub(crate) bytes: Vec<u8>,
}

/// All frames of a file: their bytes by way of a file that tshark writes, the rest as it prints it.
pub(crate) fn read(path: &Path) -> Vec<Seen> {
    let plain = path.with_extension("plain");
    let (from, to) = (
        path.to_str().expect("plain"),
        plain.to_str().expect("plain"),
    );
    tshark(&["-r", from, "-F", "pcap", "-w", to]);
    let bytes = captured_bytes(&plain);
    let fields = [
        "frame.interface_name",
        "frame.packet_flags_direction",
        "frame.comment",
        "frame.len",
        "frame.time_epoch",
    ];
    let mut args = vec!["-r", from, "-T", "fields", "-E", "separator=|"];
    args.extend(fields.iter().flat_map(|field| ["-e", field]));
    let text = tshark(&args);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), bytes.len(), "frames of {path:?}");
    let seen = lines.iter().zip(bytes).map(|(line, bytes)| {
        let fields: Vec<&str> = line.split('|').collect();
        let direction = fields[1].trim_start_matches("0x").trim_start_matches('0');
        Seen {
            port: fields[0].to_string(),
            direction: direction.to_string(),
            comment: fields[2].to_string(),
            len: fields[3].parse().expect("a length"),
            time: fields[4].to_string(),
            bytes,
        }
    });
    seen.collect()
}

/// The bytes of each frame in a pcap file of this machine's byte order, however many were kept.
fn captured_bytes(path: &Path) -> Vec<Vec<u8>> {
    let file = std::fs::read(path).expect("tshark's file");
    let mut frames = Vec::new();
    let mut at = 24;
    while at < file.len() {
        let kept = file[at + 8..at + 12].try_into().expect("four bytes");
        let end = at + 16 + u32::from_ne_bytes(kept) as usize;
        frames.push(file[at + 16..end].to_vec());
        at = end;
    }
    frames
}
