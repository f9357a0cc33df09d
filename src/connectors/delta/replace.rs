//! The rows of an interval of time replaced in one commit (Delta's `replaceWhere`), beside whoever else writes the table.
//!
//! **One entry** removes every file that holds a row of the interval, adds the new rows, adds again the other rows of
//! files that lie across an edge of the interval, and holds the ledger of the interval. So the table has all of it or
//! nothing, whenever the process ends.
//!
//! **Ledger**: transaction actions, which checkpoints keep; what is for people is in `commitInfo` too. Below
//! `<pipeline>/<sink>/backfill`:
//!
//! | id | version |
//! |---|---|
//! | (itself) | turn: how many intervals of the sink were replaced so far |
//! | `/<from>/<to>` | turn in which this interval was |
//! | `/<from>/<to>/fingerprint` | of what its rows were computed by |
//! | `/<from>/<to>/rows` | its rows |
//! | `/<from>/<to>/backup` | version of the backup; not there for a backup that has none |
//!
//! **Others.** The commit is a conditional PUT behind the version whose files it replaces; every entry between is looked
//! at. Appends of the sink's own stream never concern rows that are replaced and are passed over. What touched a file
//! that is removed (compaction, MERGE, DELETE), added rows to the interval, replaced an interval, or changed what the
//! table is, is a conflict: nothing is committed, and the caller begins again from the table as it is now. The stream's
//! committer follows our entry as any foreign one; a compaction that read a file which we remove is dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::array::{Array, AsArray, BooleanArray, RecordBatch};
use arrow::compute::{cast, filter_record_batch, not};
use arrow::datatypes::{Schema, SchemaRef, TimestampMicrosecondType};
use bytes::Bytes;
use datafusion::prelude::{SessionConfig, SessionContext};
use deltalake_core::DeltaTable;
use deltalake_core::kernel::LogicalFileView;
use deltalake_core::kernel::StructType;
use deltalake_core::kernel::engine::arrow_conversion::{TryIntoArrow, TryIntoKernel};
use deltalake_core::kernel::transaction::TransactionError;
use deltalake_core::logstore::{CommitOrBytes, LogStoreRef, commit_uri_from_version};
use futures::StreamExt;
use object_store::{ObjectStoreExt, path::Path};
use serde_json::{Value, json};

use super::committer::STATE_PROPERTY;
use super::config::DeltaConfig;
use super::entries::{Txn, extent, lines, transactions};
pub use super::ledger::Finished;
use super::ledger::of_transactions;
use super::log::{create_entry, file_name};
use super::store::{existing_table, failed};
use super::table::provider_of_files;
use super::writer::DeltaWriter;
use super::{DeltaCommitter, PreparedFile};
use crate::connectors::files::open;
use crate::connectors::partition::{time_text, uri};
use crate::error::{Error, Result};
use crate::stream::clock::Clock;
use crate::stream::{Micros, crash, timestamp_type};

/// Commits of others that may come first before this counts as failed.
const MAX_OVERTAKEN: u32 = 1_000;
pub(super) const ENGINE: &str = concat!("millstream/", env!("CARGO_PKG_VERSION"));

/// Times from (included) to (excluded), in µs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interval {
    pub from: Micros,
    pub to: Micros,
}

impl Interval {
    pub fn overlaps(&self, other: &Self) -> bool {
        self.from < other.to && other.from < self.to
    }

    pub fn covers(&self, other: &Self) -> bool {
        self.from <= other.from && other.to <= self.to
    }

    /// Whether a row with a time of this range, both included, may be in it.
    pub fn touches(&self, range: Option<(Micros, Micros)>) -> bool {
        range.is_none_or(|(least, greatest)| least < self.to && greatest >= self.from)
    }
}

impl std::fmt::Display for Interval {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} to {}", time_text(self.from), time_text(self.to))
    }
}

