//! What a window node computes, and whether it can be done here.

use std::sync::Arc;

use arrow::datatypes::{DataType, Schema, TimeUnit};
use datafusion::common::ScalarValue;
use datafusion::logical_expr::{WindowFrame, WindowFrameBound, WindowFrameUnits};
use datafusion::physical_expr::aggregate::AggregateFunctionExpr;
use datafusion::physical_expr::window::SlidingAggregateWindowExpr;
use datafusion::physical_expr::{PhysicalExpr, PhysicalSortExpr};
use datafusion::physical_plan::windows::{PlainAggregateWindowExpr, WindowExpr};

use super::kernels::{Kernel, kernel};

/// Where a frame starts; it ends with the peers of the current row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    Unbounded,
    /// With the peers of the current row.
    Peers,
    /// So far back, in units of the order.
    Back(i64),
}

/// An aggregate over a frame.
#[derive(Debug)]
pub struct Call {
    pub aggregate: AggregateFunctionExpr,
    pub args: Vec<Arc<dyn PhysicalExpr>>,
    /// Of the arguments.
    pub types: Vec<DataType>,
    /// Its place among [`Spec::frames`].
    pub frame: usize,
    pub output: DataType,
}

#[derive(Debug)]
pub struct Spec {
    pub keys: Vec<Arc<dyn PhysicalExpr>>,
    pub order: Vec<Arc<dyn PhysicalExpr>>,
    /// Each once.
    pub frames: Vec<Frame>,
    pub calls: Vec<Call>,
}

impl Spec {
    /// The calls, if all of them can be done.
    pub fn of(exprs: &[Arc<dyn WindowExpr>], input: &Schema, output: &Schema) -> Option<Self> {
        let first = exprs.first()?;
        let same = |expr: &Arc<dyn WindowExpr>| {
            expr.partition_by() == first.partition_by() && expr.order_by() == first.order_by()
        };
        // Without an order all rows are peers of each other, wherever the partition ends.
        if first.order_by().is_empty() || !exprs.iter().all(same) {
            return None;
        }
        let mut spec = Self {
            keys: first.partition_by().to_vec(),
            order: first.order_by().iter().map(|sort| Arc::clone(&sort.expr)).collect(),
            frames: Vec::new(),
            calls: Vec::new(),
        };
        for (at, expr) in exprs.iter().enumerate() {
            let frame = frame(expr.get_window_frame(), first.order_by(), input)?;
            let known = spec.frames.iter().position(|known| *known == frame).unwrap_or_else(|| {
                spec.frames.push(frame);
                spec.frames.len() - 1
            });
            let aggregate = aggregate(expr)?;
            let args = aggregate.expressions();
            let types = args.iter().map(|arg| arg.data_type(input).ok()).collect::<Option<_>>()?;
            let call = Call {
                args,
                types,
                aggregate,
                frame: known,
                output: output.field(input.fields().len() + at).data_type().clone(),
            };
            spec.kernel(&call).ok()?;
            spec.calls.push(call);
        }
        Some(spec)
    }

    /// # Errors
    /// Those of the aggregate: it cannot take rows back.
    pub fn kernel(&self, call: &Call) -> datafusion::common::Result<Box<dyn Kernel>> {
        kernel(call, self.frames[call.frame] == Frame::Unbounded)
    }
}

/// The aggregate function of a call without FILTER, DISTINCT and IGNORE NULLS.
fn aggregate(expr: &Arc<dyn WindowExpr>) -> Option<AggregateFunctionExpr> {
    let any = expr.as_any();
    let aggregate = match any.downcast_ref::<PlainAggregateWindowExpr>() {
        Some(plain) => plain.get_aggregate_expr(),
        None => any.downcast_ref::<SlidingAggregateWindowExpr>()?.get_aggregate_expr(),
    };
    // The filter is the last field, and can be had in no other way; what is not known to have none is left alone.
    let unfiltered = format!("{expr:?}").ends_with(", filter: None }");
    let special = aggregate.is_distinct() || aggregate.ignore_nulls() || aggregate.is_reversed();
    (unfiltered && !special && aggregate.order_bys().is_empty()).then(|| aggregate.clone())
}

fn frame(frame: &WindowFrame, order: &[PhysicalSortExpr], input: &Schema) -> Option<Frame> {
    if frame.units != WindowFrameUnits::Range || frame.end_bound != WindowFrameBound::CurrentRow {
        return None;
    }
    match &frame.start_bound {
        WindowFrameBound::CurrentRow => Some(Frame::Peers),
        WindowFrameBound::Preceding(back) if back.is_null() => Some(Frame::Unbounded),
        WindowFrameBound::Preceding(back) => {
            let [sort] = order else { return None };
            let kind = sort.expr.data_type(input).ok().filter(|_| !sort.options.descending)?;
            distance(back, &kind).filter(|back| *back >= 0).map(Frame::Back)
        }
        WindowFrameBound::Following(_) => None,
    }
}

/// How far back an order of this type goes by the value; `None` where that depends on where one begins.
fn distance(back: &ScalarValue, order: &DataType) -> Option<i64> {
    let (unit, zone) = match (order, back) {
        (DataType::Int64, ScalarValue::Int64(back)) => return *back,
        (DataType::Timestamp(unit, zone), _) => (unit, zone),
        _ => return None,
    };
    // A day in a time zone may have 23 hours.
    let utc = zone.as_ref().is_none_or(|zone| matches!(zone.as_ref(), "UTC" | "+00:00"));
    let nanos = match back {
        ScalarValue::IntervalMonthDayNano(Some(back)) if back.months == 0 && (back.days == 0 || utc) => {
            i128::from(back.days) * 86_400_000_000_000 + i128::from(back.nanoseconds)
        }
        _ => return None,
    };
    let of_unit = match unit {
        TimeUnit::Second => 1_000_000_000,
        TimeUnit::Millisecond => 1_000_000,
        TimeUnit::Microsecond => 1_000,
        TimeUnit::Nanosecond => 1,
    };
    (nanos % of_unit == 0).then(|| i64::try_from(nanos / of_unit).ok()).flatten()
}
