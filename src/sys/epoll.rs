//! The sleep of an idle poll thread: on the kick eventfds of its queues, and on a bell of its own.
//!
//! Nothing else wakes the thread. A publication rings the bell only of threads whose work changed,
//! so other threads sleep through the changes of other ports.
//!
//! Kicks are registered edge-triggered and never read. A frontend can clear O_NONBLOCK and make a
//! read block for ever. A descriptor that is always readable would keep a level-triggered epoll
//! awake. Every kick is a write and every write is an edge, so no kick is missed.
//!
//! Control adds and removes descriptors while the thread sleeps; the kernel allows that. Control
//! must remove a descriptor before it is closed: the frontend still has the description open, so
//! closing alone would leave it registered.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

use super::refused::{Wanted, refused};
use super::wake::Wake;

/// Token of the thread's own bell; no kick may use it.
const BELL: u64 = u64::MAX;

/// Most events that are taken with one system call. The rest is taken by the next call.
const EVENTS: usize = 32;

/// What ended a sleep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Woken {
    /// Somebody called [`Sleeper::wake`].
    pub bell: bool,
    /// How many kicks were passed to the closure.
    pub kicks: u32,
}

/// What one thread sleeps on: an epoll with kicks, and a bell.
#[derive(Debug)]
pub struct Sleeper {
    epoll: OwnedFd,
    bell: Wake,
}

impl Sleeper {
    /// A sleeper that only its own bell wakes.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)
            .map_err(|errno| refused(Wanted::Descriptor, errno.into()))?;
        let bell = Wake::new()?;
        epoll::add(&epoll, &bell, EventData::new_u64(BELL), EventFlags::IN)?;
        Ok(Sleeper { epoll, bell })
    }

    /// Lets `kick` wake the thread. `sleep` passes `token` to its closure then. The token must not
    /// be `u64::MAX`.
    ///
    /// The next sleep also reports a kick that came before this call.
    pub fn add_kick(&self, kick: impl AsFd, token: u64) -> io::Result<()> {
        debug_assert_ne!(token, BELL);
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&self.epoll, kick, EventData::new_u64(token), flags)?;
        Ok(())
    }

    /// Removes a kick. A sleep that is just returning may still report its token.
    pub fn remove(&self, kick: impl AsFd) -> io::Result<()> {
        epoll::delete(&self.epoll, kick)?;
        Ok(())
    }

    /// Ends the current sleep, or the next one.
    pub fn wake(&self) {
        self.bell.wake();
    }

    /// Sleeps until a kick, the bell, or the end of `timeout` (`None`: no end). A signal ends the
    /// sleep too.
    pub fn sleep(&self, timeout: Option<Duration>, mut kicked: impl FnMut(u64)) -> Woken {
        let timeout = timeout.map(|t| Timespec {
            // A time that is too long for the kernel's type is as good as for ever.
            tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX / 2),
            tv_nsec: t.subsec_nanos().into(),
        });
        let none = Event {
            flags: EventFlags::empty(),
            data: EventData::new_u64(0),
        };
        let mut events = [none; EVENTS];
        // The error is EINTR, or the descriptor is broken. To return early is right in both cases.
        let count = epoll::wait(&self.epoll, &mut events, timeout.as_ref()).unwrap_or(0);
        let mut woken = Woken::default();
        for event in events.iter().take(count) {
            // The field is copied, because the event is a packed struct on x86-64.
            let data = event.data;
            match data.u64() {
                BELL => woken.bell |= self.bell.drain(),
                token => {
                    woken.kicks += 1;
                    kicked(token);
                }
            }
        }
        woken
    }
}

/// The descriptor is readable while a sleep would end at once. So it can be watched together with
/// others.
impl AsFd for Sleeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::sync::Arc;

    const SHORT: Option<Duration> = Some(Duration::from_millis(1));
    const LONG: Option<Duration> = Some(Duration::from_secs(20));

    fn kick(fd: &OwnedFd) {
        rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
    }

    fn tokens(sleeper: &Sleeper) -> Vec<u64> {
        let mut seen = Vec::new();
        sleeper.sleep(SHORT, |token| seen.push(token));
        seen
    }

    #[test]
    fn nothing_happens_until_the_timeout() {
        let sleeper = Sleeper::new().unwrap();
        let before = std::time::Instant::now();
        let woken = sleeper.sleep(Some(Duration::from_micros(300)), |_| {});
        assert_eq!(woken, Woken::default());
        assert!(before.elapsed() >= Duration::from_micros(300));
    }

    #[test]
    fn every_kick_is_an_edge_although_nobody_reads() {
        let sleeper = Sleeper::new().unwrap();
        let fd = eventfd(0, EventfdFlags::empty()).unwrap();
        sleeper.add_kick(&fd, 7).unwrap();
        assert!(tokens(&sleeper).is_empty());
        for _ in 0..3 {
            kick(&fd);
            assert_eq!(tokens(&sleeper), [7]);
            assert!(tokens(&sleeper).is_empty());
        }
    }

    #[test]
    fn a_kick_before_the_registration_is_seen() {
        let sleeper = Sleeper::new().unwrap();
        let fd = eventfd(5, EventfdFlags::SEMAPHORE).unwrap();
        sleeper.add_kick(&fd, 9).unwrap();
        assert_eq!(tokens(&sleeper), [9]);
    }

    #[test]
    fn a_removed_kick_is_silent() {
        let sleeper = Sleeper::new().unwrap();
        let fd = eventfd(0, EventfdFlags::empty()).unwrap();
        sleeper.add_kick(&fd, 1).unwrap();
        kick(&fd);
        sleeper.remove(&fd).unwrap();
        kick(&fd);
        assert!(tokens(&sleeper).is_empty());
        assert!(sleeper.remove(&fd).is_err());
    }

    #[test]
    fn a_regular_file_is_an_error() {
        let sleeper = Sleeper::new().unwrap();
        let file = crate::sys::memfd::create("pollux-test", 8).unwrap();
        assert!(sleeper.add_kick(&file, 1).is_err());
    }

    #[test]
    fn other_threads_wake_and_register() {
        let sleeper = Arc::new(Sleeper::new().unwrap());
        let other = Arc::clone(&sleeper);
        let thread = std::thread::spawn(move || {
            let fd = eventfd(1, EventfdFlags::empty()).unwrap();
            other.add_kick(&fd, 3).unwrap();
            fd
        });
        let mut seen = Vec::new();
        assert_eq!(sleeper.sleep(LONG, |token| seen.push(token)).kicks, 1);
        assert_eq!(seen, [3]);
        drop(thread.join().unwrap());
        let other = Arc::clone(&sleeper);
        let thread = std::thread::spawn(move || other.wake());
        assert!(sleeper.sleep(LONG, |_| {}).bell);
        thread.join().unwrap();
        assert!(!sleeper.sleep(SHORT, |_| {}).bell);
    }
}
