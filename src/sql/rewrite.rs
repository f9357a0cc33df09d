//! Runs a visitor over every query of a node or of a statement.

use std::ops::ControlFlow;

use datafusion::sql::parser::{CopyToSource, Statement};
use sqlparser::ast::{VisitMut, VisitorMut};

use crate::error::{Error, Result};

/// # Errors
/// What the visitor breaks with.
pub fn rewrite<V: VisitorMut<Break = Error>>(node: &mut impl VisitMut, visitor: &mut V) -> Result<()> {
    match node.visit(visitor) {
        ControlFlow::Break(error) => Err(error),
        ControlFlow::Continue(()) => Ok(()),
    }
}

/// The same for a statement of DataFusion.
///
/// # Errors
/// What the visitor breaks with.
pub fn rewrite_statement<V: VisitorMut<Break = Error>>(
    statement: &mut Statement,
    visitor: &mut V,
) -> Result<()> {
    match statement {
        Statement::Statement(statement) => rewrite(statement.as_mut(), visitor),
        Statement::CopyTo(copy) => match &mut copy.source {
            CopyToSource::Query(query) => rewrite(query.as_mut(), visitor),
            CopyToSource::Relation(_) => Ok(()),
        },
        Statement::Explain(explain) => rewrite_statement(&mut explain.statement, visitor),
        Statement::CreateExternalTable(_) | Statement::Reset(_) => Ok(()),
    }
}
