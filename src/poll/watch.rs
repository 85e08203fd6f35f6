//! Finds out whose memory a poll thread waits for.
//!
//! A page fault can keep the thread for as long as the owner of the page likes (see `sys::pages`).
//! A fault cannot be foreseen: only a system call would tell whether a page is there, and the page
//! may go between question and use. So the thread finds out afterwards, and makes sure that it does
//! not happen again:
//!
//! - A pass that was long, and in which there were page faults, *alarms* the thread. This costs
//!   nothing while passes are short: one look at [`own_usage`] where the thread looks at its CPU
//!   time.
//! - While the thread is alarmed, each transmit queue's frames are a burst of their own. The
//!   sender's pages are touched before anything is claimed for them. Each *step* (one queue taken
//!   from and read, one port delivered to) is timed. A long step with faults is charged to the port
//!   whose memory was touched in it. Short steps cost two looks at the clock.
//! - A port is *suspect* if a step does not tell who is to pay. There are three such steps: a long
//!   delivery, whose copies read the sender's memory and write the receiver's; a long step in which
//!   the thread lost its CPU; many short steps of one port that make a pass long. While the alarm
//!   lasts, faults are counted for each step of a suspect port, and its frames are copied into
//!   private memory before they are delivered. So reading is charged to the sender alone, and
//!   writing to the receiver.
//! - Steps of a suspect port with faults are added up. What exceeds [`LONG_STEP_NS`] in a pass is
//!   charged. So many queues with a few new pages each cost a port as much as one queue with many.
//! - An alarm lasts [`ALARM`] times as long as what caused it, and ends soon once the culprit is
//!   found.
//! - Frames of a queue that has many are always a burst of their own, and the reading of their
//!   heads is timed. Frames in a hole are first touched there, so the very first wait is mostly
//!   charged as well. A wait elsewhere, or for one of few frames that share a burst with others,
//!   names nobody. It only alarms. The second wait is charged or makes ports suspect, and then the
//!   third is charged.
//!
//! The kernel counts page faults and waits for the whole thread. They are read after a long step
//! only, so the faults of the short steps before it are included. To bound that, an alarmed thread
//! also reads them when a pass begins. Losing the CPU is not a wait. Unless the thread blocked by
//! itself, a step is charged no more than the CPU time used since the faults were last read.

use std::sync::Arc;
use std::time::Duration;

use crate::config::MAX_PORTS;
use crate::stats::ThreadStats;
use crate::sys::pages::{Pace, PageGuard};
use crate::sys::sched::{Usage, own_cpu_time, own_usage};
use crate::sys::wake::Wake;
use crate::topology::{Egress, Ingress};

/// Steps up to this length, in nanoseconds, are charged only if their port is suspect. Making 64
/// new pages at 4 µs each takes about as long. Guests that download into new memory do that for
/// minutes, and must not be taken for hostile ones.
const LONG_STEP_NS: u64 = 250_000;
/// The same limit in the thread of slow ports, in nanoseconds. It is lower because memory that is
/// slow there need not harm anybody to count as slow.
const LONG_SLOW_STEP_NS: u64 = 20_000;
/// An alarm lasts so many times as long as the pass or step that caused it.
const ALARM: u64 = 100;
/// The shortest and the longest alarm, in nanoseconds.
const SHORTEST_NS: u64 = 100_000_000;
const LONGEST_NS: u64 = 60_000_000_000;

/// The port whose memory a step touches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Payer<'a> {
    slot: u16,
    pages: &'a PageGuard,
}

impl<'a> From<&'a Ingress> for Payer<'a> {
    fn from(ingress: &'a Ingress) -> Self {
        Payer {
            slot: ingress.reference.slot,
            pages: &ingress.shared.pages,
        }
    }
}

impl<'a> From<&'a Egress> for Payer<'a> {
    fn from(egress: &'a Egress) -> Self {
        Payer {
            slot: egress.reference.slot,
            pages: &egress.shared.pages,
        }
    }
}

/// What the steps of one port have cost in one pass.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    /// Number of the pass that `ns` belongs to.
    pass: u32,
    /// Nanoseconds of all steps; of a suspect port, only of steps with faults.
    ns: u64,
    suspect: bool,
}

