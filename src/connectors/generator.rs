//! `connector = 'generator'`: rows that anybody can make again. SQL turns them into what a pipeline needs.
//!
//! # Columns
//! - `seq BIGINT NOT NULL`: 0, 1, 2 …; also the offset, in partition 0.
//! - `event_time TIMESTAMP NOT NULL`: start + seq / rate. Without a rate one row is one millisecond.
//! - `r1`, `r2`, … `DOUBLE`: uniform in [0, 1), a function of (seed, seq, number of the column) only.
//!   `random()` in SQL would give other values after a restart; these do not.
//!
//! A source that declares no columns has `seq` and `event_time`. The rows depend on seed, start and rate; the clock
//! only decides when they come: `rows_per_second` of them, counted from the moment the reader is opened, so a
//! restart goes on at the same pace instead of catching up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Float64Array, Int32Array, Int64Array, RecordBatch, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;

use super::formats::{sql_type, timestamp_micros};
use super::{PartitionInfo, SourceBatch, SourceConnector, SourceReader};
use crate::error::{Error, Result};
use crate::sql::options::Options;
use crate::stream::clock::Clock;
use crate::stream::{Micros, Place, Positions, timestamp_type};

/// Event time per row when there is no rate.
const STEP: Micros = 1_000;
const SECOND: i128 = 1_000_000;
/// Rows that are due are given in batches at least so far apart: one row each would cost a core at 20,000 rows a second.
const GATHER: Duration = Duration::from_millis(2);
const PLACE: Place = Place(0);

/// Options of a generator source.
#[derive(Debug, Clone)]
pub struct GeneratorConfig {
    columns: SchemaRef,
    kinds: Vec<Kind>,
    /// `None`: as fast as they are read.
    pub rows_per_second: Option<u64>,
    /// `None`: endless.
    pub total: Option<i64>,
    pub seed: u64,
    /// Event time of row 0, if the SQL says it.
    pub start: Option<Micros>,
    /// How far before the first start of the pipeline row 0 lies, if `start` is not given.
    pub lookback: Duration,
}

/// What a column holds.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Seq,
    EventTime,
    /// Number of the random column, from 1.
    Random(u64),
}

impl GeneratorConfig {
    /// Takes `rows_per_second` (0: as fast as possible), `total`, `seed` (0), `start` and `lookback` (0).
    ///
    /// # Errors
    /// A user error for a wrong option or a column that a generator does not have.
    pub fn from_options(options: &mut Options, columns: &SchemaRef) -> Result<Self> {
        let columns = if columns.fields().is_empty() { default_columns() } else { Arc::clone(columns) };
        let owner = options.owner().to_owned();
        let kinds = columns.fields().iter().map(|field| kind(field, &owner)).collect::<Result<Vec<_>>>()?;
        let rate = options.parse::<u32>("rows_per_second", "a number of rows")?.unwrap_or(0);
        let total = options.parse::<u64>("total", "a number of rows")?;
        let seed = options.parse::<u64>("seed", "a whole number")?.unwrap_or(0);
        let place = options.place("start");
        let wrong = |text: &str| {
            let error = Error::user(format!("{owner}: start = '{text}' is not a timestamp"))
                .hint("Write it as '2026-01-31 12:00:00' or in RFC 3339.");
            match place {
                Some(place) => error.at(place),
                None => error,
            }
        };
        let start = match options.string("start")? {
            Some(text) => Some(timestamp_micros(&text).ok_or_else(|| wrong(&text))?),
            None => None,
        };
        Ok(Self {
            columns,
            kinds,
            rows_per_second: (rate > 0).then_some(u64::from(rate)),
            total: total.map(|total| i64::try_from(total).unwrap_or(i64::MAX)),
            seed,
            start,
            lookback: options.duration("lookback")?.unwrap_or_default(),
        })
    }

    pub fn columns(&self) -> &SchemaRef {
        &self.columns
    }
}

/// The columns of a generator that declares none.
pub fn default_columns() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("seq", DataType::Int64, false),
        Field::new("event_time", timestamp_type(), false),
    ]))
}

