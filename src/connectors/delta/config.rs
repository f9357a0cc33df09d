//! Options of a Delta sink and how its rows are partitioned.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, RecordBatch, TimestampMicrosecondArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimestampMicrosecondType};

use crate::error::{Error, Result};
use crate::sql::options::Options;
use crate::stream::timestamp_type;

#[derive(Debug, Clone)]
pub struct DeltaConfig {
    pub location: String,
    pub partition_by: Vec<Partitioning>,
    /// Bytes at which a file is closed within an epoch.
    pub target_file_size: usize,
}

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
        }
    }

    fn data_type(&self) -> DataType {
        match self.transform {
            Transform::Identity => DataType::Utf8,
            Transform::Year => DataType::Int32,
            Transform::Month | Transform::Day => DataType::Date32,
            Transform::Hour => timestamp_type(),
        }
    }
}

impl DeltaConfig {
    /// # Errors
    /// User: a missing location, a partitioning that is not known.
    pub fn from_options(options: &mut Options) -> Result<Self> {
        let location = options.required("location")?;
        let partition_by = match options.string("partition_by")? {
            Some(text) => text.split(',').map(|part| partitioning(part.trim())).collect::<Result<_>>()?,
            None => Vec::new(),
        };
        let target_file_size = match options.string("target_file_size")? {
            Some(text) => bytes(&text).ok_or_else(|| {
                Error::user(format!("target_file_size = '{text}' is no size"))
                    .hint("Write a size such as '256MB'.")
            })?,
            None => 256 << 20,
        };
        match options.choice("mode", &["append", "upsert", "changelog"])? {
            None | Some(0) => {}
            Some(_) => {
                let hint = "This version appends only; the other modes come with GROUP BY.";
                return Err(
                    Error::user(format!("{}: only mode = 'append' can run yet", options.owner())).hint(hint)
                );
            }
        }
        Ok(Self { location, partition_by, target_file_size })
    }

    /// Columns of the table: those of the rows, then the partition columns that are made from them.
    ///
    /// # Errors
    /// User: a partitioning by a column that is not there or has no time.
    pub fn table_schema(&self, rows: &Schema) -> Result<SchemaRef> {
        let mut fields: Vec<Field> = rows
            .fields()
            .iter()
            .map(|f| Field::new(f.name(), f.data_type().clone(), f.is_nullable()))
            .collect();
        for part in &self.partition_by {
            let Ok(field) = rows.field_with_name(&part.column) else {
                let known: Vec<&str> = rows.fields().iter().map(|f| f.name().as_str()).collect();
                return Err(Error::user(format!(
                    "partition_by names {}, which is no column of the rows",
                    part.column
                ))
                .hint(format!("The columns are {}.", known.join(", "))));
            };
            if part.transform == Transform::Identity {
                continue;
            }
            if !matches!(field.data_type(), DataType::Timestamp(_, _) | DataType::Date32) {
                let message =
                    format!("partition_by: {} is {}, no TIMESTAMP or DATE", part.column, field.data_type());
                return Err(Error::user(message).hint("Partition by the event time, or by a plain column."));
            }
            fields.push(Field::new(part.name(), part.data_type(), field.is_nullable()));
        }
        Ok(Arc::new(Schema::new(fields)))
    }

    /// The partition columns of a batch, in the order of `partition_by`.
    ///
    /// # Errors
    /// Internal: a column that `table_schema` should have refused.
    pub fn partition_columns(&self, rows: &RecordBatch) -> Result<Vec<ArrayRef>> {
        self.partition_by.iter().map(|part| partition_column(part, rows)).collect()
    }
}

fn partition_column(part: &Partitioning, rows: &RecordBatch) -> Result<ArrayRef> {
    let column = rows
        .column_by_name(&part.column)
        .ok_or_else(|| Error::internal(format!("the rows lost their column {}", part.column)))?;
    if part.transform == Transform::Identity {
        return Ok(Arc::clone(column));
    }
    let micros = cast(column, &timestamp_type())?;
    let micros = micros.as_primitive::<TimestampMicrosecondType>();
    const DAY: i64 = 86_400_000_000;
    let days = |month: bool| -> arrow::array::Date32Array {
        micros.unary(|t| {
            let day = t.div_euclid(DAY);
            (if month { day - i64::from(civil(day).2) + 1 } else { day }) as i32
        })
    };
    Ok(match part.transform {
        Transform::Year => {
            Arc::new(micros.unary::<_, arrow::datatypes::Int32Type>(|t| civil(t.div_euclid(DAY)).0))
        }
        Transform::Month => Arc::new(days(true)),
        Transform::Day => Arc::new(days(false)),
        _ => {
            let hours: TimestampMicrosecondArray = micros.unary(|t| t - t.rem_euclid(3_600_000_000));
            Arc::new(hours.with_timezone("UTC"))
        }
    })
}

/// Year, month and day of a day number since 1970-01-01 (Howard Hinnant, *chrono-compatible low-level date algorithms*).
pub fn civil(days: i64) -> (i32, u32, u32) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year as i32, month as u32, day as u32)
}

fn partitioning(text: &str) -> Result<Partitioning> {
    let Some((name, rest)) = text.split_once('(') else {
        return Ok(Partitioning { transform: Transform::Identity, column: text.to_owned() });
    };
    let transform = match name.trim().to_ascii_lowercase().as_str() {
        "year" => Transform::Year,
        "month" => Transform::Month,
        "day" => Transform::Day,
        "hour" => Transform::Hour,
        other => {
            let hint = "Use a column, or year, month, day or hour of a TIMESTAMP column.";
            return Err(Error::user(format!("partition_by: {other}() is not known")).hint(hint));
        }
    };
    let column = rest.trim_end().strip_suffix(')').unwrap_or(rest).trim();
    Ok(Partitioning { transform, column: column.to_owned() })
}

fn bytes(text: &str) -> Option<usize> {
    let text = text.trim().to_ascii_lowercase();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match text[digits..].trim() {
        "" | "b" => 1,
        "kb" | "k" => 1 << 10,
        "mb" | "m" => 1 << 20,
        "gb" | "g" => 1 << 30,
        _ => return None,
    };
    text[..digits].parse::<usize>().ok()?.checked_mul(unit).filter(|size| *size > 0)
}
