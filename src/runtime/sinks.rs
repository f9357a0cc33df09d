//! Sink tasks: Delta (files prepared per epoch), online (newest row per key), append (Kafka, console).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::mpsc::Sender;

#[cfg(feature = "delta")]
use crate::connectors::delta::DeltaWriter;
use crate::connectors::{AppendSink, Flushed, OnlineStore, OnlineWrite};
use crate::error::{Error, Result};
use crate::operators::newest::{DirtyBatch, Newest};
use crate::plan::NodeId;
use crate::runtime::inbox::{Event, Inbox};
use crate::runtime::keyed::{FULL_EVERY, Saver};
use crate::runtime::report::{Metrics, Report, StatePart};
use crate::state::manifest::PreparedFile;
use crate::stream::clock::Clock;
use crate::stream::{Micros, Positions, START_OF_TIME};

fn coordinator_gone<E>(_: E) -> Error {
    Error::internal("the coordinator is gone")
}

/// Exactly-once: rows into files, files into the manifest.
#[cfg(feature = "delta")]
pub struct DeltaTask {
    pub node: NodeId,
    pub writer: DeltaWriter,
    /// The first epoch of this run, for the names of files.
    pub epoch: u64,
    pub inbox: Inbox,
    pub reports: Sender<Report>,
    pub metrics: Arc<Metrics>,
}

#[cfg(feature = "delta")]
impl DeltaTask {
    /// Runs until the last barrier.
    ///
    /// # Errors
    /// External: the table's store failed.
    pub async fn run(mut self) -> Result<()> {
        let mut watermark = START_OF_TIME;
        let mut epoch = self.epoch;
        loop {
            match self.inbox.next().await? {
                Event::Changes { batch, .. } => {
                    self.writer.write(&batch.rows)?;
                    // Closed files leave the memory during the epoch.
                    if self.writer.wants_upload() {
                        self.writer.upload(epoch).await?;
                    }
                    Metrics::add(&self.metrics.stored, batch.num_rows() as u64);
                }
                Event::Watermark { time, .. } => watermark = time,
                Event::Barrier(barrier) => {
                    let prepared = self.writer.prepare(barrier.epoch).await?;
                    epoch = barrier.epoch + 1;
                    let file = |f: crate::connectors::delta::PreparedFile| PreparedFile {
                        path: f.path,
                        size: f.size,
                        rows: f.rows,
                        add: f.add,
                    };
                    let files = prepared.into_iter().map(file).collect();
                    let report = Report::Prepared { node: self.node, epoch: barrier.epoch, files, watermark };
                    self.reports.send(report).await.map_err(coordinator_gone)?;
                    if barrier.last {
                        return Ok(());
                    }
                }
                Event::End => return Ok(()),
            }
        }
    }
}

/// At least once: writes on arrival, flushed at barriers.
pub struct AppendTask {
    pub node: NodeId,
    pub sink: Box<dyn AppendSink>,
    pub inbox: Inbox,
    pub reports: Sender<Report>,
    pub metrics: Arc<Metrics>,
}

impl AppendTask {
    /// Runs until the last barrier.
    ///
    /// # Errors
    /// External: the sink failed.
    pub async fn run(mut self) -> Result<()> {
        loop {
            match self.inbox.next().await? {
                Event::Changes { batch, .. } => {
                    self.sink.write(&batch).await?;
                    Metrics::add(&self.metrics.stored, batch.num_rows() as u64);
                }
                Event::Watermark { .. } => {}
                Event::Barrier(barrier) => {
                    self.sink.flush().await?;
                    let part = StatePart::default();
                    let report = Report::State { node: self.node, epoch: barrier.epoch, part };
                    self.reports.send(report).await.map_err(coordinator_gone)?;
                    if barrier.last {
                        return Ok(());
                    }
                }
                Event::End => return Ok(()),
            }
        }
    }
}

