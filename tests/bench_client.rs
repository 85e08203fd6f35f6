//! The load generator against an independent backend: `VhostUserDaemon` with `virtio_queue`.
//!
//! The backend connects the transmit ring of each side with the receive ring of the other (or of
//! the same side), one frame after the other and driven by kicks only, so that a kick that the
//! client owes and does not give stops the run.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pollux::bench::frontend::{AttachError, Frontend, Order, VERSION_1, WireError};
use pollux::bench::plan::{Mode, Pattern, Plan};
use pollux::bench::report::{Report, Verdict};
use pollux::bench::run::{RunError, Setting, run};
use pollux::config::SocketMode;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::EventFlag;
use vmm_sys_util::event::{EventConsumer, EventNotifier, new_event_consumer_and_notifier};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

const NET_HDR: usize = 12;

/// What one side has told the backend.
#[derive(Clone)]
struct Side {
    memory: Memory,
    vrings: Vec<VringRwLock>,
}

/// Both sides, and what to do to frames on their way.
#[derive(Default)]
struct Wire {
    sides: Mutex<Vec<Option<Side>>>,
    /// Of 1000 frames, this many are dropped and have a byte changed.
    drop: u64,
    corrupt: u64,
    count: Mutex<u64>,
}

impl Wire {
    fn pump(&self, peer_of: impl Fn(usize) -> usize) {
        let sides = self.sides.lock().unwrap();
        for from in 0..sides.len() {
            if let (Some(from), Some(to)) = (&sides[from], &sides[peer_of(from)]) {
                while self.move_one(from, to) {}
            }
        }
    }

    fn move_one(&self, from: &Side, to: &Side) -> bool {
        let target = to.memory.memory();
        let mut receive = to.vrings[0].get_mut();
        let Some(room) = receive.get_queue_mut().pop_descriptor_chain(target.clone()) else {
            return false;
        };
        drop(receive);
        let source = from.memory.memory();
        let mut transmit = from.vrings[1].get_mut();
        let chain = transmit
            .get_queue_mut()
            .pop_descriptor_chain(source.clone());
        drop(transmit);
        let Some(chain) = chain else {
            to.vrings[0]
                .get_mut()
                .get_queue_mut()
                .go_to_previous_position();
            return false;
        };
        let head = chain.head_index();
        let mut frame = Vec::new();
        for descriptor in chain {
            let mut part = vec![0; descriptor.len() as usize];
            source.read_slice(&mut part, descriptor.addr()).unwrap();
            frame.extend(part);
        }
        from.vrings[1].add_used(head, 0).unwrap();
        self.deliver(to, room.head_index(), room.collect(), frame);
        true
    }

    fn deliver(
        &self,
        to: &Side,
        head: u16,
        room: Vec<virtio_queue::desc::split::Descriptor>,
        mut frame: Vec<u8>,
    ) {
        let mut count = self.count.lock().unwrap();
        *count += 1;
        let n = *count % 1000;
        if n < self.drop {
            to.vrings[0]
                .get_mut()
                .get_queue_mut()
                .go_to_previous_position();
            return;
        }
        if n < self.drop + self.corrupt {
            frame[NET_HDR + 40] ^= 1;
        }
        frame[..NET_HDR].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        let memory = to.memory.memory();
        memory.write_slice(&frame, room[0].addr()).unwrap();
        to.vrings[0].add_used(head, frame.len() as u32).unwrap();
        to.vrings[0].signal_used_queue().unwrap();
    }
}

/// One side's daemon.
struct Port {
    wire: Arc<Wire>,
    side: usize,
    memory: Memory,
    /// What it offers.
    features: u64,
    exit: Mutex<(EventConsumer, EventNotifier)>,
}

impl VhostUserBackend for Port {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        assert!(memory.memory().iter_count() > 0);
        Ok(())
    }

    fn handle_event(
        &self,
        _event: u16,
        _set: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let mut sides = self.wire.sides.lock().unwrap();
        let side = Side {
            memory: self.memory.clone(),
            vrings: vrings.to_vec(),
        };
        sides[self.side] = Some(side);
        let count = sides.len();
        drop(sides);
        self.wire.pump(|from| (from + 1) % count);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let exit = self.exit.lock().unwrap();
        Some((exit.0.try_clone().ok()?, exit.1.try_clone().ok()?))
    }
}

trait Regions {
    fn iter_count(&self) -> usize;
}

impl Regions for GuestMemoryMmap {
    fn iter_count(&self) -> usize {
        use vm_memory::GuestMemoryBackend;
        self.iter().count()
    }
}

