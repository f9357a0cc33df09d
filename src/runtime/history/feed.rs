//! Reading history: a task that reads the backup, and the readers of the shards, which get its rows and then read the topic.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arrow::array::{Int32Array, RecordBatch};
use tokio::runtime::Handle;
use tokio::sync::mpsc::{Receiver, Sender};

use super::foreign::Book;
use super::{Bootstrap, Contiguity, place_of};
use crate::connectors::delta::history::{Bucket, Piece, Span};
use crate::connectors::{PartitionInfo, SourceBatch, SourceConnector, SourceReader};
use crate::error::{Error, Result};
use crate::plan::SourcePlan;
use crate::runtime::discovery::shard_of;
use crate::runtime::metrics::SourceMetrics;
use crate::stream::clock::Clock;
use crate::stream::{DeadLetter, Place, Positions, crash};

/// Rows of the first load, before it is known how wide they are.
const FIRST_ROWS: u64 = 65_536;
/// Bytes of a load about; two are in memory.
const LOAD_BYTES: u64 = 64 << 20;
/// Rows of a load at most.
const LOAD_ROWS: u64 = 1 << 20;

/// What a shard gets instead of records.
pub(super) enum Feed {
    Rows(Box<Piece>),
    /// Everything is sent: the topic goes on at these offsets.
    Topic(Positions),
}

/// Reads the backup, one load ahead of what the shards take.
pub struct Feeder {
    pub(super) bootstrap: Bootstrap,
    pub(super) plan: SourcePlan,
    /// Where each partition is, then where the topic goes on.
    pub(super) next: Positions,
    pub(super) senders: Vec<Sender<Feed>>,
    pub(super) source: Arc<dyn SourceConnector>,
    pub(super) counted: Arc<SourceMetrics>,
}

impl Feeder {
    /// Runs until everything is sent, or the shards are gone.
    ///
    /// # Errors
    /// External: the backup cannot be read, or the topic no longer holds what follows it.
    pub async fn run(self) -> Result<()> {
        let senders = self.senders.clone();
        let gone = async {
            for sender in &senders {
                sender.closed().await;
            }
        };
        tokio::select! {
            done = self.read() => done,
            () = gone => Ok(()),
        }
    }

    async fn read(mut self) -> Result<()> {
        loop {
            self.round().await?;
            crash::point("history.end");
            self.next.raise_all(&self.bootstrap.until);
            if !self.extend().await? {
                break;
            }
        }
        for sender in &self.senders {
            // A shard that is gone needs nothing more.
            sender.send(Feed::Topic(self.next.clone())).await.ok();
        }
        Ok(())
    }

    /// Reads the pinned version from `next` to where the topic goes on.
    async fn round(&self) -> Result<()> {
        let Bootstrap { location, version, topic, until, .. } = &self.bootstrap;
        let book =
            Book::of(&self.plan).ok_or_else(|| Error::internal("a history that is no longer there"))?;
        let rows = book.rows(*version, topic).await?;
        let span = |(place, until): (Place, i64)| Span {
            partition: place.partition(),
            from: self.next.get(place).unwrap_or(until),
            until,
        };
        let spans: Vec<Span> = until.iter().map(span).filter(|span| span.from < span.until).collect();
        let buckets = rows.index(&spans).await?;
        let total: u64 = buckets.iter().map(|bucket| bucket.rows).sum();
        self.counted.history.begin(total, Clock.unix_millis());
        tracing::info!(source = %self.plan.name, location, version, rows = total, "reading history");
        let mut loads = Loads { buckets: &buckets, rows: FIRST_ROWS };
        let mut ready = rows.load(loads.next()).await?;
        loop {
            loads.weigh(&ready);
            let following = loads.next();
            let (sent, loaded) = tokio::join!(self.send(ready.0), async {
                match following {
                    [] => Ok(None),
                    some => rows.load(some).await.map(Some),
                }
            });
            sent?;
            match loaded? {
                Some(loaded) => ready = loaded,
                None => break,
            }
        }
        // Behind the last row of a partition may be tombstones and dead letters.
        for span in spans {
            let nothing = Piece {
                partition: span.partition,
                rows: RecordBatch::new_empty(Arc::clone(&self.plan.physical)),
                offset: Vec::<i64>::new().into(),
                timestamp: Vec::<i64>::new().into(),
                key: None,
                next: span.until,
            };
            self.send(vec![nothing]).await?;
        }
        Ok(())
    }

