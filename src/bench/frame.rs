//! Frames that can be accounted for: their layout and their check word.
//!
//! ```text
//! 0   destination MAC, source MAC: 02, three random bytes of this run, number of the guest (in
//!     the source also of its queue, above)
//! 12  EtherType 0x88b5 (local experimental)
//! 14  flow (16 bits)
//! 16  sequence number in the flow (64 bits)
//! 24  check word (64 bits)
//! 32  pattern: differs from buffer to buffer and from word to word
//! ```
//!
//! The random bytes tell one run's frames and addresses from another's at the same switch.
//!
//! The check word is the sum of the frame's other 64-bit words, each multiplied by an odd factor of
//! its own. It sees any changed, exchanged, repeated or missing word, and being linear it costs a
//! sender one multiplication: all words but the sequence number are prefilled, and their sum is
//! known. Up to 256 bytes all words count; above, the first eight and about every n-th of the rest,
//! where n bounds the work to 32 words and the sequence number says which, so that n frames in a
//! row cover all of it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::Window;

/// Shortest frame: an Ethernet frame without its check sequence.
pub const MIN_SIZE: usize = 60;
/// Longest frame: what fits a virtio-net buffer's 16-bit lengths, with room.
pub const MAX_SIZE: usize = 65_000;

const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];

const SEQUENCE_WORD: usize = 2;
const CHECK_WORD: usize = 3;
/// Words that always count.
const HEAD_WORDS: usize = 8;
/// Frames up to this size are checked whole.
const WHOLE_WORDS: usize = 256 / 8;

/// Offset of sequence number and check word.
const STAMP: usize = 8 * SEQUENCE_WORD;

/// Bits of the first two words that are the same in all frames of a run: that they are for one
/// station, the start of the source address, the EtherType.
const FIXED: [u64; 2] = [0xffff_0000_0000_0001, 0x0000_ffff_0000_ffff];
/// A broadcast's destination in the first word.
const BROADCAST: u64 = 0x0000_ffff_ffff_ffff;

/// Bits of a guest's number in its address.
pub const GUEST_BITS: u32 = 10;

/// A frame in memory as words, up to the end of the buffer; all of its own words are in it, the
/// last one whole.
pub type Words<'m> = &'m [AtomicU64];

/// The start of all MAC addresses of a run: locally administered, unicast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacPrefix([u8; 4]);

impl MacPrefix {
    /// A random one.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 4];
        getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
        bytes[0] = 2;
        Ok(MacPrefix(bytes))
    }

    /// The MAC address of guest `index`.
    pub fn mac(self, guest: usize) -> [u8; 6] {
        let ([a, b, c, d], [e, f]) = (self.0, (guest as u16).to_be_bytes());
        [a, b, c, d, e, f]
    }
}

impl fmt::Display for MacPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}")
    }
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

/// The frames of a run: how they are made and checked.
#[derive(Clone, Debug)]
pub struct Checker {
    size: usize,
    prefix: MacPrefix,
    /// What the [`FIXED`] bits are.
    fixed: [u64; 2],
    /// Whole words, and the bits that count in the one after them.
    words: usize,
    tail: u64,
    /// Every how many words one counts after the first eight (1: all).
    stride: usize,
    /// One for each word; that of the check word is 0.
    factors: Vec<u64>,
}

impl Checker {
    /// For frames of `size` bytes between guests with addresses of `prefix`.
    pub fn new(size: usize, prefix: MacPrefix) -> Self {
        let words = size / 8;
        let stride = if words <= WHOLE_WORDS {
            1
        } else {
            (words - HEAD_WORDS).div_ceil(WHOLE_WORDS - HEAD_WORDS)
        };
        let factor = |i: u64| match i as usize {
            CHECK_WORD => 0,
            _ => mix(i ^ 0x5052_4f4f) | 1,
        };
        let mut start = [0; 16];
        start[6..12].copy_from_slice(&prefix.mac(0));
        start[12..14].copy_from_slice(&ETHER_TYPE);
        let start = u128::from_le_bytes(start);
        Checker {
            size,
            prefix,
            fixed: [start as u64 & FIXED[0], (start >> 64) as u64 & FIXED[1]],
            words,
            tail: (1 << (8 * (size % 8))) - 1,
            stride,
            factors: (0..=words as u64).map(factor).collect(),
        }
    }

