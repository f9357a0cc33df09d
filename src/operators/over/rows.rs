//! Rows of an OVER operator: batches as they came, entries per key in the total order.
//!
//! A batch is kept whole as a *chunk* while any of its rows may still be emitted; afterwards only its argument columns
//! stay until every row has left all frames.

use std::cmp::Ordering;
use std::collections::VecDeque;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Decimal128Array, Float64Array, Int64Array, RecordBatch,
    UInt32Array, UInt64Array,
};
use arrow::compute::{cast, interleave_record_batch};
use arrow::datatypes::{DataType, SchemaRef};

use super::aggregate::Value;
use crate::error::{Error, Result};
use crate::stream::{ChangeBatch, Micros, Origin};

/// A row: its place in the total order and where it is stored.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    pub time: Micros,
    pub place: i64,
    pub offset: i64,
    pub chunk: u32,
    pub row: u32,
}

impl Entry {
    fn order(&self, other: &Self) -> Ordering {
        (self.time, self.place, self.offset).cmp(&(other.time, other.place, other.offset))
    }
}

/// The entries of one key in order: first the final ones that frames still need, then the pending ones.
#[derive(Debug, Default)]
pub struct KeyRows {
    entries: VecDeque<Entry>,
    /// How many leading entries are final.
    finals: usize,
}

impl KeyRows {
    /// Inserts a pending row; near the end in a stream that is nearly in order. Returns its index.
    pub fn insert(&mut self, entry: Entry) -> usize {
        let at = match self.entries.back() {
            Some(last) if last.order(&entry) == Ordering::Greater => {
                self.entries.partition_point(|other| other.order(&entry) != Ordering::Greater)
            }
            _ => self.entries.len(),
        };
        self.entries.insert(at, entry);
        at
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn finals(&self) -> usize {
        self.finals
    }

    pub fn get(&self, at: usize) -> &Entry {
        &self.entries[at]
    }

    /// Reads an entry, so that it is near ([`crate::operators::ahead`]).
    #[inline]
    pub fn glance(&self, at: usize) -> usize {
        self.entries.get(at).map_or(0, |entry| entry.row as usize)
    }

    pub fn last(&self) -> Option<&Entry> {
        self.entries.back()
    }

    pub fn finalise(&mut self, count: usize) {
        self.finals += count;
        debug_assert!(self.finals <= self.entries.len());
    }

    /// Takes the oldest entry out if it is final and before `horizon`.
    pub fn pop_before(&mut self, horizon: Micros) -> Option<Entry> {
        let first = self.entries.front()?;
        if self.finals == 0 || first.time >= horizon {
            return None;
        }
        self.finals -= 1;
        self.entries.pop_front()
    }

    pub fn first_pending(&self) -> Option<&Entry> {
        self.entries.get(self.finals)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }
}

/// An argument or filter column, read as one of a few machine types.
#[derive(Debug)]
pub enum Argument {
    Integer(Int64Array),
    Unsigned(UInt64Array),
    Decimal(Decimal128Array),
    Float(Float64Array),
    Filter(BooleanArray),
    /// Only whether a value is there counts.
    Present(ArrayRef),
}

impl Argument {
    pub fn new(column: &ArrayRef, only_presence: bool) -> Result<Self> {
        if only_presence {
            return Ok(Self::Present(std::sync::Arc::clone(column)));
        }
        Ok(match column.data_type() {
            DataType::Boolean => Self::Filter(column.as_boolean().clone()),
            DataType::Float32 | DataType::Float64 => {
                Self::Float(cast(column, &DataType::Float64)?.as_primitive().clone())
            }
            DataType::UInt8 | DataType::UInt16 | DataType::UInt32 | DataType::UInt64 => {
                Self::Unsigned(cast(column, &DataType::UInt64)?.as_primitive().clone())
            }
            DataType::Decimal128(_, _) => Self::Decimal(column.as_primitive().clone()),
            DataType::Date32 => Self::Integer(
                cast(&cast(column, &DataType::Int32)?, &DataType::Int64)?.as_primitive().clone(),
            ),
            _ => Self::Integer(cast(column, &DataType::Int64)?.as_primitive().clone()),
        })
    }

    /// Reads a row, so that it is near.
    #[inline]
    fn glance(&self, row: usize) -> usize {
        match self {
            Self::Integer(a) => a.values()[row] as usize,
            Self::Unsigned(a) => a.values()[row] as usize,
            Self::Decimal(a) => a.values()[row] as usize,
            Self::Float(a) => a.values()[row].to_bits() as usize,
            Self::Filter(_) | Self::Present(_) => 0,
        }
    }

