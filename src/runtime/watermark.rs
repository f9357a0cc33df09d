//! The source's clock: watermark per partition, watermark of the source, and which rows are late (DESIGN §3).
//!
//! A partition's watermark is max(event_time) over its preceding offsets − lateness. The source's is the minimum
//! over its partitions that are not idle, never falling; when all are idle, their maximum counts. A row is late iff
//! it is below its own partition's watermark or below a source watermark that was already sent downstream. Both are
//! decided here, once per row and in offset order, so the answer does not depend on how polls cut the partition.
//!
//! One clock is shared by the shards of a source. A batch is decided under one lock, and what it publishes is sent
//! by each shard behind the rows it has accepted, so no row follows a watermark that it is below.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::stream::{END_OF_TIME, Micros, Place, START_OF_TIME};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Partition {
    /// Largest event time seen, if any row was.
    max_time: Option<Micros>,
    idle: bool,
}

#[derive(Debug)]
struct Inner {
    partitions: BTreeMap<Place, Partition>,
    published: Micros,
    /// The source's own is never above it.
    ceiling: Micros,
}

/// Shared by the shards of one source.
#[derive(Debug, Clone)]
pub struct SourceClock {
    lateness: Micros,
    inner: Arc<Mutex<Inner>>,
}

impl SourceClock {
    /// `partitions` with the watermark that a manifest stored for each; `published`: the source's own.
    pub fn new(
        lateness: Micros,
        partitions: impl IntoIterator<Item = (Place, Option<Micros>)>,
        published: Option<Micros>,
    ) -> Self {
        let restore = |(place, watermark): (Place, Option<Micros>)| {
            let max_time = watermark.map(|watermark| watermark.saturating_add(lateness));
            (place, Partition { max_time, idle: false })
        };
        let partitions = partitions.into_iter().map(restore).collect();
        let published = published.unwrap_or(START_OF_TIME);
        let inner = Inner { partitions, published, ceiling: END_OF_TIME };
        Self { lateness, inner: Arc::new(Mutex::new(inner)) }
    }

    /// The source's watermark stays at or below `ceiling`.
    pub fn below(self, ceiling: Micros) -> Self {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).ceiling = ceiling;
        self
    }

    /// Decides which rows are late, in order, and raises the watermarks. `late` gets one entry per row.
    /// Returns the source watermark to send behind the rows.
    pub fn observe(&self, places: &[Place], times: &[Micros], late: &mut Vec<bool>) -> Micros {
        debug_assert_eq!(places.len(), times.len());
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let published = inner.published;
        late.clear();
        let mut start = 0;
        // Runs of one partition share the look-up.
        while start < places.len() {
            let place = places[start];
            let end = start + places[start..].iter().take_while(|other| **other == place).count();
            let partition =
                inner.partitions.entry(place).or_insert(Partition { max_time: None, idle: false });
            partition.idle = false;
            let mut max = partition.max_time.unwrap_or(START_OF_TIME);
            for time in &times[start..end] {
                let bound = max.saturating_sub(self.lateness).max(published);
                late.push(*time < bound);
                max = max.max(*time);
            }
            partition.max_time = Some(max);
            start = end;
        }
        inner.publish(self.lateness)
    }

    /// A partition was added to the topic: the others wait for its rows from now on, or until it is idle.
    pub fn add(&self, place: Place) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.partitions.entry(place).or_insert(Partition { max_time: None, idle: false });
    }

    /// A partition was read to its end and stayed silent for the idle time-out.
    pub fn mark_idle(&self, place: Place) -> Micros {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(partition) = inner.partitions.get_mut(&place) {
            partition.idle = true;
        }
        inner.publish(self.lateness)
    }

    /// `--close`: no row follows.
    pub fn close(&self) -> Micros {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.published = END_OF_TIME;
        END_OF_TIME
    }

    /// An epoch that runs again has come to its end: its watermark is known.
    pub fn raise(&self, to: Micros) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.published = inner.published.max(to);
    }

    pub fn published(&self) -> Micros {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).published
    }

    /// Which partition holds the others back, for the eye.
    pub fn holding(&self) -> Holding {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let watermark = |p: &Partition| p.max_time.map(|max| max.saturating_sub(self.lateness));
        let active = inner.partitions.iter().filter(|(_, p)| !p.idle);
        Holding {
            slowest: active.map(|(place, p)| (*place, watermark(p))).min_by_key(|(_, watermark)| *watermark),
            furthest: inner.partitions.values().filter_map(watermark).max(),
            partitions: inner.partitions.len(),
            idle: inner.partitions.values().filter(|p| p.idle).count(),
        }
    }

    /// Of `places`, those that are ahead of what holds the source back; none while nothing does.
    pub fn ahead(&self, places: impl Iterator<Item = Place>) -> Vec<Place> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let reached = |p: &Partition| p.max_time.unwrap_or(START_OF_TIME);
        let Some(least) = inner.partitions.values().filter(|p| !p.idle).map(reached).min() else {
            return Vec::new();
        };
        places.filter(|place| inner.partitions.get(place).is_some_and(|p| reached(p) > least)).collect()
    }

    /// The watermark of each partition, for the manifest.
    pub fn partitions(&self) -> BTreeMap<Place, Option<Micros>> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let watermark = |p: &Partition| p.max_time.map(|max| max.saturating_sub(self.lateness));
        inner.partitions.iter().map(|(place, p)| (*place, watermark(p))).collect()
    }
}

