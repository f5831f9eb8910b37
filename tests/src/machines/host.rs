//! A host: the agent as a process with folders of its own, and the operator's tool.

use super::folder::{Folder, Mounted};
use super::network::Network;
use super::patience::{until, wait_until_stopped};
use super::programs::{own, succeed, text};
use super::relay::Relay;
use super::systemd::Systemd;
use blockmirror_agent::config::{ConfigFolder, VolumeConfig};
use blockmirror_agent::control::api::{StatusReply, VolumeStatus};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

/// How large the file system for a configuration is.
const CONFIG_BYTES: u64 = 16 << 20;

/// One agent with its folders, started and stopped by a test. The agent is killed when it is dropped.
pub struct Host {
    name: String,
    folder: PathBuf,
    relay: Relay,
    /// The network that it is in, if it is not the machine's own.
    namespace: Option<String>,
    /// Who starts the agent, if it is not the test itself.
    systemd: Option<Systemd>,
    agent: Option<Child>,
}

/// The tool at work. It is killed when it is dropped.
pub struct Running(Child);

impl Running {
    /// Whether it has ended by itself.
    ///
    /// # Panics
    /// When the kernel doesn't know.
    pub fn has_ended(&mut self) -> bool {
        self.0.try_wait().expect("it is our process").is_some()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error means that it has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the tool said.
#[derive(Debug)]
pub struct Said {
    /// Its exit code.
    pub code: i32,
    /// Its standard output.
    pub output: String,
    /// Its standard error.
    pub error: String,
}

impl Host {
    /// A host whose agent runs.
    ///
    /// # Panics
    /// When the agent does not come up.
    #[must_use]
    pub fn new(folder: &Folder, name: &str) -> Self {
        let mut host = Self::prepare(folder, name);
        host.start();
        host
    }

    /// A host whose agent was not started yet.
    ///
    /// # Panics
    /// When its folders can't be made.
    #[must_use]
    pub fn prepare(folder: &Folder, name: &str) -> Self {
        let folder = folder.join(name);
        fs::create_dir_all(folder.join("config")).expect("a folder");
        let mut host = Self {
            name: name.to_owned(),
            folder,
            relay: Relay::new(),
            namespace: None,
            systemd: None,
            agent: None,
        };
        host.settle(name);
        host
    }

    /// A host of a network, whose agent was not started yet and has nothing but its name in its configuration: it
    /// listens where agents do, and tells the addresses that it has.
    ///
    /// # Panics
    /// When its folders can't be made.
    #[must_use]
    pub fn within(network: &Network, folder: &Folder, name: &str) -> Self {
        let mut host = Self::prepare(folder, name);
        host.namespace = Some(network.path(name));
        host.set(&format!("name = \"{name}\"\n"));
        host
    }

    /// Moves the host to an address that nobody knows yet, and gives it another name, from the agent's next start on.
    ///
    /// # Panics
    /// When that can't be written.
    pub fn settle(&mut self, name: &str) {
        name.clone_into(&mut self.name);
        self.relay = Relay::new();
        self.set(&format!("name = \"{name}\"\nadvertise = [\"{}\"]\n", self.relay.address()));
    }

    /// From its next start on, the agent is started by a systemd.
    ///
    /// # Panics
    /// When that can't be had.
    pub fn run_under_systemd(&mut self) {
        self.systemd = Some(Systemd::new(&self.path("notify")));
    }

    /// The systemd that starts the agent.
    #[must_use]
    pub fn systemd(&self) -> Option<&Systemd> {
        self.systemd.as_ref()
    }

    fn set(&self, settings: &str) {
        fs::write(self.folder.join("config/agent.toml"), settings).expect("a file");
    }

    /// What peers call it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its link to all others that dial it.
    #[must_use]
    pub fn link(&self) -> &Relay {
        &self.relay
    }

    /// A path in its folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The image that backs the volume here.
    #[must_use]
    pub fn backing(&self) -> PathBuf {
        self.path("data.img")
    }

    /// The socket of the volume's NBD export.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path("run/data.nbd")
    }

    /// The volume's NBD export, for clients.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///data?socket={}", self.socket().display())
    }

