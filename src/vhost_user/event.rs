//! What a session reports, one line each, and how often.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::DeviceSink;
use super::look::Silence;
use super::ring::Refusal;
use crate::memory::Unusable;
use crate::virtio::Broken;

/// The state of a port whose guest's memory was taken away while it was mapped.
pub const MEMORY_LOST: &str =
    "guest memory is lost: its file was truncated, or its file system is full";

/// A ring by its vring index: receiveq `2n`, transmitq `2n + 1`, and the controlq (virtio 1.2
/// §5.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingName {
    /// The index of the vring.
    pub index: u16,
    /// Whether the ring is the controlq, which carries the driver's commands.
    pub is_controlq: bool,
}

impl RingName {
    /// The receiveq or transmitq of this index.
    pub fn new(index: u16) -> Self {
        RingName {
            index,
            is_controlq: false,
        }
    }

    /// The controlq with this index.
    pub(super) fn controlq(index: u16) -> Self {
        RingName {
            index,
            is_controlq: true,
        }
    }

    /// Whether the switch delivers frames into the ring.
    pub fn is_receiveq(self) -> bool {
        !self.is_controlq && self.index.is_multiple_of(2)
    }

    /// Number of the ring's queue pair.
    pub fn pair(self) -> u16 {
        self.index / 2
    }
}

impl fmt::Display for RingName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_controlq {
            return f.write_str("controlq");
        }
        let kind = if self.is_receiveq() {
            "receiveq"
        } else {
            "transmitq"
        };
        write!(f, "{kind} {}", self.pair())
    }
}

/// Something worth a line in the log. Texts of the frontend's choice never appear in it.
#[derive(Clone, Debug)]
pub enum SessionEvent {
    /// SET_FEATURES.
    Features {
        /// Acknowledged virtio features.
        features: u64,
        /// Acknowledged protocol features.
        protocol: u64,
    },
    /// The guest's memory changed.
    Memory {
        /// Regions it has now.
        regions: usize,
        /// Size of all regions in bytes.
        bytes: u64,
    },
    /// A region of the guest's memory is not mapped.
    MemoryUnusable(Unusable),
    /// Nothing was ever written to the rings that run, although the driver kicks.
    NeverChanges,
    /// The guest's memory was taken away while it was mapped. The guest is not served any more.
    MemoryLost,
    /// A ring started.
    RingStarted {
        /// Which.
        ring: RingName,
        /// Entries.
        size: u16,
        /// Packed, not split.
        packed: bool,
        /// Position it starts at, as GET_VRING_BASE would answer it.
        base: u32,
    },
    /// A ring does not start where SET_VRING_BASE said. A split ring starts at its used index. In
    /// the base of a packed ring both halves should be equal, but the upper half of virtio-user's
    /// is always 0.
    BaseDiffers {
        /// Which.
        ring: RingName,
        /// Packed, not split.
        packed: bool,
        /// What SET_VRING_BASE said.
        asked: u32,
        /// Where it starts.
        found: u32,
    },
    /// A packed ring has no record that would outlive the switch.
    NoRecord {
        /// Which.
        ring: RingName,
        /// Why, in words.
        reason: Arc<str>,
    },
    /// A ring that the frontend started cannot work.
    RingRefused {
        /// Which.
        ring: RingName,
        /// Why.
        reason: Refusal,
    },
    /// A ring stopped.
    RingStopped {
        /// Which.
        ring: RingName,
        /// Where it stands.
        base: u32,
    },
    /// A driver did something impossible with a ring; it stands still until its next start.
    RingBroken {
        /// Which.
        ring: RingName,
        /// What.
        reason: Broken,
    },
    /// Signalling the frontend's call descriptors is slow: this session does it from now on.
    CallsDeferred,
    /// Signalling is fast again: poll threads make the calls.
    CallsDirect,
    /// The system refuses what this session needs for its calls. The session goes on trying.
    CallsImpossible {
        /// Why, in words.
        reason: Arc<str>,
    },
    /// A message was answered with an error.
    MessageRefused {
        /// Why, in words.
        reason: Arc<str>,
    },
    /// Some events were not reported, because a frontend must not fill the log.
    Suppressed {
        /// How many events.
        count: u64,
    },
}

