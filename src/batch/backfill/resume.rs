//! An interval computed from the state of its windows at an earlier time, instead of from all history.
//!
//! **How.** DataFusion's windows cannot be preloaded. The stream's OVER operator can: its state has a format on disk, is
//! continued after every restart of a pipeline, and gives the same answer as the batch, bit by bit (integers; floats by
//! exact sums that are rounded once; tests/random.rs, operators/over/tests.rs). So a sink over unbounded frames is computed
//! by that operator, always: from a snapshot, or from an empty state at the start of history. What it gives does not depend
//! on where it started, as its state is a function of the rows before. Rewriting the batch instead (snapshot rows UNION
//! ALL the interval's) would need an aggregate per function that reads its own partial state.
//!
//! **Order.** The rows before an interval's end and after the snapshot are read from the backup in order of event time,
//! ties in the total order. So nothing is late; the watermark follows the rows, and memory holds the state of every key
//! and the rows of the longest bounded frame.
//!
//! **Bounded frames** of the same window need rows, not states: those between the snapshot's time less the longest frame
//! and the snapshot's time are read again. As the snapshot is valid, they are the rows that were there.
//!
//! **Which sinks.** One window over filters and projections of one source, and filters and projections above it, whose
//! expressions give the same value every time. Every other sink with an unbounded frame reads all history for each
//! interval, and it is said why. So does one whose state is larger than `--memory`: DataFusion's sorts spill.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Int64Array, NullArray, RecordBatch, RecordBatchOptions};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimestampMicrosecondType};
use datafusion::catalog::TableProvider;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::logical_expr::Volatility;
use datafusion::physical_expr::ScalarFunctionExpr;
use datafusion::physical_expr::utils::collect_columns;
use datafusion::physical_plan::PhysicalExpr;
use datafusion::prelude::ident;
use futures::StreamExt;

use super::Start;
use super::compute::{Output, at};
use super::prepare::Prepared;
use super::snapshots::Snapshots;
use crate::connectors::delta::replace::Interval;
use crate::error::{Error, Result};
use crate::operators::over::{Frame, Function, Over, OverSpec};
use crate::operators::stateless::{Failed, filter, project};
use crate::plan::session::batch_session_within;
use crate::plan::source::METADATA;
use crate::plan::{NodeId, NodeKind, SourcePlan, StreamPlan};
use crate::stream::{ChangeBatch, Micros, Origin};

/// A window over unbounded frames, between filters and projections.
pub struct Shape<'a> {
    plan: &'a StreamPlan,
    source: &'a SourcePlan,
    time: usize,
    /// From the source up, and from the window up.
    below: Vec<NodeId>,
    over: NodeId,
    spec: &'a OverSpec,
    above: Vec<NodeId>,
    /// The rows that the sink gets.
    sink: SchemaRef,
}

/// What computes a sink over unbounded frames.
pub struct Resume<'a> {
    pub shape: Shape<'a>,
    pub snapshots: Snapshots,
}

/// How the rows of an interval came about.
pub enum Passed {
    Done {
        /// Rows of the backup that were read.
        read: u64,
        /// The states of all keys at the end of the interval; `None` where there is no key, or none that can be stored.
        states: Option<RecordBatch>,
    },
    /// The state outgrew the memory; the rows that are written are of no use.
    TooLarge,
}

