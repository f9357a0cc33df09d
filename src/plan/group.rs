//! GROUP BY and DISTINCT → a keyed table per shard whose rows change.

use std::sync::Arc;

use arrow::datatypes::{Field, Schema};
use datafusion::logical_expr::expr::AggregateFunction;
use datafusion::logical_expr::{self as logical, Expr, LogicalPlan};
use datafusion::physical_expr::aggregate::AggregateExprBuilder;
use datafusion::physical_plan::PhysicalExpr;

use crate::error::{Error, Place, Result};
use crate::operators::group::{Aggregate, GroupSpec};
use crate::plan::lower::{Emission, Lowered, Lowering, column_at};
use crate::plan::prepared::Prepared;
use crate::plan::{Edge, NodeKind};
use crate::stream::Port;

/// Their answer depends on the order in which rows were merged, which no one promises.
const ORDER_DEPENDENT: [&str; 5] = ["array_agg", "first_value", "last_value", "nth_value", "string_agg"];

impl Lowering<'_> {
    /// GROUP BY: keys, arguments and filters become columns below; HAVING is a filter above.
    pub(super) fn group(
        &mut self,
        aggregate: &logical::Aggregate,
        e: Emission,
        view: &str,
        place: &Place,
    ) -> Result<Lowered> {
        let below = &aggregate.input;
        let input = self.below_group(below, e, view, place)?;
        let mut prepared = Prepared::new(self, below, &input, view, place);
        let keys = aggregate.group_expr.iter().map(|key| prepared.key(key)).collect::<Result<Vec<_>>>()?;
        let fields = aggregate.schema.as_arrow().fields();
        let calls = aggregate.aggr_expr.iter().zip(&fields[keys.len()..]);
        let calls =
            calls.map(|(call, output)| prepared.aggregate(call, output)).collect::<Result<Vec<_>>>()?;
        let (input, _) = prepared.finish();
        let schema = Arc::clone(&self.plan.nodes[input.node].schema);
        let calls = calls.into_iter().map(|call| call.build(&schema)).collect::<Result<Vec<_>>>()?;
        let names: Vec<_> = fields.iter().map(|field| field.name().clone()).collect();
        let spec = GroupSpec { input: schema, keys, calls, want_changes: false, want_latest: false };
        Ok(self.add_group(spec, e, &names, &input, view))
    }

    /// DISTINCT is a GROUP BY of all columns without aggregates.
    pub(super) fn distinct(
        &mut self,
        below: &LogicalPlan,
        e: Emission,
        view: &str,
        place: &Place,
    ) -> Result<Lowered> {
        let input = self.below_group(below, e, view, place)?;
        let schema = Arc::clone(&self.plan.nodes[input.node].schema);
        let keys: Vec<usize> = (0..schema.fields().len()).collect();
        let names: Vec<_> = schema.fields().iter().map(|field| field.name().clone()).collect();
        let calls = Vec::new();
        let spec = GroupSpec { input: schema, keys, calls, want_changes: false, want_latest: false };
        Ok(self.add_group(spec, e, &names, &input, view))
    }

    /// The rows that are grouped: late ones too, as nothing closes by time (DESIGN §3 *Late*).
    fn below_group(
        &mut self,
        below: &LogicalPlan,
        e: Emission,
        view: &str,
        place: &Place,
    ) -> Result<Lowered> {
        let input = self.step(below, e, false, view, place)?;
        let refused = match (&input.keys, input.updating) {
            (_, true) => {
                Some(("GROUP BY over GROUP BY", "Group the source's rows by the final key in one step."))
            }
            (Some(_), false) => Some((
                "GROUP BY over a window",
                "Write the aggregate as a window, or group the source's rows.",
            )),
            (None, false) => None,
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
        let keys = (0..spec.keys.len()).map(Some).collect();
        let node = same.unwrap_or_else(|| {
            let edge =
                Edge { from: input.node, port: input.port, exchange: Some(spec.keys.clone()), branch: 0 };
            let output = spec.output();
            let renamed = output.fields().iter().zip(names).map(|(f, n)| f.as_ref().clone().with_name(n));
            let schema = Arc::new(Schema::new(renamed.collect::<Vec<Field>>()));
            let id = format!("{view}.group{}", self.plan.nodes.len());
            self.add(id, NodeKind::Group(spec), Some(edge), schema)
        });
        if let NodeKind::Group(spec) = &mut self.plan.nodes[node].kind {
            spec.want_changes |= e != Emission::Latest;
            spec.want_latest |= e == Emission::Latest;
        }
        Lowered {
            node,
            port: if e == Emission::Latest { Port::Latest } else { Port::Changes },
            time: None,
            keys: Some(keys),
            filtered_above_window: false,
            updating: true,
            branches: input.branches,
        }
    }
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
