//! The order of a real frontend's messages: QEMU's, of the version that Debian 12 has and of a
//! newer one, at a guest's start, when its driver goes and comes back, at its reboot, when the
//! switch comes back, and at its end. Scripted frontends, and what the documentation says of QEMU,
//! are held against `tests/orders/`.
//!
//! `POLLUX_RECORD=1` writes the files anew.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::daemon::{Daemon, DaemonOptions};
use common::linux::{LIMIT, Linux, LinuxOptions, script};
use common::recorder::Recorder;
use common::{short_tempdir, wait_for_within};

/// Nothing more belongs to what has been done: QEMU's own threads and timers are done with it.
const QUIET: Duration = Duration::from_secs(3);

/// `7.2`.
fn version(qemu: &str) -> String {
    let output = Command::new(qemu).arg("-version").output();
    let output = output.unwrap_or_else(|error| panic!("{qemu}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (_, rest) = text.split_once(" version ").expect("a version");
    let numbers: Vec<&str> = rest.split(['.', ' ', '\n']).take(2).collect();
    numbers.join(".")
}

/// Messages, or up to eight of them together, that come again at once are there once: how many
/// regions of memory there are, how often a driver writes its status, and how often it masks an
/// interrupt, is not the frontend's order.
fn normalised(messages: &[String]) -> String {
    let mut kept: Vec<&str> = Vec::new();
    for message in messages {
        kept.push(message);
        let again = |len: &usize| {
            let (before, last) = kept.split_at(kept.len() - len);
            before.ends_with(last)
        };
        if let Some(len) = (1..=8.min(kept.len() / 2)).find(again) {
            kept.truncate(kept.len() - len);
        }
    }
    let lines = kept.iter().map(|message| format!("  {message}\n"));
    lines.collect()
}

/// What QEMU says to a switch in a guest's life.
fn record(qemu: &str, queues: u16) -> String {
    let daemon = Daemon::start(&DaemonOptions {
        ports: 1,
        queues,
        ..DaemonOptions::default()
    });
    let place = short_tempdir();
    let socket = place.path().join("recorded.sock");
    let recorder = Recorder::between(&socket, &daemon.sockets()[0]);
    let options = LinuxOptions {
        queues,
        ..LinuxOptions::default()
    };
    let mut guest = Command::new(script("guest"));
    // With hardware virtualisation its card has other interrupts, and says more of them.
    guest.env("QEMU", qemu).env("POLLUX_ACCEL", "tcg");
    let linux = Linux::start_by(
        &mut guest,
        &daemon.dir().join("linux"),
        &socket,
        &options,
        &["-action", "reboot=reset"],
    );
    let mut text = String::new();
    let mut section = |what: &str, messages: &[String]| {
        assert!(!messages.is_empty(), "{what}: nothing was said");
        write!(
            text,
            "{queues} queue pairs, {what}:\n{}",
            normalised(messages)
        )
        .unwrap();
    };
    let running = || {
        wait_for_within(LIMIT, "the port to run", || {
            daemon.state("p0").0 == "running"
        });
        recorder.take(QUIET)
    };
    linux.ask("ip link set eth0 up");
    section("start", &running());
    linux.ask("rmmod virtio_net");
    section("driver unloaded", &recorder.take(QUIET));
    linux.ask("insmod /modules/virtio_net.ko && ip link set eth0 up");
    section("driver loaded", &running());
    linux.reboot();
    linux.ask("ip link set eth0 up");
    section("reboot", &running());
    recorder.cut();
    wait_for_within(LIMIT, "QEMU to come back", || recorder.connections() == 2);
    section("switch away and back", &running());
    linux.quit();
    section("end", &recorder.take(QUIET));
    daemon.stop();
    text
}

/// The file of a version says what it does.
fn assert_recorded(qemu: &str) {
    let version = version(qemu);
    let said = [1, 2].map(|queues| record(qemu, queues)).concat();
    let name = format!("tests/orders/qemu-{version}.txt");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&name);
    if std::env::var("POLLUX_RECORD").is_ok_and(|value| value == "1") {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &said).unwrap();
    }
    let known = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        said == known,
        "{name} does not say what QEMU {version} says; POLLUX_RECORD=1 writes it anew:\n{said}"
    );
}

#[test]
fn the_systems_qemu_says_what_is_recorded() {
    assert_recorded("qemu-system-x86_64");
}

#[test]
fn a_newer_qemu_says_what_is_recorded() {
    let output = Command::new(script("backports")).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
    assert_recorded(String::from_utf8(output.stdout).unwrap().trim());
}
