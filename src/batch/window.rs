//! Windows of a batch plan over whole batches, in the place of DataFusion's, which work row by row.
//!
//! [`RangeWindows`] replaces a window node all of whose calls are aggregates over
//! `RANGE BETWEEN {UNBOUNDED | n} PRECEDING | CURRENT ROW AND CURRENT ROW`, peers included, of one PARTITION BY and ORDER
//! BY. A bounded frame needs one ascending ORDER BY: a timestamp with an interval of fixed length, or a BIGINT. The answer
//! is DataFusion's, row by row: `count`, `sum` of BIGINT, DECIMAL (both wrap) and doubles (exact, [`millstream_udfs::sum`]),
//! `avg` of doubles, `min` and `max` of whatever is a number have kernels of ours ([`kernels`]); any other aggregate is
//! computed by its own accumulator, a group of peers at a time.
//!
//! Everything else stays with DataFusion: ROWS and GROUPS frames, other ends, DISTINCT, FILTER, IGNORE NULLS, window
//! functions such as `row_number`, frames of months, input that is sorted by a part of the keys alone.
//!
//! The input is sorted by the keys and the order, as it is for DataFusion's node, by the same sort, which spills. Of the
//! rows the node holds the batches whose last rows' peers may still come, and the values and times of the frame that is
//! open: [`range`]. Nothing is sorted, hashed or looked up here.

mod kernels;
mod range;
mod spec;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode, TreeNodeRecursion};
use datafusion::common::{Result, Statistics};
use datafusion::execution::memory_pool::MemoryConsumer;
use datafusion::execution::session_state::SessionStateBuilder;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::{OrderingRequirements, PhysicalExpr};
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::execution_plan::{CardinalityEffect, ChildrenPropertiesMode};
use datafusion::physical_plan::metrics::{BaselineMetrics, ExecutionPlanMetricsSet, MetricsSet};
use datafusion::physical_plan::statistics::{ChildStats, StatisticsArgs};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::windows::{BoundedWindowAggExec, WindowAggExec, WindowExpr};
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, InputDistributionRequirements, InputOrderMode,
    PlanProperties, ReplaceChildrenOptions,
};
use datafusion::prelude::SessionContext;
use futures::{StreamExt, stream};

use range::Run;
use spec::Spec;

/// The session with windows of ours.
pub fn with_windows(session: &SessionContext) -> SessionContext {
    let state = SessionStateBuilder::new_from_existing(session.state());
    SessionContext::new_with_state(state.with_physical_optimizer_rule(Arc::new(RangeWindows)).build())
}

/// Replaces the window nodes that [`RangeWindowExec`] can do.
#[derive(Debug)]
pub struct RangeWindows;

impl PhysicalOptimizerRule for RangeWindows {
    fn name(&self) -> &'static str {
        "range_windows"
    }

    fn optimize(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        _config: &ConfigOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        plan.transform_up(|node| {
            Ok(match RangeWindowExec::of(&node) {
                Some(ours) => Transformed::yes(Arc::new(ours) as Arc<dyn ExecutionPlan>),
                None => Transformed::no(node),
            })
        })
        .data()
    }

    fn schema_check(&self) -> bool {
        true
    }
}

/// The calls of a window node whose input is sorted by all keys.
fn calls(node: &dyn ExecutionPlan) -> Option<&[Arc<dyn WindowExpr>]> {
    if let Some(window) = node.downcast_ref::<BoundedWindowAggExec>() {
        let ours = matches!(window.input_order_mode, InputOrderMode::Sorted);
        return (ours && window.state_observer().is_none()).then(|| window.window_expr());
    }
    node.downcast_ref::<WindowAggExec>().map(WindowAggExec::window_expr)
}

/// Stands for one of DataFusion's window nodes: what it needs and promises is what that needs and promises.
#[derive(Debug)]
pub struct RangeWindowExec {
    plain: Arc<dyn ExecutionPlan>,
    spec: Arc<Spec>,
    metrics: ExecutionPlanMetricsSet,
}

impl RangeWindowExec {
    fn of(plain: &Arc<dyn ExecutionPlan>) -> Option<Self> {
        let input = plain.children().first()?.schema();
        let spec = Spec::of(calls(plain.as_ref())?, &input, &plain.schema())?;
        let metrics = ExecutionPlanMetricsSet::new();
        Some(Self { plain: Arc::clone(plain), spec: Arc::new(spec), metrics })
    }
}

impl DisplayAs for RangeWindowExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let call = |expr: &Arc<dyn WindowExpr>| format!("{} {}", expr.name(), expr.get_window_frame());
        let calls: Vec<String> = calls(self.plain.as_ref()).into_iter().flatten().map(call).collect();
        write!(f, "RangeWindowExec: {}", calls.join(", "))
    }
}

impl ExecutionPlan for RangeWindowExec {
    fn name(&self) -> &'static str {
        "RangeWindowExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        self.plain.properties()
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        self.plain.children()
    }

    fn maintains_input_order(&self) -> Vec<bool> {
        vec![true]
    }

    fn required_input_ordering(&self) -> Vec<Option<OrderingRequirements>> {
        self.plain.required_input_ordering()
    }

    fn input_distribution_requirements(&self) -> InputDistributionRequirements {
        self.plain.input_distribution_requirements()
    }

    fn apply_expressions(
        &self,
        f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        self.plain.apply_expressions(f)
    }

    fn replace_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn ExecutionPlan>>,
        options: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let plain = Arc::clone(&self.plain).replace_children(children, options)?;
        Ok(match Self::of(&plain) {
            Some(ours) => Arc::new(ours),
            None => plain,
        })
    }

    fn with_new_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        self.replace_children(children, ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute))
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let [input] = &self.plain.children()[..] else {
            return datafusion::common::internal_err!("a window has one input");
        };
        let input = input.execute(partition, Arc::clone(&context))?;
        let run = Run::new(&self.spec, self.schema())?;
        let held = MemoryConsumer::new(format!("RangeWindow[{partition}]")).register(context.memory_pool());
        let baseline = BaselineMetrics::new(&self.metrics, partition);
        let start = (input, run, held, baseline);
        let batches = stream::try_unfold(start, |(mut input, mut run, held, baseline)| async move {
            loop {
                if let Some(batch) = run.next()? {
                    baseline.record_output(batch.num_rows());
                    return Ok(Some((batch, (input, run, held, baseline))));
                }
                if run.is_finished() {
                    return Ok(None);
                }
                let batch = input.next().await.transpose()?;
                let _timer = baseline.elapsed_compute().timer();
                match batch {
                    Some(batch) => run.push(batch)?,
                    None => run.finish()?,
                }
                // What a frame holds cannot spill; others have to, then.
                held.resize(run.size());
            }
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(self.schema(), Box::pin(batches))))
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }

    fn child_stats_requests(&self, partition: Option<usize>) -> Vec<ChildStats> {
        self.plain.child_stats_requests(partition)
    }

    fn statistics_from_inputs(
        &self,
        input: &[Arc<Statistics>],
        args: &StatisticsArgs,
    ) -> Result<Arc<Statistics>> {
        self.plain.statistics_from_inputs(input, args)
    }

    fn cardinality_effect(&self) -> CardinalityEffect {
        CardinalityEffect::Equal
    }
}
