//! Linux in QEMU with memory that the switch cannot use, or cannot see what the guest writes to:
//! the one goes on with the rest, the other is told of in words.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::path::PathBuf;

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, Ram};
use common::linux::{Echo, LIMIT, Linux, LinuxOptions};
use common::wait_for_within;

/// What `statfs` calls a tmpfs.
const TMPFS: u64 = 0x0102_1994;

/// A daemon, a scripted guest at its first port, and Linux at its second.
fn scene(more: &[&str], act: impl FnOnce(&Daemon, &Linux, Guest<'_>)) {
    let daemon = Daemon::start(&DaemonOptions {
        ports: 2,
        ..DaemonOptions::default()
    });
    let ram = Ram::new(GuestOptions::default());
    let mut guest = Guest::new(&ram);
    guest.attach(&daemon.sockets()[0]);
    let options = LinuxOptions::default();
    let dir = daemon.dir().join("linux");
    let linux = Linux::start_with(&dir, &daemon.sockets()[1], &options, more);
    linux.configure();
    act(&daemon, &linux, guest);
    drop(linux);
    daemon.stop();
}

/// A file on a disk, or what else is no memory.
fn file_on_a_disk() -> PathBuf {
    let dirs = [env!("CARGO_TARGET_TMPDIR"), "/var/tmp", "/"];
    let on_a_disk = |dir: &&str| {
        let filesystem = rustix::fs::statfs(*dir);
        filesystem.is_ok_and(|filesystem| filesystem.f_type as u64 != TMPFS)
    };
    let dir = dirs.into_iter().find(on_a_disk);
    let dir = dir.expect("a directory that is not in memory, for the NVDIMM's file");
    PathBuf::from(dir).join(format!("nvdimm-{}", std::process::id()))
}

#[test]
fn a_guest_with_an_nvdimm_on_a_disk_goes_on_with_its_other_memory() {
    let file = file_on_a_disk();
    let nvdimm = format!(
        "memory-backend-file,id=nv,mem-path={},size=64M,share=on",
        file.display()
    );
    let more = [
        "-machine",
        "nvdimm=on",
        "-m",
        "192M,slots=2,maxmem=2G",
        "-object",
        &nvdimm,
        "-device",
        "nvdimm,id=nv1,memdev=nv",
    ];
    scene(&more, |daemon, _linux, guest| {
        // QEMU has the file open by now.
        let removed = std::fs::remove_file(&file);
        wait_for_within(LIMIT, "the port", || daemon.state("p1").0 == "running");
        let reason = daemon.state("p1").1;
        assert!(reason.starts_with("guest memory of 64 MiB at"), "{reason}");
        assert!(
            reason.contains("the region's file is on a file system of type"),
            "{reason}"
        );
        let session = &daemon.port("p1")["session"];
        assert_eq!(session["memory_unusable"][0]["bytes"], 64 << 20);
        let mut echo = Echo::new(guest);
        for size in [60, 1514, 9000] {
            echo.set_size(size);
            echo.exchange(30);
        }
        assert!(daemon.drops("p1").iter().all(|(_, count)| *count == 0));
        removed.unwrap();
    });
}

#[test]
fn a_guest_with_private_memory_that_has_a_file_is_told_of() {
    let private = ["memfd", "file"].map(|kind| {
        let path = if kind == "file" {
            ",mem-path=/dev/shm"
        } else {
            ""
        };
        format!("memory-backend-{kind},id=private,size=192M,share=off{path}")
    });
    for object in private {
        let more = ["-object", &object, "-machine", "memory-backend=private"];
        scene(&more, |daemon, _linux, _guest| {
            let words = "although the driver kicks: is the guest's memory private? share=on";
            wait_for_within(LIMIT, words, || daemon.state("p1").1.contains(words));
            assert_eq!(daemon.state("p1").0, "negotiating");
            daemon.assert_logged(words);
        });
    }
}
