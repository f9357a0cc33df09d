//! The merge of a point-in-time join: both sides are partitioned by the keys and sorted by keys and time.
//!
//! One cursor walks over the right side. It keeps the best row of its key so far: that of the greatest event time, of
//! several the last one. A row of the left side is matched with it once the cursor has passed all rows that count at its
//! moment. Of the right side the batches are held that rows of the answer refer to, at most [`HELD`].

use std::fmt;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch, UInt64Array, new_null_array};
use arrow::compute::{SortOptions, cast, interleave, take_record_batch};
use arrow::datatypes::{DataType, Int64Type, SchemaRef};
use arrow::row::{RowConverter, Rows, SortField};
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Result, internal_datafusion_err, internal_err};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::{
    Distribution, EquivalenceProperties, LexOrdering, OrderingRequirements, Partitioning, PhysicalExpr,
    PhysicalSortExpr,
};
use datafusion::physical_plan::execution_plan::{Boundedness, EmissionType};
use datafusion::physical_plan::metrics::{BaselineMetrics, ExecutionPlanMetricsSet, MetricsSet};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, InputDistributionRequirements,
    PlanProperties, apply_expression_roots,
};
use futures::{StreamExt, stream};

/// Batches of the right side that are held for rows which are not out yet.
const HELD: usize = 16;

/// One input. `exprs`: the keys, then the moment (left), or since when a row counts, its time and what orders ties.
#[derive(Debug, Clone)]
pub struct Side {
    pub input: Arc<dyn ExecutionPlan>,
    pub exprs: Vec<Arc<dyn PhysicalExpr>>,
}

impl Side {
    fn ordering(&self) -> Result<LexOrdering> {
        // As rows compare: see `Keys`.
        let options = SortOptions { descending: false, nulls_first: true };
        let exprs = self.exprs.iter().map(|expr| PhysicalSortExpr::new(Arc::clone(expr), options));
        LexOrdering::new(exprs).ok_or_else(|| internal_datafusion_err!("a point-in-time join without keys"))
    }
}

#[derive(Debug)]
pub struct AsOfExec {
    left: Side,
    right: Side,
    keys: usize,
    outer: bool,
    orders: [LexOrdering; 2],
    properties: Arc<PlanProperties>,
    metrics: ExecutionPlanMetricsSet,
}

impl AsOfExec {
    pub fn new(left: Side, right: Side, keys: usize, outer: bool, schema: SchemaRef) -> Result<Self> {
        let orders = [left.ordering()?, right.ordering()?];
        let partitions = left.input.output_partitioning().partition_count();
        let properties = PlanProperties::new(
            EquivalenceProperties::new(schema),
            Partitioning::UnknownPartitioning(partitions),
            EmissionType::Incremental,
            Boundedness::Bounded,
        );
        let metrics = ExecutionPlanMetricsSet::new();
        Ok(Self { left, right, keys, outer, orders, properties: Arc::new(properties), metrics })
    }
}

impl DisplayAs for AsOfExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.outer { "Left" } else { "Inner" };
        let keys = self.left.exprs.iter().zip(&self.right.exprs).take(self.keys);
        let keys: Vec<String> = keys.map(|(left, right)| format!("{left} = {right}")).collect();
        let (moment, since) = (&self.left.exprs[self.keys], &self.right.exprs[self.keys]);
        write!(f, "AsOfExec: {kind}, {}, newest with {since} <= {moment}", keys.join(", "))
    }
}

impl ExecutionPlan for AsOfExec {
    fn name(&self) -> &'static str {
        "AsOfExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn input_distribution_requirements(&self) -> InputDistributionRequirements {
        let by_keys = |side: &Side| Distribution::KeyPartitioned(side.exprs[..self.keys].to_vec());
        InputDistributionRequirements::co_partitioned(vec![by_keys(&self.left), by_keys(&self.right)])
    }

    fn required_input_ordering(&self) -> Vec<Option<OrderingRequirements>> {
        self.orders.iter().map(|order| Some(OrderingRequirements::from(order.clone()))).collect()
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.left.input, &self.right.input]
    }

    fn apply_expressions(
        &self,
        f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        apply_expression_roots(self.left.exprs.iter().chain(&self.right.exprs), f)
    }

    fn with_new_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let Ok([left, right]) = <[Arc<dyn ExecutionPlan>; 2]>::try_from(children) else {
            return internal_err!("a point-in-time join has two inputs");
        };
        let left = Side { input: left, exprs: self.left.exprs.clone() };
        let right = Side { input: right, exprs: self.right.exprs.clone() };
        Ok(Arc::new(Self::new(left, right, self.keys, self.outer, self.schema())?))
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let partitions = |side: &Side| side.input.output_partitioning().partition_count();
        if partitions(&self.left) != partitions(&self.right) {
            return internal_err!("the sides of a point-in-time join are partitioned differently");
        }
        let merge = Merge {
            left: self.left.input.execute(partition, Arc::clone(&context))?,
            right: self.right.input.execute(partition, context)?,
            left_keys: Keys::new(&self.left, self.keys)?,
            right_keys: Keys::new(&self.right, self.keys)?,
            outer: self.outer,
            schema: self.schema(),
            right_schema: self.right.input.schema(),
            labels: None,
            held: Vec::new(),
            started: false,
            at: None,
            best: None,
        };
        let baseline = BaselineMetrics::new(&self.metrics, partition);
        let batches = stream::try_unfold((merge, baseline), |(mut merge, baseline)| async move {
            let batch = merge.next().await?;
            if let Some(batch) = &batch {
                baseline.record_output(batch.num_rows());
            }
            Ok(batch.map(|batch| (batch, (merge, baseline))))
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(self.schema(), Box::pin(batches))))
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }
}

