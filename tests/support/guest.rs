//! A guest's memory with one ring in it, and a driver for either kind that may misbehave.
//!
//! Two regions touch in guest addresses but not in the host's (the file has them in the other
//! order); behind the second one is a hole. The drivers share nothing with
//! `pollux::virtio::driver`.
#![allow(
    dead_code,
    reason = "several test programs include this, each uses a part"
)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use pollux::memory::{GuestMemory, RegionSpec, SharedMemory, Window};
use pollux::virtio::chain::Windows;
use pollux::virtio::driver::{RingAreas, RingLayout};
use pollux::virtio::{Claim, NoClaim, ReceiveQueue, RingFeatures, RingSetup, Taken, TransmitQueue};

use crate::packed_reference::{self, INDIRECT, NEXT, Place, WRITE};

/// Guest address of the first region, where the ring lies.
pub(crate) const START: u64 = 0x1_0000;
/// Length of each region, unless a test says otherwise.
pub(crate) const LEN: u64 = 4 << 20;
/// Guest address behind any ring: for buffers and tables.
pub(crate) const DATA: u64 = START + (2 << 20);
/// Where the two regions meet.
pub(crate) const SEAM: u64 = START + LEN;
/// First guest address behind the second region.
pub(crate) const HOLE: u64 = START + 2 * LEN;
/// Bytes of the header before every frame.
pub(crate) const HEADER: usize = 12;

/// One descriptor to be posted; NEXT is set by whoever posts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
}

pub(crate) fn readable(addr: u64, len: u32) -> Piece {
    let flags = 0;
    Piece { addr, len, flags }
}

pub(crate) fn writable(addr: u64, len: u32) -> Piece {
    let flags = WRITE;
    Piece { addr, len, flags }
}

pub(crate) fn indirect(addr: u64, len: u32) -> Piece {
    let flags = INDIRECT;
    Piece { addr, len, flags }
}

/// Features of most tests.
pub(crate) fn features(packed: bool) -> RingFeatures {
    RingFeatures {
        packed,
        indirect: true,
        version_1: true,
        mergeable: true,
        ..Default::default()
    }
}

pub(crate) struct Guest {
    pub(crate) memory: SharedMemory,
    pub(crate) map: Arc<GuestMemory>,
    pub(crate) features: RingFeatures,
    pub(crate) len: u64,
    layout: RingLayout,
}

impl Guest {
    pub(crate) fn new(size: u16, features: RingFeatures) -> Self {
        Guest::with_len(size, features, LEN)
    }

    pub(crate) fn with_len(size: u16, features: RingFeatures, len: u64) -> Self {
        let memory = SharedMemory::create(2 * len as usize, true).unwrap();
        let region = |guest_addr, offset| RegionSpec {
            guest_addr,
            user_addr: guest_addr + (1 << 40),
            size: len,
            offset,
            file: memory.file().try_clone().unwrap(),
        };
        let specs = vec![region(START, len), region(START + len, 0)];
        let map = Arc::new(GuestMemory::default().with_table(specs).unwrap());
        Guest {
            map,
            features,
            len,
            layout: RingLayout::new(size, features.packed),
            memory,
        }
    }

    pub(crate) fn size(&self) -> u16 {
        self.layout.size
    }

