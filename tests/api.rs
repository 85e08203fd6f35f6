//! The API over a real socket: answers, refusals, limits, and who may use it.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

#[path = "support/model.rs"]
mod model;

use std::fs;
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use model::{Model, Served, serve};
use pollux::api::client::{Client, ClientError};
use pollux::api::types::*;
use pollux::api::{Server, ServerError};
use pollux::wire::Mac;
use serde_json::{Value, json};

fn client(served: &Served) -> Client {
    Client::new(&served.socket)
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (u16, ApiError) {
    match result {
        Err(ClientError::Refused { status, error }) => (status, error),
        other => panic!("not a refusal: {other:?}"),
    }
}

/// Sends raw bytes and reads until the server closes.
fn raw(served: &Served, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(&served.socket).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    // The server may close before it has read everything.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn ports_live_from_creation_to_removal() {
    let served = serve();
    let client = client(&served);
    let spec = served.spec("vm1");
    let made: PortView = client.post("/v1/ports", &spec).unwrap().read().unwrap();
    assert_eq!(made.name, "vm1");
    let list: Value = client.get("/v1/ports").unwrap().value().unwrap();
    for key in ["name", "socket", "mode", "state", "reason", "statistics"] {
        assert!(list[0].get(key).is_some(), "{key}");
    }
    assert_eq!(list[0]["state"], "negotiating");
    let patch = PortPatch { queues: Some(4) };
    let set: PortView = client
        .patch("/v1/ports/vm1", &patch)
        .unwrap()
        .read()
        .unwrap();
    assert_eq!(set.queues, 4);
    client.delete("/v1/ports/vm1").unwrap();
    let (status, error) = refusal(client.get("/v1/ports/vm1"));
    assert_eq!((status, error.code.as_str()), (404, "not_found"));
    assert!(error.message.contains("vm1"));
}

#[test]
fn the_same_port_again_is_a_conflict_unless_it_may_exist() {
    let served = serve();
    let client = client(&served);
    let spec = served.spec("vm1");
    client.post("/v1/ports", &spec).unwrap();
    let (status, error) = refusal(client.post("/v1/ports", &spec));
    assert_eq!((status, error.code.as_str()), (409, "conflict"));
    client.post("/v1/ports?may_exist=true", &spec).unwrap();
}

#[test]
fn wrong_requests_are_refused_and_named() {
    let served = serve();
    let client = client(&served);
    let at = |socket: &str| json!({"name": "vm1", "socket": socket});
    let cases = [
        (json!({"name": "vm1"}), "missing field"),
        (
            json!({"name": "vm1", "socket": "/x", "colour": 1}),
            "unknown field",
        ),
        (json!({"name": "a b", "socket": "/x"}), "port name"),
        (
            json!({"name": "vm1", "socket": "/x", "queues": 0}),
            "1 to 128",
        ),
        (at("relative"), "absolute"),
        (at(&format!("/{}", "x".repeat(200))), "at most 107"),
        (json!([]), "body"),
    ];
    for (body, part) in cases {
        let (status, error) = refusal(client.post("/v1/ports", &body));
        assert_eq!(
            (status, error.code.as_str()),
            (400, "bad_argument"),
            "{body}"
        );
        assert!(error.message.contains(part), "{body}: {}", error.message);
    }
    for target in [
        "/v1/ports?may_exist=perhaps",
        "/v1/fdb?mac=52",
        "/v1/fdb?mac=52:54:00:00:00:1",
        "/v1/fdb?mac=52:54:00:00:00:01&port=vm1",
        "/v1/fdb?mac=52:54:00:00:00:01&vlan=5",
    ] {
        let result = if target.starts_with("/v1/ports") {
            client.post(target, &served.spec("vm1"))
        } else {
            client.delete(target)
        };
        assert_eq!(refusal(result).0, 400, "{target}");
    }
    for (body, part) in [
        (
            json!({"mac": "01:00:5e:00:00:01", "port": "vm1"}),
            "group address",
        ),
        (
            json!({"mac": "00:00:00:00:00:00", "port": "vm1"}),
            "zero address",
        ),
        (
            json!({"mac": "52:54:00:00:00:9", "port": "vm1"}),
            "two hexadecimal digits",
        ),
        (
            json!({"mac": "52:54:00:00:00:09", "port": "vm1", "vlan": 5}),
            "unknown field `vlan`",
        ),
    ] {
        let (status, error) = refusal(client.post("/v1/fdb", &body));
        assert_eq!(status, 400, "{body}");
        assert!(error.message.contains(part), "{body}: {}", error.message);
    }
}

#[test]
fn unknown_routes_methods_and_ports_are_different_answers() {
    let served = serve();
    let client = client(&served);
    assert_eq!(refusal(client.get("/v2/ports")).1.code, "no_such_route");
    let (status, error) = refusal(client.delete("/v1/ports"));
    assert_eq!((status, error.code.as_str()), (405, "method_not_allowed"));
    assert_eq!(refusal(client.delete("/v1/ports/none")).1.code, "not_found");
    // A name that only captures know.
    for target in ["/v1/ports/all", "/v1/fdb?port=all"] {
        let error = refusal(client.delete(target)).1;
        assert_eq!(error.code, "not_found", "{target}");
        let hint = error.hint.unwrap();
        assert!(hint.contains("in captures only"), "{target}: {hint}");
    }
    let (status, error) = refusal(client.get("/v1/ports/gone"));
    assert_eq!((status, error.code.as_str()), (410, "gone"));
    assert_eq!(refusal(client.get("/v1/ports/%FF")).0, 400);
}

#[test]
fn the_forwarding_table_takes_static_entries() {
    let served = serve();
    let client = client(&served);
    client.post("/v1/ports", &served.spec("vm1")).unwrap();
    let mac: Mac = "52:54:00:00:00:01".parse().unwrap();
    let mut entry = FdbAdd {
        mac,
        port: "vm1".into(),
        replace: false,
    };
    client.post("/v1/fdb", &entry).unwrap();
    assert_eq!(refusal(client.post("/v1/fdb", &entry)).0, 409);
    entry.replace = true;
    client.post("/v1/fdb", &entry).unwrap();
    let list = client.get("/v1/fdb").unwrap().value().unwrap();
    assert_eq!(list[0]["static"], true);
    assert_eq!(list[0]["mac"], "52:54:00:00:00:01");
    let flushed: Flushed = client.delete("/v1/fdb?port=vm1").unwrap().read().unwrap();
    assert_eq!(flushed.removed, 1);
    client.delete("/v1/fdb?mac=52:54:00:00:00:01").unwrap();
    let (status, _) = refusal(client.delete("/v1/fdb?mac=52:54:00:00:00:01"));
    assert_eq!(status, 404);
}

#[test]
fn the_rest_is_readable() {
    let served = serve();
    let client = client(&served);
    let _: StatsView = client.get("/v1/stats").unwrap().read().unwrap();
    let threads: Vec<PollThreadView> = client.get("/v1/poll").unwrap().read().unwrap();
    assert_eq!(threads.len(), 1);
    let version: VersionView = client.get("/v1/version").unwrap().read().unwrap();
    assert_eq!(version.api, "v1");
    let openapi = client.get("/v1/openapi.json").unwrap().value().unwrap();
    assert!(openapi["paths"]["/v1/ports"].is_object());
}

#[test]
fn a_failing_call_is_an_answer_and_the_next_one_works() {
    let served = serve();
    let (status, error) = refusal(client(&served).get("/v1/ports/panics"));
    assert_eq!((status, error.code.as_str()), (500, "internal"));
    client(&served).get("/v1/ports").unwrap();
}

#[test]
fn a_large_body_is_refused_with_an_answer() {
    let served = serve();
    let body = json!({"name": "x".repeat(1 << 20)});
    let (status, error) = refusal(client(&served).post("/v1/ports", &body));
    assert_eq!((status, error.code.as_str()), (413, "too_large"));
    let endless = b"POST /v1/ports HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n";
    assert!(raw(&served, endless).starts_with("HTTP/1.1 413"));
}

#[test]
fn deep_json_is_refused() {
    let served = serve();
    let body = "[".repeat(60_000);
    let request = format!(
        "POST /v1/ports HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    assert!(raw(&served, request.as_bytes()).starts_with("HTTP/1.1 400"));
}

#[test]
fn half_a_request_is_given_up_and_disturbs_nobody() {
    let served = serve();
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let answer = raw(&served, b"GET /v1/ports HTTP/1.1\r\nhost");
            assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
        });
        scope.spawn(|| {
            let half = b"POST /v1/ports HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{";
            let answer = raw(&served, half);
            assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
        });
        client(&served).get("/v1/ports").unwrap();
        assert!(began.elapsed() < Duration::from_secs(4));
    });
    assert!(began.elapsed() < Duration::from_secs(15));
}

