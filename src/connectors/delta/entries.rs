//! What a Delta log remembers beside files: the newest version of every application transaction, and where rows were
//! added since a version. delta-rs gives one transaction at a time and replays the log for each; these are read at once.

use std::collections::BTreeMap;

use arrow::array::{Array, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Int64Type};
use bytes::Bytes;
use deltalake_core::DeltaTableError;
use deltalake_core::logstore::LogStoreRef;
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use super::store::failed;
use crate::error::{Error, Result};
use crate::stream::Micros;

/// Entries read at the same time.
const READS: usize = 16;

/// The newest state of an application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Txn {
    pub version: i64,
    /// ms since the epoch.
    pub updated: Option<i64>,
}

/// One action of an entry, as far as it concerns others.
#[derive(Deserialize)]
pub(super) struct Line {
    pub txn: Option<TxnLine>,
    #[serde(rename = "metaData")]
    pub metadata: Option<IgnoredAny>,
    pub protocol: Option<IgnoredAny>,
    pub add: Option<AddLine>,
    pub remove: Option<RemoveLine>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct TxnLine {
    pub app_id: String,
    pub version: i64,
    pub last_updated: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct AddLine {
    pub path: String,
    pub data_change: bool,
    pub stats: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RemoveLine {
    pub path: String,
    #[serde(default = "changes_data")]
    data_change: bool,
}

/// What a `remove` action means that does not say so.
fn changes_data() -> bool {
    true
}

#[derive(Deserialize)]
struct LastCheckpoint {
    version: u64,
}

/// The actions of an entry.
///
/// # Errors
/// External: an entry that is no Delta log entry.
pub(super) fn lines(entry: &[u8]) -> Result<Vec<Line>> {
    let lines = serde_json::Deserializer::from_slice(entry).into_iter::<Line>();
    let lines: Result<Vec<Line>, _> = lines.collect();
    lines.map_err(|error| Error::external("an entry of the Delta log cannot be read").because(error))
}

/// Every application transaction up to a version.
///
/// # Errors
/// External: the store failed, or an entry is damaged or gone.
pub async fn transactions(location: &str, log: &LogStoreRef, version: u64) -> Result<BTreeMap<String, Txn>> {
    let store = log.object_store(None);
    let mut found = BTreeMap::new();
    let mut first = 0;
    if let Some((at, parts)) = checkpoint(location, store.as_ref(), version).await? {
        first = at + 1;
        for part in parts {
            let bytes = store.get(&part).await.map_err(|error| failed(location, error.into()))?;
            let bytes = bytes.bytes().await.map_err(|error| failed(location, error.into()))?;
            of_checkpoint(bytes, &mut found).map_err(|error| error.context(format!("{location}/{part}")))?;
        }
    }
    let mut entries =
        futures::stream::iter(first..=version).map(|at| entry(location, log, at)).buffered(READS);
    while let Some(entry) = entries.try_next().await? {
        let Some(entry) = entry else {
            let message = format!("an entry of the log of the Delta table {location} is gone");
            return Err(Error::external(message).hint("Try again: its log was cleaned up meanwhile."));
        };
        for txn in lines(&entry)?.into_iter().filter_map(|line| line.txn) {
            found.insert(txn.app_id, Txn { version: txn.version, updated: txn.last_updated });
        }
    }
    Ok(found)
}

async fn entry(location: &str, log: &LogStoreRef, version: u64) -> Result<Option<Bytes>> {
    log.read_commit_entry(version).await.map_err(|error| failed(location, error))
}

/// The newest checkpoint at or before a version, and its files.
async fn checkpoint(
    location: &str,
    store: &dyn ObjectStore,
    version: u64,
) -> Result<Option<(u64, Vec<Path>)>> {
    let fail = |error: object_store::Error| failed(location, DeltaTableError::from(error));
    let hint = match store.get(&Path::from("_delta_log/_last_checkpoint")).await {
        Ok(found) => serde_json::from_slice::<LastCheckpoint>(&found.bytes().await.map_err(fail)?).ok(),
        Err(object_store::Error::NotFound { .. }) => None,
        Err(error) => return Err(fail(error)),
    };
    let hint = hint.map(|hint| hint.version).filter(|hint| *hint <= version).unwrap_or(0);
    let after = Path::from(format!("_delta_log/{hint:020}"));
    let mut listed = store.list_with_offset(Some(&Path::from("_delta_log")), &after);
    let mut found: BTreeMap<u64, Vec<Path>> = BTreeMap::new();
    while let Some(meta) = listed.try_next().await.map_err(fail)? {
        let name = meta.location.filename().unwrap_or_default();
        let Some((number, rest)) = name.split_once('.') else { continue };
        let number = number.parse::<u64>().ok().filter(|number| *number <= version);
        if let Some(number) = number.filter(|_| rest.starts_with("checkpoint") && rest.ends_with("parquet")) {
            found.entry(number).or_default().push(meta.location);
        }
    }
    Ok(found.pop_last())
}

fn of_checkpoint(bytes: Bytes, found: &mut BTreeMap<String, Txn>) -> Result<()> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(bytes)?;
    let Some(root) = reader.schema().fields().iter().position(|field| field.name() == "txn") else {
        return Ok(());
    };
    let mask = ProjectionMask::roots(reader.parquet_schema(), [root]);
    for batch in reader.with_projection(mask).build()? {
        let batch = batch?;
        let txns = batch.column(0).as_struct();
        let column = |name: &str, kind: DataType| -> Result<_> {
            let column = txns.column_by_name(name);
            let column = column.ok_or_else(|| Error::external("a checkpoint of another form"))?;
            Ok(cast(column, &kind)?)
        };
        let (ids, versions) = (column("appId", DataType::Utf8)?, column("version", DataType::Int64)?);
        let updated = column("lastUpdated", DataType::Int64).ok();
        let (ids, versions) = (ids.as_string::<i32>(), versions.as_primitive::<Int64Type>());
        for row in (0..txns.len()).filter(|row| txns.is_valid(*row) && ids.is_valid(*row)) {
            let updated = updated.as_ref().map(|updated| updated.as_primitive::<Int64Type>());
            let updated = updated.filter(|updated| updated.is_valid(row)).map(|updated| updated.value(row));
            found.insert(ids.value(row).to_owned(), Txn { version: versions.value(row), updated });
        }
    }
    Ok(())
}

/// Rows that a version added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Added {
    pub version: u64,
    /// Of the time column, both included; `None`: not known.
    pub range: Option<(Micros, Micros)>,
}

/// The rows that were added after one version up to another, rewrites left out. `None`: the log no longer tells.
///
/// # Errors
/// External: the store failed, or an entry is damaged.
pub async fn added(
    location: &str,
    log: &LogStoreRef,
    after: u64,
    until: u64,
    time: &str,
) -> Result<Option<Vec<Added>>> {
    Ok(changed(location, log, after, until, time).await?.map(|changes| changes.added))
}

/// What became of a table's rows between two versions, rewrites left out.
#[derive(Debug, Default)]
pub struct Changes {
    pub added: Vec<Added>,
    /// Versions that took rows away: which ones, the log does not say.
    pub removed: Vec<u64>,
}

/// As [`added`], with what was removed.
///
/// # Errors
/// External: the store failed, or an entry is damaged.
pub async fn changed(
    location: &str,
    log: &LogStoreRef,
    after: u64,
    until: u64,
    time: &str,
) -> Result<Option<Changes>> {
    let each = |version: u64| async move { Ok::<_, Error>((version, entry(location, log, version).await?)) };
    let mut entries = futures::stream::iter(after + 1..=until).map(each).buffered(READS);
    let mut found = Changes::default();
    while let Some((version, entry)) = entries.try_next().await? {
        let Some(entry) = entry else { return Ok(None) };
        for line in lines(&entry)? {
            if let Some(add) = line.add.filter(|add| add.data_change) {
                let range = extent(add.stats.as_deref(), time).range;
                found.added.push(Added { version, range });
            }
            if line.remove.is_some_and(|remove| remove.data_change) {
                found.removed.push(version);
            }
        }
    }
    Ok(Some(found))
}

/// What the statistics of a file say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extent {
    pub rows: Option<u64>,
    /// Of the time column, both included; `None` where it is not known or where a row has none.
    pub range: Option<(Micros, Micros)>,
}

