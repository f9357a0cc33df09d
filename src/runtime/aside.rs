//! Where work runs that no row waits for: Parquet files and state are encoded and uploaded, files merged.
//!
//! The tasks of the rows and this work share the cores. On threads of one priority a checkpoint's encoders would delay
//! rows on their way to the online store by as long as a core is theirs. So this work has threads of its own, which the
//! system serves after the others when both want a core (Linux: nice 10, which still gets a tenth; at 5 a checkpoint delayed
//! rows two to five times as long, `benches/README.md`); elsewhere they are equal. Bounded channels and the one open epoch keep rows from running ahead of it.

use std::future::Future;
use std::sync::LazyLock;

use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

/// Shared by all pipelines of the process; lives as long as it.
static THREADS: LazyLock<Option<Runtime>> = LazyLock::new(|| {
    let mut builder = Builder::new_multi_thread();
    builder.thread_name("aside").enable_all().on_thread_start(yield_to_others);
    // Without threads of its own the work runs among the tasks of the rows.
    builder.build().inspect_err(|error| tracing::warn!(%error, "no threads for work aside")).ok()
});

/// Runs the work aside of the rows.
pub fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is where the runtime spawns work that no row waits for"
    )]
    match THREADS.as_ref() {
        Some(threads) => threads.spawn(work),
        None => tokio::spawn(work),
    }
}

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "std has no priorities of threads")]
fn yield_to_others() {
    // SAFETY: takes three numbers. On Linux 0 is the calling thread, not its process. A failure changes nothing.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, 10);
    }
}

#[cfg(not(target_os = "linux"))]
fn yield_to_others() {}
