//! Instructions and atomic operations that a frame costs the switch, counted by valgrind and
//! compared with `tests/instructions.txt`.
//!
//! Unlike times they are the same in every run on every machine, so a change that makes the data
//! path longer is found before anybody measures. Counted is what this program's own code does
//! inside `Poller::drain`: the C library is left out, because its copies depend on the processor.
//! `POLLUX_BLESS=1` records new values.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pollux::config::{IdlePolicy, MAX_SNAPLEN, ObserveDirection, PortSpec, SocketMode};
use pollux::memory::{GuestMemory, RegionSpec, SharedMemory};
use pollux::observe::{Filter, Kind, Observer, ObserverSpec};
use pollux::poll::{PollShared, Poller};
use pollux::port::{Device, PortShared, QueuePair, Receive, Transmit};
use pollux::switch::PortRef;
use pollux::switch::fdb::{Fdb, FdbConfig};
use pollux::sys::eventfd::KickFd;
use pollux::sys::snapshot::snapshots;
use pollux::topology::{PortEntry, Topology};
use pollux::virtio::driver::{Buffer, DriverRing, RingAreas, RingLayout};
use pollux::virtio::{ReceiveQueue, RingFeatures, RingSetup, TransmitQueue};
use pollux::wire::Mac;
use rustix::event::EventfdFlags;

/// Allowed difference from the recorded value.
const TOLERANCE: f64 = 0.02;
/// The line of the record that names the compiler starts so.
const COMPILER: &str = "# Compiler: ";
/// Frames that each sender sends before the switch gets to work.
const BATCH: u32 = 128;
const RING: u16 = 256;
const HEADER: u32 = 12;

/// One thing to count, for either kind of ring.
#[derive(Clone, Copy)]
struct Scenario {
    /// Follows the kind of ring.
    name: &'static str,
    packed: bool,
    mergeable: bool,
    event_idx: bool,
    in_order: bool,
    /// Bytes of a frame and of a receive buffer with its header.
    frame: u32,
    buffer: u32,
    /// Buffers that a frame is sent from, the first one with nothing but the header.
    pieces: u32,
    ports: u16,
    /// The first port alone sends, to everybody.
    flood: bool,
    /// All other ports send one frame in a round, to the first.
    gather: bool,
    /// Poll threads; neighbouring ports, which send to each other, are on different ones.
    threads: usize,
    /// Somebody captures all of it.
    captured: bool,
}

const USUAL: Scenario = Scenario {
    name: "",
    packed: false,
    mergeable: false,
    event_idx: false,
    in_order: false,
    frame: 64,
    buffer: 2048,
    pieces: 1,
    ports: 2,
    flood: false,
    gather: false,
    threads: 1,
    captured: false,
};

/// These two must cost the same instructions: nothing of a frame depends on how many threads there
/// are.
const ALIKE: [&str; 2] = [", four ports", ", four ports on two threads"];

const SCENARIOS: [Scenario; 12] = [
    USUAL,
    Scenario {
        name: ", mergeable",
        mergeable: true,
        ..USUAL
    },
    Scenario {
        name: ", event index",
        event_idx: true,
        ..USUAL
    },
    Scenario {
        name: ", in order",
        in_order: true,
        ..USUAL
    },
    Scenario {
        name: ", 1500 bytes",
        frame: 1500,
        ..USUAL
    },
    Scenario {
        name: ", 1500 bytes in two buffers",
        mergeable: true,
        frame: 1500,
        buffer: 1024,
        ..USUAL
    },
    Scenario {
        name: ", 1500 bytes sent in three pieces",
        frame: 1500,
        pieces: 3,
        ..USUAL
    },
    Scenario {
        name: ", flooded to seven ports",
        ports: 8,
        flood: true,
        ..USUAL
    },
    Scenario {
        name: ALIKE[0],
        ports: 4,
        ..USUAL
    },
    Scenario {
        name: ALIKE[1],
        ports: 4,
        threads: 2,
        ..USUAL
    },
    Scenario {
        name: ", alone from each of 32 ports, after a sleep",
        ports: 33,
        gather: true,
        ..USUAL
    },
    Scenario {
        name: ", captured",
        captured: true,
        ..USUAL
    },
];

/// All of them with split rings, then with packed ones.
fn scenario(index: usize) -> Option<Scenario> {
    let packed = index >= SCENARIOS.len();
    let scenario = SCENARIOS.get(index % SCENARIOS.len())?;
    (index < 2 * SCENARIOS.len()).then_some(Scenario {
        packed,
        ..*scenario
    })
}

/// A guest's memory: two rings, then a buffer of 2 KiB for each entry of each.
struct Guest {
    memory: SharedMemory,
    map: Arc<GuestMemory>,
    layout: RingLayout,
    features: RingFeatures,
}

