//! Counters that tasks raise and the command line reads. Reading them slows nothing down: all are atomics, except
//! for what changes rarely (dead letters, a few rows for the eye).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arrow::array::RecordBatch;

use tokio::sync::mpsc::{Sender, WeakSender};

use crate::plan::{NodeId, SinkPlan, SourcePlan, StreamPlan};
use crate::runtime::freshness::Histogram;
use crate::runtime::outage::Failing;
use crate::runtime::watermark::{Holding, SourceClock};
use crate::stream::{DeadLetter, Message, Micros, START_OF_TIME};

/// Rows that are kept of a write, to be shown.
const SAMPLE_ROWS: usize = 16;

/// What is counted of one source.
#[derive(Debug, Default)]
pub struct SourceMetrics {
    pub name: String,
    /// Its connector and topic, for the eye.
    pub origin: String,
    /// Rows that were decoded.
    pub read: AtomicU64,
    pub late: AtomicU64,
    /// Records between what was read and the newest known end, over all shards.
    pub lag: AtomicI64,
    pub history: Arc<HistoryMetrics>,
    clock: OnceLock<SourceClock>,
}

/// How far a bootstrap from history has come.
#[derive(Debug, Default)]
pub struct HistoryMetrics {
    /// Rows that are to be read of the backup, and those that were.
    pub total: AtomicU64,
    pub read: AtomicU64,
    /// When reading began, ms since the epoch; 0 before.
    pub began_ms: AtomicI64,
}

impl HistoryMetrics {
    /// More rows are to be read.
    pub fn begin(&self, rows: u64, now_ms: i64) {
        self.began_ms.compare_exchange(0, now_ms, Ordering::Relaxed, Ordering::Relaxed).ok();
        self.total.fetch_add(rows, Ordering::Relaxed);
    }
}

impl SourceMetrics {
    /// Hands in the clock that the source's shards share, once it is there.
    pub fn watch(&self, clock: SourceClock) {
        // A second start of the same metrics keeps the first clock.
        self.clock.set(clock).ok();
    }

    /// The source's watermark; the start of time before any row.
    pub fn watermark(&self) -> Micros {
        self.clock.get().map_or(START_OF_TIME, SourceClock::published)
    }

    /// Which partition the watermark waits for; `None` before the start.
    pub fn holding(&self) -> Option<Holding> {
        self.clock.get().map(SourceClock::holding)
    }
}

/// What is counted of one sink.
#[derive(Debug, Default)]
pub struct SinkMetrics {
    pub name: String,
    /// Connector, for the eye.
    pub target: String,
    /// It holds the newest row per key.
    pub online: bool,
    /// Rows written; keys, for an online sink.
    pub rows: AtomicU64,
    /// Commits of a table, flushes of another sink.
    pub commits: AtomicU64,
    /// Version of the table after the newest commit.
    pub version: AtomicU64,
    /// When the newest commit or flush was acknowledged, ms since the epoch; 0 before.
    pub committed_ms: AtomicI64,
    /// Shards whose online store does not take their rows, which wait.
    pub failing: Failing,
    /// Keys that wait for an online store.
    pub waiting: AtomicU64,
    /// Age of online rows, by their event time, when the store acknowledged them.
    pub freshness: Histogram,
    /// How long before the store's acknowledgement the record behind a row was read.
    pub latency: Histogram,
    sample: Mutex<Option<RecordBatch>>,
}

impl SinkMetrics {
    /// A commit or flush was acknowledged at `now_ms`.
    pub fn committed(&self, now_ms: i64) {
        Metrics::add(&self.commits, 1);
        self.committed_ms.store(now_ms, Ordering::Relaxed);
    }

    /// Keeps a few rows to show.
    pub fn show(&self, rows: &RecordBatch) {
        *lock(&self.sample) = Some(rows.slice(0, rows.num_rows().min(SAMPLE_ROWS)));
    }

    /// Rows of the newest write since the last call.
    pub fn take_sample(&self) -> Option<RecordBatch> {
        lock(&self.sample).take()
    }
}

/// Dead letters so far.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Letters {
    pub total: u64,
    /// How many of each kind of fault.
    pub kinds: BTreeMap<&'static str, u64>,
    /// Where the newest one was, and what was wrong.
    pub newest: Option<(String, String)>,
}

