//! Sinks of dead letters: what they may be.
//!
//! The relation `dead_letters` holds those of the whole pipeline. An epoch's letters are known when everything else has
//! reported the epoch, so what reads them is stateless and apart from the rows of sources: SELECT, WHERE, UNNEST and
//! UNION ALL over `dead_letters` alone, into a sink that keeps every row.

use datafusion::logical_expr::LogicalPlan;

use crate::error::{Error, Place, Result};
use crate::plan::StreamPlan;
use crate::plan::tables::scans;
use crate::sql::place::find_word;
use crate::sql::{Catalog, CreateSink};
use crate::stream::letters::NAME;

/// Whether a query reads dead letters.
pub fn read_by(plan: &LogicalPlan) -> bool {
    scans(plan).iter().any(|name| name == NAME)
}

/// # Errors
/// User: a sink of dead letters that keeps one row per key, or whose query cannot run.
pub fn check(plan: &LogicalPlan, sink: &CreateSink) -> Result<()> {
    check_shape(plan, &sink.name, &sink.place)?;
    let connector = sink.options.shown("connector").unwrap_or_default();
    if matches!(connector.as_str(), "redis" | "memory") {
        let message = format!("sink {}: an online store cannot hold dead letters", sink.name);
        let place = sink.options.place("connector").unwrap_or_else(|| sink.place.clone());
        return Err(Error::user(message).hint("Write them to delta, ndjson, kafka or console.").at(place));
    }
    Ok(())
}

/// # Errors
/// User: a query over dead letters that needs state, or other relations.
pub fn check_shape(plan: &LogicalPlan, name: &str, place: &Place) -> Result<()> {
    let refuse = |what: &str, word: &str| {
        let place = find_word(place, word).unwrap_or_else(|| place.clone());
        let hint = "Keep the letters in a sink of their own (CREATE SINK … FROM dead_letters) and do this in the query \
                    that reads it.";
        Err(Error::user(format!("{name}: {what} over dead_letters cannot run")).hint(hint).at(place))
    };
    match plan {
        LogicalPlan::Aggregate(_) => return refuse("GROUP BY", "GROUP"),
        LogicalPlan::Distinct(_) => return refuse("DISTINCT", "DISTINCT"),
        LogicalPlan::Window(_) => return refuse("a window", "OVER"),
        LogicalPlan::Join(_) => return refuse("a JOIN", "JOIN"),
        _ => {}
    }
    if let LogicalPlan::TableScan(scan) = plan
        && scan.table_name.table() != NAME
    {
        return refuse(&format!("UNION ALL of {}", scan.table_name.table()), "UNION");
    }
    plan.inputs().into_iter().try_for_each(|input| check_shape(input, name, place))
}

/// # Errors
/// User: no sink of the pipeline reads a source.
pub fn check_pipeline(plan: &StreamPlan, catalog: &Catalog) -> Result<()> {
    let (Some(letters), None) = (plan.letters(), plan.source()) else { return Ok(()) };
    let reader = plan.sinks().find(|(id, _)| plan.reads_letters(*id) && *id != letters);
    let sink = reader.and_then(|(_, sink)| catalog.sink(&sink.name));
    let error = Error::user("no sink of the pipeline reads a source, so there are no dead letters to read")
        .hint("Add a sink that reads the source, such as its backup: CREATE SINK … FROM source.");
    Err(match sink {
        Some(sink) => error.at(sink.place.clone()),
        None => error,
    })
}
