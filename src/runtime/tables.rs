//! The Delta sinks of a pipeline: opened at start, taken over by a claim, committed once per epoch.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use tokio::task::JoinHandle;

use crate::connectors::delta::table::checkpoint;
use crate::connectors::delta::{CommitProgress, Committed, DeltaCommitter, PreparedFile as DeltaFile};
use crate::error::{Error, Result};
use crate::plan::{NodeId, SinkKind, StreamPlan};
use crate::runtime::metrics::Metrics;
use crate::state::manifest::{self, Manifest, PreparedCommit, PreparedFile};
use crate::stream::clock::Clock;
use crate::stream::{Micros, START_OF_TIME, crash};

/// Versions between checkpoints of a table's log, which readers need to open it fast. Delta's own default is 10; a
/// pipeline commits often and a checkpoint reads the log.
const CHECKPOINT_EVERY: u64 = 50;

/// Committers of the Delta sinks.
pub struct Tables {
    committers: BTreeMap<NodeId, DeltaCommitter>,
    missing: Vec<NodeId>,
    /// The largest epoch or generation found in the tables.
    pub newest: u64,
    /// The checkpoint being written in the background; one at a time.
    checkpoint: Option<JoinHandle<()>>,
}

impl Tables {
    /// Looks at the table of every Delta sink. `latest`: the newest manifest of the state.
    ///
    /// # Errors
    /// User: a table belongs to another state, or has other columns. External: a store failed.
    pub async fn open(plan: &StreamPlan, name: &str, latest: Option<&Manifest>, state: &str) -> Result<Self> {
        let mut tables =
            Self { committers: BTreeMap::new(), missing: Vec::new(), newest: 0, checkpoint: None };
        let ours = latest.map(|manifest| manifest.state_id.to_string());
        for (node, sink) in plan.sinks() {
            let SinkKind::Delta(config) = &sink.kind else { continue };
            let stored = config.stored_rows(&sink.schema)?;
            let (committer, table) = DeltaCommitter::open(config, &stored, name, &sink.name).await?;
            tables.newest = tables.newest.max(table.last_epoch.max(table.max_generation).unwrap_or(0));
            if !table.exists {
                tables.missing.push(node);
            } else if ours.is_none() || table.state_id != ours {
                let message = format!(
                    "sink {}: the table {} already exists and belongs to another state than {state}",
                    sink.name, config.location
                );
                let hint = "Continue with the state that wrote it (--state, --name), write to another location, or \
                            remove the table; rebuilding it from history comes with a later version.";
                return Err(Error::user(message).hint(hint));
            }
            tables.committers.insert(node, committer);
        }
        Ok(tables)
    }

    /// After the claim: creates what is missing, in commits of their own, and replays the prepared commits unchanged.
    ///
    /// # Errors
    /// External: a store failed, or a prepared file is gone.
    pub async fn take_over(&mut self, plan: &StreamPlan, manifest: &Manifest) -> Result<()> {
        for node in std::mem::take(&mut self.missing) {
            if let Some(committer) = self.committers.get_mut(&node) {
                crash::point("table.before");
                committer.create(&manifest.state_id.to_string()).await?;
                crash::point("table.after");
            }
        }
        for commit in &manifest.commits {
            if let Some(committer) = self.committer(plan, commit) {
                crash::point("replay.before");
                let done = replay(committer, commit, manifest.generation).await?;
                crash::point("replay.after");
                tracing::info!(sink = %commit.sink, epoch = commit.epoch, ?done, "replayed a prepared commit");
            }
        }
        Ok(())
    }

    /// Makes the commits of a published manifest.
    ///
    /// # Errors
    /// External: a store failed, or another state has taken a table over.
    pub async fn commit(&mut self, plan: &StreamPlan, manifest: &Manifest, metrics: &Metrics) -> Result<()> {
        for commit in &manifest.commits {
            let Some(committer) = self.committer(plan, commit) else { continue };
            let progress = progress_of(commit, manifest.generation);
            crash::point("delta.commit.before");
            let done = committer.commit(commit.epoch, &files_of(commit), &progress).await?;
            crash::point("delta.commit.after");
            let Committed::Version(version) = done else { continue };
            if let Some((node, _)) = plan.sinks().find(|(_, sink)| sink.name == commit.sink) {
                let counted = metrics.sink(node);
                counted.version.store(version, Ordering::Relaxed);
                counted.committed(Clock.unix_millis());
            }
            if version.is_multiple_of(CHECKPOINT_EVERY) {
                self.begin_checkpoint(commit.location.clone());
            }
        }
        Ok(())
    }

