//! Point-in-time joins: `labels [LEFT] JOIN features FOR SYSTEM_TIME AS OF labels.ts ON labels.k = features.k`.
//!
//! To each row of the left side belongs at most one row of the right side: of those with the same keys and a time at or
//! before the moment (`labels.ts`), the newest. So nothing of the future leaks into a training set. JOIN drops rows without
//! one, LEFT JOIN keeps them with NULL. A key, moment or time that is NULL matches nothing.
//!
//! - **The right side's time** is its event time: the column that is named as the event time of a source or the time of a
//!   sink, else its only TIMESTAMP, else the first one that the condition names with `AND features.t <= labels.ts`.
//! - **Known then**: another `AND features.known_at <= labels.ts` leaves out rows that were not known yet at the moment, as
//!   with a value that is backfilled later. A row counts from the later one of both times on; the newest is still that
//!   of the greatest event time, and of several with this the one that was known last.
//! - **Ties** have the order of their origins (topic, partition, offset), if the right side has them, else that of all its
//!   columns: the answer does not depend on files.
//!
//! Both sides are partitioned by the keys and sorted by keys and time, which spills, and then merged in one pass
//! ([`merge`]): the number of pairs does not matter.

mod merge;
#[cfg(test)]
mod tests;

use std::cmp::Ordering;
use std::fmt;
use std::hash::Hash;
use std::sync::Arc;

use arrow::datatypes::DataType;
use async_trait::async_trait;
use datafusion::catalog::Session;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNodeRecursion};
use datafusion::common::{DFSchemaRef, JoinType, Result, internal_err};
use datafusion::execution::context::QueryPlanner;
use datafusion::execution::session_state::SessionStateBuilder;
use datafusion::functions::core::expr_fn::greatest;
use datafusion::logical_expr::logical_plan::builder::build_join_schema;
use datafusion::logical_expr::physical_planning_context::PhysicalPlanningContext;
use datafusion::logical_expr::type_coercion::binary::comparison_coercion;
use datafusion::logical_expr::utils::{check_all_columns_from_schema, conjunction, split_conjunction_owned};
use datafusion::logical_expr::{
    BinaryExpr, Expr, ExprSchemable, Extension, Join, LogicalPlan, LogicalPlanBuilder, Operator,
    UserDefinedLogicalNode, UserDefinedLogicalNodeCore, cast,
};
use datafusion::optimizer::AnalyzerRule;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_planner::{DefaultPhysicalPlanner, ExtensionPlanner, PhysicalPlanner};
use datafusion::prelude::SessionContext;

use crate::plan::StreamPlan;
use crate::plan::as_of::{moment, moment_within, refused};
use crate::plan::source::METADATA;
use merge::{AsOfExec, Side};

const CONDITION: &str = "Write ON labels.user_id = features.user_id: equal keys, joined by AND, and comparisons of times of the table with the moment (features.known_at <= labels.ts). Other conditions belong into a subquery or into WHERE.";

/// The session with point-in-time joins; `plan` names the times of its sources and sinks.
pub fn with_joins(session: &SessionContext, plan: &StreamPlan) -> SessionContext {
    let sinks = plan.sinks().filter_map(|(_, sink)| Some(sink.schema.field(sink.order?).name().clone()));
    let source =
        plan.source().and_then(|(_, source)| Some(source.schema.field(source.event_time?).name().clone()));
    let mut times: Vec<String> = source.into_iter().chain(sinks).collect();
    times.sort();
    times.dedup();
    let state = SessionStateBuilder::new_from_existing(session.state());
    let session = SessionContext::new_with_state(state.with_query_planner(Arc::new(Planner)).build());
    session.add_analyzer_rule(Arc::new(AsOfJoins { times }));
    session
}

/// Gives JOINs with a moment their meaning.
#[derive(Debug)]
struct AsOfJoins {
    /// Names of columns that are the time of their rows.
    times: Vec<String>,
}

