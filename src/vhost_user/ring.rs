//! One vring: what the frontend said about it, and the queue once it runs.
//!
//! **When a ring starts.** A ring runs when its size, its addresses, a kick descriptor (or the word
//! that there is none), the features and the memory are known, until GET_VRING_BASE. The order does
//! not matter: QEMU, cloud-hypervisor and DPDK agree on none.
//!
//! **Where a ring starts.** A split ring starts at the `used.idx` found in its memory, whatever
//! SET_VRING_BASE said; a difference is logged. That is exact for QEMU, for cloud-hypervisor (which
//! sends its available index) and for DPDK's virtio-user (which sends 0). A packed ring starts
//! where SET_VRING_BASE says, unless the switch has been away: nothing in the ring's memory says
//! where it stands, so that is kept in a record (`virtio::redo`).
//!
//! **The call at a start.** Every start is a new queue object, and its session calls its driver
//! once: the driver may be asleep on work that was finished before a restart. No poll thread makes
//! that call, because its other guests would wait. A new call descriptor of a running ring is
//! called too, once all poll threads have acknowledged it: a call through the old one may not have
//! reached the driver.
//!
//! **A disabled ring.** Frames on a disabled ring are discarded, as the protocol says. But a
//! transmitq that was never told waits for its first SET_VRING_ENABLE: frontends send that message
//! last, and a guest's pending frames must survive a restart of the switch.

use std::sync::Arc;

use super::Ticket;
use super::event::RingName;
use super::look::Usage;
use super::options::{has_ring_reset, ring_features};
use crate::memory::{GuestMemory, PinnedWindow};
use crate::port::{Receive, Transmit};
use crate::sys::call::CallFd;
use crate::sys::eventfd::KickFd;
use crate::sys::numa::node_of;
use crate::virtio::{
    Broken, ControlQueue, FullBarrier, MAX_RING_SIZE, ReceiveQueue, RingFeatures, RingSetup,
    SetupError, TransmitQueue, packed, split,
};

/// Base of a packed ring that was never told one: slot 0, both wrap counters 1 (virtio 1.2 §2.8.1).
const PACKED_START: u32 = 0x8000_8000;

/// Where a ring stands that was never told a base.
pub(super) fn first_base(packed: bool) -> u32 {
    if packed { PACKED_START } else { 0 }
}

/// Why a ring does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// SET_FEATURES has not come.
    #[error("features are not negotiated")]
    NoFeatures,
    /// No memory yet.
    #[error("guest memory is not known")]
    NoMemory,
    /// SET_VRING_NUM has not come.
    #[error("its size is not set")]
    NoSize,
    /// SET_VRING_ADDR has not come.
    #[error("its addresses are not set")]
    NoAddresses,
    /// SET_VRING_KICK has not come since the ring stopped.
    #[error("the driver has not started it")]
    NotStarted,
    /// A controlq by which nothing came yet.
    #[error("its driver has commanded nothing yet")]
    NoCommand,
    /// Some part of the ring is outside of guest memory.
    #[error("it lies outside of guest memory")]
    NotMapped,
    /// Some part of the ring is in a region that is not mapped.
    #[error("it lies in guest memory that cannot be used")]
    Unusable,
    /// A ring of a queue pair that is not offered.
    #[error("more queue pairs are used than the {pairs} offered")]
    NotOffered {
        /// How many are offered.
        pairs: u16,
    },
    /// The ring itself is impossible.
    #[error(transparent)]
    Setup(#[from] SetupError),
}

impl Refusal {
    /// Whether the frontend simply has not come that far.
    pub fn is_waiting(self) -> bool {
        matches!(
            self,
            Refusal::NoFeatures
                | Refusal::NoMemory
                | Refusal::NoSize
                | Refusal::NoAddresses
                | Refusal::NotStarted
                | Refusal::NoCommand
        )
    }
}

/// SET_VRING_ADDR: addresses as the frontend has them, translated anew for every memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// The three areas of a ring in guest memory.
type Places = (PinnedWindow, PinnedWindow, PinnedWindow);

impl Addresses {
    /// Each area whole in one region.
    pub(super) fn places(
        &self,
        memory: &GuestMemory,
        size: u16,
        features: RingFeatures,
    ) -> Option<Places> {
        let (descriptors, available, used) = if features.packed {
            packed::layout(size)
        } else {
            split::layout(size, features.event_idx)
        };
        Some((
            memory.pinned(self.descriptors, descriptors)?,
            memory.pinned(self.available, available)?,
            memory.pinned(self.used, used)?,
        ))
    }
}

