//! Guests on a switch's sockets whose roles `pollux bench` does not have: one that returns no
//! buffer, a flooder, a pace.
//!
//! One thread plays all of them, so that no measurement depends on how the kernel divides a
//! processor among guests.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use hdrhistogram::Histogram;
use pollux::bench::frame::{Checker, MacPrefix};
use pollux::bench::frontend::{Frontend, Order};
use pollux::bench::guest::Guest;
use pollux::bench::plan::{FlowCounters, FlowSpec, Plan};
use pollux::bench::run::{self, Attachment, RunError};
use pollux::sys::sched;
use quanta::Clock;
use serde_json::{Value, json};

use crate::{Effort, median, plan};

/// Frames of a sender in a turn.
const BURST: usize = 64;
/// A switch may need a while until a new port forwards.
const WARM_UP_NS: u64 = 1_000_000_000;
/// Silence after which everything has come that will.
const SILENCE_NS: u64 = 100_000_000;

/// Some guests with frames of one size.
struct Party<'m> {
    guests: Vec<Guest<'m>>,
    checker: &'m Checker,
    counters: &'m [FlowCounters],
    flows: &'m [FlowSpec],
}

/// What belongs to guests of one size, and outlives them.
struct Table {
    plan: Plan,
    checker: Checker,
    flows: Vec<FlowSpec>,
    counters: Vec<FlowCounters>,
    attachments: Vec<Attachment>,
    /// The first guest's number, so that guests of two tables have different addresses.
    first: usize,
}

impl Table {
    fn new(
        first: usize,
        size: usize,
        count: usize,
        flows: &[(usize, usize)],
    ) -> Result<Table, RunError> {
        let plan = plan(first + count, size);
        let attachments = (0..count).map(|_| Attachment::new(&plan, 0));
        let flows = flows.iter().map(|&(source, destination)| FlowSpec {
            source,
            queue: 0,
            destination,
        });
        let flows: Vec<FlowSpec> = flows.collect();
        let macs = MacPrefix::random().map_err(RunError::Memory)?;
        Ok(Table {
            attachments: attachments
                .collect::<Result<_, _>>()
                .map_err(RunError::Memory)?,
            counters: flows.iter().map(|_| FlowCounters::default()).collect(),
            checker: Checker::new(size, macs),
            flows,
            plan,
            first,
        })
    }

    /// The guests, attached to the sockets, and what keeps them attached.
    fn attach(&self, sockets: &[PathBuf]) -> Result<(Party<'_>, Vec<Frontend>), RunError> {
        let mut guests = Vec::new();
        let mut frontends = Vec::new();
        for (n, (attachment, socket)) in self.attachments.iter().zip(sockets).enumerate() {
            let index = self.first + n;
            let guest = attachment.guest(
                index,
                &self.plan,
                &self.flows,
                &self.counters,
                &self.checker,
            );
            let guest = guest.map_err(RunError::Memory)?;
            frontends.push(connect(attachment, &self.plan, index, socket)?);
            guest.kick_all();
            guests.push(guest);
        }
        let party = Party {
            guests,
            checker: &self.checker,
            counters: &self.counters,
            flows: &self.flows,
        };
        Ok((party, frontends))
    }
}

/// Connects a guest's frontend, and starts its device.
pub(crate) fn connect(
    attachment: &Attachment,
    plan: &Plan,
    guest: usize,
    socket: &Path,
) -> Result<Frontend, RunError> {
    let mut frontend = Frontend::connect(socket, super::victims::TIMEOUT)
        .map_err(|source| RunError::Attach { guest, source })?;
    run::negotiate(plan, Order::Qemu, &mut frontend)
        .and_then(|()| attachment.start(plan, Order::Qemu, &mut frontend))
        .map_err(|source| RunError::Attach { guest, source })?;
    Ok(frontend)
}