impl<'a> Shape<'a> {
    /// The shape of a sink's plan, or what in it stands against snapshots.
    ///
    /// `ordered`: the backup says which record a row comes from, so that ties have an order.
    ///
    /// # Errors
    /// The reason, for people.
    pub fn of(plan: &'a StreamPlan, sink: &str, ordered: bool) -> Result<Self, &'static str> {
        let broken = "its plan is of an unknown form";
        let (mut id, planned) = plan.sinks().find(|(_, planned)| planned.name == sink).ok_or(broken)?;
        let (mut above, mut below, mut over) = (Vec::new(), Vec::new(), None);
        let source = loop {
            let [edge] = &plan.nodes[id].inputs[..] else { return Err("its rows come from several inputs") };
            id = edge.from;
            let chain = if over.is_none() { &mut above } else { &mut below };
            let exprs = match &plan.nodes[id].kind {
                NodeKind::Filter { predicate, .. } => std::slice::from_ref(predicate),
                NodeKind::Project { exprs, .. } => &exprs[..],
                NodeKind::Over(_) if over.is_some() => return Err("it is a window over a window"),
                NodeKind::Over(spec) => {
                    over = Some((id, spec));
                    continue;
                }
                NodeKind::Source(source) => break source,
                NodeKind::Group(_) => return Err("it has a GROUP BY"),
                NodeKind::Unnest { .. } => return Err("it has an UNNEST"),
                NodeKind::Lookup { .. } => return Err("it looks values up in a table"),
                _ => return Err(broken),
            };
            if exprs.iter().any(varies) {
                return Err("an expression gives another value each time");
            }
            chain.push(id);
        };
        let ((over, spec), time) = over.zip(source.event_time).ok_or(broken)?;
        if !ordered && spec.calls.iter().any(|call| call.function == Function::RowNumber) {
            return Err("row_number() has no order among rows of one time, as the backup has no offsets");
        }
        above.reverse();
        below.reverse();
        let sink = Arc::clone(&planned.schema);
        Ok(Self { plan, source, time, below, over, spec, above, sink })
    }

    /// What the window's state means.
    pub fn fingerprint(&self) -> String {
        self.plan.fingerprint(self.over)
    }

    /// Name of the event time.
    pub fn time(&self) -> &str {
        self.source.schema.field(self.time).name()
    }

    /// How far the longest bounded frame looks back.
    fn longest(&self) -> Micros {
        let bound = |frame: Frame| match frame {
            Frame::Preceding { micros } => micros,
            Frame::Unbounded => 0,
        };
        self.spec.calls.iter().map(|call| bound(call.frame)).max().unwrap_or(0)
    }

    /// Columns of the source that its first projection reads, with what is filtered before; all without a projection.
    fn columns(&self) -> Vec<usize> {
        let mut read = vec![self.time];
        for id in &self.below {
            match &self.plan.nodes[*id].kind {
                NodeKind::Filter { predicate, .. } => {
                    read.extend(collect_columns(predicate).iter().map(|column| column.index()));
                }
                NodeKind::Project { exprs, .. } => {
                    let of = |expr| collect_columns(expr).into_iter().map(|column| column.index());
                    read.extend(exprs.iter().flat_map(of));
                    read.sort_unstable();
                    read.dedup();
                    return read;
                }
                _ => {}
            }
        }
        (0..self.source.schema.fields().len()).collect()
    }

    fn through(&self, nodes: &[NodeId], batch: ChangeBatch) -> Result<ChangeBatch> {
        let mut batch = batch;
        for id in nodes {
            let node = &self.plan.nodes[*id];
            let mut failed = Failed::new();
            let view = match &node.kind {
                NodeKind::Filter { predicate, view } => {
                    batch = filter(predicate, &batch, &mut failed)?;
                    view
                }
                NodeKind::Project { exprs, view } => {
                    batch = project(exprs, &lenient(&node.schema), &batch, &mut failed)?;
                    view
                }
                _ => return Err(Error::internal(format!("{} is no filter and no projection", node.id))),
            };
            if let Some((_, reason)) = failed.into_iter().next() {
                let message = format!("{view}: an expression fails on a row of the backup");
                return Err(Error::user(message).because(reason));
            }
        }
        Ok(batch)
    }
}

/// Whether an expression may give another value for the same row.
fn varies(expr: &Arc<dyn PhysicalExpr>) -> bool {
    let mut found = false;
    let walked = expr.apply(|expr| {
        let any: &dyn std::any::Any = expr.as_ref();
        let function = any.downcast_ref::<ScalarFunctionExpr>();
        found |=
            function.is_some_and(|function| function.fun().signature().volatility != Volatility::Immutable);
        Ok(TreeNodeRecursion::Continue)
    });
    found || walked.is_err()
}

/// One interval on its way.
struct Pass<'s, 'a> {
    shape: &'s Shape<'a>,
    interval: Interval,
    over: Over,
    /// The snapshot's time, until the rows before it are through.
    refilling: Option<Micros>,
    columns: Vec<usize>,
    schema: SchemaRef,
    read: u64,
}

impl<'s, 'a> Pass<'s, 'a> {
    fn new(
        shape: &'s Shape<'a>,
        interval: Interval,
        from: Option<(Micros, Vec<RecordBatch>)>,
    ) -> Result<Self> {
        let mut over = Over::new(OverSpec {
            input: lenient(&shape.spec.input),
            want_final: true,
            want_latest: false,
            ..shape.spec.clone()
        })?;
        let refilling = from.as_ref().map(|(at, _)| *at);
        if let Some((at, states)) = from {
            over.restore_keys(&states, at)?;
        }
        let columns = shape.columns();
        let schema = narrow(&lenient(&shape.source.schema), &columns);
        Ok(Self { shape, interval, over, refilling, columns, schema, read: 0 })
    }

