//! What a run found, for people and for programs.

use std::fmt;

use serde::Serialize;

use super::client::{RoundTrips, ThreadReport};
use super::frame::MacPrefix;
use super::plan::{FlowCounters, Mode, Plan};

/// How much a run's numbers mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every frame was accounted for.
    Ok,
    /// Frames were lost, changed or doubled.
    Failed,
    /// The run ended early; the numbers are of its first part.
    Incomplete,
    /// The client itself stood still; missing frames say nothing about the backend.
    Inconclusive,
}

/// A client that had a CPU for less of its time has measured the machine's other work, too.
const CPU_SHARE: f64 = 0.95;

/// Why a run ended before its time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndedEarly {
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// A connection was closed.
    #[error("the backend closed the connection of guest {guest}")]
    BackendClosed {
        /// Whose.
        guest: usize,
    },
    /// A ring was broken.
    #[error("the backend broke a ring: {0}")]
    RingFault(crate::virtio::driver::RingFault),
    /// No frame was taken from a guest.
    #[error("the backend takes no frames from guest {guest}")]
    Deaf {
        /// Whose.
        guest: usize,
    },
}

/// Round trip times in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RoundTripReport {
    /// Round trips measured.
    pub count: u64,
    /// Median.
    pub p50_seconds: f64,
    /// 99th percentile.
    pub p99_seconds: f64,
    /// 99.9th percentile.
    pub p999_seconds: f64,
    /// Longest.
    pub max_seconds: f64,
    /// Frames that did not come back within half a second.
    pub lost: u64,
}

impl RoundTripReport {
    fn new(trips: &RoundTrips, lost: u64) -> Self {
        let at = |quantile| trips.value_at_quantile(quantile) as f64 / 1e9;
        RoundTripReport {
            count: trips.len(),
            p50_seconds: at(0.5),
            p99_seconds: at(0.99),
            p999_seconds: at(0.999),
            max_seconds: trips.max() as f64 / 1e9,
            lost,
        }
    }
}

/// One run's results.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Frame bytes, without the check sequence.
    pub size: usize,
    /// `tput`, `rtt` or `open:RATE`.
    pub mode: String,
    /// `pairs`, `n-to-1` or `all`.
    pub pattern: String,
    /// Guests.
    pub guests: usize,
    /// Queue pairs of each.
    pub queues: usize,
    /// `split` or `packed`.
    pub ring: &'static str,
    /// Entries of a ring.
    pub ring_size: u16,
    /// Frames in flight for each flow.
    pub window: usize,
    /// VIRTIO_NET_F_MRG_RXBUF.
    pub mergeable: bool,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// What the guests' MAC addresses start with; random, so that runs at one switch do not meet.
    pub mac_prefix: String,
    /// Measured time.
    pub seconds: f64,
    /// Million frames a second, as received.
    pub mpps: f64,
    /// Frame bits a second / 10⁹, as received: no preamble, gap or check sequence.
    pub gbit_per_second: f64,
    /// Frames sent, warm-up included.
    pub sent: u64,
    /// Different intact frames received, warm-up and drain included.
    pub received: u64,
    /// Sent, and never received.
    pub lost: u64,
    /// Sent and not received in a run that is no basis for calling them lost.
    pub unaccounted: u64,
    /// Received with changed or missing bytes.
    pub corrupt: u64,
    /// Received after a later one of the same flow.
    pub out_of_order: u64,
    /// Received twice.
    pub duplicated: u64,
    /// Flooded to a guest that they were not for, or not from this client.
    pub foreign: u64,
    /// Longest time in which a guest received nothing.
    pub longest_gap_seconds: f64,
    /// Times that a window was refilled after half a second of silence.
    pub refills: u64,
    /// Frames that an open loop could not send for want of a free buffer.
    pub held_back: u64,
    /// Part of the time in which client threads had work: near 1, the client is the limit.
    pub client_busy_share: f64,
    /// Processor time of the client threads in the measured time: less than that, other programs
    /// took their share.
    pub client_cpu_seconds: f64,
    /// Share of the measured time that client threads had a CPU. They poll, so that less than all
    /// of it is what other programs took.
    pub client_cpu_share: f64,
    /// Times for which a client thread stood still.
    pub standstills_seconds: Vec<f64>,
    /// With `rtt`.
    pub round_trip: Option<RoundTripReport>,
    /// What the numbers mean.
    pub verdict: Verdict,
    /// Why it ended early.
    pub ended_early: Option<String>,
}