fn kind(field: &Field, owner: &str) -> Result<Kind> {
    let name = field.name().as_str();
    let number = name.strip_prefix('r').and_then(|digits| digits.parse::<u64>().ok()).filter(|n| *n > 0);
    let (kind, wanted) = match (name, number) {
        ("seq", _) => (Kind::Seq, DataType::Int64),
        ("event_time", _) => (Kind::EventTime, timestamp_type()),
        (_, Some(number)) => (Kind::Random(number), DataType::Float64),
        _ => {
            return Err(Error::user(format!("{owner}: a generator has no column {name}")).hint(
                "Its columns are seq, event_time and the random r1, r2, …; compute others from them in SQL.",
            ));
        }
    };
    if *field.data_type() != wanted {
        return Err(Error::user(format!(
            "{owner}: the generator's column {name} is no {}",
            sql_type(field.data_type())
        ))
        .hint(format!("Declare {name} {}.", sql_type(&wanted))));
    }
    Ok(kind)
}

/// A start that lies further back is not caught up: opening a reader does not take that long.
const MAX_CATCH_UP: Duration = Duration::from_secs(10);

/// Rows of one partition.
#[derive(Debug, Clone)]
pub struct GeneratorSource {
    config: Arc<GeneratorConfig>,
    start: Micros,
    first_start: Micros,
    clock: Clock,
}

impl GeneratorSource {
    /// `first_start` is when the pipeline was started for the first time (kept in its first manifest); row 0 lies
    /// `lookback` before it, unless the options name a `start`.
    pub fn new(config: GeneratorConfig, first_start: Micros, clock: Clock) -> Self {
        let lookback = Micros::try_from(config.lookback.as_micros()).unwrap_or(Micros::MAX);
        let start = config.start.unwrap_or(first_start.saturating_sub(lookback));
        Self { config: Arc::new(config), start, first_start, clock }
    }

    /// Event time of a row.
    fn event_time(&self, seq: i64) -> Micros {
        let passed = match self.config.rows_per_second {
            Some(rate) => i128::from(seq) * SECOND / i128::from(rate),
            None => i128::from(seq) * i128::from(STEP),
        };
        self.start.saturating_add(Micros::try_from(passed).unwrap_or(Micros::MAX))
    }

    fn rows(&self, first: i64, end: i64) -> Result<SourceBatch> {
        let seq: Int64Array = (first..end).collect::<Vec<i64>>().into();
        let times: Vec<Micros> = (first..end).map(|seq| self.event_time(seq)).collect();
        let timestamp: Int64Array =
            times.iter().map(|time| time.div_euclid(1_000)).collect::<Vec<i64>>().into();
        let times = Arc::new(TimestampMicrosecondArray::from(times).with_data_type(timestamp_type()));
        let column = |kind: &Kind| -> ArrayRef {
            match kind {
                Kind::Seq => Arc::new(seq.clone()),
                Kind::EventTime => Arc::clone(&times) as ArrayRef,
                Kind::Random(number) => {
                    let draw = |seq: i64| uniform(self.config.seed, seq.unsigned_abs(), *number);
                    Arc::new(
                        (first..end).map(draw).collect::<Vec<f64>>().into_iter().collect::<Float64Array>(),
                    )
                }
            }
        };
        let columns = self.config.kinds.iter().map(column).collect();
        let count = seq.len();
        let ended = self.config.total.is_some_and(|total| end >= total);
        Ok(SourceBatch {
            rows: RecordBatch::try_new(Arc::clone(&self.config.columns), columns)?,
            partition: Int32Array::from(vec![0; count]),
            offset: seq,
            timestamp,
            key: None,
            payload: None,
            dead: Vec::new(),
            tombstones: 0,
            skipped: 0,
            reached: [(PLACE, end)].into_iter().collect(),
            at_end: if ended { vec![PLACE] } else { Vec::new() },
            missing_offsets: 0,
        })
    }
}

