//! A listener between a frontend and a backend, which passes everything on and writes down the
//! frontend's messages.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::FrontendReq;

/// Request, flags and length of the payload, four bytes each.
const HEADER: usize = 12;
/// Longer than any payload, SET_CONFIG's included.
const PAYLOAD: usize = 4096;
/// Descriptors of one message at most (`VHOST_MEMORY_BASELINE_NREGIONS`).
const DESCRIPTORS: usize = 8;

/// What has been recorded.
#[derive(Debug, Default)]
struct Record {
    messages: Vec<String>,
    /// When the last one came.
    last: Option<Instant>,
    /// The connection that there is, on the frontend's side.
    frontend: Option<UnixStream>,
    connections: usize,
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Recorder {
    record: Arc<Mutex<Record>>,
}

impl Recorder {
    /// Listens on one socket for another one's frontend.
    pub(crate) fn between(listen: &Path, backend: &Path) -> Recorder {
        let recorder = Recorder {
            record: Arc::default(),
        };
        let listener = UnixListener::bind(listen).expect("a socket to listen on");
        let (own, backend) = (recorder.clone(), backend.to_path_buf());
        // It ends with the test.
        thread::spawn(move || {
            for frontend in listener.incoming() {
                let frontend = frontend.expect("a frontend");
                let backend = UnixStream::connect(&backend).expect("the backend listens");
                own.serve(frontend, &backend).expect("a connection");
            }
        });
        recorder
    }

    fn lock(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on until either side ends.
    fn serve(&self, frontend: UnixStream, backend: &UnixStream) -> io::Result<()> {
        {
            let mut record = self.lock();
            record.frontend = Some(frontend.try_clone()?);
            record.connections += 1;
        }
        thread::scope(|scope| {
            scope.spawn(|| {
                while pass(backend, &frontend, PAYLOAD).is_ok_and(|bytes| !bytes.is_empty()) {}
                let _ = frontend.shutdown(Shutdown::Both);
            });
            while self.pass_message(&frontend, backend).is_ok_and(|any| any) {}
            let _ = backend.shutdown(Shutdown::Both);
        });
        self.lock().frontend = None;
        Ok(())
    }

    /// Whether there was one.
    fn pass_message(&self, frontend: &UnixStream, backend: &UnixStream) -> io::Result<bool> {
        // QEMU sends each whole message by one call, descriptors and all: so it comes in whole,
        // too.
        let mut header = pass(frontend, backend, HEADER)?;
        while !header.is_empty() && header.len() < HEADER {
            let rest = pass(frontend, backend, HEADER - header.len())?;
            if rest.is_empty() {
                return Ok(false);
            }
            header.extend(rest);
        }
        if header.is_empty() {
            return Ok(false);
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four"));
        let mut payload = Vec::new();
        while payload.len() < word(8) as usize {
            let rest = pass(frontend, backend, word(8) as usize - payload.len())?;
            if rest.is_empty() {
                return Ok(false);
            }
            payload.extend(rest);
        }
        let mut record = self.lock();
        record.messages.push(name(word(0), &payload));
        record.last = Some(Instant::now());
        Ok(true)
    }

    /// Ends the connection, as a backend does that goes.
    pub(crate) fn cut(&self) {
        let frontend = self.lock().frontend.take().expect("a frontend");
        frontend.shutdown(Shutdown::Both).expect("it is connected");
    }

    /// How many there have been.
    pub(crate) fn connections(&self) -> usize {
        self.lock().connections
    }

    /// What has come since the last call, once nothing more has come for so long.
    pub(crate) fn take(&self, quiet: Duration) -> Vec<String> {
        loop {
            let mut record = self.lock();
            if record.last.is_none_or(|last| last.elapsed() >= quiet) {
                return std::mem::take(&mut record.messages);
            }
            drop(record);
            thread::sleep(quiet / 10);
        }
    }
}

/// Passes on up to `limit` bytes and the descriptors that came with them; none at the end.
fn pass(from: &UnixStream, to: &UnixStream, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; limit];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut came = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        from,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut came,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    bytes.truncate(received.bytes);
    let descriptors: Vec<OwnedFd> = came
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    let mut sent = 0;
    while sent < bytes.len() {
        let mut space =
            [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut with = SendAncillaryBuffer::new(&mut space);
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        if sent == 0 && !borrowed.is_empty() {
            assert!(with.push(SendAncillaryMessage::ScmRights(&borrowed)));
        }
        let rest = [IoSlice::new(&bytes[sent..])];
        sent += sendmsg(to, &rest, &mut with, SendFlags::NOSIGNAL)?;
    }
    Ok(bytes)
}

/// A message by the specification's name, with the ring that it is about, and whether that is
/// enabled.
fn name(request: u32, payload: &[u8]) -> String {
    let Ok(known) = FrontendReq::try_from(request) else {
        return format!("request {request}");
    };
    let word = |at: usize| {
        let bytes = payload.get(at..at + 4).expect("a payload");
        u32::from_le_bytes(bytes.try_into().expect("four"))
    };
    let name = format!("{known:?}");
    match known {
        FrontendReq::SET_VRING_ENABLE => format!("{name} {} {}", word(0), word(4)),
        // The lowest byte is the ring's index; bit 8 says that no descriptor comes.
        _ if name.contains("VRING") => format!("{name} {}", word(0) & 0xff),
        _ => name,
    }
}
