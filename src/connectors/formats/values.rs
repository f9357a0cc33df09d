//! Text → numbers and times, exactly. No rounding happens that the caller did not ask for.

/// Why a number does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NumberFault {
    NotANumber,
    /// It has digits below the last one that is kept.
    Fraction,
    Overflow,
}

/// Largest power of ten that `i128` holds.
const MAX_POWER: u32 = 38;

/// `text` × 10^`scale` as an integer. With `exact`, digits below that are a [`NumberFault::Fraction`]; without,
/// they are rounded half away from zero, as CAST does. Accepts sign, leading zeros, `.5`, `5.` and exponents.
pub(super) fn scaled(text: &str, scale: i32, exact: bool) -> Result<i128, NumberFault> {
    let (negative, digits) = match text.as_bytes() {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        rest => (false, rest),
    };
    let mantissa_end = digits.iter().position(|b| matches!(b, b'e' | b'E')).unwrap_or(digits.len());
    let exponent = match digits.get(mantissa_end + 1..) {
        Some(rest) => exponent_of(rest)?,
        None => 0,
    };
    let mantissa = &digits[..mantissa_end];
    let point = mantissa.iter().position(|b| *b == b'.').unwrap_or(mantissa.len());
    let fraction = mantissa.get(point + 1..).unwrap_or(&[]);
    let whole = &mantissa[..point];
    if whole.len() + fraction.len() == 0 || !whole.iter().chain(fraction).all(u8::is_ascii_digit) {
        return Err(NumberFault::NotANumber);
    }
    // Digits left of the point of the scaled number; digits right of it are cut or rounded.
    let kept = whole.len() as i64 + exponent + i64::from(scale);
    let magnitude = fold_digits(whole.iter().chain(fraction), kept, exact)?;
    Ok(if negative { -magnitude } else { magnitude })
}

fn exponent_of(digits: &[u8]) -> Result<i64, NumberFault> {
    let text = std::str::from_utf8(digits).map_err(|_| NumberFault::NotANumber)?;
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    if unsigned.is_empty() || !unsigned.bytes().all(|b| b.is_ascii_digit()) {
        return Err(NumberFault::NotANumber);
    }
    // Far beyond every representable number the exact exponent does not matter any more.
    let size = unsigned.parse::<i64>().unwrap_or(i64::MAX).min(1 << 40);
    Ok(if text.starts_with('-') { -size } else { size })
}

fn fold_digits<'a>(
    digits: impl Iterator<Item = &'a u8>,
    kept: i64,
    exact: bool,
) -> Result<i128, NumberFault> {
    let mut magnitude: i128 = 0;
    let mut taken: i64 = 0;
    let mut round_up = false;
    for digit in digits {
        let digit = i128::from(digit - b'0');
        if taken < kept {
            magnitude = magnitude
                .checked_mul(10)
                .and_then(|value| value.checked_add(digit))
                .ok_or(NumberFault::Overflow)?;
        } else if digit != 0 && exact {
            return Err(NumberFault::Fraction);
        } else if taken == kept {
            round_up = digit >= 5;
        }
        taken += 1;
    }
    if taken < kept && magnitude != 0 {
        let missing = u32::try_from(kept - taken).unwrap_or(u32::MAX);
        if missing > MAX_POWER {
            return Err(NumberFault::Overflow);
        }
        magnitude = magnitude.checked_mul(10_i128.pow(missing)).ok_or(NumberFault::Overflow)?;
    }
    magnitude.checked_add(i128::from(round_up)).ok_or(NumberFault::Overflow)
}

/// A float from text. `NaN`, `inf` and `infinity` are accepted as words, whatever their case; a number whose
/// magnitude is beyond the type is an overflow, not an infinity.
pub(super) fn float<F>(text: &str) -> Result<F, NumberFault>
where
    F: std::str::FromStr + Copy + Into<f64>,
{
    let value = text.parse::<F>().map_err(|_| NumberFault::NotANumber)?;
    let beyond = value.into().is_infinite() && text.bytes().any(|b| b.is_ascii_digit());
    if beyond { Err(NumberFault::Overflow) } else { Ok(value) }
}

/// Days since the epoch of `YYYY-MM-DD`.
pub(super) fn date(text: &str) -> Option<i32> {
    let bytes: &[u8; 10] = text.as_bytes().try_into().ok()?;
    date_of(bytes)
}

fn date_of(bytes: &[u8; 10]) -> Option<i32> {
    if bytes[4] != b'-' || bytes[7] != b'-' {
        return None;
    }
    let (year, month, day) = (number(&bytes[..4])?, number(&bytes[5..7])?, number(&bytes[8..])?);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let length = match month {
        4 | 6 | 9 | 11 => 30,
        2 => 28 + i32::from(leap),
        1..=12 => 31,
        _ => return None,
    };
    if day < 1 || day > length {
        return None;
    }
    // Days from civil, with the year beginning in March so that the leap day is the last one.
    let shifted = if month <= 2 { year - 1 } else { year };
    let era = shifted.div_euclid(400);
    let year_of_era = shifted.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    Some(era * 146_097 + day_of_era - 719_468)
}

