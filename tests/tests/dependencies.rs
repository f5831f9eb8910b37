//! What Blockmirror is built from is what `deny.toml` allows: sources, licences, no second cryptography library. That is a
//! part of `cargo deny check`, which needs more than a fresh machine has.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The words in quotation marks between `start` and the next `]`.
fn quoted(text: &str, start: &str) -> Vec<String> {
    let (_, rest) = text.split_once(start).unwrap_or_else(|| panic!("deny.toml has {start}"));
    let list = rest.split_once("\n]").map_or(rest, |(list, _)| list);
    list.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Whether a licence expression (SPDX) can be met with these licences.
fn is_met(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    either(&words, &mut at, allowed) && at == words.len()
}

fn either(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let mut met = all(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        met |= all(words, at, allowed);
    }
    met
}

fn all(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let mut met = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(words, at, allowed);
    }
    met
}

fn one(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let Some(word) = words.get(*at) else { return false };
    *at += 1;
    if *word == "(" {
        let met = either(words, at, allowed);
        *at += 1;
        return met;
    }
    if words.get(*at) == Some(&"WITH") {
        *at += 2;
        return false;
    }
    allowed.iter().any(|licence| licence == word)
}

#[test]
fn licence_expressions_are_met_as_they_say() {
    let allowed = ["MIT".to_owned(), "ISC".to_owned()];
    for (expression, met) in [
        ("MIT", true),
        ("GPL-2.0", false),
        ("MIT OR GPL-2.0", true),
        ("GPL-2.0/MIT", true),
        ("MIT AND GPL-2.0", false),
        ("ISC AND (GPL-2.0 OR MIT)", true),
        ("GPL-2.0 WITH exception OR MIT", true),
        ("GPL-2.0 WITH exception", false),
        ("", false),
    ] {
        assert_eq!(is_met(expression, &allowed), met, "{expression}");
    }
}

#[test]
fn everything_comes_from_crates_io() {
    let lock = read("Cargo.lock");
    let sources: BTreeSet<&str> = lock.lines().filter_map(|line| line.strip_prefix("source = ")).collect();
    assert_eq!(sources, BTreeSet::from([format!("\"{CRATES_IO}\"").as_str()]));
}

#[test]
fn what_is_built_is_allowed() {
    let Some(cargo) = std::env::var_os("CARGO") else {
        return println!("skipped: the test was not started by cargo, which tells what is built");
    };
    let tree = Command::new(cargo)
        .args(["tree", "--locked", "--offline", "--workspace", "--edges", "normal,build,dev"])
        .args(["--prefix", "none", "--format", "{p}|{l}"])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .output()
        .expect("cargo runs");
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let deny = read("deny.toml");
    let (_, bans) = deny.split_once("[bans]").expect("deny.toml bans crates");
    let names: Vec<String> =
        quoted(bans, "deny = [").chunks(2).map(|name_and_reason| name_and_reason[0].clone()).collect();
    assert!(names.contains(&"ring".to_owned()), "{names:?}");
    let (_, licences) = deny.split_once("[licenses]").expect("deny.toml allows licences");
    let allowed = quoted(licences, "allow = [");
    let text = String::from_utf8_lossy(&tree.stdout);
    let built: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once('|')).collect();
    assert!(built.len() > 50, "{text}");
    for (package, licence) in built {
        let name = package.split(' ').next().unwrap_or_default();
        assert!(!names.iter().any(|banned| banned == name), "{package} is banned");
        let licence = licence.trim_end_matches(" (*)");
        assert!(is_met(licence, &allowed), "the licence of {package} is {licence}");
    }
}