    /// The driver's view of `len` bytes at a guest address inside one region.
    pub(crate) fn at(&self, addr: u64, len: u32) -> Window<'_> {
        let offset = addr - START;
        let offset = if offset < self.len {
            offset + self.len
        } else {
            offset - self.len
        };
        self.memory.window(offset as usize, len as usize).unwrap()
    }

    /// `len` bytes from `addr` on, in the one or two pieces that the regions make of them.
    fn pieces(&self, addr: u64, len: usize) -> [Window<'_>; 2] {
        let seam = START + self.len;
        let before = if addr < seam {
            len.min((seam - addr) as usize)
        } else {
            len
        };
        let rest = if before == len { addr } else { seam };
        let second = self.at(rest, (len - before) as u32);
        [self.at(addr, before as u32), second]
    }

    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        let [first, second] = self.pieces(addr, bytes.len());
        first.write_bytes(0, &bytes[..first.len()]);
        second.write_bytes(0, &bytes[first.len()..]);
    }

    pub(crate) fn read(&self, addr: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        let [first, second] = self.pieces(addr, bytes.len());
        first.read_bytes(0, &mut bytes[..first.len()]);
        second.read_bytes(0, &mut bytes[first.len()..]);
        bytes
    }

    pub(crate) fn areas(&self) -> RingAreas<'_> {
        RingAreas::of(self.at(START, self.layout.len as u32), &self.layout).unwrap()
    }

    /// All bytes of the ring.
    pub(crate) fn ring_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.layout.len];
        self.at(START, self.layout.len as u32)
            .read_bytes(0, &mut bytes);
        bytes
    }

    /// Guest addresses of the three areas.
    pub(crate) fn places(&self) -> (u64, u64, u64) {
        (
            START,
            START + self.layout.available as u64,
            START + self.layout.used as u64,
        )
    }

    pub(crate) fn setup(&self, base: u32) -> RingSetup {
        let pin = |addr, len: usize| self.map.pinned_guest(addr, len as u64).unwrap();
        let (descriptors, available, used) = self.places();
        RingSetup {
            size: self.layout.size,
            descriptors: pin(descriptors, self.layout.descriptors_len),
            available: pin(available, self.layout.available_len),
            used: pin(used, self.layout.used_len),
            features: self.features,
            base,
            memory: Arc::clone(&self.map),
            redo: None,
        }
    }

    /// Writes an indirect table and returns the descriptor for it.
    pub(crate) fn table(&self, at: u64, pieces: &[Piece]) -> Piece {
        for (i, piece) in pieces.iter().enumerate() {
            let more = i + 1 < pieces.len() && !self.features.packed;
            let next = if more { i as u16 + 1 } else { 0 };
            let flags = piece.flags | if more { NEXT } else { 0 };
            self.table_entry(at, i as u16, *piece, flags, next);
        }
        indirect(at, 16 * pieces.len() as u32)
    }

    /// Writes one entry of a table as it is.
    pub(crate) fn table_entry(&self, at: u64, index: u16, piece: Piece, flags: u16, next: u16) {
        let at = at + 16 * u64::from(index);
        self.write(at, &piece.addr.to_le_bytes());
        self.write(at + 8, &piece.len.to_le_bytes());
        let (third, fourth) = if self.features.packed {
            (next, flags)
        } else {
            (flags, next)
        };
        self.write(at + 12, &third.to_le_bytes());
        self.write(at + 14, &fourth.to_le_bytes());
    }

    pub(crate) fn driver(&self) -> Driver<'_> {
        let base = if self.features.packed {
            Place::FIRST.word()
        } else {
            0
        };
        self.driver_at(base)
    }

    /// A driver whose ring starts at `base`: an index, or a place's word.
    pub(crate) fn driver_at(&self, base: u16) -> Driver<'_> {
        if self.features.packed {
            let place = Place {
                slot: base & 0x7fff,
                wrap: base & 0x8000 != 0,
            };
            Driver::Packed(packed_reference::Driver::new(self.areas(), place))
        } else {
            Driver::Split(SplitDriver::new(self.areas(), base))
        }
    }
}

/// Offsets in a split ring's available and used areas.
pub(crate) const IDX: usize = 2;
pub(crate) const ENTRIES: usize = 4;

/// A driver of a split ring (virtio 1.2 §2.7), one step after the other.
pub(crate) struct SplitDriver<'m> {
    pub(crate) areas: RingAreas<'m>,
    free: VecDeque<u16>,
    /// By head: descriptors of the chain that the device has.
    chains: Vec<Option<Vec<u16>>>,
    pub(crate) idx: u16,
    used: u16,
}

