//! Key → dense slot, for [`super::Newest`]. In memory only: neither the key bytes nor the hash may be stored.

use arrow::array::{Array, ArrayRef};
use arrow::datatypes::DataType;
use arrow::row::{RowConverter, Rows, SortField};
use hashbrown::{DefaultHashBuilder, HashTable};
use std::hash::BuildHasher;

use crate::error::{Error, Result};

/// The slot of a row whose key has a NULL.
pub(super) const NO_SLOT: u32 = u32::MAX;

/// Bytes of dropped keys that are never worth a rewrite.
const SMALL: usize = 64 * 1024;

#[derive(Debug)]
pub(super) struct Keys {
    converter: RowConverter,
    rows: Rows,
    hasher: DefaultHashBuilder,
    table: HashTable<u32>,
    /// Encoded keys end to end; `spans` says where each slot's key is (start, length).
    bytes: Vec<u8>,
    spans: Vec<(usize, u32)>,
    free: Vec<u32>,
    garbage: usize,
}

impl Keys {
    pub(super) fn new<'a>(types: impl Iterator<Item = &'a DataType>) -> Result<Self> {
        let fields = types.map(|data_type| SortField::new(data_type.clone())).collect();
        let converter = RowConverter::new(fields)
            .map_err(|error| Error::user("a key column has a type that cannot be a key").because(error))?;
        Ok(Self {
            rows: converter.empty_rows(0, 0),
            converter,
            hasher: DefaultHashBuilder::default(),
            table: HashTable::new(),
            bytes: Vec::new(),
            spans: Vec::new(),
            free: Vec::new(),
            garbage: 0,
        })
    }

    /// One more than the largest slot ever given out.
    pub(super) fn slot_count(&self) -> usize {
        self.spans.len()
    }

    /// Keys held.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// The slot of each row's key in `slots` (cleared first), new keys included; [`NO_SLOT`] for a key with a NULL.
    /// Returns the number of those.
    pub(super) fn intern(&mut self, columns: &[ArrayRef], slots: &mut Vec<u32>) -> Result<usize> {
        slots.clear();
        self.rows.clear();
        self.converter.append(&mut self.rows, columns)?;
        let nullable: Vec<&ArrayRef> =
            columns.iter().filter(|column| column.logical_null_count() > 0).collect();
        let mut nulls = 0;
        for row in 0..self.rows.num_rows() {
            if nullable.iter().any(|column| column.is_null(row)) {
                nulls += 1;
                slots.push(NO_SLOT);
                continue;
            }
            let key = self.rows.row(row);
            let key = key.as_ref();
            let hash = self.hasher.hash_one(key);
            let found = self.table.find(hash, |&slot| bytes_of(&self.bytes, &self.spans, slot) == key);
            if let Some(&slot) = found {
                slots.push(slot);
                continue;
            }
            let span = (self.bytes.len(), key.len() as u32);
            self.bytes.extend_from_slice(key);
            let slot = match self.free.pop() {
                Some(slot) => {
                    self.spans[slot as usize] = span;
                    slot
                }
                None => {
                    self.spans.push(span);
                    (self.spans.len() - 1) as u32
                }
            };
            let (bytes, spans, hasher) = (&self.bytes, &self.spans, &self.hasher);
            self.table.insert_unique(hash, slot, |&slot| hasher.hash_one(bytes_of(bytes, spans, slot)));
            slots.push(slot);
        }
        Ok(nulls)
    }

    /// Forgets a key; its slot will be given out again. Nothing happens when the slot has no key.
    pub(super) fn remove(&mut self, slot: u32) {
        let hash = self.hasher.hash_one(bytes_of(&self.bytes, &self.spans, slot));
        if let Ok(entry) = self.table.find_entry(hash, |&other| other == slot) {
            entry.remove();
            self.free.push(slot);
            self.garbage += self.spans[slot as usize].1 as usize;
            self.spans[slot as usize].1 = 0;
            if self.garbage > SMALL && self.garbage * 2 > self.bytes.len() {
                self.compact();
            }
        }
    }

    fn compact(&mut self) {
        let mut bytes = Vec::with_capacity(self.bytes.len() - self.garbage);
        for span in &mut self.spans {
            let start = bytes.len();
            bytes.extend_from_slice(&self.bytes[span.0..span.0 + span.1 as usize]);
            span.0 = start;
        }
        self.bytes = bytes;
        self.garbage = 0;
    }
}

fn bytes_of<'a>(bytes: &'a [u8], spans: &[(usize, u32)], slot: u32) -> &'a [u8] {
    let (start, length) = spans[slot as usize];
    &bytes[start..start + length as usize]
}
