//! The header fields that a filter tests, read from a frame's first bytes.
//!
//! The walk over tags, IP headers and extension headers is `etherparse`'s, in its lax form. A
//! header that is cut off or wrong ends the walk, and the headers before it count.

use etherparse::{LaxLinkExtSlice, LaxNetSlice, LaxSlicedPacket, LinkSlice};

/// EtherType of ARP.
pub(super) const ARP: u16 = 0x0806;
/// Protocols with ports at the start of their headers: TCP, UDP, SCTP.
const WITH_PORTS: [u8; 3] = [6, 17, 132];

/// The addresses of the network layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Network {
    V4 {
        source: [u8; 4],
        destination: [u8; 4],
    },
    V6 {
        source: [u8; 16],
        destination: [u8; 16],
    },
    /// Sender and target of an ARP packet for IPv4.
    Arp {
        source: [u8; 4],
        destination: [u8; 4],
    },
    Other,
}

/// The header fields that filters know. A field is `None` or [`Network::Other`] if the frame does
/// not have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Headers {
    pub(super) source: Option<[u8; 6]>,
    pub(super) destination: Option<[u8; 6]>,
    /// Identifier of the outermost tag.
    pub(super) vlan: Option<u16>,
    /// The EtherType after all tags.
    pub(super) ether_type: Option<u16>,
    pub(super) network: Network,
    /// The protocol after all extension headers.
    pub(super) protocol: Option<u8>,
    /// Source and destination port.
    pub(super) ports: Option<(u16, u16)>,
}

impl Headers {
    pub(super) fn read(head: &[u8]) -> Headers {
        let mut headers = Headers {
            source: None,
            destination: None,
            vlan: None,
            ether_type: None,
            network: Network::Other,
            protocol: None,
            ports: None,
        };
        let Ok(packet) = LaxSlicedPacket::from_ethernet(head) else {
            return headers;
        };
        if let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link {
            headers.source = Some(ethernet.source());
            headers.destination = Some(ethernet.destination());
            headers.ether_type = Some(ethernet.ether_type().0);
        }
        for tag in &packet.link_exts {
            if let LaxLinkExtSlice::Vlan(tag) = tag {
                let identifier = tag.vlan_identifier().value();
                headers.vlan = headers.vlan.or(Some(identifier));
                headers.ether_type = Some(tag.ether_type().0);
            }
        }
        let payload = match &packet.net {
            Some(LaxNetSlice::Ipv4(ip)) => {
                headers.network = Network::V4 {
                    source: ip.header().source(),
                    destination: ip.header().destination(),
                };
                let first = ip.header().fragments_offset().value() == 0;
                headers.protocol = Some(ip.payload().ip_number.0);
                first.then_some(ip.payload().payload)
            }
            Some(LaxNetSlice::Ipv6(ip)) => {
                headers.network = Network::V6 {
                    source: ip.header().source(),
                    destination: ip.header().destination(),
                };
                headers.protocol = Some(ip.payload().ip_number.0);
                (!ip.payload().fragmented).then_some(ip.payload().payload)
            }
            Some(LaxNetSlice::Arp(arp)) => {
                let address = |bytes: &[u8]| bytes.try_into().ok();
                if let (Some(source), Some(destination)) = (
                    address(arp.sender_protocol_addr()),
                    address(arp.target_protocol_addr()),
                ) {
                    headers.network = Network::Arp {
                        source,
                        destination,
                    };
                }
                None
            }
            None => None,
        };
        // Ports are read here, because etherparse's slices of TCP and UDP need the whole header.
        if let (Some([a, b, c, d, ..]), Some(protocol)) = (payload, headers.protocol)
            && WITH_PORTS.contains(&protocol)
        {
            let (source, destination) = ([*a, *b], [*c, *d]);
            headers.ports = Some((u16::from_be_bytes(source), u16::from_be_bytes(destination)));
        }
        headers
    }
}
