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

/// The state that control shares with one poll thread.
#[derive(Debug)]
pub struct PollShared {
    /// Counters of the thread.
    pub stats: ThreadStats,
    /// Where the thread sleeps until a queue of its plan is kicked or control wakes it.
    pub sleeper: Sleeper,
    /// Tells the thread to end. After setting it, wake the sleeper.
    pub stop: AtomicBool,
    /// Nanoseconds without work before the thread sleeps, or [`NEVER`].
    idle_ns: AtomicU64,
    /// Rung when the thread has marked a port as slow to touch.
    bell: OnceLock<Arc<Wake>>,
    /// Whether the thread serves ports whose memory is slow to touch, and no others.
    is_slow: bool,
}

/// Idle policy of the thread that serves ports whose memory is slow to touch.
const SLOW_IDLE: IdlePolicy = IdlePolicy::Adaptive(Duration::from_micros(50));
/// Longest sleep of the thread of slow ports while there are such ports, because nobody wakes it
/// for frames to them.
const SLOW_NAP: Duration = Duration::from_millis(1);

/// In `PollShared::idle_ns`: the thread never sleeps.
const NEVER: u64 = u64::MAX;

impl PollShared {
    /// Makes the state of a thread that is to begin, with this idle policy.
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

    /// Makes the state of the thread that serves ports whose memory is slow to touch.
    pub fn slow() -> std::io::Result<Self> {
        Ok(PollShared {
            is_slow: true,
            ..PollShared::new(SLOW_IDLE)?
        })
    }

    /// Whether the thread serves ports whose memory is slow to touch.
    pub fn is_slow(&self) -> bool {
        self.is_slow
    }

    /// Sets the bell to ring when the thread has found that the memory of a port is slow to touch.
    /// To be called before the thread begins.
    pub fn report_to(&self, bell: Arc<Wake>) {
        let _ = self.bell.set(bell);
    }

    /// Returns what the thread does without work.
    pub fn idle(&self) -> IdlePolicy {
        match self.idle_ns.load(Ordering::Relaxed) {
            NEVER => IdlePolicy::Busy,
            ns => IdlePolicy::Adaptive(Duration::from_nanos(ns)),
        }
    }

    /// Changes what the thread does without work, from its next pass without work on. A sleeping
    /// thread wakes, and looks for work once.
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

/// How long a claim is open if its thread has a CPU, in nanoseconds: about the time to copy its 64
/// KiB.
const CLAIM_NS: u64 = 10_000;
/// A pass longer than this, in nanoseconds, may have been without a CPU for a time.
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
    /// The thread may sleep, for at most so long.
    Idle(Option<Duration>),
    Stop,
}

/// When passes begin, and how much of their length was time without a CPU.
struct PassTimes {
    /// End of the last pass, by the raw clock. The next pass begins there.
    began: u64,
    on_cpu: OnCpu,
    /// Second in which the CPU time was last read.
    looked_s: u32,
    /// Whether the next pass begins with adopting a topology.
    takes_over: bool,
}

impl PassTimes {
    /// Starts timing, for a thread that has just woken up or begins.
    fn now(clock: &quanta::Clock) -> Self {
        let on_cpu = OnCpu::look(clock);
        PassTimes {
            began: on_cpu.at,
            on_cpu,
            looked_s: 0,
            takes_over: false,
        }
    }

    /// Counts a pass that ends now. Returns the raw clock.
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

/// What a thread found when it last read its CPU time.
struct OnCpu {
    /// When it was read, by the raw clock.
    at: u64,
    /// How long the thread had run then.
    ran: Duration,
}

impl OnCpu {
    fn look(clock: &quanta::Clock) -> Self {
        // In this order: time without a CPU between the two reads is then missing in `ran`, and so
        // is noticed by the next look.
        OnCpu {
            at: clock.raw(),
            ran: sched::own_cpu_time(),
        }
    }

    /// Reads the CPU time again. Returns the nanoseconds without a CPU since the last look.
    #[cold]
    fn off_cpu_ns(&mut self, clock: &quanta::Clock) -> u64 {
        let now = OnCpu::look(clock);
        let ran = now.ran.saturating_sub(self.ran).as_nanos() as u64;
        let off = clock.delta_as_nanos(self.at, now.at).saturating_sub(ran);
        *self = now;
        off
    }
}

/// Whether the thread may let go of a topology that is out of date. `since` is the end of the pass
/// in which that was found. It may if no chain waits for another thread's open claim, or if chains
/// have waited for too long.
///
/// A thread that has a CPU closes its claim soon, so it is waited for here. If the other thread has
/// no CPU, whole passes go on, and each may bring new waits. Usually that thread has not
/// acknowledged either, so nobody waits longer because of this one.
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
    /// Makes a poller that reads its topologies through `reader`. `epoch` is the zero of the
    /// switch's clock. Fails if the system gives no means to call drivers.
    pub fn new(
        shared: Arc<PollShared>,
        reader: Reader<Topology>,
        epoch: Instant,
    ) -> std::io::Result<Self> {
        Ok(Poller::with(Caller::new()?, shared, reader, epoch))
    }

    /// Makes a poller with `caller` as its means to call drivers. Only making a `Caller` can fail.
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

    /// Returns the reader of a poller that is not to run after all.
    pub fn into_reader(self) -> Reader<Topology> {
        self.reader
    }

    /// Runs until `PollShared::stop`. Returns the reader, with nothing borrowed, for another poller
    /// to go on with.
    pub fn run(self) -> Reader<Topology> {
        self.run_with(|| {})
    }

    /// As [`Poller::run`], for tests and measurements: `between` is called before every pass, for
    /// guests that are played by this thread or in step with it.
    pub fn run_with(mut self, mut between: impl FnMut()) -> Reader<Topology> {
        let mut take_over = None;
        loop {
            match self.serve(take_over.take(), &mut between) {
                Left::OutOfDate(next) => take_over = Some(next),
                Left::Stop => break,
                Left::Idle(nap) => {
                    // No borrow is held here, so a sleeping thread keeps nobody's memory alive. The
                    // kicks are armed. Control rings the bell for a topology that gives this thread
                    // new work.
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

    /// Works on the caller's thread until there is nothing to do, so that the instructions of a
    /// frame can be counted. Needs [`IdlePolicy::Adaptive`].
    #[inline(never)]
    pub fn drain(&mut self) {
        self.watch.disable();
        let mut take_over = None;
        while let Left::OutOfDate(next) = self.serve(take_over.take(), &mut || {}) {
            take_over = Some(next);
        }
    }

    /// Works with one topology until it is out of date or there is nothing to do. `take_over` is
    /// given if an older topology was left for this one. A thread that slept had nothing to
    /// acknowledge.
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
            // The waits of the sleep must not count as waits for a page.
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
                // The time since the end of the last pass belongs to the first pass with the next
                // topology.
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
                // No pass follows that would notice a page fault in `arm`.
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
