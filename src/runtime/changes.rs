//! Changed SQL: what a start keeps of a state, what it forgets, and what it refuses (DESIGN §6).
//!
//! - A view or sink that means what it meant goes on with its state; so does one that was renamed or moved around.
//! - A new sink, with the views that only new sinks read, is built from history where the source has one
//!   ([`building`](super::building)). Else it begins at the offsets that the pipeline has reached: earlier rows are not in
//!   it.
//! - One that is gone is forgotten: its state files go to the garbage list of the next manifest. Its table stays.
//! - One that means something else stops the start: rows of both meanings would be mixed.

use std::collections::{BTreeMap, BTreeSet};

use crate::connectors::files;
use crate::error::{Error, Result};
use crate::plan::changes::{Change, Comparison, Item};
use crate::plan::{NodeId, SinkKind, SinkPlan, StreamPlan};
use crate::runtime::{history, lookups, tables};
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
    /// Look-up tables without `refresh` whose rows are others than in the run before.
    pub lookups: Vec<String>,
}

impl Changes {
    /// Whether a run would start, as far as state and tables go.
    pub fn starts(&self) -> bool {
        self.refusals.is_empty() && !self.items.iter().any(Item::is_changed)
    }
}

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
        if let Err(error) = tables::look(plan, node, name, latest.as_ref(), state).await {
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
    let new = if latest.as_ref().is_some_and(read) { compared.new } else { Vec::new() };
    let builds = new.into_iter().filter(|node| history::builds(plan, *node));
    let builds = builds.map(|node| plan.nodes[node].id.clone()).collect();
    Ok(Changes { epoch: latest.map(|latest| latest.epoch), items: compared.items, refusals, builds, lookups })
}

/// Gives the plan's nodes the ids of the state; returns the sinks that are new to it.
///
/// # Errors
/// User: a view or sink is not what it was. External: a table cannot be read.
pub async fn adopt(plan: &mut StreamPlan, latest: &Manifest) -> Result<Vec<NodeId>> {
    let compared = compare(plan, &latest.fingerprints);
    if let Some(error) = refused(&compared) {
        return Err(error);
    }
    if let Some(error) = unfinished(plan, latest).await? {
        return Err(error);
    }
    plan.adopt(&compared);
    if latest.fingerprints.is_empty() {
        return Ok(Vec::new());
    }
    for item in compared.items.iter().filter(|item| item.change == Change::Gone) {
        let what = if item.sink { "sink" } else { "view" };
        tracing::warn!("{what} {} is gone: its state is dropped", item.name);
    }
    Ok(compared.new)
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

fn refused(compared: &Comparison) -> Option<Error> {
    let (item, lines) = compared.changed()?;
    let what = if item.sink { "sink" } else { "view" };
    let mut message = format!("{what} {} is not what it was when its state was written", item.name);
    for line in lines {
        message.push_str(&format!("\n  {line}"));
    }
    Some(Error::user(message).hint(format!("{WAY_OUT} millstream plan shows all that changed.")))
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
    let gone = |commit: &&PreparedCommit| !plan.sinks().any(|(_, sink)| tables::writes(sink, commit));
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
