//! `${VAR}` and `${VAR:-default}`.
//!
//! They are replaced in code and inside string literals, not in comments. A variable is looked up among the
//! overrides (`--set`), then in the environment. With `:-` an empty variable counts as unset; without a default an
//! unset one is an error. `$$` is a plain `$`; a `$` before anything else stays (`$interval_start`).
//! Inside a string literal a quote in a *value* is doubled, so that no value can end the literal it stands in.

use std::collections::BTreeMap;

use sqlparser::tokenizer::{Location, Span};

use crate::error::{Error, Result};
use crate::sql::place::SourceText;

/// Where values come from.
pub struct Variables<'a> {
    pub overrides: BTreeMap<String, String>,
    pub environment: &'a (dyn Fn(&str) -> Option<String> + Sync),
}

impl Variables<'_> {
    /// The value of a variable: override before environment.
    fn get(&self, name: &str) -> Option<String> {
        self.overrides.get(name).cloned().or_else(|| (self.environment)(name))
    }
}

/// Puts values in place of the variables of a text.
///
/// # Errors
/// A user error with its place: an unset variable without default, a bad name, a missing `}`.
pub fn substitute(source: &SourceText, variables: &Variables<'_>) -> Result<Substituted> {
    let mut scanner = Scanner::new(source);
    scanner.run(variables)?;
    Ok(Substituted { text: scanner.out, pieces: scanner.pieces })
}

/// A text with its variables replaced, and the way back to the original one.
#[derive(Debug)]
pub struct Substituted {
    pub text: String,
    /// By position in `text`, rising. The first starts at 1:1.
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    /// Where the piece starts in the substituted text.
    start: (u64, u64),
    /// Where it starts in the original.
    origin: (u64, u64),
    /// A replaced piece has one place for all of its text: from `origin` to here.
    replaced_until: Option<(u64, u64)>,
}

impl Substituted {
    /// The span of the original text that a span of the substituted text comes from.
    pub fn original(&self, span: Span) -> Span {
        if span.start.line == 0 {
            return span;
        }
        Span::new(self.map(span.start, false), self.map(span.end, true))
    }

    fn map(&self, location: Location, is_end: bool) -> Location {
        let at = (location.line, location.column);
        // An end is exclusive: one that touches the next piece still belongs to the piece before it.
        let after = self.pieces.partition_point(|p| if is_end { p.start < at } else { p.start <= at });
        let Some(piece) = self.pieces.get(after.saturating_sub(1)) else { return location };
        if let Some(until) = piece.replaced_until {
            let (line, column) = if is_end { until } else { piece.origin };
            return Location::new(line, column);
        }
        if at.0 == piece.start.0 {
            Location::new(piece.origin.0, piece.origin.1 + at.1.saturating_sub(piece.start.1))
        } else {
            Location::new(piece.origin.0 + at.0.saturating_sub(piece.start.0), at.1)
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Code,
    LineComment,
    /// Nesting depth.
    BlockComment(u32),
    /// The quote that ends it, and whether a backslash escapes.
    Quoted(char, bool),
}

struct Scanner<'a> {
    source: &'a SourceText,
    rest: &'a str,
    state: State,
    /// Last character of code, for the `E` before an escaped string.
    last: char,
    out: String,
    pieces: Vec<Piece>,
    /// Line and column of the next character to read, and of the next one to write.
    read: (u64, u64),
    written: (u64, u64),
}

fn advance(position: &mut (u64, u64), character: char) {
    if character == '\n' {
        *position = (position.0 + 1, 1);
    } else {
        position.1 += 1;
    }
}

impl<'a> Scanner<'a> {
    fn new(source: &'a SourceText) -> Self {
        let first = Piece { start: (1, 1), origin: (1, 1), replaced_until: None };
        Self {
            source,
            rest: &source.text,
            state: State::Code,
            last: ' ',
            out: String::with_capacity(source.text.len()),
            pieces: vec![first],
            read: (1, 1),
            written: (1, 1),
        }
    }

