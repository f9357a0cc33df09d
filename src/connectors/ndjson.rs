//! Rows as NDJSON files: `<location>/<partition folders>/part-g<generation>-e<epoch>-s<shard>-<n>.ndjson`.
//!
//! Each row once, and none that may be taken back: the files of an epoch are written below `_staged/`, without the
//! ending `.ndjson`, and listed in the epoch's manifest; when that is published and its writer still owns the
//! pipeline, they are moved to where readers look. Whoever takes the pipeline over moves what is still staged of the
//! newest manifest, and removes the rest. A process that was overtaken publishes no manifest, so it moves at most files
//! of the last one, whose names and contents are the same whoever moves them. On S3 a move is a copy and a deletion:
//! a reader that removes files must know them by name, as one may come again. Changes have a `_weight`.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use super::files;
use super::formats::json_encode::JsonEncoder;
use super::partition::{Partitioning, Splitter, folders, parse_list};
use crate::error::{Error, Result};
use crate::sql::options::Options;
use crate::stream::clock::Clock;
use crate::stream::{ChangeBatch, crash};

/// The folder of files that no reader should see yet.
const STAGED: &str = "_staged";
const ENDING: &str = ".ndjson";
/// Bytes of one file, about; a larger one is closed before its epoch ends.
const FILE_BYTES: usize = 64 << 20;

#[derive(Debug, Clone)]
pub struct NdjsonConfig {
    pub location: String,
    pub partition_by: Vec<Partitioning>,
}

impl NdjsonConfig {
    /// # Errors
    /// User: an option is missing or wrong.
    pub fn from_options(options: &mut Options) -> Result<Self> {
        let location = options.required("location")?;
        let partition_by = options.string("partition_by")?.map(|list| parse_list(&list)).transpose()?;
        Ok(Self { location, partition_by: partition_by.unwrap_or_default() })
    }
}

/// A file that is staged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staged {
    /// Where it will be, relative to the sink's location.
    pub path: String,
    pub size: u64,
    pub rows: u64,
}

/// Lines of one file.
#[derive(Default)]
struct Lines {
    bytes: Vec<u8>,
    rows: u64,
}

/// Writes the files of one shard.
pub struct NdjsonWriter {
    /// Names of the partition columns.
    names: Vec<String>,
    splitter: Splitter,
    store: Arc<dyn ObjectStore>,
    generation: u64,
    shard: usize,
    encoder: JsonEncoder,
    /// By folder.
    open: BTreeMap<String, Lines>,
    /// Full ones with their folder, until the epoch is known.
    full: Vec<(String, Lines)>,
}

impl NdjsonWriter {
    /// # Errors
    /// External: the location cannot be opened.
    pub fn open(config: NdjsonConfig, generation: u64, shard: usize) -> Result<Self> {
        let store = files::open(&config.location)?.store;
        let encoder = JsonEncoder::default();
        let names = config.partition_by.iter().map(Partitioning::name).collect();
        let splitter = Splitter::new(config.partition_by);
        let (open, full) = (BTreeMap::new(), Vec::new());
        Ok(Self { names, splitter, store, generation, shard, encoder, open, full })
    }

    /// # Errors
    /// Internal: a type that has no JSON form, which the planner should have refused.
    pub fn write(&mut self, batch: &ChangeBatch) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let parts = self.splitter.split(&batch.rows)?;
        for part in &parts.list {
            let folder = folders(&self.names, &parts.values(part)?);
            match &part.rows {
                None => self.append(folder, batch)?,
                Some(rows) => self.append(folder, &batch.take(rows)?)?,
            }
        }
        Ok(())
    }

    /// Stages everything written since the last call. The future does without the writer, which can take the rows of
    /// the next epoch meanwhile.
    ///
    /// # Errors
    /// Of the future, external: the store failed; nothing of the epoch may be published then.
    pub fn prepare(&mut self, epoch: u64) -> impl Future<Output = Result<Vec<Staged>>> + Send + use<> {
        let mut all = std::mem::take(&mut self.full);
        all.extend(std::mem::take(&mut self.open).into_iter().filter(|(_, lines)| lines.rows > 0));
        let (store, generation, shard) = (Arc::clone(&self.store), self.generation, self.shard);
        async move {
            let mut files = Vec::with_capacity(all.len());
            for (number, (folder, Lines { bytes, rows })) in all.into_iter().enumerate() {
                let path = format!("{folder}part-g{generation:08}-e{epoch:020}-s{shard}-{number}{ENDING}");
                let size = bytes.len() as u64;
                crash::point("ndjson.file.before");
                store.put(&staged(&path)?, bytes.into()).await?;
                crash::point("ndjson.file.after");
                files.push(Staged { path, size, rows });
            }
            Ok(files)
        }
    }

    fn append(&mut self, folder: String, rows: &ChangeBatch) -> Result<()> {
        let lines = self.encoder.encode(&rows.rows, rows.weights.as_ref())?.lines();
        let open = self.open.entry(folder.clone()).or_default();
        open.bytes.extend_from_slice(lines);
        open.rows += rows.num_rows() as u64;
        if open.bytes.len() >= FILE_BYTES {
            let full = std::mem::take(open);
            self.full.push((folder, full));
        }
        Ok(())
    }
}

