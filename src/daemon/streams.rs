//! What clients read from observers: captures as pcapng, traces as lines. Also builds the
//! observers.
//!
//! All of this runs on the API's helper threads. Control only registers observers and takes them
//! out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::command::Command;
use super::handle::Handle;
use super::observers::{ObserverRecord, Prospect};
use crate::api::types::{CaptureOrder, TraceFrame, TraceLine, TraceOrder, TraceOutcome};
use crate::api::{ByteStream, ControlError};
use crate::config::{ALL_PORTS, MAX_FILTER, MAX_SNAPLEN, MAX_TRACE, ObserveDirection};
use crate::observe::pcapng::Section;
use crate::observe::pen::take_to_the_end;
use crate::observe::trace::{Journey, Tracer};
use crate::observe::{
    Filter, Kind, Observer, ObserverSpec, Reader, Record, WallClock, What, since_1970,
};
use crate::switch::PortRef;
use crate::switch::fdb::Learned;
use crate::switch::forward::Verdict;
use crate::wire;

/// Most bytes of records taken at once.
const CHUNK: usize = 256 * 1024;
/// Longest wait for the poll threads at a start or an end. A poll thread that stands still is
/// reported elsewhere.
const SETTLED: Duration = Duration::from_secs(2);
/// Bytes of a traced frame from which its line is made.
const TRACED_BYTES: u32 = 128;
/// The end of the message that refuses [`ALL_PORTS`].
pub(super) const ONLY_CAPTURES: &str = "`all` is for captures";

pub(super) fn bad<T>(text: String) -> Result<T, ControlError> {
    Err(ControlError::BadArgument(text))
}

/// Registers an observer. Returns its name and the generation of the first view with it.
pub(super) fn register(
    handle: &Handle,
    record: ObserverRecord,
) -> Result<(String, u64), ControlError> {
    let observer = record.observer.clone();
    let answer = handle.ask(|reply| Command::Observe(record, reply));
    if answer.is_err() {
        // A late answer would leave the observer registered without a reader, so it is taken out
        // here.
        let read = Command::ObserverRead(Arc::downgrade(&observer), 0, 0);
        let _ = handle.tell(Command::LeaveObserver(observer, "nobody waits for it"));
        let _ = handle.tell(read);
    }
    answer
}

/// Resolves the names of the ports that an observer looks at.
pub(super) fn prospect(
    handle: &Handle,
    ports: Option<Vec<String>>,
    to: Option<String>,
) -> Result<Prospect, ControlError> {
    handle.ask(|reply| Command::Prospect(ports, to, reply))
}

