//! State files of a run with many checkpoints: few, whatever kills it, and what they restore is right.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::online::wait_for;
use crate::state_format::{lines, millstream};

/// Rows of a frame that never ends, keys, groups, newest rows; the backup says what was read.
const SQL: &str = "
    CREATE SOURCE ticks (seq BIGINT, event_time TIMESTAMP, WATERMARK FOR event_time AS event_time)
        WITH (connector = 'generator', rows_per_second = 2000);
    CREATE SINK backup FROM ticks WITH (connector = 'ndjson', location = './out');
    CREATE VIEW keyed AS SELECT seq, seq % 50 AS k, event_time FROM ticks;
    CREATE VIEW windows AS
        SELECT k, event_time, count(*) OVER day AS n, sum(seq) OVER day AS s, count(*) OVER ever AS total FROM keyed
        WINDOW day AS (PARTITION BY k ORDER BY event_time RANGE BETWEEN INTERVAL '1 day' PRECEDING AND CURRENT ROW),
               ever AS (PARTITION BY k ORDER BY event_time);
    CREATE SINK windows_newest FROM windows WITH (connector = 'memory', key = 'k');
    CREATE VIEW totals AS SELECT k, count(*) AS n, sum(seq) AS s FROM keyed GROUP BY k;
    CREATE SINK totals_newest FROM totals WITH (connector = 'memory', key = 'k');";

fn start(folder: &Path, parallelism: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_millstream"))
        .args(["run", "--state", "./state", "--checkpoint", "50ms", "--parallelism", parallelism, "p.sql"])
        .current_dir(folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// The newest manifest; `None` while it is pruned or written.
fn newest(folder: &Path) -> Option<Value> {
    let names = fs::read_dir(folder.join("state/manifest")).ok()?.filter_map(Result::ok);
    let newest = names.map(|entry| entry.path()).filter(|path| path.extension().is_none()).max()?;
    serde_json::from_str(&fs::read_to_string(newest).ok()?).ok()
}

/// Files by node and kind.
fn kinds(manifest: &Value) -> BTreeMap<(String, String), usize> {
    let mut kinds = BTreeMap::new();
    for file in manifest["files"].as_array().unwrap() {
        let word = |name: &str| file[name].as_str().unwrap().to_owned();
        *kinds.entry((word("node"), word("kind"))).or_default() += 1;
    }
    kinds
}

fn on_disk(folder: &Path) -> usize {
    let nodes = fs::read_dir(folder.join("state/state")).unwrap();
    nodes.map(|node| fs::read_dir(node.unwrap().path()).unwrap().count()).sum()
}

#[test]
fn many_checkpoints_leave_few_state_files() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("p.sql"), SQL).unwrap();
    let mut most = BTreeMap::new();
    for (round, parallelism) in [2, 3, 1, 2].into_iter().enumerate() {
        let mut process = start(folder, &parallelism.to_string());
        let first = newest(folder).map_or(0, |manifest| manifest["epoch"].as_u64().unwrap());
        wait_for("70 checkpoints and few files", || {
            let Some(manifest) = newest(folder) else { return false };
            let now = kinds(&manifest);
            for (kind, count) in &now {
                let found: &mut usize = most.entry(kind.clone()).or_default();
                *found = (*count).max(*found);
            }
            // Full snapshots of keyed state are 32 epochs apart; while a merge runs, files gather, on a busy machine many:
            // it catches up.
            let few = now.values().all(|count| *count <= 3 * (32 + 8) + 16);
            manifest["epoch"].as_u64().unwrap() >= first + 70 && few
        });
        if round < 3 {
            process.kill().unwrap();
        } else {
            Command::new("kill").args(["-INT", &process.id().to_string()]).status().unwrap();
        }
        process.wait().unwrap();
    }
    println!("files at most: {most:?}");
    let kinds_found: Vec<&str> = most.keys().map(|(_, kind)| kind.as_str()).collect();
    assert_eq!(kinds_found, ["groups", "newest", "keys", "rows", "newest"]);
    let manifest = newest(folder).unwrap();
    let files = manifest["files"].as_array().unwrap();
    let merged = files.iter().filter(|file| file["path"].as_str().unwrap().contains("-merged-")).count();
    assert!(merged > 0, "nothing was merged: {files:?}");
    // A merge that the stop interrupted may leave a file per kind for the next start.
    let disk = on_disk(folder);
    assert!(disk <= files.len() + most.len(), "{disk} files lie there, {} are named", files.len());

    let rows = |sql: &str| {
        let arguments = ["query", "--state", "./state", "--format", "csv", "-c", sql, "p.sql"];
        let answer = millstream(folder, &arguments);
        answer.lines().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    let mut sums: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for line in lines(&folder.join("out")) {
        let seq = serde_json::from_str::<Value>(&line).unwrap()["seq"].as_u64().unwrap();
        let sum = sums.entry(seq % 50).or_default();
        *sum = (sum.0 + 1, sum.1 + seq);
    }
    let expected: Vec<String> = sums.iter().map(|(k, (n, s))| format!("{k},{n},{s}")).collect();
    assert_eq!(expected.len(), 50);
    assert_eq!(rows("SELECT k, n, s FROM totals_newest ORDER BY k"), expected);
    assert_eq!(rows("SELECT k, n, s FROM windows_newest ORDER BY k"), expected);
    assert_eq!(rows("SELECT k, total, s FROM windows_newest ORDER BY k"), expected);
    let status =
        millstream(folder, &["status", "--name", "p", "--state", "./state", "--format", "json", "p.sql"]);
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["sources"][0]["late"], 0, "a kill made rows late");
}
