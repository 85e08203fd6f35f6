//! Negotiation of features, and rings that a frontend sets up anew without having stopped them.

use super::DeviceState;
use crate::vhost_user::Gone;
use crate::vhost_user::error::SessionError;
use crate::vhost_user::event::{RingName, SessionEvent};
use crate::vhost_user::options::{PROTOCOL, controlq, ring_features};
use crate::vhost_user::ring::Vring;

impl DeviceState {
    /// Whether messages that ask for an acknowledgement get one.
    pub(in crate::vhost_user) fn acknowledges(&self) -> bool {
        use vhost::vhost_user::message::VhostUserProtocolFeatures as Features;
        self.protocol & Features::REPLY_ACK.bits() != 0
    }

    /// Whether the session must acknowledge by itself. The `vhost` crate does not, for a frontend
    /// that never sent GET_FEATURES. Such a frontend would wait for ever.
    pub(in crate::vhost_user) fn acknowledges_alone(&self) -> bool {
        self.acknowledges() && !self.features_read
    }

    /// SET_FEATURES. While rings are in use, only bits that do not concern rings may change, and
    /// the new features are posted. If the other bits change while every ring is stopped or
    /// disabled, the rings are given up.
    pub(in crate::vhost_user) fn set_features(
        &mut self,
        features: u64,
    ) -> Result<(), SessionError> {
        if features & !self.options.acceptable() != 0 {
            let offered = self.options.offered();
            return Err(SessionError::NotOffered { features, offered });
        }
        let changed = |old| {
            ring_features(old) != ring_features(features) || controlq(old) != controlq(features)
        };
        if self.is_running() && self.features.is_some_and(changed) {
            if !self.rings.iter().all(Vring::is_idle) {
                return Err(SessionError::FeaturesWhileRunning { features });
            }
            self.give_up(|_| true)?;
        }
        if self.features.replace(features) != Some(features) {
            let protocol = self.protocol;
            self.event(SessionEvent::Features { features, protocol });
            self.update();
        }
        Ok(())
    }

    pub(in crate::vhost_user) fn set_protocol(
        &mut self,
        features: u64,
    ) -> Result<(), SessionError> {
        let offered = PROTOCOL.bits();
        if features & !offered != 0 {
            return Err(SessionError::NotOffered { features, offered });
        }
        self.protocol = features;
        self.refresh();
        Ok(())
    }

    /// Called before a message that a running ring cannot take. libkrun's reset disables its rings,
    /// asks for no base, and then sends everything anew. Nobody delivers into a disabled ring. A
    /// message that sets the ring up anew therefore means that the ring has stopped. It stops here,
    /// as for GET_VRING_BASE, until the next kick descriptor comes. For a ring in use the message
    /// is refused: the ring is not taken away from its driver.
    pub(super) fn give_up_idle(
        &mut self,
        index: u32,
        request: &'static str,
    ) -> Result<(), SessionError> {
        let ring = self.ring(index)?;
        let name = ring.name;
        if ring.running.is_none() {
            return Ok(());
        }
        if !ring.is_idle() {
            return Err(SessionError::RingRunning {
                request,
                ring: name,
            });
        }
        Ok(self.give_up(|ring| ring.name == name)?)
    }

    /// Stops the running rings that `which` selects, without GET_VRING_BASE.
    fn give_up(&mut self, which: impl Fn(&Vring) -> bool) -> Result<(), Gone> {
        let given_up = |ring: &Vring| ring.running.is_some() && which(ring);
        let names = self.rings.iter().filter(|ring| given_up(ring));
        let names: Vec<RingName> = names.map(|ring| ring.name).collect();
        self.stop(which)?;
        let features = self.features;
        for ring in self.rings.iter_mut().filter(|r| names.contains(&r.name)) {
            ring.halt(features);
        }
        self.handed_over.extend(names);
        Ok(())
    }
}
