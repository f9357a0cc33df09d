//! The only place that reads a clock: everything else gets a [`Clock`] handed in, and operators never see one.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Wall and monotonic time of the process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clock;

#[allow(clippy::disallowed_methods, reason = "this is the one place that reads the clock")]
impl Clock {
    /// Milliseconds since the epoch.
    pub fn unix_millis(self) -> i64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    }

    /// Microseconds since the epoch.
    pub fn unix_micros(self) -> i64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
    }

    /// For measuring how long something takes.
    pub fn instant(self) -> Instant {
        Instant::now()
    }
}
