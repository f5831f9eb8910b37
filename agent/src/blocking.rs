//! Calls that may wait for our own server, or take long: never on a volume's thread.

use crate::crashes::Worker;
use tokio::task::JoinHandle;

/// Runs what may wait for our own server, or takes long, on a thread for blocking calls. It works for whom this one does.
pub(crate) fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let worker = Worker::current();
    tokio::task::spawn_blocking(move || worker.works(work))
}

/// As [`spawn`], and waits for it.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
