//! File descriptors beside messages: which are taken, and that all others are closed.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, UCred, sendmsg};
use rustix::process::{getgid, getpid, getuid};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;

const NOTIFICATIONS: [FrontendReq; 3] = [
    FrontendReq::SET_VRING_KICK,
    FrontendReq::SET_VRING_CALL,
    FrontendReq::SET_VRING_ERR,
];
/// In place of a descriptor: there is none.
const NO_DESCRIPTOR: u64 = 1 << 8;

#[test]
fn only_eventfds_are_taken() {
    let mut peer = Peer::new();
    peer.negotiate();
    let (reader, _writer) = std::io::pipe().unwrap();
    // The crate's frontend sends only its eventfd type, so one is turned into a pipe.
    let disguised = EventFd::new(0).unwrap();
    let number = disguised.as_raw_fd();
    assert_eq!(
        crate::sys::eventfd::dup_over(reader.as_raw_fd(), number),
        number
    );
    assert!(peer.frontend.set_vring_call(0, &disguised).is_err());
    assert!(peer.frontend.set_vring_kick(0, &disguised).is_err());
    assert!(peer.frontend.set_vring_err(0, &disguised).is_ok());
    assert!(peer.said("only eventfds are taken"));
    peer.leave();
}

#[test]
fn descriptors_of_rings_that_are_none_are_refused() {
    for request in [FrontendReq::SET_VRING_KICK, FrontendReq::SET_VRING_CALL] {
        let mut peer = Peer::new();
        peer.negotiate();
        for index in [7_u64, 8, 0xff] {
            // Bit 8: there is no descriptor.
            peer.send(request as u32, NEED_REPLY, &(index | 1 << 8).to_ne_bytes());
            assert_eq!(peer.reply(), Some(1), "{request:?} {index}");
        }
        assert!(peer.frontend.get_features().is_ok());
        peer.leave();
    }
}

#[test]
fn descriptors_where_none_belong() {
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;
    let file = memfd::create("vu-stray", 8).unwrap();
    let header = |request: u32, size: u32| [request, 1, size].map(u32::to_ne_bytes).concat();
    let enable = [header(18, 8), vec![0; 8]].concat();
    for (bytes, why) in [
        // The crate refuses, the session refuses, nobody knows it.
        (header(1, 0), "GET_FEATURES: invalid message"),
        (enable, "SET_VRING_ENABLE is not supported"),
        (header(99, 0), "request 99 is not supported"),
    ] {
        let peer = Peer::new();
        peer.stream
            .send_with_fd(&bytes[..], file.as_raw_fd())
            .unwrap();
        assert!(peer.refused().contains(why));
    }
    // Inside a header, and inside a body.
    let peer = Peer::new();
    peer.stream
        .send_with_fd(&header(5, 8)[..3], file.as_raw_fd())
        .unwrap();
    (&peer.stream).write_all(&header(5, 8)[3..]).unwrap();
    assert!(peer.refused().contains("split by file descriptors"));
    let peer = Peer::new();
    (&peer.stream).write_all(&header(2, 8)).unwrap();
    peer.stream
        .send_with_fd(&[0; 4][..], file.as_raw_fd())
        .unwrap();
    (&peer.stream).write_all(&[0; 4]).unwrap();
    peer.refused();
    // More than a message may have, and just as many as it may.
    for (count, why) in [
        (253, "more than 32 file descriptors"),
        (33, "more than 32 file descriptors"),
        (32, "invalid message"),
    ] {
        let peer = Peer::new();
        let many = vec![file.as_raw_fd(); count];
        let message = [header(5, 8), vec![0; 8]].concat();
        peer.stream.send_with_fds(&[&message[..]], &many).unwrap();
        assert!(peer.refused().contains(why), "{count}");
    }
    assert_eq!(descriptors("vu-stray"), 1);
}

#[test]
fn a_notification_says_truly_whether_a_descriptor_comes_with_it() {
    let event = EventFd::new(0).unwrap();
    for request in NOTIFICATIONS {
        for (word, files) in [(0, 0), (0, 2), (NO_DESCRIPTOR, 1)] {
            let mut peer = Peer::new();
            peer.negotiate();
            let files = vec![event.as_raw_fd(); files];
            peer.send_with(request, NEED_REPLY, &word.to_ne_bytes(), &files);
            let why = peer.refused();
            assert!(
                why.contains(&format!("{request:?}: invalid message")),
                "{word:#x}, {} files: {why}",
                files.len()
            );
            assert_eq!(descriptors(&id_of(&event)), 1);
        }
        let mut peer = Peer::new();
        peer.negotiate();
        for (word, files) in [(NO_DESCRIPTOR, &[][..]), (0, &[event.as_raw_fd()])] {
            peer.send_with(request, NEED_REPLY, &word.to_ne_bytes(), files);
            assert_eq!(peer.reply(), Some(0), "{request:?} {word:#x}");
        }
        peer.leave();
    }
}

