//! The vocabulary of data in motion. No I/O, no clock reads.
//!
//! Operators exchange [`ChangeBatch`]es; channels carry [`Message`]s. A row's [`Origin`] is its place in the total
//! order (event_time, UNION branch, topic, partition, offset; DESIGN §3) and stays with it through projection,
//! filter, OVER and exchange, so ordering never depends on how the input was cut.

pub mod clock;
pub mod crash;
#[cfg(test)]
pub mod dice;
pub mod letters;

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{Array, BooleanArray, Int64Array, RecordBatch, UInt32Array};
use arrow::compute::{concat_batches, filter, filter_record_batch, take, take_record_batch};
use arrow::datatypes::{DataType, SchemaRef, TimeUnit};
use arrow::error::ArrowError;

/// Event time: microseconds since the epoch, UTC.
pub type Micros = i64;

/// The watermark of a stream that has ended with `--close`: every row is final.
pub const END_OF_TIME: Micros = Micros::MAX;
/// The watermark before any row was seen.
pub const START_OF_TIME: Micros = Micros::MIN;

/// The one timestamp type of every room: microseconds, UTC (DESIGN §2).
pub fn timestamp_type() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
}

/// Year, month and day of a day number since 1970-01-01, in the proleptic Gregorian calendar (Howard Hinnant,
/// *chrono-compatible low-level date algorithms*).
pub fn civil(days: i64) -> (i64, u32, u32) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month as u32, day as u32)
}

/// Where a row came from, packed so that integer order is (UNION branch, topic, partition):
/// 8 bits branch, 16 bits topic (its index in the source's declared list), 32 bits partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place(pub i64);

impl Place {
    pub fn new(branch: u8, topic: u16, partition: i32) -> Self {
        Self(i64::from(branch) << 48 | i64::from(topic) << 32 | i64::from(partition as u32))
    }

    pub fn partition(self) -> i32 {
        (self.0 & 0xFFFF_FFFF) as u32 as i32
    }

    pub fn topic(self) -> u16 {
        (self.0 >> 32 & 0xFFFF) as u16
    }
}

/// The total order's columns, one value per row of the batch they travel with; none is null.
#[derive(Debug, Clone)]
pub struct Origin {
    /// Event time in µs.
    pub time: Int64Array,
    /// A packed [`Place`].
    pub place: Int64Array,
    pub offset: Int64Array,
}

impl Origin {
    pub fn take(&self, indices: &UInt32Array) -> Result<Self, ArrowError> {
        let pick = |array: &Int64Array| Ok::<_, ArrowError>(int64(&take(array, indices, None)?));
        Ok(Self { time: pick(&self.time)?, place: pick(&self.place)?, offset: pick(&self.offset)? })
    }

    pub fn filter(&self, keep: &BooleanArray) -> Result<Self, ArrowError> {
        let pick = |array: &Int64Array| Ok::<_, ArrowError>(int64(&filter(array, keep)?));
        Ok(Self { time: pick(&self.time)?, place: pick(&self.place)?, offset: pick(&self.offset)? })
    }

    pub fn slice(&self, start: usize, length: usize) -> Self {
        Self {
            time: self.time.slice(start, length),
            place: self.place.slice(start, length),
            offset: self.offset.slice(start, length),
        }
    }

    /// The sort key of one row: (time, place, offset).
    pub fn key(&self, row: usize) -> (Micros, i64, i64) {
        (self.time.value(row), self.place.value(row), self.offset.value(row))
    }

    /// Joins origins end to end.
    pub fn concat(parts: &[&Origin]) -> Self {
        let join = |of: fn(&Origin) -> &Int64Array| {
            let mut values = Vec::with_capacity(parts.iter().map(|part| part.time.len()).sum());
            parts.iter().for_each(|part| values.extend_from_slice(of(part).values()));
            Int64Array::from(values)
        };
        Self { time: join(|o| &o.time), place: join(|o| &o.place), offset: join(|o| &o.offset) }
    }
}

fn int64(array: &dyn Array) -> Int64Array {
    // `take` and `filter` keep the type, so the clone of the concrete array is a pointer copy.
    Int64Array::from(array.to_data())
}

/// Rows and how often each is added (+n) or removed (−n). `weights: None` means all +1: the append-only fast path.
#[derive(Debug, Clone)]
pub struct ChangeBatch {
    pub rows: RecordBatch,
    pub weights: Option<Int64Array>,
    pub origin: Origin,
}

impl ChangeBatch {
    /// The same rows, further on in the order of UNION branches.
    #[must_use]
    pub fn with_branch(mut self, branch: u8) -> Self {
        if branch > 0 {
            let offset = Place::new(branch, 0, 0).0;
            self.origin.place = self.origin.place.unary(|place| place + offset);
        }
        self
    }

    pub fn append(rows: RecordBatch, origin: Origin) -> Self {
        debug_assert_eq!(rows.num_rows(), origin.time.len());
        Self { rows, weights: None, origin }
    }

    pub fn num_rows(&self) -> usize {
        self.origin.time.len()
    }

    pub fn take(&self, indices: &UInt32Array) -> Result<Self, ArrowError> {
        Ok(Self {
            rows: take_record_batch(&self.rows, indices)?,
            weights: self.weights.as_ref().map(|w| take(w, indices, None).map(|w| int64(&w))).transpose()?,
            origin: self.origin.take(indices)?,
        })
    }

