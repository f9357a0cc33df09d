//! `sql/transactions.sql` against a real broker, Redis and S3, compared with DuckDB (`tests/oracle.py`).
//!
//! Without services these tests say so in one line; with `MILLSTREAM_REQUIRE_SERVICES=1` that is a failure.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::case::{Case, Dice, rows, services};

#[tokio::test(flavor = "multi_thread")]
async fn tables_and_redis_are_what_duckdb_says() {
    let Some(services) = services("tables_and_redis_are_what_duckdb_says") else { return };
    let mut case = Case::new(services, "plain", None).await;
    case.produce(rows()).await;
    let log = case.finish("2");
    assert!(log.contains("closed: every row is final"), "{log}");
    case.verify();
    assert_eq!(case.query(&difference()).lines().count(), 1, "not what DataFusion makes of the backup");
    assert_eq!(case.committed(), case.produced as i64, "group offsets, for lag tools");
    let again = case.run(&["--until-end", "--close"]);
    assert!(again.status.success());
    assert!(String::from_utf8_lossy(&again.stderr).contains("was closed before"));
}

/// The training table against the view over the backup, to the bit: rows that are more often in one.
fn difference() -> String {
    let row = "user_id, event_time, total_transactions_count, amount_7d, hour_of_day, day_of_week";
    format!(
        "SELECT {row}, sum(w) AS more FROM (
             SELECT {row}, 1 AS w FROM user_transaction_features
             UNION ALL SELECT {row}, -1 AS w FROM user_features_training)
         GROUP BY {row} HAVING sum(w) <> 0"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn parallelism_changes_no_table() {
    let Some(services) = services("parallelism_changes_no_table") else { return };
    let mut case = Case::new(services, "shards", None).await;
    case.produce(rows() / 10).await;
    let mut found = Vec::new();
    for parallelism in ["1", "2", "3"] {
        (case.name, case.lake) =
            (format!("{}-{parallelism}", case.topic), format!("{}-{parallelism}", case.lake));
        case.state = format!("{}-{parallelism}", case.state);
        case.finish(parallelism);
        let training = "SELECT user_id, event_time, total_transactions_count, round(amount_7d, 4), hour_of_day, \
                        day_of_week FROM user_features_training ORDER BY 1, 2, 3, 4";
        let backup = "SELECT * FROM transactions_backup ORDER BY _partition, _offset";
        found.push((case.query(training), case.query(backup)));
    }
    assert!(found[0].0.lines().count() as u64 == rows() / 10 + 1);
    assert!(found[0] == found[1] && found[0] == found[2], "tables differ by parallelism");
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_kills_and_three_parallelisms_change_nothing() {
    let Some(services) = services("ten_kills_and_three_parallelisms_change_nothing") else { return };
    let mut case = Case::new(services, "kill", None).await;
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut dice = Dice(seed);
    for round in 0..10 {
        case.produce(rows() / 10).await;
        let parallelism = ["1", "2", "3"][round % 3];
        let mut process = case.start(&["--parallelism", parallelism, "--checkpoint", "100ms"]);
        tokio::time::sleep(Duration::from_millis(300 + dice.roll(1_500))).await;
        process.kill().unwrap();
        process.wait().unwrap();
    }
    case.finish("2");
    case.verify();
}

#[tokio::test(flavor = "multi_thread")]
async fn scan_startup_begins_at_a_time_or_at_offsets() {
    let Some(services) = services("scan_startup_begins_at_a_time_or_at_offsets") else { return };
    let mut case = Case::new(services, "startup", None).await;
    case.produce(500).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let millis = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as i64;
    let time = chrono::DateTime::from_timestamp_millis(millis).unwrap().to_rfc3339();
    case.produce(300).await;
    let sql = fs::read_to_string(case.path("transactions.sql")).unwrap();
    let (lake, state) = (case.lake.clone(), case.state.clone());
    for (at, (startup, rows)) in
        [(time.as_str(), 300), ("0:7, 3:2", 791), ("latest", 0)].into_iter().enumerate()
    {
        let option = format!("format = 'json', scan_startup = '{startup}'");
        fs::write(case.path("transactions.sql"), sql.replace("format            = 'json'", &option)).unwrap();
        (case.name, case.lake) = (format!("{}-{at}", case.topic), format!("{lake}-{at}"));
        case.state = format!("{state}-{at}");
        let log = case.finish("2");
        assert!(log.contains(&format!("skipped={}", 800 - rows)), "{startup}: {log}");
        assert_eq!(
            case.query("SELECT count(*) AS n FROM transactions_backup"),
            format!("n\n{rows}\n"),
            "{startup}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_stop_and_another_parallelism_go_on() {
    let Some(services) = services("a_clean_stop_and_another_parallelism_go_on") else { return };
    let mut case = Case::new(services, "stop", None).await;
    for parallelism in ["1", "2"] {
        case.produce(rows() / 10).await;
        let out = case.run(&["--until-end", "--parallelism", parallelism]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    case.finish("1");
    case.verify();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_older_of_two_processes_stops_with_an_error() {
    let Some(services) = services("the_older_of_two_processes_stops_with_an_error") else { return };
    let mut case = Case::new(services, "fence", None).await;
    case.produce(2_000).await;
    let older = case.command(&case.run_arguments(&["--checkpoint", "200ms"])).spawn().unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut newer = case.start(&["--checkpoint", "200ms"]);
    let out = tokio::task::spawn_blocking(move || older.wait_with_output().unwrap());
    let out =
        tokio::time::timeout(Duration::from_secs(30), out).await.expect("the older one goes on").unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{said}");
    assert!(said.contains("error:") && said.contains("newer") || said.contains("generation"), "{said}");
    case.produce(2_000).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    newer.kill().unwrap();
    newer.wait().unwrap();
    for table in ["transactions_backup", "user_features"] {
        let generations = generations(&Path::new(&case.lake).join(table));
        assert!(generations.first() < generations.last(), "{generations:?}");
        assert!(generations.is_sorted(), "the older process committed after the newer one: {generations:?}");
    }
    case.finish("2");
    case.verify();
}

/// The generation of each commit of a Delta table, in the order of the log.
fn generations(table: &Path) -> Vec<u64> {
    let mut files: Vec<_> =
        fs::read_dir(table.join("_delta_log")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    let actions = files.iter().flat_map(|path| {
        let text = fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()).collect::<Vec<_>>()
    });
    let generation = |action: serde_json::Value| {
        let transaction = action.get("txn")?;
        let ours = transaction["appId"].as_str()?.ends_with("/generation");
        ours.then(|| transaction["version"].as_u64()).flatten()
    };
    actions.filter_map(generation).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_records_are_kept_and_change_nothing() {
    let Some(services) = services("bad_records_are_kept_and_change_nothing") else { return };
    let mut case = Case::new(services, "bad", None).await;
    case.produce(1_000).await;
    case.send_raw(&[
        Some("not json"),
        Some(r#"{"user_id": 1}"#),
        Some(r#"{"user_id": "x", "transaction_timestamp_millis": 1}"#),
        Some(r#"{"user_id": 1.5, "transaction_timestamp_millis": 1}"#),
        Some(r#"{"user_id": 1, "transaction_timestamp_millis": 4070908800000}"#),
        None,
    ])
    .await;
    case.produce(1_000).await;
    let log = case.finish("2");
    assert!(log.contains("dead letters 5"), "{log}");
    case.verify();
}

#[tokio::test(flavor = "multi_thread")]
async fn lake_and_state_on_s3() {
    let Some(services) = services("lake_and_state_on_s3") else { return };
    let bucket = std::env::var("MILLSTREAM_TEST_S3_BUCKET").unwrap_or_else(|_| "millstream-test".to_owned());
    if services.s3.is_none() {
        assert!(std::env::var("MILLSTREAM_REQUIRE_SERVICES").is_err(), "an S3 server is needed");
        println!("skipped lake_and_state_on_s3: no S3 server");
        return;
    }
    let mut case = Case::new(services, "s3", Some(format!("s3://{bucket}"))).await;
    case.produce(10_000).await;
    case.finish("2");
    case.verify();
}

/// A fresh folder, no service: `dev` fills both tables and the online values, twice in a row.
#[test]
fn dev_fills_tables_without_any_service() {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("sql");
    fs::create_dir(folder.path().join("sql")).unwrap();
    for name in ["transactions.sql", "transactions_producer.sql"] {
        fs::copy(source.join(name), folder.path().join("sql").join(name)).unwrap();
    }
    let command = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
        command
            .args(arguments)
            .current_dir(folder.path())
            .env("REDIS_URL", "redis://127.0.0.1:9")
            .env_remove("LAKE");
        command
    };
    let count = |table: &str| -> u64 {
        let sql = format!("SELECT count(*) AS n FROM {table}");
        let state = "./.millstream/transactions-dev";
        let arguments = ["query", "sql/transactions.sql", "--state", state, "--format", "csv", "-c", &sql];
        let out = command(&arguments).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).lines().nth(1).unwrap().parse().unwrap()
    };
    let mut before = 0;
    for _ in 0..2 {
        let mut dev = command(&["dev", "sql/transactions.sql"]);
        let process = dev.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_secs(9));
        Command::new("kill").args(["-INT", &process.id().to_string()]).status().unwrap();
        let out = process.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}");
        for word in ["rows/s", "lag", "newest {", "Try next:"] {
            assert!(said.contains(word), "{word} is not in:\n{said}");
        }
        let (backup, training, serving) =
            (count("transactions_backup"), count("user_features_training"), count("user_features_serving"));
        assert!(
            backup > before && training > 0 && training <= backup && serving > 0,
            "{backup} {training} {serving}"
        );
        before = backup;
    }
}
