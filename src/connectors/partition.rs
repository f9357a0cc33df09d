//! `partition_by`: its entries and what they take, the rows of each partition, and how Delta writes its values.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, Date32Array, RecordBatch, Scalar, TimestampMicrosecondArray, UInt32Array,
};
use arrow::compute::cast;
use arrow::compute::kernels::cmp::not_distinct;
use arrow::datatypes::{DataType, Date32Type, Field, Int32Type, Schema, TimestampMicrosecondType};
use arrow::row::{OwnedRow, RowConverter, SortField};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use hashbrown::HashMap;

use crate::error::{Error, Result};
use crate::sql::options::nearest;
use crate::stream::{civil, timestamp_type};

const DAY: i64 = 86_400_000_000;
const HOUR: i64 = 3_600_000_000;
const MINUTE: i64 = 60_000_000;

/// One entry of `partition_by`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partitioning {
    pub transform: Transform,
    pub column: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transform {
    /// The column itself.
    Identity,
    /// INT `c_year`.
    Year,
    /// DATE `c_month`, the first of the month.
    Month,
    /// DATE `c_day`.
    Day,
    /// TIMESTAMP `c_hour`, cut to the hour.
    Hour,
    /// TIMESTAMP `c_minute`, cut to the minute.
    Minute,
}

impl Partitioning {
    /// Name of the partition column.
    pub fn name(&self) -> String {
        match self.transform {
            Transform::Identity => self.column.clone(),
            Transform::Year => format!("{}_year", self.column),
            Transform::Month => format!("{}_month", self.column),
            Transform::Day => format!("{}_day", self.column),
            Transform::Hour => format!("{}_hour", self.column),
            Transform::Minute => format!("{}_minute", self.column),
        }
    }

    /// Type of a partition column that is made, not taken over.
    pub fn data_type(&self) -> DataType {
        match self.transform {
            Transform::Identity => DataType::Utf8,
            Transform::Year => DataType::Int32,
            Transform::Month | Transform::Day => DataType::Date32,
            Transform::Hour | Transform::Minute => timestamp_type(),
        }
    }

    /// The partition column of a batch whose columns have the types of the table.
    ///
    /// # Errors
    /// Internal: a column that [`check`] should have refused.
    pub fn values(&self, rows: &RecordBatch) -> Result<ArrayRef> {
        let column = rows
            .column_by_name(&self.column)
            .ok_or_else(|| Error::internal(format!("the rows lost their column {}", self.column)))?;
        if self.transform == Transform::Identity {
            return Ok(Arc::clone(column));
        }
        if column.data_type() == &DataType::Date32 {
            let days = column.as_primitive::<Date32Type>();
            return Ok(match self.transform {
                Transform::Year => Arc::new(days.unary::<_, Int32Type>(|day| civil(day.into()).0 as i32)),
                Transform::Month => Arc::new(days.unary::<_, Date32Type>(|day| first_of_month(day.into()))),
                _ => Arc::clone(column),
            });
        }
        let micros = cast(column, &timestamp_type())?;
        let micros = micros.as_primitive::<TimestampMicrosecondType>();
        let day = |t: i64| t.div_euclid(DAY);
        Ok(match self.transform {
            Transform::Year => Arc::new(micros.unary::<_, Int32Type>(|t| civil(day(t)).0 as i32)),
            Transform::Month => Arc::new(micros.unary::<_, Date32Type>(|t| first_of_month(day(t)))),
            Transform::Day => {
                let days: Date32Array = micros.unary(|t| day(t) as i32);
                Arc::new(days)
            }
            _ => {
                let unit = if self.transform == Transform::Hour { HOUR } else { MINUTE };
                let cut: TimestampMicrosecondArray = micros.unary(|t| t.saturating_sub(t.rem_euclid(unit)));
                Arc::new(cut.with_timezone("UTC"))
            }
        })
    }
}

/// `'day(event_time), country'`.
///
/// # Errors
/// User: an entry that is not known, empty or given twice.
pub fn parse_list(text: &str) -> Result<Vec<Partitioning>> {
    let mut list = Vec::new();
    for entry in text.split(',') {
        let part = partitioning(entry.trim())?;
        if list.contains(&part) {
            return Err(Error::user(format!("partition_by = '{text}' names {} twice", entry.trim())));
        }
        list.push(part);
    }
    Ok(list)
}

