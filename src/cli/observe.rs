//! `pollux capture`, `trace`, `mirror` and `extcap`.

use std::ops::ControlFlow;
use std::path::Path;

use super::args::{CaptureArgs, ExtcapArgs, MirrorCommand, Output, WatchArgs};
use super::blocks::{Blocks, Files, Sink};
use super::commands::{absent_is_fine, encode, show};
use super::text::{Table, escape, note, print, timestamp};
use super::{EXIT_NO_DAEMON, EXIT_NOT_FOUND, Failure};
use crate::api::client::{CaptureEnd, Client};
use crate::api::types::{MirrorAdd, ObserverView, PortView, TraceFrame, TraceLine};
use crate::config::{ALL_PORTS, MAX_SNAPLEN, count};

pub(super) fn capture(client: &Client, args: &CaptureArgs) -> Result<(), Failure> {
    let to_stdout = args.write.as_deref() == Some(Path::new("-"));
    if to_stdout && args.rotate.is_some() {
        let text = "--rotate is for files, and -w - is standard output";
        return Err(Failure::bad_arguments(text));
    }
    let sink = match &args.write {
        None => Sink::Lines { json: args.json },
        Some(_) if to_stdout => Sink::Stdout,
        Some(path) => Sink::Files(Files::create(path, args.rotate, args.keep)?),
    };
    let said = receive(client, &args.port, &args.watch, sink, |name| {
        note(&format!("pollux: {name} has begun; Ctrl-C ends it\n"));
    })?;
    note(&format!("pollux: {}\n", escape(&said)));
    Ok(())
}

/// Returns the text to print after a capture that ended as it should, else the failure.
fn outcome(blocks: &Blocks, name: &str, port: &str, end: CaptureEnd) -> Result<String, Failure> {
    let frames = count(blocks.frames, "frame");
    let text = format!("{frames} captured, {} missed", blocks.missed);
    match (blocks.ended.as_deref(), end) {
        (Some(why @ "port removed"), _) => {
            let text = format!("{why}: {port}; {text}");
            Err(Failure::new(EXIT_NOT_FOUND, text))
        }
        (Some(why @ "the daemon stops"), _) => {
            Err(Failure::new(EXIT_NO_DAEMON, format!("{why}; {text}")))
        }
        (Some(why), _) => Ok(format!("{name} has ended ({why}): {text}")),
        // The user asked for the end, so no reason is printed.
        (None, CaptureEnd::BrokenOff) => Ok(format!("{name} was broken off: {frames} captured")),
        (None, CaptureEnd::Whole) => {
            let text = format!("the capture broke off; {frames} captured");
            Err(Failure::new(EXIT_NO_DAEMON, text))
        }
    }
}

/// Receives a capture to its end. Returns the text to print.
fn receive(
    client: &Client,
    port: &str,
    watch: &WatchArgs,
    sink: Sink,
    begun: impl FnOnce(&str),
) -> Result<String, Failure> {
    let mut target = format!(
        "/v1/capture?direction={}&drops={}&snaplen={}",
        watch.direction, watch.drops, watch.snaplen
    );
    if port != ALL_PORTS {
        target.push_str(&format!("&port={}", encode(port)));
    }
    if let Some(filter) = &watch.filter {
        target.push_str(&format!("&filter={}", encode(filter)));
    }
    for (key, value) in [("count", watch.count), ("seconds", watch.seconds)] {
        if let Some(value) = value {
            target.push_str(&format!("&{key}={value}"));
        }
    }
    let (mut blocks, mut failure, mut name) = (Blocks::new(sink), None, String::new());
    let end = client.stream_bytes(
        &target,
        |observer| {
            name = observer.to_string();
            begun(observer);
        },
        |chunk| match blocks.take(chunk) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        },
    )?;
    failure.map_or_else(|| outcome(&blocks, &name, port, end), Err)
}

pub(super) fn trace(
    client: &Client,
    port: &str,
    count: u64,
    output: Output,
) -> Result<(), Failure> {
    let target = format!("/v1/trace?port={}&count={count}", encode(port));
    let broken = Failure::new(EXIT_NO_DAEMON, "the trace broke off".to_string());
    let mut outcome = Err(broken);
    client.stream_lines(&target, |line| {
        let (text, end) = match serde_json::from_str::<TraceLine>(line) {
            Ok(TraceLine::Frame(_)) if output.json => (format!("{line}\n"), None),
            Ok(TraceLine::Frame(frame)) => (traced(&frame), None),
            Ok(TraceLine::End { reason, missed, .. }) => {
                let text = if output.json {
                    format!("{line}\n")
                } else {
                    String::new()
                };
                (text, Some((reason, missed)))
            }
            // A later version may send other lines. They are printed unchanged.
            Err(_) => (format!("{line}\n"), None),
        };
        if let Err(error) = print(&text) {
            outcome = Err(error);
            return ControlFlow::Break(());
        }
        let Some((reason, missed)) = end else {
            return ControlFlow::Continue(());
        };
        if missed > 0 {
            let steps = match missed {
                1 => "1 step was".to_string(),
                missed => format!("{missed} steps were"),
            };
            note(&format!(
                "pollux: {steps} not seen; lines may be incomplete\n"
            ));
        }
        outcome = match reason.as_str() {
            "port removed" => Err(Failure::new(EXIT_NOT_FOUND, format!("{reason}: {port}"))),
            "the daemon stops" => Err(Failure::new(EXIT_NO_DAEMON, reason)),
            _ => Ok(()),
        };
        ControlFlow::Break(())
    })?;
    outcome
}

