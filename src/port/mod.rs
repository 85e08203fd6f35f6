//! A port: what outlives its users, and what only poll threads may reach.
//!
//! A port has two halves.
//!
//! - [`PortShared`] is name and counters. Statistics readers, captures and API requests may hold it
//!   as long as they like. After removal control finds no port of that registration any more, and
//!   answers "gone".
//! - [`Device`] is guest memory, rings and file descriptors of one session. Only topologies and the
//!   session hold it. So the reaper or the session drops the last reference, and no other thread
//!   ever runs an munmap.
//!
//! The life of a port: a `PortSpec` is parsed; everything that can fail is built (name, socket,
//! event registration); `register` publishes the port; frontends come and go, each with a session;
//! `unregister` publishes a topology without the port and frees its name and socket path.
//!
//! A port's slot is reused. So everything that names a port (FDB entries, sessions, event data)
//! also carries the port's generation or identity.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::config::PortSpec;
use crate::memory::GuestMemory;
use crate::stats::PortStats;
use crate::switch::PortRef;
use crate::sys::call::{CallFd, CallGuard};
use crate::sys::eventfd::KickFd;
use crate::sys::pages::PageGuard;
use crate::virtio::{ReceiveQueue, TransmitQueue};

/// The half of a port that any thread may hold.
#[derive(Debug)]
pub struct PortShared {
    /// The configuration of the port.
    pub spec: PortSpec,
    /// Slot and generation of this registration.
    pub reference: PortRef,
    /// Counters, one block for each poll thread.
    pub stats: PortStats,
    /// Decides who signals the port's drivers: poll threads or the session.
    pub calls: Arc<CallGuard>,
    /// Number of messages of the port's frontends that had to wait, because too many came at once.
    pub paced_messages: AtomicU64,
    /// Decides who touches its guests' memory: any poll thread or the thread of slow ports.
    pub pages: PageGuard,
}

impl PortShared {
    /// Creates a port that is not registered yet. Returns an error if no descriptor is left.
    pub fn new(spec: PortSpec, reference: PortRef) -> io::Result<Arc<Self>> {
        Ok(Arc::new(PortShared {
            spec,
            reference,
            stats: PortStats::new(),
            calls: CallGuard::new()?,
            paced_messages: AtomicU64::new(0),
            pages: PageGuard::default(),
        }))
    }

    /// Returns the name of the port.
    pub fn name(&self) -> &str {
        &self.spec.name
    }
}

impl fmt::Display for PortShared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.spec.name)
    }
}

/// A started transmitq and its descriptors.
#[derive(Clone, Debug)]
pub struct Transmit {
    /// The ring.
    pub queue: Arc<TransmitQueue>,
    /// Signalled by the driver. `None` if the ring must be polled.
    pub kick: Option<Arc<KickFd>>,
    /// Signalled for the driver. `None` if the driver polls.
    pub call: Option<Arc<CallFd>>,
    /// SET_VRING_ENABLE. A started but disabled transmitq is drained and its frames discarded.
    pub enabled: bool,
}

/// A started receiveq and its descriptor.
#[derive(Clone, Debug)]
pub struct Receive {
    /// The ring.
    pub queue: Arc<ReceiveQueue>,
    /// Signalled for the driver. `None` if the driver polls.
    pub call: Option<Arc<CallFd>>,
    /// SET_VRING_ENABLE. Nothing is delivered to a disabled receiveq.
    pub enabled: bool,
}

/// One queue pair: receiveq `2n` and transmitq `2n + 1` of the device (virtio 1.2 §5.1.2).
#[derive(Clone, Debug, Default)]
pub struct QueuePair {
    /// The transmitq, if started.
    pub transmit: Option<Transmit>,
    /// The receiveq, if started.
    pub receive: Option<Receive>,
}

/// The setup of a session at one moment. It is immutable: each change makes a new device.
#[derive(Debug)]
pub struct Device {
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// Acknowledged virtio features.
    pub features: u64,
    /// NUMA node of the rings, if the kernel reports it.
    pub numa_node: Option<usize>,
    /// Queue pairs by number; a pair that is not set up is empty.
    pub pairs: Vec<QueuePair>,
}
