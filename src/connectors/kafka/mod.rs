//! Kafka, by librdkafka: source, sink, and an in-process broker for `dev` and tests.
//!
//! # Meaning
//! - The **source** assigns partitions itself (no consumer group decides anything); where to read is what the
//!   pipeline's manifest says. Group offsets are committed only so that lag tools can see them.
//! - librdkafka never chooses an offset: `auto.offset.reset = error`. A position that the broker no longer holds is
//!   an error that names partition and offsets; an offset that was jumped over (compaction, transactions) is counted.
//! - The end of a partition is told by the broker with its offset, so control records count.
//! - The **sink** is idempotent and at least once: a restart may write a row again.
//! - What librdkafka logs goes to `tracing` at debug level. An outage is warned about once, when it begins.
//!
//! The only unsafe code is in `batch`: librdkafka's batch poll, which the Rust wrapper does not have.

pub mod bad;
mod batch;
mod config;
pub mod embedded;
pub mod sink;
pub mod source;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::client::Client;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::{RDKafkaErrorCode, RDKafkaRespErr};

use crate::error::{Error, Result};

pub use config::{KafkaSettings, KafkaSinkConfig, KafkaSourceConfig, ScanStartup, TopicCreation};
pub use embedded::EmbeddedKafka;
pub use sink::KafkaSink;
pub use source::KafkaSource;

/// How long the start waits for a broker.
const REACH_TIMEOUT: Duration = Duration::from_secs(8);
/// Queued events of librdkafka that are handled per poll.
const EVENTS_PER_POLL: usize = 8;

/// What librdkafka reports outside of records: logs, lost connections, commits.
#[derive(Debug, Default)]
pub(crate) struct Context {
    servers: String,
    /// No broker answers; warned about once.
    down: AtomicBool,
    /// Why the last connection failed.
    reason: Mutex<String>,
}

impl Context {
    fn new(settings: &KafkaSettings) -> Self {
        Self { servers: settings.bootstrap_servers.clone(), ..Self::default() }
    }

    fn reason(&self) -> String {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A record or an end of partition came: whatever was lost is back.
    fn is_up(&self) {
        if self.down.load(Ordering::Relaxed) && self.down.swap(false, Ordering::Relaxed) {
            tracing::info!(servers = %self.servers, "kafka answers again");
        }
    }

    fn note(&self, reason: &str) {
        reason.clone_into(&mut self.reason.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl ClientContext for Context {
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        if matches!(facility, "FAIL" | "ERROR") {
            self.note(message);
        }
        tracing::debug!(target: "librdkafka", facility, "{message}");
    }

    fn stats_raw(&self, _: &[u8]) {}

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(target: "librdkafka", %error, "{reason}");
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            if !self.down.swap(true, Ordering::Relaxed) {
                let reason = self.reason();
                tracing::warn!(servers = %self.servers, reason, "kafka does not answer, trying again");
            }
        } else {
            self.note(reason);
        }
    }
}

impl ConsumerContext for Context {
    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = result {
            tracing::debug!(target: "librdkafka", %error, "group offsets were not committed");
        }
    }
}

/// Runs something that waits, without holding up the other tasks of this thread where tokio can move them away.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// A client, with its configuration's fault as a user error. The value of the option is not shown: it may be secret.
fn created<T>(settings: &KafkaSettings, result: KafkaResult<T>) -> Result<T> {
    result.map_err(|error| match error {
        KafkaError::ClientConfig(_, description, key, _) => {
            Error::user(format!("librdkafka refuses kafka.{key}: {}", description.to_lowercase()))
                .hint("Its options are listed in librdkafka's CONFIGURATION.md.")
        }
        KafkaError::ClientCreation(description) => {
            Error::user(format!("librdkafka refuses the configuration: {}", description.to_lowercase()))
        }
        other => {
            Error::external(format!("no client for kafka at {}", settings.bootstrap_servers)).because(other)
        }
    })
}

/// Partition numbers of a topic; `None` when there is no such topic. `drain` serves the client's events.
///
/// # Errors
/// External: no broker answers within [`REACH_TIMEOUT`], or the topic may not be read.
fn topic_partitions<C: ClientContext>(
    client: &Client<C>,
    context: &Context,
    topic: &str,
    drain: impl Fn(),
) -> Result<Option<Vec<i32>>> {
    let fetched = client.fetch_metadata(Some(topic), REACH_TIMEOUT);
    drain();
    let metadata = fetched.map_err(|error| unreachable(context, &error))?;
    let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else { return Ok(None) };
    match found.error() {
        None => {}
        Some(
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART
            | RDKafkaRespErr::RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC,
        ) => return Ok(None),
        Some(error) => {
            let code = RDKafkaErrorCode::from(error);
            return Err(
                Error::external(format!("topic {topic} at {} cannot be used", context.servers)).because(code)
            );
        }
    }
    let mut partitions: Vec<i32> = found.partitions().iter().map(|partition| partition.id()).collect();
    partitions.sort_unstable();
    Ok((!partitions.is_empty()).then_some(partitions))
}

fn unreachable(context: &Context, error: &KafkaError) -> Error {
    let reason = match context.reason() {
        reason if reason.is_empty() => {
            error.rdkafka_error_code().map_or(error.to_string(), |code| code.to_string())
        }
        reason => reason,
    };
    let seconds = REACH_TIMEOUT.as_secs();
    Error::external(format!("no kafka broker answers at {} within {seconds} s: {reason}", context.servers))
        .hint("Start the broker, or correct bootstrap_servers.")
}

/// What every client of ours gets; `kafka.*` options of the user come on top.
fn base_config(settings: &KafkaSettings) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &settings.bootstrap_servers)
        .set("client.id", "millstream")
        .set("log.connection.close", "false")
        .set("socket.keepalive.enable", "true")
        .set("reconnect.backoff.max.ms", "2000");
    config.set_log_level(RDKafkaLogLevel::Info);
    config
}
