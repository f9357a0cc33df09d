//! Tables in a plain DataFusion session, in the Python package, and on S3.

use std::process::Command;

use super::*;
use crate::connectors::delta::table::{AsOf, exists, provider, provider_as_of};

#[tokio::test]
async fn a_plain_session_reads_groups_and_joins() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "c,day(t)");
    let mut committer = created(&config).await;
    let files = prepared(&config, 1, 0..200).await;
    committer.commit(1, &files, &CommitProgress::default()).await.unwrap();
    let session = session(&config).await;
    session.register_batch("o", rows(0..200)).unwrap();
    let kinds: Vec<String> = session
        .table("t")
        .await
        .unwrap()
        .schema()
        .fields()
        .iter()
        .map(|f| format!("{} {}", f.name(), f.data_type()))
        .collect();
    assert_eq!(kinds, ["id Int64", "t Timestamp(µs, \"UTC\")", "c Utf8", "t_day Date32"]);
    for sql in [
        "SELECT id, t, c FROM {} ORDER BY id",
        "SELECT c, count(*) AS n, min(t) AS least FROM {} GROUP BY c ORDER BY c",
        "SELECT count(*) FROM {} x JOIN o USING (c) WHERE x.id % 2 = 0",
        "SELECT id FROM {} WHERE c = 'a/b ü%2F1' AND t > '2024-01-05' ORDER BY id DESC LIMIT 3",
        "SELECT count(*) FROM {} WHERE c IS NULL",
        "SELECT upper(c) AS u, count(*) FROM {} WHERE c LIKE 'a%' GROUP BY u ORDER BY u",
    ] {
        let expected = session.sql(&sql.replace("{}", "o")).await.unwrap().collect().await.unwrap();
        let found = session.sql(&sql.replace("{}", "t")).await.unwrap().collect().await.unwrap();
        assert_eq!(text(&found), text(&expected), "{sql}");
    }
}

#[tokio::test]
async fn looking_for_a_table_makes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let location = folder.path().join("nothing").to_string_lossy().into_owned();
    let error = provider(&location).await.unwrap_err();
    assert!(error.message().contains("there is no Delta table"), "{error}");
    assert!(!exists(&location).await.unwrap());
    assert!(!folder.path().join("nothing").exists());
    std::fs::create_dir(folder.path().join("nothing")).unwrap();
    assert!(!exists(&location).await.unwrap());
}

#[tokio::test]
async fn a_time_reads_the_version_of_that_time() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "day(t)");
    let mut committer = created(&config).await;
    let clock = crate::stream::clock::Clock;
    let mut times = Vec::new();
    for epoch in 1..=3u64 {
        let files = prepared(&config, epoch, 0..10).await;
        committer.commit(epoch, &files, &CommitProgress::default()).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(15)).await;
        times.push(clock.unix_millis());
        tokio::time::sleep(std::time::Duration::from_millis(15)).await;
    }
    for (at, millis) in times.into_iter().enumerate() {
        let session = SessionContext::new();
        let pinned = provider_as_of(&config.location, AsOf::Millis(millis)).await.unwrap();
        session.register_table("t", pinned).unwrap();
        let found = session.sql("SELECT count(*) FROM t").await.unwrap().collect().await.unwrap();
        assert_eq!(number(&found), 10 * (at as i64 + 1));
    }
}

