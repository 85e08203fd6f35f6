//! One mapping of a frontend's memory file, and places that keep it mapped.
//!
//! A [`Region`] is the mapping only. The map that lists the region knows where the guest sees it.
//! So a table in which only addresses moved shares the mapping with the table before. The file is
//! closed as soon as it is mapped.

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{FileType, fstat, fstatfs};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use super::fence::{FaultMark, Fenced};
use super::{MemoryError, RangeKind, Window};

/// `f_type` of tmpfs and of memfds.
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// `f_type` of hugetlbfs and of memfds with huge pages.
const HUGETLBFS_MAGIC: u64 = 0x958_458f6;

/// Bytes that are unmapped in one call. The call locks the address space, and poll threads that
/// touch a page for the first time wait for that lock. For 2 GiB at once they would wait 65 to 95
/// ms.
const UNMAPPED_AT_ONCE: usize = 2 << 20;

/// A region as a frontend describes it.
#[derive(Debug)]
pub struct RegionSpec {
    /// Where the guest sees it.
    pub guest_addr: u64,
    /// Where the frontend has it mapped. Ring addresses are such user addresses.
    pub user_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Where it starts in the file.
    pub offset: u64,
    /// The memory file.
    pub file: File,
}

/// Two mappings with equal identities are the same memory. A mapping keeps its inode alive, so no
/// other file gets the inode's number meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    offset: u64,
    size: u64,
}

/// A file that passed the checks before it is mapped.
#[derive(Debug)]
pub(super) struct Examined {
    identity: Identity,
    page_size: usize,
}

impl Examined {
    /// Checks kind, file system, alignment and size of `file` for a mapping of
    /// `[offset, offset + size)`.
    pub(super) fn new(file: &File, offset: u64, size: u64) -> Result<Examined, MemoryError> {
        let end = offset.checked_add(size).ok_or(MemoryError::Wraps {
            what: RangeKind::FileOffset,
            start: offset,
            size,
        })?;
        let status = fstat(file).map_err(MemoryError::Examine)?;
        if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
            return Err(MemoryError::NotAFile {
                mode: status.st_mode,
            });
        }
        let page_size = page_size(file)?;
        if !offset.is_multiple_of(page_size) {
            return Err(MemoryError::UnalignedOffset { offset, page_size });
        }
        let file_size = u64::try_from(status.st_size).unwrap_or(0);
        if end > file_size {
            return Err(MemoryError::BeyondFile {
                offset,
                size,
                file_size,
            });
        }
        Ok(Examined {
            identity: Identity {
                device: status.st_dev,
                inode: status.st_ino,
                offset,
                size,
            },
            page_size: page_size as usize,
        })
    }

    pub(super) fn identity(&self) -> Identity {
        self.identity
    }
}

/// Returns the size of the file's pages. Returns an error if the file is not in memory.
fn page_size(file: &File) -> Result<u64, MemoryError> {
    let filesystem = fstatfs(file).map_err(MemoryError::Examine)?;
    match filesystem.f_type as u64 {
        TMPFS_MAGIC => Ok(rustix::param::page_size() as u64),
        // The size of the file's huge pages. The fence relies on a power of two.
        HUGETLBFS_MAGIC => Ok((filesystem.f_bsize as u64).next_power_of_two()),
        magic => Err(MemoryError::WrongFilesystem { magic }),
    }
}

/// One mapped piece of a frontend's memory file.
#[derive(Debug)]
pub struct Region {
    host: NonNull<u8>,
    // Length that was asked for, and checked against the file.
    size: usize,
    // Length of the mapping: whole pages, which munmap of huge pages insists on.
    mapped: usize,
    identity: Identity,
    // Taken out of the fence's table before the munmap. `None` only inside `drop`.
    fenced: Option<Fenced>,
    unmap_step: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is accessed through windows
// only.
unsafe impl Send for Region {}
// SAFETY: as for Send; nothing in a region changes between `map` and `drop`.
unsafe impl Sync for Region {}

impl Region {
    /// Maps a file that passed its examination; the file may be closed afterwards.
    pub(super) fn map(
        file: &File,
        examined: &Examined,
        mark: &Arc<FaultMark>,
    ) -> Result<Region, MemoryError> {
        let Identity { offset, size, .. } = examined.identity;
        let refused = |source| MemoryError::Map { size, source };
        let size = usize::try_from(size).map_err(|_| refused(rustix::io::Errno::NOMEM))?;
        let mapped = size
            .checked_next_multiple_of(examined.page_size)
            .ok_or(refused(rustix::io::Errno::NOMEM))?;
        // No MAP_POPULATE: it would charge the guest's whole memory to this process and take long.
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let place = unsafe {
            mmap(
                std::ptr::null_mut(),
                mapped,
                protection,
                flags,
                file,
                offset,
            )
        }
        .map_err(refused)?;
        let Some(host) = NonNull::new(place.cast::<u8>()) else {
            return Err(refused(rustix::io::Errno::FAULT));
        };
        // From here on, dropping the region unmaps.
        let mut region = Region {
            host,
            size,
            mapped,
            identity: examined.identity,
            fenced: None,
            unmap_step: UNMAPPED_AT_ONCE.max(examined.page_size),
        };
        // SAFETY: the range was mapped just now; the advice changes core dumps only.
        unsafe { madvise(place, mapped, Advice::LinuxDontDump) }.map_err(refused)?;
        let start = place.expose_provenance();
        let fenced = Fenced::insert(start, mapped, examined.page_size, Arc::clone(mark));
        region.fenced = Some(fenced.ok_or(MemoryError::FenceFull)?);
        Ok(region)
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.size
    }

