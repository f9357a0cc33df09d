//! Dead letters and the late ledger, read from the state of a pipeline, which may be running.
//!
//! The newest manifest names the segments; they are never changed or deleted, so what is read is what that manifest
//! holds. Rows come newest first: by epoch, then by the record's own time.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, BooleanArray, RecordBatch, UInt32Array, new_null_array};
use arrow::compute::{
    SortColumn, SortOptions, cast, concat_batches, filter_record_batch, lexsort_to_indices, take_record_batch,
};
use arrow::datatypes::{DataType, Int32Type, Int64Type, SchemaRef, TimeUnit};
#[cfg(feature = "delta")]
use datafusion::prelude::SessionContext;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::connectors::files;
use crate::error::{Error, Result};
#[cfg(feature = "delta")]
use crate::plan::{SinkKind, StreamPlan, session::batch_session};
use crate::state::manifest::{Manifest, Segment};
use crate::state::store::StateStore;
use crate::stream::clock::Clock;
use crate::stream::letters::schema;

/// Columns, and whether each descends.
type Order<'a> = [(&'a str, bool)];
/// What is kept of the segment of an epoch, in today's columns.
type Keep<'a> = dyn Fn(RecordBatch, u64) -> Result<RecordBatch> + Sync + 'a;

/// The place of a record: topic, partition, offset.
pub type Record = (String, i32, i64);

/// Which dead letters; what is empty does not choose.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    pub stages: Vec<String>,
    pub kinds: Vec<String>,
    pub at: Vec<String>,
    pub record: Option<Record>,
    /// By view or sink: none up to this epoch.
    pub after: BTreeMap<String, u64>,
}

/// Rows, and whether there are more than asked for.
pub struct Found {
    pub rows: RecordBatch,
    pub more: bool,
}

/// The state of a pipeline, opened for reading: it is neither claimed nor fenced.
pub struct State {
    pub store: StateStore,
    pub manifest: Manifest,
}

/// # Errors
/// External: there is no state, or it cannot be read.
pub async fn open(state: &str) -> Result<State> {
    let absent = || {
        Error::external(format!("there is no state at {state}")).hint(
            "Name the pipeline with --name, as `run` did (`dev` adds -dev), or its folder with --state.",
        )
    };
    let located = files::open_existing_private(state)?.ok_or_else(absent)?;
    files::probe(&located).await?;
    let store = StateStore::new(located.store, object_store::path::Path::default(), Clock);
    let manifest = store.latest().await?.ok_or_else(absent)?;
    Ok(State { store, manifest })
}

impl State {
    /// Dead letters with the columns of the relation, at most `limit`.
    ///
    /// # Errors
    /// External: a segment is missing or damaged.
    pub async fn letters(&self, filter: &Filter, limit: Option<usize>) -> Result<Found> {
        let order = [("timestamp", true), ("topic", false), ("partition", false), ("offset", true)];
        let keep = |rows: RecordBatch, epoch| chosen(&as_now(&rows)?, filter, epoch);
        self.newest(&self.manifest.dead_letters, &schema(), limit, (&order, &keep)).await
    }

    /// (topic, partition, offset) of late rows, at most `limit`.
    ///
    /// # Errors
    /// External: a segment is missing or damaged.
    pub async fn late(&self, limit: Option<usize>) -> Result<Found> {
        let order = [("topic", false), ("partition", false), ("offset", true)];
        let columns = Arc::new(schema().project(&[4, 5, 6])?);
        self.newest(&self.manifest.ledger, &columns, limit, (&order, &|rows, _| Ok(rows))).await
    }

    /// (topic, partition, offset) of records that a replay appended to a backup, or was about to append.
    ///
    /// # Errors
    /// External: a file is missing or damaged.
    pub async fn replayed(&self) -> Result<RecordBatch> {
        let columns = Arc::new(schema().project(&[4, 5, 6])?);
        let mut rows = Vec::new();
        for path in self.store.replayed().await? {
            rows.extend(self.read(&path).await?);
        }
        Ok(concat_batches(&columns, &rows)?)
    }

