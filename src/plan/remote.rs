//! Look-up tables that stay where they are: `CREATE TABLE n (columns) WITH (connector = 'redis', key = …)`.

use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::{Field, Schema, SchemaRef};
use datafusion::common::JoinType;
use datafusion::logical_expr::{Expr, Join, LogicalPlan, TableScan};

use crate::connectors::redis::RedisConfig;
use crate::connectors::reference::{self, Role};
use crate::error::{Error, Result};
use crate::sql::CreateTable;

/// What becomes of rows whose key cannot be asked for, as Redis does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLookupError {
    /// What was last seen of the key, NULL for one never seen.
    Stale,
    Null,
    DeadLetter,
}

/// A hash per row in Redis, as a sink writes them.
#[derive(Debug, Clone)]
pub struct RemoteTable {
    pub name: String,
    pub config: RedisConfig,
    /// All declared columns.
    pub schema: SchemaRef,
    /// Those that go on.
    pub columns: Vec<usize>,
    /// The key columns, in the order of the join's.
    pub keys: Vec<usize>,
    /// How long an answer counts.
    pub cache: Duration,
    pub on_error: OnLookupError,
}

impl RemoteTable {
    /// # Errors
    /// User: an option or a column is missing or wrong.
    pub fn new(table: &CreateTable) -> Result<Self> {
        let placed = |error: Error| error.at(table.place.clone());
        let mut options = table.options.clone();
        options.required("connector").map_err(placed)?;
        options.declare(reference::options("redis", Role::Table));
        let cache = options.duration("cache").map_err(placed)?.unwrap_or(Duration::from_secs(60));
        let on_error =
            match options.choice("on_lookup_error", &["stale", "null", "dead_letter"]).map_err(placed)? {
                Some(1) => OnLookupError::Null,
                Some(2) => OnLookupError::DeadLetter,
                _ => OnLookupError::Stale,
            };
        let config = RedisConfig::of_table(&mut options).map_err(placed)?;
        options.finish().map_err(placed)?;
        if table.columns.is_empty() {
            let hint =
                "Declare them: CREATE TABLE n (user_id BIGINT, score DOUBLE) WITH (connector = 'redis', …).";
            return Err(placed(
                Error::user(format!("table {}: its columns are not declared", table.name)).hint(hint),
            ));
        }
        let field = |c: &crate::sql::Column| Field::new(&c.name, c.data_type.clone(), true);
        let schema = Arc::new(Schema::new(table.columns.iter().map(field).collect::<Vec<_>>()));
        let keys = config.key_columns(&schema).map_err(placed)?;
        let columns = (0..schema.fields().len()).collect();
        Ok(Self { name: table.name.clone(), config, schema, columns, keys, cache, on_error })
    }
}

/// Whether a table is one.
pub fn is_remote(table: &CreateTable) -> bool {
    table.options.shown("connector").is_some_and(|connector| connector == "redis")
}

/// The table of a join whose bounded side is a Redis table; `None` when it is none.
///
/// # Errors
/// What is wrong with the join, as text and hint.
pub(super) fn of_join(
    join: &Join,
    stream_first: bool,
    tables: &[CreateTable],
) -> Result<Option<Result<RemoteTable, (String, String)>>> {
    let side = if stream_first { &join.right } else { &join.left };
    let names = super::tables::scans(side);
    let Some(table) = tables.iter().find(|table| is_remote(table) && names.contains(&table.name)) else {
        return Ok(None);
    };
    let mut remote = RemoteTable::new(table)?;
    let refuse = |what: &str, hint: &str| Ok(Some(Err((format!("{}: {what}", table.name), hint.to_owned()))));
    let Some(scan) = bare(side) else {
        return refuse(
            "a query over a Redis table cannot be joined",
            "Join the table itself, and filter above the join.",
        );
    };
    if join.join_type == JoinType::Full {
        return refuse("a FULL JOIN cannot run", "Use LEFT JOIN.");
    }
    if let Some(columns) = &scan.projection {
        remote.columns.clone_from(columns);
    }
    let of_table = |(left, right): &(Expr, Expr)| if stream_first { right.clone() } else { left.clone() };
    let named: Option<Vec<usize>> = join
        .on
        .iter()
        .map(|pair| match of_table(pair) {
            Expr::Column(column) => remote.schema.index_of(&column.name).ok(),
            _ => None,
        })
        .collect();
    let same = named.as_ref().is_some_and(|named| {
        named.len() == remote.keys.len() && remote.keys.iter().all(|key| named.contains(key))
    });
    let Some(named) = named.filter(|_| same) else {
        let hint =
            format!("Write ON … = {} with the same type on both sides.", remote.config.key.join(" AND … = "));
        return refuse("a Redis table is found by its key only", &hint);
    };
    remote.keys = named;
    Ok(Some(Ok(remote)))
}

/// The scan of a plan that is nothing else.
fn bare(plan: &LogicalPlan) -> Option<&TableScan> {
    match plan {
        LogicalPlan::SubqueryAlias(alias) => bare(&alias.input),
        LogicalPlan::TableScan(scan) if scan.filters.is_empty() => Some(scan),
        _ => None,
    }
}
