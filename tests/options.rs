//! The reference of options is what the code reads: no more, no less, and the page says the same.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use millstream::connectors::reference::{CONNECTORS, Connector, Role, markdown};
use millstream::sql::options::OptionDoc;
use millstream::sql::{Catalog, SourceText, Variables};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_page_of_options_is_made_from_the_code() {
    let page = root().join("src/connectors/OPTIONS.md");
    if std::env::var("MILLSTREAM_BLESS").is_ok() {
        fs::write(&page, markdown()).unwrap();
    }
    let stands = fs::read_to_string(&page).unwrap_or_default();
    assert!(stands == markdown(), "{} is old: MILLSTREAM_BLESS=1 writes it anew", page.display());
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        match path.is_dir() {
            true => rust_files(&path, found),
            false => found.extend(path.extension().is_some_and(|kind| kind == "rs").then_some(path)),
        }
    }
}

/// Names of options in calls such as `options.required("topic")`, prefixes as `kafka.*`.
fn asked_for(text: &str) -> Vec<String> {
    let code = text.split("mod tests {").next().unwrap_or_default();
    let calls = [
        "string",
        "required",
        "guarded",
        "parse",
        "duration",
        "choice",
        "with_prefix",
        "guarded_with_prefix",
    ];
    let squeezed: String = code.chars().filter(|c| !c.is_whitespace()).collect();
    let mut names = Vec::new();
    for (at, _) in squeezed.match_indices("options.") {
        let rest = &squeezed[at + "options.".len()..];
        let Some(call) = calls.iter().find(|call| {
            rest.strip_prefix(**call).is_some_and(|rest| rest.starts_with('(') || rest.starts_with("::<"))
        }) else {
            continue;
        };
        let Some((_, argument)) = rest.split_once('(') else { continue };
        let Some(name) = argument.strip_prefix('"').and_then(|name| name.split('"').next()) else { continue };
        let star = if call.ends_with("prefix") { "*" } else { "" };
        names.push(format!("{name}{star}"));
    }
    names
}

#[test]
fn every_option_that_the_code_reads_is_in_the_reference_and_no_other() {
    let mut files = Vec::new();
    ["src/connectors", "src/plan", "src/batch"]
        .iter()
        .for_each(|room| rust_files(&root().join(room), &mut files));
    files.retain(|file| !file.to_string_lossy().contains("tests"));
    let read: BTreeSet<String> =
        files.iter().flat_map(|file| asked_for(&fs::read_to_string(file).unwrap())).collect();
    let of = |connector: &Connector, role: Role| -> Vec<String> {
        connector.options(role).unwrap().iter().map(|option| option.name.to_owned()).collect()
    };
    let listed: BTreeSet<String> = CONNECTORS
        .iter()
        .flat_map(|connector| connector.roles().flat_map(|role| of(connector, role)).collect::<Vec<_>>())
        .collect();
    assert_eq!(read, listed);
}

/// Options that must be given, with the values of their examples, and one more.
fn given(options: &[&OptionDoc], connector: &str, one: &OptionDoc, replaced: &[(&str, &str)]) -> String {
    let wanted = |option: &&&OptionDoc| option.default == "required" || option.name == one.name;
    let pair = |option: &&OptionDoc| {
        let value = match replaced.iter().find(|(name, _)| *name == option.name) {
            Some((_, value)) => value,
            None if option.name == "connector" => connector,
            None => option.example,
        };
        let name = option
            .name
            .replace("kafka.*", "kafka.fetch.min.bytes")
            .replace("topic.*", "topic.cleanup.policy");
        format!("'{name}' = '{value}'")
    };
    options.iter().filter(wanted).map(pair).collect::<Vec<_>>().join(", ")
}

fn statements(connector: &str, role: Role, options: &[&OptionDoc], one: &OptionDoc) -> String {
    let source =
        "CREATE SOURCE s (seq BIGINT NOT NULL, event_time TIMESTAMP, WATERMARK FOR event_time AS event_time)";
    let plain = "CREATE VIEW v AS SELECT seq AS user_id, event_time FROM s;";
    let grouped = "CREATE VIEW v AS SELECT seq AS user_id, count(*) AS n FROM s GROUP BY seq;";
    match role {
        Role::Source => {
            let with = given(options, connector, one, &[]);
            let history =
                if one.name.starts_with("history.") { ", history = 'transactions_backup'" } else { "" };
            format!(
                "{source} WITH ({with}{history}); CREATE SINK transactions_backup FROM s WITH (connector = 'blackhole');"
            )
        }
        Role::Sink => {
            let keyed = connector == "delta" && one.name == "key";
            let view = if keyed || one.name == "mode" { grouped } else { plain };
            let mode = if keyed { ", mode = 'upsert'" } else { "" };
            let with = given(options, connector, one, &[]);
            format!(
                "{source} WITH (connector = 'generator'); {view} CREATE SINK o FROM v WITH ({with}{mode});"
            )
        }
        Role::Table => String::new(),
    }
}

/// Each option with its example is understood by its connector.
#[tokio::test]
async fn every_example_of_the_reference_is_accepted() {
    for connector in CONNECTORS {
        for role in [Role::Source, Role::Sink] {
            let Some(options) = connector.options(role) else { continue };
            for one in &options {
                let text = statements(connector.name, role, &options, one);
                let variables = Variables { overrides: Default::default(), environment: &|_| None };
                let texts = [SourceText { file: "p.sql".into(), text: text.as_str().into() }];
                let planned = match Catalog::load(&texts, &variables) {
                    Ok(catalog) => millstream::plan::sinks::plan(&catalog, &[]).await.map(|_| ()),
                    Err(error) => Err(error),
                };
                if let Err(error) = planned {
                    panic!("{} as {}: {}\n{text}\n{error}", connector.name, role.word(), one.name);
                }
            }
        }
    }
}

fn help(words: &[&str]) -> (Option<i32>, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_millstream")).arg("help").args(words).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (out.status.code(), text(out.stdout), text(out.stderr))
}

#[test]
fn help_knows_connectors_and_commands() {
    let (code, list, _) = help(&["connectors"]);
    assert_eq!((code, list.lines().count()), (Some(0), CONNECTORS.len() + 2), "{list}");
    assert!(list.contains("kafka      source, sink  A topic of JSON records."), "{list}");
    let (_, kafka, _) = help(&["connector", "kafka"]);
    for word in [
        "scan_startup   earliest, latest, timestamp or offsets; default: earliest",
        "topic.retention",
        "kafka.*",
    ] {
        assert!(kafka.contains(word), "{word} is not in:\n{kafka}");
    }
    assert!(kafka.lines().all(|line| line.chars().count() <= 80), "{kafka}");
    let (code, _, said) = help(&["connector", "kafak"]);
    assert!(code == Some(2) && said.contains("Did you mean kafka?"), "{said}");
    assert!(help(&["run"]).1.contains("--until-end"));
    assert!(help(&[]).1.contains("Commands:"));
    assert_eq!(help(&["runn"]).0, Some(2));
}

/// A table takes no option that it does not know, as a source and a sink do.
#[test]
fn a_table_refuses_what_it_does_not_know() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(
        folder.path().join("p.sql"),
        "CREATE TABLE t WITH (connector = 'csv', location = 'x.csv', head = 'no');",
    )
    .unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
    let out = command
        .current_dir(folder.path())
        .args(["query", "p.sql", "-c", "SELECT * FROM t"])
        .output()
        .unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.code() == Some(2) && said.contains("table t has no option head"), "{said}");
}
