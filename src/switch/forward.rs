//! The decision for one frame: a transparent learning bridge (IEEE 802.1Q, 8.6 to 8.8) without
//! VLANs.
//!
//! Pure: the clock, the topology and the FDB are parameters. The order of the rules is part of the
//! contract:
//!
//! 1. A frame shorter than its header, or from a multicast or zero address, is dropped and teaches
//!    nothing.
//! 2. The source address is learned at the ingress port, also if the frame is dropped below: the
//!    station has shown where it is. If learning is refused (quota, rate of moves), the frame is
//!    forwarded all the same.
//! 3. Link-local destinations (spanning tree, LLDP, LACP, pause) stay on their link.
//! 4. Multicast and broadcast go to all other ports.
//! 5. A known destination gets the frame alone, unless it is behind the ingress port. An FDB entry
//!    of a port that is no longer in this slot counts as unknown.
//! 6. Unknown destinations are flooded.

use super::PortRef;
use super::fdb::{Fdb, Learned};
use crate::stats::DropReason;
use crate::wire::{HEADER_LEN, Mac};

/// VLAN identifier in FDB keys of ports without VLANs.
pub const UNTAGGED: u16 = 0;

/// What the decision depends on. It is taken from the private copy of the headers, which is never
/// read again from guest memory.
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

/// A verdict, and how it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Where the frame goes.
    pub verdict: Verdict,
    /// What was learned from the source address; `None` if nothing can be learned from it.
    pub learned: Option<Learned>,
    /// The port behind which the destination is, if it was looked up and is known.
    pub known: Option<PortRef>,
}

impl Decision {
    fn new(verdict: Verdict, learned: Option<Learned>) -> Self {
        Decision {
            verdict,
            learned,
            known: None,
        }
    }

    fn drop(reason: DropReason, learned: Option<Learned>) -> Self {
        Decision::new(Verdict::Drop(reason), learned)
    }
}

/// The station that was looked up last, kept for the other frames of a burst, which often have one
/// destination. A move that another thread sees meanwhile counts from the next burst on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Found(Option<(Mac, PortRef)>);

impl Found {
    #[inline]
    fn lookup(&mut self, fdb: &Fdb, dst: Mac) -> Option<PortRef> {
        match self.0 {
            Some((mac, port)) if mac == dst => Some(port),
            _ => {
                let port = fdb.lookup(UNTAGGED, dst)?;
                self.0 = Some((dst, port));
                Some(port)
            }
        }
    }
}

