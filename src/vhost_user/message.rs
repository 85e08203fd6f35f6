//! Messages before the crate sees them.
//!
//! The crate reads a header and then a body with one call each, and takes half a body for an error.
//! So each header is peeked at first, and nothing is read before the whole message has arrived. The
//! message must arrive within a deadline from its first byte on. Between messages a frontend may be
//! silent for ever. A message that the crate does not know is read here. Reading it without room
//! for descriptors makes the kernel close those that came with it.

use std::io::{ErrorKind, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use vhost::vhost_user::message::{MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserHeaderFlag};

use super::error::{Request, SessionError};
use crate::sys::wake::Wake;

/// Bytes of a header: request, flags, size.
pub(super) const HEADER: usize = 12;
/// How often the session looks again at a message that has arrived in part. There is no event for
/// "more bytes have come".
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// The only protocol version that exists.
const VERSION: u32 = 1;

/// A message whose header was looked at and which has arrived completely.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrived {
    pub(super) request: Request,
    flags: u32,
    pub(super) size: u32,
    /// Whether the message carries file descriptors. Always false if the sender wrote more than
    /// this message at once: then it is unknown.
    pub(super) has_files: bool,
}

impl Arrived {
    pub(super) fn needs_reply(&self) -> bool {
        self.flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0
    }

    fn len(&self) -> usize {
        HEADER + self.size as usize
    }

    fn parse(header: &[u8]) -> Result<Self, SessionError> {
        let word = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let (request, flags, size) = (Request(word(0)), word(4), word(8));
        if flags & !VhostUserHeaderFlag::NEED_REPLY.bits() != VERSION {
            return Err(SessionError::HeaderFlags(flags));
        }
        if size as usize > MAX_MSG_SIZE {
            return Err(SessionError::Oversized {
                request,
                size,
                max: MAX_MSG_SIZE,
            });
        }
        Ok(Arrived {
            request,
            flags,
            size,
            has_files: false,
        })
    }
}

/// Why `wait` has returned.
pub(super) enum Waited {
    /// A complete message.
    Message(Arrived),
    /// No byte came for the time `idle`.
    Idle,
    /// The bell was rung.
    Bell,
    /// The driver may have commanded something.
    Kick,
}

/// Waits for the next message, for the bell or for a kick. With `idle`, returns after that time at
/// the latest, unless a message has begun. A message that has begun must be complete within
/// `deadline`.
pub(super) fn wait(
    stream: &UnixStream,
    bell: &Wake,
    kick: Option<BorrowedFd<'_>>,
    idle: Option<Duration>,
    deadline: Duration,
) -> Result<Waited, SessionError> {
    match first_ready(stream, bell, kick, idle)? {
        None => return Ok(Waited::Idle),
        Some(Ready::Bell) => return Ok(Waited::Bell),
        Some(Ready::Kick) => return Ok(Waited::Kick),
        Some(Ready::Stream) => {}
    }
    let begun = Instant::now();
    let (mut arrived, may_have_files) = loop {
        let mut header = [0; HEADER];
        // No room for descriptors: a peek then leaves them with the message.
        let nowhere = &mut RecvAncillaryBuffer::default();
        let (bytes, truncated) = peek(stream, &mut header, nowhere)?;
        match bytes {
            0 => return Err(SessionError::Disconnected),
            HEADER => break (Arrived::parse(&header)?, truncated),
            // A peek ends after the bytes that carry descriptors, even if more bytes follow. So
            // this header was sent in two parts.
            _ if truncated && queued(stream)? >= HEADER => return Err(SessionError::SplitHeader),
            _ => wait_for_more(stream, begun, deadline, bytes)?,
        }
    };
    loop {
        let queued = queued(stream)?;
        if queued >= arrived.len() {
            arrived.has_files = may_have_files && own_files(stream, arrived.len())?;
            return Ok(Waited::Message(arrived));
        }
        wait_for_more(stream, begun, deadline, queued)?;
    }
}

/// Waits until a reply can be sent without blocking. The kernel calls a socket writable while at
/// most a quarter of its buffer is in use. Every reply is shorter than the rest.
pub(super) fn wait_writable(stream: &UnixStream, deadline: Duration) -> Result<(), SessionError> {
    if ready(stream, PollFlags::OUT, Some(deadline))? {
        Ok(())
    } else {
        Err(SessionError::NotReading {
            seconds: deadline.as_secs(),
        })
    }
}

/// Reads a message that has arrived, and returns its body. Reading without room for descriptors
/// makes the kernel close them.
pub(super) fn take(mut stream: &UnixStream, arrived: &Arrived) -> Result<Vec<u8>, SessionError> {
    let mut bytes = vec![0; arrived.len()];
    stream.read_exact(&mut bytes)?;
    Ok(bytes.split_off(HEADER))
}

