//! Prepared files that are gone (a foreign VACUUM) are made again (DESIGN §5 *Delta commit*).
//!
//! What epoch N gives a table is a function of the state at the data manifest before it, of the records up to N's offsets,
//! and of what N decided about them: which were late (its ledger), and its watermark. All of that is kept until N's
//! commits are acknowledged. So the epoch runs again, from where a start would begin ([`history`]: in the backup, if N read
//! it or the topic has lost N's records meanwhile), for the sinks that lack it and for nothing else, and their new
//! files take the place of the lost ones under the same epoch. The state that this run writes is deleted: N's is there.
//!
//! Nothing is decided anew. A row is late if the ledger says so; the watermark stands still until the last record and
//! is N's then. Rows, late rows and dead letters must be as many as N's accounts say, and an appended table must get as
//! many rows as before: else the source no longer gives what it gave, or a look-up table changed, and the start stops.
//!
//! The dead letters of N are in the state. A table of dead letters is made again from there, by its own chain and sink.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use tokio::sync::watch;

use crate::connectors::delta::Mode;
use crate::connectors::{PartitionInfo, SourceConnector};
use crate::error::{Error, Result};
use crate::plan::{NodeId, NodeKind, SinkKind, SinkPlan, StreamPlan};
use crate::runtime::again::{Decided, late};
use crate::runtime::changes::Unlike;
use crate::runtime::graph::{Tasks, spawn};
use crate::runtime::lookups::Digests;
use crate::runtime::metrics::Metrics;
use crate::runtime::report::{Command, Report, SourceEpoch};
use crate::runtime::start::World;
use crate::runtime::tables::Tables;
use crate::runtime::{RunOptions, history, letters, lookups};
use crate::state::manifest::{Accounts, Manifest, PreparedCommit, PreparedFile};
use crate::state::store::StateStore;
use crate::stream::{Barrier, Positions};

/// A prepared commit that is not in its table, and whose files are not all there.
#[derive(Debug, Clone)]
pub struct Lost {
    pub commit: PreparedCommit,
    /// One of the files that are gone.
    pub file: String,
    /// The newest epoch of the sink in the table.
    pub newest: Option<u64>,
    /// The table is about to get columns that it did not have when the commit was prepared.
    pub grows: bool,
}

/// What a start has when it finds a commit lost.
pub struct Past<'a> {
    pub store: &'a Arc<StateStore>,
    /// The claim.
    pub manifest: &'a Manifest,
    pub source: &'a Arc<dyn SourceConnector>,
    pub partitions: &'a [PartitionInfo],
    pub options: &'a RunOptions,
}

/// Whether a lost commit can be made again, or why not. `before`: the data manifest before its own.
fn possible(
    lost: &Lost,
    before: Option<&Manifest>,
    (letters, building): (bool, bool),
) -> Result<(), &'static str> {
    if before.is_none() && !letters {
        return Err("it is the first epoch, so there is no state before it");
    }
    if building {
        return Err("it is of a table that was being built from history");
    }
    if lost.grows {
        return Err("the table gets other columns with this start");
    }
    let known = before.is_some_and(|before| before.fingerprints.contains_key(&lost.commit.sink));
    let follows = match lost.newest {
        Some(newest) => before.is_some_and(|before| Some(newest) == before.data_epoch),
        // The sink was new, so it is its first epoch.
        None => !known,
    };
    if follows { Ok(()) } else { Err("the table lacks earlier epochs too") }
}

/// Makes the files of lost commits again; gives the commits with the new files.
///
/// # Errors
/// External: it is not possible, the source does not give the same records any more, or a store failed. Fenced:
/// overtaken.
pub async fn remake(plan: &StreamPlan, past: &Past<'_>, lost: &[Lost]) -> Result<Vec<PreparedCommit>> {
    let before = match past.manifest.previous_data_epoch {
        Some(epoch) => past.store.read(epoch).await?,
        None => None,
    };
    let Some(epoch) = past.manifest.data_epoch else { return Ok(Vec::new()) };
    let building = before.iter().chain([past.manifest]).any(|manifest| manifest.building.is_some());
    let (mut of_rows, mut of_letters) = (Vec::new(), Vec::new());
    for lost in lost {
        let Some((node, _)) = plan.sinks().find(|(_, sink)| sink.name == lost.commit.sink) else { continue };
        let letters = plan.reads_letters(node);
        possible(lost, before.as_ref(), (letters, building)).map_err(|why| gone(lost, why))?;
        let (sink, epoch) = (&lost.commit.sink, lost.commit.epoch);
        tracing::warn!(%sink, epoch, file = %lost.file, "a prepared file is gone; the epoch is made again");
        if letters { &mut of_letters } else { &mut of_rows }.push(node);
    }
    let doing = |error: Error| error.context("making a lost epoch again");
    let mut prepared = Vec::new();
    if let Some(before) = before.filter(|_| !of_rows.is_empty()) {
        let part = Arc::new(plan.only(&of_rows));
        let made = run(Arc::clone(&part), past, &before, epoch).await.map_err(doing)?;
        past.store.delete_files(&made.state).await?;
        prepared.extend(made.by_sink(&part));
    }
    if !of_letters.is_empty() {
        let part = Arc::new(plan.only(&of_letters));
        let own = refuse_letters(plan);
        let made = run_letters(Arc::clone(&part), &own, past, epoch).await.map_err(doing)?;
        prepared.extend(made.by_sink(&part));
    }
    let mut commits = Vec::new();
    for lost in lost {
        let Some((_, sink)) = plan.sinks().find(|(_, sink)| sink.name == lost.commit.sink) else { continue };
        let parts = prepared.iter().filter(|(of, _)| *of == sink.name);
        let files: Vec<PreparedFile> = parts.flat_map(|(_, files)| files.iter().cloned()).collect();
        same_rows(sink, &lost.commit.files, &files).map_err(|why| gone(lost, &why))?;
        commits.push(PreparedCommit { files, ..lost.commit.clone() });
    }
    // Whoever overtook us has made them too; the tables know which came first, but there is no need to try.
    past.store.check_fence(past.manifest.epoch).await?;
    Ok(commits)
}

