//! Random records of a source, by its column types, what the SQL compares its columns with, and hints of a fixture.
//!
//! # Meaning
//! - Each column draws from a few values, some far more often than others; NULL and missing where the column may be NULL.
//! - Event time goes forward by steps of the pipeline's own intervals, or not at all (ties); rows stay behind by at most
//!   the lateness, exactly by it, or by more (late).
//! - Some records are no rows: no JSON, a missing or wrong value, a time far in the future, a tombstone.

use std::collections::BTreeMap;

use arrow::datatypes::{DataType, Field, SchemaRef};
use chrono::{DateTime, SecondsFormat};

use super::words::Words;
use super::yaml::quote;
use crate::connectors::records::{Dice, Record};
use crate::plan::SourcePlan;
use crate::stream::Micros;

const SECOND: Micros = 1_000_000;
const DAY: Micros = 86_400 * SECOND;
/// 2026-01-05T00:00:00Z, a Monday.
const MONDAY: Micros = 1_767_571_200 * SECOND;
/// Steps of time in any pipeline.
const STEPS: [Micros; 5] = [1_000, SECOND, 10 * SECOND, 60 * SECOND, 3_600 * SECOND];
/// Most values of a column in one case.
const DOMAIN: usize = 5;

/// Values that a fixture gives, as JSON, by the path of a column or field (`a`, `a.b`).
pub type Hints = BTreeMap<String, Vec<String>>;

/// How the event time stands in a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Seconds,
    Millis,
    Micros,
    Nanos,
    /// A number with a fraction.
    FractionalSeconds,
    Text,
}

/// The field that makes the event time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clock {
    pub path: String,
    pub unit: Unit,
}

pub struct Generator {
    columns: SchemaRef,
    hints: Hints,
    words: Words,
    lateness: Option<Micros>,
    pub clock: Option<Clock>,
}

/// What is drawn once for a case.
struct Style {
    domains: BTreeMap<String, Vec<String>>,
    /// Of 16.
    nulls: BTreeMap<String, u64>,
    steps: Vec<Micros>,
    step: Micros,
    now: Micros,
}

impl Clock {
    /// The fields that may make the event time of a source, and how.
    pub fn candidates(source: &SourcePlan) -> Vec<Self> {
        let mut found = Vec::new();
        for name in source.fields_of_event_time() {
            if let Ok(field) = source.physical.field_with_name(&name) {
                leaves(name, field.data_type(), &mut found);
            }
        }
        found
    }

    fn resolution(&self) -> Micros {
        match self.unit {
            Unit::Seconds => SECOND,
            Unit::Millis => 1_000,
            Unit::Micros | Unit::Nanos | Unit::FractionalSeconds | Unit::Text => 1,
        }
    }

    fn json(&self, time: Micros) -> String {
        match self.unit {
            Unit::Seconds => time.div_euclid(SECOND).to_string(),
            Unit::Millis => time.div_euclid(1_000).to_string(),
            Unit::Micros => time.to_string(),
            Unit::Nanos => time.saturating_mul(1_000).to_string(),
            Unit::FractionalSeconds => {
                let sign = if time < 0 { "-" } else { "" };
                let time = time.unsigned_abs();
                format!("{sign}{}.{:06}", time / 1_000_000, time % 1_000_000)
            }
            Unit::Text => quote(&text_of(time)),
        }
    }
}

fn leaves(path: String, data_type: &DataType, found: &mut Vec<Clock>) {
    let units: &[Unit] = match data_type {
        DataType::Struct(fields) => {
            for field in fields {
                leaves(format!("{path}.{}", field.name()), field.data_type(), found);
            }
            return;
        }
        DataType::Timestamp(..) | DataType::Utf8 => &[Unit::Text],
        DataType::Int32 => &[Unit::Seconds],
        DataType::Int64 => &[Unit::Millis, Unit::Seconds, Unit::Micros, Unit::Nanos],
        DataType::Float64 | DataType::Decimal128(..) => {
            &[Unit::FractionalSeconds, Unit::Millis, Unit::Micros]
        }
        _ => return,
    };
    found.extend(units.iter().map(|unit| Clock { path: path.clone(), unit: *unit }));
}

