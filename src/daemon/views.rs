//! Builds what the API shows, from the registry.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::balance::QueueKey;
use super::control::{OVERDUE, OperationTimes};
use super::handover::Place;
use super::port::{Door, PortRecord};
use super::registry::Registry;
use crate::api::types::{
    CallMode, DirectionStatistics, FdbAdd, FdbEntry, FdbStatistics, Latency, LatencyBucket,
    MemoryPace, PollState, PollThreadView, PortCounters, PortState, PortStatistics, PortView,
    QueueRef, RingDirection, RingKind, RingState, RingView, SessionView, StatsView, UnusableMemory,
};
use crate::api::{ControlError, What};
use crate::log;
use crate::memory::Unusable;
use crate::port::PortShared;
use crate::stats::{Direction, DropReason, Histogram};
use crate::switch::fdb::Fdb;
use crate::switch::forward::UNTAGGED;
use crate::sys::call::Way;
use crate::vhost_user::{ASKED_FOR_QUEUES, RingStatus, StatusSnapshot};
use crate::wire::Mac;

/// Returns all ports.
pub(super) fn ports(registry: &Registry) -> Vec<PortView> {
    let ports = registry.ports.iter();
    ports.map(|record| port(record, &registry.fdb)).collect()
}

/// Returns a port with all details.
pub(super) fn port(record: &PortRecord, fdb: &Fdb) -> PortView {
    let status = record
        .session
        .as_ref()
        .map(|session| (session, session.status.snapshot()));
    let (state, reason) = state(record, status.as_ref().map(|(_, snapshot)| snapshot));
    let (spec, now) = (&record.shared.spec, Instant::now());
    PortView {
        name: spec.name.clone(),
        socket: spec.socket.to_string_lossy().into_owned(),
        mode: spec.mode,
        queues: record.queues,
        poll: spec.poll.clone(),
        ring_reset: spec.ring_reset,
        socket_mode: spec.socket_mode,
        socket_group: spec.socket_group.clone(),
        state,
        reason,
        session: status
            .map(|(session, snapshot)| self::session(session.since.elapsed(), &snapshot)),
        second_frontend: record.second.as_ref().map(|second| second.view(now)),
        moving_address: record.stations.moving(now),
        calls: match record.shared.calls.way() {
            Way::Deferred => CallMode::Deferred,
            Way::Batch | Way::Alone => CallMode::Direct,
        },
        memory: if record.slow.is_some() {
            MemoryPace::Slow
        } else {
            MemoryPace::Normal
        },
        memory_slow_seconds: record
            .slow
            .as_ref()
            .map(|slowness| slowness.since.elapsed().as_secs_f64()),
        statistics: statistics(&record.shared, fdb),
    }
}

/// Returns the state of a port, and in words why it does not work, if so.
fn state(record: &PortRecord, snapshot: Option<&StatusSnapshot>) -> (PortState, Option<String>) {
    let Some(snapshot) = snapshot else {
        let last = record
            .last_end
            .as_ref()
            .map(|end| format!(" (the last one: {end})"));
        let last = last.unwrap_or_default();
        return match &record.door {
            Door::Listening(_) => (
                PortState::Waiting,
                Some(format!("waiting for a frontend{last}")),
            ),
            Door::Connecting(_) => (
                PortState::Connecting,
                Some(format!(
                    "waiting for a frontend that listens on the socket{last}"
                )),
            ),
        };
    };
    if snapshot.rings.iter().any(|ring| ring.broken.is_some()) {
        return (PortState::Broken, Some(snapshot.state.clone()));
    }
    if snapshot.working {
        let unusable = snapshot.memory_unusable.first();
        let unusable = unusable.map(ToString::to_string);
        let reason = unusable.or_else(|| snapshot.memory_refused.clone());
        return (PortState::Running, reason);
    }
    // A frontend that needs more queue pairs reconnects many times a second. Its last end is then
    // the only useful reason.
    let last = record
        .last_end
        .as_ref()
        .filter(|_| snapshot.features.is_none());
    let reason = last.filter(|end| end.starts_with(ASKED_FOR_QUEUES));
    let reason = reason.unwrap_or(&snapshot.state);
    (PortState::Negotiating, Some(reason.clone()))
}

