//! Virtqueues from the device's side (virtio 1.2, §2.6 to §2.8).

pub mod driver;

use std::sync::Arc;

use crate::memory::{GuestMemory, PinnedWindow};

/// Largest ring (virtio 1.2 §2.7 and §2.8: at most 2^15 entries).
pub const MAX_RING_SIZE: u32 = 32768;

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
    /// The value of SET_VRING_BASE, as sent. A split ring starts at its own `used.idx` all the same.
    pub base: u32,
    /// The guest's memory, for the addresses in descriptors.
    pub memory: Arc<GuestMemory>,
}
