//! Records held in memory as a topic: what `millstream test` reads instead of Kafka.
//!
//! # Meaning
//! - Records lie in partitions, offsets from 0. They are bytes, decoded as JSON when they are read, so bad records,
//!   tombstones, keys and timestamps come as they come from a broker.
//! - A run sees the records below [`RecordTopic::ends`]; a later run over the same records may see more.
//! - With a seed, polls are cut at random, mix the partitions of their reader at random and are sometimes empty. The
//!   order within a partition never changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;

use super::formats::OnError;
use super::formats::records::{Intent, Raw, Records};
use super::{PartitionInfo, SourceBatch, SourceConnector, SourceReader};
use crate::error::Result;
use crate::stream::{Place, Positions};

/// Most records of one poll, by chance: mostly single records and small batches.
const CUTS: [u64; 4] = [1, 2, 7, 1_000];

/// One record; without a payload it is a tombstone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    pub key: Option<Vec<u8>>,
    pub payload: Option<Vec<u8>>,
    /// ms since the epoch.
    pub timestamp: Option<i64>,
}

/// A topic in memory.
#[derive(Debug, Clone)]
pub struct RecordTopic {
    /// Of the source, for dead letters.
    pub source: Arc<str>,
    pub topic: Arc<str>,
    /// The declared physical columns.
    pub columns: SchemaRef,
    pub partitions: Arc<Vec<Vec<Record>>>,
    /// How many records of each partition are there yet.
    pub ends: Vec<usize>,
    /// Of the cuts; `None`: every poll takes what there is.
    pub seed: Option<u64>,
    /// Records handed out, over all readers.
    pub delivered: Arc<AtomicU64>,
}

/// Numbers that anybody can draw again: SplitMix64.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Uniform in 0..`bound`; 0 for a bound of 0.
    pub fn roll(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((u128::from(z ^ (z >> 31)) * u128::from(bound)) >> 64) as u64
    }

    /// An index below `length`; 0 for a length of 0.
    pub fn index(&mut self, length: usize) -> usize {
        self.roll(length as u64) as usize
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        (1..items.len()).rev().for_each(|at| items.swap(at, self.index(at + 1)));
    }
}

impl RecordTopic {
    /// How far a run may read partition `partition`.
    fn end(&self, partition: usize) -> usize {
        let all = self.partitions.get(partition).map_or(0, Vec::len);
        self.ends.get(partition).copied().unwrap_or(0).min(all)
    }
}

#[async_trait]
impl SourceConnector for RecordTopic {
    fn topics(&self) -> Vec<Arc<str>> {
        vec![Arc::clone(&self.topic)]
    }

    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.columns)
    }

    async fn partitions(&self) -> Result<Vec<PartitionInfo>> {
        let info = |partition| PartitionInfo {
            topic: 0,
            partition: partition as i32,
            low: 0,
            high: self.end(partition) as i64,
        };
        Ok((0..self.partitions.len()).map(info).collect())
    }

    async fn start_positions(&self, partitions: &[PartitionInfo]) -> Result<Positions> {
        Ok(partitions.iter().map(|p| (Place::new(0, p.topic, p.partition), p.low)).collect())
    }

    async fn reader(&self, assigned: Positions) -> Result<Box<dyn SourceReader>> {
        let first = assigned.iter().next().map_or(0, |(place, _)| place.0.unsigned_abs());
        let intent = Intent {
            name: Arc::clone(&self.source),
            topic: Arc::clone(&self.topic),
            on_error: OnError::DeadLetter,
            keep_key: true,
            keep_payload: true,
        };
        Ok(Box::new(RecordReader {
            records: Records::new(Arc::clone(&self.columns), intent)?,
            dice: self.seed.map(|seed| Dice::new(seed.wrapping_add(first.wrapping_mul(0x5DEE_CE66)))),
            next: assigned.iter().map(|(place, at)| (place, usize::try_from(at).unwrap_or(0))).collect(),
            topic: self.clone(),
        }))
    }
}

struct RecordReader {
    topic: RecordTopic,
    records: Records,
    dice: Option<Dice>,
    next: Vec<(Place, usize)>,
}

/// How far one poll has come.
#[derive(Default)]
struct Gathered {
    reached: Positions,
    at_end: Vec<Place>,
}

impl RecordReader {
    /// The partitions that have records left.
    fn open(&self) -> Vec<usize> {
        let left = |at: &usize| {
            let (place, next) = self.next[*at];
            next < self.topic.end(place.partition() as usize)
        };
        (0..self.next.len()).filter(left).collect()
    }

    /// How many records this poll takes; `None`: it comes back empty.
    fn cut(&mut self, max_rows: usize) -> Option<usize> {
        let Some(dice) = &mut self.dice else { return Some(max_rows) };
        if dice.roll(4) == 0 {
            return None;
        }
        let most = CUTS[dice.index(CUTS.len())];
        Some((1 + dice.index(most as usize)).min(max_rows))
    }

