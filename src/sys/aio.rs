//! Signals call eventfds without ever sleeping.
//!
//! A `write` to a frontend's eventfd blocks for ever if the frontend filled the eventfd and cleared
//! O_NONBLOCK. No check before the write closes that race. The kernel's asynchronous I/O signals an
//! eventfd when a request completes, and this never sleeps. A full eventfd stays full, and its
//! reader is woken all the same. So a batch of calls is a batch of one-byte writes to /dev/null,
//! which complete at once. One `io_submit` makes all calls of a pass. A call costs about twice a
//! bare `write`.
//!
//! A [`Caller`] belongs to one thread at a time. After `new` it allocates nothing and blocks
//! nowhere. If a descriptor is refused, only its own call is lost.
//!
//! Completions collect in a ring that the kernel shares with the process. Nobody needs them. They
//! are discarded by moving the head of the ring to its tail, as user space may do. If the layout of
//! the ring is unknown, io_getevents without waiting discards them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

use rustix::io::Errno;

use super::refused::{Wanted, refused};

/// Most calls of one system call. More calls take several system calls.
pub const BATCH: usize = 128;

const IOCB_CMD_PWRITE: u16 = 1;
const IOCB_FLAG_RESFD: u32 = 1;
const RING_MAGIC: u32 = 0xa10a_10a1;

/// `struct iocb` of the kernel (linux/aio_abi.h), little-endian member order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    result_fd: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct IoEvent {
    data: u64,
    iocb: u64,
    result: i64,
    result2: i64,
}

/// The head of `struct aio_ring`. The kernel maps the ring at the address that is the context's id.
#[repr(C)]
struct Ring {
    id: u32,
    entries: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
    compatible: u32,
    incompatible: u32,
    header_len: u32,
}

/// The byte that is written to /dev/null.
static BYTE: u8 = 0;

/// Calls per system call of [`with_spare`].
const SPARE_BATCH_CALLS: usize = 8;
/// Most callers that are kept for later.
const SPARE_CALLERS: usize = 8;
/// Callers that no thread uses at the moment, each in a place of its own: a thread that loses its
/// processor with one locked must not stop all others.
static SPARE: [Mutex<Option<Caller>>; SPARE_CALLERS] = [const { Mutex::new(None) }; SPARE_CALLERS];

/// Lets `work` make calls, for a thread that makes calls only now and then. Such threads share
/// callers: a context for each thread would count against `aio-max-nr`, and the kernel takes
/// milliseconds to end a context. No thread waits for the calls of another one. Returns an error if
/// no caller is free and the kernel refuses a new context. After the first success this cannot fail
/// as long as one thread at a time calls it.
pub fn with_spare<R>(work: impl FnOnce(&mut Caller) -> R) -> io::Result<R> {
    let taken = SPARE.iter().find_map(|place| place.try_lock().ok()?.take());
    let mut caller = match taken {
        Some(caller) => caller,
        None => Caller::for_batches(SPARE_BATCH_CALLS)?,
    };
    let result = work(&mut caller);
    let mut rest = Some(caller);
    for place in &SPARE {
        if let Ok(mut place) = place.try_lock()
            && place.is_none()
        {
            *place = rest.take();
            break;
        }
    }
    Ok(result)
}

/// Returns the file that all callers write to: one descriptor for all of them.
fn null() -> io::Result<&'static File> {
    static NULL: OnceLock<File> = OnceLock::new();
    if let Some(null) = NULL.get() {
        return Ok(null);
    }
    let null = OpenOptions::new().write(true).open("/dev/null")?;
    Ok(NULL.get_or_init(|| null))
}

/// What one thread needs to signal call eventfds.
pub struct Caller {
    context: libc::c_ulong,
    // `None`: layout unknown.
    ring: Option<NonNull<Ring>>,
    iocbs: Box<[Iocb]>,
    pointers: Box<[*mut Iocb]>,
}

// SAFETY: context and ring belong to the process; a `Caller` is used by one thread at a time (&mut
// self).
unsafe impl Send for Caller {}

impl std::fmt::Debug for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let maps_ring = self.ring.is_some();
        f.debug_struct("Caller")
            .field("maps_ring", &maps_ring)
            .finish_non_exhaustive()
    }
}

impl Caller {
    /// Makes a caller for batches of up to [`BATCH`] calls, as a poll thread needs it.
    pub fn new() -> io::Result<Caller> {
        Caller::for_batches(BATCH)
    }

