//! Rows → Parquet files of a Delta table, one open file per partition value.
//!
//! Encoding is synchronous and in memory: [`DeltaWriter::write`] never touches the store. Files that are full wait
//! for [`DeltaWriter::prepare`], or for [`DeltaWriter::upload`], which a task calls between two writes while
//! [`DeltaWriter::wants_upload`] says so; that bounds the memory however long an epoch is.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::compute::{CastOptions, cast_with_options, take_record_batch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::row::OwnedRow;
use arrow::util::display::FormatOptions;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use hashbrown::HashMap;
use object_store::{ObjectStoreExt, PutPayload, path::Path};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;
use serde_json::{Map, Value, json};

use super::PreparedFile;
use super::config::{Codec, DeltaConfig};
use super::stats::{Floats, stats_of};
use crate::connectors::files::{Located, open};
use crate::connectors::partition::{Part, Parts, Splitter, folders, uri};
use crate::error::{Error, Result};
use crate::stream::clock::Clock;
use crate::stream::crash;

/// Files open at the same time; one more closes the largest.
const MAX_OPEN: usize = 128;
/// Bytes held by open files; above, the largest is closed.
const MAX_OPEN_BYTES: usize = 256 << 20;
/// Bytes of closed files from which on the writer asks for an upload.
const UPLOAD_BYTES: usize = 64 << 20;
/// Bytes of a column's dictionary, from which on its values are written plainly: 32,768 numbers. More of them cost more to
/// look up than they save in the files of an epoch.
const DICTIONARY_BYTES: usize = 256 << 10;
/// Files uploaded at the same time.
const UPLOADS: usize = 4;

/// Writes the rows of one shard.
pub struct DeltaWriter {
    /// Bytes at which a file is closed within an epoch.
    target_file_size: usize,
    uploads: Arc<Uploads>,
    /// Columns of the rows in the types of the table.
    stored: SchemaRef,
    /// Columns inside the files: all but the partition columns.
    inside: Vec<usize>,
    inside_schema: SchemaRef,
    properties: WriterProperties,
    splitter: Splitter,
    /// By the partition values; `None` when the table has no partitions.
    open: HashMap<Option<OwnedRow>, OpenFile>,
    open_bytes: usize,
    closed: Vec<ClosedFile>,
    closed_bytes: usize,
    uploaded: Vec<PreparedFile>,
    /// Number of the next file, for file names.
    number: usize,
}

/// Where closed files go; apart from the encoders, which no two threads may look at.
struct Uploads {
    located: Located,
    location: String,
    codec: Codec,
    /// Names of the partition columns.
    names: Vec<String>,
    /// Generation and shard, for file names.
    tag: String,
    clock: Clock,
}

struct OpenFile {
    /// Partition values as the log holds them.
    values: Vec<Option<String>>,
    writer: ArrowWriter<Vec<u8>>,
    /// What it counts in `open_bytes`.
    bytes: usize,
    floats: Floats,
}

struct ClosedFile {
    values: Vec<Option<String>>,
    bytes: Bytes,
    rows: u64,
    stats: String,
    number: usize,
}

impl DeltaWriter {
    /// `rows` is the schema of the rows that [`DeltaWriter::write`] gets; `tag` (generation and shard) goes into the
    /// names of the files.
    ///
    /// # Errors
    /// User: columns or a partitioning that Delta cannot hold. External: the location cannot be opened.
    pub fn new(config: DeltaConfig, rows: &SchemaRef, tag: String) -> Result<Self> {
        let table = config.table_schema(rows)?;
        let located = open(&config.location)?;
        let names = config.partition_names();
        let stored = Arc::new(Schema::new(table.fields()[..rows.fields().len()].to_vec()));
        let inside: Vec<usize> =
            (0..stored.fields().len()).filter(|c| !names.contains(stored.field(*c).name())).collect();
        let inside_schema = Arc::new(stored.project(&inside)?);
        let properties = properties(config.codec, &inside_schema)?;
        let (location, codec) = (config.location.clone(), config.codec);
        let uploads = Arc::new(Uploads { located, location, codec, names, tag, clock: Clock });
        let splitter = Splitter::new(config.partition_by);
        Ok(Self {
            target_file_size: config.target_file_size,
            uploads,
            stored,
            inside,
            inside_schema,
            properties,
            splitter,
            open: HashMap::new(),
            open_bytes: 0,
            closed: Vec::new(),
            closed_bytes: 0,
            uploaded: Vec::new(),
            number: 0,
        })
    }

