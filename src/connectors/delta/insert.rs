//! The rows of an interval appended to a table once, whoever repeats it.
//!
//! The commit carries the interval's id as an application transaction, `<pipeline>/<schedule>/insert/<from>/<to>`, whose
//! version is the number of rows. An entry with that transaction, wherever in the log, means that the rows are there. It
//! is put by a conditional PUT behind the newest version, every entry that came between is looked at, so of two processes
//! that insert the same interval one does, and the other finds that out. Appends and rewrites of others are passed over.

use std::collections::BTreeSet;
use std::sync::Arc;

use arrow::datatypes::{Schema, SchemaRef};
use bytes::Bytes;
use deltalake_core::kernel::StructType;
use deltalake_core::kernel::engine::arrow_conversion::{TryIntoArrow, TryIntoKernel};
use deltalake_core::logstore::{CommitOrBytes, LogStoreRef};
use object_store::{ObjectStoreExt, path::Path};
use serde_json::json;

use super::committer::STATE_PROPERTY;
use super::config::DeltaConfig;
use super::entries::{lines, transactions};
use super::log::create_entry;
use super::store::{existing_table, failed};
use super::{DeltaWriter, PreparedFile};
use crate::connectors::files::open;
use crate::connectors::partition::{Partitioning, Transform, time_text};
use crate::error::{Error, Result};
use crate::sql::options::Options;
use crate::stream::clock::Clock;
use crate::stream::{Micros, crash};

/// Commits of others that may come first before this counts as failed.
const MAX_OVERTAKEN: u32 = 1_000;
const ENGINE: &str = concat!("millstream/", env!("CARGO_PKG_VERSION"));

/// The table that rows are inserted into.
pub struct Inserter {
    config: DeltaConfig,
    /// Columns of the table.
    pub columns: SchemaRef,
    version: u64,
    log: LogStoreRef,
}

/// What became of an interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inserted {
    pub rows: u64,
    /// Somebody had inserted it before.
    pub before: bool,
}

/// The id of an interval's transaction.
pub fn transaction(pipeline: &str, schedule: &str, from: Micros, to: Micros) -> String {
    format!("{pipeline}/{schedule}/insert/{}/{}", time_text(from), time_text(to))
}

impl Inserter {
    /// The table at a location as it is now; with `columns`, it is made if there is none.
    ///
    /// # Errors
    /// User: columns that Delta cannot hold, a table that a pipeline writes. External: the store failed, or there is no
    /// table.
    pub async fn open(location: &str, columns: Option<&SchemaRef>) -> Result<Option<Self>> {
        let mut config = DeltaConfig::from_options(&mut Options::of("table", &[("location", location)]))?;
        if let Some(columns) = columns
            && !super::table::exists(location).await?
        {
            create(&config, columns).await?;
        }
        let fail = |error| failed(location, error);
        let Some(mut table) = existing_table(location)? else { return Ok(None) };
        if !table.verify_deltatable_existence().await.map_err(fail)? {
            return Ok(None);
        }
        table.load().await.map_err(fail)?;
        let snapshot = table.snapshot().map_err(fail)?;
        if snapshot.metadata().configuration().contains_key(STATE_PROPERTY) {
            let message = format!("the Delta table {location} is written by a stream");
            let hint =
                "Insert into a table of its own: CREATE TABLE … WITH (connector = 'delta', location = '…').";
            return Err(Error::user(message).hint(hint));
        }
        let schema: Schema = snapshot.schema().as_ref().try_into_arrow()?;
        let partitions = snapshot.metadata().partition_columns();
        config.partition_by = partitions
            .iter()
            .map(|column| Partitioning { column: column.clone(), transform: Transform::Identity })
            .collect();
        let (version, log) = (snapshot.version(), table.log_store());
        Ok(Some(Self { config, columns: Arc::new(schema), version, log }))
    }