fn session(age: Duration, snapshot: &StatusSnapshot) -> SessionView {
    let protocol = VhostUserProtocolFeatures::from_bits_truncate(snapshot.protocol_features);
    SessionView {
        features: feature_names(snapshot.features.unwrap_or_default()),
        protocol_features: protocol
            .iter_names()
            .map(|(name, _)| name.to_lowercase())
            .collect(),
        memory_regions: u32::try_from(snapshot.memory_regions).unwrap_or(u32::MAX),
        memory_bytes: snapshot.memory_bytes,
        memory_unusable: snapshot.memory_unusable.iter().map(unusable).collect(),
        rings: snapshot.rings.iter().filter(is_used).map(ring).collect(),
        age_seconds: age.as_secs_f64(),
    }
}

fn unusable(region: &Unusable) -> UnusableMemory {
    UnusableMemory {
        guest_address: region.guest_addr,
        bytes: region.size,
        cause: region.cause.to_string(),
    }
}

/// Returns the names of virtio feature bits (virtio 1.2 §5.1.3 and §6). A bit without a name is
/// shown by its number.
fn feature_names(features: u64) -> Vec<String> {
    let name = |bit: u32| {
        Some(match bit {
            0 => "csum",
            1 => "guest_csum",
            3 => "mtu",
            5 => "mac",
            15 => "mrg_rxbuf",
            16 => "status",
            17 => "ctrl_vq",
            18 => "ctrl_rx",
            19 => "ctrl_vlan",
            21 => "guest_announce",
            22 => "mq",
            23 => "ctrl_mac_addr",
            24 => "notify_on_empty",
            26 => "vhost_log_all",
            27 => "any_layout",
            28 => "indirect_desc",
            29 => "event_idx",
            30 => "vhost_user_protocol_features",
            32 => "version_1",
            34 => "ring_packed",
            35 => "in_order",
            40 => "ring_reset",
            62 => "standby",
            63 => "speed_duplex",
            _ => return None,
        })
    };
    let set = (0..u64::BITS).filter(|bit| features >> bit & 1 == 1);
    set.map(|bit| name(bit).map_or_else(|| format!("bit_{bit}"), str::to_string))
        .collect()
}

/// Whether the frontend has configured or started a ring. Most frontends use fewer rings than
/// offered.
fn is_used(ring: &&RingStatus) -> bool {
    ring.size.is_some() || ring.started || ring.broken.is_some()
}

fn ring(ring: &RingStatus) -> RingView {
    RingView {
        queue: ring.ring.pair(),
        direction: if ring.ring.is_controlq {
            RingDirection::Control
        } else if ring.ring.is_receiveq() {
            RingDirection::Tx
        } else {
            RingDirection::Rx
        },
        kind: if ring.packed {
            RingKind::Packed
        } else {
            RingKind::Split
        },
        size: ring.size.map_or(0, u32::from),
        state: match (ring.broken, ring.started) {
            (Some(_), _) => RingState::Broken,
            (None, true) => RingState::Running,
            (None, false) => RingState::Stopped,
        },
        broken_reason: ring.broken.map(|broken| broken.to_string()),
        enabled: ring.enabled,
        unserved: ring.left_out,
        no_record: ring.no_record.as_ref().map(ToString::to_string),
        position: ring.position.map_or(0, u64::from),
    }
}

