//! All rows of a sink's table replaced by those of another table in one commit: the end of a rebuild (DESIGN §6).
//!
//! A sink that is rebuilt in its place writes to a table of its own, the *stand-in*, in a folder of the sink's table
//! ([`stand_in`]); readers of the sink's table see nothing of it. When the stand-in has all that the pipeline has read, one
//! entry of the sink's log removes every file that is there and adds every file of the stand-in, which stay where they are.
//! The schema and the partitioning become those of the stand-in, as in Delta's own overwrite; identity and properties stay.
//! Older versions can be read as ever until VACUUM.
//!
//! The entry is of the sink's application, under the epoch that ended the rebuild: whoever finds that epoch in the log,
//! after a kill or as a zombie, swaps no more. It is a conditional PUT behind the version whose files it removes; if another
//! entry came first, all is decided anew from the table as it is then, so that nobody's rows stay beside the new ones.
//!
//! Intervals that were backfilled are gone with their rows: the entry voids the table's ledger of them, and counts as a
//! turn of it, so that a commit of a backfill that did not see it is a conflict. A backfill that began before it ends with
//! an error, as its rows are of the old SQL: it finds `<app>/rebuilt`, whose version is the epoch.
//!
//! A file of the stand-in that is gone, as by a foreign VACUUM of the table, which does not know it yet, is found before the
//! entry is put: then the rebuild begins anew.

use std::collections::BTreeMap;

use bytes::Bytes;
use deltalake_core::DeltaTable;
use deltalake_core::kernel::transaction::TransactionError;
use deltalake_core::logstore::CommitOrBytes;
use futures::TryStreamExt;
use object_store::{ObjectStoreExt, path::Path};
use serde_json::{Value, json};

use super::committer::{CommitProgress, Committed, STATE_PROPERTY};
use super::entries::Txn;
use super::ledger::VOID;
use super::log::transactions;
use super::replace::{ENGINE, look, remove};
use super::schema::check_features;
use super::store::{existing_table, failed, missing};
use crate::connectors::files::open_existing;
use crate::error::{Error, Result};
use crate::stream::clock::Clock;
use crate::stream::{START_OF_TIME, crash};

/// Others that may come first before this counts as failed.
const MAX_OVERTAKEN: u32 = 100;

/// Where the rows of a table are built that are to replace those of the table at `location`; each `generation` has its own.
pub fn stand_in(location: &str, generation: u64) -> String {
    format!("{}/rebuilt-{generation}", location.trim_end_matches('/'))
}

/// A table and its stand-in.
#[derive(Debug, Clone, Copy)]
pub struct Swap<'a> {
    pub location: &'a str,
    pub stand_in: &'a str,
    /// `<pipeline>/<sink>`.
    pub app: &'a str,
    /// Of the state that owns both.
    pub state_id: &'a str,
}

