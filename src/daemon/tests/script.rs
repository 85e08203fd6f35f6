//! Random operations on a registry and on its model at once.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use rustix::event::EventfdFlags;

use super::MAX_THREADS;
use super::model::{Model, Owner, Pair, Port, Posted, View};
use crate::api::ControlError;
use crate::api::types::Moved;
use crate::config::{IdlePolicy, PortSpec};
use crate::daemon::closer::Unclosed;
use crate::daemon::command::Command;
use crate::daemon::link::{Link, Sink};
use crate::daemon::observers::Names;
use crate::daemon::pace::{Pace, messages};
use crate::daemon::pollers::PollThreads;
use crate::daemon::port::{Door, PortRecord, SessionHandle};
use crate::daemon::registry::Registry;
use crate::daemon::report::{Report, reports};
use crate::daemon::stations::Stations;
use crate::memory::{GuestMemory, RegionSpec, SharedMemory};
use crate::port::{Device, PortShared, QueuePair, Receive, Transmit};
use crate::random_tests::Random;
use crate::switch::fdb::{Fdb, FdbConfig, Learned};
use crate::sys::eventfd::KickFd;
use crate::sys::snapshot::{Reader, Retired, snapshots};
use crate::sys::wake::Wake;
use crate::topology::Topology;
use crate::vhost_user::{DeviceSink, SessionStatus, Stopper, Ticket};
use crate::virtio::driver::RingLayout;
use crate::virtio::{ReceiveQueue, RingFeatures, RingSetup, TransmitQueue};
use crate::wire::Mac;

const MOST_PORTS: usize = 6;
pub(super) const MOST_THREADS: usize = 4;
const PAIRS: u64 = 3;
/// Turns after which all must be done, if every thread takes over what is published.
pub(super) const TURNS: usize = 6;

/// A session of a frontend: its link, its rings, and what it has posted.
pub(super) struct Session {
    pub(super) link: Arc<Link>,
    pub(super) rings: Vec<(Arc<TransmitQueue>, Arc<ReceiveQueue>, Arc<KickFd>)>,
    pub(super) ticket: Option<Ticket>,
    /// What control has not taken yet.
    pub(super) pending: Option<Option<Rc<Posted>>>,
    /// It was told that the port is gone, or another session's.
    pub(super) gone: bool,
}

pub(super) struct Script {
    pub(super) random: Random,
    /// Seed and step, for messages.
    pub(super) at: String,
    pub(super) registry: Registry,
    pub(super) fdb: Arc<Fdb>,
    /// Looks at what is published, and sleeps otherwise.
    pub(super) eye: Reader<Topology>,
    pub(super) threads: BTreeMap<usize, Reader<Topology>>,
    pub(super) reaper: Receiver<Retired<Topology>>,
    pub(super) commands: (Sender<Command>, Receiver<Command>),
    pub(super) wake: Arc<Wake>,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) sessions: BTreeMap<usize, Session>,
    pub(super) orders: BTreeMap<usize, Receiver<Result<Moved, ControlError>>>,
    pub(super) ends: BTreeMap<usize, Receiver<Result<(), ControlError>>>,
    /// Ports that were removed, held by somebody, and the addresses learned there.
    pub(super) removed: Vec<(Arc<PortShared>, u64)>,
    pub(super) model: Model,
    /// For names of sessions, orders, devices and addresses.
    pub(super) count: usize,
}

fn mac(number: u64) -> Mac {
    Mac::from_bits(0x5254_0000_0000 | number)
}

fn memory(layout: &RingLayout) -> GuestMemory {
    let memory = SharedMemory::create(layout.len.next_multiple_of(4096), true).unwrap();
    let region = RegionSpec {
        guest_addr: 0,
        user_addr: 0,
        size: memory.len() as u64,
        offset: 0,
        file: memory.file().try_clone().unwrap(),
    };
    GuestMemory::default().with_table(vec![region]).unwrap()
}

/// What a refusal is about.
pub(super) fn kind(error: &ControlError) -> &'static str {
    match error {
        ControlError::NotFound { .. } => "not found",
        ControlError::Conflict { .. } => "conflict",
        ControlError::BadArgument(_) => "bad argument",
        ControlError::Gone { .. } => "gone",
        _ => "other",
    }
}

