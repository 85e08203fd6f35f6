//! Guests that are killed, and guests that reset their devices.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pollux::bench::frame::{Checker, MacPrefix};
use pollux::bench::frontend::{AttachError, Frontend, Order};
use pollux::bench::guest::Guest;
use pollux::bench::plan::{FlowCounters, FlowSpec, Plan};
use pollux::bench::run::{self, Attachment, RunError};
use serde_json::{Value, json};

use crate::{Effort, plan};

/// For every step of attaching.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);
/// Frames that a guest has received when it counts as one that works.
const EXCHANGED: u64 = 500;
/// Numbers, and so addresses, that no other guest on the same switch has.
const NUMBERS: [usize; 2] = [1000, 1001];
/// Few frames in flight: the first ones are flooded to the bystanders, too.
const WINDOW: usize = 16;

/// Two guests' memory, and how their rings run.
struct Pair {
    plan: Plan,
    flows: Vec<FlowSpec>,
    checker: Checker,
    attachments: Vec<Attachment>,
    frontends: Vec<Frontend>,
}

fn at(guest: usize) -> impl Fn(AttachError) -> RunError {
    move |source| RunError::Attach { guest, source }
}

impl Pair {
    fn connect(sockets: &[PathBuf], ballast: usize) -> Result<Pair, RunError> {
        let plan = Plan {
            window: Some(WINDOW),
            ..plan(2, 64)
        };
        let mut attachments = Vec::new();
        let mut frontends = Vec::new();
        for (guest, socket) in sockets.iter().enumerate() {
            attachments.push(Attachment::new(&plan, ballast).map_err(RunError::Memory)?);
            let mut frontend = Frontend::connect(socket, TIMEOUT).map_err(at(guest))?;
            run::negotiate(&plan, Order::Qemu, &mut frontend).map_err(at(guest))?;
            frontends.push(frontend);
        }
        let [first, second] = NUMBERS;
        let nobody = (usize::MAX, usize::MAX);
        // A frame names its flow: the bystanders' numbers are left to them.
        let flows = [nobody, nobody, (first, second), (second, first)];
        let flows = flows.map(|(source, destination)| FlowSpec {
            source,
            queue: 0,
            destination,
        });
        let macs = MacPrefix::random().map_err(RunError::Memory)?;
        Ok(Pair {
            checker: Checker::new(plan.size, macs),
            flows: flows.into(),
            attachments,
            frontends,
            plan,
        })
    }

    /// Starts the devices, exchanges frames until `enough` says so, and stops the devices.
    fn exchange(&mut self, mut enough: impl FnMut(u64) -> bool) -> Result<(), RunError> {
        let counters: Vec<FlowCounters> = self.flows.iter().map(|_| Default::default()).collect();
        let (plan, checker) = (&self.plan, &self.checker);
        let guests = self.attachments.iter().zip(NUMBERS);
        let guests =
            guests.map(|(ram, number)| ram.guest(number, plan, &self.flows, &counters, checker));
        let guests: std::io::Result<Vec<Guest<'_>>> = guests.collect();
        let mut guests = guests.map_err(RunError::Memory)?;
        for (n, (ram, frontend)) in self.attachments.iter().zip(&mut self.frontends).enumerate() {
            ram.start(plan, Order::Qemu, frontend).map_err(at(n))?;
        }
        guests.iter().for_each(Guest::kick_all);
        let start = Instant::now();
        let mut least = 0;
        while !enough(least) {
            let now = start.elapsed().as_nanos() as u64;
            for guest in &mut guests {
                guest.receive(checker, now);
                guest.transmit[0].send(checker, &counters, WINDOW, true, now);
            }
            let received = guests.iter().map(|guest| guest.tracker.counts.received);
            least = received.min().unwrap_or(0);
        }
        for (n, frontend) in self.frontends.iter().enumerate() {
            frontend.stop(&[0, 1]).map_err(at(n))?;
        }
        Ok(())
    }
}

fn say_exchanged() {
    println!("exchanged");
    // Nobody who reads it is left: the next step fails.
    let _ = std::io::stdout().flush();
}

/// Exchanges frames until it is killed. Without sockets: has the same memory, and uses the
/// processor until it is killed.
pub(crate) fn victim(
    sockets: &[PathBuf],
    ballast: usize,
    effort: &Effort,
) -> Result<Value, RunError> {
    effort.pin(0);
    if sockets.is_empty() {
        let plan = plan(2, 64);
        let memory = NUMBERS.map(|_| Attachment::new(&plan, ballast));
        say_exchanged();
        while memory.iter().all(Result::is_ok) {
            std::hint::spin_loop();
        }
        return Ok(json!({}));
    }
    let mut pair = Pair::connect(sockets, ballast)?;
    let mut said = false;
    pair.exchange(|received| {
        if received > EXCHANGED && !said {
            said = true;
            say_exchanged();
        }
        false
    })?;
    Ok(json!({}))
}

/// Stops and starts the rings `times` times on the same connections, with frames exchanged each
/// time.
pub(crate) fn reset(
    sockets: &[PathBuf],
    ballast: usize,
    times: u32,
    effort: &Effort,
) -> Result<Value, RunError> {
    effort.pin(0);
    let mut pair = Pair::connect(sockets, ballast)?;
    pair.exchange(|received| received > EXCHANGED)?;
    say_exchanged();
    let began = Instant::now();
    for _ in 0..times {
        pair.exchange(|received| received > EXCHANGED)?;
    }
    Ok(json!({ "times": times, "seconds": began.elapsed().as_secs_f64() }))
}
