//! The Delta sinks of a pipeline: opened at start, taken over by a claim, committed once per epoch.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::connectors::delta::config::OnSchemaChange;
use crate::connectors::delta::swap::Swap;
use crate::connectors::delta::table::{exists, newest_epoch};
use crate::connectors::delta::{
    CommitProgress, Committed, DeltaCommitter, DeltaConfig, PreparedFile as DeltaFile, TableState,
};
use crate::error::{Error, Result};
use crate::plan::{NodeId, NodeKind, SinkKind, SinkPlan, StreamPlan};
use crate::runtime::history;
use crate::runtime::metrics::Metrics;
use crate::runtime::remake::{Lost, Past, remake};
pub use crate::runtime::stand_ins::{all_there, forget, stand_in, stands_for};
use crate::runtime::upkeep::Upkeep;
use crate::state::manifest::{
    self, Manifest, PartitionProgress, PreparedCommit, PreparedFile, SourceProgress,
};
use crate::state::store::StateStore;
use crate::stream::clock::Clock;
use crate::stream::{Micros, START_OF_TIME, crash};

/// For so long after its manifest a commit is made without another look at the fence and at its files.
const FRESH_MS: i64 = 5_000;

/// Committers of the Delta sinks.
pub struct Tables {
    committers: BTreeMap<NodeId, DeltaCommitter>,
    missing: Vec<NodeId>,
    /// The backup that the pipeline begins with although its own state is lost.
    adopted: Vec<NodeId>,
    /// Sinks that are rebuilt: their tables have the columns of other SQL.
    rebuilt: Vec<NodeId>,
    /// The largest epoch or generation found in the tables.
    pub newest: u64,
    /// Checkpoints, compaction and vacuum, in the background.
    upkeep: Option<Upkeep>,
}

impl Tables {
    /// Looks at the table of every Delta sink. `latest`: the newest manifest of the state; `rebuilt`: sinks whose tables have
    /// the columns of other SQL.
    ///
    /// # Errors
    /// User: a table belongs to another state, or has other columns. External: a store failed.
    pub async fn open(
        plan: &StreamPlan,
        name: &str,
        latest: Option<&Manifest>,
        (state, rebuilt): (&str, &[NodeId]),
    ) -> Result<Self> {
        let mut tables = Self { rebuilt: rebuilt.to_vec(), ..Self::none() };
        for (node, sink) in plan.sinks() {
            let SinkKind::Delta(config) = &sink.kind else { continue };
            let as_it_is = waits(sink, latest) || rebuilt.contains(&node);
            let (committer, table) = committer(config, sink, name, as_it_is).await?;
            tables.newest = tables.newest.max(table.last_epoch.max(table.max_generation).unwrap_or(0));
            if !table.exists {
                tables.missing.push(node);
            }
            if history::continues(plan, node, latest) && continued(&table) {
                tables.adopted.push(node);
            } else {
                fits(&sink.name, &config.location, &table, latest, state)?;
            }
            tables.committers.insert(node, committer);
        }
        Ok(tables)
    }

    /// No table.
    pub fn none() -> Self {
        Self {
            committers: BTreeMap::new(),
            missing: Vec::new(),
            adopted: Vec::new(),
            rebuilt: Vec::new(),
            newest: 0,
            upkeep: None,
        }
    }

    /// Whether a table has a commit of an epoch.
    pub fn is_written(&self, node: NodeId) -> bool {
        self.committers.get(&node).is_some_and(|committer| committer.epoch().is_some())
    }

    /// Those of a part of the plan. Stand-ins are made unless they are there, and what `manifest` prepared for them is
    /// committed.
    ///
    /// # Errors
    /// External: a store failed, or prepared files are gone.
    pub async fn part(&mut self, plan: &StreamPlan, part: &StreamPlan, manifest: &Manifest) -> Result<Self> {
        let mut tables = Self::none();
        for (own, sink) in part.sinks() {
            let SinkKind::Delta(config) = &sink.kind else { continue };
            let whole = plan.sinks().find(|(_, other)| other.name == sink.name);
            let known = whole.and_then(|(node, _)| self.committers.remove(&node));
            if config.stands_for.is_none() {
                tables.committers.extend(known.map(|known| (own, known)));
                continue;
            }
            let (mut built, table) = committer(config, sink, &manifest.pipeline, false).await?;
            if !table.exists {
                crash::point("table.before");
                built.create(&manifest.state_id.to_string()).await?;
                crash::point("table.after");
            }
            tables.committers.insert(own, built);
            for commit in manifest.commits.iter().filter(|commit| writes(sink, commit)) {
                if let Some(lost) = tables.replay(part, commit, manifest.generation).await? {
                    return Err(gone(commit, &lost.file));
                }
            }
        }
        Ok(tables)
    }