#[async_trait]
impl SourceConnector for GeneratorSource {
    fn topics(&self) -> Vec<Arc<str>> {
        vec!["generator".into()]
    }

    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.config.columns)
    }

    /// An endless generator ends at `i64::MAX`, so `--until-end` does not end it.
    async fn partitions(&self) -> Result<Vec<PartitionInfo>> {
        Ok(vec![PartitionInfo {
            topic: 0,
            partition: 0,
            low: 0,
            high: self.config.total.unwrap_or(i64::MAX),
        }])
    }

    async fn start_positions(&self, _: &[PartitionInfo]) -> Result<Positions> {
        Ok([(PLACE, 0)].into_iter().collect())
    }

    async fn reader(&self, assigned: Positions) -> Result<Box<dyn SourceReader>> {
        let next = assigned.get(PLACE);
        let now = self.clock.instant();
        // In its first run a row is due at the moment that its event time names (plus the lookback): what passed
        // between the pipeline's start and the opening of its reader is caught up.
        let since_start = self.clock.unix_micros().saturating_sub(self.first_start);
        let behind = match (next, self.config.start) {
            (Some(0), None) => {
                Duration::from_micros(u64::try_from(since_start).unwrap_or(0)).min(MAX_CATCH_UP)
            }
            _ => Duration::ZERO,
        };
        Ok(Box::new(GeneratorReader {
            source: self.clone(),
            // A reader of no partition has nothing to say, as one that has said it all.
            next: next.unwrap_or(i64::MAX),
            first: next.unwrap_or(i64::MAX),
            opened: now.checked_sub(behind).unwrap_or(now),
            told_end: next.is_none(),
        }))
    }
}

struct GeneratorReader {
    source: GeneratorSource,
    next: i64,
    /// `next` when the reader was opened.
    first: i64,
    opened: Instant,
    told_end: bool,
}

impl GeneratorReader {
    fn total(&self) -> i64 {
        self.source.config.total.unwrap_or(i64::MAX)
    }

    /// Rows below this are due now.
    fn due(&self) -> i64 {
        let due = match self.source.config.rows_per_second {
            Some(rate) => {
                let passed = self.source.clock.instant().duration_since(self.opened).as_micros();
                let rows = passed.saturating_mul(u128::from(rate)) / SECOND.unsigned_abs();
                self.first.saturating_add(i64::try_from(rows).unwrap_or(i64::MAX))
            }
            None => i64::MAX,
        };
        due.min(self.total())
    }

    /// Sleeps until the next row is due, at least [`GATHER`], at most `linger`.
    fn wait(&self, linger: Duration) {
        let until_due = match self.source.config.rows_per_second {
            Some(rate) if self.next < self.total() => {
                let nanos =
                    (self.next - self.first + 1).unsigned_abs() as u128 * 1_000_000_000 / u128::from(rate);
                let due = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
                due.saturating_sub(self.source.clock.instant().duration_since(self.opened))
            }
            _ => linger,
        };
        #[expect(clippy::disallowed_methods, reason = "a reader lives on a thread of its own and may block")]
        std::thread::sleep(until_due.max(GATHER).min(linger.max(Duration::from_micros(50))));
    }
}

impl SourceReader for GeneratorReader {
    fn poll(&mut self, max_rows: usize, linger: Duration) -> Result<Option<SourceBatch>> {
        let mut due = self.due();
        let ended = self.next >= self.total();
        if due <= self.next && (!ended || self.told_end) {
            self.wait(linger);
            due = self.due();
        }
        let most = i64::try_from(max_rows.max(1)).unwrap_or(i64::MAX);
        let end = due.min(self.next.saturating_add(most));
        if end <= self.next {
            // A restart behind the last row still has to say that the partition ended.
            if self.told_end || !ended {
                return Ok(None);
            }
            self.told_end = true;
            return self.source.rows(self.next, self.next).map(Some);
        }
        let batch = self.source.rows(self.next, end)?;
        self.told_end |= !batch.at_end.is_empty();
        self.next = end;
        Ok(Some(batch))
    }

    fn acknowledge(&mut self, _: &Positions) {}

    fn lag(&self) -> i64 {
        match (self.source.config.rows_per_second, self.source.config.total) {
            (None, None) => 0,
            _ => (self.due() - self.next).max(0),
        }
    }
}

