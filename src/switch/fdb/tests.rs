//! Units, a random comparison with a `HashMap`, and real threads.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

use super::*;
use crate::random_tests::{Random, with_seeds};

const A: PortRef = PortRef {
    slot: 1,
    generation: 7,
};
const B: PortRef = PortRef {
    slot: 2,
    generation: 9,
};

fn mac(n: u64) -> Mac {
    Mac::from_bits(0x5254_0000_0000 | n)
}

fn fdb(config: FdbConfig) -> Fdb {
    Fdb::new(config).unwrap()
}

fn small() -> Fdb {
    fdb(FdbConfig::with_capacity(64))
}

fn reclaim_all(fdb: &Fdb) -> usize {
    fdb.retired().map_or(0, |mark| fdb.reclaim(mark))
}

/// The counts agree with the cells. For quiet tables only.
fn assert_counts(fdb: &Fdb) {
    let table = &fdb.table;
    let keys =
        (0..table.cells()).filter(|&cell| Key::from_word(table.key(cell).load(SeqCst)).is_some());
    assert_eq!(fdb.len(), keys.count());
    let mut ports: HashMap<PortRef, u32> = HashMap::new();
    for (_, _, value) in fdb.live_cells() {
        *ports.entry(value.port()).or_default() += u32::from(!value.is_static());
    }
    for (port, count) in ports {
        assert_eq!(fdb.limits.count(port), count, "{port:?}");
    }
}

#[test]
fn an_address_is_found_where_it_was_learned() {
    let fdb = small();
    assert_eq!(fdb.lookup(0, mac(1)), None);
    assert_eq!(fdb.learn(0, mac(1), A, 0), Learned::New);
    assert_eq!(fdb.lookup(0, mac(1)), Some(A));
    assert_eq!(fdb.lookup(0, mac(2)), None);
    assert_eq!(fdb.len(), 1);
}

#[test]
fn what_was_learned_at_ports_that_are_forgotten_goes_and_nothing_else() {
    let fdb = small();
    let c = PortRef {
        slot: 3,
        generation: 1,
    };
    for (n, port) in (1..).zip([A, A, B, c]) {
        fdb.learn(0, mac(n), port, 0);
    }
    fdb.insert_static(0, mac(5), A).unwrap();
    assert_eq!(fdb.static_port(0, mac(5)), Some(A));
    assert_eq!(fdb.static_port(0, mac(1)), None);
    assert_eq!((fdb.learned(A), fdb.learned(B)), (2, 1));
    assert_eq!(fdb.forget(&[A, c]), 3);
    let found = (1..=5).map(|n| fdb.lookup(0, mac(n)));
    let left = [None, None, Some(B), None, Some(A)];
    assert_eq!(found.collect::<Vec<_>>(), left);
    assert_eq!(fdb.learned(A), 0);
    assert_counts(&fdb);
    // The ports are still there.
    reclaim_all(&fdb);
    assert_eq!(fdb.learn(0, mac(1), A, 1), Learned::New);
}

#[test]
fn moves_are_counted_and_the_last_one_of_an_address_is_told_once() {
    let fdb = small();
    fdb.learn(0, mac(1), A, 0);
    fdb.learn(0, mac(2), A, 0);
    assert_eq!(fdb.take_moves(), []);
    for port in [B, A, B] {
        assert_eq!(fdb.learn(0, mac(1), port, 0), Learned::Moved);
    }
    let told = |times| Move {
        mac: mac(1),
        from: A,
        to: B,
        times,
    };
    assert_eq!(fdb.take_moves(), [told(3)]);
    assert_eq!(fdb.take_moves(), []);
    assert_eq!((fdb.moves_to(A), fdb.moves_to(B)), (1, 2));
    assert_eq!(fdb.happened(), [("learned", 2), ("moved", 3), ("aged", 0)]);
    // What stays where it is, and what may not move, moves nothing.
    fdb.learn(0, mac(1), B, 0);
    fdb.insert_static(0, mac(2), A).unwrap();
    assert_eq!(fdb.learn(0, mac(2), B, 0), Learned::Static);
    assert_eq!(fdb.take_moves(), []);
    // The next tenant of the slot begins at zero.
    fdb.port_removed(B);
    assert_eq!(fdb.moves_to(B), 0);
}

