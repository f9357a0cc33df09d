//! A backup read as the topic that it holds: in the order of offsets within a partition, partitions side by side in time.
//!
//! # How
//! A backup's files hold many partitions each, and merging has mixed their epochs. One pass over the offsets
//! ([`Rows::index`]) counts rows and times per partition and range of offsets, a [`Bucket`]. [`aligned`] puts the buckets
//! into the order of reading: the next one is always of the partition whose newest row so far is the oldest, so that no
//! watermark runs ahead of another by more than a bucket. [`Rows::load`] reads some buckets at a time; bounds of offset
//! and time let it skip files and row groups of others. Memory holds what the caller asks for, however large the backup is.
//!
//! # What a backup says of itself
//! A commit of our own sink names the next offset of every partition: below it the backup has every record that became a
//! row ([`pin`]). A table of somebody else holds what it holds: its rows say which records they come from ([`Rows::origins`]).

use std::any::Any;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, BinaryArray, Int64Array, RecordBatch, UInt32Array};
use arrow::compute::{concat_batches, take_record_batch};
use arrow::datatypes::{DataType, Int32Type, Int64Type, SchemaRef};
use datafusion::catalog::TableProvider;
use datafusion::execution::SendableRecordBatchStream;
use datafusion::functions_aggregate::expr_fn::{count, max, min};
use datafusion::logical_expr::{Expr, cast, lit};
use datafusion::prelude::{DataFrame, SessionConfig, SessionContext, ident};
use datafusion::scalar::ScalarValue;
use futures::TryStreamExt;

use super::log::offsets_in;
use super::store::{existing_table, failed};
use super::table::{AsOf, provider_as_of};
use crate::error::{Error, Result};
use crate::stream::{Micros, timestamp_type};

/// Rows of a piece at most.
const PIECE_ROWS: usize = 8_192;
/// Offsets of a bucket at least, and how many buckets there are about at most.
const BUCKET_OFFSETS: i64 = 8_192;
const MOST_BUCKETS: i64 = 65_536;

/// A version of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinned {
    pub version: u64,
    /// The next offset of each partition of the topic, as its writer committed it; empty when the log does not say.
    pub next: BTreeMap<i32, i64>,
    /// `<pipeline>/<sink>` of that writer.
    pub app: Option<String>,
}

/// Pins a version, by default the newest, and reads what its log says of a topic. `None`: there is no table.
///
/// # Errors
/// External: the store failed, or has no such version.
pub async fn pin(location: &str, topic: &str, version: Option<u64>) -> Result<Option<Pinned>> {
    let fail = |error| failed(location, error);
    let Some(mut table) = existing_table(location)? else { return Ok(None) };
    if !table.verify_deltatable_existence().await.map_err(fail)? {
        return Ok(None);
    }
    match version {
        Some(version) => table.load_version(version).await.map_err(fail)?,
        None => table.load().await.map_err(fail)?,
    }
    let version = table.snapshot().map_err(fail)?.version();
    let log = table.log_store();
    // Every commit of a sink names all partitions, and entries of others between them are few.
    for entry in (0..=version).rev() {
        let Some(entry) = log.read_commit_entry(entry).await.map_err(fail)? else { break };
        if let Some((app, next)) = offsets_in(&entry, topic).map_err(|error| error.context(location))? {
            return Ok(Some(Pinned { version, next, app: Some(app) }));
        }
    }
    Ok(Some(Pinned { version, next: BTreeMap::new(), app: None }))
}

/// Offsets of a partition that are read: `from` up to, and without, `until`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub partition: i32,
    pub from: i64,
    pub until: i64,
}

/// Rows of a partition in a range of offsets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    pub span: Span,
    pub rows: u64,
    /// Event times of its rows.
    pub least: Micros,
    pub greatest: Micros,
}

/// Rows of one partition, in the order of their offsets.
#[derive(Debug, Clone)]
pub struct Piece {
    pub partition: i32,
    /// The declared physical columns of the source.
    pub rows: RecordBatch,
    pub offset: Int64Array,
    /// ms since the epoch; null where the record had no time.
    pub timestamp: Int64Array,
    pub key: Option<BinaryArray>,
    /// The next offset to read once it is taken in.
    pub next: i64,
}

/// The rows of one topic in a pinned version of a backup.
pub struct Rows {
    session: SessionContext,
    table: Arc<dyn TableProvider>,
    location: String,
    topic: String,
    columns: SchemaRef,
    /// The column by which partitions are read side by side.
    time: Option<String>,
    /// Of a row without that time nothing is known, so bounds of time leave no row out.
    timeless: bool,
    /// What the rows lie in, for as long as they are read.
    _kept: Option<Arc<dyn Any + Send + Sync>>,
}

