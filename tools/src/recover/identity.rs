//! Who we are to the peer, and how we know it: by the host's own key and what its configuration says, or by a token.

use super::Arguments;
use crate::client::Client;
use crate::offline;
use crate::token;
use blockmirror_agent::config::{Address, Mistake, Name};
use blockmirror_agent::control::api::{Failure, FailureKind};
use blockmirror_agent::token::Token;
use blockmirror_agent::transport::{HostKey, key};
use blockmirror_protocol::disk::recovery::{Key, RecoveryState};
use blockmirror_protocol::units::{HostId, VolumeId};
use std::io;
use std::path::Path;

/// How the tool makes itself known, and whom it expects.
pub struct Identity {
    /// Our key.
    pub key: HostKey,
    /// The key, where it is kept with the recovery's state.
    pub kept: Key,
    /// Where the peer's agent listens.
    pub addresses: Vec<String>,
    /// The keys that the peer may have, likeliest first.
    pub known: Vec<HostId>,
    /// The volume's identity, where it is known here.
    pub volume: Option<VolumeId>,
    /// The token's secret.
    pub secret: Option<[u8; 32]>,
}

/// Finds out who we are and whom to expect. `kept` is the state of the recovery that goes on.
pub fn identify(
    arguments: &Arguments,
    client: &Client,
    kept: Option<&RecoveryState>,
) -> Result<Identity, Failure> {
    if arguments.token.is_none() && arguments.token_file.is_none() {
        return identify_by_key(arguments, client);
    }
    let token = token::read(arguments.token.as_deref(), arguments.token_file.as_deref())?;
    identify_by_token(arguments, &token, kept)
}

fn identify_by_token(
    arguments: &Arguments,
    token: &str,
    kept: Option<&RecoveryState>,
) -> Result<Identity, Failure> {
    let token = Token::parse(token).map_err(|error| Failure::from_error(FailureKind::Failed, &error))?;
    if token.name != arguments.name.as_str() {
        let message = format!("the token is for the volume {:?}, not for {}", token.name, arguments.name);
        return Err(Failure::new(FailureKind::Usage, message));
    }
    let kept = kept.map(|state| &state.key.0).filter(|key| !key.is_empty());
    let made = match kept {
        Some(text) => HostKey::from_pem(text, Path::new("of the recovery")).map(|key| (key, text.clone())),
        None => HostKey::generate(),
    };
    let (key, text) = made.map_err(|error| Failure::from_error(FailureKind::Failed, &error))?;
    Ok(Identity {
        key,
        kept: Key(text),
        addresses: arguments.from.as_ref().map_or(token.addresses, |from| vec![from.to_string()]),
        known: vec![token.host],
        volume: Some(token.volume),
        secret: Some(token.secret.0),
    })
}

fn identify_by_key(arguments: &Arguments, client: &Client) -> Result<Identity, Failure> {
    let path = match &arguments.key {
        Some(path) => path.clone(),
        None => offline::state_folder(client.run())?.join(key::FILE_NAME),
    };
    let key = HostKey::load(&path).map_err(|error| {
        let failure = Failure::from_error(FailureKind::Failed, &error);
        let advice = "give another with --key, or a token of `blockmirror invite` with --token";
        Failure::new(failure.kind, format!("{failure}; {advice}"))
    })?;
    let from = arguments.from.as_ref().expect("without a token there is an address");
    let (volume, configured) = configured(&arguments.name, from, client)?;
    let known = arguments.peer_key.map_or(configured, |key| vec![key]);
    let addresses = vec![from.to_string()];
    Ok(Identity { key, kept: Key::default(), addresses, known, volume, secret: None })
}

/// What this host's configuration knows of the volume: its identity, and its hosts' keys, first those at `from`.
fn configured(
    name: &Name,
    from: &Address,
    client: &Client,
) -> Result<(Option<VolumeId>, Vec<HostId>), Failure> {
    let volume = match offline::config_folder(client.run())?.load_volume(name) {
        Err(Mistake::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok((None, Vec::new()));
        }
        loaded => loaded.map_err(|mistake| Failure::from_error(FailureKind::Failed, &mistake))?,
    };
    let mut peers = volume.peers;
    peers.sort_by_key(|peer| !peer.addresses.contains(from));
    Ok((Some(volume.id), peers.iter().map(|peer| peer.host).collect()))
}
