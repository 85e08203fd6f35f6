//! How much many ports cost: a switch with so many of them, a guest at each, two of which exchange
//! frames at the end.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pollux::api::client::Client;
use pollux::api::types::{PollThreadView, PortState, PortView};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::many::{ManyQueues, ManyRam};
use crate::{Effort, median};

/// Changes of which the median is taken.
const CHANGES: usize = 51;
/// The first ports' guests are those of `pollux bench`.
const ACTIVE: usize = 2;

/// A `pollux run` of its own.
pub(crate) struct Switch {
    process: Child,
    dir: TempDir,
    client: Client,
}

impl Drop for Switch {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.process.id() as i32) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.process.wait();
    }
}

impl Switch {
    /// Starts it; returns the seconds until all ports are there.
    pub(crate) fn start(ports: usize, idle: &str, effort: &Effort) -> (Switch, f64) {
        // Where sockets are made as fast as in /run: other file systems take longer the more there
        // are.
        let memory = Path::new("/dev/shm");
        let place = Some(memory).filter(|place| place.is_dir());
        let place = place.unwrap_or(Path::new("/tmp"));
        let dir = tempfile::Builder::new().prefix("plx-").tempdir_in(place);
        let dir = dir.unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_pollux"));
        command.args(["run", "--log", "info", "--idle", idle, "--api-socket"]);
        command.arg(dir.path().join("api.sock"));
        if let Some(cpu) = effort.cpus.first() {
            command.args(["--poll-cpus", &cpu.to_string()]);
        }
        for n in 0..ports {
            command.args(["--port", &spec(&dir, n)]);
        }
        let began = Instant::now();
        let mut process = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let ready = lines.any(|line| line.unwrap().contains("ready"));
        let seconds = began.elapsed().as_secs_f64();
        // Whatever else it says must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        assert!(ready, "pollux did not start");
        let client = Client::new(dir.path().join("api.sock"));
        let switch = Switch {
            process,
            dir,
            client,
        };
        (switch, seconds)
    }

    pub(crate) fn socket(&self, n: usize) -> PathBuf {
        self.dir.path().join(format!("p{n}.sock"))
    }

    fn ports(&self) -> Vec<PortView> {
        self.client.get("/v1/ports").unwrap().read().unwrap()
    }

    fn thread(&self) -> PollThreadView {
        let threads: Vec<PollThreadView> = self.client.get("/v1/poll").unwrap().read().unwrap();
        threads.into_iter().next().unwrap()
    }

    /// A line of its /proc status, in kB.
    pub(crate) fn status(&self, name: &str) -> u64 {
        let path = format!("/proc/{}/status", self.process.id());
        let text = std::fs::read_to_string(path).unwrap();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    fn descriptors(&self) -> usize {
        let dir = format!("/proc/{}/fd", self.process.id());
        std::fs::read_dir(dir).unwrap().count()
    }
}

fn spec(dir: &TempDir, n: usize) -> String {
    format!(
        "p{n},socket={}",
        dir.path().join(format!("p{n}.sock")).display()
    )
}

/// The median of the seconds that `what` takes.
fn time(times: usize, mut what: impl FnMut()) -> f64 {
    median((0..times).map(|_| {
        let began = Instant::now();
        what();
        began.elapsed().as_secs_f64()
    }))
}

/// A guest at every port but the first ones, which does nothing.
fn attach<'m>(switch: &Switch, rams: &'m [ManyRam]) -> Vec<ManyQueues<'m>> {
    let guests = (ACTIVE..).zip(rams);
    let guests = guests.map(|(n, ram)| ManyQueues::attach(ram, &switch.socket(n)));
    let guests: Vec<_> = guests.collect();
    let running = |port: &PortView| port.state == PortState::Running;
    while switch.ports().iter().filter(|port| running(port)).count() < guests.len() {
        std::thread::sleep(Duration::from_millis(10));
    }
    guests
}

