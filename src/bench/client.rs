//! A client thread, which plays one or more guests from the first frame to the end of the drain.
//!
//! ```text
//! announce ── warm up ── measure ── drain
//! ```
//!
//! All threads follow one clock, set when the last of them is ready. Rates come from what each
//! thread counted between the first turn of its loop in the measured time and the first one after
//! it, and from its own times of these turns. If a turn took half a second or more, this thread
//! stood still, and the run says nothing about the backend. Silence is measured as a sum of turns,
//! and each turn counts a millisecond at most. So a pause of the client never looks like loss.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use quanta::Clock;
use rustix::time::{ClockId, clock_gettime};

use super::frame::Checker;
use super::guest::{BURST, Guest, SendCounts};
use super::plan::{FlowCounters, FlowSpec, Mode, Plan};
use super::tracker::Counts;
use crate::virtio::driver::RingFault;

/// Sending before the measurement: caches, branch predictors and the switch's table settle.
pub const WARM_UP: Duration = Duration::from_millis(200);
/// A thread whose turn takes this long stood still.
pub const STANDSTILL: Duration = Duration::from_millis(500);
/// The most that one turn adds to the clock by which silence is judged.
const MAX_TURN_NS: u64 = 1_000_000;
/// How long a drain waits for one more frame, in nanoseconds.
const DRAIN_SILENCE_NS: u64 = 500_000_000;
/// How long a backend may take to read an announcement, in nanoseconds.
const ANNOUNCE_NS: u64 = 2_000_000_000;
/// Silence after which a round trip's frame is sent again, in nanoseconds.
const ROUND_TRIP_SILENCE_NS: u64 = 500_000_000;
/// Most frames by which an open loop catches up in one turn.
const MAX_CATCH_UP: f64 = 4096.0;

/// What all threads of a run share.
#[derive(Debug)]
pub struct Shared<'p> {
    /// The settings.
    pub plan: &'p Plan,
    /// All flows, by number.
    pub flows: &'p [FlowSpec],
    /// Their counters.
    pub counters: &'p [FlowCounters],
    /// How frames are checked.
    pub checker: &'p Checker,
    /// The clock that all follow.
    pub clock: Clock,
    /// Client threads.
    pub threads: usize,
    /// Arrivals of threads where they wait for each other, twice before the first frame.
    pub ready: AtomicUsize,
    /// Threads that send no more.
    pub finished: AtomicUsize,
    /// Ends the sending early; the drain follows.
    pub stop: AtomicBool,
    /// Ends everything at once: a backend is gone.
    pub abort: AtomicBool,
}

/// Round trips in nanoseconds.
pub type RoundTrips = Histogram<u64>;

/// What a thread has to say afterwards.
#[derive(Debug)]
pub struct ThreadReport {
    /// All counts, with drain and warm-up.
    pub counts: Counts,
    /// Refills of windows, and frames that were held back.
    pub sending: SendCounts,
    /// Frames received in the measured time, and that time in nanoseconds.
    pub measured: (u64, u64),
    /// Part of the measured time in turns that found work.
    pub busy_ns: u64,
    /// Part of the measured time in which the thread had a CPU.
    pub cpu_ns: u64,
    /// Turns in which the thread stood still, in nanoseconds.
    pub standstills: Vec<u64>,
    /// Round trips, where they were measured.
    pub round_trips: Option<RoundTrips>,
    /// Round trips that never came back.
    pub lost_round_trips: u64,
    /// What a backend did wrong.
    pub fault: Option<RingFault>,
    /// The guest from which the backend takes no frames, if there is one.
    pub deaf: Option<usize>,
}

/// What a guest does each turn.
#[derive(Debug)]
enum Role {
    Stream,
    /// Frames a nanosecond, and how many of them have been sent or given up.
    Open {
        rate: f64,
        done: f64,
    },
    /// Sends a frame and waits until it comes back; keeps the time of sending.
    Initiator {
        sent_ns: Option<u64>,
    },
    /// Sends back as many frames as came.
    Reflector,
}

impl Role {
    fn of(guest: usize, plan: &Plan) -> Self {
        match plan.mode {
            Mode::Throughput => Role::Stream,
            Mode::Open(rate) => Role::Open {
                rate: rate / 1e9,
                done: 0.0,
            },
            Mode::RoundTrip if guest.is_multiple_of(2) => Role::Initiator { sent_ns: None },
            Mode::RoundTrip => Role::Reflector,
        }
    }
}

/// A thread at work.
struct Client<'c, 'm> {
    shared: &'c Shared<'c>,
    guests: &'c mut [Guest<'m>],
    roles: Vec<Role>,
    start: u64,
    now_ns: u64,
    /// Time in turns of bounded length.
    active_ns: u64,
    report: ThreadReport,
}

