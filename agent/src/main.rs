//! `blockmirror-agent`: the daemon. Reads the configuration, serves the volumes, stops in order on SIGTERM or SIGINT.

use anyhow::Context;
use blockmirror_agent::config::ConfigFolder;
use blockmirror_agent::control::ControlSocket;
use blockmirror_agent::control::api::AgentRecord;
use blockmirror_agent::crashes;
use blockmirror_agent::kept::Store;
use blockmirror_agent::supervisor::{Folders, Operator, Supervisor};
use blockmirror_agent::transport::{Endpoint, HostKey, Limit, Options};
use clap::Parser;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU64;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// How long volumes are waited for that are being opened, before the start counts as done.
const OPENING_TIME: Duration = Duration::from_secs(5);
/// How long the process waits at its end for calls on other threads.
const THREADS_TIME: Duration = Duration::from_secs(1);
/// Both families, on every interface; IPv4 alone where the host has no IPv6.
const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 7447);

/// Mirrors volumes to other hosts, and serves them to this one.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The folder of the configuration
    #[arg(long, value_name = "DIR", default_value = "/etc/blockmirror")]
    config: PathBuf,
    /// The folder of the volumes' metadata and this host's key
    #[arg(long, value_name = "DIR", default_value = "/var/lib/blockmirror")]
    state: PathBuf,
    /// The folder of sockets
    #[arg(long, value_name = "DIR", default_value = "/run/blockmirror")]
    run: PathBuf,
    /// Where to listen for peers [default: the configuration's, or [::]:7447, which is IPv4 too]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// The folder of links to loop devices
    #[arg(long, value_name = "DIR", default_value = "/dev/blockmirror", hide = true)]
    devices: PathBuf,
    /// Hold descriptors for the agent that starts this, and do nothing else
    #[arg(long, hide = true)]
    keep: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if arguments.keep {
        return Ok(blockmirror_agent::kept::keeper::keep()?);
    }
    blockmirror_agent::log::start();
    blockmirror_agent::process::prepare();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(run(arguments));
    // A thread that waits for a disk which hangs is left behind.
    runtime.shutdown_timeout(THREADS_TIME);
    ended
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let config = ConfigFolder::new(&arguments.config);
    let settings = config.load_agent()?;
    for (folder, mode) in [(&arguments.state, 0o700), (&arguments.run, 0o755)] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    let state = arguments.state.canonicalize()?;
    let run = arguments.run.canonicalize()?;
    let listen = arguments.listen.or(settings.listen).unwrap_or(DEFAULT_LISTEN);
    let _claim = blockmirror_agent::process::claim_folder(&state)?;
    if let Some((pause, panics)) = crashes::watch_agent(&state) {
        tracing::error!(
            "the agent ended {} times in a row, the last time so: {}; it goes on in {} s",
            panics.times,
            panics.last,
            pause.as_secs()
        );
        tokio::time::sleep(pause).await;
    }
    let well = state.clone();
    tokio::spawn(async move {
        tokio::time::sleep(crashes::QUIET_TIME).await;
        if let Err(error) = crashes::forget_of_agent(&well) {
            tracing::warn!("{} can't be tidied: {error}", well.display());
        }
    });
    blockmirror_agent::busy_poll::allow(settings.busy_poll());
    let key = HostKey::load_or_create(&state)?;
    let endpoint = Endpoint::bind_with(
        listen,
        &key,
        &Options { congestion: settings.congestion, ..Options::default() },
    )?;
    let record = AgentRecord {
        pid: std::process::id(),
        config: std::path::absolute(&arguments.config)?,
        state: state.clone(),
        listen: endpoint.local_address(),
    };
    let control = ControlSocket::claim(&run, &record)?;
    let store = Store::open(&run).context(
        "the process that keeps the devices of the last agent does not answer; what it keeps waits for it",
    )?;
    tracing::info!(listen = %endpoint.local_address(), fingerprint = %endpoint.id(), "the agent starts");
    let folders = Folders { config, state, run, devices: arguments.devices };
    let limit = Limit::new(settings.resync_limit.and_then(|limit| NonZeroU64::new(limit.0)));
    let supervisor =
        Supervisor::new(folders, settings.host_name(), endpoint, settings.advertise.clone(), limit, store);
    let (mut terminated, mut interrupted) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let opening = supervisor.start_volumes().await?;
    tokio::spawn(supervisor.clone().keep_members());
    // Hosts that start at the same time ask each other how they stand.
    tokio::spawn(supervisor.clone().accept_connections());
    tokio::spawn(supervisor.clone().keep_in_touch());
    let operations = std::sync::Arc::new(Operator(supervisor.clone()));
    let serve = async {
        if tokio::time::timeout(OPENING_TIME, opening).await.is_err() {
            tracing::warn!("not every volume is open yet; the agent goes on without: see blockmirror status");
        }
        // Nobody may be listening; that is no mistake.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        control.serve(operations).await
    };
    let ended = tokio::select! {
        ended = serve => ended.context("the control socket failed"),
        _ = terminated.recv() => Ok(()),
        _ = interrupted.recv() => Ok(()),
    };
    tracing::info!("the agent stops");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    if !supervisor.stop().await {
        anyhow::bail!(
            "the agent ended with volumes that did not; the log says which, and what they wait for"
        );
    }
    ended
}