#[test]
fn the_same_address_in_two_vlans_is_two_entries() {
    let fdb = small();
    fdb.learn(1, mac(1), A, 0);
    fdb.learn(4095, mac(1), B, 0);
    assert_eq!(fdb.lookup(1, mac(1)), Some(A));
    assert_eq!(fdb.lookup(4095, mac(1)), Some(B));
    assert_eq!(fdb.lookup(2, mac(1)), None);
}

#[test]
fn extreme_slots_generations_and_addresses_survive_the_packing() {
    let fdb = small();
    let port = PortRef {
        slot: MAX_SLOTS as u16 - 1,
        generation: i32::MAX as u32,
    };
    fdb.learn(4095, Mac::BROADCAST, port, u32::MAX);
    let entry = fdb.entries(u32::MAX).remove(0);
    assert_eq!(
        (entry.vlan, entry.mac, entry.port),
        (4095, Mac::BROADCAST, port)
    );
}

#[test]
fn time_is_noted_once_a_second_and_never_backwards() {
    let fdb = small();
    fdb.learn(0, mac(1), A, 5);
    assert_eq!(fdb.learn(0, mac(1), A, 5), Learned::Known);
    assert_eq!(fdb.learn(0, mac(1), A, 6), Learned::Refreshed);
    assert_eq!(fdb.learn(0, mac(1), A, 5), Learned::Known);
    assert_eq!(fdb.entries(8)[0].age_s, 2);
    assert_eq!(fdb.entries(5)[0].age_s, 0);
}

#[test]
fn an_entry_ages_from_its_last_frame_also_across_the_wrap_of_the_clock() {
    let fdb = small();
    let start = u32::MAX - 100;
    fdb.learn(0, mac(1), A, start);
    fdb.learn(0, mac(1), A, start.wrapping_add(50));
    assert_eq!(fdb.age(start.wrapping_add(349)), 0);
    assert_eq!(fdb.age(start.wrapping_add(350)), 1);
    assert_eq!(fdb.lookup(0, mac(1)), None);
    assert_counts(&fdb);
}

#[test]
fn without_ageing_time_nothing_ages() {
    let fdb = small();
    fdb.set_ageing(Duration::ZERO);
    fdb.learn(0, mac(1), A, 0);
    assert_eq!(fdb.age(1 << 30), 0);
    fdb.set_ageing(Duration::from_millis(1));
    assert_eq!(fdb.age(1), 1);
}

#[test]
fn a_station_that_moves_is_found_at_its_new_port() {
    let fdb = small();
    fdb.learn(0, mac(1), A, 0);
    assert_eq!(fdb.learn(0, mac(1), B, 0), Learned::Moved);
    assert_eq!(fdb.lookup(0, mac(1)), Some(B));
    assert_eq!((fdb.limits.count(A), fdb.limits.count(B)), (0, 1));
}

#[test]
fn moves_are_limited_each_second_at_the_port_that_takes() {
    let fdb = fdb(FdbConfig {
        moves_per_second: 2,
        ..FdbConfig::default()
    });
    for n in 0..4 {
        fdb.learn(0, mac(n), A, 10);
    }
    assert_eq!(fdb.learn(0, mac(0), B, 10), Learned::Moved);
    assert_eq!(fdb.learn(0, mac(1), B, 10), Learned::Moved);
    assert_eq!(fdb.learn(0, mac(2), B, 10), Learned::MoveLimited);
    assert_eq!(fdb.lookup(0, mac(2)), Some(A));
    // The victim has moves of its own and takes its addresses back.
    assert_eq!(fdb.learn(0, mac(0), A, 10), Learned::Moved);
    assert_eq!(fdb.learn(0, mac(2), B, 9), Learned::MoveLimited);
    assert_eq!(fdb.learn(0, mac(2), B, 11), Learned::Moved);
}

