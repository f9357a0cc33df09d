//! A scheduled `INSERT INTO table SELECT …`: the query over what there is now, its interval bound, appended once.

use std::ops::ControlFlow;
use std::sync::Arc;

use arrow::datatypes::{Field, Schema, SchemaRef};
use datafusion::dataframe::DataFrame;
use datafusion::logical_expr::{Expr, LogicalPlan, cast, lit};
use datafusion::scalar::ScalarValue;
use datafusion::sql::parser::Statement as DfStatement;
use futures::StreamExt;
use sqlparser::ast::{self, Query, Value, visit_expressions_mut};
use sqlparser::dialect::GenericDialect;
use sqlparser::parser::Parser;

use crate::batch::backfill::Permit;
use crate::batch::window::with_windows;
use crate::batch::{World, ask, asof, hidden, paths, register};
use crate::connectors::delta::insert::{Inserter, transaction, unknown_columns};
use crate::connectors::partition::time_text;
use crate::error::{Error, Result};
use crate::plan::StreamPlan;
use crate::plan::session::{SourceTable, batch_session, batch_session_within, stream_session};
use crate::plan::source::all_sources;
use crate::plan::views::{ViewPlanner, located, quoted};
use crate::sql::calendar::Span;
use crate::sql::wildcard::hide;
use crate::sql::{Catalog, CreateSchedule, CreateTable, ScheduledInsert};

/// The query with `$interval_start` and `$interval_end` in place.
fn bound(insert: &ScheduledInsert, (from, to): Span) -> Result<Query> {
    let mut query = insert.query.as_ref().clone();
    let unknown = visit_expressions_mut(&mut query, |expr| {
        let ast::Expr::Value(value) = expr else { return ControlFlow::Continue(()) };
        let Value::Placeholder(name) = &value.value else { return ControlFlow::Continue(()) };
        let time = match name.to_ascii_lowercase().as_str() {
            "$interval_start" => from,
            "$interval_end" => to,
            _ => return ControlFlow::Break(name.clone()),
        };
        match literal(&time_text(time)) {
            Some(literal) => *expr = literal,
            None => return ControlFlow::Break(name.clone()),
        }
        ControlFlow::Continue(())
    });
    match unknown {
        ControlFlow::Continue(()) => Ok(query),
        ControlFlow::Break(name) => Err(Error::user(format!("{name} has no value"))
            .hint("A schedule binds $interval_start and $interval_end.")
            .at(insert.place.clone())),
    }
}

/// A time of our own type.
fn literal(time: &str) -> Option<ast::Expr> {
    let text = format!("arrow_cast('{time}', 'Timestamp(Microsecond, Some(\"UTC\"))')");
    Parser::new(&GenericDialect {}).try_with_sql(&text).ok()?.parse_expr().ok()
}

fn target<'a>(
    catalog: &'a Catalog,
    schedule: &CreateSchedule,
    insert: &ScheduledInsert,
) -> Result<&'a CreateTable> {
    let refuse = |message: String| {
        let hint = format!(
            "Declare CREATE TABLE {} (columns) WITH (connector = 'delta', location = '…').",
            insert.table
        );
        Error::user(format!("schedule {}: {message}", schedule.name)).hint(hint).at(insert.place.clone())
    };
    let name = &insert.table;
    if catalog.sink(name).is_some() {
        return Err(refuse(format!("{name} is a sink, which its stream alone writes")));
    }
    let table = catalog.table(name).ok_or_else(|| refuse(format!("there is no table {name}")))?;
    match table.options.shown("connector").as_deref() {
        Some("delta") => Ok(table),
        _ => Err(refuse(format!(
            "rows of an interval can be inserted once into Delta tables only, and {name} is none"
        ))),
    }
}

/// The columns that a table was declared with, if it was.
fn declared(table: &CreateTable) -> Option<SchemaRef> {
    let fields: Vec<Field> =
        table.columns.iter().map(|c| Field::new(&c.name, c.data_type.clone(), c.nullable)).collect();
    (!fields.is_empty()).then(|| Arc::new(Schema::new(fields)))
}

