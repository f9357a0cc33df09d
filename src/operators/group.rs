//! GROUP BY: one row per key, updated as rows arrive (DESIGN §3 *Emissions*). [`Panes`] closes groups of a window.
//!
//! # Meaning
//! After each batch the operator says what changed: for each key touched, the row that no longer holds (weight −1)
//! and the one that holds now (+1); nothing for a key whose row stayed the same. Accumulated, that is the batch answer
//! over all rows pushed, however they were cut: the emission `changes`. Rows never close here: `final` is the matter of [`Panes`].
//!
//! The emission `latest` is the row that holds now of *every* key touched, changed or not: an online store may still
//! show what an earlier run of the same input wrote in between, when it was cut otherwise. For the same reason a HAVING
//! above turns such a row into a deletion and never drops it.
//!
//! The order key of a row is the greatest (event time, place, offset) of the rows that made it, so it never falls; in a
//! window, its time is the window's.
//!
//! # Rows that come with weights
//! Above another GROUP BY rows are taken back. Then the last argument of every call is an integer or decimal that is never
//! NULL, and is taken times the weight; every call is a sum, of which one counts the rows ([`GroupSpec::total`]), or an
//! [`extent`]. The plan makes `count`, `sum` and `avg` of sums, `min`, `max` and `count(DISTINCT …)` of extents. A group
//! whose rows are all taken back is gone: deleted in `changes` and in `latest`.
//!
//! # State
//! Per key one row: key columns, results, the partial states of the aggregates, the order key. Any aggregate of
//! DataFusion works through its partial state (`notes/datafusion-55.md`, *Aggregates*): the batch is aggregated to
//! partial states, merged with those of the keys touched, and the merged states are evaluated. A batch costs as much as
//! its rows and the keys that it touches; other keys are not visited. Keys are kept for ever. Sums and averages are exact, of
//! floats too ([`millstream_udfs::sum`]); variances and sketches depend on the order of merges in the last digits.
//!
//! # Snapshots
//! [`Group::snapshot`] holds the state rows of the keys touched since the last one; restoring them in order gives the
//! same table. The layout of partial states is DataFusion's: its schema is stored with them, and another one is
//! refused at restore.

pub mod extent;
mod panes;
#[cfg(test)]
mod tests;

pub use panes::{Closing, Panes};

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, BooleanArray, Decimal128Array, Int64Array, RecordBatch};
use arrow::compute::{and, cast, concat_batches, filter_record_batch, or};
use arrow::datatypes::{DataType, Decimal128Type, Field, Int64Type, Schema, SchemaRef};
use datafusion::logical_expr::{EmitTo, GroupsAccumulator};
use datafusion::physical_expr::GroupsAccumulatorAdapter;
use datafusion::physical_expr::aggregate::AggregateFunctionExpr;

use super::slots::{Chunks, Pointer};
use crate::error::{Error, Result};
use crate::state::keys::{KeyIndex, hash_keys};
use crate::stream::{ChangeBatch, Micros, Origin};

/// Names of the order key's columns, behind all others of a state row.
const ORIGIN: [&str; 3] = ["__time", "__place", "__offset"];
const NONE: u32 = u32::MAX;

/// One aggregate of the SELECT list.
#[derive(Debug, Clone)]
pub struct Aggregate {
    pub function: Arc<AggregateFunctionExpr>,
    /// Input columns of the arguments.
    pub arguments: Vec<usize>,
    /// A BOOLEAN input column: FILTER (WHERE …).
    pub filter: Option<usize>,
    /// The result's name, type and nullability.
    pub output: Arc<Field>,
}

/// What a GROUP BY computes.
#[derive(Debug, Clone)]
pub struct GroupSpec {
    pub input: SchemaRef,
    pub keys: Vec<usize>,
    pub calls: Vec<Aggregate>,
    /// Places among the keys of those by which rows are dealt out to shards: all but the windows, if there are others.
    pub exchange: Vec<usize>,
    /// The key that closes groups.
    pub closing: Option<Closing>,
    /// Rows may come with weights: the last argument of every call is a number that is never NULL, taken times the weight,
    /// and this call counts the rows. A group without rows is gone.
    pub total: Option<usize>,
    pub want_final: bool,
    pub want_changes: bool,
    pub want_latest: bool,
}

