//! The task of one shard of a stage that an exchange or an operator begins: inputs merged, rows through the operator and
//! the chain behind it, what the operator holds saved at barriers.

use tokio::sync::mpsc::Sender;

use crate::error::Result;
use crate::plan::NodeId;
use crate::runtime::chain::{Chain, Outgoing};
use crate::runtime::counts::Count;
use crate::runtime::inbox::{Event, Inbox};
use crate::runtime::keyed::{Piece, Saver};
use crate::runtime::report::{Report, StatePart};
use crate::stream::{ChangeBatch, Message, Micros, Port};

/// Rows, and the port by which they leave.
pub type Rows = Vec<(Port, ChangeBatch)>;

/// What a stage does with its input.
pub trait Operate: Send + 'static {
    /// Takes rows in; gives those that follow at once.
    ///
    /// # Errors
    /// What the pipeline cannot go on with.
    fn take_in(&mut self, batch: ChangeBatch) -> impl Future<Output = Result<Rows>> + Send;

    /// The watermark rose, or positions did: gives what is final by it, and the watermark behind the operator.
    ///
    /// # Errors
    /// What the pipeline cannot go on with.
    fn pass(&mut self, watermark: Micros) -> Result<(Rows, Micros)>;

    /// What is to be written for a barrier, and what is to be said of it.
    ///
    /// # Errors
    /// Internal only.
    fn save(&mut self, epoch: u64) -> Result<(Vec<Piece>, StatePart)>;

    /// Adds what only the operator knows of its rows since the last barrier.
    fn count(&mut self, count: &mut Count);
}

pub struct StageTask<O> {
    pub node: NodeId,
    pub operator: O,
    pub inbox: Inbox,
    pub chain: Chain,
    pub reports: Sender<Report>,
    pub saver: Saver,
}

impl<O: Operate> StageTask<O> {
    /// Runs until the last barrier.
    ///
    /// # Errors
    /// Those of the operator. Internal: a task is gone. A state store that fails is reported in the background.
    pub async fn run(mut self) -> Result<()> {
        let mut out = Outgoing::new();
        loop {
            match self.inbox.next().await? {
                Event::Changes { batch, reached } => {
                    self.chain.counts.of(self.node).rows_in += batch.num_rows() as u64;
                    for (port, rows) in self.operator.take_in(batch).await? {
                        self.chain.counts.out(self.node, port, rows.num_rows());
                        self.chain.run(self.node, port, &rows, &reached, &mut out)?;
                    }
                }
                Event::Watermark { time, reached } => {
                    let (rows, time) = self.operator.pass(time)?;
                    for (port, rows) in rows {
                        self.chain.counts.out(self.node, port, rows.num_rows());
                        self.chain.run(self.node, port, &rows, &reached, &mut out)?;
                    }
                    self.chain.broadcast(&Message::Watermark { time, reached }, &mut out);
                }
                Event::Barrier(barrier) => {
                    let (pieces, mut part) = self.operator.save(barrier.epoch)?;
                    let count = self.chain.counts.of(self.node);
                    count.dead_letters += part.dead.len() as u64;
                    self.operator.count(count);
                    part.dead.append(&mut self.chain.dead);
                    part.counts = std::mem::take(&mut self.chain.counts);
                    self.saver.save_behind(self.node, barrier.epoch, pieces, part, &self.reports);
                    self.chain.broadcast(&Message::Barrier(barrier), &mut out);
                    self.chain.flush(&mut out).await?;
                    if barrier.last {
                        return Ok(());
                    }
                }
                Event::End => return Ok(()),
            }
            self.chain.flush(&mut out).await?;
        }
    }
}
