//! The client commands: each makes one request and prints its answer.

use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::args::{Command, FdbCommand, Output, PollCommand, PollSetting, PortCommand};
use super::text::{print, takes_escapes};
use super::{EXIT_INTERNAL, EXIT_NO_DAEMON, Failure, observe, views};
use crate::api::client::{Answer, Client, ClientError};
use crate::api::types::{
    Event, EventKind, FdbAdd, FdbEntry, Flushed, Moved, PollAdd, PollMove, PollSettingsPatch,
    PollThreadView, PortPatch, PortView, StatsView,
};
use crate::config::{PortSpec, count};

/// Executes `command` against the daemon on `socket`.
pub(super) fn execute(command: Command, socket: PathBuf) -> Result<(), Failure> {
    let client = Client::new(socket);
    match command {
        Command::Port(command) => port(&client, command),
        Command::Fdb(command) => fdb(&client, command),
        Command::Stats { watch, output } => stats(&client, watch, output),
        Command::Poll(command) => poll(&client, command),
        Command::Events(output) => events(&client, output),
        Command::Capture(args) => observe::capture(&client, &args),
        Command::Trace {
            port,
            count,
            output,
        } => observe::trace(&client, &port, count, output),
        Command::Mirror(command) => observe::mirror(&client, command),
        Command::Extcap(args) => observe::extcap(&client, &args),
        Command::Run(_) | Command::Bench(_) | Command::Completions { .. } | Command::Man { .. } => {
            Err(Failure::internal(
                "this command needs no daemon and was sent to one",
            ))
        }
    }
}

fn port(client: &Client, command: PortCommand) -> Result<(), Failure> {
    match command {
        PortCommand::Add { spec, may_exist } => add_port(client, spec, may_exist),
        PortCommand::Remove { name, if_exists } => {
            let result = client.delete(&port_target(&name)?);
            absent_is_fine(result, if_exists)
        }
        PortCommand::Set { name, settings } => {
            let mut patch = PortPatch::default();
            for setting in settings {
                setting.apply(&mut patch)?;
            }
            client.patch(&port_target(&name)?, &patch)?;
            Ok(())
        }
        PortCommand::List(output) => show(client, "/v1/ports", output, |ports: &Vec<PortView>| {
            views::ports(ports)
        }),
        PortCommand::Show { name, output } => {
            show(client, &port_target(&name)?, output, views::port)
        }
    }
}

/// Makes the path of a port's socket absolute, because the daemon has another working directory.
pub(super) fn make_absolute(spec: &mut PortSpec) -> Result<(), Failure> {
    spec.socket = std::path::absolute(&spec.socket).map_err(|error| {
        Failure::bad_arguments(format!("socket path {:?}: {error}", spec.socket))
    })?;
    spec.validate()
        .map_err(|error| Failure::bad_arguments(error.to_string()))
}

fn add_port(client: &Client, mut spec: PortSpec, may_exist: bool) -> Result<(), Failure> {
    make_absolute(&mut spec)?;
    client.post(&format!("/v1/ports?may_exist={may_exist}"), &spec)?;
    Ok(())
}

fn fdb(client: &Client, command: FdbCommand) -> Result<(), Failure> {
    match command {
        FdbCommand::List(output) => show(client, "/v1/fdb", output, |entries: &Vec<FdbEntry>| {
            views::fdb(entries)
        }),
        FdbCommand::Add { mac, port, replace } => {
            client.post("/v1/fdb", &FdbAdd { mac, port, replace })?;
            Ok(())
        }
        FdbCommand::Remove { mac, if_exists } => {
            let result = client.delete(&format!("/v1/fdb?mac={mac}"));
            absent_is_fine(result, if_exists)
        }
        FdbCommand::Flush { port } => {
            let target = match port {
                Some(port) => format!("/v1/fdb?port={}", encode(&port)),
                None => "/v1/fdb".to_string(),
            };
            let Flushed { removed } = client.delete(&target)?.read()?;
            let entries = match removed {
                1 => "1 entry".to_string(),
                removed => format!("{removed} entries"),
            };
            print(&format!("{entries} removed\n"))
        }
    }
}

fn poll(client: &Client, command: PollCommand) -> Result<(), Failure> {
    match command {
        PollCommand::List(output) => show(
            client,
            "/v1/poll",
            output,
            |threads: &Vec<PollThreadView>| views::poll_threads(threads),
        ),
        PollCommand::Add { cpu, idle } => {
            let added: PollThreadView = client.post("/v1/poll", &PollAdd { cpu, idle })?.read()?;
            print(&format!("poll thread {} started\n", added.thread))
        }
        PollCommand::Remove { thread } => {
            client.delete(&format!("/v1/poll/{thread}"))?;
            Ok(())
        }
        PollCommand::Move { queue, thread } => {
            let order = PollMove {
                port: queue.port,
                queue: queue.queue,
                thread,
            };
            let Moved { queues } = client.post("/v1/poll/moves", &order)?.read()?;
            print(&format!("{} moved\n", count(queues.into(), "queue")))
        }
        PollCommand::Set {
            settings,
            thread,
            output,
        } => {
            let patch = poll_patch(&settings, thread)?;
            let answer = client.patch("/v1/poll", &patch)?;
            if output.json {
                return print(&format!("{}\n", answer.value()?));
            }
            print(&views::poll_settings(&answer.read()?))
        }
    }
}

