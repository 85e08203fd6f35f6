//! The life of a session thread: it handles one message after the other until either side ends the
//! session.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error as CrateError};

use super::control::Control;
use super::deferred::Deferred;
use super::device::DeviceState;
use super::error::{SessionEnd, SessionError};
use super::message::{Arrived, Waited, acknowledge, discard, take, wait, wait_writable};
use super::options::SessionOptions;
use super::status::SessionStatus;
use super::{DeviceSink, Gone};
use crate::sys::call::CallFd;

/// How long the rest of a message may take after its first byte, and how long a frontend may leave
/// replies unread.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often a session checks whether poll threads have let go of an old call descriptor. Mostly
/// they have by the first check.
const LOOK_SOON: Duration = Duration::from_millis(1);
/// How often a session tries again to make calls for which the kernel had no AIO context.
const TRY_AGAIN: Duration = Duration::from_millis(50);

/// Ends a session from outside.
#[derive(Debug)]
pub struct Stopper(UnixStream);

impl Stopper {
    /// A stopper for the session that will be served on this stream.
    pub fn new(stream: &UnixStream) -> std::io::Result<Self> {
        stream.try_clone().map(Stopper)
    }

    /// Makes [`serve`] return [`SessionEnd::Disconnected`] soon. May be called at any time and
    /// several times.
    pub fn stop(&self) {
        // Fails only if the peer has gone already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Serves one frontend until it leaves or is refused: the whole life of a session thread. Returns
/// how the session ended.
///
/// Before this returns, a device without rings was posted and all poll threads have acknowledged
/// it. The frontend sees the socket closed only after that, unless the frontend or a [`Stopper`]
/// closed it.
pub fn serve(
    stream: UnixStream,
    options: SessionOptions,
    sink: Arc<dyn DeviceSink>,
    status: Arc<SessionStatus>,
) -> SessionEnd {
    serve_with(stream, options, sink, status, DEADLINE)
}

pub(super) fn serve_with(
    stream: UnixStream,
    options: SessionOptions,
    sink: Arc<dyn DeviceSink>,
    status: Arc<SessionStatus>,
    deadline: Duration,
) -> SessionEnd {
    let device = DeviceState::new(options, sink, Arc::clone(&status), Instant::now());
    let device = Arc::new(Mutex::new(device));
    let end = match Session::new(&stream, Arc::clone(&device), deadline) {
        Ok(mut session) => {
            let end = SessionEnd::from(session.run());
            // The socket is still open here. A frontend may take the closed socket for "nobody uses
            // the memory any more".
            finish(&device, end)
        }
        Err(error) => finish(&device, error.into()),
    };
    status.lock().ended = true;
    discard(&stream);
    end
}

fn lock(device: &Mutex<DeviceState>) -> MutexGuard<'_, DeviceState> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the session: the only place where a session's memory and rings are let go for good.
fn finish(device: &Mutex<DeviceState>, end: SessionEnd) -> SessionEnd {
    let mut device = lock(device);
    if let SessionEnd::Protocol(error) = &end {
        device.record(error);
    }
    let gave_up = matches!(end, SessionEnd::Disconnected) && device.gave_up(Instant::now());
    match device.release() {
        Ok(()) if gave_up => SessionEnd::AskedForQueues {
            pairs: device.options.pairs(),
        },
        Ok(()) => end,
        Err(Gone) => SessionEnd::PortGone,
    }
}

struct Session<'s> {
    stream: &'s UnixStream,
    device: Arc<Mutex<DeviceState>>,
    handler: BackendReqHandler<Mutex<DeviceState>>,
    deadline: Duration,
    deferred: Deferred,
    control: Control,
}

impl<'s> Session<'s> {
    fn new(
        stream: &'s UnixStream,
        device: Arc<Mutex<DeviceState>>,
        deadline: Duration,
    ) -> Result<Self, SessionError> {
        // The crate would spin on a non-blocking socket.
        stream.set_nonblocking(false)?;
        let deferred = Deferred::new(lock(&device).sink.calls());
        let handler = BackendReqHandler::from_stream(stream.try_clone()?, Arc::clone(&device));
        Ok(Session {
            stream,
            device,
            handler,
            deadline,
            deferred,
            control: Control::new(Instant::now()),
        })
    }