/// Uniform in [0, 1), 53 bits: SplitMix64's finaliser over its three parts.
fn uniform(seed: u64, seq: u64, number: u64) -> f64 {
    let bits = mix(mix(mix(seed) ^ seq).wrapping_add(number.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use arrow::array::AsArray;
    use arrow::compute::concat_batches;
    use arrow::datatypes::{Float64Type, Int64Type, TimestampMicrosecondType};

    use super::*;

    fn source(options: &[(&str, &str)]) -> GeneratorSource {
        let columns = Schema::new(vec![
            Field::new("r2", DataType::Float64, false),
            Field::new("seq", DataType::Int64, false),
            Field::new("event_time", timestamp_type(), false),
            Field::new("r1", DataType::Float64, true),
        ]);
        let mut options = Options::of("source g", options);
        let config = GeneratorConfig::from_options(&mut options, &Arc::new(columns)).unwrap();
        options.finish().unwrap();
        GeneratorSource::new(config, 100_000_000, Clock)
    }

    async fn read(source: &GeneratorSource, from: i64, cuts: &[usize]) -> (Vec<RecordBatch>, usize) {
        let mut reader = source.reader([(PLACE, from)].into_iter().collect()).await.unwrap();
        let (mut batches, mut ends) = (Vec::new(), 0);
        for cut in cuts.iter().cycle().take(10_000) {
            let Some(batch) = reader.poll(*cut, Duration::from_millis(1)).unwrap() else {
                if ends > 0 {
                    break;
                }
                continue;
            };
            assert!(batch.rows.num_rows() <= *cut);
            ends += batch.at_end.len();
            batches.push(batch.rows);
        }
        (batches, ends)
    }

    #[tokio::test]
    async fn rows_depend_on_seed_start_and_rate_only() {
        let source = source(&[
            ("total", "1000"),
            ("seed", "7"),
            ("rows_per_second", "1000000"),
            ("lookback", "1 minute"),
        ]);
        let (whole, ends) = read(&source, 0, &[1000]).await;
        let schema = source.schema();
        let whole = concat_batches(&schema, &whole).unwrap();
        assert_eq!((whole.num_rows(), ends), (1000, 1));
        let (parts, _) = read(&source, 300, &[1, 7, 64]).await;
        assert_eq!(concat_batches(&schema, &parts).unwrap(), whole.slice(300, 700));
        assert_eq!(whole.column(1).as_primitive::<Int64Type>().value(999), 999);
        let times = whole.column(2).as_primitive::<TimestampMicrosecondType>();
        assert_eq!((times.value(0), times.value(999)), (40_000_000, 40_000_999));
        for column in [0, 3] {
            let draws = whole.column(column).as_primitive::<Float64Type>();
            assert!(draws.values().iter().all(|r| (0.0..1.0).contains(r)));
            let mean = draws.values().iter().sum::<f64>() / 1000.0;
            assert!((mean - 0.5).abs() < 0.05, "mean of 1000 uniform draws is {mean}");
        }
        assert_ne!(whole.column(0), whole.column(3));
        let (nothing, ends) = read(&source, 1000, &[10]).await;
        assert_eq!((nothing.len(), nothing[0].num_rows(), ends), (1, 0, 1));
    }

    #[tokio::test]
    async fn the_clock_sets_the_pace() {
        let source = source(&[("rows_per_second", "2000"), ("start", "1970-01-01 00:00:00")]);
        assert_eq!(source.event_time(1), 500);
        let mut reader = source.reader([(PLACE, 50)].into_iter().collect()).await.unwrap();
        let begin = Clock.instant();
        let mut rows = 0;
        while rows < 200 {
            rows += reader.poll(10_000, Duration::from_millis(5)).unwrap().map_or(0, |b| b.rows.num_rows());
        }
        let passed = Clock.instant().duration_since(begin);
        // 200 rows are due after 100 ms, never before.
        assert!(passed >= Duration::from_millis(99), "{passed:?}");
        assert!(reader.lag() < 1000);
    }

    #[test]
    fn wrong_columns_and_options_are_refused() {
        let of =
            |name: &str, data_type: DataType| Arc::new(Schema::new(vec![Field::new(name, data_type, true)]));
        let message = |columns: &SchemaRef, options: &[(&str, &str)]| {
            let error =
                GeneratorConfig::from_options(&mut Options::of("source g", options), columns).unwrap_err();
            format!("{error}")
        };
        assert_eq!(
            message(&of("amount", DataType::Float64), &[]),
            "source g: a generator has no column amount"
        );
        assert_eq!(
            message(&of("seq", DataType::Utf8), &[]),
            "source g: the generator's column seq is no VARCHAR"
        );
        assert_eq!(message(&of("r0", DataType::Float64), &[]), "source g: a generator has no column r0");
        assert_eq!(
            message(&default_columns(), &[("start", "soon")]),
            "source g: start = 'soon' is not a timestamp"
        );
        let empty = Arc::new(Schema::empty());
        let config = GeneratorConfig::from_options(&mut Options::of("source g", &[]), &empty).unwrap();
        assert_eq!(config.columns(), &default_columns());
    }
}
