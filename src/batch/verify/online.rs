//! An online store against the newest row of each key.

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::Schema;
use datafusion::datasource::MemTable;

use super::compare::{Kind, Side, compare, quote};
use super::pins::Committed;
use super::{Report, Verifier};
use crate::batch::history::Cut;
use crate::batch::newest;
use crate::error::Result;
use crate::plan::OnlineKind;
use crate::plan::session::batch_session_within;
use crate::stream::Micros;
use crate::stream::clock::Clock;

impl Verifier<'_> {
    pub async fn online(
        &self,
        store: &OnlineKind,
        ttl_micros: Option<i64>,
        report: &mut Report,
    ) -> Result<()> {
        // The backup first: rows reach the store before a checkpoint holds them.
        let (backup, state) = self.backup_version(&Committed::default(), report).await?;
        self.changed_sql(&state.manifest, report);
        let rows = self.stored(store).await?;
        let left_out = self.left_out(&state, report).await?;
        let watermark = backup.as_ref().and_then(|backup| backup.watermark);
        let cut = match backup {
            Some(backup) => Cut {
                version: Some(backup.version),
                below: Some(backup.offsets),
                without: Some(left_out.all()?),
            },
            None => Cut::default(),
        };
        let session = batch_session_within(self.request.memory)?;
        // Whatever the view says of NULL: a field of a hash may be missing.
        let fields = self.sink.schema.fields().iter().map(|field| field.as_ref().clone().with_nullable(true));
        let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        session.register_table("__table", Arc::new(MemTable::try_new(schema, vec![rows])?))?;
        let all = self.answer(&session, &cut, None, report).await?;
        session.register_table("__all", all.frame.into_view())?;
        let newest = session.sql(&self.newest_sql()).await?;
        session.register_table("__answer", newest.into_view())?;
        let mut plan = self.plan(Side { name: "__table", weight: "1" }, None)?;
        plan.key = self.sink.key.clone();
        plan.single_precision = all.inexact;
        let ended = state.manifest.stopped || state.manifest.closed;
        if !ended {
            report.cannot_prove("keys whose rows are newer than the backup: the pipeline is not stopped");
        }
        let now = Clock.unix_millis().saturating_mul(1_000);
        let gone = |time: Option<Micros>| {
            time.zip(ttl_micros).is_some_and(|(time, ttl)| time.saturating_add(ttl) <= now)
        };
        // Rows that the backup has not yet are not below its watermark, unless late ones count.
        let from = watermark.filter(|_| self.closes());
        let newer =
            |time: Option<Micros>| !ended && from.is_none_or(|from| time.is_none_or(|time| time >= from));
        let excuse = |kind: Kind, table: Option<Micros>, answer: Option<Micros>| match kind {
            Kind::Missing => gone(answer),
            Kind::Changed => newer(table) && (table.is_none() || table >= answer),
            Kind::Extra => newer(table),
        };
        report.compared = Some(compare(&session, &plan, &excuse).await?);
        Ok(())
    }

    async fn stored(&self, store: &OnlineKind) -> Result<Vec<RecordBatch>> {
        match store {
            #[cfg(feature = "redis")]
            OnlineKind::Redis(config) => {
                crate::connectors::redis::scan::read_all(config, &self.sink.schema).await
            }
            OnlineKind::Memory | OnlineKind::Held(_) => newest::read(self.sink, self.request.state).await,
        }
    }

    /// The newest row of each key. Rows of one time keep the order of their origins; behind a group there is none, and
    /// all columns decide.
    fn newest_sql(&self) -> String {
        let name = |at: &usize| quote(self.sink.schema.field(*at).name());
        let all: Vec<usize> = (0..self.sink.schema.fields().len()).collect();
        let key: Vec<String> = self.sink.key.iter().map(name).collect();
        let mut order: Vec<usize> = self.sink.order.into_iter().collect();
        if self.grouped() || order.is_empty() {
            order.extend(all.iter().filter(|at| Some(**at) != self.sink.order));
        }
        let order: Vec<String> = order.iter().map(name).collect();
        let columns: Vec<String> = all.iter().map(name).collect();
        let present: Vec<String> = key.iter().map(|key| format!("{key} IS NOT NULL")).collect();
        format!(
            "SELECT {columns} FROM (
                 SELECT {columns}, row_number() OVER (PARTITION BY {key} ORDER BY {}) AS __number,
                        count(*) OVER (PARTITION BY {key}) AS __count
                 FROM __all WHERE {}) AS numbered
             WHERE CAST(__number AS BIGINT) = __count",
            order.join(", "),
            present.join(" AND "),
            columns = columns.join(", "),
            key = key.join(", "),
        )
    }
}
