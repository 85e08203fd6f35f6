//! The life of ports, from the first frame before `port add` has answered to the last event of one
//! that was removed.
//!
//! Whatever is pending for a port that is removed holds a reference to it or is cancelled: nothing
//! happens to it, or through it, afterwards, and nobody else notices.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::daemon::DaemonOptions;
use common::events::Events;
use common::guest::{Guest, GuestOptions, Ram};
use common::holdings::{Holdings, api_connections, descriptors, limit_descriptors};
use common::scene::{SINK, Scene, VICTIM};
use common::traffic::{Bystanders, frame, mac, read};
use common::{long, pause, socket_path, wait_for};
use pollux::api::client::{Client, ClientError};

const LIMIT: Duration = Duration::from_secs(20);

/// Adds one of the scene's ports again.
fn add(scene: &Scene, port: &str) {
    let number = port[1..].parse().unwrap();
    let socket = socket_path(scene.daemon.dir(), number);
    let spec = format!("{port},socket={}", socket.display());
    let (code, said) = scene.daemon.try_pollux(&["port", "add", &spec]);
    assert_eq!(code, 0, "{said}");
}

fn remove(scene: &Scene, port: &str) {
    let (code, said) = scene.daemon.try_pollux(&["port", "remove", port]);
    assert_eq!(code, 0, "{said}");
}

#[test]
fn the_last_word_of_a_port_is_that_it_was_removed() {
    let scene = Scene::new();
    let before = Holdings::of(&scene.daemon);
    for turn in 0..10 {
        let ram = Ram::new(GuestOptions::default());
        let mut guest = Guest::new(&ram);
        guest.attach(scene.victim());
        let events = Events::of(&scene.daemon);
        std::thread::scope(|scope| {
            let frontend = guest.frontend.as_ref().unwrap();
            // A session in the middle of its messages cannot bring the port back, nor speak of it.
            scope.spawn(move || {
                let mut enable = false;
                while frontend.set_vring_enable(0, enable).is_ok()
                    && frontend.get_vring_base(1).is_ok()
                {
                    enable = !enable;
                }
            });
            remove(&scene, VICTIM);
        });
        wait_for("the session to be cut off", || guest.is_cut_off());
        let marker = format!(
            "marker,socket={}",
            scene.daemon.dir().join("marker").display()
        );
        assert_eq!(scene.daemon.try_pollux(&["port", "add", &marker]).0, 0);
        events.wait("marker", "port_added");
        let kinds: Vec<String> = events
            .of_port(VICTIM)
            .into_iter()
            .map(|(kind, _)| kind)
            .collect();
        let last = kinds.len().saturating_sub(2);
        assert_eq!(
            kinds[last..],
            ["session_disconnected", "port_removed"],
            "{turn}: {kinds:?}"
        );
        assert_eq!(scene.daemon.try_pollux(&["port", "remove", "marker"]).0, 0);
        add(&scene, VICTIM);
    }
    before.wait_for_return(&scene.daemon);
    scene.finish();
}

