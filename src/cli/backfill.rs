//! `millstream backfill SINK --from --to`: a row per interval on stdout, the plan and the progress on stderr.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use clap::Args;

use super::{Files, duration, load, output, pipeline_name};
use crate::batch::Answer;
use crate::batch::backfill::{self, Done, Event, Options, Outline, Start};
use crate::error::Result;
use crate::sql::interval::display_micros;
use crate::stream::Micros;
use crate::stream::clock::Clock;

#[derive(Debug, Args)]
pub struct BackfillArgs {
    /// The Delta sink.
    sink: String,
    #[command(flatten)]
    files: Files,
    /// Where the interval begins: 2026-01-31, or a time such as 2026-01-31T06:00:00Z (UTC without a zone).
    #[arg(long, value_parser = time)]
    from: Micros,
    /// Where it ends, not included. Cut off where rows can still come.
    #[arg(long, value_parser = time)]
    to: Micros,
    /// Length of the pieces that are replaced in one commit each, counted from --from.
    #[arg(long, default_value = "1d", value_parser = duration)]
    step: Duration,
    /// Intervals computed at the same time.
    #[arg(long, default_value_t = 1)]
    parallel: usize,
    /// Says what would be done, and writes nothing.
    #[arg(long)]
    dry_run: bool,
    /// Computes finished intervals anew too.
    #[arg(long)]
    force: bool,
    /// How long to wait for a backup that lags behind its stream.
    #[arg(long, default_value = "1 minute", value_parser = duration)]
    wait: Duration,
    /// Memory beyond which sorts and aggregations spill to temporary files, such as 2GB; default: 70 % of what the
    /// machine or the container allows.
    #[arg(long, value_name = "SIZE", value_parser = super::size)]
    memory: Option<u64>,
    /// State snapshots of unbounded frames kept beside the table, from which later intervals start instead of reading all
    /// history; 0: none is made or used.
    #[arg(long, default_value_t = backfill::SNAPSHOTS, value_name = "N")]
    snapshots: usize,
    /// Name of the pipeline; default: the folder or file stem.
    #[arg(long)]
    name: Option<String>,
    #[arg(long, value_enum, default_value_t = output::Format::Table)]
    format: output::Format,
}

/// A day, or a time of RFC 3339 with or without zone.
fn time(text: &str) -> std::result::Result<Micros, String> {
    if let Ok(time) = chrono::DateTime::parse_from_rfc3339(text) {
        return Ok(time.timestamp_micros());
    }
    let naive = ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M"];
    let naive = naive.iter().find_map(|form| chrono::NaiveDateTime::parse_from_str(text, form).ok());
    let day = || chrono::NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?.and_hms_opt(0, 0, 0);
    let found = naive.or_else(day).map(|time| time.and_utc().timestamp_micros());
    found
        .ok_or_else(|| "expected a day such as 2026-01-31, or a time such as 2026-01-31T06:00:00Z".to_owned())
}

fn shown(time: Micros) -> String {
    let time = chrono::DateTime::from_timestamp_micros(time);
    time.map_or_else(|| "-".to_owned(), |time| time.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true))
}

/// # Errors
/// Those of [`backfill::run`]; what was finished before is on stdout then too.
pub async fn run(args: BackfillArgs) -> Result<ExitCode> {
    let catalog = load(&args.files)?;
    let name = pipeline_name(&args.files, args.name.as_deref(), &[])?;
    let micros = |duration: Duration| i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
    let options = Options {
        from: args.from,
        to: args.to,
        step: micros(args.step),
        parallel: args.parallel,
        force: args.force,
        dry_run: args.dry_run,
        wait: args.wait,
        memory: args.memory.or_else(crate::runtime::memory::default_budget),
        snapshots: args.snapshots,
    };
    let progress = Progress::new();
    let result =
        backfill::run(&catalog, &name, &args.sink, &options, &|event| progress.on(event, args.dry_run)).await;
    let finished = match &result {
        Ok(done) => done.clone(),
        Err(_) => progress.done.lock().unwrap_or_else(PoisonError::into_inner).clone(),
    };
    if result.is_ok() || !finished.is_empty() {
        let rows = table(&finished)?;
        output::rows(&Answer { schema: rows.schema(), batches: vec![rows] }, args.format)?;
    }
    result.map(|_| ExitCode::SUCCESS)
}

fn table(done: &[Done]) -> Result<RecordBatch> {
    let times = |of: fn(&Done) -> Micros| -> ArrayRef {
        let times: TimestampMicrosecondArray = done.iter().map(|done| Some(of(done))).collect();
        Arc::new(times.with_timezone("UTC"))
    };
    let counts = |of: fn(&Done) -> Option<u64>| -> ArrayRef {
        let counts = done.iter().map(|done| of(done).and_then(|count| i64::try_from(count).ok()));
        Arc::new(counts.collect::<Int64Array>())
    };
    let columns: [(&str, ArrayRef); 7] = [
        ("from", times(|done| done.interval.from)),
        ("to", times(|done| done.interval.to)),
        ("rows_before", counts(|done| done.rows_before)),
        ("rows_after", counts(|done| done.rows_after)),
        ("seconds", Arc::new(done.iter().map(|done| Some(done.seconds)).collect::<Float64Array>())),
        ("version", counts(|done| done.version)),
        ("status", Arc::new(StringArray::from_iter_values(done.iter().map(|done| done.status.as_str())))),
    ];
    Ok(RecordBatch::try_from_iter_with_nullable(columns.map(|(name, array)| (name, array, true)))?)
}

