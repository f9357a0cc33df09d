//! The live view of a run: reads the counters four times a second and draws them. Reads only: a slow terminal or a
//! view that nobody looks at costs the tasks nothing.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, RecordBatch};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::view::{Sample, Sink, Snapshot, Source, latency, render};
use crate::cli::{progress, screen};
use crate::error::{Error, Result};
use crate::runtime::coordinator::shown_watermark;
use crate::runtime::metrics::{Metrics, SinkMetrics, SourceMetrics};
use crate::runtime::watermark::Holding;
use crate::stream::Micros;
use crate::stream::clock::Clock;

/// Time between two drawings.
const TICK: Duration = Duration::from_millis(250);
/// A rate is that of the last so many ticks.
const RATE_TICKS: usize = 8;
/// Latencies are those of the last so many seconds.
const LATENCY_SECONDS: usize = 10;
/// Rates of so many seconds are shown side by side.
const SHOWN_SECONDS: usize = 20;
/// Rows that are kept of a sink, for the highest of terminals.
const KEPT_ROWS: usize = 64;
/// Ticks between two looks at the newest rows: slow enough to read.
const SAMPLE_TICKS: u64 = 4;
/// A text in a row is cut behind so many characters.
const LONGEST_CELL: usize = 40;

/// What is shown of a run.
#[derive(Debug, Clone)]
pub struct Show {
    /// Lines instead of the view.
    pub plain: bool,
    /// The command and the pipeline.
    pub title: String,
    /// Rows are made up: their event time says nothing about how fresh they are, their content may be shown as lines.
    pub sample: bool,
}

/// Shows how a run goes, until it is dropped: the view on a terminal, else a line every second.
///
/// # Errors
/// External: signals cannot be watched.
pub fn show(metrics: Arc<Metrics>, show: Show) -> Result<impl Future<Output = Infallible>> {
    let fail = |error: std::io::Error| Error::external("signals cannot be watched").because(error);
    let on_screen = !show.plain && screen::is_terminal();
    let resumed = on_screen.then(|| signal(SignalKind::from_raw(SIGCONT))).transpose().map_err(fail)?;
    Ok(async move {
        match resumed {
            Some(resumed) => View::new(metrics, show).run(resumed).await,
            None => progress::lines(metrics, show.sample).await,
        }
    })
}

/// "Continue" after a stop; the same number on every system that has a terminal like ours.
#[cfg(target_os = "linux")]
const SIGCONT: i32 = 18;
#[cfg(not(target_os = "linux"))]
const SIGCONT: i32 = 19;

/// Set once a stop was asked for.
pub static STOPPING: AtomicBool = AtomicBool::new(false);

/// The counters of a moment.
struct Past {
    at: Instant,
    read: Vec<u64>,
    rows: Vec<u64>,
}

struct View {
    metrics: Arc<Metrics>,
    show: Show,
    styled: bool,
    start: Instant,
    ticks: u64,
    past: VecDeque<Past>,
    /// Rates per second, by source.
    rates: Vec<VecDeque<f64>>,
    /// Counts of (latency, freshness) per sink, one entry per second.
    latencies: VecDeque<Vec<[Vec<u64>; 2]>>,
    samples: Vec<Sample>,
}

impl View {
    fn new(metrics: Arc<Metrics>, show: Show) -> Self {
        let rates = vec![VecDeque::new(); metrics.sources.len()];
        let sample = |sink: &SinkMetrics| Sample { sink: sink.name.clone(), ..Sample::default() };
        let samples = metrics.sinks.iter().map(|(_, sink)| sample(sink)).collect();
        Self {
            styled: super::environment("NO_COLOR").is_none_or(|value| value.is_empty()),
            start: Clock.instant(),
            ticks: 0,
            past: VecDeque::new(),
            rates,
            latencies: VecDeque::new(),
            samples,
            metrics,
            show,
        }
    }

