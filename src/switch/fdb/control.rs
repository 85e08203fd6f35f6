//! The control side of the FDB: ageing, flushing, static entries, and the way of a cell from
//! removal to reuse.
//!
//! A remover asks for [`Fdb::retired`] afterwards. It waits until every poll thread has passed a
//! quiescent point: the thread has acknowledged a later topology, or sleeps. Then it hands the mark
//! to [`Fdb::reclaim`]. Until then the removed cells are tombstones. If a reclaim is late, the
//! worst that happens is a table that refuses newcomers.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use super::table::{Key, Place, TOMBSTONE, Value};
use super::{Fdb, FdbEntry, FdbError, Move, PortRef};
use crate::wire::Mac;

/// Attempts to place a static entry against learning threads.
const STATIC_ATTEMPTS: usize = 64;

/// A point in the sequence of removals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RetireMark(u64);

/// Cells that were removed and are not yet `EMPTY`, oldest first.
#[derive(Default)]
pub(super) struct Retired {
    cells: VecDeque<usize>,
    /// Number of cells reclaimed so far, which is the number of the first cell in `cells`.
    reclaimed: u64,
}

impl Fdb {
    fn control(&self) -> MutexGuard<'_, Retired> {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes learned entries whose stations have sent nothing for the ageing time, and second
    /// cells of one key. Returns how many.
    pub fn age(&self, now_s: u32) -> usize {
        let ageing_s = self.ageing_s.load(Ordering::Relaxed);
        let removed = self.remove_where(|cell, key, value| {
            let shadowed = self.is_shadowed(cell, key);
            let aged = ageing_s != 0 && self.age_of(cell, now_s) >= ageing_s;
            shadowed || (aged && !value.is_static())
        });
        self.aged.fetch_add(removed as u64, Ordering::Relaxed);
        removed
    }

    /// Removes the entries of `only`, or of all ports, except static ones if `keep_static`.
    /// Returns how many.
    pub fn flush(&self, only: Option<PortRef>, keep_static: bool) -> usize {
        self.remove_where(|_, _, value| {
            only.is_none_or(|port| value.port() == port) && !(keep_static && value.is_static())
        })
    }

    /// Removes the learned entries of these ports, in one walk. Returns how many.
    pub fn forget(&self, ports: &[PortRef]) -> usize {
        // By slot: each cell compared with each port would take a second of control's time.
        let mut generations: Vec<Option<u32>> = Vec::new();
        for port in ports {
            let slot = usize::from(port.slot);
            if generations.len() <= slot {
                generations.resize(slot + 1, None);
            }
            generations[slot] = generations[slot].max(Some(port.generation));
        }
        self.remove_where(|_, _, value| {
            let port = value.port();
            let gone = generations.get(usize::from(port.slot));
            !value.is_static() && gone == Some(&Some(port.generation))
        })
    }

    /// Returns the number of learned entries of a port.
    pub fn learned(&self, port: PortRef) -> u32 {
        self.limits.count(port)
    }

    /// Forgets a port that is leaving its slot. Its entries go, static ones too. A poll thread that
    /// still sees the port cannot learn for it any more. (A thread that has passed this check
    /// already may leave an entry behind. The entry's generation keeps it from being used.)
    pub fn port_removed(&self, port: PortRef) -> usize {
        self.limits.close(port);
        self.flush(Some(port), false)
    }

    /// Removes one entry, learned or static. Returns false if there is none.
    pub fn remove(&self, vlan: u16, mac: Mac) -> bool {
        let mut retired = self.control();
        let key = Key::new(vlan, mac);
        let mut found = false;
        for cell in self.table.candidates(self.table.home(key)) {
            // The removal is repeated if a poll thread moves the entry meanwhile. Moves are
            // limited, so the loop ends.
            while self.table.key(cell).load(Ordering::Acquire) == key.word() {
                let value = self.table.value(cell);
                if self.retire(&mut retired, cell, value) {
                    found |= value.is_live();
                }
            }
        }
        found
    }