impl Report {
    /// Puts together what the threads and the flows counted.
    pub fn new(
        plan: &Plan,
        prefix: MacPrefix,
        threads: &[ThreadReport],
        counters: &[FlowCounters],
        ended_early: Option<EndedEarly>,
    ) -> Self {
        let counts = || threads.iter().map(|thread| &thread.counts);
        let sent = counters
            .iter()
            .map(|flow| flow.sent.load(std::sync::atomic::Ordering::Acquire))
            .sum::<u64>();
        let received = counts().map(|c| c.received).sum::<u64>();
        let corrupt = counts().map(|c| c.corrupt).sum::<u64>();
        let pps = threads
            .iter()
            .filter(|thread| thread.measured.1 != 0)
            .map(|thread| thread.measured.0 as f64 * 1e9 / thread.measured.1 as f64)
            .sum::<f64>();
        let measured_ns = threads.iter().map(|t| t.measured.1).max().unwrap_or(0);
        let all_ns = threads.iter().map(|t| t.measured.1).sum::<u64>();
        let busy_ns = threads.iter().map(|t| t.busy_ns).sum::<u64>();
        let cpu_ns = threads.iter().map(|t| t.cpu_ns).sum::<u64>();
        let standstills: Vec<f64> = threads
            .iter()
            .flat_map(|thread| &thread.standstills)
            .map(|&ns| ns as f64 / 1e9)
            .collect();
        let missing = sent.saturating_sub(received + corrupt);
        let blameless = !standstills.is_empty() || ended_early.is_some();
        let mut report = Report {
            size: plan.size,
            mode: plan.mode.to_string(),
            pattern: plan.pattern.to_string(),
            guests: plan.guests,
            queues: plan.queues,
            ring: if plan.packed { "packed" } else { "split" },
            ring_size: plan.ring_size,
            window: plan.window(),
            mergeable: plan.mergeable,
            in_order: plan.in_order,
            mac_prefix: prefix.to_string(),
            seconds: measured_ns as f64 / 1e9,
            mpps: pps / 1e6,
            gbit_per_second: pps * plan.size as f64 * 8.0 / 1e9,
            sent,
            received,
            lost: if blameless { 0 } else { missing },
            unaccounted: if blameless { missing } else { 0 },
            corrupt,
            out_of_order: counts().map(|c| c.out_of_order).sum(),
            duplicated: counts().map(|c| c.duplicated).sum(),
            foreign: counts().map(|c| c.foreign).sum(),
            longest_gap_seconds: counts().map(|c| c.longest_gap_ns).max().unwrap_or(0) as f64 / 1e9,
            refills: threads.iter().map(|t| t.sending.refills).sum(),
            held_back: threads.iter().map(|t| t.sending.held_back).sum(),
            client_busy_share: busy_ns as f64 / all_ns.max(1) as f64,
            client_cpu_seconds: cpu_ns as f64 / 1e9,
            client_cpu_share: cpu_ns as f64 / all_ns.max(1) as f64,
            standstills_seconds: standstills,
            round_trip: round_trip(threads),
            verdict: Verdict::Ok,
            ended_early: ended_early.map(|why| why.to_string()),
        };
        report.verdict = report.judge(plan.mode);
        report
    }

