//! The newest row of each key, for an online sink (DESIGN §5 *Redis*).
//!
//! # Meaning
//! Of all rows pushed for a key the one with the greatest (event time, place, offset) is kept. A row with an equal
//! order key replaces the kept one: it is the same row, evaluated again. So the content depends on the set of rows
//! pushed, not on how they were cut or ordered. Rows with a NULL in a key column are counted and left out.
//!
//! A row with a negative weight takes its key's row away, unless the same batch has a new row for the key: the key is
//! then *deleted*, and its deletion is dirty, written and acknowledged like a row. It is forgotten once the store has
//! acknowledged it and a snapshot after that says so.
//!
//! A row is *dirty* from the push that put it there until [`Newest::acknowledge`] says that the online store has it.
//! [`Newest::take_dirty`] hands out dirty rows that are not already under way; a row that was replaced while under
//! way is handed out again, and acknowledging the older version changes nothing. A batch that could not be written
//! goes back with [`Newest::give_back`].
//!
//! # Snapshots
//! [`Newest::cut`] holds the rows that were pushed, or marked by [`Newest::mark_all_dirty`], since the last one.
//! An acknowledgement alone is not a change, so a restored row may be dirty although the store has it. That is
//! harmless: it is written once more with the same values. The other way round cannot happen, provided that a
//! snapshot taken after `mark_all_dirty` is durable before the fence of the emptied store is raised again.
//!
//! # Expiry
//! With a time to live, [`Newest::expire`] drops rows whose event time + ttl lies below the watermark, at the latest
//! 1/64 of the ttl afterwards: rows are kept in that many time buckets, so dropping costs nothing per batch.
//! Expired rows come back from older snapshots at a restore and are dropped again by the next `expire`.
//!
//! # Storage
//! Slots are dense. A slot points to (chunk, row); chunks hold only rows that were live when they were made. When
//! eight chunks of similar size have gathered they are merged, and a chunk that is mostly garbage is rewritten, so
//! memory is at most about twice the live rows and a row is copied O(log n) times.

mod bury;
mod keys;
mod snapshot;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, UInt32Array};
use arrow::compute::take_record_batch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use crate::error::Result;
use crate::state::files::DELETED;
use crate::stream::{ChangeBatch, Micros};

use super::ahead::{BLOCK, look};
use super::slots::{Chunks, Pointer};
use keys::{Keys, NO_SLOT};
pub use snapshot::NewestCut;

/// Names of the columns that [`NewestCut::gather`] adds behind the row's own.
pub const SNAPSHOT_COLUMNS: [&str; 5] = ["__time", "__place", "__offset", "__dirty", DELETED];

/// Time buckets per ttl.
const BUCKETS_PER_TTL: i64 = 64;

/// Dirty rows on their way to the online store.
#[derive(Debug, Clone)]
pub struct DirtyBatch {
    /// Which slots the rows, then the deleted rows came from.
    pub slots: Vec<u32>,
    /// The version of each slot's row when it was taken.
    pub versions: Vec<u32>,
    /// Event time of each row, µs.
    pub times: Vec<Micros>,
    /// One row per key.
    pub rows: RecordBatch,
    /// The last rows of keys that are deleted.
    pub deletes: Option<RecordBatch>,
    /// Event time + ttl in ms since the epoch, rounded down; `None` without a ttl.
    pub expire_at_ms: Option<Int64Array>,
}

impl DirtyBatch {
    /// No rows, for a flush that only says how far the stream was read.
    pub fn empty(schema: &SchemaRef) -> Self {
        let rows = RecordBatch::new_empty(schema.clone());
        Self {
            slots: Vec::new(),
            versions: Vec::new(),
            times: Vec::new(),
            rows,
            deletes: None,
            expire_at_ms: None,
        }
    }
}