impl AnalyzerRule for AsOfJoins {
    fn analyze(&self, plan: LogicalPlan, _: &ConfigOptions) -> Result<LogicalPlan> {
        let done = plan.transform_up_with_subqueries(|node| {
            let mut found = None;
            node.apply_expressions(|expr| {
                found = found.take().or_else(|| moment_within(expr));
                Ok(TreeNodeRecursion::Continue)
            })?;
            match (found, node) {
                (None, node) => Ok(Transformed::no(node)),
                (Some(_), LogicalPlan::Join(join)) => Ok(Transformed::yes(self.joined(join)?)),
                (Some(moment), _) => {
                    Err(refused("FOR SYSTEM_TIME AS OF belongs to a JOIN of two tables", CONDITION, &moment))
                }
            }
        })?;
        Ok(done.data)
    }

    fn name(&self) -> &'static str {
        "as_of_joins"
    }
}

/// What the condition of a join says.
struct Condition {
    moment: Expr,
    /// Left and right.
    keys: Vec<(Expr, Expr)>,
    /// Times of the right side that must not be after the moment.
    not_after: Vec<Expr>,
}

impl AsOfJoins {
    fn joined(&self, join: Join) -> Result<LogicalPlan> {
        let condition = read(&join)?;
        let outer = match join.join_type {
            JoinType::Inner => false,
            JoinType::Left => true,
            other => {
                let message = format!("{other} JOIN with FOR SYSTEM_TIME AS OF has no meaning");
                return Err(refused(message, "Use JOIN or LEFT JOIN.", &condition.moment));
            }
        };
        let (time, known) = self.times(&join, &condition)?;
        let (left, right) = (join.left.as_ref().clone(), join.right.as_ref().clone());
        let (moment, times) = common_type(&condition.moment, time, known, &left, &right)?;
        let ties = ties(&right);
        let (left_keys, right_keys): (Vec<Expr>, Vec<Expr>) = condition.keys.into_iter().unzip();
        // What is NULL matches nothing.
        let present = right_keys.iter().chain(&times).map(|expr| expr.clone().is_not_null());
        let present = conjunction(present).unwrap_or_else(|| datafusion::prelude::lit(true));
        let right = LogicalPlanBuilder::from(right).filter(present)?.build()?;
        let known_from = match times.len() {
            1 => times[0].clone(),
            _ => greatest(times.clone()),
        };
        let keys = left_keys.len();
        let left_exprs = left_keys.into_iter().chain([moment]).collect();
        let right_exprs = right_keys.into_iter().chain([known_from, times[0].clone()]).chain(ties).collect();
        let node = AsOf::new(left, right, left_exprs, right_exprs, keys, outer)?;
        Ok(LogicalPlan::Extension(Extension { node: Arc::new(node) }))
    }

    /// The right side's event time, and its other times that must not be after the moment.
    fn times(&self, join: &Join, condition: &Condition) -> Result<(Expr, Vec<Expr>)> {
        let schema = join.right.schema();
        let stamps: Vec<Expr> = schema
            .iter()
            .filter(|(_, field)| matches!(field.data_type(), DataType::Timestamp(..)))
            .map(Expr::from)
            .collect();
        let named = |expr: &&Expr| matches!(expr, Expr::Column(column) if self.times.contains(&column.name));
        let preferred: Vec<&Expr> = stamps.iter().filter(named).collect();
        let mut known = condition.not_after.clone();
        let time = match (&preferred[..], &stamps[..], &known[..]) {
            ([only], _, _) => (*only).clone(),
            (_, [only], _) => only.clone(),
            (_, _, [first, ..]) => first.clone(),
            _ => {
                let names: Vec<String> = stamps.iter().map(|expr| expr.schema_name().to_string()).collect();
                let message = match names.is_empty() {
                    true => "the joined table has no TIMESTAMP that could be its time".to_owned(),
                    false => format!("which column is the time of the joined table: {}?", names.join(" or ")),
                };
                let hint = "Name it in the condition: … AND features.event_time <= labels.ts.";
                return Err(refused(message, hint, &condition.moment));
            }
        };
        known.retain(|expr| bare(expr) != &time);
        Ok((time, known))
    }
}