#[test]
fn a_port_that_invents_addresses_meets_its_own_quota() {
    let fdb = fdb(FdbConfig {
        per_port: 3,
        ..FdbConfig::default()
    });
    for n in 0..3 {
        assert_eq!(fdb.learn(0, mac(n), A, 0), Learned::New);
    }
    assert_eq!(fdb.learn(0, mac(3), A, 0), Learned::Quota);
    assert_eq!(fdb.learn(0, mac(3), B, 0), Learned::New);
    assert_eq!(
        fdb.learn(0, mac(3), A, 0),
        Learned::Quota,
        "moves count too"
    );
    assert_eq!(fdb.lookup(0, mac(3)), Some(B));
    assert_eq!(fdb.lookup(0, mac(0)), Some(A));
    fdb.remove(0, mac(0));
    assert_eq!(fdb.learn(0, mac(4), A, 0), Learned::New);
    assert_counts(&fdb);
}

#[test]
fn a_full_table_refuses_newcomers_and_keeps_its_entries() {
    let fdb = fdb(FdbConfig {
        per_port: 64,
        ..FdbConfig::with_capacity(64)
    });
    for n in 0..64 {
        assert_eq!(fdb.learn(0, mac(n), A, 0), Learned::New, "{n}");
    }
    assert_eq!(fdb.learn(0, mac(64), B, 0), Learned::Full);
    assert_eq!(fdb.limits.count(B), 0);
    assert!((0..64).all(|n| fdb.lookup(0, mac(n)) == Some(A)));
}

#[test]
fn a_table_fills_to_its_capacity_whatever_the_pattern_of_addresses() {
    let patterns: [fn(u64) -> u64; 5] = [
        |n| n,
        |n| n << 11,
        |n| n << 24,
        |n| n << 34,
        |n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16,
    ];
    let config = FdbConfig {
        per_port: 8192,
        ..FdbConfig::default()
    };
    for pattern in patterns {
        for _ in 0..4 {
            let fdb = fdb(config.clone());
            let refused = (0..8192)
                .filter(|&n| fdb.learn(0, Mac::from_bits(pattern(n)), A, 0) != Learned::New)
                .count();
            assert_eq!(refused, 0);
        }
    }
}

#[test]
fn sizes_out_of_range_are_refused_with_the_range() {
    for capacity in [0, 63, (1 << 22) + 1] {
        let error = Fdb::new(FdbConfig::with_capacity(capacity)).unwrap_err();
        assert_eq!(error, FdbError::Capacity(capacity));
        assert!(error.to_string().ends_with("64 to 4194304"));
    }
}

#[test]
fn flushing_a_port_leaves_the_others_and_if_asked_static_entries() {
    let fdb = small();
    fdb.learn(0, mac(1), A, 0);
    fdb.learn(0, mac(2), B, 0);
    fdb.insert_static(0, mac(3), A).unwrap();
    assert_eq!(fdb.flush(Some(A), true), 1);
    assert_eq!(fdb.lookup(0, mac(3)), Some(A));
    assert_eq!(fdb.flush(Some(A), false), 1);
    assert_eq!(fdb.lookup(0, mac(2)), Some(B));
    assert_eq!(fdb.flush(None, true), 1);
    assert!(fdb.is_empty());
    assert_counts(&fdb);
}

#[test]
fn a_removed_port_teaches_nothing_more_and_its_successor_starts_at_zero() {
    let fdb = fdb(FdbConfig {
        per_port: 2,
        ..FdbConfig::default()
    });
    let successor = PortRef {
        generation: A.generation + 1,
        ..A
    };
    fdb.learn(0, mac(1), A, 0);
    fdb.learn(0, mac(2), A, 0);
    assert_eq!(fdb.port_removed(A), 2);
    assert_eq!(fdb.learn(0, mac(1), A, 0), Learned::Gone);
    assert_eq!(fdb.learn(0, mac(1), successor, 0), Learned::New);
    assert_eq!(fdb.learn(0, mac(2), successor, 0), Learned::New);
    assert_eq!(fdb.learn(0, mac(3), successor, 0), Learned::Quota);
    assert_eq!(fdb.learn(0, mac(1), A, 0), Learned::Gone);
    assert_eq!(fdb.lookup(0, mac(1)), Some(successor));
    assert_counts(&fdb);
}

