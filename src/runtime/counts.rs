//! Counting rows per node: raised per batch by the tasks, reported with the barrier, added up in the manifest.
//!
//! See [`accounts`](crate::state::accounts) for what the numbers mean and what must hold of them.

use std::collections::{BTreeMap, BTreeSet};

use crate::plan::{Edge, NodeId, NodeKind, SinkKind, StreamPlan};
use crate::state::accounts::{Input, NodeAccounts, Role, rows_out};
use crate::state::manifest::{Manifest, PreparedFile};
use crate::stream::{DeadLetter, Port};

/// What a task counted of a node in an epoch; `held` and `waiting` are what there is at its end.
#[derive(Debug, Default, Clone)]
pub struct Count {
    pub rows_in: u64,
    pub rows_out: BTreeMap<Port, u64>,
    pub filtered: u64,
    pub added: u64,
    pub late: u64,
    pub dead_letters: u64,
    pub settled: u64,
    pub held: u64,
    pub written: u64,
    pub waiting: u64,
}

/// Counts of the nodes that a task runs.
#[derive(Debug, Default)]
pub struct Counts(BTreeMap<NodeId, Count>);

impl Counts {
    pub fn of(&mut self, node: NodeId) -> &mut Count {
        self.0.entry(node).or_default()
    }

    /// Rows leave a node.
    pub fn out(&mut self, node: NodeId, port: Port, rows: usize) {
        *self.of(node).rows_out.entry(port).or_default() += rows as u64;
    }

    /// A batch went through a stateless node.
    pub fn through(&mut self, node: NodeId, port: Port, rows_in: usize, rows_out: usize, dead: usize) {
        let count = self.of(node);
        count.rows_in += rows_in as u64;
        count.dead_letters += dead as u64;
        // At most one of the two is not 0.
        count.filtered += rows_in.saturating_sub(rows_out + dead) as u64;
        count.added += (rows_out + dead).saturating_sub(rows_in) as u64;
        *count.rows_out.entry(port).or_default() += rows_out as u64;
    }

    /// Rows of a table are counted where they lie.
    pub fn prepared(&mut self, node: NodeId, count: Count, files: &[PreparedFile]) {
        let written = files.iter().map(|file| file.rows).sum();
        self.of(node).add(Count { written, ..count });
    }

    pub fn merge(&mut self, other: Counts) {
        other.0.into_iter().for_each(|(node, count)| self.of(node).add(count));
    }
}

impl Count {
    fn add(&mut self, other: Count) {
        self.rows_in += other.rows_in;
        other.rows_out.into_iter().for_each(|(port, rows)| *self.rows_out.entry(port).or_default() += rows);
        self.filtered += other.filtered;
        self.added += other.added;
        self.late += other.late;
        self.dead_letters += other.dead_letters;
        self.settled += other.settled;
        self.held += other.held;
        self.written += other.written;
        self.waiting += other.waiting;
    }
}

/// Adds an epoch's counts to the totals of `next`, which has the totals of `last` and its own source's.
pub fn fill(plan: &StreamPlan, last: &Manifest, next: &mut Manifest, mut counts: Counts) {
    let mut anew: Vec<bool> = Vec::with_capacity(plan.nodes.len());
    for (at, node) in plan.nodes.iter().enumerate() {
        let Some(role) = role(&node.kind) else {
            anew.push(false);
            continue;
        };
        let count = std::mem::take(counts.of(at));
        let input = |edge: &Edge| {
            let (from, port) = (&plan.nodes[edge.from].id, edge.port.to_string());
            let before = if anew[edge.from] { 0 } else { rows_out(last, from, &port).unwrap_or(0) };
            Input { node: from.clone(), port, before }
        };
        let inputs: Vec<Input> = node.inputs.iter().map(input).collect();
        let goes_on = !node.inputs.iter().any(|edge| anew[edge.from]);
        let same = |known: &NodeAccounts| {
            let names = |(a, b): (&Input, &Input)| a.node == b.node && a.port == b.port;
            known.inputs.len() == inputs.len() && known.inputs.iter().zip(&inputs).all(names)
        };
        let progress = next.nodes.entry(node.id.clone()).or_default();
        let known = progress.accounts.take().filter(|known| goes_on && same(known));
        anew.push(known.is_none());
        let mut accounts = known.unwrap_or_else(|| {
            let held_before = match last.nodes.contains_key(&node.id) {
                // A restored state held rows already.
                true => (count.settled + count.held + count.late).saturating_sub(count.rows_in),
                false => 0,
            };
            NodeAccounts { role, inputs, held_before, ..NodeAccounts::default() }
        });
        add(&mut accounts, count);
        progress.accounts = Some(accounts);
    }
    let known: BTreeSet<&str> = plan.nodes.iter().map(|node| node.id.as_str()).collect();
    // What is no longer in the plan misses rows from now on.
    next.nodes
        .iter_mut()
        .filter(|(id, _)| !known.contains(id.as_str()))
        .for_each(|(_, gone)| gone.accounts = None);
}

fn add(accounts: &mut NodeAccounts, count: Count) {
    accounts.rows_in += count.rows_in;
    for (port, rows) in count.rows_out {
        *accounts.rows_out.entry(port.to_string()).or_default() += rows;
    }
    accounts.filtered += count.filtered;
    accounts.added += count.added;
    accounts.late += count.late;
    accounts.dead_letters += count.dead_letters;
    accounts.settled += count.settled;
    accounts.written += count.written;
    (accounts.held, accounts.waiting) = (count.held, count.waiting);
}

/// Adds dead letters to the totals per kind.
pub fn letters(next: &mut Manifest, dead: &[DeadLetter]) {
    for letter in dead {
        let kinds = next.letters.entry(letter.at.to_string()).or_default();
        *kinds.entry(letter.kind.to_owned()).or_default() += 1;
    }
}

/// `None`: a source, which has accounts of its own.
fn role(kind: &NodeKind) -> Option<Role> {
    match kind {
        NodeKind::Source(_) => None,
        NodeKind::Over(_) => Some(Role::Over),
        NodeKind::Group(_) => Some(Role::Group),
        NodeKind::Sink(sink) => Some(match &sink.kind {
            SinkKind::Online { .. } => Role::KeyedSink,
            // A changelog keeps every change, an upserted table the last of a key.
            #[cfg(feature = "delta")]
            SinkKind::Delta(config) if !config.mode.key().is_empty() => Role::KeyedSink,
            _ => Role::Sink,
        }),
        _ => Some(Role::Stateless),
    }
}
