//! `WITH (…)` options: pulled typed and consumed, so what is left over is an error.
//!
//! A connector takes each option that it knows with one of the methods below and ends with [`Options::finish`].
//! An unknown key is an error with a "did you mean"; a wrong value names the key, the value and what was expected.
//!
//! `secret('env:NAME')` and `secret('file:PATH')` are accepted by options that are taken as [`Guarded`]. They stay
//! unresolved until a pipeline starts, and no message or debug output shows what they stand for.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::error::{Error, Place, Result};

/// One `key = 'value'` with its place in the SQL.
#[derive(Debug, Clone)]
pub struct OptionValue {
    /// The text; of a secret, where it is kept (`env:NAME`, `file:PATH`).
    pub value: String,
    pub place: Option<Place>,
    /// Written as `secret('…')`.
    pub secret: bool,
}

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself: for the connection that needs it, not for messages.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Finds what a secret's reference (`env:NAME`, `file:PATH`) stands for. A file loses its last line break.
///
/// # Errors
/// A user error that names the reference and never the secret.
pub fn resolve_secret(reference: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<String> {
    match reference.split_once(':') {
        Some(("env", name)) => environment(name).ok_or_else(|| {
            Error::user(format!("the environment variable {name} of a secret is not set"))
                .hint(format!("Set {name} before starting."))
        }),
        Some(("file", path)) => {
            std::fs::read_to_string(path).map(|text| text.trim_end_matches(['\n', '\r']).to_owned()).map_err(
                |error| Error::user(format!("the file {path} of a secret cannot be read")).because(error),
            )
        }
        _ => Err(Error::user(format!("secret('{reference}') is not understood"))
            .hint("Write secret('env:NAME') or secret('file:PATH').")),
    }
}

/// The value of an option that may be a `secret('…')`.
///
/// # Constraints
/// [`Guarded::resolve`] once before the first [`Guarded::reveal`]: `check` and `explain` need no secret.
#[derive(Clone, PartialEq, Eq)]
pub enum Guarded {
    /// Written in the SQL as it stands.
    Plain(String),
    Kept {
        /// Where the secret is kept (`env:NAME`, `file:PATH`).
        reference: String,
        place: Option<Place>,
        found: Option<Secret>,
    },
}

impl Guarded {
    fn new(option: OptionValue) -> Self {
        match option.secret {
            false => Self::Plain(option.value),
            true => Self::Kept { reference: option.value, place: option.place, found: None },
        }
    }

    /// Finds what a secret stands for; see [`resolve_secret`].
    ///
    /// # Errors
    /// A user error at the option's place when the variable is not set or the file cannot be read.
    pub fn resolve(&mut self, environment: &dyn Fn(&str) -> Option<String>) -> Result<()> {
        if let Self::Kept { reference, place, found } = self {
            let text = resolve_secret(reference, environment);
            *found = Some(Secret(text.map_err(|error| placed(error, place.as_ref()))?));
        }
        Ok(())
    }

    /// The value itself: for the connection that needs it, not for messages.
    ///
    /// # Errors
    /// Internal: nobody has resolved it.
    pub fn reveal(&self) -> Result<&str> {
        match self {
            Self::Plain(text) => Ok(text),
            Self::Kept { found: Some(secret), .. } => Ok(secret.reveal()),
            Self::Kept { reference, .. } => {
                Err(Error::internal(format!("secret('{reference}') was used before it was resolved")))
            }
        }
    }

    /// As it may be shown, if the option is none that is always hidden: of a secret, where it is kept.
    pub fn shown(&self) -> String {
        match self {
            Self::Plain(text) => text.clone(),
            Self::Kept { reference, .. } => format!("secret('{reference}')"),
        }
    }
}

impl fmt::Debug for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A plain value may be a password as well.
        f.write_str("***")
    }
}

/// How other engines call options that exist here.
const ALIASES: &[(&str, &str)] = &[
    ("properties.bootstrap.servers", "bootstrap_servers"),
    ("bootstrap.servers", "bootstrap_servers"),
    ("brokers", "bootstrap_servers"),
    ("kafka.bootstrap.servers", "bootstrap_servers"),
    ("scan.startup.mode", "scan_startup"),
    ("scan_startup_mode", "scan_startup"),
    ("auto.offset.reset", "scan_startup"),
    ("value.format", "format"),
    ("topics", "topic"),
    ("kafka_topic", "topic"),
    ("key.fields", "key"),
    ("primary_key", "key"),
    ("path", "location"),
    ("table-path", "location"),
    ("partitioned_by", "partition_by"),
];

/// What an option of another engine is called here.
fn alias(key: &str) -> Option<String> {
    let lower = key.to_ascii_lowercase();
    let known = ALIASES.iter().find(|(other, _)| *other == lower).map(|(_, ours)| (*ours).to_owned());
    known.or_else(|| lower.strip_prefix("properties.").map(|rest| format!("kafka.{rest}")))
}

