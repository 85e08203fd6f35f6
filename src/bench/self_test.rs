//! What the client itself costs: two guests and a null peer on one thread, timed apart.
//!
//! The peer's lines are in this core's cache, so this is the client's own work: the floor under
//! whatever a measurement shows. Against a backend on another core, fetching its lines comes on
//! top, for every client.

use std::fmt;
use std::io;

use hdrhistogram::Histogram;
use quanta::Clock;
use serde::Serialize;

use super::frame::{Checker, MacPrefix};
use super::guest::{BURST, Guest};
use super::memory::{GuestRam, QueuePlace};
use super::null_peer::{NullPeer, NullRing};
use super::plan::{FlowCounters, FlowSpec, Pattern, Plan};
use crate::virtio::driver::{RingAreas, RingLayout};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What a frame costs the client.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    /// Frame bytes.
    pub size: usize,
    /// `packed` or `split`.
    pub packed: bool,
    /// Frames sent.
    pub frames: u64,
    /// To send one, in seconds.
    pub send_seconds: f64,
    /// To receive one.
    pub receive_seconds: f64,
    /// What the null peer took.
    pub peer_seconds: f64,
    /// Whether all frames arrived intact and in order.
    pub intact: bool,
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ring = if self.packed { "packed" } else { "split" };
        let ns = |seconds: f64| seconds * 1e9;
        writeln!(f, "{} B, {ring} ring, {} frames", self.size, self.frames)?;
        writeln!(f, "  send      {:>8.1} ns a frame", ns(self.send_seconds))?;
        writeln!(
            f,
            "  receive   {:>8.1} ns a frame",
            ns(self.receive_seconds)
        )?;
        let both = self.send_seconds + self.receive_seconds;
        writeln!(
            f,
            "  at most   {:>8.2} Mpps from one client thread",
            1e-6 / both
        )?;
        writeln!(
            f,
            "  (null peer {:.1} ns a frame, on the same core and in its cache)",
            ns(self.peer_seconds)
        )?;
        if !self.intact {
            writeln!(f, "  FAILED: frames were lost or changed")?;
        }
        Ok(())
    }
}

/// Measures for `plan.duration`, with two guests in both directions and one queue pair.
pub fn measure(plan: &Plan) -> io::Result<Cost> {
    let plan = Plan {
        guests: 2,
        queues: 1,
        pattern: Pattern::Pairs,
        ..plan.clone()
    };
    let flows = [direction(0), direction(1)];
    let counters = [FlowCounters::default(), FlowCounters::default()];
    let checker = Checker::new(plan.size, MacPrefix::random()?);
    let rams = [
        GuestRam::new(&plan.memory_needs())?,
        GuestRam::new(&plan.memory_needs())?,
    ];
    let kicks = [pair()?, pair()?];
    let guest = |index: usize| {
        let (ram, kicks) = (&rams[index], &kicks[index]);
        Guest::new(index, ram, kicks, &plan, &flows, &counters, &checker)
    };
    let mut guests = [guest(0)?, guest(1)?];
    let mut peers = [peer(&plan, &rams, 0)?, peer(&plan, &rams, 1)?];
    let clock = Clock::new();
    let start = clock.raw();
    let limit = plan.duration.as_nanos() as u64;
    let mut cost = [new_histogram()?, new_histogram()?, new_histogram()?];
    loop {
        let mut last = clock.raw();
        let now_ns = clock.delta_as_nanos(start, last);
        if now_ns >= limit {
            break;
        }
        let mut lap = |part: usize, frames: usize| {
            let now = clock.raw();
            let ns = clock.delta_as_nanos(last, now);
            if frames != 0 {
                cost[part].saturating_record(ns * RESOLUTION / frames as u64);
            }
            last = now;
        };
        let sent = guests
            .iter_mut()
            .map(|guest| guest.transmit[0].send(&checker, &counters, BURST, true, now_ns));
        lap(0, sent.sum());
        let moved = peers.iter_mut().map(|peer| peer.step(BURST));
        lap(1, moved.sum());
        let came = guests
            .iter_mut()
            .map(|guest| guest.receive(&checker, now_ns));
        lap(2, came.sum());
    }
    Ok(result(&plan, &guests, &counters, &cost))
}

/// Parts of a nanosecond that are told apart.
const RESOLUTION: u64 = 16;

fn new_histogram() -> io::Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 1 << 40, 2).map_err(io::Error::other)
}

/// The median over bursts: the mean would count every time slice that other programs took.
fn result(
    plan: &Plan,
    guests: &[Guest<'_>],
    counters: &[FlowCounters],
    cost: &[Histogram<u64>; 3],
) -> Cost {
    let mut frames = 0;
    let mut intact = true;
    for guest in guests {
        guest.transmit[0].show_sent(counters);
        let counts = guest.tracker.counts;
        frames += counts.received;
        intact &= counts.corrupt + counts.duplicated + counts.out_of_order + counts.foreign == 0;
        intact &= guest.fault().is_none();
    }
    let sent: u64 = counters
        .iter()
        .map(|flow| flow.sent.load(std::sync::atomic::Ordering::Relaxed))
        .sum();
    let each = |part: usize| cost[part].value_at_quantile(0.5) as f64 / RESOLUTION as f64 / 1e9;
    Cost {
        size: plan.size,
        packed: plan.packed,
        frames,
        send_seconds: each(0),
        receive_seconds: each(2),
        peer_seconds: each(1),
        // Everything sent was moved and received in the same turn, up to what waits for room.
        intact: intact && frames > 0 && sent - frames <= 2 * plan.window() as u64,
    }
}

fn direction(source: usize) -> FlowSpec {
    FlowSpec {
        source,
        queue: 0,
        destination: source ^ 1,
    }
}

fn pair() -> io::Result<[EventFd; 2]> {
    Ok([EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?])
}

/// The null peer from guest `source` to the other.
pub(super) fn peer<'m>(
    plan: &Plan,
    rams: &'m [GuestRam; 2],
    source: usize,
) -> io::Result<NullPeer<'m>> {
    let side = |ram: &'m GuestRam, place: &QueuePlace| -> io::Result<_> {
        let layout = RingLayout::new(plan.ring_size, plan.packed);
        let ring = ram.window(place.ring, layout.len)?;
        let areas = RingAreas::of(ring, &layout).ok_or(io::ErrorKind::InvalidInput)?;
        let memory = ram.window(0, ram.memory.len())?;
        Ok((NullRing::new(areas, plan.packed), memory))
    };
    let (from, to) = (&rams[source], &rams[source ^ 1]);
    Ok(NullPeer {
        from: side(from, &from.transmit[0])?,
        to: side(to, &to.receive[0])?,
    })
}

#[cfg(test)]
mod tests {
    use super::super::plan::tests::plan;
    use super::*;

    #[test]
    fn every_kind_of_ring_carries_every_frame() {
        for packed in [false, true] {
            for (mergeable, size) in [(false, 60), (true, 64), (false, 1514), (true, 9000)] {
                let plan = Plan {
                    packed,
                    mergeable,
                    size,
                    in_order: size == 1514,
                    duration: std::time::Duration::from_millis(100),
                    ..plan()
                };
                let cost = measure(&plan).unwrap();
                assert!(cost.intact, "{plan:?} {cost:?}");
            }
        }
    }
}
