//! The answer: the sink's query over the rows of the backup that count.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{AsArray, BooleanArray, RecordBatch};
use arrow::compute::{concat_batches, filter_record_batch};
use arrow::datatypes::{Int32Type, Int64Type};
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::dataframe::DataFrame;
use datafusion::logical_expr::expr::WindowFunction;
use datafusion::logical_expr::{Expr, LogicalPlan, Volatility, WindowFunctionDefinition, cast};
use datafusion::prelude::{SessionContext, ident};

use super::backfilled::within;
use super::{Report, Verifier, chain};
use crate::batch::history::{Cut, register};
use crate::batch::letters::{Filter, State};
use crate::connectors::delta::config::stored_type;
use crate::connectors::delta::replace::Interval;
use crate::error::{Error, Place, Result};
use crate::plan::session::{batch_session, stream_session};
use crate::plan::source::all_sources;
use crate::plan::views::{ViewPlanner, quoted};
use crate::plan::{NodeKind, SinkKind};
use crate::sql::SinkInput;
use crate::stream::letters::schema as letters_schema;

/// Aggregates whose last digits depend on the order in which partial results are merged.
const ROUNDED: [&str; 5] = ["stddev", "var", "covar", "corr", "regr_"];
/// Aggregates that are estimates, which depend on that order altogether.
const SKETCHES: [&str; 2] = ["approx_percentile", "approx_median"];

/// (topic, partition, offset) of rows that are in the backup and not in the answer.
pub struct LeftOut {
    late: RecordBatch,
    letters: RecordBatch,
    replayed: RecordBatch,
}

impl LeftOut {
    pub fn late_rows(&self) -> usize {
        self.late.num_rows()
    }

    pub fn replayed(&self) -> &RecordBatch {
        &self.replayed
    }

    pub fn all(&self) -> Result<RecordBatch> {
        of([&self.late, &self.letters, &self.replayed])
    }

    pub fn without_late(&self) -> Result<RecordBatch> {
        of([&self.letters, &self.replayed])
    }

    /// Where some of the replayed records are left out alone.
    pub fn with_replayed(&self, replayed: &[RecordBatch]) -> Result<RecordBatch> {
        of([&self.late, &self.letters].into_iter().chain(replayed))
    }
}

fn of<'b>(parts: impl IntoIterator<Item = &'b RecordBatch>) -> Result<RecordBatch> {
    let schema = Arc::new(letters_schema().project(&[4, 5, 6])?);
    Ok(concat_batches(&schema, parts)?)
}

pub struct Answer {
    /// In the types of the sink's table.
    pub frame: DataFrame,
    /// The last digits of its floats depend on the order in which rows were added up.
    pub inexact: bool,
}

