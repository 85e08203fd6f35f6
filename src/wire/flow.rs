//! Flows: finds out from a frame's first bytes which frames must stay in order.
//!
//! Frames with equal addresses, protocol and ports are one flow. A port with several receive queues
//! gets all frames of a flow in one queue. By its outer headers a tunnel between two machines would
//! be one flow. So the hash goes on into the inner headers of VXLAN (RFC 7348), Geneve (RFC 8926),
//! GRE (RFC 2784, 2890), and IP in IP.
//!
//! All lengths and offsets in a frame come from its sender. If one of them does not fit the bytes
//! that are there, the walk ends, and the hash covers what was read before. Every frame has a hash.

use super::HEADER_LEN;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_8021Q: u16 = 0x8100;
const ETHERTYPE_8021AD: u16 = 0x88a8;
/// Transparent Ethernet bridging: an Ethernet frame inside GRE or Geneve.
const ETHERTYPE_ETHERNET: u16 = 0x6558;

const PROTOCOL_IPV4: u8 = 4;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const PROTOCOL_IPV6: u8 = 41;
const PROTOCOL_GRE: u8 = 47;
const PROTOCOL_SCTP: u8 = 132;
/// IPv6 extension headers that are skipped: hop by hop, routing, destination options.
const EXTENSIONS: [u8; 3] = [0, 43, 60];

const PORT_VXLAN: u16 = 4789;
const PORT_GENEVE: u16 = 6081;

/// Most headers that are read, tags and extension headers included. No honest frame has more.
const MAX_HEADERS: usize = 12;

/// The kind of header at an offset.
#[derive(Clone, Copy)]
enum Layer {
    Ethernet,
    /// A header after this EtherType.
    Network(u16),
    /// A header after an IP header with this protocol, which was not a fragment's.
    Transport(u8),
}

/// Returns the hash of the flow to which a frame with these first bytes belongs. All 32 bits are
/// well mixed.
///
/// The hash covers the outermost addresses, protocol and ports, and those inside of every tunnel
/// that is visible. For a frame that is neither IPv4 nor IPv6 it covers MAC addresses and
/// EtherType.
pub fn flow_hash(head: &[u8]) -> u32 {
    let mut hash = Hash(0x9e37_79b9_7f4a_7c15);
    let mut at = 0;
    let mut layer = Layer::Ethernet;
    for _ in 0..MAX_HEADERS {
        let next = match layer {
            Layer::Ethernet => ethernet(head, at, &mut hash),
            Layer::Network(kind) => network(head, at, kind, &mut hash),
            Layer::Transport(protocol) => transport(head, at, protocol, &mut hash),
        };
        let Some((inner, len)) = next else { break };
        layer = inner;
        at += len;
    }
    hash.finish()
}

/// Multiply and fold: every input bit reaches the upper half.
struct Hash(u64);

impl Hash {
    fn add(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let mixed = (self.0 ^ u64::from_le_bytes(word)).wrapping_mul(0xd6e8_feb8_6659_fd93);
            self.0 = mixed ^ mixed >> 32;
        }
    }

    fn finish(&self) -> u32 {
        let mixed = self.0.wrapping_mul(0xd6e8_feb8_6659_fd93);
        (mixed >> 32) as u32
    }
}

fn bytes(head: &[u8], at: usize, len: usize) -> Option<&[u8]> {
    head.get(at..at.checked_add(len)?)
}

