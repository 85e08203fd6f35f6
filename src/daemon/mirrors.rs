//! Adds mirrors.

use super::handle::Handle;
use super::observers::{ObserverRecord, PORT_REMOVED};
use super::streams::{ONLY_CAPTURES, bad, prospect, register, wait_seen};
use crate::api::types::{MirrorAdd, ObserverView};
use crate::api::{Control, ControlError, What};
use crate::config::{ALL_PORTS, MAX_PORT_NAME, MAX_SNAPLEN, is_name};
use crate::observe::{Filter, Kind, Observer, ObserverSpec};

/// Smallest number of bytes that a mirror copies of a frame: an Ethernet header.
const MIN_COPY: u32 = 14;

/// Checks whether the ports that a mirror names are allowed.
fn check_ports(order: &MirrorAdd) -> Result<(), ControlError> {
    let MirrorAdd { from, to, .. } = order;
    if from.is_empty() {
        return bad("a mirror needs a port to copy the frames of".to_string());
    }
    if from.iter().chain([to]).any(|port| port == ALL_PORTS) {
        return bad(format!("a mirror names each of its ports; {ONLY_CAPTURES}"));
    }
    if from.contains(to) {
        return bad(format!(
            "port {to:?} cannot get copies of its own frames: they would be delivered to it twice"
        ));
    }
    let mut earlier = Vec::new();
    for port in from {
        if earlier.contains(&port) {
            return bad(format!("port {port:?} is named twice"));
        }
        earlier.push(port);
    }
    Ok(())
}

/// Adds a mirror. Frames are mirrored when this returns.
pub(super) fn add_mirror(handle: &Handle, order: &MirrorAdd) -> Result<ObserverView, ControlError> {
    if !is_name(&order.name) {
        return bad(format!(
            "mirror name {:?}: use 1 to {MAX_PORT_NAME} letters, digits, '-', '_' or '.'",
            order.name
        ));
    }
    if !(MIN_COPY..=MAX_SNAPLEN).contains(&order.snaplen) {
        let text = format!(
            "snaplen {}: {MIN_COPY} to {MAX_SNAPLEN} bytes",
            order.snaplen
        );
        return bad(text);
    }
    check_ports(order)?;
    let (from, to) = (order.from.clone(), order.to.clone());
    let prospect = prospect(handle, Some(from.clone()), Some(to.clone()))?;
    let (Some(ports), Some(destination)) = (prospect.ports, prospect.to) else {
        return Err(ControlError::no_port(&order.to));
    };
    let spec = ObserverSpec {
        kind: Kind::Mirror(destination),
        ports: Some(ports.into()),
        direction: order.direction,
        snaplen: order.snaplen,
        filter: Filter::default(),
    };
    let observer = Observer::mirror(spec, prospect.threads.iter().copied());
    let record = ObserverRecord {
        name: order.name.clone(),
        observer: observer.clone(),
        ports: from,
        to: Some(to),
    };
    let (name, generation) = register(handle, record)?;
    wait_seen(handle, generation);
    let mut views = handle.observers()?.into_iter();
    let view = views.find(|view| view.name == name);
    // The mirror may have ended meanwhile, and another one may have its name by now.
    let view = view.filter(|_| !observer.has_ended());
    view.ok_or_else(|| {
        let to_is_gone = !handle.names.present().contains(&destination);
        // The reason is enough here, so there is no wait for writers: `|_| true`.
        let what = match observer.settled_end(|_| true) {
            Some(PORT_REMOVED) if to_is_gone => What::Port(order.to.clone()),
            // All ports that it copies from are gone.
            Some(PORT_REMOVED) => What::Port(order.from[0].clone()),
            _ => What::Mirror(name),
        };
        ControlError::Gone { what }
    })
}
