//! Frames that can be accounted for: their layout and their check word.
//!
//! ```text
//! 0   destination MAC, source MAC
//! 12  EtherType 0x88b5 (local experimental)
//! 14  flow (16 bits)
//! 16  sequence number in the flow (64 bits)
//! 24  check word (64 bits)
//! 32  pattern: differs from buffer to buffer and from word to word
//! ```
//!
//! The check word is the sum of the frame's other 64-bit words, each multiplied by an odd factor of its
//! own. It sees any changed, exchanged, repeated or missing word, and being linear it costs a sender
//! one multiplication: all words but the sequence number are prefilled, and their sum is known. Up to 256
//! bytes all words count; above, the first eight and about every n-th of the rest, where n bounds the
//! work to 32 words and the sequence number says which, so that n frames in a row cover all of it.

use crate::memory::Window;

/// Shortest frame: an Ethernet frame without its check sequence.
pub const MIN_SIZE: usize = 60;
/// Longest frame: what fits a virtio-net buffer's 16-bit lengths, with room.
pub const MAX_SIZE: usize = 65_000;

const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];
/// First bytes of every MAC here: locally administered, unicast.
const MAC_PREFIX: [u8; 3] = [0x02, 0x50, 0x58];

const SEQUENCE_WORD: usize = 2;
const CHECK_WORD: usize = 3;
/// Words that always count.
const HEAD_WORDS: usize = 8;
/// Frames up to this size are checked whole.
const WHOLE_WORDS: usize = 256 / 8;

/// Offset of the sequence number.
const SEQUENCE: usize = 8 * SEQUENCE_WORD;

/// The MAC address of guest `index`.
pub fn mac(guest: usize) -> [u8; 6] {
    let [.., a, b, c] = (guest as u32).to_be_bytes();
    [MAC_PREFIX[0], MAC_PREFIX[1], MAC_PREFIX[2], a, b, c]
}

/// splitmix64: well mixed words from consecutive numbers.
fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What a received frame turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// An intact frame of a flow.
    Frame {
        /// The flow.
        flow: u16,
        /// Its sequence number.
        sequence: u64,
    },
    /// One of ours, with bytes changed or missing.
    Corrupt,
    /// Not one of ours.
    Foreign,
    /// A guest's broadcast at the start.
    Announcement,
}

/// How frames of one size are checked.
#[derive(Clone, Debug)]
pub struct Checker {
    size: usize,
    /// Whole words, and bytes after them.
    words: usize,
    tail: usize,
    /// Every how many words one counts after the first eight (1: all).
    stride: usize,
    factors: Vec<u64>,
}

impl Checker {
    /// For frames of `size` bytes.
    pub fn new(size: usize) -> Self {
        let words = size / 8;
        let stride = if words <= WHOLE_WORDS {
            1
        } else {
            (words - HEAD_WORDS).div_ceil(WHOLE_WORDS - HEAD_WORDS)
        };
        Checker {
            size,
            words,
            tail: size % 8,
            stride,
            factors: (0..=words as u64)
                .map(|i| mix(i ^ 0x5052_4f4f) | 1)
                .collect(),
        }
    }

    /// Length of the frames.
    pub fn size(&self) -> usize {
        self.size
    }

    /// How many different samples there are; frame n uses sample n modulo this.
    pub fn phases(&self) -> usize {
        self.stride
    }

    #[inline(always)]
    fn phase(&self, sequence: u64) -> usize {
        if self.stride == 1 {
            0
        } else {
            (sequence as u32 % self.stride as u32) as usize
        }
    }

    /// Fills a buffer of a flow; `salt` makes this buffer's pattern its own. Returns the sums of the words that
    /// do not change, one for each phase.
    pub fn prefill(&self, frame: &Window<'_>, route: (usize, usize, u16), salt: u64) -> Vec<u64> {
        let (source, destination, flow) = route;
        for (n, at) in (0..self.size).step_by(8).enumerate() {
            let word = mix(salt << 20 ^ n as u64).to_le_bytes();
            let end = 8.min(self.size - at);
            frame.write_bytes(at, &word[..end]);
        }
        frame.write_bytes(0, &mac(destination));
        frame.write_bytes(6, &mac(source));
        frame.write_bytes(12, &ETHER_TYPE);
        frame.write_bytes(14, &flow.to_le_bytes());
        frame.write_bytes(SEQUENCE, &[0; 16]);
        (0..self.phases())
            .map(|phase| self.sum(phase, |at| word(frame, at), |at| self.tail_word(frame, at)))
            .collect()
    }

    /// Makes a prefilled frame number `sequence`.
    #[inline(always)]
    pub fn stamp(&self, frame: &Window<'_>, sums: &[u64], sequence: u64) {
        let sum = sums[self.phase(sequence)];
        let check = sum.wrapping_add(sequence.wrapping_mul(self.factors[SEQUENCE_WORD]));
        let mut both = [0; 16];
        both[..8].copy_from_slice(&sequence.to_le_bytes());
        both[8..].copy_from_slice(&check.to_le_bytes());
        frame.write_bytes(SEQUENCE, &both);
    }

