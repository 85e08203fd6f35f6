//! A scripted guest: memory, one queue pair and its driver, and a frontend that attaches them.
//!
//! It does what a VMM and a virtio-net driver do, one step at a time, so that a test decides what
//! happens when. Rings keep their state over a disconnection, as those of a running guest do, and
//! an attachment resumes them by the rules of the VMM whose message order it follows: QEMU sends
//! the used index that it finds in memory, cloud-hypervisor the available index.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pollux::bench::frontend::{
    AttachError, EVENT_IDX, Frontend, IN_ORDER, INDIRECT_DESC, MRG_RXBUF, Order, Queue,
    RING_PACKED, Region, VERSION_1,
};
use pollux::memory::{SharedMemory, Window};
use pollux::virtio::RingFeatures;
use pollux::virtio::driver::{Buffer, DriverRing, RingAreas, RingLayout, Used};
use rustix::fs::OFlags;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::pause;

/// Where guest memory starts for the guest; not where it lies here.
const GUEST_BASE: u64 = 0x4000_0000;
/// VIRTIO_F_ANY_LAYOUT and VIRTIO_F_NOTIFY_ON_EMPTY, of legacy drivers.
const LEGACY: u64 = 1 << 27 | 1 << 24;
/// VIRTIO_F_RING_RESET.
const RING_RESET: u64 = 1 << 40;
/// Offset of num_buffers in the virtio-net header.
const NUM_BUFFERS: usize = 10;
/// Bytes of a transmit buffer: a jumbo frame and its header.
const TRANSMIT_LEN: usize = 10_240;
/// Bytes set aside for each ring.
pub(crate) const RING_SPACE: usize = 64 * 1024;
/// For a backend's answer; generous, because tests share their CPUs.
const ANSWER: Duration = Duration::from_secs(10);

/// The receiveq and the transmitq, as vring indices.
pub(crate) const RECEIVE: usize = 0;
pub(crate) const TRANSMIT: usize = 1;

/// What kind of guest to play.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestOptions {
    pub(crate) order: Order,
    pub(crate) packed: bool,
    pub(crate) mergeable: bool,
    pub(crate) in_order: bool,
    pub(crate) event_idx: bool,
    /// The memory file cannot shrink; QEMU's cannot, cloud-hypervisor's can.
    pub(crate) sealed: bool,
    /// Calls are wanted; else the guest only polls.
    pub(crate) calls: bool,
    pub(crate) entries: u16,
    /// Bytes of a receive buffer, header included.
    pub(crate) receive_len: usize,
    /// Without VIRTIO_F_VERSION_1.
    pub(crate) legacy: bool,
    /// It resets single rings.
    pub(crate) ring_reset: bool,
}

impl Default for GuestOptions {
    fn default() -> Self {
        GuestOptions {
            order: Order::Qemu,
            packed: false,
            mergeable: true,
            in_order: false,
            event_idx: true,
            sealed: true,
            calls: false,
            entries: 256,
            receive_len: 2048,
            legacy: false,
            ring_reset: false,
        }
    }
}

impl GuestOptions {
    /// A guest of cloud-hypervisor: its order, its features, its memory.
    pub(crate) fn cloud_hypervisor() -> Self {
        GuestOptions {
            order: Order::CloudHypervisor,
            in_order: true,
            sealed: false,
            ..GuestOptions::default()
        }
    }

    fn features(&self) -> u64 {
        let when = |wanted: bool, bit: u64| if wanted { bit } else { 0 };
        INDIRECT_DESC
            | if self.legacy { LEGACY } else { VERSION_1 }
            | when(self.packed, RING_PACKED)
            | when(self.mergeable, MRG_RXBUF)
            | when(self.in_order, IN_ORDER)
            | when(self.event_idx, EVENT_IDX)
            | when(self.ring_reset, RING_RESET)
    }

    fn ring_features(&self) -> RingFeatures {
        RingFeatures {
            packed: self.packed,
            event_idx: self.event_idx,
            indirect: true,
            in_order: self.in_order,
            version_1: !self.legacy,
            mergeable: self.mergeable,
            notify_on_empty: self.legacy,
        }
    }

