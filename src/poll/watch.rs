//! Whose memory a poll thread waits for.
//!
//! A page fault can keep the thread for as long as whoever owns the page likes (see `sys::pages`),
//! and it cannot be foreseen: only a system call would tell whether a page is there, and it may go
//! between question and use. So the thread finds out afterwards, and makes sure that it does not
//! happen again:
//!
//! - A pass that was long, and in which there were page faults, *alarms* the thread. This costs
//!   nothing where passes are short: one look at [`own_usage`] in a place where the thread looks at
//!   its CPU time.
//! - While it is alarmed, each transmit queue's frames are a burst of their own, the sender's pages
//!   are touched before anything is claimed for them, and each *step* (one queue taken from and
//!   read, one port delivered to) is timed. A long one with faults is charged to the port whose
//!   memory was touched in it. Short steps cost two looks at the clock.
//! - An alarm lasts [`ALARM`] times as long as what caused it, and ends soon where the culprit is
//!   found.
//! - Frames of a queue that has many are a burst of their own always, and the reading of their
//!   heads is timed. So the first wait of all, long as it may be, is charged as well if it is
//!   there: that is where frames in a hole are first touched. A wait elsewhere, or for one of the
//!   few frames that share a burst with others', names nobody: it only alarms, and the second one
//!   is charged.
//!
//! Faults and waits are counted by thread, and looked at where a step was long: what short steps
//! before it had is counted in, so a thread that is alarmed looks once at the start of each pass. A
//! step in which the thread lost its CPU is no wait: what is charged is the time that it ran in the
//! pass, at most, where it did not go to wait by itself.

use std::sync::Arc;
use std::time::Duration;

use crate::stats::ThreadStats;
use crate::sys::pages::{Pace, PageGuard};
use crate::sys::sched::{Usage, own_cpu_time, own_usage};
use crate::sys::wake::Wake;

/// A step longer than this is looked at: more than it takes to make a page for each of 64 frames, 4
/// µs each. Guests that download into memory which nobody has used before do that for minutes, and
/// are not to be taken for hostile ones.
const LONG_STEP_NS: u64 = 250_000;
/// The same in the thread of slow ports: what is slow there does not have to harm anybody.
const LONG_SLOW_STEP_NS: u64 = 20_000;
/// How many times as long as the pass that caused it an alarm lasts.
const ALARM: u64 = 100;
/// The shortest and the longest alarm.
const SHORTEST_NS: u64 = 100_000_000;
const LONGEST_NS: u64 = 60_000_000_000;

/// A poll thread's watch over its page faults, from one topology to the next.
#[derive(Debug)]
pub(super) struct Watch {
    clock: quanta::Clock,
    /// Rung when a port is marked: control takes it off the shared threads.
    bell: Option<Arc<Wake>>,
    /// At the last look.
    usage: Usage,
    /// How long the thread had run at the start of the pass, or at the last long step of it.
    ran: Duration,
    /// Where the present step began, by the raw clock.
    began: u64,
    /// When the alarm was last raised, and how long it lasts.
    alarmed: Option<(u64, u64)>,
    /// It has marked a port, and control may not have published that yet.
    marked: bool,
    /// The thread serves ports whose memory is slow: always alarmed.
    slow: bool,
    /// A step longer than this is looked at.
    pub(super) long_ns: u64,
}

impl Watch {
    pub(super) fn new(clock: &quanta::Clock, bell: Option<Arc<Wake>>, slow: bool) -> Self {
        Watch {
            clock: clock.clone(),
            bell,
            usage: own_usage(),
            ran: Duration::ZERO,
            began: clock.raw(),
            alarmed: None,
            marked: false,
            slow,
            long_ns: if slow {
                LONG_SLOW_STEP_NS
            } else {
                LONG_STEP_NS
            },
        }
    }

    /// Whether the thread serves ports whose memory is slow.
    #[inline(always)]
    pub(super) fn is_slow(&self) -> bool {
        self.slow
    }

    /// Whether steps are timed.
    #[inline(always)]
    pub(super) fn is_alarmed(&self) -> bool {
        self.alarmed.is_some() || self.slow
    }

    /// Ends the watch: no alarm is raised, and nobody is charged. Counts of instructions need that:
    /// an interpreter makes every pass long.
    pub(super) fn disable(&mut self) {
        (self.alarmed, self.long_ns) = (None, u64::MAX);
    }

