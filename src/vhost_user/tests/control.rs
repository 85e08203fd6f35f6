//! Controlqs, in the orders of frontends that hand them over and of one that does not.

use super::*;
use crate::memory::SharedMemory;
use crate::virtio::RingFeatures;
use crate::virtio::driver::{Buffer, DriverRing, RingAreas};

const MQ: u64 = 1 << 22;
const OK: Option<(u32, u8)> = Some((1, 0));
const ERR: Option<(u32, u8)> = Some((1, 1));
/// Where a ring's buffers are, from its start.
const BUFFERS: u64 = 0xc000;
const LIMIT: Duration = Duration::from_secs(20);

/// A guest and its frontend.
struct Vm {
    peer: Peer,
    memory: SharedMemory,
    kicks: Vec<EventFd>,
    packed: bool,
    features: u64,
}

impl Vm {
    /// Whatever is offered is acknowledged.
    fn new(pairs: u16, packed: bool) -> Self {
        Vm::with(pairs, packed, u64::MAX)
    }

    fn with(pairs: u16, packed: bool, acknowledged: u64) -> Self {
        let mut peer = Peer::with(SessionOptions::new(pairs));
        let features = peer.negotiate_kind(packed) & acknowledged;
        peer.frontend.set_features(features).unwrap();
        let all = peer.region(0, 0, 2 * SIZE);
        peer.frontend.set_mem_table(&[all]).unwrap();
        Vm {
            memory: SharedMemory::of(peer.memory.try_clone().unwrap(), 2 * SIZE as usize).unwrap(),
            kicks: (0..20).map(|_| EventFd::new(0).unwrap()).collect(),
            peer,
            packed,
            features,
        }
    }

    /// A driver's new ring, as clear as it makes it.
    fn ring(&self, index: usize) -> DriverRing<'_> {
        let at = index * RING as usize;
        let area = |offset: u64| self.memory.window(at + offset as usize, 0x4000).unwrap();
        let areas = RingAreas {
            size: ENTRIES,
            descriptors: area(0),
            available: area(AVAILABLE),
            used: area(USED),
        };
        for area in [areas.descriptors, areas.available, areas.used] {
            area.write_bytes(0, &[0; 0x4000]);
        }
        let features = RingFeatures {
            packed: self.packed,
            event_idx: self.features & 1 << 29 != 0,
            indirect: true,
            in_order: true,
            version_1: true,
            mergeable: true,
            notify_on_empty: false,
        };
        DriverRing::new(areas, features)
    }

    fn num(&self, ring: usize) {
        self.peer.frontend.set_vring_num(ring, ENTRIES).unwrap();
    }

    fn place(&self, ring: usize) {
        let at = Peer::addresses(ring);
        self.peer.frontend.set_vring_addr(ring, &at).unwrap();
        let base = base_at(self.packed, 0);
        let request = FrontendReq::SET_VRING_BASE;
        self.peer.send_ring(request, NEED_REPLY, ring as u32, base);
        assert_eq!(self.peer.reply(), Some(0));
    }

    fn descriptors(&self, ring: usize) {
        let call = &self.peer.calls[ring % 16];
        self.peer.frontend.set_vring_call(ring, call).unwrap();
        let kick = &self.kicks[ring];
        self.peer.frontend.set_vring_kick(ring, kick).unwrap();
    }

    /// crosvm: one ring after the other, each enabled at once, the controlq last.
    fn crosvm(&mut self, rings: usize) {
        for ring in 0..rings {
            self.num(ring);
            self.place(ring);
            self.descriptors(ring);
            self.peer.frontend.set_vring_enable(ring, true).unwrap();
        }
    }

    /// cloud-hypervisor: all sizes, then each ring, then all are enabled; no controlq.
    fn cloud_hypervisor(&mut self, rings: usize) {
        (0..rings).for_each(|ring| self.num(ring));
        for ring in 0..rings {
            self.place(ring);
            self.descriptors(ring);
        }
        for ring in 0..rings {
            self.peer.frontend.set_vring_enable(ring, true).unwrap();
        }
    }

    /// The pairs that get frames.
    fn in_use(&self) -> Vec<usize> {
        let device = self.peer.device().unwrap();
        let gets = |pair: &QueuePair| pair.receive.as_ref().is_some_and(|ring| ring.enabled);
        let pairs = device.pairs.iter().enumerate();
        pairs
            .filter(|(_, pair)| gets(pair))
            .map(|(n, _)| n)
            .collect()
    }

    /// Posts chains to the controlq: what they ask, and bytes of room for the answer.
    fn post(&self, ring: &mut DriverRing<'_>, index: usize, asked: &[&[u8]], room: u32) {
        let mut at = index as u64 * RING + BUFFERS;
        let mut buffers = Vec::new();
        for bytes in asked {
            let window = self.memory.window(at as usize, bytes.len()).unwrap();
            window.write_bytes(0, bytes);
            buffers.push(Buffer::readable(at, bytes.len() as u32));
            at += bytes.len() as u64;
        }
        if room > 0 {
            let room_at = index as u64 * RING + 0xffff;
            let window = self.memory.window(room_at as usize, 1).unwrap();
            window.write_bytes(0, &[0xff]);
            buffers.push(Buffer::writable(room_at, room));
        }
        assert!(ring.post(&buffers, 7));
        ring.publish();
        if ring.needs_kick() {
            self.kicks[index].write(1).unwrap();
        }
    }

    /// The length of the next chain that came back, and the answer in it.
    fn answer(&self, ring: &mut DriverRing<'_>, index: usize) -> Option<(u32, u8)> {
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            if let Some(used) = ring.reap() {
                let mut answer = [0];
                let at = index * RING as usize + 0xffff;
                self.memory
                    .window(at, 1)
                    .unwrap()
                    .read_bytes(0, &mut answer);
                return Some((used.len, answer[0]));
            }
            std::thread::yield_now();
        }
        None
    }

    /// A command as Linux sends it: class and kind, then its data, then room.
    fn command(&self, ring: &mut DriverRing<'_>, index: usize, bytes: &[u8]) -> Option<(u32, u8)> {
        let (head, data) = bytes.split_at(2);
        self.post(ring, index, &[head, data], 1);
        self.answer(ring, index)
    }
}

