//! The background task that looks after the Delta tables of a pipeline: checkpoints of their logs, compaction, vacuum.
//!
//! One table at a time, one task per process, and nothing waits for it: neither manifests nor commits. What fails is a
//! warning and is tried again later. Before it writes or deletes anything it asks the manifests whether this process
//! still owns the pipeline. A process that is stopped between question and deed and wakes up late does what it was
//! about to do; the Delta log settles that (`connectors::delta::upkeep`): a compaction finds the newer generation and is
//! dropped, what vacuum may delete can never be needed again, and a checkpoint repeats what the log says up to the version
//! that was read. A run that is shorter than the first interval does no upkeep.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::connectors::delta::{DeltaConfig, Upkeep as TableUpkeep};
use crate::connectors::files::remove_unfinished;
use crate::error::{Domain, Error, Result};
use crate::plan::{NodeId, SinkKind, StreamPlan};
use crate::runtime::aside;
use crate::runtime::metrics::{Metrics, SinkMetrics};
use crate::state::manifest::Manifest;
use crate::state::store::StateStore;
use crate::stream::clock::Clock;

/// Versions between checkpoints of a table's log, which readers need to open it fast. Delta's own default is 10; a
/// pipeline commits often and a checkpoint reads the log.
const CHECKPOINT_EVERY: u64 = 50;
/// How often the task looks whether something is due.
const TICK: Duration = Duration::from_millis(200);
/// A start is busy enough without upkeep.
const FIRST: Duration = Duration::from_secs(60);
const VACUUM_INTERVAL: Duration = Duration::from_secs(3600);
/// After a checkpoint that failed.
const RETRY: Duration = Duration::from_secs(60);

/// The running task; it ends when this is dropped.
pub struct Upkeep(JoinHandle<()>);

impl Drop for Upkeep {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What is to be done for one table, and when.
struct Chores {
    upkeep: TableUpkeep,
    location: String,
    sinks: Vec<Arc<SinkMetrics>>,
    /// The version up to which a checkpoint exists or is not due.
    checkpointed: u64,
    checkpoint_at: Instant,
    compact: Option<Turn>,
    vacuum: Option<Turn>,
}

struct Turn {
    next: Instant,
    every: Duration,
}

impl Turn {
    fn new(now: Instant, every: Duration) -> Self {
        Self { next: now + every.min(FIRST), every }
    }

    /// Whether it is time; the next time is then a whole interval away.
    fn due(turn: &mut Option<Self>, now: Instant) -> bool {
        match turn {
            Some(turn) if now >= turn.next => {
                turn.next = now + turn.every;
                true
            }
            _ => false,
        }
    }
}

/// Whether this process still owns the pipeline.
#[derive(Clone)]
struct Fence {
    store: Arc<StateStore>,
    generation: u64,
}

impl Fence {
    async fn check(&self) -> Result<()> {
        let newest = self.store.latest().await?.map(|manifest| manifest.generation);
        match newest == Some(self.generation) {
            true => Ok(()),
            false => Err(Error::fenced("a newer process owns the pipeline")),
        }
    }
}

impl Upkeep {
    /// `versions`: of each table as it was found.
    ///
    /// # Errors
    /// External: a location cannot be opened.
    pub fn begin(
        plan: &StreamPlan,
        manifest: &Manifest,
        store: &Arc<StateStore>,
        metrics: &Metrics,
        versions: &BTreeMap<NodeId, Option<u64>>,
    ) -> Result<Option<Self>> {
        let mut tables: BTreeMap<&str, (&DeltaConfig, Vec<NodeId>, Vec<String>)> = BTreeMap::new();
        for (node, sink) in plan.sinks() {
            let SinkKind::Delta(config) = &sink.kind else { continue };
            // The files of a stand-in stay as its log names them: they will be another table's.
            if config.stands_for.is_some() {
                continue;
            }
            let (_, nodes, names) =
                tables.entry(&config.location).or_insert_with(|| (config, Vec::new(), Vec::new()));
            nodes.push(node);
            names.push(sink.name.clone());
        }
        let now = Clock.instant();
        let mut chores = Vec::new();
        for (location, (config, nodes, names)) in tables {
            let state = manifest.state_id.to_string();
            let upkeep = TableUpkeep::new(config, &manifest.pipeline, &names, state, manifest.generation)?;
            let version = nodes.iter().filter_map(|node| versions.get(node).copied().flatten()).max();
            chores.push(Chores {
                upkeep,
                location: location.to_owned(),
                sinks: nodes.iter().map(|node| metrics.sink(*node)).collect(),
                checkpointed: version.unwrap_or(0),
                checkpoint_at: now,
                compact: config.compact_interval.map(|every| Turn::new(now, every)),
                vacuum: config.vacuum_retention.map(|kept| Turn::new(now, kept.min(VACUUM_INTERVAL))),
            });
        }
        if chores.is_empty() {
            return Ok(None);
        }
        let fence = Fence { store: Arc::clone(store), generation: manifest.generation };
        let running = aside::spawn(run(chores, fence));
        Ok(Some(Self(running)))
    }
}

async fn run(mut tables: Vec<Chores>, fence: Fence) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for table in &mut tables {
            if let Err(error) = table.work(&fence).await {
                let location = &table.location;
                if error.domain() == Domain::Fenced {
                    tracing::info!(%location, %error, "no more upkeep");
                    return;
                }
                tracing::warn!(%location, %error, "the upkeep of a table failed and is tried again later");
            }
        }
    }
}

impl Chores {
    async fn work(&mut self, fence: &Fence) -> Result<()> {
        let location = &self.location;
        let version = self.sinks.iter().map(|sink| sink.version.load(Ordering::Relaxed)).max().unwrap_or(0);
        let now = Clock.instant();
        if version / CHECKPOINT_EVERY > self.checkpointed / CHECKPOINT_EVERY && now >= self.checkpoint_at {
            self.checkpoint_at = now + RETRY;
            fence.check().await?;
            self.checkpointed = self.upkeep.checkpoint().await?.max(version);
            self.checkpoint_at = now;
        }
        if Turn::due(&mut self.compact, now) {
            let compacted = self.upkeep.compact(|| fence.check()).await?;
            if compacted != Default::default() {
                tracing::info!(%location, ?compacted, "merged small files");
            }
        }
        if Turn::due(&mut self.vacuum, now) {
            let files = self.upkeep.expired_files().await?;
            fence.check().await?;
            self.upkeep.delete_files(&files).await?;
            fence.check().await?;
            let entries = self.upkeep.expire_log().await?;
            let unfinished = remove_unfinished(location, Clock.unix_millis());
            if files.len() + unfinished + entries > 0 {
                let files = files.len() + unfinished;
                tracing::info!(%location, files, entries, "deleted what nobody needs any more");
            }
        }
        Ok(())
    }
}
