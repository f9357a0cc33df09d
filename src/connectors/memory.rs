//! An online store in memory, with the meaning of the Redis sink: fence, flush numbers, consumed offsets, expiry.
//!
//! `dev` uses it when no Redis answers, tests use it as the model. It is emptied when the process ends; `dev` keeps
//! it by writing [`MemoryStore::snapshot`] to the state folder and giving it back to [`MemoryStore::load`].
//! Rows with a NULL in a key column are left out, as in Redis.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use arrow::array::{Array, ArrayRef, Int64Array, RecordBatch};
use arrow::compute::interleave_record_batch;
use arrow::datatypes::SchemaRef;
use arrow::row::{RowConverter, Rows, SortField};
use async_trait::async_trait;

use super::{Flushed, OnlineState, OnlineStore, OnlineWrite};
use crate::error::{Error, Result};
use crate::stream::Positions;
use crate::stream::clock::Clock;

/// Dead rows below which the chunks are not rewritten, and the number of chunks above which they are.
const SMALL: usize = 8_192;
const MAX_CHUNKS: usize = 256;

/// Rows per key, guarded by a fence.
#[derive(Debug)]
pub struct MemoryStore {
    schema: SchemaRef,
    key_columns: Vec<usize>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    fence: u64,
    consumed: Positions,
    /// (generation, number) of the last flush per shard.
    flushes: HashMap<u32, (u64, u64)>,
    converter: RowConverter,
    rows: HashMap<Box<[u8]>, Stored>,
    chunks: Vec<RecordBatch>,
}

#[derive(Debug, Clone, Copy)]
struct Stored {
    chunk: u32,
    row: u32,
    expire_at_ms: i64,
}

