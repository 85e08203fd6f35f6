//! Virtqueues from the device's side (virtio 1.2 §2.6 to §2.8), written for several poll threads.
//!
//! | file | what it knows |
//! |---|---|
//! | [`claim`] | claim, fill, commit, publish: private atomics only |
//! | [`chain`] | descriptors, chains, indirect tables |
//! | [`features`] | which feature bits need others |
//! | [`split`], [`packed`] | one ring in guest memory each; [`Ring`] is the enum of the two |
//! | `share` | who may have the last buffers of a ring that is short of them |
//! | [`redo`] | what outlives the process, for packed rings |
//! | [`ControlQueue`] | returns commands with their answers; only its session uses it |
//! | [`TransmitQueue`] | takes chains and completes them, one owner at a time |
//! | [`ReceiveQueue`] | delivers, any thread at any time |
//! | [`Claim`] | what one thread has claimed in a receiveq, until the thread commits |
//! | [`driver`] | the other side of both rings, for the load generator and tests |
//!
//! Everything here reads memory that a hostile guest writes at the same time. So a value is read
//! once into a local, checked there, and used from there. There are two classes of trouble, and
//! neither is fatal to the process:
//!
//! - A *malformed chain* is returned with length 0 and counted, and the ring goes on.
//! - An *impossible ring* ([`Broken`]) stops this ring until its next start.

/// In test builds: whether the calling thread makes a deliberate mistake here (`mutants`). In other
/// builds: the constant `false`.
#[cfg(test)]
macro_rules! mutant {
    ($name:ident) => {
        super::mutants::is(super::mutants::Mutant::$name)
    };
}
#[cfg(not(test))]
macro_rules! mutant {
    ($name:ident) => {
        false
    };
}

pub mod chain;
pub mod claim;
#[cfg(test)]
mod claim_tests;
mod controlq;
pub mod features;
#[cfg(test)]
mod mutants;
mod open_claim;
pub mod packed;
#[cfg(test)]
pub(crate) mod park;
mod receiveq;
pub mod redo;
#[cfg(test)]
mod redo_tests;
mod share;
pub mod split;
mod transmitq;

pub mod driver;

use std::sync::Arc;
use std::sync::OnceLock;

use chain::{ChainError, Collector, Direction, Windows};
use claim::Publish;
use redo::Redo;

pub use controlq::{Command, ControlQueue};
pub use open_claim::{CLAIM_FRAMES, Claim};
pub use receiveq::{CLAIM_BYTES, NoClaim, ReceiveQueue};
pub use transmitq::{FullBarrier, Taken, TransmitQueue};

use crate::memory::{GuestMemory, PinnedWindow, Window};

/// Entries of the largest ring (virtio 1.2 §2.7 and §2.8: at most 2^15).
pub const MAX_RING_SIZE: u32 = 32768;
/// Bytes of the virtio-net header with `num_buffers` (virtio 1.2 §5.1.6).
pub const NET_HDR_SIZE: usize = 12;
/// Bytes of the virtio-net header without `num_buffers`, for legacy drivers that have not
/// negotiated mergeable buffers (§5.1.6.1).
pub const LEGACY_NET_HDR_SIZE: usize = 10;

/// Negotiated features that change how a ring is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// VIRTIO_F_RING_PACKED.
    pub packed: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// VIRTIO_F_VERSION_1 (12-byte header always).
    pub version_1: bool,
    /// VIRTIO_NET_F_MRG_RXBUF.
    pub mergeable: bool,
    /// VIRTIO_F_NOTIFY_ON_EMPTY, of legacy drivers.
    pub notify_on_empty: bool,
}

impl RingFeatures {
    /// Returns the bytes of the virtio-net header before each frame.
    pub fn header(self) -> usize {
        if self.version_1 || self.mergeable {
            NET_HDR_SIZE
        } else {
            LEGACY_NET_HDR_SIZE
        }
    }
}

/// Everything that a ring needs to start. The windows keep the regions alive that they lie in.
#[derive(Clone, Debug)]
pub struct RingSetup {
    /// Entries: a power of two for split rings, 1 to 32768.
    pub size: u16,
    /// Descriptor table (split) or descriptor ring (packed).
    pub descriptors: PinnedWindow,
    /// Available ring (split) or driver event suppression (packed).
    pub available: PinnedWindow,
    /// Used ring (split) or device event suppression (packed).
    pub used: PinnedWindow,
    /// Negotiated features.
    pub features: RingFeatures,
    /// The value of SET_VRING_BASE, as sent. A split ring ignores it and starts at its own
    /// `used.idx`.
    pub base: u32,
    /// The guest's memory, for the addresses in descriptors.
    pub memory: Arc<GuestMemory>,
    /// The ring's record, if one is kept. Only packed rings have records.
    pub redo: Option<Redo>,
}

