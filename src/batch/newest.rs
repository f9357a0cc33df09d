//! Newest rows of an online sink, read from the state of its pipeline.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, RecordBatch, UInt32Array};

use crate::connectors::files;
use crate::error::{Error, Result};
use crate::plan::SinkPlan;
use crate::state::files::{DELETED, decode};
use crate::state::keys::{KEY_GROUPS, KeyIndex, hash_keys};
use crate::state::store::StateStore;
use crate::stream::clock::Clock;

/// Per key the row of the newest file that has it.
///
/// # Errors
/// External: there is no state, or a file is damaged.
pub async fn read(sink: &SinkPlan, state: &str) -> Result<Vec<RecordBatch>> {
    let located = files::open(state)?;
    let store = StateStore::new(located.store, object_store::path::Path::default(), Clock);
    let Some(manifest) = store.latest().await? else {
        return Err(Error::external(format!("there is no state at {state}")).hint("Run the pipeline first."));
    };
    let mut files: Vec<_> =
        manifest.files.iter().filter(|f| f.node == sink.name && f.kind == "newest").collect();
    files.sort_by_key(|file| std::cmp::Reverse((file.epoch, file.path.clone())));
    let width = sink.schema.fields().len();
    let types: Vec<_> = sink.key.iter().map(|key| sink.schema.field(*key).data_type().clone()).collect();
    let mut seen = KeyIndex::new(&types)?;
    let (mut hashes, mut slots, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    for file in files {
        for mut batch in decode(store.get_file(&file.path).await?, 0..KEY_GROUPS as u16)? {
            batch.remove_column(0);
            let keys: Vec<ArrayRef> = sink.key.iter().map(|key| Arc::clone(batch.column(*key))).collect();
            hash_keys(&keys, batch.num_rows(), &mut hashes)?;
            let known = seen.len() as u32;
            seen.intern(&keys, &hashes, &mut slots)?;
            // A file holds a key once, so a new slot is a new key.
            let new = slots.iter().enumerate().filter(|(_, slot)| **slot >= known).map(|(row, _)| row as u32);
            let deleted = batch.column_by_name(DELETED).and_then(|column| column.as_boolean_opt());
            let new = new.filter(|row| deleted.is_none_or(|deleted| !deleted.value(*row as usize)));
            let new = UInt32Array::from_iter_values(new);
            let columns = RecordBatch::try_new(Arc::clone(&sink.schema), batch.columns()[..width].to_vec())?;
            rows.push(arrow::compute::take_record_batch(&columns, &new)?);
        }
    }
    Ok(rows)
}
