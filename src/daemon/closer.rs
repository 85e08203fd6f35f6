//! Closing what control must not close: sockets that nobody has read to their end.
//!
//! Descriptors in a message that was not read are closed with the socket, by whoever closes it, and that may take as
//! long as their sender likes: they can be sockets that linger, or files on FUSE. A session reads to the end of its
//! socket before it ends, and only its own port waits. Sockets that no session had come here, to a thread of their own.
//! Their frontends are hung up on at once; that thread may take as long as it must.

use std::io;
use std::os::fd::OwnedFd;

use crossbeam_channel::{Sender, unbounded};
use rustix::net::{Shutdown, shutdown};

/// Sockets that may wait to be closed before frontends wait that would be refused: each holds a descriptor.
const MOST: usize = 32;

/// The way to the thread that closes; it ends when this has gone and everything is closed.
#[derive(Debug)]
pub(super) struct Closer(Sender<OwnedFd>);

impl Closer {
    /// Starts the thread. Nobody joins it: it may be stuck.
    pub(super) fn start() -> io::Result<Self> {
        let (sender, sockets) = unbounded::<OwnedFd>();
        std::thread::Builder::new()
            .name("closer".to_string())
            .spawn(move || sockets.iter().for_each(drop))?;
        Ok(Closer(sender))
    }

    /// Hangs up now, and closes some time.
    pub(super) fn close(&self, socket: impl Into<OwnedFd>) {
        let socket = socket.into();
        // Fails only where the peer has gone already.
        let _ = shutdown(&socket, Shutdown::Both);
        // The thread outlives its sender.
        let _ = self.0.send(socket);
    }

    /// Something takes so long to close that no more should come.
    pub(super) fn is_behind(&self) -> bool {
        self.0.len() >= MOST
    }
}
