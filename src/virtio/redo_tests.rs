//! Kills processes after every single store to a packed ring or its record, and tests what the next
//! process makes of it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::panic::catch_unwind;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::driver::{Buffer, DriverRing, RingAreas, RingLayout, Used};
use super::redo::{IDENTITY, Redo};
use super::{Claim, ReceiveQueue, RingFeatures, RingSetup, Taken, TransmitQueue, Windows, mutants};
use crate::memory::{FaultMark, GuestMemory, RegionSpec, SharedMemory, Words, probe};

/// Guest address of the ring, and of what comes after it.
const START: u64 = 0x10_0000;
const DATA: u64 = 0x8000;
/// Bytes of a buffer in all its pieces.
const BUFFER: u64 = 256;
const IDENTITIES: [u64; IDENTITY] = [7; IDENTITY];
/// Length of the frames after a restart, unlike all before it.
const AFTER: u32 = 200;
/// Virtio-net header.
const HEADER: u32 = 12;

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// A copy of ring and record at one moment.
#[derive(Clone, PartialEq)]
struct Image {
    ring: Vec<u8>,
    words: Vec<u64>,
}

/// A ring in shared memory, and its record.
struct Place {
    memory: Arc<SharedMemory>,
    map: Arc<GuestMemory>,
    layout: RingLayout,
    features: RingFeatures,
    words: Words,
}

impl Place {
    fn new(size: u16, event_idx: bool) -> Place {
        let len = (DATA + BUFFER * u64::from(size)) as usize;
        let memory = SharedMemory::create(len.next_multiple_of(4096), true).unwrap();
        let map = GuestMemory::new(FaultMark::new());
        let region = RegionSpec {
            guest_addr: START,
            user_addr: START,
            size: memory.len() as u64,
            offset: 0,
            file: memory.file().try_clone().unwrap(),
        };
        let map = map.with_table(vec![region]).unwrap();
        let words = Words::zeroed(Redo::words(size));
        Redo::new(words.clone(), &IDENTITIES, 0x8000);
        Place {
            memory: Arc::new(memory),
            map: Arc::new(map),
            layout: RingLayout::new(size, true),
            features: RingFeatures {
                packed: true,
                event_idx,
                version_1: true,
                mergeable: true,
                ..RingFeatures::default()
            },
            words,
        }
    }

    /// A driver that has just started; it clears its ring.
    fn driver(&self) -> DriverRing<'_> {
        let window = self.memory.window(0, self.layout.len).unwrap();
        let areas = RingAreas::zeroed(window, &self.layout).unwrap();
        DriverRing::new(areas, self.features)
    }

    /// What the next process is told by its frontend: what the first process was told.
    fn setup(&self) -> RingSetup {
        let pin = |at: usize, len: usize| {
            let window = self.map.pinned_guest(START + at as u64, len as u64);
            window.unwrap()
        };
        let layout = &self.layout;
        RingSetup {
            size: layout.size,
            descriptors: pin(0, layout.descriptors_len),
            available: pin(layout.available, layout.available_len),
            used: pin(layout.used, layout.used_len),
            features: self.features,
            base: 0x8000,
            memory: Arc::clone(&self.map),
            redo: Redo::found(self.words.clone(), &IDENTITIES),
        }
    }

    fn image(&self) -> Image {
        image(&self.memory, self.layout.len, &self.words)
    }

    fn restore(&self, image: &Image) {
        let window = self.memory.window(0, image.ring.len()).unwrap();
        window.write_bytes(0, &image.ring);
        for (word, value) in self.words.iter().zip(&image.words) {
            word.store(*value, Ordering::Relaxed);
        }
    }

    /// Runs something. Returns the images that it would leave behind if it were killed before its
    /// first store, and after each of its stores.
    fn killed<R>(&self, run: impl FnOnce() -> R) -> (R, Vec<Image>) {
        let images = Rc::new(RefCell::new(vec![self.image()]));
        let look = {
            let (memory, words, images) = (
                Arc::clone(&self.memory),
                self.words.clone(),
                Rc::clone(&images),
            );
            let len = self.layout.len;
            move || images.borrow_mut().push(image(&memory, len, &words))
        };
        let result = probe::watched(look, run);
        (result, images.take())
    }
}

