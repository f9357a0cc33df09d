//! Options of Kafka sources and sinks.

use std::time::Duration;

use arrow::datatypes::{Schema, SchemaRef};
use rdkafka::config::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaConfRes;

use super::bad::BadRecords;
use super::{base_config, created};
use crate::connectors::formats::{OnError, timestamp_micros};
use crate::error::{Error, Result};
use crate::sql::options::{Guarded, Options, nearest};
use crate::stream::Positions;

/// librdkafka options that carry our guarantees; a user cannot change them.
const RESERVED: [(&str, &str); 7] = [
    ("bootstrap.servers", "Use the option bootstrap_servers."),
    ("group.id", "Use the option group_id."),
    ("auto.offset.reset", "Use the option scan_startup."),
    ("enable.auto.commit", "Offsets are committed after each checkpoint."),
    ("enable.auto.offset.store", "Offsets are committed after each checkpoint."),
    ("enable.partition.eof", "Millstream needs to know where a partition ends."),
    ("enable.idempotence", "The sink is always idempotent."),
];

/// librdkafka options that name a file or folder.
const FILES: [&str; 4] =
    ["ssl.ca.location", "ssl.certificate.location", "ssl.key.location", "ssl.keystore.location"];

const DAY: Duration = Duration::from_secs(86_400);

/// Where the brokers are, and what goes to librdkafka as it stands.
#[derive(Debug, Clone, Default)]
pub struct KafkaSettings {
    pub bootstrap_servers: String,
    /// `kafka.*` options without the prefix.
    pub extra: Vec<(String, Guarded)>,
}

impl KafkaSettings {
    fn from_options(options: &mut Options) -> Result<Self> {
        let bootstrap_servers = options.required("bootstrap_servers")?;
        let settings = Self { bootstrap_servers, extra: options.guarded_with_prefix("kafka.") };
        for (key, value) in &settings.extra {
            settings.check(key, value).map_err(|error| settings.placed(error, key, options))?;
        }
        settings.check_protocol(options)?;
        Ok(settings)
    }

    fn placed(&self, error: Error, key: &str, options: &Options) -> Error {
        let error = error.context(options.owner());
        match options.place(&format!("kafka.{key}")) {
            Some(place) => error.at(place),
            None => error,
        }
    }

    /// librdkafka itself knows its options; asking it needs no connection. Of a secret only the name is checked.
    fn check(&self, key: &str, value: &Guarded) -> Result<()> {
        if let Some((_, hint)) = RESERVED.iter().find(|(reserved, _)| *reserved == key) {
            return Err(Error::user(format!("kafka.{key} cannot be set")).hint(*hint));
        }
        let mut config = ClientConfig::new();
        config.set(key, if let Guarded::Plain(text) = value { text } else { "" });
        match config.create_native_config() {
            Err(KafkaError::ClientConfig(fault, ..))
                if matches!(value, Guarded::Kept { .. })
                    && fault != RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN =>
            {
                Ok(())
            }
            result => created(self, result.map(|_| ())),
        }
    }

    /// Refuses what librdkafka would leave out in silence: a log-in or TLS that is configured and not used.
    fn check_protocol(&self, options: &Options) -> Result<()> {
        let protocol = self.plain("security.protocol").map(str::to_ascii_lowercase);
        let given = |prefix: &str| self.extra.iter().map(|(key, _)| key).find(|key| key.starts_with(prefix));
        let refused = |key: &str, message: String, hint: &str| {
            Err(self.placed(Error::user(message).hint(hint), key, options))
        };
        let logs_in = protocol.as_ref().is_some_and(|protocol| protocol.starts_with("sasl_"));
        if let Some(key) = given("sasl.").filter(|_| !logs_in) {
            let message = format!("kafka.{key} has no effect without a log-in");
            return refused(key, message, "Set kafka.security.protocol = 'SASL_SSL' (or 'SASL_PLAINTEXT').");
        }
        if let Some(key) = given("ssl.").filter(|_| protocol.is_none()) {
            let message = format!("kafka.{key} has no effect without TLS");
            return refused(key, message, "Set kafka.security.protocol = 'SSL' or 'SASL_SSL'.");
        }
        if logs_in && given("sasl.mechanism").is_none() {
            let hint = "Set kafka.sasl.mechanism, for example to 'SCRAM-SHA-512'.";
            let message = "kafka.security.protocol asks for a log-in of no kind".to_owned();
            return refused("security.protocol", message, hint);
        }
        Ok(())
    }