fn text_of(time: Micros) -> String {
    let time = DateTime::from_timestamp_micros(time).unwrap_or_default();
    time.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

impl Generator {
    pub fn new(source: &SourcePlan, words: Words, hints: Hints) -> Self {
        let lateness = source.event_time.map(|_| source.lateness);
        Self { columns: source.physical.clone(), hints, words, lateness, clock: None }
    }

    /// A record whose event time is `time` if `clock` makes it, and that has no other fault.
    pub fn probe(&mut self, clock: &Clock, time: Micros, dice: &mut Dice) -> Record {
        self.clock = Some(clock.clone());
        let style = self.style(dice);
        let payload = self.row(&style, Some(time), dice);
        self.clock = None;
        Record { payload: Some(payload.into_bytes()), ..Record::default() }
    }

    /// Up to `most` records.
    pub fn records(&self, most: usize, dice: &mut Dice) -> Vec<Record> {
        let mut style = self.style(dice);
        let count = if dice.roll(3) == 0 { dice.index(most + 1) } else { most };
        (0..count).map(|_| self.record(&mut style, dice)).collect()
    }

    fn style(&self, dice: &mut Dice) -> Style {
        let mut steps = STEPS.to_vec();
        steps.extend(self.lateness.filter(|lateness| *lateness > 0));
        for interval in &self.words.intervals {
            steps.extend([*interval, interval / 2, interval / 6]);
        }
        steps.retain(|step| *step > 0);
        let step = steps[dice.index(steps.len())];
        let now = match dice.roll(8) {
            0 => 0,
            1 => -2 * DAY,
            2 => MONDAY + dice.roll(400 * DAY as u64) as Micros,
            _ => MONDAY,
        };
        Style { domains: BTreeMap::new(), nulls: BTreeMap::new(), steps, step, now }.filled(self, dice)
    }

    fn record(&self, style: &mut Style, dice: &mut Dice) -> Record {
        let time = self.clock.as_ref().map(|clock| self.time(clock, style, dice));
        let key = (dice.roll(4) == 0).then(|| format!("k{}", dice.roll(3)).into_bytes());
        let mut record = Record { key, ..Record::default() };
        match dice.roll(40) {
            0 => return record,
            1 => record.payload = Some(garbage(dice).as_bytes().to_vec()),
            2 => record.payload = Some(self.faulty(style, time, dice).into_bytes()),
            _ => record.payload = Some(self.row(style, time, dice).into_bytes()),
        }
        if dice.roll(60) == 0 {
            // The row's event time is then too far in the future.
            record.timestamp = time.map(|time| (time - 3 * DAY).div_euclid(1_000));
        }
        record
    }

    /// The event time of the next row.
    fn time(&self, clock: &Clock, style: &mut Style, dice: &mut Dice) -> Micros {
        let step = if dice.roll(10) == 0 { style.steps[dice.index(style.steps.len())] } else { style.step };
        let lateness = self.lateness.unwrap_or(0);
        let by = match dice.roll(8) {
            0..=2 => 0,
            3 | 4 => step,
            5 => 2 * step,
            6 => dice.roll(step.unsigned_abs()) as Micros,
            // To the next boundary of a window: there, right before it, or so that the watermark is.
            _ => {
                let edge = [0, lateness, -clock.resolution(), lateness - clock.resolution()][dice.index(4)];
                (style.now.div_euclid(step) + 1) * step - style.now + edge
            }
        };
        style.now = style.now.saturating_add(by);
        let back = match dice.roll(12) {
            0..=5 => 0,
            6 | 7 => lateness,
            8..=10 => dice.roll(lateness.unsigned_abs() + 1) as Micros,
            _ => lateness + clock.resolution() + dice.roll(3) as Micros * step,
        };
        let resolution = clock.resolution();
        (style.now - back).div_euclid(resolution) * resolution
    }

    fn row(&self, style: &Style, time: Option<Micros>, dice: &mut Dice) -> String {
        self.object(None, self.columns.fields().iter().map(AsRef::as_ref), style, time, dice)
    }

    fn object<'f>(
        &self,
        parent: Option<&str>,
        fields: impl Iterator<Item = &'f Field>,
        style: &Style,
        time: Option<Micros>,
        dice: &mut Dice,
    ) -> String {
        let mut members = Vec::new();
        for field in fields {
            let path = join(parent, field.name());
            let json = self.value(&path, field, style, time, dice);
            // NULL may be left out.
            if json != "null" || dice.roll(2) == 0 {
                members.push(format!("{}:{json}", quote(field.name())));
            }
        }
        format!("{{{}}}", members.join(","))
    }

    fn value(
        &self,
        path: &str,
        field: &Field,
        style: &Style,
        time: Option<Micros>,
        dice: &mut Dice,
    ) -> String {
        if let (Some(clock), Some(time)) = (&self.clock, time)
            && clock.path == path
        {
            return clock.json(time);
        }
        let holds_clock =
            self.clock.as_ref().is_some_and(|clock| clock.path.starts_with(&format!("{path}.")));
        let nulls = style.nulls.get(path).copied().unwrap_or(0);
        if field.is_nullable() && !holds_clock && dice.roll(16) < nulls {
            return "null".to_owned();
        }
        match field.data_type() {
            DataType::Struct(fields) if !self.hints.contains_key(path) => {
                self.object(Some(path), fields.iter().map(AsRef::as_ref), style, time, dice)
            }
            DataType::List(_) => {
                let element = |dice: &mut Dice| match dice.roll(8) {
                    0 => "null".to_owned(),
                    _ => style.draw(path, dice),
                };
                let elements: Vec<String> = (0..dice.roll(4)).map(|_| element(dice)).collect();
                format!("[{}]", elements.join(","))
            }
            _ => style.draw(path, dice),
        }
    }

    /// A row with a column that is missing or of another type.
    fn faulty(&self, style: &Style, time: Option<Micros>, dice: &mut Dice) -> String {
        let wrong = dice.index(self.columns.fields().len());
        let with = ["{\"no\":1}", "\"?\"", "null", "[[1]]"][dice.index(4)];
        let member = |(at, field): (usize, &std::sync::Arc<Field>)| {
            let json = if at == wrong {
                with.to_owned()
            } else {
                self.value(field.name(), field, style, time, dice)
            };
            format!("{}:{json}", quote(field.name()))
        };
        let members: Vec<String> = self.columns.fields().iter().enumerate().map(member).collect();
        format!("{{{}}}", members.join(","))
    }

    /// A few values of each column.
    fn domain(&self, path: &str, data_type: &DataType, dice: &mut Dice) -> Vec<String> {
        let all = match self.hints.get(path) {
            Some(hints) => hints.clone(),
            None => self.all_values(path, data_type),
        };
        let size = 1 + dice.index(DOMAIN);
        (0..size).filter_map(|_| all.get(dice.index(all.len())).cloned()).collect()
    }

    fn all_values(&self, path: &str, data_type: &DataType) -> Vec<String> {
        let name = path.rsplit('.').next().unwrap_or(path);
        let numbers = |numbers: &[i64]| numbers.iter().map(ToString::to_string).collect::<Vec<_>>();
        match data_type {
            DataType::Boolean => vec!["true".to_owned(), "false".to_owned()],
            DataType::Int8 | DataType::Int16 | DataType::Int32 => {
                numbers(&[0, 1, 2, 3, 4, 5, 7, 100, -1, -3])
            }
            // The last ones have no exact float.
            DataType::Int64 => numbers(&[0, 1, 2, 3, 4, 5, 7, 11, 20, -1, -3, 9_007_199_254_740_993]),
            DataType::Float32 | DataType::Float64 => {
                let floats =
                    ["0", "-0.0", "0.1", "0.2", "0.3", "1", "1.5", "2.25", "-0.7", "-4", "33.3", "1e3"];
                floats.iter().map(|float| (*float).to_owned()).collect()
            }
            DataType::Decimal128(_, scale) => {
                let fraction = ["", ".1", ".05"][usize::try_from(*scale).unwrap_or(0).min(2)];
                [0, 1, 4, -7].iter().map(|n| format!("{n}{fraction}")).collect()
            }
            DataType::Utf8 => {
                let words = self.words.texts(name);
                let lower = words.iter().map(|word| word.to_lowercase()).filter(|word| !words.contains(word));
                let lower: Vec<String> = lower.take(2).collect();
                let some = ["a", "b", "c", "", "ä b"].iter().map(|word| (*word).to_owned());
                let mut all: Vec<String> = words;
                // Few strangers among many words, as a check may ask for one of them.
                let strangers = if all.len() > 4 { 1 } else { 5 };
                all.extend(lower);
                all.extend(some.take(strangers));
                all.iter().map(|word| quote(word)).collect()
            }
            DataType::Timestamp(..) => {
                [0, 1, SECOND, DAY].iter().map(|by| quote(&text_of(MONDAY + by))).collect()
            }
            DataType::Date32 => vec![quote("2026-01-05"), quote("2024-02-29"), quote("1969-12-31")],
            DataType::Binary => vec![quote("YQ=="), quote("")],
            _ => vec!["null".to_owned()],
        }
    }
}

