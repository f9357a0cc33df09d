//! Entries of a Delta log as bytes: pure functions, apart from any store.
//!
//! What a sink has to remember for good goes into `txn` actions, which checkpoints keep; `commitInfo` is for people.
//! Application ids below `<pipeline>/<sink>`:
//!
//! | id | version |
//! |---|---|
//! | (itself) | epoch |
//! | `/generation` | generation of the newest claim that committed |
//! | `/offset/<topic>/<partition>` | next offset |
//! | `/watermark/<topic>/<partition>`, `/watermark` | µs, of a partition and of the source |
//! | `/complete_until` | µs |
//! | `/rebuilt` | epoch in which all rows were replaced |

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::PreparedFile;
use super::committer::CommitProgress;
use crate::error::{Error, Result};

const ENGINE: &str = concat!("millstream/", env!("CARGO_PKG_VERSION"));

/// The first entry: protocol and metadata, no rows. Reader 1, writer 2: what every reader of Delta knows.
///
/// # Errors
/// Internal: a schema that cannot be written as JSON.
pub fn create_entry(
    schema: &impl serde::Serialize,
    partition_columns: &[String],
    properties: &BTreeMap<&str, String>,
    now_ms: i64,
) -> Result<Bytes> {
    let schema = serde_json::to_string(schema)
        .map_err(|error| Error::internal("a Delta schema cannot be written").because(error))?;
    let info = json!({
        "timestamp": now_ms,
        "operation": "CREATE TABLE",
        "operationParameters": { "partitionBy": json!(partition_columns).to_string() },
        "isBlindAppend": true,
        "engineInfo": ENGINE,
        "txnId": uuid::Uuid::new_v4().to_string(),
    });
    let metadata = json!({
        "id": uuid::Uuid::new_v4().to_string(),
        "format": { "provider": "parquet", "options": {} },
        "schemaString": schema,
        "partitionColumns": partition_columns,
        "configuration": properties,
        "createdTime": now_ms,
    });
    Ok(lines([
        json!({ "commitInfo": info }),
        json!({ "protocol": { "minReaderVersion": 1, "minWriterVersion": 2 } }),
        json!({ "metaData": metadata }),
    ]))
}

/// The entry of one epoch. Its `txnId` is random, so equal bytes are the same commit.
pub fn commit_entry(
    app: &str,
    epoch: i64,
    files: &[PreparedFile],
    progress: &CommitProgress,
    now_ms: i64,
) -> Bytes {
    let sum = |of: fn(&PreparedFile) -> u64| files.iter().map(of).sum::<u64>().to_string();
    let info = json!({
        "timestamp": now_ms,
        "operation": "STREAMING UPDATE",
        "operationParameters": { "outputMode": "Append", "queryId": app, "epochId": epoch.to_string() },
        "operationMetrics": {
            "numAddedFiles": files.len().to_string(),
            "numOutputRows": sum(|file| file.rows),
            "numOutputBytes": sum(|file| file.size),
        },
        "isBlindAppend": true,
        "engineInfo": ENGINE,
        "txnId": uuid::Uuid::new_v4().to_string(),
    });
    let transactions = transactions(app, epoch, progress).into_iter();
    let transactions = transactions
        .map(|(id, version)| json!({ "txn": { "appId": id, "version": version, "lastUpdated": now_ms } }));
    let adds = files.iter().map(|file| json!({ "add": file.add }));
    lines(std::iter::once(json!({ "commitInfo": info })).chain(transactions).chain(adds))
}

/// An entry that changes nothing but what the table is: its schema or its properties.
///
/// # Errors
/// Internal: metadata that cannot be written as JSON.
pub fn metadata_entry(metadata: &impl serde::Serialize, operation: &str, now_ms: i64) -> Result<Bytes> {
    let mut metadata = serde_json::to_value(metadata)
        .map_err(|error| Error::internal("the metadata of a Delta table cannot be written").because(error))?;
    if let Some(fields) = metadata.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    let info = json!({
        "timestamp": now_ms,
        "operation": operation,
        "operationParameters": {},
        "isBlindAppend": false,
        "engineInfo": ENGINE,
        "txnId": uuid::Uuid::new_v4().to_string(),
    });
    Ok(lines([json!({ "commitInfo": info }), json!({ "metaData": metadata })]))
}

/// What a commit says about progress, as (application, version).
pub fn transactions(app: &str, epoch: i64, progress: &CommitProgress) -> Vec<(String, i64)> {
    let mut all = vec![(app.to_owned(), epoch)];
    let generation = progress.generation.and_then(|generation| i64::try_from(generation).ok());
    all.extend(generation.map(|generation| (format!("{app}/generation"), generation)));
    all.extend(progress.offsets.iter().map(|(topic, p, next)| (format!("{app}/offset/{topic}/{p}"), *next)));
    all.extend(
        progress.watermarks.iter().map(|(topic, p, at)| (format!("{app}/watermark/{topic}/{p}"), *at)),
    );
    all.extend(progress.source_watermark.map(|at| (format!("{app}/watermark"), at)));
    all.extend(progress.complete_until.map(|at| (format!("{app}/complete_until"), at)));
    all
}