    async fn newest(
        &self,
        segments: &[Segment],
        schema: &SchemaRef,
        limit: Option<usize>,
        (order, keep): (&Order<'_>, &Keep<'_>),
    ) -> Result<Found> {
        let mut segments: Vec<&Segment> = segments.iter().collect();
        segments.sort_by_key(|segment| std::cmp::Reverse(segment.epoch));
        let limit = limit.unwrap_or(usize::MAX);
        let (mut found, mut count) = (Vec::new(), 0);
        for segment in segments {
            if count > limit {
                break;
            }
            let mut rows = Vec::new();
            for batch in self.read(&segment.path).await? {
                rows.push(keep(batch, segment.epoch)?);
            }
            let rows = sorted(&concat_batches(schema, &rows)?, order)?;
            count += rows.num_rows();
            found.push(rows);
        }
        let rows = concat_batches(schema, &found)?;
        Ok(Found { rows: rows.slice(0, rows.num_rows().min(limit)), more: rows.num_rows() > limit })
    }

    async fn read(&self, path: &str) -> Result<Vec<RecordBatch>> {
        let damaged = || {
            Error::external(format!("the segment {path} of the state is damaged"))
                .hint("Restore the state folder from a copy.")
        };
        let bytes = self.store.get_file(path).await?;
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes).and_then(|builder| builder.build());
        let reader = reader.map_err(|error| damaged().because(error))?;
        reader.map(|batch| batch.map_err(|error| damaged().because(error))).collect()
    }
}

/// A segment's rows in today's columns: earlier versions had `timestamp_ms` and no headers.
fn as_now(rows: &RecordBatch) -> Result<RecordBatch> {
    let schema = schema();
    let column = |field: &Arc<arrow::datatypes::Field>| -> Result<ArrayRef> {
        if let Some(column) = rows.column_by_name(field.name()) {
            return Ok(cast(column, field.data_type())?);
        }
        match (field.name().as_str(), rows.column_by_name("timestamp_ms")) {
            ("timestamp", Some(millis)) => {
                let millis = cast(millis, &DataType::Timestamp(TimeUnit::Millisecond, None))?;
                Ok(cast(&millis, field.data_type())?)
            }
            _ => Ok(new_null_array(field.data_type(), rows.num_rows())),
        }
    };
    let columns = schema.fields().iter().map(column).collect::<Result<Vec<_>>>()?;
    RecordBatch::try_new(schema, columns)
        .map_err(|error| Error::external("a segment of dead letters lacks columns").because(error))
}

fn chosen(rows: &RecordBatch, filter: &Filter, epoch: u64) -> Result<RecordBatch> {
    let is = |column: usize, row: usize, words: &[String]| {
        words.is_empty() || words.iter().any(|word| word == rows.column(column).as_string::<i32>().value(row))
    };
    let keep: BooleanArray = (0..rows.num_rows())
        .map(|row| {
            let here = filter.record.as_ref().is_none_or(|wanted| *wanted == record(rows, row));
            let named = is(0, row, &filter.stages) && is(1, row, &filter.at) && is(2, row, &filter.kinds);
            let at = rows.column(1).as_string::<i32>().value(row);
            Some(here && named && filter.after.get(at).is_none_or(|after| epoch > *after))
        })
        .collect();
    Ok(filter_record_batch(rows, &keep)?)
}

/// Where the record of a dead letter lies.
pub fn record(rows: &RecordBatch, row: usize) -> Record {
    let topic = rows.column(4).as_string::<i32>().value(row).to_owned();
    let partition = rows.column(5).as_primitive::<Int32Type>().value(row);
    (topic, partition, rows.column(6).as_primitive::<Int64Type>().value(row))
}

fn sorted(rows: &RecordBatch, order: &Order<'_>) -> Result<RecordBatch> {
    if rows.num_rows() == 0 {
        return Ok(rows.clone());
    }
    let column = |(name, descending): &(&str, bool)| {
        let values = rows.column_by_name(name).map(Arc::clone)?;
        let options = SortOptions { descending: *descending, nulls_first: false };
        Some(SortColumn { values, options: Some(options) })
    };
    let columns: Vec<SortColumn> = order.iter().filter_map(column).collect();
    let indices: UInt32Array = lexsort_to_indices(&columns, None)?;
    Ok(take_record_batch(rows, &indices)?)
}

