//! Rate lines every second, and the signals that end a run.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch::Sender;

use crate::cli::signals;
use crate::cli::view::count;
use crate::error::{Error, Result};
use crate::runtime::Metrics;
use crate::runtime::coordinator::shown_watermark;
use crate::runtime::freshness::quantile;
use crate::stream::clock::Clock;

/// Turns Ctrl-C and SIGTERM into the stop of a run: last checkpoint, then out. A second one does not wait for it, as when
/// a disk is full or a server does not answer: then the future ends with what that means. `forgets`: the source is gone
/// with the process.
///
/// # Errors
/// External: signals cannot be watched.
pub fn on_signal(
    stop: Sender<bool>,
    metrics: Arc<Metrics>,
    forgets: bool,
) -> Result<impl Future<Output = Error>> {
    let first = || {
        super::live::STOPPING.store(true, Ordering::Relaxed);
        super::screen::note("stopping: last checkpoint (once more: at once, without it)");
    };
    signals::stop_twice(stop, first, move || at_once(metrics.epoch.load(Ordering::Relaxed), forgets))
}

/// What an end without a last checkpoint means; `epoch`: of the newest one, 0 for none of this run.
fn at_once(epoch: u64, forgets: bool) -> Error {
    let since = match epoch {
        0 => "what this run has read".to_owned(),
        epoch => format!("what was read since checkpoint {epoch}"),
    };
    let hint = match forgets {
        true => "Rows of before the checkpoint are kept; those since are gone with the embedded broker.",
        false => "Nothing is lost: the next start reads it again. Until then it is in no table.",
    };
    Error::external(format!("ended at once, without a last checkpoint: {since} is not durable")).hint(hint)
}

/// Prints a line every second, and with `rows` some of the newest features below it.
pub async fn lines(metrics: Arc<Metrics>, rows: bool) -> Infallible {
    let mut before = 0;
    let mut ages = Vec::new();
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let read = metrics.read();
        eprintln!("{}", line(&metrics, read - before));
        before = read;
        // Sample rows are made to lie back in time: their age says nothing.
        if let Some(fresh) = freshness(&metrics, &ages).filter(|_| !rows) {
            eprintln!("  {fresh}");
        }
        ages = freshness_counts(&metrics);
        if rows {
            metrics
                .sinks
                .iter()
                .filter_map(|(_, sink)| sink.take_sample())
                .for_each(|sample| newest(&sample));
        }
        pressure(&metrics).iter().for_each(|line| eprintln!("  {line}"));
        for (_, sink) in metrics.sinks.iter().filter(|(_, sink)| sink.failing.any()) {
            eprintln!("  {}: down, {} keys wait", sink.name, sink.waiting.load(Ordering::Relaxed));
        }
    }
}

/// The ages of online rows so far, over all online sinks.
pub fn freshness_counts(metrics: &Metrics) -> Vec<u64> {
    let mut sum = Vec::new();
    for (_, sink) in metrics.sinks.iter().filter(|(_, sink)| sink.online) {
        let counts = sink.freshness.counts();
        sum.resize(counts.len(), 0);
        sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    sum
}

/// How old rows were, by event time, when the online store had them; `None` when none was written since `before`.
pub fn freshness(metrics: &Metrics, before: &[u64]) -> Option<String> {
    let counts = freshness_counts(metrics);
    let quantile = |q| Some(quantile(&counts, q, before)? as f64 / 1e3);
    Some(format!(
        "fresh: event to online store p50 {:.1} ms  p99 {:.1} ms  max {:.1} ms",
        quantile(0.5)?,
        quantile(0.99)?,
        quantile(1.0)?
    ))
}

fn newest(sample: &arrow::array::RecordBatch) {
    let mut bytes = Vec::new();
    let mut writer = arrow::json::LineDelimitedWriter::new(&mut bytes);
    // What cannot be shown is left out: this is for the eye only.
    if writer.write(&sample.slice(0, sample.num_rows().min(2))).and_then(|()| writer.finish()).is_ok() {
        String::from_utf8_lossy(&bytes).lines().for_each(|line| eprintln!("  newest {line}"));
    }
}

/// How far a bootstrap from history has come, until it is done.
fn history(metrics: &Metrics, now_ms: i64) -> Vec<String> {
    let mut lines = Vec::new();
    for (_, source) in &metrics.sources {
        let (began, total, read) = (
            source.history.began_ms.load(Ordering::Relaxed),
            source.history.total.load(Ordering::Relaxed),
            source.history.read.load(Ordering::Relaxed),
        );
        if began == 0 || read >= total {
            continue;
        }
        let rate = read as f64 / ((now_ms - began).max(1) as f64 / 1e3);
        let left = if rate > 0.0 { format!("{:.0} s", (total - read) as f64 / rate) } else { "-".to_owned() };
        let done = (read * 20 / total.max(1)) as usize;
        lines.push(format!(
            "history of {}: [{}{}] {} of {} rows, {} rows/s, {left} left",
            source.name,
            "#".repeat(done),
            ".".repeat(20 - done),
            count(read),
            count(total),
            count(rate as u64),
        ));
    }
    lines
}

/// What waits, and for what: history that is read, batches in front of stages, partitions as memory is short.
pub fn pressure(metrics: &Metrics) -> Vec<String> {
    let mut lines = history(metrics, Clock.unix_millis());
    let waiting = metrics.waiting();
    if !waiting.is_empty() {
        let each = waiting.iter().map(|w| format!("{} {} of {}", w.node, w.messages, w.room));
        lines.push(format!("queued: {}", each.collect::<Vec<_>>().join(", ")));
    }
    if metrics.short.load(Ordering::Relaxed) {
        let mib = |bytes: u64| bytes >> 20;
        lines.push(format!(
            "memory: {} MiB of {} MiB; {} partitions ahead wait",
            mib(metrics.resident.load(Ordering::Relaxed)),
            mib(metrics.budget.load(Ordering::Relaxed)),
            metrics.paused.load(Ordering::Relaxed)
        ));
    }
    lines
}

/// Rate, lag and totals.
pub fn line(metrics: &Metrics, rate: u64) -> String {
    let watermark = shown_watermark(metrics.watermark());
    let watermark = watermark.map_or_else(
        || "-".to_owned(),
        |ms| {
            chrono::DateTime::from_timestamp_millis(ms)
                .map_or_else(|| "-".to_owned(), |at| at.format("%FT%T%.3fZ").to_string())
        },
    );
    format!(
        "{rate} rows/s  read {}  lag {}  stored {}  served {}  late {}  dead letters {}  watermark {watermark}  epoch {}",
        metrics.read(),
        metrics.lag(),
        metrics.stored(),
        metrics.served(),
        metrics.late(),
        metrics.letters().total,
        metrics.epoch.load(Ordering::Relaxed),
    )
}
