//! Bootstrap from history: a pipeline whose source has a backup begins with the backup's rows and goes on in the topic at
//! exactly the next offset of each partition (DESIGN §6).
//!
//! # Meaning
//! The backup is read as the topic would be if it had kept everything: each partition in the order of its offsets,
//! through the same source task, which decides lateness, watermarks and the place in the total order as ever. So the
//! answer is that of a pipeline that ran from the beginning, late ledger included, and nothing in a manifest, a view or
//! `verify` need know where rows came from. Partitions are read side by side in event time
//! ([`aligned`](crate::connectors::delta::history::aligned)).
//!
//! A start reads history
//! - when the state has no offsets yet and the backup has rows: from the backup's first row; `scan_startup` is for a
//!   missing or empty backup;
//! - when an earlier start did and was ended before all partitions had gone over: from where each was;
//! - when the topic no longer holds the next offset of a partition (the pipeline stood still for longer than the topic
//!   keeps): these partitions from there.
//!
//! # Contiguity
//! The backup's version is pinned first and the partitions are looked at after it. With H the next offset that the
//! pinned log names for a partition, and `[low, high)` what the topic holds, `low ≤ H ≤ high` must hold. `H < low`: records
//! are lost, unless `--allow-gap` says that this is fine. `H > high`: the topic was made anew. A partition that the
//! backup does not know must be held from its first record on. Rows below H are read from the backup, the others from the
//! topic: no row twice, none left out.
//!
//! # What can happen on the way
//! - *A kill.* Manifests hold the next offset of each partition as ever, and the version and H of each partition
//!   ([`HistoryProgress`]) until all have gone over. The next start goes on there. If the version is gone by then (a
//!   VACUUM), the newest one holds the same rows: what is below H never changes, except for dead letters that are
//!   replayed into it.
//! - *The backup's job runs meanwhile.* Its later rows are in the topic too, from H on.
//! - *The topic's records behind H expire before all is read* (the bootstrap takes longer than the topic keeps). Before it
//!   goes over, the newest version is pinned and read up to its own H, until the topic holds what follows.
//! - *A partition is added meanwhile.* It waits until its shard has gone over.
//! - *The backup is a sink of this pipeline* (its state was lost or reset). Its old owner is fenced before the version is
//!   pinned, it receives no row below H, and says nothing of offsets below H in its log: it goes on where it was. Who ran
//!   under another name is not fenced: the start is refused.
//! - *Online stores* are held back until every partition has passed H: what was served stays, no value of the past is
//!   shown, and each key is written once.
//!
//! # A backup that somebody else wrote
//! A Delta table whose log names no offsets, or plain files: see [`foreign`].
//!
//! Dead letters and tombstones of the past are no rows of the backup and not counted again. A future row cannot be in it.

mod feed;
mod foreign;
mod origins;

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::mpsc::channel;

use crate::connectors::{PartitionInfo, SourceConnector, SourceReader};
use crate::error::{Error, Result};
use crate::plan::source::Backup;
use crate::plan::{NodeId, NodeKind, SinkKind, SourceKind, SourcePlan, StreamPlan};
use crate::runtime::discovery::shard_of;
use crate::runtime::metrics::SourceMetrics;
use crate::runtime::start::{Beginning, from_topic, progress_of, say_lost};
use crate::state::manifest::{HistoryProgress, Manifest, PartitionProgress};
use crate::stream::{Place, Positions};

use feed::{Feeder, HistoryReader};
use foreign::Book;

/// Pieces that wait for a shard.
const CHANNEL: usize = 8;

/// What is read of the backup before the topic.
#[derive(Debug, Clone)]
pub struct Bootstrap {
    location: String,
    version: u64,
    topic: Arc<str>,
    /// Where each partition goes over to the topic.
    until: Positions,
    /// Nothing from these offsets on is wanted.
    limit: Option<Positions>,
    allow_gap: bool,
}