#[test]
fn a_slot_beyond_the_last_is_refused() {
    let nowhere = PortRef {
        slot: MAX_SLOTS as u16,
        generation: 0,
    };
    assert_eq!(small().learn(0, mac(1), nowhere, 0), Learned::Gone);
}

#[test]
fn static_entries_neither_move_nor_age_nor_count_for_the_port() {
    let fdb = fdb(FdbConfig {
        per_port: 1,
        ..FdbConfig::default()
    });
    fdb.learn(0, mac(1), B, 0);
    fdb.insert_static(0, mac(1), A).unwrap();
    assert_eq!((fdb.limits.count(A), fdb.limits.count(B)), (0, 0));
    assert_eq!(fdb.learn(0, mac(1), B, 0), Learned::Static);
    assert_eq!(fdb.learn(0, mac(1), A, 0), Learned::Known);
    assert_eq!(fdb.age(1000), 0);
    assert_eq!(fdb.lookup(0, mac(1)), Some(A));
    fdb.insert_static(0, mac(1), B).unwrap();
    assert_eq!(fdb.lookup(0, mac(1)), Some(B));
    assert_eq!(fdb.learn(0, mac(2), A, 0), Learned::New);
    assert_eq!(fdb.len(), 2);
    assert!(fdb.remove(0, mac(1)));
    assert!(!fdb.remove(0, mac(1)));
    assert_counts(&fdb);
}

#[test]
fn a_full_table_still_takes_static_entries() {
    let fdb = fdb(FdbConfig {
        per_port: 64,
        ..FdbConfig::with_capacity(64)
    });
    for n in 0..64 {
        fdb.learn(0, mac(n), A, 0);
    }
    fdb.insert_static(0, mac(100), B).unwrap();
    assert_eq!(fdb.lookup(0, mac(100)), Some(B));
    assert_eq!(fdb.len(), 65);
}

#[test]
fn a_removed_cell_is_not_used_again_before_it_is_reclaimed() {
    let fdb = small();
    fdb.learn(0, mac(1), A, 0);
    let key = Key::new(0, mac(1));
    let (first, _) = fdb.table.find(fdb.table.home(key), key).unwrap();
    fdb.remove(0, mac(1));
    let mark = fdb.retired().unwrap();
    fdb.learn(0, mac(1), B, 0);
    let (second, _) = fdb.table.find(fdb.table.home(key), key).unwrap();
    assert_ne!(first, second);
    fdb.remove(0, mac(1));
    assert_eq!(fdb.reclaim(mark), 1, "only what the mark covers");
    assert_eq!(fdb.reclaim(mark), 0);
    assert_eq!(fdb.table.key(second).load(SeqCst), table::TOMBSTONE);
    fdb.learn(0, mac(1), A, 0);
    let (third, _) = fdb.table.find(fdb.table.home(key), key).unwrap();
    assert_eq!(first, third);
    assert_eq!(reclaim_all(&fdb), 1);
    assert_eq!(fdb.retired(), None);
    assert_counts(&fdb);
}

#[test]
fn a_learner_that_matched_just_before_the_removal_changes_nothing() {
    let fdb = small();
    fdb.learn(0, mac(1), A, 0);
    let key = Key::new(0, mac(1));
    let (cell, value) = fdb.table.find(fdb.table.home(key), key).unwrap();
    fdb.remove(0, mac(1));
    assert_eq!(fdb.relearn((cell, key), value, B, 0), Learned::Contended);
    fdb.refresh(cell, 100);
    assert_eq!(fdb.lookup(0, mac(1)), None);
    assert_eq!(fdb.limits.count(B), 0);
    assert_counts(&fdb);
}

