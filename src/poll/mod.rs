//! A poll thread: passes over the transmit queues it owns, deliveries into any port, sleep when
//! idle.
//!
//! A poll thread never blocks: no lock, no allocation, no channel, no log. Its system calls are
//! these and no other:
//!
//! - Calls of drivers: one `io_submit` for all calls of a pass. A pass with very many copies makes
//!   several (`egress`). A suspect port costs one `io_submit` and two looks at the CPU clock for
//!   each of its calls (`notify`, `sys::call`).
//! - The idle sleep. `busy` threads never sleep; `adaptive` threads first spin. Kicks are
//!   suppressed while the thread polls. Before it sleeps it asks for kicks, then looks at each ring
//!   once more.
//! - A look at its own CPU time and page faults: once a second, and after a pass that was long
//!   already. The look tells a long pass from a thread that had no CPU. Alarmed threads look more
//!   often (`watch`).
//!
//! The thread borrows the topology, and acknowledges a new one after the burst that it is at
//! (`sys::snapshot`). Before it acknowledges, it settles everything that it owes: claims,
//! completions, retries, calls.

mod context;
mod deliver;
mod detour;
mod egress;
mod mirror;
mod notify;
mod owed;
#[cfg(test)]
mod parked_tests;
mod pass;
mod recorder;
mod slow;
mod steer;
#[cfg(test)]
mod tests;
mod watch;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::config::IdlePolicy;
use crate::stats::ThreadStats;
use crate::sys::aio::Caller;
use crate::sys::epoll::Sleeper;
use crate::sys::sched;
use crate::sys::snapshot::Reader;
use crate::sys::wake::Wake;
use crate::topology::Topology;
use egress::Tools;
use owed::HOLD_NS;
use pass::Pass;
use watch::Watch;

/// What control shares with one poll thread.
#[derive(Debug)]
pub struct PollShared {
    /// Its counters.
    pub stats: ThreadStats,
    /// Its bed: kicks of its queues, and a bell.
    pub sleeper: Sleeper,
    /// Ends the thread; ring the bell afterwards.
    pub stop: AtomicBool,
    /// Nanoseconds without work before it sleeps, or [`NEVER`].
    idle_ns: AtomicU64,
    /// Rung when the thread has marked a port.
    bell: OnceLock<Arc<Wake>>,
    /// It serves ports whose memory is slow to touch, and no others.
    is_slow: bool,
}

/// Policy of the thread that serves ports whose memory is slow to touch.
const SLOW_IDLE: IdlePolicy = IdlePolicy::Adaptive(Duration::from_micros(50));
/// Longest sleep of that thread while there are such ports: nobody wakes it for frames to them.
const SLOW_NAP: Duration = Duration::from_millis(1);

/// In `PollShared::idle_ns`: it polls for ever.
const NEVER: u64 = u64::MAX;

impl PollShared {
    /// For a thread that is to begin, with this policy.
    pub fn new(idle: IdlePolicy) -> std::io::Result<Self> {
        Ok(PollShared {
            stats: ThreadStats::default(),
            sleeper: Sleeper::new()?,
            stop: AtomicBool::new(false),
            idle_ns: AtomicU64::new(idle_ns(idle)),
            bell: OnceLock::new(),
            is_slow: false,
        })
    }

    /// The same for the thread that serves ports whose memory is slow to touch.
    pub fn slow() -> std::io::Result<Self> {
        Ok(PollShared {
            is_slow: true,
            ..PollShared::new(SLOW_IDLE)?
        })
    }

    /// Whether it is that one.
    pub fn is_slow(&self) -> bool {
        self.is_slow
    }

    /// Says what to ring when the thread has found that the memory of a port is slow to touch.
    /// Before it begins.
    pub fn report_to(&self, bell: Arc<Wake>) {
        let _ = self.bell.set(bell);
    }

    /// What the thread does without work.
    pub fn idle(&self) -> IdlePolicy {
        match self.idle_ns.load(Ordering::Relaxed) {
            NEVER => IdlePolicy::Busy,
            ns => IdlePolicy::Adaptive(Duration::from_nanos(ns)),
        }
    }

    /// Changes that, from its next pass without work on; one that sleeps looks for work once.
    pub fn set_idle(&self, idle: IdlePolicy) {
        self.idle_ns.store(idle_ns(idle), Ordering::Relaxed);
        self.sleeper.wake();
    }
}

fn idle_ns(idle: IdlePolicy) -> u64 {
    match idle {
        IdlePolicy::Busy => NEVER,
        IdlePolicy::Adaptive(spin) => u64::try_from(spin.as_nanos()).unwrap_or(NEVER),
    }
}

