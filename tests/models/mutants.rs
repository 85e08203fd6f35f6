//! The same models with one deliberate error each: a model that does not find it proves nothing.
//!
//! Errors in the production files are copies under `mutants/` that differ in one place;
//! [`copies_differ_in_one_place_only`] keeps them from drifting (`POLLUX_WRITE_MUTANTS=1` writes
//! them anew).

use crate::delivery_models::{Fault, HASTY, Scenario, TWO, packed};
use crate::explore;
use crate::observer_models::{self, ONE};
use crate::production;
use crate::removal_models;
use crate::view_models::{MoveFault, ReadFault};

macro_rules! claim_mutant {
    ($name:ident) => {
        mod $name {
            #[allow(dead_code, reason = "a copy")]
            pub mod claim;
            #[path = "../../delivery.rs"]
            pub mod delivery;
        }
    };
}

macro_rules! snapshot_mutant {
    ($name:ident) => {
        mod $name {
            #[allow(dead_code, reason = "not everything has a model")]
            #[path = "../../../../src/stats/counter.rs"]
            pub mod counter;
            #[allow(dead_code, reason = "not everything has a model")]
            #[path = "../../../../src/daemon/handover.rs"]
            pub mod handover;
            #[allow(dead_code, reason = "not every model is run")]
            #[path = "../../observers.rs"]
            pub mod observers;
            #[allow(dead_code, reason = "not everything has a model")]
            #[path = "../../../../src/observe/pen.rs"]
            pub mod pen;
            #[allow(dead_code, reason = "a copy")]
            pub mod snapshot;
            #[allow(dead_code, reason = "not every model is run")]
            #[path = "../../views.rs"]
            pub mod views;
        }
    };
}

macro_rules! handover_mutant {
    ($name:ident) => {
        mod $name {
            #[allow(dead_code, reason = "a copy")]
            pub mod handover;
            #[allow(dead_code, reason = "not everything has a model")]
            #[path = "../../../../src/sys/snapshot.rs"]
            pub mod snapshot;
            #[allow(dead_code, reason = "not every model is run")]
            #[path = "../../views.rs"]
            pub mod views;
        }
    };
}

macro_rules! mailbox_mutant {
    ($name:ident) => {
        mod $name {
            #[allow(dead_code, reason = "a copy")]
            pub mod mailbox;
            #[allow(dead_code, reason = "not every model is run")]
            #[path = "../../removal.rs"]
            pub mod removal;
            #[allow(dead_code, reason = "not everything has a model")]
            #[path = "../../../../src/sys/snapshot.rs"]
            pub mod snapshot;
        }
    };
}

macro_rules! pen_mutant {
    ($name:ident) => {
        mod $name {
            #[allow(dead_code, reason = "not everything has a model")]
            #[path = "../../../../src/stats/counter.rs"]
            pub mod counter;
            #[allow(dead_code, reason = "not everything has a model")]
            #[path = "../../../../src/daemon/handover.rs"]
            pub mod handover;
            #[path = "../../observers.rs"]
            pub mod observers;
            #[allow(dead_code, reason = "a copy")]
            pub mod pen;
            #[allow(dead_code, reason = "not everything has a model")]
            #[path = "../../../../src/sys/snapshot.rs"]
            pub mod snapshot;
        }
    };
}

claim_mutant!(token_stored);
claim_mutant!(one_round);
claim_mutant!(no_barrier);
claim_mutant!(no_room);
claim_mutant!(looked_before);
snapshot_mutant!(acknowledges_unread);
snapshot_mutant!(wakes_without_barrier);
handover_mutant!(owned_on_its_way);
handover_mutant!(unacknowledged);
handover_mutant!(arrives_twice);
mailbox_mutant!(posts_though_gone);
mailbox_mutant!(kept_when_gone);
mailbox_mutant!(answers_before);
pen_mutant!(kept);
pen_mutant!(unsettled);
pen_mutant!(looked_at_last);

