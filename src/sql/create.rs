//! The grammar of our `CREATE` statements; each is in the docs of its type in [`super::statement`].

use arrow::datatypes::DataType;
use sqlparser::ast::{BinaryOperator, Expr};
use sqlparser::keywords::Keyword;
use sqlparser::tokenizer::{Token, Word};

use crate::error::{Error, Place, Result};
use crate::sql::options::{OptionValue, Options, nearest};
use crate::sql::parser::{Reader, normal};
use crate::sql::statement::{
    Column, ComputedColumn, CreateSink, CreateSource, CreateTable, CreateView, SinkInput, Statement,
    Watermark,
};
use crate::sql::{interval, types};
use crate::stream::timestamp_type;

const OURS: [&str; 5] = ["SOURCE", "TABLE", "VIEW", "SINK", "SCHEDULE"];
/// What DataFusion itself can create.
const THEIRS: [&str; 8] =
    ["EXTERNAL", "UNBOUNDED", "FUNCTION", "SCHEMA", "DATABASE", "TEMPORARY", "TEMP", "INDEX"];

/// What stands between the parentheses of a source or table.
#[derive(Default)]
struct Columns {
    columns: Vec<Column>,
    computed: Vec<ComputedColumn>,
    watermark: Option<Watermark>,
}

impl Reader<'_> {
    /// From `CREATE` on.
    pub(super) fn create(&mut self, place: Place) -> Result<Statement> {
        let or_replace = self.is_word(1, "OR") && self.is_word(2, "REPLACE");
        let at = if or_replace { 3 } else { 1 };
        let what = self.word(at).unwrap_or_default().to_ascii_uppercase();
        let theirs = THEIRS.contains(&what.as_str()) || (what == "TABLE" && self.is_create_table_as(at + 1));
        if theirs {
            return Ok(Statement::Other(Box::new(self.delegate(&place)?), place));
        }
        if !OURS.contains(&what.as_str()) {
            return Err(self.unknown_create(at, &what));
        }
        self.skip(at + 1);
        if self.is_word(0, "IF") && self.is_word(1, "NOT") {
            return Err(Error::user("IF NOT EXISTS is not supported")
                .hint("A name is declared once; CREATE OR REPLACE declares it again.")
                .at(self.place(&self.peek(0))));
        }
        match what.as_str() {
            "SOURCE" => self.source(or_replace, place),
            "TABLE" => self.table(or_replace, place),
            "VIEW" => self.view(or_replace, place),
            "SINK" => self.sink(or_replace, place),
            _ => self.schedule(or_replace, place),
        }
    }

    fn unknown_create(&self, at: usize, what: &str) -> Error {
        let token = self.peek(at);
        if what.is_empty() {
            return self.expected(OURS.join(", ").as_str(), &token);
        }
        let known = OURS.map(str::to_owned);
        let hint = match (what, nearest(what, &known)) {
            ("MATERIALIZED", _) => "Write CREATE VIEW, and CREATE SINK to materialise it.".to_owned(),
            (_, Some(near)) => format!("Did you mean CREATE {near}?"),
            _ => format!("Known are CREATE {}.", OURS.join(", ")),
        };
        Error::user(format!("CREATE {what} is not known")).hint(hint).at(self.place(&token))
    }

    /// `CREATE TABLE n [(…)] AS …`, which DataFusion runs. `at` is where the name begins.
    fn is_create_table_as(&self, mut at: usize) -> bool {
        let mut depth = 0_usize;
        loop {
            match self.peek(at).token {
                Token::EOF => return false,
                Token::LParen => depth += 1,
                Token::RParen => depth = depth.saturating_sub(1),
                _ if depth == 0 && self.is_word(at, "WITH") => return false,
                _ if depth == 0 && self.is_word(at, "AS") => return true,
                _ => {}
            }
            at += 1;
        }
    }

    fn source(&mut self, or_replace: bool, place: Place) -> Result<Statement> {
        let name = self.name()?;
        let Columns { columns, computed, watermark } = self.columns(&name)?;
        let options = self.options(&format!("source {name}"))?;
        let source = CreateSource { name, or_replace, columns, computed, watermark, options, place };
        Ok(Statement::CreateSource(source))
    }

    fn table(&mut self, or_replace: bool, place: Place) -> Result<Statement> {
        let name = self.name()?;
        let mut declared = Columns::default();
        if self.peek(0).token == Token::LParen {
            declared = self.columns(&name)?;
        }
        let refused = declared.computed.first().map(|c| ("computed column", &c.place));
        let refused = refused.or(declared.watermark.as_ref().map(|w| ("watermark", &w.place)));
        if let Some((what, at)) = refused {
            return Err(Error::user(format!("the table {name} is bounded and has no {what}"))
                .hint("Compute it in a view over the table, or declare a source.")
                .at(at.clone()));
        }
        let options = self.options(&format!("table {name}"))?;
        Ok(Statement::CreateTable(CreateTable {
            name,
            or_replace,
            columns: declared.columns,
            options,
            place,
        }))
    }

    fn view(&mut self, or_replace: bool, place: Place) -> Result<Statement> {
        let name = self.name()?;
        if self.peek(0).token == Token::LParen {
            return Err(Error::user("a view has no list of columns")
                .hint("Name the columns in the SELECT: expression AS name.")
                .at(self.place(&self.peek(0))));
        }
        if self.is_word(0, "WITH") || self.trailing_options().is_some() {
            let at = self.trailing_options().unwrap_or_else(|| self.inner.parser.index());
            return Err(Error::user("a view has no options")
                .hint("Options belong to sources and sinks; a view is a query by name.")
                .at(self.tokens.get(at).map_or_else(|| place.clone(), |token| self.place(token))));
        }
        self.expect_word("AS")?;
        let query = self.query(&place)?;
        let sql = query.to_string();
        Ok(Statement::CreateView(CreateView { name, or_replace, query, sql, place }))
    }

    fn sink(&mut self, or_replace: bool, place: Place) -> Result<Statement> {
        let name = self.name()?;
        let owner = format!("sink {name}");
        let (input, options) = if self.take_word("FROM") {
            let token = self.peek(0);
            if token.token == Token::LParen {
                let hint = format!("Write CREATE SINK {name} AS SELECT … WITH (…).");
                return Err(self.expected("the name of a view", &token).hint(hint));
            }
            let input = SinkInput::Relation { place: self.place(&token), name: self.name()? };
            (input, self.options(&owner)?)
        } else {
            let before = if self.is_word(0, "WITH") { Some(self.options(&owner)?) } else { None };
            let found = self.peek(0);
            if !self.take_word("AS") {
                return Err(self
                    .expected("FROM or AS", &found)
                    .hint("Write CREATE SINK n FROM view WITH (…), or CREATE SINK n AS SELECT … WITH (…)."));
            }
            let query = self.sink_query(before.is_some(), &place)?;
            let options = match before {
                Some(options) => options,
                None => self.options(&owner)?,
            };
            (SinkInput::Query(query), options)
        };
        Ok(Statement::CreateSink(CreateSink { name, or_replace, input, options, place }))
    }

    /// The query of a sink, up to its options. sqlparser would take `FROM t WITH (…)` for hints about the table, so
    /// the options are cut off first.
    fn sink_query(&mut self, has_options: bool, place: &Place) -> Result<Box<sqlparser::ast::Query>> {
        let start = self.inner.parser.index();
        let end = match self.trailing_options() {
            Some(at) if !has_options && at >= start => at,
            _ => self.tokens.len(),
        };
        let mut part = Reader::new(self.source, &self.tokens[start..end])?;
        let query = part.query(place)?;
        part.expect_end()?;
        self.skip(end - start);
        Ok(query)
    }

    /// Where the `WITH` of a `WITH (…)` stands that ends the statement.
    pub(super) fn trailing_options(&self) -> Option<usize> {
        let mut depth = 0_usize;
        for (at, token) in self.tokens.iter().enumerate().rev() {
            match token.token {
                Token::RParen => depth += 1,
                Token::LParen => depth = depth.checked_sub(1)?,
                _ => {}
            }
            if depth == 0 {
                let with = |t: &&sqlparser::tokenizer::TokenWithSpan| matches!(&t.token, Token::Word(word) if word.keyword == Keyword::WITH);
                let before = at.checked_sub(1)?;
                return self.tokens.get(before).filter(with).map(|_| before);
            }
        }
        None
    }

    fn columns(&mut self, of: &str) -> Result<Columns> {
        let mut columns = Columns::default();
        self.expect(&Token::LParen, "a list of columns")?;
        loop {
            self.column_or_watermark(of, &mut columns)?;
            if !self.inner.parser.consume_token(&Token::Comma) {
                break;
            }
        }
        self.expect(&Token::RParen, "a comma or the closing parenthesis of the columns")?;
        self.check_watermark(of, &columns)?;
        Ok(columns)
    }

    fn column_or_watermark(&mut self, of: &str, columns: &mut Columns) -> Result<()> {
        let place = self.place(&self.peek(0));
        if self.is_word(0, "WATERMARK") && self.is_word(1, "FOR") {
            self.skip(2);
            if columns.watermark.is_some() {
                return Err(Error::user(format!("{of} has two watermarks")).hint("Leave one out.").at(place));
            }
            columns.watermark = Some(self.watermark(place)?);
            return Ok(());
        }
        let constraint = self.is_word(0, "CONSTRAINT")
            || (self.is_word(0, "PRIMARY") && self.is_word(1, "KEY"))
            || (self.is_word(0, "FOREIGN") && self.is_word(1, "KEY"))
            || ((self.is_word(0, "UNIQUE") || self.is_word(0, "CHECK"))
                && self.peek(1).token == Token::LParen);
        if constraint {
            return Err(Error::user(format!("{of} cannot have constraints"))
                .hint("Leave it out; the key of a sink is its option key = '…'.")
                .at(place));
        }
        let name = self.name()?;
        let twice =
            columns.columns.iter().any(|c| c.name == name) || columns.computed.iter().any(|c| c.name == name);
        if twice {
            return Err(Error::user(format!("{of} declares the column {name} twice")).at(place));
        }
        self.column(name, place, columns)
    }

    /// `name TYPE [NOT NULL | NULL]`, `name [TYPE] [GENERATED ALWAYS] AS (expr)`.
    fn column(&mut self, name: String, place: Place, columns: &mut Columns) -> Result<()> {
        let untyped = self.is_word(0, "AS") || self.is_word(0, "GENERATED");
        let data_type = if untyped { None } else { Some(self.data_type(&name)?) };
        if self.is_word(0, "GENERATED") && self.is_word(1, "ALWAYS") {
            self.skip(2);
        }
        let token = self.peek(0);
        if self.take_word("AS") {
            let expr = match self.expr()? {
                Expr::Nested(inner) => *inner,
                bare => bare,
            };
            let _ = self.take_word("STORED") || self.take_word("VIRTUAL");
            columns.computed.push(ComputedColumn { name, data_type, expr, place });
            return Ok(());
        }
        let Some(data_type) = data_type else { return Err(self.expected("AS (expression)", &token)) };
        let mut nullable = true;
        if self.is_word(0, "NOT") && self.is_word(1, "NULL") {
            self.skip(2);
            nullable = false;
        } else {
            self.take_word("NULL");
        }
        if let Some(word) = self.word(0) {
            return Err(Error::user(format!("the column {name} cannot be {}", word.to_ascii_uppercase()))
                .hint("A column may be NOT NULL, NULL or AS (expression); the key of a sink is its option key = '…'.")
                .at(self.place(&self.peek(0))));
        }
        columns.columns.push(Column { name, data_type, nullable, place });
        Ok(())
    }

    fn data_type(&mut self, column: &str) -> Result<DataType> {
        let token = self.peek(0);
        let parsed = self.inner.parser.parse_data_type();
        let sql = parsed.map_err(|error| self.error(&error).hint(types::SUPPORTED))?;
        types::arrow_type(&sql).map_err(|(message, hint)| {
            Error::user(message).context(format!("column {column}")).hint(hint).at(self.place(&token))
        })
    }

    fn watermark(&mut self, place: Place) -> Result<Watermark> {
        let column = self.name()?;
        self.expect_word("AS")?;
        let token = self.peek(0);
        let expr = self.expr()?;
        let is_column = |expr: &Expr| matches!(expr, Expr::Identifier(name) if normal(name) == column);
        let delay = match &expr {
            expr if is_column(expr) => Some(0),
            Expr::BinaryOp { left, op: BinaryOperator::Minus, right } if is_column(left) => {
                Some(interval_micros(right).map_err(|error| error.at(self.place(&token)))?)
            }
            _ => None,
        };
        let Some(delay_micros) = delay.filter(|delay| *delay >= 0) else {
            let hint = format!("Write WATERMARK FOR {column} AS {column} - INTERVAL '5 seconds'.");
            let message = format!("the watermark {expr} is not understood");
            return Err(Error::user(message).hint(hint).at(self.place(&token)));
        };
        Ok(Watermark { column, delay_micros, place })
    }

    fn check_watermark(&self, of: &str, columns: &Columns) -> Result<()> {
        let Some(watermark) = &columns.watermark else { return Ok(()) };
        let column = &watermark.column;
        let declared = columns.columns.iter().map(|c| (&c.name, Some(&c.data_type)));
        let mut all = declared.chain(columns.computed.iter().map(|c| (&c.name, c.data_type.as_ref())));
        let error = match all.clone().find(|(name, _)| *name == column) {
            Some((_, Some(data_type))) if *data_type != timestamp_type() => {
                Error::user(format!("the watermark's column {column} is no TIMESTAMP"))
                    .hint("Add a computed column: event_time TIMESTAMP AS (to_timestamp_millis(column)).")
            }
            Some(_) => return Ok(()),
            None => {
                let names: Vec<String> = all.by_ref().map(|(name, _)| name.clone()).collect();
                let hint = match nearest(column, &names) {
                    Some(near) => format!("Did you mean {near}?"),
                    None => format!("Its columns are {}.", names.join(", ")),
                };
                Error::user(format!("{of} has no column {column} for its watermark")).hint(hint)
            }
        };
        Err(error.at(watermark.place.clone()))
    }

    /// `WITH (key = value, …)`.
    pub(super) fn options(&mut self, owner: &str) -> Result<Options> {
        self.expect_word("WITH")?;
        self.expect(&Token::LParen, "options in parentheses")?;
        let mut entries: Vec<(String, OptionValue)> = Vec::new();
        loop {
            let place = self.place(&self.peek(0));
            let key = self.option_key()?;
            let place = Place { width: place.width.max(key.chars().count()), ..place };
            self.expect(&Token::Eq, &format!("= behind the option {key}"))?;
            let (value, secret) = self.option_value(&key)?;
            if let Some((_, first)) = entries.iter().find(|(known, _)| *known == key) {
                let line = first.place.as_ref().map_or(0, |place| place.line);
                return Err(Error::user(format!("{owner} has the option {key} twice, first in line {line}"))
                    .hint("Leave one out.")
                    .at(place));
            }
            entries.push((key, OptionValue { value, place: Some(place), secret }));
            if !self.inner.parser.consume_token(&Token::Comma) {
                break;
            }
        }
        self.expect(&Token::RParen, "a comma or the closing parenthesis of the options")?;
        Ok(Options::new(owner, entries))
    }

    /// `topic`, `kafka.fetch.max.bytes`, or quoted as Flink has it.
    fn option_key(&mut self) -> Result<String> {
        let mut key = String::new();
        loop {
            let token = self.inner.parser.next_token();
            match token.token {
                Token::SingleQuotedString(text) if key.is_empty() => return Ok(text),
                Token::Word(Word { value, quote_style: Some(_), .. }) => key.push_str(&value),
                Token::Word(word) => key.push_str(&word.value.to_ascii_lowercase()),
                Token::Number(digits, _) if !key.is_empty() => key.push_str(&digits),
                _ => return Err(self.expected("the name of an option", &token)),
            }
            if self.inner.parser.consume_token(&Token::Period) {
                key.push('.');
            } else if self.inner.parser.consume_token(&Token::Minus) {
                key.push('-');
            } else {
                return Ok(key);
            }
        }
    }

    /// The value's text, and whether it is a secret's reference.
    fn option_value(&mut self, key: &str) -> Result<(String, bool)> {
        if self.is_word(0, "SECRET") && self.peek(1).token == Token::LParen {
            return self.secret();
        }
        if self.is_word(0, "INTERVAL") {
            let place = self.place(&self.peek(0));
            return match self.expr()? {
                Expr::Interval(value) => {
                    interval::literal_text(&value).map(|text| (text, false)).map_err(|error| error.at(place))
                }
                other => Err(Error::user(format!("{other} is no interval")).at(place)),
            };
        }
        let negative = self.inner.parser.consume_token(&Token::Minus);
        let token = self.inner.parser.next_token();
        let text = match &token.token {
            Token::Number(digits, _) => format!("{}{digits}", if negative { "-" } else { "" }),
            Token::SingleQuotedString(text) | Token::EscapedStringLiteral(text) if !negative => text.clone(),
            Token::Word(Word { keyword: Keyword::TRUE, .. }) if !negative => "true".to_owned(),
            Token::Word(Word { keyword: Keyword::FALSE, .. }) if !negative => "false".to_owned(),
            _ => {
                let error = self.expected(&format!("the value of {key}"), &token);
                return Err(error.hint("Write values in single quotes."));
            }
        };
        Ok((text, false))
    }

    /// `secret('env:NAME')`, `secret('file:PATH')`.
    fn secret(&mut self) -> Result<(String, bool)> {
        self.skip(2);
        let token = self.peek(0);
        let reference = self.string("'env:NAME' or 'file:PATH'")?;
        let known =
            ["env:", "file:"].iter().any(|kind| reference.strip_prefix(kind).is_some_and(|n| !n.is_empty()));
        if !known {
            // The text may be the secret itself: it is not repeated.
            return Err(Error::user("secret(…) wants the place where a secret is kept, not the secret")
                .hint("Write secret('env:NAME') or secret('file:PATH').")
                .at(self.place(&token)));
        }
        self.expect(&Token::RParen, "the closing parenthesis of secret(…)")?;
        Ok((reference, true))
    }
}

/// µs of `INTERVAL '…'` or of a plain string.
pub(super) fn interval_micros(expr: &Expr) -> Result<i64> {
    match expr {
        Expr::Interval(value) => interval::literal_micros(value),
        other => interval::micros_of(other).ok_or_else(|| {
            Error::user(format!("{other} is no length of time"))
                .hint("Use a fixed length such as INTERVAL '1 day'.")
        }),
    }
}
