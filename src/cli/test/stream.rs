//! A case as a stream: the real runtime over records and sinks in memory, cut, ordered and restarted by a seed.
//!
//! The seed fixes partitions, order, cuts, parallelism and where the run is stopped or killed. How threads take turns it
//! does not fix: that is the machine's, as in production.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arrow::array::{AsArray, Int64Array, RecordBatch, TimestampMicrosecondArray, UInt32Array};
use arrow::compute::{concat_batches, take_record_batch};
use arrow::datatypes::{Int32Type, Int64Type, SchemaRef};
use arrow::row::{RowConverter, SortField};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use tokio::sync::watch;

use super::arrange::{Known, arrange, verdicts};
use crate::connectors::collect::Collector;
use crate::connectors::files;
use crate::connectors::memory::MemoryStore;
use crate::connectors::records::{Dice, Record, RecordTopic};
use crate::error::{Error, Result};
use crate::plan::lower::Emission;
use crate::plan::source::METADATA;
use crate::plan::{Edge, Node, NodeKind, OnlineKind, SinkKind, SinkPlan, SourceKind, SourcePlan, StreamPlan};
use crate::runtime::{Metrics, RunOptions};
use crate::state::accounts::faults;
use crate::state::manifest::Manifest;
use crate::state::store::StateStore;
use crate::stream::clock::Clock;
use crate::stream::{ChangeBatch, Micros, Place, Port};

/// A run that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// Partitions never become idle: that would depend on the wall clock.
const NEVER_IDLE: Duration = Duration::from_secs(1_000_000_000);

/// The records of a source, and what the source itself makes of them.
pub struct Prepared {
    pub source: SourcePlan,
    pub records: Vec<Record>,
    pub known: Vec<Known>,
    pub lateness: Option<Micros>,
    /// The accepted rows with every column of the source, as a backup would hold them.
    pub rows: RecordBatch,
    /// Which record each of them came from.
    pub from: Vec<usize>,
}

/// One stream run over all records.
pub struct Finished {
    /// By sink.
    pub rows: BTreeMap<String, RecordBatch>,
    pub late: u64,
    /// (source or view, record) of dead letters.
    pub dead: BTreeSet<(String, usize)>,
}

/// How a round runs, by its seed.
pub struct Shape {
    pub partitions: Vec<Vec<usize>>,
    parallelism: [usize; 2],
    checkpoint: Duration,
    /// Records of each partition that the first run sees, if there are two runs.
    cut: Option<Vec<usize>>,
    /// The first run is killed, not stopped.
    kill: bool,
    seed: u64,
}

/// Reads the records once, in order and one partition, through the source alone.
///
/// # Errors
/// What the run cannot ride out: a bad record under `on_error = 'fail'` among others.
pub async fn prepare(source: &SourcePlan, mut records: Vec<Record>, folder: &Path) -> Result<Prepared> {
    let lateness = source.event_time.map(|_| source.lateness);
    if lateness.is_none() {
        // Without event time the record's timestamp is the order.
        records.iter_mut().enumerate().for_each(|(at, record)| {
            record.timestamp.get_or_insert(at as i64);
        });
    }
    let edge = Edge { from: 0, port: Port::Accepted, exchange: None, branch: 0 };
    let sink = SinkPlan {
        name: "accepted".to_owned(),
        kind: SinkKind::Blackhole,
        emission: Emission::Final,
        schema: Arc::clone(&source.schema),
        key: Vec::new(),
        settled: false,
        order: None,
        time: None,
    };
    let node =
        |id: &str, kind, inputs| Node { id: id.to_owned(), kind, inputs, schema: Arc::clone(&source.schema) };
    let nodes = vec![
        node("source", NodeKind::Source(source.clone()), Vec::new()),
        node("accepted", NodeKind::Sink(sink), vec![edge]),
    ];
    let mut plan = StreamPlan { nodes };
    let topic = topic_of(source, vec![records.clone()], None);
    let held = rewire(&mut plan, &topic)?;
    run(plan, folder, 1, Duration::from_secs(3_600), true).await?;
    let Some(Held::Rows(collector)) = held.get("accepted") else {
        return Err(Error::internal("the sink of a source is gone"));
    };
    let batches = collector.rows();
    let rows = concat_batches(&source.schema, batches.iter().map(|batch| &batch.rows))?;
    let (mut times, mut from) = (vec![None; records.len()], Vec::new());
    for batch in &batches {
        for row in 0..batch.num_rows() {
            let (time, _, offset) = batch.origin.key(row);
            times[offset as usize] = Some(time);
            from.push(offset as usize);
        }
    }
    for (record, time) in records.iter_mut().zip(&times) {
        record.timestamp = record.timestamp.or(time.map(|time| time.div_euclid(1_000)));
    }
    let rows = with_timestamps(source, rows, &records, &from)?;
    let known = verdicts(times, lateness);
    Ok(Prepared { source: source.clone(), records, known, lateness, rows, from })
}

