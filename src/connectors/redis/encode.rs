//! Arrow → text → script calls. Pure: no connection, no clock.
//!
//! # Text forms
//! | type | text |
//! |---|---|
//! | integers, DECIMAL | decimal |
//! | DOUBLE, REAL | the fewest digits that read back as the same value: `0.1`, `100.0`, `1e300`; `NaN`, `inf`, `-inf` |
//! | BOOLEAN | `true`, `false` |
//! | TIMESTAMP | RFC 3339 in UTC: `2024-04-11T14:10:05.951Z`; the fraction has 0, 3, 6 or 9 digits, as few as keep the value |
//! | DATE, TIME | ISO: `2024-04-11`, `14:10:05.951` |
//! | VARCHAR, BYTEA | the bytes as they are |
//!
//! Years outside 0000–9999, which RFC 3339 does not know, are written with a sign.
//! A batch is first written column by column into byte buffers that are used again, then row by row into the call.

use std::io::Write;
use std::ops::Range;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch};
use arrow::buffer::NullBuffer;
use arrow::compute::cast;
use arrow::datatypes::{
    ArrowPrimitiveType, ArrowTimestampType, DataType, Date32Type, Date64Type, Float32Type, Float64Type,
    Int8Type, Int16Type, Int32Type, Int64Type, TimeUnit, TimestampMicrosecondType, TimestampMillisecondType,
    TimestampNanosecondType, TimestampSecondType, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use serde_json::ser::{CompactFormatter, Formatter};

use super::KEY_SEPARATOR;
use super::script;
use super::slots::slot_of;
use crate::error::{Error, Result};
use crate::stream::{Positions, civil};

/// Whether values of a type can be written and read back.
pub fn has_text_form(data_type: &DataType) -> bool {
    use DataType as T;
    match data_type {
        T::Null | T::Boolean | T::Utf8 | T::LargeUtf8 | T::Utf8View => true,
        T::Binary | T::LargeBinary | T::BinaryView => true,
        T::Decimal128(_, _) | T::Decimal256(_, _) => true,
        T::Dictionary(_, values) => has_text_form(values),
        other => other.is_integer() || other.is_floating() || (other.is_temporal() && !is_span(other)),
    }
}

fn is_span(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Duration(_) | DataType::Interval(_))
}

/// Rows that have a NULL in one of `key_columns`, in order. They cannot be stored; the caller makes them dead letters.
pub fn null_keys(rows: &RecordBatch, key_columns: &[usize]) -> Vec<usize> {
    let nulls: Vec<NullBuffer> =
        key_columns.iter().filter_map(|&key| rows.column(key).logical_nulls()).collect();
    (0..rows.num_rows()).filter(|&row| nulls.iter().any(|nulls| nulls.is_null(row))).collect()
}

/// The cells of one column as text, end to end.
#[derive(Debug, Default)]
pub struct TextColumn {
    bytes: Vec<u8>,
    /// Where each cell ends.
    ends: Vec<usize>,
    nulls: Option<NullBuffer>,
}

impl TextColumn {
    /// The text of a cell; empty for NULL.
    pub fn cell(&self, row: usize) -> &[u8] {
        let start = if row == 0 { 0 } else { self.ends[row - 1] };
        &self.bytes[start..self.ends[row]]
    }

    pub fn is_null(&self, row: usize) -> bool {
        self.nulls.as_ref().is_some_and(|nulls| nulls.is_null(row))
    }

