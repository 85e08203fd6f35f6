//! Answers that are not a success: the status and code of each refusal.

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::types::ApiError;
use super::{ControlError, What};
use crate::config::ALL_PORTS;

/// The code of a daemon that is about to end. Clients need not ask again.
pub(crate) const STOPPING: &str = "stopping";

/// An answer that is not a success.
#[derive(Debug)]
pub(super) struct Failure(StatusCode, ApiError);

impl Failure {
    pub(super) fn new(
        status: StatusCode,
        code: &str,
        message: impl Into<String>,
        hint: Option<&str>,
    ) -> Self {
        Failure(
            status,
            ApiError {
                code: code.into(),
                message: message.into(),
                hint: hint.map(Into::into),
            },
        )
    }

    pub(super) fn bad(message: impl Into<String>) -> Self {
        Failure::new(StatusCode::BAD_REQUEST, "bad_argument", message, None)
    }

    pub(super) fn busy(message: impl Into<String>) -> Self {
        let hint = Some("try again");
        Failure::new(StatusCode::SERVICE_UNAVAILABLE, "busy", message, hint)
    }
}

/// The system has no thread for the request. Only this client is refused, and it may try again.
impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::busy(format!("the system refuses {error}"))
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        let (status, code) = match &error {
            ControlError::BadArgument(_) => (StatusCode::BAD_REQUEST, "bad_argument"),
            ControlError::NotFound { .. } => (StatusCode::NOT_FOUND, "not_found"),
            ControlError::Conflict { .. } => (StatusCode::CONFLICT, "conflict"),
            ControlError::Gone { .. } => (StatusCode::GONE, "gone"),
            ControlError::Stopping => (StatusCode::SERVICE_UNAVAILABLE, STOPPING),
            ControlError::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        };
        // No port can have the name `all`. The client meant the word that only captures accept.
        let hint = match &error {
            ControlError::NotFound {
                what: What::Port(name),
            } if name == ALL_PORTS => Some("`all` stands for every port in captures only"),
            _ => None,
        };
        Failure::new(status, code, error.to_string(), hint)
    }
}

impl From<QueryRejection> for Failure {
    fn from(rejection: QueryRejection) -> Self {
        Failure::bad(rejection.body_text())
    }
}

impl From<PathRejection> for Failure {
    fn from(rejection: PathRejection) -> Self {
        Failure::bad(rejection.body_text())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}