/// The entry of a compaction: it changes no row, and says which generation made it.
pub fn compaction_entry(
    app: &str,
    generation: u64,
    removes: Vec<Value>,
    adds: Vec<Value>,
    read_version: u64,
    now_ms: i64,
) -> Bytes {
    let info = json!({
        "timestamp": now_ms,
        "operation": "OPTIMIZE",
        "operationParameters": { "predicate": "[]" },
        "operationMetrics": {
            "numRemovedFiles": removes.len().to_string(),
            "numAddedFiles": adds.len().to_string(),
        },
        "readVersion": read_version,
        "isBlindAppend": false,
        "engineInfo": ENGINE,
        "txnId": uuid::Uuid::new_v4().to_string(),
    });
    let fence = json!({ "appId": format!("{app}/generation"), "version": generation, "lastUpdated": now_ms });
    let removes = removes.into_iter().map(|remove| json!({ "remove": remove }));
    let adds = adds.into_iter().map(|add| json!({ "add": add }));
    lines([json!({ "commitInfo": info }), json!({ "txn": fence })].into_iter().chain(removes).chain(adds))
}

/// What an entry does to a compaction that read an older version.
#[derive(Debug, PartialEq, Eq)]
pub enum Bearing {
    None,
    /// It touched a file that the compaction read, or changed what the table is.
    Conflict,
    /// A process of a newer generation wrote it.
    Fenced,
}

/// `inputs`: names of files, without folders.
///
/// # Errors
/// External: an entry that is no Delta log entry.
pub fn bearing(entry: &[u8], app: &str, generation: u64, inputs: &BTreeSet<&str>) -> Result<Bearing> {
    let fence = format!("{app}/generation");
    let mut bearing = Bearing::None;
    for line in entry_lines(entry) {
        let line = line?;
        if line.txn.is_some_and(|txn| {
            txn.app_id == fence && u64::try_from(txn.version).is_ok_and(|v| v > generation)
        }) {
            return Ok(Bearing::Fenced);
        }
        let touched = line.remove.or(line.add).is_some_and(|file| inputs.contains(file_name(&file.path)));
        if touched || line.metadata.is_some() || line.protocol.is_some() {
            bearing = Bearing::Conflict;
        }
    }
    Ok(bearing)
}

/// The last part of a path. Names of data files hold a random id and no character that the log encodes, so they stand
/// for the file however its folders are written.
pub fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn lines(actions: impl IntoIterator<Item = Value>) -> Bytes {
    let mut text = String::new();
    for action in actions {
        text.push_str(&action.to_string());
        text.push('\n');
    }
    Bytes::from(text)
}

/// What an entry that somebody wrote means for us.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Transaction version of our application.
    pub epoch: Option<i64>,
    /// Schema, properties or protocol are not what they were.
    pub changed: bool,
}

#[derive(Deserialize)]
struct Line {
    txn: Option<Txn>,
    #[serde(rename = "metaData")]
    metadata: Option<IgnoredAny>,
    protocol: Option<IgnoredAny>,
    add: Option<File>,
    remove: Option<File>,
}

#[derive(Deserialize)]
struct File {
    path: String,
}

fn entry_lines(entry: &[u8]) -> impl Iterator<Item = Result<Line>> {
    let lines = serde_json::Deserializer::from_slice(entry).into_iter::<Line>();
    lines.map(|line| {
        line.map_err(|error| Error::external("an entry of the Delta log cannot be read").because(error))
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Txn {
    app_id: String,
    version: i64,
}

/// The application whose commit an entry is, and the next offset of each partition of a topic that it names; `None`: it
/// names none.
///
/// # Errors
/// External: an entry that is no Delta log entry.
pub fn offsets_in(entry: &[u8], topic: &str) -> Result<Option<(String, BTreeMap<i32, i64>)>> {
    let middle = format!("/offset/{topic}/");
    let (mut app, mut next) = (None, BTreeMap::new());
    for line in entry_lines(entry) {
        let Some(txn) = line?.txn else { continue };
        let Some((before, partition)) = txn.app_id.rsplit_once(&middle) else { continue };
        if let Ok(partition) = partition.parse() {
            next.insert(partition, txn.version);
            app = Some(before.to_owned());
        }
    }
    Ok(app.map(|app| (app, next)))
}

/// # Errors
/// External: an entry that is no Delta log entry.
pub fn read_entry(entry: &[u8], app: &str) -> Result<Seen> {
    let mut seen = Seen::default();
    for line in entry_lines(entry) {
        let line = line?;
        seen.changed |= line.metadata.is_some() || line.protocol.is_some();
        if let Some(txn) = line.txn.filter(|txn| txn.app_id == app) {
            seen.epoch = Some(txn.version);
        }
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_back() {
        let progress = CommitProgress {
            offsets: vec![("t".into(), 3, 17)],
            source_watermark: Some(5),
            generation: Some(2),
            ..CommitProgress::default()
        };
        let entry = commit_entry("p/s", 9, &[], &progress, 1);
        assert_eq!(read_entry(&entry, "p/s").unwrap(), Seen { epoch: Some(9), changed: false });
        assert_eq!(read_entry(&entry, "p/s/offset/t/3").unwrap().epoch, Some(17));
        assert_eq!(read_entry(&entry, "p/s/watermark").unwrap().epoch, Some(5));
        assert_eq!(read_entry(&entry, "p/s/generation").unwrap().epoch, Some(2));
        assert_eq!(read_entry(&entry, "p").unwrap(), Seen::default());
        assert_eq!(offsets_in(&entry, "t").unwrap(), Some(("p/s".to_owned(), [(3, 17)].into())));
        assert_eq!(offsets_in(&entry, "other").unwrap(), None);
        let created = create_entry(&json!({}), &["d".to_owned()], &BTreeMap::new(), 1).unwrap();
        assert_eq!(read_entry(&created, "p/s").unwrap(), Seen { epoch: None, changed: true });
        assert!(read_entry(b"{\"txn\":", "p/s").is_err());
    }
}