    /// Replaces the content by the text of `array`.
    ///
    /// # Errors
    /// Internal: a type without a text form (refused when the sink was opened).
    pub fn fill(&mut self, array: &ArrayRef) -> Result<()> {
        use DataType as T;
        match array.data_type() {
            T::Null => self.each(array, |_, _| {}),
            T::Boolean => {
                let values = array.as_boolean();
                self.each(array, |out, row| {
                    out.extend_from_slice(if values.value(row) { b"true" } else { b"false" })
                });
            }
            T::Int8 => self.integers::<Int8Type>(array),
            T::Int16 => self.integers::<Int16Type>(array),
            T::Int32 => self.integers::<Int32Type>(array),
            T::Int64 => self.integers::<Int64Type>(array),
            T::UInt8 => self.integers::<UInt8Type>(array),
            T::UInt16 => self.integers::<UInt16Type>(array),
            T::UInt32 => self.integers::<UInt32Type>(array),
            T::UInt64 => {
                let values = array.as_primitive::<UInt64Type>();
                self.each(array, |out, row| infallible(CompactFormatter.write_u64(out, values.value(row))));
            }
            T::Float32 => {
                let values = array.as_primitive::<Float32Type>();
                self.each(array, |out, row| match values.value(row) {
                    finite if finite.is_finite() => infallible(CompactFormatter.write_f32(out, finite)),
                    other => not_finite(out, f64::from(other)),
                });
            }
            T::Float64 => {
                let values = array.as_primitive::<Float64Type>();
                self.each(array, |out, row| match values.value(row) {
                    finite if finite.is_finite() => infallible(CompactFormatter.write_f64(out, finite)),
                    other => not_finite(out, other),
                });
            }
            T::Float16 => return self.fill(&cast(array, &T::Float32)?),
            T::Timestamp(TimeUnit::Second, _) => self.timestamps::<TimestampSecondType>(array),
            T::Timestamp(TimeUnit::Millisecond, _) => self.timestamps::<TimestampMillisecondType>(array),
            T::Timestamp(TimeUnit::Microsecond, _) => self.timestamps::<TimestampMicrosecondType>(array),
            T::Timestamp(TimeUnit::Nanosecond, _) => self.timestamps::<TimestampNanosecondType>(array),
            T::Date32 => {
                let values = array.as_primitive::<Date32Type>();
                self.each(array, |out, row| date(out, i64::from(values.value(row))));
            }
            T::Date64 => {
                let values = array.as_primitive::<Date64Type>();
                self.each(array, |out, row| date(out, values.value(row).div_euclid(86_400_000)));
            }
            _ => return self.fill_others(array),
        }
        Ok(())
    }

    fn fill_others(&mut self, array: &ArrayRef) -> Result<()> {
        use DataType as T;
        match array.data_type() {
            T::Utf8 => {
                let values = array.as_string::<i32>();
                self.each(array, |out, row| out.extend_from_slice(values.value(row).as_bytes()));
            }
            T::LargeUtf8 => {
                let values = array.as_string::<i64>();
                self.each(array, |out, row| out.extend_from_slice(values.value(row).as_bytes()));
            }
            T::Utf8View => {
                let values = array.as_string_view();
                self.each(array, |out, row| out.extend_from_slice(values.value(row).as_bytes()));
            }
            T::Binary => {
                let values = array.as_binary::<i32>();
                self.each(array, |out, row| out.extend_from_slice(values.value(row)));
            }
            T::LargeBinary => {
                let values = array.as_binary::<i64>();
                self.each(array, |out, row| out.extend_from_slice(values.value(row)));
            }
            T::BinaryView => {
                let values = array.as_binary_view();
                self.each(array, |out, row| out.extend_from_slice(values.value(row)));
            }
            T::Dictionary(_, values) => return self.fill(&cast(array, values)?),
            T::Decimal128(_, _) | T::Decimal256(_, _) | T::Time32(_) | T::Time64(_) => {
                let options = FormatOptions::default();
                let formatter = ArrayFormatter::try_new(array, &options)?;
                self.each(array, |out, row| infallible(write!(out, "{}", formatter.value(row))));
            }
            other => return Err(Error::internal(format!("the type {other} has no text form for Redis"))),
        }
        Ok(())
    }

    /// Writes each cell that is not NULL with `write(out, row)`.
    fn each(&mut self, array: &ArrayRef, mut write: impl FnMut(&mut Vec<u8>, usize)) {
        self.bytes.clear();
        self.ends.clear();
        self.nulls = array.logical_nulls().filter(|nulls| nulls.null_count() > 0);
        for row in 0..array.len() {
            if !self.is_null(row) {
                write(&mut self.bytes, row);
            }
            self.ends.push(self.bytes.len());
        }
    }

