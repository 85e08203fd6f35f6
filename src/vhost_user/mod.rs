//! The vhost-user protocol: one conversation with one frontend.
//!
//! [`serve`] is the whole life of a session thread. It reads messages and keeps what they said in a
//! `DeviceState`. After each message that changes something it hands a new immutable [`Device`] to
//! a [`DeviceSink`]. It knows nothing of a switch, of topologies or of poll threads. A session
//! waits for one thing only, through [`DeviceSink::settle`]: that nobody uses the old device any
//! more.
//!
//! Framing, descriptor passing and most message checks are those of the `vhost` crate
//! (`BackendReqHandler`). `message` looks at each header first, waits until the whole message has
//! arrived, and answers the messages that the crate does not know.
//!
//! Rules:
//! * Everything a frontend sends is hostile. Nothing here panics. Nothing waits for ever on half a
//!   message or on a peer that reads no replies. A descriptor that its message must not carry is
//!   closed.
//! * Memory and rings are let go in one place (`DeviceState::stop`): first the sink gets a device
//!   without them, then everybody has acknowledged it, then they are dropped.
//! * A session waits for acknowledgements only where the protocol demands it: GET_VRING_BASE,
//!   memory changes, disable, reset, disconnect. The wait has no deadline. A thread that has not
//!   acknowledged may still write into the guest's memory, so an earlier answer would be wrong.
//! * A refused message is answered with a non-zero acknowledgement where the frontend asked for
//!   one, and ends the session otherwise. Settings that do not work yet are kept, because real
//!   frontends send them in any order.
//!
//! Left out: dirty logging, in-flight descriptors, vIOMMU, postcopy, device configuration space.
//! None is offered.

mod command;
mod control;
mod deferred;
mod device;
mod error;
mod event;
mod handler;
mod look;
mod message;
mod options;
mod records;
mod ring;
mod session;
mod status;

use std::sync::Arc;
use std::time::Duration;

pub use error::{ASKED_FOR_QUEUES, SessionEnd, SessionError};
pub use event::{MEMORY_LOST, RingName, SessionEvent};
pub use options::{OFFERED_FEATURES, RING_RESET, SUPPORTED_FEATURES, SessionOptions};
pub use records::{RecordError, RingRecords};
pub use ring::Refusal;
pub use session::{Stopper, serve};
pub use status::{RingStatus, SessionStatus, StatusSnapshot};

use crate::port::Device;
use crate::sys::call::CallGuard;

/// Names one [`DeviceSink::post`]; later posts have larger numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// The port was removed: nothing that its session does matters any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the port was removed")]
pub struct Gone;

/// Takes a session's device and its events, and tells the session when poll threads have
/// acknowledged.
pub trait DeviceSink: Send + Sync {
    /// Makes `device` what poll threads see, soon; `None` when no ring runs any more. Never blocks.
    /// A later post replaces an earlier one that was not published yet.
    fn post(&self, device: Option<Arc<Device>>) -> Ticket;

    /// Blocks until every poll thread works with the post of `ticket` or a later one.
    fn settle(&self, ticket: Ticket) -> Result<(), Gone>;

    /// Whether every poll thread works with the post of `ticket` or a later one. Does not block.
    fn is_settled(&self, ticket: Ticket) -> bool;

    /// Returns the guard that decides who makes the port's calls.
    fn calls(&self) -> Arc<CallGuard>;

    /// Returns how long the session must wait before it handles the message that has just come. An
    /// honest frontend's messages never wait.
    fn pace(&self) -> Duration;

    /// Reports something worth a line in the log.
    fn event(&self, event: SessionEvent);
}

#[cfg(test)]
mod tests;