/// Decides where a start begins; changes nothing. `latest`: the newest manifest; `seen`: the topic as it was just now.
///
/// # Errors
/// External: a gap, a topic that was made anew, something that cannot be reached. User: a backup without offsets.
pub async fn beginning(
    plan: &StreamPlan,
    latest: Option<&Manifest>,
    source: &dyn SourceConnector,
    seen: &[PartitionInfo],
    allow_gap: bool,
) -> Result<Beginning> {
    let Some((_, source_plan)) = plan.source() else { return Err(Error::internal("a plan without source")) };
    let progress = progress_of(latest, source_plan);
    let Some(book) = Book::of(source_plan) else {
        return from_topic(source_plan, progress, source, seen, allow_gap).await;
    };
    let location = book.location.as_str();
    let topic = source.topics().first().cloned().unwrap_or_else(|| "".into());
    let known = progress.and_then(|progress| progress.history.as_ref());
    let behind = |at: &Positions| seen.iter().any(|p| at.get(place_of(p)).is_some_and(|at| at < p.low));
    let until = known.map(ends_of).unwrap_or_default();
    if let Some(progress) = progress.filter(|progress| known.is_none() && !behind(&progress.positions(0))) {
        return from_topic(source_plan, Some(progress), source, seen, allow_gap).await;
    }
    // What follows the history has expired: its newest version may have it.
    let version =
        known.filter(|known| known.location == location && !behind(&until)).map(|known| known.version);
    let pinned = match book.pin(&topic, version).await {
        Err(error) if version.is_some() => {
            tracing::warn!(%error, "the version that the bootstrap began with is gone; going on with the newest");
            book.pin(&topic, None).await?
        }
        pinned => pinned?,
    };
    let Some(mut pinned) = pinned else {
        return from_topic(source_plan, progress, source, seen, allow_gap).await;
    };
    book.complete(&mut pinned, &topic, progress.is_none().then_some(allow_gap)).await?;
    // Looked at after the pin: the backup cannot be ahead of it.
    let partitions = source.partitions().await?;
    let contiguity = Contiguity { topic: &topic, partitions: &partitions, backup: &pinned.next, allow_gap };
    let (positions, until) = match progress {
        Some(progress) => contiguity.resumed(&progress.positions(0), &until)?,
        None if pinned.next.is_empty() => {
            return from_topic(source_plan, None, source, seen, allow_gap).await;
        }
        None => {
            let until = contiguity.first()?;
            // A backup alone has nothing to be read again.
            match plan.sinks().all(|(node, _)| is_backup(plan, node, location)) {
                true => (until.clone(), until),
                false => (until.iter().map(|(place, _)| (place, 0)).collect(), until),
            }
        }
    };
    let version = pinned.version;
    if !until.iter().any(|(place, end)| positions.get(place).is_some_and(|at| at < end)) {
        return Ok(Beginning { partitions, positions, bootstrap: None });
    }
    // What the backup lacks is said before anything is written.
    book.check(version, &topic).await?;
    let bootstrap =
        Bootstrap { location: location.to_owned(), version, topic, until, limit: None, allow_gap };
    Ok(Beginning { partitions, positions, bootstrap: Some(bootstrap) })
}

fn place_of(p: &PartitionInfo) -> Place {
    Place::new(0, p.topic, p.partition)
}

fn ends_of(known: &HistoryProgress) -> Positions {
    known.until.iter().map(|p| (Place::new(0, p.topic, p.partition), p.next_offset)).collect()
}

/// The history of a source, if it can be read as the topic.
fn history_of(source: &SourcePlan) -> Option<&Backup> {
    match &source.kind {
        #[cfg(feature = "kafka")]
        SourceKind::Kafka(_) => source.backup.as_ref(),
        _ => None,
    }
}

fn is_backup(plan: &StreamPlan, node: NodeId, location: &str) -> bool {
    let NodeKind::Sink(sink) = &plan.nodes[node].kind else { return false };
    matches!(&sink.kind, SinkKind::Delta(config) if config.location == location)
}

/// Whether a sink that is new to a pipeline can be built from what the pipeline has read: there is a history, it is not the
/// sink itself, and its rows have offsets of their own.
pub fn builds(plan: &StreamPlan, node: NodeId) -> bool {
    let Some((_, source)) = plan.source() else { return false };
    let is_numbered =
        source.history_options.end_offsets.is_some() && source.history_options.offset_column.is_none();
    history_of(source).is_some_and(|backup| {
        !is_numbered && !plan.reads_letters(node) && !is_backup(plan, node, &backup.location())
    })
}

/// Whether a sink is the backup that the pipeline begins with: it goes on at its own offsets although its state is lost.
pub fn continues(plan: &StreamPlan, node: NodeId, latest: Option<&Manifest>) -> bool {
    let Some((_, source)) = plan.source() else { return false };
    let location = history_of(source).filter(|_| progress_of(latest, source).is_none());
    location.is_some_and(|backup| is_backup(plan, node, &backup.location()))
}

/// Below which offsets a sink has all rows already.
pub fn floor(plan: &StreamPlan, node: NodeId, bootstrap: Option<&Bootstrap>) -> Positions {
    let own = bootstrap.filter(|bootstrap| is_backup(plan, node, &bootstrap.location));
    own.map(|bootstrap| bootstrap.until.clone()).unwrap_or_default()
}

fn time_of(source: &SourcePlan) -> Option<&str> {
    source.event_time.map(|column| source.schema.field(column).name().as_str())
}

/// A backup beside the topic that it continues.
struct Contiguity<'a> {
    topic: &'a str,
    partitions: &'a [PartitionInfo],
    /// The next offset of each partition that the backup knows.
    backup: &'a BTreeMap<i32, i64>,
    allow_gap: bool,
}

