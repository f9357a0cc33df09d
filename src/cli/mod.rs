//! The command line: the only room that prints. Data goes to stdout, everything else to stderr.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the room that prints")]

#[cfg(feature = "delta")]
mod backfill;
mod checkpoints;
mod dead_letters;
#[cfg(feature = "kafka")]
mod dev;
mod grid;
mod help;
mod live;
mod output;
mod plan;
mod progress;
mod reset;
#[cfg(feature = "delta")]
mod schedule;
mod screen;
mod shell;
mod signals;
mod status;
mod table;
mod test;
#[cfg(feature = "delta")]
mod verify;
mod view;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use self::shell::Shell;
use crate::batch::{Ask, World};
use crate::connectors::files;
use crate::connectors::sandbox::Sandbox;
use crate::error::{Domain, Error, Result};
use crate::plan::StreamPlan;
use crate::runtime::{Metrics, Outcome, RunOptions};
use crate::sql::options::{parse_duration, parse_size};
use crate::sql::place::render;
use crate::sql::{Catalog, Variables, catalog};
use crate::state::store::StateStore;
use crate::stream::clock::Clock;

/// SQL over Kafka topics and their backups, materialised to Delta and Redis.
#[derive(Debug, Parser)]
#[command(name = "millstream", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Args)]
struct Files {
    /// SQL files, or folders of SQL files (*_producer.sql are left out).
    #[arg(default_value = "./sql")]
    files: Vec<PathBuf>,
    /// Sets a ${VARIABLE} of the SQL files, before the environment.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Refuses SQL and states that name files outside this folder, or s3://bucket/prefix; may be given again.
    #[arg(long, value_name = "ROOT")]
    sandbox: Vec<String>,
}

impl Files {
    fn sandbox(&self) -> Result<Sandbox> {
        Sandbox::new(&self.sandbox)
    }
}

/// Which state is meant.
#[derive(Debug, Clone, Args)]
struct StateArgs {
    /// Name of the pipeline; default: the folder or file stem.
    #[arg(long)]
    name: Option<String>,
    /// Where manifests and state live: a folder or s3://…; default ./.millstream/<name>.
    #[arg(long)]
    state: Option<String>,
}

impl StateArgs {
    /// Name and location.
    fn target(&self, files: &Files) -> Result<(String, String)> {
        let name = pipeline_name(files, self.name.as_deref(), &[])?;
        let state = state_of(files, self.state.clone(), &name)?;
        Ok((name, state))
    }
}

