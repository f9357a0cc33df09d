//! Logical plan → nodes: one exhaustive match. What cannot run incrementally is refused here, never at run time.
//!
//! Next to each node we keep what its readers must know ([`Lowered`]): which column still is the event time, which
//! columns are the keys the rows are partitioned by, and whether rows were dropped above a window.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::common::DFSchema;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::logical_expr::{Distinct, Expr, LogicalPlan, Projection, TableScan, Union, Unnest};
use datafusion::physical_plan::PhysicalExpr;
use datafusion::physical_plan::expressions::{CastExpr, Column as PhysicalColumn};
use datafusion::prelude::SessionContext;

use crate::error::{Error, Place, Result};
use crate::plan::closing::{Closes, Origins};
use crate::plan::window::contains_window;
use crate::plan::{Edge, Node, NodeId, NodeKind, StreamPlan};
use crate::sql::CreateTable;
use crate::stream::{Port, letters, timestamp_type};

/// Which rows of a view a sink wants (DESIGN §3 *Emissions*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Emission {
    Final,
    Latest,
    Changes,
}

/// A lowered sub-plan: where its rows come from and what is known of its columns.
#[derive(Debug, Clone)]
pub struct Lowered {
    pub node: NodeId,
    pub port: Port,
    /// The output column that is the source's event time, unchanged.
    pub time: Option<usize>,
    /// Above an OVER: the output columns that are its partition keys, `None` where a key was projected away.
    pub keys: Option<Vec<Option<usize>>>,
    /// A filter stands above an OVER.
    pub filtered_above_window: bool,
    /// Rows come with weights and never close: a GROUP BY stands below.
    pub updating: bool,
    /// Per column, when a group of its rows is complete.
    pub closes: Vec<Option<Closes>>,
    /// The keys by which the rows are dealt out to shards: all, but for the windows of a GROUP BY.
    pub dealt: Vec<Option<usize>>,
    /// A HAVING stands above a GROUP BY.
    pub having: bool,
    /// A GROUP BY over rows that change stands below: its keys depend on how the input was cut.
    pub retracts: bool,
    /// UNION branches that the rows come from; 1 without a UNION.
    pub branches: u8,
}

impl Lowered {
    /// Rows of a stateless node, of whose columns nothing is known.
    fn stateless(node: NodeId, port: Port) -> Self {
        Self {
            node,
            port,
            time: None,
            keys: None,
            filtered_above_window: false,
            updating: false,
            closes: Vec::new(),
            dealt: Vec::new(),
            having: false,
            retracts: false,
            branches: 1,
        }
    }
}

/// Builds one [`StreamPlan`] from several sinks; equal OVER nodes are shared.
pub struct Lowering<'a> {
    session: &'a SessionContext,
    /// The bounded tables of the catalog.
    pub(super) tables: &'a [CreateTable],
    pub plan: StreamPlan,
    sources: HashMap<String, (NodeId, Option<usize>)>,
    shared: HashMap<(LogicalPlan, Emission), Lowered>,
    pub(super) origins: Origins,
}

impl<'a> Lowering<'a> {
    pub fn new(session: &'a SessionContext, tables: &'a [CreateTable]) -> Self {
        Self {
            session,
            tables,
            plan: StreamPlan::default(),
            sources: HashMap::new(),
            shared: HashMap::new(),
            origins: Origins::default(),
        }
    }

    /// An empty plan over the same sources.
    pub fn scratch(&self) -> Self {
        let mut scratch = Self::new(self.session, self.tables);
        for node in &self.plan.nodes {
            match &node.kind {
                NodeKind::Source(source) => {
                    scratch.add_source(source.clone());
                }
                NodeKind::Letters => scratch.add_letters(),
                _ => {}
            }
        }
        scratch
    }

    /// Adds a source node; its rows can then be scanned by name.
    pub fn add_source(&mut self, source: crate::plan::SourcePlan) -> NodeId {
        let (name, schema, time) = (source.name.clone(), Arc::clone(&source.schema), source.event_time);
        let node = self.add(format!("{name}.source"), NodeKind::Source(source), None, schema);
        self.sources.insert(name, (node, time));
        node
    }

    /// Adds the root of dead letters, once.
    pub fn add_letters(&mut self) {
        if self.plan.letters().is_none() {
            let node = self.add(letters::NAME.to_owned(), NodeKind::Letters, None, letters::schema());
            self.sources.insert(letters::NAME.to_owned(), (node, None));
        }
    }

