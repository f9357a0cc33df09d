//! Point-in-time joins: DuckDB's answers over random labels and features; nothing of the future; refused in streams.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::case::duck_agrees;
use crate::dev::alone;
use crate::queries::python;

const ASOF: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/asof.py");

fn query(folder: &Path, sql: &str) -> Output {
    let mut command = alone(env!("CARGO_BIN_EXE_millstream"), folder);
    command.args(["query", "--format", "ndjson", "-c", sql]).output().unwrap()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

#[test]
fn newest_features_then_are_what_duckdb_says() {
    let Some(python) = python("newest_features_then_are_what_duckdb_says") else { return };
    for seed in ["1", "2", "3"] {
        let folder = tempfile::tempdir().unwrap();
        let made = Command::new(&python).args([ASOF, "make"]).arg(folder.path()).arg(seed).status().unwrap();
        assert!(made.success());
        let at = |name: &str| format!("'{}'", folder.path().join(name).display());
        let (labels, features) = (at("labels.parquet"), at("features.parquet"));
        let join = |kind: &str, more: &str| {
            format!(
                "SELECT l.id, f.n, f.v, f.seen FROM {labels} AS l {kind} {features}
                 FOR SYSTEM_TIME AS OF l.ts AS f ON l.k = f.k AND {more}"
            )
        };
        for (name, sql) in [
            ("inner", join("JOIN", "f.seen <= l.ts")),
            ("left", join("LEFT JOIN", "l.ts >= f.seen")),
            ("known", join("LEFT JOIN", "l.word = f.word AND f.seen <= l.ts AND f.known <= l.ts")),
        ] {
            let out = query(folder.path(), &sql);
            assert!(out.status.success(), "{name}: {}", stderr(&out));
            let answer = folder.path().join("answer.ndjson");
            fs::write(&answer, &out.stdout).unwrap();
            let mut duck = Command::new(&python);
            duck.args([ASOF, "compare"]).arg(folder.path()).arg(name).arg(&answer);
            duck_agrees(&mut duck, 1_000);
        }
    }
}

const SQL: &str = r#"
CREATE SOURCE clicks (user_id BIGINT, at TIMESTAMP, WATERMARK FOR at AS at)
WITH (connector = 'kafka', bootstrap_servers = 'x:1', topic = 'clicks', format = 'json');
CREATE TABLE prices (user_id BIGINT, since TIMESTAMP, price DOUBLE) WITH (connector = 'csv', location = './prices.csv');
CREATE VIEW priced AS SELECT c.user_id, c.at, p.price
FROM clicks AS c JOIN prices FOR SYSTEM_TIME AS OF c.at AS p ON c.user_id = p.user_id;
CREATE SINK s FROM priced WITH (connector = 'console');
"#;

/// What cannot be answered is refused, at its place, with a way out.
#[test]
fn streams_and_odd_conditions_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.sql");
    fs::write(&file, SQL).unwrap();
    fs::write(folder.path().join("prices.csv"), "user_id,since,price\n1,2026-01-01T00:00:00Z,2.5\n").unwrap();
    let out =
        alone(env!("CARGO_BIN_EXE_millstream"), folder.path()).arg("check").arg(&file).output().unwrap();
    let said = stderr(&out);
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert!(said.contains("a JOIN with FOR SYSTEM_TIME AS OF cannot run in a stream"), "{said}");
    assert!(said.contains("millstream query") && said.contains(":6:52"), "{said}");

    let values = "(SELECT 1 AS k, TIMESTAMP '2026-01-02' AS ts, 7 AS n) AS l";
    let features = "f";
    for (join, part) in [
        ("JOIN f FOR SYSTEM_TIME AS OF l.ts ON l.k = f.k OR l.n = f.k", "no OR"),
        ("JOIN f FOR SYSTEM_TIME AS OF l.ts ON f.at <= l.ts", "needs keys"),
        ("JOIN f FOR SYSTEM_TIME AS OF l.ts ON l.k = f.k AND f.at > l.ts", "cannot have the condition"),
        ("JOIN f FOR SYSTEM_TIME AS OF l.ts ON l.k = f.k AND f.v > 3", "cannot have the condition"),
        ("JOIN f FOR SYSTEM_TIME AS OF f.at ON l.k = f.k", "one of the rows before the JOIN"),
        ("JOIN f FOR SYSTEM_TIME AS OF l.n ON l.k = f.k", "cannot be compared with a time"),
        ("RIGHT JOIN f FOR SYSTEM_TIME AS OF l.ts ON l.k = f.k", "has no meaning"),
        ("JOIN f FOR SYSTEM_TIME AS OF l.ts USING (k)", "belongs to a JOIN … ON"),
        (
            "JOIN (SELECT k, at, at AS other FROM f) FOR SYSTEM_TIME AS OF l.ts AS g ON l.k = g.k",
            "which column is the time",
        ),
    ] {
        let sql = format!(
            "WITH {features} AS (SELECT 1 AS k, TIMESTAMP '2026-01-01' AS at, 4 AS v) SELECT * FROM {values} {join}"
        );
        let out = query(folder.path(), &sql);
        let said = stderr(&out);
        assert_eq!(out.status.code(), Some(2), "{join}: {said}");
        assert!(said.contains(part), "{join}: {said}");
    }
}
