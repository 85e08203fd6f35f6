//! Ring memory that another thread rewrites while the device reads it.

use std::collections::HashSet;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);
/// Rounds of every race; after every eighth the writer waits, and what came back is looked at.
const ROUNDS: usize = 400;
const LOOK: usize = 8;

// What a writer does: it writes, it writes once more and waits, it waits, it ends.
const WRITES: usize = 0;
const IS_TO_WAIT: usize = 1;
const WAITS: usize = 2;
const ENDS: usize = 3;

/// A thread that writes all the time, unless it is told to wait.
struct Writer<'s>(&'s AtomicUsize);

impl<'s> Writer<'s> {
    fn start<'scope>(
        scope: &'scope std::thread::Scope<'scope, '_>,
        state: &'scope AtomicUsize,
        mut write: impl FnMut(usize) + Send + 'scope,
    ) -> Writer<'scope> {
        scope.spawn(move || {
            for turn in 0.. {
                match state.load(Ordering::Acquire) {
                    ENDS => return,
                    WAITS => std::thread::yield_now(),
                    WRITES => write(turn),
                    _ => {
                        write(turn);
                        let (order, failed) = (Ordering::AcqRel, Ordering::Relaxed);
                        // Or it is to end meanwhile.
                        let _ = state.compare_exchange(IS_TO_WAIT, WAITS, order, failed);
                    }
                }
            }
        });
        Writer(state)
    }

    /// Waits until the thread writes no more.
    fn pause(&self) {
        self.0.store(IS_TO_WAIT, Ordering::Release);
        while self.0.load(Ordering::Acquire) != WAITS {
            std::thread::yield_now();
        }
    }

    fn go_on(&self) {
        self.0.store(WRITES, Ordering::Release);
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        self.0.store(ENDS, Ordering::Release);
    }
}

/// What is rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Addr,
    Len,
    Flags,
    /// Of a packed descriptor.
    Id,
    /// Of a split descriptor with NEXT.
    Next,
    /// The entry of a split available ring.
    Head,
}

/// One race: a ring whose first descriptor flips.
#[derive(Clone, Copy, Debug)]
struct Race {
    packed: bool,
    write: bool,
    /// SET_VRING_BASE: the wrap counter of a packed ring.
    base: u16,
    field: Field,
}

impl Race {
    fn all() -> Vec<Race> {
        use Field::*;
        let split = [Addr, Len, Flags, Next, Head].map(|field| (false, 0, field));
        let packed = |base| [Addr, Len, Flags, Id].map(|field| (true, base, field));
        let races = [&split[..], &packed(0x8000), &packed(0)].concat();
        let make = |write| {
            let races = races.iter();
            races.map(move |&(packed, base, field)| Race {
                packed,
                write,
                base,
                field,
            })
        };
        make(false).chain(make(true)).collect()
    }

    fn direction(&self) -> u16 {
        if self.write { WRITE } else { 0 }
    }

    /// The flags of a packed descriptor that is available.
    fn available(&self) -> u16 {
        match (self.packed, self.base) {
            (false, _) => 0,
            (true, 0) => USED,
            (true, _) => AVAIL,
        }
    }

    fn values(&self) -> Vec<u64> {
        let flags = self.direction() | self.available();
        match self.field {
            Field::Addr => vec![GOOD, GOOD + 0x1_0000, HOLE, u64::MAX - 10, SEAM - 50],
            Field::Len => vec![96, 2048, 0, u32::MAX.into(), 71, 1 << 20],
            Field::Flags => {
                let lap = if self.packed { AVAIL | USED } else { 0 };
                let others = [0, NEXT, INDIRECT, WRITE, NEXT | INDIRECT, lap];
                others.map(|other| (flags ^ other).into()).to_vec()
            }
            Field::Id => vec![0, 7, SIZE.into(), 0xffff],
            Field::Next | Field::Head => vec![1, 0, 7, SIZE.into(), 0xffff],
        }
    }

    fn store(&self, guest: &Guest, value: u64) {
        let areas = guest.areas();
        let ring = &areas.descriptors;
        let word = |offset| ring.store_u16(offset, value as u16, Ordering::Relaxed);
        match self.field {
            Field::Addr => ring.store_u64(0, value, Ordering::Relaxed),
            Field::Len => ring.store_u32(8, value as u32, Ordering::Relaxed),
            Field::Flags if self.packed => word(14),
            Field::Flags | Field::Id => word(12),
            Field::Next => word(14),
            Field::Head => areas
                .available
                .store_u16(ENTRIES, value as u16, Ordering::Relaxed),
        }
    }

