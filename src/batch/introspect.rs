//! `SHOW`, `DESCRIBE` and `EXPLAIN PIPELINE`: what a pipeline declares, as rows.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, BooleanArray, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Schema};

use super::Answer;
use crate::connectors::formats::sql_type;
use crate::error::{Error, Place, Result};
use crate::plan::StreamPlan;
use crate::plan::session::stream_session;
use crate::plan::source::all_sources;
use crate::plan::views::ViewPlanner;
use crate::sql::options::nearest;
use crate::sql::{Catalog, CreateSchedule, Show, SinkInput};
use crate::stream::clock::Clock;
use crate::stream::letters;

fn answer(columns: Vec<(&str, ArrayRef)>) -> Result<Answer> {
    let fields: Vec<Field> =
        columns.iter().map(|(name, array)| Field::new(*name, array.data_type().clone(), true)).collect();
    let schema = Arc::new(Schema::new(fields));
    let batch = RecordBatch::try_new(schema.clone(), columns.into_iter().map(|(_, array)| array).collect())?;
    Ok(Answer { schema, batches: vec![batch] })
}

fn texts<S: AsRef<str>>(values: impl IntoIterator<Item = Option<S>>) -> ArrayRef {
    Arc::new(values.into_iter().collect::<StringArray>())
}

/// The lines of the stream plan, as `millstream explain` prints them.
///
/// # Errors
/// Internal, from arrow.
pub fn pipeline(plan: &StreamPlan) -> Result<Answer> {
    let text = plan.to_string();
    answer(vec![("plan", texts(text.lines().map(Some)))])
}

/// One row per object: name, connector, what it reads, and where it is declared.
///
/// # Errors
/// Internal, from arrow.
pub fn show(catalog: &Catalog, show: Show) -> Result<Answer> {
    type Row = (String, Option<String>, Option<String>, Place);
    let rows: Vec<Row> = match show {
        Show::Sources => {
            let of = |s: &crate::sql::CreateSource| {
                (s.name.clone(), s.options.shown("connector"), None, s.place.clone())
            };
            catalog.sources.iter().map(of).collect()
        }
        Show::Tables => {
            let of = |t: &crate::sql::CreateTable| {
                (t.name.clone(), t.options.shown("connector"), None, t.place.clone())
            };
            catalog.tables.iter().map(of).collect()
        }
        Show::Views => catalog.views.iter().map(|v| (v.name.clone(), None, None, v.place.clone())).collect(),
        Show::Sinks => {
            let reads = |input: &SinkInput| match input {
                SinkInput::Relation { name, .. } => Some(name.clone()),
                SinkInput::Query(_) => None,
            };
            let of = |s: &crate::sql::CreateSink| {
                (s.name.clone(), s.options.shown("connector"), reads(&s.input), s.place.clone())
            };
            catalog.sinks.iter().map(of).collect()
        }
        Show::Schedules => return schedules(catalog),
    };
    let mut columns = vec![("name", texts(rows.iter().map(|row| Some(row.0.as_str()))))];
    if show != Show::Views {
        columns.push(("connector", texts(rows.iter().map(|row| row.1.as_deref()))));
    }
    if show == Show::Sinks {
        columns.push(("reads", texts(rows.iter().map(|row| row.2.as_deref()))));
    }
    let place = |row: &Row| Some(format!("{}:{}", row.3.file, row.3.line));
    columns.push(("declared_at", texts(rows.iter().map(place))));
    answer(columns)
}

/// When each fires, what it does, and the next time that it fires, whether somebody runs it or not.
fn schedules(catalog: &Catalog) -> Result<Answer> {
    let all = &catalog.schedules;
    let of =
        |text: &dyn Fn(&CreateSchedule) -> String| texts(all.iter().map(|schedule| Some(text(schedule))));
    let now = Clock.unix_micros();
    let next: TimestampMicrosecondArray =
        all.iter().map(|schedule| schedule.calendar.fires_after(now).next()).collect();
    answer(vec![
        ("name", of(&|schedule| schedule.name.clone())),
        ("cron", of(&|schedule| schedule.cron.clone())),
        ("time_zone", of(&|schedule| schedule.calendar.zone.name().to_owned())),
        ("does", of(&|schedule| schedule.does())),
        ("catch_up", of(&|schedule| schedule.catch_up.name().to_owned())),
        ("next_fire", Arc::new(next.with_timezone("UTC"))),
        ("declared_at", of(&|schedule| format!("{}:{}", schedule.place.file, schedule.place.line))),
    ])
}