    fn run(&mut self) -> SessionError {
        loop {
            if let Err(error) = self.turn() {
                return error;
            }
        }
    }

    fn turn(&mut self) -> Result<(), SessionError> {
        let more = {
            let mut device = lock(&self.device);
            self.control.serve(&mut device, Instant::now())?
        };
        // Commands may have made calls due, so calls come after commands.
        let idle = self.call();
        let idle = more.map_or(idle, |more| Some(idle.map_or(more, |idle| idle.min(more))));
        let bell = self.deferred.bell();
        let arrived = match wait(self.stream, bell, self.control.bell(), idle, self.deadline)? {
            Waited::Message(arrived) => arrived,
            Waited::Kick => {
                self.control.kicked();
                return Ok(());
            }
            Waited::Idle => {
                let mut device = lock(&self.device);
                self.control.idle(&device);
                device.look(Instant::now());
                self.deferred.look(&mut device);
                return Ok(());
            }
            // The next turn begins with calls.
            Waited::Bell => return Ok(()),
        };
        let pause = lock(&self.device).sink.pace();
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
        wait_writable(self.stream, self.deadline)?;
        match arrived.request.code() {
            // The crate refuses this message before SET_FEATURES, but QEMU sends it that early.
            Some(FrontendReq::SET_VRING_ENABLE) => self.enable(&arrived),
            Some(code) if !unknown_to_crate(code) => self.dispatch(&arrived, code),
            _ => self.refuse_unknown(&arrived),
        }
    }

    /// Makes the calls that are due, then touches buffers, which takes longer. Returns after which
    /// time to look again if nothing comes.
    fn call(&mut self) -> Option<Duration> {
        let mut device = lock(&self.device);
        let later = device.owe_spare_calls();
        let (pause, owed) = if device.calls().any(CallFd::is_owed) {
            self.deferred.make(&mut device)
        } else {
            (Duration::ZERO, false)
        };
        device.touch();
        let look = device.next_look();
        drop(device);
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
        match (later, owed) {
            (true, _) => Some(LOOK_SOON),
            (_, true) => Some(TRY_AGAIN),
            _ => look,
        }
    }

    fn dispatch(&mut self, arrived: &Arrived, code: FrontendReq) -> Result<(), SessionError> {
        // Forgets an old reason: some requests report their failure in the reply, and leave its
        // reason here.
        lock(&self.device).take_failure();
        let result = self.handler.handle_request();
        let mut device = lock(&self.device);
        let own = arrived.needs_reply() && device.acknowledges_alone();
        let Err(source) = result else {
            device.answered();
            return match own && !answers_value(code) {
                true => acknowledge(self.stream, arrived, 0),
                false => Ok(()),
            };
        };
        let failure = device.take_failure();
        // The crate sends an acknowledgement if the handler refused the message, but not if the
        // crate refused it. The exception is a memory table that the crate has read and found
        // wrong.
        let wrong_table =
            code == FrontendReq::SET_MEM_TABLE && matches!(source, CrateError::InvalidMessage);
        let acknowledged = failure.is_some() || wrong_table;
        let memory = matches!(code, FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG);
        let error = match (failure, source) {
            (Some(failure), _) => failure,
            (None, CrateError::Disconnected | CrateError::SocketBroken(_)) => {
                return Err(SessionError::Disconnected);
            }
            // The whole message has arrived. So what the crate had no room for are descriptors that
            // came with the body.
            (None, CrateError::SocketRetry(_)) => {
                return Err(SessionError::FilesInBody(arrived.request));
            }
            (None, _) if memory && !arrived.has_files => SessionError::PrivateMemory,
            (None, source) => SessionError::Malformed {
                request: arrived.request,
                source,
            },
        };
        let fatal = matches!(error, SessionError::Gone(_)) || ends_session(code);
        if acknowledged && !fatal && arrived.needs_reply() && device.acknowledges() {
            device.refused(&error, Instant::now());
            return match own {
                true => acknowledge(self.stream, arrived, 1),
                false => Ok(()),
            };
        }
        Err(error)
    }