fn statistics(port: &PortShared, fdb: &Fdb) -> PortStatistics {
    let totals = port.stats.sum();
    let drops = |direction: Direction| -> BTreeMap<String, u64> {
        let of = DropReason::ALL
            .into_iter()
            .filter(|reason| reason.direction() == direction);
        of.filter_map(|reason| {
            let count = *totals.drops.get(reason.name())?;
            (count > 0).then(|| (reason.name().to_string(), count))
        })
        .collect()
    };
    PortStatistics {
        rx: DirectionStatistics {
            frames: totals.rx_frames,
            bytes: totals.rx_bytes,
            drops: drops(Direction::Rx),
        },
        tx: DirectionStatistics {
            frames: totals.tx_frames,
            bytes: totals.tx_bytes,
            drops: drops(Direction::Tx),
        },
        bad_buffers: totals.bad_buffers,
        unusable_buffers: totals.unusable_buffers,
        moved_addresses: fdb.moves_to(port.reference),
        slow_calls: port.calls.slow(),
        deferred_calls: port.calls.deferred(),
        paced_messages: port.paced_messages.load(Ordering::Relaxed),
        slow_faults: port.pages.faults(),
        slow_fault_seconds: port.pages.cost().as_secs_f64(),
    }
}

/// Returns the forwarding table, sorted by address.
pub(super) fn fdb(registry: &Registry) -> Vec<FdbEntry> {
    let mut entries: Vec<FdbEntry> = registry
        .fdb
        .entries(registry.now_s())
        .into_iter()
        .filter_map(|entry| {
            // Skips entries of a removed port, which are about to go.
            let port = registry
                .ports
                .iter()
                .find(|port| port.shared.reference == entry.port)?;
            Some(FdbEntry {
                mac: entry.mac,
                port: port.shared.spec.name.clone(),
                age_seconds: f64::from(entry.age_s),
                is_static: entry.is_static,
            })
        })
        .collect();
    entries.sort_by_key(|entry| entry.mac);
    entries
}

/// Adds a static address. Returns its entry.
pub(super) fn fdb_add(registry: &mut Registry, add: FdbAdd) -> Result<FdbEntry, ControlError> {
    let record = registry
        .find(&add.port)
        .ok_or_else(|| ControlError::no_port(&add.port))?;
    let port = record.shared.reference;
    let conflict = |text| ControlError::Conflict { text };
    if let Some(other) = registry.fdb.static_port(UNTAGGED, add.mac)
        && !add.replace
    {
        let other = registry.names.of(other);
        return Err(conflict(format!(
            "{} has a static entry already, on port {other:?}; --replace (in the API \
             \"replace\": true) puts another in its place",
            add.mac
        )));
    }
    let inserted = registry.fdb.insert_static(UNTAGGED, add.mac, port);
    inserted.map_err(|error| conflict(error.to_string()))?;
    Ok(FdbEntry {
        mac: add.mac,
        port: add.port,
        age_seconds: 0.0,
        is_static: true,
    })
}

/// Removes the entry of an address. Returns an error if there is none.
pub(super) fn fdb_remove(registry: &mut Registry, mac: Mac) -> Result<(), ControlError> {
    if !registry.fdb.remove(UNTAGGED, mac) {
        return Err(ControlError::NotFound {
            what: What::Address(mac),
        });
    }
    registry.touch();
    Ok(())
}

/// Forgets learned addresses, of one port if given. Returns how many.
pub(super) fn fdb_flush(registry: &mut Registry, port: Option<&str>) -> Result<u64, ControlError> {
    let only = match port {
        None => None,
        Some(name) => {
            let record = registry
                .find(name)
                .ok_or_else(|| ControlError::no_port(name))?;
            Some(record.shared.reference)
        }
    };
    let removed = registry.fdb.flush(only, true);
    registry.touch();
    Ok(removed as u64)
}

/// Returns all poll threads and the queues that they serve.
pub(super) fn poll_threads(registry: &Registry) -> Vec<PollThreadView> {
    let numbers = registry.polls.threads.keys();
    numbers.map(|index| poll_thread(registry, *index)).collect()
}