/// What is known of one slot, apart from its row.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    time: Micros,
    place: i64,
    offset: i64,
    /// Counts the rows that this slot has held, over all keys that have used it.
    version: u32,
    /// The online store does not have this row yet.
    dirty: bool,
    /// The key has no row any more; the one kept says which key it was.
    deleted: bool,
    /// In the queue of rows to be taken; at most once.
    queued: bool,
    /// In the list of slots for the next snapshot; at most once.
    changed: bool,
}

impl Slot {
    fn order(&self) -> (Micros, i64, i64) {
        (self.time, self.place, self.offset)
    }
}

/// Keyed table of newest rows.
#[derive(Debug)]
pub struct Newest {
    schema: SchemaRef,
    snapshot_schema: SchemaRef,
    key_columns: Vec<usize>,
    ttl: Option<Micros>,
    /// The store has rows of another table: see [`Newest::take_over`].
    takes_over: bool,
    keys: Keys,
    slots: Vec<Slot>,
    /// Where each slot's row is; parallel to `slots`.
    at: Vec<Pointer>,
    chunks: Chunks,
    live: usize,
    dirty: usize,
    /// Slots to be taken, oldest mark first from `queue_head` on. An entry may have become clean or vacant.
    queue: Vec<u32>,
    queue_head: usize,
    changed: Vec<u32>,
    /// Bucket of event time → slots that had a row of it; an entry is stale once its slot moved on.
    buckets: BTreeMap<i64, Vec<u32>>,
    /// Entries in all buckets.
    filed: usize,
    /// Scratch: the slot of each row of the batch being pushed.
    row_slots: Vec<u32>,
    touched: Vec<u32>,
}

impl Newest {
    /// A table of rows with `schema`, keyed by the columns at `key_columns`. `ttl_micros`: how long after its event
    /// time a row lives; `None`: for ever.
    ///
    /// # Errors
    /// A user error when a key column has a type that cannot be a key.
    pub fn new(schema: SchemaRef, key_columns: Vec<usize>, ttl_micros: Option<i64>) -> Result<Self> {
        let mut fields: Vec<Arc<Field>> = schema.fields().iter().cloned().collect();
        for name in &SNAPSHOT_COLUMNS[..3] {
            fields.push(Arc::new(Field::new(*name, DataType::Int64, false)));
        }
        for name in &SNAPSHOT_COLUMNS[3..] {
            fields.push(Arc::new(Field::new(*name, DataType::Boolean, false)));
        }
        let snapshot_schema = Arc::new(Schema::new(fields));
        let keys = Keys::new(key_columns.iter().map(|&column| schema.field(column).data_type()))?;
        Ok(Self {
            chunks: Chunks::new(schema.clone()),
            schema,
            snapshot_schema,
            key_columns,
            ttl: ttl_micros,
            takes_over: false,
            keys,
            slots: Vec::new(),
            at: Vec::new(),
            live: 0,
            dirty: 0,
            queue: Vec::new(),
            queue_head: 0,
            changed: Vec::new(),
            buckets: BTreeMap::new(),
            filed: 0,
            row_slots: Vec::new(),
            touched: Vec::new(),
        })
    }

    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Keys held, those whose deletion is under way included.
    pub fn len(&self) -> usize {
        self.live
    }

    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// Rows that the online store has not acknowledged, those under way included.
    pub fn dirty_len(&self) -> usize {
        self.dirty
    }

    /// Bytes of the rows held, garbage included; keys and slots not counted.
    pub fn memory_size(&self) -> usize {
        self.chunks.memory_size()
    }

