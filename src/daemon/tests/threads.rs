//! Poll threads of the script: they take views over, fall asleep, come and go, and queues change
//! hands between them.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::bounded;

use super::model::Model;
use super::script::{MOST_THREADS, Script, TURNS, kind};
use crate::api::types::Moved;
use crate::daemon::command::Command;
use crate::daemon::link::Sink;
use crate::poll::PollShared;
use crate::sys::snapshot::Reader;
use crate::topology::Topology;
use crate::vhost_user::{DeviceSink, Gone};

impl Script {
    // ---- poll threads ---------------------------------------------------------------------------

    /// A thread takes the newest view over, or sleeps.
    pub(super) fn look(&mut self) {
        let any = self.random.below(self.threads.len() as u64) as usize;
        let sleeps = self.random.chance(4);
        let Some((number, reader)) = self.threads.iter_mut().nth(any) else {
            return;
        };
        if sleeps {
            reader.sleep();
            self.model.held.remove(number);
        } else {
            let generation = reader.borrow().generation();
            assert_eq!(generation, self.model.newest().generation, "{}", self.at);
            self.model.held.insert(*number, generation);
        }
    }

    fn start(&mut self, shared: PollShared) -> Reader<Topology> {
        self.registry.polls.start_scripted(shared)
    }

    pub(super) fn add_thread(&mut self) {
        if self.threads.len() == MOST_THREADS {
            return;
        }
        let reader = self.start(PollShared::new(self.registry.polls.idle).unwrap());
        let lowest = (0..).find(|number| !self.threads.contains_key(number));
        assert_eq!(Some(reader.index()), lowest, "{}", self.at);
        self.model.staying.insert(reader.index());
        self.threads.insert(reader.index(), reader);
    }

    pub(super) fn remove_thread(&mut self) {
        let number = self.random.below(MOST_THREADS as u64 + 1) as usize;
        let (reply, answer) = bounded(1);
        let refused = self.registry.remove_thread(number, reply);
        let refused = refused.map_err(|(error, _)| kind(&error));
        let model = &mut self.model;
        let elsewhere = |port: usize| {
            let mut others = model.staying.iter().filter(|it| **it != number);
            others.any(|thread| model.may(port, *thread))
        };
        let expected = if !model.staying.contains(&number) {
            Err("not found")
        } else if model.staying.len() == 1 || !(0..model.ports.len()).all(elsewhere) {
            Err("conflict")
        } else {
            Ok(())
        };
        assert_eq!(refused, expected, "{}", self.at);
        if refused.is_err() {
            return;
        }
        self.ends.insert(number, answer);
        model.staying.remove(&number);
        model.leaving.insert(number, false);
        for port in 0..model.ports.len() {
            for pair in 0..model.ports[port].owners.len() {
                if model.ports[port].owners[pair].thread() == number {
                    let to = model.lightest(&model.ports[port].pinned, &[]);
                    model.leave(port, Some(pair as u16), to, None);
                }
            }
        }
    }

    /// Threads that were told to end do so.
    pub(super) fn end_threads(&mut self) {
        let told = self.model.leaving.iter().filter(|(_, told)| **told);
        let told: Vec<usize> = told.map(|(number, _)| *number).collect();
        for number in told {
            let mut reader = self.threads.remove(&number).unwrap();
            reader.sleep();
            self.registry.thread_ended(reader);
            self.model.held.remove(&number);
            self.model.leaving.remove(&number);
            let answer = self.ends.remove(&number).unwrap().try_recv();
            assert_eq!(answer.map_err(drop), Ok(Ok(())), "{}", self.at);
        }
    }

    /// Somebody orders queues to a thread.
    pub(super) fn order(&mut self) {
        let name = format!("p{}", self.random.below(10));
        let to = self.random.below(MOST_THREADS as u64 + 1) as usize;
        let pair = self.random.chance(2).then(|| self.random.below(4) as u16);
        let number = self.number();
        let (reply, answer) = bounded(1);
        let refused = self.registry.move_queues(&name, pair, to, Some(reply));
        let refused = refused.map_err(|(error, _)| kind(&error));
        let at = self.model.ports.iter().position(|port| port.name == name);
        let expected = match at {
            _ if !self.model.staying.contains(&to) => Err("not found"),
            None => Err("not found"),
            Some(at) => {
                let pairs = self.model.ports[at].owners.len();
                if pair.is_some_and(|pair| usize::from(pair) >= pairs) {
                    Err("bad argument")
                } else if !self.model.may(at, to) {
                    Err("conflict")
                } else {
                    self.model.leave(at, pair, to, Some(number));
                    Ok(())
                }
            }
        };
        assert_eq!(refused, expected, "{}", self.at);
        if refused.is_ok() {
            self.orders.insert(number, answer);
        }
    }

    // ---- control's turn -------------------------------------------------------------------------