/// A poll thread's watch over its page faults, from one topology to the next.
#[derive(Debug)]
pub(super) struct Watch {
    clock: quanta::Clock,
    /// Rung when a port is marked: control takes it off the shared threads.
    bell: Option<Arc<Wake>>,
    /// The kernel's counts at the last look.
    usage: Usage,
    /// CPU time of the thread when `read_usage` was last called.
    ran: Duration,
    /// When the present step began, by the raw clock.
    began: u64,
    /// When the alarm was last raised, by the raw clock, and how many nanoseconds it lasts.
    alarmed: Option<(u64, u64)>,
    /// Number of the present pass.
    pass: u32,
    /// Accounts by slot of the port. All are cleared when the alarm ends.
    accounts: Box<[Account]>,
    /// Whether the thread has marked a port, and has adopted no other topology since.
    marked: bool,
    /// Whether the thread serves ports whose memory is slow. Such a thread is always alarmed.
    slow: bool,
    /// A step longer than this is looked at, in nanoseconds.
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
            pass: 0,
            accounts: vec![Account::default(); MAX_PORTS].into(),
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

    /// Whether the thread is alarmed, so that steps are timed.
    #[inline(always)]
    pub(super) fn is_alarmed(&self) -> bool {
        self.alarmed.is_some() || self.slow
    }

    /// Ends the watch: no alarm is raised, and nobody is charged. Needed to count instructions,
    /// because an interpreter makes every pass long.
    pub(super) fn disable(&mut self) {
        (self.alarmed, self.long_ns) = (None, u64::MAX);
    }

    /// Reads the kernel's counts. `long_ns` is the length of a pass that was long, or `None` for a
    /// look without such a pass. Raises the alarm if there were page faults in a long pass.
    #[cold]
    pub(super) fn look(&mut self, long_ns: Option<u64>) {
        let usage = own_usage();
        let before = std::mem::replace(&mut self.usage, usage);
        // No step of a shorter pass is long enough to be charged.
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

    /// Returns the nanoseconds that the alarm still lasts.
    fn left(&self, now: u64) -> u64 {
        self.alarmed.map_or(0, |(since, lasts)| {
            lasts.saturating_sub(self.clock.delta_as_nanos(since, now))
        })
    }

    /// To be called when the thread adopts another topology.
    #[inline(always)]
    pub(super) fn take_over(&mut self) {
        if self.marked {
            // The new topology no longer gives this thread the port that it has marked (or the next
            // one will not). A short alarm is enough to find another culprit.
            (self.marked, self.alarmed) = (false, Some((self.clock.raw(), SHORTEST_NS)));
        }
    }

    /// Begins a pass of an alarmed thread.
    #[cold]
    pub(super) fn pass(&mut self) {
        self.pass = self.pass.wrapping_add(1);
        if self.alarmed.is_some() && self.left(self.clock.raw()) == 0 {
            self.alarmed = None;
            self.accounts.fill(Account::default());
        }
        self.read_usage();
    }

    /// Reads what the kernel has counted. Returns what it had counted at the last look, and for how
    /// long the thread has run since.
    fn read_usage(&mut self) -> (Usage, Duration) {
        let ran = own_cpu_time();
        let before = std::mem::replace(&mut self.usage, own_usage());
        let ran_before = std::mem::replace(&mut self.ran, ran);
        (before, ran.saturating_sub(ran_before))
    }

    /// Begins a step in which memory of `payer` will be touched.
    pub(super) fn begin(&mut self, payer: Payer<'_>) {
        if self.is_suspect(payer) {
            self.read_usage();
        }
        self.began = self.clock.raw();
    }

    /// Begins a step of a thread that is not alarmed.
    #[inline(always)]
    pub(super) fn begin_unalarmed(&mut self) {
        self.began = self.clock.raw();
    }

    /// Ends a step, and begins the next one. Returns how long the step took, in nanoseconds.
    fn end(&mut self) -> u64 {
        let now = self.clock.raw();
        let began = std::mem::replace(&mut self.began, now);
        self.clock.delta_as_nanos(began, now)
    }

    /// Ends a step in which memory of `payer` was touched, and begins the next one. Returns whether
    /// this thread must not touch the port's memory any more.
    pub(super) fn charge(&mut self, payer: Payer<'_>, stats: &ThreadStats) -> bool {
        let ns = self.end();
        if ns > self.long_ns {
            self.charge_long(payer, stats, ns);
        } else {
            self.add_up(payer, stats, ns);
        }
        self.avoids(payer.pages)
    }

    /// Ends a step in which frames of `senders` were copied into memory of `receiver`. If it was
    /// long and had faults, nobody knows whose memory was waited for, so all of these ports become
    /// suspect.
    pub(super) fn charge_copies<'a>(
        &mut self,
        receiver: Payer<'_>,
        senders: impl Iterator<Item = Payer<'a>>,
        stats: &ThreadStats,
    ) {
        let ns = self.end();
        if ns <= self.long_ns {
            return self.add_up(receiver, stats, ns);
        }
        let (before, _) = self.read_usage();
        if self.usage.faults > before.faults {
            self.alarm(ns);
            self.suspect(receiver);
            senders.for_each(|sender| self.suspect(sender));
        }
    }