/// Lines on stderr: what is planned, then one per interval.
struct Progress {
    begun: Instant,
    rows: AtomicU64,
    intervals: AtomicU64,
    /// Rows that were announced last, and when.
    said: Mutex<Instant>,
    waiting: AtomicU64,
    done: Mutex<Vec<Done>>,
}

impl Progress {
    fn new() -> Self {
        let now = Clock.instant();
        Self {
            begun: now,
            rows: AtomicU64::new(0),
            intervals: AtomicU64::new(0),
            said: Mutex::new(now),
            waiting: AtomicU64::new(0),
            done: Mutex::new(Vec::new()),
        }
    }

    fn on(&self, event: Event<'_>, dry_run: bool) {
        match event {
            Event::Outline(outline) => {
                let todo = outline.intervals.iter().filter(|planned| planned.finished.is_none()).count();
                self.intervals.store(todo as u64, Ordering::Relaxed);
                outlined(outline, todo, dry_run);
            }
            Event::Waiting if self.waiting.fetch_add(1, Ordering::Relaxed) == 0 => {
                eprintln!("waiting: the backup lacks rows that the sink has read");
            }
            Event::Waiting => {}
            Event::Rows(count) => {
                let rows = self.rows.fetch_add(count, Ordering::Relaxed) + count;
                let now = Clock.instant();
                let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
                if now.duration_since(*said) >= Duration::from_secs(1) {
                    *said = now;
                    eprintln!("  {rows} rows, {} rows/s", self.rate(rows));
                }
            }
            Event::Again(interval, why) => {
                eprintln!("{} to {}: {why}", shown(interval.from), shown(interval.to));
            }
            Event::Done(done) => self.finished(done),
        }
    }

    fn rate(&self, rows: u64) -> u64 {
        let seconds = Clock.instant().duration_since(self.begun).as_secs_f64();
        (rows as f64 / seconds.max(1e-3)) as u64
    }

    fn finished(&self, done: &Done) {
        let mut all = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(done.clone());
        let Some(rows) = done.rows_after.filter(|_| done.status == backfill::Status::Written) else { return };
        let through = all.iter().filter(|done| done.status == backfill::Status::Written).count() as u64;
        let left = self.intervals.load(Ordering::Relaxed).saturating_sub(through);
        let read =
            done.read.as_ref().map(|read| format!(", {} rows read: {}", read.rows, started(&read.start)));
        let read = read.unwrap_or_default();
        let each = Clock.instant().duration_since(self.begun).as_secs_f64() / through as f64;
        eprintln!(
            "interval {through} of {}, {} to {}: {rows} rows instead of {}{read}; {} rows/s, ETA {:.0} s",
            through + left,
            shown(done.interval.from),
            shown(done.interval.to),
            done.rows_before.unwrap_or(0),
            self.rate(self.rows.load(Ordering::Relaxed)),
            each * left as f64
        );
    }
}

fn outlined(outline: &Outline, todo: usize, dry_run: bool) {
    let back = match outline.reach.ahead {
        Some(0) => "no row before an interval".to_owned(),
        Some(ahead) => format!("{} before each interval", display_micros(ahead)),
        None => "every row from the start (unbounded frame)".to_owned(),
    };
    let version = outline.backup_version.map(|version| format!(" at version {version}")).unwrap_or_default();
    eprintln!("{}: {}", outline.sink, outline.location);
    eprintln!("  reads the backup of {}{version}; looks back at {back}", outline.source);
    if let Some(clipped) = &outline.clipped {
        eprintln!("  ends at {} instead of {}: {}", shown(clipped.to), shown(clipped.asked), clipped.why);
    }
    starts(outline, todo);
    let finished = outline.intervals.len() - todo;
    let would = if dry_run { "would be computed" } else { "to compute" };
    eprintln!("  {todo} intervals {would}, {finished} finished before");
}

/// From where the intervals are computed that do not go on from the one before.
fn starts(outline: &Outline, todo: usize) {
    let mut end = None;
    let mut said = None;
    for planned in outline.intervals.iter().filter(|planned| planned.finished.is_none()) {
        let goes_on = matches!(&planned.start, Start::Snapshot { at, .. } if Some(*at) == end);
        if !goes_on && planned.start != Start::Reach && said != Some(&planned.start) {
            eprintln!("  {} on: {}", shown(planned.interval.from), started(&planned.start));
            said = Some(&planned.start);
        }
        end = Some(planned.interval.to);
    }
    if outline.chained && todo > 1 {
        eprintln!("  each interval goes on from the state at the end of the one before");
    }
}

fn started(start: &Start) -> String {
    match start {
        Start::Reach => "reads what it looks back at".to_owned(),
        Start::Snapshot { at, passed_over: None } => format!("starts from the snapshot of {}", shown(*at)),
        Start::Snapshot { at, passed_over: Some(why) } => {
            format!("starts from the snapshot of {} ({why})", shown(*at))
        }
        Start::History(why) => format!("reads all history: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_days_or_times() {
        assert_eq!(time("1970-01-02"), Ok(86_400_000_000));
        assert_eq!(time("1970-01-01T01:00:00+01:00"), Ok(0));
        for text in ["1970-01-01T00:00:01", "1970-01-01 00:00:01", "1970-01-01T00:00:01Z"] {
            assert_eq!(time(text), Ok(1_000_000), "{text}");
        }
        assert_eq!(time("1970-01-01T00:01"), Ok(60_000_000));
        for wrong in ["yesterday", "2026-13-01", "2026-01-01T25:00:00Z"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }
}
