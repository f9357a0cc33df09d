//! What `status` says, from the newest manifest and what the broker answered; and whether that is healthy.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::connectors::PartitionInfo;
use crate::state::accounts::{self, NodeAccounts, Role, ViewAccounts};
use crate::state::manifest::{Accounts, Manifest};

/// A checkpoint is overdue after so many of its intervals …
const OVERDUE_INTERVALS: u64 = 3;
/// … but never before this: an epoch without rows may be left out for a minute.
const OVERDUE_LEAST: Duration = Duration::from_secs(180);

/// What counts as unhealthy beside accounts and checkpoints.
#[derive(Debug, Clone, Default)]
pub struct Limits {
    pub dead_letters: Option<u64>,
    pub lag: Option<u64>,
    /// Instead of the rule for overdue checkpoints.
    pub age: Option<Duration>,
}

/// When things happened, ms since the epoch.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    pub now: i64,
    /// The newest data manifest.
    pub checkpoint: Option<i64>,
    /// Since when a checkpoint is waited for: the newest one, or the first claim after one that ended a run.
    pub waiting_since: i64,
}

#[derive(Debug, Serialize)]
pub struct Status {
    pub pipeline: String,
    pub state: String,
    pub healthy: bool,
    pub reasons: Vec<String>,
    pub epoch: u64,
    pub generation: u64,
    pub parallelism: usize,
    /// `closed`, `stopped`, or `not stopped`: a process runs or has died.
    pub run: &'static str,
    pub checkpoint_ms: Option<i64>,
    pub checkpoint_age_ms: Option<i64>,
    pub interval_ms: Option<u64>,
    pub sources: Vec<Source>,
    pub views: Vec<ViewAccounts>,
    pub operators: Vec<Node>,
    pub sinks: Vec<Node>,
    /// By source, view or sink, then kind.
    pub dead_letters: BTreeMap<String, BTreeMap<String, u64>>,
    pub dead_letters_total: u64,
}

#[derive(Debug, Serialize)]
pub struct Source {
    pub name: String,
    pub watermark_us: Option<i64>,
    /// Records between what was read at the checkpoint and the broker's end.
    pub lag: Option<i64>,
    pub lag_unknown: Option<String>,
    #[serde(flatten)]
    pub accounts: Accounts,
    pub partitions: Vec<Partition>,
}

#[derive(Debug, Serialize)]
pub struct Partition {
    pub topic: String,
    pub partition: i32,
    pub next_offset: i64,
    pub end: Option<i64>,
    pub lag: Option<i64>,
    pub watermark_us: Option<i64>,
}

#[derive(Debug, Serialize)]
pub struct Node {
    pub id: String,
    pub watermark_us: Option<i64>,
    /// `None`: not counted, as by an older program, or no longer in the plan.
    pub accounts: Option<NodeAccounts>,
    pub files: usize,
    pub file_rows: u64,
    pub file_bytes: u64,
    /// Rows and files of the commit that the manifest prepared, and that the next start makes if it is not made.
    pub prepared_files: usize,
    pub prepared_rows: u64,
}

/// The partitions of the source, or why they are not known.
pub type Ends = Result<Vec<PartitionInfo>, String>;

pub fn status(manifest: &Manifest, state: &str, ends: &Ends, times: Times, limits: &Limits) -> Status {
    let nodes = |sinks: bool| {
        let sink = |a: &NodeAccounts| matches!(a.role, Role::Sink | Role::KeyedSink);
        // A node that was not counted is a sink if its name has no view.
        let is = |id: &str, a: Option<&NodeAccounts>| a.map_or(accounts::view_of(id).is_none(), sink);
        let of = manifest.nodes.iter().filter(|(id, node)| is(id, node.accounts.as_ref()) == sinks);
        of.map(|(id, _)| node(manifest, id)).collect::<Vec<_>>()
    };
    let mut status = Status {
        pipeline: manifest.pipeline.clone(),
        state: state.to_owned(),
        healthy: true,
        reasons: Vec::new(),
        epoch: manifest.epoch,
        generation: manifest.generation,
        parallelism: manifest.parallelism,
        run: match (manifest.closed, manifest.stopped) {
            (true, _) => "closed",
            (false, true) => "stopped",
            (false, false) => "not stopped",
        },
        checkpoint_ms: times.checkpoint,
        checkpoint_age_ms: times.checkpoint.map(|at| times.now - at),
        interval_ms: manifest.interval_ms,
        sources: manifest.sources.keys().map(|name| source(manifest, name, ends)).collect(),
        views: accounts::views(manifest),
        operators: nodes(false),
        sinks: nodes(true),
        dead_letters: manifest.letters.clone(),
        dead_letters_total: manifest.dead_letters.iter().map(|segment| segment.rows).sum(),
    };
    status.reasons = reasons(manifest, &status, times, limits);
    status.healthy = status.reasons.is_empty();
    status
}

