//! GROUP BY and DISTINCT → a keyed table per shard whose rows change, or close with their window.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use datafusion::logical_expr::expr::AggregateFunction;
use datafusion::logical_expr::{self as logical, Expr, LogicalPlan};
use datafusion::physical_expr::aggregate::AggregateExprBuilder;
use datafusion::physical_plan::PhysicalExpr;

use crate::error::{Error, Place, Result};
use crate::operators::group::{Aggregate, Closing, GroupSpec};
use crate::plan::closing::Closes;
use crate::plan::lower::{Emission, Lowered, Lowering, column_at};
use crate::plan::prepared::Prepared;
use crate::plan::retract::retractable;
use crate::plan::{Edge, NodeKind};
use crate::stream::Port;

/// Their answer depends on the order in which rows were merged, which no one promises.
const ORDER_DEPENDENT: [&str; 5] = ["array_agg", "first_value", "last_value", "nth_value", "string_agg"];

impl Lowering<'_> {
    /// GROUP BY: keys, arguments and filters become columns below; HAVING is a filter above. Over rows that change it
    /// becomes sums that rows can be taken back from, and a projection over them.
    pub(super) fn group(
        &mut self,
        aggregate: &logical::Aggregate,
        e: Emission,
        view: &str,
        place: &Place,
    ) -> Result<Lowered> {
        let before = self.plan.nodes.len();
        let input = self.below_group(&aggregate.input, e, false, view, place)?;
        if input.updating {
            let (sums, above) = retractable(aggregate, view, place)?;
            let (spec, input) = self.group_spec(&sums, Some(0), &input, view, place)?;
            let grouped = self.add_group(spec, e, &names(&sums), &input, view);
            return self.project(&above, &grouped, view);
        }
        let (mut spec, mut input) = self.group_spec(aggregate, None, &input, view, place)?;
        // That a group closes is known only now: its rows are lowered again, without late ones (DESIGN §3 *Late*). Below
        // another group that one has seen to it.
        if spec.closing.is_some() && !contains_group(&aggregate.input) {
            self.plan.nodes.truncate(before);
            input = self.below_group(&aggregate.input, e, true, view, place)?;
            (spec, input) = self.group_spec(aggregate, None, &input, view, place)?;
        }
        Ok(self.add_group(spec, e, &names(aggregate), &input, view))
    }

    /// DISTINCT is a GROUP BY of all columns without aggregates.
    pub(super) fn distinct(
        &mut self,
        below: &Arc<LogicalPlan>,
        e: Emission,
        view: &str,
        place: &Place,
    ) -> Result<Lowered> {
        let columns = below.schema().columns().into_iter().map(Expr::Column).collect();
        let aggregate = logical::Aggregate::try_new(Arc::clone(below), columns, Vec::new())?;
        self.group(&aggregate, e, view, place)
    }

    /// The group and the rows that it reads: those of `input` with helper columns.
    fn group_spec(
        &mut self,
        aggregate: &logical::Aggregate,
        total: Option<usize>,
        input: &Lowered,
        view: &str,
        place: &Place,
    ) -> Result<(GroupSpec, Lowered)> {
        let mut prepared = Prepared::new(self, &aggregate.input, input, view, place);
        let keys = aggregate.group_expr.iter().map(|key| prepared.key(key)).collect::<Result<Vec<_>>>()?;
        let fields = aggregate.schema.as_arrow().fields();
        let calls = aggregate.aggr_expr.iter().zip(&fields[keys.len()..]);
        let calls =
            calls.map(|(call, output)| prepared.aggregate(call, output)).collect::<Result<Vec<_>>>()?;
        let (input, _) = prepared.finish();
        let schema = Arc::clone(&self.plan.nodes[input.node].schema);
        let calls = calls.into_iter().map(|call| call.build(&schema)).collect::<Result<Vec<_>>>()?;
        Ok((GroupSpec { total, ..spec_of(schema, keys, calls, &input) }, input))
    }

    /// The rows that are grouped. Rows of a window below can be grouped again once they are final.
    fn below_group(
        &mut self,
        below: &LogicalPlan,
        e: Emission,
        closes: bool,
        view: &str,
        place: &Place,
    ) -> Result<Lowered> {
        // What is grouped are changes, also of a view whose newest rows are wanted.
        let below_e = if e == Emission::Latest { Emission::Changes } else { e };
        let input = self.step(below, below_e, closes, view, place)?;
        let refused = match (&input.keys, input.updating) {
            (_, true) => None,
            (Some(_), false) if e != Emission::Final => Some((
                "GROUP BY over a window",
                "Write the aggregate as a window, or group the source's rows.",
            )),
            _ => None,
        };
        match refused {
            None => Ok(input),
            Some((what, hint)) => Err(Error::user(format!("{view}: {what} cannot run as a stream yet"))
                .hint(hint)
                .at(crate::sql::place::find_word(place, "GROUP").unwrap_or_else(|| place.clone()))),
        }
    }

    /// Adds the node, or finds the equal one of another sink. `names`: what the view calls the columns.
    fn add_group(
        &mut self,
        spec: GroupSpec,
        e: Emission,
        names: &[String],
        input: &Lowered,
        view: &str,
    ) -> Lowered {
        let same = self.plan.nodes.iter().position(|node| {
            let edge = node.inputs.iter().any(|edge| edge.from == input.node && edge.port == input.port);
            matches!(&node.kind, NodeKind::Group(other) if edge && other.same(&spec))
        });
        let retracts = input.retracts || spec.total.is_some();
        let window = spec.closing.map(|closing| closing.key);
        let closes = closes_of(&spec, input);
        let dealt = spec.exchange.iter().copied().map(Some).collect();
        let keys = (0..spec.keys.len()).map(Some).collect();
        let node = same.unwrap_or_else(|| {
            let exchange = spec.exchange.iter().map(|key| spec.keys[*key]).collect();
            let edge = Edge { from: input.node, port: input.port, exchange: Some(exchange), branch: 0 };
            let output = spec.output();
            let renamed = output.fields().iter().zip(names).map(|(f, n)| f.as_ref().clone().with_name(n));
            let schema = Arc::new(Schema::new(renamed.collect::<Vec<Field>>()));
            let id = format!("{view}.group{}", self.plan.nodes.len());
            self.add(id, NodeKind::Group(spec), Some(edge), schema)
        });
        let is_final = e == Emission::Final && window.is_some();
        if let NodeKind::Group(spec) = &mut self.plan.nodes[node].kind {
            spec.want_final |= is_final;
            spec.want_changes |= !is_final && e != Emission::Latest;
            spec.want_latest |= e == Emission::Latest;
        }
        let port = match e {
            Emission::Latest => Port::Latest,
            _ if is_final => Port::Final,
            _ => Port::Changes,
        };
        Lowered {
            node,
            port,
            time: window.filter(|_| is_final),
            keys: Some(keys),
            filtered_above_window: false,
            updating: !is_final,
            closes,
            dealt,
            having: false,
            retracts,
            branches: 1,
        }
    }
}

