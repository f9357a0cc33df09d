//! Sinks that are new to a pipeline are built from history before it goes on (DESIGN §6 *bootstrap*).
//!
//! # Meaning
//! A start finds sinks that the state does not have, with views that only they read. The pipeline has read its source up to
//! some offsets, and decided which rows were late. The new part of the plan is run over exactly these records, from the
//! source's history and from the topic where the history ends earlier, with exactly these decisions ([`Decided`]): its
//! tables, states and online values are then what they would be had it been there from the beginning, and the whole plan
//! goes on from there. Rows that are older than the state, so that no ledger speaks of them, are late if they are below
//! their own partition's watermark, which does not depend on how partitions were read.
//!
//! # How
//! It is a pipeline of its own in the chain of manifests of the other: its offsets, watermarks and operators are in
//! [`Building`], its state files, commits and dead letters among the others. What the other one has stays as it is, and
//! waits; what it serves stays served. A kill, a stop or other parallelism is what it is to any pipeline. The last manifest
//! of the part has the new nodes among the others' and no [`Building`]; the next start knows them all.
//!
//! An operator that the state has and a new sink reads too runs a second time, under another id, and is dropped at the
//! end: the other one's is where the pipeline is.
//!
//! Accounts of the new nodes begin when the pipeline goes on. Dead letters of new views are kept and counted; those of the
//! source and of views that the state has are known. Tables of dead letters do not get them. Records that were replayed
//! into the backup are not read: the pipeline never saw them.
//!
//! # What it does not do
//! A pipeline that began later than its history (`scan_startup` beside an older backup), or has operators that began later,
//! goes on with these as they are: what they count began when they did, and new sinks that read them too have a past of
//! their own. While a part is built the topic must keep what the pipeline reads next. The first epoch after it cannot be
//! made again (`remake`).

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::plan::{NodeId, NodeKind, SinkPlan, StreamPlan};
use crate::runtime::RunOptions;
use crate::runtime::again::{Decided, late};
use crate::runtime::history;
use crate::runtime::lookups;
use crate::runtime::staged;
use crate::runtime::start::{Beginning, Online, World};
use crate::state::manifest::{Building, Manifest};
use crate::stream::{Micros, Place, Positions};

/// What an id ends with that is dropped at the end.
const TWICE: char = '~';

/// The pipeline that waits: what manifests say of it meanwhile.
pub struct Base(Manifest);

/// Whether a node of a part runs for the second time.
pub fn is_twice(id: &str) -> bool {
    id.ends_with(TWICE)
}

/// What is run first.
pub struct Build {
    pub part: StreamPlan,
    pub world: World,
    pub base: Base,
}

/// The part of the plan that is to be built, taken out of `world`; `None`: the plan can go on as it is, and nothing in `world`
/// is left of a part that was begun.
///
/// # Errors
/// External: a gap between history and topic, something that cannot be reached or read. User: a table has rows of a part
/// that was begun with other SQL.
pub async fn begin(plan: &StreamPlan, world: &mut World, options: &RunOptions) -> Result<Option<Build>> {
    if world.new.is_empty() && world.manifest.building.is_none() {
        return Ok(None);
    }
    let begun = world.manifest.clone();
    world.manifest = base_of(&begun);
    let left = begun.files.iter().filter(|file| begun.builds(&file.node)).map(|file| file.path.clone());
    let left: Vec<String> = left.collect();
    let manifest = &begun;
    let Some((_, source)) = plan.source() else { return Ok(None) };
    let read = manifest.sources.get(&source.name).cloned().unwrap_or_default();
    let has_read = !manifest.closed && !read.partitions.is_empty();
    let builds = |node: &NodeId| has_read && history::builds(plan, *node);
    let (new, without): (Vec<NodeId>, Vec<NodeId>) = world.new.iter().copied().partition(builds);
    let part = part_of(plan, &new, manifest);
    let inner = inner_of(manifest, &part);
    let is_anew = inner.sources.is_empty();
    if is_anew {
        world.orphans.extend(left);
        nothing_written(plan, world)?;
    }
    say(plan, &without);
    if new.is_empty() {
        return Ok(None);
    }
    let ends = read.positions(0);
    let seen = world.source.partitions().await?;
    let beginning =
        history::beginning(&part, Some(&inner), world.source.as_ref(), &seen, options.allow_gap).await?;
    let Beginning { partitions, positions, bootstrap } = beginning;
    if bootstrap.is_none() && is_anew {
        // The backup is missing or empty.
        say(plan, &new);
        return Ok(None);
    }
    if is_anew {
        staged::forget(&part, manifest.generation).await?;
    }
    let names: Vec<&str> = new.iter().map(|node| plan.nodes[*node].id.as_str()).collect();
    tracing::warn!(
        "new to the pipeline: {}; built from history up to the offsets that it has reached, then all go on",
        names.join(", ")
    );
    let decided = decided(world, manifest, source.name.as_str(), read.watermark).await?;
    let (lookups, digests) = lookups::open(&part).await?;
    let known = |place: &Place| partitions.iter().any(|p| Place::new(0, p.topic, p.partition) == *place);
    let ends: Positions = ends.iter().filter(|(place, _)| known(place)).collect();
    let part_world = World {
        store: Arc::clone(&world.store),
        claimed: world.claimed,
        orphans: std::mem::take(&mut world.orphans),
        source: Arc::clone(&world.source),
        embedded: world.embedded.clone(),
        positions: positions.iter().filter(|(place, _)| ends.get(*place).is_some()).collect(),
        history: bootstrap.map(|mut history| {
            history.limit(&ends);
            history
        }),
        online: online_of(plan, &part, world),
        tables: world.tables.part(plan, &part),
        lookups: Arc::new(lookups),
        digests,
        decided: Some(Arc::new(decided)),
        new: Vec::new(),
        ends,
        manifest: inner,
    };
    let base = Base(world.manifest.clone());
    Ok(Some(Build { part, world: part_world, base }))
}

