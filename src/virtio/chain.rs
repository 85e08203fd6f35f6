//! Descriptors and the walk along a chain of them (virtio 1.2 §2.7.5, §2.7.5.3, §2.8.5 to §2.8.7).
//!
//! Everything here comes from a hostile driver. Each descriptor is read once into a local copy.
//! Every address is checked against the memory map with its length. Every loop is bounded by the
//! table's size. A walk that fails returns an error, never a shorter chain, and never "nothing
//! there".

use std::ops::Deref;
use std::sync::atomic::Ordering;

use arrayvec::ArrayVec;

use crate::memory::{GuestMemory, PinnedArray, Window};

/// The chain goes on at `next`.
pub const F_NEXT: u16 = 1;
/// The device writes to the buffer.
pub const F_WRITE: u16 = 2;
/// The buffer holds a table of descriptors.
pub const F_INDIRECT: u16 = 4;
/// Bytes of one descriptor, split and packed.
pub const DESCRIPTOR_SIZE: usize = 16;
/// Most descriptors of one chain, most pieces of memory, and most entries of one indirect table.
///
/// A chain may be as long as its ring (virtio 1.2 §2.7.5.3.1). Rings of virtual machines have up to
/// 1024 entries, which is also what QEMU takes in a chain. Linux sends at most 19 pieces, Windows'
/// driver 256, DPDK's applications 256. Without a bound, a ring of 32768 descriptors could be one
/// chain, and every other sender would wait while it is read.
pub const MAX_CHAIN: usize = 1024;

/// One descriptor, copied out of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address of the buffer.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Split: flags. Packed: the buffer id.
    pub third: u16,
    /// Split: index of the next descriptor. Packed: flags.
    pub fourth: u16,
}

/// What the device does with a chain's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// transmitq: the device reads.
    Read,
    /// receiveq: the device writes.
    Write,
    /// controlq: the device reads the command, then writes the answer.
    Command,
}

/// Why a chain cannot be used. It is returned to the driver with length 0 and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// `next` is not inside the table.
    #[error("next descriptor {0} is outside the table")]
    NextOutside(u16),
    /// More hops than the table has entries.
    #[error("the chain loops")]
    Loop,
    /// More than [`MAX_CHAIN`] descriptors or pieces.
    #[error("the chain has more than {MAX_CHAIN} buffers")]
    TooManyBuffers,
    /// The chain is good, but the windows have no room left for its pieces.
    #[error("there is no room for the chain's buffers")]
    NoRoom,
    /// A buffer is not in guest memory.
    #[error("a buffer at {0:#x} is not in guest memory")]
    Unmapped(u64),
    /// A buffer is in a region of guest memory that the switch cannot map.
    #[error("a buffer at {0:#x} is in guest memory that cannot be used")]
    Unusable(u64),
    /// A device-writable buffer in a transmitq, a device-readable buffer in a receiveq, or in a
    /// controlq a device-readable buffer behind a device-writable one.
    #[error("a buffer has the wrong direction")]
    Direction,
    /// Indirect descriptors were not negotiated, are nested, combined with NEXT, or the table's
    /// length is wrong.
    #[error("an indirect table is not allowed here or has a bad length")]
    Indirect,
    /// The sum of the lengths exceeds 32 bits.
    #[error("the chain is longer than 2^32 bytes")]
    TooLong,
}

/// The pieces of memory of one or several chains, and how many descriptors were read for them.
#[derive(Debug)]
pub struct Windows<'m, const N: usize> {
    pieces: ArrayVec<Window<'m>, N>,
    read: u32,
}

impl<'m, const N: usize> Windows<'m, N> {
    /// Returns an arena without pieces.
    #[inline(always)]
    pub const fn new() -> Self {
        Windows {
            pieces: ArrayVec::new_const(),
            read: 0,
        }
    }