#[test]
fn a_frame_passes_before_the_answer_to_port_add_is_taken() {
    let scene = Scene::new();
    let sink_ram = Ram::new(GuestOptions::default());
    let mut sink = Guest::new(&sink_ram);
    scene.attach_sink(&mut sink);
    let socket = scene.daemon.dir().join("new");
    let body = format!("{{\"name\":\"new\",\"socket\":{socket:?}}}");
    let mut api = UnixStream::connect(scene.daemon.dir().join("api.sock")).unwrap();
    write!(
        api,
        "POST /v1/ports HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    wait_for("the socket", || socket.exists());
    let ram = Ram::new(GuestOptions::default());
    let mut guest = Guest::new(&ram);
    guest.attach(&socket);
    wait_for("a frame of the new port", || {
        guest.try_send(&frame(mac(4), mac(3), 5, 100));
        sink.try_receive()
            .is_some_and(|bytes| read(&bytes).from == mac(3))
    });
    api.set_read_timeout(Some(LIMIT)).unwrap();
    let mut answer = [0; 12];
    api.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 201");
    drop((guest, sink));
    scene.finish();
}

#[test]
fn a_port_that_cannot_be_made_leaves_nothing_and_its_name_is_free_at_once() {
    let scene = Scene::new();
    let daemon = &scene.daemon;
    let before = Holdings::of(daemon);
    let socket = daemon.dir().join("new");
    let spec = format!("new,socket={},socket-mode=0600", socket.display());
    // The API's connection takes one; then the socket cannot be made, or its file cannot be looked
    // at.
    for spare in [0, 1] {
        before.wait_for_return(daemon);
        wait_for("the end of the API's connections", || {
            api_connections(daemon) == 0
        });
        let used = descriptors(daemon);
        let limit = (0..).filter(|n| !used.contains(n)).nth(1 + spare).unwrap();
        limit_descriptors(daemon, Some(limit));
        let (code, said) = daemon.try_pollux(&["port", "add", &spec]);
        assert_eq!(code, 5, "{spare} left: {said}");
        assert!(said.contains("Too many open files"), "{spare} left: {said}");
        assert!(!socket.exists(), "{spare} left");
        limit_descriptors(daemon, None);
        before.wait_for_return(daemon);
        assert_eq!(daemon.try_pollux(&["port", "show", "new"]).0, 4);
    }
    assert_eq!(daemon.try_pollux(&["port", "add", &spec]).0, 0);
    assert_eq!(daemon.try_pollux(&["port", "remove", "new"]).0, 0);
    scene.finish();
}

#[test]
fn a_limit_of_descriptors_that_may_not_be_enough_is_named_before_it_is_reached() {
    let scene = Scene::new();
    let daemon = &scene.daemon;
    // 32 ports with all queues in use would want more; none is.
    limit_descriptors(daemon, Some(1000));
    for n in 0..32 {
        let socket = daemon.dir().join(format!("new{n}"));
        let spec = format!("new{n},socket={}", socket.display());
        assert_eq!(daemon.try_pollux(&["port", "add", &spec]).0, 0);
    }
    daemon.assert_logged("and the limit is 1000 (LimitNOFILE=");
    assert_eq!(daemon.log().matches("the limit is").count(), 1);
    scene.finish();
}

#[test]
fn what_cannot_be_added_is_refused_by_name_and_nobody_notices() {
    let scene = Scene::new();
    let dir = scene.daemon.dir();
    let at = |name: &str| dir.join(name).display().to_string();
    let (file, link, live) = (at("file"), at("link"), at("live"));
    std::fs::write(&file, "mine").unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    let listener = UnixListener::bind(&live).unwrap();
    let (taken, long) = (scene.victim().display().to_string(), at(&"x".repeat(120)));
    let missing = at("missing/p.sock");
    let before = Holdings::of(&scene.daemon);
    for (spec, code, parts) in [
        (
            format!("new,socket={long}"),
            2,
            [&long[..10], "at most 107"],
        ),
        (
            format!("new,socket={live}"),
            5,
            [&live, "another process listens"],
        ),
        (format!("new,socket={file}"), 5, [&file, "not a socket"]),
        (format!("new,socket={link}"), 5, [&link, "not a socket"]),
        (
            format!("new,socket={missing}"),
            5,
            ["missing", "does not exist"],
        ),
        (
            format!("new,socket={taken}"),
            5,
            [&taken, "is the socket of port"],
        ),
        (
            format!("{VICTIM},socket={}", at("other")),
            5,
            [VICTIM, "exists already"],
        ),
        (
            format!("new,socket={},socket-group=nosuchgroup", at("n")),
            5,
            ["nosuchgroup", "does not exist"],
        ),
    ] {
        let (found, said) = scene.daemon.try_pollux(&["port", "add", &spec]);
        assert_eq!(found, code, "{spec}: {said}");
        for part in parts {
            assert!(said.contains(part), "{spec}: {said}");
        }
    }
    assert_eq!(scene.daemon.ports().len(), 4);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
    drop(listener);
    before.wait_for_return(&scene.daemon);
    scene.finish();
}

// ---- what is pending when a port goes -----------------------------------------------------------

/// Sends to `mac(3)` until told to stop. Once that port is gone, its frames are flooded: the
/// bystanders must have emptied their rings before more follow.
fn flood(sink: &mut Guest<'_>, stop: &AtomicBool, bystanders: &Bystanders) {
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..16 {
            number += u64::from(sink.try_send(&frame(mac(3), mac(4), number, 300)));
        }
        let seen = bystanders.frames();
        while sink.in_flight() > 0 || bystanders.frames() < seen + 32 {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            pause();
        }
    }
}

