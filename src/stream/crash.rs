//! Named places at which a test kills or stops the process (`tests/crash.rs`); nothing in a release build.
//!
//! `MILLSTREAM_CRASH_AT=name` ends the process at once, without any clean-up, when it passes that point; `name:3` at the
//! third time. `MILLSTREAM_STOP_AT` stops it there (SIGSTOP), so that it goes on as a zombie when it is continued.
//! `MILLSTREAM_DEAF_AT` makes a client that asks with [`deaf`] get nothing any more.

/// Every point, in the order of an epoch. `.before` and `.after` enclose one step that the outside world can see.
pub const POINTS: [&str; 34] = [
    "claim.before",
    "claim.after",
    "table.before",
    "table.after",
    "replay.before",
    "replay.after",
    "redis.fence.before",
    "redis.fence.after",
    "redis.flush.before",
    // Between two script calls of one flush.
    "redis.flush.between",
    "redis.flush.after",
    // The cut is about to be sent; every report has come in.
    "barrier.before",
    "barrier.after",
    "kafka.before",
    "kafka.after",
    "delta.file.before",
    "delta.file.after",
    "ndjson.file.before",
    "ndjson.file.after",
    "state.before",
    "state.after",
    "ledger.before",
    "ledger.after",
    "dead-letters.before",
    "dead-letters.after",
    "manifest.before",
    "manifest.after",
    "delta.commit.before",
    "delta.commit.after",
    // A MERGE is committed, its staged files are still there.
    "upsert.before",
    "upsert.after",
    "ndjson.rename.before",
    "ndjson.rename.after",
    "delete",
];

/// The points of a backfill, which no pipeline passes.
pub const OF_BACKFILL: [&str; 2] = ["backfill.before", "backfill.after"];
/// Points of a bootstrap from history, beside those of an epoch.
pub const HISTORY_POINTS: [&str; 5] =
    ["adopt.before", "adopt.after", "history.rows", "history.end", "history.handoff"];

#[cfg(debug_assertions)]
mod wanted {
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A point, how often it is still to be passed.
    pub struct Wanted(Option<(String, AtomicUsize)>);

    impl Wanted {
        #[expect(clippy::disallowed_methods, reason = "a switch for tests of debug builds")]
        pub fn of(variable: &str) -> Self {
            let at = std::env::var(variable).ok();
            Self(at.map(|at| {
                let (name, count) = at.split_once(':').unwrap_or((&at, "1"));
                (name.to_owned(), AtomicUsize::new(count.parse().unwrap_or(1)))
            }))
        }

        /// True once, when the point is passed for the wanted time.
        pub fn reached(&self, name: &str) -> bool {
            let here = self.0.as_ref().filter(|(at, _)| at == name);
            here.is_some_and(|(_, left)| left.fetch_sub(1, Ordering::Relaxed) == 1)
        }
    }
}

/// Whether the client that asks shall get nothing any more.
#[cfg(debug_assertions)]
pub fn deaf(name: &'static str) -> bool {
    static DEAF: std::sync::LazyLock<wanted::Wanted> =
        std::sync::LazyLock::new(|| wanted::Wanted::of("MILLSTREAM_DEAF_AT"));
    DEAF.reached(name)
}

#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn deaf(_: &'static str) -> bool {
    false
}

/// Ends or stops the process here if a test asked for it.
#[cfg(debug_assertions)]
#[expect(
    clippy::disallowed_methods,
    reason = "a switch for tests of debug builds: an end without a last checkpoint is what they are about"
)]
pub fn point(name: &'static str) {
    use std::process::{Command, abort, id};
    use std::sync::LazyLock;
    static CRASH: LazyLock<wanted::Wanted> = LazyLock::new(|| wanted::Wanted::of("MILLSTREAM_CRASH_AT"));
    static STOP: LazyLock<wanted::Wanted> = LazyLock::new(|| wanted::Wanted::of("MILLSTREAM_STOP_AT"));
    let known = POINTS.contains(&name) || OF_BACKFILL.contains(&name) || HISTORY_POINTS.contains(&name);
    debug_assert!(known, "{name} is not in the lists of points");
    if CRASH.reached(name) {
        abort();
    }
    if STOP.reached(name) {
        Command::new("kill").args(["-STOP", &id().to_string()]).status().ok();
    }
}

#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn point(_: &'static str) {}