/// Late rows with their event time, where a Delta backup of the source says which record a row comes from; NULL for
/// those that it has not (yet). Without such a backup the rows as they are.
///
/// # Errors
/// External: the backup cannot be read.
#[cfg(feature = "delta")]
pub async fn with_event_time(plan: &StreamPlan, late: &RecordBatch) -> Result<RecordBatch> {
    let time = plan.source().and_then(|(_, source)| Some((source, source.event_time?)));
    let Some((source, time)) = time.filter(|_| late.num_rows() > 0) else { return Ok(late.clone()) };
    let time = source.schema.field(time).name();
    let Some(session) = with_backup(plan).await? else { return Ok(late.clone()) };
    let numbers: ArrayRef = Arc::new(UInt32Array::from_iter_values(0..late.num_rows() as u32));
    let mut columns: Vec<(String, ArrayRef)> = vec![("n".to_owned(), numbers)];
    let schema = late.schema();
    columns.extend(schema.fields().iter().map(|f| f.name().clone()).zip(late.columns().iter().cloned()));
    session.register_batch("late", RecordBatch::try_from_iter(columns)?)?;
    let offsets = late.column(2).as_primitive::<Int64Type>().values();
    let (first, last) = (offsets.iter().min().copied(), offsets.iter().max().copied());
    let time = time.replace('"', "\"\"");
    let sql = format!(
        "SELECT l.topic, l.\"partition\", l.\"offset\", b.at AS \"{time}\" FROM late AS l LEFT JOIN (
             SELECT _topic, _partition, _offset, \"{time}\" AS at FROM backup WHERE _offset BETWEEN {} AND {}) AS b
         ON l.topic = b._topic AND l.\"partition\" = b._partition AND l.\"offset\" = b._offset ORDER BY l.n",
        first.unwrap_or_default(),
        last.unwrap_or_default()
    );
    let frame = session.sql(&sql).await?;
    let schema = Arc::new(frame.schema().as_arrow().clone());
    Ok(concat_batches(&schema, &frame.collect().await?)?)
}

/// The rows that came out of a record, from a Delta backup that says which record a row comes from; none without one.
///
/// # Errors
/// External: the backup cannot be read.
#[cfg(feature = "delta")]
pub async fn rows_of(plan: &StreamPlan, (topic, partition, offset): &Record) -> Result<Vec<RecordBatch>> {
    let Some(session) = with_backup(plan).await? else { return Ok(Vec::new()) };
    let topic = topic.replace('\'', "''");
    let sql = format!(
        "SELECT * FROM backup WHERE _topic = '{topic}' AND _partition = {partition} AND _offset = {offset}"
    );
    Ok(session.sql(&sql).await?.collect().await?)
}

/// A session that knows a Delta backup of the source, with the metadata columns, as `backup`; `None`: there is none.
#[cfg(feature = "delta")]
async fn with_backup(plan: &StreamPlan) -> Result<Option<SessionContext>> {
    use crate::connectors::delta::table::{exists, provider};
    let Some((node, _)) = plan.source() else { return Ok(None) };
    let backup = plan.sinks().find_map(|(id, sink)| match &sink.kind {
        SinkKind::Delta(config)
            if plan.nodes[id].inputs.iter().any(|edge| edge.from == node)
                && sink.schema.column_with_name("_offset").is_some() =>
        {
            Some(config)
        }
        _ => None,
    });
    let Some(config) = backup else { return Ok(None) };
    if !exists(&config.location).await? {
        return Ok(None);
    }
    let session = batch_session()?;
    session.register_table("backup", provider(&config.location).await?)?;
    Ok(Some(session))
}

#[cfg(test)]
mod tests {
    use arrow::array::{BinaryArray, Int32Array, Int64Array, StringArray};
    use bytes::Bytes;
    use object_store::memory::InMemory;
    use parquet::arrow::ArrowWriter;

    use super::*;
    use crate::state::manifest::{Claimant, next_claim};
    use crate::stream::letters::batches;
    use crate::stream::{DeadLetter, Stage};

    fn parquet(rows: &RecordBatch) -> Bytes {
        let mut writer = ArrowWriter::try_new(Vec::new(), rows.schema(), None).unwrap();
        writer.write(rows).unwrap();
        writer.into_inner().unwrap().into()
    }