    /// Returns the number of descriptors read since [`Windows::clear`]. Descriptors without a piece
    /// count too: empty ones, and those of unusable chains. So the number is at least the number of
    /// pieces.
    #[inline(always)]
    pub fn read(&self) -> u32 {
        self.read
    }

    /// Removes all pieces, and resets the number of descriptors read.
    #[inline(always)]
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.read = 0;
    }

    /// Removes the pieces from number `len` on. The number of descriptors read stays, because the
    /// reading has cost time.
    #[inline(always)]
    pub fn truncate(&mut self, len: usize) {
        self.pieces.truncate(len);
    }

    /// Adds a chain of one piece. Returns `false` if there is no room.
    #[inline(always)]
    pub fn push(&mut self, piece: Window<'m>) -> bool {
        self.extend(&[piece])
    }

    /// Adds the pieces of a chain. If there is no room for all of them, adds none and returns
    /// `false`.
    #[inline(always)]
    pub fn extend(&mut self, pieces: &[Window<'m>]) -> bool {
        self.read += pieces.len() as u32;
        self.pieces.try_extend_from_slice(pieces).is_ok()
    }
}

impl<const N: usize> Default for Windows<'_, N> {
    fn default() -> Self {
        Windows::new()
    }
}

impl<'m, const N: usize> Deref for Windows<'m, N> {
    type Target = [Window<'m>];

    #[inline(always)]
    fn deref(&self) -> &Self::Target {
        &self.pieces
    }
}

impl Descriptor {
    /// Reads descriptor `index` of a ring's table, once.
    #[inline(always)]
    pub fn of_ring(table: &PinnedArray<u64>, index: usize) -> Self {
        let [addr, rest] = table.load_two(2 * index, Ordering::Relaxed);
        Descriptor::new(addr, rest)
    }

    /// Makes a descriptor of its two 64-bit words.
    #[inline(always)]
    pub fn new(addr: u64, rest: u64) -> Self {
        Descriptor {
            addr,
            len: rest as u32,
            third: (rest >> 32) as u16,
            fourth: (rest >> 48) as u16,
        }
    }

    /// Returns the descriptor's buffer if the buffer is a whole chain, of the right direction and
    /// inside one region. Most are. In all other cases, errors too, returns `None`: the walk
    /// decides. `flags` are `third` (split) or `fourth` (packed).
    #[inline(always)]
    pub fn alone<'m>(
        &self,
        flags: u16,
        direction: Direction,
        memory: &'m GuestMemory,
    ) -> Option<Window<'m>> {
        let right = match direction {
            Direction::Read | Direction::Command => 0,
            Direction::Write => F_WRITE,
        };
        if flags & (F_NEXT | F_WRITE | F_INDIRECT) != right || self.len == 0 {
            return None;
        }
        memory.window(self.addr, self.len)
    }
}

/// Reads descriptor `index` of `table` once. The caller has checked the index against the table's
/// entries.
#[inline(always)]
pub fn read_descriptor(table: &Window<'_>, index: usize) -> Descriptor {
    let offset = index * DESCRIPTOR_SIZE;
    // Two atomic loads, so that no compiler can turn one read into two (check one value, use
    // another). Ring tables are 16-byte aligned (checked when the ring starts). An indirect table
    // lies wherever the driver has put it.
    let (addr, rest) = if table.address().is_multiple_of(8) {
        (
            table.load_u64(offset, Ordering::Relaxed),
            table.load_u64(offset + 8, Ordering::Relaxed),
        )
    } else {
        let mut bytes = [0_u8; DESCRIPTOR_SIZE];
        table.read_bytes(offset, &mut bytes);
        let raw = u128::from_le_bytes(bytes);
        (raw as u64, (raw >> 64) as u64)
    };
    Descriptor::new(addr, rest)
}