    fn committer(&mut self, plan: &StreamPlan, commit: &PreparedCommit) -> Option<&mut DeltaCommitter> {
        let (node, _) = plan.sinks().find(|(_, sink)| sink.name == commit.sink)?;
        self.committers.get_mut(&node)
    }

    /// Off the commit path. Left out while another one runs: the next multiple comes.
    fn begin_checkpoint(&mut self, location: String) {
        if self.checkpoint.as_ref().is_some_and(|running| !running.is_finished()) {
            return;
        }
        #[expect(
            clippy::disallowed_methods,
            reason = "the runtime spawns; a checkpoint must not delay commits"
        )]
        let running = tokio::spawn(async move {
            if let Err(error) = checkpoint(&location).await {
                tracing::warn!(%location, %error, "no checkpoint was written; readers need longer to open the table");
            }
        });
        self.checkpoint = Some(running);
    }
}

async fn replay(
    committer: &mut DeltaCommitter,
    commit: &PreparedCommit,
    generation: u64,
) -> Result<Committed> {
    let files = files_of(commit);
    let gone = committer.missing_files(&files).await?;
    match gone.first() {
        None => committer.commit(commit.epoch, &files, &progress_of(commit, generation)).await,
        Some(_) if committer.is_done(commit.epoch).await? => Ok(Committed::AlreadyDone),
        Some(gone) => {
            let message = format!("sink {}: the prepared file {gone} is gone", commit.sink);
            let hint = "A foreign VACUUM removed files of an unfinished commit; rebuilding comes with a later version.";
            Err(Error::external(message).hint(hint))
        }
    }
}

/// What a prepared commit says about progress, as Delta transactions.
fn progress_of(commit: &PreparedCommit, generation: u64) -> CommitProgress {
    let mut progress = CommitProgress {
        complete_until: commit.complete_until,
        generation: Some(generation),
        ..CommitProgress::default()
    };
    for source in commit.sources.values() {
        let topic = |at: u16| source.topics.get(usize::from(at)).cloned().unwrap_or_default();
        for p in &source.partitions {
            progress.offsets.push((topic(p.topic), p.partition, p.next_offset));
            progress.watermarks.extend(p.watermark.map(|at| (topic(p.topic), p.partition, at)));
        }
        progress.source_watermark = source.watermark;
    }
    progress
}

fn files_of(commit: &PreparedCommit) -> Vec<DeltaFile> {
    let file =
        |f: &PreparedFile| DeltaFile { path: f.path.clone(), size: f.size, rows: f.rows, add: f.add.clone() };
    commit.files.iter().map(file).collect()
}

/// The commits of an epoch, from what the shards of each Delta sink prepared: (sink, files, watermark).
pub fn prepared_commits(
    plan: &StreamPlan,
    next: &Manifest,
    prepared: Vec<(NodeId, Vec<PreparedFile>, Micros)>,
    source: &str,
) -> Vec<PreparedCommit> {
    let progress = next.sources.get(source).cloned().unwrap_or_default();
    let mut commits = Vec::new();
    for (node, sink) in plan.sinks() {
        let SinkKind::Delta(config) = &sink.kind else { continue };
        let parts: Vec<_> = prepared.iter().filter(|(of, _, _)| *of == node).collect();
        let until = parts.iter().map(|(_, _, watermark)| *watermark).min();
        let covered = manifest::CommitProgress {
            topics: progress.topics.clone(),
            partitions: progress.partitions.clone(),
            watermark: progress.watermark,
        };
        commits.push(PreparedCommit {
            sink: sink.name.clone(),
            location: config.location.clone(),
            epoch: next.epoch,
            files: parts.iter().flat_map(|(_, files, _)| files.iter().cloned()).collect(),
            sources: [(source.to_owned(), covered)].into(),
            complete_until: until.filter(|at| *at != START_OF_TIME),
        });
    }
    commits
}
