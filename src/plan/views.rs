//! Catalog → logical plans. Views may refer forward and across files; a cycle is an error.

use std::collections::BTreeMap;
use std::sync::Arc;

use datafusion::catalog::TableProvider;
use datafusion::common::SchemaError;
use datafusion::datasource::ViewTable;
use datafusion::error::DataFusionError;
use datafusion::logical_expr::LogicalPlan;
use datafusion::prelude::SessionContext;
use datafusion::sql::parser::Statement as DfStatement;
use sqlparser::ast::{Query, Statement};

use crate::error::{Error, Place, Result};
use crate::plan::session::SourceTable;
use crate::plan::source::SourcePlan;
use crate::sql::options::nearest;
use crate::sql::wildcard::hide;
use crate::sql::{Catalog, CreateView};
use crate::stream::letters;

/// Plans the queries of one catalog in one session.
pub struct ViewPlanner<'a> {
    pub session: &'a SessionContext,
    pub catalog: &'a Catalog,
    pub sources: &'a BTreeMap<String, Arc<SourcePlan>>,
    planning: Vec<String>,
}

impl<'a> ViewPlanner<'a> {
    pub fn new(
        session: &'a SessionContext,
        catalog: &'a Catalog,
        sources: &'a BTreeMap<String, Arc<SourcePlan>>,
    ) -> Self {
        Self { session, catalog, sources, planning: Vec::new() }
    }

    /// The analysed and optimised plan of a query, views inlined.
    ///
    /// # Errors
    /// A user error with its place: unknown table or column, wrong types, a cycle of views.
    pub async fn query(&mut self, query: &Query, place: &Place) -> Result<LogicalPlan> {
        let plan = self.unoptimised(query, place).await?;
        let state = self.session.state();
        state.optimize(&plan).map_err(|error| located(error, place))
    }

    /// The plan of `SELECT * FROM relation`.
    pub async fn relation(&mut self, name: &str, place: &Place) -> Result<LogicalPlan> {
        self.register(name, place).await?;
        let table = self.session.table(quoted(name)).await.map_err(|error| located(error, place))?;
        let plan = table.into_unoptimized_plan();
        self.session.state().optimize(&plan).map_err(|error| located(error, place))
    }

    /// The plan of a query as it stands, views inlined: for a session that analyses it with other plans.
    ///
    /// # Errors
    /// As [`ViewPlanner::query`].
    pub async fn unoptimised(&mut self, query: &Query, place: &Place) -> Result<LogicalPlan> {
        let mut query = query.clone();
        hide(&mut query, &|name| {
            let source = self.sources.get(name);
            source.map(|source| source.hidden()).unwrap_or_default()
        });
        let statement = DfStatement::Statement(Box::new(Statement::Query(Box::new(query))));
        let state = self.session.state();
        let references = state.resolve_table_references(&statement).map_err(|error| located(error, place))?;
        for reference in references {
            Box::pin(self.register(reference.table(), place)).await?;
        }
        let state = self.session.state();
        state.statement_to_plan(statement).await.map_err(|error| self.unknown_relation(located(error, place)))
    }

    /// DataFusion does not say which name is near.
    fn unknown_relation(&self, error: Error) -> Error {
        let Some(name) =
            error.message().strip_prefix("table '").and_then(|rest| rest.strip_suffix("' not found"))
        else {
            return error;
        };
        let known = self.catalog.names();
        match nearest(name, &known) {
            Some(near) => error.hint(format!("Did you mean {near}?")),
            None => error.hint(format!("The pipeline declares {}.", known.join(", "))),
        }
    }

    /// Makes a source or view known to the session. Unknown names are left to DataFusion, which knows the place.
    async fn register(&mut self, name: &str, place: &Place) -> Result<()> {
        if self.session.table_exist(quoted(name)).unwrap_or(false) {
            return Ok(());
        }
        if let Some(source) = self.sources.get(name) {
            let table = SourceTable { name: name.to_owned(), schema: Arc::clone(&source.schema) };
            return self.put(name, Arc::new(table));
        }
        if name == letters::NAME {
            return self
                .put(name, Arc::new(SourceTable { name: name.to_owned(), schema: letters::schema() }));
        }
        let Some(view) = self.catalog.view(name) else {
            return match self.catalog.table(name) {
                Some(table) => crate::plan::tables::register(self.session, table).await,
                // A common table expression has no name in the catalog; what is nowhere DataFusion refuses.
                None => Ok(()),
            };
        };
        self.register_view(name, view, place).await
    }

