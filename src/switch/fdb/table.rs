//! The cells of the FDB: keys, values, times, and the places where a key may be.
//!
//! A bucket is eight cells. Its keys fill one cache line, so that looking for a key in its first
//! bucket reads one line and compares eight words; values and times lie in lines of their own. Each
//! key has two buckets. They are chosen by a hash that no guest can predict, so a guest cannot aim
//! addresses at the bucket of another guest's address. At most half of the cells are in use, so
//! that both buckets of a key are practically never full.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::super::PortRef;
use crate::wire::Mac;

/// Cells of a bucket: the 64-bit words of a cache line.
pub(super) const BUCKET_CELLS: usize = 8;
/// From this many keys on, a key's first bucket leaves new keys to the second if that is emptier.
/// High, so that most look-ups end in the first bucket; below the top, so that a full pair is rare.
const CROWDED: usize = 6;

/// A cell's key word while the cell is free.
pub(super) const EMPTY: u64 = 0;
/// A cell's key word from removal until all readers have moved on. It equals no key. It is not
/// `EMPTY`, so no thread can put another key there.
pub(super) const TOMBSTONE: u64 = 1;

/// VLAN and address in one word; bit 63 is set, so no key is `EMPTY` or `TOMBSTONE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key(u64);

impl Key {
    const OCCUPIED: u64 = 1 << 63;

    #[inline]
    pub(super) fn new(vlan: u16, mac: Mac) -> Key {
        Key(Self::OCCUPIED | u64::from(vlan & 0xfff) << 48 | mac.bits())
    }

    /// The key in a cell's key word, if it holds one.
    pub(super) fn from_word(word: u64) -> Option<Key> {
        (word & Self::OCCUPIED != 0).then_some(Key(word))
    }

    pub(super) fn word(self) -> u64 {
        self.0
    }

    pub(super) fn vlan(self) -> u16 {
        (self.0 >> 48) as u16 & 0xfff
    }

    pub(super) fn mac(self) -> Mac {
        Mac::from_bits(self.0)
    }
}

/// A cell's value word: slot (16 bits), generation (32), flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Value(u64);

impl Value {
    /// The cell has its key, but not its value yet. Readers treat the key as unknown.
    pub(super) const PENDING: Value = Value(0);
    /// Taken out; the last value of a cell before it is `EMPTY` again.
    pub(super) const FREED: Value = Value(1 << 61);
    const LIVE: u64 = 1 << 63;
    const STATIC: u64 = 1 << 62;

    /// What [`Value::word`] has made of a value.
    pub(super) fn from_word(word: u64) -> Value {
        Value(word)
    }

    pub(super) fn word(self) -> u64 {
        self.0
    }

    #[inline]
    pub(super) fn learned(port: PortRef) -> Value {
        Value(Self::LIVE | u64::from(port.generation) << 16 | u64::from(port.slot))
    }

    pub(super) fn fixed(port: PortRef) -> Value {
        Value(Self::learned(port).0 | Self::STATIC)
    }

    #[inline]
    pub(super) fn is_live(self) -> bool {
        self.0 & Self::LIVE != 0
    }

    #[inline]
    pub(super) fn is_static(self) -> bool {
        self.0 & Self::STATIC != 0
    }

    #[inline]
    pub(super) fn port(self) -> PortRef {
        PortRef {
            slot: self.0 as u16,
            generation: (self.0 >> 16) as u32,
        }
    }
}

#[repr(align(64))]
#[derive(Default)]
struct KeyLine([AtomicU64; BUCKET_CELLS]);
#[repr(align(64))]
#[derive(Default)]
struct ValueLine([AtomicU64; BUCKET_CELLS]);
#[repr(align(32))]
#[derive(Default)]
struct SeenLine([AtomicU32; BUCKET_CELLS]);

/// The two buckets of a key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Home {
    first: usize,
    second: usize,
}

/// What a search for an empty cell found.
pub(super) enum Place {
    /// This cell was empty.
    Empty(usize),
    /// A cell has the key already, and its value will follow.
    Pending,
    /// Both buckets are full.
    Full,
}

pub(super) struct Table {
    keys: Box<[KeyLine]>,
    values: Box<[ValueLine]>,
    seen: Box<[SeenLine]>,
    hash_key: [u64; 2],
}

/// Both halves of a 64 × 64 → 128 bit product, folded.
#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

impl Table {
    /// A table for `capacity` keys, at most half full with them.
    pub(super) fn new(capacity: usize, hash_key: [u64; 2]) -> Table {
        let buckets = (2 * capacity)
            .div_ceil(BUCKET_CELLS)
            .max(2)
            .next_power_of_two();
        Table {
            keys: (0..buckets).map(|_| KeyLine::default()).collect(),
            values: (0..buckets).map(|_| ValueLine::default()).collect(),
            seen: (0..buckets).map(|_| SeenLine::default()).collect(),
            hash_key,
        }
    }

