//! Reading a Delta table in a DataFusion session, and its checkpoints.
//!
//! Columns have the plain types of our own rooms: text is Utf8 wherever it comes from (a file or a partition value),
//! timestamps are µs in UTC. So a query over the table plans as the same query over the stream does.

use std::borrow::Cow;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::datasource::TableType;
use datafusion::error::{DataFusionError, Result as DataFusionResult};
use datafusion::logical_expr::{Expr, LogicalPlan, TableProviderFilterPushDown};
use datafusion::physical_plan::ExecutionPlan;
use deltalake_core::DeltaTable;
use deltalake_core::delta_datafusion::{DeltaScanConfig, DeltaScanNext};

use super::store::{existing_table, failed};
use crate::error::{Error, Result};

/// Which version of a table is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AsOf {
    Newest,
    Version(u64),
    /// The newest version at or before this time, ms since the epoch.
    Millis(i64),
}

/// Whether there is a Delta table.
///
/// # Errors
/// User or external: the location cannot be opened, the store failed.
pub async fn exists(location: &str) -> Result<bool> {
    match existing_table(location)? {
        None => Ok(false),
        Some(table) => table.verify_deltatable_existence().await.map_err(|error| failed(location, error)),
    }
}

/// The newest version of a table.
///
/// # Errors
/// External: there is no Delta table at the location, or the store failed.
pub async fn provider(location: &str) -> Result<Arc<dyn TableProvider>> {
    provider_as_of(location, AsOf::Newest).await
}

/// A pinned version of a table.
///
/// # Errors
/// User: the table has no such version. External: there is no table, or the store failed.
pub async fn provider_as_of(location: &str, as_of: AsOf) -> Result<Arc<dyn TableProvider>> {
    let table = load(location, as_of).await?;
    let snapshot = table.snapshot().map_err(|error| failed(location, error))?.snapshot().clone();
    let mut config = DeltaScanConfig::new().with_wrap_partition_values(false);
    config.schema_force_view_types = false;
    let scan = DeltaScanNext::new(snapshot, config)?;
    Ok(Arc::new(Delta { table, scan }))
}

/// Some files of a table that is loaded, by their paths as delta-rs shows them.
///
/// # Errors
/// External: the table cannot be scanned.
pub(super) fn provider_of_files(table: &DeltaTable, paths: Vec<String>) -> Result<Arc<dyn TableProvider>> {
    let location = table.table_url().to_string();
    let snapshot = table.snapshot().map_err(|error| failed(&location, error))?.snapshot().clone();
    let mut config = DeltaScanConfig::new().with_wrap_partition_values(false);
    config.schema_force_view_types = false;
    let scan = DeltaScanNext::new(snapshot, config)?.with_file_paths(paths);
    Ok(Arc::new(Delta { table: table.clone(), scan }))
}

/// Writes a checkpoint of the newest version, so that readers need not replay the log; returns the version. Commits
/// may go on meanwhile. Old log entries are kept.
///
/// # Errors
/// External: there is no table, or the store failed.
pub async fn checkpoint(location: &str) -> Result<u64> {
    let table = load(location, AsOf::Newest).await?;
    let written = deltalake_core::checkpoints::create_checkpoint(&table, None).await;
    written.map_err(|error| failed(location, error))?;
    table.version().ok_or_else(|| Error::internal("a loaded Delta table has no version"))
}

/// The newest epoch that an application (pipeline/sink) has committed.
///
/// # Errors
/// External: there is no table, or the store failed.
pub async fn newest_epoch(location: &str, app: &str) -> Result<Option<u64>> {
    let table = load(location, AsOf::Newest).await?;
    let snapshot = table.snapshot().map_err(|error| failed(location, error))?;
    let version = snapshot.transaction_version(table.log_store().as_ref(), app).await;
    Ok(version.map_err(|error| failed(location, error))?.and_then(|epoch| u64::try_from(epoch).ok()))
}