fn poll_patch(settings: &[PollSetting], thread: Option<u32>) -> Result<PollSettingsPatch, Failure> {
    let mut patch = PollSettingsPatch {
        thread,
        ..Default::default()
    };
    for setting in settings {
        let again = match setting {
            PollSetting::Rebalance(rebalance) => patch.rebalance.replace(*rebalance).is_some(),
            PollSetting::Idle(idle) => patch.idle.replace(*idle).is_some(),
        };
        once(again)?;
    }
    if thread.is_some() && patch.idle.is_none() {
        let text = "--thread is for idle=POLICY, which is missing".to_string();
        return Err(Failure::bad_arguments(text));
    }
    Ok(patch)
}

/// Returns an error if a setting was given before (`again`), because it is unclear which value is
/// meant.
pub(super) fn once(again: bool) -> Result<(), Failure> {
    match again {
        true => Err(Failure::bad_arguments("each setting may be given once")),
        false => Ok(()),
    }
}

fn stats(client: &Client, watch: Option<u64>, output: Output) -> Result<(), Failure> {
    let Some(seconds) = watch else {
        return show(client, "/v1/stats", output, views::stats);
    };
    let clear = takes_escapes(&io::stdout());
    let mut before: Option<StatsView> = None;
    loop {
        let answer = client.get("/v1/stats")?;
        if output.json {
            print(&format!("{}\n", answer.value()?))?;
        } else {
            let now: StatsView = answer.read()?;
            // A daemon that was restarted meanwhile counts from zero again.
            let earlier = before.filter(|then| then.uptime_seconds < now.uptime_seconds);
            let text = match &earlier {
                Some(then) => views::rates(then, &now),
                None => views::stats(&now),
            };
            let (start, end) = if clear {
                ("\x1b[H\x1b[2J", "")
            } else {
                ("", "\n")
            };
            print(&format!("{start}{text}{end}"))?;
            before = Some(now);
        }
        sleep(Duration::from_secs(seconds));
    }
}

fn events(client: &Client, output: Output) -> Result<(), Failure> {
    // A stream that this command has not ended was ended by a daemon that has gone, as with
    // captures.
    let mut outcome = Err(Failure::new(EXIT_NO_DAEMON, "the events broke off"));
    client.stream_lines("/v1/events", |line| {
        let (text, last) = match serde_json::from_str::<Event>(line) {
            Ok(event) if output.json => (format!("{line}\n"), event.kind),
            Ok(event) => (views::event(&event), event.kind),
            // A later version may send other lines. They are printed unchanged.
            Err(_) => (format!("{line}\n"), EventKind::Other),
        };
        if let Err(error) = print(&text) {
            outcome = Err(error);
            return ControlFlow::Break(());
        }
        let (code, why) = match last {
            EventKind::TooSlow => (
                EXIT_INTERNAL,
                "events came faster than they were read; the stream was ended",
            ),
            EventKind::Stopping => (EXIT_NO_DAEMON, "the daemon stops"),
            _ => return ControlFlow::Continue(()),
        };
        outcome = Err(Failure::new(code, why));
        ControlFlow::Break(())
    })?;
    outcome
}

/// Gets `target` and prints it as JSON, or as `table` formats it.
pub(super) fn show<T: DeserializeOwned>(
    client: &Client,
    target: &str,
    output: Output,
    table: impl FnOnce(&T) -> String,
) -> Result<(), Failure> {
    let answer = client.get(target)?;
    if !output.json {
        return print(&table(&answer.read()?));
    }
    let text = serde_json::to_string_pretty(&answer.value()?)
        .map_err(|error| Failure::internal(error.to_string()))?;
    print(&format!("{text}\n"))
}

pub(super) fn absent_is_fine(
    result: Result<Answer, ClientError>,
    if_exists: bool,
) -> Result<(), Failure> {
    match result {
        Ok(_) => Ok(()),
        Err(ClientError::Refused { error, .. })
            if if_exists && matches!(error.code.as_str(), "not_found" | "gone") =>
        {
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

fn port_target(name: &str) -> Result<String, Failure> {
    if name.is_empty() {
        return Err(Failure::bad_arguments("the name of a port is needed"));
    }
    Ok(format!("/v1/ports/{}", encode(name)))
}

/// Percent-encodes all characters that are not plain in a URL.
pub(super) fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.') {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_place_in_a_url() {
        assert_eq!(encode("vm-1.a_b"), "vm-1.a_b");
        assert_eq!(encode("a/b?c=ü "), "a%2Fb%3Fc%3D%C3%BC%20");
        assert!(port_target("").is_err());
    }
}
