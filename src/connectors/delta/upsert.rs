//! `mode = 'upsert'`: one row per key, by MERGE.
//!
//! The net changes of an epoch, one row per key, are *staged* in Parquet files beside the table (`_staged/`, which
//! readers and VACUUM leave alone) and named in the manifest like other prepared files. The commit merges them: a key
//! that is there is replaced or deleted, another one inserted. The commit carries the epoch as application transaction,
//! so replaying it does nothing, and a MERGE that another writer overtook is made again on the new table. Staged files
//! are removed once their commit is acknowledged.
//!
//! With `partition_by` a row whose partition values have changed moves: its key is looked for in all partitions, but for
//! those whose values follow from the key. The empty text in a partition column becomes NULL, as the protocol cannot tell
//! them apart; a key of it is found again, as no key column is NULL.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, BooleanArray, RecordBatch, StringArray};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::common::{Column, ScalarValue, TableReference};
use datafusion::logical_expr::{Expr, lit, not};
use datafusion::prelude::SessionContext;
use deltalake_core::DeltaTable;
use deltalake_core::kernel::Transaction;
use deltalake_core::kernel::transaction::CommitProperties;
use object_store::{ObjectStoreExt, PutPayload, path::Path};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::PreparedFile;
use super::config::DeltaConfig;
use super::store::failed;
use crate::connectors::files::{Located, open};
use crate::connectors::partition::{Partitioning, Transform};
use crate::error::{Error, Result};

/// A BOOLEAN column of staged rows: the key is to be deleted.
const DELETED: &str = "__deleted";

/// Writes the staged files of one shard.
pub struct Stager {
    located: Located,
    location: String,
    /// Columns of the table, then [`DELETED`].
    schema: SchemaRef,
    tag: String,
    partition_by: Vec<Partitioning>,
}

impl Stager {
    /// `rows`: schema of the rows; `tag` (generation and shard) goes into the names of the files.
    ///
    /// # Errors
    /// User: columns that Delta cannot hold. External: the location cannot be opened.
    pub fn new(config: &DeltaConfig, rows: &SchemaRef, tag: String) -> Result<Self> {
        let table = config.table_schema(rows)?;
        let deleted = Arc::new(Field::new(DELETED, DataType::Boolean, false));
        let fields: Vec<_> = table.fields().iter().cloned().chain([deleted]).collect();
        let located = open(&config.location)?;
        let (location, schema) = (config.location.clone(), Arc::new(Schema::new(fields)));
        Ok(Self { located, location, schema, tag, partition_by: config.partition_by.clone() })
    }

    /// Stages the rows to put and the rows whose keys are to be deleted.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn stage(
        &self,
        epoch: u64,
        rows: &RecordBatch,
        deletes: Option<&RecordBatch>,
    ) -> Result<Vec<PreparedFile>> {
        let parts = [(Some(rows), false), (deletes, true)].into_iter();
        let parts = parts.filter_map(|(batch, deleted)| batch.map(|batch| self.marked(batch, deleted)));
        let all = concat_batches(&self.schema, &parts.collect::<Result<Vec<_>>>()?)?;
        if all.num_rows() == 0 {
            return Ok(Vec::new());
        }
        let mut writer = ArrowWriter::try_new(Vec::new(), Arc::clone(&self.schema), None)?;
        writer.write(&all)?;
        let bytes = writer.into_inner()?;
        let path = format!("_staged/{epoch:020}-{}-{}.parquet", self.tag, uuid::Uuid::new_v4());
        let size = bytes.len() as u64;
        let put = self.located.store.put(&Path::from(path.as_str()), PutPayload::from(bytes)).await;
        put.map_err(|error| {
            Error::external(format!("a staged file of {} cannot be written", self.location))
                .because(error)
                .hint("Check that the store has room and that the credentials may write there.")
        })?;
        Ok(vec![PreparedFile { path, size, rows: all.num_rows() as u64, add: serde_json::Value::Null }])
    }

    fn marked(&self, batch: &RecordBatch, deleted: bool) -> Result<RecordBatch> {
        let fields = self.schema.fields();
        let columns = batch.columns().iter().zip(fields).map(|(column, field)| {
            let same = column.data_type() == field.data_type();
            if same { Ok(Arc::clone(column)) } else { arrow::compute::cast(column, field.data_type()) }
        });
        let mut columns = columns.collect::<Result<Vec<ArrayRef>, _>>()?;
        let stored = Schema::new(fields[..columns.len()].to_vec());
        let stored = RecordBatch::try_new(Arc::new(stored), columns.clone())?;
        for part in &self.partition_by {
            let values = part.values(&stored)?;
            match (part.transform, values.as_string_opt::<i32>()) {
                (Transform::Identity, Some(texts)) => {
                    columns[stored.schema().index_of(&part.column)?] = Arc::new(without_empty(texts));
                }
                (Transform::Identity, None) => {}
                _ => columns.push(values),
            }
        }
        columns.push(Arc::new(BooleanArray::from(vec![deleted; batch.num_rows()])));
        Ok(RecordBatch::try_new(Arc::clone(&self.schema), columns)?)
    }
}

