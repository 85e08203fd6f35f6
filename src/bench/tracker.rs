//! Books what a guest has received: the sequence of each flow, and every error.

use std::collections::HashSet;
use std::sync::atomic::Ordering;

use arrayvec::ArrayVec;

use super::frame::Seen;
use super::plan::{FlowCounters, FlowSpec};

/// Sequence numbers remembered as missing, to tell a late frame from a duplicate.
const MAX_MISSING: usize = 1 << 16;
/// Flows in one burst whose counters are stored at its end; more are stored at once.
const MAX_TOUCHED: usize = 64;

/// Counted outcomes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Different intact frames.
    pub received: u64,
    /// Frames of ours with changed or missing bytes.
    pub corrupt: u64,
    /// Frames that came after a later one of their flow.
    pub out_of_order: u64,
    /// Frames that came twice.
    pub duplicated: u64,
    /// Frames for somebody else, and of others.
    pub foreign: u64,
    /// Longest time without a frame, in nanoseconds.
    pub longest_gap_ns: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct FlowState {
    expected: u64,
    received: u64,
    mine: bool,
    touched: bool,
}

/// Frames of one flow that came one after the other, and are not booked yet.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    flow: u32,
    first: u64,
    next: u64,
}

impl Default for Run {
    /// Of no flow.
    fn default() -> Self {
        Run {
            flow: u32::MAX,
            first: 0,
            next: 0,
        }
    }
}

/// One guest's book of what came.
#[derive(Debug)]
pub struct Tracker<'s> {
    counters: &'s [FlowCounters],
    flows: Vec<FlowState>,
    touched: ArrayVec<u16, MAX_TOUCHED>,
    missing: HashSet<(u16, u64)>,
    last_arrival_ns: Option<u64>,
    /// What was counted.
    pub counts: Counts,
}

impl<'s> Tracker<'s> {
    /// Makes the book of guest `guest`.
    pub fn new(guest: usize, flows: &[FlowSpec], counters: &'s [FlowCounters]) -> Self {
        let flows = flows.iter().map(|flow| FlowState {
            mine: flow.destination == guest,
            ..Default::default()
        });
        Tracker {
            counters,
            flows: flows.collect(),
            touched: ArrayVec::new(),
            missing: HashSet::new(),
            last_arrival_ns: None,
            counts: Counts::default(),
        }
    }

    /// Books one frame. What `run` has gathered is in the book once it has ended.
    #[inline(always)]
    pub fn book(&mut self, run: &mut Run, seen: Seen) {
        match seen {
            // Most frames: the next one of the flow that the last one was of.
            Seen::Frame { flow, sequence }
                if run.flow == u32::from(flow) && run.next == sequence =>
            {
                run.next += 1;
            }
            seen => self.book_other(run, seen),
        }
    }

    #[inline(never)]
    fn book_other(&mut self, run: &mut Run, seen: Seen) {
        self.end_run(run);
        let Seen::Frame { flow, sequence } = seen else {
            return self.book_oddity(seen);
        };
        self.book_carefully(flow, sequence);
        if let Some(state) = self.flows.get(usize::from(flow)).filter(|s| s.touched) {
            *run = Run {
                flow: u32::from(flow),
                first: state.expected,
                next: state.expected,
            };
        }
    }

    /// Books a run, and begins another one.
    #[inline(always)]
    pub fn end_run(&mut self, run: &mut Run) {
        let Run { flow, first, next } = std::mem::take(run);
        if let Some(state) = self.flows.get_mut(flow as usize) {
            state.expected = next;
            state.received += next - first;
            self.counts.received += next - first;
        }
    }

    #[cold]
    fn book_oddity(&mut self, seen: Seen) {
        match seen {
            Seen::Corrupt => self.counts.corrupt += 1,
            Seen::Foreign => self.counts.foreign += 1,
            Seen::Announcement | Seen::Frame { .. } => {}
        }
    }

    fn book_carefully(&mut self, flow: u16, sequence: u64) {
        let Some(state) = self.flows.get_mut(usize::from(flow)).filter(|s| s.mine) else {
            self.counts.foreign += 1;
            return;
        };
        if sequence == state.expected {
            state.expected += 1;
        } else if !self.unexpected(flow, sequence) {
            return;
        }
        self.counts.received += 1;
        let state = &mut self.flows[usize::from(flow)];
        state.received += 1;
        if !state.touched {
            state.touched = true;
            if self.touched.try_push(flow).is_err() {
                self.settle();
                self.touched.push(flow);
                self.flows[usize::from(flow)].touched = true;
            }
        }
    }

