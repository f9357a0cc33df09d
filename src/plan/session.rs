//! The planning session: DataFusion with our types, functions and a chosen list of optimizer rules.
//!
//! Stream and batch plan with the same session settings, so that a view means the same in both. Streams use only
//! rules that keep the shape of a plan recognisable to [`super::lower`]; batch uses DataFusion's own list.

use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::datasource::TableType;
use datafusion::error::DataFusionError;
use datafusion::execution::memory_pool::FairSpillPool;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::execution::session_state::SessionStateBuilder;
use datafusion::logical_expr::Expr;
use datafusion::optimizer::OptimizerRule;
use datafusion::optimizer::extract_equijoin_predicate::ExtractEquijoinPredicate;
use datafusion::optimizer::optimize_projections::OptimizeProjections;
use datafusion::optimizer::push_down_filter::PushDownFilter;
use datafusion::optimizer::simplify_expressions::SimplifyExpressions;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::prelude::{SessionConfig, SessionContext};

use super::as_of::{self, refuse_in};
use super::order::TotalOrder;
use crate::error::Result;

/// Settings that stream and batch share: strings stay Utf8, spans are kept for error places.
pub fn session_config() -> SessionConfig {
    let mut config = SessionConfig::new().with_information_schema(true);
    let parser = &mut config.options_mut().sql_parser;
    parser.map_string_types_to_utf8view = false;
    parser.collect_spans = true;
    config.options_mut().execution.parquet.schema_force_view_types = false;
    config
}

/// A session that plans streams.
pub fn stream_session() -> Result<SessionContext> {
    let rules: Vec<Arc<dyn OptimizerRule + Send + Sync>> = vec![
        Arc::new(SimplifyExpressions::new()),
        Arc::new(ExtractEquijoinPredicate::new()),
        Arc::new(PushDownFilter::new()),
        Arc::new(OptimizeProjections::new()),
    ];
    let state = SessionStateBuilder::new()
        .with_default_features()
        .with_config(session_config())
        .with_optimizer_rules(rules)
        .build();
    let session = SessionContext::new_with_state(state);
    refuse_in(&session);
    with_functions(session)
}

/// A session that plans batch queries. Windows over the rows of a backup break ties as the stream does.
pub fn batch_session() -> Result<SessionContext> {
    batch_session_within(None)
}

/// The same with a budget in bytes: aggregations, joins and sorts beyond it spill to temporary files.
///
/// # Errors
/// External: there is no place for temporary files.
pub fn batch_session_within(budget: Option<u64>) -> Result<SessionContext> {
    let session = match budget {
        None => SessionContext::new_with_config(session_config()),
        Some(bytes) => {
            let pool = FairSpillPool::new(usize::try_from(bytes).unwrap_or(usize::MAX));
            let runtime = RuntimeEnvBuilder::new().with_memory_pool(Arc::new(pool)).build_arc()?;
            let mut config = session_config();
            // What each sort keeps back to merge what it spilt.
            let execution = &mut config.options_mut().execution;
            let share = usize::try_from(bytes / 64).unwrap_or(usize::MAX);
            execution.sort_spill_reservation_bytes = execution.sort_spill_reservation_bytes.min(share);
            SessionContext::new_with_config_rt(config, runtime)
        }
    };
    session.add_analyzer_rule(Arc::new(TotalOrder));
    with_functions(session)
}

fn with_functions(session: SessionContext) -> Result<SessionContext> {
    for function in millstream_udfs::all()? {
        session.register_udf(function.as_ref().clone());
    }
    session.register_udf(as_of::function());
    for function in millstream_udfs::aggregates() {
        session.register_udaf(function.as_ref().clone());
    }
    Ok(session)
}

/// A source as the planner sees it: a schema and no data.
#[derive(Debug)]
pub struct SourceTable {
    pub name: String,
    pub schema: SchemaRef,
}

#[async_trait]
impl TableProvider for SourceTable {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    async fn scan(
        &self,
        _state: &dyn Session,
        _projection: Option<&Vec<usize>>,
        _filters: &[Expr],
        _limit: Option<usize>,
    ) -> datafusion::error::Result<Arc<dyn ExecutionPlan>> {
        Err(DataFusionError::Plan(format!(
            "the source {} is unbounded and cannot be queried as a table",
            self.name
        )))
    }
}
