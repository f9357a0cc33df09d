//! `CREATE SOURCE` → what the source task needs: connector, computed columns, event time, lateness.
//!
//! A source row has the declared physical columns, then the computed ones, then (Kafka) the metadata columns
//! `_topic, _partition, _offset, _timestamp, _key`, which `SELECT *` leaves out.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::common::DFSchema;
use datafusion::logical_expr::Expr;
use datafusion::physical_expr::expressions::Column;
use datafusion::physical_expr::utils::collect_columns;
use datafusion::physical_plan::PhysicalExpr;
use datafusion::prelude::SessionContext;
use sqlparser::ast::ExprWithAlias;

use crate::connectors::file_source::FilesConfig;
use crate::connectors::formats::OnError;
use crate::connectors::generator::GeneratorConfig;
#[cfg(feature = "kafka")]
use crate::connectors::kafka::KafkaSourceConfig;
use crate::connectors::records::RecordTopic;
use crate::connectors::reference::{self, Role};
use crate::error::{Error, Result};
use crate::sql::options::Options;
use crate::sql::{Catalog, CreateSource, CreateTable, interval};
use crate::stream::{Micros, timestamp_type};

#[derive(Debug, Clone)]
pub enum SourceKind {
    #[cfg(feature = "kafka")]
    Kafka(KafkaSourceConfig),
    Generator(GeneratorConfig),
    Files(FilesConfig),
    /// In the place of another connector: `millstream test`.
    Records(RecordTopic),
}

#[derive(Debug, Clone)]
pub struct SourcePlan {
    pub name: String,
    pub kind: SourceKind,
    /// The columns that the connector delivers.
    pub physical: SchemaRef,
    /// Evaluated in order over physical columns and the computed ones before them.
    pub computed: Vec<(Arc<dyn PhysicalExpr>, Field)>,
    /// The same, for rows that are queried.
    pub computed_sql: Vec<(Expr, Field)>,
    /// All columns: physical, computed, metadata.
    pub schema: SchemaRef,
    /// How many leading columns `SELECT *` shows.
    pub visible: usize,
    /// Column of the event time; `None` without a WATERMARK.
    pub event_time: Option<usize>,
    pub lateness: Micros,
    pub max_future: Micros,
    pub idle_timeout: Duration,
    pub on_error: OnError,
    /// Name of the backup.
    pub history: Option<String>,
    pub history_options: HistoryOptions,
    /// Where the backup lies, if it can be read as the topic; filled in with the sinks of the plan.
    pub backup: Option<Backup>,
}

/// Where the history of a source lies.
#[derive(Debug, Clone)]
pub enum Backup {
    /// Location of a Delta table.
    Delta(String),
    Table(Box<CreateTable>),
}

impl Backup {
    pub fn location(&self) -> String {
        match self {
            Self::Delta(location) => location.clone(),
            Self::Table(table) => table.options.shown("location").unwrap_or_else(|| table.name.clone()),
        }
    }
}

/// How a history that somebody else wrote is read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HistoryOptions {
    /// The columns that say which record a row comes from, if not `_partition` and `_offset`.
    pub partition_column: Option<String>,
    pub offset_column: Option<String>,
    /// The next offset of each partition, on the user's word.
    pub end_offsets: Option<BTreeMap<i32, i64>>,
}

impl HistoryOptions {
    fn from_options(options: &mut Options) -> Result<Self> {
        let end_offsets = match options.string("history.end_offsets")? {
            None => None,
            Some(text) => Some(offsets(&text).ok_or_else(|| {
                let message = format!("history.end_offsets = '{text}' is no list of offsets");
                let error =
                    Error::user(message).hint("Write the next offset of each partition: 0:1200, 1:1180.");
                match options.place("history.end_offsets") {
                    Some(place) => error.at(place),
                    None => error,
                }
            })?),
        };
        Ok(Self {
            partition_column: options.string("history.partition_column")?,
            offset_column: options.string("history.offset_column")?,
            end_offsets,
        })
    }
}

#[cfg(feature = "kafka")]
fn offsets(text: &str) -> Option<BTreeMap<i32, i64>> {
    let offsets = crate::connectors::kafka::offsets_of(text.trim())?;
    Some(offsets.into_iter().collect())
}

#[cfg(not(feature = "kafka"))]
fn offsets(_: &str) -> Option<BTreeMap<i32, i64>> {
    None
}

