//! Calls that may wait for our own server, or take long: never on a volume's thread.

use tokio::task::spawn_blocking;

/// Runs what may wait for our own server, or takes long, on a thread for blocking calls.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