fn image(memory: &SharedMemory, len: usize, words: &Words) -> Image {
    let mut ring = vec![0; len];
    memory.window(0, len).unwrap().read_bytes(0, &mut ring);
    let words = words.iter().map(|word| word.load(Ordering::Relaxed));
    Image {
        ring,
        words: words.collect(),
    }
}

/// A driver, and the chains that it has posted, in order.
#[derive(Clone)]
struct Posted<'m> {
    ring: DriverRing<'m>,
    tokens: VecDeque<u32>,
    next: u32,
}

impl<'m> Posted<'m> {
    fn new(ring: DriverRing<'m>) -> Self {
        Posted {
            ring,
            tokens: VecDeque::new(),
            next: 0,
        }
    }

    /// Posts a chain of so many pieces.
    fn post(&mut self, pieces: u64, writable: bool) -> bool {
        let slots = u64::from(self.ring.free()) + u64::from(self.ring.outstanding());
        let token = self.next;
        let at = START + DATA + BUFFER * (u64::from(token) % slots.max(1));
        let piece = BUFFER / pieces;
        let buffers: Vec<Buffer> = (0..pieces)
            .map(|n| Buffer {
                address: at + n * piece,
                len: piece as u32,
                writable,
            })
            .collect();
        let posted = self.ring.post(&buffers, token);
        if posted {
            self.tokens.push_back(token);
            self.next += 1;
        }
        posted
    }

    /// Reaps everything. Chains must come back in the order in which they were posted, each once.
    fn reap(&mut self) -> Vec<Used> {
        let mut all = Vec::new();
        while let Some(used) = self.ring.reap() {
            assert_eq!(Some(used.token), self.tokens.pop_front());
            all.push(used);
        }
        assert_eq!(self.ring.fault(), None);
        all
    }

    fn is_idle(&self) -> bool {
        self.tokens.is_empty() && self.ring.outstanding() == 0
    }
}

/// A queue of either direction.
trait Queue: Sized {
    const WRITABLE: bool;
    fn start(setup: &RingSetup) -> Self;
    /// Returns everything that is available to the driver.
    fn use_all(&self);
}

impl Queue for ReceiveQueue {
    const WRITABLE: bool = true;

    fn start(setup: &RingSetup) -> Self {
        ReceiveQueue::start(setup).unwrap()
    }

    fn use_all(&self) {
        let mut claim = Claim::new();
        while self.claim(std::iter::once(AFTER), &mut claim).is_ok() {
            self.commit(&claim);
        }
    }
}

impl Queue for TransmitQueue {
    const WRITABLE: bool = false;

    fn start(setup: &RingSetup) -> Self {
        TransmitQueue::start(setup).unwrap()
    }

    fn use_all(&self) {
        take(self, usize::MAX);
        self.complete(self.position());
    }
}

fn take(queue: &TransmitQueue, most: usize) -> usize {
    let mut windows = Windows::<64>::new();
    let end = queue.available_to();
    let mut count = 0;
    while count < most && queue.take(end, &mut windows) != Taken::Nothing {
        windows.clear();
        count += 1;
    }
    count
}

/// What the driver has not yet done when the next process starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meanwhile {
    Nothing,
    /// It has reaped what it found, and filled its ring again.
    Posts,
}

/// The next process serves the driver, from what the killed one left in memory. It must return
/// every chain once and in order, and go on doing so. Of the run that was being published, `run`,
/// the driver must find all or nothing.
fn serve<Q: Queue>(place: &Place, driver: &Posted<'_>, run: &[Used], meanwhile: Meanwhile) {
    let mut driver = driver.clone();
    let mut came = driver.reap();
    if meanwhile == Meanwhile::Posts {
        while driver.post(1, Q::WRITABLE) {}
        driver.ring.publish();
    }
    let queue = Q::start(&place.setup());
    came.extend(driver.reap());
    assert!(came.is_empty() || came == run, "{came:?} came of {run:?}");
    queue.use_all();
    let rest = driver.reap();
    assert!(driver.is_idle(), "{} chains are lost", driver.tokens.len());
    if Q::WRITABLE {
        assert!(rest.iter().all(|used| used.len == AFTER + HEADER));
    }
    for pieces in [1, 2, 1] {
        while driver.post(pieces, Q::WRITABLE) {}
        driver.ring.publish();
        queue.use_all();
        driver.reap();
        assert!(driver.is_idle());
    }
}