/// The sources of a catalog by name.
///
/// # Errors
/// The first user error found, with its place.
pub fn all_sources(session: &SessionContext, catalog: &Catalog) -> Result<BTreeMap<String, Arc<SourcePlan>>> {
    let plan = |source: &CreateSource| Ok((source.name.clone(), Arc::new(SourcePlan::new(session, source)?)));
    catalog.sources.iter().map(plan).collect()
}

/// Names of the metadata columns, in order.
pub const METADATA: [&str; 5] = ["_topic", "_partition", "_offset", "_timestamp", "_key"];

fn metadata_fields() -> Vec<Field> {
    let types = [DataType::Utf8, DataType::Int32, DataType::Int64, timestamp_type(), DataType::Binary];
    let nullable = [false, false, false, true, true];
    METADATA.iter().zip(types).zip(nullable).map(|((name, t), null)| Field::new(*name, t, null)).collect()
}

impl SourcePlan {
    /// # Errors
    /// A user error with its place: unknown connector or option, a computed column that does not plan, a watermark
    /// on a column that is no timestamp.
    pub fn new(session: &SessionContext, source: &CreateSource) -> Result<Self> {
        let physical: Vec<Field> =
            source.columns.iter().map(|c| Field::new(&c.name, c.data_type.clone(), c.nullable)).collect();
        let physical = Arc::new(Schema::new(physical));
        let (computed, logical) = computed_columns(session, source, &physical)?;
        let mut options = source.options.clone();
        let connector = options.required("connector").map_err(|error| error.at(source.place.clone()))?;
        options.declare(reference::options(&connector, Role::Source));
        let max_future = options.duration("max_future")?.unwrap_or(Duration::from_secs(86_400));
        let idle_timeout = options.duration("idle_timeout")?.unwrap_or(Duration::from_secs(60));
        let history = options.string("history")?;
        // Only the topic of Kafka is gone on with behind a history.
        let history_options = match connector.as_str() {
            "kafka" => HistoryOptions::from_options(&mut options)?,
            _ => HistoryOptions::default(),
        };
        if history.is_none() && history_options != HistoryOptions::default() {
            let message =
                format!("source {}: history.* says how a history is read, and there is none", source.name);
            return Err(Error::user(message)
                .hint("Name it: history = 'a sink or a table'.")
                .at(source.place.clone()));
        }
        let (kind, has_metadata) = connector_of(&connector, source, &mut options, &physical)?;
        let on_error = match &kind {
            #[cfg(feature = "kafka")]
            SourceKind::Kafka(config) => config.on_error,
            SourceKind::Files(config) => config.on_error,
            SourceKind::Generator(_) | SourceKind::Records(_) => OnError::Fail,
        };
        options.finish().map_err(|error| error.at(source.place.clone()))?;
        let mut fields: Vec<Field> = physical.fields().iter().map(|f| f.as_ref().clone()).collect();
        fields.extend(computed.iter().map(|(_, field)| field.clone()));
        let visible = fields.len();
        if has_metadata {
            fields.extend(metadata_fields());
        }
        let event_time = event_time(source, &fields)?;
        Ok(Self {
            name: source.name.clone(),
            kind,
            physical,
            computed,
            schema: Arc::new(Schema::new(fields)),
            visible,
            event_time,
            lateness: source.watermark.as_ref().map_or(0, |w| w.delay_micros),
            max_future: i64::try_from(max_future.as_micros()).unwrap_or(i64::MAX),
            idle_timeout,
            on_error,
            history,
            history_options,
            computed_sql: logical,
            backup: None,
        })
    }

    /// Names of the columns that `SELECT *` leaves out.
    pub fn hidden(&self) -> Vec<String> {
        self.schema.fields()[self.visible..].iter().map(|field| field.name().clone()).collect()
    }

    /// Fields of a record that make its event time; empty without a WATERMARK.
    pub fn fields_of_event_time(&self) -> Vec<String> {
        let mut open: Vec<usize> = self.event_time.into_iter().collect();
        let mut fields = Vec::new();
        let physical = self.physical.fields().len();
        while let Some(column) = open.pop() {
            match column.checked_sub(physical).and_then(|at| self.computed.get(at)) {
                // A computed column reads those before it only, so this ends.
                Some((expr, _)) => open.extend(collect_columns(expr).iter().map(Column::index)),
                None if column < physical => fields.push(self.physical.field(column).name().clone()),
                None => {}
            }
        }
        fields.sort();
        fields.dedup();
        fields
    }

    pub fn has_metadata(&self) -> bool {
        self.schema.fields().len() > self.visible
    }
}

