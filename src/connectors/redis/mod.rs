//! Redis: the newest row per key, as one hash per key, guarded by a fence (DESIGN §5 *Redis*).
//!
//! # Layout
//! The row with key `7` of a sink with prefix `user:` is the hash `user:7`, one field per column, key columns
//! included. Composite keys are joined by `:` (so `a:b` + `c` and `a` + `b:c` are the same key: choose key columns
//! that cannot contain a colon). Values are text, see [`encode`]; a NULL removes its field. With a `ttl` the hash
//! expires at event time + ttl; a row that has already expired is removed.
//!
//! # Bookkeeping
//! Everything that the sink must remember is in one hash `millstream:{<pipeline>/<sink>}`, which scans leave out:
//!
//! | field | value |
//! |---|---|
//! | `fence` | newest generation that may write, 20 digits |
//! | `flush:<shard>` | `<generation>-<flush number>-<call>` of the last script call that wrote, 20 + 20 + 10 digits |
//! | `expires` | `1` once a row was written with an expiry |
//! | `offset:<branch>:<topic>:<partition>` | next offset per place, 20 digits |
//!
//! Numbers have a fixed width because the script compares them as text: Lua's numbers lose integers above 2^53.
//! The generation is part of the flush number, so a new generation starts again at any number.
//!
//! # Not yet
//! Redis Cluster: the script touches keys of many slots, so they would have to be split by slot. TLS (`rediss://`).

pub mod encode;
#[cfg(test)]
mod encode_tests;
pub mod scan;
mod script;
mod store;
#[cfg(test)]
mod tests;
mod wire;

use std::fmt;
use std::time::Duration;

use arrow::datatypes::Schema;
use redis::IntoConnectionInfo;

use crate::error::{Error, Result};
use crate::sql::options::{Options, nearest};

pub use store::RedisStore;

/// Between the parts of a composite key.
pub const KEY_SEPARATOR: u8 = b':';
/// What the names of bookkeeping hashes begin with.
pub(crate) const BOOK_PREFIX: &str = "millstream:{";
/// Columns of a row. The script puts them on Lua's stack, which ends at 8,000.
pub const MAX_COLUMNS: usize = 1_000;

/// Options of a Redis sink or table.
#[derive(Clone)]
pub struct RedisConfig {
    pub url: String,
    /// Names of the key columns, in the order in which they make the key.
    pub key: Vec<String>,
    /// In front of every key.
    pub prefix: String,
    /// A row lives until its event time + ttl; `None`: for ever.
    pub ttl: Option<Duration>,
}

impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisConfig")
            .field("url", &self.shown_url())
            .field("key", &self.key)
            .field("prefix", &self.prefix)
            .field("ttl", &self.ttl)
            .finish()
    }
}

impl RedisConfig {
    /// Takes `url`, `key`, `prefix` and `ttl`. The default prefix is the name of the options' owner
    /// (`sink user_features` → `user_features:`).
    ///
    /// # Errors
    /// A user error for a missing `url` or `key`, a URL that is none, or a prefix that is reserved.
    pub fn from_options(options: &mut Options) -> Result<Self> {
        let place = options.place("url");
        let at = |error: Error| match place.clone() {
            Some(place) => error.at(place),
            None => error,
        };
        let owner = options.owner().to_owned();
        let url = options.required("url")?;
        let key = options.required("key")?;
        let prefix = options.string("prefix")?;
        let ttl = options.duration("ttl")?;
        let key: Vec<String> = key.split(',').map(|column| column.trim().to_owned()).collect();
        if key.iter().any(String::is_empty) || (1..key.len()).any(|i| key[..i].contains(&key[i])) {
            return Err(Error::user(format!("{owner}: key = '{}' is no list of columns", key.join(",")))
                .hint("Name each key column once, with commas between: key = 'user_id, currency'."));
        }
        let name = owner.rsplit(' ').next().unwrap_or_default();
        let prefix = prefix.unwrap_or_else(|| format!("{name}:"));
        if prefix.starts_with(BOOK_PREFIX) {
            return Err(Error::user(format!("{owner}: the prefix {prefix} is reserved"))
                .hint(format!("Choose a prefix that does not begin with {BOOK_PREFIX}.")));
        }
        let config = Self { url, key, prefix, ttl };
        config.address().map_err(|error| at(error.context(owner)))?;
        Ok(config)
    }

    /// The time to live in µs, for the table of newest rows.
    pub fn ttl_micros(&self) -> Option<i64> {
        self.ttl.map(|ttl| i64::try_from(ttl.as_micros()).unwrap_or(i64::MAX))
    }

    /// The URL with its password masked, for messages.
    pub fn shown_url(&self) -> String {
        let Some(mut url) = redis::parse_redis_url(&self.url) else { return "the given url".to_owned() };
        if url.password().is_some() && url.set_password(Some("***")).is_err() {
            return "the given url".to_owned();
        }
        // A Unix socket's password is in the query.
        url.set_query(None);
        url.to_string()
    }

    /// Indexes of the key columns.
    ///
    /// # Errors
    /// A user error that names a key column which the schema lacks.
    pub fn key_columns(&self, schema: &Schema) -> Result<Vec<usize>> {
        let find = |name: &String| {
            schema.index_of(name).map_err(|_| {
                let names: Vec<String> = schema.fields().iter().map(|field| field.name().clone()).collect();
                let error =
                    Error::user(format!("the key column {name} is not among the columns of the sink"));
                match nearest(name, &names) {
                    Some(near) => error.hint(format!("Did you mean {near}?")),
                    None => error.hint(format!("Its columns are {}.", names.join(", "))),
                }
            })
        };
        self.key.iter().map(find).collect()
    }

    pub(crate) fn address(&self) -> Result<redis::ConnectionInfo> {
        if self.url.starts_with("rediss:") || self.url.starts_with("valkeys:") {
            return Err(Error::user(format!("{} needs TLS, which is not supported yet", self.shown_url()))
                .hint("Use redis:// on a trusted network, or a local TLS proxy such as stunnel."));
        }
        self.url.as_str().into_connection_info().map_err(|_| {
            // The driver's message may quote the URL, password included.
            Error::user("the url is not a Redis URL").hint("Write url = 'redis://user:password@host:6379/0'.")
        })
    }
}

/// Refuses what cannot be written as hash fields.
///
/// # Errors
/// A user error that names the column.
pub(crate) fn check_schema(schema: &Schema) -> Result<()> {
    if schema.fields().len() > MAX_COLUMNS {
        return Err(Error::user(format!("a Redis row may have {MAX_COLUMNS} columns, not more"))
            .hint("Select fewer columns in the sink's query."));
    }
    match schema.fields().iter().find(|field| !encode::has_text_form(field.data_type())) {
        None => Ok(()),
        Some(field) => Err(Error::user(format!(
            "the column {} of type {} has no text form for Redis",
            field.name(),
            field.data_type()
        ))
        .hint("Cast it to a number or VARCHAR in the sink's query.")),
    }
}
