use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use super::*;
use crate::sys::memfd;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

fn spec(guest_addr: u64, user_addr: u64, size: u64) -> RegionSpec {
    RegionSpec {
        guest_addr,
        user_addr,
        size,
        offset: 0,
        file: memfd::create("pollux-test", size.min(MIB)).unwrap(),
    }
}

/// The same region again, through a descriptor of its own.
fn again(spec: &RegionSpec) -> RegionSpec {
    RegionSpec {
        file: spec.file.try_clone().unwrap(),
        ..*spec
    }
}

fn table(specs: Vec<RegionSpec>) -> Result<GuestMemory, MemoryError> {
    GuestMemory::default().with_table(specs)
}

fn host(memory: &GuestMemory, guest_addr: u64) -> usize {
    memory.window(guest_addr, 1).unwrap().address()
}

#[test]
fn both_ends_of_a_region_and_nothing_beyond_are_found() {
    let memory = table(vec![spec(0x10000, 0x7000_0000, 4 * PAGE)]).unwrap();
    let (start, end) = (0x10000, 0x10000 + 4 * PAGE);
    assert_eq!(memory.window(start, 4 * PAGE as u32).unwrap().len(), 16384);
    assert!(memory.window(end - 1, 1).is_some());
    assert!(memory.window(start, 0).is_some());
    for (addr, len) in [
        (start - 1, 1),
        (start - 1, 2),
        (end - 1, 2),
        (end, 1),
        (end, 0),
        (start, 4 * PAGE as u32 + 1),
        (start, u32::MAX),
        (0, 1),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (start.wrapping_sub(1 << 63), 1),
    ] {
        assert!(memory.window(addr, len).is_none(), "{addr:#x} {len}");
    }
}

#[test]
fn what_is_written_here_is_in_the_file() {
    let spec = spec(0, 0x1000, 2 * PAGE);
    let file = spec.file.try_clone().unwrap();
    let memory = table(vec![spec]).unwrap();
    memory
        .window(PAGE - 2, 4)
        .unwrap()
        .write_bytes(0, b"frame"[..4].as_ref());
    let mut seen = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut seen, PAGE - 2).unwrap();
    assert_eq!(&seen, b"fram");
}

#[test]
fn the_offset_in_the_file_is_used() {
    let mut spec = spec(0, 0x1000, 4 * PAGE);
    spec.offset = 3 * PAGE;
    spec.size = PAGE;
    let file = spec.file.try_clone().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"here", 3 * PAGE).unwrap();
    let memory = table(vec![spec]).unwrap();
    let mut seen = [0; 4];
    memory.window(0, 4).unwrap().read_bytes(0, &mut seen);
    assert_eq!(&seen, b"here");
}

#[test]
fn a_size_of_no_whole_page_is_mapped_to_its_last_byte() {
    let memory = table(vec![spec(0, 0x1000, PAGE + 100)]).unwrap();
    let last = memory.window(PAGE + 99, 1).unwrap();
    last.write_bytes(0, &[7]);
    assert!(memory.window(PAGE + 100, 1).is_none());
}

#[test]
fn many_regions_are_all_found() {
    let specs = (0..40u64)
        .map(|i| spec(i * 0x10_0000, i * 0x10_0000, (i % 7 + 1) * PAGE))
        .collect();
    let memory = table(specs).unwrap();
    for i in 0..40u64 {
        let (start, len) = (i * 0x10_0000, (i % 7 + 1) * PAGE);
        assert_eq!(memory.window(start, len as u32).unwrap().len() as u64, len);
        assert!(memory.window(start + len - 1, 1).is_some());
        assert!(memory.window(start + len, 1).is_none());
        assert!(memory.window(start.wrapping_sub(1), 1).is_none());
    }
    assert!(memory.window(40 * 0x10_0000, 1).is_none());
    assert_eq!(memory.regions().count(), 40);
}