    /// Length of the frames.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The guests' addresses.
    pub fn prefix(&self) -> MacPrefix {
        self.prefix
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

    /// Fills a buffer of a flow; `salt` makes this buffer's pattern its own. Returns the sums of
    /// the words that do not change, one for each phase.
    pub fn prefill(&self, frame: &Window<'_>, route: (usize, usize, u16), salt: u64) -> Vec<u64> {
        let (source, destination, flow) = route;
        for (n, at) in (0..self.size).step_by(8).enumerate() {
            let word = mix(salt << 20 ^ n as u64).to_le_bytes();
            let end = 8.min(self.size - at);
            frame.write_bytes(at, &word[..end]);
        }
        frame.write_bytes(0, &self.prefix.mac(destination));
        frame.write_bytes(6, &self.prefix.mac(source));
        frame.write_bytes(12, &ETHER_TYPE);
        frame.write_bytes(14, &flow.to_le_bytes());
        frame.write_bytes(STAMP, &[0; 16]);
        let word = |n: usize| {
            let mut bytes = [0; 8];
            let len = 8.min(self.size - 8 * n);
            frame.read_bytes(8 * n, &mut bytes[..len]);
            u64::from_le_bytes(bytes)
        };
        (0..self.phases())
            .map(|phase| self.sampled_sum(phase, word))
            .collect()
    }

    /// Where [`Self::stamp`] writes in a prefilled frame.
    pub fn stamp_of<'m>(frame: &Window<'m>) -> Option<&'m [AtomicU64; 2]> {
        frame.sub(STAMP, 16)?.atomics().first_chunk()
    }

    /// Makes a prefilled frame number `sequence`; `sums` are those of its buffer.
    #[inline(always)]
    pub fn stamp(&self, stamp: &[AtomicU64; 2], sums: &[u64], sequence: u64) {
        let sum = sums[self.phase(sequence)];
        let check = sum.wrapping_add(sequence.wrapping_mul(self.factors[SEQUENCE_WORD]));
        stamp[0].store(sequence.to_le(), Ordering::Relaxed);
        stamp[1].store(check.to_le(), Ordering::Relaxed);
    }

    /// Checks a frame of `len` bytes in one piece.
    #[inline(always)]
    pub fn verify(&self, frame: Words<'_>, len: usize) -> Seen {
        let head = frame
            .first_chunk()
            .map_or([0; 4], |head| head.each_ref().map(load));
        if len != self.size {
            return self.unexpected(&head, len);
        }
        let sum = if self.stride == 1 {
            self.whole_sum(&head, frame)
        } else {
            self.sampled_sum(self.phase(head[SEQUENCE_WORD]), |n| self.cut(n, &frame[n]))
        };
        self.judge(&head, sum)
    }

    /// The sum of all words. What is decided on is what was checked: the head is not read again.
    #[inline(always)]
    fn whole_sum(&self, head: &[u64; 4], frame: Words<'_>) -> u64 {
        let (head_factors, factors) = self.factors.split_at(head.len());
        let (words, factors) = (
            &frame[head.len()..self.words],
            &factors[..self.words - head.len()],
        );
        let mut sum = 0u64;
        for (word, factor) in head.iter().zip(head_factors) {
            sum = sum.wrapping_add(word.wrapping_mul(*factor));
        }
        for (word, factor) in words.iter().zip(factors) {
            sum = sum.wrapping_add(load(word).wrapping_mul(*factor));
        }
        if self.tail != 0 {
            let tail = self.cut(self.words, &frame[self.words]);
            sum = sum.wrapping_add(tail.wrapping_mul(self.factors[self.words]));
        }
        sum
    }

    /// Word `n` of a frame, without what lies behind its end.
    #[inline(always)]
    fn cut(&self, n: usize, word: &AtomicU64) -> u64 {
        let word = load(word);
        if n < self.words {
            word
        } else {
            word & self.tail
        }
    }

    /// Checks a frame that lies in several pieces.
    pub fn verify_pieces(&self, pieces: &[(Window<'_>, usize)]) -> Seen {
        let len: usize = pieces.iter().map(|piece| piece.1).sum();
        let mut word = words(pieces);
        let head = [word(0), word(1), word(2), word(3)];
        if len != self.size {
            return self.unexpected(&head, len);
        }
        let sum = self.sampled_sum(self.phase(head[SEQUENCE_WORD]), words(pieces));
        self.judge(&head, sum)
    }

    /// A frame of another size is foreign, unless it says that it is ours.
    #[cold]
    fn unexpected(&self, head: &[u64; 4], len: usize) -> Seen {
        if len >= MIN_SIZE && self.ours(head) {
            return Seen::Corrupt;
        }
        self.not_ours(head, len)
    }

    #[cold]
    fn not_ours(&self, head: &[u64; 4], len: usize) -> Seen {
        let broadcast = head[0] == self.fixed[0] | BROADCAST;
        if broadcast && head[1] & FIXED[1] == self.fixed[1] && len >= MIN_SIZE {
            Seen::Announcement
        } else {
            Seen::Foreign
        }
    }

    #[inline(always)]
    fn ours(&self, head: &[u64; 4]) -> bool {
        let differ = |n: usize| (head[n] & FIXED[n]) ^ self.fixed[n];
        differ(0) | differ(1) == 0
    }

    #[inline(always)]
    fn judge(&self, head: &[u64; 4], sum: u64) -> Seen {
        if !self.ours(head) {
            return self.not_ours(head, self.size);
        }
        if sum != head[CHECK_WORD] {
            return Seen::Corrupt;
        }
        Seen::Frame {
            flow: (head[1] >> 48) as u16,
            sequence: head[SEQUENCE_WORD],
        }
    }

    /// Sum of the words of `phase`, each with its factor.
    #[inline(always)]
    fn sampled_sum(&self, phase: usize, mut word: impl FnMut(usize) -> u64) -> u64 {
        let mut sum = 0u64;
        let mut add = |n: usize| sum = sum.wrapping_add(word(n).wrapping_mul(self.factors[n]));
        (0..HEAD_WORDS.min(self.words)).for_each(&mut add);
        (HEAD_WORDS + phase..self.words)
            .step_by(self.stride)
            .for_each(&mut add);
        if self.tail != 0 {
            add(self.words);
        }
        sum
    }

    /// Fills a broadcast frame of guest `source`, from which a switch learns where it is.
    pub fn announcement(&self, frame: &Window<'_>, source: usize) {
        frame.write_bytes(0, &[0xff; 6]);
        frame.write_bytes(6, &self.prefix.mac(source));
        frame.write_bytes(12, &ETHER_TYPE);
        frame.write_bytes(14, &[0; MIN_SIZE - 14]);
    }
}

#[inline(always)]
fn load(word: &AtomicU64) -> u64 {
    u64::from_le(word.load(Ordering::Relaxed))
}

/// The words of a frame in pieces, to be asked for in ascending order: a search from the first
/// piece on for each would make the client the limit. Zeros behind the end.
fn words<'p>(pieces: &'p [(Window<'_>, usize)]) -> impl FnMut(usize) -> u64 + 'p {
    // What is not passed yet, and where in the frame that starts.
    let (mut rest, mut start) = (pieces, 0);
    move |n| {
        let mut bytes = [0; 8];
        while let [(window, len), later @ ..] = rest {
            debug_assert!(8 * n >= start, "asked for in ascending order");
            let at = 8 * n - start;
            if at + 8 <= *len {
                window.read_bytes(at, &mut bytes);
                break;
            }
            if at < *len {
                copy_out(rest, at, &mut bytes);
                break;
            }
            (rest, start) = (later, start + len);
        }
        u64::from_le_bytes(bytes)
    }
}

/// Copies what there is from `at` on.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SharedMemory;

    const PREFIX: MacPrefix = MacPrefix([2, 7, 8, 9]);

    fn filled<'m>(memory: &'m SharedMemory, size: usize, sequence: u64) -> (Checker, Window<'m>) {
        let checker = Checker::new(size, PREFIX);
        let frame = memory.window(64, size + 64).unwrap();
        let sums = checker.prefill(&frame, (0, 1, 9), 3);
        checker.stamp(Checker::stamp_of(&frame).unwrap(), &sums, sequence);
        (checker, frame)
    }

    #[test]
    fn stamped_frames_of_any_size_are_intact() {
        let memory = SharedMemory::create(128 << 10, true).unwrap();
        for size in (60..300).chain([1500, 1514, 9000, 9216, 65_000]) {
            for sequence in [0, 1, 77, u64::MAX] {
                let (checker, frame) = filled(&memory, size, sequence);
                let intact = Seen::Frame { flow: 9, sequence };
                assert_eq!(checker.verify(frame.atomics(), size), intact, "{size}");
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
                assert_eq!(
                    checker.verify(frame.atomics(), size),
                    Seen::Corrupt,
                    "{size} {at}"
                );
            }
        }
    }

    #[test]
    fn any_changed_byte_of_a_long_frame_is_seen_within_a_round_of_samples() {
        let memory = SharedMemory::create(16384, true).unwrap();
        let size = 9000;
        for at in (32..size).step_by(37) {
            let rounds = Checker::new(size, PREFIX).phases() as u64;
            let found = (0..rounds).any(|sequence| {
                let (checker, frame) = filled(&memory, size, sequence);
                let mut byte = [0];
                frame.read_bytes(at, &mut byte);
                frame.write_bytes(at, &[!byte[0]]);
                checker.verify(frame.atomics(), size) == Seen::Corrupt
            });
            assert!(found, "{at}");
        }
    }

    #[test]
    fn a_frame_in_pieces_checks_like_a_whole_one() {
        let memory = SharedMemory::create(16384, true).unwrap();
        // In a round of samples each word has its turn.
        for sequence in 0..Checker::new(1514, PREFIX).phases() as u64 {
            let (checker, frame) = filled(&memory, 1514, sequence);
            let pieces = |ends: &[usize]| -> Vec<_> {
                let piece = |ends: &[usize]| {
                    let len = ends[1] - ends[0];
                    (frame.sub(ends[0], len).unwrap(), len)
                };
                ends.windows(2).map(piece).collect()
            };
            let intact = Seen::Frame { flow: 9, sequence };
            for cut in [1, 13, 60, 700, 1513] {
                assert_eq!(checker.verify_pieces(&pieces(&[0, cut, 1514])), intact);
            }
            // Some shorter than a word, and one of nothing.
            let odd = pieces(&[0, 700, 703, 703, 709, 1514]);
            assert_eq!(checker.verify_pieces(&odd), intact);
        }
    }

    #[test]
    fn shortened_frames_are_corrupt_and_strangers_foreign() {
        let memory = SharedMemory::create(16384, true).unwrap();
        let (checker, frame) = filled(&memory, 1514, 12);
        assert_eq!(checker.verify(frame.atomics(), 1513), Seen::Corrupt);
        checker.announcement(&frame, 4);
        assert_eq!(checker.verify(frame.atomics(), 60), Seen::Announcement);
        frame.write_bytes(12, &[8, 0]);
        assert_eq!(checker.verify(frame.atomics(), 1514), Seen::Foreign);
    }

    #[test]
    fn another_runs_frames_and_announcements_are_foreign() {
        let memory = SharedMemory::create(16384, true).unwrap();
        let (_, frame) = filled(&memory, 64, 0);
        let other = Checker::new(64, MacPrefix([2, 7, 8, 10]));
        assert_eq!(other.verify(frame.atomics(), 64), Seen::Foreign);
        assert_eq!(other.verify(frame.atomics(), 60), Seen::Foreign);
        other.announcement(&frame, 0);
        let checker = Checker::new(64, PREFIX);
        assert_eq!(checker.verify(frame.atomics(), 60), Seen::Foreign);
        assert_eq!(other.verify(frame.atomics(), 60), Seen::Announcement);
    }

    #[test]
    fn two_runs_have_different_addresses_that_belong_to_nobody() {
        let prefixes = [MacPrefix::random().unwrap(), MacPrefix::random().unwrap()];
        assert_ne!(prefixes[0], prefixes[1]);
        assert!(prefixes.iter().all(|prefix| prefix.mac(9)[0] == 2));
        assert_eq!(PREFIX.mac(0x102), [2, 7, 8, 9, 1, 2]);
        assert_eq!(PREFIX.to_string(), "02:07:08:09");
    }
}
