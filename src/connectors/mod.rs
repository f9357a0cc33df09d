//! The outside world: formats, Kafka, object files, Delta, Redis, console.
//!
//! A source is a [`SourceConnector`] that lists its partitions and opens [`SourceReader`]s; a reader is a blocking
//! object that lives on its own thread. Sinks come in three kinds, by what they promise:
//! [`AppendSink`] (at least once: Kafka, console), the Delta writer and committer (exactly once, by epoch; a
//! [`collect::Collector`] in tests), and [`OnlineStore`] (newest value per key, fenced: Redis, memory).

pub mod blackhole;
pub mod collect;
pub mod console;
#[cfg(feature = "delta")]
pub mod delta;
pub mod file_source;
pub mod files;
pub mod formats;
pub mod generator;
#[cfg(feature = "kafka")]
pub mod kafka;
pub mod memory;
pub mod ndjson;
pub mod partition;
pub mod patient;
pub mod records;
#[cfg(feature = "redis")]
pub mod redis;
pub mod reference;
pub mod sandbox;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{Int32Array, Int64Array, RecordBatch};
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;

use crate::error::{Error, Result};
use crate::stream::{ChangeBatch, DeadLetter, Micros, Place, Positions};

/// What is known of a partition before it is read. Offsets: `low` is the first still held, `high` the next to come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionInfo {
    pub topic: u16,
    pub partition: i32,
    pub low: i64,
    pub high: i64,
}

/// Rows of one poll, in reading order; several partitions may be mixed. All arrays have one value per row.
#[derive(Debug, Clone)]
pub struct SourceBatch {
    /// The declared physical columns (no computed ones), in declaration order.
    pub rows: RecordBatch,
    pub partition: Int32Array,
    pub offset: Int64Array,
    /// The record's own timestamp, ms since the epoch; null when it has none.
    pub timestamp: Int64Array,
    /// The record key, only filled when the source was asked for it.
    pub key: Option<arrow::array::BinaryArray>,
    /// Raw payloads, only filled when the source was asked for them (to dead-letter rows that fail later).
    pub payload: Option<arrow::array::BinaryArray>,
    /// Records that could not be decoded.
    pub dead: Vec<DeadLetter>,
    /// Records with an empty value, counted.
    pub tombstones: u64,
    /// Dropped by `on_error = 'skip'`.
    pub skipped: u64,
    /// Next offset to read per place touched by this poll (control records, tombstones and dead letters counted).
    pub reached: Positions,
    /// Partitions whose end was reached by this poll.
    pub at_end: Vec<Place>,
    /// Offsets that the broker did not hand out although they lie between two reads (compaction, transactions).
    pub missing_offsets: u64,
}

/// Opens readers on a source. Cheap to make; touches the outside world only in its async methods.
#[async_trait]
pub trait SourceConnector: Send + Sync {
    /// Topic names in the order whose index is `Place::topic`.
    fn topics(&self) -> Vec<Arc<str>>;

    /// Schema of `SourceBatch::rows`.
    fn schema(&self) -> SchemaRef;

    /// # Errors
    /// External: broker not reachable within its time-out, topic does not exist (with the hint how to make it).
    async fn partitions(&self) -> Result<Vec<PartitionInfo>>;

    /// What this source has and another one that took its place under the same name has not; `None`: nothing is known.
    async fn identity(&self) -> Option<String> {
        None
    }

    /// Offsets where a pipeline without stored positions begins, by `scan_startup`.
    async fn start_positions(&self, partitions: &[PartitionInfo]) -> Result<Positions>;

    /// How often to look for partitions that were added; `None`: there can be none.
    fn discovery(&self) -> Option<Duration> {
        None
    }

    /// A reader of exactly these places, each from its next offset.
    ///
    /// # Errors
    /// External: a position below the broker's low watermark (a gap), with partition and both offsets.
    async fn reader(&self, assigned: Positions) -> Result<Box<dyn SourceReader>>;
}

