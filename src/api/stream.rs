//! The bodies that have no end of their own: a helper thread for each.
//!
//! For `/v1/events` it takes events from their channel and hands lines to the connection; for
//! captures and traces it looks every few milliseconds for what observers have written.
//!
//! Either ends when the connection does, when the daemon stops, or when the channel is closed
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

/// Lines between the helper thread and the connection.
const LINES: usize = 16;
/// Chunks of a capture in the same place.
const CHUNKS: usize = 4;
/// Time between looks at an observer that has written nothing.
const LOOK: Duration = Duration::from_millis(2);
/// How soon the thread notices that the connection or the daemon has ended.
const TICK: Duration = Duration::from_millis(100);

/// The lines or chunks of one stream.
#[derive(Debug)]
pub(super) struct Lines(mpsc::Receiver<Bytes>);

/// Starts forwarding `events`; `permit` is held until that ends.
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
        // Blocks on a reader that does not read; the connection's write limit ends that.
        if lines.blocking_send(line.into()).is_err() {
            return;
        }
    }
}

/// Starts forwarding what `stream` makes; `permit` is held until that ends.
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
    // A daemon that stops has ended the observer: its stream's end is still to come.
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

/// Waits for a reader that does not read, for as long as it is there; says whether it took the
/// chunk.
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
