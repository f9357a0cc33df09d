//! The statements of Millstream's SQL (DESIGN §2).

use arrow::datatypes::DataType;
use datafusion::sql::parser::Statement as DfStatement;
use sqlparser::ast::{Expr, Query};

use super::options::Options;
use crate::error::Place;

#[derive(Debug, Clone)]
pub enum Statement {
    CreateSource(CreateSource),
    CreateTable(CreateTable),
    CreateView(CreateView),
    CreateSink(CreateSink),
    CreateSchedule(CreateSchedule),
    /// `EXPLAIN PIPELINE`: the plans of the sinks.
    ExplainPipeline,
    Show(Show),
    Describe(String, Place),
    /// Anything that DataFusion runs.
    Other(Box<DfStatement>, Place),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Show {
    Sources,
    Tables,
    Views,
    Sinks,
    Schedules,
}

#[derive(Debug, Clone)]
pub struct Column {
    pub name: String,
    pub data_type: DataType,
    pub nullable: bool,
    pub place: Place,
}

/// `name [TYPE] AS (expr)`.
#[derive(Debug, Clone)]
pub struct ComputedColumn {
    pub name: String,
    pub data_type: Option<DataType>,
    pub expr: Expr,
    pub place: Place,
}

/// `WATERMARK FOR column AS column - INTERVAL '…'`.
#[derive(Debug, Clone)]
pub struct Watermark {
    pub column: String,
    pub delay_micros: i64,
    pub place: Place,
}

/// `CREATE [OR REPLACE] SOURCE n (columns, WATERMARK …) WITH (…)`.
#[derive(Debug, Clone)]
pub struct CreateSource {
    pub name: String,
    pub or_replace: bool,
    pub columns: Vec<Column>,
    pub computed: Vec<ComputedColumn>,
    pub watermark: Option<Watermark>,
    pub options: Options,
    pub place: Place,
}

/// `CREATE [OR REPLACE] TABLE n [(columns)] WITH (…)`: bounded.
#[derive(Debug, Clone)]
pub struct CreateTable {
    pub name: String,
    pub or_replace: bool,
    pub columns: Vec<Column>,
    pub options: Options,
    pub place: Place,
}

/// `CREATE [OR REPLACE] VIEW n AS SELECT …`; named windows are merged into their uses.
#[derive(Debug, Clone)]
pub struct CreateView {
    pub name: String,
    pub or_replace: bool,
    pub query: Box<Query>,
    pub sql: String,
    pub place: Place,
}

#[derive(Debug, Clone)]
pub enum SinkInput {
    Relation { name: String, place: Place },
    Query(Box<Query>),
}

/// `CREATE SINK n FROM view WITH (…)` or `CREATE SINK n AS SELECT … WITH (…)`.
#[derive(Debug, Clone)]
pub struct CreateSink {
    pub name: String,
    pub or_replace: bool,
    pub input: SinkInput,
    pub options: Options,
    pub place: Place,
}

#[derive(Debug, Clone)]
pub enum ScheduleAction {
    /// `BACKFILL sink FOR LAST interval`.
    Backfill {
        sink: String,
        last_micros: i64,
    },
    Insert(Box<DfStatement>),
}

/// `CREATE SCHEDULE n CRON '…' [TIME ZONE '…'] AS …`.
#[derive(Debug, Clone)]
pub struct CreateSchedule {
    pub name: String,
    pub or_replace: bool,
    pub cron: String,
    pub time_zone: Option<String>,
    pub action: ScheduleAction,
    pub place: Place,
}
