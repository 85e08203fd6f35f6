//! Measures how loaded poll threads and queues are, and decides which queue should move. Plain
//! arithmetic, no threads.
//!
//! A queue's load is its share of its thread's frames times the thread's busy share. So the data
//! path measures nothing for it. Frames of different queues may differ in cost, so the load is an
//! estimate. The effect of a move is measured again.

use std::collections::HashMap;

use crate::switch::PortRef;

/// A thread whose busy share is below this has room for more work. No queue moves away from it.
const HOT: f64 = 0.75;
/// Two threads whose busy shares differ by less than this do not exchange queues.
const GAP: f64 = 0.25;
/// A move must lower the busy share of the busier of the two threads by at least this.
const GAIN: f64 = 0.1;
/// A queue moves after this many looks in a row (one a second) that find the same thread too busy.
const PATIENCE: u32 = 3;
/// Looks after a move in which no queue moves, so that the effect of the move is measured first.
const REST: u32 = 5;
/// Weight of the newest second in the moving average of a thread's busy share.
const NEWEST: f64 = 0.5;

/// One transmit queue of one registration of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct QueueKey {
    pub(super) port: PortRef,
    pub(super) pair: u16,
}

/// A poll thread and its work.
#[derive(Clone, Debug)]
pub(super) struct ThreadLoad {
    pub(super) number: usize,
    pub(super) node: Option<usize>,
    /// Queues placed on it.
    pub(super) queues: usize,
    /// Share of the time in which the thread works, 0 to 1.
    pub(super) busy: f64,
}

/// A queue that may move to another thread.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) key: QueueKey,
    pub(super) thread: usize,
    /// Share of its thread's time that the queue uses, 0 to 1.
    pub(super) load: f64,
    /// Threads that the queue's port is pinned to. Empty: any thread.
    pub(super) allowed: Vec<u32>,
}

/// Whether a port pinned to `allowed` may be served by `thread`.
pub(super) fn may(allowed: &[u32], thread: usize) -> bool {
    allowed.is_empty() || allowed.iter().any(|number| *number as usize == thread)
}

/// Returns the allowed thread with the fewest queues, on `node` if an allowed thread is there.
/// Among equals it returns the lowest number. `None` if no thread is allowed.
pub(super) fn lightest(
    threads: &[ThreadLoad],
    allowed: &[u32],
    node: Option<usize>,
) -> Option<usize> {
    let all = || threads.iter().filter(|thread| may(allowed, thread.number));
    let near = all().filter(|thread| node.is_some() && thread.node == node);
    let best = near.min_by_key(|thread| thread.queues);
    best.or_else(|| all().min_by_key(|thread| thread.queues))
        .map(|thread| thread.number)
}

/// The measured loads, updated once a second.
#[derive(Debug, Default)]
pub(super) struct Loads {
    threads: HashMap<usize, Busy>,
    queues: HashMap<QueueKey, Taken>,
}

/// A thread's times at the last look, and its average busy share.
#[derive(Clone, Copy, Debug, Default)]
struct Busy {
    busy_ns: u64,
    total_ns: u64,
    share: f64,
}

/// A queue's ring and position at the last look, and the queue's load.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    ring: usize,
    position: u64,
    load: f64,
}

/// A queue's thread and position now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    pub(super) key: QueueKey,
    pub(super) thread: usize,
    /// Address of the ring. A ring that restarts has another address, and its position starts anew.
    pub(super) ring: usize,
    pub(super) position: u64,
}

impl Loads {
    /// Average busy share of a thread, 0 to 1.
    pub(super) fn busy(&self, thread: usize) -> f64 {
        self.threads.get(&thread).map_or(0.0, |busy| busy.share)
    }

    /// Load of a queue in the last second, 0 to 1.
    pub(super) fn queue(&self, key: QueueKey) -> f64 {
        self.queues.get(&key).map_or(0.0, |taken| taken.load)
    }

