use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use super::*;
use crate::memory::{GuestMemory, MemoryError, PinnedWindow, RegionSpec};
use crate::sys::memfd;

const MIB: u64 = 1 << 20;

fn guest(file: &std::fs::File, size: u64) -> Result<GuestMemory, MemoryError> {
    GuestMemory::default().with_region(RegionSpec {
        guest_addr: 0,
        user_addr: 0,
        size,
        offset: 0,
        file: file.try_clone().unwrap(),
    })
}

fn byte(memory: &GuestMemory, addr: u64) -> u8 {
    let mut byte = [0];
    memory.window(addr, 1).unwrap().read_bytes(0, &mut byte);
    byte[0]
}

fn put(memory: &GuestMemory, addr: u64, value: u8) {
    memory.window(addr, 1).unwrap().write_bytes(0, &[value]);
}

#[test]
fn a_truncated_guest_is_marked_and_nobody_else() {
    install().unwrap();
    let file = memfd::create("pollux-test", 8 * MIB).unwrap();
    let victim = guest(&file, 8 * MIB).unwrap();
    let other = guest(&memfd::create("pollux-test", MIB).unwrap(), MIB).unwrap();
    put(&victim, 0, 1);
    put(&victim, 7 * MIB, 2);
    put(&other, 5, 3);
    file.set_len(4096).unwrap();
    assert!(!victim.faulted());
    let before = Faults::now();
    assert!(before.outdated().is_outdated());
    assert_eq!(byte(&victim, 7 * MIB), 0);
    assert!(victim.faulted() && before.is_outdated());
    put(&victim, 7 * MIB + 1, 4);
    assert_eq!(byte(&victim, 7 * MIB + 1), 4);
    assert_eq!(
        byte(&victim, 0),
        1,
        "what is left of the file is still there"
    );
    put(&victim, 3 * MIB, 5);
    assert_eq!(byte(&victim, 3 * MIB), 5);
    assert!(!other.faulted());
    assert_eq!(byte(&other, 5), 3);
}

#[test]
fn a_copy_survives_on_a_thread_of_its_own() {
    install().unwrap();
    let file = memfd::create("pollux-test", 4 * MIB).unwrap();
    let victim = guest(&file, 4 * MIB).unwrap();
    file.set_len(0).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let whole = victim.window(0, 4 << 20).unwrap();
            let mut all = vec![1; 4 << 20];
            whole.read_bytes(0, &mut all);
            assert!(all.iter().all(|&b| b == 0));
            whole.write_bytes(0, &all);
        });
    });
    assert!(victim.faulted());
}

#[test]
fn two_sources_in_one_copy_are_both_survived() {
    install().unwrap();
    let files = [0, 1].map(|_| memfd::create("pollux-test", MIB).unwrap());
    let guests = [0, 1].map(|i: usize| guest(&files[i], MIB).unwrap());
    files.iter().for_each(|file| file.set_len(0).unwrap());
    let [from, to] = [0, 1].map(|i: usize| guests[i].window(100, 9000).unwrap());
    to.copy_from(&from, 9000);
    assert!(guests.iter().all(GuestMemory::faulted));
}

#[test]
fn a_truncated_log_is_survived() {
    install().unwrap();
    let file = memfd::create("pollux-test", MIB).unwrap();
    let mark = FaultMark::new();
    let log = PinnedWindow::map(&file, 4096, 8192, &mark).unwrap();
    drop(file.set_len(0));
    log.window().store_u64(8, 1, Ordering::Relaxed);
    assert!(mark.is_set());
}

#[test]
fn a_marked_guests_memory_is_mapped_anew() {
    install().unwrap();
    let file = memfd::create("pollux-test", MIB).unwrap();
    let old = guest(&file, MIB).unwrap();
    file.set_len(0).unwrap();
    assert_eq!(byte(&old, 0), 0);
    file.set_len(MIB).unwrap();
    let spec = RegionSpec {
        guest_addr: 0,
        user_addr: 0,
        size: MIB,
        offset: 0,
        file,
    };
    let new = old.with_table(vec![spec]).unwrap();
    let address = |memory: &GuestMemory| memory.window(0, 1).unwrap().address();
    assert_ne!(address(&new), address(&old));
    assert!(new.faulted(), "the session's mark stays");
}

#[test]
fn huge_pages_are_replaced_whole() {
    install().unwrap();
    let Some(memory) = huge_guest() else {
        eprintln!("SKIPPED huge_pages_are_replaced_whole: no hugetlbfs here");
        return;
    };
    assert_eq!(byte(&memory, 2 * MIB + 5), 0);
    assert!(memory.faulted());
    put(&memory, 4 * MIB - 1, 3);
    assert_eq!(byte(&memory, 4 * MIB - 1), 3);
}

/// A guest of two huge pages, of which the file lost the second. Needs no page to be reserved: what
/// is touched is behind the end of the file, and what replaces it are small pages.
fn huge_guest() -> Option<GuestMemory> {
    let file = memfd::create_huge("pollux-test", 4 * MIB).ok()?;
    let memory = guest(&file, 4 * MIB).ok()?;
    file.set_len(2 * MIB).ok()?;
    Some(memory)
}

#[test]
fn an_odd_huge_page_offset_is_refused() {
    let Ok(file) = memfd::create_huge("pollux-odd", 4 * MIB) else {
        eprintln!("SKIPPED an_odd_huge_page_offset_is_refused: no hugetlbfs here");
        return;
    };
    let mark = FaultMark::new();
    let refused = PinnedWindow::map(&file, 4096, MIB, &mark).unwrap_err();
    assert!(matches!(refused, MemoryError::UnalignedOffset { .. }));
    // A size of half a huge page maps, and unmaps, a whole one.
    assert!(PinnedWindow::map(&file, 2 * MIB, MIB, &mark).is_ok());
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    assert!(!maps.contains("pollux-odd"));
}

