//! Commands from other threads to the control thread.

use std::sync::{Arc, Weak};

use crossbeam_channel::Sender;

use super::link::Link;
use super::observers::{ObserverRecord, Prospect};
use crate::api::ControlError;
use crate::api::types::{
    FdbAdd, FdbEntry, Moved, ObserverView, PollAdd, PollMove, PollSettings, PollSettingsPatch,
    PollThreadView, PortPatch, PortView, StatsView,
};
use crate::config::PortSpec;
use crate::observe::Observer;
use crate::sys::snapshot::Reader;
use crate::topology::Topology;
use crate::wire::Mac;

/// Sends the answer of a command. If the caller is gone, the answer is dropped without error.
pub(super) type Reply<T> = Sender<Result<T, ControlError>>;

/// One request to control. The answer comes through its [`Reply`].
#[derive(Debug)]
pub(super) enum Command {
    /// A session has posted a new device.
    Posted(Arc<Link>),
    /// A session's thread ends. Its memory and rings can be released.
    SessionEnded {
        /// The link of that session.
        link: Arc<Link>,
        /// The reason, in words.
        reason: String,
    },
    AddPort(PortSpec, bool, Reply<PortView>),
    RemovePort(String, Reply<()>),
    SetPort(String, PortPatch, Reply<PortView>),
    Ports(Reply<Vec<PortView>>),
    Port(String, Reply<PortView>),
    Fdb(Reply<Vec<FdbEntry>>),
    FdbAdd(FdbAdd, Reply<FdbEntry>),
    FdbRemove(Mac, Reply<()>),
    FdbFlush(Option<String>, Reply<u64>),
    PollThreads(Reply<Vec<PollThreadView>>),
    Stats(Reply<StatsView>),
    PollAdd(PollAdd, Reply<PollThreadView>),
    PollRemove(usize, Reply<()>),
    PollMove(PollMove, Reply<Moved>),
    PollSet(PollSettingsPatch, Reply<PollSettings>),
    /// Resolves the names of the ports that an observer looks at (`None`: all), and of a mirror's
    /// destination.
    Prospect(Option<Vec<String>>, Option<String>, Reply<Prospect>),
    /// Registers an observer. The answer is its name and the first generation that includes it.
    Observe(ObserverRecord, Reply<(String, u64)>),
    Observers(Reply<Vec<ObserverView>>),
    /// Ends an observer by name. With `true`, only a mirror is ended.
    EndObserver(String, bool, Reply<()>),
    /// The reader of an observer stops, for the given reason.
    LeaveObserver(Arc<Observer>, &'static str),
    /// The reader of an observer has read everything, or has left: frames read, frames missed.
    ObserverRead(Weak<Observer>, u64, u64),
    /// A removed poll thread has ended and returns its reader.
    PollEnded(Reader<Topology>),
    /// Ends the daemon.
    Stop,
}
