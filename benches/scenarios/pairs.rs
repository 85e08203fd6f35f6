//! Two pairs of guests served by two poll threads on two processors, against one thread that serves
//! both.
//!
//! The poll threads play the guests themselves, between their passes, so nobody else needs a
//! processor.

use std::sync::atomic::Ordering;

use pollux::bench::guest::Guest;
use pollux::poll::Poller;
use quanta::Clock;
use serde_json::{Value, json};

use crate::rig::Rig;
use crate::{Effort, median, plan};

/// Frames that each guest sends in a turn.
const FRAMES: usize = 32;
/// Turns between two looks at the clock.
const TURNS: u32 = 64;

/// Million frames a second of all guests. `crossed`: those of the second half of the guests receive
/// from the first, so with two threads each delivers into rings whose guests the other one plays.
fn sample(threads: usize, crossed: bool, effort: &Effort) -> f64 {
    let flows: &[(usize, usize)] = if crossed {
        &[(0, 2), (2, 0), (1, 3), (3, 1)]
    } else {
        &[(0, 1), (1, 0), (2, 3), (3, 2)]
    };
    let rig = Rig::new(plan(4, 64), flows).unwrap();
    let mut guests = rig.guests().unwrap();
    let switch = rig.switch(threads, |guest| guest * threads / 4);
    let (clock, limit) = (Clock::new(), effort.time.as_nanos() as u64);
    let stop = |thread: usize| switch.shared[thread].stop.store(true, Ordering::Relaxed);
    let run = |thread: usize, poller: Poller, own: &mut [Guest<'_>]| {
        effort.pin(thread);
        let (began, mut turn) = (clock.raw(), 0_u32);
        poller.run_with(|| {
            for guest in own.iter_mut() {
                guest.transmit[0].send(&rig.checker, &rig.counters, FRAMES, false, 0);
                guest.receive(&rig.checker, 0);
            }
            turn = turn.wrapping_add(1);
            if turn % TURNS == 0 && clock.delta_as_nanos(began, clock.raw()) >= limit {
                stop(thread);
            }
        });
        let seconds = clock.delta_as_nanos(began, clock.raw()) as f64 / 1e9;
        let received = own.iter().map(|guest| guest.tracker.counts.received);
        received.sum::<u64>() as f64 / seconds / 1e6
    };
    let each = guests.chunks_mut(4 / threads);
    std::thread::scope(|scope| {
        let run = &run;
        let started: Vec<_> = switch
            .pollers
            .into_iter()
            .zip(each)
            .enumerate()
            .map(|(thread, (poller, own))| scope.spawn(move || run(thread, poller, own)))
            .collect();
        let rates = started.into_iter().map(|thread| thread.join().unwrap());
        rates.sum()
    })
}

pub(crate) fn measure(effort: &Effort) -> Value {
    let rounds: Vec<[f64; 4]> = (0..effort.rounds)
        .map(|_| [(1, false), (2, false), (1, true), (2, true)])
        .map(|kinds| kinds.map(|(threads, crossed)| sample(threads, crossed, effort)))
        .collect();
    let rate = |kind: usize| median(rounds.iter().map(|round| round[kind]));
    let ratio = |two: usize, one: usize| median(rounds.iter().map(|round| round[two] / round[one]));
    json!({
        "one_thread_mpps": rate(0),
        "two_threads_mpps": rate(1),
        "ratio": ratio(1, 0),
        "crossed_one_thread_mpps": rate(2),
        "crossed_two_threads_mpps": rate(3),
        "crossed_ratio": ratio(3, 2),
    })
}
