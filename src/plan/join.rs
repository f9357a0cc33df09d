//! JOIN → a look-up: one side is a stream, the other a query over bounded tables.

use std::sync::Arc;

use arrow::datatypes::{Field, Schema};
use datafusion::common::{JoinType, NullEquality};
use datafusion::logical_expr::{Expr, Join, LogicalPlan, LogicalPlanBuilder};

use crate::error::{Error, Place, Result};
use crate::operators::lookup::LookupSpec;
use crate::plan::NodeKind;
use crate::plan::lower::{Emission, Lowered, Lowering, plain_schema};
use crate::plan::prepared::Prepared;
use crate::plan::tables::{BoundedTable, scans};

impl Lowering<'_> {
    /// A look-up join. Keys become columns below, on both sides.
    pub(super) fn join(
        &mut self,
        join: &Join,
        e: Emission,
        closes: bool,
        view: &str,
        at: &Place,
    ) -> Result<Lowered> {
        let refuse = |what: &str, hint: &str| {
            let place = crate::sql::place::find_word(at, "JOIN").unwrap_or_else(|| at.clone());
            Error::user(format!("{view}: {what}")).hint(hint).at(place)
        };
        let stream_first = match (self.is_bounded(&join.left), self.is_bounded(&join.right)) {
            (false, true) => true,
            (true, false) => false,
            (false, false) => {
                let hint = "Join a stream with a table (CREATE TABLE … WITH (connector = 'csv', …)).";
                return Err(refuse("a JOIN of two streams cannot run yet", hint));
            }
            (true, true) => return Err(refuse("a JOIN of two tables is no stream", "Read a source.")),
        };
        let outer = match (join.join_type, stream_first) {
            (JoinType::Inner, _) => false,
            (JoinType::Left, true) | (JoinType::Right, false) => true,
            (other, _) => {
                let hint = "Use JOIN, or LEFT JOIN with the stream on the left: a stream never ends, so nobody knows which rows of a table stay without a match.";
                return Err(refuse(&format!("{other} JOIN of a stream and a table cannot run"), hint));
            }
        };
        if join.on.is_empty() || join.null_equality != NullEquality::NullEqualsNothing {
            let hint = "Join by columns that are equal: ON stream.key = table.key.";
            return Err(refuse("a JOIN without an equality cannot run", hint));
        }
        #[cfg(feature = "redis")]
        let remote = match super::remote::of_join(join, stream_first, self.tables)? {
            Some(Err((what, hint))) => return Err(refuse(&what, &hint)),
            Some(Ok(remote)) => Some(remote),
            None => None,
        };
        let (stream, table) =
            if stream_first { (&join.left, &join.right) } else { (&join.right, &join.left) };
        let input = self.step(stream, e, closes, view, at)?;
        let mut prepared = Prepared::new(self, stream, &input, view, at);
        let (mut keys, mut table_keys) = (Vec::new(), Vec::new());
        for (left, right) in &join.on {
            let (of_stream, of_table) = if stream_first { (left, right) } else { (right, left) };
            keys.push(prepared.column(of_stream)?);
            table_keys.push(of_table.clone());
        }
        let (input, width) = prepared.finish();
        let filter = match &join.filter {
            Some(filter) => Some(self.physical_over(filter, &join.schema)?),
            None => None,
        };
        let spec = LookupSpec {
            keys,
            width,
            table_keys: table_keys.len(),
            outer,
            stream_first,
            filter,
            schema: nullable(plain_schema(join.schema.as_arrow()), stream_first, width),
        };
        let name: Arc<str> = view.into();
        #[cfg(feature = "redis")]
        if let Some(remote) = remote {
            let kind = NodeKind::Remote { spec: spec.clone(), table: Box::new(remote), view: name };
            return Ok(self.lookup(&spec, kind, input, view));
        }
        let table = BoundedTable::new(with_keys(table, table_keys)?, self.tables)?;
        let kind = NodeKind::Lookup { spec: spec.clone(), table, view: name };
        Ok(self.lookup(&spec, kind, input, view))
    }

    fn lookup(&mut self, spec: &LookupSpec, kind: NodeKind, input: Lowered, view: &str) -> Lowered {
        let (width, total) = (spec.width, spec.schema.fields().len());
        let first = if spec.stream_first { 0 } else { total - width };
        let moved = |column: usize| (column < width).then_some(first + column);
        let all = |keys: &Vec<Option<usize>>| keys.iter().map(|key| key.and_then(moved)).collect();
        let mut closes = vec![None; total];
        closes[first..first + width].clone_from_slice(&input.closes[..width]);
        let above = input.keys.is_some() && !spec.outer;
        let lowered = Lowered {
            time: input.time.and_then(moved),
            keys: input.keys.as_ref().map(all),
            dealt: all(&input.dealt),
            closes,
            filtered_above_window: input.filtered_above_window || above && !input.updating,
            having: input.having || above && input.updating,
            ..input.clone()
        };
        let schema = Arc::clone(&spec.schema);
        let node = self.chain(view, "lookup", kind, &input, schema);
        Lowered { node, ..lowered }
    }

    /// Whether a plan reads no source.
    fn is_bounded(&self, plan: &LogicalPlan) -> bool {
        !scans(plan).iter().any(|name| self.is_source(name))
    }
}

/// The table's columns, then its keys.
fn with_keys(table: &LogicalPlan, keys: Vec<Expr>) -> Result<LogicalPlan> {
    let columns = table.schema().columns().into_iter().map(Expr::Column);
    let keys = keys.into_iter().enumerate().map(|(at, key)| key.alias(format!("__key{at}")));
    Ok(LogicalPlanBuilder::from(table.clone()).project(columns.chain(keys))?.build()?)
}

/// The columns of the table may be NULL: of an outer join, and of the deletions of an inner one.
fn nullable(schema: Arc<Schema>, stream_first: bool, width: usize) -> Arc<Schema> {
    let total = schema.fields().len();
    let of_stream = if stream_first { 0..width } else { total - width..total };
    let field = |(at, field): (usize, &Arc<Field>)| match of_stream.contains(&at) {
        true => field.as_ref().clone(),
        false => field.as_ref().clone().with_nullable(true),
    };
    Arc::new(Schema::new(schema.fields().iter().enumerate().map(field).collect::<Vec<_>>()))
}