    pub fn add(&mut self, id: String, kind: NodeKind, input: Option<Edge>, schema: SchemaRef) -> NodeId {
        self.add_union(id, kind, input.into_iter().collect(), schema)
    }

    fn add_union(&mut self, id: String, kind: NodeKind, inputs: Vec<Edge>, schema: SchemaRef) -> NodeId {
        self.plan.nodes.push(Node { id, kind, inputs, schema });
        self.plan.nodes.len() - 1
    }

    /// Lowers the plan of `view` for one emission.
    ///
    /// # Errors
    /// A user error at `place` that names the construct which cannot run as a stream yet.
    pub fn lower(
        &mut self,
        plan: &LogicalPlan,
        emission: Emission,
        view: &str,
        place: &Place,
    ) -> Result<Lowered> {
        let known = (plan.clone(), emission);
        if let Some(done) = self.shared.get(&known) {
            return Ok(done.clone());
        }
        if has_subquery(plan)? {
            let hint = "Write it as a JOIN with a table; NOT IN as a LEFT JOIN with WHERE key IS NULL.";
            let message = format!("{view}: a subquery in an expression cannot run as a stream yet");
            return Err(Error::user(message).hint(hint).at(place.clone()));
        }
        let closes = contains_window(plan);
        let done = self.step(plan, emission, closes, view, place)?;
        self.shared.insert(known, done.clone());
        Ok(done)
    }

    pub(super) fn step(
        &mut self,
        plan: &LogicalPlan,
        e: Emission,
        closes: bool,
        view: &str,
        at: &Place,
    ) -> Result<Lowered> {
        let refuse = |what: &str, word: &str, hint: &str| {
            let place = crate::sql::place::find_word(at, word).unwrap_or_else(|| at.clone());
            Err(Error::user(format!("{view}: {what} cannot run as a stream yet")).hint(hint).at(place))
        };
        let later = "This version runs SELECT, WHERE, GROUP BY, TUMBLE and HOP, OVER windows, look-up joins, UNION ALL and UNNEST; the rest comes step by step.";
        match plan {
            LogicalPlan::TableScan(scan) => self.scan(scan, closes, view, at),
            LogicalPlan::SubqueryAlias(alias) => self.step(&alias.input, e, closes, alias.alias.table(), at),
            LogicalPlan::Projection(projection) => self.projection(projection, e, closes, view, at),
            LogicalPlan::Filter(filter) => {
                let input = self.step(&filter.input, e, closes, view, at)?;
                let predicate = self.physical(&filter.predicate, &filter.input)?;
                let schema = Arc::clone(&self.plan.nodes[input.node].schema);
                let kind = NodeKind::Filter { predicate, view: view.into() };
                let node = self.chain(view, "filter", kind, &input, schema);
                let above = input.filtered_above_window || input.keys.is_some() && !input.updating;
                Ok(Lowered { node, having: input.updating, filtered_above_window: above, ..input })
            }
            LogicalPlan::Window(window) => self.window(window, e, closes, view, at),
            LogicalPlan::Aggregate(aggregate) => self.group(aggregate, e, view, at),
            LogicalPlan::Sort(_) => refuse(
                "ORDER BY of a whole stream",
                "ORDER",
                "A stream has no end to sort at; sort in the query that reads the sink.",
            ),
            LogicalPlan::Limit(_) => refuse("LIMIT", "LIMIT", "A stream has no first rows to stop after."),
            LogicalPlan::Join(join) => self.join(join, e, closes, view, at),
            LogicalPlan::Union(union) => self.union(union, e, closes, view, at),
            LogicalPlan::Distinct(Distinct::All(input)) => self.distinct(input, e, view, at),
            LogicalPlan::Distinct(Distinct::On(_)) => refuse("DISTINCT ON", "DISTINCT", later),
            LogicalPlan::Unnest(unnest) => self.unnest(unnest, e, closes, view, at),
            LogicalPlan::Subquery(_) => refuse("a subquery expression", "SELECT", later),
            LogicalPlan::Values(_) => refuse("VALUES", "VALUES", "A view reads a source."),
            LogicalPlan::EmptyRelation(_) => {
                refuse("a query without FROM", "SELECT", "A view reads a source.")
            }
            LogicalPlan::RecursiveQuery(_) => refuse("WITH RECURSIVE", "RECURSIVE", later),
            LogicalPlan::Repartition(_)
            | LogicalPlan::Statement(_)
            | LogicalPlan::Explain(_)
            | LogicalPlan::Analyze(_)
            | LogicalPlan::Extension(_)
            | LogicalPlan::Dml(_)
            | LogicalPlan::Ddl(_)
            | LogicalPlan::Copy(_)
            | LogicalPlan::DescribeTable(_) => {
                refuse("this statement", "", "A view is a SELECT over a source.")
            }
        }
    }

