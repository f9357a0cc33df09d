//! Kafka topic → rows.
//!
//! A poll decodes records while librdkafka still holds their memory, so a good record is copied once, into its
//! columns. Positions are next offsets: they rise over rows, tombstones, dead letters and control records alike.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use rdkafka::consumer::{CommitMode, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;

use super::batch::{BatchConsumer, Event, Record};
use super::config::{KafkaSourceConfig, ScanStartup};
use super::topic_id::topic_id;
use super::{Access, Context, REACH_TIMEOUT, Right, blocking, created, topic_partitions, unreachable};
use crate::connectors::formats::json_decode::JsonDecoder;
use crate::connectors::formats::records::{Intent, Raw, Records};
use crate::connectors::{PartitionInfo, SourceBatch, SourceConnector, SourceReader};
use crate::error::{Error, Result};
use crate::stream::letters::headers_text;
use crate::stream::{DeadLetter, Place, Positions, crash};

/// After the first record of a poll, how long to wait for more: a fetch brings many at once.
const GATHER: Duration = Duration::from_millis(1);

/// No poll returns more rows, whatever the caller asks for: room for their pointers is made beforehand.
const MAX_ROWS: usize = 65_536;

/// One topic as a source.
#[derive(Debug, Clone)]
pub struct KafkaSource {
    name: Arc<str>,
    group: Arc<str>,
    topic: Arc<str>,
    config: Arc<KafkaSourceConfig>,
    /// Shared by all clients, so that what is said once is said once.
    access: Access,
    questions: Questions,
}

/// A client that reads nothing, kept from one question to the next while it gets answers.
#[derive(Clone, Default)]
struct Questions(Arc<Mutex<Option<BatchConsumer>>>);

impl std::fmt::Debug for Questions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Questions")
    }
}

impl KafkaSource {
    /// `name` is the source's name in SQL, for dead letters; `default_group` is `millstream-<pipeline>-<source>`.
    ///
    /// # Errors
    /// A user error when a column's type cannot be decoded.
    pub fn new(name: &str, default_group: &str, config: KafkaSourceConfig) -> Result<Self> {
        JsonDecoder::new(Arc::clone(&config.columns))?;
        let group: Arc<str> = config.group_id.as_deref().unwrap_or(default_group).into();
        let access = Access::new(&config.settings, &config.topic).with_group(Arc::clone(&group));
        let topic = config.topic.as_str().into();
        let (config, questions) = (Arc::new(config), Questions::default());
        Ok(Self { name: name.into(), group, topic, config, access, questions })
    }

    fn consumer(&self) -> Result<BatchConsumer> {
        let settings = &self.config.settings;
        let client = self.config.client(&self.group)?;
        created(settings, BatchConsumer::new(&client, Context::new(self.access.clone()), &self.topic))
    }

    /// Asks something of the broker. After a failure the next question has a new client.
    fn ask<T>(&self, question: impl FnOnce(&BatchConsumer) -> Result<T>) -> Result<T> {
        let kept = || self.questions.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = kept().take();
        let consumer = before.map_or_else(|| self.consumer(), Ok)?;
        let answer = question(&consumer)?;
        *kept() = Some(consumer);
        Ok(answer)
    }

    fn list_partitions(&self, consumer: &BatchConsumer) -> Result<Vec<PartitionInfo>> {
        let drain = || {
            // Only for the reasons that the context notes down.
            let _ = consumer.serve();
        };
        let found = topic_partitions(consumer.client(), consumer.context(), &self.topic, Right::Read, drain)?;
        let Some(found) = found else { return Err(self.no_topic()) };
        found
            .into_iter()
            .map(|partition| {
                let (low, high) = self.watermarks(consumer, partition)?;
                Ok(PartitionInfo { topic: 0, partition, low, high })
            })
            .collect()
    }

    fn no_topic(&self) -> Error {
        let servers = &self.config.settings.bootstrap_servers;
        let topic = &self.topic;
        Error::external(format!("there is no topic {topic} at {servers}")).hint(format!(
            "Create it (kafka-topics.sh --bootstrap-server {servers} --create --topic {topic} --partitions 4) \
             or correct the option topic."
        ))
    }

