//! A source's other body: its backup (DESIGN §6). A view over it is the same SQL as in the stream.
//!
//! `history = 'name'` names a Delta sink of the pipeline or a declared table; a source without it has the Delta sink that
//! stores its own rows (`CREATE SINK … FROM source`), if there is one. The table that takes the source's place has the
//! source's columns: one that is stored as it stands there, a computed one that is not (the SQL is newer than the
//! backup) computed again, a nullable one that is not there NULL.
//!
//! A [`Cut`] says which rows count: all of a version, or those that a sink has seen, without those that the stream left
//! out of it.

use std::sync::Arc;

use arrow::array::RecordBatch;
use datafusion::common::JoinType;
use datafusion::dataframe::DataFrame;
use datafusion::datasource::MemTable;
use datafusion::logical_expr::{Expr, cast, lit};
use datafusion::prelude::{SessionContext, ident};
use datafusion::scalar::ScalarValue;
use sqlparser::ast::ExprWithAlias;

#[cfg(feature = "delta")]
use crate::connectors::delta::table::{AsOf, provider_as_of};
use crate::error::{Error, Place, Result};
#[cfg(feature = "delta")]
use crate::plan::SinkKind;
use crate::plan::session::stream_session;
pub use crate::plan::source::Backup;
use crate::plan::source::{METADATA, all_sources};
use crate::plan::tables::scans;
use crate::plan::views::{ViewPlanner, located, quoted};
use crate::plan::{SourcePlan, StreamPlan};
use crate::sql::{Catalog, CreateSource, SinkInput};

/// Which rows of a backup count.
#[derive(Debug, Clone, Default)]
pub struct Cut {
    /// Version of a Delta table; the newest without.
    pub version: Option<u64>,
    /// Only rows of these (topic, partition), below the offset. Partitions that are not named have none.
    pub below: Option<Vec<(String, i32, i64)>>,
    /// Not the rows with these `topic, partition, offset`.
    pub without: Option<RecordBatch>,
}

/// # Errors
/// User: the source has no history, or one that cannot be read.
pub fn backup_of(catalog: &Catalog, plan: &StreamPlan, source: &SourcePlan) -> Result<Backup> {
    let placed = |error: Error| match catalog.source(&source.name) {
        Some(declared) => error.at(declared.place.clone()),
        None => error,
    };
    let of_sink = |name: &str| match &plan.sinks().find(|(_, sink)| sink.name == name)?.1.kind {
        #[cfg(feature = "delta")]
        SinkKind::Delta(config) => Some(Backup::Delta(config.location.clone())),
        _ => None,
    };
    if let Some(history) = &source.history {
        let table = || catalog.table(history).map(|table| Backup::Table(Box::new(table.clone())));
        return of_sink(history).or_else(table).ok_or_else(|| {
            let message =
                format!("source {}: its history {history} is no Delta sink and no table", source.name);
            let hint =
                "Let history name a sink with connector = 'delta', or a table declared with CREATE TABLE.";
            placed(Error::user(message).hint(hint))
        });
    }
    let stores_it =
        |input: &SinkInput| matches!(input, SinkInput::Relation { name, .. } if *name == source.name);
    let own = catalog.sinks.iter().filter(|sink| stores_it(&sink.input)).find_map(|sink| of_sink(&sink.name));
    own.ok_or_else(|| {
        let hint = format!(
            "Add CREATE SINK {0}_backup FROM {0} WITH (connector = 'delta', location = '…') and history = '{0}_backup'.",
            source.name
        );
        placed(Error::user(format!("{} is a stream without a backup", source.name)).hint(hint))
    })
}

/// Makes a source or view known to a session: over all rows of the backups below it.
///
/// # Errors
/// User: no history, SQL that does not plan. External: a backup cannot be read.
pub async fn relation(
    session: &SessionContext,
    catalog: &Catalog,
    plan: &StreamPlan,
    name: &str,
    place: &Place,
) -> Result<()> {
    let planning = stream_session()?;
    let sources = all_sources(&planning, catalog)?;
    let names = match sources.contains_key(name) {
        true => vec![name.to_owned()],
        false => scans(&ViewPlanner::new(&planning, catalog, &sources).relation(name, place).await?),
    };
    for source in names.iter().filter_map(|name| sources.get(name)) {
        if !session.table_exist(quoted(&source.name))? {
            register(session, catalog, plan, source, &Cut::default()).await?;
        }
    }
    ViewPlanner::new(session, catalog, &sources).relation(name, place).await?;
    Ok(())
}

