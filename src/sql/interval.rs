//! Fixed lengths of time in SQL: `'7 days'`, `INTERVAL '1' DAY`, and how they are shown.

use sqlparser::ast::{Expr, Value};

use super::options::parse_duration;

/// Microseconds of an interval expression or string; `None` for months, years and what is no interval.
pub fn micros_of(expr: &Expr) -> Option<i64> {
    match expr {
        Expr::Interval(interval) => {
            let number = string_of(&interval.value)?;
            let text = match &interval.leading_field {
                Some(unit) => format!("{number} {unit}"),
                None => number,
            };
            micros(&text)
        }
        other => micros(&string_of(other)?),
    }
}

/// Microseconds of a text such as `'5 seconds'`.
pub fn micros(text: &str) -> Option<i64> {
    i64::try_from(parse_duration(text)?.as_micros()).ok()
}

fn string_of(expr: &Expr) -> Option<String> {
    let Expr::Value(value) = expr else { return None };
    match &value.value {
        Value::SingleQuotedString(text) => Some(text.clone()),
        Value::Number(number, _) => Some(number.clone()),
        _ => None,
    }
}

/// The largest whole unit: `7 days`, `90 minutes`, `1500 ms`.
pub fn display_micros(micros: i64) -> String {
    let units =
        [(86_400_000_000, "day"), (3_600_000_000, "hour"), (60_000_000, "minute"), (1_000_000, "second")];
    if micros == 0 {
        return "0 seconds".to_owned();
    }
    for (length, name) in units {
        if micros % length == 0 {
            let count = micros / length;
            return format!("{count} {name}{}", if count == 1 { "" } else { "s" });
        }
    }
    if micros % 1_000 == 0 { format!("{} ms", micros / 1_000) } else { format!("{micros} us") }
}