/// The table of one sink.
pub struct Replacer {
    config: DeltaConfig,
    rows: SchemaRef,
    time: String,
    sink: String,
    /// `<pipeline>/<sink>`, for a table that no stream writes.
    app: String,
}

/// A version of the table.
pub struct Pinned {
    table: DeltaTable,
    log: LogStoreRef,
    pub version: u64,
    /// The state whose stream owns the table.
    pub state_id: Option<String>,
    txns: BTreeMap<String, Txn>,
    /// `<pipeline>/<sink>` of the stream, or our own.
    app: String,
}

/// What becomes of an interval.
pub struct Replacement<'a> {
    pub interval: Interval,
    /// The new rows.
    pub files: &'a [PreparedFile],
    pub fingerprint: i64,
    pub backup_version: Option<u64>,
    /// (topic, partition, next offset): which rows of the backup were read; for people.
    pub offsets: &'a [(String, i32, i64)],
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replaced {
    Version {
        version: u64,
        rows_before: u64,
    },
    /// Nothing is replaced; says what came between.
    Conflict(String),
}

/// The files that hold rows of an interval, and those that are written instead.
struct Change {
    removes: Vec<Value>,
    names: BTreeSet<String>,
    survivors: Vec<PreparedFile>,
    rows_before: u64,
}

impl Pinned {
    /// µs: the stream adds no row below it.
    pub fn complete_until(&self) -> Option<Micros> {
        self.txns.get(&format!("{}/complete_until", self.app)).map(|txn| txn.version)
    }

    /// (topic, partition, next offset), of the stream.
    pub fn offsets(&self) -> Vec<(String, i32, i64)> {
        offsets(&self.txns, &format!("{}/offset/", self.app))
    }

    pub fn ledger(&self) -> Vec<Finished> {
        of_transactions(&self.txns, &self.app)
    }

    /// When all rows were replaced: the epoch of the newest rebuild.
    pub fn rebuilt(&self) -> Option<i64> {
        self.txns.get(&format!("{}/rebuilt", self.app)).map(|txn| txn.version)
    }

    fn turn(&self) -> i64 {
        self.txns.get(&format!("{}/backfill", self.app)).map_or(0, |txn| txn.version)
    }
}

/// The offsets below a prefix of transactions.
fn offsets(txns: &BTreeMap<String, Txn>, prefix: &str) -> Vec<(String, i32, i64)> {
    let of = |(id, txn): (&String, &Txn)| {
        let (topic, partition) = id.strip_prefix(prefix)?.rsplit_once('/')?;
        Some((topic.to_owned(), partition.parse().ok()?, txn.version))
    };
    txns.iter().filter_map(of).collect()
}

/// What a stream's commits say of a table, whatever the stream is called.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    pub version: u64,
    /// A table that is made anew has another one.
    pub table_id: String,
    pub complete_until: Option<Micros>,
    pub offsets: Vec<(String, i32, i64)>,
}

/// The newest version of a table that a sink named `sink` writes, and how far it is. `None`: there is no table.
///
/// # Errors
/// External: the store failed.
pub async fn progress(location: &str, sink: &str) -> Result<Option<(Progress, LogStoreRef)>> {
    let Some((table, txns)) = look(location).await? else { return Ok(None) };
    let app = stream_of(&txns, sink);
    let of = |app: &String| offsets(&txns, &format!("{app}/offset/"));
    let snapshot = table.snapshot().map_err(|error| failed(location, error))?;
    let found = Progress {
        version: snapshot.version(),
        table_id: snapshot.metadata().id().to_owned(),
        complete_until: app
            .as_ref()
            .and_then(|app| txns.get(&format!("{app}/complete_until")))
            .map(|t| t.version),
        offsets: app.as_ref().map(of).unwrap_or_default(),
    };
    Ok(Some((found, table.log_store())))
}

