//! Packed rings whose switch, or whose connection, went away without a word.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::*;

const START: u32 = 0x8000_8000;
/// Where a record says how far its ring has come, in bytes.
const RUN: u64 = 64;

fn dir() -> tempfile::TempDir {
    let named = tempfile::Builder::new()
        .prefix("plx-")
        .tempdir_in("/dev/shm");
    named.unwrap()
}

fn options(dir: &Path) -> SessionOptions {
    SessionOptions {
        records: Some(RingRecords::new(&dir.join("rings"), "vm1")),
        ..SessionOptions::new(1)
    }
}

fn record(dir: &Path) -> std::path::PathBuf {
    dir.join("rings/vm1.0")
}

/// What the second frontend has changed.
struct Again {
    memory: Option<File>,
    features: u64,
    size: u16,
    asked: u32,
    at: u64,
}

impl Again {
    fn same(memory: &File) -> Self {
        Again {
            memory: Some(memory.try_clone().unwrap()),
            features: PACKED,
            size: 200,
            asked: START,
            at: USER,
        }
    }
}

/// A frontend that has started a packed receiveq.
fn started(dir: &Path, again: Again) -> Peer {
    let mut peer = Peer::with(options(dir));
    if let Some(memory) = again.memory {
        peer.memory = memory;
    }
    let features = peer.negotiate();
    peer.frontend
        .set_features((features | PACKED) & !(PACKED ^ again.features))
        .unwrap();
    peer.share_memory();
    peer.frontend.set_vring_num(0, again.size).unwrap();
    peer.send_ring(FrontendReq::SET_VRING_BASE, NEED_REPLY, 0, again.asked);
    assert_eq!(peer.reply(), Some(0));
    let mut places = Peer::addresses(0);
    places.desc_table_addr = again.at;
    peer.frontend.set_vring_addr(0, &places).unwrap();
    peer.frontend.set_vring_kick(0, &peer.calls[0]).unwrap();
    assert!(peer.started(0));
    peer
}

/// A ring that has come to slot 5 when its connection breaks; its memory.
fn left_at_slot_5(dir: &Path) -> File {
    let memory = memfd::create("vu-test", 2 * SIZE).unwrap();
    let peer = started(dir, Again::same(&memory));
    peer.leave();
    let file = File::options().write(true).open(record(dir)).unwrap();
    file.write_all_at(&0x8005_u64.to_le_bytes(), RUN).unwrap();
    memory
}

fn base(peer: &Peer) -> u32 {
    peer.frontend.get_vring_base(0).unwrap()
}

#[test]
fn a_packed_ring_goes_on_where_it_was_when_its_connection_broke() {
    let dir = dir();
    let memory = left_at_slot_5(dir.path());
    // Twice: the frontend says at the third start what it said at the first.
    for _ in 0..2 {
        let peer = started(dir.path(), Again::same(&memory));
        assert!(peer.said("receiveq 0 starts at 0x80058005, not at the base 0x80008000"));
        // A new memory table moves the ring; it stays the same one.
        peer.share_memory();
        assert!(peer.started(0));
        peer.leave();
    }
    let peer = started(dir.path(), Again::same(&memory));
    assert_eq!(base(&peer), 0x8005_8005);
    peer.leave();
}

#[test]
fn another_ring_starts_where_it_is_told() {
    let other = |change: &dyn Fn(&mut Again)| {
        let dir = dir();
        let memory = left_at_slot_5(dir.path());
        let mut again = Again::same(&memory);
        change(&mut again);
        let asked = again.asked;
        let peer = started(dir.path(), again);
        assert_eq!(base(&peer), asked);
        peer.leave();
    };
    // Another VM, however alike.
    other(&|again| again.memory = None);
    // The guest has reset its device, and its frontend knows.
    other(&|again| again.asked = 0x0003_0003);
    other(&|again| again.size = 201);
    other(&|again| again.at += 16);
    // VIRTIO_F_EVENT_IDX.
    other(&|again| again.features = PACKED | 1 << 29);
}

#[test]
fn a_ring_that_its_driver_cleared_starts_anew() {
    let dir = dir();
    let memory = left_at_slot_5(dir.path());
    memory.write_all_at(&[0; RING as usize], 0).unwrap();
    let peer = started(dir.path(), Again::same(&memory));
    assert_eq!(base(&peer), START);
    peer.leave();
}