#[test]
fn a_range_across_regions_comes_in_pieces() {
    let specs = vec![
        spec(0, 0x10_0000, PAGE),
        spec(PAGE, 0x20_0000, PAGE),
        spec(2 * PAGE, 0x30_0000, PAGE),
        spec(4 * PAGE, 0x40_0000, PAGE),
    ];
    let memory = table(specs).unwrap();
    let pieces = |addr, len| {
        let mut lens = Vec::new();
        let whole = memory.windows(addr, len, |w| {
            lens.push(w.len());
            true
        });
        (whole, lens)
    };
    assert_eq!(pieces(10, 20), (true, vec![20]));
    assert_eq!(pieces(4000, 4296), (true, vec![96, 4096, 104]));
    assert_eq!(pieces(0, 3 * 4096), (true, vec![4096; 3]));
    assert_eq!(pieces(2 * PAGE, 4097), (false, vec![4096]));
    assert_eq!(pieces(3 * PAGE, 1), (false, vec![]));
    assert_eq!(pieces(5 * PAGE - 1, 2), (false, vec![1]));
    assert_eq!(pieces(0, 0), (true, vec![]));
    assert_eq!(pieces(u64::MAX, 2), (false, vec![]));
    assert!(memory.window(4000, 100).is_none(), "not in one region");
    let mut calls = 0;
    assert!(!memory.windows(0, 8192, |_| {
        calls += 1;
        false
    }));
    assert_eq!(calls, 1);
}

#[test]
fn rings_are_found_by_the_frontends_addresses() {
    let memory = table(vec![
        spec(0, 0x7f00_0000_0000, 4 * PAGE),
        spec(0x1_0000_0000, 0x7f00_0000_4000, 4 * PAGE),
    ])
    .unwrap();
    let ring = memory.pinned(0x7f00_0000_4000, 4 * PAGE).unwrap();
    assert_eq!(ring.len(), 4 * PAGE as usize);
    assert_eq!(ring.window().address(), host(&memory, 0x1_0000_0000));
    let end = 0x7f00_0000_8000;
    for (addr, len) in [
        (end - 1, 2),
        (end, 0),
        (0x7f00_0000_3fff, 2),
        (0, 1),
        (u64::MAX, u64::MAX),
        (0x7f00_0000_0001, u64::MAX),
    ] {
        assert!(memory.pinned(addr, len).is_none(), "{addr:#x} {len}");
    }
    let by_guest = memory.pinned_guest(0x1_0000_0010, 8).unwrap();
    assert_eq!(by_guest.window().address(), ring.window().address() + 16);
    assert_eq!(memory.guest_address(end - 1), Some(0x1_0000_3fff));
    assert_eq!(memory.guest_address(end), None);
}

#[test]
fn a_pinned_window_outlives_its_map() {
    let memory = table(vec![spec(0, 0, PAGE)]).unwrap();
    let pinned = memory.pinned(16, 8).unwrap();
    drop(memory);
    pinned.window().store_u64(0, 42, Ordering::Relaxed);
    assert_eq!(pinned.clone().window().load_u64(0, Ordering::Relaxed), 42);
}

#[test]
fn unchanged_regions_keep_their_mapping() {
    let (low, high) = (spec(0, 0x1000_0000, MIB), spec(MIB, 0x2000_0000, MIB));
    let old = table(vec![again(&low), again(&high)]).unwrap();
    let moved = RegionSpec {
        user_addr: 0x5000_0000,
        ..again(&low)
    };
    let other = spec(MIB, 0x2000_0000, MIB);
    let new = old.with_table(vec![moved, other]).unwrap();
    assert_eq!(host(&new, 0), host(&old, 0));
    assert_ne!(host(&new, MIB), host(&old, MIB));
    assert!(new.pinned(0x1000_0000, 1).is_none());
    let low_start = new.pinned(0x5000_0000, 1).unwrap();
    assert_eq!(low_start.window().address(), host(&new, 0));
}

#[test]
fn another_offset_or_guest_address_is_another_mapping() {
    let base = spec(0, 0x1000_0000, MIB);
    let halves = |offset, guest_addr| RegionSpec {
        offset,
        guest_addr,
        size: MIB / 2,
        ..again(&base)
    };
    let old = table(vec![halves(0, 0)]).unwrap();
    for changed in [halves(MIB / 2, 0), halves(0, MIB)] {
        let start = changed.guest_addr;
        let new = old.with_table(vec![changed]).unwrap();
        assert_ne!(host(&new, start), host(&old, 0));
    }
}

