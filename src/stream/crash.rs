//! Named places at which a test kills the process (`tests/crash.rs`); nothing in a release build.
//!
//! `MILLSTREAM_CRASH_AT=name` ends the process at once, without any clean-up, when it passes that point;
//! `name:3` at the third time. `MILLSTREAM_CRASH_LOG=file` notes each name when it is passed first.

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

/// Ends the process here if a test asked for it.
#[cfg(debug_assertions)]
#[expect(
    clippy::disallowed_methods,
    reason = "a switch for tests of debug builds: an end without a last checkpoint is what they are about"
)]
pub fn point(name: &'static str) {
    use std::collections::BTreeMap;
    use std::io::Write;
    use std::sync::{LazyLock, Mutex, PoisonError};

    struct Wanted {
        at: Option<(String, usize)>,
        log: Option<String>,
        passed: Mutex<BTreeMap<&'static str, usize>>,
    }
    static WANTED: LazyLock<Wanted> = LazyLock::new(|| {
        let at = std::env::var("MILLSTREAM_CRASH_AT").ok().map(|at| match at.split_once(':') {
            Some((name, count)) => (name.to_owned(), count.parse().unwrap_or(1)),
            None => (at, 1),
        });
        Wanted { at, log: std::env::var("MILLSTREAM_CRASH_LOG").ok(), passed: Mutex::default() }
    });
    debug_assert!(POINTS.contains(&name), "{name} is not in the list of points");
    let wanted = &*WANTED;
    if wanted.at.is_none() && wanted.log.is_none() {
        return;
    }
    let mut passed = wanted.passed.lock().unwrap_or_else(PoisonError::into_inner);
    let count = passed.entry(name).or_default();
    *count += 1;
    if let Some(path) = wanted.log.as_ref().filter(|_| *count == 1)
        && let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(path)
    {
        writeln!(file, "{name}").ok();
    }
    if wanted.at.as_ref().is_some_and(|(at, nth)| at == name && nth == count) {
        std::process::abort();
    }
}

#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn point(_: &'static str) {}
