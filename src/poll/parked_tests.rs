//! Stops a producer in the middle of a delivery. Tests what its queue's driver does not see
//! meanwhile, and that nobody else notices.
//!
//! Poll thread 0 takes the frames of `A` and delivers them to `X`. This thread is the one that
//! stops. Poll thread 1 takes the frames of `B`, which sends to `X` and `Y` in turn, and of `C`,
//! which sends to `Z`. Poll thread 1 also plays all guests. The rates are compared with a thread 0
//! that stands still between two passes, so that the machine is equally busy.
//!
//! The test compares frames a pass, which no other load on the machine changes. `POLLUX_LONG=1`
//! stops thread 0 for a second, seven times each, and compares frames a second of processor time.
//! That needs a quiet machine.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pollux::bench::guest::Guest;
use pollux::bench::plan::{Mode, Pattern, Plan};
use pollux::poll::PollShared;
use pollux::port::PortShared;
use pollux::stats::{DropReason, PortTotals};
use pollux::sys::sched::own_cpu_time;
use pollux::virtio::park::{self, Brake, Point, Tries};

#[path = "../../benches/rig/mod.rs"]
mod rig;

use rig::Rig;

const A: usize = 0;
const B: usize = 1;
const X: usize = 2;
const Y: usize = 3;
const C: usize = 4;
const Z: usize = 5;
/// Frames of each sender in a turn. `B`'s go to two receivers.
const SENT: [(usize, usize); 3] = [(A, 8), (B, 16), (C, 8)];
/// Turns in which a driver has surely reaped all that it can see.
const REAPED: u32 = 10;
/// Claims and publications of thread 1 in one pass: one a receiver, and a second for the retry.
const TRIES_A_PASS: u64 = 6;
/// How long to wait for what should happen soon. The machine may be busy.
const LIMIT: Duration = Duration::from_secs(60);

/// What was counted up to one moment.
#[derive(Clone, Copy, Debug)]
struct Mark {
    received: [u64; 6],
    cpu: Duration,
    passes: u64,
    given_up: u64,
    tries: Tries,
}

/// What the test does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    StopBetweenPasses,
    Quiet,
    StopAt(u32),
    Parked,
    Drain,
}

struct Script<'r, 'm> {
    rig: &'r Rig,
    guests: Vec<Guest<'m>>,
    /// Frames in flight are limited, so that no ring is ever full.
    closed: bool,
    point: Point,
    brake: Brake,
    /// Counters of thread 1.
    shared: Arc<PollShared>,
    x: Arc<PortShared>,
    phase: Phase,
    began: Instant,
    marks: Vec<Mark>,
}

fn long() -> bool {
    std::env::var_os("POLLUX_LONG").is_some_and(|value| value == "1")
}

/// How long the producer stands still, in time that thread 1 runs.
fn pause() -> Duration {
    Duration::from_millis(if long() { 1000 } else { 100 })
}

impl Script<'_, '_> {
    fn mark(&mut self) {
        let received = self.guests.iter().map(|g| g.tracker.counts.received);
        let mut all = [0; 6];
        all.iter_mut().zip(received).for_each(|(to, n)| *to = n);
        self.marks.push(Mark {
            received: all,
            cpu: own_cpu_time(),
            passes: self.shared.stats.passes.get(),
            given_up: self.shared.stats.completed_early.get(),
            tries: park::tries(),
        });
    }

    /// Between two passes of thread 1: the guests' turn, and the test's next step.
    fn turn(&mut self) {
        let (checker, counters) = (&self.rig.checker, &self.rig.counters);
        if self.phase != Phase::Drain {
            for (sender, limit) in SENT {
                let queue = &mut self.guests[sender].transmit[0];
                queue.send(checker, counters, limit, self.closed, 0);
            }
        }
        for receiver in [X, Y, Z] {
            self.guests[receiver].receive(checker, 0);
        }
        assert!(self.began.elapsed() < LIMIT, "stuck in {:?}", self.phase);
        self.step();
    }