impl<'m> SplitDriver<'m> {
    /// A ring whose indices start at `idx`.
    pub(crate) fn new(areas: RingAreas<'m>, idx: u16) -> Self {
        areas.available.store_u16(IDX, idx, Ordering::Relaxed);
        areas.used.store_u16(IDX, idx, Ordering::Relaxed);
        SplitDriver {
            areas,
            free: (0..areas.size).collect(),
            chains: vec![None; usize::from(areas.size)],
            idx,
            used: idx,
        }
    }

    pub(crate) fn free(&self) -> u16 {
        self.free.len() as u16
    }

    /// The next chains take other descriptors than the oldest free ones.
    pub(crate) fn rotate_free(&mut self, by: usize) {
        self.free.rotate_left(by);
    }

    /// The head of the next chain.
    pub(crate) fn next_head(&self) -> u16 {
        self.free[0]
    }

    pub(crate) fn write_raw(&self, index: u16, piece: Piece, flags: u16, next: u16) {
        let at = usize::from(index) * 16;
        let table = &self.areas.descriptors;
        table.write_bytes(at, &piece.addr.to_le_bytes());
        table.write_bytes(at + 8, &piece.len.to_le_bytes());
        table.write_bytes(at + 12, &flags.to_le_bytes());
        table.write_bytes(at + 14, &next.to_le_bytes());
    }

    /// Writes `entry` as the next head and moves the index.
    pub(crate) fn offer_raw(&mut self, entry: u16) {
        let slot = usize::from(self.idx % self.areas.size);
        let available = &self.areas.available;
        available.store_u16(ENTRIES + 2 * slot, entry, Ordering::Relaxed);
        self.idx = self.idx.wrapping_add(1);
        self.set_idx(self.idx);
    }

    pub(crate) fn set_idx(&self, idx: u16) {
        self.areas.available.store_u16(IDX, idx, Ordering::Release);
    }

    /// Writes a chain without offering it; the last descriptor gets `last_flags` and `last_next`.
    pub(crate) fn prepare(&mut self, pieces: &[Piece], last_flags: u16, last_next: u16) -> u16 {
        let indices: Vec<u16> = self.free.drain(..pieces.len()).collect();
        for (i, piece) in pieces.iter().enumerate() {
            let (flags, next) = match indices.get(i + 1) {
                Some(next) => (NEXT, *next),
                None => (last_flags, last_next),
            };
            self.write_raw(indices[i], *piece, piece.flags | flags, next);
        }
        let head = indices[0];
        self.chains[usize::from(head)] = Some(indices);
        head
    }

    pub(crate) fn post(&mut self, pieces: &[Piece]) -> u16 {
        // Behind the end of a chain `next` means nothing.
        let head = self.prepare(pieces, 0, 0xffff);
        self.offer_raw(head);
        head
    }

    pub(crate) fn reap(&mut self) -> Option<(u16, u32)> {
        let used = &self.areas.used;
        if used.load_u16(IDX, Ordering::Acquire) == self.used {
            return None;
        }
        let at = ENTRIES + 8 * usize::from(self.used % self.areas.size);
        let id = used.load_u32(at, Ordering::Relaxed) as u16;
        let len = used.load_u32(at + 4, Ordering::Relaxed);
        let chain = self.chains[usize::from(id)]
            .take()
            .unwrap_or_else(|| panic!("head {id} came back twice"));
        self.free.extend(chain);
        self.used = self.used.wrapping_add(1);
        Some((id, len))
    }

    /// Writes `used_event`.
    pub(crate) fn set_event(&self, event: u16) {
        let at = ENTRIES + 2 * usize::from(self.areas.size);
        self.areas.available.store_u16(at, event, Ordering::Release);
    }

    /// Asks for a call at the next used element, and says whether there is one already.
    pub(crate) fn arm(&self) -> bool {
        self.set_event(self.used);
        fence(Ordering::SeqCst);
        self.areas.used.load_u16(IDX, Ordering::Acquire) != self.used
    }
}

