//! A Redis sink or table in a query.
//!
//! Where the conditions leave constants for every key column (`=`, `IN`), those keys alone are read, each by one HMGET of
//! the columns that the query wants. Otherwise every key under the prefix is visited (SCAN), until a LIMIT is full.
//! Nothing is read before the query runs: EXPLAIN says which of both it would be.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::{Field, Schema, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::datasource::TableType;
use datafusion::error::{DataFusionError, Result as DataFusionResult};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::expr::InList;
use datafusion::logical_expr::{BinaryExpr, Expr, Operator, TableProviderFilterPushDown};
use datafusion::physical_expr::EquivalenceProperties;
use datafusion::physical_plan::execution_plan::{Boundedness, EmissionType};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, Partitioning, PhysicalExpr, PlanProperties,
};
use datafusion::scalar::ScalarValue;
use futures::{StreamExt, TryStreamExt, stream};

use crate::connectors::redis::RedisConfig;
use crate::connectors::redis::scan;
use crate::error::Result;

/// A query that names more keys visits all of them.
const MOST_KEYS: usize = 100_000;

#[derive(Debug)]
pub struct Stored {
    name: Arc<str>,
    config: Arc<RedisConfig>,
    schema: SchemaRef,
    /// Columns of the schema.
    keys: Vec<usize>,
}

impl Stored {
    /// `config`: its secrets are resolved.
    ///
    /// # Errors
    /// User: the schema lacks a key column.
    pub fn new(name: &str, config: RedisConfig, schema: SchemaRef) -> Result<Self> {
        let keys = config.key_columns(&schema)?;
        // Whatever the view says of NULL: a field may be missing.
        let fields: Vec<Field> =
            schema.fields().iter().map(|field| field.as_ref().clone().with_nullable(true)).collect();
        let schema = Arc::new(Schema::new(fields));
        Ok(Self { name: name.into(), config: Arc::new(config), schema, keys })
    }

    /// The key column and the constants that a condition leaves for it: `=`, `IN`, `=` joined by OR.
    fn constants<'e>(&self, filter: &'e Expr) -> Option<(usize, Vec<&'e ScalarValue>)> {
        match filter {
            Expr::BinaryExpr(BinaryExpr { left, op: Operator::Or, right }) => {
                let (column, mut values) = self.constants(left)?;
                let (other, more) = self.constants(right)?;
                values.extend(more);
                (column == other).then_some((column, values))
            }
            Expr::BinaryExpr(BinaryExpr { left, op: Operator::Eq, right }) => {
                let (column, value) = match (left.as_ref(), right.as_ref()) {
                    (Expr::Column(_), value) => (left, value),
                    (value, Expr::Column(_)) => (right, value),
                    _ => return None,
                };
                let column = self.key_column(column)?;
                Some((column, vec![self.constant(column, value)?]))
            }
            Expr::InList(InList { expr, list, negated: false }) => {
                let column = self.key_column(expr)?;
                let values = list.iter().map(|value| self.constant(column, value));
                Some((column, values.collect::<Option<_>>()?))
            }
            _ => None,
        }
    }

    fn key_column(&self, expr: &Expr) -> Option<usize> {
        let Expr::Column(column) = expr else { return None };
        self.schema.index_of(&column.name).ok().filter(|at| self.keys.contains(at))
    }

    fn constant<'e>(&self, column: usize, value: &'e Expr) -> Option<&'e ScalarValue> {
        let Expr::Literal(value, _) = value else { return None };
        let same = value.data_type() == *self.schema.field(column).data_type();
        // 0.0 = -0.0, but they are two keys.
        (same && !value.data_type().is_floating() && !value.is_null()).then_some(value)
    }

    /// The keys that the conditions leave, each once, as key columns; `None`: any.
    fn wanted(&self, filters: &[Expr]) -> DataFusionResult<Option<RecordBatch>> {
        // One row per key, one value per key column.
        let mut rows: Vec<Vec<&ScalarValue>> = vec![Vec::new()];
        for key in &self.keys {
            let constants = filters.iter().filter_map(|filter| self.constants(filter));
            let fewest = constants.filter(|(column, _)| column == key).min_by_key(|(_, values)| values.len());
            let Some((_, values)) = fewest else { return Ok(None) };
            let mut seen = HashSet::new();
            let values: Vec<_> = values.into_iter().filter(|value| seen.insert(*value)).collect();
            if rows.len().saturating_mul(values.len()) > MOST_KEYS {
                return Ok(None);
            }
            let with = |row: &Vec<_>, value| row.iter().copied().chain([value]).collect();
            rows = rows.iter().flat_map(|row| values.iter().map(move |value| with(row, *value))).collect();
        }
        let columns = (0..self.keys.len()).map(|at| {
            let values = rows.iter().map(|row| row[at].clone());
            ScalarValue::iter_to_array(values)
        });
        let columns: Vec<ArrayRef> = columns.collect::<DataFusionResult<_>>()?;
        let schema = Arc::new(self.schema.project(&self.keys)?);
        Ok(Some(RecordBatch::try_new(schema, columns)?))
    }
}