/// Starts one daemon for each side; with one side it reflects. Returns the sockets and what ends
/// the sessions.
fn backend(
    directory: &Path,
    sides: usize,
    features: u64,
    wire: Wire,
) -> (Vec<PathBuf>, std::sync::mpsc::Receiver<ShutdownHandle>) {
    *wire.sides.lock().unwrap() = vec![None; sides];
    let wire = Arc::new(wire);
    let (handles, ends) = std::sync::mpsc::channel();
    let sockets: Vec<PathBuf> = (0..sides)
        .map(|n| directory.join(format!("{n}.sock")))
        .collect();
    for (side, socket) in sockets.iter().enumerate() {
        let mut listener = vhost::vhost_user::Listener::new(socket, true).unwrap();
        let memory = Memory::new(GuestMemoryMmap::new());
        let port = Arc::new(Port {
            wire: Arc::clone(&wire),
            side,
            memory: memory.clone(),
            features,
            exit: Mutex::new(new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap()),
        });
        let handles = handles.clone();
        std::thread::spawn(move || {
            let mut daemon = VhostUserDaemon::new("wire".into(), port, memory).unwrap();
            daemon.start(&mut listener).unwrap();
            handles.send(daemon.shutdown_handle().unwrap()).unwrap();
            let _ = daemon.wait();
        });
    }
    (sockets, ends)
}

const FEATURES: u64 = VERSION_1 | 1 << 30;

fn plan() -> Plan {
    Plan {
        size: 64,
        duration: Duration::from_millis(400),
        guests: 2,
        mode: Mode::Throughput,
        pattern: Pattern::Pairs,
        queues: 1,
        ring_size: 64,
        window: None,
        packed: false,
        mergeable: false,
        in_order: false,
    }
}

fn setting(sockets: Vec<PathBuf>) -> Setting {
    Setting {
        sockets,
        backend: SocketMode::Server,
        order: Order::Qemu,
        timeout: Duration::from_secs(5),
        threads: 1,
        cpus: vec![],
    }
}

fn measure(plan: &Plan, setting: &Setting) -> Result<Report, RunError> {
    run(plan, setting, &AtomicBool::new(false), &mut |_, _| {})
}

fn through(plan: &Plan, order: Order, wire: Wire) -> Report {
    let directory = tempfile::tempdir().unwrap();
    let (sockets, _ends) = backend(directory.path(), plan.guests, FEATURES, wire);
    let setting = Setting {
        order,
        ..setting(sockets)
    };
    measure(plan, &setting).unwrap()
}

/// Whether nothing went wrong, on a machine that may have let a thread wait.
fn clean(report: &Report) -> bool {
    let counts = (report.corrupt, report.duplicated, report.out_of_order);
    report.received > 0 && counts == (0, 0, 0) && report.lost == 0
}

#[test]
fn two_guests_exchange_frames_in_either_message_order() {
    for order in [Order::Qemu, Order::CloudHypervisor] {
        let report = through(&plan(), order, Wire::default());
        assert!(clean(&report), "{report}");
    }
}

#[test]
fn one_guest_hears_itself_from_a_reflecting_backend() {
    let plan = Plan {
        guests: 1,
        size: 1514,
        ..plan()
    };
    let report = through(&plan, Order::Qemu, Wire::default());
    assert!(clean(&report), "{report}");
}

#[test]
fn round_trips_are_measured() {
    let plan = Plan {
        mode: Mode::RoundTrip,
        ..plan()
    };
    let report = through(&plan, Order::Qemu, Wire::default());
    let trips = report.round_trip.unwrap();
    assert!(trips.count > 0 && trips.p50_seconds > 0.0, "{report}");
    assert!(trips.p50_seconds <= trips.p99_seconds && trips.p999_seconds <= trips.max_seconds);
}

#[test]
fn an_open_loop_keeps_its_rate() {
    let plan = Plan {
        mode: Mode::Open(1000.0),
        ..plan()
    };
    let report = through(&plan, Order::Qemu, Wire::default());
    // Two senders, 0.4 s and the warm-up: 1200 frames.
    assert!((1000..1400).contains(&report.sent), "{report}");
}

#[test]
fn lost_and_changed_frames_are_told_apart() {
    let wire = Wire {
        drop: 3,
        corrupt: 2,
        ..Default::default()
    };
    let report = through(&plan(), Order::Qemu, wire);
    assert!(report.corrupt > 0, "{report}");
    assert!(report.lost > 0 || report.unaccounted > 0, "{report}");
    assert_ne!(report.verdict, Verdict::Ok);
}

#[test]
fn a_backend_that_lacks_a_feature_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let (sockets, _ends) = backend(directory.path(), 2, FEATURES, Wire::default());
    let packed = Plan {
        packed: true,
        ..plan()
    };
    let error = measure(&packed, &setting(sockets)).unwrap_err();
    let RunError::Attach { guest: 0, source } = error else {
        panic!("{error}");
    };
    assert!(
        source.to_string().contains("VIRTIO_F_RING_PACKED"),
        "{source}"
    );
}