    fn step(&mut self) {
        match self.phase {
            Phase::StopBetweenPasses if self.brake.has_stopped() => {
                self.mark();
                self.phase = Phase::Quiet;
            }
            Phase::Quiet if self.is_over() => {
                self.mark();
                self.brake.release();
                self.brake.stop_at(self.point);
                self.phase = Phase::StopAt(0);
            }
            Phase::StopAt(turns) if turns >= REAPED && self.has_given_up() => {
                self.mark();
                self.phase = Phase::Parked;
            }
            Phase::StopAt(turns) if self.brake.has_stopped() => {
                self.phase = Phase::StopAt(turns + 1);
            }
            Phase::Parked if self.is_over() => {
                self.mark();
                self.brake.release();
                let senders = self.guests.iter().flat_map(|guest| &guest.transmit);
                senders.for_each(|queue| queue.show_sent(&self.rig.counters));
                self.phase = Phase::Drain;
            }
            Phase::Drain if self.missing() == 0 => {
                self.shared.stop.store(true, Ordering::Relaxed);
            }
            _ => {}
        }
    }

    /// Whether chains have waited for the thread that stands still, for as long as they do once.
    fn has_given_up(&self) -> bool {
        let before = self.marks.last().map(|mark| mark.given_up);
        before.is_some_and(|before| self.shared.stats.completed_early.get() > before)
    }

    /// Whether the time since the last mark was long enough.
    fn is_over(&self) -> bool {
        let begun = self.marks.last().map(|mark| mark.cpu);
        begun.is_some_and(|begun| own_cpu_time() - begun >= pause())
    }

    /// Returns the number of frames that were sent, and neither arrived nor were counted as
    /// dropped.
    fn missing(&self) -> u64 {
        let sent = self.rig.counters.iter().map(|flow| &flow.sent);
        let sent: u64 = sent.map(|n| n.load(Ordering::Relaxed)).sum();
        let came: u64 = self.guests.iter().map(|g| g.tracker.counts.received).sum();
        sent - came - self.x.stats.sum().tx_dropped
    }
}

/// What a run showed: the marks around the quiet time and around the parked one, and the counters
/// of `X`.
struct Shown {
    quiet: [Mark; 2],
    parked: [Mark; 2],
    x: PortTotals,
}

impl Shown {
    /// The frames that came to `receiver` for each pass of thread 1, or each second that it ran,
    /// against the quiet time.
    fn rate(&self, receiver: usize) -> f64 {
        let rate = |[from, to]: &[Mark; 2]| {
            let frames = to.received[receiver] - from.received[receiver];
            let of = if long() {
                (to.cpu - from.cpu).as_secs_f64()
            } else {
                (to.passes - from.passes) as f64
            };
            frames as f64 / of
        };
        rate(&self.parked) / rate(&self.quiet)
    }
}

/// Stops thread 0 at `point` while all others go on. When this returns, every frame is accounted
/// for.
fn park_at(point: Point, closed: bool, packed: bool) -> Shown {
    let plan = Plan {
        size: 64,
        duration: Duration::from_secs(1),
        guests: 6,
        mode: Mode::Throughput,
        pattern: Pattern::Pairs,
        queues: 1,
        ring_size: 256,
        window: Some(64),
        packed,
        mergeable: true,
        in_order: false,
    };
    let rig = Rig::new(plan, &[(A, X), (B, X), (B, Y), (C, Z)]).unwrap();
    let guests = rig.guests().unwrap();
    let mut switch = rig.switch(2, |guest| usize::from(guest != A));
    let brake = Brake::default();
    brake.stop_at(Point::BetweenPasses);
    let mut script = Script {
        rig: &rig,
        guests,
        closed,
        point,
        brake: brake.clone(),
        shared: switch.shared[1].clone(),
        x: switch.ports[X].clone(),
        phase: Phase::StopBetweenPasses,
        began: Instant::now(),
        marks: Vec::new(),
    };
    let (second, first) = (switch.pollers.pop().unwrap(), switch.pollers.pop().unwrap());
    let stop_first = Stop(switch.shared[0].clone(), brake.clone());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            brake.obey();
            first.run_with(|| park::at(Point::BetweenPasses));
        });
        // Runs also when an assertion fails.
        let _stop = stop_first;
        second.run_with(|| script.turn());
    });
    for guest in &script.guests {
        let counts = guest.tracker.counts;
        assert_eq!((counts.corrupt, counts.duplicated), (0, 0));
        assert_eq!((counts.out_of_order, counts.foreign), (0, 0));
        assert_eq!(guest.fault(), None);
    }
    for receiver in [Y, Z] {
        assert_eq!(switch.ports[receiver].stats.sum().tx_dropped, 0);
    }
    let marks = &script.marks;
    Shown {
        quiet: [marks[0], marks[1]],
        parked: [marks[2], marks[3]],
        x: switch.ports[X].stats.sum(),
    }
}

