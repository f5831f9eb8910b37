//! Programs: Blockmirror's own, built from this workspace, and others as its clients and judges.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Once;

/// How long a program may take, in seconds; then it is ended, and its test fails.
const TIME_SECONDS: &str = "180";

/// Where programs of an earlier release are that take the place of this workspace's.
const EARLIER: &str = "BLOCKMIRROR_PROGRAMS";

/// The path of one of this workspace's programs, as built from its present state; or of an earlier release's where the environment
/// says so.
///
/// # Panics
/// When they can't be built.
#[must_use]
pub fn own(name: &str) -> PathBuf {
    static BUILT: Once = Once::new();
    if let Some(folder) = std::env::var_os(EARLIER) {
        return PathBuf::from(folder).join(name);
    }
    // Tests lie in TARGET/PROFILE/deps, programs in TARGET/PROFILE.
    let own = std::env::current_exe().expect("a process has a path");
    let folder = own.parent().expect("a program lies in a folder");
    let folder = if folder.ends_with("deps") { folder.parent().expect("it is in another") } else { folder };
    BUILT.call_once(|| build(folder));
    let path = folder.join(name);
    assert!(path.exists(), "{} was not built", path.display());
    path
}

/// Cargo builds the programs of a package for its own tests only, so those of other packages are built here. Where
/// tests are run without cargo, the programs beside them are taken as they are.
fn build(folder: &Path) {
    let Some(cargo) = std::env::var_os("CARGO") else { return };
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--workspace", "--bins", "--target-dir"]);
    command.arg(folder.parent().expect("a profile's folder lies in the target folder"));
    command
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a package lies in a workspace"));
    if folder.ends_with("release") {
        command.arg("--release");
    }
    assert!(command.status().expect("cargo runs").success(), "the programs can't be built");
}

/// Why a test can't run here, if it can't. Needs are names of programs, or `root`.
///
/// # Panics
/// When there is an obstacle and the environment forbids to skip tests.
#[must_use]
pub fn obstacle(needs: &[&str]) -> Option<String> {
    let missing = needs.iter().find(|need| match **need {
        "root" => !can_attach(),
        program => !has(program),
    })?;
    let obstacle = match *missing {
        "root" => "needs root, /dev/fuse and /dev/loop-control".to_owned(),
        program => format!("needs {program}"),
    };
    assert!(std::env::var_os("BLOCKMIRROR_NO_SKIPS").is_none(), "{obstacle}");
    Some(obstacle)
}

fn can_attach() -> bool {
    rustix::process::geteuid().is_root()
        && ["/dev/fuse", "/dev/loop-control"].iter().all(|path| Path::new(path).exists())
}

/// Whether a program is installed.
///
/// # Panics
/// When there is no shell to look for it.
#[must_use]
pub fn has(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", "command -v \"$0\"", program]).stdout(Stdio::null()).status();
    found.expect("there is a shell").success()
}

/// Runs a program to its end.
///
/// # Panics
/// When it can't be started.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", TIME_SECONDS, program]).args(arguments).stdin(Stdio::null());
    command.output().expect("timeout(1) runs")
}

/// Runs a program that must succeed, and gives what it printed.
///
/// # Panics
/// When it fails; the message is what it said.
pub fn succeed(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{out}\n{error}", output.status);
    out.into_owned()
}

/// A path as an argument.
///
/// # Panics
/// When it is not text; a test's paths are.
#[must_use]
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a test's paths are text")
}
