//! What the daemon answers to the API, as a trait.
//!
//! The server calls it from a bounded set of helper threads, so methods may block briefly. Every
//! operation on a port that was removed meanwhile answers [`ControlError::Gone`] or `NotFound`;
//! none of them waits for a poll thread.

use std::fmt;

use crossbeam_channel::Receiver;

use super::types::{
    CaptureOrder, Event, FdbAdd, FdbEntry, MirrorAdd, Moved, ObserverView, PollAdd, PollMove,
    PollSettings, PollSettingsPatch, PollThreadView, PortPatch, PortView, StatsView, TraceOrder,
    VersionView,
};
use crate::config::PortSpec;
use crate::wire::Mac;

/// What a request named.
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

/// Why an operation was not done. The text goes to the operator as it stands.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The request itself cannot be right.
    #[error("{0}")]
    BadArgument(String),
    /// It names something that does not exist.
    #[error("no such {what}")]
    NotFound {
        /// What was named.
        what: What,
    },
    /// It contradicts what exists: a name in use, a live socket, a limit reached.
    #[error("{text}")]
    Conflict {
        /// What is in the way, and where.
        text: String,
    },
    /// A port that it names was removed while the request was under way, or what it made was.
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
    /// A port of this name does not exist.
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

/// Bytes that the daemon makes as time passes.
pub trait ByteStream: Send {
    /// The name of the observer behind it.
    fn name(&self) -> &str;
    /// Appends what there is by now, and says whether more may come. Waits for nothing.
    fn read(&mut self, out: &mut Vec<u8>) -> bool;
}

/// The operations behind the API.
pub trait Control: Send + Sync {
    /// Creates a port. With `may_exist`, a port that exists with the same values is the answer.
    fn add_port(&self, spec: PortSpec, may_exist: bool) -> Result<PortView, ControlError>;
    /// Removes a port; its name and socket path are free when this returns.
    fn remove_port(&self, name: &str) -> Result<(), ControlError>;
    /// Changes what may change while the port exists.
    fn set_port(&self, name: &str, patch: PortPatch) -> Result<PortView, ControlError>;
    /// All ports, in the order of their creation.
    fn ports(&self) -> Result<Vec<PortView>, ControlError>;
    /// One port.
    fn port(&self, name: &str) -> Result<PortView, ControlError>;
    /// The forwarding table.
    fn fdb(&self) -> Result<Vec<FdbEntry>, ControlError>;
    /// Adds a static entry.
    fn fdb_add(&self, entry: FdbAdd) -> Result<FdbEntry, ControlError>;
    /// Removes one entry, static or learned.
    fn fdb_remove(&self, mac: Mac) -> Result<(), ControlError>;
    /// Forgets the learned entries of one port, or of all; answers how many there were.
    fn fdb_flush(&self, port: Option<&str>) -> Result<u64, ControlError>;
    /// The poll threads.
    fn poll_threads(&self) -> Result<Vec<PollThreadView>, ControlError>;
    /// Starts a poll thread, pinned to a CPU that no other one has, or unpinned.
    fn poll_add(&self, order: PollAdd) -> Result<PollThreadView, ControlError>;
    /// Gives a poll thread's queues to the others and ends it; it has ended when this returns.
    fn poll_remove(&self, thread: u32) -> Result<(), ControlError>;
    /// Gives queues of a port to a poll thread; it owns them when this returns.
    fn poll_move(&self, order: PollMove) -> Result<Moved, ControlError>;
    /// Changes how queues are placed and what threads do without work; answers how they are then.
    fn poll_set(&self, patch: PollSettingsPatch) -> Result<PollSettings, ControlError>;
    /// Counters of everything at one moment.
    fn stats(&self) -> Result<StatsView, ControlError>;
    /// Events from now on. The channel is bounded; a reader too slow for it is disconnected after
    /// an event that says so.
    fn subscribe(&self) -> Receiver<Event>;
    /// All observers.
    fn observers(&self) -> Result<Vec<ObserverView>, ControlError>;
    /// Ends an observer; its stream, if it has one, ends in order.
    fn observer_remove(&self, name: &str) -> Result<(), ControlError>;
    /// Starts a capture: a pcapng section. It has begun when this returns, and ends when the stream
    /// is dropped.
    fn capture(&self, order: CaptureOrder) -> Result<Box<dyn ByteStream>, ControlError>;
    /// Starts a trace: lines of JSON. It has begun when this returns, and ends when the stream is
    /// dropped.
    fn trace(&self, order: TraceOrder) -> Result<Box<dyn ByteStream>, ControlError>;
    /// Adds a mirror.
    fn mirror_add(&self, order: MirrorAdd) -> Result<ObserverView, ControlError>;
    /// Removes a mirror.
    fn mirror_remove(&self, name: &str) -> Result<(), ControlError>;
    /// What is running.
    fn version(&self) -> VersionView;
}