#[async_trait]
impl TableProvider for Stored {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    async fn scan(
        &self,
        _session: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> DataFusionResult<Arc<dyn ExecutionPlan>> {
        let all: Vec<usize> = (0..self.schema.fields().len()).collect();
        let wanted = projection.unwrap_or(&all);
        // The key columns say whether a hash is a row of ours.
        let mut read: Vec<usize> = wanted.iter().chain(&self.keys).copied().collect();
        read.sort_unstable();
        read.dedup();
        let place = |column: &usize| read.binary_search(column).unwrap_or_default();
        let schema = Arc::new(self.schema.project(wanted)?);
        let properties = PlanProperties::new(
            EquivalenceProperties::new(Arc::clone(&schema)),
            Partitioning::UnknownPartitioning(1),
            EmissionType::Final,
            Boundedness::Bounded,
        );
        Ok(Arc::new(Read {
            name: Arc::clone(&self.name),
            config: Arc::clone(&self.config),
            columns: Arc::new(self.schema.project(&read)?),
            keys: self.wanted(filters)?,
            // Conditions are looked at again above this.
            most: limit.filter(|_| filters.is_empty()),
            output: wanted.iter().map(place).collect(),
            schema,
            properties: Arc::new(properties),
        }))
    }

    fn supports_filters_pushdown(
        &self,
        filters: &[&Expr],
    ) -> DataFusionResult<Vec<TableProviderFilterPushDown>> {
        let of = |filter: &&Expr| match self.constants(filter) {
            Some(_) => TableProviderFilterPushDown::Inexact,
            None => TableProviderFilterPushDown::Unsupported,
        };
        Ok(filters.iter().map(of).collect())
    }
}

/// Reads keys when it is run.
#[derive(Debug, Clone)]
struct Read {
    name: Arc<str>,
    config: Arc<RedisConfig>,
    /// What is read of each hash.
    columns: SchemaRef,
    keys: Option<RecordBatch>,
    most: Option<usize>,
    /// Columns of `columns`.
    output: Vec<usize>,
    schema: SchemaRef,
    properties: Arc<PlanProperties>,
}

impl Read {
    async fn rows(self) -> Result<Vec<RecordBatch>> {
        let batches = match &self.keys {
            Some(keys) => scan::get(&self.config, &self.columns, keys).await?,
            None => scan::read(&self.config, &self.columns, self.most.unwrap_or(usize::MAX)).await?,
        };
        let output = |batch: RecordBatch| {
            let columns = self.output.iter().map(|at| Arc::clone(batch.column(*at))).collect();
            let rows = arrow::array::RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
            Ok(RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &rows)?)
        };
        batches.into_iter().map(output).collect()
    }
}