/// Evaluates the expressions of a side.
struct Keys {
    exprs: Vec<Arc<dyn PhysicalExpr>>,
    keys: usize,
    /// Both sides have the same types, so their rows compare.
    converter: RowConverter,
}

impl Keys {
    fn new(side: &Side, keys: usize) -> Result<Self> {
        let schema = side.input.schema();
        let fields = side.exprs[..keys].iter().map(|expr| Ok(SortField::new(expr.data_type(&schema)?)));
        let converter = RowConverter::new(fields.collect::<Result<Vec<_>>>()?)?;
        Ok(Self { exprs: side.exprs.clone(), keys, converter })
    }

    fn of(&self, batch: &RecordBatch) -> Result<Rows> {
        let columns = self.exprs[..self.keys].iter().map(|expr| array(expr, batch));
        Ok(self.converter.convert_columns(&columns.collect::<Result<Vec<_>>>()?)?)
    }

    /// A time as a number; the place counts from behind the keys.
    fn time(&self, place: usize, batch: &RecordBatch) -> Result<Int64Array> {
        let values = array(&self.exprs[self.keys + place], batch)?;
        Ok(cast(&values, &DataType::Int64)?.as_primitive::<Int64Type>().clone())
    }
}

fn array(expr: &Arc<dyn PhysicalExpr>, batch: &RecordBatch) -> Result<ArrayRef> {
    expr.evaluate(batch)?.into_array(batch.num_rows())
}

/// A batch of the left side.
struct Labels {
    batch: RecordBatch,
    keys: Rows,
    moment: Int64Array,
    /// The first row that is not out yet.
    next: usize,
}

/// A batch of the right side.
struct Features {
    batch: RecordBatch,
    keys: Rows,
    since: Int64Array,
    time: Int64Array,
    /// Whether a row of the answer refers to it.
    used: bool,
}

/// A batch among those held, and a row in it.
type Spot = (usize, usize);

struct Merge {
    left: SendableRecordBatchStream,
    right: SendableRecordBatchStream,
    left_keys: Keys,
    right_keys: Keys,
    outer: bool,
    schema: SchemaRef,
    right_schema: SchemaRef,
    labels: Option<Labels>,
    /// `None`: a place that is free.
    held: Vec<Option<Features>>,
    started: bool,
    /// The cursor; `None`: before the first batch, or behind the last one.
    at: Option<Spot>,
    best: Option<Spot>,
}

impl Merge {
    async fn next(&mut self) -> Result<Option<RecordBatch>> {
        loop {
            if self.labels.as_ref().is_none_or(|labels| labels.next == labels.batch.num_rows()) {
                let Some(batch) = self.left.next().await.transpose()? else { return Ok(None) };
                let (keys, moment) = (self.left_keys.of(&batch)?, self.left_keys.time(0, &batch)?);
                self.labels = Some(Labels { batch, keys, moment, next: 0 });
                if !std::mem::replace(&mut self.started, true) {
                    self.fetch().await?;
                }
            }
            let Some(mut labels) = self.labels.take() else { return Ok(None) };
            let answer = self.matched(&mut labels).await?;
            self.labels = Some(labels);
            self.forget();
            if answer.num_rows() > 0 {
                return Ok(Some(answer));
            }
        }
    }

