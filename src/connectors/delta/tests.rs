use std::sync::Arc;

use arrow::array::{AsArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use arrow::util::pretty::pretty_format_batches;
use datafusion::prelude::SessionContext;

use super::{CommitProgress, Committed, DeltaCommitter, DeltaConfig, DeltaWriter};
use crate::sql::options::Options;
use crate::stream::timestamp_type;

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("id", DataType::Int64, false),
        Field::new("t", timestamp_type(), false),
        Field::new("c", DataType::Utf8, true),
    ]))
}

fn rows(range: std::ops::Range<i64>) -> RecordBatch {
    // Five hours apart, across days, months and a year.
    let times = range.clone().map(|i| 1_703_930_000_123_456 + i * 5 * 3_600_000_000);
    let names = range.clone().map(|i| (i % 4 != 0).then(|| format!("a/b {}", i % 3)));
    RecordBatch::try_new(
        schema(),
        vec![
            Arc::new(Int64Array::from_iter_values(range)),
            Arc::new(TimestampMicrosecondArray::from_iter_values(times).with_timezone("UTC")),
            Arc::new(names.collect::<StringArray>()),
        ],
    )
    .unwrap()
}

fn config(folder: &tempfile::TempDir, partition_by: &str) -> DeltaConfig {
    let location = folder.path().join("t").to_string_lossy().into_owned();
    let mut options = Options::of("sink s", &[("location", &location), ("partition_by", partition_by)]);
    DeltaConfig::from_options(&mut options).unwrap()
}

async fn read(config: &DeltaConfig, sql: &str) -> Vec<RecordBatch> {
    let session = SessionContext::new();
    session.register_table("t", super::table::provider(&config.location).await.unwrap()).unwrap();
    session.sql(sql).await.unwrap().collect().await.unwrap()
}

async fn count(config: &DeltaConfig) -> i64 {
    read(config, "SELECT count(*) FROM t").await[0].column(0).as_primitive::<Int64Type>().value(0)
}

#[tokio::test]
async fn epochs_of_two_shards_are_committed_once() {
    for partition_by in ["day(t)", "hour(t)", "month(t),c", "year(t)", "c"] {
        let folder = tempfile::tempdir().unwrap();
        let config = config(&folder, partition_by);
        let (mut committer, state) = DeltaCommitter::open(&config, &schema(), "p", "s").await.unwrap();
        assert!(!state.exists);
        committer.create("state-1").await.unwrap();
        let mut shards: Vec<DeltaWriter> = (0..2)
            .map(|s| DeltaWriter::new(config.clone(), &schema(), format!("g1-s{s}")).unwrap())
            .collect();
        for epoch in 1..=3u64 {
            let mut files = Vec::new();
            for (shard, writer) in shards.iter_mut().enumerate() {
                let start = (epoch as i64 * 2 + shard as i64) * 100;
                writer.write(&rows(start..start + 60)).unwrap();
                writer.write(&rows(start + 60..start + 100)).unwrap();
                files.extend(writer.prepare(epoch).await.unwrap());
            }
            assert!(committer.missing_files(&files).await.unwrap().is_empty());
            let progress =
                CommitProgress { offsets: vec![("t".into(), 0, epoch as i64)], ..CommitProgress::default() };
            let done = committer.commit(epoch, &files, &progress).await.unwrap();
            assert!(matches!(done, Committed::Version(_)), "{done:?}");
            assert_eq!(committer.commit(epoch, &files, &progress).await.unwrap(), Committed::AlreadyDone);
            let (mut other, state) = DeltaCommitter::open(&config, &schema(), "p", "s").await.unwrap();
            assert_eq!((state.state_id.as_deref(), state.last_epoch), (Some("state-1"), Some(epoch)));
            assert_eq!(other.commit(epoch, &files, &progress).await.unwrap(), Committed::AlreadyDone);
        }
        let session = SessionContext::new();
        session.register_batch("o", rows(200..800)).unwrap();
        let sql = "SELECT id, t, c FROM {} ORDER BY id";
        let oracle = session.sql(&sql.replace("{}", "o")).await.unwrap().collect().await.unwrap();
        let found = read(&config, &sql.replace("{}", "t")).await;
        let text = |batches: &[RecordBatch]| pretty_format_batches(batches).unwrap().to_string();
        assert_eq!(text(&found), text(&oracle), "{partition_by}");
    }
}

#[tokio::test]
async fn partition_columns_are_those_of_sql_and_prune() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "day(t),hour(t),month(t),year(t)");
    let (mut committer, _) = DeltaCommitter::open(&config, &schema(), "p", "s").await.unwrap();
    committer.create("x").await.unwrap();
    let mut writer = DeltaWriter::new(config.clone(), &schema(), "g1-s0".into()).unwrap();
    writer.write(&rows(0..200)).unwrap();
    let files = writer.prepare(1).await.unwrap();
    committer.commit(1, &files, &CommitProgress::default()).await.unwrap();
    let wrong = read(
        &config,
        "SELECT count(*) FROM t WHERE t_day <> CAST(t AS DATE) OR t_hour <> date_trunc('hour', t)
         OR t_month <> CAST(date_trunc('month', t) AS DATE) OR t_year <> date_part('year', t)",
    )
    .await;
    assert_eq!(wrong[0].column(0).as_primitive::<Int64Type>().value(0), 0);
    let one = read(&config, "SELECT count(*) FROM t WHERE id = 77 AND t > '2023-12-30'").await;
    assert_eq!(one[0].column(0).as_primitive::<Int64Type>().value(0), 1, "statistics must not hide a row");
    assert_eq!(count(&config).await, 200);
}

#[tokio::test]
async fn of_two_committers_of_one_epoch_one_wins() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "day(t)");
    let (mut a, _) = DeltaCommitter::open(&config, &schema(), "p", "s").await.unwrap();
    a.create("x").await.unwrap();
    let (mut b, _) = DeltaCommitter::open(&config, &schema(), "p", "s").await.unwrap();
    let mut writer = DeltaWriter::new(config.clone(), &schema(), "g1-s0".into()).unwrap();
    writer.write(&rows(0..10)).unwrap();
    let files = writer.prepare(1).await.unwrap();
    let progress = CommitProgress::default();
    let (left, right) = tokio::join!(a.commit(1, &files, &progress), b.commit(1, &files, &progress));
    let done = [left.unwrap(), right.unwrap()];
    assert_eq!(done.iter().filter(|d| **d == Committed::AlreadyDone).count(), 1, "{done:?}");
    assert_eq!(count(&config).await, 10);
}

#[tokio::test]
async fn a_table_with_other_columns_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "day(t)");
    let (mut committer, _) = DeltaCommitter::open(&config, &schema(), "p", "s").await.unwrap();
    committer.create("x").await.unwrap();
    let other = Arc::new(schema().project(&[0, 1]).unwrap());
    let error = DeltaCommitter::open(&config, &other, "p", "s").await.err().unwrap();
    assert!(error.message().contains("instead") && error.message().contains("c string"), "{error}");
    let mut options = Options::of("sink s", &[("location", "x"), ("partition_by", "week(t)")]);
    assert!(DeltaConfig::from_options(&mut options).unwrap_err().message().contains("week()"));
}
