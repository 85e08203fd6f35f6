//! A scripted frontend on one end of a socket pair, a session with a test double behind it on the
//! other.

mod answers;
mod control;
mod descriptors;
mod habits;
mod hostile;
mod life;
mod memory;
mod records;
mod setup;
mod silence;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    FrontendReq, VhostUserHeaderFlag, VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::session::serve_with;
use super::*;
use crate::port::QueuePair;
use crate::sys::memfd;
use crate::virtio::features::unmet;

/// Where the frontend claims to have its memory mapped.
const USER: u64 = 0x7f00_0000_0000;
const SIZE: u64 = 1 << 20;
/// Bytes from one ring to the next, and where its parts are.
const RING: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
const ENTRIES: u16 = 256;
const NEED_REPLY: u32 = 8;
/// VIRTIO_F_RING_PACKED.
const PACKED: u64 = 1 << 34;

/// The daemon, as far as a session sees it.
#[derive(Default)]
struct Double {
    last: Mutex<Option<Arc<Device>>>,
    posts: AtomicU64,
    settled: AtomicU64,
    gone: AtomicBool,
    /// A poll thread has still to take over the newest post.
    late: AtomicBool,
    events: Mutex<Vec<String>>,
    calls: OnceLock<Arc<CallGuard>>,
}

impl DeviceSink for Double {
    fn post(&self, device: Option<Arc<Device>>) -> Ticket {
        *self.last.lock().unwrap() = device;
        Ticket(self.posts.fetch_add(1, Ordering::SeqCst) + 1)
    }

    fn settle(&self, ticket: Ticket) -> Result<(), Gone> {
        assert!(ticket.0 <= self.posts.load(Ordering::SeqCst));
        self.settled.fetch_max(ticket.0, Ordering::SeqCst);
        if self.gone.load(Ordering::SeqCst) {
            Err(Gone)
        } else {
            Ok(())
        }
    }

    fn is_settled(&self, ticket: Ticket) -> bool {
        assert!(ticket.0 <= self.posts.load(Ordering::SeqCst));
        !self.late.load(Ordering::SeqCst)
    }

    fn calls(&self) -> Arc<CallGuard> {
        let guard = self.calls.get_or_init(|| CallGuard::new().unwrap());
        Arc::clone(guard)
    }

    fn pace(&self) -> Duration {
        Duration::ZERO
    }

    fn event(&self, event: SessionEvent) {
        self.events.lock().unwrap().push(event.to_string());
    }
}

/// The frontend, and everything behind it.
struct Peer {
    stream: UnixStream,
    frontend: Frontend,
    sink: Arc<Double>,
    status: Arc<SessionStatus>,
    thread: JoinHandle<SessionEnd>,
    memory: File,
    calls: Vec<EventFd>,
}

impl Peer {
    fn new() -> Self {
        Peer::with(SessionOptions::new(1))
    }