/// A state for reading: a folder that is not there is not made.
fn existing_state(location: &str) -> Result<Option<StateStore>> {
    let located = files::open_existing_private(location)?;
    let root = object_store::path::Path::default();
    Ok(located.map(|located| StateStore::new(located.store, root, Clock)))
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Reads and plans the SQL files; prints nothing when all is well.
    Check(Files),
    /// Prints the plan of every sink.
    Explain(Files),
    /// Runs everything embedded: in-process Kafka, the sample producer (F_producer.sql), a local lake.
    #[cfg(feature = "kafka")]
    Dev(dev::DevArgs),
    /// Runs the pipeline.
    Run(RunArgs),
    /// Prints what the state says of a pipeline: accounts, lag, watermarks, files; exit code 1 when it is unhealthy.
    ///
    /// Reads the state only, whether a process runs or not. The numbers are those of the last checkpoint. The SQL files
    /// are needed for the lag alone: the source is asked where it ends and has 2 seconds to answer.
    Status(status::StatusArgs),
    /// Lists the checkpoints that are kept, or begins another pipeline's state as a copy of one.
    Checkpoints(checkpoints::CheckpointsArgs),
    /// Deletes the state of a pipeline, dead letters and late ledger included, so that it begins anew.
    Reset(reset::ResetArgs),
    /// Says what the state keeps of changed SQL: views and sinks that are new, unchanged, changed or gone.
    ///
    /// Looks at state and tables and changes nothing. Exit code 0: run would start; 1: it would refuse.
    Plan(plan::PlanArgs),
    /// Prints help: of a command, "connectors" (what there is), or "connector NAME" (its options).
    Help {
        #[arg(value_name = "TOPIC")]
        topic: Vec<String>,
    },
    /// Runs queries over sinks, views, tables and files; without -c a shell, or the script on stdin.
    ///
    /// FROM takes a name of the pipeline, or a path between quotes: a file, a folder, a glob ('./days/*.parquet'), s3://…,
    /// a Delta table. A Delta table can be read as it was: FROM t FOR VERSION AS OF 3, FROM t FOR TIMESTAMP AS OF '…'.
    /// A condition on the key of a Redis sink reads that key alone. In the shell, \? says what else there is.
    Query(QueryArgs),
    /// Computes the rows of a Delta sink anew from the backup, interval by interval, each replaced in one commit.
    ///
    /// Late rows count; how far an interval looks back follows from the SQL. Intervals that are finished and got no new
    /// rows since are left alone, so a backfill that was killed goes on when it is run again. A stream may write the table
    /// meanwhile: what it can still change is not touched. Online stores are never written.
    #[cfg(feature = "delta")]
    Backfill(backfill::BackfillArgs),
    /// Runs the schedules of the SQL files (CREATE SCHEDULE), each interval of time once.
    ///
    /// Any number of processes may do so: one of them runs a fire, and when it dies another one begins the run again. A
    /// schedule never overlaps itself. When it is first seen it begins with its next fire, or at WITH (start = '…'); fires that
    /// were missed are caught up (catch_up = 'all', 'last', 'none'), runs that failed are tried again (retries, retry_delay).
    /// SELECT * FROM millstream.runs in `millstream query --state …` lists all runs.
    #[cfg(feature = "delta")]
    Schedule(schedule::ScheduleArgs),
    /// Lists, shows and replays records that could not become rows.
    #[command(subcommand)]
    DeadLetters(dead_letters::DeadLettersCommand),
    /// Runs the cases of fixtures (p.test.yaml beside p.sql), as a stream and as a batch; needs no service.
    ///
    /// Each case names rows of the sources and the rows that views and sinks must have. It runs as a stream several
    /// times, each with other cuts, partitions, order within the lateness, parallelism and restarts, and once as a
    /// batch. Differences are on stdout, the exit code is 1 when a case fails.
    Test(test::TestArgs),
    /// Compares a sink with its view's SQL over the backup, without the rows that the stream left out; exit code 1 on
    /// any difference.
    ///
    /// Reads tables and the state only, whether a process runs or not. Rows that can still change are not compared.
    #[cfg(feature = "delta")]
    Verify(verify::VerifyArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    files: Files,
    /// Runs only this sink; may be given again.
    #[arg(long)]
    sink: Vec<String>,
    /// Stops at the end offsets seen at start.
    #[arg(long)]
    until_end: bool,
    /// At the stop no row follows: makes everything final and marks the pipeline closed.
    #[arg(long)]
    close: bool,
    /// Goes on where records are in neither the topic nor its history, and says how many are lost; also with a topic that
    /// took the place of the one that was read, at the same offsets.
    #[arg(long)]
    allow_gap: bool,
    /// Where the SQL of sinks changed: computes them anew from history, up to the offsets that the pipeline has reached, and
    /// replaces the rows of each table in one commit. Meanwhile what was there stays, and is served.
    #[arg(long)]
    rebuild: bool,
    /// Name of the pipeline; default: the folder or file stem.
    #[arg(long)]
    name: Option<String>,
    /// Where manifests and state live: a folder or s3://…; default ./.millstream/<name>.
    #[arg(long)]
    state: Option<String>,
    /// Shards of every stage; default: the cores.
    #[arg(long)]
    parallelism: Option<usize>,
    /// A line every second instead of the live view, on a terminal too.
    #[arg(long)]
    plain: bool,
    /// Budget of resident memory, such as 2GB; default: 70 % of what the machine or the container allows. Above 80 % of
    /// it partitions ahead of the watermark wait; a state that is larger stops the pipeline after a last checkpoint.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Time between checkpoints.
    #[arg(long, default_value = "10s", value_parser = duration)]
    checkpoint: Duration,
}

#[derive(Debug, Args)]
struct QueryArgs {
    #[command(flatten)]
    files: Files,
    /// Statements, each of which prints its rows. Without it: a shell on a terminal, else the script on stdin.
    #[arg(short = 'c', long = "command", value_name = "SQL", allow_hyphen_values = true)]
    sql: Option<String>,
    /// Where the state lies, for dead_letters, and for newest values that are in no Redis (dev).
    #[arg(long)]
    state: Option<String>,
    #[arg(long, value_enum, default_value_t = output::Format::Table)]
    format: output::Format,
    /// At most so many rows of each query; default: 1000 in a table on a terminal, else all.
    #[arg(long, value_name = "ROWS")]
    limit: Option<usize>,
    /// Runs the query and prints its plan with rows and times of every step.
    #[arg(long)]
    explain_analyze: bool,
}

fn duration(text: &str) -> std::result::Result<Duration, String> {
    let parsed = parse_duration(text).filter(|duration| *duration >= Duration::from_millis(1));
    parsed.ok_or_else(|| "expected a duration such as 500ms, 10s or '1 minute'".to_owned())
}

fn size(text: &str) -> std::result::Result<u64, String> {
    let parsed = parse_size(text).filter(|size| *size >= 1 << 20);
    parsed.ok_or_else(|| "expected a size of at least 1MB, such as 512MB or 2GB".to_owned())
}

/// Runs the command line; everything that went wrong is on stderr.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing can be done if the terminal is gone.
            error.print().ok();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("MILLSTREAM_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(cli.command.log_filter())),
        )
        .with_writer(screen::Log::default)
        .with_ansi(screen::is_terminal())
        .with_target(false)
        .init();
    let done = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = done.map_err(|e| Error::external("the async runtime cannot be started").because(e));
    let done = done.and_then(|runtime| {
        let done = runtime.block_on(dispatch(cli.command));
        if done.is_err() {
            // What still blocks, as on a disk that does not answer, is left behind.
            runtime.shutdown_background();
        }
        done
    });
    match done {
        Ok(code) => code,
        Err(error) => {
            eprint!("{}", render(&error));
            quit(if error.domain() == Domain::User { 2 } else { 3 })
        }
    }
}