    /// Bytes of the virtio-net header (virtio 1.2 §5.1.6, §5.1.6.1).
    pub(crate) fn header(&self) -> usize {
        if self.legacy && !self.mergeable {
            10
        } else {
            12
        }
    }
}

/// A guest's memory; outlives the guest that uses it.
#[derive(Debug)]
pub(crate) struct Ram {
    pub(crate) memory: SharedMemory,
    options: GuestOptions,
}

impl Ram {
    pub(crate) fn new(options: GuestOptions) -> Ram {
        let memory = SharedMemory::create(Ram::len(&options), options.sealed);
        Ram::of(memory.expect("shared memory"), options)
    }

    /// The same in memory of one's own, of [`Ram::len`] bytes.
    pub(crate) fn of(memory: SharedMemory, options: GuestOptions) -> Ram {
        Ram { memory, options }
    }

    /// Bytes of such a guest: first the rings, then the buffers.
    pub(crate) fn len(options: &GuestOptions) -> usize {
        let entries = usize::from(options.entries);
        let len = 2 * RING_SPACE + entries * (options.receive_len + TRANSMIT_LEN);
        len.next_multiple_of(4096)
    }

    fn buffer(&self, which: usize, token: u32) -> (usize, usize) {
        let receive_len = self.options.receive_len;
        let receive_area = usize::from(self.options.entries) * receive_len;
        let n = token as usize;
        match which {
            RECEIVE => (2 * RING_SPACE + n * receive_len, receive_len),
            _ => (
                2 * RING_SPACE + receive_area + n * TRANSMIT_LEN,
                TRANSMIT_LEN,
            ),
        }
    }

    fn window(&self, which: usize, token: u32) -> Window<'_> {
        let (offset, len) = self.buffer(which, token);
        self.memory.window(offset, len).expect("inside the memory")
    }
}

/// The cleared areas of a ring of so many entries.
fn areas(ram: &Ram, which: usize, options: GuestOptions, entries: u16) -> RingAreas<'_> {
    let layout = RingLayout::new(entries, options.packed);
    let memory = ram.memory.window(which * RING_SPACE, layout.len);
    RingAreas::zeroed(memory.expect("room for a ring"), &layout).expect("room for a ring")
}

fn ring(areas: RingAreas<'_>, options: GuestOptions) -> DriverRing<'_> {
    let mut ring = DriverRing::new(areas, options.ring_features());
    if !options.calls {
        ring.suppress_calls();
    }
    ring
}

/// Clears O_NONBLOCK for all who hold this eventfd.
#[allow(
    unsafe_code,
    reason = "an EventFd lends its descriptor only as a number"
)]
fn forget_nonblock(event: &EventFd) {
    // SAFETY: open for as long as `event` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    rustix::fs::fcntl_setfl(fd, OFlags::RDWR).expect("flags of our own eventfd");
}

