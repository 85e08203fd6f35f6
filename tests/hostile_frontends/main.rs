//! Frontends that mean harm, or are broken or frozen, on a running daemon with bystanders.
//!
//! What a session makes of each message is tested beside its code; here is what comes of it: the session ends or goes
//! on as it should, nothing of it stays behind, the next frontend is served, and bystanders lose nothing.
//! `POLLUX_LONG=1` takes the times and counts of the acceptance.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

#[path = "../common/mod.rs"]
mod common;

mod closing;
mod notifications;
mod tables;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::daemon::DaemonOptions;
use common::guest::{Guest, GuestOptions, RECEIVE, Ram, TRANSMIT};
use common::holdings::Holdings;
use common::scene::{Scene, VICTIM};
use common::traffic::{Mac, frame, mac, read};
use common::{long, wait_for};
use pollux::bench::frontend::{Frontend, Order, Region};
use pollux::memory::SharedMemory;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const LIMIT: Duration = Duration::from_secs(20);

fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size].map(u32::to_le_bytes).concat()
}

fn connect(scene: &Scene) -> UnixStream {
    let stream = UnixStream::connect(scene.victim()).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Whether the daemon has hung up.
fn is_cut_off(stream: &UnixStream) -> bool {
    use rustix::net::{RecvFlags, recv};
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match recv(stream, &mut [0; 1], flags) {
        Ok((_, bytes)) => bytes == 0,
        Err(errno) => errno != rustix::io::Errno::AGAIN,
    }
}

/// Why the last session of the victim's port ended.
fn last_end(scene: &Scene) -> String {
    scene.wait_until_left();
    scene.daemon.state(VICTIM).1
}

/// Does something to the switch with a sink attached, after which everything is as before.
fn scene(act: impl FnOnce(&Scene, &mut Guest<'_>)) {
    scene_of(4, act);
}

/// The same with more ports.
fn scene_of(ports: usize, act: impl FnOnce(&Scene, &mut Guest<'_>)) {
    let scene = Scene::with(&DaemonOptions {
        ports,
        ..DaemonOptions::default()
    });
    let ram = Ram::new(GuestOptions::default());
    let mut sink = Guest::new(&ram);
    scene.attach_sink(&mut sink);
    let before = Holdings::of(&scene.daemon);
    act(&scene, &mut sink);
    scene.serves(&mut sink);
    before.wait_for_return(&scene.daemon);
    drop(sink);
    scene.finish();
}

/// The same to a victim of this kind, which goes afterwards.
fn with_victim(options: GuestOptions, act: impl FnOnce(&Scene, &mut Guest<'_>, &mut Guest<'_>)) {
    scene(|scene, sink| {
        let ram = Ram::new(options);
        let mut guest = Guest::new(&ram);
        scene.attach_victim(&mut guest, sink);
        act(scene, &mut guest, sink);
        guest.detach();
        last_end(scene);
    });
}

fn kinds() -> [GuestOptions; 2] {
    [false, true].map(|packed| GuestOptions {
        packed,
        ..GuestOptions::default()
    })
}

/// Ends a loop beside it, also where a check fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

// ---- slow ones ---------------------------------------------------------------------------------------

#[test]
fn a_frontend_that_reads_no_replies_is_cut_off() {
    scene(|scene, _| {
        let stream = connect(scene);
        stream.set_nonblocking(true).unwrap();
        let ask = header(1, 1, 0);
        wait_for("the session to be cut off", || {
            // Questions, until neither side takes any more.
            for _ in 0..1000 {
                if (&stream).write_all(&ask).is_err() {
                    break;
                }
            }
            last_end_is(scene, "has read no reply")
        });
    });
}

fn last_end_is(scene: &Scene, text: &str) -> bool {
    scene.daemon.state(VICTIM).1.contains(text)
}

#[test]
fn a_message_that_comes_a_byte_a_second_is_given_up() {
    scene(|scene, _| {
        let stream = connect(scene);
        for byte in header(2, 1, 8).into_iter().chain([0; 7]) {
            if (&stream).write_all(&[byte]).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        assert!(
            last_end(scene).contains("stayed incomplete"),
            "{}",
            last_end(scene)
        );
    });
}

#[test]
fn a_message_that_stops_in_the_middle_is_given_up() {
    scene(|scene, _| {
        for bytes in [&header(2, 1, 8)[..], &header(2, 1, 8)[..11]] {
            let stream = connect(scene);
            (&stream).write_all(bytes).unwrap();
            wait_for("the session to be cut off", || is_cut_off(&stream));
            assert!(last_end(scene).contains("stayed incomplete"));
        }
        // Between messages it may be silent for as long as it likes.
        let stream = connect(scene);
        std::thread::sleep(Duration::from_secs(6));
        assert!(!is_cut_off(&stream));
        drop(stream);
        last_end(scene);
    });
}

#[test]
fn a_listener_that_never_accepts_holds_up_nobody() {
    scene(|scene, _| {
        let path = scene.daemon.dir().join("stuck");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        // Its backlog is full; a connect that waits would wait for ever.
        let _first = UnixStream::connect(&path).unwrap();
        let spec = format!("stuck,socket={},mode=client", path.display());
        assert_eq!(scene.daemon.try_pollux(&["port", "add", &spec]).0, 0);
        for _ in 0..20 {
            assert_eq!(scene.daemon.state("stuck").0, "connecting");
            scene.bystanders.go_on(20);
        }
        assert_eq!(scene.daemon.try_pollux(&["port", "remove", "stuck"]).0, 0);
    });
}

// ---- disconnections ----------------------------------------------------------------------------------

type Step = fn(&Guest<'_>, &mut Frontend);

fn ring_steps(order: Order) -> Vec<Step> {
    let num: Step = |g, f| {
        f.set_vring_num(0, u32::from(g.queue(RECEIVE).size))
            .unwrap()
    };
    let base: Step = |g, f| f.set_vring_base(0, g.queue(RECEIVE).base).unwrap();
    let addr: Step = |g, f| f.set_vring_addr(&g.queue(RECEIVE)).unwrap();
    let kick: Step = |g, f| f.set_vring_kick(0, &g.kicks[RECEIVE]).unwrap();
    let call: Step = |g, f| f.set_vring_call(0, &g.calls[RECEIVE]).unwrap();
    let enable: Step = |_, f| f.set_vring_enable(0, true).unwrap();
    let other: Step = |g, f| g.start_ring(f, TRANSMIT).unwrap();
    match order {
        Order::Qemu => vec![num, base, addr, kick, call, enable, other],
        Order::CloudHypervisor => vec![num, addr, base, call, kick, enable, other],
    }
}

/// A frontend's life, message by message.
fn life(order: Order) -> Vec<Step> {
    let mut steps: Vec<Step> = vec![
        |_, f| {
            let _ = f.get_features().unwrap();
        },
        |_, f| {
            let _ = f.get_protocol_features().unwrap();
        },
        |_, f| {
            f.set_protocol_features(1 | 1 << 3 | 1 << 13 | 1 << 15)
                .unwrap()
        },
        |_, f| {
            let _ = f.get_queue_num().unwrap();
        },
        |_, f| f.set_owner().unwrap(),
    ];
    if order == Order::Qemu {
        steps.push(|_, f| f.set_vring_enable(0, true).unwrap());
        steps.push(|g, f| f.set_vring_call(0, &g.calls[RECEIVE]).unwrap());
    }
    steps.push(|g, f| f.set_features(g.features() | 1 << 30).unwrap());
    steps.push(match order {
        Order::Qemu => |g, f| f.set_mem_table(&[g.region()]).unwrap(),
        Order::CloudHypervisor => |g, f| add_region(f, &g.region()),
    });
    steps.extend(ring_steps(order));
    steps.push(|_, f| f.set_vring_enable(1, false).unwrap());
    steps.push(|_, f| {
        let _ = f.get_vring_base(0).unwrap();
    });
    steps.push(|_, f| f.tell(FrontendReq::RESET_DEVICE, &[], &[]).unwrap());
    steps
}

fn region_body(region: &Region) -> Vec<u8> {
    let words = [
        region.guest_address,
        region.len,
        region.user_address,
        region.offset,
    ];
    words.map(u64::to_le_bytes).concat()
}

fn add_region(frontend: &Frontend, region: &Region) {
    let body = [vec![0; 8], region_body(region)].concat();
    frontend
        .tell(FrontendReq::ADD_MEM_REG, &body, &[region.fd])
        .unwrap();
}

/// Hangs up behind each message of a life, and in the middle of the next one.
fn disconnects(order: Order) {
    scene(|scene, sink| {
        let steps = life(order);
        for count in 0..=steps.len() {
            for half in [false, true] {
                let ram = Ram::new(GuestOptions {
                    order,
                    ..GuestOptions::default()
                });
                let guest = Guest::new(&ram);
                let mut frontend = Frontend::connect(scene.victim(), LIMIT).unwrap();
                for step in &steps[..count] {
                    step(&guest, &mut frontend);
                }
                // Frames to it and from it, as far as it has come.
                sink.try_send(&frame(mac(3), mac(4), count as u64, 300));
                if half {
                    frontend.stream().write_all(&header(5, 1, 40)[..9]).unwrap();
                }
                frontend
                    .stream()
                    .shutdown(std::net::Shutdown::Both)
                    .unwrap();
                drop((frontend, guest));
                assert!(
                    last_end(scene).contains("disconnected"),
                    "{count}: {}",
                    last_end(scene)
                );
            }
        }
    });
}

#[test]
fn a_frontend_of_qemus_order_may_go_behind_every_message() {
    disconnects(Order::Qemu);
}

#[test]
fn a_frontend_of_cloud_hypervisors_order_may_go_behind_every_message() {
    disconnects(Order::CloudHypervisor);
}

// ---- messages that make no sense ---------------------------------------------------------------------

#[test]
fn messages_that_make_no_sense_cost_their_session_only() {
    scene(|scene, _| {
        let stray = SharedMemory::create(4096, true).unwrap();
        let fd = stray.file().as_raw_fd();
        let body = |request, flags, size: usize| {
            [header(request, flags, size as u32), vec![0; size]].concat()
        };
        let cases: Vec<(&str, Vec<u8>, Vec<RawFd>)> = vec![
            ("of 4 GiB", header(5, 1, u32::MAX), vec![]),
            ("longer than any", header(5, 1, 4097), vec![]),
            ("of version 0", header(1, 0, 0), vec![]),
            ("marked as a reply", header(1, 5, 0), vec![]),
            ("with reserved flags", header(1, 0x8000_0001, 0), vec![]),
            ("of request 0", body(0, 1, 8), vec![]),
            ("of an unknown request", body(99, 1, 8), vec![]),
            ("of the last request", body(u32::MAX, 1, 8), vec![]),
            ("too short for its request", body(2, 1, 4), vec![]),
            ("too long for its request", body(1, 1, 8), vec![]),
            (
                "with a descriptor that it must not have",
                body(2, 1, 8),
                vec![fd],
            ),
            ("with a hundred descriptors", body(5, 1, 8), vec![fd; 100]),
            (
                "with as many descriptors as can be sent",
                body(5, 1, 8),
                vec![fd; 253],
            ),
            ("about a ring that is not there", body(18, 1, 8), vec![fd]),
            ("of a feature that is not offered", body(24, 1, 12), vec![]),
        ];
        for (what, bytes, fds) in cases {
            let stream = connect(scene);
            stream.send_with_fds(&[&bytes[..]], &fds).unwrap();
            wait_for(what, || is_cut_off(&stream));
            let end = last_end(scene);
            assert!(end.contains("session ended"), "{what}: {end}");
        }
    });
}

// ---- memory ------------------------------------------------------------------------------------------

/// One table of guest memory that must not be taken.
struct Table<'a> {
    what: &'a str,
    reason: &'a str,
    regions: Vec<Region>,
    fds: Vec<RawFd>,
}

#[test]
fn memory_that_cannot_be_shared_is_refused_in_words_and_good_memory_taken_afterwards() {
    scene(|scene, sink| {
        let ram = Ram::new(GuestOptions::cloud_hypervisor());
        let mut guest = Guest::new(&ram);
        let whole = guest.region();
        let zero = File::open("/dev/zero").unwrap();
        let (pipe, _writer) = std::io::pipe().unwrap();
        let link = format!("/proc/self/fd/{}", whole.fd);
        let read_only = File::open(link).unwrap();
        let proc = File::open("/proc/self/maps").unwrap();
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
        let shared = "memory-backend-memfd,share=on";
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
            one("a device", shared, whole, zero.as_raw_fd()),
            one("a pipe", shared, whole, pipe.as_raw_fd()),
            one("another file system", shared, whole, proc.as_raw_fd()),
            one(
                "a read-only file",
                "cannot be mapped",
                whole,
                read_only.as_raw_fd(),
            ),
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
                "half of all addresses",
                "are possible",
                Region {
                    len: 1 << 62,
                    guest_address: 0,
                    user_address: 0,
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
            let mut frontend = guest.negotiate(scene.victim()).unwrap();
            frontend.set_features(frontend.features()).unwrap();
            let mut body = [table.regions.len() as u32, 0]
                .map(u32::to_le_bytes)
                .concat();
            body.extend(table.regions.iter().flat_map(region_body));
            let answer = frontend.tell(FrontendReq::SET_MEM_TABLE, &body, &table.fds);
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

#[test]
fn a_driver_that_wants_more_queues_than_there_are_keeps_those_that_it_has() {
    with_victim(GuestOptions::default(), |scene, guest, sink| {
        let frontend = guest.frontend.as_ref().unwrap();
        let queue = guest.queue(RECEIVE);
        frontend.set_vring_num(2, 256).unwrap();
        frontend
            .set_vring_addr(&pollux::bench::frontend::Queue { index: 2, ..queue })
            .unwrap();
        frontend.set_vring_kick(2, &guest.kicks[RECEIVE]).unwrap();
        wait_for("the event", || {
            scene
                .daemon
                .log()
                .contains("receiveq 1 not started: more queue pairs")
        });
        // Beyond the rings that exist at all, it is told so.
        assert!(frontend.set_vring_num(4, 256).is_err());
        scene.passes(guest, sink, 1);
        scene.reaches(guest, sink, 2);
    });
}

// ---- rings that are set up in odd ways ---------------------------------------------------------------

#[test]
fn a_device_with_one_ring_is_served_in_one_direction() {
    for options in kinds() {
        scene(|scene, sink| {
            for which in [RECEIVE, TRANSMIT] {
                let ram = Ram::new(options);
                let mut guest = Guest::new(&ram);
                let mut frontend = guest.negotiate(scene.victim()).unwrap();
                frontend.set_features(frontend.features()).unwrap();
                frontend.set_mem_table(&[guest.region()]).unwrap();
                guest.start_ring(&frontend, which).unwrap();
                guest.frontend = Some(frontend);
                scene.daemon.settle();
                for number in 0..100 {
                    if which == TRANSMIT {
                        scene.passes(&mut guest, sink, number);
                    } else {
                        scene.reaches(&mut guest, sink, number);
                    }
                }
                guest.detach();
                last_end(scene);
            }
        });
    }
}

#[test]
fn both_rings_in_one_place_harm_nobody() {
    for options in kinds() {
        scene(|scene, sink| {
            let ram = Ram::new(options);
            let mut guest = Guest::new(&ram);
            let mut frontend = guest.negotiate(scene.victim()).unwrap();
            frontend.set_features(frontend.features()).unwrap();
            frontend.set_mem_table(&[guest.region()]).unwrap();
            let transmit = guest.queue(TRANSMIT);
            for queue in [guest.queue(RECEIVE), guest.queue(TRANSMIT)] {
                // The receive ring where the transmit ring is, and its used ring twice.
                let queue = pollux::bench::frontend::Queue {
                    descriptors: transmit.descriptors,
                    available: transmit.available,
                    used: transmit.used,
                    ..queue
                };
                frontend.set_vring_num(queue.index, 256).unwrap();
                frontend.set_vring_base(queue.index, queue.base).unwrap();
                frontend.set_vring_addr(&queue).unwrap();
                frontend.set_vring_kick(queue.index, queue.kick).unwrap();
                frontend.set_vring_enable(queue.index, true).unwrap();
            }
            guest.frontend = Some(frontend);
            for number in 0..300 {
                // What comes of it is the guest's own affair; it looks at nothing that comes back, which may be anything.
                if number < 100 {
                    guest.send_blindly(&frame(mac(4), mac(3), number, 100), &[]);
                }
                sink.try_send(&frame(mac(3), mac(4), number, 100));
                while sink.try_receive().is_some() {}
            }
            scene.bystanders.go_on(200);
            guest.detach();
            last_end(scene);
            while sink.try_receive().is_some() {}
        });
    }
}

#[test]
fn frames_in_a_transmitq_that_is_disabled_are_taken_and_go_nowhere() {
    for options in kinds() {
        with_victim(options, |scene, guest, sink| {
            for number in 0..3 {
                let frontend = guest.frontend.take().unwrap();
                frontend.set_vring_enable(TRANSMIT as u32, false).unwrap();
                scene.daemon.settle();
                for discarded in 0..100 {
                    guest.send(&frame(mac(4), mac(3), 1 << 40 | discarded, 100));
                }
                wait_for("the buffers", || guest.in_flight() == 0);
                // The other direction goes on.
                scene.reaches(guest, sink, number);
                frontend.set_vring_enable(TRANSMIT as u32, true).unwrap();
                guest.frontend = Some(frontend);
                scene.daemon.settle();
                // Nothing of what was discarded comes before this one.
                scene.passes(guest, sink, number);
            }
        });
    }
}

// ---- notification descriptors ------------------------------------------------------------------------

#[test]
fn call_and_kick_descriptors_are_replaced_under_traffic_and_none_is_left() {
    scene(|scene, sink| {
        let ram = Ram::new(GuestOptions {
            event_idx: false,
            calls: true,
            ..GuestOptions::default()
        });
        let mut guest = Guest::new(&ram);
        scene.attach_victim(&mut guest, sink);
        let frontend = guest.frontend.take().unwrap();
        let held = Holdings::of(&scene.daemon).fds;
        let stop = AtomicBool::new(false);
        let mut sent = 0;
        std::thread::scope(|scope| {
            let stop = &stop;
            scope.spawn(move || {
                for turn in 0..if long() { 100_000 } else { 1_000 } {
                    let fd = EventFd::new(EFD_NONBLOCK).unwrap();
                    frontend.set_vring_call(turn % 2, &fd).unwrap();
                    frontend.set_vring_kick(turn % 2, &fd).unwrap();
                }
                stop.store(true, Ordering::Relaxed);
                frontend
            });
            // Kicks are for the descriptor that was there first: the ring is polled while it has traffic, and the
            // last of its frames needs none behind another port's.
            while !stop.load(Ordering::Relaxed) {
                sent += u64::from(guest.try_send(&frame(mac(4), mac(3), sent, 100)));
                while sink.try_receive().is_some() {}
                sink.try_send(&frame(mac(3), mac(4), sent, 100));
                while guest.try_receive().is_some() {}
            }
        });
        assert!(sent > 0);
        last_end(scene);
        while sink.try_receive().is_some() {}
        wait_for("the old descriptors to go", || {
            Holdings::of(&scene.daemon).fds <= held
        });
    });
}

#[test]
fn a_guest_without_descriptors_is_polled_and_called_by_nobody() {
    scene(|scene, sink| {
        let ram = Ram::new(GuestOptions::default());
        let mut guest = Guest::new(&ram);
        let mut frontend = guest.negotiate(scene.victim()).unwrap();
        frontend.set_features(frontend.features()).unwrap();
        frontend.set_mem_table(&[guest.region()]).unwrap();
        for which in [RECEIVE, TRANSMIT] {
            let queue = guest.queue(which);
            frontend
                .set_vring_num(queue.index, u32::from(queue.size))
                .unwrap();
            frontend.set_vring_base(queue.index, queue.base).unwrap();
            frontend.set_vring_addr(&queue).unwrap();
            // Bit 8: there is no descriptor.
            let none = (u64::from(queue.index) | 1 << 8).to_le_bytes();
            frontend
                .tell(FrontendReq::SET_VRING_KICK, &none, &[])
                .unwrap();
            frontend
                .tell(FrontendReq::SET_VRING_CALL, &none, &[])
                .unwrap();
            frontend.set_vring_enable(queue.index, true).unwrap();
        }
        guest.frontend = Some(frontend);
        scene.wait_until_running(VICTIM);
        for number in 0..50 {
            scene.passes(&mut guest, sink, number);
            scene.reaches(&mut guest, sink, number);
        }
        assert!(guest.calls.iter().all(|call| call.read().is_err()));
        guest.detach();
        last_end(scene);
    });
}

#[test]
fn a_storm_of_kicks_delays_nobody() {
    with_victim(GuestOptions::default(), |scene, guest, sink| {
        let stop = AtomicBool::new(false);
        let kick = guest.kicks[TRANSMIT].try_clone().unwrap();
        std::thread::scope(|scope| {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = kick.write(1);
                }
            });
            scene.bystanders.go_on(500);
            scene.passes(guest, sink, 1);
            stop.store(true, Ordering::Relaxed);
        });
    });
}

// ---- races with the guest ----------------------------------------------------------------------------

/// Frames of the victim that a guest has received: those to its own address, and others.
fn judged(guest: &mut Guest<'_>, own: Mac) -> (u64, u64) {
    let (mut right, mut wrong) = (0, 0);
    while let Some(bytes) = guest.try_receive() {
        match read(&bytes) {
            label if label.from != mac(3) => {}
            label if label.to == own => right += 1,
            _ => wrong += 1,
        }
    }
    (right, wrong)
}

#[test]
fn a_frame_is_delivered_as_it_was_judged() {
    scene_of(5, |scene, sink| {
        let other_ram = Ram::new(GuestOptions::default());
        let mut other = Guest::new(&other_ram);
        other.attach(&scene.daemon.sockets()[4]);
        scene.wait_until_running("p4");
        other.send(&frame(mac(4), mac(5), 1, 100));
        wait_for("the other's address", || sink.try_receive().is_some());
        let ram = Ram::new(GuestOptions::default());
        let mut guest = Guest::new(&ram);
        scene.attach_victim(&mut guest, sink);
        // The sink's address is known from here on.
        scene.reaches(&mut guest, sink, 1);
        while other.try_receive().is_some() {}
        let stop = AtomicBool::new(false);
        let wrong = std::thread::scope(|scope| {
            let stop = &stop;
            // The last byte of the destination: the sink's address, and the other's.
            let places: Vec<_> = (0..256).map(|token| guest.transmit_memory(token)).collect();
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for to in [mac(5), mac(4)] {
                        places
                            .iter()
                            .for_each(|place| place.write_bytes(12 + 5, &to[5..]));
                    }
                }
            });
            let (mut right, mut wrong) = (0, 0);
            let deadline = Instant::now() + LIMIT;
            while right < 2_000 && Instant::now() < deadline {
                guest.try_send(&frame(mac(4), mac(3), 1, 100));
                for (good, bad) in [judged(sink, mac(4)), judged(&mut other, mac(5))] {
                    (right, wrong) = (right + good, wrong + bad);
                }
            }
            stop.store(true, Ordering::Relaxed);
            assert!(right > 100, "{right}");
            wrong
        });
        assert_eq!(wrong, 0, "frames went where they were not addressed to");
        guest.detach();
        last_end(scene);
        while sink.try_receive().is_some() {}
        other.detach();
        wait_for("the other's end", || {
            scene.daemon.state("p4").0 == "waiting"
        });
    });
}

#[test]
fn notification_words_that_flip_stall_nobody() {
    for options in kinds() {
        with_victim(options, |scene, guest, sink| {
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let stop = &stop;
                let words = [RECEIVE, TRANSMIT].map(|which| {
                    let available = guest.areas(which).available;
                    // Flags and used_event of a split ring; both words of a packed one.
                    let event = if options.packed {
                        2
                    } else {
                        available.len() - 2
                    };
                    (available, event)
                });
                scope.spawn(move || {
                    let mut value = 1_u16;
                    while !stop.load(Ordering::Relaxed) {
                        for (available, event) in words {
                            available.store_u16(0, value & 3, Ordering::Relaxed);
                            available.store_u16(event, value, Ordering::Relaxed);
                        }
                        value = value.wrapping_mul(25_173).wrapping_add(13_849);
                    }
                });
                for number in 0..300 {
                    scene.passes(guest, sink, number);
                    scene.reaches(guest, sink, number);
                }
                stop.store(true, Ordering::Relaxed);
            });
        });
    }
}

