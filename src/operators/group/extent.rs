//! `extent(value, weight)`: the least and the greatest value of a group and how many different ones it has, of rows that
//! can be taken back.
//!
//! # Meaning
//! A group is a multiset: of each value the sum of its weights. Values are there whose sum is positive; NULL and weights
//! of 0 are left out. The answer is a struct of [`LEAST`], [`GREATEST`] (NULL for a group without values) and
//! [`DIFFERENT`]. Values have the order of arrow's row format: of floats, −0.0 comes before 0.0 and NaN is the greatest.
//!
//! # State
//! A list of the values, ascending, and a list of their sums; a sum of 0 is not kept, so what is taken back leaves no
//! trace, in whatever order it came. A batch costs the different values of the groups that it touches: a group with very
//! many of them is dear.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Int64Array, ListArray, StructArray, UInt32Array};
use arrow::buffer::OffsetBuffer;
use arrow::compute::take;
use arrow::datatypes::{DataType, Field, FieldRef, Fields, Int64Type};
use arrow::row::{RowConverter, Rows, SortField};
use datafusion::common::{Result, exec_datafusion_err, internal_err, not_impl_err};
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::{
    Accumulator, AggregateUDF, AggregateUDFImpl, EmitTo, GroupsAccumulator, Signature, Volatility,
};

/// Fields of the answer.
pub const LEAST: &str = "least";
pub const GREATEST: &str = "greatest";
pub const DIFFERENT: &str = "different";

/// The aggregate function.
pub fn extent() -> AggregateUDF {
    AggregateUDF::new_from_impl(Extent { signature: Signature::any(2, Volatility::Immutable) })
}

