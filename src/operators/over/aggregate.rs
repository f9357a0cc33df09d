//! Aggregates that can take values in any order, and sums that can give them back.
//!
//! A value is read as [`Value`]: integers, dates, timestamps and decimals as `i128`, floats as `f64`. Integer sums
//! wrap at 64 bits like DataFusion's. Float sums keep the rounding error of every addition (Knuth's TwoSum), so that
//! taking values back leaves no drift; NaN and infinities are counted beside the sum and leave with their row.

use std::cmp::Ordering;

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

/// Count and sum of the non-null values in a frame.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sum {
    pub count: i64,
    pub integer: i128,
    pub high: f64,
    pub low: f64,
    pub nan: i64,
    pub positive_infinite: i64,
    pub negative_infinite: i64,
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
            Value::Float(v) if v.is_nan() => self.nan += times,
            Value::Float(f64::INFINITY) => self.positive_infinite += times,
            Value::Float(f64::NEG_INFINITY) => self.negative_infinite += times,
            Value::Float(v) => {
                let v = v * times as f64;
                let sum = self.high + v;
                let back = sum - self.high;
                self.low += (self.high - (sum - back)) + (v - back);
                self.high = sum;
                if self.count == 0 {
                    (self.high, self.low) = (0.0, 0.0);
                }
            }
        }
    }

    pub fn float(&self) -> f64 {
        if self.nan > 0 || self.positive_infinite > 0 && self.negative_infinite > 0 {
            f64::NAN
        } else if self.positive_infinite > 0 {
            f64::INFINITY
        } else if self.negative_infinite > 0 {
            f64::NEG_INFINITY
        } else {
            self.high + self.low
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_float_sum_gives_back_what_it_took() {
        let mut sum = Sum::default();
        let values: Vec<f64> = (0..1_000).map(|i| f64::from(i * 7919 % 1009) * 1e10 + 0.1).collect();
        sum.add(Value::Float(0.25));
        values.iter().for_each(|v| sum.add(Value::Float(*v)));
        values.iter().for_each(|v| sum.remove(Value::Float(*v)));
        assert!((sum.float() - 0.25).abs() < 1e-12, "{}", sum.float());
        sum.add(Value::Float(f64::NAN));
        sum.add(Value::Float(f64::INFINITY));
        assert!(sum.float().is_nan());
        sum.remove(Value::Float(f64::NAN));
        assert_eq!(sum.float(), f64::INFINITY);
        sum.remove(Value::Float(f64::INFINITY));
        assert!((sum.float() - 0.25).abs() < 1e-12);
    }
}
