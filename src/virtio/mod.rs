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
//! | [`ControlQueue`] | takes commands and returns them answered, one owner at all |
//! | [`TransmitQueue`] | takes chains and completes them, one owner at a time |
//! | [`ReceiveQueue`] | delivers, any thread at any time |
//! | [`Claim`] | what one thread has claimed of it, until it commits |
//! | [`driver`] | the other side of both rings, for the load generator and tests |
//!
//! All of it reads memory that a hostile guest writes at the same time: values are read once into
//! locals, checked there, and used from there. Three classes of trouble: a *malformed chain* is
//! returned with length 0 and counted, and the ring goes on; an *impossible ring* ([`Broken`])
//! stops this ring until its next start; nothing is ever fatal.

/// In test builds, whether the calling thread makes a deliberate mistake here (`mutants`).
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

/// Largest ring (virtio 1.2 §2.7 and §2.8: at most 2^15 entries).
pub const MAX_RING_SIZE: u32 = 32768;
/// Bytes of the virtio-net header with `num_buffers` (virtio 1.2 §5.1.6).
pub const NET_HDR_SIZE: usize = 12;
/// The same without it: legacy drivers that have not negotiated mergeable buffers (§5.1.6.1).
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
    /// Bytes of the virtio-net header in every buffer of the device's rings.
    pub fn header(self) -> usize {
        if self.version_1 || self.mergeable {
            NET_HDR_SIZE
        } else {
            LEGACY_NET_HDR_SIZE
        }
    }
}

/// Everything a ring needs to start; the windows hold the regions they lie in.
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
    /// The value of SET_VRING_BASE, as sent. A split ring starts at its own `used.idx` all the
    /// same.
    pub base: u32,
    /// The guest's memory, for the addresses in descriptors.
    pub memory: Arc<GuestMemory>,
    /// The ring's record, where one is kept; packed rings only.
    pub redo: Option<Redo>,
}

/// Why a ring does not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// No power of two (split), zero or above 32768.
    #[error("a ring of {0} entries is not possible")]
    Size(u16),
    /// A part of the ring is longer than the memory it was found in.
    #[error("the ring is not wholly in guest memory")]
    Short,
    /// Descriptors need 16 bytes, the used ring 4, the available ring 2 (packed: 16, 4, 4).
    #[error("a part of the ring is not aligned as the specification demands")]
    Alignment,
    /// A packed ring's base names a slot outside the ring.
    #[error("ring base {0:#x} is outside the ring")]
    Base(u32),
}

/// Why a ring is broken: something that no driver may do and that cannot be answered. It heals with
/// the ring's next start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The available index is further ahead than the ring has entries.
    #[error("available index is {ahead} entries ahead in a ring of {size}")]
    AvailableIndex {
        /// Distance from our position.
        ahead: u16,
        /// Entries.
        size: u16,
    },
    /// An available entry names no descriptor, so that it cannot be returned either.
    #[error("available entry names descriptor {head} in a ring of {size}")]
    Head {
        /// The index found.
        head: u16,
        /// Entries.
        size: u16,
    },
    /// A chain in a packed ring has no end, or none where one is looked for.
    #[error("a chain has no end within {size} descriptors")]
    EndlessChain {
        /// Entries of the ring, or as many of them as are read in search of the end.
        size: u16,
    },
}

/// Set once by whoever finds the ring broken, read by everybody.
#[derive(Debug, Default)]
struct BrokenMark(OnceLock<Broken>);

impl BrokenMark {
    #[inline(always)]
    fn is_set(&self) -> bool {
        self.0.get().is_some()
    }

    #[cold]
    fn set(&self, broken: Broken) {
        // The first reason stays; OnceLock's own lock is never waited for: the value is ready.
        let _ = self.0.set(broken);
    }

    fn get(&self) -> Option<Broken> {
        self.0.get().copied()
    }
}

/// A chain's identity: what goes back to the driver, and how many positions it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Split: index of the first descriptor. Packed: buffer id.
    pub id: u16,
    /// Positions: 1 (split), descriptors in the ring (packed).
    pub span: u16,
}

