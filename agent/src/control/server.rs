//! Requests of the tool, as calls of [`Operations`].
//!
//! Every answer is JSON: what was asked for, or a [`Failure`]. The path of a request names volumes and peers; its body
//! holds the rest, if there is any.

use super::Operations;
use super::api::{Failure, FailureKind};
use crate::config::Name;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;

/// No request's body is longer than this, in bytes.
const BODY_LIMIT_BYTES: usize = 64 << 10;

/// A body, or why it could not be read.
type Body = Result<Bytes, BytesRejection>;

/// Everything that can be asked for.
pub(super) fn router<O: Operations>(operations: Arc<O>) -> Router {
    Router::new()
        .route("/v1/status", get(status::<O>))
        .route("/v1/volumes", post(create::<O>))
        .route("/v1/join", post(join::<O>))
        .route("/v1/volumes/{volume}/invite", post(invite::<O>))
        .route("/v1/volumes/{volume}/invitations", get(invitations::<O>))
        .route("/v1/volumes/{volume}/invitations/{id}/revoke", post(revoke::<O>))
        .route("/v1/volumes/{volume}/peers/{peer}/remove", post(remove_peer::<O>))
        .route("/v1/volumes/{volume}/peers", get(peers::<O>))
        .route("/v1/volumes/{volume}/peers/{peer}/pause", post(pause::<O>))
        .route("/v1/volumes/{volume}/peers/{peer}/resume", post(resume::<O>))
        .route("/v1/volumes/{volume}/peers/{peer}/compare", post(compare::<O>))
        .route("/v1/volumes/{volume}/peers/{peer}/mode", post(set_mode::<O>))
        .route("/v1/volumes/{volume}/peers/{peer}/tune", post(tune::<O>))
        .route("/v1/volumes/{volume}/peers/{peer}/address", post(set_address::<O>))
        .route("/v1/volumes/{volume}/promote", post(promote::<O>))
        .route("/v1/volumes/{volume}/demote", post(demote::<O>))
        .route("/v1/volumes/{volume}/switch", post(switch::<O>))
        .route("/v1/volumes/{volume}/resolve", post(resolve::<O>))
        .route("/v1/volumes/{volume}/undo", post(undo::<O>))
        .route("/v1/volumes/{volume}/forget", post(forget::<O>))
        .route("/v1/volumes/{volume}/release", post(release::<O>))
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .layer(DefaultBodyLimit::max(BODY_LIMIT_BYTES))
        .with_state(operations)
}

