//! Columnar chunks behind keyed operators: dense slots point into them, garbage is bounded.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::interleave_record_batch;
use arrow::datatypes::{DataType, SchemaRef};

use crate::error::Result;

/// Chunks of one size class that may gather before they are merged.
const FAN_OUT: usize = 8;
/// Below this many dead rows a chunk is never rewritten for their sake.
const SMALL: usize = 1_024;

/// Where a slot's row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::operators) struct Pointer {
    chunk: u32,
    row: u32,
}

const VACANT: u32 = u32::MAX;
const PENDING: u32 = u32::MAX - 1;

impl Pointer {
    pub(in crate::operators) const VACANT: Self = Self { chunk: VACANT, row: 0 };

    /// A row of the batch in hand, not yet in a chunk.
    pub(in crate::operators) fn pending(row: u32) -> Self {
        Self { chunk: PENDING, row }
    }

    pub(in crate::operators) fn is_vacant(self) -> bool {
        self.chunk == VACANT
    }

    pub(in crate::operators) fn is_pending(self) -> bool {
        self.chunk == PENDING
    }

    pub(in crate::operators) fn row(self) -> u32 {
        self.row
    }
}

#[derive(Debug)]
struct Chunk {
    rows: RecordBatch,
    /// The slot that each row was made for; the row is live iff that slot still points to it.
    owners: Vec<u32>,
    live: usize,
}

#[derive(Debug)]
pub(in crate::operators) struct Chunks {
    schema: SchemaRef,
    chunks: Vec<Chunk>,
    /// Some chunk has become mostly garbage.
    wasteful: bool,
}

impl Chunks {
    pub(in crate::operators) fn new(schema: SchemaRef) -> Self {
        Self { schema, chunks: Vec::new(), wasteful: false }
    }

    pub(in crate::operators) fn memory_size(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.rows.get_array_memory_size()).sum()
    }

    #[cfg(test)]
    pub(in crate::operators) fn shape(&self) -> (usize, usize) {
        (self.chunks.len(), self.chunks.iter().map(|chunk| chunk.owners.len()).sum())
    }

    /// Adds rows, one per slot of `owners`, and points the slots to them.
    pub(in crate::operators) fn add(
        &mut self,
        rows: RecordBatch,
        owners: &[u32],
        at: &mut [Pointer],
    ) -> Result<()> {
        let rows = without_shared_buffers(rows)?;
        self.push(rows, owners.to_vec(), at);
        Ok(())
    }

    fn push(&mut self, rows: RecordBatch, owners: Vec<u32>, at: &mut [Pointer]) {
        let chunk = self.chunks.len() as u32;
        point(chunk, &owners, at);
        self.chunks.push(Chunk { rows, live: owners.len(), owners });
    }

    /// A row is no longer pointed to.
    pub(in crate::operators) fn release(&mut self, pointer: Pointer) {
        let chunk = &mut self.chunks[pointer.chunk as usize];
        chunk.live -= 1;
        self.wasteful |= is_wasteful(chunk);
    }

    /// The rows pointed to, in that order.
    pub(in crate::operators) fn gather(
        &self,
        pointers: impl Iterator<Item = Pointer>,
    ) -> Result<RecordBatch> {
        let batches: Vec<&RecordBatch> = self.chunks.iter().map(|chunk| &chunk.rows).collect();
        interleaved(&self.schema, &batches, &indices(pointers))
    }

    /// The same rows, to be put together later and elsewhere.
    pub(in crate::operators) fn pick(&self, pointers: impl Iterator<Item = Pointer>) -> Picked {
        Picked {
            schema: self.schema.clone(),
            batches: self.chunks.iter().map(|chunk| chunk.rows.clone()).collect(),
            indices: indices(pointers),
        }
    }

    /// Merges and rewrites until the number of chunks and the garbage are within their bounds.
    pub(in crate::operators) fn settle(&mut self, at: &mut [Pointer]) -> Result<()> {
        while let Some(first) = self.mergeable() {
            let (rows, owners) = self.live_rows(first..self.chunks.len(), at)?;
            self.chunks.truncate(first);
            if !owners.is_empty() {
                self.push(rows, owners, at);
            }
        }
        if std::mem::take(&mut self.wasteful) {
            for index in 0..self.chunks.len() {
                if is_wasteful(&self.chunks[index]) {
                    let (rows, owners) = self.live_rows(index..index + 1, at)?;
                    point(index as u32, &owners, at);
                    self.chunks[index] = Chunk { rows, live: owners.len(), owners };
                }
            }
        }
        Ok(())
    }

    /// The first of the newest chunks that are to become one.
    fn mergeable(&self) -> Option<usize> {
        let newest = size_class(self.chunks.last()?);
        let similar = self.chunks.iter().rev().take_while(|chunk| size_class(chunk) <= newest).count();
        (similar >= FAN_OUT).then(|| self.chunks.len() - similar)
    }

    fn live_rows(&self, range: std::ops::Range<usize>, at: &[Pointer]) -> Result<(RecordBatch, Vec<u32>)> {
        let live: usize = self.chunks[range.clone()].iter().map(|chunk| chunk.live).sum();
        let mut owners = Vec::with_capacity(live);
        let mut pointers = Vec::with_capacity(live);
        for index in range {
            for (row, &owner) in self.chunks[index].owners.iter().enumerate() {
                let pointer = Pointer { chunk: index as u32, row: row as u32 };
                if at[owner as usize] == pointer {
                    owners.push(owner);
                    pointers.push(pointer);
                }
            }
        }
        debug_assert_eq!(owners.len(), live);
        let rows = without_shared_buffers(self.gather(pointers.into_iter())?)?;
        Ok((rows, owners))
    }
}