    fn plain(&self, key: &str) -> Option<&str> {
        self.extra.iter().find(|(name, _)| name == key).and_then(|(_, value)| match value {
            Guarded::Plain(text) => Some(text.as_str()),
            Guarded::Kept { .. } => None,
        })
    }

    /// Finds what the secrets among the options stand for; before the first connection.
    ///
    /// # Errors
    /// A user error at the option's place.
    pub fn resolve_secrets(&mut self, environment: &dyn Fn(&str) -> Option<String>) -> Result<()> {
        self.extra.iter_mut().try_for_each(|(_, value)| value.resolve(environment))
    }

    /// Leaves log-in and TLS out: the embedded broker has neither.
    pub fn without_security(&mut self) {
        let security = |key: &str| ["security.", "sasl.", "ssl."].iter().any(|word| key.starts_with(word));
        self.extra.retain(|(key, _)| !security(key));
    }

    /// Who logs in, for messages; of a secret name, where it is kept.
    pub(super) fn user(&self) -> Option<String> {
        let name = self.extra.iter().find(|(key, _)| key == "sasl.username");
        name.map(|(_, value)| value.shown())
    }

    /// # Errors
    /// User: a file that an option names cannot be read. Internal: a secret was not resolved.
    pub(super) fn apply(&self, config: &mut ClientConfig) -> Result<()> {
        let tls =
            self.plain("security.protocol").is_some_and(|name| name.to_ascii_lowercase().ends_with("ssl"));
        if tls && !self.extra.iter().any(|(key, _)| key.starts_with("ssl.ca.")) {
            // The OpenSSL that is linked in does not know where the system keeps its certificates.
            config.set("ssl.ca.location", "probe");
        }
        for (key, value) in &self.extra {
            let text = value.reveal()?;
            // librdkafka's own message names no file.
            if FILES.contains(&key.as_str()) && text != "probe" {
                std::fs::metadata(text).map_err(|error| {
                    Error::user(format!("kafka.{key} = '{}' cannot be read", value.shown())).because(error)
                })?;
            }
            config.set(key, text);
        }
        Ok(())
    }
}

/// How often added partitions are looked for.
const DISCOVERY: Duration = Duration::from_secs(60);

/// Where a pipeline without stored positions begins.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ScanStartup {
    /// At the first record that the broker still holds.
    #[default]
    Earliest,
    /// Behind the last record.
    Latest,
    /// At the first record of each partition whose timestamp (ms since the epoch) is not before this; behind the last
    /// record where there is none.
    Timestamp(i64),
    /// At these offsets (partition, offset); partitions that are not named begin at their first record.
    Offsets(Vec<(i32, i64)>),
}

impl ScanStartup {
    /// `earliest`, `latest`, a timestamp, or offsets as `0:42, 1:300` or, as Flink writes them,
    /// `partition:0,offset:42;partition:1,offset:300`.
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        if text.eq_ignore_ascii_case("earliest") {
            return Some(Self::Earliest);
        }
        if text.eq_ignore_ascii_case("latest") {
            return Some(Self::Latest);
        }
        if let Some(micros) = timestamp_micros(text) {
            return Some(Self::Timestamp(micros.div_euclid(1_000)));
        }
        offsets_of(text).map(Self::Offsets)
    }
}