    /// A ring that starts anew, with four chains; the first one is what flips.
    fn post(&self, guest: &Guest) {
        let mut driver = guest.driver_at(self.base);
        // What stands behind a link is looked at where more bytes are wanted.
        let whole = self.write && self.field != Field::Next;
        let piece = |n: u64| Piece {
            addr: GOOD + 0x1000 * n,
            len: if whole || self.write && n > 0 {
                ROOM
            } else {
                96
            },
            flags: self.direction(),
        };
        if self.field == Field::Next {
            let driver = driver.split();
            let head = driver.prepare(&[piece(0)], NEXT, 1);
            driver.offer_raw(head);
        } else {
            driver.post(&[piece(0)]);
        }
        for n in 1..4 {
            driver.post(&[piece(n)]);
        }
    }

    /// The ids and lengths of used elements from the first descriptor on, `count` positions.
    fn used(&self, guest: &Guest, count: u64) -> Vec<(u16, u32)> {
        let areas = guest.areas();
        let load = |at, split: bool| {
            let area = if split {
                &areas.used
            } else {
                &areas.descriptors
            };
            area.load_u32(at, Ordering::Relaxed)
        };
        if self.packed {
            // A chain's other descriptors stay as they are: only the first one's element is sure to
            // be there.
            let flags = areas.descriptors.load_u16(14, Ordering::Relaxed);
            let lap = if self.base == 0 { 0 } else { AVAIL | USED };
            assert_eq!(flags & (AVAIL | USED), lap, "used in its lap");
            return vec![(load(12, false) as u16, load(8, false))];
        }
        let idx = areas.used.load_u16(IDX, Ordering::Relaxed);
        assert_eq!(u64::from(idx), count);
        let element = |n: usize| ENTRIES + 8 * n;
        (0..count as usize)
            .map(|n| (load(element(n), true) as u16, load(element(n) + 4, true)))
            .collect()
    }

    /// Ids that may come back: those written, or those of the chains behind the first one.
    fn check_ids(&self, used: &[(u16, u32)]) {
        let written = self.values();
        for &(id, len) in used {
            let of_field = matches!(self.field, Field::Id | Field::Head);
            assert!(id < 4 || of_field && written.contains(&id.into()), "{id}");
            assert!(self.packed || id < SIZE, "a head outside of the table");
            assert!(self.write || len == 0);
        }
    }

    fn run(self) {
        let guest = Guest::new(SIZE, features(self.packed));
        // Where a buffer is taken for a table, that has six entries.
        let entries = [Piece {
            addr: GOOD + 0x8000,
            len: 60,
            flags: self.direction(),
        }; 6];
        let guard = frame(0xa5, 0x1000);
        guest.write(DATA, &guard);
        let state = AtomicUsize::new(WAITS);
        let mut outcomes = HashSet::new();
        std::thread::scope(|scope| {
            let values = self.values();
            let (race, guest, of_writer) = (&self, &guest, values.clone());
            let writer = Writer::start(scope, &state, move |turn| {
                race.store(guest, of_writer[turn % of_writer.len()]);
            });
            for round in 0..ROUNDS {
                guest.table(GOOD, &entries);
                self.post(guest);
                // Each value in turn, also in the rounds that are looked at.
                self.store(guest, values[(round + round / LOOK) % values.len()]);
                writer.go_on();
                let look = (round % LOOK == 0).then_some(&writer);
                let outcome = if self.write {
                    self.receive(guest, look)
                } else {
                    self.transmit(guest, look)
                };
                outcomes.insert(outcome);
            }
        });
        assert!(outcomes.len() > 1, "{self:?}: {outcomes:?}");
        assert_eq!(guest.read(DATA, 0x1000), guard);
    }

    fn transmit(&self, guest: &Guest, look: Option<&Writer<'_>>) -> String {
        let queue = TransmitQueue::start(&guest.setup(self.base.into())).unwrap();
        let mut windows = Pieces::new();
        let taken = take(&queue, queue.available_to(), &mut windows);
        let sum: usize = windows.iter().map(|window| window.len()).sum();
        match taken {
            Taken::Chain { len } => assert_eq!(sum, len as usize, "{self:?}"),
            _ => assert_eq!(sum, 0, "{self:?}: {taken:?}"),
        }
        let mut first = [0; 16];
        for window in windows.iter() {
            // Any of it may be read.
            window.read_bytes(0, &mut first[..window.len().min(16)]);
            window.read_bytes(window.len() - 1, &mut first[..1]);
        }
        let count = queue.position() - queue.completed();
        assert_eq!(count == 0, taken == Taken::Nothing, "{self:?}");
        if let Some(writer) = look {
            writer.pause();
        }
        let mut used = Vec::new();
        if queue.complete(queue.position()) && look.is_some() {
            used = self.used(guest, count);
            self.check_ids(&used);
        }
        format!("{taken:?} {used:?} {:?}", queue.broken())
    }

