//! Processes that the bench starts: each is ended when its owner goes, and by the kernel when the bench itself was
//! killed. None of them hears the terminal's interrupt, so that things end in order.

use super::IS_OVER;
use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How long a server may take to come up, and any single condition to come true.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// How long a server may take to come up.
const READY: Duration = Duration::from_secs(20);
/// How long one may take to end after it was asked to.
const ENDING: Duration = Duration::from_secs(10);
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);

/// A command with its arguments.
pub fn command<Argument: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = Argument>,
) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// Looks until there is something, and gives it.
///
/// # Errors
/// When it takes too long, the bench is interrupted, or a look fails.
pub fn until<Seen>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> Result<Option<Seen>>,
) -> Result<Seen> {
    let began = Instant::now();
    loop {
        if let Some(seen) = look()? {
            return Ok(seen);
        }
        go_on()?;
        ensure!(began.elapsed() < patience, "waited in vain until {what}");
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

/// Whether the bench is to go on.
///
/// # Errors
/// When it was interrupted.
pub fn go_on() -> Result<()> {
    ensure!(!IS_OVER.load(Ordering::Relaxed), "interrupted");
    Ok(())
}

/// A process of its own group, that dies with the bench.
fn spawn(command: &mut Command) -> Result<Child> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).process_group(0);
    // SAFETY: between fork and exec, the call takes plain numbers and allocates nothing.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    command.spawn().with_context(|| format!("{program} can't be started"))
}

/// Runs a program to its end, which an interrupt of the bench brings about, too.
///
/// # Errors
/// When it can't be started, fails, or the bench is interrupted.
pub fn run(command: &mut Command) -> Result<Output> {
    let child = spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let output = Running::new(child).wait()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {}", output.status, error.trim());
    Ok(output)
}

/// [`run`], and what it printed.
///
/// # Errors
/// As for [`run`], and when it printed no text.
pub fn say(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8(run(command)?.stdout)?)
}

/// A program that runs beside something else. Dropped, it is ended.
pub struct Running {
    group: Pid,
    ended: std::sync::mpsc::Receiver<std::io::Result<Output>>,
    is_over: bool,
}

impl Running {
    /// Starts one.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        Ok(Self::new(spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?))
    }

    fn new(child: Child) -> Self {
        let group = Pid::from_child(&child);
        let (tell, ended) = channel();
        // Waited for in a thread, so that the end is seen at once and an interrupt soon.
        std::thread::spawn(move || tell.send(child.wait_with_output()));
        Self { group, ended, is_over: false }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When the bench is interrupted.
    pub fn wait(mut self) -> Result<Output> {
        loop {
            match self.ended.recv_timeout(Duration::from_millis(100)) {
                Ok(output) => {
                    self.is_over = true;
                    return Ok(output?);
                }
                Err(RecvTimeoutError::Timeout) => go_on()?,
                Err(RecvTimeoutError::Disconnected) => bail!("nobody waits for the program"),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.is_over {
            // An error means that it has just ended by itself.
            let _ = kill_process_group(self.group, Signal::KILL);
            let _ = self.ended.recv();
        }
    }
}

/// A server. Dropped, it is ended.
pub struct Server {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts one, whose output goes to a log.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let output = File::create(log)?;
        command.stdout(output.try_clone()?).stderr(output);
        Ok(Self { name: name.to_owned(), child: spawn(command)?, log: log.to_owned() })
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    /// When it ends, or is not ready in time; with what it said.
    pub fn ready(mut self, is_ready: impl Fn() -> bool) -> Result<Self> {
        let name = self.name.clone();
        until(&format!("{name} is ready"), READY, || {
            if is_ready() {
                return Ok(Some(()));
            }
            ensure!(self.child.try_wait()?.is_none(), "{name} ended: {}", self.said());
            Ok(None)
        })?;
        Ok(self)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.pid(), signal)?)
    }

    /// What it said so far.
    #[must_use]
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its resident memory, in bytes.
    ///
    /// # Errors
    /// When it has ended.
    pub fn resident_bytes(&self) -> Result<u64> {
        self.memory("VmRSS:")
    }

    /// The most that it ever had, in bytes.
    ///
    /// # Errors
    /// When it has ended.
    pub fn peak_bytes(&self) -> Result<u64> {
        self.memory("VmHWM:")
    }

    fn memory(&self, field: &str) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = text.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
        let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kilobytes * 1024)
    }

    /// How much processor time it has used, in seconds.
    ///
    /// # Errors
    /// When it has ended.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let mut nanoseconds = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let text = fs::read_to_string(task?.path().join("schedstat"))?;
            nanoseconds += text.split(' ').next().context("no time")?.parse::<u64>()?;
        }
        Ok(nanoseconds as f64 / 1e9)
    }

    fn wait_briefly(&mut self) -> Option<ExitStatus> {
        let began = Instant::now();
        while began.elapsed() < ENDING {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(BETWEEN_LOOKS),
                ended => return ended.ok().flatten(),
            }
        }
        None
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Errors mean that it has ended by itself. A stopped process hears nothing else than these two.
        let _ = self.signal(Signal::TERM);
        let _ = self.signal(Signal::CONT);
        if self.wait_briefly().is_none() {
            let _ = kill_process_group(self.pid(), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}
