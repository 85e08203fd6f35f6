//! Descriptors whose closing takes as long as their sender likes. Files on FUSE are of that kind;
//! so is a TCP socket that lingers and has sent more than its peer reads.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{set_socket_linger, set_socket_recv_buffer_size};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;

/// Much longer than any of these tests should take.
const LINGER: Duration = Duration::from_secs(120);

/// A socket whose closing takes [`LINGER`], or until the other one is closed, which nobody must
/// read from.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // Connections inherit it.
    set_socket_recv_buffer_size(&listener, 4096).unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    set_socket_linger(&socket, Some(LINGER)).unwrap();
    socket.set_nonblocking(true).unwrap();
    while (&socket).write(&[0; 1 << 16]).is_ok() {}
    (socket, peer)
}

/// Whether somebody has begun to close the socket of this TCP port.
fn is_being_closed(port: u16) -> bool {
    let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let (local, fin_wait_1) = (format!(":{port:04X}"), "04");
    sockets.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|at| at.ends_with(&local)) && fields.nth(1) == Some(fin_wait_1)
    })
}

/// The daemon alone has a socket that lingers: it came as a part of `bytes`. Returns when it is
/// being closed.
fn send_lingering(scene: &Scene, stream: &UnixStream, bytes: &[u8]) -> TcpStream {
    let (socket, peer) = lingering();
    let port = socket.local_addr().unwrap().port();
    // Whoever lets go of it last is the one who waits.
    scene.daemon.freeze();
    stream
        .send_with_fds(&[bytes], &[socket.as_raw_fd()])
        .unwrap();
    drop(socket);
    scene.daemon.thaw();
    wait_for("the socket to be closed", || is_being_closed(port));
    peer
}

fn message(request: FrontendReq, body: &[u8]) -> Vec<u8> {
    [&header(request as u32, 1, body.len() as u32)[..], body].concat()
}

/// Everybody but the sender goes on, and an operator gets rid of it.
fn nobody_waits(scene: &Scene, sink: &mut Guest<'_>) {
    let begun = Instant::now();
    scene.bystanders.go_on(200);
    assert_eq!(scene.daemon.try_pollux(&["port", "remove", VICTIM]).0, 0);
    let spec = format!("{VICTIM},socket={}", scene.victim().display());
    let (code, said) = scene.daemon.try_pollux(&["port", "add", &spec]);
    assert_eq!(code, 0, "{said}");
    scene.serves(sink);
    assert!(begun.elapsed() < LINGER / 2, "{:?}", begun.elapsed());
}

#[test]
fn a_descriptor_that_cannot_be_closed_holds_up_its_own_session_only() {
    scene(|scene, sink| {
        let region = [[1, 0].map(u32::to_le_bytes).concat(), vec![0; 32]].concat();
        let cases = [
            ("as a call", message(FrontendReq::SET_VRING_CALL, &[0; 8])),
            ("as a kick", message(FrontendReq::SET_VRING_KICK, &[0; 8])),
            ("as an error", message(FrontendReq::SET_VRING_ERR, &[0; 8])),
            ("as memory", message(FrontendReq::SET_MEM_TABLE, &region)),
            ("where none belongs", message(FrontendReq::SET_OWNER, &[])),
            (
                "with what is unknown",
                message(FrontendReq::SEND_RARP, &[0; 8]),
            ),
            ("in half a message", header(2, 1, 8)),
            // Nobody reads any further.
            ("in a message that is too long", header(5, 1, u32::MAX)),
        ];
        for (what, bytes) in cases {
            println!("{what}");
            let ram = Ram::new(GuestOptions::default());
            let mut guest = Guest::new(&ram);
            scene.attach_victim(&mut guest, sink);
            let frontend = guest.frontend.take().unwrap();
            let peer = send_lingering(scene, frontend.stream(), &bytes);
            nobody_waits(scene, sink);
            drop((peer, frontend));
        }
    });
}

#[test]
fn a_descriptor_that_cannot_be_closed_behind_the_last_message_holds_up_nobody() {
    scene(|scene, sink| {
        let stream = connect(scene);
        // The session ends with the first message, and what is behind it is nobody's.
        let bad = header(5, 1, u32::MAX);
        let call = message(FrontendReq::SET_VRING_CALL, &[0; 8]);
        let peer = send_lingering(scene, &stream, &[bad, call].concat());
        // It has been told, whoever closes what.
        wait_for("the end", || is_cut_off(&stream));
        nobody_waits(scene, sink);
        drop(peer);
    });
}

/// Two frontends that are refused beside the victim's, each with a descriptor that cannot be
/// closed, and more of them than may wait to be closed: not all are let in. Nothing is closed until
/// what this returns is.
fn refusals(scene: &Scene) -> (Vec<TcpStream>, Vec<UnixStream>) {
    let call = message(FrontendReq::SET_VRING_CALL, &[0; 8]);
    // One crowds the other out.
    scene.daemon.freeze();
    let seconds = [(); 2].map(|()| connect(scene));
    let peers = seconds.each_ref().map(|second| {
        let (socket, peer) = lingering();
        second
            .send_with_fds(&[&call[..]], &[socket.as_raw_fd()])
            .unwrap();
        peer
    });
    scene.daemon.thaw();
    wait_for("the refusals", || seconds.iter().all(is_cut_off));
    let crowd: Vec<UnixStream> = (0..60).map(|_| connect(scene)).collect();
    let refused = || crowd.iter().filter(|one| is_cut_off(one)).count();
    wait_for("the crowd", || refused() >= 12);
    (peers.into(), crowd)
}

#[test]
fn a_descriptor_that_cannot_be_closed_of_a_frontend_that_is_refused_holds_up_nobody() {
    with_victim(GuestOptions::default(), |scene, guest, sink| {
        let begun = Instant::now();
        let held = Holdings::of(&scene.daemon).fds;
        let (peers, crowd) = refusals(scene);
        scene.bystanders.go_on(200);
        let now = Holdings::of(&scene.daemon).fds;
        assert!(now <= held + 24, "{now} descriptors, before it were {held}");
        scene.daemon.assert_logged("a second frontend was refused");
        // Those of other ports are refused as ever.
        let other = UnixStream::connect(&scene.daemon.sockets()[3]).unwrap();
        wait_for("the refusal", || is_cut_off(&other));
        assert_eq!(scene.daemon.state(VICTIM).0, "running");
        scene.passes(guest, sink, 1);
        scene.reaches(guest, sink, 2);
        assert!(begun.elapsed() < LINGER / 2, "{:?}", begun.elapsed());
        drop((peers, crowd));
        wait_for("the descriptors to be closed", || {
            Holdings::of(&scene.daemon).fds <= held
        });
    });
}

#[test]
fn frontends_that_wait_at_a_port_that_is_removed_are_hung_up_on_whatever_cannot_be_closed() {
    scene(|scene, sink| {
        let ram = Ram::new(GuestOptions::default());
        let mut guest = Guest::new(&ram);
        scene.attach_victim(&mut guest, sink);
        let (peers, crowd) = refusals(scene);
        assert!(!crowd.iter().all(is_cut_off), "all were let in");
        nobody_waits(scene, sink);
        wait_for("the hang-ups", || crowd.iter().all(is_cut_off));
        drop((peers, guest));
    });
}
