//! Queues of ports whose memory is slow to touch change hands, in scripted threads.

use super::*;
use crate::daemon::handover::Place;
use crate::poll::PollShared;

const NAME: &str = "victim";

/// Poll threads 0 and 1, poll-slow as thread 2, and a port on thread 0 or 1.
fn script() -> Script {
    let mut script = Script::new(0);
    let reader = script
        .registry
        .polls
        .start_scripted(PollShared::slow().unwrap());
    script.registry.slow.thread = Some(reader.index());
    script.threads.insert(reader.index(), reader);
    script.register_as(NAME.to_string(), false);
    script
}

fn places(script: &Script) -> &[Place] {
    &script.registry.ports[0].placement
}

/// The threads take the newest view over.
fn look(script: &mut Script, threads: &[usize]) {
    for thread in threads {
        let reader = script.threads.get_mut(thread).unwrap();
        let _ = reader.borrow().generation();
    }
}

#[test]
fn a_queue_changes_hands_while_the_thread_of_slow_ports_waits_in_a_page_fault() {
    let mut script = script();
    look(&mut script, &[0, 1, 2]);
    let from = places(&script)[0].thread();
    let (reply, moved) = bounded(1);
    let ordered = script
        .registry
        .move_queues(NAME, None, 1 - from, Some(reply));
    assert!(ordered.is_ok());
    script.registry.publish();
    script.registry.finish_moves();
    assert!(moved.try_recv().is_err(), "its owner has not let go");
    look(&mut script, &[0, 1]);
    script.registry.finish_moves();
    assert!(moved.try_recv().unwrap().is_ok());
    // From the thread of slow ports it comes only once that has let go.
    script.registry.slow_down(0).unwrap();
    script.registry.publish();
    look(&mut script, &[0, 1]);
    script.registry.finish_moves();
    assert_eq!(places(&script)[0], Place::On(2));
    look(&mut script, &[0, 1, 2]);
    script.registry.send_back(0);
    look(&mut script, &[0, 1]);
    script.registry.finish_moves();
    assert_eq!(places(&script)[0], Place::Between { to: 1 - from });
    look(&mut script, &[2]);
    script.registry.finish_moves();
    assert_eq!(places(&script)[0], Place::On(1 - from));
}

#[test]
fn a_thread_that_ends_gives_away_the_queues_of_a_port_on_its_way_back() {
    let mut script = script();
    let home = places(&script)[0].thread();
    script.registry.slow_down(0).unwrap();
    script.registry.publish();
    look(&mut script, &[0, 1, 2]);
    script.registry.finish_moves();
    script.registry.send_back(0);
    look(&mut script, &[0, 1, 2]);
    script.registry.finish_moves();
    assert_eq!(places(&script)[0], Place::On(home));
    let (reply, _ended) = bounded(1);
    assert!(script.registry.remove_thread(home, reply).is_ok());
    script.registry.publish();
    look(&mut script, &[0, 1, 2]);
    script.registry.finish_moves();
    assert_eq!(places(&script)[0], Place::On(1 - home));
}

#[test]
fn a_queue_that_is_sent_on_waits_for_the_thread_of_slow_ports_that_owned_it() {
    let mut script = script();
    let home = places(&script)[0].thread();
    script.registry.slow_down(0).unwrap();
    script.registry.publish();
    look(&mut script, &[0, 1, 2]);
    script.registry.finish_moves();
    look(&mut script, &[0, 1, 2]);
    script.registry.send_back(0);
    let (reply, _ended) = bounded(1);
    assert!(script.registry.remove_thread(home, reply).is_ok());
    script.registry.publish();
    look(&mut script, &[0, 1]);
    script.registry.finish_moves();
    assert_eq!(places(&script)[0].owner(), None, "poll-slow may own it");
    look(&mut script, &[2]);
    script.registry.finish_moves();
    assert_eq!(places(&script)[0], Place::On(1 - home));
}

#[test]
fn queues_that_are_added_to_a_port_on_its_way_to_the_slow_thread_have_an_owner() {
    let mut script = script();
    script.registry.slow_down(0).unwrap();
    assert_eq!(places(&script)[0], Place::Between { to: 2 });
    let record = &mut script.registry.ports[0];
    let first = record.placement.len();
    record.placement.push(Place::On(0));
    record.stay_slow(first);
    assert_eq!(places(&script)[first], Place::On(2));
}

#[test]
fn the_detour_stays_until_nobody_can_write_into_it() {
    let mut script = script();
    let has_detour = |script: &mut Script| script.eye.borrow().detour.clone();
    look(&mut script, &[0, 1, 2]);
    assert!(has_detour(&mut script).is_none());
    script.registry.slow_down(0).unwrap();
    script.registry.publish();
    let detour = has_detour(&mut script).unwrap();
    look(&mut script, &[0, 1, 2]);
    let gone = script.registry.ports[0].shared.reference;
    script.registry.unregister(NAME);
    script.registry.publish();
    look(&mut script, &[0, 2]);
    script.registry.look_at_slow_ports();
    script.registry.publish();
    assert!(has_detour(&mut script).is_some(), "thread 1 may write");
    detour.wrote(1, gone);
    look(&mut script, &[1]);
    script.registry.look_at_slow_ports();
    script.registry.publish();
    assert!(has_detour(&mut script).is_some(), "a frame is under way");
    detour.is_done(1);
    script.registry.look_at_slow_ports();
    script.registry.publish();
    assert!(has_detour(&mut script).is_none());
}

#[test]
fn frames_to_another_slow_port_do_not_keep_a_port_from_coming_back() {
    let mut script = script();
    let detour = std::sync::Arc::new(crate::topology::detour::Detour::default());
    script.registry.slow.detour = Some(detour.clone());
    let port = script.registry.ports[0].shared.clone();
    let other = crate::switch::PortRef {
        slot: port.reference.slot + 1,
        generation: 1,
    };
    script.registry.slow_down(0).unwrap();
    script.registry.publish();
    look(&mut script, &[0, 1, 2]);
    script.registry.finish_moves();
    detour.wrote(0, port.reference);
    detour.wrote(0, other);
    script.registry.send_back(0);
    look(&mut script, &[0, 1, 2]);
    script.registry.finish_moves();
    look(&mut script, &[0, 1, 2]);
    script.registry.look_at_slow_ports();
    assert!(script.registry.ports[0].slow.is_some(), "a frame to it");
    detour.is_done(0);
    script.registry.look_at_slow_ports();
    assert!(
        script.registry.ports[0].slow.is_none(),
        "a frame to another"
    );
}