    fn judge(&self, mode: Mode) -> Verdict {
        // An open loop is asked to overload: what does not get through is its result.
        let lost = self.lost != 0 && !matches!(mode, Mode::Open(_));
        if self.ended_early.is_some() {
            Verdict::Incomplete
        } else if self.corrupt != 0 || self.duplicated != 0 || self.out_of_order != 0 {
            Verdict::Failed
        } else if !self.standstills_seconds.is_empty() {
            Verdict::Inconclusive
        } else if lost {
            Verdict::Failed
        } else {
            Verdict::Ok
        }
    }
}

fn round_trip(threads: &[ThreadReport]) -> Option<RoundTripReport> {
    let mut all: Option<RoundTrips> = None;
    for trips in threads.iter().filter_map(|t| t.round_trips.as_ref()) {
        match &mut all {
            // All have the same bounds, so that none is refused.
            Some(sum) => sum.add(trips).unwrap_or(()),
            None => all = Some(trips.clone()),
        }
    }
    let lost = threads.iter().map(|t| t.lost_round_trips).sum();
    all.map(|trips| RoundTripReport::new(&trips, lost))
}

/// A time, in a unit that reads well.
struct Time(f64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            s if s >= 1.0 => write!(f, "{s:.2} s"),
            s if s >= 1e-3 => write!(f, "{:.2} ms", s * 1e3),
            s => write!(f, "{:.2} µs", s * 1e6),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = |flag| if flag { "on" } else { "off" };
        writeln!(
            f,
            "{} B, {}, {} {} {}, {} {},\n\
             {} ring of {}, mergeable {}, in-order {}, window {}",
            self.size,
            self.mode,
            self.guests,
            if self.guests == 1 { "guest" } else { "guests" },
            self.pattern,
            self.queues,
            if self.queues == 1 {
                "queue pair"
            } else {
                "queue pairs"
            },
            self.ring,
            self.ring_size,
            on(self.mergeable),
            on(self.in_order),
            self.window,
        )?;
        if let Some(why) = &self.ended_early {
            writeln!(f, "PARTIAL RESULT: {why} after {:.2} s", self.seconds)?;
        }
        let row = |f: &mut fmt::Formatter<'_>, name: &str, value: &dyn fmt::Display| {
            writeln!(f, "  {name:<14} {value:>14}")
        };
        row(f, "Mpps", &format_args!("{:.3}", self.mpps))?;
        row(f, "Gbit/s", &format_args!("{:.3}", self.gbit_per_second))?;
        row(f, "sent", &self.sent)?;
        row(f, "received", &self.received)?;
        row(f, "lost", &self.lost)?;
        row(f, "corrupt", &self.corrupt)?;
        row(f, "out of order", &self.out_of_order)?;
        row(
            f,
            "longest gap",
            &Time(self.longest_gap_seconds).to_string(),
        )?;
        let busy = format!("{:.0} %", self.client_busy_share * 100.0);
        row(f, "client busy", &busy)?;
        if let Some(trip) = &self.round_trip {
            row(f, "round trips", &trip.count)?;
            row(f, "p50", &Time(trip.p50_seconds).to_string())?;
            row(f, "p99", &Time(trip.p99_seconds).to_string())?;
            row(f, "p99.9", &Time(trip.p999_seconds).to_string())?;
            row(f, "max", &Time(trip.max_seconds).to_string())?;
        }
        self.write_remarks(f)
    }
}

impl Report {
    /// What is usually zero, and then not worth a line.
    fn write_remarks(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rare = [
            (self.duplicated, "frame", "received twice"),
            (self.foreign, "frame", "flooded or not from this client"),
            (self.refills, "refill", "of a window after 0.5 s of silence"),
            (
                self.held_back,
                "frame",
                "not sent in time: the transmit ring was full",
            ),
            (self.unaccounted, "frame", "unaccounted for"),
        ];
        for (count, noun, what) in rare.iter().filter(|(count, ..)| *count != 0) {
            let plural = if *count == 1 { "" } else { "s" };
            writeln!(f, "  {count} {noun}{plural} {what}")?;
        }
        writeln!(
            f,
            "  rates and times are those of the measured {:.2} s, counts include the warm-up",
            self.seconds
        )?;
        self.write_warning(f)
    }

