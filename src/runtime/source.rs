//! The source task: poll → accept → late rows → chain. Runs on a thread of its own.
//!
//! Everything that is decided once per row is decided here: dead letters of the source, lateness, position in the
//! total order. A barrier cuts between two polls.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arrow::array::{BooleanArray, RecordBatch};
use tokio::sync::mpsc::{Receiver, Sender};

use crate::connectors::formats::OnError;
use crate::connectors::{SourceBatch, SourceConnector, SourceReader};
use crate::error::{Error, Result};
use crate::plan::{NodeId, SourcePlan};
use crate::runtime::again::{Decided, up_to};
use crate::runtime::chain::{Chain, Outgoing};
use crate::runtime::letters::Records;
use crate::runtime::metrics::{Metrics, SourceMetrics};
use crate::runtime::report::{Command, Ends, Report, SourceEpoch};
use crate::runtime::silence::Silence;
use crate::runtime::standstill::Standstill;
use crate::runtime::watermark::SourceClock;
use crate::state::manifest::PartitionProgress;
use crate::stream::clock::Clock;
use crate::stream::{
    ChangeBatch, DeadLetter, Message, Micros, Origin, Place, Port, Positions, Reached, START_OF_TIME,
};

/// Rows of one poll at most: large enough to amortise, small enough for a few milliseconds of latency.
const MAX_ROWS: usize = 8_192;

/// How often it is decided which partitions wait while memory is short: pausing throws away what was fetched ahead.
const WEIGH: Duration = Duration::from_millis(200);

/// One shard of a source.
pub struct SourceTask {
    pub node: NodeId,
    pub shard: usize,
    pub plan: Arc<SourcePlan>,
    pub topics: Vec<Arc<str>>,
    pub source: Arc<dyn SourceConnector>,
    pub reader: Box<dyn SourceReader>,
    /// For what is asked of the outside between two polls.
    pub runtime: tokio::runtime::Handle,
    pub clock: Clock,
    pub watermarks: SourceClock,
    /// Lateness and watermark, where records are read again.
    pub decided: Option<Arc<Decided>>,
    pub chain: Chain,
    pub positions: Positions,
    /// Where `--until-end` is satisfied; a silent partition must have passed them too before it may count as idle.
    pub ends: Positions,
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
    held: bool,
    /// The last cut whose positions the outside was not told.
    cut: Option<(u64, Positions)>,
    silence: Silence,
    logged: Vec<&'static str>,
    /// What this shard added to the source's lag.
    lag: i64,
    /// Partitions that wait as memory is short, and when that was decided.
    paused: Vec<Place>,
    weighed: Option<std::time::Instant>,
    standstill: Standstill,
    /// When the last poll returned.
    read_at: Option<std::time::Instant>,
}

impl SourceState {
    pub fn new(silence: Silence) -> Self {
        Self { silence, ..Self::default() }
    }
}

impl SourceTask {
    /// Runs until the last barrier.
    ///
    /// # Errors
    /// What the reader cannot ride out, or a record under `on_error = 'fail'`.
    pub fn run(mut self) -> Result<()> {
        let mut out = Outgoing::new();
        loop {
            while let Some(command) = self.next_command() {
                match command {
                    Command::Hold => {
                        self.state.held = true;
                        self.report(Report::Held)?;
                    }
                    Command::Cut { barrier, close } => {
                        self.cut(barrier, close, &mut out)?;
                        if barrier.last {
                            return self.finish();
                        }
                    }
                    Command::Durable { epoch } => self.acknowledge(epoch),
                    Command::Add { place, next } => self.add(place, next)?,
                    Command::Ends(ends) => self.compare(ends)?,
                }
            }
            if self.commands.is_closed() && self.commands.is_empty() {
                return Ok(());
            }
            self.weigh()?;
            let polled = self.reader.poll(MAX_ROWS, Duration::from_millis(1))?;
            let polled = match (polled, &self.decided) {
                (Some(batch), Some(decided)) => Some(up_to(batch, &self.ends, &decided.never)?),
                (polled, _) => polled,
            };
            match polled {
                Some(batch) => self.take(batch, &mut out)?,
                None => {
                    self.state.standstill.polled_nothing();
                    self.idle(&mut out)?;
                }
            }
            let lag = self.reader.lag().max(self.state.standstill.lag(&self.positions));
            self.counted.lag.fetch_add(lag - std::mem::replace(&mut self.state.lag, lag), Ordering::Relaxed);
            self.tell_end()?;
        }
    }

    /// What is to be done before the next poll; waits while held.
    fn next_command(&mut self) -> Option<Command> {
        match self.state.held {
            true => self.commands.blocking_recv(),
            false => self.commands.try_recv().ok(),
        }
    }

    /// When memory is short, partitions ahead of the watermark wait; decided anew every [`WEIGH`].
    fn weigh(&mut self) -> Result<()> {
        let short = self.metrics.short.load(Ordering::Relaxed);
        if !short && self.state.paused.is_empty() {
            return Ok(());
        }
        let now = self.clock.instant();
        if self.state.weighed.is_some_and(|then| now.duration_since(then) < WEIGH) {
            return Ok(());
        }
        self.state.weighed = Some(now);
        let ahead = match short {
            true => self.watermarks.ahead(self.positions.iter().map(|(place, _)| place)),
            false => Vec::new(),
        };
        if ahead != self.state.paused {
            self.reader.pause(&ahead)?;
            self.metrics.paused.fetch_add(ahead.len() as u64, Ordering::Relaxed);
            self.metrics.paused.fetch_sub(self.state.paused.len() as u64, Ordering::Relaxed);
            self.state.paused = ahead;
        }
        Ok(())
    }

