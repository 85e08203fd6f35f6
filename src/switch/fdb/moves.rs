//! Addresses that have moved from port to port: how many, and which.
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

/// Addresses that are kept apart between two looks of control.
const CELLS: usize = 64;

/// An address that has moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The address.
    pub mac: Mac,
    /// The port that it was behind before its last move.
    pub from: PortRef,
    /// The port that it is behind since.
    pub to: PortRef,
    /// How often it has moved since it was last told of.
    pub times: u64,
}

/// The last move of an address.
#[derive(Default)]
struct Cell {
    /// Somebody writes or reads what follows.
    in_use: AtomicBool,
    key: AtomicU64,
    from: AtomicU64,
    to: AtomicU64,
    /// Moves of this key since control has taken them; 0: none.
    times: AtomicU64,
}

impl Cell {
    /// Does `work` with the cell, unless somebody else is at work there. Nobody waits.
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
    /// Notes a move. `bucket` is of the key's hash, which nobody outside can predict: a port that
    /// invents moves cannot aim at the cell of another one's.
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

    /// Moves there have been.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    /// What was noted since this was last asked.
    pub(super) fn take(&self) -> Vec<Move> {
        let noted = self.cells.iter().filter_map(|cell| {
            if cell.times.load(Relaxed) == 0 {
                return None;
            }
            // In use: it is told the next time.
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
