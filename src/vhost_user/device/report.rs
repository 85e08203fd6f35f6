//! What a session reports of its device: status, errors, broken rings.

use std::sync::Arc;
use std::time::Instant;

use super::DeviceState;
use crate::memory::{GuestMemory, Unusable};
use crate::vhost_user::error::SessionError;
use crate::vhost_user::event::{RingName, SessionEvent};
use crate::vhost_user::options::ring_features;
use crate::vhost_user::ring::{Running, Vring};
use crate::vhost_user::status::RingEntry;

impl DeviceState {
    /// Remembers an error for the status.
    pub(in crate::vhost_user) fn record(&mut self, error: &SessionError) {
        let text = error.to_string();
        let mut status = self.status.lock();
        if error.concerns_memory() {
            status.memory_error = Some(text.clone());
        }
        status.last_error = Some(text);
    }

    /// A message was refused, and the session goes on.
    pub(in crate::vhost_user) fn refused(&mut self, error: &SessionError, now: Instant) {
        self.record(error);
        let reason = error.to_string().into();
        self.reporter
            .report(SessionEvent::MessageRefused { reason }, now);
    }

    /// Reports regions that cannot be used, except those that `before` has, too.
    pub(super) fn report_unusable(&mut self, before: &GuestMemory) {
        let known: Vec<Unusable> = before.unusable().collect();
        let memory = Arc::clone(&self.memory);
        for region in memory.unusable().filter(|region| !known.contains(region)) {
            self.event(SessionEvent::MemoryUnusable(region));
        }
    }

    /// Reports lost memory and rings that broke since the last look, and looks at the rings' usage.
    pub(in crate::vhost_user) fn look(&mut self, now: Instant) {
        if self.memory.faulted() && !std::mem::replace(&mut self.loss_reported, true) {
            self.reporter.report(SessionEvent::MemoryLost, now);
        }
        self.look_at_rings(now);
        for ring in &mut self.rings {
            let broken = ring.running.as_ref().and_then(Running::broken);
            if let Some(reason) = broken.filter(|_| !ring.broken_reported) {
                ring.broken_reported = true;
                let ring: RingName = ring.name;
                self.reporter
                    .report(SessionEvent::RingBroken { ring, reason }, now);
            }
        }
    }

    /// Brings the status up to date.
    pub(in crate::vhost_user) fn refresh(&self) {
        let told = |ring: &&Vring| {
            ring.name.pair() < self.options.pairs() || ring.kicked || ring.size.is_some()
        };
        let mut status = self.status.lock();
        status.features = self.features;
        status.protocol = self.protocol;
        status.packed = self
            .features
            .is_some_and(|features| ring_features(features).packed);
        status.regions = self.memory.regions().count();
        status.bytes = self.memory.len_bytes();
        status.unusable = self.memory.unusable().collect();
        status.silence = self.silence;
        status.rings = self
            .rings
            .iter()
            .filter(told)
            .map(|ring| self.entry(ring))
            .collect();
    }

    fn entry(&self, ring: &Vring) -> RingEntry {
        RingEntry {
            ring: ring.name,
            size: ring.size,
            enabled: self.enabled(ring),
            running: ring.running.clone(),
            refusal: ring.refusal,
            base: ring.usage.base(),
            left_out: ring.left_out,
            no_record: ring.no_record.clone(),
        }
    }
}
