//! Unit tests of `snapshot`, in a file of their own: `tests/models` includes `snapshot.rs` as it
//! stands.

use std::sync::Arc;

use super::snapshot::snapshots;

#[test]
fn a_view_is_retired_once_every_reader_moved_on() {
    let (mut publisher, mut readers) = snapshots(1, 2);
    {
        let first = readers[0].borrow();
        publisher.publish(2);
        assert!(!first.is_current());
        assert!(publisher.retire().is_empty());
        assert_eq!(*first, 1);
    }
    assert_eq!(*readers[0].borrow(), 2);
    assert_eq!(publisher.retire().len(), 1);
}

#[test]
fn a_sleeper_holds_nothing_back() {
    let (mut publisher, mut readers) = snapshots(1, 1);
    readers[0].borrow();
    let generation = publisher.publish(2);
    assert!(!publisher.acknowledgements().reached(generation));
    readers[0].sleep();
    assert!(publisher.acknowledgements().reached(generation));
    assert_eq!(publisher.retire().len(), 1);
    assert_eq!(*readers[0].borrow(), 2);
}

#[test]
fn a_reader_that_goes_away_holds_nothing_back() {
    let (mut publisher, mut readers) = snapshots(1, 1);
    readers[0].borrow();
    publisher.publish(2);
    drop(readers);
    assert_eq!(publisher.retire().len(), 1);
}

#[test]
fn readers_and_publisher_race_without_losing_a_view() {
    let (mut publisher, readers) = snapshots(Arc::new(0_u64), 2);
    std::thread::scope(|scope| {
        for mut reader in readers {
            scope.spawn(move || {
                let mut last = 0;
                while last < 2000 {
                    let view = reader.borrow();
                    assert!(**view >= last);
                    last = **view;
                    if last % 3 == 0 {
                        reader.sleep();
                    }
                }
            });
        }
        for value in 1..=2000 {
            publisher.publish(Arc::new(value));
            publisher.retire();
        }
    });
    publisher.retire();
    assert!(!publisher.has_retained());
}

#[test]
fn a_reader_that_outlives_the_publisher_still_borrows() {
    let (publisher, mut readers) = snapshots(String::from("view"), 1);
    drop(publisher);
    assert_eq!(*readers[0].borrow(), "view");
}
