//! The life of ports, from the first frame before `port add` has answered to the last event of one that was removed.
//!
//! Whatever is pending for a port that is removed holds a reference to it or is cancelled: nothing happens to it, or
//! through it, afterwards, and nobody else notices.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use common::events::Events;
use common::guest::{Guest, GuestOptions, Ram};
use common::holdings::Holdings;
use common::scene::{Scene, VICTIM};
use common::wait_for;

fn add(scene: &Scene) {
    let spec = format!("{VICTIM},socket={}", scene.victim().display());
    let (code, said) = scene.daemon.try_pollux(&["port", "add", &spec]);
    assert_eq!(code, 0, "{said}");
}

#[test]
fn the_last_word_of_a_port_is_that_it_was_removed() {
    let scene = Scene::new();
    let before = Holdings::of(&scene.daemon);
    for turn in 0..10 {
        let ram = Ram::new(GuestOptions::default());
        let mut guest = Guest::new(&ram);
        guest.attach(scene.victim());
        let events = Events::of(&scene.daemon);
        std::thread::scope(|scope| {
            let frontend = guest.frontend.as_ref().unwrap();
            // A session in the middle of its messages cannot bring the port back, nor speak of it.
            scope.spawn(move || {
                let mut enable = false;
                while frontend.set_vring_enable(0, enable).is_ok()
                    && frontend.get_vring_base(1).is_ok()
                {
                    enable = !enable;
                }
            });
            assert_eq!(scene.daemon.try_pollux(&["port", "remove", VICTIM]).0, 0);
        });
        wait_for("the session to be cut off", || guest.is_cut_off());
        let marker = format!(
            "marker,socket={}",
            scene.daemon.dir().join("marker").display()
        );
        assert_eq!(scene.daemon.try_pollux(&["port", "add", &marker]).0, 0);
        events.wait("marker", "port_added");
        let kinds: Vec<String> = events
            .of_port(VICTIM)
            .into_iter()
            .map(|(kind, _)| kind)
            .collect();
        let last = kinds.len().saturating_sub(2);
        assert_eq!(
            kinds[last..],
            ["session_disconnected", "port_removed"],
            "{turn}: {kinds:?}"
        );
        assert_eq!(scene.daemon.try_pollux(&["port", "remove", "marker"]).0, 0);
        add(&scene);
    }
    before.wait_for_return(&scene.daemon);
    scene.finish();
}
