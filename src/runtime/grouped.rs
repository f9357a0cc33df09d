//! The task of one shard of a GROUP BY: rows in, weighted changes and closed windows out, touched keys saved at barriers.

use tokio::sync::mpsc::Sender;

use crate::error::Result;
use crate::operators::group::{Panes, Pushed};
use crate::plan::NodeId;
use crate::runtime::chain::{Chain, Outgoing};
use crate::runtime::inbox::{Event, Inbox};
use crate::runtime::keyed::{FULL_EVERY, Piece, Saver};
use crate::runtime::report::{Report, StatePart};
use crate::stream::{Message, Port};

pub struct GroupTask {
    pub node: NodeId,
    pub group: Panes,
    pub inbox: Inbox,
    pub chain: Chain,
    pub reports: Sender<Report>,
    pub saver: Saver,
}

impl GroupTask {
    /// Runs until the last barrier.
    ///
    /// # Errors
    /// User: an aggregate overflowed. External: the state store failed. Internal: a task is gone.
    pub async fn run(mut self) -> Result<()> {
        let mut out = Outgoing::new();
        loop {
            match self.inbox.next().await? {
                Event::Changes { batch, reached } => {
                    let Pushed { changes, latest } = self.group.push(&batch)?;
                    for (port, rows) in [(Port::Changes, changes), (Port::Latest, latest)] {
                        if let Some(rows) = rows {
                            self.chain.run(self.node, port, &rows, &reached, &mut out)?;
                        }
                    }
                }
                Event::Watermark { time, reached } => {
                    for rows in self.group.advance(time)? {
                        self.chain.run(self.node, Port::Final, &rows, &reached, &mut out)?;
                    }
                    let time = self.group.watermark_out();
                    self.chain.broadcast(&Message::Watermark { time, reached }, &mut out);
                }
                Event::Barrier(barrier) => {
                    self.save(barrier.epoch)?;
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

    fn save(&mut self, epoch: u64) -> Result<()> {
        let full = epoch.is_multiple_of(FULL_EVERY);
        let rows = self.group.snapshot(full)?;
        let piece = rows.map(|rows| Piece { kind: "groups", keys: self.group.key_columns(&rows), rows });
        let dead = std::mem::take(&mut self.chain.dead);
        let watermark = self.group.watermark();
        let part = StatePart { watermark, full, dead, ..StatePart::default() };
        self.saver.save_behind(self.node, epoch, piece.into_iter().collect(), part, &self.reports);
        Ok(())
    }
}
