//! `WITH (…)` options: pulled typed and consumed, so what is left over is an error.
//!
//! A connector takes each option that it knows with one of the methods below and ends with [`Options::finish`].
//! An unknown key is an error with a "did you mean"; a wrong value names the key, the value and what was expected.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use crate::error::{Error, Place, Result};

/// One `key = 'value'` with its place in the SQL.
#[derive(Debug, Clone)]
pub struct OptionValue {
    pub value: String,
    pub place: Option<Place>,
}

/// The options of one statement.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// What the options belong to, for messages: "source transactions".
    owner: String,
    left: BTreeMap<String, OptionValue>,
    /// Every key that was asked for, for "did you mean".
    known: Vec<String>,
}

impl Options {
    pub fn new(owner: impl Into<String>, entries: impl IntoIterator<Item = (String, OptionValue)>) -> Self {
        Self { owner: owner.into(), left: entries.into_iter().collect(), known: Vec::new() }
    }

    /// For tests and for options that do not come from SQL.
    pub fn of(owner: &str, entries: &[(&str, &str)]) -> Self {
        let entry =
            |(k, v): &(&str, &str)| ((*k).to_owned(), OptionValue { value: (*v).to_owned(), place: None });
        Self::new(owner, entries.iter().map(entry))
    }

    pub fn owner(&self) -> &str {
        &self.owner
    }

    fn take(&mut self, key: &str) -> Option<OptionValue> {
        self.known.push(key.to_owned());
        self.left.remove(key)
    }

    /// The text of an option, if given.
    pub fn string(&mut self, key: &str) -> Result<Option<String>> {
        Ok(self.take(key).map(|option| option.value))
    }

    /// The text of an option that must be given.
    ///
    /// # Errors
    /// A user error that names the option when it is missing.
    pub fn required(&mut self, key: &str) -> Result<String> {
        self.string(key)?.ok_or_else(|| {
            Error::user(format!("{} lacks the option {key}", self.owner))
                .hint(format!("Add {key} = '…' to its WITH (…)."))
        })
    }

    /// A value by its `FromStr`; `expected` completes "expected …" in the message.
    pub fn parse<T: FromStr>(&mut self, key: &str, expected: &str) -> Result<Option<T>> {
        let Some(option) = self.take(key) else { return Ok(None) };
        option.value.trim().parse().map(Some).map_err(|_| self.wrong(key, &option, expected))
    }

    /// A duration: `'5 seconds'`, `'1 day'`, `'500ms'`, `INTERVAL '1 minute'`.
    pub fn duration(&mut self, key: &str) -> Result<Option<Duration>> {
        let Some(option) = self.take(key) else { return Ok(None) };
        parse_duration(&option.value)
            .map(Some)
            .ok_or_else(|| self.wrong(key, &option, "a duration such as '5 seconds'"))
    }

    /// One of a few words; returns its index in `choices`.
    pub fn choice(&mut self, key: &str, choices: &[&str]) -> Result<Option<usize>> {
        let Some(option) = self.take(key) else { return Ok(None) };
        let found = choices.iter().position(|choice| choice.eq_ignore_ascii_case(option.value.trim()));
        found.map(Some).ok_or_else(|| self.wrong(key, &option, &format!("one of {}", choices.join(", "))))
    }

    /// All options whose key starts with `prefix`, without it: `kafka.*`, `topic.*`.
    pub fn with_prefix(&mut self, prefix: &str) -> Vec<(String, String)> {
        self.known.push(format!("{prefix}*"));
        let keys: Vec<String> = self.left.keys().filter(|key| key.starts_with(prefix)).cloned().collect();
        keys.into_iter()
            .filter_map(|key| {
                self.left.remove(&key).map(|option| (key[prefix.len()..].to_owned(), option.value))
            })
            .collect()
    }

    /// Where an option stands, for errors that are found later.
    pub fn place(&self, key: &str) -> Option<Place> {
        self.left.get(key).and_then(|option| option.place.clone())
    }

    /// Refuses what nobody asked for.
    ///
    /// # Errors
    /// A user error that names the first unknown key, with "did you mean" where a known key is near.
    pub fn finish(self) -> Result<()> {
        let Some((key, option)) = self.left.iter().next() else { return Ok(()) };
        let error = Error::user(format!("{} has no option {key}", self.owner));
        let error = match nearest(key, &self.known) {
            Some(near) => error.hint(format!("Did you mean {near}?")),
            None => error.hint(format!("Its options are {}.", self.known.join(", "))),
        };
        Err(match &option.place {
            Some(place) => error.at(place.clone()),
            None => error,
        })
    }

    fn wrong(&self, key: &str, option: &OptionValue, expected: &str) -> Error {
        let error = Error::user(format!("{}: {key} = '{}' is not {expected}", self.owner, option.value));
        match &option.place {
            Some(place) => error.at(place.clone()),
            None => error,
        }
    }
}

/// Parses `'5 seconds'`, `'1 day 2 hours'`, `'500ms'`; `None` when it is no duration or negative.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let text = text.strip_prefix("INTERVAL").or_else(|| text.strip_prefix("interval")).unwrap_or(text);
    let text = text.trim().trim_matches('\'').trim();
    let mut total = Duration::ZERO;
    let mut rest = text;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at(digits);
        let tail = tail.trim_start();
        let letters = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let seconds = match unit.to_ascii_lowercase().as_str() {
            "us" | "microsecond" | "microseconds" => 1e-6,
            "ms" | "millisecond" | "milliseconds" => 1e-3,
            "s" | "sec" | "secs" | "second" | "seconds" => 1.0,
            "m" | "min" | "mins" | "minute" | "minutes" => 60.0,
            "h" | "hour" | "hours" => 3_600.0,
            "d" | "day" | "days" => 86_400.0,
            "w" | "week" | "weeks" => 604_800.0,
            _ => return None,
        };
        total += Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?;
        rest = tail.trim_start();
    }
    Some(total)
}

/// The known word nearest to `word`, if it is near enough to be a slip of the pen.
pub fn nearest<'a>(word: &str, known: &'a [String]) -> Option<&'a str> {
    let distance =
        |candidate: &str| edit_distance(&word.to_ascii_lowercase(), &candidate.to_ascii_lowercase());
    let best = known.iter().min_by_key(|candidate| distance(candidate))?;
    (distance(best) <= 1 + word.len() / 4).then_some(best.as_str())
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let cost = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}
