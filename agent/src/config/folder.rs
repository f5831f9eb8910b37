//! The folder that holds the configuration: `agent.toml`, and `volumes/NAME.toml` for each volume.
//!
//! A file is replaced whole: its new content is durable under another name before it takes the place of the old one.
//! A crash in the middle leaves the old file, and a leftover that is not read and that the next save overwrites.

use super::{AgentConfig, Contradiction, Mistake, Name, VolumeConfig};
use crate::durable::{replace_for_all_to_read, sync_folder_of};
use serde::de::DeserializeOwned;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What a saved volume's file begins with.
const HEADER: &str = "\
# A volume of Blockmirror, kept by the agent. To change it, stop the agent, edit it,
# run `blockmirror config check` and start the agent. Comments are lost when the agent saves it.
";

/// The configuration's folder.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigFolder {
    path: PathBuf,
}

/// What was found in a folder: one bad file doesn't keep the other volumes from being served.
#[derive(Debug, Default)]
pub struct Volumes {
    /// The volumes whose files are right, in the order of their names.
    pub volumes: Vec<VolumeConfig>,
    /// What is wrong with the others.
    pub mistakes: Vec<Mistake>,
}

impl ConfigFolder {
    /// The folder at `path`; it need not exist.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where the folder is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file of a volume.
    #[must_use]
    pub fn volume_path(&self, name: &Name) -> PathBuf {
        self.volumes_path().join(format!("{name}.toml"))
    }

    fn volumes_path(&self) -> PathBuf {
        self.path.join("volumes")
    }

    /// Reads `agent.toml`; without one, everything has its default.
    ///
    /// # Errors
    /// A [`Mistake`] when the file cannot be read or is wrong.
    pub fn load_agent(&self) -> Result<AgentConfig, Mistake> {
        match read(&self.path.join("agent.toml")) {
            Err(Mistake::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(AgentConfig::default())
            }
            other => other,
        }
    }

    /// Reads one volume's file.
    ///
    /// # Errors
    /// The first [`Mistake`] when the file cannot be read, is wrong or belongs to another volume.
    pub fn load_volume(&self, name: &Name) -> Result<VolumeConfig, Mistake> {
        let path = self.volume_path(name);
        let volume = read(&path)?;
        match contradictions_in(&path, &volume).into_iter().next() {
            Some(mistake) => Err(mistake),
            None => Ok(volume),
        }
    }

    /// Reads the files of all volumes. Files whose names begin with a dot or don't end in `.toml` are left alone.
    ///
    /// # Errors
    /// A [`Mistake`] when the folder cannot be read; a missing one holds no volumes.
    pub fn load_volumes(&self) -> Result<Volumes, Mistake> {
        let mut found = Volumes::default();
        for path in self.volume_files()? {
            let volume = match read(&path) {
                Ok(volume) => volume,
                Err(mistake) => {
                    found.mistakes.push(mistake);
                    continue;
                }
            };
            let mut mistakes = contradictions_in(&path, &volume);
            mistakes.extend(contradiction_with(&found.volumes, &path, &volume));
            if mistakes.is_empty() {
                found.volumes.push(volume);
            }
            found.mistakes.append(&mut mistakes);
        }
        Ok(found)
    }

    fn volume_files(&self) -> Result<Vec<PathBuf>, Mistake> {
        let folder = self.volumes_path();
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|source| io_mistake("read", &folder, source))?,
        };
        let mut files = Vec::new();
        for entry in entries {
            let path = entry.map_err(|source| io_mistake("read", &folder, source))?.path();
            let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().first() == Some(&b'.'));
            if !hidden && path.extension() == Some(OsStr::new("toml")) {
                files.push(path);
            }
        }
        files.sort();
        Ok(files)
    }

    /// Writes a volume's file durably; the old content or the new is there at every instant.
    ///
    /// # Errors
    /// A [`Mistake`] when the volume contradicts itself or the file cannot be written.
    pub fn save_volume(&self, volume: &VolumeConfig) -> Result<(), Mistake> {
        let path = self.volume_path(&volume.name);
        if let Some(what) = volume.contradictions().into_iter().next() {
            return Err(Mistake::Contradictory { path, what });
        }
        let text =
            toml::to_string(volume).map_err(|source| Mistake::Unwritable { path: path.clone(), source })?;
        let folder = self.volumes_path();
        create_folder(&folder).map_err(|source| io_mistake("create", &folder, source))?;
        replace_for_all_to_read(&path, format!("{HEADER}{text}").as_bytes())
            .map_err(|source| io_mistake("write", &path, source))
    }
}

fn io_mistake(operation: &'static str, path: &Path, source: io::Error) -> Mistake {
    Mistake::Io { operation, path: path.to_owned(), source }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Mistake> {
    let text = fs::read_to_string(path).map_err(|source| io_mistake("read", path, source))?;
    toml::from_str(&text).map_err(|cause| Mistake::parse(path, &text, cause))
}

/// What a volume's file says that can't all be true.
fn contradictions_in(path: &Path, volume: &VolumeConfig) -> Vec<Mistake> {
    let is_named = path.file_stem() == Some(OsStr::new(volume.name.as_str()));
    let misnamed = (!is_named).then(|| Contradiction::FileName(volume.name.clone()));
    let found = volume.contradictions().into_iter().chain(misnamed);
    found.map(|what| Mistake::Contradictory { path: path.to_owned(), what }).collect()
}

/// Why a volume can't be served beside those whose files were read before, if it can't.
fn contradiction_with(others: &[VolumeConfig], path: &Path, volume: &VolumeConfig) -> Option<Mistake> {
    let what = others.iter().find_map(|other| match other {
        other if other.id == volume.id => Some(Contradiction::SameId(other.name.clone())),
        other if other.backing == volume.backing => Some(Contradiction::SameBacking(other.name.clone())),
        _ => None,
    })?;
    Some(Mistake::Contradictory { path: path.to_owned(), what })
}

/// Creates a folder and those above it, each durably entered in the one above.
fn create_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(above) = path.parent() {
        create_folder(above)?;
    }
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    sync_folder_of(path)
}
