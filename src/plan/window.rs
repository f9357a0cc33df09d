//! OVER → one operator per key: nested `Window` nodes of a view, their frames and functions.

use std::sync::Arc;

use arrow::datatypes::{Field, Schema};
use datafusion::common::ScalarValue;
use datafusion::logical_expr::expr::WindowFunction;
use datafusion::logical_expr::{
    Expr, LogicalPlan, Window, WindowFrameBound, WindowFrameUnits, WindowFunctionDefinition,
};

use crate::error::{Error, Place, Result};
use crate::operators::over::{Frame, Function, OverSpec, WindowCall};
use crate::plan::group::closing_key;
use crate::plan::lower::{Emission, Lowered, Lowering};
use crate::plan::prepared::Prepared;
use crate::plan::{Edge, NodeKind};
use crate::stream::Port;

impl Lowering<'_> {
    /// OVER: nested `Window` nodes with the same keys become one operator with several calls.
    pub(super) fn window(
        &mut self,
        top: &Window,
        e: Emission,
        closes: bool,
        view: &str,
        place: &Place,
    ) -> Result<Lowered> {
        let mut levels = vec![top];
        while let LogicalPlan::Window(inner) = levels[levels.len() - 1].input.as_ref() {
            levels.push(inner);
        }
        levels.reverse();
        let bottom = &levels[0].input;
        let input = self.step(bottom, e, closes, view, place)?;
        if input.updating {
            return Err(Error::user(format!("{view}: a window over GROUP BY cannot run as a stream"))
                .hint("Rows of a GROUP BY change; use a window over the source instead.")
                .at(place.clone()));
        }
        if input.keys.is_some() && e != Emission::Final {
            return Err(Error::user(format!(
                "{view}: the newest rows of a window over windows cannot be kept yet"
            ))
            .hint("Put all windows of one key into one view, or write to a sink with the emission 'final'.")
            .at(place.clone()));
        }
        let functions: Vec<&WindowFunction> = levels
            .iter()
            .flat_map(|w| &w.window_expr)
            .map(|expr| window_function(expr, view, place))
            .collect::<Result<_>>()?;
        let mut prepared = Prepared::new(self, bottom, &input, view, place);
        let keys = prepared.keys(&functions)?;
        let fields = top.schema.as_arrow().fields();
        let first = bottom.schema().fields().len();
        let calls: Vec<WindowCall> = functions
            .iter()
            .enumerate()
            .map(|(i, function)| prepared.call(function, Arc::clone(&fields[first + i])))
            .collect::<Result<_>>()?;
        let (input, width) = prepared.finish();
        let schema = Arc::clone(&self.plan.nodes[input.node].schema);
        let spec = OverSpec {
            closing: closing_key(&keys, &schema, &input.closes),
            input: schema,
            partition_by: keys.clone(),
            calls,
            want_final: false,
            want_latest: false,
        };
        self.over(spec, input, width, keys, e, view)
    }

    /// Adds the OVER node, or finds the equal one of another sink, then drops helper columns.
    fn over(
        &mut self,
        mut spec: OverSpec,
        input: Lowered,
        width: usize,
        keys: Vec<usize>,
        e: Emission,
        view: &str,
    ) -> Result<Lowered> {
        let same = self.plan.nodes.iter().position(|node| {
            let edge = node.inputs.iter().any(|edge| edge.from == input.node && edge.port == input.port);
            matches!(&node.kind, NodeKind::Over(other) if edge && other.same_state(&spec))
        });
        let (port, node) = match (e, same) {
            (e, Some(node)) => (over_port(e), node),
            (e, None) => {
                let mut fields: Vec<_> = spec.input.fields().iter().cloned().collect();
                fields.extend(spec.calls.iter().map(|call| Arc::clone(&call.output)));
                let edge =
                    Edge { from: input.node, port: input.port, exchange: Some(keys.clone()), branch: 0 };
                let id = format!("{view}.over{}", self.plan.nodes.len());
                spec.want_final = false;
                (over_port(e), self.add(id, NodeKind::Over(spec), Some(edge), Arc::new(Schema::new(fields))))
            }
        };
        if let NodeKind::Over(spec) = &mut self.plan.nodes[node].kind {
            spec.want_final |= e == Emission::Final;
            spec.want_latest |= e == Emission::Latest;
        }
        let mut closes = input.closes.clone();
        closes.resize(self.plan.nodes[node].schema.fields().len(), None);
        let keys: Vec<Option<usize>> = keys.into_iter().map(Some).collect();
        let out = Lowered { node, port, closes, dealt: keys.clone(), keys: Some(keys), ..input };
        let total = self.plan.nodes[node].schema.fields().len();
        let helpers = self.helper_columns(&out, width);
        if helpers == 0 {
            return Ok(out);
        }
        let kept: Vec<usize> = (0..total).filter(|c| *c < width || *c >= width + helpers).collect();
        self.select(&out, &kept, view)
    }

    fn helper_columns(&self, over: &Lowered, width: usize) -> usize {
        match &self.plan.nodes[over.node].kind {
            NodeKind::Over(spec) => spec.input.fields().len() - width,
            _ => 0,
        }
    }
}

