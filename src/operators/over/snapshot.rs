//! Snapshots: what changed since the previous one, and how an operator is built again from all of them.
//!
//! *Rows* are the accepted input rows with their origin (`__time, __place, __offset`); which of them are final
//! follows from the watermark, so a segment is never rewritten and can be forgotten below the horizon. *Keys* are the
//! aggregates of unbounded frames at the final frontier; a later segment replaces the keys of earlier ones.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};

use super::cells::{Call, Cell, read_state, state_fields, write_states};
use super::rows::Entry;
use super::{Frame, Over};
use crate::error::{Error, Result};
use crate::stream::{ChangeBatch, Micros, Origin};

/// Columns behind the input's own in a segment of rows.
pub const ORIGIN: [&str; 3] = ["__time", "__place", "__offset"];

/// What a snapshot is made of, as it was at a barrier. It is put together aside, while the operator goes on.
#[derive(Debug)]
pub struct OverCut {
    pub rows: RowsCut,
    pub keys: KeysCut,
}

/// Input since the previous snapshot, in the batches in which it came.
#[derive(Debug)]
pub struct RowsCut {
    schema: SchemaRef,
    batches: Vec<ChangeBatch>,
}

/// Keys that have changed since the previous snapshot.
#[derive(Debug)]
pub struct KeysCut {
    columns: Vec<ArrayRef>,
    /// Of calls with unbounded frames: which one, and its cell for each key.
    states: Vec<(usize, Call, Vec<Cell>)>,
}

impl RowsCut {
    /// # Errors
    /// Internal only.
    pub fn gather(self) -> Result<Option<RecordBatch>> {
        if self.batches.is_empty() {
            return Ok(None);
        }
        with_origin(&ChangeBatch::concat(&self.schema, &self.batches)?).map(Some)
    }
}

impl KeysCut {
    /// # Errors
    /// Internal only.
    pub fn gather(self) -> Result<Option<RecordBatch>> {
        if self.states.is_empty() {
            return Ok(None);
        }
        let mut columns = self.columns;
        let mut fields: Vec<Field> = (0..columns.len())
            .map(|at| Field::new(format!("k{at}"), columns[at].data_type().clone(), true))
            .collect();
        for (at, call, cells) in self.states {
            columns.extend(write_states(&call, &cells)?);
            fields.extend(state_fields(at));
        }
        Ok(Some(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?))
    }
}

impl Over {
    /// What has changed since the previous one.
    ///
    /// # Errors
    /// Internal only.
    pub fn cut(&mut self) -> Result<OverCut> {
        let (schema, batches) = (Arc::clone(&self.spec.input), std::mem::take(&mut self.fresh));
        let rows = RowsCut { schema, batches };
        let dirty = std::mem::take(&mut self.dirty);
        dirty.iter().for_each(|slot| self.keys[*slot as usize].dirty = false);
        let dirty: Vec<u32> = dirty.into_iter().filter(|slot| !self.keys[*slot as usize].closed).collect();
        let unbounded = self.unbounded();
        if dirty.is_empty() || unbounded.is_empty() {
            return Ok(OverCut { rows, keys: KeysCut { columns: Vec::new(), states: Vec::new() } });
        }
        let cells = |at: usize| dirty.iter().map(|slot| self.finals.cell(*slot, at).clone()).collect();
        let states = unbounded.into_iter().map(|at| (at, self.calls[at].clone(), cells(at))).collect();
        Ok(OverCut { rows, keys: KeysCut { columns: self.index.keys(&dirty)?, states } })
    }

    /// The next snapshot holds all keys, so that it replaces every earlier segment of keys.
    pub fn mark_all_dirty(&mut self) {
        self.keys.iter_mut().for_each(|key| key.dirty = true);
        self.dirty = (0..self.keys.len() as u32).collect();
    }

    /// The next snapshot leaves out the rows pushed so far: they can be read again elsewhere.
    pub fn forget_input(&mut self) {
        self.fresh.clear();
    }

    /// Where the key columns of a segment are, for key groups: of rows by the spec, of keys the leading ones.
    pub fn key_columns(&self, of_rows: bool) -> Vec<usize> {
        match of_rows {
            true => self.spec.partition_by.clone(),
            false => (0..self.spec.partition_by.len()).collect(),
        }
    }

    /// Builds the state of a new operator: row segments in any order, key segments in epoch order, and the watermark
    /// at the last snapshot.
    ///
    /// # Errors
    /// External: segments of another shape.
    pub fn restore(&mut self, rows: &[RecordBatch], keys: &[RecordBatch], watermark: Micros) -> Result<()> {
        self.restore_keys(keys, watermark)?;
        for batch in rows {
            self.refill(&without_origin(batch, &self.spec.input)?)?;
        }
        self.rebuild();
        Ok(())
    }

    /// The first part of [`Over::restore`]: key segments in epoch order, and the watermark at the last snapshot. The rows
    /// that frames still need follow ([`Over::refill`]), then [`Over::rebuild`].
    ///
    /// # Errors
    /// External: segments of another shape.
    pub fn restore_keys(&mut self, keys: &[RecordBatch], watermark: Micros) -> Result<()> {
        debug_assert!(self.keys.is_empty(), "restore comes first");
        self.watermark = watermark;
        keys.iter().try_for_each(|batch| self.restore_segment(batch))
    }

