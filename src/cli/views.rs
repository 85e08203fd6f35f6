//! Answers as tables for people.

use std::fmt::Write as _;
use std::io;

use super::text::{Table, columns, escape, fit, memory_size, seconds, short, timestamp};
use crate::api::types::{
    CallMode, DirectionStatistics, Event, FdbEntry, Latency, MemoryPace, MovingAddress,
    PollSettings, PollState, PollThreadView, PortStatistics, PortView, RingDirection, RingKind,
    RingState, RingView, SecondFrontend, SessionView, StatsView,
};
use crate::config::{SocketMode, count, thread_list};

/// Most unusable regions that are listed. The JSON has all of them.
const UNUSABLE_SHOWN: usize = 4;

/// Formats `pollux port list`.
pub(super) fn ports(ports: &[PortView]) -> String {
    if ports.is_empty() {
        return "no ports; add one with: pollux port add NAME,socket=PATH\n".into();
    }
    let mut table = Table::new(&["NAME", "STATE", "MODE", ">QUEUES", "SOCKET"]);
    for port in ports {
        table.row([
            port.name.clone(),
            port.state.as_str().to_string(),
            port.mode.to_string(),
            port.queues.to_string(),
            port.socket.clone(),
        ]);
    }
    table.render()
}

/// Formats `pollux port show`.
pub(super) fn port(port: &PortView) -> String {
    let mut text = String::new();
    let width = columns(&io::stdout());
    let mut line = |key: &str, value: &str| {
        let line = fit(&format!("{key:<18}{}", escape(value)), width, 18);
        text.push_str(&line);
        text.push('\n');
    };
    line("port", &port.name);
    line("state", port.state.as_str());
    line("reason", port.reason.as_deref().unwrap_or("-"));
    line("socket", &port.socket);
    line("mode", &port.mode.to_string());
    line("queues", &port.queues.to_string());
    let threads = match &port.poll[..] {
        [] => "any".to_string(),
        threads => thread_list(threads),
    };
    line("poll threads", &threads);
    line(
        "ring reset",
        if port.ring_reset { "offered" } else { "off" },
    );
    // In client mode the frontend creates the socket, so there is nothing to show.
    if port.mode == SocketMode::Server {
        let mode = port.socket_mode.map(|mode| format!("{mode:04o}"));
        line("socket mode", mode.as_deref().unwrap_or("-"));
        line("socket group", port.socket_group.as_deref().unwrap_or("-"));
    }
    line("calls", &calls(port));
    line("memory", &memory(port));
    if let Some(second) = &port.second_frontend {
        line("second frontend", &second_frontend(second));
    }
    if let Some(moving) = &port.moving_address {
        line("moving address", &moving_address(moving));
    }
    if let Some(session) = &port.session {
        session_lines(session, &mut line);
    }
    if let Some(session) = port.session.as_ref().filter(|s| !s.rings.is_empty()) {
        text.push('\n');
        text.push_str(&rings(&session.rings));
    }
    text.push('\n');
    text.push_str(&counters(&port.statistics));
    text
}

fn calls(port: &PortView) -> String {
    let statistics = &port.statistics;
    match port.calls {
        CallMode::Direct if statistics.slow_calls == 0 => "direct".to_string(),
        CallMode::Direct => format!("direct, {} slow so far", statistics.slow_calls),
        CallMode::Deferred => format!(
            "deferred to the session: {} slow so far, {} made by it",
            statistics.slow_calls, statistics.deferred_calls
        ),
    }
}

fn second_frontend(second: &SecondFrontend) -> String {
    format!(
        "refused {} times in {}, last {} ago: two VMs?",
        second.refused,
        seconds(second.since_seconds),
        seconds(second.last_seconds)
    )
}

fn moving_address(moving: &MovingAddress) -> String {
    format!(
        "{} to and from {}, {} times: in use twice?",
        moving.mac, moving.other_port, moving.moves
    )
}

