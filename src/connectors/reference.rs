//! What every connector is for and which options it takes: the one list behind `millstream help connector`,
//! `OPTIONS.md` beside this file, and the "did you mean" of a wrong option or connector.
//!
//! An option that a connector asks for and that is not here is an error in every test that runs the connector; one
//! that is here and never asked for fails `tests/options.rs`.

use std::fmt::Write as _;

use crate::error::Error;
use crate::sql::options::{OptionDoc, nearest};

/// What a statement makes of a connector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Source,
    Sink,
    Table,
}

impl Role {
    pub const ALL: [Self; 3] = [Self::Source, Self::Sink, Self::Table];

    pub fn word(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Sink => "sink",
            Self::Table => "table",
        }
    }

    /// The statement, up to its options.
    pub fn statement(self) -> &'static str {
        match self {
            Self::Source => "CREATE SOURCE n (columns, WATERMARK FOR …)",
            Self::Sink => "CREATE SINK n FROM view",
            Self::Table => "CREATE TABLE n",
        }
    }
}

/// One connector.
#[derive(Debug, Clone, Copy)]
pub struct Connector {
    pub name: &'static str,
    pub meaning: &'static str,
    /// Left out of this build by its features.
    pub built: bool,
    source: Option<&'static [OptionDoc]>,
    sink: Option<&'static [OptionDoc]>,
    table: Option<&'static [OptionDoc]>,
}

impl Connector {
    /// The options in a role, those of every connector first; `None` when it does not play it.
    pub fn options(&self, role: Role) -> Option<Vec<&'static OptionDoc>> {
        let (own, common) = match role {
            Role::Source => (self.source?, SOURCE),
            Role::Sink => (self.sink?, SINK),
            Role::Table => (self.table?, TABLE),
        };
        let behind = if role == Role::Source { SOURCE_TIME } else { &[] };
        Some(common.iter().chain(own).chain(behind).collect())
    }

    /// The same without the option that names the connector.
    pub fn listed(&self, role: Role) -> impl Iterator<Item = &'static OptionDoc> {
        let all = self.options(role).unwrap_or_default();
        all.into_iter().filter(|option| option.name != CONNECTOR.name)
    }

    pub fn roles(&self) -> impl Iterator<Item = Role> + '_ {
        Role::ALL.into_iter().filter(|role| self.options(*role).is_some())
    }
}

/// The connector of this name.
pub fn connector(name: &str) -> Option<&'static Connector> {
    CONNECTORS.iter().find(|connector| connector.name == name)
}

/// The options of a connector in a role; none for one that is not known.
pub fn options(name: &str, role: Role) -> Vec<&'static OptionDoc> {
    connector(name).and_then(|connector| connector.options(role)).unwrap_or_default()
}

/// The hint for a connector that does not play this role, or that does not exist.
pub fn hint(name: &str, role: Role) -> String {
    let playing = CONNECTORS.iter().filter(|connector| connector.built && connector.options(role).is_some());
    let names: Vec<String> = playing.map(|connector| connector.name.to_owned()).collect();
    match (nearest(name, &names), connector(name)) {
        (Some(near), None) => format!("Did you mean {near}?"),
        (_, Some(known)) if !known.built => format!("This program was built without the feature {name}."),
        _ => format!("{} {}.", role_verb(role), listed(&names)),
    }
}

fn role_verb(role: Role) -> &'static str {
    match role {
        Role::Source => "Sources are read by",
        Role::Sink => "Sinks are written by",
        Role::Table => "Tables are read by",
    }
}

fn listed(names: &[String]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("'{name}'")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => "no connector of this build".to_owned(),
    }
}

/// The error for a name that no connector has.
pub fn unknown(name: &str) -> Error {
    let names: Vec<String> = CONNECTORS.iter().map(|connector| connector.name.to_owned()).collect();
    Error::user(format!("there is no connector {name}")).hint(match nearest(name, &names) {
        Some(near) => format!("Did you mean {near}?"),
        None => format!("The connectors are {}.", names.join(", ")),
    })
}

/// `OPTIONS.md`.
pub fn markdown() -> String {
    let mut page = String::from(PAGE);
    // Writing to a string does not fail.
    for connector in CONNECTORS {
        let roles: Vec<&str> = connector.roles().map(Role::word).collect();
        writeln!(page, "\n## {}\n\n{} ({})", connector.name, connector.meaning, roles.join(", ")).ok();
        for role in connector.roles() {
            writeln!(page, "\n`{} WITH (connector = '{}', …)`\n", role.statement(), connector.name).ok();
            if connector.listed(role).next().is_none() {
                page.push_str("No options.\n");
                continue;
            }
            page.push_str("| option | takes | default | meaning |\n|---|---|---|---|\n");
            for option in connector.listed(role) {
                let cell = |text: &str| text.replace('|', "\\|");
                let (takes, default) = (cell(option.takes), cell(option.default));
                let meaning = format!("{} Example: `{}`.", cell(option.meaning), cell(option.example));
                writeln!(page, "| `{}` | {takes} | {default} | {meaning} |", option.name).ok();
            }
        }
    }
    page
}

