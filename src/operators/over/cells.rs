//! What one call keeps per key and frame, and how its state is written.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Decimal128Array, Float64Array, Int64Array, UInt64Array};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Decimal128Type, Field, Float64Type, Int64Type};

use super::aggregate::{Extremes, Sum, Value};
use super::rows::{Chunks, Entry};
use super::spec::{Frame, Function, WindowCall};
use crate::error::Result;

/// A call with its argument and filter as indices into a chunk's arguments.
#[derive(Debug, Clone)]
pub struct Call {
    pub function: Function,
    pub argument: Option<usize>,
    pub filter: Option<usize>,
    pub frame: Frame,
    pub output: DataType,
}

/// A value with a total order, for sliding minima.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ordered(Value);

impl Eq for Ordered {}

impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ordered {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.order(other.0)
    }
}

/// The aggregate of a frame. Only `Extreme` cannot take rows back; it serves frames that never lose one.
#[derive(Debug, Clone)]
pub enum Cell {
    Count(i64),
    Sum(Sum),
    Extreme(Extremes),
    Sorted(BTreeMap<Ordered, u32>),
}

impl Cell {
    pub fn new(call: &Call) -> Self {
        match (call.function, call.frame) {
            (Function::Count | Function::RowNumber, _) => Self::Count(0),
            (Function::Sum | Function::Avg, _) => Self::Sum(Sum::default()),
            (Function::Min | Function::Max, Frame::Unbounded) => Self::Extreme(Extremes::default()),
            (Function::Min | Function::Max, Frame::Preceding { .. }) => Self::Sorted(BTreeMap::new()),
        }
    }

    pub fn add(&mut self, call: &Call, chunks: &Chunks, entry: &Entry) {
        let Some(value) = call.input(chunks, entry) else { return };
        match self {
            Self::Count(count) => *count += 1,
            Self::Sum(sum) => sum.add(value),
            Self::Extreme(extremes) => extremes.add(value),
            Self::Sorted(values) => *values.entry(Ordered(value)).or_insert(0) += 1,
        }
    }

    pub fn remove(&mut self, call: &Call, chunks: &Chunks, entry: &Entry) {
        let Some(value) = call.input(chunks, entry) else { return };
        match self {
            Self::Count(count) => *count -= 1,
            Self::Sum(sum) => sum.remove(value),
            Self::Extreme(_) => debug_assert!(false, "an unbounded frame loses no row"),
            Self::Sorted(values) => {
                if let Some(count) = values.get_mut(&Ordered(value)) {
                    *count -= 1;
                    if *count == 0 {
                        values.remove(&Ordered(value));
                    }
                }
            }
        }
    }

    /// The numbers of the last `rows` rows counted.
    pub fn numbers(&self, rows: usize) -> impl Iterator<Item = Option<Value>> {
        let last = match self {
            Self::Count(count) => i128::from(*count),
            _ => 0,
        };
        (0..rows as i128).rev().map(move |before| Some(Value::Integer(last - before)))
    }

    /// The call's result; `None` for NULL.
    pub fn result(&self, call: &Call) -> Option<Value> {
        match (self, call.function) {
            (Self::Count(count), _) => Some(Value::Integer(i128::from(*count))),
            (Self::Sum(sum), _) if sum.count == 0 => None,
            (Self::Sum(sum), Function::Avg) => Some(Value::Float(match call.output {
                DataType::Float64 if sum.integer != 0 => sum.integer as f64 / sum.count as f64,
                _ => sum.float() / sum.count as f64,
            })),
            (Self::Sum(sum), _) if call.output == DataType::Float64 => Some(Value::Float(sum.float())),
            (Self::Sum(sum), _) => Some(Value::Integer(sum.integer)),
            (Self::Extreme(extremes), Function::Min) => extremes.least,
            (Self::Extreme(extremes), _) => extremes.greatest,
            (Self::Sorted(values), Function::Min) => values.first_key_value().map(|(value, _)| value.0),
            (Self::Sorted(values), _) => values.last_key_value().map(|(value, _)| value.0),
        }
    }
}

impl Call {
    pub fn new(call: &WindowCall, argument: Option<usize>, filter: Option<usize>) -> Self {
        let output = call.output.data_type().clone();
        Self { function: call.function, argument, filter, frame: call.frame, output }
    }

    /// The value that a row brings, `None` when it is filtered out or NULL.
    fn input(&self, chunks: &Chunks, entry: &Entry) -> Option<Value> {
        if let Some(filter) = self.filter {
            chunks.value(entry, filter)?;
        }
        match self.argument {
            Some(argument) => chunks.value(entry, argument),
            None => Some(Value::Integer(1)),
        }
    }