pub(super) async fn look(location: &str) -> Result<Option<(DeltaTable, BTreeMap<String, Txn>)>> {
    let fail = |error| failed(location, error);
    let Some(mut table) = existing_table(location)? else { return Ok(None) };
    if !table.verify_deltatable_existence().await.map_err(fail)? {
        return Ok(None);
    }
    table.load().await.map_err(fail)?;
    let version = table.snapshot().map_err(fail)?.version();
    let txns = transactions(location, &table.log_store(), version).await?;
    Ok(Some((table, txns)))
}

/// `<pipeline>/<sink>` of the stream that committed last under this sink's name.
fn stream_of(txns: &BTreeMap<String, Txn>, sink: &str) -> Option<String> {
    let suffix = format!("/{sink}/generation");
    let streams = txns.iter().filter(|(id, _)| id.ends_with(&suffix));
    let newest = streams.max_by_key(|(_, txn)| txn.updated)?;
    newest.0.strip_suffix("/generation").map(str::to_owned)
}

impl Replacer {
    /// `rows`: schema of the rows; `time`: their time column. Touches nothing.
    ///
    /// # Errors
    /// User: the table has other columns. External: the store failed.
    pub async fn open(
        config: &DeltaConfig,
        rows: &SchemaRef,
        time: &str,
        pipeline: &str,
        sink: &str,
    ) -> Result<Self> {
        if super::table::exists(&config.location).await? {
            // Checks the columns and features of the table as the sink itself does.
            DeltaCommitter::open(config, rows, pipeline, sink).await?;
        }
        let app = format!("{pipeline}/{sink}");
        Ok(Self {
            config: config.clone(),
            rows: Arc::clone(rows),
            time: time.to_owned(),
            sink: sink.to_owned(),
            app,
        })
    }