    /// The volume's loop device.
    #[must_use]
    pub fn device(&self) -> PathBuf {
        self.path("devices/data")
    }

    /// The volume's NBD export over TCP, for clients.
    ///
    /// # Panics
    /// When it is not served.
    #[must_use]
    pub fn tcp_uri(&self) -> String {
        let uris = self.status().facts.devices.into_iter().filter(|device| device.error.is_none());
        let mut uris = uris.filter_map(|device| device.uri);
        uris.find(|uri| !uri.contains("+unix:")).expect("the export is served over TCP")
    }

    /// The address of that.
    ///
    /// # Panics
    /// When it is not served.
    #[must_use]
    pub fn tcp_address(&self) -> SocketAddr {
        let uri = self.tcp_uri();
        let address = uri.split('/').nth(2).expect("an address is the third part of a uri");
        address.parse().expect("the agent tells an address")
    }

    /// The most memory that its agent had at any time, in bytes.
    ///
    /// # Panics
    /// When the agent does not run.
    #[must_use]
    pub fn peak_memory_bytes(&self) -> u64 {
        let process = self.agent.as_ref().expect("the agent runs").id();
        let text = fs::read_to_string(format!("/proc/{process}/status")).expect("the agent runs");
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the kernel tells it");
        let number = line.trim().strip_suffix(" kB").expect("it counts in kilobytes");
        number.trim().parse::<u64>().expect("it is a number") * 1024
    }

    /// A metadata file of the volume.
    #[must_use]
    pub fn state(&self, name: &str) -> PathBuf {
        self.path("state/data").join(name)
    }

    /// Changes the volume's configuration, which the agent reads when it starts.
    ///
    /// # Panics
    /// When the file is not right, or can't be written.
    pub fn configure(&self, change: impl FnOnce(&mut VolumeConfig)) {
        let folder = ConfigFolder::new(self.path("config"));
        let mut volume = folder.load_volume(&"data".parse().expect("a name")).expect("the file is right");
        change(&mut volume);
        folder.save_volume(&volume).expect("the file can be written");
    }