/// Copy, text of the original, and what is replaced by what.
const COPIES: &[(&str, &str, &str, &str)] = &[
    (
        "token_stored/claim.rs",
        include_str!("../../src/virtio/claim.rs"),
        "let left = self.release(claims);",
        "let turn = self.turn.load(Ordering::Acquire) - claims * FILLED;\n            \
         self.turn.store(turn - HELD, Ordering::Release);\n            let left = turn / FILLED;",
    ),
    (
        "one_round/claim.rs",
        include_str!("../../src/virtio/claim.rs"),
        "if left == 0 || self.filled_from(end, 1).1 == 0 {",
        "if left == 0 || self.filled_from(end, 1).1 <= 1 {",
    ),
    (
        "no_barrier/claim.rs",
        include_str!("../../src/virtio/claim.rs"),
        "fence(Ordering::SeqCst);",
        "fence(Ordering::Release);",
    ),
    (
        "no_room/claim.rs",
        include_str!("../../src/virtio/claim.rs"),
        "(self.published() + self.size()).saturating_sub(p)",
        "(u64::MAX / 2).saturating_sub(p)",
    ),
    (
        "looked_before/claim.rs",
        include_str!("../../src/virtio/claim.rs"),
        "let turn = self.turn.fetch_or(HELD, Ordering::AcqRel);
            if turn & HELD != 0 {
                return Published::Clean;
            }
            let old = self.published.load(Ordering::Relaxed);",
        "let old = self.published.load(Ordering::Relaxed);
            let turn = self.turn.fetch_or(HELD, Ordering::AcqRel);
            if turn & HELD != 0 {
                return Published::Clean;
            }",
    ),
    (
        "posts_though_gone/mailbox.rs",
        include_str!("../../src/daemon/mailbox.rs"),
        "if self.gone {",
        "if self.gone && device.is_none() {",
    ),
    (
        "kept_when_gone/mailbox.rs",
        include_str!("../../src/daemon/mailbox.rs"),
        "self.gone = true;\n        self.device = None;",
        "self.gone = true;",
    ),
    (
        "answers_before/mailbox.rs",
        include_str!("../../src/daemon/mailbox.rs"),
        "(self.published >= post || self.gone)",
        "(self.posted >= post || self.gone)",
    ),
    (
        "acknowledges_unread/snapshot.rs",
        include_str!("../../src/sys/snapshot.rs"),
        "self.word().store(view.generation, Ordering::Release);",
        "self.word()\n            .store(self.shared.generation.load(Ordering::Acquire), Ordering::Release);",
    ),
    (
        "wakes_without_barrier/snapshot.rs",
        include_str!("../../src/sys/snapshot.rs"),
        "// Pairs with the barrier in `Publisher::publish`.\n            fence(Ordering::SeqCst);",
        "// Pairs with the barrier in `Publisher::publish`.\n            fence(Ordering::Release);",
    ),
    (
        "owned_on_its_way/handover.rs",
        include_str!("../../src/daemon/handover.rs"),
        "Place::Between { .. } => None,",
        "Place::Between { to } => Some(to),",
    ),
    (
        "unacknowledged/handover.rs",
        include_str!("../../src/daemon/handover.rs"),
        "self.generation.is_some_and(reached)",
        "self.generation.map(reached).is_some()",
    ),
    (
        "arrives_twice/handover.rs",
        include_str!("../../src/daemon/handover.rs"),
        "let here = *place == (Place::Between { to: self.to });",
        "let here = matches!(*place, Place::Between { .. });",
    ),
    (
        "kept/pen.rs",
        include_str!("../../src/observe/pen.rs"),
        "self.place.0.store(Some(pen));",
        "drop(pen);",
    ),
    (
        "unsettled/pen.rs",
        include_str!("../../src/observe/pen.rs"),
        "reached(*generation).then_some(reason)",
        "Some(reached(*generation)).map(|_| reason.as_str())",
    ),
    (
        "looked_at_last/pen.rs",
        include_str!("../../src/observe/pen.rs"),
        "let end = end(stream);\n    let more = take(stream);",
        "let more = take(stream);\n    let end = end(stream);",
    ),
];

#[test]
fn copies_differ_in_one_place_only() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/models/mutants/");
    for (copy, original, from, to) in COPIES {
        assert_eq!(original.matches(from).count(), 1, "{copy}: {from}");
        let mutant = original.replacen(from, to, 1);
        let path = format!("{folder}{copy}");
        if std::env::var_os("POLLUX_WRITE_MUTANTS").is_some() {
            std::fs::write(&path, &mutant).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), mutant, "{copy}");
    }
}

fn with(scenario: Scenario, fault: Fault) -> impl Fn() + Sync + Send {
    let scenario = Scenario { fault, ..scenario };
    move || production::delivery::run(&scenario)
}

