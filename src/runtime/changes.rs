//! Changed SQL: what a start keeps of a state, what it forgets, and what it refuses (DESIGN §6).
//!
//! - A view or sink that means what it meant goes on with its state; so does one that was renamed or moved around.
//! - A new sink, with the views that only new sinks read, is built from history where the source has one
//!   ([`building`](super::building)). Else it begins at the offsets that the pipeline has reached: earlier rows are not in
//!   it.
//! - One that is gone is forgotten: its state files go to the garbage list of the next manifest. Its table stays.
//! - One that means something else stops the start, as rows of both meanings would be mixed; unless the start says
//!   `--rebuild`: then its rows are replaced by what the SQL now makes of all that was read ([`building`](super::building)).
//!   A start after one that was killed on the way goes on without being told again.

use std::collections::{BTreeMap, BTreeSet};

use crate::connectors::files;
use crate::error::{Error, Result};
use crate::plan::changes::{Change, Comparison, Item};
use crate::plan::{NodeId, SinkKind, SinkPlan, StreamPlan};
use crate::runtime::{building, history, lookups, tables};
use crate::state::manifest::{Manifest, PreparedCommit};
use crate::state::store::StateStore;
use crate::stream::clock::Clock;

/// What `millstream plan` says.
pub struct Changes {
    /// Of the newest manifest; `None`: there is no state yet.
    pub epoch: Option<u64>,
    pub items: Vec<Item>,
    /// Why a run would not start, besides what is changed.
    pub refusals: Vec<Error>,
    /// New sinks that are built from history.
    pub builds: Vec<String>,
    /// Changed sinks that can be rebuilt in their place.
    pub rebuilds: Vec<String>,
    /// Whether every changed sink is among them.
    rebuilds_all: bool,
    /// The rebuild of what is changed is under way.
    pub goes_on: bool,
    /// Look-up tables without `refresh` whose rows are others than in the run before.
    pub lookups: Vec<String>,
}

impl Changes {
    /// Whether `--rebuild` is a way out for all that is changed.
    pub fn rebuilds_all(&self) -> bool {
        self.rebuilds_all
    }

    /// Whether a run would start, as far as state and tables go.
    pub fn starts(&self) -> bool {
        self.refusals.is_empty() && (self.goes_on || !self.items.iter().any(Item::is_changed))
    }
}

/// What a start says, beside [`WAY_OUT`], of sinks that can be rebuilt in their place.
pub const REBUILD: &str = "run --rebuild computes the changed sinks anew from history, and replaces the rows of each table in one \
                           commit when it has all that was read; until then what was there stays, and is served.";

/// What to do when something is changed.
pub const WAY_OUT: &str = "Change the SQL back, or give the sinks of what is changed other names and locations (prefixes): \
                           they are new then, and built from history where the source has one. Another --name with other locations begins \
                           anew beside this one.";