    /// Checks a frame in one piece; `frame` may be longer than its `len` bytes.
    #[inline(always)]
    pub fn verify(&self, frame: &Window<'_>, len: usize) -> Seen {
        if len < MIN_SIZE {
            return Seen::Foreign;
        }
        let mut head = [0; 64];
        frame.read_bytes(0, &mut head[..32]);
        if len != self.size {
            return Self::unexpected(&head);
        }
        let sum = if self.stride == 1 {
            self.whole_sum(frame)
        } else {
            let phase = self.phase(head_word(&head, SEQUENCE_WORD));
            self.sum(phase, |at| word(frame, at), |at| self.tail_word(frame, at))
        };
        self.judge(&head, sum)
    }

    /// The sum of all words, eight at a time: copies of a fixed size and no bounds to check per word.
    #[inline(always)]
    fn whole_sum(&self, frame: &Window<'_>) -> u64 {
        let mut sum = 0u64;
        let mut at = 0;
        let chunks = self.factors[..self.words].chunks_exact(8);
        let rest = chunks.remainder();
        for factors in chunks {
            let mut bytes = [0; 64];
            frame.read_bytes(at, &mut bytes);
            for (word, factor) in bytes.chunks_exact(8).zip(factors) {
                let word = word.try_into().map_or(0, u64::from_le_bytes);
                sum = sum.wrapping_add(word.wrapping_mul(*factor));
            }
            at += 64;
        }
        for factor in rest {
            sum = sum.wrapping_add(word(frame, at).wrapping_mul(*factor));
            at += 8;
        }
        if self.tail != 0 {
            let tail = self.tail_word(frame, at);
            sum = sum.wrapping_add(tail.wrapping_mul(self.factors[self.words]));
        }
        sum
    }

