//! What a session offers to its frontend.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_config::{
    VIRTIO_F_ANY_LAYOUT, VIRTIO_F_IN_ORDER, VIRTIO_F_NOTIFY_ON_EMPTY, VIRTIO_F_RING_PACKED,
    VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::records::RingRecords;
use crate::virtio::RingFeatures;

const fn bit(number: u32) -> u64 {
    1 << number
}

const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
const MQ: u64 = bit(VIRTIO_NET_F_MQ);

/// What is offered unless the operator asks for something else.
pub const OFFERED_FEATURES: u64 = bit(VIRTIO_F_VERSION_1)
    | bit(VIRTIO_NET_F_MRG_RXBUF)
    | bit(VIRTIO_RING_F_INDIRECT_DESC)
    | bit(VIRTIO_RING_F_EVENT_IDX)
    | bit(VIRTIO_F_IN_ORDER)
    | bit(VIRTIO_F_RING_PACKED)
    // For legacy drivers. Their headers may share a buffer with the frame anyway.
    | bit(VIRTIO_F_ANY_LAYOUT)
    | bit(VIRTIO_F_NOTIFY_ON_EMPTY)
    | PROTOCOL_FEATURES;

/// What is offered to frontends that pass a reset of one ring on, which QEMU 7.2 does not: it tells the driver yes, and
/// the backend nothing, which then serves a ring that is no more.
pub const RING_RESET: u64 = bit(VIRTIO_F_RING_RESET);

/// Everything that may be offered.
pub const SUPPORTED_FEATURES: u64 = OFFERED_FEATURES | RING_RESET | MQ;

/// Protocol features: several queues, acknowledgements, single memory regions, reset.
pub(super) const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::RESET_DEVICE);

/// KICK, CALL and ERR name a ring in 8 bits.
const MAX_PAIRS: u16 = 128;
/// Most rings of one session.
pub(super) const MAX_RINGS: u16 = 2 * MAX_PAIRS;

/// What one session offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Queue pairs that may carry frames; 1 to 128.
    pub queue_pairs: u16,
    /// Virtio features to offer; bits outside [`SUPPORTED_FEATURES`] are ignored.
    pub features: u64,
    /// Where packed rings keep what they need after a restart of the switch, if anywhere.
    pub records: Option<RingRecords>,
}

impl SessionOptions {
    /// The usual features for this many queue pairs.
    pub fn new(queue_pairs: u16) -> Self {
        SessionOptions {
            queue_pairs,
            features: OFFERED_FEATURES,
            records: None,
        }
    }

    pub(super) fn pairs(&self) -> u16 {
        self.queue_pairs.clamp(1, MAX_PAIRS)
    }

    /// Virtio features as GET_FEATURES answers them. A driver that sees MQ may configure a control queue
    /// for it, so it is offered only where there is more than one pair.
    pub(super) fn offered(&self) -> u64 {
        let several = if self.pairs() > 1 { MQ } else { 0 };
        (self.features & SUPPORTED_FEATURES & !MQ) | several | PROTOCOL_FEATURES
    }

    /// The answer to GET_QUEUE_NUM. QEMU compares it with its queue pairs and cloud-hypervisor with its
    /// rings, so a single pair must be announced as 2.
    pub(super) fn queue_num(&self) -> u16 {
        self.pairs().max(2)
    }

    /// Rings that can be configured: pairs of whatever GET_QUEUE_NUM answered. Those of pairs that are not
    /// offered are remembered and never started.
    pub(super) fn rings(&self) -> u16 {
        2 * self.queue_num()
    }
}

/// The features that change how rings are read and written.
pub(super) fn ring_features(features: u64) -> RingFeatures {
    let has = |number| features & bit(number) != 0;
    RingFeatures {
        packed: has(VIRTIO_F_RING_PACKED),
        event_idx: has(VIRTIO_RING_F_EVENT_IDX),
        indirect: has(VIRTIO_RING_F_INDIRECT_DESC),
        in_order: has(VIRTIO_F_IN_ORDER),
        version_1: has(VIRTIO_F_VERSION_1),
        mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
        notify_on_empty: has(VIRTIO_F_NOTIFY_ON_EMPTY),
    }
}

/// Whether the driver may reset one ring (VIRTIO_F_RING_RESET).
pub(super) fn has_ring_reset(features: u64) -> bool {
    features & RING_RESET != 0
}

/// Without the protocol feature bit there is no SET_VRING_ENABLE, and every ring is enabled.
pub(super) fn has_enable(features: u64) -> bool {
    features & PROTOCOL_FEATURES != 0
}
