//! A backup against the accounts of its source: nothing else has its rows.

use std::sync::Arc;

use arrow::array::AsArray;
use arrow::datatypes::Int64Type;
use datafusion::datasource::MemTable;
use serde::Serialize;

use super::{Report, Verifier};
use crate::batch::letters::{Record, State};
use crate::connectors::delta::table::{AsOf, provider_as_of};
use crate::error::{Error, Result};
use crate::plan::session::batch_session_within;

/// A table that stores the source itself.
#[derive(Debug, Default, Serialize)]
pub struct BackupReport {
    pub rows: i64,
    /// Rows of the source that the state has counted as accepted; `None`: the table is ahead of the state.
    pub accepted: Option<i64>,
    /// Rows whose origin stands there already.
    pub duplicates: i64,
    /// Rows at or beyond the committed offsets.
    pub beyond: i64,
    /// Accepted rows that are not there.
    pub missing: i64,
    /// Offsets without a row between the first and the last: dead letters, tombstones, control records, or lost.
    pub offsets_without_row: i64,
}

impl BackupReport {
    pub fn differences(&self) -> i64 {
        self.duplicates + self.beyond + self.missing
    }
}

impl Verifier<'_> {
    pub async fn backup(&self, location: &str, report: &mut Report) -> Result<()> {
        if self.sink.schema.column_with_name("_offset").is_none() {
            let message = format!("{} does not say which record a row comes from", self.sink.name);
            return Err(Error::user(message).hint(
                "Store the metadata columns: leave metadata = 'none' out and write to a new location.",
            ));
        }
        let (committed, state) = self.pinned(location, &self.sink.name).await?;
        let (mut backup, replayed) =
            self.counted(location, committed.version, &committed.offsets, &state, report).await?;
        let same_epoch =
            committed.epoch == state.manifest.data_epoch.and_then(|epoch| i64::try_from(epoch).ok());
        let accounts = state.manifest.sources.get(&self.source.name).map(|source| source.accounts);
        match accounts.filter(|_| same_epoch && state.manifest.copied.is_none()) {
            Some(accounts) => {
                let accepted = i64::try_from(accounts.accepted).unwrap_or(i64::MAX);
                backup.accepted = Some(accepted);
                backup.missing = (accepted - (backup.rows - backup.duplicates - replayed)).max(0);
            }
            None => report.cannot_prove(
                "that no row is missing: the table and the newest checkpoint are of different epochs",
            ),
        }
        report.cannot_prove("the values of a backup: nothing else has them");
        if self.request.from.or(self.request.to).is_some() || self.request.sample.is_some() {
            report.cannot_prove("a part of a backup: its rows are counted as a whole");
        }
        report.backup = Some(backup);
        Ok(())
    }

    /// What the table says by itself, and how many origins a replay appended.
    async fn counted(
        &self,
        location: &str,
        version: u64,
        offsets: &[Record],
        state: &State,
        report: &mut Report,
    ) -> Result<(BackupReport, i64)> {
        let session = batch_session_within(self.request.memory)?;
        session.register_table("__table", provider_as_of(location, AsOf::Version(version)).await?)?;
        let replayed = state.replayed().await?;
        report.replayed = replayed.num_rows();
        let replayed = MemTable::try_new(replayed.schema(), vec![vec![replayed]])?;
        session.register_table("__replayed", Arc::new(replayed))?;
        let place = |(topic, partition, next): &Record| {
            let topic = topic.replace('\'', "''");
            format!("(_topic = '{topic}' AND _partition = {partition} AND _offset < {next})")
        };
        let below: Vec<String> = offsets.iter().map(place).collect();
        let below = if below.is_empty() { "FALSE".to_owned() } else { below.join(" OR ") };
        // A replayed record may lie anywhere.
        let sql = format!(
            "WITH origins AS (
                 SELECT _topic, _partition, _offset, count(*) AS n FROM __table
                 GROUP BY _topic, _partition, _offset),
             partitions AS (
                 SELECT max(_offset) - min(_offset) + 1 - count(*) AS holes FROM origins
                 GROUP BY _topic, _partition)
             SELECT CAST(coalesce(sum(n), 0) AS BIGINT), CAST(coalesce(sum(n - 1), 0) AS BIGINT),
                    CAST(coalesce(sum(n) FILTER (WHERE ({below}) IS NOT TRUE), 0) AS BIGINT),
                    CAST((SELECT coalesce(sum(holes), 0) FROM partitions) AS BIGINT),
                    CAST((SELECT count(*) FROM origins AS o WHERE EXISTS (
                        SELECT 1 FROM __replayed AS r WHERE r.topic = o._topic AND r.\"partition\" = o._partition
                            AND r.\"offset\" = o._offset)) AS BIGINT)
             FROM origins"
        );
        let rows = session.sql(&sql).await?.collect().await?;
        let number = |at: usize| {
            rows.iter()
                .find(|batch| batch.num_rows() > 0)
                .map_or(0, |batch| batch.column(at).as_primitive::<Int64Type>().value(0))
        };
        let counted = BackupReport {
            rows: number(0),
            duplicates: number(1),
            beyond: number(2),
            offsets_without_row: number(3),
            ..BackupReport::default()
        };
        Ok((counted, number(4)))
    }
}
