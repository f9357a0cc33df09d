//! Aggregates over the frames of sorted rows: what enters a frame is added, what leaves it is taken back.
//!
//! Integers and decimals wrap, doubles are added exactly, so nothing is left of a value that was taken back. A frame that
//! shares no row with the one before begins anew. Minima and maxima keep those values that can still become one.

use std::collections::VecDeque;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, ArrowNativeTypeOp, ArrowPrimitiveType, AsArray, PrimitiveArray, PrimitiveBuilder,
    downcast_primitive,
};
use arrow::buffer::NullBuffer;
use arrow::datatypes::{DataType, Decimal128Type, Float64Type, Int64Type, UInt64Type};
use datafusion::common::{Result, ScalarValue, internal_datafusion_err};
use datafusion::logical_expr::Accumulator;
use datafusion::physical_expr::aggregate::AggregateFunctionExpr;
use datafusion::physical_expr::expressions::Literal;
use millstream_udfs::exact::ExactSum;

use super::range::Group;
use super::spec::Call;

/// One call over one sorted stream.
pub trait Kernel: Send {
    /// Takes the arguments of the next rows.
    fn extend(&mut self, args: &[ArrayRef], rows: usize) -> Result<()>;

    /// The results of all rows of the next groups, of which there are `rows`; the frame of a group is from its start, one
    /// each, to its own end.
    fn answer(&mut self, groups: &[Group], starts: &[usize], rows: usize) -> Result<ArrayRef>;

    /// Rows before this one are not asked for any more.
    fn forget(&mut self, before: usize);

    /// Bytes held.
    fn size(&self) -> usize;
}

/// The kernel of a call: ours, if its types are known, else the function's own accumulator.
///
/// # Errors
/// The function cannot take rows back, although frames slide.
pub fn kernel(call: &Call, unbounded: bool) -> Result<Box<dyn Kernel>> {
    let name = call.aggregate.fun().name();
    let output = call.output.clone();
    if name == "count" && output == DataType::Int64 {
        let all = call
            .args
            .iter()
            .all(|arg| arg.downcast_ref::<Literal>().is_some_and(|literal| !literal.value().is_null()));
        return Ok(match all {
            true => Box::new(Length),
            false => Box::new(Sliding::new(Count, output)),
        });
    }
    Ok(match (name, &call.types[..], &output) {
        ("sum", [DataType::Int64], DataType::Int64) => {
            Box::new(Sliding::new(Wrapping::<Int64Type>::default(), output))
        }
        ("sum", [DataType::UInt64], DataType::UInt64) => {
            Box::new(Sliding::new(Wrapping::<UInt64Type>::default(), output))
        }
        ("sum", [DataType::Decimal128(..)], DataType::Decimal128(..)) => {
            Box::new(Sliding::new(Wrapping::<Decimal128Type>::default(), output))
        }
        ("sum", [DataType::Float64], DataType::Float64) => {
            Box::new(Sliding::new(Exact { sum: ExactSum::default(), average: false }, output))
        }
        ("avg", [DataType::Float64], DataType::Float64) => {
            Box::new(Sliding::new(Exact { sum: ExactSum::default(), average: true }, output))
        }
        ("min" | "max", [of], _) if *of == output => match extreme(output, name == "min", unbounded) {
            Some(kernel) => kernel,
            None => Box::new(Own::new(call, unbounded)?),
        },
        _ => Box::new(Own::new(call, unbounded)?),
    })
}

fn extreme(kind: DataType, least: bool, unbounded: bool) -> Option<Box<dyn Kernel>> {
    macro_rules! of {
        ($t:ty) => {
            Some(Box::new(Extreme::<$t>::new(kind.clone(), least, unbounded)))
        };
    }
    if matches!(kind, DataType::Interval(_)) {
        return None;
    }
    downcast_primitive! { kind => (of), _ => None }
}

/// Values of consecutive rows, from some row on.
#[derive(Debug)]
pub struct Values<T> {
    first: usize,
    values: Vec<T>,
    /// Empty as long as there is no NULL.
    valid: Vec<bool>,
}

impl<T> Default for Values<T> {
    fn default() -> Self {
        Self { first: 0, values: Vec::new(), valid: Vec::new() }
    }
}

