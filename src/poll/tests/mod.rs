//! Passes one at a time, between scripted guests in this process: what happens when is the test's
//! choice.

mod chains;
mod faults;
mod hostile;
mod kicks;
mod lines;
mod outcomes;
mod owed;
mod shares;
mod slow;

use std::sync::Arc;
use std::time::Instant;

use super::egress::{Tools, private_frame};
use super::pass::Pass;
use super::watch::Watch;
use super::{PollShared, Poller};
use crate::config::IdlePolicy;
use crate::frame::MAX_FRAME;
use crate::memory::{GuestMemory, RegionSpec, SharedMemory, Window};
use crate::port::{Device, PortShared, QueuePair, Receive, Transmit};
use crate::stats::{DropReason, ThreadStats};
use crate::switch::PortRef;
use crate::switch::fdb::{Fdb, FdbConfig};
use crate::sys::aio::Caller;
use crate::sys::snapshot::{Publisher, snapshots};
use crate::topology::{PortEntry, Topology};
use crate::virtio::driver::{Buffer, DriverRing, RingAreas, RingLayout};
use crate::virtio::{
    Claim, NET_HDR_SIZE, ReceiveQueue, RingFeatures, RingSetup, TransmitQueue, park,
};
use crate::wire::Mac;

const ENTRIES: u16 = 256;
const ALL: usize = ENTRIES as usize;
/// Guest address of the memory.
const BASE: u64 = 1 << 32;
/// Bytes for a ring, and for all receive buffers.
const RING: usize = 64 << 10;
/// SET_VRING_BASE of a packed ring at its start.
const PACKED_START: u32 = 0x8000_8000;
const BUFFER: usize = 2048;
/// Transmit buffers: all chains of a length share one, which is legal.
const TRANSMIT: usize = 2 * RING + ENTRIES as usize * BUFFER;
const RAM: usize = TRANSMIT + (256 << 10);

fn ram() -> SharedMemory {
    SharedMemory::create(RAM, true).unwrap()
}

fn rams<const N: usize>() -> [SharedMemory; N] {
    std::array::from_fn(|_| ram())
}

fn mac(n: u16) -> [u8; 6] {
    let [high, low] = n.to_be_bytes();
    [0x52, 0x54, 0, 0, high, low]
}

fn features(packed: bool) -> RingFeatures {
    RingFeatures {
        packed,
        version_1: true,
        mergeable: true,
        ..RingFeatures::default()
    }
}

/// A guest, its port, and the queues in between.
struct Vm<'m> {
    ram: &'m SharedMemory,
    port: Arc<PortShared>,
    device: Arc<Device>,
    receive: DriverRing<'m>,
    transmit: DriverRing<'m>,
    /// Frames received, by sender.
    from: [u64; 8],
    /// Buffers taken from the ring and not posted again.
    kept: Vec<u32>,
}

impl<'m> Vm<'m> {
    /// A guest on the port of this slot, with all receive buffers posted.
    fn new(ram: &'m SharedMemory, slot: u16, features: RingFeatures) -> Self {
        let packed = features.packed;
        let spec = RegionSpec {
            guest_addr: BASE,
            user_addr: BASE,
            size: RAM as u64,
            offset: 0,
            file: ram.file().try_clone().unwrap(),
        };
        let memory = Arc::new(GuestMemory::default().with_table(vec![spec]).unwrap());
        let layout = RingLayout::new(ENTRIES, packed);
        let ring = |which: usize| {
            let areas = ram.window(which * RING, layout.len).unwrap();
            DriverRing::new(RingAreas::zeroed(areas, &layout).unwrap(), features)
        };
        let mut rings = [ring(0), ring(1)];
        for token in 0..u32::from(ENTRIES) {
            assert!(rings[0].post_one(receive_buffer(token), token));
        }
        rings[0].publish();
        let setup = |which: usize| {
            let pin = |at: usize, len: usize| {
                let address = BASE + (which * RING + at) as u64;
                memory.pinned_guest(address, len as u64).unwrap()
            };
            RingSetup {
                size: ENTRIES,
                descriptors: pin(0, layout.descriptors_len),
                available: pin(layout.available, layout.available_len),
                used: pin(layout.used, layout.used_len),
                features,
                base: if packed { PACKED_START } else { 0 },
                memory: memory.clone(),
                redo: None,
            }
        };
        let pair = QueuePair {
            receive: Some(Receive {
                queue: Arc::new(ReceiveQueue::start(&setup(0)).unwrap()),
                call: None,
                enabled: true,
            }),
            transmit: Some(Transmit {
                queue: Arc::new(TransmitQueue::start(&setup(1)).unwrap()),
                kick: None,
                call: None,
                enabled: true,
            }),
        };
        let spec = format!("p{slot},socket=/nowhere/{slot}").parse().unwrap();
        let reference = PortRef {
            slot,
            generation: 1,
        };
        let [receive, transmit] = rings;
        Vm {
            ram,
            port: PortShared::new(spec, reference).unwrap(),
            device: Arc::new(Device {
                memory: memory.clone(),
                features: 0,
                numa_node: None,
                pairs: vec![pair],
            }),
            receive,
            transmit,
            from: [0; 8],
            kept: Vec::new(),
        }
    }

