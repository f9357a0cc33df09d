//! The source task: poll → computed columns → future and late rows → chain. Runs on a thread of its own.
//!
//! Everything that is decided once per row is decided here: dead letters of the source, lateness, position in the
//! total order. A barrier cuts between two polls.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
    UInt32Array,
};
use arrow::datatypes::{Schema, SchemaRef, TimestampMicrosecondType};
use tokio::sync::mpsc::{Receiver, Sender};

use crate::connectors::formats::OnError;
use crate::connectors::{SourceBatch, SourceReader};
use crate::error::{Error, Result};
use crate::plan::{NodeId, SourcePlan};
use crate::runtime::chain::{Chain, Outgoing};
use crate::runtime::metrics::{Metrics, SourceMetrics};
use crate::runtime::report::{Command, Report, SourceEpoch};
use crate::runtime::watermark::SourceClock;
use crate::state::manifest::PartitionProgress;
use crate::stream::clock::Clock;
use crate::stream::{
    ChangeBatch, DeadLetter, Message, Micros, Origin, Place, Port, Positions, Reached, START_OF_TIME, Stage,
};

/// Rows of one poll at most: large enough to amortise, small enough for a few milliseconds of latency.
const MAX_ROWS: usize = 8_192;

/// One shard of a source.
pub struct SourceTask {
    pub node: NodeId,
    pub shard: usize,
    pub plan: Arc<SourcePlan>,
    pub topics: Vec<Arc<str>>,
    pub reader: Box<dyn SourceReader>,
    pub clock: Clock,
    pub watermarks: SourceClock,
    pub chain: Chain,
    pub positions: Positions,
    /// Where `--until-end` is satisfied.
    pub ends: Positions,
    /// Offsets that must be passed before a silent partition may count as idle.
    pub commands: Receiver<Command>,
    pub reports: Sender<Report>,
    pub metrics: Arc<Metrics>,
    pub counted: Arc<SourceMetrics>,
    pub state: SourceState,
}

/// What a shard gathers between two barriers.
#[derive(Default)]
pub struct SourceState {
    epoch: SourceEpoch,
    late: Vec<bool>,
    sent: Option<Micros>,
    told_end: bool,
    /// The last cut whose positions the outside was not told.
    cut: Option<(u64, Positions)>,
    /// Instant of the last row per place, once its end was seen.
    silent: Vec<(Place, std::time::Instant)>,
    logged: Vec<&'static str>,
    /// What this shard added to the source's lag.
    lag: i64,
    /// When the last poll returned.
    read_at: Option<std::time::Instant>,
}

impl SourceTask {
    /// Runs until the last barrier.
    ///
    /// # Errors
    /// What the reader cannot ride out, or a record under `on_error = 'fail'`.
    pub fn run(mut self) -> Result<()> {
        let mut out = Outgoing::new();
        loop {
            while let Ok(command) = self.commands.try_recv() {
                match command {
                    Command::Cut { barrier, close } => {
                        self.cut(barrier, close, &mut out)?;
                        if barrier.last {
                            return self.finish();
                        }
                    }
                    Command::Durable { epoch } => self.acknowledge(epoch),
                    Command::Add { place, next } => self.add(place, next)?,
                }
            }
            if self.commands.is_closed() && self.commands.is_empty() {
                return Ok(());
            }
            match self.reader.poll(MAX_ROWS, Duration::from_millis(1))? {
                Some(batch) => self.take(batch, &mut out)?,
                None => self.idle(&mut out)?,
            }
            let lag = self.reader.lag();
            self.counted.lag.fetch_add(lag - std::mem::replace(&mut self.state.lag, lag), Ordering::Relaxed);
            self.tell_end()?;
        }
    }

    fn cut(&mut self, barrier: crate::stream::Barrier, close: bool, out: &mut Outgoing) -> Result<()> {
        if close {
            self.watermarks.close();
        }
        self.forward_watermark(out);
        let known = self.watermarks.partitions();
        let progress = |(place, next_offset): (Place, i64)| PartitionProgress {
            topic: place.topic(),
            partition: place.partition(),
            next_offset,
            watermark: known.get(&place).copied().flatten(),
        };
        let mut epoch = std::mem::take(&mut self.state.epoch);
        epoch.epoch = barrier.epoch;
        epoch.partitions = self.positions.iter().map(progress).collect();
        // What went downstream before the barrier; other shards may have raised the source's watermark since.
        epoch.watermark = self.state.sent;
        self.metrics.bury(&self.chain.dead);
        epoch.dead.append(&mut self.chain.dead);
        epoch.counts = std::mem::take(&mut self.chain.counts);
        self.state.cut = Some((barrier.epoch, self.positions.clone()));
        self.chain.broadcast(&Message::Barrier(barrier), out);
        self.chain.flush_blocking(out)?;
        self.report(Report::Source(epoch))
    }