    fn receive(&self, guest: &Guest, look: Option<&Writer<'_>>) -> String {
        let queue = ReceiveQueue::start(&guest.setup(self.base.into())).unwrap();
        let bytes = frame(1, 300);
        let mut claim = Claim::new();
        let claimed = queue.claim([300].into_iter(), &mut claim);
        let Ok(()) = claimed else {
            return format!("{claimed:?} {:?}", queue.broken());
        };
        // Exactly header and frame find room.
        if claim.frames() > 0 {
            fill(&claim, 0, &bytes);
        }
        if let Some(writer) = look {
            writer.pause();
        }
        let count = claim.span();
        queue.commit(&claim);
        assert_eq!(queue.published(), claim.end());
        if look.is_none() {
            return format!("{} {}", claim.frames(), claim.bad_buffers());
        }
        let used = self.used(guest, count);
        self.check_ids(&used);
        let sum: u32 = used.iter().map(|(_, len)| len).sum();
        let written = if claim.frames() > 0 { 312 } else { 0 };
        assert!(if self.packed {
            sum <= written
        } else {
            sum == written
        });
        format!("{used:?} {}", claim.bad_buffers())
    }
}

#[test]
fn a_descriptor_that_flips_is_used_as_it_was_read_once() {
    for race in Race::all() {
        race.run();
    }
}

/// Entries that name every descriptor in turn, all of them good buffers.
fn fill_split_ring(guest: &Guest, write: bool) {
    let driver = guest.driver();
    let Driver::Split(driver) = driver else {
        unreachable!("a split ring");
    };
    for head in 0..SIZE {
        let addr = GOOD + 0x1000 * u64::from(head);
        let piece = if write {
            writable(addr, ROOM)
        } else {
            readable(addr, GOOD_LEN)
        };
        driver.write_raw(head, piece, piece.flags, 0);
        let slot = ENTRIES + 2 * usize::from(head);
        driver
            .areas
            .available
            .store_u16(slot, head, Ordering::Relaxed);
    }
}

/// The elements of `[from, to)` name the descriptors in turn, and the index is where it belongs.
fn check_elements(guest: &Guest, from: u64, to: u64, len: u32) {
    let used = guest.areas().used;
    assert_eq!(used.load_u16(IDX, Ordering::Relaxed), to as u16);
    for position in from..to {
        let slot = position % u64::from(SIZE);
        let at = ENTRIES + 8 * slot as usize;
        assert_eq!(u64::from(used.load_u32(at, Ordering::Relaxed)), slot);
        assert_eq!(used.load_u32(at + 4, Ordering::Relaxed), len);
    }
}

/// Runs `pass` on a ring whose available index another thread moves to and fro, until it has moved
/// a thousand buffers and found the ring broken ten times; `pass` says how many it moved, and
/// whether the ring is broken.
fn oscillating_index(write: bool, mut pass: impl FnMut(&Guest, bool) -> (u64, bool)) {
    let guest = Guest::new(SIZE, features(false));
    fill_split_ring(&guest, write);
    let state = AtomicUsize::new(WRITES);
    let (mut moved, mut broken, mut is_broken) = (0, 0, true);
    std::thread::scope(|scope| {
        let areas = guest.areas();
        let _writer = Writer::start(scope, &state, move |turn| {
            // Mostly possible, sometimes behind what was used already, or too far ahead.
            let step = [1, 8, 3, 0, 5, 2, 7, 4, 6, 1, 0, 3, 8, 9, 1, 65535][turn % 16];
            let idx = areas
                .used
                .load_u16(IDX, Ordering::Acquire)
                .wrapping_add(step);
            areas.available.store_u16(IDX, idx, Ordering::Release);
        });
        let start = Instant::now();
        while moved < 1000 || broken < 10 {
            assert!(start.elapsed() < PATIENCE, "{moved} moved, broken {broken}");
            let (count, now_broken) = pass(&guest, is_broken);
            is_broken = now_broken;
            if count == 0 {
                std::thread::yield_now();
            }
            moved += count;
            broken += u64::from(is_broken);
        }
    });
}

/// The index moves somewhat more than a ring ahead of `position`.
fn move_past_the_ring(guest: &Guest, position: u64) {
    let idx = position + u64::from(SIZE) + 1 + position % 3;
    let available = guest.areas().available;
    available.store_u16(IDX, idx as u16, Ordering::Release);
}

