//! Changed SQL: which views and sinks of a plan keep the state that they have, by their [fingerprints](super::fingerprint).
//!
//! A sink is known by its name. An OVER or GROUP BY of a view is known by what it means: a state is found again when
//! views are renamed, added or removed around it, and the node then goes on under the id that the state has
//! ([`StreamPlan::adopt`]). One whose meaning is nowhere in the state, in a view that has state of the same kind which
//! nothing else claims, is changed; else it is new. So is one that only new sinks read: nothing that was written would be
//! mixed with its rows.

use std::collections::{BTreeMap, BTreeSet};

use crate::plan::{NodeId, NodeKind, StreamPlan};

/// What is said of one view or sink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    pub name: String,
    pub sink: bool,
    pub change: Change,
}

impl Item {
    pub fn is_changed(&self) -> bool {
        matches!(self.change, Change::Changed(_))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The state has nothing of it.
    New,
    /// It goes on with its state.
    Kept,
    /// Its state belongs to another meaning; the lines that differ.
    Changed(Vec<String>),
    /// The SQL has it no more.
    Gone,
}

/// A plan beside the fingerprints of a state.
#[derive(Debug, Default)]
pub struct Comparison {
    /// In the order of the plan, then what is gone.
    pub items: Vec<Item>,
    /// Ids of nodes in the state that the plan does not have.
    pub gone: BTreeSet<String>,
    /// Sinks of the plan that the state does not have.
    pub new: Vec<NodeId>,
    /// Sinks of the plan that mean something else than in the state, and what they meant.
    pub differ: Vec<(NodeId, String)>,
    ids: Vec<(NodeId, String)>,
}

impl Comparison {
    /// The first that is changed.
    pub fn changed(&self) -> Option<(&Item, &[String])> {
        self.items.iter().find_map(|item| match &item.change {
            Change::Changed(lines) => Some((item, lines.as_slice())),
            _ => None,
        })
    }

    fn add(&mut self, name: &str, sink: bool, change: Change) {
        // The query of a sink is a view of the sink's name.
        match self.items.iter_mut().find(|item| item.name == name && item.change == change) {
            Some(known) => known.sink |= sink,
            None => self.items.push(Item { name: name.to_owned(), sink, change }),
        }
    }
}

impl StreamPlan {
    /// Nodes whose fingerprints a manifest holds.
    pub fn stateful(&self) -> impl Iterator<Item = NodeId> {
        let of = |kind: &NodeKind| matches!(kind, NodeKind::Over(_) | NodeKind::Group(_) | NodeKind::Sink(_));
        (0..self.nodes.len()).filter(move |id| of(&self.nodes[*id].kind))
    }

    /// Compares with the fingerprints of a state, by the ids of its nodes. `may_differ`: a sink that goes on although it
    /// differs.
    pub fn compare(
        &self,
        known: &BTreeMap<String, String>,
        may_differ: &dyn Fn(NodeId, &str) -> bool,
    ) -> Comparison {
        let mut compared = Comparison::default();
        let mut left: BTreeSet<&str> = known.keys().map(String::as_str).collect();
        let matches = self.matches(known, &mut left, may_differ);
        let mut taken: BTreeSet<String> = known.keys().cloned().collect();
        for id in self.stateful() {
            let node = &self.nodes[id];
            let (sink, name) = (matches!(node.kind, NodeKind::Sink(_)), view_of(&node.id));
            let name = if sink { node.id.as_str() } else { name };
            let (change, found) = match matches.get(&id) {
                Some(found) => (Change::Kept, Some((*found).to_owned())),
                None if !self.feeds_known(id, known) => (Change::New, None),
                None => match left.iter().copied().find(|other| self.same_place(id, other, &known[*other])) {
                    Some(other) => {
                        left.remove(other);
                        (Change::Changed(self.difference(id, &known[other])), Some(other.to_owned()))
                    }
                    None => (Change::New, None),
                },
            };
            match &change {
                Change::New if sink => compared.new.push(id),
                Change::Changed(_) if sink => compared.differ.push((id, known[&node.id].clone())),
                _ => {}
            }
            compared.add(name, sink, change);
            let own = found.unwrap_or_else(|| unused(&node.id, &taken));
            taken.insert(own.clone());
            compared.ids.push((id, own));
        }
        for gone in left {
            let sink = is_sink(&known[gone]);
            let name = if sink { gone } else { view_of(gone) };
            compared.add(name, sink, Change::Gone);
            compared.gone.insert(gone.to_owned());
        }
        compared
    }

    /// The nodes that mean what a node of the state means: under their own id if they can, else under another one.
    fn matches<'k>(
        &self,
        known: &'k BTreeMap<String, String>,
        left: &mut BTreeSet<&'k str>,
        may_differ: &dyn Fn(NodeId, &str) -> bool,
    ) -> BTreeMap<NodeId, &'k str> {
        let mut found = BTreeMap::new();
        for id in self.stateful() {
            if let Some((own, text)) = known.get_key_value(&self.nodes[id].id)
                && (self.means(id, text) || may_differ(id, text))
            {
                left.remove(own.as_str());
                found.insert(id, own.as_str());
            }
        }
        for id in self.stateful().filter(|id| !matches!(self.nodes[*id].kind, NodeKind::Sink(_))) {
            if found.contains_key(&id) {
                continue;
            }
            if let Some(other) = left.iter().copied().find(|other| self.means(id, &known[*other])) {
                left.remove(other);
                found.insert(id, other);
            }
        }
        found
    }

    /// Whether a sink that the state has is this node or reads it.
    fn feeds_known(&self, id: NodeId, known: &BTreeMap<String, String>) -> bool {
        match &self.nodes[id].kind {
            NodeKind::Sink(_) => known.get(&self.nodes[id].id).is_some_and(|text| is_sink(text)),
            _ => self.readers(id).any(|(reader, _)| self.feeds_known(reader, known)),
        }
    }

    /// Whether a node of the state that means something else has the place of this one.
    fn same_place(&self, id: NodeId, other: &str, text: &str) -> bool {
        let node = &self.nodes[id];
        match &node.kind {
            NodeKind::Sink(_) => node.id == other && is_sink(text),
            _ => !is_sink(text) && stem(&node.id) == stem(other),
        }
    }

    /// Gives the nodes the ids under which the state knows them.
    pub fn adopt(&mut self, compared: &Comparison) {
        for (id, name) in &compared.ids {
            self.nodes[*id].id.clone_from(name);
        }
    }
}

/// Both formats begin with the node itself.
fn is_sink(fingerprint: &str) -> bool {
    let first = fingerprint.lines().find(|line| !line.starts_with("fingerprint ")).unwrap_or_default();
    first.starts_with("sink ") || first.starts_with("Sink ")
}

/// `view.over3` → `view.over`.
fn stem(id: &str) -> &str {
    id.trim_end_matches(|c: char| c.is_ascii_digit())
}

fn view_of(id: &str) -> &str {
    id.rsplit_once('.').map_or(id, |(view, _)| view)
}

/// The id itself, or the next one that nothing in the state has.
fn unused(id: &str, taken: &BTreeSet<String>) -> String {
    let more = (0..).map(|number| format!("{}{number}", stem(id)));
    std::iter::once(id.to_owned()).chain(more).find(|id| !taken.contains(id)).unwrap_or_default()
}
