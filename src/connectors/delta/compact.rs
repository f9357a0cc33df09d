//! Small files of a partition become one. What may go wrong, and why it cannot do harm: [`super::upkeep`].
//!
//! Files of about one size are merged, eight at a time or more, so that a row is rewritten once per size and not every
//! time that new files come. A partition that gets no more files is merged whole.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, new_null_array};
use arrow::compute::{CastOptions, can_cast_types, cast_with_options};
use arrow::datatypes::{DataType, Schema, SchemaRef};
use arrow::util::display::FormatOptions;
use bytes::Bytes;
use deltalake_core::kernel::engine::arrow_conversion::TryIntoArrow;
use deltalake_core::kernel::transaction::TransactionError;
use deltalake_core::logstore::{CommitOrBytes, commit_uri_from_version};
use object_store::{ObjectStoreExt, PutPayload, WriteMultipart, path::Path};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use serde_json::{Map, Value, json};

use super::log::{Bearing, bearing, compaction_entry, file_name};
use super::stats::{Floats, stats_of};
use super::store::failed;
use super::upkeep::{Compacted, Found, Upkeep};
use super::writer::{ending, properties};
use crate::connectors::partition::{folders, uri};
use crate::error::{Error, Result};

/// Files of about one size that are worth a merge.
const MIN_FILES: usize = 8;
/// A partition that got no file for so many intervals is merged whole.
const QUIET_INTERVALS: i64 = 6;
/// Files within a factor of eight are of about one size.
const SIZE_BITS: u32 = 3;
/// Others that may be ahead of one commit before it is put off.
const MAX_OVERTAKEN: u32 = 100;
/// Bytes of an output that are in memory before they are sent; also the size of a part of an upload.
const PART_BYTES: usize = 8 << 20;
/// Parts on their way at the same time.
const PARTS: usize = 2;

/// A file of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    /// As the store knows it.
    path: String,
    size: u64,
    /// ms since the epoch.
    modified: i64,
    /// As the log holds them.
    partition: BTreeMap<String, Option<String>>,
    /// Its `remove` action, if it is not named by ourselves.
    remove: Option<Value>,
}

/// Files that become one.
type Bin = Vec<Candidate>;

/// Files whose rows are in new files, not committed.
struct Rewritten {
    version: u64,
    inputs: Vec<Candidate>,
    outputs: Vec<String>,
    adds: Vec<Value>,
}

/// Which files become one. `now`, `interval` in ms.
fn bins(files: Vec<Candidate>, target: u64, now: i64, interval: i64) -> Vec<Bin> {
    let mut partitions: BTreeMap<_, Vec<Candidate>> = BTreeMap::new();
    for file in files {
        partitions.entry(file.partition.clone()).or_default().push(file);
    }
    let mut bins = Vec::new();
    for (_, mut files) in partitions {
        let newest = files.iter().map(|file| file.modified).max().unwrap_or(now);
        let quiet = now - newest >= interval.saturating_mul(QUIET_INTERVALS);
        files.retain(|file| file.size < target / 4 * 3 && now - file.modified >= interval);
        // In the order in which they came, so that a new file covers a short span of time.
        files.sort_by(|a, b| (a.modified, &a.path).cmp(&(b.modified, &b.path)));
        if quiet {
            bins.extend(filled(files, target, 2));
            continue;
        }
        let mut sizes: BTreeMap<u32, Vec<Candidate>> = BTreeMap::new();
        for file in files {
            sizes.entry(file.size.max(1).ilog2() / SIZE_BITS).or_default().push(file);
        }
        bins.extend(sizes.into_values().flat_map(|files| filled(files, target, MIN_FILES)));
    }
    bins
}

/// Cuts files into bins up to the target. A bin that is not full and has less than `least` files waits.
fn filled(files: Vec<Candidate>, target: u64, least: usize) -> Vec<Bin> {
    let (mut bins, mut open, mut size) = (Vec::new(), Vec::new(), 0);
    for file in files {
        if size + file.size > target && open.len() > 1 {
            bins.push(std::mem::take(&mut open));
            size = 0;
        } else if size + file.size > target {
            (open, size) = (Vec::new(), 0);
        }
        size += file.size;
        open.push(file);
    }
    if open.len() >= least {
        bins.push(open);
    }
    bins
}