fn memory(port: &PortView) -> String {
    let statistics = &port.statistics;
    let faults = format!(
        "{} page faults took {}",
        statistics.slow_faults,
        seconds(statistics.slow_fault_seconds)
    );
    match port.memory {
        MemoryPace::Normal if statistics.slow_faults == 0 => "normal".to_string(),
        MemoryPace::Normal => format!("normal; {faults}"),
        MemoryPace::Slow => format!(
            "slow, by poll-slow for {}; {faults}",
            seconds(port.memory_slow_seconds.unwrap_or(0.0))
        ),
    }
}

fn session_lines(session: &SessionView, line: &mut impl FnMut(&str, &str)) {
    let list = |names: &[String]| match names {
        [] => "-".to_string(),
        names => names.join(" "),
    };
    line("session age", &seconds(session.age_seconds));
    let memory = format!(
        "{} in {}",
        memory_size(session.memory_bytes),
        count(session.memory_regions.into(), "region")
    );
    line("shared memory", &memory);
    for region in session.memory_unusable.iter().take(UNUSABLE_SHOWN) {
        let size = memory_size(region.bytes);
        let (at, cause) = (region.guest_address, &region.cause);
        line("unusable memory", &format!("{size} at {at:#x}: {cause}"));
    }
    if let Some(more) = session
        .memory_unusable
        .len()
        .checked_sub(UNUSABLE_SHOWN + 1)
    {
        line("unusable memory", &format!("{} more regions", more + 1));
    }
    line("features", &list(&session.features));
    line("protocol features", &list(&session.protocol_features));
}

fn rings(rings: &[RingView]) -> String {
    let mut table = Table::new(&[
        ">QUEUE",
        "DIR",
        "KIND",
        ">SIZE",
        "STATE",
        "ENABLED",
        ">POSITION",
    ]);
    let mut amiss = String::new();
    for ring in rings {
        let direction = direction(ring.direction);
        table.row([
            ring.queue.to_string(),
            direction.to_string(),
            match ring.kind {
                RingKind::Split => "split".to_string(),
                RingKind::Packed => "packed".to_string(),
            },
            ring.size.to_string(),
            match ring.state {
                RingState::Stopped => "stopped".to_string(),
                RingState::Running => "running".to_string(),
                RingState::Broken => "broken".to_string(),
            },
            if ring.enabled { "yes" } else { "no" }.to_string(),
            ring.position.to_string(),
        ]);
        if let Some(reason) = &ring.broken_reason {
            let reason = escape(reason);
            let _ = writeln!(amiss, "ring {direction} {} broken: {reason}", ring.queue);
        }
        if let Some(reason) = &ring.no_record {
            let reason = escape(reason);
            let _ = writeln!(
                amiss,
                "ring {direction} {} will not survive a restart of the switch: {reason}",
                ring.queue
            );
        }
        if ring.unserved {
            let _ = writeln!(
                amiss,
                "ring {direction} {} is enabled, but never had a buffer: no flow goes there",
                ring.queue
            );
        }
    }
    table.render() + &amiss
}

fn direction(direction: RingDirection) -> &'static str {
    match direction {
        RingDirection::Rx => "rx",
        RingDirection::Tx => "tx",
        RingDirection::Control => "ctrl",
    }
}

fn counters(statistics: &PortStatistics) -> String {
    let mut table = Table::new(&["DIR", ">FRAMES", ">BYTES", ">DROPPED"]);
    let mut reasons = Table::new(&["DIR", "DROP REASON", ">FRAMES"]);
    let mut any = false;
    for (name, direction) in [("rx", &statistics.rx), ("tx", &statistics.tx)] {
        table.row([
            name.to_string(),
            direction.frames.to_string(),
            direction.bytes.to_string(),
            direction.dropped().to_string(),
        ]);
        for (reason, frames) in direction.drops.iter().filter(|(_, frames)| **frames > 0) {
            any = true;
            reasons.row([name.to_string(), reason.clone(), frames.to_string()]);
        }
    }
    let mut text = table.render();
    if any {
        text.push('\n');
        text.push_str(&reasons.render());
    }
    let (bad, unusable) = (statistics.bad_buffers, statistics.unusable_buffers);
    if bad > 0 {
        let _ = writeln!(
            text,
            "\n{bad} receive buffers went back unused, {unusable} of them in unusable memory"
        );
    }
    text
}