/// The newest version of a table, the state that owns it, and the versions of applications in it.
pub struct Progress {
    pub version: u64,
    pub state_id: Option<String>,
    /// As asked for.
    pub applications: Vec<Option<i64>>,
}

/// What the newest version of a table says of some applications.
///
/// # Errors
/// External: there is no table, or the store failed.
pub async fn progress(location: &str, applications: &[String]) -> Result<Progress> {
    let table = load(location, AsOf::Newest).await?;
    let snapshot = table.snapshot().map_err(|error| failed(location, error))?;
    let log = table.log_store();
    let mut versions = Vec::with_capacity(applications.len());
    for application in applications {
        let version = snapshot.transaction_version(log.as_ref(), application).await;
        versions.push(version.map_err(|error| failed(location, error))?);
    }
    Ok(Progress {
        version: snapshot.version(),
        state_id: snapshot.metadata().configuration().get(super::committer::STATE_PROPERTY).cloned(),
        applications: versions,
    })
}

pub(super) async fn load(location: &str, as_of: AsOf) -> Result<DeltaTable> {
    let absent = || {
        let hint = "It appears when the pipeline commits its first rows.";
        Error::external(format!("there is no Delta table at {location} yet")).hint(hint)
    };
    let mut table = existing_table(location)?.ok_or_else(absent)?;
    if !table.verify_deltatable_existence().await.map_err(|error| failed(location, error))? {
        return Err(absent());
    }
    let loaded = match as_of {
        AsOf::Newest => table.load().await,
        AsOf::Version(version) => table.load_version(version).await,
        AsOf::Millis(millis) => {
            let time = chrono::DateTime::from_timestamp_millis(millis)
                .ok_or_else(|| Error::user(format!("{millis} ms is no time")))?;
            table.load_with_datetime(time).await
        }
    };
    match (loaded, as_of) {
        // The library answers with the oldest version.
        (Ok(()), AsOf::Millis(millis)) if committed(&table).is_some_and(|at| at > millis) => {
            Err(Error::user(format!("the Delta table {location} has no version as old as that"))
                .hint("Give a later time; old versions go when the log expires."))
        }
        (Ok(()), _) => Ok(table),
        (Err(error), AsOf::Version(version)) => {
            // The library's error is one of reading, whatever is missing.
            let newest = Box::pin(load(location, AsOf::Newest)).await?.version().unwrap_or_default();
            Err(match version > newest {
                true => Error::user(format!(
                    "the Delta table {location} has no version {version}; its newest is {newest}"
                )),
                false => Error::external(format!(
                    "version {version} of the Delta table {location} cannot be read; its newest is {newest}"
                ))
                .because(error)
                .hint("Old versions go when the log expires."),
            })
        }
        (Err(error), _) => Err(failed(location, error)),
    }
}

/// When the loaded version was committed, ms since the epoch.
fn committed(table: &DeltaTable) -> Option<i64> {
    table.snapshot().ok()?.version_timestamp(table.version()?)
}

/// A scan that makes its table's store known to whatever session it is planned in.
#[derive(Debug)]
struct Delta {
    table: DeltaTable,
    scan: DeltaScanNext,
}

#[async_trait]
impl TableProvider for Delta {
    fn schema(&self) -> SchemaRef {
        self.scan.schema()
    }

    fn table_type(&self) -> TableType {
        self.scan.table_type()
    }

    fn get_logical_plan(&self) -> Option<Cow<'_, LogicalPlan>> {
        self.scan.get_logical_plan()
    }

    async fn scan(
        &self,
        session: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> DataFusionResult<Arc<dyn ExecutionPlan>> {
        let registered = self.table.update_datafusion_session(session);
        registered.map_err(|error| DataFusionError::External(Box::new(error)))?;
        self.scan.scan(session, projection, filters, limit).await
    }

    fn supports_filters_pushdown(
        &self,
        filters: &[&Expr],
    ) -> DataFusionResult<Vec<TableProviderFilterPushDown>> {
        self.scan.supports_filters_pushdown(filters)
    }
}