pub fn extent(stats: Option<&str>, time: &str) -> Extent {
    let Some(stats) = stats.and_then(|stats| serde_json::from_str::<Value>(stats).ok()) else {
        return Extent::default();
    };
    let bound = |which: &str| stats.get(which)?.get(time)?.as_str();
    let nulls = stats.get("nullCount").and_then(|nulls| nulls.get(time)).and_then(Value::as_u64);
    let range = bound("minValues").and_then(micros).zip(bound("maxValues").and_then(|max| {
        // Other writers cut a bound off after the milliseconds.
        let fraction =
            max.split_once('.').map_or(0, |(_, rest)| rest.bytes().take_while(u8::is_ascii_digit).count());
        Some(micros(max)? + if fraction <= 3 { 999 } else { 0 })
    }));
    Extent {
        rows: stats.get("numRecords").and_then(Value::as_u64),
        range: range.filter(|_| nulls == Some(0)),
    }
}

/// A time as statistics and names of intervals write it.
pub(super) fn micros(text: &str) -> Option<Micros> {
    if let Ok(time) = chrono::DateTime::parse_from_rfc3339(text) {
        return Some(time.timestamp_micros());
    }
    let naive = ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f"];
    let naive = naive.iter().find_map(|form| chrono::NaiveDateTime::parse_from_str(text, form).ok());
    naive.map(|time| time.and_utc().timestamp_micros())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_hold_every_row() {
        let stats = |min: &str, max: &str, nulls: u64| {
            format!(
                r#"{{"numRecords":7,"minValues":{{"t":"{min}"}},"maxValues":{{"t":"{max}"}},"nullCount":{{"t":{nulls}}}}}"#
            )
        };
        let of = |min, max, nulls| extent(Some(&stats(min, max, nulls)), "t");
        let exact = of("1970-01-01T00:00:00.000001Z", "1970-01-01T00:00:01.000002Z", 0);
        assert_eq!(exact, Extent { rows: Some(7), range: Some((1, 1_000_002)) });
        assert_eq!(of("1970-01-01T00:00:00Z", "1970-01-01T00:00:01.000Z", 0).range, Some((0, 1_000_999)));
        assert_eq!(of("1970-01-01 00:00:00", "1970-01-01 00:00:01.5", 0).range, Some((0, 1_500_999)));
        assert_eq!(of("1970-01-01T00:00:00Z", "1970-01-01T00:00:01Z", 1).range, None, "a row without time");
        assert_eq!(of("yesterday", "1970-01-01T00:00:01Z", 0).range, None);
        assert_eq!(extent(None, "t"), Extent::default());
        assert_eq!(extent(Some(&stats("", "", 0)), "other").rows, Some(7));
    }
}
