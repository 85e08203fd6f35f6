//! A poll thread: passes over the transmit queues it owns, deliveries into any port, sleep when idle.
//!
//! It never blocks: no lock, no allocation, no channel, no log, and no system call but one batch of calls a pass and the
//! idle sleep. It borrows the topology and acknowledges a new one after every burst; see `sys::snapshot`.

mod deliver;
mod egress;
mod notify;
mod owed;
mod pass;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::config::IdlePolicy;
use crate::stats::ThreadStats;
use crate::sys::aio::Caller;
use crate::sys::epoll::Sleeper;
use crate::sys::snapshot::Reader;
use crate::topology::Topology;
use egress::Tools;
use pass::Pass;

/// What control shares with one poll thread.
#[derive(Debug)]
pub struct PollShared {
    /// Its counters.
    pub stats: ThreadStats,
    /// Its bed: kicks of its queues, and a bell.
    pub sleeper: Sleeper,
    /// Ends the thread; ring the bell afterwards.
    pub stop: AtomicBool,
}

/// A poll thread's own state.
#[derive(Debug)]
pub struct Poller {
    shared: Arc<PollShared>,
    reader: Reader<Topology>,
    caller: Caller,
    idle: IdlePolicy,
    clock: quanta::Clock,
    /// Raw clock at `start_s` seconds of the switch's clock.
    start: u64,
    start_s: u32,
}

/// Why a thread let go of a topology.
enum Left {
    OutOfDate,
    Idle,
    Stop,
}

impl Poller {
    /// A poller that reads its topologies through `reader`. `epoch` is the zero of the switch's clock.
    pub fn new(
        shared: Arc<PollShared>,
        reader: Reader<Topology>,
        idle: IdlePolicy,
        epoch: Instant,
    ) -> std::io::Result<Self> {
        let clock = quanta::Clock::new();
        Ok(Poller {
            shared,
            reader,
            caller: Caller::new()?,
            idle,
            start: clock.raw(),
            start_s: u32::try_from(epoch.elapsed().as_secs()).unwrap_or(u32::MAX),
            clock,
        })
    }

    /// Runs until `PollShared::stop`.
    pub fn run(mut self) {
        let mut awake = false;
        loop {
            match self.serve(awake) {
                Left::OutOfDate => awake = true,
                Left::Stop => break,
                Left::Idle => {
                    awake = false;
                    // No borrow is held here, so a sleeper keeps nobody's memory alive. The kicks are armed; a topology that
                    // gives this thread new work rings the bell.
                    self.reader.sleep();
                    self.shared.stats.sleeps.add(1);
                    self.shared.sleeper.sleep(None, |_| {});
                    self.shared.stats.wakeups.add(1);
                }
            }
        }
    }

    /// Works on the caller's thread until there is nothing to do, instead of [`Poller::run`]: how the instructions of a
    /// frame are counted. Needs [`IdlePolicy::Adaptive`].
    #[inline(never)]
    pub fn drain(&mut self) {
        while let Left::OutOfDate = self.serve(false) {}
    }

    /// Works with one topology until it is out of date or there is nothing to do. `awake` says that it takes over from
    /// an older one: a thread that slept had nothing to acknowledge.
    fn serve(&mut self, awake: bool) -> Left {
        let Poller {
            shared,
            reader,
            caller,
            idle,
            clock,
            start,
            start_s,
        } = self;
        let thread = reader.index();
        let topology = reader.borrow();
        let stats = &shared.stats;
        if awake {
            let waited = topology.since[thread].elapsed().as_nanos();
            stats.acknowledged(u64::try_from(waited).unwrap_or(u64::MAX));
        }
        let tools = Tools {
            caller,
            stats,
            clock,
        };
        let mut pass = Pass::new(&topology, thread, tools);
        // Notifications may still be armed from the last sleep.
        pass.disarm();
        pass.call_started();
        let mut began = clock.raw();
        let mut last_work = began;
        loop {
            let now_s = *start_s + (clock.delta_as_nanos(*start, began) / 1_000_000_000) as u32;
            let worked = pass.run(now_s, || topology.is_current());
            let ended = clock.raw();
            stats.pass(clock.delta_as_nanos(began, ended), worked);
            began = ended;
            if !topology.is_current() {
                pass.settle();
                return Left::OutOfDate;
            }
            if shared.stop.load(Ordering::Relaxed) {
                pass.settle();
                return Left::Stop;
            }
            if worked {
                last_work = ended;
                continue;
            }
            match *idle {
                IdlePolicy::Adaptive(spin)
                    if u128::from(clock.delta_as_nanos(last_work, ended)) >= spin.as_nanos() =>
                {
                    pass.settle();
                    if pass.arm() {
                        return Left::Idle;
                    }
                    pass.disarm();
                }
                _ => std::hint::spin_loop(),
            }
        }
    }
}