    /// # Errors
    /// Internal: rows of another schema. User: an unsigned number that no signed one can hold.
    pub fn write(&mut self, rows: &RecordBatch) -> Result<()> {
        if rows.num_rows() == 0 {
            return Ok(());
        }
        let rows = self.stored_rows(rows)?;
        let parts = self.splitter.split(&rows)?;
        let inside = rows.project(&self.inside)?;
        for part in &parts.list {
            match &part.rows {
                None => self.append(&parts, part, &inside)?,
                Some(picked) => self.append(&parts, part, &take_record_batch(&inside, picked)?)?,
            }
        }
        Ok(())
    }

    /// The rows in the types of the table; columns that have them already are not copied.
    fn stored_rows(&self, rows: &RecordBatch) -> Result<RecordBatch> {
        if rows.num_columns() != self.stored.fields().len() {
            return Err(Error::internal(format!(
                "rows of {} columns for a table of {}",
                rows.num_columns(),
                self.stored.fields().len()
            )));
        }
        let options = CastOptions { safe: false, format_options: FormatOptions::new() };
        let convert = |(column, field): (&ArrayRef, &Arc<Field>)| {
            if column.data_type() == field.data_type() {
                return Ok(Arc::clone(column));
            }
            cast_with_options(column, field.data_type(), &options).map_err(|error| {
                Error::user(format!("column {} cannot be stored as {}", field.name(), field.data_type()))
                    .because(error)
                    .hint("Cast it to a type that Delta knows.")
            })
        };
        let columns = rows.columns().iter().zip(self.stored.fields()).map(convert).collect::<Result<_>>()?;
        Ok(RecordBatch::try_new(Arc::clone(&self.stored), columns)?)
    }

    fn append(&mut self, parts: &Parts, part: &Part, rows: &RecordBatch) -> Result<()> {
        let key = &part.key;
        if !self.open.contains_key(key) {
            if self.open.len() >= MAX_OPEN {
                self.close_largest()?;
            }
            let values = parts.values(part)?;
            let file = self.new_file(values)?;
            self.open.insert(key.clone(), file);
        }
        let Some(file) = self.open.get_mut(key) else { return Ok(()) };
        file.writer.write(rows)?;
        file.floats.add(rows);
        let held = file.writer.inner().len() + file.writer.memory_size();
        self.open_bytes = self.open_bytes - file.bytes + held;
        file.bytes = held;
        let size = file.writer.bytes_written() + file.writer.in_progress_size();
        if size >= self.target_file_size {
            self.close(key)?;
        }
        while self.open_bytes > MAX_OPEN_BYTES && !self.open.is_empty() {
            self.close_largest()?;
        }
        Ok(())
    }

    fn new_file(&self, values: Vec<Option<String>>) -> Result<OpenFile> {
        // Without the Arrow schema in its footer a file says exactly what Delta's schema says.
        let options =
            ArrowWriterOptions::new().with_properties(self.properties.clone()).with_skip_arrow_metadata(true);
        let writer = ArrowWriter::try_new_with_options(Vec::new(), Arc::clone(&self.inside_schema), options)?;
        Ok(OpenFile { values, writer, bytes: 0, floats: Floats::default() })
    }

    fn close_largest(&mut self) -> Result<()> {
        let largest = self.open.iter().max_by_key(|(_, file)| file.bytes).map(|(key, _)| key.clone());
        largest.map_or(Ok(()), |key| self.close(&key))
    }

    fn close(&mut self, key: &Option<OwnedRow>) -> Result<()> {
        let Some(mut file) = self.open.remove(key) else { return Ok(()) };
        self.open_bytes -= file.bytes;
        let footer = file.writer.finish()?;
        let stats = stats_of(&self.inside_schema, &footer, &file.floats);
        let rows = u64::try_from(footer.file_metadata().num_rows()).unwrap_or(0);
        let bytes = Bytes::from(std::mem::take(file.writer.inner_mut()));
        self.closed_bytes += bytes.len();
        self.closed.push(ClosedFile { values: file.values, bytes, rows, stats, number: self.number });
        self.number += 1;
        Ok(())
    }

    /// Whether enough closed files wait in memory that [`DeltaWriter::upload`] is due.
    pub fn wants_upload(&self) -> bool {
        self.closed_bytes >= UPLOAD_BYTES
    }

    /// Uploads the files that are full already. `epoch` is the one they will be prepared in.
    ///
    /// # Errors
    /// External: the store failed; nothing of the epoch may be committed then.
    pub async fn upload(&mut self, epoch: u64) -> Result<()> {
        let files = self.take_closed(epoch).await?;
        self.uploaded.extend(files);
        Ok(())
    }