impl Party<'_> {
    /// Every guest says where it is.
    fn announce(&mut self) {
        let (checker, flows) = (self.checker, self.flows);
        for guest in &mut self.guests {
            let index = guest.index;
            guest.transmit[0].announce(checker, index);
            while !guest.transmit[0].announced(checker, flows) {
                std::hint::spin_loop();
            }
        }
    }

    fn send(&mut self, guest: usize, limit: usize) -> usize {
        self.guests[guest].transmit[0].send(self.checker, self.counters, limit, false, 0)
    }

    fn receive(&mut self, guest: usize) -> usize {
        self.guests[guest].receive(self.checker, 0)
    }

    /// One buffer at most.
    fn receive_one(&mut self, guest: usize) -> usize {
        let guest = &mut self.guests[guest];
        let queues = guest.receive.iter_mut();
        let each = queues.map(|queue| queue.receive_one(self.checker, &mut guest.tracker, 0));
        each.sum()
    }

    fn received(&self, guest: usize) -> u64 {
        self.guests[guest].tracker.counts.received
    }

    /// Receives until nothing comes any more.
    fn drain(&mut self, clock: &Clock) {
        let mut last = clock.raw();
        while clock.delta_as_nanos(last, clock.raw()) < SILENCE_NS {
            for guest in 0..self.guests.len() {
                self.guests[guest].transmit[0].reclaim();
                if self.receive(guest) != 0 {
                    last = clock.raw();
                }
            }
        }
    }

    /// Sent and received frames of each flow.
    fn totals(&self) -> Vec<(u64, u64)> {
        let senders = self.guests.iter().flat_map(|guest| &guest.transmit);
        senders.for_each(|queue| queue.show_sent(self.counters));
        let count = |flow: &FlowCounters| {
            let sent = flow.sent.load(Ordering::Relaxed);
            (sent, flow.received.load(Ordering::Relaxed))
        };
        self.counters.iter().map(count).collect()
    }
}

/// Calls `turn` with the nanoseconds since the start until `ns` are over; returns the seconds.
fn during(clock: &Clock, ns: u64, mut turn: impl FnMut(u64)) -> f64 {
    let start = clock.raw();
    loop {
        let now = clock.delta_as_nanos(start, clock.raw());
        if now >= ns {
            return now as f64 / 1e9;
        }
        turn(now);
    }
}

/// The share of a flow's frames that did not come, between two [`Party::totals`].
fn loss(before: &[(u64, u64)], after: &[(u64, u64)], flow: usize) -> (u64, f64) {
    let sent = after[flow].0 - before[flow].0;
    let lost = sent.saturating_sub(after[flow].1 - before[flow].1);
    (lost, lost as f64 / sent.max(1) as f64)
}

/// Guest 0 sends to 1 and 2 in turn; 2 returns its buffers, or does not.
pub(crate) fn slow(sockets: &[PathBuf], effort: &Effort) -> Result<Value, RunError> {
    let table = Table::new(0, 64, 3, &[(0, 1), (0, 2)])?;
    let (mut party, _frontends) = table.attach(sockets)?;
    effort.pin(0);
    party.announce();
    let clock = Clock::new();
    let mut lost = 0;
    let mut round = |returns: bool, ns: u64| {
        party.drain(&clock);
        let (before, from) = (party.totals(), party.received(1));
        let seconds = during(&clock, ns, |_| {
            party.send(0, BURST / 2);
            party.receive(1);
            if returns {
                party.receive(2);
            }
        });
        let rate = (party.received(1) - from) as f64 / seconds / 1e6;
        party.drain(&clock);
        let (n, share) = loss(&before, &party.totals(), 0);
        lost += n;
        (rate, share)
    };
    round(true, WARM_UP_NS);
    let ns = effort.time.as_nanos() as u64;
    let rounds: Vec<_> = (0..effort.rounds)
        .map(|_| (round(true, ns), round(false, ns)))
        .collect();
    Ok(json!({
        "fast_mpps": median(rounds.iter().map(|(with, _)| with.0)),
        "beside_slow_mpps": median(rounds.iter().map(|(_, without)| without.0)),
        "ratio": median(rounds.iter().map(|(with, without)| without.0 / with.0)),
        "fast_loss_share": median(rounds.iter().map(|(_, without)| without.1)),
    }))
}

/// Part of its capacity that a flooded receiver takes: a switch that takes no more from the flooder
/// than it could deliver still has to lose most of it.
const TAKEN: u64 = 4;

/// A chore that is due again some time after it was done: what it missed meanwhile it never makes
/// up for.
#[derive(Default)]
struct Paced {
    due: u64,
}

impl Paced {
    /// Calls `chore` if it is due, and again `ns` nanoseconds later for each frame that it handled.
    fn turn(&mut self, now: u64, ns: u64, chore: impl FnOnce() -> usize) {
        if now >= self.due {
            self.due = now + ns * chore() as u64;
        }
    }
}