    /// (first held, next to come) offsets as the pipeline counts them.
    fn watermarks(&self, consumer: &BatchConsumer, partition: i32) -> Result<(i64, i64)> {
        let base = self.base(partition);
        consumer
            .client()
            .fetch_watermarks(&self.topic, partition, REACH_TIMEOUT)
            .inspect(|_| consumer.context().is_up())
            .map(|(low, high)| (low + base, high + base))
            .map_err(|error| {
                let _ = consumer.serve();
                unreachable(consumer.context(), &error, Right::Read)
                    .context(format!("offsets of topic {}, partition {partition}", self.topic))
            })
    }

    /// The first offset of each partition whose record is not older than `millis`; its end where there is none.
    fn at_time(&self, millis: i64, partitions: &[PartitionInfo]) -> Result<impl Fn(&PartitionInfo) -> i64> {
        let consumer = self.consumer()?;
        let mut wanted = TopicPartitionList::new();
        let failed = |error: KafkaError| {
            unreachable(consumer.context(), &error, Right::Read)
                .context(format!("offsets by time of topic {}", self.topic))
        };
        for info in partitions {
            wanted
                .add_partition_offset(&self.topic, info.partition, Offset::Offset(millis))
                .map_err(failed)?;
        }
        let found = consumer.offsets_for_times(wanted, REACH_TIMEOUT).map_err(failed)?;
        let offsets: Vec<(i32, i64)> = found
            .elements_for_topic(&self.topic)
            .into_iter()
            .filter_map(|element| match element.offset() {
                Offset::Offset(offset) => {
                    Some((element.partition(), offset + self.base(element.partition())))
                }
                _ => None,
            })
            .collect();
        Ok(move |info: &PartitionInfo| {
            let at = offsets.iter().find(|(id, _)| *id == info.partition);
            at.map_or(info.high, |(_, offset)| *offset)
        })
    }

    fn base(&self, partition: i32) -> i64 {
        self.config.offset_base.get(Place::new(0, 0, partition)).unwrap_or(0)
    }

    fn open(&self, assigned: &Positions) -> Result<KafkaReader> {
        let mut consumer = self.consumer()?;
        let partitions: Vec<Progress> = assigned
            .iter()
            .map(|(place, next)| self.progress(&consumer, place, next))
            .collect::<Result<_>>()?;
        let positions: Vec<(i32, i64)> = partitions.iter().map(|p| (p.id, p.next - p.base)).collect();
        consumer.assign(&self.topic, &positions).map_err(|error| self.not_assigned(error))?;
        let intent = Intent {
            name: Arc::clone(&self.name),
            topic: Arc::clone(&self.topic),
            on_error: self.config.on_error,
            keep_key: self.config.keep_key,
            keep_payload: self.config.keep_payload,
        };
        let columns = Records::new(Arc::clone(&self.config.columns), intent)?;
        let source = self.clone();
        Ok(KafkaReader { consumer, source, intake: Intake { partitions, last: 0, columns } })
    }
}

impl KafkaSource {
    /// A partition at a position that the broker holds.
    fn progress(&self, consumer: &BatchConsumer, place: Place, next: i64) -> Result<Progress> {
        let id = place.partition();
        let (low, high) = self.watermarks(consumer, id)?;
        if next < low || next > high {
            return Err(gap(&self.topic, id, next, low, high));
        }
        Ok(Progress {
            place,
            id,
            base: self.base(id),
            next,
            high,
            touched: false,
            ended: false,
            paused: false,
        })
    }

    fn not_assigned(&self, error: KafkaError) -> Error {
        let servers = &self.config.settings.bootstrap_servers;
        Error::external(format!("topic {} at {servers} cannot be assigned", self.topic)).because(error)
    }
}

/// A position that the broker does not hold (any more).
fn gap(topic: &str, partition: i32, wanted: i64, low: i64, high: i64) -> Error {
    if wanted > high {
        return Error::external(format!(
            "topic {topic}, partition {partition}: the next offset is {wanted}, but the topic ends at {high}"
        ))
        .hint("The topic was emptied or created anew. Reset the pipeline to read it from its beginning.")
        .lasting();
    }
    Error::external(format!(
        "topic {topic}, partition {partition}: the next offset is {wanted}, but the broker's first is {low}; {} records \
         are gone",
        low - wanted
    ))
    .hint("Restore them to the topic, or reset the pipeline and rebuild it from its history.")
    .lasting()
}