    /// Takes rows in; returns how many had a NULL in a key column and were left out.
    ///
    /// # Errors
    /// Internal, from arrow.
    pub fn push(&mut self, batch: &ChangeBatch) -> Result<usize> {
        let nulls = self.intern(&batch.rows)?;
        let skip = |row: usize| batch.weights.as_ref().is_some_and(|weights| weights.value(row) <= 0);
        for row in 0..batch.num_rows() {
            if row % BLOCK == 0 {
                let end = batch.num_rows().min(row + BLOCK);
                self.look(&self.row_slots[row..end]);
            }
            let slot = self.row_slots[row];
            if slot == NO_SLOT || skip(row) {
                continue;
            }
            let order = batch.origin.key(row);
            if self.at[slot as usize].is_vacant() || order >= self.slots[slot as usize].order() {
                self.replace(slot, row, order);
            }
        }
        if let Some(weights) = &batch.weights {
            self.take_away(batch, weights);
        }
        let touched = self.place_touched(&batch.rows)?;
        for &slot in &touched {
            self.mark(slot, true, true);
        }
        self.touched = touched;
        self.touched.clear();
        Ok(nulls)
    }

    /// Looks at what the slots of some rows point to.
    fn look(&self, slots: &[u32]) {
        // A row without a key has no slot.
        look(slots, |slot| self.at.get(slot).map_or(0, |at| usize::from(at.is_vacant())));
        look(slots, |slot| self.slots.get(slot).map_or(0, |state| state.version as usize));
    }

    /// Deletes the keys of rows with negative weights that got no row from the batch in hand.
    fn take_away(&mut self, batch: &ChangeBatch, weights: &Int64Array) {
        for (row, weight) in weights.values().iter().enumerate() {
            let slot = self.row_slots[row];
            if *weight >= 0 || slot == NO_SLOT {
                continue;
            }
            let (at, order) = (self.at[slot as usize], batch.origin.key(row));
            if !at.is_pending() && (at.is_vacant() || order >= self.slots[slot as usize].order()) {
                self.replace(slot, row, order);
                self.slots[slot as usize].deleted = true;
            }
        }
    }

