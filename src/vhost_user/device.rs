//! What a frontend has set up so far, and the [`Device`] that results from it.
//!
//! Every change ends in [`DeviceState::update`]: rings that can start now are started, and a new
//! device is posted. Every change that takes something away goes through [`DeviceState::stop`]
//! first: rings are taken out, the device without them is posted, and all poll threads acknowledge
//! it. Only then are the rings' positions read and the rings dropped. Rings that a change does not
//! concern stay the same queue objects in the next device.

mod controlq;
mod features;
mod report;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::SessionError;
use super::event::{Reporter, RingName, SessionEvent};
use super::look::Silence;
use super::options::{SessionOptions, has_enable, ring_features};
use super::ring::{Addresses, Refusal, Running, Vring, size_possible};
use super::status::SessionStatus;
use super::{DeviceSink, Gone};
use crate::memory::{FaultMark, GuestMemory};
use crate::port::{Device, QueuePair};
use crate::sys::call::CallFd;

/// A frontend that leaves later than this did not leave because of the number of queue pairs.
const GAVE_UP_WITHIN: Duration = Duration::from_secs(5);

/// The state of one conversation.
pub(super) struct DeviceState {
    pub(super) options: SessionOptions,
    pub(super) sink: Arc<dyn DeviceSink>,
    status: Arc<SessionStatus>,
    reporter: Reporter,
    /// GET_FEATURES was answered. From then on the crate sends the acknowledgements that a frontend
    /// asks for.
    pub(super) features_read: bool,
    features: Option<u64>,
    protocol: u64,
    memory: Arc<GuestMemory>,
    pub(super) rings: Vec<Vring>,
    /// Nothing was put into any ring that runs.
    pub(super) silence: Option<Silence>,
    /// GET_QUEUE_NUM was answered.
    pub(super) queues_asked: bool,
    begun: Instant,
    /// Rings whose position the answer to the present message tells, or which this message resets.
    /// Their records are forgotten when the answer is on its way.
    handed_over: Vec<RingName>,
    /// Index of the controlq, where one may be in use.
    controlq: Option<usize>,
    /// A message came after which there may be commands.
    controlq_changed: bool,
    /// Number of queue pairs that the driver has commanded, if known.
    pairs_in_use: Option<u16>,
    /// Whether the last post was a device, not `None`.
    posted: bool,
    /// The truncation of guest memory was reported.
    loss_reported: bool,
    /// Why the handler refused the present message; the crate's error type cannot carry the reason.
    failure: Option<SessionError>,
}

impl DeviceState {
    pub(super) fn new(
        options: SessionOptions,
        sink: Arc<dyn DeviceSink>,
        status: Arc<SessionStatus>,
        now: Instant,
    ) -> Self {
        let mark = FaultMark::new();
        status.lock().fault = Some(Arc::clone(&mark));
        DeviceState {
            reporter: Reporter::new(Arc::clone(&sink), now),
            rings: (0..options.rings()).map(Vring::new).collect(),
            memory: Arc::new(GuestMemory::new(mark)),
            options,
            sink,
            status,
            features_read: false,
            silence: None,
            queues_asked: false,
            begun: now,
            handed_over: Vec::new(),
            features: None,
            protocol: 0,
            controlq: None,
            controlq_changed: false,
            pairs_in_use: None,
            posted: false,
            loss_reported: false,
            failure: None,
        }
    }

    pub(super) fn event(&mut self, event: SessionEvent) {
        self.reporter.report(event, Instant::now());
    }

    pub(super) fn fail(&mut self, error: SessionError) {
        // Recorded before the answer is sent: whoever has read the answer finds the reason in the
        // status.
        self.record(&error);
        self.failure = Some(error);
    }

    pub(super) fn take_failure(&mut self) -> Option<SessionError> {
        self.failure.take()
    }

    pub(super) fn is_running(&self) -> bool {
        self.rings.iter().any(|ring| ring.running.is_some())
    }