impl Addresses {
    /// Why a ring has no [places](Addresses::places).
    pub(super) fn refusal(&self, memory: &GuestMemory) -> Refusal {
        let areas = [self.descriptors, self.available, self.used];
        if areas.iter().any(|at| memory.unusable_at(*at).is_some()) {
            Refusal::Unusable
        } else {
            Refusal::NotMapped
        }
    }
}

/// A started queue of either direction.
#[derive(Clone, Debug)]
pub(super) enum Running {
    Receive(Arc<ReceiveQueue>),
    Transmit(Arc<TransmitQueue>),
    Control(Arc<ControlQueue>),
}

impl Running {
    fn start(ring: RingName, setup: &RingSetup) -> Result<Self, SetupError> {
        Ok(if ring.is_controlq {
            Running::Control(Arc::new(ControlQueue::start(setup)?))
        } else if ring.is_receiveq() {
            Running::Receive(Arc::new(ReceiveQueue::start(setup)?))
        } else {
            Running::Transmit(Arc::new(TransmitQueue::start(setup)?))
        })
    }

    /// Where it stands, as GET_VRING_BASE answers it.
    pub(super) fn base(&self) -> u32 {
        match self {
            Running::Receive(queue) => queue.base(),
            Running::Transmit(queue) => queue.base(),
            Running::Control(queue) => queue.base(),
        }
    }

    /// Whether something is available in it that the switch has not taken yet.
    pub(super) fn has_available(&self) -> bool {
        match self {
            Running::Receive(queue) => queue.has_available(),
            Running::Transmit(queue) => queue.has_available(),
            Running::Control(queue) => queue.has_available(),
        }
    }

    /// Whether nobody has ever written to its part of the driver, as far as that is looked at.
    pub(super) fn is_blank(&self) -> bool {
        match self {
            Running::Receive(queue) => queue.is_blank(),
            Running::Transmit(queue) => queue.is_blank(),
            Running::Control(queue) => queue.is_blank(),
        }
    }

    pub(super) fn broken(&self) -> Option<Broken> {
        match self {
            Running::Receive(queue) => queue.broken(),
            Running::Transmit(queue) => queue.broken(),
            Running::Control(queue) => queue.broken(),
        }
    }
}

/// One vring.
#[derive(Debug)]
pub(super) struct Vring {
    pub(super) name: RingName,
    pub(super) size: Option<u16>,
    pub(super) addresses: Option<Addresses>,
    pub(super) base: Option<u32>,
    /// What the frontend was last told, or told us: what it will say again should it lose its
    /// connection.
    pub(super) asked: u32,
    /// SET_VRING_KICK came since the ring last stopped, with a descriptor or without.
    pub(super) kicked: bool,
    pub(super) kick: Option<Arc<KickFd>>,
    pub(super) call: Option<Arc<CallFd>>,
    /// The post with which the call descriptor replaced another one that poll threads may have used
    /// until then.
    pub(super) spare_after: Option<Ticket>,
    /// SET_VRING_ENABLE, once it has come; that the ring is disabled counts while it runs, and
    /// until it is stopped.
    pub(super) enable: Option<bool>,
    pub(super) running: Option<Running>,
    /// Why it does not run, found at the last try.
    pub(super) refusal: Option<Refusal>,
    /// Its being broken was reported.
    pub(super) broken_reported: bool,
    /// A receiveq whose first buffers were touched since it started.
    touched: bool,
    /// What its driver has made of it since it started.
    pub(super) usage: Usage,
    /// A receiveq that is enabled and out of use, see `look`.
    pub(super) left_out: bool,
    /// Why it has no record that would outlive the switch.
    pub(super) no_record: Option<Arc<str>>,
    /// NUMA node of the ring where it last started, if the kernel tells.
    node: Option<usize>,
}

impl Vring {
    pub(super) fn new(index: u16) -> Self {
        Vring {
            name: RingName::new(index),
            size: None,
            addresses: None,
            base: None,
            asked: PACKED_START,
            kicked: false,
            kick: None,
            call: None,
            spare_after: None,
            enable: None,
            running: None,
            refusal: Some(Refusal::NoFeatures),
            broken_reported: false,
            touched: false,
            usage: Usage::default(),
            left_out: false,
            no_record: None,
            node: None,
        }
    }

    /// NUMA node of a ring that runs, if the kernel tells.
    pub(super) fn numa_node(&self) -> Option<usize> {
        self.running.as_ref().and(self.node)
    }

    /// Everything but the call descriptor is forgotten: a frontend that resets sends the rest
    /// again.
    pub(super) fn reset(&mut self) {
        let call = self.call.take();
        *self = Vring {
            call,
            ..Vring::new(self.name.index)
        };
    }

    /// The frontend has said what only a ring has that its driver uses.
    pub(super) fn is_told(&self) -> bool {
        self.size.is_some() || self.addresses.is_some() || self.kicked
    }