/// One guest.
#[derive(Debug)]
pub(crate) struct Guest<'m> {
    ram: &'m Ram,
    options: GuestOptions,
    sizes: [u16; 2],
    areas: [RingAreas<'m>; 2],
    rings: [DriverRing<'m>; 2],
    /// Where packed rings start; nothing in memory says where they stand later.
    start_bases: [u32; 2],
    pub(crate) kicks: [EventFd; 2],
    pub(crate) calls: [EventFd; 2],
    /// Transmit buffers that the switch does not have.
    free: VecDeque<u32>,
    /// The attachment, if there is one.
    pub(crate) frontend: Option<Frontend>,
}

impl<'m> Guest<'m> {
    /// A guest that has just started: empty rings, all receive buffers posted.
    pub(crate) fn new(ram: &'m Ram) -> Guest<'m> {
        Guest::with(ram, ram.options)
    }

    /// The same with other options than the memory was made for, and at most as many entries.
    pub(crate) fn with(ram: &'m Ram, options: GuestOptions) -> Guest<'m> {
        let areas = [RECEIVE, TRANSMIT].map(|which| areas(ram, which, options, options.entries));
        let rings = areas.map(|areas| ring(areas, options));
        let event = |_| EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let mut guest = Guest {
            ram,
            options,
            sizes: [options.entries; 2],
            areas,
            start_bases: [rings[RECEIVE].base(), rings[TRANSMIT].base()],
            rings,
            kicks: [RECEIVE, TRANSMIT].map(event),
            calls: [RECEIVE, TRANSMIT].map(event),
            free: (0..u32::from(options.entries)).collect(),
            frontend: None,
        };
        for token in 0..u32::from(options.entries) {
            guest.post_receive(token);
        }
        guest.publish(RECEIVE);
        guest
    }

    pub(crate) fn post_receive(&mut self, token: u32) {
        let (offset, len) = self.ram.buffer(RECEIVE, token);
        let buffer = Buffer::writable(GUEST_BASE + offset as u64, len as u32);
        assert!(self.rings[RECEIVE].post_one(buffer, token), "receive ring");
    }

    fn publish(&mut self, which: usize) {
        self.rings[which].publish();
        if self.rings[which].needs_kick() {
            // A full eventfd says all there is to say.
            let _ = self.kicks[which].write(1);
        }
    }

    // ---- attachment -----------------------------------------------------------------------------

    /// Connects to a port and starts both rings.
    pub(crate) fn attach(&mut self, socket: &Path) {
        if let Err(error) = self.try_attach(socket) {
            panic!("a guest cannot attach to {socket:?}: {error:?}");
        }
    }

    /// The same, with its failure for the test to judge.
    pub(crate) fn try_attach(&mut self, socket: &Path) -> Result<(), AttachError> {
        let mut frontend = self.negotiate(socket)?;
        self.start(&mut frontend)?;
        self.frontend = Some(frontend);
        Ok(())
    }

    /// Connects, and agrees on features without setting them yet.
    pub(crate) fn negotiate(&self, socket: &Path) -> Result<Frontend, AttachError> {
        let mut frontend = Frontend::connect(socket, ANSWER)?;
        frontend.negotiate(self.options.order, self.options.features(), 0, 1)?;
        Ok(frontend)
    }

    /// Connects and starts the receiveq only: others can send to this guest before it sends itself.
    pub(crate) fn attach_receiving(&mut self, socket: &Path) {
        let start = || {
            let mut frontend = self.negotiate(socket)?;
            frontend.set_features(frontend.features())?;
            frontend.set_mem_table(&[self.region()])?;
            self.start_ring(&frontend, RECEIVE)?;
            Ok::<_, AttachError>(frontend)
        };
        let frontend = start();
        self.frontend = Some(frontend.expect("the receiveq starts"));
    }

    /// Starts the transmitq after [`Guest::attach_receiving`].
    pub(crate) fn attach_transmitting(&self) {
        let frontend = self.frontend.as_ref().expect("attached");
        let started = self.start_ring(frontend, TRANSMIT);
        started.expect("the transmitq starts");
    }

    /// Everything about one ring.
    pub(crate) fn start_ring(&self, frontend: &Frontend, which: usize) -> Result<(), AttachError> {
        let queue = self.queue(which);
        frontend.set_vring_num(queue.index, u32::from(queue.size))?;
        frontend.set_vring_base(queue.index, queue.base)?;
        frontend.set_vring_addr(&queue)?;
        frontend.set_vring_kick(queue.index, queue.kick)?;
        frontend.set_vring_call(queue.index, queue.call)?;
        frontend.set_vring_enable(queue.index, true)
    }

    /// Features, memory, rings.
    pub(crate) fn start(&self, frontend: &mut Frontend) -> Result<(), AttachError> {
        let queues = [self.queue(RECEIVE), self.queue(TRANSMIT)];
        frontend.start(self.options.order, &[self.region()], &queues)
    }

    /// All of guest memory.
    pub(crate) fn region(&self) -> Region {
        Region::whole(&self.ram.memory, GUEST_BASE)
    }

    /// The same, to look at.
    pub(crate) fn memory(&self) -> Window<'m> {
        let memory = &self.ram.memory;
        memory.window(0, memory.len()).expect("all of it")
    }

    /// What lies there, with zeros for the ring `which`.
    pub(crate) fn contents_without(&self, which: usize) -> Vec<u8> {
        let memory = self.memory();
        let mut bytes = vec![0; memory.len()];
        memory.read_bytes(0, &mut bytes);
        bytes[which * RING_SPACE..][..RING_SPACE].fill(0);
        bytes
    }

    /// A ring as a message describes it.
    pub(crate) fn queue(&self, which: usize) -> Queue<'_> {
        let areas = &self.areas[which];
        Queue {
            index: which as u32,
            size: self.sizes[which],
            descriptors: areas.descriptors.address() as u64,
            available: areas.available.address() as u64,
            used: areas.used.address() as u64,
            base: self.base(which),
            kick: &self.kicks[which],
            call: &self.calls[which],
        }
    }

    fn base(&self, which: usize) -> u32 {
        // The index follows the flags in either ring.
        let index = |window: &Window<'_>| u32::from(window.load_u16(2, Ordering::Acquire));
        match (self.options.packed, self.options.order) {
            (true, _) => self.start_bases[which],
            (false, Order::Qemu) => index(&self.areas[which].used),
            (false, Order::CloudHypervisor) => index(&self.areas[which].available),
        }
    }

    /// Closes the connection; the rings stay as they are.
    pub(crate) fn detach(&mut self) {
        if let Some(frontend) = self.frontend.take() {
            // Hangs up at once, also while another test's fork still holds the descriptor.
            let _ = frontend.stream().shutdown(std::net::Shutdown::Both);
        }
    }

    /// Whether the switch has closed the connection.
    pub(crate) fn is_cut_off(&self) -> bool {
        self.frontend.as_ref().is_none_or(Frontend::is_closed)
    }

    /// The VMM whose order its messages have.
    pub(crate) fn order(&self) -> Order {
        self.options.order
    }

    /// The features that this guest's driver knows.
    pub(crate) fn features(&self) -> u64 {
        self.options.features()
    }

    // ---- misdeeds -------------------------------------------------------------------------------

    /// Guest address of a transmit buffer, and its length.
    pub(crate) fn transmit_buffer(&self, token: u32) -> (u64, u32) {
        let (offset, len) = self.ram.buffer(TRANSMIT, token);
        (GUEST_BASE + offset as u64, len as u32)
    }

    /// Its memory.
    pub(crate) fn transmit_memory(&self, token: u32) -> Window<'m> {
        self.ram.window(TRANSMIT, token)
    }

    /// Memory of a receive buffer.
    pub(crate) fn receive_memory(&self, token: u32) -> Window<'m> {
        self.ram.window(RECEIVE, token)
    }

    /// First guest address behind all memory.
    pub(crate) fn hole(&self) -> u64 {
        GUEST_BASE + self.ram.memory.len() as u64
    }

    /// A ring's memory, for a driver that writes what it likes.
    pub(crate) fn areas(&self, which: usize) -> RingAreas<'m> {
        self.areas[which]
    }

    /// Posts a chain of these buffers to the transmitq, whatever they are. `spoil` may rewrite the
    /// ring's memory before the device sees it; it is told the chain's head, which means something
    /// in a split ring.
    pub(crate) fn post_raw(
        &mut self,
        buffers: &[Buffer],
        spoil: impl FnOnce(&RingAreas<'m>, u16),
    ) -> u32 {
        assert_eq!(self.in_flight(), 0);
        let token = self.free.pop_front().expect("a token");
        let areas = self.areas[TRANSMIT];
        let slot = self.rings[TRANSMIT].base() as usize % usize::from(areas.size);
        assert!(self.rings[TRANSMIT].post(buffers, token), "transmit ring");
        let head = if self.options.packed {
            0
        } else {
            areas.available.load_u16(4 + 2 * slot, Ordering::Relaxed)
        };
        spoil(&areas, head);
        self.publish(TRANSMIT);
        token
    }

    /// Posts those of these chains that there is room for, to the transmitq, and returns how many.
    pub(crate) fn post_chains(&mut self, chains: impl IntoIterator<Item = Vec<Buffer>>) -> usize {
        let mut posted = 0;
        for chain in chains {
            self.in_flight();
            let Some(token) = self.free.pop_front() else {
                break;
            };
            if !self.rings[TRANSMIT].post(&chain, token) {
                self.free.push_front(token);
                break;
            }
            posted += 1;
        }
        self.publish(TRANSMIT);
        posted
    }

    /// Guest address of an offset into its memory.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        GUEST_BASE + offset as u64
    }

    /// Waits for the next chain to come back.
    pub(crate) fn returned(&mut self, which: usize) -> Used {
        let deadline = Instant::now() + ANSWER;
        loop {
            if let Some(used) = self.rings[which].reap() {
                if which == TRANSMIT {
                    self.free.push_back(used.token);
                }
                return used;
            }
            self.assert_sound();
            assert!(Instant::now() < deadline, "no buffer comes back");
            pause();
        }
    }

    /// From now on calls come to nothing: their eventfds are full, and without O_NONBLOCK, so that
    /// whoever writes to one sleeps for ever.
    pub(crate) fn block_calls(&self) {
        for call in &self.calls {
            // The switch may write in between.
            while call.write(u64::MAX - 1).is_err() {
                let _ = call.read();
            }
            forget_nonblock(call);
        }
    }

    /// Makes the device look at a ring whose memory was rewritten behind the driver's back.
    pub(crate) fn kick(&self, which: usize) {
        let _ = self.kicks[which].write(1);
    }

    // ---- other drivers --------------------------------------------------------------------------

    /// The driver goes, and another one comes: QEMU stops the rings that run, and starts those of
    /// the new driver over the same connection.
    pub(crate) fn reboot(&mut self, options: GuestOptions) {
        let mut frontend = self.frontend.take().expect("attached");
        for which in [RECEIVE, TRANSMIT] {
            let stopped = frontend.get_vring_base(which as u32);
            stopped.expect("the ring stops");
        }
        let protocol = frontend.features() & 1 << 30;
        *self = Guest::with(self.ram, options);
        let features = frontend.set_features(options.features() | protocol);
        features.expect("other features");
        self.start(&mut frontend).expect("the new driver starts");
        self.frontend = Some(frontend);
    }

    /// The driver resets one ring (virtio 1.2 §2.6.1), and starts it with so many entries. The
    /// frontend stops it and starts it again; it keeps the call descriptor.
    pub(crate) fn reset_ring(&mut self, which: usize, entries: u16) {
        let frontend = self.frontend.take().expect("attached");
        let stopped = frontend.get_vring_base(which as u32);
        stopped.expect("the ring stops");
        self.start_anew(frontend, which, entries);
    }

    /// The second half of that: the ring has stopped.
    pub(crate) fn start_anew(&mut self, frontend: Frontend, which: usize, entries: u16) {
        let index = which as u32;
        self.sizes[which] = entries;
        self.areas[which] = areas(self.ram, which, self.options, entries);
        self.rings[which] = ring(self.areas[which], self.options);
        if which == RECEIVE {
            (0..u32::from(entries)).for_each(|token| self.post_receive(token));
            self.publish(RECEIVE);
        } else {
            self.free = (0..u32::from(entries)).collect();
        }
        let queue = self.queue(which);
        let start = || {
            frontend.set_vring_num(index, u32::from(entries))?;
            frontend.set_vring_base(index, queue.base)?;
            frontend.set_vring_addr(&queue)?;
            frontend.set_vring_kick(index, queue.kick)?;
            frontend.set_vring_enable(index, true)
        };
        start().expect("the ring starts again");
        self.frontend = Some(frontend);
    }

    /// Where a ring that was started and then used `chains` single buffers must be, as
    /// GET_VRING_BASE has it.
    pub(crate) fn base_after(&self, which: usize, chains: u64) -> u32 {
        if !self.options.packed {
            return (chains % (1 << 16)) as u32;
        }
        // From slot 0 of the first lap, whose wrap counter is 1 (virtio 1.2 §2.8.1).
        let size = u64::from(self.sizes[which]);
        let lap = u32::from((chains / size).is_multiple_of(2));
        let half = (chains % size) as u32 | lap << 15;
        half << 16 | half
    }

    // ---- frames ---------------------------------------------------------------------------------

    /// Sends a frame if a buffer is free.
    pub(crate) fn try_send(&mut self, frame: &[u8]) -> bool {
        self.try_send_cut(frame, &[])
    }

    /// The same with header and frame in several buffers, one from each of the cuts to the next.
    pub(crate) fn try_send_cut(&mut self, frame: &[u8], cuts: &[usize]) -> bool {
        while let Some(used) = self.rings[TRANSMIT].reap() {
            self.free.push_back(used.token);
        }
        self.assert_sound();
        self.send_blindly(frame, cuts)
    }

    /// The same without a look at what has come back.
    pub(crate) fn send_blindly(&mut self, frame: &[u8], cuts: &[usize]) -> bool {
        let Some(token) = self.free.pop_front() else {
            return false;
        };
        let window = self.ram.window(TRANSMIT, token);
        let header = self.options.header();
        window.write_bytes(0, &[0; 12][..header]);
        window.write_bytes(header, frame);
        let (offset, _) = self.ram.buffer(TRANSMIT, token);
        let ends = cuts.iter().copied().chain([header + frame.len()]);
        let mut start = 0;
        let pieces: Vec<Buffer> = ends
            .map(|end| {
                let piece = (GUEST_BASE + (offset + start) as u64, end - start);
                start = end;
                Buffer::readable(piece.0, u32::try_from(piece.1).expect("a short frame"))
            })
            .collect();
        assert!(self.rings[TRANSMIT].post(&pieces, token), "transmit ring");
        self.publish(TRANSMIT);
        true
    }

    /// Sends a chain of so many zeros; there is a buffer for it.
    pub(crate) fn send_raw(&mut self, len: usize) {
        let token = self.free.pop_front().expect("a free buffer");
        self.ram
            .window(TRANSMIT, token)
            .write_bytes(0, &vec![0; len]);
        let (offset, _) = self.ram.buffer(TRANSMIT, token);
        let buffer = Buffer::readable(GUEST_BASE + offset as u64, len as u32);
        assert!(
            self.rings[TRANSMIT].post_one(buffer, token),
            "transmit ring"
        );
        self.publish(TRANSMIT);
    }

    /// Sends a frame; there is a buffer for it soon.
    pub(crate) fn send(&mut self, frame: &[u8]) {
        let deadline = Instant::now() + ANSWER;
        while !self.try_send(frame) {
            assert!(Instant::now() < deadline, "no transmit buffer comes back");
            pause();
        }
    }

    /// The next frame that has come, put together from its buffers.
    pub(crate) fn try_receive(&mut self) -> Option<Vec<u8>> {
        let first = self.rings[RECEIVE].reap();
        self.assert_sound();
        let first = first?;
        let len = self.options.header();
        let mut header = vec![0; len];
        let window = self.ram.window(RECEIVE, first.token);
        window.read_bytes(0, &mut header);
        assert_eq!(header[..10], [0; 10], "no offloads were negotiated");
        let buffers = match header.get(NUM_BUFFERS..) {
            Some(&[low, high]) => u16::from_le_bytes([low, high]),
            _ => 1,
        };
        assert!(buffers >= 1, "num_buffers is always written");
        let mut frame = self.take(first, len);
        for _ in 1..buffers {
            let next = self.rings[RECEIVE].reap();
            let next = next.expect("a frame over several buffers becomes visible whole");
            frame.extend(self.take(next, 0));
        }
        self.publish(RECEIVE);
        Some(frame)
    }

    /// A used buffer's bytes behind `skip`; the buffer is posted again.
    fn take(&mut self, used: Used, skip: usize) -> Vec<u8> {
        let mut bytes = vec![0; used.len as usize - skip];
        self.ram
            .window(RECEIVE, used.token)
            .read_bytes(skip, &mut bytes);
        self.post_receive(used.token);
        bytes
    }

    /// Waits for the next frame.
    pub(crate) fn receive(&mut self, limit: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(frame) = self.try_receive() {
                return Some(frame);
            }
            if Instant::now() > deadline {
                return None;
            }
            pause();
        }
    }

    /// Transmit buffers that the switch has not returned.
    pub(crate) fn in_flight(&mut self) -> u16 {
        while let Some(used) = self.rings[TRANSMIT].reap() {
            self.free.push_back(used.token);
        }
        self.assert_sound();
        self.rings[TRANSMIT].outstanding()
    }

    /// No buffer was returned twice, or without having been posted.
    fn assert_sound(&self) {
        for ring in &self.rings {
            assert_eq!(ring.fault(), None, "the switch broke a ring");
        }
    }
}
