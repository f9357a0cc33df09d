//! Logical plan → nodes: one exhaustive match. What cannot run incrementally is refused here, never at run time.
//!
//! Next to each node we keep what its readers must know ([`Lowered`]): which column still is the event time, which
//! columns are the keys the rows are partitioned by, and whether rows were dropped above a window.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::common::{Column, ScalarValue};
use datafusion::logical_expr::expr::WindowFunction;
use datafusion::logical_expr::{
    Expr, LogicalPlan, Projection, TableScan, Window, WindowFrameBound, WindowFrameUnits,
    WindowFunctionDefinition,
};
use datafusion::physical_plan::PhysicalExpr;
use datafusion::physical_plan::expressions::{CastExpr, Column as PhysicalColumn};
use datafusion::prelude::SessionContext;

use crate::error::{Error, Place, Result};
use crate::operators::over::{Frame, Function, OverSpec, WindowCall};
use crate::plan::{Edge, Node, NodeId, NodeKind, StreamPlan};
use crate::stream::{Port, timestamp_type};

/// Which rows of a view a sink wants (DESIGN §3 *Emissions*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Emission {
    Final,
    Latest,
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
}

/// Builds one [`StreamPlan`] from several sinks; equal OVER nodes are shared.
pub struct Lowering<'a> {
    session: &'a SessionContext,
    pub plan: StreamPlan,
    sources: HashMap<String, (NodeId, Option<usize>)>,
    shared: HashMap<(LogicalPlan, Emission), Lowered>,
}

impl<'a> Lowering<'a> {
    pub fn new(session: &'a SessionContext) -> Self {
        Self { session, plan: StreamPlan::default(), sources: HashMap::new(), shared: HashMap::new() }
    }

    /// Adds a source node; its rows can then be scanned by name.
    pub fn add_source(&mut self, source: crate::plan::SourcePlan) -> NodeId {
        let (name, schema, time) = (source.name.clone(), Arc::clone(&source.schema), source.event_time);
        let node = self.add(format!("{name}.source"), NodeKind::Source(source), None, schema);
        self.sources.insert(name, (node, time));
        node
    }

    pub fn add(&mut self, id: String, kind: NodeKind, input: Option<Edge>, schema: SchemaRef) -> NodeId {
        self.plan.nodes.push(Node { id, kind, input, schema });
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
        let closes = contains_window(plan);
        let done = self.step(plan, emission, closes, view, place)?;
        self.shared.insert(known, done.clone());
        Ok(done)
    }

