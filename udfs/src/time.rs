//! Calendar parts of a point in time: `day_of_year`, `day_of_week`, `hour_of_day`.
//!
//! `f(x [, time_zone])` is an `INT` (`Int32`). NULL in any argument gives NULL.
//!
//! | function | range | convention |
//! |---|---|---|
//! | `day_of_year` | 1 to 366 | 1 January = 1; 366 only on 31 December of a leap year |
//! | `day_of_week` | 1 to 7 | ISO 8601: Monday = 1, Sunday = 7, as Java's `getDayOfWeek`; Spark's `dayofweek` has Sunday = 1, Postgres' `dow` Sunday = 0 |
//! | `hour_of_day` | 0 to 23 | of the wall clock, so a day of clock change skips an hour or has one twice |
//!
//! What `x` may be:
//! - **`TIMESTAMP` of any unit**: an instant. Without a zone it is UTC. The zone label of a zoned timestamp says how
//!   to *display* the instant and does not change the answer: the answer is in UTC unless `time_zone` is given.
//! - **`DATE`** (`Date32`, `Date64`): a calendar day, which has no zone. `time_zone` is checked but does not move
//!   the day, and the hour is 0.
//! - **an integer** (`BIGINT`, `INT`, …): milliseconds since 1970-01-01 00:00 UTC, negative before.
//!
//! `time_zone` is an IANA name (`'Europe/Berlin'`, case matters) or a fixed offset (`'+02:00'`, `'-0930'`, `'+02'`),
//! a literal or a column. An unknown zone is an error: at planning for a literal, else at execution.
//!
//! The calendar is the proleptic Gregorian one. In UTC and at fixed offsets every value of every type has an
//! answer, in integer arithmetic that cannot overflow. A named zone knows about 260,000 years on each side of 1970;
//! beyond, the answer is the error "timestamp out of range".

use std::sync::Arc;

