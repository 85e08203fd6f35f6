//! A frame's headers as one line of text.

// Only address types, which are plain values. Nothing here opens a network connection.
use core::net::{Ipv4Addr, Ipv6Addr};
use std::fmt::Write;

use etherparse::{
    ArpOperation, LaxLinkExtSlice, LaxNetSlice, LaxSlicedPacket, LinkSlice, TransportSlice,
};

use super::Mac;

/// Returns in words the headers of a frame of `len` bytes that begins with `head`: tags, addresses,
/// protocol, ports, flags, as far as `head` contains them.
pub fn summary(head: &[u8], len: u32) -> String {
    let mut text = String::new();
    let Ok(packet) = LaxSlicedPacket::from_ethernet(head) else {
        return match head {
            [] => format!("length {len}"),
            _ => format!("no Ethernet header, length {len}"),
        };
    };
    // Writing to a string cannot fail.
    let mut add = |part: std::fmt::Arguments<'_>| {
        let _ = text.write_fmt(part);
    };
    let mut ether_type = 0;
    if let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link {
        ether_type = ethernet.ether_type().0;
        let (source, destination) = (
            Mac::from_bytes(ethernet.source()),
            Mac::from_bytes(ethernet.destination()),
        );
        add(format_args!("{source} > {destination}, "));
    }
    for tag in &packet.link_exts {
        if let LaxLinkExtSlice::Vlan(tag) = tag {
            ether_type = tag.ether_type().0;
            add(format_args!("vlan {}, ", tag.vlan_identifier().value()));
        }
    }
    let (ports, protocol) = transport(packet.transport.as_ref());
    let port = |port: Option<u16>| port.map_or_else(String::new, |port| format!(".{port}"));
    let (from, to) = (port(ports.map(|p| p.0)), port(ports.map(|p| p.1)));
    match &packet.net {
        Some(LaxNetSlice::Ipv4(ip)) => {
            let (source, destination) = (ip.header().source_addr(), ip.header().destination_addr());
            let number = ip.payload().ip_number.0;
            add(format_args!("IPv4 {source}{from} > {destination}{to}: "));
            add(format_args!(
                "{}",
                protocol.unwrap_or_else(|| named(number))
            ));
        }
        Some(LaxNetSlice::Ipv6(ip)) => {
            let (source, destination) = (ip.header().source_addr(), ip.header().destination_addr());
            let number = ip.payload().ip_number.0;
            add(format_args!("IPv6 {source}{from} > {destination}{to}: "));
            add(format_args!(
                "{}",
                protocol.unwrap_or_else(|| named(number))
            ));
        }
        Some(LaxNetSlice::Arp(arp)) => {
            let (sender, target) = (arp.sender_protocol_addr(), arp.target_protocol_addr());
            let (sender, target) = (address(sender), address(target));
            match arp.operation() {
                ArpOperation::REQUEST => add(format_args!("ARP who has {target}? tell {sender}")),
                ArpOperation::REPLY => add(format_args!("ARP {sender} is here, to {target}")),
                other => add(format_args!("ARP operation {}", other.0)),
            }
        }
        None => add(format_args!("ethertype {ether_type:#06x}")),
    }
    add(format_args!(", length {len}"));
    text
}

type Ports = Option<(u16, u16)>;

fn transport(slice: Option<&TransportSlice<'_>>) -> (Ports, Option<String>) {
    match slice {
        None => (None, None),
        Some(TransportSlice::Udp(udp)) => {
            let ports = (udp.source_port(), udp.destination_port());
            (Some(ports), Some("UDP".to_string()))
        }
        Some(TransportSlice::Tcp(tcp)) => {
            let flags = [
                (tcp.syn(), 'S'),
                (tcp.fin(), 'F'),
                (tcp.rst(), 'R'),
                (tcp.psh(), 'P'),
                (tcp.urg(), 'U'),
                (tcp.ack(), '.'),
            ];
            let set = flags.iter().filter(|(set, _)| *set);
            let set: String = set.map(|(_, letter)| letter).collect();
            let (seq, ack) = (tcp.sequence_number(), tcp.acknowledgment_number());
            let ports = (tcp.source_port(), tcp.destination_port());
            (
                Some(ports),
                Some(format!("TCP [{set}] seq {seq} ack {ack}")),
            )
        }
        Some(TransportSlice::Icmpv4(icmp)) => {
            let (kind, code) = (icmp.type_u8(), icmp.code_u8());
            (None, Some(format!("ICMP type {kind} code {code}")))
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            let (kind, code) = (icmp.type_u8(), icmp.code_u8());
            (None, Some(format!("ICMPv6 type {kind} code {code}")))
        }
    }
}

fn named(protocol: u8) -> String {
    match protocol {
        1 => "ICMP".to_string(),
        6 => "TCP".to_string(),
        17 => "UDP".to_string(),
        58 => "ICMPv6".to_string(),
        132 => "SCTP".to_string(),
        other => format!("protocol {other}"),
    }
}

fn address(bytes: &[u8]) -> String {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Ipv4Addr::from(bytes).to_string();
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(bytes) => Ipv6Addr::from(bytes).to_string(),
        Err(_) => "?".to_string(),
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    #[test]
    fn headers_are_told_in_words() {
        let mut tcp = Vec::new();
        let built = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
            .single_vlan(7.try_into().unwrap())
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .tcp(1000, 80, 5, 100)
            .syn();
        built.write(&mut tcp, &[]).unwrap();
        assert_eq!(
            summary(&tcp, 58),
            "02:00:00:00:00:01 > 02:00:00:00:00:02, vlan 7, IPv4 10.0.0.1.1000 > 10.0.0.2.80: TCP [S] seq 5 ack 0, length 58"
        );
        // Cut off within the ports.
        assert_eq!(
            summary(&tcp[..40], 58),
            "02:00:00:00:00:01 > 02:00:00:00:00:02, vlan 7, IPv4 10.0.0.1 > 10.0.0.2: TCP, length 58"
        );
        let plain = [&[0xff; 6][..], &[2, 0, 0, 0, 0, 1], &[0x88, 0xb5, 0, 0]].concat();
        assert_eq!(
            summary(&plain, 60),
            "02:00:00:00:00:01 > ff:ff:ff:ff:ff:ff, ethertype 0x88b5, length 60"
        );
        assert_eq!(summary(&[], 9), "length 9");
        assert_eq!(summary(&[1, 2], 2), "no Ethernet header, length 2");
    }
}
