//! Prepared files that are gone (a foreign VACUUM) are made again (DESIGN §5 *Delta commit*).
//!
//! What epoch N gives a table is a function of the state at the data manifest before it, of the records up to N's offsets,
//! and of what N decided about them: which were late (its ledger), and its watermark. All of that is kept until N's
//! commits are acknowledged. So the epoch runs again, for the sinks that lack it and for nothing else, and their new
//! files take the place of the lost ones under the same epoch. The state that this run writes is deleted: N's is there.
//!
//! Nothing is decided anew. A row is late if the ledger says so; the watermark stands still until the last record and
//! is N's then. Rows, late rows and dead letters must be as many as N's accounts say, and an appended table must get as
//! many rows as before: else the source no longer gives what it gave, or a look-up table changed, and the start stops.
//!
//! A table of dead letters is not made again: other sinks refuse rows too, and those must not be written twice.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{AsArray, BooleanArray, Int64Array, RecordBatch};
use arrow::compute::{filter, filter_record_batch};
use arrow::datatypes::{Int32Type, Int64Type, SchemaRef};
use async_trait::async_trait;
use bytes::Bytes;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use tokio::sync::watch;

use crate::connectors::delta::Mode;
use crate::connectors::{PartitionInfo, SourceBatch, SourceConnector, SourceReader};
use crate::error::{Error, Result};
use crate::plan::{NodeId, SinkKind, SinkPlan, StreamPlan};
use crate::runtime::graph::{Tasks, spawn};
use crate::runtime::metrics::Metrics;
use crate::runtime::report::{Command, Report, SourceEpoch};
use crate::runtime::start::World;
use crate::runtime::tables::Tables;
use crate::runtime::watermark::Decided;
use crate::runtime::{RunOptions, lookups};
use crate::state::manifest::{Accounts, Manifest, PreparedCommit, PreparedFile, SourceProgress};
use crate::state::store::StateStore;
use crate::stream::{Barrier, DeadLetter, Place, Positions};

/// A prepared commit that is not in its table, and whose files are not all there.
#[derive(Debug, Clone)]
pub struct Lost {
    pub commit: PreparedCommit,
    /// One of the files that are gone.
    pub file: String,
    /// The newest epoch of the sink in the table.
    pub newest: Option<u64>,
    /// The table is about to get columns that it did not have when the commit was prepared.
    pub grows: bool,
}

/// What a start has when it finds a commit lost.
pub struct Past<'a> {
    pub store: &'a Arc<StateStore>,
    /// The claim.
    pub manifest: &'a Manifest,
    pub source: &'a Arc<dyn SourceConnector>,
    pub partitions: &'a [PartitionInfo],
    pub options: &'a RunOptions,
}

/// Whether a lost commit can be made again, or why not. `before`: the data manifest before its own.
fn possible(lost: &Lost, before: Option<&Manifest>, letters: bool) -> Result<(), &'static str> {
    let Some(before) = before else { return Err("it is the first epoch, so there is no state before it") };
    if letters {
        return Err("a table of dead letters cannot be made again");
    }
    if lost.grows {
        return Err("the table gets other columns with this start");
    }
    let known = before.fingerprints.contains_key(&lost.commit.sink);
    let follows = match lost.newest {
        Some(newest) => Some(newest) == before.data_epoch,
        // The sink was new, so it is its first epoch.
        None => !known,
    };
    if follows { Ok(()) } else { Err("the table lacks earlier epochs too") }
}

