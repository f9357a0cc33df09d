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
    let exprs = window.window_expr.iter().map(tie_broken).collect();
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
        LogicalPlan::Join(join) if matches!(join.join_type, JoinType::Inner | JoinType::Left) => {
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use arrow::array::{ArrayRef, AsArray, Int32Array, Int64Array, RecordBatch, StringArray, new_null_array};
    use arrow::datatypes::{Int64Type, UInt64Type};

    use super::*;
    use crate::batch::Relation;
    use crate::plan::SourcePlan;
    use crate::plan::session::stream_session;
    use crate::sql::{Catalog, SourceText, Variables};

    const SQL: &str = "CREATE SOURCE s (k BIGINT NOT NULL, id BIGINT, at TIMESTAMP, WATERMARK FOR at AS at)
            WITH (connector = 'kafka', bootstrap_servers = 'x:1', topic = 's', format = 'json');
        CREATE VIEW narrow AS SELECT at, k + 1 AS k, id AS number FROM s WHERE k < 9;
        CREATE VIEW plain AS SELECT number AS id, row_number() OVER (PARTITION BY k ORDER BY at) AS n FROM narrow;
        CREATE VIEW joined AS SELECT s.id, row_number() OVER (PARTITION BY s.k ORDER BY at) AS n
            FROM s LEFT JOIN (VALUES (1, 'a')) AS t (code, name) ON s.k = t.code;
        CREATE VIEW windows AS SELECT id, row_number() OVER (PARTITION BY k, window_start ORDER BY at) AS n
            FROM HOP(s, at, INTERVAL '1 minute', INTERVAL '1 minute');";

    fn input(source: &SourcePlan, rows: i64) -> RecordBatch {
        let count = rows as usize;
        let column = |name: &str, data_type| -> ArrayRef {
            match name {
                "k" => Arc::new(Int64Array::from_iter_values((0..rows).map(|row| row % 3))),
                "_topic" => Arc::new(StringArray::from(vec!["s"; count])),
                "_partition" => Arc::new(Int32Array::from(vec![0; count])),
                // The rows lie the other way round than their offsets.
                "_offset" | "id" => Arc::new(Int64Array::from_iter_values((0..rows).rev())),
                "at" => arrow::compute::cast(&Int64Array::from(vec![0; count]), data_type).unwrap(),
                _ => new_null_array(data_type, count),
            }
        };
        let fields = source.schema.fields().iter();
        let columns = fields.map(|field| column(field.name(), field.data_type())).collect();
        RecordBatch::try_new(Arc::clone(&source.schema), columns).unwrap()
    }

    /// Rows of one time: their numbers follow the offsets, however many there are.
    #[tokio::test]
    async fn ties_are_broken_by_offset() {
        let variables = Variables { overrides: BTreeMap::new(), environment: &|_| None };
        let catalog = Catalog::load(&[SourceText::new("f", SQL)], &variables).unwrap();
        let session = stream_session().unwrap();
        let source = Arc::new(SourcePlan::new(&session, &catalog.sources[0]).unwrap());
        let input = input(&source, 600);
        let sources = BTreeMap::from([("s".to_owned(), source)]);
        for view in ["plain", "joined", "windows"] {
            let relation = Relation::plan(&catalog, &sources, view).await.unwrap();
            let answer = relation.over("s", &input).await.unwrap();
            let mut found = 0;
            for batch in &answer.batches {
                let (id, n) = (
                    batch.column(0).as_primitive::<Int64Type>(),
                    batch.column(1).as_primitive::<UInt64Type>(),
                );
                for row in 0..batch.num_rows() {
                    // Every third offset has the same key.
                    assert_eq!(n.value(row), id.value(row) as u64 / 3 + 1, "{view}");
                    found += 1;
                }
            }
            assert_eq!(found, 600, "{view}");
        }
    }
}