    /// The next rows of a batch of the left side, until it ends or enough of the right side is held.
    async fn matched(&mut self, labels: &mut Labels) -> Result<RecordBatch> {
        let start = labels.next;
        let mut found: Vec<Option<Spot>> = Vec::with_capacity(labels.batch.num_rows() - start);
        while labels.next < labels.batch.num_rows() && (self.holding() < HELD || labels.next == start) {
            let row = labels.next;
            let spot = match labels.moment.is_valid(row) {
                true => self.newest(labels, row).await?,
                false => None,
            };
            if let Some(features) = spot.and_then(|(batch, _)| self.held[batch].as_mut()) {
                features.used = true;
            }
            found.push(spot);
            labels.next += 1;
        }
        self.answer(&labels.batch.slice(start, found.len()), &found)
    }

    /// Moves the cursor behind all rows that count at a row's moment; the best of its key.
    async fn newest(&mut self, labels: &Labels, row: usize) -> Result<Option<Spot>> {
        let (key, moment) = (labels.keys.row(row), labels.moment.value(row));
        while let Some((features, (batch, place))) = self.spot(self.at) {
            let other = features.keys.row(place);
            if (other, features.since.value(place)) > (key, moment) {
                break;
            }
            let newer = self.spot(self.best).is_none_or(|(best, (_, best_place))| {
                best.keys.row(best_place) != other
                    || best.time.value(best_place) <= features.time.value(place)
            });
            let more = place + 1 < features.batch.num_rows();
            if newer {
                self.best = Some((batch, place));
            }
            match more {
                true => self.at = Some((batch, place + 1)),
                false => self.fetch().await?,
            }
        }
        let best = self.spot(self.best);
        Ok(best.filter(|(best, (_, place))| best.keys.row(*place) == key).map(|(_, spot)| spot))
    }

    fn spot(&self, spot: Option<Spot>) -> Option<(&Features, Spot)> {
        let (batch, place) = spot?;
        Some((self.held.get(batch)?.as_ref()?, (batch, place)))
    }

    fn holding(&self) -> usize {
        self.held.iter().flatten().count()
    }

    /// Puts the cursor on the next batch of the right side. What no row of the answer refers to is held no longer.
    async fn fetch(&mut self) -> Result<()> {
        self.at = None;
        let best = self.best.map(|(batch, _)| batch);
        for (place, held) in self.held.iter_mut().enumerate() {
            if held.as_ref().is_some_and(|features| !features.used) && Some(place) != best {
                *held = None;
            }
        }
        while let Some(batch) = self.right.next().await.transpose()? {
            if batch.num_rows() == 0 {
                continue;
            }
            let keys = self.right_keys.of(&batch)?;
            let (since, time) = (self.right_keys.time(0, &batch)?, self.right_keys.time(1, &batch)?);
            let features = Some(Features { batch, keys, since, time, used: false });
            let place = match self.held.iter().position(Option::is_none) {
                Some(free) => {
                    self.held[free] = features;
                    free
                }
                None => {
                    self.held.push(features);
                    self.held.len() - 1
                }
            };
            self.at = Some((place, 0));
            break;
        }
        Ok(())
    }

    /// The rows are out: only the best row and the cursor's batch are needed.
    fn forget(&mut self) {
        let (at, best) = (self.at.map(|(batch, _)| batch), self.best.map(|(batch, _)| batch));
        for (place, held) in self.held.iter_mut().enumerate() {
            match held {
                Some(features) if Some(place) == at || Some(place) == best => features.used = false,
                _ => *held = None,
            }
        }
    }

    fn answer(&self, labels: &RecordBatch, found: &[Option<Spot>]) -> Result<RecordBatch> {
        let rows = found.iter().enumerate().filter(|(_, spot)| self.outer || spot.is_some());
        let (rows, spots): (Vec<u64>, Vec<Option<Spot>>) =
            rows.map(|(row, spot)| (row as u64, *spot)).unzip();
        let labels = match rows.len() == labels.num_rows() {
            true => labels.clone(),
            false => take_record_batch(labels, &UInt64Array::from(rows))?,
        };
        // Behind the batches there is one row of NULL.
        let nothing = (self.held.len(), 0);
        let spots: Vec<Spot> = spots.into_iter().map(|spot| spot.unwrap_or(nothing)).collect();
        let mut columns = labels.columns().to_vec();
        for (at, field) in self.right_schema.fields().iter().enumerate() {
            let null = new_null_array(field.data_type(), 1);
            let column = |held: &'_ Option<Features>| {
                held.as_ref()
                    .map_or_else(|| Arc::clone(&null), |features| Arc::clone(features.batch.column(at)))
            };
            let held: Vec<ArrayRef> = self.held.iter().map(column).chain([Arc::clone(&null)]).collect();
            let values: Vec<&dyn Array> = held.iter().map(AsRef::as_ref).collect();
            columns.push(interleave(&values, &spots)?);
        }
        let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(labels.num_rows()));
        Ok(RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &options)?)
    }
}