/// Collects a chain's buffers: translation, direction, sum of lengths.
#[derive(Debug)]
pub struct Collector<'c, 'm, const N: usize> {
    memory: &'m GuestMemory,
    direction: Direction,
    /// Once so many bytes are collected, further descriptors are not added.
    wanted: u32,
    total: u64,
    first: usize,
    /// For a command: where in `windows` the room for its answer begins.
    answer: Option<usize>,
    windows: &'c mut Windows<'m, N>,
}

impl<'c, 'm, const N: usize> Collector<'c, 'm, N> {
    /// Makes a collector that appends to `windows` until at least `wanted` bytes are collected.
    #[inline(always)]
    pub fn new(
        memory: &'m GuestMemory,
        direction: Direction,
        wanted: u32,
        windows: &'c mut Windows<'m, N>,
    ) -> Self {
        let first = windows.len();
        Collector {
            memory,
            direction,
            wanted,
            total: 0,
            first,
            answer: None,
            windows,
        }
    }

    /// Whether the wanted bytes are collected.
    #[inline(always)]
    pub fn satisfied(&self) -> bool {
        self.total >= u64::from(self.wanted)
    }

    /// Returns the number of bytes collected, or an error if 32 bits cannot hold it.
    #[inline(always)]
    pub fn total(&self) -> Result<u32, ChainError> {
        u32::try_from(self.total).map_err(|_| ChainError::TooLong)
    }

    /// Removes this chain's buffers from `windows`, after an error.
    #[cold]
    pub fn undo(&mut self) {
        self.windows.truncate(self.first);
    }

    /// Counts a descriptor that was read, but whose buffer is not added.
    #[inline(always)]
    pub fn skip(&mut self) {
        self.windows.read += 1;
    }

    /// Adds the buffer of one descriptor, and counts the descriptor.
    #[inline(always)]
    pub fn add(&mut self, addr: u64, len: u32, flags: u16) -> Result<(), ChainError> {
        self.windows.read += 1;
        let writable = flags & F_WRITE != 0;
        if writable != (self.direction == Direction::Write) {
            return self.turn(addr, len, flags);
        }
        if len == 0 {
            // An empty buffer is legal, and its address means nothing. (A bad address here crashed
            // other implementations.)
            return Ok(());
        }
        self.total += u64::from(len);
        match self.memory.window(addr, len) {
            Some(window) => self.push(window),
            None => self.add_crossing(addr, len),
        }
    }

    /// Handles a buffer of the other direction: in a command, the room for the answer begins with
    /// it; elsewhere it is an error.
    #[cold]
    fn turn(&mut self, addr: u64, len: u32, flags: u16) -> Result<(), ChainError> {
        if self.direction != Direction::Command {
            return Err(ChainError::Direction);
        }
        self.direction = Direction::Write;
        self.answer = Some(self.windows.len());
        self.add(addr, len, flags)
    }

    /// For a command that was walked: returns where in `windows` the room for the answer begins, or
    /// `None` if there is no such room.
    pub fn answer(&self) -> Option<usize> {
        self.answer
    }

    #[inline(always)]
    fn push(&mut self, window: Window<'m>) -> Result<(), ChainError> {
        if self.windows.len() - self.first >= MAX_CHAIN {
            return Err(ChainError::TooManyBuffers);
        }
        let pieces = &mut self.windows.pieces;
        pieces.try_push(window).map_err(|_| ChainError::NoRoom)
    }

    /// Adds a buffer that is not inside one region. It may lie across regions that touch.
    #[cold]
    fn add_crossing(&mut self, addr: u64, len: u32) -> Result<(), ChainError> {
        let (mut pushed, mut end) = (Ok(()), addr);
        let memory = self.memory;
        let mapped = memory.windows(addr, len, |window| {
            self.skip();
            pushed = self.push(window);
            end = end.wrapping_add(window.len() as u64);
            pushed.is_ok()
        });
        pushed?;
        match mapped {
            true => Ok(()),
            false if memory.is_unusable(end) => Err(ChainError::Unusable(end)),
            false => Err(ChainError::Unmapped(addr)),
        }
    }