/// Looks at the state of a pipeline and at its tables, and changes nothing.
///
/// # Errors
/// External: the state or a table cannot be read.
pub async fn changes(plan: &StreamPlan, name: &str, state: &str) -> Result<Changes> {
    let latest = match files::open_existing(state)? {
        None => None,
        Some(located) => {
            files::probe(&located).await?;
            StateStore::new(located.store, object_store::path::Path::default(), Clock).latest().await?
        }
    };
    let known = latest.as_ref().map(|latest| latest.fingerprints.clone()).unwrap_or_default();
    let compared = compare(plan, &known);
    let mut refusals = Vec::new();
    if let Some(latest) = latest.as_ref().filter(|latest| latest.pipeline != name) {
        let message = format!("the state at {state} belongs to pipeline {}, not to {name}", latest.pipeline);
        let hint = "Give this pipeline a folder of its own with --state, or its old name with --name.";
        refusals.push(Error::user(message).hint(hint));
    }
    if let Some(latest) = &latest {
        refusals.extend(unfinished(plan, latest).await?);
        refusals.extend(copied(plan, latest));
    }
    #[cfg(feature = "delta")]
    for (node, _) in plan.sinks() {
        let is_changed = compared.differ.iter().any(|(sink, _)| *sink == node);
        let looked = tables::look(plan, node, name, latest.as_ref(), (state, is_changed)).await;
        if let Err(error) = looked {
            match error.domain() {
                crate::error::Domain::User => refusals.push(error),
                _ => return Err(error),
            }
        }
    }
    let lookups = match &latest {
        Some(latest) if !latest.lookups.is_empty() => {
            lookups::changed(&latest.lookups, &lookups::digests(plan).await?)
        }
        _ => Vec::new(),
    };
    let read = |latest: &Manifest| latest.sources.values().any(|source| !source.partitions.is_empty());
    let goes_on = latest.as_ref().is_some_and(|latest| is_begun(plan, &compared, latest));
    let new = if latest.as_ref().is_some_and(read) { compared.new } else { Vec::new() };
    let builds = new.into_iter().filter(|node| history::builds(plan, *node));
    let builds = builds.map(|node| plan.nodes[node].id.clone()).collect();
    let differ = compared.differ.iter().filter(|(node, known)| why_not(plan, *node, known).is_none());
    let rebuilds: Vec<String> = differ.map(|(node, _)| plan.nodes[*node].id.clone()).collect();
    let rebuilds_all = !rebuilds.is_empty() && rebuilds.len() == compared.differ.len();
    let (epoch, items) = (latest.map(|latest| latest.epoch), compared.items);
    Ok(Changes { epoch, items, refusals, builds, rebuilds, rebuilds_all, goes_on, lookups })
}

/// Sinks that the state does not have as the SQL has them.
#[derive(Debug, Default)]
pub struct Unlike {
    pub new: Vec<NodeId>,
    /// Rebuilt in their place.
    pub rebuilt: Vec<NodeId>,
}

/// Gives the plan's nodes the ids of the state; returns the sinks that have to be built. `rebuild`: sinks that changed may be.
///
/// # Errors
/// User: a view or sink is not what it was. External: a table cannot be read.
pub async fn adopt(plan: &mut StreamPlan, latest: &Manifest, rebuild: bool) -> Result<Unlike> {
    let compared = compare(plan, &latest.fingerprints);
    if let Some(error) = refused(plan, &compared, latest, rebuild) {
        return Err(error);
    }
    if let Some(error) = unfinished(plan, latest).await? {
        return Err(error);
    }
    plan.adopt(&compared);
    if latest.fingerprints.is_empty() {
        return Ok(Unlike::default());
    }
    for item in compared.items.iter().filter(|item| item.change == Change::Gone) {
        let what = if item.sink { "sink" } else { "view" };
        tracing::warn!("{what} {} is gone: its state is dropped", item.name);
    }
    let rebuilt = compared.differ.into_iter().map(|(node, _)| node).collect();
    Ok(Unlike { new: compared.new, rebuilt })
}

/// Sinks whose rebuild came to its end, and was lost before it was in their tables, mean something else than their tables have:
/// they are rebuilt once more, by this start or a later one.
#[cfg(feature = "delta")]
pub fn build_again(plan: &StreamPlan, manifest: &mut Manifest, unlike: &mut Unlike, sinks: Vec<NodeId>) {
    for node in sinks.into_iter().filter(|node| !unlike.rebuilt.contains(node)).collect::<Vec<_>>() {
        if let Some(meaning) = manifest.fingerprints.get_mut(&plan.nodes[node].id) {
            meaning.push_str("\nnot in its table");
        }
        unlike.rebuilt.push(node);
    }
}

/// Fills the fingerprints of a data manifest in and leaves out what belongs to nodes that are gone.
pub fn forget(plan: &StreamPlan, next: &mut Manifest) {
    next.fingerprints = plan.stateful().map(|id| (plan.nodes[id].id.clone(), plan.fingerprint(id))).collect();
    let live: BTreeSet<&str> = plan.nodes.iter().map(|node| node.id.as_str()).collect();
    next.files.retain(|file| live.contains(file.node.as_str()));
    next.nodes.retain(|id, _| live.contains(id.as_str()));
    next.building = None;
}

/// A table that takes other columns does not stop a sink.
fn compare(plan: &StreamPlan, known: &BTreeMap<String, String>) -> Comparison {
    plan.compare(known, &|id, text| tables::may_grow(plan, id, text))
}

