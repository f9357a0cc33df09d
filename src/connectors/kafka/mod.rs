//! Kafka, by librdkafka: source, sink, and an in-process broker for `dev` and tests.
//!
//! # Meaning
//! - The **source** assigns partitions itself (no consumer group decides anything); where to read is what the
//!   pipeline's manifest says. Group offsets are committed only so that lag tools can see them.
//! - librdkafka never chooses an offset: `auto.offset.reset = error`. A position that the broker no longer holds is
//!   an error that names partition and offsets; an offset that was jumped over (compaction, transactions) is counted.
//! - The end of a partition is told by the broker with its offset, so control records count.
//! - The **sink** is idempotent and at least once: a restart may write a row again.
//! - A refused **log-in** or **right** is an error as soon as a broker says so; see [`access`].
//! - What librdkafka logs goes to `tracing` at debug level. An outage is warned about once, when it begins.
//!
//! The only unsafe code is in `batch` and `topic_id`: librdkafka's batch poll and DescribeTopics, which the Rust wrapper does
//! not have.

mod access;
pub mod bad;
mod batch;
mod config;
pub mod embedded;
pub mod sink;
pub mod source;
mod topic_id;

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

use access::{Access, Right, brief, is_answer, is_certificate};

pub use config::offsets_of;
pub use config::{KafkaSettings, KafkaSinkConfig, KafkaSourceConfig, ScanStartup, TopicCreation};
pub use embedded::EmbeddedKafka;
pub use sink::KafkaSink;
pub use source::KafkaSource;

/// How long the start waits for a broker.
const REACH_TIMEOUT: Duration = Duration::from_secs(8);
/// The first look at a broker, in parts of [`REACH_TIMEOUT`] in ms: between them a refusal is seen, for which
/// librdkafka would wait as for a broker that is down.
const REACH_PARTS_MS: [u64; 4] = [250, 750, 3_000, 4_000];
/// Queued events of librdkafka that are handled per poll.
const EVENTS_PER_POLL: usize = 8;

/// What librdkafka reports outside of records: logs, lost connections, refusals, commits.
#[derive(Debug, Default)]
pub(crate) struct Context {
    access: Access,
    /// A broker has answered before. What fails until then is the start's error and needs no warning.
    reached: AtomicBool,
    /// No broker answers; warned about once.
    down: AtomicBool,
    /// Why the last connection failed.
    reason: Mutex<String>,
    /// A refusal that does not pass by itself.
    refusal: Mutex<Option<Refusal>>,
}

#[derive(Debug)]
enum Refusal {
    /// With what the broker says.
    LogIn(String),
    Certificate,
}

impl Context {
    fn new(access: Access) -> Self {
        Self { access, ..Self::default() }
    }

    fn reason(&self) -> String {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The log-in was refused, as an error.
    fn log_in_refused(&self) -> Option<Error> {
        match &*self.refusal.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(Refusal::LogIn(reason)) => Some(self.access.log_in_refused(reason)),
            _ => None,
        }
    }

    /// Log-in or TLS was refused, as an error.
    fn refused(&self) -> Option<Error> {
        let certificate = || {
            let refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
            matches!(*refusal, Some(Refusal::Certificate)).then(|| self.access.certificate_refused())
        };
        self.log_in_refused().or_else(certificate)
    }

    /// A broker has answered: whatever was lost is back.
    fn is_up(&self) {
        self.reached.store(true, Ordering::Relaxed);
        if self.down.load(Ordering::Relaxed) && self.down.swap(false, Ordering::Relaxed) {
            tracing::info!(servers = %self.access.servers, "kafka answers again");
        }
    }