fn names(aggregate: &logical::Aggregate) -> Vec<String> {
    aggregate.schema.as_arrow().fields().iter().map(|field| field.name().clone()).collect()
}

/// The key that closes first.
pub(super) fn closing_key(keys: &[usize], input: &Schema, closes: &[Option<Closes>]) -> Option<Closing> {
    let micros = |column: usize| {
        use TimeUnit::{Microsecond, Nanosecond};
        matches!(input.field(column).data_type(), DataType::Timestamp(Microsecond | Nanosecond, _))
    };
    let known = keys.iter().enumerate().filter(|(_, column)| micros(**column));
    let known: Vec<(usize, Closes)> =
        known.filter_map(|(key, column)| Some((key, closes[*column]?))).collect();
    // Of window_start and window_end, the start: the greatest bound of its origin.
    let start =
        |of: &Closes| known.iter().map(|(_, c)| *c).filter(|c| c.same_origin(of)).map(|c| c.bound).max();
    let starts = known.iter().filter(|(_, closes)| start(closes) == Some(closes.bound));
    let first = starts.min_by_key(|(_, closes)| closes.bound);
    first.map(|(key, closes)| Closing { key: *key, bound: closes.bound })
}

/// The group closes by the key that closes first; the rows are dealt out by the other keys, if there are any.
fn spec_of(input: SchemaRef, keys: Vec<usize>, calls: Vec<Aggregate>, below: &Lowered) -> GroupSpec {
    let closing = closing_key(&keys, &input, &below.closes);
    let others = (0..keys.len()).filter(|key| below.closes[keys[*key]].is_none());
    let mut exchange: Vec<usize> = others.collect();
    if closing.is_none() || exchange.is_empty() {
        exchange = (0..keys.len()).collect();
    }
    GroupSpec {
        input,
        keys,
        calls,
        exchange,
        closing,
        total: None,
        want_final: false,
        want_changes: false,
        want_latest: false,
    }
}