/// # Errors
/// User, at its place: no such table, a query that does not plan, columns that do not fit.
pub async fn check(
    catalog: &Catalog,
    plan: &StreamPlan,
    schedule: &CreateSchedule,
    insert: &ScheduledInsert,
) -> Result<()> {
    let table = target(catalog, schedule, insert)?;
    let query = bound(insert, (0, 1))?;
    let session = batch_session()?;
    let statement = DfStatement::Statement(Box::new(ast::Statement::Query(Box::new(query.clone()))));
    let state = session.state();
    let names = state.resolve_table_references(&statement).map_err(|error| located(error, &insert.place))?;
    for name in names.iter().map(|name| name.table()) {
        // What stands in files only is seen when it runs.
        if paths::is_path(name) && catalog.view(name).is_none() {
            return Ok(());
        }
        let sink = plan.sinks().find(|(_, sink)| sink.name == name).map(|(_, sink)| Arc::clone(&sink.schema));
        let schema = match catalog.table(name) {
            Some(table) if table.options.shown("connector").as_deref() == Some("delta") => {
                match declared(table) {
                    Some(columns) => Some(columns),
                    None => return Ok(()),
                }
            }
            _ => sink,
        };
        if let Some(schema) = schema {
            let provider = SourceTable { name: name.to_owned(), schema };
            session.register_table(quoted(name), Arc::new(provider))?;
        }
    }
    let sources = all_sources(&stream_session()?, catalog)?;
    let planned = ViewPlanner::new(&session, catalog, &sources).unoptimised(&query, &insert.place).await?;
    match declared(table) {
        Some(columns) => selected(&planned, &columns, insert).map(drop),
        None => Ok(()),
    }
}

/// The columns of the table, from those of the query by their order; NULL where it gives none.
fn selected(plan: &LogicalPlan, columns: &Schema, insert: &ScheduledInsert) -> Result<Vec<Expr>> {
    let refuse = |message: String, hint: String| Error::user(message).hint(hint).at(insert.place.clone());
    let names: Vec<String> = match insert.columns.is_empty() {
        true => columns.fields().iter().map(|field| field.name().clone()).collect(),
        false => insert.columns.clone(),
    };
    if let Some(unknown) = unknown_columns(columns, &names).first() {
        let known: Vec<&str> = columns.fields().iter().map(|field| field.name().as_str()).collect();
        let message = format!("the table {} has no column {unknown}", insert.table);
        return Err(refuse(message, format!("Its columns are {}.", known.join(", "))));
    }
    let given = plan.schema().columns();
    if given.len() != names.len() {
        let message =
            format!("the query has {} columns for {} of {}", given.len(), names.len(), insert.table);
        return Err(refuse(message, format!("Select, in this order, {}.", names.join(", "))));
    }
    let value = |field: &Arc<Field>| {
        let at = names.iter().position(|name| name == field.name());
        let value = at.map_or_else(|| lit(ScalarValue::Null), |at| Expr::Column(given[at].clone()));
        cast(value, field.data_type().clone()).alias(field.name())
    };
    Ok(columns.fields().iter().map(value).collect())
}

/// Inserts the rows of an interval; gives their number.
///
/// # Errors
/// User: the query. External: a store failed. Those of `permit`, which is asked before the commit.
pub async fn run(
    world: &World<'_>,
    pipeline: &str,
    schedule: &CreateSchedule,
    insert: &ScheduledInsert,
    interval: Span,
    memory: Option<u64>,
    permit: &dyn Permit,
) -> Result<u64> {
    let table = target(world.catalog, schedule, insert)?;
    let location = table.options.clone().required("location")?;
    let id = transaction(pipeline, &schedule.name, interval.0, interval.1);
    if let Some(open) = Inserter::open(&location, None).await?
        && let Some(rows) = open.inserted(&id).await?
    {
        return Ok(rows);
    }
    let frame = planned(world, insert, interval, memory).await?;
    let columns = declared(table).unwrap_or_else(|| Arc::new(frame.schema().as_arrow().clone()));
    let inserter = Inserter::open(&location, Some(&columns)).await?;
    let inserter = inserter.ok_or_else(|| Error::external(format!("the Delta table {location} is gone")))?;
    // Of another process that came first since.
    if let Some(rows) = inserter.inserted(&id).await? {
        return Ok(rows);
    }
    let values = selected(frame.logical_plan(), &inserter.columns, insert)?;
    let mut rows = frame.select(values)?.execute_stream().await?;
    let mut writer = inserter.writer()?;
    while let Some(batch) = rows.next().await {
        writer.write(&batch?)?;
        if writer.wants_upload() {
            writer.upload(0).await?;
        }
    }
    let files = writer.prepare(0)?.await?;
    Ok(inserter.commit(&id, &files, || permit.ask()).await?.rows)
}

async fn planned(
    world: &World<'_>,
    insert: &ScheduledInsert,
    interval: Span,
    memory: Option<u64>,
) -> Result<DataFrame> {
    let mut query = ast::Statement::Query(Box::new(bound(insert, interval)?));
    hide(&mut query, &|name| hidden(world.catalog, world.plan, name));
    let statement = DfStatement::Statement(Box::new(query));
    let session = asof::with_joins(&ask::yielding(&with_windows(&batch_session_within(memory)?)), world.plan);
    let state = session.state();
    let names = state.resolve_table_references(&statement).map_err(|error| located(error, &insert.place))?;
    for name in &names {
        register(&session, name.table(), world).await.map_err(|error| error.at(insert.place.clone()))?;
    }
    let state = session.state();
    let plan = state.statement_to_plan(statement).await.map_err(|error| located(error, &insert.place))?;
    Ok(DataFrame::new(state, plan))
}
