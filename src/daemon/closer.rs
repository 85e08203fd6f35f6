//! Closes sockets that nobody has read to their end, on a thread of its own.
//!
//! Closing a socket also closes the descriptors in its unread messages. These descriptors can be
//! lingering sockets or files on FUSE, so closing them takes as long as their sender likes. A
//! session reads its socket to the end before it ends, and only its own port waits. Sockets that
//! never had a session come here. Their frontends see a hang-up at once. The thread may block for
//! any time, control may not.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam_channel::{Sender, unbounded};
use rustix::net::{Shutdown, shutdown};

use crate::sys::thread;

/// Most sockets of one port that may wait to be closed. Beyond that the port leaves further
/// frontends in the backlog instead of refusing them. Each waiting socket holds a descriptor.
const MOST: usize = 16;
/// Most waiting sockets of all ports together, including removed ports.
const ALL: usize = 256;

/// Counts the sockets of one port that wait to be closed. A socket that cannot be closed delays all
/// sockets behind it, of any port. Its own port soon stops adding sockets. The frontends of other
/// ports are still hung up on at once.
#[derive(Debug, Default)]
pub(super) struct Unclosed(Arc<()>);

impl Unclosed {
    /// Whether so many sockets of this port wait that no more should be added.
    fn are_many(&self) -> bool {
        // One reference is `self`'s. Each waiting socket holds one more.
        Arc::strong_count(&self.0) > MOST
    }
}

/// The sockets of a removed port, and their count.
pub(super) type Leftover = (Vec<OwnedFd>, Unclosed);

/// A socket, and the reference that counts it.
type Counted = (OwnedFd, Arc<()>);

/// Sends sockets to the thread that closes. The thread ends after this is dropped and all sockets
/// are closed.
#[derive(Debug)]
pub(super) struct Closer(Sender<Counted>);

impl Closer {
    /// Starts the thread. Nobody joins the thread, because it may be stuck in a close.
    pub(super) fn start() -> io::Result<Self> {
        let (sender, sockets) = unbounded::<Counted>();
        thread::spawn("closer", move || sockets.iter().for_each(drop))?;
        Ok(Closer(sender))
    }

    /// How many more sockets may be added, of all ports together.
    pub(super) fn room(&self) -> usize {
        ALL.saturating_sub(self.0.len())
    }

    /// Whether another socket may be added for the port that `unclosed` counts.
    pub(super) fn has_room(&self, unclosed: &Unclosed) -> bool {
        !unclosed.are_many() && self.room() > 0
    }

    /// Hangs up now, and leaves the close to the thread. `unclosed` is the count of the socket's
    /// port.
    pub(super) fn close(&self, socket: impl Into<OwnedFd>, unclosed: &Unclosed) {
        let socket = socket.into();
        // Shutdown fails only if the peer has already gone.
        let _ = shutdown(&socket, Shutdown::Both);
        // Send cannot fail: the thread lives as long as this sender.
        let _ = self.0.send((socket, unclosed.0.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::Receiver;
    use std::os::unix::net::UnixStream;

    /// A closer whose receiver the test holds, so that nothing is closed.
    fn stuck() -> (Closer, Receiver<Counted>) {
        let (sender, sockets) = unbounded();
        (Closer(sender), sockets)
    }

    #[test]
    fn each_ports_sockets_are_counted_until_they_are_closed() {
        let (closer, sockets) = stuck();
        let [one, other] = [(); 2].map(|()| Unclosed::default());
        let mut peers = Vec::new();
        for count in 0..MOST {
            assert!(closer.has_room(&one), "{count}");
            let (ours, theirs) = UnixStream::pair().unwrap();
            closer.close(ours, &one);
            peers.push(theirs);
        }
        assert!(!closer.has_room(&one) && closer.has_room(&other));
        // All peers still see the hang-up.
        for peer in &peers {
            assert_eq!(std::io::Read::read(&mut &*peer, &mut [0]).unwrap(), 0);
        }
        drop(sockets.recv().unwrap());
        assert!(closer.has_room(&one));
        // All ports together have a limit, too.
        for _ in sockets.len()..ALL {
            assert!(closer.has_room(&other));
            let (ours, _) = UnixStream::pair().unwrap();
            closer.close(ours, &Unclosed::default());
        }
        assert!(!closer.has_room(&other));
    }
}
