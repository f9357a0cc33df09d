//! Growing columns that can take back what a failed record put into them.
//!
//! Invariant: `validity` counts the rows of a column; a value that was begun but not counted is cut off by
//! [`Column::truncate`]. So a record that fails half-way leaves nothing behind.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, BooleanArray, BooleanBufferBuilder, Date32Array, Decimal128Array, Float32Array,
    Float64Array, Int8Array, Int16Array, Int32Array, Int64Array, LargeStringArray, ListArray,
    NullBufferBuilder, StringArray, StringViewArray, StructArray, TimestampMicrosecondArray, UInt8Array,
    UInt16Array, UInt32Array, UInt64Array,
};
use arrow::buffer::{NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, FieldRef, Fields as ArrowFields, TimeUnit};
use hashbrown::HashMap;

use super::values::{self, NumberFault};
use crate::error::{Error, Result};

/// The columns of one object, with what finds a column by its name.
pub(super) struct Fields {
    pub columns: Vec<Column>,
    by_name: HashMap<Box<str>, usize>,
}

pub(super) struct Column {
    pub field: FieldRef,
    /// The name as it stands between quotes, unless it needs escapes.
    pub plain_name: Option<Box<[u8]>>,
    pub values: Values,
    pub validity: NullBufferBuilder,
}

/// Values by kind; null rows hold a placeholder.
pub(super) enum Values {
    Boolean(BooleanBufferBuilder),
    /// Every signed integer, with the bounds of the declared type.
    Signed {
        values: Vec<i64>,
        min: i64,
        max: i64,
    },
    Unsigned {
        values: Vec<u64>,
        max: u64,
    },
    Float32(Vec<f32>),
    Float64(Vec<f64>),
    Text(Bytes),
    Date(Vec<i32>),
    Timestamp(Vec<i64>),
    Decimal {
        values: Vec<i128>,
        scale: i32,
        bound: i128,
    },
    List {
        offsets: Vec<i32>,
        items: Box<Column>,
    },
    Struct(Fields),
}

/// Strings end to end.
#[derive(Default)]
pub(super) struct Bytes {
    ends: Vec<i32>,
    data: Vec<u8>,
}

impl Bytes {
    /// False when the column would outgrow its 2 GiB.
    #[inline]
    pub fn push(&mut self, text: &str) -> bool {
        let Ok(end) = i32::try_from(self.data.len() + text.len()) else { return false };
        self.data.extend_from_slice(text.as_bytes());
        self.ends.push(end);
        true
    }

    fn truncate(&mut self, rows: usize) {
        self.ends.truncate(rows);
        self.data.truncate(self.ends.last().map_or(0, |end| *end as usize));
    }

    fn take(&mut self) -> (OffsetBuffer<i32>, Vec<u8>) {
        let mut offsets = Vec::with_capacity(self.ends.len() + 1);
        offsets.push(0);
        offsets.append(&mut self.ends);
        (OffsetBuffer::new(offsets.into()), renew(&mut self.data))
    }
}

impl Fields {
    /// # Errors
    /// A user error for a column whose type has no JSON form here.
    pub fn new(fields: &ArrowFields, path: &str) -> Result<Self> {
        let columns = fields
            .iter()
            .map(|field| Column::new(field, &format!("{path}{}", field.name())))
            .collect::<Result<Vec<_>>>()?;
        let by_name = fields.iter().enumerate().map(|(i, field)| (field.name().as_str().into(), i)).collect();
        Ok(Self { columns, by_name })
    }

    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    pub fn truncate(&mut self, rows: usize) {
        self.columns.iter_mut().for_each(|column| column.truncate(rows));
    }

    fn push_placeholder(&mut self) {
        self.columns.iter_mut().for_each(Column::push_null);
    }
}

impl Column {
    fn new(field: &FieldRef, path: &str) -> Result<Self> {
        let name = field.name().as_bytes();
        let plain = name.iter().all(|b| *b != b'"' && *b != b'\\' && *b >= 0x20);
        Ok(Self {
            field: Arc::clone(field),
            plain_name: plain.then(|| name.into()),
            values: Values::new(field.data_type(), path)?,
            validity: NullBufferBuilder::new(0),
        })
    }

    pub fn len(&self) -> usize {
        self.validity.len()
    }