/// Ends the conversation. Reads and drops what is left, so that this thread closes the descriptors
/// in it. Otherwise the last thread to close the socket would close them. Closing a descriptor
/// takes as long as its sender likes: it can be a socket that lingers, or a file on FUSE.
pub(super) fn discard(mut stream: &UnixStream) {
    // Fails only if the peer has gone already. Nothing arrives after this.
    let _ = stream.shutdown(Shutdown::Both);
    let mut bytes = [0; 1024];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Acknowledges a message that the crate does not see: 0 for success.
pub(super) fn acknowledge(
    mut stream: &UnixStream,
    arrived: &Arrived,
    value: u64,
) -> Result<(), SessionError> {
    let mut bytes = Vec::with_capacity(HEADER + 8);
    let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
    for word in [arrived.request.0, flags, 8] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(&value.to_ne_bytes());
    Ok(stream.write_all(&bytes)?)
}

/// What the session does first. The bell goes before messages: otherwise a frontend that sends
/// without pause would have no calls. A kick goes after messages: a driver must not keep its
/// frontend waiting.
enum Ready {
    Bell,
    Kick,
    Stream,
}

fn first_ready(
    stream: &UnixStream,
    bell: &Wake,
    kick: Option<BorrowedFd<'_>>,
    timeout: Option<Duration>,
) -> Result<Option<Ready>, SessionError> {
    let mut fds = [
        PollFd::new(bell, PollFlags::IN),
        PollFd::new(stream, PollFlags::IN),
        // Without a kick, the stream takes its place in the array.
        PollFd::from_borrowed_fd(kick.unwrap_or(stream.as_fd()), PollFlags::IN),
    ];
    let count = poll_for(&mut fds, timeout)?;
    Ok(match count {
        0 => None,
        _ if bell.drain() => Some(Ready::Bell),
        _ if fds[1].revents().is_empty() && kick.is_some() => Some(Ready::Kick),
        _ => Some(Ready::Stream),
    })
}

/// Polls for one event. Returns false when the time is over. Errors and hang-ups count as events:
/// the next call on the stream reports them.
fn ready(
    stream: &UnixStream,
    events: PollFlags,
    timeout: Option<Duration>,
) -> Result<bool, SessionError> {
    Ok(poll_for(&mut [PollFd::new(stream, events)], timeout)? > 0)
}

fn poll_for(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> Result<usize, SessionError> {
    let end = timeout.map(|timeout| Instant::now() + timeout);
    loop {
        let left = end.map(|end| timespec(end.saturating_duration_since(Instant::now())));
        match poll(fds, left.as_ref()) {
            Ok(count) => return Ok(count),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(SessionError::io(errno)),
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

/// Sleeps for `LOOK_AGAIN`. Returns an error once the deadline is over, or if the peer has gone
/// without having sent more than `seen` bytes.
fn wait_for_more(
    stream: &UnixStream,
    begun: Instant,
    deadline: Duration,
    seen: usize,
) -> Result<(), SessionError> {
    if begun.elapsed() >= deadline {
        return Err(SessionError::Incomplete {
            seconds: deadline.as_secs(),
        });
    }
    if ready(stream, PollFlags::RDHUP, Some(LOOK_AGAIN))? && queued(stream)? <= seen {
        return Err(SessionError::Disconnected);
    }
    Ok(())
}

/// Returns the number of bytes that have arrived and were not read.
fn queued(stream: &UnixStream) -> Result<usize, SessionError> {
    let bytes = ioctl_fionread(stream).map_err(SessionError::io)?;
    Ok(usize::try_from(bytes).unwrap_or(usize::MAX))
}

/// Whether a message of `len` bytes, which has arrived completely, carries descriptors.
///
/// Refuses more descriptors than the crate has room for: the crate would take the message for not
/// received, and wait for it again. Peeking with room makes copies of the descriptors, which are
/// closed with the buffer.
///
/// A peek goes on into the next message, even if it has all the bytes it asked for. It stops only
/// after bytes that carry descriptors. So the peek asks for one byte more than the message has: if
/// it gets that byte, the descriptors belong to the next message.
fn own_files(stream: &UnixStream, len: usize) -> Result<bool, SessionError> {
    // Room for one more: padding may leave room for one more descriptor than was asked for.
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES + 1))];
    let mut files = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; HEADER + MAX_MSG_SIZE + 1];
    let (seen, truncated) = peek(stream, &mut bytes[..=len], &mut files)?;
    let count: usize = files
        .drain()
        .map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => files.count(),
            _ => 0,
        })
        .sum();
    if truncated || count > MAX_ATTACHED_FD_ENTRIES {
        return Err(SessionError::TooManyFiles {
            max: MAX_ATTACHED_FD_ENTRIES,
        });
    }
    Ok(count > 0 && seen <= len)
}

/// Peeks. Returns the number of bytes seen, and whether `files` had no room for all descriptors
/// that come with them.
fn peek(
    stream: &UnixStream,
    bytes: &mut [u8],
    files: &mut RecvAncillaryBuffer<'_>,
) -> Result<(usize, bool), SessionError> {
    loop {
        let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
        match recvmsg(stream, &mut [IoSliceMut::new(bytes)], files, flags) {
            Ok(message) => return Ok((message.bytes, message.flags.contains(ReturnFlags::CTRUNC))),
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Err(SessionError::Disconnected),
            Err(errno) => return Err(SessionError::io(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use vhost::vhost_user::message::FrontendReq;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    fn message(request: FrontendReq) -> Vec<u8> {
        let header = [request as u32, VERSION, 8].map(u32::to_ne_bytes).concat();
        [header, vec![0; 8]].concat()
    }

    fn next(stream: &UnixStream) -> Arrived {
        let bell = Wake::new().unwrap();
        match wait(stream, &bell, None, None, Duration::from_secs(1)).unwrap() {
            Waited::Message(arrived) => arrived,
            _ => panic!("no message"),
        }
    }

    #[test]
    fn descriptors_of_the_next_message_are_not_this_ones() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let enable = message(FrontendReq::SET_VRING_ENABLE);
        let call = message(FrontendReq::SET_VRING_CALL);
        for _ in 0..2 {
            (&theirs).write_all(&enable).unwrap();
        }
        theirs
            .send_with_fd(&call[..], std::io::stdin().as_raw_fd())
            .unwrap();
        (&theirs).write_all(&enable).unwrap();
        for with_files in [false, false, true, false] {
            let arrived = next(&ours);
            assert_eq!(arrived.has_files, with_files, "{:?}", arrived.request);
            take(&ours, &arrived).unwrap();
        }
    }
}