    /// The rows of an interval that was inserted before.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn inserted(&self, transaction: &str) -> Result<Option<u64>> {
        let known = transactions(&self.config.location, &self.log, self.version).await?;
        Ok(known.get(transaction).map(|txn| txn.version.unsigned_abs()))
    }

    /// A writer for rows with the columns of the table.
    ///
    /// # Errors
    /// Those of [`DeltaWriter::new`].
    pub fn writer(&self) -> Result<DeltaWriter> {
        DeltaWriter::new(self.config.clone(), &self.columns, "insert".to_owned())
    }

    /// Commits the files of an interval, unless somebody did. `permit` is asked before each try.
    ///
    /// # Errors
    /// User: the table's columns were changed. External: the store failed; repeating is safe. Those of `permit`.
    pub async fn commit<F, P>(&self, transaction: &str, files: &[PreparedFile], permit: P) -> Result<Inserted>
    where
        F: Future<Output = Result<()>>,
        P: Fn() -> F,
    {
        let location = &self.config.location;
        let rows = files.iter().map(|file| file.rows).sum::<u64>();
        let entry = entry(transaction, files, rows);
        let mut version = self.version + 1;
        for _ in 0..MAX_OVERTAKEN {
            while let Some(found) =
                self.log.read_commit_entry(version).await.map_err(|error| failed(location, error))?
            {
                // A PUT whose answer was lost.
                if found == entry {
                    return Ok(Inserted { rows, before: false });
                }
                let found = lines(&found).map_err(|error| error.context(location))?;
                let same =
                    found.iter().filter_map(|line| line.txn.as_ref()).find(|txn| txn.app_id == transaction);
                if let Some(known) = same {
                    self.discard(files).await;
                    return Ok(Inserted { rows: known.version.unsigned_abs(), before: true });
                }
                if found.iter().any(|line| line.metadata.is_some() || line.protocol.is_some()) {
                    self.discard(files).await;
                    let message = format!("the Delta table {location} was changed meanwhile");
                    return Err(
                        Error::external(message).hint("It is tried again with the table as it is then.")
                    );
                }
                version += 1;
            }
            permit().await?;
            crash::point("insert.before");
            let put = CommitOrBytes::LogBytes(entry.clone());
            if let Err(error) = self.log.write_commit_entry(version, put, uuid::Uuid::new_v4()).await {
                // Another entry, or ours, is there: the loop reads it. Nothing is: it may still arrive.
                let found = self.log.read_commit_entry(version).await;
                if found.map_err(|error| failed(location, error))?.is_none() {
                    return Err(failed(location, error.into()));
                }
                continue;
            }
            crash::point("insert.after");
            return Ok(Inserted { rows, before: false });
        }
        Err(Error::external(format!("others commit to {location} all the time")))
    }

    /// Removes files that no commit names; what stays behind is for VACUUM.
    async fn discard(&self, files: &[PreparedFile]) {
        let Ok(located) = open(&self.config.location) else { return };
        for file in files {
            if let Err(error) = located.store.delete(&Path::from(file.path.as_str())).await {
                tracing::debug!(file = %file.path, %error, "a file that is not needed was not removed");
            }
        }
    }
}

async fn create(config: &DeltaConfig, columns: &SchemaRef) -> Result<()> {
    let location = &config.location;
    let schema: Result<StructType, _> = config.table_schema(columns)?.as_ref().try_into_kernel();
    let schema = schema.map_err(|error| {
        Error::user(format!("the columns of {location} cannot be stored in Delta")).because(error)
    })?;
    let mut properties = config.properties("");
    properties.remove(STATE_PROPERTY);
    let entry = create_entry(&schema, &config.partition_names(), &properties, Clock.unix_millis())?;
    let log = super::store::table(location)?.log_store();
    match log.write_commit_entry(0, CommitOrBytes::LogBytes(entry), uuid::Uuid::new_v4()).await {
        Err(error) if !super::table::exists(location).await? => Err(failed(location, error.into())),
        _ => Ok(()),
    }
}

fn entry(transaction: &str, files: &[PreparedFile], rows: u64) -> Bytes {
    let now = Clock.unix_millis();
    let info = json!({
        "timestamp": now,
        "operation": "WRITE",
        "operationParameters": { "mode": "Append" },
        "operationMetrics": { "numAddedFiles": files.len().to_string(), "numOutputRows": rows.to_string() },
        "isBlindAppend": true,
        "engineInfo": ENGINE,
        "txnId": uuid::Uuid::new_v4().to_string(),
    });
    let version = i64::try_from(rows).unwrap_or(i64::MAX);
    let txn = json!({ "txn": { "appId": transaction, "version": version, "lastUpdated": now } });
    let adds = files.iter().map(|file| json!({ "add": file.add }));
    let actions = [json!({ "commitInfo": info }), txn].into_iter().chain(adds);
    Bytes::from(actions.map(|action| format!("{action}\n")).collect::<String>())
}

/// Names of columns that an INSERT names and the table has not.
pub fn unknown_columns(columns: &Schema, named: &[String]) -> BTreeSet<String> {
    named.iter().filter(|name| columns.column_with_name(name).is_none()).cloned().collect()
}