#[test]
fn the_connection_after_the_last_is_told_so() {
    let served = serve();
    let mut open = Vec::new();
    for _ in 0..64 {
        open.push(UnixStream::connect(&served.socket).unwrap());
    }
    let (status, error) = refusal(client(&served).get("/v1/ports"));
    assert_eq!((status, error.code.as_str()), (503, "busy"));
    drop(open);
    let until = Instant::now() + Duration::from_secs(3);
    while client(&served).get("/v1/ports").is_err() {
        assert!(Instant::now() < until, "slots do not come back");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn events_arrive_and_the_stream_ends_with_the_server() {
    let mut served = serve();
    let (sender, lines) = mpsc::channel();
    let reader = client(&served);
    let thread = std::thread::spawn(move || {
        reader.stream_lines("/v1/events", |line| {
            sender.send(line.to_string()).unwrap();
            ControlFlow::Continue(())
        })
    });
    // Until the subscription is there, events go to nobody.
    let first = loop {
        served.model.event(EventKind::RingStarted, "ring 0 started");
        if let Ok(line) = lines.recv_timeout(Duration::from_millis(50)) {
            break line;
        }
    };
    let event: Event = serde_json::from_str(&first).unwrap();
    assert_eq!(event.kind, EventKind::RingStarted);
    assert_eq!(event.port.as_deref(), Some("vm1"));
    served.server.take().unwrap().stop();
    thread.join().unwrap().unwrap();
    assert!(!served.socket.exists());
}

#[test]
fn a_stream_whose_reader_left_frees_its_place() {
    let served = serve();
    for _ in 0..40 {
        let mut stream = UnixStream::connect(&served.socket).unwrap();
        stream
            .write_all(b"GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n")
            .unwrap();
        let mut head = [0u8; 12];
        stream.read_exact(&mut head).unwrap();
        assert_eq!(&head, b"HTTP/1.1 200");
        drop(stream);
        std::thread::sleep(Duration::from_millis(150));
    }
}

#[test]
fn a_stream_that_is_not_read_ends_with_a_notice_and_holds_up_nobody() {
    let served = serve();
    let mut stream = UnixStream::connect(&served.socket).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream
        .write_all(b"GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    let mut head = [0u8; 12];
    stream.read_exact(&mut head).unwrap();
    let began = Instant::now();
    for _ in 0..20_000 {
        served.model.event(EventKind::RingStarted, &"x".repeat(500));
    }
    assert!(began.elapsed() < Duration::from_secs(5));
    client(&served).get("/v1/ports").unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("too_slow"));
    assert!(
        rest.ends_with("0\r\n\r\n"),
        "the stream was not ended properly"
    );
}

#[test]
fn a_stop_does_not_wait_for_a_call_that_hangs() {
    let mut served = serve();
    *served.model.delay.lock().unwrap() = Duration::from_secs(6);
    let asking = client(&served);
    let thread = std::thread::spawn(move || asking.get("/v1/ports"));
    std::thread::sleep(Duration::from_millis(200));
    let began = Instant::now();
    served.server.take().unwrap().stop();
    assert!(began.elapsed() < Duration::from_secs(4));
    assert!(thread.join().unwrap().is_err());
}

#[test]
fn a_live_socket_is_refused_and_a_stale_one_replaced() {
    let mut served = serve();
    let again = Server::start(&served.socket, None, Arc::new(Model::default()));
    let error = again.unwrap_err();
    assert!(matches!(error, ServerError::Live { .. }), "{error}");
    assert!(error.to_string().contains("another pollux answers on"));
    client(&served).get("/v1/ports").unwrap();
    served.server.take().unwrap().stop();

    drop(UnixListener::bind(&served.socket).unwrap());
    let server = Server::start(&served.socket, None, Arc::new(Model::default())).unwrap();
    client(&served).get("/v1/ports").unwrap();
    server.stop();
    let left: Vec<_> = fs::read_dir(served.dir.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn foreign_files_and_listeners_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let start = |path| Server::start(path, None, Arc::new(Model::default()));
    let file = dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    assert!(matches!(start(&file), Err(ServerError::NotASocket { .. })));
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    let socket = dir.path().join("other.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    assert!(matches!(start(&socket), Err(ServerError::InUse { .. })));
    let typo = dir.path().join("typo/api.sock");
    assert!(matches!(start(&typo), Err(ServerError::NoDirectory { .. })));
    assert!(!typo.parent().unwrap().exists());
    assert!(socket.exists());
    let long = dir.path().join("x".repeat(200));
    assert!(matches!(start(&long), Err(ServerError::Path { .. })));
    let nobody = Server::start(&socket, Some("no-such-group"), Arc::new(Model::default()));
    assert!(matches!(nobody, Err(ServerError::Group(_))));
}

#[test]
fn the_socket_is_for_its_user_and_group() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let _server = Server::start(&socket, None, Arc::new(Model::default())).unwrap();
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&socket), 0o660);
}

#[test]
fn another_user_is_told_to_go_even_if_the_file_lets_it_in() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("only root can become another user: not tested");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let _server = Server::start(&socket, Some("4242"), Arc::new(Model::default())).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
    let ask = |gid: u32| {
        let script = format!(
            "import socket; s = socket.socket(socket.AF_UNIX); s.connect('{}'); \
             s.sendall(b'GET /v1/ports HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n'); \
             print(s.recv(12).decode())",
            socket.display()
        );
        let mut command = Command::new("/usr/bin/python3");
        let output = command
            .args(["-c", &script])
            .uid(65534)
            .gid(gid)
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_string()
    };
    assert_eq!(ask(65534), "HTTP/1.1 403");
    assert_eq!(ask(4242), "HTTP/1.1 200");
}

