//! What the other threads ask of control.

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

/// Where an answer goes. A caller that is gone is no error.
pub(super) type Reply<T> = Sender<Result<T, ControlError>>;

/// One request; the answer comes through its [`Reply`].
#[derive(Debug)]
pub(super) enum Command {
    /// A session has a new device.
    Posted(Arc<Link>),
    /// A session's thread ends; memory and rings are let go.
    SessionEnded {
        /// Its link.
        link: Arc<Link>,
        /// Why, in words.
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
    /// Resolves the ports that an observer names: those it looks at (all, where `None`), and where
    /// a mirror sends to.
    Prospect(Option<Vec<String>>, Option<String>, Reply<Prospect>),
    /// Registers an observer; the answer is its name and the generation from which on it is there.
    Observe(ObserverRecord, Reply<(String, u64)>),
    Observers(Reply<Vec<ObserverView>>),
    /// Ends an observer by name; only if it is a mirror, where so.
    EndObserver(String, bool, Reply<()>),
    /// Whoever reads from an observer has enough, and why.
    LeaveObserver(Arc<Observer>, &'static str),
    /// Whoever read from an observer has all of it, or has left: the frames that it got, and what
    /// was missed.
    ObserverRead(Weak<Observer>, u64, u64),
    /// A poll thread that was removed has ended; its reader is free.
    PollEnded(Reader<Topology>),
    /// End the daemon.
    Stop,
}
