//! Which poll thread owns which transmit queue, and how a queue changes hands.
//!
//! A queue moves in two publications. In the first view nobody owns the queue. When every poll
//! thread has acknowledged that view, the second one is published, in which the new thread owns the
//! queue. This needs no lock and no message between poll threads. The acknowledgement that frees
//! memory also proves that nobody owns the queue.
//!
//! - A queue never has two owners.
//! - What the old owner took is delivered before the new owner takes more, so a flow keeps its
//!   order.
//! - Nothing is lost: for the time between, frames wait in the guest's ring. A kick that comes
//!   meanwhile stays in its eventfd, and wakes the new thread when the eventfd is added to the
//!   thread's epoll.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::DaemonError;
use super::balance::{Candidate, QueueKey, Reading, ThreadLoad, lightest, may};
use super::command::Reply;
use super::handover::{HandOver, Place};
use super::port::PortRecord;
use super::registry::Registry;
use super::views;
use crate::api::types::{Moved, PollAdd, PollThreadView};
use crate::api::{ControlError, What};
use crate::port::PortShared;

/// Control looks for acknowledgements for this long before it continues with other work. Busy poll
/// threads usually acknowledge within this time. The next look of the control loop comes only after
/// `RETIRE`, ten times as long. If some are still missing, the next turn looks again.
const HASTE: Duration = Duration::from_micros(100);

/// Queues on their way to a thread.
#[derive(Debug)]
struct Move {
    port: Arc<PortShared>,
    pairs: Vec<u16>,
    /// Whether the thread of slow ports may be among the old owners.
    leaves_slow: bool,
    step: HandOver,
    reply: Option<Reply<Moved>>,
}

/// The moves and thread removals that are not complete.
#[derive(Debug, Default)]
pub(super) struct Moves {
    moves: Vec<Move>,
    /// Threads that end once their queues have moved. `true`: the thread was told to end.
    leaving: Vec<(usize, bool, Option<Reply<()>>)>,
}

impl Moves {
    /// Notes that the view just published, `generation`, is the one that waiting moves must see
    /// acknowledged.
    pub(super) fn published(&mut self, generation: u64) {
        for under_way in &mut self.moves {
            under_way.step.published(generation);
        }
    }

    pub(super) fn are_under_way(&self) -> bool {
        !self.moves.is_empty() || !self.leaving.is_empty()
    }
}

pub(super) fn no_thread(thread: usize) -> ControlError {
    ControlError::NotFound {
        what: What::PollThread(u32::try_from(thread).unwrap_or(u32::MAX)),
    }
}

impl Registry {
    /// Chooses a poll thread for each of `pairs` queue pairs, among `allowed` (empty: any), on
    /// `node` where possible. It takes the thread with the fewest queues each time, so neighbouring
    /// pairs go to different threads.
    pub(super) fn place(&self, allowed: &[u32], node: Option<usize>, pairs: u16) -> Vec<Place> {
        let mut threads = self.thread_loads();
        let mut places = Vec::with_capacity(usize::from(pairs));
        for _ in 0..pairs {
            let Some(best) = lightest(&threads, allowed, node) else {
                break;
            };
            places.push(Place::On(best));
            if let Some(thread) = threads.iter_mut().find(|thread| thread.number == best) {
                thread.queues += 1;
            }
        }
        places
    }

    /// Returns the load of each thread that stays.
    pub(super) fn thread_loads(&self) -> Vec<ThreadLoad> {
        let mut queues = [0; super::registry::MAX_THREADS];
        for place in self.ports.iter().flat_map(|port| &port.placement) {
            queues[place.thread()] += 1;
        }
        let load = |number: usize| ThreadLoad {
            number,
            node: self.node_of(number),
            queues: queues[number],
            busy: self.loads.busy(number),
        };
        self.polls.staying().map(load).collect()
    }

