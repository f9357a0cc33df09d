//! Epochs: cut, gather, publish, commit (DESIGN §5 *Manifests*).
//!
//! One epoch is open at a time. When every shard has reported its part, and the Delta commits of the epoch before are
//! acknowledged, the manifest is published; then the commits of this epoch are made. Any failure ends the process: the
//! next start replays what the last manifest prepared.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::plan::{NodeId, StreamPlan};
use crate::runtime::building::{self, Base};
use crate::runtime::changes;
use crate::runtime::compaction::Compaction;
use crate::runtime::counts::{self, Counts};
use crate::runtime::flushed::kept;
use crate::runtime::graph::{Tasks, spawn};
use crate::runtime::letters;
use crate::runtime::memory;
use crate::runtime::metrics::Metrics;
use crate::runtime::report::{Command, Report, SourceEpoch, StatePart};
use crate::runtime::staged::{self, staged_commits};
use crate::runtime::start::{World, open};
use crate::runtime::tables::prepared_commits;
use crate::state::manifest::{Manifest, PreparedFile, Segment, garbage_of};
use crate::stream::clock::Clock;
use crate::stream::crash;
use crate::stream::{Barrier, DeadLetter, END_OF_TIME, Micros, START_OF_TIME};

/// How long a stop waits for tasks after the last manifest.
const FAREWELL: Duration = Duration::from_secs(15);

/// How a pipeline is run.
#[derive(Debug, Clone)]
pub struct RunOptions {
    pub name: String,
    /// Where manifests and state files live.
    pub state: String,
    pub parallelism: usize,
    pub checkpoint: Duration,
    /// Stop at the end offsets seen at start.
    pub until_end: bool,
    /// At the stop: no row follows, make everything final and mark the pipeline closed.
    pub close: bool,
    /// Bytes of resident memory; `None`: nobody looks.
    pub memory: Option<u64>,
    /// Go on where records are in neither the topic nor its history.
    pub allow_gap: bool,
    /// Rebuild sinks whose SQL changed in their place.
    pub rebuild: bool,
    /// Where `console` sinks write: only the command line prints.
    pub console: fn() -> Box<dyn std::io::Write + Send>,
}

