//! Cursors over the ordered rows of keys: one cell per call, and per sliding frame the index of its first row.
//!
//! The cursors of all keys lie in two arrays, by slot: a key of their own allocations cost two cache misses more per row.

use super::Sliding;
use super::cells::{Call, Cell};
use super::rows::{Chunks, Entry, KeyRows};
use crate::stream::Micros;

#[derive(Debug, Default)]
pub struct Cursors {
    calls: usize,
    frames: usize,
    cells: Vec<Cell>,
    left: Vec<u32>,
}

/// The cursor of a key.
pub struct Cursor<'a> {
    pub cells: &'a mut [Cell],
    left: &'a mut [u32],
}

impl Cursors {
    pub fn new(calls: usize, frames: usize) -> Self {
        Self { calls, frames, cells: Vec::new(), left: Vec::new() }
    }

    /// Cursors at the start of `keys` more keys.
    pub fn add(&mut self, calls: &[Call], keys: usize) {
        for _ in 0..keys {
            self.cells.extend(calls.iter().map(Cell::new));
        }
        self.left.resize(self.left.len() + keys * self.frames, 0);
    }

    pub fn at(&mut self, slot: u32) -> Cursor<'_> {
        let slot = slot as usize;
        Cursor {
            cells: &mut self.cells[slot * self.calls..][..self.calls],
            left: &mut self.left[slot * self.frames..][..self.frames],
        }
    }

    /// No key has cursors here.
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// Reads what a cursor needs ([`crate::operators::ahead`]).
    #[inline]
    pub fn glance(&self, slot: usize) -> usize {
        let cells = self.cells[slot * self.calls..][..self.calls].iter();
        cells.fold(self.start(slot), |seen, cell| seen ^ cell.glance())
    }

    /// Where the first frame of a slot begins, by its index among the rows.
    #[inline]
    pub fn start(&self, slot: usize) -> usize {
        self.left.get(slot * self.frames).map_or(0, |left| *left as usize)
    }

    pub fn cell(&self, slot: u32, call: usize) -> &Cell {
        &self.cells[slot as usize * self.calls + call]
    }

    /// Keeps the cursors of these slots, which ascend, in their order.
    pub fn keep(&mut self, slots: &[u32]) {
        for (new, old) in slots.iter().enumerate() {
            let old = *old as usize;
            for call in 0..self.calls {
                self.cells.swap(new * self.calls + call, old * self.calls + call);
            }
            for frame in 0..self.frames {
                self.left.swap(new * self.frames + frame, old * self.frames + frame);
            }
        }
        self.cells.truncate(slots.len() * self.calls);
        self.left.truncate(slots.len() * self.frames);
    }
}

impl Cursor<'_> {
    /// Moves the start of frame `at` up for a row at `time`.
    pub fn slide(
        &mut self,
        at: usize,
        frame: &Sliding,
        calls: &[Call],
        rows: &KeyRows,
        chunks: &Chunks,
        time: Micros,
    ) {
        let start = time.saturating_sub(frame.micros);
        let mut left = self.left[at] as usize;
        while left < rows.len() && rows.get(left).time < start {
            let entry = rows.get(left);
            for call in &frame.calls {
                self.cells[*call].remove(&calls[*call], chunks, entry);
            }
            left += 1;
        }
        self.left[at] = left as u32;
    }

    /// A row has come in at `at`, not behind the cursor's last one.
    pub fn enter(&mut self, at: usize, sliding: &[Sliding], calls: &[Call], chunks: &Chunks, entry: &Entry) {
        for (frame, left) in sliding.iter().zip(&mut *self.left) {
            if at < *left as usize {
                // Before the frame of the greatest row: not counted, but it moves the frame's start along.
                *left += 1;
                continue;
            }
            for call in &frame.calls {
                self.cells[*call].add(&calls[*call], chunks, entry);
            }
        }
    }

    /// The oldest row of the key is dropped.
    pub fn forget(&mut self, sliding: &[Sliding], calls: &[Call], chunks: &Chunks, entry: &Entry) {
        for (frame, left) in sliding.iter().zip(&mut *self.left) {
            if *left > 0 {
                *left -= 1;
                continue;
            }
            for call in &frame.calls {
                self.cells[*call].remove(&calls[*call], chunks, entry);
            }
        }
    }
}