/// Everything that is counted of a pipeline.
#[derive(Debug, Default)]
pub struct Metrics {
    pub sources: Vec<(NodeId, Arc<SourceMetrics>)>,
    pub sinks: Vec<(NodeId, Arc<SinkMetrics>)>,
    /// Newest epoch whose manifest is published.
    pub epoch: AtomicU64,
    /// When that was, ms since the epoch; 0 before.
    pub checkpoint_ms: AtomicI64,
    /// The budget of memory, and what the process uses; 0 where nobody looks.
    pub budget: AtomicU64,
    pub resident: AtomicU64,
    /// Memory is short.
    pub short: AtomicBool,
    /// Partitions that wait as memory is short.
    pub paused: AtomicU64,
    letters: Mutex<Letters>,
    queues: Mutex<Vec<Queue>>,
}

/// The channels into a stage.
#[derive(Debug)]
struct Queue {
    node: String,
    senders: Vec<WeakSender<Message>>,
}

/// What waits in front of a stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    pub node: String,
    /// Messages that wait, and how many can.
    pub messages: usize,
    pub room: usize,
}

impl Metrics {
    /// Remembers the channels into a stage, without keeping them open.
    pub fn watch_queue<'s>(&self, node: &str, senders: impl Iterator<Item = &'s Sender<Message>>) {
        let senders = senders.map(Sender::downgrade).collect();
        lock(&self.queues).push(Queue { node: node.to_owned(), senders });
    }

    /// Stages in front of which something waits.
    pub fn waiting(&self) -> Vec<Waiting> {
        let mut all: Vec<Waiting> = Vec::new();
        for Queue { node, senders } in lock(&self.queues).iter() {
            let open: Vec<Sender<Message>> = senders.iter().filter_map(WeakSender::upgrade).collect();
            let messages = open.iter().map(|sender| sender.max_capacity() - sender.capacity()).sum();
            let room = open.iter().map(Sender::max_capacity).sum();
            match all.iter_mut().find(|known| known.node == *node) {
                Some(known) => (known.messages, known.room) = (known.messages + messages, known.room + room),
                None => all.push(Waiting { node: node.clone(), messages, room }),
            }
        }
        all.retain(|waiting| waiting.messages > 0);
        all
    }

    /// Counters for what a plan has.
    pub fn of(plan: &StreamPlan) -> Arc<Self> {
        let source = |(node, source): (NodeId, &SourcePlan)| (node, Arc::new(source_metrics(source)));
        let sink = |(node, sink): (NodeId, &SinkPlan)| (node, Arc::new(sink_metrics(sink)));
        Arc::new(Self {
            sources: plan.source().into_iter().map(source).collect(),
            sinks: plan.sinks().map(sink).collect(),
            ..Self::default()
        })
    }

    /// Counters for a part of the plan that runs before the whole: what was read of history and what sinks wrote is shown as
    /// the whole's.
    pub fn part(&self, plan: &StreamPlan, part: &StreamPlan) -> Arc<Self> {
        let counted = Self::of(part);
        let history = self.sources.first().map(|(_, source)| Arc::clone(&source.history)).unwrap_or_default();
        let source = |(node, source): (NodeId, &SourcePlan)| {
            (node, Arc::new(SourceMetrics { history: Arc::clone(&history), ..source_metrics(source) }))
        };
        let sink = |(node, sink): &(NodeId, Arc<SinkMetrics>)| {
            let whole = plan.sinks().find(|(_, other)| other.name == sink.name);
            (*node, whole.map_or_else(|| Arc::clone(sink), |(whole, _)| self.sink(whole)))
        };
        Arc::new(Self {
            sources: part.source().into_iter().map(source).collect(),
            sinks: counted.sinks.iter().map(sink).collect(),
            ..Self::default()
        })
    }

    /// Counters of a source; of no one's where the plan was another.
    pub fn source(&self, node: NodeId) -> Arc<SourceMetrics> {
        let found = self.sources.iter().find(|(known, _)| *known == node);
        found.map(|(_, source)| Arc::clone(source)).unwrap_or_default()
    }

    /// Counters of a sink; of no one's where the plan was another.
    pub fn sink(&self, node: NodeId) -> Arc<SinkMetrics> {
        let found = self.sinks.iter().find(|(known, _)| *known == node);
        found.map(|(_, sink)| Arc::clone(sink)).unwrap_or_default()
    }

    /// Counts dead letters. Not for each record: callers gather those of a batch.
    pub fn bury(&self, dead: &[DeadLetter]) {
        let Some(newest) = dead.last() else { return };
        let mut letters = lock(&self.letters);
        letters.total += dead.len() as u64;
        for letter in dead {
            *letters.kinds.entry(letter.kind).or_default() += 1;
        }
        let place = format!("{}[{}]@{}", newest.topic, newest.partition, newest.offset);
        letters.newest = Some((place, newest.error.clone()));
    }

    pub fn letters(&self) -> Letters {
        lock(&self.letters).clone()
    }

    /// Rows read by all sources.
    pub fn read(&self) -> u64 {
        self.sources.iter().map(|(_, source)| source.read.load(Ordering::Relaxed)).sum()
    }

    pub fn late(&self) -> u64 {
        self.sources.iter().map(|(_, source)| source.late.load(Ordering::Relaxed)).sum()
    }

    pub fn lag(&self) -> i64 {
        self.sources.iter().map(|(_, source)| source.lag.load(Ordering::Relaxed)).sum()
    }

    /// The least watermark of the sources; the start of time before any row.
    pub fn watermark(&self) -> Micros {
        self.sources.iter().map(|(_, source)| source.watermark()).min().unwrap_or(START_OF_TIME)
    }

    /// Rows written by sinks that keep every row.
    pub fn stored(&self) -> u64 {
        self.rows(false)
    }

    /// Keys written by online sinks.
    pub fn served(&self) -> u64 {
        self.rows(true)
    }

    fn rows(&self, online: bool) -> u64 {
        let wanted = self.sinks.iter().filter(|(_, sink)| sink.online == online);
        wanted.map(|(_, sink)| sink.rows.load(Ordering::Relaxed)).sum()
    }

    pub fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Ordering::Relaxed);
    }
}

