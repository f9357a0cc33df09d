//! `hop_starts(t, slide, size)`: the starts of the sliding windows that hold `t`, ascending.
//!
//! A window starts at each multiple of `slide` since 1970-01-01 UTC and holds the points from its start on, up to but
//! without its start + `size`. `slide` need not divide `size`; the list is empty where `t` lies between windows (a slide
//! longer than the size). NULL gives NULL. `t` is a `TIMESTAMP` of any unit, the list has it in microseconds; `slide` and
//! `size` are positive intervals of fixed length, the same for all rows. `HOP` in a FROM is an `unnest` of it.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, ListArray, TimestampMicrosecondArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, IntervalUnit, TimeUnit, TimestampMicrosecondType};
use datafusion::common::{exec_datafusion_err, exec_err, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::{
    ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use datafusion::scalar::ScalarValue;

/// The functions of this module.
#[must_use]
pub fn all() -> Vec<Arc<ScalarUDF>> {
    vec![Arc::new(ScalarUDF::new_from_impl(HopStarts::new()))]
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct HopStarts {
    signature: Signature,
}

impl HopStarts {
    fn new() -> Self {
        Self { signature: Signature::user_defined(Volatility::Immutable) }
    }
}

impl ScalarUDFImpl for HopStarts {
    fn name(&self) -> &str {
        "hop_starts"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> Result<Vec<DataType>> {
        let [DataType::Timestamp(_, zone), _, _] = types else {
            return plan_err!("hop_starts takes a TIMESTAMP, a slide and a size, not {types:?}");
        };
        let interval = DataType::Interval(IntervalUnit::MonthDayNano);
        Ok(vec![DataType::Timestamp(TimeUnit::Microsecond, zone.clone()), interval.clone(), interval])
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        Ok(DataType::List(Arc::new(Field::new_list_field(types[0].clone(), true))))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let rows = args.number_rows;
        let [times, slide, size] = &args.args[..] else {
            return plan_err!("hop_starts takes a TIMESTAMP, a slide and a size");
        };
        let (slide, size) = (length(slide, "slide")?, length(size, "size")?);
        let times = times.to_array(rows)?;
        starts(&times, slide, size).map(|list| ColumnarValue::Array(Arc::new(list)))
    }
}

/// The µs of an interval that is the same for all rows.
fn length(of: &ColumnarValue, what: &str) -> Result<i64> {
    let ColumnarValue::Scalar(ScalarValue::IntervalMonthDayNano(Some(interval))) = of else {
        return exec_err!("the {what} of hop_starts must be a literal interval");
    };
    let days = i64::from(interval.days).checked_mul(86_400_000_000);
    let micros = days.and_then(|days| days.checked_add(interval.nanoseconds / 1_000));
    match micros {
        Some(micros) if interval.months == 0 && micros > 0 && interval.nanoseconds % 1_000 == 0 => Ok(micros),
        _ => {
            exec_err!("the {what} of hop_starts must be a positive interval of fixed length in microseconds")
        }
    }
}

fn starts(times: &ArrayRef, slide: i64, size: i64) -> Result<ListArray> {
    let times = times.as_primitive::<TimestampMicrosecondType>();
    let mut values: Vec<i64> = Vec::with_capacity(times.len());
    let mut lengths = Vec::with_capacity(times.len());
    let overflow = || exec_datafusion_err!("timestamp out of range in hop_starts");
    for row in 0..times.len() {
        let before = values.len();
        if times.is_valid(row) {
            let time = times.value(row);
            let last = time.div_euclid(slide).checked_mul(slide).ok_or_else(overflow)?;
            let outside = time.checked_sub(size).ok_or_else(overflow)?;
            let first = outside.div_euclid(slide) + 1;
            let mut start = first.checked_mul(slide).ok_or_else(overflow)?;
            while start <= last {
                values.push(start);
                start = start.checked_add(slide).ok_or_else(overflow)?;
            }
        }
        lengths.push(values.len() - before);
    }
    let values = TimestampMicrosecondArray::from(values).with_data_type(times.data_type().clone());
    let field = Arc::new(Field::new_list_field(times.data_type().clone(), true));
    Ok(ListArray::try_new(
        field,
        OffsetBuffer::from_lengths(lengths),
        Arc::new(values),
        times.nulls().cloned(),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, word for word.
    fn expected(time: i64, slide: i64, size: i64) -> Vec<i64> {
        (-200..200).map(|n| n * slide).filter(|s| *s <= time && time < s + size).collect()
    }

    #[test]
    fn every_window_that_holds_the_point() {
        for (slide, size) in [(1, 1), (2, 5), (5, 5), (7, 3), (3, 9)] {
            let points: Vec<i64> = (-20..20).collect();
            let times: ArrayRef = Arc::new(TimestampMicrosecondArray::from(points.clone()));
            let lists = starts(&times, slide, size).unwrap();
            for (row, point) in points.iter().enumerate() {
                let list = lists.value(row);
                let found = list.as_primitive::<TimestampMicrosecondType>().values().to_vec();
                assert_eq!(found, expected(*point, slide, size), "{point} slide {slide} size {size}");
            }
        }
    }

    #[test]
    fn nulls_and_the_ends_of_time() {
        let times: ArrayRef = Arc::new(TimestampMicrosecondArray::from(vec![None, Some(0)]));
        let lists = starts(&times, 10, 10).unwrap();
        assert!(lists.is_null(0) && lists.value(1).len() == 1);
        let end: ArrayRef = Arc::new(TimestampMicrosecondArray::from(vec![i64::MIN]));
        assert!(starts(&end, 10, 10).unwrap_err().to_string().contains("out of range"));
    }
}