impl MemoryStore {
    /// # Errors
    /// User: a key column of a type that cannot be a key.
    pub fn new(schema: SchemaRef, key_columns: Vec<usize>) -> Result<Self> {
        let fields =
            key_columns.iter().map(|&column| SortField::new(schema.field(column).data_type().clone()));
        let converter = RowConverter::new(fields.collect())
            .map_err(|error| Error::user("a key column has a type that cannot be a key").because(error))?;
        let inner = Inner {
            fence: 0,
            consumed: Positions::default(),
            flushes: HashMap::new(),
            converter,
            rows: HashMap::new(),
            chunks: Vec::new(),
        };
        Ok(Self { schema, key_columns, inner: Mutex::new(inner) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keys held, those that have expired but were not yet dropped included.
    pub fn len(&self) -> usize {
        self.lock().rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets everything, the fence too, as `FLUSHALL` does.
    pub fn clear(&self) {
        let mut inner = self.lock();
        inner.fence = 0;
        inner.consumed = Positions::default();
        inner.flushes.clear();
        inner.rows.clear();
        inner.chunks.clear();
    }

    /// The rows that have not expired and when each expires (ms since the epoch, `i64::MAX`: never), in no
    /// particular order; `None` when there are none.
    ///
    /// # Errors
    /// Internal, from arrow.
    pub fn snapshot(&self) -> Result<Option<(RecordBatch, Int64Array)>> {
        let mut inner = self.lock();
        inner.drop_expired(Clock.unix_millis());
        if inner.rows.is_empty() {
            return Ok(None);
        }
        let stored: Vec<Stored> = inner.rows.values().copied().collect();
        let expiry: Int64Array = stored.iter().map(|at| at.expire_at_ms).collect::<Vec<i64>>().into();
        Ok(Some((inner.gather(stored.into_iter())?, expiry)))
    }

    /// Puts rows, as [`MemoryStore::snapshot`] gave them, without any guard.
    ///
    /// # Errors
    /// Internal, from arrow.
    pub fn load(&self, rows: RecordBatch, expire_at_ms: Int64Array) -> Result<()> {
        let write = OnlineWrite { rows, expire_at_ms: Some(expire_at_ms), deletes: None };
        self.lock().write(&write, &self.key_columns, Clock.unix_millis())
    }
}

impl Inner {
    fn keys(&self, rows: &RecordBatch, key_columns: &[usize]) -> Result<(Rows, Vec<ArrayRef>)> {
        let columns: Vec<ArrayRef> = key_columns.iter().map(|&column| rows.column(column).clone()).collect();
        let keys = self.converter.convert_columns(&columns)?;
        Ok((keys, columns.into_iter().filter(|column| column.logical_null_count() > 0).collect()))
    }

    fn write(&mut self, write: &OnlineWrite, key_columns: &[usize], now_ms: i64) -> Result<()> {
        let chunk = self.chunks.len() as u32;
        let (keys, nullable) = self.keys(&write.rows, key_columns)?;
        for row in 0..write.rows.num_rows() {
            if nullable.iter().any(|column| column.is_null(row)) {
                continue;
            }
            let expiry = write.expire_at_ms.as_ref().filter(|expiry| expiry.is_valid(row));
            let expire_at_ms = expiry.map_or(i64::MAX, |expiry| expiry.value(row));
            let key = keys.row(row);
            let key = key.as_ref();
            let stored = Stored { chunk, row: row as u32, expire_at_ms };
            if expire_at_ms <= now_ms {
                self.rows.remove(key);
            } else if let Some(old) = self.rows.get_mut(key) {
                *old = stored;
            } else {
                self.rows.insert(key.into(), stored);
            }
        }
        self.chunks.push(write.rows.clone());
        if let Some(deletes) = &write.deletes {
            let (keys, _) = self.keys(deletes, key_columns)?;
            for row in 0..deletes.num_rows() {
                self.rows.remove(keys.row(row).as_ref());
            }
        }
        self.compact(now_ms)
    }

    fn compact(&mut self, now_ms: i64) -> Result<()> {
        let held: usize = self.chunks.iter().map(RecordBatch::num_rows).sum();
        if held <= 2 * self.rows.len() + SMALL && self.chunks.len() <= MAX_CHUNKS {
            return Ok(());
        }
        self.drop_expired(now_ms);
        let live = if self.rows.is_empty() { None } else { Some(self.gather(self.rows.values().copied())?) };
        // The same map in the same order: nothing was put or removed in between.
        for (row, stored) in self.rows.values_mut().enumerate() {
            (stored.chunk, stored.row) = (0, row as u32);
        }
        self.chunks = live.into_iter().collect();
        Ok(())
    }

    fn drop_expired(&mut self, now_ms: i64) {
        self.rows.retain(|_, stored| stored.expire_at_ms > now_ms);
    }

    fn gather(&self, stored: impl Iterator<Item = Stored>) -> Result<RecordBatch> {
        let indices: Vec<(usize, usize)> = stored.map(|at| (at.chunk as usize, at.row as usize)).collect();
        let batches: Vec<&RecordBatch> = self.chunks.iter().collect();
        Ok(interleave_record_batch(&batches, &indices)?)
    }
}

#[async_trait]
impl OnlineStore for MemoryStore {
    async fn open(&self) -> Result<OnlineState> {
        let inner = self.lock();
        let flushed = inner.flushes.iter().map(|(shard, flush)| (*shard, *flush)).collect();
        Ok(OnlineState { fence: inner.fence, consumed: inner.consumed.clone(), flushed })
    }

    async fn raise_fence(&self, generation: u64) -> Result<u64> {
        let mut inner = self.lock();
        inner.fence = inner.fence.max(generation);
        Ok(inner.fence)
    }

    async fn flush(
        &self,
        generation: u64,
        shard: u32,
        number: u64,
        write: &OnlineWrite,
        consumed: &Positions,
    ) -> Result<Flushed> {
        if write.rows.num_columns() != self.schema.fields().len() {
            return Err(Error::internal("a flush has other columns than its memory sink"));
        }
        let mut inner = self.lock();
        if inner.fence > generation {
            return Ok(Flushed::Fenced { by: inner.fence });
        }
        if inner.fence < generation {
            return Ok(Flushed::FenceLost);
        }
        if inner.flushes.get(&shard).is_some_and(|&last| last >= (generation, number)) {
            return Ok(Flushed::Stale);
        }
        inner.write(write, &self.key_columns, Clock.unix_millis())?;
        inner.flushes.insert(shard, (generation, number));
        inner.consumed.raise_all(consumed);
        Ok(Flushed::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::Place;
    use arrow::array::AsArray;
    use arrow::datatypes::{DataType, Field, Int64Type, Schema};
    use std::collections::BTreeMap;
    use std::sync::Arc;

    fn rows(schema: &SchemaRef, values: &[(Option<i64>, i64)]) -> RecordBatch {
        let keys: Int64Array = values.iter().map(|(key, _)| *key).collect();
        let values: Int64Array = values.iter().map(|(_, value)| Some(*value)).collect();
        RecordBatch::try_new(schema.clone(), vec![Arc::new(keys), Arc::new(values)]).unwrap()
    }

    fn store() -> (SchemaRef, MemoryStore) {
        let schema: SchemaRef = Arc::new(Schema::new(vec![
            Field::new("k", DataType::Int64, true),
            Field::new("v", DataType::Int64, true),
        ]));
        (schema.clone(), MemoryStore::new(schema, vec![0]).unwrap())
    }

    fn content(store: &MemoryStore) -> BTreeMap<i64, i64> {
        let Some((batch, _)) = store.snapshot().unwrap() else { return BTreeMap::new() };
        let column = |index: usize| batch.column(index).as_primitive::<Int64Type>().values().to_vec();
        column(0).into_iter().zip(column(1)).collect()
    }

    fn put(rows: RecordBatch) -> OnlineWrite {
        OnlineWrite { rows, expire_at_ms: None, deletes: None }
    }

    #[tokio::test]
    async fn guards_as_redis_does() {
        let (schema, store) = store();
        let write = |value| put(rows(&schema, &[(Some(1), value), (None, 9)]));
        let at = |offset| Positions::from_iter([(Place::new(0, 0, 3), offset)]);
        assert_eq!(store.flush(1, 0, 1, &write(1), &at(5)).await.unwrap(), Flushed::FenceLost);
        assert_eq!(store.raise_fence(2).await.unwrap(), 2);
        assert_eq!(store.raise_fence(1).await.unwrap(), 2);
        assert_eq!(store.flush(1, 0, 1, &write(1), &at(5)).await.unwrap(), Flushed::Fenced { by: 2 });
        assert_eq!(content(&store), BTreeMap::new());
        assert_eq!(store.flush(2, 0, 7, &write(2), &at(5)).await.unwrap(), Flushed::Done);
        assert_eq!(store.flush(2, 0, 7, &write(3), &at(9)).await.unwrap(), Flushed::Stale);
        assert_eq!(store.flush(2, 1, 1, &write(4), &at(4)).await.unwrap(), Flushed::Done);
        assert_eq!(content(&store), BTreeMap::from([(1, 4)]));
        assert_eq!(store.open().await.unwrap().consumed, at(5));
        store.raise_fence(3).await.unwrap();
        assert_eq!(store.flush(3, 0, 1, &write(5), &at(6)).await.unwrap(), Flushed::Done);
        store.clear();
        assert_eq!(store.flush(3, 0, 2, &write(6), &at(6)).await.unwrap(), Flushed::FenceLost);
        assert!(store.is_empty());
    }

    #[tokio::test]
    async fn expires_deletes_and_compacts() {
        let (schema, store) = store();
        store.raise_fence(1).await.unwrap();
        let none = Positions::default();
        let mut model = BTreeMap::new();
        for number in 1..600_i64 {
            let batch: Vec<_> = (0..50).map(|i| (Some((number * 7 + i) % 300), number * 1_000 + i)).collect();
            model.extend(batch.iter().map(|(key, value)| (key.unwrap_or(-1), *value)));
            let gone = number % 300;
            model.remove(&gone);
            let write = OnlineWrite {
                deletes: Some(rows(&schema, &[(Some(gone), 0)])),
                ..put(rows(&schema, &batch))
            };
            assert_eq!(store.flush(1, 0, number as u64, &write, &none).await.unwrap(), Flushed::Done);
        }
        assert_eq!(content(&store), model);
        assert!(store.lock().chunks.len() <= MAX_CHUNKS + 1);
        let expired = OnlineWrite {
            expire_at_ms: Some(Int64Array::from(vec![1_000, i64::MAX])),
            ..put(rows(&schema, &[(Some(1), 0), (Some(2), 0)]))
        };
        store.flush(1, 0, 10_000, &expired, &none).await.unwrap();
        model.remove(&1);
        model.insert(2, 0);
        assert_eq!(content(&store), model);
        let (batch, expiry) = store.snapshot().unwrap().unwrap();
        let copy = MemoryStore::new(schema, vec![0]).unwrap();
        copy.load(batch, expiry).unwrap();
        assert_eq!(content(&copy), model);
    }
}
