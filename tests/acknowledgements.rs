//! What frontends ask for while a poll thread stands still: rings and memory that it may be using
//! are not given back before it goes on, and are the guest's alone from the answer on.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, RECEIVE, Ram, TRANSMIT};
use common::holdings::Holdings;
use common::park::Parked;
use common::scene::Scene;
use common::traffic::{frame, mac};
use common::{Stop, wait_for};
use pollux::bench::frontend::{Frontend, Region};
use vhost::vhost_user::message::FrontendReq;

/// What takes something from the poll threads.
#[derive(Clone, Copy, Debug)]
enum Request {
    /// SET_VRING_ENABLE 0.
    Disable,
    /// SET_MEM_TABLE: other memory in place of what there was.
    NewTable,
    ResetDevice,
}

const REQUESTS: [Request; 3] = [Request::Disable, Request::NewTable, Request::ResetDevice];

impl Request {
    /// Asks; returns when that is answered.
    fn ask(self, frontend: &Frontend, table: Region) {
        let answer = match self {
            Request::Disable => frontend.set_vring_enable(RECEIVE as u32, false),
            Request::NewTable => frontend.set_mem_table(&[table]),
            Request::ResetDevice => frontend.tell(FrontendReq::RESET_DEVICE, &[], &[]),
        };
        answer.unwrap();
    }
}

/// Other memory, with the same in it, for the same addresses.
fn copy_of(guest: &Guest<'_>, ram: &Ram) -> Region {
    let from = guest.memory();
    let mut bytes = vec![0; from.len()];
    from.read_bytes(0, &mut bytes);
    let into = ram.memory.window(0, from.len()).unwrap();
    into.write_bytes(0, &bytes);
    Region {
        fd: ram.memory.file().as_raw_fd(),
        ..guest.region()
    }
}

fn wait_until_overdue(daemon: &Daemon) {
    wait_for("the thread to be overdue", || {
        daemon.poll_threads()[0]["state"] == "overdue"
    });
    let listed = daemon.pollux(&["poll", "list"]).stdout;
    assert!(String::from_utf8_lossy(&listed).contains("overdue"));
}

/// Asks for something under a flood to the victim, with the poll thread stopped in the middle of
/// whatever it does. The daemon has mapped so many regions of `memory` of others.
fn ask_of_a_thread_that_stands_still(
    request: Request,
    options: GuestOptions,
    scene: &Scene,
    sink: &mut Guest<'_>,
    memory: usize,
) {
    println!("{request:?}, packed: {}", options.packed);
    let daemon = &scene.daemon;
    // With the victim's own; memory of the guest before it may go a little later than its session.
    let held = memory + 1;
    let rams = [(); 2].map(|()| Ram::new(options));
    let mut guest = Guest::new(&rams[0]);
    scene.attach_victim(&mut guest, sink);
    wait_for("memory of those that left to go", || {
        Holdings::of(daemon).mappings == held
    });
    let mut frontend = guest.frontend.take().unwrap();
    let protocol = frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(protocol).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _end = Stop(&stop);
        let (stop, sink, frontend) = (&stop, &mut *sink, &frontend);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                sink.try_send(&frame(mac(3), mac(4), 1, 300));
                while sink.try_receive().is_some() {}
            }
        });
        wait_for("frames at the victim", || guest.try_receive().is_some());
        let parked = Parked::poll_thread(daemon, 0);
        let table = copy_of(&guest, &rams[1]);
        let asked = scope.spawn(move || request.ask(frontend, table));
        wait_until_overdue(daemon);
        assert!(!asked.is_finished(), "answered too early");
        // The thread may still write to what it has; a new table is there besides.
        let more = usize::from(matches!(request, Request::NewTable));
        assert_eq!(Holdings::of(daemon).mappings, held + more);
        drop(parked);
        asked.join().unwrap();
        // The transmitq may still be looked at, but nothing is delivered.
        let before = guest.contents_without(TRANSMIT);
        scene.bystanders.go_on(200);
        let now = guest.contents_without(TRANSMIT);
        assert!(now == before, "written to behind the answer");
        wait_for("what the table replaced to go", || {
            Holdings::of(daemon).mappings == held
        });
    });
    daemon.assert_logged("poll-0 has taken over again");
    let state = &daemon.poll_threads()[0]["state"];
    assert_eq!(state, "busy");
    guest.frontend = Some(frontend);
    guest.detach();
    scene.wait_until_left();
    wait_for("the rest of the flood", || sink.in_flight() == 0);
    while sink.try_receive().is_some() {}
    scene.serves(sink);
}

#[test]
fn what_a_thread_that_stands_still_may_use_is_given_back_when_it_goes_on() {
    let scene = Scene::with(&DaemonOptions {
        // One that sleeps is not waited for.
        args: ["--idle", "busy"].map(String::from).to_vec(),
        ..DaemonOptions::default()
    });
    let sink_ram = Ram::new(GuestOptions::default());
    let mut sink = Guest::new(&sink_ram);
    scene.attach_sink(&mut sink);
    let before = Holdings::of(&scene.daemon);
    for packed in [false, true] {
        let options = GuestOptions {
            packed,
            ..GuestOptions::default()
        };
        for request in REQUESTS {
            ask_of_a_thread_that_stands_still(request, options, &scene, &mut sink, before.mappings);
        }
    }
    before.wait_for_return(&scene.daemon);
    drop(sink);
    scene.finish();
}