/// Returns an existing poll thread.
pub(super) fn poll_thread(registry: &Registry, index: usize) -> PollThreadView {
    let thread = &registry.polls.threads[&index];
    let stats = &thread.shared.stats;
    let acknowledged = registry.acknowledgements.of(index);
    let total = stats.total_ns.get();
    let waited = registry.unacknowledged(index).map(|since| since.elapsed());
    let overdue = waited.filter(|waited| *waited >= OVERDUE);
    let mut queues = Vec::new();
    for port in &registry.ports {
        for (queue, _) in port.transmit_queues() {
            if port.placement.get(usize::from(queue)) == Some(&Place::On(index)) {
                let key = QueueKey {
                    port: port.shared.reference,
                    pair: queue,
                };
                queues.push(QueueRef {
                    port: port.shared.spec.name.clone(),
                    queue,
                    load: registry.loads.queue(key),
                });
            }
        }
    }
    PollThreadView {
        thread: index as u32,
        cpu: thread.cpu.map(|cpu| cpu as u32),
        numa_node: thread.node.map(|node| node as u32),
        tid: thread.tid.load(Ordering::Relaxed),
        state: match acknowledged {
            None => PollState::Asleep,
            Some(_) if overdue.is_some() => PollState::Overdue,
            Some(_) => PollState::Busy,
        },
        slow_ports: thread.shared.is_slow(),
        slow_faults: stats.slow_faults.get(),
        slow_fault_seconds: stats.slow_faults_ns.get() as f64 / 1e9,
        idle: thread.shared.idle(),
        overdue_seconds: overdue.map(|waited| waited.as_secs_f64()),
        passes: stats.passes.get(),
        busy_seconds: stats.busy_ns.get() as f64 / 1e9,
        busy_ratio: if total == 0 {
            0.0
        } else {
            stats.busy_ns.get() as f64 / total as f64
        },
        recent_busy_ratio: registry.loads.busy(index),
        frames: stats.frames.get(),
        sleeps: stats.sleeps.get(),
        generation: registry.generation(),
        acknowledged_generation: acknowledged.unwrap_or(registry.generation()),
        queues,
        off_cpu_seconds: stats.off_cpu_ns.get() as f64 / 1e9,
        pass_length: latency(&stats.pass_ns),
        takeover_length: latency(&stats.takeover_ns),
        acknowledge_latency: latency(&stats.acknowledge_ns),
    }
}

fn latency(histogram: &Histogram) -> Option<Latency> {
    let max_ns = histogram.max();
    let counts = histogram.counts();
    let count: u64 = counts.iter().sum();
    let quantile = |share: f64| {
        let wanted = (count as f64 * share).ceil() as u64;
        let mut seen = 0;
        let bucket = counts.iter().position(|n| {
            seen += n;
            seen >= wanted
        });
        let bound = bucket.and_then(Histogram::upper_bound).unwrap_or(max_ns);
        bound.min(max_ns) as f64 / 1e9
    };
    let bucket = |(i, count): (usize, &u64)| {
        let bound = Histogram::upper_bound(i).unwrap_or(max_ns);
        (*count > 0).then_some(LatencyBucket {
            up_to_seconds: bound as f64 / 1e9,
            count: *count,
        })
    };
    (count > 0).then(|| Latency {
        count,
        p50_seconds: quantile(0.5),
        p99_seconds: quantile(0.99),
        p999_seconds: quantile(0.999),
        max_seconds: max_ns as f64 / 1e9,
        buckets: counts.iter().enumerate().filter_map(bucket).collect(),
    })
}

/// Returns all counters.
pub(super) fn stats(registry: &Registry, times: &OperationTimes, uptime: Duration) -> StatsView {
    let counters = |record: &PortRecord| {
        let snapshot = record
            .session
            .as_ref()
            .map(|session| session.status.snapshot());
        PortCounters {
            name: record.shared.spec.name.clone(),
            state: state(record, snapshot.as_ref()).0,
            statistics: statistics(&record.shared, &registry.fdb),
        }
    };
    let happened = registry.fdb.happened();
    StatsView {
        uptime_seconds: uptime.as_secs_f64(),
        generation: registry.generation(),
        fdb: FdbStatistics {
            entries: registry.fdb.len() as u64,
            capacity: registry.fdb_capacity as u64,
            counters: happened.map(|(name, n)| (name.to_string(), n)).into(),
        },
        ports: registry.ports.iter().map(counters).collect(),
        poll_threads: poll_threads(registry),
        port_add: latency(&times.port_add),
        port_remove: latency(&times.port_remove),
        log_lines_lost: log::lost_lines(),
    }
}