    /// A partition that was added to the topic. From the next barrier on the manifest knows it.
    fn add(&mut self, place: Place, next: i64) -> Result<()> {
        self.reader.add(place, next)?;
        self.watermarks.add(place);
        self.positions.raise(place, next);
        Ok(())
    }

    /// Group offsets, for lag tools: only what a manifest holds.
    fn acknowledge(&mut self, epoch: u64) {
        if let Some((_, positions)) = self.state.cut.take_if(|(cut, _)| *cut <= epoch) {
            self.reader.acknowledge(&positions);
        }
    }

    /// After the last barrier: waits until its manifest is published, or the coordinator is gone.
    fn finish(mut self) -> Result<()> {
        while let Some(command) = self.commands.blocking_recv() {
            if let Command::Durable { epoch } = command {
                self.acknowledge(epoch);
                break;
            }
        }
        Ok(())
    }

    fn report(&self, report: Report) -> Result<()> {
        self.reports.blocking_send(report).map_err(|_| Error::internal("the coordinator is gone"))
    }

    fn tell_end(&mut self) -> Result<()> {
        let reached = |(place, end)| self.positions.get(place).is_some_and(|at| at >= end);
        if !self.state.told_end && self.ends.iter().all(reached) {
            self.state.told_end = true;
            self.report(Report::AtEnd { shard: self.shard })?;
        }
        Ok(())
    }

    fn idle(&mut self, out: &mut Outgoing) -> Result<()> {
        let now = self.clock.instant();
        let passed = |place| self.ends.get(place).is_none_or(|end| self.positions.get(place) >= Some(end));
        let long = self.plan.idle_timeout;
        let quiet: Vec<Place> = self
            .state
            .silent
            .iter()
            .filter(|(place, since)| passed(*place) && now.duration_since(*since) >= long)
            .map(|(place, _)| *place)
            .collect();
        for place in quiet {
            self.watermarks.mark_idle(place);
        }
        self.forward_watermark(out);
        self.chain.flush_blocking(out)
    }

    /// Another shard may have raised the source's watermark.
    fn forward_watermark(&mut self, out: &mut Outgoing) {
        let time = self.watermarks.published();
        if time != START_OF_TIME && self.state.sent != Some(time) {
            self.state.sent = Some(time);
            let reached = self.reached();
            self.chain.broadcast(&Message::Watermark { time, reached }, out);
        }
    }

    fn reached(&self) -> Arc<Reached> {
        Arc::new(Reached { positions: self.positions.clone(), read_at: self.state.read_at })
    }

    fn take(&mut self, batch: SourceBatch, out: &mut Outgoing) -> Result<()> {
        let now = self.clock.instant();
        let accounts = &mut self.state.epoch.accounts;
        accounts.tombstones += batch.tombstones;
        accounts.skipped += batch.skipped;
        accounts.missing_offsets += batch.missing_offsets;
        let decoded = batch.rows.num_rows() as u64;
        accounts.read += decoded + batch.tombstones + batch.skipped + batch.dead.len() as u64;
        self.state.read_at = Some(now);
        Metrics::add(&self.counted.read, decoded);
        self.positions.raise_all(&batch.reached);
        let (reached, at_end) = (batch.reached.clone(), batch.at_end.clone());
        self.state.silent.retain(|(place, _)| reached.get(*place).is_none() || at_end.contains(place));
        for place in at_end {
            match self.state.silent.iter_mut().find(|(other, _)| *other == place) {
                Some((_, since)) if decoded > 0 => *since = now,
                Some(_) => {}
                None => self.state.silent.push((place, now)),
            }
        }
        let mut dead = Vec::new();
        let kept = self.rows(batch, &mut dead)?;
        self.bury(dead)?;
        if let Some((rows, origin)) = kept {
            self.send(rows, origin, out)?;
        }
        self.forward_watermark(out);
        self.chain.flush_blocking(out)
    }