    /// After the claim: creates what is missing, in commits of their own, replays the prepared commits unchanged, makes
    /// those again whose files are gone, and adds the columns that a table lacks. Returns the sinks that were rebuilt and whose
    /// stand-ins are gone before they replaced what there was.
    ///
    /// # Errors
    /// External: a store failed, or a commit cannot be made again.
    pub async fn take_over(&mut self, plan: &StreamPlan, past: &Past<'_>) -> Result<Vec<NodeId>> {
        let manifest = past.manifest;
        for node in std::mem::take(&mut self.missing) {
            if let Some(committer) = self.committers.get_mut(&node) {
                crash::point("table.before");
                committer.create(&manifest.state_id.to_string()).await?;
                crash::point("table.after");
            }
        }
        let (mut lost, mut unreplaced) = (Vec::new(), Vec::new());
        for node in std::mem::take(&mut self.adopted) {
            if let Some(committer) = self.committers.get_mut(&node) {
                tracing::warn!(
                    sink = %plan.nodes[node].id,
                    "the backup was written from another state; it is taken over and goes on at its own offsets"
                );
                crash::point("adopt.before");
                committer.adopt(&manifest.state_id.to_string()).await?;
                crash::point("adopt.after");
            }
        }
        for commit in &manifest.commits {
            match &commit.replaced_by {
                Some(stand_in) => unreplaced.extend(self.replace(plan, commit, stand_in, manifest).await?),
                None => lost.extend(self.replay(plan, commit, manifest.generation).await?),
            }
        }
        // What is lost cannot be made again by other SQL.
        let other = |lost: &&Lost| self.rebuilt.iter().any(|node| plan.nodes[*node].id == lost.commit.sink);
        if let Some(lost) = lost.iter().find(other) {
            return Err(gone(&lost.commit, &lost.file).hint("Start once with the SQL as it was before."));
        }
        if !lost.is_empty() {
            for commit in remake(plan, past, &lost).await? {
                self.replay(plan, &commit, manifest.generation).await?;
            }
        }
        // Only now: what was prepared before belongs to the tables as they were.
        for committer in self.committers.values_mut() {
            committer.evolve().await?;
        }
        Ok(unreplaced)
    }

    /// Makes a prepared commit unless it is made; gives it back if files of it are gone.
    async fn replay(
        &mut self,
        plan: &StreamPlan,
        commit: &PreparedCommit,
        generation: u64,
    ) -> Result<Option<Lost>> {
        let Some(committer) = self.committer(plan, commit) else { return Ok(None) };
        let files = files_of(commit);
        crash::point("replay.before");
        let gone = committer.missing_files(&files).await?;
        let done = match gone.into_iter().next() {
            None => committer.commit(commit.epoch, &files, &progress_of(commit, generation)).await?,
            Some(_) if committer.is_done(commit.epoch).await? => Committed::AlreadyDone,
            Some(file) => {
                let (newest, grows) = (committer.epoch(), committer.grows());
                return Ok(Some(Lost { commit: commit.clone(), file, newest, grows }));
            }
        };
        crash::point("replay.after");
        tracing::info!(sink = %commit.sink, epoch = commit.epoch, ?done, "replayed a prepared commit");
        Ok(None)
    }

