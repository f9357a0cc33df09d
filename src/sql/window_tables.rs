//! `TUMBLE` and `HOP` in a FROM, rewritten to plain SQL, so that stream and batch share them (DESIGN §2).
//!
//! - `TUMBLE(t, time, size [, offset])`: each row of `t` with the window that holds it: `window_start` is a multiple of
//!   `size` since 1970-01-01 UTC, plus `offset`; `window_end = window_start + size`.
//! - `HOP(t, time, slide, size)`: each row once per window that holds it: `window_start` is a multiple of `slide`,
//!   `window_start <= time < window_start + size`. `slide` need not divide `size`; rows between windows (a slide longer
//!   than the size) are in none.
//!
//! As in RisingWave and Flink. A window is closed once the watermark has reached its end.

use std::ops::ControlFlow;

use datafusion::sql::parser::Statement as DfStatement;
use sqlparser::ast::{
    Expr, FunctionArg, FunctionArgExpr, Ident, ObjectName, Query, Statement, TableAlias, TableFactor,
    VisitMut, VisitorMut,
};
use sqlparser::dialect::GenericDialect;
use sqlparser::parser::Parser;

use crate::error::{Error, Place, Result};
use crate::sql::interval::{display_micros, micros_of};
use crate::sql::parser::normal;
use crate::sql::place::place_of_span;
use crate::sql::rewrite::{rewrite, rewrite_statement};

/// Rewrites every TUMBLE and HOP of a query and its sub-queries.
///
/// # Errors
/// A user error: wrong arguments, a size that is not positive.
pub fn expand(node: &mut impl VisitMut, place: &Place) -> Result<()> {
    rewrite(node, &mut Expand { place })
}

/// The same for a statement of DataFusion.
///
/// # Errors
/// As [`expand`].
pub fn expand_statement(statement: &mut DfStatement, place: &Place) -> Result<()> {
    rewrite_statement(statement, &mut Expand { place })
}

struct Expand<'p> {
    place: &'p Place,
}

impl VisitorMut for Expand<'_> {
    type Break = Error;

    fn post_visit_table_factor(&mut self, factor: &mut TableFactor) -> ControlFlow<Error> {
        let TableFactor::Table { name, alias, args: Some(args), .. } = factor else {
            return ControlFlow::Continue(());
        };
        let Some(function) = name.0.last().and_then(|part| part.as_ident()).cloned() else {
            return ControlFlow::Continue(());
        };
        let call = Call { function: &function, place: self.place };
        let rewritten = match normal(&function).as_str() {
            "tumble" => call.arguments(&args.args).and_then(|args| call.tumble(&args)),
            "hop" => call.arguments(&args.args).and_then(|args| call.hop(&args)),
            "session" => Err(call.error("SESSION windows cannot run yet", "Use TUMBLE or HOP.")),
            _ => return ControlFlow::Continue(()),
        };
        match rewritten {
            Ok((subquery, table)) => {
                let alias = alias.take().unwrap_or_else(|| called(table));
                *factor = TableFactor::Derived { lateral: false, subquery, alias: Some(alias), sample: None };
                ControlFlow::Continue(())
            }
            Err(error) => ControlFlow::Break(error),
        }
    }
}

fn called(name: Ident) -> TableAlias {
    TableAlias { explicit: true, name, columns: Vec::new(), at: None }
}

struct Call<'a> {
    function: &'a Ident,
    place: &'a Place,
}

const TUMBLE: &str = "Write FROM TUMBLE(table, time_column, INTERVAL '1 minute').";
const HOP: &str =
    "Write FROM HOP(table, time_column, INTERVAL '1 minute', INTERVAL '1 hour'): slide, then size.";

