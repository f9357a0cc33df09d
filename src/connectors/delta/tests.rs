//! Written by our writer and committer, read back by other means: DataFusion, delta-rs, the Python package.

mod commits;
mod evolving;
mod lost;
mod readers;
mod swapping;
mod upkeep;
mod upserts;
mod writing;

use std::sync::Arc;

use arrow::array::{AsArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use arrow::util::pretty::pretty_format_batches;
use datafusion::prelude::SessionContext;

use super::{CommitProgress, Committed, DeltaCommitter, DeltaConfig, DeltaWriter, PreparedFile};
use crate::sql::options::Options;
use crate::stream::timestamp_type;

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("id", DataType::Int64, false),
        Field::new("t", timestamp_type(), false),
        Field::new("c", DataType::Utf8, true),
    ]))
}

/// Five hours apart, across days, months and a year; texts with NULLs and with what paths do not like.
fn rows(range: std::ops::Range<i64>) -> RecordBatch {
    let times = range.clone().map(|i| 1_703_930_000_123_456 + i * 5 * 3_600_000_000);
    let names = range.clone().map(|i| (i % 4 != 0).then(|| format!("a/b ü%2F{}", i % 3)));
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

fn config_at(location: &str, options: &[(&str, &str)]) -> DeltaConfig {
    let options = [&[("location", location)], options].concat();
    DeltaConfig::from_options(&mut Options::of("sink s", &options)).unwrap()
}

fn config(folder: &tempfile::TempDir, partition_by: &str) -> DeltaConfig {
    let location = folder.path().join("t").to_string_lossy().into_owned();
    config_at(&location, &[("partition_by", partition_by)])
}

fn writer(config: &DeltaConfig, shard: usize) -> DeltaWriter {
    DeltaWriter::new(config.clone(), &schema(), format!("g00000001-s{shard}")).unwrap()
}

/// A table of the state "x" and its committer.
async fn created(config: &DeltaConfig) -> DeltaCommitter {
    let (mut committer, state) = DeltaCommitter::open(config, &schema(), "p", "s").await.unwrap();
    assert!(!state.exists);
    committer.create("x").await.unwrap();
    committer
}

async fn reopened(config: &DeltaConfig) -> DeltaCommitter {
    DeltaCommitter::open(config, &schema(), "p", "s").await.unwrap().0
}

async fn prepared(config: &DeltaConfig, epoch: u64, range: std::ops::Range<i64>) -> Vec<PreparedFile> {
    let mut writer = writer(config, 0);
    writer.write(&rows(range)).unwrap();
    writer.prepare(epoch).unwrap().await.unwrap()
}

async fn session(config: &DeltaConfig) -> SessionContext {
    let session = SessionContext::new();
    session.register_table("t", super::table::provider(&config.location).await.unwrap()).unwrap();
    session
}

async fn read(config: &DeltaConfig, sql: &str) -> Vec<RecordBatch> {
    session(config).await.sql(sql).await.unwrap().collect().await.unwrap()
}

fn number(batches: &[RecordBatch]) -> i64 {
    batches[0].column(0).as_primitive::<Int64Type>().value(0)
}

async fn count(config: &DeltaConfig) -> i64 {
    number(&read(config, "SELECT count(*) FROM t").await)
}

fn text(batches: &[RecordBatch]) -> String {
    pretty_format_batches(batches).unwrap().to_string()
}

/// A service's setting, or `None` after a line that says what is skipped.
fn service(name: &str, what: &str) -> Option<String> {
    let found = std::env::var(name).ok().filter(|value| !value.is_empty());
    if found.is_none() {
        let required = std::env::var("MILLSTREAM_REQUIRE_SERVICES").is_ok_and(|value| !value.is_empty());
        assert!(!required, "{name} is not set");
        eprintln!("skipped: set {name} to {what} (docker/services.sh start)");
    }
    found
}