#[test]
fn only_notifications_stay_open_and_are_closed_on_exec() {
    for packed in [false, true] {
        let mut peer = Peer::up(packed);
        peer.memory = memfd::create("vu-kept", 2 * SIZE).unwrap();
        peer.share_memory();
        let extra = peer.region(4 * SIZE, SIZE, SIZE);
        peer.frontend.add_mem_region(&extra).unwrap();
        // Ours, while the session has it mapped.
        assert_eq!(descriptors("vu-kept"), 1);
        assert!(peer.started(0) && mappings("vu-kept") > 0);
        for event in [0, 1, 8, 9].map(|at| &peer.calls[at]) {
            let infos = descriptor_infos(&id_of(event));
            // Ours, made without that flag; and the session's.
            let kept_over_exec = infos.iter().filter(|info| {
                let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
                let flags = u32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
                flags & rustix::fs::OFlags::CLOEXEC.bits() == 0
            });
            assert_eq!((infos.len(), kept_over_exec.count()), (2, 1));
        }
        peer.leave();
    }
}

#[test]
fn descriptors_that_are_replaced_are_closed_while_the_session_goes_on() {
    for packed in [false, true] {
        let mut peer = Peer::up(packed);
        let mut last = vec![std::mem::take(&mut peer.calls)];
        for turn in 0..300 {
            let events = [0, 1].map(|_| EventFd::new(0).unwrap());
            for ring in 0..2 {
                peer.frontend.set_vring_call(ring, &events[0]).unwrap();
                peer.frontend.set_vring_err(ring, &events[0]).unwrap();
                peer.frontend.set_vring_kick(ring, &events[1]).unwrap();
            }
            // Of each of the new ones ours and one a ring, of those before ours alone.
            let expected = last.iter().flatten().map(|event| (event, 1));
            for (event, count) in expected.chain(events.iter().map(|event| (event, 3))) {
                assert_eq!(descriptors(&id_of(event)), count, "{turn}");
            }
            last = vec![events.into()];
            assert!(peer.started(0) && peer.started(1));
        }
        peer.leave();
        for event in last.iter().flatten() {
            assert_eq!(descriptors(&id_of(event)), 1);
        }
    }
}

/// A channel of our own, in-flight memory, a dirty log, migration.
#[test]
fn descriptors_of_features_that_are_not_offered_are_closed() {
    let (socket, file) = (
        UnixStream::pair().unwrap().0,
        memfd::create("vu-not-offered", 4096).unwrap(),
    );
    for (request, size) in [
        (FrontendReq::SET_BACKEND_REQ_FD, 8),
        (FrontendReq::GPU_SET_SOCKET, 0),
        (FrontendReq::SET_INFLIGHT_FD, 20),
        (FrontendReq::SET_LOG_BASE, 16),
        (FrontendReq::SET_LOG_FD, 8),
    ] {
        for descriptor in [socket.as_raw_fd(), file.as_raw_fd()] {
            let mut peer = Peer::new();
            peer.negotiate();
            peer.send_with(request, 0, &vec![0; size], &[descriptor]);
            let why = peer.refused();
            assert!(why.contains(&format!("{request:?}")), "{why}");
            assert_eq!(descriptors("vu-not-offered"), 1, "{request:?}");
        }
    }
    // This one has an answer that says no.
    let mut peer = Peer::new();
    peer.negotiate();
    let request = FrontendReq::SET_DEVICE_STATE_FD;
    peer.send_with(request, 0, &[0; 8], &[file.as_raw_fd()]);
    assert_ne!(peer.reply().unwrap() & 0xff, 0);
    assert_eq!(peer.queue_num(), Some(3));
    assert_eq!(descriptors("vu-not-offered"), 1);
    peer.leave();
}

