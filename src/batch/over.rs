//! A pipeline's relations as a batch: the same SQL with tables in the place of the sources.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use datafusion::datasource::MemTable;

use super::Answer;
use crate::error::{Error, Result};
use crate::plan::SourcePlan;
use crate::plan::session::batch_session;
use crate::plan::views::{ViewPlanner, quoted};
use crate::sql::{Catalog, SinkInput};

/// The rows of a source, view or sink (of its query), with `tables` (by name, all columns of the source) as the
/// sources' rows.
///
/// # Errors
/// User: the SQL. A user error too when an expression fails on a row: a batch has no dead letters.
pub async fn over(
    catalog: &Catalog,
    sources: &BTreeMap<String, Arc<SourcePlan>>,
    tables: &[(String, RecordBatch)],
    name: &str,
) -> Result<Answer> {
    let session = batch_session()?;
    for (source, rows) in tables {
        let table = MemTable::try_new(rows.schema(), vec![vec![rows.clone()]])?;
        session.register_table(quoted(source), Arc::new(table))?;
    }
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
    let frame = session.execute_logical_plan(plan).await?;
    let schema = Arc::new(frame.schema().as_arrow().clone());
    Ok(Answer { schema, batches: frame.collect().await? })
}
