//! What a frame costs that comes alone, where many come alone from different ports: they are gathered into one claim.
//!
//! Passes and guests take turns on two threads, so that each pass finds exactly the frames of one turn, in the cache of
//! another core.

use std::sync::atomic::{AtomicBool, Ordering};

use quanta::Clock;
use serde_json::{Value, json};

use crate::rig::Rig;
use crate::{Effort, median, plan};

/// Frames of a pass.
const FRAMES: usize = 32;

/// Nanoseconds a frame: the median over all passes.
fn sample(ports: usize, effort: &Effort) -> f64 {
    let flows: Vec<(usize, usize)> = (1..=ports).map(|port| (port, 0)).collect();
    let rig = Rig::new(plan(ports + 1, 64), &flows).unwrap();
    let mut guests = rig.guests().unwrap();
    let mut switch = rig.switch(1, |_| 0);
    let (poller, shared) = (switch.pollers.pop().unwrap(), switch.shared[0].clone());
    // Whose turn it is.
    let pass = AtomicBool::new(false);
    let over = AtomicBool::new(false);
    let clock = Clock::new();
    let limit = effort.time.as_nanos() as u64;
    let mut passes: Vec<f64> = Vec::with_capacity(1 << 20);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            effort.pin(1);
            let start = clock.raw();
            while clock.delta_as_nanos(start, clock.raw()) < limit {
                for guest in &mut guests[1..] {
                    let frames = FRAMES / ports;
                    let sent =
                        guest.transmit[0].send(&rig.checker, &rig.counters, frames, false, 0);
                    assert_eq!(sent, frames, "a free buffer for every frame");
                }
                pass.store(true, Ordering::Release);
                while pass.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                let came = guests[0].receive(&rig.checker, 0);
                assert_eq!(came, FRAMES, "all frames in one pass");
            }
            over.store(true, Ordering::Release);
            pass.store(true, Ordering::Release);
        });
        effort.pin(0);
        let mut began = None;
        poller.run_with(|| {
            if let Some(began) = began {
                passes.push(clock.delta_as_nanos(began, clock.raw()) as f64);
                pass.store(false, Ordering::Release);
            }
            while !pass.load(Ordering::Acquire) {
                std::hint::spin_loop();
            }
            if over.load(Ordering::Acquire) {
                shared.stop.store(true, Ordering::Relaxed);
            }
            began = Some(clock.raw());
        });
    });
    median(passes) / FRAMES as f64
}

pub(crate) fn measure(effort: &Effort) -> Value {
    let rounds: Vec<(f64, f64)> = (0..effort.rounds)
        .map(|_| (sample(1, effort), sample(FRAMES, effort)))
        .collect();
    json!({
        "one_port_ns": median(rounds.iter().map(|round| round.0)),
        "ports_ns": median(rounds.iter().map(|round| round.1)),
        "ratio": median(rounds.iter().map(|round| round.1 / round.0)),
    })
}
