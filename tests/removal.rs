//! Ports that are removed whatever their frontends, their calls and the requests about them are in
//! the middle of.
//!
//! After each removal name and socket serve the next frontend at once, nothing of the old one stays
//! behind, and bystanders have lost nothing.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, RECEIVE, RING_SPACE, Ram, TRANSMIT};
use common::holdings::Holdings;
use common::park::Parked;
use common::scene::{Scene, VICTIM};
use common::traffic::{frame, mac};
use common::wait_for;
use common::waiters::hang_waiters;
use pollux::api::client::{Client, ClientError};
use pollux::bench::frontend::{Frontend, RING_PACKED};
use pollux::virtio::driver::DESC_NEXT;
use serde_json::{Value, json};
use vhost::vhost_user::message::FrontendReq;

const LIMIT: Duration = Duration::from_secs(20);
/// How long a request about an observer waits for poll threads.
const PATIENCE: Duration = Duration::from_secs(2);

/// A scene whose poll threads never sleep: one that stands still is waited for.
fn awake_scene() -> Scene {
    Scene::with(&DaemonOptions {
        args: ["--idle", "busy"].map(String::from).to_vec(),
        ..DaemonOptions::default()
    })
}

fn client(scene: &Scene) -> Client {
    Client::new(scene.daemon.dir().join("api.sock"))
}

/// Removes the victim's port, which is no more when that is answered, and adds it again.
fn remove_and_add(scene: &Scene) {
    let (client, port) = (client(scene), format!("/v1/ports/{VICTIM}"));
    client.delete(&port).unwrap();
    let again = [
        client.get(&port),
        client.patch(&port, &json!({"queues": 1})),
        client.delete(&port),
    ];
    for answer in again {
        let refused = answer.unwrap_err();
        let is_refusal = matches!(refused, ClientError::Refused { status: 404, .. });
        assert!(is_refusal, "{refused}");
    }
    assert!(!scene.victim().exists());
    let spec = json!({"name": VICTIM, "socket": scene.victim()});
    client.post("/v1/ports", &spec).unwrap();
}