impl Script {
    pub(super) fn new(seed: u64) -> Self {
        let fdb = Arc::new(Fdb::new(FdbConfig::with_capacity(1024)).unwrap());
        let now = Instant::now();
        let since = vec![now; MAX_THREADS].into();
        let empty = Topology::build(&[], since, fdb.clone(), |_, _| None);
        let (publisher, mut readers) = snapshots(empty, MAX_THREADS + 1);
        let eye = readers.pop().unwrap();
        let commands = unbounded();
        let wake = Arc::new(Wake::new().unwrap());
        let idle = IdlePolicy::Adaptive(Duration::ZERO);
        let polls = PollThreads::new(readers, idle, now, commands.0.clone(), wake.clone());
        let (reap, reaper) = unbounded();
        let names = Arc::new(Names::default());
        let registry = Registry::new(publisher, polls, (fdb.clone(), 1024), reap, now, names);
        let mut model = Model::default();
        model.publish(1);
        let mut script = Script {
            random: Random(seed),
            at: format!("seed {seed}, start"),
            registry,
            fdb,
            eye,
            threads: BTreeMap::new(),
            reaper,
            commands,
            wake,
            memory: Arc::new(memory(&RingLayout::new(64, false))),
            sessions: BTreeMap::new(),
            orders: BTreeMap::new(),
            ends: BTreeMap::new(),
            removed: Vec::new(),
            model,
            count: 0,
        };
        script.add_thread();
        script.add_thread();
        script
    }

    pub(super) fn number(&mut self) -> usize {
        self.count += 1;
        self.count
    }

    pub(super) fn step(&mut self, step: u32) {
        let seed = self.at.split(',').next().unwrap();
        self.at = format!("{seed}, step {step}");
        match self.random.below(24) {
            0..2 => self.register(),
            2 => self.unregister(),
            3..5 => self.attach(),
            5 => self.detach(),
            6..11 => self.post(),
            11..13 => self.order(),
            13 => self.add_thread(),
            14 => self.remove_thread(),
            15 => self.end_threads(),
            16..20 => self.look(),
            _ => drop(self.turn()),
        }
        self.check();
    }

    // ---- what is true after every step ----------------------------------------------------------

    pub(super) fn check(&mut self) {
        let topology = self.eye.borrow();
        let published = View::read(&topology, topology.generation());
        self.eye.sleep();
        let at = &self.at;
        assert_eq!(published, *self.model.newest(), "{at}");
        self.model.assert_one_owner(at);
        for port in &self.model.ports {
            let found = self.fdb.lookup(0, mac(port.mac));
            assert_eq!(found, Some(port.reference), "{at}");
        }
        for (port, address) in &self.removed {
            let found = self.registry.find_registration(port);
            assert!(found.is_none(), "{at}: a removed port is found");
            assert_eq!(self.fdb.lookup(0, mac(*address)), None, "{at}");
        }
        self.check_devices();
    }

    /// A device is there as long as something can reach it, and no longer.
    pub(super) fn check_devices(&mut self) {
        let views = self.model.views.iter().flat_map(|(_, devices)| devices);
        let ports = self.model.ports.iter().filter_map(|it| it.device.as_ref());
        let sessions = self.sessions.values();
        let pending = sessions.filter_map(|session| session.pending.as_ref()?.as_ref());
        let reachable: BTreeSet<usize> = views
            .chain(ports)
            .chain(pending)
            .map(|device| device.number)
            .collect();
        for (number, device) in &self.model.devices {
            let is_there = device.strong_count() > 0;
            let at = &self.at;
            assert_eq!(
                is_there,
                reachable.contains(number),
                "{at}: device {number}"
            );
        }
        self.model
            .devices
            .retain(|(number, _)| reachable.contains(number));
    }

    /// A view was published by the last call.
    pub(super) fn published(&mut self) {
        let generation = self.registry.generation();
        assert_eq!(
            generation,
            self.model.newest().generation + 1,
            "{}",
            self.at
        );
        self.model.publish(generation);
    }

