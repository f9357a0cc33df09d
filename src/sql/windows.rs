//! Named windows, merged into their uses.
//!
//! DataFusion 55 resolves only a bare `OVER w`; `OVER (w …)` loses its PARTITION BY without a word. So every OVER of
//! every SELECT gets its full specification here. As in Postgres: a copied window may not add PARTITION BY, may add
//! ORDER BY only to a window without one, and a window with a frame can only be used bare.

use std::ops::ControlFlow;

use datafusion::sql::parser::Statement;
use sqlparser::ast::{
    Expr, Ident, NamedWindowDefinition, NamedWindowExpr, Query, Select, SetExpr, VisitorMut, WindowSpec,
    WindowType,
};

use crate::error::{Error, Place, Result};
use crate::sql::parser::normal;
use crate::sql::place::place_of_span;
use crate::sql::rewrite::{rewrite, rewrite_statement};

/// Merges all named windows of a query and its sub-queries.
///
/// # Errors
/// A user error: an unknown window, a copy that is not allowed.
pub fn merge(query: &mut Query, place: &Place) -> Result<()> {
    rewrite(query, &mut Merge { scopes: Vec::new(), place })
}

/// The same for every query of a statement of DataFusion.
pub fn merge_statement(statement: &mut Statement, place: &Place) -> Result<()> {
    rewrite_statement(statement, &mut Merge { scopes: Vec::new(), place })
}

type Scope = Vec<(Ident, WindowSpec)>;

/// Every query and every SELECT has its own scope: windows of an outer query are not seen by an inner one.
struct Merge<'p> {
    /// The windows of the SELECTs around the current expression, resolved.
    scopes: Vec<Scope>,
    place: &'p Place,
}

impl VisitorMut for Merge<'_> {
    type Break = Error;

    /// The ORDER BY of a query belongs to the query, but may use the windows of its SELECT.
    fn pre_visit_query(&mut self, query: &mut Query) -> ControlFlow<Error> {
        let named = match query.body.as_ref() {
            SetExpr::Select(select) => select.named_window.clone(),
            _ => Vec::new(),
        };
        self.enter(named)
    }

    fn post_visit_query(&mut self, _query: &mut Query) -> ControlFlow<Error> {
        self.scopes.pop();
        ControlFlow::Continue(())
    }

    fn pre_visit_select(&mut self, select: &mut Select) -> ControlFlow<Error> {
        self.enter(std::mem::take(&mut select.named_window))
    }

    fn post_visit_select(&mut self, _select: &mut Select) -> ControlFlow<Error> {
        self.scopes.pop();
        ControlFlow::Continue(())
    }

    fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<Error> {
        let Expr::Function(function) = expr else { return ControlFlow::Continue(()) };
        let scope = self.scopes.last().map_or(&[][..], Vec::as_slice);
        let merged = match function.over.take() {
            None => return ControlFlow::Continue(()),
            Some(WindowType::NamedWindow(name)) => self.find(scope, &name),
            Some(WindowType::WindowSpec(spec)) => self.complete(scope, spec),
        };
        match merged {
            Ok(spec) => {
                function.over = Some(WindowType::WindowSpec(spec));
                ControlFlow::Continue(())
            }
            Err(error) => ControlFlow::Break(error),
        }
    }
}

impl Merge<'_> {
    /// Resolves the definitions, each by those before it, and makes them the innermost scope.
    fn enter(&mut self, definitions: Vec<NamedWindowDefinition>) -> ControlFlow<Error> {
        let mut scope = Scope::new();
        for NamedWindowDefinition(name, definition) in definitions {
            if scope.iter().any(|(other, _)| normal(other) == normal(&name)) {
                let message = format!("the window {name} is defined twice");
                return ControlFlow::Break(self.error(message, &name, "Give one of them another name."));
            }
            let spec = match definition {
                NamedWindowExpr::NamedWindow(other) => self.find(&scope, &other),
                NamedWindowExpr::WindowSpec(spec) => self.complete(&scope, spec),
            };
            match spec {
                Ok(spec) => scope.push((name, spec)),
                Err(error) => return ControlFlow::Break(error),
            }
        }
        self.scopes.push(scope);
        ControlFlow::Continue(())
    }

    fn find(&self, scope: &[(Ident, WindowSpec)], name: &Ident) -> Result<WindowSpec> {
        let same = |other: &Ident| normal(other) == normal(name);
        scope.iter().find(|(other, _)| same(other)).map(|(_, spec)| spec.clone()).ok_or_else(|| {
            let known: Vec<&str> = scope.iter().map(|(name, _)| name.value.as_str()).collect();
            self.error(
                format!("the window {name} is not defined"),
                name,
                &match known.is_empty() {
                    true => "Define it behind FROM: WINDOW w AS (PARTITION BY … ORDER BY …).".to_owned(),
                    false => format!("Up to here, this SELECT defines {}.", known.join(", ")),
                },
            )
        })
    }

    fn complete(&self, scope: &[(Ident, WindowSpec)], mut spec: WindowSpec) -> Result<WindowSpec> {
        let Some(name) = spec.window_name.take() else { return Ok(spec) };
        let base = self.find(scope, &name)?;
        if !spec.partition_by.is_empty() {
            let hint = "Leave PARTITION BY out, or do not refer to the window.";
            return Err(self.error(
                format!("a copy of the window {name} cannot change its PARTITION BY"),
                &name,
                hint,
            ));
        }
        if !spec.order_by.is_empty() && !base.order_by.is_empty() {
            let hint = "Leave ORDER BY out, or do not refer to the window.";
            return Err(self.error(
                format!("a copy of the window {name} cannot change its ORDER BY"),
                &name,
                hint,
            ));
        }
        if base.window_frame.is_some() {
            let hint = format!("Write OVER {name} without parentheses, or define {name} without its frame.");
            return Err(self.error(
                format!("the window {name} has a frame and cannot be copied"),
                &name,
                &hint,
            ));
        }
        let order_by = if spec.order_by.is_empty() { base.order_by } else { spec.order_by };
        Ok(WindowSpec { partition_by: base.partition_by, order_by, ..spec })
    }

    fn error(&self, message: String, word: &Ident, hint: &str) -> Error {
        Error::user(message).hint(hint).at(place_of_span(self.place, word.span))
    }
}