const PAGE: &str = "\
# Options of connectors

Made from `reference.rs` beside this page, from which `millstream help connector NAME` and the \"did you mean\" of a wrong option
come too; `tests/options.rs` fails when they differ. `MILLSTREAM_BLESS=1 cargo test --test main options` writes the page anew.

Options are written `WITH (name = 'value', …)`; a name with dots may stand in quotes. A duration is `'5 seconds'`, `'1 day'`,
`'500ms'` or `INTERVAL '1 minute'`. An unknown option is an error.
";

const REQUIRED: &str = "required";
const NONE: &str = "none";

const fn option(
    name: &'static str,
    takes: &'static str,
    default: &'static str,
    example: &'static str,
    meaning: &'static str,
) -> OptionDoc {
    OptionDoc { name, takes, default, example, meaning }
}

const CONNECTOR: OptionDoc = option("connector", "name", REQUIRED, "kafka", "Which connector it is.");
const SOURCE: &[OptionDoc] = &[CONNECTOR];
const SOURCE_TIME: &[OptionDoc] = &[
    option(
        "max_future",
        "duration",
        "1 day",
        "1 hour",
        "A row whose event time is further than this ahead of its record's own timestamp is a dead letter.",
    ),
    option(
        "idle_timeout",
        "duration",
        "1 minute",
        "10 seconds",
        "A partition that was read to its end and is silent for so long no longer holds the watermark back.",
    ),
    option(
        "history",
        "sink or table",
        NONE,
        "transactions_backup",
        "The backup of this source, a Delta table (for a Kafka source also files that somebody else wrote): a pipeline without state begins with its rows, and goes on in the topic at exactly the next offset.",
    ),
];
const SINK: &[OptionDoc] = &[CONNECTOR];
const TABLE: &[OptionDoc] = &[CONNECTOR];
const FILE_TABLE: &[OptionDoc] = &[LOCATION, REFRESH];
const LOCATION: OptionDoc = option(
    "location",
    "path or URL",
    REQUIRED,
    "./lake/cities",
    "A local path, file://… or s3://bucket/prefix.",
);
const REFRESH: OptionDoc = option(
    "refresh",
    "duration",
    "never",
    "1 hour",
    "How often a look-up join reads the table again; without it the table is read at start.",
);
const CSV_TABLE: &[OptionDoc] = &[
    LOCATION,
    REFRESH,
    option("header", "true or false", "true", "false", "Whether the first line of a file names the columns."),
    option("delimiter", "one character", "a comma", ";", "What stands between the fields."),
];

const BOOTSTRAP: OptionDoc = option(
    "bootstrap_servers",
    "list of host:port",
    REQUIRED,
    "localhost:9092",
    "The brokers to begin with, commas between.",
);
const TOPIC: OptionDoc = option("topic", "text", REQUIRED, "transactions", "The topic.");
const FORMAT: OptionDoc =
    option("format", "json", "json", "json", "How records are written: one JSON object each.");
const LIBRDKAFKA: OptionDoc = option(
    "kafka.*",
    "text",
    NONE,
    "65536",
    "Handed to librdkafka as it stands, without the prefix; its CONFIGURATION.md lists them. Those that carry \
     guarantees are refused.",
);

const ON_ERROR: OptionDoc = option(
    "on_error",
    "dead_letter, skip or fail",
    "dead_letter",
    "skip",
    "What becomes of a record that is no row: kept aside with what was wrong, counted and dropped, or the end.",
);

