//! Dead letters as rows: the relation `dead_letters`, and what lies in the state folder.
//!
//! | column | |
//! |---|---|
//! | `stage` | where the record was refused: `decode`, `future`, `expression`, `lookup` or `sink` |
//! | `at` | name of the source, view or sink that refused it |
//! | `kind` | a short stable name of the fault: `not_json`, `missing_field`, `wrong_type`, `future` … |
//! | `error` | what was wrong, for people |
//! | `topic`, `partition`, `offset` | the record's place |
//! | `timestamp` | the record's own time |
//! | `key`, `payload` | the record's bytes |
//! | `headers` | `[{"key":"…","value":"…"}, …]`; bytes as [`text_of`] has them; NULL when there are none |
//!
//! `timestamp`, `key`, `payload` and `headers` are NULL where the record was no longer at hand when a row of it was refused:
//! above OVER, GROUP BY and look-ups in Redis, by a sink, and of rows that were read from history. The record became a
//! row of the source, which the backup holds under the same place. One record can have several letters, of several views.

use std::borrow::Cow;
use std::fmt::Write;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, BinaryArray, Int32Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, Int32Type, Int64Type, Schema, SchemaRef, TimestampMicrosecondType};
use arrow::error::ArrowError;

use super::{ChangeBatch, DeadLetter, Origin, Place, timestamp_type};

/// The relation's name; no other relation can have it.
pub const NAME: &str = "dead_letters";

/// Rows of one batch at most, and bytes of payloads after which it is full.
const ROWS: usize = 8_192;
const BYTES: usize = 64 << 20;

/// The columns of the relation.
pub fn schema() -> SchemaRef {
    let text = |name: &str| Field::new(name, DataType::Utf8, false);
    Arc::new(Schema::new(vec![
        text("stage"),
        text("at"),
        text("kind"),
        text("error"),
        text("topic"),
        Field::new("partition", DataType::Int32, false),
        Field::new("offset", DataType::Int64, false),
        Field::new("timestamp", timestamp_type(), true),
        Field::new("key", DataType::Binary, true),
        Field::new("payload", DataType::Binary, true),
        Field::new("headers", DataType::Utf8, true),
    ]))
}

/// Dead letters as batches of [`schema`], none of them empty or too large. `topics`: those of the source, in its order.
///
/// # Errors
/// Internal only.
pub fn batches(dead: &[DeadLetter], topics: &[Arc<str>]) -> Result<Vec<ChangeBatch>, ArrowError> {
    let mut batches = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (at, letter) in dead.iter().enumerate() {
        bytes += letter.payload.as_ref().map_or(0, Vec::len);
        let full = at + 1 - start >= ROWS || bytes >= BYTES;
        if full || at + 1 == dead.len() {
            batches.push(batch(&dead[start..=at], topics)?);
            (start, bytes) = (at + 1, 0);
        }
    }
    Ok(batches)
}

fn batch(dead: &[DeadLetter], topics: &[Arc<str>]) -> Result<ChangeBatch, ArrowError> {
    let words = |of: fn(&DeadLetter) -> &str| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(dead.iter().map(of)))
    };
    let micros = |letter: &DeadLetter| letter.timestamp_ms.map(|ms| ms.saturating_mul(1_000));
    let times: TimestampMicrosecondArray = dead.iter().map(micros).collect();
    let offsets = Int64Array::from_iter_values(dead.iter().map(|letter| letter.offset));
    let rows = RecordBatch::try_new(
        schema(),
        vec![
            words(|letter| letter.stage.as_str()),
            words(|letter| &letter.at),
            words(|letter| letter.kind),
            words(|letter| &letter.error),
            words(|letter| &letter.topic),
            Arc::new(Int32Array::from_iter_values(dead.iter().map(|letter| letter.partition))),
            Arc::new(offsets),
            Arc::new(times.with_timezone("UTC")),
            Arc::new(dead.iter().map(|letter| letter.key.as_deref()).collect::<BinaryArray>()),
            Arc::new(dead.iter().map(|letter| letter.payload.as_deref()).collect::<BinaryArray>()),
            Arc::new(dead.iter().map(|letter| letter.headers.as_deref()).collect::<StringArray>()),
        ],
    )?;
    with_origin(rows, topics)
}

