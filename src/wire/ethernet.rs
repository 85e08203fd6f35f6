//! Ethernet II header and IEEE 802.1Q tag.
//!
//! The header is read with two overlapping eight-byte loads (bytes 0 to 7 and 6 to 13). So [`Mac`]
//! is a number and not six bytes: to compare or classify addresses then takes single instructions.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Length of the header: destination, source, EtherType.
pub const HEADER_LEN: usize = 14;
/// Length of one 802.1Q tag, between source address and inner EtherType.
pub const VLAN_TAG_LEN: usize = 4;

/// Byte ranges of the header.
mod field {
    use std::ops::Range;

    /// Destination address and the first two bytes of the source.
    pub(super) const DESTINATION_WORD: Range<usize> = 0..8;
    /// Source address and EtherType.
    pub(super) const SOURCE_WORD: Range<usize> = 6..14;
    /// Tag control information and inner EtherType, if the frame is tagged.
    pub(super) const TAG: Range<usize> = 14..18;
}

const ETHERTYPE_8021Q: u16 = 0x8100;
const ETHERTYPE_8021AD: u16 = 0x88a8;
/// 01-80-C2-00-00-00, the first of the 16 addresses that bridges do not forward.
const LINK_LOCAL: u64 = 0x0180_c200_0000;
const ADDRESS_BITS: u64 = 0xffff_ffff_ffff;
/// The group bit: lowest bit of the first byte on the wire.
const GROUP_BIT: u64 = 1 << 40;

/// A MAC address as a number of 48 bits; the first byte on the wire is the most significant.
///
/// In JSON, on the command line and in filters an address is the same text: see [`Mac::from_str`].
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Mac(u64);

impl Mac {
    /// The broadcast address.
    pub const BROADCAST: Mac = Mac(ADDRESS_BITS);

    /// Makes an address from the lower 48 bits of a number.
    #[inline]
    pub const fn from_bits(bits: u64) -> Mac {
        Mac(bits & ADDRESS_BITS)
    }

    /// Makes an address from six bytes in wire order.
    #[inline]
    pub const fn from_bytes(bytes: [u8; 6]) -> Mac {
        let [a, b, c, d, e, f] = bytes;
        Mac(u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
    }

    /// Returns the address as a number below 2^48.
    #[inline]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Returns the six bytes in wire order.
    pub const fn bytes(self) -> [u8; 6] {
        let [_, _, a, b, c, d, e, f] = self.0.to_be_bytes();
        [a, b, c, d, e, f]
    }

    /// Whether the address is multicast or broadcast, and so not the address of a station.
    #[inline]
    pub const fn is_multicast(self) -> bool {
        self.0 & GROUP_BIT != 0
    }

    /// Whether all bits are zero. No station uses this address.
    #[inline]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Whether the address is 01-80-C2-00-00-00 to -0F (IEEE 802.1Q, table 8-1): spanning tree,
    /// pause, LACP, LLDP. Such frames concern one link and must not cross a bridge.
    #[inline]
    pub const fn is_link_local(self) -> bool {
        self.0 & !0xf == LINK_LOCAL
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.bytes();
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a MAC address: use six bytes of two hexadecimal digits, such as 52:54:00:12:34:56")]
pub struct MacParseError;

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = MacParseError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl FromStr for Mac {
    type Err = MacParseError;

    /// Parses six groups of exactly two hexadecimal digits, all separated by `:` or all by `-`. A
    /// group of one digit is refused: more often a digit was forgotten than a zero left out.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let separator = if text.contains('-') { '-' } else { ':' };
        let mut bits = 0;
        let mut groups = 0;
        for group in text.split(separator) {
            // `from_str_radix` alone would accept a sign.
            if group.len() != 2 || !group.bytes().all(|b| b.is_ascii_hexdigit()) || groups == 6 {
                return Err(MacParseError);
            }
            let byte = u64::from_str_radix(group, 16).map_err(|_| MacParseError)?;
            bits = bits << 8 | byte;
            groups += 1;
        }
        if groups == 6 {
            Ok(Mac(bits))
        } else {
            Err(MacParseError)
        }
    }
}

/// An 802.1Q or 802.1ad tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VlanTag {
    /// Priority (3 bits), drop eligible (1), VLAN identifier (12).
    pub tci: u16,
    /// EtherType after the tag. With two tags it is that of the second tag.
    pub inner_ethertype: u16,
}

impl VlanTag {
    /// Returns the VLAN identifier; 0 marks a frame that carries only a priority.
    pub const fn vid(self) -> u16 {
        self.tci & 0xfff
    }

    /// Returns the priority code point, 0 to 7.
    pub const fn priority(self) -> u16 {
        self.tci >> 13
    }
}

/// A frame of at least [`HEADER_LEN`] bytes, or the beginning of one.
#[derive(Clone, Copy)]
pub struct EthernetFrame<'a> {
    bytes: &'a [u8],
    destination_word: u64,
    source_word: u64,
}

