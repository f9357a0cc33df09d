//! Merges state files beside the stream: begun after a manifest, taken up by a later one.
//!
//! What is merged is what the newest manifest names, so it does not change meanwhile; the files that went into it stay
//! until the manifest that names the merged one is acknowledged, as the garbage list has it. A later manifest may drop some
//! before they were read, and they are deleted beside the merge: their rows have left every frame, or a full snapshot has
//! them. They are merged without. A merge that a crash or a
//! stop interrupts leaves at most a file that no manifest names, which the next claimant finds. A merge that fails is
//! tried again later: the pipeline needs none.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio::task::JoinHandle;

use crate::error::{Error, Result};
use crate::plan::{NodeId, NodeKind, StreamPlan};
use crate::runtime::aside;
use crate::runtime::report::StatePart;
use crate::state::compaction::{choose, merge};
use crate::state::manifest::{Manifest, StateFile, file_name};
use crate::state::store::StateStore;
use crate::stream::{Micros, START_OF_TIME};

/// Files that become one.
struct Job {
    inputs: Vec<StateFile>,
    /// Key columns of keyed rows.
    keys: Option<Vec<usize>>,
    horizon: Micros,
    /// The name of the merged file.
    path: String,
    generation: u64,
}

struct Done {
    inputs: BTreeSet<String>,
    /// Those that were deleted before they were read.
    gone: Vec<String>,
    /// `None`: no row was left.
    merged: Option<StateFile>,
}

/// The merge that runs, one at a time.
#[derive(Default)]
pub struct Compaction {
    running: Option<JoinHandle<Result<Vec<Done>>>>,
    /// By node: rows below are needed by no manifest from the newest one on.
    horizons: BTreeMap<NodeId, Micros>,
}

impl Compaction {
    /// Remembers how far back rows are needed once the manifest of these parts is published.
    pub fn note(&mut self, states: &[(NodeId, StatePart)]) {
        self.horizons.clear();
        for (node, part) in states {
            let horizon = self.horizons.entry(*node).or_insert(Micros::MAX);
            *horizon = part.horizon.min(*horizon);
        }
    }

    /// Begins to merge files of the newest manifest, unless a merge runs or there is nothing to merge.
    pub fn begin(&mut self, plan: &StreamPlan, store: &Arc<StateStore>, newest: &Manifest) {
        if self.running.is_some() {
            return;
        }
        let jobs = jobs(plan, newest, &self.horizons);
        if jobs.is_empty() {
            return;
        }
        let store = Arc::clone(store);
        let running = aside::spawn(async move {
            let mut done = Vec::with_capacity(jobs.len());
            for job in jobs {
                done.push(job.run(&store).await?);
            }
            Ok(done)
        });
        self.running = Some(running);
    }

    /// Puts merged files in the place of theirs in the next manifest; a file that came too late is an orphan.
    pub async fn take_up(&mut self, next: &mut Manifest, orphans: &mut Vec<String>) {
        let Some(running) = self.running.take_if(|running| running.is_finished()) else { return };
        let failed = |error: &dyn std::fmt::Display| {
            tracing::warn!(%error, "state files were not merged; it is tried again");
        };
        match running.await {
            Ok(Ok(done)) => done.into_iter().for_each(|done| replace(next, done, orphans)),
            Ok(Err(error)) => failed(&error),
            Err(error) => failed(&error),
        }
    }
}

/// Rows of a file that is gone meanwhile lay below the horizon, or a full snapshot has them: then all are gone.
fn replace(next: &mut Manifest, done: Done, orphans: &mut Vec<String>) {
    // One that is needed still was not deleted by us: without it there is nothing to put in the place of the others.
    if let Some(file) = done.gone.iter().find(|gone| next.files.iter().any(|file| file.path == **gone)) {
        tracing::warn!(%file, "state files were not merged: one is missing although the state needs it");
        orphans.extend(done.merged.map(|merged| merged.path));
        return;
    }
    let before = next.files.len();
    next.files.retain(|file| !done.inputs.contains(&file.path));
    match done.merged {
        Some(merged) if next.files.len() < before => next.files.push(merged),
        Some(merged) => orphans.push(merged.path),
        None => {}
    }
}

fn jobs(plan: &StreamPlan, newest: &Manifest, horizons: &BTreeMap<NodeId, Micros>) -> Vec<Job> {
    let mut kinds: BTreeMap<(&str, &str), Vec<&StateFile>> = BTreeMap::new();
    for file in &newest.files {
        kinds.entry((&file.node, &file.kind)).or_default().push(file);
    }
    let mut jobs = Vec::new();
    for ((id, kind), mut files) in kinds {
        let node = plan.nodes.iter().position(|node| node.id == id);
        let Some((node, keys)) = node.and_then(|node| Some((node, keys(&plan.nodes[node].kind, kind)?)))
        else {
            continue;
        };
        files.sort_by_key(|file| (file.epoch, file.path.as_str()));
        let Some(run) = choose(&files) else { continue };
        jobs.push(Job {
            inputs: files[run].iter().map(|file| (*file).clone()).collect(),
            keys,
            horizon: horizons.get(&node).copied().unwrap_or(START_OF_TIME),
            // No shard writes a file of this kind, and one merge of it runs at a time, after an epoch of its own.
            path: file_name(id, &format!("{kind}-merged"), newest.generation, newest.epoch, 0),
            generation: newest.generation,
        });
    }
    jobs
}

