//! Bodies without an end of their own. Each has a helper thread.
//!
//! For `/v1/events` the thread takes events from their channel and passes lines to the connection.
//! For captures and traces it looks every few milliseconds for what observers have written.
//!
//! The thread ends when the connection ends, when the daemon stops, or when the channel is closed
//! because its reader was too slow.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use hyper::body::{Body, Bytes, Frame};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};

use super::control::ByteStream;
use super::types::Event;
use crate::sys::thread;

/// Most lines between the helper thread and the connection.
const LINES: usize = 16;
/// Most chunks of a capture between the helper thread and the connection.
const CHUNKS: usize = 4;
/// Time between looks at an observer that has written nothing.
const LOOK: Duration = Duration::from_millis(2);
/// Time within which the thread notices that the connection or the daemon has ended.
const TICK: Duration = Duration::from_millis(100);

/// The lines or chunks of one stream, as a body.
#[derive(Debug)]
pub(super) struct Lines(mpsc::Receiver<Bytes>);

/// Starts forwarding `events`. `permit` is held until forwarding ends.
pub(super) fn start(
    events: Receiver<Event>,
    permit: OwnedSemaphorePermit,
    stopped: watch::Receiver<bool>,
) -> io::Result<Lines> {
    let (sender, receiver) = mpsc::channel(LINES);
    thread::spawn("api-stream", move || {
        let _permit = permit;
        forward(&events, &sender, &stopped);
    })?;
    Ok(Lines(receiver))
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
        // Blocks if the reader does not read. The connection's write limit ends the wait.
        if lines.blocking_send(line.into()).is_err() {
            return;
        }
    }
}

/// Starts forwarding what `stream` produces. `permit` is held until forwarding ends.
pub(super) fn start_bytes(
    stream: Box<dyn ByteStream>,
    permit: OwnedSemaphorePermit,
    stopped: watch::Receiver<bool>,
) -> io::Result<Lines> {
    let (sender, receiver) = mpsc::channel(CHUNKS);
    thread::spawn("api-stream", move || {
        let _permit = permit;
        forward_bytes(stream, &sender, &stopped);
    })?;
    Ok(Lines(receiver))
}

fn forward_bytes(
    mut stream: Box<dyn ByteStream>,
    chunks: &mpsc::Sender<Bytes>,
    stopped: &watch::Receiver<bool>,
) {
    // A stopping daemon has ended the observer, but the end of the stream is still to be read.
    let mut stopping: Option<Instant> = None;
    loop {
        let mut bytes = Vec::new();
        let goes_on = stream.read(&mut bytes);
        let quiet = bytes.is_empty();
        if !quiet && !hand_over(bytes.into(), chunks, stopped) {
            return;
        }
        if !goes_on || chunks.is_closed() {
            return;
        }
        if *stopped.borrow() && stopping.get_or_insert_with(Instant::now).elapsed() > TICK {
            return;
        }
        if quiet {
            std::thread::sleep(LOOK);
        }
    }
}

/// Passes a chunk to the connection. Waits for as long as the reader is there, even if it does not
/// read. Returns whether the reader took the chunk.
fn hand_over(
    mut bytes: Bytes,
    chunks: &mpsc::Sender<Bytes>,
    stopped: &watch::Receiver<bool>,
) -> bool {
    loop {
        bytes = match chunks.try_send(bytes) {
            Ok(()) => return true,
            Err(mpsc::error::TrySendError::Full(bytes)) if !*stopped.borrow() => bytes,
            Err(_) => return false,
        };
        std::thread::sleep(LOOK);
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
