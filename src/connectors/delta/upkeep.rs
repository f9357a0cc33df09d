//! The upkeep of one Delta table, in the background: checkpoints of its log, compaction, vacuum.
//!
//! Nothing here changes a row, and nothing here is needed for a commit: what fails is tried again later. Three things
//! keep it from doing harm beside commits, other writers and older processes of the same pipeline:
//!
//! **Compaction** reads small files that belong to a version of the table, writes their rows into one file, and commits
//! "remove those, add this" (`dataChange = false`) by one conditional PUT of a log entry. Every entry between the
//! version that was read and its own place is looked at first: if one touched a file that was read (a MERGE, a foreign
//! OPTIMIZE or DELETE) or changed schema, properties or protocol, the compaction is dropped and its file deleted. So no
//! row is lost or doubled, whoever else writes. Our own appends remove nothing: they go on behind it. A MERGE that it
//! overtook is made again on the new table.
//!
//! **Fence.** The log settles races between commits by itself, also with a process that was overtaken and does not know
//! it. What it does not do is to protect files that no entry names yet. Therefore each compaction carries the
//! generation as transaction `<pipeline>/<sink>/generation`, and one that finds a newer generation in the log (in the
//! version that it read, or before its place) is dropped. The manifests are asked as well, by the caller, before each
//! commit and deletion; that alone would leave a gap between question and deed.
//!
//! **Vacuum** deletes a file only if the newest version does not name it, it is older than `vacuum_retention`, and
//!
//! - a tombstone names it, and is older than `vacuum_retention` too; or
//! - it was written for an epoch (`part-<epoch>-g…`, `_staged/<epoch>-g…`) that the table has already: such a file can
//!   no longer be committed, as its epoch counts as done. What was prepared for a later epoch, by whatever process,
//!   stays: a manifest may name it; or
//! - it was written by a compaction of an older generation, and the log carries ours: that compaction can no longer be
//!   committed, as it would find our generation before its place; or
//! - it is another writer's (`part-….parquet` of other names) and older than a day as well, as such a writer, or a
//!   MERGE of our own, may be about to commit it.
//!
//! When `vacuum_retention` is longer than the table's log remembers removed files (`delta.deletedFileRetentionDuration`,
//! 7 days; a table that we create gets the option's value), only files with a tombstone go.
//!
//! Local files that a killed process left half written (`name#1`) go after an hour.
//!
//! Other names, hidden folders and the log are left alone. Entries of the log go by the table's own
//! `delta.logRetentionDuration` (30 days) once a checkpoint covers them. A foreign RESTORE to a version older than
//! `vacuum_retention` finds its files gone, as after any VACUUM.

use deltalake_core::kernel::transaction::PROTOCOL;
use deltalake_core::logstore::LogStoreRef;
use deltalake_core::table::state::DeltaTableState;
use deltalake_core::{DeltaTable, DeltaTableError};

use super::committer::STATE_PROPERTY;
use super::config::DeltaConfig;
use super::store::{failed, table};
use crate::connectors::files::{Located, open};
use crate::error::{Error, Result};
use crate::stream::clock::Clock;

/// What compaction did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Files that were merged.
    pub removed: usize,
    pub added: usize,
    /// Commits that were dropped as somebody else had touched the files.
    pub dropped: usize,
}

pub struct Upkeep {
    pub(super) config: DeltaConfig,
    /// `<pipeline>/<sink>` of each sink of the table.
    pub(super) apps: Vec<String>,
    state_id: String,
    pub(super) generation: u64,
    pub(super) located: Located,
    pub(super) log: LogStoreRef,
    pub(super) clock: Clock,
}

/// The table as upkeep found it.
pub(super) struct Found {
    pub table: DeltaTable,
    pub version: u64,
    /// The oldest of the sinks' newest epochs.
    pub epoch: Option<i64>,
    /// The newest generation in the log.
    pub generation: Option<u64>,
}

impl Found {
    pub fn snapshot(&self, location: &str) -> Result<&DeltaTableState> {
        self.table.snapshot().map_err(|error| failed(location, error))
    }
}

impl Upkeep {
    /// `sinks`: those of the pipeline that write the table; `generation`: that of this process.
    ///
    /// # Errors
    /// External: the location cannot be opened.
    pub fn new(
        config: &DeltaConfig,
        pipeline: &str,
        sinks: &[String],
        state_id: String,
        generation: u64,
    ) -> Result<Self> {
        let (located, log) = (open(&config.location)?, table(&config.location)?.log_store());
        let apps = sinks.iter().map(|sink| format!("{pipeline}/{sink}")).collect();
        Ok(Self { config: config.clone(), apps, state_id, generation, located, log, clock: Clock })
    }

    pub fn config(&self) -> &DeltaConfig {
        &self.config
    }

    /// Writes a checkpoint of the newest version; returns that version.
    ///
    /// # Errors
    /// External: the store failed. Nothing is lost then.
    pub async fn checkpoint(&self) -> Result<u64> {
        super::table::checkpoint(&self.config.location).await
    }

    /// The newest version, if we may work on it.
    ///
    /// # Errors
    /// Fenced: the table belongs to another state or to a newer process. External: the store failed, or the table has
    /// features that we do not know.
    pub(super) async fn look(&self) -> Result<Found> {
        let location = &self.config.location;
        let fail = |error: DeltaTableError| failed(location, error);
        let mut table = DeltaTable::new(self.log.clone());
        table.load().await.map_err(fail)?;
        let snapshot = table.snapshot().map_err(fail)?;
        PROTOCOL.can_write_to(snapshot).map_err(|error| fail(error.into()))?;
        let properties = snapshot.metadata().configuration();
        if properties.get(STATE_PROPERTY) != Some(&self.state_id) {
            return Err(Error::fenced(format!("the Delta table {location} belongs to another state now")));
        }
        if properties.get("delta.columnMapping.mode").is_some_and(|mode| mode != "none") {
            return Err(Error::external(format!("the Delta table {location} maps its columns' names")));
        }
        let (mut epochs, mut generation) = (Vec::new(), None);
        for app in &self.apps {
            let log = self.log.as_ref();
            epochs.push(snapshot.transaction_version(log, app).await.map_err(fail)?);
            let found = snapshot.transaction_version(log, format!("{app}/generation")).await.map_err(fail)?;
            generation = generation.max(found.and_then(|found| u64::try_from(found).ok()));
        }
        if generation.is_some_and(|found| found > self.generation) {
            return Err(self.overtaken());
        }
        let (version, epoch) = (snapshot.version(), epochs.into_iter().min().flatten());
        Ok(Found { table, version, epoch, generation })
    }

    pub(super) fn overtaken(&self) -> Error {
        Error::fenced(format!(
            "a newer process of the pipeline writes the Delta table {}",
            self.config.location
        ))
    }
}