    /// Replaces the rows of a table by those of its stand-in, the last of which `commit` has; gives the sink back if something of
    /// the stand-in is gone.
    async fn replace(
        &mut self,
        plan: &StreamPlan,
        commit: &PreparedCommit,
        stand_in: &str,
        manifest: &Manifest,
    ) -> Result<Option<NodeId>> {
        let Some((node, sink)) = plan.sinks().find(|(_, sink)| writes(sink, commit)) else { return Ok(None) };
        let SinkKind::Delta(config) = &sink.kind else { return Ok(None) };
        let (app, state_id) = (format!("{}/{}", manifest.pipeline, sink.name), manifest.state_id.to_string());
        let swap = Swap { location: &config.location, stand_in, app: &app, state_id: &state_id };
        if !swap.is_done(commit.epoch).await? {
            let (files, progress) = (files_of(commit), progress_of(commit, manifest.generation));
            let at = DeltaConfig { location: stand_in.to_owned(), ..config.clone() };
            let (mut built, table) = committer(&at, sink, &manifest.pipeline, true).await?;
            let is_last = table.last_epoch >= Some(commit.epoch);
            let is_ready = table.exists && (is_last || built.missing_files(&files).await?.is_empty());
            if is_ready && !is_last {
                built.commit(commit.epoch, &files, &progress).await?;
            }
            let done = if is_ready { swap.swap(commit.epoch, &progress).await? } else { None };
            let Some(done) = done else {
                tracing::warn!(sink = %commit.sink, "the table that was rebuilt is gone or lacks files; it is built once more");
                return Ok(Some(node));
            };
            tracing::warn!(sink = %commit.sink, ?done, "the table has the rows of the rebuild, and no others");
        }
        swap.clean().await;
        let as_it_is = self.rebuilt.contains(&node);
        let (opened, _) = committer(config, sink, &manifest.pipeline, as_it_is).await?;
        self.committers.insert(node, opened);
        Ok(None)
    }

    /// Makes the commits of a manifest that was published at that time (ms).
    ///
    /// # Errors
    /// External: a store failed, another state has taken a table over, or prepared files are gone. Fenced: overtaken.
    pub async fn commit(
        &mut self,
        plan: &StreamPlan,
        (manifest, published): (&Manifest, i64),
        store: &StateStore,
        metrics: &Metrics,
    ) -> Result<()> {
        for commit in &manifest.commits {
            let Some(committer) = self.committer(plan, commit) else { continue };
            let progress = progress_of(commit, manifest.generation);
            crash::point("delta.commit.before");
            if !(0..FRESH_MS).contains(&(Clock.unix_millis() - published)) {
                store.check_fence(manifest.epoch).await?;
                still_there(committer, commit).await?;
            }
            let done = committer.commit(commit.epoch, &files_of(commit), &progress).await?;
            crash::point("delta.commit.after");
            let Committed::Version(version) = done else { continue };
            if let Some((node, sink)) = plan.sinks().find(|(_, sink)| sink.name == commit.sink) {
                let counted = metrics.sink(node);
                // Of a stand-in it is nothing to the table's upkeep.
                if stands_for(sink).is_none() {
                    counted.version.store(version, Ordering::Relaxed);
                }
                counted.committed(Clock.unix_millis());
            }
        }
        Ok(())
    }

    fn committer(&mut self, plan: &StreamPlan, commit: &PreparedCommit) -> Option<&mut DeltaCommitter> {
        let (node, _) = plan.sinks().find(|(_, sink)| writes(sink, commit))?;
        self.committers.get_mut(&node)
    }

    /// Begins the upkeep of the tables in the background; it ends with the pipeline.
    ///
    /// # Errors
    /// External: a location cannot be opened.
    pub fn begin_upkeep(
        &mut self,
        plan: &StreamPlan,
        manifest: &Manifest,
        store: &Arc<StateStore>,
        metrics: &Metrics,
    ) -> Result<()> {
        let known = self.committers.iter().map(|(node, committer)| (*node, committer.version())).collect();
        self.upkeep = Upkeep::begin(plan, manifest, store, metrics, &known)?;
        Ok(())
    }
}

/// Whether the rows of a sink's table are about to be replaced.
fn waits(sink: &SinkPlan, latest: Option<&Manifest>) -> bool {
    let replaced = |commit: &PreparedCommit| commit.replaced_by.is_some() && writes(sink, commit);
    latest.is_some_and(|latest| latest.commits.iter().any(replaced))
}

/// Opens the table of a sink; `as_it_is`: whatever columns it has.
async fn committer(
    config: &DeltaConfig,
    sink: &SinkPlan,
    pipeline: &str,
    as_it_is: bool,
) -> Result<(DeltaCommitter, TableState)> {
    let stored = config.stored_rows(&sink.schema)?;
    match as_it_is {
        true => DeltaCommitter::open_as_it_is(config, &stored, pipeline, &sink.name).await,
        false => DeltaCommitter::open(config, &stored, pipeline, &sink.name).await,
    }
}

fn gone(commit: &PreparedCommit, file: &str) -> Error {
    let (sink, epoch) = (&commit.sink, commit.epoch);
    let message = format!(
        "sink {sink}: the prepared file {file} of epoch {epoch}, of a rebuild, is gone before its commit"
    );
    let hint =
        "Another VACUUM removed it. Give the sink another name and location: it is built anew from history.";
    Error::external(message).hint(hint)
}

