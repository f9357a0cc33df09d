//! README's quick start, word for word: its commands are run in a fresh folder without any service, and what they
//! print is what stands there, but for numbers, times and `…`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::dev::{alone, folder, interrupted, on_a_terminal, plain};

const PROGRAM: &str = "cargo run --release -- ";
/// How long `dev` runs before its Ctrl-C: time for dead letters of every kind.
const SECONDS: u64 = 10;

/// A command, and what README says that it prints.
struct Step {
    command: String,
    printed: Vec<String>,
}

/// The blocks of a section: each ```sh line, with the ```text block that follows.
fn steps(section: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut block = None;
    for line in section.lines() {
        match (line.strip_prefix("```"), block) {
            (Some(""), Some(_)) => block = None,
            (Some(kind), None) => block = Some(kind),
            (None, Some("sh")) => steps.push(Step { command: line.to_owned(), printed: Vec::new() }),
            (None, Some("text")) => steps.last_mut().unwrap().printed.push(line.to_owned()),
            (None, None) => {}
            (_, Some(kind)) => panic!("a block of {kind} in the quick start: {line}"),
        }
    }
    steps
}

/// Numbers become `0`, units of time `s`; runs of blanks, dashes and blocks become one.
fn worn(line: &str) -> String {
    let mut text = String::new();
    let mut letters = line.trim_end().chars().filter(|c| *c != '\r').peekable();
    while let Some(c) = letters.next() {
        let signed = c == '-' && letters.peek().is_some_and(char::is_ascii_digit);
        if signed || c.is_ascii_digit() {
            while letters.next_if(|c| c.is_ascii_digit() || matches!(c, '.' | ',')).is_some() {}
            text.push('0');
            continue;
        }
        let c = if ('▁'..='█').contains(&c) { '▁' } else { c };
        if !(matches!(c, ' ' | '-' | '▁') && text.ends_with(c)) {
            text.push(c);
        }
    }
    ["0 ms", "0 min"].iter().fold(text, |text, unit| text.replace(unit, "0 s"))
}

fn same(expected: &str, line: &str) -> bool {
    let parts: Vec<&str> = expected.split('…').collect();
    let [first, middle @ .., last] = &parts[..] else { return expected == line };
    let Some(rest) = line.strip_prefix(first) else { return false };
    let Some(rest) = rest.strip_suffix(last) else { return false };
    middle.iter().try_fold(rest, |rest, part| rest.split_once(part).map(|(_, rest)| rest)).is_some()
}

/// The lines between two `…` stand together, one group after the other. What is missing, if any.
fn missing(expected: &[String], printed: &[String]) -> Option<String> {
    let mut from = 0;
    for group in expected.split(|line| line == "…").filter(|group| !group.is_empty()) {
        let group: Vec<String> = group.iter().map(|line| worn(line)).collect();
        let at = (from..=printed.len().saturating_sub(group.len()))
            .find(|at| group.iter().zip(&printed[*at..]).all(|(expected, line)| same(expected, line)));
        match at {
            Some(at) if at + group.len() <= printed.len() => from = at + group.len(),
            _ => return Some(group.join("\n")),
        }
    }
    None
}

fn run(step: &Step, folder: &Path) -> Option<String> {
    let command = step.command.replacen(PROGRAM, &format!("{} ", env!("CARGO_BIN_EXE_millstream")), 1);
    let shell = |line: &str| {
        let mut shell = alone("bash", folder);
        shell.args(["-c", &format!("exec {line}")]);
        shell
    };
    if !command.contains(" dev ") {
        let out = shell(&command).output().unwrap();
        assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
        return Some(String::from_utf8(out.stdout).unwrap());
    }
    if command.contains("--plain") {
        let (_, said) = interrupted(shell(&command), Duration::from_secs(SECONDS));
        return Some(said);
    }
    let line = format!("timeout --foreground -s INT {SECONDS} {command}");
    let shown = on_a_terminal(folder, "rows 40 cols 118", &line)?;
    Some(shown.split("\r\n").map(|line| plain(line) + "\n").collect())
}

/// The commands that `dev` names at its end, as it names them.
fn tried_next(said: &str) -> Vec<String> {
    let next = said.split("Try next:").nth(1).unwrap_or_default();
    let line = |line: &str| {
        let at = line.find(" query ")?;
        Some(format!("{}{}", PROGRAM, &line[at + 1..]))
    };
    next.lines().filter_map(line).collect()
}

#[test]
fn the_quick_start_does_what_it_says() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let section = readme.split("## Try it").nth(1).unwrap().split("### With real services").next().unwrap();
    let steps = steps(section);
    assert!(steps.len() >= 4 && steps.iter().all(|step| step.command.starts_with(PROGRAM)));
    let folder = folder();
    let mut next = Vec::new();
    for step in &steps {
        let Some(printed) = run(step, folder.path()) else {
            println!("skipped {}: install util-linux's script", step.command);
            continue;
        };
        let lines: Vec<String> = printed.lines().map(worn).collect();
        if let Some(missing) = missing(&step.printed, &lines) {
            panic!("{}\nREADME says\n{missing}\nbut it prints\n{}", step.command, lines.join("\n"));
        }
        next.extend(tried_next(&printed));
    }
    assert!(next.len() >= 6, "{next:?}");
    for command in next {
        let step = Step { command, printed: Vec::new() };
        let rows = run(&step, folder.path()).unwrap();
        assert!(rows.lines().count() > 4, "{}\n{rows}", step.command);
    }
}

#[test]
fn what_is_compared() {
    assert_eq!(worn("| -17.25 | 2,003  ▁▄█ +-----+ 112 ms"), "| 0 | 0 ▁ +-+ 0 s");
    assert_eq!(worn("2026-11-21T08:27:04.213Z"), "000T0:0:0Z");
    assert!(
        same("a…c", "abbc") && same("…", "") && same("a", "a") && !same("a…b…c", "axc") && !same("a", "ab")
    );
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(missing(&lines("a\nb\n…\nd"), &lines("x\na\nb\nc\nd")), None);
    assert_eq!(missing(&lines("a\n…\nb\nd"), &lines("a\nb\nc\nd")), Some("b\nd".to_owned()));
}