impl Call<'_> {
    fn error(&self, message: &str, hint: &str) -> Error {
        Error::user(message).hint(hint).at(place_of_span(self.place, self.function.span))
    }

    fn arguments(&self, args: &[FunctionArg]) -> Result<Vec<Expr>> {
        let plain = args.iter().map(|arg| match arg {
            FunctionArg::Unnamed(FunctionArgExpr::Expr(expr)) => Some(expr.clone()),
            _ => None,
        });
        plain.collect::<Option<_>>().ok_or_else(|| {
            let hint = if normal(self.function) == "hop" { HOP } else { TUMBLE };
            self.error(&format!("{} takes a table, a column and intervals", self.function), hint)
        })
    }

    fn tumble(&self, args: &[Expr]) -> Result<(Box<Query>, Ident)> {
        let (table, time, size, offset) = match args {
            [table, time, size] => (table, time, size, None),
            [table, time, size, offset] => (table, time, size, Some(offset)),
            _ => return Err(self.error("TUMBLE takes a table, a time column and a size", TUMBLE)),
        };
        let (name, called) = self.table(table, TUMBLE)?;
        let size = self.positive(size, "size", TUMBLE)?;
        let origin = match offset {
            None => String::new(),
            Some(offset) => {
                let micros =
                    micros_of(offset).ok_or_else(|| self.error("the offset is no interval", TUMBLE))?;
                let offset = display_micros(micros);
                format!(", to_timestamp_micros(0) + INTERVAL '{offset}'")
            }
        };
        let size = display_micros(size);
        let sql = format!(
            "SELECT *, window_start + INTERVAL '{size}' AS window_end FROM \
             (SELECT *, date_bin(INTERVAL '{size}', {time}{origin}) AS window_start FROM {name}) AS {called}"
        );
        Ok((self.parse(&sql)?, called))
    }

    fn hop(&self, args: &[Expr]) -> Result<(Box<Query>, Ident)> {
        let [table, time, slide, size] = args else {
            return Err(self.error("HOP takes a table, a time column, a slide and a size", HOP));
        };
        let (name, called) = self.table(table, HOP)?;
        let slide = self.positive(slide, "slide", HOP)?;
        let size = self.positive(size, "size", HOP)?;
        if size / slide > 10_000 {
            let message = format!("each row would be in {} windows", size / slide);
            return Err(self.error(&message, "Use a longer slide, or an OVER window with a RANGE frame."));
        }
        let (slide, size) = (display_micros(slide), display_micros(size));
        let sql = format!(
            "SELECT *, window_start + INTERVAL '{size}' AS window_end FROM \
             (SELECT *, unnest(hop_starts({time}, INTERVAL '{slide}', INTERVAL '{size}')) AS window_start \
              FROM {name}) AS {called}"
        );
        Ok((self.parse(&sql)?, called))
    }

    fn positive(&self, of: &Expr, what: &str, hint: &str) -> Result<i64> {
        let micros = micros_of(of).filter(|micros| *micros > 0);
        micros.ok_or_else(|| {
            let message =
                format!("the {what} of {} is {of}, not a positive interval of fixed length", self.function);
            self.error(&message, hint)
        })
    }

    /// A table's name as SQL, and what its columns may be qualified with.
    fn table(&self, of: &Expr, hint: &str) -> Result<(ObjectName, Ident)> {
        let (parts, last) = match of {
            Expr::Identifier(name) => (vec![name.clone()], name.clone()),
            Expr::CompoundIdentifier(parts) if !parts.is_empty() => {
                (parts.clone(), parts[parts.len() - 1].clone())
            }
            other => {
                let message = format!("the first argument of {} is {other}, not a table", self.function);
                return Err(self.error(&message, hint));
            }
        };
        Ok((ObjectName::from(parts), last))
    }

    fn parse(&self, sql: &str) -> Result<Box<Query>> {
        let parsed = Parser::parse_sql(&GenericDialect {}, sql);
        match parsed.map(|mut statements| statements.pop()) {
            Ok(Some(Statement::Query(query))) => Ok(query),
            other => Err(Error::internal(format!("{sql} did not parse: {other:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(sql: &str) -> Result<String> {
        let mut statements = Parser::parse_sql(&GenericDialect {}, sql).unwrap();
        let text = crate::sql::SourceText::new("t.sql", sql);
        expand(&mut statements[0], &text.place(1, 1, 1))?;
        Ok(statements[0].to_string())
    }

    #[test]
    fn table_functions_become_plain_sql() {
        for (sql, expected) in [
            (
                "SELECT * FROM TUMBLE(t, c, INTERVAL '1' MINUTE)",
                "SELECT * FROM (SELECT *, window_start + INTERVAL '1 minute' AS window_end FROM (SELECT *, \
                 date_bin(INTERVAL '1 minute', c) AS window_start FROM t) AS t) AS t",
            ),
            (
                "SELECT w.a FROM hop(a.\"T\", c, '2 seconds', '5 seconds') w",
                "SELECT w.a FROM (SELECT *, window_start + INTERVAL '5 seconds' AS window_end FROM (SELECT *, \
                 unnest(hop_starts(c, INTERVAL '2 seconds', INTERVAL '5 seconds')) AS window_start \
                 FROM a.\"T\") AS \"T\") w",
            ),
            ("SELECT * FROM other(t, 1)", "SELECT * FROM other(t, 1)"),
        ] {
            assert_eq!(rewritten(sql).unwrap(), expected);
        }
    }

    #[test]
    fn wrong_arguments_are_refused_at_their_place() {
        for (sql, message) in [
            ("SELECT * FROM TUMBLE(t, c)", "TUMBLE takes a table, a time column and a size"),
            ("SELECT * FROM TUMBLE(t, c, INTERVAL '0 seconds')", "not a positive interval of fixed length"),
            ("SELECT * FROM TUMBLE(t, c, INTERVAL '1 month')", "not a positive interval of fixed length"),
            ("SELECT * FROM HOP(t, c, INTERVAL '1 minute')", "HOP takes a table"),
            ("SELECT * FROM HOP(1 + 1, c, '1 minute', '1 minute')", "is 1 + 1, not a table"),
            ("SELECT * FROM SESSION(t, c, '1 minute', k)", "SESSION windows cannot run yet"),
        ] {
            let error = rewritten(sql).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
            assert_eq!(error.place().unwrap().column, 15);
        }
    }
}
