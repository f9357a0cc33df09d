//! Batch: the same names as tables. So far: ad-hoc queries over sinks, history, tables and files.
//!
//! A sink is queried by its name: a Delta sink is its table, an online sink is read back from its store. A source is its
//! backup, a view the same SQL over it ([`history`]). Files are queried by path, `dead_letters` are read from the state.
//! Only what a query names is opened.

mod asof;
pub mod history;
mod introspect;
pub mod letters;
mod newest;
mod over;
#[cfg(feature = "delta")]
pub mod replay;
#[cfg(feature = "delta")]
pub mod verify;

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use datafusion::datasource::MemTable;
use datafusion::prelude::SessionContext;
use datafusion::sql::parser::Statement as DfStatement;

use crate::connectors::sandbox::Sandbox;
use crate::error::{Error, Result};
use crate::plan::session::batch_session;
use crate::plan::source::METADATA;
use crate::plan::views::{located, quoted};
use crate::plan::{SinkKind, SinkPlan, StreamPlan};
use crate::sql::wildcard::hide;
use crate::sql::{Catalog, SourceText, Statement, Variables};
use crate::stream::letters::NAME;

pub use over::Relation;

/// The rows of a query and their schema.
pub struct Answer {
    pub schema: SchemaRef,
    pub batches: Vec<RecordBatch>,
}

/// What a query has around it.
#[derive(Clone, Copy)]
pub struct World<'a> {
    pub variables: &'a Variables<'a>,
    /// Online sinks are read from this state instead of their store.
    pub state: Option<&'a str>,
    pub sandbox: &'a Sandbox,
}

/// Runs the statements of `sql` one after the other; the last one's rows are the answer.
///
/// # Errors
/// User: SQL. External: a table cannot be read.
pub async fn query(catalog: &Catalog, plan: &StreamPlan, sql: &str, world: &World<'_>) -> Result<Answer> {
    let session = asof::with_joins(&batch_session()?, plan).enable_url_table();
    let text = SourceText::new("<command line>", sql);
    let mut answer = None;
    for statement in crate::sql::parser::parse(&text, world.variables)? {
        let (mut statement, place) = match statement {
            Statement::Other(statement, place) => (statement, place),
            Statement::ExplainPipeline => {
                answer = Some(introspect::pipeline(plan)?);
                continue;
            }
            Statement::Show(show) => {
                answer = Some(introspect::show(catalog, show)?);
                continue;
            }
            Statement::Describe(name, place) => match introspect::describe(catalog, plan, &name).await? {
                Some(columns) => {
                    answer = Some(columns);
                    continue;
                }
                None if catalog.table(&name).is_none() => {
                    return Err(introspect::unknown(catalog, &name, &place));
                }
                // The schema of a table may stand in its files only.
                None => {
                    register(&session, catalog, plan, &name, world).await?;
                    let table = session.table(quoted(&name)).await?;
                    answer = Some(introspect::columns(table.schema().as_arrow(), None)?);
                    continue;
                }
            },
            _ => {
                return Err(Error::user("this statement declares something and is no query")
                    .hint("Put it into a SQL file of the pipeline."));
            }
        };
        if let DfStatement::Statement(statement) = statement.as_mut() {
            hide(statement.as_mut(), &|name| hidden(catalog, plan, name));
        }
        let names =
            session.state().resolve_table_references(&statement).map_err(|error| located(error, &place))?;
        if !world.sandbox.is_open() {
            only_reads(&statement).map_err(|error| error.at(place.clone()))?;
        }
        for name in names.iter().filter(|name| name.schema() != Some("information_schema")) {
            let known = register(&session, catalog, plan, name.table(), world).await;
            known.map_err(|error| error.at(place.clone()))?;
        }
        let planner = session.state();
        let logical = planner.statement_to_plan(*statement).await.map_err(|error| located(error, &place))?;
        let frame = session.execute_logical_plan(logical).await.map_err(|error| located(error, &place))?;
        let schema = Arc::new(frame.schema().as_arrow().clone());
        answer = Some(Answer { schema, batches: frame.collect().await? });
    }
    answer.ok_or_else(|| Error::user("the query is empty").hint("Give one with -c 'SELECT …'."))
}

/// Columns of a sink or source that `SELECT *` leaves out.
fn hidden(catalog: &Catalog, plan: &StreamPlan, name: &str) -> Vec<String> {
    if catalog
        .source(name)
        .is_some_and(|source| source.options.shown("connector").as_deref() != Some("generator"))
    {
        return METADATA.map(str::to_owned).to_vec();
    }
    match plan.sinks().find(|(_, sink)| sink.name == name).map(|(_, sink)| &sink.kind) {
        #[cfg(feature = "delta")]
        Some(SinkKind::Delta(config)) => config.added_columns(),
        _ => Vec::new(),
    }
}