impl Guest {
    fn new(scenario: &Scenario) -> Self {
        let features = RingFeatures {
            packed: scenario.packed,
            mergeable: scenario.mergeable,
            event_idx: scenario.event_idx,
            in_order: scenario.in_order,
            version_1: true,
            ..RingFeatures::default()
        };
        let layout = RingLayout::new(RING, features.packed);
        let len = 4 << 20;
        let memory = SharedMemory::create(len, true).unwrap();
        let region = RegionSpec {
            guest_addr: 0,
            user_addr: 0,
            size: len as u64,
            offset: 0,
            file: memory.file().try_clone().unwrap(),
        };
        let map = GuestMemory::default().with_table(vec![region]).unwrap();
        Guest {
            memory,
            map: Arc::new(map),
            layout,
            features,
        }
    }

    fn ring_at(which: u64) -> u64 {
        which << 16
    }

    fn buffer_at(which: u64, number: u32) -> u64 {
        (1 << 20) * (1 + which) + u64::from(number % u32::from(RING)) * 2048
    }

    fn setup(&self, which: u64) -> RingSetup {
        let pin = |at: usize, len: usize| {
            let at = Guest::ring_at(which) + at as u64;
            self.map.pinned_guest(at, len as u64).unwrap()
        };
        RingSetup {
            size: RING,
            descriptors: pin(0, self.layout.descriptors_len),
            available: pin(self.layout.available, self.layout.available_len),
            used: pin(self.layout.used, self.layout.used_len),
            features: self.features,
            base: if self.features.packed { 0x8000 } else { 0 },
            memory: Arc::clone(&self.map),
            redo: None,
        }
    }

    fn driver(&self, which: u64) -> DriverRing<'_> {
        let at = Guest::ring_at(which) as usize;
        let window = self.memory.window(at, self.layout.len).unwrap();
        let areas = RingAreas::zeroed(window, &self.layout).unwrap();
        let mut ring = DriverRing::new(areas, self.features);
        ring.suppress_calls();
        ring
    }

    /// A port with this guest attached.
    fn port(&self, slot: u16) -> PortEntry {
        let spec = PortSpec {
            name: format!("p{slot}"),
            socket: PathBuf::from("/none"),
            mode: SocketMode::default(),
            queues: 1,
            ..PortSpec::default()
        };
        let generation = 1;
        let shared = PortShared::new(spec, PortRef { slot, generation }).unwrap();
        let kick = rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let kick = KickFd::new(kick.into()).unwrap();
        let pair = QueuePair {
            transmit: Some(Transmit {
                queue: Arc::new(TransmitQueue::start(&self.setup(TRANSMIT)).unwrap()),
                kick: Some(Arc::new(kick)),
                call: None,
                enabled: true,
            }),
            receive: Some(Receive {
                queue: Arc::new(ReceiveQueue::start(&self.setup(RECEIVE)).unwrap()),
                call: None,
                enabled: true,
            }),
        };
        let device = Device {
            memory: Arc::clone(&self.map),
            features: 0,
            numa_node: None,
            pairs: vec![pair],
        };
        PortEntry {
            shared,
            device: Some(Arc::new(device)),
        }
    }
}

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;