/// Ends the process at once, say after a failure. Threads of the client libraries may still be at work, also with TLS: OpenSSL's
/// clean-up at exit would pull its tables from under them, which has ended in a signal instead of the exit code.
fn quit(code: u8) -> ExitCode {
    #[cfg(unix)]
    #[allow(unsafe_code, reason = "declares a function of the C library that is safe to call")]
    #[expect(clippy::disallowed_methods, reason = "what was printed must be out before the process ends")]
    {
        use std::io::Write;
        unsafe extern "C" {
            safe fn _exit(code: std::ffi::c_int) -> !;
        }
        // Nobody is left to hear of a failure.
        std::io::stdout().flush().ok();
        _exit(code.into())
    }
    #[cfg(not(unix))]
    ExitCode::from(code)
}

impl Command {
    /// What is logged unless `MILLSTREAM_LOG` says otherwise. Bad records and kills are what tests are made of.
    fn log_filter(&self) -> &'static str {
        match self {
            Self::Test(_) => "error",
            _ => "warn,delta_kernel=error,deltalake_core=error",
        }
    }
}

/// The exit code of what ran to its end.
async fn dispatch(command: Command) -> Result<ExitCode> {
    let done = match command {
        Command::Check(files) => {
            let catalog = load(&files)?;
            crate::plan::sinks::check_views(&catalog).await?;
            #[cfg_attr(not(feature = "delta"), expect(unused_variables, reason = "only schedules need it"))]
            let plan = crate::plan::sinks::plan(&catalog, &[]).await?;
            #[cfg(feature = "delta")]
            crate::batch::schedule::check(&catalog, &plan).await?;
            let schedules = match catalog.schedules.len() {
                0 => String::new(),
                some => format!(", {some} schedules"),
            };
            eprintln!(
                "ok: {} sources, {} views, {} sinks{schedules}",
                catalog.sources.len(),
                catalog.views.len(),
                catalog.sinks.len()
            );
            Ok(())
        }
        Command::Explain(files) => {
            let plan = crate::plan::sinks::plan(&load(&files)?, &[]).await?;
            output::text(&plan.to_string())
        }
        #[cfg(feature = "kafka")]
        Command::Dev(args) => dev::run(args).await,
        Command::Run(args) => run(args).await,
        Command::Status(args) => return status::run(args).await,
        Command::Checkpoints(args) => checkpoints::run(args).await,
        Command::Reset(args) => reset::run(args).await,
        Command::Help { topic } => help::run(&topic),
        Command::Query(args) => return query(args).await,
        #[cfg(feature = "delta")]
        Command::Backfill(args) => return backfill::run(args).await,
        #[cfg(feature = "delta")]
        Command::Schedule(args) => return schedule::run(args).await,
        Command::Test(args) => return test::run(args).await,
        Command::Plan(args) => return plan::run(args).await,
        #[cfg(feature = "delta")]
        Command::Verify(args) => return verify::run(args).await,
        Command::DeadLetters(command) => return dead_letters::run(command).await,
    };
    done.map(|()| ExitCode::SUCCESS)
}

fn overrides(set: &[String]) -> Result<BTreeMap<String, String>> {
    let pair = |text: &String| {
        let pair = text.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        pair.ok_or_else(|| Error::user(format!("--set {text} lacks a value")).hint("Write --set NAME=VALUE."))
    };
    set.iter().map(pair).collect()
}

#[expect(clippy::disallowed_methods, reason = "the command line reads the environment for the SQL files")]
fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn load(files: &Files) -> Result<Catalog> {
    load_with(files, &[])
}

