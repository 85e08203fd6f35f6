//! Guest memory: regions that frontends share, mapped here, and checked places in them.
//!
//! A session builds a new immutable [`GuestMemory`] for every SET_MEM_TABLE, ADD_MEM_REG and
//! REM_MEM_REG. Topologies hold it through an `Arc`, so nothing is unmapped under a poll thread.
//! Regions that did not change are the same mapping in both maps.
//!
//! The last owner runs the munmap: the reaper, or the guest's session. A session waits until no
//! poll thread uses its old device, then drops its own reference. If the reaper has dropped the
//! last topology by then, the session is the last owner. It is never a poll thread and never the
//! API.
//!
//! Invariants:
//! * Guest memory never becomes a Rust reference. The only way in is a [`Window`].
//! * A window cannot outlive its mapping: it borrows from the map, or from a [`PinnedWindow`], and
//!   both hold the [`Region`].
//! * Only memory files are mapped (memfd, tmpfs, hugetlbfs). A page fault on FUSE or NFS could
//!   block a poll thread for ever, and one on a disk for as long as the disk takes. A region in any
//!   other file is left out of the map, and the guest goes on with the rest.
//! * Every mapping is known to the SIGBUS [`fence`] from before its first use until just before its
//!   munmap, because a frontend can truncate the file at any time.
//!
//! Left out: postcopy (userfaultfd) and a vIOMMU. Neither is offered to frontends.

mod array;
pub mod fence;
mod map;
#[cfg(test)]
pub(crate) mod probe;
mod region;
mod shared;
mod unusable;
mod window;
mod words;

use rustix::io::Errno;

pub use array::{PinnedArray, Word};
pub use fence::{FaultMark, Faults};
pub use map::GuestMemory;
pub use region::{PinnedWindow, Region, RegionSpec};
pub use shared::SharedMemory;
pub use unusable::Unusable;
pub use window::{Pieces, Window};
pub use words::Words;

/// Regions one guest may have: what KVM gives a VM, and what GET_MAX_MEM_SLOTS should answer.
pub const MAX_REGIONS: usize = 509;

/// Address space one guest may take of ours: 4 TiB of the 128 there are. A sparse file costs its
/// owner nothing, so more would let a few frontends use up what all share.
pub const MAX_GUEST_BYTES: u64 = 1 << 42;

/// Why a piece of memory was not accepted. The frontend's fault, except for `FenceFull`.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A memory table without a region.
    #[error("the memory table has no region")]
    NoRegions,
    /// More regions than we track.
    #[error("{count} memory regions, at most {MAX_REGIONS} are possible")]
    TooManyRegions {
        /// How many the guest would have.
        count: usize,
    },
    /// A region of length zero.
    #[error("the region at guest address {guest_addr:#x} has size 0")]
    EmptyRegion {
        /// Its guest address.
        guest_addr: u64,
    },
    /// More address space than one guest may take.
    #[error(
        "the guest's regions come to {total:#x} bytes, at most {MAX_GUEST_BYTES:#x} are possible"
    )]
    TooLarge {
        /// Size of all regions together (saturating).
        total: u64,
    },
    /// Start plus size is beyond 2^64.
    #[error("{what} {start:#x} + {size:#x} wraps around")]
    Wraps {
        /// Which of the region's three ranges.
        what: RangeKind,
        /// Where the range starts.
        start: u64,
        /// Its length.
        size: u64,
    },
    /// Two regions share an address.
    #[error("regions at {what} {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Which of the region's ranges.
        what: RangeKind,
        /// Start of the lower one.
        first: u64,
        /// Start of the higher one.
        second: u64,
    },
    /// Not a regular file at all (a device, a pipe, a socket).
    #[error(
        "the region's descriptor is no file but a device or the like (mode {mode:#o}): guest memory must be a shared \
         memory file, as made by memory-backend-memfd,share=on (QEMU) or shared=on (cloud-hypervisor)"
    )]
    NotAFile {
        /// `st_mode` of the descriptor.
        mode: u32,
    },
    /// A file, but on a file system whose page faults may block.
    #[error(
        "the region's file is on a file system of type {magic:#x}, which is no memory: guest memory must be a shared \
         memory file, as made by memory-backend-memfd,share=on (QEMU) or shared=on (cloud-hypervisor)"
    )]
    WrongFilesystem {
        /// `f_type` of the file system.
        magic: u64,
    },
    /// The offset into the file is inside a page.
    #[error("file offset {offset:#x} is not a multiple of the page size {page_size:#x}")]
    UnalignedOffset {
        /// Offset of the region in its file.
        offset: u64,
        /// Page size of the file system.
        page_size: u64,
    },
    /// The region ends behind the end of its file.
    #[error("file offset {offset:#x} + size {size:#x} is beyond the file's {file_size:#x} bytes")]
    BeyondFile {
        /// Offset of the region in its file.
        offset: u64,
        /// Size of the region.
        size: u64,
        /// Size of the file.
        file_size: u64,
    },
    /// The file cannot be looked at.
    #[error("the region's file cannot be examined")]
    Examine(#[source] Errno),
    /// The kernel refuses the mapping: read-only, sealed against writing, or no address space left.
    #[error("{size:#x} bytes of the region's file cannot be mapped")]
    Map {
        /// How much was to be mapped.
        size: u64,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// All entries of the SIGBUS fence are taken.
    #[error(
        "all {} places for memory regions of all guests are taken; more need a higher \
         vm.max_map_count, and 49152 are the most",
        fence::capacity()
    )]
    FenceFull,
    /// REM_MEM_REG of a region that is not there.
    #[error(
        "no region at guest address {guest_addr:#x}, user address {user_addr:#x}, size {size:#x}"
    )]
    NoSuchRegion {
        /// Guest address in the request.
        guest_addr: u64,
        /// User address in the request.
        user_addr: u64,
        /// Size in the request.
        size: u64,
    },
}

impl MemoryError {
    /// Whether it is the region's file that cannot be used, or the switch that has no room for it.
    /// Such a region is accepted and left out; what contradicts itself (addresses, sizes) is
    /// refused.
    ///
    /// Frontends cannot go on without a region that is refused: QEMU gives the card up, or adds
    /// none behind it. An NVDIMM in an ordinary file holds no buffers of most guests.
    pub(crate) fn leaves_out(&self) -> bool {
        match self {
            MemoryError::NotAFile { .. }
            | MemoryError::WrongFilesystem { .. }
            | MemoryError::TooLarge { .. }
            | MemoryError::FenceFull => true,
            // No address space left: that passes, and the memory that the guest had before stays in
            // use.
            MemoryError::Map { source, .. } => *source != Errno::NOMEM,
            MemoryError::NoRegions
            | MemoryError::TooManyRegions { .. }
            | MemoryError::EmptyRegion { .. }
            | MemoryError::Wraps { .. }
            | MemoryError::Overlap { .. }
            | MemoryError::UnalignedOffset { .. }
            | MemoryError::BeyondFile { .. }
            | MemoryError::Examine(_)
            | MemoryError::NoSuchRegion { .. } => false,
        }
    }
}

/// The three ranges that describe a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// Where the guest sees it.
    GuestAddress,
    /// Where the frontend has it mapped.
    UserAddress,
    /// Where it lies in its file.
    FileOffset,
}

impl std::fmt::Display for RangeKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            RangeKind::GuestAddress => "guest address",
            RangeKind::UserAddress => "user address",
            RangeKind::FileOffset => "file offset",
        })
    }
}