impl Swap<'_> {
    /// Whether the table has the rows of its stand-in, or newer ones.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn is_done(&self, epoch: u64) -> Result<bool> {
        let found = look(self.location).await?;
        Ok(found.is_some_and(|(_, txns)| committed(&txns, self.app, epoch)))
    }

    /// Puts the stand-in's rows in the place of all others, once. `None`: the stand-in, or a file of it, is gone; nothing is
    /// changed.
    ///
    /// # Errors
    /// Fenced: the table belongs to another state. External: the store failed; repeating it is safe.
    pub async fn swap(&self, epoch: u64, progress: &CommitProgress) -> Result<Option<Committed>> {
        let Some(built) = built(self.stand_in).await? else {
            return Ok(self.is_done(epoch).await?.then_some(Committed::AlreadyDone));
        };
        for _ in 0..MAX_OVERTAKEN {
            let (table, txns) = look(self.location).await?.ok_or_else(|| self.gone())?;
            if committed(&txns, self.app, epoch) {
                return Ok(Some(Committed::AlreadyDone));
            }
            let version = table.version().map_or(0, |at| at + 1);
            let entry = self.entry((&table, &txns), &built, epoch, progress)?;
            if !are_there(self.stand_in, &built).await? {
                return Ok(None);
            }
            crash::point("swap.before");
            if self.put(version, &entry).await? {
                crash::point("swap.after");
                return Ok(Some(Committed::Version(version)));
            }
        }
        Err(Error::external(format!("others commit to {} all the time", self.location)))
    }

    /// `false`: another entry has the version.
    async fn put(&self, version: u64, entry: &Bytes) -> Result<bool> {
        let fail = |error| failed(self.location, error);
        let log = super::store::table(self.location)?.log_store();
        let put = CommitOrBytes::LogBytes(entry.clone());
        match log.write_commit_entry(version, put, uuid::Uuid::new_v4()).await {
            Ok(()) => Ok(true),
            Err(error) => match log.read_commit_entry(version).await.map_err(fail)? {
                // A PUT whose answer was lost.
                Some(found) => Ok(found == *entry),
                None if matches!(error, TransactionError::VersionAlreadyExists(_)) => Ok(false),
                None => Err(fail(error.into())),
            },
        }
    }

    fn gone(&self) -> Error {
        let message = format!("the Delta table {} is gone", self.location);
        Error::external(message).hint("Bring it back, or start the pipeline under a new state.")
    }

    fn entry(
        &self,
        (table, txns): (&DeltaTable, &BTreeMap<String, Txn>),
        built: &Built,
        epoch: u64,
        progress: &CommitProgress,
    ) -> Result<Bytes> {
        let now = Clock.unix_millis();
        let removes = self.removes(table, now)?;
        let folder = self.stand_in.rsplit('/').next().unwrap_or_default();
        let adds = built.adds.values().map(|add| {
            let mut add = add.clone();
            add["path"] = json!(format!("{folder}/{}", add["path"].as_str().unwrap_or_default()));
            add["dataChange"] = json!(true);
            add
        });
        let rows: u64 = built.adds.values().filter_map(rows_of).sum();
        let info = json!({
            "timestamp": now,
            "operation": "WRITE",
            "operationParameters": { "mode": "Overwrite" },
            "operationMetrics": {
                "numRemovedFiles": removes.len().to_string(),
                "numAddedFiles": built.adds.len().to_string(),
                "numOutputRows": rows.to_string(),
            },
            "isBlindAppend": false,
            "engineInfo": ENGINE,
            "txnId": uuid::Uuid::new_v4().to_string(),
        });
        let epoch =
            i64::try_from(epoch).map_err(|_| Error::internal("an epoch of a rebuild is out of range"))?;
        // What was said of the old rows does not hold for the new ones.
        let complete_until = Some(progress.complete_until.unwrap_or(START_OF_TIME));
        let mut said = transactions(self.app, epoch, &CommitProgress { complete_until, ..progress.clone() });
        said.extend(voided(txns, self.app));
        said.push((format!("{}/rebuilt", self.app), epoch));
        let txns = said
            .into_iter()
            .map(|(id, version)| json!({ "txn": { "appId": id, "version": version, "lastUpdated": now } }));
        let metadata = self.metadata(table, &built.metadata)?;
        let head = std::iter::once(json!({ "commitInfo": info }))
            .chain(metadata.map(|metadata| json!({ "metaData": metadata })));
        let files = removes.into_iter().map(|remove| json!({ "remove": remove }));
        let actions = head.chain(txns).chain(files).chain(adds.map(|add| json!({ "add": add })));
        Ok(Bytes::from(actions.map(|action| format!("{action}\n")).collect::<String>()))
    }

    fn removes(&self, table: &DeltaTable, now: i64) -> Result<Vec<Value>> {
        let snapshot = table.snapshot().map_err(|error| failed(self.location, error))?;
        check_features(self.location, snapshot)?;
        let owner = snapshot.metadata().configuration().get(STATE_PROPERTY);
        if owner.map(String::as_str) != Some(self.state_id) {
            let message = format!("the Delta table {} belongs to another state now", self.location);
            let hint = "Another pipeline rebuilt it. Stop one of the two, or give them different locations.";
            return Err(Error::fenced(message).hint(hint));
        }
        let files = snapshot.log_data();
        files.iter().map(|file| remove(&file, &file.path(), now)).collect()
    }

    /// The table's metadata with the stand-in's columns; `None`: it has them.
    fn metadata(&self, table: &DeltaTable, built: &Value) -> Result<Option<Value>> {
        let snapshot = table.snapshot().map_err(|error| failed(self.location, error))?;
        let found = serde_json::to_value(snapshot.metadata());
        let mut found = found.map_err(|error| {
            Error::internal("the metadata of a Delta table cannot be written").because(error)
        })?;
        let schema = |metadata: &Value| -> Option<Value> {
            serde_json::from_str(metadata["schemaString"].as_str().unwrap_or_default()).ok()
        };
        if schema(&found) == schema(built) && found["partitionColumns"] == built["partitionColumns"] {
            return Ok(None);
        }
        for name in ["schemaString", "partitionColumns"] {
            found[name] = built[name].clone();
        }
        if let Some(fields) = found.as_object_mut() {
            fields.retain(|_, value| !value.is_null());
        }
        Ok(Some(found))
    }

    /// Removes the log of the stand-in, whose files are the table's now; what stays behind is harmless.
    pub async fn clean(&self) {
        if let Err(error) = forget(self.stand_in).await {
            tracing::debug!(table = self.stand_in, %error, "the log of a stand-in was not removed");
        }
    }
}