/// Loads with variables of our own; `--set` goes before them.
fn load_with(files: &Files, own: &[(String, String)]) -> Result<Catalog> {
    let mut set: BTreeMap<String, String> = own.iter().cloned().collect();
    set.extend(overrides(&files.set)?);
    let variables = Variables { overrides: set, environment: &environment };
    let paths = catalog::pipeline_files(&files.files)?;
    let texts = paths.iter().map(|path| catalog::read(path)).collect::<Result<Vec<_>>>()?;
    let catalog = Catalog::load(&texts, &variables)?;
    crate::plan::sandbox::check(&catalog, &files.sandbox()?)?;
    Ok(catalog)
}

/// The folder's or file's stem; with sinks, `<name>.<sink>+<sink>`.
fn pipeline_name(files: &Files, name: Option<&str>, sinks: &[String]) -> Result<String> {
    let stem =
        files.files.first().and_then(|path| path.file_stem()).map(|stem| stem.to_string_lossy().into_owned());
    let name = name.map(str::to_owned).or(stem).unwrap_or_else(|| "pipeline".to_owned());
    if name.is_empty() || name.contains(['/', '\\']) {
        return Err(
            Error::user(format!("'{name}' is no name of a pipeline")).hint("Use letters, digits, - and _.")
        );
    }
    // Some of the sinks are a pipeline of their own: the state of all of them has more.
    Ok(match sinks {
        [] => name,
        some => format!("{name}.{}", some.join("+")),
    })
}

/// Where the state of a pipeline lies.
fn state_of(files: &Files, state: Option<String>, name: &str) -> Result<String> {
    let state = state.unwrap_or_else(|| format!("./.millstream/{name}"));
    files.sandbox()?.check(&state, false).map_err(|error| error.context("--state"))?;
    Ok(state)
}

async fn run(args: RunArgs) -> Result<()> {
    let catalog = load(&args.files)?;
    let mut plan: StreamPlan = crate::plan::sinks::plan(&catalog, &args.sink).await?;
    plan.resolve_secrets(&environment)?;
    let name = pipeline_name(&args.files, args.name.as_deref(), &args.sink)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let options = RunOptions {
        state: state_of(&args.files, args.state, &name)?,
        name: name.clone(),
        parallelism: args.parallelism.unwrap_or(cores).clamp(1, 256),
        checkpoint: args.checkpoint,
        until_end: args.until_end,
        close: args.close,
        memory: args.memory.or_else(crate::runtime::memory::default_budget),
        allow_gap: args.allow_gap,
        rebuild: args.rebuild,
        console: output::console,
    };
    let metrics = Metrics::of(&plan);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let signals = progress::on_signal(stop, Arc::clone(&metrics), false)?;
    let show = live::Show { plain: args.plain, title: format!("run {name}"), sample: false };
    let lines = live::show(Arc::clone(&metrics), show)?;
    let done = tokio::select! {
        done = crate::runtime::run(plan, options, Arc::clone(&metrics), stopped) => done,
        ended = signals => Err(ended),
        never = lines => match never {},
    }?;
    let how = match done {
        Outcome::Stopped => "stopped",
        Outcome::Closed => "closed: every row is final",
        Outcome::AlreadyClosed => "was closed before; its last commits are in place",
    };
    eprintln!("{}", progress::line(&metrics, 0));
    if let Some(fresh) = progress::freshness(&metrics, &[]) {
        eprintln!("  {fresh}");
    }
    eprintln!("pipeline {name} {how}");
    Ok(())
}

async fn query(args: QueryArgs) -> Result<ExitCode> {
    // A query over files alone needs no pipeline.
    let missing = args.files.files.iter().all(|path| !path.exists());
    let (catalog, plan) = match missing && args.files.files == [PathBuf::from("./sql")] {
        true => (Catalog::default(), StreamPlan::default()),
        false => {
            let catalog = load(&args.files)?;
            let plan = crate::plan::sinks::plan(&catalog, &[]).await?;
            (catalog, plan)
        }
    };
    let sandbox = args.files.sandbox()?;
    if let Some(state) = &args.state {
        sandbox.check(state, false).map_err(|error| error.context("--state"))?;
    }
    let variables = Variables { overrides: overrides(&args.files.set)?, environment: &environment };
    // As long as the process: queries are tasks.
    let world: &'static World<'static> = Box::leak(Box::new(World {
        catalog: Box::leak(Box::new(catalog)),
        plan: Box::leak(Box::new(plan)),
        variables: Box::leak(Box::new(variables)),
        state: args.state.map(|state| &*state.leak()),
        sandbox: Box::leak(Box::new(sandbox)),
    }));
    let limit = args.limit.or_else(|| shell::default_limit(args.format));
    let ask = Ask { limit, explain_analyze: args.explain_analyze };
    let shell = Shell::new(world, ask, args.format)?;
    match args.sql {
        Some(sql) => shell.once(&sql).await?,
        None if shell.run().await? => return Ok(quit(0)),
        None => {}
    }
    Ok(ExitCode::SUCCESS)
}
