//! The decision for one frame: a transparent learning bridge (IEEE 802.1Q, 8.6 to 8.8) without
//! VLANs.
//!
//! Pure: the clock, the topology and the FDB are parameters. The order of the rules is part of the
//! contract:
//!
//! 1. A frame shorter than its header, or from a multicast or zero address, is dropped and teaches
//!    nothing.
//! 2. The source address is learned at the ingress port, also if the frame is dropped below: the
//!    station has shown where it is. That learning may be refused (quota, rate of moves) does not
//!    matter to the frame.
//! 3. Link-local destinations (spanning tree, LLDP, LACP, pause) stay on their link.
//! 4. Multicast and broadcast go to all other ports.
//! 5. A known destination gets the frame alone, unless it is behind the ingress port. An FDB entry
//!    of a port that is no longer in this slot counts as unknown.
//! 6. Unknown destinations are flooded.

use super::PortRef;
use super::fdb::Fdb;
use crate::stats::DropReason;
use crate::wire::{HEADER_LEN, Mac};

/// VLAN identifier in FDB keys of ports without VLANs.
pub const UNTAGGED: u16 = 0;

/// What the decision depends on; taken from the private copy of the headers, never read again.
#[derive(Clone, Copy, Debug)]
pub struct FrameHead {
    /// Destination address.
    pub dst: Mac,
    /// Source address.
    pub src: Mac,
    /// Length of the frame in bytes, without the virtio-net header.
    pub len: u32,
}

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To the port in this slot.
    Unicast(u16),
    /// To all ports but the ingress port.
    Flood,
    /// Nowhere.
    Drop(DropReason),
}

/// Decides where `view` goes that came from `ingress`, and learns from it.
///
/// `ports` tells the generation of the port in a slot of the current topology, `None` if the slot
/// is empty. `now_s` is a monotonic clock in seconds.
#[inline]
pub fn decide(
    view: &FrameHead,
    ingress: PortRef,
    fdb: &Fdb,
    ports: &impl Fn(u16) -> Option<u32>,
    now_s: u32,
) -> Verdict {
    if (view.len as usize) < HEADER_LEN {
        return Verdict::Drop(DropReason::RxShortFrame);
    }
    if view.src.is_multicast() || view.src.is_zero() {
        return Verdict::Drop(DropReason::RxBadSource);
    }
    fdb.learn(UNTAGGED, view.src, ingress, now_s);
    if view.dst.is_multicast() {
        if view.dst.is_link_local() {
            return Verdict::Drop(DropReason::LinkLocalFiltered);
        }
        return Verdict::Flood;
    }
    // Not left to the look-up: where learning was refused, a frame to its own sender would flood.
    if view.dst == view.src {
        return Verdict::Drop(DropReason::SamePort);
    }
    match fdb.lookup(UNTAGGED, view.dst) {
        Some(port) if ports(port.slot) == Some(port.generation) => {
            if port.slot == ingress.slot {
                Verdict::Drop(DropReason::SamePort)
            } else {
                Verdict::Unicast(port.slot)
            }
        }
        _ => Verdict::Flood,
    }
}