async fn register(
    session: &SessionContext,
    catalog: &Catalog,
    plan: &StreamPlan,
    name: &str,
    world: &World<'_>,
) -> Result<()> {
    if session.table_exist(quoted(name)).unwrap_or(false) {
        return Ok(());
    }
    if name == NAME {
        return register_letters(session, world).await;
    }
    if let Some((_, sink)) = plan.sinks().find(|(_, sink)| sink.name == name) {
        return register_sink(session, sink, world).await;
    }
    if let Some(table) = catalog.table(name) {
        #[cfg(feature = "redis")]
        if crate::plan::remote::is_remote(table) {
            let mut remote = crate::plan::remote::RemoteTable::new(table)?;
            remote.config.resolve_secrets(world.variables.environment)?;
            let rows = crate::connectors::redis::scan::read_all(&remote.config, &remote.schema).await?;
            let rows = MemTable::try_new(Arc::clone(&remote.schema), vec![rows])?;
            session.register_table(quoted(name), Arc::new(rows))?;
            return Ok(());
        }
        crate::plan::tables::register(session, table).await?;
        return Ok(());
    }
    // A view over dead letters finds them where the session has them.
    let mentions = || catalog.views.iter().any(|view| view.sql.contains(NAME));
    if catalog.view(name).is_some() && world.state.is_some() && mentions() && !session.table_exist(NAME)? {
        register_letters(session, world).await?;
    }
    let declared = catalog.source(name).map(|source| &source.place);
    match declared.or_else(|| catalog.view(name).map(|view| &view.place)) {
        Some(place) => history::relation(session, catalog, plan, name, place).await,
        None => {
            // What has no name here is the path of a file.
            crate::connectors::files::without_credentials(name)?;
            world.sandbox.check(name, true)
        }
    }
}

async fn register_letters(session: &SessionContext, world: &World<'_>) -> Result<()> {
    let Some(state) = world.state else {
        let hint = "Give it: --state ./.millstream/<name of the pipeline>.";
        return Err(Error::user("dead_letters lie in the state of a pipeline").hint(hint));
    };
    let found = letters::open(state).await?.letters(&letters::Filter::default(), None).await?;
    let table = MemTable::try_new(found.rows.schema(), vec![vec![found.rows]])?;
    session.register_table(NAME, Arc::new(table))?;
    Ok(())
}

/// Inside a sandbox a query reads: COPY, INSERT and CREATE EXTERNAL TABLE name places of their own.
fn only_reads(statement: &DfStatement) -> Result<()> {
    use datafusion::sql::sqlparser::ast::Statement as Sql;
    let reads = match statement {
        DfStatement::Explain(explain) => return only_reads(&explain.statement),
        DfStatement::Statement(sql) => {
            let inner = match sql.as_ref() {
                Sql::Explain { statement, .. } => statement.as_ref(),
                other => other,
            };
            matches!(
                inner,
                Sql::Query(_) | Sql::ShowTables { .. } | Sql::ShowColumns { .. } | Sql::ShowVariable { .. }
            )
        }
        _ => false,
    };
    match reads {
        true => Ok(()),
        false => Err(Error::user("inside a sandbox a query only reads").hint("Write a SELECT.")),
    }
}

async fn register_sink(session: &SessionContext, sink: &SinkPlan, world: &World<'_>) -> Result<()> {
    match &sink.kind {
        SinkKind::Online { .. } if world.state.is_some() => {
            let rows = newest::read(sink, world.state.unwrap_or_default()).await?;
            let table = MemTable::try_new(Arc::clone(&sink.schema), vec![rows])?;
            session.register_table(quoted(&sink.name), Arc::new(table))?;
        }
        #[cfg(feature = "delta")]
        SinkKind::Delta(config) => {
            let table = crate::connectors::delta::table::provider(&config.location).await?;
            session.register_table(quoted(&sink.name), table)?;
        }
        #[cfg(feature = "redis")]
        SinkKind::Online { store: crate::plan::OnlineKind::Redis(config), .. } => {
            let mut config = config.clone();
            config.resolve_secrets(world.variables.environment)?;
            let rows = crate::connectors::redis::scan::read_all(&config, &sink.schema).await?;
            let table = MemTable::try_new(Arc::clone(&sink.schema), vec![rows])?;
            session.register_table(quoted(&sink.name), Arc::new(table))?;
        }
        _ => {
            return Err(Error::user(format!("the sink {} keeps no rows that can be queried", sink.name))
                .hint("Query a Delta or Redis sink."));
        }
    }
    Ok(())
}