#[test]
fn a_key_without_a_value_is_unknown_and_left_to_its_inserter() {
    let fdb = small();
    let cell = fdb.take_cell(Key::new(0, mac(1))).unwrap();
    fdb.used.fetch_add(1, SeqCst);
    assert_eq!(fdb.lookup(0, mac(1)), None);
    assert_eq!(fdb.learn(0, mac(1), B, 0), Learned::Contended);
    assert_eq!(fdb.age(1 << 20), 0);
    assert!(fdb.table.swap_value(cell, Value::PENDING, Value::fixed(A)));
    assert_eq!(fdb.lookup(0, mac(1)), Some(A));
    assert_counts(&fdb);
}

#[test]
fn control_overtakes_an_inserter_that_has_not_written_its_value() {
    let fdb = small();
    for removed in [true, false] {
        let key = Key::new(0, mac(u64::from(removed)));
        let cell = fdb.take_cell(key).unwrap();
        fdb.used.fetch_add(1, SeqCst);
        if removed {
            assert!(!fdb.remove(0, key.mac()));
        } else {
            fdb.insert_static(0, key.mac(), A).unwrap();
        }
        assert!(
            !fdb.table
                .swap_value(cell, Value::PENDING, Value::learned(B))
        );
    }
    assert_eq!(fdb.len(), 1);
    assert_counts(&fdb);
}

/// Puts `key` into a second cell, as two threads at once may.
fn duplicate(fdb: &Fdb, key: Key, port: PortRef) {
    let is_empty = |cell: &usize| fdb.table.key(*cell).load(SeqCst) == table::EMPTY;
    let cell = fdb
        .table
        .candidates(fdb.table.home(key))
        .filter(is_empty)
        .last()
        .unwrap();
    assert_eq!(fdb.limits.admit(port), Admission::Granted);
    fdb.used.fetch_add(1, SeqCst);
    fdb.table.key(cell).store(key.word(), SeqCst);
    assert!(
        fdb.table
            .swap_value(cell, Value::PENDING, Value::learned(port))
    );
}

#[test]
fn a_second_cell_of_a_key_is_never_seen_and_goes_with_the_next_ageing() {
    let fdb = small();
    let key = Key::new(0, mac(1));
    fdb.learn(0, mac(1), A, 0);
    duplicate(&fdb, key, B);
    assert_eq!(fdb.lookup(0, mac(1)), Some(A));
    assert_eq!(fdb.entries(0).len(), 1);
    assert_eq!(fdb.age(0), 1);
    assert_eq!(fdb.lookup(0, mac(1)), Some(A));
    duplicate(&fdb, key, B);
    fdb.insert_static(0, mac(1), B).unwrap();
    assert_eq!(fdb.len(), 1);
    duplicate(&fdb, key, B);
    assert!(fdb.remove(0, mac(1)));
    assert!(fdb.is_empty());
    assert_counts(&fdb);
}

/// The FDB without threads, cells and clocks.
struct Model {
    entries: HashMap<(u16, Mac), (PortRef, u32, bool)>,
    moves: HashMap<u16, (u32, u32)>,
}

const CAPACITY: usize = 64;
const PER_PORT: usize = 20;
const MOVES: u32 = 3;
const AGEING_S: u32 = 30;

impl Model {
    fn held(&self, port: PortRef) -> usize {
        self.entries
            .values()
            .filter(|(p, _, fixed)| *p == port && !fixed)
            .count()
    }

    fn take_move(&mut self, slot: u16, now: u32) -> bool {
        let (second, count) = self.moves.entry(slot).or_default();
        if now > *second {
            (*second, *count) = (now, 0);
        }
        *count += 1;
        *count <= MOVES
    }

    fn learn(&mut self, vlan: u16, mac: Mac, port: PortRef, now: u32) -> Learned {
        let quota = self.held(port) >= PER_PORT;
        let full = self.entries.len() >= CAPACITY;
        match self.entries.get(&(vlan, mac)).copied() {
            None if quota => Learned::Quota,
            None if full => Learned::Full,
            None => {
                self.entries.insert((vlan, mac), (port, now, false));
                Learned::New
            }
            Some((p, _, true)) if p == port => Learned::Known,
            Some((_, _, true)) => Learned::Static,
            Some((p, seen, _)) if p == port => {
                self.entries.insert((vlan, mac), (port, now, false));
                if seen == now {
                    Learned::Known
                } else {
                    Learned::Refreshed
                }
            }
            Some(_) if !self.take_move(port.slot, now) => Learned::MoveLimited,
            Some(_) if quota => Learned::Quota,
            Some(_) => {
                self.entries.insert((vlan, mac), (port, now, false));
                Learned::Moved
            }
        }
    }