    /// Never true: regions of size 0 are refused.
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// Returns device and inode of the region's file. No other file has them while this region
    /// lives.
    pub fn file_id(&self) -> (u64, u64) {
        (self.identity.device, self.identity.inode)
    }

    /// Whether memory of this region's guest was taken away while it was mapped.
    pub fn faulted(&self) -> bool {
        self.fenced.as_ref().is_some_and(|f| f.mark().is_set())
    }

    /// Start of the mapping; `[host, host + len)` is readable and writable while the region lives.
    pub(super) fn host(&self) -> NonNull<u8> {
        self.host
    }

    pub(super) fn identity(&self) -> Identity {
        self.identity
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // First: the addresses may belong to somebody else as soon as they are unmapped.
        self.fenced = None;
        let start = self.host.as_ptr();
        let mut done = 0;
        while done < self.mapped {
            let place = start.wrapping_add(done);
            // Each call ends at a multiple of the step, so that no huge page is split.
            let to_boundary = self.unmap_step - place.addr() % self.unmap_step;
            let len = to_boundary.min(self.mapped - done);
            // SAFETY: part of our own mapping; nobody has a window into it, since windows borrow
            // from an owner of the region. An error leaves it mapped, which harms nobody.
            let _ = unsafe { munmap(place.cast(), len) };
            done += len;
        }
    }
}

/// A window that keeps the region it lies in mapped.
///
/// Rings use pinned windows for their three areas, so that a running ring looks up no address.
#[derive(Clone)]
pub struct PinnedWindow {
    ptr: NonNull<u8>,
    len: usize,
    region: Arc<Region>,
}

// SAFETY: address and length of a place in a region, which is Send and Sync and lives as long.
unsafe impl Send for PinnedWindow {}
// SAFETY: as for Send.
unsafe impl Sync for PinnedWindow {}

impl PinnedWindow {
    /// Returns `[offset, offset + len)` of a region, or `None` if that is not inside the region.
    pub(super) fn new(region: &Arc<Region>, offset: u64, len: u64) -> Option<PinnedWindow> {
        let offset = usize::try_from(offset).ok()?;
        let len = usize::try_from(len).ok()?;
        if offset > region.size || len > region.size - offset {
            return None;
        }
        // SAFETY: offset ≤ size, checked above, and the mapping is at least `size` long.
        let ptr = unsafe { region.host.add(offset) };
        Some(PinnedWindow {
            ptr,
            len,
            region: Arc::clone(region),
        })
    }

    /// Maps a piece of a memory file that is not guest memory, such as a ring's record. The file is
    /// checked like guest memory, and a fault sets `mark`.
    pub fn map(
        file: &File,
        offset: u64,
        len: u64,
        mark: &Arc<FaultMark>,
    ) -> Result<PinnedWindow, MemoryError> {
        if len == 0 {
            return Err(MemoryError::EmptyRegion { guest_addr: 0 });
        }
        if len > super::MAX_GUEST_BYTES {
            return Err(MemoryError::TooLarge { total: len });
        }
        let examined = Examined::new(file, offset, len)?;
        let region = Arc::new(Region::map(file, &examined, mark)?);
        Ok(PinnedWindow {
            ptr: region.host(),
            len: region.len(),
            region,
        })
    }

    /// Returns the place as a window.
    #[inline(always)]
    pub fn window(&self) -> Window<'_> {
        // SAFETY: inside the region's mapping (`new`, `map`), which `self` keeps alive for the
        // borrow; no Rust reference to guest memory exists anywhere.
        unsafe { Window::from_raw(self.ptr, self.len) }
    }

    /// Returns the offset of the first byte in the region's file.
    pub fn place_in_file(&self) -> u64 {
        let offset = self.ptr.addr().get() - self.region.host.addr().get();
        self.region.identity.offset + offset as u64
    }

    /// Returns the address at which the window is mapped.
    pub(super) fn start(&self) -> NonNull<u8> {
        self.ptr
    }

    /// Length in bytes.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the region that the window keeps mapped.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }
}

impl std::fmt::Debug for PinnedWindow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PinnedWindow({} bytes)", self.len)
    }
}