/// A message with several control messages: one a file, and credentials in front or behind.
fn send_control(peer: &Peer, message: &[u8], files: &[&dyn AsFd], credentials: [bool; 2]) {
    let mut space = [MaybeUninit::uninit();
        rustix::cmsg_space!(
            ScmRights(1),
            ScmRights(1),
            ScmCredentials(1),
            ScmCredentials(1)
        )];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let own = || {
        SendAncillaryMessage::ScmCredentials(UCred {
            pid: getpid(),
            uid: getuid(),
            gid: getgid(),
        })
    };
    let files: Vec<_> = files.iter().map(|file| [file.as_fd()]).collect();
    assert!(!credentials[0] || control.push(own()));
    for file in &files {
        assert!(control.push(SendAncillaryMessage::ScmRights(file)));
    }
    assert!(!credentials[1] || control.push(own()));
    let bytes = [IoSlice::new(message)];
    let sent = sendmsg(&peer.stream, &bytes, &mut control, SendFlags::NOSIGNAL);
    assert_eq!(sent, Ok(message.len()));
}

#[test]
fn several_control_messages_are_one_message_with_all_their_descriptors() {
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let message = |request: FrontendReq, body: &[u8]| {
        let header = [request as u32, 1 | NEED_REPLY, body.len() as u32];
        [&header.map(u32::to_ne_bytes).concat(), body].concat()
    };
    let call = message(FrontendReq::SET_VRING_CALL, &0_u64.to_ne_bytes());
    let owner = message(FrontendReq::SET_OWNER, &[]);
    for credentials in [[true, false], [false, true], [true, true]] {
        let mut peer = Peer::new();
        peer.negotiate();
        // Credentials alone are nothing that a message could have too much of.
        send_control(&peer, &owner, &[], credentials);
        assert_eq!(peer.reply(), Some(0));
        send_control(&peer, &call, &[&event], credentials);
        assert_eq!(peer.reply(), Some(0));
        assert_eq!(descriptors(&id_of(&event)), 2);
        // Two are one too many however they come.
        send_control(&peer, &call, &[&event, &event], credentials);
        assert!(peer.refused().contains("SET_VRING_CALL: invalid message"));
        assert_eq!(descriptors(&id_of(&event)), 1);
    }
    let regions = [[0, SIZE, USER, 0], [SIZE, SIZE, USER + SIZE, SIZE]];
    let words = [2].into_iter().chain(regions.into_iter().flatten());
    let table: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
    let mut peer = Peer::new();
    peer.memory = memfd::create("vu-control", 2 * SIZE).unwrap();
    peer.negotiate();
    let table = message(FrontendReq::SET_MEM_TABLE, &table);
    let files: [&dyn AsFd; 2] = [&peer.memory, &peer.memory];
    send_control(&peer, &table, &files, [true, false]);
    assert_eq!(peer.reply(), Some(0));
    assert_eq!(peer.status.snapshot().memory_regions, 2);
    assert_eq!(descriptors("vu-control"), 1);
    peer.leave();
}

/// Waits for calls of a descriptor that does not block; their number.
fn called(call: &EventFd) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Ok(calls) = call.read() {
            return calls;
        }
        assert!(Instant::now() < deadline, "nobody was called");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_ring_that_starts_is_called_once_whatever_poll_threads_do() {
    let mut peer = Peer::with_memory(SessionOptions::new(1), false);
    peer.sink.late.store(true, Ordering::SeqCst);
    peer.calls[0] = EventFd::new(EFD_NONBLOCK).unwrap();
    peer.start_ring(0, 0);
    assert!(peer.started(0));
    assert_eq!(called(&peer.calls[0]), 1);
    // A session makes its calls before it answers another message.
    assert!(peer.queue_num().is_some());
    assert!(peer.calls[0].read().is_err());
    peer.leave();
}

#[test]
fn a_call_descriptor_of_a_running_ring_is_called_once_nobody_uses_the_one_before() {
    let peer = Peer::up(false);
    for _ in 0..2 {
        peer.sink.late.store(true, Ordering::SeqCst);
        let call = EventFd::new(EFD_NONBLOCK).unwrap();
        peer.frontend.set_vring_call(0, &call).unwrap();
        assert!(peer.queue_num().is_some());
        assert!(call.read().is_err(), "another one may be called still");
        peer.sink.late.store(false, Ordering::SeqCst);
        assert_eq!(called(&call), 1);
        assert!(peer.queue_num().is_some());
        assert!(call.read().is_err());
    }
    peer.leave();
}
