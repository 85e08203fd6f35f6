//! A daemon in memory: what the API and the commands are tested against.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use crossbeam_channel::Receiver;
use pollux::api::types::*;
use pollux::api::{ByteStream, Control, ControlError, EventHub, Server, What};
use pollux::config::{IdlePolicy, PortSpec};
use pollux::wire::Mac;

#[derive(Default)]
pub(crate) struct Model {
    specs: Mutex<Vec<PortSpec>>,
    mirrors: Mutex<Vec<MirrorAdd>>,
    fdb: Mutex<Vec<FdbEntry>>,
    pub(crate) hub: EventHub,
    pub(crate) delay: Mutex<Duration>,
}

fn view(spec: &PortSpec) -> PortView {
    let drops = BTreeMap::from([("ring_full".to_string(), 3)]);
    PortView {
        name: spec.name.clone(),
        socket: spec.socket.display().to_string(),
        mode: spec.mode,
        queues: spec.queues,
        poll: spec.poll.clone(),
        ring_reset: spec.ring_reset,
        socket_mode: spec.socket_mode,
        socket_group: spec.socket_group.clone(),
        state: PortState::Negotiating,
        reason: Some("driver not ready: \x1b[31mno ring is enabled".into()),
        session: Some(SessionView {
            features: vec!["VERSION_1".into()],
            memory_regions: 2,
            memory_bytes: 512 << 20,
            memory_unusable: vec![UnusableMemory {
                guest_address: 1 << 32,
                bytes: 64 << 20,
                cause: "its file is \x1b[31mon a disk".into(),
            }],
            rings: vec![RingView {
                queue: 0,
                direction: RingDirection::Tx,
                kind: RingKind::Split,
                size: 256,
                state: RingState::Broken,
                broken_reason: Some("avail.idx 300 ahead".into()),
                enabled: true,
                unserved: true,
                no_record: Some("no \x1b[31mroom".into()),
                position: 12,
            }],
            ..SessionView::default()
        }),
        second_frontend: Some(SecondFrontend {
            refused: 37,
            since_seconds: 12.0,
            last_seconds: 0.1,
        }),
        moving_address: Some(MovingAddress {
            mac: Mac::from_bits(0x5254_0000_0001),
            other_port: "vm2".into(),
            moves: 412,
            last_seconds: 0.5,
        }),
        calls: CallMode::Deferred,
        memory: MemoryPace::Slow,
        memory_slow_seconds: Some(7.5),
        statistics: PortStatistics {
            rx: DirectionStatistics {
                frames: 10,
                bytes: 640,
                drops: BTreeMap::new(),
            },
            tx: DirectionStatistics {
                frames: 7,
                bytes: 448,
                drops,
            },
            bad_buffers: 5,
            unusable_buffers: 4,
            moved_addresses: 206,
            slow_calls: 3,
            deferred_calls: 40,
            slow_faults: 64,
            slow_fault_seconds: 0.75,
            ..PortStatistics::default()
        },
    }
}

fn mirror_view(mirror: &MirrorAdd) -> ObserverView {
    ObserverView {
        name: mirror.name.clone(),
        kind: ObserverKind::Mirror,
        ports: mirror.from.clone(),
        to: Some(mirror.to.clone()),
        direction: mirror.direction,
        snaplen: mirror.snaplen,
        filter: String::new(),
        statistics: ObserverStatistics {
            captured: 12,
            missed: 3,
            filtered: 0,
        },
    }
}

/// A stream that comes at once.
struct Bytes(Vec<u8>);

impl ByteStream for Bytes {
    fn name(&self) -> &str {
        "capture-1"
    }

    fn read(&mut self, out: &mut Vec<u8>) -> bool {
        out.append(&mut self.0);
        false
    }
}

impl Model {
    pub(crate) fn event(&self, kind: EventKind, message: &str) {
        let event = Event::new(SystemTime::now(), kind, message);
        self.hub.publish(&event.of_port("vm1"));
    }
}

impl Control for Model {
    fn add_port(&self, spec: PortSpec, may_exist: bool) -> Result<PortView, ControlError> {
        let mut specs = self.specs.lock().unwrap();
        match specs.iter().find(|other| other.name == spec.name) {
            Some(other) if may_exist && *other == spec => {}
            Some(other) => {
                return Err(ControlError::Conflict {
                    text: format!("port {:?} exists, on {:?}", other.name, other.socket),
                });
            }
            None => specs.push(spec.clone()),
        }
        Ok(view(&spec))
    }

