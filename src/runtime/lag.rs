//! How far a source reaches now, for `status`: asked without claiming anything, and not for long.

use std::time::Duration;

use crate::connectors::PartitionInfo;
use crate::error::{Error, Result};
use crate::plan::StreamPlan;
use crate::runtime::start::connector;
use crate::state::manifest::Manifest;

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
    let (answer, answered) = tokio::sync::oneshot::channel();
    // A client of Kafka blocks; a thread of its own is left behind when the time is over.
    let ask = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Error::external("the source cannot be asked").because(error));
        let found = runtime.and_then(|runtime| {
            runtime.block_on(async {
                let (source, _) = connector(&source, &name, Some(&manifest)).await?;
                source.partitions().await
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
