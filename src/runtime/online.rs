//! The task of one shard of an online sink: the newest row per key, kept in state, written to the store on arrival.
//!
//! # A store that lost its content
//! A fence that is missing or lower than ours says that the store was emptied or restored from an older copy
//! (DESIGN §5 *Redis*). Then, in this order: ask the manifests whether we still own the pipeline; mark every row
//! dirty; wait until a manifest holds those marks; raise the fence; write every row. Raised earlier, a crash would
//! leave a valid fence over missing keys, and nobody would write them again. Until the fence is ours nothing is
//! written; rows wait in the state and nothing else waits for them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::mpsc::Sender;
use tokio::sync::watch;

use crate::connectors::{Flushed, OnlineStore, OnlineWrite};
use crate::error::{Error, Result};
use crate::operators::newest::{DirtyBatch, Newest};
use crate::plan::NodeId;
use crate::runtime::counts::Count;
use crate::runtime::inbox::{Event, Inbox};
use crate::runtime::keyed::{FULL_EVERY, Piece, Saver};
use crate::runtime::letters;
use crate::runtime::metrics::{Metrics, SinkMetrics};
use crate::runtime::report::{Report, StatePart};
use crate::stream::clock::Clock;
use crate::stream::{ChangeBatch, DeadLetter, END_OF_TIME, Micros, Positions, Reached, START_OF_TIME, Stage};

/// Keys per flush: a few script calls.
const FLUSH_KEYS: usize = 4_000;
/// Events that a flush waits for at most while more keep arriving: a few hot keys must not wait for ever.
const GATHER: usize = 32;
/// Entries of [`Unwritten`].
const MAX_UNWRITTEN: usize = 1_024;
/// How often a task that may not write looks whether it may again.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Failed writes in a row after which a stop no longer waits for the store.
const PATIENCE: u32 = 5;

/// Whether the store is ours to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    Ours,
    /// Every row is marked dirty, in memory only.
    Lost,
    /// The marks are in the state of this epoch; once its manifest is published the fence may be raised.
    Marked {
        epoch: u64,
    },
}

/// Newest row per key. The store may be down: rows wait in the state, nothing else waits for it.
pub struct OnlineTask {
    pub node: NodeId,
    /// The sink's name, for dead letters.
    pub sink: Arc<str>,
    pub topics: Vec<Arc<str>>,
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
    pub metrics: Arc<SinkMetrics>,
    pub clock: Clock,
    pub flushes: FlushState,
    pub fence: Fence,
    /// For a sink whose store shows checkpoints only.
    pub settling: Option<Settling>,
    /// The newest epoch whose manifest is published.
    pub durable: watch::Receiver<u64>,
}

/// Rows of the epoch at hand, which the store must not show before a manifest holds them.
#[derive(Default)]
pub struct Settling {
    rows: Vec<ChangeBatch>,
    reached: Positions,
    /// The epoch whose rows were taken over last: once its manifest is published they may be written.
    epoch: u64,
}
/// Rows that wait for the store: (when they were read, how many). While the store is down those of the
/// last entry grow.
type Unwritten = Vec<(std::time::Instant, u64)>;

/// Progress of a shard's flushes, and what could not be flushed.
#[derive(Default)]
pub struct FlushState {
    number: u64,
    consumed: Positions,
    watermark: Micros,
    retry_at: Option<std::time::Instant>,
    failures: u32,
    /// Events taken since the last flush although it was due.
    gathered: usize,
    dead: Vec<DeadLetter>,
    /// Rows since the last barrier.
    count: Count,
    /// When the records behind rows that are not written yet were read, and how many rows.
    unwritten: Unwritten,
    /// An epoch has ended: even without rows, see that the store still has our fence.
    probe: bool,
}

impl FlushState {
    /// `consumed`: positions that the restored state already includes.
    pub fn at(consumed: Positions) -> Self {
        Self { consumed, watermark: START_OF_TIME, ..Self::default() }
    }