    fn step(
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
        let later = "This version runs SELECT, WHERE, scalar functions and OVER windows; the rest comes step by step.";
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
                let above = input.filtered_above_window || input.keys.is_some();
                Ok(Lowered { node, port: input.port, filtered_above_window: above, ..input })
            }
            LogicalPlan::Window(window) => self.window(window, e, closes, view, at),
            LogicalPlan::Aggregate(_) => refuse("GROUP BY", "GROUP", later),
            LogicalPlan::Sort(_) => refuse(
                "ORDER BY of a whole stream",
                "ORDER",
                "A stream has no end to sort at; sort in the query that reads the sink.",
            ),
            LogicalPlan::Limit(_) => refuse("LIMIT", "LIMIT", "A stream has no first rows to stop after."),
            LogicalPlan::Join(_) => refuse("JOIN", "JOIN", later),
            LogicalPlan::Union(_) => refuse("UNION", "UNION", later),
            LogicalPlan::Distinct(_) => refuse("DISTINCT", "DISTINCT", later),
            LogicalPlan::Unnest(_) => refuse("UNNEST", "UNNEST", later),
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
        let source = Lowered { node, port, time, keys: None, filtered_above_window: false };
        let Some(columns) = &scan.projection else { return Ok(source) };
        let schema = Arc::clone(&self.plan.nodes[node].schema);
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
        let exprs: Vec<Arc<dyn PhysicalExpr>> = projection
            .expr
            .iter()
            .map(|expr| self.physical(expr, &projection.input))
            .collect::<Result<_>>()?;
        let from = |column: usize| exprs.iter().position(|expr| column_index(expr) == Some(column));
        let time = input.time.and_then(from);
        let keys = input.keys.as_ref().map(|keys| keys.iter().map(|key| key.and_then(from)).collect());
        let schema = plain_schema(projection.schema.as_arrow());
        let kind = NodeKind::Project { exprs, view: view.into() };
        let node = self.chain(view, "project", kind, &input, schema);
        Ok(Lowered { node, time, keys, ..input })
    }

    /// OVER: nested `Window` nodes with the same keys become one operator with several calls.
    fn window(
        &mut self,
        top: &Window,
        e: Emission,
        closes: bool,
        view: &str,
        place: &Place,
    ) -> Result<Lowered> {
        let mut levels = vec![top];
        while let LogicalPlan::Window(inner) = levels[levels.len() - 1].input.as_ref() {
            levels.push(inner);
        }
        levels.reverse();
        let bottom = &levels[0].input;
        let input = self.step(bottom, e, closes, view, place)?;
        if input.keys.is_some() {
            return Err(Error::user(format!(
                "{view}: a window over a view that has windows cannot run as a stream yet"
            ))
            .hint("Put all windows of one key into one view.")
            .at(place.clone()));
        }
        let functions: Vec<&WindowFunction> = levels
            .iter()
            .flat_map(|w| &w.window_expr)
            .map(|expr| window_function(expr, view, place))
            .collect::<Result<_>>()?;
        let mut prepared = Prepared::new(self, bottom, &input, view, place);
        let keys = prepared.keys(&functions)?;
        let fields = top.schema.as_arrow().fields();
        let first = bottom.schema().fields().len();
        let calls: Vec<WindowCall> = functions
            .iter()
            .enumerate()
            .map(|(i, function)| prepared.call(function, Arc::clone(&fields[first + i])))
            .collect::<Result<_>>()?;
        let (input, width) = prepared.finish();
        let spec = OverSpec {
            input: Arc::clone(&self.plan.nodes[input.node].schema),
            partition_by: keys.clone(),
            calls,
            want_final: false,
            want_latest: false,
        };
        self.over(spec, input, width, keys, e, view)
    }

    /// Adds the OVER node, or finds the equal one of another sink, then drops helper columns.
    fn over(
        &mut self,
        mut spec: OverSpec,
        input: Lowered,
        width: usize,
        keys: Vec<usize>,
        e: Emission,
        view: &str,
    ) -> Result<Lowered> {
        let same = self.plan.nodes.iter().position(|node| {
            let edge =
                node.input.as_ref().is_some_and(|edge| edge.from == input.node && edge.port == input.port);
            matches!(&node.kind, NodeKind::Over(other) if edge && other.same_state(&spec))
        });
        let (port, node) = match (e, same) {
            (e, Some(node)) => (over_port(e), node),
            (e, None) => {
                let mut fields: Vec<_> = spec.input.fields().iter().cloned().collect();
                fields.extend(spec.calls.iter().map(|call| Arc::clone(&call.output)));
                let edge = Edge { from: input.node, port: input.port, exchange: Some(keys.clone()) };
                let id = format!("{view}.over{}", self.plan.nodes.len());
                spec.want_final = false;
                (over_port(e), self.add(id, NodeKind::Over(spec), Some(edge), Arc::new(Schema::new(fields))))
            }
        };
        if let NodeKind::Over(spec) = &mut self.plan.nodes[node].kind {
            spec.want_final |= e == Emission::Final;
            spec.want_latest |= e == Emission::Latest;
        }
        let out = Lowered {
            node,
            port,
            time: input.time,
            keys: Some(keys.into_iter().map(Some).collect()),
            filtered_above_window: input.filtered_above_window,
        };
        let total = self.plan.nodes[node].schema.fields().len();
        let helpers = self.helper_columns(&out, width);
        if helpers == 0 {
            return Ok(out);
        }
        let kept: Vec<usize> = (0..total).filter(|c| *c < width || *c >= width + helpers).collect();
        self.select(&out, &kept, view)
    }

    fn helper_columns(&self, over: &Lowered, width: usize) -> usize {
        match &self.plan.nodes[over.node].kind {
            NodeKind::Over(spec) => spec.input.fields().len() - width,
            _ => 0,
        }
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
        let edge = Edge { from: input.node, port: input.port, exchange: None };
        let same = self.plan.nodes.iter().position(|node| {
            let reads = node.input.as_ref().is_some_and(|e| e.from == edge.from && e.port == edge.port);
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
        let keys = lowered.keys.as_ref().map(|keys| keys.iter().map(|key| key.and_then(from)).collect());
        Ok(Lowered { node, time: lowered.time.and_then(from), keys, ..lowered.clone() })
    }

    fn physical(&self, expr: &Expr, input: &LogicalPlan) -> Result<Arc<dyn PhysicalExpr>> {
        let schema = input.schema();
        Ok(self.session.state().create_physical_expr(expr.clone().unalias_nested().data, schema)?)
    }
}

fn over_port(emission: Emission) -> Port {
    match emission {
        Emission::Final => Port::Final,
        Emission::Latest => Port::Latest,
    }
}

fn same_kind(a: &NodeKind, b: &NodeKind) -> bool {
    match (a, b) {
        (NodeKind::Filter { predicate: a, .. }, NodeKind::Filter { predicate: b, .. }) => a == b,
        (NodeKind::Project { exprs: a, .. }, NodeKind::Project { exprs: b, .. }) => a == b,
        _ => false,
    }
}

fn contains_window(plan: &LogicalPlan) -> bool {
    matches!(plan, LogicalPlan::Window(_)) || plan.inputs().into_iter().any(contains_window)
}

fn window_function<'e>(expr: &'e Expr, view: &str, place: &Place) -> Result<&'e WindowFunction> {
    match expr {
        Expr::WindowFunction(function) => Ok(function),
        Expr::Alias(alias) => window_function(&alias.expr, view, place),
        other => Err(Error::user(format!("{view}: {other} is not a window function")).at(place.clone())),
    }
}