/// Returns the eight bytes at `range` as a big-endian number, if the frame has them.
#[inline]
fn word(bytes: &[u8], range: std::ops::Range<usize>) -> Option<u64> {
    let word = bytes.get(range)?.try_into().ok()?;
    Some(u64::from_be_bytes(word))
}

impl<'a> EthernetFrame<'a> {
    /// Returns a view of `bytes`; `None` if they are shorter than a header.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<EthernetFrame<'a>> {
        Some(EthernetFrame {
            source_word: word(bytes, field::SOURCE_WORD)?,
            destination_word: word(bytes, field::DESTINATION_WORD)?,
            bytes,
        })
    }

    /// Destination address.
    #[inline]
    pub const fn dst(&self) -> Mac {
        Mac(self.destination_word >> 16)
    }

    /// Source address.
    #[inline]
    pub const fn src(&self) -> Mac {
        Mac(self.source_word >> 16)
    }

    /// EtherType in the header. If the frame is tagged, this is the tag's own EtherType.
    #[inline]
    pub const fn ethertype(&self) -> u16 {
        (self.source_word & 0xffff) as u16
    }

    /// Returns the outermost tag; `None` if there is none, or if the bytes end inside it.
    pub fn vlan(&self) -> Option<VlanTag> {
        if !matches!(self.ethertype(), ETHERTYPE_8021Q | ETHERTYPE_8021AD) {
            return None;
        }
        let tag: [u8; VLAN_TAG_LEN] = self.bytes.get(field::TAG)?.try_into().ok()?;
        let [a, b, c, d] = tag;
        Some(VlanTag {
            tci: u16::from_be_bytes([a, b]),
            inner_ethertype: u16::from_be_bytes([c, d]),
        })
    }
}

impl fmt::Debug for EthernetFrame<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (src, dst, kind) = (self.src(), self.dst(), self.ethertype());
        write!(f, "{src} > {dst} {kind:#06x}, {} bytes", self.bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAGGED: [u8; 18] = [
        0x52, 0x54, 0, 1, 2, 3, 0x02, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0x81, 0, 0xa0, 0x64, 0x08, 0,
    ];

    #[test]
    fn addresses_and_ethertype_come_from_their_places() {
        let frame = EthernetFrame::parse(&TAGGED).unwrap();
        assert_eq!(frame.dst().to_string(), "52:54:00:01:02:03");
        assert_eq!(frame.src().to_string(), "02:aa:bb:cc:dd:ee");
        assert_eq!(frame.ethertype(), 0x8100);
        assert_eq!(
            format!("{frame:?}"),
            "02:aa:bb:cc:dd:ee > 52:54:00:01:02:03 0x8100, 18 bytes"
        );
    }

    #[test]
    fn thirteen_bytes_are_no_frame_and_fourteen_are() {
        assert!(EthernetFrame::parse(&TAGGED[..13]).is_none());
        assert!(EthernetFrame::parse(&[]).is_none());
        assert!(EthernetFrame::parse(&TAGGED[..14]).is_some());
    }

    #[test]
    fn a_tag_is_read_whole_or_not_at_all() {
        let tag = EthernetFrame::parse(&TAGGED).unwrap().vlan().unwrap();
        assert_eq!(
            (tag.vid(), tag.priority(), tag.inner_ethertype),
            (100, 5, 0x800)
        );
        assert_eq!(EthernetFrame::parse(&TAGGED[..17]).unwrap().vlan(), None);
        let mut untagged = TAGGED;
        untagged[12] = 0x08;
        assert_eq!(EthernetFrame::parse(&untagged).unwrap().vlan(), None);
    }

    #[test]
    fn addresses_round_trip_as_text_bytes_and_bits() {
        let mac: Mac = "52:54:00:12:34:Fe".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:12:34:fe");
        assert_eq!("52-54-00-12-34-fe".parse(), Ok(mac));
        assert_eq!(Mac::from_bytes(mac.bytes()), mac);
        assert_eq!(Mac::from_bits(mac.bits() | 0xffff << 48), mac);
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:5",
            "52:54:00:12:34:567",
            "52:54:00:12:34:+5",
            "52:54-00:12:34:56",
            "52:54:00:12:34:gg",
            "525400123456",
            "ä2:54:00:12:34:5",
        ] {
            assert_eq!(text.parse::<Mac>(), Err(MacParseError), "{text:?}");
        }
    }

    #[test]
    fn kinds_of_addresses_are_told_apart() {
        let mac = |text: &str| text.parse::<Mac>().unwrap();
        assert!(Mac::BROADCAST.is_multicast());
        assert!(mac("33:33:00:00:00:01").is_multicast());
        assert!(!mac("52:54:00:00:00:01").is_multicast());
        assert!(mac("00:00:00:00:00:00").is_zero());
        assert!(mac("01:80:c2:00:00:00").is_link_local());
        assert!(mac("01:80:c2:00:00:0f").is_link_local());
        assert!(!mac("01:80:c2:00:00:10").is_link_local());
        assert!(!mac("01:80:c2:00:01:00").is_link_local());
    }
}
