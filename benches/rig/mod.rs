//! A switch without sockets: guests of `pollux bench`, and poll threads over their rings, in one
//! process.
//!
//! For what a vhost-user conversation would only blur: a delivery that is stopped half-way, the
//! cost of one pass. The guests may be played by the poll thread itself, between its passes
//! (`Poller::run_with`).
#![allow(dead_code, reason = "two programs include this, each uses a part")]

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use pollux::bench::frame::{Checker, MacPrefix};
use pollux::bench::guest::Guest;
use pollux::bench::memory::{GUEST_BASE, GuestRam};
use pollux::bench::plan::{FlowCounters, FlowSpec, Plan};
use pollux::config::{IdlePolicy, PortSpec, SocketMode};
use pollux::memory::{GuestMemory, RegionSpec, SharedMemory};
use pollux::poll::{PollShared, Poller};
use pollux::port::{Device, PortShared, QueuePair, Receive, Transmit};
use pollux::switch::PortRef;
use pollux::switch::fdb::{Fdb, FdbConfig};
use pollux::sys::snapshot::{Publisher, snapshots};
use pollux::topology::{PortEntry, Topology};
use pollux::virtio::driver::{RingAreas, RingLayout};
use pollux::virtio::{ReceiveQueue, RingSetup, TransmitQueue};
use pollux::wire::Mac;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Guests' memory and what flows between them.
pub(crate) struct Rig {
    pub(crate) plan: Plan,
    pub(crate) flows: Vec<FlowSpec>,
    pub(crate) counters: Vec<FlowCounters>,
    pub(crate) checker: Checker,
    pub(crate) macs: MacPrefix,
    rams: Vec<GuestRam>,
    kicks: Vec<[EventFd; 2]>,
}

/// The switch over a rig's guests.
pub(crate) struct Switch {
    /// Keeps the topology.
    _publisher: Publisher<Topology>,
    /// A page between each two guests' memories. Those of the rig are multiples of 2 MiB: one
    /// behind the other, all guests' rings would compete for the same few entries of the TLB, as
    /// those of a host's guests do not.
    _spacers: Vec<SharedMemory>,
    /// Poll threads that do not run yet.
    pub(crate) pollers: Vec<Poller>,
    pub(crate) shared: Vec<Arc<PollShared>>,
    /// Ports by guest.
    pub(crate) ports: Vec<Arc<PortShared>>,
    /// Its forwarding table.
    pub(crate) fdb: Arc<Fdb>,
}

impl Rig {
    /// Memory for `plan.guests` guests; flows are pairs of them.
    pub(crate) fn new(plan: Plan, flows: &[(usize, usize)]) -> io::Result<Rig> {
        let flows = flows.iter().map(|&(source, destination)| FlowSpec {
            source,
            queue: 0,
            destination,
        });
        let flows: Vec<FlowSpec> = flows.collect();
        let event = || EventFd::new(EFD_NONBLOCK);
        let guests = 0..plan.guests;
        let macs = MacPrefix::random()?;
        Ok(Rig {
            counters: flows.iter().map(|_| FlowCounters::default()).collect(),
            checker: Checker::new(plan.size, macs),
            macs,
            rams: guests
                .clone()
                .map(|_| GuestRam::new(&plan.memory_needs()))
                .collect::<io::Result<_>>()?,
            kicks: guests
                .map(|_| Ok([event()?, event()?]))
                .collect::<io::Result<_>>()?,
            flows,
            plan,
        })
    }