impl Verifier<'_> {
    /// Origins that the answer leaves out.
    pub async fn left_out(&self, state: &State, report: &mut Report) -> Result<LeftOut> {
        let late = match self.closes() {
            true => self.applying(&state.late(None).await?.rows, state)?,
            false => RecordBatch::new_empty(Arc::new(letters_schema().project(&[4, 5, 6])?)),
        };
        let replayed = state.replayed().await?;
        let (names, after_state) = self.views();
        let letters = state
            .letters(&Filter { at: names, after: state.manifest.rebuilt.clone(), ..Filter::default() }, None)
            .await?
            .rows;
        let (stages, at) = (letters.column(0).as_string::<i32>(), letters.column(1).as_string::<i32>());
        let online = matches!(self.sink.kind, SinkKind::Online { .. });
        // What a store refuses is a row of the answer, which is left out there.
        let keep: BooleanArray =
            (0..letters.num_rows()).map(|row| Some(!online || stages.value(row) != "sink")).collect();
        let counted =
            (0..letters.num_rows()).filter(|row| after_state.iter().any(|view| view == at.value(*row)));
        let counted = counted.count();
        if counted > 0 {
            report.cannot_prove(format!(
                "{counted} dead letters of expressions above a window or group: their rows count in it, and not in the answer"
            ));
        }
        let letters = filter_record_batch(&letters, &keep)?.project(&[4, 5, 6])?;
        report.late = late.num_rows();
        report.dead_letters = letters.num_rows();
        report.replayed = replayed.num_rows();
        Ok(LeftOut { late, letters, replayed })
    }

    /// Names of the sink and of the views below it, and which of these are above a window or group.
    fn views(&self) -> (Vec<String>, Vec<String>) {
        let plan = self.request.plan;
        let (mut names, mut after_state) = (vec![self.sink.name.clone()], Vec::new());
        for id in chain(plan, self.id) {
            let view = match &plan.nodes[id].kind {
                NodeKind::Filter { view, .. }
                | NodeKind::Project { view, .. }
                | NodeKind::Lookup { view, .. }
                | NodeKind::Unnest { view, .. } => view.to_string(),
                _ => continue,
            };
            let stateful =
                |id: &usize| matches!(plan.nodes[*id].kind, NodeKind::Over(_) | NodeKind::Group(_));
            if chain(plan, id).iter().any(stateful) {
                after_state.push(view.clone());
            }
            names.push(view);
        }
        (names, after_state)
    }

    /// Late rows that the view had not counted when its state was built.
    fn applying(&self, late: &RecordBatch, state: &State) -> Result<RecordBatch> {
        let born = self.born(&state.manifest);
        let born: BTreeMap<(&str, i32), i64> =
            born.iter().map(|(topic, partition, next)| ((topic.as_str(), *partition), *next)).collect();
        let topics = late.column(0).as_string::<i32>();
        let partitions = late.column(1).as_primitive::<Int32Type>().values();
        let offsets = late.column(2).as_primitive::<Int64Type>().values();
        let applies = (0..late.num_rows()).map(|row| {
            let from = born.get(&(topics.value(row), partitions[row])).copied();
            Some(from.is_none_or(|from| offsets[row] >= from))
        });
        Ok(filter_record_batch(late, &applies.collect())?)
    }

    /// The sink's query over the rows of a cut; its rows of one interval, as a backfill computes them.
    pub async fn answer(
        &self,
        session: &SessionContext,
        cut: &Cut,
        part: Option<Interval>,
        report: &mut Report,
    ) -> Result<Answer> {
        let (catalog, plan) = (self.request.catalog, self.request.plan);
        let planning = batch_session()?;
        let sources = all_sources(&stream_session()?, catalog)?;
        register(&planning, catalog, plan, self.source, cut).await?;
        if let Some((part, time)) = part.zip(self.source.event_time) {
            let name = quoted(&self.source.name);
            let rows = planning.deregister_table(name.clone())?;
            let rows = rows.ok_or_else(|| Error::internal("a backup that was registered is not there"))?;
            let time = self.source.schema.field(time).name();
            let rows = planning.read_table(rows)?.filter(within(time, self.sees(part)))?;
            planning.register_table(name, rows.into_view())?;
        }
        let declared = catalog.sink(&self.sink.name);
        let declared = declared.ok_or_else(|| Error::internal("a sink that no statement declares"))?;
        let mut views = ViewPlanner::new(&planning, catalog, &sources);
        let logical = match &declared.input {
            SinkInput::Query(query) => views.unoptimised(query, &declared.place).await?,
            SinkInput::Relation { name, place } => relation(&planning, &mut views, name, place).await?,
        };
        let inexact = self.unproven(&logical, report)?;
        let frame = DataFrame::new(session.state(), logical);
        let columns = self.sink.schema.fields().iter();
        let delta = matches!(self.sink.kind, SinkKind::Delta(_));
        let columns = columns.map(|field| {
            let kind = if delta { stored_type(field.data_type())? } else { field.data_type().clone() };
            Ok(cast(ident(field.name()), kind).alias(field.name()))
        });
        let mut frame = frame.select(columns.collect::<Result<Vec<_>>>()?)?;
        if let Some(inside) = part.and_then(|part| self.inside([part])) {
            frame = frame.filter(inside)?;
        }
        Ok(Answer { frame, inexact })
    }

    /// What the answer of today need not be the answer that the stream gave. `true`: the last digits of floats.
    fn unproven(&self, logical: &LogicalPlan, report: &mut Report) -> Result<bool> {
        for kind in self.kinds() {
            match kind {
                NodeKind::Lookup { table, .. } if table.refresh.is_some() => {
                    let names: Vec<&str> = table.tables.iter().map(|table| table.name.as_str()).collect();
                    report.cannot_prove(format!("the look-up of {}: it is read again", names.join(", ")));
                }
                #[cfg(feature = "redis")]
                NodeKind::Remote { table, .. } => {
                    report.cannot_prove(format!("the look-up of {}: it is a server", table.name));
                }
                _ => {}
            }
        }
        let mut inexact = false;
        logical.apply_with_subqueries(|node| {
            node.apply_expressions(|expr| {
                expr.apply(|expr| {
                    if let Expr::ScalarFunction(function) = expr
                        && function.func.signature().volatility != Volatility::Immutable
                    {
                        report.cannot_prove(format!("{}(): it depends on the time", function.name()));
                    }
                    let Some(name) = aggregate(expr) else { return Ok(TreeNodeRecursion::Continue) };
                    if SKETCHES.iter().any(|sketch| name.starts_with(sketch)) {
                        report
                            .cannot_prove(format!("{name}(): an estimate depends on the order of its rows"));
                    }
                    if ROUNDED.iter().any(|rounded| name.starts_with(rounded)) {
                        inexact = true;
                        report.cannot_prove(format!(
                            "the last digits of {name}(): all floats are compared in single precision"
                        ));
                    }
                    Ok(TreeNodeRecursion::Continue)
                })
            })
        })?;
        Ok(inexact)
    }
}

/// The name of an aggregate function, of a window too.
fn aggregate(expr: &Expr) -> Option<&str> {
    match expr {
        Expr::AggregateFunction(function) => Some(function.func.name()),
        Expr::WindowFunction(function) => match &function.as_ref() {
            WindowFunction { fun: WindowFunctionDefinition::AggregateUDF(function), .. } => {
                Some(function.name())
            }
            _ => None,
        },
        _ => None,
    }
}

/// The plan of `SELECT * FROM relation`, not optimised.
async fn relation(
    planning: &SessionContext,
    views: &mut ViewPlanner<'_>,
    name: &str,
    place: &Place,
) -> Result<LogicalPlan> {
    views.relation(name, place).await?;
    Ok(planning.table(quoted(name)).await?.into_unoptimized_plan())
}
