//! Merging state files: an epoch adds a small file per shard, and nobody wants thousands of them.
//!
//! # Which files ([`choose`])
//! Of a node's files of one kind, in epoch order, the newest ones: from the newest epoch back, as long as the files of
//! an epoch are at most twice as large as all newer ones of the run together and the run stays below [`MAX_BYTES`]. A
//! run of at least [`LEAST_EPOCHS`] is merged into one file. So sizes fall by about half from file to file, a row is
//! rewritten O(log n) times, and a node has the small files of at most about [`LEAST_EPOCHS`], some of growing size, and
//! full ones.
//!
//! # What they become ([`merge`])
//! *Rows* (no key) all stay, but for those below the horizon. Of *keyed* rows the newest row of each key stays, as a
//! later file replaces the keys of earlier ones; one that says that a key is deleted is such a row too. A run has every
//! file from some epoch on, so the merged file stands in the order where its newest file stood. Merged files are sorted
//! by key group like all others, and any number of shards reads them.

use std::ops::Range;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, UInt32Array};
use arrow::compute::{concat_batches, filter_record_batch, take_record_batch};
use arrow::datatypes::{Int64Type, UInt8Type};
use bytes::Bytes;

use super::files::{decode, encode};
use super::keys::{KEY_GROUPS, KeyIndex, hash_keys};
use super::manifest::StateFile;
use crate::error::Result;
use crate::stream::Micros;

/// The files of fewer epochs are left as they are.
pub const LEAST_EPOCHS: usize = 16;
/// Files below this are of one size: most of it is what every file has.
const SMALL: u64 = 16 << 10;
/// A merged file is not made larger than this.
pub const MAX_BYTES: u64 = 128 << 20;

/// Which of these files, all of one node and kind and in epoch order, are to become one.
pub fn choose(files: &[&StateFile]) -> Option<Range<usize>> {
    let (mut bytes, mut epochs) = (0, 0);
    let mut first = files.len();
    for epoch in files.chunk_by(|a, b| a.epoch == b.epoch).rev() {
        let size: u64 = epoch.iter().map(|file| file.bytes).sum();
        let grown = epochs > 0 && size > 2 * bytes.max(SMALL);
        if grown || bytes + size > MAX_BYTES {
            break;
        }
        bytes += size;
        epochs += 1;
        first -= epoch.len();
    }
    (epochs >= LEAST_EPOCHS).then_some(first..files.len())
}

/// A merged file.
#[derive(Debug)]
pub struct Merged {
    pub bytes: Bytes,
    pub rows: usize,
    pub times: Option<(Micros, Micros)>,
}

/// One file of many, which come in epoch order. `keys`: the key columns (without the group's) of keyed rows, else
/// rows below `horizon` are left out.
///
/// # Errors
/// External: a file is damaged. Internal: they have different columns.
pub fn merge(files: Vec<Bytes>, keys: Option<&[usize]>, horizon: Micros) -> Result<Option<Merged>> {
    let mut parts = Vec::new();
    let mut seen = None;
    // The newest row of a key comes first.
    for file in files.into_iter().rev() {
        for batch in decode(file, 0..KEY_GROUPS as u16)? {
            parts.push(match keys {
                Some(keys) => unseen(&batch, keys, &mut seen)?,
                None => since(batch, horizon)?,
            });
        }
    }
    let Some(first) = parts.first() else { return Ok(None) };
    let all = concat_batches(&first.schema(), &parts)?;
    if all.num_rows() == 0 {
        return Ok(None);
    }
    let groups = all.column(0).as_primitive::<UInt8Type>().values();
    let mut order: Vec<u32> = (0..all.num_rows() as u32).collect();
    order.sort_by_key(|row| groups[*row as usize]);
    let sorted = take_record_batch(&all, &UInt32Array::from(order))?;
    let times = times_of(&sorted);
    Ok(Some(Merged { bytes: encode(&sorted)?, rows: sorted.num_rows(), times }))
}

/// Rows whose key was not seen yet.
fn unseen(batch: &RecordBatch, keys: &[usize], seen: &mut Option<KeyIndex>) -> Result<RecordBatch> {
    let columns: Vec<ArrayRef> = keys.iter().map(|key| batch.column(key + 1).clone()).collect();
    let types: Vec<_> = columns.iter().map(|column| column.data_type().clone()).collect();
    let index = match seen {
        Some(index) => index,
        None => seen.insert(KeyIndex::new(&types)?),
    };
    let (mut hashes, mut slots) = (Vec::new(), Vec::new());
    hash_keys(&columns, batch.num_rows(), &mut hashes)?;
    let known = index.len() as u32;
    index.intern(&columns, &hashes, &mut slots)?;
    // A file holds a key once.
    let new: BooleanArray = slots.iter().map(|slot| Some(*slot >= known)).collect();
    Ok(filter_record_batch(batch, &new)?)
}

fn since(batch: RecordBatch, horizon: Micros) -> Result<RecordBatch> {
    let Some(times) = time_column(&batch) else { return Ok(batch) };
    let live: BooleanArray = times.values().iter().map(|time| Some(*time >= horizon)).collect();
    Ok(filter_record_batch(&batch, &live)?)
}

fn time_column(batch: &RecordBatch) -> Option<&Int64Array> {
    batch.column_by_name(TIME)?.as_primitive_opt::<Int64Type>()
}

/// The column of event times, where rows have one.
pub const TIME: &str = "__time";

/// Smallest and largest event time.
pub fn times_of(rows: &RecordBatch) -> Option<(Micros, Micros)> {
    let times = time_column(rows)?;
    Some((arrow::compute::min(times)?, arrow::compute::max(times)?))
}

#[cfg(test)]
mod tests;
