//! `millstream schedule`: runs the schedules of a pipeline. What happens is told on stderr; with `--once` the runs that were
//! made are on stdout.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::sync::watch;

use super::{Files, StateArgs, environment, load, output, overrides, quit, signals};
use crate::batch::schedule::decide::{Run, State};
use crate::batch::schedule::{self, Event, Options};
use crate::batch::{Answer, World};
use crate::error::{Error, Result};
use crate::sql::Variables;
use crate::stream::Micros;
use crate::stream::clock::Clock;

#[derive(Debug, Args)]
pub struct ScheduleArgs {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    state: StateArgs,
    /// Runs what is due and ends; for a cron or a CronJob of your own. A run that failed is tried again by a later call.
    #[arg(long)]
    once: bool,
    /// Schedules that run at the same time; each gets its share of the memory.
    #[arg(long, default_value_t = 2)]
    parallel: usize,
    /// For how long a process may be silent before another one takes its run over.
    #[arg(long, default_value = "30s", value_parser = super::duration)]
    lease: Duration,
    /// Memory beyond which sorts and aggregations spill to temporary files, such as 2GB; default: 70 % of what the
    /// machine or the container allows.
    #[arg(long, value_name = "SIZE", value_parser = super::size)]
    memory: Option<u64>,
    /// Of the runs that --once made.
    #[arg(long, value_enum, default_value_t = output::Format::Table)]
    format: output::Format,
    /// For tests: the clock begins here.
    #[arg(long, hide = true, value_parser = moment)]
    now: Option<Micros>,
}

fn moment(text: &str) -> std::result::Result<Micros, String> {
    let time = chrono::DateTime::parse_from_rfc3339(text);
    time.map(|time| time.timestamp_micros()).map_err(|error| error.to_string())
}

fn shown(time: Micros) -> String {
    let time = chrono::DateTime::from_timestamp_micros(time);
    time.map_or_else(|| "-".to_owned(), |time| time.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true))
}

/// # Errors
/// User: the SQL. External: the state, or with `--once` a run that failed.
pub async fn run(args: ScheduleArgs) -> Result<ExitCode> {
    let catalog = load(&args.files)?;
    let plan = crate::plan::sinks::plan(&catalog, &[]).await?;
    schedule::check(&catalog, &plan).await?;
    if catalog.schedules.is_empty() {
        let hint = "Write CREATE SCHEDULE n CRON '0 2 * * *' AS BACKFILL sink FOR LAST INTERVAL '1 day'.";
        return Err(Error::user("the SQL files declare no schedule").hint(hint));
    }
    let (name, state) = args.state.target(&args.files)?;
    let variables = Variables { overrides: overrides(&args.files.set)?, environment: &environment };
    let sandbox = args.files.sandbox()?;
    let world = World {
        catalog: &catalog,
        plan: &plan,
        variables: &variables,
        state: Some(&state),
        sandbox: &sandbox,
    };
    let options = Options {
        name,
        state: state.clone(),
        once: args.once,
        parallel: args.parallel,
        lease: args.lease,
        memory: args.memory.or_else(crate::runtime::memory::default_budget),
        shift: args.now.map_or(0, |now| now - Clock.unix_micros()),
    };
    let (stop, stopped) = watch::channel(false);
    // The first signal stops runs where they are, the second ends the process.
    let first = || eprintln!("stopping: what runs is begun again at the next start");
    let second = || Error::external("ended at once: other processes wait for the end of the lease");
    let signals = signals::stop_twice(stop, first, second)?;
    let made = tokio::select! {
        made = schedule::run(&world, &options, stopped, &tell) => made?,
        ended = signals => return Err(ended),
    };
    if !args.once {
        eprintln!("stopped");
        return Ok(quit(0));
    }
    let rows = schedule::table(&made)?;
    output::rows(&Answer { schema: rows.schema(), batches: vec![rows] }, args.format)?;
    match made.iter().filter(|(_, run)| run.state == State::Failed).count() {
        0 => Ok(ExitCode::SUCCESS),
        failed => Err(Error::external(format!("{failed} of {} runs failed", made.len())).hint(format!(
            "Ask `millstream query --state {state} -c 'SELECT * FROM millstream.runs'` what became of them."
        ))),
    }
}

fn tell(event: Event<'_>) {
    match event {
        Event::Begins(name, first) => {
            let first = first.map_or_else(|| "never".to_owned(), shown);
            eprintln!("{name}: new, fires first at {first}");
        }
        Event::Next(name, at, false) => eprintln!("{name}: fires next at {}", shown(at)),
        Event::Next(name, at, true) => eprintln!("{name}: is tried again at {}", shown(at)),
        Event::Watching(name) => eprintln!("{name}: another process runs it, waiting for its end"),
        Event::Started(name, run) => {
            eprintln!("{name}: fire of {}, {}: attempt {}", shown(run.fire), interval(run), run.attempt);
        }
        Event::Ended(name, run) => {
            let mut text = format!("{name}: {}, {}", run.state.as_str(), interval(run));
            if let (Some(rows), Some(started), Some(ended)) = (run.rows, run.started, run.ended) {
                text.push_str(&format!(", {rows} rows in {:.1} s", (ended - started) as f64 / 1e6));
            }
            if let Some(error) = &run.error {
                text.push_str(&format!(": {error}"));
            }
            eprintln!("{text}");
        }
        Event::Trouble(name, error) => eprintln!("{name}: {error}"),
    }
}

fn interval(run: &Run) -> String {
    format!("{} to {}", shown(run.from), shown(run.to))
}