    /// Makes the table, without rows and as nobody's, unless it is there.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn create(&self) -> Result<()> {
        let location = &self.config.location;
        let schema: Result<StructType, _> = self.config.table_schema(&self.rows)?.as_ref().try_into_kernel();
        let schema = schema.map_err(|error| {
            Error::user(format!("the columns of {location} cannot be stored in Delta")).because(error)
        })?;
        let mut properties = self.config.properties("");
        properties.remove(STATE_PROPERTY);
        let entry = create_entry(&schema, &self.config.partition_names(), &properties, Clock.unix_millis())?;
        let log = super::store::table(location)?.log_store();
        let put = log.write_commit_entry(0, CommitOrBytes::LogBytes(entry), uuid::Uuid::new_v4()).await;
        match put {
            Err(error) if !super::table::exists(location).await? => Err(failed(location, error.into())),
            _ => Ok(()),
        }
    }

    /// The table as it is now; `None`: there is none.
    ///
    /// # Errors
    /// User: another sink writes the table too, or it lacks columns. External: the store failed.
    pub async fn pin(&self) -> Result<Option<Pinned>> {
        let location = &self.config.location;
        let Some((table, txns)) = look(location).await? else { return Ok(None) };
        let ours = format!("/{}/generation", self.sink);
        if let Some(other) = txns.keys().find(|id| id.ends_with("/generation") && !id.ends_with(&ours)) {
            let other = other.trim_end_matches("/generation");
            let message = format!("the Delta table {location} is written by the sink {other} too");
            let hint =
                "Rows of an interval cannot be told apart by sink: give each sink a location of its own.";
            return Err(Error::user(message).hint(hint));
        }
        let snapshot = table.snapshot().map_err(|error| failed(location, error))?;
        let schema = snapshot.schema();
        let wanted = self.config.table_schema(&self.rows)?;
        if let Some(missing) = wanted.fields().iter().find(|field| schema.field(field.name()).is_none()) {
            let message = format!("the Delta table {location} has no column {} yet", missing.name());
            return Err(Error::user(message).hint("Start the pipeline once: it adds the column."));
        }
        let state_id = snapshot.metadata().configuration().get(STATE_PROPERTY).cloned();
        let (version, log) = (snapshot.version(), table.log_store());
        let app = stream_of(&txns, &self.sink).unwrap_or_else(|| self.app.clone());
        Ok(Some(Pinned { table, log, version, state_id, txns, app }))
    }

    /// A writer for the new rows of an interval.
    ///
    /// # Errors
    /// Those of [`DeltaWriter::new`].
    pub fn writer(&self) -> Result<DeltaWriter> {
        DeltaWriter::new(self.config.clone(), &self.rows, "backfill".to_owned())
    }

    /// Replaces the rows that the pinned version has in an interval.
    ///
    /// # Errors
    /// User: a file that cannot be rewritten. External: the store failed. The interval may be replaced then; repeating is
    /// safe.
    pub async fn replace(&self, base: &Pinned, wanted: &Replacement<'_>) -> Result<Replaced> {
        let change = self.change(base, wanted.interval).await?;
        let entry = self.entry(base, wanted, &change);
        match self.put(base, wanted.interval, &change, &entry).await? {
            Ok(version) => Ok(Replaced::Version { version, rows_before: change.rows_before }),
            Err(why) => {
                self.discard(&change.survivors).await;
                Ok(Replaced::Conflict(why))
            }
        }
    }

    /// Removes files that no commit names; what stays behind is for VACUUM.
    pub async fn discard(&self, files: &[PreparedFile]) {
        let Ok(located) = open(&self.config.location) else { return };
        for file in files {
            if let Err(error) = located.store.delete(&Path::from(file.path.as_str())).await {
                tracing::debug!(file = %file.path, %error, "a file that is not needed was not removed");
            }
        }
    }

    async fn change(&self, base: &Pinned, interval: Interval) -> Result<Change> {
        let snapshot = base.table.snapshot().map_err(|error| failed(&self.config.location, error))?;
        let now = Clock.unix_millis();
        let mut change =
            Change { removes: Vec::new(), names: BTreeSet::new(), survivors: Vec::new(), rows_before: 0 };
        let mut across = Vec::new();
        for file in snapshot.log_data().iter() {
            let found = extent(file.stats().as_deref(), &self.time);
            if !interval.touches(found.range) {
                continue;
            }
            let path = file.path().into_owned();
            if path.contains("://") || path.starts_with('/') {
                let message = format!("the file {path} is not in the folder of {}", self.config.location);
                return Err(
                    Error::user(message).hint("A shallow clone cannot be backfilled: copy the table.")
                );
            }
            let inside = found.range.is_some_and(|(least, greatest)| {
                interval.covers(&Interval { from: least, to: greatest.saturating_add(1) })
            });
            match found.rows.filter(|_| inside && file.deletion_vector_descriptor().is_none()) {
                Some(rows) => change.rows_before += rows,
                None => across.push(uri(&path)),
            }
            change.removes.push(remove(&file, &path, now)?);
            change.names.insert(file_name(&path).to_owned());
        }
        if !across.is_empty() {
            let (survivors, rows) = self.survivors(base, across, interval).await?;
            change.survivors = survivors;
            change.rows_before += rows;
        }
        Ok(change)
    }

    /// Writes the rows of some files that are not in the interval anew; gives the number of those that are.
    async fn survivors(
        &self,
        base: &Pinned,
        paths: Vec<String>,
        interval: Interval,
    ) -> Result<(Vec<PreparedFile>, u64)> {
        let location = &self.config.location;
        let schema = base.table.snapshot().map_err(|error| failed(location, error))?.schema();
        let schema: Schema = schema.as_ref().try_into_arrow()?;
        let added = self.config.added_columns();
        // Columns that the rows no longer have stay.
        let stored: Vec<_> =
            schema.fields().iter().filter(|field| !added.contains(field.name())).cloned().collect();
        let stored = Arc::new(Schema::new(stored));
        let names: Vec<&str> = stored.fields().iter().map(|field| field.name().as_str()).collect();
        let mut config = SessionConfig::new();
        config.options_mut().execution.parquet.schema_force_view_types = false;
        let session = SessionContext::new_with_config(config);
        let rows = session.read_table(provider_of_files(&base.table, paths)?)?.select_columns(&names)?;
        let mut rows = rows.execute_stream().await?;
        let mut writer = DeltaWriter::new(self.config.clone(), &stored, "backfill".to_owned())?;
        let mut before = 0;
        while let Some(batch) = rows.next().await {
            let batch = batch?;
            let inside = inside(&batch, &self.time, interval)?;
            before += inside.true_count() as u64;
            writer.write(&filter_record_batch(&batch, &not(&inside)?)?)?;
            if writer.wants_upload() {
                writer.upload(0).await?;
            }
        }
        Ok((writer.prepare(0)?.await?, before))
    }

    fn entry(&self, base: &Pinned, wanted: &Replacement<'_>, change: &Change) -> Bytes {
        let (now, interval) = (Clock.unix_millis(), wanted.interval);
        let (from, to) = (time_text(interval.from), time_text(interval.to));
        let rows = wanted.files.iter().map(|file| file.rows).sum::<u64>();
        let offsets: Vec<Value> =
            wanted.offsets.iter().map(|(topic, p, next)| json!([topic, p, next])).collect();
        let files = wanted.files.iter().chain(&change.survivors);
        let info = json!({
            "timestamp": now,
            "operation": "WRITE",
            "operationParameters": {
                "mode": "Overwrite",
                "predicate": format!("{0} >= '{from}' AND {0} < '{to}'", self.time),
            },
            "operationMetrics": {
                "numRemovedFiles": change.removes.len().to_string(),
                "numAddedFiles": files.clone().count().to_string(),
                "numOutputRows": files.clone().map(|file| file.rows).sum::<u64>().to_string(),
            },
            "backfill": {
                "from": from, "to": to, "rowsBefore": change.rows_before, "rowsAfter": rows,
                "backupVersion": wanted.backup_version, "offsets": offsets, "fingerprint": wanted.fingerprint,
            },
            "readVersion": base.version,
            "isBlindAppend": false,
            "engineInfo": ENGINE,
            "txnId": uuid::Uuid::new_v4().to_string(),
        });
        let (all, turn) = (format!("{}/backfill", base.app), base.turn() + 1);
        let one = format!("{all}/{from}/{to}");
        let backup = wanted.backup_version.and_then(|version| i64::try_from(version).ok());
        let mut txns = vec![
            (all, turn),
            (format!("{one}/fingerprint"), wanted.fingerprint),
            (format!("{one}/rows"), i64::try_from(rows).unwrap_or(i64::MAX)),
        ];
        txns.extend(backup.map(|version| (format!("{one}/backup"), version)));
        txns.push((one, turn));
        let txns = txns
            .into_iter()
            .map(|(id, version)| json!({ "txn": { "appId": id, "version": version, "lastUpdated": now } }));
        let removes = change.removes.iter().map(|remove| json!({ "remove": remove }));
        let adds = files.map(|file| json!({ "add": file.add }));
        let actions = std::iter::once(json!({ "commitInfo": info })).chain(txns).chain(removes).chain(adds);
        Bytes::from(actions.map(|action| format!("{action}\n")).collect::<String>())
    }

    /// Puts the entry behind everything that is in the log; or says what there forbids it.
    async fn put(
        &self,
        base: &Pinned,
        interval: Interval,
        change: &Change,
        entry: &Bytes,
    ) -> Result<Result<u64, String>> {
        let location = &self.config.location;
        let fail = |error: deltalake_core::DeltaTableError| failed(location, error);
        let mut version = base.version + 1;
        for _ in 0..MAX_OVERTAKEN {
            while let Some(found) = base.log.read_commit_entry(version).await.map_err(fail)? {
                // A PUT whose answer was lost.
                if found == *entry {
                    return Ok(Ok(version));
                }
                if let Some(why) = self.conflict(base, interval, change, &found)? {
                    return Ok(Err(why));
                }
                version += 1;
            }
            // An end that is no end: the table was removed, or its log cleaned up.
            match base.log.object_store(None).head(&commit_uri_from_version(Some(version - 1))).await {
                Ok(_) => {}
                Err(object_store::Error::NotFound { .. }) => {
                    return Ok(Err("the log was cleaned up".to_owned()));
                }
                Err(error) => return Err(fail(error.into())),
            }
            crash::point("backfill.before");
            let put = CommitOrBytes::LogBytes(entry.clone());
            match base.log.write_commit_entry(version, put, uuid::Uuid::new_v4()).await {
                Ok(()) => {
                    crash::point("backfill.after");
                    return Ok(Ok(version));
                }
                // Another entry, or ours, is there: the loop reads it.
                Err(TransactionError::VersionAlreadyExists(_)) => {}
                Err(error) => match base.log.read_commit_entry(version).await.map_err(fail)? {
                    Some(_) => {}
                    // It may still arrive: the files stay, for a vacuum to find.
                    None => return Err(fail(error.into())),
                },
            }
        }
        Err(Error::external(format!("others commit to {location} all the time")))
    }

    /// What an entry that came first does to the replacement.
    fn conflict(
        &self,
        base: &Pinned,
        interval: Interval,
        change: &Change,
        entry: &[u8],
    ) -> Result<Option<String>> {
        let found = lines(entry).map_err(|error| error.context(&self.config.location))?;
        let turns = format!("{}/backfill", base.app);
        let by = |app: &str| found.iter().any(|line| line.txn.as_ref().is_some_and(|txn| txn.app_id == app));
        let touched = |path: &str| change.names.contains(file_name(path));
        let why = if found.iter().any(|line| line.metadata.is_some() || line.protocol.is_some()) {
            "the table was changed"
        } else if by(&turns) {
            "another backfill replaced an interval"
        } else if found.iter().any(|line| {
            line.remove.as_ref().is_some_and(|file| touched(&file.path))
                || line.add.as_ref().is_some_and(|file| touched(&file.path))
        }) {
            "files of the interval were rewritten"
        } else if !by(&base.app)
            && found.iter().filter_map(|line| line.add.as_ref()).any(|add| {
                add.data_change && interval.touches(extent(add.stats.as_deref(), &self.time).range)
            })
        {
            "somebody else added rows to the interval"
        } else {
            return Ok(None);
        };
        Ok(Some(why.to_owned()))
    }
}

