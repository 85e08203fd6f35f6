//! Receive queues of both kinds, against a list of buffers that frames are poured into, and another
//! implementation of the device, which returns the buffers that this list says on a ring with the
//! same bytes.

use std::collections::VecDeque;

use pollux::virtio::{Claim, NoClaim, ReceiveQueue, RingFeatures};

use crate::guest::*;
use crate::reference::{Reference, common_bytes, post_both, set_event};
use crate::{Random, shuffled, with_seeds};

/// What a posted receive buffer is to the model.
struct Posted {
    id: u16,
    pieces: Vec<Piece>,
    len: u32,
    /// Wholly in memory and long enough to be used.
    good: bool,
}

/// Bytes below which a buffer is returned unused: header and the shortest frame.
const SHORTEST: u32 = 72;
/// What buffers are filled with before they are posted.
const UNTOUCHED: u8 = 0xee;

/// Frames are poured into buffers in the order in which these were posted.
struct ReceiveModel<'g> {
    guest: &'g Guest,
    /// Where the reference has its ring and tables.
    theirs: &'g Guest,
    queue: &'g ReceiveQueue,
    reference: Reference<'g>,
    drivers: [Driver<'g>; 2],
    /// Places for buffers, each in use by at most one.
    places: Vec<u64>,
    posted: VecDeque<Posted>,
    tag: u8,
}

impl<'g> ReceiveModel<'g> {
    fn new(guest: &'g Guest, theirs: &'g Guest, queue: &'g ReceiveQueue, base: u16) -> Self {
        let places = (0..u64::from(guest.size().min(256))).map(|i| DATA + i * 0x1000);
        assert!(
            queue.take_call_wanted(),
            "the driver is called at the start"
        );
        let drivers = [guest.driver_at(base), theirs.driver_at(base)];
        ReceiveModel {
            guest,
            theirs,
            queue,
            reference: Reference::new(theirs, base),
            drivers,
            places: places.collect(),
            posted: VecDeque::new(),
            tag: 0,
        }
    }

    fn post(&mut self, random: &mut Random) {
        let free = u64::from(self.drivers[0].free());
        let Some(place) = (free > 0).then(|| self.places.pop()).flatten() else {
            return;
        };
        // A long buffer may be in pieces; short ones are not, or a frame would need more pieces
        // than a claim keeps.
        let (len, most) = match random.below(12) {
            0 => (random.between(1, 71), 1),
            1..=4 => (random.between(72, 300), 1),
            // Of many: two of them hold any frame.
            5 => (2048, 500),
            _ => (random.between(300, 2048), 4),
        };
        let tabled = random.chance(3);
        let most = if tabled { most } else { most.min(free) };
        let mut pieces = split_up(place, len, random.between(1, most), random);
        let unmapped = random.chance(20);
        if unmapped {
            pieces[0].addr = HOLE;
        }
        self.guest.write(place, &vec![UNTOUCHED; len as usize]);
        let table = DATA + 0x10_0000 + 2 * (place - DATA);
        let chain = if tabled {
            self.theirs.table(table, &pieces);
            vec![self.guest.table(table, &pieces)]
        } else {
            pieces.clone()
        };
        let id = post_both(&mut self.drivers, &chain, random);
        pieces[0].addr = place;
        self.posted.push_back(Posted {
            id,
            len: len as u32,
            good: !unmapped && len as u32 >= SHORTEST,
            pieces,
        });
    }

    /// The buffers that the frame ends up in and those returned unused on the way, with what is
    /// written to each; whether it is delivered at all.
    fn pour(&mut self, frame_len: usize) -> (Vec<(Posted, u32)>, bool) {
        let mut back = Vec::new();
        'again: loop {
            let mut left = frame_len as u32 + HEADER as u32;
            for count in 0..self.posted.len() {
                let buffer = &self.posted[count];
                if !buffer.good {
                    let unused = self.posted.drain(..=count);
                    back.extend(unused.map(|buffer| (buffer, 0)));
                    continue 'again;
                }
                if !self.guest.features.mergeable && buffer.len < left {
                    return (back, false);
                }
                left -= left.min(buffer.len);
                if left == 0 {
                    let mut left = frame_len as u32 + HEADER as u32;
                    for buffer in self.posted.drain(..=count) {
                        let len = left.min(buffer.len);
                        left -= len;
                        back.push((buffer, len));
                    }
                    return (back, true);
                }
            }
            return (back, false);
        }
    }

    fn deliver(&mut self, random: &mut Random) {
        let longest = if self.guest.features.mergeable {
            4000
        } else {
            2200
        };
        let mut frames = Vec::new();
        for _ in 0..random.between(1, 40) {
            self.tag = self.tag.wrapping_add(1);
            frames.push(frame(self.tag, random.between(14, longest) as usize));
        }
        let (delivered, reason) = deliver(self.queue, &frames);
        assert_ne!(reason, Some(NoClaim::Broken));
        let mut lens = Vec::new();
        for (index, frame) in frames.iter().enumerate() {
            let (back, fits) = self.pour(frame.len());
            assert_eq!(fits, index < delivered, "frame {index}, {reason:?}");
            lens.extend(back.iter().map(|(_, len)| *len));
            self.check(&back, fits.then_some(frame));
            if !fits {
                break;
            }
        }
        assert_eq!(self.drivers[0].reap(), None, "nothing else came back");
        self.complete_theirs(&lens);
    }

    /// The reference returns as many buffers with these lengths: its ring has the same bytes, and
    /// its driver is called when ours is.
    fn complete_theirs(&mut self, lens: &[u32]) {
        for _ in lens {
            self.reference.take(self.theirs).unwrap();
        }
        let event_idx = self.guest.features.event_idx;
        let call = !lens.is_empty() && self.reference.complete(lens, event_idx);
        assert_eq!(self.queue.take_call_wanted(), call, "{lens:?}");
        assert!(
            common_bytes(self.guest, 0..0) == common_bytes(self.theirs, 0..0),
            "the rings have the same bytes"
        );
        assert_eq!(self.drivers[1].reap_all().len(), lens.len());
    }

    /// Used elements and content of the buffers of one frame.
    fn check(&mut self, back: &[(Posted, u32)], frame: Option<&Vec<u8>>) {
        let mut content = Vec::new();
        for (buffer, len) in back {
            assert_eq!(self.drivers[0].reap(), Some((buffer.id, *len)));
            let mut bytes = Vec::new();
            for piece in &buffer.pieces {
                bytes.extend(self.guest.read(piece.addr, piece.len));
            }
            let (written, rest) = bytes.split_at(*len as usize);
            content.extend_from_slice(written);
            assert!(rest.iter().all(|&byte| byte == UNTOUCHED));
            self.places.push(buffer.pieces[0].addr);
        }
        let Some(frame) = frame else {
            return;
        };
        let count = back.iter().filter(|(_, len)| *len > 0).count() as u16;
        assert_eq!(content[10..12], count.to_le_bytes(), "num_buffers");
        assert_eq!(content[HEADER..], frame[..]);
    }
}