#[test]
fn an_available_index_that_moves_to_and_fro_makes_no_chain_be_taken_twice() {
    let mut queue = None;
    oscillating_index(false, |guest, anew| {
        if anew {
            queue = Some(start_transmit(guest));
        }
        let queue = queue.as_ref().unwrap();
        let before = queue.position();
        // The second burst finds another index while the first is in flight.
        let mut found = take_burst(queue);
        move_past_the_ring(guest, before);
        found.extend(take_burst(queue));
        assert_eq!(queue.position() - before, found.len() as u64);
        assert!(found.iter().all(|taken| *taken == chain(GOOD_LEN)));
        // What is in flight is a ring at most: no descriptor twice.
        assert!(queue.position() - queue.completed() <= u64::from(SIZE));
        if let Some(broken) = queue.broken() {
            // Nothing more of it, and the same reason, whatever the index is now.
            let position = queue.position();
            assert_eq!(take_burst(queue), []);
            assert!(queue.arm());
            assert_eq!((queue.broken(), queue.position()), (Some(broken), position));
        }
        // All of it comes back, one half after the other.
        let (from, to) = (queue.completed(), queue.position());
        for end in [from + (to - from) / 2, to] {
            queue.complete(end);
            check_elements(guest, from, end, 0);
        }
        (found.len() as u64, queue.broken().is_some())
    });
}

#[test]
fn an_available_index_that_moves_to_and_fro_makes_no_buffer_be_filled_twice() {
    let mut queue = None;
    oscillating_index(true, |guest, anew| {
        if anew {
            queue = Some(start_receive(guest));
        }
        let queue = queue.as_ref().unwrap();
        let from = queue.published();
        let frame_at = |position: u64| frame(position as u8, 300);
        // The second claim finds another index while the first is open.
        let mut claims = Vec::new();
        for count in [3, usize::from(SIZE)] {
            let mut claim = Claim::new();
            let lengths = std::iter::repeat_n(300, count);
            let claimed = queue.claim(lengths, &mut claim);
            move_past_the_ring(guest, from);
            if claimed.is_ok() {
                for (index, position) in (claim.end() - claim.span()..claim.end()).enumerate() {
                    fill(&claim, index, &frame_at(position));
                }
                claims.push(claim);
            }
        }
        let to = from + claims.iter().map(Claim::span).sum::<u64>();
        assert!(to - from <= u64::from(SIZE), "a buffer is in two claims");
        for claim in claims.iter().rev() {
            queue.commit(claim);
        }
        assert_eq!(queue.published(), to);
        check_elements(guest, from, to, 312);
        for position in from..to {
            let addr = GOOD + 0x1000 * (position % u64::from(SIZE));
            assert_eq!(guest.read(addr + HEADER as u64, 300), frame_at(position));
        }
        let broken = queue.broken();
        if broken.is_some() {
            let refused = deliver(queue, &[frame_at(to)]);
            assert_eq!(refused, (0, Some(NoClaim::Broken)));
            assert_eq!((queue.broken(), queue.published()), (broken, to));
        }
        (to - from, broken.is_some())
    });
}

#[test]
fn a_used_ring_that_another_thread_rewrites_during_deliveries_is_never_read_back() {
    let guest = Guest::new(SIZE, features(false));
    fill_split_ring(&guest, true);
    let queue = start_receive(&guest);
    let areas = guest.areas();
    let state = AtomicUsize::new(WRITES);
    std::thread::scope(|scope| {
        let writer = Writer::start(scope, &state, move |turn| {
            for offset in (0..areas.used.len() - 1).step_by(2) {
                areas.used.store_u16(offset, turn as u16, Ordering::Relaxed);
            }
        });
        let mut deliver_one = |turn: u16| {
            let idx = turn.wrapping_add(1);
            areas.available.store_u16(IDX, idx, Ordering::Release);
            let frame = frame(turn as u8, 300);
            assert_eq!(deliver(&queue, std::slice::from_ref(&frame)), (1, None));
            let addr = GOOD + 0x1000 * u64::from(turn % SIZE);
            assert_eq!(guest.read(addr + HEADER as u64, 300), frame);
            assert_eq!(queue.published(), u64::from(idx));
        };
        (0..2000).for_each(&mut deliver_one);
        writer.pause();
        (2000..2000 + SIZE).for_each(deliver_one);
        check_elements(&guest, 2000, 2000 + u64::from(SIZE), 312);
    });
    assert_eq!(queue.broken(), None);
}