/// Everything that a query can name: its kind, its connector, what it reads.
///
/// # Errors
/// Internal, from arrow.
pub fn relations(catalog: &Catalog) -> Result<Answer> {
    let mut rows: Vec<[Option<String>; 4]> = Vec::new();
    let mut add = |name: &str, kind: &str, connector: Option<String>, reads: Option<String>| {
        rows.push([Some(name.to_owned()), Some(kind.to_owned()), connector, reads]);
    };
    for source in &catalog.sources {
        let history = source.options.shown("history");
        add(&source.name, "source", source.options.shown("connector"), history);
    }
    for table in &catalog.tables {
        add(&table.name, "table", table.options.shown("connector"), table.options.shown("location"));
    }
    catalog.views.iter().for_each(|view| add(&view.name, "view", None, None));
    for sink in &catalog.sinks {
        let reads = match &sink.input {
            SinkInput::Relation { name, .. } => Some(name.clone()),
            SinkInput::Query(_) => None,
        };
        add(&sink.name, "sink", sink.options.shown("connector"), reads);
    }
    let column = |at: usize| texts(rows.iter().map(|row| row[at].as_deref()));
    answer(vec![("name", column(0)), ("kind", column(1)), ("connector", column(2)), ("reads", column(3))])
}

/// DataFusion does not say which name is near one that is not there.
pub fn nearest_name(catalog: &Catalog, error: Error) -> Error {
    let message = error.message();
    let Some(name) = message.strip_prefix("table '").and_then(|rest| rest.strip_suffix("' not found")) else {
        return error;
    };
    let names = catalog.names();
    match nearest(name, &names) {
        Some(near) => error.hint(format!("Did you mean {near}?")),
        None if names.is_empty() => error.hint("A file is named by its path, as in FROM './rows.parquet'."),
        None => error.hint(format!("The pipeline declares {}.", names.join(", "))),
    }
}

/// Columns of a source, view, sink or declared table; `None` when there is no such object in the pipeline.
///
/// # Errors
/// User: the object does not plan.
pub async fn describe(catalog: &Catalog, plan: &StreamPlan, name: &str) -> Result<Option<Answer>> {
    let session = stream_session()?;
    let sources = all_sources(&session, catalog)?;
    if name == letters::NAME {
        return columns(&letters::schema(), None).map(Some);
    }
    if let Some(source) = sources.get(name) {
        let kind = |column: usize| match column {
            column if column >= source.visible => "metadata",
            column if column >= source.physical.fields().len() => "computed",
            _ => "declared",
        };
        return columns(&source.schema, Some(&kind)).map(Some);
    }
    if let Some((_, sink)) = plan.sinks().find(|(_, sink)| sink.name == name) {
        return columns(&sink.schema, None).map(Some);
    }
    if let Some(view) = catalog.view(name) {
        let planned = ViewPlanner::new(&session, catalog, &sources).relation(name, &view.place).await?;
        return columns(planned.schema().as_arrow(), None).map(Some);
    }
    Ok(None)
}

/// # Errors
/// User: the object does not plan.
pub async fn column_names(catalog: &Catalog, plan: &StreamPlan, name: &str) -> Result<Vec<String>> {
    let described = describe(catalog, plan, name).await?;
    let rows = described.iter().flat_map(|columns| &columns.batches);
    let names = rows.flat_map(|batch| batch.column(0).as_string::<i32>().iter().flatten().map(str::to_owned));
    Ok(names.collect())
}

/// The error for a name that is nowhere.
pub fn unknown(catalog: &Catalog, name: &str, place: &Place) -> Error {
    let names = catalog.names();
    let hint = match nearest(name, &names) {
        Some(near) => format!("Did you mean {near}?"),
        None if names.is_empty() => "The pipeline declares nothing; give its SQL files.".to_owned(),
        None => format!("The pipeline declares {}.", names.join(", ")),
    };
    Error::user(format!("there is no {name}")).hint(hint).at(place.clone())
}

/// # Errors
/// Internal, from arrow.
pub fn columns(schema: &Schema, kind: Option<&dyn Fn(usize) -> &'static str>) -> Result<Answer> {
    let fields = schema.fields();
    let type_of = |data_type: &DataType| Some(sql_type(data_type));
    let nullable: BooleanArray = fields.iter().map(|field| Some(field.is_nullable())).collect();
    let mut found: Vec<(&str, ArrayRef)> = vec![
        ("column_name", texts(fields.iter().map(|field| Some(field.name())))),
        ("data_type", texts(fields.iter().map(|field| type_of(field.data_type())))),
        ("nullable", Arc::new(nullable)),
    ];
    if let Some(kind) = kind {
        found.push(("kind", texts((0..fields.len()).map(|column| Some(kind(column))))));
    }
    answer(found)
}