    fn run(&mut self, variables: &Variables<'_>) -> Result<()> {
        while let Some(character) = self.rest.chars().next() {
            let comment = matches!(self.state, State::LineComment | State::BlockComment(_));
            if !comment && self.rest.starts_with("$$") {
                self.replace(2, "$");
            } else if !comment && self.rest.starts_with("${") {
                self.variable(variables)?;
            } else {
                self.copy(character);
            }
        }
        Ok(())
    }

    /// Copies one character, or a pair of them that means something only together.
    fn copy(&mut self, character: char) {
        let starts = |pair: &str| self.rest.starts_with(pair);
        let (next, pair) = match self.state {
            State::Code if starts("--") => (State::LineComment, true),
            State::Code if starts("/*") => (State::BlockComment(1), true),
            State::Code => match character {
                '\'' => (State::Quoted('\'', matches!(self.last, 'e' | 'E')), false),
                '"' | '`' => (State::Quoted(character, false), false),
                _ => (State::Code, false),
            },
            State::LineComment if character == '\n' => (State::Code, false),
            State::BlockComment(depth) if starts("/*") => (State::BlockComment(depth + 1), true),
            State::BlockComment(1) if starts("*/") => (State::Code, true),
            State::BlockComment(depth) if starts("*/") => (State::BlockComment(depth - 1), true),
            // A backslash takes the character after it along, unless that is a variable's start.
            State::Quoted(_, true) if starts("\\'") || starts("\\\\") => (self.state, true),
            // A doubled quote closes and opens again: the state is right either way.
            State::Quoted(quote, escapes) if character == quote => {
                let doubled = self.rest.chars().nth(1) == Some(quote);
                (if doubled { State::Quoted(quote, escapes) } else { State::Code }, doubled)
            }
            state => (state, false),
        };
        self.state = next;
        for character in self.rest.chars().take(1 + usize::from(pair)) {
            self.rest = &self.rest[character.len_utf8()..];
            self.out.push(character);
            self.last = character;
            advance(&mut self.read, character);
            advance(&mut self.written, character);
        }
    }

    /// Replaces the next `length` bytes of the original by `value`.
    fn replace(&mut self, length: usize, value: &str) {
        let (taken, rest) = self.rest.split_at(length);
        self.rest = rest;
        let origin = self.read;
        taken.chars().for_each(|character| advance(&mut self.read, character));
        if !value.is_empty() {
            self.pieces.push(Piece { start: self.written, origin, replaced_until: Some(self.read) });
        }
        value.chars().for_each(|character| advance(&mut self.written, character));
        self.out.push_str(value);
        self.last = value.chars().next_back().unwrap_or(' ');
        self.pieces.push(Piece { start: self.written, origin: self.read, replaced_until: None });
    }

    fn variable(&mut self, variables: &Variables<'_>) -> Result<()> {
        let (line, column) = (self.read.0 as usize, self.read.1 as usize);
        let Some(end) = self.rest.find('}') else {
            return Err(Error::user("a variable lacks its closing }")
                .hint("Write ${NAME}, or $$ for a plain dollar sign.")
                .at(self.source.place(line, column, 2)));
        };
        let inner = &self.rest[2..end];
        let place = self.source.place(line, column, self.rest[..=end].chars().count());
        let (name, default) = match inner.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (inner, None),
        };
        let letters = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) || !name.chars().all(letters) {
            return Err(Error::user(format!("'{name}' is no name of a variable"))
                .hint("Write ${NAME} or ${NAME:-default}, the name in letters, digits and underscores.")
                .at(place));
        }
        let found = variables.get(name);
        let value = match (found.filter(|value| default.is_none() || !value.is_empty()), default) {
            (Some(value), _) => self.quote(value),
            (None, Some(default)) => default.to_owned(),
            (None, None) => {
                return Err(Error::user(format!("the variable {name} is not set"))
                    .hint(format!(
                        "Set it in the environment or with --set {name}=…, or give a default: ${{{name}:-…}}."
                    ))
                    .at(place));
            }
        };
        self.replace(end + 1, &value);
        Ok(())
    }

    fn quote(&self, value: String) -> String {
        match self.state {
            State::Quoted(quote, escapes) => {
                let value = if escapes { value.replace('\\', "\\\\") } else { value };
                value.replace(quote, &format!("{quote}{quote}"))
            }
            _ => value,
        }
    }
}