/// How many rows changes come in depends on how the input is cut; rows that are only added are what they are.
fn same_rows(sink: &SinkPlan, lost: &[PreparedFile], made: &[PreparedFile]) -> Result<(), String> {
    let rows = |files: &[PreparedFile]| files.iter().map(|file| file.rows).sum::<u64>();
    let appends = matches!(&sink.kind, SinkKind::Delta(config) if config.mode == Mode::Append);
    match (rows(lost), rows(made)) {
        (before, now) if appends && before != now => Err(format!("it had {before} rows, and has {now} now")),
        _ => Ok(()),
    }
}

fn gone(lost: &Lost, why: &str) -> Error {
    let (sink, file, epoch) = (&lost.commit.sink, &lost.file, lost.commit.epoch);
    let message = format!(
        "sink {sink}: the prepared file {file} is gone, and epoch {epoch} cannot be made again: {why}"
    );
    let hint = "Another VACUUM removed files of an unfinished commit (see that its retention is longer than a pipeline \
                stands still). Bring the file back from a copy of the store, or start the pipeline under another --name \
                with other locations; rebuilding the table comes with a later version.";
    Error::external(message).hint(hint)
}

/// What the epoch gave this time.
#[derive(Default)]
struct Made {
    prepared: Vec<(NodeId, Vec<PreparedFile>)>,
    /// State files that nothing refers to.
    state: Vec<String>,
}

impl Made {
    /// The name of a sink, and what one shard of it prepared.
    fn by_sink(self, part: &StreamPlan) -> impl Iterator<Item = (String, Vec<PreparedFile>)> {
        let name = |node: NodeId| part.sinks().find(|(of, _)| *of == node).map(|(_, sink)| sink.name.clone());
        self.prepared.into_iter().filter_map(move |(node, files)| Some((name(node)?, files)))
    }
}

/// A world in which nothing is read and nothing is looked up.
fn world(past: &Past<'_>, manifest: &Manifest, epoch: u64) -> World {
    let generation = past.manifest.generation;
    World {
        store: Arc::clone(past.store),
        manifest: Manifest { epoch: epoch - 1, generation, ..manifest.clone() },
        claimed: past.manifest.epoch,
        orphans: Vec::new(),
        source: Arc::clone(past.source),
        embedded: None,
        positions: Positions::default(),
        history: None,
        ends: Positions::default(),
        tables: Tables::none(),
        online: BTreeMap::new(),
        lookups: Arc::default(),
        digests: Digests::default(),
        decided: None,
        unlike: Unlike::default(),
        served: Vec::new(),
    }
}

/// Runs one epoch from the state of `before` up to the offsets of the claim.
async fn run(part: Arc<StreamPlan>, past: &Past<'_>, before: &Manifest, epoch: u64) -> Result<Made> {
    let name = part.source().map(|(_, source)| source.name.clone()).unwrap_or_default();
    let progress = |manifest: &Manifest| manifest.sources.get(&name).cloned().unwrap_or_default();
    let (from, to) = (progress(before), progress(past.manifest));
    let ends = to.positions(0);
    let (lookups, digests) = lookups::open(&part).await?;
    if let Some(table) = lookups::changed(&past.manifest.lookups, &digests).first() {
        let message = format!("look-up table {table} has other rows than in the epoch");
        let hint = "Bring its rows of then back for one start, or the lost file from a copy of the store.";
        return Err(Error::external(message).hint(hint));
    }
    let segments = past.manifest.ledger.iter().filter(|s| s.epoch == epoch && s.source == name);
    let segments = segments.map(|segment| segment.path.as_str());
    let late = late(past.store, segments, &past.source.topics()).await?;
    let decided = Decided { late, watermark: to.watermark, ..Decided::default() };
    let begun = history::beginning(&part, Some(before), past.source.as_ref(), past.partitions, false).await?;
    let world = World {
        positions: within(&begun.positions, &ends),
        history: begun.bootstrap,
        ends,
        lookups: Arc::new(lookups),
        digests,
        decided: Some(Arc::new(decided)),
        ..world(past, before, epoch)
    };
    let metrics = Metrics::of(&part);
    // Nobody waits for a manifest: there is no online sink.
    let (_durable, published) = watch::channel(0);
    let tasks = spawn(part, &world, past.options, metrics, published).await?;
    let (sources, made) = gather(tasks, epoch).await?;
    let mut read = Accounts::default();
    sources.iter().for_each(|source| read.add(&source.accounts));
    same_records(&read, &from.accounts, &to.accounts, world.history.is_some())?;
    Ok(made)
}

