//! The tables in which rebuilt sinks write until they replace what there was ([`building`](super::building)).

use std::collections::{BTreeMap, BTreeSet};

use crate::connectors::delta::store::{missing, paths};
use crate::connectors::delta::swap;
use crate::connectors::files::open_existing;
use crate::error::Result;
use crate::plan::{NodeKind, SinkKind, SinkPlan, StreamPlan};
use crate::runtime::tables::is_committed;
use crate::state::manifest::{Manifest, PreparedCommit};

/// Lets rebuilt sinks of a part write beside the tables whose rows they will replace: where an earlier start began to
/// (`known`, by sink), or in folders of this generation. Returns the locations by sink.
pub fn stand_in(
    part: &mut StreamPlan,
    rebuilt: &BTreeSet<String>,
    known: &BTreeMap<String, String>,
    generation: u64,
) -> BTreeMap<String, String> {
    let mut locations = BTreeMap::new();
    for node in &mut part.nodes {
        let NodeKind::Sink(SinkPlan { name, kind: SinkKind::Delta(config), .. }) = &mut node.kind else {
            continue;
        };
        if rebuilt.contains(name) {
            let location = known.get(name).cloned();
            let location = location.unwrap_or_else(|| swap::stand_in(&config.location, generation));
            config.stands_for = Some(std::mem::replace(&mut config.location, location.clone()));
            locations.insert(name.clone(), location);
        }
    }
    locations
}

/// The location of the table that a stand-in stands for.
pub fn stands_for(sink: &SinkPlan) -> Option<String> {
    match &sink.kind {
        SinkKind::Delta(config) => config.stands_for.clone(),
        _ => None,
    }
}

/// Whether the tables of a rebuild that was begun are there, with all their files and those that are prepared for them.
///
/// # Errors
/// External: a store failed.
pub async fn all_there(stand_ins: &BTreeMap<String, String>, manifest: &Manifest) -> Result<bool> {
    for (sink, location) in stand_ins {
        if !swap::is_whole(location).await? {
            return Ok(false);
        }
        for commit in manifest.commits.iter().filter(|commit| commit.location == *location) {
            debug_assert_eq!(commit.sink, *sink);
            if !is_committed(commit, &manifest.pipeline).await? && !are_prepared(commit).await? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

async fn are_prepared(commit: &PreparedCommit) -> Result<bool> {
    let Some(located) = open_existing(&commit.location)? else { return Ok(false) };
    let files = paths(commit.files.iter().map(|file| &file.path))?;
    Ok(missing(&located, &commit.location, files).await?.is_empty())
}

/// Forgets the tables of a rebuild that is left.
///
/// # Errors
/// External: a store failed.
pub async fn forget(stand_ins: &BTreeMap<String, String>) -> Result<()> {
    for location in stand_ins.values() {
        swap::forget(location).await?;
    }
    Ok(())
}
