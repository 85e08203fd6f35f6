//! Whether drivers use the rings that run. The session looks once in a while; a poll thread never
//! does.
//!
//! A guest with private memory that has a file looks like a healthy guest: the file can be mapped,
//! but what the guest writes is not in the file. Its rings stay as they were made. The ring of a
//! driver whose link is down also stays as it was made, but that driver does not kick. In both
//! cases nothing can pass, and the port says so.
//!
//! A receiveq that is enabled, and has never had a buffer while others have, gets no flows.
//! Frontends enable what they have configured, whatever their guest uses (cloud-hypervisor ignores
//! its number of pairs, Dragonball never disables). The flows of an unused queue would be lost for
//! ever. The queue gets flows again within half a second of its first buffer. From then on it keeps
//! them until its next start: a queue that has run empty is full, not unused.

use std::time::{Duration, Instant};

use super::device::DeviceState;
use super::event::SessionEvent;
use super::ring::Vring;

/// How long a driver may leave its rings alone after their start. Frontends start them before
/// drivers fill them.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a silent session looks at its rings.
const LOOK: Duration = Duration::from_secs(2);
/// The same while a driver is waited for.
const LOOK_CLOSELY: Duration = Duration::from_millis(500);

/// What a driver has made of a ring since it started.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    begun: Option<Instant>,
    /// Where it started.
    base: u32,
    /// Something was put into it.
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

    /// Where it started.
    pub(super) fn base(&self) -> u32 {
        self.base
    }

    fn is_overdue(&self, now: Instant) -> bool {
        let age = |begun| now.saturating_duration_since(begun);
        !self.used && self.begun.is_some_and(|begun| age(begun) >= PATIENCE)
    }
}

/// Nothing was put into any ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Silence {
    /// As of a driver whose link is down.
    Quiet,
    /// Although it kicks, and what it should have written are zeros.
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
    /// When to look again, if no message comes.
    pub(super) fn next_look(&self) -> Option<Duration> {
        let closely = self.silence.is_some() || self.rings.iter().any(|ring| ring.left_out);
        let wait = if closely { LOOK_CLOSELY } else { LOOK };
        self.is_running().then_some(wait)
    }

    /// Looks at the rings that run, and draws the conclusions.
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