    // ---- ports ----------------------------------------------------------------------------------

    fn register(&mut self) {
        let name = format!("p{}", self.random.below(10));
        let exists = self.model.ports.iter().any(|port| port.name == name);
        if !exists && self.model.ports.len() < MOST_PORTS {
            let is_pinned = self.random.chance(4);
            self.register_as(name, is_pinned);
        }
    }

    pub(super) fn register_as(&mut self, name: String, is_pinned: bool) {
        let mut spec: PortSpec = format!("{name},socket=/nowhere/{name}").parse().unwrap();
        spec.queues = 1 + self.random.below(PAIRS) as u16;
        if is_pinned {
            let staying: Vec<_> = self.model.staying.iter().collect();
            let any = self.random.below(staying.len() as u64) as usize;
            spec.poll = vec![*staying[any] as u32];
        }
        let reference = self.registry.free_slot();
        assert_eq!(reference, self.model.take_slot(), "{}", self.at);
        let mut on = Vec::new();
        for _ in 0..spec.queues {
            on.push(self.model.lightest(&spec.poll, &on));
        }
        let address = self.number() as u64;
        self.model.ports.push(Port {
            name,
            reference,
            pinned: spec.poll.clone(),
            owners: on.into_iter().map(Owner::On).collect(),
            device: None,
            session: None,
            mac: address,
        });
        let record = self.record(PortShared::new(spec, reference).unwrap());
        self.registry.register(record);
        self.published();
        let learned = self.fdb.learn(0, mac(address), reference, 0);
        assert_eq!(learned, Learned::New, "{}", self.at);
    }

    fn record(&self, shared: Arc<PortShared>) -> PortRecord {
        let now = Instant::now();
        let queues = shared.spec.queues;
        PortRecord {
            socket: shared.spec.socket.clone().into(),
            placement: self.registry.place(&shared.spec.poll, None, queues),
            shared,
            door: Door::Connecting(now),
            placed_by_hand: false,
            slow: None,
            queues,
            session: None,
            waiting: None,
            doubt_until: None,
            unclosed: Unclosed::default(),
            device: None,
            last_end: None,
            accept_at: None,
            accepts: Pace::new(1, Duration::ZERO, now),
            posts: Pace::new(1, Duration::ZERO, now),
            second: None,
            stations: Stations::new(now),
            reports: reports(now),
            messages: messages(now),
            reported_state: None,
        }
    }

    fn unregister(&mut self) {
        let name = format!("p{}", self.random.below(10));
        self.unregister_as(&name);
    }

    pub(super) fn unregister_as(&mut self, name: &str) {
        let removed = self.registry.unregister(name);
        let at = self.model.ports.iter().position(|port| port.name == name);
        assert_eq!(removed.is_some(), at.is_some(), "{}", self.at);
        let (Some((record, _)), Some(at)) = (removed, at) else {
            return;
        };
        let port = self.model.ports.remove(at);
        if let Some(session) = port.session.and_then(|it| self.sessions.get_mut(&it)) {
            (session.gone, session.pending) = (true, None);
        }
        self.removed.push((record.shared.clone(), port.mac));
        drop(record);
        self.published();
    }

    // ---- sessions -------------------------------------------------------------------------------

    /// A port, if there is any.
    pub(super) fn any_port(&mut self) -> Option<usize> {
        let ports = self.model.ports.len();
        (ports > 0).then(|| self.random.below(ports as u64) as usize)
    }

    /// A frontend comes.
    fn attach(&mut self) {
        let number = self.number();
        let Some(at) = self.any_port() else { return };
        let port = &mut self.model.ports[at];
        if port.session.is_some() {
            return;
        }
        port.session = Some(number);
        let (name, pairs) = (port.name.clone(), port.owners.len());
        let shared = self.registry.find(&name).unwrap().shared.clone();
        let link = Link::new(
            shared,
            self.commands.0.clone(),
            self.wake.clone(),
            self.registry.acknowledgements.clone(),
            (Arc::new(Report::default()), reports(Instant::now())),
            messages(Instant::now()),
        );
        let (stream, _) = UnixStream::pair().unwrap();
        self.registry.find(&name).unwrap().session = Some(SessionHandle {
            link: link.clone(),
            status: SessionStatus::new(),
            stopper: Stopper::new(&stream).unwrap(),
            stream,
            since: Instant::now(),
            cut_off: None,
        });
        let session = Session {
            link,
            rings: (0..pairs).map(|_| self.rings()).collect(),
            ticket: None,
            pending: None,
            gone: false,
        };
        self.sessions.insert(number, session);
    }

