//! Look-up join: rows of a stream with the matching rows of a bounded table held in memory.
//!
//! Stateless: a row is joined once, on arrival, with the table as it is then. An inner join drops a row without a match,
//! an outer one keeps it with NULLs; a row with several matches becomes several, in the table's order. NULL keys match
//! nothing. Rows keep their order key.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, Int64Array, RecordBatch, RecordBatchOptions, UInt32Array};
use arrow::compute::{concat_batches, take};
use arrow::datatypes::SchemaRef;
use datafusion::physical_plan::PhysicalExpr;

use super::stateless::{Failed, decide};
use crate::error::Result;
use crate::state::keys::{KeyIndex, NO_SLOT, hash_keys};
use crate::stream::ChangeBatch;

/// How rows are joined.
#[derive(Debug, Clone)]
pub struct LookupSpec {
    /// Key columns of the stream's rows.
    pub keys: Vec<usize>,
    /// Leading columns of the stream's rows that go on.
    pub width: usize,
    /// Key columns of the table, behind those that go on.
    pub table_keys: usize,
    /// Rows without a match stay, with NULL for the table's columns.
    pub outer: bool,
    /// The stream's columns come before the table's.
    pub stream_first: bool,
    /// What else must be true of a match, over the joined columns.
    pub filter: Option<Arc<dyn PhysicalExpr>>,
    /// The joined columns.
    pub schema: SchemaRef,
}

impl LookupSpec {
    pub fn same(&self, other: &Self) -> bool {
        self.keys == other.keys
            && self.width == other.width
            && self.outer == other.outer
            && self.stream_first == other.stream_first
            && self.filter == other.filter
            && self.schema == other.schema
    }
}

/// A bounded table by its keys; not changed once it is built.
pub struct LookupTable {
    /// The columns that go on.
    columns: Vec<ArrayRef>,
    index: KeyIndex,
    /// Where the rows of each key begin in `members`, and where the last end.
    starts: Vec<u32>,
    members: Vec<u32>,
}

impl LookupTable {
    /// The last `keys` columns are the keys.
    ///
    /// # Errors
    /// User: a key of a type that cannot be hashed. Internal: batches of another schema.
    pub fn new(schema: &SchemaRef, batches: &[RecordBatch], keys: usize) -> Result<Self> {
        let rows = concat_batches(schema, batches)?;
        let mut columns = rows.columns().to_vec();
        let by = columns.split_off(columns.len() - keys);
        let types: Vec<_> = by.iter().map(|column| column.data_type().clone()).collect();
        let mut index = KeyIndex::new(&types)?;
        let (mut hashes, mut slots) = (Vec::new(), Vec::new());
        hash_keys(&by, rows.num_rows(), &mut hashes)?;
        index.intern(&by, &hashes, &mut slots)?;
        let mut starts = vec![0u32; index.len() + 1];
        slots.iter().for_each(|slot| starts[*slot as usize + 1] += 1);
        (1..starts.len()).for_each(|slot| starts[slot] += starts[slot - 1]);
        let (mut next, mut members) = (starts.clone(), vec![0u32; slots.len()]);
        for (row, slot) in slots.iter().enumerate() {
            members[next[*slot as usize] as usize] = row as u32;
            next[*slot as usize] += 1;
        }
        Ok(Self { columns, index, starts, members })
    }

    /// Rows held.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    fn matches(&self, slot: u32) -> &[u32] {
        match slot {
            NO_SLOT => &[],
            slot => {
                &self.members[self.starts[slot as usize] as usize..self.starts[slot as usize + 1] as usize]
            }
        }
    }

    /// The matches of each row as pairs of row and table row; rows without one are left out.
    fn candidates(&self, spec: &LookupSpec, batch: &ChangeBatch) -> Result<(Vec<u32>, Vec<u32>)> {
        let keys: Vec<ArrayRef> = spec.keys.iter().map(|key| Arc::clone(batch.rows.column(*key))).collect();
        let (mut hashes, mut slots) = (Vec::new(), Vec::new());
        hash_keys(&keys, batch.num_rows(), &mut hashes)?;
        self.index.lookup(&keys, &hashes, &mut slots)?;
        for key in keys.iter().filter(|key| key.null_count() > 0) {
            (0..slots.len()).filter(|row| key.is_null(*row)).for_each(|row| slots[row] = NO_SLOT);
        }
        let (mut rows, mut members) = (Vec::with_capacity(slots.len()), Vec::with_capacity(slots.len()));
        for (row, slot) in slots.iter().enumerate() {
            for member in self.matches(*slot) {
                rows.push(row as u32);
                members.push(*member);
            }
        }
        Ok((rows, members))
    }
}