#[test]
fn every_thread_of_the_standard_library_has_an_alternate_stack() {
    install().unwrap();
    let thread = std::thread::spawn(|| {
        // SAFETY: all zeroes is a valid stack_t.
        let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
        // SAFETY: asks only; `stack` is valid for writing.
        assert_eq!(unsafe { libc::sigaltstack(ptr::null(), &mut stack) }, 0);
        assert_eq!(stack.ss_flags & libc::SS_DISABLE, 0);
        assert!(stack.ss_size >= libc::MINSIGSTKSZ);
    });
    thread.join().unwrap();
}

#[test]
fn places_are_used_again() {
    let mark = FaultMark::new();
    let start = 0x1000;
    for _ in 0..2 * CAPACITY {
        // Never mapped and never touched.
        drop(Fenced::insert(start, 4096, 4096, Arc::clone(&mark)).unwrap());
    }
    assert_eq!(Arc::strong_count(&mark), 1);
}

#[test]
fn the_hole_is_clamped_to_its_region() {
    let found = |start, len, page_size| Found {
        start,
        len,
        page_size,
        mark: ptr::null_mut(),
    };
    const M: usize = 1 << 20;
    // Region, address, expected start and length.
    for (region, addr, expected) in [
        (found(M, 10 * M, 4096), 4 * M + 5, (4 * M, 2 * M)),
        (found(M, 10 * M, 4096), M, (M, M)),
        (found(M, 10 * M, 4096), 11 * M - 1, (10 * M, M)),
        (found(0x3000, 0x2000, 4096), 0x4fff, (0x3000, 0x2000)),
        (
            found(1 << 30, 2 << 30, 1 << 30),
            (2 << 30) + 7,
            (2 << 30, 1 << 30),
        ),
    ] {
        assert_eq!(hole(&region, addr), expected);
    }
}

/// Runs one of the ignored tests below in a process of its own, for it is to die there.
fn dies_of(test: &str) -> Option<i32> {
    let name = format!("memory::fence::tests::{test}");
    Command::new(std::env::current_exe().unwrap())
        .args([&name, "--exact", "--ignored", "--test-threads=1"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap()
        .signal()
}

#[test]
fn a_fault_that_is_not_ours_still_kills() {
    assert_eq!(dies_of("child_foreign_fault"), Some(libc::SIGBUS));
    assert_eq!(
        dies_of("child_foreign_fault_by_default"),
        Some(libc::SIGBUS)
    );
    assert_eq!(dies_of("child_removed_region"), Some(libc::SIGBUS));
}

#[test]
fn a_sigbus_that_was_sent_still_kills() {
    assert_eq!(dies_of("child_sent_signal"), Some(libc::SIGBUS));
}

#[test]
fn a_stack_overflow_is_still_reported() {
    assert_eq!(dies_of("child_stack_overflow"), Some(libc::SIGABRT));
}

/// Maps a file of one page without us, empties it, and touches it.
fn foreign_fault() {
    let file = memfd::create("pollux-test", 4096).unwrap();
    let (protection, flags) = (libc::PROT_READ, libc::MAP_SHARED);
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let place = unsafe { libc::mmap(ptr::null_mut(), 4096, protection, flags, fd, 0) };
    assert_ne!(place, libc::MAP_FAILED);
    file.set_len(0).unwrap();
    // SAFETY: mapped; that it faults is the purpose.
    unsafe { ptr::read_volatile(place.cast::<u8>()) };
}

#[test]
#[ignore = "dies; run by a_fault_that_is_not_ours_still_kills"]
fn child_foreign_fault() {
    install().unwrap();
    let file = memfd::create("pollux-test", MIB).unwrap();
    let _memory = guest(&file, MIB).unwrap();
    foreign_fault();
}

#[test]
#[ignore = "dies; run by a_fault_that_is_not_ours_still_kills"]
fn child_foreign_fault_by_default() {
    // SAFETY: the default action runs no code.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    install().unwrap();
    foreign_fault();
}

#[test]
#[ignore = "dies; run by a_fault_that_is_not_ours_still_kills"]
fn child_removed_region() {
    install().unwrap();
    // The second region's entry replaces the first one's, whose place in the table is the same.
    let file = memfd::create("pollux-test", MIB).unwrap();
    drop(guest(&file, MIB).unwrap());
    let _other = guest(&file, MIB).unwrap();
    foreign_fault();
}

#[test]
#[ignore = "dies; run by a_sigbus_that_was_sent_still_kills"]
fn child_sent_signal() {
    // SAFETY: the default action runs no code.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    install().unwrap();
    // SAFETY: kills this process, as intended.
    unsafe { libc::raise(libc::SIGBUS) };
}

#[test]
#[ignore = "dies; run by a_stack_overflow_is_still_reported"]
#[allow(unconditional_recursion)]
fn child_stack_overflow() {
    install().unwrap();
    fn deeper(n: u64) -> u64 {
        let room = std::hint::black_box([n; 512]);
        deeper(room[7] + 1) + room[3]
    }
    std::hint::black_box(deeper(0));
}

#[test]
fn regions_leave_mappings_for_threads() {
    let allowed = [
        ("65530\n", 49_146),
        ("1000000\n", CAPACITY),
        ("8192\n", 6144),
    ];
    for (text, expected) in allowed {
        assert_eq!(capacity_of(Some(text)), expected, "{text}");
    }
    assert_eq!(capacity_of(None), 49_146);
    assert_eq!(capacity_of(Some("what?")), 49_146);
    assert!(capacity() <= CAPACITY);
}
