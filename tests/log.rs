//! A log that cannot be written costs its lines, and nothing else: no thread panics or waits for
//! want of it.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use common::guest::{Guest, GuestOptions, Ram};
use common::traffic::{Exchange, attach_to};
use common::{memory_tempdir, short_tempdir, socket_path, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const BINARY: &str = env!("CARGO_BIN_EXE_pollux");

/// A daemon with three ports whose standard error is the test's; killed on drop.
struct Bare {
    child: Child,
    dir: tempfile::TempDir,
    _records: tempfile::TempDir,
}

impl Bare {
    fn start(err: impl Into<Stdio>) -> Bare {
        Bare::start_by(Command::new(BINARY).stderr(err))
    }

    /// `command` is the program, or starts it with the arguments that follow.
    fn start_by(command: &mut Command) -> Bare {
        let (dir, records) = (short_tempdir(), memory_tempdir());
        command.arg("run").arg("--api-socket");
        command.arg(dir.path().join("api.sock"));
        command.arg("--ring-state").arg(records.path());
        for n in 0..3 {
            let socket = socket_path(dir.path(), n);
            command.arg("--port");
            command.arg(format!("p{n},socket={},queues=1", socket.display()));
        }
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let bare = Bare {
            child,
            dir,
            _records: records,
        };
        wait_for("the ports", || bare.ports() == Some(3));
        bare
    }

    fn pollux(&self, args: &[&str]) -> Output {
        let socket = self.dir.path().join("api.sock");
        let mut command = Command::new(BINARY);
        command.args(args).arg("--api-socket").arg(socket);
        command.output().unwrap()
    }

    fn json(&self, args: &[&str]) -> Option<Value> {
        serde_json::from_slice(&self.pollux(args).stdout).ok()
    }

    fn ports(&self) -> Option<usize> {
        Some(self.json(&["port", "list", "--json"])?.as_array()?.len())
    }

    fn lost(&self) -> u64 {
        let stats = self.json(&["stats", "--json"]).unwrap();
        stats["log_lines_lost"].as_u64().unwrap()
    }

    fn sockets(&self) -> [PathBuf; 3] {
        [0, 1, 2].map(|n| socket_path(self.dir.path(), n))
    }

    /// Frontends that come and go at the last of its ports, each good for several lines.
    fn talk(&self) {
        self.talk_on(2);
    }

    fn talk_on(&self, port: usize) {
        let socket = &self.sockets()[port];
        for _ in 0..60 {
            let ram = Ram::new(GuestOptions::default());
            let mut guest = Guest::new(&ram);
            guest.attach(socket);
            guest.detach();
        }
    }

    /// Everything works as ever: sessions, traffic, the API, and the end.
    fn works(self) {
        let sockets = self.sockets();
        let rams = [(); 2].map(|()| Ram::new(GuestOptions::default()));
        let guests = attach_to(&sockets, &rams);
        let mut exchange = Exchange::new(guests, 1, &[(0, 1), (1, 0)], 8, 200);
        exchange.meet();
        for _ in 0..3 {
            self.talk();
            exchange.exchange(100);
        }
        exchange.drain();
        assert_eq!(
            self.pollux(&["port", "remove", "p2"]).status.code(),
            Some(0)
        );
        assert_eq!(self.ports(), Some(2));
        assert!(UnixStream::connect(&sockets[2]).is_err());
        drop(exchange);
        assert_eq!(self.end().code(), Some(0));
    }

    /// SIGTERM; how it ended, without a socket left.
    fn end(mut self) -> ExitStatus {
        let pid = Pid::from_raw(self.child.id().try_into().unwrap()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        let mut ended = None;
        wait_for("the end", || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        assert!(self.sockets().iter().all(|socket| !socket.exists()));
        ended.unwrap()
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // Both fail only for a child that has already been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A pipe without room for a single byte.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = pipe().unwrap();
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    rustix::fs::fcntl_setfl(&writer, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    while writer.write(b"x").is_ok() {}
    rustix::fs::fcntl_setfl(&writer, flags).unwrap();
    (reader, writer)
}

#[test]
fn a_reader_of_the_log_that_goes_takes_nobody_with_it() {
    let (mut reader, writer) = pipe().unwrap();
    let bare = Bare::start(writer);
    // As `head -1` does.
    reader.read_exact(&mut [0; 1]).unwrap();
    drop(reader);
    bare.talk();
    wait_for("lines that are lost", || bare.lost() > 0);
    bare.works();
}

#[test]
fn a_full_disk_takes_the_log_alone() {
    let bare = Bare::start(File::options().write(true).open("/dev/full").unwrap());
    bare.talk();
    wait_for("lines that are lost", || bare.lost() > 0);
    bare.works();
}

#[test]
fn nobody_waits_for_a_reader_of_the_log_that_stands_still() {
    let (reader, writer) = full_pipe();
    let bare = Bare::start(writer);
    bare.works();
    drop(reader);
}

#[test]
fn a_reader_of_the_log_that_goes_on_is_told_what_it_missed() {
    let (mut reader, writer) = full_pipe();
    let bare = Bare::start(writer);
    // Lines about each port are paced: the buffer holds nearly all that three of them may say at
    // once.
    wait_for("lines that are lost", || {
        (0..3).for_each(|port| bare.talk_on(port));
        bare.lost() > 0
    });
    let log = std::thread::spawn(move || {
        let mut text = Vec::new();
        reader.read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    });
    wait_for("its lines", || {
        let lost = bare.lost();
        // Nothing is lost any more once it is read.
        bare.talk();
        bare.lost() == lost
    });
    let lost = bare.lost();
    assert_eq!(bare.end().code(), Some(0));
    let log = log.join().unwrap();
    let told = log.lines().filter_map(|line| {
        let line = line.strip_suffix(" lines of the log were lost")?;
        line.rsplit(' ').next()?.parse::<u64>().ok()
    });
    assert_eq!(told.sum::<u64>(), lost);
    assert!(log.contains("SIGTERM received"), "the last lines: {log}");
}

#[test]
fn standard_descriptors_that_are_closed_are_not_taken_for_others() {
    let closed = r#"exec "$0" "$@" <&- >&- 2>&-"#;
    let bare = Bare::start_by(Command::new("sh").args(["-c", closed, BINARY]));
    for fd in 0..3 {
        let place = format!("/proc/{}/fd/{fd}", bare.child.id());
        assert_eq!(
            std::fs::read_link(place).unwrap().to_str(),
            Some("/dev/null")
        );
    }
    bare.works();
}

#[test]
fn commands_whose_output_nobody_reads_end_without_a_panic() {
    let broken = || {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        writer
    };
    let bare = Bare::start(Stdio::null());
    let api = bare.dir.path().join("api.sock");
    let no_api = bare.dir.path().join("nobody.sock");
    for (args, api, code) in [
        (&["port", "list"][..], &api, 0),
        (&["port", "show", "p0"], &api, 0),
        (&["stats", "--json"], &api, 0),
        (&["poll", "list"], &api, 0),
        (&["capture", "all", "--seconds", "1"], &api, 0),
        (&["trace", "--help"], &api, 0),
        (&["man"], &api, 0),
        (&["completions", "bash"], &api, 0),
        (&["port", "list"], &no_api, 3),
        (&["port", "show", "nobody"], &api, 4),
        (&["no-such-command"], &api, 2),
    ] {
        let mut command = Command::new(BINARY);
        command.args(args).env("POLLUX_API_SOCKET", api);
        command.stdout(broken()).stderr(broken());
        assert_eq!(command.status().unwrap().code(), Some(code), "{args:?}");
    }
    // A failure that nobody reads does not hold up the end, either.
    let (_reader, writer) = full_pipe();
    let mut command = Command::new(BINARY);
    command.args(["run", "--port", "x,socket=/nowhere/x.sock"]);
    let mut child = command
        .env("POLLUX_API_SOCKET", &no_api)
        .stderr(writer)
        .spawn()
        .unwrap();
    common::wait_for_within(Duration::from_secs(20), "its end", || {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none_or(|status| matches!(status.code(), Some(1..=5))));
        ended.is_some()
    });
    assert_eq!(bare.end().code(), Some(0));
}
