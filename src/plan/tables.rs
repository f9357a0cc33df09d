//! Bounded tables: `CREATE TABLE … WITH (connector = 'csv' | 'parquet' | 'ndjson' | 'delta', location = …)`.
//!
//! Without a column list the schema is inferred. Locations are paths, globs or `s3://…`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::{Field, Schema};
use datafusion::catalog::TableProvider;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::datasource::listing::{ListingTable, ListingTableConfig, ListingTableUrl};
use datafusion::datasource::provider_as_source;
use datafusion::error::DataFusionError;
use datafusion::execution::options::ReadOptions;
use datafusion::logical_expr::LogicalPlan;
use datafusion::prelude::{CsvReadOptions, JsonReadOptions, ParquetReadOptions, SessionContext};
use url::Url;

use crate::connectors::files;
use crate::connectors::reference::{self, Role};
use crate::error::{Error, Result};
use crate::plan::session::batch_session;
use crate::plan::views::quoted;
use crate::sql::CreateTable;

/// The bounded side of a look-up join: a query over tables only.
#[derive(Debug, Clone)]
pub struct BoundedTable {
    pub plan: LogicalPlan,
    /// The declared tables that it reads.
    pub tables: Vec<CreateTable>,
    /// How often it is read again; never without.
    pub refresh: Option<Duration>,
}

impl BoundedTable {
    /// `tables`: those of the catalog.
    ///
    /// # Errors
    /// User: an option of a table that it reads is wrong.
    pub fn new(plan: LogicalPlan, tables: &[CreateTable]) -> Result<Self> {
        let names = scans(&plan);
        let tables: Vec<CreateTable> =
            tables.iter().filter(|table| names.contains(&table.name)).cloned().collect();
        let each = tables.iter().map(|table| Ok(Settings::of(table)?.refresh)).collect::<Result<Vec<_>>>()?;
        Ok(Self { plan, tables, refresh: each.into_iter().flatten().min() })
    }

    /// What it reads, for people.
    pub fn name(&self) -> String {
        match &self.tables[..] {
            [] => "values".to_owned(),
            tables => tables.iter().map(|table| table.name.as_str()).collect::<Vec<_>>().join(", "),
        }
    }

    /// The plan over the tables as they are now, and a session to run it in.
    ///
    /// # Errors
    /// External: a table cannot be read.
    pub async fn opened(&self) -> Result<(SessionContext, LogicalPlan)> {
        let session = batch_session()?;
        let mut providers: BTreeMap<String, Arc<dyn TableProvider>> = BTreeMap::new();
        for table in &self.tables {
            register(&session, table).await?;
            providers.insert(table.name.clone(), session.table_provider(quoted(&table.name)).await?);
        }
        let plan = self.plan.clone().transform_down(|plan| match plan {
            LogicalPlan::TableScan(mut scan) => match providers.get(scan.table_name.table()) {
                Some(provider) => {
                    scan.source = provider_as_source(Arc::clone(provider));
                    Ok(Transformed::yes(LogicalPlan::TableScan(scan)))
                }
                None => Ok(Transformed::no(LogicalPlan::TableScan(scan))),
            },
            other => Ok(Transformed::no(other)),
        })?;
        Ok((session, plan.data))
    }
}

/// Names of the tables that a plan scans.
pub fn scans(plan: &LogicalPlan) -> Vec<String> {
    let mut names = Vec::new();
    if let LogicalPlan::TableScan(scan) = plan {
        names.push(scan.table_name.table().to_owned());
    }
    plan.inputs().into_iter().for_each(|input| names.extend(scans(input)));
    names
}

struct Settings {
    connector: String,
    location: String,
    refresh: Option<Duration>,
    delimiter: Option<u8>,
    header: bool,
}

impl Settings {
    fn of(table: &CreateTable) -> Result<Self> {
        let placed = |error: Error| error.at(table.place.clone());
        let mut options = table.options.clone();
        let connector = options.required("connector").map_err(placed)?;
        options.declare(reference::options(&connector, Role::Table));
        let location = options.required("location").map_err(placed)?;
        let refresh = options.duration("refresh").map_err(placed)?;
        let csv = connector == "csv";
        let delimiter = if csv { options.string("delimiter").map_err(placed)? } else { None };
        let header = !csv || options.choice("header", &["true", "false"]).map_err(placed)? != Some(1);
        options.finish().map_err(placed)?;
        let delimiter = match delimiter.as_deref().map(str::as_bytes) {
            None => None,
            Some([byte]) => Some(*byte),
            Some(_) => return Err(placed(Error::user("the delimiter is one ASCII character"))),
        };
        Ok(Self { connector, location, refresh, delimiter, header })
    }
}

