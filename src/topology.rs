//! The switch as the poll threads see it: an immutable snapshot.
//!
//! Control builds a new one for every change and publishes it (`sys::snapshot`); poll threads borrow it. All
//! that a pass needs stands here ready-made and flat: nothing is allocated, locked or looked up by name on a poll thread.
//! Whatever a topology refers to (rings, memory, descriptors) lives until the last poll thread has acknowledged a newer
//! one, and is then dropped on the reaper thread.

use std::sync::Arc;
use std::time::Instant;

use crate::memory::GuestMemory;
use crate::port::{Device, PortShared};
use crate::switch::PortRef;
use crate::switch::fdb::Fdb;
use crate::sys::call::CallFd;
use crate::sys::eventfd::KickFd;
use crate::virtio::{ReceiveQueue, TransmitQueue};

/// A receive queue that frames may be delivered into.
#[derive(Debug)]
pub struct EgressQueue {
    /// The ring.
    pub queue: Arc<ReceiveQueue>,
    /// How its driver is called.
    pub call: Option<Arc<CallFd>>,
}

/// A port as a place to deliver to.
#[derive(Debug)]
pub struct Egress {
    /// Slot and generation.
    pub reference: PortRef,
    /// Name and counters.
    pub shared: Arc<PortShared>,
    /// The receiver's memory; `None` without a session.
    pub memory: Option<Arc<GuestMemory>>,
    /// Started and enabled receive queues; empty while the port cannot receive.
    pub queues: Box<[EgressQueue]>,
}

/// A transmit queue as a place to take from, in the plan of the thread that owns it.
#[derive(Debug)]
pub struct Ingress {
    /// Slot and generation of the port.
    pub reference: PortRef,
    /// Queue pair.
    pub pair: u16,
    /// Name and counters.
    pub shared: Arc<PortShared>,
    /// The sender's memory.
    pub memory: Arc<GuestMemory>,
    /// The ring.
    pub queue: Arc<TransmitQueue>,
    /// How its driver is called.
    pub call: Option<Arc<CallFd>>,
    /// How its driver wakes us.
    pub kick: Option<Arc<KickFd>>,
    /// Disabled: taken and discarded.
    pub enabled: bool,
}

/// One poll thread's work.
#[derive(Debug, Default)]
pub struct Plan {
    /// The transmit queues that it owns.
    pub queues: Box<[Ingress]>,
    /// Receive queues whose first call (at ring start) it makes.
    pub starts: Box<[Start]>,
}

/// A receive queue by its place in the topology.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Slot of the port.
    pub slot: u16,
    /// Index in [`Egress::queues`].
    pub index: u16,
    /// Address of the ring object, to tell a restarted ring from the one before.
    pub address: usize,
    /// Address of the call descriptor, to tell when another one came.
    pub call: usize,
}

/// A port for [`Topology::build`].
#[derive(Clone, Debug)]
pub struct PortEntry {
    /// Name, counters, slot.
    pub shared: Arc<PortShared>,
    /// The session's state, if a frontend is there.
    pub device: Option<Arc<Device>>,
}

/// The whole switch at one generation.
#[derive(Debug)]
pub struct Topology {
    /// Ports by slot.
    pub ports: Box<[Option<Egress>]>,
    /// Slots of the ports that can receive: where a flood goes.
    pub flood: Box<[u16]>,
    /// Work by poll thread.
    pub plans: Box<[Plan]>,
    /// The forwarding data base; the same object in every topology.
    pub fdb: Arc<Fdb>,
    /// By poll thread: since when there is something published that it has not acknowledged.
    pub since: Box<[Instant]>,
}

impl Topology {
    /// Builds the snapshot for as many poll threads as `since` has entries. `owner` says which poll thread owns a port's queue pair.
    pub fn build(
        entries: &[PortEntry],
        since: Box<[Instant]>,
        fdb: Arc<Fdb>,
        owner: impl Fn(&PortShared, u16) -> Option<usize>,
    ) -> Self {
        let slots = entries
            .iter()
            .map(|entry| usize::from(entry.shared.reference.slot) + 1)
            .max();
        let mut ports: Vec<Option<Egress>> = Vec::new();
        ports.resize_with(slots.unwrap_or(0), || None);
        let mut plans: Vec<(Vec<Ingress>, Vec<Start>)> = Vec::new();
        plans.resize_with(since.len(), Default::default);
        for entry in entries {
            let slot = entry.shared.reference.slot;
            let egress = egress(entry, |pair, start| {
                if let Some(thread) = owner(&entry.shared, pair) {
                    plans[thread].1.push(start);
                }
            });
            ports[usize::from(slot)] = Some(egress);
            for ingress in ingresses(entry) {
                if let Some(thread) = owner(&entry.shared, ingress.pair) {
                    plans[thread].0.push(ingress);
                }
            }
        }
        let ready = |egress: &&Egress| !egress.queues.is_empty();
        let flood = ports
            .iter()
            .flatten()
            .filter(ready)
            .map(|egress| egress.reference.slot);
        Topology {
            flood: flood.collect(),
            plans: plans
                .into_iter()
                .map(|(queues, starts)| Plan {
                    queues: queues.into(),
                    starts: starts.into(),
                })
                .collect(),
            ports: ports.into(),
            fdb,
            since,
        }
    }

    /// The port in a slot.
    #[inline(always)]
    pub fn port(&self, slot: u16) -> Option<&Egress> {
        self.ports.get(usize::from(slot))?.as_ref()
    }
}

fn egress(entry: &PortEntry, mut start: impl FnMut(u16, Start)) -> Egress {
    let mut queues = Vec::new();
    for (pair, queue) in entry
        .device
        .iter()
        .flat_map(|device| device.pairs.iter().enumerate())
    {
        let Some(receive) = queue.receive.as_ref().filter(|receive| receive.enabled) else {
            continue;
        };
        let address = Arc::as_ptr(&receive.queue).addr();
        let index = queues.len() as u16;
        start(
            pair as u16,
            Start {
                slot: entry.shared.reference.slot,
                index,
                address,
                call: receive
                    .call
                    .as_ref()
                    .map_or(0, |call| Arc::as_ptr(call).addr()),
            },
        );
        queues.push(EgressQueue {
            queue: receive.queue.clone(),
            call: receive.call.clone(),
        });
    }
    Egress {
        reference: entry.shared.reference,
        shared: entry.shared.clone(),
        memory: entry.device.as_ref().map(|device| device.memory.clone()),
        queues: queues.into(),
    }
}

fn ingresses(entry: &PortEntry) -> impl Iterator<Item = Ingress> + '_ {
    entry.device.iter().flat_map(move |device| {
        device
            .pairs
            .iter()
            .enumerate()
            .filter_map(move |(pair, queue)| {
                let transmit = queue.transmit.as_ref()?;
                Some(Ingress {
                    reference: entry.shared.reference,
                    pair: pair as u16,
                    shared: entry.shared.clone(),
                    memory: device.memory.clone(),
                    queue: transmit.queue.clone(),
                    call: transmit.call.clone(),
                    kick: transmit.kick.clone(),
                    enabled: transmit.enabled,
                })
            })
    })
}