/// What a batch did, in the emissions that are wanted.
#[derive(Debug, Default)]
pub struct Pushed {
    pub changes: Option<ChangeBatch>,
    pub latest: Option<ChangeBatch>,
}

impl GroupSpec {
    /// Whether the other one has the same state.
    pub fn same(&self, other: &Self) -> bool {
        let calls = |(a, b): (&Aggregate, &Aggregate)| {
            a.function == b.function && a.arguments == b.arguments && a.filter == b.filter
        };
        self.input == other.input
            && self.keys == other.keys
            && self.closing == other.closing
            && self.total == other.total
            && self.calls.len() == other.calls.len()
            && self.calls.iter().zip(&other.calls).all(calls)
    }

    /// Key columns, then one per aggregate.
    pub fn output(&self) -> SchemaRef {
        let keys = self.keys.iter().map(|key| Arc::clone(&self.input.fields()[*key]));
        let calls = self.calls.iter().map(|call| Arc::clone(&call.output));
        Arc::new(Schema::new(keys.chain(calls).collect::<Vec<_>>()))
    }
}

/// The keyed table of one shard.
pub struct Group {
    spec: GroupSpec,
    output: SchemaRef,
    /// Output columns, partial states of each call, order key.
    state: SchemaRef,
    /// The window whose groups these are: the time of their rows.
    window: Option<Micros>,
    /// Where the partial states of each call begin and end in `state`.
    partials: Vec<std::ops::Range<usize>>,
    index: KeyIndex,
    chunks: Chunks,
    at: Vec<Pointer>,
    /// Touched since the last snapshot; at most once each.
    dirty: Vec<u32>,
    is_dirty: Vec<bool>,
    /// Scratch: slot → group of the batch in hand.
    local: Vec<u32>,
    hashes: Vec<u64>,
    slots: Vec<u32>,
}

impl Group {
    /// # Errors
    /// User: a key of a type that cannot be hashed. Internal: an aggregate without a partial state.
    pub fn new(spec: GroupSpec) -> Result<Self> {
        let types: Vec<DataType> =
            spec.keys.iter().map(|key| spec.input.field(*key).data_type().clone()).collect();
        let output = spec.output();
        let mut fields: Vec<_> = output.fields().iter().cloned().collect();
        let mut partials = Vec::new();
        for (number, call) in spec.calls.iter().enumerate() {
            let first = fields.len();
            for (part, field) in call.function.state_fields()?.into_iter().enumerate() {
                fields.push(Arc::new(Field::new(
                    format!("__{number}_{part}"),
                    field.data_type().clone(),
                    true,
                )));
            }
            partials.push(first..fields.len());
        }
        fields.extend(ORIGIN.iter().map(|name| Arc::new(Field::new(*name, DataType::Int64, false))));
        let state = Arc::new(Schema::new(fields));
        Ok(Self {
            chunks: Chunks::new(Arc::clone(&state)),
            index: KeyIndex::new(&types)?,
            spec,
            window: None,
            output,
            state,
            partials,
            at: Vec::new(),
            dirty: Vec::new(),
            is_dirty: Vec::new(),
            local: Vec::new(),
            hashes: Vec::new(),
            slots: Vec::new(),
        })
    }

    pub fn output_schema(&self) -> SchemaRef {
        Arc::clone(&self.output)
    }

    /// Keys held.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Takes rows in; returns what they did.
    ///
    /// # Errors
    /// User: an aggregate overflowed. Internal: rows with weights.
    pub fn push(&mut self, batch: &ChangeBatch) -> Result<Pushed> {
        if batch.weights.is_some() && self.spec.total.is_none() {
            return Err(Error::internal("a GROUP BY was given rows with weights"));
        }
        if batch.num_rows() == 0 {
            return Ok(Pushed::default());
        }
        let keys: Vec<ArrayRef> =
            self.spec.keys.iter().map(|key| Arc::clone(batch.rows.column(*key))).collect();
        self.intern(&keys, batch.num_rows())?;
        let (groups, touched, known) = self.localise();
        let prior = self.chunks.gather(touched[..known].iter().map(|slot| self.at[*slot as usize]))?;
        let next = self.next_rows(batch, &groups, &touched, &prior)?;
        let changes = if self.spec.want_changes { self.changes(&prior, &next)? } else { None };
        let latest = self.spec.want_latest.then(|| self.latest(&next)).transpose()?;
        self.replace(next, &touched)?;
        Ok(Pushed { changes, latest })
    }

