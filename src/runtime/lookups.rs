//! Tables of look-up joins: read whole at start, again every `refresh`.
//!
//! A table that cannot be read at start stops the start; one that cannot be read again stays as it was, with a warning.
//! A row is joined with the table as it is when the row comes: with `refresh`, a replay may see another one. Of a table
//! without `refresh` the manifest keeps a digest, so that a start (and `millstream plan`) can say that its rows are others
//! than before: what was joined stays as it is, what comes is joined with the new ones.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use arrow::row::{RowConverter, SortField};
use datafusion::physical_plan::collect_partitioned;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::operators::lookup::LookupTable;
use crate::plan::tables::BoundedTable;
use crate::plan::{NodeId, NodeKind, StreamPlan};
use crate::state::keys::{hash_bytes, mix};

/// The tables as they are now, by the node that joins them.
pub type Lookups = HashMap<NodeId, watch::Receiver<Arc<LookupTable>>>;
/// Of tables without `refresh`: a digest of the rows, by name and the way in which it is read.
pub type Digests = BTreeMap<String, String>;

/// Reads the tables of a plan and keeps them fresh as long as somebody holds them.
///
/// # Errors
/// External: a table cannot be read. User: its keys cannot be hashed.
pub async fn open(plan: &StreamPlan) -> Result<(Lookups, Digests)> {
    let (mut lookups, mut digests) = (Lookups::new(), Digests::new());
    for (node, kind) in plan.nodes.iter().map(|node| &node.kind).enumerate() {
        let NodeKind::Lookup { spec, table, .. } = kind else { continue };
        let (loaded, digest) = load(table, spec.table_keys).await?;
        tracing::info!(table = table.name(), rows = loaded.len(), "table read");
        let (sender, receiver) = watch::channel(Arc::new(loaded));
        if let Some(digest) = digest.filter(|_| table.refresh.is_none() && !table.tables.is_empty()) {
            // The same table may be read in several ways.
            let way = hash_bytes(table.plan.display_indent().to_string().as_bytes());
            digests.insert(format!("{} [{way:016x}]", table.name()), digest);
        }
        if let Some(every) = table.refresh {
            let (table, keys) = (table.clone(), spec.table_keys);
            #[expect(clippy::disallowed_methods, reason = "this is where the runtime spawns its tasks")]
            tokio::spawn(async move {
                while tokio::time::timeout(every, sender.closed()).await.is_err() {
                    match load(&table, keys).await {
                        Ok((loaded, _)) => {
                            sender.send_replace(Arc::new(loaded));
                        }
                        Err(error) => tracing::warn!(%error, "the table stays as it was"),
                    }
                }
            });
        }
        lookups.insert(node, receiver);
    }
    Ok((lookups, digests))
}

/// The digests of the tables as they are now.
///
/// # Errors
/// As [`open`].
pub async fn digests(plan: &StreamPlan) -> Result<Digests> {
    Ok(open(plan).await?.1)
}

/// Names of the tables whose rows are not those of before.
pub fn changed(before: &Digests, now: &Digests) -> Vec<String> {
    let other = |(name, digest): &(&String, &String)| before.get(*name).is_some_and(|known| known != *digest);
    let name = |(name, _): (&String, &String)| name.split(" [").next().unwrap_or_default().to_owned();
    let names: BTreeSet<String> = now.iter().filter(other).map(name).collect();
    names.into_iter().collect()
}

/// The same for the same rows in any order.
fn digest(schema: &SchemaRef, batches: &[RecordBatch]) -> Result<String> {
    let fields = schema.fields().iter().map(|field| SortField::new(field.data_type().clone())).collect();
    let converter = RowConverter::new(fields)?;
    let (mut sum, mut count) = (0u64, 0);
    for batch in batches {
        for row in &converter.convert_columns(batch.columns())? {
            sum = sum.wrapping_add(mix(hash_bytes(row.as_ref())));
        }
        count += batch.num_rows();
    }
    Ok(format!("{count}-{sum:016x}"))
}

async fn load(table: &BoundedTable, keys: usize) -> Result<(LookupTable, Option<String>)> {
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
    // Values that no order is known for are not looked after.
    let digest = digest(&schema, &batches).ok();
    Ok((LookupTable::new(&schema, &batches, keys)?, digest))
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Float64Array, StringArray};

    use super::*;

    #[test]
    fn a_digest_knows_the_rows_and_not_their_order() {
        let batch = |names: &[Option<&str>], scores: &[f64]| {
            let names: ArrayRef = Arc::new(StringArray::from(names.to_vec()));
            let scores: ArrayRef = Arc::new(Float64Array::from(scores.to_vec()));
            RecordBatch::try_from_iter_with_nullable([("name", names, true), ("score", scores, true)])
                .unwrap()
        };
        let of = |batches: &[RecordBatch]| digest(&batches[0].schema(), batches).unwrap();
        let whole = of(&[batch(&[Some("a"), None, Some("b")], &[1.0, 2.0, 3.0])]);
        assert_eq!(of(&[batch(&[Some("b")], &[3.0]), batch(&[None, Some("a")], &[2.0, 1.0])]), whole);
        for other in [
            batch(&[Some("a"), None, Some("b")], &[1.0, 2.0, 3.5]),
            batch(&[Some("b"), None, Some("a")], &[1.0, 2.0, 3.0]),
            batch(&[Some("a"), None], &[1.0, 2.0]),
            batch(&[Some("a"), None, Some("b"), Some("b")], &[1.0, 2.0, 3.0, 3.0]),
        ] {
            assert_ne!(of(&[other]), whole);
        }
        let digests =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        let (before, now) = (
            digests(&[("a [x]", "1"), ("b [x]", "2"), ("b [y]", "2")]),
            digests(&[("a [x]", "1"), ("b [x]", "3"), ("b [y]", "3"), ("a [new]", "4")]),
        );
        assert_eq!(changed(&before, &now), ["b"]);
    }
}