fn source_metrics(source: &SourcePlan) -> SourceMetrics {
    let origin = source.kind.to_string();
    SourceMetrics { name: source.name.clone(), origin, ..SourceMetrics::default() }
}

fn sink_metrics(sink: &SinkPlan) -> SinkMetrics {
    let online = matches!(sink.kind, crate::plan::SinkKind::Online { .. });
    let target = sink.kind.connector().to_owned();
    SinkMetrics { name: sink.name.clone(), target, online, ..SinkMetrics::default() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::Stage;

    #[tokio::test]
    async fn what_waits_is_seen_and_nothing_is_kept_open() {
        let metrics = Metrics::default();
        let (sender, mut receiver) = tokio::sync::mpsc::channel(4);
        metrics.watch_queue("v.over1", [&sender].into_iter());
        assert!(metrics.waiting().is_empty());
        sender.send(Message::Barrier(crate::stream::Barrier { epoch: 1, last: false })).await.unwrap();
        let waiting = Waiting { node: "v.over1".to_owned(), messages: 1, room: 4 };
        assert_eq!(metrics.waiting(), [waiting]);
        drop(sender);
        assert!(receiver.recv().await.is_some() && receiver.recv().await.is_none());
        assert!(metrics.waiting().is_empty());
    }

    #[test]
    fn dead_letters_are_counted_by_kind() {
        let letter = |kind: &'static str, offset: i64| DeadLetter {
            stage: Stage::Decode,
            at: "s".into(),
            topic: "t".into(),
            partition: 2,
            offset,
            timestamp_ms: None,
            key: None,
            payload: None,
            headers: None,
            error: format!("{kind}!"),
            kind,
        };
        let metrics = Metrics::default();
        metrics.bury(&[]);
        metrics.bury(&[letter("not_json", 1), letter("wrong_type", 2)]);
        metrics.bury(&[letter("not_json", 7)]);
        let letters = metrics.letters();
        assert_eq!(letters.total, 3);
        assert_eq!(letters.kinds, [("not_json", 2), ("wrong_type", 1)].into());
        assert_eq!(letters.newest, Some(("t[2]@7".to_owned(), "not_json!".to_owned())));
    }
}