/// The parts of a condition.
fn read(join: &Join) -> Result<Condition> {
    let parts: Vec<Expr> = join.filter.clone().map(split_conjunction_owned).unwrap_or_default();
    let Some(at) = parts.iter().find_map(|part| moment(part)).cloned() else {
        let within = join.filter.as_ref().and_then(moment_within);
        let at = within.unwrap_or_else(|| datafusion::prelude::lit(true));
        return Err(refused("a point-in-time JOIN knows no OR in its condition", CONDITION, &at));
    };
    let of =
        |expr: &Expr, plan: &LogicalPlan| check_all_columns_from_schema(&expr.column_refs(), plan.schema());
    if !of(&at, &join.left)? {
        let message = "the moment of FOR SYSTEM_TIME AS OF is one of the rows before the JOIN";
        return Err(refused(message, "Write labels JOIN features FOR SYSTEM_TIME AS OF labels.ts.", &at));
    }
    let mut condition = Condition { moment: at.clone(), keys: join.on.clone(), not_after: Vec::new() };
    for part in parts.into_iter().filter(|part| moment(part).is_none()) {
        let refuse =
            || refused(format!("a point-in-time JOIN cannot have the condition {part}"), CONDITION, &at);
        let Expr::BinaryExpr(BinaryExpr { left, op, right }) = &part else { return Err(refuse()) };
        let (a, b) = (left.as_ref(), right.as_ref());
        match op {
            Operator::Eq if of(a, &join.left)? && of(b, &join.right)? => {
                condition.keys.push((a.clone(), b.clone()));
            }
            Operator::Eq if of(b, &join.left)? && of(a, &join.right)? => {
                condition.keys.push((b.clone(), a.clone()));
            }
            Operator::LtEq if of(a, &join.right)? && bare(b) == bare(&at) => {
                condition.not_after.push(bare(a).clone());
            }
            Operator::GtEq if of(b, &join.right)? && bare(a) == bare(&at) => {
                condition.not_after.push(bare(b).clone());
            }
            _ => return Err(refuse()),
        }
    }
    match condition.keys.is_empty() {
        true => Err(refused("a point-in-time JOIN needs keys", CONDITION, &at)),
        false => Ok(condition),
    }
}

/// Without casts around it.
fn bare(expr: &Expr) -> &Expr {
    match expr {
        Expr::Cast(inner) => bare(&inner.expr),
        Expr::Alias(inner) => bare(&inner.expr),
        other => other,
    }
}

/// The moment, and event time and the other times, in one type that can be compared.
fn common_type(
    moment: &Expr,
    time: Expr,
    known: Vec<Expr>,
    left: &LogicalPlan,
    right: &LogicalPlan,
) -> Result<(Expr, Vec<Expr>)> {
    let of_moment = moment.get_type(left.schema())?;
    let times: Vec<Expr> = std::iter::once(time).chain(known).collect();
    let mut common = Some(of_moment.clone());
    for time in &times {
        let of_time = time.get_type(right.schema())?;
        common = common.and_then(|common| comparison_coercion(&common, &of_time));
    }
    let Some(common) = common.filter(|common| matches!(common, DataType::Timestamp(..))) else {
        let message = format!("{moment} is {of_moment}, which cannot be compared with a time");
        return Err(refused(
            message,
            "Cast it: FOR SYSTEM_TIME AS OF (CAST(labels.ts AS TIMESTAMP)).",
            moment,
        ));
    };
    let times = times.into_iter().map(|time| cast(time, common.clone())).collect();
    Ok((cast(moment.clone(), common), times))
}

/// What orders rows of one key and time.
fn ties(right: &LogicalPlan) -> Vec<Expr> {
    let column = |name: &str| right.schema().iter().find(|(_, field)| field.name() == name).map(Expr::from);
    let origin: Option<Vec<Expr>> = METADATA[..3].iter().map(|name| column(name)).collect();
    let sortable = |kind: &DataType| {
        !kind.is_nested() && !matches!(kind, DataType::Union(..) | DataType::RunEndEncoded(..))
    };
    origin.unwrap_or_else(|| {
        let columns = right.schema().iter().filter(|(_, field)| sortable(field.data_type()));
        columns.map(Expr::from).collect()
    })
}

/// The join in a logical plan.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct AsOf {
    left: LogicalPlan,
    right: LogicalPlan,
    /// The keys, then the moment.
    left_exprs: Vec<Expr>,
    /// The keys, since when a row counts, its event time, then what orders ties.
    right_exprs: Vec<Expr>,
    keys: usize,
    outer: bool,
    schema: DFSchemaRef,
}

