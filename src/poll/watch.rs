//! Whose memory a poll thread waits for.
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

/// A step longer than this is looked at, in nanoseconds: more than it takes to make a page for each
/// of 64 frames, 4 µs each. Guests that download into memory which nobody has used before do that
/// for minutes, and are not to be taken for hostile ones.
const LONG_STEP_NS: u64 = 250_000;
/// What a step is looked at from in the thread of slow ports, in nanoseconds: what is slow there
/// does not have to harm anybody.
const LONG_SLOW_STEP_NS: u64 = 20_000;
/// How many times as long as the pass that caused it an alarm lasts.
const ALARM: u64 = 100;
/// The shortest and the longest alarm.
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
    /// Number of the pass.
    pass: u32,
    /// Length of all steps; of a suspect port, of those with faults.
    ns: u64,
    suspect: bool,
}

/// A poll thread's watch over its page faults, from one topology to the next.
#[derive(Debug)]
pub(super) struct Watch {
    clock: quanta::Clock,
    /// Rung when a port is marked: control takes it off the shared threads.
    bell: Option<Arc<Wake>>,
    /// At the last look.
    usage: Usage,
    /// How long the thread had run at that look.
    ran: Duration,
    /// Where the present step began, by the raw clock.
    began: u64,
    /// When the alarm was last raised, and how long it lasts.
    alarmed: Option<(u64, u64)>,
    /// Number of the present pass.
    pass: u32,
    /// By slot. All is forgotten when the alarm ends.
    accounts: Box<[Account]>,
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
            // The new topology no longer gives this thread the port that it has marked, or the next
            // one will not. A short alarm is enough to find another culprit.
            (self.marked, self.alarmed) = (false, Some((self.clock.raw(), SHORTEST_NS)));
        }
    }

    /// A pass of a thread that is alarmed begins.
    #[cold]
    pub(super) fn pass(&mut self) {
        self.pass = self.pass.wrapping_add(1);
        if self.alarmed.is_some() && self.left(self.clock.raw()) == 0 {
            self.alarmed = None;
            self.accounts.fill(Account::default());
        }
        self.read_usage();
    }

    /// Reads what the kernel has counted; returns what it had counted before, and for how long the
    /// thread has run since.
    fn read_usage(&mut self) -> (Usage, Duration) {
        let ran = own_cpu_time();
        let before = std::mem::replace(&mut self.usage, own_usage());
        let ran_before = std::mem::replace(&mut self.ran, ran);
        (before, ran.saturating_sub(ran_before))
    }

    /// A step begins in which memory of `payer` will be touched.
    pub(super) fn begin(&mut self, payer: Payer<'_>) {
        if self.is_suspect(payer) {
            self.read_usage();
        }
        self.began = self.clock.raw();
    }

    /// A step begins of a thread that is not alarmed.
    #[inline(always)]
    pub(super) fn begin_unalarmed(&mut self) {
        self.began = self.clock.raw();
    }

    /// A step has ended: how long it took, in nanoseconds. The next one begins.
    fn end(&mut self) -> u64 {
        let now = self.clock.raw();
        let began = std::mem::replace(&mut self.began, now);
        self.clock.delta_as_nanos(began, now)
    }

    /// A step has ended, in which memory of `payer` was touched; the next one begins. Returns
    /// whether the port is one whose memory this thread must not touch any more.
    pub(super) fn charge(&mut self, payer: Payer<'_>, stats: &ThreadStats) -> bool {
        let ns = self.end();
        if ns > self.long_ns {
            self.charge_long(payer, stats, ns);
        } else {
            self.add_up(payer, stats, ns);
        }
        self.avoids(payer.pages)
    }

    /// A step has ended in which frames of `senders` were copied into memory of `receiver`. Nobody
    /// knows whose memory was waited for, so all of them are suspect.
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

    /// Within a step that touches page after page: charges it if it is long already. Returns
    /// whether to stop.
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
    /// charged, because its CPU time at the start of the step is not known. Returns whether the
    /// port is one whose memory this thread must not touch any more.
    #[inline(always)]
    pub(super) fn charge_wait(&mut self, payer: Payer<'_>, stats: &ThreadStats) -> bool {
        let ns = self.clock.delta_as_nanos(self.began, self.clock.raw());
        if ns <= self.long_ns {
            return false;
        }
        self.charge_long(payer, stats, ns);
        self.avoids(payer.pages)
    }

    /// Charges a step that was longer than `long_ns`.
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
        // Whether the step was long for its faults, or for want of a CPU, shows the next time.
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
            // The culprit is found. Until control has taken it away, its memory is avoided.
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

    /// Whether frames from and to a port are copied into private memory first.
    pub(super) fn is_suspect(&self, payer: Payer<'_>) -> bool {
        self.accounts[usize::from(payer.slot)].suspect
    }

    /// Whether a port's memory is not for this thread to touch.
    pub(super) fn avoids(&self, pages: &PageGuard) -> bool {
        !self.slow && matches!(pages.pace(), Pace::Marked | Pace::Slow)
    }
}