/// Rows of [`schema`] with their place in the total order: that of their record, by its own time.
///
/// # Errors
/// The rows are not of [`schema`].
pub fn with_origin(rows: RecordBatch, topics: &[Arc<str>]) -> Result<ChangeBatch, ArrowError> {
    if rows.schema() != schema() {
        return Err(ArrowError::SchemaError("these are no dead letters".to_owned()));
    }
    let partitions = rows.column(5).as_primitive::<Int32Type>();
    let places =
        rows.column(4).as_string::<i32>().iter().zip(partitions.values()).map(|(name, partition)| {
            let topic = topics.iter().position(|topic| Some(&**topic) == name).unwrap_or_default();
            Place::new(0, topic as u16, *partition).0
        });
    let times = rows.column(7).as_primitive::<TimestampMicrosecondType>();
    let origin = Origin {
        time: times.iter().map(Option::unwrap_or_default).collect(),
        place: places.collect(),
        offset: rows.column(6).as_primitive::<Int64Type>().clone(),
    };
    Ok(ChangeBatch::append(rows, origin))
}

/// Bytes as text, so that they can be had back: the text itself if they are UTF-8 and do not begin with `\x`, else `\x`
/// and hexadecimal digits, as Postgres shows a BYTEA.
pub fn text_of(bytes: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.starts_with("\\x") => Cow::Borrowed(text),
        _ => {
            let mut text = String::with_capacity(2 + 2 * bytes.len());
            text.push_str("\\x");
            for byte in bytes {
                // Writing to a String cannot fail.
                let _ = write!(text, "{byte:02x}");
            }
            Cow::Owned(text)
        }
    }
}

/// Headers in their order as the relation has them; `None` when there are none.
pub fn headers_text<'a>(headers: impl Iterator<Item = (Cow<'a, str>, Option<&'a [u8]>)>) -> Option<String> {
    let object = |(key, value): (Cow<'a, str>, Option<&[u8]>)| serde_json::json!({ "key": key, "value": value.map(text_of) });
    let all: Vec<serde_json::Value> = headers.map(object).collect();
    (!all.is_empty()).then(|| serde_json::Value::Array(all).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::Stage;

    fn letter(offset: i64, payload: usize) -> DeadLetter {
        DeadLetter {
            stage: Stage::Decode,
            at: "s".into(),
            topic: "t".into(),
            partition: 2,
            offset,
            timestamp_ms: Some(7),
            key: None,
            payload: Some(vec![b'x'; payload]),
            headers: None,
            error: "e".into(),
            kind: "not_json",
        }
    }

    #[test]
    fn batches_are_cut_by_rows_and_bytes_and_lose_nothing() {
        let topics = ["other".into(), "t".into()];
        let sizes = |dead: &[DeadLetter]| -> Vec<usize> {
            let batches = batches(dead, &topics).unwrap();
            let offsets = batches.iter().flat_map(|b| b.origin.offset.values().to_vec());
            assert!(offsets.eq(dead.iter().map(|letter| letter.offset)));
            batches.iter().map(ChangeBatch::num_rows).collect()
        };
        let small: Vec<DeadLetter> = (0..10_000).map(|offset| letter(offset, 1)).collect();
        assert_eq!(sizes(&small), [8_192, 1_808]);
        let large: Vec<DeadLetter> = (0..3).map(|offset| letter(offset, 40 << 20)).collect();
        assert_eq!(sizes(&large), [2, 1]);
        assert!(sizes(&[]).is_empty());
        let one = &batches(&small[5..6], &topics).unwrap()[0];
        assert_eq!(one.origin.key(0), (7_000, Place::new(0, 1, 2).0, 5));
        assert_eq!(one.rows.schema(), schema());
    }

    #[test]
    fn bytes_and_headers_are_text_that_tells_them() {
        assert_eq!(text_of("a\u{e9}".as_bytes()), "a\u{e9}");
        assert_eq!(text_of(&[0xFF, 0, 0x1A]), "\\xff001a");
        assert_eq!(text_of(b"\\xff"), "\\x5c786666");
        let headers: [(Cow<'_, str>, Option<&[u8]>); 3] =
            [("trace".into(), Some(b"\"1\"")), ("raw".into(), Some(&[0xFF])), ("none".into(), None)];
        assert_eq!(
            headers_text(headers.into_iter()).unwrap(),
            r#"[{"key":"trace","value":"\"1\""},{"key":"raw","value":"\\xff"},{"key":"none","value":null}]"#
        );
        assert_eq!(headers_text(std::iter::empty()), None);
    }
}