/// Plays `guests` until the run is over.
pub fn play(shared: &Shared<'_>, guests: &mut [Guest<'_>]) -> ThreadReport {
    let plan = shared.plan;
    let round_trips = (plan.mode == Mode::RoundTrip).then(new_histogram);
    let mut client = Client {
        shared,
        roles: guests.iter().map(|g| Role::of(g.index, plan)).collect(),
        guests,
        start: shared.clock.raw(),
        now_ns: 0,
        active_ns: 0,
        report: ThreadReport {
            counts: Counts::default(),
            sending: SendCounts::default(),
            measured: (0, 0),
            busy_ns: 0,
            cpu_ns: 0,
            standstills: Vec::new(),
            round_trips: round_trips.flatten(),
            lost_round_trips: 0,
            fault: None,
            deaf: None,
        },
    };
    client.run();
    client.report
}

/// Returns the CPU time of the calling thread in nanoseconds.
fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}

/// Up to a minute with three digits.
fn new_histogram() -> Option<RoundTrips> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).ok()
}

impl Client<'_, '_> {
    fn run(&mut self) {
        self.announce();
        // Announcements lie in the rings, and a window fills a ring: out with them before anybody
        // sends.
        self.wait_for_all(1, |client| {
            client.receive_all();
        });
        while self.receive_all() > 0 {}
        // What comes from now on is to be answered.
        self.wait_for_all(2, |_| {});
        self.start = self.shared.clock.raw();
        self.now_ns = 0;
        if self.report.deaf.is_none() {
            self.exchange();
        }
        for guest in self.guests.iter() {
            guest
                .transmit
                .iter()
                .for_each(|queue| queue.show_sent(self.shared.counters));
        }
        self.shared.finished.fetch_add(1, Ordering::AcqRel);
        self.drain();
        self.collect();
    }

    /// Waits until every thread has come here `times` times, and does something `meanwhile`.
    fn wait_for_all(&mut self, times: usize, meanwhile: impl Fn(&mut Self)) {
        self.shared.ready.fetch_add(1, Ordering::AcqRel);
        let all = times * self.shared.threads;
        while self.shared.ready.load(Ordering::Acquire) < all && !self.over() {
            meanwhile(self);
            std::thread::yield_now();
        }
    }

    /// Lets every guest receive a burst. Returns how many frames came.
    fn receive_all(&mut self) -> usize {
        let (checker, now_ns) = (self.shared.checker, self.now_ns);
        let guests = self.guests.iter_mut();
        guests.map(|guest| guest.receive(checker, now_ns)).sum()
    }

