//! `examples/queries/`: what people ask of a backup has DuckDB's answers.

use std::fs;
use std::process::Command;

use crate::case::duck_agrees;
use crate::dev::alone;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const QUERIES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/queries.py");

/// Python with DuckDB and Delta, or `None` after saying what is skipped.
pub fn python(test: &str) -> Option<String> {
    let found = std::env::var("MILLSTREAM_TEST_PYTHON").ok();
    let required = std::env::var("MILLSTREAM_REQUIRE_SERVICES").is_ok_and(|value| value == "1");
    assert!(found.is_some() || !required, "{test} needs MILLSTREAM_TEST_PYTHON");
    if found.is_none() {
        println!("skipped {test}: set MILLSTREAM_TEST_PYTHON");
    }
    found
}

#[test]
fn queries_of_examples_are_what_duckdb_says() {
    let Some(python) = python("queries_of_examples_are_what_duckdb_says") else { return };
    let lake = tempfile::tempdir().unwrap();
    let made = Command::new(&python).arg(QUERIES).arg("make").arg(lake.path()).status().unwrap();
    assert!(made.success());
    let mut ran = 0;
    for file in fs::read_dir(format!("{ROOT}/examples/queries")).unwrap() {
        let file = file.unwrap().path();
        if file.extension().is_none_or(|ending| ending != "sql") {
            continue;
        }
        let sql = fs::read_to_string(&file).unwrap();
        let mut command = alone(env!("CARGO_BIN_EXE_millstream"), lake.path());
        command.arg("query").arg(format!("{ROOT}/sql/transactions.sql")).env("LAKE", lake.path());
        let out = command.args(["--format", "ndjson", "-c", &sql]).output().unwrap();
        assert!(out.status.success(), "{}: {}", file.display(), String::from_utf8_lossy(&out.stderr));
        let answer = lake.path().join("answer.ndjson");
        fs::write(&answer, &out.stdout).unwrap();
        let mut duck = Command::new(&python);
        duck_agrees(duck.arg(QUERIES).arg("compare").arg(lake.path()).arg(&file).arg(&answer), 1);
        ran += 1;
    }
    assert_eq!(ran, 11);
}
