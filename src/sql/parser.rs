//! The parser: our statements in front of DataFusion's own parser.
//!
//! A text becomes tokens once. Their places are turned back to the original text right away, so that sqlparser's
//! errors and the spans in every AST point at what the user wrote. The tokens are cut at `;`, and each statement
//! gets a parser of its own. `CREATE SOURCE | TABLE … WITH | VIEW | SINK | SCHEDULE`, `EXPLAIN PIPELINE`, `SHOW …`
//! and `DESCRIBE` are read here and in [`super::create`]; everything else goes to `DFParser`. Named windows are
//! merged in every query, whoever parsed it.

use datafusion::error::DataFusionError;
use datafusion::sql::parser::{DFParser, DFParserBuilder, Statement as DfStatement};
use sqlparser::ast::{Expr, Ident, Query};
use sqlparser::dialect::GenericDialect;
use sqlparser::keywords::Keyword;
use sqlparser::parser::ParserError;
use sqlparser::tokenizer::{Location, Span, Token, TokenWithSpan, Tokenizer, Word};

use crate::error::{Error, Place, Result};
use crate::sql::options::nearest;
use crate::sql::place::SourceText;
use crate::sql::statement::{Show, Statement};
use crate::sql::variables::{Variables, substitute};
use crate::sql::{as_of, versions, window_tables, windows};

static DIALECT: GenericDialect = GenericDialect {};

const SHOWS: [(&str, Show); 5] = [
    ("SOURCES", Show::Sources),
    ("TABLES", Show::Tables),
    ("VIEWS", Show::Views),
    ("SINKS", Show::Sinks),
    ("SCHEDULES", Show::Schedules),
];

/// All statements of a text. The last one may lack its `;`.
///
/// # Errors
/// The first user error, at its place in the original text.
pub fn parse(source: &SourceText, variables: &Variables<'_>) -> Result<Vec<Statement>> {
    statements(source, &tokens(source, variables)?)
}

/// The same for what is typed or handed to `query`: tables may have versions ([`versions`]).
///
/// # Errors
/// As [`parse`].
pub fn parse_ad_hoc(source: &SourceText, variables: &Variables<'_>) -> Result<Vec<Statement>> {
    let mut tokens = tokens(source, variables)?;
    versions::name_versions(source, &mut tokens)?;
    statements(source, &tokens)
}

fn tokens(source: &SourceText, variables: &Variables<'_>) -> Result<Vec<TokenWithSpan>> {
    let text = substitute(source, variables)?;
    let tokens = Tokenizer::new(&DIALECT, &text.text).tokenize_with_location().map_err(|error| {
        let at = text.original(Span::new(error.location, error.location));
        Error::user(lowered(&error.message)).at(source.place_at(at))
    })?;
    let mut tokens: Vec<TokenWithSpan> = tokens
        .into_iter()
        .filter(|token| !matches!(token.token, Token::Whitespace(_)))
        .map(|token| TokenWithSpan { span: text.original(token.span), token: token.token })
        .collect();
    free_window_names(&mut tokens);
    as_of::move_moments(source, &mut tokens)?;
    Ok(tokens)
}

fn statements(source: &SourceText, tokens: &[TokenWithSpan]) -> Result<Vec<Statement>> {
    let statements = tokens.split(|token| token.token == Token::SemiColon);
    statements
        .filter(|tokens| !tokens.is_empty())
        .map(|tokens| Reader::new(source, tokens)?.whole_statement())
        .collect()
}

/// sqlparser takes the first word of `OVER (week …)` or `WINDOW x AS (week …)` for a window's name only when it is
/// no keyword of any dialect. Here it is one unless it begins a part of the specification.
fn free_window_names(tokens: &mut [TokenWithSpan]) {
    let is = |tokens: &[TokenWithSpan], at: usize, keyword: Keyword| matches!(tokens.get(at).map(|t| &t.token), Some(Token::Word(word)) if word.keyword == keyword);
    let opens =
        |tokens: &[TokenWithSpan], at: usize| matches!(tokens.get(at).map(|t| &t.token), Some(Token::LParen));
    // Whether the next comma at this depth is followed by another window definition.
    let mut definitions: Option<usize> = None;
    let mut depth = 0_usize;
    for at in 0..tokens.len() {
        match tokens[at].token {
            Token::LParen => depth += 1,
            Token::RParen => depth = depth.saturating_sub(1),
            _ => {}
        }
        let begins = is(tokens, at, Keyword::WINDOW)
            || definitions == Some(depth) && matches!(tokens[at].token, Token::Comma);
        let name = if is(tokens, at, Keyword::OVER) && opens(tokens, at + 1) {
            at + 2
        } else if begins && is(tokens, at + 2, Keyword::AS) && opens(tokens, at + 3) {
            definitions = Some(depth);
            at + 4
        } else {
            if definitions.is_some_and(|defined| depth < defined) {
                definitions = None;
            }
            continue;
        };
        use Keyword::{GROUPS, NoKeyword, ORDER, PARTITION, RANGE, ROWS};
        if let Some(Token::Word(word)) = tokens.get_mut(name).map(|t| &mut t.token)
            && ![PARTITION, ORDER, RANGE, ROWS, GROUPS].contains(&word.keyword)
        {
            word.keyword = NoKeyword;
        }
    }
}