impl<T: Copy> Values<T> {
    pub fn put(&mut self, values: &[T], nulls: Option<&NullBuffer>) {
        let nulls = nulls.filter(|nulls| nulls.null_count() > 0);
        if nulls.is_some() {
            self.valid.resize(self.values.len(), true);
        }
        match nulls {
            Some(nulls) => self.valid.extend(nulls.iter()),
            None if self.valid.is_empty() => {}
            None => self.valid.resize(self.values.len() + values.len(), true),
        }
        self.values.extend_from_slice(values);
    }

    #[inline]
    pub fn get(&self, row: usize) -> T {
        self.values[row - self.first]
    }

    /// The values of some rows that are not NULL.
    #[inline]
    fn each(&self, from: usize, to: usize, mut f: impl FnMut(usize, T)) {
        // An empty range may lie before what is held.
        if from == to {
            return;
        }
        let (first, end) = (from - self.first, to - self.first);
        if self.valid.is_empty() {
            self.values[first..end].iter().zip(from..).for_each(|(value, row)| f(row, *value));
            return;
        }
        let rows = self.values[first..end].iter().zip(&self.valid[first..end]).zip(from..);
        rows.filter(|((_, valid), _)| **valid).for_each(|((value, _), row)| f(row, *value));
    }

    /// Lets go of rows before this one, once it pays to move the others.
    pub fn forget(&mut self, before: usize) {
        let gone = before.saturating_sub(self.first).min(self.values.len());
        if gone * 2 < self.values.len() {
            return;
        }
        self.first += gone;
        self.values.drain(..gone);
        if !self.valid.is_empty() {
            self.valid.drain(..gone);
            if self.valid.iter().all(|valid| *valid) {
                self.valid.clear();
            }
        }
    }

    pub fn size(&self) -> usize {
        self.values.capacity() * size_of::<T>() + self.valid.capacity()
    }
}

/// `count` of literals: all rows of the frame.
struct Length;

impl Kernel for Length {
    fn extend(&mut self, _: &[ArrayRef], _: usize) -> Result<()> {
        Ok(())
    }

    fn answer(&mut self, groups: &[Group], starts: &[usize], rows: usize) -> Result<ArrayRef> {
        let mut counts = Vec::with_capacity(rows);
        for (group, start) in groups.iter().zip(starts) {
            counts.resize(counts.len() + group.end - group.first, (group.end - start) as i64);
        }
        Ok(Arc::new(PrimitiveArray::<Int64Type>::from(counts)))
    }

    fn forget(&mut self, _: usize) {}

    fn size(&self) -> usize {
        0
    }
}

/// What is added up.
trait Total: Send {
    type Item: Copy + Send;
    type Output: ArrowPrimitiveType;

    fn read(values: &mut Values<Self::Item>, args: &[ArrayRef], rows: usize) -> Result<()>;
    fn reset(&mut self);
    fn add(&mut self, value: Self::Item);
    fn remove(&mut self, value: Self::Item);
    /// The result over so many values that are not NULL.
    fn result(&self, count: i64) -> Option<<Self::Output as ArrowPrimitiveType>::Native>;
}

/// A total over the rows from `start` to `end`.
struct Sliding<T: Total> {
    total: T,
    count: i64,
    start: usize,
    values: Values<T::Item>,
    output: DataType,
}

impl<T: Total> Sliding<T> {
    fn new(total: T, output: DataType) -> Self {
        Self { total, count: 0, start: 0, values: Values::default(), output }
    }
}

impl<T: Total> Kernel for Sliding<T> {
    fn extend(&mut self, args: &[ArrayRef], rows: usize) -> Result<()> {
        T::read(&mut self.values, args, rows)
    }

    fn answer(&mut self, groups: &[Group], starts: &[usize], rows: usize) -> Result<ArrayRef> {
        let mut results =
            PrimitiveBuilder::<T::Output>::with_capacity(rows).with_data_type(self.output.clone());
        let (total, count) = (&mut self.total, &mut self.count);
        for (group, start) in groups.iter().zip(starts) {
            if group.fresh || *start == group.first {
                total.reset();
                *count = 0;
            } else {
                self.values.each(self.start, *start, |_, value| {
                    total.remove(value);
                    *count -= 1;
                });
            }
            self.start = *start;
            self.values.each(group.first, group.end, |_, value| {
                total.add(value);
                *count += 1;
            });
            match total.result(*count) {
                Some(result) if group.end - group.first == 1 => results.append_value(result),
                Some(result) => results.append_value_n(result, group.end - group.first),
                None => results.append_nulls(group.end - group.first),
            }
        }
        Ok(Arc::new(results.finish()))
    }