use arrow::array::temporal_conversions::as_datetime_with_timezone;
use arrow::array::timezone::Tz;
use arrow::array::{Array, ArrayRef, Int32Array, PrimitiveArray, StringViewArray};
use arrow::compute::{CastOptions, cast, cast_with_options};
use arrow::datatypes::{
    ArrowPrimitiveType, DataType, Date32Type, Date64Type, Field, FieldRef, Int64Type, TimeUnit,
    TimestampMicrosecondType, TimestampMillisecondType, TimestampNanosecondType, TimestampSecondType,
};
use datafusion::common::cast::{as_primitive_array, as_string_view_array};
use datafusion::common::{exec_datafusion_err, internal_err, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::scalar_doc_sections::DOC_SECTION_DATETIME;
use datafusion::logical_expr::{
    ColumnarValue, Documentation, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature,
    Volatility,
};
use datafusion::scalar::ScalarValue;

const DAY_SECONDS: i64 = 86_400;

/// Largest distance from 1970 at which a named zone is asked for its offset, in seconds (about 260,000 years): a day
/// and more inside the range of chrono, so that adding the offset cannot leave that range.
const NAMED_ZONE_SECONDS: u64 = 8_200_000_000_000;

/// The functions of this module.
#[must_use]
pub fn all() -> Vec<Arc<ScalarUDF>> {
    [Part::DayOfYear, Part::DayOfWeek, Part::HourOfDay]
        .map(|part| Arc::new(ScalarUDF::new_from_impl(CalendarPart::new(part))))
        .into()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Part {
    DayOfYear,
    DayOfWeek,
    HourOfDay,
}

impl Part {
    const fn name(self) -> &'static str {
        match self {
            Self::DayOfYear => "day_of_year",
            Self::DayOfWeek => "day_of_week",
            Self::HourOfDay => "hour_of_day",
        }
    }

    /// The part of each value; chosen here, once per batch, so that the loops below contain no branch on it.
    fn of(self, values: &dyn Array, zones: &Zones) -> Result<Int32Array> {
        match self {
            Self::DayOfYear => map_wall_clock(values, zones, WallClock::day_of_year),
            Self::DayOfWeek => map_wall_clock(values, zones, WallClock::day_of_week),
            Self::HourOfDay => map_wall_clock(values, zones, WallClock::hour_of_day),
        }
    }

    fn documentation(self) -> Documentation {
        let name = self.name();
        let (description, answer) = match self {
            Self::DayOfYear => ("Returns the day of the year, 1 to 366.", 102),
            Self::DayOfWeek => (
                "Returns the ISO day of the week: Monday = 1 to Sunday = 7 (as Java's `getDayOfWeek`; Spark's \
                 `dayofweek` has Sunday = 1, Postgres' `dow` Sunday = 0).",
                4,
            ),
            Self::HourOfDay => ("Returns the hour of the wall clock, 0 to 23; 0 for a date.", 16),
        };
        let related = [Self::DayOfYear, Self::DayOfWeek, Self::HourOfDay].into_iter().filter(|p| *p != self);
        let builder = Documentation::builder(
            DOC_SECTION_DATETIME,
            format!("{description} The answer is in UTC unless `time_zone` is given."),
            format!("{name}(x [, time_zone])"),
        )
        .with_argument(
            "x",
            "A timestamp, a date, or an integer number of milliseconds since 1970-01-01 00:00 UTC. The zone of a \
             zoned timestamp does not change the answer.",
        )
        .with_argument(
            "time_zone",
            "An IANA name such as 'Europe/Berlin' or a fixed offset such as '+02:00'. Does not move a date.",
        )
        .with_sql_example(format!(
            "```sql\n> SELECT {name}(TIMESTAMP '2024-04-11 14:10:05', 'Europe/Berlin') AS part;\n\
             +------+\n| part |\n+------+\n| {answer:<4} |\n+------+\n```"
        ));
        related.fold(builder, |builder, part| builder.with_related_udf(part.name())).build()
    }
}

/// One of the three functions: checks the types, reads the zone once per batch, hands over to [`Part::of`].
#[derive(Debug, PartialEq, Eq, Hash)]
struct CalendarPart {
    part: Part,
    signature: Signature,
    documentation: Documentation,
}

impl CalendarPart {
    fn new(part: Part) -> Self {
        // Types are checked in `return_field_from_args`, with messages of our own: the other signatures report a
        // wrong type as "internal error" or "user-defined coercion failed".
        let signature = Signature::variadic_any(Volatility::Immutable);
        Self { part, signature, documentation: part.documentation() }
    }

    fn check_value(&self, data_type: &DataType) -> Result<()> {
        let name = self.part.name();
        match (read_as(data_type), data_type) {
            (Some(_), _) => Ok(()),
            (None, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) => plan_err!(
                "{name} does not read {data_type}: convert the text first, for example {name}(CAST(x AS TIMESTAMP))"
            ),
            (None, DataType::Float16 | DataType::Float32 | DataType::Float64) => plan_err!(
                "{name} does not read {data_type}: give epoch milliseconds as an integer, for example \
                 {name}(CAST(seconds * 1000 AS BIGINT))"
            ),
            (None, _) => {
                plan_err!(
                    "{name} does not read {data_type}: x is a timestamp, a date, or integer epoch milliseconds"
                )
            }
        }
    }

    /// Checks the type of the zone, and its value if it is a literal, so that a typing error is found at planning.
    fn check_zone(&self, data_type: &DataType, literal: Option<&ScalarValue>) -> Result<()> {
        let name = self.part.name();
        if !is_text(data_type) {
            return plan_err!("{name} takes its time zone as text such as 'Europe/Berlin', not {data_type}");
        }
        match literal.and_then(ScalarValue::try_as_str).flatten() {
            Some(zone) if Zone::parse(zone).is_none() => plan_err!("{name}: {}", unknown_zone(zone)),
            _ => Ok(()),
        }
    }
}

impl ScalarUDFImpl for CalendarPart {
    fn name(&self) -> &str {
        self.part.name()
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _arg_types: &[DataType]) -> Result<DataType> {
        Ok(DataType::Int32)
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> Result<FieldRef> {
        let name = self.part.name();
        match args.arg_fields {
            [value] => self.check_value(value.data_type())?,
            [value, zone] => {
                self.check_value(value.data_type())?;
                self.check_zone(zone.data_type(), args.scalar_arguments.get(1).copied().flatten())?;
            }
            fields => {
                return plan_err!("{name}(x [, time_zone]) takes 1 or 2 arguments, not {}", fields.len());
            }
        }
        let nullable = args.arg_fields.iter().any(|field| field.is_nullable());
        Ok(Arc::new(Field::new(name, DataType::Int32, nullable)))
    }

    fn is_strict(&self) -> bool {
        true
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let all_scalar = args.args.iter().all(|arg| matches!(arg, ColumnarValue::Scalar(_)));
        let rows = if all_scalar { 1 } else { args.number_rows };
        let mut args = args.args.into_iter();
        let (Some(value), zone, None) = (args.next(), args.next(), args.next()) else {
            return internal_err!("{} was planned with a wrong number of arguments", self.part.name());
        };
        let Some(zones) = Zones::read(zone)? else {
            return Ok(ColumnarValue::Scalar(ScalarValue::Int32(None)));
        };
        let values = normalise(value.into_array(rows)?)?;
        let parts = self.part.of(&values, &zones)?;
        Ok(if all_scalar {
            ColumnarValue::Scalar(ScalarValue::try_from_array(&parts, 0)?)
        } else {
            ColumnarValue::Array(Arc::new(parts))
        })
    }

    fn documentation(&self) -> Option<&Documentation> {
        Some(&self.documentation)
    }
}

/// The type that `x` is converted to before it is read: one that [`map_wall_clock`] knows. `None`: not a time.
fn read_as(data_type: &DataType) -> Option<DataType> {
    match data_type {
        DataType::Timestamp(..) | DataType::Date32 | DataType::Date64 => Some(data_type.clone()),
        DataType::Null => Some(DataType::Int64),
        DataType::Dictionary(_, value) => read_as(value),
        integer => integer.is_integer().then_some(DataType::Int64),
    }
}

fn is_text(data_type: &DataType) -> bool {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Null => true,
        DataType::Dictionary(_, value) => is_text(value),
        _ => false,
    }
}

/// Converts to the type of [`read_as`]; timestamps, dates and `BIGINT` pass through untouched.
fn normalise(values: ArrayRef) -> Result<ArrayRef> {
    match read_as(values.data_type()) {
        Some(target) if target != *values.data_type() => {
            let strict = CastOptions { safe: false, ..CastOptions::default() };
            Ok(cast_with_options(&values, &target, &strict)?)
        }
        _ => Ok(values),
    }
}

/// The zones of a batch.
enum Zones {
    /// A literal or no argument: read once.
    One(Zone),
    /// One name per row.
    PerRow(StringViewArray),
}

impl Zones {
    /// `None` if the zone is a NULL literal: then every answer is NULL.
    fn read(argument: Option<ColumnarValue>) -> Result<Option<Self>> {
        match argument {
            None => Ok(Some(Self::One(Zone::Utc))),
            Some(ColumnarValue::Scalar(scalar)) => match scalar.try_as_str().flatten() {
                Some(name) => Zone::find(name).map(|zone| Some(Self::One(zone))),
                None if scalar.is_null() => Ok(None),
                None => internal_err!("a time zone of type {} was planned", scalar.data_type()),
            },
            Some(ColumnarValue::Array(names)) => {
                let names = cast(&names, &DataType::Utf8View)?;
                Ok(Some(Self::PerRow(as_string_view_array(&names)?.clone())))
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Zone {
    Utc,
    /// Seconds east of UTC, less than a day.
    Offset(i64),
    Named(Tz),
}

impl Zone {
    /// As [`Zone::parse`].
    ///
    /// # Errors
    /// An execution error that names the zone and says what zones look like.
    fn find(name: &str) -> Result<Self> {
        Self::parse(name).ok_or_else(|| exec_datafusion_err!("{}", unknown_zone(name)))
    }

    /// Reads an IANA name or a fixed offset; `None` if it is neither.
    fn parse(name: &str) -> Option<Self> {
        let tz: Tz = name.parse().ok()?;
        if matches!(name, "UTC" | "Etc/UTC" | "GMT") {
            return Some(Self::Utc);
        }
        if name.starts_with(['+', '-']) {
            return local_seconds(tz, 0).map(Self::Offset);
        }
        Some(Self::Named(tz))
    }

    /// The wall clock of this zone at `value` / `PER_SECOND` seconds after 1970-01-01 00:00 UTC.
    ///
    /// # Errors
    /// "timestamp out of range", in a named zone only.
    fn wall_clock<const PER_SECOND: i64>(self, value: i64) -> Result<WallClock> {
        match self {
            Self::Utc => Ok(WallClock::utc::<PER_SECOND>(value)),
            Self::Offset(seconds) => Ok(WallClock::utc::<PER_SECOND>(value).plus(seconds)),
            Self::Named(tz) => {
                let seconds = value.div_euclid(PER_SECOND);
                let local = local_seconds(tz, seconds).ok_or_else(|| {
                    exec_datafusion_err!(
                        "timestamp out of range: {seconds} seconds from 1970 are beyond the calendar of time zone \
                         {tz}; filter such rows out, or ask for UTC"
                    )
                })?;
                Ok(WallClock::utc::<1>(local))
            }
        }
    }
}

fn unknown_zone(name: &str) -> String {
    format!(
        "unknown time zone '{name}'; use an IANA name such as 'Europe/Berlin' (case matters) or a fixed offset \
         such as '+02:00'"
    )
}

/// What a clock in `tz` shows at `utc` seconds, as if what it shows were UTC; `None` if out of range.
fn local_seconds(tz: Tz, utc: i64) -> Option<i64> {
    if utc.unsigned_abs() > NAMED_ZONE_SECONDS {
        return None;
    }
    let instant = as_datetime_with_timezone::<TimestampSecondType>(utc, tz)?;
    Some(instant.naive_local().and_utc().timestamp())
}

/// What calendar and clock on a wall show.
#[derive(Clone, Copy)]
struct WallClock {
    /// Days since 1970-01-01; any value that seconds in an `i64` can reach.
    day: i64,
    /// Second of that day, 0 to 86,399.
    second: i64,
}

impl WallClock {
    /// Rounds toward the past, also before 1970. Total: the divisors are positive constants.
    fn utc<const PER_SECOND: i64>(value: i64) -> Self {
        let per_day = DAY_SECONDS * PER_SECOND;
        Self { day: value.div_euclid(per_day), second: value.rem_euclid(per_day) / PER_SECOND }
    }

    const fn midnight(day: i64) -> Self {
        Self { day, second: 0 }
    }

    /// `seconds` is less than a day, so the day moves by one at most and cannot overflow.
    fn plus(self, seconds: i64) -> Self {
        let moved = Self::utc::<1>(self.second + seconds);
        Self { day: self.day + moved.day, second: moved.second }
    }

    /// The first half of `civil_from_days` in Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms"
    /// (<https://howardhinnant.github.io/date_algorithms.html>): in eras of 400 years whose years begin on 1 March,
    /// the leap day is the last of its year.
    fn day_of_year(self) -> i32 {
        const DAYS_FROM_0000_03_01_TO_1970: i64 = 719_468;
        const ERA_DAYS: i64 = 146_097;
        const MARCH_TO_DECEMBER_DAYS: i32 = 306;

        let day_of_era = narrow((self.day + DAYS_FROM_0000_03_01_TO_1970).rem_euclid(ERA_DAYS));
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        if day_from_march >= MARCH_TO_DECEMBER_DAYS {
            return day_from_march - MARCH_TO_DECEMBER_DAYS + 1;
        }
        let leap = year_of_era % 4 == 0 && (year_of_era % 100 != 0 || year_of_era == 0);
        day_from_march + 31 + 28 + i32::from(leap) + 1
    }

    /// 1970-01-01, day 0, was a Thursday.
    fn day_of_week(self) -> i32 {
        narrow((self.day + 3).rem_euclid(7)) + 1
    }

    fn hour_of_day(self) -> i32 {
        narrow(self.second / 3_600)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the callers pass remainders of constants below i32::MAX"
)]
const fn narrow(remainder: i64) -> i32 {
    remainder as i32
}

/// Applies `part` to the wall clock of every value, in that value's zone.
fn map_wall_clock(
    values: &dyn Array,
    zones: &Zones,
    part: impl Fn(WallClock) -> i32 + Copy,
) -> Result<Int32Array> {
    match values.data_type() {
        DataType::Int64 => map_instants::<Int64Type, 1_000>(values, zones, part),
        DataType::Timestamp(unit, _) => match unit {
            TimeUnit::Second => map_instants::<TimestampSecondType, 1>(values, zones, part),
            TimeUnit::Millisecond => map_instants::<TimestampMillisecondType, 1_000>(values, zones, part),
            TimeUnit::Microsecond => map_instants::<TimestampMicrosecondType, 1_000_000>(values, zones, part),
            TimeUnit::Nanosecond => {
                map_instants::<TimestampNanosecondType, 1_000_000_000>(values, zones, part)
            }
        },
        DataType::Date32 => {
            map_days::<Date32Type>(values, zones, |day| part(WallClock::midnight(i64::from(day))))
        }
        DataType::Date64 => map_days::<Date64Type>(values, zones, |millis| {
            part(WallClock::midnight(WallClock::utc::<1_000>(millis).day))
        }),
        other => internal_err!("a value of type {other} was planned where a time is expected"),
    }
}

/// Instants counted in units of 1 / `PER_SECOND` seconds.
fn map_instants<T: ArrowPrimitiveType<Native = i64>, const PER_SECOND: i64>(
    values: &dyn Array,
    zones: &Zones,
    part: impl Fn(WallClock) -> i32 + Copy,
) -> Result<Int32Array> {
    let values = as_primitive_array::<T>(values)?;
    match zones {
        Zones::One(Zone::Utc) => Ok(values.unary(|value| part(WallClock::utc::<PER_SECOND>(value)))),
        Zones::One(Zone::Offset(seconds)) => {
            Ok(values.unary(|value| part(WallClock::utc::<PER_SECOND>(value).plus(*seconds))))
        }
        Zones::One(zone) => values.try_unary(|value| zone.wall_clock::<PER_SECOND>(value).map(part)),
        Zones::PerRow(names) => {
            map_rows(values, names, |value, zone| zone.wall_clock::<PER_SECOND>(value).map(part))
        }
    }
}

/// Calendar days: no zone moves them.
fn map_days<T: ArrowPrimitiveType>(
    values: &dyn Array,
    zones: &Zones,
    part: impl Fn(T::Native) -> i32,
) -> Result<Int32Array> {
    let values = as_primitive_array::<T>(values)?;
    match zones {
        Zones::One(_) => Ok(values.unary(part)),
        Zones::PerRow(names) => map_rows(values, names, |value, _| Ok(part(value))),
    }
}

/// One zone per row; a run of equal names is read once.
fn map_rows<T: ArrowPrimitiveType>(
    values: &PrimitiveArray<T>,
    names: &StringViewArray,
    part: impl Fn(T::Native, Zone) -> Result<i32>,
) -> Result<Int32Array> {
    let mut last = ("UTC", Zone::Utc);
    let rows = values.iter().zip(names.iter());
    rows.map(|row| {
        let (Some(value), Some(name)) = row else { return Ok(None) };
        if last.0 != name {
            last = (name, Zone::find(name)?);
        }
        part(value, last.1).map(Some)
    })
    .collect()
}

#[cfg(test)]
mod tests;