fn number(head: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes(head, at, 2)?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// Reads a MAC header. Its addresses are hashed only if nothing else tells flows apart: between two
/// routers all frames have equal addresses.
fn ethernet(head: &[u8], at: usize, hash: &mut Hash) -> Option<(Layer, usize)> {
    let kind = number(head, at + 12)?;
    if !is_walked(kind) {
        hash.add(bytes(head, at, HEADER_LEN)?);
        return None;
    }
    Some((Layer::Network(kind), HEADER_LEN))
}

fn is_walked(kind: u16) -> bool {
    matches!(
        kind,
        ETHERTYPE_IPV4 | ETHERTYPE_IPV6 | ETHERTYPE_8021Q | ETHERTYPE_8021AD
    )
}

fn network(head: &[u8], at: usize, kind: u16, hash: &mut Hash) -> Option<(Layer, usize)> {
    match kind {
        ETHERTYPE_IPV4 => {
            let first = *head.get(at)?;
            let (len, protocol) = (usize::from(first & 15) * 4, *head.get(at + 9)?);
            hash.add(bytes(head, at + 12, 8)?);
            hash.add(&[protocol]);
            // The frame is a fragment: it has "more fragments" or an offset. Only the first
            // fragment has the ports, and all fragments must stay in one flow.
            let fragment = number(head, at + 6)? & 0x3fff != 0;
            let whole = first >> 4 == 4 && len >= 20 && !fragment;
            whole.then_some((Layer::Transport(protocol), len))
        }
        ETHERTYPE_IPV6 => {
            let protocol = *head.get(at + 6)?;
            hash.add(bytes(head, at + 8, 32)?);
            (head.get(at)? >> 4 == 6).then_some((Layer::Transport(protocol), 40))
        }
        ETHERTYPE_8021Q | ETHERTYPE_8021AD => {
            // The VLAN without the priority, which may differ between frames of a flow.
            hash.add(&(number(head, at)? & 0xfff).to_be_bytes());
            let inner = number(head, at + 2)?;
            if !is_walked(inner) {
                // Without IP only the MAC addresses tell flows apart. They are at the start of the
                // frame, before the tags.
                hash.add(bytes(head, 0, 12)?);
                hash.add(&inner.to_be_bytes());
                return None;
            }
            Some((Layer::Network(inner), 4))
        }
        _ => None,
    }
}

fn transport(head: &[u8], at: usize, protocol: u8, hash: &mut Hash) -> Option<(Layer, usize)> {
    match protocol {
        PROTOCOL_TCP | PROTOCOL_SCTP => {
            hash.add(&[protocol]);
            hash.add(bytes(head, at, 4)?);
            None
        }
        PROTOCOL_UDP => {
            hash.add(&[protocol]);
            hash.add(bytes(head, at, 4)?);
            match number(head, at + 2)? {
                PORT_VXLAN => {
                    // The network identifier, without its reserved byte.
                    hash.add(bytes(head, at + 12, 3)?);
                    Some((Layer::Ethernet, 16))
                }
                PORT_GENEVE => {
                    let options = usize::from(head.get(at + 8)? & 0x3f) * 4;
                    hash.add(bytes(head, at + 12, 3)?);
                    let kind = number(head, at + 10)?;
                    tunnelled(kind).map(|layer| (layer, 16 + options))
                }
                _ => None,
            }
        }
        PROTOCOL_GRE => {
            let flags = number(head, at)?;
            // Checksum, key, sequence number (RFC 2890). Headers with source routes or another
            // version end the walk.
            let field = |bit: u16| if flags & bit != 0 { 4 } else { 0 };
            let key = at + 4 + field(0x8000);
            if flags & 0x2000 != 0 {
                hash.add(bytes(head, key, 4)?);
            }
            if flags & 0x4007 != 0 {
                return None;
            }
            let len = 4 + field(0x8000) + field(0x2000) + field(0x1000);
            tunnelled(number(head, at + 2)?).map(|layer| (layer, len))
        }
        PROTOCOL_IPV4 => Some((Layer::Network(ETHERTYPE_IPV4), 0)),
        PROTOCOL_IPV6 => Some((Layer::Network(ETHERTYPE_IPV6), 0)),
        extension if EXTENSIONS.contains(&extension) => {
            let len = (usize::from(*head.get(at + 1)?) + 1) * 8;
            Some((Layer::Transport(*head.get(at)?), len))
        }
        // Only the first fragment (44) has ports. ESP (50) and others have none.
        other => {
            hash.add(&[other]);
            None
        }
    }
}

fn tunnelled(kind: u16) -> Option<Layer> {
    match kind {
        ETHERTYPE_ETHERNET => Some(Layer::Ethernet),
        ETHERTYPE_IPV4 | ETHERTYPE_IPV6 => Some(Layer::Network(kind)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ethernet(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        frame.extend(kind.to_be_bytes());
        frame.extend(payload);
        frame
    }

    fn ipv4(protocol: u8, ends: [u8; 2], payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0];
        packet.extend([10, 0, 0, ends[0], 10, 0, 0, ends[1]]);
        packet.extend(payload);
        packet
    }

    fn ipv6(next: u8, ends: [u8; 2], payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        for end in ends {
            packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, end]);
        }
        packet.extend(payload);
        packet
    }

    fn ports(source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
        let mut segment = [source.to_be_bytes(), destination.to_be_bytes()].concat();
        segment.extend([0; 4]);
        segment.extend(payload);
        segment
    }

    fn hash(frame: &[u8]) -> u32 {
        // As the switch sees it: at most so many bytes.
        flow_hash(&frame[..frame.len().min(128)])
    }

    /// Frames that differ in nothing but the given number, which tells flows apart at some depth.
    fn assert_tells_apart(frame: impl Fn(u16) -> Vec<u8>) {
        let hashes: std::collections::HashSet<u32> = (0..200).map(|n| hash(&frame(n))).collect();
        assert!(hashes.len() > 195, "{} of 200", hashes.len());
        // The upper bits choose among queues: of four, none has less than half of its share.
        for queue in 0..4 {
            let share = hashes.iter().filter(|hash| *hash >> 30 == queue).count();
            assert!(share >= 25, "{share} of 200 in queue {queue}");
        }
        assert_eq!(hash(&frame(7)), hash(&frame(7)));
    }

    #[test]
    fn ports_tell_flows_apart_under_every_header() {
        let inner = |n| ethernet(0x0800, &ipv4(6, [1, 2], &ports(n, 80, &[])));
        let under: [&dyn Fn(u16) -> Vec<u8>; 12] = [
            &inner,
            &|n| ethernet(0x86dd, &ipv6(17, [1, 2], &ports(n, 53, &[]))),
            &|n| ethernet(0x86dd, &ipv6(132, [1, 2], &ports(n, 53, &[]))),
            &|n| {
                let tagged = [vec![0, 5, 8, 0], ipv4(6, [1, 2], &ports(n, 80, &[]))].concat();
                ethernet(0x8100, &tagged)
            },
            &|n| {
                let tags = vec![0, 5, 0x81, 0, 0, 6, 0x86, 0xdd];
                ethernet(
                    0x88a8,
                    &[tags, ipv6(6, [1, 2], &ports(n, 80, &[]))].concat(),
                )
            },
            // Hop by hop, then destination options of 16 bytes.
            &|n| {
                let options = [vec![60, 0], vec![0; 6], vec![6, 1], vec![0; 14]].concat();
                let rest = [options, ports(n, 80, &[])].concat();
                ethernet(0x86dd, &ipv6(0, [1, 2], &rest))
            },
            // VXLAN with the same outer port.
            &|n| {
                let vxlan = [vec![8, 0, 0, 0, 0, 0, 9, 0], inner(n)].concat();
                ethernet(0x0800, &ipv4(17, [3, 4], &ports(1, 4789, &vxlan)))
            },
            // The same under IPv6 with IPv6 inside: 128 bytes reach to the end of the inner ports.
            &|n| {
                let inner = ethernet(0x86dd, &ipv6(17, [1, 2], &ports(n, 53, &[])));
                let vxlan = [vec![8, 0, 0, 0, 0, 0, 9, 0], inner].concat();
                ethernet(0x86dd, &ipv6(17, [3, 4], &ports(1, 4789, &vxlan)))
            },
            // Geneve with eight bytes of options.
            &|n| {
                let geneve = [vec![2, 0, 0x65, 0x58, 0, 0, 9, 0], vec![0; 8], inner(n)].concat();
                ethernet(0x0800, &ipv4(17, [3, 4], &ports(1, 6081, &geneve)))
            },
            // GRE with a key, and without an Ethernet header inside.
            &|n| {
                let gre = vec![0x20, 0, 8, 0, 0, 0, 0, 1];
                let rest = [gre, ipv4(6, [1, 2], &ports(n, 80, &[]))].concat();
                ethernet(0x0800, &ipv4(47, [3, 4], &rest))
            },
            &|n| {
                let inner = ipv4(6, [1, 2], &ports(n, 80, &[]));
                ethernet(0x0800, &ipv4(4, [3, 4], &inner))
            },
            &|n| {
                let inner = ipv6(6, [1, 2], &ports(n, 80, &[]));
                ethernet(0x0800, &ipv4(41, [3, 4], &inner))
            },
        ];
        under.iter().for_each(assert_tells_apart);
    }

    #[test]
    fn what_is_not_ip_is_told_apart_by_its_addresses() {
        assert_tells_apart(|n| {
            let mut frame = ethernet(0x88b5, &[0; 50]);
            frame[10..12].copy_from_slice(&n.to_be_bytes());
            frame
        });
        assert_tells_apart(|n| {
            let mut frame = ethernet(0x8100, &[0, 5, 0x88, 0xb5, 1, 2, 3]);
            frame[10..12].copy_from_slice(&n.to_be_bytes());
            frame
        });
    }

    #[test]
    fn all_fragments_of_a_datagram_belong_together() {
        let fragment = |flags: u16, payload: &[u8]| {
            let mut packet = ipv4(17, [1, 2], payload);
            packet[6..8].copy_from_slice(&flags.to_be_bytes());
            hash(&ethernet(0x0800, &packet))
        };
        let first = fragment(0x2000, &ports(1, 2, &[]));
        assert_eq!(first, fragment(0x2001, &[9; 40]));
        assert_eq!(first, fragment(0x0002, &[7; 3]));
    }

    #[test]
    fn time_to_live_length_priority_and_payload_are_no_part_of_a_flow() {
        let mut packet = ipv4(6, [1, 2], &ports(1, 2, b"one"));
        let one = hash(&ethernet(0x0800, &packet));
        packet[1] = 0xb8;
        packet[3] = 77;
        packet[8] = 3;
        packet.extend(b"another");
        assert_eq!(one, hash(&ethernet(0x0800, &packet)));
        let tagged = |priority: u8| {
            let tag = vec![priority << 5, 5, 8, 0];
            hash(&ethernet(0x8100, &[tag, packet.clone()].concat()))
        };
        assert_eq!(tagged(0), tagged(7));
    }

    #[test]
    fn frames_cut_anywhere_and_headers_that_lie_have_a_hash() {
        let vxlan = [vec![8; 8], ethernet(0x86dd, &ipv6(0, [1, 2], &[0; 64]))].concat();
        let frame = ethernet(0x0800, &ipv4(17, [3, 4], &ports(1, 4789, &vxlan)));
        for len in 0..frame.len() {
            flow_hash(&frame[..len]);
        }
        // Extension headers without end, a header length of 0 and of 60.
        flow_hash(&ethernet(0x86dd, &ipv6(0, [1, 2], &[0; 1000])));
        for first in [0x40, 0x4f, 0x00, 0xff] {
            let mut packet = ipv4(6, [1, 2], &[0; 8]);
            packet[0] = first;
            flow_hash(&ethernet(0x0800, &packet));
        }
    }
}
