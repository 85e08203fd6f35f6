//! Closing what control must not close: sockets that nobody has read to their end.
//!
//! Descriptors in a message that was not read are closed with the socket, by whoever closes it, and that may take as
//! long as their sender likes: they can be sockets that linger, or files on FUSE. A session reads to the end of its
//! socket before it ends, and only its own port waits. Sockets that no session had come here, to a thread of their own.
//! Their frontends are hung up on at once; that thread may take as long as it must.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam_channel::{Sender, unbounded};
use rustix::net::{Shutdown, shutdown};

/// Sockets of one port that may wait to be closed before its frontends wait that would be refused: each holds a
/// descriptor, as a ring's kick and call do.
const MOST: usize = 16;

/// Counts the sockets of a port that wait to be closed, so that no port's keep another one's from being refused.
#[derive(Debug, Default)]
pub(super) struct Unclosed(Arc<()>);

impl Unclosed {
    /// Something takes so long to close that no more should come.
    pub(super) fn are_many(&self) -> bool {
        // One is ours, and one goes with each socket.
        Arc::strong_count(&self.0) > MOST
    }
}

/// A socket, and its part in the count.
type Counted = (OwnedFd, Arc<()>);

/// The way to the thread that closes; it ends when this has gone and everything is closed.
#[derive(Debug)]
pub(super) struct Closer(Sender<Counted>);

impl Closer {
    /// Starts the thread. Nobody joins it: it may be stuck.
    pub(super) fn start() -> io::Result<Self> {
        let (sender, sockets) = unbounded::<Counted>();
        std::thread::Builder::new()
            .name("closer".to_string())
            .spawn(move || sockets.iter().for_each(drop))?;
        Ok(Closer(sender))
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
            assert!(!one.are_many(), "{count}");
            let (ours, theirs) = UnixStream::pair().unwrap();
            closer.close(ours, &one);
            peers.push(theirs);
        }
        assert!(one.are_many() && !other.are_many());
        // They have been hung up on all the same.
        for peer in &peers {
            assert_eq!(std::io::Read::read(&mut &*peer, &mut [0]).unwrap(), 0);
        }
        drop(sockets.recv().unwrap());
        assert!(!one.are_many());
    }
}