    /// Returns the call descriptors of all rings.
    pub(super) fn calls(&self) -> impl Iterator<Item = &CallFd> {
        self.rings.iter().filter_map(|ring| ring.call.as_deref())
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Returns the ring with the index of a message, which has all 32 bits.
    pub(super) fn ring(&mut self, index: u32) -> Result<&mut Vring, SessionError> {
        let rings = self.rings.len();
        let at = usize::try_from(index).unwrap_or(usize::MAX);
        self.rings
            .get_mut(at)
            .ok_or(SessionError::RingIndex { index, rings })
    }

    pub(super) fn enabled(&self, ring: &Vring) -> bool {
        let enabled = ring.enable == Some(true) || !self.features.is_some_and(has_enable);
        enabled && self.is_in_use(ring.name)
    }

    // ---- what poll threads see ------------------------------------------------------------------

    /// Starts what can start, and posts the device as it is now.
    pub(super) fn update(&mut self) {
        self.start(true);
    }

    /// A running ring has a new call descriptor. A call through the old one may not have reached
    /// the driver. So one spare call is owed, once no poll thread uses the old descriptor any more.
    pub(super) fn replaced_call(&mut self, index: u8) {
        let posted = self.start(true);
        if let Some(ring) = self.rings.get_mut(usize::from(index)) {
            ring.spare_after = posted;
        }
    }

    /// Notes the spare calls that are due now. Returns whether others will be due later.
    pub(super) fn owe_spare_calls(&mut self) -> bool {
        let mut later = false;
        for ring in &mut self.rings {
            let Some(ticket) = ring.spare_after else {
                continue;
            };
            if self.sink.is_settled(ticket) {
                ring.spare_after = None;
                ring.call.iter().for_each(|call| call.owe());
            } else {
                later = true;
            }
        }
        later
    }

    /// Touches the first buffers of started rings. This comes after the rings' calls, because
    /// drivers wait for these.
    pub(super) fn touch(&mut self) {
        self.rings.iter_mut().for_each(Vring::touch);
    }

    /// Starts the rings that can start. Posts if a ring has started, or if `always` is set.
    fn start(&mut self, always: bool) -> Option<super::Ticket> {
        let posted = if self.start_rings() || always {
            self.post()
        } else {
            None
        };
        self.refresh();
        posted
    }

    /// Tries to start every ring that does not run. Returns whether one has started.
    fn start_rings(&mut self) -> bool {
        let mut any = false;
        self.find_controlq();
        for at in 0..self.rings.len() {
            any |= self.start_ring(at);
        }
        any
    }

    fn start_ring(&mut self, at: usize) -> bool {
        let ring = &mut self.rings[at];
        // A controlq starts with its first command.
        if ring.running.is_some() || ring.name.is_controlq {
            return false;
        }
        let (name, asked) = (ring.name, ring.base);
        let mut no_record = None;
        let started = ring
            .setup(self.features, &self.memory, self.options.pairs())
            .and_then(|mut setup| {
                if let (true, Some(records)) = (setup.features.packed, &self.options.records) {
                    match records.open(name, ring.asked, &setup) {
                        Ok(redo) => setup.redo = Some(redo),
                        Err(error) => no_record = Some(error.to_string().into()),
                    }
                }
                let base = ring.start(&setup)?;
                Ok((setup.size, setup.features.packed, base))
            });
        let (size, packed, base) = match started {
            Ok(started) => started,
            Err(reason) => {
                self.refuse(at, reason);
                return false;
            }
        };
        ring.refusal = None;
        ring.call_started();
        self.event(SessionEvent::RingStarted {
            ring: name,
            size,
            packed,
            base,
        });
        // All 32 bits of a packed ring's base are compared, and 16 bits of a split ring's.
        let counts = if packed { u32::MAX } else { 0xffff };
        if let Some(asked) = asked.filter(|asked| *asked & counts != base) {
            self.event(SessionEvent::BaseDiffers {
                ring: name,
                packed,
                asked,
                found: base,
            });
        }
        if let Some(reason) = no_record {
            self.rings[at].no_record = Some(Arc::clone(&reason));
            self.event(SessionEvent::NoRecord { ring: name, reason });
        }
        true
    }

    /// Keeps why a ring does not run. Reports the reason once, unless the ring only waits for
    /// something.
    fn refuse(&mut self, at: usize, reason: Refusal) {
        let ring = &mut self.rings[at];
        let name = ring.name;
        if ring.refusal.replace(reason) != Some(reason) && !reason.is_waiting() {
            self.event(SessionEvent::RingRefused { ring: name, reason });
        }
    }

    /// The answer to the last message is on its way. The frontend knows the positions of its
    /// stopped rings, or does not want to know. So the records of these rings are forgotten.
    pub(super) fn answered(&mut self) {
        let rings = self.handed_over.drain(..);
        if let Some(records) = &self.options.records {
            rings.for_each(|ring| records.forget(ring));
        }
    }

    /// Returns the device of all running rings; `None` if no ring runs.
    fn device(&self) -> Option<Arc<Device>> {
        if !self.is_running() {
            return None;
        }
        let mut pairs = vec![QueuePair::default(); usize::from(self.options.pairs())];
        for (pair, rings) in pairs.iter_mut().zip(self.rings.chunks(2)) {
            for ring in rings {
                let enabled = self.enabled(ring);
                if ring.name.is_receiveq() {
                    pair.receive = ring.receive(enabled && !ring.left_out);
                } else if enabled || ring.enable == Some(false) {
                    // Frames on a disabled ring are discarded (vhost-user, "Ring states"). But
                    // frontends start rings before they enable them for the first time. Frames that
                    // were in the ring when the last backend died must not get lost in between, so
                    // the ring waits until it is enabled.
                    pair.transmit = ring.transmit(enabled);
                }
            }
        }
        let features = self.features.unwrap_or(0);
        Some(Arc::new(Device {
            memory: Arc::clone(&self.memory),
            features,
            numa_node: self.rings.iter().find_map(Vring::numa_node),
            pairs,
        }))
    }

    fn post(&mut self) -> Option<super::Ticket> {
        let device = self.device();
        if device.is_none() && !self.posted {
            return None;
        }
        self.posted = device.is_some();
        Some(self.sink.post(device))
    }

    /// Posts the device as it is now, and waits until every poll thread has acknowledged it.
    fn settle(&mut self) -> Result<(), Gone> {
        match self.post() {
            Some(ticket) => self.sink.settle(ticket),
            None => Ok(()),
        }
    }

    /// Stops the running rings that `which` selects. After that no poll thread touches these rings,
    /// and each ring's `base` is its position.
    fn stop(&mut self, which: impl Fn(&Vring) -> bool) -> Result<(), Gone> {
        let mut stopped: Vec<(usize, Running)> = Vec::new();
        for (at, ring) in self
            .rings
            .iter_mut()
            .enumerate()
            .filter(|(_, ring)| which(ring))
        {
            stopped.extend(ring.running.take().map(|running| (at, running)));
        }
        if stopped.is_empty() {
            return Ok(());
        }
        // The status also holds references to the queues.
        self.refresh();
        self.settle()?;
        for (at, running) in stopped {
            let (ring, base) = (&mut self.rings[at], running.base());
            ring.base = Some(base);
            let ring = ring.name;
            self.event(SessionEvent::RingStopped { ring, base });
        }
        Ok(())
    }

    // ---- messages -------------------------------------------------------------------------------

    /// A new memory map: all rings stop, are translated by the new map, and go on at their
    /// positions. A ring that the new map does not contain stays stopped. If the map has not
    /// changed, no ring stops: frames that come meanwhile would be lost for nothing.
    pub(super) fn set_memory(&mut self, memory: GuestMemory) -> Result<(), SessionError> {
        if memory.is_laid_out_like(&self.memory) {
            self.memory = Arc::new(memory);
            self.status.lock().memory_error = None;
            return Ok(());
        }
        self.stop(|_| true)?;
        let (regions, bytes) = (memory.regions().count(), memory.len_bytes());
        let before = std::mem::replace(&mut self.memory, Arc::new(memory));
        self.status.lock().memory_error = None;
        self.event(SessionEvent::Memory { regions, bytes });
        self.report_unusable(&before);
        self.start(false);
        Ok(())
    }

    pub(super) fn set_size(&mut self, index: u32, size: u32) -> Result<(), SessionError> {
        // Before SET_FEATURES the ring may still become a packed ring, whose size need not be a
        // power of two.
        let packed = ring_features(self.features.unwrap_or(self.options.offered())).packed;
        let ring = self.ring(index)?;
        let name = ring.name;
        let size =
            size_possible(size, packed).ok_or(SessionError::RingSize { ring: name, size })?;
        if ring.size != Some(size) {
            self.give_up_idle(index, "SET_VRING_NUM")?;
        }
        self.ring(index)?.size = Some(size);
        self.start(false);
        Ok(())
    }

    /// SET_VRING_ADDR. QEMU sends this message again while rings run. Equal addresses change
    /// nothing. Other addresses restart the ring there.
    pub(super) fn set_addresses(
        &mut self,
        index: u32,
        addresses: Addresses,
    ) -> Result<(), SessionError> {
        let (memory, features) = (Arc::clone(&self.memory), self.features);
        let ring = self.ring(index)?;
        if ring.addresses == Some(addresses) {
            return Ok(());
        }
        let name = ring.name;
        // A wrong address is an error if size, features and memory are known already. Otherwise it
        // is found when the ring starts.
        if let (Some(size), Some(features), true) = (ring.size, features, memory.len_bytes() > 0) {
            let places = addresses.places(&memory, size, ring_features(features));
            if places.is_none() && addresses.refusal(&memory) == Refusal::NotMapped {
                return Err(SessionError::RingAddress { ring: name });
            }
        }
        self.stop(|ring| ring.name == name)?;
        self.ring(index)?.addresses = Some(addresses);
        self.start(false);
        Ok(())
    }

    pub(super) fn set_base(&mut self, index: u32, base: u32) -> Result<(), SessionError> {
        self.give_up_idle(index, "SET_VRING_BASE")?;
        let ring = self.ring(index)?;
        ring.base = Some(base);
        ring.asked = base;
        // The old base may have been the reason why the ring did not start.
        self.start(false);
        Ok(())
    }

    /// GET_VRING_BASE: stops the ring until the next kick descriptor comes. Returns the ring's
    /// base.
    pub(super) fn stop_ring(&mut self, index: u32) -> Result<u32, SessionError> {
        let name = self.ring(index)?.name;
        self.stop(|ring| ring.name == name)?;
        let features = self.features;
        let base = self.ring(index)?.halt(features);
        self.handed_over.push(name);
        self.start(false);
        Ok(base)
    }

    /// SET_VRING_ENABLE, which may come before any other message. When a disable returns, no poll
    /// thread delivers into the ring any more.
    pub(super) fn enable(&mut self, index: u32, value: u32) -> Result<(), SessionError> {
        let enable = match value {
            0 => false,
            1 => true,
            other => return Err(SessionError::EnableValue(other)),
        };
        let ring = self.ring(index)?;
        let running = ring.running.is_some();
        // A disable of a ring that does not run is not kept. DPDK's virtio-user in server mode
        // begins every new connection with it, and enables the ring after its start.
        let told = (enable || running).then_some(enable);
        let before = std::mem::replace(&mut ring.enable, told);
        if before == told {
            return Ok(());
        }
        if !running {
            self.refresh();
            return Ok(());
        }
        if enable {
            self.update();
        } else {
            self.settle()?;
            self.refresh();
        }
        Ok(())
    }

    /// RESET_DEVICE: stops all rings and forgets their settings, except the call descriptors.
    /// Memory stays.
    pub(super) fn reset(&mut self) -> Result<(), SessionError> {
        self.stop(|_| true)?;
        self.handed_over
            .extend(self.rings.iter().map(|ring| ring.name));
        self.rings.iter_mut().for_each(Vring::reset);
        self.features = None;
        self.start(false);
        Ok(())
    }

    /// Whether the frontend left because it wants more queue pairs than are offered. Then QEMU asks
    /// for their number, hangs up without setting features, and tries again at once.
    pub(super) fn gave_up(&self, now: Instant) -> bool {
        let short = now.saturating_duration_since(self.begun) < GAVE_UP_WITHIN;
        self.queues_asked && self.features.is_none() && short
    }

    // ---- end ------------------------------------------------------------------------------------

    /// Lets go of all rings and of the memory, whatever happened before.
    pub(super) fn release(&mut self) -> Result<(), Gone> {
        let stopped = self.stop(|_| true);
        // A stop that failed has taken the rings out, too, and no poll thread has the removed port
        // any more.
        self.memory = Arc::new(GuestMemory::new(Arc::clone(self.memory.fault_mark())));
        self.rings.clear();
        self.controlq = None;
        self.refresh();
        stopped
    }
}
