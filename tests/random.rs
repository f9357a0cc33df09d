//! Random rows through the whole runtime: every operator against DataFusion, `millstream test --random`.
//!
//! 64 cases per pipeline; `MILLSTREAM_CASES=2000` runs more. The seeds are the same each time, threads take turns as they
//! like. `tests/inputs/random.sql` has a view for each row of README's *What runs as a stream* but Redis tables, which need
//! a server (`tests/lookups.rs`).

use std::fs;

use crate::fixtures::{millstream, root};

/// Seeds of other runs that once showed a fault.
const FOUND: [(&str, u64); 1] = [
    // The batch numbered rows of one time by chance.
    ("sql/events.sql", 63),
];

fn agrees(paths: &[&str], cases: &str, seed: &str, pipelines: usize) {
    let arguments = [paths, &["--random", cases, "--seed", seed]].concat();
    let (code, out, progress) = millstream(root(), &arguments);
    assert_eq!((code, out.as_str()), (Some(0), ""), "{progress}");
    assert_eq!(progress.matches("ok      ").count(), pipelines, "{progress}");
}

fn cases() -> String {
    std::env::var("MILLSTREAM_CASES").unwrap_or_else(|_| "64".to_owned())
}

#[test]
fn every_operator_agrees_with_the_batch() {
    agrees(&["tests/inputs/random.sql"], &cases(), "1", 1);
}

#[test]
fn shipped_pipelines_agree_with_the_batch() {
    agrees(&["sql"], &cases(), "1", 4);
}

#[test]
fn seeds_that_were_found_stay_mended() {
    for (path, seed) in FOUND {
        agrees(&[path], "1", &seed.to_string(), 1);
    }
}

/// `random()` differs between stream and batch: the one fault that is always there.
#[test]
fn a_difference_is_shown_with_its_records_and_can_be_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let sql = "CREATE SOURCE s (id BIGINT NOT NULL, at TIMESTAMP, WATERMARK FOR at AS at)
            WITH (connector = 'kafka', bootstrap_servers = 'x:1', topic = 's', format = 'json');
        CREATE VIEW chance AS SELECT id, random() AS x FROM s;
        CREATE VIEW fine AS SELECT id, count(*) AS n FROM s GROUP BY id;";
    fs::write(folder.path().join("p.sql"), sql).unwrap();
    let (code, out, progress) = millstream(folder.path(), &["p.sql", "--random", "3", "--seed", "8"]);
    assert_eq!(code, Some(1), "{progress}");
    assert!(progress.contains("FAILED  p.sql: 3 random cases, "), "{progress}");
    assert!(out.contains("  view chance: 1 row missing (-), 1 row not expected (+)\n"), "{out}");
    assert!(!out.contains("view fine"), "{out}");
    // One record is enough.
    let first = out.split("\n\n").next().unwrap();
    assert!(first.contains("others left out:\n    1  {\"id\":") && !first.contains("\n    2  "), "{out}");
    let again = first.lines().last().unwrap().strip_prefix("  again: millstream test ").unwrap();
    let (code, out, progress) = millstream(folder.path(), &again.split(' ').collect::<Vec<_>>());
    assert_eq!(code, Some(1), "{progress}");
    assert!(out.contains("  view chance: "), "{out}");
}

#[test]
fn a_source_without_a_clock_that_can_be_guessed_asks_for_values() {
    let folder = tempfile::tempdir().unwrap();
    let sql = "CREATE SOURCE s (id BIGINT NOT NULL, at VARCHAR,
                time TIMESTAMP AS (to_timestamp_seconds(CAST(substr(at, 3) AS BIGINT))), WATERMARK FOR time AS time)
            WITH (connector = 'kafka', bootstrap_servers = 'x:1', topic = 's', format = 'json');
        CREATE VIEW v AS SELECT id, time, count(*) OVER (PARTITION BY id ORDER BY time) AS n FROM s;";
    fs::write(folder.path().join("p.sql"), sql).unwrap();
    let (code, _, said) = millstream(folder.path(), &["p.sql", "--random", "3"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("source s: no random value of at makes an event time"), "{said}");
    let fixture =
        "random: {s: {at: [s=1, s=2, s=5, s=x]}}\ncases:\n- {name: none, input: {s: []}, expect: {v: []}}\n";
    fs::write(folder.path().join("p.test.yaml"), fixture).unwrap();
    let (code, out, said) = millstream(folder.path(), &["p.sql", "--random", "20"]);
    assert_eq!((code, out.as_str()), (Some(0), ""), "{said}");
}
