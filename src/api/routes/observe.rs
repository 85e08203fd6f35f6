//! Routes about observers: captures, traces, mirrors.

use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Extension, Path, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, extract::rejection::ExtensionRejection};

use super::{Api, Failure, Input, MAX_CAPTURES, call};
use crate::api::conn::Patience;
use crate::api::control::{ByteStream, Control, ControlError};
use crate::api::stream;
use crate::api::types::{
    ApiError, CaptureOrder, MirrorAdd, ObserverKind, ObserverView, TraceLine, TraceOrder,
};

/// Header with the name of the observer behind a stream.
pub(crate) const OBSERVER: &str = "pollux-observer";

/// All observers: captures, traces, mirrors.
#[utoipa::path(get, path = "/v1/observers", responses((status = 200, body = [ObserverView])))]
pub(super) async fn observers(State(api): State<Api>) -> Result<Json<Vec<ObserverView>>, Failure> {
    Ok(Json(call(&api, |control| control.observers()).await?))
}

/// Ends an observer. The stream of a capture or trace ends in order.
#[utoipa::path(
    delete,
    path = "/v1/observers/{name}",
    params(("name" = String, Path, description = "Name of the observer")),
    responses((status = 204, description = "It has ended"), (status = 404, body = ApiError))
)]
pub(super) async fn observer_remove(
    State(api): State<Api>,
    name: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, Failure> {
    let Path(name) = name?;
    call(&api, move |control| control.observer_remove(&name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The mirrors.
#[utoipa::path(get, path = "/v1/mirrors", responses((status = 200, body = [ObserverView])))]
pub(super) async fn mirrors(State(api): State<Api>) -> Result<Json<Vec<ObserverView>>, Failure> {
    let mut views = call(&api, |control| control.observers()).await?;
    views.retain(|view| view.kind == ObserverKind::Mirror);
    Ok(Json(views))
}

/// Adds a mirror.
#[utoipa::path(
    post,
    path = "/v1/mirrors",
    request_body = MirrorAdd,
    responses(
        (status = 201, body = ObserverView),
        (status = 400, body = ApiError),
        (status = 404, body = ApiError, description = "No such port"),
        (status = 409, body = ApiError, description = "Name in use, or too many observers"),
        (status = 410, body = ApiError, description = "A port, or the mirror itself, was removed meanwhile")
    )
)]
pub(super) async fn mirror_add(
    State(api): State<Api>,
    Input(order): Input<MirrorAdd>,
) -> Result<(StatusCode, Json<ObserverView>), Failure> {
    let view = call(&api, move |control| control.mirror_add(order)).await?;
    Ok((StatusCode::CREATED, Json(view)))
}

/// Removes a mirror.
#[utoipa::path(
    delete,
    path = "/v1/mirrors/{name}",
    params(("name" = String, Path, description = "Name of the mirror")),
    responses((status = 204, description = "Removed"), (status = 404, body = ApiError))
)]
pub(super) async fn mirror_remove(
    State(api): State<Api>,
    name: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, Failure> {
    let Path(name) = name?;
    call(&api, move |control| control.mirror_remove(&name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Frames as they pass, or as they are dropped: one pcapng section, until the count, the time, or
/// the observer of the name in the answer's `pollux-observer` header is over. Blocks of statistics
/// at its end say what was missed.
#[utoipa::path(
    get,
    path = "/v1/capture",
    params(CaptureOrder),
    responses(
        (status = 200, content_type = "application/x-pcapng"),
        (status = 400, body = ApiError),
        (status = 404, body = ApiError, description = "No such port"),
        (status = 409, body = ApiError, description = "Too many observers"),
        (status = 410, body = ApiError, description = "The port was removed meanwhile"),
        (status = 503, body = ApiError, description = "Too many streams are open, or no thread for one")
    )
)]
pub(super) async fn capture(
    State(api): State<Api>,
    patience: Result<Extension<Patience>, ExtensionRejection>,
    order: Result<Query<CaptureOrder>, QueryRejection>,
) -> Result<Response, Failure> {
    let Query(order) = order?;
    observe(
        &api,
        patience.ok(),
        "application/x-pcapng",
        move |control| control.capture(order),
    )
    .await
}

/// What becomes of the next frames that enter through a port, one JSON object a line.
#[utoipa::path(
    get,
    path = "/v1/trace",
    params(TraceOrder),
    responses(
        (status = 200, body = TraceLine, content_type = "application/jsonl"),
        (status = 400, body = ApiError),
        (status = 404, body = ApiError, description = "No such port"),
        (status = 409, body = ApiError, description = "Too many observers"),
        (status = 410, body = ApiError, description = "The port was removed meanwhile"),
        (status = 503, body = ApiError, description = "Too many streams are open, or no thread for one")
    )
)]
pub(super) async fn trace(
    State(api): State<Api>,
    patience: Result<Extension<Patience>, ExtensionRejection>,
    order: Result<Query<TraceOrder>, QueryRejection>,
) -> Result<Response, Failure> {
    let Query(order) = order?;
    observe(&api, patience.ok(), "application/jsonl", move |control| {
        control.trace(order)
    })
    .await
}

async fn observe<F>(
    api: &Api,
    patience: Option<Extension<Patience>>,
    content: &'static str,
    start: F,
) -> Result<Response, Failure>
where
    F: FnOnce(&dyn Control) -> Result<Box<dyn ByteStream>, ControlError> + Send + 'static,
{
    let Ok(permit) = api.captures.clone().try_acquire_owned() else {
        let message = format!("{MAX_CAPTURES} captures and traces are open already");
        return Err(Failure::busy(message));
    };
    let stream = call(api, start).await?;
    let name = HeaderValue::from_str(stream.name()).unwrap_or(HeaderValue::from_static(""));
    if let Some(Extension(patience)) = patience {
        patience.is_endless();
    }
    let chunks = stream::start_bytes(stream, permit, api.stopped.clone())?;
    let body = Body::new(chunks);
    let headers = [(header::CONTENT_TYPE, HeaderValue::from_static(content))];
    Ok((headers, [(OBSERVER, name)], body).into_response())
}
