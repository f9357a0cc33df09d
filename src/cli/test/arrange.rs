//! Where the records of a case lie in a topic: partitions and order by chance, within what must not change.
//!
//! # What stays
//! - The verdict on each row: late where it is late in the order of the fixture, read as one partition, else on time.
//! - The order of rows of the same event time, as ties are decided by partition and offset.
//!
//! Everything else is free: on-time rows move within the lateness, bad records and tombstones anywhere.

use crate::connectors::records::Dice;
use crate::stream::Micros;

const MAX_PARTITIONS: u64 = 4;
/// Arrangements that are tried before the order of the fixture is taken.
const TRIES: usize = 50;

/// What is known of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// Of the row's place in the total order; `None`: no row came out of it.
    pub time: Option<Micros>,
    pub late: bool,
}

/// Which rows are late in the order given, read as one partition. `lateness`: `None` without a watermark.
pub fn verdicts(times: impl IntoIterator<Item = Option<Micros>>, lateness: Option<Micros>) -> Vec<Known> {
    let mut max = Micros::MIN;
    let mut known = Vec::new();
    for time in times {
        let late =
            matches!((time, lateness), (Some(time), Some(lateness)) if time < max.saturating_sub(lateness));
        max = max.max(time.unwrap_or(max));
        known.push(Known { time, late });
    }
    known
}

/// Indices of the records by partition, in offset order.
pub fn arrange(known: &[Known], lateness: Option<Micros>, dice: &mut Dice) -> Vec<Vec<usize>> {
    let count = 1 + dice.roll(MAX_PARTITIONS).min(known.len() as u64) as usize;
    for _ in 0..TRIES {
        let partitions = draw(known, lateness, count, dice);
        if keeps(known, lateness, &partitions) {
            return partitions;
        }
    }
    let mut partitions = vec![Vec::new(); count];
    partitions[0] = (0..known.len()).collect();
    partitions
}

/// An arrangement that mostly keeps what must stay.
fn draw(known: &[Known], lateness: Option<Micros>, count: usize, dice: &mut Dice) -> Vec<Vec<usize>> {
    let home = homes(known, count, dice);
    let mut on_time: Vec<(i128, usize)> = Vec::new();
    for (at, record) in known.iter().enumerate() {
        let Some(time) = record.time.filter(|_| !record.late) else { continue };
        // A row that overtakes another one by at most the lateness leaves it on time.
        let moved = match lateness {
            Some(lateness) => i128::from(time) + i128::from(delay(lateness.unsigned_abs(), dice)),
            None => i128::from(dice.roll(u64::MAX)),
        };
        on_time.push((moved, at));
    }
    on_time.sort_unstable();
    let mut partitions = vec![Vec::new(); count];
    on_time.into_iter().for_each(|(_, at)| partitions[home[at]].push(at));
    partitions.iter_mut().for_each(|partition| keep_ties(known, partition));
    for (at, record) in known.iter().enumerate().filter(|(_, record)| record.time.is_none() || record.late) {
        let (partition, first) = match record.late {
            true => behind_a_newer(known, lateness.unwrap_or(0), &partitions, at, dice),
            false => (dice.index(count), 0),
        };
        let length = partitions[partition].len();
        let to = first + dice.index(length + 1 - first.min(length));
        partitions[partition].insert(to.min(length), at);
    }
    partitions
}

/// Often none or all of the lateness: faults show at its ends.
fn delay(lateness: u64, dice: &mut Dice) -> u64 {
    match dice.roll(3) {
        0 => 0,
        1 => lateness,
        _ => dice.roll(lateness.saturating_add(1)),
    }
}

/// A partition for each record; rows of one time are spread in the order of the fixture.
fn homes(known: &[Known], count: usize, dice: &mut Dice) -> Vec<usize> {
    let mut home: Vec<usize> = known.iter().map(|_| dice.index(count)).collect();
    let mut by_time: Vec<usize> = (0..known.len()).filter(|at| known[*at].time.is_some()).collect();
    by_time.sort_by_key(|at| (known[*at].time, *at));
    for tie in by_time.chunk_by(|a, b| known[*a].time == known[*b].time) {
        let mut homes: Vec<usize> = tie.iter().map(|at| home[*at]).collect();
        homes.sort_unstable();
        tie.iter().zip(homes).for_each(|(at, partition)| home[*at] = partition);
    }
    home
}

