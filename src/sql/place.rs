//! Places in a SQL text, and how an error with a place is shown to people.

use std::fmt::Write;
use std::sync::Arc;

use sqlparser::tokenizer::Span;

use crate::error::{Error, Place};

/// One file of SQL, or what was given on the command line.
#[derive(Debug, Clone)]
pub struct SourceText {
    /// Path as the user gave it, or `<command line>`.
    pub file: Arc<str>,
    pub text: Arc<str>,
}

impl SourceText {
    pub fn new(file: &str, text: &str) -> Self {
        Self { file: file.into(), text: text.into() }
    }

    /// A place by 1-based line and column, counted in characters.
    pub fn place(&self, line: usize, column: usize, width: usize) -> Place {
        Place { file: self.file.clone(), text: self.text.clone(), line, column, width: width.max(1) }
    }

    /// The place of a span of the original text; the empty span is the end of the text.
    pub fn place_at(&self, span: Span) -> Place {
        if span.start.line == 0 {
            let line = self.text.lines().count().max(1);
            let column = self.text.lines().last().map_or(0, |last| last.chars().count()) + 1;
            return self.place(line, column, 1);
        }
        let (line, column) = (span.start.line as usize, span.start.column as usize);
        let width = if span.end.line == span.start.line {
            span.end.column.saturating_sub(span.start.column) as usize
        } else {
            let length = self.text.lines().nth(line.saturating_sub(1)).map_or(0, |text| text.chars().count());
            (length + 1).saturating_sub(column)
        };
        self.place(line, column, width)
    }
}

/// The place of a span in the same text as `like`: for errors found while planning a statement whose place is known.
pub fn place_of_span(like: &Place, span: Span) -> Place {
    if span.start.line == 0 {
        return like.clone();
    }
    SourceText { file: like.file.clone(), text: like.text.clone() }.place_at(span)
}

/// The first whole word `word` (any case) from a statement's place to its `;`.
pub fn find_word(from: &Place, word: &str) -> Option<Place> {
    if word.is_empty() {
        return None;
    }
    for (number, line) in from.text.lines().enumerate().skip(from.line - 1) {
        let code = line.split("--").next().unwrap_or_default();
        let skip = if number + 1 == from.line { from.column - 1 } else { 0 };
        let mut start = 0;
        for piece in code.split_inclusive(|c: char| !(c.is_alphanumeric() || c == '_')) {
            let name = piece.trim_end_matches(|c: char| !(c.is_alphanumeric() || c == '_'));
            if start >= skip && name.eq_ignore_ascii_case(word) {
                let width = name.chars().count();
                return Some(Place { line: number + 1, column: start + 1, width, ..from.clone() });
            }
            start += piece.chars().count();
        }
        if code.chars().skip(skip).any(|c| c == ';') {
            return None;
        }
    }
    None
}

/// An error as the command line shows it: message, the line of SQL with a caret, hint; each line ends.
pub fn render(error: &Error) -> String {
    let mut out = format!("error: {error}");
    let mut gutter = 1;
    if let Some(place) = error.place() {
        let number = place.line.to_string();
        gutter = number.len();
        let blank = " ".repeat(gutter);
        let line = masked(place.text.lines().nth(place.line.saturating_sub(1)).unwrap_or(""));
        let (shown, before, width) = underline(&line, place.column, place.width);
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            "\n{blank}--> {}:{}:{}\n{blank} |\n{number} | {shown}\n{blank} | {}{}",
            place.file,
            place.line,
            place.column,
            " ".repeat(before),
            "^".repeat(width),
        );
    }
    if let Some(hint) = error.hint_text() {
        let _ = write!(out, "\n{} = hint: {hint}", " ".repeat(gutter));
    }
    out.push('\n');
    out
}

/// The line with credentials as stars, one per character: those of URLs, and what is written as a password.
fn masked(line: &str) -> String {
    let mut characters: Vec<char> = line.chars().collect();
    let lower: Vec<char> = line.chars().map(|c| c.to_ascii_lowercase()).collect();
    let after = |word: &str| {
        let word: Vec<char> = word.chars().collect();
        let ends = (0..lower.len()).filter(|at| lower[*at..].starts_with(&word)).map(|at| at + word.len());
        ends.collect::<Vec<_>>()
    };
    let mut hide = |from: usize, to: usize| characters[from..to].fill('*');
    for start in after("://") {
        let length = lower[start..].iter().take_while(|c| !"/?'\" ".contains(**c)).count();
        if let Some(at) = lower[start..start + length].iter().rposition(|c| *c == '@') {
            hide(start, start + at);
        }
    }
    for start in after("password") {
        // password = '…', or with quotes around the key; secret('…') says where it is kept.
        let quote = lower[start..].iter().take_while(|c| "' =".contains(**c)).count();
        let begins = lower[start..start + quote].iter().rposition(|c| *c == '\'');
        let equals = lower[start..start + quote].iter().position(|c| *c == '=');
        if let (Some(begins), Some(equals)) = (begins, equals)
            && begins > equals
        {
            let from = start + begins + 1;
            let length = lower[from..].iter().take_while(|c| **c != '\'').count();
            hide(from, from + length);
        }
    }
    characters.into_iter().collect()
}

const TAB: usize = 4;

/// The line with tabs as blanks, and where its underline starts and how long it is, within the line.
fn underline(line: &str, column: usize, width: usize) -> (String, usize, usize) {
    let mut shown = String::with_capacity(line.len());
    let (mut before, mut under) = (0, 0);
    for (at, character) in line.chars().enumerate() {
        let size = if character == '\t' { TAB } else { 1 };
        match character {
            '\t' => shown.push_str("    "),
            other if other.is_control() => shown.push(' '),
            other => shown.push(other),
        }
        if at + 1 < column {
            before += size;
        } else if at + 1 < column.saturating_add(width) {
            under += size;
        }
    }
    (shown.trim_end().to_owned(), before, under.max(1))
}

#[cfg(test)]
mod tests {
    use super::masked;

    #[test]
    fn credentials_of_a_line_are_stars() {
        for (line, shown) in [
            ("location = 's3://AKIA:hush@b/x@y', n = 1", "location = 's3://*********@b/x@y', n = 1"),
            ("url = 'redis://:pä@h', other = 'a@b'", "url = 'redis://***@h', other = 'a@b'"),
            ("kafka.sasl.password = 'hush', key = 'k'", "kafka.sasl.password = '****', key = 'k'"),
            ("'kafka.sasl.password'='hush'", "'kafka.sasl.password'='****'"),
            ("password = secret('env:NAME'), a = 'b'", "password = secret('env:NAME'), a = 'b'"),
            ("PASSWORD = 'hush", "PASSWORD = '****"),
            ("location = 's3://b/x', mail = 'a@b.c'", "location = 's3://b/x', mail = 'a@b.c'"),
            ("SELECT password FROM t -- '", "SELECT password FROM t -- '"),
        ] {
            assert_eq!(masked(line), shown);
        }
    }
}