    /// Notes rows that are to be written, for measuring how long they take.
    fn expect(&mut self, read_at: Option<std::time::Instant>, rows: u64) {
        let Some(read_at) = read_at else { return };
        let full = self.unwritten.len() >= MAX_UNWRITTEN;
        match self.unwritten.last_mut().filter(|_| full) {
            Some((_, waiting)) => *waiting += rows,
            None => self.unwritten.push((read_at, rows)),
        }
    }
}

impl OnlineTask {
    /// Runs until the last barrier.
    ///
    /// # Errors
    /// Fenced: a newer process owns the store. External: the state store failed, or the online store refuses the user.
    pub async fn run(mut self) -> Result<()> {
        if self.fence == Fence::Lost {
            self.newest.mark_all_dirty();
        }
        loop {
            if self.may_regain() {
                self.regain().await?;
            }
            let event = if self.may_flush() {
                // Take what has already arrived, so that a key is written once for many rows.
                let room = self.newest.dirty_len() < FLUSH_KEYS && self.flushes.gathered < GATHER;
                match room.then(|| self.inbox.next().now_or_never()) {
                    Some(Some(event)) => {
                        self.flushes.gathered += 1;
                        event?
                    }
                    _ => {
                        self.flush().await?;
                        continue;
                    }
                }
            } else if self.flushes.retry_at.is_some() || self.fence != Fence::Ours || !self.settled() {
                match tokio::time::timeout(LOOK_AGAIN, self.inbox.next()).await {
                    Ok(event) => event?,
                    Err(_) => continue,
                }
            } else {
                self.inbox.next().await?
            };
            match event {
                Event::Changes { batch, reached } => {
                    self.flushes.count.rows_in += batch.num_rows() as u64;
                    self.take(batch, &reached)?;
                }
                Event::Watermark { time, reached } => {
                    let settling = self.settling.as_mut().map(|settling| &mut settling.reached);
                    settling.unwrap_or(&mut self.flushes.consumed).raise_all(&reached);
                    self.flushes.watermark = time;
                }
                Event::Barrier(barrier) => {
                    self.settle(barrier.epoch)?;
                    if barrier.last && self.settling.is_none() {
                        self.drain().await?;
                    }
                    self.save(barrier.epoch)?;
                    if barrier.last {
                        return self.finish(barrier.epoch).await;
                    }
                    self.flushes.probe = true;
                }
                Event::End => return Ok(()),
            }
        }
    }

    fn take(&mut self, batch: ChangeBatch, reached: &Reached) -> Result<()> {
        if let Some(settling) = &mut self.settling {
            settling.reached.raise_all(reached);
            settling.rows.push(batch);
            return Ok(());
        }
        self.flushes.consumed.raise_all(reached);
        self.flushes.expect(reached.read_at, batch.num_rows() as u64);
        self.push(&batch)
    }

    fn push(&mut self, batch: &ChangeBatch) -> Result<()> {
        if self.newest.push(batch)? == 0 {
            return Ok(());
        }
        for row in self.newest.rows_without_key() {
            let error = "a key column of the online sink is NULL".to_owned();
            self.flushes.dead.push(letters::of_row(
                Stage::Sink,
                &self.sink,
                "null_key",
                &self.topics,
                batch,
                row,
                error,
            ));
        }
        Ok(())
    }

    /// Takes the rows of an epoch that ends into the state.
    fn settle(&mut self, epoch: u64) -> Result<()> {
        let Some(settling) = &mut self.settling else { return Ok(()) };
        settling.epoch = epoch;
        self.flushes.consumed.raise_all(&settling.reached);
        let rows = std::mem::take(&mut settling.rows);
        rows.iter().try_for_each(|batch| self.push(batch))
    }

    /// Whether the store may show what the state holds.
    fn settled(&self) -> bool {
        self.settling.as_ref().is_none_or(|settling| *self.durable.borrow() >= settling.epoch)
    }

    fn held(&self) -> bool {
        self.hold
            .iter()
            .any(|(place, at)| self.flushes.consumed.get(place).is_none_or(|consumed| consumed < at))
    }

