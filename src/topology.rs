//! The switch as the poll threads see it: an immutable snapshot.
//!
//! Control builds a new topology for every change and publishes it (`sys::snapshot`). Poll threads
//! borrow it. A new topology shares the ports and plans that did not change with its predecessor,
//! so a port without a guest changes no thread's plan.
//!
//! A topology holds everything that a pass needs, ready-made and flat. So a poll thread allocates
//! nothing, locks nothing and looks nothing up by name. Whatever a topology refers to (rings,
//! memory, descriptors) lives until the last poll thread has acknowledged a newer topology.

use std::sync::Arc;
use std::time::Instant;

use crate::memory::GuestMemory;
use crate::observe::{Observer, Observers};
use crate::port::{Device, PortShared, Receive};
use crate::switch::PortRef;
use crate::switch::fdb::Fdb;
use crate::sys::call::CallFd;
use crate::sys::eventfd::KickFd;
use crate::sys::pages::Pace;
use crate::virtio::{ReceiveQueue, TransmitQueue};

pub mod detour;

use detour::Detour;

/// A receive queue that frames may be delivered into.
#[derive(Debug)]
pub struct EgressQueue {
    /// The ring.
    pub queue: Arc<ReceiveQueue>,
    /// How the queue's driver is called; `None` without a call descriptor.
    pub call: Option<Arc<CallFd>>,
    /// Number of the queue pair.
    pub pair: u16,
}

/// A port as a place to deliver to.
#[derive(Debug)]
pub struct Egress {
    /// Slot and generation of the port.
    pub reference: PortRef,
    /// Name and counters.
    pub shared: Arc<PortShared>,
    /// The receiver's memory; `None` without a session.
    pub memory: Option<Arc<GuestMemory>>,
    /// Started and enabled receive queues that poll threads may deliver into. Empty while the port
    /// cannot receive, and while only the thread of slow ports may deliver into it.
    pub queues: Box<[EgressQueue]>,
    /// Started and enabled receive queues of a port whose memory is slow to touch, or was until
    /// now.
    pub slow_queues: Box<[EgressQueue]>,
    /// Who may touch the port's memory. `Marked` is for control alone, and counts as `Normal` here.
    pub pace: Pace,
    /// The device that this egress was made of. If device, owners, pace and `shared` are the same
    /// for the next topology, the next topology shares this egress.
    device: Option<Arc<Device>>,
    owners: Box<[Option<usize>]>,
}

/// A transmit queue as a place to take from, in the plan of the thread that owns it.
#[derive(Debug)]
pub struct Ingress {
    /// Slot and generation of the port.
    pub reference: PortRef,
    /// Number of the queue pair.
    pub pair: u16,
    /// Name and counters.
    pub shared: Arc<PortShared>,
    /// The sender's memory.
    pub memory: Arc<GuestMemory>,
    /// The ring.
    pub queue: Arc<TransmitQueue>,
    /// How the queue's driver is called; `None` without a call descriptor.
    pub call: Option<Arc<CallFd>>,
    /// How the driver wakes the poll thread; `None` without a kick descriptor.
    pub kick: Option<Arc<KickFd>>,
    /// Whether the frontend has enabled the queue. Frames of a disabled queue are taken and
    /// discarded.
    pub enabled: bool,
}

/// One poll thread's work.
#[derive(Debug, Default)]
pub struct Plan {
    /// The transmit queues that the thread owns.
    pub queues: Box<[Ingress]>,
}

/// A port for [`Topology::build`].
#[derive(Clone, Debug)]
pub struct PortEntry {
    /// The port's name, counters and slot.
    pub shared: Arc<PortShared>,
    /// The session's state; `None` without a frontend.
    pub device: Option<Arc<Device>>,
}

/// Most transmit queues of one poll thread, because a frame names its queue in 16 bits. Frames of
/// further queues stay in their rings until another thread owns these queues.
const MAX_PLAN: usize = 1 << 16;

/// The whole switch at one generation.
#[derive(Debug)]
pub struct Topology {
    /// Ports by slot; `None` where a slot has no port.
    pub ports: Box<[Option<Arc<Egress>>]>,
    /// Slots of the ports that can receive: where a flood goes.
    pub flood: Box<[u16]>,
    /// The plan of each poll thread.
    pub plans: Box<[Arc<Plan>]>,
    /// The forwarding data base. Every topology refers to the same object.
    pub fdb: Arc<Fdb>,
    /// Observers (captures, mirrors, traces); `None` without any observer.
    pub observers: Option<Observers>,
    /// The way to ports whose memory is slow to touch; `None` without such ports.
    pub detour: Option<Arc<Detour>>,
    /// By poll thread: when the oldest change was published that the thread has not acknowledged.
    pub since: Box<[Instant]>,
}

impl Topology {
    /// Builds the snapshot for as many poll threads as `since` has entries. `owner` returns the
    /// poll thread that owns a port's queue pair, or `None` if no thread owns it.
    pub fn build(
        entries: &[PortEntry],
        since: Box<[Instant]>,
        fdb: Arc<Fdb>,
        owner: impl Fn(&PortShared, u16) -> Option<usize>,
    ) -> Self {
        Topology::succeed(None, entries, since, fdb, owner)
    }