    /// Makes a caller for batches of up to `batch` calls, with a context of the kernel. Fails if
    /// AIO is switched off (seccomp, CONFIG_AIO) or `/proc/sys/fs/aio-max-nr` is used up.
    pub fn for_batches(batch: usize) -> io::Result<Caller> {
        let null = null().map_err(|error| refused(Wanted::Descriptor, error))?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: `context` is valid for writing and zero, as io_setup demands.
        check(unsafe { libc::syscall(libc::SYS_io_setup, batch as libc::c_ulong, &mut context) })
            .map_err(|error| refused(Wanted::AsyncIo, error))?;
        let iocb = Iocb {
            opcode: IOCB_CMD_PWRITE,
            fd: null.as_raw_fd().unsigned_abs(),
            buffer: (&raw const BYTE).expose_provenance() as u64,
            len: 1,
            flags: IOCB_FLAG_RESFD,
            ..Iocb::default()
        };
        Ok(Caller {
            context,
            ring: known_ring(context),
            iocbs: vec![iocb; batch].into_boxed_slice(),
            pointers: vec![std::ptr::null_mut(); batch].into_boxed_slice(),
        })
    }

    /// Signals every eventfd of `fds` once. Returns how many were signalled. If a descriptor is
    /// refused, `refused` gets its place in `fds` and the reason (EINVAL: no eventfd), and the
    /// others are still signalled.
    pub fn signal<'f>(
        &mut self,
        fds: impl IntoIterator<Item = BorrowedFd<'f>>,
        mut refused: impl FnMut(usize, Errno),
    ) -> usize {
        let mut fds = fds.into_iter().fuse();
        let mut signalled = 0;
        let mut before = 0;
        loop {
            let mut filled = 0;
            for (iocb, fd) in self.iocbs.iter_mut().zip(&mut fds) {
                iocb.result_fd = fd.as_raw_fd().unsigned_abs();
                filled += 1;
            }
            if filled == 0 {
                return signalled;
            }
            signalled += self.submit(filled, |at, errno| refused(before + at, errno));
            before += filled;
            if filled < self.iocbs.len() {
                return signalled;
            }
        }
    }

    /// Submits the first `count` requests. The kernel stops at the first request that it refuses
    /// and returns how many it took. It returns the reason only if the refused request is the first
    /// one of the call.
    fn submit(&mut self, count: usize, mut refused: impl FnMut(usize, Errno)) -> usize {
        // The pointers are made anew each time, because the requests were written through another
        // pointer since the last time.
        let base = self.iocbs.as_mut_ptr();
        for (at, pointer) in self.pointers.iter_mut().enumerate() {
            *pointer = base.wrapping_add(at);
        }
        let mut signalled = 0;
        let mut at = 0;
        let mut reaped = false;
        while at < count {
            match self.io_submit(at, count) {
                Ok(taken) if taken > 0 => {
                    at += taken;
                    signalled += taken;
                    reaped = false;
                }
                // The context is full. Only completions of earlier batches can fill it, so they are
                // discarded.
                Err(Errno::AGAIN) if !reaped => {
                    self.reap();
                    reaped = true;
                }
                Ok(_) => {
                    refused(at, Errno::AGAIN);
                    at += 1;
                }
                Err(errno) => {
                    refused(at, errno);
                    at += 1;
                    reaped = false;
                }
            }
        }
        self.reap();
        signalled
    }

    fn io_submit(&self, from: usize, to: usize) -> Result<usize, Errno> {
        let pointers = &self.pointers[from..to];
        // SAFETY: `pointers` lead to requests in `self.iocbs`, whose buffer is a static and whose
        // target is /dev/null; nothing of ours is written but the requests' keys. They are complete
        // when the call returns, and the kernel keeps no pointer to them.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_submit,
                self.context,
                pointers.len() as libc::c_long,
                pointers.as_ptr(),
            )
        };
        usize::try_from(result).map_err(|_| last_errno())
    }

    /// Discards all completions, so that the context has room again.
    fn reap(&mut self) {
        let Some(ring) = self.ring else {
            return self.reap_by_call();
        };
        // SAFETY: mapped by the kernel until io_destroy in `drop`; both fields are accessed
        // atomically only, and the kernel accesses them as hardware does.
        let ring = unsafe { ring.as_ref() };
        // Acquire pairs with the kernel's write barrier between event and tail; release keeps the
        // kernel from reusing the entries before this (it reads the head when it runs out of room).
        let tail = ring.tail.load(Ordering::Acquire);
        ring.head.store(tail, Ordering::Release);
    }

    #[cold]
    fn reap_by_call(&mut self) {
        let mut events = [IoEvent::default(); 32];
        loop {
            let at_once = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            // SAFETY: `events` is valid for writing its length, `at_once` for reading.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_io_getevents,
                    self.context,
                    0 as libc::c_long,
                    events.len() as libc::c_long,
                    events.as_mut_ptr(),
                    &at_once,
                )
            };
            if result < events.len() as libc::c_long {
                return;
            }
        }
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        // SAFETY: the context is ours and nobody uses it (&mut self). The kernel unmaps the ring.
        let _ = unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