/// Runs `rounds` rounds; returns the frames that arrived.
fn run(scenario: &Scenario, rounds: u32) -> u64 {
    let guests: Vec<_> = (0..scenario.ports).map(|_| Guest::new(scenario)).collect();
    let mut drivers: Vec<_> = guests
        .iter()
        .map(|guest| [guest.driver(RECEIVE), guest.driver(TRANSMIT)])
        .collect();
    let entries: Vec<_> = (0..).zip(&guests).map(|(n, guest)| guest.port(n)).collect();
    let fdb = Arc::new(Fdb::new(FdbConfig::with_capacity(1024)).unwrap());
    let mac = |n: u16| [2, 0, 0, 0, 0, n as u8];
    if scenario.ports > 2 && !scenario.flood {
        // Or the first frames would be flooded, and come where nobody expects them.
        for (n, entry) in (0..).zip(&entries) {
            let at = entry.shared.reference;
            fdb.insert_static(0, Mac::from_bytes(mac(n)), at).unwrap();
        }
    }
    let since = vec![Instant::now(); scenario.threads].into();
    let topology = Topology::build(&entries, since, fdb, |port, _| {
        Some(usize::from(port.reference.slot) % scenario.threads)
    });
    let capture = ObserverSpec {
        kind: Kind::Capture,
        ports: None,
        direction: ObserveDirection::Both,
        snaplen: MAX_SNAPLEN,
        filter: Filter::default(),
    };
    let (observer, mut records) = Observer::with_reader(capture, 0..scenario.threads);
    let observers = [observer];
    let topology = topology.with_observers(&observers[..usize::from(scenario.captured)]);
    let mut bytes = Vec::new();
    let (_publisher, readers) = snapshots(topology, scenario.threads);
    let poller = |reader| {
        let idle = IdlePolicy::Adaptive(Duration::ZERO);
        let shared = Arc::new(PollShared::new(idle).unwrap());
        Poller::new(shared, reader, Instant::now()).unwrap()
    };
    let mut pollers: Vec<Poller> = readers.into_iter().map(poller).collect();
    for (n, guest) in (0..).zip(&guests) {
        let to = match scenario {
            Scenario { flood: true, .. } => [255; 6],
            Scenario { gather: true, .. } => mac(0),
            _ => mac(n ^ 1),
        };
        for number in 0..u32::from(RING) {
            let at = Guest::buffer_at(TRANSMIT, number) as usize + HEADER as usize;
            let window = guest.memory.window(at, 14).unwrap();
            window.write_bytes(0, &[&to[..], &mac(n), &[8, 0]].concat());
        }
    }
    let (mut sent, mut arrived) = (0_u32, 0_u64);
    for _ in 0..rounds {
        for (n, [receive, transmit]) in drivers.iter_mut().enumerate() {
            for number in 0.. {
                let buffer = Buffer::writable(Guest::buffer_at(RECEIVE, number), scenario.buffer);
                if !receive.post_one(buffer, number) {
                    break;
                }
            }
            receive.publish();
            if n > 0 && scenario.flood || n == 0 && scenario.gather {
                continue;
            }
            let frames = frames(scenario);
            for number in sent..sent + frames {
                let at = Guest::buffer_at(TRANSMIT, number);
                let whole = [Buffer::readable(at, HEADER + scenario.frame)];
                let (head, rest) = (HEADER + 60, scenario.frame - 60);
                let pieces = [
                    Buffer::readable(at, HEADER),
                    Buffer::readable(at + u64::from(HEADER), 60),
                    Buffer::readable(at + u64::from(head), rest),
                ];
                let chain = if scenario.pieces == 1 {
                    &whole[..]
                } else {
                    &pieces
                };
                assert!(
                    transmit.post(chain, number),
                    "the switch returned too little"
                );
            }
            transmit.publish();
        }
        sent += frames(scenario);
        pollers.iter_mut().for_each(Poller::drain);
        while records.next(&mut bytes).is_some() {}
        for [receive, transmit] in &mut drivers {
            let mut bytes = 0;
            while let Some(used) = receive.reap() {
                bytes += u64::from(used.len);
            }
            arrived += bytes / u64::from(HEADER + scenario.frame);
            while transmit.reap().is_some() {}
        }
    }
    let seen = 2 * arrived * u64::from(scenario.captured);
    let counts = observers[0].counts();
    assert_eq!((counts.captured, counts.missed), (seen, 0), "not captured");
    let senders = match scenario {
        Scenario { flood: true, .. } => 1,
        Scenario { gather: true, .. } => u64::from(scenario.ports) - 1,
        _ => u64::from(scenario.ports),
    };
    let copies = if scenario.flood {
        u64::from(scenario.ports) - 1
    } else {
        1
    };
    assert_eq!(
        arrived,
        u64::from(rounds * frames(scenario)) * senders * copies,
        "frames were lost"
    );
    u64::from(rounds * frames(scenario)) * senders
}

/// Frames of one sender in one round: a full ring of receive buffers takes them all.
fn frames(scenario: &Scenario) -> u32 {
    if scenario.gather {
        return 1;
    }
    let buffers = (HEADER + scenario.frame).div_ceil(scenario.buffer);
    BATCH / buffers.max(scenario.pieces)
}

/// What valgrind runs.
#[test]
#[ignore = "runs inside valgrind"]
fn counted() {
    let var = |name| std::env::var(name).unwrap();
    let index: usize = var("POLLUX_SCENARIO").parse().unwrap();
    println!(
        "frames {}",
        run(
            &scenario(index).unwrap(),
            var("POLLUX_ROUNDS").parse().unwrap()
        )
    );
}

/// Instructions and atomic operations of `rounds` rounds, and the frames.
fn count(index: usize, rounds: u32, dir: &Path) -> [u64; 3] {
    let out = dir.join(format!("callgrind.{index}.{rounds}"));
    let result = Command::new("valgrind")
        .args([
            "--tool=callgrind",
            "--collect-bus=yes",
            "--collect-atstart=no",
        ])
        .args(["--toggle-collect=*Poller*drain*", "--compress-strings=no"])
        .args(["--compress-pos=no", "--dump-line=no"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "counted", "--nocapture"])
        .env("POLLUX_SCENARIO", index.to_string())
        .env("POLLUX_ROUNDS", rounds.to_string())
        .output()
        .expect("valgrind runs; Debian's package is called valgrind");
    let text = String::from_utf8_lossy(&result.stdout);
    assert!(
        result.status.success(),
        "{text}\n{}",
        String::from_utf8_lossy(&result.stderr)
    );
    let frames = text
        .lines()
        .find_map(|line| line.strip_prefix("frames "))
        .unwrap();
    let [instructions, atomics] = own_costs(&std::fs::read_to_string(out).unwrap());
    [instructions, atomics, frames.parse().unwrap()]
}