#[test]
fn commands_are_answered_in_the_order_of_crosvm() {
    for (pairs, packed) in [1, 2, 7].into_iter().flat_map(|n| [(n, false), (n, true)]) {
        let mut vm = Vm::new(pairs, packed);
        let pairs = usize::from(pairs);
        let controlq = 2 * pairs;
        vm.crosvm(controlq + 1);
        let vm = vm;
        let mut ring = vm.ring(controlq);
        // The first pair alone, until the driver says otherwise; and without MQ it is alone anyway.
        assert_eq!(vm.command(&mut ring, controlq, &[0, 0, 1]), OK);
        assert_eq!(vm.in_use(), [0]);
        assert!((0..pairs).all(|pair| vm.peer.started(2 * pair) && vm.peer.started(2 * pair + 1)));
        assert_eq!(vm.peer.status.snapshot().state, "running");
        if pairs > 1 {
            for wanted in (1..=pairs).rev() {
                let command = [4, 0, wanted as u8, 0];
                assert_eq!(vm.command(&mut ring, controlq, &command), OK);
                assert_eq!(vm.in_use(), (0..wanted).collect::<Vec<_>>());
            }
            assert_eq!(vm.command(&mut ring, controlq, &[4, 0, 2, 0]), OK);
        }
        for wrong in [&[4, 0, 0, 0][..], &[4, 0, 9, 0], &[9, 9, 9], &[0, 4, 1]] {
            assert_eq!(vm.command(&mut ring, controlq, wrong), ERR, "{wrong:?}");
        }
        for right in [&[1, 1, 2, 0, 0, 0, 0, 1][..], &[2, 0, 5, 0], &[0, 1, 0]] {
            assert_eq!(vm.command(&mut ring, controlq, right), OK, "{right:?}");
        }
        assert!(vm.peer.said("controlq started"));
        // The driver is called, where it waits for that.
        assert!(vm.peer.calls[controlq].read().is_ok());
        drop(ring);
        vm.peer.leave();
    }
}

