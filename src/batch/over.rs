//! A pipeline's relations as a batch: the same SQL with tables in the place of the sources.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::datasource::{MemTable, provider_as_source};
use datafusion::logical_expr::LogicalPlan;
use datafusion::physical_plan::collect;
use datafusion::prelude::SessionContext;

use super::Answer;
use crate::error::{Error, Result};
use crate::plan::SourcePlan;
use crate::plan::session::batch_session;
use crate::plan::views::ViewPlanner;
use crate::sql::{Catalog, SinkInput};

/// A source, view or sink (its query) that is planned once and asked over several tables.
pub struct Relation {
    session: SessionContext,
    plan: LogicalPlan,
}

impl Relation {
    /// # Errors
    /// User: the SQL.
    pub async fn plan(
        catalog: &Catalog,
        sources: &BTreeMap<String, Arc<SourcePlan>>,
        name: &str,
    ) -> Result<Self> {
        let session = batch_session()?;
        let mut views = ViewPlanner::new(&session, catalog, sources);
        let plan = if let Some(sink) = catalog.sink(name) {
            match &sink.input {
                SinkInput::Relation { name, place } => views.relation(name, place).await?,
                SinkInput::Query(query) => views.query(query, &sink.place).await?,
            }
        } else if let Some(view) = catalog.view(name) {
            views.relation(name, &view.place).await?
        } else if let Some(source) = catalog.source(name) {
            views.relation(name, &source.place).await?
        } else {
            return Err(Error::internal(format!("{name} is no relation of the pipeline")));
        };
        Ok(Self { session, plan })
    }

    /// Its rows, with `rows` (all columns of the source) as the source's.
    ///
    /// # Errors
    /// User: an expression fails on a row, as a batch has no dead letters.
    pub async fn over(&self, source: &str, rows: &RecordBatch) -> Result<Answer> {
        let table = MemTable::try_new(rows.schema(), vec![vec![rows.clone()]])?;
        let table = provider_as_source(Arc::new(table));
        let plan = self.plan.clone().transform(|plan| match plan {
            LogicalPlan::TableScan(mut scan) if scan.table_name.table() == source => {
                scan.source = Arc::clone(&table);
                Ok(Transformed::yes(LogicalPlan::TableScan(scan)))
            }
            plan => Ok(Transformed::no(plan)),
        })?;
        // It is optimised already.
        let state = self.session.state();
        let plan = state.query_planner().create_physical_plan(&plan.data, &state).await?;
        let schema = plan.schema();
        Ok(Answer { schema, batches: collect(plan, self.session.task_ctx()).await? })
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, AsArray, Int32Array, Int64Array, StringArray, new_null_array};
    use arrow::datatypes::{Int64Type, UInt64Type};

    use super::*;
    use crate::plan::session::stream_session;
    use crate::sql::{SourceText, Variables};

    const SQL: &str = "CREATE SOURCE s (k BIGINT NOT NULL, id BIGINT, at TIMESTAMP, WATERMARK FOR at AS at)
            WITH (connector = 'kafka', bootstrap_servers = 'x:1', topic = 's', format = 'json');
        CREATE VIEW narrow AS SELECT at, k + 1 AS k, id AS number FROM s WHERE k < 9;
        CREATE VIEW plain AS SELECT number AS id, row_number() OVER (PARTITION BY k ORDER BY at) AS n FROM narrow;
        CREATE VIEW mixed AS SELECT id, row_number() OVER w AS n, count(*) OVER w AS peers, max(id) OVER w AS most FROM s
            WINDOW w AS (PARTITION BY k ORDER BY at);
        CREATE VIEW joined AS SELECT s.id, row_number() OVER (PARTITION BY s.k ORDER BY at) AS n
            FROM s LEFT JOIN (VALUES (1, 'a')) AS t (code, name) ON s.k = t.code;
        CREATE VIEW windows AS SELECT id, row_number() OVER (PARTITION BY k, window_start ORDER BY at) AS n
            FROM HOP(s, at, INTERVAL '1 minute', INTERVAL '1 minute');";

    fn input(source: &SourcePlan, rows: i64) -> RecordBatch {
        let count = rows as usize;
        let column = |name: &str, data_type| -> ArrayRef {
            match name {
                "k" => Arc::new(Int64Array::from_iter_values((0..rows).map(|row| row % 3))),
                "_topic" => Arc::new(StringArray::from(vec!["s"; count])),
                "_partition" => Arc::new(Int32Array::from(vec![0; count])),
                // The rows lie the other way round than their offsets.
                "_offset" | "id" => Arc::new(Int64Array::from_iter_values((0..rows).rev())),
                "at" => arrow::compute::cast(&Int64Array::from(vec![0; count]), data_type).unwrap(),
                _ => new_null_array(data_type, count),
            }
        };
        let fields = source.schema.fields().iter();
        let columns = fields.map(|field| column(field.name(), field.data_type())).collect();
        RecordBatch::try_new(Arc::clone(&source.schema), columns).unwrap()
    }

    /// Rows of one time: their numbers follow the offsets, however many there are.
    #[tokio::test]
    async fn ties_are_broken_by_offset() {
        let variables = Variables { overrides: BTreeMap::new(), environment: &|_| None };
        let catalog = Catalog::load(&[SourceText::new("f", SQL)], &variables).unwrap();
        let session = stream_session().unwrap();
        let source = Arc::new(SourcePlan::new(&session, &catalog.sources[0]).unwrap());
        let input = input(&source, 600);
        let sources = BTreeMap::from([("s".to_owned(), source)]);
        for view in ["plain", "mixed", "joined", "windows"] {
            let relation = Relation::plan(&catalog, &sources, view).await.unwrap();
            let answer = relation.over("s", &input).await.unwrap();
            let mut found = 0;
            for batch in &answer.batches {
                let (id, n) = (
                    batch.column(0).as_primitive::<Int64Type>(),
                    batch.column(1).as_primitive::<UInt64Type>(),
                );
                for row in 0..batch.num_rows() {
                    // Every third offset has the same key.
                    assert_eq!(n.value(row), id.value(row) as u64 / 3 + 1, "{view}");
                    found += 1;
                }
            }
            assert_eq!(found, 600, "{view}");
        }
    }
}
