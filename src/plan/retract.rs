//! GROUP BY over rows that change: its aggregates made of sums and extents that rows can be taken back from.
//!
//! The aggregate is rewritten to sums of numbers that are never NULL, and a projection over them: `count(x)` is the sum
//! of 1 where x is there, `sum(x)` the sum of x, NULL where `count(x)` is 0, `avg(x)` their quotient; FILTER becomes part
//! of what is summed. Integers and decimals are exact, and the sum of floats is one of its own ([`by_weights`]), so what is
//! taken back leaves no trace. `min(x)`, `max(x)` and `count(DISTINCT x)` are fields of one [`extent`], of any type that has an order.

use std::sync::Arc;

use arrow::datatypes::DataType;
use datafusion::common::ScalarValue;
use datafusion::functions::core::expr_fn::get_field;
use datafusion::functions_aggregate::sum::sum_udaf;
use datafusion::logical_expr::{
    self as logical, Expr, ExprSchemable, LogicalPlan, Projection, cast, col, lit, when,
};

use millstream_udfs::sum::by_weights;

use crate::error::{Error, Place, Result};
use crate::operators::group::extent::{DIFFERENT, GREATEST, LEAST, extent, is_orderable};

/// Name of the sum that counts the rows of a group; it comes first.
const ROWS: &str = "__rows";

/// The aggregate as sums and a projection over them.
///
/// # Errors
/// User: an aggregate that rows cannot be taken back from.
pub(super) fn retractable(
    aggregate: &logical::Aggregate,
    view: &str,
    place: &Place,
) -> Result<(logical::Aggregate, Projection)> {
    let mut sums = Sums { list: vec![sum_udaf().call(vec![lit(1i64)]).alias(ROWS)] };
    let fields = aggregate.schema.as_arrow().fields();
    let keys = aggregate.group_expr.len();
    let mut above = Vec::new();
    for (call, field) in aggregate.aggr_expr.iter().zip(&fields[keys..]) {
        let made = sums.made(call, field.data_type(), aggregate)?;
        let made = made.ok_or_else(|| {
            let hint = "count, sum, avg, min and max can be taken back; or group the source's rows by the final key in one step.";
            let place = crate::sql::place::find_word(place, "GROUP").unwrap_or_else(|| place.clone());
            Error::user(format!("{view}: {call} over rows that still change cannot run as a stream yet"))
                .hint(hint)
                .at(place)
        })?;
        above.push(made.alias(field.name()));
    }
    let grouped =
        logical::Aggregate::try_new(Arc::clone(&aggregate.input), aggregate.group_expr.clone(), sums.list)?;
    let columns = grouped.schema.columns();
    let keys = columns[..keys].iter().cloned().map(Expr::Column);
    let above = keys.chain(above).collect();
    let above = Projection::try_new(above, Arc::new(LogicalPlan::Aggregate(grouped.clone())))?;
    Ok((grouped, above))
}

/// The planner gives `avg` doubles, also of integers.
fn exact(argument: &Expr) -> &Expr {
    match argument {
        Expr::Cast(cast) if cast.field.data_type() == &DataType::Float64 => &cast.expr,
        other => other,
    }
}

/// The type in which an extent holds values: views of strings would hold on to the batches that they came in.
fn held_type(kind: DataType) -> DataType {
    match kind {
        DataType::Utf8View | DataType::LargeUtf8 => DataType::Utf8,
        DataType::BinaryView | DataType::LargeBinary => DataType::Binary,
        DataType::Dictionary(_, value) => held_type(*value),
        other => other,
    }
}

/// The calls that the aggregates are made of.
struct Sums {
    list: Vec<Expr>,
}

impl Sums {
    /// The column of a sum, added if it is new.
    fn sum(&mut self, of: Expr) -> Expr {
        self.call(sum_udaf().call(vec![of]))
    }

    fn call(&mut self, call: Expr) -> Expr {
        let known = self.list.iter().position(|other| matches!(other, Expr::Alias(a) if *a.expr == call));
        let at = known.unwrap_or_else(|| {
            let name = format!("__call{}", self.list.len());
            self.list.push(call.alias(name));
            self.list.len() - 1
        });
        col(format!("__call{at}"))
    }

    /// `None` for what cannot be taken back.
    fn made(&mut self, call: &Expr, output: &DataType, over: &logical::Aggregate) -> Result<Option<Expr>> {
        let function = match call {
            Expr::AggregateFunction(function) => function,
            Expr::Alias(alias) => return self.made(&alias.expr, output, over),
            _ => return Ok(None),
        };
        let params = &function.params;
        let [argument] = &params.args[..] else { return Ok(None) };
        if !params.order_by.is_empty() || params.null_treatment.is_some() {
            return Ok(None);
        }
        let extreme = match (function.func.name(), params.distinct) {
            ("min", _) => Some(LEAST),
            ("max", _) => Some(GREATEST),
            ("count", true) => Some(DIFFERENT),
            (_, true) => return Ok(None),
            (_, false) => None,
        };
        let argument = if extreme.is_some() { argument } else { exact(argument) };
        let there = argument.clone().is_not_null();
        let counted = match &params.filter {
            Some(filter) => there.and(filter.as_ref().clone()),
            None => there,
        };
        let one = when(counted.clone(), lit(1i64)).otherwise(lit(0i64))?;
        if let Some(field) = extreme {
            let kind = held_type(argument.get_type(over.input.schema())?);
            if !is_orderable(&kind) {
                return Ok(None);
            }
            let held = self.call(extent().call(vec![cast(argument.clone(), kind), one]));
            return Ok(Some(cast(get_field(held, field), output.clone())));
        }
        let count = self.sum(one.clone());
        if function.func.name() == "count" {
            return Ok(Some(count));
        }
        let kind = argument.get_type(over.input.schema())?;
        if matches!(kind, DataType::Float32 | DataType::Float64) {
            // NULL where no value is left, as SQL wants it.
            let sum = self.call(by_weights().call(vec![cast(argument.clone(), DataType::Float64), one]));
            return Ok(match function.func.name() {
                "sum" => Some(cast(sum, output.clone())),
                "avg" => Some(sum / cast(count, DataType::Float64)),
                _ => None,
            });
        }
        let (number, zero) = match kind {
            DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64 => {
                (cast(argument.clone(), DataType::Int64), lit(0i64))
            }
            DataType::Decimal128(p, s) => (argument.clone(), lit(ScalarValue::Decimal128(Some(0), p, s))),
            _ => return Ok(None),
        };
        let sum = self.sum(when(counted, number).otherwise(zero)?);
        let value = match (function.func.name(), output) {
            ("sum", _) => cast(sum, output.clone()),
            ("avg", DataType::Float64) => {
                cast(sum, DataType::Float64) / cast(count.clone(), DataType::Float64)
            }
            _ => return Ok(None),
        };
        Ok(Some(when(count.not_eq(lit(0i64)), value).end()?))
    }
}