/// The ring of number 16 lies where the third region's would.
#[test]
fn eight_pairs_are_commanded_by_the_seventeenth_ring() {
    let mut vm = Vm::new(8, false);
    vm.crosvm(17);
    let mut ring = vm.ring(16);
    for pairs in [8, 3, 1] {
        assert_eq!(vm.command(&mut ring, 16, &[4, 0, pairs, 0]), OK);
        assert_eq!(vm.in_use().len(), usize::from(pairs));
    }
    assert_eq!(vm.command(&mut ring, 16, &[4, 0, 9, 0]), ERR);
    drop(ring);
    vm.peer.leave();
}

/// crosvm has no configuration to tell its guest how many pairs there are: Linux uses one, and the
/// third ring.
#[test]
fn a_guest_that_knows_of_one_pair_commands_by_the_third_ring() {
    let mut vm = Vm::new(8, false);
    assert_ne!(vm.features & MQ, 0);
    vm.crosvm(3);
    let mut ring = vm.ring(2);
    assert_eq!(vm.command(&mut ring, 2, &[4, 0, 1, 0]), OK);
    assert_eq!(vm.command(&mut ring, 2, &[4, 0, 2, 0]), ERR);
    assert_eq!(vm.in_use(), [0]);
    assert_eq!(vm.peer.status.snapshot().state, "running");
    drop(ring);
    vm.peer.leave();
}

#[test]
fn no_ring_of_cloud_hypervisor_is_a_controlq() {
    for pairs in [1, 2, 8] {
        let mut vm = Vm::new(pairs, false);
        vm.cloud_hypervisor(2 * usize::from(pairs));
        assert_eq!(vm.in_use(), (0..pairs.into()).collect::<Vec<_>>());
        assert!((0..2 * usize::from(pairs)).all(|ring| vm.peer.started(ring)));
        assert!(!vm.peer.said("controlq"));
        vm.peer.leave();
    }
}

/// Between a receiveq and its transmitq nobody knows that it is none.
#[test]
fn buffers_to_receive_into_are_no_commands() {
    for packed in [false, true] {
        let mut vm = Vm::new(2, packed);
        vm.crosvm(2);
        {
            let mut ring = vm.ring(2);
            vm.post(&mut ring, 2, &[], 1);
        }
        for ring in 2..4 {
            vm.num(ring);
            vm.place(ring);
            vm.descriptors(ring);
            vm.kicks[ring].write(1).unwrap();
            // Whatever the kick brings is done before the answer to what comes behind it.
            let deadline = Instant::now() + LIMIT;
            while ring == 2 && !vm.peer.status.snapshot().rings[2].ring.is_controlq {
                assert!(Instant::now() < deadline);
            }
            vm.peer.frontend.set_vring_enable(ring, true).unwrap();
        }
        assert!(vm.peer.started(2) && vm.peer.started(3));
        assert_eq!(vm.in_use(), [0, 1]);
        let queue = vm.peer.pair(1).receive.unwrap().queue;
        assert_eq!(queue.base(), base_at(packed, 0), "nothing was returned");
        drop(queue);
        vm.peer.leave();
    }
}

#[test]
fn what_is_no_command_is_returned_without_an_answer() {
    for packed in [false, true] {
        let mut vm = Vm::new(1, packed);
        vm.crosvm(3);
        let mut ring = vm.ring(2);
        let outside = |ring: &mut DriverRing<'_>| {
            let buffers = [Buffer::readable(1 << 40, 2), Buffer::writable(0xffff, 1)];
            assert!(ring.post(&buffers, 7));
            ring.publish();
            vm.kicks[2].write(1).unwrap();
        };
        for _ in 0..3 {
            // No room, nothing in memory, nothing asked; and what comes behind them is answered.
            vm.post(&mut ring, 2, &[&[0, 0], &[1]], 0);
            assert_eq!(vm.answer(&mut ring, 2).unwrap().0, 0);
            outside(&mut ring);
            assert_eq!(vm.answer(&mut ring, 2).unwrap().0, 0);
            vm.post(&mut ring, 2, &[], 1);
            assert_eq!(vm.answer(&mut ring, 2), ERR);
            // Longer than any command, and in more pieces.
            let long = [&[1, 0][..], &[0xff; 0x3000]].concat();
            vm.post(&mut ring, 2, &[&long], 1);
            assert_eq!(vm.answer(&mut ring, 2), ERR);
            vm.post(&mut ring, 2, &[&[0_u8][..]; 100], 1);
            assert_eq!(vm.answer(&mut ring, 2).unwrap().0, 0);
            // In three pieces of one byte.
            vm.post(&mut ring, 2, &[&[0], &[0], &[1]], 1);
            assert_eq!(vm.answer(&mut ring, 2), OK);
        }
        assert!(vm.peer.status.snapshot().working);
        drop(ring);
        vm.peer.leave();
    }
}

