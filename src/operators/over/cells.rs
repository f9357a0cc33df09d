//! What one call keeps per key and frame, and how its state is written.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, Decimal128Array, Float64Array, Int64Array, UInt64Array,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Decimal128Type, Field, Float64Type, Int64Type};

use millstream_udfs::exact::ExactSum;

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

    /// Reads some of it, so that the rest is near.
    #[inline]
    pub fn glance(&self) -> usize {
        match self {
            Self::Count(count) => *count as usize,
            Self::Sum(sum) => sum.count as usize ^ sum.integer as usize,
            Self::Extreme(extremes) => usize::from(extremes.least.is_some()),
            Self::Sorted(values) => values.len(),
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
                _ => sum.float.value() / sum.count as f64,
            })),
            (Self::Sum(sum), _) if call.output == DataType::Float64 => Some(Value::Float(sum.float.value())),
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

/// Columns that hold the state of an unbounded call: the count, the sum (or extreme) of integers, the extreme of floats,
/// the exact sum of floats.
const STATE: [&str; 4] = ["count", "integer", "extreme", "sum"];

/// Fields of the state of call `at`.
pub fn state_fields(at: usize) -> Vec<Field> {
    let types = |name: &str| match name {
        "integer" => DataType::Decimal128(38, 0),
        "extreme" => DataType::Float64,
        "sum" => DataType::Binary,
        _ => DataType::Int64,
    };
    STATE.iter().map(|name| Field::new(format!("c{at}_{name}"), types(name), true)).collect()
}

/// The state of a cell.
#[derive(Default)]
struct State {
    count: i64,
    integer: i128,
    extreme: f64,
    /// As [`ExactSum::write`] writes it.
    sum: Option<Vec<u8>>,
}

/// The state of some cells, column by column as in [`state_fields`].
///
/// # Errors
/// Internal: a sum that has no 38 digits.
pub fn write_states(call: &Call, cells: &[Cell]) -> Result<Vec<ArrayRef>> {
    let states: Vec<State> = cells.iter().map(|cell| cell.state(call)).collect();
    let wraps = !matches!(call.output, DataType::Decimal128(_, _));
    let integers = states.iter().map(|s| if wraps { i128::from(s.integer as i64) } else { s.integer });
    let integers = Decimal128Array::from_iter_values(integers).with_precision_and_scale(38, 0)?;
    Ok(vec![
        Arc::new(Int64Array::from_iter_values(states.iter().map(|s| s.count))),
        Arc::new(integers),
        Arc::new(Float64Array::from_iter_values(states.iter().map(|s| s.extreme))),
        Arc::new(states.iter().map(|s| s.sum.as_deref()).collect::<BinaryArray>()),
    ])
}

/// Reads one cell back; `None`: no state of ours.
pub fn read_state(call: &Call, columns: &[ArrayRef], row: usize) -> Option<Cell> {
    let count = columns[0].as_primitive::<Int64Type>().value(row);
    let integer = columns[1].as_primitive::<Decimal128Type>().value(row);
    let value = || match call.output {
        DataType::Float32 | DataType::Float64 => {
            Value::Float(columns[2].as_primitive::<Float64Type>().value(row))
        }
        _ => Value::Integer(integer),
    };
    let sums = columns[3].as_binary::<i32>();
    Some(match Cell::new(call) {
        Cell::Count(_) => Cell::Count(count),
        Cell::Sum(_) => {
            let float = match sums.is_valid(row) {
                true => ExactSum::read(sums.value(row))?,
                false => ExactSum::default(),
            };
            Cell::Sum(Sum { count, integer, float })
        }
        other if count == 0 => other,
        _ => Cell::Extreme(Extremes { least: Some(value()), greatest: Some(value()) }),
    })
}

impl Cell {
    fn state(&self, call: &Call) -> State {
        match self {
            Self::Count(count) => State { count: *count, ..State::default() },
            Self::Sum(sum) => {
                let mut bytes = Vec::new();
                sum.float.write(&mut bytes);
                State { count: sum.count, integer: sum.integer, extreme: 0.0, sum: Some(bytes) }
            }
            Self::Extreme(_) | Self::Sorted(_) => match self.result(call) {
                None => State::default(),
                Some(Value::Integer(integer)) => State { count: 1, integer, ..State::default() },
                Some(Value::Float(extreme)) => State { count: 1, extreme, ..State::default() },
            },
        }
    }
}