/// Why a sink that changed cannot be rebuilt in its place.
fn why_not(plan: &StreamPlan, sink: NodeId, known: &str) -> Option<String> {
    match history::builds(plan, sink) {
        true => plan.stays_put(sink, known),
        false => Some("its source has no history from which it could be".to_owned()),
    }
}

/// Whether the rebuild of all that changed is under way.
fn is_begun(plan: &StreamPlan, compared: &Comparison, latest: &Manifest) -> bool {
    let begun = |(node, _): &(NodeId, String)| {
        let building = latest.building.as_ref();
        let known = building.and_then(|b| b.fingerprints.get(&building::instead_of(plan, *node)));
        known.is_some_and(|known| plan.means(*node, known))
    };
    !compared.differ.is_empty() && compared.differ.iter().all(begun)
}

fn refused(plan: &StreamPlan, compared: &Comparison, latest: &Manifest, rebuild: bool) -> Option<Error> {
    let (item, lines) = compared.changed()?;
    let mut hint = format!("{WAY_OUT} millstream plan shows all that changed.");
    let refusal =
        compared.differ.iter().find_map(|(node, known)| Some((*node, why_not(plan, *node, known)?)));
    if rebuild && latest.closed {
        let message = "the pipeline is closed: nothing can be rebuilt in its place";
        return Some(Error::user(message).hint(hint));
    }
    match refusal {
        None if rebuild && !compared.differ.is_empty() || is_begun(plan, compared, latest) => return None,
        None => hint = format!("{REBUILD} {hint}"),
        Some((node, why)) if rebuild => {
            let message = format!("sink {} cannot be rebuilt in its place: {why}", plan.nodes[node].id);
            return Some(Error::user(message).hint(hint));
        }
        Some(_) => {}
    }
    let what = if item.sink { "sink" } else { "view" };
    let mut message = format!("{what} {} is not what it was when its state was written", item.name);
    for line in lines {
        message.push_str(&format!("\n  {line}"));
    }
    Some(Error::user(message).hint(hint))
}

/// A pipeline that began as a copy must not take up the NDJSON files of the one that it was copied from: a start removes
/// those of later epochs. Tables guard themselves by the id of their state, online stores by their fence.
pub fn copied(plan: &StreamPlan, latest: &Manifest) -> Option<Error> {
    let copied = latest.copied.as_ref()?;
    let same = |(id, sink): &(NodeId, &SinkPlan)| {
        let theirs = copied.sinks.get(&plan.nodes[*id].id);
        matches!(sink.kind, SinkKind::Ndjson(_)) && theirs.is_some_and(|known| plan.means(*id, known))
    };
    let (_, sink) = plan.sinks().find(same)?;
    let (name, from) = (&sink.name, &copied.pipeline);
    let message =
        format!("sink {name} still writes where the sink of {from} writes, of which this is a copy");
    Some(Error::user(message).hint("Give every sink of the copy another location, as by --set LAKE=…."))
}

/// A sink is gone, and the commit that was prepared for it may not be in its table: nobody would make it any more.
async fn unfinished(plan: &StreamPlan, latest: &Manifest) -> Result<Option<Error>> {
    let stand_ins = latest.building.iter().flat_map(|building| building.stand_ins.values());
    let stand_ins: BTreeSet<&String> = stand_ins.collect();
    let gone = |commit: &&PreparedCommit| {
        let written = plan.sinks().any(|(_, sink)| tables::writes(sink, commit));
        // Nothing of a rebuild is missed that is left.
        !written && !stand_ins.contains(&commit.location)
    };
    for commit in latest.commits.iter().filter(gone) {
        if !tables::is_committed(commit, &latest.pipeline).await? {
            let message = format!(
                "sink {} is gone from the SQL, and its commit of epoch {} is not yet in its table {}",
                commit.sink, commit.epoch, commit.location
            );
            let hint = "Start once with the sink, then remove it; or remove its table first.";
            return Ok(Some(Error::user(message).hint(hint)));
        }
    }
    Ok(None)
}