/// As [`fits`], of the table as it is; nothing is made.
///
/// # Errors
/// User: those of [`fits`], or the table has other columns. External: the store failed.
pub async fn look(
    plan: &StreamPlan,
    node: NodeId,
    pipeline: &str,
    latest: Option<&Manifest>,
    (state, is_rebuilt): (&str, bool),
) -> Result<()> {
    let NodeKind::Sink(sink) = &plan.nodes[node].kind else { return Ok(()) };
    let SinkKind::Delta(config) = &sink.kind else { return Ok(()) };
    if !exists(&config.location).await? {
        return Ok(());
    }
    let (_, table) = committer(config, sink, pipeline, is_rebuilt || waits(sink, latest)).await?;
    if history::continues(plan, node, latest) && continued(&table) {
        return Ok(());
    }
    fits(&sink.name, &config.location, &table, latest, state)
}

/// Whether the table has rows of this sink: a backup of another pipeline's, which may run, is not taken over.
fn continued(table: &TableState) -> bool {
    table.exists && table.last_epoch.is_some()
}

/// Whether what is about to be committed can be, after a sleep.
///
/// # Errors
/// External: a store failed, or a file is gone and the commit not made.
async fn still_there(committer: &mut DeltaCommitter, commit: &PreparedCommit) -> Result<()> {
    let gone = committer.missing_files(&files_of(commit)).await?;
    let Some(file) = gone.first() else { return Ok(()) };
    if committer.is_done(commit.epoch).await? {
        return Ok(());
    }
    let (sink, epoch) = (&commit.sink, commit.epoch);
    let message = format!("sink {sink}: the prepared file {file} of epoch {epoch} is gone before its commit");
    let hint = "This process slept, or its stores were slow, and another VACUUM removed the file meanwhile. Start the \
                pipeline again: it makes the epoch again.";
    Err(Error::external(message).hint(hint))
}

/// Whether a prepared commit is in its table, or the table is gone.
///
/// # Errors
/// External: the store failed.
pub async fn is_committed(commit: &PreparedCommit, pipeline: &str) -> Result<bool> {
    if !exists(&commit.location).await? {
        return Ok(true);
    }
    let newest = newest_epoch(&commit.location, &format!("{pipeline}/{}", commit.sink)).await?;
    Ok(newest.is_some_and(|newest| newest >= commit.epoch))
}

/// Whether a commit is of this sink, and of the table that it has now.
pub fn writes(sink: &SinkPlan, commit: &PreparedCommit) -> bool {
    sink.name == commit.sink
        && match &sink.kind {
            SinkKind::Delta(config) => config.location == commit.location,
            _ => true,
        }
}

/// Whether the table of a sink may be written on from the state whose newest manifest is `latest`.
///
/// # Errors
/// User: it belongs to another state, or lacks rows that the pipeline read while it did not have the sink.
pub fn fits(
    sink: &str,
    location: &str,
    table: &TableState,
    latest: Option<&Manifest>,
    state: &str,
) -> Result<()> {
    if !table.exists {
        return Ok(());
    }
    let ours = latest.map(|manifest| manifest.state_id.to_string());
    if ours.is_none() || table.state_id != ours {
        let message = format!(
            "sink {sink}: the table {location} already exists and belongs to another state than {state}"
        );
        let hint = "Continue with the state that wrote it (--state, --name), write to another location, or \
                    remove the table: it is built anew from the source's history if that has one.";
        return Err(Error::user(message).hint(hint));
    }
    // A table of ours without a commit was made by a start that came to nothing.
    let known = latest.is_some_and(|manifest| {
        let building = manifest.building.as_ref();
        manifest.fingerprints.contains_key(sink)
            || building.is_some_and(|building| building.fingerprints.contains_key(sink))
    });
    if let Some(epoch) = table.last_epoch.filter(|_| !known) {
        let message = format!(
            "sink {sink}: the table {location} has its rows up to epoch {epoch} and none of those that the pipeline \
             read without it"
        );
        let hint = "Write to another location, or remove the table: it is built anew from the source's history if that \
                    has one.";
        return Err(Error::user(message).hint(hint));
    }
    Ok(())
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
        let (covered, whole) = covered(&progress, &config.location);
        commits.push(PreparedCommit {
            sink: sink.name.clone(),
            location: config.location.clone(),
            epoch: next.epoch,
            files: parts.iter().flat_map(|(_, files, _)| files.iter().cloned()).collect(),
            sources: [(source.to_owned(), covered)].into(),
            complete_until: until.filter(|at| whole && *at != START_OF_TIME),
            replaced_by: None,
        });
    }
    commits
}

