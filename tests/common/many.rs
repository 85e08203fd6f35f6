//! A scripted guest with many queue pairs, over split rings: it sends and receives on each of them,
//! one step at a time, and enables and disables them as a driver does whose number of queues is
//! changed.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use pollux::bench::frontend::{Frontend, MRG_RXBUF, Order, Queue, Region, VERSION_1};
use pollux::memory::SharedMemory;
use pollux::virtio::RingFeatures;
use pollux::virtio::driver::{Buffer, DriverRing, RingAreas, RingLayout};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const GUEST_BASE: u64 = 0x4000_0000;
/// VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_CTRL_RX and VIRTIO_NET_F_MQ.
const COMMANDS: u64 = 1 << 17 | 1 << 18 | 1 << 22;
/// Entries of each ring.
pub(crate) const ENTRIES: u16 = 64;
const RING_SPACE: usize = 4096;
const BUFFER: usize = 2048;
const HEADER: usize = 12;
/// For a backend's answer; generous, because tests share their CPUs.
const ANSWER: Duration = Duration::from_secs(10);

/// The memory of such a guest, and its notification descriptors; it outlives the guest.
#[derive(Debug)]
pub(crate) struct ManyRam {
    memory: SharedMemory,
    pairs: u16,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
}

/// Lets this process have as many descriptors as it may: it plays all guests, and each ring of
/// theirs has two.
fn raise_descriptor_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, raised).expect("a limit");
}

impl ManyRam {
    pub(crate) fn new(pairs: u16) -> ManyRam {
        raise_descriptor_limit();
        // The last one is for commands.
        let rings = 2 * usize::from(pairs) + 1;
        let len = rings * (RING_SPACE + usize::from(ENTRIES) * BUFFER);
        let event = |_| EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        ManyRam {
            memory: SharedMemory::create(len, true).expect("shared memory"),
            pairs,
            kicks: (0..rings).map(event).collect(),
            calls: (0..rings).map(event).collect(),
        }
    }

    fn areas(&self, ring: usize) -> RingAreas<'_> {
        let layout = RingLayout::new(ENTRIES, false);
        let window = self.memory.window(ring * RING_SPACE, layout.len);
        RingAreas::of(window.expect("in the memory"), &layout).expect("room for a ring")
    }

    fn buffer(&self, ring: usize, token: u32) -> usize {
        let rings = 2 * usize::from(self.pairs) + 1;
        rings * RING_SPACE + (ring * usize::from(ENTRIES) + token as usize) * BUFFER
    }
}

/// A guest with many queue pairs: ring 2n receives, ring 2n + 1 transmits.
#[derive(Debug)]
pub(crate) struct ManyQueues<'m> {
    ram: &'m ManyRam,
    rings: Vec<DriverRing<'m>>,
    free: Vec<VecDeque<u32>>,
    pub(crate) frontend: Frontend,
}

