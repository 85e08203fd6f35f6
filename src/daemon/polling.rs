//! Operations on poll threads, on the control thread.

use super::command::Reply;
use super::control::Control;
use super::placement::no_thread;
use crate::api::ControlError;
use crate::api::types::{
    Moved, PollAdd, PollMove, PollSettings, PollSettingsPatch, PollThreadView,
};
use crate::config::{IdlePolicy, Rebalance};

impl Control {
    /// Once a second: measures loads, and makes the recommended move if rebalancing is on.
    pub(super) fn rebalance(&mut self) {
        self.registry.look_at_loads();
        if self.rebalance == Rebalance::Off {
            return;
        }
        let (threads, queues) = (self.registry.thread_loads(), self.registry.candidates());
        let Some(advice) = self.balance.advise(&threads, &queues) else {
            return;
        };
        let mut ports = self.registry.ports.iter();
        let port = ports.find(|record| record.shared.reference == advice.key.port);
        let Some(port) = port.map(|record| record.shared.clone()) else {
            return;
        };
        let pair = advice.key.pair;
        if self
            .registry
            .move_queues(port.name(), Some(pair), advice.to, None)
            .is_ok()
        {
            self.report
                .moved(&port, Some(pair), advice.to, &advice.reason);
        }
    }

    pub(super) fn add_thread(&mut self, order: PollAdd) -> Result<PollThreadView, ControlError> {
        let view = self.registry.add_thread(order)?;
        let on = view
            .cpu
            .map_or("unpinned".to_string(), |cpu| format!("on CPU {cpu}"));
        self.report.polling(format!(
            "poll-{} was added, {on}, {}",
            view.thread, view.idle
        ));
        Ok(view)
    }

    pub(super) fn remove_thread(&mut self, number: usize, reply: Reply<()>) {
        match self.registry.remove_thread(number, reply) {
            Ok(()) => {
                let text = format!("poll-{number} gives its queues to other threads and ends");
                self.report.polling(text);
            }
            Err((error, reply)) => drop(reply.send(Err(error))),
        }
    }

    pub(super) fn move_queues(&mut self, order: &PollMove, reply: Reply<Moved>) {
        let to = order.thread as usize;
        match self
            .registry
            .move_queues(&order.port, order.queue, to, Some(reply))
        {
            Ok(()) => {
                if let Some(record) = self.registry.find(&order.port) {
                    record.placed_by_hand = true;
                    let port = record.shared.clone();
                    self.report
                        .moved(&port, order.queue, to, "as the operator asks");
                }
            }
            Err((error, reply)) => {
                if let Some(reply) = reply {
                    let _ = reply.send(Err(error));
                }
            }
        }
    }

    pub(super) fn set_poll(
        &mut self,
        patch: PollSettingsPatch,
    ) -> Result<PollSettings, ControlError> {
        if let (Some(number), None) = (patch.thread, patch.idle) {
            // Only the idle policy can be set for one thread. Other settings must not apply to all
            // by mistake.
            let text =
                format!("thread {number} is named without idle, the policy that it is to have");
            return Err(ControlError::BadArgument(text));
        }
        if let Some(idle) = patch.idle {
            self.set_idle(patch.thread, idle)?;
        }
        if let Some(rebalance) = patch.rebalance
            && rebalance != self.rebalance
        {
            self.rebalance = rebalance;
            self.report.polling(format!("rebalancing is {rebalance}"));
        }
        let polls = &self.registry.polls;
        let named = patch
            .thread
            .and_then(|number| polls.threads.get(&(number as usize)));
        Ok(PollSettings {
            rebalance: self.rebalance,
            thread: patch.thread,
            idle: named.map_or(polls.idle, |thread| thread.shared.idle()),
        })
    }

    /// Sets the idle policy of one thread, or of all existing and future threads.
    fn set_idle(&mut self, thread: Option<u32>, idle: IdlePolicy) -> Result<(), ControlError> {
        let polls = &mut self.registry.polls;
        let Some(number) = thread else {
            polls.idle = idle;
            let usual = |thread: &&super::pollers::PollThread| !thread.shared.is_slow();
            let threads = polls.threads.values().filter(usual);
            threads.for_each(|thread| thread.shared.set_idle(idle));
            self.report
                .polling(format!("poll threads without work: {idle}"));
            return Ok(());
        };
        let found = polls.threads.get(&(number as usize));
        let Some(thread) = found.filter(|thread| !thread.leaving) else {
            return Err(no_thread(number as usize));
        };
        thread.shared.set_idle(idle);
        self.report
            .polling(format!("poll-{number} without work: {idle}"));
        Ok(())
    }
}
