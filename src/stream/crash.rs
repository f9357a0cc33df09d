//! Named places at which a test kills or stops the process (`tests/crash.rs`); nothing in a release build.
//!
//! `MILLSTREAM_CRASH_AT=name` ends the process at once, without any clean-up, when it passes that point; `name:3` at the
//! third time. `MILLSTREAM_STOP_AT` stops it there (SIGSTOP), so that it goes on as a zombie when it is continued.
//! `MILLSTREAM_DEAF_AT` makes a client that asks with [`deaf`] get nothing any more.

/// What passes a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// Every start, or every epoch.
    Epoch,
    /// A start that reads history, beside them.
    History,
    /// A start that ends the rebuild of a table, beside them.
    Rebuild,
    /// A backfill, which passes those of the files that it writes, too.
    Backfill,
    /// A backfill of unbounded frames, beside them.
    Snapshot,
    /// A run of a schedule, beside those of its backfill.
    Schedule,
}

/// Every point, in the order of an epoch. `.before` and `.after` enclose one step that the outside world can see.
pub const POINTS: [(&str, Of); 51] = [
    ("claim.before", Of::Epoch),
    ("claim.after", Of::Epoch),
    ("table.before", Of::Epoch),
    ("table.after", Of::Epoch),
    ("replay.before", Of::Epoch),
    ("replay.after", Of::Epoch),
    ("redis.fence.before", Of::Epoch),
    ("redis.fence.after", Of::Epoch),
    ("redis.flush.before", Of::Epoch),
    // Between two script calls of one flush.
    ("redis.flush.between", Of::Epoch),
    ("redis.flush.after", Of::Epoch),
    // The cut is about to be sent; every report has come in.
    ("barrier.before", Of::Epoch),
    ("barrier.after", Of::Epoch),
    ("kafka.before", Of::Epoch),
    ("kafka.after", Of::Epoch),
    ("delta.file.before", Of::Epoch),
    ("delta.file.after", Of::Epoch),
    ("ndjson.file.before", Of::Epoch),
    ("ndjson.file.after", Of::Epoch),
    ("state.before", Of::Epoch),
    ("state.after", Of::Epoch),
    ("ledger.before", Of::Epoch),
    ("ledger.after", Of::Epoch),
    ("dead-letters.before", Of::Epoch),
    ("dead-letters.after", Of::Epoch),
    ("manifest.before", Of::Epoch),
    ("manifest.after", Of::Epoch),
    ("delta.commit.before", Of::Epoch),
    ("delta.commit.after", Of::Epoch),
    // A MERGE is committed, its staged files are still there.
    ("upsert.before", Of::Epoch),
    ("upsert.after", Of::Epoch),
    ("ndjson.rename.before", Of::Epoch),
    ("ndjson.rename.after", Of::Epoch),
    ("delete", Of::Epoch),
    ("adopt.before", Of::History),
    ("adopt.after", Of::History),
    ("history.rows", Of::History),
    ("history.end", Of::History),
    ("history.handoff", Of::History),
    ("swap.before", Of::Rebuild),
    ("swap.after", Of::Rebuild),
    ("backfill.before", Of::Backfill),
    ("backfill.after", Of::Backfill),
    ("snapshot.before", Of::Snapshot),
    ("snapshot.after", Of::Snapshot),
    ("schedule.claim.before", Of::Schedule),
    ("schedule.claim.after", Of::Schedule),
    ("insert.before", Of::Schedule),
    ("insert.after", Of::Schedule),
    ("schedule.end.before", Of::Schedule),
    ("schedule.end.after", Of::Schedule),
];

/// The points of one kind.
pub fn points(of: Of) -> impl Iterator<Item = &'static str> {
    POINTS.into_iter().filter(move |(_, kind)| *kind == of).map(|(name, _)| name)
}

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
    debug_assert!(POINTS.iter().any(|(known, _)| *known == name), "{name} is not in the list of points");
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    fn gather(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                gather(&path, found);
            } else if !path.ends_with("stream/crash.rs") {
                let text = std::fs::read_to_string(&path).unwrap_or_default();
                let calls = text.split("crash::point(\"").skip(1);
                found.extend(calls.filter_map(|rest| rest.split('"').next()).map(str::to_owned));
            }
        }
    }

    #[test]
    fn the_list_has_every_point_of_the_code_once() {
        let mut found = BTreeSet::new();
        gather(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
        let listed: BTreeSet<String> = POINTS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(found, listed);
        assert_eq!(listed.len(), POINTS.len());
    }
}
