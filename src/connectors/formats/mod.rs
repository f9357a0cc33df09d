//! Bytes ↔ rows. A format knows nothing of where the bytes come from or go to.
//!
//! Decoding is by schema: the declared columns say what a field must be, and a record that does not fit is refused
//! as a whole with a [`RecordError`], without any trace in the batch that is being built.

mod json_columns;
pub mod json_decode;
pub mod json_encode;
mod json_scan;
pub mod json_split;
pub mod records;
mod values;

use arrow::datatypes::DataType;

use crate::error::Result;
use crate::sql::options::Options;

/// Why one record could not become a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordError {
    /// `not_json`, `missing_field`, `wrong_type` or `too_large`: stable names, by which logging is limited.
    pub kind: &'static str,
    /// For people: names the field, what was expected and what was found.
    pub message: String,
}

/// What becomes of a record that cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// Kept whole, so that it can be replayed; the pipeline goes on.
    #[default]
    DeadLetter,
    /// Counted and dropped; the pipeline goes on.
    Skip,
    /// The pipeline stops.
    Fail,
}

impl OnError {
    /// The option `on_error = 'dead_letter' | 'skip' | 'fail'`.
    pub fn from_options(options: &mut Options) -> Result<Self> {
        Ok(match options.choice("on_error", &["dead_letter", "skip", "fail"])? {
            Some(1) => Self::Skip,
            Some(2) => Self::Fail,
            _ => Self::DeadLetter,
        })
    }
}

/// At most `limit` characters of a value, for a message.
pub(crate) fn shortened(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// µs since the epoch of RFC 3339 or `YYYY-MM-DD HH:MM:SS[.f][zone]` text; `None` when it is neither.
pub fn timestamp_micros(text: &str) -> Option<i64> {
    values::timestamp(text.trim())
}

/// The type as it is written in SQL.
pub(crate) fn sql_type(data_type: &DataType) -> String {
    match data_type {
        DataType::Boolean => "BOOLEAN".to_owned(),
        DataType::Int8 => "TINYINT".to_owned(),
        DataType::Int16 => "SMALLINT".to_owned(),
        DataType::Int32 => "INT".to_owned(),
        DataType::Int64 => "BIGINT".to_owned(),
        DataType::UInt8 => "TINYINT UNSIGNED".to_owned(),
        DataType::UInt16 => "SMALLINT UNSIGNED".to_owned(),
        DataType::UInt32 => "INT UNSIGNED".to_owned(),
        DataType::UInt64 => "BIGINT UNSIGNED".to_owned(),
        DataType::Float32 => "FLOAT".to_owned(),
        DataType::Float64 => "DOUBLE".to_owned(),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "VARCHAR".to_owned(),
        DataType::Binary => "BYTEA".to_owned(),
        DataType::Date32 => "DATE".to_owned(),
        DataType::Timestamp(_, _) => "TIMESTAMP".to_owned(),
        DataType::Decimal128(precision, scale) => format!("DECIMAL({precision}, {scale})"),
        DataType::List(item) => format!("{}[]", sql_type(item.data_type())),
        DataType::Struct(_) => "an object".to_owned(),
        other => other.to_string(),
    }
}
