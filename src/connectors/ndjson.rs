//! Rows as NDJSON files: `<location>/<partition folders>/part-g<generation>-e<epoch>-s<shard>-<n>.ndjson`.
//!
//! Exactly once after a restart: an epoch's files are written before its manifest, so what a crash left behind of an
//! unfinished epoch is known by its name (an older generation, an epoch that no manifest has) and removed at the next
//! start. A reader may see such rows until then; a reader that must not reads a Delta sink. Changes have a `_weight`.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use super::formats::json_encode::JsonEncoder;
use super::partition::{Partitioning, Splitter, folders, parse_list};
use super::{AppendSink, files};
use crate::error::{Error, Result};
use crate::sql::options::Options;
use crate::stream::ChangeBatch;

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

/// The files of one shard.
pub struct NdjsonSink {
    /// Names of the partition columns.
    names: Vec<String>,
    splitter: Splitter,
    store: Arc<dyn ObjectStore>,
    generation: u64,
    shard: usize,
    encoder: JsonEncoder,
    /// Lines by folder.
    open: BTreeMap<String, Vec<u8>>,
    /// Full ones, until the epoch is known.
    full: Vec<(String, Vec<u8>)>,
}

impl NdjsonSink {
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

    /// Removes what older generations wrote for epochs after `epoch`, the last that has a manifest.
    ///
    /// # Errors
    /// External: the location cannot be read or written.
    pub async fn clean(config: &NdjsonConfig, generation: u64, epoch: u64) -> Result<()> {
        let Some(located) = files::open_existing(&config.location)? else { return Ok(()) };
        let found: Vec<Path> = located.store.list(None).map_ok(|meta| meta.location).try_collect().await?;
        for path in found {
            let unfinished =
                path.filename().and_then(numbers).is_some_and(|(of, at)| of < generation && at > epoch);
            if unfinished {
                located.store.delete(&path).await?;
                tracing::info!(file = %path, "removed what an unfinished epoch had written");
            }
        }
        Ok(())
    }

    fn append(&mut self, folder: String, rows: &ChangeBatch) -> Result<()> {
        let lines = self.encoder.encode(&rows.rows, rows.weights.as_ref())?.lines();
        let open = self.open.entry(folder.clone()).or_default();
        open.extend_from_slice(lines);
        if open.len() >= FILE_BYTES {
            let bytes = std::mem::take(open);
            self.full.push((folder, bytes));
        }
        Ok(())
    }
}

/// Generation and epoch of a file's name.
fn numbers(name: &str) -> Option<(u64, u64)> {
    let mut parts = name.strip_prefix("part-g")?.strip_suffix(".ndjson")?.split('-');
    let generation = parts.next()?.parse().ok()?;
    Some((generation, parts.next()?.strip_prefix('e')?.parse().ok()?))
}

#[async_trait]
impl AppendSink for NdjsonSink {
    async fn write(&mut self, batch: &ChangeBatch) -> Result<()> {
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

    async fn flush(&mut self, epoch: u64) -> Result<()> {
        self.full.extend(std::mem::take(&mut self.open).into_iter().filter(|(_, bytes)| !bytes.is_empty()));
        for (number, (folder, bytes)) in std::mem::take(&mut self.full).into_iter().enumerate() {
            let (generation, shard) = (self.generation, self.shard);
            let name = format!("{folder}part-g{generation:08}-e{epoch:020}-s{shard}-{number}.ndjson");
            let path = Path::parse(&name).map_err(|error| Error::internal(name).because(error))?;
            self.store.put(&path, bytes.into()).await?;
        }
        Ok(())
    }
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
    async fn rows_lie_in_the_folders_of_their_partition_and_unfinished_epochs_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let location = folder.path().to_string_lossy().into_owned();
        let config = NdjsonConfig { location, partition_by: parse_list("day(t), minute(t), lang").unwrap() };
        let mut sink = NdjsonSink::open(config.clone(), 3, 1).unwrap();
        sink.write(&batch(&[0, 1, 0, 1_441])).await.unwrap();
        sink.flush(7).await.unwrap();
        sink.write(&batch(&[0])).await.unwrap();
        sink.flush(8).await.unwrap();
        let found = files(folder.path());
        assert_eq!(found.len(), 4, "{found:?}");
        let first = "t_day=1970-01-01/t_minute=1970-01-01T00%3A00%3A00.000000Z/lang=a%2Fb/";
        let name = format!("{first}part-g00000003-e00000000000000000007-s1-0.ndjson");
        assert!(found.contains(&name), "{found:?}");
        let line = "{\"t\":\"1970-01-01T00:00:00.000001Z\",\"lang\":\"a/b\"}\n";
        assert_eq!(std::fs::read_to_string(folder.path().join(name)).unwrap(), line.repeat(2));
        // Epoch 8 has no manifest; our own generation's files stay.
        NdjsonSink::clean(&config, 3, 7).await.unwrap();
        assert_eq!(files(folder.path()).len(), 4);
        NdjsonSink::clean(&config, 4, 7).await.unwrap();
        assert_eq!(files(folder.path()).len(), 3);
        assert!(files(folder.path()).iter().all(|name| name.contains("e00000000000000000007")));
    }
}
