//! Counts the addresses that have moved from port to port, and names them.
//!
//! Poll threads note a move, and control takes the notes. A thread that finds a cell in use by
//! another thread notes nothing and goes on. So all moves are counted, and when moves come faster
//! than control looks, only some of them are named. An address that did not move costs nothing
//! here.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::PortRef;
use super::table::{Key, Value};
use crate::wire::Mac;

/// Number of cells: so many addresses can be named between two looks of control.
const CELLS: usize = 64;

/// An address that has moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The address.
    pub mac: Mac,
    /// The port behind which the address was before its last move.
    pub from: PortRef,
    /// The port behind which the address is since then.
    pub to: PortRef,
    /// How often the address has moved since it was last reported.
    pub times: u64,
}

/// The last move of an address.
#[derive(Default)]
struct Cell {
    /// Whether a thread writes or reads the other fields.
    in_use: AtomicBool,
    key: AtomicU64,
    from: AtomicU64,
    to: AtomicU64,
    /// Moves of this key since control has taken them; 0: none.
    times: AtomicU64,
}

impl Cell {
    /// Does `work` with the cell, unless another thread uses the cell. Returns `None` then. Never
    /// waits.
    fn with<T>(&self, work: impl FnOnce(&Cell) -> T) -> Option<T> {
        if self.in_use.swap(true, Acquire) {
            return None;
        }
        let done = work(self);
        self.in_use.store(false, Release);
        Some(done)
    }
}

pub(super) struct Moves {
    count: AtomicU64,
    cells: [Cell; CELLS],
}

impl Default for Moves {
    fn default() -> Self {
        Moves {
            count: AtomicU64::default(),
            cells: std::array::from_fn(|_| Cell::default()),
        }
    }
}

impl Moves {
    /// Notes a move. `bucket` comes from the key's hash, which no guest can predict: a port that
    /// invents moves cannot aim at the cell of another port's address.
    pub(super) fn note(&self, bucket: usize, key: Key, from: Value, to: Value) {
        self.count.fetch_add(1, Relaxed);
        self.cells[bucket % CELLS].with(|cell| {
            let same = cell.key.swap(key.word(), Relaxed) == key.word();
            let before = if same { cell.times.load(Relaxed) } else { 0 };
            cell.times.store(before + 1, Relaxed);
            cell.from.store(from.word(), Relaxed);
            cell.to.store(to.word(), Relaxed);
        });
    }

    /// Returns the number of all moves.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    /// Takes the moves that were noted since the last call.
    pub(super) fn take(&self) -> Vec<Move> {
        let noted = self.cells.iter().filter_map(|cell| {
            if cell.times.load(Relaxed) == 0 {
                return None;
            }
            // A cell in use is reported by the next call.
            cell.with(|cell| Move {
                mac: Key::from_word(cell.key.load(Relaxed)).map_or(Mac::BROADCAST, Key::mac),
                from: Value::from_word(cell.from.load(Relaxed)).port(),
                to: Value::from_word(cell.to.load(Relaxed)).port(),
                times: cell.times.swap(0, Relaxed),
            })
        });
        noted.filter(|noted| noted.times > 0).collect()
    }
}