/// Keys per flush: a few script calls.
const FLUSH_KEYS: usize = 4_000;

/// Newest row per key. The store may be down: rows wait in the state, nothing else waits for it.
pub struct OnlineTask {
    pub node: NodeId,
    pub shard: u32,
    pub generation: u64,
    pub key: Vec<usize>,
    pub newest: Newest,
    pub store: Arc<dyn OnlineStore>,
    /// Positions that the store had seen: until all are passed, nothing is written (a replay shows no older value).
    pub hold: Positions,
    pub inbox: Inbox,
    pub reports: Sender<Report>,
    pub saver: Saver,
    pub metrics: Arc<Metrics>,
    pub clock: Clock,
    pub flushes: FlushState,
}

/// Progress of a shard's flushes.
#[derive(Default)]
pub struct FlushState {
    number: u64,
    consumed: Positions,
    watermark: Micros,
    retry_at: Option<std::time::Instant>,
    failures: u32,
}

impl FlushState {
    /// `consumed`: positions that the restored state already includes.
    pub fn at(consumed: Positions) -> Self {
        Self { consumed, ..Self::default() }
    }
}

impl OnlineTask {
    /// Runs until the last barrier.
    ///
    /// # Errors
    /// Fenced: a newer process owns the store. External: the state store failed, or the online store at the end.
    pub async fn run(mut self) -> Result<()> {
        self.flushes.watermark = START_OF_TIME;
        loop {
            let event = match self.may_flush() {
                false => match self.flushes.retry_at {
                    Some(_) => {
                        match tokio::time::timeout(Duration::from_millis(100), self.inbox.next()).await {
                            Ok(event) => event?,
                            Err(_) => continue,
                        }
                    }
                    None => self.inbox.next().await?,
                },
                // Take what has already arrived, so that a key is written once for many rows.
                true => {
                    match (self.newest.dirty_len() < FLUSH_KEYS).then(|| self.inbox.next().now_or_never()) {
                        Some(Some(event)) => event?,
                        _ => {
                            self.flush().await?;
                            continue;
                        }
                    }
                }
            };
            match event {
                Event::Changes { batch, reached } => {
                    self.flushes.consumed.raise_all(&reached);
                    let nulls = self.newest.push(&batch)?;
                    Metrics::add(&self.metrics.dead, nulls as u64);
                }
                Event::Watermark { time, reached } => {
                    self.flushes.consumed.raise_all(&reached);
                    self.flushes.watermark = time;
                }
                Event::Barrier(barrier) => {
                    if barrier.last {
                        self.drain().await?;
                    }
                    self.save(barrier.epoch).await?;
                    if barrier.last {
                        return Ok(());
                    }
                }
                Event::End => return Ok(()),
            }
        }
    }

    fn held(&self) -> bool {
        self.hold
            .iter()
            .any(|(place, at)| self.flushes.consumed.get(place).is_none_or(|consumed| consumed < at))
    }

    fn may_flush(&self) -> bool {
        let waits = self.flushes.retry_at.is_some_and(|at| self.clock.instant() < at);
        self.newest.dirty_len() > 0 && !waits && !self.held()
    }

    /// Writes what is dirty once; a failure of the store is ridden out with back-off.
    async fn flush(&mut self) -> Result<()> {
        let Some(dirty) = self.newest.take_dirty(FLUSH_KEYS)? else { return Ok(()) };
        self.flushes.number += 1;
        let write =
            OnlineWrite { rows: dirty.rows.clone(), expire_at_ms: dirty.expire_at_ms.clone(), deletes: None };
        let consumed = &self.flushes.consumed;
        let done = self.store.flush(self.generation, self.shard, self.flushes.number, &write, consumed).await;
        match done {
            Ok(Flushed::Done) => {
                self.newest.acknowledge(&dirty);
                (self.flushes.failures, self.flushes.retry_at) = (0, None);
                Metrics::add(&self.metrics.served, dirty.slots.len() as u64);
                self.metrics.show(&dirty.rows);
                Ok(())
            }
            Ok(Flushed::Stale) => {
                self.newest.give_back(&dirty);
                Ok(())
            }
            Ok(Flushed::Fenced { by }) => Err(Error::fenced(format!(
                "the online store belongs to generation {by}, this process has {}",
                self.generation
            ))
            .hint("A newer process of this pipeline runs; this one wrote nothing more.")),
            Ok(Flushed::FenceLost) => self.reload(&dirty).await,
            Err(error) => {
                self.newest.give_back(&dirty);
                self.back_off(&error);
                Ok(())
            }
        }
    }

