//! Tables of look-up joins: read whole at start, again every `refresh`.
//!
//! A table that cannot be read at start stops the start; one that cannot be read again stays as it was, with a warning.
//! A row is joined with the table as it is when the row comes: with `refresh`, a replay may see another one.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use datafusion::physical_plan::collect_partitioned;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::operators::lookup::LookupTable;
use crate::plan::tables::BoundedTable;
use crate::plan::{NodeId, NodeKind, StreamPlan};

/// The tables as they are now, by the node that joins them.
pub type Lookups = HashMap<NodeId, watch::Receiver<Arc<LookupTable>>>;

/// Reads the tables of a plan and keeps them fresh as long as somebody holds them.
///
/// # Errors
/// External: a table cannot be read. User: its keys cannot be hashed.
pub async fn open(plan: &StreamPlan) -> Result<Lookups> {
    let mut lookups = Lookups::new();
    for (node, kind) in plan.nodes.iter().map(|node| &node.kind).enumerate() {
        let NodeKind::Lookup { spec, table, .. } = kind else { continue };
        let loaded = load(table, spec.table_keys).await?;
        tracing::info!(table = table.name(), rows = loaded.len(), "table read");
        let (sender, receiver) = watch::channel(Arc::new(loaded));
        if let Some(every) = table.refresh {
            let (table, keys) = (table.clone(), spec.table_keys);
            #[expect(clippy::disallowed_methods, reason = "this is where the runtime spawns its tasks")]
            tokio::spawn(async move {
                while tokio::time::timeout(every, sender.closed()).await.is_err() {
                    match load(&table, keys).await {
                        Ok(loaded) => {
                            sender.send_replace(Arc::new(loaded));
                        }
                        Err(error) => tracing::warn!(%error, "the table stays as it was"),
                    }
                }
            });
        }
        lookups.insert(node, receiver);
    }
    Ok(lookups)
}

async fn load(table: &BoundedTable, keys: usize) -> Result<LookupTable> {
    let (session, plan) = table.opened().await?;
    let unreadable = |error: datafusion::error::DataFusionError| {
        Error::external(format!("table {} cannot be read", table.name()))
            .because(error.strip_backtrace())
            .hint("Check its location and its files.")
    };
    let frame = session.execute_logical_plan(plan).await.map_err(unreadable)?;
    let physical = frame.create_physical_plan().await.map_err(unreadable)?;
    let schema = physical.schema();
    // Partition by partition, so that several matches come in the same order each time.
    let parts = collect_partitioned(physical, session.task_ctx()).await.map_err(unreadable)?;
    let batches: Vec<RecordBatch> = parts.into_iter().flatten().collect();
    LookupTable::new(&schema, &batches, keys)
}
