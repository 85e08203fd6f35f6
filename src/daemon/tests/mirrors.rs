//! Mirrors that end while they are added: what the answer says of it.

use crossbeam_channel::unbounded;

use crate::api::types::{MirrorAdd, ObserverView};
use crate::api::{Control, ControlError, What};
use crate::config::{DaemonConfig, MAX_SNAPLEN, ObserveDirection};
use crate::daemon::Daemon;
use crate::daemon::command::Command;
use crate::daemon::handle::Handle;
use crate::memory::fence;

fn order() -> MirrorAdd {
    MirrorAdd {
        name: "m".to_string(),
        from: vec!["a".to_string(), "b".to_string()],
        to: "to".to_string(),
        direction: ObserveDirection::Both,
        snaplen: MAX_SNAPLEN,
    }
}

/// A handle of the daemon that does something before it asks for the observers: what is added is
/// there then.
fn interrupted(daemon: &Daemon, meanwhile: impl Fn(&Handle) + Send + 'static) -> Handle {
    let (commands, taken) = unbounded();
    let own = Handle {
        commands,
        ..daemon.handle().clone()
    };
    let handle = daemon.handle().clone();
    // Ends with `own`.
    std::thread::spawn(move || {
        for command in taken {
            if matches!(command, Command::Observers(_)) {
                meanwhile(&handle);
            }
            handle.tell(command).unwrap();
        }
    });
    own
}

/// The answer to [`order`].
fn added(meanwhile: impl Fn(&Handle) + Send + 'static) -> Result<ObserverView, ControlError> {
    fence::install().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&DaemonConfig::default()).unwrap();
    for name in ["a", "b", "to"] {
        let spec = format!("{name},socket={}", dir.path().join(name).display());
        let spec = spec.parse().unwrap();
        daemon.handle().add_port(spec, false).unwrap();
    }
    interrupted(&daemon, meanwhile).mirror_add(order())
}

fn gone(answer: Result<ObserverView, ControlError>) -> What {
    match answer {
        Err(ControlError::Gone { what }) => what,
        other => panic!("{other:?}"),
    }
}

fn port(name: &str) -> What {
    What::Port(name.to_string())
}

#[test]
fn a_mirror_that_goes_with_a_port_while_it_is_added_names_that_port() {
    let answer = added(|handle| handle.remove_port("to").unwrap());
    assert_eq!(gone(answer), port("to"));
    let answer = added(|handle| {
        handle.remove_port("b").unwrap();
        handle.remove_port("a").unwrap();
    });
    assert_eq!(gone(answer), port("a"));
    // It has something to do without one of its ports.
    let answer = added(|handle| handle.remove_port("a").unwrap());
    assert_eq!(answer.unwrap().name, "m");
}

#[test]
fn a_mirror_that_is_removed_while_it_is_added_is_no_ports_fault_and_no_other_ones_answer() {
    let mirror = What::Mirror("m".to_string());
    let answer = added(|handle| {
        handle.remove_port("a").unwrap();
        handle.mirror_remove("m").unwrap();
        handle.remove_port("to").unwrap();
    });
    assert_eq!(gone(answer), mirror);
    let answer = added(|handle| {
        handle.mirror_remove("m").unwrap();
        handle.mirror_add(order()).unwrap();
    });
    assert_eq!(gone(answer), mirror);
}
