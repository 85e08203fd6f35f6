//! The map of one guest's memory: immutable, looked up by poll threads, replaced by sessions.
//!
//! A region whose file cannot be used is in the map, too, but is not mapped. Frontends stop at the
//! first region that is refused. So a refusal would leave a guest without memory because of one
//! file (`MemoryError::leaves_out`).
//!
//! A change makes a new map that shares the regions which did not change. Look-ups need no shared
//! mutable state, because a "last hit" would move between the caches of poll threads. The four
//! largest regions, which take nearly all traffic of nearly all guests, are compared one after the
//! other. A binary search follows for guests with more regions.

use std::ptr::NonNull;
use std::sync::Arc;

use super::fence::FaultMark;
use super::region::{Examined, PinnedWindow, Region, RegionSpec};
use super::{MAX_GUEST_BYTES, MAX_REGIONS, MemoryError, RangeKind, Unusable, Window};

/// Regions that are compared before the binary search.
const NEAR: usize = 4;

/// Where a range of guest addresses is mapped. A slot of this map keeps the range mapped.
#[derive(Clone, Copy)]
struct Span {
    start: u64,
    len: u64,
    host: NonNull<u8>,
}

impl Span {
    /// A span that contains no address.
    const NONE: Span = Span {
        start: 0,
        len: 0,
        host: NonNull::dangling(),
    };

    /// Returns the offset of `addr` in this span. One comparison is enough: for an address below
    /// the start the subtraction wraps to more than any length (e.g. 0x0fff − 0x1000 = 2^64 − 1).
    #[inline(always)]
    fn offset_of(&self, addr: u64) -> Option<u64> {
        let offset = addr.wrapping_sub(self.start);
        (offset < self.len).then_some(offset)
    }

    /// # Safety
    /// `[offset, offset + len)` must be inside the span, and its region must live for `'m`.
    #[inline(always)]
    unsafe fn window<'m>(&self, offset: u64, len: usize) -> Window<'m> {
        // SAFETY: offset is inside the mapping, as the caller promises.
        let place = unsafe { self.host.add(offset as usize) };
        // SAFETY: inside a live mapping for 'm, as the caller promises; no Rust reference to guest
        // memory exists anywhere.
        unsafe { Window::from_raw(place, len) }
    }
}

/// One entry of the map: a mapping or why there is none, and where guest and frontend see the
/// region.
#[derive(Clone, Debug)]
struct Slot {
    guest_addr: u64,
    user_addr: u64,
    size: u64,
    region: Result<Arc<Region>, Arc<str>>,
    /// How often the region was added (ADD_MEM_REG).
    added: u32,
}

impl Slot {
    fn is_mapped(&self) -> bool {
        self.region.is_ok()
    }
}

/// An immutable map of a guest's memory.
pub struct GuestMemory {
    near: [Span; NEAR],
    // All regions that are mapped, by guest address.
    spans: Box<[Span]>,
    slots: Box<[Slot]>,
    // Start and length of all regions that are not mapped.
    left_out: Box<[(u64, u64)]>,
    mark: Arc<FaultMark>,
}

// SAFETY: the pointers in the spans lead into regions that `slots` owns, which are Send and Sync.
unsafe impl Send for GuestMemory {}
// SAFETY: as for Send; a map never changes.
unsafe impl Sync for GuestMemory {}

impl Default for GuestMemory {
    fn default() -> Self {
        GuestMemory::new(FaultMark::new())
    }
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.regions()).finish()
    }
}

impl GuestMemory {
    /// A map without regions. All maps made from it report faults to the same mark.
    pub fn new(fault: Arc<FaultMark>) -> Self {
        GuestMemory::of(Vec::new(), fault)
    }

    fn of(mut slots: Vec<Slot>, mark: Arc<FaultMark>) -> Self {
        slots.sort_by_key(|slot| slot.guest_addr);
        let mapped = |slot: &Slot| {
            let region = slot.region.as_ref().ok()?;
            Some(Span {
                start: slot.guest_addr,
                len: slot.size,
                host: region.host(),
            })
        };
        let spans: Box<[Span]> = slots.iter().filter_map(mapped).collect();
        let left_out = slots.iter().filter(|slot| !slot.is_mapped());
        let left_out = left_out.map(|slot| (slot.guest_addr, slot.size)).collect();
        let mut by_size = spans.to_vec();
        by_size.sort_by_key(|span| std::cmp::Reverse(span.len));
        let mut near = [Span::NONE; NEAR];
        for (place, span) in near.iter_mut().zip(by_size) {
            *place = span;
        }
        GuestMemory {
            near,
            spans,
            left_out,
            slots: slots.into_boxed_slice(),
            mark,
        }
    }

