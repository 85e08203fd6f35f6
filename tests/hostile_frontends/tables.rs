//! Memory that must not be taken, tables that change under load, and memory for which there is no
//! address space left.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use super::*;
use crate::common::daemon::Daemon;
use crate::common::guest::RING_SPACE;
use crate::common::long;
use crate::common::traffic::{Mac, acquainted, read};

// ---- refused ------------------------------------------------------------------------------------

/// One table of guest memory that must not be taken.
struct Table<'a> {
    what: &'a str,
    reason: &'a str,
    regions: Vec<Region>,
    fds: Vec<RawFd>,
}

impl Table<'_> {
    fn send(&self, guest: &Guest<'_>, scene: &Scene) -> (Frontend, Result<(), AttachError>) {
        let mut frontend = guest.negotiate(scene.victim()).unwrap();
        frontend.set_features(frontend.features()).unwrap();
        let count = self.regions.len() as u32;
        let mut body = [count, 0].map(u32::to_le_bytes).concat();
        body.extend(self.regions.iter().flat_map(region_body));
        let answer = frontend.tell(FrontendReq::SET_MEM_TABLE, &body, &self.fds);
        (frontend, answer)
    }
}

#[test]
fn memory_that_cannot_be_mapped_is_acknowledged_and_the_reason_as_long_as_it_is_there() {
    scene(|scene, sink| {
        let ram = Ram::new(GuestOptions::cloud_hypervisor());
        let mut guest = Guest::new(&ram);
        let whole = guest.region();
        let zero = File::open("/dev/zero").unwrap();
        let (pipe, _writer) = std::io::pipe().unwrap();
        let read_only = File::open(format!("/proc/self/fd/{}", whole.fd)).unwrap();
        let proc = File::open("/proc/self/maps").unwrap();
        let far = Region {
            len: 1 << 62,
            guest_address: 0,
            user_address: 0,
            ..whole
        };
        let shared = "memory-backend-memfd,share=on";
        for (what, reason, region, fd) in [
            ("a device", shared, whole, zero.as_raw_fd()),
            ("a pipe", shared, whole, pipe.as_raw_fd()),
            ("another file system", shared, whole, proc.as_raw_fd()),
            (
                "a read-only file",
                "cannot be mapped",
                whole,
                read_only.as_raw_fd(),
            ),
            ("half of all addresses", "are possible", far, whole.fd),
        ] {
            let (regions, fds) = (vec![region], vec![fd]);
            let table = Table {
                what,
                reason,
                regions,
                fds,
            };
            let (frontend, answer) = table.send(&guest, scene);
            answer.unwrap();
            let state = || scene.daemon.state(VICTIM);
            assert!(state().1.contains(reason), "{what}: {:?}", state());
            assert_eq!(state().0, "negotiating", "{what}");
            frontend.set_mem_table(&[whole]).unwrap();
            assert!(!state().1.contains(reason), "{what}: {:?}", state());
            frontend
                .stream()
                .shutdown(std::net::Shutdown::Both)
                .unwrap();
            drop(frontend);
            last_end(scene);
        }
        scene.attach_victim(&mut guest, sink);
        guest.detach();
        last_end(scene);
    });
}

#[test]
fn memory_that_cannot_be_shared_is_refused_in_words_and_good_memory_taken_afterwards() {
    scene(|scene, sink| {
        let ram = Ram::new(GuestOptions::cloud_hypervisor());
        let mut guest = Guest::new(&ram);
        let whole = guest.region();
        let far = Region {
            guest_address: 1 << 40,
            user_address: 1 << 40,
            ..whole
        };
        let one = |what, reason, region, fd| Table {
            what,
            reason,
            regions: vec![region],
            fds: vec![fd],
        };
        let tables = [
            Table {
                what: "private",
                reason: "guest memory not shared",
                regions: vec![whole],
                fds: vec![],
            },
            Table {
                what: "fewer files",
                reason: "SET_MEM_TABLE",
                regions: vec![whole, far],
                fds: vec![whole.fd],
            },
            Table {
                what: "more files",
                reason: "SET_MEM_TABLE",
                regions: vec![whole],
                fds: vec![whole.fd; 2],
            },
            Table {
                what: "no region",
                reason: "guest memory not shared",
                regions: vec![],
                fds: vec![],
            },
            one(
                "size 0",
                "SET_MEM_TABLE",
                Region { len: 0, ..whole },
                whole.fd,
            ),
            one(
                "beyond the file",
                "beyond the file",
                Region {
                    len: whole.len + 4096,
                    ..whole
                },
                whole.fd,
            ),
            one(
                "a wrapping address",
                "SET_MEM_TABLE",
                Region {
                    guest_address: u64::MAX - 4095,
                    ..whole
                },
                whole.fd,
            ),
            one(
                "an offset inside a page",
                "page size",
                Region {
                    offset: 512,
                    len: 4096,
                    ..whole
                },
                whole.fd,
            ),
            Table {
                what: "overlapping regions",
                reason: "overlap",
                regions: vec![
                    whole,
                    Region {
                        guest_address: whole.guest_address + 4096,
                        user_address: 1 << 40,
                        ..whole
                    },
                ],
                fds: vec![whole.fd; 2],
            },
        ];
        for table in tables {
            let (frontend, answer) = table.send(&guest, scene);
            let answer = format!("{:?}", answer.unwrap_err());
            if answer.contains("Refused") {
                wait_for(table.what, || last_end_is(scene, table.reason));
                // The session goes on, and may do better.
                frontend.set_mem_table(&[whole]).unwrap();
                assert!(!last_end_is(scene, table.reason), "{}", table.what);
                frontend
                    .stream()
                    .shutdown(std::net::Shutdown::Both)
                    .unwrap();
                drop(frontend);
                last_end(scene);
            } else {
                let end = last_end(scene);
                assert!(end.contains(table.reason), "{}: {end}", table.what);
            }
        }
        scene.attach_victim(&mut guest, sink);
        guest.detach();
        last_end(scene);
    });
}

