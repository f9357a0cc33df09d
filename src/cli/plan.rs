//! `millstream plan`: what a start would keep, begin, refuse and drop.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::{Files, load, output, pipeline_name, state_of};
use crate::error::{Error, Result};
use crate::plan::changes::{Change, Item};
use crate::runtime::changes::{Changes, REBUILD, WAY_OUT, changes};
use crate::sql::CreateSchedule;
use crate::sql::place::render;
use crate::stream::clock::Clock;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    files: Files,
    /// As of run: only this sink; may be given again.
    #[arg(long)]
    sink: Vec<String>,
    /// Name of the pipeline; default: the folder or file stem.
    #[arg(long)]
    name: Option<String>,
    /// Where manifests and state live: a folder or s3://…; default ./.millstream/<name>.
    #[arg(long)]
    state: Option<String>,
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// # Errors
/// User: the SQL is wrong. External: the state or a table cannot be read.
pub async fn run(args: PlanArgs) -> Result<ExitCode> {
    let catalog = load(&args.files)?;
    let plan = crate::plan::sinks::plan(&catalog, &args.sink).await?;
    #[cfg(feature = "delta")]
    crate::batch::schedule::check(&catalog, &plan).await?;
    let name = pipeline_name(&args.files, args.name.as_deref(), &args.sink)?;
    let state = state_of(&args.files, args.state, &name)?;
    let found = changes(&plan, &name, &state).await?;
    match args.format {
        Format::Table => table(&found, &catalog.schedules, &name, &state)?,
        Format::Json => json(&found, &catalog.schedules, &name, &state)?,
    }
    Ok(ExitCode::from(u8::from(!found.starts())))
}

fn table(found: &Changes, schedules: &[CreateSchedule], name: &str, state: &str) -> Result<()> {
    let mut text = match found.epoch {
        Some(epoch) => format!("pipeline {name}, state {state}, epoch {epoch}\n"),
        None => format!("pipeline {name}, no state at {state} yet\n"),
    };
    let width = found.items.iter().map(|item| item.name.chars().count()).max().unwrap_or(0);
    for item in &found.items {
        let (what, (_, meaning)) = (kind(item), meaning(item, found));
        text.push_str(&format!("{what}  {:<width$}  {meaning}\n", item.name));
        if let Change::Changed(lines) = &item.change {
            lines.iter().for_each(|line| text.push_str(&format!("        {line}\n")));
        }
    }
    for table in &found.lookups {
        text.push_str(&format!(
            "table {table}: other rows than in the run before; what was joined stays, what comes is joined with the new ones\n"
        ));
    }
    for schedule in schedules {
        let (zone, does) = (schedule.calendar.zone.name(), schedule.does());
        let next = next_fire(schedule).unwrap_or_default();
        text.push_str(&format!(
            "schedule {}: '{}' {zone}, next {next}: {does}\n",
            schedule.name, schedule.cron
        ));
    }
    output::text(&text)?;
    found.refusals.iter().for_each(|error| eprint!("{}", render(error)));
    if !found.goes_on && found.items.iter().any(Item::is_changed) {
        let message = "run would not start: what is changed would mix rows of two meanings";
        let hint = match found.rebuilds_all() {
            true => format!("{REBUILD} {WAY_OUT}"),
            false => WAY_OUT.to_owned(),
        };
        eprint!("{}", render(&Error::user(message).hint(hint)));
    }
    Ok(())
}

fn json(found: &Changes, schedules: &[CreateSchedule], name: &str, state: &str) -> Result<()> {
    let item = |item: &Item| {
        let lines = match &item.change {
            Change::Changed(lines) => lines.as_slice(),
            _ => &[],
        };
        let change = meaning(item, found).0;
        json!({"kind": kind(item), "name": item.name, "change": change, "difference": lines})
    };
    let refusals: Vec<&str> = found.refusals.iter().map(Error::message).collect();
    let value = json!({
        "pipeline": name,
        "state": state,
        "epoch": found.epoch,
        "starts": found.starts(),
        "items": found.items.iter().map(item).collect::<Vec<_>>(),
        "rebuilds": found.rebuilds,
        "refusals": refusals,
        "lookups": found.lookups,
        "schedules": schedules.iter().map(|schedule| json!({
            "name": schedule.name, "does": schedule.does(), "next_fire": next_fire(schedule),
        })).collect::<Vec<_>>(),
    });
    output::text(&format!("{value:#}\n"))
}

/// The next time, whether somebody runs it or not.
fn next_fire(schedule: &CreateSchedule) -> Option<String> {
    let next =
        chrono::DateTime::from_timestamp_micros(schedule.calendar.fires_after(Clock.unix_micros()).next()?)?;
    Some(next.to_rfc3339_opts(chrono::SecondsFormat::Secs, true))
}

fn kind(item: &Item) -> &'static str {
    if item.sink { "sink" } else { "view" }
}

/// A word for programs, a sentence for people.
fn meaning(item: &Item, found: &Changes) -> (&'static str, &'static str) {
    match (&item.change, item.sink) {
        (Change::New, _) if found.epoch.is_none() => ("new", "new: begins at scan_startup"),
        (Change::New, true) if found.builds.contains(&item.name) => {
            ("new", "new: built from history up to the offsets that the pipeline has reached")
        }
        (Change::New, false) if !found.builds.is_empty() => ("new", "new: built with the sinks that read it"),
        (Change::New, _) => {
            ("new", "new: begins at the offsets that the pipeline has reached, without earlier rows")
        }
        (Change::Kept, _) => ("unchanged", "unchanged: keeps its state"),
        (Change::Changed(_), _) if found.goes_on => {
            ("changed", "changed: its rebuild is under way; run goes on with it")
        }
        (Change::Changed(_), true) if found.rebuilds.contains(&item.name) => {
            ("changed", "changed: run --rebuild computes it anew from history, in its place")
        }
        (Change::Changed(_), false) if found.rebuilds_all() => {
            ("changed", "changed: run --rebuild computes it anew with the sinks that read it")
        }
        (Change::Changed(_), _) => ("changed", "changed: must be rebuilt"),
        (Change::Gone, false) => ("gone", "gone: its state is dropped"),
        (Change::Gone, true) => ("gone", "gone: what it wrote stays, its state is dropped"),
    }
}