#[test]
fn a_broken_controlq_ends_its_own_service_alone() {
    let mut vm = Vm::new(1, false);
    vm.crosvm(3);
    let mut ring = vm.ring(2);
    assert_eq!(vm.command(&mut ring, 2, &[0, 0, 1]), OK);
    vm.peer.poke(2, AVAILABLE + 2, 0x7000);
    vm.kicks[2].write(1).unwrap();
    let deadline = Instant::now() + LIMIT;
    let broken = |vm: &Vm| vm.peer.status.snapshot().rings[2].broken.is_some();
    while !broken(&vm) {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    let snapshot = vm.peer.status.snapshot();
    assert!(snapshot.working && snapshot.state.starts_with("ring broken: controlq"));
    assert!(vm.peer.started(0) && vm.peer.started(1));
    // Until its next start.
    drop(ring);
    vm.peer.frontend.get_vring_base(2).unwrap();
    let mut ring = vm.ring(2);
    vm.place(2);
    vm.descriptors(2);
    assert_eq!(vm.command(&mut ring, 2, &[0, 0, 1]), OK);
    drop(ring);
    vm.peer.leave();
}

#[test]
fn a_driver_that_comes_anew_starts_with_one_pair() {
    let mut vm = Vm::new(4, false);
    vm.crosvm(9);
    let mut ring = vm.ring(8);
    assert_eq!(vm.command(&mut ring, 8, &[4, 0, 3, 0]), OK);
    // Memory that comes changes nothing.
    let more = [
        vm.peer.region(0, 0, 2 * SIZE),
        vm.peer.region(8 * SIZE, 0, SIZE),
    ];
    vm.peer.frontend.set_mem_table(&more).unwrap();
    assert_eq!(vm.in_use(), [0, 1, 2]);
    assert_eq!(vm.command(&mut ring, 8, &[0, 0, 1]), OK);
    assert_eq!(vm.in_use(), [0, 1, 2]);
    drop(ring);
    for ring in 0..9 {
        vm.peer.frontend.set_vring_enable(ring, false).unwrap();
        vm.peer.frontend.get_vring_base(ring).unwrap();
        drop(vm.ring(ring));
    }
    // A command that waits since before is answered, too.
    let mut ring = vm.ring(8);
    vm.post(&mut ring, 8, &[&[0, 0], &[1]], 1);
    drop(ring);
    vm.crosvm(9);
    let deadline = Instant::now() + LIMIT;
    while vm
        .memory
        .window(8 * RING as usize + 0xffff, 1)
        .is_some_and(|window| {
            let mut answer = [0];
            window.read_bytes(0, &mut answer);
            answer[0] == 0xff
        })
    {
        assert!(Instant::now() < deadline);
    }
    assert_eq!(vm.in_use(), [0]);
    vm.peer.leave();
}

/// Neither kicks nor commands without end keep the frontend waiting.
#[test]
fn a_flood_of_commands_leaves_its_session_room() {
    let mut vm = Vm::new(1, false);
    vm.crosvm(3);
    let kick = vm.kicks[2].try_clone().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let flood = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            while !stop.load(Ordering::Relaxed) {
                let _ = kick.write(1);
            }
        }
    });
    let mut ring = vm.ring(2);
    for turn in 0..200 {
        // As many commands as the ring holds, all at once.
        let mut posted = 0;
        while ring.free() >= 3 {
            vm.post(&mut ring, 2, &[&[0, 0], &[1]], 1);
            posted += 1;
        }
        if turn % 10 == 0 {
            assert!(vm.peer.frontend.get_features().is_ok());
        }
        if turn < 10 {
            for _ in 0..posted {
                let (written, _) = vm.answer(&mut ring, 2).unwrap();
                assert_eq!(written, 1);
            }
        } else {
            while ring.reap().is_some() {}
        }
    }
    stop.store(true, Ordering::Relaxed);
    flood.join().unwrap();
    drop(ring);
    vm.peer.leave();
}
