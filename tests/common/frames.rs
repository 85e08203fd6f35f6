//! Numbered frames in pcap files, and their comparison after a journey through a switch.
//!
//! A frame carries its flow and its number within the flow, and pseudo-random bytes derived from
//! both up to its end, so that any corruption, mixing or truncation shows.

use std::path::Path;

/// Ethernet header, flow (2 bytes) and number (4 bytes).
const HEADER: usize = 20;
/// An EtherType for local experiments: no switch looks inside.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Frames from one port to another.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Address of the receiver.
    pub(crate) to: [u8; 6],
    /// Address of the sender; each flow has its own last byte but one.
    pub(crate) from: [u8; 6],
    /// Number of flows.
    pub(crate) flows: u16,
    /// Frames in all.
    pub(crate) count: u32,
    /// The lengths to draw from.
    pub(crate) sizes: Vec<usize>,
}

impl Plan {
    /// The frames in sending order: the flows take turns, the sizes are drawn.
    pub(crate) fn frames(&self) -> Vec<Vec<u8>> {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        (0..self.count)
            .map(|n| {
                let flow = (n % u32::from(self.flows)) as u16;
                let number = n / u32::from(self.flows);
                let size = self.sizes[(next(&mut random) as usize) % self.sizes.len()];
                self.frame(flow, number, size)
            })
            .collect()
    }

    fn frame(&self, flow: u16, number: u32, size: usize) -> Vec<u8> {
        let mut frame = Vec::with_capacity(size);
        let mut from = self.from;
        from[4] = flow as u8;
        frame.extend(self.to);
        frame.extend(from);
        frame.extend(ETHERTYPE);
        frame.extend(flow.to_be_bytes());
        frame.extend(number.to_be_bytes());
        let mut random = u64::from(number) << 16 | u64::from(flow) | 1 << 63;
        while frame.len() < size {
            frame.extend(next(&mut random).to_le_bytes());
        }
        frame.truncate(size);
        frame
    }
}

/// xorshift64: reproducible, and no two frames alike.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// The flow of a frame.
pub(crate) fn flow(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[14], frame[15]])
}

/// Panics unless `received` is exactly `sent`: every frame once, unchanged, in order within its
/// flow.
pub(crate) fn assert_same(sent: &[Vec<u8>], received: &[Vec<u8>]) {
    let mut flows: std::collections::BTreeMap<&[u8], Vec<&Vec<u8>>> = Default::default();
    for frame in sent.iter().rev() {
        flows.entry(&frame[14..16]).or_default().push(frame);
    }
    for (at, frame) in received.iter().enumerate() {
        assert!(frame.len() >= HEADER, "frame {at} is {} long", frame.len());
        let expected = flows
            .get_mut(&frame[14..16])
            .unwrap_or_else(|| panic!("frame {at} belongs to no flow: {:02x?}", &frame[..HEADER]))
            .pop()
            .unwrap_or_else(|| panic!("frame {at} is one too many: {:02x?}", &frame[..HEADER]));
        assert_eq!(
            &frame[..HEADER],
            &expected[..HEADER],
            "frame {at}: lost, duplicated or reordered before it"
        );
        assert_eq!(frame.len(), expected.len(), "length of frame {at}");
        assert!(frame == expected, "frame {at} is corrupted");
    }
    assert_eq!(received.len(), sent.len(), "frames at the end are missing");
}

/// Writes a pcap file.
pub(crate) fn write_pcap(path: &Path, frames: &[Vec<u8>]) {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4_u32, 2 | 4 << 16, 0, 0, 65535, 1] {
        file.extend(word.to_le_bytes());
    }
    for frame in frames {
        let length = frame.len() as u32;
        for word in [0, 0, length, length] {
            file.extend(word.to_le_bytes());
        }
        file.extend(frame);
    }
    std::fs::write(path, file).expect("the pcap file is written");
}

/// Reads a pcap file of this machine's byte order.
pub(crate) fn read_pcap(path: &Path) -> Vec<Vec<u8>> {
    let file = std::fs::read(path).expect("the pcap file is there");
    let word = |at: usize| {
        let bytes = file[at..at + 4].try_into().expect("four bytes");
        u32::from_le_bytes(bytes) as usize
    };
    assert!(file.len() >= 24, "the pcap file has no header");
    let (mut at, mut frames) = (24, Vec::new());
    while at + 16 <= file.len() {
        let length = word(at + 8);
        assert_eq!(length, word(at + 12), "a frame was cut short in the file");
        frames.push(file[at + 16..at + 16 + length].to_vec());
        at += 16 + length;
    }
    frames
}