impl<'m> ManyQueues<'m> {
    /// Attaches to a port and starts and enables all of its queues.
    pub(crate) fn attach(ram: &'m ManyRam, socket: &Path) -> ManyQueues<'m> {
        ManyQueues::attach_as(ram, socket, Order::Qemu, 0, 2 * usize::from(ram.pairs))
    }

    /// The same, with a controlq behind them, ring after ring.
    pub(crate) fn attach_commanding(ram: &'m ManyRam, socket: &Path) -> ManyQueues<'m> {
        let rings = 2 * usize::from(ram.pairs) + 1;
        ManyQueues::attach_as(ram, socket, Order::CloudHypervisor, COMMANDS, rings)
    }

    fn attach_as(
        ram: &'m ManyRam,
        socket: &Path,
        order: Order,
        more: u64,
        rings: usize,
    ) -> ManyQueues<'m> {
        let features = RingFeatures {
            version_1: true,
            mergeable: true,
            ..RingFeatures::default()
        };
        let driver = |ring| {
            let mut ring = DriverRing::new(ram.areas(ring), features);
            ring.suppress_calls();
            ring
        };
        let mut frontend = Frontend::connect(socket, ANSWER).expect("a backend");
        let wanted = VERSION_1 | MRG_RXBUF | more;
        let agreed = frontend.negotiate(order, wanted, 0, u64::from(ram.pairs));
        assert_eq!(agreed.expect("features and queues") & wanted, wanted);
        let mut guest = ManyQueues {
            ram,
            rings: (0..rings).map(driver).collect(),
            free: vec![(0..u32::from(ENTRIES)).collect(); 2 * usize::from(ram.pairs)],
            frontend,
        };
        for pair in 0..ram.pairs {
            for token in 0..u32::from(ENTRIES) {
                guest.post_receive(pair, token);
            }
            guest.rings[2 * usize::from(pair)].publish();
        }
        let queues: Vec<Queue<'_>> = (0..rings).map(|ring| guest.queue(ring)).collect();
        let region = Region::whole(&ram.memory, GUEST_BASE);
        let started = guest.frontend.start(order, &[region], &queues);
        started.expect("all rings start");
        guest
    }

    /// Commands by the controlq; the answer, once there is one.
    pub(crate) fn command(&mut self, bytes: &[u8]) -> u8 {
        let ring = 2 * usize::from(self.ram.pairs);
        let at = self.ram.buffer(ring, 0);
        let window = self.ram.memory.window(at, BUFFER).expect("in the memory");
        window.write_bytes(0, bytes);
        window.write_bytes(BUFFER - 1, &[0xff]);
        let at = GUEST_BASE + at as u64;
        let buffers = [
            Buffer::readable(at, bytes.len() as u32),
            Buffer::writable(at + BUFFER as u64 - 1, 1),
        ];
        assert!(self.rings[ring].post(&buffers, 0), "controlq");
        self.rings[ring].publish();
        if self.rings[ring].needs_kick() {
            // A full eventfd says all there is to say.
            let _ = self.ram.kicks[ring].write(1);
        }
        let deadline = Instant::now() + ANSWER;
        while self.rings[ring].reap().is_none() {
            assert!(Instant::now() < deadline, "a command has no answer");
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut answer = [0];
        window.read_bytes(BUFFER - 1, &mut answer);
        answer[0]
    }

    fn queue(&self, ring: usize) -> Queue<'m> {
        let areas = self.ram.areas(ring);
        Queue {
            index: ring as u32,
            size: ENTRIES,
            descriptors: areas.descriptors.address() as u64,
            available: areas.available.address() as u64,
            used: areas.used.address() as u64,
            base: 0,
            kick: &self.ram.kicks[ring],
            call: &self.ram.calls[ring],
        }
    }

    fn post_receive(&mut self, pair: u16, token: u32) {
        let ring = 2 * usize::from(pair);
        let at = GUEST_BASE + self.ram.buffer(ring, token) as u64;
        let posted = self.rings[ring].post_one(Buffer::writable(at, BUFFER as u32), token);
        assert!(posted, "receive ring");
    }

    /// SET_VRING_ENABLE for both rings of a pair.
    pub(crate) fn enable(&self, pair: u16, enabled: bool) {
        for ring in [2 * pair, 2 * pair + 1] {
            let set = self.frontend.set_vring_enable(u32::from(ring), enabled);
            set.expect("a ring that is known");
        }
    }

    /// Sends a frame on a pair's transmitq, if a buffer is free.
    pub(crate) fn try_send(&mut self, pair: u16, frame: &[u8]) -> bool {
        let ring = 2 * usize::from(pair) + 1;
        self.in_flight(pair);
        let Some(token) = self.free[ring].pop_front() else {
            return false;
        };
        let at = self.ram.buffer(ring, token);
        let window = self.ram.memory.window(at, BUFFER).expect("in the memory");
        window.write_bytes(0, &[0; HEADER]);
        window.write_bytes(HEADER, frame);
        let buffer = Buffer::readable(GUEST_BASE + at as u64, (HEADER + frame.len()) as u32);
        assert!(self.rings[ring].post_one(buffer, token), "transmit ring");
        self.rings[ring].publish();
        if self.rings[ring].needs_kick() {
            // A full eventfd says all there is to say.
            let _ = self.ram.kicks[ring].write(1);
        }
        true
    }

    /// The next frame in a pair's receiveq, enabled or not. Frames are shorter than a buffer.
    pub(crate) fn try_receive(&mut self, pair: u16) -> Option<Vec<u8>> {
        let ring = 2 * usize::from(pair);
        let used = self.rings[ring].reap();
        assert_eq!(self.rings[ring].fault(), None, "the switch broke a ring");
        let used = used?;
        let mut bytes = vec![0; used.len as usize];
        let at = self.ram.buffer(ring, used.token);
        let window = self.ram.memory.window(at, BUFFER).expect("in the memory");
        window.read_bytes(0, &mut bytes);
        self.post_receive(pair, used.token);
        self.rings[ring].publish();
        Some(bytes.split_off(HEADER))
    }

    /// Transmit buffers of a pair that the switch has not returned.
    pub(crate) fn in_flight(&mut self, pair: u16) -> u16 {
        let ring = 2 * usize::from(pair) + 1;
        while let Some(used) = self.rings[ring].reap() {
            self.free[ring].push_back(used.token);
        }
        assert_eq!(self.rings[ring].fault(), None, "the switch broke a ring");
        self.rings[ring].outstanding()
    }
}
