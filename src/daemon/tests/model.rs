//! The switch as plain lists: what is promised of ports, queues and views, without how it is kept.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::{Arc, Weak};

use crate::port::Device;
use crate::switch::PortRef;
use crate::topology::{Plan, Topology};

use super::MAX_THREADS;

/// Who has a queue pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Owner {
    On(usize),
    /// On its way; nobody has it in any view from this generation on, once that is published.
    Nobody {
        to: usize,
        since: Option<u64>,
    },
}

impl Owner {
    /// The thread that it counts for.
    pub(super) fn thread(self) -> usize {
        match self {
            Owner::On(thread) | Owner::Nobody { to: thread, .. } => thread,
        }
    }
}

/// Addresses of the rings of a queue pair, and whether they are enabled.
#[derive(Debug, Default)]
pub(super) struct Pair {
    pub(super) transmit: Option<(usize, bool)>,
    pub(super) receive: Option<(usize, bool)>,
}

/// A device that a session has posted.
#[derive(Debug)]
pub(super) struct Posted {
    pub(super) number: usize,
    pub(super) pairs: Vec<Pair>,
}

#[derive(Debug)]
pub(super) struct Port {
    pub(super) name: String,
    pub(super) reference: PortRef,
    pub(super) pinned: Vec<u32>,
    pub(super) owners: Vec<Owner>,
    pub(super) device: Option<Rc<Posted>>,
    /// Number of its session.
    pub(super) session: Option<usize>,
    /// An address that it was learned at.
    pub(super) mac: u64,
}

/// Queues that were ordered to a thread; an answer is due when all poll threads have taken this
/// generation over.
#[derive(Debug)]
pub(super) struct Move {
    pub(super) port: PortRef,
    pub(super) pairs: Vec<u16>,
    pub(super) to: usize,
    pub(super) due: Option<u64>,
    /// Number of the order, if somebody waits for the answer.
    pub(super) order: Option<usize>,
}

/// A receive queue of a port: its pair and its ring.
type Receiving = (u16, usize);

/// What a view says.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct View {
    pub(super) generation: u64,
    /// By slot: whose it is, whether memory is there, and the receive queues by pair.
    ports: Vec<Option<(PortRef, bool, Vec<Receiving>)>>,
    flood: Vec<u16>,
    /// By thread: port, pair, ring, enabled.
    pub(super) plans: Vec<Vec<(PortRef, u16, usize, bool)>>,
}