    /// Posts frames of `len` bytes to the guest on `to`, as long as there is room; returns how
    /// many.
    fn send(&mut self, to: u16, len: u32, frames: usize) -> usize {
        while self.transmit.reap().is_some() {}
        assert_eq!(self.transmit.fault(), None);
        // Receivers have equal addresses at equal offsets.
        let offset = TRANSMIT + 64 * usize::from(to);
        let bytes = [[0; NET_HDR_SIZE].as_slice(), &mac(to), &mac(self.slot())].concat();
        self.ram
            .window(offset, bytes.len())
            .unwrap()
            .write_bytes(0, &bytes);
        let buffer = Buffer::readable(BASE + offset as u64, len + NET_HDR_SIZE as u32);
        let posted = (0..frames)
            .take_while(|_| self.transmit.post_one(buffer, 0))
            .count();
        self.transmit.publish();
        posted
    }

    /// Takes up to `frames` frames of one buffer each, and keeps the buffers.
    fn take(&mut self, frames: usize) -> usize {
        for taken in 0..frames {
            let Some(used) = self.receive.reap() else {
                return taken;
            };
            let mut source = [0; 6];
            let offset = 2 * RING + used.token as usize * BUFFER;
            let window = self.ram.window(offset, BUFFER).unwrap();
            window.read_bytes(NET_HDR_SIZE + 6, &mut source);
            self.from[usize::from(source[5])] += 1;
            self.kept.push(used.token);
        }
        frames
    }

    /// Posts again what was taken.
    fn give_back(&mut self) {
        for token in std::mem::take(&mut self.kept) {
            assert!(self.receive.post_one(receive_buffer(token), token));
        }
        self.receive.publish();
    }

    /// Disables its receiveq, as of the next topology.
    fn disable(&mut self) {
        let mut device = Device {
            memory: self.device.memory.clone(),
            features: 0,
            numa_node: None,
            pairs: self.device.pairs.clone(),
        };
        device.pairs[0].receive.as_mut().unwrap().enabled = false;
        self.device = Arc::new(device);
    }

    /// Its port, for a topology.
    fn entry(&self) -> PortEntry {
        PortEntry {
            shared: self.port.clone(),
            device: Some(self.device.clone()),
        }
    }

    fn slot(&self) -> u16 {
        self.port.reference.slot
    }

    fn drops(&self, reason: DropReason) -> u64 {
        (0..2)
            .map(|thread| self.port.stats.thread(thread).drops(reason))
            .sum()
    }

    /// Every reason that frames were dropped for at its port, and how many.
    fn outcomes(&self) -> Vec<(DropReason, u64)> {
        let reasons = DropReason::ALL.map(|reason| (reason, self.drops(reason)));
        reasons.into_iter().filter(|(_, n)| *n > 0).collect()
    }

    fn queue(&self) -> &ReceiveQueue {
        &self.device.pairs[0].receive.as_ref().unwrap().queue
    }

