//! What stands for [`tables`](self) in a build without the feature `delta`: no plan has a Delta sink then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::error::Result;
use crate::plan::{NodeId, SinkPlan, StreamPlan};
use crate::runtime::metrics::Metrics;
use crate::state::manifest::{Manifest, PreparedCommit, PreparedFile};
use crate::state::store::StateStore;
use crate::stream::Micros;

#[derive(Default)]
pub struct Tables {
    pub newest: u64,
}

impl Tables {
    pub async fn open(_: &StreamPlan, _: &str, _: Option<&Manifest>, _: (&str, &[NodeId])) -> Result<Self> {
        Ok(Self::default())
    }

    pub fn is_written(&self, _: NodeId) -> bool {
        false
    }

    pub async fn part(&mut self, _: &StreamPlan, _: &StreamPlan, _: &Manifest) -> Result<Self> {
        Ok(Self::default())
    }

    pub async fn commit(
        &mut self,
        _: &StreamPlan,
        _: (&Manifest, i64),
        _: &StateStore,
        _: &Metrics,
    ) -> Result<()> {
        Ok(())
    }

    pub fn begin_upkeep(
        &mut self,
        _: &StreamPlan,
        _: &Manifest,
        _: &Arc<StateStore>,
        _: &Metrics,
    ) -> Result<()> {
        Ok(())
    }
}

pub fn prepared_commits(
    _: &StreamPlan,
    _: &Manifest,
    _: Vec<(NodeId, Vec<PreparedFile>, Micros)>,
    _: &str,
) -> Vec<PreparedCommit> {
    Vec::new()
}

pub fn stand_in(
    _: &mut StreamPlan,
    _: &BTreeSet<String>,
    _: &BTreeMap<String, String>,
    _: u64,
) -> BTreeMap<String, String> {
    BTreeMap::new()
}

pub fn stands_for(_: &SinkPlan) -> Option<String> {
    None
}

pub async fn all_there(_: &BTreeMap<String, String>, _: &Manifest) -> Result<bool> {
    Ok(true)
}

pub async fn forget(_: &BTreeMap<String, String>) -> Result<()> {
    Ok(())
}

pub fn writes(sink: &SinkPlan, commit: &PreparedCommit) -> bool {
    sink.name == commit.sink
}

pub async fn is_committed(_: &PreparedCommit, _: &str) -> Result<bool> {
    Ok(true)
}

pub fn may_grow(_: &StreamPlan, _: NodeId, _: &str) -> bool {
    false
}