    /// Starts the agent, and waits until it answers.
    ///
    /// # Panics
    /// When it runs already or does not come up.
    pub fn start(&mut self) {
        assert!(self.agent.is_none(), "one agent at a time");
        let log = File::options().create(true).append(true).open(self.path("log")).expect("a log");
        let mut command = match &self.namespace {
            Some(path) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={path}")).arg("--").arg(own("blockmirror-agent"));
                command
            }
            None => {
                let mut command = Command::new(own("blockmirror-agent"));
                command.args(["--listen", "127.0.0.1:0"]);
                command
            }
        };
        for folder in ["config", "state", "run", "devices"] {
            command.arg(format!("--{folder}")).arg(self.path(folder));
        }
        let mut command = match &self.systemd {
            Some(systemd) => systemd.start(&command),
            None => command,
        };
        command.stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a descriptor")).stderr(log);
        self.agent = Some(command.spawn().expect("the agent starts"));
        let what = format!("the agent of {} answers", self.name);
        let listen = until(&what, || {
            let agent = self.agent.as_mut().expect("it was started");
            let ended = agent.try_wait().expect("it is our process");
            assert!(ended.is_none(), "the agent of {} ended: {}", self.name, self.log());
            self.find_listener()
        });
        self.relay.lead_to(listen);
    }

    fn find_listener(&self) -> Result<SocketAddr, String> {
        let said = self.tool(&["status", "--json"]);
        let reply: Option<StatusReply> = serde_json::from_str(&said.output).ok();
        reply.and_then(|reply| reply.host.listen).ok_or(said.error)
    }

    /// Where its agent listens: whoever comes there does not come over its link.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn listens_at(&self) -> SocketAddr {
        self.find_listener().expect("the agent listens")
    }

    /// Ends the agent without a warning, and all that outlives it on its host: as when that is switched off. Users of the
    /// loop device get errors.
    ///
    /// # Panics
    /// When it does not run.
    pub fn lose(&mut self) {
        self.kill();
        self.end_devices();
    }

    /// Ends the sessions of loop devices that outlive the agent, which does not run.
    pub fn end_devices(&self) {
        for entry in fs::read_dir(self.path("run")).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "fuse") {
                // The session ends also where the mount is in use, and stays.
                let _ = unmount(&path, UnmountFlags::FORCE);
            }
        }
    }

    /// Ends the agent without a warning. A loop device in use waits for the next one.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill(&mut self) {
        let mut agent = self.agent.take().expect("the agent runs");
        agent.kill().expect("it is our process");
        agent.wait().expect("it is our process");
    }

    /// The process that keeps what outlives the agent, if there is one.
    ///
    /// # Panics
    /// When the kernel's tables can't be read.
    #[must_use]
    pub fn keeper(&self) -> Option<Pid> {
        let path = self.path("run/keeper.sock");
        let table = fs::read_to_string("/proc/net/unix").expect("a table of sockets");
        let ours = table.lines().filter(|line| line.ends_with(text(&path)));
        let sockets: Vec<String> =
            ours.filter_map(|line| Some(format!("socket:[{}]", line.split_whitespace().nth(6)?))).collect();
        let processes = fs::read_dir("/proc").expect("a table of processes").flatten();
        let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_keeper = |process: &i32| {
            let arguments = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
            let files = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
            let mut files = files.filter_map(|file| fs::read_link(file.path()).ok());
            arguments.ends_with(b"--keep\0")
                && files.any(|file| sockets.iter().any(|socket| file == Path::new(socket)))
        };
        numbers.filter(is_keeper).find_map(Pid::from_raw)
    }

    /// Stops the agent as a debugger does: it is there, and does nothing.
    ///
    /// # Panics
    /// When it does not run.
    pub fn stall(&mut self) {
        self.signal(Signal::STOP);
        wait_until_stopped(self.agent.as_ref().expect("the agent runs").id());
    }

    /// Lets an agent go on that was stalled.
    ///
    /// # Panics
    /// When it does not run.
    pub fn go_on(&mut self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let agent = Pid::from_child(self.agent.as_ref().expect("the agent runs"));
        kill_process(agent, signal).expect("it is our process");
    }

    /// Moves the configuration to a file system of its own, while the agent is stopped.
    ///
    /// # Panics
    /// When it can't be moved.
    #[must_use]
    pub fn move_config(&self, folder: &Folder) -> Mounted {
        let (config, kept) = (self.path("config"), self.path("config.kept"));
        let image = self.path("config.img");
        File::create(&image).and_then(|file| file.set_len(CONFIG_BYTES)).expect("an image");
        succeed("mkfs.ext4", &["-q", text(&image)]);
        fs::rename(&config, &kept).expect("the configuration");
        let home = self.folder.file_name().expect("a name").to_str().expect("it is text");
        let mounted = folder.mount(&image, &format!("{home}/config"));
        succeed("cp", &["-a", text(&kept.join(".")), text(mounted.path())]);
        mounted
    }

    /// Ends the agent in order.
    ///
    /// # Panics
    /// When it does not run, or doesn't end well.
    pub fn stop(&mut self) {
        let ended = self.terminate();
        assert!(ended.success(), "the agent of {} ended with {ended}: {}", self.name, self.log());
    }

    /// Tells the agent to end, and gives how it ended.
    ///
    /// # Panics
    /// When it does not run, or doesn't end.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        let mut agent = self.agent.take().expect("the agent runs");
        until("the agent has stopped", || match agent.try_wait().expect("it is our process") {
            Some(status) => Ok(status),
            None => Err(self.log()),
        })
    }

    /// What the agent logged since it was first started.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Runs the tool.
    ///
    /// # Panics
    /// When it can't be started, or was ended by a signal.
    pub fn tool(&self, arguments: &[&str]) -> Said {
        let run = self.path("run");
        let output =
            super::programs::run(text(&own("blockmirror")), &[&["--run", text(&run)], arguments].concat());
        Said {
            code: output.status.code().expect("the tool ends by itself"),
            output: String::from_utf8_lossy(&output.stdout).into_owned(),
            error: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Starts the tool, and does not wait for its end. What it says goes nowhere.
    ///
    /// # Panics
    /// When it can't be started.
    #[must_use]
    pub fn begin(&self, arguments: &[&str]) -> Running {
        let mut command = Command::new(own("blockmirror"));
        command.arg("--run").arg(self.path("run")).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Running(command.spawn().expect("the tool starts"))
    }

    /// Runs the tool, which must succeed, and gives what it printed.
    ///
    /// # Panics
    /// When it fails.
    pub fn succeed(&self, arguments: &[&str]) -> String {
        let said = self.tool(arguments);
        assert_eq!(said.code, 0, "{}: {arguments:?}: {said:?}\n{}", self.name, self.log());
        said.output
    }

    /// Runs the tool, which must fail with this exit code and a message in which each of `words` is.
    ///
    /// # Panics
    /// When it does otherwise.
    pub fn refuse(&self, arguments: &[&str], code: i32, words: &[&str]) {
        let said = self.tool(arguments);
        assert_eq!(said.code, code, "{arguments:?}: {said:?}");
        for word in words {
            assert!(said.error.contains(word), "{arguments:?} should say {word:?}: {said:?}");
        }
    }

    /// How the volume stands, as the agent says.
    ///
    /// # Panics
    /// When it can't be had.
    #[must_use]
    pub fn status(&self) -> VolumeStatus {
        let text = self.succeed(&["status", "data", "--json"]);
        let reply: StatusReply = serde_json::from_str(&text).expect("the status is well formed");
        reply.volumes.into_iter().next().expect("one volume was asked for")
    }

    /// How all volumes of the host stand.
    ///
    /// # Panics
    /// When it can't be had.
    #[must_use]
    pub fn statuses(&self) -> Vec<VolumeStatus> {
        let text = self.succeed(&["status", "--json"]);
        let reply: StatusReply = serde_json::from_str(&text).expect("the status is well formed");
        reply.volumes
    }

    /// Waits until the volume's status is so.
    ///
    /// # Panics
    /// When it takes too long.
    pub fn wait_until(&self, what: &str, is_so: impl Fn(&VolumeStatus) -> bool) -> VolumeStatus {
        until(&format!("{what} on {}", self.name), || {
            let status = self.status();
            if is_so(&status) { Ok(status) } else { Err(format!("{status:?}\n{}", self.log())) }
        })
    }

    /// A token for a new replica of the volume.
    ///
    /// # Panics
    /// When none is made.
    #[must_use]
    pub fn invite(&self) -> String {
        self.succeed(&["invite", "data"]).trim().to_owned()
    }

    /// Makes the volume on this host.
    ///
    /// # Panics
    /// When that fails.
    pub fn create(&self, size_bytes: u64, devices: &str) {
        let (backing, size) = (self.backing(), size_bytes.to_string());
        let backing = text(&backing);
        self.succeed(&["create", "data", "--backing", backing, "--size", &size, "--device", devices]);
    }

    /// Joins the volume of another host.
    ///
    /// # Panics
    /// When that fails.
    pub fn join(&self, primary: &Self, backing: &Path) {
        self.succeed(&["join", &primary.invite(), "--backing", text(backing)]);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            // An error means that it has ended by itself.
            let _ = agent.kill();
            let _ = agent.wait();
        }
        self.end_devices();
        if std::thread::panicking() {
            eprintln!("log of {}:\n{}", self.name, self.log());
        }
    }
}