/// Offsets as `0:42, 1:300` or, as Flink writes them, `partition:0,offset:42;partition:1,offset:300`.
pub fn offsets_of(text: &str) -> Option<Vec<(i32, i64)>> {
    let flink = text.starts_with("partition:");
    let pair = |entry: &str| {
        let entry = entry.trim();
        let (partition, offset) = match flink {
            true => entry.strip_prefix("partition:")?.split_once(",offset:")?,
            false => entry.split_once(':')?,
        };
        let (partition, offset) = (partition.trim().parse().ok()?, offset.trim().parse().ok()?);
        (partition >= 0 && offset >= 0).then_some((partition, offset))
    };
    let offsets: Vec<(i32, i64)> =
        text.split(if flink { ';' } else { ',' }).map(pair).collect::<Option<_>>()?;
    let twice = (1..offsets.len()).any(|at| offsets[..at].iter().any(|(known, _)| *known == offsets[at].0));
    (!twice).then_some(offsets)
}

/// Options of a Kafka source.
#[derive(Debug, Clone)]
pub struct KafkaSourceConfig {
    pub settings: KafkaSettings,
    pub topic: String,
    /// The declared physical columns.
    pub columns: SchemaRef,
    pub scan_startup: ScanStartup,
    pub on_error: OnError,
    /// Upper bound of rows per poll, below what the caller asks for.
    pub max_batch_rows: Option<usize>,
    /// How often to look for partitions that were added to the topic; `None`: at the start only.
    pub partition_discovery: Option<Duration>,
    /// Where group offsets are committed to; `None`: the default that the pipeline hands in.
    pub group_id: Option<String>,
    /// Fill `SourceBatch::key`: some view reads `_key`.
    pub keep_key: bool,
    /// Fill `SourceBatch::payload`: rows may fail after decoding and must be kept whole then.
    pub keep_payload: bool,
    /// Added to the broker's offsets: the embedded broker begins at 0 after every start, the pipeline goes on.
    pub offset_base: Positions,
    /// The broker lives in this process: a topic of its is another one after every start, and it knows no ids of topics.
    pub is_embedded: bool,
}

impl KafkaSourceConfig {
    /// Takes `bootstrap_servers`, `topic`, `format`, `scan_startup`, `on_error`, `max_batch_rows`, `partition_discovery_interval`, `group_id` and
    /// `kafka.*`.
    ///
    /// # Errors
    /// A user error for a missing, wrong or reserved option.
    pub fn from_options(options: &mut Options, columns: SchemaRef) -> Result<Self> {
        let settings = KafkaSettings::from_options(options)?;
        let topic = options.required("topic")?;
        options.choice("format", &["json"])?;
        let place = options.place("scan_startup");
        let scan_startup = match options.string("scan_startup")? {
            None => ScanStartup::default(),
            Some(text) => ScanStartup::parse(&text).ok_or_else(|| {
                let message = format!("{}: scan_startup = '{text}' is not understood", options.owner());
                let error = Error::user(message).hint(
                    "Write 'earliest', 'latest', a timestamp such as '2026-01-31T12:00:00Z', or an offset per \
                     partition such as '0:42, 1:300'.",
                );
                match place {
                    Some(place) => error.at(place),
                    None => error,
                }
            })?,
        };
        let on_error = OnError::from_options(options)?;
        let rows =
            options.parse::<std::num::NonZeroUsize>("max_batch_rows", "a number of rows, at least 1")?;
        let discovery = options.duration("partition_discovery_interval")?.unwrap_or(DISCOVERY);
        let group_id = options.string("group_id")?;
        Ok(Self {
            settings,
            topic,
            columns,
            scan_startup,
            on_error,
            max_batch_rows: rows.map(std::num::NonZeroUsize::get),
            partition_discovery: (!discovery.is_zero()).then_some(discovery),
            group_id,
            keep_key: false,
            keep_payload: false,
            offset_base: Positions::default(),
            is_embedded: false,
        })
    }

