//! `blockmirror create`: makes a volume, with this host as its primary.

use crate::client::Client;
use crate::output::{Error, Output};
use crate::status;
use blockmirror_agent::config::{DeviceKind, Name};
use blockmirror_agent::control::api::{CreateRequest, Failure, FailureKind};
use blockmirror_agent::quantity::Size;
use blockmirror_protocol::units::BlockSize;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};

/// What to make.
#[derive(Args)]
pub struct Arguments {
    /// What the volume is called
    name: Name,
    /// An image file, made where it is missing, or a block device
    #[arg(long, value_name = "PATH")]
    backing: PathBuf,
    /// The volume's size, such as 100G; by default all of the backing
    #[arg(long)]
    size: Option<Size>,
    /// What applications can open; by default nbd and loop
    #[arg(long = "device", value_name = "KIND", num_args = 1.., value_delimiter = ',')]
    devices: Vec<Device>,
    /// The unit of tracking, a power of two from 4K to 1M; by default 4K
    #[arg(long, value_name = "SIZE", value_parser = block_size)]
    block_size: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Device {
    Nbd,
    Loop,
    None,
}

/// Asks the agent to make the volume, and shows it.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let request = CreateRequest {
        devices: kinds(&arguments.devices)?,
        name: arguments.name,
        backing: absolute(&arguments.backing)?,
        size_bytes: arguments.size.map(|size| size.0),
        block_size_bytes: arguments.block_size,
    };
    let reply = client.ask(&(), &request).await?;
    output.line(&format!("created {}", request.name))?;
    output.lines(&status::details(&reply.volumes))?;
    Ok(())
}

fn block_size(text: &str) -> Result<u64, String> {
    let size: Size =
        text.parse().map_err(|error: blockmirror_agent::quantity::NotASize| error.to_string())?;
    BlockSize::new(size.0).map(BlockSize::bytes).map_err(|error| error.to_string())
}

fn kinds(devices: &[Device]) -> Result<Vec<DeviceKind>, Failure> {
    if devices.is_empty() {
        // A loop device takes root; asking for it all the same gets an answer that says so.
        let is_root = rustix::process::geteuid().is_root();
        return Ok(if is_root { DeviceKind::defaults() } else { vec![DeviceKind::Nbd] });
    }
    if devices.contains(&Device::None) && devices.iter().any(|device| *device != Device::None) {
        return Err(Failure::new(FailureKind::Usage, "\"none\" goes with no other device; leave one out"));
    }
    let mut kinds = Vec::new();
    for device in devices {
        let kind = match device {
            Device::Nbd => DeviceKind::Nbd,
            Device::Loop => DeviceKind::Loop,
            Device::None => continue,
        };
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    Ok(kinds)
}

/// The path as the agent, which has another working folder, finds it.
pub fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| Failure::from_error(FailureKind::Usage, &error))
}