/// NULL for the empty text.
fn without_empty(texts: &StringArray) -> StringArray {
    texts.iter().map(|text| text.filter(|text| !text.is_empty())).collect()
}

/// The rows of staged files.
///
/// # Errors
/// External: a file cannot be read.
pub async fn staged(located: &Located, location: &str, files: &[PreparedFile]) -> Result<Vec<RecordBatch>> {
    let mut rows = Vec::new();
    for file in files {
        let unreadable = |error: Box<dyn std::error::Error + Send + Sync>| {
            Error::external(format!("the staged file {} of {location} cannot be read", file.path))
                .because(error)
        };
        let found = located.store.get(&Path::from(file.path.as_str())).await;
        let bytes = found.map_err(|e| unreadable(e.into()))?.bytes().await;
        let bytes = bytes.map_err(|e| unreadable(e.into()))?;
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes).and_then(|builder| builder.build());
        for batch in reader.map_err(|e| unreadable(e.into()))? {
            rows.push(batch.map_err(|e| unreadable(e.into()))?);
        }
    }
    Ok(rows)
}

/// Removes staged files whose commit is acknowledged; what stays behind is harmless.
pub async fn clean(located: &Located, files: &[PreparedFile]) {
    for file in files {
        if let Err(error) = located.store.delete(&Path::from(file.path.as_str())).await {
            tracing::debug!(file = %file.path, %error, "a staged file was not removed");
        }
    }
}

fn of(side: &str, name: &str) -> Expr {
    Expr::Column(Column::new(Some(TableReference::bare(side)), name))
}

/// Whether a row of the table has the key of a staged one.
fn same_key(config: &DeltaConfig, staged: &Schema) -> Result<Expr> {
    let key = config.mode.key();
    let by_key = config.partition_by.iter().filter(|part| key.contains(&part.column));
    // A partition that follows from the key: others need not be read.
    let made = by_key.clone().filter(|part| part.transform != Transform::Identity).map(Partitioning::name);
    let same = key.iter().cloned().chain(made).map(|name| {
        let equal = of("target", &name).eq(of("source", &name));
        let text = staged.field_with_name(&name).is_ok_and(|field| *field.data_type() == DataType::Utf8);
        match text && by_key.clone().any(|part| part.name() == name) {
            true => equal.or(of("target", &name).is_null().and(of("source", &name).is_null())),
            false => equal,
        }
    });
    same.reduce(Expr::and).ok_or_else(|| Error::internal("a merge without key"))
}

/// Merges rows into a loaded table under the given transactions; returns the new version.
///
/// # Errors
/// External: the store failed, or another writer was faster.
pub async fn merge(
    table: DeltaTable,
    config: &DeltaConfig,
    rows: Vec<RecordBatch>,
    transactions: Vec<(String, i64)>,
) -> Result<u64> {
    let fail = |error| failed(&config.location, error);
    let Some(first) = rows.first() else { return Err(Error::internal("a merge without rows")) };
    let names: Vec<String> = first.schema().fields().iter().map(|field| field.name().clone()).collect();
    let columns: Vec<String> = names.into_iter().filter(|name| name != DELETED).collect();
    let same = same_key(config, &first.schema())?;
    // Columns that the SQL no longer has: a row that is replaced loses what it had there.
    let schema = table.snapshot().map_err(fail)?.schema();
    let gone: Vec<String> =
        schema.fields().map(|field| field.name().clone()).filter(|name| !columns.contains(name)).collect();
    let source = SessionContext::new().read_batches(rows)?;
    let transactions =
        transactions.into_iter().map(|(app, version)| Transaction::new(app, version)).collect();
    let properties =
        CommitProperties::default().with_application_transactions(transactions).with_create_checkpoint(false);
    let merged = table
        .merge(source, same)
        .with_source_alias("source")
        .with_target_alias("target")
        .with_commit_properties(properties)
        .when_matched_delete(|delete| delete.predicate(of("source", DELETED)))
        .and_then(|merge| {
            merge.when_matched_update(|update| {
                let update = update.predicate(not(of("source", DELETED)));
                let update = gone.iter().fold(update, |update, name| {
                    update.update(Column::from_name(name), lit(ScalarValue::Null))
                });
                columns
                    .iter()
                    .fold(update, |update, name| update.update(Column::from_name(name), of("source", name)))
            })
        })
        .and_then(|merge| {
            merge.when_not_matched_insert(|insert| {
                let insert = insert.predicate(not(of("source", DELETED)));
                columns
                    .iter()
                    .fold(insert, |insert, name| insert.set(Column::from_name(name), of("source", name)))
            })
        })
        .map_err(fail)?;
    let (table, metrics) = merged.await.map_err(fail)?;
    tracing::debug!(
        inserted = metrics.num_target_rows_inserted,
        updated = metrics.num_target_rows_updated,
        deleted = metrics.num_target_rows_deleted,
        "merged"
    );
    table.version().ok_or_else(|| Error::internal("a merged table has no version"))
}
