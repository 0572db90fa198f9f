//! Rules of the house that no other tool checks. Each failure names the file and what to do.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines that a source file may have.
const LINES_MAX: usize = 1000;

/// Text that may stand only in the files given (by the end of their path): what it is, what it
/// breaks and what to use instead.
const BANNED: &[(&str, &[&str], &str)] = &[
    ("todo!", &[], "finish it"),
    ("unimplemented!", &[], "finish it"),
    ("dbg!", &[], "use tracing"),
    ("#[ignore", &["tests/model.rs"], "a test that does not run tests nothing"),
    ("std::time::Instant", OUTSIDE_OF_NODE, "breaks replay: use tokio::time::Instant"),
    ("std::time::{Duration, Instant", OUTSIDE_OF_NODE, "breaks replay: use tokio::time::Instant"),
    ("SystemTime::now", &["src/env.rs"], "breaks replay: use crate::env"),
    ("thread::spawn", OWN_THREADS, "breaks replay: only the owner of a blocking store may"),
    ("HashMap", &[], "its order is random: use BTreeMap"),
    ("HashSet", &[], "its order is random: use BTreeSet"),
    ("from_entropy()", &["src/env.rs", "src/bin/", "src/node/", "src/cli/"], "use the node's Env"),
    ("/work/", &[], "a path of one machine"),
    ("/home/", &[], "a path of one machine"),
];
/// Clients and measurements, which no simulation runs.
const OUTSIDE_OF_NODE: &[&str] = &["benches/", "tests/", "src/admin/client.rs", "src/cli/"];
/// The store's worker and what tests need for blocking clients.
const OWN_THREADS: &[&str] = &["src/meta/embedded/", "src/node/daemon.rs", "tests/"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `dir` (relative to the repository) whose name ends with `ending`.
fn files(dir: &str, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![root().join(dir)];
    while let Some(dir) = dirs.pop() {
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                let generated = ["target", "corpus", "artifacts", "sds-data"];
                if !generated.contains(&name.as_str()) && !name.starts_with(".git") {
                    dirs.push(path);
                }
            } else if name.ends_with(ending) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Rust sources with their path from the repository's root.
fn sources() -> Vec<(String, String)> {
    ["src", "tests", "benches", "fuzz"]
        .iter()
        .flat_map(|dir| files(dir, ".rs"))
        .map(|path| (relative(&path), fs::read_to_string(&path).unwrap()))
        .filter(|(name, _)| name != "tests/tidy.rs")
        .collect()
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().to_string_lossy().into_owned()
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn report(problems: &str) {
    assert!(problems.is_empty(), "\n{problems}");
}

#[test]
fn files_are_short_and_open_with_what_they_are_for() {
    let mut problems = String::new();
    for (name, content) in sources() {
        let lines = content.lines().count();
        if lines > LINES_MAX {
            writeln!(problems, "{name}: {lines} lines, at most {LINES_MAX}: split it").unwrap();
        }
        if !content.starts_with("//!") {
            writeln!(problems, "{name}: opens without `//!` that says what it is for").unwrap();
        }
    }
    report(&problems);
}

#[test]
fn nothing_banned() {
    let mut problems = String::new();
    for (name, content) in sources() {
        for (banned, allowed, instead) in BANNED {
            if allowed.iter().any(|place| name.starts_with(place) || name.ends_with(place)) {
                continue;
            }
            for (number, line) in (1..).zip(content.lines()) {
                let code = line.trim_start();
                if code.contains(banned) && !code.starts_with("//") {
                    writeln!(problems, "{name}:{number}: {banned}: {instead}").unwrap();
                }
            }
        }
        let selects = content.split("select! {").skip(1);
        for after in selects.filter(|after| !after.trim_start().starts_with("biased")) {
            let line = after.lines().nth(1).unwrap_or_default().trim();
            writeln!(problems, "{name}: select! without `biased` breaks replay: {line}").unwrap();
        }
    }
    report(&problems);
}

/// Text files that people write.
fn texts() -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> =
        ["src", "tests", "benches", "fuzz", "docs", "tools", ".ci", ".config"]
            .iter()
            .flat_map(|dir| files(dir, ""))
            .collect();
    for name in ["README.md", "Cargo.toml"] {
        all.push(root().join(name));
    }
    all
}

#[test]
fn text_is_clean() {
    let mut problems = String::new();
    for path in texts() {
        let name = relative(&path);
        let Ok(content) = fs::read_to_string(&path) else { continue };
        for (number, line) in (1..).zip(content.lines()) {
            if line.ends_with([' ', '\t', '\r']) {
                writeln!(problems, "{name}:{number}: space at the end of the line").unwrap();
            }
            if line.contains('\t') && !name.ends_with("Makefile") {
                writeln!(problems, "{name}:{number}: a tab").unwrap();
            }
            if name != "tests/tidy.rs" && ["/work/", "/home/"].iter().any(|p| line.contains(p)) {
                writeln!(problems, "{name}:{number}: a path of one machine").unwrap();
            }
        }
        if !content.is_empty() && !content.ends_with('\n') {
            writeln!(problems, "{name}: no newline at the end").unwrap();
        }
    }
    report(&problems);
}

/// Files that the modules declared in `file` lie in.
fn modules(file: &Path) -> Vec<PathBuf> {
    let content = fs::read_to_string(file).unwrap();
    let stem = file.file_stem().unwrap().to_string_lossy().into_owned();
    let dir = file.parent().unwrap();
    let is_root = ["mod", "lib", "main"].contains(&stem.as_str())
        || ["tests", "benches", "bin", "fuzz_targets"]
            .iter()
            .any(|top| dir.file_name().is_some_and(|name| name == *top));
    let below = if is_root { dir.to_path_buf() } else { dir.join(&stem) };
    let mut found = Vec::new();
    let mut given: Option<String> = None;
    for line in content.lines().map(str::trim) {
        if let Some(path) = line.strip_prefix("#[path = \"") {
            given = path.strip_suffix("\"]").map(str::to_owned);
            continue;
        }
        let item = line.strip_prefix("pub(crate) ").or(line.strip_prefix("pub(super) "));
        let item = item.or(line.strip_prefix("pub ")).unwrap_or(line);
        let Some(module) = item.strip_prefix("mod ").and_then(|rest| rest.strip_suffix(';')) else {
            if !line.starts_with("#[") {
                given = None;
            }
            continue;
        };
        if let Some(path) = given.take() {
            found.push(dir.join(path));
            continue;
        }
        let flat = below.join(format!("{module}.rs"));
        found.push(if flat.exists() { flat } else { below.join(module).join("mod.rs") });
    }
    found
}

#[test]
fn no_dead_files() {
    let mut reached: BTreeSet<PathBuf> = BTreeSet::new();
    let mut queue: Vec<PathBuf> = vec![root().join("src/lib.rs")];
    for top in ["src/bin", "tests", "benches"] {
        let roots = files(top, ".rs").into_iter();
        queue.extend(roots.filter(|path| path.parent() == Some(&root().join(top))));
    }
    let fuzz = read("fuzz/Cargo.toml");
    let targets = fuzz.lines().filter_map(|line| line.strip_prefix("path = \"fuzz_targets/"));
    queue.extend(targets.map(|rest| root().join("fuzz/fuzz_targets").join(rest.trim_matches('"'))));
    while let Some(path) = queue.pop() {
        if reached.insert(path.clone()) {
            assert!(path.exists(), "{} is declared but not there", relative(&path));
            queue.extend(modules(&path));
        }
    }
    let mut problems = String::new();
    for (name, _) in sources() {
        if !reached.contains(&root().join(&name)) {
            writeln!(problems, "{name}: no `mod` reaches it").unwrap();
        }
    }
    report(&problems);
}

/// The anchor that a heading of Markdown gets.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn links_of_the_documentation_resolve() {
    let mut problems = String::new();
    let mut documents = files("docs", ".md");
    documents.push(root().join("README.md"));
    for document in documents {
        let content = fs::read_to_string(&document).unwrap();
        let links = content.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://") && !link.starts_with("mailto:")) {
            let (file, fragment) = link.split_once('#').unwrap_or((link, ""));
            let path = match file {
                "" => document.clone(),
                _ => document.parent().unwrap().join(file),
            };
            let name = relative(&document);
            if !path.exists() {
                writeln!(problems, "{name}: {link} leads nowhere").unwrap();
            } else if !fragment.is_empty() && path.extension().is_some_and(|e| e == "md") {
                let text = fs::read_to_string(&path).unwrap();
                let headings = text.lines().filter(|line| line.starts_with('#'));
                let mut anchors = headings.map(|line| anchor(line.trim_start_matches('#')));
                if !anchors.any(|found| found == fragment) {
                    writeln!(problems, "{name}: {link}: no such heading").unwrap();
                }
            }
        }
        problems.push_str(&dead_paths(&relative(&document), &content));
    }
    report(&problems);
}