    /// Uploads what is closed; the future does without the writer.
    fn take_closed(&mut self, epoch: u64) -> impl Future<Output = Result<Vec<PreparedFile>>> + Send + use<> {
        let closed = std::mem::take(&mut self.closed);
        self.closed_bytes = 0;
        let uploads = Arc::clone(&self.uploads);
        async move {
            let puts = closed.into_iter().map(|file| uploads.put(epoch, file));
            futures::stream::iter(puts).buffered(UPLOADS).try_collect().await
        }
    }

    /// Closes everything written since the last call. The future uploads it and gives all files of the epoch; it does
    /// without the writer, which can take the rows of the next epoch meanwhile.
    ///
    /// # Errors
    /// Internal: a file could not be closed. Of the future, external: the store failed; nothing of the epoch may be
    /// committed then.
    pub fn prepare(
        &mut self,
        epoch: u64,
    ) -> Result<impl Future<Output = Result<Vec<PreparedFile>>> + Send + use<>> {
        while !self.open.is_empty() {
            self.close_largest()?;
        }
        let mut all = std::mem::take(&mut self.uploaded);
        let rest = self.take_closed(epoch);
        self.number = 0;
        Ok(async move {
            all.extend(rest.await?);
            Ok(all)
        })
    }
}

impl Uploads {
    async fn put(&self, epoch: u64, file: ClosedFile) -> Result<PreparedFile> {
        let ClosedFile { values, bytes, rows, stats, number } = file;
        let folders = folders(&self.names, &values);
        let (id, tag) = (uuid::Uuid::new_v4(), &self.tag);
        let ending = ending(self.codec);
        let path = format!("{folders}part-{epoch:010}-{tag}-{number}-{id}.{ending}");
        let target =
            Path::parse(&path).map_err(|e| Error::internal(format!("{path} is no path")).because(e))?;
        let size = bytes.len() as u64;
        crash::point("delta.file.before");
        self.located.store.put(&target, PutPayload::from_bytes(bytes)).await.map_err(|error| {
            Error::external(format!("a file of {} cannot be written", self.location))
                .because(error)
                .hint("Check that the store has room and that the credentials may write there.")
        })?;
        crash::point("delta.file.after");
        let named = self.names.iter().zip(&values);
        let partition: Map<String, Value> = named
            .map(|(name, value)| (name.clone(), value.clone().map_or(Value::Null, Value::from)))
            .collect();
        let add = json!({
            "path": uri(&path),
            "partitionValues": partition,
            "size": size,
            "modificationTime": self.clock.unix_millis(),
            "dataChange": true,
            "stats": stats,
        });
        Ok(PreparedFile { path, size, rows, add })
    }
}

/// How the name of a file ends.
pub(super) fn ending(codec: Codec) -> &'static str {
    match codec {
        Codec::Snappy => "snappy.parquet",
        Codec::Zstd => "zstd.parquet",
        Codec::None => "parquet",
    }
}

pub(super) fn properties(codec: Codec, schema: &Schema) -> Result<WriterProperties> {
    let codec = match codec {
        Codec::Snappy => Compression::SNAPPY,
        Codec::Zstd => Compression::ZSTD(ZstdLevel::try_new(1)?),
        Codec::None => Compression::UNCOMPRESSED,
    };
    let mut builder = WriterProperties::builder()
        .set_compression(codec)
        .set_created_by(concat!("millstream ", env!("CARGO_PKG_VERSION")).to_owned());
    for field in schema.fields().iter().filter(|field| field.data_type().is_floating()) {
        // See `stats`: they would hide rows with NaN.
        let column = ColumnPath::new(vec![field.name().clone()]);
        builder = builder.set_column_statistics_enabled(column, EnabledStatistics::None);
    }
    for field in schema.fields().iter().filter(|field| rises(field)) {
        let column = ColumnPath::new(vec![field.name().clone()]);
        builder = builder
            .set_column_dictionary_enabled(column.clone(), false)
            .set_column_encoding(column, Encoding::DELTA_BINARY_PACKED);
    }
    Ok(builder.set_dictionary_page_size_limit(DICTIONARY_BYTES).build())
}

/// Offsets and times hardly repeat, so a dictionary of them is work for nothing, and differ little from row to row.
fn rises(field: &Field) -> bool {
    field.name() == "_offset" || matches!(field.data_type(), DataType::Timestamp(_, _))
}