    fn scan(&mut self, scan: &TableScan, closes: bool, view: &str, place: &Place) -> Result<Lowered> {
        let name = scan.table_name.table();
        let Some((node, time)) = self.sources.get(name).copied() else {
            return Err(
                Error::user(format!("{view}: {name} is not a source of this pipeline")).at(place.clone())
            );
        };
        // Views that close by time ignore late rows, in every emission (DESIGN §3 *Late*).
        let port = if closes { Port::OnTime } else { Port::Accepted };
        let schema = Arc::clone(&self.plan.nodes[node].schema);
        let mut closes = vec![None; schema.fields().len()];
        if let Some(time) = time {
            closes[time] = Some(Closes::time(self.origins.of(node, &column_at(&schema, time))));
        }
        let source = Lowered { time, closes, ..Lowered::stateless(node, port) };
        let Some(columns) = &scan.projection else { return Ok(source) };
        if columns.iter().copied().eq(0..schema.fields().len()) {
            return Ok(source);
        }
        self.select(&source, columns, view)
    }

    fn projection(
        &mut self,
        projection: &Projection,
        e: Emission,
        closes: bool,
        view: &str,
        place: &Place,
    ) -> Result<Lowered> {
        let input = self.step(&projection.input, e, closes, view, place)?;
        self.project(projection, &input, view)
    }

    /// A projection of rows that are lowered already.
    pub(super) fn project(
        &mut self,
        projection: &Projection,
        input: &Lowered,
        view: &str,
    ) -> Result<Lowered> {
        let exprs: Vec<Arc<dyn PhysicalExpr>> = projection
            .expr
            .iter()
            .map(|expr| self.physical(expr, &projection.input))
            .collect::<Result<_>>()?;
        let from = |column: usize| exprs.iter().position(|expr| column_index(expr) == Some(column));
        let time = input.time.and_then(from);
        let moved = |keys: &Vec<Option<usize>>| keys.iter().map(|key| key.and_then(from)).collect();
        let (keys, dealt) = (input.keys.as_ref().map(moved), moved(&input.dealt));
        let closes = exprs.iter().map(|expr| self.closes(expr, input.node, &input.closes)).collect();
        let schema = plain_schema(projection.schema.as_arrow());
        let kind = NodeKind::Project { exprs, view: view.into() };
        let node = self.chain(view, "project", kind, input, schema);
        Ok(Lowered { node, time, keys, dealt, closes, ..input.clone() })
    }

    /// UNION ALL: the branches are stateless, so their rows meet in the task that read them.
    fn union(&mut self, union: &Union, e: Emission, closes: bool, view: &str, at: &Place) -> Result<Lowered> {
        let inputs: Vec<Lowered> =
            union.inputs.iter().map(|input| self.step(input, e, closes, view, at)).collect::<Result<_>>()?;
        let refuse = |what: &str, hint: &str| {
            let place = crate::sql::place::find_word(at, "UNION").unwrap_or_else(|| at.clone());
            Err(Error::user(format!("{view}: {what}")).hint(hint).at(place))
        };
        if inputs.iter().any(|input| input.keys.is_some() || input.updating) {
            let hint = "Put the window or the GROUP BY above the UNION ALL.";
            return refuse("UNION ALL over windows or GROUP BY cannot run as a stream yet", hint);
        }
        let mut edges = Vec::new();
        let mut branches = 0u8;
        for input in &inputs {
            edges.push(Edge { from: input.node, port: input.port, exchange: None, branch: branches });
            let Some(sum) = branches.checked_add(input.branches) else {
                return refuse("a UNION of more than 255 branches cannot run", "Use fewer branches.");
            };
            branches = sum;
        }
        let time = inputs[0].time.filter(|time| inputs.iter().all(|input| input.time == Some(*time)));
        let schema = plain_schema(union.schema.as_arrow());
        let id = format!("{view}.union{}", self.plan.nodes.len());
        let port = inputs[0].port;
        let node = self.add_union(id, NodeKind::Union, edges, Arc::clone(&schema));
        let closes = (0..schema.fields().len()).map(|column| {
            let origin = self.origins.of(node, &column_at(&schema, column));
            Closes::common(origin, inputs.iter().map(|input| input.closes[column]))
        });
        let closes = closes.collect();
        Ok(Lowered { time, closes, branches, ..Lowered::stateless(node, port) })
    }