/// A driver of either kind.
pub(crate) enum Driver<'m> {
    Split(SplitDriver<'m>),
    Packed(packed_reference::Driver<'m>),
}

impl<'m> Driver<'m> {
    pub(crate) fn free(&self) -> u16 {
        match self {
            Driver::Split(driver) => driver.free(),
            Driver::Packed(driver) => driver.free(),
        }
    }

    /// Posts a chain and makes it available; returns what identifies it.
    pub(crate) fn post(&mut self, pieces: &[Piece]) -> u16 {
        match self {
            Driver::Split(driver) => driver.post(pieces),
            Driver::Packed(driver) => {
                let id = driver.free_ids()[0];
                driver.post(id, pieces);
                id
            }
        }
    }

    /// The next chain that came back, with the length written; panics if the device did not have
    /// it.
    pub(crate) fn reap(&mut self) -> Option<(u16, u32)> {
        match self {
            Driver::Split(driver) => driver.reap(),
            Driver::Packed(driver) => driver.reap().map(|element| (element.id, element.len)),
        }
    }

    pub(crate) fn reap_all(&mut self) -> Vec<(u16, u32)> {
        std::iter::from_fn(|| self.reap()).collect()
    }

    /// Asks for a call at the next used element, and says whether there is one already.
    pub(crate) fn arm(&self, event_idx: bool) -> bool {
        match self {
            Driver::Split(driver) => driver.arm(),
            Driver::Packed(driver) => driver.arm(event_idx),
        }
    }

    pub(crate) fn split(&mut self) -> &mut SplitDriver<'m> {
        match self {
            Driver::Split(driver) => driver,
            Driver::Packed(_) => panic!("a packed ring"),
        }
    }

    pub(crate) fn packed(&mut self) -> &mut packed_reference::Driver<'m> {
        match self {
            Driver::Packed(driver) => driver,
            Driver::Split(_) => panic!("a split ring"),
        }
    }
}

/// Writes header and frame into frame `index` of a claim.
pub(crate) fn fill(claim: &Claim<'_>, index: usize, frame: &[u8]) {
    let mut bytes = vec![0; HEADER];
    bytes[10..12].copy_from_slice(&claim.buffers(index).to_le_bytes());
    bytes.extend_from_slice(frame);
    let mut at = 0;
    claim.each_piece(index, |window, count| {
        window.write_bytes(0, &bytes[at..at + count]);
        at += count;
    });
    assert_eq!(at, bytes.len(), "the buffers hold the frame");
}

/// Delivers frames until all are or the queue refuses one; returns how many, and why no more.
pub(crate) fn deliver(queue: &ReceiveQueue, frames: &[Vec<u8>]) -> (usize, Option<NoClaim>) {
    let mut done = 0;
    let mut claim = Claim::new();
    while done < frames.len() {
        let lengths = frames[done..].iter().map(|frame| frame.len() as u32);
        match queue.claim(lengths, &mut claim) {
            Ok(()) => {}
            Err(NoClaim::Contended) => continue,
            Err(reason) => return (done, Some(reason)),
        }
        for index in 0..claim.frames() {
            fill(&claim, index, &frames[done + index]);
        }
        done += claim.frames();
        queue.commit(&claim);
    }
    (done, None)
}

/// `len` bytes that tell frames apart.
pub(crate) fn frame(tag: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| tag.wrapping_add(i as u8)).collect()
}

/// Takes the next chain as poll threads do: the usual kind the short way.
pub(crate) fn take<'m, const N: usize>(
    queue: &'m TransmitQueue,
    end: u64,
    windows: &mut Windows<'m, N>,
) -> Taken {
    match queue.take_single(end) {
        Some(window) => {
            windows.push(window);
            let len = window.len() as u32;
            Taken::Chain { len }
        }
        None => queue.take(end, windows),
    }
}
