//! Guests with a region of memory that the switch cannot use, such as an NVDIMM in an ordinary
//! file: the rest of their memory goes on being used, what lies in that region is dropped and
//! counted, and the port says why.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, RECEIVE, Ram, TRANSMIT};
use common::traffic::{Exchange, acquainted, frame, mac};
use common::wait_for;
use pollux::bench::frontend::{Frontend, Region};
use pollux::memory::SharedMemory;
use pollux::virtio::driver::Buffer;
use serde_json::{Value, json};
use vhost::vhost_user::message::FrontendReq;

/// Guest address and length of the region that cannot be used, and of one that comes later.
const NVDIMM: u64 = 0x2_0000_0000;
const LATER: u64 = 0x3_0000_0000;
const LEN: u64 = 1 << 20;
/// Several queues, acknowledgements, single regions.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 15;
/// How the port names it.
const SAID: &str = "guest memory of 1 MiB at 0x200000000 cannot be used: the region's file is on";

/// A file that is in memory nowhere, wherever this runs.
fn ordinary_file() -> File {
    File::open("/proc/self/maps").unwrap()
}

fn region(guest_address: u64, fd: i32) -> Region {
    Region {
        guest_address,
        len: LEN,
        user_address: guest_address,
        offset: 0,
        fd,
    }
}

fn add(frontend: &Frontend, region: &Region) {
    let words = [
        0,
        region.guest_address,
        region.len,
        region.user_address,
        region.offset,
    ];
    let body = words.map(u64::to_le_bytes).concat();
    let added = frontend.tell(FrontendReq::ADD_MEM_REG, &body, &[region.fd]);
    added.unwrap();
}

fn kinds() -> [GuestOptions; 2] {
    [false, true].map(|packed| GuestOptions {
        packed,
        ..GuestOptions::default()
    })
}

fn unusable(daemon: &Daemon) -> Value {
    daemon.port("p2")["session"]["memory_unusable"].clone()
}

/// Frames go both ways between the two.
fn pass(guest: Guest<'_>, other: Guest<'_>) {
    let mut exchange = Exchange::new(vec![guest, other], 3, &[(0, 1), (1, 0)], 8, 300);
    exchange.meet();
    exchange.exchange(100);
    exchange.drain();
}

#[test]
fn a_region_in_an_ordinary_file_costs_the_frames_in_it_alone() {
    let file = ordinary_file();
    for options in kinds() {
        let daemon = Daemon::start(&DaemonOptions {
            ports: 4,
            ..DaemonOptions::default()
        });
        let rams = [options, GuestOptions::default()].map(Ram::new);
        let (bystanders, mut guest, other) = acquainted(&daemon, [&rams[0], &rams[1]]);
        let frontend = guest.frontend.as_ref().unwrap();
        let table = [region(NVDIMM, file.as_raw_fd()), guest.region()];
        frontend.set_mem_table(&table).unwrap();
        assert_eq!(daemon.state("p2").0, "running");
        assert!(daemon.state("p2").1.starts_with(SAID));
        let log = daemon.log();
        let line = log.lines().find(|line| line.contains(SAID));
        assert!(line.is_some_and(|line| line.contains("WARN")), "{log}");
        let unusable = unusable(&daemon);
        assert_eq!(unusable[0]["guest_address"], json!(NVDIMM));
        assert_eq!(unusable[0]["bytes"], json!(LEN));
        let shown = daemon.try_pollux(&["port", "show", "p2"]).1;
        assert!(
            shown.contains("1 MiB at 0x200000000: the region's file"),
            "{shown}"
        );
        // All of a frame's buffers there, or the last of them, or the table of them.
        let (near, len) = guest.transmit_buffer(9);
        for buffers in [
            vec![Buffer::readable(NVDIMM, 300)],
            vec![
                Buffer::readable(near, len),
                Buffer::readable(NVDIMM + LEN - 300, 300),
            ],
        ] {
            guest.post_raw(&buffers, |_, _| {});
            assert_eq!(guest.returned(TRANSMIT).len, 0);
        }
        // Not mapped at all: a fault of the driver's.
        guest.post_raw(&[Buffer::readable(NVDIMM + LEN, 300)], |_, _| {});
        assert_eq!(guest.returned(TRANSMIT).len, 0);
        assert_eq!(daemon.dropped("p2", "rx", "rx_memory_unusable"), 2);
        assert_eq!(daemon.dropped("p2", "rx", "rx_malformed_chain"), 1);
        pass(guest, other);
        bystanders.finish();
        daemon.stop();
    }
}