/// Formats the way of a frame on one line.
fn traced(frame: &TraceFrame) -> String {
    let place = |port: &str, queue: Option<u16>| match queue {
        Some(queue) => format!("{port}:{queue}"),
        None => port.to_string(),
    };
    let outcomes = frame.outcomes.iter().map(|one| {
        let place = place(&one.port, one.queue);
        match one.outcome.as_str() {
            "delivered" => format!("{place} delivered"),
            reason => format!("{place} dropped ({reason})"),
        }
    });
    let outcomes = match outcomes.collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => "outcome not seen".to_string(),
        outcomes => outcomes,
    };
    let learned = frame.learned.as_deref().unwrap_or("nothing");
    let lookup = match frame.lookup.as_deref() {
        None => "unknown".to_string(),
        Some(port) if port == frame.port => format!("{port} (its own)"),
        Some(port) => port.to_string(),
    };
    let line = format!(
        "{} {} | {} | learned: {learned} | destination: {lookup} | {} | {outcomes}",
        timestamp(frame.time),
        place(&frame.port, frame.queue),
        frame.summary,
        frame.verdict
    );
    format!("{}\n", escape(&line))
}

pub(super) fn mirror(client: &Client, command: MirrorCommand) -> Result<(), Failure> {
    match command {
        MirrorCommand::Add {
            name,
            from,
            to,
            direction,
            snaplen,
        } => {
            let order = MirrorAdd {
                name,
                from,
                to,
                direction,
                snaplen,
            };
            client.post("/v1/mirrors", &order)?;
            Ok(())
        }
        MirrorCommand::Remove { name, if_exists } => {
            if name.is_empty() {
                return Err(Failure::bad_arguments("the name of a mirror is needed"));
            }
            let result = client.delete(&format!("/v1/mirrors/{}", encode(&name)));
            absent_is_fine(result, if_exists)
        }
        MirrorCommand::List(output) => show(
            client,
            "/v1/mirrors",
            output,
            |mirrors: &Vec<ObserverView>| mirror_table(mirrors),
        ),
    }
}

fn mirror_table(mirrors: &[ObserverView]) -> String {
    let columns = [
        "NAME",
        "FROM",
        "TO",
        "DIRECTION",
        ">SNAPLEN",
        ">COPIES",
        ">MISSED",
    ];
    let mut table = Table::new(&columns);
    for mirror in mirrors {
        table.row([
            mirror.name.clone(),
            mirror.ports.join(","),
            mirror.to.clone().unwrap_or_default(),
            mirror.direction.to_string(),
            match mirror.snaplen {
                MAX_SNAPLEN => "all".to_string(),
                snaplen => snaplen.to_string(),
            },
            mirror.statistics.captured.to_string(),
            mirror.statistics.missed.to_string(),
        ]);
    }
    table.render()
}

/// Prefix of a port's name, or of [`ALL_PORTS`], in the names of Wireshark's interfaces.
const PREFIX: &str = "pollux-";

/// Answers the requests of Wireshark to a program in its extcap directory.
pub(super) fn extcap(client: &Client, args: &ExtcapArgs) -> Result<(), Failure> {
    if args.extcap_interfaces {
        return print(&interfaces(client));
    }
    let Some(interface) = &args.extcap_interface else {
        return Err(Failure::bad_arguments(
            "extcap: --extcap-interfaces, or --extcap-interface NAME and what to do with it",
        ));
    };
    if args.extcap_dlts {
        return print("dlt {number=1}{name=EN10MB}{display=Ethernet}\n");
    }
    if args.extcap_config {
        return print(&format!(
            "arg {{number=0}}{{call=--direction}}{{display=Direction, from the switch's view}}\
             {{type=selector}}\n\
             value {{arg=0}}{{value=both}}{{display=both}}{{default=true}}\n\
             value {{arg=0}}{{value=rx}}{{display=rx: sent by the guest}}{{default=false}}\n\
             value {{arg=0}}{{value=tx}}{{display=tx: delivered to the guest}}{{default=false}}\n\
             arg {{number=1}}{{call=--drops}}{{display=Dropped frames only}}{{type=boolflag}}\n\
             arg {{number=2}}{{call=--snaplen}}{{display=Bytes kept of each frame}}{{type=integer}}\
             {{range=1,{MAX_SNAPLEN}}}{{default={MAX_SNAPLEN}}}\n"
        ));
    }
    let (true, Some(fifo)) = (args.capture, &args.fifo) else {
        // Wireshark asks whether a filter is valid. No output means yes. The capture itself reports
        // what is wrong with a filter.
        return Ok(());
    };
    let port = interface.strip_prefix(PREFIX).unwrap_or(interface);
    let watch = WatchArgs {
        direction: args.direction,
        drops: args.drops,
        snaplen: args.snaplen,
        filter: args.extcap_capture_filter.clone(),
        count: None,
        seconds: None,
    };
    let sink = Sink::Files(Files::create(fifo, None, None)?);
    receive(client, port, &watch, sink, |_| {})?;
    Ok(())
}

fn interfaces(client: &Client) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let mut text = format!("extcap {{version={version}}}\n");
    // Without a daemon there is no interface. This is no error for Wireshark.
    let ports = client.get("/v1/ports").and_then(|answer| answer.read());
    let ports: Vec<PortView> = ports.unwrap_or_default();
    let mut add = |name: &str, display: &str| {
        text.push_str(&format!(
            "interface {{value={PREFIX}{name}}}{{display={display}}}\n"
        ));
    };
    if !ports.is_empty() {
        add(ALL_PORTS, "Pollux: all ports");
    }
    for port in &ports {
        add(&port.name, &format!("Pollux: port {}", port.name));
    }
    text
}
