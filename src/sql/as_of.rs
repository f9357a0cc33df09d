//! Point-in-time joins: `labels JOIN features FOR SYSTEM_TIME AS OF labels.ts ON …`.
//!
//! sqlparser reads the clause in other dialects only, so it moves in the tokens, from behind the table into the condition
//! of the JOIN, as a call of [`FUNCTION`]: `labels JOIN features ON system_time_as_of(labels.ts) AND …`. The plan gives it
//! its meaning ([`crate::plan`], [`crate::batch`]). A clause with a literal is left as it is: it names a version of a table.

use sqlparser::keywords::Keyword;
use sqlparser::tokenizer::{Span, Token, TokenWithSpan, Word};

use crate::error::{Error, Result};
use crate::sql::place::SourceText;

/// What stands in the condition of a JOIN for its FOR SYSTEM_TIME AS OF.
pub const FUNCTION: &str = "system_time_as_of";

const CLAUSE: [Keyword; 4] = [Keyword::FOR, Keyword::SYSTEM_TIME, Keyword::AS, Keyword::OF];

/// Moves every clause into its JOIN's condition.
///
/// # Errors
/// User: a clause behind a table that is not joined with ON.
pub fn move_moments(source: &SourceText, tokens: &mut Vec<TokenWithSpan>) -> Result<()> {
    let mut at = 0;
    while at < tokens.len() {
        let moment = match begins(tokens, at) {
            true => moment(tokens, at + CLAUSE.len()),
            false => None,
        };
        let Some(end) = moment else {
            at += 1;
            continue;
        };
        let Some(on) = condition(tokens, end) else {
            return Err(Error::user("FOR SYSTEM_TIME AS OF a time of each row belongs to a JOIN … ON")
                .hint("Write labels JOIN features FOR SYSTEM_TIME AS OF labels.ts ON labels.user_id = features.user_id.")
                .at(source.place_at(tokens[at].span)));
        };
        let span = tokens[at].span;
        let moment: Vec<TokenWithSpan> = tokens[at + CLAUSE.len()..end].to_vec();
        let call = [word(FUNCTION, Keyword::NoKeyword, span), symbol(Token::LParen, span)];
        let and = [symbol(Token::RParen, span), word("AND", Keyword::AND, span)];
        tokens.splice(on + 1..on + 1, call.into_iter().chain(moment).chain(and));
        tokens.drain(at..end);
        at += 1;
    }
    Ok(())
}

fn keyword(tokens: &[TokenWithSpan], at: usize) -> Option<Keyword> {
    match tokens.get(at).map(|token| &token.token) {
        Some(Token::Word(Word { keyword, quote_style: None, .. })) => Some(*keyword),
        _ => None,
    }
}

fn begins(tokens: &[TokenWithSpan], at: usize) -> bool {
    CLAUSE.iter().enumerate().all(|(offset, word)| keyword(tokens, at + offset) == Some(*word))
}

/// The end of a time that depends on the row: a column, a call, anything in parentheses. `None`: a literal.
fn moment(tokens: &[TokenWithSpan], start: usize) -> Option<usize> {
    let token = |at: usize| tokens.get(at).map(|token| &token.token);
    let mut at = start;
    while let Some(Token::Word(_)) = token(at) {
        match token(at + 1) {
            Some(Token::Period) => at += 2,
            Some(Token::LParen) => return closed(tokens, at + 1),
            Some(Token::SingleQuotedString(_)) => return None,
            _ => return Some(at + 1),
        }
    }
    match token(at) {
        Some(Token::LParen) if at == start => closed(tokens, at),
        _ => None,
    }
}

/// Behind the parenthesis that closes the one here.
fn closed(tokens: &[TokenWithSpan], open: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, token) in tokens.iter().enumerate().skip(open) {
        match token.token {
            Token::LParen => depth += 1,
            Token::RParen if depth == 1 => return Some(at + 1),
            Token::RParen => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

/// The ON behind an alias, if there is one.
fn condition(tokens: &[TokenWithSpan], at: usize) -> Option<usize> {
    let is_on = |at: usize| keyword(tokens, at) == Some(Keyword::ON);
    let alias = match keyword(tokens, at) {
        Some(Keyword::AS) => 2,
        Some(Keyword::ON) => 0,
        _ => 1,
    };
    is_on(at + alias).then_some(at + alias)
}

fn word(text: &str, keyword: Keyword, span: Span) -> TokenWithSpan {
    symbol(Token::Word(Word { value: text.to_owned(), quote_style: None, keyword }), span)
}

fn symbol(token: Token, span: Span) -> TokenWithSpan {
    TokenWithSpan { token, span }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::parser::parse;
    use crate::sql::statement::Statement;
    use crate::sql::variables::Variables;

    fn rewritten(sql: &str) -> Result<String> {
        let variables = Variables { overrides: Default::default(), environment: &|_| None };
        match parse(&SourceText::new("test", sql), &variables)?.into_iter().next() {
            Some(Statement::Other(statement, _)) => Ok(statement.to_string()),
            _ => panic!("{sql} is no query"),
        }
    }

    #[test]
    fn the_clause_moves_into_the_condition() {
        for (sql, expected) in [
            (
                "SELECT 1 FROM l JOIN f FOR SYSTEM_TIME AS OF l.ts ON l.k = f.k WHERE true",
                "SELECT 1 FROM l JOIN f ON system_time_as_of(l.ts) AND l.k = f.k WHERE true",
            ),
            (
                "SELECT 1 FROM l LEFT JOIN f FOR SYSTEM_TIME AS OF date_trunc('day', ts) AS x ON l.k = x.k
                 LEFT JOIN g FOR SYSTEM_TIME AS OF (l.ts - INTERVAL '1 day') y ON l.k = y.k",
                "SELECT 1 FROM l LEFT JOIN f x ON system_time_as_of(date_trunc('day', ts)) AND l.k = x.k \
                 LEFT JOIN g y ON system_time_as_of((l.ts - INTERVAL '1 day')) AND l.k = y.k",
            ),
        ] {
            assert_eq!(rewritten(sql).unwrap().replace(" AS x ", " x ").replace(" AS y ", " y "), expected);
        }
    }

    #[test]
    fn without_a_condition_there_is_no_join() {
        for sql in [
            "SELECT 1 FROM l JOIN f FOR SYSTEM_TIME AS OF l.ts USING (k)",
            "SELECT 1 FROM f FOR SYSTEM_TIME AS OF ts",
        ] {
            let error = rewritten(sql).unwrap_err();
            assert!(error.message().contains("belongs to a JOIN"), "{error}");
            assert_eq!(error.place().unwrap().column, sql.find("FOR").unwrap() + 1);
        }
    }
}
