//! Rows → Kafka topic: JSON records, idempotent and at least once.
//!
//! - The **key** is the text of the key columns joined by `:` (timestamps RFC 3339 UTC, doubles in shortest form).
//!   If one of them is NULL the record has no key.
//! - The **record time** is the row's event time; a row without one leaves it to the client.
//! - The **partition** is Java's default hash of the key; records without a key are spread.
//! - A batch with weights writes each row once with its `_weight`.
//!
//! `write` hands records to librdkafka, which sends them by itself; `flush` waits until the brokers have all of
//! them. A record that cannot be delivered fails the next `write` or `flush`, and so does a refused log-in, for which
//! librdkafka would let the records wait.

use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use arrow::array::{Array, ArrayRef};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use async_trait::async_trait;
use rdkafka::ClientContext;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError;
use rdkafka::message::DeliveryResult;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, ProducerContext};
use rdkafka::types::RDKafkaErrorCode;

use super::bad::Breaker;
use super::config::{KafkaSinkConfig, TopicCreation};
use super::{Access, Context, REACH_TIMEOUT, Right, base_config, blocking, created, topic_partitions};
use crate::connectors::AppendSink;
use crate::connectors::formats::json_encode::JsonEncoder;
use crate::error::{Error, Result};
use crate::stream::{ChangeBatch, crash};

/// How long one look at a full queue or at pending deliveries may hold up its thread.
const PATIENCE: Duration = Duration::from_millis(20);

/// An open sink on an existing topic.
pub struct KafkaSink {
    config: KafkaSinkConfig,
    producer: BaseProducer<Deliveries>,
    encoder: JsonEncoder,
    key: String,
    breaker: Option<Breaker>,
}

/// Remembers the first record that could not be delivered.
struct Deliveries {
    context: Context,
    failed: Mutex<Option<KafkaError>>,
}

impl ClientContext for Deliveries {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.context.log(level, facility, message);
    }

    fn stats_raw(&self, _: &[u8]) {}

    fn error(&self, error: KafkaError, reason: &str) {
        self.context.error(error, reason);
    }
}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        match result {
            Ok(_) => self.context.is_up(),
            Err((error, _)) => {
                let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                failed.get_or_insert_with(|| error.clone());
            }
        }
    }
}

impl KafkaSink {
    /// Connects and creates the topic if it is missing and the options say so.
    ///
    /// # Errors
    /// External: no broker answers, log-in or TLS is refused, the topic may not be seen, or it is missing and must not
    /// or cannot be created. A missing right to write shows with the first record.
    pub async fn open(config: KafkaSinkConfig) -> Result<Self> {
        let access = Access::new(&config.settings, &config.topic);
        let context = Deliveries { context: Context::new(access), failed: Mutex::new(None) };
        let producer: BaseProducer<Deliveries> =
            created(&config.settings, config.client()?.create_with_context(context))?;
        let breaker = config.bad.clone().map(Breaker::new);
        let sink = Self { config, producer, encoder: JsonEncoder::default(), key: String::new(), breaker };
        if blocking(|| sink.partitions())?.is_none() {
            match &sink.config.create {
                Some(creation) => sink.create_topic(creation).await?,
                None => {
                    let (topic, servers) = (&sink.config.topic, &sink.config.settings.bootstrap_servers);
                    return Err(Error::external(format!("there is no topic {topic} at {servers}"))
                        .hint("Create it, or let the sink do so with create = 'true'."));
                }
            }
        }
        Ok(sink)
    }

    fn partitions(&self) -> Result<Option<Vec<i32>>> {
        let client = self.producer.client();
        let drain = || self.producer.poll(Duration::ZERO);
        topic_partitions(client, &client.context().context, &self.config.topic, Right::Write, drain)
    }

