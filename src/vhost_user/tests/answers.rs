//! Every message that asks for an answer gets one, or the session ends: a frontend waits for it
//! without a deadline.

use std::io::ErrorKind;

use super::*;

/// Numbers of messages: all that have a name, and some more.
const REQUESTS: std::ops::Range<u32> = 0..50;
/// Sizes of bodies: none, a number, more, and a region, which is also a table of one.
const SIZES: [usize; 5] = [0, 8, 12, 20, 40];

/// Where a message has descriptors.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Files {
    None,
    Header(usize),
    Body(usize),
}

const PLACES: [Files; 7] = [
    Files::None,
    Files::Header(1),
    Files::Header(2),
    Files::Header(33),
    Files::Body(1),
    Files::Body(2),
    Files::Body(33),
];

/// What comes back: a header and as many bytes as it says; `None` where the session has ended.
fn answer(stream: &UnixStream, what: &str) -> Option<(u32, u32)> {
    let mut header = [0; 12];
    match (&*stream).read_exact(&mut header) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            panic!("{what}: no answer, and the session goes on")
        }
        Err(_) => return None,
    }
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut body = vec![0; word(8) as usize];
    (&*stream).read_exact(&mut body).unwrap();
    Some((word(0), word(4)))
}

/// Sends the message, and checks that it is answered or ends the session; then whatever it was,
/// that the session still knows where a message begins.
fn check(request: u32, size: usize, files: Files, flags: u32, file: RawFd) {
    let what = format!("request {request} of {size} bytes, {files:?}, flags {flags:#x}");
    let mut peer = Peer::new();
    let limit = Some(Duration::from_secs(10));
    peer.stream.set_read_timeout(limit).unwrap();
    let features = peer.negotiate();
    peer.frontend.set_features(features).unwrap();
    let header = [request, 1 | flags, size as u32]
        .map(u32::to_ne_bytes)
        .concat();
    let mut body = vec![0; size];
    if size == 40 {
        body = [1, 0, 4096, USER, 0].map(u64::to_ne_bytes).concat();
    }
    if request == FrontendReq::SET_PROTOCOL_FEATURES as u32 && size == 8 {
        // Or nothing would be answered from here on.
        let kept = Protocol::REPLY_ACK | Protocol::MQ;
        body = kept.bits().to_ne_bytes().to_vec();
    }
    let send = |bytes: &[u8], count: usize| {
        let files = vec![file; count];
        // It may have ended already.
        let _ = peer.stream.send_with_fds(&[bytes], &files);
    };
    match files {
        Files::None => send(&[header, body].concat(), 0),
        Files::Header(count) => send(&[header, body].concat(), count),
        Files::Body(count) => {
            send(&header, 0);
            send(&body, count);
        }
    }
    let answers = flags & NEED_REPLY != 0;
    if answers {
        match answer(&peer.stream, &what) {
            Some((code, flags)) => assert_eq!((code, flags), (request, 5), "{what}"),
            None => return,
        }
    }
    let _ = (&peer.stream).write_all(&[17, 1, 0].map(u32::to_ne_bytes).concat());
    // Those that are answered with a value are so without being asked.
    loop {
        match answer(&peer.stream, &what) {
            Some((code, _)) if code == request && code != 17 => {}
            Some((code, _)) => return assert_eq!(code, 17, "{what}"),
            None => return,
        }
    }
}

#[test]
fn every_message_that_asks_for_an_answer_gets_one_or_ends_the_session() {
    let file = memfd::create("vu-answers", 4096).unwrap();
    for request in REQUESTS {
        for size in SIZES {
            for files in PLACES {
                if size == 0 && matches!(files, Files::Body(_)) {
                    continue;
                }
                for flags in [0, NEED_REPLY] {
                    check(request, size, files, flags, file.as_raw_fd());
                }
            }
        }
    }
    assert_eq!(descriptors("vu-answers"), 1);
}
