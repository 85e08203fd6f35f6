//! What a switch takes before any frame: memory, alone and with ports; and the time until the first
//! frame is through.

use std::time::Instant;

use pollux::bench::frame::{Checker, MacPrefix};
use pollux::bench::frontend::Frontend;
use pollux::bench::guest::Guest;
use pollux::bench::plan::{FlowCounters, Plan};
use pollux::bench::run::{Attachment, RunError};
use serde_json::{Value, json};

use crate::attached::connect;
use crate::scale::Switch;
use crate::{Effort, median, plan};

/// Entries of the guests' rings: what costs memory of the switch grows with them.
const RING: u16 = 1024;
/// Starts of which the median is taken.
const STARTS: usize = 21;

/// What guests borrow from.
struct Party {
    plan: Plan,
    checker: Checker,
    counters: Vec<FlowCounters>,
    attachments: Vec<Attachment>,
}

impl Party {
    fn new(guests: usize) -> Result<Party, RunError> {
        let plan = Plan {
            ring_size: RING,
            ..plan(guests, 64)
        };
        let attachments = (0..guests).map(|_| Attachment::new(&plan, 0));
        let macs = MacPrefix::random().map_err(RunError::Memory)?;
        Ok(Party {
            attachments: attachments
                .collect::<Result<_, _>>()
                .map_err(RunError::Memory)?,
            checker: Checker::new(plan.size, macs),
            counters: Vec::new(),
            plan,
        })
    }

    /// Guests and their connections, attached from the last port to the first.
    fn attach(&self, switch: &Switch) -> Result<Vec<(Guest<'_>, Frontend)>, RunError> {
        let each = self.attachments.iter().enumerate().rev();
        each.map(|(n, attachment)| {
            let guest = attachment.guest(n, &self.plan, &[], &self.counters, &self.checker);
            let guest = guest.map_err(RunError::Memory)?;
            let frontend = connect(attachment, &self.plan, n, &switch.socket(n))?;
            guest.kick_all();
            Ok((guest, frontend))
        })
        .collect()
    }
}

/// Resident bytes that are not the guests' memory, in KiB.
fn own_kib(switch: &Switch) -> u64 {
    switch.status("VmRSS") - switch.status("RssShmem")
}

/// KiB without ports; with `ports` ports, of a port without and with a guest that has sent and
/// received.
fn memory(ports: usize, effort: &Effort) -> Result<Value, RunError> {
    let (alone, _) = Switch::start(0, "adaptive", effort);
    let (bare, resident) = (own_kib(&alone), alone.status("VmRSS"));
    drop(alone);
    let (switch, _) = Switch::start(ports, "adaptive", effort);
    let waiting = own_kib(&switch);
    let party = Party::new(ports)?;
    let mut guests = party.attach(&switch)?;
    for at in 0..ports {
        announce(&mut guests, at, &party.checker);
    }
    let running = own_kib(&switch);
    let each = |kib: u64| kib.saturating_sub(bare) as f64 / ports as f64;
    Ok(json!({
        "ports": ports,
        "ring_size": RING,
        "without_ports_kib": resident,
        "port_kib": each(waiting),
        "port_with_guest_kib": each(running),
    }))
}

/// Guest `at` of the list broadcasts until somebody has got it.
fn announce(guests: &mut [(Guest<'_>, Frontend)], at: usize, checker: &Checker) {
    loop {
        let guest = &mut guests[at].0;
        let index = guest.index;
        guest.transmit[0].announce(checker, index);
        while !guest.transmit[0].announced(checker, &[]) {
            std::thread::yield_now();
        }
        // Delivered before it was returned.
        let came = guests
            .iter_mut()
            .map(|(guest, _)| guest.receive(checker, 0));
        if came.sum::<usize>() > 0 {
            return;
        }
    }
}

/// Seconds from starting the program until a frame of one guest has reached another one, and of
/// these until `ready`.
fn start(effort: &Effort) -> Result<(f64, f64), RunError> {
    let party = Party::new(2)?;
    let began = Instant::now();
    let (switch, ready) = Switch::start(2, "adaptive", effort);
    let mut guests = party.attach(&switch)?;
    announce(&mut guests, 1, &party.checker);
    Ok((began.elapsed().as_secs_f64(), ready))
}

pub(crate) fn measure(ports: usize, effort: &Effort) -> Result<Value, RunError> {
    let starts = (0..STARTS).map(|_| start(effort));
    let starts: Vec<(f64, f64)> = starts.collect::<Result<_, _>>()?;
    let slowest = starts.iter().map(|start| start.0).fold(0.0, f64::max);
    Ok(json!({
        "memory": memory(ports, effort)?,
        "ready_seconds": median(starts.iter().map(|start| start.1)),
        "first_frame_seconds": median(starts.iter().map(|start| start.0)),
        "first_frame_slowest_seconds": slowest,
        "starts": STARTS,
    }))
}