    /// The store was emptied or restored: are we still the owner? Then raise the fence and write every key.
    async fn reload(&mut self, dirty: &DirtyBatch) -> Result<()> {
        self.newest.give_back(dirty);
        if let Some(newest) = self.saver.store.latest().await?
            && newest.generation > self.generation
        {
            return Err(Error::fenced(format!(
                "generation {} has taken the pipeline over",
                newest.generation
            )));
        }
        tracing::warn!("the online store lost its fence, every key is written again");
        match self.store.raise_fence(self.generation).await {
            Ok(fence) if fence > self.generation => {
                Err(Error::fenced(format!("the online store belongs to generation {fence}")))
            }
            Ok(_) => {
                self.newest.mark_all_dirty();
                Ok(())
            }
            Err(error) => {
                self.back_off(&error);
                Ok(())
            }
        }
    }

    fn back_off(&mut self, error: &Error) {
        if self.flushes.failures == 0 {
            tracing::warn!(%error, "the online store failed; newest values wait until it is back");
        }
        self.flushes.failures += 1;
        let wait = Duration::from_millis(100 << self.flushes.failures.min(6));
        self.flushes.retry_at = Some(self.clock.instant() + wait);
    }

    /// Before the end: everything is written, or said not to be.
    async fn drain(&mut self) -> Result<()> {
        // At the end of a stream that never passed the stored positions, holding back would lose the newest values.
        for _ in 0..100 {
            if self.newest.dirty_len() == 0 {
                return Ok(());
            }
            if self.held() {
                let keys = self.newest.dirty_len();
                tracing::warn!(
                    keys,
                    "stopped before the positions that the online store had seen; the values are kept"
                );
                return Ok(());
            }
            if let Some(at) = self.flushes.retry_at.take() {
                tokio::time::sleep(at.saturating_duration_since(self.clock.instant())).await;
            }
            self.flush().await?;
            if self.flushes.failures > 5 {
                tracing::warn!(
                    keys = self.newest.dirty_len(),
                    "stopped while the online store is down; the next start writes the rest"
                );
                return Ok(());
            }
        }
        while self.newest.dirty_len() > 0 && self.flushes.failures == 0 {
            self.flush().await?;
        }
        Ok(())
    }

    async fn save(&mut self, epoch: u64) -> Result<()> {
        if self.flushes.watermark != START_OF_TIME && self.flushes.watermark != crate::stream::END_OF_TIME {
            self.newest.expire(self.flushes.watermark)?;
        }
        let full = epoch.is_multiple_of(FULL_EVERY);
        let changed = self.newest.snapshot()?;
        let rows = if full { self.newest.full_snapshot()? } else { changed };
        let mut files = Vec::new();
        if let Some(rows) = rows.filter(|rows| rows.num_rows() > 0) {
            let keys: Vec<_> = self.key.iter().map(|key| Arc::clone(rows.column(*key))).collect();
            files.push(self.saver.save("newest", epoch, &rows, &keys).await?);
        }
        let part = StatePart { files, watermark: self.flushes.watermark, full, ..StatePart::default() };
        let report = Report::State { node: self.node, epoch, part };
        self.metrics.epoch.store(epoch, Ordering::Relaxed);
        self.reports.send(report).await.map_err(coordinator_gone)
    }
}
