//! An outside store that fails: when it is tried again, what is said of it, and what shards agree on when it lost its
//! content.
//!
//! After a failure the next try waits, twice as long each time up to [`LONGEST`], half of it by chance, so that the
//! shards and processes which a server lost at once do not come back at once. One warning says that it began, one that it
//! is over, for all shards of a sink or look-up together.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::stream::clock::Clock;

const SHORTEST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_millis(6_400);

/// How long to wait after so many failures in a row, the first included: half of it is sure, the rest up to `dice`.
fn pause(failures: u32, dice: u64) -> Duration {
    let whole = SHORTEST.saturating_mul(1 << failures.clamp(1, 16).saturating_sub(1)).min(LONGEST);
    let half = whole / 2;
    half + Duration::from_micros(dice % (half.as_micros() as u64 + 1))
}

/// Spreads what differs little (SplitMix64's last step).
fn mix(seed: u64) -> u64 {
    let seed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let seed = (seed ^ (seed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    seed ^ (seed >> 31)
}

/// How many shards cannot reach a store.
#[derive(Debug, Default)]
pub struct Failing(AtomicUsize);

impl Failing {
    pub fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

/// One shard's failures in a row.
#[derive(Debug, Default)]
pub struct Outage {
    failures: u32,
    began: Option<Instant>,
    retry_at: Option<Instant>,
}

impl Outage {
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// When the next try is due; `None` when nothing failed.
    pub fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// A try failed. Whether this begins an outage that nobody has spoken of.
    #[must_use]
    pub fn fail(&mut self, clock: Clock, shard: u32, failing: &Failing) -> bool {
        let now = clock.instant();
        self.failures += 1;
        let dice = mix(clock.unix_micros() as u64 ^ (u64::from(shard) << 48));
        self.retry_at = Some(now + pause(self.failures, dice));
        if self.began.is_some() {
            return false;
        }
        self.began = Some(now);
        failing.0.fetch_add(1, Ordering::Relaxed) == 0
    }

    /// A try succeeded. How long the outage was, if this ends it for all shards.
    pub fn succeed(&mut self, clock: Clock, failing: &Failing) -> Option<Duration> {
        (self.failures, self.retry_at) = (0, None);
        let began = self.began.take()?;
        let last = failing.0.fetch_sub(1, Ordering::Relaxed) == 1;
        last.then(|| clock.instant().saturating_duration_since(began))
    }
}

/// What the shards of a sink agree on when its store lost its content.
///
/// The fence may be raised again only when a manifest holds the marks of *every* shard: under a fence that is valid again
/// a shard that has not heard of the loss would see nothing wrong, and after a kill nobody would know of its keys.
#[derive(Debug)]
pub struct Losses {
    /// Losses so far.
    count: AtomicU64,
    /// By shard, the epoch whose state holds the marks of the newest loss.
    marks: Mutex<Vec<Option<u64>>>,
}

impl Losses {
    pub fn new(shards: usize) -> Self {
        Self { count: AtomicU64::new(0), marks: Mutex::new(vec![None; shards]) }
    }

    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// A shard that knew of `known` losses found the fence gone. Whether this is another loss, which no other shard has
    /// told of.
    pub fn found(&self, known: u64) -> bool {
        let mut marks = self.marks();
        let first = self.count() == known;
        if first {
            marks.fill(None);
            self.count.store(known + 1, Ordering::Release);
        }
        first
    }

    /// The state of `epoch` holds a shard's marks of the loss that it knows.
    pub fn mark(&self, shard: u32, epoch: u64, known: u64) {
        let mut marks = self.marks();
        if self.count() == known
            && let Some(mark) = marks.get_mut(shard as usize)
        {
            *mark = Some(epoch);
        }
    }

    /// Once this epoch is published every shard's marks are durable; `None` while a shard has not marked its rows.
    pub fn marked_by(&self) -> Option<u64> {
        self.marks().iter().copied().try_fold(0, |newest, mark| Some(newest.max(mark?)))
    }

    fn marks(&self) -> MutexGuard<'_, Vec<Option<u64>>> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_differ() {
        for failures in [1, 2, 6, 7, 1_000, u32::MAX] {
            let whole = Duration::from_millis(200 << (failures - 1).min(5));
            assert_eq!(pause(failures, 0), whole / 2, "{failures}");
            for dice in (0..1_000).map(mix) {
                assert!((whole / 2..=whole).contains(&pause(failures, dice)), "{failures} {dice}");
            }
        }
        let different: std::collections::BTreeSet<Duration> =
            (0..100).map(|dice| pause(3, mix(dice))).collect();
        assert!(different.len() > 90);
    }

    #[test]
    fn an_outage_of_many_shards_begins_and_ends_once() {
        let (failing, clock) = (Failing::default(), Clock);
        let mut shards = [Outage::default(), Outage::default(), Outage::default()];
        let mut begun = 0;
        for _ in 0..5 {
            for (number, shard) in shards.iter_mut().enumerate().skip(1) {
                begun += usize::from(shard.fail(clock, number as u32, &failing));
                assert!(shard.retry_at().is_some() && failing.any());
            }
        }
        assert_eq!((begun, shards[1].failures()), (1, 5));
        let ended: Vec<bool> =
            shards.iter_mut().map(|shard| shard.succeed(clock, &failing).is_some()).collect();
        assert_eq!(ended, [false, false, true]);
        assert!(
            !failing.any() && shards.iter().all(|shard| shard.failures() == 0 && shard.retry_at().is_none())
        );
        assert!(shards[0].fail(clock, 0, &failing), "another outage is told of again");
    }

    #[test]
    fn a_loss_is_made_good_when_every_shard_has_marked_its_rows() {
        let losses = Losses::new(2);
        assert_eq!((losses.found(0), losses.found(0)), (true, false), "both shards saw the same loss");
        losses.mark(0, 7, 1);
        assert_eq!(losses.marked_by(), None);
        losses.mark(1, 8, 1);
        assert_eq!(losses.marked_by(), Some(8));
        assert_eq!((losses.found(1), losses.marked_by()), (true, None), "a second loss");
        losses.mark(1, 9, 2);
        losses.mark(0, 9, 1);
        assert_eq!((losses.marked_by(), losses.found(1)), (None, false), "heard of late");
        losses.mark(0, 9, 2);
        assert_eq!(losses.marked_by(), Some(9));
    }
}