    fn remove_port(&self, name: &str) -> Result<(), ControlError> {
        let mut specs = self.specs.lock().unwrap();
        let at = specs.iter().position(|spec| spec.name == name);
        specs.remove(at.ok_or_else(|| ControlError::no_port(name))?);
        Ok(())
    }

    fn set_port(&self, name: &str, patch: PortPatch) -> Result<PortView, ControlError> {
        let mut specs = self.specs.lock().unwrap();
        let spec = specs.iter_mut().find(|spec| spec.name == name);
        let spec = spec.ok_or_else(|| ControlError::no_port(name))?;
        if let Some(queues) = patch.queues {
            spec.queues = queues;
        }
        spec.validate()?;
        Ok(view(spec))
    }

    fn ports(&self) -> Result<Vec<PortView>, ControlError> {
        std::thread::sleep(*self.delay.lock().unwrap());
        Ok(self.specs.lock().unwrap().iter().map(view).collect())
    }

    fn port(&self, name: &str) -> Result<PortView, ControlError> {
        match name {
            "panics" => panic!("as asked"),
            "gone" => Err(ControlError::Gone {
                what: What::Port(name.into()),
            }),
            _ => {
                let specs = self.specs.lock().unwrap();
                let spec = specs.iter().find(|spec| spec.name == name);
                spec.map(view).ok_or_else(|| ControlError::no_port(name))
            }
        }
    }

    fn fdb(&self) -> Result<Vec<FdbEntry>, ControlError> {
        Ok(self.fdb.lock().unwrap().clone())
    }

    fn fdb_add(&self, entry: FdbAdd) -> Result<FdbEntry, ControlError> {
        self.port(&entry.port)?;
        let mut fdb = self.fdb.lock().unwrap();
        let exists = fdb.iter().any(|other| other.mac == entry.mac);
        if exists && !entry.replace {
            let text = format!("{} has a static entry already", entry.mac);
            return Err(ControlError::Conflict { text });
        }
        fdb.retain(|other| other.mac != entry.mac);
        let entry = FdbEntry {
            mac: entry.mac,
            port: entry.port,
            age_seconds: 0.0,
            is_static: true,
        };
        fdb.push(entry.clone());
        Ok(entry)
    }

    fn fdb_remove(&self, mac: Mac) -> Result<(), ControlError> {
        let mut fdb = self.fdb.lock().unwrap();
        let at = fdb.iter().position(|entry| entry.mac == mac);
        fdb.remove(at.ok_or(ControlError::NotFound {
            what: What::Address(mac),
        })?);
        Ok(())
    }

    fn fdb_flush(&self, port: Option<&str>) -> Result<u64, ControlError> {
        match port {
            Some(port) => self.port(port).map(|_| 1),
            None => Ok(2),
        }
    }

    fn poll_threads(&self) -> Result<Vec<PollThreadView>, ControlError> {
        Ok(vec![PollThreadView {
            thread: 0,
            cpu: Some(2),
            numa_node: Some(0),
            tid: 1234,
            state: PollState::Overdue,
            slow_ports: false,
            slow_faults: 0,
            slow_fault_seconds: 0.0,
            idle: IdlePolicy::Busy,
            overdue_seconds: Some(2.5),
            passes: 1_000_000,
            busy_seconds: 0.5,
            busy_ratio: 0.25,
            recent_busy_ratio: 0.5,
            frames: 17,
            sleeps: 5,
            generation: 4,
            acknowledged_generation: 4,
            queues: vec![QueueRef {
                port: "vm1".into(),
                queue: 0,
                load: 0.125,
            }],
            off_cpu_seconds: 0.25,
            pass_length: Some(Latency {
                count: 9,
                p50_seconds: 1e-6,
                p99_seconds: 5e-6,
                p999_seconds: 6e-6,
                max_seconds: 1e-4,
                buckets: vec![LatencyBucket {
                    up_to_seconds: 1e-6,
                    count: 9,
                }],
            }),
            takeover_length: None,
            acknowledge_latency: None,
        }])
    }

