//! The statements of Millstream's SQL (DESIGN §2).

use arrow::datatypes::DataType;
use datafusion::sql::parser::Statement as DfStatement;
use sqlparser::ast::{Expr, Query};

use super::calendar::{Calendar, Span};
use super::interval::display_micros;
use super::options::Options;
use crate::error::Place;
use crate::stream::Micros;

#[derive(Debug, Clone)]
pub enum Statement {
    CreateSource(CreateSource),
    CreateTable(CreateTable),
    CreateView(CreateView),
    CreateSink(CreateSink),
    CreateSchedule(Box<CreateSchedule>),
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
        place: Place,
        last_micros: i64,
    },
    Insert(Box<ScheduledInsert>),
}

/// `INSERT INTO table [(columns)] SELECT …`, with `$interval_start` and `$interval_end` in it.
#[derive(Debug, Clone)]
pub struct ScheduledInsert {
    pub table: String,
    /// Empty: all, in their order.
    pub columns: Vec<String>,
    pub query: Box<Query>,
    pub place: Place,
}

/// What becomes of fires that came while nobody ran them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CatchUp {
    /// Each is run, the oldest first.
    All,
    /// The newest is run.
    Last,
    /// None is run that is older than a minute.
    None,
}

impl CatchUp {
    pub const NAMES: [&str; 3] = ["all", "last", "none"];

    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Last => "last",
            Self::None => "none",
        }
    }
}

/// `CREATE SCHEDULE n CRON '…' [TIME ZONE '…'] [WITH (…)] AS … [WITH (…)]`.
#[derive(Debug, Clone)]
pub struct CreateSchedule {
    pub name: String,
    pub or_replace: bool,
    /// As it was written.
    pub cron: String,
    pub calendar: Calendar,
    pub action: ScheduleAction,
    pub catch_up: CatchUp,
    /// How often an interval is tried again after a failure.
    pub retries: u32,
    /// Before the first of them; doubles with each.
    pub retry_delay_micros: i64,
    /// Fires from here on count; without, from when the schedule is first seen.
    pub start: Option<Micros>,
    pub place: Place,
}

impl CreateSchedule {
    /// The interval that a fire stands for.
    pub fn interval(&self, fire: Micros) -> Option<Span> {
        match &self.action {
            ScheduleAction::Backfill { last_micros, .. } => self.calendar.last(fire, *last_micros),
            ScheduleAction::Insert(_) => self.calendar.since_last(fire),
        }
    }

    /// What it does, in a line.
    pub fn does(&self) -> String {
        match &self.action {
            ScheduleAction::Backfill { sink, last_micros, .. } => {
                format!("BACKFILL {sink} FOR LAST INTERVAL '{}'", display_micros(*last_micros))
            }
            ScheduleAction::Insert(insert) => format!("INSERT INTO {}", insert.table),
        }
    }
}