/// Makes the files of lost commits again; gives the commits with the new files.
///
/// # Errors
/// External: it is not possible, the source does not give the same records any more, or a store failed. Fenced:
/// overtaken.
pub async fn remake(plan: &StreamPlan, past: &Past<'_>, lost: &[Lost]) -> Result<Vec<PreparedCommit>> {
    let before = match past.manifest.previous_data_epoch {
        Some(epoch) => past.store.read(epoch).await?,
        None => None,
    };
    let mut nodes = Vec::new();
    for lost in lost {
        let Some((node, _)) = plan.sinks().find(|(_, sink)| sink.name == lost.commit.sink) else { continue };
        possible(lost, before.as_ref(), plan.reads_letters(node)).map_err(|why| gone(lost, why))?;
        let (sink, epoch) = (&lost.commit.sink, lost.commit.epoch);
        tracing::warn!(%sink, epoch, file = %lost.file, "a prepared file is gone; the epoch is made again");
        nodes.push(node);
    }
    let (Some(before), Some(epoch)) = (before, past.manifest.data_epoch) else { return Ok(Vec::new()) };
    let part = Arc::new(plan.only(&nodes));
    let made = run(Arc::clone(&part), past, &before, epoch).await;
    let made = made.map_err(|error| error.context("making a lost epoch again"))?;
    past.store.delete_files(&made.state).await?;
    let mut commits = Vec::new();
    for lost in lost {
        let Some((node, sink)) = part.sinks().find(|(_, sink)| sink.name == lost.commit.sink) else {
            continue;
        };
        let parts = made.prepared.iter().filter(|(of, _)| *of == node);
        let files: Vec<PreparedFile> = parts.flat_map(|(_, files)| files.iter().cloned()).collect();
        same_rows(sink, &lost.commit.files, &files).map_err(|why| gone(lost, &why))?;
        commits.push(PreparedCommit { files, ..lost.commit.clone() });
    }
    // Whoever overtook us has made them too; the tables know which came first, but there is no need to try.
    past.store.check_fence(past.manifest.epoch).await?;
    Ok(commits)
}

/// How many rows changes come in depends on how the input is cut; rows that are only added are what they are.
fn same_rows(sink: &SinkPlan, lost: &[PreparedFile], made: &[PreparedFile]) -> Result<(), String> {
    let rows = |files: &[PreparedFile]| files.iter().map(|file| file.rows).sum::<u64>();
    let appends = matches!(&sink.kind, SinkKind::Delta(config) if config.mode == Mode::Append);
    match (rows(lost), rows(made)) {
        (before, now) if appends && before != now => Err(format!("it had {before} rows, and has {now} now")),
        _ => Ok(()),
    }
}

fn gone(lost: &Lost, why: &str) -> Error {
    let (sink, file, epoch) = (&lost.commit.sink, &lost.file, lost.commit.epoch);
    let message = format!(
        "sink {sink}: the prepared file {file} is gone, and epoch {epoch} cannot be made again: {why}"
    );
    let hint = "Another VACUUM removed files of an unfinished commit (see that its retention is longer than a pipeline \
                stands still). Bring the file back from a copy of the store, or start the pipeline under another --name \
                with other locations; rebuilding the table comes with a later version.";
    Error::external(message).hint(hint)
}

/// What the epoch gave this time.
#[derive(Default)]
struct Made {
    prepared: Vec<(NodeId, Vec<PreparedFile>)>,
    /// State files that nothing refers to.
    state: Vec<String>,
}

/// Runs one epoch from the state of `before` up to the offsets of the claim.
async fn run(part: Arc<StreamPlan>, past: &Past<'_>, before: &Manifest, epoch: u64) -> Result<Made> {
    let name = part.source().map(|(_, source)| source.name.clone()).unwrap_or_default();
    let progress = |manifest: &Manifest| manifest.sources.get(&name).cloned().unwrap_or_default();
    let (from, to) = (progress(before), progress(past.manifest));
    let ends = to.positions(0);
    let (lookups, digests) = lookups::open(&part).await?;
    if let Some(table) = lookups::changed(&past.manifest.lookups, &digests).first() {
        let message = format!("look-up table {table} has other rows than in the epoch");
        let hint = "Bring its rows of then back for one start, or the lost file from a copy of the store.";
        return Err(Error::external(message).hint(hint));
    }
    let decided = Decided { late: late(past, epoch, &name).await?, watermark: to.watermark };
    let world = World {
        store: Arc::clone(past.store),
        manifest: Manifest { epoch: epoch - 1, generation: past.manifest.generation, ..before.clone() },
        claimed: past.manifest.epoch,
        orphans: Vec::new(),
        source: Arc::new(Bounded { inner: Arc::clone(past.source), ends: ends.clone() }),
        embedded: None,
        positions: begin(&from, &ends, past.partitions),
        history: None,
        ends,
        tables: Tables::none(),
        online: BTreeMap::new(),
        lookups: Arc::new(lookups),
        digests,
        decided: Some(Arc::new(decided)),
    };
    let metrics = Metrics::of(&part);
    // Nobody waits for a manifest: there is no online sink.
    let (_durable, published) = watch::channel(0);
    let tasks = spawn(part, &world, past.options, metrics, published).await?;
    let (sources, made) = gather(tasks, epoch).await?;
    let mut read = Accounts::default();
    sources.iter().for_each(|source| read.add(&source.accounts));
    same_records(&read, &from.accounts, &to.accounts)?;
    Ok(made)
}