fn connector_of(
    connector: &str,
    source: &CreateSource,
    options: &mut Options,
    physical: &SchemaRef,
) -> Result<(SourceKind, bool)> {
    let placed = |error: Error| error.at(source.place.clone());
    match connector {
        #[cfg(feature = "kafka")]
        "kafka" => {
            let config = KafkaSourceConfig::from_options(options, Arc::clone(physical)).map_err(placed)?;
            Ok((SourceKind::Kafka(config), true))
        }
        "generator" => {
            let config = GeneratorConfig::from_options(options, physical).map_err(placed)?;
            Ok((SourceKind::Generator(config), false))
        }
        "files" => {
            let config = FilesConfig::from_options(options, Arc::clone(physical)).map_err(placed)?;
            Ok((SourceKind::Files(config), true))
        }
        other => {
            let error = Error::user(format!("source {}: connector '{other}' is not known", source.name))
                .hint(reference::hint(other, Role::Source));
            Err(error.at(options.place("connector").unwrap_or_else(|| source.place.clone())))
        }
    }
}

/// As physical and as logical expressions.
type Computed = (Vec<(Arc<dyn PhysicalExpr>, Field)>, Vec<(Expr, Field)>);

fn computed_columns(
    session: &SessionContext,
    source: &CreateSource,
    physical: &SchemaRef,
) -> Result<Computed> {
    let state = session.state();
    let mut fields: Vec<Field> = physical.fields().iter().map(|f| f.as_ref().clone()).collect();
    let (mut computed, mut logical) = (Vec::new(), Vec::new());
    for column in &source.computed {
        let place = || column.place.clone();
        if fields.iter().any(|field| field.name() == &column.name) {
            return Err(Error::user(format!("the column {} is declared twice", column.name)).at(place()));
        }
        let schema = Arc::new(Schema::new(fields.clone()));
        let df_schema = DFSchema::try_from(Arc::clone(&schema)).map_err(|e| Error::from(e).at(place()))?;
        let sql = ExprWithAlias { expr: column.expr.clone(), alias: None };
        let plan = |e: datafusion::error::DataFusionError| {
            Error::from(e).context(format_args!("computed column {}", column.name)).at(place())
        };
        let expr = state.create_logical_expr_from_sql_expr(sql, &df_schema).map_err(plan)?;
        let sql = expr.clone();
        let expr = state.create_physical_expr(expr, &df_schema).map_err(plan)?;
        let from = expr.data_type(&schema)?;
        let to = column.data_type.clone().unwrap_or_else(|| super::lower::storable_type(&from));
        let expr: Arc<dyn PhysicalExpr> = if from == to {
            expr
        } else {
            datafusion::physical_plan::expressions::cast(expr, &schema, to.clone()).map_err(plan)?
        };
        let nullable = expr.nullable(&schema)?;
        let field = Field::new(&column.name, to, nullable);
        fields.push(field.clone());
        logical.push((sql, field.clone()));
        computed.push((expr, field));
    }
    Ok((computed, logical))
}

fn event_time(source: &CreateSource, fields: &[Field]) -> Result<Option<usize>> {
    let Some(watermark) = &source.watermark else { return Ok(None) };
    let Some(column) = fields.iter().position(|field| field.name() == &watermark.column) else {
        let message =
            format!("source {}: the watermark column {} does not exist", source.name, watermark.column);
        return Err(Error::user(message)
            .hint("Name a TIMESTAMP column of the source, declared or computed.")
            .at(watermark.place.clone()));
    };
    if *fields[column].data_type() != timestamp_type() {
        let message = format!(
            "source {}: the watermark column {} is no TIMESTAMP but {}",
            source.name,
            watermark.column,
            fields[column].data_type()
        );
        return Err(Error::user(message)
            .hint(
                "Declare it as TIMESTAMP AS (to_timestamp_millis(…)) if the record holds epoch milliseconds.",
            )
            .at(watermark.place.clone()));
    }
    Ok(Some(column))
}

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            #[cfg(feature = "kafka")]
            Self::Kafka(config) => write!(f, "kafka topic {}", config.topic),
            Self::Files(config) => write!(f, "files {}", config.path),
            Self::Generator(_) => f.write_str("generator"),
            Self::Records(_) => f.write_str("records"),
        }
    }
}

impl fmt::Display for SourcePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        match self.event_time {
            Some(column) => {
                let late = interval::display_micros(self.lateness);
                write!(f, ", watermark {} - {late}", self.schema.field(column).name())
            }
            None => f.write_str(", no watermark"),
        }
    }
}