/// What an option is, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionDoc {
    /// `kafka.*` stands for every option that begins with `kafka.`.
    pub name: &'static str,
    pub takes: &'static str,
    /// What holds without it, or `required`.
    pub default: &'static str,
    /// A value, without quotes.
    pub example: &'static str,
    pub meaning: &'static str,
}

/// The options of one statement.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// What the options belong to, for messages: "source transactions".
    owner: String,
    left: BTreeMap<String, OptionValue>,
    /// Where each option stands, also after it was taken.
    places: BTreeMap<String, Place>,
    /// Every key that was asked for, for "did you mean" where nothing is declared.
    known: Vec<String>,
    /// Every option that there is.
    declared: Vec<&'static OptionDoc>,
}

impl Options {
    pub fn new(owner: impl Into<String>, entries: impl IntoIterator<Item = (String, OptionValue)>) -> Self {
        let left: BTreeMap<String, OptionValue> = entries.into_iter().collect();
        let places =
            left.iter().filter_map(|(key, option)| Some((key.clone(), option.place.clone()?))).collect();
        Self { owner: owner.into(), left, places, known: Vec::new(), declared: Vec::new() }
    }

    /// For tests and for options that do not come from SQL.
    pub fn of(owner: &str, entries: &[(&str, &str)]) -> Self {
        let entry = |(k, v): &(&str, &str)| {
            ((*k).to_owned(), OptionValue { value: (*v).to_owned(), place: None, secret: false })
        };
        Self::new(owner, entries.iter().map(entry))
    }

    /// The value of an option as it may be shown: nothing of a secret.
    pub fn shown(&self, key: &str) -> Option<String> {
        self.left.get(key).filter(|option| !option.secret).map(|option| option.value.clone())
    }

    /// The options that are left, as they stand in the SQL; of a secret, where it is kept.
    pub fn values(&self) -> impl Iterator<Item = (&str, &OptionValue)> {
        self.left.iter().map(|(key, option)| (key.as_str(), option))
    }

    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// Says which options there are; from now on only these can be asked for.
    pub fn declare(&mut self, options: Vec<&'static OptionDoc>) {
        self.declared = options;
    }

    /// A key is asked for.
    fn note(&mut self, key: String) -> Result<()> {
        if !self.declared.is_empty() && !self.declared.iter().any(|option| option.name == key) {
            return Err(Error::internal(format!("{}: the option {key} is not declared", self.owner)));
        }
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        Ok(())
    }

    fn take(&mut self, key: &str) -> Result<Option<OptionValue>> {
        self.note(key.to_owned())?;
        match self.left.remove(key) {
            Some(option) if option.secret => {
                let error = Error::user(format!("{}: {key} cannot be a secret", self.owner));
                Err(placed(error.hint("Write its value in single quotes."), option.place.as_ref()))
            }
            other => Ok(other),
        }
    }

    /// The text of an option, if given.
    pub fn string(&mut self, key: &str) -> Result<Option<String>> {
        Ok(self.take(key)?.map(|option| option.value))
    }

    /// The text of an option that must be given.
    ///
    /// # Errors
    /// A user error that names the option when it is missing, at what looks like a slip for it if there is one.
    pub fn required(&mut self, key: &str) -> Result<String> {
        if let Some(text) = self.string(key)? {
            return Ok(text);
        }
        let error = Error::user(format!("{} lacks the option {key}", self.owner));
        let known = [key.to_owned()];
        let slip = |given: &&String| {
            !self.known.contains(given)
                && (alias(given).as_deref() == Some(key) || nearest(given, &known).is_some())
        };
        Err(match self.left.keys().find(slip) {
            Some(given) => {
                placed(error.hint(format!("Write {key} instead of {given}.")), self.places.get(given))
            }
            None => error.hint(format!("Add {key} = '…' to its WITH (…).")),
        })
    }

    /// An option that may be `secret('…')`.
    ///
    /// # Errors
    /// Internal: the option is not declared.
    pub fn guarded(&mut self, key: &str) -> Result<Option<Guarded>> {
        self.note(key.to_owned())?;
        Ok(self.left.remove(key).map(Guarded::new))
    }

    /// As [`Options::with_prefix`], secrets included.
    pub fn guarded_with_prefix(&mut self, prefix: &str) -> Vec<(String, Guarded)> {
        let taken = self.take_prefix(prefix, true);
        taken.into_iter().map(|(key, option)| (key, Guarded::new(option))).collect()
    }

    /// A value by its `FromStr`; `expected` completes "expected …" in the message.
    pub fn parse<T: FromStr>(&mut self, key: &str, expected: &str) -> Result<Option<T>> {
        let Some(option) = self.take(key)? else { return Ok(None) };
        option.value.trim().parse().map(Some).map_err(|_| self.wrong(key, &option, expected))
    }