    /// Returns every running queue, with its load and the threads that its port is pinned to.
    pub(super) fn candidates(&self) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        for port in &self.ports {
            for (pair, _) in port.transmit_queues() {
                let Some(Place::On(thread)) = port.placement.get(usize::from(pair)) else {
                    continue;
                };
                let key = QueueKey {
                    port: port.shared.reference,
                    pair,
                };
                candidates.push(Candidate {
                    key,
                    thread: *thread,
                    load: self.loads.queue(key),
                    allowed: port.shared.spec.poll.clone(),
                });
            }
        }
        candidates
    }

    /// Once a second: measures the loads of threads and queues.
    pub(super) fn look_at_loads(&mut self) {
        let threads = self.polls.threads.iter().map(|(number, thread)| {
            let stats = &thread.shared.stats;
            (*number, stats.busy_ns.get(), stats.total_ns.get())
        });
        let threads: Vec<_> = threads.collect();
        let mut queues = Vec::new();
        for port in &self.ports {
            for (pair, transmit) in port.transmit_queues() {
                let owner = port
                    .placement
                    .get(usize::from(pair))
                    .and_then(|at| at.owner());
                queues.extend(owner.map(|thread| Reading {
                    key: QueueKey {
                        port: port.shared.reference,
                        pair,
                    },
                    thread,
                    ring: Arc::as_ptr(&transmit.queue).addr(),
                    position: transmit.queue.position(),
                }));
            }
        }
        self.loads.look(&threads, &queues);
    }

    fn node_of(&self, number: usize) -> Option<usize> {
        self.polls.threads.get(&number)?.node
    }

    /// Places a port's queues on threads of the node of the guest's memory, before the queues run.
    /// Nobody owns the queues yet, so no hand-over is needed. A placement by the operator stays.
    pub(super) fn place_near(&mut self, port: &Arc<PortShared>, node: Option<usize>) {
        let there = |number: usize| node.is_some() && self.node_of(number) == node;
        let Some(at) = self
            .ports
            .iter()
            .position(|it| Arc::ptr_eq(&it.shared, port))
        else {
            return;
        };
        let record = &self.ports[at];
        let settled = record.placement.iter().all(|place| match place {
            Place::On(thread) => there(*thread),
            Place::Between { .. } => true,
        });
        if record.placed_by_hand
            || record.slow.is_some()
            || settled
            || !self.polls.staying().any(there)
        {
            return;
        }
        // The port's own queues must not count as load of others.
        let pairs = std::mem::take(&mut self.ports[at].placement).len();
        let pairs = u16::try_from(pairs).unwrap_or(u16::MAX);
        self.ports[at].placement = self.place(&port.spec.poll, node, pairs);
    }

    /// Returns why an operator cannot give queues to a thread or remove it. `None` if that is
    /// possible.
    fn not_among_all(&self, number: usize) -> Option<ControlError> {
        if self.polls.staying().any(|thread| thread == number) {
            return None;
        }
        if self.slow.thread != Some(number) {
            return Some(no_thread(number));
        }
        let text = format!(
            "poll thread {number} is poll-slow: it serves ports whose guests' memory is slow to touch, and no others"
        );
        Some(ControlError::Conflict { text })
    }

    /// Moves one queue pair of a port, or all, to a thread. `reply` is answered when the thread
    /// owns the queues.
    pub(super) fn move_queues(
        &mut self,
        name: &str,
        pair: Option<u16>,
        to: usize,
        reply: Option<Reply<Moved>>,
    ) -> Result<(), (ControlError, Option<Reply<Moved>>)> {
        if let Some(error) = self.not_among_all(to) {
            return Err((error, reply));
        }
        let Some(record) = self.find(name) else {
            return Err((ControlError::no_port(name), reply));
        };
        let port = record.shared.clone();
        let error = if record.slow.is_some() {
            let text = format!(
                "port {name:?} is served by poll-slow as long as its guest's memory is slow to touch"
            );
            Some(ControlError::Conflict { text })
        } else if pair.is_some_and(|pair| usize::from(pair) >= record.placement.len()) {
            let pairs = record.placement.len();
            Some(ControlError::BadArgument(format!(
                "port {name:?} has queue pairs 0 to {}",
                pairs.saturating_sub(1)
            )))
        } else if !may(&record.shared.spec.poll, to) {
            let pinned = crate::config::thread_list(&record.shared.spec.poll);
            Some(ControlError::Conflict {
                text: format!("port {name:?} is pinned to poll threads {pinned} (poll={pinned})"),
            })
        } else {
            None
        };
        if let Some(error) = error {
            return Err((error, reply));
        }
        self.send_queues(
            &port,
            |number| pair.is_none_or(|pair| pair == number),
            to,
            reply,
        );
        Ok(())
    }

    /// Sends the queue pairs of a port for which `wanted` is true to a thread. `reply` is answered
    /// when the thread owns the queues.
    pub(super) fn send_queues(
        &mut self,
        port: &Arc<PortShared>,
        wanted: impl Fn(u16) -> bool,
        to: usize,
        reply: Option<Reply<Moved>>,
    ) {
        let mut pairs = Vec::new();
        let slow = self.slow.thread;
        let on_the_way = self.pairs_that_leave_slow(port);
        let mut leaves_slow = false;
        if let Some(record) = self.find_registration(port) {
            for (number, place) in (0_u16..).zip(&mut record.placement) {
                let from = place.thread();
                if wanted(number) && place.leave_for(to) {
                    leaves_slow |= Some(from) == slow || on_the_way.contains(&number);
                    pairs.push(number);
                }
            }
        }
        self.touch();
        self.moves.moves.push(Move {
            port: port.clone(),
            pairs,
            leaves_slow,
            step: HandOver::new(to),
            reply,
        });
    }

    /// A port's queue pairs that are on their way from the thread of slow ports, which may own them
    /// still. A pair that is sent elsewhere meanwhile waits for that thread as well.
    fn pairs_that_leave_slow(&self, port: &Arc<PortShared>) -> Vec<u16> {
        let moves = self.moves.moves.iter();
        let leave = moves.filter(|it| it.leaves_slow && Arc::ptr_eq(&it.port, port));
        leave.flat_map(|it| it.pairs.iter().copied()).collect()
    }

    /// Starts a poll thread on a CPU, or unpinned.
    pub(super) fn add_thread(&mut self, order: PollAdd) -> Result<PollThreadView, ControlError> {
        let cpu = order.cpu.map(|cpu| cpu as usize);
        let taken = |(number, thread): (&usize, &super::pollers::PollThread)| {
            (cpu.is_some() && thread.cpu == cpu).then_some(*number)
        };
        if let (Some(cpu), Some(other)) = (cpu, self.polls.threads.iter().find_map(taken)) {
            let text = format!("CPU {cpu} has a poll thread already, number {other}");
            return Err(ControlError::Conflict { text });
        }
        self.prefault_feeds();
        let number = self
            .polls
            .start(cpu, order.idle)
            .map_err(|error| match error {
                DaemonError::Pin(error) => ControlError::BadArgument(error.to_string()),
                DaemonError::TooManyThreads(_) => ControlError::Conflict {
                    text: format!(
                        "{} poll threads are the most there can be",
                        super::registry::MAX_THREADS
                    ),
                },
                error => ControlError::Internal(error.to_string()),
            })?;
        self.polls.keep_others_off();
        Ok(views::poll_thread(self, number))
    }

    /// Gives a thread's queues to other threads and ends the thread. `reply` is answered when it
    /// has ended.
    pub(super) fn remove_thread(
        &mut self,
        number: usize,
        reply: Reply<()>,
    ) -> Result<(), (ControlError, Reply<()>)> {
        if let Some(error) = self.not_among_all(number) {
            return Err((error, reply));
        }
        if self.polls.staying().count() == 1 {
            let text = format!("poll thread {number} is the last one; somebody must poll");
            return Err((ControlError::Conflict { text }, reply));
        }
        let stuck = self.ports.iter().find(|port| {
            let elsewhere = |at: usize| at != number && may(&port.shared.spec.poll, at);
            !self.polls.staying().any(elsewhere)
        });
        if let Some(port) = stuck {
            let name = port.shared.name();
            let text = format!("port {name:?} is pinned to poll thread {number} alone");
            return Err((ControlError::Conflict { text }, reply));
        }
        if let Some(thread) = self.polls.threads.get_mut(&number) {
            thread.leaving = true;
        }
        self.empty_thread(number);
        self.moves.leaving.push((number, false, Some(reply)));
        Ok(())
    }

    fn empty_thread(&mut self, number: usize) {
        let on_it = |port: &PortRecord| {
            let places = port.placement.iter().zip(0_u16..);
            let there = places.filter(|(place, _)| place.thread() == number);
            let port = port.shared.clone();
            there
                .map(|(_, pair)| (port.clone(), pair))
                .collect::<Vec<_>>()
        };
        let queues: Vec<(Arc<PortShared>, u16)> = self.ports.iter().flat_map(on_it).collect();
        let mut threads = self.thread_loads();
        for (port, pair) in queues {
            if let Some(to) = lightest(&threads, &port.spec.poll, None) {
                // Also sends a slow port on its way back, whose queues an operator may not move.
                self.send_queues(&port, |other| other == pair, to, None);
                let thread = threads.iter_mut().find(|thread| thread.number == to);
                thread.into_iter().for_each(|thread| thread.queues += 1);
            }
        }
    }

    /// Completes the moves whose old owners are known to have let go, and ends threads without
    /// queues. Returns whether a move or a removal is still under way.
    pub(super) fn finish_moves(&mut self) -> bool {
        if !self.moves.are_under_way() {
            return false;
        }
        self.await_moves();
        let (done, waiting) = std::mem::take(&mut self.moves.moves)
            .into_iter()
            .partition(|under_way| self.is_free(under_way));
        self.moves.moves = waiting;
        for free in done {
            self.finish(free);
        }
        self.publish();
        self.end_leaving();
        self.moves.are_under_way()
    }

    /// Whether the old owners have let go. The thread of slow ports may stay in a page fault for as
    /// long as a guest likes. So its acknowledgement is needed only if it may be an old owner.
    fn is_free(&self, under_way: &Move) -> bool {
        let slow = self.slow.thread.filter(|_| !under_way.leaves_slow);
        let reached = |generation| {
            let mut others = (0..super::registry::MAX_THREADS).filter(|it| Some(*it) != slow);
            others.all(|thread| {
                let at = self.acknowledgements.of(thread);
                at.is_none_or(|at| at >= generation)
            })
        };
        under_way.step.is_free(reached)
    }

    /// Looks for the acknowledgements that moves wait for, at most for `HASTE`.
    fn await_moves(&self) {
        let until = Instant::now() + HASTE;
        while !self
            .moves
            .moves
            .iter()
            .all(|under_way| self.is_free(under_way))
            && Instant::now() < until
        {
            std::hint::spin_loop();
        }
    }

    fn finish(&mut self, free: Move) {
        let Move {
            port,
            pairs,
            step,
            reply,
            ..
        } = free;
        let answer = match self.find_registration(&port) {
            // The port's queues were removed with the port.
            None => Err(ControlError::Gone {
                what: What::Port(port.name().to_string()),
            }),
            Some(record) => {
                let mut moved = 0;
                for pair in pairs {
                    if let Some(place) = record.placement.get_mut(usize::from(pair)) {
                        moved += u32::from(step.arrive(place));
                    }
                }
                Ok(Moved { queues: moved })
            }
        };
        self.touch();
        if let Some(reply) = reply {
            let _ = reply.send(answer);
        }
    }

    fn end_leaving(&mut self) {
        let mut leaving = std::mem::take(&mut self.moves.leaving);
        for (number, told, _) in &mut leaving {
            let mut places = self.ports.iter().flat_map(|port| &port.placement);
            // No move is under way, so the view without this thread's queues is acknowledged.
            if !*told && self.moves.moves.is_empty() && !places.any(|at| at.thread() == *number) {
                self.polls.end(*number);
                *told = true;
            }
        }
        self.moves.leaving = leaving;
    }

    /// Handles the end of a poll thread.
    pub(super) fn thread_ended(
        &mut self,
        reader: crate::sys::snapshot::Reader<crate::topology::Topology>,
    ) {
        let number = reader.index();
        self.polls.ended(reader);
        self.polls.keep_others_off();
        let leaving = std::mem::take(&mut self.moves.leaving);
        for (thread, told, reply) in leaving {
            if thread != number {
                self.moves.leaving.push((thread, told, reply));
            } else if let Some(reply) = reply {
                let _ = reply.send(Ok(()));
            }
        }
    }
}