/// The switch has closed this connection, and says nothing before.
fn assert_cut_off(mut stream: UnixStream) {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    match stream.read(&mut [0]) {
        Ok(bytes) => assert_eq!(bytes, 0),
        // It was not even accepted.
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

/// Nothing has been said on this connection so far.
fn is_silent(mut stream: &UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let read = stream.read(&mut [0]);
    stream.set_nonblocking(false).unwrap();
    read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

/// What a removed port was sent is nobody's: it must not be taken for what its next tenant is sent.
fn forget_frames(sink: &mut Guest<'_>) {
    wait_for("the frames on their way", || sink.in_flight() == 0);
    while sink.try_receive().is_some() {}
}

// ---- states of a session ------------------------------------------------------------------------

/// What a running port has come to when it is removed.
#[derive(Clone, Copy, Debug)]
enum State {
    /// GET_VRING_BASE has stopped its rings.
    Stopped,
    /// SET_VRING_ENABLE 0.
    Disabled,
    /// RESET_DEVICE or RESET_OWNER.
    Reset(FrontendReq),
    /// The driver has broken one of the rings.
    Broken(usize),
    /// Its memory is gone, and a poll thread has found that out.
    Faulted,
    /// A message has begun.
    HalfAMessage,
    /// A second frontend waits on the same socket.
    Contended,
}

const STATES: [State; 9] = [
    State::Stopped,
    State::Disabled,
    State::Reset(FrontendReq::RESET_DEVICE),
    State::Reset(FrontendReq::RESET_OWNER),
    State::Broken(RECEIVE),
    State::Broken(TRANSMIT),
    State::Faulted,
    State::HalfAMessage,
    State::Contended,
];

impl State {
    /// Brings a victim that runs to it. Returns the second frontend, if there is one.
    fn reach(
        self,
        scene: &Scene,
        ram: &Ram,
        guest: &mut Guest<'_>,
        sink: &mut Guest<'_>,
    ) -> Option<UnixStream> {
        match self {
            State::Broken(which) => {
                break_ring(guest, which);
                if which == RECEIVE {
                    // It is looked at when a frame comes.
                    sink.send(&frame(mac(3), mac(4), 1, 100));
                }
                let broken = || scene.daemon.state(VICTIM).0 == "broken";
                wait_for("the port to be broken", broken);
            }
            State::Faulted => {
                // From here on this process must not touch the buffers either.
                ram.memory.file().set_len(2 * RING_SPACE as u64).unwrap();
                sink.send(&frame(mac(3), mac(4), 1, 100));
                wait_for("the fault", || {
                    scene.daemon.dropped(VICTIM, "tx", "egress_memory_fault") > 0
                });
            }
            State::Contended => return Some(UnixStream::connect(scene.victim()).unwrap()),
            _ => self.say(guest.frontend.as_mut().unwrap()),
        }
        None
    }

    /// The messages that lead to it.
    fn say(self, frontend: &mut Frontend) {
        let rings = [RECEIVE as u32, TRANSMIT as u32];
        match self {
            State::Stopped => rings.iter().for_each(|ring| {
                frontend.get_vring_base(*ring).unwrap();
            }),
            State::Disabled => rings.iter().for_each(|ring| {
                frontend.set_vring_enable(*ring, false).unwrap();
            }),
            State::Reset(request) => {
                let protocol = frontend.get_protocol_features().unwrap();
                frontend.set_protocol_features(protocol).unwrap();
                frontend.tell(request, &[], &[]).unwrap();
            }
            _ => {
                // SET_MEM_TABLE, and less than its header.
                let header = [5_u32, 1, 40].map(u32::to_le_bytes).concat();
                frontend.stream().write_all(&header[..9]).unwrap();
            }
        }
    }
}

/// Makes a ring one that cannot be: with more in it than there is room for, or with a chain that
/// has no end.
fn break_ring(guest: &mut Guest<'_>, which: usize) {
    wait_for("the transmit buffers", || guest.in_flight() == 0);
    let ring = guest.areas(which);
    if guest.features() & RING_PACKED != 0 {
        for slot in 0..usize::from(ring.size) {
            let at = slot * 16 + 14;
            let flags = ring.descriptors.load_u16(at, Ordering::Relaxed);
            // What the driver has not posted becomes available, in the first lap.
            let flags = if which == TRANSMIT { 1 << 7 } else { flags };
            let endless = flags | DESC_NEXT;
            ring.descriptors.store_u16(at, endless, Ordering::Release);
        }
    } else {
        let index = ring.available.load_u16(2, Ordering::Relaxed);
        let ahead = index.wrapping_add(ring.size + 1);
        ring.available.store_u16(2, ahead, Ordering::Release);
    }
    guest.kick(which);
}

fn removed_in(state: State, options: GuestOptions, scene: &Scene, sink: &mut Guest<'_>) {
    println!("{state:?}, packed: {}", options.packed);
    let mappings = Holdings::of(&scene.daemon).mappings;
    let ram = Ram::new(options);
    let mut guest = Guest::new(&ram);
    scene.attach_victim(&mut guest, sink);
    let second = state.reach(scene, &ram, &mut guest, sink);
    // Traffic to the port, as far as it takes any.
    for number in 0..50 {
        sink.try_send(&frame(mac(3), mac(4), number, 300));
    }
    remove_and_add(scene);
    wait_for("the session to be cut off", || guest.is_cut_off());
    second.into_iter().for_each(assert_cut_off);
    forget_frames(sink);
    scene.serves(sink);
    wait_for("the memory of both tenants to go", || {
        Holdings::of(&scene.daemon).mappings == mappings
    });
    scene.bystanders.go_on(20);
}

#[test]
fn a_port_is_removed_whatever_has_become_of_its_rings_and_serves_the_next_frontend_at_once() {
    let scene = Scene::new();
    let sink_ram = Ram::new(GuestOptions::default());
    let mut sink = Guest::new(&sink_ram);
    scene.attach_sink(&mut sink);
    let before = Holdings::of(&scene.daemon);
    for packed in [false, true] {
        let options = GuestOptions {
            packed,
            // Its memory may be taken away.
            sealed: false,
            ..GuestOptions::default()
        };
        for state in STATES {
            removed_in(state, options, &scene, &mut sink);
        }
    }
    before.wait_for_return(&scene.daemon);
    drop(sink);
    scene.finish();
}

#[test]
fn a_frontend_that_waits_for_the_end_of_its_predecessor_goes_with_the_port() {
    let scene = awake_scene();
    let rams = [(); 2].map(|()| Ram::new(GuestOptions::default()));
    let (mut sink, mut guest) = (Guest::new(&rams[0]), Guest::new(&rams[1]));
    scene.attach_sink(&mut sink);
    let before = Holdings::of(&scene.daemon);
    scene.attach_victim(&mut guest, &mut sink);
    let parked = Parked::poll_thread(&scene.daemon, 0);
    let held = Holdings::of(&scene.daemon).mappings;
    // The session cannot end: the thread may still use its memory.
    guest.detach();
    let second = UnixStream::connect(scene.victim()).unwrap();
    let question = [1_u32, 1, 0].map(u32::to_le_bytes).concat();
    (&second).write_all(&question).unwrap();
    // Answered by whoever has seen the connection before.
    assert_ne!(scene.daemon.state(VICTIM).0, "waiting");
    assert!(is_silent(&second));
    remove_and_add(&scene);
    assert_cut_off(second);
    assert_eq!(Holdings::of(&scene.daemon).mappings, held);
    drop(parked);
    forget_frames(&mut sink);
    scene.serves(&mut sink);
    before.wait_for_return(&scene.daemon);
    drop(sink);
    scene.finish();
}

// ---- deferred calls -----------------------------------------------------------------------------

/// The thread that converses with the victim's frontend.
fn session_thread(daemon: &Daemon) -> u32 {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let mut tasks = tasks.map(|task| task.unwrap().path());
    let name = format!("session-{VICTIM}\n");
    let session = tasks.find(|task| {
        let comm = fs::read_to_string(task.join("comm"));
        comm.is_ok_and(|comm| comm == name)
    });
    let session = session.expect("there is a session");
    session
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .parse()
        .unwrap()
}

fn deferred_calls(scene: &Scene) -> u64 {
    let port = scene.daemon.port(VICTIM);
    port["statistics"]["deferred_calls"].as_u64().unwrap()
}

/// Removes a port whose session has been left calls to make, and has not come to it.
fn removed_with_calls_deferred(blocked: bool) {
    let scene = Scene::new();
    let sink_ram = Ram::new(GuestOptions::default());
    let mut sink = Guest::new(&sink_ram);
    scene.attach_sink(&mut sink);
    let before = Holdings::of(&scene.daemon);
    let ram = Ram::new(GuestOptions {
        calls: true,
        event_idx: false,
        ..GuestOptions::default()
    });
    let mut guest = Guest::new(&ram);
    let waiters = hang_waiters(&guest.calls[RECEIVE], 142);
    scene.attach_victim(&mut guest, &mut sink);
    let mut number = 0;
    // Each frame wants a call.
    let mut reach = |guest: &mut Guest<'_>, sink: &mut Guest<'_>, frames: u64| {
        for _ in 0..frames {
            number += 1;
            scene.reaches(guest, sink, number);
        }
    };
    wait_for("calls that the session makes", || {
        reach(&mut guest, &mut sink, 10);
        deferred_calls(&scene) > 0
    });
    // It has said so, and makes calls or waits for something to do: it holds nothing that others
    // wait for.
    scene.daemon.assert_logged("calls are slow");
    let session = Parked::park(session_thread(&scene.daemon)).unwrap();
    if blocked {
        guest.block_calls();
    } else {
        let _ = guest.calls[RECEIVE].read();
    }
    let made = deferred_calls(&scene);
    reach(&mut guest, &mut sink, 10);
    // They are owed, and nobody else makes them.
    assert_eq!(deferred_calls(&scene), made);
    assert!(blocked || guest.calls[RECEIVE].read().is_err());
    remove_and_add(&scene);
    assert!(guest.is_cut_off());
    forget_frames(&mut sink);
    // The port is another one, which has done no wrong; the old session is in nobody's way.
    scene.serves(&mut sink);
    assert_eq!(scene.daemon.port(VICTIM)["calls"], "direct");
    assert_eq!(deferred_calls(&scene), 0);
    scene.bystanders.go_on(100);
    drop(session);
    before.wait_for_return(&scene.daemon);
    drop((waiters, sink));
    scene.finish();
}

#[test]
fn a_port_is_removed_while_calls_are_left_to_its_session() {
    for blocked in [false, true] {
        removed_with_calls_deferred(blocked);
    }
}

// ---- requests -----------------------------------------------------------------------------------

/// Asks over a connection of its own; the answer is still to come.
fn ask(scene: &Scene, request: &str, body: &str) -> UnixStream {
    let mut stream = UnixStream::connect(scene.daemon.dir().join("api.sock")).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let len = body.len();
    let head = format!("{request} HTTP/1.1\r\nhost: x\r\ncontent-length: {len}\r\n\r\n");
    stream.write_all((head + body).as_bytes()).unwrap();
    stream
}

/// All that is answered, until the connection is closed.
fn answer(mut stream: UnixStream) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn assert_gone(stream: UnixStream) {
    let answer = answer(stream);
    assert!(answer.starts_with("HTTP/1.1 410"), "{answer}");
    assert!(answer.contains(r#""code":"gone""#), "{answer}");
    let words = format!(r#"port \"{VICTIM}\" was removed meanwhile"#);
    assert!(answer.contains(&words), "{answer}");
}

/// A stream has ended in order, and said why.
fn assert_ended(stream: UnixStream) {
    let answer = answer(stream);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("port removed"), "{answer}");
    assert!(answer.ends_with("0\r\n\r\n"), "{answer}");
}

fn observers(scene: &Scene) -> usize {
    let all = client(scene).get("/v1/observers").unwrap().value().unwrap();
    all.as_array().unwrap().len()
}

/// Whether a poll thread has the victim's transmit queue.
fn is_polled(scene: &Scene) -> bool {
    let threads = client(scene).get("/v1/poll").unwrap().value().unwrap();
    let mut threads = threads.as_array().unwrap().iter();
    let is_victims = |queue: &Value| queue["port"] == VICTIM;
    threads.any(|thread| thread["queues"].as_array().unwrap().iter().any(is_victims))
}

/// A scene whose bystanders have a poll thread of their own, so that the first one may stand still.
fn scene_of_two_threads() -> Scene {
    let scene = awake_scene();
    for words in ["add", "move p0 1", "move p1 1"] {
        let words: Vec<&str> = ["poll"].into_iter().chain(words.split(' ')).collect();
        let (code, said) = scene.daemon.try_pollux(&words);
        assert_eq!(code, 0, "{said}");
    }
    scene
}

#[test]
fn requests_that_wait_for_a_port_that_is_removed_are_answered() {
    let scene = scene_of_two_threads();
    let rams = [(); 2].map(|()| Ram::new(GuestOptions::default()));
    let (mut sink, mut guest) = (Guest::new(&rams[0]), Guest::new(&rams[1]));
    scene.attach_sink(&mut sink);
    scene.attach_victim(&mut guest, &mut sink);
    let open = ["capture?", "capture?drops=true&", "trace?count=1000&"];
    let open = open.map(|what| ask(&scene, &format!("GET /v1/{what}port={VICTIM}"), ""));
    let of_all = ask(&scene, "GET /v1/capture", "");
    wait_for("the streams", || observers(&scene) == 4);
    scene.daemon.settle();
    for number in 1..10 {
        scene.passes(&mut guest, &mut sink, number);
    }
    let parked = Parked::poll_thread(&scene.daemon, 0);
    let order = json!({"port": VICTIM, "thread": 1}).to_string();
    let order = ask(&scene, "POST /v1/poll/moves", &order);
    wait_for("the queue to be nobody's", || !is_polled(&scene));
    let asked = Instant::now();
    let late = ask(&scene, &format!("GET /v1/capture?port={VICTIM}"), "");
    let mirror = json!({"name": "m", "from": [VICTIM], "to": "p3"}).to_string();
    let mirror = ask(&scene, "POST /v1/mirrors", &mirror);
    wait_for("the late observers", || observers(&scene) == 6);
    remove_and_add(&scene);
    let in_time = asked.elapsed() < PATIENCE;
    // None of them is the new port's.
    assert_eq!(observers(&scene), 1);
    assert!(is_silent(&order));
    scene.bystanders.go_on(100);
    drop(parked);
    assert_gone(order);
    open.into_iter().chain([late]).for_each(assert_ended);
    // On a machine that stood still for so long it was there before the port went.
    if in_time {
        assert_gone(mirror);
    }
    drop(of_all);
    wait_for("the end of the last capture", || observers(&scene) == 0);
    forget_frames(&mut sink);
    scene.serves(&mut sink);
    drop((guest, sink));
    scene.finish();
}