    async fn send(&self, pieces: Vec<Piece>) -> Result<()> {
        for piece in pieces {
            let shard = shard_of(Place::new(0, 0, piece.partition), self.senders.len());
            if self.senders[shard].send(Feed::Rows(Box::new(piece))).await.is_err() {
                // The shard has ended; the others are about to.
                std::future::pending::<()>().await;
            }
        }
        Ok(())
    }

    /// Whether there is more to read of the backup: records behind the pinned version have expired meanwhile.
    async fn extend(&mut self) -> Result<bool> {
        let is_read = |place: Place, at: i64| {
            let limit = self.bootstrap.limit.as_ref();
            limit.is_some_and(|limit| limit.get(place).is_none_or(|end| at >= end))
        };
        let expired = |p: &PartitionInfo| {
            let place = place_of(p);
            self.next.get(place).is_some_and(|at| at < p.low && !is_read(place, at))
        };
        if !self.source.partitions().await?.iter().any(expired) {
            return Ok(false);
        }
        let Bootstrap { location, topic, allow_gap, .. } = &self.bootstrap;
        let book =
            Book::of(&self.plan).ok_or_else(|| Error::internal("a history that is no longer there"))?;
        let pinned = book.pin(topic, None).await?;
        let gone = || Error::external(format!("the backup {location} is gone"));
        let mut pinned = pinned.ok_or_else(gone)?;
        book.complete(&mut pinned, topic, None).await?;
        let partitions = self.source.partitions().await?;
        let contiguity =
            Contiguity { topic, partitions: &partitions, backup: &pinned.next, allow_gap: *allow_gap };
        let (next, until) = contiguity.resumed(&self.next, &Positions::default())?;
        let more = until.iter().any(|(place, end)| next.get(place).is_some_and(|at| at < end));
        tracing::info!(
            version = pinned.version,
            more,
            "records behind the history have expired; reading on in its newest version"
        );
        self.bootstrap.version = pinned.version;
        self.bootstrap.until = until;
        self.next = next;
        if let Some(limit) = self.bootstrap.limit.take() {
            self.bootstrap.limit(&limit);
        }
        Ok(more)
    }
}

/// Cuts the buckets into loads of about as many bytes.
struct Loads<'a> {
    buckets: &'a [Bucket],
    rows: u64,
}

impl<'a> Loads<'a> {
    fn next(&mut self) -> &'a [Bucket] {
        let mut rows = 0;
        let enough = |bucket: &Bucket| {
            rows += bucket.rows;
            rows >= self.rows
        };
        let end = self.buckets.iter().position(enough).map_or(self.buckets.len(), |at| at + 1);
        let (load, rest) = self.buckets.split_at(end);
        self.buckets = rest;
        load
    }

    fn weigh(&mut self, (pieces, bytes): &(Vec<Piece>, usize)) {
        let rows: usize = pieces.iter().map(|piece| piece.offset.len()).sum();
        if rows > 0 {
            let each = (*bytes as u64 / rows as u64).max(1);
            self.rows = (LOAD_BYTES / each).clamp(1, LOAD_ROWS);
        }
    }
}

/// A shard's reader: the history first, then the topic.
pub struct HistoryReader {
    fed: Receiver<Feed>,
    source: Arc<dyn SourceConnector>,
    runtime: Handle,
    counted: Arc<SourceMetrics>,
    /// Where each of the shard's partitions is.
    next: Positions,
    /// Ends of the topic, as seen at start.
    ends: Positions,
    /// From the moment on when the history is read.
    topic: Option<Box<dyn SourceReader>>,
    /// Partitions that were added meanwhile, and those that are to wait.
    added: Positions,
    paused: Vec<Place>,
}