/// What the watermark of a source waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holding {
    /// The partition with the least watermark of those that are not idle, and that watermark (`None`: no row yet).
    pub slowest: Option<(Place, Option<Micros>)>,
    /// The greatest watermark of a partition.
    pub furthest: Option<Micros>,
    pub partitions: usize,
    pub idle: usize,
}

impl Inner {
    fn publish(&mut self, lateness: Micros) -> Micros {
        let watermark = |p: &Partition| p.max_time.map_or(START_OF_TIME, |max| max.saturating_sub(lateness));
        let active = self.partitions.values().filter(|p| !p.idle).map(watermark).min();
        let next = match active {
            Some(minimum) => minimum,
            None => self.partitions.values().map(watermark).max().unwrap_or(START_OF_TIME),
        };
        self.published = self.published.max(next.min(self.ceiling));
        self.published
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(partition: i32) -> Place {
        Place::new(0, 0, partition)
    }

    fn observe(clock: &SourceClock, rows: &[(i32, i64)]) -> (Vec<bool>, Micros) {
        let places: Vec<Place> = rows.iter().map(|(p, _)| place(*p)).collect();
        let times: Vec<i64> = rows.iter().map(|(_, t)| *t).collect();
        let mut late = Vec::new();
        let watermark = clock.observe(&places, &times, &mut late);
        (late, watermark)
    }

    #[test]
    fn the_source_waits_for_its_slowest_partition() {
        let clock = SourceClock::new(10, [(place(0), None), (place(1), None)], None);
        assert_eq!(observe(&clock, &[(0, 100)]), (vec![false], START_OF_TIME));
        assert_eq!(observe(&clock, &[(1, 50)]), (vec![false], 40));
        assert_eq!(observe(&clock, &[(1, 39), (1, 40), (1, 500)]), (vec![true, false, false], 90));
    }

    #[test]
    fn a_row_does_not_make_itself_late_and_cuts_do_not_matter() {
        let rows: Vec<(i32, i64)> = (0..400).map(|i| (i % 3, i64::from(i * 7919 % 400))).collect();
        let whole = SourceClock::new(25, (0..3).map(|p| (place(p), None)), None);
        let (late, end) = observe(&whole, &rows);
        let mut expected = Vec::new();
        let mut max = [i64::MIN; 3];
        for (p, t) in &rows {
            expected.push(*t < max[*p as usize].saturating_sub(25));
            max[*p as usize] = max[*p as usize].max(*t);
        }
        assert_eq!(late, expected);
        assert!(late.iter().any(|late| *late) && late.iter().any(|late| !*late));
        for cut in [1, 7, 50] {
            // Within one partition every cut decides alike; the source watermark is never above a partition's own.
            let clock = SourceClock::new(25, (0..3).map(|p| (place(p), None)), None);
            let mut all = Vec::new();
            let mut last = START_OF_TIME;
            for part in rows.chunks(cut) {
                let (late, watermark) = observe(&clock, part);
                assert!(watermark >= last);
                last = watermark;
                all.extend(late);
            }
            assert_eq!((all, last), (late.clone(), end));
        }
    }

    #[test]
    fn idle_partitions_let_go_and_what_they_bring_later_may_be_late() {
        let clock = SourceClock::new(0, [(place(0), None), (place(1), None)], None);
        assert_eq!(observe(&clock, &[(0, 100)]).1, START_OF_TIME);
        assert_eq!(clock.mark_idle(place(1)), 100);
        assert_eq!(observe(&clock, &[(1, 99), (1, 100)]), (vec![true, false], 100));
        clock.mark_idle(place(0));
        assert_eq!(clock.mark_idle(place(1)), 100);
    }

    #[test]
    fn the_slowest_partition_that_is_not_idle_holds_back() {
        let clock = SourceClock::new(10, [(place(0), None), (place(1), None), (place(2), None)], None);
        observe(&clock, &[(0, 100), (2, 70)]);
        let holding = clock.holding();
        assert_eq!(holding.slowest, Some((place(1), None)));
        assert_eq!((holding.furthest, holding.partitions, holding.idle), (Some(90), 3, 0));
        clock.mark_idle(place(1));
        assert_eq!(clock.holding().slowest, Some((place(2), Some(60))));
        clock.mark_idle(place(0));
        clock.mark_idle(place(2));
        assert_eq!((clock.holding().slowest, clock.holding().idle), (None, 3));
    }

    #[test]
    fn who_holds_the_others_back_is_never_ahead() {
        let clock = SourceClock::new(10, (0..4).map(|p| (place(p), None)), None);
        let ahead = |clock: &SourceClock| clock.ahead((0..4).map(place));
        assert!(ahead(&clock).is_empty());
        observe(&clock, &[(0, 100), (1, 70), (2, 70)]);
        assert_eq!(ahead(&clock), [place(0), place(1), place(2)], "partition 3 has no row yet");
        clock.mark_idle(place(3));
        assert_eq!(ahead(&clock), [place(0)], "both of the slowest go on");
        observe(&clock, &[(1, 200), (2, 150)]);
        assert_eq!(ahead(&clock), [place(1), place(2)]);
    }

    #[test]
    fn restored_watermarks_decide_as_before() {
        let before = SourceClock::new(10, [(place(0), None)], None);
        observe(&before, &[(0, 100)]);
        let after = SourceClock::new(10, before.partitions(), Some(before.published()));
        assert_eq!(observe(&after, &[(0, 89), (0, 90)]), observe(&before, &[(0, 89), (0, 90)]));
    }
}
