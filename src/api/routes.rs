//! The routes under `/v1`: each reads its request, makes one call into control and answers with
//! JSON.
//!
//! Every answer that is not a success is an [`ApiError`]. That includes unknown routes, and
//! requests that are too large or too slow.

pub(super) mod observe;
mod poll;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{FromRequest, Path, Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, body::Body};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Bytes};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::timeout;
use utoipa::IntoParams;

use super::failure::Failure;
use super::types::{
    ApiError, Event, FdbAdd, FdbEntry, Flushed, PortPatch, PortView, StatsView, VersionView,
};
use super::{Control, ControlError, openapi, stream};
use crate::config::PortSpec;
use crate::sys::thread;
use crate::wire::Mac;

/// Largest body of a request, in bytes.
const MAX_BODY: usize = 64 * 1024;
/// Most bytes of an excessive body that are read and discarded. The sender can then read the answer
/// instead of failing in its write.
const MAX_DISCARD: usize = 4 * 1024 * 1024;
/// Longest time in which a client may send the body.
const BODY_LIMIT: Duration = Duration::from_secs(5);
/// Longest time that a request waits for control.
const CALL_LIMIT: Duration = Duration::from_secs(8);
/// Most calls into control at once.
pub(super) const MAX_CALLS: usize = 8;
/// Most event streams at once.
pub(super) const MAX_STREAMS: usize = 16;
/// Most captures and traces at once.
pub(super) const MAX_CAPTURES: usize = 16;
/// The `Server:` header. Clients recognise a pollux and its version by it.
pub(super) const SERVER: &str = concat!("pollux/", env!("CARGO_PKG_VERSION"));

#[derive(Clone)]
struct Api {
    control: Arc<dyn Control>,
    calls: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    captures: Arc<Semaphore>,
    stopped: watch::Receiver<bool>,
}

/// A JSON body within its limits. The content type is ignored, because `curl -d` says form data.
struct Input<T>(T);

impl<T: DeserializeOwned> FromRequest<Api> for Input<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &Api) -> Result<Self, Failure> {
        let body = timeout(BODY_LIMIT, read_body(request.into_body())).await;
        let bytes = body.map_err(|_| {
            let message = format!("no whole body within {} s", BODY_LIMIT.as_secs());
            Failure::new(StatusCode::REQUEST_TIMEOUT, "timeout", message, None)
        })??;
        serde_json::from_slice(&bytes)
            .map(Input)
            .map_err(|error| Failure::bad(format!("body: {error}")))
    }
}

async fn read_body(mut body: Body) -> Result<Vec<u8>, Failure> {
    let too_large = || {
        let message = format!("a body may have at most {MAX_BODY} bytes");
        Failure::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message, None)
    };
    if body.size_hint().lower() > MAX_DISCARD as u64 {
        return Err(too_large());
    }
    let mut kept = Vec::new();
    let mut seen = 0usize;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failure::bad(format!("body: {error}")))?;
        let Some(data) = frame.data_ref() else {
            continue;
        };
        seen += data.len();
        if seen > MAX_DISCARD {
            break;
        }
        if seen <= MAX_BODY {
            kept.extend_from_slice(data);
        }
    }
    if seen > MAX_BODY {
        return Err(too_large());
    }
    Ok(kept)
}

/// Makes one call into control on a helper thread. Returns its result, or an error after
/// `CALL_LIMIT`.
async fn call<T, F>(api: &Api, f: F) -> Result<T, Failure>
where
    T: Send + 'static,
    F: FnOnce(&dyn Control) -> Result<T, ControlError> + Send + 'static,
{
    let waiting = timeout(CALL_LIMIT, api.calls.clone().acquire_owned()).await;
    let Ok(Ok(permit)) = waiting else {
        return Err(Failure::busy("other requests keep the daemon busy"));
    };
    let control = api.control.clone();
    let (answer, answered) = oneshot::channel();
    // A new thread for each call. The pool of tokio panics if no thread can be made, and keeps the
    // task.
    thread::spawn("api-call", move || {
        // The call holds the permit, not the request: a call continues when its client leaves.
        let _permit = permit;
        // The send fails if the requester has gone.
        let _ = answer.send(f(&*control));
    })?;
    match timeout(CALL_LIMIT, answered).await {
        Ok(Ok(result)) => Ok(result?),
        Ok(Err(_)) => Err(ControlError::Internal("the request failed in the daemon".into()).into()),
        Err(_) => Err(Failure::new(
            StatusCode::GATEWAY_TIMEOUT,
            "timeout",
            format!(
                "no answer within {} s; it may still be done",
                CALL_LIMIT.as_secs()
            ),
            Some("look at the daemon's log and at /v1/poll"),
        )),
    }
}