/// What is known of the group's columns, now that its window is their time.
fn closes_of(spec: &GroupSpec, input: &Lowered) -> Vec<Option<Closes>> {
    let key = |key: &usize| input.closes[*key];
    let time = spec.closing.and_then(|closing| key(&spec.keys[closing.key]));
    let keys = spec.keys.iter().map(|column| key(column)?.behind(time?));
    keys.chain(spec.calls.iter().map(|_| None)).collect()
}

/// Whether the rows of a plan change: it has a GROUP BY or DISTINCT.
pub(super) fn contains_group(plan: &LogicalPlan) -> bool {
    matches!(plan, LogicalPlan::Aggregate(_) | LogicalPlan::Distinct(_))
        || plan.inputs().into_iter().any(contains_group)
}

/// An aggregate whose arguments are columns of an input that is not finished yet.
struct Pending {
    function: AggregateFunction,
    arguments: Vec<usize>,
    filter: Option<usize>,
    output: Arc<Field>,
}

impl Pending {
    fn build(self, schema: &Arc<Schema>) -> Result<Aggregate> {
        let arguments: Vec<Arc<dyn PhysicalExpr>> =
            self.arguments.iter().map(|column| column_at(schema, *column)).collect();
        let function = AggregateExprBuilder::new(Arc::clone(&self.function.func), arguments)
            .schema(Arc::clone(schema))
            .alias(self.output.name())
            .with_distinct(self.function.params.distinct)
            .build()?;
        Ok(Aggregate {
            function: Arc::new(function),
            arguments: self.arguments,
            filter: self.filter,
            output: self.output,
        })
    }
}

impl Prepared<'_, '_> {
    fn key(&mut self, key: &Expr) -> Result<usize> {
        if let Expr::GroupingSet(_) = key {
            let hint = "Write one view per set of keys.";
            return Err(self.refuse(
                "GROUPING SETS, CUBE and ROLLUP cannot run as a stream yet".into(),
                "GROUP",
                hint,
            ));
        }
        self.column(key)
    }

    fn aggregate(&mut self, call: &Expr, output: &Arc<Field>) -> Result<Pending> {
        let function = match call {
            Expr::AggregateFunction(function) => function,
            Expr::Alias(alias) => return self.aggregate(&alias.expr, output),
            other => {
                return Err(self.refuse(format!("{other} is no aggregate"), "GROUP", "Use an aggregate."));
            }
        };
        let (name, params) = (function.func.name().to_owned(), &function.params);
        if ORDER_DEPENDENT.contains(&name.as_str()) || !params.order_by.is_empty() {
            let hint = "Its answer depends on the order of rows; min, max or a window by event time do not.";
            return Err(self.refuse(format!("{name}() of a whole stream cannot run"), &name, hint));
        }
        if params.null_treatment.is_some() {
            let hint = "Use FILTER (WHERE … IS NOT NULL).";
            return Err(self.refuse(format!("{name}() with IGNORE NULLS cannot run yet"), &name, hint));
        }
        let arguments =
            params.args.iter().map(|argument| self.column(argument)).collect::<Result<Vec<_>>>()?;
        let filter = params.filter.as_deref().map(|filter| self.column(filter)).transpose()?;
        Ok(Pending { function: function.clone(), arguments, filter, output: Arc::clone(output) })
    }
}
