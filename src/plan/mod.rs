//! Statements → [`StreamPlan`]: what runs, in which order, and how rows are keyed.
//!
//! A plan is a DAG of nodes. An edge names the [`Port`] of its origin and, where the rows must meet by key, the
//! columns of the hash exchange. Chains of nodes between exchanges form a *stage*; a stage runs in one task per
//! shard. The source's stage is cut by partitions, a keyed stage by key groups.
//!
//! `Display` of a plan is what `EXPLAIN` and `millstream explain` print.

mod accept;
pub mod as_of;
pub mod changes;
mod closing;
mod fingerprint;
mod group;
mod join;
mod letters;
pub mod lower;
mod order;
mod prepared;
pub mod reach;
mod rebuild;
#[cfg(feature = "redis")]
pub mod remote;
mod retract;
pub mod sandbox;
pub mod session;
pub mod sinks;
pub mod source;
pub mod tables;
mod targets;
pub mod views;
mod window;

use std::fmt;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use datafusion::physical_plan::PhysicalExpr;

use crate::error::Result;
use crate::operators::group::GroupSpec;
use crate::operators::lookup::LookupSpec;
use crate::operators::over::OverSpec;
use crate::stream::Port;

pub use sinks::{OnlineKind, SinkKind, SinkPlan};
pub use source::{SourceKind, SourcePlan};
use tables::BoundedTable;

/// Index of a node in its plan. Inputs come before the nodes that read them.
pub type NodeId = usize;

#[derive(Debug, Clone)]
pub struct Edge {
    pub from: NodeId,
    pub port: Port,
    /// Key columns of the hash exchange on this edge; `None` when the rows stay in their task.
    pub exchange: Option<Vec<usize>>,
    /// What a UNION adds to the branch of the rows, for the total order.
    pub branch: u8,
}

#[derive(Debug, Clone)]
pub struct Node {
    /// Stable across restarts as long as the SQL is: names state files and manifest entries.
    pub id: String,
    pub kind: NodeKind,
    /// None for a source, several for a UNION, else one.
    pub inputs: Vec<Edge>,
    /// Schema of the rows that leave the node (of the rows that enter it, for a sink).
    pub schema: SchemaRef,
}

#[derive(Debug, Clone)]
pub enum NodeKind {
    Source(SourcePlan),
    /// What could not become rows: the second root, beside the source.
    Letters,
    Filter {
        predicate: Arc<dyn PhysicalExpr>,
        view: Arc<str>,
    },
    Project {
        exprs: Vec<Arc<dyn PhysicalExpr>>,
        view: Arc<str>,
    },
    Over(OverSpec),
    Group(GroupSpec),
    /// UNION ALL of stateless branches.
    Union,
    /// Join with a bounded table.
    Lookup {
        spec: LookupSpec,
        table: BoundedTable,
        view: Arc<str>,
    },
    /// Join with a table that stays where it is: a task of its own.
    #[cfg(feature = "redis")]
    Remote {
        spec: LookupSpec,
        table: Box<remote::RemoteTable>,
        view: Arc<str>,
    },
    /// One row per element of a list.
    Unnest {
        /// Input column of each output column; that of the list stands for its elements.
        columns: Vec<usize>,
        list: usize,
        /// A row without elements stays, with NULL.
        keep_empty: bool,
        view: Arc<str>,
    },
    Sink(SinkPlan),
}

impl NodeKind {
    /// The view in whose name a step refuses rows; `None` for those that refuse none, and sinks.
    pub fn view(&self) -> Option<&str> {
        match self {
            Self::Filter { view, .. }
            | Self::Project { view, .. }
            | Self::Lookup { view, .. }
            | Self::Unnest { view, .. } => Some(view),
            #[cfg(feature = "redis")]
            Self::Remote { view, .. } => Some(view),
            Self::Source(_)
            | Self::Letters
            | Self::Over(_)
            | Self::Group(_)
            | Self::Union
            | Self::Sink(_) => None,
        }
    }
}

/// What a set of sinks needs to run.
#[derive(Debug, Clone, Default)]
pub struct StreamPlan {
    pub nodes: Vec<Node>,
}

impl StreamPlan {
    /// The only source of the plan (one per pipeline so far; `lower` refuses more).
    pub fn source(&self) -> Option<(NodeId, &SourcePlan)> {
        self.nodes.iter().enumerate().find_map(|(id, node)| match &node.kind {
            NodeKind::Source(source) => Some((id, source)),
            _ => None,
        })
    }

    /// The root of the sinks that read `dead_letters`, if there are some.
    pub fn letters(&self) -> Option<NodeId> {
        self.nodes.iter().position(|node| matches!(node.kind, NodeKind::Letters))
    }

