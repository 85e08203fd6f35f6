//! Passes and guests in turns, on two threads, so that each pass finds exactly the frames of one
//! turn, in the cache of another core.

use std::sync::atomic::{AtomicBool, Ordering};

use pollux::bench::guest::Guest;
use quanta::Clock;

use crate::rig::{Rig, Switch};
use crate::{Effort, median};

/// What happens between two passes: so many frames sent by each of these guests, and so many
/// received in all.
pub(crate) struct Turn {
    pub(crate) sent: Vec<(usize, usize)>,
    pub(crate) received: usize,
}

/// Nanoseconds of a pass: the median.
pub(crate) fn passes(
    rig: &Rig,
    mut guests: Vec<Guest<'_>>,
    mut switch: Switch,
    turn: &Turn,
    effort: &Effort,
) -> f64 {
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
                for (guest, frames) in &turn.sent {
                    let queue = &mut guests[*guest].transmit[0];
                    let sent = queue.send(&rig.checker, &rig.counters, *frames, false, 0);
                    assert_eq!(sent, *frames, "a free buffer for every frame");
                }
                pass.store(true, Ordering::Release);
                while pass.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                let came = guests
                    .iter_mut()
                    .map(|guest| guest.receive(&rig.checker, 0));
                assert_eq!(came.sum::<usize>(), turn.received, "all frames in one pass");
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
    median(passes)
}