pub(super) fn router(control: Arc<dyn Control>, stopped: watch::Receiver<bool>) -> Router {
    let api = Api {
        control,
        calls: Arc::new(Semaphore::new(MAX_CALLS)),
        streams: Arc::new(Semaphore::new(MAX_STREAMS)),
        captures: Arc::new(Semaphore::new(MAX_CAPTURES)),
        stopped,
    };
    Router::new()
        .route("/v1/version", get(version))
        .route("/v1/ports", get(ports).post(add_port))
        .route(
            "/v1/ports/{name}",
            get(port).delete(remove_port).patch(set_port),
        )
        .route("/v1/fdb", get(fdb).post(fdb_add).merge(delete(fdb_delete)))
        .route(
            "/v1/poll",
            get(poll::poll_threads)
                .post(poll::poll_add)
                .patch(poll::poll_set),
        )
        .route("/v1/poll/moves", post(poll::poll_move))
        .route("/v1/poll/{thread}", delete(poll::poll_remove))
        .route("/v1/observers", get(observe::observers))
        .route("/v1/observers/{name}", delete(observe::observer_remove))
        .route(
            "/v1/mirrors",
            get(observe::mirrors).post(observe::mirror_add),
        )
        .route("/v1/mirrors/{name}", delete(observe::mirror_remove))
        .route("/v1/capture", get(observe::capture))
        .route("/v1/trace", get(observe::trace))
        .route("/v1/stats", get(stats))
        .route("/v1/events", get(events))
        .route("/v1/openapi.json", get(openapi_json))
        .fallback(no_such_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(map_response(name_server))
        .with_state(api)
}

async fn name_server(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::SERVER, HeaderValue::from_static(SERVER));
    response
}

async fn no_such_route() -> Failure {
    let hint = Some("the routes are listed in /v1/openapi.json");
    Failure::new(
        StatusCode::NOT_FOUND,
        "no_such_route",
        "no such route",
        hint,
    )
}

async fn method_not_allowed() -> Failure {
    let status = StatusCode::METHOD_NOT_ALLOWED;
    let hint = Some("the methods are listed in /v1/openapi.json");
    let message = "this route does not take this method";
    Failure::new(status, "method_not_allowed", message, hint)
}

/// What is running.
#[utoipa::path(get, path = "/v1/version", responses((status = 200, body = VersionView)))]
async fn version(State(api): State<Api>) -> Result<Json<VersionView>, Failure> {
    Ok(Json(call(&api, |control| Ok(control.version())).await?))
}

/// All ports.
#[utoipa::path(get, path = "/v1/ports", responses((status = 200, body = [PortView])))]
async fn ports(State(api): State<Api>) -> Result<Json<Vec<PortView>>, Failure> {
    Ok(Json(call(&api, |control| control.ports()).await?))
}

/// One port, its session and its counters.
#[utoipa::path(
    get,
    path = "/v1/ports/{name}",
    params(("name" = String, Path, description = "Name of the port")),
    responses((status = 200, body = PortView), (status = 404, body = ApiError))
)]
async fn port(
    State(api): State<Api>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<PortView>, Failure> {
    let Path(name) = name?;
    Ok(Json(call(&api, move |control| control.port(&name)).await?))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct AddQuery {
    /// A port that exists with the same values is a success (200), not a conflict.
    #[serde(default)]
    may_exist: bool,
}

/// Creates a port.
#[utoipa::path(
    post,
    path = "/v1/ports",
    params(AddQuery),
    request_body = PortSpec,
    responses(
        (status = 201, body = PortView, description = "Created"),
        (status = 200, body = PortView, description = "Exists or created, with may_exist"),
        (status = 400, body = ApiError),
        (status = 409, body = ApiError, description = "Name or socket in use")
    )
)]
async fn add_port(
    State(api): State<Api>,
    query: Result<Query<AddQuery>, QueryRejection>,
    Input(spec): Input<PortSpec>,
) -> Result<(StatusCode, Json<PortView>), Failure> {
    let Query(AddQuery { may_exist }) = query?;
    spec.validate().map_err(ControlError::from)?;
    if !spec.socket.is_absolute() {
        // The client's working directory is not the daemon's.
        return Err(Failure::bad(format!(
            "socket path {:?} must be absolute",
            spec.socket
        )));
    }
    let status = if may_exist {
        StatusCode::OK
    } else {
        StatusCode::CREATED
    };
    let view = call(&api, move |control| control.add_port(spec, may_exist)).await?;
    Ok((status, Json(view)))
}