/// Rows of one time change places until they stand in the order of the fixture.
fn keep_ties(known: &[Known], partition: &mut [usize]) {
    let mut places: Vec<usize> = (0..partition.len()).collect();
    places.sort_by_key(|place| (known[partition[*place]].time, *place));
    let before = partition.to_vec();
    for tie in places.chunk_by(|a, b| known[before[*a]].time == known[before[*b]].time) {
        let mut rows: Vec<usize> = tie.iter().map(|place| before[*place]).collect();
        rows.sort_unstable();
        tie.iter().zip(rows).for_each(|(place, row)| partition[*place] = row);
    }
}

/// A partition, and the first place in it, where the row is late.
fn behind_a_newer(
    known: &[Known],
    lateness: Micros,
    partitions: &[Vec<usize>],
    row: usize,
    dice: &mut Dice,
) -> (usize, usize) {
    let bound = known[row].time.unwrap_or(Micros::MIN).saturating_add(lateness);
    let mut newer = Vec::new();
    for (partition, rows) in partitions.iter().enumerate() {
        let at = rows.iter().position(|other| known[*other].time.is_some_and(|time| time > bound));
        newer.extend(at.map(|at| (partition, at + 1)));
    }
    newer.get(dice.index(newer.len())).copied().unwrap_or((0, 0))
}

/// Whether verdicts and ties are as in the order of the fixture.
fn keeps(known: &[Known], lateness: Option<Micros>, partitions: &[Vec<usize>]) -> bool {
    let late = partitions.iter().all(|rows| {
        let found = verdicts(rows.iter().map(|row| known[*row].time), lateness);
        found.iter().zip(rows).all(|(found, row)| found.late == known[*row].late)
    });
    // By (time, partition, offset), rows of one time must come in the order of the fixture.
    let mut order: Vec<(Micros, usize)> = Vec::new();
    for rows in partitions {
        order.extend(rows.iter().filter_map(|row| Some((known[*row].time?, *row))));
    }
    order.sort_by_key(|(time, _)| *time);
    let ties = order.windows(2).all(|pair| pair[0].0 < pair[1].0 || pair[0].1 < pair[1].1);
    late && ties
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_must_stay_stays_and_the_rest_moves() {
        let mut dice = Dice::new(1);
        let (mut fallbacks, mut shapes) = (0, std::collections::BTreeSet::new());
        for case in 0..400 {
            let lateness = (case % 5 > 0).then_some(20);
            let mut clock = 0;
            let times: Vec<Option<Micros>> = (0..dice.index(25))
                .map(|_| {
                    clock += dice.roll(15) as i64;
                    let back = if dice.roll(6) == 0 { 60 } else { dice.roll(20) as i64 };
                    (dice.roll(8) > 0).then_some((clock - back) / 5 * 5)
                })
                .collect();
            let known = verdicts(times, lateness);
            let partitions = arrange(&known, lateness, &mut dice);
            assert!(keeps(&known, lateness, &partitions), "{known:?} {partitions:?}");
            let mut all: Vec<usize> = partitions.iter().flatten().copied().collect();
            fallbacks += usize::from(known.len() > 8 && all.is_sorted());
            all.sort_unstable();
            assert_eq!(all, (0..known.len()).collect::<Vec<_>>());
            shapes.insert(partitions.len());
        }
        assert!(fallbacks < 60, "{fallbacks} arrangements are that of the fixture");
        assert_eq!(shapes.len(), 4);
    }

    #[test]
    fn lateness_is_decided_in_the_order_given() {
        let late = |times: &[i64]| {
            let known = verdicts(times.iter().map(|time| Some(*time)), Some(10));
            known.iter().map(|known| known.late).collect::<Vec<_>>()
        };
        assert_eq!(late(&[100, 90, 89, 200, 150]), [false, false, true, false, true]);
        assert!(verdicts([Some(5), None, Some(1)], None).iter().all(|known| !known.late));
    }
}
