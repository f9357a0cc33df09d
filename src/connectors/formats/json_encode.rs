//! Rows → one JSON object per row, in the order of the columns.
//!
//! NULL is written as `null`, so that every record has every field. Timestamps are RFC 3339 in UTC with `Z`,
//! integers are numbers, decimals too; NaN and infinities have no JSON number and are written as `null`. A BYTEA is its
//! text if it is UTF-8 and does not begin with `\x`, else `\x` and hexadecimal digits ([`text_of`]); inside of lists and
//! objects it is hexadecimal digits.
//! A batch of changes carries its weights in a last field `_weight`.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringBuilder};
use arrow::datatypes::{DataType, Field, Schema};
use arrow::json::writer::{LineDelimited, WriterBuilder};

use crate::error::Result;
use crate::stream::letters::text_of;

/// Encodes batch after batch into one buffer.
#[derive(Default)]
pub struct JsonEncoder {
    buffer: Vec<u8>,
    rows: Vec<Range<usize>>,
}

/// The rows of one batch as text.
#[derive(Clone, Copy)]
pub struct EncodedRows<'a> {
    buffer: &'a [u8],
    rows: &'a [Range<usize>],
}

impl JsonEncoder {
    /// # Errors
    /// Internal: a column type without a JSON form.
    pub fn encode(&mut self, rows: &RecordBatch, weights: Option<&Int64Array>) -> Result<EncodedRows<'_>> {
        self.buffer.clear();
        self.rows.clear();
        let rows = &with_texts(rows)?;
        let weighted = weights.map(|weights| with_weights(rows, weights)).transpose()?;
        let mut writer =
            WriterBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(&mut self.buffer);
        writer.write(weighted.as_ref().unwrap_or(rows))?;
        writer.finish()?;
        drop(writer);
        // Strings hold no raw line end, so each one ends a row.
        let mut start = 0;
        for (at, _) in self.buffer.iter().enumerate().filter(|(_, byte)| **byte == b'\n') {
            self.rows.push(start..at);
            start = at + 1;
        }
        debug_assert_eq!(self.rows.len(), rows.num_rows());
        Ok(EncodedRows { buffer: &self.buffer, rows: &self.rows })
    }
}

impl<'a> EncodedRows<'a> {
    pub fn len(self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(self) -> bool {
        self.rows.is_empty()
    }

    /// One row without a line end.
    pub fn row(self, row: usize) -> &'a [u8] {
        &self.buffer[self.rows[row].clone()]
    }

    /// All rows, each with its line end.
    pub fn lines(self) -> &'a [u8] {
        self.buffer
    }
}

/// The same rows with text in the place of bytes.
pub(crate) fn with_texts(rows: &RecordBatch) -> Result<RecordBatch> {
    let schema = rows.schema();
    let bytes = |field: &Arc<Field>| *field.data_type() == DataType::Binary;
    if !schema.fields().iter().any(bytes) {
        return Ok(rows.clone());
    }
    let field = |field: &Arc<Field>| match bytes(field) {
        true => Arc::new(Field::new(field.name(), DataType::Utf8, field.is_nullable())),
        false => Arc::clone(field),
    };
    let fields: Vec<Arc<Field>> = schema.fields().iter().map(field).collect();
    let column = |column: &ArrayRef| match column.as_binary_opt::<i32>() {
        Some(bytes) => {
            let mut texts = StringBuilder::with_capacity(bytes.len(), bytes.value_data().len());
            bytes.iter().for_each(|bytes| texts.append_option(bytes.map(text_of)));
            Arc::new(texts.finish()) as ArrayRef
        }
        None => Arc::clone(column),
    };
    let columns = rows.columns().iter().map(column).collect();
    Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
}

/// The same rows with their weights as a last column `_weight`.
pub(crate) fn with_weights(rows: &RecordBatch, weights: &Int64Array) -> Result<RecordBatch> {
    let schema = rows.schema();
    let weight = Arc::new(Field::new("_weight", DataType::Int64, false));
    let fields: Vec<_> = schema.fields().iter().cloned().chain([weight]).collect();
    let columns = rows.columns().iter().cloned().chain([Arc::new(weights.clone()) as ArrayRef]).collect();
    Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
}

#[cfg(test)]
mod tests {
    use super::super::json_decode::JsonDecoder;
    use super::*;
    use crate::stream::timestamp_type;

    #[test]
    fn bytes_are_text_where_they_can_be() {
        let values: [Option<&[u8]>; 4] = [Some(b"{\"a\":1}\n"), Some(&[0xFF, 0]), None, Some(b"")];
        let bytes: ArrayRef = Arc::new(values.into_iter().collect::<arrow::array::BinaryArray>());
        let rows = RecordBatch::try_from_iter_with_nullable([("b", bytes, true)]).unwrap();
        let mut encoder = JsonEncoder::default();
        let text = String::from_utf8(encoder.encode(&rows, None).unwrap().lines().to_vec()).unwrap();
        let wanted = [r#"{"b":"{\"a\":1}\n"}"#, r#"{"b":"\\xff00"}"#, r#"{"b":null}"#, r#"{"b":""}"#];
        assert_eq!(text.lines().collect::<Vec<_>>(), wanted);
    }

    #[test]
    fn rows_are_objects_that_can_be_read_back() {
        let fields = vec![
            Field::new("id", DataType::Int64, false),
            Field::new("name", DataType::Utf8, true),
            Field::new("at", timestamp_type(), true),
            Field::new("x", DataType::Float64, true),
            Field::new("d", DataType::Decimal128(10, 2), true),
        ];
        let schema = Arc::new(Schema::new(fields));
        let mut decoder = JsonDecoder::new(Arc::clone(&schema)).unwrap();
        decoder.push(br#"{"id":9007199254740993,"name":"a\nb","at":"2026-01-02T03:04:05.000006Z","x":0.1,"d":1.5}"#).unwrap();
        decoder.push(br#"{"id":-1}"#).unwrap();
        let batch = decoder.finish().unwrap();
        let mut encoder = JsonEncoder::default();
        let encoded = encoder.encode(&batch, None).unwrap();
        let text = |row| std::str::from_utf8(encoded.row(row)).unwrap();
        assert_eq!(
            text(0),
            r#"{"id":9007199254740993,"name":"a\nb","at":"2026-01-02T03:04:05.000006Z","x":0.1,"d":1.50}"#
        );
        assert_eq!(text(1), r#"{"id":-1,"name":null,"at":null,"x":null,"d":null}"#);
        for row in 0..2 {
            decoder.push(encoded.row(row)).unwrap();
        }
        assert_eq!(decoder.finish().unwrap(), batch);
        let weights = Int64Array::from(vec![1, -1]);
        let weighted = encoder.encode(&batch, Some(&weights)).unwrap();
        assert!(weighted.row(1).ends_with(br#","_weight":-1}"#));
        assert_eq!(weighted.lines().iter().filter(|b| **b == b'\n').count(), 2);
        assert!(encoder.encode(&batch.slice(0, 0), None).unwrap().is_empty());
    }
}
