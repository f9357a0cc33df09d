//! Schedules: SQL that runs by the clock (DESIGN §2), each interval of time once.
//!
//! When a schedule fires, and for which interval, is [`crate::sql::calendar`]; what it does next [`decide`]; one that goes
//! through all of it [`run`].
//!
//! **Never overlapping.** All that is known of a schedule is the newest entry of its journal in the pipeline's state folder
//! (`schedules/<name>`, [`crate::state::journal`]). A run begins with an entry of its own, so of any number of processes
//! one begins it. While it works it says so again and again; the others wait for its end. When it has said nothing for the
//! lease that its entry names, it counts as dead, and the next one begins the attempt again.
//!
//! **Zombies.** A process that was taken for dead and goes on records nothing: the number of its next entry is taken. Nor
//! does it commit: before each commit it looks whether its entry is still the newest one, and a commit of the new owner
//! that comes between makes its own conflict. What a run did before it died stays, and is not done again:
//!
//! - BACKFILL replaces the rows of its interval, with the ledger of [`super::backfill`] in the same commit; finished
//!   intervals are left alone, whoever finished them.
//! - INSERT … SELECT commits the id of its interval with its rows ([`crate::connectors::delta::insert`]); an interval whose
//!   id is in the table's log is not inserted again.
//!
//! **History** is the journal itself: `millstream.runs`, of each schedule the newest thousand or so.

pub mod decide;
mod insert;
mod run;

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use bytes::Bytes;

use crate::connectors::files;
use crate::connectors::partition::time_text;
use crate::error::{Error, Result};
use crate::plan::StreamPlan;
use crate::sql::options::nearest;
use crate::sql::{Catalog, ScheduleAction};
use crate::state::journal::Journals;
use crate::stream::Micros;
use decide::{Entry, FORMAT, Run};

pub use run::{Event, Options, run};

/// Folder of the journals in the state.
const FOLDER: &str = "schedules";

/// A run of a schedule.
pub type Recorded = (String, Run);

/// # Errors
/// User, at its place: a sink that cannot be backfilled, a query that does not plan.
pub async fn check(catalog: &Catalog, plan: &StreamPlan) -> Result<()> {
    for schedule in &catalog.schedules {
        match &schedule.action {
            ScheduleAction::Backfill { sink, place, .. } => {
                if catalog.sink(sink).is_none() {
                    let sinks: Vec<String> = catalog.sinks.iter().map(|sink| sink.name.clone()).collect();
                    let hint = match nearest(sink, &sinks) {
                        Some(near) => format!("Did you mean {near}?"),
                        None if sinks.is_empty() => "Give the SQL files that declare it too.".to_owned(),
                        None => format!("The sinks are {}.", sinks.join(", ")),
                    };
                    let message = format!("schedule {}: there is no sink {sink}", schedule.name);
                    return Err(Error::user(message).hint(hint).at(place.clone()));
                }
                let checked = super::backfill::check(catalog, sink).await;
                checked.map_err(|error| error.context(format_args!("schedule {}", schedule.name)))?;
            }
            ScheduleAction::Insert(insert) => insert::check(catalog, plan, schedule, insert).await?,
        }
    }
    Ok(())
}

/// The runs that a state knows, by schedule and fire.
///
/// # Errors
/// External: the state cannot be read, or an entry is damaged.
pub async fn runs(state: &str) -> Result<Vec<Recorded>> {
    let Some(located) = files::open_existing_private(state)? else { return Ok(Vec::new()) };
    files::probe(&located).await?;
    let mut runs: BTreeMap<(String, Micros, u32), Run> = BTreeMap::new();
    for entry in Journals::new(located.store, FOLDER).entries().await? {
        let entry = parse(&entry)?;
        // The end of an attempt comes behind its beginning.
        runs.extend(entry.run.map(|run| ((entry.schedule, run.fire, run.attempt), run)));
    }
    Ok(runs.into_iter().map(|((schedule, ..), run)| (schedule, run)).collect())
}

fn parse(entry: &Bytes) -> Result<Entry> {
    let damaged = || Error::external("an entry of a schedule's journal cannot be read");
    let entry: Entry = serde_json::from_slice(entry).map_err(|error| {
        damaged().because(error).hint("Restore the state folder from a copy, or remove its folder schedules.")
    })?;
    match entry.format {
        FORMAT => Ok(entry),
        other => Err(damaged()
            .because(format!("its format is {other}"))
            .hint("A newer Millstream wrote it: use that.")),
    }
}

/// Runs as the table `millstream.runs`.
///
/// # Errors
/// Internal, from arrow.
pub fn table(runs: &[Recorded]) -> Result<RecordBatch> {
    let times = |of: fn(&Run) -> Option<Micros>| -> ArrayRef {
        let times: TimestampMicrosecondArray = runs.iter().map(|(_, run)| of(run)).collect();
        Arc::new(times.with_timezone("UTC"))
    };
    let texts = |of: &dyn Fn(&Recorded) -> Option<String>| -> ArrayRef {
        Arc::new(runs.iter().map(of).collect::<StringArray>())
    };
    let numbers = |of: fn(&Run) -> Option<i64>| -> ArrayRef {
        Arc::new(runs.iter().map(|(_, run)| of(run)).collect::<Int64Array>())
    };
    let columns: [(&str, ArrayRef); 11] = [
        ("id", texts(&|(schedule, run)| Some(format!("{schedule}/{}", time_text(run.fire))))),
        ("schedule", texts(&|(schedule, _)| Some(schedule.clone()))),
        ("fire_time", times(|run| Some(run.fire))),
        ("interval_start", times(|run| Some(run.from))),
        ("interval_end", times(|run| Some(run.to))),
        ("attempt", numbers(|run| Some(i64::from(run.attempt)))),
        ("state", texts(&|(_, run)| Some(run.state.as_str().to_owned()))),
        ("rows", numbers(|run| run.rows.and_then(|rows| i64::try_from(rows).ok()))),
        ("started", times(|run| run.started)),
        ("ended", times(|run| run.ended)),
        ("error", texts(&|(_, run)| run.error.clone())),
    ];
    Ok(RecordBatch::try_from_iter_with_nullable(columns.map(|(name, array)| (name, array, true)))?)
}
