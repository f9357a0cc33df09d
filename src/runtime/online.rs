//! The task of one shard of an online sink: the newest row per key, kept in state, written to the store on arrival.
//!
//! # A store that fails
//! One flush at a time is under way, and the task takes rows and barriers in meanwhile: a store that hangs delays no
//! manifest. What a flush could not write goes back to the dirty rows, also when it is not known whether it was
//! written: the next one has a higher number, so that the store refuses the old one if it comes late. Tries wait
//! longer each time ([`super::outage`]); what only a person can mend ends the pipeline.
//!
//! # A store that lost its content
//! A fence that is missing or lower than ours says that the store was emptied or restored from an older copy
//! (DESIGN §5 *Redis*). Then, in this order: ask the manifests whether we still own the pipeline; mark every row
//! of every shard dirty; wait until a manifest holds those marks; raise the fence; write every row. Raised earlier, a
//! crash would leave a valid fence over missing keys, and nobody would write them again. Until the fence is ours nothing
//! is written; rows wait in the state and nothing else waits for them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::mpsc::Sender;
use tokio::sync::watch;

use crate::connectors::{Flushed, OnlineState, OnlineStore, OnlineWrite};
use crate::error::{Error, Result};
use crate::operators::newest::{DirtyBatch, Newest};
use crate::plan::NodeId;
use crate::runtime::counts::Count;
use crate::runtime::flushed::ShardFlush;
use crate::runtime::inbox::{Event, Inbox};
use crate::runtime::keyed::{FULL_EVERY, Piece, Saver};
use crate::runtime::letters;
use crate::runtime::metrics::{Metrics, SinkMetrics};
use crate::runtime::outage::{Losses, Outage};
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
/// While a flush is under way rows of another one are taken in, not more, unless it takes longer than this.
const SLOW: Duration = Duration::from_millis(100);
/// How long the last checkpoint waits for the store, so that its state says what was written.
const DRAIN: Duration = Duration::from_secs(2);
/// Failed writes in a row after which a stop no longer waits for the store.
const PATIENCE: u32 = 5;

/// Whether the store is ours to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    Ours,
    /// Every row is marked dirty, in memory only.
    Lost,
    /// The marks are in the state; the fence may be raised once a manifest holds those of every shard.
    Marked,
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
    /// What the store shows is still another one's: nothing is written, whatever was passed.
    pub quiet: bool,
    pub inbox: Inbox,
    pub reports: Sender<Report>,
    pub saver: Saver,
    pub metrics: Arc<SinkMetrics>,
    pub clock: Clock,
    pub flushes: FlushState,
    pub fence: Fence,
    /// Of the sink, shared by its shards.
    pub losses: Arc<Losses>,
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
type Unwritten = Vec<(Instant, u64)>;

/// What is under way to the store; the task goes on with its input meanwhile.
struct Flight {
    landing: BoxFuture<'static, Landed>,
    /// The rows of a flush, and when they were read if no others wait.
    rows: Option<(DirtyBatch, Unwritten)>,
    /// Of the flush.
    number: u64,
    /// The loss that a raised fence makes good.
    loss: u64,
    began: Instant,
}

enum Landed {
    Flushed(Result<Flushed>),
    /// The fence, and what the store holds.
    Raised(Result<(u64, OnlineState)>),
}

