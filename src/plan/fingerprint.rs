//! Fingerprints: what the state of a view or a sink depends on, as text (DESIGN §6 *changed SQL*).
//!
//! Equal texts keep their state across restarts. A text holds, from the node down to the source, one thing per line:
//! expressions by the names of their columns, windows, keys, types of what is kept, look-up tables, and of the source
//! what decides which rows there are (columns that are used, event time, lateness, `max_future`). It holds no comment,
//! no formatting, no name of a view, no column that nothing reads, no address or credential of a server. The functions
//! of Millstream stand with their version, which rises when a function's answers change.
//!
//! The first format was one line of what `explain` prints ([`StreamPlan::fingerprint_v1`]). A state written with it is
//! compared in it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::datatypes::{Field, Schema};
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::physical_expr::ScalarFunctionExpr;
use datafusion::physical_expr::expressions::{Column, UnKnownColumn};
use datafusion::physical_expr::utils::collect_columns;
use datafusion::physical_plan::PhysicalExpr;

use crate::operators::lookup::LookupSpec;
use crate::operators::over::OverSpec;
use crate::plan::lower::column_index;
use crate::plan::tables::BoundedTable;
use crate::plan::{NodeId, NodeKind, SinkKind, SourcePlan, StreamPlan, describe_group, describe_over};
use crate::sql::interval::display_micros;

/// How a text of the second format begins.
pub(super) const FORMAT: &str = "fingerprint 2";

/// Columns of a node that are read; `None`: all.
type Needed = Option<BTreeSet<usize>>;

impl StreamPlan {
    /// What a node means. See the module.
    pub fn fingerprint(&self, id: NodeId) -> String {
        self.fingerprint_with(id, &millstream_udfs::version)
    }

    /// `versions`: of the functions of Millstream.
    fn fingerprint_with(&self, id: NodeId, versions: &dyn Fn(&str) -> Option<u32>) -> String {
        let mut text = Text { plan: self, lines: vec![FORMAT.to_owned()], functions: BTreeSet::new() };
        text.node(id, &None, 0);
        let Text { mut lines, functions, .. } = text;
        lines
            .extend(functions.iter().filter_map(|name| Some(format!("function {name} {}", versions(name)?))));
        lines.join("\n")
    }

    /// Whether a node means what it meant when `known` was written.
    pub fn means(&self, id: NodeId, known: &str) -> bool {
        match known.starts_with(FORMAT) {
            true => self.fingerprint(id) == known,
            false => self.fingerprint_v1(id) == known,
        }
    }

    /// Whether columns came or went since `known` was written, and all that is in both is as it was; `None` when `known`
    /// is of the first format.
    pub fn columns_came_or_went(&self, id: NodeId, known: &str) -> Option<bool> {
        known.starts_with(FORMAT).then(|| same_but_columns(known, &self.fingerprint(id)))
    }

    /// What a node means now and meant then, line by line: `- was`, `+ is`.
    pub(super) fn difference(&self, id: NodeId, known: &str) -> Vec<String> {
        let lines = |text: &str| -> Vec<String> { text.lines().skip(1).map(str::to_owned).collect() };
        let parts = |text: &str| -> Vec<String> { text.split(" <- ").map(str::to_owned).collect() };
        match known.starts_with(FORMAT) {
            true => difference(&lines(known), &lines(&self.fingerprint(id))),
            false => difference(&parts(known), &parts(&self.fingerprint_v1(id))),
        }
    }
}