impl RunOptions {
    /// To the end of what the pipeline has read, and no further.
    fn building(&self) -> Self {
        Self { until_end: true, close: true, ..self.clone() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Stopped,
    Closed,
    /// It was closed before; only its commits were replayed.
    AlreadyClosed,
}

/// What the shards have reported of the open epoch.
#[derive(Default)]
struct Gathered {
    sources: Vec<SourceEpoch>,
    states: Vec<(NodeId, StatePart)>,
    prepared: Vec<(NodeId, Vec<PreparedFile>, Micros)>,
    /// Of sinks that prepare files.
    counts: Counts,
    /// Dead letters of sinks that prepare files.
    dead: Vec<DeadLetter>,
}

struct Coordinator {
    /// The pipeline that waits while a new part of it is built.
    base: Option<Base>,
    plan: Arc<StreamPlan>,
    world: World,
    tasks: Tasks,
    options: RunOptions,
    metrics: Arc<Metrics>,
    last: Manifest,
    deleted: BTreeSet<String>,
    compaction: Compaction,
    ended: usize,
    /// The newest epoch whose manifest is published, for tasks that wait for it.
    durable: watch::Sender<u64>,
    /// Checkpoints in a row at which memory was above the budget.
    strikes: u32,
}

/// Runs a pipeline until `stop` says so, or until its end.
///
/// # Errors
/// User: SQL, options or state that do not fit. External: the outside world failed. Fenced: overtaken.
pub async fn run(
    mut plan: StreamPlan,
    options: RunOptions,
    metrics: Arc<Metrics>,
    stop: watch::Receiver<bool>,
) -> Result<Outcome> {
    loop {
        let mut world = open(&mut plan, &options).await?;
        if world.manifest.closed {
            return Ok(Outcome::AlreadyClosed);
        }
        let Some(build) = building::begin(&plan, &mut world, &options).await? else {
            return drive((Arc::new(plan), world, None), options, metrics, stop).await;
        };
        drop(world);
        let metrics = metrics.part(&plan, &build.part);
        let begun = (Arc::new(build.part), build.world, Some(build.base));
        if drive(begun, options.building(), metrics, stop.clone()).await? == Outcome::Stopped {
            return Ok(Outcome::Stopped);
        }
    }
}

/// Runs what was opened.
async fn drive(
    (plan, mut world, base): (Arc<StreamPlan>, World, Option<Base>),
    options: RunOptions,
    metrics: Arc<Metrics>,
    stop: watch::Receiver<bool>,
) -> Result<Outcome> {
    let (durable, published) = watch::channel(0);
    let tasks = spawn(Arc::clone(&plan), &world, &options, Arc::clone(&metrics), published).await?;
    world.tables.begin_upkeep(&plan, &world.manifest, &world.store, &metrics)?;
    let last = world.manifest.clone();
    let mut coordinator = Coordinator {
        base,
        plan,
        world,
        tasks,
        options,
        metrics,
        last,
        deleted: BTreeSet::new(),
        compaction: Compaction::default(),
        ended: 0,
        durable,
        strikes: 0,
    };
    let (metrics, budget) = (Arc::clone(&coordinator.metrics), coordinator.options.memory);
    let watched = async {
        if let Some(budget) = budget {
            memory::watch(metrics, budget).await;
        }
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        done = coordinator.drive(stop) => done,
        never = watched => match never {},
    }
}

impl Coordinator {
    async fn drive(&mut self, mut stop: watch::Receiver<bool>) -> Result<Outcome> {
        let mut ticks = tokio::time::interval(self.options.checkpoint);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            // Shards may have reached their ends while an epoch was gathered.
            let ended = self.ended >= self.options.parallelism;
            let mut end = self.options.until_end && ended;
            if !end {
                tokio::select! {
                    _ = ticks.tick() => {}
                    _ = stop.wait_for(|stop| *stop) => end = true,
                    report = self.tasks.reports.recv() => match report {
                        Some(Report::AtEnd { .. }) => {
                            self.ended += 1;
                            continue;
                        }
                        Some(Report::Failed(error)) => return Err(error),
                        Some(_) => return Err(Error::internal("a task reported an epoch that is not open")),
                        None => return Err(Error::internal("all tasks are gone")),
                    },
                }
            }
            let closing = end && self.options.close && (ended || self.base.is_none());
            let full = self.is_full();
            self.epoch(end || full, closing).await?;
            if full && !end {
                self.farewell().await?;
                let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
                let (resident, budget) = (load(&self.metrics.resident), load(&self.metrics.budget));
                return Err(memory::too_large(resident, budget, &self.last));
            }
            if end {
                self.farewell().await?;
                return Ok(if closing { Outcome::Closed } else { Outcome::Stopped });
            }
        }
    }

    /// Whether memory was above the whole budget at too many checkpoints in a row.
    fn is_full(&mut self) -> bool {
        let Some(budget) = self.options.memory else { return false };
        let above = self.metrics.resident.load(Ordering::Relaxed) > budget;
        self.strikes = if above { self.strikes + 1 } else { 0 };
        self.strikes >= memory::STRIKES
    }

    /// Cuts, gathers, publishes and commits one epoch.
    async fn epoch(&mut self, last: bool, close: bool) -> Result<()> {
        let mut next = self.last.next_data(Clock.unix_millis());
        let barrier = Barrier { epoch: next.epoch, last };
        if close {
            self.hold().await?;
        }
        crash::point("barrier.before");
        for command in &self.tasks.commands {
            let sent = command.send(Command::Cut { barrier, close }).await;
            if sent.is_err() {
                return Err(self.reason().await);
            }
        }
        let (gathered, dead) = self.gather_both(barrier).await?;
        crash::point("barrier.after");
        self.compaction.note(&gathered.states);
        self.fill(&mut next, gathered, dead, last, close).await?;
        self.compaction.take_up(&mut next, &mut self.world.orphans).await;
        next.garbage = garbage_of(&self.last, &next, &self.deleted, &self.world.orphans);
        self.world.orphans.clear();
        let whole = self.base.as_ref().map(|base| base.with(&next, close));
        self.world.store.publish(whole.as_ref().unwrap_or(&next)).await?;
        let published = Clock.unix_millis();
        self.metrics.epoch.store(next.epoch, Ordering::Relaxed);
        self.metrics.checkpoint_ms.store(published, Ordering::Relaxed);
        self.durable.send_replace(next.epoch);
        let World { tables, store, .. } = &mut self.world;
        tables.commit(&self.plan, (&next, published), store, &self.metrics).await?;
        staged::publish(&self.plan, &next, Some(&self.metrics)).await?;
        self.world.store.check_fence(next.epoch).await?;
        let garbage = &whole.as_ref().unwrap_or(&next).garbage;
        self.world.store.delete_files(garbage).await?;
        self.deleted = garbage.iter().cloned().collect();
        for command in &self.tasks.commands {
            // Those that have ended after their last barrier need no word.
            command.send(Command::Durable { epoch: next.epoch }).await.ok();
        }
        if !last {
            self.compaction.begin(&self.plan, &self.world.store, &next);
        }
        self.last = next;
        Ok(())
    }

    /// Stops all shards of the source before one of them raises the watermark to the end: what another one still read
    /// would be late.
    async fn hold(&mut self) -> Result<()> {
        for command in &self.tasks.commands {
            if command.send(Command::Hold).await.is_err() {
                return Err(self.reason().await);
            }
        }
        let mut held = 0;
        while held < self.tasks.commands.len() {
            match self.tasks.reports.recv().await {
                Some(Report::Held) => held += 1,
                Some(Report::AtEnd { .. }) => self.ended += 1,
                Some(Report::Failed(error)) => return Err(error),
                Some(_) => return Err(Error::internal("a task reported an epoch that is not open")),
                None => return Err(Error::internal("all tasks are gone")),
            }
        }
        Ok(())
    }

    /// Waits for what tasks do after the last manifest; nothing that must not be lost is left by then.
    async fn farewell(&mut self) -> Result<()> {
        let ended = async {
            while let Some(report) = self.tasks.reports.recv().await {
                if let Report::Failed(error) = report {
                    return Err(error);
                }
            }
            Ok(())
        };
        tokio::time::timeout(FAREWELL, ended).await.unwrap_or_else(|_| {
            tracing::warn!("a task does not end, probably as a server does not answer; leaving it behind");
            Ok(())
        })
    }

    /// Why a task is gone.
    async fn reason(&mut self) -> Error {
        while let Some(report) = self.tasks.reports.recv().await {
            if let Report::Failed(error) = report {
                return error;
            }
        }
        Error::internal("a task ended without a word")
    }

    /// The reports of all shards, and the dead letters. Sinks of dead letters come second: the letters of an epoch are
    /// complete when all others have reported it. What those sinks refuse goes to the state folder only.
    async fn gather_both(&mut self, barrier: Barrier) -> Result<(Gathered, Vec<DeadLetter>)> {
        let all: usize = self.tasks.shards.values().sum();
        let second = self.tasks.letters.as_ref().map_or(0, |stage| stage.reports);
        let mut gathered = self.gather(Gathered::default(), barrier.epoch, all - second).await?;
        let mut dead = self.take_dead(&mut gathered);
        if let Some(stage) = &mut self.tasks.letters {
            let letters = crate::stream::letters::batches(&dead, &self.world.source.topics())?;
            let passed = stage.pass(letters, barrier).await?;
            let Some(refused) = passed else { return Err(self.reason().await) };
            gathered.counts.merge(std::mem::take(&mut stage.chain.counts));
            self.metrics.bury(&refused);
            dead.extend(refused);
            gathered = self.gather(gathered, barrier.epoch, all).await?;
            dead.append(&mut self.take_dead(&mut gathered));
        }
        Ok((gathered, dead))
    }

    /// The dead letters of what was gathered, and counts them.
    fn take_dead(&self, gathered: &mut Gathered) -> Vec<DeadLetter> {
        let mut dead = std::mem::take(&mut gathered.dead);
        gathered.states.iter_mut().for_each(|(_, part)| dead.append(&mut part.dead));
        // Sources have counted theirs.
        self.metrics.bury(&dead);
        gathered.sources.iter_mut().for_each(|part| dead.append(&mut part.dead));
        // Of a view that runs a second time they are known, unless something of it is new.
        let (twice, new): (Vec<_>, Vec<_>) =
            self.plan.nodes.iter().partition(|node| building::is_twice(&node.id));
        let new: BTreeSet<&str> = new.iter().filter_map(|node| node.kind.view()).collect();
        let known = |view: &&str| !new.contains(view);
        let twice: BTreeSet<&str> = twice.iter().filter_map(|node| node.kind.view()).filter(known).collect();
        dead.retain(|letter| !twice.contains(letter.at.as_ref()));
        dead
    }

    /// Late rows that are not in the ledger: of what is read again, those from before the state.
    fn unknown(&self, mut late: Vec<(u16, i32, i64)>) -> Vec<(u16, i32, i64)> {
        if let Some(decided) = &self.world.decided {
            late.retain(|origin| !decided.late.contains(origin));
        }
        late
    }

    async fn gather(&mut self, mut gathered: Gathered, epoch: u64, expected: usize) -> Result<Gathered> {
        while gathered.sources.len() < self.tasks.commands.len()
            || gathered.states.len() + gathered.prepared.len() < expected
        {
            match self.tasks.reports.recv().await {
                Some(Report::Source(part)) if part.epoch == epoch => gathered.sources.push(part),
                Some(Report::State { node, epoch: of, part }) if of == epoch => {
                    gathered.states.push((node, part))
                }
                Some(Report::Prepared { node, epoch: of, files, watermark, mut dead, count })
                    if of == epoch =>
                {
                    gathered.counts.prepared(node, count, &files);
                    gathered.dead.append(&mut dead);
                    gathered.prepared.push((node, files, watermark));
                }
                Some(Report::AtEnd { .. }) => self.ended += 1,
                Some(Report::Failed(error)) => return Err(error),
                Some(_) => {
                    return Err(Error::internal(format!("a task reported another epoch than {epoch}")));
                }
                None => return Err(Error::internal("all tasks are gone")),
            }
        }
        Ok(gathered)
    }

    /// Fills a data manifest in from the shards' parts.
    async fn fill(
        &self,
        next: &mut Manifest,
        mut gathered: Gathered,
        dead: Vec<DeadLetter>,
        last: bool,
        close: bool,
    ) -> Result<()> {
        next.parallelism = self.options.parallelism;
        next.closed = close;
        next.stopped = last;
        next.interval_ms = u64::try_from(self.options.checkpoint.as_millis()).ok();
        changes::forget(&self.plan, next);
        next.lookups.clone_from(&self.world.digests);
        counts::letters(next, &dead);
        let (name, late) = self.fill_source(next, &gathered.sources);
        let mut counted = std::mem::take(&mut gathered.counts);
        gathered.sources.iter_mut().for_each(|part| counted.merge(std::mem::take(&mut part.counts)));
        gathered.states.iter_mut().for_each(|(_, part)| counted.merge(std::mem::take(&mut part.counts)));
        counts::fill(&self.plan, &self.last, next, counted);
        let generation = next.generation;
        let late = self.unknown(late);
        if let Some(batch) = letters::ledger(&self.world.source.topics(), &late)? {
            let path = crate::state::manifest::ledger_name(&name, generation, next.epoch);
            crash::point("ledger.before");
            self.world.store.put_file(&path, letters::parquet(&[batch])?).await?;
            crash::point("ledger.after");
            next.ledger.push(Segment {
                path,
                epoch: next.epoch,
                rows: late.len() as u64,
                source: name.clone(),
            });
        }
        if !dead.is_empty() {
            let batches = crate::stream::letters::batches(&dead, &self.world.source.topics())?;
            let rows: Vec<_> = batches.into_iter().map(|batch| batch.rows).collect();
            let path = crate::state::manifest::dead_letter_name(&name, generation, next.epoch);
            crash::point("dead-letters.before");
            self.world.store.put_file(&path, letters::parquet(&rows)?).await?;
            crash::point("dead-letters.after");
            next.dead_letters.push(Segment {
                path,
                epoch: next.epoch,
                rows: dead.len() as u64,
                source: name.clone(),
            });
        }
        self.fill_states(next, gathered.states);
        next.commits = staged_commits(&self.plan, next.epoch, &gathered.prepared);
        next.commits.extend(prepared_commits(&self.plan, next, gathered.prepared, &name));
        Ok(())
    }

    /// Offsets, watermarks and accounts; returns the source's name and its late rows.
    fn fill_source(&self, next: &mut Manifest, parts: &[SourceEpoch]) -> (String, Vec<(u16, i32, i64)>) {
        let name = self.plan.source().map(|(_, source)| source.name.clone()).unwrap_or_default();
        let progress = next.sources.entry(name.clone()).or_default();
        progress.topics = self.world.source.topics().iter().map(|topic| topic.to_string()).collect();
        progress.partitions = parts.iter().flat_map(|part| part.partitions.iter().copied()).collect();
        progress.partitions.sort_by_key(|p| (p.topic, p.partition));
        progress.embedded = self.world.embedded.clone();
        let history = self.world.history.as_ref();
        progress.history = history.and_then(|history| history.progress(&progress.partitions));
        progress.watermark = sent_by_all(parts);
        parts.iter().for_each(|part| progress.accounts.add(&part.accounts));
        (name, parts.iter().flat_map(|part| part.late.iter().copied()).collect())
    }

    fn fill_states(&self, next: &mut Manifest, states: Vec<(NodeId, StatePart)>) {
        for (node, shards) in &self.tasks.shards {
            let id = &self.plan.nodes[*node].id;
            let parts: Vec<&StatePart> =
                states.iter().filter(|(of, _)| of == node).map(|(_, part)| part).collect();
            if parts.len() != *shards {
                continue;
            }
            let horizon = parts.iter().map(|part| part.horizon).min().unwrap_or(START_OF_TIME);
            let full = parts.iter().all(|part| part.full);
            let epoch = next.epoch;
            next.files.retain(|file| {
                let keyed = file.kind != "rows";
                file.node != *id
                    || !(keyed && full || !keyed && file.max_time.is_some_and(|newest| newest < horizon))
            });
            debug_assert!(next.files.iter().all(|file| file.epoch < epoch));
            let watermark = parts.iter().map(|part| part.watermark).min().filter(|at| *at != START_OF_TIME);
            let generation = Some(next.generation);
            let progress = next.nodes.entry(id.clone()).or_default();
            (progress.watermark, progress.generation) = (watermark, generation);
            progress.facts = kept(progress.facts.take(), parts.iter().filter_map(|part| part.flushed));
        }
        next.files.extend(states.into_iter().flat_map(|(_, part)| part.files));
    }
}

/// The watermark that every shard had sent when it was cut: what operators have seen. The clock that the shards share may
/// stand further, by rows behind the barrier of a shard that was cut early; after a restart these rows are read again, and
/// must not be late for what they themselves had raised.
fn sent_by_all(parts: &[SourceEpoch]) -> Option<Micros> {
    let least = parts.iter().map(|part| part.watermark.unwrap_or(START_OF_TIME)).min();
    least.filter(|at| *at != START_OF_TIME)
}

/// Shows a watermark for people: `None` before any row, the end after `--close`.
pub fn shown_watermark(at: Micros) -> Option<i64> {
    (at != START_OF_TIME && at != END_OF_TIME && at != 0).then_some(at / 1_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::watermark::SourceClock;
    use crate::stream::Place;

    #[test]
    fn the_watermark_of_an_epoch_is_the_least_that_a_shard_had_sent() {
        let part = |watermark| SourceEpoch { watermark, ..SourceEpoch::default() };
        assert_eq!(sent_by_all(&[part(Some(20)), part(Some(70)), part(Some(50))]), Some(20));
        assert_eq!(sent_by_all(&[part(Some(20)), part(None)]), None);
        assert_eq!(sent_by_all(&[]), None);
    }

    /// Shard 0 cuts, reads on, then shard 1 cuts: what shard 0 read behind its cut is on time again after a restart.
    #[test]
    fn rows_behind_an_early_cut_are_not_late_when_they_are_read_again() {
        let (a, b) = (Place::new(0, 0, 0), Place::new(0, 0, 1));
        let clock = SourceClock::new(5, [(a, None), (b, None)], None);
        let mut late = Vec::new();
        clock.observe(&[a, b], &[10, 500], &mut late);
        let first = SourceEpoch { watermark: Some(clock.published()), ..SourceEpoch::default() };
        let stored = clock.partitions();
        let behind = [12, 90, 100];
        clock.observe(&[a; 3], &behind, &mut late);
        assert_eq!(late, [false; 3]);
        let second = SourceEpoch { watermark: Some(clock.published()), ..SourceEpoch::default() };
        assert!(second.watermark > first.watermark);

        let again = SourceClock::new(5, [(a, stored[&a]), (b, stored[&b])], sent_by_all(&[first, second]));
        again.observe(&[a; 3], &behind, &mut late);
        assert_eq!(late, [false; 3], "late only because of rows behind the cut");
    }
}