    /// A pass was long, or it is time for a look anyway: raises the alarm if there were page faults
    /// in a long one.
    #[cold]
    pub(super) fn look(&mut self, long_ns: Option<u64>) {
        let usage = own_usage();
        let before = std::mem::replace(&mut self.usage, usage);
        // A shorter pass has no step that would be charged.
        if let Some(ns) = long_ns
            && ns > self.long_ns
            && usage.faults > before.faults
        {
            self.alarm(ns);
        }
    }

    fn alarm(&mut self, ns: u64) {
        let now = self.clock.raw();
        let lasts = (ALARM * ns).clamp(SHORTEST_NS, LONGEST_NS);
        let left = self.left(now);
        if lasts > left {
            self.alarmed = Some((now, lasts));
        }
    }

    /// Nanoseconds that the alarm still lasts.
    fn left(&self, now: u64) -> u64 {
        self.alarmed.map_or(0, |(since, lasts)| {
            lasts.saturating_sub(self.clock.delta_as_nanos(since, now))
        })
    }

    /// The thread takes over another topology.
    #[inline(always)]
    pub(super) fn take_over(&mut self) {
        if self.marked {
            // Without the culprit, or the next one is. Who else keeps the thread waiting is found
            // anew.
            (self.marked, self.alarmed) = (false, Some((self.clock.raw(), SHORTEST_NS)));
        }
    }

    /// A pass of a thread that is alarmed begins.
    #[cold]
    pub(super) fn pass(&mut self) {
        if self.left(self.clock.raw()) == 0 {
            self.alarmed = None;
        }
        (self.usage, self.ran) = (own_usage(), own_cpu_time());
        self.begin();
    }

    /// A step begins.
    #[inline(always)]
    pub(super) fn begin(&mut self) {
        self.began = self.clock.raw();
    }

    /// A step has ended, in which the memory that `pages` guards was touched; the next one begins.
    /// Returns whether the port is one whose memory this thread must not touch any more.
    pub(super) fn charge(&mut self, pages: &PageGuard, stats: &ThreadStats) -> bool {
        let now = self.clock.raw();
        let ns = self.clock.delta_as_nanos(self.began, now);
        self.began = now;
        if ns > self.long_ns {
            self.charge_long((pages, stats), ns, false);
        }
        self.avoids(pages)
    }

    /// Within a step that touches page after page: charges it if it is long already. Returns
    /// whether to stop.
    pub(super) fn charge_so_far(&mut self, pages: &PageGuard, stats: &ThreadStats) -> bool {
        let now = self.clock.raw();
        let ns = self.clock.delta_as_nanos(self.began, now);
        if ns <= self.long_ns {
            return false;
        }
        self.began = now;
        self.charge_long((pages, stats), ns, false);
        self.avoids(pages)
    }

    /// A step has ended of a thread that is not alarmed: only a wait counts, for how long the
    /// thread has run since it last looked is not known well enough.
    #[inline(always)]
    pub(super) fn charge_wait(&mut self, pages: &PageGuard, stats: &ThreadStats) -> bool {
        let ns = self.clock.delta_as_nanos(self.began, self.clock.raw());
        if ns <= self.long_ns {
            return false;
        }
        self.charge_long((pages, stats), ns, true);
        self.avoids(pages)
    }

    #[cold]
    fn charge_long(
        &mut self,
        (pages, stats): (&PageGuard, &ThreadStats),
        ns: u64,
        waits_only: bool,
    ) {
        let usage = own_usage();
        let before = std::mem::replace(&mut self.usage, usage);
        let faults = usage.faults - before.faults;
        let waited = usage.waits > before.waits;
        if faults == 0 {
            return;
        }
        self.alarm(ns);
        if waits_only && !waited {
            return;
        }
        let now = own_cpu_time();
        let ran = now.saturating_sub(std::mem::replace(&mut self.ran, now));
        let step = Duration::from_nanos(ns);
        let cost = if waited { step } else { step.min(ran) };
        stats.slow_faults.add(faults);
        stats
            .slow_faults_ns
            .add(u64::try_from(cost.as_nanos()).unwrap_or(u64::MAX));
        if pages.charge(cost, faults) {
            // The culprit is found. Until control has taken it away, its memory is avoided.
            (self.marked, self.alarmed) = (true, Some((self.clock.raw(), LONGEST_NS)));
            if let Some(bell) = &self.bell {
                bell.wake();
            }
        }
    }

    /// Whether a port's memory is not for this thread to touch.
    pub(super) fn avoids(&self, pages: &PageGuard) -> bool {
        !self.slow && matches!(pages.pace(), Pace::Marked | Pace::Slow)
    }
}
