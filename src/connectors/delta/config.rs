//! Options of a Delta sink, the columns of its table, and the types that Delta can hold.
//!
//! The table has the columns of the rows, then those that `partition_by` makes of them (`day(t)` → DATE `t_day`).
//! Every column is nullable in the table: a NOT NULL of today's SQL must not forbid tomorrow's rows.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};

use super::committer::STATE_PROPERTY;
use crate::connectors::partition::{self, Partitioning, Transform, parse_list};
use crate::error::{Error, Result};
use crate::sql::options::{Options, parse_duration, parse_size};
use crate::stream::{ChangeBatch, timestamp_type};

/// Characters that a column name of a Delta table cannot have (without column mapping).
const BAD_IN_NAMES: &[char] = &[' ', ',', ';', '{', '}', '(', ')', '\n', '\t', '='];

#[derive(Debug, Clone)]
pub struct DeltaConfig {
    pub location: String,
    /// The location of the table whose rows those of this one are to replace.
    pub stands_for: Option<String>,
    pub partition_by: Vec<Partitioning>,
    /// Bytes at which a file is closed within an epoch, and which compaction aims at.
    pub target_file_size: usize,
    pub codec: Codec,
    pub mode: Mode,
    pub on_schema_change: OnSchemaChange,
    /// How often small files are merged, and how old a file must be for it; `None`: never.
    pub compact_interval: Option<Duration>,
    /// How long files stay that no longer belong to the table; `None`: for ever.
    pub vacuum_retention: Option<Duration>,
}

/// What becomes of columns that the rows have and the table has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnSchemaChange {
    /// The start is refused.
    Fail,
    /// The table gets them, NULL in the rows before. A column that the rows no longer have stays, NULL from then on.
    AddColumns,
}

/// A duration, or `off`.
struct Every(Option<Duration>);

impl FromStr for Every {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text.eq_ignore_ascii_case("off") {
            true => Ok(Self(None)),
            false => parse_duration(text).map(|duration| Self(Some(duration))).ok_or(()),
        }
    }
}

const COMPACT_INTERVAL: Duration = Duration::from_secs(10 * 60);
/// That of Delta itself: a query that began on an older version has this long.
const VACUUM_RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);

/// What an epoch does to the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// Adds rows.
    Append,
    /// Adds every change, with its weight (+1: holds from now on, −1: no longer) and the epoch that made it.
    Changelog,
    /// Keeps one row per key: replaces it, or takes it away.
    Upsert { key: Vec<String> },
}

impl Mode {
    /// The key columns; none without upsert.
    pub fn key(&self) -> &[String] {
        match self {
            Self::Upsert { key } => key,
            Self::Append | Self::Changelog => &[],
        }
    }
}

/// Columns that a changelog adds behind those of the rows.
pub const CHANGELOG_COLUMNS: [&str; 2] = ["_weight", "_epoch"];

/// How pages are compressed. Snappy is the default: the cheapest to write, and every reader knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    Snappy,
    /// Level 1: about a quarter smaller, at about twice the cost of Snappy.
    Zstd,
    None,
}

impl DeltaConfig {
    /// # Errors
    /// User: a missing location, a value that is not known, a mode that cannot run yet.
    pub fn from_options(options: &mut Options) -> Result<Self> {
        let location = options.required("location")?;
        let partition_by = match options.string("partition_by")? {
            Some(text) => parse_list(&text)?,
            None => Vec::new(),
        };
        let target_file_size = match options.string("target_file_size")? {
            Some(text) => parse_size(&text).and_then(|size| size.try_into().ok()).ok_or_else(|| {
                Error::user(format!("target_file_size = '{text}' is no size"))
                    .hint("Write a size such as '256MB'.")
            })?,
            None => 256 << 20,
        };
        let codec = match options.choice("compression", &["snappy", "zstd", "uncompressed"])? {
            None | Some(0) => Codec::Snappy,
            Some(1) => Codec::Zstd,
            Some(_) => Codec::None,
        };
        let mode = match options.choice("mode", &["append", "upsert", "changelog"])? {
            None | Some(0) => Mode::Append,
            Some(1) => {
                let key = options.required("key")?;
                Mode::Upsert { key: key.split(',').map(|column| column.trim().to_owned()).collect() }
            }
            Some(_) => Mode::Changelog,
        };
        let on_schema_change = match options.choice("on_schema_change", &["fail", "add_columns"])? {
            None | Some(0) => OnSchemaChange::Fail,
            Some(_) => OnSchemaChange::AddColumns,
        };
        let every = "a duration such as '1 hour', or 'off'";
        let compact_interval = options.parse::<Every>("compact_interval", every)?;
        let vacuum_retention = options.parse::<Every>("vacuum_retention", every)?;
        Ok(Self {
            location,
            stands_for: None,
            partition_by,
            target_file_size,
            codec,
            mode,
            on_schema_change,
            compact_interval: compact_interval.map_or(Some(COMPACT_INTERVAL), |every| every.0),
            vacuum_retention: vacuum_retention.map_or(Some(VACUUM_RETENTION), |every| every.0),
        })
    }