    fn waits(&self) -> bool {
        self.flushes.retry_at.is_some_and(|at| self.clock.instant() < at)
    }

    fn may_flush(&self) -> bool {
        let wanted = self.newest.dirty_len() > 0 || self.flushes.probe;
        self.fence == Fence::Ours && wanted && !self.waits() && !self.held() && self.settled()
    }

    fn may_regain(&self) -> bool {
        matches!(self.fence, Fence::Marked { epoch } if *self.durable.borrow() >= epoch) && !self.waits()
    }

    /// Writes what is dirty once; a failure of the store is ridden out with back-off.
    async fn flush(&mut self) -> Result<()> {
        let dirty = match self.newest.take_dirty(FLUSH_KEYS)? {
            Some(dirty) => dirty,
            None if self.flushes.probe => DirtyBatch::empty(self.newest.schema()),
            None => return Ok(()),
        };
        (self.flushes.probe, self.flushes.gathered) = (false, 0);
        self.flushes.number += 1;
        let write = OnlineWrite {
            rows: dirty.rows.clone(),
            expire_at_ms: dirty.expire_at_ms.clone(),
            deletes: dirty.deletes.clone(),
        };
        let consumed = &self.flushes.consumed;
        let done = self.store.flush(self.generation, self.shard, self.flushes.number, &write, consumed).await;
        match done {
            Ok(Flushed::Done) => {
                self.newest.acknowledge(&dirty);
                (self.flushes.failures, self.flushes.retry_at) = (0, None);
                self.count(&dirty);
                Ok(())
            }
            Ok(Flushed::Stale) => {
                self.newest.give_back(&dirty);
                Ok(())
            }
            Ok(Flushed::Fenced { by }) => Err(self.fenced(by)),
            Ok(Flushed::FenceLost) => self.lose(&dirty).await,
            Err(error) => {
                self.newest.give_back(&dirty);
                self.back_off(error)
            }
        }
    }

    /// The store acknowledged a flush.
    fn count(&mut self, dirty: &DirtyBatch) {
        let now = self.clock.unix_micros();
        self.metrics.down.store(false, Ordering::Relaxed);
        self.metrics.waiting.store(self.newest.dirty_len() as u64, Ordering::Relaxed);
        if dirty.slots.is_empty() {
            return;
        }
        self.flushes.count.written += dirty.slots.len() as u64;
        Metrics::add(&self.metrics.rows, dirty.slots.len() as u64);
        self.metrics.committed(now / 1_000);
        self.metrics.freshness.record_all(now, &dirty.times);
        if self.newest.dirty_len() == 0 {
            let now = self.clock.instant();
            for (read_at, rows) in self.flushes.unwritten.drain(..) {
                let micros = u64::try_from(now.duration_since(read_at).as_micros()).unwrap_or(u64::MAX);
                self.metrics.latency.record(micros, rows);
            }
        }
        if dirty.rows.num_rows() > 0 {
            self.metrics.show(&dirty.rows);
        }
    }

    fn fenced(&self, by: u64) -> Error {
        Error::fenced(format!(
            "the online store belongs to generation {by}, this process has {}",
            self.generation
        ))
        .hint("A newer process of this pipeline runs; this one wrote nothing more.")
    }

    /// The store was emptied or restored: are we still the owner? Then every key is to be written again.
    async fn lose(&mut self, dirty: &DirtyBatch) -> Result<()> {
        self.newest.give_back(dirty);
        if let Some(newest) = self.saver.store.latest().await?
            && newest.generation > self.generation
        {
            return Err(self.fenced(newest.generation));
        }
        tracing::warn!(sink = %self.sink, "the online store lost its fence, every key is written again");
        self.newest.mark_all_dirty();
        self.fence = Fence::Lost;
        Ok(())
    }