/// A buffer of `len` bytes as `count` pieces.
fn split_up(place: u64, len: u64, count: u64, random: &mut Random) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut at = 0;
    for left in (1..count).rev() {
        let piece = random.between(1, ((len - at) / (left + 1)).max(1));
        pieces.push(writable(place + at, piece as u32));
        at += piece;
    }
    pieces.push(writable(place + at, (len - at) as u32));
    pieces
}

fn receive_like_the_model(size: u16, packed: bool, base: u16, random: &mut Random) {
    let features = RingFeatures {
        mergeable: random.chance(2),
        event_idx: random.chance(2),
        ..features(packed)
    };
    let (guest, theirs) = (Guest::new(size, features), Guest::new(size, features));
    drop(guest.driver_at(base));
    let queue = ReceiveQueue::start(&guest.setup(u32::from(base))).unwrap();
    let mut model = ReceiveModel::new(&guest, &theirs, &queue, base);
    // Rings of the largest sizes are slow to compare.
    for _ in 0..if size > 1000 { 40 } else { 200 } {
        for _ in 0..random.below(40) {
            model.post(random);
        }
        if random.chance(2) {
            set_event(&guest, &mut model.drivers, random);
        }
        model.deliver(random);
    }
    assert_eq!(queue.broken(), None);
}

#[test]
fn split_receive_queues_fill_buffers_like_the_model() {
    with_seeds(10, |random| {
        for size in [1, 2, 16, 64, 256, 32768] {
            let base = 65535 - random.below(100) as u16;
            receive_like_the_model(size, false, base, random);
        }
    });
}

#[test]
fn packed_receive_queues_fill_buffers_like_the_model() {
    with_seeds(10, |random| {
        for size in [1, 2, 3, 16, 320, 997, 32767, 32768] {
            let near_the_wrap = size - 1 - random.below(u64::from(size).min(100)) as u16;
            let wrap = random.below(2) as u16 * 0x8000;
            receive_like_the_model(size, true, near_the_wrap | wrap, random);
        }
    });
}

/// All descriptors of a ring are claimed at once, and become visible in one run: the first claim is
/// committed last.
fn a_whole_ring(size: u16, base: u16, random: &mut Random) {
    const LEN: u64 = 128;
    let guest = Guest::new(size, features(true));
    let mut driver = guest.driver_at(base);
    let queue = ReceiveQueue::start(&guest.setup(u32::from(base))).unwrap();
    let ids = shuffled(size, random);
    let place = |id: u16| DATA + u64::from(id) * LEN;
    for lap in 0..3 {
        for &id in &ids {
            driver.packed().post(id, &[writable(place(id), LEN as u32)]);
        }
        let mut claims = Vec::new();
        let mut left = usize::from(size);
        while left > 0 {
            let mut claim = Claim::new();
            let lengths = std::iter::repeat_n(60, left);
            queue.claim(lengths, &mut claim).unwrap();
            for index in 0..claim.frames() {
                let number = usize::from(size) - left + index + lap;
                fill(&claim, index, &frame(number as u8, 60));
            }
            left -= claim.frames();
            claims.push(claim);
        }
        let refused = queue.claim(std::iter::once(60), &mut Claim::new());
        assert_eq!(refused, Err(NoClaim::Full));
        let (before, first) = (queue.published(), claims.remove(0));
        while !claims.is_empty() {
            let any = random.below(claims.len() as u64) as usize;
            queue.commit(&claims.swap_remove(any));
        }
        assert_eq!(driver.reap(), None, "the first claim is open");
        queue.commit(&first);
        assert_eq!(queue.published() - before, u64::from(size));
        for (number, &id) in ids.iter().enumerate() {
            assert_eq!(driver.reap(), Some((id, 72)));
            let bytes = guest.read(place(id) + HEADER as u64, 60);
            assert_eq!(bytes, frame((number + lap) as u8, 60));
        }
        assert_eq!(driver.free(), size);
    }
    assert_eq!(queue.broken(), None);
}

#[test]
fn a_packed_receive_queue_of_the_largest_sizes_has_all_its_descriptors_out_at_once() {
    with_seeds(1, |random| {
        for size in [3, 320, 32767, 32768] {
            a_whole_ring(size, 0x8000, random);
            let anywhere = random.below(u64::from(size)) as u16;
            a_whole_ring(size, anywhere, random);
        }
    });
}