#[test]
#[should_panic(expected = "Causality violation")]
fn commit_before_fill() {
    explore(3, with(TWO, Fault::CommitFirst));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn used_index_without_release() {
    explore(3, with(TWO, Fault::RelaxedIndex));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn packed_flags_without_release() {
    explore(3, with(packed(TWO), Fault::RelaxedFlags));
}

#[test]
#[should_panic(expected = "visible as a whole")]
fn packed_first_flags_first() {
    explore(3, with(packed(TWO), Fault::FirstFlagsFirst));
}

#[test]
#[should_panic(expected = "nobody called")]
fn packed_event_test_per_own_range() {
    explore(3, with(packed(TWO), Fault::OwnRange));
}

/// An error in `claim.rs`, found with a ring of either kind, and what it is found by.
macro_rules! found_in_both {
    ($test:ident, $mutant:ident, $scenario:expr, $split:literal, $packed:literal) => {
        mod $test {
            use super::*;

            #[test]
            #[should_panic(expected = $split)]
            fn split() {
                explore(3, || $mutant::delivery::run(&$scenario));
            }

            #[test]
            #[should_panic(expected = $packed)]
            fn packed() {
                explore(3, || $mutant::delivery::run(&super::packed($scenario)));
            }
        }
    };
}

found_in_both!(
    token_released_by_a_store,
    token_stored,
    TWO,
    "everything is published",
    "everything is published"
);
found_in_both!(
    one_publish_round_only,
    one_round,
    TWO,
    "everything is published",
    "everything is published"
);
found_in_both!(
    no_barrier_before_the_event,
    no_barrier,
    TWO,
    "nobody called",
    "nobody called"
);
// Two open claims share a tag, and the queue sticks; or the elements of one are written while the
// other is filled.
found_in_both!(
    claims_beyond_what_is_published,
    no_room,
    HASTY,
    "everything is published",
    "Causality violation"
);
// What another thread has published meanwhile is published again.
found_in_both!(
    a_look_before_the_token_is_taken,
    looked_before,
    TWO,
    "published in order",
    "published in order"
);

#[test]
#[should_panic(expected = "Causality violation")]
fn acknowledgement_before_the_switch_of_view() {
    explore(3, || {
        acknowledges_unread::views::publish_and_retire(1, 2, ReadFault::None);
    });
}

#[test]
#[should_panic(expected = "Causality violation")]
fn waking_without_a_barrier() {
    explore(3, || {
        wakes_without_barrier::views::publish_and_retire(1, 2, ReadFault::None);
    });
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_sleeper_that_keeps_its_borrow() {
    explore(3, || {
        production::views::publish_and_retire(1, 2, ReadFault::KeepsItsBorrow);
    });
}

// From the old owner straight to the new one.
#[test]
#[should_panic(expected = "Causality violation")]
fn a_queue_moved_by_one_publication() {
    explore(2, || {
        owned_on_its_way::views::hand_over(MoveFault::None, &[1]);
    });
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_hand_over_that_does_not_wait() {
    explore(2, || {
        unacknowledged::views::hand_over(MoveFault::None, &[1]);
    });
}

#[test]
#[should_panic(expected = "arrives once")]
fn a_hand_over_that_was_overtaken() {
    explore(2, || {
        arrives_twice::views::hand_over(MoveFault::None, &[1, 0]);
    });
}

#[test]
#[should_panic(expected = "no kick came")]
fn asleep_without_a_second_look() {
    explore(2, || {
        production::views::hand_over(MoveFault::NoSecondLook, &[1]);
    });
}

#[test]
#[should_panic(expected = "came back")]
fn a_session_that_posts_although_its_port_is_gone() {
    explore(2, || {
        posts_though_gone::removal::remove(removal_models::Fault::None)
    });
}

#[test]
#[should_panic(expected = "came back")]
fn a_post_that_outlives_its_port_in_the_mailbox() {
    explore(2, || {
        kept_when_gone::removal::remove(removal_models::Fault::None)
    });
}

#[test]
#[should_panic(expected = "Causality violation")]
fn an_answer_before_the_post_is_published() {
    explore(2, answers_before::removal::stop);
}

#[test]
#[should_panic(expected = "came back")]
fn control_that_applies_a_stale_turn() {
    explore(2, || {
        production::removal::remove(removal_models::Fault::StaleTurn)
    });
}

// The pen goes with the thread that had it.
#[test]
#[should_panic(expected = "dropped on a poll thread")]
fn a_pen_that_is_not_laid_back() {
    explore(2, || kept::observers::run(&ONE));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_reader_that_does_not_wait_for_the_acknowledgement() {
    explore(2, || unsettled::observers::run(&ONE));
}

#[test]
#[should_panic(expected = "every captured frame is read")]
fn a_reader_that_looks_for_the_end_last() {
    explore(2, || looked_at_last::observers::run(&ONE));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn an_observer_taken_away_from_under_a_poll_thread() {
    explore(3, || acknowledges_unread::observers::run(&ONE));
}

#[test]
#[should_panic(expected = "captured and missed")]
fn poll_threads_that_share_a_feed() {
    explore(2, || {
        production::observers::run(&observer_models::Scenario {
            fault: observer_models::Fault::OneFeed,
            looks: 0,
            ..observer_models::TWO
        });
    });
}