/// Columns may come and go, but not be computed in another way; a name may stand at several steps. A column that is handed
/// on as it is has its type only. Types are the table's concern.
fn same_but_columns(was: &str, is: &str) -> bool {
    fn name(line: &str) -> &str {
        match line.strip_prefix("function ") {
            Some(_) => line.rsplit_once(' ').map_or(line, |(function, _)| function),
            None => line.split(' ').find(|word| !word.is_empty()).unwrap_or_default(),
        }
    }
    fn computed(text: &str) -> BTreeMap<&str, Vec<&str>> {
        let mut columns: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for line in text.lines().filter(|line| is_column(line) && !is_type(line)) {
            columns.entry(name(line)).or_default().push(line);
        }
        columns
    }
    fn listed(text: &str) -> BTreeSet<&str> {
        text.lines().filter(|line| is_type(line)).map(name).collect()
    }
    let others = |text: &str| -> Vec<String> {
        text.lines().filter(|line| !is_column(line)).map(str::to_owned).collect()
    };
    // A column that is computed on one side only must not be there on the other.
    let kept = |one: &str, other: &str| {
        let (theirs, listed) = (computed(other), listed(other));
        computed(one).iter().all(|(name, lines)| match theirs.get(name) {
            Some(known) => known == lines,
            None => !listed.contains(name),
        })
    };
    others(was) == others(is) && kept(was, is) && kept(is, was)
}

/// `  amount Float64`
fn is_type(line: &str) -> bool {
    line.starts_with("  ") && line.split_whitespace().nth(1) != Some("=")
}

/// `  amount Float64`, `b = concat(a)`; not `filter a = 1`, `  watermark …` and such.
fn is_column(line: &str) -> bool {
    let words: Vec<&str> = line.split_whitespace().take(2).collect();
    let of_source = ["watermark", "max_future"].iter().any(|word| words.first() == Some(word));
    let function = words.first() == Some(&"function");
    line.starts_with("  ") && !of_source || words.get(1) == Some(&"=") || function
}

struct Text<'a> {
    plan: &'a StreamPlan,
    lines: Vec<String>,
    functions: BTreeSet<String>,
}