#[async_trait]
impl SourceConnector for KafkaSource {
    fn topics(&self) -> Vec<Arc<str>> {
        vec![Arc::clone(&self.topic)]
    }

    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.config.columns)
    }

    async fn partitions(&self) -> Result<Vec<PartitionInfo>> {
        blocking(|| self.ask(|consumer| self.list_partitions(consumer)))
    }

    async fn identity(&self) -> Option<String> {
        if self.config.is_embedded {
            return None;
        }
        let id = |consumer: &BatchConsumer| {
            let found = topic_id(consumer.client(), &self.topic);
            found.map_err(|error| Error::external("no answer to DescribeTopics").because(error))
        };
        blocking(|| self.ask(id)).unwrap_or_else(|error| {
            tracing::debug!(topic = %self.topic, %error, "the topic's id is not known");
            None
        })
    }

    async fn start_positions(&self, partitions: &[PartitionInfo]) -> Result<Positions> {
        let place = |info: &PartitionInfo| Place::new(0, info.topic, info.partition);
        let start: &dyn Fn(&PartitionInfo) -> i64 = match &self.config.scan_startup {
            ScanStartup::Earliest => &|info| info.low,
            ScanStartup::Latest => &|info| info.high,
            ScanStartup::Timestamp(millis) => {
                let found = blocking(|| self.at_time(*millis, partitions))?;
                return Ok(partitions.iter().map(|info| (place(info), found(info))).collect());
            }
            ScanStartup::Offsets(offsets) => {
                let known = |id: i32| partitions.iter().any(|info| info.partition == id);
                if let Some((id, _)) = offsets.iter().find(|(id, _)| !known(*id)) {
                    let message =
                        format!("scan_startup names partition {id}, which topic {} lacks", self.topic);
                    return Err(Error::user(message).hint("Name partitions that the topic has."));
                }
                &|info| {
                    let given = offsets.iter().find(|(id, _)| *id == info.partition);
                    given.map_or(info.low, |(id, offset)| offset + self.base(*id))
                }
            }
        };
        Ok(partitions.iter().map(|info| (place(info), start(info))).collect())
    }

    fn discovery(&self) -> Option<Duration> {
        self.config.partition_discovery
    }

    async fn reader(&self, assigned: Positions) -> Result<Box<dyn SourceReader>> {
        Ok(Box::new(blocking(|| self.open(&assigned))?))
    }
}

/// How far one partition was read, in the pipeline's offsets.
struct Progress {
    place: Place,
    id: i32,
    base: i64,
    next: i64,
    /// End of the partition when it was opened.
    high: i64,
    touched: bool,
    ended: bool,
    paused: bool,
}

struct KafkaReader {
    consumer: BatchConsumer,
    source: KafkaSource,
    intake: Intake,
}

/// Turns the events of a poll into a batch.
struct Intake {
    partitions: Vec<Progress>,
    /// The partition of the last event: fetches come in runs of one partition.
    last: usize,
    columns: Records,
}

/// A partition that cannot be read on as it is.
struct Trouble {
    partition: i32,
    code: RDKafkaErrorCode,
    text: String,
}

