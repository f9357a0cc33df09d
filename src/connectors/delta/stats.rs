//! Statistics of a data file as Delta's `stats`, read off the Parquet footer, so that readers can skip files.
//!
//! Bounds are exact or absent: a text bound that Parquet cut off, a float column that holds a NaN and a decimal beyond
//! the precision of a JSON number have none.
//!
//! Floats are counted here and have no statistics in Parquet itself: Parquet's leave NaN out, which SQL orders above
//! everything, so a reader would skip rows of `x > 5` that the stream gives.

use std::collections::BTreeMap;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::{max, min};
use arrow::datatypes::{DataType, Float32Type, Float64Type, Schema};
use parquet::data_type::ByteArray;
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};
use parquet::file::statistics::{Statistics, ValueStatistics};
use serde_json::{Map, Number, Value, json};

use crate::connectors::partition::{date_text, time_text};

/// Columns with statistics, by Delta's default.
const MAX_COLUMNS: usize = 32;

/// Bounds of one column over the row groups so far, in a form that orders as the column does.
#[derive(Debug, Clone, PartialEq, PartialOrd)]
enum Bound {
    Long(i64),
    Double(f64),
    Text(String),
}

/// Bounds of the float columns of a file, by column.
#[derive(Debug, Default)]
pub struct Floats(BTreeMap<usize, FloatColumn>);

#[derive(Debug, Default)]
struct FloatColumn {
    nulls: u64,
    /// In the order of SQL, in which NaN is the greatest (or, with its sign, the least).
    range: Option<(f64, f64)>,
}

impl Floats {
    pub fn add(&mut self, rows: &RecordBatch) {
        for (at, column) in rows.columns().iter().enumerate() {
            let range = match column.data_type() {
                DataType::Float64 => {
                    let values = column.as_primitive::<Float64Type>();
                    min(values).zip(max(values))
                }
                DataType::Float32 => {
                    let values = column.as_primitive::<Float32Type>();
                    min(values).zip(max(values)).map(|(low, high)| (f64::from(low), f64::from(high)))
                }
                _ => continue,
            };
            let known = self.0.entry(at).or_default();
            known.nulls += column.null_count() as u64;
            known.range = match (known.range, range) {
                (Some((low, high)), Some(more)) => {
                    let least = if more.0.total_cmp(&low).is_lt() { more.0 } else { low };
                    Some((least, if more.1.total_cmp(&high).is_gt() { more.1 } else { high }))
                }
                (known, range) => known.or(range),
            };
        }
    }
}

impl FloatColumn {
    /// Without NaN and infinity, which JSON has not; a zero stands for both zeros.
    fn bounds(&self) -> Option<(Bound, Bound)> {
        let (low, high) = self.range.filter(|(low, high)| low.is_finite() && high.is_finite())?;
        let (low, high) = (if low == 0.0 { -0.0 } else { low }, if high == 0.0 { 0.0 } else { high });
        Some((Bound::Double(low), Bound::Double(high)))
    }
}

/// The text of the `stats` field.
pub fn stats_of(schema: &Schema, footer: &ParquetMetaData, floats: &Floats) -> String {
    let (mut low, mut high, mut nulls) = (Map::new(), Map::new(), Map::new());
    for (at, field) in schema.fields().iter().enumerate().take(MAX_COLUMNS) {
        let found = match floats.0.get(&at) {
            Some(column) => Some((column.nulls, column.bounds())),
            None => column_stats(field.name(), footer),
        };
        let Some((null_count, bounds)) = found else { continue };
        nulls.insert(field.name().clone(), null_count.into());
        if let Some((least, greatest)) = bounds
            && let (Some(least), Some(greatest)) =
                (shown(&least, field.data_type()), shown(&greatest, field.data_type()))
        {
            low.insert(field.name().clone(), least);
            high.insert(field.name().clone(), greatest);
        }
    }
    let rows = footer.file_metadata().num_rows();
    json!({ "numRecords": rows, "minValues": low, "maxValues": high, "nullCount": nulls }).to_string()
}

/// Number of NULLs and bounds; `None` for a nested column.
fn column_stats(name: &str, footer: &ParquetMetaData) -> Option<(u64, Option<(Bound, Bound)>)> {
    // Leaf columns of nested fields have longer paths.
    let leaf = footer.file_metadata().schema_descr().columns().iter().position(|column| {
        let parts = column.path().parts();
        parts.len() == 1 && parts[0] == name
    })?;
    let chunks: Vec<&ColumnChunkMetaData> =
        footer.row_groups().iter().map(|group| group.column(leaf)).collect();
    let nulls: Option<u64> =
        chunks.iter().map(|chunk| chunk.statistics().and_then(Statistics::null_count_opt)).sum();
    Some((nulls?, bounds(&chunks)))
}

/// Least and greatest value; `None` when there is none or when one is not exact.
fn bounds(chunks: &[&ColumnChunkMetaData]) -> Option<(Bound, Bound)> {
    let mut range: Option<(Bound, Bound)> = None;
    for chunk in chunks {
        let statistics = chunk.statistics()?;
        // A chunk without any value has no bounds but hides nothing either.
        if statistics.null_count_opt() == u64::try_from(chunk.num_values()).ok() {
            continue;
        }
        let (low, high) = chunk_bounds(statistics)?;
        range = Some(match range {
            None => (low, high),
            Some((least, greatest)) => {
                (if low < least { low } else { least }, if high > greatest { high } else { greatest })
            }
        });
    }
    range
}

fn chunk_bounds(chunk: &Statistics) -> Option<(Bound, Bound)> {
    fn exact<T>(values: &ValueStatistics<T>, bound: impl Fn(&T) -> Option<Bound>) -> Option<(Bound, Bound)> {
        if !values.min_is_exact() || !values.max_is_exact() {
            return None;
        }
        Some((bound(values.min_opt()?)?, bound(values.max_opt()?)?))
    }
    match chunk {
        Statistics::Int32(values) => exact(values, |v| Some(Bound::Long(i64::from(*v)))),
        Statistics::Int64(values) => exact(values, |v| Some(Bound::Long(*v))),
        Statistics::ByteArray(values) => exact(values, |v: &ByteArray| {
            std::str::from_utf8(v.data()).ok().map(|text| Bound::Text(text.to_owned()))
        }),
        _ => None,
    }
}

fn shown(bound: &Bound, kind: &DataType) -> Option<Value> {
    Some(match (bound, kind) {
        (Bound::Long(v), DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64) => (*v).into(),
        (Bound::Long(v), DataType::Date32) => date_text(*v).into(),
        (Bound::Long(v), DataType::Timestamp(_, _)) => time_text(*v).into(),
        // Up to 15 digits a JSON number, read as a double, is the same decimal.
        (Bound::Long(v), DataType::Decimal128(precision, scale)) if *precision <= 15 && *scale >= 0 => {
            Value::Number(Number::from_f64(*v as f64 / 10f64.powi(i32::from(*scale)))?)
        }
        (Bound::Double(v), DataType::Float32 | DataType::Float64) => Value::Number(Number::from_f64(*v)?),
        (Bound::Text(v), DataType::Utf8) => v.clone().into(),
        _ => return None,
    })
}
