//! What stands for [`history`](self) in a build without the feature `delta`: there is no backup to read.

use std::sync::Arc;

use crate::connectors::{PartitionInfo, SourceConnector, SourceReader};
use crate::error::{Error, Result};
use crate::plan::{NodeId, SourcePlan, StreamPlan};
use crate::runtime::metrics::SourceMetrics;
use crate::runtime::start::{Beginning, from_topic, progress_of};
use crate::state::manifest::{HistoryProgress, Manifest, PartitionProgress};
use crate::stream::Positions;

/// There is none.
#[derive(Debug, Clone)]
pub enum Bootstrap {}

/// Nor anything that reads it.
pub struct Feeder(());

impl Feeder {
    pub async fn run(self) -> Result<()> {
        Ok(())
    }
}

impl Bootstrap {
    pub fn progress(&self, _: &[PartitionProgress]) -> Option<HistoryProgress> {
        match *self {}
    }

    pub fn limit(&mut self, _: &Positions) {
        match *self {}
    }

    pub fn until(&self) -> &Positions {
        match *self {}
    }

    pub fn readers(
        &self,
        _: &SourcePlan,
        _: (&Positions, &Positions),
        _: usize,
        _: &Arc<dyn SourceConnector>,
        _: &Arc<SourceMetrics>,
    ) -> (Feeder, Vec<Box<dyn SourceReader>>) {
        match *self {}
    }
}

pub fn builds(_: &StreamPlan, _: NodeId) -> bool {
    false
}

pub fn continues(_: &StreamPlan, _: NodeId, _: Option<&Manifest>) -> bool {
    false
}

pub async fn beginning(
    plan: &StreamPlan,
    latest: Option<&Manifest>,
    source: &dyn SourceConnector,
    seen: &[PartitionInfo],
    allow_gap: bool,
) -> Result<Beginning> {
    let Some((_, source_plan)) = plan.source() else { return Err(Error::internal("a plan without source")) };
    from_topic(source_plan, progress_of(latest, source_plan), source, seen, allow_gap).await
}
