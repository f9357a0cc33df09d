//! `sum` and `avg` of doubles, exact: added without error and rounded once, so that the answer does not depend on the
//! order of rows, partitions, merges, or on what came and went before ([`crate::exact`]). `avg` is the rounded sum divided
//! by the count. Of every other type, and with DISTINCT, they are DataFusion's own, whose names and signatures they have.
//!
//! The partial state is one binary column: the count of values (8 bytes, little endian), then [`ExactSum::write`]; NULL for
//! a group without values. Its layout is frozen: state files hold it.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BinaryArray, BinaryBuilder, BooleanArray, Float64Array};
use arrow::datatypes::{DataType, Field, FieldRef, Float64Type, Int64Type};
use datafusion::common::{exec_datafusion_err, internal_datafusion_err, internal_err, not_impl_err};
use datafusion::error::Result;
use datafusion::functions_aggregate::average::avg_udaf;
use datafusion::functions_aggregate::sum::sum_udaf;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::utils::{AggregateOrderSensitivity, format_state_name};
use datafusion::logical_expr::{
    Accumulator, AggregateUDF, AggregateUDFImpl, EmitTo, GroupsAccumulator, ReversedUDAF, SetMonotonicity,
    Signature, Volatility,
};
use datafusion::scalar::ScalarValue;

use crate::exact::ExactSum;

/// The functions of this module.
#[must_use]
pub fn all() -> Vec<Arc<AggregateUDF>> {
    let exact = |plain, answer| Arc::new(AggregateUDF::new_from_impl(Exact { plain, answer }));
    vec![exact(sum_udaf(), Answer::Sum), exact(avg_udaf(), Answer::Average)]
}

/// `sum` of doubles by weights: `exact_sum(value, weight)` adds a value as often as its weight (a BIGINT) says, and takes it
/// back where that is negative. For streams; not registered, as it is no SQL of anybody's.
#[must_use]
pub fn by_weights() -> Arc<AggregateUDF> {
    Arc::new(AggregateUDF::new_from_impl(ByWeights { signature: Signature::any(2, Volatility::Immutable) }))
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct ByWeights {
    signature: Signature,
}

impl AggregateUDFImpl for ByWeights {
    fn name(&self) -> &str {
        "exact_sum"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        match types {
            [DataType::Float64, DataType::Int64] => Ok(DataType::Float64),
            _ => internal_err!("exact_sum() takes a double and a weight"),
        }
    }

    fn state_fields(&self, args: StateFieldsArgs) -> Result<Vec<FieldRef>> {
        Ok(vec![state_field(args.name)])
    }

    fn accumulator(&self, _: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        not_impl_err!("exact_sum() of a single group")
    }

    fn groups_accumulator_supported(&self, _: AccumulatorArgs) -> bool {
        true
    }

    fn create_groups_accumulator(&self, _: AccumulatorArgs) -> Result<Box<dyn GroupsAccumulator>> {
        Ok(Box::new(Groups { totals: Vec::new(), answer: Answer::Sum }))
    }
}

fn state_field(name: &str) -> FieldRef {
    Arc::new(Field::new(format_state_name(name, "exact sum"), DataType::Binary, true))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Answer {
    Sum,
    Average,
}

/// DataFusion's function, but for doubles.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Exact {
    plain: Arc<AggregateUDF>,
    answer: Answer,
}

impl AggregateUDFImpl for Exact {
    fn name(&self) -> &str {
        self.plain.name()
    }

    fn aliases(&self) -> &[String] {
        self.plain.aliases()
    }

    fn signature(&self) -> &Signature {
        self.plain.signature()
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        self.plain.return_type(types)
    }

    fn state_fields(&self, args: StateFieldsArgs) -> Result<Vec<FieldRef>> {
        let of_doubles = args.input_fields.iter().all(|field| *field.data_type() == DataType::Float64);
        if args.is_distinct || !of_doubles {
            return self.plain.state_fields(args);
        }
        Ok(vec![state_field(args.name)])
    }

    fn accumulator(&self, args: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        if plain(&args) {
            return self.plain.accumulator(args);
        }
        Ok(Box::new(One { total: Total::default(), answer: self.answer }))
    }

    fn create_sliding_accumulator(&self, args: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        if plain(&args) {
            return self.plain.create_sliding_accumulator(args);
        }
        self.accumulator(args)
    }

    fn groups_accumulator_supported(&self, args: AccumulatorArgs) -> bool {
        !plain(&args) || self.plain.groups_accumulator_supported(args)
    }

    fn create_groups_accumulator(&self, args: AccumulatorArgs) -> Result<Box<dyn GroupsAccumulator>> {
        if plain(&args) {
            return self.plain.create_groups_accumulator(args);
        }
        Ok(Box::new(Groups { totals: Vec::new(), answer: self.answer }))
    }

    fn reverse_expr(&self) -> ReversedUDAF {
        ReversedUDAF::Identical
    }

    fn order_sensitivity(&self) -> AggregateOrderSensitivity {
        AggregateOrderSensitivity::Insensitive
    }

    fn set_monotonicity(&self, of: &DataType) -> SetMonotonicity {
        self.plain.inner().set_monotonicity(of)
    }
}

/// Whether DataFusion's own accumulators do it.
fn plain(args: &AccumulatorArgs) -> bool {
    args.is_distinct || args.expr_fields.iter().any(|field| *field.data_type() != DataType::Float64)
}

/// The values of a group.
#[derive(Debug, Clone, Default)]
struct Total {
    count: i64,
    sum: ExactSum,
}

impl Total {
    fn change(&mut self, value: f64, times: i64) {
        self.count += times;
        self.sum.add_times(value, times);
    }

    /// Equal states of equal values: nothing is left of what was taken back.
    fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.sum.merge(&other.sum);
    }

    fn answer(&self, answer: Answer) -> Option<f64> {
        (self.count != 0).then(|| match answer {
            Answer::Sum => self.sum.value(),
            Answer::Average => self.sum.value() / self.count as f64,
        })
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let (count, sum) = bytes.split_first_chunk()?;
        Some(Self { count: i64::from_le_bytes(*count), sum: ExactSum::read(sum)? })
    }

    fn size(&self) -> usize {
        size_of::<Self>() + self.sum.size_outside()
    }
}