    /// Rows of the batch last pushed that had a NULL in a key column.
    pub fn rows_without_key(&self) -> impl Iterator<Item = usize> + '_ {
        let without = self.row_slots.iter().enumerate().filter(|(_, slot)| **slot == NO_SLOT);
        without.map(|(row, _)| row)
    }

    /// Hands out at most `max` dirty rows that are not under way, oldest mark first; `None` when there is none.
    ///
    /// # Errors
    /// Internal, from arrow.
    pub fn take_dirty(&mut self, max: usize) -> Result<Option<DirtyBatch>> {
        let mut slots = Vec::with_capacity(max.min(self.queue.len() - self.queue_head));
        while slots.len() < max && self.queue_head < self.queue.len() {
            let slot = self.queue[self.queue_head];
            self.queue_head += 1;
            let state = &mut self.slots[slot as usize];
            if std::mem::take(&mut state.queued) && state.dirty {
                slots.push(slot);
            }
        }
        if self.queue_head * 2 > self.queue.len() {
            self.queue.drain(..self.queue_head);
            self.queue_head = 0;
        }
        if slots.is_empty() {
            return Ok(None);
        }
        slots.sort_by_key(|slot| self.slots[*slot as usize].deleted);
        let living = slots.partition_point(|slot| !self.slots[*slot as usize].deleted);
        let rows_of = |slots: &[u32]| self.chunks.gather(slots.iter().map(|&slot| self.at[slot as usize]));
        let (rows, gone) = (rows_of(&slots[..living])?, rows_of(&slots[living..])?);
        let expire_at = |ttl: Micros| -> Int64Array {
            let expiry = |&slot: &u32| self.slots[slot as usize].time.saturating_add(ttl).div_euclid(1_000);
            slots[..living].iter().map(expiry).collect::<Vec<i64>>().into()
        };
        Ok(Some(DirtyBatch {
            times: slots[..living].iter().map(|&slot| self.slots[slot as usize].time).collect(),
            versions: slots.iter().map(|&slot| self.slots[slot as usize].version).collect(),
            rows,
            deletes: (gone.num_rows() > 0).then_some(gone),
            expire_at_ms: self.ttl.map(expire_at),
            slots,
        }))
    }

    /// The online store has these rows. Rows that were replaced since they were taken stay dirty.
    pub fn acknowledge(&mut self, batch: &DirtyBatch) {
        for (&slot, &version) in batch.slots.iter().zip(&batch.versions) {
            if self.slots[slot as usize].version == version {
                self.set_clean(slot);
                if self.slots[slot as usize].deleted {
                    // So that the next snapshot says so, and it can be forgotten.
                    self.mark(slot, false, true);
                }
            }
        }
    }

    /// These rows could not be written: they will be taken again.
    pub fn give_back(&mut self, batch: &DirtyBatch) {
        for &slot in &batch.slots {
            self.enqueue(slot);
        }
    }

    /// The online store has lost its content: every row is to be written again, and is in the next snapshot.
    pub fn mark_all_dirty(&mut self) {
        for slot in 0..self.slots.len() as u32 {
            if !self.at[slot as usize].is_vacant() {
                // A new version, so that what is under way cannot acknowledge a row that was lost with the store.
                self.slots[slot as usize].version = self.slots[slot as usize].version.wrapping_add(1);
                self.mark(slot, true, true);
            }
        }
    }

    /// Drops rows whose event time + ttl lies below `watermark` (see the module's *Expiry*); returns how many.
    ///
    /// # Errors
    /// Internal, from arrow.
    pub fn expire(&mut self, watermark: Micros) -> Result<usize> {
        let Some(ttl) = self.ttl else { return Ok(0) };
        let width = bucket_width(ttl);
        // A bucket is dropped whole, once even its last microsecond has expired.
        let gone = |bucket: i64| {
            let last = bucket.saturating_mul(width).saturating_add(width - 1);
            last.saturating_add(ttl) < watermark
        };
        let before = self.live;
        while let Some(entry) = self.buckets.first_entry().filter(|entry| gone(*entry.key())) {
            let (bucket, slots) = entry.remove_entry();
            self.filed -= slots.len();
            for slot in slots {
                let index = slot as usize;
                let Slot { time, deleted, dirty, .. } = self.slots[index];
                // The store may have a row of a key whose deletion it does not know.
                let waits = deleted && dirty;
                if self.at[index].is_vacant() || time.div_euclid(width) != bucket || waits {
                    continue;
                }
                match dirty && self.takes_over {
                    true => self.delete(slot),
                    false => self.drop_slot(slot),
                }
            }
        }
        if self.live < before {
            self.chunks.settle(&mut self.at)?;
        }
        Ok(before - self.live)
    }

    /// Fills `row_slots`; returns the number of rows with a NULL key.
    fn intern(&mut self, rows: &RecordBatch) -> Result<usize> {
        let columns: Vec<ArrayRef> =
            self.key_columns.iter().map(|&column| rows.column(column).clone()).collect();
        let nulls = self.keys.intern(&columns, &mut self.row_slots)?;
        self.slots.resize(self.keys.slot_count(), Slot::default());
        self.at.resize(self.keys.slot_count(), Pointer::VACANT);
        Ok(nulls)
    }

    /// Lets `slot` point to a row of the batch in hand; `place_touched` gives it its place.
    fn replace(&mut self, slot: u32, row: usize, order: (Micros, i64, i64)) {
        let old = self.at[slot as usize];
        let state = &mut self.slots[slot as usize];
        if !old.is_pending() {
            self.touched.push(slot);
            state.version = state.version.wrapping_add(1);
            if old.is_vacant() {
                self.live += 1;
            } else {
                self.chunks.release(old);
            }
        }
        (state.time, state.place, state.offset) = order;
        state.deleted = false;
        self.at[slot as usize] = Pointer::pending(row as u32);
    }

    /// Stores the winning rows of a batch as a chunk; returns the touched slots.
    fn place_touched(&mut self, rows: &RecordBatch) -> Result<Vec<u32>> {
        let mut touched = std::mem::take(&mut self.touched);
        self.drop_keys_without_rows();
        if touched.is_empty() {
            return Ok(touched);
        }
        // Reading order, so that `take` runs forward and the chunk does not depend on the hash table.
        touched.sort_unstable_by_key(|&slot| self.at[slot as usize].row());
        let indices: UInt32Array =
            touched.iter().map(|&slot| self.at[slot as usize].row()).collect::<Vec<_>>().into();
        let winners = take_record_batch(rows, &indices)?;
        self.chunks.add(winners, &touched, &mut self.at)?;
        if let Some(ttl) = self.ttl {
            self.file_by_time(&touched, bucket_width(ttl));
        }
        self.chunks.settle(&mut self.at)?;
        Ok(touched)
    }

    /// A key that was interned for a row of weight 0 has no row: forget it.
    fn drop_keys_without_rows(&mut self) {
        if self.keys.len() == self.live {
            return;
        }
        for index in 0..self.row_slots.len() {
            let slot = self.row_slots[index];
            if slot != NO_SLOT && self.at[slot as usize].is_vacant() {
                self.keys.remove(slot);
            }
        }
    }

    fn file_by_time(&mut self, touched: &[u32], width: i64) {
        // Neighbouring rows mostly fall into one bucket: look it up once per run.
        let mut start = 0;
        while start < touched.len() {
            let bucket_of = |slot: u32| self.slots[slot as usize].time.div_euclid(width);
            let bucket = bucket_of(touched[start]);
            let end = touched[start..].iter().position(|&slot| bucket_of(slot) != bucket);
            let end = end.map_or(touched.len(), |length| start + length);
            self.buckets.entry(bucket).or_default().extend_from_slice(&touched[start..end]);
            start = end;
        }
        // Stale entries are bounded: when they outnumber the rows, the buckets are made anew.
        self.filed += touched.len();
        if self.filed > 4 * self.live + 1_024 {
            self.buckets.clear();
            self.filed = self.live;
            for slot in 0..self.slots.len() as u32 {
                if !self.at[slot as usize].is_vacant() {
                    let bucket = self.slots[slot as usize].time.div_euclid(width);
                    self.buckets.entry(bucket).or_default().push(slot);
                }
            }
        }
    }

    fn mark(&mut self, slot: u32, dirty: bool, changed: bool) {
        if dirty {
            let state = &mut self.slots[slot as usize];
            self.dirty += usize::from(!std::mem::replace(&mut state.dirty, true));
            self.enqueue(slot);
        } else {
            self.set_clean(slot);
        }
        let state = &mut self.slots[slot as usize];
        if changed && !std::mem::replace(&mut state.changed, true) {
            self.changed.push(slot);
        }
    }

    fn set_clean(&mut self, slot: u32) {
        let was = std::mem::take(&mut self.slots[slot as usize].dirty);
        self.dirty -= usize::from(was);
    }

    fn enqueue(&mut self, slot: u32) {
        let state = &mut self.slots[slot as usize];
        if state.dirty && !std::mem::replace(&mut state.queued, true) {
            self.queue.push(slot);
        }
    }

    /// After a restore, which uses the `queued` marks for its own ends.
    fn rebuild_queue(&mut self) {
        self.queue.clear();
        self.queue_head = 0;
        for slot in 0..self.slots.len() as u32 {
            self.slots[slot as usize].queued = false;
            self.enqueue(slot);
        }
    }

    fn drop_slot(&mut self, slot: u32) {
        self.set_clean(slot);
        self.slots[slot as usize].deleted = false;
        self.chunks.release(self.at[slot as usize]);
        self.at[slot as usize] = Pointer::VACANT;
        self.slots[slot as usize].version = self.slots[slot as usize].version.wrapping_add(1);
        self.keys.remove(slot);
        self.live -= 1;
    }
}

fn bucket_width(ttl: Micros) -> i64 {
    (ttl / BUCKETS_PER_TTL).max(1)
}