impl KafkaReader {
    /// Rides out what passes by itself; the rest stops the pipeline.
    fn weigh(&self, trouble: Trouble) -> Result<()> {
        let Trouble { partition, code, text } = trouble;
        let topic = &self.source.topic;
        let access = &self.consumer.context().access;
        if let Some(refused) = access.refusal(code, &text, Right::Read) {
            return Err(refused);
        }
        match code {
            RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange => {
                let next = self.intake.partitions.iter().find(|p| p.id == partition).map_or(0, |p| p.next);
                let (low, high) = self.source.watermarks(&self.consumer, partition)?;
                Err(gap(topic, partition, next, low, high))
            }
            RDKafkaErrorCode::UnknownTopicOrPartition
            | RDKafkaErrorCode::UnknownTopic
            | RDKafkaErrorCode::UnknownPartition => Err(Error::external(format!(
                "topic {topic}, partition {partition}: it is gone from the broker"
            ))
            .hint("Create the topic again and reset the pipeline.")),
            RDKafkaErrorCode::GroupAuthorizationFailed => {
                access.group_refused();
                Ok(())
            }
            RDKafkaErrorCode::Fatal => {
                Err(Error::external(format!("topic {topic} cannot be read any more: {text}")).because(code))
            }
            _ => {
                tracing::debug!(target: "librdkafka", %topic, partition, %code, "{text}");
                Ok(())
            }
        }
    }

    /// Logs, lost connections and commit replies.
    fn serve(&self) -> Result<()> {
        match self.consumer.serve() {
            Ok(()) => Ok(()),
            Err(KafkaError::Canceled) => {
                Err(Error::internal("a record came by a queue that holds none").context(&*self.source.topic))
            }
            Err(error) => {
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
                let fatal = matches!(error, KafkaError::MessageConsumptionFatal(_));
                let code = if fatal { RDKafkaErrorCode::Fatal } else { code };
                // Events of the client as a whole belong to no partition.
                self.weigh(Trouble { partition: -1, code, text: self.consumer.context().reason() })
            }
        }
    }
}

impl SourceReader for KafkaReader {
    fn poll(&mut self, max_rows: usize, linger: Duration) -> Result<Option<SourceBatch>> {
        self.serve()?;
        if crash::deaf("kafka.poll") {
            // As librdkafka does when it leaves partitions unfetched: nothing comes, nothing is said.
            let all = self.intake.partitions.iter().map(|progress| progress.id);
            let mut list = TopicPartitionList::new();
            all.for_each(|id| {
                list.add_partition(&self.source.topic, id);
            });
            self.consumer.consumer().pause(&list).ok();
        }
        let limit = max_rows.min(self.source.config.max_batch_rows.unwrap_or(MAX_ROWS)).clamp(1, MAX_ROWS);
        let messages = self.consumer.receive(limit, linger, GATHER.min(linger));
        if messages.len() == 0 {
            return Ok(None);
        }
        let mut troubles = Vec::new();
        for event in messages.events() {
            match event {
                Event::Record(record) => self.intake.record(&record)?,
                Event::End { partition, offset } => self.intake.end(partition, offset),
                Event::Error { partition, code, text } => {
                    troubles.push(Trouble { partition, code, text });
                }
            }
        }
        if troubles.is_empty() {
            self.consumer.context().is_up();
        }
        for trouble in troubles {
            self.weigh(trouble)?;
        }
        self.intake.finish()
    }

    fn add(&mut self, place: Place, next: i64) -> Result<()> {
        // This client may not know the partition yet and would have no answer about its offsets.
        let (id, base) = (place.partition(), self.source.base(place.partition()));
        let progress =
            Progress { place, id, base, next, high: next, touched: false, ended: false, paused: false };
        let added = self.consumer.add(&self.source.topic, progress.id, progress.next - progress.base);
        added.map_err(|error| self.source.not_assigned(error))?;
        self.intake.partitions.push(progress);
        Ok(())
    }

    fn pause(&mut self, places: &[Place]) -> Result<()> {
        let (mut pause, mut resume) = (TopicPartitionList::new(), TopicPartitionList::new());
        for progress in &mut self.intake.partitions {
            let paused = places.contains(&progress.place);
            if paused != std::mem::replace(&mut progress.paused, paused) {
                let list = if paused { &mut pause } else { &mut resume };
                list.add_partition(&self.source.topic, progress.id);
            }
        }
        let consumer = self.consumer.consumer();
        let paused = if pause.count() > 0 { consumer.pause(&pause) } else { Ok(()) };
        let resumed = if resume.count() > 0 { consumer.resume(&resume) } else { Ok(()) };
        paused.and(resumed).map_err(|error| {
            Error::external(format!("partitions of topic {} cannot wait", self.source.topic)).because(error)
        })
    }