/// Restarts from every image: with the driver that was there, once more after the next process was
/// killed too, and with a driver that has started anew meanwhile.
fn survive<Q: Queue>(place: &Place, driver: &Posted<'_>, images: &[Image], run: &[Used]) {
    let now = place.image();
    for image in images {
        place.restore(image);
        let (_, again) = place.killed(|| Q::start(&place.setup()));
        for meanwhile in [Meanwhile::Nothing, Meanwhile::Posts] {
            for second in [image].into_iter().chain(&again) {
                place.restore(second);
                serve::<Q>(place, driver, run, meanwhile);
            }
        }
        place.restore(image);
        let mut anew = Posted::new(place.driver());
        anew.post(2, Q::WRITABLE);
        while anew.post(1, Q::WRITABLE) {}
        anew.ring.publish();
        let (_, again) = place.killed(|| Q::start(&place.setup()));
        for second in &again {
            place.restore(second);
            serve::<Q>(place, &anew, &[], Meanwhile::Nothing);
        }
    }
    place.restore(&now);
}

/// Posts what fits, in chains of one to three descriptors.
fn fill(driver: &mut Posted<'_>, random: &mut Random, writable: bool) {
    for _ in 0..1 + random.below(8) {
        driver.post(1 + random.below(3), writable);
    }
    driver.ring.publish();
}

/// Ring sizes, and whether there is an event index.
const RINGS: [(u16, bool); 6] = [
    (1, true),
    (2, false),
    (3, true),
    (5, false),
    (7, true),
    (8, false),
];

/// Kills the process of a receiveq at every store of `turns` commits, while other claims are open,
/// filled or not.
fn check_receiveq(size: u16, event_idx: bool, turns: u32) -> usize {
    let mut runs = 0;
    let mut random = Random(0x9e37_79b9 + u64::from(size));
    let place = Place::new(size, event_idx);
    let mut driver = Posted::new(place.driver());
    let queue = ReceiveQueue::start(&place.setup()).unwrap();
    let mut open: Vec<Claim<'_>> = Vec::new();
    for turn in 0..turns {
        fill(&mut driver, &mut random, true);
        let mut claim = Claim::new();
        // Now and then a frame takes several buffers. The driver must see such a frame as a whole.
        let longest = if random.below(4) == 0 { 600 } else { 60 + turn };
        let lengths = vec![longest; 1 + random.below(3) as usize];
        if queue.claim(lengths.into_iter(), &mut claim).is_ok() {
            open.push(claim);
        }
        if open.is_empty() || random.below(3) == 0 {
            continue;
        }
        // Committed in any order, so that runs have several claims.
        let claim = open.swap_remove(random.below(open.len() as u64) as usize);
        let before = driver.clone();
        let (_, images) = place.killed(|| queue.commit(&claim));
        let run = driver.reap();
        runs += usize::from(run.len() > 1);
        survive::<ReceiveQueue>(&place, &before, &images, &run);
    }
    runs
}

/// Kills the process of a transmitq at every store of its completions, and while it goes to sleep
/// and awakes.
fn check_transmitq(size: u16, event_idx: bool, turns: u32) {
    let mut random = Random(0x1234_5678 + u64::from(size));
    let place = Place::new(size, event_idx);
    let mut driver = Posted::new(place.driver());
    let queue = TransmitQueue::start(&place.setup()).unwrap();
    for _ in 0..turns {
        fill(&mut driver, &mut random, false);
        take(&queue, 1 + random.below(4) as usize);
        let before = driver.clone();
        let act = random.below(4);
        let (_, images) = place.killed(|| match act {
            0 => {}
            1 => drop(queue.arm()),
            2 => queue.disarm(),
            _ => drop(queue.complete(queue.position())),
        });
        let run = driver.reap();
        survive::<TransmitQueue>(&place, &before, &images, &run);
    }
}

/// Kills a process after it has made a record and before it has started the ring. An earlier
/// process had left the ring elsewhere. The frontend knows where, because it asked.
fn check_new_record(size: u16) {
    for at in 0..2 * u64::from(size) {
        let place = Place::new(size, true);
        let mut driver = Posted::new(place.driver());
        let queue = ReceiveQueue::start(&place.setup()).unwrap();
        for _ in 0..at {
            driver.post(1, true);
            driver.ring.publish();
            queue.use_all();
            driver.reap();
        }
        let base = queue.base();
        Redo::new(place.words.clone(), &IDENTITIES, base as u16);
        while driver.post(1, true) {}
        driver.ring.publish();
        let setup = RingSetup {
            base,
            ..place.setup()
        };
        let queue = ReceiveQueue::start(&setup).unwrap();
        assert_eq!(queue.base(), base);
        queue.use_all();
        driver.reap();
        assert!(driver.is_idle());
    }
}