    /// The value of a row, `None` for NULL.
    pub fn value(&self, row: usize) -> Option<Value> {
        match self {
            Self::Integer(a) => a.is_valid(row).then(|| Value::Integer(i128::from(a.value(row)))),
            Self::Unsigned(a) => a.is_valid(row).then(|| Value::Integer(i128::from(a.value(row)))),
            Self::Decimal(a) => a.is_valid(row).then(|| Value::Integer(a.value(row))),
            Self::Float(a) => a.is_valid(row).then(|| Value::Float(a.value(row))),
            Self::Filter(a) => (a.is_valid(row) && a.value(row)).then_some(Value::Integer(1)),
            Self::Present(a) => a.is_valid(row).then_some(Value::Integer(1)),
        }
    }
}

#[derive(Debug)]
struct Chunk {
    /// `None` once no row can be emitted any more.
    rows: Option<RecordBatch>,
    arguments: Vec<Argument>,
    /// Rows that may still be emitted.
    pending: usize,
    /// Rows that frames may still need.
    live: usize,
}

/// A slab of chunks.
#[derive(Debug, Default)]
pub struct Chunks {
    chunks: Vec<Option<Chunk>>,
    free: Vec<u32>,
}

impl Chunks {
    pub fn add(&mut self, rows: RecordBatch, arguments: Vec<Argument>, live: usize) -> Result<u32> {
        let chunk = Chunk { rows: Some(rows), arguments, pending: live, live };
        if let Some(at) = self.free.pop() {
            self.chunks[at as usize] = Some(chunk);
            return Ok(at);
        }
        let at = u32::try_from(self.chunks.len())
            .map_err(|_| Error::internal("a window holds too many batches"))?;
        self.chunks.push(Some(chunk));
        Ok(at)
    }

    fn chunk(&mut self, at: u32) -> Option<&mut Chunk> {
        self.chunks.get_mut(at as usize).and_then(Option::as_mut)
    }

    /// A row was emitted for the last time.
    pub fn emitted(&mut self, entry: &Entry) {
        if let Some(chunk) = self.chunk(entry.chunk) {
            chunk.pending -= 1;
            if chunk.pending == 0 {
                chunk.rows = None;
            }
        }
    }

    /// A row left every frame.
    pub fn release(&mut self, entry: &Entry) {
        let Some(chunk) = self.chunk(entry.chunk) else { return };
        chunk.live -= 1;
        if chunk.live == 0 {
            self.chunks[entry.chunk as usize] = None;
            self.free.push(entry.chunk);
        }
    }

    pub fn value(&self, entry: &Entry, argument: usize) -> Option<Value> {
        let chunk = self.chunks.get(entry.chunk as usize)?.as_ref()?;
        chunk.arguments[argument].value(entry.row as usize)
    }

    /// Reads the arguments of a row, so that they are near.
    #[inline]
    pub fn glance(&self, entry: &Entry) -> usize {
        let Some(Some(chunk)) = self.chunks.get(entry.chunk as usize) else { return 0 };
        chunk.arguments.iter().fold(0, |seen, argument| seen ^ argument.glance(entry.row as usize))
    }

    pub fn len(&self) -> usize {
        self.chunks.len() - self.free.len()
    }

    /// Rows that are pending or that frames may still need.
    pub fn live(&self) -> usize {
        self.chunks.iter().flatten().map(|chunk| chunk.live).sum()
    }

    /// The input rows of the entries, in their order.
    pub fn rows(&self, schema: &SchemaRef, entries: &[Entry]) -> Result<ChangeBatch> {
        let mut batches: Vec<&RecordBatch> = Vec::new();
        let mut position = datafusion::common::HashMap::new();
        let mut picks = Vec::with_capacity(entries.len());
        for entry in entries {
            let at = match position.get(&entry.chunk) {
                Some(at) => *at,
                None => {
                    let chunk = self.chunks.get(entry.chunk as usize).and_then(Option::as_ref);
                    let rows = chunk.and_then(|chunk| chunk.rows.as_ref());
                    batches.push(
                        rows.ok_or_else(|| Error::internal("a window lost a row that is not emitted yet"))?,
                    );
                    position.insert(entry.chunk, batches.len() - 1);
                    batches.len() - 1
                }
            };
            picks.push((at, entry.row as usize));
        }
        let rows = match &batches[..] {
            [] => RecordBatch::new_empty(std::sync::Arc::clone(schema)),
            [one] => {
                let rows: UInt32Array = picks.iter().map(|(_, row)| *row as u32).collect::<Vec<_>>().into();
                arrow::compute::take_record_batch(one, &rows)?
            }
            many => interleave_record_batch(many, &picks)?,
        };
        let column = |of: fn(&Entry) -> i64| Int64Array::from_iter_values(entries.iter().map(of));
        let origin =
            Origin { time: column(|e| e.time), place: column(|e| e.place), offset: column(|e| e.offset) };
        Ok(ChangeBatch::append(rows, origin))
    }
}
