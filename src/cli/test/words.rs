//! What a pipeline's SQL says of the values that matter: texts that columns are compared with, intervals of windows.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use sqlparser::ast::{Expr, Query, SetExpr, Value, Visit, Visitor};

use crate::sql::{Catalog, SinkInput, interval};
use crate::stream::Micros;

/// By column or field: texts it is compared with.
#[derive(Debug, Default)]
pub struct Words {
    by_column: BTreeMap<String, BTreeSet<String>>,
    /// Of VALUES: a column may be joined with them.
    values: BTreeSet<String>,
    pub intervals: BTreeSet<Micros>,
}

impl Words {
    pub fn of(catalog: &Catalog) -> Self {
        let mut words = Self::default();
        for view in &catalog.views {
            let _ = view.query.visit(&mut words);
        }
        for sink in &catalog.sinks {
            if let SinkInput::Query(query) = &sink.input {
                let _ = query.visit(&mut words);
            }
        }
        for column in catalog.sources.iter().flat_map(|source| &source.computed) {
            let _ = column.expr.visit(&mut words);
        }
        words
    }

    /// Texts that a column may meet; those that it is compared with first.
    pub fn texts(&self, column: &str) -> Vec<String> {
        let own = self.by_column.get(column).into_iter().flatten();
        own.chain(&self.values).cloned().collect()
    }
}

impl Visitor for Words {
    type Break = ();

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        if let SetExpr::Values(values) = query.body.as_ref() {
            let mut found = Mentioned::default();
            let _ = values.visit(&mut found);
            self.values.append(&mut found.texts);
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        match expr {
            Expr::Interval(interval) => {
                self.intervals.extend(interval::literal_micros(interval).ok().filter(|micros| *micros > 0));
            }
            Expr::InList { .. } | Expr::BinaryOp { .. } | Expr::Like { .. } | Expr::Case { .. } => {
                let mut found = Mentioned::default();
                let _ = expr.visit(&mut found);
                // A field is named by a text: s['f'].
                for name in found.columns.iter().chain(&found.texts) {
                    let others = found.texts.iter().filter(|text| *text != name).cloned();
                    self.by_column.entry(name.clone()).or_default().extend(others);
                }
            }
            _ => {}
        }
        ControlFlow::Continue(())
    }
}

/// Names and texts of an expression.
#[derive(Default)]
struct Mentioned {
    columns: BTreeSet<String>,
    texts: BTreeSet<String>,
}

impl Visitor for Mentioned {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        match expr {
            Expr::Identifier(name) => {
                self.columns.insert(name.value.clone());
            }
            Expr::CompoundIdentifier(parts) => {
                self.columns.extend(parts.last().map(|part| part.value.clone()))
            }
            Expr::Value(value) => {
                if let Value::SingleQuotedString(text) = &value.value {
                    self.texts.insert(text.clone());
                }
            }
            _ => {}
        }
        ControlFlow::Continue(())
    }
}