fn partitioning(text: &str) -> Result<Partitioning> {
    let hint = "Use a column, or year, month, day, hour or minute of a TIMESTAMP column.";
    let Some((name, rest)) = text.split_once('(') else {
        return match text.is_empty() {
            true => Err(Error::user("partition_by has an empty entry").hint(hint)),
            false => Ok(Partitioning { transform: Transform::Identity, column: text.to_owned() }),
        };
    };
    let transform = match name.trim().to_ascii_lowercase().as_str() {
        "year" => Transform::Year,
        "month" => Transform::Month,
        "day" => Transform::Day,
        "hour" => Transform::Hour,
        "minute" => Transform::Minute,
        other => return Err(Error::user(format!("partition_by: {other}() is not known")).hint(hint)),
    };
    let column = rest.trim_end().strip_suffix(')').map(str::trim);
    match column {
        Some(column) if !column.is_empty() => Ok(Partitioning { transform, column: column.to_owned() }),
        Some(_) => Err(Error::user(format!("partition_by: {text} names no column")).hint(hint)),
        None => Err(Error::user(format!("partition_by: {text} lacks its closing bracket")).hint(hint)),
    }
}

/// Whether the columns, of the types in which they are stored, can be partitioned so.
///
/// # Errors
/// User: a column is missing, or of a type that its entry does not take.
pub fn check(list: &[Partitioning], columns: &Schema) -> Result<()> {
    for part in list {
        match columns.field_with_name(&part.column) {
            Ok(field) => check_type(part, field)?,
            Err(_) => return Err(unknown_column(part, columns)),
        }
    }
    Ok(())
}

fn unknown_column(part: &Partitioning, columns: &Schema) -> Error {
    let known: Vec<String> = columns.fields().iter().map(|field| field.name().clone()).collect();
    let message = format!("partition_by names {}, which is no column of the rows", part.column);
    Error::user(message).hint(match nearest(&part.column, &known) {
        Some(near) => format!("Did you mean {near}?"),
        None => format!("The columns are {}.", known.join(", ")),
    })
}

fn check_type(part: &Partitioning, source: &Field) -> Result<()> {
    use DataType::{Boolean, Date32, Decimal128, Int8, Int16, Int32, Int64, Timestamp, Utf8};
    let kind = source.data_type();
    let fits = match part.transform {
        Transform::Identity => matches!(
            kind,
            Boolean | Int8 | Int16 | Int32 | Int64 | Utf8 | Date32 | Decimal128(_, _) | Timestamp(_, _)
        ),
        Transform::Hour | Transform::Minute => matches!(kind, Timestamp(_, _)),
        Transform::Year | Transform::Month | Transform::Day => matches!(kind, Timestamp(_, _) | Date32),
    };
    if fits {
        return Ok(());
    }
    let (wanted, hint) = match part.transform {
        Transform::Identity => ("a type that can partition a table", "Partition by a text, number or time."),
        Transform::Hour | Transform::Minute => {
            ("TIMESTAMP", "Partition by the event time, or by a plain column.")
        }
        _ => ("TIMESTAMP or DATE", "Partition by the event time, or by a plain column."),
    };
    Err(Error::user(format!("partition_by: {} is {kind}, not {wanted}", part.column)).hint(hint))
}

/// Splits rows by their partition values.
pub struct Splitter {
    list: Vec<Partitioning>,
    converter: Option<RowConverter>,
}

/// The partitions of a batch, in the order of their first rows.
pub struct Parts {
    columns: Vec<ArrayRef>,
    pub list: Vec<Part>,
}

/// The rows of one partition.
pub struct Part {
    /// The partition values; `None` without `partition_by`.
    pub key: Option<OwnedRow>,
    /// A row of it.
    first: usize,
    /// Its rows in their order; `None` where the batch has no others.
    pub rows: Option<UInt32Array>,
}

impl Splitter {
    pub fn new(list: Vec<Partitioning>) -> Self {
        Self { list, converter: None }
    }