/// Guest 1 floods guest 0, which returns its buffers at a quarter of the rate at which it could;
/// guest 2 sends 1 % of that.
pub(crate) fn flood(sockets: &[PathBuf], effort: &Effort) -> Result<Value, RunError> {
    let table = Table::new(0, 64, 3, &[(1, 0), (2, 0)])?;
    let (mut party, _frontends) = table.attach(sockets)?;
    effort.pin(0);
    party.announce();
    let clock = Clock::new();
    let ns = effort.time.as_nanos() as u64;
    let mut capacity = 0.0_f64;
    for ns in [WARM_UP_NS, ns] {
        let from = party.received(0);
        let seconds = during(&clock, ns, |_| {
            party.send(1, BURST);
            party.receive(0);
        });
        capacity = capacity.max((party.received(0) - from) as f64 / seconds);
    }
    assert!(capacity > 0.0, "the receiver got nothing");
    let frame_ns = TAKEN * (1e9 / capacity).ceil() as u64;
    let mut round = || {
        party.drain(&clock);
        let before = party.totals();
        let (mut taken, mut paced) = (Paced::default(), Paced::default());
        during(&clock, ns, |now| {
            party.send(1, BURST);
            paced.turn(now, 100 * frame_ns, || party.send(2, 1));
            taken.turn(now, frame_ns, || party.receive(0));
        });
        party.drain(&clock);
        let after = party.totals();
        assert!(after[1].0 > before[1].0, "the paced sender sent nothing");
        (loss(&before, &after, 1).1, loss(&before, &after, 0).1)
    };
    let rounds: Vec<_> = (0..effort.rounds).map(|_| round()).collect();
    Ok(json!({
        "capacity_mpps": capacity / 1e6,
        "taken_mpps": 1e3 / frame_ns as f64,
        "paced_loss_share": median(rounds.iter().map(|round| round.0)),
        "flooder_loss_share": median(rounds.iter().map(|round| round.1)),
    }))
}

/// Time between two frames of the paced sender.
const PACE_NS: u64 = 50_000;

/// A frame under way: when it was sent, and how long this thread had run then.
struct Sent {
    at: u64,
    ran: Duration,
}

impl Sent {
    fn now(clock: &Clock) -> Self {
        // In this order: a processor lost in between is then missing in the time that it ran.
        Sent {
            at: clock.raw(),
            ran: sched::own_cpu_time(),
        }
    }

    /// Nanoseconds until now; and the same without those in which this thread had no processor to
    /// look with.
    fn since(&self, clock: &Clock) -> (u64, u64) {
        let now = Sent::now(clock);
        let ns = clock.delta_as_nanos(self.at, now.at);
        let ran = now.ran.saturating_sub(self.ran).as_nanos() as u64;
        (ns, ns.min(ran))
    }
}

/// Guests 0 and 1: bursts of long frames. Guests 2 and 3: one small frame every 50 µs.
///
/// One thread plays them all, so it looks for small frames after each long one that it has checked,
/// and a time in which it had no processor is not the switch's.
pub(crate) fn fair(sockets: &[PathBuf], size: usize, effort: &Effort) -> Result<Value, RunError> {
    let long = Table::new(0, size, 2, &[(0, 1)])?;
    let small = Table::new(2, 64, 2, &[(2, 3)])?;
    let (mut long, _frontends) = long.attach(&sockets[..2])?;
    let (mut small, _others) = small.attach(&sockets[2..])?;
    effort.pin(0);
    long.announce();
    small.announce();
    let clock = Clock::new();
    let mut measure = |flooding: bool, ns: u64| {
        long.drain(&clock);
        small.drain(&clock);
        let (before, long_before) = (small.totals(), long.received(1));
        let histogram = || Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3).unwrap();
        let (mut times, mut wall) = (histogram(), histogram());
        let mut due = 0;
        let mut sent = VecDeque::new();
        let seconds = during(&clock, ns, |now| {
            if flooding {
                long.send(0, BURST);
                long.receive_one(1);
            }
            if now >= due {
                let before = Sent::now(&clock);
                if small.send(0, 1) == 1 {
                    sent.push_back(before);
                    due = now + PACE_NS;
                }
            }
            for _ in 0..small.receive(1) {
                let since: Sent = sent.pop_front().unwrap();
                let (ns, ran) = since.since(&clock);
                wall.saturating_record(ns.max(1));
                times.saturating_record(ran.max(1));
            }
        });
        let long_rate = (long.received(1) - long_before) as f64 / seconds;
        small.drain(&clock);
        long.drain(&clock);
        let lost = loss(&before, &small.totals(), 0).0;
        (times, wall, lost, long_rate)
    };
    measure(true, WARM_UP_NS);
    let ns = effort.time.as_nanos() as u64 * effort.rounds as u64;
    let (alone, alone_wall, _, _) = measure(false, ns);
    let (beside, wall, lost, long_rate) = measure(true, ns);
    let at = |times: &Histogram<u64>, quantile| times.value_at_quantile(quantile) as f64 / 1e9;
    Ok(json!({
        "frames": beside.len(),
        "lost": lost,
        "alone_p50_seconds": at(&alone, 0.5),
        "alone_p999_seconds": at(&alone, 0.999),
        "p50_seconds": at(&beside, 0.5),
        "p999_seconds": at(&beside, 0.999),
        "alone_wall_p999_seconds": at(&alone_wall, 0.999),
        "wall_p999_seconds": at(&wall, 0.999),
        "long_frames_per_second": long_rate,
    }))
}
