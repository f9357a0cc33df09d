//! Which columns tell when a group of rows is complete.
//!
//! A column *closes* when each value v bounds the event time t of its row from above: t < v + bound. Then, at watermark
//! W, no row with v + bound ≤ W follows. The event time itself closes (bound 1 µs), and what `date_bin`, `date_trunc`,
//! `hop_starts` and adding an interval make of a column that closes. So a GROUP BY over TUMBLE, HOP or
//! `date_trunc('hour', event_time)` has final rows, and its state is freed.

use std::sync::Arc;

use arrow::datatypes::{DataType, TimeUnit};
use datafusion::common::ScalarValue;
use datafusion::logical_expr::Operator;
use datafusion::physical_expr::ScalarFunctionExpr;
use datafusion::physical_plan::PhysicalExpr;
use datafusion::physical_plan::expressions::{BinaryExpr, CastExpr, Literal};

use crate::plan::NodeId;
use crate::plan::lower::{Lowering, column_index};
use crate::plan::window::interval_micros;
use crate::stream::Micros;

const DAY: Micros = 86_400_000_000;

/// What is known of a column that closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closes {
    /// Columns of one row set with the same origin differ by the difference of their bounds.
    origin: usize,
    /// µs: event time < value + bound.
    pub bound: Micros,
    /// Values are multiples of this many µs.
    grain: Micros,
}

/// Knows equal expressions over the same node again.
#[derive(Default)]
pub struct Origins(Vec<(NodeId, Arc<dyn PhysicalExpr>)>);

impl Origins {
    pub fn of(&mut self, node: NodeId, expr: &Arc<dyn PhysicalExpr>) -> usize {
        let known = self.0.iter().position(|(other, known)| *other == node && known == expr);
        known.unwrap_or_else(|| {
            self.0.push((node, Arc::clone(expr)));
            self.0.len() - 1
        })
    }
}

impl Closes {
    /// The event time itself.
    pub fn time(origin: usize) -> Self {
        Self { origin, bound: 1, grain: 1 }
    }

    /// The starts of windows of this size that hold the column's values.
    fn windows(self, origin: usize, size: Micros, grain: Micros) -> Option<Self> {
        // Values of a grain that divides the size are at most v + size - grain.
        let step = if size % self.grain == 0 { self.grain } else { 1 };
        let bound = size.checked_sub(step)?.checked_add(self.bound)?;
        Some(Self { origin, bound, grain })
    }

    fn shifted(self, by: Micros) -> Option<Self> {
        Some(Self { bound: self.bound.checked_sub(by)?, grain: 1, ..self })
    }

    pub fn same_origin(&self, other: &Self) -> bool {
        self.origin == other.origin
    }

    /// What holds of a column that comes from several inputs.
    pub fn common(origin: usize, inputs: impl Iterator<Item = Option<Self>>) -> Option<Self> {
        let one = |a: Self, b: Self| Self {
            origin,
            bound: a.bound.max(b.bound),
            grain: if a.grain == b.grain { a.grain } else { 1 },
        };
        inputs
            .map(|input| input.map(|input| Self { origin, ..input }))
            .reduce(|a, b| Some(one(a?, b?)))
            .flatten()
    }

    /// The same column behind a group whose rows have the time of the column `time`; `None` where their distance is
    /// not known.
    pub fn behind(self, time: Self) -> Option<Self> {
        let bound = self.bound.checked_sub(time.bound)?.checked_add(1)?;
        (self.origin == time.origin).then_some(Self { bound, ..self })
    }
}

impl Lowering<'_> {
    /// What is known of an expression over the rows of `node`.
    pub(super) fn closes(
        &mut self,
        expr: &Arc<dyn PhysicalExpr>,
        node: NodeId,
        columns: &[Option<Closes>],
    ) -> Option<Closes> {
        if let Some(column) = column_index(expr) {
            return columns.get(column).copied().flatten();
        }
        let any: &dyn std::any::Any = expr.as_ref();
        // `date_bin` counts in nanoseconds: the same points in time.
        if let Some(cast) = any.downcast_ref::<CastExpr>() {
            return match cast.cast_type() {
                DataType::Timestamp(TimeUnit::Microsecond | TimeUnit::Nanosecond, _) => {
                    self.closes(cast.expr(), node, columns)
                }
                _ => None,
            };
        }
        if let Some(binary) = any.downcast_ref::<BinaryExpr>() {
            let by = literal(binary.right()).and_then(interval_micros)?;
            let inner = self.closes(binary.left(), node, columns)?;
            return match binary.op() {
                Operator::Plus => inner.shifted(by),
                Operator::Minus => inner.shifted(by.checked_neg()?),
                _ => None,
            };
        }
        let function = any.downcast_ref::<ScalarFunctionExpr>()?;
        let origin = self.origins.of(node, expr);
        match (function.name(), function.args()) {
            ("date_bin", [size, time, rest @ ..]) => {
                let size = literal(size).and_then(interval_micros).filter(|size| *size > 0)?;
                let grain = if rest.is_empty() { size } else { 1 };
                self.closes(time, node, columns)?.windows(origin, size, grain)
            }
            ("date_trunc", [unit, time]) => {
                let (size, grain) = unit_micros(literal(unit)?)?;
                self.closes(time, node, columns)?.windows(origin, size, grain)
            }
            // A column of lists, until it is unnested.
            ("hop_starts", [time, slide, size]) => {
                let slide = literal(slide).and_then(interval_micros).filter(|slide| *slide > 0)?;
                let size = literal(size).and_then(interval_micros).filter(|size| *size > 0)?;
                self.closes(time, node, columns)?.windows(origin, size, slide)
            }
            _ => None,
        }
    }
}

fn literal(expr: &Arc<dyn PhysicalExpr>) -> Option<&ScalarValue> {
    let any: &dyn std::any::Any = expr.as_ref();
    any.downcast_ref::<Literal>().map(Literal::value)
}

/// The longest a unit of `date_trunc` can last, and what its starts are multiples of.
fn unit_micros(unit: &ScalarValue) -> Option<(Micros, Micros)> {
    let unit = unit.try_as_str().flatten()?.to_ascii_lowercase();
    Some(match unit.as_str() {
        "microsecond" => (1, 1),
        "millisecond" => (1_000, 1_000),
        "second" => (1_000_000, 1_000_000),
        "minute" => (60_000_000, 60_000_000),
        "hour" => (3_600_000_000, 3_600_000_000),
        "day" => (DAY, DAY),
        "week" => (7 * DAY, DAY),
        "month" => (31 * DAY, DAY),
        "quarter" => (92 * DAY, DAY),
        "year" => (366 * DAY, DAY),
        _ => return None,
    })
}
