//! `millstream dead-letters ls | show | replay`: what could not become rows, from the state of the pipeline, which may
//! be running.

use std::process::ExitCode;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray, TimestampMicrosecondArray};
use clap::{Args, Subcommand, ValueEnum};

use super::{Files, output, pipeline_name};
use crate::batch::Answer;
use crate::batch::letters::{Filter, Found, Record, State, open, record};
use crate::connectors::formats::json_encode::with_texts;
use crate::connectors::formats::shortened;
use crate::error::{Error, Result};

/// Characters of an error in a listing for people.
const SHORT: usize = 70;

#[derive(Debug, Subcommand)]
pub enum DeadLettersCommand {
    /// Lists them, newest first.
    Ls(LsArgs),
    /// Prints all that is known of one record.
    Show(ShowArgs),
    /// Decodes them again with the SQL as it is now, and appends what are rows now to the backup, each record once.
    ///
    /// The running pipeline goes on and never sees these rows; on stdout are the intervals to compute anew. The exit
    /// code is 1 when a record still cannot be a row.
    #[cfg(feature = "delta")]
    Replay(ReplayArgs),
}

#[derive(Debug, Args)]
struct Pipeline {
    #[command(flatten)]
    files: Files,
    /// Name of the pipeline; default: the folder or file stem.
    #[arg(long)]
    name: Option<String>,
    /// Where its state lies; default ./.millstream/<name>.
    #[arg(long)]
    state: Option<String>,
    /// As for `run`.
    #[arg(long)]
    sink: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StageName {
    Decode,
    Future,
    Expression,
    Lookup,
    Sink,
}

#[derive(Debug, Args)]
struct Chosen {
    /// Only those of this stage; may be given again, as may the others.
    #[arg(long, value_enum)]
    stage: Vec<StageName>,
    /// Only those of this kind, such as not_json.
    #[arg(long)]
    kind: Vec<String>,
}

#[derive(Debug, Args)]
pub struct LsArgs {
    #[command(flatten)]
    pipeline: Pipeline,
    #[command(flatten)]
    chosen: Chosen,
    /// Only those that this source, view or sink refused.
    #[arg(long)]
    at: Vec<String>,
    /// Late rows instead: where they lie and, from a Delta backup, their event time.
    #[arg(long, conflicts_with_all = ["stage", "kind", "at"])]
    late: bool,
    /// At most so many.
    #[arg(long, default_value_t = 100)]
    limit: usize,
    #[arg(long, value_enum, default_value_t = output::Format::Table)]
    format: output::Format,
}

#[derive(Debug, Args)]
pub struct ShowArgs {
    /// The record: TOPIC/PARTITION/OFFSET.
    #[arg(value_parser = place)]
    record: Record,
    #[command(flatten)]
    pipeline: Pipeline,
    /// Writes the bytes of the payload, and nothing else.
    #[arg(long)]
    raw: bool,
}

#[cfg(feature = "delta")]
#[derive(Debug, Args)]
pub struct ReplayArgs {
    #[command(flatten)]
    pipeline: Pipeline,
    #[command(flatten)]
    chosen: Chosen,
    /// Only this record: TOPIC/PARTITION/OFFSET.
    #[arg(long, value_parser = place)]
    record: Option<Record>,
    /// Says what would be done, and writes nothing.
    #[arg(long)]
    dry_run: bool,
}

/// A topic's name may hold anything but a slash; a path of files may hold slashes too.
fn place(text: &str) -> std::result::Result<Record, String> {
    let mut parts = text.rsplitn(3, '/');
    let (offset, partition, topic) = (parts.next(), parts.next(), parts.next());
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<i64>().ok());
    match (topic, number(partition).and_then(|number| i32::try_from(number).ok()), number(offset)) {
        (Some(topic), Some(partition), Some(offset)) => Ok((topic.to_owned(), partition, offset)),
        _ => Err("expected TOPIC/PARTITION/OFFSET, such as transactions/0/802".to_owned()),
    }
}

fn shown_place((topic, partition, offset): &Record) -> String {
    format!("{topic}/{partition}/{offset}")
}

impl Pipeline {
    fn name(&self) -> Result<String> {
        pipeline_name(&self.files, self.name.as_deref(), &self.sink)
    }

    async fn open(&self) -> Result<State> {
        let state = match &self.state {
            Some(state) => state.clone(),
            None => format!("./.millstream/{}", self.name()?),
        };
        open(&state).await
    }