/// The path of a field.
pub fn join(parent: Option<&str>, name: &str) -> String {
    match parent {
        Some(parent) => format!("{parent}.{name}"),
        None => name.to_owned(),
    }
}

fn garbage(dice: &mut Dice) -> &'static str {
    ["this is no JSON", "{", "[]", "1", "{}", "null", "{\"a\":"][dice.index(7)]
}

impl Style {
    fn filled(mut self, generator: &Generator, dice: &mut Dice) -> Self {
        for field in generator.columns.fields() {
            self.fill(field.name().clone(), field.data_type(), generator, dice);
        }
        self
    }

    fn fill(&mut self, path: String, data_type: &DataType, generator: &Generator, dice: &mut Dice) {
        let element = match data_type {
            DataType::List(item) => item.data_type(),
            other => other,
        };
        if let DataType::Struct(fields) = element {
            for field in fields {
                self.fill(format!("{path}.{}", field.name()), field.data_type(), generator, dice);
            }
        }
        self.nulls.insert(path.clone(), [0, 0, 2, 6][dice.index(4)]);
        let domain = generator.domain(&path, element, dice);
        self.domains.insert(path, domain);
    }

    /// The first values come most often.
    fn draw(&self, path: &str, dice: &mut Dice) -> String {
        let Some(domain) = self.domains.get(path) else { return "null".to_owned() };
        let at = dice.index(domain.len()).min(dice.index(domain.len()));
        domain.get(at).cloned().unwrap_or_else(|| "null".to_owned())
    }
}
