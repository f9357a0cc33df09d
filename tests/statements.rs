//! SHOW, DESCRIBE, EXPLAIN, `SELECT *`, the console sink, and what `check` refuses, through the binary.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn millstream(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
    command.current_dir(folder).args(arguments);
    ["KAFKA_BROKERS", "REDIS_URL", "LAKE"].iter().for_each(|name| {
        command.env_remove(name);
    });
    command.output().unwrap()
}

/// The CSV answer of a query over the shipped pipeline.
fn asked(sql: &str) -> String {
    let out = millstream(root(), &["query", "sql/transactions.sql", "--format", "csv", "-c", sql]);
    assert!(out.status.success(), "{sql}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn show_names_what_is_declared() {
    assert_eq!(
        asked("SHOW SOURCES"),
        "name,connector,declared_at\ntransactions,kafka,sql/transactions.sql:4\n"
    );
    assert!(asked("SHOW VIEWS").contains("user_transaction_features,sql/transactions.sql:"));
    let sinks = asked("SHOW SINKS");
    assert!(
        sinks.contains("user_features_serving,redis,user_transaction_features,sql/transactions.sql:"),
        "{sinks}"
    );
    assert_eq!(sinks.lines().count(), 4);
    assert_eq!(asked("SHOW TABLES").lines().count(), 1);
    assert_eq!(asked("SHOW SCHEDULES").lines().count(), 1);
}

#[test]
fn describe_gives_columns() {
    let source = asked("DESCRIBE transactions");
    assert!(
        source.starts_with("column_name,data_type,nullable,kind\nuser_id,BIGINT,false,declared\n"),
        "{source}"
    );
    assert!(
        source.contains("event_time,TIMESTAMP,true,computed\n_topic,VARCHAR,false,metadata\n"),
        "{source}"
    );
    let view = asked("DESCRIBE user_transaction_features");
    assert!(view.contains("total_transactions_count,BIGINT,false\namount_7d,DOUBLE,true\n"), "{view}");
    assert_eq!(asked("DESC user_features_training"), view);
    let out = millstream(root(), &["query", "sql/transactions.sql", "-c", "DESCRIBE transaction"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(2) && said.contains("Did you mean transactions?"), "{said}");
}

#[test]
fn explain_pipeline_is_the_plan() {
    let explained = millstream(root(), &["explain", "sql/transactions.sql"]);
    assert!(explained.status.success());
    let text = String::from_utf8(explained.stdout).unwrap();
    assert_eq!(text, fs::read_to_string(root().join("tests/goldens/explain/transactions.txt")).unwrap());
    let rows = asked("EXPLAIN PIPELINE");
    assert!(rows.starts_with("plan\n") && rows.lines().count() == text.lines().count() + 1, "{rows}");
    assert!(asked("EXPLAIN SELECT 1 + 1").contains("logical_plan"));
}

fn ticks(folder: &Path, rest: &str) -> Output {
    let source = "CREATE SOURCE ticks (seq BIGINT, event_time TIMESTAMP, WATERMARK FOR event_time AS event_time)
                  WITH (connector = 'generator', rows_per_second = 1000, total = 3, start = '2026-01-02 23:59:59');";
    fs::write(folder.join("p.sql"), format!("{source} {rest}")).unwrap();
    millstream(folder, &["run", "p.sql", "--until-end", "--close", "--parallelism", "2"])
}

#[test]
fn the_console_sink_prints_rows_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let out =
        ticks(folder.path(), "CREATE SINK c AS SELECT seq * 2 AS n FROM ticks WITH (connector = 'console');");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(String::from_utf8(out.stdout).unwrap(), "{\"n\":0}\n{\"n\":2}\n{\"n\":4}\n");
}

/// `day(event_time)` adds a column that is there by name only.
#[test]
fn select_star_leaves_partition_columns_out() {
    let folder = tempfile::tempdir().unwrap();
    let sink = "CREATE SINK t AS SELECT * FROM ticks
                WITH (connector = 'delta', location = './t', partition_by = 'day(event_time)');";
    let out = ticks(folder.path(), sink);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let ask = |sql: &str| {
        let out = millstream(folder.path(), &["query", "p.sql", "--format", "csv", "-c", sql]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let rows = ask("SELECT * FROM t ORDER BY seq LIMIT 1");
    assert_eq!(rows, "seq,event_time\n0,2026-01-02T23:59:59Z\n");
    assert_eq!(ask("SELECT DISTINCT event_time_day FROM t"), "event_time_day\n2026-01-02\n");
}

/// Metadata columns are not in `SELECT *`, usable by name, and stored by a backup.
#[test]
fn select_star_leaves_metadata_out() {
    let folder = tempfile::tempdir().unwrap();
    let sql = "CREATE SOURCE s (a BIGINT, t TIMESTAMP, WATERMARK FOR t AS t)
               WITH (connector = 'kafka', topic = 's', format = 'json', bootstrap_servers = 'x:1');
               CREATE VIEW v AS SELECT * FROM s;
               CREATE VIEW w AS SELECT x.*, _offset FROM s AS x;
               CREATE SINK backup FROM s WITH (connector = 'delta', location = './b');
               CREATE SINK c FROM w WITH (connector = 'blackhole');";
    fs::write(folder.path().join("p.sql"), sql).unwrap();
    let columns = |name: &str| {
        let sql = format!("DESCRIBE {name}");
        let out = millstream(folder.path(), &["query", "p.sql", "--format", "csv", "-c", &sql]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let text = String::from_utf8(out.stdout).unwrap();
        text.lines()
            .skip(1)
            .map(|line| line.split(',').next().unwrap().to_owned())
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(columns("v"), "a t");
    assert_eq!(columns("w"), "a t _offset");
    assert_eq!(columns("backup"), "a t _topic _partition _offset _timestamp _key");
}

/// Every file of tests/goldens/check is refused with the words beside it; `MILLSTREAM_BLESS=1` writes them anew.
#[test]
fn refusals_are_word_for_word() {
    let folder = root().join("tests/goldens/check");
    let mut files: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "sql"));
    files.sort();
    assert!(files.len() >= 25, "{} goldens", files.len());
    let bless = std::env::var("MILLSTREAM_BLESS").is_ok();
    let mut wrong = Vec::new();
    for file in &files {
        let name = file.file_name().unwrap().to_str().unwrap();
        let out = millstream(&folder, &["check", name]);
        let said = String::from_utf8(out.stderr).unwrap();
        let golden = file.with_extension("stderr");
        if bless {
            fs::write(&golden, &said).unwrap();
        }
        let expected = fs::read_to_string(&golden).unwrap_or_default();
        if out.status.code() != Some(2) || said != expected {
            wrong.push(format!("{name}: exit {:?}\n{said}\ninstead of\n{expected}", out.status.code()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
