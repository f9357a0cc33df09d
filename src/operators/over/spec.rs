//! What an OVER operator computes: calls over RANGE frames that end at the current row.

use super::super::group::Closing;
use arrow::datatypes::{DECIMAL128_MAX_PRECISION, DataType, FieldRef, SchemaRef};

/// One OVER operator: windows that share partition keys and are ordered by event time.
#[derive(Debug, Clone)]
pub struct OverSpec {
    pub input: SchemaRef,
    pub partition_by: Vec<usize>,
    pub calls: Vec<WindowCall>,
    /// The partition key that closes keys, by its place among them.
    pub closing: Option<Closing>,
    pub want_final: bool,
    pub want_latest: bool,
}

/// `function(argument) [FILTER (WHERE filter)] OVER (… frame)`.
#[derive(Debug, Clone, PartialEq)]
pub struct WindowCall {
    pub function: Function,
    /// Input column; `None` only for `count(*)` and `row_number()`.
    pub argument: Option<usize>,
    /// A Boolean input column; NULL counts as false.
    pub filter: Option<usize>,
    pub frame: Frame,
    pub output: FieldRef,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Function {
    Count,
    Sum,
    Avg,
    Min,
    Max,
    RowNumber,
}

/// Where a RANGE frame starts; it ends at the current row, peers of equal event time included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Frame {
    Unbounded,
    Preceding { micros: i64 },
}

impl OverSpec {
    /// Whether another operator keeps the same state and gives the same rows.
    pub fn same_state(&self, other: &Self) -> bool {
        self.input == other.input
            && self.partition_by == other.partition_by
            && self.calls == other.calls
            && self.closing == other.closing
    }
}

impl Function {
    /// The type of the result, as in DataFusion; `None` when the argument's type is not supported here.
    pub fn output_type(self, argument: Option<&DataType>) -> Option<DataType> {
        use DataType as T;
        match self {
            Self::Count => return Some(T::Int64),
            Self::RowNumber => return Some(T::UInt64),
            _ => {}
        }
        let of = argument?;
        let signed = matches!(of, T::Int8 | T::Int16 | T::Int32 | T::Int64);
        let unsigned = matches!(of, T::UInt8 | T::UInt16 | T::UInt32 | T::UInt64);
        let float = matches!(of, T::Float32 | T::Float64);
        match (self, of) {
            (Self::Sum, T::Decimal128(p, s)) => Some(T::Decimal128(DECIMAL128_MAX_PRECISION.min(p + 10), *s)),
            (Self::Sum, _) if signed => Some(T::Int64),
            (Self::Sum, _) if unsigned => Some(T::UInt64),
            (Self::Sum, _) if float => Some(T::Float64),
            (Self::Avg, _) if signed || unsigned || float => Some(T::Float64),
            (Self::Min | Self::Max, T::Date32 | T::Timestamp(_, _) | T::Decimal128(_, _)) => Some(of.clone()),
            (Self::Min | Self::Max, _) if signed || unsigned || float => Some(of.clone()),
            _ => None,
        }
    }
}
