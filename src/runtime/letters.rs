//! The late ledger and dead letters as Parquet segments.

use std::sync::Arc;

use arrow::array::{BinaryArray, Int32Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;

use crate::error::Result;
use crate::stream::{ChangeBatch, DeadLetter, Place, Stage};

/// The dead letter of a row that came out of a record: the record itself is found in the topic and its backup.
pub fn of_row(
    stage: Stage,
    at: &Arc<str>,
    kind: &'static str,
    topics: &[Arc<str>],
    batch: &ChangeBatch,
    row: usize,
    error: String,
) -> DeadLetter {
    let (_, place, offset) = batch.origin.key(row);
    let place = Place(place);
    DeadLetter {
        stage,
        at: Arc::clone(at),
        topic: topics.get(usize::from(place.topic())).cloned().unwrap_or_else(|| "".into()),
        partition: place.partition(),
        offset,
        timestamp_ms: None,
        key: None,
        payload: None,
        error,
        kind,
    }
}

/// `topic, partition, offset` of late rows; `None` when there are none.
///
/// # Errors
/// Internal only.
pub fn ledger(topics: &[Arc<str>], late: &[(u16, i32, i64)]) -> Result<Option<RecordBatch>> {
    if late.is_empty() {
        return Ok(None);
    }
    let topic = |at: u16| topics.get(usize::from(at)).map_or("", |topic| topic);
    let schema = Schema::new(vec![
        Field::new("topic", DataType::Utf8, false),
        Field::new("partition", DataType::Int32, false),
        Field::new("offset", DataType::Int64, false),
    ]);
    Ok(Some(RecordBatch::try_new(
        Arc::new(schema),
        vec![
            Arc::new(StringArray::from_iter_values(late.iter().map(|(t, _, _)| topic(*t)))),
            Arc::new(Int32Array::from_iter_values(late.iter().map(|(_, p, _)| *p))),
            Arc::new(Int64Array::from_iter_values(late.iter().map(|(_, _, o)| *o))),
        ],
    )?))
}

/// Dead letters with payload, key and place; `None` when there are none.
///
/// # Errors
/// Internal only.
pub fn dead_letters(dead: &[DeadLetter]) -> Result<Option<RecordBatch>> {
    if dead.is_empty() {
        return Ok(None);
    }
    let text = |name: &str| Field::new(name, DataType::Utf8, false);
    let schema = Schema::new(vec![
        text("stage"),
        text("at"),
        text("kind"),
        text("error"),
        text("topic"),
        Field::new("partition", DataType::Int32, false),
        Field::new("offset", DataType::Int64, false),
        Field::new("timestamp_ms", DataType::Int64, true),
        Field::new("key", DataType::Binary, true),
        Field::new("payload", DataType::Binary, true),
    ]);
    let words = |of: fn(&DeadLetter) -> &str| Arc::new(StringArray::from_iter_values(dead.iter().map(of)));
    Ok(Some(RecordBatch::try_new(
        Arc::new(schema),
        vec![
            words(|d| d.stage.as_str()),
            words(|d| &d.at),
            words(|d| d.kind),
            words(|d| &d.error),
            words(|d| &d.topic),
            Arc::new(Int32Array::from_iter_values(dead.iter().map(|d| d.partition))),
            Arc::new(Int64Array::from_iter_values(dead.iter().map(|d| d.offset))),
            Arc::new(dead.iter().map(|d| d.timestamp_ms).collect::<Int64Array>()),
            Arc::new(dead.iter().map(|d| d.key.as_deref()).collect::<BinaryArray>()),
            Arc::new(dead.iter().map(|d| d.payload.as_deref()).collect::<BinaryArray>()),
        ],
    )?))
}

/// A batch as one Parquet file.
///
/// # Errors
/// Internal only.
pub fn parquet(batch: &RecordBatch) -> Result<Bytes> {
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), None)?;
    writer.write(batch)?;
    Ok(Bytes::from(writer.into_inner()?))
}