/// Whether values of this type can be ordered.
pub fn is_orderable(kind: &DataType) -> bool {
    RowConverter::supports_fields(&[SortField::new(kind.clone())])
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Extent {
    signature: Signature,
}

impl AggregateUDFImpl for Extent {
    fn name(&self) -> &str {
        "extent"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, arguments: &[DataType]) -> Result<DataType> {
        match arguments {
            [value, DataType::Int64] if is_orderable(value) => Ok(DataType::Struct(answer(value))),
            _ => internal_err!("extent() takes a value and a weight"),
        }
    }

    fn accumulator(&self, _: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        not_impl_err!("extent() of a single group")
    }

    fn state_fields(&self, arguments: StateFieldsArgs) -> Result<Vec<FieldRef>> {
        let [value, _] = arguments.input_fields else {
            return internal_err!("extent() takes a value and a weight");
        };
        let list = |name: &str, of: &DataType| Arc::new(Field::new(name, DataType::List(item(of)), false));
        Ok(vec![list("values", value.data_type()), list("weights", &DataType::Int64)])
    }

    fn groups_accumulator_supported(&self, _: AccumulatorArgs) -> bool {
        true
    }

    fn create_groups_accumulator(&self, arguments: AccumulatorArgs) -> Result<Box<dyn GroupsAccumulator>> {
        match arguments.expr_fields {
            [value, _] => Ok(Box::new(Multisets::new(value.data_type().clone())?)),
            _ => internal_err!("extent() takes a value and a weight"),
        }
    }
}

fn answer(value: &DataType) -> Fields {
    let kinds = [(LEAST, value.clone()), (GREATEST, value.clone()), (DIFFERENT, DataType::Int64)];
    kinds.into_iter().map(|(name, kind)| Field::new(name, kind, true)).collect()
}

fn item(kind: &DataType) -> FieldRef {
    Arc::new(Field::new_list_field(kind.clone(), true))
}

/// Values and weights of many groups, as they came.
struct Multisets {
    kind: DataType,
    converter: RowConverter,
    values: Rows,
    /// Group and weight of each value.
    entries: Vec<(usize, i64)>,
    groups: usize,
}

/// A value of a group that is there.
struct Held {
    group: usize,
    /// Its place in [`Multisets::values`].
    row: usize,
    weight: i64,
}

impl Multisets {
    fn new(kind: DataType) -> Result<Self> {
        let converter = RowConverter::new(vec![SortField::new(kind.clone())])?;
        let values = converter.empty_rows(0, 0);
        Ok(Self { kind, converter, values, entries: Vec::new(), groups: 0 })
    }

    /// What is left of the values, by group and value; forgets the weights.
    fn summed(&mut self, emit_to: EmitTo) -> Result<Vec<Held>> {
        if !matches!(emit_to, EmitTo::All) {
            return not_impl_err!("extent() of some groups");
        }
        let entries = std::mem::take(&mut self.entries);
        let mut order: Vec<usize> = (0..entries.len()).filter(|row| entries[*row].1 != 0).collect();
        let key = |row: usize| (entries[row].0, self.values.row(row));
        // The lists of the state are sorted: runs that a stable sort merges.
        order.sort_by(|a, b| key(*a).cmp(&key(*b)));
        let mut held = Vec::new();
        for run in order.chunk_by(|a, b| key(*a) == key(*b)) {
            let add = |sum: i64, row: &usize| sum.checked_add(entries[*row].1);
            let weight = run.iter().try_fold(0, add);
            let weight = weight.ok_or_else(|| exec_datafusion_err!("a count does not fit its type"))?;
            if weight != 0 {
                held.push(Held { group: entries[run[0]].0, row: run[0], weight });
            }
        }
        Ok(held)
    }

    fn values_of(&self, rows: impl Iterator<Item = usize>) -> Result<ArrayRef> {
        let mut columns = self.converter.convert_rows(rows.map(|row| self.values.row(row)))?;
        match columns.pop() {
            Some(column) => Ok(column),
            None => internal_err!("values without a column"),
        }
    }

    /// How many of them each group has.
    fn lengths(&self, held: &[Held]) -> Vec<usize> {
        let mut lengths = vec![0; self.groups];
        held.iter().for_each(|held| lengths[held.group] += 1);
        lengths
    }

    fn clear(&mut self) {
        self.values.clear();
        self.groups = 0;
    }
}

impl GroupsAccumulator for Multisets {
    fn update_batch(
        &mut self,
        columns: &[ArrayRef],
        groups: &[usize],
        filter: Option<&BooleanArray>,
        count: usize,
    ) -> Result<()> {
        let [values, weights] = columns else { return internal_err!("extent() without a weight") };
        let weights = weights.as_primitive::<Int64Type>();
        self.converter.append(&mut self.values, std::slice::from_ref(values))?;
        self.groups = count;
        self.entries.extend(groups.iter().enumerate().map(|(row, group)| {
            let picked = filter.is_none_or(|filter| filter.is_valid(row) && filter.value(row));
            let counts = picked && values.is_valid(row) && weights.is_valid(row);
            (*group, if counts { weights.value(row) } else { 0 })
        }));
        Ok(())
    }

    fn merge_batch(&mut self, columns: &[ArrayRef], groups: &[usize], count: usize) -> Result<()> {
        let [values, weights] = columns else { return internal_err!("extent() has two lists as state") };
        let (values, weights) = (values.as_list::<i32>(), weights.as_list::<i32>());
        self.groups = count;
        for (row, group) in groups.iter().enumerate() {
            let sums = weights.value(row);
            let sums = sums.as_primitive::<Int64Type>().values();
            if values.value_length(row) as usize != sums.len() {
                return internal_err!("a state of extent() has not as many weights as values");
            }
            self.entries.extend(sums.iter().map(|weight| (*group, *weight)));
        }
        let offsets = values.value_offsets();
        let (first, last) = (offsets[0] as usize, offsets[offsets.len() - 1] as usize);
        self.converter.append(&mut self.values, &[values.values().slice(first, last - first)])?;
        Ok(())
    }

    fn state(&mut self, emit_to: EmitTo) -> Result<Vec<ArrayRef>> {
        let held = self.summed(emit_to)?;
        let lengths = self.lengths(&held);
        let values = self.values_of(held.iter().map(|held| held.row))?;
        let weights = Int64Array::from_iter_values(held.iter().map(|held| held.weight));
        self.clear();
        let list = |of: &DataType, items: ArrayRef| -> Result<ArrayRef> {
            let offsets = OffsetBuffer::from_lengths(lengths.iter().copied());
            Ok(Arc::new(ListArray::try_new(item(of), offsets, items, None)?))
        };
        Ok(vec![list(&self.kind, values)?, list(&DataType::Int64, Arc::new(weights))?])
    }

    fn evaluate(&mut self, emit_to: EmitTo) -> Result<ArrayRef> {
        let mut held = self.summed(emit_to)?;
        held.retain(|held| held.weight > 0);
        let lengths = self.lengths(&held);
        let values = self.values_of(held.iter().map(|held| held.row))?;
        self.clear();
        let ends = lengths.iter().scan(0, |end, length| {
            *end += length;
            Some((*length > 0).then(|| (*end - length, *end - 1)))
        });
        let ends: Vec<Option<(usize, usize)>> = ends.collect();
        let least: UInt32Array = ends.iter().map(|ends| ends.map(|(first, _)| first as u32)).collect();
        let greatest: UInt32Array = ends.iter().map(|ends| ends.map(|(_, last)| last as u32)).collect();
        let different = Int64Array::from_iter_values(lengths.iter().map(|length| *length as i64));
        let columns = vec![
            take(&values, &least, None)?,
            take(&values, &greatest, None)?,
            Arc::new(different) as ArrayRef,
        ];
        Ok(Arc::new(StructArray::try_new(answer(&self.kind), columns, None)?))
    }

    fn convert_to_state(&self, columns: &[ArrayRef], filter: Option<&BooleanArray>) -> Result<Vec<ArrayRef>> {
        let mut own = Self::new(self.kind.clone())?;
        let rows = columns.first().map_or(0, |column| column.len());
        let groups: Vec<usize> = (0..rows).collect();
        own.update_batch(columns, &groups, filter, rows)?;
        own.state(EmitTo::All)
    }

    fn size(&self) -> usize {
        self.values.size() + self.entries.capacity() * size_of::<(usize, i64)>()
    }
}