/// The `remove` action of a file. The log's own spelling of foreign paths is delta-rs's to know.
pub(super) fn remove(file: &LogicalFileView, path: &str, now: i64) -> Result<Value> {
    let name = file_name(path);
    let ours = name.starts_with("compacted-g")
        || name.starts_with("part-")
            && ["-g0", "-backfill-", "-replay-"].iter().any(|tag| name.contains(tag));
    if !ours || file.deletion_vector_descriptor().is_some() {
        let foreign = serde_json::to_value(file.remove_action(true));
        return foreign.map_err(|error| Error::internal("a remove action cannot be written").because(error));
    }
    Ok(json!({
        "path": uri(path),
        "deletionTimestamp": now,
        "dataChange": true,
        "extendedFileMetadata": true,
        "partitionValues": file.partition_values_map(),
        "size": file.size(),
    }))
}

/// Which rows are in the interval.
fn inside(batch: &RecordBatch, time: &str, interval: Interval) -> Result<BooleanArray> {
    let times = batch.column_by_name(time);
    let times = times.ok_or_else(|| Error::internal(format!("the rows lost their column {time}")))?;
    let times = cast(times, &timestamp_type())?;
    let times = times.as_primitive::<TimestampMicrosecondType>();
    let within = |row: usize| times.is_valid(row) && (interval.from..interval.to).contains(&times.value(row));
    Ok((0..times.len()).map(|row| Some(within(row))).collect())
}
