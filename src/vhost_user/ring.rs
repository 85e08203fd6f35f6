//! One vring: what the frontend said about it, and the queue once it runs.
//!
//! **When a ring starts.** A ring starts once its size, its addresses, its kick descriptor (or the
//! message that it has none), the features and the memory are known. It runs until GET_VRING_BASE.
//! The messages may come in any order: QEMU, cloud-hypervisor and DPDK each use another one.
//!
//! **Where a ring starts.** A split ring starts at the `used.idx` in its memory, whatever
//! SET_VRING_BASE said. A difference is logged. This start is exact for QEMU, for cloud-hypervisor
//! (which sends its available index) and for DPDK's virtio-user (which sends 0). A packed ring
//! starts where SET_VRING_BASE says, unless the switch was restarted. Nothing in the ring's memory
//! tells its position, so the position is kept in a record (`virtio::redo`).
//!
//! **The call at a start.** Every start makes a new queue object, and the session calls the driver
//! once. The driver may be asleep, waiting for work that was finished before a restart. No poll
//! thread makes that call, because its other guests would wait. A new call descriptor of a running
//! ring is called too, once all poll threads have acknowledged it. A call through the old
//! descriptor may not have reached the driver.
//!
//! **A disabled ring.** Frames on a disabled ring are discarded, as the protocol says. But a
//! transmitq for which SET_VRING_ENABLE never came waits for it. Frontends send that message last,
//! and a guest's pending frames must survive a restart of the switch.

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

/// Base of a packed ring without SET_VRING_BASE: slot 0, both wrap counters 1 (virtio 1.2 §2.8.1).
const PACKED_START: u32 = 0x8000_8000;

/// Returns the base of a ring without SET_VRING_BASE.
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
    /// SET_VRING_KICK has not come since the ring last stopped.
    #[error("the driver has not started it")]
    NotStarted,
    /// A controlq without a command so far.
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
    /// Whether the ring only waits for a message or a command that is still to come.
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

/// SET_VRING_ADDR: user addresses of the frontend, translated anew for every memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// The three areas of a ring in guest memory.
type Places = (PinnedWindow, PinnedWindow, PinnedWindow);

impl Addresses {
    /// Returns the three areas; `None` unless each area lies within one region.
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

    /// Returns the position, as GET_VRING_BASE answers it.
    pub(super) fn base(&self) -> u32 {
        match self {
            Running::Receive(queue) => queue.base(),
            Running::Transmit(queue) => queue.base(),
            Running::Control(queue) => queue.base(),
        }
    }

    /// Whether the ring has available buffers that the switch has not taken yet.
    pub(super) fn has_available(&self) -> bool {
        match self {
            Running::Receive(queue) => queue.has_available(),
            Running::Transmit(queue) => queue.has_available(),
            Running::Control(queue) => queue.has_available(),
        }
    }

    /// Whether the driver seems never to have written to its area of the ring. Only a part of that
    /// area is read.
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
    /// The base that the frontend last sent or was last told. It will send this base again if it
    /// loses its connection.
    pub(super) asked: u32,
    /// SET_VRING_KICK came since the ring last stopped, with a descriptor or without.
    pub(super) kicked: bool,
    pub(super) kick: Option<Arc<KickFd>>,
    pub(super) call: Option<Arc<CallFd>>,
    /// The post in which the call descriptor replaced an older one. Poll threads may use the older
    /// one until they have acknowledged this post.
    pub(super) spare_after: Option<Ticket>,
    /// The value of SET_VRING_ENABLE, once it has come. `Some(false)` is set only while the ring
    /// runs, and is forgotten when the ring is halted.
    pub(super) enable: Option<bool>,
    pub(super) running: Option<Running>,
    /// Why the ring does not run, found at the last attempt to start it.
    pub(super) refusal: Option<Refusal>,
    /// Whether it was reported that the ring is broken.
    pub(super) broken_reported: bool,
    /// Whether the first buffers of a receiveq were touched since its start.
    touched: bool,
    /// Whether the driver has used the ring since its start.
    pub(super) usage: Usage,
    /// Whether this receiveq is enabled but gets no flows because it was never used, see `look`.
    pub(super) left_out: bool,
    /// Why the ring has no record that outlives the switch; `None` if it has one or needs none.
    pub(super) no_record: Option<Arc<str>>,
    /// NUMA node of the ring's memory, found when the ring last started, if the kernel tells.
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