/// Formats `pollux fdb list`.
pub(super) fn fdb(entries: &[FdbEntry]) -> String {
    let mut table = Table::new(&["MAC", "PORT", ">AGE", "TYPE"]);
    for entry in entries {
        let (age, kind) = if entry.is_static {
            ("-".to_string(), "static")
        } else {
            (format!("{:.0}s", entry.age_seconds), "learned")
        };
        table.row([
            entry.mac.to_string(),
            entry.port.clone(),
            age,
            kind.to_string(),
        ]);
    }
    table.render()
}

/// Formats `pollux poll set`: the current settings.
pub(super) fn poll_settings(settings: &PollSettings) -> String {
    let thread = settings.thread.map(|thread| format!(" thread={thread}"));
    format!(
        "rebalance={} idle={}{}\n",
        settings.rebalance,
        settings.idle,
        thread.unwrap_or_default()
    )
}

/// Formats `pollux poll list`: what the threads do, and how fast they adopt changes.
pub(super) fn poll_threads(threads: &[PollThreadView]) -> String {
    let mut table = Table::new(&[
        ">THREAD",
        ">CPU",
        "STATE",
        ">BUSY",
        ">FRAMES",
        ">PASSES",
        ">SLEEPS",
        ">P99 PASS",
        "QUEUES",
    ]);
    let mut taken_over = Table::new(&[
        ">THREAD",
        ">TAKE-OVERS",
        ">P50",
        ">P99",
        ">MAX",
        ">BEHIND",
        "IDLE",
    ]);
    for thread in threads {
        let p99 = |latency: &Latency| seconds(latency.p99_seconds);
        table.row([
            if thread.slow_ports {
                format!("{} slow", thread.thread)
            } else {
                thread.thread.to_string()
            },
            thread.cpu.map_or("-".to_string(), |cpu| cpu.to_string()),
            match thread.state {
                PollState::Busy => "busy".to_string(),
                PollState::Asleep => "asleep".to_string(),
                PollState::Overdue => {
                    format!("overdue {}", seconds(thread.overdue_seconds.unwrap_or(0.0)))
                }
            },
            format!("{:.0}%", thread.recent_busy_ratio * 100.0),
            short(thread.frames as f64),
            short(thread.passes as f64),
            short(thread.sleeps as f64),
            thread.pass_length.as_ref().map_or("-".to_string(), p99),
            queues(thread),
        ]);
        let latency = thread.acknowledge_latency.as_ref();
        let value = |of: fn(&Latency) -> f64| {
            latency.map_or("-".to_string(), |latency| seconds(of(latency)))
        };
        let behind = thread
            .generation
            .saturating_sub(thread.acknowledged_generation);
        taken_over.row([
            thread.thread.to_string(),
            latency.map_or(0, |latency| latency.count).to_string(),
            value(|latency| latency.p50_seconds),
            value(|latency| latency.p99_seconds),
            value(|latency| latency.max_seconds),
            behind.to_string(),
            thread.idle.to_string(),
        ]);
    }
    format!("{}\n{}", table.render(), taken_over.render())
}

/// Returns the first few queues of a thread. The JSON has all of them.
fn queues(thread: &PollThreadView) -> String {
    const SHOWN: usize = 3;
    let mut names: Vec<String> = thread
        .queues
        .iter()
        .take(SHOWN)
        .map(|queue| {
            let load = format!("{:.0}%", queue.load * 100.0);
            format!("{}:{} {load}", queue.port, queue.queue)
        })
        .collect();
    if thread.queues.len() > SHOWN {
        names.push(format!("+{}", thread.queues.len() - SHOWN));
    }
    if names.is_empty() {
        return "-".into();
    }
    names.join(", ")
}