/// Why a ring does not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// The size is no power of two (split), or zero or above 32768.
    #[error("a ring of {0} entries is not possible")]
    Size(u16),
    /// A part of the ring is longer than the memory region that it begins in.
    #[error("the ring is not wholly in guest memory")]
    Short,
    /// Descriptors need 16 bytes, the used ring 4, the available ring 2 (packed: 16, 4, 4).
    #[error("a part of the ring is not aligned as the specification demands")]
    Alignment,
    /// A packed ring's base names a slot outside the ring.
    #[error("ring base {0:#x} is outside the ring")]
    Base(u32),
}

/// Why a ring is broken: the driver did something that no driver may do, and that cannot be
/// answered. The ring's next start heals it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The available index is further ahead than the ring has entries.
    #[error("available index is {ahead} entries ahead in a ring of {size}")]
    AvailableIndex {
        /// Distance from the device's position.
        ahead: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// An available entry names no descriptor of the ring. So the entry cannot be returned either.
    #[error("available entry names descriptor {head} in a ring of {size}")]
    Head {
        /// The index found.
        head: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A chain in a packed ring does not end within the ring, or within `LONGEST_WALK` descriptors.
    #[error("a chain has no end within {size} descriptors")]
    EndlessChain {
        /// Entries of the ring, or `LONGEST_WALK` if the ring has more.
        size: u16,
    },
}

/// The reason why a ring is broken. Any thread may set it, once; all threads read it.
#[derive(Debug, Default)]
struct BrokenMark(OnceLock<Broken>);

impl BrokenMark {
    #[inline(always)]
    fn is_set(&self) -> bool {
        self.0.get().is_some()
    }

    #[cold]
    fn set(&self, broken: Broken) {
        // The first reason stays. No thread waits for the lock inside OnceLock, because the value
        // is ready when `set` is called.
        let _ = self.0.set(broken);
    }

    fn get(&self) -> Option<Broken> {
        self.0.get().copied()
    }
}

/// A chain's identity: the number that goes back to the driver, and how many positions the chain
/// covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Split: index of the first descriptor. Packed: buffer id of the last descriptor (§2.8.6).
    pub id: u16,
    /// Number of positions: 1 (split), or the descriptors in the ring (packed).
    pub span: u16,
}

/// A chain that was found available: its head, and the length of its buffers or why they cannot be
/// used.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    /// Identity of the chain, which goes back to the driver.
    pub head: Head,
    /// Bytes of the buffers collected, or why the chain cannot be used.
    pub len: Result<u32, ChainError>,
}

/// Number of descriptors that are read to see whether a driver has ever written any.
const BLANK_DESCRIPTORS: usize = 256;

/// A started ring of either kind.
#[derive(Debug)]
pub enum Ring {
    /// Split virtqueue.
    Split(split::SplitRing),
    /// Packed virtqueue.
    Packed(packed::PackedRing),
}

impl Ring {
    /// Starts a ring. Returns the ring with its first position.
    pub fn start(setup: &RingSetup) -> Result<(Self, u64), SetupError> {
        if setup.features.packed {
            packed::PackedRing::start(setup).map(|(ring, at)| (Ring::Packed(ring), at))
        } else {
            split::SplitRing::start(setup).map(|(ring, at)| (Ring::Split(ring), at))
        }
    }

    /// Returns the end of the positions that can be available. Positions at or behind the end are
    /// not available. Before the end, [`Ring::read_chain`] decides.
    #[inline(always)]
    pub fn available_to(&self, position: u64) -> Result<u64, Broken> {
        match self {
            Ring::Split(ring) => ring.available_to(position),
            // A packed ring has no index. The flags of each head descriptor say whether it is
            // available.
            Ring::Packed(_) => Ok(u64::MAX),
        }
    }

    /// Whether [`Ring::available_to`] returns the exact end of what is available, and not only a
    /// bound.
    #[inline(always)]
    fn knows_its_end(&self) -> bool {
        matches!(self, Ring::Split(_))
    }

    /// Prefetches the line that says whether `position` is available.
    #[inline(always)]
    fn prefetch_available(&self, position: u64) {
        match self {
            Ring::Split(ring) => ring.prefetch_available(),
            Ring::Packed(ring) => ring.prefetch_available(position),
        }
    }

    /// Prefetches the other lines of the chain at `position`, if the chain is available.
    #[inline(always)]
    fn prefetch_next(&self, position: u64) {
        match self {
            Ring::Split(ring) => ring.prefetch_next(position),
            // A packed descriptor is in one line, which `prefetch_available` has prefetched.
            Ring::Packed(_) => {}
        }
    }