    /// Whether a node's rows are dead letters.
    pub fn reads_letters(&self, id: NodeId) -> bool {
        matches!(self.nodes[id].kind, NodeKind::Letters)
            || self.nodes[id].inputs.first().is_some_and(|edge| self.reads_letters(edge.from))
    }

    pub fn sinks(&self) -> impl Iterator<Item = (NodeId, &SinkPlan)> {
        self.nodes.iter().enumerate().filter_map(|(id, node)| match &node.kind {
            NodeKind::Sink(sink) => Some((id, sink)),
            _ => None,
        })
    }

    /// The part of the plan that some sinks need. Nodes keep their ids; their numbers are new.
    pub fn only(&self, sinks: &[NodeId]) -> Self {
        let mut needed: Vec<bool> = (0..self.nodes.len()).map(|id| sinks.contains(&id)).collect();
        // Inputs come before the nodes that read them.
        for id in (0..self.nodes.len()).rev() {
            if needed[id] {
                self.nodes[id].inputs.iter().for_each(|edge| needed[edge.from] = true);
            }
        }
        let (mut nodes, mut numbers) = (Vec::new(), vec![0; self.nodes.len()]);
        for (id, node) in self.nodes.iter().enumerate().filter(|(id, _)| needed[*id]) {
            numbers[id] = nodes.len();
            let mut node = node.clone();
            node.inputs.iter_mut().for_each(|edge| edge.from = numbers[edge.from]);
            nodes.push(node);
        }
        Self { nodes }
    }

