//! Unit tests of `claim`. They have a file of their own, because `tests/models` includes `claim.rs`
//! as it is.

use std::sync::atomic::{AtomicU64, Ordering};

use super::claim::{Claims, Publish, Published};

#[derive(Default)]
struct Visible(AtomicU64);

impl Publish for Visible {
    fn publish(&self, from: u64, to: u64) {
        assert_eq!(
            self.0.swap(to, Ordering::SeqCst),
            from,
            "published runs follow each other"
        );
    }
    fn wants_call(&self, _: u64, _: u64) -> bool {
        true
    }
}

#[test]
fn a_later_claim_waits_for_the_earlier_one() {
    let claims = Claims::new(8, 0);
    let ring = Visible::default();
    assert!(claims.try_claim(0, 2));
    assert!(claims.try_claim(2, 3));
    claims.commit(2, 3);
    assert_eq!(claims.try_publish(&ring), Published::Clean);
    assert_eq!(claims.published(), 0);
    assert!(!claims.take_call_wanted());
    claims.commit(0, 2);
    assert_eq!(claims.try_publish(&ring), Published::Clean);
    assert_eq!(claims.published(), 5);
    assert!(claims.take_call_wanted());
    assert!(!claims.take_call_wanted());
}

#[test]
fn a_claim_is_lost_to_whoever_was_first() {
    let claims = Claims::new(8, 0);
    assert!(claims.try_claim(0, 1));
    assert!(!claims.try_claim(0, 1));
    assert_eq!(claims.next(), 1);
}

#[test]
fn room_counts_from_what_is_published() {
    let claims = Claims::new(4, 100);
    assert_eq!(claims.room(100), 4);
    assert!(claims.try_claim(100, 4));
    assert_eq!(claims.room(104), 0);
    claims.commit(100, 4);
    let ring = Visible(AtomicU64::new(100));
    claims.try_publish(&ring);
    assert_eq!(claims.room(104), 4);
}

#[test]
fn laps_of_a_ring_that_is_no_power_of_two() {
    let claims = Claims::new(3, 0);
    let ring = Visible::default();
    for p in (0..300).step_by(2) {
        assert!(claims.try_claim(p, 2));
        claims.commit(p, 2);
        assert_eq!(claims.try_publish(&ring), Published::Clean);
        assert_eq!(claims.published(), p + 2);
    }
}

#[test]
fn threads_divide_the_positions_without_gap() {
    let claims = Claims::new(64, 0);
    let ring = Visible::default();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut done = 0;
                while done < 10_000 {
                    let p = claims.next();
                    if claims.room(p) >= 4 && claims.try_claim(p, 4) {
                        claims.commit(p, 4);
                        done += 4;
                    }
                    claims.try_publish(&ring);
                }
            });
        }
    });
    while claims.try_publish(&ring) == Published::Again {}
    assert_eq!(claims.published(), claims.next());
}