/// The columns inside the files: those of the table now, without the partition columns.
fn inside_schema(found: &Found, location: &str) -> Result<SchemaRef> {
    let snapshot = found.snapshot(location)?;
    let schema: Schema = snapshot.schema().as_ref().try_into_arrow()?;
    let partitions = snapshot.metadata().partition_columns();
    let inside = schema.fields().iter().filter(|field| !partitions.contains(field.name()));
    Ok(Arc::new(Schema::new(
        inside.map(|field| field.as_ref().clone().with_nullable(true)).collect::<Vec<_>>(),
    )))
}

/// The rows of a file as the table has them now: a column that came later is NULL.
fn adapted(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
    let options = CastOptions { safe: false, format_options: FormatOptions::new() };
    let column = |field: &Arc<arrow::datatypes::Field>| -> Result<ArrayRef> {
        let Some(found) = batch.column_by_name(field.name()) else {
            return Ok(new_null_array(field.data_type(), batch.num_rows()));
        };
        match found.data_type() == field.data_type() {
            true => Ok(Arc::clone(found)),
            false if fits(found.data_type(), field.data_type()) => {
                Ok(cast_with_options(found, field.data_type(), &options)?)
            }
            false => {
                let message = format!("column {} is {} there", field.name(), found.data_type());
                Err(Error::external(message))
            }
        }
    };
    let columns = schema.fields().iter().map(column).collect::<Result<Vec<_>>>()?;
    Ok(RecordBatch::try_new(Arc::clone(schema), columns)?)
}

/// Whether two Arrow types are one type of Delta: the same kind, however it was encoded.
fn fits(found: &DataType, wanted: &DataType) -> bool {
    use DataType as T;
    match (found, wanted) {
        (T::Timestamp(_, _), T::Timestamp(_, _)) | (T::LargeUtf8 | T::Utf8View, T::Utf8) => true,
        (T::LargeBinary | T::BinaryView | T::FixedSizeBinary(_), T::Binary) => true,
        (T::List(_) | T::LargeList(_), T::List(_))
        | (T::Struct(_), T::Struct(_))
        | (T::Map(_, _), T::Map(_, _)) => can_cast_types(found, wanted),
        (T::Dictionary(_, value), wanted) => value.as_ref() == wanted || fits(value, wanted),
        _ => found.is_integer() && wanted.is_integer() && found.primitive_width() <= wanted.primitive_width(),
    }
}

impl Upkeep {
    /// Merges small files. `may_commit` is asked before each commit: whether this process still owns the pipeline.
    ///
    /// # Errors
    /// Fenced: a newer process owns pipeline or table. External: the store failed; nothing is lost then.
    pub async fn compact<F>(&self, may_commit: impl Fn() -> F + Send) -> Result<Compacted>
    where
        F: Future<Output = Result<()>> + Send,
    {
        let mut done = Compacted::default();
        let Some(interval) = self.config.compact_interval else { return Ok(done) };
        let found = self.look().await?;
        let (now, target) = (self.clock.unix_millis(), self.config.target_file_size as u64);
        let interval = i64::try_from(interval.as_millis()).unwrap_or(i64::MAX);
        let mut bins = bins(self.candidates(&found)?, target, now, interval).into_iter().peekable();
        let mut trouble = None;
        while bins.peek().is_some() {
            // Many small partitions share a commit.
            let (mut together, mut size) = (Vec::new(), 0);
            while let Some(bin) = bins.next_if(|_| size < target) {
                size += bin.iter().map(|file| file.size).sum::<u64>();
                together.push(bin);
            }
            let (rewritten, unreadable) = self.rewrite(&found, together).await?;
            trouble = trouble.or(unreadable);
            if rewritten.outputs.is_empty() {
                continue;
            }
            if let Err(error) = may_commit().await {
                self.discard(&rewritten.outputs).await;
                return Err(error);
            }
            match self.replace(&rewritten).await? {
                Bearing::None => {
                    done.removed += rewritten.inputs.len();
                    done.added += rewritten.outputs.len();
                }
                Bearing::Conflict => {
                    self.discard(&rewritten.outputs).await;
                    done.dropped += 1;
                }
                Bearing::Fenced => {
                    self.discard(&rewritten.outputs).await;
                    return Err(self.overtaken());
                }
            }
        }
        trouble.map_or(Ok(done), Err)
    }