    /// UNNEST of one list: a row per element, all with the order key of their row.
    fn unnest(
        &mut self,
        unnest: &Unnest,
        e: Emission,
        closes: bool,
        view: &str,
        at: &Place,
    ) -> Result<Lowered> {
        let input = self.step(&unnest.input, e, closes, view, at)?;
        let [(list, of)] = &unnest.list_type_columns[..] else {
            let place = crate::sql::place::find_word(at, "UNNEST").unwrap_or_else(|| at.clone());
            let message = format!("{view}: UNNEST of several lists or of structs cannot run as a stream yet");
            return Err(Error::user(message).hint("Unnest one list per view.").at(place));
        };
        if of.depth != 1 || !unnest.struct_type_columns.is_empty() {
            let place = crate::sql::place::find_word(at, "UNNEST").unwrap_or_else(|| at.clone());
            let message = format!("{view}: UNNEST of nested lists or structs cannot run as a stream yet");
            return Err(Error::user(message).hint("Unnest one level per view.").at(place));
        }
        let columns = unnest.dependency_indices.clone();
        let from = |column: usize| columns.iter().position(|kept| *kept == column && column != *list);
        let moved = |keys: &Vec<Option<usize>>| keys.iter().map(|key| key.and_then(from)).collect();
        let (keys, dealt) = (input.keys.as_ref().map(moved), moved(&input.dealt));
        let closes = columns.iter().map(|column| input.closes[*column]).collect();
        let time = input.time.and_then(from);
        let kind = NodeKind::Unnest {
            columns: columns.clone(),
            list: *list,
            keep_empty: unnest.options.preserve_nulls(),
            view: view.into(),
        };
        let node = self.chain(view, "unnest", kind, &input, plain_schema(unnest.schema.as_arrow()));
        Ok(Lowered { node, time, keys, dealt, closes, ..input })
    }

    /// Adds a node that reads `input` in the same task; an equal chain of another sink is not shared, as
    /// projections are cheap and the emissions differ.
    pub fn chain(
        &mut self,
        view: &str,
        what: &str,
        kind: NodeKind,
        input: &Lowered,
        schema: SchemaRef,
    ) -> NodeId {
        let edge = Edge { from: input.node, port: input.port, exchange: None, branch: 0 };
        let same = self.plan.nodes.iter().position(|node| {
            let reads = matches!(&node.inputs[..], [e] if e.from == edge.from && e.port == edge.port);
            reads && node.schema == schema && same_kind(&node.kind, &kind)
        });
        same.unwrap_or_else(|| {
            let id = format!("{view}.{what}{}", self.plan.nodes.len());
            self.add(id, kind, Some(edge), schema)
        })
    }

    /// Casts what a sink cannot store: views of strings, dictionaries, unsigned integers, foreign timestamps.
    pub fn storable(&mut self, lowered: &Lowered, view: &str) -> Result<Lowered> {
        let schema = Arc::clone(&self.plan.nodes[lowered.node].schema);
        let types: Vec<DataType> =
            schema.fields().iter().map(|field| storable_type(field.data_type())).collect();
        if types.iter().zip(schema.fields()).all(|(t, field)| t == field.data_type()) {
            return Ok(lowered.clone());
        }
        let mut fields = Vec::new();
        let mut exprs: Vec<Arc<dyn PhysicalExpr>> = Vec::new();
        for (column, (t, field)) in types.into_iter().zip(schema.fields()).enumerate() {
            let expr = column_at(&schema, column);
            let same = t == *field.data_type();
            exprs.push(if same { expr } else { Arc::new(CastExpr::new(expr, t.clone(), None)) });
            fields.push(Field::new(field.name(), t, field.is_nullable()));
        }
        let kind = NodeKind::Project { exprs, view: view.into() };
        let node = self.chain(view, "cast", kind, lowered, Arc::new(Schema::new(fields)));
        Ok(Lowered { node, ..lowered.clone() })
    }

