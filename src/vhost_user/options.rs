//! What a session offers to its frontend.
//!
//! RSS and HASH_REPORT are not offered. Pollux keeps no indirection table, and reports no hash of a
//! frame to its receiver.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_config::{
    VIRTIO_F_ANY_LAYOUT, VIRTIO_F_IN_ORDER, VIRTIO_F_NOTIFY_ON_EMPTY, VIRTIO_F_RING_PACKED,
    VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_SPEED_DUPLEX, VIRTIO_NET_F_STANDBY, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::records::RingRecords;
use crate::virtio::RingFeatures;
use crate::virtio::features::without_unmet;

const fn bit(number: u32) -> u64 {
    1 << number
}

const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
const MQ: u64 = bit(VIRTIO_NET_F_MQ);
const CTRL_VQ: u64 = bit(VIRTIO_NET_F_CTRL_VQ);

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
    // Cloud-hypervisor offers its guest only features that the backend offers, too, and MQ needs
    // CTRL_VQ. Receive modes, VLANs and the address are best effort in virtio (§5.1.6.5): a port
    // that passes more frames than the driver asked for complies.
    | CTRL_VQ
    | bit(VIRTIO_NET_F_CTRL_RX)
    | bit(VIRTIO_NET_F_CTRL_VLAN)
    | bit(VIRTIO_NET_F_CTRL_MAC_ADDR)
    | PROTOCOL_FEATURES;

/// Bits that a frontend may acknowledge although they are not offered. Each concerns only the
/// configuration space of the device, which is the frontend's. So these bits ask nothing of a
/// backend and change no byte of a ring. Dragonball acknowledges MTU and MAC. DPDK's backend
/// accepts MTU, too. Every other bit could change what the guest writes or reads, and ends the
/// session.
const CONFIGURATION: u64 = bit(VIRTIO_NET_F_MTU)
    | bit(VIRTIO_NET_F_MAC)
    | bit(VIRTIO_NET_F_STATUS)
    | bit(VIRTIO_NET_F_STANDBY)
    | bit(VIRTIO_NET_F_SPEED_DUPLEX);

/// Offered in addition to frontends that pass on the reset of one ring. QEMU 7.2 does not: it
/// accepts the driver's reset and tells the backend nothing, which then serves a ring that no
/// longer exists.
pub const RING_RESET: u64 = bit(VIRTIO_F_RING_RESET);

/// Everything that may be offered.
pub const SUPPORTED_FEATURES: u64 = OFFERED_FEATURES | RING_RESET | MQ;

/// Protocol features: several queues, acknowledgements, single memory regions, reset.
pub(super) const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::RESET_DEVICE);

/// Most queue pairs: KICK, CALL and ERR name a ring with 8 bits.
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
    /// Where the records of packed rings are kept; `None`: nowhere, so packed rings do not survive
    /// a restart of the switch.
    pub records: Option<RingRecords>,
}

impl SessionOptions {
    /// Options with [`OFFERED_FEATURES`], this many queue pairs and no records.
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

    /// Returns the virtio features as GET_FEATURES answers them. MQ is among them if there is more
    /// than one pair. A feature is left out if a feature that it needs is missing.
    pub(super) fn offered(&self) -> u64 {
        let several = if self.pairs() > 1 { MQ } else { 0 };
        without_unmet((self.features & SUPPORTED_FEATURES & !MQ) | several | PROTOCOL_FEATURES)
    }

    /// Returns all features that a frontend may acknowledge.
    pub(super) fn acceptable(&self) -> u64 {
        self.offered() | CONFIGURATION
    }

    /// Returns the answer to GET_QUEUE_NUM. QEMU compares the answer with its queue pairs,
    /// cloud-hypervisor with its rings. crosvm and libkrun make as many rings as the answer says,
    /// and a driver needs the third ring for its commands.
    pub(super) fn queue_num(&self) -> u16 {
        let controlled = self.offered() & CTRL_VQ != 0;
        self.pairs().max(if controlled { 3 } else { 2 })
    }

    /// Returns the number of rings that can be configured: two for each pair that GET_QUEUE_NUM
    /// answered, and the controlq after them. Settings of rings of pairs that are not offered are
    /// kept, but these rings never start.
    pub(super) fn rings(&self) -> u16 {
        (2 * self.queue_num() + 1).min(MAX_RINGS)
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

/// Returns which ring is the controlq; `None` without CTRL_VQ.
pub(super) fn controlq(features: u64) -> Option<Controlq> {
    match (features & CTRL_VQ != 0, features & MQ != 0) {
        (false, _) => None,
        (true, false) => Some(Controlq::Third),
        (true, true) => Some(Controlq::Last),
    }
}

/// Which ring is the controlq (virtio 1.2 §5.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Controlq {
    /// Without MQ.
    Third,
    /// With MQ: ring 2 × max_virtqueue_pairs. The frontend tells this number to its guest only.
    Last,
}

/// Whether SET_VRING_ENABLE exists. Without the bit VHOST_USER_F_PROTOCOL_FEATURES every ring is
/// enabled.
pub(super) fn has_enable(features: u64) -> bool {
    features & PROTOCOL_FEATURES != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::features::unmet;

    /// Every set of features that options can ask for, with every kind of number of pairs.
    #[test]
    fn every_offer_has_what_its_features_need() {
        let bits: Vec<u64> = (0..u64::BITS)
            .map(bit)
            .filter(|bit| SUPPORTED_FEATURES & bit != 0)
            .collect();
        let usual = [0, RING_RESET].map(|more| OFFERED_FEATURES | more);
        let subsets = (0..1_u64 << bits.len()).map(|set| {
            let of_set = bits.iter().enumerate().filter(|(at, _)| set >> at & 1 == 1);
            of_set.fold(0, |features, (_, bit)| features | bit)
        });
        for features in subsets.chain(usual).chain([u64::MAX]) {
            for queue_pairs in [0, 1, 2, 3, 8, 128, u16::MAX] {
                let options = SessionOptions {
                    features,
                    ..SessionOptions::new(queue_pairs)
                };
                let offered = options.offered();
                assert_eq!(unmet(offered), None, "{features:#x}, {queue_pairs} pairs");
                assert_eq!(offered & !SUPPORTED_FEATURES, 0);
                assert!(queue_pairs < 2 || offered & CTRL_VQ == 0 || offered & MQ != 0);
                assert!(options.queue_num() >= options.pairs().max(2));
            }
        }
    }

    #[test]
    fn there_are_rings_for_pairs_and_commands() {
        let counts = |pairs| {
            let options = SessionOptions::new(pairs);
            (options.queue_num(), options.rings())
        };
        assert_eq!((counts(1), counts(2)), ((3, 7), (3, 7)));
        assert_eq!((counts(8), counts(128)), ((8, 17), (128, 256)));
    }
}
