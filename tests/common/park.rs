//! One thread of another process, stopped in the middle of whatever it does.

use std::io;

use super::daemon::Daemon;

/// A thread that stands still as long as this lives. To be made and dropped by one thread, its
/// tracer.
#[derive(Debug)]
pub(crate) struct Parked {
    thread: libc::pid_t,
    _tracer: std::marker::PhantomData<*const ()>,
}

impl Parked {
    /// Stops a poll thread of a daemon, by its number.
    pub(crate) fn poll_thread(daemon: &Daemon, number: usize) -> Parked {
        let tid = daemon.poll_threads()[number]["tid"].as_u64();
        let tid = tid.and_then(|tid| u32::try_from(tid).ok());
        Parked::park(tid.expect("a thread's id")).expect("it can be stopped")
    }

    /// Stops a thread of a child of ours; returns when it stands.
    #[allow(unsafe_code, reason = "there is no safe wrapper of ptrace")]
    pub(crate) fn park(thread: u32) -> io::Result<Parked> {
        let thread = libc::pid_t::try_from(thread).map_err(io::Error::other)?;
        trace(libc::PTRACE_SEIZE, thread)?;
        let parked = Parked {
            thread,
            _tracer: std::marker::PhantomData,
        };
        trace(libc::PTRACE_INTERRUPT, thread)?;
        let mut status = 0;
        // SAFETY: `status` is valid for writing.
        let waited = unsafe { libc::waitpid(thread, &mut status, libc::__WALL) };
        if waited != thread || !libc::WIFSTOPPED(status) {
            return Err(io::Error::last_os_error());
        }
        Ok(parked)
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        // Fails only if the thread is gone.
        let _ = trace(libc::PTRACE_DETACH, self.thread);
    }
}

#[allow(unsafe_code, reason = "there is no safe wrapper of ptrace")]
fn trace(request: libc::c_uint, thread: libc::pid_t) -> io::Result<()> {
    // SAFETY: these requests take no address and write nothing of ours.
    let result = unsafe { libc::ptrace(request, thread, 0, 0) };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
