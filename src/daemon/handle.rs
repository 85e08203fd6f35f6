//! The API's side of control: each operation sends a command and waits for its answer.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::command::{Command, Reply};
use super::mirrors::add_mirror;
use super::observers::Names;
use super::report::Report;
use super::streams::{CaptureStream, TraceStream};
use crate::api::types::{
    CaptureOrder, Event, FdbAdd, FdbEntry, MirrorAdd, Moved, ObserverView, PollAdd, PollMove,
    PollSettings, PollSettingsPatch, PollThreadView, PortPatch, PortView, StatsView, TraceOrder,
    VersionView,
};
use crate::api::{ByteStream, Control, ControlError};
use crate::config::PortSpec;
use crate::sys::snapshot::Acknowledgements;
use crate::sys::wake::Wake;
use crate::topology::Topology;
use crate::wire::Mac;

/// Longest wait for an answer. Control answers within a turn of its loop, so a longer wait means
/// that the machine stands still.
const ANSWER: Duration = Duration::from_secs(10);

/// Operates a running daemon from any thread.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(super) commands: Sender<Command>,
    pub(super) wake: Arc<Wake>,
    pub(super) report: Arc<Report>,
    /// Names of ports, needed to print the records of observers.
    pub(super) names: Arc<Names>,
    pub(super) acknowledgements: Acknowledgements<Topology>,
}

impl Handle {
    pub(super) fn tell(&self, command: Command) -> Result<(), ControlError> {
        let stopped = |_| ControlError::Stopping;
        self.commands.send(command).map_err(stopped)?;
        self.wake.wake();
        Ok(())
    }

    pub(super) fn ask<T>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, ControlError> {
        let (reply, answer) = bounded(1);
        self.tell(command(reply))?;
        let unanswered = |why| match why {
            RecvTimeoutError::Timeout => {
                ControlError::Internal("the daemon does not answer".to_string())
            }
            // Control has ended and dropped the command.
            RecvTimeoutError::Disconnected => ControlError::Stopping,
        };
        answer.recv_timeout(ANSWER).map_err(unanswered)?
    }
}

impl Control for Handle {
    fn add_port(&self, spec: PortSpec, may_exist: bool) -> Result<PortView, ControlError> {
        self.ask(|reply| Command::AddPort(spec, may_exist, reply))
    }

    fn remove_port(&self, name: &str) -> Result<(), ControlError> {
        self.ask(|reply| Command::RemovePort(name.to_string(), reply))
    }

    fn set_port(&self, name: &str, patch: PortPatch) -> Result<PortView, ControlError> {
        self.ask(|reply| Command::SetPort(name.to_string(), patch, reply))
    }

    fn ports(&self) -> Result<Vec<PortView>, ControlError> {
        self.ask(Command::Ports)
    }

    fn port(&self, name: &str) -> Result<PortView, ControlError> {
        self.ask(|reply| Command::Port(name.to_string(), reply))
    }

    fn fdb(&self) -> Result<Vec<FdbEntry>, ControlError> {
        self.ask(Command::Fdb)
    }

    fn fdb_add(&self, entry: FdbAdd) -> Result<FdbEntry, ControlError> {
        self.ask(|reply| Command::FdbAdd(entry, reply))
    }

    fn fdb_remove(&self, mac: Mac) -> Result<(), ControlError> {
        self.ask(|reply| Command::FdbRemove(mac, reply))
    }

    fn fdb_flush(&self, port: Option<&str>) -> Result<u64, ControlError> {
        self.ask(|reply| Command::FdbFlush(port.map(str::to_string), reply))
    }

    fn poll_threads(&self) -> Result<Vec<PollThreadView>, ControlError> {
        self.ask(Command::PollThreads)
    }

    fn poll_add(&self, order: PollAdd) -> Result<PollThreadView, ControlError> {
        self.ask(|reply| Command::PollAdd(order, reply))
    }

    fn poll_remove(&self, thread: u32) -> Result<(), ControlError> {
        self.ask(|reply| Command::PollRemove(thread as usize, reply))
    }

    fn poll_move(&self, order: PollMove) -> Result<Moved, ControlError> {
        self.ask(|reply| Command::PollMove(order, reply))
    }

    fn poll_set(&self, patch: PollSettingsPatch) -> Result<PollSettings, ControlError> {
        self.ask(|reply| Command::PollSet(patch, reply))
    }

    fn stats(&self) -> Result<StatsView, ControlError> {
        self.ask(Command::Stats)
    }

    fn subscribe(&self) -> Receiver<Event> {
        self.report.hub.subscribe()
    }

    fn observers(&self) -> Result<Vec<ObserverView>, ControlError> {
        self.ask(Command::Observers)
    }

    fn observer_remove(&self, name: &str) -> Result<(), ControlError> {
        self.ask(|reply| Command::EndObserver(name.to_string(), false, reply))
    }

    fn capture(&self, order: CaptureOrder) -> Result<Box<dyn ByteStream>, ControlError> {
        Ok(Box::new(CaptureStream::start(self, &order)?))
    }

    fn trace(&self, order: TraceOrder) -> Result<Box<dyn ByteStream>, ControlError> {
        Ok(Box::new(TraceStream::start(self, &order)?))
    }

    fn mirror_add(&self, order: MirrorAdd) -> Result<ObserverView, ControlError> {
        add_mirror(self, &order)
    }

    fn mirror_remove(&self, name: &str) -> Result<(), ControlError> {
        self.ask(|reply| Command::EndObserver(name.to_string(), true, reply))
    }

    fn version(&self) -> VersionView {
        VersionView::current()
    }
}