    /// Checks a frame that lies in several pieces, in `scratch` if need be.
    pub fn verify_pieces(&self, pieces: &[(Window<'_>, usize)]) -> Seen {
        let byte = |at: usize, to: &mut [u8]| copy_out(pieces, at, to);
        let len: usize = pieces.iter().map(|piece| piece.1).sum();
        if len < MIN_SIZE {
            return Seen::Foreign;
        }
        let mut head = [0; 64];
        byte(0, &mut head[..32]);
        if len != self.size {
            return Self::unexpected(&head);
        }
        let sequence = head_word(&head, SEQUENCE_WORD);
        let read = |at: usize, bytes: usize| {
            let mut word = [0; 8];
            byte(at, &mut word[..bytes]);
            u64::from_le_bytes(word)
        };
        let sum = self.sum(
            self.phase(sequence),
            |at| read(at, 8),
            |at| read(at, self.tail),
        );
        self.judge(&head, sum)
    }

    /// A frame of another size is foreign, unless it says that it is ours.
    #[cold]
    fn unexpected(head: &[u8; 64]) -> Seen {
        if ours(head) {
            return Seen::Corrupt;
        }
        Self::not_ours(head)
    }

    #[cold]
    fn not_ours(head: &[u8; 64]) -> Seen {
        let announced = head[..6] == [0xff; 6] && head[6..9] == MAC_PREFIX;
        if announced && head[12..14] == ETHER_TYPE {
            Seen::Announcement
        } else {
            Seen::Foreign
        }
    }

    #[inline(always)]
    fn judge(&self, head: &[u8; 64], sum: u64) -> Seen {
        if !ours(head) {
            return Self::not_ours(head);
        }
        let check = head_word(head, CHECK_WORD);
        // `sum` has the check word in it, as it has all the others.
        let expected = check.wrapping_add(check.wrapping_mul(self.factors[CHECK_WORD]));
        if sum != expected {
            return Seen::Corrupt;
        }
        Seen::Frame {
            flow: u16::from_le_bytes([head[14], head[15]]),
            sequence: head_word(head, SEQUENCE_WORD),
        }
    }

    /// Sum of the words of `phase`, each with its factor.
    #[inline(always)]
    fn sum(&self, phase: usize, word: impl Fn(usize) -> u64, tail: impl Fn(usize) -> u64) -> u64 {
        let mut sum = 0u64;
        let mut add = |n: usize, word: u64| {
            sum = sum.wrapping_add(word.wrapping_mul(self.factors[n]));
        };
        if self.stride == 1 {
            (0..self.words).for_each(|n| add(n, word(8 * n)));
        } else {
            (0..HEAD_WORDS).for_each(|n| add(n, word(8 * n)));
            (HEAD_WORDS + phase..self.words)
                .step_by(self.stride)
                .for_each(|n| add(n, word(8 * n)));
        }
        if self.tail != 0 {
            add(self.words, tail(8 * self.words));
        }
        sum
    }

    #[inline(always)]
    fn tail_word(&self, frame: &Window<'_>, at: usize) -> u64 {
        let mut word = [0; 8];
        frame.read_bytes(at, &mut word[..self.tail]);
        u64::from_le_bytes(word)
    }
}

#[inline(always)]
fn word(frame: &Window<'_>, at: usize) -> u64 {
    let mut word = [0; 8];
    frame.read_bytes(at, &mut word);
    u64::from_le_bytes(word)
}

#[inline(always)]
fn head_word(head: &[u8; 64], n: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&head[8 * n..8 * n + 8]);
    u64::from_le_bytes(word)
}

#[inline(always)]
fn ours(head: &[u8; 64]) -> bool {
    head[6..9] == MAC_PREFIX && head[12..14] == ETHER_TYPE && head[0] & 1 == 0
}

fn copy_out(pieces: &[(Window<'_>, usize)], mut at: usize, to: &mut [u8]) {
    let mut done = 0;
    for (window, len) in pieces {
        if at >= *len {
            at -= len;
            continue;
        }
        let part = (to.len() - done).min(len - at);
        window.read_bytes(at, &mut to[done..done + part]);
        done += part;
        at = 0;
        if done == to.len() {
            return;
        }
    }
}

/// Fills a broadcast frame of guest `source`, from which a switch learns where it is.
pub fn announcement(frame: &Window<'_>, source: usize) {
    frame.write_bytes(0, &[0xff; 6]);
    frame.write_bytes(6, &mac(source));
    frame.write_bytes(12, &ETHER_TYPE);
    frame.write_bytes(14, &[0; MIN_SIZE - 14]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SharedMemory;

    fn filled<'m>(memory: &'m SharedMemory, size: usize, sequence: u64) -> (Checker, Window<'m>) {
        let checker = Checker::new(size);
        let frame = memory.window(64, size + 64).unwrap();
        let sums = checker.prefill(&frame, (0, 1, 9), 3);
        checker.stamp(&frame, &sums, sequence);
        (checker, frame)
    }

    #[test]
    fn stamped_frames_of_any_size_are_intact() {
        let memory = SharedMemory::create(128 << 10, true).unwrap();
        for size in (60..300).chain([1500, 1514, 9000, 9216, 65_000]) {
            for sequence in [0, 1, 77, u64::MAX] {
                let (checker, frame) = filled(&memory, size, sequence);
                let intact = Seen::Frame { flow: 9, sequence };
                assert_eq!(checker.verify(&frame, size), intact, "{size}");
            }
        }
    }

    #[test]
    fn any_changed_byte_of_a_short_frame_is_seen() {
        let memory = SharedMemory::create(8192, true).unwrap();
        for size in [60, 64, 256] {
            for at in 16..size {
                let (checker, frame) = filled(&memory, size, 5);
                let mut byte = [0];
                frame.read_bytes(at, &mut byte);
                frame.write_bytes(at, &[byte[0] ^ 0x10]);
                assert_eq!(checker.verify(&frame, size), Seen::Corrupt, "{size} {at}");
            }
        }
    }

    #[test]
    fn any_changed_byte_of_a_long_frame_is_seen_within_a_round_of_samples() {
        let memory = SharedMemory::create(16384, true).unwrap();
        let size = 9000;
        for at in (32..size).step_by(37) {
            let rounds = Checker::new(size).phases() as u64;
            let found = (0..rounds).any(|sequence| {
                let (checker, frame) = filled(&memory, size, sequence);
                let mut byte = [0];
                frame.read_bytes(at, &mut byte);
                frame.write_bytes(at, &[!byte[0]]);
                checker.verify(&frame, size) == Seen::Corrupt
            });
            assert!(found, "{at}");
        }
    }

    #[test]
    fn a_frame_in_pieces_checks_like_a_whole_one() {
        let memory = SharedMemory::create(16384, true).unwrap();
        let (checker, frame) = filled(&memory, 1514, 12);
        for cut in [1, 13, 60, 700, 1513] {
            let pieces = [
                (frame.sub(0, cut).unwrap(), cut),
                (frame.sub(cut, 1514 - cut).unwrap(), 1514 - cut),
            ];
            let intact = Seen::Frame {
                flow: 9,
                sequence: 12,
            };
            assert_eq!(checker.verify_pieces(&pieces), intact);
        }
    }

    #[test]
    fn shortened_frames_are_corrupt_and_strangers_foreign() {
        let memory = SharedMemory::create(16384, true).unwrap();
        let (checker, frame) = filled(&memory, 1514, 12);
        assert_eq!(checker.verify(&frame, 1513), Seen::Corrupt);
        announcement(&frame, 4);
        assert_eq!(checker.verify(&frame, 60), Seen::Announcement);
        frame.write_bytes(12, &[8, 0]);
        assert_eq!(checker.verify(&frame, 1514), Seen::Foreign);
    }
}