impl Contiguity<'_> {
    /// Where the topic goes on when the backup is read from its beginning.
    fn first(&self) -> Result<Positions> {
        for (partition, next) in self.backup {
            if !self.partitions.iter().any(|p| p.partition == *partition) {
                let message = format!(
                    "topic {} has no partition {partition}, but its backup has it up to offset {next}",
                    self.topic
                );
                return Err(Error::external(message).hint(ANEW));
            }
        }
        let next = |p: &PartitionInfo| {
            let known = self.backup.get(&p.partition).copied();
            Ok((place_of(p), self.joined(p, known.unwrap_or(0), known.is_some())?))
        };
        self.partitions.iter().map(next).collect()
    }

    /// Goes on from `stored`, of a bootstrap that was to go over at `until`: (next offsets, where the topic goes on). The
    /// backup fills in what the topic no longer holds.
    fn resumed(&self, stored: &Positions, until: &Positions) -> Result<(Positions, Positions)> {
        let (mut next, mut ends) = (Positions::default(), Positions::default());
        for p in self.partitions {
            let place = place_of(p);
            let at = stored.get(place).unwrap_or(p.low);
            let mut end = until.get(place).unwrap_or(at).max(at);
            if end < p.low {
                let known = self.backup.get(&p.partition).copied().unwrap_or(0);
                end = self.joined(p, known.max(end), true)?;
            }
            next.raise(place, at);
            ends.raise(place, end);
        }
        Ok((next, ends))
    }

    /// Whether the topic goes on at `next`, which is where it is read from then.
    fn joined(&self, p: &PartitionInfo, next: i64, known: bool) -> Result<i64> {
        let (topic, partition) = (self.topic, p.partition);
        if next > p.high {
            let message = format!(
                "topic {topic}, partition {partition}: its backup has offsets up to {next}, but the topic ends at {}",
                p.high
            );
            return Err(Error::external(message).hint(ANEW));
        }
        if next >= p.low {
            return Ok(next);
        }
        if self.allow_gap {
            say_lost(topic, partition, next, p.low);
            return Ok(p.low);
        }
        let what = match known {
            true => format!("its backup ends at offset {next}"),
            false => "its backup does not have it".to_owned(),
        };
        let message = format!(
            "topic {topic}, partition {partition}: {what}, but the broker's first is {}; {} records are in neither",
            p.low,
            p.low - next
        );
        let hint = "Let the backup's job catch up if it still can, or restore the records to the topic. --allow-gap goes \
                    on without them.";
        Err(Error::external(message).hint(hint))
    }
}

const ANEW: &str = "The topic was emptied or created anew, or this is the backup of another one: let history name the \
                    backup of this topic, or write a new backup to another location.";

impl Bootstrap {
    /// For the manifest, as long as a partition has not gone over.
    pub fn progress(&self, partitions: &[PartitionProgress]) -> Option<HistoryProgress> {
        let until = |(place, next_offset): (Place, i64)| PartitionProgress {
            topic: place.topic(),
            partition: place.partition(),
            next_offset,
            watermark: None,
        };
        let below = |(place, end): (Place, i64)| {
            let same = |p: &&PartitionProgress| Place::new(0, p.topic, p.partition) == place;
            partitions.iter().find(same).is_some_and(|p| p.next_offset < end)
        };
        self.until.iter().any(below).then(|| HistoryProgress {
            location: self.location.clone(),
            version: self.version,
            until: self.until.iter().map(until).collect(),
        })
    }

    /// No rows from `ends` on, nor of other partitions.
    pub fn limit(&mut self, ends: &Positions) {
        let limited = |(place, until): (Place, i64)| Some((place, until.min(ends.get(place)?)));
        self.until = self.until.iter().filter_map(limited).collect();
        self.limit = Some(ends.clone());
    }

    /// Where each partition goes over to the topic.
    pub fn until(&self) -> &Positions {
        &self.until
    }

    /// What reads the backup, and the reader of each shard, which reads the topic then.
    ///
    /// # Constraints
    /// Within the runtime. `next`: where each partition is; `ends`: of the topic, as seen at start.
    pub fn readers(
        &self,
        plan: &SourcePlan,
        (next, ends): (&Positions, &Positions),
        shards: usize,
        source: &Arc<dyn SourceConnector>,
        counted: &Arc<SourceMetrics>,
    ) -> (Feeder, Vec<Box<dyn SourceReader>>) {
        let mut senders = Vec::with_capacity(shards);
        let mut readers: Vec<Box<dyn SourceReader>> = Vec::with_capacity(shards);
        for shard in 0..shards {
            let mine = |(place, _): &(Place, i64)| shard_of(*place, shards) == shard;
            let (sender, fed) = channel(CHANNEL);
            senders.push(sender);
            let (next, ends) = (next.iter().filter(mine).collect(), ends.iter().filter(mine).collect());
            let (source, counted) = (Arc::clone(source), Arc::clone(counted));
            readers.push(Box::new(HistoryReader::new(fed, source, counted, next, ends)));
        }
        let (source, counted) = (Arc::clone(source), Arc::clone(counted));
        let feeder = Feeder {
            bootstrap: self.clone(),
            plan: plan.clone(),
            next: next.clone(),
            senders,
            source,
            counted,
        };
        (feeder, readers)
    }
}

#[cfg(test)]
mod tests;