    fn forget(&mut self, before: usize) {
        self.values.forget(before);
    }

    fn size(&self) -> usize {
        self.values.size()
    }
}

fn primitive<T: ArrowPrimitiveType>(args: &[ArrayRef]) -> Result<&PrimitiveArray<T>> {
    let array = args.first().and_then(|array| array.as_primitive_opt::<T>());
    array.ok_or_else(|| {
        internal_datafusion_err!("a window's argument has another type than it was planned with")
    })
}

/// `count` of rows where no argument is NULL.
struct Count;

impl Total for Count {
    type Item = ();
    type Output = Int64Type;

    fn read(values: &mut Values<()>, args: &[ArrayRef], rows: usize) -> Result<()> {
        let nulls = args.iter().fold(None, |nulls: Option<NullBuffer>, array| {
            NullBuffer::union(nulls.as_ref(), array.logical_nulls().as_ref())
        });
        values.put(&vec![(); rows], nulls.as_ref());
        Ok(())
    }

    fn reset(&mut self) {}

    fn add(&mut self, (): ()) {}

    fn remove(&mut self, (): ()) {}

    fn result(&self, count: i64) -> Option<i64> {
        Some(count)
    }
}

/// `sum` of integers and decimals.
struct Wrapping<T: ArrowPrimitiveType>(T::Native);

impl<T: ArrowPrimitiveType> Default for Wrapping<T> {
    fn default() -> Self {
        Self(T::Native::default())
    }
}

impl<T: ArrowPrimitiveType<Native: ArrowNativeTypeOp>> Total for Wrapping<T> {
    type Item = T::Native;
    type Output = T;

    fn read(values: &mut Values<T::Native>, args: &[ArrayRef], _: usize) -> Result<()> {
        let array = primitive::<T>(args)?;
        values.put(array.values(), array.nulls());
        Ok(())
    }

    fn reset(&mut self) {
        self.0 = T::Native::default();
    }

    #[inline]
    fn add(&mut self, value: T::Native) {
        self.0 = self.0.add_wrapping(value);
    }

    #[inline]
    fn remove(&mut self, value: T::Native) {
        self.0 = self.0.sub_wrapping(value);
    }

    fn result(&self, count: i64) -> Option<T::Native> {
        (count != 0).then_some(self.0)
    }
}

/// `sum` and `avg` of doubles.
struct Exact {
    sum: ExactSum,
    average: bool,
}

impl Total for Exact {
    type Item = f64;
    type Output = Float64Type;

    fn read(values: &mut Values<f64>, args: &[ArrayRef], _: usize) -> Result<()> {
        let array = primitive::<Float64Type>(args)?;
        values.put(array.values(), array.nulls());
        Ok(())
    }

    fn reset(&mut self) {
        self.sum = ExactSum::default();
    }

    #[inline]
    fn add(&mut self, value: f64) {
        self.sum.add(value);
    }

    #[inline]
    fn remove(&mut self, value: f64) {
        self.sum.remove(value);
    }

    #[inline]
    fn result(&self, count: i64) -> Option<f64> {
        (count != 0).then(|| match self.average {
            false => self.sum.value(),
            true => self.sum.value() / count as f64,
        })
    }
}

/// `min` and `max`, of doubles in their total order.
struct Extreme<T: ArrowPrimitiveType> {
    least: bool,
    /// Frames lose no row: the first candidate is enough.
    unbounded: bool,
    /// (row, value): each is the result of a frame that begins behind the one before.
    candidates: VecDeque<(usize, T::Native)>,
    values: Values<T::Native>,
    output: DataType,
}

impl<T: ArrowPrimitiveType> Extreme<T> {
    fn new(output: DataType, least: bool, unbounded: bool) -> Self {
        Self { least, unbounded, candidates: VecDeque::new(), values: Values::default(), output }
    }
}

impl<T: ArrowPrimitiveType<Native: ArrowNativeTypeOp>> Kernel for Extreme<T> {
    fn extend(&mut self, args: &[ArrayRef], _: usize) -> Result<()> {
        let array = primitive::<T>(args)?;
        self.values.put(array.values(), array.nulls());
        Ok(())
    }

