//! A relation whose rows are compared: what of its rows counts, and what the batch says of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::array::{Array, RecordBatch};
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use super::compare::{Row, Wanted, cells};
use super::stream::{Finished, Prepared, order_values, without};
use crate::batch::{Answer, Relation};
use crate::error::{Error, Result};
use crate::plan::source::METADATA;
use crate::plan::{NodeKind, SinkKind, SourcePlan, StreamPlan};
use crate::sql::Catalog;
use crate::stream::Port;

/// A relation as the stream plans it, with a sink of its name.
pub struct Target {
    pub name: String,
    /// "view a", "sink b".
    pub what: String,
    pub source: String,
    pub schema: SchemaRef,
    /// Columns that are compared.
    pub columns: Vec<usize>,
    key: Vec<usize>,
    /// Holds the newest row per key.
    online: bool,
    order: Option<usize>,
    /// Rows without a key are dead letters of the sink.
    pub needs_key: bool,
    /// Late rows do not count.
    pub on_time: bool,
    /// Whose failing rows do not count.
    pub views: BTreeSet<String>,
    /// It joins with a table that stays where it is.
    pub remote: bool,
    /// It has a GROUP BY without keys: of no rows that is one row in a batch, and none in a stream so far.
    pub keyless: bool,
    relation: Relation,
}

impl Target {
    /// `None` for a relation that reads no source. All columns but metadata are compared: where a record lies changes
    /// from round to round.
    ///
    /// # Errors
    /// User: the SQL.
    pub async fn plan(
        catalog: &Catalog,
        sources: &BTreeMap<String, Arc<SourcePlan>>,
        name: &str,
    ) -> Result<Option<Self>> {
        let plan = crate::plan::sinks::plan(catalog, &[name.to_owned()]).await?;
        let (Some((source_node, source)), Some((_, sink))) = (plan.source(), plan.sinks().next()) else {
            return Ok(None);
        };
        let what = match (catalog.view(name), catalog.source(name)) {
            (Some(_), _) => format!("view {name}"),
            (_, Some(_)) => format!("source {name}"),
            _ => format!("sink {name}"),
        };
        let schema = Arc::clone(&sink.schema);
        let counts = |column: &usize| !METADATA.contains(&schema.field(*column).name().as_str());
        let online = matches!(sink.kind, SinkKind::Online { .. });
        Ok(Some(Self {
            name: name.to_owned(),
            what,
            source: source.name.clone(),
            columns: (0..schema.fields().len()).filter(counts).collect(),
            key: sink.key.clone(),
            online,
            order: sink.order,
            needs_key: online || is_table(&sink.kind) && !sink.key.is_empty(),
            on_time: plan.readers(source_node).any(|(_, edge)| edge.port == Port::OnTime),
            views: views(&plan),
            remote: remote(&plan),
            keyless: plan
                .nodes
                .iter()
                .any(|node| matches!(&node.kind, NodeKind::Group(spec) if spec.keys.is_empty())),
            relation: Relation::plan(catalog, sources, name).await?,
            schema,
        }))
    }

    /// Names of the columns that are compared.
    pub fn names(&self) -> Vec<String> {
        self.columns.iter().map(|column| self.schema.field(*column).name().clone()).collect()
    }

    /// The rows of a stream run.
    ///
    /// # Errors
    /// Internal.
    pub fn of_stream(&self, finished: &Finished) -> Result<Vec<Row>> {
        let found = finished.rows.get(&self.name);
        let found = found.ok_or_else(|| Error::internal("a sink of the test is gone"))?;
        cells(&self.keyed(found)?, &self.columns)
    }

    /// The rows that count: accepted ones, on time if the view closes by time, and not `dead` for its views.
    ///
    /// # Errors
    /// Internal, from arrow.
    pub fn input(&self, prepared: &Prepared, dead: &BTreeSet<(String, usize)>) -> Result<RecordBatch> {
        let failing: BTreeSet<usize> =
            dead.iter().filter(|(at, _)| self.views.contains(at)).map(|(_, record)| *record).collect();
        without(prepared, |record| self.on_time && prepared.known[record].late || failing.contains(&record))
    }