impl Rows {
    /// `columns`: the source's physical ones; `time`: the name of its event time, which may be computed.
    ///
    /// # Errors
    /// User: the backup stores no offsets, or lacks a column. External: the store failed.
    pub async fn open(
        location: &str,
        version: u64,
        topic: &str,
        columns: &SchemaRef,
        time: Option<&str>,
    ) -> Result<Self> {
        let table = provider_as_of(location, AsOf::Version(version)).await?;
        Self::of(table, location, topic, columns, time)
    }

    /// The rows of a table that is open.
    ///
    /// # Errors
    /// User: it stores no offsets, or lacks a column.
    pub fn of(
        table: Arc<dyn TableProvider>,
        location: &str,
        topic: &str,
        columns: &SchemaRef,
        time: Option<&str>,
    ) -> Result<Self> {
        let schema = table.schema();
        let is_time =
            |name: &&str| schema.field_with_name(name).is_ok_and(|f| *f.data_type() == timestamp_type());
        let time = time.into_iter().chain(["_timestamp"]).find(is_time).map(str::to_owned);
        if let Some(missing) =
            ["_partition", "_offset"].iter().find(|name| schema.column_with_name(name).is_none())
        {
            let message = format!(
                "the backup {location} has no column {missing}, so it is not known where the topic goes on"
            );
            let hint =
                "A backup that is to be history stores the metadata columns: leave metadata = 'none' out.";
            return Err(Error::user(message).hint(hint));
        }
        let lacks = |f: &&Arc<arrow::datatypes::Field>| {
            !f.is_nullable() && schema.column_with_name(f.name()).is_none()
        };
        if let Some(field) = columns.fields().iter().find(lacks) {
            let message = format!("the backup {location} has no column {}", field.name());
            let hint = "Declare the column without NOT NULL: records of the backup do not have it.";
            return Err(Error::user(message).hint(hint));
        }
        let mut config = SessionConfig::new();
        config.options_mut().execution.parquet.schema_force_view_types = false;
        config.options_mut().execution.parquet.pushdown_filters = true;
        Ok(Self {
            session: SessionContext::new_with_config(config),
            table,
            location: location.to_owned(),
            topic: topic.to_owned(),
            columns: Arc::clone(columns),
            time,
            timeless: false,
            _kept: None,
        })
    }

    /// The same of a table that somebody else wrote, known to this session: rows may have no time. `kept`: what it lies
    /// in.
    #[must_use]
    pub fn of_others(self, session: SessionContext, kept: Option<Arc<dyn Any + Send + Sync>>) -> Self {
        Self { timeless: true, session, _kept: kept, ..self }
    }

