//! SQL intervals of a fixed length, in microseconds.
//!
//! `'7 days'`, `INTERVAL '1' DAY`, `'1 hour 30 minutes'`, `'500ms'`, `'-5 seconds'`. Months and years have no
//! fixed length and are refused.

use sqlparser::ast::{Expr, Interval, UnaryOperator, Value};

use crate::error::{Error, Result};
use crate::stream::Micros;

/// Microseconds of an interval expression or string; `None` for months, years and what is no interval.
pub fn micros_of(expr: &Expr) -> Option<Micros> {
    match expr {
        Expr::Interval(interval) => literal_micros(interval).ok(),
        Expr::Value(value) => parse_micros(&plain_text(&value.value)?).ok(),
        _ => None,
    }
}

/// µs of an interval literal. The error carries no place; the caller knows it.
pub fn literal_micros(interval: &Interval) -> Result<Micros> {
    parse_micros(&literal_text(interval)?)
}

/// The text of an interval literal without the keyword: `INTERVAL '1' DAY` → `1 DAY`.
pub fn literal_text(interval: &Interval) -> Result<String> {
    let text = match interval.value.as_ref() {
        Expr::Value(value) => plain_text(&value.value),
        Expr::UnaryOp { op: UnaryOperator::Minus, expr } => match expr.as_ref() {
            Expr::Value(value) => plain_text(&value.value).map(|text| format!("-{text}")),
            _ => None,
        },
        _ => None,
    };
    let text = text.ok_or_else(|| wrong(&interval.value.to_string()))?;
    if interval.last_field.is_some() {
        return Err(wrong(&interval.to_string()));
    }
    Ok(match &interval.leading_field {
        Some(unit) => format!("{text} {unit}"),
        None => text,
    })
}

fn plain_text(value: &Value) -> Option<String> {
    match value {
        Value::SingleQuotedString(text) | Value::Number(text, _) => Some(text.clone()),
        _ => None,
    }
}

/// µs of an interval's text, with or without the keyword and quotes.
///
/// # Errors
/// A user error for what is no interval, has months or years, or does not fit into 64 bits.
pub fn parse_micros(text: &str) -> Result<Micros> {
    let bare = strip_keyword(text.trim()).replace('\'', " ");
    let mut rest = bare.trim();
    let whole = |number: Option<i128>| number.ok_or_else(|| wrong(text));
    let mut total: i128 = 0;
    if rest.is_empty() {
        return Err(wrong(text));
    }
    while !rest.is_empty() {
        let signed = rest.strip_prefix(['-', '+']);
        let sign = if rest.starts_with('-') { -1 } else { 1 };
        let unsigned = signed.unwrap_or(rest);
        let digits = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
        let (number, tail) = unsigned.split_at(digits);
        let tail = tail.trim_start();
        let letters = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let micros = whole(scale(number, unit_micros(unit, text)?))?;
        total = whole(total.checked_add(sign * micros))?;
        rest = tail.trim_start();
    }
    Micros::try_from(total).map_err(|_| wrong(text))
}

fn strip_keyword(text: &str) -> &str {
    match text.get(..8) {
        Some(word) if word.eq_ignore_ascii_case("interval") => &text[8..],
        _ => text,
    }
}

/// number × unit; a fraction must come out whole in µs.
fn scale(number: &str, unit: i128) -> Option<i128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.len() > 18 {
        return None;
    }
    let parse = |digits: &str| if digits.is_empty() { Some(0) } else { digits.parse::<i128>().ok() };
    let parts = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let below = parse(fraction)?.checked_mul(unit)?;
    if below % parts != 0 {
        return None;
    }
    parse(whole)?.checked_mul(unit)?.checked_add(below / parts)
}

fn unit_micros(unit: &str, text: &str) -> Result<i128> {
    Ok(match unit.to_ascii_lowercase().as_str() {
        "us" | "microsecond" | "microseconds" => 1,
        "ms" | "millisecond" | "milliseconds" => 1_000,
        "s" | "sec" | "secs" | "second" | "seconds" => 1_000_000,
        "m" | "min" | "mins" | "minute" | "minutes" => 60_000_000,
        "h" | "hour" | "hours" => 3_600_000_000,
        "d" | "day" | "days" => 86_400_000_000,
        "w" | "week" | "weeks" => 604_800_000_000,
        "mon" | "mons" | "month" | "months" | "quarter" | "quarters" | "y" | "year" | "years" => {
            return Err(Error::user(format!("the interval '{text}' has no fixed length"))
                .hint("Months and years differ in length; say it in days, such as '30 days'."));
        }
        _ => return Err(wrong(text)),
    })
}

fn wrong(text: &str) -> Error {
    Error::user(format!("'{text}' is no interval"))
        .hint("Write it as INTERVAL '5 seconds', with units from microseconds to weeks.")
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