/// Removes a port.
#[utoipa::path(
    delete,
    path = "/v1/ports/{name}",
    params(("name" = String, Path, description = "Name of the port")),
    responses((status = 204, description = "Removed"), (status = 404, body = ApiError))
)]
async fn remove_port(
    State(api): State<Api>,
    name: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, Failure> {
    let Path(name) = name?;
    call(&api, move |control| control.remove_port(&name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Changes a port.
#[utoipa::path(
    patch,
    path = "/v1/ports/{name}",
    params(("name" = String, Path, description = "Name of the port")),
    request_body = PortPatch,
    responses(
        (status = 200, body = PortView),
        (status = 400, body = ApiError),
        (status = 404, body = ApiError)
    )
)]
async fn set_port(
    State(api): State<Api>,
    name: Result<Path<String>, PathRejection>,
    Input(patch): Input<PortPatch>,
) -> Result<Json<PortView>, Failure> {
    let Path(name) = name?;
    Ok(Json(
        call(&api, move |control| control.set_port(&name, patch)).await?,
    ))
}

/// The forwarding table.
#[utoipa::path(get, path = "/v1/fdb", responses((status = 200, body = [FdbEntry])))]
async fn fdb(State(api): State<Api>) -> Result<Json<Vec<FdbEntry>>, Failure> {
    Ok(Json(call(&api, |control| control.fdb()).await?))
}

/// Adds a static entry.
#[utoipa::path(
    post,
    path = "/v1/fdb",
    request_body = FdbAdd,
    responses(
        (status = 201, body = FdbEntry),
        (status = 400, body = ApiError),
        (status = 404, body = ApiError, description = "No such port"),
        (status = 409, body = ApiError, description = "A static entry of the address exists and replace is not set, or there is no room")
    )
)]
async fn fdb_add(
    State(api): State<Api>,
    Input(entry): Input<FdbAdd>,
) -> Result<(StatusCode, Json<FdbEntry>), Failure> {
    // No frame is sent to the zero address, and frames to groups go to all ports.
    if entry.mac.is_multicast() || entry.mac.is_zero() {
        let kind = match entry.mac.is_zero() {
            true => "the zero address",
            false => "a group address",
        };
        return Err(Failure::bad(format!(
            "{} is {kind}; only a station's address can be on a port",
            entry.mac
        )));
    }
    let entry = call(&api, move |control| control.fdb_add(entry)).await?;
    Ok((StatusCode::CREATED, Json(entry)))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct FdbSelection {
    /// Remove this one entry, static or learned.
    #[param(value_type = Option<String>)]
    mac: Option<Mac>,
    /// Forget the learned entries of this port.
    port: Option<String>,
}

/// Removes one entry (mac), or forgets the learned entries of one port (port) or of all.
#[utoipa::path(
    delete,
    path = "/v1/fdb",
    params(FdbSelection),
    responses((status = 200, body = Flushed), (status = 404, body = ApiError))
)]
async fn fdb_delete(
    State(api): State<Api>,
    query: Result<Query<FdbSelection>, QueryRejection>,
) -> Result<Json<Flushed>, Failure> {
    let Query(FdbSelection { mac, port }) = query?;
    let Some(mac) = mac else {
        let removed = call(&api, move |control| control.fdb_flush(port.as_deref())).await?;
        return Ok(Json(Flushed { removed }));
    };
    if port.is_some() {
        return Err(Failure::bad(
            "mac names one entry, port all of a port: give one of them",
        ));
    }
    call(&api, move |control| control.fdb_remove(mac)).await?;
    Ok(Json(Flushed { removed: 1 }))
}

/// Counters of everything at one moment.
#[utoipa::path(get, path = "/v1/stats", responses((status = 200, body = StatsView)))]
async fn stats(State(api): State<Api>) -> Result<Json<StatsView>, Failure> {
    Ok(Json(call(&api, |control| control.stats()).await?))
}

/// Events from now on, one JSON object a line, until the daemon stops.
#[utoipa::path(
    get,
    path = "/v1/events",
    responses(
        (status = 200, body = Event, content_type = "application/jsonl"),
        (status = 503, body = ApiError, description = "Too many streams are open, or no thread for one")
    )
)]
async fn events(State(api): State<Api>) -> Result<Response, Failure> {
    let Ok(permit) = api.streams.clone().try_acquire_owned() else {
        let message = format!("{MAX_STREAMS} event streams are open already");
        return Err(Failure::busy(message));
    };
    let receiver = call(&api, |control| Ok(control.subscribe())).await?;
    let lines = stream::start(receiver, permit, api.stopped.clone())?;
    let body = Body::new(lines);
    Ok(([(header::CONTENT_TYPE, "application/jsonl")], body).into_response())
}

/// This description.
#[utoipa::path(get, path = "/v1/openapi.json", responses((status = 200)))]
async fn openapi_json() -> Response {
    let text = Bytes::from(openapi::document());
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

/// The routes above, for the description generated from them.
#[derive(utoipa::OpenApi)]
#[openapi(
    paths(
        version,
        ports,
        port,
        add_port,
        remove_port,
        set_port,
        fdb,
        fdb_add,
        fdb_delete,
        poll::poll_threads,
        poll::poll_add,
        poll::poll_remove,
        poll::poll_move,
        poll::poll_set,
        observe::observers,
        observe::observer_remove,
        observe::mirrors,
        observe::mirror_add,
        observe::mirror_remove,
        observe::capture,
        observe::trace,
        stats,
        events,
        openapi_json
    ),
    components(schemas(Event, ApiError)),
    info(
        title = "Pollux API",
        version = "v1",
        description = "Operates a running pollux over its unix socket. Any answer that is not a \
                       success has an ApiError as its body.",
        license(name = "Apache-2.0 OR BSD-3-Clause")
    )
)]
pub(super) struct Documentation;