    /// The guests, with empty rings and all receive buffers posted.
    pub(crate) fn guests(&self) -> io::Result<Vec<Guest<'_>>> {
        let each = self.rams.iter().zip(&self.kicks).enumerate();
        each.map(|(index, (ram, kicks))| {
            let (flows, counters) = (&self.flows, &self.counters);
            Guest::new(
                index,
                ram,
                kicks,
                &self.plan,
                flows,
                counters,
                &self.checker,
            )
        })
        .collect()
    }

    /// A switch that knows where every guest is, after [`Rig::guests`]; `owner` names the poll
    /// thread that takes a guest's frames.
    pub(crate) fn switch(&self, threads: usize, owner: impl Fn(usize) -> usize) -> Switch {
        let fdb = Fdb::new(FdbConfig::with_capacity(8192)).expect("a table of that size");
        let fdb = Arc::new(fdb);
        let mut spacers = Vec::new();
        let entry = |guest| {
            spacers.push(SharedMemory::create(4096, true).expect("a page"));
            self.entry(guest)
        };
        let entries: Vec<PortEntry> = (0..self.rams.len()).map(entry).collect();
        for (guest, entry) in entries.iter().enumerate() {
            let at = entry.shared.reference;
            fdb.insert_static(0, Mac::from_bytes(self.macs.mac(guest)), at)
                .expect("room for a few");
        }
        let owner = |port: &PortShared, _| Some(owner(usize::from(port.reference.slot)));
        let since = vec![Instant::now(); threads].into();
        let topology = Topology::build(&entries, since, Arc::clone(&fdb), owner);
        let (publisher, readers) = snapshots(topology, threads);
        let shared: Vec<Arc<PollShared>> = readers
            .iter()
            .map(|_| Arc::new(PollShared::new(IdlePolicy::Busy).expect("an epoll")))
            .collect();
        let poller = |(reader, shared): (_, &Arc<PollShared>)| {
            Poller::new(shared.clone(), reader, Instant::now())
        };
        let pollers = readers.into_iter().zip(&shared).map(poller);
        Switch {
            _publisher: publisher,
            _spacers: spacers,
            pollers: pollers.collect::<io::Result<_>>().expect("an AIO context"),
            shared,
            ports: entries.into_iter().map(|entry| entry.shared).collect(),
            fdb,
        }
    }

    fn entry(&self, guest: usize) -> PortEntry {
        let spec = PortSpec {
            name: format!("guest{guest}"),
            socket: PathBuf::new(),
            mode: SocketMode::Server,
            queues: 1,
            ..PortSpec::default()
        };
        let reference = PortRef {
            slot: guest as u16,
            generation: 1,
        };
        let ram = &self.rams[guest];
        let memory = Arc::new(map(ram));
        let receive = ReceiveQueue::start(&self.setup(&memory, ram.receive[0].ring));
        let transmit = TransmitQueue::start(&self.setup(&memory, ram.transmit[0].ring));
        let pair = QueuePair {
            transmit: Some(Transmit {
                queue: Arc::new(transmit.expect("a ring that starts")),
                kick: None,
                call: None,
                enabled: true,
            }),
            receive: Some(Receive {
                queue: Arc::new(receive.expect("a ring that starts")),
                call: None,
                enabled: true,
            }),
        };
        PortEntry {
            shared: PortShared::new(spec, reference).expect("a descriptor"),
            device: Some(Arc::new(Device {
                memory,
                features: 0,
                numa_node: None,
                pairs: vec![pair],
            })),
        }
    }

    /// A guest's receiveq by itself, after [`Rig::guests`].
    pub(crate) fn receive_queue(&self, guest: usize) -> ReceiveQueue {
        let ram = &self.rams[guest];
        let setup = self.setup(&Arc::new(map(ram)), ram.receive[0].ring);
        ReceiveQueue::start(&setup).expect("a ring that starts")
    }

    /// The same ring as its driver sees it.
    pub(crate) fn receive_areas(&self, guest: usize) -> RingAreas<'_> {
        let (ram, layout) = (
            &self.rams[guest],
            RingLayout::new(self.plan.ring_size, self.plan.packed),
        );
        let window = ram.window(ram.receive[0].ring, layout.len);
        RingAreas::of(window.expect("in the memory"), &layout).expect("room for a ring")
    }

    fn setup(&self, memory: &Arc<GuestMemory>, ring: usize) -> RingSetup {
        let layout = RingLayout::new(self.plan.ring_size, self.plan.packed);
        let pin = |offset, len: usize| {
            let at = GUEST_BASE + (ring + offset) as u64;
            memory.pinned_guest(at, len as u64).expect("in the memory")
        };
        RingSetup {
            size: layout.size,
            descriptors: pin(0, layout.descriptors_len),
            available: pin(layout.available, layout.available_len),
            used: pin(layout.used, layout.used_len),
            features: self.plan.ring_features(),
            base: Guest::start_base(&self.plan),
            memory: memory.clone(),
            redo: None,
        }
    }
}

/// A guest's memory as the switch maps it.
fn map(ram: &GuestRam) -> GuestMemory {
    let region = RegionSpec {
        guest_addr: GUEST_BASE,
        user_addr: 1 << 40,
        size: ram.memory.len() as u64,
        offset: 0,
        file: ram.memory.file().try_clone().expect("a descriptor"),
    };
    GuestMemory::default()
        .with_table(vec![region])
        .expect("memory that can be mapped")
}
