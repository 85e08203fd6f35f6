//! Memory files (memfd) like those of a frontend: for the load generator and for tests.

use std::fs::File;
use std::io;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// Makes a memory file of `size` zero bytes, closed on exec. `name` is only shown in /proc.
pub fn create(name: &str, size: u64) -> io::Result<File> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, size)?;
    Ok(File::from(fd))
}

/// Makes a memory file of huge pages of the default size. If none are reserved, this succeeds, and
/// the first touch fails.
pub fn create_huge(name: &str, size: u64) -> io::Result<File> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB)?;
    ftruncate(&fd, size)?;
    Ok(File::from(fd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_file_has_its_size() {
        let file = create("pollux-test", 12_345).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 12_345);
    }
}
