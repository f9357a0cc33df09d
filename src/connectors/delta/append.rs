//! Rows appended to a sink's table beside its running pipeline, each set of rows once.
//!
//! The pipeline's own commits are told apart by its application `<pipeline>/<sink>`; these are of
//! `<pipeline>/<sink>/replay`, whose transaction version counts them. The caller pins the table, leaves out the rows that
//! the pinned version holds, and appends: the commit takes its place behind whatever others append meanwhile, but not
//! behind another one of the same application or a change of the table. Then nothing is appended, and the caller pins
//! anew. So two at once never append the same row both.
//!
//! The entry is put as the committer puts its own (a conditional PUT whose lost answer the log settles), so the running
//! committer follows it as any foreign append; delta-rs' commit would do the same with its own retries on top.

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use deltalake_core::logstore::{CommitOrBytes, LogStoreRef};
use object_store::{ObjectStoreExt, path::Path};

use super::committer::{CommitProgress, STATE_PROPERTY};
use super::config::DeltaConfig;
use super::log::{commit_entry, read_entry};
use super::store::{existing_table, failed};
use super::writer::DeltaWriter;
use super::{DeltaCommitter, PreparedFile};
use crate::connectors::files::{Located, open};
use crate::error::{Error, Result};
use crate::stream::clock::Clock;

/// Commits of others that may come first before this counts as failed.
const MAX_OVERTAKEN: u32 = 1_000;

/// Appends to the table of one sink.
pub struct Appender {
    config: DeltaConfig,
    rows: SchemaRef,
    app: String,
}

/// A version of the table, and how often was appended up to it.
#[derive(Debug, Clone)]
pub struct Pinned {
    pub version: u64,
    turn: i64,
    /// The state that owns the table.
    pub state_id: Option<String>,
}

impl Appender {
    /// `rows`: schema of the rows. `None`: there is no table yet.
    ///
    /// # Errors
    /// User: the table has other columns. External: the store failed.
    pub async fn open(
        config: &DeltaConfig,
        rows: &SchemaRef,
        pipeline: &str,
        sink: &str,
    ) -> Result<Option<Self>> {
        if !super::table::exists(&config.location).await? {
            return Ok(None);
        }
        // Checks the columns and features of the table as the sink itself does.
        DeltaCommitter::open(config, rows, pipeline, sink).await?;
        let app = format!("{pipeline}/{sink}/replay");
        Ok(Some(Self { config: config.clone(), rows: rows.clone(), app }))
    }

    /// The table as it is now.
    ///
    /// # Errors
    /// External: the store failed, or the table is gone.
    pub async fn pin(&self) -> Result<Pinned> {
        let location = &self.config.location;
        let mut table = existing_table(location)?
            .ok_or_else(|| Error::external(format!("the Delta table {location} is gone")))?;
        table.load().await.map_err(|error| failed(location, error))?;
        let snapshot = table.snapshot().map_err(|error| failed(location, error))?;
        let log = table.log_store();
        let turn = snapshot.transaction_version(log.as_ref(), &self.app).await;
        Ok(Pinned {
            version: snapshot.version(),
            turn: turn.map_err(|error| failed(location, error))?.unwrap_or(0),
            state_id: snapshot.metadata().configuration().get(STATE_PROPERTY).cloned(),
        })
    }

    /// Appends rows that the pinned version does not hold; gives the version that holds them. `None`: somebody else
    /// appended so, or changed the table; nothing is appended.
    ///
    /// # Errors
    /// External: the store failed. The rows may be appended then; pinning anew shows it.
    pub async fn append(&self, pinned: &Pinned, rows: &RecordBatch) -> Result<Option<u64>> {
        let location = &self.config.location;
        let turn = pinned.turn + 1;
        let mut writer = DeltaWriter::new(self.config.clone(), &self.rows, "replay".to_owned())?;
        writer.write(rows)?;
        let files = writer.prepare(turn.unsigned_abs())?.await?;
        let entry = commit_entry(&self.app, turn, &files, &CommitProgress::default(), Clock.unix_millis());
        let log: LogStoreRef = super::store::table(location)?.log_store();
        let mut version = pinned.version;
        for _ in 0..MAX_OVERTAKEN {
            version += 1;
            let id = uuid::Uuid::new_v4();
            let put = log.write_commit_entry(version, CommitOrBytes::LogBytes(entry.clone()), id).await;
            let Err(error) = put else { return Ok(Some(version)) };
            let found = log.read_commit_entry(version).await.map_err(|e| failed(location, e))?;
            // Not there although the PUT failed: the store is at fault, or the log was cleaned up behind our back.
            let Some(found) = found else { return Err(failed(location, error.into())) };
            if found == entry {
                return Ok(Some(version));
            }
            let seen = read_entry(&found, &self.app).map_err(|error| error.context(location))?;
            if seen.changed || seen.epoch.is_some() {
                discard(&open(location)?, &files).await;
                return Ok(None);
            }
        }
        discard(&open(location)?, &files).await;
        Err(Error::external(format!("others commit to {location} all the time")))
    }
}

/// Removes files that no commit names; what stays behind is for VACUUM.
async fn discard(located: &Located, files: &[PreparedFile]) {
    for file in files {
        if let Err(error) = located.store.delete(&Path::from(file.path.as_str())).await {
            tracing::debug!(file = %file.path, %error, "a file that is not needed was not removed");
        }
    }
}