/// Joins a batch. `newest`: the rows are the newest of keys, so one that an inner join drops becomes a deletion
/// (weight −1). Rows on which the filter fails are left out and reported.
///
/// # Errors
/// Internal: the batch does not fit the specification.
pub fn lookup(
    spec: &LookupSpec,
    table: &LookupTable,
    batch: &ChangeBatch,
    newest: bool,
    failed: &mut Failed,
) -> Result<ChangeBatch> {
    let (mut rows, mut members) = table.candidates(spec, batch)?;
    let mut wrong = Failed::new();
    if let Some(filter) = &spec.filter {
        let (at, of) = (UInt32Array::from(rows.clone()), UInt32Array::from(members.clone()));
        let joined = joined(spec, table, batch, &at, &of)?;
        let keep = decide(filter, &joined, &mut wrong)?;
        wrong.iter_mut().for_each(|(candidate, _)| *candidate = rows[*candidate] as usize);
        wrong.dedup_by_key(|(row, _)| *row);
        let kept = |list: &[u32]| {
            list.iter().enumerate().filter(|(at, _)| keep.value(*at)).map(|(_, v)| *v).collect::<Vec<u32>>()
        };
        (rows, members) = (kept(&rows), kept(&members));
    }
    if !wrong.is_empty() {
        let bad = |row: &u32| wrong.iter().any(|(wrong, _)| *wrong == *row as usize);
        (rows, members) = rows.into_iter().zip(members).filter(|(row, _)| !bad(row)).unzip();
    }
    let unmatched = spec.outer || newest;
    let skipped: Vec<u32> = wrong.iter().map(|(row, _)| *row as u32).collect();
    failed.append(&mut wrong);
    if !unmatched {
        return joined(spec, table, batch, &rows.into(), &members.into());
    }
    let (rows, members) = with_unmatched(batch.num_rows() as u32, &rows, &members, &skipped);
    let out = joined(spec, table, batch, &rows, &members)?;
    if spec.outer || members.null_count() == 0 {
        return Ok(out);
    }
    let before = |row: usize| out.weights.as_ref().map_or(1, |weights| weights.value(row));
    let weight = |row: usize| if members.is_valid(row) { before(row) } else { -1 };
    let weights: Int64Array = (0..out.num_rows()).map(|row| Some(weight(row))).collect();
    Ok(ChangeBatch { weights: Some(weights), ..out })
}

/// Adds the rows without a match, in order, without those skipped.
fn with_unmatched(all: u32, rows: &[u32], members: &[u32], skipped: &[u32]) -> (UInt32Array, UInt32Array) {
    let (mut every, mut of) = (Vec::with_capacity(all as usize), Vec::with_capacity(all as usize));
    let mut next = 0;
    for row in 0..all {
        let first = next;
        while rows.get(next) == Some(&row) {
            every.push(row);
            of.push(Some(members[next]));
            next += 1;
        }
        if first == next && !skipped.contains(&row) {
            every.push(row);
            of.push(None);
        }
    }
    (every.into(), of.into())
}

/// The columns of pairs of row and table row.
fn joined(
    spec: &LookupSpec,
    table: &LookupTable,
    batch: &ChangeBatch,
    rows: &UInt32Array,
    members: &UInt32Array,
) -> Result<ChangeBatch> {
    let same = rows.len() == batch.num_rows() && rows.values().iter().copied().eq(0..rows.len() as u32);
    let stream = batch.rows.columns()[..spec.width].iter();
    let mut stream = match same {
        true => stream.cloned().collect::<Vec<_>>(),
        false => stream.map(|column| take(column, rows, None)).collect::<std::result::Result<_, _>>()?,
    };
    let mut found = table
        .columns
        .iter()
        .map(|column| take(column, members, None))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let columns = if spec.stream_first {
        stream.append(&mut found);
        stream
    } else {
        found.append(&mut stream);
        found
    };
    let options = RecordBatchOptions::new().with_row_count(Some(rows.len()));
    let joined = RecordBatch::try_new_with_options(Arc::clone(&spec.schema), columns, &options)?;
    if same {
        return Ok(batch.with_rows(joined));
    }
    let weights =
        batch.weights.as_ref().map(|weights| rows.values().iter().map(|row| weights.value(*row as usize)));
    let weights = weights.map(Int64Array::from_iter_values);
    Ok(ChangeBatch { rows: joined, weights, origin: batch.origin.take(rows)? })
}