/// A claim is open for so long where its thread has a CPU: about what it takes to copy its 64 KiB.
const CLAIM_NS: u64 = 10_000;
/// A pass longer than this may have been one without a CPU.
const LONG_PASS_NS: u64 = 50_000;

/// A poll thread's own state.
#[derive(Debug)]
pub struct Poller {
    shared: Arc<PollShared>,
    reader: Reader<Topology>,
    caller: Caller,
    clock: quanta::Clock,
    watch: Watch,
    private: Vec<u8>,
    /// Raw clock at `start_s` seconds of the switch's clock.
    start: u64,
    start_s: u32,
}

/// Why a thread let go of a topology.
enum Left {
    OutOfDate(PassTimes),
    /// For so long at most.
    Idle(Option<Duration>),
    Stop,
}

/// When passes begin, and what of their length was time without a CPU.
struct PassTimes {
    /// End of the last pass, by the raw clock.
    began: u64,
    on_cpu: OnCpu,
    /// Second of the last look at the CPU time.
    looked_s: u32,
    /// The next pass begins with taking over a topology.
    takes_over: bool,
}

impl PassTimes {
    /// For a thread that has just woken up, or begins.
    fn now(clock: &quanta::Clock) -> Self {
        let on_cpu = OnCpu::look(clock);
        PassTimes {
            began: on_cpu.at,
            on_cpu,
            looked_s: 0,
            takes_over: false,
        }
    }

    /// Counts a pass that ends now; returns the raw clock.
    #[inline(always)]
    fn pass(
        &mut self,
        clock: &quanta::Clock,
        stats: &ThreadStats,
        (now_s, worked): (u32, bool),
        watch: &mut Watch,
    ) -> u64 {
        let ended = clock.raw();
        let mut ns = clock.delta_as_nanos(self.began, ended);
        let long = ns > LONG_PASS_NS;
        if long || now_s != self.looked_s {
            let off = self.on_cpu.off_cpu_ns(clock);
            self.looked_s = now_s;
            watch.look(long.then_some(ns));
            if long {
                stats.off_cpu_ns.add(off.min(ns));
                ns = ns.saturating_sub(off);
            }
        }
        stats.pass(ns, worked, std::mem::take(&mut self.takes_over));
        self.began = ended;
        ended
    }
}

/// When a thread last looked at its CPU time.
struct OnCpu {
    /// By the raw clock.
    at: u64,
    /// How long it had run then.
    ran: Duration,
}

impl OnCpu {
    fn look(clock: &quanta::Clock) -> Self {
        // In this order: a CPU lost in between is then missing in the time that it ran, and so is
        // noticed.
        OnCpu {
            at: clock.raw(),
            ran: sched::own_cpu_time(),
        }
    }

    /// Looks again: nanoseconds without a CPU since the last look.
    #[cold]
    fn off_cpu_ns(&mut self, clock: &quanta::Clock) -> u64 {
        let now = OnCpu::look(clock);
        let ran = now.ran.saturating_sub(self.ran).as_nanos() as u64;
        let off = clock.delta_as_nanos(self.at, now.at).saturating_sub(ran);
        *self = now;
        off
    }
}

/// Whether a topology that is out of date since a pass that ended at `since` may be let go of: no
/// chain stands behind another thread's open claim, or some have for too long. A thread that has a
/// CPU closes its claim soon, and is waited for. For one that has none whole passes go on, of which
/// each may bring new waits. Usually it has not acknowledged either, so that nobody waits longer
/// for that.
#[inline(always)]
fn may_leave(pass: &mut Pass<'_, '_>, clock: &quanta::Clock, since: u64) -> bool {
    if !pass.owes() {
        return true;
    }
    let begun = clock.raw();
    while !pass.settle_owed() {
        let now = clock.raw();
        if clock.delta_as_nanos(begun, now) > CLAIM_NS {
            return clock.delta_as_nanos(since, now) > HOLD_NS;
        }
    }
    true
}

impl Poller {
    /// A poller that reads its topologies through `reader`. `epoch` is the zero of the switch's
    /// clock.
    pub fn new(
        shared: Arc<PollShared>,
        reader: Reader<Topology>,
        epoch: Instant,
    ) -> std::io::Result<Self> {
        Ok(Poller::with(Caller::new()?, shared, reader, epoch))
    }

    /// The same with its means to call drivers, which is all that may not be had.
    pub fn with(
        caller: Caller,
        shared: Arc<PollShared>,
        reader: Reader<Topology>,
        epoch: Instant,
    ) -> Self {
        let clock = quanta::Clock::new();
        let bell = shared.bell.get().cloned();
        Poller {
            watch: Watch::new(&clock, bell, shared.is_slow),
            private: egress::private_frame(),
            shared,
            reader,
            caller,
            start: clock.raw(),
            start_s: u32::try_from(epoch.elapsed().as_secs()).unwrap_or(u32::MAX),
            clock,
        }
    }