    fn answer(&mut self, groups: &[Group], starts: &[usize], rows: usize) -> Result<ArrayRef> {
        let mut results = PrimitiveBuilder::<T>::with_capacity(rows).with_data_type(self.output.clone());
        let (candidates, least, unbounded) = (&mut self.candidates, self.least, self.unbounded);
        for (group, start) in groups.iter().zip(starts) {
            if group.fresh {
                candidates.clear();
            }
            while candidates.front().is_some_and(|(row, _)| row < start) && !unbounded {
                candidates.pop_front();
            }
            self.values.each(group.first, group.end, |row, value| {
                let beaten = |old: T::Native| if least { !old.is_lt(value) } else { !old.is_gt(value) };
                while candidates.back().is_some_and(|(_, old)| beaten(*old)) {
                    candidates.pop_back();
                }
                if candidates.is_empty() || !unbounded {
                    candidates.push_back((row, value));
                }
            });
            match candidates.front() {
                Some((_, value)) => results.append_value_n(*value, group.end - group.first),
                None => results.append_nulls(group.end - group.first),
            }
        }
        Ok(Arc::new(results.finish()))
    }

    fn forget(&mut self, before: usize) {
        self.values.forget(before);
    }

    fn size(&self) -> usize {
        self.values.size() + self.candidates.capacity() * size_of::<(usize, T::Native)>()
    }
}

/// The function's own accumulator, one per partition.
struct Own {
    aggregate: AggregateFunctionExpr,
    unbounded: bool,
    accumulator: Box<dyn Accumulator>,
    start: usize,
    /// Arguments of consecutive rows, with the number of their first row.
    pieces: VecDeque<(usize, Vec<ArrayRef>, usize)>,
    rows: usize,
    output: DataType,
}

impl Own {
    fn new(call: &Call, unbounded: bool) -> Result<Self> {
        let (aggregate, output) = (call.aggregate.clone(), call.output.clone());
        let accumulator = accumulator(&aggregate, unbounded)?;
        Ok(Self { aggregate, unbounded, accumulator, start: 0, pieces: VecDeque::new(), rows: 0, output })
    }

    /// The arguments of some rows, in as many pieces as they came in.
    fn pieces(&self, from: usize, to: usize) -> impl Iterator<Item = Vec<ArrayRef>> {
        self.pieces.iter().filter_map(move |(first, args, rows)| {
            let (start, end) = (from.max(*first), to.min(first + rows));
            (start < end).then(|| args.iter().map(|arg| arg.slice(start - first, end - start)).collect())
        })
    }
}

fn accumulator(aggregate: &AggregateFunctionExpr, unbounded: bool) -> Result<Box<dyn Accumulator>> {
    match unbounded {
        true => aggregate.create_accumulator(),
        false => aggregate.create_sliding_accumulator(),
    }
}

impl Kernel for Own {
    fn extend(&mut self, args: &[ArrayRef], rows: usize) -> Result<()> {
        self.pieces.push_back((self.rows, args.to_vec(), rows));
        self.rows += rows;
        Ok(())
    }

    fn answer(&mut self, groups: &[Group], starts: &[usize], rows: usize) -> Result<ArrayRef> {
        let mut results: Vec<ScalarValue> = Vec::with_capacity(rows);
        for (group, start) in groups.iter().zip(starts) {
            if group.fresh {
                self.accumulator = accumulator(&self.aggregate, self.unbounded)?;
                self.start = *start;
            }
            let (left, came): (Vec<_>, Vec<_>) =
                (self.pieces(self.start, *start).collect(), self.pieces(group.first, group.end).collect());
            // In this order, as DataFusion has it: what is rounded on the way depends on it.
            for args in came {
                self.accumulator.update_batch(&args)?;
            }
            for args in left {
                self.accumulator.retract_batch(&args)?;
            }
            self.start = *start;
            let result = self.accumulator.evaluate()?;
            results.extend(std::iter::repeat_n(result, group.end - group.first));
        }
        let results = ScalarValue::iter_to_array(results)?;
        match *results.data_type() == self.output {
            true => Ok(results),
            false => Err(internal_datafusion_err!("{} gave another type", self.aggregate.name())),
        }
    }

    fn forget(&mut self, before: usize) {
        while self.pieces.front().is_some_and(|(first, _, rows)| first + rows <= before) {
            self.pieces.pop_front();
        }
    }

    fn size(&self) -> usize {
        let pieces = self.pieces.iter().flat_map(|(_, args, _)| args);
        pieces.map(|arg| arg.get_array_memory_size()).sum::<usize>() + self.accumulator.size()
    }
}