#[test]
fn regions_that_come_behind_one_that_cannot_be_used_are_used() {
    let file = ordinary_file();
    for options in kinds() {
        let daemon = Daemon::start(&DaemonOptions {
            ports: 4,
            ..DaemonOptions::default()
        });
        let rams = [options, GuestOptions::default()].map(Ram::new);
        let (bystanders, mut guest, mut other) = acquainted(&daemon, [&rams[0], &rams[1]]);
        let frontend = guest.frontend.as_mut().unwrap();
        frontend.set_protocol_features(PROTOCOL).unwrap();
        add(frontend, &region(NVDIMM, file.as_raw_fd()));
        let memory: Vec<SharedMemory> = (0..6)
            .map(|_| SharedMemory::create(LEN as usize, true).unwrap())
            .collect();
        for (n, memory) in (0..).zip(&memory) {
            add(
                frontend,
                &region(LATER + n * LEN, memory.file().as_raw_fd()),
            );
        }
        assert_eq!(daemon.state("p2").0, "running");
        assert!(daemon.state("p2").1.starts_with(SAID));
        let session = &daemon.port("p2")["session"];
        assert_eq!(session["memory_regions"], 7);
        // A frame from the last of them arrives.
        let bytes = [vec![0; 12], frame(mac(4), mac(3), 1, 300)].concat();
        memory[5]
            .window(0, bytes.len())
            .unwrap()
            .write_bytes(0, &bytes);
        let buffer = Buffer::readable(LATER + 5 * LEN, bytes.len() as u32);
        guest.post_raw(&[buffer], |_, _| {});
        wait_for("the frame", || {
            other
                .try_receive()
                .is_some_and(|frame| frame == bytes[12..])
        });
        guest.returned(TRANSMIT);
        // It goes like any other.
        let words = [0, NVDIMM, LEN, NVDIMM, 0].map(u64::to_le_bytes).concat();
        let frontend = guest.frontend.as_ref().unwrap();
        frontend
            .tell(FrontendReq::REM_MEM_REG, &words, &[])
            .unwrap();
        assert_eq!(daemon.state("p2"), ("running".to_string(), String::new()));
        assert_eq!(unusable(&daemon), json!([]));
        pass(guest, other);
        bystanders.finish();
        daemon.stop();
    }
}

#[test]
fn receive_buffers_that_cannot_be_used_go_back_and_are_counted() {
    let file = ordinary_file();
    for options in kinds() {
        let daemon = Daemon::start(&DaemonOptions {
            ports: 4,
            ..DaemonOptions::default()
        });
        let rams = [options, GuestOptions::default()].map(Ram::new);
        let (bystanders, mut guest, mut other) = acquainted(&daemon, [&rams[0], &rams[1]]);
        // The guest's buffers are there, its rings are not.
        let whole = guest.region();
        let rings = 2 * common::guest::RING_SPACE as u64;
        let buffers = Region {
            guest_address: whole.guest_address + rings,
            user_address: whole.user_address + rings,
            len: whole.len - rings,
            offset: 0,
            fd: file.as_raw_fd(),
        };
        let table = [
            Region {
                len: rings,
                ..whole
            },
            buffers,
        ];
        guest
            .frontend
            .as_ref()
            .unwrap()
            .set_mem_table(&table)
            .unwrap();
        // The rings have started anew.
        daemon.settle();
        other.send(&frame(mac(3), mac(4), 1, 300));
        wait_for("the drop", || {
            daemon.dropped("p2", "tx", "egress_ring_full") == 1
        });
        assert_eq!(guest.returned(RECEIVE).len, 0);
        let statistics = daemon.port("p2")["statistics"].clone();
        let count = |name: &str| statistics[name].as_u64().unwrap();
        assert!(count("unusable_buffers") > 0, "{statistics}");
        assert_eq!(count("unusable_buffers"), count("bad_buffers"));
        bystanders.finish();
        drop((guest, other));
        daemon.stop();
    }
}