    /// Decides lateness and sends the rows on both ports.
    fn send(&mut self, rows: RecordBatch, origin: Origin, out: &mut Outgoing) -> Result<()> {
        let batch = ChangeBatch::append(rows, origin);
        self.state.epoch.accounts.accepted += batch.num_rows() as u64;
        let mut late = std::mem::take(&mut self.state.late);
        late.clear();
        if self.plan.event_time.is_some() {
            let places: Vec<Place> = batch.origin.place.values().iter().map(|place| Place(*place)).collect();
            self.watermarks.observe(&places, batch.origin.time.values(), &mut late);
        }
        let reached = self.reached();
        let count = late.iter().filter(|late| **late).count();
        if self.chain.reads(self.node, Port::Accepted) {
            self.chain.run(self.node, Port::Accepted, &batch, &reached, out)?;
        }
        if self.chain.reads(self.node, Port::OnTime) {
            let on_time = match count {
                0 => batch.clone(),
                _ => batch.filter(&late.iter().map(|late| Some(!late)).collect::<BooleanArray>())?,
            };
            self.chain.run(self.node, Port::OnTime, &on_time, &reached, out)?;
        }
        for (row, _) in late.iter().enumerate().filter(|(_, late)| **late) {
            let (_, place, offset) = batch.origin.key(row);
            let place = Place(place);
            self.state.epoch.late.push((place.topic(), place.partition(), offset));
        }
        self.state.epoch.accounts.late += count as u64;
        Metrics::add(&self.counted.late, count as u64);
        self.state.late = late;
        Ok(())
    }

    /// Computed columns, event time, metadata; rows that fail become dead letters.
    fn rows(
        &self,
        mut batch: SourceBatch,
        dead: &mut Vec<DeadLetter>,
    ) -> Result<Option<(RecordBatch, Origin)>> {
        dead.append(&mut batch.dead);
        let mut schema: SchemaRef = Arc::clone(&self.plan.physical);
        for (expr, field) in &self.plan.computed {
            let value =
                |rows: &RecordBatch| expr.evaluate(rows).and_then(|value| value.into_array(rows.num_rows()));
            let column = match value(&batch.rows) {
                Ok(column) => column,
                Err(_) => {
                    let failing =
                        |row: usize| value(&batch.rows.slice(row, 1)).err().map(|error| error.to_string());
                    let failed: Vec<Option<String>> = (0..batch.rows.num_rows()).map(failing).collect();
                    batch = self.without(&batch, &failed, Stage::Expression, "expression", dead)?;
                    value(&batch.rows)?
                }
            };
            let mut fields = schema.fields().to_vec();
            fields.push(Arc::new(field.clone()));
            schema = Arc::new(Schema::new(fields));
            let mut columns = batch.rows.columns().to_vec();
            // A NULL in a computed column that never is NULL by its types cannot happen; the schema says so.
            columns.push(column);
            batch.rows = RecordBatch::try_new(Arc::clone(&schema), columns)?;
        }
        let batch = self.timely(batch, dead)?;
        if batch.rows.num_rows() == 0 {
            return Ok(None);
        }
        let origin = self.origin(&batch)?;
        let mut columns = batch.rows.columns().to_vec();
        if self.plan.has_metadata() {
            columns.extend(self.metadata(&batch));
        }
        Ok(Some((RecordBatch::try_new(Arc::clone(&self.plan.schema), columns)?, origin)))
    }

    /// Refuses rows without event time or too far ahead of their record's timestamp (`max_future`).
    fn timely(&self, batch: SourceBatch, dead: &mut Vec<DeadLetter>) -> Result<SourceBatch> {
        let Some(column) = self.plan.event_time else { return Ok(batch) };
        let times = batch.rows.column(column).as_primitive::<TimestampMicrosecondType>();
        let future = |row: usize| {
            let bound = batch.timestamp.value(row).saturating_mul(1_000).saturating_add(self.plan.max_future);
            batch.timestamp.is_valid(row) && times.value(row) > bound
        };
        let rows = 0..batch.rows.num_rows();
        if times.null_count() == 0 && !rows.clone().any(future) {
            return Ok(batch);
        }
        let nulls: Vec<Option<String>> =
            rows.clone().map(|row| times.is_null(row).then(|| "the event time is NULL".to_owned())).collect();
        let ahead = |row: usize| {
            let days = self.plan.max_future / 86_400_000_000;
            (times.is_valid(row) && future(row))
                .then(|| format!("the event time is more than {days} day(s) after the record's timestamp"))
        };
        let ahead: Vec<Option<String>> = rows.map(ahead).collect();
        let kept: Vec<Option<String>> = ahead
            .into_iter()
            .zip(&nulls)
            .filter(|(_, null)| null.is_none())
            .map(|(ahead, _)| ahead)
            .collect();
        let batch = self.without(&batch, &nulls, Stage::Expression, "null_event_time", dead)?;
        self.without(&batch, &kept, Stage::Future, "future", dead)
    }