    /// A duration: `'5 seconds'`, `'1 day'`, `'500ms'`, `INTERVAL '1 minute'`.
    pub fn duration(&mut self, key: &str) -> Result<Option<Duration>> {
        let Some(option) = self.take(key)? else { return Ok(None) };
        parse_duration(&option.value)
            .map(Some)
            .ok_or_else(|| self.wrong(key, &option, "a duration such as '5 seconds'"))
    }

    /// One of a few words; returns its index in `choices`.
    pub fn choice(&mut self, key: &str, choices: &[&str]) -> Result<Option<usize>> {
        let Some(option) = self.take(key)? else { return Ok(None) };
        let found = choices.iter().position(|choice| choice.eq_ignore_ascii_case(option.value.trim()));
        found.map(Some).ok_or_else(|| {
            let error = self.wrong(key, &option, &format!("one of {}", choices.join(", ")));
            let known: Vec<String> = choices.iter().map(|choice| (*choice).to_owned()).collect();
            match nearest(option.value.trim(), &known) {
                Some(near) => error.hint(format!("Did you mean {near}?")),
                None => error,
            }
        })
    }

    /// All options whose key starts with `prefix`, without it: `topic.*`. Secrets stay behind, for `finish` to refuse.
    pub fn with_prefix(&mut self, prefix: &str) -> Vec<(String, String)> {
        self.take_prefix(prefix, false).into_iter().map(|(key, option)| (key, option.value)).collect()
    }

    fn take_prefix(&mut self, prefix: &str, secrets: bool) -> Vec<(String, OptionValue)> {
        let pattern = format!("{prefix}*");
        if !self.known.contains(&pattern) {
            self.known.push(pattern);
        }
        let wanted =
            |(key, option): &(&String, &OptionValue)| key.starts_with(prefix) && (secrets || !option.secret);
        let keys: Vec<String> = self.left.iter().filter(wanted).map(|(key, _)| key.clone()).collect();
        keys.into_iter()
            .filter_map(|key| self.left.remove(&key).map(|option| (key[prefix.len()..].to_owned(), option)))
            .collect()
    }

    /// Where an option stands, for errors that are found later.
    pub fn place(&self, key: &str) -> Option<Place> {
        self.places.get(key).cloned()
    }

    /// Refuses what nobody asked for.
    ///
    /// # Errors
    /// A user error that names the first unknown key, with "did you mean" where a known key is near.
    pub fn finish(self) -> Result<()> {
        let Some((key, option)) = self.left.iter().next() else { return Ok(()) };
        let error = Error::user(format!("{} has no option {key}", self.owner));
        let names: Vec<String> = match self.declared.is_empty() {
            true => self.known.clone(),
            false => self.declared.iter().map(|option| option.name.to_owned()).collect(),
        };
        let takes = |name: &str| {
            let covers =
                |known: &String| known.strip_suffix('*').is_some_and(|prefix| name.starts_with(prefix));
            names.iter().any(|known| known == name || covers(known))
        };
        let error = if option.secret && takes(key) {
            Error::user(format!("{}: {key} cannot be a secret", self.owner))
                .hint("Write its value in single quotes.")
        } else if let Some(declared) = self.declared.iter().find(|option| option.name == key) {
            Error::user(format!("{}: the option {key} has no meaning here", self.owner))
                .hint(declared.meaning)
        } else if let Some(ours) = alias(key).filter(|ours| takes(ours)) {
            error.hint(format!("Here it is called {ours}."))
        } else if let Some(near) = nearest(key, &names) {
            error.hint(format!("Did you mean {near}?"))
        } else {
            error.hint(format!("Its options are {}.", names.join(", ")))
        };
        Err(placed(error, option.place.as_ref()))
    }

    fn wrong(&self, key: &str, option: &OptionValue, expected: &str) -> Error {
        let error = Error::user(format!("{}: {key} = '{}' is not {expected}", self.owner, option.value));
        placed(error, option.place.as_ref())
    }
}

fn placed(error: Error, place: Option<&Place>) -> Error {
    match place {
        Some(place) => error.at(place.clone()),
        None => error,
    }
}

/// Parses `'256MB'`, `'3 KB'`, `'1000'` (bytes); `None` when it is no size or nothing.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim().to_ascii_lowercase();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match text[digits..].trim() {
        "" | "b" => 1,
        "kb" | "k" => 1 << 10,
        "mb" | "m" => 1 << 20,
        "gb" | "g" => 1 << 30,
        _ => return None,
    };
    text[..digits].parse::<u64>().ok()?.checked_mul(unit).filter(|size| *size > 0)
}

/// Parses `'5 seconds'`, `'1 day 2 hours'`, `'500ms'`; `None` when it is no duration, has months or is negative.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let micros = crate::sql::interval::parse_micros(text).ok()?;
    u64::try_from(micros).ok().map(Duration::from_micros)
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
