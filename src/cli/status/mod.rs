//! `millstream status`: what the state says of a pipeline, whether a process runs or not. Nothing is claimed or written.

mod facts;
pub mod render;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::{Files, StateArgs, duration, environment, load, output};
use crate::error::Result;
use crate::state::manifest::{Kind, Manifest};
use crate::state::store::StateStore;
use crate::stream::clock::Clock;
use facts::{Ends, Limits, Times};

/// How long the broker may take to say where it ends.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
    Markdown,
}

#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    state: StateArgs,
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// More dead letters than this are unhealthy.
    #[arg(long, value_name = "N")]
    max_dead_letters: Option<u64>,
    /// More records to be read than this are unhealthy, and so is a broker that does not answer.
    #[arg(long, value_name = "N")]
    max_lag: Option<u64>,
    /// A checkpoint older than this is overdue, unless the pipeline was stopped or closed; default: three of its
    /// intervals, at least 3 minutes.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    max_age: Option<Duration>,
}

/// # Errors
/// User: the SQL. External: the state cannot be read.
pub async fn run(args: StatusArgs) -> Result<ExitCode> {
    let (name, location) = args.state.target(&args.files)?;
    let latest = match super::existing_state(&location)? {
        Some(store) => store.latest().await?.map(|manifest| (store, manifest)),
        None => None,
    };
    let Some((store, manifest)) = latest else {
        eprintln!(
            "unhealthy: there is no state at {location}: the pipeline {name} never ran, or has another --name or --state"
        );
        return Ok(ExitCode::from(1));
    };
    let ends = ends(&args.files, &manifest).await?;
    let limits = Limits { dead_letters: args.max_dead_letters, lag: args.max_lag, age: args.max_age };
    let status = facts::status(&manifest, &location, &ends, times(&store, &manifest).await?, &limits);
    match args.format {
        Format::Table => output::text(&render::table(&status))?,
        Format::Markdown => output::text(&render::markdown(&status))?,
        Format::Json => output::text(&render::json(&status)?)?,
    }
    status.reasons.iter().for_each(|reason| eprintln!("unhealthy: {reason}"));
    Ok(ExitCode::from(u8::from(!status.healthy)))
}

/// Where the source ends now, or why that is not known. Faults of the SQL are errors.
async fn ends(files: &Files, manifest: &Manifest) -> Result<Ends> {
    if files.files.iter().all(|path| !path.exists()) {
        return Ok(Err("no SQL files were given".to_owned()));
    }
    let mut plan = crate::plan::sinks::plan(&load(files)?, &[]).await?;
    if let Err(error) = plan.resolve_secrets(&environment) {
        return Ok(Err(error.to_string()));
    }
    let found = crate::runtime::lag::partitions(&plan, &manifest.pipeline, manifest, PATIENCE).await;
    Ok(found.map_err(|error| error.to_string()))
}

async fn times(store: &StateStore, manifest: &Manifest) -> Result<Times> {
    let now = Clock.unix_millis();
    let Some(epoch) = manifest.data_epoch else {
        return Ok(Times { now, checkpoint: None, waiting_since: manifest.created_at_ms });
    };
    let data = match manifest.kind {
        Kind::Data => Some(manifest.clone()),
        Kind::Claim => store.read(epoch).await?,
    };
    let Some(data) = data else {
        return Ok(Times { now, checkpoint: None, waiting_since: manifest.created_at_ms });
    };
    // A process that begins after a stop has an interval to take its first checkpoint.
    let claim = match data.stopped && manifest.kind == Kind::Claim {
        true => store.read(epoch + 1).await?.map(|claim| claim.created_at_ms),
        false => None,
    };
    let checkpoint = data.created_at_ms;
    Ok(Times { now, checkpoint: Some(checkpoint), waiting_since: claim.unwrap_or(checkpoint) })
}

/// A time that has passed, for people.
fn ago(ms: i64) -> String {
    let seconds = ms.max(0) / 1_000;
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7_199 => format!("{} min", seconds / 60),
        7_200..=172_799 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}