    fn over(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed) || self.aborted()
    }

    fn aborted(&self) -> bool {
        self.shared.abort.load(Ordering::Relaxed)
    }

    /// Notes the end of a turn. Returns how long the turn took, in nanoseconds.
    #[inline(always)]
    fn tick(&mut self) -> u64 {
        let clock = &self.shared.clock;
        let now = clock.delta_as_nanos(self.start, clock.raw());
        let turn = now - self.now_ns.min(now);
        self.now_ns = now;
        self.active_ns += turn.min(MAX_TURN_NS);
        if turn >= STANDSTILL.as_nanos() as u64 {
            self.report.standstills.push(turn);
        }
        turn
    }

    /// Every guest says where it is on each of its transmit queues, and the backend reads it: from
    /// then on it is known to run, and whoever serves one of these queues to know all that were
    /// there before: no flow changes its receive queue any more.
    fn announce(&mut self) {
        for at in 0..self.guests.len() {
            for queue in 0..self.guests[at].transmit.len() {
                if !self.announce_on(at, queue) {
                    let index = self.guests[at].index;
                    self.report.deaf.get_or_insert(index);
                    self.shared.stop.store(true, Ordering::Relaxed);
                    return;
                }
            }
        }
    }

    /// Announces the guest on one queue. Returns whether the backend reads the announcement.
    fn announce_on(&mut self, at: usize, queue: usize) -> bool {
        let (checker, flows) = (self.shared.checker, self.shared.flows);
        let index = self.guests[at].index;
        self.guests[at].transmit[queue].announce(checker, index);
        let since = self.active_ns;
        while !self.guests[at].transmit[queue].announced(checker, flows) {
            self.tick();
            self.receive_all();
            if self.active_ns - since > ANNOUNCE_NS || self.over() {
                return false;
            }
        }
        true
    }

    fn exchange(&mut self) {
        let begin = WARM_UP.as_nanos() as u64;
        let end = begin + self.shared.plan.duration.as_nanos() as u64;
        let mut measuring = None;
        let mut worked = false;
        loop {
            let turn = self.tick();
            if let Some((_, _)) = measuring {
                self.report.busy_ns += if worked { turn } else { 0 };
            } else if self.now_ns >= begin {
                self.guests
                    .iter_mut()
                    .for_each(|guest| guest.tracker.begin(self.now_ns));
                if let Some(trips) = &mut self.report.round_trips {
                    trips.clear();
                }
                measuring = Some((self.received(), self.now_ns));
                self.report.cpu_ns = cpu_ns();
            }
            if self.now_ns >= end || self.over() {
                break;
            }
            worked = self.turn();
        }
        let now_ns = self.now_ns;
        self.guests
            .iter_mut()
            .for_each(|guest| guest.tracker.end(now_ns));
        if let Some((received, since)) = measuring {
            self.report.measured = (self.received() - received, now_ns - since);
            self.report.cpu_ns = cpu_ns() - self.report.cpu_ns;
        }
    }

    fn received(&self) -> u64 {
        self.guests
            .iter()
            .map(|guest| guest.tracker.counts.received)
            .sum()
    }

    /// Lets all guests receive and send once. Returns whether there was anything to do.
    #[inline(always)]
    fn turn(&mut self) -> bool {
        let mut work = 0;
        for at in 0..self.guests.len() {
            let before = self.guests[at].tracker.counts.received;
            let came = self.guests[at].receive(self.shared.checker, self.now_ns);
            let intact = self.guests[at].tracker.counts.received - before;
            work += came + self.send(at, intact as usize);
        }
        work != 0
    }

    #[inline(always)]
    fn send(&mut self, at: usize, came: usize) -> usize {
        match self.roles[at] {
            Role::Stream => self.send_all(at, BURST, true),
            Role::Open { rate, done } => self.send_due(at, rate, done),
            Role::Reflector => self.send_all(at, came, false),
            Role::Initiator { sent_ns } => self.initiate(at, sent_ns, came),
        }
    }

    #[inline(always)]
    fn send_all(&mut self, at: usize, limit: usize, windowed: bool) -> usize {
        let (checker, counters) = (self.shared.checker, self.shared.counters);
        let active_ns = self.active_ns;
        self.guests[at]
            .transmit
            .iter_mut()
            .map(|queue| queue.send(checker, counters, limit, windowed, active_ns))
            .sum()
    }

    /// Sends what an open loop's clock says. What finds no buffer stays due for a while, and is
    /// then given up and counted, or a backend that stood still would be flooded afterwards.
    fn send_due(&mut self, at: usize, rate: f64, mut done: f64) -> usize {
        let due = rate * self.now_ns as f64 - done;
        let queues = self.guests[at].transmit.len();
        let share = (due / queues as f64).min(BURST as f64);
        let sent = if share < 1.0 {
            0
        } else {
            self.send_all(at, share as usize, false)
        };
        done += sent as f64;
        let late = due - sent as f64 - MAX_CATCH_UP;
        if late > 0.0 {
            done += late;
            self.guests[at].transmit[0].give_up(late as u64);
        }
        self.roles[at] = Role::Open { rate, done };
        sent
    }

    fn initiate(&mut self, at: usize, sent_ns: Option<u64>, came: usize) -> usize {
        if let Some(since) = sent_ns {
            let waited = self.now_ns.saturating_sub(since);
            if came == 0 && waited < ROUND_TRIP_SILENCE_NS {
                return 0;
            }
            if came == 0 {
                self.report.lost_round_trips += 1;
            } else if let Some(trips) = &mut self.report.round_trips {
                trips.saturating_record(waited.max(1));
            }
        }
        let sent = self.send_all(at, 1, false);
        // Read after the frame was published: what the client itself needs for it is not the
        // backend's.
        let clock = &self.shared.clock;
        let now = clock.delta_as_nanos(self.start, clock.raw());
        self.roles[at] = Role::Initiator {
            sent_ns: (sent != 0).then_some(now),
        };
        sent
    }

    /// Receives the frames that are still on their way.
    fn drain(&mut self) {
        let mut last = self.active_ns;
        while !self.aborted() && self.active_ns - last < DRAIN_SILENCE_NS {
            self.tick();
            let mut came = 0;
            for at in 0..self.guests.len() {
                came += self.guests[at].receive(self.shared.checker, self.now_ns);
                self.guests[at]
                    .transmit
                    .iter_mut()
                    .for_each(|queue| queue.reclaim());
            }
            if came != 0 {
                last = self.active_ns;
            }
            if self.all_came() {
                break;
            }
        }
    }

    /// Whether nobody sends any more and every frame sent has been received by somebody.
    fn all_came(&self) -> bool {
        self.shared.finished.load(Ordering::Acquire) == self.shared.threads
            && self.shared.counters.iter().all(|flow| {
                flow.received.load(Ordering::Relaxed) >= flow.sent.load(Ordering::Acquire)
            })
    }

    fn collect(&mut self) {
        for guest in self.guests.iter() {
            let counts = &guest.tracker.counts;
            let total = &mut self.report.counts;
            total.received += counts.received;
            total.corrupt += counts.corrupt;
            total.out_of_order += counts.out_of_order;
            total.duplicated += counts.duplicated;
            total.foreign += counts.foreign;
            total.longest_gap_ns = total.longest_gap_ns.max(counts.longest_gap_ns);
            for queue in &guest.transmit {
                self.report.sending.refills += queue.counts.refills;
                self.report.sending.held_back += queue.counts.held_back;
            }
            self.report.fault = self.report.fault.or(guest.fault());
        }
    }
}