    /// Keeps the given columns.
    pub fn select(&mut self, lowered: &Lowered, columns: &[usize], view: &str) -> Result<Lowered> {
        let schema = Arc::clone(&self.plan.nodes[lowered.node].schema);
        let exprs = columns.iter().map(|column| column_at(&schema, *column)).collect();
        let kind = NodeKind::Project { exprs, view: view.into() };
        let node = self.chain(view, "columns", kind, lowered, Arc::new(schema.project(columns)?));
        let from = |column: usize| columns.iter().position(|kept| *kept == column);
        let moved = |keys: &Vec<Option<usize>>| keys.iter().map(|key| key.and_then(from)).collect();
        let (keys, dealt) = (lowered.keys.as_ref().map(moved), moved(&lowered.dealt));
        let closes = columns.iter().map(|column| lowered.closes[*column]).collect();
        Ok(Lowered { node, time: lowered.time.and_then(from), keys, dealt, closes, ..lowered.clone() })
    }

    pub(super) fn is_source(&self, name: &str) -> bool {
        self.sources.contains_key(name)
    }

    pub(super) fn physical_over(&self, expr: &Expr, schema: &DFSchema) -> Result<Arc<dyn PhysicalExpr>> {
        Ok(self.session.state().create_physical_expr(expr.clone().unalias_nested().data, schema)?)
    }

    pub(super) fn physical(&self, expr: &Expr, input: &LogicalPlan) -> Result<Arc<dyn PhysicalExpr>> {
        let schema = input.schema();
        Ok(self.session.state().create_physical_expr(expr.clone().unalias_nested().data, schema)?)
    }
}

fn has_subquery(plan: &LogicalPlan) -> Result<bool> {
    let mut found = false;
    plan.apply(|node| {
        node.apply_expressions(|expr| {
            use Expr::{Exists, InSubquery, ScalarSubquery, SetComparison};
            found |= expr.exists(|e| {
                Ok(matches!(e, Exists(_) | InSubquery(_) | ScalarSubquery(_) | SetComparison(_)))
            })?;
            Ok(TreeNodeRecursion::Continue)
        })
    })?;
    Ok(found)
}

fn same_kind(a: &NodeKind, b: &NodeKind) -> bool {
    match (a, b) {
        (NodeKind::Filter { predicate: a, .. }, NodeKind::Filter { predicate: b, .. }) => a == b,
        (NodeKind::Project { exprs: a, .. }, NodeKind::Project { exprs: b, .. }) => a == b,
        (NodeKind::Lookup { spec: a, table: b, .. }, NodeKind::Lookup { spec: c, table: d, .. }) => {
            a.same(c) && b.plan == d.plan
        }
        #[cfg(feature = "redis")]
        (NodeKind::Remote { spec: a, table: b, .. }, NodeKind::Remote { spec: c, table: d, .. }) => {
            a.same(c) && b.name == d.name && b.columns == d.columns && b.keys == d.keys
        }
        (
            NodeKind::Unnest { columns: a, list: b, keep_empty: c, .. },
            NodeKind::Unnest { columns: d, list: e, keep_empty: f, .. },
        ) => (a, b, c) == (d, e, f),
        _ => false,
    }
}

pub(super) fn column_at(schema: &Schema, column: usize) -> Arc<dyn PhysicalExpr> {
    Arc::new(PhysicalColumn::new(schema.field(column).name(), column))
}

pub(super) fn column_index(expr: &Arc<dyn PhysicalExpr>) -> Option<usize> {
    let any: &dyn std::any::Any = expr.as_ref();
    any.downcast_ref::<PhysicalColumn>().map(PhysicalColumn::index)
}

/// Without the metadata that DataFusion puts on fields.
pub(super) fn plain_schema(schema: &Schema) -> SchemaRef {
    let plain = |f: &Arc<Field>| Field::new(f.name(), f.data_type().clone(), f.is_nullable());
    Arc::new(Schema::new(schema.fields().iter().map(plain).collect::<Vec<_>>()))
}

/// The type under which a column is stored (DESIGN §2: TIMESTAMP is µs, UTC; Delta has no unsigned integers).
pub fn storable_type(of: &DataType) -> DataType {
    match of {
        DataType::Utf8View | DataType::LargeUtf8 => DataType::Utf8,
        DataType::BinaryView | DataType::LargeBinary => DataType::Binary,
        DataType::Dictionary(_, value) => storable_type(value),
        DataType::Timestamp(_, _) | DataType::Date64 => timestamp_type(),
        DataType::UInt8 => DataType::Int16,
        DataType::UInt16 => DataType::Int32,
        DataType::UInt32 | DataType::UInt64 => DataType::Int64,
        DataType::Float16 => DataType::Float32,
        DataType::Null => DataType::Utf8,
        other => other.clone(),
    }
}