/// The column `_timestamp` as later runs will have it.
fn with_timestamps(
    source: &SourcePlan,
    rows: RecordBatch,
    records: &[Record],
    from: &[usize],
) -> Result<RecordBatch> {
    let at =
        source.schema.fields().iter().position(|field| source.has_metadata() && field.name() == METADATA[3]);
    let Some(at) = at else { return Ok(rows) };
    let micros = |row: &usize| records[*row].timestamp.map(|ms| ms.saturating_mul(1_000));
    let column: TimestampMicrosecondArray = from.iter().map(micros).collect();
    let mut columns = rows.columns().to_vec();
    columns[at] = Arc::new(column.with_timezone("UTC"));
    Ok(RecordBatch::try_new(rows.schema(), columns)?)
}

fn topic_of(source: &SourcePlan, partitions: Vec<Vec<Record>>, seed: Option<u64>) -> RecordTopic {
    let topic = match &source.kind {
        #[cfg(feature = "kafka")]
        SourceKind::Kafka(config) => config.topic.as_str(),
        _ => source.name.as_str(),
    };
    RecordTopic {
        source: source.name.as_str().into(),
        topic: topic.into(),
        columns: Arc::clone(&source.physical),
        ends: partitions.iter().map(Vec::len).collect(),
        partitions: Arc::new(partitions),
        seed,
        delivered: Arc::default(),
    }
}

/// What holds the rows of a sink.
enum Held {
    Rows(Collector),
    Newest(Arc<MemoryStore>),
}

/// Puts memory in the place of every connector.
fn rewire(plan: &mut StreamPlan, topic: &RecordTopic) -> Result<BTreeMap<String, Held>> {
    let mut held = BTreeMap::new();
    for node in &mut plan.nodes {
        match &mut node.kind {
            NodeKind::Source(source) => {
                source.kind = SourceKind::Records(topic.clone());
                source.idle_timeout = NEVER_IDLE;
            }
            NodeKind::Sink(sink) => {
                held.insert(sink.name.clone(), hold(sink)?);
            }
            _ => {}
        }
    }
    Ok(held)
}

fn hold(sink: &mut SinkPlan) -> Result<Held> {
    if let SinkKind::Online { store, ttl_micros } = &mut sink.kind {
        let memory = Arc::new(MemoryStore::new(Arc::clone(&sink.schema), sink.key.clone())?);
        *store = OnlineKind::Held(Arc::clone(&memory));
        // A time to live ends by the wall clock.
        *ttl_micros = None;
        return Ok(Held::Newest(memory));
    }
    let collector = Collector::default();
    sink.kind = SinkKind::Collect(collector.clone());
    Ok(Held::Rows(collector))
}

impl Shape {
    /// Three seeds in a row have a run without restart, one that is stopped and one that is killed in the middle.
    pub fn new(prepared: &Prepared, seed: u64) -> Self {
        let mut dice = Dice::new(seed.wrapping_mul(0x2545_F491_4F6C_DD1D));
        let partitions = arrange(&prepared.known, prepared.lateness, &mut dice);
        let parallelism = [1 + dice.index(4), 1 + dice.index(4)];
        let checkpoint = Duration::from_millis(1 + dice.roll(20));
        let cut = partitions.iter().map(|records| dice.index(records.len() + 1)).collect();
        let cut = (!seed.is_multiple_of(3) && !prepared.records.is_empty()).then_some(cut);
        Self { partitions, parallelism, checkpoint, cut, kill: seed % 3 == 2, seed }
    }