    /// Returns the map after SET_MEM_TABLE: `specs` and nothing else. Memory that both maps have
    /// stays mapped where it is.
    pub fn with_table(&self, specs: Vec<RegionSpec>) -> Result<GuestMemory, MemoryError> {
        if specs.is_empty() {
            return Err(MemoryError::NoRegions);
        }
        let placed = specs.iter().map(Placed::from).collect();
        check_places(placed)?;
        let mut slots = Vec::with_capacity(specs.len());
        for spec in specs {
            slots.push(self.slot(spec, &slots)?);
        }
        Ok(GuestMemory::of(slots, Arc::clone(&self.mark)))
    }

    /// Returns the map after ADD_MEM_REG.
    ///
    /// A region may be added again: QEMU before 8.0 adds and removes everything once for each queue
    /// pair. The region goes when it was removed as often as it was added.
    pub fn with_region(&self, spec: RegionSpec) -> Result<GuestMemory, MemoryError> {
        if let Some(again) = self.added_again(&spec)? {
            return Ok(again);
        }
        let mut placed: Vec<Placed> = self.slots.iter().map(Placed::from).collect();
        placed.push(Placed::from(&spec));
        check_places(placed)?;
        let mut slots = self.slots.to_vec();
        slots.push(self.slot(spec, &slots)?);
        Ok(GuestMemory::of(slots, Arc::clone(&self.mark)))
    }

    /// Returns the map after REM_MEM_REG. The three values must be those of one region.
    pub fn without_region(
        &self,
        guest_addr: u64,
        user_addr: u64,
        size: u64,
    ) -> Result<GuestMemory, MemoryError> {
        let is_it = |slot: &Slot| {
            slot.guest_addr == guest_addr && slot.user_addr == user_addr && slot.size == size
        };
        let mut slots = self.slots.to_vec();
        let Some(at) = slots.iter().position(is_it) else {
            return Err(MemoryError::NoSuchRegion {
                guest_addr,
                user_addr,
                size,
            });
        };
        if slots[at].added > 1 {
            slots[at].added -= 1;
        } else {
            slots.remove(at);
        }
        Ok(GuestMemory::of(slots, Arc::clone(&self.mark)))
    }

    /// Whether both maps have the same mappings at the same addresses.
    pub fn is_laid_out_like(&self, other: &GuestMemory) -> bool {
        let same = |(one, other): (&Slot, &Slot)| {
            one.guest_addr == other.guest_addr
                && (one.user_addr, one.size) == (other.user_addr, other.size)
                && match (&one.region, &other.region) {
                    (Ok(one), Ok(other)) => Arc::ptr_eq(one, other),
                    // Both are left out, for equal causes.
                    (Err(one), Err(other)) => one == other,
                    _ => false,
                }
        };
        self.slots.len() == other.slots.len() && self.slots.iter().zip(&other.slots).all(same)
    }

    /// Returns the map with one more count for a region that it has already: equal addresses, and
    /// the same place in the same file.
    fn added_again(&self, spec: &RegionSpec) -> Result<Option<GuestMemory>, MemoryError> {
        let is_it = |slot: &Slot| {
            slot.guest_addr == spec.guest_addr
                && slot.user_addr == spec.user_addr
                && slot.size == spec.size
        };
        let Some(at) = self.slots.iter().position(is_it) else {
            return Ok(None);
        };
        // A region that is left out stays so, whatever file comes with it now.
        if let Ok(known) = &self.slots[at].region
            && !Arc::ptr_eq(&self.region(spec)?, known)
        {
            return Ok(None);
        }
        let mut slots = self.slots.to_vec();
        slots[at].added = slots[at].added.saturating_add(1);
        Ok(Some(GuestMemory::of(slots, Arc::clone(&self.mark))))
    }

    /// Returns the slot of a region that is added after the slots `before`.
    fn slot(&self, spec: RegionSpec, before: &[Slot]) -> Result<Slot, MemoryError> {
        let mapped = before.iter().filter(|slot| slot.is_mapped());
        let total = mapped.fold(spec.size, |sum, slot| sum.saturating_add(slot.size));
        let region = if total > MAX_GUEST_BYTES {
            Err(MemoryError::TooLarge { total })
        } else {
            self.region(&spec)
        };
        let region = match region {
            Err(error) if !error.leaves_out() => return Err(error),
            region => region.map_err(|error| error.to_string().into()),
        };
        Ok(Slot {
            guest_addr: spec.guest_addr,
            user_addr: spec.user_addr,
            size: spec.size,
            region,
            added: 1,
        })
    }