    /// It does not run, or its frontend has disabled it.
    pub(super) fn is_idle(&self) -> bool {
        self.running.is_none() || self.enable == Some(false)
    }

    /// It stays stopped until the next kick descriptor comes. Returns where it stands.
    pub(super) fn halt(&mut self, features: Option<u64>) -> u32 {
        self.kicked = false;
        self.kick = None;
        // What a driver sends before the next start is for whom the ring is enabled then.
        self.enable = self.enable.filter(|enabled| *enabled);
        // A frontend that passes the reset of one ring on starts it again without another call
        // descriptor.
        if !features.is_some_and(has_ring_reset) {
            self.call = None;
        }
        // A frontend saves the answer and restores it as it is: of a packed ring that never ran it
        // must be a place in the first lap.
        let packed = features.is_some_and(|features| ring_features(features).packed);
        self.asked = self.base.unwrap_or(first_base(packed));
        self.asked
    }

    /// What the ring needs to start, or what is missing or wrong.
    pub(super) fn setup(
        &self,
        features: Option<u64>,
        memory: &Arc<GuestMemory>,
        pairs: u16,
    ) -> Result<RingSetup, Refusal> {
        // First, so that a driver that needs more queues than there are is told so.
        if self.kicked && !self.name.is_controlq && self.name.pair() >= pairs {
            return Err(Refusal::NotOffered { pairs });
        }
        let features = ring_features(features.ok_or(Refusal::NoFeatures)?);
        if memory.is_empty() {
            return Err(Refusal::NoMemory);
        }
        let size = self.size.ok_or(Refusal::NoSize)?;
        let addresses = self.addresses.ok_or(Refusal::NoAddresses)?;
        if !self.kicked {
            return Err(Refusal::NotStarted);
        }
        let (descriptors, available, used) = addresses
            .places(memory, size, features)
            .ok_or_else(|| addresses.refusal(memory))?;
        let base = self.base.unwrap_or(first_base(features.packed));
        let memory = Arc::clone(memory);
        Ok(RingSetup {
            size,
            descriptors,
            available,
            used,
            features,
            base,
            memory,
            redo: None,
        })
    }

    /// Starts the ring; returns its base.
    pub(super) fn start(&mut self, setup: &RingSetup) -> Result<u32, Refusal> {
        let running = Running::start(self.name, setup)?;
        // A page that the start has touched already: for this alone none of the guest's is.
        self.node = node_of(&[setup.used.window().address()]);
        self.broken_reported = false;
        self.touched = false;
        let base = running.base();
        self.usage = Usage::begin(base);
        self.left_out = false;
        self.no_record = None;
        self.running = Some(running);
        Ok(base)
    }

    /// The one call that every start owes its driver, which may sleep on work that was finished
    /// before.
    pub(super) fn call_started(&self) {
        let Some(call) = &self.call else {
            // The first descriptor of a running ring is called for being new.
            return;
        };
        let wanted = match &self.running {
            Some(Running::Receive(queue)) => queue.take_call_wanted(),
            Some(Running::Transmit(queue)) => queue.take_call_wanted(&FullBarrier::new()),
            // A driver waits for what it has commanded, and that is returned from here on.
            Some(Running::Control(_)) | None => false,
        };
        if wanted {
            call.owe();
        }
    }

    /// Takes the page faults of a receiveq's first buffers, so that no poll thread has to. A driver
    /// may post them after its ring has started: then at a later call.
    pub(super) fn touch(&mut self) {
        if let Some(Running::Receive(queue)) = &self.running
            && !self.touched
        {
            self.touched = queue.touch_buffers();
        }
    }

    /// The ring as a poll thread's transmitq.
    pub(super) fn transmit(&self, enabled: bool) -> Option<Transmit> {
        match &self.running {
            Some(Running::Transmit(queue)) => Some(Transmit {
                queue: Arc::clone(queue),
                kick: self.kick.clone(),
                call: self.call.clone(),
                enabled,
            }),
            _ => None,
        }
    }

    /// The ring as a place to deliver to.
    pub(super) fn receive(&self, enabled: bool) -> Option<Receive> {
        match &self.running {
            Some(Running::Receive(queue)) => Some(Receive {
                queue: Arc::clone(queue),
                call: self.call.clone(),
                enabled,
            }),
            _ => None,
        }
    }
}

/// Whether a ring may have this many entries; `packed` where the ring is or may become a packed
/// one.
pub(super) fn size_possible(size: u32, packed: bool) -> Option<u16> {
    let possible = (1..=MAX_RING_SIZE).contains(&size) && (packed || size.is_power_of_two());
    u16::try_from(size).ok().filter(|_| possible)
}
