//! Batch: the same names as tables. So far: ad-hoc queries over sinks, history, tables and files.
//!
//! A sink is queried by its name: a Delta sink is its table, an online sink is read back from its store. A source is its
//! backup, a view the same SQL over it ([`history`]). Files are queried by path ([`paths`]), `dead_letters` are read from
//! the state. A Delta table can be read as it was ([`crate::sql::versions`]). Only what a query names is opened.

mod ask;
mod asof;
#[cfg(feature = "delta")]
pub mod backfill;
pub mod history;
mod introspect;
pub mod letters;
mod newest;
mod over;
mod paths;
#[cfg(feature = "delta")]
pub mod replay;
#[cfg(feature = "delta")]
pub mod schedule;
#[cfg(feature = "redis")]
mod stored;
#[cfg(feature = "delta")]
pub mod verify;
mod window;

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use datafusion::catalog::TableProvider;
use datafusion::datasource::MemTable;
use datafusion::prelude::SessionContext;
use datafusion::sql::parser::Statement as DfStatement;

use crate::connectors::sandbox::Sandbox;
use crate::error::{Error, Place, Result};
use crate::plan::source::METADATA;
use crate::plan::views::{located, quoted};
use crate::plan::{SinkKind, SinkPlan, StreamPlan};
use crate::sql::parser::parse_ad_hoc;
use crate::sql::place::find_word;
use crate::sql::wildcard::hide;
use crate::sql::{Catalog, SourceText, Statement, Variables, versions};
use crate::stream::letters::NAME;

pub use ask::{Ask, Found, Rest, Settings};
pub use introspect::relations;
pub use over::Relation;

/// Schema of the tables of our own.
const OWN_SCHEMA: &str = "millstream";

/// The rows of a query and their schema.
pub struct Answer {
    pub schema: SchemaRef,
    pub batches: Vec<RecordBatch>,
}

/// What queries are asked of.
#[derive(Clone, Copy)]
pub struct World<'a> {
    pub catalog: &'a Catalog,
    pub plan: &'a StreamPlan,
    pub variables: &'a Variables<'a>,
    /// Online sinks are read from this state instead of their store.
    pub state: Option<&'a str>,
    pub sandbox: &'a Sandbox,
}

/// Runs the statements of a text one after the other; the last one's rows are the answer.
///
/// # Errors
/// User: SQL. External: a table cannot be read.
pub async fn query(text: &SourceText, world: &World<'_>, ask: Ask, settings: Settings) -> Result<Found> {
    let session = asof::with_joins(&ask::session(&settings)?, world.plan);
    let mut found = None;
    for statement in parse_ad_hoc(text, world.variables)? {
        found = Some(one(&session, statement, world, ask).await?);
    }
    let (answer, rest) =
        found.ok_or_else(|| Error::user("the query is empty").hint("Give one with -c 'SELECT …'."))?;
    let settings = Settings(Some(session.state().config_options().as_ref().clone()));
    Ok(Found { answer, rest, settings })
}

async fn one(
    session: &SessionContext,
    statement: Statement,
    world: &World<'_>,
    ask: Ask,
) -> Result<(Answer, Option<Rest>)> {
    let (catalog, plan) = (world.catalog, world.plan);
    let (mut statement, place) = match statement {
        Statement::Other(statement, place) => (statement, place),
        Statement::ExplainPipeline => return Ok((introspect::pipeline(plan)?, None)),
        Statement::Show(show) => return Ok((introspect::show(catalog, show)?, None)),
        Statement::Describe(name, place) => {
            return Ok((describe(session, &name, &place, world).await?, None));
        }
        _ => {
            return Err(Error::user("this statement declares something and is no query")
                .hint("Put it into a SQL file of the pipeline."));
        }
    };
    if let DfStatement::Statement(statement) = statement.as_mut() {
        hide(statement.as_mut(), &|name| hidden(catalog, plan, name));
    }
    if let DfStatement::CopyTo(copy) = statement.as_ref() {
        paths::know_bucket(session, &copy.target)?;
    }
    let names =
        session.state().resolve_table_references(&statement).map_err(|error| located(error, &place))?;
    if !world.sandbox.is_open() {
        only_reads(&statement).map_err(|error| error.at(place.clone()))?;
    }
    for name in names.iter().filter(|name| name.schema() != Some("information_schema")) {
        if name.schema() == Some(OWN_SCHEMA) {
            let known = register_own(session, name.table(), world).await;
            known.map_err(|error| {
                error.at(find_word(&place, name.table()).unwrap_or_else(|| place.clone()))
            })?;
            continue;
        }
        let known = register(session, name.table(), world).await;
        known.map_err(|error| error.at(find_word(&place, name.table()).unwrap_or_else(|| place.clone())))?;
    }
    let ran = ask::run(session, *statement, &place, ask).await;
    ran.map_err(|error| introspect::nearest_name(catalog, error))
}

/// The names of a relation's columns; none where they stand in files only.
///
/// # Errors
/// User: it does not plan.
pub async fn columns_of(world: &World<'_>, name: &str) -> Result<Vec<String>> {
    introspect::column_names(world.catalog, world.plan, name).await
}

async fn describe(session: &SessionContext, name: &str, place: &Place, world: &World<'_>) -> Result<Answer> {
    if let Some(columns) = introspect::describe(world.catalog, world.plan, name).await? {
        return Ok(columns);
    }
    if world.catalog.table(name).is_none() && !paths::is_path(name) {
        return Err(introspect::unknown(world.catalog, name, place));
    }
    // The schema of a table may stand in its files only.
    register(session, name, world).await.map_err(|error| error.at(place.clone()))?;
    let table = session.table(quoted(name)).await?;
    introspect::columns(table.schema().as_arrow(), None)
}