    pub fn filter(&self, keep: &BooleanArray) -> Result<Self, ArrowError> {
        Ok(Self {
            rows: filter_record_batch(&self.rows, keep)?,
            weights: self.weights.as_ref().map(|w| filter(w, keep).map(|w| int64(&w))).transpose()?,
            origin: self.origin.filter(keep)?,
        })
    }

    pub fn slice(&self, start: usize, length: usize) -> Self {
        Self {
            rows: self.rows.slice(start, length),
            weights: self.weights.as_ref().map(|w| w.slice(start, length)),
            origin: self.origin.slice(start, length),
        }
    }

    /// The same rows and order with other columns (`rows` must have as many rows).
    #[must_use]
    pub fn with_rows(&self, rows: RecordBatch) -> Self {
        debug_assert_eq!(rows.num_rows(), self.num_rows());
        Self { rows, weights: self.weights.clone(), origin: self.origin.clone() }
    }

    /// Joins batches of one schema.
    pub fn concat(schema: &SchemaRef, parts: &[ChangeBatch]) -> Result<Self, ArrowError> {
        let rows = concat_batches(schema, parts.iter().map(|part| &part.rows))?;
        let origins: Vec<&Origin> = parts.iter().map(|part| &part.origin).collect();
        let weights = parts.iter().any(|part| part.weights.is_some()).then(|| {
            let mut all = Vec::with_capacity(rows.num_rows());
            for part in parts {
                match &part.weights {
                    Some(weights) => all.extend_from_slice(weights.values()),
                    None => all.resize(all.len() + part.num_rows(), 1),
                }
            }
            Int64Array::from(all)
        });
        Ok(Self { rows, weights, origin: Origin::concat(&origins) })
    }
}

/// Next offset to read, per place. Small: one entry per partition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Positions(Vec<(Place, i64)>);

impl Positions {
    pub fn get(&self, place: Place) -> Option<i64> {
        self.0.iter().find(|(p, _)| *p == place).map(|(_, offset)| *offset)
    }

    /// Keeps the larger offset of each place.
    pub fn raise(&mut self, place: Place, next_offset: i64) {
        match self.0.iter_mut().find(|(p, _)| *p == place) {
            Some((_, offset)) => *offset = (*offset).max(next_offset),
            None => {
                self.0.push((place, next_offset));
                self.0.sort_unstable();
            }
        }
    }

    pub fn raise_all(&mut self, other: &Positions) {
        other.iter().for_each(|(place, offset)| self.raise(place, offset));
    }

    pub fn iter(&self) -> impl Iterator<Item = (Place, i64)> + '_ {
        self.0.iter().copied()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(Place, i64)> for Positions {
    fn from_iter<I: IntoIterator<Item = (Place, i64)>>(entries: I) -> Self {
        let mut positions = Self::default();
        entries.into_iter().for_each(|(place, offset)| positions.raise(place, offset));
        positions
    }
}

/// How far a source was read when a message left it. Reads as its positions.
#[derive(Debug, Clone, Default)]
pub struct Reached {
    pub positions: Positions,
    /// When the records behind the rows were read: for measuring only, no answer depends on it.
    pub read_at: Option<Instant>,
}

impl Deref for Reached {
    type Target = Positions;

    fn deref(&self) -> &Positions {
        &self.positions
    }
}

/// What ends an epoch. No data crosses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Barrier {
    pub epoch: u64,
    /// The stream ends right after this barrier.
    pub last: bool,
}

/// What flows through a channel. Everything of one sender arrives in the order in which it was sent.
#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly every message is a batch; boxing would cost an allocation each"
)]
pub enum Message {
    /// Rows, and the positions that are reached once they are applied: all rows below those offsets have been sent.
    Changes {
        batch: ChangeBatch,
        reached: Arc<Reached>,
    },
    /// No row with event time < `time` follows on the on-time port. Also carries positions, so that a receiver
    /// which gets no rows of a partition still learns how far it was read.
    Watermark {
        time: Micros,
        reached: Arc<Reached>,
    },
    Barrier(Barrier),
}

/// Which rows of an operator an edge carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Port {
    /// Every accepted row of a source, late ones too.
    Accepted,
    /// The accepted rows that are not late: the input of views that close by time.
    OnTime,
    /// Rows that no further accepted row can change (emission `final`).
    Final,
    /// Per touched key its newest row (emission `latest`).
    Latest,
    /// Every change, weighted (emission `changes`).
    Changes,
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Accepted => "accepted",
            Self::OnTime => "on time",
            Self::Final => "final",
            Self::Latest => "latest",
            Self::Changes => "changed",
        })
    }
}

/// A record that could not become a row, kept whole so that it can be replayed.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    pub stage: Stage,
    /// Source, view or sink that refused it.
    pub at: Arc<str>,
    pub topic: Arc<str>,
    pub partition: i32,
    pub offset: i64,
    /// The record's own timestamp, ms since the epoch, if it has one.
    pub timestamp_ms: Option<i64>,
    pub key: Option<Vec<u8>>,
    pub payload: Option<Vec<u8>>,
    /// The record's headers as text ([`letters::headers_text`]); `None` when it has none.
    pub headers: Option<String>,
    /// What was wrong, for people; names the field where there is one.
    pub error: String,
    /// A short stable name of the kind of fault (`not_json`, `missing_field`, `wrong_type`, `future` …),
    /// by which logging is limited to once per kind.
    pub kind: &'static str,
}

/// Where in its way a record was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    Decode,
    Future,
    Expression,
    Lookup,
    Sink,
}

impl Stage {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Future => "future",
            Self::Expression => "expression",
            Self::Lookup => "lookup",
            Self::Sink => "sink",
        }
    }
}