impl AsOf {
    fn new(
        left: LogicalPlan,
        right: LogicalPlan,
        left_exprs: Vec<Expr>,
        right_exprs: Vec<Expr>,
        keys: usize,
        outer: bool,
    ) -> Result<Self> {
        let kind = if outer { JoinType::Left } else { JoinType::Inner };
        let schema = Arc::new(build_join_schema(left.schema(), right.schema(), &kind)?);
        Ok(Self { left, right, left_exprs, right_exprs, keys, outer, schema })
    }
}

impl PartialOrd for AsOf {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        let parts = |node: &Self| (node.left_exprs.clone(), node.right_exprs.clone(), node.keys, node.outer);
        match parts(self).partial_cmp(&parts(other))? {
            Ordering::Equal if self == other => Some(Ordering::Equal),
            Ordering::Equal => None,
            order => Some(order),
        }
    }
}

impl UserDefinedLogicalNodeCore for AsOf {
    fn name(&self) -> &str {
        "AsOfJoin"
    }

    fn inputs(&self) -> Vec<&LogicalPlan> {
        vec![&self.left, &self.right]
    }

    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }

    fn expressions(&self) -> Vec<Expr> {
        self.left_exprs.iter().chain(&self.right_exprs).cloned().collect()
    }

    fn fmt_for_explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.outer { "Left" } else { "Inner" };
        let keys = self.left_exprs.iter().zip(&self.right_exprs).take(self.keys);
        let keys: Vec<String> = keys.map(|(left, right)| format!("{left} = {right}")).collect();
        let (moment, since) = (&self.left_exprs[self.keys], &self.right_exprs[self.keys]);
        write!(f, "AsOfJoin: {kind}, {}, newest with {since} <= {moment}", keys.join(", "))
    }

    fn with_exprs_and_inputs(&self, exprs: Vec<Expr>, inputs: Vec<LogicalPlan>) -> Result<Self> {
        let mut exprs = exprs;
        let right_exprs = exprs.split_off(self.left_exprs.len().min(exprs.len()));
        match <[LogicalPlan; 2]>::try_from(inputs) {
            Ok([left, right]) if right_exprs.len() == self.right_exprs.len() => {
                Self::new(left, right, exprs, right_exprs, self.keys, self.outer)
            }
            _ => internal_err!("a point-in-time join has two inputs"),
        }
    }

    fn necessary_children_exprs(&self, output: &[usize]) -> Option<Vec<Vec<usize>>> {
        let width = self.left.schema().fields().len();
        let (left, right): (Vec<usize>, Vec<usize>) = output.iter().partition(|column| **column < width);
        Some(vec![left, right.into_iter().map(|column| column - width).collect()])
    }
}

/// DataFusion's planner, which also knows the join.
#[derive(Debug)]
struct Planner;

#[async_trait]
impl QueryPlanner for Planner {
    async fn create_physical_plan(
        &self,
        plan: &LogicalPlan,
        session: &dyn Session,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let planner = DefaultPhysicalPlanner::with_extension_planners(vec![Arc::new(Self)]);
        planner.create_physical_plan(plan, session).await
    }
}

#[async_trait]
impl ExtensionPlanner for Planner {
    async fn plan_extension(
        &self,
        planner: &dyn PhysicalPlanner,
        node: &dyn UserDefinedLogicalNode,
        logical: &[&LogicalPlan],
        physical: &[Arc<dyn ExecutionPlan>],
        session: &dyn Session,
        context: &PhysicalPlanningContext,
    ) -> Result<Option<Arc<dyn ExecutionPlan>>> {
        let Some(node) = node.as_any().downcast_ref::<AsOf>() else { return Ok(None) };
        let ([left, right], [left_input, right_input]) = (logical, physical) else {
            return internal_err!("a point-in-time join has two inputs");
        };
        let side = |exprs: &[Expr], logical: &LogicalPlan, input: &Arc<dyn ExecutionPlan>| -> Result<Side> {
            let exprs = exprs
                .iter()
                .map(|expr| planner.create_physical_expr(expr, logical.schema(), session, context))
                .collect::<Result<Vec<_>>>()?;
            Ok(Side { input: Arc::clone(input), exprs })
        };
        let left = side(&node.left_exprs, left, left_input)?;
        let right = side(&node.right_exprs, right, right_input)?;
        let schema = Arc::clone(node.schema.inner());
        Ok(Some(Arc::new(AsOfExec::new(left, right, node.keys, node.outer, schema)?)))
    }
}
