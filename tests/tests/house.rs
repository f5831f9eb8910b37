//! The structure that ARCHITECTURE.md promises, read from the source: which parts never know each other, that there is one
//! comparison of fences (L5), and that each verb of the operator is in the agent's table and in the tool.

use blockmirror_agent::control::verbs::table;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A crate, a part of it, and the parts that this one never names.
const NEVER: &[(&str, &str, &[&str])] = &[
    ("agent", "device", &["transport"]),
    ("agent", "transport", &["device", "storage", "primary", "replica", "volume"]),
    ("agent", "storage", &["state", "device", "transport", "primary", "replica", "volume"]),
    ("agent", "primary", &["replica"]),
    ("agent", "replica", &["primary"]),
    ("agent", "export", &["primary", "replica"]),
    ("agent", "state", &["device", "transport", "primary", "replica", "volume"]),
    ("agent", "content", &["primary", "replica"]),
    ("agent", "verdict", &["volume", "primary", "replica"]),
    ("agent", "volume", &["supervisor"]),
    ("agent", "control", &["supervisor"]),
    ("protocol", "wire", &["disk", "tracker", "peer", "replica"]),
    ("protocol", "disk", &["wire", "tracker", "peer", "replica"]),
    ("protocol", "tracker", &["replica", "rewrite", "succession"]),
    ("protocol", "replica", &["tracker", "peer"]),
];

/// Where the numbers of fences mean something else than who was promoted after whom.
const NUMBERS: &[&str] = &["protocol/src/terms.rs", "protocol/src/replica/consent.rs"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("it is in the workspace").to_owned()
}

/// Every file below a folder that is text, by its path in the repository.
fn all(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("it is there") {
        let path = entry.expect("it can be read").path();
        if path.is_dir() {
            found.extend(all(&path));
        } else if let Ok(text) = fs::read_to_string(&path) {
            found.push((path.strip_prefix(root()).expect("it is below").display().to_string(), text));
        }
    }
    found
}

/// Every source file below a folder, without comments and without its tests.
fn sources(folder: &Path) -> Vec<(String, String)> {
    let is_test =
        |name: &str| name.contains("/tests/") || name.ends_with("tests.rs") || name.ends_with("testing.rs");
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    let files = all(folder).into_iter().filter(|(name, _)| name.ends_with(".rs") && !is_test(name));
    files
        .map(|(name, text)| {
            let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            (name, text.lines().filter(is_code).collect::<Vec<_>>().join("\n"))
        })
        .collect()
}

/// The parts of its crate that some code names.
fn named(code: &str) -> impl Iterator<Item = &str> {
    let end = |text: &str| {
        text.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(text.len())
    };
    code.split("crate::").skip(1).map(move |rest| &rest[..end(rest)])
}

#[test]
fn parts_that_shall_not_know_each_other_do_not() {
    let mut arrows = Vec::new();
    for (name, part, never) in NEVER {
        let folder = root().join(name).join("src");
        let of_part = |file: &str| {
            let rest = file.strip_prefix(&format!("{name}/src/")).unwrap_or(file);
            rest.split('/').next().map(|first| first.trim_end_matches(".rs")) == Some(*part)
        };
        let files: Vec<_> = sources(&folder).into_iter().filter(|(file, _)| of_part(file)).collect();
        assert!(!files.is_empty(), "there is no part {part} in {name}: mend this list");
        for (file, code) in files {
            arrows.extend(
                named(&code).filter(|other| never.contains(other)).map(|other| format!("{file} -> {other}")),
            );
        }
    }
    arrows.dedup();
    assert!(arrows.is_empty(), "{arrows:#?}");
}

#[test]
fn fences_are_compared_in_one_place() {
    let mut others = Vec::new();
    for folder in ["protocol/src", "agent/src", "tools/src", "tests/src"] {
        for (file, code) in sources(&root().join(folder)) {
            let is_comparison = |line: &&str| {
                let after = line.split(".counter").skip(1);
                after.map(str::trim_start).any(|rest| {
                    let compares = ["<", ">", "==", "!=", ".max(", ".min(", ".cmp("];
                    compares.iter().any(|sign| rest.starts_with(sign)) && !rest.starts_with("<<")
                })
            };
            if !NUMBERS.contains(&file.as_str()) {
                others.extend(
                    code.lines().filter(is_comparison).map(|line| format!("{file}: {}", line.trim())),
                );
            }
        }
    }
    assert!(others.is_empty(), "Fence::against is the rule: {others:#?}");
    let terms = fs::read_to_string(root().join("protocol/src/terms.rs")).expect("it is there");
    let before = terms.split("pub struct Fence").next().expect("there is a beginning");
    let derived = before.rsplit("#[derive(").next().expect("it derives something");
    assert!(!derived.contains("Ord"), "an order of fences would be a second rule");
}

