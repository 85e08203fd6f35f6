//! The operations of the daemon behind the API, as a trait.
//!
//! The server calls the trait from a bounded set of helper threads, so methods may block briefly.
//! Every operation on a port that was removed meanwhile returns [`ControlError::Gone`] or
//! `NotFound`.

use std::fmt;

use crossbeam_channel::Receiver;

use super::types::{
    CaptureOrder, Event, FdbAdd, FdbEntry, MirrorAdd, Moved, ObserverView, PollAdd, PollMove,
    PollSettings, PollSettingsPatch, PollThreadView, PortPatch, PortView, StatsView, TraceOrder,
    VersionView,
};
use crate::config::PortSpec;
use crate::wire::Mac;

/// What a request names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A port, by name.
    Port(String),
    /// An address in the FDB.
    Address(Mac),
    /// A poll thread, by number.
    PollThread(u32),
    /// An observer, by name.
    Observer(String),
    /// A mirror, by name.
    Mirror(String),
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            What::Port(name) => write!(f, "port {name:?}"),
            What::Observer(name) => write!(f, "observer {name:?}"),
            What::Mirror(name) => write!(f, "mirror {name:?}"),
            What::PollThread(number) => write!(f, "poll thread {number}"),
            What::Address(mac) => write!(f, "address {mac}"),
        }
    }
}

/// Why an operation was not done. The text is shown to the operator unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The request itself is wrong.
    #[error("{0}")]
    BadArgument(String),
    /// The request names something that does not exist.
    #[error("no such {what}")]
    NotFound {
        /// What was named.
        what: What,
    },
    /// The request contradicts what exists: a name in use, a live socket, a limit reached.
    #[error("{text}")]
    Conflict {
        /// What is in the way, and where.
        text: String,
    },
    /// A port that the request names, or what the request made, was removed before the answer.
    #[error("{what} was removed meanwhile")]
    Gone {
        /// What was removed.
        what: What,
    },
    /// The daemon is about to end.
    #[error("the daemon is stopping")]
    Stopping,
    /// A fault of the daemon or the operating system.
    #[error("{0}")]
    Internal(String),
}

impl ControlError {
    /// The error for a port name that does not exist.
    pub fn no_port(name: &str) -> Self {
        ControlError::NotFound {
            what: What::Port(name.to_string()),
        }
    }
}

impl From<crate::config::ConfigError> for ControlError {
    fn from(error: crate::config::ConfigError) -> Self {
        ControlError::BadArgument(error.to_string())
    }
}

/// A stream of bytes that the daemon produces over time.
pub trait ByteStream: Send {
    /// Returns the name of the observer behind the stream.
    fn name(&self) -> &str;
    /// Appends the bytes that are there by now. Returns whether more may come. Does not wait.
    fn read(&mut self, out: &mut Vec<u8>) -> bool;
}

/// The operations behind the API.
pub trait Control: Send + Sync {
    /// Creates a port. With `may_exist`, an existing port with the same values is a success.
    fn add_port(&self, spec: PortSpec, may_exist: bool) -> Result<PortView, ControlError>;
    /// Removes a port. Its name and socket path are free when this returns.
    fn remove_port(&self, name: &str) -> Result<(), ControlError>;
    /// Changes the settings that may change while the port exists.
    fn set_port(&self, name: &str, patch: PortPatch) -> Result<PortView, ControlError>;
    /// Returns all ports in order of creation.
    fn ports(&self) -> Result<Vec<PortView>, ControlError>;
    /// Returns one port.
    fn port(&self, name: &str) -> Result<PortView, ControlError>;
    /// Returns the forwarding table.
    fn fdb(&self) -> Result<Vec<FdbEntry>, ControlError>;
    /// Adds a static entry. Returns it.
    fn fdb_add(&self, entry: FdbAdd) -> Result<FdbEntry, ControlError>;
    /// Removes one entry, static or learned.
    fn fdb_remove(&self, mac: Mac) -> Result<(), ControlError>;
    /// Forgets the learned entries of one port, or of all ports. Returns how many.
    fn fdb_flush(&self, port: Option<&str>) -> Result<u64, ControlError>;
    /// Returns the poll threads.
    fn poll_threads(&self) -> Result<Vec<PollThreadView>, ControlError>;
    /// Starts a poll thread, unpinned or pinned to a CPU that no other poll thread has.
    fn poll_add(&self, order: PollAdd) -> Result<PollThreadView, ControlError>;
    /// Gives a poll thread's queues to the other threads and ends it. The thread has ended when
    /// this returns.
    fn poll_remove(&self, thread: u32) -> Result<(), ControlError>;
    /// Gives queues of a port to a poll thread. The thread owns them when this returns.
    fn poll_move(&self, order: PollMove) -> Result<Moved, ControlError>;
    /// Changes how queues are placed and what threads do without work. Returns the new settings.
    fn poll_set(&self, patch: PollSettingsPatch) -> Result<PollSettings, ControlError>;
    /// Returns all counters at one moment.
    fn stats(&self) -> Result<StatsView, ControlError>;
    /// Returns the events from now on. The channel is bounded. A reader that is too slow is
    /// disconnected after an event that says so.
    fn subscribe(&self) -> Receiver<Event>;
    /// Returns all observers.
    fn observers(&self) -> Result<Vec<ObserverView>, ControlError>;
    /// Ends an observer. The stream of a capture or trace ends in order.
    fn observer_remove(&self, name: &str) -> Result<(), ControlError>;
    /// Starts a capture as a pcapng section. The capture has begun when this returns. It ends when
    /// the stream is dropped.
    fn capture(&self, order: CaptureOrder) -> Result<Box<dyn ByteStream>, ControlError>;
    /// Starts a trace as lines of JSON. The trace has begun when this returns. It ends when the
    /// stream is dropped.
    fn trace(&self, order: TraceOrder) -> Result<Box<dyn ByteStream>, ControlError>;
    /// Adds a mirror.
    fn mirror_add(&self, order: MirrorAdd) -> Result<ObserverView, ControlError>;
    /// Removes a mirror.
    fn mirror_remove(&self, name: &str) -> Result<(), ControlError>;
    /// Returns the version of the running daemon.
    fn version(&self) -> VersionView;
}