    fn integers<T: ArrowPrimitiveType>(&mut self, array: &ArrayRef)
    where
        T::Native: Into<i64>,
    {
        let values = array.as_primitive::<T>();
        self.each(array, |out, row| infallible(CompactFormatter.write_i64(out, values.value(row).into())));
    }

    fn timestamps<T: ArrowTimestampType>(&mut self, array: &ArrayRef) {
        let per_second = match T::UNIT {
            TimeUnit::Second => 1,
            TimeUnit::Millisecond => 1_000,
            TimeUnit::Microsecond => 1_000_000,
            TimeUnit::Nanosecond => 1_000_000_000,
        };
        let values = array.as_primitive::<T>();
        self.each(array, |out, row| timestamp(out, values.value(row), per_second));
    }
}

/// Writing into a vector cannot fail.
fn infallible(_: std::io::Result<()>) {}

fn not_finite(out: &mut Vec<u8>, value: f64) {
    out.extend_from_slice(match value {
        value if value.is_nan() => b"NaN",
        f64::INFINITY => b"inf",
        _ => b"-inf",
    });
}

fn digits<const N: usize>(out: &mut Vec<u8>, mut value: u32) {
    let mut text = [b'0'; N];
    for digit in text.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
    }
    out.extend_from_slice(&text);
}

/// A date from days since 1970-01-01.
fn date(out: &mut Vec<u8>, days: i64) {
    let (year, month, day) = civil(days);
    match u32::try_from(year) {
        Ok(year @ 0..=9_999) => digits::<4>(out, year),
        _ => infallible(write!(out, "{year:+05}")),
    }
    out.push(b'-');
    digits::<2>(out, month);
    out.push(b'-');
    digits::<2>(out, day);
}

fn timestamp(out: &mut Vec<u8>, value: i64, per_second: i64) {
    let seconds = value.div_euclid(per_second);
    let nanos = (value.rem_euclid(per_second) * (1_000_000_000 / per_second)) as u32;
    let second_of_day = seconds.rem_euclid(86_400) as u32;
    date(out, seconds.div_euclid(86_400));
    out.push(b'T');
    digits::<2>(out, second_of_day / 3_600);
    out.push(b':');
    digits::<2>(out, second_of_day / 60 % 60);
    out.push(b':');
    digits::<2>(out, second_of_day % 60);
    if nanos > 0 {
        out.push(b'.');
        if nanos.is_multiple_of(1_000_000) {
            digits::<3>(out, nanos / 1_000_000);
        } else if nanos.is_multiple_of(1_000) {
            digits::<6>(out, nanos / 1_000);
        } else {
            digits::<9>(out, nanos);
        }
    }
    out.push(b'Z');
}

/// Appends `$<length>\r\n<bytes>\r\n`.
pub(super) fn bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    bulk_header(out, bytes.len());
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

fn bulk_header(out: &mut Vec<u8>, length: usize) {
    out.push(b'$');
    infallible(CompactFormatter.write_u64(out, length as u64));
    out.extend_from_slice(b"\r\n");
}

pub(super) fn array_header(out: &mut Vec<u8>, length: usize) {
    out.push(b'*');
    infallible(CompactFormatter.write_u64(out, length as u64));
    out.extend_from_slice(b"\r\n");
}

/// Appends a whole command.
pub(super) fn command<A: AsRef<[u8]>>(out: &mut Vec<u8>, arguments: &[A]) {
    array_header(out, arguments.len());
    arguments.iter().for_each(|argument| bulk(out, argument.as_ref()));
}

/// What is the same in all calls of a sink.
#[derive(Debug)]
pub(super) struct Layout {
    pub prefix: Vec<u8>,
    pub key_columns: Vec<usize>,
    /// Column names as they follow the header in `ARGV`.
    pub fields: Vec<u8>,
    pub field_count: usize,
}

