//! `blockmirror resume`: goes on mirroring with a peer.

use crate::client::Client;
use crate::output::{Error, Output};
pub use crate::pause::Arguments;
use blockmirror_agent::control::api::ResumeRequest;

/// Has the agent go on.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let subject = arguments.peer();
    let answer = client.ask(&subject, &ResumeRequest).await?;
    output.line(&format!("resumed {} with {}", subject.volume, answer.name))?;
    Ok(())
}