/// Parquet files. Below a folder, folders named `column=value` are columns: of their declared type, else text.
async fn parquet(
    session: &SessionContext,
    location: &str,
    declared: Option<&Schema>,
) -> Result<Arc<dyn TableProvider>, DataFusionError> {
    let state = session.state();
    let options = ParquetReadOptions::default()
        .to_listing_options(&session.copied_config(), session.copied_table_options());
    let plain = ListingTableConfig::new(ListingTableUrl::parse(location)?).with_listing_options(options);
    // Folders of several kinds have no columns.
    let config = plain.clone().infer_partitions_from_path(&state).await.unwrap_or(plain);
    let Some(declared) = declared else {
        return Ok(Arc::new(ListingTable::try_new(config.infer_schema(&state).await?)?));
    };
    let Some(mut options) = config.options.clone() else {
        return Ok(Arc::new(ListingTable::try_new(config)?));
    };
    for (name, kind) in &mut options.table_partition_cols {
        if let Ok(field) = declared.field_with_name(name) {
            *kind = field.data_type().clone();
        }
    }
    let folders = &options.table_partition_cols;
    let in_files = |field: &&Arc<Field>| !folders.iter().any(|(name, _)| name == field.name());
    let fields: Vec<Arc<Field>> = declared.fields().iter().filter(in_files).cloned().collect();
    let config = config.with_schema(Arc::new(Schema::new(fields))).with_listing_options(options);
    Ok(Arc::new(ListingTable::try_new(config)?))
}

/// Makes a table known to a session.
///
/// # Errors
/// User: an option is wrong. External: its schema or its files cannot be read.
pub async fn register(session: &SessionContext, table: &CreateTable) -> Result<()> {
    #[cfg(feature = "redis")]
    if super::remote::is_remote(table) {
        let schema = super::remote::RemoteTable::new(table)?.schema;
        let provider = super::session::SourceTable { name: table.name.clone(), schema };
        session.register_table(quoted(&table.name), Arc::new(provider))?;
        return Ok(());
    }
    let settings = Settings::of(table)?;
    let Settings { connector, location, .. } = &settings;
    let name = quoted(&table.name);
    let unreadable = |error: DataFusionError| {
        Error::external(format!("table {}: {location} cannot be read", table.name))
            .because(error.strip_backtrace())
            .hint("Check the location, and that the files are what connector and columns say.")
            .at(table.place.clone())
    };
    if let Some(url) = Url::parse(location).ok().filter(|url| url.scheme() == "s3") {
        session.register_object_store(&url, files::bucket(&url)?);
    }
    let fields: Vec<Field> =
        table.columns.iter().map(|c| Field::new(&c.name, c.data_type.clone(), c.nullable)).collect();
    let schema = Schema::new(fields);
    let declared = (!table.columns.is_empty()).then_some(&schema);
    match connector.as_str() {
        #[cfg(feature = "delta")]
        "delta" => {
            session.register_table(name, crate::connectors::delta::table::provider(location).await?)?;
        }
        "parquet" => {
            let table = parquet(session, location, declared).await.map_err(unreadable)?;
            session.register_table(name, table)?;
        }
        "csv" => {
            let mut options = CsvReadOptions::new().has_header(settings.header);
            options.schema = declared;
            options.delimiter = settings.delimiter.unwrap_or(b',');
            session.register_csv(name, location, options).await.map_err(unreadable)?;
        }
        "ndjson" => {
            let options = JsonReadOptions { schema: declared, ..Default::default() };
            session.register_json(name, location, options).await.map_err(unreadable)?;
        }
        other => {
            return Err(Error::user(format!("table {}: connector '{other}' is not known", table.name))
                .hint(reference::hint(other, Role::Table))
                .at(table.options.place("connector").unwrap_or_else(|| table.place.clone())));
        }
    }
    Ok(())
}
