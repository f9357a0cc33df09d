//! The parser: our statements in front of DataFusion's own parser.
//!
//! `CREATE SOURCE | TABLE … WITH | VIEW | SINK | SCHEDULE`, `EXPLAIN PIPELINE`, `SHOW …` and `DESCRIBE` are read
//! here; everything else goes to `DFParser`. Grammar in the docs of each type in [`super::statement`].

use datafusion::sql::parser::{DFParser, DFParserBuilder};
use sqlparser::ast::{ColumnDef, ColumnOption, Expr, Ident, Query};
use sqlparser::dialect::GenericDialect;
use sqlparser::keywords::Keyword;
use sqlparser::parser::ParserError;
use sqlparser::tokenizer::{Token, TokenWithSpan, Word};

use crate::error::{Error, Place, Result};
use crate::sql::options::{OptionValue, Options, nearest};
use crate::sql::place::SourceText;
use crate::sql::statement::{
    Column, ComputedColumn, CreateSchedule, CreateSink, CreateSource, CreateTable, CreateView,
    ScheduleAction, Show, SinkInput, Statement, Watermark,
};
use crate::sql::variables::{Substituted, Variables, substitute};
use crate::sql::{interval, types, windows};

/// All statements of a text.
///
/// # Errors
/// The first user error, at its place in the original text.
pub fn parse(source: &SourceText, variables: &Variables<'_>) -> Result<Vec<Statement>> {
    let text = substitute(source, variables)?;
    let sql = text.text.clone();
    let parser = DFParserBuilder::new(sql.as_str()).with_dialect(&GenericDialect {}).build();
    let inner = parser.map_err(|error| located(&error.strip_backtrace(), source, &text))?;
    Reader { inner, source, text: &text }.statements()
}

struct Reader<'a> {
    inner: DFParser<'a>,
    source: &'a SourceText,
    text: &'a Substituted,
}

