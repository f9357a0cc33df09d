//! The NDJSON sinks of a pipeline: what each epoch staged goes into its manifest and is published after it.

use crate::connectors::ndjson::{self, Staged, clean, publish as publish_files};
use crate::error::Result;
use crate::plan::{NodeId, SinkKind, StreamPlan};
use crate::runtime::metrics::Metrics;
use crate::state::manifest::{Manifest, PreparedCommit, PreparedFile};
use crate::stream::Micros;
use crate::stream::clock::Clock;

/// The commits of an epoch, from what the shards of each NDJSON sink staged: (sink, files, watermark).
pub fn staged_commits(
    plan: &StreamPlan,
    epoch: u64,
    prepared: &[(NodeId, Vec<PreparedFile>, Micros)],
) -> Vec<PreparedCommit> {
    let mut commits = Vec::new();
    for (node, sink) in plan.sinks() {
        let SinkKind::Ndjson(config) = &sink.kind else { continue };
        let parts = prepared.iter().filter(|(of, _, _)| *of == node);
        let files: Vec<PreparedFile> = parts.flat_map(|(_, files, _)| files.iter().cloned()).collect();
        if !files.is_empty() {
            commits.push(PreparedCommit {
                sink: sink.name.clone(),
                location: config.location.clone(),
                epoch,
                files,
                sources: std::collections::BTreeMap::new(),
                complete_until: None,
                replaced_by: None,
            });
        }
    }
    commits
}

/// Publishes what a manifest lists; repeating it is safe.
///
/// # Errors
/// External: a location cannot be written.
pub async fn publish(plan: &StreamPlan, manifest: &Manifest, metrics: Option<&Metrics>) -> Result<()> {
    for (node, sink) in plan.sinks() {
        let SinkKind::Ndjson(_) = &sink.kind else { continue };
        for commit in manifest.commits.iter().filter(|commit| commit.sink == sink.name) {
            publish_files(&commit.location, commit.files.iter().map(|file| file.path.as_str())).await?;
            if let Some(metrics) = metrics {
                metrics.sink(node).committed(Clock.unix_millis());
            }
        }
    }
    Ok(())
}

/// After the claim: publishes what the process before had prepared, removes what it had not.
///
/// # Errors
/// External: a location cannot be read or written.
pub async fn take_over(plan: &StreamPlan, manifest: &Manifest) -> Result<()> {
    publish(plan, manifest, None).await?;
    // Also those of a sink that is gone from the SQL: nobody else would.
    let gone = |commit: &&PreparedCommit| plan.sinks().all(|(_, sink)| sink.name != commit.sink);
    for commit in manifest.commits.iter().filter(gone) {
        let staged = commit.files.iter().filter(|file| file.add.is_null());
        publish_files(&commit.location, staged.map(|file| file.path.as_str())).await?;
    }
    for (_, sink) in plan.sinks() {
        if let SinkKind::Ndjson(config) = &sink.kind {
            clean(&config.location, manifest.generation).await?;
        }
    }
    match manifest.data_epoch {
        None => forget(plan, manifest.generation).await,
        Some(_) => Ok(()),
    }
}

/// Removes what sinks wrote that begin anew.
///
/// # Errors
/// External: a location cannot be read or written.
pub async fn forget(plan: &StreamPlan, generation: u64) -> Result<()> {
    for (_, sink) in plan.sinks() {
        if let SinkKind::Ndjson(config) = &sink.kind {
            ndjson::forget(&config.location, generation).await?;
        }
    }
    Ok(())
}

impl From<Staged> for PreparedFile {
    fn from(file: Staged) -> Self {
        Self { path: file.path, size: file.size, rows: file.rows, add: serde_json::Value::Null }
    }
}