    /// As an earlier version wrote them.
    fn old(kind: &str, offset: i64) -> RecordBatch {
        let text = |text: &str| -> ArrayRef { Arc::new(StringArray::from(vec![text])) };
        let bytes: ArrayRef = Arc::new(BinaryArray::from(vec![&b"x"[..]]));
        RecordBatch::try_from_iter([
            ("stage", text("decode")),
            ("at", text("s")),
            ("kind", text(kind)),
            ("error", text("e")),
            ("topic", text("t")),
            ("partition", Arc::new(Int32Array::from(vec![0])) as ArrayRef),
            ("offset", Arc::new(Int64Array::from(vec![offset]))),
            ("timestamp_ms", Arc::new(Int64Array::from(vec![5]))),
            ("key", Arc::clone(&bytes)),
            ("payload", bytes),
        ])
        .unwrap()
    }

    fn new(offset: i64) -> DeadLetter {
        DeadLetter {
            stage: Stage::Expression,
            at: "v".into(),
            topic: "t".into(),
            partition: 0,
            offset,
            timestamp_ms: Some(9),
            key: None,
            payload: None,
            headers: Some("[]".to_owned()),
            error: "e".to_owned(),
            kind: "expression",
        }
    }

    async fn state() -> State {
        let store = StateStore::new(Arc::new(InMemory::new()), object_store::path::Path::default(), Clock);
        let claimant = Claimant { pipeline: "p", writer: uuid::Uuid::new_v4(), now_ms: 0 };
        let mut manifest = next_claim(None, 1, uuid::Uuid::new_v4(), &claimant);
        let late = old("late", 8).project(&[4, 5, 6]).unwrap();
        let letters = batches(&[new(1), new(2)], &["t".into()]).unwrap().remove(0).rows;
        let files = [("dead-letters/s/a", 1, old("not_json", 1)), ("dead-letters/s/b", 2, letters)];
        for (path, epoch, rows) in files.into_iter().chain([("ledger/s/c", 1, late)]) {
            store.put_file(path, parquet(&rows)).await.unwrap();
            let rows = rows.num_rows() as u64;
            let segment = Segment { path: path.to_owned(), epoch, rows, source: "s".to_owned() };
            if path.starts_with("ledger") { &mut manifest.ledger } else { &mut manifest.dead_letters }
                .push(segment);
        }
        State { store, manifest }
    }

    #[tokio::test]
    async fn newest_first_chosen_limited_and_of_earlier_versions_too() {
        let state = state().await;
        let places = |found: &Found| {
            (0..found.rows.num_rows()).map(|row| record(&found.rows, row).2).collect::<Vec<_>>()
        };
        let all = state.letters(&Filter::default(), None).await.unwrap();
        assert_eq!((places(&all), all.more, all.rows.schema()), (vec![2, 1, 1], false, schema()));
        let times = all.rows.column(7).as_primitive::<arrow::datatypes::TimestampMicrosecondType>();
        assert_eq!(times.values().to_vec(), [9_000, 9_000, 5_000]);
        let headers = all.rows.column(10).as_string::<i32>();
        assert_eq!(headers.iter().collect::<Vec<_>>(), [Some("[]"), Some("[]"), None]);
        let two = state.letters(&Filter::default(), Some(2)).await.unwrap();
        assert_eq!((places(&two), two.more), (vec![2, 1], true));
        let exact = state.letters(&Filter::default(), Some(3)).await.unwrap();
        assert_eq!((places(&exact), exact.more), (vec![2, 1, 1], false));
        let word = |word: &str| vec![word.to_owned()];
        let of = async |filter: Filter| places(&state.letters(&filter, None).await.unwrap());
        assert_eq!(of(Filter { stages: word("decode"), ..Filter::default() }).await, [1]);
        assert_eq!(of(Filter { kinds: word("expression"), ..Filter::default() }).await, [2, 1]);
        assert_eq!(
            of(Filter { at: word("s"), kinds: word("expression"), ..Filter::default() }).await,
            [0; 0]
        );
        assert_eq!(of(Filter { record: Some(("t".to_owned(), 0, 1)), ..Filter::default() }).await, [1, 1]);
        let late = state.late(None).await.unwrap();
        assert_eq!((late.rows.num_rows(), late.rows.num_columns(), late.more), (1, 3, false));
    }
}
