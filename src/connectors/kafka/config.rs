//! Options of Kafka sources and sinks.

use std::fmt;
use std::time::Duration;

use arrow::datatypes::{Schema, SchemaRef};
use rdkafka::config::ClientConfig;

use super::bad::BadRecords;
use super::{base_config, created};
use crate::connectors::formats::{OnError, timestamp_micros};
use crate::error::{Error, Result};
use crate::sql::options::{Options, Secret, nearest};
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

const DAY: Duration = Duration::from_secs(86_400);

/// Where the brokers are, and what goes to librdkafka as it stands.
#[derive(Clone, Default)]
pub struct KafkaSettings {
    pub bootstrap_servers: String,
    /// `kafka.*` options without the prefix.
    pub extra: Vec<(String, String)>,
}

impl fmt::Debug for KafkaSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values may be passwords.
        let keys: Vec<&str> = self.extra.iter().map(|(key, _)| key.as_str()).collect();
        f.debug_struct("KafkaSettings")
            .field("bootstrap_servers", &self.bootstrap_servers)
            .field("extra", &keys)
            .finish()
    }
}

impl KafkaSettings {
    fn from_options(options: &mut Options) -> Result<Self> {
        let bootstrap_servers = options.required("bootstrap_servers")?;
        let extra = options.with_prefix("kafka.");
        for (key, _) in &extra {
            if let Some((_, hint)) = RESERVED.iter().find(|(reserved, _)| reserved == key) {
                let error =
                    Error::user(format!("{}: kafka.{key} cannot be set", options.owner())).hint(*hint);
                return Err(match options.place(&format!("kafka.{key}")) {
                    Some(place) => error.at(place),
                    None => error,
                });
            }
        }
        let settings = Self { bootstrap_servers, extra };
        settings.check(options)?;
        Ok(settings)
    }

    /// Adds `kafka.*` options that were written as `secret('…')`.
    #[must_use]
    pub fn with_secrets(mut self, secrets: Vec<(String, Secret)>) -> Self {
        self.extra.extend(secrets.into_iter().map(|(key, secret)| (key, secret.reveal().to_owned())));
        self
    }

    /// librdkafka itself knows its options; asking it needs no connection.
    fn check(&self, options: &Options) -> Result<()> {
        for (key, value) in &self.extra {
            let mut config = ClientConfig::new();
            config.set(key, value);
            if let Err(error) = created(self, config.create_native_config().map(|_| ())) {
                let error = error.context(options.owner());
                return Err(match options.place(&format!("kafka.{key}")) {
                    Some(place) => error.at(place),
                    None => error,
                });
            }
        }
        Ok(())
    }

    fn apply(&self, config: &mut ClientConfig) {
        for (key, value) in &self.extra {
            config.set(key, value);
        }
    }
}

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
        let twice =
            (1..offsets.len()).any(|at| offsets[..at].iter().any(|(known, _)| *known == offsets[at].0));
        (!twice).then_some(Self::Offsets(offsets))
    }
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
    /// Where group offsets are committed to; `None`: the default that the pipeline hands in.
    pub group_id: Option<String>,
    /// Fill `SourceBatch::key`: some view reads `_key`.
    pub keep_key: bool,
    /// Fill `SourceBatch::payload`: rows may fail after decoding and must be kept whole then.
    pub keep_payload: bool,
    /// Added to the broker's offsets: the embedded broker begins at 0 after every start, the pipeline goes on.
    pub offset_base: Positions,
}

impl KafkaSourceConfig {
    /// Takes `bootstrap_servers`, `topic`, `format`, `scan_startup`, `on_error`, `max_batch_rows`, `group_id` and
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
        let group_id = options.string("group_id")?;
        Ok(Self {
            settings,
            topic,
            columns,
            scan_startup,
            on_error,
            max_batch_rows: rows.map(std::num::NonZeroUsize::get),
            group_id,
            keep_key: false,
            keep_payload: false,
            offset_base: Positions::default(),
        })
    }

    pub(super) fn client(&self, group: &str) -> ClientConfig {
        let mut config = base_config(&self.settings);
        // A full queue would otherwise hold the next fetch back for a second.
        config.set("fetch.queue.backoff.ms", "10").set("fetch.error.backoff.ms", "100");
        self.settings.apply(&mut config);
        config
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("enable.partition.eof", "true")
            .set("auto.offset.reset", "error");
        config
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

    pub(super) fn client(&self) -> ClientConfig {
        let mut config = base_config(&self.settings);
        config
            .set("linger.ms", "5")
            // Java's default, so that one key lands in one partition whoever writes it.
            .set("partitioner", "murmur2_random")
            // What is not acknowledged yet must not fill the memory.
            .set("queue.buffering.max.kbytes", "65536");
        self.settings.apply(&mut config);
        config.set("enable.idempotence", "true").set("allow.auto.create.topics", "false");
        config
    }
}