    fn with(options: SessionOptions) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (sink, status) = (Arc::new(Double::default()), SessionStatus::new());
        let thread = std::thread::spawn({
            let (sink, status) = (Arc::clone(&sink), Arc::clone(&status));
            move || serve_with(theirs, options, sink, status, Duration::from_millis(300))
        });
        Peer {
            frontend: Frontend::from_stream(ours.try_clone().unwrap(), 256),
            stream: ours,
            sink,
            status,
            thread,
            memory: memfd::create("vu-test", 2 * SIZE).unwrap(),
            calls: (0..16).map(|_| EventFd::new(0).unwrap()).collect(),
        }
    }

    /// GET and SET_PROTOCOL_FEATURES and what comes before; every message is acknowledged from then
    /// on. Returns what a driver with split rings takes of the features.
    fn negotiate(&mut self) -> u64 {
        let features = self.frontend.get_features().unwrap();
        assert_eq!(unmet(features), None, "a driver would refuse the card");
        let protocol = self.frontend.get_protocol_features().unwrap();
        self.frontend.set_protocol_features(protocol).unwrap();
        self.frontend.set_owner().unwrap();
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        features & !PACKED
    }

    /// The same, with the kind of ring that the driver takes.
    fn negotiate_kind(&mut self, packed: bool) -> u64 {
        self.negotiate() | if packed { PACKED } else { 0 }
    }

    /// A peer that has come as far as its memory.
    fn with_memory(options: SessionOptions, packed: bool) -> Self {
        let mut peer = Peer::with(options);
        let features = peer.negotiate_kind(packed);
        peer.frontend.set_features(features).unwrap();
        peer.share_memory();
        peer
    }

    fn region(&self, guest: u64, offset: u64, size: u64) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: guest,
            memory_size: size,
            userspace_addr: USER + guest,
            mmap_offset: offset,
            mmap_handle: self.memory.as_raw_fd(),
        }
    }

    fn share_memory(&self) {
        self.frontend
            .set_mem_table(&[self.region(0, 0, SIZE)])
            .unwrap();
    }

    fn addresses(ring: usize) -> VringConfigData {
        let at = USER + ring as u64 * RING;
        VringConfigData {
            queue_max_size: ENTRIES,
            queue_size: ENTRIES,
            flags: 0,
            desc_table_addr: at,
            avail_ring_addr: at + AVAILABLE,
            used_ring_addr: at + USED,
            log_addr: None,
        }
    }

    fn start_ring(&self, ring: usize, base: u32) {
        self.frontend.set_vring_num(ring, ENTRIES).unwrap();
        // 32 bits, of which the crate's frontend sends only 16. Whether it was taken shows in the
        // next answer.
        self.send_ring(FrontendReq::SET_VRING_BASE, 0, ring as u32, base);
        self.frontend
            .set_vring_addr(ring, &Peer::addresses(ring))
            .unwrap();
        self.frontend
            .set_vring_call(ring, &self.calls[ring])
            .unwrap();
        self.frontend
            .set_vring_kick(ring, &self.calls[ring + 8])
            .unwrap();
    }

    /// A peer with one pair running and enabled.
    fn up(packed: bool) -> Self {
        Peer::up_with(SessionOptions::new(1), packed)
    }

    fn up_with(options: SessionOptions, packed: bool) -> Self {
        let mut peer = Peer::with_memory(options, packed);
        for ring in 0..2 {
            peer.start_ring(ring, base_at(packed, 0));
            peer.frontend.set_vring_enable(ring, true).unwrap();
        }
        assert_eq!(peer.status.snapshot().state, "running");
        peer
    }

    /// Sets a 16-bit word of a ring's memory.
    fn poke(&self, ring: u64, offset: u64, value: u16) {
        self.memory
            .write_all_at(&value.to_ne_bytes(), ring * RING + offset)
            .unwrap();
    }

    fn device(&self) -> Option<Arc<Device>> {
        self.sink.last.lock().unwrap().clone()
    }

    fn pair(&self, pair: usize) -> QueuePair {
        self.device()
            .map(|device| device.pairs[pair].clone())
            .unwrap_or_default()
    }

    fn started(&self, ring: usize) -> bool {
        let pair = self.pair(ring / 2);
        if ring.is_multiple_of(2) {
            pair.receive.is_some()
        } else {
            pair.transmit.is_some()
        }
    }

    fn said(&self, text: &str) -> bool {
        self.sink
            .events
            .lock()
            .unwrap()
            .iter()
            .any(|event| event.contains(text))
    }

    /// A message as bytes, without descriptors.
    fn send(&self, request: u32, flags: u32, body: &[u8]) {
        let mut bytes = Vec::new();
        for word in [request, 1 | flags, body.len() as u32] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(body);
        (&self.stream).write_all(&bytes).unwrap();
    }

    /// A message with descriptors.
    fn send_with(&self, request: FrontendReq, flags: u32, body: &[u8], files: &[RawFd]) {
        let header = [request as u32, 1 | flags, body.len() as u32].map(u32::to_ne_bytes);
        let bytes = [&header.concat(), body].concat();
        self.stream.send_with_fds(&[&bytes[..]], files).unwrap();
    }

    /// A message with ring index and number.
    fn send_ring(&self, request: FrontendReq, flags: u32, index: u32, number: u32) {
        let body = [index.to_ne_bytes(), number.to_ne_bytes()].concat();
        self.send(request as u32, flags, &body);
    }

    /// The value of the next reply; `None` if the session hung up instead.
    fn reply(&self) -> Option<u64> {
        let mut bytes = [0; 20];
        (&self.stream).read_exact(&mut bytes).ok()?;
        Some(u64::from_ne_bytes(bytes[12..].try_into().unwrap()))
    }

    /// GET_QUEUE_NUM; the crate's frontend would take the answer for a number of rings.
    fn queue_num(&self) -> Option<u64> {
        self.send(FrontendReq::GET_QUEUE_NUM as u32, 0, &[]);
        self.reply()
    }

    /// Hangs up; how the session ended, with everything let go.
    fn leave(self) -> SessionEnd {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
        self.ended()
    }

    /// Waits for the session to end by itself, and checks that everything was let go.
    fn ended(self) -> SessionEnd {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.thread.is_finished() {
            assert!(Instant::now() < deadline, "the session thread is stuck");
            std::thread::sleep(Duration::from_millis(1));
        }
        let end = self.thread.join().expect("the session thread panicked");
        assert!(
            self.sink.last.lock().unwrap().is_none(),
            "a device is still posted"
        );
        let (posts, settled) = (&self.sink.posts, &self.sink.settled);
        assert_eq!(posts.load(Ordering::SeqCst), settled.load(Ordering::SeqCst));
        let snapshot = self.status.snapshot();
        assert_eq!((snapshot.memory_bytes, snapshot.rings.len()), (0, 0));
        end
    }

    fn refused(self) -> String {
        match self.ended() {
            SessionEnd::Protocol(error) => error.to_string(),
            other => panic!("{other}"),
        }
    }
}

/// What SET_VRING_BASE says of a ring at this slot, in its first lap.
fn base_at(packed: bool, slot: u16) -> u32 {
    let slot = u32::from(slot);
    if packed {
        0x8000_8000 | slot << 16 | slot
    } else {
        slot
    }
}

fn base_of(index: usize, peer: &Peer) -> u32 {
    peer.frontend.get_vring_base(index).unwrap()
}

/// What the kernel tells of an eventfd, in every descriptor of it and nowhere else.
fn id_of(event: &impl AsRawFd) -> String {
    let info = format!("/proc/self/fdinfo/{}", event.as_raw_fd());
    let info = std::fs::read_to_string(info).unwrap();
    let id = info.lines().find(|line| line.starts_with("eventfd-id"));
    format!("{}\n", id.expect("Linux 5.2 tells it"))
}

/// Mappings of this process whose line contains a text.
fn mappings(text: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(text)).count()
}

/// What the kernel tells of each descriptor of this process whose link or info contains a text.
fn descriptor_infos(text: &str) -> Vec<String> {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let link = std::fs::read_link(entry.path()).unwrap_or_default();
            let info = format!("/proc/self/fdinfo/{}", entry.file_name().display());
            let info = std::fs::read_to_string(info).unwrap_or_default();
            (link.to_string_lossy().contains(text) || info.contains(text)).then_some(info)
        })
        .collect()
}

/// How many there are of them.
fn descriptors(text: &str) -> usize {
    descriptor_infos(text).len()
}