    async fn create_topic(&self, creation: &TopicCreation) -> Result<()> {
        let (settings, topic) = (&self.config.settings, self.config.topic.as_str());
        let access = &self.producer.client().context().context.access;
        let mut config = base_config(settings);
        settings.apply(&mut config)?;
        let admin: AdminClient<Context> =
            created(settings, config.create_with_context(Context::new(access.clone())))?;
        let retention = creation.retention.as_millis().to_string();
        let mut wanted =
            NewTopic::new(topic, creation.partitions, TopicReplication::Fixed(creation.replication));
        wanted = wanted.set("retention.ms", &retention);
        for (key, value) in &creation.extra {
            wanted = wanted.set(key, value);
        }
        let options =
            AdminOptions::new().request_timeout(Some(REACH_TIMEOUT)).operation_timeout(Some(REACH_TIMEOUT));
        let refused = |reason: String| {
            Error::external(format!(
                "topic {topic} cannot be created at {}: {reason}",
                settings.bootstrap_servers
            ))
            .hint("Check its topic.* options and the rights of the user, or create it by hand.")
        };
        let results =
            admin.create_topics([&wanted], &options).await.map_err(|error| refused(error.to_string()))?;
        match results.into_iter().next() {
            Some(Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => {
                tracing::info!(
                    topic,
                    partitions = creation.partitions,
                    retention_ms = retention,
                    "topic created"
                );
                Ok(())
            }
            Some(Err((_, code))) => {
                Err(access.refusal(code, "", Right::Create).unwrap_or_else(|| refused(code.to_string())))
            }
            None => Err(refused("the broker said nothing".to_owned())),
        }
    }
}

/// The first delivery that failed since the last look, or a refused log-in.
fn check(config: &KafkaSinkConfig, producer: &BaseProducer<Deliveries>) -> Result<()> {
    let Deliveries { context, failed } = &**producer.client().context();
    let failed = failed.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(error) = failed else { return context.log_in_refused().map_or(Ok(()), Err) };
    let code = error.rdkafka_error_code();
    let refusal = code.and_then(|code| context.access.refusal(code, &context.reason(), Right::Write));
    Err(refusal.or_else(|| context.log_in_refused()).unwrap_or_else(|| {
        let reason = code.map_or(error.to_string(), |code| code.to_string());
        Error::external(format!(
            "a record could not be written to topic {} at {}: {reason}",
            config.topic, config.settings.bootstrap_servers
        ))
    }))
}

#[async_trait]
impl AppendSink for KafkaSink {
    async fn write(&mut self, batch: &ChangeBatch) -> Result<()> {
        let columns = self.config.key_columns(&batch.rows.schema())?;
        let Self { config, producer, encoder, key, breaker } = self;
        let rows = encoder.encode(&batch.rows, batch.weights.as_ref())?;
        let options = FormatOptions::default();
        let parts = columns.iter().map(|column| KeyPart::new(batch.rows.column(*column), &options));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        for row in 0..rows.len() {
            let has_key = write_key(key, &parts, row)?;
            let time = batch.origin.time.value(row).div_euclid(1_000);
            let broken = breaker.as_mut().and_then(|breaker| breaker.next(rows.row(row)));
            let payload = broken.as_deref().unwrap_or_else(|| rows.row(row));
            let mut record = BaseRecord::<str, [u8]>::to(&config.topic).payload(payload);
            record.key = has_key.then_some(key.as_str());
            record.timestamp = (time > 0).then_some(time);
            while let Err((error, back)) = producer.send(record) {
                if error.rdkafka_error_code() != Some(RDKafkaErrorCode::QueueFull) {
                    return Err(
                        Error::external(format!("topic {} takes no record", config.topic)).because(error)
                    );
                }
                record = back;
                blocking(|| producer.poll(PATIENCE));
            }
        }
        producer.poll(Duration::ZERO);
        check(config, producer)
    }

    async fn flush(&mut self, _: u64) -> Result<()> {
        crash::point("kafka.before");
        loop {
            let flushed = blocking(|| self.producer.flush(PATIENCE));
            check(&self.config, &self.producer)?;
            match flushed {
                Ok(()) => {
                    crash::point("kafka.after");
                    return Ok(());
                }
                Err(KafkaError::Flush(RDKafkaErrorCode::OperationTimedOut)) => tokio::task::yield_now().await,
                Err(error) => {
                    return Err(Error::external(format!("topic {} cannot be flushed", self.config.topic))
                        .because(error));
                }
            }
        }
    }
}

/// One key column, ready to be written as text.
struct KeyPart<'a> {
    array: &'a dyn Array,
    text: ArrayFormatter<'a>,
}

impl<'a> KeyPart<'a> {
    fn new(array: &'a ArrayRef, options: &FormatOptions<'a>) -> Result<Self> {
        Ok(Self { array, text: ArrayFormatter::try_new(array, options)? })
    }
}

/// Writes the key of a row; false when it has none.
fn write_key(key: &mut String, parts: &[KeyPart<'_>], row: usize) -> Result<bool> {
    key.clear();
    for (i, part) in parts.iter().enumerate() {
        if part.array.is_null(row) {
            return Ok(false);
        }
        if i > 0 {
            key.push(':');
        }
        write!(key, "{}", part.text.value(row)).map_err(|_| Error::internal("a key value has no text"))?;
    }
    Ok(!parts.is_empty())
}