    /// Records new readings. A thread is (number, busy nanoseconds, total nanoseconds).
    pub(super) fn look(&mut self, threads: &[(usize, u64, u64)], queues: &[Reading]) {
        let known = std::mem::take(&mut self.threads);
        for (number, busy_ns, total_ns) in threads.iter().copied() {
            let before = known.get(&number).copied().unwrap_or_default();
            // A smaller total means that another thread now has this number, and counts from zero.
            let before = if before.total_ns > total_ns {
                Busy::default()
            } else {
                before
            };
            let (busy, total) = (
                busy_ns - before.busy_ns.min(busy_ns),
                total_ns - before.total_ns,
            );
            let now = if total == 0 {
                0.0
            } else {
                busy as f64 / total as f64
            };
            let share = before.share + NEWEST * (now - before.share);
            self.threads.insert(
                number,
                Busy {
                    busy_ns,
                    total_ns,
                    share,
                },
            );
        }
        let known = std::mem::take(&mut self.queues);
        let taken = |reading: &Reading| {
            let before = known
                .get(&reading.key)
                .filter(|before| before.ring == reading.ring);
            before.map_or(0, |before| reading.position.saturating_sub(before.position))
        };
        let mut frames: HashMap<usize, u64> = HashMap::new();
        for reading in queues {
            *frames.entry(reading.thread).or_default() += taken(reading);
        }
        for reading in queues {
            let all = frames.get(&reading.thread).copied().unwrap_or(0).max(1);
            let load = self.busy(reading.thread) * taken(reading) as f64 / all as f64;
            let Reading { ring, position, .. } = *reading;
            self.queues.insert(
                reading.key,
                Taken {
                    ring,
                    position,
                    load,
                },
            );
        }
    }
}

/// Recommends to move a queue to another thread, and says why.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Advice {
    pub(super) key: QueueKey,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) reason: String,
}

/// Decides when a queue moves. It moves as few queues as possible, and none back and forth.
#[derive(Debug, Default)]
pub(super) struct Balance {
    hot: Option<usize>,
    seen: u32,
    rest: u32,
}

impl Balance {
    /// Takes one look, one second after the last one. Returns the move to make now, if any.
    pub(super) fn advise(
        &mut self,
        threads: &[ThreadLoad],
        queues: &[Candidate],
    ) -> Option<Advice> {
        if self.rest > 0 {
            self.rest -= 1;
            return None;
        }
        let advice = best_move(threads, queues);
        let hot = advice.as_ref().map(|advice| advice.from);
        self.seen = if hot.is_some() && hot == self.hot {
            self.seen + 1
        } else {
            1
        };
        self.hot = hot;
        if self.seen < PATIENCE {
            return None;
        }
        (self.hot, self.seen, self.rest) = (None, 0, REST);
        advice
    }
}