// ---- under load ---------------------------------------------------------------------------------

/// Tables that a guest's frontend may send one after the other, and whether its rings are in them.
fn tables(whole: Region) -> Vec<(Vec<Region>, bool)> {
    let part = |from: u64, to: u64| Region {
        guest_address: whole.guest_address + from,
        user_address: whole.user_address + from,
        offset: whole.offset + from,
        len: to - from,
        ..whole
    };
    let rings = 2 * RING_SPACE as u64;
    // Inside a buffer, as a rule.
    let middle = (whole.len / 2).next_multiple_of(4096);
    let far = Region {
        guest_address: 1 << 40,
        user_address: 1 << 40,
        ..whole
    };
    vec![
        (vec![whole], true),
        (vec![whole], true),
        // Other mappings of the same pages: those before go.
        (vec![part(0, middle), part(middle, whole.len)], true),
        (vec![part(0, rings), part(rings, whole.len)], true),
        (vec![far, whole], true),
        (vec![part(rings, whole.len)], false),
        (vec![far], false),
    ]
}

/// One guest's frames to the other and from it; those that come must be in order.
struct Talk<'g, 'm> {
    guest: &'g mut Guest<'m>,
    own: Mac,
    other: Mac,
    sent: u64,
    came: u64,
    next: u64,
}

impl<'g, 'm> Talk<'g, 'm> {
    fn new(guest: &'g mut Guest<'m>, own: Mac, other: Mac) -> Self {
        Talk {
            guest,
            own,
            other,
            sent: 0,
            came: 0,
            next: 0,
        }
    }

    fn turn(&mut self) {
        let frame = frame(self.other, self.own, self.sent, 300);
        self.sent += u64::from(self.guest.try_send(&frame));
        self.take();
    }

    fn take(&mut self) {
        while let Some(bytes) = self.guest.try_receive() {
            let label = read(&bytes);
            assert_eq!((label.to, label.from), (self.own, self.other));
            assert!(label.sequence >= self.next, "{label:?} again");
            self.next = label.sequence + 1;
            self.came += 1;
        }
    }
}

/// Drops on the way into the victim's port, by reason.
fn drops_into(daemon: &Daemon) -> Vec<(String, u64)> {
    let port = daemon.port(VICTIM);
    let drops = port["statistics"]["tx"]["drops"].as_object().unwrap();
    let count = |(reason, n): (&String, &serde_json::Value)| (reason.clone(), n.as_u64().unwrap());
    drops.iter().map(count).collect()
}

