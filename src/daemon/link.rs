//! The mailbox between one session and control.
//!
//! A session posts its newest device and continues. Control takes the newest device of each session
//! once a turn of its loop, and publishes once. So ten thousand SET_VRING_ENABLE of one frontend
//! cost one publication a turn.
//!
//! A port that posts too often (`POSTS` at once, then one every `POST_EVERY`) is not published in
//! each turn. All such ports share one publication every `LATE`. So they delay only their own
//! guests.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::command::Command;
use super::mailbox::Mailbox;
use super::pace::Messages;
use super::report::{Report, Reports};
use crate::port::{Device, PortShared};
use crate::sys::call::CallGuard;
use crate::sys::snapshot::Acknowledgements;
use crate::sys::wake::Wake;
use crate::topology::Topology;
use crate::vhost_user::{DeviceSink, Gone, SessionEvent, Ticket};

/// Sleep of a session between looks at the acknowledgements. It is short, because a busy poll
/// thread acknowledges within microseconds.
const LOOK_EVERY: Duration = Duration::from_micros(50);
/// Number of looks without a sleep before the first sleep.
const QUICK_LOOKS: u32 = 200;

/// One session's link to control.
#[derive(Debug)]
pub(super) struct Link {
    /// The port that the session serves.
    pub(super) port: Arc<PortShared>,
    mailbox: Mutex<Mailbox<Arc<Device>>>,
    changed: Condvar,
    commands: Sender<Command>,
    wake: Arc<Wake>,
    acknowledgements: Acknowledgements<Topology>,
    report: Arc<Report>,
    reports: Reports,
    messages: Messages,
}

impl Link {
    pub(super) fn new(
        port: Arc<PortShared>,
        commands: Sender<Command>,
        wake: Arc<Wake>,
        acknowledgements: Acknowledgements<Topology>,
        (report, reports): (Arc<Report>, Reports),
        messages: Messages,
    ) -> Arc<Self> {
        Arc::new(Link {
            port,
            mailbox: Mutex::default(),
            changed: Condvar::new(),
            commands,
            wake,
            acknowledgements,
            report,
            reports,
            messages,
        })
    }

    fn mailbox(&self) -> MutexGuard<'_, Mailbox<Arc<Device>>> {
        // A poisoned lock is usable: the mailbox holds plain values.
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the newest post that control has not taken yet: its number and device.
    pub(super) fn take(&self) -> Option<(u64, Option<Arc<Device>>)> {
        self.mailbox().take()
    }

    /// Control reports the generation in which a post is published.
    pub(super) fn published(&self, post: u64, generation: u64) {
        self.mailbox().published(post, generation);
        self.changed.notify_all();
    }

    /// Control reports that the port is removed since `generation`. Later posts have no effect.
    pub(super) fn port_gone(&self, generation: u64) {
        self.mailbox().port_gone(generation);
        self.changed.notify_all();
    }

    fn tell(&self, command: Command) {
        // Sending fails only after the end of control. Nobody needs the command then.
        if self.commands.send(command).is_ok() {
            self.wake.wake();
        }
    }

    /// Tells control that the session's thread is about to end.
    pub(super) fn ended(self: &Arc<Self>, reason: String) {
        self.tell(Command::SessionEnded {
            link: self.clone(),
            reason,
        });
    }

    fn wait_acknowledged(&self, generation: u64) {
        for _ in 0..QUICK_LOOKS {
            if self.acknowledgements.reached(generation) {
                return;
            }
            std::thread::yield_now();
        }
        // This wait has no deadline. A thread that has not acknowledged may still write into the
        // guest's memory, so nothing is answered. `poll list` shows the stuck thread.
        while !self.acknowledgements.reached(generation) {
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// A link as the session's sink. It is a type of its own because posting needs the `Arc`.
#[derive(Debug)]
pub(super) struct Sink(pub(super) Arc<Link>);

impl DeviceSink for Sink {
    fn post(&self, device: Option<Arc<Device>>) -> Ticket {
        let (post, announce) = self.0.mailbox().post(device);
        if announce {
            self.0.tell(Command::Posted(self.0.clone()));
        }
        Ticket(post)
    }

    fn settle(&self, ticket: Ticket) -> Result<(), Gone> {
        let mut mailbox = self.0.mailbox();
        let generation = loop {
            if let Some(generation) = mailbox.answer(ticket.0) {
                break generation;
            }
            mailbox = self
                .0
                .changed
                .wait(mailbox)
                .unwrap_or_else(PoisonError::into_inner);
        };
        let gone = mailbox.is_gone();
        drop(mailbox);
        self.0.wait_acknowledged(generation);
        if gone { Err(Gone) } else { Ok(()) }
    }

    fn is_settled(&self, ticket: Ticket) -> bool {
        let generation = self.0.mailbox().answer(ticket.0);
        generation.is_some_and(|generation| self.0.acknowledgements.reached(generation))
    }

    fn calls(&self) -> Arc<CallGuard> {
        self.0.port.calls.clone()
    }

    fn pace(&self) -> Duration {
        // A poisoned lock is usable: it holds plain values.
        let messages = self.0.messages.lock();
        let mut messages = messages.unwrap_or_else(PoisonError::into_inner);
        let wait = messages.wait(Instant::now());
        if !wait.is_zero() {
            self.0.port.paced_messages.fetch_add(1, Ordering::Relaxed);
        }
        wait
    }

    fn event(&self, event: SessionEvent) {
        // The report is made under the lock. So no session event of a port follows the event of its
        // removal.
        let mailbox = self.0.mailbox();
        if !mailbox.is_gone() {
            self.0.report.session(&self.0.port, &self.0.reports, &event);
        }
    }
}
