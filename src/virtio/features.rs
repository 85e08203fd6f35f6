//! Feature bits that need others (virtio 1.2 §2.2.1, §5.1.3.1).
//!
//! A device must not offer a feature without the features that it needs. A driver that finds such
//! an offer refuses the card: Linux checks the offer in `virtnet_validate_features`. So one table
//! serves two users. A session offers nothing that breaks a rule. A guest of ours stops at an offer
//! that does.

use std::fmt;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HASH_REPORT,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MQ, VIRTIO_NET_F_NOTF_COAL, VIRTIO_NET_F_RSC_EXT,
    VIRTIO_NET_F_RSS, VIRTIO_NET_F_VQ_NOTF_COAL,
};

/// A feature, its name, and the features of which it needs at least one.
struct Rule {
    feature: u32,
    name: &'static str,
    one_of: &'static [u32],
}

const fn rule(feature: u32, name: &'static str, one_of: &'static [u32]) -> Rule {
    Rule {
        feature,
        name,
        one_of,
    }
}

const CTRL_VQ: &[u32] = &[VIRTIO_NET_F_CTRL_VQ];
const CSUM: &[u32] = &[VIRTIO_NET_F_CSUM];
const GUEST_CSUM: &[u32] = &[VIRTIO_NET_F_GUEST_CSUM];
const GUEST_TSO: &[u32] = &[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6];
const HOST_TSO: &[u32] = &[VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6];

/// The rules of §5.1.3.1, and what Linux checks in addition: a feature that is controlled by
/// commands needs the ring of commands.
const RULES: [Rule; 23] = [
    rule(VIRTIO_NET_F_GUEST_TSO4, "GUEST_TSO4", GUEST_CSUM),
    rule(VIRTIO_NET_F_GUEST_TSO6, "GUEST_TSO6", GUEST_CSUM),
    rule(VIRTIO_NET_F_GUEST_ECN, "GUEST_ECN", GUEST_TSO),
    rule(VIRTIO_NET_F_GUEST_UFO, "GUEST_UFO", GUEST_CSUM),
    rule(VIRTIO_NET_F_GUEST_USO4, "GUEST_USO4", GUEST_CSUM),
    rule(VIRTIO_NET_F_GUEST_USO6, "GUEST_USO6", GUEST_CSUM),
    rule(VIRTIO_NET_F_HOST_TSO4, "HOST_TSO4", CSUM),
    rule(VIRTIO_NET_F_HOST_TSO6, "HOST_TSO6", CSUM),
    rule(VIRTIO_NET_F_HOST_ECN, "HOST_ECN", HOST_TSO),
    rule(VIRTIO_NET_F_HOST_UFO, "HOST_UFO", CSUM),
    rule(VIRTIO_NET_F_HOST_USO, "HOST_USO", CSUM),
    rule(VIRTIO_NET_F_RSC_EXT, "RSC_EXT", HOST_TSO),
    rule(VIRTIO_NET_F_CTRL_RX, "CTRL_RX", CTRL_VQ),
    rule(VIRTIO_NET_F_CTRL_RX_EXTRA, "CTRL_RX_EXTRA", CTRL_VQ),
    rule(VIRTIO_NET_F_CTRL_VLAN, "CTRL_VLAN", CTRL_VQ),
    rule(VIRTIO_NET_F_CTRL_MAC_ADDR, "CTRL_MAC_ADDR", CTRL_VQ),
    rule(
        VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        "CTRL_GUEST_OFFLOADS",
        CTRL_VQ,
    ),
    rule(VIRTIO_NET_F_GUEST_ANNOUNCE, "GUEST_ANNOUNCE", CTRL_VQ),
    rule(VIRTIO_NET_F_MQ, "MQ", CTRL_VQ),
    rule(VIRTIO_NET_F_NOTF_COAL, "NOTF_COAL", CTRL_VQ),
    rule(VIRTIO_NET_F_HASH_REPORT, "HASH_REPORT", CTRL_VQ),
    rule(VIRTIO_NET_F_RSS, "RSS", CTRL_VQ),
    rule(VIRTIO_NET_F_VQ_NOTF_COAL, "VQ_NOTF_COAL", CTRL_VQ),
];

/// A feature that lacks another one that it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unmet {
    /// Bit number of the feature.
    pub feature: u32,
    name: &'static str,
    needs: &'static [u32],
}

impl fmt::Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let needs: Vec<String> = self.needs.iter().map(u32::to_string).collect();
        write!(
            f,
            "VIRTIO_NET_F_{} (bit {}) without bit {}, which it needs",
            self.name,
            self.feature,
            needs.join(" or ")
        )
    }
}

/// Returns the first feature of a set that lacks a feature which it needs, or `None`. A driver
/// refuses a device that offers a set with such a feature.
pub fn unmet(features: u64) -> Option<Unmet> {
    let has = |bit: &u32| features & (1 << bit) != 0;
    let rule = RULES
        .iter()
        .find(|rule| has(&rule.feature) && !rule.one_of.iter().any(has))?;
    Some(Unmet {
        feature: rule.feature,
        name: rule.name,
        needs: rule.one_of,
    })
}

/// Returns the largest part of a set in which every feature has what it needs.
pub fn without_unmet(mut features: u64) -> u64 {
    while let Some(unmet) = unmet(features) {
        features &= !(1 << unmet.feature);
    }
    features
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_need_others() {
        let set = |bits: &[u32]| bits.iter().fold(0, |set, bit| set | 1_u64 << bit);
        assert_eq!(unmet(0), None);
        assert_eq!(unmet(set(&[17, 22, 18, 23])), None);
        for bit in [18, 19, 20, 21, 22, 23, 53, 57, 60] {
            assert_eq!(unmet(set(&[bit])).map(|unmet| unmet.feature), Some(bit));
            assert_eq!(unmet(set(&[17, bit])), None);
        }
        // One of two needed features is enough. A feature that is removed takes along those that
        // need it.
        assert_eq!(unmet(set(&[0, 12, 13])), None);
        assert_eq!(without_unmet(set(&[12, 13, 15])), set(&[15]));
        assert_eq!(without_unmet(set(&[0, 12, 13])), set(&[0, 12, 13]));
        let text = unmet(set(&[22])).unwrap().to_string();
        assert_eq!(
            text,
            "VIRTIO_NET_F_MQ (bit 22) without bit 17, which it needs"
        );
    }
}