#[test]
fn whatever_else_listens_is_recognised() {
    let dir = tempfile::tempdir().unwrap();
    let answering = |name: &str, answer: &'static str| {
        let path = dir.path().join(name);
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0u8; 4096];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(answer.as_bytes());
            if answer.is_empty() {
                std::thread::sleep(Duration::from_secs(3));
            }
        });
        Client::new(path)
            .with_limit(Duration::from_secs(1))
            .get("/v1/ports")
    };
    let error = answering("silent", "").unwrap_err();
    assert!(matches!(error, ClientError::Silent { .. }), "{error}");
    let error = answering("ssh", "SSH-2.0-OpenSSH_9.2\r\n").unwrap_err();
    assert!(matches!(error, ClientError::NotPollux { .. }), "{error}");
    let other = "HTTP/1.1 200 OK\r\nserver: nginx\r\ncontent-length: 2\r\n\r\n[]";
    let error = answering("http", other).unwrap_err();
    assert!(matches!(error, ClientError::NotPollux { .. }), "{error}");
    let later = "HTTP/1.1 404 Not Found\r\nserver: pollux/9.0.0\r\ncontent-length: 0\r\n\r\n";
    let error = answering("later", later).unwrap_err();
    assert!(matches!(error, ClientError::OtherVersion { .. }), "{error}");
    assert!(error.to_string().contains("9.0.0"));
    let half = "HTTP/1.1 200 OK\r\nserver: pollux/9.0.0\r\ncontent-length: 100\r\n\r\n[";
    let error = answering("half", half).unwrap_err();
    assert!(matches!(error, ClientError::Cut { .. }), "{error}");
    let error = Client::new(dir.path().join("none"))
        .get("/v1/ports")
        .unwrap_err();
    assert!(matches!(error, ClientError::NoDaemon { .. }), "{error}");
    let long = dir.path().join("x".repeat(200));
    let error = Client::new(long).get("/v1/ports").unwrap_err();
    assert!(matches!(error, ClientError::BadPath { .. }), "{error}");
}