/// Makes a source known to a session, as its backup.
///
/// # Errors
/// User: no history, columns that the backup lacks. External: the backup cannot be read.
pub async fn register(
    session: &SessionContext,
    catalog: &Catalog,
    plan: &StreamPlan,
    source: &SourcePlan,
    cut: &Cut,
) -> Result<()> {
    let rows = match backup_of(catalog, plan, source)? {
        #[cfg(feature = "delta")]
        Backup::Delta(location) => {
            let version = cut.version.map_or(AsOf::Newest, AsOf::Version);
            session.read_table(provider_as_of(&location, version).await?)?
        }
        #[cfg(not(feature = "delta"))]
        Backup::Delta(_) => return Err(Error::internal("a Delta table without the feature")),
        Backup::Table(table) => {
            if !session.table_exist(quoted(&table.name))? {
                crate::plan::tables::register(session, &table).await?;
            }
            session.table(quoted(&table.name)).await?
        }
    };
    let declared = catalog.source(&source.name);
    let declared = declared.ok_or_else(|| Error::internal("a source that no statement declares"))?;
    let rows = within(shaped(session, rows, source, declared)?, source, cut, session)?;
    session.register_table(quoted(&source.name), rows.into_view())?;
    Ok(())
}

/// The backup's rows with the source's columns.
fn shaped(
    session: &SessionContext,
    rows: DataFrame,
    source: &SourcePlan,
    declared: &CreateSource,
) -> Result<DataFrame> {
    let stored = |name: &str| rows.schema().as_arrow().field_with_name(name).is_ok();
    let computed = |name: &str| source.computed.iter().any(|(_, field)| field.name() == name);
    let mut columns: Vec<Expr> = Vec::new();
    for field in source.schema.fields() {
        let (name, kind) = (field.name(), field.data_type());
        if stored(in_history(source, name)) {
            columns.push(cast(ident(in_history(source, name)), kind.clone()).alias(name));
        } else if METADATA.contains(&name.as_str()) || field.is_nullable() && !computed(name) {
            columns.push(lit(ScalarValue::try_from(kind)?).alias(name));
        } else if !computed(name) {
            let message = format!("the backup of source {} has no column {name}", source.name);
            let hint = "Declare the column without NOT NULL: records of the backup do not have it.";
            return Err(Error::user(message).hint(hint).at(declared.place.clone()));
        }
    }
    let missing: Vec<String> =
        source.computed.iter().map(|(_, field)| field.name().clone()).filter(|name| !stored(name)).collect();
    let mut rows = rows.select(columns)?;
    for column in &declared.computed {
        let Some(field) =
            source.schema.field_with_name(&column.name).ok().filter(|f| missing.contains(f.name()))
        else {
            continue;
        };
        let sql = ExprWithAlias { expr: column.expr.clone(), alias: None };
        let expr = session.state().create_logical_expr_from_sql_expr(sql, rows.schema());
        let expr = cast(expr.map_err(|error| located(error, &column.place))?, field.data_type().clone());
        rows = rows.with_column(&column.name, expr)?;
    }
    let all: Vec<Expr> = source.schema.fields().iter().map(|field| ident(field.name())).collect();
    Ok(rows.select(all)?)
}

/// A column's name in the backup: somebody else may call the place of a record otherwise.
fn in_history<'n>(source: &'n SourcePlan, name: &'n str) -> &'n str {
    let options = &source.history_options;
    let theirs = match name {
        "_partition" => &options.partition_column,
        "_offset" => &options.offset_column,
        _ => &None,
    };
    theirs.as_deref().unwrap_or(name)
}

/// The rows of the cut.
fn within(rows: DataFrame, source: &SourcePlan, cut: &Cut, session: &SessionContext) -> Result<DataFrame> {
    let mut rows = rows;
    if (cut.below.is_some() || cut.without.is_some()) && !source.has_metadata() {
        let message =
            format!("source {} has no offsets, so it is not known which rows a sink has seen", source.name);
        return Err(Error::user(message).hint("Only sources of records (kafka, files) have offsets."));
    }
    let [topic, partition, offset] = [METADATA[0], METADATA[1], METADATA[2]];
    if let Some(below) = &cut.below {
        let one = |(t, p, end): &(String, i32, i64)| {
            let place = ident(topic).eq(lit(t.as_str())).and(ident(partition).eq(lit(*p)));
            place.and(ident(offset).lt(lit(*end)))
        };
        let any = below.iter().map(one).reduce(Expr::or).unwrap_or_else(|| lit(false));
        rows = rows.filter(any)?;
    }
    if let Some(without) = cut.without.as_ref().filter(|without| without.num_rows() > 0) {
        let table = MemTable::try_new(without.schema(), vec![vec![without.clone()]])?;
        let left_out = session.read_table(Arc::new(table))?;
        let on = ["topic", "partition", "offset"];
        rows = rows.join(left_out, JoinType::LeftAnti, &[topic, partition, offset], &on, None)?;
    }
    Ok(rows)
}