    /// Drops every row from `rows` on, and what was begun after the last counted one.
    pub fn truncate(&mut self, rows: usize) {
        self.validity.truncate(rows);
        match &mut self.values {
            Values::Boolean(bits) => bits.truncate(rows),
            Values::Signed { values, .. } => values.truncate(rows),
            Values::Unsigned { values, .. } => values.truncate(rows),
            Values::Float32(values) => values.truncate(rows),
            Values::Float64(values) => values.truncate(rows),
            Values::Text(bytes) => bytes.truncate(rows),
            Values::Date(values) => values.truncate(rows),
            Values::Timestamp(values) => values.truncate(rows),
            Values::Decimal { values, .. } => values.truncate(rows),
            Values::List { offsets, items } => {
                offsets.truncate(rows + 1);
                items.truncate(offsets.last().map_or(0, |end| *end as usize));
            }
            Values::Struct(fields) => fields.truncate(rows),
        }
    }

    /// A null row, also in a NOT NULL field of a struct that is null itself.
    pub fn push_null(&mut self) {
        match &mut self.values {
            Values::Boolean(bits) => bits.append(false),
            Values::Signed { values, .. } => values.push(0),
            Values::Unsigned { values, .. } => values.push(0),
            Values::Float32(values) => values.push(0.0),
            Values::Float64(values) => values.push(0.0),
            Values::Text(bytes) => {
                bytes.push("");
            }
            Values::Date(values) => values.push(0),
            Values::Timestamp(values) => values.push(0),
            Values::Decimal { values, .. } => values.push(0),
            Values::List { offsets, .. } => offsets.push(offsets.last().copied().unwrap_or(0)),
            Values::Struct(fields) => fields.push_placeholder(),
        }
        self.validity.append_null();
    }

    /// Hands the rows out and starts again with room for as many.
    pub fn finish(&mut self) -> Result<ArrayRef> {
        let rows = self.len();
        let nulls = std::mem::replace(&mut self.validity, NullBufferBuilder::new(rows)).build();
        let data_type = self.field.data_type();
        Ok(match &mut self.values {
            Values::Boolean(bits) => Arc::new(BooleanArray::new(bits.finish(), nulls)),
            Values::Signed { values, .. } => signed(data_type, renew(values), nulls),
            Values::Unsigned { values, .. } => unsigned(data_type, renew(values), nulls),
            Values::Float32(values) => Arc::new(Float32Array::new(renew(values).into(), nulls)),
            Values::Float64(values) => Arc::new(Float64Array::new(renew(values).into(), nulls)),
            Values::Text(bytes) => text(data_type, bytes, nulls)?,
            Values::Date(values) => Arc::new(Date32Array::new(renew(values).into(), nulls)),
            Values::Timestamp(values) => {
                let array = TimestampMicrosecondArray::new(renew(values).into(), nulls);
                Arc::new(array.with_data_type(data_type.clone()))
            }
            Values::Decimal { values, .. } => {
                let array = Decimal128Array::new(renew(values).into(), nulls);
                Arc::new(array.with_data_type(data_type.clone()))
            }
            Values::List { offsets, items } => {
                let offsets = OffsetBuffer::new(std::mem::replace(offsets, vec![0]).into());
                Arc::new(ListArray::try_new(Arc::clone(&items.field), offsets, items.finish()?, nulls)?)
            }
            Values::Struct(fields) => {
                let children = fields.columns.iter_mut().map(Column::finish).collect::<Result<Vec<_>>>()?;
                let declared = fields.columns.iter().map(|column| Arc::clone(&column.field)).collect();
                Arc::new(StructArray::try_new_with_length(declared, children, nulls, rows)?)
            }
        })
    }
}

impl Values {
    fn new(data_type: &DataType, path: &str) -> Result<Self> {
        let signed = |min, max| Self::Signed { values: Vec::new(), min, max };
        let unsigned = |max| Self::Unsigned { values: Vec::new(), max };
        Ok(match data_type {
            DataType::Boolean => Self::Boolean(BooleanBufferBuilder::new(0)),
            DataType::Int8 => signed(i8::MIN.into(), i8::MAX.into()),
            DataType::Int16 => signed(i16::MIN.into(), i16::MAX.into()),
            DataType::Int32 => signed(i32::MIN.into(), i32::MAX.into()),
            DataType::Int64 => signed(i64::MIN, i64::MAX),
            DataType::UInt8 => unsigned(u8::MAX.into()),
            DataType::UInt16 => unsigned(u16::MAX.into()),
            DataType::UInt32 => unsigned(u32::MAX.into()),
            DataType::UInt64 => unsigned(u64::MAX),
            DataType::Float32 => Self::Float32(Vec::new()),
            DataType::Float64 => Self::Float64(Vec::new()),
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Binary => {
                Self::Text(Bytes::default())
            }
            DataType::Date32 => Self::Date(Vec::new()),
            DataType::Timestamp(TimeUnit::Microsecond, _) => Self::Timestamp(Vec::new()),
            DataType::Decimal128(precision, scale) => Self::Decimal {
                values: Vec::new(),
                scale: i32::from(*scale),
                bound: 10_i128.pow(u32::from(*precision).min(38)),
            },
            DataType::List(item) => {
                let items = Box::new(Column::new(item, &format!("{path}[]"))?);
                Self::List { offsets: vec![0], items }
            }
            DataType::Struct(fields) => Self::Struct(Fields::new(fields, &format!("{path}."))?),
            other => {
                return Err(Error::user(format!(
                    "column {path} has the type {other}, which JSON records cannot fill"
                ))
                .hint("Declare the column as VARCHAR and cast it in a computed column or a view."));
            }
        })
    }

