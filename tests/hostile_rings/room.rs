//! Receive queues with too little room for a frame.

use super::*;

#[test]
fn a_claim_that_others_always_win_is_contended_and_harms_nothing() {
    for packed in KINDS {
        let guest = Guest::new(64, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        for n in 0..64 {
            driver.post(&[writable(DATA + 2048 * n, 2048)]);
        }
        let won = std::cell::Cell::new(0);
        // Whoever asks for the length of its frame finds that another thread has claimed meanwhile.
        let lengths = std::iter::once(100).inspect(|_| {
            let mut other = Claim::new();
            queue.claim(std::iter::once(60), &mut other).unwrap();
            queue.commit(&other);
            won.set(won.get() + 1);
        });
        let mut claim = Claim::new();
        assert_eq!(
            queue.claim(lengths, &mut claim).unwrap_err(),
            NoClaim::Contended
        );
        assert!((4..10).contains(&won.get()), "{} tries", won.get());
        assert_eq!(queue.published(), won.get());
        assert_eq!(queue.broken(), None);
        // Alone, it gets what it wants.
        queue.claim(std::iter::once(100), &mut claim).unwrap();
        assert_eq!((claim.frames(), claim.end()), (1, won.get() + 1));
    }
}

#[test]
fn an_empty_receive_ring_refuses_frames_for_ever_and_delivers_the_next_one() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        for _ in 0..1000 {
            assert_eq!(deliver(&queue, &[frame(0, 60)]), (0, Some(NoClaim::Full)));
        }
        receive_lives(&guest, &queue, &mut driver);
    }
}

#[test]
fn a_frame_that_needs_more_buffers_than_are_posted_publishes_nothing() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        let post =
            |driver: &mut Driver<'_>, i: u64| driver.post(&[writable(DATA + 0x1000 * i, 100)]);
        let mut ids = vec![post(&mut driver, 0), post(&mut driver, 1)];
        let long = frame(5, 288);
        for _ in 0..3 {
            assert_eq!(
                deliver(&queue, std::slice::from_ref(&long)),
                (0, Some(NoClaim::Full)),
                "packed: {packed}"
            );
            assert_eq!(driver.reap(), None);
        }
        ids.push(post(&mut driver, 2));
        assert_eq!(deliver(&queue, std::slice::from_ref(&long)), (1, None));
        let used: Vec<(u16, u32)> = ids.iter().map(|&id| (id, 100)).collect();
        assert_eq!(driver.reap_all(), used);
        assert_eq!(guest.read(DATA + 10, 2), [3, 0], "num_buffers");
    }
}

#[test]
fn a_frame_that_needs_more_buffers_than_the_ring_has_is_too_long() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        for _ in 0..SIZE {
            driver.post(&[writable(GOOD, 100)]);
        }
        let long = frame(5, 100 * usize::from(SIZE));
        assert_eq!(deliver(&queue, &[long]), (0, Some(NoClaim::TooLong)));
        assert_eq!(driver.reap(), None);
        assert_eq!(deliver(&queue, &[frame(5, 88)]), (1, None));
        assert_eq!(driver.reap_all().len(), 1);
    }
}

#[test]
fn a_frame_longer_than_an_unmergeable_buffer_leaves_the_buffer_where_it_is() {
    for packed in KINDS {
        let features = RingFeatures {
            mergeable: false,
            ..features(packed)
        };
        let guest = Guest::new(SIZE, features);
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        let id = driver.post(&[writable(GOOD, 100)]);
        driver.post(&[writable(GOOD, 200)]);
        assert_eq!(
            deliver(&queue, &[frame(0, 150)]),
            (0, Some(NoClaim::TooLong))
        );
        assert_eq!(driver.reap(), None);
        assert_eq!(deliver(&queue, &[frame(0, 88)]), (1, None));
        assert_eq!(driver.reap_all(), [(id, 100)]);
    }
}

#[test]
fn a_ring_full_of_one_byte_buffers_is_returned_in_bounded_steps() {
    for packed in KINDS {
        let guest = Guest::new(1024, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        let ids: Vec<u16> = (0..1024)
            .map(|_| driver.post(&[writable(GOOD, 1)]))
            .collect();
        let mut claims = 0;
        let mut claim = Claim::new();
        while queue.claim([1000].into_iter(), &mut claim).is_ok() {
            assert_eq!(claim.frames(), 0);
            assert!((1..=128).contains(&claim.bad_buffers()));
            queue.commit(&claim);
            claims += 1;
        }
        assert!((8..=16).contains(&claims), "{claims} claims");
        let used: Vec<(u16, u32)> = ids.iter().map(|&id| (id, 0)).collect();
        assert_eq!(driver.reap_all(), used);
        receive_lives(&guest, &queue, &mut driver);
    }
}

#[test]
fn a_bad_chain_inside_a_mergeable_frame_returns_what_was_read_for_it() {
    for packed in KINDS {
        let guest = Guest::new(SIZE, features(packed));
        let queue = start_receive(&guest);
        let mut driver = guest.driver();
        let mut ids = vec![
            driver.post(&[writable(DATA, 100)]),
            driver.post(&[writable(HOLE, 100)]),
        ];
        ids.extend((2..5).map(|i| driver.post(&[writable(DATA + 0x1000 * i, 100)])));
        assert_eq!(deliver(&queue, &[frame(2, 250)]), (1, None));
        let lens = [0, 0, 100, 100, 62];
        let used: Vec<(u16, u32)> = ids.into_iter().zip(lens).collect();
        assert_eq!(driver.reap_all(), used, "packed: {packed}");
        assert_eq!(guest.read(DATA + 0x2000 + 10, 2), [3, 0], "num_buffers");
    }
}
