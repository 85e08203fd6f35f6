//! What a daemon tells on `/v1/events`, from the moment of subscription on.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use serde_json::Value;

use super::daemon::Daemon;
use super::wait_for;

/// An open stream of events; closed on drop.
#[derive(Debug)]
pub(crate) struct Events {
    stream: UnixStream,
    seen: Arc<Mutex<Vec<Value>>>,
}

impl Events {
    /// Subscribes; what happens from now on is seen.
    pub(crate) fn of(daemon: &Daemon) -> Events {
        let mut stream = UnixStream::connect(daemon.dir().join("api.sock")).expect("the API");
        let request = b"GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n";
        stream.write_all(request).expect("a request is taken");
        let mut lines = BufReader::new(stream.try_clone().expect("a descriptor")).lines();
        // The answer's head comes when the subscription is made, and ends with an empty line.
        let head = lines.by_ref().map_while(Result::ok);
        let head: Vec<String> = head.take_while(|line| !line.is_empty()).collect();
        assert!(head[0].contains("200"), "{head:?}");
        let seen = Arc::<Mutex<Vec<Value>>>::default();
        let events = seen.clone();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                // What is no object is the length of a chunk.
                if line.starts_with('{') {
                    let event = serde_json::from_str(&line).expect("an event");
                    events
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(event);
                }
            }
        });
        Events { stream, seen }
    }

    /// Kind and message of each event of a port so far, in order.
    pub(crate) fn of_port(&self, port: &str) -> Vec<(String, String)> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let of_port = seen.iter().filter(|event| event["port"] == port);
        let text = |event: &Value, key: &str| event[key].as_str().unwrap_or_default().to_string();
        of_port
            .map(|event| (text(event, "kind"), text(event, "message")))
            .collect()
    }

    /// Messages of one kind.
    pub(crate) fn messages(&self, port: &str, kind: &str) -> Vec<String> {
        let events = self.of_port(port).into_iter();
        let of_kind = events.filter(|(of, _)| of == kind);
        of_kind.map(|(_, message)| message).collect()
    }

    /// Waits for an event of a port.
    pub(crate) fn wait(&self, port: &str, kind: &str) {
        wait_for(&format!("{kind} of {port}"), || {
            !self.messages(port, kind).is_empty()
        });
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}