/// The key columns of a node's files of one kind; `Some(None)`: rows without a key. `None`: they are not known.
#[expect(clippy::option_option, reason = "the inner one is what `merge` takes")]
fn keys(node: &NodeKind, kind: &str) -> Option<Option<Vec<usize>>> {
    match (node, kind) {
        (NodeKind::Over(_), "rows") => Some(None),
        (NodeKind::Over(spec), "keys") => Some(Some((0..spec.partition_by.len()).collect())),
        (NodeKind::Group(spec), "groups") => Some(Some((0..spec.keys.len()).collect())),
        (NodeKind::Sink(sink), "newest") => Some(Some(sink.key.clone())),
        _ => None,
    }
}

impl Job {
    async fn run(self, store: &StateStore) -> Result<Done> {
        let (mut files, mut gone) = (Vec::with_capacity(self.inputs.len()), Vec::new());
        for file in &self.inputs {
            match store.find_file(&file.path).await? {
                Some(bytes) => files.push(bytes),
                None => gone.push(file.path.clone()),
            }
        }
        let Self { inputs, keys, horizon, path, generation } = self;
        #[expect(
            clippy::disallowed_methods,
            reason = "the runtime spawns; decoding would hold up other tasks"
        )]
        let merged = tokio::task::spawn_blocking(move || merge(files, keys.as_deref(), horizon));
        let merged = merged
            .await
            .map_err(|error| Error::internal("a merge ended without a word").because(error))??;
        let epoch = inputs.iter().map(|file| file.epoch).max().unwrap_or(0);
        let first = inputs.first().map(|file| (file.node.clone(), file.kind.clone()));
        let inputs = inputs.into_iter().map(|file| file.path).collect();
        let (Some(merged), Some((node, kind))) = (merged, first) else {
            return Ok(Done { inputs, gone, merged: None });
        };
        let (rows, bytes) = (merged.rows as u64, merged.bytes.len() as u64);
        store.put_file(&path, merged.bytes).await?;
        let (min_time, max_time) = merged.times.unzip();
        let merged = StateFile { path, node, kind, epoch, generation, rows, bytes, min_time, max_time };
        Ok(Done { inputs, gone, merged: Some(merged) })
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{Int64Array, RecordBatch, UInt8Array};
    use bytes::Bytes;
    use object_store::memory::InMemory;
    use uuid::Uuid;

    use super::*;
    use crate::state::compaction::TIME;
    use crate::state::files::{decode, encode};
    use crate::state::keys::KEY_GROUPS;
    use crate::state::manifest::{Claimant, next_claim};
    use crate::stream::clock::Clock;

    fn rows(times: &[i64]) -> Bytes {
        let groups = Arc::new(UInt8Array::from(vec![0; times.len()]));
        let times = Arc::new(Int64Array::from(times.to_vec()));
        encode(&RecordBatch::try_from_iter([("__group", groups as _), (TIME, times as _)]).unwrap()).unwrap()
    }

    fn times(file: Bytes) -> Vec<i64> {
        let batches = decode(file, 0..KEY_GROUPS as u16).unwrap();
        let column = |batch: &RecordBatch| {
            batch.column(1).as_any().downcast_ref::<Int64Array>().unwrap().values().to_vec()
        };
        let mut times: Vec<i64> = batches.iter().flat_map(column).collect();
        times.sort_unstable();
        times
    }

    fn file(epoch: u64) -> StateFile {
        StateFile {
            path: file_name("n", "rows", 1, epoch, 0),
            node: "n".into(),
            kind: "rows".into(),
            epoch,
            generation: 1,
            rows: 1,
            bytes: 1,
            min_time: None,
            max_time: None,
        }
    }

    /// A manifest that came while files were being merged dropped the oldest, whose rows have left the frame.
    #[tokio::test]
    async fn a_file_that_is_dropped_before_it_is_read_is_merged_without() {
        let store = StateStore::new(Arc::new(InMemory::new()), object_store::path::Path::default(), Clock);
        for epoch in 1..=4 {
            store.put_file(&file(epoch).path, rows(&[epoch as i64 * 10])).await.unwrap();
        }
        let job = || Job {
            inputs: (1..=4).map(file).collect(),
            keys: None,
            horizon: 0,
            path: file_name("n", "rows-merged", 1, 4, 0),
            generation: 1,
        };
        store.delete_files(&[file(1).path]).await.unwrap();
        let claimant = Claimant { pipeline: "p", writer: Uuid::from_u128(1), now_ms: 0 };
        let mut next = next_claim(None, 1, Uuid::from_u128(2), &claimant);
        next.files = (2..=6).map(file).collect();
        let mut orphans = Vec::new();
        replace(&mut next, job().run(&store).await.unwrap(), &mut orphans);
        let paths: Vec<&str> = next.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(paths, [file(5).path, file(6).path, job().path]);
        assert!(orphans.is_empty());
        assert_eq!(times(store.get_file(&job().path).await.unwrap()), [20, 30, 40]);

        // One that the state needs is missing: what is left of the state stays as it is.
        next.files = (1..=6).map(file).collect();
        let before = next.files.clone();
        replace(&mut next, job().run(&store).await.unwrap(), &mut orphans);
        assert_eq!((next.files, orphans), (before, vec![job().path]));
        // A full snapshot came meanwhile, and all are gone.
        store.delete_files(&(1..=4).map(|epoch| file(epoch).path).collect::<Vec<_>>()).await.unwrap();
        let done = job().run(&store).await.unwrap();
        assert!(done.merged.is_none() && done.gone.len() == 4);
    }
}