impl Prepared<'_, '_> {
    /// The partition columns, which all windows of one operator share.
    fn keys(&mut self, functions: &[&WindowFunction]) -> Result<Vec<usize>> {
        let first = &functions[0].params.partition_by;
        if first.is_empty() {
            let hint = "Add PARTITION BY, so that rows of different keys need not wait for each other.";
            return Err(self.refuse(
                "a window without PARTITION BY cannot run as a stream".into(),
                "OVER",
                hint,
            ));
        }
        if functions.iter().any(|function| function.params.partition_by != *first) {
            let hint = "Write one view per key.";
            let what = "windows with different PARTITION BY in one view cannot run as a stream yet";
            return Err(self.refuse(what.into(), "PARTITION", hint));
        }
        first.iter().map(|key| self.column(key)).collect()
    }

    fn call(&mut self, window: &WindowFunction, output: Arc<Field>) -> Result<WindowCall> {
        let params = &window.params;
        let name = match &window.fun {
            WindowFunctionDefinition::AggregateUDF(function) => function.name().to_owned(),
            WindowFunctionDefinition::WindowUDF(function) => function.name().to_owned(),
        };
        let function = match name.as_str() {
            "count" => Function::Count,
            "sum" => Function::Sum,
            "avg" => Function::Avg,
            "min" => Function::Min,
            "max" => Function::Max,
            "row_number" => Function::RowNumber,
            _ => {
                let hint = "OVER windows know count, sum, avg, min, max and row_number so far.";
                return Err(self.refuse(format!("{name}() OVER cannot run as a stream yet"), &name, hint));
            }
        };
        if params.distinct || params.null_treatment.is_some() {
            let hint = "Leave DISTINCT and IGNORE NULLS out.";
            return Err(self.refuse(
                format!("{name}() OVER with DISTINCT or IGNORE NULLS cannot run as a stream yet"),
                &name,
                hint,
            ));
        }
        self.order(window)?;
        let frame = match function {
            Function::RowNumber => Frame::Unbounded,
            _ => self.frame(window)?,
        };
        let argument = match &params.args[..] {
            [] if function == Function::RowNumber => None,
            [Expr::Literal(value, _)] if function == Function::Count && !value.is_null() => None,
            [argument] => Some(self.column(argument)?),
            _ => {
                return Err(self.refuse(
                    format!("{name}() OVER takes one argument"),
                    &name,
                    "Give one argument.",
                ));
            }
        };
        let filter = params.filter.as_deref().map(|filter| self.column(filter)).transpose()?;
        let argument_type = argument.map(|column| self.data_type(column));
        let Some(result) = Function::output_type(function, argument_type.as_ref()) else {
            let of = argument_type.map(|t| t.to_string()).unwrap_or_default();
            let hint = "Cast the argument to DOUBLE or BIGINT.";
            return Err(self.refuse(format!("{name}({of}) OVER cannot run as a stream yet"), &name, hint));
        };
        let output = Arc::new(Field::new(
            output.name(),
            result,
            !matches!(function, Function::Count | Function::RowNumber),
        ));
        Ok(WindowCall { function, argument, filter, frame, output })
    }

