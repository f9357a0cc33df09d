//! One JSON object per record → typed columns, by the declared schema.
//!
//! What fits what (everything else is `wrong_type`):
//! - **Names** are case-sensitive; unknown fields are skipped; of a repeated field the last one counts. A missing
//!   field is NULL, as is `null`; in a NOT NULL column both are `missing_field`.
//! - **Integers** take numbers without a fraction (`1.0` and `1e3` are integers, `1.5` is not) and strings that
//!   hold such a number. Too large for the type is a wrong type.
//! - **Floats** take numbers and numeric strings, rounded correctly, and the strings `NaN`, `inf`, `infinity`.
//!   Beyond the type's range is a wrong type, not an infinity.
//! - **Decimals** take numbers and numeric strings exactly; digits below the scale are rounded half away from zero,
//!   as CAST does.
//! - **VARCHAR** takes strings only; a binary column takes a string's UTF-8 bytes. **BOOLEAN** takes `true`/`false`.
//! - **TIMESTAMP** takes RFC 3339 and `YYYY-MM-DD HH:MM:SS[.f]` (UTC without a zone; digits below µs are cut).
//!   A number is refused, because its unit would be a guess. **DATE** takes `YYYY-MM-DD`.
//! - **Lists and structs** take arrays and objects, by the same rules within.
//!
//! A record is UTF-8 and exactly one object with white space around it; anything else is `not_json`.
//!
//! # Constraints
//! A record that fails leaves no trace: its columns are cut back. A record that succeeds costs no allocation beyond
//! the growth of the columns.

use std::fmt::Write as _;
use std::sync::Arc;

use arrow::array::{RecordBatch, RecordBatchOptions};
use arrow::datatypes::SchemaRef;

use super::json_columns::{Column, Fields, Values};
use super::json_scan::{Scanner, Syntax};
use super::values::{self, NumberFault};
use super::{RecordError, shortened, sql_type};
use crate::error::Result;

/// Characters of a wrong value that are shown.
const SHOWN: usize = 80;

/// Collects records into batches of one schema.
pub struct JsonDecoder {
    schema: SchemaRef,
    fields: Fields,
    rows: usize,
    scratch: String,
}

impl JsonDecoder {
    /// # Errors
    /// A user error when a column's type cannot be filled from JSON.
    pub fn new(schema: SchemaRef) -> Result<Self> {
        let fields = Fields::new(schema.fields(), "")?;
        Ok(Self { schema, fields, rows: 0, scratch: String::new() })
    }

    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Rows since the last `finish`.
    pub fn len(&self) -> usize {
        self.rows
    }

    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Adds one record as one row.
    ///
    /// # Errors
    /// Nothing was added; the error names the field, what was expected and what was found.
    pub fn push(&mut self, payload: &[u8]) -> Result<(), RecordError> {
        let text = std::str::from_utf8(payload).map_err(|error| RecordError {
            kind: "not_json",
            message: format!("not UTF-8 at byte {}", error.valid_up_to()),
        })?;
        let mut scan = Scanner::new(text);
        let decoded = self.fields.record(&mut scan, &mut self.scratch, self.rows);
        match decoded {
            Ok(()) => {
                self.rows += 1;
                Ok(())
            }
            Err(fault) => {
                self.fields.truncate(self.rows);
                Err(fault.describe(text))
            }
        }
    }

    /// The rows collected so far; the decoder starts again with room for as many.
    ///
    /// # Errors
    /// Internal only: the columns do not form a batch of the schema.
    pub fn finish(&mut self) -> Result<RecordBatch> {
        let arrays = self.fields.columns.iter_mut().map(Column::finish).collect::<Result<Vec<_>>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(self.rows));
        self.rows = 0;
        Ok(RecordBatch::try_new_with_options(Arc::clone(&self.schema), arrays, &options)?)
    }
}

/// Boxed, so that the way of success moves one pointer.
type Refusal = Box<Fault>;

enum Fault {
    Syntax(Syntax),
    Missing { path: String },
    Type { path: String, expected: String, found: String, why: &'static str },
    TooLarge { path: String },
}

impl From<Syntax> for Refusal {
    fn from(syntax: Syntax) -> Self {
        Box::new(Fault::Syntax(syntax))
    }
}

impl Fault {
    #[cold]
    fn within(mut self: Box<Self>, outer: &str) -> Refusal {
        match &mut *self {
            Self::Syntax(_) => {}
            Self::Missing { path } | Self::Type { path, .. } | Self::TooLarge { path } => {
                let joint = if path.is_empty() || path.starts_with('[') { "" } else { "." };
                *path = format!("{outer}{joint}{path}");
            }
        }
        self
    }

