//! A thread that does nothing but look at the clock, in a poll thread's place: how long it is away
//! although the kernel says that it had its processor. A machine that is itself a guest loses
//! processors to its host so, and no switch can help it.

use std::time::Instant;

use pollux::sys::sched;
use quanta::Clock;
use serde_json::{Value, json};

use crate::Effort;

/// Shorter gaps are not looked into.
const GAP_NS: u64 = 20_000;
/// Longer ones are counted, as `benches/change` counts passes.
const LONG_NS: u64 = 100_000;

pub(crate) fn measure(effort: &Effort) -> Value {
    effort.pin(0);
    let (clock, begun) = (Clock::new(), Instant::now());
    let (mut longest, mut long) = (0, 0_u64);
    let mut looked = (clock.raw(), sched::own_cpu_time());
    let mut last = looked.0;
    while begun.elapsed() < effort.time {
        for _ in 0..1000 {
            let now = clock.raw();
            let gap = clock.delta_as_nanos(last, now);
            last = now;
            if gap < GAP_NS {
                continue;
            }
            // As a poll thread reckons: what it had less of its processor than of time.
            let (at, ran) = (clock.raw(), sched::own_cpu_time());
            let had = ran.saturating_sub(looked.1).as_nanos() as u64;
            let off = clock.delta_as_nanos(looked.0, at).saturating_sub(had);
            looked = (at, ran);
            let away = gap.saturating_sub(off);
            longest = longest.max(away);
            long += u64::from(away > LONG_NS);
            last = clock.raw();
        }
    }
    json!({
        "seconds": begun.elapsed().as_secs_f64(),
        "longest_seconds": longest as f64 / 1e9,
        "over_100_us": long,
    })
}