    /// Within a step that touches page after page: charges what has passed of the step if that is
    /// long already. Returns whether to stop.
    pub(super) fn charge_so_far(&mut self, payer: Payer<'_>, stats: &ThreadStats) -> bool {
        let now = self.clock.raw();
        let ns = self.clock.delta_as_nanos(self.began, now);
        if ns <= self.long_ns {
            return false;
        }
        self.began = now;
        self.charge_long(payer, stats, ns);
        self.avoids(payer.pages)
    }

    /// Ends a step of a thread that is not alarmed. Only steps in which the thread blocked are
    /// charged, because its CPU time at the start of the step is not known. Returns whether this
    /// thread must not touch the port's memory any more.
    #[inline(always)]
    pub(super) fn charge_wait(&mut self, payer: Payer<'_>, stats: &ThreadStats) -> bool {
        let ns = self.clock.delta_as_nanos(self.began, self.clock.raw());
        if ns <= self.long_ns {
            return false;
        }
        self.charge_long(payer, stats, ns);
        self.avoids(payer.pages)
    }

    /// Charges a step that was longer than `long_ns`, if there were faults.
    #[cold]
    fn charge_long(&mut self, payer: Payer<'_>, stats: &ThreadStats, ns: u64) {
        let (alarmed, exact) = (self.is_alarmed(), self.is_suspect(payer));
        let (before, ran) = self.read_usage();
        let faults = self.usage.faults - before.faults;
        if faults == 0 {
            return;
        }
        self.alarm(ns);
        let waited = self.usage.waits > before.waits;
        if !alarmed && !waited {
            return;
        }
        // The next time shows whether the step was long because of its faults or without a CPU:
        // faults are then counted for each step.
        if !exact && self.usage.preemptions > before.preemptions {
            return self.suspect(payer);
        }
        let step = Duration::from_nanos(ns);
        let cost = if waited { step } else { step.min(ran) };
        self.charge_cost(payer, stats, (cost, faults));
    }

    /// Adds a short step to what its port has cost in this pass.
    fn add_up(&mut self, payer: Payer<'_>, stats: &ThreadStats, mut ns: u64) {
        let pass = self.pass;
        let account = &mut self.accounts[usize::from(payer.slot)];
        if account.pass != pass {
            (account.pass, account.ns) = (pass, 0);
        }
        if !account.suspect {
            account.ns += ns;
            if account.ns > self.long_ns {
                account.ns = 0;
                // Much traffic takes as long, without any faults.
                let (before, _) = self.read_usage();
                if self.usage.faults > before.faults {
                    self.suspect(payer);
                }
            }
            return;
        }
        let (before, ran) = self.read_usage();
        let faults = self.usage.faults - before.faults;
        if faults == 0 {
            return;
        }
        if self.usage.waits == before.waits {
            ns = ns.min(ran.as_nanos() as u64);
        }
        let account = &mut self.accounts[usize::from(payer.slot)];
        let free = self.long_ns.saturating_sub(account.ns);
        account.ns += ns;
        if ns > free {
            let cost = Duration::from_nanos(ns - free);
            self.charge_cost(payer, stats, (cost, faults));
        }
    }

    fn charge_cost(
        &mut self,
        payer: Payer<'_>,
        stats: &ThreadStats,
        (cost, faults): (Duration, u64),
    ) {
        stats.slow_faults.add(faults);
        stats
            .slow_faults_ns
            .add(u64::try_from(cost.as_nanos()).unwrap_or(u64::MAX));
        if payer.pages.charge(cost, faults) {
            // The culprit is found. This thread avoids its memory until control has taken the port
            // away.
            (self.marked, self.alarmed) = (true, Some((self.clock.raw(), LONGEST_NS)));
            if let Some(bell) = &self.bell {
                bell.wake();
            }
        }
    }

    /// Makes a port suspect until the alarm ends.
    pub(super) fn suspect(&mut self, payer: Payer<'_>) {
        self.accounts[usize::from(payer.slot)] = Account {
            pass: self.pass,
            ns: 0,
            suspect: true,
        };
    }

    /// Whether a port is suspect: its frames are copied into private memory before they are
    /// delivered.
    pub(super) fn is_suspect(&self, payer: Payer<'_>) -> bool {
        self.accounts[usize::from(payer.slot)].suspect
    }

    /// Whether this thread must not touch a port's memory.
    pub(super) fn avoids(&self, pages: &PageGuard) -> bool {
        !self.slow && matches!(pages.pace(), Pace::Marked | Pace::Slow)
    }
}
