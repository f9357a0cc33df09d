//! Rows → Parquet files of a Delta table, one open file per partition value.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, UInt32Array};
use arrow::compute::{cast, max, min};
use arrow::datatypes::{DataType, Int64Type, Schema, SchemaRef, TimeUnit};
use arrow::row::{OwnedRow, RowConverter, SortField};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use bytes::Bytes;
use object_store::{ObjectStoreExt, PutPayload, path::Path};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde_json::{Map, Value, json};

use super::PreparedFile;
use super::config::{DeltaConfig, Transform};
use crate::connectors::files::{Located, open};
use crate::error::{Error, Result};
use crate::stream::clock::Clock;

/// Writes the rows of one shard. Encoding is synchronous; only [`DeltaWriter::prepare`] touches the store.
pub struct DeltaWriter {
    config: DeltaConfig,
    located: Located,
    /// Columns inside the files: all but the partition columns.
    inside: Vec<usize>,
    inside_schema: SchemaRef,
    names: Vec<String>,
    /// Generation and shard, for file names.
    tag: String,
    converter: Option<RowConverter>,
    open: HashMap<Option<OwnedRow>, OpenFile>,
    full: Vec<(Vec<Option<String>>, Bytes, Stats)>,
    clock: Clock,
}

struct OpenFile {
    values: Vec<Option<String>>,
    writer: ArrowWriter<Vec<u8>>,
    stats: Stats,
}

/// Statistics of a file, by column inside it.
#[derive(Debug, Default, Clone)]
struct Stats {
    rows: u64,
    nulls: Vec<u64>,
    /// Of columns that read as 64-bit integers.
    range: Vec<Option<(i64, i64)>>,
}

impl DeltaWriter {
    /// `rows` is the schema of the rows that [`DeltaWriter::write`] gets.
    ///
    /// # Errors
    /// User: partitioning that does not fit the rows. External: the location cannot be opened.
    pub fn new(config: DeltaConfig, rows: &SchemaRef, tag: String) -> Result<Self> {
        config.table_schema(rows)?;
        let located = open(&config.location)?;
        let is_partition = |name: &str| {
            config.partition_by.iter().any(|p| p.transform == Transform::Identity && p.column == name)
        };
        let inside: Vec<usize> =
            (0..rows.fields().len()).filter(|c| !is_partition(rows.field(*c).name())).collect();
        let inside_schema = Arc::new(rows.project(&inside)?);
        let names = config.partition_by.iter().map(|part| part.name()).collect();
        let (converter, open, full) = (None, HashMap::new(), Vec::new());
        Ok(Self { config, located, inside, inside_schema, names, tag, converter, open, full, clock: Clock })
    }

    /// # Errors
    /// Internal: rows of another schema.
    pub fn write(&mut self, rows: &RecordBatch) -> Result<()> {
        if rows.num_rows() == 0 {
            return Ok(());
        }
        let columns = self.config.partition_columns(rows)?;
        let inside = rows.project(&self.inside)?;
        if columns.is_empty() {
            return self.append(None, &columns, 0, &inside);
        }
        for (key, first, picked) in self.split(&columns, rows.num_rows())? {
            match picked {
                None => self.append(Some(key), &columns, first, &inside)?,
                Some(picked) => {
                    let part = arrow::compute::take_record_batch(&inside, &picked)?;
                    self.append(Some(key), &columns, first, &part)?;
                }
            }
        }
        Ok(())
    }

    /// Groups of rows with equal partition values: key, a row of it, and its rows (`None`: all of them).
    fn split(
        &mut self,
        columns: &[ArrayRef],
        rows: usize,
    ) -> Result<Vec<(OwnedRow, usize, Option<UInt32Array>)>> {
        let converter = match &mut self.converter {
            Some(converter) => converter,
            empty => {
                let fields = columns.iter().map(|c| SortField::new(c.data_type().clone())).collect();
                empty.insert(RowConverter::new(fields)?)
            }
        };
        let keys = converter.convert_columns(columns)?;
        let mut groups: Vec<(usize, Vec<u32>)> = Vec::new();
        let mut last = 0;
        for row in 0..rows {
            let same = |group: &(usize, Vec<u32>)| keys.row(group.0) == keys.row(row);
            if !groups.get(last).is_some_and(same) {
                last = groups.iter().position(same).unwrap_or_else(|| {
                    groups.push((row, Vec::new()));
                    groups.len() - 1
                });
            }
            groups[last].1.push(row as u32);
        }
        let whole = groups.len() == 1;
        let group = |(first, picked): (usize, Vec<u32>)| {
            (keys.row(first).owned(), first, (!whole).then(|| UInt32Array::from(picked)))
        };
        Ok(groups.into_iter().map(group).collect())
    }

    fn append(
        &mut self,
        key: Option<OwnedRow>,
        columns: &[ArrayRef],
        row: usize,
        rows: &RecordBatch,
    ) -> Result<()> {
        if !self.open.contains_key(&key) {
            let values =
                columns.iter().map(|column| partition_text(column, row)).collect::<Result<Vec<_>>>()?;
            let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
            let writer = ArrowWriter::try_new(Vec::new(), Arc::clone(&self.inside_schema), Some(properties))?;
            self.open.insert(key.clone(), OpenFile { values, writer, stats: Stats::default() });
        }
        let Some(file) = self.open.get_mut(&key) else { return Ok(()) };
        // Rows may come with other nullability than declared; names and types are the same.
        let rows = RecordBatch::try_new(Arc::clone(&self.inside_schema), rows.columns().to_vec())?;
        file.writer.write(&rows)?;
        file.stats.add(&rows)?;
        if file.writer.bytes_written() + file.writer.in_progress_size() >= self.config.target_file_size
            && let Some(file) = self.open.remove(&key)
        {
            let OpenFile { values, writer, stats } = file;
            self.full.push((values, Bytes::from(writer.into_inner()?), stats));
        }
        Ok(())
    }