    /// Returns the NUMA node of a ring that runs, if the kernel tells.
    pub(super) fn numa_node(&self) -> Option<usize> {
        self.running.as_ref().and(self.node)
    }

    /// Forgets everything but the call descriptor. A frontend that resets its device sends the rest
    /// again.
    pub(super) fn reset(&mut self) {
        let call = self.call.take();
        *self = Vring {
            call,
            ..Vring::new(self.name.index)
        };
    }

    /// Whether the frontend has set what it sets only for rings that a driver uses: size, addresses
    /// or kick.
    pub(super) fn is_told(&self) -> bool {
        self.size.is_some() || self.addresses.is_some() || self.kicked
    }

    /// Whether the ring does not run, or its frontend has disabled it.
    pub(super) fn is_idle(&self) -> bool {
        self.running.is_none() || self.enable == Some(false)
    }

    /// Keeps the stopped ring from starting until the next kick descriptor comes. Returns the
    /// ring's base.
    pub(super) fn halt(&mut self, features: Option<u64>) -> u32 {
        self.kicked = false;
        self.kick = None;
        // A disabled ring counts as not told: what the driver puts into it before the next
        // SET_VRING_ENABLE is kept, not discarded.
        self.enable = self.enable.filter(|enabled| *enabled);
        // A frontend that passes on the reset of one ring (VIRTIO_F_RING_RESET) starts the ring
        // again without a new call descriptor.
        if !features.is_some_and(has_ring_reset) {
            self.call = None;
        }
        // A frontend saves the answer and restores it unchanged. So the answer for a packed ring
        // that never ran must be a position in the first lap.
        let packed = features.is_some_and(|features| ring_features(features).packed);
        self.asked = self.base.unwrap_or(first_base(packed));
        self.asked
    }

    /// Returns what the ring needs to start, or what is missing or wrong.
    pub(super) fn setup(
        &self,
        features: Option<u64>,
        memory: &Arc<GuestMemory>,
        pairs: u16,
    ) -> Result<RingSetup, Refusal> {
        // This check comes first, so that the reason for a driver with too many queues is not
        // hidden by another one.
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
        // The start has touched this page already, so it exists. No page of the guest is touched
        // only to ask for its node.
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

    /// Notes the one call that every start owes its driver. The driver may be asleep, waiting for
    /// work that was finished before a restart.
    pub(super) fn call_started(&self) {
        let Some(call) = &self.call else {
            // Without a descriptor now: the first one that comes is called because it is new.
            return;
        };
        let wanted = match &self.running {
            Some(Running::Receive(queue)) => queue.take_call_wanted(),
            Some(Running::Transmit(queue)) => queue.take_call_wanted(&FullBarrier::new()),
            // A driver waits for the answers to its commands, which are all given after this start.
            Some(Running::Control(_)) | None => false,
        };
        if wanted {
            call.owe();
        }
    }

    /// Touches a receiveq's first buffers, so that no poll thread takes their page faults. A driver
    /// may post its buffers after the start. Then a later call touches them.
    pub(super) fn touch(&mut self) {
        if let Some(Running::Receive(queue)) = &self.running
            && !self.touched
        {
            self.touched = queue.touch_buffers();
        }
    }

    /// Returns the ring as poll threads take frames from it; `None` unless it is a running
    /// transmitq.
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

    /// Returns the ring as poll threads deliver into it; `None` unless it is a running receiveq.
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

/// Returns `size` if a ring may have this many entries. `packed`: the ring is packed, or may become
/// packed.
pub(super) fn size_possible(size: u32, packed: bool) -> Option<u16> {
    let possible = (1..=MAX_RING_SIZE).contains(&size) && (packed || size.is_power_of_two());
    u16::try_from(size).ok().filter(|_| possible)
}