    /// In words; records are numbered from 1 in the order of the fixture.
    pub fn describe(&self) -> String {
        let total: usize = self.partitions.iter().map(Vec::len).sum();
        let restart = match &self.cut {
            None => String::new(),
            Some(cut) => {
                let how = if self.kill { "killed" } else { "stopped" };
                let read: usize = cut.iter().sum();
                format!(", {how} after {read} of {total} records and restarted with {}", self.parallelism[1])
            }
        };
        let order = |(number, records): (usize, &Vec<usize>)| {
            let records: Vec<String> = records.iter().map(|record| (record + 1).to_string()).collect();
            format!("{number}: {}", records.join(" "))
        };
        let partitions: Vec<String> = self.partitions.iter().enumerate().map(order).collect();
        let places = match total {
            0..=60 => format!("records by partition {}", partitions.join("; ")),
            _ => format!("{total} records in {} partitions", self.partitions.len()),
        };
        format!("parallelism {}{restart}; {places}", self.parallelism[0])
    }
}

/// Runs the plan over all records and closes it.
///
/// # Errors
/// What the stream cannot ride out, or rows that it took away although they were not there.
pub async fn round(plan: &StreamPlan, prepared: &Prepared, shape: &Shape, folder: &Path) -> Result<Finished> {
    let partitions: Vec<Vec<Record>> = shape
        .partitions
        .iter()
        .map(|records| records.iter().map(|record| prepared.records[*record].clone()).collect())
        .collect();
    let mut topic = topic_of(&prepared.source, partitions, Some(shape.seed));
    let mut plan = plan.clone();
    let held = rewire(&mut plan, &topic)?;
    let ends = topic.ends.clone();
    let mut parallelism = shape.parallelism[0];
    if let Some(cut) = &shape.cut {
        topic.ends.clone_from(cut);
        let first = with_topic(&plan, &topic);
        match shape.kill {
            true => killed(first, &topic, folder, shape).await?,
            false => run(first, folder, parallelism, shape.checkpoint, false).await?,
        }
        parallelism = shape.parallelism[1];
    }
    topic.ends = ends;
    run(with_topic(&plan, &topic), folder, parallelism, shape.checkpoint, true).await?;
    let (late, dead) = accounts(folder, &shape.partitions).await?;
    let mut rows = BTreeMap::new();
    for (_, sink) in plan.sinks() {
        let found = match held.get(&sink.name) {
            Some(Held::Rows(collector)) => accumulated(&sink.schema, &collector.rows())?,
            Some(Held::Newest(store)) => match store.snapshot()? {
                Some((rows, _)) => rows,
                None => RecordBatch::new_empty(Arc::clone(&sink.schema)),
            },
            None => return Err(Error::internal(format!("the sink {} is gone", sink.name))),
        };
        rows.insert(sink.name.clone(), found);
    }
    Ok(Finished { rows, late, dead })
}

fn with_topic(plan: &StreamPlan, topic: &RecordTopic) -> StreamPlan {
    let mut plan = plan.clone();
    for node in &mut plan.nodes {
        if let NodeKind::Source(source) = &mut node.kind {
            source.kind = SourceKind::Records(topic.clone());
        }
    }
    plan
}

fn options(folder: &Path, parallelism: usize, checkpoint: Duration, close: bool) -> RunOptions {
    RunOptions {
        name: "test".to_owned(),
        state: folder.to_string_lossy().into_owned(),
        parallelism,
        checkpoint,
        until_end: true,
        close,
        memory: None,
        allow_gap: false,
        rebuild: false,
        console: crate::cli::output::console,
    }
}

async fn run(
    plan: StreamPlan,
    folder: &Path,
    parallelism: usize,
    checkpoint: Duration,
    close: bool,
) -> Result<()> {
    let (_stop, stopped) = watch::channel(false);
    let options = options(folder, parallelism, checkpoint, close);
    let metrics = Metrics::of(&plan);
    let running = crate::runtime::run(plan, options, metrics, stopped);
    let done = tokio::time::timeout(PATIENCE, running).await;
    done.map_err(|_| Error::internal(format!("the stream did not end within {} s", PATIENCE.as_secs())))??;
    Ok(())
}

/// Runs and drops everything in the middle: nothing is said to the tasks, no last checkpoint is taken.
async fn killed(plan: StreamPlan, topic: &RecordTopic, folder: &Path, shape: &Shape) -> Result<()> {
    let (_stop, stopped) = watch::channel(false);
    let options =
        RunOptions { until_end: false, ..options(folder, shape.parallelism[0], shape.checkpoint, false) };
    let wanted: usize = topic.ends.iter().sum();
    let metrics = Metrics::of(&plan);
    let reached = async {
        while topic.delivered.load(Ordering::Relaxed) < wanted as u64 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(shape.checkpoint).await;
    };
    tokio::select! {
        done = crate::runtime::run(plan, options, metrics, stopped) => done.map(|_| ()),
        reached = tokio::time::timeout(PATIENCE, reached) => {
            reached.map_err(|_| Error::internal("the stream stands still"))
        }
    }
}