/// Progress of a shard's flushes, and what could not be flushed.
#[derive(Default)]
pub struct FlushState {
    number: u64,
    /// The newest flush that the store has, by its word.
    acknowledged: Option<(u64, u64)>,
    consumed: Positions,
    watermark: Micros,
    flight: Option<Flight>,
    outage: Outage,
    /// The newest loss of the store's content that this shard knows of.
    loss: u64,
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
    fn expect(&mut self, read_at: Option<Instant>, rows: u64) {
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
            let Some(event) = self.next().await? else { continue };
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
                        // What is not written by then stays dirty in the state, and is written behind it.
                        tokio::time::timeout(DRAIN, self.drain(0)).await.unwrap_or(Ok(()))?;
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

    /// The next event; `None` after something else was done. Sends what may be sent.
    async fn next(&mut self) -> Result<Option<Event>> {
        self.heed_loss();
        if self.flushes.flight.is_none() && self.may_regain() {
            self.regain();
        }
        if self.flushes.flight.is_none() && self.may_flush() {
            // Take what has already arrived, so that a key is written once for many rows.
            let room = self.newest.dirty_len() < FLUSH_KEYS && self.flushes.gathered < GATHER;
            if let Some(Some(event)) = room.then(|| self.inbox.next().now_or_never()) {
                self.flushes.gathered += 1;
                return event.map(Some);
            }
            self.send()?;
        }
        let Some(flight) = &mut self.flushes.flight else {
            let waits =
                self.flushes.outage.retry_at().is_some() || self.fence != Fence::Ours || !self.settled();
            return match waits {
                true => tokio::time::timeout(LOOK_AGAIN, self.inbox.next()).await.ok().transpose(),
                false => self.inbox.next().await.map(Some),
            };
        };
        let under_way = flight.rows.as_ref().map_or(0, |(dirty, _)| dirty.slots.len());
        let full = self.newest.dirty_len() >= under_way + FLUSH_KEYS;
        let left = SLOW.saturating_sub(self.clock.instant().saturating_duration_since(flight.began));
        let wait = full && !left.is_zero();
        tokio::select! {
            biased;
            landed = &mut flight.landing => {
                self.land(landed).await?;
                Ok(None)
            }
            event = self.inbox.next(), if !wait => event.map(Some),
            () = tokio::time::sleep(left), if wait => Ok(None),
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
        let behind = |(place, at)| self.flushes.consumed.get(place).is_none_or(|consumed| consumed < at);
        self.quiet || self.hold.iter().any(behind)
    }

    fn waits(&self) -> bool {
        self.flushes.outage.retry_at().is_some_and(|at| self.clock.instant() < at)
    }

    fn may_flush(&self) -> bool {
        let wanted = self.newest.dirty_len() > 0 || self.flushes.probe;
        self.fence == Fence::Ours && wanted && !self.waits() && !self.held() && self.settled()
    }

    fn may_regain(&self) -> bool {
        self.fence == Fence::Marked && !self.quiet && !self.waits() && self.marks_are_durable()
    }

    fn marks_are_durable(&self) -> bool {
        self.losses.marked_by().is_some_and(|epoch| *self.durable.borrow() >= epoch)
    }

    /// Sends off what is dirty.
    fn send(&mut self) -> Result<()> {
        let dirty = match self.newest.take_dirty(FLUSH_KEYS)? {
            Some(dirty) => dirty,
            None => DirtyBatch::empty(self.newest.schema()),
        };
        (self.flushes.probe, self.flushes.gathered) = (false, 0);
        self.flushes.number += 1;
        let write = OnlineWrite {
            rows: dirty.rows.clone(),
            expire_at_ms: dirty.expire_at_ms.clone(),
            deletes: dirty.deletes.clone(),
        };
        let all = dirty.slots.len() == self.newest.dirty_len();
        let read = if all { std::mem::take(&mut self.flushes.unwritten) } else { Unwritten::new() };
        let (store, consumed) = (Arc::clone(&self.store), self.flushes.consumed.clone());
        let (generation, shard, number) = (self.generation, self.shard, self.flushes.number);
        let landing =
            async move { Landed::Flushed(store.flush(generation, shard, number, &write, &consumed).await) };
        self.fly(landing.boxed(), Some((dirty, read)));
        Ok(())
    }

    /// The marks of every shard are durable: takes the store back.
    fn regain(&mut self) {
        let (store, generation) = (Arc::clone(&self.store), self.generation);
        let raised = async move {
            let fence = store.raise_fence(generation).await?;
            Ok((fence, store.open().await?))
        };
        self.fly(raised.map(Landed::Raised).boxed(), None);
    }

    fn fly(&mut self, landing: BoxFuture<'static, Landed>, rows: Option<(DirtyBatch, Unwritten)>) {
        let (number, loss, began) = (self.flushes.number, self.flushes.loss, self.clock.instant());
        self.flushes.flight = Some(Flight { landing, rows, number, loss, began });
    }

    /// What was under way came to an end. A failure of the store is ridden out with back-off.
    async fn land(&mut self, landed: Landed) -> Result<()> {
        let Some(flight) = self.flushes.flight.take() else { return Ok(()) };
        let (dirty, mut read) =
            flight.rows.unwrap_or_else(|| (DirtyBatch::empty(self.newest.schema()), Unwritten::new()));
        if !matches!(landed, Landed::Flushed(Ok(Flushed::Done))) {
            self.newest.give_back(&dirty);
            read.append(&mut self.flushes.unwritten);
            self.flushes.unwritten = std::mem::take(&mut read);
        }
        match landed {
            Landed::Flushed(Err(error)) | Landed::Raised(Err(error)) => return self.back_off(error),
            Landed::Flushed(Ok(Flushed::Fenced { by })) => return Err(self.fenced(by)),
            Landed::Raised(Ok((fence, _))) if fence > self.generation => return Err(self.fenced(fence)),
            _ => self.recovered(),
        }
        match landed {
            Landed::Flushed(Ok(Flushed::Done)) => {
                self.newest.acknowledge(&dirty);
                if flight.loss == self.flushes.loss {
                    self.flushes.acknowledged = Some((self.generation, flight.number));
                }
                self.count(&dirty, read);
                Ok(())
            }
            Landed::Flushed(Ok(Flushed::FenceLost)) if self.fence == Fence::Ours => self.lose().await,
            Landed::Raised(Ok((_, state))) if self.losses.count() == flight.loss => {
                (self.hold, self.fence) = (state.consumed, Fence::Ours);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The store acknowledged a flush of rows that were read then.
    fn count(&mut self, dirty: &DirtyBatch, read: Unwritten) {
        self.metrics.waiting.store(self.newest.dirty_len() as u64, Ordering::Relaxed);
        if dirty.slots.is_empty() {
            return;
        }
        let now = self.clock.unix_micros();
        self.flushes.count.written += dirty.slots.len() as u64;
        Metrics::add(&self.metrics.rows, dirty.slots.len() as u64);
        self.metrics.committed(now / 1_000);
        self.metrics.freshness.record_all(now, &dirty.times);
        let now = self.clock.instant();
        for (read_at, rows) in read {
            let micros = u64::try_from(now.duration_since(read_at).as_micros()).unwrap_or(u64::MAX);
            self.metrics.latency.record(micros, rows);
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

    /// The store was emptied or set back: are we still the owner? Then every key is to be written again.
    async fn lose(&mut self) -> Result<()> {
        if let Some(newest) = self.saver.store.latest().await?
            && newest.generation > self.generation
        {
            return Err(self.fenced(newest.generation));
        }
        if self.losses.found(self.flushes.loss) {
            tracing::warn!(sink = %self.sink, "the online store lost what it had, every key is written again");
        }
        self.heed_loss();
        Ok(())
    }

    /// A loss that this shard or another one found concerns all of them.
    fn heed_loss(&mut self) {
        let count = self.losses.count();
        if count != self.flushes.loss {
            (self.flushes.loss, self.flushes.acknowledged) = (count, None);
            self.newest.mark_all_dirty();
            self.fence = Fence::Lost;
        }
    }

    /// Rides out what may pass; what needs a person does not.
    fn back_off(&mut self, error: Error) -> Result<()> {
        if error.is_lasting() {
            return Err(error.context(format_args!("sink {}", self.sink)));
        }
        if self.flushes.outage.fail(self.clock, self.shard, &self.metrics.failing) {
            let hint = error.hint_text().unwrap_or_default();
            tracing::warn!(sink = %self.sink, %error, hint, "the online store failed; newest values wait until it is back");
        }
        self.metrics.waiting.store(self.newest.dirty_len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// The store answered.
    fn recovered(&mut self) {
        if let Some(outage) = self.flushes.outage.succeed(self.clock, &self.metrics.failing) {
            let seconds = outage.as_secs();
            tracing::warn!(sink = %self.sink, seconds, "the online store is back; what waited is written");
        }
    }

    /// Writes until nothing waits, or until the store has failed more than `patience` times in a row.
    async fn drain(&mut self, patience: u32) -> Result<()> {
        loop {
            self.heed_loss();
            if let Some(flight) = &mut self.flushes.flight {
                let landed = (&mut flight.landing).await;
                self.land(landed).await?;
            } else if self.newest.dirty_len() == 0
                || self.fence != Fence::Ours
                || self.held()
                || self.flushes.outage.failures() > patience
            {
                return Ok(());
            } else {
                self.pause().await;
                self.send()?;
            }
        }
    }

    async fn pause(&mut self) {
        if let Some(at) = self.flushes.outage.retry_at() {
            tokio::time::sleep(at.saturating_duration_since(self.clock.instant())).await;
        }
    }

    /// After the last barrier: writes what the store did not take before. A store whose fence was lost, or that shows
    /// checkpoints only, is filled once the last manifest is published.
    async fn finish(mut self, epoch: u64) -> Result<()> {
        let late = self.fence != Fence::Ours || self.settling.is_some();
        if late && self.durable.wait_for(|durable| *durable >= epoch).await.is_err() {
            return Ok(());
        }
        while self.fence == Fence::Marked
            && !self.quiet
            && self.marks_are_durable()
            && self.flushes.outage.failures() <= PATIENCE
        {
            if self.flushes.flight.is_none() {
                self.pause().await;
                self.regain();
            }
            if let Some(flight) = &mut self.flushes.flight {
                let landed = (&mut flight.landing).await;
                self.land(landed).await?;
            }
        }
        self.drain(PATIENCE).await?;
        let keys = self.newest.dirty_len();
        if self.quiet {
            // As it should be.
        } else if self.fence != Fence::Ours {
            tracing::warn!(sink = %self.sink, "stopped while the online store is down; the next start writes every key");
        } else if keys > 0 && self.held() {
            tracing::warn!(
                keys,
                "stopped before the positions that the online store had seen; the values are kept"
            );
        } else if keys > 0 {
            tracing::warn!(sink = %self.sink, keys, "stopped while the online store is down; the next start writes the rest");
        }
        Ok(())
    }

    fn save(&mut self, epoch: u64) -> Result<()> {
        self.heed_loss();
        if self.flushes.watermark != START_OF_TIME && self.flushes.watermark != END_OF_TIME {
            self.newest.expire(self.flushes.watermark)?;
        }
        let full = epoch.is_multiple_of(FULL_EVERY);
        let changed = self.newest.cut()?;
        let cut = if full { self.newest.full_cut() } else { changed };
        let piece = cut.map(|cut| Piece {
            kind: "newest",
            keys: self.key.clone(),
            gather: Box::new(|| cut.gather().map(Some)),
        });
        let anew = self.fence == Fence::Lost;
        if anew {
            self.fence = Fence::Marked;
            self.losses.mark(self.shard, epoch, self.flushes.loss);
        }
        let dead = std::mem::take(&mut self.flushes.dead);
        let (dead_letters, waiting) = (dead.len() as u64, self.newest.dirty_len() as u64);
        let flushed = Some(ShardFlush { shard: self.shard, acknowledged: self.flushes.acknowledged, anew });
        let mut part =
            StatePart { flushed, watermark: self.flushes.watermark, full, dead, ..StatePart::default() };
        *part.counts.of(self.node) =
            Count { dead_letters, waiting, ..std::mem::take(&mut self.flushes.count) };
        self.saver.save_behind(self.node, epoch, piece.into_iter().collect(), part, &self.reports);
        Ok(())
    }
}