    fn intern(&mut self, keys: &[ArrayRef], rows: usize) -> Result<()> {
        hash_keys(keys, rows, &mut self.hashes)?;
        self.index.intern(keys, &self.hashes, &mut self.slots)?;
        self.at.resize(self.index.len(), Pointer::VACANT);
        self.is_dirty.resize(self.index.len(), false);
        self.local.resize(self.index.len(), NONE);
        Ok(())
    }

    /// Numbers the keys of the batch, those with a state row first: the group of each row, the slot of each group, and
    /// how many have a state row. Accumulators take groups to be seen from 0 on without a gap.
    fn localise(&mut self) -> (Vec<usize>, Vec<u32>, usize) {
        let mut touched: Vec<u32> = Vec::new();
        for slot in &self.slots {
            if std::mem::replace(&mut self.local[*slot as usize], 0) == NONE {
                touched.push(*slot);
            }
        }
        touched.sort_by_key(|slot| self.at[*slot as usize].is_vacant());
        let known = touched.partition_point(|slot| !self.at[*slot as usize].is_vacant());
        touched.iter().enumerate().for_each(|(group, slot)| self.local[*slot as usize] = group as u32);
        let groups = self.slots.iter().map(|slot| self.local[*slot as usize] as usize).collect();
        touched.iter().for_each(|slot| self.local[*slot as usize] = NONE);
        (groups, touched, known)
    }

    /// The state rows of the groups with the batch taken in.
    fn next_rows(
        &self,
        batch: &ChangeBatch,
        groups: &[usize],
        touched: &[u32],
        prior: &RecordBatch,
    ) -> Result<RecordBatch> {
        let (count, known) = (touched.len(), prior.num_rows());
        let all: Vec<usize> = (0..count).collect();
        let mut results = Vec::with_capacity(self.spec.calls.len());
        let mut states = Vec::new();
        for (call, range) in self.spec.calls.iter().zip(&self.partials) {
            let mut arguments: Vec<ArrayRef> =
                call.arguments.iter().map(|column| Arc::clone(batch.rows.column(*column))).collect();
            if let (Some(last), Some(weights)) = (arguments.last_mut(), &batch.weights) {
                *last = weighted(last, weights)?;
            }
            let filter = call.filter.map(|column| batch.rows.column(column).as_boolean());
            let mut partial = accumulator(&call.function)?;
            partial.update_batch(&arguments, groups, filter, count)?;
            let mut state = partial.state(EmitTo::All)?;
            if known > 0 {
                // A separate accumulator: update and merge in one is not promised to work.
                let mut merged = accumulator(&call.function)?;
                merged.merge_batch(&prior.columns()[range.clone()], &all[..known], known)?;
                merged.merge_batch(&state, &all, count)?;
                state = merged.state(EmitTo::All)?;
            }
            let mut result = accumulator(&call.function)?;
            result.merge_batch(&state, &all, count)?;
            results.push(typed(result.evaluate(EmitTo::All)?, call.output.data_type())?);
            for (column, field) in state.into_iter().zip(&self.state.fields()[range.clone()]) {
                states.push(typed(column, field.data_type())?);
            }
        }
        let mut columns = self.index.keys(touched)?;
        columns.append(&mut results);
        columns.append(&mut states);
        columns.extend(self.orders(batch, groups, prior, count));
        Ok(RecordBatch::try_new(Arc::clone(&self.state), columns)?)
    }