    fn enable(&mut self, arrived: &Arrived) -> Result<(), SessionError> {
        let body = take(self.stream, arrived)?;
        let [a, b, c, d, e, f, g, h] = body[..] else {
            return Err(SessionError::BodySize {
                request: arrived.request,
                size: arrived.size,
            });
        };
        let (index, value) = (
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
        );
        let result = if arrived.has_files {
            Err(SessionError::Unsupported(arrived.request))
        } else {
            lock(&self.device).enable(index, value)
        };
        self.answer(arrived, result)
    }

    fn refuse_unknown(&mut self, arrived: &Arrived) -> Result<(), SessionError> {
        take(self.stream, arrived)?;
        let error = SessionError::Unsupported(arrived.request);
        if arrived.request.code().is_some_and(wants_value) {
            // The frontend would take an acknowledgement for the value that it has asked for.
            return Err(error);
        }
        self.answer(arrived, Err(error))
    }

    /// Acknowledges a message that the crate did not see. Returns an error, which ends the session,
    /// if the message is refused and the frontend asked for no acknowledgement.
    fn answer(
        &mut self,
        arrived: &Arrived,
        result: Result<(), SessionError>,
    ) -> Result<(), SessionError> {
        let mut device = lock(&self.device);
        let wanted = arrived.needs_reply() && device.acknowledges();
        match result {
            Ok(()) if wanted => acknowledge(self.stream, arrived, 0),
            Ok(()) => Ok(()),
            Err(SessionError::Gone(gone)) => Err(gone.into()),
            Err(error) if wanted => {
                device.refused(&error, Instant::now());
                acknowledge(self.stream, arrived, 1)
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether the crate has a name for this message, but no code that handles it. None of these is
/// offered.
fn unknown_to_crate(code: FrontendReq) -> bool {
    matches!(
        code,
        FrontendReq::SET_LOG_FD
            | FrontendReq::SEND_RARP
            | FrontendReq::NET_SET_MTU
            | FrontendReq::IOTLB_MSG
            | FrontendReq::SET_VRING_ENDIAN
            | FrontendReq::CREATE_CRYPTO_SESSION
            | FrontendReq::CLOSE_CRYPTO_SESSION
            | FrontendReq::POSTCOPY_ADVISE
            | FrontendReq::POSTCOPY_LISTEN
            | FrontendReq::POSTCOPY_END
            | FrontendReq::VRING_KICK
            | FrontendReq::SET_STATUS
            | FrontendReq::GET_STATUS
    )
}

/// Whether this offered message is answered with a value, not with an acknowledgement.
fn answers_value(code: FrontendReq) -> bool {
    matches!(
        code,
        FrontendReq::GET_FEATURES
            | FrontendReq::GET_PROTOCOL_FEATURES
            | FrontendReq::GET_QUEUE_NUM
            | FrontendReq::GET_VRING_BASE
            | FrontendReq::GET_MAX_MEM_SLOTS
    )
}

/// Whether this message, which the crate does not handle, is to be answered with a value.
fn wants_value(code: FrontendReq) -> bool {
    matches!(
        code,
        FrontendReq::GET_STATUS
            | FrontendReq::CREATE_CRYPTO_SESSION
            | FrontendReq::POSTCOPY_ADVISE
            | FrontendReq::POSTCOPY_END
    )
}

/// Whether the session must end when this message is refused. Either the crate has noted features
/// that were not accepted, or a value was asked for and there is none.
fn ends_session(code: FrontendReq) -> bool {
    matches!(
        code,
        FrontendReq::SET_FEATURES
            | FrontendReq::SET_PROTOCOL_FEATURES
            | FrontendReq::GET_VRING_BASE
            | FrontendReq::GET_CONFIG
            | FrontendReq::GET_INFLIGHT_FD
            | FrontendReq::GET_SHARED_OBJECT
            | FrontendReq::GET_SHMEM_CONFIG
            | FrontendReq::SET_LOG_BASE
    )
}
