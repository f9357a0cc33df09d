//! OVER: aggregates over the rows of a key up to each row, by event time (DESIGN §3 *Order*, *Emissions*).
//!
//! `row_number` counts the rows of the key in the total order. Every other function has a frame.
//! A frame is `RANGE BETWEEN {UNBOUNDED | INTERVAL n} PRECEDING AND CURRENT ROW`: it holds all rows of the key whose
//! event time lies in [t − n, t], later rows of equal time included. So a row at t is final when t < W.
//!
//! - Emission `final`: at watermark W every row with t < W, with its results, once.
//! - Emission `latest`: after each batch, per touched key its greatest row in the total order, with its results over
//!   all rows accepted so far. A touched key's greatest row is always pending: an accepted row has t ≥ W.
//!
//! Cost per row: O(log n) to insert and finalise, amortised O(1) per frame; nothing visits keys without new rows.
//! Two cursors run over a key's ordered rows: *final*, up to the watermark, and *latest*, over everything accepted.
//! Unbounded frames keep only their aggregate; sliding ones keep their rows, in the batches in which they came.

mod agenda;
mod aggregate;
mod cells;
mod closing;
mod cursors;
mod rows;
mod snapshot;
mod spec;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::{DataType, Schema, SchemaRef};

pub use snapshot::OverCut;
pub use spec::{Frame, Function, OverSpec, WindowCall};

use crate::error::Result;
use crate::operators::ahead::{BLOCK, look};
use crate::state::keys::{KeyIndex, hash_keys};
use crate::stream::{ChangeBatch, Micros, START_OF_TIME};
use agenda::Agenda;
use aggregate::Value;
use cells::{Call, Cell};
use cursors::Cursors;
use rows::{Argument, Chunks, Entry, KeyRows};

/// Rows per emitted batch, about.
const BATCH_ROWS: usize = 8_192;

/// The sliding frame of some calls: how far back, and which calls.
#[derive(Debug)]
struct Sliding {
    micros: i64,
    calls: Vec<usize>,
}

/// What became of rows: settled or late since the last count, held now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub settled: u64,
    pub late: u64,
    pub held: u64,
}

#[derive(Debug, Default)]
struct Key {
    rows: KeyRows,
    dirty: bool,
    queued_for_eviction: bool,
    /// Its window is closed: no row of it can follow, and none is kept.
    closed: bool,
}

pub struct Over {
    spec: OverSpec,
    output: SchemaRef,
    calls: Vec<Call>,
    sliding: Vec<Sliding>,
    /// Input columns that chunks keep: (column, only whether it is NULL).
    arguments: Vec<(usize, bool)>,
    index: KeyIndex,
    keys: Vec<Key>,
    finals: Cursors,
    /// Empty if the emission `latest` is not wanted.
    latest: Cursors,
    chunks: Chunks,
    watermark: Micros,
    /// Times of first pending rows; may hold outdated entries.
    pending: Agenda,
    /// Times of the oldest rows kept for frames.
    evictions: Agenda,
    /// (when the key's window closes, slot); empty without windows among the keys.
    closings: BinaryHeap<Reverse<(Micros, u32)>>,
    /// Keys that are closed and not yet forgotten.
    closed: usize,
    /// Input since the last snapshot.
    fresh: Vec<ChangeBatch>,
    dirty: Vec<u32>,
    late: u64,
    pending_rows: u64,
    /// Since they were last asked for.
    tally: Tally,
    hashes: Vec<u64>,
    slots: Vec<u32>,
    touched: Vec<u32>,
    due: Vec<u32>,
}

