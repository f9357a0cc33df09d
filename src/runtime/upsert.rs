//! The task of one shard of an upserted table: the net changes of an epoch, one per key, staged at the barrier.

use std::sync::Arc;

use tokio::sync::mpsc::Sender;

use crate::connectors::delta::upsert::Stager;
use crate::error::Result;
use crate::operators::newest::Newest;
use crate::plan::NodeId;
use crate::runtime::counts::Count;
use crate::runtime::inbox::{Event, Inbox};
use crate::runtime::letters;
use crate::runtime::metrics::{Metrics, SinkMetrics};
use crate::runtime::report::Report;
use crate::runtime::sinks::coordinator_gone;
use crate::state::manifest::PreparedFile;
use crate::stream::{START_OF_TIME, Stage};

pub struct UpsertTask {
    pub node: NodeId,
    /// The sink's name, for dead letters.
    pub sink: Arc<str>,
    pub topics: Vec<Arc<str>>,
    pub key: Vec<usize>,
    /// The last change per key since the last barrier.
    pub changes: Newest,
    pub stager: Stager,
    pub inbox: Inbox,
    pub reports: Sender<Report>,
    pub metrics: Arc<SinkMetrics>,
}

impl UpsertTask {
    /// Runs until the last barrier.
    ///
    /// # Errors
    /// External: the table's store failed.
    pub async fn run(mut self) -> Result<()> {
        let mut watermark = START_OF_TIME;
        let mut dead = Vec::new();
        let mut count = Count::default();
        loop {
            match self.inbox.next().await? {
                Event::Changes { batch, .. } => {
                    if self.changes.push(&batch)? > 0 {
                        for row in self.changes.rows_without_key() {
                            let error = "a key column of the upserted table is NULL".to_owned();
                            let (at, topics) = (&self.sink, &self.topics);
                            dead.push(letters::of_row(
                                Stage::Sink,
                                at,
                                "null_key",
                                topics,
                                &batch,
                                row,
                                error,
                            ));
                        }
                    }
                    count.rows_in += batch.num_rows() as u64;
                    Metrics::add(&self.metrics.rows, batch.num_rows() as u64);
                }
                Event::Watermark { time, .. } => watermark = time,
                Event::Barrier(barrier) => {
                    let files = self.stage(barrier.epoch).await?;
                    let dead = std::mem::take(&mut dead);
                    let mut count = std::mem::take(&mut count);
                    count.dead_letters = dead.len() as u64;
                    let (node, epoch) = (self.node, barrier.epoch);
                    let report = Report::Prepared { node, epoch, files, watermark, dead, count };
                    self.reports.send(report).await.map_err(coordinator_gone)?;
                    if barrier.last {
                        return Ok(());
                    }
                }
                Event::End => return Ok(()),
            }
        }
    }

    async fn stage(&mut self, epoch: u64) -> Result<Vec<PreparedFile>> {
        let empty = Newest::new(Arc::clone(self.changes.schema()), self.key.clone(), None)?;
        let mut changes = std::mem::replace(&mut self.changes, empty);
        let Some(net) = changes.take_dirty(usize::MAX)? else { return Ok(Vec::new()) };
        let staged = self.stager.stage(epoch, &net.rows, net.deletes.as_ref()).await?;
        Ok(staged.into_iter().map(PreparedFile::from).collect())
    }
}