/// Moves staged files to where readers look. Those that are there already are left alone.
///
/// # Constraints
/// A published manifest lists them, and its writer owned the pipeline afterwards.
///
/// # Errors
/// External: the location cannot be written; repeating is safe.
pub async fn publish(location: &str, paths: impl IntoIterator<Item = &str>) -> Result<()> {
    let store = files::open(location)?.store;
    for path in paths {
        crash::point("ndjson.rename.before");
        match store.rename(&staged(path)?, &parse(path)?).await {
            Ok(()) => {}
            // Moved before, by us or by whom we took over from; readers may have removed it since.
            Err(object_store::Error::NotFound { .. }) => {
                tracing::debug!(location, path, "a staged file was moved before");
            }
            Err(error) => {
                let hint = "Check that the store has room and that the credentials may write there.";
                let message = format!("{path} cannot be moved to its place in {location}");
                return Err(Error::external(message).because(error).hint(hint));
            }
        }
        crash::point("ndjson.rename.after");
    }
    Ok(())
}

/// Removes what generations before `generation` staged and did not publish.
///
/// # Constraints
/// `generation` has claimed the pipeline and published what the newest manifest lists.
///
/// # Errors
/// External: the location cannot be read or written.
pub async fn clean(location: &str, generation: u64) -> Result<()> {
    let Some(located) = files::open_existing(location)? else { return Ok(()) };
    let folder = Path::from(STAGED);
    let found: Vec<Path> =
        located.store.list(Some(&folder)).map_ok(|meta| meta.location).try_collect().await?;
    for path in found {
        if path.filename().and_then(generation_of).is_some_and(|of| of < generation) {
            match located.store.delete(&path).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            tracing::info!(file = %path, "removed what an unfinished epoch had staged");
        }
    }
    files::remove_unfinished(&format!("{location}/{STAGED}"), Clock.unix_millis());
    Ok(())
}

/// Removes what generations before `generation` published: of a state that was reset, and begins anew.
///
/// # Errors
/// External: the location cannot be read or written.
pub async fn forget(location: &str, generation: u64) -> Result<()> {
    let Some(located) = files::open_existing(location)? else { return Ok(()) };
    let found: Vec<Path> = located.store.list(None).map_ok(|meta| meta.location).try_collect().await?;
    for path in found {
        if path.filename().and_then(generation_of).is_some_and(|of| of < generation) {
            located.store.delete(&path).await?;
            tracing::info!(file = %path, "removed what the state before the reset had written");
        }
    }
    Ok(())
}

fn staged(path: &str) -> Result<Path> {
    parse(&format!("{STAGED}/{}", path.strip_suffix(ENDING).unwrap_or(path)))
}

fn parse(path: &str) -> Result<Path> {
    Path::parse(path).map_err(|error| Error::internal(path).because(error))
}

/// Generation in a file's name.
fn generation_of(name: &str) -> Option<u64> {
    name.strip_prefix("part-g")?.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use arrow::array::{Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
    use arrow::datatypes::{DataType, Field, Schema};

    use super::*;
    use crate::stream::{Origin, timestamp_type};

    fn batch(minutes: &[i64]) -> ChangeBatch {
        let fields = vec![Field::new("t", timestamp_type(), false), Field::new("lang", DataType::Utf8, true)];
        let times: Vec<i64> = minutes.iter().map(|minute| minute * 60_000_000 + 1).collect();
        let times = TimestampMicrosecondArray::from(times).with_timezone("UTC");
        let langs: StringArray = minutes.iter().map(|m| (*m % 2 == 0).then_some("a/b")).collect();
        let rows =
            RecordBatch::try_new(Arc::new(Schema::new(fields)), vec![Arc::new(times), Arc::new(langs)]);
        let order = Int64Array::from_iter_values(0..minutes.len() as i64);
        ChangeBatch::append(
            rows.unwrap(),
            Origin { time: order.clone(), place: order.clone(), offset: order },
        )
    }

    fn files(root: &std::path::Path) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![root.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => found.push(path.strip_prefix(root).unwrap().to_string_lossy().into_owned()),
                }
            }
        }
        found.sort();
        found
    }

    #[tokio::test]
    async fn rows_lie_in_the_folders_of_their_partition_once_they_are_published() {
        let folder = tempfile::tempdir().unwrap();
        let location = folder.path().to_string_lossy().into_owned();
        let partition_by = parse_list("day(t), minute(t), lang").unwrap();
        let config = NdjsonConfig { location: location.clone(), partition_by };
        let mut writer = NdjsonWriter::open(config, 3, 1).unwrap();
        writer.write(&batch(&[0, 1, 0, 1_441])).unwrap();
        let staged = writer.prepare(7).await.unwrap();
        writer.write(&batch(&[0])).unwrap();
        writer.prepare(8).await.unwrap();
        let found = files(folder.path());
        assert_eq!((staged.len(), found.len()), (3, 4));
        assert!(found.iter().all(|path| path.starts_with("_staged/") && !path.ends_with(".ndjson")));
        for _ in 0..2 {
            publish(&location, staged.iter().map(|file| file.path.as_str())).await.unwrap();
            let visible: Vec<_> =
                files(folder.path()).into_iter().filter(|path| path.ends_with(".ndjson")).collect();
            let mut expected: Vec<_> = staged.iter().map(|file| file.path.clone()).collect();
            expected.sort();
            assert_eq!(visible, expected);
        }
        let first = "t_day=1970-01-01/t_minute=1970-01-01T00%3A00%3A00.000000Z/lang=a%2Fb/";
        let name = format!("{first}part-g00000003-e00000000000000000007-s1-0.ndjson");
        let line = "{\"t\":\"1970-01-01T00:00:00.000001Z\",\"lang\":\"a/b\"}\n";
        assert_eq!(std::fs::read_to_string(folder.path().join(name)).unwrap(), line.repeat(2));
        // Epoch 8 has no manifest. Our own generation's files stay.
        clean(&location, 3).await.unwrap();
        assert_eq!(files(folder.path()).len(), 4);
        clean(&location, 4).await.unwrap();
        assert_eq!(files(folder.path()).len(), 3);
    }
}
