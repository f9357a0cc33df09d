//! What tasks tell the coordinator, and what it tells the source.

use std::panic::AssertUnwindSafe;

use futures::FutureExt;
use tokio::sync::mpsc::Sender;

use crate::error::{Error, Result};
use crate::plan::NodeId;
use crate::runtime::aside;
use crate::runtime::counts::{Count, Counts};
use crate::runtime::flushed::ShardFlush;
use crate::state::manifest::{Accounts, PartitionProgress, PreparedFile, StateFile};
use crate::stream::{Barrier, DeadLetter, Micros, Place, Positions};

/// A shard's part of an epoch, or the end of the pipeline.
#[derive(Debug)]
pub enum Report {
    Source(SourceEpoch),
    /// An operator or online sink wrote its changes.
    State {
        node: NodeId,
        epoch: u64,
        part: StatePart,
    },
    /// A Delta sink wrote its files.
    Prepared {
        node: NodeId,
        epoch: u64,
        files: Vec<PreparedFile>,
        watermark: Micros,
        dead: Vec<DeadLetter>,
        count: Count,
    },
    /// Every partition of a source shard was read to the end that was seen at start.
    AtEnd {
        shard: usize,
    },
    /// A source shard reads nothing until it is cut.
    Held,
    Failed(Error),
}

/// A shard's part of the state of an operator or online sink.
#[derive(Debug, Default)]
pub struct StatePart {
    pub files: Vec<StateFile>,
    pub watermark: Micros,
    /// Row segments whose newest event time is below this are needed no more.
    pub horizon: Micros,
    /// The keyed files hold everything: older ones are needed no more.
    pub full: bool,
    pub dead: Vec<DeadLetter>,
    /// Of the operator and the chain behind it, or of the sink.
    pub counts: Counts,
    /// Of an online sink.
    pub flushed: Option<ShardFlush>,
}

/// What a source shard read in an epoch.
#[derive(Debug, Default)]
pub struct SourceEpoch {
    pub epoch: u64,
    /// The shard's partitions.
    pub partitions: Vec<PartitionProgress>,
    pub watermark: Option<Micros>,
    /// (topic, partition, offset) of late rows.
    pub late: Vec<(u16, i32, i64)>,
    pub dead: Vec<DeadLetter>,
    pub accounts: Accounts,
    /// Of the chain behind the source.
    pub counts: Counts,
}

/// Does what ends in a report while the task goes on with the rows behind the barrier: a checkpoint must not delay them.
/// One epoch is open at a time, so the work of the next one cannot overtake this one.
pub fn behind(reports: &Sender<Report>, work: impl Future<Output = Result<Report>> + Send + 'static) {
    let reports = reports.clone();
    aside::spawn(async move {
        let report = caught(work).await.unwrap_or_else(Report::Failed);
        // Nobody listens any more when the pipeline is already going down.
        reports.send(report).await.ok();
    });
}

/// What work comes to; a panic is an error like others. Else nobody would hear of it: the coordinator would wait for a
/// report for ever.
///
/// # Errors
/// Those of the work. Internal: it panicked.
pub async fn caught<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(Error::internal(format!("a task of the pipeline panicked: {text}")))
    })
}

/// From the coordinator to a source shard.
#[derive(Debug, Clone)]
pub enum Command {
    /// Read nothing until the cut: others are about to raise the watermark to the end.
    Hold,
    /// Cut here. `close`: no row follows, raise the watermark to the end first; every shard is held.
    Cut {
        barrier: Barrier,
        close: bool,
    },
    /// Read this partition too, from the offset on.
    Add {
        place: Place,
        next: i64,
    },
    Ends(Ends),
    /// The manifest of this epoch is published and its commits are made.
    Durable {
        epoch: u64,
    },
}

/// The ends of a shard's partitions, as a client of its own was told.
#[derive(Debug, Clone)]
pub struct Ends {
    pub ends: Positions,
    pub at: std::time::Instant,
    /// Not one of the answers in between, which only show that the broker is there.
    pub is_full: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_beside_the_stream_is_a_report() {
        let (reports, mut receiver) = tokio::sync::mpsc::channel(1);
        let rows: Vec<i64> = Vec::new();
        behind(&reports, async move { Ok(Report::AtEnd { shard: rows[7] as usize }) });
        let Some(Report::Failed(error)) = receiver.recv().await else { panic!("no failure") };
        assert!(error.message().contains("panicked: index out of bounds"), "{error}");
    }
}