/// A chain found available: its head, and the bytes of its buffers or why it cannot be used.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    /// What goes back to the driver.
    pub head: Head,
    /// Bytes collected.
    pub len: Result<u32, ChainError>,
}

/// Descriptors that are looked at to see whether a driver has ever written any.
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
    /// Starts a ring; returns it with its first position.
    pub fn start(setup: &RingSetup) -> Result<(Self, u64), SetupError> {
        if setup.features.packed {
            packed::PackedRing::start(setup).map(|(ring, at)| (Ring::Packed(ring), at))
        } else {
            split::SplitRing::start(setup).map(|(ring, at)| (Ring::Split(ring), at))
        }
    }

    /// No position from here on can be available; before it, [`Ring::read_chain`] decides.
    #[inline(always)]
    pub fn available_to(&self, position: u64) -> Result<u64, Broken> {
        match self {
            Ring::Split(ring) => ring.available_to(position),
            // A packed ring has no index: each head says for itself.
            Ring::Packed(_) => Ok(u64::MAX),
        }
    }

    /// Whether [`Ring::available_to`] is the end of what is available, and not only a bound.
    #[inline(always)]
    fn knows_its_end(&self) -> bool {
        matches!(self, Ring::Split(_))
    }

    /// Asks for the line that says whether `position` is available.
    #[inline(always)]
    fn prefetch_available(&self, position: u64) {
        match self {
            Ring::Split(ring) => ring.prefetch_available(),
            Ring::Packed(ring) => ring.prefetch_available(position),
        }
    }

    /// Asks for the other lines of the chain at `position`, if it is available.
    #[inline(always)]
    fn prefetch_next(&self, position: u64) {
        match self {
            Ring::Split(ring) => ring.prefetch_next(position),
            // All there is to a descriptor is in one line.
            Ring::Packed(_) => {}
        }
    }

    /// The end of what is available from `position` on, at most `end`. Not for every claim: a
    /// packed ring is searched.
    pub fn free_to(&self, position: u64, end: u64) -> u64 {
        let available = match self.available_to(position) {
            Ok(u64::MAX) => {
                // Drivers make descriptors available in order; for one that does not, this is just
                // a number.
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
            // An impossible ring is found by the next claim.
            Err(_) => position,
        };
        available.min(end)
    }

    /// Whether the position is available.
    pub fn has_available(&self, position: u64) -> Result<bool, Broken> {
        match self {
            Ring::Split(ring) => ring.available_to(position).map(|end| end != position),
            Ring::Packed(ring) => Ok(ring.is_available(position)),
        }
    }

    /// Whether nothing was ever written to the driver's part of the ring: its first descriptors,
    /// and its index or event.
    pub fn is_blank(&self) -> bool {
        match self {
            Ring::Split(ring) => ring.is_blank(),
            Ring::Packed(ring) => ring.is_blank(),
        }
    }

    /// The chain at a position before [`Ring::available_to`], where it is available and one usable
    /// buffer: how most are. Anything else is for [`Ring::read_chain`].
    #[inline(always)]
    pub fn single(&self, position: u64, direction: Direction) -> Option<(Head, Window<'_>)> {
        match self {
            Ring::Split(ring) => ring.single(position, direction),
            Ring::Packed(ring) => ring.single(position, direction),
        }
    }

    /// The same of a transmitq, with its used element of length 0 written.
    #[inline(always)]
    fn take_single(&self, position: u64) -> Option<(Head, Window<'_>)> {
        match self {
            Ring::Split(ring) => ring.take_single(position),
            Ring::Packed(ring) => ring.take_single(position),
        }
    }

    /// Reads the chain at a position before [`Ring::available_to`]; `None` if it is not available.
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

    /// Reads the command at a position before [`Ring::available_to`], and where in `windows` the
    /// room for its answer begins; `None` if it is not available.
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

    /// The number that GET_VRING_BASE answers for a position.
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
