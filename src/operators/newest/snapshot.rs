//! What a snapshot holds, and how a table is built again from all of them.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch};
use arrow::datatypes::{Int64Type, Schema, SchemaRef};

use super::keys::NO_SLOT;
use super::{Newest, Slot};
use crate::error::{Error, Result};
use crate::operators::slots::Picked;
use crate::stream::Origin;

/// What a snapshot is made of, as it was at a barrier. It is put together aside, while the table changes.
#[derive(Debug)]
pub struct NewestCut {
    schema: SchemaRef,
    rows: Picked,
    slots: Vec<Slot>,
}

impl NewestCut {
    /// The rows, with [`super::SNAPSHOT_COLUMNS`] behind their own.
    ///
    /// # Errors
    /// Internal, from arrow.
    pub fn gather(self) -> Result<RecordBatch> {
        let slots = &self.slots;
        let column = |of: fn(&Slot) -> i64| -> ArrayRef {
            Arc::new(Int64Array::from(slots.iter().map(of).collect::<Vec<_>>()))
        };
        let flag = |of: fn(&Slot) -> bool| -> ArrayRef {
            Arc::new(BooleanArray::from(slots.iter().map(of).collect::<Vec<_>>()))
        };
        let mut columns = self.rows.gather()?.columns().to_vec();
        columns.extend([column(|s| s.time), column(|s| s.place), column(|s| s.offset)]);
        columns.extend([flag(|s| s.dirty), flag(|s| s.deleted)]);
        Ok(RecordBatch::try_new(self.schema, columns)?)
    }
}

impl Newest {
    /// The rows changed since the last one, `None` when none did. In no particular order.
    ///
    /// # Errors
    /// Internal, from arrow.
    pub fn cut(&mut self) -> Result<Option<NewestCut>> {
        let changed = std::mem::take(&mut self.changed);
        let mut slots = Vec::with_capacity(changed.len());
        for slot in changed {
            let was_changed = std::mem::take(&mut self.slots[slot as usize].changed);
            if was_changed && !self.at[slot as usize].is_vacant() {
                slots.push(slot);
            }
        }
        let cut = self.cut_of(&slots);
        self.forget_deleted(&slots);
        self.chunks.settle(&mut self.at)?;
        Ok(cut)
    }

    /// All rows; does not count as a snapshot.
    pub fn full_cut(&self) -> Option<NewestCut> {
        let live = |slot: &u32| !self.at[*slot as usize].is_vacant();
        self.cut_of(&(0..self.slots.len() as u32).filter(live).collect::<Vec<_>>())
    }

    /// Puts back what snapshots hold. Later batches win, whatever their order keys say: they are later states of the
    /// same table. Dirty marks are as stored.
    ///
    /// # Errors
    /// Internal: a batch whose columns are not those of a snapshot of this table.
    pub fn restore(&mut self, batches: &[RecordBatch]) -> Result<()> {
        for batch in batches {
            let (rows, origin, dirty, deleted) = self.split_snapshot(batch)?;
            self.intern(&rows)?;
            for row in 0..rows.num_rows() {
                let slot = self.row_slots[row];
                if slot != NO_SLOT {
                    self.replace(slot, row, origin.key(row));
                    // Remembered in `queued` only until the rows are placed, when `mark` sets both properly.
                    self.set_clean(slot);
                    self.slots[slot as usize].queued = dirty.value(row);
                    self.slots[slot as usize].deleted = deleted.value(row);
                }
            }
            let touched = self.place_touched(&rows)?;
            for &slot in &touched {
                let was_dirty = std::mem::take(&mut self.slots[slot as usize].queued);
                self.mark(slot, was_dirty, false);
            }
            self.touched = touched;
            self.touched.clear();
        }
        self.forget_deleted(&(0..self.slots.len() as u32).collect::<Vec<_>>());
        self.chunks.settle(&mut self.at)?;
        self.rebuild_queue();
        Ok(())
    }

    /// Drops the slots whose deletion the store has acknowledged.
    fn forget_deleted(&mut self, slots: &[u32]) {
        for &slot in slots {
            let Slot { deleted, dirty, .. } = self.slots[slot as usize];
            if deleted && !dirty && !self.at[slot as usize].is_vacant() {
                self.drop_slot(slot);
            }
        }
    }

    fn cut_of(&self, slots: &[u32]) -> Option<NewestCut> {
        (!slots.is_empty()).then(|| NewestCut {
            schema: self.snapshot_schema.clone(),
            rows: self.chunks.pick(slots.iter().map(|&slot| self.at[slot as usize])),
            slots: slots.iter().map(|&slot| self.slots[slot as usize]).collect(),
        })
    }

    /// Rows, order keys, dirty and deleted marks.
    fn split_snapshot(
        &self,
        batch: &RecordBatch,
    ) -> Result<(RecordBatch, Origin, BooleanArray, BooleanArray)> {
        let wrong = || Error::internal("a snapshot of newest rows has other columns than its table");
        let types_of =
            |schema: &Schema| schema.fields().iter().map(|f| f.data_type().clone()).collect::<Vec<_>>();
        if types_of(batch.schema_ref()) != types_of(&self.snapshot_schema) {
            return Err(wrong());
        }
        let width = self.schema.fields().len();
        let rows = RecordBatch::try_new(self.schema.clone(), batch.columns()[..width].to_vec())?;
        let int64 = |column: usize| batch.column(column).as_primitive::<Int64Type>().clone();
        let origin = Origin { time: int64(width), place: int64(width + 1), offset: int64(width + 2) };
        let flags = |column: usize| batch.column(column).as_boolean().clone();
        Ok((rows, origin, flags(width + 3), flags(width + 4)))
    }
}