#[test]
fn more_queues_than_the_backend_has_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (sockets, _ends) = backend(directory.path(), 2, FEATURES, Wire::default());
    let many = Plan {
        queues: 2,
        ..plan()
    };
    let error = measure(&many, &setting(sockets)).unwrap_err();
    assert!(matches!(
        error,
        RunError::Attach {
            source: AttachError::TooFewQueues { offered: 1, .. },
            ..
        }
    ));
}

#[test]
fn a_backend_that_dies_leaves_a_partial_result() {
    let directory = tempfile::tempdir().unwrap();
    let (sockets, ends) = backend(directory.path(), 2, FEATURES, Wire::default());
    let long = Plan {
        duration: Duration::from_secs(60),
        ..plan()
    };
    std::thread::spawn(move || {
        let first = ends.recv().unwrap();
        let _second = ends.recv().unwrap();
        std::thread::sleep(Duration::from_millis(700));
        first.shutdown();
    });
    let report = measure(&long, &setting(sockets)).unwrap();
    assert_eq!(report.verdict, Verdict::Incomplete);
    assert!(
        report
            .ended_early
            .unwrap()
            .contains("closed the connection")
    );
    assert!(report.seconds < 30.0 && report.received > 0);
}

fn negotiated(
    peer: impl FnOnce(std::os::unix::net::UnixStream) + Send + 'static,
) -> Result<u64, AttachError> {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("peer.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || peer(listener.accept().unwrap().0));
    let timeout = Duration::from_millis(300);
    let mut frontend = Frontend::connect(&socket, timeout).unwrap();
    frontend.negotiate(Order::Qemu, VERSION_1, 0, 1)
}

fn attach_to(peer: fn(std::os::unix::net::UnixStream)) -> WireError {
    match negotiated(peer) {
        Err(AttachError::Wire { source, .. }) => source,
        other => panic!("{other:?}"),
    }
}

/// As Linux' driver does with the card that a VMM makes of such an offer.
#[test]
fn features_without_those_that_they_need_are_refused() {
    const MQ: u64 = 1 << 22;
    const CTRL_VQ: u64 = 1 << 17;
    for (offered, taken) in [(MQ, false), (CTRL_VQ, true), (MQ | CTRL_VQ, true)] {
        let features = VERSION_1 | offered;
        let agreed = negotiated(move |mut stream| {
            let mut header = [0; 12];
            stream.read_exact(&mut header).unwrap();
            // GET_FEATURES, version 1 and a reply, and eight bytes of it.
            let answer = [1_u32, 1 | 4, 8].map(u32::to_ne_bytes).concat();
            let answer = [answer, features.to_ne_bytes().to_vec()].concat();
            stream.write_all(&answer).unwrap();
            // Whatever comes next, until the client goes.
            let _ = io::copy(&mut stream, &mut io::sink());
        });
        match agreed {
            Ok(_) => assert!(taken, "{offered:#x}"),
            Err(error) => {
                assert!(!taken, "{error}");
                let said = error.to_string();
                assert!(
                    said.contains("VIRTIO_NET_F_MQ (bit 22) without bit 17"),
                    "{said}"
                );
            }
        }
    }
}

#[test]
fn silent_foreign_and_closing_peers_are_told_apart() {
    let silent = attach_to(|stream| {
        std::thread::sleep(Duration::from_secs(3));
        drop(stream);
    });
    assert!(matches!(silent, WireError::Silent(_)), "{silent}");
    let web = attach_to(|mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        std::thread::sleep(Duration::from_secs(1));
    });
    assert!(matches!(web, WireError::NotVhostUser(_)), "{web}");
    let closing = attach_to(drop);
    assert!(matches!(closing, WireError::Closed(_)), "{closing}");
}

#[test]
fn missing_and_abandoned_sockets_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s.sock");
    let timeout = Duration::from_millis(100);
    let missing = Frontend::connect(&socket, timeout).unwrap_err();
    assert!(matches!(missing, AttachError::Missing(_)));
    drop(UnixListener::bind(&socket).unwrap());
    let abandoned = Frontend::connect(&socket, timeout).unwrap_err();
    assert!(matches!(abandoned, AttachError::Refused(_)));
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let no_socket = Frontend::connect(&file, timeout).unwrap_err();
    assert!(matches!(no_socket, AttachError::NoSocket(_)));
    let other = directory.path().join("t.sock");
    let nobody = Frontend::listen(&other, timeout).unwrap_err();
    assert!(matches!(nobody, AttachError::NobodyCame { .. }));
    assert!(!other.exists());
}