/// The online stores of a part of the plan.
fn online_of(plan: &StreamPlan, part: &StreamPlan, world: &World) -> BTreeMap<NodeId, Online> {
    let own = |(node, sink): (NodeId, &SinkPlan)| {
        let (whole, _) = plan.sinks().find(|(_, other)| other.name == sink.name)?;
        Some((node, world.online.get(&whole)?.clone()))
    };
    part.sinks().filter_map(own).collect()
}

/// What the pipeline decided about what it has read of a source.
async fn decided(
    world: &World,
    manifest: &Manifest,
    source: &str,
    watermark: Option<Micros>,
) -> Result<Decided> {
    let topics = world.source.topics();
    let segments = manifest.ledger.iter().filter(|segment| segment.source == source);
    let decided = late(&world.store, segments.map(|segment| segment.path.as_str()), &topics).await?;
    let replayed = world.store.replayed().await?;
    let never = late(&world.store, replayed.iter().map(String::as_str), &topics).await?;
    Ok(Decided { late: decided, never, watermark, moves: true })
}

/// Tables of new sinks are empty, as they cannot be written on.
fn nothing_written(plan: &StreamPlan, world: &World) -> Result<()> {
    let Some(node) = world.new.iter().find(|node| world.tables.is_written(**node)) else { return Ok(()) };
    let sink = &plan.nodes[*node].id;
    let message = format!("sink {sink}: its table has rows of a build that was begun with other SQL");
    let hint = "Change the SQL back, remove the table, or give the sink another location: it is built from the beginning \
                then.";
    Err(Error::user(message).hint(hint))
}

/// Sinks that begin where the pipeline is.
fn say(plan: &StreamPlan, sinks: &[NodeId]) {
    for node in sinks {
        tracing::warn!(
            "sink {} is new: it begins at the offsets that the pipeline has reached, without earlier rows",
            plan.nodes[*node].id
        );
    }
}

/// What the new sinks need; what the state has too gets ids of its own.
fn part_of(plan: &StreamPlan, new: &[NodeId], manifest: &Manifest) -> StreamPlan {
    let mut part = plan.only(new);
    for node in &mut part.nodes {
        let has_own = matches!(node.kind, NodeKind::Source(_) | NodeKind::Sink(_));
        if !has_own && manifest.nodes.contains_key(&node.id) {
            node.id.push(TWICE);
        }
    }
    part
}

/// The manifest as the part sees it: from the beginning, or where an earlier start had come to with the same SQL.
fn inner_of(manifest: &Manifest, part: &StreamPlan) -> Manifest {
    let meant: BTreeMap<String, String> =
        part.stateful().map(|id| (part.nodes[id].id.clone(), part.fingerprint(id))).collect();
    let known = manifest.building.clone().filter(|building| building.fingerprints == meant);
    let files = manifest.files.iter().filter(|file| known.is_some() && manifest.builds(&file.node));
    let files = files.cloned().collect();
    let Building { sources, nodes, fingerprints } = known.unwrap_or_default();
    Manifest { sources, nodes, fingerprints, files, building: None, ..manifest.clone() }
}

/// The manifest without what is built.
fn base_of(manifest: &Manifest) -> Manifest {
    let files = manifest.files.iter().filter(|file| !manifest.builds(&file.node)).cloned().collect();
    Manifest { files, building: None, ..manifest.clone() }
}

impl Base {
    /// What is published in the place of the part's manifest `next`; `done`: the part has come to the end.
    pub fn with(&self, next: &Manifest, done: bool) -> Manifest {
        let base = &self.0;
        let mut whole = Manifest {
            sources: base.sources.clone(),
            nodes: base.nodes.clone(),
            fingerprints: base.fingerprints.clone(),
            closed: false,
            stopped: next.stopped && !done,
            files: base.files.iter().chain(&next.files).cloned().collect(),
            ..next.clone()
        };
        whole.lookups.extend(base.lookups.clone());
        if !done {
            whole.building = Some(Building {
                sources: next.sources.clone(),
                nodes: next.nodes.clone(),
                fingerprints: next.fingerprints.clone(),
            });
            return whole;
        }
        let stays = |id: &str| !is_twice(id);
        for (id, meaning) in next.fingerprints.iter().filter(|(id, _)| stays(id.as_str())) {
            whole.fingerprints.insert(id.clone(), meaning.clone());
            if let Some(progress) = next.nodes.get(id) {
                let mut progress = progress.clone();
                progress.accounts = None;
                whole.nodes.insert(id.clone(), progress);
            }
        }
        let (files, dropped): (Vec<_>, Vec<_>) = whole.files.into_iter().partition(|file| stays(&file.node));
        whole.files = files;
        whole.garbage.extend(dropped.into_iter().map(|file| file.path));
        whole
    }
}
