//! The state of a session, as `port show` shows it.
//!
//! The session and the threads that ask share this state. It refers to the queues, so that
//! positions are current. Queues are never handed out, so an asking thread cannot become their last
//! owner.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::event::{MEMORY_LOST, RingName};
use super::look::Silence;
use super::ring::{Refusal, Running};
use crate::memory::{FaultMark, Unusable};
use crate::virtio::Broken;

/// One ring at the moment of asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingStatus {
    /// Which.
    pub ring: RingName,
    /// Number of entries, if known.
    pub size: Option<u16>,
    /// Packed, not split.
    pub packed: bool,
    /// The ring runs.
    pub started: bool,
    /// The ring is enabled: by SET_VRING_ENABLE, or because that message was not negotiated.
    pub enabled: bool,
    /// The ring's position, as GET_VRING_BASE would answer it.
    pub position: Option<u32>,
    /// Why it does not run.
    pub refusal: Option<Refusal>,
    /// What the driver did that breaks the ring.
    pub broken: Option<Broken>,
    /// The ring is an enabled receiveq that never had a buffer. It gets no frames, because other
    /// receiveqs have buffers.
    pub left_out: bool,
    /// Why a restart of the switch would lose its position.
    pub no_record: Option<Arc<str>>,
}

/// A session at the moment of asking.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatusSnapshot {
    /// The state of the port, in words.
    pub state: String,
    /// Frames can pass both ways through at least one queue pair.
    pub working: bool,
    /// Acknowledged virtio features, once set.
    pub features: Option<u64>,
    /// Acknowledged protocol features.
    pub protocol_features: u64,
    /// Regions of guest memory.
    pub memory_regions: usize,
    /// Their size in bytes.
    pub memory_bytes: u64,
    /// Regions that are not mapped.
    pub memory_unusable: Vec<Unusable>,
    /// Why the last memory table or region was refused.
    pub memory_refused: Option<String>,
    /// The rings of the offered queue pairs, and others that the frontend has set up.
    pub rings: Vec<RingStatus>,
    /// The last message that was refused, or what ended the session.
    pub last_error: Option<String>,
}

/// The part of [`RingStatus`] that the session fills in.
#[derive(Debug)]
pub(super) struct RingEntry {
    pub(super) ring: RingName,
    pub(super) size: Option<u16>,
    pub(super) enabled: bool,
    pub(super) running: Option<Running>,
    pub(super) refusal: Option<Refusal>,
    /// The base at the ring's start.
    pub(super) base: u32,
    pub(super) left_out: bool,
    pub(super) no_record: Option<Arc<str>>,
}

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) features: Option<u64>,
    pub(super) protocol: u64,
    pub(super) packed: bool,
    pub(super) regions: usize,
    pub(super) bytes: u64,
    pub(super) unusable: Vec<Unusable>,
    pub(super) silence: Option<Silence>,
    pub(super) fault: Option<Arc<FaultMark>>,
    pub(super) rings: Vec<RingEntry>,
    /// The last refusal that concerns memory. It is forgotten when memory comes.
    pub(super) memory_error: Option<String>,
    pub(super) last_error: Option<String>,
    pub(super) ended: bool,
}

/// The state of one session, for readers on any thread.
#[derive(Debug, Default)]
pub struct SessionStatus {
    inner: Mutex<Inner>,
}

impl SessionStatus {
    /// The status of a session that has not begun.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the present state.
    pub fn snapshot(&self) -> StatusSnapshot {
        let inner = self.lock();
        let rings: Vec<RingStatus> = inner.rings.iter().map(|entry| entry.read(&inner)).collect();
        let working = rings.iter().any(|ring| {
            let other = RingName::new(ring.ring.index ^ 1);
            ring.works() && rings.iter().any(|r| r.ring == other && r.works())
        }) && !inner.faulted()
            && inner.silence().is_none();
        StatusSnapshot {
            state: inner.words(&rings, working),
            working,
            features: inner.features,
            protocol_features: inner.protocol,
            memory_regions: inner.regions,
            memory_bytes: inner.bytes,
            memory_unusable: inner.unusable.clone(),
            memory_refused: inner.memory_error.clone(),
            rings,
            last_error: inner.last_error.clone(),
        }
    }
}

impl RingStatus {
    fn works(&self) -> bool {
        self.started && self.enabled && self.broken.is_none()
    }

    /// Returns in words what keeps this ring from working; `None` if nothing does.
    fn problem(&self) -> Option<String> {
        let ring = self.ring;
        if let Some(broken) = self.broken {
            return Some(format!("ring broken: {ring}: {broken}"));
        }
        match self.refusal {
            Some(refusal) if !self.started => {
                Some(format!("driver not ready: {ring} not started: {refusal}"))
            }
            _ if self.enabled => None,
            _ => Some(format!("driver not ready: {ring} not enabled")),
        }
    }
}

impl RingEntry {
    fn read(&self, inner: &Inner) -> RingStatus {
        RingStatus {
            ring: self.ring,
            size: self.size,
            packed: inner.packed,
            started: self.running.is_some(),
            enabled: self.enabled,
            position: self.running.as_ref().map(Running::base),
            refusal: self.refusal,
            broken: self.running.as_ref().and_then(Running::broken),
            left_out: self.left_out,
            no_record: self.no_record.clone(),
        }
    }
}

impl Inner {
    fn faulted(&self) -> bool {
        self.fault.as_ref().is_some_and(|mark| mark.is_set())
    }

    /// Returns the silence that the session has found, unless a ring has moved since. The session
    /// itself sees the move a little later.
    fn silence(&self) -> Option<Silence> {
        let moved = |ring: &RingEntry| {
            let base = ring.running.as_ref().map(Running::base);
            base.is_some_and(|base| base != ring.base)
        };
        self.silence.filter(|_| !self.rings.iter().any(moved))
    }

    fn words(&self, rings: &[RingStatus], working: bool) -> String {
        if self.ended {
            let reason = self
                .last_error
                .as_deref()
                .unwrap_or("the frontend disconnected");
            return format!("session ended: {reason}");
        }
        if self.faulted() {
            return format!("{MEMORY_LOST}; not served until it reconnects");
        }
        if let (false, Some(error)) = (working, &self.memory_error) {
            return error.clone();
        }
        if self.features.is_none() {
            return "driver not ready: features not negotiated".into();
        }
        if self.bytes == 0
            && let Some(region) = self.unusable.first()
        {
            return region.to_string();
        }
        if self.bytes == 0 {
            return "driver not ready: no guest memory yet; if this stays so, the guest's memory is not shared: use \
                    memory-backend-memfd,share=on (QEMU) or shared=on (cloud-hypervisor)"
                .into();
        }
        // A broken ring is told first, then a ring that the driver tried to start in vain, then
        // what the first pair lacks.
        let broken = rings.iter().find(|ring| ring.broken.is_some());
        let first = rings
            .iter()
            .find(|ring| ring.ring.pair() == 0 && !ring.works());
        let refused = rings
            .iter()
            .find(|r| r.refusal.is_some_and(|reason| !reason.is_waiting()));
        let problem = broken.or(refused).or(first);
        let there = problem.and_then(|ring| ring.refusal) == Some(Refusal::Unusable);
        let region = self.unusable.first().filter(|_| there);
        let region = region.map_or_else(String::new, |region| format!(": {region}"));
        match problem.and_then(RingStatus::problem) {
            Some(problem) => problem + &region,
            None if working => "running".into(),
            None => match self.silence() {
                Some(silence) => silence.words().into(),
                None => "driver not ready: no ring started".into(),
            },
        }
    }
}