    /// The same relation by DataFusion alone. An error is that of an expression, as the SQL was planned before.
    pub async fn batch(&self, input: &RecordBatch) -> Result<Answer> {
        self.relation.over(&self.source, input).await
    }

    /// Rows of a batch answer with the types of the stream's.
    ///
    /// # Errors
    /// Internal.
    pub fn of_batch(&self, answer: &Answer) -> Result<RecordBatch> {
        let all = concat_batches(&answer.schema, &answer.batches)?;
        let column = |field: &Arc<Field>| {
            let found = all.column_by_name(field.name());
            let found = found.ok_or_else(|| {
                Error::internal(format!("{}: the batch has no column {}", self.what, field.name()))
            })?;
            Ok(cast(found, field.data_type())?)
        };
        let columns = self.schema.fields().iter().map(column).collect::<Result<Vec<_>>>()?;
        let nullable: Vec<_> =
            self.schema.fields().iter().map(|field| field.as_ref().clone().with_nullable(true)).collect();
        self.keyed(&RecordBatch::try_new(Arc::new(Schema::new(nullable)), columns)?)
    }

    /// Without the rows that a sink with a key refuses.
    fn keyed(&self, rows: &RecordBatch) -> Result<RecordBatch> {
        if !self.needs_key {
            return Ok(rows.clone());
        }
        let whole = |row: usize| self.key.iter().all(|key| !rows.column(*key).is_null(row));
        let keep = (0..rows.num_rows()).map(|row| Some(whole(row))).collect();
        Ok(arrow::compute::filter_record_batch(rows, &keep)?)
    }

    /// Of a batch answer, the newest row per key for an online sink. Rows of one key and time are ordered by partition
    /// and offset, which SQL does not know: of those any one that `other` has will do, the stream decides exactly.
    ///
    /// # Errors
    /// Internal.
    pub fn newest(&self, rows: &RecordBatch, other: &Wanted) -> Result<Vec<Row>> {
        let all = cells(rows, &self.columns)?;
        if !self.online {
            return Ok(all);
        }
        let is_time = |column: &usize| matches!(rows.column(*column).data_type(), DataType::Timestamp(..));
        let order = self.order.filter(is_time).map(|column| order_values(rows, column)).transpose()?;
        let time =
            |row: usize| order.as_ref().filter(|order| order.is_valid(row)).map(|order| order.value(row));
        let keys = cells(rows, &self.key)?;
        let mut newest: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (row, key) in keys.iter().enumerate() {
            let rows = newest.entry(format!("{key:?}")).or_default();
            match rows.first().map(|first| time(row).cmp(&time(*first))) {
                Some(std::cmp::Ordering::Less) => continue,
                Some(std::cmp::Ordering::Greater) => rows.clear(),
                _ => {}
            }
            rows.push(row);
        }
        let there = |row: &usize| (0..other.rows.len()).any(|at| other.matches(at, &all[*row]));
        let choose = |rows: &Vec<usize>| rows.iter().copied().find(there).or(rows.last().copied());
        Ok(newest.values().filter_map(choose).map(|row| all[row].clone()).collect())
    }
}

fn is_table(kind: &SinkKind) -> bool {
    #[cfg(feature = "delta")]
    if matches!(kind, SinkKind::Delta(_)) {
        return true;
    }
    let _ = kind;
    false
}

/// The views whose expressions a plan evaluates.
fn views(plan: &StreamPlan) -> BTreeSet<String> {
    let view = |kind: &NodeKind| match kind {
        NodeKind::Filter { view, .. }
        | NodeKind::Project { view, .. }
        | NodeKind::Unnest { view, .. }
        | NodeKind::Lookup { view, .. } => Some(view.to_string()),
        _ => None,
    };
    plan.nodes.iter().filter_map(|node| view(&node.kind)).collect()
}

fn remote(plan: &StreamPlan) -> bool {
    #[cfg(feature = "redis")]
    if plan.nodes.iter().any(|node| matches!(node.kind, NodeKind::Remote { .. })) {
        return true;
    }
    let _ = plan;
    false
}