impl Over {
    /// # Errors
    /// User: a key of a type that cannot be hashed.
    pub fn new(spec: OverSpec) -> Result<Self> {
        let mut fields: Vec<_> = spec.input.fields().iter().cloned().collect();
        fields.extend(spec.calls.iter().map(|call| Arc::clone(&call.output)));
        let types: Vec<DataType> =
            spec.partition_by.iter().map(|key| spec.input.field(*key).data_type().clone()).collect();
        let mut arguments: Vec<(usize, bool)> = Vec::new();
        let mut keep = |column: usize, presence: bool| {
            arguments.iter().position(|known| *known == (column, presence)).unwrap_or_else(|| {
                arguments.push((column, presence));
                arguments.len() - 1
            })
        };
        let calls: Vec<Call> = spec
            .calls
            .iter()
            .map(|call| {
                let presence = call.function == Function::Count;
                let argument = call.argument.map(|column| keep(column, presence));
                Call::new(call, argument, call.filter.map(|column| keep(column, false)))
            })
            .collect();
        let mut sliding: Vec<Sliding> = Vec::new();
        for (at, call) in calls.iter().enumerate() {
            let Frame::Preceding { micros } = call.frame else { continue };
            match sliding.iter_mut().find(|frame| frame.micros == micros) {
                Some(frame) => frame.calls.push(at),
                None => sliding.push(Sliding { micros, calls: vec![at] }),
            }
        }
        let longest = sliding.iter().map(|frame| frame.micros).max().unwrap_or(0);
        Ok(Self {
            output: Arc::new(Schema::new(fields)),
            finals: Cursors::new(calls.len(), sliding.len()),
            latest: Cursors::new(calls.len(), sliding.len()),
            calls,
            sliding,
            arguments,
            index: KeyIndex::new(&types)?,
            keys: Vec::new(),
            chunks: Chunks::default(),
            watermark: START_OF_TIME,
            pending: Agenda::new(0),
            evictions: Agenda::new(longest),
            closings: BinaryHeap::new(),
            closed: 0,
            fresh: Vec::new(),
            dirty: Vec::new(),
            late: 0,
            pending_rows: 0,
            tally: Tally::default(),
            hashes: Vec::new(),
            slots: Vec::new(),
            touched: Vec::new(),
            due: Vec::new(),
            spec,
        })
    }

    /// Input columns, then one per call.
    pub fn output_schema(&self) -> SchemaRef {
        Arc::clone(&self.output)
    }

    pub fn watermark(&self) -> Micros {
        self.watermark
    }

    /// Keys held.
    pub fn keys(&self) -> usize {
        self.keys.len()
    }

    /// Batches held for frames and pending rows.
    pub fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// Bytes held, about: what is as wide as a text is not looked at.
    pub fn size(&self) -> u64 {
        let calls = self.calls.len() * size_of::<Cell>() * (1 + usize::from(self.spec.want_latest));
        let key = size_of::<Key>() + calls + self.sliding.len() * size_of::<usize>();
        let row = size_of::<Entry>() + self.arguments.len() * size_of::<Value>();
        (self.index.size() + self.keys.len() * key + self.chunks.live() * row) as u64
    }

    /// Whether the rows that become final from now on are wanted: else they only count for those behind them.
    pub fn emit_final(&mut self, wanted: bool) {
        self.spec.want_final = wanted;
    }

    /// Rows below the watermark that were pushed all the same, and ignored: the source decides lateness, so any is a
    /// fault of ours.
    pub fn late(&self) -> u64 {
        self.late
    }

    /// What became of rows since the last call.
    pub fn tally(&mut self) -> Tally {
        Tally { held: self.pending_rows, ..std::mem::take(&mut self.tally) }
    }

    /// Rows whose event time is below this are needed by no frame any more.
    pub fn horizon(&self) -> Micros {
        let longest = self.sliding.iter().map(|frame| frame.micros).max().unwrap_or(0);
        self.watermark.saturating_sub(longest)
    }

    /// Takes on-time rows in any order. If `latest` is wanted, returns per touched key its greatest row.
    ///
    /// # Errors
    /// Internal only.
    pub fn push(&mut self, batch: &ChangeBatch) -> Result<Option<ChangeBatch>> {
        debug_assert!(batch.weights.is_none(), "an OVER takes append-only input");
        if batch.num_rows() == 0 {
            return Ok(None);
        }
        self.touched.clear();
        self.load(batch)?;
        self.fresh.push(batch.clone());
        if !self.spec.want_latest {
            return Ok(None);
        }
        let mut touched = std::mem::take(&mut self.touched);
        touched.sort_unstable();
        touched.dedup();
        let mut entries = Vec::with_capacity(touched.len());
        let mut results: Vec<Vec<Option<Value>>> = vec![Vec::with_capacity(touched.len()); self.calls.len()];
        for ahead in touched.chunks(BLOCK) {
            self.look(ahead, &self.latest, |_, rows| rows.last().map_or(0, |last| last.row as usize));
            for slot in ahead {
                let rows = &self.keys[*slot as usize].rows;
                let Some(last) = rows.last().copied() else { continue };
                let mut cursor = self.latest.at(*slot);
                for (at, frame) in self.sliding.iter().enumerate() {
                    cursor.slide(at, frame, &self.calls, rows, &self.chunks, last.time);
                }
                entries.push(last);
                for (at, call) in self.calls.iter().enumerate() {
                    results[at].push(cursor.cells[at].result(call));
                }
            }
        }
        self.touched = touched;
        self.emit(&entries, &results).map(Some)
    }