    /// The driver's available index of the receiveq.
    fn available(&self) -> Window<'m> {
        let layout = RingLayout::new(ENTRIES, false);
        self.ram.window(layout.available + 2, 2).unwrap()
    }
}

/// A guest in each memory, on ports by number.
fn vms(rams: &[SharedMemory], packed: bool) -> Vec<Vm<'_>> {
    vms_with(rams, features(packed))
}

/// The same with these features.
fn vms_with(rams: &[SharedMemory], features: RingFeatures) -> Vec<Vm<'_>> {
    let numbered = rams.iter().zip(0..);
    numbered
        .map(|(ram, slot)| Vm::new(ram, slot, features))
        .collect()
}

fn receive_buffer(token: u32) -> Buffer {
    let address = BASE + (2 * RING + token as usize * BUFFER) as u64;
    Buffer::writable(address, BUFFER as u32)
}

/// The switch of these guests, each known by its address; the port in slot `n` belongs to the poll
/// thread `owner(n)`.
fn topology(vms: &[Vm<'_>], threads: usize, owner: impl Fn(u16) -> usize) -> Topology {
    let fdb = Arc::new(Fdb::new(FdbConfig::with_capacity(1024)).unwrap());
    let entries: Vec<PortEntry> = vms
        .iter()
        .map(|vm| {
            let address = Mac::from_bytes(mac(vm.slot()));
            fdb.insert_static(0, address, vm.port.reference).unwrap();
            vm.entry()
        })
        .collect();
    let since = vec![Instant::now(); threads].into();
    Topology::build(&entries, since, fdb, |port, _| {
        Some(owner(port.reference.slot))
    })
}

/// The switch of these ports alone, with the addresses that were known before.
fn successor(before: &Topology, entries: &[PortEntry]) -> Topology {
    let since = before.since.clone();
    Topology::succeed(Some(before), entries, since, before.fdb.clone(), |_, _| {
        Some(0)
    })
}

/// What poll threads bring along.
struct Threads {
    callers: Vec<Caller>,
    stats: Vec<ThreadStats>,
    clock: quanta::Clock,
    watches: Vec<Watch>,
    privates: Vec<Vec<u8>>,
    /// How long chains wait for other threads: for ever.
    hold_ns: u64,
}

impl Threads {
    fn new(count: usize) -> Self {
        let clock = quanta::Clock::new();
        // A test says when a thread is alarmed: on a busy machine any pass may be long.
        let watch = |_| {
            let mut watch = Watch::new(&clock, None, false);
            watch.disable();
            watch
        };
        Threads {
            watches: (0..count).map(watch).collect(),
            privates: (0..count).map(|_| private_frame()).collect(),
            callers: (0..count).map(|_| Caller::new().unwrap()).collect(),
            stats: (0..count).map(|_| ThreadStats::default()).collect(),
            clock,
            hold_ns: u64::MAX,
        }
    }

    fn passes<'t, 'p>(&'p mut self, topology: &'t Topology) -> Vec<Pass<'t, 'p>> {
        let (stats, clock, hold_ns) = (&self.stats, &self.clock, self.hold_ns);
        let own = self.watches.iter_mut().zip(&mut self.privates);
        let callers = self.callers.iter_mut().zip(own).enumerate();
        callers
            .map(|(thread, (caller, (watch, private)))| {
                let stats = &stats[thread];
                let tools = Tools {
                    caller,
                    stats,
                    clock,
                    hold_ns,
                    watch,
                    private,
                };
                Pass::new(topology, thread, tools)
            })
            .collect()
    }
}

/// A poll thread that does not run yet, and what keeps its topology.
fn poller(topology: Topology, idle: IdlePolicy) -> (Publisher<Topology>, Arc<PollShared>, Poller) {
    let (publisher, mut readers) = snapshots(topology, 1);
    let shared = Arc::new(PollShared::new(idle).unwrap());
    let reader = readers.pop().unwrap();
    let poller = Poller::new(shared.clone(), reader, Instant::now());
    (publisher, shared, poller.unwrap())
}
