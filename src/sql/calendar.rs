//! When a schedule fires, and which interval of time a fire stands for.
//!
//! **Fires** are those moments at which the wall clock of the schedule's time zone first passes a minute that its cron
//! expression names. So where the clock jumps forward, a time of day that does not exist fires once, at the jump (several
//! of them together once); where it goes back, a time of day that comes twice fires once, the first time. Schedules whose
//! hour is `*` mean each hour that passes: they fire in both hours of the same name, and know nothing of a missing one.
//!
//! **Intervals** end at the fire, truncated to a unit. That of `FOR LAST interval` is the largest of day, hour, minute and
//! second of which the interval is a multiple; days are those of the time zone, of 23 or 25 hours when the clock changes. That
//! of an INSERT is the minute when the cron expression names several minutes, the hour when it names several hours, else the
//! day; its interval begins where that of the fire before ended, so intervals have no gaps.

use std::collections::BTreeSet;

use chrono::{
    DateTime, Days, Duration, LocalResult, NaiveDate, NaiveDateTime, NaiveTime, TimeZone, Timelike,
};
use chrono_tz::Tz;

use crate::sql::cron::Cron;
use crate::stream::Micros;

const SECOND: Micros = 1_000_000;
const MINUTE: Micros = 60 * SECOND;
const HOUR: Micros = 60 * MINUTE;
const DAY: Micros = 24 * HOUR;
/// More than the local dates of one moment, and a jump, can lie apart.
const MARGIN_DAYS: u64 = 2;
/// 29 February may be 8 years away.
const HORIZON_DAYS: u64 = 9 * 366;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calendar {
    pub cron: Cron,
    pub zone: Tz,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Second,
    Minute,
    Hour,
    Day,
}

/// Times from (included) to (excluded).
pub type Span = (Micros, Micros);

impl Calendar {
    /// Fires after a moment, in order.
    pub fn fires_after(&self, after: Micros) -> Fires<'_> {
        let first = local(self.zone, after).map(|at| at.date());
        let first = first.and_then(|date| date.checked_sub_days(Days::new(MARGIN_DAYS)));
        Fires { calendar: self, after, next_date: first, found: BTreeSet::new() }
    }

    /// The fire before one.
    pub fn fire_before(&self, fire: Micros) -> Option<Micros> {
        let last = |days: i64| self.fires_after(fire - days * DAY).take_while(|at| *at < fire).last();
        [1, 40, 400, HORIZON_DAYS as i64].into_iter().find_map(last)
    }

    /// What the interval of a scheduled backfill is truncated to.
    pub fn unit_of(&self, length: Micros) -> Unit {
        match length {
            length if length % DAY == 0 => Unit::Day,
            length if length % HOUR == 0 => Unit::Hour,
            length if length % MINUTE == 0 => Unit::Minute,
            _ => Unit::Second,
        }
    }

    /// The interval of a scheduled backfill of the last `length` µs.
    pub fn last(&self, fire: Micros, length: Micros) -> Option<Span> {
        let unit = self.unit_of(length);
        let to = self.truncate(fire, unit)?;
        let from = match unit {
            Unit::Day => {
                let days = u64::try_from(length / DAY).ok()?;
                self.midnight(local(self.zone, fire)?.date().checked_sub_days(Days::new(days))?)?
            }
            _ => to.checked_sub(length)?,
        };
        Some((from, to))
    }

    /// The interval of a scheduled INSERT.
    pub fn since_last(&self, fire: Micros) -> Option<Span> {
        let unit = if self.cron.minutes().nth(1).is_some() {
            Unit::Minute
        } else if self.cron.hours().nth(1).is_some() {
            Unit::Hour
        } else {
            Unit::Day
        };
        Some((self.truncate(self.fire_before(fire)?, unit)?, self.truncate(fire, unit)?))
    }

    pub fn truncate(&self, at: Micros, unit: Unit) -> Option<Micros> {
        let wall = local(self.zone, at)?;
        let below_second = at.rem_euclid(SECOND);
        Some(match unit {
            Unit::Day => self.midnight(wall.date())?,
            Unit::Hour => {
                at - Micros::from(wall.minute()) * MINUTE
                    - Micros::from(wall.second()) * SECOND
                    - below_second
            }
            Unit::Minute => at - Micros::from(wall.second()) * SECOND - below_second,
            Unit::Second => at - below_second,
        })
    }

    fn midnight(&self, date: NaiveDate) -> Option<Micros> {
        self.first(date.and_time(NaiveTime::MIN))
    }

    /// When the wall clock first shows or passes a time.
    fn first(&self, wall: NaiveDateTime) -> Option<Micros> {
        // No jump of a clock was ever longer.
        let longest = 26 * 60;
        let passed = (0..longest).find_map(|minutes| {
            let wall = wall.checked_add_signed(Duration::minutes(minutes))?;
            self.zone.from_local_datetime(&wall).earliest()
        });
        passed.map(|at| at.timestamp_micros())
    }

    fn fires_of(&self, date: NaiveDate, found: &mut BTreeSet<Micros>) {
        if !self.cron.fits_day(date) {
            return;
        }
        for hour in self.cron.hours() {
            for wall in self.cron.minutes().filter_map(|minute| date.and_hms_opt(hour, minute, 0)) {
                if !self.cron.every_hour() {
                    found.extend(self.first(wall));
                    continue;
                }
                match self.zone.from_local_datetime(&wall) {
                    LocalResult::Single(at) => found.extend([at.timestamp_micros()]),
                    LocalResult::Ambiguous(a, b) => {
                        found.extend([a.timestamp_micros(), b.timestamp_micros()])
                    }
                    LocalResult::None => {}
                }
            }
        }
    }
}