    fn unbounded(&self) -> Vec<usize> {
        (0..self.calls.len()).filter(|at| self.calls[*at].frame == Frame::Unbounded).collect()
    }

    fn restore_segment(&mut self, batch: &RecordBatch) -> Result<()> {
        let unbounded = self.unbounded();
        let width = self.spec.partition_by.len();
        let state = state_fields(0).len();
        if batch.num_columns() != width + unbounded.len() * state {
            return Err(other_shape());
        }
        self.intern(&batch.columns()[..width], batch.num_rows())?;
        let slots = std::mem::take(&mut self.slots);
        for (nth, at) in unbounded.into_iter().enumerate() {
            let columns = &batch.columns()[width + nth * state..width + (nth + 1) * state];
            if columns
                .iter()
                .zip(state_fields(at))
                .any(|(column, field)| column.data_type() != field.data_type())
            {
                return Err(other_shape());
            }
            for (row, slot) in slots.iter().enumerate() {
                let cell = read_state(&self.calls[at], columns, row).ok_or_else(other_shape)?;
                self.finals.at(*slot).cells[at] = cell;
            }
        }
        self.slots = slots;
        Ok(())
    }

    /// Enters the rows that are pending or still in a frame, without touching any cell; others are passed over.
    ///
    /// # Errors
    /// Internal only.
    pub fn refill(&mut self, batch: &ChangeBatch) -> Result<()> {
        let arguments = self.enter(&batch.rows)?;
        let oldest = if self.sliding.is_empty() { self.watermark } else { self.horizon() };
        let live = batch.origin.time.values().iter().filter(|time| **time >= oldest).count();
        if live == 0 {
            return Ok(());
        }
        let chunk = self.chunks.add(batch.rows.clone(), arguments, live)?;
        let slots = std::mem::take(&mut self.slots);
        for (row, slot) in slots.iter().enumerate() {
            let (time, place, offset) = batch.origin.key(row);
            if time < oldest {
                continue;
            }
            let entry = Entry { time, place, offset, chunk, row: row as u32 };
            self.keys[*slot as usize].rows.insert(entry);
            match time < self.watermark {
                true => self.chunks.emitted(&entry),
                false => self.pending_rows += 1,
            }
        }
        self.slots = slots;
        Ok(())
    }

    /// Recomputes what follows from rows and watermark: final counts, frames, queues, the latest cursors.
    pub fn rebuild(&mut self) {
        let (calls, sliding, chunks) = (&self.calls, &self.sliding, &self.chunks);
        for (slot, key) in self.keys.iter_mut().enumerate() {
            let slot = slot as u32;
            let finals = key.rows.iter().take_while(|entry| entry.time < self.watermark).count();
            key.rows.finalise(finals);
            let cells = self.finals.at(slot).cells;
            for call in sliding.iter().flat_map(|frame| &frame.calls) {
                for entry in key.rows.iter().take(finals) {
                    cells[*call].add(&calls[*call], chunks, entry);
                }
            }
            if let Some(pending) = key.rows.first_pending() {
                self.pending.push(pending.time, slot);
            }
            if finals > 0 {
                key.queued_for_eviction = true;
                self.evictions.push(key.rows.get(0).time, slot);
            }
            if self.spec.want_latest {
                let latest = self.latest.at(slot).cells;
                latest.clone_from_slice(cells);
                for entry in key.rows.iter().skip(finals) {
                    for (call, cell) in calls.iter().zip(&mut *latest) {
                        cell.add(call, chunks, entry);
                    }
                }
            }
        }
    }
}

fn other_shape() -> Error {
    Error::external("a state file does not fit its operator")
        .hint("The SQL has changed since the state was written; run `millstream reset` to begin a new state.")
}

fn with_origin(batch: &ChangeBatch) -> Result<RecordBatch> {
    let mut fields = batch.rows.schema().fields().to_vec();
    fields.extend(ORIGIN.iter().map(|name| Arc::new(Field::new(*name, DataType::Int64, false))));
    let mut columns = batch.rows.columns().to_vec();
    for column in [&batch.origin.time, &batch.origin.place, &batch.origin.offset] {
        columns.push(Arc::new(column.clone()));
    }
    Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
}

fn without_origin(batch: &RecordBatch, schema: &Arc<Schema>) -> Result<ChangeBatch> {
    let width = schema.fields().len();
    if batch.num_columns() != width + ORIGIN.len() {
        return Err(other_shape());
    }
    let long = |at: usize| -> Result<Int64Array> {
        let column = batch.column(width + at);
        column.as_primitive_opt::<Int64Type>().cloned().ok_or_else(other_shape)
    };
    let (time, place, offset) = (long(0)?, long(1)?, long(2)?);
    let rows = RecordBatch::try_new(Arc::clone(schema), batch.columns()[..width].to_vec());
    let rows = rows.map_err(|_| other_shape())?;
    Ok(ChangeBatch::append(rows, Origin { time, place, offset }))
}