    /// Its reader, if it is not to run after all.
    pub fn into_reader(self) -> Reader<Topology> {
        self.reader
    }

    /// Runs until `PollShared::stop`; returns the reader, with nothing borrowed, for another poller
    /// to go on with.
    pub fn run(self) -> Reader<Topology> {
        self.run_with(|| {})
    }

    /// The same for tests and measurements: `between` is called before every pass, for guests that
    /// are played by this thread or in step with it.
    pub fn run_with(mut self, mut between: impl FnMut()) -> Reader<Topology> {
        let mut take_over = None;
        loop {
            match self.serve(take_over.take(), &mut between) {
                Left::OutOfDate(next) => take_over = Some(next),
                Left::Stop => break,
                Left::Idle(nap) => {
                    // No borrow is held here, so a sleeper keeps nobody's memory alive. The kicks
                    // are armed; a topology that gives this thread new work rings the bell.
                    self.reader.sleep();
                    self.shared.stats.sleeps.add(1);
                    self.shared.sleeper.sleep(nap, |_| {});
                    self.shared.stats.wakeups.add(1);
                }
            }
        }
        self.reader.sleep();
        self.reader
    }

    /// Works on the caller's thread until there is nothing to do, instead of [`Poller::run`]: how
    /// the instructions of a frame are counted. Needs [`IdlePolicy::Adaptive`].
    #[inline(never)]
    pub fn drain(&mut self) {
        self.watch.disable();
        let mut take_over = None;
        while let Left::OutOfDate(next) = self.serve(take_over.take(), &mut || {}) {
            take_over = Some(next);
        }
    }

    /// Works with one topology until it is out of date or there is nothing to do. `take_over` says
    /// that an older one was left for it: a thread that slept had nothing to acknowledge.
    fn serve(&mut self, take_over: Option<PassTimes>, between: &mut impl FnMut()) -> Left {
        let Poller {
            shared,
            reader,
            caller,
            clock,
            watch,
            private,
            start,
            start_s,
        } = self;
        let thread = reader.index();
        let topology = reader.borrow();
        let stats = &shared.stats;
        if take_over.is_some() {
            stats.acknowledged(topology.since[thread].elapsed());
        }
        let tools = Tools {
            caller,
            stats,
            clock,
            hold_ns: HOLD_NS,
            watch,
            private,
        };
        tools.watch.take_over();
        let mut pass = Pass::new(&topology, thread, tools);
        let mut times = take_over.unwrap_or_else(|| {
            // To sleep was to wait, too.
            pass.watch().look(None);
            PassTimes::now(clock)
        });
        // Notifications may still be armed from the last sleep.
        pass.disarm();
        let (mut last_work, mut leaving) = (clock.raw(), None);
        loop {
            let passed = clock.delta_as_nanos(*start, times.began);
            let now_s = *start_s + (passed / 1_000_000_000) as u32;
            between();
            let worked = match pass.watch().is_alarmed() {
                false => pass.run(now_s, || topology.is_current()),
                true if shared.is_slow => pass.run_slow(now_s, || topology.is_current()),
                true => pass.run_watched(now_s, || topology.is_current()),
            };
            let ended = times.pass(clock, stats, (now_s, worked), pass.watch());
            let outdated = !topology.is_current();
            if outdated || shared.stop.load(Ordering::Relaxed) {
                if !may_leave(&mut pass, clock, *leaving.get_or_insert(ended)) {
                    continue;
                }
                pass.settle();
                // From the end of the last pass on it is time of the successor's first one.
                times.takes_over = true;
                return if outdated {
                    Left::OutOfDate(times)
                } else {
                    Left::Stop
                };
            }
            if worked {
                last_work = ended;
                continue;
            }
            let spin_ns = shared.idle_ns.load(Ordering::Relaxed);
            let idle = spin_ns != NEVER && !pass.owes();
            if idle && clock.delta_as_nanos(last_work, ended) >= spin_ns {
                pass.settle();
                let quiet = pass.arm();
                // No pass follows that would see a wait in there.
                let armed_ns = clock.delta_as_nanos(ended, clock.raw());
                if armed_ns > LONG_PASS_NS {
                    pass.watch().look(Some(armed_ns));
                }
                if quiet {
                    let naps = shared.is_slow && topology.detour.is_some();
                    return Left::Idle(naps.then_some(SLOW_NAP));
                }
                pass.disarm();
            } else {
                std::hint::spin_loop();
            }
        }
    }
}
