//! OVER as a stage: rows in, finals and newest rows out, changes saved at barriers. And how a stage's state is written.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use tokio::sync::mpsc::Sender;

use crate::error::Result;
use crate::operators::over::{Over, OverCut};
use crate::plan::NodeId;
use crate::runtime::counts::Count;
use crate::runtime::report::{Report, StatePart, behind};
use crate::runtime::stage::{Operate, Rows};
use crate::state::compaction::times_of;
use crate::state::files::{encode, sort_by_group};
use crate::state::keys::hash_keys;
use crate::state::manifest::{StateFile, file_name};
use crate::state::store::StateStore;
use crate::stream::{ChangeBatch, Micros, Port, crash};

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

/// A state file to be written.
pub struct Piece {
    pub kind: &'static str,
    /// Its key columns.
    pub keys: Vec<usize>,
    /// Puts its rows together; `None`: there is nothing to write. Aside, as rows wait for the task that cuts.
    pub gather: Gather,
}

pub type Gather = Box<dyn FnOnce() -> Result<Option<RecordBatch>> + Send>;

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
            for Piece { kind, keys, gather } in pieces {
                if let Some(rows) = gather()?.filter(|rows| rows.num_rows() > 0) {
                    part.files.push(saver.save(kind, epoch, &rows, &keys).await?);
                }
            }
            Ok(Report::State { node, epoch, part })
        });
    }

    /// Writes one state file.
    ///
    /// # Errors
    /// External: the state store failed.
    async fn save(&self, kind: &str, epoch: u64, batch: &RecordBatch, keys: &[usize]) -> Result<StateFile> {
        let keys: Vec<ArrayRef> = keys.iter().map(|key| Arc::clone(batch.column(*key))).collect();
        let mut hashes = Vec::new();
        hash_keys(&keys, batch.num_rows(), &mut hashes)?;
        let times = times_of(batch);
        let bytes = encode(&sort_by_group(batch, &hashes)?)?;
        let path = file_name(&self.node, kind, self.generation, epoch, self.shard);
        let size = bytes.len() as u64;
        crash::point("state.before");
        self.store.put_file(&path, bytes).await?;
        crash::point("state.after");
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

impl Operate for Over {
    async fn take_in(&mut self, batch: ChangeBatch) -> Result<Rows> {
        Ok(self.push(&batch)?.map(|latest| (Port::Latest, latest)).into_iter().collect())
    }

    fn pass(&mut self, watermark: Micros) -> Result<(Rows, Micros)> {
        let rows = self.advance(watermark)?.into_iter().map(|rows| (Port::Final, rows)).collect();
        Ok((rows, watermark))
    }

    fn save(&mut self, epoch: u64) -> Result<(Vec<Piece>, StatePart)> {
        let full = epoch.is_multiple_of(FULL_EVERY);
        if full {
            self.mark_all_dirty();
        }
        let OverCut { rows, keys } = self.cut()?;
        let pieces = vec![
            Piece { kind: "rows", keys: self.key_columns(true), gather: Box::new(|| rows.gather()) },
            Piece { kind: "keys", keys: self.key_columns(false), gather: Box::new(|| keys.gather()) },
        ];
        let (watermark, horizon) = (self.watermark(), self.horizon());
        Ok((pieces, StatePart { watermark, horizon, full, ..StatePart::default() }))
    }

    fn count(&mut self, count: &mut Count) {
        let tally = self.tally();
        (count.settled, count.late, count.held) = (tally.settled, tally.late, tally.held);
    }
}