#[test]
fn regions_are_added_and_removed() {
    let memory = GuestMemory::default();
    let one = memory.with_region(spec(0, 0x1000_0000, PAGE)).unwrap();
    let two = one.with_region(spec(PAGE, 0x2000_0000, PAGE)).unwrap();
    assert_eq!(two.len_bytes(), 2 * PAGE);
    assert_eq!(host(&one, 0), host(&two, 0));
    let three = two.without_region(0, 0x1000_0000, PAGE).unwrap();
    assert_eq!(three.regions().collect::<Vec<_>>(), [(PAGE, PAGE)]);
    assert_eq!(host(&three, PAGE), host(&two, PAGE));
    let none = three.without_region(PAGE, 0x2000_0000, PAGE).unwrap();
    assert_eq!((none.regions().count(), none.len_bytes()), (0, 0));
    assert!(none.window(0, 1).is_none());
}

#[test]
fn a_region_added_twice_goes_when_it_was_removed_twice() {
    let base = spec(0, 0x1000_0000, PAGE);
    let one = GuestMemory::default().with_region(again(&base)).unwrap();
    let two = one.with_region(again(&base)).unwrap();
    assert_eq!((two.regions().count(), two.len_bytes()), (1, PAGE));
    assert_eq!(host(&one, 0), host(&two, 0));
    let left = two.without_region(0, 0x1000_0000, PAGE).unwrap();
    assert_eq!(host(&left, 0), host(&one, 0));
    let none = left.without_region(0, 0x1000_0000, PAGE).unwrap();
    assert_eq!(none.regions().count(), 0);
    assert!(none.without_region(0, 0x1000_0000, PAGE).is_err());
    // At the same addresses, but another file's memory: an overlap.
    assert!(one.with_region(spec(0, 0x1000_0000, PAGE)).is_err());
}

#[test]
fn removing_needs_all_three_values() {
    let memory = table(vec![spec(0, 0x1000_0000, PAGE)]).unwrap();
    for (guest, user, size) in [
        (PAGE, 0x1000_0000, PAGE),
        (0, 0x1000_1000, PAGE),
        (0, 0x1000_0000, 2 * PAGE),
    ] {
        assert!(matches!(
            memory.without_region(guest, user, size),
            Err(MemoryError::NoSuchRegion { .. })
        ));
    }
}

#[test]
fn one_file_may_hold_several_regions() {
    let base = spec(0, 0x1000_0000, MIB);
    let upper = RegionSpec {
        guest_addr: 4 * MIB,
        user_addr: 0x3000_0000,
        ..again(&base)
    };
    let memory = table(vec![base, upper]).unwrap();
    memory.window(5, 1).unwrap().write_bytes(0, &[9]);
    let mut seen = [0];
    memory
        .window(4 * MIB + 5, 1)
        .unwrap()
        .read_bytes(0, &mut seen);
    assert_eq!(seen, [9]);
}

#[test]
fn impossible_places_are_refused() {
    use MemoryError as E;
    let refused = |specs: Vec<RegionSpec>| table(specs).unwrap_err();
    assert!(matches!(refused(vec![]), E::NoRegions));
    assert!(matches!(
        refused(vec![spec(0, 0, 0)]),
        E::EmptyRegion { .. }
    ));
    let wraps = |guest, user, offset| {
        let specs = vec![RegionSpec {
            offset,
            ..spec(guest, user, 2 * PAGE)
        }];
        match refused(specs) {
            E::Wraps { what, .. } => what,
            other => panic!("{other}"),
        }
    };
    let top = u64::MAX - PAGE + 1;
    assert_eq!(wraps(top, 0, 0), RangeKind::GuestAddress);
    assert_eq!(wraps(0, top, 0), RangeKind::UserAddress);
    assert_eq!(wraps(0, 0, top), RangeKind::FileOffset);
}