/// What one script call writes, of what the encoder was filled with.
pub(super) struct Call<'a> {
    /// The bookkeeping hash.
    pub book: &'a [u8],
    /// Fence, flush field, own number, predecessor's number or nothing, number of the last acknowledged call or nothing.
    pub guard: [&'a [u8]; 5],
    /// Among the rows with a key.
    pub rows: Range<usize>,
    /// Among the deletes with a key.
    pub deletes: Range<usize>,
    /// By row of the batch.
    pub expire_at_ms: Option<&'a Int64Array>,
    pub consumed: &'a Positions,
}

/// Rows and deletes of one slot that one call takes.
#[derive(Debug)]
pub(super) struct Group {
    pub slot: u16,
    pub rows: Range<usize>,
    pub deletes: Range<usize>,
}

/// Buffers for encoding, used again from call to call.
#[derive(Debug, Default)]
pub(super) struct Encoder {
    columns: Vec<TextColumn>,
    delete_keys: Vec<TextColumn>,
    scratch: Vec<u8>,
    nullable: bool,
    /// The rows that have a key.
    rows: Vec<usize>,
    deletes: Vec<usize>,
    /// Slot and row, for sorting.
    placed: Vec<(u16, usize)>,
}

impl Encoder {
    /// Takes in what calls write next. Rows and deletes with a NULL key are left out.
    pub(super) fn fill(
        &mut self,
        layout: &Layout,
        rows: &RecordBatch,
        deletes: Option<&RecordBatch>,
    ) -> Result<()> {
        self.columns.resize_with(layout.field_count, TextColumn::default);
        for (text, array) in self.columns.iter_mut().zip(rows.columns()) {
            text.fill(array)?;
        }
        self.nullable = self.columns.iter().any(|column| column.nulls.is_some());
        let skipped = null_keys(rows, &layout.key_columns);
        self.rows.clear();
        self.rows.extend((0..rows.num_rows()).filter(|row| skipped.binary_search(row).is_err()));
        self.fill_deletes(layout, deletes)
    }

    /// Forgets what it was filled with.
    pub(super) fn empty(&mut self) {
        self.nullable = false;
        self.rows.clear();
        self.deletes.clear();
    }

    /// Rows and deletes that have a key.
    pub(super) fn all(&self) -> (Range<usize>, Range<usize>) {
        (0..self.rows.len(), 0..self.deletes.len())
    }

    /// Puts the rows and deletes of a slot side by side; at most `most` keys for one call.
    pub(super) fn by_slot(&mut self, layout: &Layout, most: usize) -> Vec<Group> {
        let keys = &layout.key_columns;
        self.placed.clear();
        for &row in &self.rows {
            let parts = keys.iter().map(|&column| self.columns[column].cell(row));
            key(&mut self.scratch, &layout.prefix, parts);
            self.placed.push((slot_of(&self.scratch), row));
        }
        let mut groups = Vec::new();
        sorted(&mut self.placed, &mut self.rows, most, |slot, rows| {
            groups.push(Group { slot, rows, deletes: 0..0 });
        });
        self.placed.clear();
        for &row in &self.deletes {
            key(&mut self.scratch, &layout.prefix, self.delete_keys.iter().map(|column| column.cell(row)));
            self.placed.push((slot_of(&self.scratch), row));
        }
        sorted(&mut self.placed, &mut self.deletes, most, |slot, deletes| {
            groups.push(Group { slot, rows: 0..0, deletes });
        });
        // Calls of one slot follow each other.
        groups.sort_by_key(|group| group.slot);
        groups
    }

