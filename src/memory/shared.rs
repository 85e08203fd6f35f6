//! Memory that this process creates to share: the load generator's and the tests' guest memory.
//!
//! A frontend owns its guest's memory and passes a file descriptor of it to the backend.
//! [`SharedMemory`] is that side: a memfd, mapped here for as long as the value lives, handed out
//! as windows. The file may be sealed against shrinking, as QEMU seals it. Cloud-hypervisor does
//! not seal it, and a test that truncates the file under the backend needs it unsealed.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{FileOffset, MmapRegion};

use super::Window;

/// A memfd and its mapping in this process.
#[derive(Debug)]
pub struct SharedMemory {
    region: MmapRegion,
    file: Arc<File>,
}

impl SharedMemory {
    /// Creates `len` bytes of zeroed memory; `sealed` forbids that the file shrinks or grows
    /// afterwards.
    pub fn create(len: usize, sealed: bool) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("pollux-guest", flags)?);
        file.set_len(len as u64)?;
        if sealed {
            rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        }
        SharedMemory::of(file, len)
    }

    /// Maps the first `len` bytes of a file in memory.
    pub fn of(file: File, len: usize) -> io::Result<Self> {
        let file = Arc::new(file);
        let region = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&file), 0), len)
            .map_err(io::Error::other)?;
        Ok(SharedMemory { region, file })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.region.size()
    }

    /// Whether there is no byte of it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The file to pass to a backend.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the address at which the memory is mapped here, which a frontend calls the user
    /// address. It is never dereferenced.
    pub fn address(&self) -> usize {
        self.region.as_ptr().addr()
    }

    /// Returns the bytes `[offset, offset + len)`, or `None` if they are not all inside.
    pub fn window(&self, offset: usize, len: usize) -> Option<Window<'_>> {
        let start = NonNull::new(self.region.as_ptr())?;
        // SAFETY: `region` maps `size()` bytes readable and writable for as long as `self` lives,
        // which the returned lifetime is bound to; no reference into it is ever made, here or by
        // `MmapRegion`'s users.
        let all = unsafe { Window::from_raw(start, self.region.size()) };
        all.sub(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn windows_end_with_the_memory() {
        let memory = SharedMemory::create(8192, true).unwrap();
        assert!(memory.window(8184, 8).is_some());
        assert!(memory.window(8185, 8).is_none());
        assert!(memory.window(usize::MAX, 8).is_none());
    }

    #[test]
    fn sealed_memory_cannot_be_truncated_and_unsealed_can() {
        assert!(
            SharedMemory::create(4096, true)
                .unwrap()
                .file()
                .set_len(0)
                .is_err()
        );
        assert!(
            SharedMemory::create(4096, false)
                .unwrap()
                .file()
                .set_len(0)
                .is_ok()
        );
    }

    #[test]
    fn a_second_mapping_of_the_file_sees_what_is_written() {
        let memory = SharedMemory::create(4096, true).unwrap();
        let window = memory.window(16, 8).unwrap();
        window.store_u64(0, 0x0123_4567_89ab_cdef, Ordering::Relaxed);
        let mut seen = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(memory.file(), &mut seen, 16).unwrap();
        assert_eq!(u64::from_le_bytes(seen), 0x0123_4567_89ab_cdef);
    }
}