fn local(zone: Tz, at: Micros) -> Option<NaiveDateTime> {
    Some(DateTime::from_timestamp_micros(at)?.with_timezone(&zone).naive_local())
}

pub struct Fires<'a> {
    calendar: &'a Calendar,
    after: Micros,
    /// The next local date that was not looked at.
    next_date: Option<NaiveDate>,
    found: BTreeSet<Micros>,
}

impl Iterator for Fires<'_> {
    type Item = Micros;

    fn next(&mut self) -> Option<Micros> {
        for _ in 0..HORIZON_DAYS {
            let first = self.found.first().copied();
            // Fires of later dates may come before it until the margin is looked at too.
            let settled = first.and_then(|first| local(self.calendar.zone, first)).is_some_and(|wall| {
                let until = wall.date().checked_add_days(Days::new(MARGIN_DAYS));
                self.next_date.is_none_or(|date| Some(date) > until)
            });
            if settled {
                self.after = self.found.pop_first()?;
                return Some(self.after);
            }
            let Some(date) = self.next_date else { return self.found.pop_first() };
            self.calendar.fires_of(date, &mut self.found);
            self.found = self.found.split_off(&(self.after + 1));
            self.next_date = date.succ_opt();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::dice::Dice;

    fn calendar(cron: &str, zone: &str) -> Calendar {
        Calendar { cron: Cron::parse(cron).unwrap(), zone: zone.parse().unwrap() }
    }

    fn at(text: &str) -> Micros {
        DateTime::parse_from_rfc3339(text).unwrap().timestamp_micros()
    }

    fn text(at: Micros) -> String {
        DateTime::from_timestamp_micros(at).unwrap().format("%Y-%m-%dT%H:%MZ").to_string()
    }

    fn fires(cron: &str, zone: &str, after: &str, count: usize) -> Vec<String> {
        calendar(cron, zone).fires_after(at(after)).take(count).map(text).collect()
    }

    /// The definition, minute by minute, from UTC to the wall clock only.
    fn walked(calendar: &Calendar, from: Micros, to: Micros) -> Vec<Micros> {
        let fits = |wall: NaiveDateTime| {
            calendar.cron.fits_day(wall.date())
                && calendar.cron.hours().any(|hour| hour == wall.hour())
                && calendar.cron.minutes().any(|minute| minute == wall.minute())
        };
        let start = (from - 3 * DAY).div_euclid(MINUTE) * MINUTE;
        let mut passed = local(calendar.zone, start).unwrap();
        let mut found = Vec::new();
        for moment in (1..).map(|n| start + n * MINUTE).take_while(|moment| *moment < to) {
            let wall = local(calendar.zone, moment).unwrap();
            let mut fires = calendar.cron.every_hour() && fits(wall);
            while passed < wall {
                passed += Duration::minutes(1);
                fires |= !calendar.cron.every_hour() && fits(passed);
            }
            if fires && moment > from {
                found.push(moment);
            }
        }
        found
    }

    #[test]
    fn fires_are_those_of_the_walk_through_every_minute() {
        // Jumps by an hour, half an hour, at midnight, at one minute past, by a whole day; none.
        let zones = [
            ("Europe/Berlin", "2026-03-29T01:00:00Z", "2026-10-25T01:00:00Z"),
            ("America/New_York", "2026-03-08T07:00:00Z", "2026-11-01T06:00:00Z"),
            ("Australia/Lord_Howe", "2026-04-04T15:00:00Z", "2026-10-03T15:30:00Z"),
            ("America/Sao_Paulo", "2017-10-15T03:00:00Z", "2018-02-18T02:00:00Z"),
            ("America/St_Johns", "2010-03-14T03:31:00Z", "2010-11-07T02:31:00Z"),
            ("Pacific/Apia", "2011-12-30T10:00:00Z", "2011-09-24T14:00:00Z"),
            ("Asia/Kathmandu", "2026-03-08T07:00:00Z", "2026-11-01T06:00:00Z"),
        ];
        let cases = std::env::var("MILLSTREAM_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(200);
        let seed = crate::stream::clock::Clock.unix_micros() as u64;
        println!("seed {seed}");
        let mut dice = Dice(seed);
        for _ in 0..cases {
            let field = |dice: &mut Dice, least: u64, bound: u64, star: u64| match dice.roll(6) {
                0..=2 if dice.roll(star) > 0 => "*".to_owned(),
                0..=3 => (least + dice.roll(bound)).to_string(),
                4 => format!("*/{}", 1 + dice.roll(bound)),
                _ => {
                    let from = dice.roll(bound);
                    format!(
                        "{}-{},{}",
                        least + from,
                        least + from + dice.roll(bound - from),
                        least + dice.roll(bound)
                    )
                }
            };
            let hours = if dice.roll(2) == 0 { 4 } else { 24 };
            let cron = [
                field(&mut dice, 0, 60, 2),
                field(&mut dice, 0, hours, 3),
                field(&mut dice, 1, 31, 20),
                field(&mut dice, 1, 12, 40),
                field(&mut dice, 0, 7, 9),
            ]
            .join(" ");
            let (zone, spring, autumn) = zones[dice.roll(zones.len() as u64) as usize];
            let calendar = calendar(&cron, zone);
            let around = at(if dice.roll(2) == 0 { spring } else { autumn });
            let from = around - dice.roll(3 * 24 * 60) as i64 * MINUTE - dice.roll(60) as i64 * SECOND;
            let to = from + (1 + dice.roll(5)) as i64 * DAY;
            let found: Vec<Micros> = calendar.fires_after(from).take_while(|at| *at < to).collect();
            let walked = walked(&calendar, from, to);
            assert_eq!(
                found.iter().copied().map(text).collect::<Vec<_>>(),
                walked.iter().copied().map(text).collect::<Vec<_>>(),
                "{cron} in {zone} from {}",
                text(from)
            );
            if let [.., before, last] = walked[..] {
                assert_eq!(calendar.fire_before(last).map(text), Some(text(before)), "{cron} in {zone}");
                let spans = (calendar.since_last(before).unwrap(), calendar.since_last(last).unwrap());
                assert_eq!(spans.0.1, spans.1.0, "{cron} in {zone}: a gap");
                // Both midnights are one where a whole day is missing.
                assert!(spans.1.0 <= spans.1.1 && spans.1.1 <= last, "{cron} in {zone}: {spans:?} at {last}");
            }
        }
    }

    #[test]
    fn a_time_of_day_that_is_missing_or_comes_twice_fires_once() {
        let berlin = |cron, after, count| fires(cron, "Europe/Berlin", after, count);
        let spring = ["2026-03-28T01:30Z", "2026-03-29T01:00Z", "2026-03-30T00:30Z"];
        assert_eq!(berlin("30 2 * * *", "2026-03-28T00:00:00Z", 3), spring);
        assert_eq!(
            berlin("*/20 2 * * *", "2026-03-28T23:00:00Z", 2),
            ["2026-03-29T01:00Z", "2026-03-30T00:00Z"]
        );
        let autumn = ["2026-10-24T00:30Z", "2026-10-25T00:30Z", "2026-10-26T01:30Z"];
        assert_eq!(berlin("30 2 * * *", "2026-10-24T00:00:00Z", 3), autumn);
        let hourly = ["2026-10-24T23:30Z", "2026-10-25T00:30Z", "2026-10-25T01:30Z", "2026-10-25T02:30Z"];
        assert_eq!(berlin("30 * * * *", "2026-10-24T23:00:00Z", 4), hourly);
        assert_eq!(fires("0 0 29 2 *", "UTC", "2026-01-01T00:00:00Z", 1), ["2028-02-29T00:00Z"]);
        assert!(fires("0 0 31 2 *", "UTC", "2026-01-01T00:00:00Z", 1).is_empty());
        // A day of the month or a day of the week, where both are given.
        let both = ["2026-01-02T00:00Z", "2026-01-09T00:00Z", "2026-01-13T00:00Z", "2026-01-16T00:00Z"];
        assert_eq!(fires("0 0 13 * FRI", "UTC", "2026-01-01T00:00:00Z", 4), both);
    }

    #[test]
    fn intervals_end_at_the_unit_before_the_fire() {
        let last = |zone: &str, fire: &str, length: Micros| {
            let (from, to) = calendar("0 2 * * *", zone).last(at(fire), length).unwrap();
            (text(from), text(to))
        };
        let pair = |from: &str, to: &str| (from.to_owned(), to.to_owned());
        assert_eq!(last("UTC", "2026-01-05T02:00:00Z", DAY), pair("2026-01-04T00:00Z", "2026-01-05T00:00Z"));
        assert_eq!(last("UTC", "2026-01-05T02:40:30Z", HOUR), pair("2026-01-05T01:00Z", "2026-01-05T02:00Z"));
        assert_eq!(
            last("UTC", "2026-01-05T02:40:30Z", 90 * MINUTE),
            pair("2026-01-05T01:10Z", "2026-01-05T02:40Z")
        );
        // 23 hours, and the week that has them.
        let short = pair("2026-03-28T23:00Z", "2026-03-29T22:00Z");
        assert_eq!(last("Europe/Berlin", "2026-03-30T00:00:00Z", DAY), short);
        let week = pair("2026-03-22T23:00Z", "2026-03-29T22:00Z");
        assert_eq!(last("Europe/Berlin", "2026-03-30T00:00:00Z", 7 * DAY), week);
        let since = |cron: &str, fire: &str| {
            let (from, to) = calendar(cron, "UTC").since_last(at(fire)).unwrap();
            (text(from), text(to))
        };
        assert_eq!(
            since("5 * * * *", "2026-01-05T02:05:00Z"),
            pair("2026-01-05T01:00Z", "2026-01-05T02:00Z")
        );
        assert_eq!(
            since("*/15 * * * *", "2026-01-05T02:15:00Z"),
            pair("2026-01-05T02:00Z", "2026-01-05T02:15Z")
        );
        assert_eq!(
            since("0 2 * * MON", "2026-01-05T02:00:00Z"),
            pair("2025-12-29T00:00Z", "2026-01-05T00:00Z")
        );
    }
}