/// Removes the log of a stand-in: files that no table names go with a vacuum of the table that it stood for. The first entry
/// goes first: without it there is no table, however far this comes.
///
/// # Errors
/// External: the store failed.
pub async fn forget(stand_in: &str) -> Result<()> {
    let Some(located) = open_existing(stand_in)? else { return Ok(()) };
    let fail = |error: object_store::Error| failed(stand_in, error.into());
    let log = Path::from("_delta_log");
    let mut found: Vec<_> = located.store.list(Some(&log)).try_collect().await.map_err(fail)?;
    found.sort_by(|a, b| a.location.cmp(&b.location));
    for meta in found {
        located.store.delete(&meta.location).await.map_err(fail)?;
    }
    Ok(())
}

/// Whether a stand-in has all that its log names.
///
/// # Errors
/// External: the store failed.
pub async fn is_whole(stand_in: &str) -> Result<bool> {
    match built(stand_in).await? {
        Some(built) => are_there(stand_in, &built).await,
        None => Ok(false),
    }
}

/// What a stand-in holds, by its log: nobody but us wrote it, and it has no checkpoint. `None`: it is gone.
async fn built(stand_in: &str) -> Result<Option<Built>> {
    let Some(table) = existing_table(stand_in)? else { return Ok(None) };
    let log = table.log_store();
    let mut built = Built::default();
    for version in 0.. {
        let entry = log.read_commit_entry(version).await.map_err(|error| failed(stand_in, error))?;
        let Some(entry) = entry else { break };
        built.follow(&entry).map_err(|error| error.context(stand_in))?;
    }
    Ok((!built.metadata.is_null()).then_some(built))
}

async fn are_there(stand_in: &str, built: &Built) -> Result<bool> {
    let Some(located) = open_existing(stand_in)? else { return Ok(false) };
    let decoded = built.adds.keys().map(|path| {
        Path::from_url_path(path)
            .map_err(|error| Error::external(format!("{path} is no path")).because(error))
    });
    Ok(missing(&located, stand_in, decoded.collect::<Result<_>>()?).await?.is_empty())
}

/// The newest version of a stand-in.
#[derive(Default)]
struct Built {
    metadata: Value,
    /// By path, as the log spells it.
    adds: BTreeMap<String, Value>,
}

impl Built {
    fn follow(&mut self, entry: &[u8]) -> Result<()> {
        for line in serde_json::Deserializer::from_slice(entry).into_iter::<Value>() {
            let mut line = line.map_err(|error| {
                Error::external("an entry of the Delta log cannot be read").because(error)
            })?;
            let path = |action: &Value| action["path"].as_str().map(str::to_owned);
            if let Some(path) = path(&line["remove"]) {
                self.adds.remove(&path);
            }
            if let Some(path) = path(&line["add"]) {
                self.adds.insert(path, line["add"].take());
            }
            if line["metaData"].is_object() {
                self.metadata = line["metaData"].take();
            }
        }
        Ok(())
    }
}

fn rows_of(add: &Value) -> Option<u64> {
    let stats: Value = serde_json::from_str(add["stats"].as_str()?).ok()?;
    stats["numRecords"].as_u64()
}

fn committed(txns: &BTreeMap<String, Txn>, app: &str, epoch: u64) -> bool {
    txns.get(app).and_then(|txn| u64::try_from(txn.version).ok()).is_some_and(|newest| newest >= epoch)
}

/// The ledger of backfilled intervals without any.
fn voided(txns: &BTreeMap<String, Txn>, app: &str) -> Vec<(String, i64)> {
    let all = format!("{app}/backfill");
    let intervals = txns.keys().filter(|id| {
        id.strip_prefix(&all).is_some_and(|rest| rest.starts_with('/') && rest.ends_with("/fingerprint"))
    });
    let turn = txns.get(&all).map_or(1, |txn| txn.version + 1);
    intervals.map(|id| (id.clone(), VOID)).chain([(all.clone(), turn)]).collect()
}
