//! The same models with one deliberate error each: a model that does not find it proves nothing.
//!
//! `build.rs` makes the errors in production files. The errors in what the models add are values of
//! their `Fault`.

use crate::delivery_models::{Fault, HASTY, Scenario, TWO, packed};
use crate::explore;
use crate::generated::*;
use crate::observer_models::{self, ONE};
use crate::removal_models;
use crate::view_models::{MoveFault, ReadFault};

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
