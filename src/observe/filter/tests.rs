use etherparse::{ArpHardwareId, ArpOperation, EtherType, PacketBuilder};
use proptest::prelude::*;

use super::*;

const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

fn tcp() -> Vec<u8> {
    let mut bytes = Vec::new();
    let built = PacketBuilder::ethernet2(MACS.0, MACS.1)
        .ipv4([10, 1, 2, 3], [192, 168, 0, 9], 64)
        .tcp(40000, 443, 1, 100);
    built.write(&mut bytes, &[7; 40]).unwrap();
    bytes
}

fn tagged_udp6() -> Vec<u8> {
    let (mut from, mut to) = ([0; 16], [0; 16]);
    (from[0], to[0]) = (0xfd, 0xfe);
    let mut bytes = Vec::new();
    let built = PacketBuilder::ethernet2(MACS.0, [0xff; 6])
        .single_vlan(42.try_into().unwrap())
        .ipv6(from, to, 64)
        .udp(53, 5353);
    built.write(&mut bytes, &[7; 40]).unwrap();
    bytes
}

fn arp() -> Vec<u8> {
    let mut bytes = Vec::new();
    let arp = etherparse::ArpPacket::new(
        ArpHardwareId::ETHERNET,
        EtherType::IPV4,
        ArpOperation::REQUEST,
        &MACS.0,
        &[10, 0, 0, 1],
        &[0; 6],
        &[10, 0, 0, 2],
    );
    let built = PacketBuilder::ethernet2(MACS.0, [0xff; 6]).arp(arp.unwrap());
    built.write(&mut bytes).unwrap();
    bytes
}

fn passes(expression: &str, frame: &[u8]) -> bool {
    let filter =
        Filter::compile(expression).unwrap_or_else(|error| panic!("{expression}: {error}"));
    filter.accepts(&frame[..frame.len().min(128)], frame.len() as u32)
}

#[test]
fn expressions_mean_what_tcpdump_means_by_them() {
    let (tcp, udp, arp) = (tcp(), tagged_udp6(), arp());
    for (expression, of_tcp, of_udp, of_arp) in [
        ("", true, true, true),
        ("ip", true, false, false),
        ("ip6", false, true, false),
        ("arp", false, false, true),
        ("tcp", true, false, false),
        ("udp", false, true, false),
        ("icmp or icmp6", false, false, false),
        ("vlan", false, true, false),
        ("vlan 42", false, true, false),
        ("vlan 43", false, false, false),
        ("vlan and udp", false, true, false),
        ("ether proto 0x0806", false, false, true),
        ("ether host 02:00:00:00:00:02", true, false, false),
        ("ether src 02:00:00:00:00:01", true, true, true),
        ("ether dst host 02-00-00-00-00-02", true, false, false),
        ("broadcast", false, true, true),
        ("ether multicast", false, true, true),
        ("host 10.1.2.3", true, false, false),
        ("src host 192.168.0.9", false, false, false),
        ("dst 192.168.0.9", true, false, false),
        ("host 10.0.0.2", false, false, true),
        ("net 10.0.0.0/8", true, false, true),
        ("net 0.0.0.0/0", true, false, true),
        ("src net fd00::/8", false, true, false),
        ("dst net fd00::/8", false, false, false),
        ("port 443", true, false, false),
        ("src port 443", false, false, false),
        ("tcp port 443", true, false, false),
        ("udp port 443", false, false, false),
        ("udp dst port 5353", false, true, false),
        ("portrange 50-60", false, true, false),
        ("less 60", false, false, true),
        ("greater 60", true, true, false),
        ("not tcp and not arp", false, true, false),
        ("!(tcp or arp)", false, true, false),
        ("tcp or udp and vlan 43", true, false, false),
        ("(tcp || udp) && port 53", false, true, false),
    ] {
        let found = [&tcp, &udp, &arp].map(|frame| passes(expression, frame));
        assert_eq!(found, [of_tcp, of_udp, of_arp], "{expression}");
    }
}

#[test]
fn what_is_no_expression_is_refused_in_words() {
    for (expression, words) in [
        ("tcp and", "is missing at the end"),
        ("host", "an address such as"),
        (
            "host example.org",
            "\"example.org\" stands where an address",
        ),
        ("net 10.0.0.1/8", "a network such as"),
        ("net 10.0.0.0/33", "a network such as"),
        ("port 70000", "a port from 0"),
        ("portrange 9-3", "ports such as"),
        ("(tcp", "`)` is missing"),
        ("tcp)", "\")\" stands where `and`"),
        ("tcp udp", "\"udp\" stands where `and`, `or` or the end"),
        ("vlan 5000", "a VLAN from"),
        ("ether host 1:2", "an Ethernet address"),
        ("ether host 2:0:0:0:0:2", "an Ethernet address"),
        ("frames", "a test (such as"),
    ] {
        let error = Filter::compile(expression).expect_err(expression);
        assert!(error.to_string().contains(words), "{expression}: {error}");
    }
    let deep = "(".repeat(500);
    assert_eq!(Filter::compile(&deep).unwrap_err(), FilterError::TooDeep);
    let long = "tcp or ".repeat(500);
    assert_eq!(Filter::compile(&long).unwrap_err(), FilterError::TooLong);
}

proptest! {
    #[test]
    fn no_bytes_and_no_expression_can_do_harm(
        frame in proptest::collection::vec(any::<u8>(), 0..160),
        text in "[a-z0-9 .:/()!&|-]{0,80}",
    ) {
        let _ = Filter::compile(&text);
        let filter = Filter::compile("tcp port 1 or host 1.2.3.4 or vlan 3 or arp or ip6").unwrap();
        filter.accepts(&frame, frame.len() as u32);
    }

    #[test]
    fn a_frame_passes_an_expression_or_its_opposite(
        frame in proptest::collection::vec(any::<u8>(), 0..160),
        which in 0_usize..4,
    ) {
        let text = ["tcp", "net 10.0.0.0/8 or port 7", "vlan and not ip", "less 70"][which];
        let len = frame.len() as u32;
        let is = Filter::compile(text).unwrap().accepts(&frame, len);
        let is_not = Filter::compile(&format!("not ({text})")).unwrap().accepts(&frame, len);
        prop_assert_ne!(is, is_not);
    }
}