/// Partial states as a column.
fn written<'t>(totals: impl ExactSizeIterator<Item = &'t Total>) -> BinaryArray {
    let mut column = BinaryBuilder::with_capacity(totals.len(), totals.len() * 28);
    let mut bytes = Vec::new();
    for total in totals {
        if total.count == 0 {
            column.append_null();
            continue;
        }
        bytes.clear();
        bytes.extend(total.count.to_le_bytes());
        total.sum.write(&mut bytes);
        column.append_value(&bytes);
    }
    column.finish()
}

/// The partial states of a column, one after the other; `None` for NULL.
fn read(column: &ArrayRef) -> Result<impl Iterator<Item = Result<Option<Total>>>> {
    let states = column.as_binary_opt::<i32>();
    let states = states.ok_or_else(|| internal_datafusion_err!("an exact sum has a binary state"))?;
    let total = |bytes: Option<&[u8]>| match bytes {
        None => Ok(None),
        Some(bytes) => match Total::read(bytes) {
            Some(total) => Ok(Some(total)),
            None => Err(exec_datafusion_err!("the partial state of an exact sum is damaged")),
        },
    };
    Ok(states.iter().map(total))
}

fn doubles(values: &[ArrayRef]) -> Result<&Float64Array> {
    let doubles = values.first().and_then(|column| column.as_primitive_opt::<Float64Type>());
    doubles.ok_or_else(|| internal_datafusion_err!("an exact sum takes one column of doubles"))
}

fn state_of(states: &[ArrayRef]) -> Result<&ArrayRef> {
    states.first().ok_or_else(|| internal_datafusion_err!("an exact sum has a state of one column"))
}

#[derive(Debug)]
struct One {
    total: Total,
    answer: Answer,
}

impl Accumulator for One {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        doubles(values)?.iter().flatten().for_each(|value| self.total.change(value, 1));
        Ok(())
    }

    fn retract_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        doubles(values)?.iter().flatten().for_each(|value| self.total.change(value, -1));
        Ok(())
    }

    fn supports_retract_batch(&self) -> bool {
        true
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        Ok(ScalarValue::Float64(self.total.answer(self.answer)))
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        let column = written([&self.total].into_iter());
        Ok(vec![ScalarValue::Binary(column.is_valid(0).then(|| column.value(0).to_vec()))])
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        for total in read(state_of(states)?)? {
            self.total.merge(&total?.unwrap_or_default());
        }
        Ok(())
    }

    fn size(&self) -> usize {
        size_of::<Answer>() + self.total.size()
    }
}

struct Groups {
    totals: Vec<Total>,
    answer: Answer,
}