    /// Whether the client had what it needs: the figures are otherwise those of a busy machine.
    fn write_warning(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let longest = self.standstills_seconds.iter().copied().reduce(f64::max);
        let share = self.client_cpu_share * 100.0;
        match longest {
            Some(longest) => writeln!(
                f,
                "  WARNING: INCONCLUSIVE: the client stood still, for {} at most",
                Time(longest)
            ),
            None if self.seconds > 0.0 && self.client_cpu_share < CPU_SHARE => writeln!(
                f,
                "  WARNING: the client had a CPU for {share:.0} % of the time, others took the rest"
            ),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::tests::plan;
    use super::*;
    use crate::bench::tracker::Counts;
    use std::sync::atomic::Ordering;

    fn thread(received: u64, standstills: Vec<u64>) -> ThreadReport {
        ThreadReport {
            counts: Counts {
                received,
                ..Default::default()
            },
            sending: Default::default(),
            measured: (received, 500_000_000),
            busy_ns: 250_000_000,
            cpu_ns: 400_000_000,
            standstills,
            round_trips: None,
            lost_round_trips: 0,
            fault: None,
            deaf: None,
        }
    }

    fn report(received: u64, standstills: Vec<u64>, early: Option<EndedEarly>) -> Report {
        let counters = [FlowCounters::default()];
        counters[0].sent.store(1000, Ordering::Relaxed);
        let prefix = MacPrefix::random().unwrap();
        Report::new(
            &plan(),
            prefix,
            &[thread(received, standstills)],
            &counters,
            early,
        )
    }

    #[test]
    fn a_clean_run_is_ok_and_counts_what_was_received() {
        let report = report(1000, vec![], None);
        assert_eq!(report.verdict, Verdict::Ok);
        assert_eq!((report.mpps, report.client_busy_share), (0.002, 0.5));
        assert_eq!(report.client_cpu_seconds, 0.4);
    }

    #[test]
    fn the_text_says_what_is_counted_and_warns_of_a_client_without_its_cpu() {
        let text = report(1000, vec![], None).to_string();
        assert!(text.contains("counts include the warm-up"), "{text}");
        let warnings = |text: &str| text.matches("WARNING").count();
        // The thread of the tests above had a CPU for 0.4 of 0.5 s.
        assert!(text.contains("had a CPU for 80 % of the time"), "{text}");
        let still = report(990, vec![600_000_000, 700_000_000], None).to_string();
        assert!(still.contains("for 700.00 ms at most"), "{still}");
        assert_eq!((warnings(&text), warnings(&still)), (1, 1));
        let mut quiet = report(1000, vec![], None);
        quiet.client_cpu_share = 0.99;
        assert_eq!(warnings(&quiet.to_string()), 0);
        let wide = still.lines().find(|line| line.chars().count() > 80);
        assert_eq!(wide, None);
    }

    #[test]
    fn missing_frames_are_lost_only_if_the_client_ran() {
        let lossy = report(990, vec![], None);
        assert_eq!((lossy.verdict, lossy.lost), (Verdict::Failed, 10));
        let paused = report(990, vec![600_000_000], None);
        assert_eq!(paused.verdict, Verdict::Inconclusive);
        assert_eq!((paused.lost, paused.unaccounted), (0, 10));
        let cut = report(990, vec![], Some(EndedEarly::Interrupted));
        assert_eq!((cut.verdict, cut.lost), (Verdict::Incomplete, 0));
        assert!(cut.to_string().contains("PARTIAL RESULT: interrupted"));
    }

    #[test]
    fn json_names_are_snake_case() {
        let json = serde_json::to_string(&report(1000, vec![], None)).unwrap();
        assert!(json.contains("\"gbit_per_second\":"));
        assert!(json.contains("\"verdict\":\"ok\""));
    }
}