    /// Number of cells.
    pub(super) fn cells(&self) -> usize {
        self.keys.len() * BUCKET_CELLS
    }

    /// Where `key` may lie. Two rounds: after one, addresses in steps of 2^11 and more would
    /// share their low bits under an unlucky hash key.
    #[inline]
    pub(super) fn home(&self, key: Key) -> Home {
        let [k0, k1] = self.hash_key;
        let hash = fold(fold(key.0 ^ k0, k1 | 1), k0 | 1);
        let mask = self.keys.len() - 1;
        let first = hash as usize & mask;
        let second = (hash >> 32) as usize & mask;
        // Never the same bucket twice.
        Home {
            first,
            second: if second == first { first ^ 1 } else { second },
        }
    }

    pub(super) fn key(&self, cell: usize) -> &AtomicU64 {
        &self.keys[cell / BUCKET_CELLS].0[cell % BUCKET_CELLS]
    }

    #[inline]
    pub(super) fn seen(&self, cell: usize) -> &AtomicU32 {
        &self.seen[cell / BUCKET_CELLS].0[cell % BUCKET_CELLS]
    }

    #[inline]
    fn value_word(&self, cell: usize) -> &AtomicU64 {
        &self.values[cell / BUCKET_CELLS].0[cell % BUCKET_CELLS]
    }

    /// A cell's value. Acquire: pairs with the release of whoever wrote it, whose time in `seen`
    /// is then visible.
    #[inline]
    pub(super) fn value(&self, cell: usize) -> Value {
        Value(self.value_word(cell).load(Ordering::Acquire))
    }

    /// Exchanges a cell's value. Returns false if the value was not `old` any more.
    pub(super) fn swap_value(&self, cell: usize, old: Value, new: Value) -> bool {
        self.value_word(cell)
            .compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Makes a tombstone's cell usable again. Its readers must be gone.
    pub(super) fn clear(&self, cell: usize) {
        self.value_word(cell)
            .store(Value::PENDING.0, Ordering::Relaxed);
        // Release: who takes the cell, or sees the key of who took it, also sees its value
        // cleared, and not the last tenant's.
        self.key(cell).store(EMPTY, Ordering::Release);
    }

    /// The first cell with `key` and a live value.
    #[inline]
    pub(super) fn find(&self, home: Home, key: Key) -> Option<(usize, Value)> {
        match self.find_in(home.first, key) {
            None => self.find_in(home.second, key),
            found => found,
        }
    }

    #[inline]
    fn find_in(&self, bucket: usize, key: Key) -> Option<(usize, Value)> {
        // All eight are compared before the first branch: where in the line a key lies is
        // unpredictable.
        let mut hits = 0u32;
        for (i, word) in self.keys[bucket].0.iter().enumerate() {
            hits |= u32::from(word.load(Ordering::Relaxed) == key.0) << i;
        }
        if hits == 0 {
            return None;
        }
        // Pairs with the compare-and-swap that put the key there (which acquired `clear`).
        fence(Ordering::Acquire);
        while hits != 0 {
            let cell = bucket * BUCKET_CELLS + hits.trailing_zeros() as usize;
            let value = self.value(cell);
            if value.is_live() {
                return Some((cell, value));
            }
            hits &= hits - 1;
        }
        None
    }

    /// All cells of both buckets, in the order in which `find` looks at them.
    pub(super) fn candidates(&self, home: Home) -> impl Iterator<Item = usize> {
        [home.first, home.second]
            .into_iter()
            .flat_map(|bucket| bucket * BUCKET_CELLS..(bucket + 1) * BUCKET_CELLS)
    }

    /// An empty cell for `key`. Deterministic, so that two threads with the same key and the same
    /// view compete for one cell instead of filling two.
    pub(super) fn place(&self, home: Home, key: Key) -> Place {
        let mut empty: [Option<usize>; 2] = [None, None];
        let mut used = [0, 0];
        for (i, cell) in self.candidates(home).enumerate() {
            let bucket = i / BUCKET_CELLS;
            let word = self.key(cell).load(Ordering::Acquire);
            if word == EMPTY {
                empty[bucket].get_or_insert(cell);
            } else {
                used[bucket] += 1;
                if word == key.0 && self.value(cell) == Value::PENDING {
                    return Place::Pending;
                }
            }
        }
        let prefer_second = used[0] >= CROWDED && used[1] < used[0];
        let best = if prefer_second {
            empty[1].or(empty[0])
        } else {
            empty[0].or(empty[1])
        };
        best.map_or(Place::Full, Place::Empty)
    }
}