/// Columns of a sink or source that `SELECT *` leaves out.
fn hidden(catalog: &Catalog, plan: &StreamPlan, name: &str) -> Vec<String> {
    let name = versions::split(name).map_or(name, |(table, _)| table);
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

async fn register(session: &SessionContext, name: &str, world: &World<'_>) -> Result<()> {
    let (catalog, plan) = (world.catalog, world.plan);
    if session.table_exist(quoted(name)).unwrap_or(false) {
        return Ok(());
    }
    if name == NAME {
        return register_letters(session, world).await;
    }
    if let Some((table, version)) = versions::split(name) {
        let provider = version_of(table, version, world).await?;
        session.register_table(quoted(name), provider)?;
        return Ok(());
    }
    if let Some((_, sink)) = plan.sinks().find(|(_, sink)| sink.name == name) {
        return register_sink(session, sink, world).await;
    }
    if let Some(table) = catalog.table(name) {
        #[cfg(feature = "redis")]
        if crate::plan::remote::is_remote(table) {
            let mut remote = crate::plan::remote::RemoteTable::new(table)?;
            remote.config.resolve_secrets(world.variables.environment)?;
            let stored = stored::Stored::new(name, remote.config, remote.schema)?;
            session.register_table(quoted(name), Arc::new(stored))?;
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
        None if paths::is_path(name) => {
            allowed(name, world)?;
            session.register_table(quoted(name), paths::open(session, name).await?)?;
            Ok(())
        }
        None => Ok(()),
    }
}

/// What a query may read by its path.
fn allowed(path: &str, world: &World<'_>) -> Result<()> {
    crate::connectors::files::without_credentials(path)?;
    world.sandbox.check(path, true)
}

/// A Delta table as it was: a sink, a declared table, a path.
#[cfg(feature = "delta")]
async fn version_of(
    name: &str,
    version: versions::Version,
    world: &World<'_>,
) -> Result<Arc<dyn TableProvider>> {
    use crate::connectors::delta::table::{AsOf, provider_as_of};
    let sink = world.plan.sinks().find(|(_, sink)| sink.name == name).map(|(_, sink)| &sink.kind);
    let location = match (sink, world.catalog.table(name)) {
        (Some(SinkKind::Delta(config)), _) => Some(config.location.clone()),
        (None, Some(table)) if table.options.shown("connector").as_deref() == Some("delta") => {
            Some(table.options.clone().required("location")?)
        }
        (None, None) if paths::is_path(name) => {
            allowed(name, world)?;
            Some(name.to_owned())
        }
        _ => None,
    };
    let location = location.ok_or_else(|| {
        Error::user(format!("{name} has no versions"))
            .hint("Only Delta tables have: a sink, a table, a path.")
    })?;
    let as_of = match version {
        versions::Version::Number(number) => AsOf::Version(number),
        versions::Version::Millis(millis) => AsOf::Millis(millis),
    };
    provider_as_of(&location, as_of).await
}

#[cfg(not(feature = "delta"))]
async fn version_of(
    name: &str,
    _version: versions::Version,
    _world: &World<'_>,
) -> Result<Arc<dyn TableProvider>> {
    Err(Error::user(format!("{name} has no versions")).hint("This build reads no Delta tables."))
}

/// What Millstream knows of its own work: `millstream.runs`.
#[cfg(feature = "delta")]
async fn register_own(session: &SessionContext, name: &str, world: &World<'_>) -> Result<()> {
    use datafusion::catalog::MemorySchemaProvider;
    if name != "runs" {
        return Err(Error::user(format!("there is no {OWN_SCHEMA}.{name}"))
            .hint(format!("There is {OWN_SCHEMA}.runs: the runs of schedules.")));
    }
    let Some(state) = world.state else {
        let hint = "Give it: --state ./.millstream/<name of the pipeline>.";
        return Err(Error::user("the runs of schedules lie in the state of a pipeline").hint(hint));
    };
    let rows = schedule::table(&schedule::runs(state).await?)?;
    let own = || session.catalog(&session.catalog_names().into_iter().next()?);
    if let Some(catalog) = own()
        && catalog.schema(OWN_SCHEMA).is_none()
    {
        catalog.register_schema(OWN_SCHEMA, Arc::new(MemorySchemaProvider::new()))?;
    }
    let table = datafusion::common::TableReference::partial(OWN_SCHEMA, name);
    if !session.table_exist(table.clone())? {
        session.register_table(table, Arc::new(MemTable::try_new(rows.schema(), vec![vec![rows]])?))?;
    }
    Ok(())
}

#[cfg(not(feature = "delta"))]
async fn register_own(_session: &SessionContext, name: &str, _world: &World<'_>) -> Result<()> {
    Err(Error::user(format!("there is no {OWN_SCHEMA}.{name}")).hint("This build has no schedules."))
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
            let stored = stored::Stored::new(&sink.name, *config, Arc::clone(&sink.schema))?;
            session.register_table(quoted(&sink.name), Arc::new(stored))?;
        }
        _ => {
            return Err(Error::user(format!("the sink {} keeps no rows that can be queried", sink.name))
                .hint("Query a Delta or Redis sink."));
        }
    }
    Ok(())
}
