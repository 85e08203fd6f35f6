//! Why a message is refused, and how a session ends.

use vhost::vhost_user::message::FrontendReq;

use super::Gone;
use super::event::RingName;
use crate::memory::MemoryError;
use crate::sys::eventfd::NotEventFd;

/// A request by its number. It is shown by its name if it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request(pub u32);

impl Request {
    pub(super) fn code(self) -> Option<FrontendReq> {
        FrontendReq::try_from(self.0).ok()
    }
}

impl std::fmt::Display for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.code() {
            Some(code) => write!(f, "{code:?}"),
            None => write!(f, "request {}", self.0),
        }
    }
}

/// Why a message is refused.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A memory message without the descriptors of the memory.
    #[error(
        "guest memory not shared: the memory message carries no file descriptor; use memory-backend-memfd,share=on (QEMU) \
         or shared=on (cloud-hypervisor)"
    )]
    PrivateMemory,
    /// A memory table or region that is refused.
    #[error("guest memory not usable: {0}")]
    Memory(#[from] MemoryError),
    /// Features that were never offered.
    #[error("features {features:#x} were acknowledged, but only {offered:#x} are offered")]
    NotOffered {
        /// What came.
        features: u64,
        /// What may come.
        offered: u64,
    },
    /// Ring features changed under a running ring.
    #[error("features changed to {features:#x} while rings run")]
    FeaturesWhileRunning {
        /// What came.
        features: u64,
    },
    /// A ring that does not exist.
    #[error("ring {index} was named, but there are {rings}")]
    RingIndex {
        /// The index as sent, with all 32 bits.
        index: u32,
        /// How many there are.
        rings: usize,
    },
    /// An impossible ring size.
    #[error("{ring} cannot have {size} entries")]
    RingSize {
        /// Which ring.
        ring: RingName,
        /// As sent.
        size: u32,
    },
    /// Ring addresses that are not in guest memory.
    #[error("{ring} lies outside of guest memory")]
    RingAddress {
        /// Which ring.
        ring: RingName,
    },
    /// A setting of a ring that must not change now.
    #[error("{request} for {ring}, which runs")]
    RingRunning {
        /// Which message.
        request: &'static str,
        /// Which ring.
        ring: RingName,
    },
    /// SET_VRING_ENABLE with a number that is neither 0 nor 1.
    #[error("SET_VRING_ENABLE with value {0}")]
    EnableValue(u32),
    /// A notification descriptor that is not an eventfd and so could block the switch.
    #[error("{ring}: {source}; only eventfds are taken")]
    Notification {
        /// Which ring.
        ring: RingName,
        /// What is wrong with it.
        #[source]
        source: NotEventFd,
    },
    /// A message of a feature that was not offered or not negotiated, or an unknown one.
    #[error("{0} is not supported here")]
    Unsupported(Request),
    /// The `vhost` crate found the message malformed.
    #[error("{request}: {source}")]
    Malformed {
        /// Which message.
        request: Request,
        /// What the crate says.
        #[source]
        source: vhost::vhost_user::Error,
    },
    /// A header of another version, with reserved flags, or marked as a reply.
    #[error("message header with flags {0:#x}")]
    HeaderFlags(u32),
    /// A body longer than any message.
    #[error("{request} with {size} bytes, at most {max} are possible")]
    Oversized {
        /// Which message.
        request: Request,
        /// As sent.
        size: u32,
        /// What is possible.
        max: usize,
    },
    /// A body of the wrong length.
    #[error("{request} with {size} bytes")]
    BodySize {
        /// Which message.
        request: Request,
        /// As sent.
        size: u32,
    },
    /// File descriptors in the middle of a header.
    #[error("a message header is split by file descriptors")]
    SplitHeader,
    /// File descriptors behind the header.
    #[error("{0}: file descriptors come with the body, not with the header")]
    FilesInBody(Request),
    /// More file descriptors than any message has.
    #[error("more than {max} file descriptors with one message")]
    TooManyFiles {
        /// What is possible.
        max: usize,
    },
    /// A part of a message came, and the rest did not come in time.
    #[error("a message stayed incomplete for {seconds} s")]
    Incomplete {
        /// How long it was waited for.
        seconds: u64,
    },
    /// The frontend does not read what is sent to it.
    #[error("the frontend has read no reply for {seconds} s")]
    NotReading {
        /// How long it was waited for.
        seconds: u64,
    },
    /// The socket fails.
    #[error("the socket failed: {0}")]
    Socket(#[from] std::io::Error),
    /// The frontend hung up, perhaps in the middle of a message.
    #[error("the frontend disconnected")]
    Disconnected,
    /// The port was removed meanwhile.
    #[error(transparent)]
    Gone(#[from] Gone),
}

impl SessionError {
    /// Whether the error explains why there is no guest memory.
    pub(super) fn concerns_memory(&self) -> bool {
        match self {
            SessionError::PrivateMemory | SessionError::Memory(_) => true,
            SessionError::Malformed { request, .. } => matches!(
                request.code(),
                Some(FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG)
            ),
            _ => false,
        }
    }

    pub(super) fn io(errno: rustix::io::Errno) -> Self {
        SessionError::Socket(errno.into())
    }
}

/// Start of the text for a frontend that left because it wants more queue pairs.
pub const ASKED_FOR_QUEUES: &str =
    "the frontend disconnected after asking for the number of queue pairs";

/// How a session ended. Its rings and its memory were let go before that.
#[derive(Debug)]
pub enum SessionEnd {
    /// The frontend hung up, or the session was stopped from outside.
    Disconnected,
    /// The frontend hung up after it had asked for the number of queue pairs: it needs more than
    /// are offered.
    AskedForQueues {
        /// How many are offered.
        pairs: u16,
    },
    /// The frontend did something that cannot be answered.
    Protocol(SessionError),
    /// The port was removed.
    PortGone,
}

impl From<SessionError> for SessionEnd {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Disconnected => SessionEnd::Disconnected,
            SessionError::Gone(Gone) => SessionEnd::PortGone,
            other => SessionEnd::Protocol(other),
        }
    }
}

impl std::fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SessionEnd::Disconnected => f.write_str("the frontend disconnected"),
            SessionEnd::AskedForQueues { pairs } => {
                write!(f, "{ASKED_FOR_QUEUES} ({pairs} offered)")
            }
            SessionEnd::Protocol(error) => write!(f, "session ended: {error}"),
            SessionEnd::PortGone => Gone.fmt(f),
        }
    }
}
