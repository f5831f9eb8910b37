//! The writer at work, as the one who started it sees it: how far it is, and how it ended.

use super::ledger::{Ledger, Moment};
use crate::machines::patience::until;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A writer that runs. Dropped, it is killed and not waited for: it may hang in a device that only goes away later.
pub struct Load {
    /// Nothing once somebody waits for its end.
    child: Option<Child>,
    stdin: Option<ChildStdin>,
    listener: Option<JoinHandle<()>>,
    ledger: Arc<Mutex<Ledger>>,
}

impl Load {
    /// Starts a writer in a folder. What it says goes into the ledger.
    ///
    /// # Panics
    /// When it can't be started.
    #[must_use]
    pub fn start(program: &Path, folder: &Path, seed: u64, ledger: &Arc<Mutex<Ledger>>) -> Self {
        let first = ledger.lock().expect("no holder panics").unused_number();
        let mut command = Command::new(program);
        command.arg("writer").arg(folder).args([seed.to_string(), first.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the writer starts");
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().expect("it was asked for"));
        let for_thread = ledger.clone();
        let listener = std::thread::spawn(move || listen(stdout, &for_thread));
        Self { child: Some(child), stdin, listener: Some(listener), ledger: ledger.clone() }
    }

    /// How much it has said.
    ///
    /// # Panics
    /// When what it says makes no sense.
    #[must_use]
    pub fn now(&self) -> Moment {
        self.ledger.lock().expect("the writer makes sense").now()
    }

    /// Returns once it has said this much more.
    ///
    /// # Panics
    /// When it ends, or takes too long.
    pub fn pass(&mut self, count: u64) {
        let goal = Moment(self.now().0 + count);
        until("the writer goes on", || {
            let ended = self.child.as_mut().expect("nobody waits for its end").try_wait();
            let ended = ended.expect("it is our process");
            assert!(ended.is_none(), "the writer ended though its device is there: {ended:?}");
            let now = self.now();
            if now >= goal { Ok(()) } else { Err(format!("{now:?} of {goal:?}")) }
        });
    }

    /// Lets it end what it has begun, and waits for that.
    ///
    /// # Panics
    /// When it fails, or takes too long.
    pub fn end(mut self) {
        self.stdin = None;
        let status = self.wait();
        assert!(status.success(), "the writer failed though its device is there: {status}");
    }

    /// Kills it, and waits until it is gone: its device must be there, or dead.
    ///
    /// # Panics
    /// When it stays.
    pub fn kill(mut self) {
        // An error means that it has ended by itself.
        let _ = self.child.as_mut().expect("nobody waits for its end").kill();
        self.wait();
    }

    /// Everything that it said is in the ledger afterwards.
    fn wait(&mut self) -> ExitStatus {
        let status = until("the writer has ended", || {
            let child = self.child.as_mut().expect("nobody waits for its end");
            child.try_wait().expect("it is our process").ok_or_else(|| stack(child.id()))
        });
        self.child = None;
        self.listener.take().expect("it is waited for once").join().expect("the writer makes sense");
        status
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            // Reaped whenever its device lets it go.
            std::thread::spawn(move || child.wait());
        }
    }
}

fn listen(stdout: ChildStdout, ledger: &Mutex<Ledger>) {
    let mut stdout = BufReader::new(stdout);
    let mut line = String::new();
    // A line without its end was not said: nothing of that record was written.
    while stdout.read_line(&mut line).is_ok() && line.ends_with('\n') {
        let noted =
            line.trim_end().parse().and_then(|line| ledger.lock().expect("no holder panics").note(line));
        if let Err(wrong) = noted {
            panic!("{wrong}");
        }
        line.clear();
    }
}

/// Where in the kernel a process hangs.
fn stack(process: u32) -> String {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let stacks =
        threads.map(|thread| std::fs::read_to_string(thread.path().join("stack")).unwrap_or_default());
    stacks.collect::<Vec<_>>().join("\n")
}