impl Text<'_> {
    fn line(&mut self, depth: usize, text: &str) {
        // A literal may hold line breaks.
        self.lines.push(format!("{}{}", "  ".repeat(depth), text.replace('\n', "\\n")));
    }

    /// The node's lines, then those below it.
    fn node(&mut self, id: NodeId, needed: &Needed, depth: usize) {
        let node = &self.plan.nodes[id];
        let below = self.plan.nodes[id].inputs.first().map(|edge| &self.plan.nodes[edge.from].schema);
        let input = below.map_or_else(|| Arc::clone(&node.schema), Arc::clone);
        let wanted = match &node.kind {
            NodeKind::Source(source) => {
                self.source(source, needed, depth);
                return;
            }
            NodeKind::Letters => {
                self.line(depth, "dead letters");
                return;
            }
            NodeKind::Filter { predicate, .. } => {
                let text = self.expression(predicate, &input);
                self.line(depth, &format!("filter {text}"));
                needed.clone().map(|needed| with_columns(needed, predicate))
            }
            NodeKind::Project { exprs, .. } => self.project(exprs, &node.schema, &input, needed, depth),
            NodeKind::Over(spec) => {
                self.over(spec, depth);
                None
            }
            NodeKind::Group(spec) => {
                self.line(depth, &format!("group {}", describe_group(spec)));
                let names = spec.calls.iter().map(|call| call.function.fun().name().to_owned());
                self.functions.extend(names);
                let calls = spec.calls.iter();
                let read = calls.flat_map(|call| call.arguments.iter().copied().chain(call.filter));
                let read: BTreeSet<usize> = read.chain(spec.keys.iter().copied()).collect();
                self.columns(&spec.input, depth + 1, |column| read.contains(&column));
                Some(read)
            }
            NodeKind::Union => {
                self.line(depth, "union");
                needed.clone()
            }
            NodeKind::Lookup { spec, table, .. } => {
                self.lookup(spec, table, &input, depth);
                None
            }
            #[cfg(feature = "redis")]
            NodeKind::Remote { spec, table, .. } => {
                let keys = table.config.key.join(", ");
                self.join(spec, &format!("redis {} by {keys}", table.name), &input, depth);
                None
            }
            NodeKind::Unnest { columns, list, keep_empty, .. } => {
                let of = columns.iter().position(|column| column == list).unwrap_or_default();
                let empty = if *keep_empty { ", also of empty lists" } else { "" };
                self.line(depth, &format!("unnest {}{empty}", node.schema.field(of).name()));
                None
            }
            NodeKind::Sink(sink) => {
                // Which store shows the newest rows is nothing to the state that keeps them: another one is filled from it.
                let shown = match &sink.kind {
                    SinkKind::Online { .. } => sink.to_string().replacen(sink.kind.connector(), "online", 1),
                    _ => sink.to_string(),
                };
                self.line(depth, &format!("sink {}: {shown}", sink.name));
                self.columns(&sink.schema, depth + 1, |_| true);
                None
            }
        };
        // The others hand their input's rows on.
        let chooses =
            matches!(node.kind, NodeKind::Over(_) | NodeKind::Group(_) | NodeKind::Union | NodeKind::Sink(_));
        for edge in &node.inputs {
            if chooses {
                self.line(depth, &format!("of {} rows", edge.port));
            }
            self.node(edge.from, &wanted, depth + usize::from(node.inputs.len() > 1));
        }
    }

    fn over(&mut self, spec: &OverSpec, depth: usize) {
        self.line(depth, &format!("over {}", describe_over(spec)));
        self.columns(&spec.input, depth + 1, |_| true);
        let names = spec.calls.iter().map(|call| format!("{:?}", call.function).to_lowercase());
        self.functions.extend(names);
        let types = spec.calls.iter().map(|call| call.output.data_type().to_string());
        self.line(depth + 1, &format!("as {}", types.collect::<Vec<_>>().join(", ")));
    }

    /// The columns that are needed and more than a column of the input under its name.
    fn project(
        &mut self,
        exprs: &[Arc<dyn PhysicalExpr>],
        output: &Schema,
        input: &Schema,
        needed: &Needed,
        depth: usize,
    ) -> Needed {
        let mut wanted = BTreeSet::new();
        for (column, expr) in exprs.iter().enumerate() {
            if needed.as_ref().is_some_and(|needed| !needed.contains(&column)) {
                continue;
            }
            wanted = with_columns(wanted, expr);
            let text = self.expression(expr, input);
            let name = output.field(column).name();
            if text != *name || column_index(expr).is_none() {
                self.line(depth, &format!("{name} = {text}"));
            }
        }
        Some(wanted)
    }

    fn source(&mut self, source: &SourcePlan, needed: &Needed, depth: usize) {
        self.line(depth, &format!("source {}: {}", source.name, source.kind));
        let first = source.physical.fields().len();
        let mut read: BTreeSet<usize> = match needed {
            Some(needed) => needed.clone(),
            None => (0..source.schema.fields().len()).collect(),
        };
        read.extend(source.event_time);
        // A computed column reads those before it only.
        for (at, (expr, _)) in source.computed.iter().enumerate().rev() {
            if read.contains(&(first + at)) {
                read = with_columns(read, expr);
            }
        }
        self.columns(&source.schema, depth + 1, |column| read.contains(&column));
        for (at, (expr, field)) in source.computed.iter().enumerate() {
            if read.contains(&(first + at)) {
                let text = self.expression(expr, &source.schema);
                self.line(depth + 1, &format!("{} = {text}", field.name()));
            }
        }
        if let Some(column) = source.event_time {
            let (name, late) = (source.schema.field(column).name(), display_micros(source.lateness));
            self.line(depth + 1, &format!("watermark {name} - {late}"));
            self.line(depth + 1, &format!("max_future {}", display_micros(source.max_future)));
        }
    }

    fn lookup(&mut self, spec: &LookupSpec, table: &BoundedTable, input: &Schema, depth: usize) {
        self.join(spec, &table.name(), input, depth);
        for line in table.plan.display_indent().to_string().lines() {
            self.line(depth + 1, line);
        }
        for table in &table.tables {
            let shown = |key: &str| table.options.shown(key).unwrap_or_default();
            let text = format!("table {}: {} {}", table.name, shown("connector"), shown("location"));
            self.line(depth + 1, &text);
        }
    }

    fn join(&mut self, spec: &LookupSpec, table: &str, input: &Schema, depth: usize) {
        let join = if spec.outer { "left join" } else { "join" };
        let keys: Vec<&str> = spec.keys.iter().map(|key| input.field(*key).name().as_str()).collect();
        let filter = spec.filter.as_ref().map(|filter| self.expression(filter, &spec.schema));
        let filter = filter.map(|filter| format!(" and {filter}")).unwrap_or_default();
        self.line(depth, &format!("{join} {table} by {}{filter}", keys.join(", ")));
        self.columns(&spec.schema, depth + 1, |_| true);
    }

    fn columns(&mut self, schema: &Schema, depth: usize, shown: impl Fn(usize) -> bool) {
        for (_, field) in schema.fields().iter().enumerate().filter(|(column, _)| shown(*column)) {
            self.field(field, depth);
        }
    }

    fn field(&mut self, field: &Field, depth: usize) {
        let null = if field.is_nullable() { "" } else { " NOT NULL" };
        self.line(depth, &format!("{} {}{null}", field.name(), field.data_type()));
    }

    /// An expression by the names of its columns: their places change with columns that it does not read.
    fn expression(&mut self, expr: &Arc<dyn PhysicalExpr>, schema: &Schema) -> String {
        let named = Arc::clone(expr).transform_up(|expr| {
            let any: &dyn std::any::Any = expr.as_ref();
            if let Some(function) = any.downcast_ref::<ScalarFunctionExpr>() {
                self.functions.insert(function.fun().name().to_owned());
            }
            match any.downcast_ref::<Column>() {
                Some(column) => {
                    let name = name_of(schema, column.index(), column.name());
                    Ok(Transformed::yes(Arc::new(UnKnownColumn::new(&name)) as Arc<dyn PhysicalExpr>))
                }
                None => Ok(Transformed::no(expr)),
            }
        });
        named.data().map_or_else(|_| expr.to_string(), |named| named.to_string())
    }
}

