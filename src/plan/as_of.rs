//! `FOR SYSTEM_TIME AS OF` in the condition of a JOIN: what stands for it, and its refusal in streams.
//!
//! Of the table's rows with the keys of a row it means the newest one that was known at that row's time. Batch gives it
//! its meaning (`batch::asof`); a stream has no history to look into.

use std::sync::Arc;

use arrow::datatypes::DataType;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::common::{Diagnostic, Result, exec_err};
use datafusion::error::DataFusionError;
use datafusion::logical_expr::{
    ColumnarValue, Expr, LogicalPlan, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use datafusion::optimizer::AnalyzerRule;

use crate::sql::as_of::FUNCTION;

/// The function, which is never called: a JOIN takes it away.
pub fn function() -> ScalarUDF {
    // Nothing may be concluded from it, nor may it move.
    ScalarUDF::new_from_impl(SystemTimeAsOf { signature: Signature::any(1, Volatility::Volatile) })
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct SystemTimeAsOf {
    signature: Signature,
}

impl ScalarUDFImpl for SystemTimeAsOf {
    fn name(&self) -> &str {
        FUNCTION
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Boolean)
    }

    fn invoke_with_args(&self, _: ScalarFunctionArgs) -> Result<ColumnarValue> {
        exec_err!("FOR SYSTEM_TIME AS OF belongs to a JOIN")
    }
}

/// The time of which an expression asks, if it is the function.
pub fn moment(expr: &Expr) -> Option<&Expr> {
    match expr {
        Expr::ScalarFunction(call) if call.func.name() == FUNCTION => call.args.first(),
        _ => None,
    }
}

/// The first time of which an expression or a part of it asks.
pub fn moment_within(expr: &Expr) -> Option<Expr> {
    let mut found = None;
    // The closure never fails.
    let _ = expr.apply(|part| {
        found = moment(part).cloned();
        Ok(if found.is_some() { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
    });
    found
}

/// A refusal, at the place of the first column that an expression names.
pub fn refused(message: impl Into<String>, hint: &str, at: &Expr) -> DataFusionError {
    let message = message.into();
    let span = at.column_refs().into_iter().find_map(|column| column.spans().first());
    let mut diagnostic = Diagnostic::new_error(message.clone(), span);
    diagnostic.add_help(hint, None);
    DataFusionError::Plan(message).with_diagnostic(diagnostic)
}

/// Refuses the clause in streams.
#[derive(Debug)]
pub struct Refuse;

impl AnalyzerRule for Refuse {
    fn analyze(&self, plan: LogicalPlan, _: &ConfigOptions) -> Result<LogicalPlan> {
        let mut found = None;
        plan.apply_with_subqueries(|node| {
            node.apply_expressions(|expr| {
                found = found.take().or_else(|| moment_within(expr));
                Ok(TreeNodeRecursion::Continue)
            })
        })?;
        match found {
            None => Ok(plan),
            Some(moment) => Err(refused(
                "a JOIN with FOR SYSTEM_TIME AS OF cannot run in a stream",
                "Ask it of history, with `millstream query`; a look-up JOIN sees its table as it is then.",
                &moment,
            )),
        }
    }

    fn name(&self) -> &'static str {
        "refuse_system_time"
    }
}

/// Makes a session of streams refuse the clause.
pub fn refuse_in(session: &datafusion::prelude::SessionContext) {
    session.add_analyzer_rule(Arc::new(Refuse));
}
