//! How far a source reaches now, for `status`: asked without claiming anything, and not for long.

use std::time::Duration;

use crate::connectors::PartitionInfo;
use crate::error::{Error, Result};
use crate::plan::{SourceKind, StreamPlan};
use crate::runtime::start::connector;
use crate::state::manifest::Manifest;
use crate::stream::Place;

/// The partitions of the plan's source, or why they are not known within `patience`.
///
/// # Errors
/// External: the source does not answer, or not in time.
pub async fn partitions(
    plan: &StreamPlan,
    name: &str,
    manifest: &Manifest,
    patience: Duration,
) -> Result<Vec<PartitionInfo>> {
    let Some((_, source)) = plan.source() else { return Err(Error::user("the SQL has no source")) };
    let (source, name, manifest) = (source.clone(), name.to_owned(), manifest.clone());
    let stored = manifest.sources.get(&source.name).map(|s| s.positions(0)).unwrap_or_default();
    let place = |p: &PartitionInfo| Place::new(0, p.topic, p.partition);
    let kind = source.kind.clone();
    let (answer, answered) = tokio::sync::oneshot::channel();
    // A client of Kafka blocks; a thread of its own is left behind when the time is over.
    let ask = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Error::external("the source cannot be asked").because(error));
        let found = runtime.and_then(|runtime| {
            runtime.block_on(async {
                let (source, _) = connector(&source, &name, Some(&manifest)).await?;
                let found = source.partitions().await?;
                match kind {
                    SourceKind::Files(_) if found.iter().any(|p| stored.get(place(p)) != Some(p.high)) => {
                        Err(Error::user("there are files to be read, and records are not counted before"))
                    }
                    _ => Ok(found),
                }
            })
        });
        // Nobody waits any more when it took too long.
        answer.send(found).ok();
    };
    std::thread::Builder::new()
        .name("ends".to_owned())
        .spawn(ask)
        .map_err(|error| Error::external("a thread cannot be started").because(error))?;
    match tokio::time::timeout(patience, answered).await {
        Ok(Ok(found)) => found,
        Ok(Err(_)) => Err(Error::internal("the source was not asked")),
        Err(_) => Err(Error::external(format!("no answer within {} s", patience.as_secs()))),
    }
}