    /// Control takes what was posted, publishes, hands over and retires. Returns whether something
    /// is under way still.
    pub(super) fn turn(&mut self) -> bool {
        while let Ok(command) = self.commands.1.try_recv() {
            let Command::Posted(link) = command else {
                panic!("{}: {command:?}", self.at);
            };
            self.registry.post(&link);
            let mut sessions = self.sessions.iter_mut();
            let (number, session) = sessions
                .find(|(_, session)| std::sync::Arc::ptr_eq(&session.link, &link))
                .unwrap();
            let Some(device) = session.pending.take() else {
                continue;
            };
            let mut ports = self.model.ports.iter_mut();
            match ports.find(|port| port.session == Some(*number)) {
                Some(port) => (port.device, self.model.dirty) = (device, true),
                None => session.gone = true,
            }
        }
        let dirty = self.model.dirty;
        self.registry.publish();
        if dirty {
            self.published();
        }
        let moving = self.finish_moves();
        self.retire() || moving
    }

    fn finish_moves(&mut self) -> bool {
        let moving = self.registry.finish_moves();
        let answers = self.model.arrive();
        if !answers.is_empty() {
            self.published();
        }
        for (order, moved) in answers {
            let Some(order) = order else { continue };
            let answer = self.orders.remove(&order).unwrap().try_recv().unwrap();
            let answer = answer.map_err(|error| kind(&error));
            let expected = moved.map(|queues| Moved { queues }).ok_or("gone");
            assert_eq!(answer, expected, "{}", self.at);
        }
        for order in self.orders.values() {
            assert!(order.is_empty(), "{}: answered too early", self.at);
        }
        self.tell_leaving();
        let expected = !self.model.moves.is_empty() || !self.model.leaving.is_empty();
        assert_eq!(moving, expected, "{}", self.at);
        moving
    }

    /// A thread ends when nothing moves any more and it has nothing.
    fn tell_leaving(&mut self) {
        let Model {
            leaving,
            ports,
            moves,
            ..
        } = &mut self.model;
        for (number, told) in leaving {
            let mut owners = ports.iter().flat_map(|port| &port.owners);
            *told |= moves.is_empty() && !owners.any(|owner| owner.thread() == *number);
            let shared = &self.registry.polls.threads[number].shared;
            assert_eq!(shared.stop.load(Ordering::Relaxed), *told, "{}", self.at);
        }
    }

    /// What nobody can reach goes to the reaper, and nothing else; what it refers to goes there and
    /// not before.
    fn retire(&mut self) -> bool {
        let waiting = self.registry.retire();
        let retired: Vec<_> = self.reaper.try_iter().collect();
        self.check_devices();
        let oldest = self.model.held.values().copied().min();
        let newest = self.model.newest().generation;
        let is_held = |generation: u64| oldest.is_some_and(|oldest| generation >= oldest);
        let before = self.model.views.len();
        let views = &mut self.model.views;
        views.retain(|(view, _)| view.generation == newest || is_held(view.generation));
        assert_eq!(retired.len(), before - views.len(), "{}", self.at);
        assert!(waiting || views.len() == 1, "{}", self.at);
        drop(retired);
        self.check_devices();
        waiting
    }

    /// Every thread takes over what is published, until nothing is under way: then all that was
    /// asked for is done.
    pub(super) fn settle(&mut self) {
        for _ in 0..TURNS {
            for (number, reader) in &mut self.threads {
                let generation = reader.borrow().generation();
                self.model.held.insert(*number, generation);
            }
            self.turn();
            self.end_threads();
            self.check();
        }
        assert!(!self.turn(), "{}: something is not done", self.at);
        assert!(self.orders.is_empty() && self.ends.is_empty());
        for session in self.sessions.values() {
            let (tell, told) = bounded(1);
            let Some(ticket) = session.ticket else {
                continue;
            };
            let sink = Sink(session.link.clone());
            std::thread::spawn(move || tell.send(sink.settle(ticket)));
            let settled = told.recv_timeout(Duration::from_secs(20));
            let settled = settled.unwrap_or_else(|_| panic!("{}: a session waits", self.at));
            let expected = if session.gone { Err(Gone) } else { Ok(()) };
            assert_eq!(settled, expected, "{}", self.at);
        }
        // Of those that are gone some go on, as sessions do that have not heard of it.
        let current = self.model.ports.iter().filter_map(|port| port.session);
        let current: Vec<usize> = current.collect();
        let keep_all = self.random.chance(2);
        self.sessions
            .retain(|number, _| keep_all || current.contains(number));
    }

    /// All ports go in one view, and then there is nothing left.
    pub(super) fn end(mut self) {
        let records = self.registry.unregister_all();
        assert_eq!(records.len(), self.model.ports.len(), "{}", self.at);
        drop(records);
        for port in self.model.ports.drain(..) {
            let session = port.session.and_then(|it| self.sessions.get_mut(&it));
            if let Some(session) = session {
                (session.gone, session.pending) = (true, None);
            }
        }
        self.published();
        self.settle();
        assert!(
            self.model.devices.is_empty(),
            "{}: devices are left",
            self.at
        );
    }
}