    /// Turns the rows with a reason into dead letters and returns the others.
    fn without(
        &self,
        batch: &SourceBatch,
        failed: &[Option<String>],
        stage: Stage,
        kind: &'static str,
        dead: &mut Vec<DeadLetter>,
    ) -> Result<SourceBatch> {
        let bytes = |column: &Option<arrow::array::BinaryArray>, row: usize| {
            column.as_ref().filter(|column| column.is_valid(row)).map(|column| column.value(row).to_vec())
        };
        for (row, reason) in failed.iter().enumerate() {
            let Some(reason) = reason else { continue };
            dead.push(DeadLetter {
                stage,
                at: self.plan.name.as_str().into(),
                topic: self.topics.first().cloned().unwrap_or_else(|| "".into()),
                partition: batch.partition.value(row),
                offset: batch.offset.value(row),
                timestamp_ms: batch.timestamp.is_valid(row).then(|| batch.timestamp.value(row)),
                key: bytes(&batch.key, row),
                payload: bytes(&batch.payload, row),
                error: reason.clone(),
                kind,
            });
        }
        let kept: Vec<u32> = failed
            .iter()
            .enumerate()
            .filter(|(_, reason)| reason.is_none())
            .map(|(row, _)| row as u32)
            .collect();
        select(batch, &UInt32Array::from(kept))
    }

    fn origin(&self, batch: &SourceBatch) -> Result<Origin> {
        let place = batch.partition.values().iter().map(|partition| Place::new(0, 0, *partition).0);
        let time = match self.plan.event_time {
            Some(column) => {
                let times = batch.rows.column(column).as_primitive::<TimestampMicrosecondType>();
                Int64Array::new(times.values().clone(), None)
            }
            None => batch.timestamp.values().iter().map(|ms| ms.saturating_mul(1_000)).collect(),
        };
        Ok(Origin { time, place: Int64Array::from_iter_values(place), offset: batch.offset.clone() })
    }

    fn metadata(&self, batch: &SourceBatch) -> Vec<ArrayRef> {
        let rows = batch.rows.num_rows();
        let topic = self.topics.first().map_or("", |topic| topic);
        let timestamp: TimestampMicrosecondArray =
            batch.timestamp.iter().map(|ms| ms.map(|ms| ms.saturating_mul(1_000))).collect();
        let key = batch.key.clone().unwrap_or_else(|| arrow::array::BinaryArray::new_null(rows));
        vec![
            Arc::new(StringArray::from_iter_values(std::iter::repeat_n(topic, rows))),
            Arc::new(batch.partition.clone()),
            Arc::new(batch.offset.clone()),
            Arc::new(timestamp.with_timezone("UTC")),
            Arc::new(key),
        ]
    }

    /// Counts dead letters, keeps or drops them by `on_error`, and logs the first of each kind.
    fn bury(&mut self, dead: Vec<DeadLetter>) -> Result<()> {
        self.metrics.bury(&dead);
        for letter in dead {
            let place = format!("{}[{}]@{}", letter.topic, letter.partition, letter.offset);
            if !self.state.logged.contains(&letter.kind) {
                self.state.logged.push(letter.kind);
                tracing::warn!(kind = letter.kind, at = %place, error = %letter.error, "bad record, kept as dead letter");
            }
            match self.plan.on_error {
                OnError::DeadLetter => {
                    self.state.epoch.accounts.dead_letters += 1;
                    self.state.epoch.dead.push(letter);
                }
                OnError::Skip => self.state.epoch.accounts.skipped += 1,
                OnError::Fail => {
                    return Err(Error::external(format!("the record {place} is bad: {}", letter.error))
                        .hint("Fix the producer, or set on_error = 'dead_letter' on the source."));
                }
            }
        }
        Ok(())
    }
}

fn select(batch: &SourceBatch, rows: &UInt32Array) -> Result<SourceBatch> {
    let take = |array: &dyn Array| arrow::compute::take(array, rows, None);
    let binary = |column: &Option<arrow::array::BinaryArray>| {
        column.as_ref().map(|column| take(column).map(|taken| taken.as_binary().clone())).transpose()
    };
    Ok(SourceBatch {
        rows: arrow::compute::take_record_batch(&batch.rows, rows)?,
        partition: take(&batch.partition)?.as_primitive().clone(),
        offset: take(&batch.offset)?.as_primitive().clone(),
        timestamp: take(&batch.timestamp)?.as_primitive().clone(),
        key: binary(&batch.key)?,
        payload: binary(&batch.payload)?,
        ..batch.clone()
    })
}
