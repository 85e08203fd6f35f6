//! Which lines of guests' memory a pass asks for, and which it writes to.

use super::*;
use crate::memory::probe::{self, Touched};
use crate::virtio::LEGACY_NET_HDR_SIZE;

const LINE: usize = 64;
/// Where frames begin in a sender's memory and in a receiver's, each at the start of a line.
const SENT: usize = TRANSMIT + 4096;
const RECEIVED: usize = 2 * RING + 64 * 1024;
/// What a receiver's memory holds before the first frame comes.
const UNTOUCHED: u8 = 0xee;

/// Offset and bytes of a piece of memory.
type Piece = (usize, usize);

/// Headers of 12 bytes that count, of 12 that nobody looks at, and of 10.
fn header_forms() -> impl Iterator<Item = RingFeatures> {
    let forms = [(true, true), (true, false), (false, false)];
    let kinds = [false, true].into_iter();
    kinds.flat_map(move |packed| {
        forms
            .into_iter()
            .map(move |(version_1, mergeable)| RingFeatures {
                version_1,
                mergeable,
                ..features(packed)
            })
    })
}

/// A header right before its frame, in a line of its own; in a buffer of its own; and in two, one
/// of which goes on.
fn ways_to_lie(header: usize, start: usize, len: usize) -> [Vec<Piece>; 3] {
    let apart = start - 8 * LINE;
    [
        vec![(start - header, header + len)],
        vec![(apart - header, header), (start, len)],
        vec![(apart, 4), (start - (header - 4), header - 4 + len)],
    ]
}

/// The same places where the switch has them mapped.
fn places(vm: &Vm<'_>, pieces: &[Piece]) -> Vec<std::ops::Range<usize>> {
    let place = |&(at, len): &Piece| {
        let window = vm.device.memory.window(BASE + at as u64, len as u32);
        let start = window.unwrap().address();
        start..start + len
    };
    pieces.iter().map(place).collect()
}

/// The first `count` bytes of what lies in `pieces`, and the rest.
fn split_at(pieces: &[Piece], mut count: usize) -> [Vec<Piece>; 2] {
    let mut parts = [Vec::new(), Vec::new()];
    for &(at, len) in pieces {
        let before = count.min(len);
        count -= before;
        parts[0].push((at, before));
        parts[1].push((at + before, len - before));
    }
    parts.map(|part| part.into_iter().filter(|piece| piece.1 > 0).collect())
}

fn read(vm: &Vm<'_>, pieces: &[Piece]) -> Vec<u8> {
    let mut all = Vec::new();
    for &(at, len) in pieces {
        let mut bytes = vec![0; len];
        vm.ram.window(at, len).unwrap().read_bytes(0, &mut bytes);
        all.extend(bytes);
    }
    all
}

fn write(vm: &Vm<'_>, pieces: &[Piece], mut bytes: &[u8]) {
    for &(at, len) in pieces {
        let (now, later) = bytes.split_at(len);
        vm.ram.window(at, len).unwrap().write_bytes(0, now);
        bytes = later;
    }
}

fn buffers(pieces: &[Piece], make: fn(u64, u32) -> Buffer) -> Vec<Buffer> {
    let buffer = |&(at, len): &Piece| make(BASE + at as u64, len as u32);
    pieces.iter().map(buffer).collect()
}

/// A sender, a receiver whose buffers are all taken, and what is in between.
struct Pair<'m, 't, 'p> {
    vms: Vec<Vm<'m>>,
    pass: Pass<'t, 'p>,
    header: usize,
}