impl View {
    /// What is published.
    pub(super) fn read(topology: &Topology, generation: u64) -> View {
        let ports = topology.ports.iter().map(|port| {
            let port = port.as_deref()?;
            let queues = port.queues.iter();
            let queues = queues.map(|it| (it.pair, Arc::as_ptr(&it.queue).addr()));
            Some((port.reference, port.memory.is_some(), queues.collect()))
        });
        let queues = |plan: &Arc<Plan>| {
            let queues = plan.queues.iter();
            let queue = queues.map(|it| {
                let ring = Arc::as_ptr(&it.queue).addr();
                (it.reference, it.pair, ring, it.enabled)
            });
            queue.collect()
        };
        View {
            generation,
            ports: ports.collect(),
            flood: topology.flood.to_vec(),
            plans: topology.plans.iter().map(queues).collect(),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Model {
    /// In the order of their creation.
    pub(super) ports: Vec<Port>,
    /// The newest generation of each slot.
    slots: Vec<u32>,
    pub(super) staying: BTreeSet<usize>,
    /// Threads that are to end; true once they have been told to.
    pub(super) leaving: BTreeMap<usize, bool>,
    /// What each thread has taken over last; one that is not here sleeps.
    pub(super) held: BTreeMap<usize, u64>,
    pub(super) moves: Vec<Move>,
    /// Views that a thread may still have, and the newest, each with its devices.
    pub(super) views: VecDeque<(View, Vec<Rc<Posted>>)>,
    /// Something has changed since the newest view.
    pub(super) dirty: bool,
    pub(super) devices: Vec<(usize, Weak<Device>)>,
}

impl Model {
    pub(super) fn may(&self, port: usize, thread: usize) -> bool {
        let pinned = &self.ports[port].pinned;
        pinned.is_empty() || pinned.contains(&(thread as u32))
    }

    /// The thread that gets a queue of a port that is pinned like this: the one that has fewest.
    pub(super) fn lightest(&self, pinned: &[u32], more: &[usize]) -> usize {
        let has = |thread: usize| {
            let owners = self.ports.iter().flat_map(|port| &port.owners);
            let owners = owners.map(|owner| owner.thread()).chain(more.to_vec());
            owners.filter(|owner| *owner == thread).count()
        };
        let may = |thread: &usize| pinned.is_empty() || pinned.contains(&(*thread as u32));
        let allowed = self.staying.iter().copied().filter(may);
        allowed
            .min_by_key(|thread| (has(*thread), *thread))
            .unwrap()
    }

    /// The lowest slot that is free, with a generation that it never had.
    pub(super) fn take_slot(&mut self) -> PortRef {
        let taken = |slot: u16| self.ports.iter().any(|port| port.reference.slot == slot);
        let slot = (0..).find(|slot| !taken(*slot)).unwrap();
        if usize::from(slot) == self.slots.len() {
            self.slots.push(0);
        }
        let generation = &mut self.slots[usize::from(slot)];
        *generation += 1;
        PortRef {
            slot,
            generation: *generation,
        }
    }

    pub(super) fn reached(&self, generation: u64) -> bool {
        self.held.values().all(|held| *held >= generation)
    }

    pub(super) fn newest(&self) -> &View {
        &self.views.back().unwrap().0
    }

    fn view(&self, generation: u64) -> View {
        let slots = self.ports.iter().map(|port| port.reference.slot + 1).max();
        let mut view = View {
            generation,
            ports: vec![None; slots.unwrap_or(0).into()],
            plans: vec![Vec::new(); MAX_THREADS],
            ..View::default()
        };
        for port in &self.ports {
            let slot = port.reference.slot;
            let mut receive = Vec::new();
            let pairs = port.device.iter().flat_map(|device| &device.pairs);
            for ((number, pair), owner) in (0..).zip(pairs).zip(&port.owners) {
                if let (Owner::On(thread), Some((ring, enabled))) = (*owner, pair.transmit) {
                    view.plans[thread].push((port.reference, number, ring, enabled));
                }
                if let Some((ring, true)) = pair.receive {
                    receive.push((number, ring));
                }
            }
            if !receive.is_empty() {
                view.flood.push(slot);
            }
            view.ports[usize::from(slot)] = Some((port.reference, port.device.is_some(), receive));
        }
        view.flood.sort_unstable();
        view
    }

    /// A view was published.
    pub(super) fn publish(&mut self, generation: u64) {
        self.dirty = false;
        for port in &mut self.ports {
            for owner in &mut port.owners {
                if let Owner::Nobody { since, .. } = owner {
                    since.get_or_insert(generation);
                }
            }
        }
        for order in &mut self.moves {
            order.due.get_or_insert(generation);
        }
        let devices = self.ports.iter().filter_map(|port| port.device.clone());
        let devices = devices.collect();
        self.views.push_back((self.view(generation), devices));
    }

    /// Takes queues of a port from their owners.
    pub(super) fn leave(&mut self, at: usize, pair: Option<u16>, to: usize, order: Option<usize>) {
        let port = &mut self.ports[at];
        let mut pairs = Vec::new();
        for (number, owner) in (0..).zip(&mut port.owners) {
            if pair.is_some_and(|pair| pair != number) || owner.thread() == to {
                continue;
            }
            pairs.push(number);
            let since = match *owner {
                Owner::On(_) => None,
                Owner::Nobody { since, .. } => since,
            };
            *owner = Owner::Nobody { to, since };
        }
        self.moves.push(Move {
            port: port.reference,
            pairs,
            to,
            due: None,
            order,
        });
        self.dirty = true;
    }

    /// Gives the queues whose time has come to their new owners. Returns the orders that are
    /// carried out, each with the number of queues that arrived by it, or `None` where the port has
    /// gone.
    pub(super) fn arrive(&mut self) -> Vec<(Option<usize>, Option<u32>)> {
        let (done, waiting) = std::mem::take(&mut self.moves)
            .into_iter()
            .partition(|order| order.due.is_some_and(|due| self.reached(due)));
        self.moves = waiting;
        let mut answers = Vec::new();
        for Move {
            port,
            pairs,
            to,
            order,
            ..
        } in done
        {
            let reached = self.held.values().copied().min().unwrap_or(u64::MAX);
            let port = self.ports.iter_mut().find(|it| it.reference == port);
            let moved = port.map(|port| {
                let mut moved = 0;
                for pair in pairs {
                    let owner = &mut port.owners[usize::from(pair)];
                    if let Owner::Nobody { to: there, since } = *owner
                        && there == to
                    {
                        assert!(since.is_some_and(|since| reached >= since));
                        *owner = Owner::On(to);
                        moved += 1;
                    }
                }
                moved
            });
            answers.push((order, moved));
        }
        answers
    }

    /// No ring has two owners: neither in the views that threads have, nor with the newest, which
    /// any may take over now.
    pub(super) fn assert_one_owner(&self, at: &str) {
        let mut owners: HashMap<usize, usize> = HashMap::new();
        let newest = self.newest();
        let taken = self.held.iter().map(|(thread, generation)| {
            let mut views = self.views.iter().map(|(view, _)| view);
            let view = views.find(|view| view.generation == *generation);
            (*thread, view.expect("a view that is held is there"))
        });
        for (thread, view) in taken.chain((0..MAX_THREADS).map(|thread| (thread, newest))) {
            for (_, _, ring, _) in &view.plans[thread] {
                let other = *owners.entry(*ring).or_insert(thread);
                assert_eq!(other, thread, "{at}: two owners of a ring");
            }
        }
    }
}