impl GroupsAccumulator for Groups {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        groups: &[usize],
        filter: Option<&BooleanArray>,
        total_groups: usize,
    ) -> Result<()> {
        self.totals.resize_with(total_groups, Total::default);
        let weights = values.get(1).and_then(|column| column.as_primitive_opt::<Int64Type>());
        let values = doubles(values)?;
        if let Some(weights) = weights {
            for ((value, weight), group) in values.iter().zip(weights.values()).zip(groups) {
                if let Some(value) = value.filter(|_| *weight != 0) {
                    self.totals[*group].change(value, *weight);
                }
            }
            return Ok(());
        }
        if values.null_count() == 0 && filter.is_none() {
            for (value, group) in values.values().iter().zip(groups) {
                self.totals[*group].change(*value, 1);
            }
            return Ok(());
        }
        let kept = |row: usize| filter.is_none_or(|filter| filter.is_valid(row) && filter.value(row));
        for (row, (value, group)) in values.iter().zip(groups).enumerate() {
            if let Some(value) = value.filter(|_| kept(row)) {
                self.totals[*group].change(value, 1);
            }
        }
        Ok(())
    }

    fn evaluate(&mut self, emit: EmitTo) -> Result<ArrayRef> {
        let totals = emit.take_needed(&mut self.totals);
        Ok(Arc::new(totals.iter().map(|total| total.answer(self.answer)).collect::<Float64Array>()))
    }

    fn state(&mut self, emit: EmitTo) -> Result<Vec<ArrayRef>> {
        Ok(vec![Arc::new(written(emit.take_needed(&mut self.totals).iter()))])
    }

    fn merge_batch(&mut self, states: &[ArrayRef], groups: &[usize], total_groups: usize) -> Result<()> {
        self.totals.resize_with(total_groups, Total::default);
        for (total, group) in read(state_of(states)?)?.zip(groups) {
            if let Some(total) = total? {
                self.totals[*group].merge(&total);
            }
        }
        Ok(())
    }

    fn convert_to_state(&self, values: &[ArrayRef], filter: Option<&BooleanArray>) -> Result<Vec<ArrayRef>> {
        let groups: Vec<usize> = (0..doubles(values)?.len()).collect();
        let mut single = Self { totals: Vec::new(), answer: self.answer };
        single.update_batch(values, &groups, filter, groups.len())?;
        single.state(EmitTo::All)
    }

    fn size(&self) -> usize {
        let outside: usize = self.totals.iter().map(|total| total.sum.size_outside()).sum();
        self.totals.capacity() * size_of::<Total>() + outside
    }
}

#[cfg(test)]
mod tests {
    use datafusion::prelude::{SessionConfig, SessionContext};

    /// Rows in many partitions and batches: (group, value).
    async fn answers(sql: &str, partitions: usize, batch: usize) -> Vec<String> {
        let config = SessionConfig::new().with_target_partitions(partitions).with_batch_size(batch);
        let mut session = SessionContext::new_with_config(config);
        crate::register_all(&mut session).unwrap();
        let rows = session
            .sql("SELECT value % 3 AS g, value AS t, CASE WHEN value % 7 = 0 THEN NULL ELSE (value * 7919 % 1009) / 100.0e0 END AS x FROM generate_series(1, 500)")
            .await
            .unwrap();
        session.register_table("rows", rows.into_view()).unwrap();
        let batches = session.sql(sql).await.unwrap().collect().await.unwrap();
        let text = arrow::util::pretty::pretty_format_batches(&batches).unwrap().to_string();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    }

    #[tokio::test]
    async fn cuts_and_merges_do_not_change_an_answer() {
        let queries = [
            "SELECT g, sum(x), avg(x), sum(x) FILTER (WHERE t > 250), count(*) FROM rows GROUP BY g",
            "SELECT sum(x), avg(x), sum(t), avg(t), mean(x) AS m, sum(x * 3) FROM rows",
            "SELECT sum(x) FROM rows WHERE x > 1e9",
            "SELECT g, t, sum(x) OVER (PARTITION BY g ORDER BY t ROWS BETWEEN 5 PRECEDING AND CURRENT ROW) FROM rows",
        ];
        for query in queries {
            let expected = answers(query, 1, 8_192).await;
            for (partitions, batch) in [(2, 100), (4, 7), (3, 1)] {
                assert_eq!(answers(query, partitions, batch).await, expected, "{query}");
            }
        }
    }

    #[tokio::test]
    async fn a_sliding_sum_is_the_sum_of_its_frame() {
        let sliding = "SELECT t, sum(x) OVER w AS s, avg(x) OVER w AS a FROM rows
                       WINDOW w AS (ORDER BY t ROWS BETWEEN 9 PRECEDING AND CURRENT ROW) ORDER BY t";
        let joined =
            "SELECT a.t, sum(b.x) AS s, avg(b.x) AS a FROM rows a JOIN rows b ON b.t BETWEEN a.t - 9 AND a.t
                      GROUP BY a.t ORDER BY a.t";
        assert_eq!(answers(sliding, 1, 8_192).await, answers(joined, 2, 64).await);
    }
}