fn column_at(schema: &Schema, column: usize) -> Arc<dyn PhysicalExpr> {
    Arc::new(PhysicalColumn::new(schema.field(column).name(), column))
}

fn column_index(expr: &Arc<dyn PhysicalExpr>) -> Option<usize> {
    let any: &dyn std::any::Any = expr.as_ref();
    any.downcast_ref::<PhysicalColumn>().map(PhysicalColumn::index)
}

/// Without the metadata that DataFusion puts on fields.
fn plain_schema(schema: &Schema) -> SchemaRef {
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

/// Helper columns below an OVER: keys, arguments and filters that are more than a column.
struct Prepared<'a, 'b> {
    lowering: &'b mut Lowering<'a>,
    below: &'b LogicalPlan,
    input: Lowered,
    view: &'b str,
    place: &'b Place,
    /// Columns of the input itself.
    width: usize,
    extra: Vec<(Arc<dyn PhysicalExpr>, Field)>,
}

impl<'a, 'b> Prepared<'a, 'b> {
    fn new(
        lowering: &'b mut Lowering<'a>,
        below: &'b LogicalPlan,
        input: &Lowered,
        view: &'b str,
        place: &'b Place,
    ) -> Self {
        let width = lowering.plan.nodes[input.node].schema.fields().len();
        Self { lowering, below, input: input.clone(), view, place, width, extra: Vec::new() }
    }

    fn refuse(&self, what: String, word: &str, hint: &str) -> Error {
        let place = crate::sql::place::find_word(self.place, word).unwrap_or_else(|| self.place.clone());
        Error::user(format!("{}: {what}", self.view)).hint(hint).at(place)
    }

    /// The column that holds `expr`, added below the operator if it is more than a column.
    fn column(&mut self, expr: &Expr) -> Result<usize> {
        let physical = self.lowering.physical(expr, self.below)?;
        if let Some(column) = column_index(&physical) {
            return Ok(column);
        }
        if let Some(known) = self.extra.iter().position(|(other, _)| *other == Arc::clone(&physical)) {
            return Ok(self.width + known);
        }
        let schema = self.below.schema().as_arrow();
        let name = format!("__{}", self.extra.len());
        let field = Field::new(name, physical.data_type(schema)?, physical.nullable(schema)?);
        self.extra.push((physical, field));
        Ok(self.width + self.extra.len() - 1)
    }

    /// The partition columns, which all windows of one operator share.
    fn keys(&mut self, functions: &[&WindowFunction]) -> Result<Vec<usize>> {
        let first = &functions[0].params.partition_by;
        if first.is_empty() {
            let hint = "Add PARTITION BY, so that rows of different keys need not wait for each other.";
            return Err(self.refuse(
                "a window without PARTITION BY cannot run as a stream".into(),
                "OVER",
                hint,
            ));
        }
        if functions.iter().any(|function| function.params.partition_by != *first) {
            let hint = "Write one view per key.";
            let what = "windows with different PARTITION BY in one view cannot run as a stream yet";
            return Err(self.refuse(what.into(), "PARTITION", hint));
        }
        first.iter().map(|key| self.column(key)).collect()
    }

    fn call(&mut self, window: &WindowFunction, output: Arc<Field>) -> Result<WindowCall> {
        let params = &window.params;
        let name = match &window.fun {
            WindowFunctionDefinition::AggregateUDF(function) => function.name().to_owned(),
            WindowFunctionDefinition::WindowUDF(function) => function.name().to_owned(),
        };
        let function = match name.as_str() {
            "count" => Function::Count,
            "sum" => Function::Sum,
            "avg" => Function::Avg,
            "min" => Function::Min,
            "max" => Function::Max,
            _ => {
                let hint = "OVER windows know count, sum, avg, min and max so far.";
                return Err(self.refuse(format!("{name}() OVER cannot run as a stream yet"), &name, hint));
            }
        };
        if params.distinct || params.null_treatment.is_some() {
            let hint = "Leave DISTINCT and IGNORE NULLS out.";
            return Err(self.refuse(
                format!("{name}() OVER with DISTINCT or IGNORE NULLS cannot run as a stream yet"),
                &name,
                hint,
            ));
        }
        self.order(window)?;
        let frame = self.frame(window)?;
        let argument = match &params.args[..] {
            [Expr::Literal(value, _)] if function == Function::Count && !value.is_null() => None,
            [argument] => Some(self.column(argument)?),
            _ => {
                return Err(self.refuse(
                    format!("{name}() OVER takes one argument"),
                    &name,
                    "Give one argument.",
                ));
            }
        };
        let filter = params.filter.as_deref().map(|filter| self.column(filter)).transpose()?;
        let argument_type = argument.map(|column| self.data_type(column));
        let Some(result) = Function::output_type(function, argument_type.as_ref()) else {
            let of = argument_type.map(|t| t.to_string()).unwrap_or_default();
            let hint = "Cast the argument to DOUBLE or BIGINT.";
            return Err(self.refuse(format!("{name}({of}) OVER cannot run as a stream yet"), &name, hint));
        };
        let output = Arc::new(Field::new(output.name(), result, function != Function::Count));
        Ok(WindowCall { function, argument, filter, frame, output })
    }

    fn data_type(&self, column: usize) -> DataType {
        if column < self.width {
            self.lowering.plan.nodes[self.input.node].schema.field(column).data_type().clone()
        } else {
            self.extra[column - self.width].1.data_type().clone()
        }
    }

    /// ORDER BY must be the event time of the source, ascending.
    fn order(&mut self, window: &WindowFunction) -> Result<()> {
        let hint = "Order by the event time column of the source, ascending: its watermark tells when a row is final.";
        let [sort] = &window.params.order_by[..] else {
            return Err(self.refuse(
                "a window must be ordered by exactly the event time".into(),
                "OVER",
                hint,
            ));
        };
        let column = match &sort.expr {
            Expr::Column(column) => Some(self.index_of(column)?),
            _ => None,
        };
        if self.input.time.is_none() {
            let hint =
                "Declare WATERMARK FOR event_time AS event_time - INTERVAL '…' in the source, and select it.";
            let what = "a window needs the event time of a source with a watermark";
            return Err(self.refuse(what.into(), "ORDER", hint));
        }
        if column != self.input.time || !sort.asc {
            return Err(self.refuse(
                format!("a window is ordered by {sort}, not by the event time"),
                "ORDER",
                hint,
            ));
        }
        Ok(())
    }

    fn index_of(&self, column: &Column) -> Result<usize> {
        Ok(self.below.schema().index_of_column(column)?)
    }

    fn frame(&self, window: &WindowFunction) -> Result<Frame> {
        let frame = &window.params.window_frame;
        let hint = "Use RANGE BETWEEN UNBOUNDED PRECEDING or INTERVAL '…' PRECEDING AND CURRENT ROW.";
        if frame.units != WindowFrameUnits::Range || frame.end_bound != WindowFrameBound::CurrentRow {
            return Err(self.refuse(
                format!("the frame {frame} cannot run as a stream yet"),
                &frame.units.to_string(),
                hint,
            ));
        }
        match &frame.start_bound {
            WindowFrameBound::Preceding(value) if value.is_null() => Ok(Frame::Unbounded),
            WindowFrameBound::CurrentRow => Ok(Frame::Preceding { micros: 0 }),
            WindowFrameBound::Preceding(value) => match interval_micros(value) {
                Some(micros) => Ok(Frame::Preceding { micros }),
                None => Err(self.refuse(
                    "a frame of months or years has no fixed length".into(),
                    "RANGE",
                    "Use weeks, days, hours, minutes or seconds: months differ in length.",
                )),
            },
            WindowFrameBound::Following(_) => {
                Err(self.refuse("a frame that starts after its row is empty".into(), "RANGE", hint))
            }
        }
    }

    fn finish(self) -> (Lowered, usize) {
        let Self { lowering, input, view, width, extra, .. } = self;
        if extra.is_empty() {
            return (input, width);
        }
        let schema = Arc::clone(&lowering.plan.nodes[input.node].schema);
        let mut fields: Vec<Field> = schema.fields().iter().map(|field| field.as_ref().clone()).collect();
        let mut exprs: Vec<Arc<dyn PhysicalExpr>> =
            (0..width).map(|column| column_at(&schema, column)).collect();
        for (expr, field) in extra {
            exprs.push(expr);
            fields.push(field);
        }
        let kind = NodeKind::Project { exprs, view: view.into() };
        let node = lowering.chain(view, "helpers", kind, &input, Arc::new(Schema::new(fields)));
        (Lowered { node, ..input }, width)
    }
}

fn interval_micros(value: &ScalarValue) -> Option<i64> {
    let (months, days, nanos) = match value {
        ScalarValue::IntervalMonthDayNano(Some(v)) => (v.months, i64::from(v.days), v.nanoseconds),
        ScalarValue::IntervalDayTime(Some(v)) => {
            (0, i64::from(v.days), i64::from(v.milliseconds) * 1_000_000)
        }
        ScalarValue::DurationMicrosecond(Some(v)) => (0, 0, v.checked_mul(1_000)?),
        ScalarValue::DurationNanosecond(Some(v)) => (0, 0, *v),
        _ => return None,
    };
    if months != 0 || nanos % 1_000 != 0 {
        return None;
    }
    days.checked_mul(86_400_000_000)?.checked_add(nanos / 1_000).filter(|micros| *micros >= 0)
}