/// Which parts of a crate each part names.
fn arrows_of(name: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut arrows: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (file, code) in sources(&root().join(name).join("src")) {
        let rest = file.strip_prefix(&format!("{name}/src/")).unwrap_or(&file).to_owned();
        let part = rest.split('/').next().unwrap_or_default().trim_end_matches(".rs").to_owned();
        let others = named(&code).filter(|other| *other != part).map(str::to_owned);
        arrows.entry(part.clone()).or_default().extend(others);
    }
    arrows
}

/// All parts that one leads to.
fn reached(arrows: &BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<String> {
    let (mut found, mut left) = (BTreeSet::new(), vec![from.to_owned()]);
    while let Some(part) = left.pop() {
        let others = arrows.get(&part).into_iter().flatten().filter(|other| arrows.contains_key(*other));
        left.extend(others.filter(|other| found.insert((*other).clone())).cloned().collect::<Vec<_>>());
    }
    found
}

#[test]
fn no_part_leads_back_to_itself() {
    for name in ["protocol", "agent", "tools"] {
        let arrows = arrows_of(name);
        println!(
            "{name}: {} parts, {} arrows",
            arrows.len(),
            arrows.values().map(BTreeSet::len).sum::<usize>()
        );
        let circles: Vec<_> = arrows.keys().filter(|part| reached(&arrows, part).contains(*part)).collect();
        assert!(circles.is_empty(), "{name}: {circles:?}");
    }
}

/// How many fields of the three machines are bare: a number, a flag, a time or a container, which any of their methods may set.
const BARE: &[(&str, &str, usize)] = &[
    ("protocol/src/tracker/mod.rs", "pub struct Tracker {", 6),
    ("protocol/src/peer/mod.rs", "pub struct Peer {", 10),
    ("protocol/src/replica/mod.rs", "pub struct Replica {", 5),
];

#[test]
fn machines_are_made_of_types_that_own_their_state() {
    let bare_types = ["bool", "u32", "u64", "usize", "Time", "Duration", "Sequence", "Epoch", "Session"];
    let containers = ["Vec<", "VecDeque<", "BTreeMap<", "BTreeSet<", "HashMap<", "HashSet<"];
    for (file, begins, limit) in BARE {
        let code = fs::read_to_string(root().join(file)).expect("it is there");
        let fields = code.split(begins).nth(1).and_then(|rest| rest.split("\n}").next());
        let fields = fields.expect("the machine stands there").lines().map(str::trim);
        let types = fields.filter(|line| !line.starts_with("//")).filter_map(|line| line.split_once(": "));
        let types: Vec<_> = types.map(|(field, of)| (field, of.trim_end_matches(','))).collect();
        assert!(types.len() > *limit, "{file}: {types:?}");
        let is_bare = |of: &str| {
            let of = of.strip_prefix("Option<").and_then(|of| of.strip_suffix('>')).unwrap_or(of);
            bare_types.contains(&of) || containers.iter().any(|container| of.starts_with(container))
        };
        let bare: Vec<_> = types.iter().filter(|(_, of)| is_bare(of)).map(|(field, _)| field).collect();
        println!("{file}: {} fields, bare: {bare:?}", types.len());
        assert!(bare.len() <= *limit, "{file}: {bare:?}");
    }
}

#[test]
fn front_ends_are_registered_and_named_nowhere_else() {
    let names_one = |code: &str| code.contains("device::nbd") || code.contains("device::loopback");
    let agent = sources(&root().join("agent/src"));
    let others =
        agent.iter().filter(|(file, code)| !file.starts_with("agent/src/device/") && names_one(code));
    let others: Vec<_> = others.map(|(file, _)| file).collect();
    assert!(others.is_empty(), "device::front_end is the place to name them: {others:#?}");
}

/// The words of some code: its names, numbers and keywords.
fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|letter: char| !letter.is_alphanumeric() && letter != '_')
}

