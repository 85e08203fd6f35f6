//! A switch inside the process of `pollux bench`, reached over real sockets and real shared memory.

use std::error::Error;
use std::path::PathBuf;

use super::Daemon;
use crate::bench::EmbeddedSwitch;
use crate::config::{DaemonConfig, IdleList, IdlePolicy, PortSpec, SocketMode};

/// A switch and the directory of its sockets. Drop removes both.
#[derive(Debug)]
pub struct Embedded {
    daemon: Option<Daemon>,
    dir: PathBuf,
}

impl Drop for Embedded {
    fn drop(&mut self) {
        drop(self.daemon.take());
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Starts a switch with `ports` ports of `queue_pairs` queue pairs each.
pub fn start(ports: usize, queue_pairs: u16) -> Result<EmbeddedSwitch<Embedded>, Box<dyn Error>> {
    // Installs only the fence. A bench handles Ctrl-C itself.
    crate::memory::fence::install()?;
    let dir = std::env::temp_dir().join(format!("pollux-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let mut switch = Embedded {
        daemon: None,
        dir: dir.clone(),
    };
    let specs: Vec<PortSpec> = (0..ports)
        .map(|port| PortSpec {
            name: format!("guest{port}"),
            socket: dir.join(format!("guest{port}.sock")),
            mode: SocketMode::Server,
            queues: queue_pairs,
            ..PortSpec::default()
        })
        .collect();
    let sockets = specs.iter().map(|spec| spec.socket.clone()).collect();
    let config = DaemonConfig {
        ports: specs,
        idle: IdleList(vec![IdlePolicy::Busy]),
        ..DaemonConfig::default()
    };
    switch.daemon = Some(Daemon::start(&config)?);
    Ok(EmbeddedSwitch { sockets, switch })
}