    /// Partition and offset of every row, in any order.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn origins(&self) -> Result<SendableRecordBatchStream> {
        let offset = cast(ident("_offset"), DataType::Int64).alias("o");
        Ok(self.topic_rows()?.select(vec![partition().alias("p"), offset])?.execute_stream().await?)
    }

    fn stores(&self, column: &str) -> bool {
        self.table.schema().column_with_name(column).is_some()
    }

    fn topic_rows(&self) -> Result<DataFrame> {
        let rows = self.session.read_table(Arc::clone(&self.table))?;
        match self.stores("_topic") {
            true => Ok(rows.filter(ident("_topic").eq(lit(self.topic.as_str())))?),
            false => Ok(rows),
        }
    }

    /// What there is in the spans, in the order of reading.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn index(&self, spans: &[Span]) -> Result<Vec<Bucket>> {
        let offsets: i64 = spans.iter().map(|span| (span.until - span.from).max(0)).sum();
        let width = (offsets / MOST_BUCKETS).max(BUCKET_OFFSETS);
        let Some(within) = within(spans) else { return Ok(Vec::new()) };
        let bucket = cast(ident("_offset"), DataType::Int64) / lit(width);
        let time = match &self.time {
            Some(time) => cast(ident(time), DataType::Int64),
            None => lit(0i64),
        };
        let found = self.topic_rows()?.filter(within)?.aggregate(
            vec![partition().alias("p"), bucket.alias("b")],
            vec![count(lit(1i64)).alias("n"), min(time.clone()).alias("least"), max(time).alias("greatest")],
        )?;
        let mut buckets = Vec::new();
        let mut batches = found.execute_stream().await?;
        while let Some(batch) = batches.try_next().await? {
            let long = |at: usize| batch.column(at).as_primitive::<Int64Type>();
            let (p, b, n, least, greatest) =
                (batch.column(0).as_primitive::<Int32Type>(), long(1), long(2), long(3), long(4));
            for row in 0..batch.num_rows() {
                let Some(span) = spans.iter().find(|span| span.partition == p.value(row)) else { continue };
                let from = (b.value(row) * width).max(span.from);
                let until = ((b.value(row) + 1) * width).min(span.until);
                buckets.push(Bucket {
                    span: Span { partition: span.partition, from, until },
                    rows: n.value(row).unsigned_abs(),
                    least: least.value(row),
                    greatest: greatest.value(row),
                });
            }
        }
        Ok(aligned(buckets))
    }

    /// The rows of some buckets that follow each other in the order of reading, in this order; and how many bytes they
    /// take in memory.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn load(&self, buckets: &[Bucket]) -> Result<(Vec<Piece>, usize)> {
        let Some(within) = within(&joined(buckets)) else { return Ok((Vec::new(), 0)) };
        let mut rows = self.topic_rows()?.filter(within)?;
        let times = buckets.iter().map(|b| b.least).min().zip(buckets.iter().map(|b| b.greatest).max());
        if let Some((time, (least, greatest))) = self.time.as_ref().filter(|_| !self.timeless).zip(times) {
            let at = |micros| lit(ScalarValue::TimestampMicrosecond(Some(micros), Some("UTC".into())));
            rows = rows.filter(ident(time).between(at(least), at(greatest)))?;
        }
        let batches: Vec<RecordBatch> =
            rows.select(self.projection()?)?.execute_stream().await?.try_collect().await?;
        let Some(first) = batches.first() else {
            let bucket = buckets.first().map_or(0, |bucket| bucket.span.partition);
            return Err(Error::external(format!(
                "the backup {}: rows of partition {bucket} are gone",
                self.location
            )));
        };
        let all = concat_batches(&first.schema(), &batches)?;
        drop(batches);
        let all = in_order(&all)?;
        let bytes = all.get_array_memory_size();
        Ok((self.pieces(buckets, &all)?, bytes))
    }

    /// The physical columns, then partition, offset, timestamp and key.
    fn projection(&self) -> Result<Vec<Expr>> {
        let mut columns = Vec::with_capacity(self.columns.fields().len() + 4);
        for field in self.columns.fields() {
            let (name, kind) = (field.name(), field.data_type());
            let value = match self.stores(name) {
                true => cast(ident(name), kind.clone()),
                false => lit(ScalarValue::try_from(kind)?),
            };
            columns.push(value.alias(name));
        }
        columns.push(partition().alias("_p"));
        columns.push(cast(ident("_offset"), DataType::Int64).alias("_o"));
        columns.push(match self.stores("_timestamp") {
            true => (cast(cast(ident("_timestamp"), timestamp_type()), DataType::Int64) / lit(1_000i64))
                .alias("_t"),
            false => lit(ScalarValue::Int64(None)).alias("_t"),
        });
        if self.stores("_key") {
            columns.push(cast(ident("_key"), DataType::Binary).alias("_k"));
        }
        Ok(columns)
    }

    /// Cuts sorted rows into the pieces of the buckets.
    fn pieces(&self, buckets: &[Bucket], all: &RecordBatch) -> Result<Vec<Piece>> {
        let physical = self.columns.fields().len();
        let partitions = all.column(physical).as_primitive::<Int32Type>().values();
        let offsets = all.column(physical + 1).as_primitive::<Int64Type>();
        let timestamps = all.column(physical + 2).as_primitive::<Int64Type>();
        let keys = all.columns().get(physical + 3).map(|keys| keys.as_binary::<i32>());
        let columns: Vec<ArrayRef> = all.columns()[..physical].to_vec();
        let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(all.num_rows()));
        let rows = RecordBatch::try_new_with_options(Arc::clone(&self.columns), columns, &options)?;
        let mut pieces = Vec::new();
        for Bucket { span, .. } in buckets {
            let first = partitions.partition_point(|p| *p < span.partition);
            let last = partitions.partition_point(|p| *p <= span.partition);
            let of = &offsets.values()[first..last];
            let mut at = first + of.partition_point(|offset| *offset < span.from);
            let end = first + of.partition_point(|offset| *offset < span.until);
            while at < end {
                let length = (end - at).min(PIECE_ROWS);
                let offset = offsets.slice(at, length);
                let next = match at + length == end {
                    true => span.until,
                    false => offset.value(length - 1) + 1,
                };
                pieces.push(Piece {
                    partition: span.partition,
                    rows: rows.slice(at, length),
                    offset,
                    timestamp: timestamps.slice(at, length),
                    key: keys.map(|keys| keys.slice(at, length)),
                    next,
                });
                at += length;
            }
        }
        Ok(pieces)
    }
}

fn partition() -> Expr {
    cast(ident("_partition"), DataType::Int32)
}