    /// Raises the watermark: every row with t < `watermark` becomes final and is returned, per key in order.
    ///
    /// # Errors
    /// Internal only.
    pub fn advance(&mut self, watermark: Micros) -> Result<Vec<ChangeBatch>> {
        let mut out = Vec::new();
        if watermark <= self.watermark {
            return Ok(out);
        }
        self.watermark = watermark;
        let mut entries = Vec::new();
        let mut results: Vec<Vec<Option<Value>>> = vec![Vec::new(); self.calls.len()];
        let mut due = std::mem::take(&mut self.due);
        self.pending.take_before(watermark, &mut due);
        for ahead in due.chunks(BLOCK) {
            self.look(ahead, &self.finals, |chunks, rows| {
                rows.first_pending().map_or(0, |first| chunks.glance(first))
            });
            for slot in ahead {
                self.finalise(*slot, &mut entries, &mut results);
                if entries.len() >= BATCH_ROWS {
                    self.flush(&mut entries, &mut results, &mut out)?;
                }
            }
        }
        self.due = due;
        self.flush(&mut entries, &mut results, &mut out)?;
        self.evict();
        self.close()?;
        Ok(out)
    }

    /// Interns the keys of input rows (`slots` gets one slot per row) and reads their argument columns.
    fn enter(&mut self, rows: &RecordBatch) -> Result<Vec<Argument>> {
        let columns: Vec<ArrayRef> =
            self.spec.partition_by.iter().map(|key| Arc::clone(rows.column(*key))).collect();
        self.intern(&columns, rows.num_rows())?;
        let argument = |(column, presence): &(usize, bool)| Argument::new(rows.column(*column), *presence);
        self.arguments.iter().map(argument).collect()
    }

    /// Stores the batch as a chunk and its rows as pending entries; rows below the watermark are left out.
    fn load(&mut self, batch: &ChangeBatch) -> Result<()> {
        let pending_from = self.watermark;
        let arguments = self.enter(&batch.rows)?;
        let times = batch.origin.time.values();
        let kept = times.iter().filter(|time| **time >= pending_from).count();
        self.late += (times.len() - kept) as u64;
        self.tally.late += (times.len() - kept) as u64;
        self.pending_rows += kept as u64;
        if kept == 0 {
            return Ok(());
        }
        let chunk = self.chunks.add(batch.rows.clone(), arguments, kept)?;
        let slots = std::mem::take(&mut self.slots);
        for (block, ahead) in slots.chunks(BLOCK).enumerate() {
            self.look(ahead, &self.latest, |_, rows| rows.last().map_or(0, |last| last.row as usize));
            for (row, slot) in ahead.iter().enumerate() {
                let row = block * BLOCK + row;
                let (time, place, offset) = batch.origin.key(row);
                if time >= pending_from {
                    self.insert(*slot, Entry { time, place, offset, chunk, row: row as u32 });
                }
            }
        }
        self.slots = slots;
        Ok(())
    }

    /// Looks at keys, their cursors, the row where a frame begins, and what `glance` does with the chunks and rows of each.
    fn look(&self, slots: &[u32], cursors: &Cursors, glance: impl Fn(&Chunks, &KeyRows) -> usize) {
        if !cursors.is_empty() {
            look(slots, |slot| cursors.glance(slot));
        }
        look(slots, |slot| self.keys[slot].rows.len());
        look(slots, |slot| self.keys[slot].rows.glance(cursors.start(slot)));
        look(slots, |slot| glance(&self.chunks, &self.keys[slot].rows));
    }

    fn intern(&mut self, columns: &[ArrayRef], rows: usize) -> Result<()> {
        hash_keys(columns, rows, &mut self.hashes)?;
        let new = self.index.intern(columns, &self.hashes, &mut self.slots)?;
        self.keys.resize_with(self.keys.len() + new, Key::default);
        self.finals.add(&self.calls, new);
        if self.spec.want_latest {
            self.latest.add(&self.calls, new);
        }
        let Some(closing) = self.spec.closing.filter(|_| new > 0) else { return Ok(()) };
        let times = closing::closing_times(closing, columns)?;
        let mut next = (self.keys.len() - new) as u32;
        for (slot, time) in self.slots.iter().zip(times) {
            // New keys got their slots in the order of their first rows.
            if *slot == next {
                self.closings.push(Reverse((time, next)));
                next += 1;
            }
        }
        Ok(())
    }