/// Reads some partitions. Lives on one thread of its own; may block.
pub trait SourceReader: Send {
    /// Waits at most `linger` for rows; returns at most `max_rows`. `None`: nothing arrived.
    ///
    /// # Errors
    /// Only what the reader cannot ride out: bad records are in `SourceBatch::dead`, lost connections are retried.
    fn poll(&mut self, max_rows: usize, linger: Duration) -> Result<Option<SourceBatch>>;

    /// Reads one more place from its next offset on, as [`SourceConnector::reader`] does.
    ///
    /// # Errors
    /// External: a position that is not there. Internal: the connector has no [`SourceConnector::discovery`].
    fn add(&mut self, _place: Place, _next: i64) -> Result<()> {
        Err(Error::internal("this source cannot take partitions in while it runs"))
    }

    /// Leaves exactly these places unread until the next call. A source of one partition need not: it is never ahead.
    ///
    /// # Errors
    /// External: the client library refuses.
    fn pause(&mut self, _places: &[Place]) -> Result<()> {
        Ok(())
    }

    /// Whether it reads records as they come: then one that gets none may be replaced by a new reader.
    fn is_live(&self) -> bool {
        true
    }

    /// Tells the outside which offsets are safe (group offsets for lag tools). The truth stays in the manifest.
    fn acknowledge(&mut self, positions: &Positions);

    /// Adds the headers to dead letters of the last poll, where records have some. They are read for bad records only.
    fn add_headers(&self, _letters: &mut [DeadLetter]) {}

    /// Rows between what was read and the newest known end, for the lag display.
    fn lag(&self) -> i64;
}

/// A sink that writes on arrival and promises at-least-once.
#[async_trait]
pub trait AppendSink: Send {
    async fn write(&mut self, batch: &ChangeBatch) -> Result<()>;
    /// Returns when everything written so far is safe, which is before the manifest of `epoch`.
    async fn flush(&mut self, epoch: u64) -> Result<()>;
}

/// What an online store holds of a pipeline's sink when it is opened.
#[derive(Debug, Clone, Default)]
pub struct OnlineState {
    /// Newest generation that raised the fence; 0 when there is none.
    pub fence: u64,
    /// Consumed offset per place, as raised by flushes.
    pub consumed: Positions,
    /// By shard, the newest flush: (generation, number).
    pub flushed: BTreeMap<u32, (u64, u64)>,
}

/// What became of a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flushed {
    /// Written.
    Done,
    /// A newer flush of the same shard came first; nothing was written.
    Stale,
    /// The fence is missing or lower than ours: the store was emptied or restored. Nothing was written.
    FenceLost,
    /// A newer generation owns the store. Nothing was written.
    Fenced { by: u64 },
}

/// Newest values to put and keys to delete in one flush.
#[derive(Debug, Clone)]
pub struct OnlineWrite {
    /// One row per distinct key, key columns included.
    pub rows: RecordBatch,
    /// When each row expires (event time + ttl), ms since the epoch; `None`: never.
    pub expire_at_ms: Option<Int64Array>,
    /// Rows (same schema, only key columns count) whose keys are deleted.
    pub deletes: Option<RecordBatch>,
}

/// A store of the newest row per key, guarded by a fence (DESIGN §5 *Redis*).
///
/// # Constraints
/// `open` first; `raise_fence` before the first `flush`; flush numbers of one shard rise.
#[async_trait]
pub trait OnlineStore: Send + Sync {
    async fn open(&self) -> Result<OnlineState>;

    /// Sets the fence to `generation` unless it is already higher; returns the fence after the call.
    async fn raise_fence(&self, generation: u64) -> Result<u64>;

    /// Raises `consumed`, then writes: all or nothing per script call of up to 1,000 keys, in order. Whatever becomes of
    /// the flush, no row is shown beyond the positions that the store holds.
    ///
    /// # Errors
    /// What may pass, and [lasting](crate::error::Error::is_lasting) ones: the store refuses the user.
    async fn flush(
        &self,
        generation: u64,
        shard: u32,
        number: u64,
        write: &OnlineWrite,
        consumed: &Positions,
    ) -> Result<Flushed>;
}

/// µs of a row that never expires.
pub const NEVER: Micros = Micros::MAX;
