//! Keys that hold a window go once the watermark has closed it (see [`Closing`]): no row of theirs can follow.
//!
//! A closed key is marked; when half of the keys are, the others are numbered anew. So the cost per key is O(log n),
//! and at most as many closed keys are held as open ones.

use std::cmp::Reverse;

use arrow::array::{Array, ArrayRef};
use arrow::datatypes::DataType;

use super::Over;
use crate::error::Result;
use crate::operators::group::Closing;
use crate::state::keys::KeyIndex;
use crate::stream::Micros;

/// Fewer closed keys are not worth a new numbering.
const FEW: usize = if cfg!(test) { 4 } else { 1_024 };

/// When the keys of these columns close, one per row.
pub(super) fn closing_times(closing: Closing, columns: &[ArrayRef]) -> Result<Vec<Micros>> {
    let windows = closing.windows(&columns[closing.key])?;
    Ok(windows.values().iter().map(|start| start.saturating_add(closing.bound)).collect())
}

impl Over {
    /// Marks the keys that the watermark has closed and that no frame needs.
    pub(super) fn close(&mut self) -> Result<()> {
        let longest = self.sliding.iter().map(|frame| frame.micros).max().unwrap_or(0);
        while let Some(Reverse((time, slot))) = self.closings.peek().copied() {
            if time > self.watermark {
                break;
            }
            self.closings.pop();
            let key = &mut self.keys[slot as usize];
            match key.rows.last() {
                // Still in a frame.
                Some(last) => {
                    let gone = last.time.saturating_add(longest).saturating_add(1);
                    self.closings.push(Reverse((gone.max(time.saturating_add(1)), slot)));
                }
                None => {
                    key.closed = true;
                    self.closed += 1;
                }
            }
        }
        if self.closed > FEW && self.closed * 2 > self.keys.len() {
            self.renumber()?;
        }
        Ok(())
    }

    /// Numbers the open keys anew and forgets the others.
    fn renumber(&mut self) -> Result<()> {
        let open: Vec<u32> =
            (0..self.keys.len() as u32).filter(|slot| !self.keys[*slot as usize].closed).collect();
        let columns = self.index.keys(&open)?;
        let hashes: Vec<u64> = open.iter().map(|slot| self.index.hashes()[*slot as usize]).collect();
        let types: Vec<DataType> = columns.iter().map(|column| column.data_type().clone()).collect();
        let mut index = KeyIndex::new(&types)?;
        let mut slots = Vec::new();
        index.intern(&columns, &hashes, &mut slots)?;
        let mut new = vec![u32::MAX; self.keys.len()];
        open.iter().zip(&slots).for_each(|(old, slot)| new[*old as usize] = *slot);
        self.keys.retain(|key| !key.closed);
        self.finals.keep(&open);
        if self.spec.want_latest {
            self.latest.keep(&open);
        }
        self.index = index;
        self.closed = 0;
        let number = |slot: u32| Some(new[slot as usize]).filter(|slot| *slot != u32::MAX);
        self.pending.renumber(number);
        self.evictions.renumber(number);
        let closings = std::mem::take(&mut self.closings).into_iter();
        self.closings = closings
            .filter_map(|Reverse((time, slot))| number(slot).map(|slot| Reverse((time, slot))))
            .collect();
        let dirty = std::mem::take(&mut self.dirty);
        self.dirty = dirty.into_iter().filter_map(number).collect();
        Ok(())
    }
}