    /// Opens an indirect table. Returns its window and its number of entries.
    pub fn indirect_table(
        &self,
        addr: u64,
        len: u32,
        flags: u16,
    ) -> Result<(Window<'m>, u32), ChainError> {
        let entries = len / DESCRIPTOR_SIZE as u32;
        let whole = len.is_multiple_of(DESCRIPTOR_SIZE as u32);
        // §2.7.5.3.1: not both INDIRECT and NEXT; §2.7.5.3.2: the device ignores WRITE here.
        if !whole || entries == 0 || entries > MAX_CHAIN as u32 || flags & F_NEXT != 0 {
            return Err(ChainError::Indirect);
        }
        match self.memory.window(addr, len) {
            Some(table) => Ok((table, entries)),
            None if self.memory.is_unusable(addr) => Err(ChainError::Unusable(addr)),
            None => Err(ChainError::Unmapped(addr)),
        }
    }
}

/// Follows a split chain from `head`, which the caller checked to be inside `table`.
///
/// Returns the number of bytes collected. On an error `windows` is as it was before.
#[inline(always)]
pub fn walk_split<'m, const N: usize>(
    table: Window<'m>,
    entries: u32,
    head: u16,
    indirect: bool,
    collector: &mut Collector<'_, 'm, N>,
) -> Result<u32, ChainError> {
    let result = follow_split(table, entries, head, indirect, collector);
    if result.is_err() {
        collector.undo();
    }
    result
}

#[inline(always)]
fn follow_split<'m, const N: usize>(
    mut table: Window<'m>,
    mut entries: u32,
    head: u16,
    mut indirect: bool,
    collector: &mut Collector<'_, 'm, N>,
) -> Result<u32, ChainError> {
    let mut index = head;
    let mut hops = 0;
    loop {
        let descriptor = read_descriptor(&table, usize::from(index));
        let (flags, next) = (descriptor.third, descriptor.fourth);
        if flags & F_INDIRECT != 0 {
            // `indirect` is false inside a table: no table in a table (§2.7.5.3.1).
            if !indirect {
                return Err(ChainError::Indirect);
            }
            (table, entries) = collector.indirect_table(descriptor.addr, descriptor.len, flags)?;
            (index, hops, indirect) = (0, 0, false);
            continue;
        }
        collector.add(descriptor.addr, descriptor.len, flags)?;
        if flags & F_NEXT == 0 || collector.satisfied() {
            return collector.total();
        }
        hops += 1;
        if hops >= entries.min(MAX_CHAIN as u32) {
            return Err(if hops == entries {
                ChainError::Loop
            } else {
                ChainError::TooManyBuffers
            });
        }
        if u32::from(next) >= entries {
            return Err(ChainError::NextOutside(next));
        }
        index = next;
    }
}

/// Walks a packed ring's indirect table: all entries in order, because NEXT has no meaning there
/// (§2.8.7).
pub fn walk_packed_table<const N: usize>(
    descriptor: Descriptor,
    collector: &mut Collector<'_, '_, N>,
) -> Result<(), ChainError> {
    let flags = descriptor.fourth;
    let (table, entries) = collector.indirect_table(descriptor.addr, descriptor.len, flags)?;
    for index in 0..entries {
        let entry = read_descriptor(&table, index as usize);
        if entry.fourth & F_INDIRECT != 0 {
            return Err(ChainError::Indirect);
        }
        let mut flags = entry.fourth;
        if collector.direction == Direction::Read {
            // DPDK's driver leaves WRITE on the header and on some pieces of a frame of several
            // pieces. The flag is ignored, because the device does not write there anyway.
            flags &= !F_WRITE;
        }
        collector.add(entry.addr, entry.len, flags)?;
        if collector.satisfied() {
            break;
        }
    }
    Ok(())
}