impl HistoryReader {
    /// # Constraints
    /// Within the runtime. `next`: the shard's places.
    pub fn new(
        fed: Receiver<Feed>,
        source: Arc<dyn SourceConnector>,
        counted: Arc<SourceMetrics>,
        next: Positions,
        ends: Positions,
    ) -> Self {
        let (runtime, added, paused) = (Handle::current(), Positions::default(), Vec::new());
        Self { fed, source, runtime, counted, next, ends, topic: None, added, paused }
    }

    fn take(&mut self, piece: Piece) -> SourceBatch {
        crash::point("history.rows");
        let place = Place::new(0, 0, piece.partition);
        self.next.raise(place, piece.next);
        let rows = piece.offset.len();
        self.counted.history.read.fetch_add(rows as u64, Ordering::Relaxed);
        // Nothing follows in the topic either.
        let ended = self.ends.get(place).is_some_and(|end| piece.next >= end);
        SourceBatch {
            rows: piece.rows,
            partition: Int32Array::from(vec![piece.partition; rows]),
            offset: piece.offset,
            timestamp: piece.timestamp,
            key: piece.key,
            payload: None,
            dead: Vec::new(),
            tombstones: 0,
            skipped: 0,
            reached: [(place, piece.next)].into_iter().collect(),
            at_end: if ended { vec![place] } else { Vec::new() },
            missing_offsets: 0,
        }
    }

    /// Goes over to the topic.
    fn go_over(&mut self, next: &Positions) -> Result<()> {
        crash::point("history.handoff");
        let mut places: Positions =
            self.next.iter().map(|(place, at)| (place, next.get(place).unwrap_or(at).max(at))).collect();
        places.raise_all(&self.added);
        let mut topic = self.runtime.block_on(self.source.reader(places))?;
        if !self.paused.is_empty() {
            topic.pause(&self.paused)?;
        }
        self.topic = Some(topic);
        Ok(())
    }
}

impl SourceReader for HistoryReader {
    fn poll(&mut self, max_rows: usize, linger: Duration) -> Result<Option<SourceBatch>> {
        if let Some(topic) = &mut self.topic {
            return topic.poll(max_rows, linger);
        }
        let fed = match self.fed.try_recv() {
            Ok(fed) => Some(fed),
            Err(_) => {
                let fed =
                    self.runtime.block_on(async { tokio::time::timeout(linger, self.fed.recv()).await });
                match fed {
                    Ok(fed) => fed,
                    Err(_) => return Ok(None),
                }
            }
        };
        match fed {
            Some(Feed::Rows(piece)) => Ok(Some(self.take(*piece))),
            Some(Feed::Topic(next)) => self.go_over(&next).map(|()| None),
            // The feeder failed, and its error ends the pipeline.
            None => {
                #[expect(
                    clippy::disallowed_methods,
                    reason = "a reader lives on a thread of its own and may block"
                )]
                std::thread::sleep(linger);
                Ok(None)
            }
        }
    }

    fn add(&mut self, place: Place, next: i64) -> Result<()> {
        match &mut self.topic {
            Some(topic) => topic.add(place, next),
            None => {
                self.added.raise(place, next);
                Ok(())
            }
        }
    }

    /// While history is read nothing waits: partitions are read side by side.
    fn pause(&mut self, places: &[Place]) -> Result<()> {
        match &mut self.topic {
            Some(topic) => topic.pause(places),
            None => {
                self.paused = places.to_vec();
                Ok(())
            }
        }
    }

    fn is_live(&self) -> bool {
        self.topic.is_some()
    }

    fn acknowledge(&mut self, positions: &Positions) {
        if let Some(topic) = &mut self.topic {
            topic.acknowledge(positions);
        }
    }

    fn add_headers(&self, letters: &mut [DeadLetter]) {
        if let Some(topic) = &self.topic {
            topic.add_headers(letters);
        }
    }

    fn lag(&self) -> i64 {
        match &self.topic {
            Some(topic) => topic.lag(),
            None => {
                let behind =
                    |(place, at): (Place, i64)| self.ends.get(place).map_or(0, |end| (end - at).max(0));
                self.next.iter().map(behind).sum()
            }
        }
    }
}