    /// ORDER BY must be the event time of the source, ascending.
    fn order(&mut self, window: &WindowFunction) -> Result<()> {
        let hint = "Order by the event time column of the source, ascending: its watermark tells when a row is final.";
        let [sort] = &window.params.order_by[..] else {
            return Err(self.refuse(
                "a window must be ordered by exactly the event time".into(),
                "OVER",
                hint,
            ));
        };
        let column = match &sort.expr {
            Expr::Column(column) => Some(self.index_of(column)?),
            _ => None,
        };
        if self.input.time.is_none() {
            let hint =
                "Declare WATERMARK FOR event_time AS event_time - INTERVAL '…' in the source, and select it.";
            let what = "a window needs the event time of a source with a watermark";
            return Err(self.refuse(what.into(), "ORDER", hint));
        }
        if column != self.input.time || !sort.asc {
            return Err(self.refuse(
                format!("a window is ordered by {sort}, not by the event time"),
                "ORDER",
                hint,
            ));
        }
        Ok(())
    }

    fn frame(&self, window: &WindowFunction) -> Result<Frame> {
        let frame = &window.params.window_frame;
        let hint = "Use RANGE BETWEEN UNBOUNDED PRECEDING or INTERVAL '…' PRECEDING AND CURRENT ROW.";
        if frame.units != WindowFrameUnits::Range || frame.end_bound != WindowFrameBound::CurrentRow {
            return Err(self.refuse(
                format!("the frame {frame} cannot run as a stream yet"),
                &frame.units.to_string(),
                hint,
            ));
        }
        match &frame.start_bound {
            WindowFrameBound::Preceding(value) if value.is_null() => Ok(Frame::Unbounded),
            WindowFrameBound::CurrentRow => Ok(Frame::Preceding { micros: 0 }),
            WindowFrameBound::Preceding(value) => match interval_micros(value) {
                Some(micros) => Ok(Frame::Preceding { micros }),
                None => Err(self.refuse(
                    "a frame of months or years has no fixed length".into(),
                    "RANGE",
                    "Use weeks, days, hours, minutes or seconds: months differ in length.",
                )),
            },
            WindowFrameBound::Following(_) => {
                Err(self.refuse("a frame that starts after its row is empty".into(), "RANGE", hint))
            }
        }
    }
}

fn over_port(emission: Emission) -> Port {
    match emission {
        Emission::Final => Port::Final,
        Emission::Latest => Port::Latest,
        Emission::Changes => Port::Changes,
    }
}

pub(super) fn contains_window(plan: &LogicalPlan) -> bool {
    matches!(plan, LogicalPlan::Window(_)) || plan.inputs().into_iter().any(contains_window)
}

fn window_function<'e>(expr: &'e Expr, view: &str, place: &Place) -> Result<&'e WindowFunction> {
    match expr {
        Expr::WindowFunction(function) => Ok(function),
        Expr::Alias(alias) => window_function(&alias.expr, view, place),
        other => Err(Error::user(format!("{view}: {other} is not a window function")).at(place.clone())),
    }
}

pub(super) fn interval_micros(value: &ScalarValue) -> Option<i64> {
    let (months, days, nanos) = match value {
        ScalarValue::IntervalMonthDayNano(Some(v)) => (v.months, i64::from(v.days), v.nanoseconds),
        ScalarValue::IntervalDayTime(Some(v)) => {
            (0, i64::from(v.days), i64::from(v.milliseconds) * 1_000_000)
        }
        ScalarValue::DurationMicrosecond(Some(v)) => (0, 0, v.checked_mul(1_000)?),
        ScalarValue::DurationNanosecond(Some(v)) => (0, 0, *v),
        _ => return None,
    };
    if months != 0 || nanos % 1_000 != 0 {
        return None;
    }
    days.checked_mul(86_400_000_000)?.checked_add(nanos / 1_000).filter(|micros| *micros >= 0)
}