    /// Builds the successor of `before`, for the same number of poll threads. The successor shares
    /// every port and every plan that has not changed. So the cost is what changes, and a look at
    /// each port.
    pub fn succeed(
        before: Option<&Topology>,
        entries: &[PortEntry],
        since: Box<[Instant]>,
        fdb: Arc<Fdb>,
        owner: impl Fn(&PortShared, u16) -> Option<usize>,
    ) -> Self {
        let slot = |entry: &PortEntry| usize::from(entry.shared.reference.slot);
        let slots = entries.iter().map(|entry| slot(entry) + 1).max();
        let mut ports: Vec<Option<Arc<Egress>>> = vec![None; slots.unwrap_or(0)];
        // The threads that own, or owned, a queue of a port that has changed.
        let mut changed = vec![before.is_none(); since.len()];
        let mut touch = |port: &Egress| {
            let owners = port.owners.iter().flatten();
            owners.for_each(|thread| changed[*thread] = true);
        };
        for entry in entries {
            let owner = |pair| owner(&entry.shared, pair);
            let same = before.and_then(|before| before.ports.get(slot(entry))?.as_ref());
            let egress = match same.filter(|egress| egress.is_made_of(entry, owner)) {
                Some(same) => same.clone(),
                None => Arc::new(Egress::new(entry, owner)),
            };
            if same.is_none_or(|same| !Arc::ptr_eq(same, &egress)) {
                touch(&egress);
            }
            ports[slot(entry)] = Some(egress);
        }
        for (slot, old) in before
            .iter()
            .flat_map(|before| before.ports.iter().enumerate())
        {
            let now = ports.get(slot).and_then(Option::as_ref);
            if let Some(old) = old
                && now.is_none_or(|now| !Arc::ptr_eq(now, old))
            {
                touch(old);
            }
        }
        let ready = |egress: &&Arc<Egress>| !egress.receive_queues().is_empty();
        let flood = ports.iter().flatten().filter(ready);
        Topology {
            flood: flood.map(|egress| egress.reference.slot).collect(),
            plans: plans(before, entries, &ports, &changed),
            ports: ports.into(),
            fdb,
            observers: None,
            detour: None,
            since,
        }
    }

    /// Returns this topology with a way to ports whose memory is slow to touch.
    pub fn with_detour(self, detour: Option<&Arc<Detour>>) -> Self {
        Topology {
            detour: detour.cloned(),
            ..self
        }
    }

    /// Returns this topology with observers.
    pub fn with_observers(self, observers: &[Arc<Observer>]) -> Self {
        let ports = self.ports.iter().flatten().map(|port| port.reference);
        Topology {
            observers: Observers::build(observers, ports),
            ..self
        }
    }

    /// Returns the port in a slot; `None` if the slot has none.
    #[inline(always)]
    pub fn port(&self, slot: u16) -> Option<&Egress> {
        self.ports.get(usize::from(slot))?.as_deref()
    }
}

/// Builds the plans of the threads that `changed`. The other threads keep their plans of `before`.
fn plans(
    before: Option<&Topology>,
    entries: &[PortEntry],
    ports: &[Option<Arc<Egress>>],
    changed: &[bool],
) -> Box<[Arc<Plan>]> {
    let mut plans: Vec<Vec<Ingress>> = Vec::new();
    plans.resize_with(changed.len(), Vec::new);
    let entries = if changed.contains(&true) {
        entries
    } else {
        &[]
    };
    for entry in entries {
        let Some(port) = &ports[usize::from(entry.shared.reference.slot)] else {
            continue;
        };
        let owner = |pair: u16| port.owners[usize::from(pair)].filter(|thread| changed[*thread]);
        if !port.owners.iter().flatten().any(|thread| changed[*thread]) {
            continue;
        }
        for ingress in ingresses(entry) {
            if let Some(thread) = owner(ingress.pair)
                && plans[thread].len() < MAX_PLAN
            {
                plans[thread].push(ingress);
            }
        }
    }
    let plans = plans.into_iter().enumerate();
    let plan = |(thread, queues): (usize, Vec<_>)| match before {
        Some(before) if !changed[thread] => before.plans[thread].clone(),
        _ => Arc::new(Plan {
            queues: queues.into(),
        }),
    };
    plans.map(plan).collect()
}

/// Returns the enabled receive queues of a port, each with the number of its pair.
fn receive_queues(entry: &PortEntry) -> impl Iterator<Item = (u16, &Receive)> {
    let pairs = entry.device.iter().flat_map(|device| &device.pairs);
    let queues = (0_u16..).zip(pairs);
    queues.filter_map(|(pair, queues)| {
        let receive = queues.receive.as_ref()?;
        receive.enabled.then_some((pair, receive))
    })
}

impl Egress {
    /// Returns the port's receive queues, whichever threads may deliver into them.
    pub fn receive_queues(&self) -> &[EgressQueue] {
        match self.pace {
            Pace::Normal | Pace::Marked => &self.queues,
            Pace::Slow | Pace::Returning => &self.slow_queues,
        }
    }