/// Reads one statement, or a part of one.
pub(super) struct Reader<'a> {
    pub(super) inner: DFParser<'static>,
    pub(super) tokens: &'a [TokenWithSpan],
    pub(super) source: &'a SourceText,
}

impl<'a> Reader<'a> {
    /// `tokens` hold no white space, so that the parser's index is an index into them.
    pub(super) fn new(source: &'a SourceText, tokens: &'a [TokenWithSpan]) -> Result<Self> {
        let inner = DFParserBuilder::new(tokens.to_vec()).with_dialect(&DIALECT).build()?;
        Ok(Self { inner, tokens, source })
    }

    fn whole_statement(mut self) -> Result<Statement> {
        let statement = self.statement()?;
        self.expect_end()?;
        Ok(statement)
    }

    pub(super) fn expect_end(&self) -> Result<()> {
        let next = self.peek(0);
        if next.token == Token::EOF {
            return Ok(());
        }
        Err(Error::user(format!("expected the end of the statement, found {}", next.token))
            .hint("Statements end with a semicolon.")
            .at(self.place(&next)))
    }

    fn statement(&mut self) -> Result<Statement> {
        let place = self.place(&self.peek(0));
        if self.is_word(0, "CREATE") {
            return self.create(place);
        }
        if self.is_word(0, "EXPLAIN") && self.is_word(1, "PIPELINE") {
            self.skip(2);
            return Ok(Statement::ExplainPipeline);
        }
        if self.is_word(0, "SHOW") {
            if let Some((_, show)) = SHOWS.into_iter().find(|(word, _)| self.is_word(1, word)) {
                self.skip(2);
                return Ok(Statement::Show(show));
            }
            self.refuse_slip_of_show()?;
        }
        let describes = self.is_word(0, "DESCRIBE") || self.is_word(0, "DESC");
        if describes && self.word(1).is_some() && self.peek(2).token == Token::EOF {
            self.skip(1);
            return Ok(Statement::Describe(self.name()?, place));
        }
        Ok(Statement::Other(Box::new(self.delegate(&place)?), place))
    }

    /// `SHOW SORCES` would be read as the name of a setting.
    fn refuse_slip_of_show(&self) -> Result<()> {
        let Some(word) = self.word(1).filter(|_| self.peek(2).token == Token::EOF) else { return Ok(()) };
        let known: Vec<String> = SHOWS.iter().map(|(word, _)| (*word).to_owned()).collect();
        match nearest(&word, &known) {
            Some(near) => Err(Error::user(format!("SHOW {word} is not known"))
                .hint(format!("Did you mean SHOW {near}?"))
                .at(self.place(&self.peek(1)))),
            None => Ok(()),
        }
    }

    /// A statement of DataFusion's, its named windows merged.
    pub(super) fn delegate(&mut self, place: &Place) -> Result<DfStatement> {
        let first = self.peek(0);
        let parsed = self.inner.parse_statement();
        let mut statement = parsed.map_err(|error| self.unknown(&first, self.datafusion_error(error)))?;
        windows::merge_statement(&mut statement, place)?;
        window_tables::expand_statement(&mut statement, place)?;
        Ok(statement)
    }

    /// Says "did you mean" when it was the first word that nobody knows.
    fn unknown(&self, first: &TokenWithSpan, error: Error) -> Error {
        let Token::Word(Word { value, .. }) = &first.token else { return error };
        if !error.message().starts_with("expected an SQL statement") {
            return error;
        }
        let known =
            ["CREATE", "SELECT", "WITH", "EXPLAIN", "SHOW", "DESCRIBE", "INSERT", "COPY", "SET", "DROP"];
        let known = known.map(str::to_owned);
        let hint = match nearest(value, &known) {
            Some(near) => format!("Did you mean {near}?"),
            None => format!("Statements begin with {} …", known.join(", ")),
        };
        Error::user(format!("no statement begins with {value}")).hint(hint).at(self.place(first))
    }

    pub(super) fn query(&mut self, place: &Place) -> Result<Box<Query>> {
        let parsed = self.inner.parser.parse_query();
        let mut query = parsed.map_err(|error| self.error(&error))?;
        windows::merge(&mut query, place)?;
        window_tables::expand(query.as_mut(), place)?;
        Ok(query)
    }

    pub(super) fn string(&mut self, what: &str) -> Result<String> {
        let token = self.inner.parser.next_token();
        match token.token {
            Token::SingleQuotedString(text) | Token::EscapedStringLiteral(text) => Ok(text),
            _ => Err(self.expected(what, &token)),
        }
    }

    pub(super) fn expr(&mut self) -> Result<Expr> {
        let parsed = self.inner.parser.parse_expr();
        parsed.map_err(|error| self.error(&error))
    }