    /// Returns the end of what is available from `position` on, at most `end`. Too costly for every
    /// claim, because a packed ring is searched.
    pub fn free_to(&self, position: u64, end: u64) -> u64 {
        let available = match self.available_to(position) {
            Ok(u64::MAX) => {
                // A binary search, because drivers make descriptors available in order. For a
                // driver that does not, the result means nothing, and harms nothing.
                let (mut free, mut beyond) = (position, end);
                while free < beyond {
                    let middle = free + (beyond - free) / 2;
                    match self.has_available(middle) {
                        Ok(true) => free = middle + 1,
                        _ => beyond = middle,
                    }
                }
                free
            }
            Ok(available) => available,
            // The next claim finds the impossible ring, and marks it broken.
            Err(_) => position,
        };
        available.min(end)
    }

    /// Whether the position is available. Returns an error for an impossible ring.
    pub fn has_available(&self, position: u64) -> Result<bool, Broken> {
        match self {
            Ring::Split(ring) => ring.available_to(position).map(|end| end != position),
            Ring::Packed(ring) => Ok(ring.is_available(position)),
        }
    }

    /// Whether the driver never wrote anything: neither to the first descriptors nor to its index
    /// or event.
    pub fn is_blank(&self) -> bool {
        match self {
            Ring::Split(ring) => ring.is_blank(),
            Ring::Packed(ring) => ring.is_blank(),
        }
    }

    /// Returns the chain at a position before [`Ring::available_to`], if the chain is available and
    /// is one usable buffer. Most chains are. `None` means that [`Ring::read_chain`] decides.
    #[inline(always)]
    pub fn single(&self, position: u64, direction: Direction) -> Option<(Head, Window<'_>)> {
        match self {
            Ring::Split(ring) => ring.single(position, direction),
            Ring::Packed(ring) => ring.single(position, direction),
        }
    }

    /// As [`Ring::single`] for a transmitq, and also prepares the chain's used element of length 0:
    /// in the ring (split) or as a note (packed).
    #[inline(always)]
    fn take_single(&self, position: u64) -> Option<(Head, Window<'_>)> {
        match self {
            Ring::Split(ring) => ring.take_single(position),
            Ring::Packed(ring) => ring.take_single(position),
        }
    }

    /// Reads the chain at a position before [`Ring::available_to`], until `wanted` bytes are
    /// collected in `windows`. Returns `None` if the chain is not available.
    #[inline(never)]
    pub fn read_chain<'m, const N: usize>(
        &'m self,
        position: u64,
        direction: Direction,
        wanted: u32,
        windows: &mut Windows<'m, N>,
    ) -> Result<Option<Chain>, Broken> {
        match self {
            Ring::Split(ring) => ring
                .read_chain(position, direction, wanted, windows)
                .map(Some),
            Ring::Packed(ring) => ring.read_chain(position, direction, wanted, windows),
        }
    }

    /// Reads the command at a position before [`Ring::available_to`]. Returns the chain and where
    /// in `windows` the room for its answer begins, or `None` if no command is available.
    fn read_command<'m, const N: usize>(
        &'m self,
        position: u64,
        windows: &mut Windows<'m, N>,
    ) -> Result<Option<(Chain, Option<usize>)>, Broken> {
        let memory = match self {
            Ring::Split(ring) => ring.memory(),
            Ring::Packed(ring) => ring.memory(),
        };
        let mut collector = Collector::new(memory, Direction::Command, u32::MAX, windows);
        let chain = match self {
            Ring::Split(ring) => Some(ring.walk(position, &mut collector)?),
            Ring::Packed(ring) => ring.walk(position, &mut collector)?,
        };
        let answer = collector.answer();
        Ok(chain.map(|chain| (chain, answer)))
    }

    #[inline(always)]
    fn write_used(&self, position: u64, heads: impl Iterator<Item = (Head, u32)>) {
        match self {
            Ring::Split(ring) => ring.write_used(position, heads),
            Ring::Packed(ring) => ring.write_used(position, heads),
        }
    }

    fn want_kicks(&self, wanted: bool, position: u64) {
        match self {
            Ring::Split(ring) => ring.want_kicks(wanted, position),
            Ring::Packed(ring) => ring.want_kicks(wanted, position),
        }
    }

    /// Returns the answer to GET_VRING_BASE for a position.
    fn base(&self, position: u64) -> u32 {
        match self {
            Ring::Split(_) => u32::from(position as u16),
            Ring::Packed(ring) => ring.base(position),
        }
    }
}

impl Publish for Ring {
    #[inline(always)]
    fn publish(&self, from: u64, to: u64) {
        match self {
            Ring::Split(ring) => ring.publish(from, to),
            Ring::Packed(ring) => ring.publish(from, to),
        }
    }

    #[inline(always)]
    fn wants_call(&self, from: u64, to: u64) -> bool {
        match self {
            Ring::Split(ring) => ring.wants_call(from, to),
            Ring::Packed(ring) => ring.wants_call(from, to),
        }
    }
}
