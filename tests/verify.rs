//! `millstream verify`: silent about a healthy pipeline; what was planted is found and named.

use std::process::Command;

use serde_json::Value;

use crate::backfill::{DAY, DAYS, FIRST, Lake};
use crate::case::{Case, services};

/// A view of which some rows fail, one with windows, an upserted table, a changelog of floats that are not exact, files.
const SINKS: &str = r#"
CREATE SINK checked AS SELECT user_id, event_time, ensure(amount, amount < 9000, 'too much') AS amount FROM transactions
WITH (connector = 'delta', location = '${LAKE}/checked');
CREATE SINK by_window AS SELECT window_start, count(*) AS n, sum(amount) AS amount
FROM TUMBLE(transactions, event_time, INTERVAL '10 seconds') GROUP BY window_start
WITH (connector = 'delta', location = '${LAKE}/by_window');
CREATE SINK totals AS SELECT user_id, count(*) AS n, sum(amount) AS amount FROM transactions GROUP BY user_id
WITH (connector = 'delta', location = '${LAKE}/totals', mode = 'upsert', key = 'user_id');
CREATE SINK spread AS SELECT user_id, stddev(amount) AS spread FROM transactions GROUP BY user_id
WITH (connector = 'delta', location = '${LAKE}/spread', mode = 'changelog');
CREATE SINK staged AS SELECT user_id, amount FROM transactions WITH (connector = 'ndjson', location = '${LAKE}/staged');
"#;

impl Case {
    fn verify_sink(&self, sink: &str, more: &[&str]) -> (i32, Value) {
        let mut command = self.command(&["verify", sink]);
        command.args(["--state", &self.state, "--name", &self.name, "--format", "json"]).args(more);
        let out = command.output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        let report =
            serde_json::from_slice(&out.stdout).unwrap_or_else(|error| panic!("{sink}: {error}: {said}"));
        (out.status.code().unwrap(), report)
    }

