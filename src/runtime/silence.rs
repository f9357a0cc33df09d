//! Which partitions are idle (DESIGN §3): read to their end and silent for `idle_timeout`, while the broker could have
//! brought rows.
//!
//! Silence proves nothing while the broker is away: producers hold their rows until it is back, and the partitions that
//! come back first would make the rows of the others late. So a source that can be asked for its ends is asked several
//! times within `idle_timeout` ([`super::discovery`]), and silence only counts from the first of an unbroken run of
//! answers on. The last answer must say that there is nothing to read.

use std::time::{Duration, Instant};

use crate::stream::{Place, Positions};

/// Between two answers of an unbroken run, beyond the interval and a quarter of it: a loaded machine is no outage.
const SLACK: Duration = Duration::from_secs(1);

/// How often ends are asked for, where partitions are looked for `every` so often.
pub fn pulse(every: Duration, idle_timeout: Duration) -> Duration {
    every.min(idle_timeout / 4).max(Duration::from_millis(100))
}

/// What a shard knows of its silent partitions.
#[derive(Debug, Default)]
pub struct Silence {
    /// Longest time between answers of an unbroken run; `None`: the source cannot be asked.
    longest: Option<Duration>,
    /// Instant of the last row per place, once its end was seen.
    since: Vec<(Place, Instant)>,
    /// First and last of the newest unbroken run of answers.
    answers: Option<(Instant, Instant)>,
    ends: Positions,
}

impl Silence {
    /// Of a source that is asked for its ends every `pulse`.
    pub fn new(pulse: Option<Duration>) -> Self {
        Self { longest: pulse.map(|pulse| pulse + pulse / 4 + SLACK), ..Self::default() }
    }

    /// A poll moved `reached`; those of `at_end` were read to their end. `rows`: it brought some.
    pub fn read(&mut self, reached: &Positions, at_end: &[Place], rows: bool, now: Instant) {
        self.since.retain(|(place, _)| reached.get(*place).is_none() || at_end.contains(place));
        for place in at_end {
            match self.since.iter_mut().find(|(other, _)| other == place) {
                Some((_, since)) if rows => *since = now,
                Some(_) => {}
                None => self.since.push((*place, now)),
            }
        }
    }

    /// The broker said at `now` where the partitions end.
    pub fn answered(&mut self, ends: &Positions, now: Instant) {
        let unbroken = self.answers.filter(|(_, last)| self.is_unbroken(*last, now));
        self.answers = Some((unbroken.map_or(now, |(first, _)| first), now));
        self.ends.clone_from(ends);
    }

    /// The partitions that were silent for as long.
    pub fn idle(
        &self,
        positions: &Positions,
        timeout: Duration,
        now: Instant,
    ) -> impl Iterator<Item = Place> {
        let answering_since = match self.answers {
            _ if self.longest.is_none() => Some(None),
            Some((first, last)) if self.is_unbroken(last, now) => Some(Some(first)),
            _ => None,
        };
        let nothing_to_read = |place: Place| {
            self.longest.is_none()
                || self.ends.get(place).is_some_and(|end| positions.get(place) >= Some(end))
        };
        self.since.iter().filter_map(move |(place, since)| {
            let from = answering_since?.map_or(*since, |first| first.max(*since));
            (now.duration_since(from) >= timeout && nothing_to_read(*place)).then_some(*place)
        })
    }

    fn is_unbroken(&self, last: Instant, now: Instant) -> bool {
        self.longest.is_some_and(|longest| now.duration_since(last) <= longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(60);

    fn at(offsets: &[i64]) -> Positions {
        offsets.iter().enumerate().map(|(id, offset)| (place(id), *offset)).collect()
    }

    fn place(id: usize) -> Place {
        Place::new(0, 0, id as i32)
    }

    fn idle(silence: &Silence, positions: &[i64], now: Instant) -> Vec<Place> {
        silence.idle(&at(positions), TIMEOUT, now).collect()
    }

    #[test]
    fn silence_counts_while_the_broker_answers() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let pulse = pulse(Duration::from_secs(60), TIMEOUT);
        assert_eq!(pulse, Duration::from_secs(15));
        let mut silence = Silence::new(Some(pulse));
        silence.read(&at(&[10, 20]), &[place(0), place(1)], true, start);
        for second in [5, 20, 35, 50] {
            silence.answered(&at(&[10, 20]), after(second));
        }
        assert_eq!(idle(&silence, &[10, 20], after(64)), [], "it has answered for 59 s only");
        assert_eq!(idle(&silence, &[10, 20], after(65)), [place(0), place(1)]);
        assert_eq!(idle(&silence, &[9, 20], after(65)), [place(1)], "there is something to read");
        assert_eq!(idle(&silence, &[10, 20], after(75)), [], "the broker is away");
        // Back after an outage: its producers get as long as anybody.
        silence.answered(&at(&[10, 20]), after(80));
        assert_eq!(idle(&silence, &[10, 20], after(81)), []);
        for second in [95, 110, 125] {
            silence.answered(&at(&[10, 20]), after(second));
        }
        assert_eq!(idle(&silence, &[10, 20], after(139)), []);
        silence.answered(&at(&[10, 20]), after(140));
        assert_eq!(idle(&silence, &[10, 20], after(140)), [place(0), place(1)]);
        silence.read(&at(&[11]), &[place(0)], true, after(141));
        assert_eq!(idle(&silence, &[11, 20], after(141)), [place(1)]);
        silence.read(&at(&[11]), &[], false, after(142));
        assert_eq!(idle(&silence, &[12, 20], after(150)), [place(1)], "others came, and not to the end");
    }

    #[test]
    fn a_source_that_cannot_be_asked_is_believed() {
        let start = Instant::now();
        let mut silence = Silence::new(None);
        silence.read(&at(&[10]), &[place(0)], true, start);
        assert_eq!(idle(&silence, &[10], start + TIMEOUT / 2), []);
        assert_eq!(idle(&silence, &[10], start + TIMEOUT), [place(0)]);
        assert!(pulse(TIMEOUT, Duration::ZERO) > Duration::ZERO);
    }
}