    fn insert(&mut self, slot: u32, entry: Entry) {
        let key = &mut self.keys[slot as usize];
        let at = key.rows.insert(entry);
        if at == key.rows.finals() {
            self.pending.push(entry.time, slot);
        }
        if !self.spec.want_latest {
            return;
        }
        if self.touched.last() != Some(&slot) {
            self.touched.push(slot);
        }
        let mut cursor = self.latest.at(slot);
        for (call, cell) in self.calls.iter().zip(&mut *cursor.cells) {
            if call.frame == Frame::Unbounded {
                cell.add(call, &self.chunks, &entry);
            }
        }
        cursor.enter(at, &self.sliding, &self.calls, &self.chunks, &entry);
    }

    /// Finalises the rows of a key below the watermark.
    fn finalise(&mut self, slot: u32, entries: &mut Vec<Entry>, results: &mut [Vec<Option<Value>>]) {
        let key = &mut self.keys[slot as usize];
        let mut cursor = self.finals.at(slot);
        let (first, end) = (key.rows.finals(), key.rows.len());
        let mut at = first;
        while at < end && key.rows.get(at).time < self.watermark {
            let time = key.rows.get(at).time;
            let start = at;
            while at < end && key.rows.get(at).time == time {
                for (call, cell) in self.calls.iter().zip(&mut *cursor.cells) {
                    cell.add(call, &self.chunks, key.rows.get(at));
                }
                at += 1;
            }
            for (frame_at, frame) in self.sliding.iter().enumerate() {
                cursor.slide(frame_at, frame, &self.calls, &key.rows, &self.chunks, time);
            }
            if self.spec.want_final {
                entries.extend((start..at).map(|row| *key.rows.get(row)));
                for (call, (cell, column)) in
                    self.calls.iter().zip(cursor.cells.iter().zip(results.iter_mut()))
                {
                    match call.function {
                        // Rows of equal time are numbered in the total order.
                        Function::RowNumber => column.extend(cell.numbers(at - start)),
                        _ => column.extend(std::iter::repeat_n(cell.result(call), at - start)),
                    }
                }
            }
        }
        if at == first {
            return;
        }
        key.rows.finalise(at - first);
        self.pending_rows -= (at - first) as u64;
        self.tally.settled += (at - first) as u64;
        if !std::mem::replace(&mut key.dirty, true) {
            self.dirty.push(slot);
        }
        if let Some(next) = key.rows.first_pending() {
            self.pending.push(next.time, slot);
        }
        if !self.spec.want_final {
            (first..at).for_each(|row| self.chunks.emitted(key.rows.get(row)));
        }
        if !std::mem::replace(&mut key.queued_for_eviction, true) {
            self.evictions.push(key.rows.get(0).time, slot);
        }
    }

    fn flush(
        &mut self,
        entries: &mut Vec<Entry>,
        results: &mut [Vec<Option<Value>>],
        out: &mut Vec<ChangeBatch>,
    ) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        out.push(self.emit(entries, results)?);
        entries.drain(..).for_each(|entry| self.chunks.emitted(&entry));
        results.iter_mut().for_each(Vec::clear);
        Ok(())
    }

    /// Input rows of the entries with the calls' results behind them.
    fn emit(&self, entries: &[Entry], results: &[Vec<Option<Value>>]) -> Result<ChangeBatch> {
        let input = self.chunks.rows(&self.spec.input, entries)?;
        let mut columns = input.rows.columns().to_vec();
        for (call, results) in self.calls.iter().zip(results) {
            columns.push(call.column(results)?);
        }
        Ok(input.with_rows(RecordBatch::try_new(Arc::clone(&self.output), columns)?))
    }

    /// Lets go of final rows that no frame needs.
    fn evict(&mut self) {
        let horizon = self.horizon();
        let mut due = std::mem::take(&mut self.due);
        self.evictions.take_before(horizon, &mut due);
        for slot in &due {
            let key = &mut self.keys[*slot as usize];
            key.queued_for_eviction = false;
            while let Some(entry) = key.rows.pop_before(horizon) {
                self.finals.at(*slot).forget(&self.sliding, &self.calls, &self.chunks, &entry);
                if self.spec.want_latest {
                    self.latest.at(*slot).forget(&self.sliding, &self.calls, &self.chunks, &entry);
                }
                self.chunks.release(&entry);
            }
            if key.rows.finals() > 0 {
                key.queued_for_eviction = true;
                self.evictions.push(key.rows.get(0).time, *slot);
            }
        }
        self.due = due;
    }
}