    fn note(&self, reason: &str) {
        brief(reason).clone_into(&mut self.reason.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn note_refusal(&self, code: RDKafkaErrorCode, reason: &str) {
        let mut refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
        if code == RDKafkaErrorCode::Authentication && is_answer(reason) {
            *refusal = Some(Refusal::LogIn(reason.to_owned()));
        } else if is_certificate(reason) {
            // Other faults of TLS may be those of a broker that is going down.
            refusal.get_or_insert(Refusal::Certificate);
        }
    }
}

impl ClientContext for Context {
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        if matches!(facility, "FAIL" | "ERROR") {
            self.note(message);
            self.note_refusal(RDKafkaErrorCode::Fail, message);
        }
        tracing::debug!(target: "librdkafka", facility, "{message}");
    }

    fn stats_raw(&self, _: &[u8]) {}

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(target: "librdkafka", %error, "{reason}");
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AllBrokersDown) => {
                if self.reached.load(Ordering::Relaxed) && !self.down.swap(true, Ordering::Relaxed) {
                    let reason = self.reason();
                    tracing::warn!(servers = %self.access.servers, reason, "kafka does not answer, trying again");
                }
            }
            Some(RDKafkaErrorCode::GroupAuthorizationFailed) => self.access.group_refused(),
            Some(code) => {
                self.note(reason);
                self.note_refusal(code, reason);
            }
            None => self.note(reason),
        }
    }
}

impl ConsumerContext for Context {
    fn commit_callback(&self, result: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = result {
            tracing::debug!(target: "librdkafka", %error, "group offsets were not committed");
            if error.rdkafka_error_code() == Some(RDKafkaErrorCode::GroupAuthorizationFailed) {
                self.access.group_refused();
            }
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
/// External: no broker answers within [`REACH_TIMEOUT`], log-in or TLS is refused, or the topic may not be seen by
/// who wants the `right`.
fn topic_partitions<C: ClientContext>(
    client: &Client<C>,
    context: &Context,
    topic: &str,
    right: Right,
    drain: impl Fn(),
) -> Result<Option<Vec<i32>>> {
    let mut fetched = Err(KafkaError::Canceled);
    for part in REACH_PARTS_MS {
        fetched = client.fetch_metadata(Some(topic), Duration::from_millis(part));
        drain();
        if fetched.is_ok() {
            context.is_up();
            break;
        }
        if let Some(refused) = context.refused() {
            return Err(refused);
        }
    }
    let metadata = fetched.map_err(|error| unreachable(context, &error, right))?;
    let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else { return Ok(None) };
    match found.error() {
        None => {}
        Some(
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART
            | RDKafkaRespErr::RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC,
        ) => return Ok(None),
        Some(error) => {
            let code = RDKafkaErrorCode::from(error);
            return Err(context.access.refusal(code, &context.reason(), right).unwrap_or_else(|| {
                let servers = &context.access.servers;
                Error::external(format!("topic {topic} at {servers} cannot be used")).because(code)
            }));
        }
    }
    let mut partitions: Vec<i32> = found.partitions().iter().map(|partition| partition.id()).collect();
    partitions.sort_unstable();
    Ok((!partitions.is_empty()).then_some(partitions))
}

/// A request at the start that came to nothing: refused, or no broker answered it.
fn unreachable(context: &Context, error: &KafkaError, right: Right) -> Error {
    let code = error.rdkafka_error_code();
    let refusal = code.and_then(|code| context.access.refusal(code, &context.reason(), right));
    if let Some(refused) = refusal.or_else(|| context.refused()) {
        return refused;
    }
    let (servers, seconds) = (&context.access.servers, REACH_TIMEOUT.as_secs());
    let (reason, hint) = match context.reason() {
        reason if hung_up(&reason) => {
            let reason = if reason.is_empty() { "it hangs up".to_owned() } else { reason };
            (
                reason,
                "Check bootstrap_servers, and kafka.security.protocol: the broker may want TLS or a log-in.",
            )
        }
        reason if reason.contains("SSL") => (
            reason,
            "Check that bootstrap_servers names the port that speaks what kafka.security.protocol says.",
        ),
        reason => (reason, "Start the broker, or correct bootstrap_servers."),
    };
    Error::external(format!("no kafka broker answers at {servers} within {seconds} s: {reason}")).hint(hint)
}

/// What a broker does that wants TLS, or a log-in, without a word.
fn hung_up(reason: &str) -> bool {
    let words = ["Disconnected", "Send failed", "Receive failed"];
    reason.is_empty() || words.iter().any(|word| reason.contains(word)) && !reason.contains("SSL")
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
