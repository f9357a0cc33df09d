//! Kafka inside the process, for `dev` and tests: librdkafka's mock cluster with one broker on the loopback device.
//!
//! Any client can use it. It keeps at most 5 MB or 100,000 records per partition and drops older ones, so whoever
//! writes must be paced. It forgets everything at the end, and its offsets begin at 0: a source that continues sets
//! `KafkaSourceConfig::offset_base` to the offsets that its manifest has reached.

use rdkafka::client::Client;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::KafkaError;
use rdkafka::mocking::MockCluster;
use rdkafka::types::RDKafkaType;

use super::Context;
use crate::error::{Error, Result};

/// A broker that lives as long as this value.
pub struct EmbeddedKafka {
    client: Client<Context>,
    servers: String,
    partitions: i32,
}

impl EmbeddedKafka {
    /// Starts the broker; `partitions` is what [`EmbeddedKafka::ensure_topic`] gives a topic.
    ///
    /// # Errors
    /// External: no port can be opened on the loopback device.
    pub fn start(partitions: i32) -> Result<Self> {
        let mut config = ClientConfig::new();
        config.set("test.mock.num.brokers", "1").set_log_level(RDKafkaLogLevel::Emerg);
        let native = config.create_native_config().map_err(failed)?;
        let client = Client::new(&config, native, RDKafkaType::RD_KAFKA_PRODUCER, Context::default());
        let client = client.map_err(failed)?;
        let servers = cluster(&client)?.bootstrap_servers();
        Ok(Self { client, servers, partitions })
    }

    /// For the option `bootstrap_servers`.
    pub fn bootstrap_servers(&self) -> &str {
        &self.servers
    }

    /// # Errors
    /// External: the topic exists already.
    pub fn create_topic(&self, name: &str, partitions: i32) -> Result<()> {
        let made = cluster(&self.client)?.create_topic(name, partitions, 1);
        made.map_err(|error| failed(error).context(format!("topic {name}")))
    }

    /// Creates a topic with the default number of partitions, unless it exists.
    ///
    /// # Errors
    /// External: it can neither be found nor created.
    pub fn ensure_topic(&self, name: &str) -> Result<()> {
        let found = self.client.fetch_metadata(None, super::REACH_TIMEOUT).map_err(failed)?;
        if found.topics().iter().any(|topic| topic.name() == name) {
            return Ok(());
        }
        self.create_topic(name, self.partitions)
    }

    /// Injected faults, for tests.
    #[cfg(test)]
    pub(super) fn cluster(&self) -> Result<MockCluster<'_, Context>> {
        cluster(&self.client)
    }
}

fn cluster(client: &Client<Context>) -> Result<MockCluster<'_, Context>> {
    client.mock_cluster().ok_or_else(|| Error::internal("the embedded kafka has no cluster"))
}

fn failed(error: KafkaError) -> Error {
    Error::external("the embedded kafka failed").because(error)
}
