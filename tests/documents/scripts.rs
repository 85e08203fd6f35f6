//! The scripts as a newcomer runs them: from a directory with a space, with the path that Debian
//! gives an ordinary user, and without a terminal; what is missing is said at once, and Ctrl-C ends
//! everything in one sentence.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::common::process::Process;
use crate::common::short_tempdir;
use crate::extract::root;
use crate::scene::{BINARY, Scene, shell, signal_group};

/// Two emulated guests boot and send for a while.
const LIMIT: Duration = Duration::from_secs(400);
/// Of Debian's ordinary users.
const PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// A clone of the scripts in a directory with a space, beside a program that was built already.
struct Clone {
    dir: tempfile::TempDir,
}

impl Clone {
    fn new() -> Clone {
        let dir = short_tempdir();
        let clone = Clone { dir };
        let place = clone.root();
        fs::create_dir_all(place.join("target/release")).unwrap();
        fs::create_dir(place.join("bin")).unwrap();
        let copied = Command::new("cp")
            .arg("-r")
            .arg(root().join("qemu"))
            .arg(&place)
            .status();
        assert!(copied.unwrap().success());
        symlink(BINARY, place.join("target/release/pollux")).unwrap();
        clone.add_program("cargo", "exit 0");
        clone
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("my pollux")
    }

    fn add_program(&self, name: &str, text: &str) {
        let path = self.root().join("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Starts a script, as a shell with a terminal does: as a process group of its own, but without
    /// the terminal.
    fn spawn(&self, path: &str, text: &str) -> Process {
        let mut command = shell();
        command
            .args(["-c", &format!("exec {text}")])
            .current_dir(self.root());
        command.env(
            "PATH",
            format!("{}:{path}", self.root().join("bin").display()),
        );
        command
            .env("TMPDIR", self.root())
            .env_remove("CARGO_TARGET_DIR");
        command.process_group(0);
        Process::spawn(text, &mut command)
    }
}

/// The demonstration, whose figures must agree.
pub(crate) fn demo(_scene: &mut Scene, text: &str) {
    let clone = Clone::new();
    let mut process = clone.spawn(PATH, text);
    let status = process.wait(LIMIT);
    let words = process.words();
    assert!(
        status.is_some_and(|status| status.success()),
        "{status:?}{words}"
    );
    let result: Value = serde_json::from_str(&process.out.text()).unwrap();
    assert_eq!(result["ok"], true, "{result}");
    let rows = result["steps"].as_array().unwrap();
    assert_eq!(rows.len(), 4, "{result}");
}

#[test]
fn ctrl_c_ends_the_demonstration_in_one_sentence() {
    let clone = Clone::new();
    let mut process = clone.spawn(PATH, "qemu/demo");
    let booting = process.err.wait("booting two guests", 0, LIMIT);
    assert!(booting.is_some(), "{}", process.words());
    // Both guests are there, and it waits for an answer of the first.
    let ready = |name: &str| {
        let found = Command::new("find")
            .arg(clone.root())
            .args(["-name", name])
            .output();
        String::from_utf8(found.unwrap().stdout)
            .unwrap()
            .lines()
            .count()
            == 2
    };
    crate::common::wait_for("both guests", || ready("console.log"));
    let before = process.err.text().len();
    signal_group(&process, Signal::INT);
    let status = process.wait(Duration::from_secs(30)).expect("it ends");
    assert_eq!(status.code(), Some(130), "{}", process.words());
    let said = process.err.text();
    let (_, last) = said.split_at(before);
    assert!(last.ends_with("demo: interrupted\n"), "{said}");
    assert!(
        !said.contains("console") && !said.contains("has ended"),
        "{said}"
    );
    let left = fs::read_dir(clone.root()).unwrap();
    let names = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = names.filter(|name| name.starts_with("pollux.")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn everything_that_is_missing_is_said_at_once_and_before_the_build() {
    let clone = Clone::new();
    clone.add_program("cargo", "echo built; exit 1");
    // A path with nothing of the guests' but what every system has.
    let programs = clone.root().join("programs");
    fs::create_dir(&programs).unwrap();
    for name in [
        "bash", "dirname", "sed", "sort", "setpriv", "setsid", "rm", "cat", "mktemp", "env",
    ] {
        let found = PATH.split(':').map(|place| Path::new(place).join(name));
        let found = found.into_iter().find(|path| path.exists()).unwrap();
        symlink(found, programs.join(name)).unwrap();
    }
    let text = fs::read_to_string(clone.root().join("qemu/lib.sh")).unwrap();
    // It adds system directories to the path, where this machine has what is to be missing; and
    // only root would install it.
    let text = text.replace("PATH=$PATH:/usr/sbin:/sbin", "");
    let text = text.replace("$EUID -ne 0", "1 -eq 1");
    fs::write(clone.root().join("qemu/lib.sh"), text).unwrap();
    let path = programs.display().to_string();
    let mut process = clone.spawn(&path, "qemu/demo");
    let status = process.wait(Duration::from_secs(30)).expect("it ends");
    assert_eq!(status.code(), Some(1), "{}", process.words());
    let said = process.err.text();
    assert_eq!(said.lines().count(), 1, "{said}");
    for package in [
        "qemu-system-x86",
        "busybox-static",
        "cpio",
        "xz-utils",
        "ethtool",
        "jq",
        "gcc",
    ] {
        assert!(said.contains(package), "{package}: {said}");
    }
}

/// Files below the repository that somebody runs.
fn programs() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in [
        "qemu",
        "benches",
        "benches/backends",
        "tests",
        ".ci",
        "wireshark",
    ] {
        for entry in fs::read_dir(root().join(folder)).unwrap() {
            let entry = entry.unwrap();
            let kind = entry.metadata().unwrap();
            if kind.is_file() && kind.permissions().mode() & 0o111 != 0 {
                found.push(entry.path());
            }
        }
    }
    found
}

#[test]
fn the_help_of_every_script_fits_into_80_columns() {
    let mut helped = 0;
    for program in programs() {
        let text = fs::read_to_string(&program).unwrap();
        if !text.contains("--help") && !text.contains("argparse") {
            continue;
        }
        let output = Command::new(&program)
            .arg("--help")
            .env("COLUMNS", "80")
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let code = output.status.code();
        assert!(
            code == Some(0) && said.lines().count() > 1,
            "{program:?}: {code:?} {said}"
        );
        let wide: Vec<&str> = said
            .lines()
            .filter(|line| line.chars().count() > 80)
            .collect();
        assert!(wide.is_empty(), "{program:?}: {wide:#?}");
        helped += 1;
    }
    assert!(helped > 10, "{helped}");
}
