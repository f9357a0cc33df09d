//! Cron expressions of five fields: minute, hour, day of month, month, day of week.
//!
//! A field is `*`, a number, a range `a-b`, either with a step (`*/n`, `a-b/n`; `a/n` is from a on), or a list of those.
//! Months and days of the week have names too (`JAN`, `mon`); Sunday is 0 and 7. Where day of month and day of week both
//! do not begin with `*`, a day that fits one of them fits, as cron has it; else it must fit both.

use chrono::{Datelike, NaiveDate};

const MONTHS: [&str; 12] =
    ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

/// Name, least, greatest, names of values from the least on.
type Field = (&'static str, u32, u32, &'static [&'static str]);
const FIELDS: [Field; 5] = [
    ("minute", 0, 59, &[]),
    ("hour", 0, 23, &[]),
    ("day of month", 1, 31, &[]),
    ("month", 1, 12, &MONTHS),
    ("day of week", 0, 7, &WEEKDAYS),
];

/// Which minutes of which days; a set of numbers per field, as bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cron {
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    /// Sunday is 0.
    weekdays: u64,
    /// Neither day of month nor day of week begins with `*`.
    either_day: bool,
}

impl Cron {
    /// # Errors
    /// What is wrong, and how it should be.
    pub fn parse(text: &str) -> Result<Self, (String, String)> {
        let fields: Vec<&str> = text.split_whitespace().collect();
        let Ok(fields) = <[&str; 5]>::try_from(fields) else {
            return Err((
                format!("'{text}' is no cron expression of five fields"),
                "The fields are minute, hour, day of month, month, day of week: '0 2 * * *' is 02:00 daily."
                    .to_owned(),
            ));
        };
        let mut sets = [0; 5];
        for ((set, text), field) in sets.iter_mut().zip(fields).zip(FIELDS) {
            *set = parse_field(text, field)?;
        }
        let [minutes, hours, days, months, mut weekdays] = sets;
        weekdays = (weekdays | weekdays >> 7) & 0x7f;
        let either_day = !fields[2].starts_with('*') && !fields[4].starts_with('*');
        Ok(Self { minutes, hours, days, months, weekdays, either_day })
    }

    pub fn fits_day(&self, date: NaiveDate) -> bool {
        let day = has(self.days, date.day());
        let weekday = has(self.weekdays, date.weekday().num_days_from_sunday());
        has(self.months, date.month()) && if self.either_day { day || weekday } else { day && weekday }
    }

    pub fn hours(&self) -> impl Iterator<Item = u32> + '_ {
        (0..24).filter(|hour| has(self.hours, *hour))
    }

    pub fn minutes(&self) -> impl Iterator<Item = u32> + '_ {
        (0..60).filter(|minute| has(self.minutes, *minute))
    }

    /// The hour does not matter.
    pub fn every_hour(&self) -> bool {
        self.hours.count_ones() == 24
    }
}

fn has(set: u64, value: u32) -> bool {
    set >> value & 1 == 1
}

fn parse_field(text: &str, field: Field) -> Result<u64, (String, String)> {
    let (name, least, greatest, _) = field;
    let mut set = 0;
    for part in text.split(',') {
        let values = parse_part(part, field).ok_or_else(|| {
            let hint = format!(
                "Write numbers from {least} to {greatest}, ranges a-b, steps */n or a-b/n, or lists of those with commas."
            );
            (format!("'{part}' is no {name} of a cron expression"), hint)
        })?;
        values.for_each(|value| set |= 1 << value);
    }
    Ok(set)
}

fn parse_part(part: &str, field: Field) -> Option<impl Iterator<Item = u32>> {
    let (_, least, greatest, names) = field;
    let (range, step) = match part.split_once('/') {
        Some((range, step)) => (range, Some(number(step)?).filter(|step| *step > 0)?.into()),
        None => (part, None),
    };
    let value = |text: &str| {
        let named = names.iter().position(|name| name.eq_ignore_ascii_case(text));
        let value = match named {
            Some(at) => u32::try_from(at).ok()? + least,
            None => number(text)?,
        };
        (least..=greatest).contains(&value).then_some(value)
    };
    let (from, to) = match (range, range.split_once('-')) {
        // 7 is Sunday again.
        ("*", _) => (least, if greatest == 7 { 6 } else { greatest }),
        (_, Some((from, to))) => {
            let (from, to) = (value(from)?, value(to)?);
            // A week may end with its Sunday: FRI-SUN.
            (from, if greatest == 7 && to == 0 && from > 0 { 7 } else { to })
        }
        (one, None) => {
            let from = value(one)?;
            (from, if step.is_some() { greatest } else { from })
        }
    };
    (from <= to).then(|| (from..=to).step_by(step.unwrap_or(1) as usize))
}

fn number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.len() <= 3 && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets(text: &str) -> [Vec<u32>; 5] {
        let cron = Cron::parse(text).unwrap();
        let of = |set: u64| (0..64).filter(|value| has(set, *value)).collect();
        [of(cron.minutes), of(cron.hours), of(cron.days), of(cron.months), of(cron.weekdays)]
    }

    #[test]
    fn fields_are_sets() {
        let [minutes, hours, days, months, weekdays] = sets("*/20,59 0-6/3 31 1,MAR-may 7,1-2");
        assert_eq!((minutes, hours), (vec![0, 20, 40, 59], vec![0, 3, 6]));
        assert_eq!((days, months, weekdays), (vec![31], vec![1, 3, 4, 5], vec![0, 1, 2]));
        assert_eq!(sets("7/25 * * * *")[0], [7, 32, 57]);
        assert_eq!(sets("0 0 * * fri-SUN")[4], [0, 5, 6]);
        assert_eq!(sets("0 0 * * sun-tue")[4], [0, 1, 2]);
        assert_eq!(sets("0 0 * * */2")[4], [0, 2, 4, 6]);
        assert_eq!(sets(" * *  * * 0-7 ")[4].len(), 7);
    }

    #[test]
    fn what_is_no_cron_is_refused_by_field() {
        for (text, message) in [
            ("daily", "'daily' is no cron expression of five fields"),
            ("0 0 2 * * *", "'0 0 2 * * *' is no cron expression of five fields"),
            ("60 * * * *", "'60' is no minute of a cron expression"),
            ("* 24 * * *", "'24' is no hour of a cron expression"),
            ("* * 0 * *", "'0' is no day of month of a cron expression"),
            ("* * L * *", "'L' is no day of month of a cron expression"),
            ("* * * FOO *", "'FOO' is no month of a cron expression"),
            ("* * * * 8", "'8' is no day of week of a cron expression"),
            ("*/0 * * * *", "'*/0' is no minute of a cron expression"),
            ("5-1 * * * *", "'5-1' is no minute of a cron expression"),
            ("1,,2 * * * *", "'' is no minute of a cron expression"),
            ("-1 * * * *", "'-1' is no minute of a cron expression"),
            ("1-2-3 * * * *", "'1-2-3' is no minute of a cron expression"),
            ("4294967297 * * * *", "'4294967297' is no minute of a cron expression"),
        ] {
            assert_eq!(Cron::parse(text).unwrap_err().0, message);
        }
    }
}