impl DisplayAs for Read {
    fn fmt_as(&self, _format: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fields = self.columns.fields().len();
        match &self.keys {
            Some(keys) => {
                let many = if keys.num_rows() == 1 { "key" } else { "keys" };
                write!(f, "RedisExec: {}, HMGET of {} {many}, {fields} fields", self.name, keys.num_rows())
            }
            None => {
                write!(f, "RedisExec: {}, SCAN of {}*, {fields} fields", self.name, self.config.prefix)?;
                self.most.map_or(Ok(()), |most| write!(f, ", until {most} rows"))
            }
        }
    }
}

impl ExecutionPlan for Read {
    fn name(&self) -> &'static str {
        "RedisExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        Vec::new()
    }

    fn apply_expressions(
        &self,
        _visit: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> DataFusionResult<TreeNodeRecursion>,
    ) -> DataFusionResult<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn with_new_children(
        self: Arc<Self>,
        _children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> DataFusionResult<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }

    fn execute(
        &self,
        _partition: usize,
        _context: Arc<TaskContext>,
    ) -> DataFusionResult<SendableRecordBatchStream> {
        let read = self.clone();
        let rows = stream::once(async move {
            let rows = read.rows().await.map_err(DataFusionError::from)?;
            Ok::<_, DataFusionError>(stream::iter(rows).map(Ok))
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), rows.try_flatten())))
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::AsArray;
    use arrow::datatypes::{DataType, Int64Type};
    use datafusion::prelude::{col, lit};

    use super::*;

    fn stored(key: &[&str]) -> Stored {
        let fields = [("user_id", DataType::Int64), ("kind", DataType::Utf8), ("amount", DataType::Float64)];
        let fields: Vec<Field> = fields.into_iter().map(|(name, of)| Field::new(name, of, false)).collect();
        let config = RedisConfig {
            url: "redis://127.0.0.1:9".to_owned(),
            user: None,
            password: None,
            tls_ca: None,
            key: key.iter().map(|name| (*name).to_owned()).collect(),
            prefix: "user:".to_owned(),
            ttl: None,
        };
        Stored::new("serving", config, Arc::new(Schema::new(fields))).unwrap()
    }

    fn count(stored: &Stored, filters: &[Expr]) -> Option<usize> {
        stored.wanted(filters).unwrap().map(|keys| keys.num_rows())
    }

    #[test]
    fn constants_for_every_key_column_are_keys() {
        let one = stored(&["user_id"]);
        let id = |n: i64| col("user_id").eq(lit(n));
        let several = col("user_id").in_list(vec![lit(1_i64), lit(2_i64), lit(1_i64)], false);
        assert_eq!(count(&one, &[]), None);
        assert_eq!(count(&one, &[id(7)]), Some(1));
        assert_eq!(count(&one, &[id(1).or(id(2)).or(id(3))]), Some(3));
        assert_eq!(count(&one, &[col("amount").gt(lit(1.0)), several.clone()]), Some(2));
        let keys = one.wanted(std::slice::from_ref(&several)).unwrap().unwrap();
        assert_eq!(keys.column(0).as_primitive::<Int64Type>().values(), &[1, 2]);
        for other in [
            col("user_id").gt(lit(1_i64)),
            col("amount").eq(lit(1.0)),
            id(1).or(col("kind").eq(lit("a"))),
            col("user_id").in_list(vec![lit(1_i64)], true),
            col("user_id").eq(lit(1.0)),
            col("user_id").eq(lit(ScalarValue::Int64(None))),
        ] {
            assert_eq!(count(&one, std::slice::from_ref(&other)), None, "{other}");
        }
        let two = stored(&["kind", "user_id"]);
        assert_eq!(count(&two, &[id(1)]), None);
        assert_eq!(
            count(&two, &[several, col("kind").in_list(vec![lit("a"), lit("b"), lit("c")], false)]),
            Some(6)
        );
        assert_eq!(count(&stored(&["amount"]), &[col("amount").eq(lit(0.0))]), None);
    }
}
