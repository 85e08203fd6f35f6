//! The SIGBUS fence: a frontend that truncates its memory file hurts nobody but itself.
//!
//! Touching a page after the end of a mapped file raises SIGBUS. The signal would kill the switch,
//! and with it every other guest's network. The handler here looks the address up in a fixed table
//! of mapped regions, puts fresh private pages over the hole, marks the owner, and returns. The
//! access is repeated and succeeds on memory that the guest no longer sees. Poll threads test the
//! mark after each burst and stop serving that guest; control cuts off its session.
//!
//! Rules:
//! * [`install`] runs in `main` before any thread exists; SIGBUS is never blocked.
//! * Everything the handler does is async-signal-safe: atomics, mmap, madvise, sigaction, raise.
//! * Addresses that are not in the table go to the handler that was there before (Rust's own, which
//!   reports stack overflows, or the default action).
//! * A region's entry is inserted after its mmap and removed before its munmap. So the address
//!   range of a dead region, which the kernel may give to somebody else, is never mapped over.
//!
//! Rust's standard library gives the main thread and every thread it starts an alternate signal
//! stack before `main` runs, whoever owns the handler later. So `SA_ONSTACK` needs nothing more. A
//! system call that touches such a page returns EFAULT, and no signal is raised. Its caller must
//! handle that error itself.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crossbeam_utils::CachePadded;

/// Most regions of all guests together: enough for 96 guests that use all their slots.
const CAPACITY: usize = 49_152;

/// Returns how many regions all guests together may have. Each region is a mapping. If the process
/// has used up its mappings, making a thread ends the process. So a quarter of what
/// `vm.max_map_count` allows is left for threads and the heap.
pub fn capacity() -> usize {
    static ALLOWED: OnceLock<usize> = OnceLock::new();
    *ALLOWED.get_or_init(|| {
        let allowed = std::fs::read_to_string("/proc/sys/vm/max_map_count");
        capacity_of(allowed.ok().as_deref())
    })
}

/// Returns [`capacity`] for the text of the kernel's file; without the file, for the kernel's
/// default.
fn capacity_of(max_map_count: Option<&str>) -> usize {
    let allowed = max_map_count.and_then(|text| text.trim().parse().ok());
    CAPACITY.min(allowed.unwrap_or(65_530) / 4 * 3)
}

/// Bytes that are replaced at once. A single page costs 8.4 µs. 2 MiB at once cost 0.29 ms, and 2
/// MiB of single pages 4.3 ms.
const REPLACED: usize = 2 << 20;

/// Set when memory of a guest was taken away while it was mapped. Never cleared.
///
/// Each session has its own mark: a guest whose frontend reconnects starts with a clear mark.
#[derive(Debug, Default)]
pub struct FaultMark {
    faulted: AtomicBool,
}

impl FaultMark {
    /// A mark that is not set.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Whether memory was lost. Relaxed: the handler runs on the thread whose access failed, so
    /// that thread sees it at once; others need no order with it.
    #[inline(always)]
    pub fn is_set(&self) -> bool {
        self.faulted.load(Ordering::Relaxed)
    }

    /// Declares the guest's memory lost. The signal handler calls this.
    pub fn set(&self) {
        self.faulted.store(true, Ordering::Relaxed);
        // Release, pairs with the acquire in [`Faults::is_outdated`]: a thread that sees the count
        // sees the mark.
        FAULTS.fetch_add(1, Ordering::Release);
    }
}

/// How often any mark was set.
///
/// Has a cache line of its own: every poll thread reads it for every queue that has frames.
static FAULTS: CachePadded<AtomicUsize> = CachePadded::new(AtomicUsize::new(0));

/// The number of losses at some moment. As long as this number does not change, no sender's mark
/// needs to be read.
#[derive(Clone, Copy, Debug)]
pub struct Faults(usize);

impl Faults {
    /// Returns the present number. Marks that were set before must be looked at by the caller.
    pub fn now() -> Self {
        Faults(FAULTS.load(Ordering::Acquire))
    }

    /// Returns a number that is outdated at every later look.
    pub fn outdated(self) -> Self {
        Faults(self.0.wrapping_sub(1))
    }

    /// Whether a mark was set since. Acquire, pairs with the release in [`FaultMark::set`]: a
    /// thread that sees the count sees the mark.
    #[inline(always)]
    pub fn is_outdated(self) -> bool {
        FAULTS.load(Ordering::Acquire) != self.0
    }
}