    fn new(entry: &PortEntry, owner: impl Fn(u16) -> Option<usize>) -> Self {
        let queues = receive_queues(entry).map(|(pair, receive)| EgressQueue {
            queue: receive.queue.clone(),
            call: receive.call.clone(),
            pair,
        });
        let queues: Box<[EgressQueue]> = queues.collect();
        let pace = pace(&entry.shared);
        let (queues, slow_queues) = match pace {
            Pace::Normal | Pace::Marked => (queues, Box::default()),
            Pace::Slow | Pace::Returning => (Box::default(), queues),
        };
        Egress {
            reference: entry.shared.reference,
            shared: entry.shared.clone(),
            memory: entry.device.as_ref().map(|device| device.memory.clone()),
            queues,
            slow_queues,
            pace,
            device: entry.device.clone(),
            owners: pairs(entry).map(owner).collect(),
        }
    }

    /// Whether an egress made of `entry` and `owner` would be equal to this one.
    fn is_made_of(&self, entry: &PortEntry, owner: impl Fn(u16) -> Option<usize>) -> bool {
        let device = match (&self.device, &entry.device) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            _ => false,
        };
        device
            && Arc::ptr_eq(&self.shared, &entry.shared)
            && self.pace == pace(&entry.shared)
            && pairs(entry).map(owner).eq(self.owners.iter().copied())
    }
}

/// Returns who may touch a port's memory, as control has decided. `Marked` counts as `Normal`,
/// because only control changes a port's queues.
fn pace(port: &PortShared) -> Pace {
    match port.pages.pace() {
        Pace::Marked => Pace::Normal,
        other => other,
    }
}

/// Returns the numbers of the queue pairs that a port's device has.
fn pairs(entry: &PortEntry) -> impl Iterator<Item = u16> {
    let device = entry.device.iter();
    device.flat_map(|device| (0_u16..).zip(&device.pairs).map(|(pair, _)| pair))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{PortSpec, SocketMode};
    use crate::port::QueuePair;
    use crate::switch::fdb::FdbConfig;

    fn entry(slot: u16) -> PortEntry {
        let spec = PortSpec {
            name: format!("p{slot}"),
            socket: "/none".into(),
            mode: SocketMode::Server,
            queues: 1,
            ..PortSpec::default()
        };
        let generation = 1;
        let shared = PortShared::new(spec, PortRef { slot, generation }).unwrap();
        PortEntry {
            shared,
            device: Some(device()),
        }
    }

    fn device() -> Arc<Device> {
        Arc::new(Device {
            memory: Arc::default(),
            features: 0,
            numa_node: None,
            pairs: vec![QueuePair::default()],
        })
    }

    #[test]
    fn what_does_not_change_is_shared_with_the_topology_before() {
        let fdb = Arc::new(Fdb::new(FdbConfig::with_capacity(64)).unwrap());
        let after = |before: Option<&Topology>, entries: &[PortEntry], owners: &[usize]| {
            let since = vec![Instant::now(); 3].into();
            Topology::succeed(before, entries, since, fdb.clone(), |port, _| {
                Some(owners[usize::from(port.reference.slot)])
            })
        };
        let shared = |one: &Topology, other: &Topology| {
            let port = |slot: usize| {
                let [one, other] = [one, other].map(|topology| topology.ports.get(slot));
                let (Some(Some(one)), Some(Some(other))) = (one, other) else {
                    return false;
                };
                Arc::ptr_eq(one, other)
            };
            let plan = |thread: usize| Arc::ptr_eq(&one.plans[thread], &other.plans[thread]);
            ([0, 1].map(port), [0, 1, 2].map(plan))
        };
        let mut entries = vec![entry(0), entry(1)];
        let first = after(None, &entries, &[0, 1]);
        let same = after(Some(&first), &entries, &[0, 1]);
        assert_eq!(shared(&first, &same), ([true, true], [true, true, true]));
        // Another port, without a frontend.
        entries.push(PortEntry {
            device: None,
            ..entry(2)
        });
        let more = after(Some(&same), &entries, &[0, 1, 0]);
        assert_eq!(shared(&same, &more), ([true, true], [true, true, true]));
        assert!(more.port(2).is_some());
        // Another device, then another owner, then another port in the slot, then no port.
        entries[1].device = Some(device());
        let device = after(Some(&more), &entries, &[0, 1, 0]);
        assert_eq!(shared(&more, &device), ([true, false], [true, false, true]));
        let moved = after(Some(&device), &entries, &[2, 1, 0]);
        assert_eq!(
            shared(&device, &moved),
            ([false, true], [false, true, false])
        );
        entries[1] = entry(1);
        let replaced = after(Some(&moved), &entries, &[2, 1, 0]);
        assert_eq!(
            shared(&moved, &replaced),
            ([true, false], [true, false, true])
        );
        entries.truncate(1);
        let gone = after(Some(&replaced), &entries, &[2]);
        assert_eq!(
            shared(&replaced, &gone),
            ([true, false], [true, false, true])
        );
        assert!(gone.port(1).is_none());
    }
}