fn source(manifest: &Manifest, name: &str, ends: &Ends) -> Source {
    let progress = manifest.sources.get(name).cloned().unwrap_or_default();
    let end = |topic: u16, partition: i32| {
        let found = ends.as_ref().ok()?.iter().find(|p| p.topic == topic && p.partition == partition)?;
        Some(found.high)
    };
    let partition = |p: &crate::state::manifest::PartitionProgress| {
        let end = end(p.topic, p.partition);
        Partition {
            topic: progress.topics.get(usize::from(p.topic)).cloned().unwrap_or_default(),
            partition: p.partition,
            next_offset: p.next_offset,
            end,
            lag: end.map(|end| (end - p.next_offset).max(0)),
            watermark_us: shown(p.watermark),
        }
    };
    let partitions: Vec<Partition> = progress.partitions.iter().map(partition).collect();
    // A partition that the checkpoint does not know yet is read from its start.
    let new = |p: &&PartitionInfo| {
        !progress.partitions.iter().any(|known| (known.topic, known.partition) == (p.topic, p.partition))
    };
    let unread: i64 = ends.iter().flatten().filter(new).map(|p| p.high - p.low).sum();
    let lag: Option<i64> = partitions.iter().map(|p| p.lag).sum();
    Source {
        name: name.to_owned(),
        watermark_us: shown(progress.watermark),
        lag: lag.filter(|_| ends.is_ok()).map(|lag| lag + unread),
        lag_unknown: match (ends, lag) {
            (Err(why), _) => Some(why.clone()),
            (Ok(_), None) => Some("a partition is gone".to_owned()),
            (Ok(_), Some(_)) => None,
        },
        accounts: progress.accounts,
        partitions,
    }
}

fn node(manifest: &Manifest, id: &str) -> Node {
    let progress = manifest.nodes.get(id);
    let files = || manifest.files.iter().filter(|file| file.node == id);
    let prepared =
        || manifest.commits.iter().filter(|commit| commit.sink == id).flat_map(|commit| &commit.files);
    Node {
        id: id.to_owned(),
        watermark_us: shown(progress.and_then(|progress| progress.watermark)),
        accounts: progress.and_then(|progress| progress.accounts.clone()),
        files: files().count(),
        file_rows: files().map(|file| file.rows).sum(),
        file_bytes: files().map(|file| file.bytes).sum(),
        prepared_files: prepared().count(),
        prepared_rows: prepared().map(|file| file.rows).sum(),
    }
}

/// `None` before any row and after the end of a closed stream.
fn shown(watermark: Option<i64>) -> Option<i64> {
    watermark.filter(|at| crate::runtime::coordinator::shown_watermark(*at).is_some())
}

fn reasons(manifest: &Manifest, status: &Status, times: Times, limits: &Limits) -> Vec<String> {
    let mut reasons: Vec<String> = accounts::faults(manifest)
        .iter()
        .map(|fault| format!("the accounts of {} do not add up: {}", fault.at, fault.what))
        .collect();
    let ended = manifest.closed || manifest.stopped;
    if manifest.data_epoch.is_none() {
        reasons.push("no checkpoint was ever taken".to_owned());
    } else if let Some(limit) = overdue_after(manifest, limits).filter(|_| !ended) {
        let waited = times.now - times.waiting_since;
        if waited > limit {
            reasons.push(format!(
                "no checkpoint since {} and nobody stopped the pipeline: its process is gone or stuck",
                super::ago(waited)
            ));
        }
    }
    if let Some(most) = limits.dead_letters.filter(|most| status.dead_letters_total > *most) {
        reasons.push(format!("{} dead letters are more than {most}", status.dead_letters_total));
    }
    for source in &status.sources {
        let Some(most) = limits.lag else { continue };
        match source.lag {
            Some(lag) if lag.unsigned_abs() > most => {
                reasons.push(format!("the lag of {} is {lag}, more than {most}", source.name));
            }
            Some(_) => {}
            None => reasons.push(format!("the lag of {} is unknown", source.name)),
        }
    }
    reasons
}