impl Pair<'_, '_, '_> {
    /// Sends a frame from pieces of memory into buffers of others; what the switch touched
    /// meanwhile.
    fn send(&mut self, sent: &[Piece], received: &[Vec<Piece>]) -> Touched {
        let [sender, receiver] = &mut self.vms[..] else {
            unreachable!("two guests");
        };
        let chain = buffers(sent, Buffer::readable);
        assert!(sender.transmit.post(&chain, 0));
        sender.transmit.publish();
        for (chain, token) in received.iter().zip(0..) {
            let chain = buffers(chain, Buffer::writable);
            assert!(receiver.receive.post(&chain, token));
        }
        receiver.receive.publish();
        let touched = probe::touched(|| {
            self.pass.run(0, || true);
        });
        assert!(sender.transmit.reap().is_some());
        let came = std::iter::from_fn(|| receiver.receive.reap()).count();
        assert_eq!(came, received.len(), "buffers of {}", receiver.port.name());
        touched
    }

    /// Sends a frame of `len` bytes twice into the same buffers, and looks at the second time.
    fn check(&mut self, len: usize, sent: &[Piece], received: &[Vec<Piece>]) {
        let what = format!("{len} bytes, {sent:?} to {received:?}");
        let frame: Vec<u8> = [&mac(1)[..], &mac(0), &[8, 0]].concat();
        let frame: Vec<u8> = frame
            .into_iter()
            .chain((0..).map(|n| n as u8))
            .take(len)
            .collect();
        let [_, payload] = split_at(sent, self.header);
        write(&self.vms[0], &payload, &frame);
        let all: Vec<Piece> = received.concat();
        write(
            &self.vms[1],
            &all,
            &vec![UNTOUCHED; all.iter().map(|piece| piece.1).sum()],
        );
        let [header, room] = split_at(&all, self.header);
        let [filled, _] = split_at(&room, len);

        let first = self.send(sent, received);
        let mut expected = vec![0; 10];
        expected.extend([received.len() as u8, 0]);
        expected.truncate(self.header);
        assert_eq!(read(&self.vms[1], &header), expected, "{what}");
        let overlaps = |touched: &Touched, places: &[std::ops::Range<usize>]| {
            let overlap = |one: &std::ops::Range<usize>, other: &std::ops::Range<usize>| {
                one.start < other.end && other.start < one.end
            };
            let mut written = touched.written.iter();
            written.any(|one| places.iter().any(|other| overlap(one, other)))
        };
        let header = places(&self.vms[1], &header);
        assert!(overlaps(&first, &header), "the probe sees writes: {what}");

        let second = self.send(sent, received);
        assert!(!overlaps(&second, &header), "{what}");
        assert_eq!(read(&self.vms[1], &filled), frame, "{what}");
        self.check_asked(&[first, second], [&payload, &filled], header, &what);
    }

    /// What was asked for of both memories, but for the rings, is of lines that are read or
    /// written.
    fn check_asked(
        &self,
        touched: &[Touched; 2],
        [payload, filled]: [&[Piece]; 2],
        header: Vec<std::ops::Range<usize>>,
        what: &str,
    ) {
        let needed = [
            places(&self.vms[0], payload),
            places(&self.vms[1], filled)
                .into_iter()
                .chain(header)
                .collect(),
        ];
        for (vm, needed) in self.vms.iter().zip(needed) {
            let buffers = places(vm, &[(2 * RING, RAM - 2 * RING)]).remove(0);
            for asked in touched.iter().flat_map(|touched| &touched.asked) {
                let line = asked / LINE * LINE;
                let is_needed = needed
                    .iter()
                    .any(|place| place.start < line + LINE && line < place.end);
                let name = vm.port.name();
                assert!(
                    !buffers.contains(asked) || is_needed,
                    "{name}: {:#x} of the buffers at {:#x}, {what}",
                    asked - buffers.start,
                    2 * RING
                );
            }
            let first = needed[0].start / LINE;
            let asked = touched
                .iter()
                .all(|touched| touched.asked.iter().any(|asked| asked / LINE == first));
            assert!(asked, "the frame's first line: {what}");
        }
    }
}

#[test]
fn a_header_that_is_there_is_not_written_and_lines_that_nobody_reads_are_not_asked_for() {
    for features in header_forms() {
        let rams = rams::<2>();
        let mut vms = vms_with(&rams, features);
        let topology = topology(&vms, 1, |_| 0);
        let mut tools = Threads::new(1);
        let mut pass = tools.passes(&topology).remove(0);
        for _ in 0..ALL / 64 {
            assert_eq!(vms[0].send(1, 60, 64), 64);
            pass.run(0, || true);
        }
        assert_eq!(vms[1].take(usize::MAX), ALL);
        while vms[0].transmit.reap().is_some() {}
        let header = features.header();
        let mut pair = Pair { vms, pass, header };
        for len in [60, 64, 65, 129, 300, 1500] {
            for sent in ways_to_lie(header, SENT, len) {
                for received in ways_to_lie(header, RECEIVED, 1600) {
                    pair.check(len, &sent, &[received]);
                }
                if features.mergeable && len > 256 {
                    let first = vec![(RECEIVED - header, header + 128)];
                    let second = vec![(RECEIVED + 4096, 1600)];
                    pair.check(len, &sent, &[first, second]);
                }
            }
        }
        assert_eq!(header == LEGACY_NET_HDR_SIZE, !features.version_1);
    }
}
