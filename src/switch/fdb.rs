//! The forwarding data base: which port a station is behind.
//!
//! One table serves all poll threads. Look-ups and learning take no lock and wait for nobody; the
//! control thread removes. Key (VLAN and address) and value (slot, generation, flags) do not fit
//! one word. Two rules keep a reader from pairing one key with another's port, without a sequence
//! lock or 128-bit words. A reader costs two loads and never retries.
//!
//! * **A key word does not change while anybody may look at it.** To insert is to compare-and-swap
//!   the key from `EMPTY`, then to fill in the value. A reader that finds the key without a value
//!   treats the key as unknown. To move is to compare-and-swap the value.
//! * **Only control removes**, in two steps. First the value becomes `FREED` and the key
//!   `TOMBSTONE`, which matches nothing and cannot be taken. Then, once every poll thread has
//!   passed a point at which it looks at no cell, [`Fdb::reclaim`] makes the cell `EMPTY`. A
//!   learner that matched the key just before fails its compare-and-swap and does nothing.
//!
//! Two threads that insert one key at once may fill two cells. That is harmless: every look-up
//! takes the first in the same order, and [`Fdb::age`] removes the other.
//!
//! [`Fdb::learn`] and [`Fdb::lookup`] are for threads that control waits for before it reclaims.
//! Everything else takes a lock that no poll thread ever touches.
//!
//! Nobody is evicted to make room. A port that invents addresses meets its own quota, a full table
//! refuses newcomers, and frames to addresses outside the table are flooded. Moves are limited per
//! second at the port that takes the address, so a port cannot make all others' entries flap.

mod control;
mod limits;
mod moves;
mod table;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::{MAX_SLOTS, PortRef};
use crate::wire::Mac;
pub use control::RetireMark;
use control::Retired;
use limits::{Admission, Limits, is_after};
pub use moves::Move;
use moves::Moves;
use table::{BUCKET_CELLS, Key, Place, Table, Value};

/// Smallest and largest capacity of an FDB.
pub const CAPACITY_RANGE: std::ops::RangeInclusive<usize> = 64..=1 << 22;
/// A port may hold at least this many addresses, however small the table is.
const MIN_PER_PORT: usize = 64;
/// Attempts to take an empty cell before the frame goes on without its source being learned.
const ATTEMPTS: usize = 4;

/// Bounds of an FDB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FdbConfig {
    /// Most entries.
    pub capacity: usize,
    /// Most learned entries of one port.
    pub per_port: usize,
    /// Most addresses that one port takes from other ports within a second.
    pub moves_per_second: u32,
    /// Age at which a learned entry is removed, in whole seconds, rounded up; zero: never.
    pub ageing: Duration,
}

impl FdbConfig {
    /// Limits for a table of `capacity` entries. One port may have a quarter of them, but at least
    /// 64. So there is room for a guest that is a router or bridge itself, and only four hostile
    /// guests together can fill the table.
    pub fn with_capacity(capacity: usize) -> FdbConfig {
        FdbConfig {
            capacity,
            per_port: (capacity / 4).max(MIN_PER_PORT),
            moves_per_second: 1000,
            ageing: Duration::from_secs(300),
        }
    }
}

impl Default for FdbConfig {
    fn default() -> Self {
        FdbConfig::with_capacity(8192)
    }
}

/// Why an FDB operation of the operator is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FdbError {
    /// No such table.
    #[error(
        "FDB size {0} is out of range: {min} to {max}",
        min = CAPACITY_RANGE.start(),
        max = CAPACITY_RANGE.end()
    )]
    Capacity(usize),
    /// The system gave no random numbers for the key of the hash.
    #[error("no random numbers for the key of the FDB's hash")]
    Random(#[source] getrandom::Error),
    /// No cell is free for a static entry.
    #[error("no room in the forwarding table for {0}")]
    NoRoom(Mac),
}

/// The result of learning a frame's source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learned {
    /// The address is known at this port, and was seen in this second already.
    Known,
    /// The address is known at this port, and its age starts again.
    Refreshed,
    /// The address has a new entry.
    New,
    /// The address was known at another port, and is now at this one.
    Moved,
    /// Refused: the table is full.
    Full,
    /// Refused: the port has as many entries as it may.
    Quota,
    /// Refused: the port took as many addresses from others as it may in one second.
    MoveLimited,
    /// Refused: the operator said that the address is at another port.
    Static,
    /// Refused: the port is no longer in its slot.
    Gone,
    /// Left to the next frame: another thread is changing this entry or this port's count.
    Contended,
}

/// An entry, as shown to an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FdbEntry {
    /// VLAN identifier; 0 without VLANs.
    pub vlan: u16,
    /// The station's address.
    pub mac: Mac,
    /// The port behind which the station is.
    pub port: PortRef,
    /// Seconds since a frame came from the station; 0 for static entries.
    pub age_s: u32,
    /// Whether the operator has set the entry. Such an entry neither ages nor moves.
    pub is_static: bool,
}

/// The forwarding data base.
pub struct Fdb {
    table: Table,
    limits: Limits,
    moves: Moves,
    /// Numbers of entries that were ever learned, and that aged.
    learned: AtomicU64,
    aged: AtomicU64,
    /// Number of keys in the table, without tombstones.
    used: AtomicU32,
    capacity: u32,
    ageing_s: AtomicU32,
    /// Serialises the control side. Holds the cells that were removed and must not be used again
    /// yet.
    retired: Mutex<Retired>,
}