    /// Rows of the backup in order of event time; the columns as they were selected.
    async fn push(&mut self, rows: &RecordBatch, out: &mut Output<'_>) -> Result<()> {
        let batch = self.batch(rows)?;
        let times = batch.origin.time.clone();
        let mut rest = batch;
        if let Some(at) = self.refilling {
            let before = times.values().partition_point(|time| *time < at);
            self.over.refill(&self.shape.through(&self.shape.below, rest.slice(0, before))?)?;
            if before == rest.num_rows() {
                return Ok(());
            }
            self.refilled();
            rest = rest.slice(before, rest.num_rows() - before);
        }
        self.over.push(&self.shape.through(&self.shape.below, rest)?)?;
        self.over.forget_input();
        match times.values().last() {
            Some(last) => self.advance(*last, out).await,
            None => Ok(()),
        }
    }

    fn refilled(&mut self) {
        if self.refilling.take().is_some() {
            self.over.rebuild();
        }
    }

    /// No row before `time` follows.
    async fn advance(&mut self, time: Micros, out: &mut Output<'_>) -> Result<()> {
        if self.over.watermark() < self.interval.from {
            self.over.emit_final(false);
            self.over.advance(time.min(self.interval.from))?;
            self.over.emit_final(true);
        }
        for batch in self.over.advance(time)? {
            let rows = self.shape.through(&self.shape.above, batch)?.rows;
            if rows.num_rows() > 0 {
                out.write(&as_stored(&rows, &self.shape.sink)?).await?;
            }
        }
        Ok(())
    }

    /// Through to the end of the interval: the states there.
    async fn finish(mut self, out: &mut Output<'_>) -> Result<Passed> {
        self.refilled();
        self.advance(self.interval.to, out).await?;
        self.over.mark_all_dirty();
        let states = match self.over.cut().and_then(|cut| cut.keys.gather()) {
            Ok(states) => states,
            Err(error) => {
                tracing::warn!(%error, "a state cannot be stored; the next interval reads more");
                None
            }
        };
        Ok(Passed::Done { read: self.read, states })
    }

    /// Rows as the source gives them, in the order in which they come; columns that nothing reads are left out.
    fn batch(&mut self, rows: &RecordBatch) -> Result<ChangeBatch> {
        let count = rows.num_rows();
        let picked = |column: usize| self.columns.iter().position(|read| *read == column);
        let column = |column: usize| -> ArrayRef {
            picked(column)
                .map_or_else(|| Arc::new(NullArray::new(count)) as ArrayRef, |at| Arc::clone(rows.column(at)))
        };
        let columns: Vec<ArrayRef> = (0..self.schema.fields().len()).map(column).collect();
        let times = columns[self.shape.time].as_primitive_opt::<TimestampMicrosecondType>();
        let times = times.ok_or_else(|| Error::internal("the event time is no timestamp"))?;
        let first = self.read as i64;
        let origin = Origin {
            time: Int64Array::new(times.values().clone(), None),
            place: vec![0; count].into(),
            offset: (first..first + count as i64).collect::<Vec<_>>().into(),
        };
        self.read += count as u64;
        let options = RecordBatchOptions::new().with_row_count(Some(count));
        let rows = RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &options)?;
        Ok(ChangeBatch::append(rows, origin))
    }
}