/// Adds up what functions of this program cost themselves, in callgrind's format: `ob=` names the
/// object of the lines that follow, and the line behind `calls=` is what the callee cost.
fn own_costs(text: &str) -> [u64; 2] {
    let own = std::env::current_exe().unwrap();
    let own = own.file_name().unwrap().to_str().unwrap();
    let (mut counted, mut callee) = (false, false);
    let mut sums = [0; 2];
    for line in text.lines() {
        if let Some(object) = line.strip_prefix("ob=") {
            counted = object.ends_with(own);
        } else if line.starts_with("calls=") {
            callee = true;
        } else if line.starts_with(|first: char| first.is_ascii_digit()) {
            let mut words = line
                .split(' ')
                .skip(1)
                .map(|word| word.parse::<u64>().unwrap());
            if counted && !callee {
                for sum in &mut sums {
                    *sum += words.next().unwrap_or(0);
                }
            }
            callee = false;
        }
    }
    sums
}

#[test]
#[cfg_attr(debug_assertions, ignore = "counts are of the release profile")]
fn instructions_per_frame_are_as_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/instructions.txt");
    let recorded = recorded(&path);
    let compiler = compiler();
    let mut text = format!(
        "# Per frame: instructions, atomic operations, what. POLLUX_BLESS=1 renews this.\n{COMPILER}{compiler}\n"
    );
    let mut wrong = String::new();
    let mut alike = Vec::new();
    for (index, scenario) in (0..).map_while(|index| Some((index, scenario(index)?))) {
        // The difference of two runs is free of what a start costs.
        let [few, many] = [4, 12].map(|rounds| count(index, rounds, dir.path()));
        let frames = (many[2] - few[2]) as f64;
        let [instructions, atomics] = [0, 1].map(|what| (many[what] - few[what]) as f64 / frames);
        if ALIKE.contains(&scenario.name) {
            alike.push([instructions, atomics]);
        }
        let kind = if scenario.packed { "packed" } else { "split" };
        let name = format!("{kind}{}", scenario.name);
        // Few atomic operations: with fewer digits the rounding alone would be beyond the
        // tolerance.
        writeln!(text, "{instructions:8.1} {atomics:8.4}  {name}").unwrap();
        let Some(before) = recorded.get(&name) else {
            writeln!(wrong, "{name}: not recorded").unwrap();
            continue;
        };
        for (what, is, was) in [
            ("instructions", instructions, before.0),
            ("atomic operations", atomics, before.1),
        ] {
            if (is - was).abs() > was * TOLERANCE {
                let change = 100.0 * (is / was - 1.0);
                writeln!(
                    wrong,
                    "{name}: {is:.4} {what} a frame, recorded {was:.4} ({change:+.1} %)"
                )
                .unwrap();
            }
        }
    }
    // A thread makes one barrier a pass for the calls of all its queues, so two threads make a few
    // more.
    let tolerances = [TOLERANCE, 0.08];
    for pair in alike.chunks(2) {
        for ((one, two), tolerance) in std::iter::zip(pair[0], pair[1]).zip(tolerances) {
            assert!(
                (two - one).abs() <= one * tolerance,
                "{ALIKE:?}: {one:.4} and {two:.4} a frame"
            );
        }
    }
    if std::env::var_os("POLLUX_BLESS").is_some() {
        std::fs::write(path, text).unwrap();
    } else {
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        let before = before.lines().find_map(|line| line.strip_prefix(COMPILER));
        let before = before.unwrap_or("an unknown compiler");
        assert!(
            wrong.is_empty(),
            "{wrong}\nrecorded with {before}, counted with {compiler}; all of them:\n{text}"
        );
    }
}

/// The compiler that cargo runs here: another one makes other code.
fn compiler() -> String {
    let rustc = std::env::var_os("RUSTC").unwrap_or("rustc".into());
    let output = Command::new(rustc).arg("--version").output();
    String::from_utf8_lossy(&output.unwrap().stdout)
        .trim()
        .to_string()
}

fn recorded(path: &Path) -> BTreeMap<String, (f64, f64)> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let (instructions, rest) = line.trim().split_once(' ')?;
            let (atomics, name) = rest.trim().split_once("  ")?;
            Some((
                name.to_string(),
                (instructions.parse().ok()?, atomics.parse().ok()?),
            ))
        })
        .collect()
}