/// Decides where the frame `view` goes, which came from `ingress`, and learns its source.
///
/// `found` is empty at the start of a burst and is passed for each of its frames. `ports` tells the
/// generation of the port in a slot of the current topology, `None` if the slot is empty. `now_s`
/// is a monotonic clock in seconds.
#[inline]
pub fn decide(
    view: &FrameHead,
    ingress: PortRef,
    fdb: &Fdb,
    found: &mut Found,
    ports: &impl Fn(u16) -> Option<u32>,
    now_s: u32,
) -> Decision {
    if (view.len as usize) < HEADER_LEN {
        return Decision::drop(DropReason::RxShortFrame, None);
    }
    if view.src.is_multicast() || view.src.is_zero() {
        return Decision::drop(DropReason::RxBadSource, None);
    }
    let learned = fdb.learn(UNTAGGED, view.src, ingress, now_s);
    if !matches!(learned, Learned::Known | Learned::Refreshed) {
        // The station in `found` may be this source, which is at another port now.
        *found = Found::default();
    }
    let learned = Some(learned);
    if view.dst.is_multicast() {
        if view.dst.is_link_local() {
            return Decision::drop(DropReason::LinkLocalFiltered, learned);
        }
        return Decision::new(Verdict::Flood, learned);
    }
    // A frame to its own sender is not looked up: if learning was refused, the frame would be
    // flooded. But the sender is known to be at the ingress port.
    if view.dst == view.src {
        return Decision {
            known: Some(ingress),
            ..Decision::drop(DropReason::SamePort, learned)
        };
    }
    match found.lookup(fdb, view.dst) {
        Some(port) if ports(port.slot) == Some(port.generation) => Decision {
            verdict: if port.slot == ingress.slot {
                Verdict::Drop(DropReason::SamePort)
            } else {
                Verdict::Unicast(port.slot)
            },
            learned,
            known: Some(port),
        },
        _ => Decision::new(Verdict::Flood, learned),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::switch::fdb::FdbConfig;

    const ALICE: PortRef = PortRef {
        slot: 0,
        generation: 3,
    };
    const BOB: PortRef = PortRef {
        slot: 1,
        generation: 5,
    };

    const CAROL: PortRef = PortRef {
        slot: 2,
        generation: 7,
    };

    struct Bench {
        fdb: Fdb,
        /// All its frames are of one burst.
        found: Cell<Found>,
    }

    impl Bench {
        fn new() -> Bench {
            Bench {
                fdb: Fdb::new(FdbConfig::default()).unwrap(),
                found: Cell::default(),
            }
        }

        fn frame(&self, src: &str, dst: &str, ingress: PortRef) -> Verdict {
            self.decide(src, dst, ingress).verdict
        }

        fn decide(&self, src: &str, dst: &str, ingress: PortRef) -> Decision {
            let head = FrameHead {
                dst: mac(dst),
                src: mac(src),
                len: 60,
            };
            let mut found = self.found.get();
            let decision = decide(&head, ingress, &self.fdb, &mut found, &topology, 1);
            self.found.set(found);
            decision
        }

        fn knows(&self, address: &str) -> Option<PortRef> {
            self.fdb.lookup(UNTAGGED, mac(address))
        }
    }

    fn topology(slot: u16) -> Option<u32> {
        [ALICE, BOB, CAROL]
            .iter()
            .find(|port| port.slot == slot)
            .map(|port| port.generation)
    }

    fn mac(text: &str) -> Mac {
        text.parse().unwrap()
    }

    const A: &str = "52:54:00:00:00:0a";
    const B: &str = "52:54:00:00:00:0b";
    const BROADCAST: &str = "ff:ff:ff:ff:ff:ff";

    #[test]
    fn an_unknown_destination_is_flooded_and_the_answer_is_not() {
        let bench = Bench::new();
        assert_eq!(bench.frame(A, B, ALICE), Verdict::Flood);
        assert_eq!(bench.frame(B, A, BOB), Verdict::Unicast(ALICE.slot));
        assert_eq!(bench.frame(A, B, ALICE), Verdict::Unicast(BOB.slot));
    }

    #[test]
    fn broadcast_and_multicast_are_flooded_and_teach_their_source() {
        let bench = Bench::new();
        assert_eq!(bench.frame(A, BROADCAST, ALICE), Verdict::Flood);
        assert_eq!(bench.frame(B, "01:00:5e:00:00:01", BOB), Verdict::Flood);
        assert_eq!((bench.knows(A), bench.knows(B)), (Some(ALICE), Some(BOB)));
    }

    #[test]
    fn a_source_that_no_station_can_have_is_dropped_and_not_learned() {
        let bench = Bench::new();
        for source in [BROADCAST, "01:00:5e:00:00:01", "00:00:00:00:00:00"] {
            let verdict = bench.frame(source, B, ALICE);
            assert_eq!(verdict, Verdict::Drop(DropReason::RxBadSource), "{source}");
        }
        assert!(bench.fdb.is_empty());
    }

    #[test]
    fn link_local_frames_stay_on_their_link_and_teach_their_source() {
        let bench = Bench::new();
        let verdict = bench.frame(A, "01:80:c2:00:00:0e", ALICE);
        assert_eq!(verdict, Verdict::Drop(DropReason::LinkLocalFiltered));
        assert_eq!(bench.knows(A), Some(ALICE));
        assert_eq!(bench.frame(A, "01:80:c2:00:00:10", ALICE), Verdict::Flood);
    }

    #[test]
    fn a_frame_never_leaves_through_the_port_it_came_from() {
        let bench = Bench::new();
        bench.frame(A, BROADCAST, ALICE);
        bench.frame(B, BROADCAST, ALICE);
        assert_eq!(
            bench.frame(A, B, ALICE),
            Verdict::Drop(DropReason::SamePort)
        );
    }

    #[test]
    fn a_frame_to_its_own_sender_is_dropped_even_where_nothing_can_be_learned() {
        let bench = Bench::new();
        bench.fdb.port_removed(ALICE);
        let decision = bench.decide(A, A, ALICE);
        assert_eq!(decision.verdict, Verdict::Drop(DropReason::SamePort));
        assert_eq!(decision.known, Some(ALICE));
        assert_eq!(bench.knows(A), None);
    }

    #[test]
    fn an_entry_of_an_earlier_tenant_of_the_slot_counts_as_unknown() {
        let bench = Bench::new();
        let earlier = PortRef {
            generation: BOB.generation - 1,
            ..BOB
        };
        bench.fdb.learn(UNTAGGED, mac(B), earlier, 0);
        assert_eq!(bench.frame(A, B, ALICE), Verdict::Flood);
        assert_eq!(bench.frame(A, B, BOB), Verdict::Flood);
    }

    #[test]
    fn a_station_that_moves_within_a_burst_is_found_where_it_is() {
        let bench = Bench::new();
        bench.frame(B, BROADCAST, BOB);
        bench.frame(A, BROADCAST, CAROL);
        assert_eq!(bench.frame(A, B, CAROL), Verdict::Unicast(BOB.slot));
        bench.frame(B, BROADCAST, ALICE);
        assert_eq!(bench.frame(A, B, CAROL), Verdict::Unicast(ALICE.slot));
    }

    #[test]
    fn an_entry_of_an_empty_slot_counts_as_unknown() {
        let bench = Bench::new();
        bench.fdb.learn(
            UNTAGGED,
            mac(B),
            PortRef {
                slot: 9,
                generation: 1,
            },
            0,
        );
        assert_eq!(bench.frame(A, B, ALICE), Verdict::Flood);
    }

    #[test]
    fn a_frame_shorter_than_its_header_is_dropped_and_teaches_nothing() {
        let bench = Bench::new();
        let head = FrameHead {
            dst: mac(B),
            src: mac(A),
            len: 13,
        };
        let found = &mut Found::default();
        let verdict = decide(&head, ALICE, &bench.fdb, found, &topology, 1).verdict;
        assert_eq!(verdict, Verdict::Drop(DropReason::RxShortFrame));
        assert!(bench.fdb.is_empty());
    }
}