    /// Columns of the table: those of the rows in the types that Delta knows, then the partition columns that are
    /// made from them.
    ///
    /// # Errors
    /// User: a column whose type or name Delta cannot hold, a partitioning by a column that is not there or that does
    /// not fit.
    pub fn table_schema(&self, rows: &Schema) -> Result<SchemaRef> {
        let mut fields: Vec<Field> = Vec::with_capacity(rows.fields().len() + self.partition_by.len());
        for field in rows.fields() {
            check_name(field.name())?;
            let stored = stored_type(field.data_type()).map_err(|error| {
                let message = format!("column {}: {}", field.name(), error.message());
                Error::user(message).hint(error.hint_text().unwrap_or_default())
            })?;
            fields.push(Field::new(field.name(), stored, true));
        }
        partition::check(&self.partition_by, &Schema::new(fields.clone()))?;
        let added = self.partition_by.iter().filter(|part| part.transform != Transform::Identity);
        fields.extend(added.map(|part| Field::new(part.name(), part.data_type(), true)));
        check_duplicates(&fields)?;
        let plain = |field: &Field| self.partition_by.iter().any(|part| part.name() == *field.name());
        if fields.iter().all(plain) {
            let message = "partition_by names every column, so no column is left for the files";
            return Err(Error::user(message).hint("Leave at least one column out."));
        }
        Ok(Arc::new(Schema::new(fields)))
    }

    /// The rows as the table gets them: a changelog adds [`CHANGELOG_COLUMNS`].
    ///
    /// # Errors
    /// User: a column of the rows has the name of one that is added.
    pub fn stored_rows(&self, rows: &SchemaRef) -> Result<SchemaRef> {
        if self.mode != Mode::Changelog {
            return Ok(Arc::clone(rows));
        }
        if let Some(taken) = CHANGELOG_COLUMNS.iter().find(|name| rows.column_with_name(name).is_some()) {
            return Err(Error::user(format!("the column {taken} is one that mode = 'changelog' adds"))
                .hint("Give the column of the view another name."));
        }
        let added = CHANGELOG_COLUMNS.map(|name| Arc::new(Field::new(name, DataType::Int64, false)));
        let fields: Vec<FieldRef> = rows.fields().iter().cloned().chain(added).collect();
        Ok(Arc::new(Schema::new(fields)))
    }

    /// The rows of a change as the table gets them.
    ///
    /// # Errors
    /// Internal, from arrow.
    pub fn stored(&self, batch: &ChangeBatch, epoch: u64) -> Result<RecordBatch> {
        if self.mode != Mode::Changelog {
            return Ok(batch.rows.clone());
        }
        let rows = batch.rows.num_rows();
        let weights = batch.weights.clone().unwrap_or_else(|| Int64Array::from(vec![1; rows]));
        let epochs = Int64Array::from(vec![i64::try_from(epoch).unwrap_or(i64::MAX); rows]);
        let mut columns = batch.rows.columns().to_vec();
        columns.extend([Arc::new(weights) as ArrayRef, Arc::new(epochs)]);
        Ok(RecordBatch::try_new(self.stored_rows(&batch.rows.schema())?, columns)?)
    }

    /// Properties of a table that the state `state_id` creates. Delta forgets removed files after 7 days unless told
    /// otherwise; who keeps them longer wants other programs to know.
    pub fn properties(&self, state_id: &str) -> BTreeMap<&'static str, String> {
        let mut properties = BTreeMap::from([(STATE_PROPERTY, state_id.to_owned())]);
        if let Some(kept) = self.vacuum_retention.filter(|kept| *kept > VACUUM_RETENTION) {
            let seconds = format!("interval {} seconds", kept.as_secs());
            properties.insert("delta.deletedFileRetentionDuration", seconds);
        }
        properties
    }

    /// Columns that `partition_by` adds to those of the rows: `SELECT *` leaves them out.
    pub fn added_columns(&self) -> Vec<String> {
        let added = self.partition_by.iter().filter(|part| part.transform != Transform::Identity);
        added.map(Partitioning::name).collect()
    }

    /// Names of the partition columns, in the order of `partition_by`.
    pub fn partition_names(&self) -> Vec<String> {
        self.partition_by.iter().map(Partitioning::name).collect()
    }
}

fn check_name(name: &str) -> Result<()> {
    match name.contains(BAD_IN_NAMES) || name.is_empty() {
        false => Ok(()),
        true => Err(Error::user(format!("the column name \"{name}\" cannot be stored in a Delta table"))
            .hint("Give it a name without blanks and brackets: AS some_name.")),
    }
}

/// Delta compares column names without regard to case.
fn check_duplicates(fields: &[Field]) -> Result<()> {
    let lower: Vec<String> = fields.iter().map(|field| field.name().to_lowercase()).collect();
    for (at, name) in lower.iter().enumerate() {
        if lower[..at].contains(name) {
            let message = format!("the table would have two columns {}", fields[at].name());
            let hint = "Rename one of them with AS; partition_by adds columns such as event_time_day itself.";
            return Err(Error::user(message).hint(hint));
        }
    }
    Ok(())
}