    /// Books a frame that is not the next one of its flow. Returns whether the frame counts as
    /// received.
    #[cold]
    fn unexpected(&mut self, flow: u16, sequence: u64) -> bool {
        let expected = self.flows[usize::from(flow)].expected;
        if sequence > expected {
            let room = MAX_MISSING.saturating_sub(self.missing.len()) as u64;
            let gap = expected..sequence.min(expected.saturating_add(room));
            self.missing.extend(gap.map(|missing| (flow, missing)));
            self.flows[usize::from(flow)].expected = sequence + 1;
            return true;
        }
        if self.missing.remove(&(flow, sequence)) {
            self.counts.out_of_order += 1;
            return true;
        }
        self.counts.duplicated += 1;
        false
    }

    /// Shows the senders what came. Call it once the buffers are back in the ring: this is what
    /// makes room in their windows.
    #[inline(always)]
    pub fn settle(&mut self) {
        for flow in self.touched.drain(..) {
            let state = &mut self.flows[usize::from(flow)];
            state.touched = false;
            // Only a count: nothing else is read on the strength of it.
            self.counters[usize::from(flow)]
                .received
                .store(state.received, Ordering::Relaxed);
        }
    }

    /// Notes that something arrived now.
    #[inline(always)]
    pub fn arrived(&mut self, now_ns: u64) {
        if let Some(last) = self.last_arrival_ns {
            let gap = now_ns.saturating_sub(last);
            self.counts.longest_gap_ns = self.counts.longest_gap_ns.max(gap);
        }
        self.last_arrival_ns = Some(now_ns);
    }

    /// Starts to measure gaps.
    pub fn begin(&mut self, now_ns: u64) {
        self.last_arrival_ns = Some(now_ns);
        self.counts.longest_gap_ns = 0;
    }

    /// Stops to measure gaps; the one that is open counts where this guest receives at all.
    pub fn end(&mut self, now_ns: u64) {
        if self.flows.iter().any(|flow| flow.mine) {
            self.arrived(now_ns);
        }
        self.last_arrival_ns = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book(tracker: &mut Tracker<'_>, seen: Seen) {
        let mut run = Run::default();
        tracker.book(&mut run, seen);
        tracker.end_run(&mut run);
    }

    fn counts(sequences: &[u64]) -> Counts {
        let flow = FlowSpec {
            source: 0,
            queue: 0,
            destination: 1,
        };
        let counters = [FlowCounters::default()];
        let mut tracker = Tracker::new(1, &[flow], &counters);
        for &sequence in sequences {
            book(&mut tracker, Seen::Frame { flow: 0, sequence });
        }
        tracker.settle();
        let shown = counters[0].received.load(Ordering::Relaxed);
        assert_eq!(shown, tracker.counts.received);
        tracker.counts
    }

    #[test]
    fn late_frames_are_told_from_duplicates() {
        let seen = counts(&[0, 1, 4, 2, 2, 5, 3, 0]);
        assert_eq!((seen.received, seen.out_of_order), (6, 2));
        assert_eq!(seen.duplicated, 2);
    }

    #[test]
    fn a_huge_jump_costs_bounded_memory() {
        let seen = counts(&[u64::MAX - 1, 5, 5]);
        assert_eq!((seen.received, seen.out_of_order), (2, 1));
        assert_eq!(seen.duplicated, 1);
    }

    #[test]
    fn frames_for_others_are_foreign() {
        let flow = FlowSpec {
            source: 0,
            queue: 0,
            destination: 1,
        };
        let counters = [FlowCounters::default()];
        let mut tracker = Tracker::new(0, &[flow], &counters);
        book(
            &mut tracker,
            Seen::Frame {
                flow: 0,
                sequence: 0,
            },
        );
        book(
            &mut tracker,
            Seen::Frame {
                flow: 7,
                sequence: 0,
            },
        );
        book(&mut tracker, Seen::Corrupt);
        assert_eq!((tracker.counts.foreign, tracker.counts.corrupt), (2, 1));
    }
}
