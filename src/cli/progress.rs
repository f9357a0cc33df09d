//! Rate lines every second, and the signals that end a run.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch::Sender;

use crate::error::{Error, Result};
use crate::runtime::Metrics;
use crate::runtime::coordinator::shown_watermark;

/// Turns Ctrl-C and SIGTERM into the stop of a run: last checkpoint, then out.
///
/// # Errors
/// External: signals cannot be watched.
pub fn on_signal(stop: Sender<bool>) -> Result<impl Future<Output = Infallible>> {
    let fail = |error: std::io::Error| Error::external("signals cannot be watched").because(error);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(fail)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(fail)?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        eprintln!("stopping: last checkpoint");
        stop.send_replace(true);
        // Keeps the sender alive: a closed channel is no stop.
        std::future::pending::<()>().await;
        drop(stop);
        unreachable_future().await
    })
}

async fn unreachable_future() -> Infallible {
    std::future::pending().await
}

/// Prints a line every second.
pub async fn lines(metrics: Arc<Metrics>) -> Infallible {
    let mut before = 0;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let read = metrics.read.load(Ordering::Relaxed);
        eprintln!("{}", line(&metrics, read - before));
        before = read;
    }
}

/// Rate, lag and totals.
pub fn line(metrics: &Metrics, rate: u64) -> String {
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let watermark = shown_watermark(metrics.watermark.load(Ordering::Relaxed));
    let watermark = watermark.map_or_else(
        || "-".to_owned(),
        |ms| {
            chrono::DateTime::from_timestamp_millis(ms)
                .map_or_else(|| "-".to_owned(), |at| at.format("%FT%T%.3fZ").to_string())
        },
    );
    format!(
        "{rate} rows/s  read {}  lag {}  stored {}  served {}  late {}  dead letters {}  watermark {watermark}  epoch {}",
        load(&metrics.read),
        metrics.lag.load(Ordering::Relaxed),
        load(&metrics.stored),
        load(&metrics.served),
        load(&metrics.late),
        load(&metrics.dead),
        load(&metrics.epoch),
    )
}