    fn acknowledge(&mut self, positions: &Positions) {
        // A refusal may have come since the last poll; what else there is shows again in the next one.
        let _ = self.consumer.serve();
        if self.source.access.is_group_refused() {
            return;
        }
        let mut list = TopicPartitionList::new();
        for progress in &self.intake.partitions {
            if let Some(next) = positions.get(progress.place) {
                let offset = Offset::Offset((next - progress.base).max(0));
                // Fails for impossible offsets only, and group offsets are for display.
                let _ = list.add_partition_offset(&self.source.topic, progress.id, offset);
            }
        }
        if list.count() > 0
            && let Err(error) = self.consumer.consumer().commit(&list, CommitMode::Async)
        {
            tracing::debug!(topic = %self.source.topic, %error, "group offsets were not committed");
        }
    }

    fn add_headers(&self, letters: &mut [DeadLetter]) {
        let mut bad: HashMap<(i32, i64), Vec<&mut DeadLetter>> = HashMap::new();
        for letter in letters {
            bad.entry((letter.partition, letter.offset)).or_default().push(letter);
        }
        for event in self.consumer.last().events() {
            let Event::Record(record) = event else { continue };
            let offset = record.offset + self.source.base(record.partition);
            let Some(letters) = bad.remove(&(record.partition, offset)) else { continue };
            let headers = headers_text(record.headers.read().into_iter());
            letters.into_iter().for_each(|letter| letter.headers.clone_from(&headers));
        }
    }

    fn lag(&self) -> i64 {
        let behind = |progress: &Progress| {
            let known = self.consumer.known_watermarks(progress.id).map(|(_, high)| high + progress.base);
            (known.unwrap_or(progress.high) - progress.next).max(0)
        };
        self.intake.partitions.iter().map(behind).sum()
    }
}

impl Intake {
    fn progress(&mut self, id: i32) -> Option<&mut Progress> {
        if self.partitions.get(self.last).is_none_or(|progress| progress.id != id) {
            self.last = self.partitions.iter().position(|progress| progress.id == id)?;
        }
        self.partitions.get_mut(self.last)
    }

    /// Moves a partition to `next`, of which the last `consumed` offsets were seen; returns how many were not.
    fn advance(&mut self, id: i32, broker_next: i64, consumed: i64) -> Option<i64> {
        let progress = self.progress(id)?;
        let next = broker_next + progress.base;
        let missing = (next - consumed - progress.next).max(0);
        progress.next = progress.next.max(next);
        progress.touched = true;
        progress.ended = false;
        self.columns.missing_offsets += missing.unsigned_abs();
        Some(next - consumed)
    }

    fn end(&mut self, id: i32, broker_next: i64) {
        self.advance(id, broker_next, 0);
        if let Some(progress) = self.progress(id) {
            progress.ended = true;
        }
    }

    #[inline]
    fn record(&mut self, record: &Record<'_>) -> Result<()> {
        // A partition that waited is fetched again from where it was read to; nothing is read twice in any case.
        if self.progress(record.partition).is_some_and(|at| record.offset + at.base < at.next) {
            return Ok(());
        }
        // What is still queued of a partition that is not ours (any more) is not ours to read.
        let Some(offset) = self.advance(record.partition, record.offset + 1, 1) else { return Ok(()) };
        let columns = &mut self.columns;
        let payload = match record.payload {
            Some(payload) if !payload.is_empty() => payload,
            _ => {
                columns.tombstones += 1;
                return Ok(());
            }
        };
        let (partition, timestamp, key) = (record.partition, record.timestamp, record.key);
        columns.push(Raw { partition, offset, timestamp, key, payload })
    }

    fn finish(&mut self) -> Result<Option<SourceBatch>> {
        let mut reached = Positions::default();
        let mut at_end = Vec::new();
        for progress in self.partitions.iter_mut().filter(|progress| progress.touched) {
            reached.raise(progress.place, progress.next);
            if progress.ended {
                at_end.push(progress.place);
            }
            (progress.touched, progress.ended) = (false, false);
        }
        if reached.is_empty() {
            return Ok(None);
        }
        self.columns.finish(reached, at_end).map(Some)
    }
}
