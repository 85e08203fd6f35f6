//! Closing what control must not close: sockets that nobody has read to their end.
//!
//! Descriptors in an unread message are closed with the socket, by the thread that closes the
//! socket. That may take as long as their sender likes: they can be sockets that linger, or files
//! on FUSE. A session reads to the end of its socket before it ends, and only its own port waits.
//! Sockets that no session had come here, to a thread of their own. Their frontends are hung up on
//! at once; the thread may take as long as it must.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam_channel::{Sender, unbounded};
use rustix::net::{Shutdown, shutdown};

use crate::sys::thread;

/// Sockets of one port that may wait to be closed before its frontends wait that would be refused:
/// each holds a descriptor, as a ring's kick and call do.
const MOST: usize = 16;
/// The same of all ports, and of ports that have gone.
const ALL: usize = 256;

/// Counts the sockets of a port that wait to be closed. One that cannot be closed holds up all
/// behind it, of whatever port; but its own port's next ones soon wait outside, and the others' are
/// hung up on at once all the same.
#[derive(Debug, Default)]
pub(super) struct Unclosed(Arc<()>);

impl Unclosed {
    /// Something takes so long to close that no more of this port should come.
    fn are_many(&self) -> bool {
        // One is ours, and one goes with each socket.
        Arc::strong_count(&self.0) > MOST
    }
}

/// Sockets of a port that has been removed, and its count.
pub(super) type Leftover = (Vec<OwnedFd>, Unclosed);

/// A socket, and its part in the count.
type Counted = (OwnedFd, Arc<()>);

/// The way to the thread that closes; it ends when this has gone and everything is closed.
#[derive(Debug)]
pub(super) struct Closer(Sender<Counted>);

impl Closer {
    /// Starts the thread. Nobody joins it: it may be stuck.
    pub(super) fn start() -> io::Result<Self> {
        let (sender, sockets) = unbounded::<Counted>();
        thread::spawn("closer", move || sockets.iter().for_each(drop))?;
        Ok(Closer(sender))
    }

    /// How many sockets more should come of all ports together.
    pub(super) fn room(&self) -> usize {
        ALL.saturating_sub(self.0.len())
    }

    /// Whether another socket of the port those are of may come.
    pub(super) fn has_room(&self, unclosed: &Unclosed) -> bool {
        !unclosed.are_many() && self.room() > 0
    }

    /// Hangs up now, and closes some time; `unclosed` are those of the same port.
    pub(super) fn close(&self, socket: impl Into<OwnedFd>, unclosed: &Unclosed) {
        let socket = socket.into();
        // Fails only where the peer has gone already.
        let _ = shutdown(&socket, Shutdown::Both);
        // The thread outlives its sender.
        let _ = self.0.send((socket, unclosed.0.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::Receiver;
    use std::os::unix::net::UnixStream;

    /// A closer whose thread is the test.
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
        // They have been hung up on all the same.
        for peer in &peers {
            assert_eq!(std::io::Read::read(&mut &*peer, &mut [0]).unwrap(), 0);
        }
        drop(sockets.recv().unwrap());
        assert!(closer.has_room(&one));
        // All together have an end, too.
        for _ in sockets.len()..ALL {
            assert!(closer.has_room(&other));
            let (ours, _) = UnixStream::pair().unwrap();
            closer.close(ours, &Unclosed::default());
        }
        assert!(!closer.has_room(&other));
    }
}