#[test]
fn what_was_handed_over_or_reset_is_forgotten() {
    for reset in [false, true] {
        let dir = dir();
        let memory = left_at_slot_5(dir.path());
        let peer = started(dir.path(), Again::same(&memory));
        if reset {
            peer.send(FrontendReq::RESET_DEVICE as u32, NEED_REPLY, &[]);
            assert_eq!(peer.reply(), Some(0));
        } else {
            assert_eq!(base(&peer), 0x8005_8005);
        }
        // Behind the answer, and before the next one.
        peer.queue_num();
        assert!(!record(dir.path()).exists());
        peer.leave();
        let peer = started(dir.path(), Again::same(&memory));
        assert_eq!(base(&peer), START);
        peer.leave();
    }
}

#[test]
fn a_position_that_could_not_be_handed_over_is_kept() {
    let dir = dir();
    let memory = left_at_slot_5(dir.path());
    let peer = started(dir.path(), Again::same(&memory));
    // The frontend asks, and is not there any more when the answer comes.
    peer.stream.shutdown(std::net::Shutdown::Read).unwrap();
    peer.send_ring(FrontendReq::GET_VRING_BASE, 0, 0, 0);
    assert!(matches!(peer.ended(), SessionEnd::Disconnected));
    assert!(record(dir.path()).exists());
    let peer = started(dir.path(), Again::same(&memory));
    assert_eq!(base(&peer), 0x8005_8005);
    peer.leave();
}

/// Descriptors and mappings by the name of their directory, which no other test has.
#[test]
fn rings_that_start_and_stop_again_and_again_leave_no_record_behind() {
    let dir = dir();
    let name = dir.path().to_str().unwrap().to_owned();
    let files = || std::fs::read_dir(dir.path().join("rings")).unwrap().count();
    let peer = Peer::up_with(options(dir.path()), true);
    for turn in 0..500 {
        for ring in 0..2 {
            let stands = peer.frontend.get_vring_base(ring).unwrap();
            assert_eq!(stands, base_at(true, turn % ENTRIES));
            // Another place each time, so that no record is found again.
            peer.start_ring(ring, base_at(true, (turn + 1) % ENTRIES));
            assert!(peer.started(ring));
        }
        // A record and its mapping for each ring, no other file, and no descriptor.
        assert_eq!((files(), mappings(&name), descriptors(&name)), (2, 2, 0));
    }
    for ring in 0..2 {
        peer.frontend.get_vring_base(ring).unwrap();
    }
    // Behind the answer, and before the next one.
    peer.queue_num();
    assert_eq!((files(), mappings(&name)), (0, 0));
    peer.start_ring(0, START);
    peer.leave();
    assert_eq!((files(), mappings(&name), descriptors(&name)), (1, 0, 0));
}

#[test]
fn what_lies_in_the_way_is_replaced() {
    let dir = dir();
    let memory = memfd::create("vu-test", 2 * SIZE).unwrap();
    let path = record(dir.path());
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    let secret = dir.path().join("secret");
    let lay: [&dyn Fn(); 4] = [
        &|| std::fs::write(&path, "short").unwrap(),
        &|| std::fs::write(&path, vec![0xff; 1 << 16]).unwrap(),
        &|| std::os::unix::fs::symlink(&secret, &path).unwrap(),
        &|| std::os::unix::fs::symlink(&secret, path.with_extension("0.new")).unwrap(),
    ];
    std::fs::write(&secret, vec![0x55; 1 << 16]).unwrap();
    for lay in lay {
        let _ = std::fs::remove_file(&path);
        lay();
        let peer = started(dir.path(), Again::same(&memory));
        assert!(!peer.said("will not survive"));
        assert!(std::fs::symlink_metadata(&path).unwrap().is_file());
        peer.leave();
    }
    assert_eq!(std::fs::read(secret).unwrap(), vec![0x55; 1 << 16]);
}

#[test]
fn without_a_directory_a_ring_works_and_says_so() {
    let peer = started(
        Path::new("/proc"),
        Again::same(&memfd::create("vu-test", 2 * SIZE).unwrap()),
    );
    assert!(peer.said("receiveq 0 will not survive a restart of the switch"));
    let missing = |peer: &Peer| peer.status.snapshot().rings[0].no_record.clone();
    assert!(missing(&peer).is_some_and(|why| why.contains("/proc")));
    peer.leave();
    // Nor is one missing that was made.
    let dir = dir();
    let memory = memfd::create("vu-test", 2 * SIZE).unwrap();
    let peer = started(dir.path(), Again::same(&memory));
    assert_eq!(missing(&peer), None);
    peer.leave();
}