impl Fdb {
    /// Makes an empty table.
    pub fn new(config: FdbConfig) -> Result<Fdb, FdbError> {
        if !CAPACITY_RANGE.contains(&config.capacity) {
            return Err(FdbError::Capacity(config.capacity));
        }
        let hash_key = [
            getrandom::u64().map_err(FdbError::Random)?,
            getrandom::u64().map_err(FdbError::Random)?,
        ];
        let per_port = config.per_port.min(config.capacity) as u32;
        let fdb = Fdb {
            table: Table::new(config.capacity, hash_key),
            limits: Limits::new(MAX_SLOTS, per_port, config.moves_per_second),
            moves: Moves::default(),
            learned: AtomicU64::new(0),
            aged: AtomicU64::new(0),
            used: AtomicU32::new(0),
            capacity: config.capacity as u32,
            ageing_s: AtomicU32::new(0),
            retired: Mutex::default(),
        };
        fdb.set_ageing(config.ageing);
        Ok(fdb)
    }

    /// Returns the port behind which `mac` is. The caller must compare the generation with its
    /// topology, because the entry may belong to a port that is gone.
    #[inline]
    pub fn lookup(&self, vlan: u16, mac: Mac) -> Option<PortRef> {
        let key = Key::new(vlan, mac);
        let (_, value) = self.table.find(self.table.home(key), key)?;
        Some(value.port())
    }

    /// Notes that a frame from `mac` came in through `port` at second `now_s` of a monotonic clock.
    /// Writes nothing if the address is known at this port and was seen in this second already.
    #[inline]
    pub fn learn(&self, vlan: u16, mac: Mac, port: PortRef, now_s: u32) -> Learned {
        let key = Key::new(vlan, mac);
        let Some((cell, value)) = self.table.find(self.table.home(key), key) else {
            return self.insert(key, port, now_s);
        };
        if value != Value::learned(port) {
            return self.relearn((cell, key), value, port, now_s);
        }
        if self.refresh(cell, now_s) {
            Learned::Refreshed
        } else {
            Learned::Known
        }
    }

    /// Notes the time, at most once a second. The time only grows: otherwise two threads whose
    /// clocks differ would write in turns.
    #[inline]
    fn refresh(&self, cell: usize, now_s: u32) -> bool {
        let seen = self.table.seen(cell);
        let newer = is_after(now_s, seen.load(Ordering::Relaxed));
        if newer {
            seen.store(now_s, Ordering::Relaxed);
        }
        newer
    }

    #[cold]
    fn insert(&self, key: Key, port: PortRef, now_s: u32) -> Learned {
        match self.limits.admit(port) {
            Admission::Granted => {}
            refused => return refusal(refused),
        }
        let learned = self.insert_admitted(key, port, now_s);
        if learned != Learned::New {
            self.limits.release(port);
        }
        learned
    }

    fn insert_admitted(&self, key: Key, port: PortRef, now_s: u32) -> Learned {
        // Looked at before the addition: a full table must not cost a contended write a frame.
        if self.used.load(Ordering::Relaxed) >= self.capacity {
            return Learned::Full;
        }
        // May refuse one too many while another thread has counted and not yet given up; never
        // lets one too many in.
        if self.used.fetch_add(1, Ordering::Relaxed) >= self.capacity {
            self.used.fetch_sub(1, Ordering::Relaxed);
            return Learned::Full;
        }
        match self.take_cell(key) {
            Ok(cell) => {
                self.table.seen(cell).store(now_s, Ordering::Relaxed);
                if self
                    .table
                    .swap_value(cell, Value::PENDING, Value::learned(port))
                {
                    self.learned.fetch_add(1, Ordering::Relaxed);
                    Learned::New
                } else {
                    // Control removed the key, or made it static. The key's place in `used` is
                    // no longer ours to give back.
                    Learned::Contended
                }
            }
            Err(refused) => {
                self.used.fetch_sub(1, Ordering::Relaxed);
                refused
            }
        }
    }

    /// Puts `key` into an empty cell. The cell's value is then `PENDING`.
    fn take_cell(&self, key: Key) -> Result<usize, Learned> {
        let home = self.table.home(key);
        for _ in 0..ATTEMPTS {
            let cell = match self.table.place(home, key) {
                Place::Empty(cell) => cell,
                Place::Pending => return Err(Learned::Contended),
                Place::Full => return Err(Learned::Full),
            };
            // Acquire pairs with `Table::clear`; release with the fence in `Table::find`.
            let taken = self.table.key(cell).compare_exchange(
                table::EMPTY,
                key.word(),
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            match taken {
                Ok(_) => return Ok(cell),
                Err(other) if other == key.word() => return Err(Learned::Contended),
                Err(_) => {}
            }
        }
        Err(Learned::Contended)
    }

    /// The entry names another port than `port`.
    #[cold]
    fn relearn(
        &self,
        (cell, key): (usize, Key),
        value: Value,
        port: PortRef,
        now_s: u32,
    ) -> Learned {
        if value.is_static() {
            return if value.port() == port {
                Learned::Known
            } else {
                Learned::Static
            };
        }
        if !self.limits.take_move(port.slot, now_s) {
            return Learned::MoveLimited;
        }
        match self.limits.admit(port) {
            Admission::Granted => {}
            refused => return refusal(refused),
        }
        let learned = Value::learned(port);
        if !self.table.swap_value(cell, value, learned) {
            self.limits.release(port);
            return Learned::Contended;
        }
        self.limits.release(value.port());
        self.limits.moved(port.slot);
        self.moves.note(cell / BUCKET_CELLS, key, value, learned);
        self.refresh(cell, now_s);
        Learned::Moved
    }
}

fn refusal(admission: Admission) -> Learned {
    match admission {
        Admission::Granted | Admission::Contended => Learned::Contended,
        Admission::Quota => Learned::Quota,
        Admission::Gone => Learned::Gone,
    }
}

impl fmt::Debug for Fdb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fdb")
            .field("used", &self.used)
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}