    /// Appends a call to `out` in the layout that [`script::WRITE`] expects.
    pub(super) fn call(&mut self, out: &mut Vec<u8>, layout: &Layout, call: &Call<'_>) {
        let per_row =
            layout.field_count + usize::from(call.expire_at_ms.is_some()) + usize::from(self.nullable);
        let offsets = call.consumed.iter().count();
        let keys = 1 + call.rows.len() + call.deletes.len();
        let values = script::HEADER + layout.field_count + call.rows.len() * per_row + 2 * offsets;
        array_header(out, 3 + keys + values);
        bulk(out, b"EVALSHA");
        bulk(out, script::write_hash().as_bytes());
        self.number(out, keys);
        self.keys(out, layout, call);
        call.guard.iter().for_each(|part| bulk(out, part));
        for number in [
            layout.field_count,
            call.rows.len(),
            call.deletes.len(),
            usize::from(call.expire_at_ms.is_some()),
            usize::from(self.nullable),
            offsets,
        ] {
            self.number(out, number);
        }
        out.extend_from_slice(&layout.fields);
        for (place, offset) in call.consumed.iter() {
            bulk(out, script::offset_field(place).as_bytes());
            bulk(out, script::offset_text(offset).as_bytes());
        }
        self.values(out, call);
    }

    fn fill_deletes(&mut self, layout: &Layout, deletes: Option<&RecordBatch>) -> Result<()> {
        self.deletes.clear();
        let Some(deletes) = deletes else { return Ok(()) };
        self.delete_keys.resize_with(layout.key_columns.len(), TextColumn::default);
        for (text, &column) in self.delete_keys.iter_mut().zip(&layout.key_columns) {
            text.fill(deletes.column(column))?;
        }
        let keys = &self.delete_keys;
        self.deletes
            .extend((0..deletes.num_rows()).filter(|&row| !keys.iter().any(|column| column.is_null(row))));
        Ok(())
    }

    fn keys(&mut self, out: &mut Vec<u8>, layout: &Layout, call: &Call<'_>) {
        bulk(out, call.book);
        for &row in &self.rows[call.rows.clone()] {
            let parts = layout.key_columns.iter().map(|&column| self.columns[column].cell(row));
            key(&mut self.scratch, &layout.prefix, parts);
            bulk(out, &self.scratch);
        }
        for &row in &self.deletes[call.deletes.clone()] {
            key(&mut self.scratch, &layout.prefix, self.delete_keys.iter().map(|column| column.cell(row)));
            bulk(out, &self.scratch);
        }
    }

    fn values(&mut self, out: &mut Vec<u8>, call: &Call<'_>) {
        for &row in &self.rows[call.rows.clone()] {
            if let Some(expiry) = call.expire_at_ms {
                self.scratch.clear();
                if expiry.is_valid(row) {
                    infallible(CompactFormatter.write_i64(&mut self.scratch, expiry.value(row)));
                }
                bulk(out, &self.scratch);
            }
            if self.nullable {
                self.scratch.clear();
                if self.columns.iter().any(|column| column.is_null(row)) {
                    self.scratch
                        .extend(self.columns.iter().map(|column| b'0' + u8::from(column.is_null(row))));
                }
                bulk(out, &self.scratch);
            }
            for column in &self.columns {
                bulk(out, column.cell(row));
            }
        }
    }

    fn number(&mut self, out: &mut Vec<u8>, number: usize) {
        self.scratch.clear();
        infallible(CompactFormatter.write_u64(&mut self.scratch, number as u64));
        bulk(out, &self.scratch);
    }
}

/// Sorts rows by slot and tells the ranges of at most `most` that share one.
fn sorted(
    placed: &mut [(u16, usize)],
    rows: &mut [usize],
    most: usize,
    mut group: impl FnMut(u16, Range<usize>),
) {
    placed.sort_unstable();
    for (row, (_, placed)) in rows.iter_mut().zip(placed.iter()) {
        *row = *placed;
    }
    let mut from = 0;
    for same in placed.chunk_by(|one, other| one.0 == other.0) {
        for part in same.chunks(most) {
            group(part[0].0, from..from + part.len());
            from += part.len();
        }
    }
}

/// Writes prefix and key parts into `out`, which is cleared first.
pub(super) fn key<'a>(out: &mut Vec<u8>, prefix: &[u8], parts: impl Iterator<Item = &'a [u8]>) {
    out.clear();
    out.extend_from_slice(prefix);
    for (index, part) in parts.enumerate() {
        if index > 0 {
            out.push(KEY_SEPARATOR);
        }
        out.extend_from_slice(part);
    }
}
