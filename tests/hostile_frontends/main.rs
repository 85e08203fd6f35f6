//! Frontends that mean harm, or are broken or frozen, on a running daemon with bystanders.
//!
//! What a session makes of each message is tested beside its code; here is what comes of it: the
//! session ends or goes on as it should, nothing of it stays behind, the next frontend is served,
//! and bystanders lose nothing. `POLLUX_LONG=1` takes the times and counts of the acceptance.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

#[path = "../common/mod.rs"]
mod common;

mod closing;
mod notifications;
mod races;
mod rings;
mod tables;

use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::daemon::DaemonOptions;
use common::guest::{Guest, GuestOptions, RECEIVE, Ram, TRANSMIT};
use common::holdings::Holdings;
use common::scene::{Scene, VICTIM};
use common::traffic::{frame, mac};
use common::wait_for;
use pollux::bench::frontend::{AttachError, Frontend, Order, Region};
use pollux::memory::SharedMemory;
use vhost::vhost_user::message::FrontendReq;
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

// ---- slow ones ----------------------------------------------------------------------------------

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

// ---- disconnections -----------------------------------------------------------------------------

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

// ---- messages that make no sense ----------------------------------------------------------------

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
