//! How one query is run: settings, a limit, a plan with figures, and so that it can be cancelled.

use std::sync::Arc;

use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::dataframe::DataFrame;
use datafusion::error::{DataFusionError, Result as DataFusionResult};
use datafusion::execution::session_state::SessionStateBuilder;
use datafusion::logical_expr::{LogicalPlan, LogicalPlanBuilder, Sort};
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::coop::CooperativeExec;
use datafusion::prelude::SessionContext;
use datafusion::sql::parser::Statement as DfStatement;

use super::Answer;
use super::window::with_windows;
use crate::error::{Error, Place, Result};
use crate::plan::session::batch_session;
use crate::plan::views::located;

/// What is wanted of a query.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ask {
    /// At most so many rows; all without.
    pub limit: Option<usize>,
    /// Queries are run, and the answer says what their plans did.
    pub explain_analyze: bool,
}

/// What SET changed, for the statements that follow.
#[derive(Debug, Clone, Default)]
pub struct Settings(pub(super) Option<ConfigOptions>);

/// The rows of a query, no more than were asked for.
pub struct Found {
    pub answer: Answer,
    /// There are more rows.
    pub rest: Option<Rest>,
    pub settings: Settings,
}

/// Rows that were left out of an answer.
pub struct Rest(DataFrame);

impl Rest {
    /// How many rows the query has in all. Runs it again, without its order.
    ///
    /// # Errors
    /// Those of the query.
    pub async fn count(self) -> Result<usize> {
        Ok(self.0.count().await?)
    }
}

/// A session for one statement.
pub(super) fn session(settings: &Settings) -> Result<SessionContext> {
    let session = yielding(&with_windows(&batch_session()?));
    if let Some(options) = &settings.0 {
        *session.state_ref().write().config_mut().options_mut() = options.clone();
    }
    Ok(session)
}

/// The same session, whose queries can be cancelled whatever they do.
pub(super) fn yielding(session: &SessionContext) -> SessionContext {
    let state = SessionStateBuilder::new_from_existing(session.state());
    SessionContext::new_with_state(state.with_physical_optimizer_rule(Arc::new(Yielding)).build())
}

/// One statement whose tables are registered.
pub(super) async fn run(
    session: &SessionContext,
    statement: DfStatement,
    place: &Place,
    ask: Ask,
) -> Result<(Answer, Option<Rest>)> {
    let planner = session.state();
    let plan = planner.statement_to_plan(statement).await.map_err(|error| located(error, place))?;
    let is_query = is_query(&plan);
    let limit = ask.limit.filter(|_| is_query && !ask.explain_analyze);
    let asked = match limit {
        _ if is_query && ask.explain_analyze => {
            LogicalPlanBuilder::from(plan.clone()).explain(false, true)?.build()?
        }
        // One more than is wanted says whether there are more.
        Some(limit) => {
            let limit = limit.saturating_add(1).min(i64::MAX as usize);
            LogicalPlanBuilder::from(plan.clone()).limit(0, Some(limit))?.build()?
        }
        None => plan.clone(),
    };
    let frame = session.execute_logical_plan(asked).await.map_err(|error| located(error, place))?;
    let schema = Arc::new(frame.schema().as_arrow().clone());
    let batches = frame.collect().await.map_err(|error| failed(error, place))?;
    let (answer, more) = limited(Answer { schema, batches }, limit);
    let rest = match more {
        true => Some(Rest(session.execute_logical_plan(unordered(&plan).clone()).await?)),
        false => None,
    };
    Ok((answer, rest))
}

/// A query that fails while it runs. What a store of ours says is found wherever DataFusion has wrapped it.
fn failed(error: DataFusionError, place: &Place) -> Error {
    if let DataFusionError::External(inner) = error.find_root()
        && let Some(ours) = inner.downcast_ref::<Error>()
    {
        let said = Error::new(ours.domain(), ours.to_string());
        return match ours.hint_text() {
            Some(hint) => said.hint(hint),
            None => said,
        };
    }
    Error::from(error).at(place.clone())
}

fn is_query(plan: &LogicalPlan) -> bool {
    !matches!(
        plan,
        LogicalPlan::Explain(_)
            | LogicalPlan::Analyze(_)
            | LogicalPlan::Statement(_)
            | LogicalPlan::Ddl(_)
            | LogicalPlan::Dml(_)
            | LogicalPlan::Copy(_)
            | LogicalPlan::DescribeTable(_)
    )
}

/// The plan without what orders its rows at the end: as many rows, and nothing has to be kept for them.
fn unordered(plan: &LogicalPlan) -> &LogicalPlan {
    match plan {
        LogicalPlan::Sort(Sort { input, fetch: None, .. }) => unordered(input),
        _ => plan,
    }
}

/// At most `limit` rows, and whether there were more.
fn limited(answer: Answer, limit: Option<usize>) -> (Answer, bool) {
    let Some(limit) = limit else { return (answer, false) };
    let rows: usize = answer.batches.iter().map(|batch| batch.num_rows()).sum();
    let mut left = limit;
    let mut batches = Vec::new();
    for batch in answer.batches {
        let taken = batch.num_rows().min(left);
        left -= taken;
        batches.push(batch.slice(0, taken));
    }
    (Answer { schema: answer.schema, batches }, rows > limit)
}

/// Lets a query be cancelled while a join or UNNEST makes many rows out of few: DataFusion itself looks only at leaves
/// whether others wait.
#[derive(Debug)]
struct Yielding;

impl PhysicalOptimizerRule for Yielding {
    fn name(&self) -> &'static str {
        "yielding"
    }

    fn optimize(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        _config: &ConfigOptions,
    ) -> DataFusionResult<Arc<dyn ExecutionPlan>> {
        let wrap = |node: Arc<dyn ExecutionPlan>| {
            let multiplies = node.name().ends_with("JoinExec") || node.name() == "UnnestExec";
            Ok(match multiplies {
                true => Transformed::yes(Arc::new(CooperativeExec::new(node)) as Arc<dyn ExecutionPlan>),
                false => Transformed::no(node),
            })
        };
        plan.transform_up(wrap).data()
    }

    fn schema_check(&self) -> bool {
        true
    }
}