    async fn run(mut self, mut resumed: Signal) -> Infallible {
        let live = screen::begin();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                _ = resumed.recv() => live.resume(),
            }
            let snapshot = self.look();
            let (width, height) = live.room();
            let lines = render(&snapshot, width, height);
            live.draw(lines.iter().map(|line| line.paint(width, self.styled)).collect());
        }
    }

    /// Reads the counters.
    fn look(&mut self) -> Snapshot {
        let now = Clock.instant();
        let unix_ms = Clock.unix_millis();
        let metrics = Arc::clone(&self.metrics);
        let current = Past {
            at: now,
            read: metrics.sources.iter().map(|(_, s)| s.read.load(Ordering::Relaxed)).collect(),
            rows: metrics.sinks.iter().map(|(_, s)| s.rows.load(Ordering::Relaxed)).collect(),
        };
        let before = self.past.front();
        let rate = |of: fn(&Past) -> &Vec<u64>, at: usize| {
            let Some(before) = before else { return 0.0 };
            let rows = of(&current)[at].saturating_sub(of(before)[at]) as f64;
            rows / now.duration_since(before.at).as_secs_f64().max(0.001)
        };
        let read: Vec<f64> = (0..current.read.len()).map(|at| rate(|past| &past.read, at)).collect();
        let rows: Vec<f64> = (0..current.rows.len()).map(|at| rate(|past| &past.rows, at)).collect();
        self.remember(&read);
        self.past.push_back(current);
        while self.past.len() > RATE_TICKS {
            self.past.pop_front();
        }
        if self.ticks.is_multiple_of(SAMPLE_TICKS) {
            self.take_samples();
        }
        self.ticks += 1;
        let source = |(at, (_, source)): (usize, &(usize, Arc<SourceMetrics>))| {
            let rates = self.rates[at].iter().copied().collect();
            Source { rate: read[at], rates, ..source_of(source, unix_ms) }
        };
        let sink = |(at, (_, sink)): (usize, &(usize, Arc<SinkMetrics>))| {
            let earlier = self.latencies.front().map(|all| &all[at]);
            Sink { rate: rows[at], ..sink_of(sink, unix_ms, earlier, self.show.sample) }
        };
        let checkpoint = metrics.checkpoint_ms.load(Ordering::Relaxed);
        Snapshot {
            title: self.show.title.clone(),
            uptime: now.duration_since(self.start),
            epoch: metrics.epoch.load(Ordering::Relaxed),
            checkpoint: since(checkpoint, unix_ms),
            stopping: STOPPING.load(Ordering::Relaxed),
            sources: metrics.sources.iter().enumerate().map(source).collect(),
            letters: metrics.letters(),
            sinks: metrics.sinks.iter().enumerate().map(sink).collect(),
            pressure: progress::pressure(&metrics),
            samples: self.samples.clone(),
        }
    }

    /// Once a second: rates and latencies of the past.
    fn remember(&mut self, read: &[f64]) {
        if !self.ticks.is_multiple_of(4) {
            return;
        }
        for (rates, rate) in self.rates.iter_mut().zip(read) {
            rates.push_back(*rate);
            if rates.len() > SHOWN_SECONDS {
                rates.pop_front();
            }
        }
        let counts = |sink: &SinkMetrics| [sink.latency.counts(), sink.freshness.counts()];
        self.latencies.push_back(self.metrics.sinks.iter().map(|(_, sink)| counts(sink)).collect());
        if self.latencies.len() > LATENCY_SECONDS {
            self.latencies.pop_front();
        }
    }

    fn take_samples(&mut self) {
        for ((_, sink), sample) in self.metrics.sinks.iter().zip(&mut self.samples) {
            let Some(rows) = sink.take_sample() else { continue };
            if sample.columns.is_empty() {
                let column = |field: &arrow::datatypes::FieldRef| {
                    (field.name().clone(), field.data_type().is_numeric())
                };
                sample.columns = rows.schema().fields().iter().map(column).collect();
            }
            let mut newest = texts(&rows);
            newest.reverse();
            newest.append(&mut sample.rows);
            newest.truncate(KEPT_ROWS);
            sample.rows = newest;
        }
    }
}

