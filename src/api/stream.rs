//! The body of `/v1/events`: a helper thread takes events from their channel and hands lines to
//! the connection.
//!
//! It ends when the connection does, when the daemon stops, or when the channel is closed because
//! its reader was too slow.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};
use hyper::body::{Body, Bytes, Frame};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};

use super::types::Event;

/// Lines between the helper thread and the connection.
const LINES: usize = 16;
/// How soon the thread notices that the connection or the daemon has ended.
const TICK: Duration = Duration::from_millis(100);

/// The lines of one stream.
#[derive(Debug)]
pub(super) struct Lines(mpsc::Receiver<Bytes>);

/// Starts forwarding `events`; `permit` is held until that ends.
pub(super) fn start(
    events: Receiver<Event>,
    permit: OwnedSemaphorePermit,
    stopped: watch::Receiver<bool>,
) -> Lines {
    let (sender, receiver) = mpsc::channel(LINES);
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        forward(&events, &sender, &stopped);
    });
    Lines(receiver)
}

fn forward(events: &Receiver<Event>, lines: &mpsc::Sender<Bytes>, stopped: &watch::Receiver<bool>) {
    loop {
        let event = match events.recv_timeout(TICK) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) if lines.is_closed() || *stopped.borrow() => return,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let Ok(mut line) = serde_json::to_vec(&event) else {
            continue;
        };
        line.push(b'\n');
        // Blocks on a reader that does not read; the connection's write limit ends that.
        if lines.blocking_send(line.into()).is_err() {
            return;
        }
    }
}

impl Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let line = self.0.poll_recv(cx);
        line.map(|line| line.map(|line| Ok(Frame::data(line))))
    }
}