    fn poll_add(&self, order: PollAdd) -> Result<PollThreadView, ControlError> {
        let cpu = order.cpu.filter(|cpu| *cpu < 64);
        let no_such = || ControlError::BadArgument("CPU does not exist".into());
        let cpu = Some(cpu.ok_or_else(no_such)?);
        let thread = self.poll_threads()?.remove(0);
        Ok(PollThreadView {
            cpu,
            idle: order.idle.unwrap_or_default(),
            thread: 1,
            ..thread
        })
    }

    fn poll_remove(&self, thread: u32) -> Result<(), ControlError> {
        match thread {
            0 => Err(ControlError::Conflict {
                text: "poll thread 0 is the last one".into(),
            }),
            1 => Ok(()),
            number => Err(ControlError::NotFound {
                what: What::PollThread(number),
            }),
        }
    }

    fn poll_move(&self, order: PollMove) -> Result<Moved, ControlError> {
        self.port(&order.port)?;
        Ok(Moved { queues: 2 })
    }

    fn poll_set(&self, patch: PollSettingsPatch) -> Result<PollSettings, ControlError> {
        Ok(PollSettings {
            rebalance: patch.rebalance.unwrap_or_default(),
            thread: patch.thread,
            idle: patch.idle.unwrap_or_default(),
        })
    }

    fn stats(&self) -> Result<StatsView, ControlError> {
        let ports = self.ports()?.into_iter().map(|port| PortCounters {
            name: port.name,
            state: port.state,
            statistics: port.statistics,
        });
        Ok(StatsView {
            uptime_seconds: 12.5,
            generation: 4,
            ports: ports.collect(),
            poll_threads: self.poll_threads()?,
            ..StatsView::default()
        })
    }

    fn subscribe(&self) -> Receiver<Event> {
        self.hub.subscribe()
    }

    fn observers(&self) -> Result<Vec<ObserverView>, ControlError> {
        let mirrors = self.mirrors.lock().unwrap();
        Ok(mirrors.iter().map(mirror_view).collect())
    }

    fn observer_remove(&self, name: &str) -> Result<(), ControlError> {
        self.mirror_remove(name)
    }

    fn capture(&self, order: CaptureOrder) -> Result<Box<dyn ByteStream>, ControlError> {
        if let Some(port) = &order.port {
            self.port(port)?;
        }
        // What is no section of pcapng, for a client to refuse.
        Ok(Box::new(Bytes(vec![7; 40])))
    }

    fn trace(&self, order: TraceOrder) -> Result<Box<dyn ByteStream>, ControlError> {
        self.port(&order.port)?;
        let end = TraceLine::End {
            reason: "port removed".into(),
            frames: 0,
            missed: 0,
        };
        let mut line = serde_json::to_vec(&end).unwrap();
        line.push(b'\n');
        Ok(Box::new(Bytes(line)))
    }

    fn mirror_add(&self, order: MirrorAdd) -> Result<ObserverView, ControlError> {
        let view = mirror_view(&order);
        self.mirrors.lock().unwrap().push(order);
        Ok(view)
    }

    fn mirror_remove(&self, name: &str) -> Result<(), ControlError> {
        let mut mirrors = self.mirrors.lock().unwrap();
        let at = mirrors.iter().position(|mirror| mirror.name == name);
        mirrors.remove(at.ok_or_else(|| ControlError::NotFound {
            what: What::Mirror(name.into()),
        })?);
        Ok(())
    }

    fn version(&self) -> VersionView {
        VersionView::current()
    }
}

/// A model behind a server on a socket of its own.
pub(crate) struct Served {
    pub(crate) model: Arc<Model>,
    pub(crate) server: Option<Server>,
    pub(crate) socket: PathBuf,
    pub(crate) dir: tempfile::TempDir,
}

pub(crate) fn serve() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let model = Arc::new(Model::default());
    let server = Server::start(&socket, None, model.clone()).unwrap();
    Served {
        model,
        server: Some(server),
        socket,
        dir,
    }
}

impl Served {
    pub(crate) fn spec(&self, name: &str) -> PortSpec {
        let socket = self.dir.path().join(format!("{name}.sock"));
        format!("{name},socket={}", socket.display())
            .parse()
            .unwrap()
    }
}