    /// A name of one part.
    pub(super) fn name(&mut self) -> Result<String> {
        let token = self.peek(0);
        if !matches!(token.token, Token::Word(_)) {
            return Err(self.expected("a name", &token));
        }
        let parsed = self.inner.parser.parse_identifier();
        let name = normal(&parsed.map_err(|error| self.error(&error))?);
        let dot = self.peek(0);
        if dot.token == Token::Period {
            return Err(Error::user(format!("the name {name} has more than one part"))
                .hint("Leave the schema out, or write the whole name in double quotes.")
                .at(self.place(&token)));
        }
        Ok(name)
    }

    pub(super) fn expect(&mut self, token: &Token, what: &str) -> Result<()> {
        let found = self.peek(0);
        match self.inner.parser.consume_token(token) {
            true => Ok(()),
            false => Err(self.expected(what, &found)),
        }
    }

    pub(super) fn expect_word(&mut self, word: &str) -> Result<()> {
        let found = self.peek(0);
        match self.take_word(word) {
            true => Ok(()),
            false => Err(self.expected(word, &found)),
        }
    }

    pub(super) fn expected(&self, what: &str, found: &TokenWithSpan) -> Error {
        let message = match &found.token {
            Token::EOF => format!("expected {what}, found the end of the statement"),
            token => format!("expected {what}, found {token}"),
        };
        Error::user(message).at(self.place(found))
    }

    pub(super) fn take_word(&mut self, word: &str) -> bool {
        let found = self.is_word(0, word);
        if found {
            self.skip(1);
        }
        found
    }

    pub(super) fn peek(&self, n: usize) -> TokenWithSpan {
        self.inner.parser.peek_nth_token(n)
    }

    /// The nth word ahead, unless it is quoted.
    pub(super) fn word(&self, n: usize) -> Option<String> {
        match self.peek(n).token {
            Token::Word(word) => Some(word.value),
            _ => None,
        }
    }

    pub(super) fn is_word(&self, n: usize, word: &str) -> bool {
        let token = &self.inner.parser.peek_nth_token_ref(n).token;
        matches!(token, Token::Word(found) if found.quote_style.is_none() && found.value.eq_ignore_ascii_case(word))
    }

    pub(super) fn skip(&mut self, tokens: usize) {
        for _ in 0..tokens {
            self.inner.parser.advance_token();
        }
    }

    pub(super) fn place(&self, token: &TokenWithSpan) -> Place {
        if token.span.start.line == 0 { self.end() } else { self.source.place_at(token.span) }
    }

    /// Just behind the last token.
    fn end(&self) -> Place {
        match self.tokens.last() {
            Some(last) => self.source.place_at(Span::new(last.span.end, last.span.end)),
            None => self.source.place(1, 1, 1),
        }
    }

    fn datafusion_error(&self, error: DataFusionError) -> Error {
        match error {
            DataFusionError::Diagnostic(_, inner) => self.datafusion_error(*inner),
            DataFusionError::SQL(error, _) => self.error(&error),
            other => Error::from(other).at(self.end()),
        }
    }

    /// sqlparser's errors are text that ends in `at Line: X, Column: Y`; only the end of the text has no line.
    pub(super) fn error(&self, error: &ParserError) -> Error {
        let text = match error {
            ParserError::TokenizerError(text) | ParserError::ParserError(text) => text,
            ParserError::RecursionLimitExceeded => {
                return Error::user("the statement is nested too deeply")
                    .hint("Name parts of it in WITH (…) or as views.")
                    .at(self.place(&self.peek(0)));
            }
        };
        let (reason, location) = match text.rsplit_once(" at Line: ") {
            Some((reason, numbers)) => (reason, location(numbers)),
            None => (text.as_str(), None),
        };
        let place = match location {
            Some(at) => {
                let token = self.tokens.iter().find(|token| token.span.start == at);
                self.source.place_at(token.map_or(Span::new(at, at), |token| token.span))
            }
            None => self.end(),
        };
        Error::user(lowered(reason)).at(place)
    }
}

fn location(numbers: &str) -> Option<Location> {
    let (line, column) = numbers.split_once(", Column: ")?;
    let line: u64 = line.trim().parse().ok().filter(|line| *line > 0)?;
    Some(Location::new(line, column.trim().parse().ok()?))
}

/// sqlparser's wording in ours: `Expected: x, found: y` → `expected x, found y`.
fn lowered(message: &str) -> String {
    let message = message.replacen("Expected: ", "expected ", 1).replacen(", found: ", ", found ", 1);
    let message = message.replacen("found EOF", "found the end of the statement", 1);
    let mut letters = message.chars();
    let first = letters.next().map(char::to_lowercase);
    first.into_iter().flatten().chain(letters).collect()
}

/// Unquoted identifiers are folded to lower case, as in Postgres.
pub(super) fn normal(name: &Ident) -> String {
    if name.quote_style.is_some() { name.value.clone() } else { name.value.to_lowercase() }
}
