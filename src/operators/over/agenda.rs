//! What is due when: slots by time, taken out up to a time.
//!
//! Entries lie in buckets of equal width, unordered inside. What is taken comes in the order of the buckets, so about in the
//! order of time. A heap would order all of them, at a cache miss per level; nothing here needs that order.

use std::collections::BTreeMap;

use crate::stream::Micros;

/// Emptied buckets that are kept for later ones.
const SPARE: usize = 64;

#[derive(Debug)]
pub struct Agenda {
    /// A bucket holds the times that are equal without their last `bits` bits.
    bits: u32,
    buckets: BTreeMap<i64, Vec<(Micros, u32)>>,
    spare: Vec<Vec<(Micros, u32)>>,
}

impl Agenda {
    /// For entries that lie up to `reach` apart, in a few thousand buckets.
    pub fn new(reach: Micros) -> Self {
        // 2^15 µs are the 33 ms that a stream which is nearly in order moves in a few batches.
        let bits = (reach.max(1) / 4_096).max(1).ilog2().clamp(15, 40);
        Self { bits, buckets: BTreeMap::new(), spare: Vec::new() }
    }

    pub fn push(&mut self, time: Micros, slot: u32) {
        let spare = &mut self.spare;
        let bucket = self.buckets.entry(time >> self.bits);
        bucket.or_insert_with(|| spare.pop().unwrap_or_default()).push((time, slot));
    }

    /// Takes out what is due before `time`; `due` holds its slots afterwards, one per entry.
    pub fn take_before(&mut self, time: Micros, due: &mut Vec<u32>) {
        due.clear();
        let last = time >> self.bits;
        while let Some(mut first) = self.buckets.first_entry() {
            if *first.key() > last {
                return;
            }
            let is_last = *first.key() == last;
            let entries = first.get_mut();
            if is_last {
                entries.retain(|(at, slot)| {
                    let stays = *at >= time;
                    if !stays {
                        due.push(*slot);
                    }
                    stays
                });
                if !entries.is_empty() {
                    return;
                }
            } else {
                due.extend(entries.drain(..).map(|(_, slot)| slot));
            }
            let empty = first.remove();
            if self.spare.len() < SPARE {
                self.spare.push(empty);
            }
        }
    }

    /// Gives slots other numbers; those without one are forgotten.
    pub fn renumber(&mut self, number: impl Fn(u32) -> Option<u32>) {
        self.buckets.retain(|_, entries| {
            entries.retain_mut(|(_, slot)| number(*slot).map(|new| *slot = new).is_some());
            !entries.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::{END_OF_TIME, START_OF_TIME};

    /// Against a plain list, over random times of any size.
    #[test]
    fn takes_what_is_due_and_nothing_else() {
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for reach in [0, 1_000_000, i64::MAX] {
            let (mut agenda, mut list) = (Agenda::new(reach), Vec::<(Micros, u32)>::new());
            let mut now = -5_000_000_i64;
            for _ in 0..2_000 {
                for _ in 0..random(5) {
                    let entry = (now + random(3_000_000) as i64 - 1_000_000, random(50) as u32);
                    agenda.push(entry.0, entry.1);
                    list.push(entry);
                }
                if random(50) == 0 {
                    let odd = |slot: u32| (!slot.is_multiple_of(7)).then_some(slot / 2);
                    agenda.renumber(odd);
                    list =
                        list.iter().filter_map(|(time, slot)| odd(*slot).map(|slot| (*time, slot))).collect();
                }
                now += random(40_000) as i64;
                let mut due = Vec::new();
                agenda.take_before(now, &mut due);
                due.sort_unstable();
                let mut expected: Vec<u32> =
                    list.iter().filter(|(time, _)| *time < now).map(|(_, slot)| *slot).collect();
                expected.sort_unstable();
                assert_eq!(due, expected, "reach {reach}, before {now}");
                list.retain(|(time, _)| *time >= now);
            }
            agenda.push(START_OF_TIME, 1);
            agenda.push(END_OF_TIME, 2);
            let mut due = Vec::new();
            agenda.take_before(END_OF_TIME, &mut due);
            assert_eq!(due.len(), list.len() + 1);
            agenda.take_before(i64::MAX, &mut due);
            assert!(END_OF_TIME == i64::MAX || due == [2], "{due:?}");
        }
    }
}