/// After a join two columns may have one name.
fn name_of(schema: &Schema, column: usize, name: &str) -> String {
    let same = |at: &usize| schema.field(*at).name() == name;
    let fields = schema.fields().len();
    match (0..fields).filter(same).count() {
        0 | 1 => name.to_owned(),
        _ => format!("{name}#{}", (0..column.min(fields)).filter(same).count()),
    }
}

fn with_columns(mut columns: BTreeSet<usize>, expr: &Arc<dyn PhysicalExpr>) -> BTreeSet<usize> {
    columns.extend(collect_columns(expr).iter().map(Column::index));
    columns
}

/// Lines of `was` that are gone as `- …`, lines of `is` that came as `+ …`, in order (longest common subsequence).
fn difference(was: &[String], is: &[String]) -> Vec<String> {
    let mut common = vec![vec![0usize; is.len() + 1]; was.len() + 1];
    for (w, line) in was.iter().enumerate().rev() {
        for (i, other) in is.iter().enumerate().rev() {
            common[w][i] = match line == other {
                true => common[w + 1][i + 1] + 1,
                false => common[w + 1][i].max(common[w][i + 1]),
            };
        }
    }
    let (mut w, mut i, mut lines) = (0, 0, Vec::new());
    while w < was.len() || i < is.len() {
        if w < was.len() && i < is.len() && was[w] == is[i] {
            (w, i) = (w + 1, i + 1);
        } else if w < was.len() && (i == is.len() || common[w + 1][i] >= common[w][i + 1]) {
            lines.push(format!("- {}", was[w].trim_start()));
            w += 1;
        } else {
            lines.push(format!("+ {}", is[i].trim_start()));
            i += 1;
        }
    }
    lines
}

#[cfg(test)]
mod tests;