    /// Results as a column of the call's type.
    ///
    /// # Errors
    /// Internal: a result does not fit its type.
    pub fn column(&self, results: &[Option<Value>]) -> Result<ArrayRef> {
        let integer = |value: &Option<Value>| match value {
            Some(Value::Integer(v)) => Some(*v),
            _ => None,
        };
        let float = |value: &Option<Value>| match value {
            Some(Value::Float(v)) => Some(*v),
            _ => None,
        };
        let long = || results.iter().map(|v| integer(v).map(|v| v as i64)).collect::<Int64Array>();
        Ok(match &self.output {
            DataType::Float64 => Arc::new(results.iter().map(float).collect::<Float64Array>()),
            DataType::Float32 => {
                cast(&(results.iter().map(float).collect::<Float64Array>()), &DataType::Float32)?
            }
            DataType::Int64 => Arc::new(long()),
            DataType::UInt64 => {
                Arc::new(results.iter().map(|v| integer(v).map(|v| v as u64)).collect::<UInt64Array>())
            }
            DataType::Decimal128(precision, scale) => {
                let values = results.iter().map(integer).collect::<Decimal128Array>();
                Arc::new(values.with_precision_and_scale(*precision, *scale)?)
            }
            DataType::Date32 => cast(&cast(&long(), &DataType::Int32)?, &DataType::Date32)?,
            other => cast(&long(), other)?,
        })
    }
}

/// Columns that hold the state of an unbounded call.
const STATE: [&str; 7] = ["count", "integer", "high", "low", "nan", "positive_infinite", "negative_infinite"];

/// Fields of the state of call `at`.
pub fn state_fields(at: usize) -> Vec<Field> {
    let types = |name: &str| match name {
        "integer" => DataType::Decimal128(38, 0),
        "high" | "low" => DataType::Float64,
        _ => DataType::Int64,
    };
    STATE.iter().map(|name| Field::new(format!("c{at}_{name}"), types(name), true)).collect()
}

/// The state of some cells, column by column as in [`state_fields`].
///
/// # Errors
/// Internal: a sum that has no 38 digits.
pub fn write_states(call: &Call, cells: &[&Cell]) -> Result<Vec<ArrayRef>> {
    let sums: Vec<Sum> = cells.iter().map(|cell| cell.as_sum(call)).collect();
    let long = |of: fn(&Sum) -> i64| Arc::new(Int64Array::from_iter_values(sums.iter().map(of))) as ArrayRef;
    let float =
        |of: fn(&Sum) -> f64| Arc::new(Float64Array::from_iter_values(sums.iter().map(of))) as ArrayRef;
    let wraps = !matches!(call.output, DataType::Decimal128(_, _));
    let integers = sums.iter().map(|s| if wraps { i128::from(s.integer as i64) } else { s.integer });
    let integers = Decimal128Array::from_iter_values(integers).with_precision_and_scale(38, 0)?;
    Ok(vec![
        long(|s| s.count),
        Arc::new(integers),
        float(|s| s.high),
        float(|s| s.low),
        long(|s| s.nan),
        long(|s| s.positive_infinite),
        long(|s| s.negative_infinite),
    ])
}

/// Reads one cell back.
pub fn read_state(call: &Call, columns: &[ArrayRef], row: usize) -> Cell {
    let long = |at: usize| columns[at].as_primitive::<Int64Type>().value(row);
    let float = |at: usize| columns[at].as_primitive::<Float64Type>().value(row);
    let sum = Sum {
        count: long(0),
        integer: columns[1].as_primitive::<Decimal128Type>().value(row),
        high: float(2),
        low: float(3),
        nan: long(4),
        positive_infinite: long(5),
        negative_infinite: long(6),
    };
    let value = || match call.output {
        DataType::Float32 | DataType::Float64 => Value::Float(sum.high),
        _ => Value::Integer(sum.integer),
    };
    match Cell::new(call) {
        Cell::Count(_) => Cell::Count(sum.count),
        Cell::Sum(_) => Cell::Sum(sum),
        other if sum.count == 0 => other,
        _ => Cell::Extreme(Extremes { least: Some(value()), greatest: Some(value()) }),
    }
}

impl Cell {
    fn as_sum(&self, call: &Call) -> Sum {
        match self {
            Self::Count(count) => Sum { count: *count, ..Sum::default() },
            Self::Sum(sum) => *sum,
            Self::Extreme(_) | Self::Sorted(_) => match self.result(call) {
                None => Sum::default(),
                Some(Value::Integer(integer)) => Sum { count: 1, integer, ..Sum::default() },
                Some(Value::Float(high)) => Sum { count: 1, high, ..Sum::default() },
            },
        }
    }
}
