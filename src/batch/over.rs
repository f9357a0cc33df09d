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
use super::order::TotalOrder;
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
        session.add_analyzer_rule(Arc::new(TotalOrder));
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