/// Partitions that were added after the epoch are not read. One that was added in it begins at its beginning.
fn within(positions: &Positions, ends: &Positions) -> Positions {
    positions.iter().filter(|(place, _)| ends.get(*place).is_some()).collect()
}

/// Writes the letters of an epoch again.
async fn run_letters(
    part: Arc<StreamPlan>,
    own: &HashSet<&str>,
    past: &Past<'_>,
    epoch: u64,
) -> Result<Made> {
    let mut letters = Vec::new();
    for segment in past.manifest.dead_letters.iter().filter(|segment| segment.epoch == epoch) {
        let bytes = past.store.get_file(&segment.path).await?;
        let read = letters::read(bytes, own, &past.source.topics());
        letters.extend(read.map_err(|error| error.context(&segment.path))?);
    }
    let (_durable, published) = watch::channel(0);
    let metrics = Metrics::of(&part);
    let world = world(past, past.manifest, epoch);
    let mut tasks = spawn(part, &world, past.options, metrics, published).await?;
    if let Some(mut stage) = tasks.letters.take() {
        // A sink that is gone says itself why. What they refuse is in the state since then.
        stage.pass(letters, Barrier { epoch, last: true }).await?;
    }
    Ok(gather(tasks, epoch).await?.1)
}

/// The names by which sinks of letters and their views refuse letters.
fn refuse_letters(plan: &StreamPlan) -> HashSet<&str> {
    let nodes = plan.nodes.iter().enumerate().filter(|(id, _)| plan.reads_letters(*id));
    nodes.filter_map(|(_, node)| refuses(&node.kind)).collect()
}

fn refuses(kind: &NodeKind) -> Option<&str> {
    match kind {
        NodeKind::Sink(sink) => Some(&sink.name),
        _ => kind.view(),
    }
}

/// `read`: in the epoch as it was made again. Tombstones and skipped records leave no row, so none is missed; dead letters
/// leave none either, and are not in a backup.
fn same_records(read: &Accounts, from: &Accounts, to: &Accounts, backup: bool) -> Result<()> {
    let mut expected = vec![
        ("rows", read.accepted, to.accepted.saturating_sub(from.accepted)),
        ("late rows", read.late, to.late.saturating_sub(from.late)),
        ("dead letters", read.dead_letters, to.dead_letters.saturating_sub(from.dead_letters)),
    ];
    expected.truncate(if backup { 2 } else { 3 });
    match expected.into_iter().find(|(_, now, before)| now != before) {
        None => Ok(()),
        Some((what, now, before)) => {
            let message = format!("the source had {before} {what} in the epoch, and has {now} now");
            let hint = "Its records were removed or replaced meanwhile, as by the topic's retention. Bring the lost file \
                        back from a copy of the store, or start the pipeline under another --name with other locations.";
            Err(Error::external(message).hint(hint))
        }
    }
}

/// Waits for the end of every shard, cuts, and takes what each task has.
async fn gather(mut tasks: Tasks, epoch: u64) -> Result<(Vec<SourceEpoch>, Made)> {
    let unexpected = || Error::internal("a task reported an epoch that is not open");
    let mut left = tasks.commands.len();
    while left > 0 {
        match tasks.reports.recv().await {
            Some(Report::AtEnd { .. }) => left -= 1,
            Some(Report::Failed(error)) => return Err(error),
            Some(_) => return Err(unexpected()),
            None => return Err(Error::internal("all tasks are gone")),
        }
    }
    for command in &tasks.commands {
        let barrier = Barrier { epoch, last: true };
        // One that is gone says why.
        command.send(Command::Cut { barrier, close: false }).await.ok();
    }
    let (mut sources, mut made, mut parts) = (Vec::new(), Made::default(), 0);
    let expected: usize = tasks.shards.values().sum();
    while sources.len() < tasks.commands.len() || parts < expected {
        match tasks.reports.recv().await {
            Some(Report::Source(part)) => sources.push(part),
            Some(Report::State { part, .. }) => {
                parts += 1;
                made.state.extend(part.files.into_iter().map(|file| file.path));
            }
            Some(Report::Prepared { node, files, .. }) => {
                parts += 1;
                made.prepared.push((node, files));
            }
            Some(Report::AtEnd { .. } | Report::Held) => {}
            Some(Report::Failed(error)) => return Err(error),
            None => return Err(Error::internal("all tasks are gone")),
        }
    }
    Ok((sources, made))
}

#[cfg(test)]
#[path = "remake_tests.rs"]
mod tests;