/// Returns the move that relieves the busiest thread most, if it reaches `HOT`, `GAP` and `GAIN`.
fn best_move(threads: &[ThreadLoad], queues: &[Candidate]) -> Option<Advice> {
    let busiest = threads.iter().max_by(|a, b| a.busy.total_cmp(&b.busy))?;
    if busiest.busy < HOT {
        return None;
    }
    let mut best: Option<(f64, Advice)> = None;
    for queue in queues.iter().filter(|queue| queue.thread == busiest.number) {
        for other in threads
            .iter()
            .filter(|other| may(&queue.allowed, other.number))
        {
            let gap = busiest.busy - other.busy;
            let after = (busiest.busy - queue.load).max(other.busy + queue.load);
            let gain = busiest.busy - after;
            let better = best.as_ref().is_none_or(|(most, _)| gain > *most);
            if gap >= GAP && gain >= GAIN && better {
                let reason = format!(
                    "poll-{} is {:.0} % busy and poll-{} {:.0} %; the queue is {:.0} % of a thread",
                    busiest.number,
                    100.0 * busiest.busy,
                    other.number,
                    100.0 * other.busy,
                    100.0 * queue.load
                );
                let advice = Advice {
                    key: queue.key,
                    from: busiest.number,
                    to: other.number,
                    reason,
                };
                best = Some((gain, advice));
            }
        }
    }
    best.map(|(_, advice)| advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(number: usize, node: usize, queues: usize, busy: f64) -> ThreadLoad {
        ThreadLoad {
            number,
            node: Some(node),
            queues,
            busy,
        }
    }

    fn key(slot: u16) -> QueueKey {
        let port = PortRef {
            slot,
            generation: 1,
        };
        QueueKey { port, pair: 0 }
    }

    fn queue(slot: u16, thread: usize, load: f64) -> Candidate {
        Candidate {
            key: key(slot),
            thread,
            load,
            allowed: Vec::new(),
        }
    }

    #[test]
    fn a_queue_prefers_its_memorys_node_then_the_thread_with_the_fewest() {
        let threads = [
            thread(0, 0, 0, 0.0),
            thread(1, 1, 5, 0.0),
            thread(2, 1, 3, 0.0),
        ];
        assert_eq!(lightest(&threads, &[], Some(1)), Some(2));
        assert_eq!(lightest(&threads, &[], Some(0)), Some(0));
        // A node without threads, then no node known.
        assert_eq!(lightest(&threads, &[], Some(7)), Some(0));
        assert_eq!(lightest(&threads, &[], None), Some(0));
        // The operator's pinning has priority over the node.
        assert_eq!(lightest(&threads, &[1], Some(0)), Some(1));
        assert_eq!(lightest(&threads, &[9], None), None);
    }

    #[test]
    fn nothing_moves_without_need_or_gain() {
        // Both threads are busy.
        let both = [thread(0, 0, 2, 0.9), thread(1, 0, 1, 0.8)];
        assert_eq!(best_move(&both, &[queue(1, 0, 0.4)]), None);
        // The gap is wide, but neither thread is short of time.
        let idle = [thread(0, 0, 2, 0.6), thread(1, 0, 0, 0.0)];
        assert_eq!(best_move(&idle, &[queue(1, 0, 0.3)]), None);
        // One queue is the whole load. Moving it would only move the load.
        let one = [thread(0, 0, 1, 1.0), thread(1, 0, 0, 0.0)];
        assert_eq!(best_move(&one, &[queue(1, 0, 1.0)]), None);
    }

    #[test]
    fn the_move_that_evens_out_most_is_taken_and_pins_are_respected() {
        let threads = [thread(0, 0, 3, 1.0), thread(1, 0, 0, 0.2)];
        let mut queues = [queue(1, 0, 0.1), queue(2, 0, 0.4), queue(3, 0, 0.5)];
        assert_eq!(best_move(&threads, &queues).unwrap().key, key(2));
        queues[1].allowed = vec![0];
        let advice = best_move(&threads, &queues).unwrap();
        assert_eq!((advice.key, advice.from, advice.to), (key(3), 0, 1));
        assert!(
            advice.reason.contains("poll-0 is 100 % busy"),
            "{}",
            advice.reason
        );
    }

    #[test]
    fn a_move_takes_patience_and_is_followed_by_rest() {
        let threads = [thread(0, 0, 2, 1.0), thread(1, 0, 0, 0.0)];
        let queues = [queue(1, 0, 0.5), queue(2, 0, 0.5)];
        let mut balance = Balance::default();
        let mut moves = Vec::new();
        for second in 0..20 {
            if balance.advise(&threads, &queues).is_some() {
                moves.push(second);
            }
        }
        assert_eq!(moves, [2, 10, 18]);
        // A peak of one or two seconds moves nothing.
        let calm = [thread(0, 0, 2, 0.4), thread(1, 0, 0, 0.0)];
        let mut balance = Balance::default();
        for second in 0..20 {
            let now = if second % 3 == 2 { &calm } else { &threads };
            assert_eq!(balance.advise(now, &queues), None, "{second}");
        }
    }

    #[test]
    fn loads_are_shares_of_what_a_thread_did() {
        let mut loads = Loads::default();
        let reading = |slot, thread, ring, position| Reading {
            key: key(slot),
            thread,
            ring,
            position,
        };
        loads.look(&[(0, 0, 0)], &[reading(1, 0, 7, 100), reading(2, 0, 8, 0)]);
        // The thread is half busy. Three quarters of its frames come from the first queue.
        for n in 1..30 {
            let queues = [reading(1, 0, 7, 100 + 300 * n), reading(2, 0, 8, 100 * n)];
            loads.look(&[(0, 500 * n, 1000 * n)], &queues);
        }
        assert!((loads.busy(0) - 0.5).abs() < 0.01);
        assert!((loads.queue(key(1)) - 0.375).abs() < 0.01);
        assert!((loads.queue(key(2)) - 0.125).abs() < 0.01);
        // A restarted ring starts at zero. So does a thread that got an old number.
        loads.look(&[(0, 10, 20)], &[reading(1, 0, 9, 5)]);
        assert_eq!(loads.queue(key(1)), 0.0);
        assert!((loads.busy(0) - 0.25).abs() < 0.01);
    }
}