    /// A number that is written as text, as JSON number or as string; false when it does not fit.
    pub fn push_number(&mut self, text: &str) -> Result<(), NumberFault> {
        match self {
            Self::Signed { values, min, max } => {
                let value = values::scaled(text, 0, true)?;
                let value = i64::try_from(value).map_err(|_| NumberFault::Overflow)?;
                if value < *min || value > *max {
                    return Err(NumberFault::Overflow);
                }
                values.push(value);
            }
            Self::Unsigned { values, max } => {
                let value = values::scaled(text, 0, true)?;
                let value = u64::try_from(value).map_err(|_| NumberFault::Overflow)?;
                if value > *max {
                    return Err(NumberFault::Overflow);
                }
                values.push(value);
            }
            Self::Float32(values) => values.push(values::float(text)?),
            Self::Float64(values) => values.push(values::float(text)?),
            Self::Decimal { values, scale, bound } => {
                let value = values::scaled(text, *scale, false)?;
                if value <= -*bound || value >= *bound {
                    return Err(NumberFault::Overflow);
                }
                values.push(value);
            }
            _ => return Err(NumberFault::NotANumber),
        }
        Ok(())
    }
}

fn renew<T>(values: &mut Vec<T>) -> Vec<T> {
    let room = values.len();
    std::mem::replace(values, Vec::with_capacity(room))
}

fn narrowed<T, N>(values: Vec<T>, narrow: impl Fn(T) -> N) -> ScalarBuffer<N>
where
    N: arrow::datatypes::ArrowNativeType,
{
    values.into_iter().map(narrow).collect::<Vec<N>>().into()
}

/// The values are within the declared type's bounds, so narrowing loses nothing.
fn signed(data_type: &DataType, values: Vec<i64>, nulls: Option<NullBuffer>) -> ArrayRef {
    match data_type {
        DataType::Int8 => Arc::new(Int8Array::new(narrowed(values, |v| v as i8), nulls)),
        DataType::Int16 => Arc::new(Int16Array::new(narrowed(values, |v| v as i16), nulls)),
        DataType::Int32 => Arc::new(Int32Array::new(narrowed(values, |v| v as i32), nulls)),
        _ => Arc::new(Int64Array::new(values.into(), nulls)),
    }
}

fn unsigned(data_type: &DataType, values: Vec<u64>, nulls: Option<NullBuffer>) -> ArrayRef {
    match data_type {
        DataType::UInt8 => Arc::new(UInt8Array::new(narrowed(values, |v| v as u8), nulls)),
        DataType::UInt16 => Arc::new(UInt16Array::new(narrowed(values, |v| v as u16), nulls)),
        DataType::UInt32 => Arc::new(UInt32Array::new(narrowed(values, |v| v as u32), nulls)),
        _ => Arc::new(UInt64Array::new(values.into(), nulls)),
    }
}

fn text(data_type: &DataType, bytes: &mut Bytes, nulls: Option<NullBuffer>) -> Result<ArrayRef> {
    let (offsets, data) = bytes.take();
    let data = data.into();
    Ok(match data_type {
        DataType::Binary => Arc::new(BinaryArray::try_new(offsets, data, nulls)?),
        DataType::LargeUtf8 => {
            let offsets: Vec<i64> = offsets.iter().map(|offset| i64::from(*offset)).collect();
            Arc::new(LargeStringArray::try_new(OffsetBuffer::new(offsets.into()), data, nulls)?)
        }
        DataType::Utf8View => Arc::new(StringViewArray::from(&StringArray::try_new(offsets, data, nulls)?)),
        _ => Arc::new(StringArray::try_new(offsets, data, nulls)?),
    })
}