async fn status<O: Operations>(State(operations): State<Arc<O>>, uri: Uri) -> Response {
    match asked_volume(&uri) {
        Ok(volume) => answer(operations.status(volume).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn create<O: Operations>(State(operations): State<Arc<O>>, body: Body) -> Response {
    match parse(body) {
        Ok(request) => answer(operations.create(request).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn join<O: Operations>(State(operations): State<Arc<O>>, body: Body) -> Response {
    match parse(body) {
        Ok(request) => answer(operations.join(request).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn invite<O: Operations>(
    State(operations): State<Arc<O>>,
    Path(volume): Path<String>,
    body: Body,
) -> Response {
    match name(volume).and_then(|volume| Ok((volume, parse(body)?))) {
        Ok((volume, request)) => answer(operations.invite(volume, request).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn invitations<O: Operations>(
    State(operations): State<Arc<O>>,
    Path(volume): Path<String>,
) -> Response {
    match name(volume) {
        Ok(volume) => answer(operations.invitations(volume).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn revoke<O: Operations>(State(operations): State<Arc<O>>, Path((volume, id)): Pair) -> Response {
    match name(volume) {
        Ok(volume) => answer(operations.revoke(volume, id).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn remove_peer<O: Operations>(State(operations): State<Arc<O>>, pair: Pair, body: Body) -> Response {
    match names(pair).and_then(|names| Ok((names, parse(body)?))) {
        Ok(((volume, peer), request)) => answer(operations.remove_peer(volume, peer, request).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn peers<O: Operations>(State(operations): State<Arc<O>>, Path(volume): Path<String>) -> Response {
    match name(volume) {
        Ok(volume) => answer(operations.peers(volume).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

/// A volume and one of its peers, from the path.
type Pair = Path<(String, String)>;

async fn pause<O: Operations>(State(operations): State<Arc<O>>, pair: Pair) -> Response {
    match names(pair) {
        Ok((volume, peer)) => answer(operations.pause(volume, peer).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn resume<O: Operations>(State(operations): State<Arc<O>>, pair: Pair) -> Response {
    match names(pair) {
        Ok((volume, peer)) => answer(operations.resume(volume, peer).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn compare<O: Operations>(State(operations): State<Arc<O>>, pair: Pair) -> Response {
    match names(pair) {
        Ok((volume, peer)) => answer(operations.compare(volume, peer).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn set_mode<O: Operations>(State(operations): State<Arc<O>>, pair: Pair, body: Body) -> Response {
    match names(pair).and_then(|names| Ok((names, parse(body)?))) {
        Ok(((volume, peer), request)) => answer(operations.set_mode(volume, peer, request).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn tune<O: Operations>(State(operations): State<Arc<O>>, pair: Pair, body: Body) -> Response {
    match names(pair).and_then(|names| Ok((names, parse(body)?))) {
        Ok(((volume, peer), request)) => answer(operations.tune(volume, peer, request).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn set_address<O: Operations>(State(operations): State<Arc<O>>, pair: Pair, body: Body) -> Response {
    match names(pair).and_then(|names| Ok((names, parse(body)?))) {
        Ok(((volume, peer), request)) => answer(operations.set_address(volume, peer, request).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn promote<O: Operations>(
    State(operations): State<Arc<O>>,
    Path(volume): Path<String>,
    body: Body,
) -> Response {
    match name(volume).and_then(|volume| Ok((volume, parse(body)?))) {
        Ok((volume, request)) => answer(operations.promote(volume, request).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn demote<O: Operations>(State(operations): State<Arc<O>>, Path(volume): Path<String>) -> Response {
    match name(volume) {
        Ok(volume) => answer(operations.demote(volume).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn switch<O: Operations>(
    State(operations): State<Arc<O>>,
    Path(volume): Path<String>,
    body: Body,
) -> Response {
    match name(volume).and_then(|volume| Ok((volume, parse(body)?))) {
        Ok((volume, request)) => answer(operations.switch(volume, request).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn resolve<O: Operations>(
    State(operations): State<Arc<O>>,
    Path(volume): Path<String>,
    body: Body,
) -> Response {
    match name(volume).and_then(|volume| Ok((volume, parse(body)?))) {
        Ok((volume, request)) => answer(operations.resolve(volume, request).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn undo<O: Operations>(State(operations): State<Arc<O>>, Path(volume): Path<String>) -> Response {
    match name(volume) {
        Ok(volume) => answer(operations.undo(volume).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn forget<O: Operations>(State(operations): State<Arc<O>>, Path(volume): Path<String>) -> Response {
    match name(volume) {
        Ok(volume) => answer(operations.forget(volume).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn release<O: Operations>(
    State(operations): State<Arc<O>>,
    Path(volume): Path<String>,
    body: Body,
) -> Response {
    match name(volume).and_then(|volume| Ok((volume, parse(body)?))) {
        Ok((volume, request)) => answer(operations.release(volume, request).await),
        Err(failure) => answer::<()>(Err(failure)),
    }
}

async fn unknown() -> Response {
    let message = "the agent does not know this request; use a tool of the agent's version";
    answer::<()>(Err(Failure::new(FailureKind::Usage, message)))
}

fn asked_volume(uri: &Uri) -> Result<Option<Name>, Failure> {
    let Some(query) = uri.query() else { return Ok(None) };
    match query.strip_prefix("volume=") {
        // A name consists of characters that stand for themselves in a query.
        Some(volume) => name(volume.to_owned()).map(Some),
        None => Err(Failure::new(FailureKind::Usage, "the only thing to ask a status for is a volume")),
    }
}

fn name(text: String) -> Result<Name, Failure> {
    Name::try_from(text).map_err(|error| Failure::from_error(FailureKind::Usage, &error))
}

fn names(Path((volume, peer)): Pair) -> Result<(Name, Name), Failure> {
    Ok((name(volume)?, name(peer)?))
}

fn parse<T: DeserializeOwned>(body: Body) -> Result<T, Failure> {
    let body = body.map_err(|error| Failure::new(FailureKind::Usage, error.body_text().to_lowercase()))?;
    serde_json::from_slice(&body).map_err(|error| Failure::from_error(FailureKind::Usage, &error))
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
