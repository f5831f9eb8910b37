//! `blockmirror recover` as a program, against a host in this process.

mod devices;
mod host;
mod interruptions;
mod refusals;

use blockmirror_agent::control::api::AgentRecord;
use blockmirror_agent::control::record_path;
use blockmirror_agent::transport::HostKey;
use blockmirror_protocol::disk::recovery::{CHUNK_BYTES, RecoveryState};
use blockmirror_protocol::units::HostId;
use host::{Host, NAME};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// What takes longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(120);
const CHUNKS: u64 = 13;
const SIZE: u64 = (CHUNKS - 1) * CHUNK_BYTES + 4608;

/// A folder with an image on one host and a key, a configuration and a place for the target on another.
struct Scene {
    folder: tempfile::TempDir,
    key: HostId,
    host: Host,
}

/// How the tool ended.
struct Ended {
    code: Option<i32>,
    output: String,
    errors: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            output: String::from_utf8(output.stdout).unwrap(),
            errors: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ended {
    #[track_caller]
    fn good(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.errors);
        self
    }

    #[track_caller]
    fn bad(self, code: i32, part: &str) {
        assert_eq!(self.code, Some(code), "{}", self.errors);
        assert!(self.errors.contains(part), "{}", self.errors);
    }
}

/// An image with random data, holes, written zeroes and an odd end.
fn make_image(path: &Path) {
    let image = fs::File::create(path).unwrap();
    image.set_len(SIZE).unwrap();
    let mut state = 1u64;
    let mut noise = vec![0; 1 << 20];
    for chunk in (0..CHUNKS).filter(|chunk| chunk % 3 != 2) {
        noise.chunks_exact_mut(8).for_each(|word| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        });
        let at = chunk * CHUNK_BYTES;
        for offset in [0, 5 << 20, (9 << 20) + 512] {
            let length = noise.len().min(SIZE.saturating_sub(at + offset) as usize);
            image.write_all_at(&noise[..length], at + offset).unwrap();
        }
        if at + (7 << 20) < SIZE {
            image.write_all_at(&vec![0; 1 << 20], at + (6 << 20)).unwrap();
        }
    }
    image.sync_all().unwrap();
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        make_image(&image);
        let key = HostKey::load_or_create(&folder.path().join("var")).unwrap().id();
        fs::create_dir(folder.path().join("run")).unwrap();
        let record = AgentRecord {
            pid: 1,
            config: folder.path().join("etc"),
            state: folder.path().join("var"),
            listen: "0.0.0.0:7447".parse().unwrap(),
        };
        let record = serde_json::to_vec(&record).unwrap();
        fs::write(record_path(&folder.path().join("run")), record).unwrap();
        let host = Host::start(&image);
        Self { folder, key, host }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn target(&self) -> PathBuf {
        self.path("target")
    }

    /// What the tool notes about [`Scene::target`].
    fn state(&self) -> Option<RecoveryState> {
        let file = fs::read(self.path("target.blockmirror-recovery")).ok()?;
        Some(RecoveryState::decode(&file).unwrap())
    }

    /// The tool with these arguments behind the usual ones.
    fn command(&self, to: &Path, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blockmirror"));
        command.arg("--run").arg(self.path("run")).args(["recover", NAME, "--to"]).arg(to).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// As [`Scene::command`], by address and with the peer's key.
    fn usual(&self, to: &Path, more: &[&str]) -> Command {
        let mut command = self.command(to, more);
        command.args(["--from", &self.host.address, "--peer-key", &self.host.id.to_string()]);
        command
    }

    fn recover(&self, more: &[&str]) -> Ended {
        self.usual(&self.target(), more).output().unwrap().into()
    }

    fn start(&self, more: &[&str]) -> Running {
        Running(Some(self.usual(&self.target(), more).spawn().unwrap()))
    }

    #[track_caller]
    fn assert_recovered(&self) {
        let (image, target) = (fs::read(self.path("image")).unwrap(), fs::read(self.target()).unwrap());
        assert!(image == target, "the target is identical");
        assert!(self.state().is_none(), "nothing is left behind");
    }
}

/// The tool under way; killed with the test.
struct Running(Option<Child>);

impl Running {
    fn kill(mut self) {
        self.0.as_mut().unwrap().kill().unwrap();
    }

    fn interrupt(&self) {
        let id = self.0.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    }

    fn end(mut self) -> Ended {
        self.0.take().unwrap().wait_with_output().unwrap().into()
    }

    /// Waits until something is so; the tool must still be running then.
    fn wait_until(&mut self, so: impl Fn() -> bool) {
        let started = Instant::now();
        while !so() {
            let ended = self.0.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "the tool ended early: {ended:?}");
            assert!(started.elapsed() < PATIENCE, "it never came so far");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn a_new_file_becomes_identical_and_takes_no_more_space() {
    let scene = Scene::new();
    let ended = scene.recover(&[]).good();
    scene.assert_recovered();
    assert!(ended.output.starts_with("recovered data into "), "{}", ended.output);
    let digest = blake3::hash(&fs::read(scene.target()).unwrap());
    assert!(ended.output.contains(&format!("\n  digest:  {digest} (BLAKE3)\n")), "{}", ended.output);
    let blocks = |path: PathBuf| fs::metadata(path).unwrap().blocks();
    assert!(blocks(scene.target()) <= blocks(scene.path("image")), "holes stay holes");
    assert_eq!(scene.host.seen().peers, [scene.key], "the host's own key is used");
}

#[test]
fn the_result_is_also_told_as_json() {
    let scene = Scene::new();
    let ended = scene.recover(&["--json"]).good();
    let json: serde_json::Value = serde_json::from_str(&ended.output).unwrap();
    assert_eq!(json["schema"], "blockmirror/recovery/v1");
    assert_eq!((&json["volume"], &json["data"]), (&NAME.into(), &"consistent".into()));
    assert_eq!((&json["size_bytes"], &json["epoch"]), (&SIZE.into(), &1.into()));
    assert_eq!(json["copied_bytes"], SIZE);
    assert_eq!(json["digest"], blake3::hash(&fs::read(scene.target()).unwrap()).to_string());
}

#[test]
fn what_is_missing_on_the_command_line_is_told() {
    let scene = Scene::new();
    let run = |more: &[&str]| Ended::from(scene.command(&scene.target(), more).output().unwrap());
    run(&[]).bad(2, "--from");
    run(&["--from", "b:1", "--peer-key", "12"]).bad(2, "64 hexadecimal digits");
    run(&["--token", "bm1-aaaa"]).bad(1, "the token was");
    run(&["--from", "b:1", "--key", "/no/key"]).bad(1, "--token");
}