/// Start, memory and changes, while the poll thread sleeps.
fn changes(ports: usize, rams: &[ManyRam], effort: &Effort) -> Value {
    let (switch, start) = Switch::start(ports, "adaptive", effort);
    let (bare_kb, client) = (switch.status("RssAnon"), &switch.client);
    let _guests = attach(&switch, rams);
    let attached_kb = switch.status("RssAnon");
    let new = json!({"name": "new", "socket": switch.dir.path().join("new.sock")});
    let (mut add, mut attach, mut remove) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..CHANGES {
        add.push(time(1, || drop(client.post("/v1/ports", &new).unwrap())));
        remove.push(time(1, || drop(client.delete("/v1/ports/new").unwrap())));
    }
    for _ in 0..CHANGES {
        client.post("/v1/ports", &new).unwrap();
        let ram = ManyRam::new(1);
        let began = Instant::now();
        let guest = ManyQueues::attach(&ram, &switch.dir.path().join("new.sock"));
        attach.push(began.elapsed().as_secs_f64());
        drop(guest);
        client.delete("/v1/ports/new").unwrap();
    }
    let list = time(11, || drop(client.get("/v1/ports").unwrap()));
    let show = time(CHANGES, || drop(client.get("/v1/ports/p0").unwrap()));
    json!({
        "start_seconds": start,
        "descriptors": switch.descriptors(),
        "rss_anon_kb_without_guests": bare_kb,
        "rss_anon_kb": attached_kb,
        "add_seconds": median(add),
        "attach_seconds": median(attach),
        "remove_seconds": median(remove),
        "list_seconds": list,
        "show_seconds": show,
    })
}

/// Passes of a poll thread that never sleeps: idle, and with two guests that exchange frames.
fn passes(ports: usize, rams: &[ManyRam], effort: &Effort) -> Value {
    let (switch, _) = Switch::start(ports, "busy", effort);
    let _guests = attach(&switch, rams);
    let (before, began) = (switch.thread().passes, Instant::now());
    std::thread::sleep(effort.time);
    let passes = switch.thread().passes - before;
    let idle_ns = began.elapsed().as_nanos() as f64 / passes as f64;
    let mut row = active(&switch, effort);
    row["idle_pass_ns"] = json!(idle_ns);
    row
}

/// Two guests that exchange frames beside all the idle ones.
fn active(switch: &Switch, effort: &Effort) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pollux"));
    command.args([
        "bench",
        "--json",
        "--seconds",
        &effort.time.as_secs_f64().to_string(),
    ]);
    for n in 0..ACTIVE {
        command.arg("--attach").arg(switch.socket(n));
    }
    if let Some(cpu) = effort.cpus.get(1) {
        command.args(["--cpu", &cpu.to_string()]);
    }
    let output = command.output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["verdict"], "ok", "{report}");
    let thread = switch.thread();
    let length = thread.pass_length.unwrap();
    json!({
        "mpps": report["mpps"],
        "pass_p50_seconds": length.p50_seconds,
        "pass_p99_seconds": length.p99_seconds,
    })
}

/// Every descriptor that the hard limit allows: this process holds six for each guest.
fn raise_descriptor_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}

pub(crate) fn measure(ports: &[usize], effort: &Effort) -> Value {
    raise_descriptor_limit();
    let row = |ports: &usize| {
        let ports = (*ports).max(ACTIVE);
        let rams: Vec<ManyRam> = (ACTIVE..ports).map(|_| ManyRam::new(1)).collect();
        let changes = changes(ports, &rams, effort);
        // Rings as a guest finds them that has just started.
        let rams: Vec<ManyRam> = (ACTIVE..ports).map(|_| ManyRam::new(1)).collect();
        json!({"ports": ports, "changes": changes, "passes": passes(ports, &rams, effort)})
    };
    json!({ "rows": ports.iter().map(row).collect::<Vec<Value>>() })
}