    #[cold]
    fn describe(self, text: &str) -> RecordError {
        match self {
            Self::Syntax(Syntax { at, expected }) => {
                let mut message = format!("expected {expected} at byte {at}");
                let rest = text.get(at..).unwrap_or("");
                // Writing to a string cannot fail.
                let _ = match rest {
                    "" => write!(message, ", found the end of the record"),
                    rest => write!(message, ", found {}", shortened(rest, 20)),
                };
                RecordError { kind: "not_json", message }
            }
            Self::Missing { path } => RecordError {
                kind: "missing_field",
                message: format!("field {path}: missing or null, but declared NOT NULL"),
            },
            Self::Type { path, expected, found, why } => {
                let path = if path.is_empty() { "record".to_owned() } else { format!("field {path}") };
                RecordError {
                    kind: "wrong_type",
                    message: format!("{path}: expected {expected}, found {}{why}", shortened(&found, SHOWN)),
                }
            }
            Self::TooLarge { path } => RecordError {
                kind: "too_large",
                message: format!("field {path}: the batch would hold more than 2 GiB of it"),
            },
        }
    }
}

impl Fields {
    /// One whole record: an object and nothing after it.
    fn record(&mut self, scan: &mut Scanner<'_>, scratch: &mut String, row: usize) -> Result<(), Refusal> {
        if scan.peek() != b'{' {
            return Err(refuse(scan, "one JSON object".to_owned(), ""));
        }
        self.object(scan, scratch, row)?;
        Ok(scan.end()?)
    }

    fn object(&mut self, scan: &mut Scanner<'_>, scratch: &mut String, row: usize) -> Result<(), Refusal> {
        scan.take(b'{', "an object")?;
        if scan.peek() == b'}' {
            scan.advance();
        } else {
            self.members(scan, scratch, row)?;
        }
        for column in &mut self.columns {
            if column.len() == row {
                if !column.field.is_nullable() {
                    return Err(Box::new(Fault::Missing { path: column.field.name().clone() }));
                }
                column.push_null();
            }
        }
        Ok(())
    }

    fn members(&mut self, scan: &mut Scanner<'_>, scratch: &mut String, row: usize) -> Result<(), Refusal> {
        // Producers write their fields in one order, so the next column is nearly always the next one.
        let mut guess = 0;
        loop {
            match self.member_column(scan, scratch, guess)? {
                Some(index) => {
                    guess = index + 1;
                    let column = &mut self.columns[index];
                    if column.len() > row {
                        column.truncate(row);
                    }
                    column
                        .value(scan, scratch)
                        .map_err(|fault| fault.within(self.columns[index].field.name()))?;
                }
                None => scan.skip_value()?,
            }
            match scan.peek() {
                b',' => scan.advance(),
                b'}' => {
                    scan.advance();
                    return Ok(());
                }
                _ => return Err(scan.syntax("a comma or }").into()),
            }
        }
    }

    /// Consumes a key and its colon; `None` for a field that is not declared.
    #[inline]
    fn member_column(
        &self,
        scan: &mut Scanner<'_>,
        scratch: &mut String,
        guess: usize,
    ) -> Result<Option<usize>, Syntax> {
        scan.peek();
        if let Some(column) = self.columns.get(guess)
            && column.plain_name.as_deref().is_some_and(|name| scan.take_key(name))
        {
            return Ok(Some(guess));
        }
        let index = self.index_of(scan.string(scratch)?);
        scan.take(b':', "a colon")?;
        Ok(index)
    }
}

impl Column {
    /// Reads one value as the next row of this column.
    #[inline]
    fn value(&mut self, scan: &mut Scanner<'_>, scratch: &mut String) -> Result<(), Refusal> {
        let first = scan.peek();
        if first == b'n' {
            scan.word("null")?;
            if !self.field.is_nullable() {
                return Err(Box::new(Fault::Missing { path: String::new() }));
            }
            self.push_null();
            return Ok(());
        }
        match (&mut self.values, first) {
            (Values::Text(bytes), b'"') => {
                if !bytes.push(scan.string(scratch)?) {
                    return Err(Box::new(Fault::TooLarge { path: String::new() }));
                }
            }
            (Values::Boolean(bits), b't' | b'f') => {
                scan.word(if first == b't' { "true" } else { "false" })?;
                bits.append(first == b't');
            }
            (Values::Timestamp(_) | Values::Date(_), b'"') => return self.time(scan, scratch),
            (Values::List { offsets, items }, b'[') => list(offsets, items, scan, scratch)?,
            (Values::Struct(fields), b'{') => {
                let row = self.validity.len();
                fields.object(scan, scratch, row)?;
            }
            (_, b'-' | b'0'..=b'9' | b'"') => self.number(first, scan, scratch)?,
            _ => return Err(self.refuse(scan, "")),
        }
        self.validity.append_non_null();
        Ok(())
    }

