//! `${VAR}` and `${VAR:-default}` in code and in strings, not in comments; `$$` is a dollar sign.
//!
//! A substitution keeps the line structure, so a place in the substituted text maps back by columns alone.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::sql::place::SourceText;

/// Where variables come from: `--set` first, then the environment.
pub struct Variables<'a> {
    pub overrides: BTreeMap<String, String>,
    pub environment: &'a dyn Fn(&str) -> Option<String>,
}

impl Variables<'_> {
    fn get(&self, name: &str) -> Option<String> {
        self.overrides.get(name).cloned().or_else(|| (self.environment)(name))
    }
}

/// A text with its variables replaced.
#[derive(Debug, Clone)]
pub struct Substituted {
    pub text: String,
    /// (line, first column after the replacement, columns added), in order.
    shifts: Vec<(usize, usize, isize)>,
}

impl Substituted {
    /// The column of the original text.
    pub fn original_column(&self, line: usize, column: usize) -> usize {
        let on_line = self.shifts.iter().filter(|(l, after, _)| *l == line && *after <= column);
        let added: isize = on_line.map(|(_, _, added)| added).sum();
        usize::try_from(column as isize - added).unwrap_or(1).max(1)
    }
}

/// # Errors
/// A user error at its place: a variable that is not set and has no default, an unclosed `${`.
pub fn substitute(source: &SourceText, variables: &Variables<'_>) -> Result<Substituted> {
    let chars: Vec<char> = source.text.chars().collect();
    let mut out = Substituted { text: String::with_capacity(source.text.len()), shifts: Vec::new() };
    let (mut at, mut line, mut column, mut start_of_line) = (0, 1, 1, 0);
    let mut string = false;
    while at < chars.len() {
        let rest = &chars[at..];
        let taken = if !string && (rest.starts_with(&['-', '-']) || rest.starts_with(&['/', '*'])) {
            let length = comment(rest);
            out.text.extend(&rest[..length]);
            length
        } else if rest.starts_with(&['$', '$']) {
            out.text.push('$');
            out.shifts.push((line, out.text.chars().count() - start_of_line + 1, -1));
            2
        } else if rest.starts_with(&['$', '{']) {
            let Some(end) = rest.iter().position(|c| *c == '}') else {
                return Err(
                    Error::user("a variable lacks its closing brace").at(source.place(line, column, 2))
                );
            };
            let inner: String = rest[2..end].iter().collect();
            let value = value_of(&inner, variables).map_err(|e| e.at(source.place(line, column, end + 1)))?;
            out.text.push_str(&value);
            let added = value.chars().count() as isize - (end as isize + 1);
            out.shifts.push((line, out.text.chars().count() - start_of_line + 1, added));
            end + 1
        } else {
            string ^= rest[0] == '\'';
            out.text.push(rest[0]);
            1
        };
        for c in &chars[at..at + taken] {
            (line, column) = if *c == '\n' { (line + 1, 1) } else { (line, column + 1) };
            if *c == '\n' {
                start_of_line = out.text.rfind('\n').map_or(0, |i| out.text[..=i].chars().count());
            }
        }
        at += taken;
    }
    Ok(out)
}

fn comment(rest: &[char]) -> usize {
    if rest[0] == '-' {
        return rest.iter().position(|c| *c == '\n').unwrap_or(rest.len());
    }
    rest.windows(2).skip(2).position(|pair| pair == ['*', '/']).map_or(rest.len(), |end| end + 4)
}

fn value_of(inner: &str, variables: &Variables<'_>) -> Result<String> {
    let (name, default) = match inner.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inner, None),
    };
    let value = variables.get(name).filter(|value| default.is_none() || !value.is_empty());
    let value = value.or_else(|| default.map(str::to_owned)).ok_or_else(|| {
        Error::user(format!("the variable {name} is not set"))
            .hint(format!("Set it in the environment, pass --set {name}=…, or write ${{{name}:-default}}."))
    })?;
    Ok(value.replace(['\n', '\r'], " "))
}
