//! The import rules of the rooms (README, code map), as a test.

use std::fs;
use std::path::{Path, PathBuf};

/// Room and the rooms it may import beside `error` and `stream`. `cli` may import all.
const MAY_IMPORT: [(&str, &[&str]); 8] = [
    ("stream", &[]),
    ("sql", &[]),
    ("state", &[]),
    ("operators", &["state"]),
    ("connectors", &["sql::options"]),
    ("plan", &["sql", "connectors", "operators"]),
    ("runtime", &["plan", "operators", "connectors", "state"]),
    ("batch", &["plan", "sql", "connectors", "operators", "state"]),
];

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            found.push(path);
        }
    }
}

/// Every `crate::a::b` of a file, first two segments.
fn imports(text: &str) -> Vec<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.flat_map(|line| {
        line.match_indices("crate::")
            .map(|(at, _)| {
                let word = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
                let path: String = line[at + 7..].chars().take_while(|c| word(*c)).collect();
                path.split("::").take(2).collect::<Vec<_>>().join("::")
            })
            .collect::<Vec<_>>()
    })
    .collect()
}

fn allowed(import: &str, room: &str, may: &[&str]) -> bool {
    let first = import.split("::").next().unwrap_or_default();
    first.is_empty()
        || [room, "error", "stream"].contains(&first)
        || may
            .iter()
            .any(|rule| import == *rule || first == *rule || import.starts_with(&format!("{rule}::")))
}

#[test]
fn rooms_import_only_what_they_may() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut faults = Vec::new();
    for (room, may) in MAY_IMPORT {
        let mut found = Vec::new();
        files(&src.join(room), &mut found);
        for path in found {
            let text = fs::read_to_string(&path).unwrap();
            let bad = imports(&text).into_iter().filter(|import| !allowed(import, room, may));
            faults.extend(bad.map(|import| format!("{}: crate::{import}", path.display())));
        }
    }
    assert!(faults.is_empty(), "imports against the rules of the rooms:\n{}", faults.join("\n"));
}

#[test]
fn only_cli_prints() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    files(&src, &mut found);
    assert!(!found.is_empty());
    let printing = ["println!(", "print!(", "eprintln!(", "eprint!(", "dbg!("];
    for path in found {
        let inside = path.strip_prefix(&src).unwrap();
        if inside.starts_with("cli") || inside == Path::new("main.rs") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let hit = text.lines().find(|line| {
            !line.trim_start().starts_with("//") && printing.iter().any(|call| line.contains(call))
        });
        // Tests inside a room may say what was skipped; they stand below `mod tests` or in files of their own.
        let tests = text.find("#[cfg(test)]").unwrap_or(text.len());
        let at = hit.and_then(|line| text.find(line)).unwrap_or(usize::MAX);
        let in_tests = path.to_string_lossy().contains("tests");
        assert!(
            hit.is_none() || in_tests || at >= tests,
            "{} prints: {}",
            path.display(),
            hit.unwrap_or_default()
        );
    }
}

#[test]
fn files_stay_small() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    files(&src, &mut found);
    let lines = |path: &PathBuf| fs::read_to_string(path).unwrap().lines().count();
    let long: Vec<String> = found
        .iter()
        .filter(|path| lines(path) > 700)
        .map(|path| format!("{} ({})", path.display(), lines(path)))
        .collect();
    assert!(long.is_empty(), "files over 700 lines, each likely two rooms: {}", long.join(", "));
}
