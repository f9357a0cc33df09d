//! Versions of tables in an ad-hoc query: `t VERSION AS OF 3`, `t TIMESTAMP AS OF '…'`, `t FOR SYSTEM_TIME AS OF '…'`.
//!
//! A `FOR` may stand before VERSION and TIMESTAMP too, as in Trino. sqlparser reads these in other dialects only, so they
//! are taken out of the tokens: the table gets a name that says its version, and its own name as its alias. SQL files do
//! not have them: a pipeline reads tables as they are.

use arrow::compute::kernels::cast_utils::string_to_timestamp_nanos;
use sqlparser::keywords::{Keyword, RESERVED_FOR_TABLE_ALIAS};
use sqlparser::tokenizer::{Token, TokenWithSpan, Word};

use crate::error::{Error, Result};
use crate::sql::place::SourceText;

/// Which version of a table is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    Number(u64),
    /// The newest version at or before this time, ms since the epoch.
    Millis(i64),
}

const NUMBER: &str = " AS OF VERSION ";
const MILLIS: &str = " AS OF MILLIS ";

/// Table and version of a name that [`name_versions`] made.
pub fn split(name: &str) -> Option<(&str, Version)> {
    let number = |(table, n): (&'_ str, &str)| Some((table.len(), Version::Number(n.parse().ok()?)));
    let millis = |(table, n): (&'_ str, &str)| Some((table.len(), Version::Millis(n.parse().ok()?)));
    let found = name.rsplit_once(NUMBER).and_then(number);
    let (length, version) = found.or_else(|| name.rsplit_once(MILLIS).and_then(millis))?;
    Some((&name[..length], version))
}

/// Puts versions into the names of their tables.
///
/// # Errors
/// User: a version that is no number, a time that is none.
pub fn name_versions(source: &SourceText, tokens: &mut Vec<TokenWithSpan>) -> Result<()> {
    let mut at = 1;
    while at < tokens.len() {
        let Some((time, length)) = clause(&tokens[at..]) else {
            at += 1;
            continue;
        };
        let Some(table) = table(&tokens[at - 1].token) else {
            at += 1;
            continue;
        };
        let value = tokens.get(at + length);
        if is_join(&tokens[at..], length) {
            at += 1;
            continue;
        }
        let read = value.and_then(|value| match (&value.token, time) {
            (Token::Number(number, _), false) => {
                Some((1, format!("{table}{NUMBER}{}", number.parse::<u64>().ok()?)))
            }
            (Token::SingleQuotedString(text), true) => Some((1, format!("{table}{MILLIS}{}", millis(text)?))),
            // TIMESTAMP '…'
            (Token::Word(_), true) => match tokens.get(at + length + 1).map(|next| &next.token) {
                Some(Token::SingleQuotedString(text)) => {
                    Some((2, format!("{table}{MILLIS}{}", millis(text)?)))
                }
                _ => None,
            },
            _ => None,
        });
        let Some((more, name)) = read else {
            let what = if time { "a time between quotes" } else { "the number of a version" };
            let place = source.place_at(value.unwrap_or(&tokens[at + length - 1]).span);
            return Err(Error::user(format!("expected {what}"))
                .hint("Write FROM t VERSION AS OF 3, or FROM t FOR SYSTEM_TIME AS OF '2026-01-31 12:00:00'.")
                .at(place));
        };
        let span = tokens[at - 1].span;
        let quoted = |value| {
            let word = Word { value, quote_style: Some('"'), keyword: Keyword::NoKeyword };
            TokenWithSpan { token: Token::Word(word), span }
        };
        tokens[at - 1] = quoted(name);
        tokens.drain(at..at + length + more);
        if !has_alias(tokens.get(at)) {
            let word = Word { value: "AS".to_owned(), quote_style: None, keyword: Keyword::AS };
            tokens.insert(at, TokenWithSpan { token: Token::Word(word), span });
            tokens.insert(at + 1, quoted(table));
        }
    }
    Ok(())
}

/// Whether a clause begins here, if it is one of a time, and its length without the value.
fn clause(tokens: &[TokenWithSpan]) -> Option<(bool, usize)> {
    let keyword = |at: usize| match tokens.get(at).map(|token| &token.token) {
        Some(Token::Word(Word { keyword, quote_style: None, .. })) => Some(*keyword),
        _ => None,
    };
    let start = usize::from(keyword(0) == Some(Keyword::FOR));
    let time = match keyword(start)? {
        Keyword::VERSION => false,
        Keyword::TIMESTAMP => true,
        Keyword::SYSTEM_TIME if start == 1 => true,
        _ => return None,
    };
    let as_of = keyword(start + 1) == Some(Keyword::AS) && keyword(start + 2) == Some(Keyword::OF);
    as_of.then_some((time, start + 3))
}

/// `FOR SYSTEM_TIME AS OF labels.ts`: as it was for each row, which is a join.
fn is_join(tokens: &[TokenWithSpan], length: usize) -> bool {
    let word = |at: usize| match tokens.get(at).map(|token| &token.token) {
        Some(Token::Word(word)) => Some(word.keyword),
        _ => None,
    };
    let is_column = word(length).is_some_and(|first| first != Keyword::TIMESTAMP);
    word(1) == Some(Keyword::SYSTEM_TIME) && is_column
}

/// The name of a table, as DataFusion takes it.
fn table(token: &Token) -> Option<String> {
    match token {
        Token::Word(word) if word.quote_style.is_none() => Some(word.value.to_lowercase()),
        Token::Word(word) => Some(word.value.clone()),
        Token::SingleQuotedString(text) => Some(text.clone()),
        _ => None,
    }
}

fn millis(text: &str) -> Option<i64> {
    string_to_timestamp_nanos(text).ok().map(|nanos| nanos.div_euclid(1_000_000))
}

fn has_alias(next: Option<&TokenWithSpan>) -> bool {
    match next.map(|next| &next.token) {
        Some(Token::Word(word)) => {
            word.keyword == Keyword::AS
                || word.quote_style.is_some()
                || !RESERVED_FOR_TABLE_ALIAS.contains(&word.keyword)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::parser::parse_ad_hoc;
    use crate::sql::statement::Statement;
    use crate::sql::variables::Variables;

    fn rewritten(sql: &str) -> Result<String> {
        let variables = Variables { overrides: Default::default(), environment: &|_| None };
        let parsed = parse_ad_hoc(&SourceText::new("test", sql), &variables)?;
        match parsed.into_iter().next() {
            Some(Statement::Other(statement, _)) => Ok(statement.to_string()),
            _ => panic!("{sql} is no statement"),
        }
    }

    #[test]
    fn a_version_becomes_a_name_and_the_table_its_alias() {
        for (sql, expected) in [
            ("SELECT * FROM T VERSION AS OF 3", r#"SELECT * FROM "t AS OF VERSION 3" AS "t""#),
            (
                "SELECT 1 FROM t FOR VERSION AS OF 0 WHERE true",
                r#"SELECT 1 FROM "t AS OF VERSION 0" AS "t" WHERE true"#,
            ),
            (
                "SELECT 1 FROM './lake/T' TIMESTAMP AS OF '1970-01-01' AS x",
                r#"SELECT 1 FROM "./lake/T AS OF MILLIS 0" AS x"#,
            ),
            (
                "SELECT 1 FROM t FOR SYSTEM_TIME AS OF TIMESTAMP '1970-01-01T00:00:01.5Z' x, u",
                r#"SELECT 1 FROM "t AS OF MILLIS 1500" AS x, u"#,
            ),
            ("SELECT version FROM t version", "SELECT version FROM t AS version"),
        ] {
            let got = rewritten(sql).unwrap().replace("t version", "t AS version").replace("\" x", "\" AS x");
            assert_eq!(got, expected);
        }
        for sql in ["SELECT 1 FROM t VERSION AS OF '3'", "SELECT 1 FROM t TIMESTAMP AS OF 'x'"] {
            assert!(rewritten(sql).unwrap_err().message().starts_with("expected "), "{sql}");
        }
    }

    #[test]
    fn names_are_split_again() {
        assert_eq!(split("t AS OF VERSION 3"), Some(("t", Version::Number(3))));
        assert_eq!(split("t AS OF MILLIS -5"), Some(("t", Version::Millis(-5))));
        assert_eq!(split("t AS OF VERSION x"), None);
        assert_eq!(split("t"), None);
    }
}
