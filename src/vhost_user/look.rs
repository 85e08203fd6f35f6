//! Finds out whether drivers use the rings that run. The session looks now and then. A poll thread
//! never does.
//!
//! A guest with private memory that has a file looks like a healthy guest: the file can be mapped,
//! but what the guest writes is not in the file. The rings in the file never change. The rings of a
//! driver whose link is down never change either, but that driver does not kick. In both cases no
//! frame can pass, and the port's state says so.
//!
//! An enabled receiveq that never had a buffer gets no flows while others have buffers. Frontends
//! enable every ring that they have configured, whether or not the guest uses it. (Cloud-hypervisor
//! ignores the guest's number of pairs, Dragonball never disables a ring.) The flows of an unused
//! queue would be lost for ever. The queue gets flows again within half a second of its first
//! buffer. From then on the queue keeps flows until its next start: a queue that runs out of
//! buffers later is overloaded, not unused.

use std::time::{Duration, Instant};

use super::device::DeviceState;
use super::event::SessionEvent;
use super::ring::Vring;

/// How long a driver may leave a ring empty after its start. Frontends start rings before drivers
/// fill them.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a session without messages looks at its rings.
const LOOK: Duration = Duration::from_secs(2);
/// How often a session looks at its rings while it waits for a driver to use them.
const LOOK_CLOSELY: Duration = Duration::from_millis(500);

/// Whether a driver has used a ring since the ring started.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    begun: Option<Instant>,
    /// The base at the ring's start.
    base: u32,
    /// Whether the driver has put something into the ring.
    pub(super) used: bool,
}

impl Usage {
    pub(super) fn begin(base: u32) -> Self {
        Usage {
            begun: Some(Instant::now()),
            base,
            used: false,
        }
    }

    /// Returns the base at the ring's start.
    pub(super) fn base(&self) -> u32 {
        self.base
    }

    fn is_overdue(&self, now: Instant) -> bool {
        let age = |begun| now.saturating_duration_since(begun);
        !self.used && self.begun.is_some_and(|begun| age(begun) >= PATIENCE)
    }
}

/// The driver has put nothing into any ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Silence {
    /// The driver may not have started its queues, for example because its link is down.
    Quiet,
    /// The driver kicks, but what it should have written is zero.
    Kicks,
}

impl Silence {
    pub(super) fn words(self) -> &'static str {
        match self {
            Silence::Quiet => {
                "driver not ready: it has put nothing into any ring: is its link down, or the guest's \
                 memory private? share=on"
            }
            Silence::Kicks => {
                "the rings never change although the driver kicks: is the guest's memory private? \
                 share=on"
            }
        }
    }
}

impl Vring {
    fn look(&mut self) {
        if let Some(running) = &self.running
            && !self.usage.used
        {
            self.usage.used = running.base() != self.usage.base || running.has_available();
        }
    }

    fn was_kicked(&self) -> bool {
        self.kick.as_ref().is_some_and(|kick| kick.was_kicked())
    }
}

impl DeviceState {
    /// Returns the time until the next look, if no message comes; `None` if no ring runs.
    pub(super) fn next_look(&self) -> Option<Duration> {
        let closely = self.silence.is_some() || self.rings.iter().any(|ring| ring.left_out);
        let wait = if closely { LOOK_CLOSELY } else { LOOK };
        self.is_running().then_some(wait)
    }

    /// Looks at the rings that run: finds silence, and receiveqs that get no flows. Posts if the
    /// latter have changed.
    pub(super) fn look_at_rings(&mut self, now: Instant) {
        self.rings.iter_mut().for_each(Vring::look);
        self.look_for_silence(now);
        let serves =
            |ring: &Vring| ring.name.is_receiveq() && ring.running.is_some() && ring.usage.used;
        let some = self
            .rings
            .iter()
            .any(|ring| serves(ring) && self.enabled(ring));
        let mut changed = false;
        for at in 0..self.rings.len() {
            let ring = &self.rings[at];
            let unserved = ring.running.is_some() && ring.usage.is_overdue(now);
            let out = some && ring.name.is_receiveq() && unserved && self.enabled(ring);
            changed |= std::mem::replace(&mut self.rings[at].left_out, out) != out;
        }
        if changed {
            self.update();
        }
    }

    fn look_for_silence(&mut self, now: Instant) {
        let running = || self.rings.iter().filter(|ring| ring.running.is_some());
        let silent = self.is_running() && running().all(|ring| ring.usage.is_overdue(now));
        let silence = silent.then(|| {
            let blank = |ring: &Vring| ring.running.as_ref().is_some_and(|ring| ring.is_blank());
            if running().any(Vring::was_kicked) && running().all(blank) {
                Silence::Kicks
            } else {
                Silence::Quiet
            }
        });
        if std::mem::replace(&mut self.silence, silence) == silence {
            return;
        }
        if silence == Some(Silence::Kicks) {
            self.event(SessionEvent::NeverChanges);
        }
        self.refresh();
    }
}