impl Reader<'_> {
    fn statements(mut self) -> Result<Vec<Statement>> {
        let mut statements = Vec::new();
        loop {
            while self.inner.parser.consume_token(&Token::SemiColon) {}
            if self.peek(0).token == Token::EOF {
                return Ok(statements);
            }
            statements.push(self.statement()?);
            let next = self.peek(0);
            if next.token != Token::SemiColon && next.token != Token::EOF {
                let message = format!("expected the end of the statement, found {}", next.token);
                return Err(Error::user(message)
                    .hint("Statements end with a semicolon.")
                    .at(self.place(&next)));
            }
        }
    }

    fn statement(&mut self) -> Result<Statement> {
        let first = self.peek(0);
        let place = self.place(&first);
        if self.is_word(0, "CREATE") {
            let ours = if self.is_word(1, "OR") && self.is_word(2, "REPLACE") { 3 } else { 1 };
            if let Some(what) = self.word(ours) {
                return self.create(ours, &what.to_ascii_uppercase(), place);
            }
        }
        if self.is_word(0, "EXPLAIN") && self.is_word(1, "PIPELINE") {
            self.skip(2);
            return Ok(Statement::ExplainPipeline);
        }
        if self.is_word(0, "SHOW") {
            let shows = [
                ("SOURCES", Show::Sources),
                ("TABLES", Show::Tables),
                ("VIEWS", Show::Views),
                ("SINKS", Show::Sinks),
                ("SCHEDULES", Show::Schedules),
            ];
            if let Some((_, show)) = shows.into_iter().find(|(word, _)| self.is_word(1, word)) {
                self.skip(2);
                return Ok(Statement::Show(show));
            }
        }
        if (self.is_word(0, "DESCRIBE") || self.is_word(0, "DESC")) && self.word(1).is_some() {
            self.skip(1);
            return Ok(Statement::Describe(self.name()?, place));
        }
        let parsed = self.inner.parse_statement();
        match parsed {
            Ok(statement) => Ok(Statement::Other(Box::new(statement), place)),
            Err(error) => Err(located(&error.strip_backtrace(), self.source, self.text)),
        }
    }

    fn create(&mut self, at: usize, what: &str, place: Place) -> Result<Statement> {
        let kinds = ["SOURCE", "TABLE", "VIEW", "SINK", "SCHEDULE"];
        if !kinds.contains(&what) {
            let known: Vec<String> = kinds.iter().map(|kind| (*kind).to_owned()).collect();
            let others = [
                "EXTERNAL",
                "FUNCTION",
                "SCHEMA",
                "DATABASE",
                "INDEX",
                "MATERIALIZED",
                "TEMPORARY",
                "UNBOUNDED",
            ];
            if others.contains(&what) && what != "MATERIALIZED" {
                let parsed = self.inner.parse_statement();
                return match parsed {
                    Ok(statement) => Ok(Statement::Other(Box::new(statement), place)),
                    Err(error) => Err(located(&error.strip_backtrace(), self.source, self.text)),
                };
            }
            let hint = match (what, nearest(what, &known)) {
                ("MATERIALIZED", _) => "Write CREATE VIEW, and CREATE SINK to materialise it.".to_owned(),
                (_, Some(near)) => format!("Did you mean CREATE {near}?"),
                _ => format!("Known are CREATE {}.", kinds.join(", ")),
            };
            let token = self.peek(at);
            return Err(Error::user(format!("CREATE {what} is not known")).hint(hint).at(self.place(&token)));
        }
        self.skip(at + 1);
        let or_replace = at == 3;
        match what {
            "SOURCE" => self.source(or_replace, place),
            "TABLE" => self.table(or_replace, place),
            "VIEW" => self.view(or_replace, place),
            "SINK" => self.sink(or_replace, place),
            _ => self.schedule(or_replace, place),
        }
    }

    fn source(&mut self, or_replace: bool, place: Place) -> Result<Statement> {
        let name = self.name()?;
        let columns = self.columns(&name)?;
        let options = self.options(&format!("source {name}"))?;
        let (columns, computed, watermark) = columns;
        Ok(Statement::CreateSource(CreateSource {
            name,
            or_replace,
            columns,
            computed,
            watermark,
            options,
            place,
        }))
    }

    fn table(&mut self, or_replace: bool, place: Place) -> Result<Statement> {
        let name = self.name()?;
        let columns = match self.peek(0).token {
            Token::LParen => self.columns(&name)?.0,
            _ => Vec::new(),
        };
        let options = self.options(&format!("table {name}"))?;
        Ok(Statement::CreateTable(CreateTable { name, or_replace, columns, options, place }))
    }

    fn view(&mut self, or_replace: bool, place: Place) -> Result<Statement> {
        let name = self.name()?;
        self.expect_word("AS")?;
        let query = self.query(&place)?;
        let sql = query.to_string();
        Ok(Statement::CreateView(CreateView { name, or_replace, query, sql, place }))
    }

    fn sink(&mut self, or_replace: bool, place: Place) -> Result<Statement> {
        let name = self.name()?;
        let owner = format!("sink {name}");
        if self.take_word("FROM") {
            let token = self.peek(0);
            let input = SinkInput::Relation { place: self.place(&token), name: self.name()? };
            let options = self.options(&owner)?;
            return Ok(Statement::CreateSink(CreateSink { name, or_replace, input, options, place }));
        }
        let before = if self.is_word(0, "WITH") { Some(self.options(&owner)?) } else { None };
        self.expect_word("AS")?;
        let query = self.query(&place)?;
        let options = match before {
            Some(options) => options,
            None => self.options(&owner)?,
        };
        Ok(Statement::CreateSink(CreateSink {
            name,
            or_replace,
            input: SinkInput::Query(query),
            options,
            place,
        }))
    }

    fn schedule(&mut self, or_replace: bool, place: Place) -> Result<Statement> {
        let name = self.name()?;
        self.expect_word("CRON")?;
        let cron = self.string("a cron expression such as '0 2 * * *'")?;
        let time_zone = if self.take_word("TIME") {
            self.expect_word("ZONE")?;
            Some(self.string("a time zone such as 'Europe/Berlin'")?)
        } else {
            None
        };
        self.expect_word("AS")?;
        let action = if self.take_word("BACKFILL") {
            let sink = self.name()?;
            self.expect_word("FOR")?;
            self.expect_word("LAST")?;
            let token = self.peek(0);
            let expr = self.expr()?;
            let last_micros = interval::micros_of(&expr).ok_or_else(|| {
                let hint = "Use a fixed length such as INTERVAL '1 day'.";
                Error::user(format!("{expr} is no length of time")).hint(hint).at(self.place(&token))
            })?;
            ScheduleAction::Backfill { sink, last_micros }
        } else {
            let parsed = self.inner.parse_statement();
            let statement = parsed.map_err(|e| located(&e.strip_backtrace(), self.source, self.text))?;
            ScheduleAction::Insert(Box::new(statement))
        };
        Ok(Statement::CreateSchedule(CreateSchedule { name, or_replace, cron, time_zone, action, place }))
    }

    fn query(&mut self, place: &Place) -> Result<Box<Query>> {
        let parsed = self.inner.parser.parse_query();
        let mut query = parsed.map_err(|error| self.error(&error))?;
        windows::merge(&mut query, place)?;
        Ok(query)
    }

    fn columns(&mut self, of: &str) -> Result<(Vec<Column>, Vec<ComputedColumn>, Option<Watermark>)> {
        let (mut columns, mut computed, mut watermark) = (Vec::new(), Vec::new(), None);
        self.expect(&Token::LParen, "a list of columns")?;
        loop {
            let token = self.peek(0);
            let place = self.place(&token);
            if self.is_word(0, "WATERMARK") && self.is_word(1, "FOR") {
                self.skip(2);
                watermark = Some(self.watermark(place)?);
            } else if self.is_computed_without_type() {
                let name = self.name()?;
                self.expect_word("AS")?;
                let expr = self.parenthesised()?;
                computed.push(ComputedColumn { name, data_type: None, expr, place });
            } else {
                let parsed = self.inner.parser.parse_column_def();
                let definition = parsed.map_err(|error| self.error(&error))?;
                self.column(definition, place, &mut columns, &mut computed)?;
            }
            if !self.inner.parser.consume_token(&Token::Comma) {
                break;
            }
        }
        self.expect(&Token::RParen, "a comma or the closing parenthesis of the columns")?;
        let mut names: Vec<&str> = columns.iter().map(|c: &Column| c.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            let place = columns.iter().rfind(|c| c.name == pair[0]).map(|c| c.place.clone());
            let error = Error::user(format!("{of} declares the column {} twice", pair[0]));
            return Err(place.into_iter().fold(error, Error::at));
        }
        Ok((columns, computed, watermark))
    }

    /// `name AS (…)`, where DataFusion's parser would want a type.
    fn is_computed_without_type(&self) -> bool {
        self.word(0).is_some() && self.is_word(1, "AS")
    }

    fn parenthesised(&mut self) -> Result<Expr> {
        self.expect(&Token::LParen, "an expression in parentheses")?;
        let expr = self.expr()?;
        self.expect(&Token::RParen, "the closing parenthesis")?;
        Ok(expr)
    }

    fn column(
        &self,
        definition: ColumnDef,
        place: Place,
        columns: &mut Vec<Column>,
        computed: &mut Vec<ComputedColumn>,
    ) -> Result<()> {
        let name = normal(&definition.name);
        let data_type = types::arrow_type(&definition.data_type).ok_or_else(|| {
            let hint = "Known are BIGINT, INT, SMALLINT, TINYINT, DOUBLE, REAL, DECIMAL(p, s), VARCHAR, BOOLEAN, DATE, TIMESTAMP, BYTEA, T[] and STRUCT<…>.";
            Error::user(format!("the type {} of {name} is not known", definition.data_type)).hint(hint).at(place.clone())
        })?;
        let mut nullable = true;
        for option in definition.options {
            match option.option {
                ColumnOption::NotNull => nullable = false,
                ColumnOption::Null => nullable = true,
                ColumnOption::Generated { generation_expr: Some(expr), .. } => {
                    computed.push(ComputedColumn { name, data_type: Some(data_type), expr, place });
                    return Ok(());
                }
                other => {
                    let hint = "A column may be NOT NULL, NULL or AS (expression).";
                    return Err(Error::user(format!("the column {name} cannot be {other}"))
                        .hint(hint)
                        .at(place));
                }
            }
        }
        columns.push(Column { name, data_type, nullable, place });
        Ok(())
    }

    fn watermark(&mut self, place: Place) -> Result<Watermark> {
        let column = self.name()?;
        self.expect_word("AS")?;
        let expr = self.expr()?;
        let is_column = |expr: &Expr| matches!(expr, Expr::Identifier(name) if normal(name) == column);
        let delay = match &expr {
            expr if is_column(expr) => Some(0),
            Expr::BinaryOp { left, op: sqlparser::ast::BinaryOperator::Minus, right } if is_column(left) => {
                interval::micros_of(right)
            }
            _ => None,
        };
        let Some(delay_micros) = delay else {
            let hint = format!("Write WATERMARK FOR {column} AS {column} - INTERVAL '5 seconds'.");
            return Err(Error::user(format!("the watermark {expr} is not understood")).hint(hint).at(place));
        };
        Ok(Watermark { column, delay_micros, place })
    }

    /// `WITH (key = value, …)`.
    fn options(&mut self, owner: &str) -> Result<Options> {
        self.expect_word("WITH")?;
        self.expect(&Token::LParen, "options in parentheses")?;
        let mut entries: Vec<(String, OptionValue)> = Vec::new();
        loop {
            let token = self.peek(0);
            let place = self.place(&token);
            let key = self.option_key()?;
            self.expect(&Token::Eq, &format!("= behind the option {key}"))?;
            let value = self.option_value(&key)?;
            if entries.iter().any(|(known, _)| *known == key) {
                return Err(Error::user(format!("{owner} has the option {key} twice")).at(place));
            }
            let width = key.chars().count();
            entries.push((key, OptionValue { value, place: Some(Place { width, ..place }) }));
            if !self.inner.parser.consume_token(&Token::Comma) {
                break;
            }
        }
        self.expect(&Token::RParen, "a comma or the closing parenthesis of the options")?;
        Ok(Options::new(owner, entries))
    }

    fn option_key(&mut self) -> Result<String> {
        let mut key = String::new();
        loop {
            let token = self.inner.parser.next_token();
            match token.token {
                Token::SingleQuotedString(text) if key.is_empty() => return Ok(text),
                Token::Word(word) => key.push_str(&word.value),
                Token::Number(digits, _) => key.push_str(&digits),
                _ => {
                    let message = format!("expected the name of an option, found {}", token.token);
                    return Err(Error::user(message).at(self.place(&token)));
                }
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

    fn option_value(&mut self, key: &str) -> Result<String> {
        let token = self.inner.parser.next_token();
        match token.token {
            Token::SingleQuotedString(text) => Ok(text),
            Token::Number(digits, _) => Ok(digits),
            Token::Word(Word { keyword: Keyword::INTERVAL, .. }) => {
                self.string("a length such as '5 seconds'")
            }
            Token::Word(word) => Ok(word.value),
            _ => {
                let message = format!("expected the value of {key}, found {}", token.token);
                Err(Error::user(message).hint("Write values in single quotes.").at(self.place(&token)))
            }
        }
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let token = self.inner.parser.next_token();
        match token.token {
            Token::SingleQuotedString(text) => Ok(text),
            _ => Err(Error::user(format!("expected {what}, found {}", token.token)).at(self.place(&token))),
        }
    }

    fn expr(&mut self) -> Result<Expr> {
        let parsed = self.inner.parser.parse_expr();
        parsed.map_err(|error| self.error(&error))
    }

    fn name(&mut self) -> Result<String> {
        let token = self.peek(0);
        if !matches!(token.token, Token::Word(_)) {
            return Err(Error::user(format!("expected a name, found {}", token.token)).at(self.place(&token)));
        }
        let parsed = self.inner.parser.parse_identifier();
        Ok(normal(&parsed.map_err(|error| self.error(&error))?))
    }

    fn expect(&mut self, token: &Token, what: &str) -> Result<()> {
        let found = self.peek(0);
        if self.inner.parser.consume_token(token) {
            return Ok(());
        }
        Err(Error::user(format!("expected {what}, found {}", found.token)).at(self.place(&found)))
    }

    fn expect_word(&mut self, word: &str) -> Result<()> {
        let found = self.peek(0);
        if self.take_word(word) {
            return Ok(());
        }
        Err(Error::user(format!("expected {word}, found {}", found.token)).at(self.place(&found)))
    }

    fn take_word(&mut self, word: &str) -> bool {
        let found = self.is_word(0, word);
        if found {
            self.skip(1);
        }
        found
    }

    fn peek(&self, n: usize) -> TokenWithSpan {
        self.inner.parser.peek_nth_token(n)
    }

    fn word(&self, n: usize) -> Option<String> {
        match self.peek(n).token {
            Token::Word(word) => Some(word.value),
            _ => None,
        }
    }

    fn is_word(&self, n: usize, word: &str) -> bool {
        self.word(n).is_some_and(|found| found.eq_ignore_ascii_case(word))
    }

    fn skip(&mut self, tokens: usize) {
        for _ in 0..tokens {
            self.inner.parser.next_token();
        }
    }

    fn place(&self, token: &TokenWithSpan) -> Place {
        let start = token.span.start;
        if start.line == 0 {
            // The end of the text has no span.
            return end_of(self.source);
        }
        let same_line = token.span.end.line == start.line;
        let width = if same_line { token.span.end.column.saturating_sub(start.column) as usize } else { 1 };
        let (line, column) = (start.line as usize, start.column as usize);
        self.source.place(line, self.text.original_column(line, column), width)
    }

    fn error(&self, error: &ParserError) -> Error {
        located(&error.to_string(), self.source, self.text)
    }
}

fn end_of(source: &SourceText) -> Place {
    let line = source.text.lines().count().max(1);
    let column = source.text.lines().last().map_or(1, |text| text.chars().count() + 1);
    source.place(line, column, 1)
}

/// Unquoted identifiers are folded to lower case, as in Postgres.
fn normal(name: &Ident) -> String {
    if name.quote_style.is_some() { name.value.clone() } else { name.value.to_lowercase() }
}

/// sqlparser's errors are text that ends in `at Line: X, Column: Y`.
fn located(message: &str, source: &SourceText, text: &Substituted) -> Error {
    let message = message.lines().next().unwrap_or_default();
    let cleaned = ["SQL error: ", "ParserError(\"", "sql parser error: ", "TokenizerError(\""]
        .iter()
        .fold(message, |rest, prefix| rest.strip_prefix(prefix).unwrap_or(rest))
        .trim_end_matches("\")");
    let Some((reason, at)) = cleaned.rsplit_once(" at Line: ") else {
        // Only the end of the text has no line.
        return Error::user(cleaned.replacen("Expected: ", "expected ", 1)).at(end_of(source));
    };
    let numbers: Vec<usize> = at.split(", Column: ").filter_map(|n| n.trim().parse().ok()).collect();
    let reason = reason.replacen("Expected: ", "expected ", 1).replacen(", found: ", ", found ", 1);
    match numbers[..] {
        [line, column] if line > 0 => {
            Error::user(reason).at(source.place(line, text.original_column(line, column), 1))
        }
        _ => Error::user(reason),
    }
}