/// Ways to stop rings in the middle of a burst; when they are answered, guest memory is the guest's alone.
#[derive(Clone, Copy, Debug)]
enum StopBy {
    GetVringBase,
    DisableFirst,
    ResetDevice,
}

fn stop_rings(frontend: &Frontend, how: StopBy) {
    match how {
        StopBy::GetVringBase => {
            frontend.get_vring_base(0).unwrap();
            frontend.get_vring_base(1).unwrap();
        }
        StopBy::DisableFirst => drop(frontend.stop(&[0, 1]).unwrap()),
        StopBy::ResetDevice => frontend.tell(FrontendReq::RESET_DEVICE, &[], &[]).unwrap(),
    }
}

#[test]
fn nothing_is_written_to_a_guest_whose_rings_are_stopped() {
    for options in kinds() {
        for how in [
            StopBy::GetVringBase,
            StopBy::DisableFirst,
            StopBy::ResetDevice,
        ] {
            with_victim(options, |scene, guest, sink| {
                let mut frontend = guest.frontend.take().unwrap();
                let protocol = frontend.get_protocol_features().unwrap();
                frontend.set_protocol_features(protocol).unwrap();
                let stop = AtomicBool::new(false);
                let region = guest.memory();
                std::thread::scope(|scope| {
                    let (stop, sink) = (&stop, &mut *sink);
                    scope.spawn(move || {
                        let mut number = 0;
                        while !stop.load(Ordering::Relaxed) {
                            number += u64::from(sink.try_send(&frame(mac(3), mac(4), number, 300)));
                            while sink.try_receive().is_some() {}
                        }
                    });
                    wait_for("frames at the victim", || {
                        guest.try_send(&frame(mac(4), mac(3), 1, 100));
                        guest.try_receive().is_some()
                    });
                    stop_rings(&frontend, how);
                    let copy = || {
                        let mut bytes = vec![0; region.len()];
                        region.read_bytes(0, &mut bytes);
                        bytes
                    };
                    let stopped = copy();
                    scene.bystanders.go_on(200);
                    assert!(stopped == copy(), "packed: {}, {how:?}", options.packed);
                    stop.store(true, Ordering::Relaxed);
                });
                guest.frontend = Some(frontend);
            });
        }
    }
}