    fn python(&self, script: &str, arguments: &[&str]) {
        let mut python = Command::new(&self.services.python);
        let out = python.arg("-c").arg(script).args(arguments).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
}

/// One value changed, one row gone, one row more; prints nothing.
const PLANT: &str = r#"
import sys, deltalake
path, column = sys.argv[1:]
table = deltalake.DeltaTable(path)
names = [f'"{field.name}"' for field in table.schema().fields]
changed = [f'CASE WHEN __n = 2 THEN 123456 ELSE {name} END AS {name}' if name == f'"{column}"' else name for name in names]
numbered = f"SELECT *, row_number() OVER (ORDER BY {', '.join(names)}) AS __n FROM t"
sql = f"""SELECT {', '.join(changed)} FROM ({numbered}) WHERE __n <> 1
    UNION ALL SELECT {', '.join(names)} FROM ({numbered}) WHERE __n = 3"""
rows = deltalake.QueryBuilder().register("t", table).execute(sql).read_all()
deltalake.write_deltalake(path, rows, mode="overwrite")
"#;

#[tokio::test(flavor = "multi_thread")]
async fn differences_are_found_and_nothing_else() {
    let Some(services) = services("differences_are_found_and_nothing_else") else { return };
    let mut case = Case::new(services, "verify", None).await;
    fill(&mut case).await;
    nothing_is_found(&case);
    options_narrow_it(&case);
    what_is_planted_is_found(&case);
    a_stale_value_is_found(&case);
}

/// A healthy pipeline with late rows, bad records and kills.
async fn fill(case: &mut Case) {
    let sql = std::fs::read_to_string(case.path("transactions.sql")).unwrap();
    std::fs::write(case.path("transactions.sql"), sql + SINKS).unwrap();
    case.produce(20_000).await;
    let run = case.run(&["--until-end", "--checkpoint", "200ms", "--parallelism", "2"]);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    // Late: their partition is four minutes on; and bad ones.
    let millis = case.start + 1;
    let late: Vec<String> = (0..20)
        .map(|n| format!(r#"{{"user_id":{n},"transaction_timestamp_millis":{millis},"amount":{n}}}"#))
        .collect();
    let mut payloads: Vec<Option<&str>> = late.iter().map(|text| Some(text.as_str())).collect();
    payloads.extend([Some("no json"), None, Some("{}")]);
    case.send_raw(&payloads).await;
    // Killed in the middle.
    for _ in 0..3 {
        case.produce(2_000).await;
        let mut process = case.start(&["--parallelism", "2", "--checkpoint", "100ms"]);
        tokio::time::sleep(std::time::Duration::from_millis(900)).await;
        process.kill().unwrap();
        process.wait().unwrap();
    }
    case.produce(5_000).await;
    let run = case.run(&["--until-end", "--checkpoint", "200ms", "--parallelism", "2"]);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
}

fn nothing_is_found(case: &Case) {
    for sink in [
        "user_features_training",
        "checked",
        "by_window",
        "totals",
        "spread",
        "transactions_backup",
        "user_features_serving",
    ] {
        let (code, reports) = case.verify_sink(sink, &[]);
        assert_eq!((code, &reports[0]["same"]), (0, &Value::Bool(true)), "{sink}: {reports:#}");
        let rows = reports[0]["compared"]["equal"].as_i64().or(reports[0]["backup"]["rows"].as_i64());
        let least = if sink == "by_window" { 1 } else { 1_000 };
        assert!(rows >= Some(least), "{sink}: {reports:#}");
        match sink {
            "user_features_training" | "by_window" => {
                assert!(reports[0]["late"].as_i64() >= Some(20), "{sink}: {reports:#}");
                assert!(reports[0]["late_would_change"].as_i64() > Some(0), "{sink}: {reports:#}");
            }
            "spread" => assert!(reports[0]["unproven"].to_string().contains("stddev"), "{reports:#}"),
            "checked" => assert!(reports[0]["dead_letters"].as_i64() > Some(100), "{reports:#}"),
            _ => {}
        }
    }
}

fn options_narrow_it(case: &Case) {
    let (code, all) = case.verify_sink("user_features_training", &["--online", "--memory", "64MB"]);
    assert_eq!(all.as_array().unwrap().len(), 2, "with the store of the same view: {all:#}");
    let (some_code, some) = case.verify_sink("user_features_training", &["--sample", "10%"]);
    let (all, some) = (&all[0]["compared"]["equal"], &some[0]["compared"]["equal"]);
    assert!(some.as_i64() > Some(0) && some.as_i64() < all.as_i64(), "{some} of {all}");
    assert_eq!((code, some_code), (0, 0));
    let out =
        case.command(&["verify", "staged", "--state", &case.state, "--name", &case.name]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(2) && said.contains("do not say which records they cover"), "{said}");
}

/// Rows that are changed, missing and extra.
fn counts(reports: &Value) -> [i64; 3] {
    let found = &reports[0]["compared"];
    ["changed", "missing", "extra"].map(|kind| found[kind].as_i64().unwrap())
}

fn what_is_planted_is_found(case: &Case) {
    for (sink, folder, column) in [
        ("user_features_training", "user_features", "total_transactions_count"),
        ("checked", "checked", "amount"),
        ("totals", "totals", "n"),
    ] {
        case.python(PLANT, &[&format!("{}/{folder}", case.lake), column]);
        let (code, reports) = case.verify_sink(sink, &[]);
        assert_eq!((code, counts(&reports)), (1, [1, 1, 1]), "{sink}: {reports:#}");
        let first = reports[0]["compared"]["first"].as_array().unwrap();
        let kinds: Vec<&str> = first.iter().map(|row| row["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["changed", "missing", "extra"]);
        assert_eq!(first[0]["differs"][0][0], column, "{reports:#}");
        assert!(first[0]["differs"][0][1].as_str().unwrap().starts_with("123456"), "{reports:#}");
    }

    case.python(PLANT, &[&format!("{}/spread", case.lake), "spread"]);
    let (code, reports) = case.verify_sink("spread", &[]);
    assert!(code == 1 && counts(&reports).iter().sum::<i64>() >= 2, "{reports:#}");

    // People read it too.
    let arguments = ["verify", "checked", "--state", &case.state, "--name", &case.name];
    let out = case.command(&arguments).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert_eq!(out.status.code(), Some(1), "{text}");
    for part in [
        "checked (delta): DIFFERENT",
        "1 changed, 1 missing, 1 extra",
        "amount: table 123456",
        "\n  missing: ",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    println!("{text}");
}

fn a_stale_value_is_found(case: &Case) {
    let client = redis::Client::open(case.services.redis.as_str()).unwrap();
    let mut connection = client.get_connection().unwrap();
    let keys: Vec<String> =
        redis::cmd("KEYS").arg(format!("{}:*", case.topic)).query(&mut connection).unwrap();
    let key = keys.iter().find(|key| !key.contains('{')).unwrap();
    redis::cmd("HSET").arg(key).arg("total_transactions_count").arg(987_654).exec(&mut connection).unwrap();
    let (code, reports) = case.verify_sink("user_features_serving", &[]);
    assert_eq!((code, counts(&reports)), (1, [1, 0, 0]), "{reports:#}");
    let stale = &reports[0]["compared"]["first"][0]["differs"][0];
    assert_eq!((&stale[0], &stale[1]), (&"total_transactions_count".into(), &"987654".into()));
}

/// Three intervals, in a table of days.
const INTERVALS: [&str; 6] = ["--from", "2026-01-02", "--to", "2026-01-04T18:00:00Z", "--step", "22 hours"];
const BACKFILLED: [&str; 4] = ["hours_table", "total_table", "groups_table", "plain_table"];

/// A sink is the same; gives its report.
fn silent(lake: &Lake, sink: &str, backfilled: i64) -> Value {
    let (code, reports) = lake.case.verify_sink(sink, &[]);
    let report = reports[0].clone();
    assert_eq!((code, &report["same"]), (0, &Value::Bool(true)), "{sink}: {report:#}");
    assert_eq!(report["backfilled"], backfilled, "{sink}: {report:#}");
    report
}

/// Late rows count where a backfill was, and only there; records that a replay appended too.
#[tokio::test(flavor = "multi_thread")]
async fn backfilled_intervals_have_their_late_rows() {
    let Some(mut lake) = Lake::new("verify_backfilled").await else { return };
    let hour = |hour: u64| FIRST + hour * DAY / 24;
    let bad: String =
        (30..110).map(|at| format!("{{\"t\":{},\"v\":60}}\n", hour(at))).collect::<Vec<_>>().concat();
    std::fs::write(lake.case.path("input/0000-bad.ndjson"), bad).unwrap();
    lake.stream();
    replay(&lake);
    let sum = |sink: &str| lake.case.query(&format!("SELECT count(*), sum({}) FROM {sink}", column_of(sink)));
    for sink in BACKFILLED {
        silent(&lake, sink, 0);
        let before = sum(sink);
        assert_eq!(lake.backfill(sink, &INTERVALS).count("written"), 3);
        assert_ne!(before, sum(sink), "{sink}: late rows or replayed ones change it");
        let report = silent(&lake, sink, 3);
        assert_eq!(report["unproven"], Value::Array(Vec::new()), "{sink}: {report:#}");
        let others = report["late_would_change"].as_i64();
        assert_eq!(others > Some(0), sink != "plain_table", "{sink}: outside: {report:#}");
    }

    // The backup gets rows that the last interval would have, if it was backfilled now.
    lake.input(DAYS * 24, DAYS * 24 + 12, 600);
    let late: Vec<String> = (70..80).map(|at| format!("{{\"k\":1,\"t\":{},\"v\":77}}\n", hour(at))).collect();
    std::fs::write(lake.case.path("input/0001-late.ndjson"), late.concat()).unwrap();
    lake.stream();
    for sink in BACKFILLED {
        let planned = lake.backfill(sink, &[&INTERVALS[..], &["--dry-run"]].concat());
        assert!(planned.count("planned") >= 1 && planned.count("unchanged") >= 1, "{sink}");
        let report = silent(&lake, sink, 3);
        assert_eq!(report["unproven"], Value::Array(Vec::new()), "{sink}: {report:#}");
    }
    planted_in_both_kinds(&lake);

    // Old versions of the backup are gone: what they said cannot be proven.
    let vacuum = "table.optimize.compact()\ntable.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)";
    lake.spoil("backup", vacuum);
    let report = silent(&lake, "groups_table", 3);
    let unproven = report["unproven"].as_array().unwrap();
    assert!(unproven.iter().any(|what| what.as_str().unwrap().ends_with("is gone")), "{report:#}");
    assert!(report["compared"]["equal"].as_i64() > Some(100), "{report:#}");
}

fn column_of(sink: &str) -> &str {
    match sink {
        "hours_table" | "groups_table" => "n",
        "total_table" => "v_all",
        _ => "v2",
    }
}

/// By SQL that knows records without `k`.
fn replay(lake: &Lake) {
    let path = lake.case.path("transactions.sql");
    let sql = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, sql.replace("k BIGINT NOT NULL, t", "k BIGINT, t")).unwrap();
    let mut command = lake.case.command(&["dead-letters", "replay", "--kind", "missing_field"]);
    let out = command.args(["--state", &lake.case.state, "--name", &lake.case.name]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && said.contains("80 appended"), "{said}");
    std::fs::write(&path, sql).unwrap();
}

/// Rows changed and rows taken, where a backfill was and where none was.
fn planted_in_both_kinds(lake: &Lake) {
    let during = |day: &str, hour: u32| {
        format!("ts >= '{day}T{hour:02}:00:00Z' AND ts < '{day}T{:02}:00:00Z'", hour + 1)
    };
    for (sink, folder) in [("hours_table", "hours"), ("plain_table", "plain")] {
        let column = column_of(sink);
        for day in ["2026-01-02", "2026-01-05"] {
            let (changed, taken) = (during(day, 12), during(day, 15));
            let count = |which: &str| -> i64 {
                let answer = lake.case.query(&format!("SELECT count(*) AS n FROM {sink} WHERE {which}"));
                answer.lines().nth(1).unwrap().parse().unwrap()
            };
            let expected = [count(&changed), count(&taken), 0];
            assert!(expected[0] > 0 && expected[1] > 0, "{sink}: {expected:?}");
            let [from, to] = ["T12:00:00Z", "T16:00:00Z"].map(|time| format!("{day}{time}"));
            let part = ["--from", &from, "--to", &to];
            assert_eq!(lake.case.verify_sink(sink, &part).0, 0, "{sink}, {day}");
            let set = format!(
                "table.update(updates={{\"{column}\": \"{column} + 1000\"}}, predicate=\"{changed}\")"
            );
            lake.spoil(folder, &format!("{set}\ntable.delete(\"{taken}\")"));
            let (code, reports) = lake.case.verify_sink(sink, &part);
            assert_eq!((code, counts(&reports)), (1, expected), "{sink}, {day}: {reports:#}");
        }
    }
}
