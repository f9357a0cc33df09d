//! A latency histogram without locks: powers of two of 100 µs, split in four.

use std::sync::atomic::{AtomicU64, Ordering};

const BUCKETS: usize = 96;

/// Counts of durations in µs; quantiles are exact to a quarter of a power of two.
#[derive(Debug)]
pub struct Histogram([AtomicU64; BUCKETS]);

impl Default for Histogram {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

fn bucket(micros: u64) -> usize {
    let scaled = micros / 100;
    if scaled < 4 {
        return scaled as usize;
    }
    let power = 63 - scaled.leading_zeros() as usize;
    let quarter = (scaled >> (power - 2) & 3) as usize;
    ((power - 1) * 4 + quarter).min(BUCKETS - 1)
}

/// Upper bound of a bucket in µs.
fn upper(bucket: usize) -> u64 {
    if bucket < 4 {
        return (bucket as u64 + 1) * 100;
    }
    let (power, quarter) = (bucket / 4 + 1, bucket as u64 % 4);
    ((4 + quarter + 1) << (power - 2)) * 100
}

impl Histogram {
    pub fn record(&self, micros: u64, count: u64) {
        self.0[bucket(micros)].fetch_add(count, Ordering::Relaxed);
    }

    /// How long before `now` each of `times` was, all in µs since the epoch; a time ahead of `now` counts as 0.
    pub fn record_all(&self, now: i64, times: &[i64]) {
        times.iter().for_each(|time| self.record(now.saturating_sub(*time).max(0).unsigned_abs(), 1));
    }

    /// How many durations fell into each bucket so far.
    pub fn counts(&self) -> Vec<u64> {
        self.0.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    /// [`quantile`] of what was recorded since `before`.
    pub fn quantile(&self, q: f64, before: &[u64]) -> Option<u64> {
        quantile(&self.counts(), q, before)
    }
}

/// The value below which the share `q` of the durations lie that were counted in `now` but not in `before` (earlier
/// [`Histogram::counts`], or empty), in µs; `None` when there are none.
pub fn quantile(now: &[u64], q: f64, before: &[u64]) -> Option<u64> {
    let earlier = before.iter().copied().chain(std::iter::repeat(0));
    let counts: Vec<u64> = now.iter().zip(earlier).map(|(now, before)| now.saturating_sub(before)).collect();
    let total: u64 = counts.iter().sum();
    let wanted = (total as f64 * q).ceil() as u64;
    let mut sum = 0;
    let at = counts.iter().position(|count| {
        sum += count;
        sum >= wanted.max(1)
    })?;
    Some(upper(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_quarter() {
        let histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5, &[]), None);
        (1..=10_000u64).for_each(|i| histogram.record(i * 100, 1));
        for (q, exact) in [(0.5, 500_000.0), (0.99, 990_000.0), (0.001, 1_000.0)] {
            let found = histogram.quantile(q, &[]).unwrap() as f64;
            assert!(found >= exact && found <= exact * 1.26, "{q}: {found} for {exact}");
        }
    }

    #[test]
    fn buckets_meet_their_bounds() {
        for micros in (0..5_000_000u64).step_by(377) {
            let at = bucket(micros);
            assert!(micros < upper(at) && (at == 0 || micros >= upper(at - 1)), "{micros} in {at}");
        }
    }
}