    /// Finds what the secrets among the options stand for (`environment` gives the variables): right before the plan is
    /// run, as `check` and `explain` need none.
    ///
    /// # Errors
    /// A user error at the option's place: a variable that is not set, a file that cannot be read.
    pub fn resolve_secrets(&mut self, environment: &dyn Fn(&str) -> Option<String>) -> Result<()> {
        for node in &mut self.nodes {
            match &mut node.kind {
                #[cfg(feature = "kafka")]
                NodeKind::Source(SourcePlan { kind: SourceKind::Kafka(config), .. }) => {
                    config.settings.resolve_secrets(environment)?;
                }
                #[cfg(feature = "redis")]
                NodeKind::Remote { table, .. } => table.config.resolve_secrets(environment)?,
                NodeKind::Sink(sink) => sink.resolve_secrets(environment)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Nodes that read from `id`, with their edges.
    pub fn readers(&self, id: NodeId) -> impl Iterator<Item = (NodeId, &Edge)> {
        self.nodes.iter().enumerate().flat_map(move |(reader, node)| {
            node.inputs.iter().filter(move |edge| edge.from == id).map(move |edge| (reader, edge))
        })
    }

    /// What a node means in the first format of [`fingerprint`], for states that were written with it.
    pub fn fingerprint_v1(&self, id: NodeId) -> String {
        let mut text = self.describe(id);
        match &self.nodes[id].inputs[..] {
            [] => {}
            [edge] => text.push_str(&format!(" <- [{}] {}", edge.port, self.fingerprint_v1(edge.from))),
            edges => {
                for edge in edges {
                    text.push_str(&format!(" <- ([{}] {})", edge.port, self.fingerprint_v1(edge.from)));
                }
            }
        }
        text
    }

    fn describe(&self, id: NodeId) -> String {
        let node = &self.nodes[id];
        let columns = || node.schema.fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>();
        match &node.kind {
            NodeKind::Source(source) => format!("Source {}: {source}", source.name),
            NodeKind::Letters => "Dead letters".to_owned(),
            NodeKind::Filter { predicate, .. } => format!("Filter: {predicate}"),
            NodeKind::Project { exprs, .. } => {
                let pairs: Vec<String> = exprs
                    .iter()
                    .zip(columns())
                    .map(|(expr, name)| match expr.to_string() {
                        text if is_column(&text, name) => name.to_owned(),
                        text => format!("{text} AS {name}"),
                    })
                    .collect();
                format!("Project: {}", pairs.join(", "))
            }
            NodeKind::Over(spec) => format!("Over: {}", describe_over(spec)),
            NodeKind::Union => "Union".to_owned(),
            NodeKind::Lookup { spec, table, .. } => describe_lookup(spec, table, &columns()),
            #[cfg(feature = "redis")]
            NodeKind::Remote { spec, table, .. } => {
                let join = if spec.outer { "left join" } else { "join" };
                let (name, key) = (&table.name, table.config.key.join(", "));
                format!("Lookup: {join} redis {name} by {key}, cached for {:?} (not replayable)", table.cache)
            }
            NodeKind::Unnest { columns, list, .. } => {
                let of = columns.iter().position(|column| column == list).unwrap_or_default();
                format!("Unnest: {}", node.schema.field(of).name())
            }
            NodeKind::Group(spec) => format!("Group: {}", describe_group(spec)),
            NodeKind::Sink(sink) => format!("Sink {}: {sink}", sink.name),
        }
    }
}

/// Whether an expression is nothing but the column of that name: `amount@2`, not `amount@2 + 1`.
fn is_column(text: &str, name: &str) -> bool {
    let place = text.strip_prefix(name).and_then(|rest| rest.strip_prefix('@'));
    place.is_some_and(|place| place.bytes().all(|byte| byte.is_ascii_digit()))
}

fn describe_group(spec: &GroupSpec) -> String {
    let name = |column: usize| spec.input.field(column).name().as_str();
    let keys: Vec<&str> = spec.keys.iter().map(|column| name(*column)).collect();
    let calls: Vec<String> = spec
        .calls
        .iter()
        .map(|call| {
            let filter = call.filter.map(|column| format!(" filter {}", name(column))).unwrap_or_default();
            let arguments: Vec<&str> = call.arguments.iter().map(|column| name(*column)).collect();
            let distinct = if call.function.is_distinct() { "distinct " } else { "" };
            format!("{}({distinct}{}){filter}", call.function.fun().name(), arguments.join(", "))
        })
        .collect();
    let closes = spec.closing.map(|closing| {
        let bound = crate::sql::interval::display_micros(closing.bound);
        format!(", closed at {} + {bound}", keys[closing.key])
    });
    format!("by {} [{}]{}", keys.join(", "), calls.join("; "), closes.unwrap_or_default())
}

/// `columns`: of the joined rows.
fn describe_lookup(spec: &LookupSpec, table: &BoundedTable, columns: &[&str]) -> String {
    let first = if spec.stream_first { 0 } else { columns.len() - spec.width };
    let key = |key: &usize| if *key < spec.width { columns[first + key] } else { "an expression" };
    let keys: Vec<&str> = spec.keys.iter().map(key).collect();
    let join = if spec.outer { "left join" } else { "join" };
    let filter = spec.filter.as_ref().map(|filter| format!(" and {filter}")).unwrap_or_default();
    let refresh = table.refresh.map(|every| format!(", read again every {every:?} (not replayable)"));
    format!("Lookup: {join} {} by {}{filter}{}", table.name(), keys.join(", "), refresh.unwrap_or_default())
}

fn describe_over(spec: &OverSpec) -> String {
    use crate::operators::over::Frame;
    let name = |column: usize| spec.input.field(column).name().as_str();
    let keys: Vec<&str> = spec.partition_by.iter().map(|column| name(*column)).collect();
    let calls: Vec<String> = spec
        .calls
        .iter()
        .map(|call| {
            let argument = call.argument.map_or("*", name);
            let filter = call.filter.map(|column| format!(" filter {}", name(column))).unwrap_or_default();
            let frame = match call.frame {
                Frame::Unbounded => "unbounded".to_owned(),
                Frame::Preceding { micros } => {
                    format!("{} preceding", crate::sql::interval::display_micros(micros))
                }
            };
            format!("{:?}({argument}){filter} {frame}", call.function).to_lowercase()
        })
        .collect();
    format!("by {} [{}]", keys.join(", "), calls.join("; "))
}

/// The tree of every sink, inputs indented below; a node that several read is printed once and referred to by id.
impl fmt::Display for StreamPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut seen = vec![false; self.nodes.len()];
        for (id, _) in self.sinks() {
            self.fmt_node(f, id, 0, &mut seen)?;
        }
        Ok(())
    }
}

impl StreamPlan {
    fn fmt_node(
        &self,
        f: &mut fmt::Formatter<'_>,
        id: NodeId,
        depth: usize,
        seen: &mut [bool],
    ) -> fmt::Result {
        let indent = "  ".repeat(depth);
        let again = std::mem::replace(&mut seen[id], true) && self.readers(id).count() > 1;
        if again {
            return writeln!(f, "{indent}#{id} (see above)");
        }
        let shared = if self.readers(id).count() > 1 { format!("#{id} ") } else { String::new() };
        writeln!(f, "{indent}{shared}{}", self.describe(id))?;
        for edge in &self.nodes[id].inputs {
            self.fmt_edge(f, edge, depth, seen)?;
        }
        Ok(())
    }

    fn fmt_edge(
        &self,
        f: &mut fmt::Formatter<'_>,
        edge: &Edge,
        depth: usize,
        seen: &mut [bool],
    ) -> fmt::Result {
        let indent = "  ".repeat(depth);
        let exchange = match &edge.exchange {
            Some(keys) => {
                let schema = &self.nodes[edge.from].schema;
                let names: Vec<&str> = keys.iter().map(|key| schema.field(*key).name().as_str()).collect();
                format!(", exchange by {}", names.join(", "))
            }
            None => String::new(),
        };
        writeln!(f, "{indent}  [{} rows{exchange}]", edge.port)?;
        self.fmt_node(f, edge.from, depth + 1, seen)
    }
}