/// µs since the epoch of RFC 3339 or `YYYY-MM-DD HH:MM:SS[.f][zone]`; without a zone it is UTC. Digits below
/// microseconds are cut. Leap seconds are refused.
pub(super) fn timestamp(text: &str) -> Option<i64> {
    let bytes = text.as_bytes();
    let day = i64::from(date_of(bytes.first_chunk()?)?);
    if !matches!(bytes.get(10)?, b'T' | b't' | b' ') || bytes.len() < 19 {
        return None;
    }
    if bytes[13] != b':' || bytes[16] != b':' {
        return None;
    }
    let (hour, minute, second) = (number(&bytes[11..13])?, number(&bytes[14..16])?, number(&bytes[17..19])?);
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let mut rest = &bytes[19..];
    let mut micros = 0_i64;
    if let [b'.', digits @ ..] = rest {
        let length = digits.iter().take_while(|b| b.is_ascii_digit()).count();
        if length == 0 {
            return None;
        }
        for place in 0..6 {
            micros = micros * 10 + digits[..length].get(place).map_or(0, |b| i64::from(b - b'0'));
        }
        rest = &digits[length..];
    }
    let seconds = i64::from(hour * 3_600 + minute * 60 + second) - zone_seconds(rest)?;
    Some((day * 86_400 + seconds) * 1_000_000 + micros)
}

fn zone_seconds(zone: &[u8]) -> Option<i64> {
    let (sign, digits) = match zone {
        [] | [b'Z' | b'z'] => return Some(0),
        [b'+', rest @ ..] => (1, rest),
        [b'-', rest @ ..] => (-1, rest),
        _ => return None,
    };
    let (hours, minutes) = match digits {
        [a, b] => (number(&[*a, *b])?, 0),
        [a, b, c, d] | [a, b, b':', c, d] => (number(&[*a, *b])?, number(&[*c, *d])?),
        _ => return None,
    };
    (hours <= 23 && minutes <= 59).then(|| sign * i64::from(hours * 3_600 + minutes * 60))
}

fn number(digits: &[u8]) -> Option<i32> {
    digits
        .iter()
        .try_fold(0, |value, digit| digit.is_ascii_digit().then(|| value * 10 + i32::from(digit - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_scaled_exactly() {
        assert_eq!(scaled("12.34", 2, true), Ok(1234));
        assert_eq!(scaled("-12.3", 2, true), Ok(-1230));
        assert_eq!(scaled("1e3", 0, true), Ok(1000));
        assert_eq!(scaled("1.0", 0, true), Ok(1));
        assert_eq!(scaled("1500e-3", 0, true), Err(NumberFault::Fraction));
        assert_eq!(scaled("1.5", 0, true), Err(NumberFault::Fraction));
        assert_eq!(scaled("0.005", 2, false), Ok(1));
        assert_eq!(scaled("-0.005", 2, false), Ok(-1));
        assert_eq!(scaled("0.0049", 2, false), Ok(0));
        assert_eq!(scaled("0e999999999999", 0, true), Ok(0));
        assert_eq!(scaled("1e999999999999999999999", 0, true), Err(NumberFault::Overflow));
        assert_eq!(scaled("1e-999999999999999999999", 0, false), Ok(0));
        for bad in ["", "-", ".", "1.2.3", "0x10", "1e", "1e+", "--1", "1_000", "e5"] {
            assert_eq!(scaled(bad, 0, true), Err(NumberFault::NotANumber), "{bad}");
        }
    }

    #[test]
    fn floats_keep_words_and_refuse_overflow() {
        assert!(float::<f64>("nan").is_ok_and(f64::is_nan));
        assert_eq!(float::<f64>("-Infinity"), Ok(f64::NEG_INFINITY));
        assert_eq!(float::<f64>("1e400"), Err(NumberFault::Overflow));
        assert_eq!(float::<f32>("1e39"), Err(NumberFault::Overflow));
        assert_eq!(float::<f64>("0.1"), Ok(0.1));
    }

    #[test]
    fn times_agree_with_chrono() {
        for text in [
            "1970-01-01T00:00:00Z",
            "2026-02-28T23:59:59.999999Z",
            "2024-02-29T12:00:00.5+02:00",
            "1600-03-01T00:00:00-23:59",
            "0001-01-01T00:00:00Z",
            "9999-12-31T23:59:59.123456Z",
        ] {
            let wanted = chrono::DateTime::parse_from_rfc3339(text).unwrap().timestamp_micros();
            assert_eq!(timestamp(text), Some(wanted), "{text}");
        }
        assert_eq!(timestamp("1970-01-01 00:00:01"), Some(1_000_000));
        assert_eq!(timestamp("1970-01-01 00:00:01.1234567+0030"), Some(1_123_456 - 1_800_000_000));
        for bad in [
            "",
            "1970-01-01",
            "1970-01-01T00:00",
            "1970-02-30 00:00:00",
            "1970-01-01 24:00:00",
            "1970-01-01 00:00:60",
            "1970-01-01 00:00:00.",
            "1970-01-01 00:00:00 Z",
            "1970-01-01 00:00:00+1",
            "é970-01-01 00:00:00",
        ] {
            assert_eq!(timestamp(bad), None, "{bad}");
        }
        for days in (-800_000..800_000).step_by(97) {
            let wanted = chrono::DateTime::from_timestamp(i64::from(days) * 86_400, 0).unwrap().date_naive();
            let text = wanted.format("%Y-%m-%d").to_string();
            if text.len() == 10 {
                assert_eq!(date(&text), Some(days), "{text}");
            }
        }
    }
}