    #[inline]
    fn number(&mut self, first: u8, scan: &mut Scanner<'_>, scratch: &mut String) -> Result<(), Refusal> {
        let start = scan.position();
        let pushed = if first == b'"' {
            self.values.push_number(scan.string(scratch)?.trim())
        } else {
            let number = scan.number()?;
            match &mut self.values {
                Values::Signed { values, min, max }
                    if number.small_integer().is_some_and(|value| value >= *min && value <= *max) =>
                {
                    values.extend(number.small_integer());
                    Ok(())
                }
                Values::Float64(values) if number.short_double().is_some() => {
                    values.extend(number.short_double());
                    Ok(())
                }
                values => values.push_number(number.text),
            }
        };
        pushed.map_err(|fault| {
            scan.rewind(start);
            self.refuse(scan, reason(fault, &self.values, first))
        })
    }

    fn time(&mut self, scan: &mut Scanner<'_>, scratch: &mut String) -> Result<(), Refusal> {
        let start = scan.position();
        let text = scan.string(scratch)?;
        let fits = match &mut self.values {
            Values::Timestamp(values) => values::timestamp(text).map(|micros| values.push(micros)),
            Values::Date(values) => values::date(text).map(|days| values.push(days)),
            _ => None,
        };
        if fits.is_none() {
            scan.rewind(start);
            return Err(self.refuse(scan, ""));
        }
        self.validity.append_non_null();
        Ok(())
    }

    #[cold]
    fn refuse(&self, scan: &mut Scanner<'_>, why: &'static str) -> Refusal {
        let numeric = matches!(scan.peek(), b'-' | b'0'..=b'9');
        let why = match &self.values {
            Values::Timestamp(_) if numeric => {
                " (declare a BIGINT and compute the time with to_timestamp_millis)"
            }
            _ => why,
        };
        refuse(scan, sql_type(self.field.data_type()), why)
    }
}

fn list(
    offsets: &mut Vec<i32>,
    items: &mut Column,
    scan: &mut Scanner<'_>,
    scratch: &mut String,
) -> Result<(), Refusal> {
    scan.take(b'[', "an array")?;
    if scan.peek() == b']' {
        scan.advance();
    } else {
        let first = items.len();
        loop {
            let index = items.len() - first;
            items.value(scan, scratch).map_err(|fault| fault.within(&format!("[{index}]")))?;
            match scan.peek() {
                b',' => scan.advance(),
                b']' => {
                    scan.advance();
                    break;
                }
                _ => return Err(scan.syntax("a comma or ]").into()),
            }
        }
    }
    let Ok(end) = i32::try_from(items.len()) else {
        return Err(Box::new(Fault::TooLarge { path: String::new() }));
    };
    offsets.push(end);
    Ok(())
}

/// A wrong type, with the text of the value that stands here; if that is no JSON at all, this is the fault.
#[cold]
fn refuse(scan: &mut Scanner<'_>, expected: String, why: &'static str) -> Refusal {
    scan.peek();
    let start = scan.position();
    match scan.skip_value() {
        Ok(()) => {
            let found = scan.text_from(start).to_owned();
            Box::new(Fault::Type { path: String::new(), expected, found, why })
        }
        Err(syntax) => syntax.into(),
    }
}

fn reason(fault: NumberFault, values: &Values, first: u8) -> &'static str {
    match (fault, values) {
        (NumberFault::Fraction, _) => " (it has a fraction)",
        (NumberFault::Overflow, _) => " (out of range)",
        (NumberFault::NotANumber, Values::Signed { .. } | Values::Unsigned { .. }) if first == b'"' => {
            " (not a number)"
        }
        (NumberFault::NotANumber, _) => "",
    }
}

#[cfg(test)]
#[path = "json_decode_tests.rs"]
mod tests;