#[test]
fn ports_are_removed_while_frames_wait_for_a_retry_and_calls_are_owed() {
    let scene = Scene::new();
    let sink_ram = Ram::new(GuestOptions::default());
    let before = Holdings::of(&scene.daemon);
    let mut sink = Guest::new(&sink_ram);
    for turn in 0..if long() { 40 } else { 8 } {
        let ram = Ram::new(GuestOptions {
            packed: turn % 2 == 1,
            event_idx: false,
            calls: true,
            ..GuestOptions::default()
        });
        let mut guest = Guest::new(&ram);
        // Calls that come to nothing.
        guest.block_calls();
        scene.attach_sink(&mut sink);
        scene.attach_victim(&mut guest, &mut sink);
        let stop = AtomicBool::new(false);
        let remove_sender = turn % 4 >= 2;
        std::thread::scope(|scope| {
            let (sink, stop, scene) = (&mut sink, &stop, &scene);
            scope.spawn(move || flood(sink, stop, &scene.bystanders));
            // It takes no frame out, so that every pass has some to try again.
            let full = || scene.daemon.dropped(VICTIM, "tx", "egress_ring_full") > 0;
            wait_for("the victim's ring to be full", full);
            if remove_sender {
                remove(scene, SINK);
            }
            remove(scene, VICTIM);
            add(scene, VICTIM);
            stop.store(true, Ordering::Relaxed);
        });
        if remove_sender {
            add(&scene, SINK);
        }
        // Its ring goes on where it stood; what was not completed is taken again, and nothing is
        // returned twice.
        sink.detach();
        scene.attach_sink(&mut sink);
        wait_for("every transmit buffer", || sink.in_flight() == 0);
        sink.detach();
        drop(guest);
        wait_for("the sink's end", || scene.daemon.state(SINK).0 == "waiting");
        scene.bystanders.go_on(20);
    }
    before.wait_for_return(&scene.daemon);
    scene.finish();
}

#[test]
fn a_removed_port_is_not_connected_to_any_more() {
    let scene = Scene::new();
    let dir = scene.daemon.dir();
    let (left, clock) = (dir.join("left"), dir.join("clock"));
    let listen = |path: &Path| {
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    };
    let ticking = listen(&clock);
    for turn in 0..3 {
        let reached = listen(&left);
        for (name, path) in [("left", &left), ("clock", &clock)] {
            let spec = format!("{name},socket={},mode=client", path.display());
            assert_eq!(scene.daemon.try_pollux(&["port", "add", &spec]).0, 0);
        }
        wait_for("a first connection", || reached.accept().is_ok());
        if turn > 0 {
            // Nobody listens: the next attempt is due when the port goes.
            drop(reached);
            std::fs::remove_file(&left).unwrap();
            let connecting = || scene.daemon.state("left").0 == "connecting";
            wait_for("the reconnect timer", connecting);
            remove(&scene, "left");
            let reached = listen(&left);
            // The other port's attempts, each as long after the one before.
            for _ in 0..5 {
                wait_for("the other port's connection", || ticking.accept().is_ok());
            }
            assert!(reached.accept().is_err(), "a removed port connects");
        } else {
            remove(&scene, "left");
        }
        let _ = std::fs::remove_file(&left);
        remove(&scene, "clock");
        while ticking.accept().is_ok() {}
    }
    scene.finish();
}

#[test]
fn requests_for_a_port_that_goes_are_answered_or_told_that_it_is_gone() {
    let scene = Scene::new();
    let api = scene.daemon.dir().join("api.sock");
    let (stop, answered, gone) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let port = format!("/v1/ports/{VICTIM}");
    let address = "52:54:00:00:00:99";
    let entry = serde_json::json!({"mac": address, "port": VICTIM, "replace": true});
    let patch = serde_json::json!({"queues": 1});
    let flush = format!("/v1/fdb?port={VICTIM}");
    std::thread::scope(|scope| {
        for kind in 0..5 {
            let (stop, answered, gone) = (&stop, &answered, &gone);
            let (api, port, entry, patch, flush) = (&api, &port, &entry, &patch, &flush);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let client = Client::new(api);
                    let result = match kind {
                        0 => client.get(port),
                        1 => client.patch(port, patch),
                        2 => client.post("/v1/fdb", entry),
                        3 => client.delete(flush),
                        _ => client.get("/v1/stats"),
                    };
                    match result {
                        Ok(_) => answered.fetch_add(1, Ordering::Relaxed),
                        Err(ClientError::Refused {
                            status: 404 | 410, ..
                        }) if kind < 4 => gone.fetch_add(1, Ordering::Relaxed),
                        Err(error) => panic!("request {kind}: {error}"),
                    };
                }
            });
        }
        for _ in 0..if long() { 200 } else { 20 } {
            remove(&scene, VICTIM);
            add(&scene, VICTIM);
        }
        remove(&scene, VICTIM);
        wait_for("an answer without the port", || {
            gone.load(Ordering::Relaxed) > 0
        });
        stop.store(true, Ordering::Relaxed);
    });
    assert!(answered.load(Ordering::Relaxed) > 0);
    let fdb = scene.daemon.try_pollux(&["fdb", "list"]).1;
    assert!(!fdb.contains("52:54:00:00:00:99"), "{fdb}");
    add(&scene, VICTIM);
    scene.finish();
}