    /// What says where the backup lies; `None` without SQL files.
    #[cfg(feature = "delta")]
    async fn plan(&self) -> Result<Option<crate::plan::StreamPlan>> {
        if !self.files.files.iter().all(|path| path.exists()) {
            return Ok(None);
        }
        crate::plan::sinks::plan(&super::load(&self.files)?, &self.sink).await.map(Some)
    }
}

impl Chosen {
    fn filter(&self) -> Filter {
        let name = |stage: &StageName| {
            stage.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
        };
        let stages = self.stage.iter().map(name).collect();
        Filter { stages, kinds: self.kind.clone(), ..Filter::default() }
    }
}

pub async fn run(command: DeadLettersCommand) -> Result<ExitCode> {
    match command {
        DeadLettersCommand::Ls(args) => ls(args).await.map(|()| ExitCode::SUCCESS),
        DeadLettersCommand::Show(args) => show(args).await.map(|()| ExitCode::SUCCESS),
        #[cfg(feature = "delta")]
        DeadLettersCommand::Replay(args) => replay(args).await,
    }
}

async fn ls(args: LsArgs) -> Result<()> {
    let state = args.pipeline.open().await?;
    let found = match args.late {
        true => late(&args, &state).await?,
        false => {
            let filter = Filter { at: args.at, ..args.chosen.filter() };
            state.letters(&filter, Some(args.limit)).await?
        }
    };
    let people = args.format == output::Format::Table && !args.late;
    let rows = if people { for_people(&found.rows)? } else { found.rows };
    output::rows(&Answer { schema: rows.schema(), batches: vec![rows] }, args.format)?;
    if found.more {
        eprintln!("there are more than {}: --limit shows them", args.limit);
    }
    Ok(())
}

/// Fewer columns, each of a bounded width.
fn for_people(rows: &RecordBatch) -> Result<RecordBatch> {
    let places: ArrayRef = Arc::new(StringArray::from_iter_values(
        (0..rows.num_rows()).map(|row| shown_place(&record(rows, row))),
    ));
    let errors = rows.column(3).as_string::<i32>();
    let errors: ArrayRef = Arc::new(
        errors.iter().map(|error| error.map(|error| shortened(error, SHORT))).collect::<StringArray>(),
    );
    let column = |at: usize| Arc::clone(rows.column(at));
    let columns = [
        ("record", places),
        ("timestamp", column(7)),
        ("at", column(1)),
        ("stage", column(0)),
        ("kind", column(2)),
        ("error", errors),
    ];
    Ok(RecordBatch::try_from_iter_with_nullable(columns.map(|(name, array)| (name, array, true)))?)
}

async fn late(args: &LsArgs, state: &State) -> Result<Found> {
    let found = state.late(Some(args.limit)).await?;
    #[cfg(feature = "delta")]
    {
        if let Some(plan) = args.pipeline.plan().await? {
            let rows = crate::batch::letters::with_event_time(&plan, &found.rows).await?;
            return Ok(Found { rows, ..found });
        }
    }
    Ok(found)
}

async fn show(args: ShowArgs) -> Result<()> {
    let state = args.pipeline.open().await?;
    let filter = Filter { record: Some(args.record.clone()), ..Filter::default() };
    let rows = state.letters(&filter, None).await?.rows;
    if rows.num_rows() == 0 {
        let message = format!("there is no dead letter of {}", shown_place(&args.record));
        return Err(Error::user(message).hint("`millstream dead-letters ls` lists what there is."));
    }
    let payloads = rows.column(9).as_binary::<i32>();
    if args.raw {
        let payload = payloads.iter().flatten().next();
        let payload = payload.ok_or_else(|| {
            Error::user(format!("the payload of {} is not kept", shown_place(&args.record))).hint(
                "The record became a row of the source, and that row was refused later: without --raw it is shown \
                 from the backup.",
            )
        })?;
        return output::bytes(payload);
    }
    let texts = with_texts(&rows)?;
    let mut text = String::new();
    for row in 0..texts.num_rows() {
        if row > 0 {
            text.push('\n');
        }
        text.push_str(&described(&texts, row));
    }
    #[cfg(feature = "delta")]
    if payloads.null_count() > 0
        && let Some(plan) = args.pipeline.plan().await?
    {
        let batches = crate::batch::letters::rows_of(&plan, &args.record).await?;
        if let Some(first) = batches.first() {
            let answer = Answer { schema: first.schema(), batches };
            let rows = output::encoded(&answer, output::Format::Ndjson)?;
            text.push_str(&format!("\nrow in the backup\n{}", String::from_utf8_lossy(&rows)));
        }
    }
    output::text(&text)
}