    /// Closes and uploads everything written since the last call.
    ///
    /// # Errors
    /// External: the store failed; nothing of the epoch may be committed then.
    pub async fn prepare(&mut self, epoch: u64) -> Result<Vec<PreparedFile>> {
        let mut closed = std::mem::take(&mut self.full);
        for (_, OpenFile { values, writer, stats }) in self.open.drain() {
            closed.push((values, Bytes::from(writer.into_inner()?), stats));
        }
        let mut prepared = Vec::with_capacity(closed.len());
        for (number, (values, bytes, stats)) in closed.into_iter().enumerate() {
            let id = uuid::Uuid::new_v4();
            let name = format!("part-{epoch:010}-{}-{number}-{id}.snappy.parquet", self.tag);
            let folder: String = self
                .names
                .iter()
                .zip(&values)
                .map(|(name, value)| format!("{}={}/", name, folder(value)))
                .collect();
            let path = format!("{folder}{name}");
            let size = bytes.len() as u64;
            let target =
                Path::parse(&path).map_err(|e| Error::internal(format!("{path} is no path")).because(e))?;
            self.located.store.put(&target, PutPayload::from_bytes(bytes)).await.map_err(|error| {
                Error::external(format!("a file of {} cannot be written", self.config.location))
                    .because(error)
            })?;
            let partition: Map<String, Value> = self
                .names
                .iter()
                .cloned()
                .zip(values.into_iter().map(|v| v.map_or(Value::Null, Value::from)))
                .collect();
            let add = json!({
                // The log holds paths as URIs.
                "path": encode(&path),
                "partitionValues": partition,
                "size": size,
                "modificationTime": self.clock.unix_millis(),
                "dataChange": true,
                "stats": stats.json(&self.inside_schema).to_string(),
            });
            prepared.push(PreparedFile { path, size, rows: stats.rows, add });
        }
        Ok(prepared)
    }
}

impl Stats {
    fn add(&mut self, rows: &RecordBatch) -> Result<()> {
        self.rows += rows.num_rows() as u64;
        self.nulls.resize(rows.num_columns(), 0);
        self.range.resize(rows.num_columns(), None);
        for (at, column) in rows.columns().iter().enumerate() {
            self.nulls[at] += column.null_count() as u64;
            let long = match column.data_type() {
                DataType::Int8
                | DataType::Int16
                | DataType::Int32
                | DataType::Int64
                | DataType::Timestamp(_, _) => cast(column, &DataType::Int64)?,
                DataType::Date32 => cast(&cast(column, &DataType::Int32)?, &DataType::Int64)?,
                _ => continue,
            };
            let long = long.as_primitive::<Int64Type>();
            if let (Some(low), Some(high)) = (min(long), max(long)) {
                let range = self.range[at].get_or_insert((low, high));
                *range = (range.0.min(low), range.1.max(high));
            }
        }
        Ok(())
    }

    /// The `stats` of an add action; time stamps are widened to whole milliseconds, as the protocol wants.
    fn json(&self, schema: &Schema) -> Value {
        let (mut low, mut high, mut nulls) = (Map::new(), Map::new(), Map::new());
        for (at, field) in schema.fields().iter().enumerate() {
            nulls.insert(field.name().clone(), self.nulls.get(at).copied().unwrap_or(0).into());
            let Some((least, greatest)) = self.range.get(at).copied().flatten() else { continue };
            let (least, greatest) = match field.data_type() {
                DataType::Timestamp(TimeUnit::Microsecond, _) => (
                    time_text(least.div_euclid(1_000)),
                    time_text(greatest.div_euclid(1_000).saturating_add(1)),
                ),
                DataType::Timestamp(_, _) => continue,
                DataType::Date32 => (date_text(least), date_text(greatest)),
                _ => (least.into(), greatest.into()),
            };
            low.insert(field.name().clone(), least);
            high.insert(field.name().clone(), greatest);
        }
        json!({ "numRecords": self.rows, "minValues": low, "maxValues": high, "nullCount": nulls })
    }
}

fn date_text(days: i64) -> Value {
    let (year, month, day) = super::config::civil(days);
    format!("{year:04}-{month:02}-{day:02}").into()
}

fn time_text(millis: i64) -> Value {
    let (year, month, day) = super::config::civil(millis.div_euclid(86_400_000));
    let of_day = millis.rem_euclid(86_400_000);
    let (hour, minute, second) = (of_day / 3_600_000, of_day / 60_000 % 60, of_day / 1_000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", of_day % 1_000).into()
}

/// A partition value as the Delta protocol writes it; `None` for NULL.
fn partition_text(column: &ArrayRef, row: usize) -> Result<Option<String>> {
    if column.is_null(row) {
        return Ok(None);
    }
    let options = FormatOptions::new().with_timestamp_tz_format(Some("%Y-%m-%d %H:%M:%S%.6f"));
    Ok(Some(ArrayFormatter::try_new(column.as_ref(), &options)?.value(row).to_string()))
}

fn folder(value: &Option<String>) -> String {
    match value {
        None => "__HIVE_DEFAULT_PARTITION__".to_owned(),
        Some(value) => encode(value).replace('/', "%2F"),
    }
}

/// Percent-encodes what a path of the log, or a file system, cannot hold.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'/' | b'=' => {
                out.push(byte as char)
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}