    /// A frontend leaves, as control takes it.
    fn detach(&mut self) {
        let Some(at) = self.any_port() else { return };
        let port = &mut self.model.ports[at];
        if port.session.take().is_none() {
            return;
        }
        let record = self.registry.find(&port.name).unwrap();
        record.session = None;
        if record.device.take().is_some() {
            self.registry.touch();
        }
        self.model.dirty |= port.device.take().is_some();
    }

    fn rings(&self) -> (Arc<TransmitQueue>, Arc<ReceiveQueue>, Arc<KickFd>) {
        let layout = RingLayout::new(64, false);
        let pin = |at: usize, len: usize| {
            let window = self.memory.pinned_guest(at as u64, len as u64);
            window.unwrap()
        };
        let setup = RingSetup {
            size: 64,
            descriptors: pin(0, layout.descriptors_len),
            available: pin(layout.available, layout.available_len),
            used: pin(layout.used, layout.used_len),
            features: RingFeatures::default(),
            base: 0,
            memory: self.memory.clone(),
            redo: None,
        };
        let kick = rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        (
            Arc::new(TransmitQueue::start(&setup).unwrap()),
            Arc::new(ReceiveQueue::start(&setup).unwrap()),
            Arc::new(KickFd::new(kick.into()).unwrap()),
        )
    }

    /// A session posts what it has now, be it the port's or not: rings come, go, restart, are
    /// enabled and disabled.
    fn post(&mut self) {
        let sessions: Vec<usize> = self.sessions.keys().copied().collect();
        if sessions.is_empty() {
            return;
        }
        let number = sessions[self.random.below(sessions.len() as u64) as usize];
        let device = (!self.random.chance(6)).then(|| self.device(number));
        let (device, posted) = device.unzip();
        let Some(session) = self.sessions.get_mut(&number) else {
            return;
        };
        if let (Some(device), Some(posted)) = (&device, &posted) {
            self.model
                .devices
                .push((posted.number, Arc::downgrade(device)));
        }
        session.ticket = Some(Sink(session.link.clone()).post(device));
        if !session.gone {
            session.pending = Some(posted);
        }
    }

    fn device(&mut self, session: usize) -> (Arc<Device>, Rc<Posted>) {
        let (mut pairs, mut shown) = (Vec::new(), Vec::new());
        let most = self.sessions[&session].rings.len() as u64;
        for pair in 0..1 + self.random.below(most) as usize {
            if self.random.chance(8) {
                self.sessions.get_mut(&session).unwrap().rings[pair] = self.rings();
            }
            let (transmit, receive, kick) = self.sessions[&session].rings[pair].clone();
            let random = &mut self.random;
            let mut state = || (!random.chance(4)).then(|| !random.chance(3));
            let [sends, receives] = [state(), state()];
            shown.push(Pair {
                transmit: sends.map(|enabled| (Arc::as_ptr(&transmit).addr(), enabled)),
                receive: receives.map(|enabled| (Arc::as_ptr(&receive).addr(), enabled)),
            });
            pairs.push(QueuePair {
                transmit: sends.map(|enabled| Transmit {
                    queue: transmit,
                    kick: Some(kick),
                    call: None,
                    enabled,
                }),
                receive: receives.map(|enabled| Receive {
                    queue: receive,
                    call: None,
                    enabled,
                }),
            });
        }
        let number = self.number();
        let device = Arc::new(Device {
            memory: self.memory.clone(),
            features: 0,
            numa_node: None,
            pairs,
        });
        let pairs = shown;
        (device, Rc::new(Posted { number, pairs }))
    }
}
