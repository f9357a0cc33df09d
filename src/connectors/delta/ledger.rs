//! The ledger of backfilled intervals, which the table itself keeps (see [`replace`](super::replace)), and what can still
//! be read of the backup that they were computed from.

use std::collections::{BTreeMap, HashSet};

use object_store::ObjectStoreExt;
use object_store::path::Path;

use super::entries::{self, Added, Txn, micros, transactions};
use super::replace::Interval;
use super::store::{existing_table, failed};
use super::table::{AsOf, load};
use crate::error::{Error, Result};

/// The fingerprint of an interval whose rows were replaced with the whole table: it is no longer in the ledger.
pub const VOID: i64 = 0;

/// What the ledger says of an interval that was replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    pub interval: Interval,
    pub turn: i64,
    pub fingerprint: i64,
    pub rows: Option<i64>,
    pub backup_version: Option<u64>,
    /// ms since the epoch.
    pub finished_at: Option<i64>,
}

/// Stands for the SQL of a sink, and for the state that owns its table.
pub fn fingerprint(sql: &str, owner: Option<&str>) -> i64 {
    // FNV-1a: the same in every build.
    let bytes = sql.bytes().chain([0]).chain(owner.unwrap_or_default().bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    (hash >> 1) as i64
}

/// The ledger of the sink `app` (`<pipeline>/<sink>`) in a version of its table.
///
/// # Errors
/// External: the store failed, or an entry of the log is damaged or gone.
pub async fn ledger(location: &str, app: &str, version: u64) -> Result<Vec<Finished>> {
    let table = existing_table(location)?;
    let table = table.ok_or_else(|| Error::external(format!("the Delta table {location} is gone")))?;
    Ok(of_transactions(&transactions(location, &table.log_store(), version).await?, app))
}

pub(super) fn of_transactions(txns: &BTreeMap<String, Txn>, app: &str) -> Vec<Finished> {
    let prefix = format!("{app}/backfill/");
    let fact = |id: &str, name: &str| txns.get(&format!("{id}/{name}")).map(|txn| txn.version);
    let of = |(id, txn): (&String, &Txn)| {
        let (from, to) = id.strip_prefix(&prefix)?.split_once('/')?;
        Some(Finished {
            interval: Interval { from: micros(from)?, to: micros(to)? },
            turn: txn.version,
            fingerprint: fact(id, "fingerprint").filter(|fingerprint| *fingerprint != VOID)?,
            rows: fact(id, "rows"),
            backup_version: fact(id, "backup").and_then(|version| u64::try_from(version).ok()),
            finished_at: txn.updated,
        })
    };
    txns.iter().filter_map(of).collect()
}

/// The rows that a table got after one version up to another. `None`: its log no longer tells.
///
/// # Errors
/// Those of [`entries::added`].
pub async fn added(location: &str, after: u64, until: u64, time: &str) -> Result<Option<Vec<Added>>> {
    let table = existing_table(location)?;
    let table = table.ok_or_else(|| Error::external(format!("the Delta table {location} is gone")))?;
    entries::added(location, &table.log_store(), after, until, time).await
}

/// Whether all files of a version are still there: those that no newer version has may have been vacuumed.
///
/// # Errors
/// External: there is no table, or the store failed.
pub async fn readable(location: &str, version: u64) -> Result<bool> {
    let newest = load(location, AsOf::Newest).await?;
    let Ok(old) = load(location, AsOf::Version(version)).await else { return Ok(false) };
    let files = |table: &deltalake_core::DeltaTable| -> Result<HashSet<Path>> {
        let snapshot = table.snapshot().map_err(|error| failed(location, error))?;
        Ok(snapshot.log_data().iter().map(|file| file.object_store_path()).collect())
    };
    let (kept, store) = (files(&newest)?, newest.log_store().object_store(None));
    for path in files(&old)?.difference(&kept) {
        match store.head(path).await {
            Ok(_) => {}
            Err(object_store::Error::NotFound { .. }) => return Ok(false),
            Err(error) => return Err(failed(location, error.into())),
        }
    }
    Ok(true)
}