    /// Sets where `mac` is, until [`remove`](Self::remove), whatever frames say. Capacity and quota
    /// do not apply, so that guests cannot crowd out the operator.
    pub fn insert_static(&self, vlan: u16, mac: Mac, port: PortRef) -> Result<(), FdbError> {
        let mut retired = self.control();
        let key = Key::new(vlan, mac);
        let home = self.table.home(key);
        for _ in 0..STATIC_ATTEMPTS {
            if self.make_static(&mut retired, key, Value::fixed(port)) {
                return Ok(());
            }
            let Place::Empty(cell) = self.table.place(home, key) else {
                continue;
            };
            let taken = self.table.key(cell).compare_exchange(
                super::table::EMPTY,
                key.word(),
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            // The value follows in the next turn, as for a key that a poll thread put there.
            if taken.is_ok() {
                self.used.fetch_add(1, Ordering::Relaxed);
            }
        }
        Err(FdbError::NoRoom(mac))
    }

    /// Returns the port at which the operator has set `mac`, if any.
    pub fn static_port(&self, vlan: u16, mac: Mac) -> Option<PortRef> {
        let key = Key::new(vlan, mac);
        let (_, value) = self.table.find(self.table.home(key), key)?;
        value.is_static().then(|| value.port())
    }

    /// Gives the first cell of `key` this static value and removes all other cells of `key`.
    /// Returns false if no cell has the key.
    fn make_static(&self, retired: &mut Retired, key: Key, fixed: Value) -> bool {
        let mut done = false;
        for cell in self.table.candidates(self.table.home(key)) {
            while self.table.key(cell).load(Ordering::Acquire) == key.word() {
                let value = self.table.value(cell);
                if done {
                    self.retire(retired, cell, value);
                } else if self.table.swap_value(cell, value, fixed) {
                    self.release_learned(value);
                    done = true;
                    break;
                }
            }
        }
        done
    }

    /// Takes the addresses that have moved since the last call, each with its last move. If very
    /// many have moved, only some of them are returned.
    pub fn take_moves(&self) -> Vec<Move> {
        self.moves.take()
    }

    /// Returns how many addresses have moved to a port since its registration.
    pub fn moves_to(&self, port: PortRef) -> u64 {
        self.limits.moved_to(port.slot)
    }

    /// Returns how many entries were learned, have moved, and have aged.
    pub fn happened(&self) -> [(&'static str, u64); 3] {
        [
            ("learned", self.learned.load(Ordering::Relaxed)),
            ("moved", self.moves.count()),
            ("aged", self.aged.load(Ordering::Relaxed)),
        ]
    }

    /// Returns the mark of everything removed so far; `None` if nothing waits to be reclaimed.
    pub fn retired(&self) -> Option<RetireMark> {
        let retired = self.control();
        (!retired.cells.is_empty())
            .then(|| RetireMark(retired.reclaimed + retired.cells.len() as u64))
    }

    /// Makes the cells removed before `mark` usable again. The caller has made sure that every
    /// poll thread passed a quiescent point since it got the mark, and has acquired what the
    /// threads released there. Returns how many cells.
    pub fn reclaim(&self, mark: RetireMark) -> usize {
        let mut retired = self.control();
        let due = mark.0.saturating_sub(retired.reclaimed);
        let due = usize::try_from(due)
            .unwrap_or(usize::MAX)
            .min(retired.cells.len());
        for cell in retired.cells.drain(..due) {
            self.table.clear(cell);
        }
        retired.reclaimed += due as u64;
        due
    }

    /// Sets the age at which learned entries are removed; zero: never.
    pub fn set_ageing(&self, ageing: Duration) {
        let seconds = ageing.as_secs() + u64::from(ageing.subsec_nanos() != 0);
        // Ages are differences modulo 2^32 s.
        let seconds = seconds.min(i32::MAX as u64) as u32;
        self.ageing_s.store(seconds, Ordering::Relaxed);
    }

    /// Returns all entries, in no order.
    pub fn entries(&self, now_s: u32) -> Vec<FdbEntry> {
        let _no_removal = self.control();
        let shown = |(cell, key, value): (usize, Key, Value)| {
            let is_static = value.is_static();
            (!self.is_shadowed(cell, key)).then(|| FdbEntry {
                vlan: key.vlan(),
                mac: key.mac(),
                port: value.port(),
                age_s: if is_static {
                    0
                } else {
                    self.age_of(cell, now_s)
                },
                is_static,
            })
        };
        self.live_cells().filter_map(shown).collect()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.used.load(Ordering::Relaxed) as usize
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the cells with a live value. No key is removed while the caller holds the control
    /// lock.
    pub(super) fn live_cells(&self) -> impl Iterator<Item = (usize, Key, Value)> {
        (0..self.table.cells()).filter_map(|cell| {
            let key = Key::from_word(self.table.key(cell).load(Ordering::Acquire))?;
            let value = self.table.value(cell);
            value.is_live().then_some((cell, key, value))
        })
    }

    fn remove_where(&self, condemned: impl Fn(usize, Key, Value) -> bool) -> usize {
        let mut retired = self.control();
        self.live_cells()
            .filter(|&(cell, key, value)| condemned(cell, key, value))
            // An entry that has moved since stays: its station is alive.
            .filter(|&(cell, _, value)| self.retire(&mut retired, cell, value))
            .count()
    }

    /// Does the first step of a removal. Returns false if the value has changed.
    fn retire(&self, retired: &mut Retired, cell: usize, value: Value) -> bool {
        if !self.table.swap_value(cell, value, Value::FREED) {
            return false;
        }
        self.table.key(cell).store(TOMBSTONE, Ordering::Release);
        self.release_learned(value);
        self.used.fetch_sub(1, Ordering::Relaxed);
        retired.cells.push_back(cell);
        true
    }

    /// A value is no longer in the table: its port may learn another. Static and pending ones are
    /// not counted (a pending one by the thread that is inserting it, which notices).
    fn release_learned(&self, value: Value) {
        if value.is_live() && !value.is_static() {
            self.limits.release(value.port());
        }
    }

    fn is_shadowed(&self, cell: usize, key: Key) -> bool {
        self.table
            .find(self.table.home(key), key)
            .is_some_and(|(first, _)| first != cell)
    }

    /// Returns the age in seconds; 0 if a poll thread's clock is ahead of the caller's.
    fn age_of(&self, cell: usize, now_s: u32) -> u32 {
        let age = now_s.wrapping_sub(self.table.seen(cell).load(Ordering::Relaxed));
        if age > i32::MAX as u32 { 0 } else { age }
    }
}
