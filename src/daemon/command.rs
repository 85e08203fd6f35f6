//! What the other threads ask of control.

use std::sync::Arc;

use crossbeam_channel::Sender;

use super::link::Link;
use crate::api::ControlError;
use crate::api::types::{
    FdbAdd, FdbEntry, FdbKey, Moved, PollMove, PollSettings, PollSettingsPatch, PollThreadView,
    PortPatch, PortView, StatsView,
};
use crate::config::PortSpec;
use crate::sys::snapshot::Reader;
use crate::topology::Topology;

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
    FdbRemove(FdbKey, Reply<()>),
    FdbFlush(Option<String>, Reply<u64>),
    PollThreads(Reply<Vec<PollThreadView>>),
    Stats(Reply<StatsView>),
    PollAdd(Option<usize>, Reply<PollThreadView>),
    PollRemove(usize, Reply<()>),
    PollMove(PollMove, Reply<Moved>),
    PollSet(PollSettingsPatch, Reply<PollSettings>),
    /// A poll thread that was removed has ended; its reader is free.
    PollEnded(Reader<Topology>),
    /// End the daemon.
    Stop,
}
