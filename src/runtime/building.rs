//! Sinks that are new to a pipeline, or rebuilt, are built from history before it goes on (DESIGN §6 *bootstrap*).
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
//! # Rebuilt in its place
//! A sink that the state has with another meaning (`--rebuild`) is built in the same way, beside what it replaces:
//! - A table's rows go to a *stand-in* in the table's folder ([`swap`](crate::connectors::delta::swap)). The last manifest of
//!   the part has the replacement among its commits, which the next start makes as it makes any prepared commit.
//! - An online store keeps what it serves: the part writes nothing to it. What it served before is deleted in the state from
//!   which the part begins, so that keys which the new SQL does not have go, and the others change from the old row to the
//!   new one at once, when the pipeline goes on.
//! - The part's nodes have ids of their own until the last manifest gives them those of the nodes that they replace.
//!
//! Until that manifest the SQL can be changed back, and the pipeline goes on as if nothing had been.
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

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::plan::{Node, NodeId, NodeKind, SinkKind, SinkPlan, StreamPlan};
use crate::runtime::RunOptions;
use crate::runtime::again::{Decided, late};
use crate::runtime::changes::Unlike;
use crate::runtime::history;
use crate::runtime::lookups;
use crate::runtime::staged;
use crate::runtime::start::{Beginning, Online, World};
use crate::runtime::tables;
use crate::state::manifest::{Building, Manifest, StateFile};
use crate::stream::{Micros, Place, Positions};

/// What an id ends with that is dropped at the end.
const TWICE: char = '~';
/// What an id ends with that takes the place of the one without.
const INSTEAD: char = '^';

/// The pipeline that waits: what manifests say of it meanwhile.
pub struct Base {
    manifest: Manifest,
    /// Of rebuilt sinks, by location of the stand-in: sink and location.
    stand_ins: BTreeMap<String, (String, String)>,
    /// The epoch behind which the part began.
    since: u64,
    /// Views and sinks that are rebuilt, by the names that their dead letters have.
    rebuilt: BTreeSet<String>,
}

/// The id, while it is built, of what takes a node's place.
pub fn instead_of(plan: &StreamPlan, node: NodeId) -> String {
    format!("{}{INSTEAD}", plan.nodes[node].id)
}

/// Whether a node of a part runs for the second time.
pub fn is_twice(id: &str) -> bool {
    id.ends_with(TWICE)
}