/// Where each partition is read from: one that was added in the epoch, from its beginning.
fn begin(from: &SourceProgress, ends: &Positions, partitions: &[PartitionInfo]) -> Positions {
    let known = from.positions(0);
    let low = |place: Place| {
        let found = partitions.iter().find(|p| Place::new(0, p.topic, p.partition) == place);
        found.map_or(0, |partition| partition.low)
    };
    ends.iter().map(|(place, _)| (place, known.get(place).unwrap_or_else(|| low(place)))).collect()
}

/// What the epoch's ledger holds of the source.
async fn late(past: &Past<'_>, epoch: u64, source: &str) -> Result<HashSet<(u16, i32, i64)>> {
    let mut late = HashSet::new();
    for segment in past.manifest.ledger.iter().filter(|s| s.epoch == epoch && s.source == source) {
        let bytes = past.store.get_file(&segment.path).await?;
        let read = read_ledger(bytes, &past.source.topics());
        late.extend(read.map_err(|error| error.context(&segment.path))?);
    }
    Ok(late)
}

/// Reads a segment of the ledger back.
///
/// # Errors
/// External: it is damaged, or names a topic that the source does not have.
fn read_ledger(segment: Bytes, topics: &[Arc<str>]) -> Result<Vec<(u16, i32, i64)>> {
    let damaged = || {
        let hint = "Restore the state folder from a copy, or run `millstream reset` to begin a new state.";
        Error::external("a segment of the late ledger is damaged").hint(hint)
    };
    let reader = ParquetRecordBatchReaderBuilder::try_new(segment).and_then(|builder| builder.build());
    let mut late = Vec::new();
    for batch in reader.map_err(|error| damaged().because(error))? {
        let batch = batch.map_err(|error| damaged().because(error))?;
        let names = batch.column_by_name("topic").and_then(|column| column.as_string_opt::<i32>());
        let partitions =
            batch.column_by_name("partition").and_then(|column| column.as_primitive_opt::<Int32Type>());
        let offsets =
            batch.column_by_name("offset").and_then(|column| column.as_primitive_opt::<Int64Type>());
        let (Some(names), Some(partitions), Some(offsets)) = (names, partitions, offsets) else {
            return Err(damaged());
        };
        for row in 0..batch.num_rows() {
            let topic = topics.iter().position(|topic| **topic == *names.value(row)).ok_or_else(damaged)?;
            late.push((topic as u16, partitions.value(row), offsets.value(row)));
        }
    }
    Ok(late)
}

/// `read`: in the epoch as it was made again. Tombstones and skipped records leave no row, so none is missed.
fn same_records(read: &Accounts, from: &Accounts, to: &Accounts) -> Result<()> {
    let expected = [
        ("rows", read.accepted, to.accepted.saturating_sub(from.accepted)),
        ("late rows", read.late, to.late.saturating_sub(from.late)),
        ("dead letters", read.dead_letters, to.dead_letters.saturating_sub(from.dead_letters)),
    ];
    match expected.into_iter().find(|(_, now, before)| now != before) {
        None => Ok(()),
        Some((what, now, before)) => {
            let message = format!("the source had {before} {what} in the epoch, and has {now} now");
            let hint = "Its records were removed or replaced meanwhile, as by the topic's retention. Bring the lost file \
                        back from a copy of the store, or start the pipeline under another --name with other locations.";
            Err(Error::external(message).hint(hint))
        }
    }
}

