//! Aggregates that can take values in any order, and sums that can give them back.
//!
//! A value is read as [`Value`]: integers, dates, timestamps and decimals as `i128`, floats as `f64`. Integer sums
//! wrap at 64 bits like DataFusion's. Float sums are exact, as in batch ([`millstream_udfs::sum`]).

use std::cmp::Ordering;

use millstream_udfs::exact::ExactSum;

/// One argument value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    Integer(i128),
    Float(f64),
}

impl Value {
    /// DataFusion's order: NaN is greater than every number.
    pub fn order(self, other: Self) -> Ordering {
        match (self, other) {
            (Self::Integer(a), Self::Integer(b)) => a.cmp(&b),
            (Self::Float(a), Self::Float(b)) => {
                a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
            }
            (Self::Integer(_), Self::Float(_)) => Ordering::Less,
            (Self::Float(_), Self::Integer(_)) => Ordering::Greater,
        }
    }
}

/// Count and sum of the non-null values in a frame: of integers, or of floats.
#[derive(Debug, Clone, Default)]
pub struct Sum {
    pub count: i64,
    pub integer: i128,
    pub float: ExactSum,
}

impl Sum {
    pub fn add(&mut self, value: Value) {
        self.change(value, 1);
    }

    /// Takes back a value that was added.
    pub fn remove(&mut self, value: Value) {
        self.change(value, -1);
    }

    fn change(&mut self, value: Value, times: i64) {
        self.count += times;
        match value {
            Value::Integer(v) => self.integer += v * i128::from(times),
            Value::Float(v) => self.float.add_times(v, times),
        }
    }
}

/// The smallest and the largest value so far: cannot take values back.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Extremes {
    pub least: Option<Value>,
    pub greatest: Option<Value>,
}

impl Extremes {
    pub fn add(&mut self, value: Value) {
        if self.least.is_none_or(|least| value.order(least) == Ordering::Less) {
            self.least = Some(value);
        }
        if self.greatest.is_none_or(|greatest| value.order(greatest) == Ordering::Greater) {
            self.greatest = Some(value);
        }
    }
}