    /// Returns the existing mapping, or a new one. The file is examined in both cases, because it
    /// may have shrunk since. If it shrank while it was mapped, the old mapping has holes.
    fn region(&self, spec: &RegionSpec) -> Result<Arc<Region>, MemoryError> {
        let examined = Examined::new(&spec.file, spec.offset, spec.size)?;
        let same =
            |region: &&Arc<Region>| region.identity() == examined.identity() && !region.faulted();
        let mut known = self.slots.iter();
        let known = known.find_map(|slot| {
            let here = slot.guest_addr == spec.guest_addr;
            slot.region.as_ref().ok().filter(|_| here).filter(same)
        });
        match known {
            Some(region) => Ok(Arc::clone(region)),
            None => Ok(Arc::new(Region::map(&spec.file, &examined, &self.mark)?)),
        }
    }

    /// Returns the place of `[guest_addr, guest_addr + len)`, or `None` if it is not inside one
    /// region.
    ///
    /// A range of length 0 must lie inside a region, too.
    #[inline(always)]
    pub fn window(&self, guest_addr: u64, len: u32) -> Option<Window<'_>> {
        let (span, offset) = self.find(guest_addr)?;
        if u64::from(len) > span.len - offset {
            return None;
        }
        // SAFETY: offset < span.len (`find`) and len ≤ span.len − offset, checked above; the span's
        // region lives in `self.slots`, which the result borrows.
        Some(unsafe { span.window(offset, len as usize) })
    }

    #[inline(always)]
    fn find(&self, guest_addr: u64) -> Option<(&Span, u64)> {
        for span in &self.near {
            if let Some(offset) = span.offset_of(guest_addr) {
                return Some((span, offset));
            }
        }
        if self.spans.len() <= NEAR {
            return None;
        }
        self.find_far(guest_addr)
    }

    #[cold]
    #[inline(never)]
    fn find_far(&self, guest_addr: u64) -> Option<(&Span, u64)> {
        let behind = self.spans.partition_point(|s| s.start <= guest_addr);
        let span = self.spans.get(behind.checked_sub(1)?)?;
        span.offset_of(guest_addr).map(|offset| (span, offset))
    }

    /// Hands out the places of `[guest_addr, guest_addr + len)` in order, one for each region that
    /// it crosses. Returns false if a byte is not mapped, or if `each` returned false. Earlier
    /// places were handed out then.
    pub fn windows<'m>(
        &'m self,
        guest_addr: u64,
        len: u32,
        mut each: impl FnMut(Window<'m>) -> bool,
    ) -> bool {
        let mut addr = guest_addr;
        let mut left = u64::from(len);
        while left > 0 {
            let Some((span, offset)) = self.find(addr) else {
                return false;
            };
            let piece = left.min(span.len - offset);
            // SAFETY: offset < span.len (`find`) and piece ≤ span.len − offset; the span's region
            // lives in `self.slots`, which 'm borrows. A piece fits 32 bits, as `len` does.
            if !each(unsafe { span.window(offset, piece as usize) }) {
                return false;
            }
            left -= piece;
            // Regions end below 2^64 (`check_places`), so this does not wrap.
            addr = addr.wrapping_add(piece);
        }
        true
    }

    /// Returns the place of a ring's area by the frontend's address (SET_VRING_ADDR); `None` unless
    /// it lies within one region.
    pub fn pinned(&self, user_addr: u64, len: u64) -> Option<PinnedWindow> {
        self.pin(user_addr, len, |slot| slot.user_addr)
    }

    /// Returns a pinned place by guest address; `None` unless it lies within one region.
    pub fn pinned_guest(&self, guest_addr: u64, len: u64) -> Option<PinnedWindow> {
        self.pin(guest_addr, len, |slot| slot.guest_addr)
    }

    fn pin(&self, addr: u64, len: u64, start: impl Fn(&Slot) -> u64) -> Option<PinnedWindow> {
        self.slots.iter().find_map(|slot| {
            let offset = addr.checked_sub(start(slot))?;
            (offset < slot.size).then_some(())?;
            PinnedWindow::new(slot.region.as_ref().ok()?, offset, len)
        })
    }

    /// Returns the guest address of a frontend's address, for the dirty log.
    pub fn guest_address(&self, user_addr: u64) -> Option<u64> {
        self.slots.iter().find_map(|slot| {
            let offset = user_addr.checked_sub(slot.user_addr)?;
            (offset < slot.size).then(|| slot.guest_addr + offset)
        })
    }

    /// Whether memory of this guest was taken away while it was mapped. Then the guest must not be
    /// served any more.
    #[inline(always)]
    pub fn faulted(&self) -> bool {
        self.mark.is_set()
    }

    /// Returns the mark that faults set.
    pub fn fault_mark(&self) -> &Arc<FaultMark> {
        &self.mark
    }

    /// Whether the guest address lies in a region that is left out.
    pub fn is_unusable(&self, guest_addr: u64) -> bool {
        let behind = self
            .left_out
            .partition_point(|(start, _)| *start <= guest_addr);
        let below = behind.checked_sub(1).and_then(|at| self.left_out.get(at));
        below.is_some_and(|(start, len)| guest_addr - start < *len)
    }

    /// Returns the region that is left out and contains the frontend's address, if there is one.
    pub fn unusable_at(&self, user_addr: u64) -> Option<Unusable> {
        let mut slots = self.slots.iter();
        let is_it = |slot: &&Slot| user_addr.wrapping_sub(slot.user_addr) < slot.size;
        slots.find(is_it).and_then(unusable)
    }

    /// Returns the regions that are left out, by address.
    pub fn unusable(&self) -> impl Iterator<Item = Unusable> + '_ {
        self.slots.iter().filter_map(unusable)
    }

    /// Whether the guest has no memory at all, of either kind.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Returns guest address and length of every region that is mapped, by address.
    pub fn regions(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.spans.iter().map(|span| (span.start, span.len))
    }

    /// Returns the size of all mapped regions together, in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.spans.iter().map(|span| span.len).sum()
    }
}