/// What a commit covers of the source, and whether that is all. A backup from which the pipeline is built has more than was
/// read of it: its log never goes back, and is silent on watermarks until all is read.
fn covered(progress: &SourceProgress, location: &str) -> (manifest::CommitProgress, bool) {
    let SourceProgress { topics, mut partitions, mut watermark, .. } = progress.clone();
    let own = progress.history.as_ref().filter(|history| history.location == location);
    for end in own.iter().flat_map(|history| &history.until) {
        let same = |p: &&mut PartitionProgress| p.topic == end.topic && p.partition == end.partition;
        if let Some(p) = partitions.iter_mut().find(same).filter(|p| p.next_offset < end.next_offset) {
            (p.next_offset, p.watermark) = (end.next_offset, None);
        }
    }
    if own.is_some() {
        watermark = None;
    }
    (manifest::CommitProgress { topics, partitions, watermark }, own.is_none())
}

/// Whether a sink may go on although its fingerprint changed: nothing above it has state, its table takes other
/// columns, and every column that was there before is computed as before.
pub fn may_grow(plan: &StreamPlan, sink: NodeId, known: &str) -> bool {
    let NodeKind::Sink(SinkPlan { kind: SinkKind::Delta(config), .. }) = &plan.nodes[sink].kind else {
        return false;
    };
    if config.on_schema_change != OnSchemaChange::AddColumns || !stateless(plan, sink) {
        return false;
    }
    if let Some(grew) = plan.columns_came_or_went(sink, known) {
        return grew;
    }
    let now = plan.fingerprint_v1(sink);
    let (before, after): (Vec<_>, Vec<_>) = (known.split(" <- ").collect(), now.split(" <- ").collect());
    before.len() == after.len() && before.iter().zip(after).all(|(before, after)| same_step(before, after))
}

fn stateless(plan: &StreamPlan, node: NodeId) -> bool {
    let node = &plan.nodes[node];
    let kind = matches!(
        node.kind,
        NodeKind::Source(_)
            | NodeKind::Filter { .. }
            | NodeKind::Project { .. }
            | NodeKind::Union
            | NodeKind::Sink(_)
    );
    kind && node.inputs.iter().all(|edge| stateless(plan, edge.from))
}

/// Steps of two fingerprints; of projections only columns that both have.
fn same_step(before: &str, after: &str) -> bool {
    let (before, after) = (without_places(before), without_places(after));
    match (before.split_once("] Project: "), after.split_once("] Project: ")) {
        (Some((port, before)), Some((other, after))) => {
            let after: BTreeMap<&str, &str> = columns(after).collect();
            port == other
                && columns(before).all(|(name, text)| after.get(name).is_none_or(|now| *now == text))
        }
        _ => before == after,
    }
}

/// Places of columns (`amount@2`) move when others are added.
fn without_places(step: &str) -> String {
    let mut parts = step.split('@');
    let mut text = parts.next().unwrap_or_default().to_owned();
    parts.for_each(|part| text.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit())));
    text
}

/// (name, expression) of each column of a projection.
fn columns(projection: &str) -> impl Iterator<Item = (&str, &str)> {
    let (mut depth, mut quoted) = (0i32, false);
    let parts = projection.split(move |c: char| {
        quoted ^= c == '\'';
        depth += i32::from(!quoted && "([{".contains(c)) - i32::from(!quoted && ")]}".contains(c));
        c == ',' && depth == 0 && !quoted
    });
    parts.map(|part| (part.rsplit_once(" AS ").map_or(part, |(_, name)| name).trim(), part.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_may_come_and_go_but_not_change() {
        let step = "[0] Project: id, concat(a@1, ', ') AS b, t";
        assert!(same_step(step, "[0] Project: id, amount, concat(a@2, ', ') AS b, t, x@7 + 1 AS y"));
        assert!(same_step(step, "[0] Project: id, t"));
        assert!(!same_step(step, "[0] Project: id, concat(a@1, '; ') AS b, t"));
        assert!(!same_step("[0] Filter: a@1 > 3", "[0] Filter: a@1 > 4"));
        assert!(same_step("[0] Filter: a@1 > 3", "[0] Filter: a@4 > 3"));
        assert!(!same_step("[0] Source a: kafka topic a", "[0] Source a: kafka topic b"));
    }
}