#[test]
fn overlaps_are_refused() {
    let overlap = |guest, user| {
        let specs = vec![
            spec(0x10000, 0x80000, 2 * PAGE),
            spec(guest, user, 2 * PAGE),
        ];
        match table(specs) {
            Err(MemoryError::Overlap { what, .. }) => Some(what),
            other => other.map(|_| None).unwrap(),
        }
    };
    assert_eq!(overlap(0x11000, 0), Some(RangeKind::GuestAddress));
    assert_eq!(overlap(0xf000, 0), Some(RangeKind::GuestAddress));
    assert_eq!(overlap(0x10000, 0), Some(RangeKind::GuestAddress));
    assert_eq!(overlap(0x20000, 0x81000), Some(RangeKind::UserAddress));
    assert_eq!(overlap(0x12000, 0x82000), None);
    let memory = table(vec![spec(0, 0, PAGE)]).unwrap();
    assert!(memory.with_region(spec(0, 0x100_0000, PAGE)).is_err());
}

#[test]
fn more_slots_than_there_are_are_refused() {
    let file = memfd::create("pollux-test", PAGE).unwrap();
    let specs = |count: u64| {
        (0..count)
            .map(|i| RegionSpec {
                guest_addr: i * PAGE,
                user_addr: i * PAGE,
                size: PAGE,
                offset: 0,
                file: file.try_clone().unwrap(),
            })
            .collect::<Vec<_>>()
    };
    let full = table(specs(MAX_REGIONS as u64)).unwrap();
    let more = RegionSpec {
        guest_addr: 1 << 40,
        user_addr: 1 << 40,
        ..specs(1).remove(0)
    };
    let refused = full.with_region(more).unwrap_err();
    assert!(matches!(
        refused,
        MemoryError::TooManyRegions { count: 510 }
    ));
    assert!(table(specs(MAX_REGIONS as u64 + 1)).is_err());
}

#[test]
fn files_that_do_not_fit_are_refused() {
    let beyond = RegionSpec {
        offset: PAGE,
        ..spec(0, 0, MIB)
    };
    assert!(matches!(
        table(vec![beyond]),
        Err(MemoryError::BeyondFile { file_size: MIB, .. })
    ));
    let unaligned = RegionSpec {
        offset: 512,
        size: PAGE,
        ..spec(0, 0, MIB)
    };
    assert!(matches!(
        table(vec![unaligned]),
        Err(MemoryError::UnalignedOffset { offset: 512, .. })
    ));
}

/// A region like this one behind another file.
fn behind(file: impl Into<OwnedFd>, guest_addr: u64, user_addr: u64) -> RegionSpec {
    RegionSpec {
        file: file.into().into(),
        ..spec(guest_addr, user_addr, PAGE)
    }
}

/// Files that cannot be used, and a word of the reason.
fn unusable_files() -> Vec<(OwnedFd, &'static str)> {
    let (reader, _writer) = std::io::pipe().unwrap();
    let file = memfd::create("pollux-test", PAGE).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let sealed = memfd::create("pollux-test", PAGE).unwrap();
    rustix::fs::fcntl_add_seals(&sealed, rustix::fs::SealFlags::WRITE).unwrap();
    let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
    let advice = "memory-backend-memfd,share=on";
    vec![
        (reader.into(), advice),
        // As device DAX is: a character device.
        (open("/dev/zero"), advice),
        (open("/proc/self/maps"), advice),
        (open(&path), "cannot be mapped"),
        (sealed.into(), "cannot be mapped"),
    ]
}

