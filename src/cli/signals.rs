//! Ctrl-C and SIGTERM: the first asks for an orderly stop, the second does not wait for it.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch::Sender;

use crate::error::{Error, Result};

/// At the first signal `first` speaks and `stop` is raised; the future ends at the second one, with what `second` says.
///
/// # Errors
/// External: signals cannot be watched.
pub fn stop_twice<T>(
    stop: Sender<bool>,
    first: impl FnOnce(),
    second: impl FnOnce() -> T,
) -> Result<impl Future<Output = T>> {
    let fail = |error: std::io::Error| Error::external("signals cannot be watched").because(error);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(fail)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(fail)?;
    Ok(async move {
        let mut next = async || {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        };
        next().await;
        first();
        stop.send_replace(true);
        next().await;
        // Alive until now: a closed channel is no stop.
        drop(stop);
        second()
    })
}
