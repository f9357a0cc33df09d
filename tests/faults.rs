//! What keeps the outside world from answering at start, and what to do with records that are no rows.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::case::{Case, services};

/// `run` with an address that nobody listens on: one line, exit code 3, soon.
fn fails_at_start(sql: &str, state: Option<&str>, address: &str) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("p.sql"), sql).unwrap();
    let state = state.unwrap_or("./state");
    let begun = Instant::now();
    let out = Command::new(env!("CARGO_BIN_EXE_millstream"))
        .current_dir(folder.path())
        .args(["run", "--until-end", "--state", state, "p.sql"])
        .env("KAFKA_BROKERS", "127.0.0.1:9")
        .env("LAKE", folder.path())
        .env("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        .env("AWS_ACCESS_KEY_ID", "nobody")
        .env("AWS_SECRET_ACCESS_KEY", "nothing")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{said}");
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error:")).collect();
    assert!(errors.len() == 1 && errors[0].contains(address), "{said}");
    assert!(said.contains("hint:"), "{said}");
    assert!(begun.elapsed() < Duration::from_secs(60), "{said}");
}

const TICKS: &str =
    "CREATE SOURCE ticks (seq BIGINT, event_time TIMESTAMP, WATERMARK FOR event_time AS event_time)
    WITH (connector = 'generator', rows_per_second = 1000, total = 100);";

#[test]
fn a_missing_broker_is_one_line_and_exit_3() {
    let sql = Path::new(env!("CARGO_MANIFEST_DIR")).join("sql/transactions.sql");
    fails_at_start(&std::fs::read_to_string(sql).unwrap(), None, "127.0.0.1:9");
}

#[test]
fn a_missing_redis_is_one_line_and_exit_3() {
    let sink =
        "CREATE SINK s FROM ticks WITH (connector = 'redis', url = 'redis://127.0.0.1:9', key = 'seq');";
    fails_at_start(&format!("{TICKS} {sink}"), None, "127.0.0.1:9");
}

#[test]
fn a_missing_s3_is_one_line_and_exit_3() {
    let sink = "CREATE SINK s FROM ticks WITH (connector = 'delta', location = 's3://nowhere/s');";
    fails_at_start(&format!("{TICKS} {sink}"), None, "s3://nowhere/s");
    let sink = "CREATE SINK s FROM ticks WITH (connector = 'blackhole');";
    fails_at_start(&format!("{TICKS} {sink}"), Some("s3://nowhere/state"), "s3://nowhere/state");
}

/// A pipeline with `on_error` set, over a topic with two bad records.
async fn with_bad_records(name: &str, on_error: &str) -> Option<Case> {
    let mut case = Case::new(services(name)?, name, None).await;
    let sql = std::fs::read_to_string(case.path("transactions.sql")).unwrap();
    let changed =
        sql.replace("format            = 'json'", &format!("format = 'json', on_error = '{on_error}'"));
    assert_ne!(sql, changed);
    std::fs::write(case.path("transactions.sql"), changed).unwrap();
    case.produce(1_000).await;
    case.send_raw(&[Some("not json"), Some(r#"{"user_id": 1}"#)]).await;
    case.produce(1_000).await;
    Some(case)
}

#[tokio::test(flavor = "multi_thread")]
async fn on_error_skip_counts_and_goes_on() {
    let Some(case) = with_bad_records("on_error_skip_counts_and_goes_on", "skip").await else { return };
    let log = case.finish("2");
    assert!(!log.contains("dead letters 2"), "{log}");
    case.verify();
}

#[tokio::test(flavor = "multi_thread")]
async fn on_error_fail_stops_with_the_place() {
    let Some(case) = with_bad_records("on_error_fail_stops_with_the_place", "fail").await else { return };
    let out = case.run(&["--until-end", "--close"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{said}");
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error:")).collect();
    assert!(errors.len() == 1 && said.contains("partition 0") && said.contains("offset"), "{said}");
}