#[test]
fn what_cannot_be_mapped_is_left_out_with_its_reason_and_the_rest_is_used() {
    for (file, why) in unusable_files() {
        let again = file.try_clone().unwrap();
        let specs = vec![
            spec(0, 0x1000_0000, PAGE),
            behind(file, PAGE, 0x2000_0000),
            spec(2 * PAGE, 0x3000_0000, PAGE),
        ];
        let memory = table(specs).unwrap();
        let left_out: Vec<Unusable> = memory.unusable().collect();
        assert_eq!((left_out[0].guest_addr, left_out[0].size), (PAGE, PAGE));
        let text = left_out[0].to_string();
        assert!(text.contains("4 KiB at 0x1000 cannot be used"), "{text}");
        assert!(text.contains(why), "{text}");
        assert_eq!((left_out.len(), memory.len_bytes()), (1, 2 * PAGE));
        let inside = |addr| memory.window(addr, 1).is_some();
        assert_eq!([0, PAGE, 2 * PAGE].map(inside), [true, false, true]);
        let ends = [PAGE - 1, PAGE, 2 * PAGE - 1, 2 * PAGE];
        let unusable = ends.map(|addr| memory.is_unusable(addr));
        assert_eq!(unusable, [false, true, true, false]);
        assert!(memory.pinned(0x2000_0000, 8).is_none());
        let ends = [0x1000_0000, 0x2000_0000, 0x2000_0fff, 0x2000_1000];
        let unusable = ends.map(|addr| memory.unusable_at(addr).is_some());
        assert_eq!(unusable, [false, true, true, false]);
        // It overlaps like any other, comes twice and goes.
        assert!(memory.with_region(spec(PAGE, 0, PAGE)).is_err());
        let twice = memory
            .with_region(behind(again, PAGE, 0x2000_0000))
            .unwrap();
        let once = twice.without_region(PAGE, 0x2000_0000, PAGE).unwrap();
        assert_eq!(once.unusable().count(), 1);
        let gone = once.without_region(PAGE, 0x2000_0000, PAGE).unwrap();
        assert_eq!(gone.unusable().count(), 0);
        let back = gone.with_region(spec(PAGE, 0x2000_0000, PAGE)).unwrap();
        assert_eq!(
            (host(&back, 0), back.len_bytes()),
            (host(&memory, 0), 3 * PAGE)
        );
    }
}

#[test]
fn what_is_beyond_the_limit_is_left_out_and_later_regions_are_used() {
    for size in [MAX_GUEST_BYTES, MAX_GUEST_BYTES + 1, 1 << 60] {
        let specs = vec![
            spec(0, 0, PAGE),
            spec(PAGE, PAGE, size),
            spec(1 << 61, 1 << 61, PAGE),
        ];
        let memory = table(specs).unwrap();
        assert_eq!(memory.len_bytes(), 2 * PAGE);
        assert!(memory.window(1 << 61, PAGE as u32).is_some());
        let left_out: Vec<Unusable> = memory.unusable().collect();
        assert!(left_out[0].cause.contains("are possible"), "{left_out:?}");
        let added = memory.with_region(spec(1 << 62, 1 << 62, PAGE)).unwrap();
        assert_eq!((added.len_bytes(), added.unusable().count()), (3 * PAGE, 1));
    }
}

#[test]
fn a_refused_table_leaves_no_mapping_behind() {
    let marked = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.matches("pollux-refused").count()
    };
    let good = RegionSpec {
        file: memfd::create("pollux-refused", PAGE).unwrap(),
        ..spec(0, 0, PAGE)
    };
    let bad = RegionSpec {
        size: 2 * PAGE,
        offset: MIB,
        ..spec(MIB, MIB, MIB)
    };
    assert!(table(vec![good, bad]).is_err());
    assert_eq!(marked(), 0);
}

#[test]
fn adding_and_removing_leaks_nothing() {
    let base = spec(0, 0, 3 * MIB + PAGE);
    base.file.set_len(4 * MIB).unwrap();
    let mut memory = GuestMemory::default();
    let files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = files();
    for _ in 0..4_000 {
        memory = memory.with_region(again(&base)).unwrap();
        memory = memory.without_region(0, 0, base.size).unwrap();
    }
    // Other tests of this process open files meanwhile, hundreds of them, but not four thousand.
    assert!(files() < before + 2_000);
}

#[test]
fn mappings_are_left_out_of_core_dumps() {
    let named = RegionSpec {
        file: memfd::create("pollux-dontdump", PAGE).unwrap(),
        ..spec(0, 0, PAGE)
    };
    let _memory = table(vec![named]).unwrap();
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let ours = smaps.split("pollux-dontdump").nth(1).unwrap();
    let flags = ours.lines().find(|l| l.starts_with("VmFlags:")).unwrap();
    assert!(flags.contains(" dd"), "{flags}");
}