/// The type in which Delta holds values of `kind`: strings and binaries in their plain form, unsigned integers as
/// signed ones that are wide enough (64 bits: checked when rows are written), every timestamp as µs in UTC.
///
/// # Errors
/// User: types that Delta has not.
pub fn stored_type(kind: &DataType) -> Result<DataType> {
    use DataType as T;
    let child = |field: &FieldRef| -> Result<FieldRef> {
        Ok(Arc::new(Field::new(field.name(), stored_type(field.data_type())?, true)))
    };
    Ok(match kind {
        T::Boolean | T::Int8 | T::Int16 | T::Int32 | T::Int64 | T::Float32 | T::Float64 => kind.clone(),
        T::Decimal128(_, _) | T::Date32 => kind.clone(),
        T::Float16 => T::Float32,
        T::UInt8 => T::Int16,
        T::UInt16 => T::Int32,
        T::UInt32 | T::UInt64 => T::Int64,
        T::Decimal32(p, s) | T::Decimal64(p, s) => T::Decimal128(*p, *s),
        T::Date64 => T::Date32,
        T::Timestamp(_, _) => timestamp_type(),
        T::Utf8 | T::LargeUtf8 | T::Utf8View => T::Utf8,
        T::Binary | T::LargeBinary | T::BinaryView | T::FixedSizeBinary(_) => T::Binary,
        T::Dictionary(_, value) => stored_type(value)?,
        T::List(item) | T::LargeList(item) | T::FixedSizeList(item, _) => T::List(child(item)?),
        T::Struct(fields) => T::Struct(fields.iter().map(child).collect::<Result<Vec<_>>>()?.into()),
        T::Null => {
            let hint = "Say which type the NULL has, such as CAST(NULL AS VARCHAR).";
            return Err(Error::user("its type is not known").hint(hint));
        }
        other => {
            let hint = "Cast it to a type that Delta knows, such as VARCHAR or BIGINT.";
            return Err(Error::user(format!("{other} cannot be stored in a Delta table")).hint(hint));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(partition_by: &str) -> Result<DeltaConfig> {
        let options = &[("location", "x"), ("partition_by", partition_by), ("target_file_size", "3 KB")];
        DeltaConfig::from_options(&mut Options::of("sink s", options))
    }

    fn schema(columns: &[(&str, DataType)]) -> Schema {
        Schema::new(columns.iter().map(|(n, t)| Field::new(*n, t.clone(), false)).collect::<Vec<_>>())
    }

    #[test]
    fn types_become_those_of_delta() {
        let rows = schema(&[
            ("a", DataType::UInt64),
            ("b", DataType::Utf8View),
            ("t", DataType::Timestamp(arrow::datatypes::TimeUnit::Nanosecond, None)),
            ("l", DataType::new_large_list(DataType::UInt8, false)),
        ]);
        let table = config("day(t),hour(t)").unwrap().table_schema(&rows).unwrap();
        let found: Vec<String> =
            table.fields().iter().map(|f| format!("{} {}", f.name(), f.data_type())).collect();
        let wanted = [
            "a Int64",
            "b Utf8",
            "t Timestamp(µs, \"UTC\")",
            "l List(Int16)",
            "t_day Date32",
            "t_hour Timestamp(µs, \"UTC\")",
        ];
        assert_eq!(found, wanted);
        assert_eq!(config("a").unwrap().target_file_size, 3072);
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let rows =
            schema(&[("event_time", timestamp_type()), ("n", DataType::Int64), ("x_day", DataType::Utf8)]);
        let refused = |by: &str, rows: &Schema| match config(by).and_then(|c| c.table_schema(rows)) {
            Ok(_) => panic!("{by} must be refused"),
            Err(error) => format!("{error}; {}", error.hint_text().unwrap_or_default()),
        };
        assert!(refused("day(event_tim)", &rows).contains("Did you mean event_time?"));
        assert!(refused("day(n)", &rows).contains("n is Int64"));
        assert!(refused("week(event_time)", &rows).contains("week()"));
        assert!(refused("day(event_time", &rows).contains("closing bracket"));
        assert!(refused("n,,n", &rows).contains("empty"));
        assert!(refused("n,n", &rows).contains("twice"));
        assert!(refused("n", &schema(&[("n", DataType::Int64)])).contains("every column"));
        let named = schema(&[("count(*)", DataType::Int64), ("n", DataType::Int64)]);
        assert!(refused("n", &named).contains("count(*)"));
        let twice = schema(&[("t", timestamp_type()), ("T_Day", DataType::Int64)]);
        assert!(refused("day(t)", &twice).contains("two columns"));
        let odd = schema(&[("n", DataType::Int64), ("d", DataType::Null)]);
        assert!(refused("n", &odd).contains("column d"));
    }
}