    fn retain(&mut self, keep: impl Fn(&(PortRef, u32, bool)) -> bool) -> usize {
        let before = self.entries.len();
        self.entries.retain(|_, entry| keep(entry));
        before - self.entries.len()
    }
}

fn run_model(seed: u64) {
    let mut random = Random(seed);
    let fdb = fdb(FdbConfig {
        capacity: CAPACITY,
        per_port: PER_PORT,
        moves_per_second: MOVES,
        ageing: Duration::from_secs(AGEING_S.into()),
    });
    let mut model = Model {
        entries: HashMap::new(),
        moves: HashMap::new(),
    };
    let mut generations = [1u32; 5];
    let mut now = 1;
    for step in 0..1500 {
        let at = format!("seed {seed}, step {step}");
        let (vlan, mac) = (random.below(2) as u16, mac(random.below(60)));
        let slot = random.below(5) as u16;
        let port = PortRef {
            slot,
            generation: generations[usize::from(slot)],
        };
        match random.below(100) {
            0..60 => {
                let expected = model.learn(vlan, mac, port, now);
                assert_eq!(fdb.learn(vlan, mac, port, now), expected, "{at}");
            }
            60..80 => {
                let expected = model.entries.get(&(vlan, mac)).map(|entry| entry.0);
                assert_eq!(fdb.lookup(vlan, mac), expected, "{at}");
            }
            80..88 => now += random.below(4) as u32,
            88..92 => {
                let expected = model.retain(|(_, seen, fixed)| *fixed || now - seen < AGEING_S);
                assert_eq!(fdb.age(now), expected, "{at}");
            }
            92 => {
                let keep_static = random.below(2) == 0;
                let expected = model.retain(|(p, _, fixed)| *p != port || *fixed && keep_static);
                assert_eq!(fdb.flush(Some(port), keep_static), expected, "{at}");
            }
            93 => {
                let expected = model.retain(|(p, _, _)| *p != port);
                assert_eq!(fdb.port_removed(port), expected, "{at}");
                generations[usize::from(slot)] += 1;
            }
            94 if model.entries.len() < CAPACITY => {
                fdb.insert_static(vlan, mac, port).unwrap();
                model.entries.insert((vlan, mac), (port, now, true));
            }
            _ => {
                let expected = model.entries.remove(&(vlan, mac)).is_some();
                assert_eq!(fdb.remove(vlan, mac), expected, "{at}");
            }
        }
        // 128 cells for 64 keys: tombstones must not pile up, or a pair of buckets fills.
        reclaim_all(&fdb);
        assert_eq!(fdb.len(), model.entries.len(), "{at}");
    }
    let mut entries: Vec<_> = fdb.entries(now);
    entries.retain(|e| {
        model.entries.get(&(e.vlan, e.mac)).map(|m| (m.0, m.2)) != Some((e.port, e.is_static))
    });
    assert!(entries.is_empty(), "seed {seed}: {entries:?}");
    assert_counts(&fdb);
}

#[test]
fn random_operations_agree_with_a_hash_map() {
    // The same in every run, and others in each.
    (0..100).for_each(run_model);
    with_seeds(100, run_model);
}

/// Generations of one slot that a thread may still believe in.
const TENANTS: u64 = 3;

/// A key is taught only at the two slots that follow from it, so a look-up shows whose value it
/// got.
fn taught_at(key: u64, port: PortRef) -> bool {
    let base = key % 50 * 2;
    (base..base + 2).contains(&u64::from(port.slot))
}

