//! Requests of the tool, as calls of [`Operations`].
//!
//! Every answer is JSON: what was asked for, or a [`Failure`]. The path of a request names volumes and peers; its body
//! holds the rest, if there is any.

use super::api::{Failure, FailureKind};
use super::verbs::{self, CarryOut, Operations, Subject, Verb};
use axum::body::Bytes;
use axum::extract::rejection::PathRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, MethodRouter, on};
use axum::{Json, Router};
use serde::Serialize;
use std::sync::Arc;

/// No request's body is longer than this, in bytes.
const BODY_LIMIT_BYTES: usize = 64 << 10;

/// Everything that can be asked for.
pub(super) fn router<O: Operations>(operations: Arc<O>) -> Router {
    let add = |router: Router<Arc<O>>, (pattern, route): (String, _)| router.route(&pattern, route);
    verbs::routes()
        .into_iter()
        .fold(Router::new(), add)
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .layer(DefaultBodyLimit::max(BODY_LIMIT_BYTES))
        .with_state(operations)
}

/// What answers a verb.
pub(super) fn route<V: Verb, O: CarryOut<V>>() -> MethodRouter<Arc<O>> {
    let method = MethodFilter::try_from(V::METHOD).expect("it is a method of HTTP");
    on(method, serve::<V, O>)
}

/// The names in an address, or why they could not be read.
type Names = Result<Path<Vec<String>>, PathRejection>;

async fn serve<V: Verb, O: CarryOut<V>>(
    State(operations): State<Arc<O>>,
    names: Names,
    request: Request,
) -> Response {
    match understand::<V>(names, request).await {
        Ok((subject, verb)) => answer(operations.carry_out(subject, verb).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn understand<V: Verb>(names: Names, request: Request) -> Result<(V::Subject, V), Failure> {
    let Path(names) = names.map_err(|error| unreadable(&error.body_text()))?;
    let subject = V::Subject::read(names, request.uri().query())?;
    let body = match V::HAS_BODY {
        true => Bytes::from_request(request, &()).await.map_err(|error| unreadable(&error.body_text()))?,
        false => Bytes::new(),
    };
    let verb = V::read(&body).map_err(|error| Failure::from_error(FailureKind::Usage, &error))?;
    Ok((subject, verb))
}

async fn unknown() -> Response {
    let message = "the agent does not know this request; use a tool of the agent's version";
    answer::<()>(Err(Failure::new(FailureKind::Usage, message)))
}

fn unreadable(why: &str) -> Failure {
    Failure::new(FailureKind::Usage, why.to_lowercase())
}

fn answer<T: Serialize>(result: Result<T, Failure>) -> Response {
    match result {
        Ok(reply) => Json(reply).into_response(),
        Err(failure) => (http_status(failure.kind), Json(failure)).into_response(),
    }
}

/// The nearest HTTP status; the tool reads the body.
fn http_status(kind: FailureKind) -> StatusCode {
    match kind {
        FailureKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        FailureKind::Usage => StatusCode::BAD_REQUEST,
        FailureKind::AgentNotRunning => StatusCode::SERVICE_UNAVAILABLE,
        FailureKind::NoSuchVolume => StatusCode::NOT_FOUND,
        FailureKind::Refused => StatusCode::CONFLICT,
        FailureKind::Timeout => StatusCode::GATEWAY_TIMEOUT,
    }
}