/// Waits until every poll thread has adopted a view, at most for `SETTLED`.
pub(super) fn wait_seen(handle: &Handle, generation: u64) {
    let deadline = Instant::now() + SETTLED;
    while !handle.acknowledgements.reached(generation) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A registered observer and its handle, for a stream or a mirror.
#[derive(Debug)]
struct Registered {
    name: String,
    observer: Arc<Observer>,
    handle: Handle,
    /// Number of frames that the reader has received.
    frames: u64,
}

impl Registered {
    /// Registers the observer, and waits until every poll thread has adopted a view with it.
    fn new(handle: &Handle, record: ObserverRecord) -> Result<Registered, ControlError> {
        let observer = record.observer.clone();
        let (name, generation) = register(handle, record)?;
        let registered = Registered {
            name,
            observer,
            handle: handle.clone(),
            frames: 0,
        };
        wait_seen(handle, generation);
        Ok(registered)
    }

    /// Takes the observer out, unless it has ended already.
    fn leave(&self, why: &'static str) {
        if !self.observer.has_ended() {
            // A send fails if the daemon stops. The daemon then takes the observer out.
            let command = Command::LeaveObserver(self.observer.clone(), why);
            let _ = self.handle.tell(command);
        }
    }

    /// Returns why the observer has ended, once no poll thread writes to it any more.
    fn settled_end(&self, since: &mut Option<Instant>) -> Option<String> {
        let why = self.observer.settled_end(|generation| {
            let since = since.get_or_insert_with(Instant::now);
            self.handle.acknowledgements.reached(generation) || since.elapsed() > SETTLED
        })?;
        Some(why.to_string())
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.leave("its reader has left");
        let missed = self.observer.counts().missed;
        let read = Command::ObserverRead(Arc::downgrade(&self.observer), self.frames, missed);
        // A daemon that has stopped reports nothing, so a failed send is ignored.
        let _ = self.handle.tell(read);
    }
}

/// The reader of a capture.
#[derive(Debug)]
pub(super) struct CaptureStream {
    registered: Registered,
    reader: Reader,
    section: Section,
    clock: WallClock,
    /// Number of frames written, by interface.
    written: Vec<u64>,
    left: Option<u64>,
    deadline: Option<Instant>,
    ending: Option<Instant>,
    bytes: Vec<u8>,
}

impl CaptureStream {
    pub(super) fn start(handle: &Handle, order: &CaptureOrder) -> Result<Self, ControlError> {
        if !(1..=MAX_SNAPLEN).contains(&order.snaplen) {
            return bad(format!(
                "snaplen {}: 1 to {MAX_SNAPLEN} bytes",
                order.snaplen
            ));
        }
        if order.count == Some(0) || order.seconds == Some(0) {
            return bad("a capture of no frame or no time".to_string());
        }
        if order.filter.len() > MAX_FILTER {
            return bad(format!("a filter may have at most {MAX_FILTER} bytes"));
        }
        let filter = Filter::compile(&order.filter)
            .map_err(|error| ControlError::BadArgument(error.to_string()))?;
        let port = order.port.clone().filter(|port| port != ALL_PORTS);
        let names: Option<Vec<String>> = port.map(|port| vec![port]);
        let prospect = prospect(handle, names.clone(), None)?;
        let spec = ObserverSpec {
            kind: if order.drops {
                Kind::Drops
            } else {
                Kind::Capture
            },
            ports: prospect.ports.clone().map(Into::into),
            direction: order.direction,
            snaplen: order.snaplen,
            filter,
        };
        let (observer, reader) = Observer::with_reader(spec, prospect.threads.iter().copied());
        let record = ObserverRecord {
            name: String::new(),
            observer,
            ports: names.unwrap_or_default(),
            to: None,
        };
        let registered = Registered::new(handle, record)?;
        let section = Section::new(&registered.observer, since_1970());
        let mut stream = CaptureStream {
            section: section.map_err(|error| ControlError::Internal(error.to_string()))?,
            registered,
            reader,
            clock: WallClock::default(),
            written: Vec::new(),
            left: order.count,
            // A deadline beyond the range of the clock means no deadline.
            deadline: order
                .seconds
                .and_then(|s| Instant::now().checked_add(Duration::from_secs(s))),
            ending: None,
            bytes: Vec::new(),
        };
        // Readers of pcapng need the interfaces before the first frame.
        for port in prospect.ports.unwrap_or_else(|| handle.names.present()) {
            stream.interface(port);
        }
        Ok(stream)
    }

    fn interface(&mut self, port: PortRef) -> u32 {
        let names = &self.registered.handle.names;
        // Writing to memory cannot fail.
        let number = self.section.interface(port, || names.of(port)).unwrap_or(0);
        let known = self.written.len().max(number as usize + 1);
        self.written.resize(known, 0);
        number
    }

    /// Writes the records at hand, up to a chunk and up to the count. Returns whether more may be
    /// there at once.
    fn take(&mut self) -> bool {
        let mut bytes = std::mem::take(&mut self.bytes);
        let mut taken = 0;
        while taken < CHUNK && self.left != Some(0) {
            let Some((_, record)) = self.reader.next(&mut bytes) else {
                break;
            };
            taken += bytes.len() + 100;
            self.frame(&record, &bytes);
        }
        self.bytes = bytes;
        taken >= CHUNK
    }

    fn frame(&mut self, record: &Record, bytes: &[u8]) {
        let interface = self.interface(record.port);
        let time = self.clock.at(record.time);
        let written = self.section.frame(interface, time, record, bytes);
        if written.is_ok() {
            self.written[interface as usize] += 1;
            self.registered.frames += 1;
        }
        self.left = self.left.map(|left| left - 1);
    }

    fn finish(&mut self, why: &str) {
        let observer = self.registered.observer.clone();
        // Adds the ports all of whose frames were missed. Of several ports in one slot it adds the
        // last.
        for port in self.registered.handle.names.all().into_iter().rev() {
            if observer.missed_at(port.slot) > 0 && !self.section.knows_slot(port.slot) {
                self.interface(port);
            }
        }
        let finished = self
            .section
            .finish(&observer, &self.written, since_1970(), why);
        if let Err(error) = finished {
            tracing::debug!("the end of a capture: {error}");
        }
    }
}

impl ByteStream for CaptureStream {
    fn name(&self) -> &str {
        &self.registered.name
    }

    fn read(&mut self, out: &mut Vec<u8>) -> bool {
        self.clock.refresh();
        if self
            .deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
        {
            self.registered.leave("its time is over");
        }
        let end = take_to_the_end(
            self,
            |stream| stream.registered.settled_end(&mut stream.ending),
            Self::take,
        );
        if self.left == Some(0) {
            self.registered.leave("it has as many frames as asked for");
        }
        if let Some(why) = &end {
            self.finish(why);
        }
        self.section.take(out);
        end.is_none()
    }
}

/// The reader of a trace.
#[derive(Debug)]
pub(super) struct TraceStream {
    registered: Registered,
    reader: Reader,
    tracer: Tracer,
    clock: WallClock,
    left: u64,
    ending: Option<Instant>,
    bytes: Vec<u8>,
}

impl TraceStream {
    pub(super) fn start(handle: &Handle, order: &TraceOrder) -> Result<Self, ControlError> {
        if !(1..=MAX_TRACE).contains(&order.count) {
            return bad(format!("count {}: 1 to {MAX_TRACE} frames", order.count));
        }
        if order.port == ALL_PORTS {
            return bad(format!(
                "a trace follows the frames of one port; {ONLY_CAPTURES}"
            ));
        }
        let names = vec![order.port.clone()];
        let prospect = prospect(handle, Some(names.clone()), None)?;
        let spec = ObserverSpec {
            kind: Kind::Trace,
            ports: prospect.ports.map(Into::into),
            direction: ObserveDirection::Rx,
            snaplen: TRACED_BYTES,
            filter: Filter::default(),
        };
        let (observer, reader) = Observer::with_reader(spec, prospect.threads.iter().copied());
        let record = ObserverRecord {
            name: String::new(),
            observer,
            ports: names,
            to: None,
        };
        Ok(TraceStream {
            registered: Registered::new(handle, record)?,
            reader,
            tracer: Tracer::default(),
            clock: WallClock::default(),
            left: order.count,
            ending: None,
            bytes: Vec::new(),
        })
    }

    /// Takes records, up to a chunk. Returns whether more may be there at once.
    fn take(&mut self, now: Instant) -> bool {
        let mut taken = 0;
        while taken < CHUNK && self.left > 0 {
            let Some((thread, record)) = self.reader.next(&mut self.bytes) else {
                break;
            };
            taken += self.bytes.len() + 100;
            let limit = usize::try_from(self.left).unwrap_or(usize::MAX);
            self.tracer.take(thread, record, &self.bytes, now, limit);
        }
        taken >= CHUNK
    }

    fn frame(&self, journey: &Journey) -> TraceFrame {
        let names = &self.registered.handle.names;
        let Journey {
            entered,
            decided,
            head,
            outcomes,
        } = journey;
        let outcomes = outcomes.iter().map(|record| TraceOutcome {
            port: names.of(record.port),
            queue: record.queue,
            outcome: match record.what {
                What::Dropped(reason) => reason.name().to_string(),
                _ => "delivered".to_string(),
            },
        });
        TraceFrame {
            time: self.clock.at(entered.time).as_secs_f64(),
            port: names.of(entered.port),
            queue: entered.queue,
            length: entered.len,
            summary: wire::summary(head, entered.len),
            learned: decided
                .and_then(|decided| decided.learned)
                .map(|learned| learned_name(learned).to_string()),
            lookup: decided
                .and_then(|decided| decided.known)
                .map(|port| names.of(port)),
            verdict: match decided.map(|decided| decided.verdict) {
                Some(Verdict::Unicast(_)) => "unicast",
                Some(Verdict::Flood) => "flood",
                Some(Verdict::Drop(_)) | None => "drop",
            }
            .to_string(),
            outcomes: outcomes.collect(),
        }
    }

    fn line(out: &mut Vec<u8>, line: &TraceLine) {
        // Writing plain values to memory cannot fail.
        if serde_json::to_writer(&mut *out, line).is_ok() {
            out.push(b'\n');
        }
    }
}

impl ByteStream for TraceStream {
    fn name(&self) -> &str {
        &self.registered.name
    }

    fn read(&mut self, out: &mut Vec<u8>) -> bool {
        self.clock.refresh();
        let now = Instant::now();
        let end = take_to_the_end(
            self,
            |stream| stream.registered.settled_end(&mut stream.ending),
            |stream| stream.take(now),
        );
        while self.left > 0
            && let Some(journey) = self.tracer.next(now, end.is_some())
        {
            Self::line(out, &TraceLine::Frame(self.frame(&journey)));
            self.left -= 1;
            self.registered.frames += 1;
        }
        if self.left == 0 {
            self.registered.leave("it has as many frames as asked for");
        }
        let Some(reason) = end else {
            return true;
        };
        let end = TraceLine::End {
            reason,
            frames: self.registered.frames,
            missed: self.registered.observer.counts().missed,
        };
        Self::line(out, &end);
        false
    }
}

/// Returns the word for what the switch learned from a frame.
fn learned_name(learned: Learned) -> &'static str {
    match learned {
        Learned::Known | Learned::Refreshed => "known",
        Learned::New => "new",
        Learned::Moved => "moved",
        Learned::Full => "full",
        Learned::Quota => "quota",
        Learned::MoveLimited => "move_limited",
        Learned::Static => "static",
        Learned::Gone => "gone",
        Learned::Contended => "contended",
    }
}