    /// The marks are durable: takes the store back.
    async fn regain(&mut self) -> Result<()> {
        let raised = async {
            let fence = self.store.raise_fence(self.generation).await?;
            Ok::<_, Error>((fence, self.store.open().await?))
        };
        match raised.await {
            Ok((fence, _)) if fence > self.generation => Err(self.fenced(fence)),
            Ok((_, state)) => {
                self.hold = state.consumed;
                self.fence = Fence::Ours;
                (self.flushes.failures, self.flushes.retry_at) = (0, None);
                Ok(())
            }
            Err(error) => self.back_off(error),
        }
    }

    /// Rides out what may pass; a refused user or right does not.
    fn back_off(&mut self, error: Error) -> Result<()> {
        if error.is_lasting() {
            return Err(error.context(format_args!("sink {}", self.sink)));
        }
        if self.flushes.failures == 0 {
            tracing::warn!(%error, "the online store failed; newest values wait until it is back");
        }
        self.flushes.failures += 1;
        self.metrics.down.store(true, Ordering::Relaxed);
        self.metrics.waiting.store(self.newest.dirty_len() as u64, Ordering::Relaxed);
        let wait = Duration::from_millis(100 << self.flushes.failures.min(6));
        self.flushes.retry_at = Some(self.clock.instant() + wait);
        Ok(())
    }

    /// Before the end: everything is written, or said not to be.
    async fn drain(&mut self) -> Result<()> {
        while self.newest.dirty_len() > 0 && self.fence == Fence::Ours {
            if self.held() {
                let keys = self.newest.dirty_len();
                tracing::warn!(
                    keys,
                    "stopped before the positions that the online store had seen; the values are kept"
                );
                return Ok(());
            }
            if self.flushes.failures > PATIENCE {
                let keys = self.newest.dirty_len();
                tracing::warn!(
                    keys,
                    "stopped while the online store is down; the next start writes the rest"
                );
                return Ok(());
            }
            self.pause().await;
            self.flush().await?;
        }
        Ok(())
    }

    async fn pause(&mut self) {
        if let Some(at) = self.flushes.retry_at.take() {
            tokio::time::sleep(at.saturating_duration_since(self.clock.instant())).await;
        }
    }

    /// After the last barrier: a store whose fence was lost, or that shows checkpoints only, is filled once the last
    /// manifest is published.
    async fn finish(mut self, epoch: u64) -> Result<()> {
        if self.fence == Fence::Ours && self.settling.is_none() {
            return Ok(());
        }
        if self.durable.wait_for(|durable| *durable >= epoch).await.is_err() {
            return Ok(());
        }
        while self.fence != Fence::Ours && self.flushes.failures <= PATIENCE {
            self.pause().await;
            self.regain().await?;
        }
        if self.fence != Fence::Ours {
            tracing::warn!("stopped while the online store is down; the next start writes every key");
        }
        self.drain().await
    }

    fn save(&mut self, epoch: u64) -> Result<()> {
        if self.flushes.watermark != START_OF_TIME && self.flushes.watermark != END_OF_TIME {
            self.newest.expire(self.flushes.watermark)?;
        }
        let full = epoch.is_multiple_of(FULL_EVERY);
        let changed = self.newest.snapshot()?;
        let rows = if full { self.newest.full_snapshot()? } else { changed };
        let piece = rows.filter(|rows| rows.num_rows() > 0).map(|rows| {
            let keys = self.key.iter().map(|key| Arc::clone(rows.column(*key))).collect();
            Piece { kind: "newest", rows, keys }
        });
        if self.fence == Fence::Lost {
            self.fence = Fence::Marked { epoch };
        }
        let dead = std::mem::take(&mut self.flushes.dead);
        let (dead_letters, waiting) = (dead.len() as u64, self.newest.dirty_len() as u64);
        let mut part = StatePart { watermark: self.flushes.watermark, full, dead, ..StatePart::default() };
        *part.counts.of(self.node) =
            Count { dead_letters, waiting, ..std::mem::take(&mut self.flushes.count) };
        self.saver.save_behind(self.node, epoch, piece.into_iter().collect(), part, &self.reports);
        Ok(())
    }
}