    async fn register_view(&mut self, name: &str, view: &CreateView, place: &Place) -> Result<()> {
        if self.planning.iter().any(|planned| planned == name) {
            let cycle = format!("{} -> {name}", self.planning.join(" -> "));
            return Err(Error::user(format!("the view {name} depends on itself: {cycle}"))
                .hint("Let one of these views read a source instead.")
                .at(place.clone()));
        }
        self.planning.push(name.to_owned());
        let plan = self.unoptimised(&view.query, &view.place).await?;
        self.planning.pop();
        self.put(name, Arc::new(ViewTable::new(plan, Some(view.sql.clone()))))
    }

    fn put(&self, name: &str, table: Arc<dyn TableProvider>) -> Result<()> {
        self.session.register_table(quoted(name), table)?;
        Ok(())
    }
}

/// A reference that is not folded to lower case again: catalog names are already normalised.
pub fn quoted(name: &str) -> datafusion::common::TableReference {
    datafusion::common::TableReference::bare(name.to_owned())
}

/// A planning error of DataFusion at its own span, if it has one, else at the statement.
pub fn located(error: DataFusionError, statement: &Place) -> Error {
    let slip = did_you_mean(&error);
    let help = error.diagnostic().and_then(|diagnostic| Some(diagnostic.helps.first()?.message.clone()));
    let place = error.diagnostic().and_then(|diagnostic| diagnostic.span).map_or_else(
        || statement.clone(),
        |span| {
            // Spans count from the start of the text that was parsed, which is the whole file.
            let width = (span.end.column.saturating_sub(span.start.column)).max(1) as usize;
            Place {
                line: span.start.line as usize,
                column: span.start.column as usize,
                width,
                ..statement.clone()
            }
        },
    );
    let message = match error.diagnostic() {
        Some(diagnostic) => diagnostic.message.clone(),
        None => strip(&error.strip_backtrace()),
    };
    if message.starts_with("Cannot create filter with non-boolean predicate") {
        let place = crate::sql::place::find_word(statement, "WHERE").unwrap_or(place);
        return Error::user("the condition of WHERE is no BOOLEAN")
            .hint("Write a condition such as amount > 0.")
            .at(place);
    }
    let error = Error::user(lower_first(&message)).at(place);
    match slip.or(help) {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// What a misspelt name may have meant.
fn did_you_mean(error: &DataFusionError) -> Option<String> {
    if let DataFusionError::SchemaError(cause, _) = error.find_root()
        && let SchemaError::FieldNotFound { field, valid_fields } = cause.as_ref()
    {
        let mut names: Vec<String> = valid_fields.iter().map(|column| column.name.clone()).collect();
        names.dedup();
        return Some(match nearest(&field.name, &names) {
            Some(near) => format!("Did you mean {near}?"),
            None if names.is_empty() => "There is no FROM.".to_owned(),
            None => format!("The columns are {}.", names.join(", ")),
        });
    }
    // DataFusion says it in the text for functions only.
    let text = error.strip_backtrace();
    let near = text.split("Did you mean '").nth(1)?.split('\'').next()?;
    Some(format!("Did you mean {near}?"))
}

/// Messages of ours begin in lower case.
fn lower_first(message: &str) -> String {
    let mut letters = message.chars();
    match (letters.next(), letters.clone().next()) {
        (Some(first), Some(second)) if !second.is_uppercase() => {
            first.to_lowercase().chain(letters).collect()
        }
        _ => message.to_owned(),
    }
}

fn strip(message: &str) -> String {
    let known =
        ["Error during planning: ", "Schema error: ", "This feature is not implemented: ", "SQL error: "];
    let message = known.iter().fold(message, |text, prefix| text.strip_prefix(prefix).unwrap_or(text));
    message.to_owned()
}
