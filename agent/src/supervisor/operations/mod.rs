//! What the operator asks for. Each verb's [`CarryOut`](crate::control::verbs::CarryOut) is beside what it takes: here, and in
//! `making`, `admission` and `membership`.

mod mirroring;
mod roles;
mod status;

use super::{Supervisor, failed};
use crate::config::Name;
use crate::control::api::Failure;
use crate::quantity::Seconds;
use crate::volume::{Answer, Ask, Silence};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// How often it is looked whether a volume hangs that was told to do something.
const ORDER_LOOK: Duration = Duration::from_secs(1);

/// The operator's view of a supervisor.
pub struct Operator(pub Arc<Supervisor>);

impl Supervisor {
    /// Has a volume do something, which it goes on with when the tool goes away.
    pub(super) async fn order<Done>(
        &self,
        volume: &Name,
        order: impl FnOnce(Answer<Done>) -> Ask,
    ) -> Result<Done, Failure> {
        let handle = self.handle_of(volume).await?;
        let is_silent = || handle.pulse().hung().filter(|silence| silence.path.is_none());
        if let Some(silence) = is_silent() {
            return Err(hangs(volume, &silence, "nothing was begun"));
        }
        let mut done = pin!(handle.answer(order));
        loop {
            match tokio::time::timeout(ORDER_LOOK, &mut done).await {
                Ok(Some(done)) => return done,
                Ok(None) => return Err(failed("the agent stops; look at the status later")),
                Err(_) => {}
            }
            if let Some(silence) = is_silent() {
                return Err(hangs(volume, &silence, "what was begun may go on when it answers"));
            }
        }
    }
}

/// Why an order is not waited for.
fn hangs(volume: &Name, silence: &Silence, consequence: &str) -> Failure {
    let (what, seconds) = (silence.what(), Seconds(silence.lasted.as_secs()));
    failed(format!(
        "{what} has not answered for {seconds}: a disk or the state folder hangs; {consequence}. \
         Look at blockmirror status {volume}; where a replica has everything, there: blockmirror promote {volume}"
    ))
}

/// Waits for what goes on when the tool goes away.
pub(super) async fn finish<Done>(task: JoinHandle<Result<Done, Failure>>) -> Result<Done, Failure> {
    task.await.unwrap_or_else(|_| Err(failed("the agent failed inside; see its log")))
}