fn change_tables_under_load(options: GuestOptions) {
    let daemon = Daemon::start(&DaemonOptions {
        ports: 4,
        ..DaemonOptions::default()
    });
    // Has room for all that waited in the victim's ring while that was no part of its memory.
    let roomy = GuestOptions {
        entries: 1024,
        ..GuestOptions::default()
    };
    let rams = [options, roomy].map(Ram::new);
    let (bystanders, mut guest, mut other) = acquainted(&daemon, rams.each_ref());
    let before = Holdings::of(&daemon);
    assert_eq!(drops_into(&daemon), []);
    let tables = tables(guest.region());
    let frontend = guest.frontend.take().unwrap();
    let mut talks = [
        Talk::new(&mut guest, mac(3), mac(4)),
        Talk::new(&mut other, mac(4), mac(3)),
    ];
    // Frames that came from the victim, and frames that were sent to it.
    let (came, sent) = (AtomicU64::new(0), AtomicU64::new(0));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let changing = scope.spawn(|| {
            let _over = Stop(&over);
            for _ in 0..if long() { 500 } else { 10 } {
                for (table, runs) in &tables {
                    frontend.set_mem_table(table).unwrap();
                    let progress = if *runs { &came } else { &sent };
                    let seen = progress.load(Ordering::Relaxed);
                    wait_for("frames", || progress.load(Ordering::Relaxed) > seen + 100);
                }
            }
            frontend.set_mem_table(&tables[0].0).unwrap();
        });
        while !over.load(Ordering::Relaxed) {
            talks.iter_mut().for_each(Talk::turn);
            came.store(talks[1].came, Ordering::Relaxed);
            sent.store(talks[1].sent, Ordering::Relaxed);
        }
        changing.join().unwrap();
    });
    daemon.settle();
    wait_for("what is on its way", || {
        talks.iter_mut().for_each(Talk::take);
        talks.iter_mut().all(|talk| talk.guest.in_flight() == 0)
    });
    talks.iter_mut().for_each(Talk::take);
    // The victim's frames waited in its ring. Those to it were lost while it had none, and each was
    // counted.
    let [victim, other_one] = talks;
    assert_eq!(other_one.came, victim.sent);
    let lost = drops_into(&daemon);
    let known = ["egress_not_ready", "egress_ring_full"];
    assert!(lost.iter().all(|(name, _)| known.contains(&name.as_str())));
    let lost: u64 = lost.iter().map(|(_, count)| count).sum();
    assert_eq!(victim.came + lost, other_one.sent);
    assert!(lost > 0);
    // The next ones pass.
    guest.send(&frame(mac(4), mac(3), 1 << 40, 300));
    other.send(&frame(mac(3), mac(4), 1 << 41, 300));
    for (guest, number) in [(&mut other, 1 << 40), (&mut guest, 1 << 41)] {
        assert_eq!(read(&guest.receive(LIMIT).unwrap()).sequence, number);
    }
    let statistics = &daemon.port(VICTIM)["statistics"];
    assert_eq!(statistics["rx"]["drops"], serde_json::json!({}));
    assert_eq!(statistics["bad_buffers"], 0);
    before.wait_for_return(&daemon);
    bystanders.finish();
    drop((guest, other, frontend));
    daemon.stop();
}

#[test]
fn memory_tables_that_change_under_load_cost_the_guest_what_was_sent_to_it_meanwhile() {
    for options in kinds() {
        change_tables_under_load(options);
    }
}

// ---- without room -------------------------------------------------------------------------------

/// Leaves the daemon so many bytes of address space beside what it has; `None` for as much as ever.
fn limit_address_space(daemon: &Daemon, spare: Option<u64>) {
    let pid = Pid::from_raw(i32::try_from(daemon.pid()).unwrap());
    let statm = fs::read_to_string(format!("/proc/{}/statm", daemon.pid())).unwrap();
    let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
    let used = pages * rustix::param::page_size() as u64;
    let maximum = getrlimit(Resource::As).maximum;
    let current = spare.map(|spare| used + spare).or(maximum);
    prlimit(pid, Resource::As, Rlimit { current, maximum }).unwrap();
}

#[test]
fn memory_for_which_there_is_no_address_space_is_refused_and_rings_run_on() {
    for options in kinds() {
        with_victim(options, |scene, guest, sink| {
            // Much larger than what threads and buffers of the daemon may want meanwhile.
            const SPARE: u64 = 4 << 30;
            let file = memfd_create("pollux-guest", MemfdFlags::CLOEXEC).unwrap();
            let file = File::from(file);
            file.set_len(16 * SPARE).unwrap();
            let huge = Region {
                guest_address: 1 << 40,
                user_address: 1 << 40,
                len: 16 * SPARE,
                offset: 0,
                fd: file.as_raw_fd(),
            };
            let whole = guest.region();
            let frontend = guest.frontend.take().unwrap();
            let refused = |table: &[Region]| {
                let answer = frontend.set_mem_table(table).unwrap_err();
                assert!(format!("{answer:?}").contains("Refused"), "{answer:?}");
            };
            limit_address_space(&scene.daemon, Some(SPARE));
            for number in 0..10 {
                // Alone it has no place for the rings either, which stay where they are.
                for table in [&[whole, huge][..], &[huge, whole], &[huge]] {
                    refused(table);
                }
                scene.passes(guest, sink, number);
                scene.reaches(guest, sink, number);
            }
            scene.daemon.assert_logged("cannot be mapped");
            scene.bystanders.go_on(200);
            limit_address_space(&scene.daemon, None);
            // It is taken where there is room, and not one page of it is made for that.
            frontend.set_mem_table(&[huge, whole]).unwrap();
            scene.daemon.settle();
            scene.passes(guest, sink, 10);
            scene.reaches(guest, sink, 11);
            assert_eq!(file.metadata().unwrap().blocks(), 0);
            let drops = scene.daemon.drops(VICTIM);
            assert!(drops.iter().all(|(_, count)| *count == 0), "{drops:?}");
            guest.frontend = Some(frontend);
        });
    }
}