/// The schema with columns of nothing where a column is not read.
fn narrow(schema: &SchemaRef, columns: &[usize]) -> SchemaRef {
    let field = |(column, field): (usize, &Arc<Field>)| match columns.contains(&column) {
        true => Arc::clone(field),
        false => Arc::new(Field::new(field.name(), DataType::Null, true)),
    };
    Arc::new(Schema::new(schema.fields().iter().enumerate().map(field).collect::<Vec<_>>()))
}

/// The rows with the sink's columns.
fn as_stored(rows: &RecordBatch, sink: &SchemaRef) -> Result<RecordBatch> {
    let column = |field: &Arc<Field>| -> Result<ArrayRef> {
        let column = rows.column_by_name(field.name());
        let column =
            column.ok_or_else(|| Error::internal(format!("the rows have no column {}", field.name())))?;
        Ok(match column.data_type() == field.data_type() {
            true => Arc::clone(column),
            false => cast(column, field.data_type())?,
        })
    };
    let columns = sink.fields().iter().map(column).collect::<Result<_>>()?;
    Ok(RecordBatch::try_new(lenient(sink), columns)?)
}

/// The schema without NOT NULL: records that were replayed under other SQL may have NULLs there, which the batch takes as
/// they are.
fn lenient(schema: &SchemaRef) -> SchemaRef {
    let fields = schema.fields().iter().map(|field| field.as_ref().clone().with_nullable(true));
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

impl Resume<'_> {
    /// From where an interval is computed, with the states there.
    pub async fn begin(&self, from: Micros) -> (Start, Option<(Micros, Vec<RecordBatch>)>) {
        loop {
            let start = self.snapshots.start(from, None);
            let Start::Snapshot { at, .. } = start else { return (start, None) };
            // One that cannot be read is not given again.
            if let Some(states) = self.snapshots.read(at).await {
                return (start, Some((at, states)));
            }
        }
    }

    /// Computes the rows of an interval, from the states at a time or from the start of history.
    ///
    /// # Errors
    /// User: the SQL fails on a row. External: the backup cannot be read.
    pub async fn compute(
        &self,
        provider: Arc<dyn TableProvider>,
        interval: Interval,
        from: Option<(Micros, Vec<RecordBatch>)>,
        memory: Option<u64>,
        out: &mut Output<'_>,
    ) -> Result<Passed> {
        let shape = &self.shape;
        // Half for the sort, half for the state.
        let memory = memory.map(|bytes| bytes / 2);
        let session = batch_session_within(memory)?;
        let mut rows = session.read_table(provider)?.filter(ident(shape.time()).lt(at(interval.to)))?;
        if let Some((start, _)) = &from {
            rows = rows.filter(ident(shape.time()).gt_eq(at(start.saturating_sub(shape.longest()))))?;
        }
        let mut pass = Pass::new(shape, interval, from)?;
        let name = |column: &usize| shape.source.schema.field(*column).name().as_str();
        let read: Vec<&str> = pass.columns.iter().map(name).collect();
        // Ties matter to row_number alone.
        let numbered = shape.spec.calls.iter().any(|call| call.function == Function::RowNumber);
        let ties = if numbered { &METADATA[..3] } else { &[] };
        let order = std::iter::once(shape.time()).chain(ties.iter().copied());
        let rows = rows.sort(order.map(|name| ident(name).sort(true, false)).collect())?;
        let rows = rows.select(read.into_iter().map(ident).collect::<Vec<_>>())?;
        let mut rows = rows.execute_stream().await?;
        while let Some(batch) = rows.next().await {
            pass.push(&batch?, out).await?;
            if memory.is_some_and(|bytes| pass.over.size() > bytes) {
                return Ok(Passed::TooLarge);
            }
        }
        pass.finish(out).await
    }

    /// How many leading columns of the states are the key.
    pub fn width(&self) -> usize {
        self.shape.spec.partition_by.len()
    }
}

impl Prepared<'_> {
    /// What computes the sink from snapshots, or why nothing does.
    pub fn shape(&self) -> Result<Shape<'_>, &'static str> {
        Shape::of(&self.plan, &self.sink.name, self.has_offsets())
    }
}
