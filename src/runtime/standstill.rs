//! A client that gets no more records although the broker has some: noticed here, so that the shard opens a new one.
//!
//! After a broker has not answered for a while, librdkafka may leave partitions unfetched for good, without an error
//! (librdkafka issue 4492, quix-streams issue 1124, our own soak). A restart cures it, and so does a new client. Therefore
//! a client of its own asks for the partitions' ends now and then ([`super::discovery`]), and a partition *stands still*
//! when it stayed at one offset below the end from one answer to the next although polls came back empty in between. A
//! shard that always has other rows to work through may just not have come to the partition: then only after
//! [`PATIENCE`] answers.

use crate::stream::{Place, Positions};

/// Answers, for a shard whose polls are never empty.
const PATIENCE: u32 = 5;

/// Empty polls of about 1 ms each that show that nothing was left to hand out.
const EMPTY: u32 = 200;

/// What a shard remembers of the last answer.
#[derive(Debug, Default)]
pub struct Standstill {
    ends: Positions,
    /// Partitions that were behind their end, where they stood, and at how many answers in a row.
    behind: Vec<(Place, i64, u32)>,
    empty: u32,
}

impl Standstill {
    /// A poll found nothing.
    pub fn polled_nothing(&mut self) {
        self.empty = self.empty.saturating_add(1);
    }

    /// Takes the newest ends of the shard's partitions; returns those that stand still at `positions`. `waiting` are left
    /// unread on purpose.
    pub fn answer(&mut self, ends: Positions, positions: &Positions, waiting: &[Place]) -> Vec<Place> {
        let before = std::mem::take(&mut self.behind);
        let was_empty = std::mem::take(&mut self.empty) >= EMPTY;
        for (place, at) in positions.iter() {
            if waiting.contains(&place) || ends.get(place).is_none_or(|end| end <= at) {
                continue;
            }
            let again = before.iter().find(|(other, then, _)| *other == place && *then == at);
            self.behind.push((place, at, again.map_or(0, |(_, _, times)| times + 1)));
        }
        self.ends = ends;
        let needed = if was_empty { 1 } else { PATIENCE };
        let still = self.behind.iter().filter(|(_, _, times)| *times >= needed);
        still.map(|(place, _, _)| *place).collect()
    }

    /// Records between the positions and the ends of the last answer: what a client that gets nothing does not know.
    pub fn lag(&self, positions: &Positions) -> i64 {
        let behind = |(place, end): (Place, i64)| positions.get(place).map_or(0, |at| (end - at).max(0));
        self.ends.iter().map(behind).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offsets: &[i64]) -> Positions {
        offsets.iter().enumerate().map(|(id, offset)| (Place::new(0, 0, id as i32), *offset)).collect()
    }

    fn quiet(watch: &mut Standstill) {
        (0..EMPTY).for_each(|_| watch.polled_nothing());
    }

    #[test]
    fn only_a_partition_that_stays_below_its_end_stands_still() {
        let mut watch = Standstill::default();
        quiet(&mut watch);
        assert_eq!(watch.answer(at(&[10, 10, 10]), &at(&[10, 4, 4]), &[]), []);
        assert_eq!(watch.lag(&at(&[10, 4, 4])), 12);
        quiet(&mut watch);
        let still = watch.answer(at(&[20, 20, 20]), &at(&[10, 4, 5]), &[]);
        assert_eq!(still, [Place::new(0, 0, 1)]);
        quiet(&mut watch);
        // The first was behind at the last answer and has not moved since.
        let still = watch.answer(at(&[20, 20, 20]), &at(&[10, 20, 20]), &[]);
        assert_eq!(still, [Place::new(0, 0, 0)]);
    }

    #[test]
    fn a_partition_that_waits_and_a_busy_shard_are_left_alone() {
        let mut watch = Standstill::default();
        for _ in 0..3 {
            quiet(&mut watch);
            assert_eq!(watch.answer(at(&[10]), &at(&[4]), &[Place::new(0, 0, 0)]), []);
        }
        for _ in 0..PATIENCE {
            assert_eq!(watch.answer(at(&[10]), &at(&[4]), &[]), []);
        }
        assert_eq!(watch.answer(at(&[10]), &at(&[4]), &[]).len(), 1);
    }
}
