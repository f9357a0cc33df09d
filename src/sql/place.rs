//! Places in SQL texts, and how an error is shown with its line and a caret.

use std::sync::Arc;

use crate::error::{Error, Place};

/// One file, or the command line.
#[derive(Debug, Clone)]
pub struct SourceText {
    pub file: Arc<str>,
    pub text: Arc<str>,
}

impl SourceText {
    pub fn new(file: &str, text: &str) -> Self {
        Self { file: file.into(), text: text.into() }
    }

    pub fn place(&self, line: usize, column: usize, width: usize) -> Place {
        Place {
            file: Arc::clone(&self.file),
            text: Arc::clone(&self.text),
            line,
            column,
            width: width.max(1),
        }
    }
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

/// An error as people read it: reason, file and line, the line with a caret, hint.
pub fn render(error: &Error) -> String {
    let mut out = format!("error: {error}\n");
    if let Some(place) = error.place() {
        let gutter = " ".repeat(place.line.to_string().len());
        let line = place.text.lines().nth(place.line - 1).unwrap_or_default();
        let shown = line.replace('\t', " ");
        let room = shown.chars().count().saturating_sub(place.column - 1).max(1);
        out.push_str(&format!("{gutter}--> {}:{}:{}\n", place.file, place.line, place.column));
        out.push_str(&format!("{gutter} |\n{} | {shown}\n", place.line));
        let caret = "^".repeat(place.width.min(room));
        out.push_str(&format!("{gutter} | {}{caret}\n", " ".repeat(place.column - 1)));
    }
    if let Some(hint) = error.hint_text() {
        out.push_str(&format!("  = hint: {hint}\n"));
    }
    out
}