    /// All files that a plain rewrite can read: not those with a deletion vector.
    fn candidates(&self, found: &Found) -> Result<Vec<Candidate>> {
        let snapshot = found.snapshot(&self.config.location)?;
        let mut files = Vec::new();
        for view in snapshot.log_data().iter().filter(|view| view.deletion_vector_descriptor().is_none()) {
            let path = view.path().into_owned();
            // Elsewhere than in the folder (a shallow clone).
            if path.contains("://") || path.starts_with('/') {
                continue;
            }
            let name = file_name(&path);
            let ours = name.starts_with("compacted-g") || name.starts_with("part-") && name.contains("-g0");
            // The log's own spelling of foreign paths is delta-rs's to know.
            let foreign = || serde_json::to_value(view.remove_action(false));
            let remove = (!ours).then(foreign).transpose();
            files.push(Candidate {
                size: u64::try_from(view.size()).unwrap_or(0),
                modified: view.modification_time(),
                partition: view.partition_values_map().into_iter().collect(),
                remove: remove
                    .map_err(|e| Error::internal("a remove action cannot be written").because(e))?,
                path,
            });
        }
        Ok(files)
    }

    /// Writes the rows of each bin into a file of its own; also says why a bin was left out.
    async fn rewrite(&self, found: &Found, bins: Vec<Bin>) -> Result<(Rewritten, Option<Error>)> {
        let schema = inside_schema(found, &self.config.location)?;
        let names = found.snapshot(&self.config.location)?.metadata().partition_columns().to_vec();
        let mut rewritten =
            Rewritten { version: found.version, inputs: Vec::new(), outputs: Vec::new(), adds: Vec::new() };
        let mut trouble = None;
        for bin in bins {
            match self.merge_files(&schema, &names, &bin).await {
                Ok((path, add)) => {
                    rewritten.outputs.push(path);
                    rewritten.adds.push(add);
                    rewritten.inputs.extend(bin);
                }
                Err(error) => trouble = Some(error),
            }
        }
        Ok((rewritten, trouble))
    }

    /// Returns the path of the new file and its `add` action.
    async fn merge_files(&self, schema: &SchemaRef, names: &[String], bin: &Bin) -> Result<(String, Value)> {
        let partition = bin.first().map(|file| file.partition.clone()).unwrap_or_default();
        let value = |name: &String| partition.get(name).cloned().flatten();
        let texts: Vec<Option<String>> = names.iter().map(value).collect();
        let folders = folders(names, &texts);
        let (id, generation) = (uuid::Uuid::new_v4(), self.generation);
        let path = format!("{folders}compacted-g{generation:08}-{id}.{}", ending(self.config.codec));
        let mut output = Output::new(self, &path)?;
        let options = ArrowWriterOptions::new()
            .with_properties(properties(self.config.codec, schema)?)
            .with_skip_arrow_metadata(true);
        let mut writer = ArrowWriter::try_new_with_options(Vec::new(), Arc::clone(schema), options)?;
        let mut floats = Floats::default();
        for file in bin {
            let name =
                |error: Error| error.context(format!("file {} of {}", file.path, self.config.location));
            let bytes = self.bytes(&file.path).await.map_err(name)?;
            let reader = ParquetRecordBatchReaderBuilder::try_new(bytes)?.build()?;
            for batch in reader {
                let rows = adapted(&batch?, schema).map_err(name)?;
                writer.write(&rows)?;
                floats.add(&rows);
                output.take(writer.inner_mut()).await?;
                // Commits and sources come first.
                tokio::task::yield_now().await;
            }
        }
        let footer = writer.finish()?;
        let stats = stats_of(schema, &footer, &floats);
        let size = output.finish(std::mem::take(writer.inner_mut())).await?;
        let values: Map<String, Value> =
            names.iter().map(|name| (name.clone(), value(name).map_or(Value::Null, Value::from))).collect();
        let add = json!({
            "path": uri(&path),
            "partitionValues": values,
            "size": size,
            "modificationTime": self.clock.unix_millis(),
            "dataChange": false,
            "stats": stats,
        });
        Ok((path, add))
    }

    async fn bytes(&self, path: &str) -> Result<Bytes> {
        let fail = |error: object_store::Error| failed(&self.config.location, error.into());
        let path = parsed(path)?;
        self.located.store.get(&path).await.map_err(fail)?.bytes().await.map_err(fail)
    }