fn unusable(slot: &Slot) -> Option<Unusable> {
    let cause = slot.region.as_ref().err()?;
    Some(Unusable {
        guest_addr: slot.guest_addr,
        size: slot.size,
        cause: Arc::clone(cause),
    })
}

/// The addresses of a region, mapped or not.
#[derive(Clone, Copy)]
struct Placed {
    guest_addr: u64,
    user_addr: u64,
    size: u64,
}

impl From<&RegionSpec> for Placed {
    fn from(spec: &RegionSpec) -> Self {
        Placed {
            guest_addr: spec.guest_addr,
            user_addr: spec.user_addr,
            size: spec.size,
        }
    }
}

impl From<&Slot> for Placed {
    fn from(slot: &Slot) -> Self {
        Placed {
            guest_addr: slot.guest_addr,
            user_addr: slot.user_addr,
            size: slot.size,
        }
    }
}

/// Checks that these regions can be one guest's memory. Nothing is mapped before this check.
fn check_places(placed: Vec<Placed>) -> Result<(), MemoryError> {
    // Too many regions are refused, not left out: the frontend is told the number
    // (GET_MAX_MEM_SLOTS), and the list must be bounded.
    if placed.len() > MAX_REGIONS {
        return Err(MemoryError::TooManyRegions {
            count: placed.len(),
        });
    }
    if let Some(empty) = placed.iter().find(|p| p.size == 0) {
        return Err(MemoryError::EmptyRegion {
            guest_addr: empty.guest_addr,
        });
    }
    let guest = placed.iter().map(|p| (p.guest_addr, p.size)).collect();
    check_ranges(RangeKind::GuestAddress, guest)?;
    let user = placed.iter().map(|p| (p.user_addr, p.size)).collect();
    check_ranges(RangeKind::UserAddress, user)
}

fn check_ranges(what: RangeKind, mut ranges: Vec<(u64, u64)>) -> Result<(), MemoryError> {
    ranges.sort_unstable();
    let mut below: Option<(u64, u64)> = None;
    for (start, size) in ranges {
        let Some(end) = start.checked_add(size) else {
            return Err(MemoryError::Wraps { what, start, size });
        };
        match below {
            Some((first, first_end)) if first_end > start => {
                let second = start;
                return Err(MemoryError::Overlap {
                    what,
                    first,
                    second,
                });
            }
            _ => below = Some((start, end)),
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "map_tests.rs"]
mod tests;