/// Rows that were picked, with the chunks that they lie in: whatever becomes of their slots, they stay as they were.
#[derive(Debug)]
pub(in crate::operators) struct Picked {
    schema: SchemaRef,
    batches: Vec<RecordBatch>,
    indices: Vec<(usize, usize)>,
}

impl Picked {
    /// # Errors
    /// Internal, from arrow.
    pub(in crate::operators) fn gather(self) -> Result<RecordBatch> {
        interleaved(&self.schema, &self.batches.iter().collect::<Vec<_>>(), &self.indices)
    }
}

fn indices(pointers: impl Iterator<Item = Pointer>) -> Vec<(usize, usize)> {
    pointers.map(|at| (at.chunk as usize, at.row as usize)).collect()
}

fn interleaved(
    schema: &SchemaRef,
    batches: &[&RecordBatch],
    indices: &[(usize, usize)],
) -> Result<RecordBatch> {
    if indices.is_empty() {
        return Ok(RecordBatch::new_empty(schema.clone()));
    }
    Ok(interleave_record_batch(batches, indices)?)
}

fn point(chunk: u32, owners: &[u32], at: &mut [Pointer]) {
    for (row, &owner) in owners.iter().enumerate() {
        at[owner as usize] = Pointer { chunk, row: row as u32 };
    }
}

fn is_wasteful(chunk: &Chunk) -> bool {
    let dead = chunk.owners.len() - chunk.live;
    dead > chunk.live && (dead > SMALL || chunk.live == 0)
}

/// Powers of eight.
fn size_class(chunk: &Chunk) -> u32 {
    chunk.owners.len().max(1).ilog2() / 3
}

/// View arrays share the buffers of the batch that they were taken from; copying them lets it go.
fn without_shared_buffers(batch: RecordBatch) -> Result<RecordBatch> {
    let is_view = |data_type: &DataType| matches!(data_type, DataType::Utf8View | DataType::BinaryView);
    if !batch.schema_ref().fields().iter().any(|field| is_view(field.data_type())) {
        return Ok(batch);
    }
    let copy = |column: &ArrayRef| -> ArrayRef {
        match column.data_type() {
            DataType::Utf8View => Arc::new(column.as_string_view().gc()),
            DataType::BinaryView => Arc::new(column.as_binary_view().gc()),
            _ => column.clone(),
        }
    };
    Ok(RecordBatch::try_new(batch.schema(), batch.columns().iter().map(copy).collect())?)
}