fn since(then_ms: i64, now_ms: i64) -> Option<Duration> {
    (then_ms > 0).then(|| Duration::from_millis(now_ms.saturating_sub(then_ms).max(0).unsigned_abs()))
}

fn source_of(source: &SourceMetrics, now_ms: i64) -> Source {
    let watermark = shown_watermark(source.watermark());
    Source {
        name: source.name.clone(),
        origin: source.origin.clone(),
        read: source.read.load(Ordering::Relaxed),
        lag: source.lag.load(Ordering::Relaxed),
        late: source.late.load(Ordering::Relaxed),
        watermark,
        behind: watermark.and_then(|at| since(at, now_ms)),
        holding: source.holding().and_then(holding),
        ..Source::default()
    }
}

/// Which partition holds the watermark back, in words.
fn holding(holding: Holding) -> Option<String> {
    let Holding { slowest, furthest, partitions, idle } = holding;
    let idle = match idle {
        0 => String::new(),
        idle => format!("; {idle} idle"),
    };
    let behind = |micros: Micros| latency(micros.max(0).unsigned_abs());
    match (slowest, furthest) {
        (_, None) if partitions == 0 => None,
        (_, None) => Some(format!("no row yet in {partitions} partitions{idle}")),
        (None, Some(_)) => Some(format!("all {partitions} partitions are idle")),
        (Some((place, None)), Some(_)) => Some(format!(
            "held back by partition {}, which has no row yet, of {partitions}{idle}",
            place.partition()
        )),
        (Some(_), Some(_)) if partitions == 1 => None,
        (Some((place, Some(at))), Some(furthest)) => Some(format!(
            "held back by partition {}, {} behind the furthest of {partitions}{idle}",
            place.partition(),
            behind(furthest.saturating_sub(at)),
        )),
    }
}

fn sink_of(sink: &SinkMetrics, now_ms: i64, earlier: Option<&[Vec<u64>; 2]>, sample: bool) -> Sink {
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let before = |at: usize| earlier.map(|counts| counts[at].as_slice()).unwrap_or_default();
    let version = load(&sink.version);
    Sink {
        name: sink.name.clone(),
        target: sink.target.clone(),
        rows: load(&sink.rows),
        commits: load(&sink.commits),
        version: (version > 0).then_some(version),
        newest: since(sink.committed_ms.load(Ordering::Relaxed), now_ms),
        from_read: sink.latency.quantile(0.99, before(0)),
        from_event: sink.freshness.quantile(0.99, before(1)).filter(|_| !sample),
        waiting: sink.failing.any().then(|| load(&sink.waiting)),
        ..Sink::default()
    }
}

/// The cells of rows, oldest first. What has no text is left empty: this is for the eye only.
fn texts(rows: &RecordBatch) -> Vec<Vec<String>> {
    let options = FormatOptions::default()
        .with_timestamp_format(Some("%F %T%.3f"))
        .with_timestamp_tz_format(Some("%F %T%.3f"))
        .with_null("NULL");
    let formatters: Vec<Option<ArrayFormatter<'_>>> =
        rows.columns().iter().map(|column| ArrayFormatter::try_new(column, &options).ok()).collect();
    let float = |column: &ArrayRef| column.data_type().is_floating();
    let floats: Vec<bool> = rows.columns().iter().map(float).collect();
    let cell = |(formatter, float): (&Option<ArrayFormatter<'_>>, &bool), row: usize| {
        let text = formatter.as_ref().and_then(|formatter| formatter.value(row).try_to_string().ok());
        let text = text.unwrap_or_default();
        super::table::cut(&if *float { rounded(text) } else { text }, LONGEST_CELL)
    };
    let row = |row: usize| formatters.iter().zip(&floats).map(|column| cell(column, row)).collect();
    (0..rows.num_rows()).map(row).collect()
}

/// A float with four digits behind the point at most; very great and very small ones as they are.
fn rounded(text: String) -> String {
    match text.parse::<f64>() {
        Ok(value) if (1e-3..1e12).contains(&value.abs()) => {
            format!("{value:.4}").trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        _ => text,
    }
}