/// A record that names a run, but not its elements: the ring starts where its frontend says, and
/// nothing is written.
fn check_notes() {
    let place = Place::new(8, true);
    let mut driver = Posted::new(place.driver());
    drop(ReceiveQueue::start(&place.setup()).unwrap());
    while driver.post(1, true) {}
    driver.ring.publish();
    // Notes that are missing; missing in part; of more descriptors than the run has; of more than
    // the ring has.
    let (used, long) = (4 << 48, 5 << 48);
    let endless = [used, long, u64::from(u16::MAX), 0];
    let longer = [long, 2, long, 2];
    for notes in [[0; 4], [used, 0, used, 0], longer, endless] {
        let redo = Redo::found(place.words.clone(), &IDENTITIES).unwrap();
        redo.begin(0x8000, 3);
        for (slot, note) in notes.into_iter().enumerate() {
            redo.set_note(slot, note);
        }
        let before = place.image();
        let queue = ReceiveQueue::start(&place.setup()).unwrap();
        assert_eq!(queue.base(), 0x8000_8000);
        let written = |image: &Image| image.ring[..8 * 16].to_vec();
        assert_eq!(written(&place.image()), written(&before));
        place.restore(&before);
    }
}

#[test]
fn a_receiveq_goes_on_wherever_its_process_was_killed() {
    let rings = RINGS.into_iter();
    let runs: usize = rings
        .map(|(size, event)| check_receiveq(size, event, 60))
        .sum();
    assert!(runs > 20, "{runs} runs of several elements");
}

#[test]
fn a_transmitq_goes_on_wherever_its_process_was_killed() {
    for (size, event_idx) in RINGS {
        check_transmitq(size, !event_idx, 60);
    }
}

#[test]
fn a_ring_with_a_new_record_starts_where_its_frontend_says() {
    for size in [1, 3, 8] {
        check_new_record(size);
    }
}

#[test]
fn a_run_without_notes_is_not_believed() {
    check_notes();
}

#[test]
fn every_deliberate_mistake_is_found() {
    let find = || {
        check_new_record(3);
        check_notes();
        for event_idx in [false, true] {
            check_receiveq(5, event_idx, 40);
            check_transmitq(5, event_idx, 40);
        }
    };
    let missed = mutants::ALL.into_iter().filter(|mutant| {
        mutants::make(Some(*mutant));
        let found = catch_unwind(find);
        mutants::make(None);
        println!(
            "{mutant:?}: {}",
            if found.is_err() { "found" } else { "missed" }
        );
        found.is_ok()
    });
    assert_eq!(missed.collect::<Vec<_>>(), []);
    find();
}

#[test]
fn a_record_that_nobody_wrote_harms_nobody() {
    let mut random = Random(0x0bad_cafe);
    for size in [1, 3, 8] {
        let place = Place::new(size, true);
        let mut driver = Posted::new(place.driver());
        drop(ReceiveQueue::start(&place.setup()).unwrap());
        while driver.post(1, true) {}
        driver.ring.publish();
        let image = place.image();
        for round in 0..500 {
            place.restore(&image);
            for word in place.words.iter().skip(IDENTITY) {
                let value = random.below(u64::MAX) >> random.below(64);
                word.store(value, Ordering::Relaxed);
            }
            if round % 2 == 0 {
                // A run that begins where there is something, of notes that pass for such.
                let redo = Redo::found(place.words.clone(), &IDENTITIES).unwrap();
                for slot in 0..usize::from(size) {
                    redo.set_note(slot, random.below(u64::MAX) | 4 << 48);
                }
                redo.begin(
                    0x8000 | random.below(u64::from(size)) as u16,
                    1 + random.below(4) as u16,
                );
            }
            let queue = ReceiveQueue::start(&place.setup()).unwrap();
            queue.use_all();
            let queue = TransmitQueue::start(&place.setup()).unwrap();
            queue.use_all();
        }
    }
}