    fn take(&mut self, at: usize, gathered: &mut Gathered) -> Result<()> {
        let (place, offset) = self.next[at];
        self.next[at].1 += 1;
        gathered.reached.raise(place, offset as i64 + 1);
        if offset + 1 == self.topic.end(place.partition() as usize) {
            gathered.at_end.push(place);
        }
        let topic = &self.topic;
        let Some(record) =
            topic.partitions.get(place.partition() as usize).and_then(|records| records.get(offset))
        else {
            return Ok(());
        };
        let Some(payload) = record.payload.as_deref().filter(|payload| !payload.is_empty()) else {
            self.records.tombstones += 1;
            return Ok(());
        };
        self.records.push(Raw {
            partition: place.partition(),
            offset: offset as i64,
            timestamp: record.timestamp,
            key: record.key.as_deref(),
            payload,
        })
    }
}

impl SourceReader for RecordReader {
    fn poll(&mut self, max_rows: usize, linger: Duration) -> Result<Option<SourceBatch>> {
        let mut open = self.open();
        let cut = if open.is_empty() { None } else { self.cut(max_rows) };
        let Some(cut) = cut else {
            #[expect(
                clippy::disallowed_methods,
                reason = "a reader lives on a thread of its own and may block"
            )]
            std::thread::sleep(linger);
            return Ok(None);
        };
        let mut gathered = Gathered::default();
        let mut taken = 0;
        while taken < cut && !open.is_empty() {
            let choice = self.dice.as_mut().map_or(0, |dice| dice.index(open.len()));
            self.take(open[choice], &mut gathered)?;
            taken += 1;
            open = self.open();
        }
        self.topic.delivered.fetch_add(taken as u64, Ordering::Relaxed);
        self.records.finish(gathered.reached, gathered.at_end).map(Some)
    }

    fn acknowledge(&mut self, _: &Positions) {}

    fn lag(&self) -> i64 {
        let behind = |(place, next): &(Place, usize)| {
            self.topic.end(place.partition() as usize).saturating_sub(*next) as i64
        };
        self.next.iter().map(behind).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::datatypes::{DataType, Field, Schema};

    fn topic(seed: Option<u64>) -> RecordTopic {
        let record = |n: usize| Record {
            payload: match n {
                3 => Some(b"no json".to_vec()),
                5 => None,
                _ => Some(format!("{{\"n\":{n}}}").into_bytes()),
            },
            timestamp: Some(n as i64),
            key: None,
        };
        let columns = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false)]));
        RecordTopic {
            source: "s".into(),
            topic: "t".into(),
            columns,
            partitions: Arc::new(vec![(0..10).map(record).collect(), (10..30).map(record).collect()]),
            ends: vec![10, 15],
            seed,
            delivered: Arc::default(),
        }
    }

    #[tokio::test]
    async fn every_record_is_read_once_in_the_order_of_its_partition() {
        for seed in [None, Some(1), Some(2)] {
            let topic = topic(seed);
            let partitions = topic.partitions().await.unwrap();
            assert_eq!(partitions.iter().map(|p| p.high).collect::<Vec<_>>(), [10, 15]);
            let start = topic.start_positions(&partitions).await.unwrap();
            let mut reader = topic.reader(start).await.unwrap();
            let (mut offsets, mut dead, mut tombstones, mut polls) = ([vec![], vec![]], 0, 0, 0);
            while reader.lag() > 0 {
                let Some(batch) = reader.poll(1_000, Duration::ZERO).unwrap() else { continue };
                polls += 1;
                for (partition, offset) in batch.partition.values().iter().zip(batch.offset.values()) {
                    offsets[*partition as usize].push(*offset);
                }
                dead += batch.dead.len();
                tombstones += batch.tombstones;
            }
            assert_eq!(offsets[0], [0, 1, 2, 4, 6, 7, 8, 9]);
            assert_eq!(offsets[1], (0..15).collect::<Vec<_>>());
            assert_eq!((dead, tombstones), (1, 1));
            assert_eq!(topic.delivered.load(Ordering::Relaxed), 25);
            assert!(seed.is_none() == (polls == 1), "{polls} polls");
            assert!(reader.poll(10, Duration::ZERO).unwrap().is_none());
        }
    }

    #[test]
    fn dice_are_even_and_repeat() {
        let mut seen = [0; 7];
        let mut dice = Dice::new(42);
        (0..7_000).for_each(|_| seen[dice.index(7)] += 1);
        assert!(seen.iter().all(|count| (800..1_200).contains(count)), "{seen:?}");
        let draw = |seed| {
            (0..5)
                .map({
                    let mut dice = Dice::new(seed);
                    move |_| dice.roll(1_000)
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert_eq!(dice.roll(0), 0);
    }
}