/// Returns the ring of a context, if it has the only layout that ever existed.
fn known_ring(context: libc::c_ulong) -> Option<NonNull<Ring>> {
    let ring = std::ptr::with_exposed_provenance_mut::<Ring>(context as usize);
    let ring = NonNull::new(ring)?;
    // SAFETY: io_setup maps the ring, readable and writable, at the address it returns.
    let head = unsafe { ring.as_ref() };
    let known = head.magic == RING_MAGIC
        && head.incompatible == 0
        && head.header_len as usize == size_of::<Ring>();
    known.then_some(ring)
}

fn last_errno() -> Errno {
    let code = io::Error::last_os_error().raw_os_error();
    Errno::from_raw_os_error(code.unwrap_or(libc::EIO))
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::io::{read, write};
    use std::os::fd::{AsFd, OwnedFd};

    fn good() -> OwnedFd {
        eventfd(0, EventfdFlags::NONBLOCK).unwrap()
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut value = [0; 8];
        match read(fd, &mut value) {
            Ok(_) => u64::from_ne_bytes(value),
            Err(_) => 0,
        }
    }

    fn unexpected(at: usize, errno: Errno) {
        panic!("{at} refused: {errno}");
    }

    #[test]
    fn threads_that_call_at_the_same_time_have_callers_of_their_own() {
        let fd = good();
        fn nested(fd: &OwnedFd, others: &mut Vec<libc::c_ulong>) {
            let worked = with_spare(|caller| {
                assert!(!others.contains(&caller.context));
                others.push(caller.context);
                if others.len() <= SPARE_CALLERS {
                    nested(fd, others);
                }
                caller.signal([fd.as_fd()], unexpected)
            });
            assert_eq!(worked.unwrap(), 1);
        }
        nested(&fd, &mut Vec::new());
        assert_eq!(count(&fd), SPARE_CALLERS as u64 + 1);
    }

    #[test]
    fn an_eventfd_counts_its_calls() {
        let mut caller = Caller::new().unwrap();
        let fds = [good(), good()];
        for _ in 0..3 {
            let sent = caller.signal(fds.iter().map(|fd| fd.as_fd()), unexpected);
            assert_eq!(sent, 2);
        }
        assert_eq!(caller.signal([fds[1].as_fd()], unexpected), 1);
        assert_eq!(caller.signal([], unexpected), 0);
        assert_eq!([count(&fds[0]), count(&fds[1])], [3, 4]);
    }

    #[test]
    fn a_full_blocking_eventfd_does_not_block() {
        let mut caller = Caller::new().unwrap();
        let full = eventfd(0, EventfdFlags::empty()).unwrap();
        write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let after = good();
        let fds = [full.as_fd(), after.as_fd()];
        for _ in 0..3 {
            assert_eq!(caller.signal(fds, unexpected), 2);
        }
        assert_eq!(count(&after), 3);
    }

    #[test]
    fn what_is_no_eventfd_is_skipped_and_named() {
        let mut caller = Caller::new().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let (first, last) = (good(), good());
        let fds = [
            reader.as_fd(),
            first.as_fd(),
            writer.as_fd(),
            writer.as_fd(),
            last.as_fd(),
        ];
        let mut refused = Vec::new();
        let sent = caller.signal(fds, |at, errno| refused.push((at, errno)));
        assert_eq!(sent, 2);
        let expected = [0, 2, 3].map(|at| (at, Errno::INVAL));
        assert_eq!(refused, expected);
        assert_eq!([count(&first), count(&last)], [1, 1]);
    }

    #[test]
    fn the_context_does_not_run_out() {
        let mut caller = Caller::new().unwrap();
        let fd = good();
        for _ in 0..10_000 {
            assert_eq!(caller.signal([fd.as_fd()], unexpected), 1);
        }
        assert_eq!(count(&fd), 10_000);
    }

    #[test]
    fn more_than_a_batch_is_signalled() {
        let mut caller = Caller::new().unwrap();
        let fd = good();
        for calls in [BATCH - 1, BATCH, BATCH + 1, 5 * BATCH + 7] {
            let fds = std::iter::repeat_n(fd.as_fd(), calls);
            assert_eq!(caller.signal(fds, unexpected), calls);
            assert_eq!(count(&fd), calls as u64);
        }
    }

    #[test]
    fn completions_are_reaped_by_call_where_the_ring_is_unknown() {
        let mut caller = Caller::new().unwrap();
        assert!(caller.ring.is_some(), "this kernel's ring is known");
        caller.ring = None;
        let fd = good();
        for _ in 0..2_000 {
            assert_eq!(caller.signal([fd.as_fd(); 3], unexpected), 3);
        }
        assert_eq!(count(&fd), 6_000);
    }
}