    /// Commits a rewrite behind everything that is in the log, unless something there forbids it.
    async fn replace(&self, rewritten: &Rewritten) -> Result<Bearing> {
        let location = &self.config.location;
        let fail = |error: deltalake_core::DeltaTableError| failed(location, error);
        let now = self.clock.unix_millis();
        let removes = rewritten.inputs.iter().map(|file| remove(file, now)).collect();
        let app = self.apps.first().map(String::as_str).unwrap_or_default();
        let entry =
            compaction_entry(app, self.generation, removes, rewritten.adds.clone(), rewritten.version, now);
        let inputs: BTreeSet<&str> = rewritten.inputs.iter().map(|file| file_name(&file.path)).collect();
        let mut version = rewritten.version + 1;
        for _ in 0..MAX_OVERTAKEN {
            while let Some(found) = self.log.read_commit_entry(version).await.map_err(fail)? {
                // A PUT whose answer was lost.
                if found == entry {
                    return Ok(Bearing::None);
                }
                for app in &self.apps {
                    let bearing = bearing(&found, app, self.generation, &inputs)?;
                    if bearing != Bearing::None {
                        return Ok(bearing);
                    }
                }
                version += 1;
            }
            // An end that is no end: the table was removed, or its log cleaned up.
            let last = commit_uri_from_version(Some(version - 1));
            match self.log.object_store(None).head(&last).await {
                Ok(_) => {}
                Err(object_store::Error::NotFound { .. }) => return Ok(Bearing::Conflict),
                Err(error) => return Err(fail(error.into())),
            }
            let put = CommitOrBytes::LogBytes(entry.clone());
            match self.log.write_commit_entry(version, put, uuid::Uuid::new_v4()).await {
                Ok(()) => return Ok(Bearing::None),
                // Another entry, or ours, is there: the loop reads it.
                Err(TransactionError::VersionAlreadyExists(_)) => {}
                Err(error) => match self.log.read_commit_entry(version).await.map_err(fail)? {
                    Some(_) => {}
                    // It may still arrive: the outputs stay, for a vacuum to find.
                    None => return Err(fail(error.into())),
                },
            }
        }
        Ok(Bearing::Conflict)
    }

    /// Deletes outputs that no entry will name; what stays behind is the vacuum's.
    async fn discard(&self, outputs: &[String]) {
        if let Err(error) = self.delete_files(outputs).await {
            tracing::debug!(table = %self.config.location, %error, "files of a dropped compaction were not removed");
        }
    }
}

fn remove(file: &Candidate, now: i64) -> Value {
    if let Some(remove) = &file.remove {
        return remove.clone();
    }
    let partition: HashMap<&String, &Option<String>> = file.partition.iter().collect();
    json!({
        "path": uri(&file.path),
        "deletionTimestamp": now,
        "dataChange": false,
        "extendedFileMetadata": true,
        "partitionValues": partition,
        "size": file.size,
    })
}

fn parsed(path: &str) -> Result<Path> {
    Path::parse(path).map_err(|e| Error::internal(format!("{path} is no path")).because(e))
}

/// A file on its way to the store, in parts once it is large.
struct Output<'a> {
    upkeep: &'a Upkeep,
    path: Path,
    upload: Option<WriteMultipart>,
    size: usize,
}

impl<'a> Output<'a> {
    fn new(upkeep: &'a Upkeep, path: &str) -> Result<Self> {
        Ok(Self { upkeep, path: parsed(path)?, upload: None, size: 0 })
    }

    fn failed(&self, error: object_store::Error) -> Error {
        failed(&self.upkeep.config.location, error.into())
    }

    /// Sends what the encoder has, once that is enough.
    async fn take(&mut self, encoded: &mut Vec<u8>) -> Result<()> {
        if encoded.len() < PART_BYTES {
            return Ok(());
        }
        if self.upload.is_none() {
            let begun = self.upkeep.located.store.put_multipart(&self.path).await;
            let begun = begun.map_err(|error| self.failed(error))?;
            self.upload = Some(WriteMultipart::new_with_chunk_size(begun, PART_BYTES));
        }
        if let Some(upload) = &mut self.upload {
            let ready = upload.wait_for_capacity(PARTS).await;
            self.size += encoded.len();
            upload.put(std::mem::take(encoded).into());
            ready.map_err(|error| self.failed(error))?;
        }
        Ok(())
    }

    /// Sends the rest; returns the size of the file.
    async fn finish(mut self, rest: Vec<u8>) -> Result<usize> {
        self.size += rest.len();
        let sent = match self.upload.take() {
            None => self.upkeep.located.store.put(&self.path, PutPayload::from(rest)).await.map(|_| ()),
            Some(mut upload) => {
                upload.put(rest.into());
                upload.finish().await.map(|_| ())
            }
        };
        sent.map_err(|error| self.failed(error))?;
        Ok(self.size)
    }
}