    /// The greatest order key of each group.
    fn orders(
        &self,
        batch: &ChangeBatch,
        groups: &[usize],
        prior: &RecordBatch,
        count: usize,
    ) -> [ArrayRef; 3] {
        let mut orders = vec![(i64::MIN, i64::MIN, i64::MIN); count];
        let before = self.origin(prior);
        (0..prior.num_rows()).for_each(|row| orders[row] = before.key(row));
        for (row, group) in groups.iter().enumerate() {
            let (time, place, offset) = batch.origin.key(row);
            orders[*group] = orders[*group].max((self.window.unwrap_or(time), place, offset));
        }
        let column =
            |of: fn(&(i64, i64, i64)) -> i64| Arc::new(orders.iter().map(of).collect::<Int64Array>()) as _;
        [column(|o| o.0), column(|o| o.1), column(|o| o.2)]
    }

    fn origin(&self, rows: &RecordBatch) -> Origin {
        let first = self.state.fields().len() - ORIGIN.len();
        let column = |at: usize| rows.column(first + at).as_primitive::<Int64Type>().clone();
        Origin { time: column(0), place: column(1), offset: column(2) }
    }

    /// Old rows with weight −1 and new ones with +1, where they differ. `prior` belongs to the first rows of `next`.
    fn changes(&self, prior: &RecordBatch, next: &RecordBatch) -> Result<Option<ChangeBatch>> {
        let known = prior.num_rows();
        let mut differs = BooleanArray::from(vec![false; known]);
        for column in self.spec.keys.len()..self.output.fields().len() {
            let now = next.column(column).slice(0, known);
            let other = match arrow::compute::kernels::cmp::distinct(&now, prior.column(column)) {
                Ok(other) => other,
                // Types that have no comparison count as changed.
                Err(_) => BooleanArray::from(vec![true; known]),
            };
            differs = or(&differs, &other)?;
        }
        let holds = differs.values().iter().chain(std::iter::repeat_n(true, next.num_rows() - known));
        let holds: BooleanArray = holds.map(Some).collect();
        let old = filter_record_batch(prior, &and(&differs, &self.there(prior))?)?;
        let new = filter_record_batch(next, &and(&holds, &self.there(next))?)?;
        if new.num_rows() + old.num_rows() == 0 {
            return Ok(None);
        }
        let both = concat_batches(&self.state, [&old, &new])?;
        let weights = (0..both.num_rows()).map(|row| if row < old.num_rows() { -1 } else { 1 });
        let weights = (old.num_rows() > 0).then(|| Int64Array::from_iter_values(weights));
        self.outputs(&both, weights).map(Some)
    }

    /// Which groups have rows.
    fn there(&self, state: &RecordBatch) -> BooleanArray {
        match self.spec.total {
            None => BooleanArray::from(vec![true; state.num_rows()]),
            Some(call) => {
                let counts = state.column(self.spec.keys.len() + call).as_primitive::<Int64Type>();
                counts.values().iter().map(|count| Some(*count != 0)).collect()
            }
        }
    }

    /// The rows of touched groups; one that is gone is a deletion (weight −1).
    fn latest(&self, next: &RecordBatch) -> Result<ChangeBatch> {
        let there = self.there(next);
        let weights = (there.true_count() < there.len())
            .then(|| there.values().iter().map(|there| Some(if there { 1 } else { -1 })).collect());
        self.outputs(next, weights)
    }

    /// The output columns of state rows.
    fn outputs(&self, state: &RecordBatch, weights: Option<Int64Array>) -> Result<ChangeBatch> {
        let columns = state.columns()[..self.output.fields().len()].to_vec();
        let rows = RecordBatch::try_new(Arc::clone(&self.output), columns)?;
        Ok(ChangeBatch { rows, weights, origin: self.origin(state) })
    }

    /// Stores the state rows of the slots.
    fn replace(&mut self, rows: RecordBatch, slots: &[u32]) -> Result<()> {
        for slot in slots {
            let at = self.at[*slot as usize];
            if !at.is_vacant() {
                self.chunks.release(at);
            }
            if !std::mem::replace(&mut self.is_dirty[*slot as usize], true) {
                self.dirty.push(*slot);
            }
        }
        self.chunks.add(rows, slots, &mut self.at)?;
        self.chunks.settle(&mut self.at)
    }

