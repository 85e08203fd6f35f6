//! Messages of the vhost-user protocol on a stream, from the frontend's side.
//!
//! Not `vhost::vhost_user::Frontend`: that one retries for ever when a receive times out, so that a
//! silent backend would hang the client, and its SET_VRING_BASE has 16 bits where packed rings need
//! 32 bits. Request numbers and message bodies are the crate's.

use std::io::{self, Read};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Header: request, flags, size of the body; 32 bits each.
const HEADER_SIZE: usize = 12;
/// Protocol version in the flags.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// Longest body of any reply.
const MAX_REPLY: usize = 4096;

/// Why a conversation with a backend ended.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// No answer within the time given.
    #[error("it does not answer {0:?}; it is silent or busy with another client")]
    Silent(FrontendReq),
    /// The connection is gone.
    #[error("it closed the connection at {0:?}; it may serve another client, or refuse this one")]
    Closed(FrontendReq),
    /// What came is no vhost-user message.
    #[error("it answered {0:?} with something that is not vhost-user")]
    NotVhostUser(FrontendReq),
    /// The backend acknowledged with an error code.
    #[error("it refused {request:?} with code {code}")]
    Refused {
        /// The request.
        request: FrontendReq,
        /// The backend's answer.
        code: u64,
    },
    /// The socket failed.
    #[error("the socket failed at {0:?}")]
    Socket(FrontendReq, #[source] io::Error),
}

/// Sends one message; `fds` go with it.
pub(super) fn send(
    stream: &UnixStream,
    request: FrontendReq,
    need_reply: bool,
    body: &[u8],
    fds: &[RawFd],
) -> Result<(), WireError> {
    let flags = VERSION | if need_reply { NEED_REPLY } else { 0 };
    let mut message = Vec::with_capacity(HEADER_SIZE + body.len());
    for word in [u32::from(request), flags, body.len() as u32] {
        message.extend_from_slice(&word.to_le_bytes());
    }
    message.extend_from_slice(body);
    let sent = stream
        .send_with_fds(&[&message[..]], fds)
        .map_err(|error| failed(request, error.into()))?;
    // A socket buffer holds many such messages; one that takes half of one is not being read at
    // all.
    if sent < message.len() {
        return Err(WireError::Silent(request));
    }
    Ok(())
}

/// Receives the answer to `request` into the time-out of the stream.
pub(super) fn receive(mut stream: &UnixStream, request: FrontendReq) -> Result<Vec<u8>, WireError> {
    let mut header = [0; HEADER_SIZE];
    stream
        .read_exact(&mut header)
        .map_err(|error| failed(request, error))?;
    let word = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let (code, flags, size) = (word(0), word(4), word(8) as usize);
    let expected = code == u32::from(request) && flags & VERSION_MASK == VERSION;
    if !expected || flags & REPLY == 0 || size > MAX_REPLY {
        return Err(WireError::NotVhostUser(request));
    }
    let mut body = vec![0; size];
    stream
        .read_exact(&mut body)
        .map_err(|error| failed(request, error))?;
    Ok(body)
}

fn failed(request: FrontendReq, error: io::Error) -> WireError {
    use io::ErrorKind::{
        BrokenPipe, ConnectionReset, NotConnected, TimedOut, UnexpectedEof, WouldBlock,
    };
    match error.kind() {
        WouldBlock | TimedOut => WireError::Silent(request),
        UnexpectedEof | BrokenPipe | ConnectionReset | NotConnected => WireError::Closed(request),
        _ => WireError::Socket(request, error),
    }
}