fn hammer(fdb: &Fdb, seed: u64, keys: u64, quiescent: &AtomicU64, clock: &AtomicU64) -> [u64; 2] {
    let mut random = Random(seed);
    let [mut hits, mut changes] = [0, 0];
    for _ in 0..4000 {
        let now_s = clock.load(SeqCst) as u32;
        for _ in 0..64 {
            let key = random.below(keys);
            let slot = (key % 50 * 2 + random.below(2)) as u16;
            let port = PortRef {
                slot,
                generation: 1 + (random.below(TENANTS * 50) / 50) as u32,
            };
            let learned = fdb.learn(0, mac(key), port, now_s);
            changes += u64::from(matches!(learned, Learned::New | Learned::Moved));
            let asked = random.below(keys);
            if let Some(port) = fdb.lookup(0, mac(asked)) {
                assert!(
                    taught_at(asked, port),
                    "seed {seed}: key {asked} at {port:?}"
                );
                hits += 1;
            }
        }
        quiescent.fetch_add(1, SeqCst);
    }
    [hits, changes]
}

/// Removes at random until `done`, reclaiming only what all threads have passed.
fn control(
    fdb: &Fdb,
    seed: u64,
    keys: u64,
    quiescent: &[AtomicU64],
    clock: &AtomicU64,
    done: &AtomicBool,
) {
    let mut random = Random(seed);
    while !done.load(SeqCst) {
        for _ in 0..8 {
            let key = random.below(keys);
            let slot = (key % 50 * 2) as u16;
            match random.below(20) {
                0 => drop(fdb.age(clock.fetch_add(1, SeqCst) as u32)),
                1 => drop(fdb.flush(
                    Some(PortRef {
                        slot,
                        generation: 1,
                    }),
                    false,
                )),
                2 => drop(fdb.insert_static(
                    0,
                    mac(key),
                    PortRef {
                        slot,
                        generation: 1,
                    },
                )),
                3 => drop(fdb.entries(0)),
                4 => drop(fdb.port_removed(PortRef {
                    slot,
                    generation: 1,
                })),
                _ => drop(fdb.remove(0, mac(key))),
            }
        }
        let Some(mark) = fdb.retired() else { continue };
        let passed: Vec<u64> = quiescent.iter().map(|q| q.load(SeqCst)).collect();
        while !done.load(SeqCst)
            && quiescent
                .iter()
                .zip(&passed)
                .any(|(q, old)| q.load(SeqCst) == *old)
        {
            thread::yield_now();
        }
        if !done.load(SeqCst) {
            fdb.reclaim(mark);
        }
    }
}

#[test]
fn threads_that_learn_look_up_and_remove_never_mix_keys_and_ports() {
    for seed in 0..4 {
        // Few keys in the smallest table: every cell is used again and again, by other keys.
        let keys = [40, 100, 300, 1000][seed as usize];
        let fdb = fdb(FdbConfig {
            moves_per_second: u32::MAX,
            ageing: Duration::from_secs(2),
            ..FdbConfig::with_capacity(64)
        });
        let (clock, done) = (AtomicU64::new(1), AtomicBool::new(false));
        let quiescent: [AtomicU64; 3] = Default::default();
        thread::scope(|scope| {
            let remover = scope.spawn(|| control(&fdb, seed, keys, &quiescent, &clock, &done));
            let workers: Vec<_> = (0u64..3)
                .map(|i| {
                    let (fdb, q, clock) = (&fdb, &quiescent[i as usize], &clock);
                    scope.spawn(move || hammer(fdb, seed << 8 | i, keys, q, clock))
                })
                .collect();
            let results: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
            // Before anything can fail: the remover runs until then, and the scope waits for it.
            done.store(true, SeqCst);
            remover.join().unwrap();
            for result in results {
                let [hits, changes] = result.unwrap();
                assert!(hits > 0 && changes > 0, "seed {seed}: {hits} {changes}");
            }
        });
        assert!(fdb.len() <= 64 + keys as usize);
        assert_counts(&fdb);
        fdb.age(clock.load(SeqCst) as u32);
        let mut shown: Vec<_> = fdb.entries(0).into_iter().map(|entry| entry.mac).collect();
        assert_eq!(shown.len(), fdb.len(), "no second cells after ageing");
        shown.sort();
        shown.dedup();
        assert_eq!(shown.len(), fdb.len());
    }
}