/// Formats `pollux stats`.
pub(super) fn stats(stats: &StatsView) -> String {
    let mut table = Table::new(&[
        "PORT",
        "STATE",
        ">RX FRAMES",
        ">RX BYTES",
        ">RX DROP",
        ">TX FRAMES",
        ">TX BYTES",
        ">TX DROP",
    ]);
    for port in &stats.ports {
        let cells = |direction: &DirectionStatistics| {
            [
                short(direction.frames as f64),
                short(direction.bytes as f64),
                short(direction.dropped() as f64),
            ]
        };
        let start = [port.name.clone(), port.state.as_str().to_string()];
        let (rx, tx) = (cells(&port.statistics.rx), cells(&port.statistics.tx));
        table.row(start.into_iter().chain(rx).chain(tx));
    }
    let longest = |operation: &str, times: &Option<Latency>| {
        let times = times.as_ref()?;
        let longest = seconds(times.max_seconds);
        Some(format!(
            "{operation} {}, in {longest} at most; ",
            count(times.count, "time")
        ))
    };
    let moved = stats.fdb.counters.get("moved").unwrap_or(&0);
    let operations = [
        longest("ports added", &stats.port_add),
        longest("removed", &stats.port_remove),
    ];
    let lost = match stats.log_lines_lost {
        0 => String::new(),
        lines => format!("{} of the log lost\n", count(lines, "line")),
    };
    let head = format!(
        "up {}, {}generation {}, {} of {} addresses known, {}",
        seconds(stats.uptime_seconds),
        operations.into_iter().flatten().collect::<String>(),
        stats.generation,
        stats.fdb.entries,
        stats.fdb.capacity,
        count(*moved, "move")
    );
    format!(
        "{}\n{lost}\n{}\n{}",
        fit(&head, columns(&io::stdout()), 2),
        table.render(),
        poll_threads(&stats.poll_threads)
    )
}

/// Formats `pollux stats --watch`: the changes between two readings, per second.
pub(super) fn rates(then: &StatsView, now: &StatsView) -> String {
    let elapsed = (now.uptime_seconds - then.uptime_seconds).max(1e-3);
    let mut table = Table::new(&[
        "PORT",
        "STATE",
        ">RX PPS",
        ">RX BIT/S",
        ">RX DROP/S",
        ">TX PPS",
        ">TX BIT/S",
        ">TX DROP/S",
    ]);
    for port in &now.ports {
        // A new port, or a port created again under the same name, counts from zero.
        let earlier = then.ports.iter().find(|other| other.name == port.name);
        let earlier = earlier
            .map(|port| port.statistics.clone())
            .unwrap_or_default();
        let rate = |now: u64, then: u64, factor: f64| {
            short(now.checked_sub(then).unwrap_or(now) as f64 * factor / elapsed)
        };
        let cells = |now: &DirectionStatistics, then: &DirectionStatistics| {
            [
                rate(now.frames, then.frames, 1.0),
                rate(now.bytes, then.bytes, 8.0),
                rate(now.dropped(), then.dropped(), 1.0),
            ]
        };
        let start = [port.name.clone(), port.state.as_str().to_string()];
        let rx = cells(&port.statistics.rx, &earlier.rx);
        let tx = cells(&port.statistics.tx, &earlier.tx);
        table.row(start.into_iter().chain(rx).chain(tx));
    }
    format!(
        "up {}, rates over {}\n\n{}\n{}",
        seconds(now.uptime_seconds),
        seconds(elapsed),
        table.render(),
        poll_threads(&now.poll_threads)
    )
}

/// Formats a line of `pollux events`.
pub(super) fn event(event: &Event) -> String {
    let kind = serde_json::to_value(event.kind).unwrap_or_default();
    let place = match (&event.port, event.queue) {
        (Some(port), Some(queue)) => format!("{port}/{queue}"),
        (Some(port), None) => port.clone(),
        (None, _) => "-".to_string(),
    };
    format!(
        "{} {} {} {}\n",
        timestamp(event.time),
        kind.as_str().unwrap_or("other"),
        escape(&place),
        escape(&event.message)
    )
}