    /// The partitions of a batch that has rows, in columns of the types that [`check`] saw.
    ///
    /// # Errors
    /// Internal: other columns.
    pub fn split(&mut self, rows: &RecordBatch) -> Result<Parts> {
        let columns = self.list.iter().map(|part| part.values(rows)).collect::<Result<Vec<_>>>()?;
        if columns.is_empty() {
            return Ok(Parts { columns, list: vec![Part { key: None, first: 0, rows: None }] });
        }
        let converter = self.converter(&columns)?;
        if uniform(&columns)? {
            let first: Vec<ArrayRef> = columns.iter().map(|column| column.slice(0, 1)).collect();
            let key = Some(converter.convert_columns(&first)?.row(0).owned());
            return Ok(Parts { columns, list: vec![Part { key, first: 0, rows: None }] });
        }
        let keys = converter.convert_columns(&columns)?;
        let mut found = HashMap::new();
        let mut groups: Vec<(usize, Vec<u32>)> = Vec::new();
        // Rows come nearly in order of time, so most stay in the group of the row before.
        let mut last = None;
        for (row, key) in keys.iter().enumerate() {
            let group = match last {
                Some((at, known)) if known == key => at,
                _ => *found.entry(key).or_insert_with(|| {
                    groups.push((row, Vec::new()));
                    groups.len() - 1
                }),
            };
            last = Some((group, key));
            groups[group].1.push(row as u32);
        }
        let part = |(first, picked): (usize, Vec<u32>)| Part {
            key: Some(keys.row(first).owned()),
            first,
            rows: Some(UInt32Array::from(picked)),
        };
        let list = groups.into_iter().map(part).collect();
        Ok(Parts { columns, list })
    }

    fn converter(&mut self, columns: &[ArrayRef]) -> Result<&mut RowConverter> {
        match &mut self.converter {
            Some(converter) => Ok(converter),
            empty => {
                let fields = columns.iter().map(|c| SortField::new(c.data_type().clone())).collect();
                Ok(empty.insert(RowConverter::new(fields)?))
            }
        }
    }
}

impl Parts {
    /// The values of a partition as the Delta protocol writes them.
    ///
    /// # Errors
    /// As [`value_text`].
    pub fn values(&self, part: &Part) -> Result<Vec<Option<String>>> {
        self.columns.iter().map(|column| value_text(column, part.first)).collect()
    }
}

/// Whether all rows have the partition values of the first.
fn uniform(columns: &[ArrayRef]) -> Result<bool> {
    for column in columns {
        let same = not_distinct(column, &Scalar::new(column.slice(0, 1)))?;
        if same.true_count() != column.len() {
            return Ok(false);
        }
    }
    Ok(true)
}

fn first_of_month(day: i64) -> i32 {
    (day - i64::from(civil(day).2) + 1) as i32
}

/// `2024-02-29`.
pub fn date_text(days: i64) -> String {
    let (year, month, day) = civil(days);
    format!("{year:04}-{month:02}-{day:02}")
}

/// `2024-02-29T23:59:59.123456Z`: says its zone itself, so no reader takes it for local time.
pub fn time_text(micros: i64) -> String {
    let date = date_text(micros.div_euclid(DAY));
    let of_day = micros.rem_euclid(DAY);
    let (hour, minute, second) = (of_day / HOUR, of_day / 60_000_000 % 60, of_day / 1_000_000 % 60);
    format!("{date}T{hour:02}:{minute:02}:{second:02}.{:06}Z", of_day % 1_000_000)
}

/// A partition value as the Delta protocol writes it; `None` for NULL, and for the empty text, which the protocol
/// cannot tell from NULL.
///
/// # Errors
/// Internal: a type that cannot be shown.
pub fn value_text(column: &ArrayRef, row: usize) -> Result<Option<String>> {
    if column.is_null(row) {
        return Ok(None);
    }
    if let Some(times) = column.as_primitive_opt::<TimestampMicrosecondType>() {
        return Ok(Some(time_text(times.value(row))));
    }
    let text = ArrayFormatter::try_new(column.as_ref(), &FormatOptions::new())?.value(row).to_string();
    Ok(Some(text).filter(|text| !text.is_empty()))
}

/// `name=value/name=value/`, as Hive names folders.
pub fn folders<'a>(names: impl IntoIterator<Item = &'a String>, values: &[Option<String>]) -> String {
    names.into_iter().zip(values).map(|(name, value)| folder(name, value.as_deref())).collect()
}

fn folder(name: &str, value: Option<&str>) -> String {
    match value {
        None => format!("{}=__HIVE_DEFAULT_PARTITION__/", encode(name)),
        Some(value) => format!("{}={}/", encode(name), encode(value)),
    }
}

/// Percent-encodes everything that a folder name or a URI may not hold.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' => out.push(byte as char),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// The path of a file as the log holds it: a URI, so the percent signs of folder names are encoded once more.
pub fn uri(path: &str) -> String {
    path.replace('%', "%25")
}