/// ms; `None`: the program that wrote the state did not say how often it takes checkpoints.
fn overdue_after(manifest: &Manifest, limits: &Limits) -> Option<i64> {
    let ms = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    let rule = |interval: u64| {
        ms(Duration::from_millis(interval.saturating_mul(OVERDUE_INTERVALS)).max(OVERDUE_LEAST))
    };
    limits.age.map(ms).or(manifest.interval_ms.map(rule))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::state::manifest::{Claimant, PartitionProgress, Segment, next_claim};

    fn manifest() -> Manifest {
        let claimant = Claimant { pipeline: "p", writer: Uuid::from_u128(1), now_ms: 0 };
        let mut manifest = next_claim(None, 1, Uuid::from_u128(2), &claimant).next_data(0);
        manifest.interval_ms = Some(10_000);
        let source = manifest.sources.entry("s".into()).or_default();
        source.accounts = Accounts { read: 9, accepted: 8, dead_letters: 1, ..Accounts::default() };
        let partition =
            |partition, next_offset| PartitionProgress { topic: 0, partition, next_offset, watermark: None };
        source.partitions = vec![partition(0, 5), partition(1, 4)];
        let path = "dead-letters/s/d".to_owned();
        manifest.dead_letters = vec![Segment { path, epoch: 2, rows: 1, source: "s".into() }];
        manifest
    }

    fn reasons_at(manifest: &Manifest, now: i64, ends: &Ends, limits: &Limits) -> Vec<String> {
        let times = Times { now, checkpoint: Some(0), waiting_since: 0 };
        status(manifest, "./state", ends, times, limits).reasons
    }

    #[test]
    fn a_checkpoint_is_overdue_after_three_intervals_but_not_before_three_minutes() {
        let unknown: Ends = Err("nobody asked".into());
        let limits = Limits::default();
        let mut manifest = manifest();
        assert_eq!(reasons_at(&manifest, 180_000, &unknown, &limits), [""; 0]);
        let found = reasons_at(&manifest, 180_001, &unknown, &limits);
        assert!(found.len() == 1 && found[0].contains("gone or stuck"), "{found:?}");
        manifest.interval_ms = Some(120_000);
        assert_eq!(reasons_at(&manifest, 360_000, &unknown, &limits), [""; 0]);
        assert_eq!(reasons_at(&manifest, 360_001, &unknown, &limits).len(), 1);
        let sooner = Limits { age: Some(Duration::from_secs(1)), ..Limits::default() };
        assert_eq!(reasons_at(&manifest, 1_001, &unknown, &sooner).len(), 1);
        for ended in [|m: &mut Manifest| m.stopped = true, |m: &mut Manifest| m.closed = true] {
            let mut manifest = manifest.clone();
            ended(&mut manifest);
            assert_eq!(reasons_at(&manifest, i64::MAX, &unknown, &sooner), [""; 0]);
        }
        manifest.data_epoch = None;
        assert_eq!(reasons_at(&manifest, 0, &unknown, &limits), ["no checkpoint was ever taken"]);
    }

    #[test]
    fn lag_and_dead_letters_have_limits() {
        let info = |partition, high| PartitionInfo { topic: 0, partition, low: 0, high };
        let manifest = manifest();
        let ends: Ends = Ok(vec![info(0, 7), info(1, 4), info(2, 10)]);
        let times = Times { now: 0, checkpoint: Some(0), waiting_since: 0 };
        let found = status(&manifest, "", &ends, times, &Limits::default());
        assert_eq!((found.sources[0].lag, found.healthy), (Some(12), true));
        let limit =
            |lag, dead_letters| Limits { lag: Some(lag), dead_letters: Some(dead_letters), age: None };
        assert_eq!(reasons_at(&manifest, 0, &ends, &limit(12, 1)), [""; 0]);
        let found = reasons_at(&manifest, 0, &ends, &limit(11, 0));
        assert_eq!(found, ["1 dead letters are more than 0", "the lag of s is 12, more than 11"]);
        let gone: Ends = Ok(vec![info(0, 7)]);
        assert_eq!(reasons_at(&manifest, 0, &gone, &limit(99, 9)), ["the lag of s is unknown"]);
        assert_eq!(reasons_at(&manifest, 0, &Err("down".into()), &limit(99, 9)), ["the lag of s is unknown"]);
    }

    #[test]
    fn accounts_that_do_not_add_up_are_named() {
        let mut manifest = manifest();
        manifest.sources.entry("s".into()).or_default().accounts.read += 1;
        let found = reasons_at(&manifest, 0, &Err("down".into()), &Limits::default());
        assert!(
            found.len() == 1 && found[0].starts_with("the accounts of s do not add up: read 10"),
            "{found:?}"
        );
    }
}