const KAFKA_SOURCE: &[OptionDoc] = &[
    BOOTSTRAP,
    TOPIC,
    FORMAT,
    option(
        "scan_startup",
        "earliest, latest, timestamp or offsets",
        "earliest",
        "2026-01-31T12:00:00Z",
        "Where a pipeline without stored positions begins. Offsets are written per partition: 0:42, 1:300.",
    ),
    ON_ERROR,
    option("max_batch_rows", "number", "65536", "1000", "No poll takes more rows."),
    option(
        "partition_discovery_interval",
        "duration",
        "1 minute",
        "10 seconds",
        "How often the topic is asked for added partitions, which are read from their beginning, and for the ends of all: a client that gets no more records is then replaced. 0 s: never.",
    ),
    option(
        "group_id",
        "text",
        "millstream-<pipeline>-<source>",
        "features",
        "Where offsets are committed to after each checkpoint, for lag tools. The truth is the state.",
    ),
    option(
        "history.partition_column",
        "column",
        "_partition",
        "kafka_partition",
        "Of a history that somebody else wrote: the column, or folders column=value, that says which partition a record was in.",
    ),
    option(
        "history.offset_column",
        "column",
        "_offset",
        "kafka_offset",
        "Of a history that somebody else wrote: the column that says which offset a record had. Without one there must be history.end_offsets.",
    ),
    option(
        "history.end_offsets",
        "offsets per partition",
        "behind its last row",
        "0:1200, 1:1180",
        "Of a history that somebody else wrote: the offsets at which the topic goes on, on your word.",
    ),
    LIBRDKAFKA,
];
const FILES_SOURCE: &[OptionDoc] = &[
    option(
        "path",
        "path, folder or pattern",
        REQUIRED,
        "./logs/*.json",
        "NDJSON files or JSON arrays, local or s3://…, with *, ? and ** in names; read in the order of their names.",
    ),
    FORMAT,
    ON_ERROR,
];
const GENERATOR_SOURCE: &[OptionDoc] = &[
    option("rows_per_second", "number", "0", "2000", "How fast rows come; 0: as fast as they are read."),
    option("total", "number", "endless", "1000000", "Rows in all."),
    option("seed", "number", "0", "7", "Of the random columns r1, r2, …"),
    option(
        "start",
        "timestamp",
        "the first start",
        "2026-01-31 12:00:00",
        "Event time of row 0; each following row is 1 / rows_per_second later (1 ms without a rate).",
    ),
    option(
        "lookback",
        "duration",
        "0",
        "1 minute",
        "How far before the first start row 0 lies, without start.",
    ),
];

const EMISSION: OptionDoc = option(
    "emission",
    "final or changes",
    "final; changes for GROUP BY",
    "final",
    "Which rows arrive: those that can no longer change, or every change with its weight.",
);
const EMISSION_ONLINE: OptionDoc =
    option("emission", "latest", "latest", "latest", "Which rows arrive: the newest one of each key.");

const PARTITION_BY: OptionDoc = option(
    "partition_by",
    "list",
    NONE,
    "day(event_time)",
    "Columns, or year(c), month(c), day(c), hour(c), minute(c), which are stored as c_year, c_month and so on.",
);
const NDJSON_SINK: &[OptionDoc] = &[
    EMISSION,
    option(
        "location",
        "path or URL",
        REQUIRED,
        "./lake/staging",
        "The folder: a local path, file://… or s3://…",
    ),
    PARTITION_BY,
];
const DELTA_SINK: &[OptionDoc] = &[
    EMISSION,
    option(
        "location",
        "path or URL",
        REQUIRED,
        "./lake/features",
        "The table: a local path, file://… or s3://…",
    ),
    PARTITION_BY,
    option(
        "target_file_size",
        "size",
        "256MB",
        "64MB",
        "A file is closed at this size within an epoch; compaction merges smaller ones up to it.",
    ),
    option(
        "compact_interval",
        "duration or off",
        "10 minutes",
        "1 hour",
        "How often small files are merged in the background; a file waits as long before it is touched.",
    ),
    option(
        "vacuum_retention",
        "duration or off",
        "7 days",
        "30 days",
        "Files that no longer belong to the table are deleted after this time: older versions are then gone.",
    ),
    option(
        "on_schema_change",
        "fail or add_columns",
        "fail",
        "add_columns",
        "Columns that the SQL has and the table lacks: refuse to start, or add them. A changed type is refused.",
    ),
    option("compression", "snappy, zstd or uncompressed", "snappy", "zstd", "Of the Parquet files."),
    option(
        "mode",
        "append, upsert or changelog",
        "append",
        "changelog",
        "For GROUP BY: one row per key, or every change with _weight and _epoch. Other rows are appended.",
    ),
    option("key", "list of columns", NONE, "user_id", "With mode = 'upsert': the columns of GROUP BY."),
    option(
        "metadata",
        "all or none",
        "all",
        "none",
        "Whether a backup of a Kafka source stores _topic, _partition, _offset, _timestamp and _key.",
    ),
];
const KEY: OptionDoc = option(
    "key",
    "list of columns",
    REQUIRED,
    "user_id",
    "One row is kept per key; those of GROUP BY or PARTITION BY.",
);
const TTL: OptionDoc =
    option("ttl", "duration", "for ever", "30 days", "A row lives until its event time + ttl.");