const SCRIPT: &str = r#"
import sys
from datetime import datetime, timezone
from deltalake import DeltaTable
table = DeltaTable(sys.argv[1])
fields = {f.name: str(f.type.type) if hasattr(f.type, "type") else str(f.type) for f in table.schema().fields}
assert fields == {"id": "long", "t": "timestamp", "c": "string", "t_day": "date", "t_hour": "timestamp"}, fields
protocol = table.protocol()
assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2), protocol
assert table.metadata().partition_columns == ["t_day", "c", "t_hour"]
assert table.transaction_version("p/s") == 2
assert table.transaction_version("p/s/offset/topic/0") == 42
actions = table.get_add_actions(flatten=True)
total = sum(v.as_py() for v in actions.column("num_records"))
assert total == 200, total
hours = {v.as_py() for v in actions.column("partition.t_hour")}
assert datetime(2023, 12, 30, 9, tzinfo=timezone.utc) in hours, sorted(hours)[:3]
from deltalake import QueryBuilder
batch = QueryBuilder().register("t", table).execute(
    "select count(*) n, count(distinct id) ids, count(*) filter (where t_hour <> date_trunc('hour', t)) wrong, "
    "count(*) filter (where c is null) nulls from t").read_all()
row = {name: batch.column(name)[0].as_py() for name in ("n", "ids", "wrong", "nulls")}
assert row == {"n": 200, "ids": 200, "wrong": 0, "nulls": 50}, row
print("read by deltalake", __import__("deltalake").__version__)
"#;

#[tokio::test]
async fn the_python_package_reads_the_table() {
    let Some(python) = service("MILLSTREAM_TEST_PYTHON", "a Python that has the package deltalake") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "day(t),c,hour(t)");
    let mut committer = created(&config).await;
    for epoch in 1..=2u64 {
        let start = (epoch as i64 - 1) * 100;
        let files = prepared(&config, epoch, start..start + 100).await;
        let progress = CommitProgress { offsets: vec![("topic".into(), 0, 42)], ..CommitProgress::default() };
        committer.commit(epoch, &files, &progress).await.unwrap();
        if epoch == 1 {
            committer.checkpoint().await.unwrap();
        }
    }
    let run = Command::new(python).args(["-c", SCRIPT, &config.location]).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{out}{err}");
    eprintln!("{}", out.trim());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_on_s3_takes_conditional_commits() {
    let Some(endpoint) = service("MILLSTREAM_TEST_S3", "the URL of an S3 server") else { return };
    if std::env::var("AWS_ENDPOINT_URL").is_err() {
        // The setting is read from the environment, which a test must not change under others: ask a child.
        let this = "connectors::delta::tests::readers::a_table_on_s3_takes_conditional_commits";
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args([this, "--exact", "--nocapture"]).env("AWS_ENDPOINT_URL", endpoint);
        assert!(child.status().unwrap().success());
        return;
    }
    let bucket = std::env::var("MILLSTREAM_TEST_S3_BUCKET").unwrap_or_else(|_| "millstream-test".to_owned());
    let location = format!("s3://{bucket}/delta-{}/a b", uuid::Uuid::new_v4());
    let config = config_at(&location, &[("partition_by", "hour(t),c")]);
    assert!(!exists(&location).await.unwrap());
    let mut a = created(&config).await;
    let mut b = reopened(&config).await;
    let progress = CommitProgress::default();
    for epoch in 1..=5u64 {
        let start = epoch as i64 * 20;
        let files = prepared(&config, epoch, start..start + 20).await;
        assert!(a.missing_files(&files).await.unwrap().is_empty());
        let (left, right) =
            tokio::join!(a.commit(epoch, &files, &progress), b.commit(epoch, &files, &progress));
        let done = [left.unwrap(), right.unwrap()];
        assert_eq!(done.iter().filter(|d| **d == Committed::AlreadyDone).count(), 1, "{done:?}");
    }
    let mut gone = prepared(&config, 6, 0..1).await;
    gone[0].path.push('x');
    assert_eq!(a.missing_files(&gone).await.unwrap(), [gone[0].path.clone()]);
    assert_eq!(number(&read(&config, "SELECT count(DISTINCT id) FROM t").await), 100);
    assert_eq!(count(&config).await, 100);
    assert_eq!(a.checkpoint().await.unwrap(), 5);
    let (_, state) = DeltaCommitter::open(&config, &schema(), "p", "s").await.unwrap();
    assert_eq!((state.last_epoch, state.version), (Some(5), Some(5)));
}
