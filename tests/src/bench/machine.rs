//! The machine and the peers' versions, for the reader of the figures. Not its name.

use crate::machines::programs::{has, text};
use serde_json::{Map, Value, json};
use std::fs;
use std::process::Command;

/// A program, and what makes it tell its version.
const PROGRAMS: [(&str, &str); 10] = [
    ("fio", "--version"),
    ("nbdkit", "--version"),
    ("qemu-nbd", "--version"),
    ("qemu-storage-daemon", "--version"),
    ("qemu-img", "--version"),
    ("nbd-server", "-V"),
    ("nbdcopy", "--version"),
    ("nbdfuse", "--version"),
    ("rsync", "--version"),
    ("ssh", "-V"),
];

/// The machine as JSON.
#[must_use]
pub fn describe() -> Value {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    json!({
        "cpu": field("/proc/cpuinfo", "model name"),
        "cores": cores,
        "memory": field("/proc/meminfo", "MemTotal"),
        "kernel": rustix::system::uname().release().to_string_lossy(),
        "system": field("/etc/os-release", "PRETTY_NAME"),
        "storage": storage(),
        "blockmirror": commit(),
        "programs": versions(),
    })
}

/// The same as a table.
#[must_use]
pub fn markdown(machine: &Value) -> String {
    let mut text = String::from("| | |\n|---|---|\n");
    for (name, value) in machine.as_object().into_iter().flatten() {
        let words = match value {
            Value::Object(programs) => {
                let there = programs.values().filter_map(Value::as_str);
                there.collect::<Vec<_>>().join("; ")
            }
            Value::String(words) => words.clone(),
            value => value.to_string(),
        };
        text.push_str(&format!("| {name} | {words} |\n"));
    }
    text
}

/// What carries the agents' disk operations out, and why where that isn't io_uring.
fn storage() -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let opened = runtime.and_then(|runtime| {
        tokio::task::LocalSet::new().block_on(&runtime, async { blockmirror_agent::storage::open() })
    });
    match opened {
        Err(error) => format!("none: {error}"),
        Ok(storage) => match storage.fallback_reason() {
            Some(reason) => format!("{}: {reason}", storage.kind()),
            None => storage.kind().to_owned(),
        },
    }
}

/// What stands behind a name in a file of names and values.
fn field(path: &str, name: &str) -> String {
    let content = fs::read_to_string(path).unwrap_or_default();
    let line = content.lines().find_map(|line| line.trim_start().strip_prefix(name));
    let value = line.map(|rest| rest.trim_start_matches([' ', '\t', ':', '=']).trim_matches('"'));
    value.unwrap_or("unknown").to_owned()
}

/// Which state of the sources was measured.
fn commit() -> String {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let arguments = ["-C", text(folder), "describe", "--always", "--dirty"];
    first_line("git", &arguments).unwrap_or_else(|| "unknown".to_owned())
}

fn versions() -> Map<String, Value> {
    let version = |(program, argument): &(&str, &str)| {
        let line = has(program).then(|| first_line(program, &[argument])).flatten();
        ((*program).to_owned(), line.map_or(Value::Null, Value::from))
    };
    PROGRAMS.iter().map(version).collect()
}

fn first_line(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    // Some say it on standard error.
    let said = [output.stdout, output.stderr].concat();
    let line = String::from_utf8_lossy(&said).lines().next()?.trim().to_owned();
    Some(line)
}
