//! A child process: its output collected by threads, so that every wait can have a deadline.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// What one stream of a process has brought so far.
#[derive(Debug, Default)]
struct Collected {
    text: String,
    ended: bool,
}

/// One stream of a process.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stream {
    shared: Arc<(Mutex<Collected>, Condvar)>,
}

impl Stream {
    fn read(mut from: impl Read + Send + 'static) -> Stream {
        let stream = Stream::default();
        let into = stream.clone();
        thread::spawn(move || {
            let mut buffer = [0; 65536];
            loop {
                let count = from.read(&mut buffer).unwrap_or(0);
                let mut collected = into.lock();
                collected.text += &String::from_utf8_lossy(&buffer[..count]);
                collected.ended = count == 0;
                into.shared.1.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        stream
    }

    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything so far.
    pub(crate) fn text(&self) -> String {
        self.lock().text.clone()
    }

    /// The text from `start` to the end of the first `wanted` behind it; `None` if the deadline or
    /// the end of the stream comes first.
    pub(crate) fn wait(&self, wanted: &str, start: usize, limit: Duration) -> Option<String> {
        let deadline = Instant::now() + limit;
        let mut collected = self.lock();
        loop {
            if let Some(at) = collected.text[start..].find(wanted) {
                return Some(collected.text[start..start + at + wanted.len()].to_string());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if collected.ended || left.is_zero() {
                return None;
            }
            collected = self
                .shared
                .1
                .wait_timeout(collected, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Stream {
    /// Waits until nothing more can come.
    fn wait_end(&self, deadline: Instant) {
        let mut collected = self.lock();
        while !collected.ended && Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            let waited = self.shared.1.wait_timeout(collected, left);
            collected = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A running child; killed on drop.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    /// Standard output.
    pub(crate) out: Stream,
    /// Standard error.
    pub(crate) err: Stream,
}

impl Process {
    /// Starts `command` with all three streams piped.
    pub(crate) fn spawn(name: &str, command: &mut Command) -> Process {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name} cannot be started ({command:?}): {error}"));
        Process {
            name: name.to_string(),
            stdin: child.stdin.take(),
            out: Stream::read(child.stdout.take().expect("piped")),
            err: Stream::read(child.stderr.take().expect("piped")),
            child,
        }
    }

    /// The process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes to the standard input.
    pub(crate) fn write(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("stdin is open");
        if let Err(error) = stdin
            .write_all(text.as_bytes())
            .and_then(|()| stdin.flush())
        {
            panic!("{} takes no input ({error}): {}", self.name, self.words());
        }
    }

    /// The end status, if it has ended.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our child")
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        // A dead child is not reaped before `ended` or `wait`, so the id is still its own.
        let id = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        let sent = kill_process(id.expect("a process id"), signal);
        assert!(sent.is_ok(), "{} takes no {signal:?}: {sent:?}", self.name);
    }

    /// Waits for the end; `None` past the deadline.
    pub(crate) fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended() {
                // Its last words are read by other threads. Somebody whom it leaves behind may hold
                // a stream open.
                let soon = Instant::now() + Duration::from_secs(2);
                self.out.wait_end(soon);
                self.err.wait_end(soon);
                return Some(status);
            }
            if Instant::now() > deadline {
                return None;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Both streams' last lines, for a failure's message.
    pub(crate) fn words(&self) -> String {
        let tail = |stream: &Stream| {
            let text = stream.text();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(30)..].join("\n")
        };
        format!(
            "\n-- {} out --\n{}\n-- {} err --\n{}",
            self.name,
            tail(&self.out),
            self.name,
            tail(&self.err)
        )
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a child that has already been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
