//! Guest memory that goes away under traffic: the guest's port pays for it, nobody else.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, RING_SPACE, Ram};
use common::process::Process;
use common::traffic::{Exchange, acquainted, frame, mac};
use common::wait_for;
use pollux::memory::SharedMemory;
use pollux::virtio::driver::Buffer;
use rustix::fs::FallocateFlags;

const LIMIT: Duration = Duration::from_secs(20);
/// Bytes of a guest that are rings; buffers are all the rest.
const RINGS: u64 = 2 * RING_SPACE as u64;

/// A tmpfs of 8 MiB in a mount namespace of its own, which lasts as long as the process in it.
struct Tmpfs {
    _keeper: Process,
    root: PathBuf,
}

impl Tmpfs {
    fn mount() -> Tmpfs {
        // `cat` ends with the test, however that ends: it reads from it.
        let inner = "mount -t tmpfs -o size=8m tmpfs /mnt && echo mounted $$ && exec cat";
        // Who may not mount may in a user namespace.
        let script = format!("unshare -m sh -c '{inner}' || exec unshare -Urm sh -c '{inner}'");
        let keeper = Process::spawn("unshare", Command::new("sh").args(["-c", &script]));
        let said = keeper.out.wait("\n", 0, LIMIT);
        let said = said.unwrap_or_else(|| panic!("no tmpfs: {}", keeper.err.text()));
        let pid = said.trim().strip_prefix("mounted ").expect("its process");
        let root = format!("/proc/{pid}/root/mnt").into();
        Tmpfs {
            _keeper: keeper,
            root,
        }
    }

    fn create(&self, name: &str) -> File {
        let path: &Path = &self.root.join(name);
        let options = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path);
        options.unwrap()
    }

    /// Leaves no block for anybody.
    fn fill(&self) {
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(self.root.join("rest"));
        let file = file.as_mut().unwrap();
        let error = loop {
            if let Err(error) = file.write_all(&[1; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), ErrorKind::StorageFull);
    }
}

/// What happens to a guest's buffers, whose rings stay.
#[derive(Clone, Copy, Debug)]
enum Loss {
    Truncated,
    /// The blocks are gone, and there are no others.
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Traffic {
    ToTheGuest,
    FromTheGuest,
}

/// A guest's memory, and the file system that it is on.
struct Victim {
    ram: Ram,
    tmpfs: Option<Tmpfs>,
}

impl Victim {
    fn new(options: GuestOptions, loss: Loss) -> Victim {
        let len = Ram::len(&options);
        let (memory, tmpfs) = match loss {
            Loss::Truncated => (SharedMemory::create(len, false).unwrap(), None),
            Loss::Full => {
                let tmpfs = Tmpfs::mount();
                let file = tmpfs.create("memory");
                file.set_len(len as u64).unwrap();
                (SharedMemory::of(file, len).unwrap(), Some(tmpfs))
            }
        };
        let ram = Ram::of(memory, options);
        Victim { ram, tmpfs }
    }

    /// From here on this process must not touch the buffers either.
    fn lose_buffers(&self) {
        let file = self.ram.memory.file();
        let Some(tmpfs) = &self.tmpfs else {
            file.set_len(RINGS).unwrap();
            return;
        };
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let len = self.ram.memory.len() as u64 - RINGS;
        rustix::fs::fallocate(file, hole, RINGS, len).unwrap();
        tmpfs.fill();
    }
}

fn lose_memory(options: GuestOptions, loss: Loss, traffic: Traffic) {
    let daemon = Daemon::start(&DaemonOptions {
        ports: 4,
        ..DaemonOptions::default()
    });
    let victim = Victim::new(options, loss);
    let other_ram = Ram::new(GuestOptions::default());
    let (bystanders, mut guest, mut other) = acquainted(&daemon, [&victim.ram, &other_ram]);
    victim.lose_buffers();
    let (direction, reason) = if traffic == Traffic::FromTheGuest {
        let buffer = Buffer::readable(guest.transmit_buffer(9).0, 300);
        guest.post_raw(&[buffer], |_, _| {});
        ("rx", "rx_memory_fault")
    } else {
        other.send(&frame(mac(3), mac(4), 1, 300));
        ("tx", "egress_memory_fault")
    };
    wait_for("the session to be cut off", || guest.is_cut_off());
    let said = "guest memory is lost: its file was truncated, or its file system is full";
    daemon.assert_logged(said);
    wait_for("the reason", || daemon.state("p2").1.contains(said));
    wait_for("the end of the session", || {
        daemon.state("p2").0 == "waiting"
    });
    // The session has ended, and waited for the poll thread before.
    assert_eq!(daemon.dropped("p2", direction, reason), 1);
    let before = bystanders.frames();
    wait_for("the bystanders' frames", || {
        let log = daemon.log();
        assert!(!log.contains("panicked"), "{log}");
        bystanders.frames() > before + 100
    });
    // A frontend whose memory is whole is served again.
    let whole_ram = Ram::new(GuestOptions::default());
    let mut whole = Guest::new(&whole_ram);
    whole.attach(&daemon.sockets()[2]);
    while other.try_receive().is_some() {}
    let mut exchange = Exchange::new(vec![whole, other], 3, &[(0, 1), (1, 0)], 8, 300);
    exchange.meet();
    exchange.exchange(100);
    exchange.drain();
    bystanders.finish();
    drop((guest, exchange));
    daemon.stop();
}

fn kinds() -> [GuestOptions; 2] {
    [false, true].map(|packed| GuestOptions {
        packed,
        ..GuestOptions::default()
    })
}

#[test]
fn guest_memory_that_is_truncated_costs_its_port_only() {
    for options in kinds() {
        for traffic in [Traffic::ToTheGuest, Traffic::FromTheGuest] {
            lose_memory(options, Loss::Truncated, traffic);
        }
    }
}

#[test]
fn guest_memory_on_a_full_file_system_costs_its_port_only() {
    for options in kinds() {
        for traffic in [Traffic::ToTheGuest, Traffic::FromTheGuest] {
            lose_memory(options, Loss::Full, traffic);
        }
    }
}

/// Rings and buffers, while frames go both ways.
#[test]
fn guest_memory_that_is_truncated_to_nothing_costs_its_port_only() {
    for options in kinds() {
        let mut daemon = Daemon::start(&DaemonOptions {
            ports: 4,
            ..DaemonOptions::default()
        });
        let victim = Victim::new(options, Loss::Truncated);
        let other_ram = Ram::new(GuestOptions::default());
        let (bystanders, guest, mut other) = acquainted(&daemon, [&victim.ram, &other_ram]);
        victim.ram.memory.file().set_len(0).unwrap();
        let mut number = 0;
        wait_for("the session to be cut off", || {
            number += 1;
            other.try_send(&frame(mac(3), mac(4), number, 300));
            guest.is_cut_off()
        });
        daemon.assert_alive();
        bystanders.finish();
        drop((guest, other));
        daemon.stop();
    }
}
