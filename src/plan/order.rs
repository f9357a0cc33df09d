//! The total order of rows for windows that see it (DESIGN §3 *Order*): `row_number`, `lag`, `lead`, `ntile` and ROWS frames
//! break ties of ORDER BY by topic, partition and offset, as the stream does.
//!
//! The metadata columns are carried from the source up to such a window, through what keeps a row's origin: projections,
//! filters, aliases, windows, UNNEST and the left side of a join. Above GROUP BY and UNION there is no such place, and ties
//! stay as they are. RANGE frames and ranks see ORDER BY alone: more columns there would lose peers.

use std::sync::Arc;

use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{Column, DFSchema, Result};
use datafusion::logical_expr::expr::{Alias, WindowFunction};
use datafusion::logical_expr::{
    Expr, JoinType, LogicalPlan, LogicalPlanBuilder, Projection, Window, WindowFrameUnits,
};
use datafusion::optimizer::AnalyzerRule;

use crate::plan::source::METADATA;

/// Names of the carried columns, in order.
const CARRIED: [&str; 3] = ["__order_topic", "__order_partition", "__order_offset"];
/// Functions whose answer depends on the place of a row among its peers.
const PLACED: [&str; 4] = ["row_number", "lag", "lead", "ntile"];

#[derive(Debug)]
pub struct TotalOrder;

impl AnalyzerRule for TotalOrder {
    fn analyze(&self, plan: LogicalPlan, _: &ConfigOptions) -> Result<LogicalPlan> {
        plan.transform_up(|plan| match plan {
            LogicalPlan::Window(window) if window.window_expr.iter().any(|expr| placed(expr).is_some()) => {
                ordered(window)
            }
            plan => Ok(Transformed::no(plan)),
        })
        .map(|done| done.data)
    }

    fn name(&self) -> &'static str {
        "total_order"
    }
}

fn placed(expr: &Expr) -> Option<&WindowFunction> {
    let Expr::WindowFunction(function) = expr else { return None };
    let rows = function.params.window_frame.units == WindowFrameUnits::Rows;
    (rows || PLACED.contains(&function.fun.name())).then_some(function)
}

/// The window with its ties broken, and the columns it had.
fn ordered(window: Window) -> Result<Transformed<LogicalPlan>> {
    let Some(input) = carry(&window.input)? else { return Ok(Transformed::no(LogicalPlan::Window(window))) };
    let order: Vec<Expr> = carried(input.schema());
    let tie_broken = |expr: &Expr| {
        let Some(function) = placed(expr) else { return expr.clone() };
        let mut function = function.clone();
        function.params.order_by.extend(order.iter().map(|column| column.clone().sort(true, false)));
        // What is above names the column by its expression.
        let name = expr.schema_name().to_string();
        Expr::Alias(Alias::new(Expr::WindowFunction(Box::new(function)), None::<&str>, name))
    };
    // All windows of one node are of one order, so those that keep theirs get a node of their own.
    let (placed, others): (Vec<Expr>, Vec<Expr>) =
        window.window_expr.iter().cloned().partition(|expr| placed(expr).is_some());
    let input = match others.is_empty() {
        true => input,
        false => LogicalPlan::Window(Window::try_new(others, Arc::new(input))?),
    };
    let exprs = placed.iter().map(tie_broken).collect();
    let shown = window.schema.iter().map(|(qualifier, field)| Expr::from((qualifier, field))).collect();
    let window = LogicalPlan::Window(Window::try_new(exprs, Arc::new(input))?);
    Ok(Transformed::yes(LogicalPlan::Projection(Projection::try_new(shown, Arc::new(window))?)))
}

/// The carried columns of a plan that has them.
fn carried(schema: &DFSchema) -> Vec<Expr> {
    let find = |name: &&str| schema.iter().find(|(_, field)| field.name() == *name);
    CARRIED.iter().filter_map(find).map(Expr::from).collect()
}

/// The plan with the place of each row; `None` where rows have none.
fn carry(plan: &LogicalPlan) -> Result<Option<LogicalPlan>> {
    if carried(plan.schema()).len() == CARRIED.len() {
        return Ok(Some(plan.clone()));
    }
    match plan {
        LogicalPlan::TableScan(scan) => {
            let column = |(from, to): (&&str, &&str)| {
                let (qualifier, field) =
                    scan.projected_schema.iter().find(|(_, field)| field.name() == *from)?;
                Some(Expr::from((qualifier, field)).alias(*to))
            };
            let places: Option<Vec<Expr>> = METADATA.iter().zip(&CARRIED).map(column).collect();
            let Some(places) = places else { return Ok(None) };
            let all = scan.projected_schema.iter().map(Expr::from).chain(places).collect();
            Ok(Some(LogicalPlan::Projection(Projection::try_new(all, Arc::new(plan.clone()))?)))
        }
        LogicalPlan::Projection(projection) => {
            let Some(input) = carry(&projection.input)? else { return Ok(None) };
            let exprs = projection.expr.iter().cloned().chain(carried(input.schema())).collect();
            Ok(Some(LogicalPlan::Projection(Projection::try_new(exprs, Arc::new(input))?)))
        }
        LogicalPlan::Unnest(unnest) => {
            let Some(input) = carry(&unnest.input)? else { return Ok(None) };
            let columns: Vec<Column> = unnest.exec_columns.clone();
            let plan = LogicalPlanBuilder::from(input);
            plan.unnest_columns_with_options(columns, unnest.options.clone())?.build().map(Some)
        }
        LogicalPlan::Join(join)
            if matches!(
                join.join_type,
                JoinType::Inner | JoinType::Left | JoinType::LeftAnti | JoinType::LeftSemi
            ) =>
        {
            let Some(left) = carry(&join.left)? else { return Ok(None) };
            let inputs = vec![left, join.right.as_ref().clone()];
            plan.with_new_exprs(plan.expressions(), inputs).map(Some)
        }
        LogicalPlan::SubqueryAlias(_) | LogicalPlan::Filter(_) | LogicalPlan::Window(_) => {
            let Some(input) = plan.inputs().first().map(|input| carry(input)).transpose()?.flatten() else {
                return Ok(None);
            };
            plan.with_new_exprs(plan.expressions(), vec![input]).map(Some)
        }
        _ => Ok(None),
    }
}
