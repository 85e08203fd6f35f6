//! Where the records of packed rings are kept ([`crate::virtio::redo`]): one small file a ring, in
//! a directory in memory.
//!
//! **Why files, and not INFLIGHT_SHMFD, which was made for this.** No frontend asks for it here.
//! QEMU uses it for its block devices and not for vhost-user-net, DPDK's virtio-user not at all,
//! and cloud-hypervisor's guests have no packed rings. A descriptor that the frontend kept would
//! also be memory that a frontend can write.
//!
//! **When a record is believed.** Only for the very same ring: the same memory file (its inode
//! lives as long as its VM), the same addresses, size and features, and the same SET_VRING_BASE. A
//! frontend that has lost its backend repeats what it said at the last start. A frontend whose
//! guest has reset its device says slot 0. One case is left: a guest that reset a device which had
//! started at slot 0 and has its new ring in the old place. That shows in the ring, which its
//! driver cleared.
//!
//! **When a record is forgotten.** When a position was handed over (GET_VRING_BASE), after
//! RESET_DEVICE, and with its port. Not before the answer is on its way: a process that is killed
//! in between would leave a ring whose position nobody knows.
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

/// Why a ring has no record. It works all the same, until the switch is restarted.
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
    /// The file cannot be mapped: the directory is not in memory, for one.
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
    /// The records of port `port` in `dir`, which is made where it is missing.
    pub fn new(dir: &Path, port: &str) -> Self {
        RingRecords {
            dir: dir.to_path_buf(),
            port: port.to_string(),
        }
    }

    fn path(&self, ring: RingName) -> PathBuf {
        self.dir.join(format!("{}.{}", self.port, ring.index))
    }

    /// The record of a packed ring that is about to start: the one that is there, if it is this
    /// ring's, or a new one. `asked` is what the frontend said at the ring's first start.
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
        // Complete before it has its name: there is no moment with half a record.
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
            // Now, not at the first store to a page that there is no memory for.
            fallocate(&file, FallocateFlags::empty(), 0, bytes)
                .map_err(|errno| failed(&new)(errno.into()))?;
            let words = map(&file, bytes).map_err(|source| RecordError::Memory {
                path: new.clone(),
                source,
            })?;
            // The lower half of a base is what counts.
            let redo = Redo::new(words, &identity, setup.base as u16);
            std::fs::rename(&new, &path).map_err(failed(&path))?;
            Ok(redo)
        };
        made().inspect_err(|_| {
            let _ = std::fs::remove_file(&new);
        })
    }

    /// Where a record is made.
    fn unfinished(&self, ring: RingName) -> PathBuf {
        self.dir.join(format!("{}.{}.new", self.port, ring.index))
    }

    /// The ring's position is no longer the switch's to know.
    pub(super) fn forget(&self, ring: RingName) {
        // One that was never made is forgotten, too.
        let _ = std::fs::remove_file(self.path(ring));
        // Left by a process that was killed while it made it.
        let _ = std::fs::remove_file(self.unfinished(ring));
    }

    /// The port is gone.
    pub fn forget_all(&self) {
        (0..MAX_RINGS).for_each(|ring| self.forget(RingName::new(ring)));
    }
}

fn open(mut options: OpenOptions, path: &Path) -> io::Result<File> {
    // Whatever somebody put there: no link is followed, and no pipe waited for.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    options
        .read(true)
        .write(true)
        .custom_flags(flags.cast_signed())
        .open(path)
}

fn map(file: &File, bytes: u64) -> Result<Words, MemoryError> {
    // The mark is nobody's: the file is ours, and nobody truncates it.
    let mark: Arc<FaultMark> = FaultMark::new();
    PinnedWindow::map(file, 0, bytes, &mark).map(Words::mapped)
}

/// What makes a ring the same ring.
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
