//! Passes one at a time, between scripted guests in this process: what happens when is the test's choice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use super::egress::Tools;
use super::pass::Pass;
use crate::frame::MAX_FRAME;
use crate::memory::{GuestMemory, RegionSpec, SharedMemory, Window};
use crate::port::{Device, PortShared, QueuePair, Receive, Transmit};
use crate::stats::{DropReason, ThreadStats};
use crate::switch::PortRef;
use crate::switch::fdb::{Fdb, FdbConfig};
use crate::sys::aio::Caller;
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
    fn new(ram: &'m SharedMemory, slot: u16, packed: bool) -> Self {
        let features = RingFeatures {
            packed,
            version_1: true,
            mergeable: true,
            ..RingFeatures::default()
        };
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

    /// Posts frames of `len` bytes to the guest on `to`, as long as there is room; returns how many.
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

    fn slot(&self) -> u16 {
        self.port.reference.slot
    }

    fn drops(&self, reason: DropReason) -> u64 {
        (0..2)
            .map(|thread| self.port.stats.thread(thread).drops(reason))
            .sum()
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
    let numbered = rams.iter().zip(0..);
    numbered
        .map(|(ram, slot)| Vm::new(ram, slot, packed))
        .collect()
}

fn receive_buffer(token: u32) -> Buffer {
    let address = BASE + (2 * RING + token as usize * BUFFER) as u64;
    Buffer::writable(address, BUFFER as u32)
}

/// The switch of these guests, each known by its address; the port in slot `n` belongs to the poll thread `owner(n)`.
fn topology(vms: &[Vm<'_>], threads: usize, owner: impl Fn(u16) -> usize) -> Topology {
    let fdb = Arc::new(Fdb::new(FdbConfig::with_capacity(1024)).unwrap());
    let entries: Vec<PortEntry> = vms
        .iter()
        .map(|vm| {
            let address = Mac::from_bytes(mac(vm.slot()));
            fdb.insert_static(0, address, vm.port.reference).unwrap();
            PortEntry {
                shared: vm.port.clone(),
                device: Some(vm.device.clone()),
            }
        })
        .collect();
    let since = vec![Instant::now(); threads].into();
    Topology::build(&entries, since, fdb, |port, _| {
        Some(owner(port.reference.slot))
    })
}

/// What poll threads bring along.
struct Threads {
    callers: Vec<Caller>,
    stats: Vec<ThreadStats>,
    clock: quanta::Clock,
}

impl Threads {
    fn new(count: usize) -> Self {
        Threads {
            callers: (0..count).map(|_| Caller::new().unwrap()).collect(),
            stats: (0..count).map(|_| ThreadStats::default()).collect(),
            clock: quanta::Clock::new(),
        }
    }

    fn passes<'t, 'p>(&'p mut self, topology: &'t Topology) -> Vec<Pass<'t, 'p>> {
        let (stats, clock) = (&self.stats, &self.clock);
        let callers = self.callers.iter_mut().enumerate();
        callers
            .map(|(thread, caller)| {
                let stats = &stats[thread];
                let tools = Tools {
                    caller,
                    stats,
                    clock,
                };
                Pass::new(topology, thread, tools)
            })
            .collect()
    }
}

// ---- shares ------------------------------------------------------------------------------------------

const FLOODER: usize = 0;
const PACED: usize = 1;
const RECEIVER: usize = 2;

/// A flooder, and a sender of 1 % of what the receiver takes.
fn flood_beside_paced(packed: bool, threads: usize, returned_at_once: usize) {
    let rams = rams::<3>();
    let mut vms = vms(&rams, packed);
    let topology = topology(&vms, threads, |slot| usize::from(slot) % threads);
    let mut tools = Threads::new(threads);
    let mut passes = tools.passes(&topology);
    // The receiver takes 8 frames a step, the flooder offers eight times as many.
    let (mut paced, mut taken) = (0, 0);
    for step in 0..20_000 {
        vms[FLOODER].send(2, 60, 64);
        if step > 100 && step % 12 == 0 {
            paced += vms[PACED].send(2, 60, 1) as u64;
        }
        // Neither thread always goes first.
        let count = passes.len();
        for turn in 0..count {
            passes[(turn + step / 7) % count].run(0, || true);
        }
        if step % (returned_at_once / 8) == 0 {
            taken += vms[RECEIVER].take(returned_at_once);
            vms[RECEIVER].give_back();
        }
    }
    let came = vms[RECEIVER].from[PACED];
    assert!(
        (paced - came) * 100 < paced,
        "{came} of {paced} paced frames came"
    );
    // Nothing of the receiver's capacity is lost.
    assert!(taken as f64 > 0.97 * 20_000.0 * 8.0, "{taken} frames taken");
    let full = vms[RECEIVER].drops(DropReason::EgressRingFull);
    assert!(full > 20_000 * 50, "{full} frames found the ring full");
    assert_eq!(vms[RECEIVER].drops(DropReason::EgressContended), 0);
}

#[test]
fn a_flooder_leaves_a_paced_sender_its_share_on_one_thread() {
    for packed in [false, true] {
        flood_beside_paced(packed, 1, 8);
        flood_beside_paced(packed, 1, 128);
    }
}

#[test]
fn a_flooder_leaves_a_paced_sender_its_share_on_two_threads() {
    for packed in [false, true] {
        flood_beside_paced(packed, 2, 8);
        flood_beside_paced(packed, 2, 128);
    }
}

#[test]
fn a_ring_behind_an_open_claim_is_not_taken_for_one_that_stands_still() {
    let rams = rams::<1>();
    let vms = vms(&rams, true);
    let queue = vms[0].queue();
    let mut claim = Claim::new();
    queue.claim(std::iter::once(60), &mut claim).unwrap();
    let begun = Instant::now();
    while begun.elapsed().as_millis() < 300 {
        queue.refused();
    }
    assert_eq!(queue.kept(), 32);
    queue.commit(&claim);
    while queue.kept() == 32 {
        queue.refused();
        assert!(begun.elapsed().as_secs() < 20, "it never stands still");
    }
}

#[test]
fn a_ring_that_was_never_full_is_filled_to_the_last_buffer() {
    let rams = rams::<2>();
    let mut vms = vms(&rams, false);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    for _ in 0..10 {
        assert_eq!(vms[0].send(1, 60, ALL), ALL);
        for _ in 0..4 {
            passes[0].run(0, || true);
        }
        assert_eq!(vms[1].take(usize::MAX), ALL);
        vms[1].give_back();
    }
    assert_eq!(vms[1].drops(DropReason::EgressRingFull), 0);
}

#[test]
fn a_sender_alone_goes_on_when_its_receiver_posts_fewer_buffers_than_before() {
    let rams = rams::<2>();
    let mut vms = vms(&rams, false);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    vms[0].send(1, 60, ALL);
    for _ in 0..5 {
        passes[0].run(0, || true);
    }
    vms[0].send(1, 60, 64);
    passes[0].run(0, || true);
    assert!(vms[1].drops(DropReason::EgressRingFull) > 0);
    // Twenty buffers from now on, fewer than the eighth that is kept.
    vms[1].take(20);
    let mut rest = vms[1].kept.clone();
    let begun = Instant::now();
    let mut came = 0;
    while came < 1000 {
        assert!(begun.elapsed().as_secs() < 20, "only {came} frames came");
        vms[1].kept = std::mem::take(&mut rest);
        vms[1].give_back();
        vms[0].send(1, 60, 64);
        passes[0].run(0, || true);
        came += vms[1].take(20);
        rest = std::mem::take(&mut vms[1].kept);
        rest.truncate(20);
    }
}

// ---- budgets -----------------------------------------------------------------------------------------

#[test]
fn the_largest_chains_do_not_delay_small_frames_by_more_than_one_of_them() {
    let rams = rams::<4>();
    let mut vms = vms(&rams, false);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    assert_eq!(vms[0].send(1, MAX_FRAME, 64), 64);
    for turn in 1..=3 {
        vms[2].send(3, 60, 1);
        passes[0].run(0, || true);
        assert_eq!(vms[3].take(8), 1, "the small frame of pass {turn}");
        let done = std::iter::from_fn(|| vms[0].transmit.reap()).count();
        assert_eq!(done, 1, "large frames of pass {turn}");
    }
    // Small frames are limited by their number.
    vms[2].send(3, 60, 200);
    passes[0].run(0, || true);
    let taken = vms[3].take(usize::MAX);
    assert!(
        (1..=64).contains(&taken),
        "{taken} small frames in one pass"
    );
}

// ---- full receivers ----------------------------------------------------------------------------------

#[test]
fn a_receiver_that_returns_nothing_does_not_take_the_places_of_another_one() {
    let rams = rams::<4>();
    let mut vms = vms(&rams, false);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    // Both are full; for one of them frames were dropped. Twelve passes: the next one begins with the first guest.
    for (to, bursts) in [(1, 8), (2, 4)] {
        for _ in 0..bursts {
            vms[0].send(to, 60, 64);
            passes[0].run(0, || true);
        }
    }
    assert_eq!(vms[2].drops(DropReason::EgressRingFull), 0);
    // The other one returns buffers just after its frame found none, and before the pass ends.
    assert_eq!(vms[0].send(1, 60, 64), 64);
    assert_eq!(vms[3].send(2, 60, 1) + vms[3].send(1, 60, 63), 64);
    let receiver = std::cell::RefCell::new(&mut vms[2]);
    let bursts = std::cell::Cell::new(0);
    passes[0].run(0, || {
        bursts.set(bursts.get() + 1);
        if bursts.get() == 2 {
            let mut vm = receiver.borrow_mut();
            assert_eq!(vm.take(1), 1);
            vm.give_back();
        }
        true
    });
    assert_eq!(bursts.get(), 2);
    // Its frame was held, and found the buffer.
    assert_eq!(vms[2].drops(DropReason::EgressRingFull), 0);
    assert_eq!(vms[2].take(usize::MAX), ALL);
}

// ---- outcomes ----------------------------------------------------------------------------------------

#[test]
fn every_outcome_has_a_counter_of_its_own() {
    let rams = rams::<4>();
    let mut vms = vms(&rams, false);
    // The third one was disabled, with its address still known.
    let mut device = Device {
        memory: vms[2].device.memory.clone(),
        features: 0,
        numa_node: None,
        pairs: vms[2].device.pairs.clone(),
    };
    device.pairs[0].receive.as_mut().unwrap().enabled = false;
    vms[2].device = Arc::new(device);
    let topology = topology(&vms, 1, |_| 0);
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    // A ring that says that 300 of its 256 entries are available.
    vms[3].available().store_u16(0, 300, Ordering::Release);
    for _ in 0..3 {
        for to in [1, 2, 3] {
            vms[0].send(to, 60, 100);
            for _ in 0..2 {
                passes[0].run(0, || true);
            }
        }
    }
    let seen = |vm: usize| {
        let reasons = DropReason::ALL.map(|reason| (reason, vms[vm].drops(reason)));
        reasons
            .into_iter()
            .filter(|(_, n)| *n > 0)
            .collect::<Vec<_>>()
    };
    assert_eq!(seen(1), [(DropReason::EgressRingFull, 300 - 256)]);
    assert_eq!(seen(2), [(DropReason::EgressNotReady, 300)]);
    assert_eq!(seen(3), [(DropReason::EgressRingBroken, 300)]);
    assert_eq!(seen(0), []);
    assert!(vms[3].queue().broken().is_some());
    assert_eq!(vms[1].queue().broken(), None);
}

#[test]
fn a_sender_that_was_marked_before_the_thread_came_is_not_taken_from() {
    let rams = rams::<2>();
    let mut vms = vms(&rams, false);
    let topology = topology(&vms, 1, |_| 0);
    vms[0].device.memory.fault_mark().set();
    let mut tools = Threads::new(1);
    let mut passes = tools.passes(&topology);
    assert_eq!(vms[0].send(1, 60, 5), 5);
    passes[0].run(0, || true);
    vms[1].take(usize::MAX);
    assert_eq!((vms[1].from[0], vms[0].transmit.outstanding()), (0, 5));
}

/// A poll thread is about to claim, eight times, and each time another one has claimed and published before it does.
#[test]
fn a_claim_that_another_poll_thread_always_wins_is_counted_and_harms_nothing() {
    for packed in [false, true] {
        let rams = rams::<3>();
        let mut vms = vms(&rams, packed);
        let topology = topology(&vms, 2, |slot| usize::from(slot == 1));
        let mut tools = Threads::new(2);
        let mut passes = tools.passes(&topology);
        let (mut second, mut first) = (passes.pop().unwrap(), passes.pop().unwrap());
        let [loser, winner, receiver] = &mut vms[..] else {
            unreachable!("three guests")
        };
        let queue = receiver.device.pairs[0].receive.clone().unwrap().queue;
        let lost = Arc::new(AtomicU64::new(0));
        let (stop, mut before) = (AtomicBool::new(false), 0);
        std::thread::scope(|scope| {
            let stop = Stop(&stop);
            scope.spawn(|| {
                while !stop.0.load(Ordering::Relaxed) {
                    winner.send(2, 60, 8);
                    second.run(0, || true);
                    receiver.take(usize::MAX);
                    receiver.give_back();
                }
            });
            assert_eq!(loser.send(2, 60, 3), 3);
            before = park::tries().claims;
            park::set_rival(Some({
                let (queue, lost) = (queue.clone(), lost.clone());
                Box::new(move || {
                    // More than one claim can be open meanwhile: one was made since.
                    let (seen, begun) = (queue.published(), Instant::now());
                    while queue.published() < seen + 64 {
                        assert!(begun.elapsed().as_secs() < 20, "nobody else claims");
                        std::thread::yield_now();
                    }
                    lost.fetch_add(1, Ordering::Relaxed);
                })
            }));
            first.run(0, || true);
            park::set_rival(None);
        });
        // Four tries of a claim, and four at the end of the pass. One may have ended before it came to the swap: the other
        // thread had gone past it while it read.
        assert_eq!(park::tries().claims - before, 8);
        assert!((1..=8).contains(&lost.load(Ordering::Relaxed)));
        // Undisturbed, its frames arrive.
        assert_eq!(loser.send(2, 60, 5), 5);
        first.run(0, || true);
        receiver.take(usize::MAX);
        assert_eq!(receiver.drops(DropReason::EgressContended), 3);
        assert_eq!(receiver.from[0], 5);
        assert_eq!(queue.broken(), None);
        for reason in DropReason::ALL {
            let expected = if reason == DropReason::EgressContended {
                3
            } else {
                0
            };
            assert_eq!(receiver.drops(reason), expected, "{reason:?}");
        }
        // Its sender has all its buffers again.
        assert_eq!(std::iter::from_fn(|| loser.transmit.reap()).count(), 5);
        assert_eq!(loser.transmit.outstanding(), 0);
    }
}

/// Ends the other thread, also when an assertion fails.
struct Stop<'s>(&'s AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