    pub(super) fn client(&self, group: &str) -> Result<ClientConfig> {
        let mut config = base_config(&self.settings);
        // A full queue would otherwise hold the next fetch back for a second.
        config.set("fetch.queue.backoff.ms", "10").set("fetch.error.backoff.ms", "100");
        self.settings.apply(&mut config)?;
        config
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("enable.partition.eof", "true")
            .set("auto.offset.reset", "error");
        Ok(config)
    }
}

/// How a missing topic is created.
#[derive(Debug, Clone)]
pub struct TopicCreation {
    pub partitions: i32,
    pub retention: Duration,
    /// Replicas per partition; -1: the broker's default.
    pub replication: i32,
    /// Other `topic.*` options, as the broker knows them.
    pub extra: Vec<(String, String)>,
}

/// Options of a Kafka sink.
#[derive(Debug, Clone)]
pub struct KafkaSinkConfig {
    pub settings: KafkaSettings,
    pub topic: String,
    /// Names of the columns that make the record key, joined by `:`. Empty: records have no key.
    pub key: Vec<String>,
    /// `None`: a missing topic is an error.
    pub create: Option<TopicCreation>,
    /// `dev --inject-bad`: records that are broken on purpose.
    pub bad: Option<BadRecords>,
}

impl KafkaSinkConfig {
    /// Takes `bootstrap_servers`, `topic`, `format`, `key`, `create`, `topic.partitions` (4), `topic.retention`
    /// (1 day), `topic.replication` (the broker's default), other `topic.*` and `kafka.*`.
    ///
    /// # Errors
    /// A user error for a missing, wrong or reserved option.
    pub fn from_options(options: &mut Options) -> Result<Self> {
        let settings = KafkaSettings::from_options(options)?;
        let topic = options.required("topic")?;
        options.choice("format", &["json"])?;
        let key = options.string("key")?.unwrap_or_default();
        let key: Vec<String> =
            key.split(',').map(|name| name.trim().to_owned()).filter(|k| !k.is_empty()).collect();
        let create = options.choice("create", &["true", "false"])? != Some(1);
        let partitions =
            options.parse::<std::num::NonZeroU16>("topic.partitions", "a number of partitions")?;
        let retention = options.duration("topic.retention")?.unwrap_or(DAY);
        let replication =
            options.parse::<std::num::NonZeroU8>("topic.replication", "a number of replicas")?;
        let creation = TopicCreation {
            partitions: partitions.map_or(4, |n| i32::from(n.get())),
            retention,
            replication: replication.map_or(-1, |n| i32::from(n.get())),
            extra: options.with_prefix("topic."),
        };
        Ok(Self { settings, topic, key, create: create.then_some(creation), bad: None })
    }

    /// Positions of the key columns.
    ///
    /// # Errors
    /// A user error for a key column that does not exist, with the nearest one.
    pub fn key_columns(&self, schema: &Schema) -> Result<Vec<usize>> {
        let find = |name: &String| {
            schema.index_of(name).map_err(|_| {
                let names: Vec<String> = schema.fields().iter().map(|field| field.name().clone()).collect();
                let error =
                    Error::user(format!("the key column {name} of topic {} does not exist", self.topic));
                match nearest(name, &names) {
                    Some(near) => error.hint(format!("Did you mean {near}?")),
                    None => error.hint(format!("The columns are {}.", names.join(", "))),
                }
            })
        };
        self.key.iter().map(find).collect()
    }

    pub(super) fn client(&self) -> Result<ClientConfig> {
        let mut config = base_config(&self.settings);
        config
            .set("linger.ms", "5")
            // Java's default, so that one key lands in one partition whoever writes it.
            .set("partitioner", "murmur2_random")
            // However long the broker is away, a record waits for it, as the source does.
            .set("message.timeout.ms", "0")
            // What is not acknowledged yet must not fill the memory.
            .set("queue.buffering.max.kbytes", "65536");
        self.settings.apply(&mut config)?;
        config.set("enable.idempotence", "true").set("allow.auto.create.topics", "false");
        Ok(config)
    }
}