/// Waits for the end of every shard, cuts, and takes what each task has.
async fn gather(mut tasks: Tasks, epoch: u64) -> Result<(Vec<SourceEpoch>, Made)> {
    let unexpected = || Error::internal("a task reported an epoch that is not open");
    let mut left = tasks.commands.len();
    while left > 0 {
        match tasks.reports.recv().await {
            Some(Report::AtEnd { .. }) => left -= 1,
            Some(Report::Failed(error)) => return Err(error),
            Some(_) => return Err(unexpected()),
            None => return Err(Error::internal("all tasks are gone")),
        }
    }
    for command in &tasks.commands {
        let barrier = Barrier { epoch, last: true };
        // One that is gone says why.
        command.send(Command::Cut { barrier, close: false }).await.ok();
    }
    let (mut sources, mut made, mut parts) = (Vec::new(), Made::default(), 0);
    let expected: usize = tasks.shards.values().sum();
    while sources.len() < tasks.commands.len() || parts < expected {
        match tasks.reports.recv().await {
            Some(Report::Source(part)) => sources.push(part),
            Some(Report::State { part, .. }) => {
                parts += 1;
                made.state.extend(part.files.into_iter().map(|file| file.path));
            }
            Some(Report::Prepared { node, files, .. }) => {
                parts += 1;
                made.prepared.push((node, files));
            }
            Some(Report::AtEnd { .. } | Report::Held) => {}
            Some(Report::Failed(error)) => return Err(error),
            None => return Err(Error::internal("all tasks are gone")),
        }
    }
    Ok((sources, made))
}

/// A source that ends at fixed offsets.
struct Bounded {
    inner: Arc<dyn SourceConnector>,
    ends: Positions,
}

#[async_trait]
impl SourceConnector for Bounded {
    fn topics(&self) -> Vec<Arc<str>> {
        self.inner.topics()
    }

    fn schema(&self) -> SchemaRef {
        self.inner.schema()
    }

    async fn partitions(&self) -> Result<Vec<PartitionInfo>> {
        self.inner.partitions().await
    }

    async fn start_positions(&self, partitions: &[PartitionInfo]) -> Result<Positions> {
        self.inner.start_positions(partitions).await
    }

    async fn reader(&self, assigned: Positions) -> Result<Box<dyn SourceReader>> {
        let inner = self.inner.reader(assigned).await?;
        Ok(Box::new(BoundedReader { inner, ends: self.ends.clone() }))
    }
}

struct BoundedReader {
    inner: Box<dyn SourceReader>,
    ends: Positions,
}

impl SourceReader for BoundedReader {
    fn poll(&mut self, max_rows: usize, linger: Duration) -> Result<Option<SourceBatch>> {
        self.inner.poll(max_rows, linger)?.map(|batch| up_to(batch, &self.ends)).transpose()
    }

    fn pause(&mut self, places: &[Place]) -> Result<()> {
        self.inner.pause(places)
    }

    /// The pipeline has told more already.
    fn acknowledge(&mut self, _: &Positions) {}

    fn add_headers(&self, letters: &mut [DeadLetter]) {
        self.inner.add_headers(letters);
    }

    fn lag(&self) -> i64 {
        0
    }
}

/// What of a batch lies before the ends. No partition counts as idle.
fn up_to(mut batch: SourceBatch, ends: &Positions) -> Result<SourceBatch> {
    batch.at_end.clear();
    let before = |partition: i32, offset: i64| {
        ends.iter().any(|(place, end)| place.partition() == partition && offset < end)
    };
    let within = |(place, reached): (Place, i64)| (place, ends.get(place).unwrap_or(0).min(reached));
    batch.reached = batch.reached.iter().map(within).collect();
    batch.dead.retain(|letter| before(letter.partition, letter.offset));
    let kept: BooleanArray = batch
        .partition
        .values()
        .iter()
        .zip(batch.offset.values())
        .map(|(partition, offset)| Some(before(*partition, *offset)))
        .collect();
    if kept.true_count() == kept.len() {
        return Ok(batch);
    }
    let offsets =
        |array: &Int64Array| filter(array, &kept).map(|kept| kept.as_primitive::<Int64Type>().clone());
    let bytes = |array: &Option<arrow::array::BinaryArray>| {
        array.as_ref().map(|array| filter(array, &kept).map(|kept| kept.as_binary().clone())).transpose()
    };
    let rows: RecordBatch = filter_record_batch(&batch.rows, &kept)?;
    Ok(SourceBatch {
        rows,
        partition: filter(&batch.partition, &kept)?.as_primitive().clone(),
        offset: offsets(&batch.offset)?,
        timestamp: offsets(&batch.timestamp)?,
        key: bytes(&batch.key)?,
        payload: bytes(&batch.payload)?,
        ..batch
    })
}

#[cfg(test)]
#[path = "remake_tests.rs"]
mod tests;