/// Ends thread 0.
struct Stop(Arc<PollShared>, Brake);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
        self.1.release();
    }
}

const POINTS: [Point; 3] = [Point::Claimed, Point::Filled, Point::Publishing];

/// Parks a producer; nothing comes at its own queue, and only a full ring drops. The rates at `Y`
/// and `Z`.
fn rates_beside(point: Point, packed: bool) -> [f64; 2] {
    let shown = park_at(point, false, packed);
    let [from, to] = shown.parked;
    // Not one frame becomes visible behind the parked one...
    assert_eq!(
        from.received[X], to.received[X],
        "{point:?} packed={packed}"
    );
    // ... and what does not fit behind it any more says so.
    let full = shown.x.drops[DropReason::EgressRingFull.name()];
    assert_eq!(shown.x.tx_dropped, full);
    [shown.rate(Y), shown.rate(Z)]
}

#[test]
fn a_parked_producer_delays_its_own_queue_and_no_other() {
    // The median of several, because a single comparison of two seconds on a shared machine is off
    // by a fifth, either way.
    let rounds = if long() { 7 } else { 1 };
    for (point, packed) in POINTS.into_iter().flat_map(|p| [(p, false), (p, true)]) {
        let mut all: Vec<[f64; 2]> = (0..rounds).map(|_| rates_beside(point, packed)).collect();
        // All other queues go on, also from the sender whose frames for X pile up or are dropped.
        for (at, receiver) in ["Y", "Z"].into_iter().enumerate() {
            all.sort_by(|one, other| one[at].total_cmp(&other[at]));
            let [lowest, rate, highest] = [0, rounds / 2, rounds - 1].map(|n| all[n][at]);
            println!(
                "{point:?} packed={packed}: {receiver} {rate:.3} of {lowest:.3} to {highest:.3}"
            );
            assert!(rate >= 0.95, "{point:?} packed={packed}: {all:?}");
        }
    }
}

#[test]
fn nobody_loops_or_waits_for_a_parked_producer() {
    for (point, packed) in POINTS.into_iter().flat_map(|p| [(p, false), (p, true)]) {
        let shown = park_at(point, false, packed);
        let ([_, from], [_, to]) = (shown.quiet, shown.parked);
        // Chains wait for it once, and never again while it stands there; the thread goes on all
        // the time.
        assert_eq!(to.given_up - from.given_up, 1, "{point:?} packed={packed}");
        let most = TRIES_A_PASS * (to.passes - from.passes);
        let claims = to.tries.claims - from.tries.claims;
        let publishes = to.tries.publishes - from.tries.publishes;
        assert!(
            claims <= most && publishes <= most,
            "{point:?} packed={packed}: {claims} and {publishes} of {most}"
        );
    }
}

#[test]
fn nothing_is_lost_behind_a_parked_producer() {
    for (point, packed) in POINTS.into_iter().flat_map(|p| [(p, false), (p, true)]) {
        // `park_at` returns once every frame that was sent has come or was counted as dropped: none
        // was dropped.
        let shown = park_at(point, true, packed);
        assert_eq!(shown.x.tx_dropped, 0, "{point:?} packed={packed}");
        let [from, to] = shown.parked;
        assert_eq!(
            from.received[X], to.received[X],
            "{point:?} packed={packed}"
        );
    }
}