/// Rows of the spans.
fn within(spans: &[Span]) -> Option<Expr> {
    let one = |span: &Span| {
        let offset = || ident("_offset");
        let partition = ident("_partition").eq(lit(span.partition));
        partition.and(offset().gt_eq(lit(span.from))).and(offset().lt(lit(span.until)))
    };
    spans.iter().filter(|span| span.from < span.until).map(one).reduce(Expr::or)
}

/// One span per partition: buckets of a partition follow each other.
fn joined(buckets: &[Bucket]) -> Vec<Span> {
    let mut spans: BTreeMap<i32, Span> = BTreeMap::new();
    for Bucket { span, .. } in buckets {
        let known = spans.entry(span.partition).or_insert(*span);
        (known.from, known.until) = (known.from.min(span.from), known.until.max(span.until));
    }
    spans.into_values().collect()
}

/// By partition and offset: columns behind the physical ones.
fn in_order(all: &RecordBatch) -> Result<RecordBatch> {
    let column = |name: &str| {
        all.column_by_name(name).ok_or_else(|| Error::internal(format!("rows of a backup without {name}")))
    };
    let partitions = column("_p")?.as_primitive::<Int32Type>().values();
    let offsets = column("_o")?.as_primitive::<Int64Type>().values();
    let key = |row: &u32| (partitions[*row as usize], offsets[*row as usize]);
    let mut order: Vec<u32> = (0..all.num_rows() as u32).collect();
    if order.is_sorted_by_key(key) {
        return Ok(all.clone());
    }
    order.sort_unstable_by_key(key);
    Ok(take_record_batch(all, &UInt32Array::from(order))?)
}

/// The order of reading: always the partition whose newest row so far is the oldest.
pub fn aligned(mut buckets: Vec<Bucket>) -> Vec<Bucket> {
    buckets.sort_unstable_by_key(|bucket| (bucket.span.partition, bucket.span.from));
    let total = buckets.len();
    let mut waiting: BTreeMap<i32, VecDeque<Bucket>> = BTreeMap::new();
    buckets
        .into_iter()
        .for_each(|bucket| waiting.entry(bucket.span.partition).or_default().push_back(bucket));
    let mut turn: BinaryHeap<Reverse<(Micros, i32)>> =
        waiting.keys().map(|partition| Reverse((Micros::MIN, *partition))).collect();
    let mut order = Vec::with_capacity(total);
    while let Some(Reverse((newest, partition))) = turn.pop() {
        let Some(bucket) = waiting.get_mut(&partition).and_then(VecDeque::pop_front) else { continue };
        turn.push(Reverse((newest.max(bucket.greatest), partition)));
        order.push(bucket);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(partition: i32, from: i64, least: i64, greatest: i64) -> Bucket {
        Bucket { span: Span { partition, from, until: from + 10 }, rows: 10, least, greatest }
    }

    #[test]
    fn partitions_are_read_side_by_side_each_in_the_order_of_its_offsets() {
        // Partition 1 has ten times the rows of partition 0 in the same time, partition 2 begins late and has a row of
        // long ago among its last.
        let mut buckets: Vec<Bucket> = (0..10).map(|i| bucket(0, i * 10, i * 100, i * 100 + 99)).collect();
        buckets.extend((0..100).map(|i| bucket(1, i * 10, i * 10, i * 10 + 9)));
        buckets
            .extend((0..4).map(|i| bucket(2, i * 10, if i == 3 { 3 } else { 600 + i * 100 }, 699 + i * 100)));
        let order = aligned(buckets.iter().rev().cloned().collect());
        assert_eq!(order.len(), buckets.len());
        let mut newest = [i64::MIN; 3];
        let mut next = [0; 3];
        for bucket in &order {
            let at = bucket.span.partition as usize;
            assert_eq!(bucket.span.from, next[at]);
            next[at] = bucket.span.until;
            // Whoever is read is not ahead of another that has more.
            let ends = [100, 1_000, 40];
            let least = (0..3).filter(|p| next[*p] < ends[*p] || *p == at).map(|p| newest[p]).min();
            assert_eq!(least, Some(newest[at]));
            newest[at] = newest[at].max(bucket.greatest);
        }
    }

    #[test]
    fn buckets_of_a_partition_are_one_span() {
        let spans = joined(&[bucket(1, 10, 0, 0), bucket(0, 0, 0, 0), bucket(1, 20, 0, 0)]);
        let span = |partition, from, until| Span { partition, from, until };
        assert_eq!(spans, [span(0, 0, 10), span(1, 10, 30)]);
        assert_eq!(within(&[span(0, 5, 5)]), None);
    }
}