    /// All rows that hold.
    ///
    /// # Errors
    /// Internal, from arrow.
    pub fn all(&self) -> Result<ChangeBatch> {
        let rows = self.chunks.gather(self.at.iter().copied())?;
        self.outputs(&filter_record_batch(&rows, &self.there(&rows))?, None)
    }

    /// State rows touched since the last snapshot, or all of them; `None` when there are none.
    ///
    /// # Errors
    /// Internal, from arrow.
    pub fn snapshot(&mut self, full: bool) -> Result<Option<RecordBatch>> {
        let dirty = std::mem::take(&mut self.dirty);
        dirty.iter().for_each(|slot| self.is_dirty[*slot as usize] = false);
        let slots = if full { (0..self.at.len() as u32).collect() } else { dirty };
        if slots.is_empty() {
            return Ok(None);
        }
        self.chunks.gather(slots.iter().map(|slot| self.at[*slot as usize])).map(Some)
    }

    /// Key columns of a snapshot.
    pub fn key_columns(&self, snapshot: &RecordBatch) -> Vec<ArrayRef> {
        snapshot.columns()[..self.spec.keys.len()].to_vec()
    }

    /// Puts back what snapshots hold; later batches win.
    ///
    /// # Errors
    /// External: the snapshot has another layout, as that of another version or of other SQL.
    pub fn restore(&mut self, batches: &[RecordBatch]) -> Result<()> {
        for batch in batches {
            let types =
                |schema: &Schema| schema.fields().iter().map(|f| f.data_type().clone()).collect::<Vec<_>>();
            if types(batch.schema_ref()) != types(&self.state) {
                return Err(misfit());
            }
            let rows = RecordBatch::try_new(Arc::clone(&self.state), batch.columns().to_vec())?;
            let keys = self.key_columns(&rows);
            self.intern(&keys, rows.num_rows())?;
            // One row per key, as a snapshot has them.
            let slots = std::mem::take(&mut self.slots);
            self.replace(rows, &slots)?;
            self.slots = slots;
        }
        for slot in std::mem::take(&mut self.dirty) {
            self.is_dirty[slot as usize] = false;
        }
        Ok(())
    }
}

/// A column of numbers times the rows' weights.
fn weighted(column: &ArrayRef, weights: &Int64Array) -> Result<ArrayRef> {
    let overflow = || Error::user("a sum does not fit its type");
    if let Some(decimals) = column.as_primitive_opt::<Decimal128Type>() {
        let times =
            |(value, weight): (&i128, &i64)| value.checked_mul(i128::from(*weight)).ok_or_else(overflow);
        let values = decimals.values().iter().zip(weights.values()).map(times).collect::<Result<Vec<_>>>()?;
        let product = Decimal128Array::from(values).with_data_type(column.data_type().clone());
        return Ok(Arc::new(product));
    }
    let integers = column.as_primitive_opt::<Int64Type>();
    let integers = integers.ok_or_else(|| Error::internal("a number that cannot be taken back"))?;
    let times = |(value, weight): (&i64, &i64)| value.checked_mul(*weight).ok_or_else(overflow);
    let values = integers.values().iter().zip(weights.values()).map(times).collect::<Result<Vec<_>>>()?;
    Ok(Arc::new(Int64Array::from(values)))
}

fn misfit() -> Error {
    Error::external("a state file does not fit its GROUP BY")
        .hint("The SQL or the version has changed since it was written; begin a new state (--state, --name).")
}

fn accumulator(function: &Arc<AggregateFunctionExpr>) -> Result<Box<dyn GroupsAccumulator>> {
    if function.groups_accumulator_supported() {
        return Ok(function.create_groups_accumulator()?);
    }
    let function = Arc::clone(function);
    Ok(Box::new(GroupsAccumulatorAdapter::new(move || function.create_accumulator())))
}

fn typed(column: ArrayRef, wanted: &DataType) -> Result<ArrayRef> {
    if column.data_type() == wanted { Ok(column) } else { Ok(cast(&column, wanted)?) }
}