    fn cut(&mut self, barrier: crate::stream::Barrier, close: bool, out: &mut Outgoing) -> Result<()> {
        match &self.decided {
            None if close => drop(self.watermarks.close()),
            None => {}
            Some(decided) if decided.moves && !close => {}
            Some(decided) => {
                decided.watermark.into_iter().for_each(|watermark| self.watermarks.raise(watermark))
            }
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

    /// Opens a new client when this one gets no more records although the broker has some.
    fn compare(&mut self, ends: Ends) -> Result<()> {
        self.state.silence.answered(&ends.ends, ends.at);
        if !ends.is_full {
            return Ok(());
        }
        let still = self.state.standstill.answer(ends.ends, &self.positions, &self.state.paused);
        let Some(first) = still.first().filter(|_| self.reader.is_live()) else { return Ok(()) };
        let (partition, offset) = (first.partition(), self.positions.get(*first));
        let reader = match self.runtime.block_on(self.source.reader(self.positions.clone())) {
            Ok(reader) => reader,
            Err(error) if error.is_lasting() => return Err(error),
            Err(error) => {
                tracing::warn!(partition, offset, %error, "a partition stands still, and no new client could be opened");
                return Ok(());
            }
        };
        let more = still.len() - 1;
        tracing::warn!(
            partition,
            offset,
            more,
            "a partition stood still although the topic goes on; a new client reads it"
        );
        let old = std::mem::replace(&mut self.reader, reader);
        // It may wait for answers that never come.
        std::thread::Builder::new().name("old-client".to_owned()).spawn(move || drop(old)).ok();
        self.metrics.paused.fetch_sub(self.state.paused.len() as u64, Ordering::Relaxed);
        self.state.paused.clear();
        Ok(())
    }

    /// Group offsets, for lag tools: only what a manifest holds.
    fn acknowledge(&mut self, epoch: u64) {
        // What is read again was acknowledged when it was read first.
        if let Some((_, positions)) =
            self.state.cut.take_if(|(cut, _)| *cut <= epoch && self.decided.is_none())
        {
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
        if self.decided.as_ref().is_some_and(|decided| decided.moves) && !self.state.told_end {
            // Nothing follows that would be read.
            for (place, _) in self.ends.iter().filter(|end| reached(*end)) {
                self.watermarks.mark_idle(place);
            }
        }
        if !self.state.told_end && self.ends.iter().all(reached) {
            self.state.told_end = true;
            self.report(Report::AtEnd { shard: self.shard })?;
        }
        Ok(())
    }

    fn idle(&mut self, out: &mut Outgoing) -> Result<()> {
        let now = self.clock.instant();
        let passed = |place| self.ends.get(place).is_none_or(|end| self.positions.get(place) >= Some(end));
        let quiet = self.state.silence.idle(&self.positions, self.plan.idle_timeout, now);
        let quiet: Vec<Place> = quiet.filter(|place| passed(*place)).collect();
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
        self.state.silence.read(&batch.reached, &batch.at_end, decoded > 0, now);
        let records = Records::of(&batch);
        let mut dead = Vec::new();
        let kept = self.plan.accept(batch, &self.topic(), &mut dead)?;
        if self.decided.as_ref().is_some_and(|decided| decided.moves) {
            // They were buried when they were read first.
            dead.clear();
        }
        if !dead.is_empty() {
            self.reader.add_headers(&mut dead);
        }
        self.bury(dead)?;
        if let Some((rows, origin)) = kept {
            let known = self.chain.dead.len();
            self.send(rows, origin, out)?;
            let refused = &mut self.chain.dead[known..];
            if !refused.is_empty() {
                records.add_to(refused);
                self.reader.add_headers(refused);
            }
        }
        self.forward_watermark(out);
        self.chain.flush_blocking(out)
    }

    fn topic(&self) -> Arc<str> {
        self.topics.first().cloned().unwrap_or_else(|| "".into())
    }

    /// Decides lateness and sends the rows on both ports.
    fn send(&mut self, rows: RecordBatch, origin: Origin, out: &mut Outgoing) -> Result<()> {
        let batch = ChangeBatch::append(rows, origin);
        self.state.epoch.accounts.accepted += batch.num_rows() as u64;
        let mut late = std::mem::take(&mut self.state.late);
        late.clear();
        let moves = self.decided.as_ref().is_none_or(|decided| decided.moves);
        if moves && self.plan.event_time.is_some() {
            let places: Vec<Place> = batch.origin.place.values().iter().map(|place| Place(*place)).collect();
            self.watermarks.observe(&places, batch.origin.time.values(), &mut late);
        }
        late.resize(batch.num_rows(), false);
        if let Some(decided) = &self.decided {
            let known = |row: usize| {
                let (_, place, offset) = batch.origin.key(row);
                let place = Place(place);
                decided.late.contains(&(place.topic(), place.partition(), offset))
            };
            late.iter_mut().enumerate().for_each(|(row, late)| *late |= known(row));
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
