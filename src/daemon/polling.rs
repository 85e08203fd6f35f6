//! What an operator does to poll threads, on the control thread.

use super::command::Reply;
use super::control::Control;
use crate::api::ControlError;
use crate::api::types::{Moved, PollMove, PollSettings, PollSettingsPatch, PollThreadView};

impl Control {
    pub(super) fn add_thread(
        &mut self,
        cpu: Option<usize>,
    ) -> Result<PollThreadView, ControlError> {
        let view = self.registry.add_thread(cpu)?;
        let on = view
            .cpu
            .map_or("unpinned".to_string(), |cpu| format!("on CPU {cpu}"));
        self.report
            .polling(format!("poll-{} was added, {on}", view.thread));
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

    pub(super) fn set_poll(&mut self, patch: PollSettingsPatch) -> PollSettings {
        if let Some(rebalance) = patch.rebalance
            && rebalance != self.rebalance
        {
            self.rebalance = rebalance;
            self.report.polling(format!("rebalancing is {rebalance}"));
        }
        PollSettings {
            rebalance: self.rebalance,
        }
    }
}