/// One letter, a line per fact; the payload comes last, on lines of its own. `texts`: without bytes.
fn described(texts: &RecordBatch, row: usize) -> String {
    let word = |column: usize| {
        let column = texts.column(column).as_string::<i32>();
        column.is_valid(row).then(|| column.value(row))
    };
    let times = texts.column(7).as_any().downcast_ref::<TimestampMicrosecondArray>();
    let time = times.filter(|times| times.is_valid(row)).and_then(|times| times.value_as_datetime(row));
    let time = time.map(|time| time.format("%Y-%m-%dT%H:%M:%S%.3fZ").to_string());
    let facts = [
        ("record", Some(shown_place(&record(texts, row)))),
        ("timestamp", time),
        ("at", word(1).map(str::to_owned)),
        ("stage", word(0).map(str::to_owned)),
        ("kind", word(2).map(str::to_owned)),
        ("error", word(3).map(str::to_owned)),
        ("key", word(8).map(str::to_owned)),
        ("headers", word(10).map(str::to_owned)),
    ];
    let mut text = String::new();
    for (name, fact) in facts {
        if let Some(fact) = fact {
            text.push_str(&format!("{name:<10} {fact}\n"));
        }
    }
    match word(9) {
        Some(payload) => text.push_str(&format!("payload\n{payload}\n")),
        None => text.push_str("payload    not kept: the record was a row of the source by then\n"),
    }
    text
}

#[cfg(feature = "delta")]
async fn replay(args: ReplayArgs) -> Result<ExitCode> {
    use crate::batch::replay::{Request, replay};
    let catalog = super::load(&args.pipeline.files)?;
    let plan = crate::plan::sinks::plan(&catalog, &args.pipeline.sink).await?;
    let name = args.pipeline.name()?;
    let state = args.pipeline.open().await?;
    let filter = Filter { record: args.record.clone(), ..args.chosen.filter() };
    let request = Request { catalog: &catalog, plan: &plan, name: &name, filter, dry_run: args.dry_run };
    let report = replay(&state, request).await?;
    told(&report, args.dry_run);
    let lines: String = report
        .intervals
        .iter()
        .flat_map(|(sink, days)| {
            days.iter().map(move |(from, to)| {
                format!("millstream backfill {sink} --from {} --to {}\n", day(*from), day(*to))
            })
        })
        .collect();
    if !lines.is_empty() {
        eprintln!("views have these rows once the intervals are computed anew:");
        output::text(&lines)?;
    }
    Ok(ExitCode::from(u8::from(!report.failing.is_empty())))
}

#[cfg(feature = "delta")]
fn told(report: &crate::batch::replay::Report, dry_run: bool) {
    let records = |count: usize| if count == 1 { "1 record".to_owned() } else { format!("{count} records") };
    eprintln!("{}, {} can be rows now", records(report.records), report.accepted);
    for backup in &report.backups {
        let appended = if dry_run { "would be appended" } else { "appended" };
        let version = backup.version.map(|version| format!(" as version {version}")).unwrap_or_default();
        let there = match backup.there {
            0 => String::new(),
            there => format!(", {there} there already"),
        };
        eprintln!("{}: {} {appended}{version}{there}", backup.sink, backup.appended);
    }
    for failing in &report.failing {
        let place = shown_place(&failing.record);
        eprintln!("still no rows, {}: {}; {place}: {}", failing.kind, failing.count, failing.error);
    }
    for sink in &report.timeless {
        eprintln!("{sink}: its groups have no end, so no interval brings it up to date");
    }
}

#[cfg(feature = "delta")]
fn day(days: i64) -> String {
    let (year, month, day) = crate::stream::civil(days);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_named_by_their_place() {
        assert_eq!(place("t/0/17"), Ok(("t".to_owned(), 0, 17)));
        assert_eq!(place("s3://b/logs/1.json/0/17"), Ok(("s3://b/logs/1.json".to_owned(), 0, 17)));
        for wrong in ["t", "t/1", "t/x/1", "t/1/x", "t/99999999999/1"] {
            assert!(place(wrong).is_err(), "{wrong}");
        }
    }
}
