//! Keeps the records of packed rings ([`crate::virtio::redo`]): one small file for each ring, in a
//! directory in memory.
//!
//! **Why files, and not INFLIGHT_SHMFD, which was made for this.** No frontend asks for it here.
//! QEMU uses INFLIGHT_SHMFD for its block devices and not for vhost-user-net. DPDK's virtio-user
//! does not use it. Cloud-hypervisor's guests have no packed rings. Besides, the frontend could
//! write to a record in a descriptor that it keeps.
//!
//! **When a record is believed.** Only if memory file, addresses, size, features and SET_VRING_BASE
//! of the ring are equal to those in the record. The inode of the memory file lives as long as its
//! VM. A frontend that has lost its backend repeats the SET_VRING_BASE of the last start. A
//! frontend whose guest has reset its device sends slot 0. One case is left: the device had started
//! at slot 0, was reset, and the new ring has the place of the old one. The ring itself shows this,
//! because its driver has cleared it.
//!
//! **When a record is forgotten.** When a position was handed over (GET_VRING_BASE), after
//! RESET_DEVICE, and when its port is removed. A record is not forgotten before the answer is on
//! its way: if the process were killed in between, nobody would know the position of the ring.
//!
//! **When a ring cannot go on.** Without the directory, a guest with packed rings stands still
//! after a restart of the switch, until it resets its device. So does a guest whose switch is
//! killed between forgetting the record at GET_VRING_BASE and the frontend reading the answer.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, OFlags, fallocate};

use super::event::RingName;
use super::options::MAX_RINGS;
use crate::memory::{FaultMark, MemoryError, PinnedWindow, Words};
use crate::virtio::RingSetup;
use crate::virtio::redo::{IDENTITY, Redo};

/// First word of a record: its name, and a number that changes with its form.
const RECORD_MAGIC: u64 = u64::from_le_bytes(*b"plxring\x03");

/// Why a ring has no record. Without a record the ring works until the switch is restarted.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file cannot be made.
    #[error("{path:?}: {source}")]
    File {
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file cannot be mapped, for example because the directory is not in memory.
    #[error("{path:?}: {source}")]
    Memory {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: MemoryError,
    },
}

/// The records of one port's rings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingRecords {
    dir: PathBuf,
    port: String,
}

impl RingRecords {
    /// The records of port `port` in `dir`. The directory is made when the first record is.
    pub fn new(dir: &Path, port: &str) -> Self {
        RingRecords {
            dir: dir.to_path_buf(),
            port: port.to_string(),
        }
    }

    fn path(&self, ring: RingName) -> PathBuf {
        self.dir.join(format!("{}.{}", self.port, ring.index))
    }

    /// Returns the record of a packed ring that is about to start: the existing record if it
    /// belongs to this ring, or a new one. `asked` is the base that the frontend will send again if
    /// it loses its connection.
    pub(super) fn open(
        &self,
        ring: RingName,
        asked: u32,
        setup: &RingSetup,
    ) -> Result<Redo, RecordError> {
        let identity = identity(asked, setup);
        let bytes = 8 * Redo::words(setup.size) as u64;
        let path = self.path(ring);
        let found = open(OpenOptions::new(), &path).ok();
        let found = found.and_then(|file| map(&file, bytes).ok());
        if let Some(redo) = found.and_then(|words| Redo::found(words, &identity)) {
            return Ok(redo);
        }
        // The record gets its name when it is complete. So a record under this name is never
        // incomplete.
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |source| RecordError::File { path, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(failed(&self.dir))?;
        let new = self.unfinished(ring);
        let _ = std::fs::remove_file(&new);
        let mut options = OpenOptions::new();
        options.create_new(true).mode(0o600);
        let file = open(options, &new).map_err(failed(&new))?;
        let made = || {
            // Memory is reserved now. Otherwise a lack of memory would show at the first store to a
            // page.
            fallocate(&file, FallocateFlags::empty(), 0, bytes)
                .map_err(|errno| failed(&new)(errno.into()))?;
            let words = map(&file, bytes).map_err(|source| RecordError::Memory {
                path: new.clone(),
                source,
            })?;
            // Only the lower half of the base counts.
            let redo = Redo::new(words, &identity, setup.base as u16);
            std::fs::rename(&new, &path).map_err(failed(&path))?;
            Ok(redo)
        };
        made().inspect_err(|_| {
            let _ = std::fs::remove_file(&new);
        })
    }

    /// Returns the path at which a record is made before it gets its name.
    fn unfinished(&self, ring: RingName) -> PathBuf {
        self.dir.join(format!("{}.{}.new", self.port, ring.index))
    }

    /// Removes the record of a ring whose position was handed over or reset.
    pub(super) fn forget(&self, ring: RingName) {
        // Fails if there is no record, which is as good.
        let _ = std::fs::remove_file(self.path(ring));
        // An unfinished record is left if a process is killed while it makes one.
        let _ = std::fs::remove_file(self.unfinished(ring));
    }

    /// Removes the records of all rings of the port, which was removed.
    pub fn forget_all(&self) {
        (0..MAX_RINGS).for_each(|ring| self.forget(RingName::new(ring)));
    }
}

fn open(mut options: OpenOptions, path: &Path) -> io::Result<File> {
    // Somebody else may have put a link or a pipe there. No link is followed, and no pipe is waited
    // for.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    options
        .read(true)
        .write(true)
        .custom_flags(flags.cast_signed())
        .open(path)
}

fn map(file: &File, bytes: u64) -> Result<Words, MemoryError> {
    // Nobody reads this mark: the file is ours, and nobody truncates it.
    let mark: Arc<FaultMark> = FaultMark::new();
    PinnedWindow::map(file, 0, bytes, &mark).map(Words::mapped)
}

/// Returns the words that must be equal for a record to belong to a ring.
fn identity(asked: u32, setup: &RingSetup) -> [u64; IDENTITY] {
    let features = setup.features;
    let features = [
        features.event_idx,
        features.indirect,
        features.in_order,
        features.version_1,
        features.mergeable,
    ];
    let features = features
        .iter()
        .fold(0, |bits, set| bits << 1 | u64::from(*set));
    let (device, inode) = setup.descriptors.region().file_id();
    let place = |window: &PinnedWindow| window.place_in_file();
    [
        RECORD_MAGIC,
        // Only the lower half of a base counts.
        u64::from(setup.size) | u64::from(asked as u16) << 16 | features << 32,
        place(&setup.descriptors),
        place(&setup.available),
        place(&setup.used),
        device,
        inode,
        0,
    ]
}
