//! What one core copies where it does nothing else: the bound for frames so long that copying is
//! all they cost.

use pollux::bench::memory::GuestRam;
use pollux::bench::plan::Plan;
use quanta::Clock;
use serde_json::{Value, json};

use crate::{Effort, plan};

/// Copies in one direction before those in the other, and between two looks at the clock.
const TURN: usize = 32;

/// Million copies a second of `size` bytes with the C library's `memcpy`, out of the transmit
/// buffers of two guests of `pollux bench` into the memory of each other's receive buffers: the
/// same memory, of the same size, in the same order. Pieces are not told apart: mergeable buffers
/// are a memory of so many bytes.
pub(crate) fn measure(size: usize, mergeable: bool, ring_size: u16, effort: &Effort) -> Value {
    let plan = Plan {
        mergeable,
        ring_size,
        ..plan(2, size)
    };
    let rams = [0, 1].map(|_| GuestRam::new(&plan.memory_needs()).unwrap());
    let step = size.next_multiple_of(64);
    let ways = [(0, 1), (1, 0)].map(|(from, to): (usize, usize)| {
        let (from, to) = (&rams[from], &rams[to]);
        let (sources, room) = (from.transmit[0].buffers, to.receive[0].buffers);
        let places = (room.stride * room.count / step).min(sources.count);
        let source = (0..sources.count as u32).map(|n| from.window(sources.at(n), size).unwrap());
        let place = (0..places).map(|n| to.window(room.offset + n * step, size).unwrap());
        (source.collect::<Vec<_>>(), place.collect::<Vec<_>>())
    });
    effort.pin(0);
    let (clock, limit) = (Clock::new(), effort.time.as_nanos() as u64);
    let (began, mut next) = (clock.raw(), 0);
    let ns = loop {
        for (sources, places) in &ways {
            for n in next..next + TURN {
                places[n % places.len()].copy_from(&sources[n % sources.len()], size);
            }
        }
        next += TURN;
        let ns = clock.delta_as_nanos(began, clock.raw());
        if ns >= limit {
            break ns;
        }
    };
    let copies = (2 * next) as f64;
    json!({
        "size": size,
        "mpps": copies * 1e3 / ns as f64,
        "gbit_per_second": copies * size as f64 * 8.0 / ns as f64,
        "lost": 0,
    })
}