/// Whether a node of a part takes the place of another one at the end.
pub fn is_instead(id: &str) -> bool {
    id.ends_with(INSTEAD)
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
/// that was begun with other SQL, or a sink is to be rebuilt and its history is empty.
pub async fn begin(plan: &StreamPlan, world: &mut World, options: &RunOptions) -> Result<Option<Build>> {
    if world.unlike.new.is_empty() && world.unlike.rebuilt.is_empty() && world.manifest.building.is_none() {
        return Ok(None);
    }
    let manifest = world.manifest.clone();
    world.manifest = base_of(&manifest);
    let Some((_, source)) = plan.source() else { return Ok(None) };
    let read = manifest.sources.get(&source.name).cloned().unwrap_or_default();
    let has_read = !manifest.closed && !read.partitions.is_empty();
    let builds = |node: &NodeId| has_read && history::builds(plan, *node);
    let wanted = world.unlike.new.iter().chain(&world.unlike.rebuilt).copied();
    let (wanted, without): (Vec<NodeId>, Vec<NodeId>) = wanted.partition(builds);
    if let Some(node) = world.unlike.rebuilt.iter().find(|node| without.contains(node)) {
        return Err(no_history(&plan.nodes[*node].id, "the pipeline has read nothing yet"));
    }
    let mut part = part_of(plan, &wanted, &world.unlike.rebuilt, &manifest);
    let inner = resumed(&manifest, &part).await?;
    let is_anew = inner.sources.is_empty();
    if is_anew {
        let left = manifest.files.iter().filter(|file| manifest.builds(&file.node));
        world.orphans.extend(left.map(|file| file.path.clone()));
        nothing_written(plan, world)?;
        if let Some(building) = &manifest.building {
            world.store.check_fence(world.claimed).await?;
            tables::forget(&building.stand_ins).await?;
        }
    }
    say(plan, &without);
    if wanted.is_empty() {
        return Ok(None);
    }
    let seen = world.source.partitions().await?;
    let beginning =
        history::beginning(&part, Some(&inner), world.source.as_ref(), &seen, options.allow_gap).await?;
    if beginning.bootstrap.is_none() && is_anew {
        // The backup is missing or empty.
        if let Some(node) = world.unlike.rebuilt.first() {
            return Err(no_history(&plan.nodes[*node].id, "the history of its source is missing or empty"));
        }
        say(plan, &wanted);
        return Ok(None);
    }
    if is_anew {
        nothing_ahead(plan, world, &read.positions(0))?;
        staged::forget(&part, manifest.generation).await?;
    }
    say_begins(plan, world);
    let rebuilt: BTreeSet<String> =
        world.unlike.rebuilt.iter().map(|node| plan.nodes[*node].id.clone()).collect();
    let known = inner.building.as_ref().map(|building| building.stand_ins.clone()).unwrap_or_default();
    let locations = tables::stand_in(&mut part, &rebuilt, &known, manifest.generation);
    let since = inner.building.as_ref().map_or(world.claimed, |building| building.since);
    let (rebuilt, stand_ins) = (names_of(plan, world, &wanted), targets(&part, locations));
    let base = Base { manifest: world.manifest.clone(), stand_ins, since, rebuilt };
    let inner = Manifest { building: None, ..inner };
    let world = part_world(plan, &part, world, (inner, &manifest), beginning).await?;
    Ok(Some(Build { part, world, base }))
}

/// The world of a part that begins, or goes on, with `inner`.
async fn part_world(
    plan: &StreamPlan,
    part: &StreamPlan,
    world: &mut World,
    (inner, manifest): (Manifest, &Manifest),
    beginning: Beginning,
) -> Result<World> {
    let Beginning { partitions, positions, bootstrap } = beginning;
    let name = plan.source().map(|(_, source)| source.name.as_str()).unwrap_or_default();
    let read = manifest.sources.get(name).cloned().unwrap_or_default();
    let decided = decided(world, manifest, name, read.watermark).await?;
    let (lookups, digests) = lookups::open(part).await?;
    let known = |place: &Place| partitions.iter().any(|p| Place::new(0, p.topic, p.partition) == *place);
    let ends: Positions = read.positions(0).iter().filter(|(place, _)| known(place)).collect();
    let served = if inner.sources.is_empty() { served(part, &world.manifest) } else { Vec::new() };
    Ok(World {
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
        online: online_of(plan, part, world),
        tables: world.tables.part(plan, part, manifest).await?,
        lookups: Arc::new(lookups),
        digests,
        decided: Some(Arc::new(decided)),
        unlike: Unlike::default(),
        served,
        ends,
        manifest: inner,
    })
}

/// The newest rows that online sinks hold in the state which others of the part replace, under the ids of these.
fn served(part: &StreamPlan, base: &Manifest) -> Vec<StateFile> {
    let of = |node: &Node| Some((node.id.clone(), node.id.strip_suffix(INSTEAD)?.to_owned()));
    let online = |node: &&Node| matches!(&node.kind, NodeKind::Sink(sink) if matches!(sink.kind, SinkKind::Online { .. }));
    let replaced: Vec<(String, String)> = part.nodes.iter().filter(online).filter_map(of).collect();
    let files = replaced.iter().flat_map(|(id, old)| {
        let files = base.files.iter().filter(|file| file.node == *old && file.kind == "newest");
        files.map(|file| StateFile { node: id.clone(), ..file.clone() })
    });
    files.collect()
}

/// By location of the stand-in: sink and location of what it stands for.
fn targets(part: &StreamPlan, locations: BTreeMap<String, String>) -> BTreeMap<String, (String, String)> {
    let of = |(sink, at): (String, String)| {
        let (_, found) = part.sinks().find(|(_, other)| other.name == sink)?;
        Some((at, (sink, tables::stands_for(found)?)))
    };
    locations.into_iter().filter_map(of).collect()
}

fn no_history(sink: &str, why: &str) -> Error {
    let hint = "Change the SQL back, or give the sink another name and location.";
    Error::user(format!("sink {sink} cannot be rebuilt in its place: {why}")).hint(hint)
}

fn say_begins(plan: &StreamPlan, world: &World) {
    let names = |nodes: &[NodeId]| -> String {
        nodes.iter().map(|node| plan.nodes[*node].id.as_str()).collect::<Vec<_>>().join(", ")
    };
    if !world.unlike.new.is_empty() {
        tracing::warn!(
            "new to the pipeline: {}; built from history up to the offsets that it has reached, then all go on",
            names(&world.unlike.new)
        );
    }
    if !world.unlike.rebuilt.is_empty() {
        tracing::warn!(
            "changed: {}; rebuilt from history up to the offsets that the pipeline has reached, then in place of what is \
             there, which stays until then",
            names(&world.unlike.rebuilt)
        );
    }
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
    let Some(node) = world.unlike.new.iter().find(|node| world.tables.is_written(**node)) else {
        return Ok(());
    };
    let sink = &plan.nodes[*node].id;
    let message = format!("sink {sink}: its table has rows of a build that was begun with other SQL");
    let hint = "Change the SQL back, remove the table, or give the sink another location: it is built from the beginning \
                then.";
    Err(Error::user(message).hint(hint))
}

/// Stores of rebuilt sinks have no rows that the state does not know: nobody could take them back.
fn nothing_ahead(plan: &StreamPlan, world: &World, read: &Positions) -> Result<()> {
    for node in &world.unlike.rebuilt {
        let hold = world.online.get(node).map(|online| &online.hold);
        let ahead = hold
            .is_some_and(|hold| hold.iter().any(|(place, at)| read.get(place).is_none_or(|read| at > read)));
        if ahead {
            let message = format!(
                "sink {} cannot be rebuilt yet: what it serves is ahead of the newest checkpoint, as the process before did not end as it should",
                plan.nodes[*node].id
            );
            let hint = "Start once with the SQL as it was before and stop it (Ctrl-C), then rebuild; or give the sink another \
                        prefix.";
            return Err(Error::user(message).hint(hint));
        }
    }
    Ok(())
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
fn part_of(plan: &StreamPlan, wanted: &[NodeId], rebuilt: &[NodeId], manifest: &Manifest) -> StreamPlan {
    let mut part = plan.only(wanted);
    let ids = |plan: StreamPlan| plan.nodes.into_iter().map(|node| node.id).collect::<BTreeSet<String>>();
    let (kept, rebuilding) = (ids(kept_of(plan, wanted)), ids(plan.only(rebuilt)));
    let is_other = |id: NodeId| {
        let node = &part.nodes[id];
        match &node.kind {
            NodeKind::Sink(_) => rebuilt.iter().any(|sink| plan.nodes[*sink].id == node.id),
            NodeKind::Source(_) => false,
            _ => match manifest.fingerprints.get(&node.id) {
                Some(known) => !part.means(id, known),
                // Without state it means what it now is, unless a sink that stays reads it too.
                None => {
                    let is_known = manifest.nodes.contains_key(&node.id);
                    is_known && rebuilding.contains(&node.id) && !kept.contains(&node.id)
                }
            },
        }
    };
    let others: Vec<bool> = (0..part.nodes.len()).map(is_other).collect();
    for (node, is_other) in part.nodes.iter_mut().zip(others) {
        let has_own = matches!(node.kind, NodeKind::Source(_) | NodeKind::Sink(_));
        if is_other {
            node.id.push(INSTEAD);
        } else if !has_own && manifest.nodes.contains_key(&node.id) {
            node.id.push(TWICE);
        }
    }
    part
}

/// What the sinks read that stay as they are.
fn kept_of(plan: &StreamPlan, wanted: &[NodeId]) -> StreamPlan {
    let stay: Vec<NodeId> =
        plan.sinks().map(|(node, _)| node).filter(|node| !wanted.contains(node)).collect();
    plan.only(&stay)
}

/// The rebuilt sinks, and the views that they read and no sink that stays does: as dead letters name them.
fn names_of(plan: &StreamPlan, world: &World, wanted: &[NodeId]) -> BTreeSet<String> {
    let name = |node: Node| match node.kind {
        NodeKind::Sink(sink) => Some(sink.name),
        kind => kind.view().map(str::to_owned),
    };
    let names = |plan: StreamPlan| plan.nodes.into_iter().filter_map(name).collect::<BTreeSet<String>>();
    let kept = names(kept_of(plan, wanted));
    names(plan.only(&world.unlike.rebuilt)).into_iter().filter(|name| !kept.contains(name)).collect()
}

/// The manifest as the part sees it: from the beginning, or where an earlier start had come to with the same SQL.
async fn resumed(manifest: &Manifest, part: &StreamPlan) -> Result<Manifest> {
    let meant: BTreeMap<String, String> =
        part.stateful().map(|id| (part.nodes[id].id.clone(), part.fingerprint(id))).collect();
    let mut known = manifest.building.clone().filter(|building| building.fingerprints == meant);
    if let Some(building) = &known
        && !tables::all_there(&building.stand_ins, manifest).await?
    {
        tracing::warn!("a table of the rebuild that was begun is gone; it begins anew");
        known = None;
    }
    let files = manifest.files.iter().filter(|file| known.is_some() && manifest.builds(&file.node));
    let files = files.cloned().collect();
    let Building { sources, nodes, fingerprints, .. } = known.clone().unwrap_or_default();
    Ok(Manifest { sources, nodes, fingerprints, files, building: known, ..manifest.clone() })
}

/// The manifest without what is built.
fn base_of(manifest: &Manifest) -> Manifest {
    let files = manifest.files.iter().filter(|file| !manifest.builds(&file.node)).cloned().collect();
    Manifest { files, building: None, ..manifest.clone() }
}

impl Base {
    /// What is published in the place of the part's manifest `next`; `done`: the part has come to the end.
    pub fn with(&self, next: &Manifest, done: bool) -> Manifest {
        let base = &self.manifest;
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
                since: self.since,
                stand_ins: self.stand_ins.iter().map(|(at, (sink, _))| (sink.clone(), at.clone())).collect(),
            });
            return whole;
        }
        self.join(&mut whole, next);
        whole
    }

    /// Gives the nodes of the part their places among the others'.
    fn join(&self, whole: &mut Manifest, next: &Manifest) {
        for (id, meaning) in next.fingerprints.iter().filter(|(id, _)| !is_twice(id)) {
            let own = id.trim_end_matches(INSTEAD);
            whole.fingerprints.insert(own.to_owned(), meaning.clone());
            whole.nodes.remove(own);
            if let Some(progress) = next.nodes.get(id) {
                let mut progress = progress.clone();
                progress.accounts = None;
                whole.nodes.insert(own.to_owned(), progress);
            }
        }
        let replaced = |id: &str| next.fingerprints.contains_key(&format!("{id}{INSTEAD}"));
        let stays = |file: &StateFile| !is_twice(&file.node) && !replaced(&file.node);
        let (mut files, dropped): (Vec<_>, Vec<_>) =
            std::mem::take(&mut whole.files).into_iter().partition(stays);
        files.iter_mut().for_each(|file| file.node.truncate(file.node.trim_end_matches(INSTEAD).len()));
        whole.files = files;
        whole.garbage.extend(dropped.into_iter().map(|file| file.path));
        whole.rebuilt.extend(self.rebuilt.iter().map(|name| (name.clone(), self.since)));
        for commit in &mut whole.commits {
            if let Some((_, location)) = self.stand_ins.get(&commit.location) {
                commit.replaced_by = Some(std::mem::replace(&mut commit.location, location.clone()));
            }
        }
    }
}