const URL: OptionDoc = option(
    "url",
    "URL",
    REQUIRED,
    "redis://localhost:6379",
    "redis://user:password@host:port/database; rediss:// with TLS. Of a Redis Cluster any node.",
);
const USER: OptionDoc = option("user", "text", "of the URL", "features", "Who logs in.");
const PASSWORD: OptionDoc = option(
    "password",
    "text or secret('env:…')",
    "of the URL",
    "hidden",
    "Resolved at start and never printed.",
);
const TLS_CA: OptionDoc = option(
    "tls_ca",
    "path or 'system'",
    "system",
    "system",
    "With rediss://: the certificates (PEM) that the server's is checked against.",
);
const PREFIX: OptionDoc = option("prefix", "text", "<sink or table>:", "user:", "In front of every key.");
const REDIS_SINK: &[OptionDoc] = &[EMISSION_ONLINE, URL, USER, PASSWORD, TLS_CA, KEY, PREFIX, TTL];
const REDIS_TABLE: &[OptionDoc] = &[
    URL,
    USER,
    PASSWORD,
    TLS_CA,
    KEY,
    PREFIX,
    option(
        "cache",
        "duration",
        "1 minute",
        "10 seconds",
        "How long an answer counts before Redis is asked again.",
    ),
    option(
        "on_lookup_error",
        "stale, null or dead_letter",
        "stale",
        "null",
        "For rows whose key cannot be asked for: what was last seen of it, NULL, or kept aside.",
    ),
];
const MEMORY_SINK: &[OptionDoc] = &[EMISSION_ONLINE, KEY, TTL];
const KAFKA_SINK: &[OptionDoc] = &[
    EMISSION,
    BOOTSTRAP,
    TOPIC,
    FORMAT,
    option(
        "key",
        "list of columns",
        "no key",
        "user_id",
        "The record's key: their texts, joined by a colon.",
    ),
    option("create", "true or false", "true", "false", "A missing topic is created."),
    option("topic.partitions", "number", "4", "12", "Of a topic that is created."),
    option("topic.retention", "duration", "1 day", "7 days", "Of a topic that is created."),
    option("topic.replication", "number", "the broker's", "3", "Of a topic that is created."),
    option(
        "topic.*",
        "text",
        NONE,
        "compact",
        "Other settings of a topic that is created, as the broker knows them.",
    ),
    LIBRDKAFKA,
];
const CONSOLE_SINK: &[OptionDoc] =
    &[EMISSION, option("format", "ndjson or table", "ndjson", "table", "How rows are written to stdout.")];
const BLACKHOLE_SINK: &[OptionDoc] = &[EMISSION];

const fn own(name: &'static str, meaning: &'static str) -> Connector {
    Connector { name, meaning, built: true, source: None, sink: None, table: None }
}

/// Every connector, in the order of the help.
pub const CONNECTORS: &[Connector] = &[
    Connector {
        sink: Some(DELTA_SINK),
        table: Some(FILE_TABLE),
        built: cfg!(feature = "delta"),
        ..own("delta", "A Delta table, written exactly once.")
    },
    Connector {
        sink: Some(REDIS_SINK),
        table: Some(REDIS_TABLE),
        built: cfg!(feature = "redis"),
        ..own("redis", "The newest row per key, one hash each, for serving.")
    },
    Connector {
        source: Some(KAFKA_SOURCE),
        sink: Some(KAFKA_SINK),
        built: cfg!(feature = "kafka"),
        ..own("kafka", "A topic of JSON records. The sink writes each row at least once.")
    },
    Connector {
        source: Some(GENERATOR_SOURCE),
        ..own(
            "generator",
            "Rows that anybody can make again: columns seq, event_time and the random r1, r2, …",
        )
    },
    Connector {
        sink: Some(MEMORY_SINK),
        ..own("memory", "The newest row per key, in the process and its state.")
    },
    Connector { sink: Some(CONSOLE_SINK), ..own("console", "Rows on stdout, for looking.") },
    Connector {
        sink: Some(BLACKHOLE_SINK),
        ..own("blackhole", "Counts rows and forgets them, for measuring.")
    },
    Connector { table: Some(FILE_TABLE), ..own("parquet", "Parquet files.") },
    Connector { table: Some(CSV_TABLE), ..own("csv", "CSV files.") },
    Connector {
        sink: Some(NDJSON_SINK),
        table: Some(FILE_TABLE),
        ..own("ndjson", "Files of one JSON object per line. The sink writes exactly once after a restart.")
    },
    Connector {
        source: Some(FILES_SOURCE),
        ..own("files", "Files of JSON records, read as one log in the order of their names.")
    },
];