/// One region, as the handler sees it. `sequence` is odd while a writer changes the entry.
struct Entry {
    sequence: AtomicU32,
    start: AtomicUsize,
    len: AtomicUsize,
    page_size: AtomicUsize,
    mark: AtomicPtr<FaultMark>,
}

impl Entry {
    const fn free() -> Entry {
        Entry {
            sequence: AtomicU32::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            page_size: AtomicUsize::new(0),
            mark: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// Writers hold the lock of `FREED`, so there is one at a time.
    fn write(&self, start: usize, len: usize, page_size: usize, mark: *mut FaultMark) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence
            .store(sequence.wrapping_add(1), Ordering::Relaxed);
        // Pairs with the acquire fence in `find`: a reader that sees one of the stores below sees
        // the odd number.
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.page_size.store(page_size, Ordering::Relaxed);
        self.mark.store(mark, Ordering::Relaxed);
        self.sequence
            .store(sequence.wrapping_add(2), Ordering::Release);
    }

    /// Returns this entry's region if `addr` is in it. An entry that changes meanwhile cannot be
    /// the right one: the region of a faulting access is alive, and entries of live regions do not
    /// change.
    fn find(&self, addr: usize) -> Option<Found> {
        let before = self.sequence.load(Ordering::Acquire);
        let found = Found {
            start: self.start.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            page_size: self.page_size.load(Ordering::Relaxed),
            mark: self.mark.load(Ordering::Relaxed),
        };
        fence(Ordering::Acquire);
        let after = self.sequence.load(Ordering::Relaxed);
        let stable = before == after && before.is_multiple_of(2);
        (stable && addr.wrapping_sub(found.start) < found.len).then_some(found)
    }
}

struct Found {
    start: usize,
    len: usize,
    page_size: usize,
    mark: *mut FaultMark,
}

/// The table: 2.5 MiB of zero pages, which are touched only as far as entries are used.
static ENTRIES: [Entry; CAPACITY] = [const { Entry::free() }; CAPACITY];

/// Number of entries that were ever used. The handler looks at these only.
static USED: AtomicUsize = AtomicUsize::new(0);

/// Entries below `USED` that are free again. Sessions and the reaper take this lock, never a poll
/// thread and never the handler.
static FREED: Mutex<Vec<usize>> = Mutex::new(Vec::new());

/// The handler that was there before ours.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// An entry of the table, which is given back on drop. It must be dropped before the munmap.
#[derive(Debug)]
pub(super) struct Fenced {
    index: usize,
    // The entry points to this mark.
    mark: Arc<FaultMark>,
}

impl Fenced {
    /// Enters a mapped range whose file has pages of `page_size` bytes. Returns `None` if the table
    /// is full.
    pub(super) fn insert(
        start: usize,
        len: usize,
        page_size: usize,
        mark: Arc<FaultMark>,
    ) -> Option<Fenced> {
        let mut freed = FREED.lock().unwrap_or_else(PoisonError::into_inner);
        let index = freed.pop().unwrap_or_else(|| USED.load(Ordering::Relaxed));
        ENTRIES[..capacity()].get(index)?.write(
            start,
            len,
            page_size,
            Arc::as_ptr(&mark).cast_mut(),
        );
        if index == USED.load(Ordering::Relaxed) {
            // Release: a thread that sees the new number sees the entry. A thread that faults has
            // got the region from us through some synchronisation after this store, so it sees the
            // entry.
            USED.store(index + 1, Ordering::Release);
        }
        Some(Fenced { index, mark })
    }

    pub(super) fn mark(&self) -> &Arc<FaultMark> {
        &self.mark
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        let mut freed = FREED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = ENTRIES.get(self.index) {
            entry.write(0, 0, 0, ptr::null_mut());
            freed.push(self.index);
        }
    }
}

/// Installs the handler, and unblocks SIGBUS for this thread and those that it will start.
///
/// Called from `main` before any thread. Calling it again changes nothing.
pub fn install() -> std::io::Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    unblock()?;
    if *installed {
        return Ok(());
    }
    // SAFETY: all zeroes is a valid sigaction (default action, empty mask).
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: asks only; `previous` is valid for writing.
    check(unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &mut previous) })?;
    // The old handler is kept before ours is active, because our handler reads it.
    let _ = PREVIOUS.set(previous);
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_sigbus as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `on_sigbus` has the signature that SA_SIGINFO asks for and is async-signal-safe.
    check(unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) })?;
    *installed = true;
    Ok(())
}