/// Paths of the repository in backquotes that are not there.
fn dead_paths(name: &str, content: &str) -> String {
    let mut problems = String::new();
    for code in content.split('`').skip(1).step_by(2) {
        let path = code.split([' ', ':']).next().unwrap_or_default();
        let ours = ["src/", "tests/", "tools/", "benches/", "docs/", "fuzz/fuzz_targets/"];
        let plain = !path.contains(['*', '…', '{', '<', '\n']);
        if ours.iter().any(|top| path.starts_with(top)) && plain && !root().join(path).exists() {
            writeln!(problems, "{name}: `{path}` is not there").unwrap();
        }
    }
    problems
}

#[test]
fn every_planted_bug_is_documented() {
    let source = read("src/planted.rs");
    let body = source.split("pub enum Bug {").nth(1).unwrap().split('}').next().unwrap();
    let bugs = body.lines().filter_map(|line| line.trim().strip_suffix(','));
    let document = read("docs/simulation.md");
    let used: String = sources()
        .into_iter()
        .filter(|(name, _)| name.starts_with("src/") && name != "src/planted.rs")
        .map(|(_, content)| content)
        .collect();
    let mut problems = String::new();
    let mut planted = 0;
    for bug in bugs {
        let starts = [format!("| `{bug}` |"), format!("| cluster `{bug}` |")];
        let begins = |line: &&str| starts.iter().any(|start| line.starts_with(start));
        let row = document.lines().find(begins);
        let Some(row) = row else {
            writeln!(problems, "docs/simulation.md has no row `{bug}`").unwrap();
            continue;
        };
        let is_planted = used.contains(&format!("Bug::{bug})"));
        planted += usize::from(is_planted);
        if is_planted == row.contains("not planted yet") {
            writeln!(problems, "docs/simulation.md, `{bug}`: planted is {is_planted}").unwrap();
        }
    }
    assert!(planted >= 12, "at least 12 bugs are planted, not {planted}");
    report(&problems);
}

