//! A table that takes the place of another one in a store.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use datafusion::common::ScalarValue;

use super::{Newest, SNAPSHOT_COLUMNS};
use crate::error::{Error, Result};

impl Newest {
    /// From now on a row that expires before it was written is deleted from the store, which may have a newer one of the key
    /// by another table.
    pub fn take_over(&mut self) {
        self.takes_over = true;
    }

    pub(super) fn delete(&mut self, slot: u32) {
        let state = &mut self.slots[slot as usize];
        state.deleted = true;
        state.version = state.version.wrapping_add(1);
        self.mark(slot, true, true);
    }

    /// Deletes the keys of another table's snapshots, whose columns may be others; any row of a key takes its deletion back.
    /// For a table that takes the other one's place in a store.
    ///
    /// # Errors
    /// Internal: a batch without the key columns.
    pub fn bury(&mut self, batches: &[RecordBatch]) -> Result<()> {
        let mut buried = Vec::with_capacity(batches.len());
        for batch in batches {
            let mut columns: Vec<ArrayRef> = Vec::with_capacity(self.snapshot_schema.fields().len());
            for (at, field) in self.snapshot_schema.fields().iter().enumerate() {
                let kind = field.data_type();
                let of = |value: ScalarValue| value.to_array_of_size(batch.num_rows());
                columns.push(match SNAPSHOT_COLUMNS.iter().position(|name| field.name() == name) {
                    None if self.key_columns.contains(&at) => {
                        let found = batch.column_by_name(field.name()).filter(|c| c.data_type() == kind);
                        let lost =
                            || Error::internal(format!("a snapshot has no key column {}", field.name()));
                        Arc::clone(found.ok_or_else(lost)?)
                    }
                    None if field.is_nullable() => of(ScalarValue::try_from(kind)?)?,
                    None => of(ScalarValue::new_default(kind)?)?,
                    // Before any row.
                    Some(0..=2) => of(ScalarValue::Int64(Some(i64::MIN)))?,
                    Some(_) => of(ScalarValue::Boolean(Some(true)))?,
                });
            }
            buried.push(RecordBatch::try_new(Arc::clone(&self.snapshot_schema), columns)?);
        }
        self.restore(&buried)?;
        self.mark_all_dirty();
        Ok(())
    }
}