#[test]
fn each_verb_has_a_row_and_a_client() {
    let rows: Vec<&str> = table().iter().map(|row| row.request).collect();
    let api = sources(&root().join("agent/src/control/api"));
    let declared = api.iter().flat_map(|(_, code)| code.split("pub struct ").skip(1));
    let requests = declared.filter_map(|rest| words(rest).next()).filter(|name| name.ends_with("Request"));
    let without_row: Vec<_> = requests.filter(|name| !rows.contains(name)).collect();
    assert!(without_row.is_empty(), "not in the table of control/verbs: {without_row:#?}");
    let tool = sources(&root().join("tools/src"));
    let asked: BTreeSet<&str> = tool.iter().flat_map(|(_, code)| words(code)).collect();
    let without_client: Vec<_> = rows.iter().filter(|name| !asked.contains(*name)).collect();
    assert!(without_client.is_empty(), "the tool never asks for these: {without_client:#?}");
}

#[test]
fn each_file_of_the_tool_is_part_of_it() {
    let main = fs::read_to_string(root().join("tools/src/main.rs")).expect("it is there");
    for entry in fs::read_dir(root().join("tools/src")).expect("it is there") {
        let path = entry.expect("it can be read").path();
        let name = path.file_stem().expect("it has a name").display().to_string();
        assert!(name == "main" || main.contains(&format!("\nmod {name};\n")), "{name} is no module of main");
    }
}

/// What a path in a document may stand for: `a/{b,c}` for two.
fn expanded(span: &str) -> Vec<String> {
    let Some((before, rest)) = span.split_once('{') else { return vec![span.to_owned()] };
    let Some((names, after)) = rest.split_once('}') else { return Vec::new() };
    names.split(',').flat_map(|name| expanded(&format!("{before}{}{after}", name.trim()))).collect()
}

/// Names of code outlived the code in it: of a type that had another name, and of files that were moved.
#[test]
fn what_the_architecture_names_is_there() {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("it is there");
    let code: Vec<_> =
        ["protocol", "agent", "tools", "tests", "scripts"].map(|name| all(&root().join(name))).concat();
    // Within a crate's folder the sources are in another one.
    let is_path = |name: &str| {
        let name = name.trim_end_matches('/');
        let within = name.split_once('/').map(|(first, rest)| format!("{first}/src/{rest}"));
        [Some(name.to_owned()), within].into_iter().flatten().any(|name| {
            let ends = [format!("/{name}"), format!("/{name}.rs"), format!("/{name}/mod.rs")];
            code.iter().any(|(file, _)| {
                let file = format!("/{file}");
                ends.iter().any(|end| file.ends_with(end.as_str())) || file.contains(&format!("/{name}/"))
            })
        })
    };
    let is_item = |name: &str| {
        let (of, item) = name.rsplit_once("::").expect("it has two parts");
        let (of, item) = (of.rsplit("::").next().unwrap_or(of), words(item).next().unwrap_or_default());
        let owns = |code: &str| {
            let begins = ["struct ", "enum ", "trait ", "impl ", "for "];
            begins.iter().any(|begin| code.split(begin).skip(1).any(|rest| words(rest).next() == Some(of)))
        };
        let is_type = of.starts_with(char::is_uppercase);
        code.iter().any(|(file, code)| {
            let is_there = if is_type { owns(code) } else { file.contains(&format!("/{of}")) };
            is_there && words(code).any(|word| word == item)
        })
    };
    let is_name = |text: &str| text.chars().all(|letter| letter.is_alphanumeric() || "_/:".contains(letter));
    let spans = page.split('`').skip(1).step_by(2).flat_map(expanded).filter(|span| is_name(span));
    let stale: BTreeSet<String> = spans
        .filter(|span| !span.starts_with('/'))
        .filter(|span| match span.contains("::") {
            true => !is_item(span) && !is_path(&span.replace("::", "/")),
            false => span.contains('/') && !is_path(span),
        })
        .collect();
    assert!(stale.is_empty(), "ARCHITECTURE.md names what is not there: {stale:#?}");
}