/// Unblocks SIGBUS. A parent process may have left it blocked, and then the kernel kills the
/// process at the first fault.
fn unblock() -> std::io::Result<()> {
    // SAFETY: all zeroes is a valid, empty set.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is valid and SIGBUS is a signal number.
    check(unsafe { libc::sigaddset(&mut set, libc::SIGBUS) })?;
    // SAFETY: `set` is valid for reading; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut()) } {
        0 => Ok(()),
        code => Err(std::io::Error::from_raw_os_error(code)),
    }
}

fn check(result: libc::c_int) -> std::io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: errno is this thread's own; the interrupted code must find it unchanged.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: `errno` is valid for this thread as long as it lives.
    let saved = unsafe { *errno };
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let code = unsafe { (*info).si_code };
    // A signal with a code up to 0 was sent by a process and has no address. An unaligned access is
    // a bug of ours.
    if code <= 0 || code == libc::BUS_ADRALN || !heal(address(info)) {
        pass_on(signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *errno = saved };
}

fn address(info: *mut libc::siginfo_t) -> usize {
    // SAFETY: valid (see `on_sigbus`), and nobody else has it.
    let info = unsafe { &*info };
    // SAFETY: SIGBUS from the kernel carries an address.
    let address = unsafe { info.si_addr() };
    address.addr()
}

/// Puts fresh pages over `addr` and marks the owner, if `addr` is in a region. Returns whether both
/// succeeded.
fn heal(addr: usize) -> bool {
    let used = USED.load(Ordering::Acquire).min(CAPACITY);
    let Some(found) = ENTRIES[..used].iter().find_map(|entry| entry.find(addr)) else {
        return false;
    };
    // The mark is set first: pages that the guest does not see must never be used without it.
    // SAFETY: the access that failed was to a live region, which holds its `Fenced`, which holds
    // the mark that the entry points to.
    unsafe { (*found.mark).set() };
    let (start, len) = hole(&found, addr);
    // Many holes can use up the process's mappings. To replace the whole region takes only one.
    replace(start, len) || replace(found.start, found.len)
}

/// Returns start and length of the part to replace: the aligned 2 MiB around `addr`, or its whole
/// huge page (less would be EINVAL), within the region.
fn hole(found: &Found, addr: usize) -> (usize, usize) {
    let step = found.page_size.max(REPLACED);
    let start = (addr & !(step - 1)).max(found.start);
    let end = (addr | (step - 1)).min(found.start + (found.len - 1));
    (start, end - start + 1)
}

fn replace(start: usize, len: usize) -> bool {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let place = ptr::with_exposed_provenance_mut::<libc::c_void>(start);
    // SAFETY: [start, start + len) lies in a live region (`hole` clamps to it), which is mapped
    // shared memory that no Rust reference points into, so other contents are all that changes.
    let mapped = unsafe { libc::mmap(place, len, protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return false;
    }
    // Frames of other guests may be copied here, so core dumps must not contain these pages. Best
    // effort.
    // SAFETY: the range was mapped just now.
    unsafe { libc::madvise(mapped, len, libc::MADV_DONTDUMP) };
    true
}

/// Does what would have happened without our handler.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(previous) = PREVIOUS.get() else {
        return;
    };
    match previous.sa_sigaction {
        // Ignoring a fault would repeat it for ever, and the kernel does not allow it either.
        libc::SIG_DFL | libc::SIG_IGN => die(signal),
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
            // SAFETY: installed by its owner with SA_SIGINFO, so it has this signature.
            let handler = unsafe { std::mem::transmute::<usize, Handler>(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: installed by its owner without SA_SIGINFO, so it has this signature.
            let handler =
                unsafe { std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(handler) };
            handler(signal);
        }
    }
}

/// Restores the default action and raises the signal again; it is delivered when the handler
/// returns.
fn die(signal: libc::c_int) {
    // SAFETY: all zeroes is a valid sigaction: default action, empty mask.
    let action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: `action` is valid for reading; sigaction is async-signal-safe.
    unsafe { libc::sigaction(signal, &action, ptr::null_mut()) };
    // SAFETY: async-signal-safe.
    unsafe { libc::raise(signal) };
}

#[cfg(test)]
#[path = "fence_tests.rs"]
mod tests;
