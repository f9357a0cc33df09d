//! The stateless nodes of a stage, fused: one batch in, messages for outlets out, all in one call.
//!
//! A stage begins at a source or an OVER and ends at outlets: hash exchanges to the next stage, and sinks. An outlet
//! with several senders scatters rows by key group; watermarks and barriers go to every sender.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use tokio::sync::mpsc::Sender;

use crate::error::{Error, Result};
use crate::operators::lookup::lookup;
use crate::operators::stateless::{Failed, filter, filter_newest, project, unnest};
use crate::plan::{NodeId, NodeKind, StreamPlan};
use crate::runtime::counts::Counts;
use crate::runtime::letters;
use crate::runtime::lookups::Lookups;
use crate::state::keys::{hash_keys, scatter};
use crate::stream::{ChangeBatch, DeadLetter, Message, Port, Reached, Stage};

/// Where the rows of a stage leave it.
#[derive(Debug, Clone)]
pub struct Outlet {
    /// One sender per shard of the reader; a single one when the rows stay in their shard.
    pub senders: Vec<Sender<Message>>,
    /// Key columns, where rows are scattered.
    pub keys: Option<Vec<usize>>,
}

/// A message on its way: outlet, sender of the outlet, message.
pub type Outgoing = Vec<(usize, usize, Message)>;

/// The fused stateless nodes of one shard of a stage.
pub struct Chain {
    plan: Arc<StreamPlan>,
    outlets: Vec<Outlet>,
    /// Outlet of an edge, by the node that reads it.
    by_reader: HashMap<NodeId, usize>,
    topics: Vec<Arc<str>>,
    lookups: Arc<Lookups>,
    hashes: Vec<u64>,
    /// Rows on which a view's expression failed, since they were last taken.
    pub dead: Vec<DeadLetter>,
    /// Rows of the nodes of the chain since they were last taken.
    pub counts: Counts,
}

impl Chain {
    /// `outlets` by the id of the node that reads them.
    pub fn new(
        plan: Arc<StreamPlan>,
        outlets: Vec<(NodeId, Outlet)>,
        topics: Vec<Arc<str>>,
        lookups: Arc<Lookups>,
    ) -> Self {
        let by_reader = outlets.iter().enumerate().map(|(at, (reader, _))| (*reader, at)).collect();
        let outlets = outlets.into_iter().map(|(_, outlet)| outlet).collect();
        let counts = Counts::default();
        Self { plan, outlets, by_reader, topics, lookups, hashes: Vec::new(), dead: Vec::new(), counts }
    }

    /// Whether anybody reads this port of the stage's first node.
    pub fn reads(&self, from: NodeId, port: Port) -> bool {
        self.plan.readers(from).any(|(_, edge)| edge.port == port)
    }

    /// Runs a batch through the chain.
    ///
    /// # Errors
    /// Internal only: rows that fail are dead letters.
    pub fn run(
        &mut self,
        from: NodeId,
        port: Port,
        batch: &ChangeBatch,
        reached: &Arc<Reached>,
        out: &mut Outgoing,
    ) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let plan = Arc::clone(&self.plan);
        for (reader, edge) in plan.readers(from) {
            if edge.port != port {
                continue;
            }
            if let Some(outlet) = self.by_reader.get(&reader) {
                self.send(*outlet, batch, reached, out)?;
                continue;
            }
            let mut failed = Failed::new();
            let (next, view) = match &plan.nodes[reader].kind {
                NodeKind::Filter { predicate, view } if port == Port::Latest => {
                    (filter_newest(predicate, batch, &mut failed)?, view)
                }
                NodeKind::Filter { predicate, view } => (filter(predicate, batch, &mut failed)?, view),
                NodeKind::Project { exprs, view } => {
                    (project(exprs, &plan.nodes[reader].schema, batch, &mut failed)?, view)
                }
                NodeKind::Lookup { spec, view, .. } => {
                    let table = self.lookups.get(&reader).map(|table| Arc::clone(&table.borrow()));
                    let table = table.ok_or_else(|| Error::internal("a look-up table was not read"))?;
                    (lookup(spec, &table, batch, port == Port::Latest, &mut failed)?, view)
                }
                NodeKind::Unnest { columns, list, keep_empty, view } => {
                    let schema = &plan.nodes[reader].schema;
                    (unnest(columns, *list, *keep_empty, schema, batch)?, view)
                }
                NodeKind::Union => {
                    // The branches call their columns differently.
                    let schema = Arc::clone(&plan.nodes[reader].schema);
                    let rows = RecordBatch::try_new(schema, batch.rows.columns().to_vec())?;
                    self.counts.through(reader, port, batch.num_rows(), batch.num_rows(), 0);
                    self.run(reader, port, &batch.with_rows(rows).with_branch(edge.branch), reached, out)?;
                    continue;
                }
                _ => return Err(Error::internal(format!("{} has no outlet", plan.nodes[reader].id))),
            };
            self.counts.through(reader, port, batch.num_rows(), next.num_rows(), failed.len());
            for (row, reason) in failed {
                let letter =
                    letters::of_row(Stage::Expression, view, "expression", &self.topics, batch, row, reason);
                self.dead.push(letter);
            }
            self.run(reader, port, &next, reached, out)?;
        }
        Ok(())
    }

    fn send(
        &mut self,
        at: usize,
        batch: &ChangeBatch,
        reached: &Arc<Reached>,
        out: &mut Outgoing,
    ) -> Result<()> {
        let outlet = &self.outlets[at];
        let message = |batch| Message::Changes { batch, reached: Arc::clone(reached) };
        match &outlet.keys {
            Some(keys) if outlet.senders.len() > 1 => {
                let columns: Vec<ArrayRef> =
                    keys.iter().map(|key| Arc::clone(batch.rows.column(*key))).collect();
                self.hashes.clear();
                hash_keys(&columns, batch.num_rows(), &mut self.hashes)?;
                for (shard, rows) in scatter(&self.hashes, outlet.senders.len()).iter().enumerate() {
                    match rows.values().len() {
                        0 => {}
                        all if all == batch.num_rows() => out.push((at, shard, message(batch.clone()))),
                        _ => out.push((at, shard, message(batch.take(rows)?))),
                    }
                }
            }
            _ => out.push((at, 0, message(batch.clone()))),
        }
        Ok(())
    }

    /// Queues a watermark or barrier for every sender of every outlet.
    pub fn broadcast(&self, message: &Message, out: &mut Outgoing) {
        for (at, outlet) in self.outlets.iter().enumerate() {
            out.extend((0..outlet.senders.len()).map(|shard| (at, shard, message.clone())));
        }
    }

    /// Sends what is queued, waiting for room.
    ///
    /// # Errors
    /// Internal: a reader is gone; its own error is reported by itself.
    pub async fn flush(&self, out: &mut Outgoing) -> Result<()> {
        for (at, shard, message) in out.drain(..) {
            self.outlets[at].senders[shard].send(message).await.map_err(|_| gone())?;
        }
        Ok(())
    }

    /// [`Chain::flush`] for a thread outside the async runtime.
    ///
    /// # Errors
    /// Internal: a reader is gone; its own error is reported by itself.
    pub fn flush_blocking(&self, out: &mut Outgoing) -> Result<()> {
        for (at, shard, message) in out.drain(..) {
            self.outlets[at].senders[shard].blocking_send(message).map_err(|_| gone())?;
        }
        Ok(())
    }
}

fn gone() -> Error {
    Error::internal("a task of the pipeline is gone")
}
