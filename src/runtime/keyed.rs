//! The task of one shard of an OVER: inputs merged, rows in, finals and newest rows out, changes saved at barriers.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use tokio::sync::mpsc::Sender;

use crate::error::Result;
use crate::operators::over::{Over, times_of};
use crate::plan::NodeId;
use crate::runtime::chain::{Chain, Outgoing};
use crate::runtime::inbox::{Event, Inbox};
use crate::runtime::report::{Report, StatePart, behind};
use crate::state::files::{encode, sort_by_group};
use crate::state::keys::hash_keys;
use crate::state::manifest::{StateFile, file_name};
use crate::state::store::StateStore;
use crate::stream::{Message, Port, Positions};

/// Epochs between full snapshots of the keyed state, which let older files go.
pub const FULL_EVERY: u64 = 32;

/// Names a shard's state files.
#[derive(Clone)]
pub struct Saver {
    pub store: Arc<StateStore>,
    pub node: String,
    pub generation: u64,
    pub shard: usize,
}

/// Rows of a state file to be written.
pub struct Piece {
    pub kind: &'static str,
    pub rows: RecordBatch,
    pub keys: Vec<ArrayRef>,
}

impl Saver {
    /// Writes the state files of an epoch and reports the part, in the background.
    pub fn save_behind(
        &self,
        node: NodeId,
        epoch: u64,
        pieces: Vec<Piece>,
        mut part: StatePart,
        reports: &Sender<Report>,
    ) {
        let saver = self.clone();
        behind(reports, async move {
            for Piece { kind, rows, keys } in pieces {
                part.files.push(saver.save(kind, epoch, &rows, &keys).await?);
            }
            Ok(Report::State { node, epoch, part })
        });
    }

    /// Writes one state file.
    ///
    /// # Errors
    /// External: the state store failed.
    async fn save(
        &self,
        kind: &str,
        epoch: u64,
        batch: &RecordBatch,
        keys: &[ArrayRef],
    ) -> Result<StateFile> {
        let mut hashes = Vec::new();
        hash_keys(keys, batch.num_rows(), &mut hashes)?;
        let times = times_of(batch);
        let bytes = encode(&sort_by_group(batch, &hashes)?)?;
        let path = file_name(&self.node, kind, self.generation, epoch, self.shard);
        let size = bytes.len() as u64;
        self.store.put_file(&path, bytes).await?;
        Ok(StateFile {
            path,
            node: self.node.clone(),
            kind: kind.to_owned(),
            epoch,
            generation: self.generation,
            rows: batch.num_rows() as u64,
            bytes: size,
            min_time: times.map(|(least, _)| least),
            max_time: times.map(|(_, greatest)| greatest),
        })
    }
}

pub struct KeyedTask {
    pub node: NodeId,
    pub over: Over,
    pub inbox: Inbox,
    pub chain: Chain,
    pub reports: Sender<Report>,
    pub saver: Saver,
}

impl KeyedTask {
    /// Runs until the last barrier.
    ///
    /// # Errors
    /// External: the state store failed. Internal: a task is gone.
    pub async fn run(mut self) -> Result<()> {
        let mut out = Outgoing::new();
        let mut seen = Positions::default();
        loop {
            match self.inbox.next().await? {
                Event::Changes { batch, reached } => {
                    seen.raise_all(&reached);
                    if let Some(latest) = self.over.push(&batch)? {
                        self.chain.run(self.node, Port::Latest, &latest, &reached, &mut out)?;
                    }
                }
                Event::Watermark { time, reached } => {
                    seen.raise_all(&reached);
                    for rows in self.over.advance(time)? {
                        self.chain.run(self.node, Port::Final, &rows, &reached, &mut out)?;
                    }
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
        if full {
            self.over.mark_all_dirty();
        }
        let snapshot = self.over.snapshot()?;
        let mut pieces = Vec::new();
        if let Some(rows) = snapshot.rows {
            pieces.push(Piece { kind: "rows", keys: self.over.key_columns(&rows, true), rows });
        }
        if let Some(rows) = snapshot.keys {
            pieces.push(Piece { kind: "keys", keys: self.over.key_columns(&rows, false), rows });
        }
        let part = StatePart {
            watermark: self.over.watermark(),
            horizon: self.over.horizon(),
            full,
            dead: std::mem::take(&mut self.chain.dead),
            ..StatePart::default()
        };
        self.saver.save_behind(self.node, epoch, pieces, part, &self.reports);
        Ok(())
    }
}