#[test]
fn frontends_that_connect_while_their_port_goes_are_served_or_refused() {
    let scene = Scene::new();
    let before = Holdings::of(&scene.daemon);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (stop, socket) = (&stop, scene.victim());
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Ok(stream) = UnixStream::connect(socket) {
                        // Asks for features; whether it is answered is open.
                        let message = [1_u32, 1, 0].map(u32::to_le_bytes).concat();
                        let _ = (&stream).write_all(&message);
                        let _ = stream.set_read_timeout(Some(Duration::from_millis(5)));
                        let _ = (&stream).read(&mut [0; 20]);
                    }
                }
            });
        }
        for _ in 0..if long() { 200 } else { 20 } {
            remove(&scene, VICTIM);
            add(&scene, VICTIM);
        }
        stop.store(true, Ordering::Relaxed);
    });
    before.wait_for_return(&scene.daemon);
    let rams = [(); 2].map(|()| Ram::new(GuestOptions::default()));
    let (mut sink, mut guest) = (Guest::new(&rams[0]), Guest::new(&rams[1]));
    scene.attach_sink(&mut sink);
    scene.attach_victim(&mut guest, &mut sink);
    drop((sink, guest));
    scene.finish();
}

// ---- the next tenant of a slot ------------------------------------------------------------------

/// Numbers of the frames from `mac(4)` to `mac(3)` that a guest has received.
fn collect(guest: &mut Guest<'_>, into: &mut BTreeSet<u64>) {
    while let Some(bytes) = guest.try_receive() {
        let label = read(&bytes);
        if (label.from, label.to) == (mac(4), mac(3)) {
            into.insert(label.sequence);
        }
    }
}

/// What goes to an address of a removed port is flooded: its slot's next tenant may see it with
/// everybody else, and never alone.
#[test]
fn no_frame_for_a_removed_port_goes_to_the_next_tenant_of_its_slot_alone() {
    let scene = Scene::with(&DaemonOptions {
        ports: 5,
        ..DaemonOptions::default()
    });
    let rams = [(); 2].map(|()| Ram::new(GuestOptions::default()));
    let (mut sink, mut witness) = (Guest::new(&rams[0]), Guest::new(&rams[1]));
    scene.attach_sink(&mut sink);
    witness.attach(&scene.daemon.sockets()[4]);
    scene.wait_until_running("p4");
    let (mut seen, mut tenants) = (BTreeSet::new(), BTreeSet::new());
    let mut number = 1;
    for _ in 0..if long() { 200 } else { 15 } {
        let ram = Ram::new(GuestOptions::default());
        let mut guest = Guest::new(&ram);
        scene.attach_victim(&mut guest, &mut sink);
        // Both addresses are known before anybody sends without reading, so that nothing of it is
        // flooded.
        scene.reaches(&mut guest, &mut sink, 0);
        collect(&mut witness, &mut seen);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (sink, witness, seen, number) = (&mut sink, &mut witness, &mut seen, &mut number);
            let (stop, socket) = (&stop, scene.victim());
            // One at a time, so that a full ring is no reason to miss one.
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    sink.send(&frame(mac(3), mac(4), *number, 100));
                    *number += 1;
                    wait_for("the frame to be delivered", || sink.in_flight() == 0);
                    while sink.try_receive().is_some() {}
                    collect(witness, seen);
                }
                collect(witness, seen);
            });
            // The old tenant goes on talking: a poll thread with the old view may still learn its
            // address.
            let mut old = guest;
            scope.spawn(move || {
                while !old.is_cut_off() {
                    old.try_send(&frame(mac(4), mac(3), 0, 100));
                    while old.try_receive().is_some() {}
                }
            });
            remove(&scene, VICTIM);
            add(&scene, VICTIM);
            let ram = Ram::new(GuestOptions::default());
            let mut tenant = Guest::new(&ram);
            tenant.attach(socket);
            let before = tenants.len();
            wait_for("frames at the next tenant", || {
                collect(&mut tenant, &mut tenants);
                tenants.len() > before + 20
            });
            stop.store(true, Ordering::Relaxed);
        });
        wait_for("the tenant's end", || {
            scene.daemon.state(VICTIM).0 == "waiting"
        });
    }
    let alone: Vec<_> = tenants.difference(&seen).collect();
    assert!(
        alone.is_empty(),
        "{alone:?} of {} went to the next tenant alone",
        tenants.len()
    );
    assert_eq!(scene.daemon.dropped("p4", "tx", "egress_ring_full"), 0);
    drop((sink, witness));
    scene.finish();
}
