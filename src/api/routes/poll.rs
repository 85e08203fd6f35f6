//! Routes about poll threads and their queues.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use super::{Api, Failure, Input, call};
use crate::api::types::{
    ApiError, Moved, PollAdd, PollMove, PollSettings, PollSettingsPatch, PollThreadView,
};

/// The poll threads.
#[utoipa::path(get, path = "/v1/poll", responses((status = 200, body = [PollThreadView])))]
pub(super) async fn poll_threads(
    State(api): State<Api>,
) -> Result<Json<Vec<PollThreadView>>, Failure> {
    Ok(Json(call(&api, |control| control.poll_threads()).await?))
}

/// Starts a poll thread.
#[utoipa::path(
    post,
    path = "/v1/poll",
    request_body = PollAdd,
    responses(
        (status = 201, body = PollThreadView),
        (status = 400, body = ApiError, description = "No such CPU"),
        (status = 409, body = ApiError, description = "The CPU has a poll thread, or there are too many")
    )
)]
pub(super) async fn poll_add(
    State(api): State<Api>,
    Input(order): Input<PollAdd>,
) -> Result<(StatusCode, Json<PollThreadView>), Failure> {
    let view = call(&api, move |control| control.poll_add(order)).await?;
    Ok((StatusCode::CREATED, Json(view)))
}

/// Gives a poll thread's queues to the others and ends it.
#[utoipa::path(
    delete,
    path = "/v1/poll/{thread}",
    params(("thread" = u32, Path, description = "Number of the thread")),
    responses(
        (status = 204, description = "It has ended"),
        (status = 404, body = ApiError),
        (status = 409, body = ApiError, description = "The last one, or a port is pinned to it")
    )
)]
pub(super) async fn poll_remove(
    State(api): State<Api>,
    thread: Result<Path<u32>, PathRejection>,
) -> Result<StatusCode, Failure> {
    let Path(thread) = thread?;
    call(&api, move |control| control.poll_remove(thread)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Gives a port's transmit queues, or one of them, to a poll thread.
#[utoipa::path(
    post,
    path = "/v1/poll/moves",
    request_body = PollMove,
    responses(
        (status = 200, body = Moved),
        (status = 404, body = ApiError, description = "No such port or poll thread"),
        (status = 409, body = ApiError, description = "The port is pinned to other threads"),
        (status = 410, body = ApiError, description = "The port was removed meanwhile")
    )
)]
pub(super) async fn poll_move(
    State(api): State<Api>,
    Input(order): Input<PollMove>,
) -> Result<Json<Moved>, Failure> {
    Ok(Json(
        call(&api, move |control| control.poll_move(order)).await?,
    ))
}

/// Changes how queues are placed and what threads do without work; answers how that is then.
#[utoipa::path(
    patch,
    path = "/v1/poll",
    request_body = PollSettingsPatch,
    responses(
        (status = 200, body = PollSettings),
        (status = 400, body = ApiError),
        (status = 404, body = ApiError, description = "No such poll thread")
    )
)]
pub(super) async fn poll_set(
    State(api): State<Api>,
    Input(patch): Input<PollSettingsPatch>,
) -> Result<Json<PollSettings>, Failure> {
    Ok(Json(
        call(&api, move |control| control.poll_set(patch)).await?,
    ))
}