impl SessionEvent {
    /// Whether an operator should do something about it.
    pub fn is_warning(&self) -> bool {
        matches!(
            self,
            SessionEvent::MemoryUnusable(_)
                | SessionEvent::NeverChanges
                | SessionEvent::MemoryLost
                | SessionEvent::NoRecord { .. }
                | SessionEvent::RingBroken { .. }
        )
    }
}

impl fmt::Display for SessionEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionEvent::Features { features, protocol } => {
                write!(f, "features {features:#x}, protocol features {protocol:#x}")
            }
            SessionEvent::Memory { regions, bytes } => {
                write!(
                    f,
                    "guest memory of {} MiB in {regions} {}",
                    bytes >> 20,
                    if *regions == 1 { "region" } else { "regions" }
                )
            }
            SessionEvent::MemoryUnusable(region) => region.fmt(f),
            SessionEvent::NeverChanges => f.write_str(Silence::Kicks.words()),
            SessionEvent::MemoryLost => f.write_str(MEMORY_LOST),
            SessionEvent::RingStarted {
                ring,
                size,
                packed,
                base,
            } => {
                let kind = if *packed { "packed" } else { "split" };
                write!(f, "{ring} started: {kind}, {size} entries, at {base:#x}")
            }
            SessionEvent::BaseDiffers {
                ring,
                packed: false,
                asked,
                found,
            } => {
                write!(
                    f,
                    "{ring} starts at its used index {found}, not at the base {asked} given"
                )
            }
            SessionEvent::BaseDiffers {
                ring, asked, found, ..
            } => {
                write!(
                    f,
                    "{ring} starts at {found:#x}, not at the base {asked:#x} given"
                )
            }
            SessionEvent::NoRecord { ring, reason } => {
                write!(
                    f,
                    "{ring} will not survive a restart of the switch: {reason}"
                )
            }
            SessionEvent::RingRefused { ring, reason } => write!(f, "{ring} not started: {reason}"),
            SessionEvent::RingStopped { ring, base } => write!(f, "{ring} stopped at {base:#x}"),
            SessionEvent::RingBroken { ring, reason } => write!(f, "{ring} broken: {reason}"),
            SessionEvent::CallsDeferred => f.write_str(
                "calls are slow: many wait on the frontend's descriptors, so its session signals them from now on",
            ),
            SessionEvent::CallsDirect => f.write_str("calls are fast again: poll threads make them"),
            SessionEvent::CallsImpossible { reason } => write!(f, "calls cannot be made: {reason}"),
            SessionEvent::MessageRefused { reason } => write!(f, "message refused: {reason}"),
            SessionEvent::Suppressed { count } => {
                let plural = if *count == 1 { "" } else { "s" };
                write!(f, "{count} more event{plural} not shown")
            },
        }
    }
}

/// Events that may come at once. A start of 256 rings stays below that.
const BURST: u32 = 600;
/// Time after which one more event may come.
const REFILL: Duration = Duration::from_millis(250);

/// Passes events on, but only as many as an honest frontend causes.
pub(super) struct Reporter {
    sink: Arc<dyn DeviceSink>,
    left: u32,
    refilled: Instant,
    suppressed: u64,
}

impl Reporter {
    pub(super) fn new(sink: Arc<dyn DeviceSink>, now: Instant) -> Self {
        Reporter {
            sink,
            left: BURST,
            refilled: now,
            suppressed: 0,
        }
    }

    pub(super) fn report(&mut self, event: SessionEvent, now: Instant) {
        let refills = now.duration_since(self.refilled).as_millis() / REFILL.as_millis();
        if refills > 0 {
            self.left = self
                .left
                .saturating_add(refills.min(u128::from(BURST)) as u32)
                .min(BURST);
            self.refilled = now;
        }
        if self.left == 0 {
            self.suppressed += 1;
            return;
        }
        self.left -= 1;
        if self.suppressed > 0 {
            let count = std::mem::take(&mut self.suppressed);
            self.sink.event(SessionEvent::Suppressed { count });
        }
        self.sink.event(event);
    }
}