#[test]
fn every_fuzz_target_is_run() {
    let script = read("tools/fuzz");
    let listed: BTreeSet<&str> = script
        .split("targets=(\n")
        .nth(1)
        .unwrap()
        .split(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let manifest = read("fuzz/Cargo.toml");
    let declared: BTreeSet<&str> = manifest
        .lines()
        .filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'))
        .filter(|name| *name != "sds-fuzz")
        .collect();
    assert_eq!(listed, declared, "tools/fuzz (left) and fuzz/Cargo.toml (right) differ");
    let mut problems = String::new();
    for path in files("fuzz/fuzz_targets", ".rs") {
        let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
        let is_target = fs::read_to_string(&path).unwrap().contains("fuzz_target!(");
        if is_target && !declared.contains(stem.as_str()) {
            writeln!(problems, "{stem} is not in fuzz/Cargo.toml").unwrap();
        }
    }
    report(&problems);
}

#[test]
fn top_level_holds_nothing_by_accident() {
    let known = [
        ".ci",
        ".clippy.toml",
        ".config",
        ".git",
        ".gitignore",
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "README.md",
        "benches",
        "docs",
        "fuzz",
        "proptest-regressions",
        "rustfmt.toml",
        "sds-data",
        "src",
        "target",
        "tests",
        "tools",
        "packaging",
    ];
    let mut problems = String::new();
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        if !known.contains(&name.as_str()) {
            writeln!(problems, "{name}: what is it for? (known: tests/tidy.rs)").unwrap();
        }
    }
    report(&problems);
}