/// Late rows and dead letters by the last manifest.
async fn accounts(folder: &Path, partitions: &[Vec<usize>]) -> Result<(u64, BTreeSet<(String, usize)>)> {
    let located = files::open(&folder.to_string_lossy())?;
    let store = StateStore::new(located.store, object_store::path::Path::default(), Clock);
    let manifest: Manifest =
        store.latest().await?.ok_or_else(|| Error::internal("a run left no manifest"))?;
    let late = manifest.sources.values().map(|source| source.accounts.late).sum();
    if let Some(fault) = faults(&manifest).first() {
        return Err(Error::internal(format!("the accounts of {} do not add up: {}", fault.at, fault.what)));
    }
    let mut dead = BTreeSet::new();
    for segment in &manifest.dead_letters {
        let bytes = store.get_file(&segment.path).await?;
        for batch in ParquetRecordBatchReaderBuilder::try_new(bytes)?.build()? {
            let batch = batch?;
            let column = |name: &str| {
                batch.column_by_name(name).ok_or_else(|| Error::internal("a dead letter lacks a column"))
            };
            let (at, partition, offset) = (column("at")?, column("partition")?, column("offset")?);
            let partition = partition.as_primitive::<Int32Type>();
            let offset = offset.as_primitive::<Int64Type>();
            for row in 0..batch.num_rows() {
                let place = Place::new(0, 0, partition.value(row));
                let records = partitions.get(place.partition() as usize);
                let record = records.and_then(|records| records.get(offset.value(row) as usize));
                let record = record.ok_or_else(|| Error::internal("a dead letter of no record"))?;
                dead.insert((at.as_string::<i32>().value(row).to_owned(), *record));
            }
        }
    }
    Ok((late, dead))
}

/// Rows that hold after all changes.
fn accumulated(schema: &SchemaRef, batches: &[ChangeBatch]) -> Result<RecordBatch> {
    let all = concat_batches(schema, batches.iter().map(|batch| &batch.rows))?;
    if batches.iter().all(|batch| batch.weights.is_none()) {
        return Ok(all);
    }
    let weights: Vec<i64> = batches
        .iter()
        .flat_map(|batch| match &batch.weights {
            Some(weights) => weights.values().to_vec(),
            None => vec![1; batch.num_rows()],
        })
        .collect();
    let fields = schema.fields().iter().map(|field| SortField::new(field.data_type().clone())).collect();
    let rows = RowConverter::new(fields)?.convert_columns(all.columns())?;
    let mut sums: BTreeMap<&[u8], (u32, i64)> = BTreeMap::new();
    let keys: Vec<_> = rows.iter().collect();
    for (at, weight) in weights.iter().enumerate() {
        sums.entry(keys[at].as_ref()).or_insert((at as u32, 0)).1 += weight;
    }
    let mut kept = Vec::new();
    for (at, weight) in sums.into_values() {
        let times = usize::try_from(weight)
            .map_err(|_| Error::internal("the changes take a row away that is not there"))?;
        kept.extend(std::iter::repeat_n(at, times));
    }
    Ok(take_record_batch(&all, &UInt32Array::from(kept))?)
}

/// The accepted rows but for some records.
///
/// # Errors
/// Internal, from arrow.
pub fn without(prepared: &Prepared, left_out: impl Fn(usize) -> bool) -> Result<RecordBatch> {
    let kept = prepared.from.iter().enumerate().filter(|(_, record)| !left_out(**record));
    let kept: UInt32Array = kept.map(|(row, _)| row as u32).collect::<Vec<_>>().into();
    Ok(take_record_batch(&prepared.rows, &kept)?)
}

/// The values of a column by which rows are ordered, as integers.
///
/// # Errors
/// Internal, from arrow.
pub fn order_values(batch: &RecordBatch, column: usize) -> Result<Int64Array> {
    Ok(arrow::compute::cast(batch.column(column), &arrow::datatypes::DataType::Int64)?.as_primitive().clone())
}
