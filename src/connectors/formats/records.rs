//! Raw records of any source → one batch: rows that decode, dead letters of the others.

use std::sync::Arc;

use arrow::array::{BinaryBuilder, Int32Array, Int64Array, Int64Builder};
use arrow::datatypes::SchemaRef;

use super::json_decode::JsonDecoder;
use super::{OnError, RecordError};
use crate::connectors::SourceBatch;
use crate::error::{Error, Result};
use crate::stream::{DeadLetter, Place, Positions, Stage};

/// A record as it came.
#[derive(Debug, Clone, Copy)]
pub struct Raw<'a> {
    pub partition: i32,
    pub offset: i64,
    /// ms since the epoch, if the record has a time.
    pub timestamp: Option<i64>,
    pub key: Option<&'a [u8]>,
    pub payload: &'a [u8],
}

/// What is done with records, the same for all of a source.
#[derive(Debug, Clone)]
pub struct Intent {
    /// Of the source.
    pub name: Arc<str>,
    /// Topic or location.
    pub topic: Arc<str>,
    pub on_error: OnError,
    pub keep_key: bool,
    pub keep_payload: bool,
}

/// What a poll has collected so far.
pub struct Records {
    intent: Intent,
    decoder: JsonDecoder,
    partition: Vec<i32>,
    offset: Vec<i64>,
    timestamp: Int64Builder,
    key: Option<BinaryBuilder>,
    payload: Option<BinaryBuilder>,
    dead: Vec<DeadLetter>,
    skipped: u64,
    pub tombstones: u64,
    pub missing_offsets: u64,
}

impl Records {
    /// # Errors
    /// User: a column of `schema` cannot be filled from JSON.
    pub fn new(schema: SchemaRef, intent: Intent) -> Result<Self> {
        Ok(Self {
            decoder: JsonDecoder::new(schema)?,
            partition: Vec::new(),
            offset: Vec::new(),
            timestamp: Int64Builder::new(),
            key: intent.keep_key.then(BinaryBuilder::new),
            payload: intent.keep_payload.then(BinaryBuilder::new),
            dead: Vec::new(),
            skipped: 0,
            tombstones: 0,
            missing_offsets: 0,
            intent,
        })
    }

    /// Rows and dead letters since the last batch.
    pub fn len(&self) -> usize {
        self.offset.len() + self.dead.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes a record in.
    ///
    /// # Errors
    /// External: it is no row, and the source has `on_error = 'fail'`.
    #[inline]
    pub fn push(&mut self, record: Raw<'_>) -> Result<()> {
        if let Err(fault) = self.decoder.push(record.payload) {
            return self.refuse(record, fault);
        }
        self.partition.push(record.partition);
        self.offset.push(record.offset);
        self.timestamp.append_option(record.timestamp);
        if let Some(keys) = &mut self.key {
            keys.append_option(record.key);
        }
        if let Some(payloads) = &mut self.payload {
            payloads.append_value(record.payload);
        }
        Ok(())
    }

    #[cold]
    fn refuse(&mut self, record: Raw<'_>, fault: RecordError) -> Result<()> {
        let topic = &self.intent.topic;
        match self.intent.on_error {
            OnError::Skip => self.skipped += 1,
            OnError::Fail => {
                let message = format!(
                    "topic {topic}, partition {}, offset {}: the record is no row ({}): {}",
                    record.partition, record.offset, fault.kind, fault.message
                );
                return Err(Error::external(message).hint(
                    "With on_error = 'dead_letter' such records are kept aside and the pipeline goes on.",
                ));
            }
            OnError::DeadLetter => self.dead.push(DeadLetter {
                stage: Stage::Decode,
                at: Arc::clone(&self.intent.name),
                topic: Arc::clone(topic),
                partition: record.partition,
                offset: record.offset,
                timestamp_ms: record.timestamp,
                key: record.key.map(<[u8]>::to_vec),
                payload: Some(record.payload.to_vec()),
                headers: None,
                error: fault.message,
                kind: fault.kind,
            }),
        }
        Ok(())
    }

    /// The batch; the next one begins with room for as many.
    ///
    /// # Errors
    /// Internal only.
    pub fn finish(&mut self, reached: Positions, at_end: Vec<Place>) -> Result<SourceBatch> {
        let rows = self.decoder.finish()?;
        let room = rows.num_rows();
        Ok(SourceBatch {
            rows,
            partition: Int32Array::from(std::mem::replace(&mut self.partition, Vec::with_capacity(room))),
            offset: Int64Array::from(std::mem::replace(&mut self.offset, Vec::with_capacity(room))),
            timestamp: self.timestamp.finish(),
            key: self.key.as_mut().map(BinaryBuilder::finish),
            payload: self.payload.as_mut().map(BinaryBuilder::finish),
            dead: std::mem::take(&mut self.dead),
            tombstones: std::mem::take(&mut self.tombstones),
            skipped: std::mem::take(&mut self.skipped),
            reached,
            at_end,
            missing_offsets: std::mem::take(&mut self.missing_offsets),
        })
    }
}
