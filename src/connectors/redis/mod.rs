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
//! # Faults
//! What an error answer asks for is in [`fault`]. A server that was emptied has no fence; one that was set back to an
//! older copy does not remember the last flush that it acknowledged, and the script takes the fence away. Either way
//! nothing is written until the runtime has marked every row and raises the fence again. An answer that got lost says
//! nothing: the same flush sent again is recognised by its number, one given up on comes too late for a higher number.
//!
//! # Rights
//! A sink sends HELLO, PING, SCRIPT LOAD, EVAL, EVALSHA and HGETALL, its scripts HGET, HSET, HDEL, PEXPIREAT, PERSIST and DEL, for
//! keys of its prefix and the bookkeeping `millstream:{*}`; reading a sink back sends PING, SCAN and HMGET; in a cluster both
//! send CLUSTER SLOTS and ASKING. What the user
//! may not do is an error at the start, as far as the server tells (Redis 7), and ends the pipeline at run time.
//!
//! # Cluster
//! What `HELLO` calls a node of a Redis Cluster is one: keys keep their names, and bookkeeping is per slot. See
//! [`cluster_store`] for what holds there and why, [`cluster`] for how commands find their nodes. The connections are
//! those of a single server, as a batch of calls goes from Arrow to the wire without the driver; beside them a cluster
//! takes a map of slots and two error answers, which is less than another driver with values of its own.

mod cluster;
mod cluster_store;
pub mod encode;
#[cfg(test)]
mod encode_tests;
mod fault;
pub mod scan;
mod script;
mod slots;
mod store;
#[cfg(test)]
mod tests;
mod tls;
mod wire;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::{Schema, SchemaRef};
use redis::IntoConnectionInfo;

use crate::connectors::OnlineStore;
use crate::error::{Error, Result};
use crate::sql::options::{Guarded, Options, nearest};

use cluster_store::ClusterStore;
use encode::{Layout, bulk};
use store::{Pool, RedisStore};
use wire::Address;

/// Between the parts of a composite key.
pub const KEY_SEPARATOR: u8 = b':';
/// What the names of bookkeeping hashes begin with.
pub(crate) const BOOK_PREFIX: &str = "millstream:{";
/// As `tls_ca`: the certificates that the system trusts.
const SYSTEM_CA: &str = "system";
/// Columns of a row. The script puts them on Lua's stack, which ends at 8,000.
pub const MAX_COLUMNS: usize = 1_000;

/// Options of a Redis sink or table.
#[derive(Clone)]
pub struct RedisConfig {
    /// `rediss://`: over TLS.
    pub url: String,
    /// In the place of the url's.
    pub user: Option<String>,
    pub password: Option<Guarded>,
    /// File (PEM) with the certificates to trust; `None`: those of the system.
    pub tls_ca: Option<String>,
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
            .field("tls_ca", &self.tls_ca)
            .field("key", &self.key)
            .field("prefix", &self.prefix)
            .field("ttl", &self.ttl)
            .finish()
    }
}

impl RedisConfig {
    /// Takes `url`, `user`, `password`, `tls_ca`, `key`, `prefix` and `ttl`. The default prefix is the name of the options'
    /// owner (`sink user_features` → `user_features:`).
    ///
    /// # Errors
    /// A user error for a missing `url` or `key`, a URL that is none, a password that is given twice, a `tls_ca` without
    /// TLS, or a prefix that is reserved.
    pub fn from_options(options: &mut Options) -> Result<Self> {
        let ttl = options.duration("ttl")?;
        Ok(Self { ttl, ..Self::of_table(options)? })
    }

    /// The same for a table, whose rows live as long as somebody else says.
    ///
    /// # Errors
    /// As [`RedisConfig::from_options`].
    pub fn of_table(options: &mut Options) -> Result<Self> {
        let owner = options.owner().to_owned();
        let url = options.required("url")?;
        let user = options.string("user")?;
        let password = options.guarded("password")?;
        let tls_ca = options.string("tls_ca")?.filter(|path| path != SYSTEM_CA);
        let key = options.required("key")?;
        let prefix = options.string("prefix")?;
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
        let config = Self { url, user, password, tls_ca, key, prefix, ttl: None };
        let at = |(key, error): (&str, Error)| match options.place(key) {
            Some(place) => error.context(&owner).at(place),
            None => error.context(&owner),
        };
        config.check_address().map_err(at)?;
        Ok(config)
    }

    /// What is wrong with url, password and TLS, and at which option.
    fn check_address(&self) -> Result<(), (&'static str, Error)> {
        let info = self.info().map_err(|error| ("url", error))?;
        if redis::parse_redis_url(&self.url).is_some_and(|url| url.fragment().is_some()) {
            let error = Error::user("the url ends with a # and an option");
            let hint = "Leave it out: TLS trusts tls_ca or the system's certificates, never everybody.";
            return Err(("url", error.hint(hint)));
        }
        if self.tls_ca.is_some() && !self.has_tls() {
            let error = Error::user("tls_ca has no effect without TLS");
            return Err(("tls_ca", error.hint("Write the url with rediss://, or leave tls_ca out.")));
        }
        if self.password.is_some() && info.redis_settings().password().is_some() {
            let error = Error::user("the password is given twice, in the url and as an option");
            return Err(("password", error.hint("Leave it out of the url.")));
        }
        Ok(())
    }

    fn has_tls(&self) -> bool {
        ["rediss:", "valkeys:"].iter().any(|scheme| self.url.starts_with(scheme))
    }

    /// Finds what a secret password stands for; before the first connection.
    ///
    /// # Errors
    /// A user error at the option's place.
    pub fn resolve_secrets(&mut self, environment: &dyn Fn(&str) -> Option<String>) -> Result<()> {
        self.password.as_mut().map_or(Ok(()), |password| password.resolve(environment))
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
        if let Some(user) = &self.user
            && url.set_username(user).is_err()
        {
            return "the given url".to_owned();
        }
        // A Unix socket's password is in the query.
        url.set_query(None);
        url.to_string()
    }

    /// Which keys of which server: the same for two configurations that write the same keys.
    pub fn place(&self) -> Option<String> {
        let info = self.info().ok()?;
        Some(format!("redis {}/{} {}", info.addr(), info.redis_settings().db(), self.prefix))
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

    /// Where to connect and how to log in; reads the certificates.
    ///
    /// # Errors
    /// A user error when the certificates cannot be read; internal: the password was not resolved.
    pub(crate) fn address(&self) -> Result<Address> {
        let info = self.info()?;
        let settings = info.redis_settings();
        let password = match &self.password {
            Some(password) => Some(password.reveal()?),
            None => settings.password(),
        };
        let tls = match self.has_tls() {
            true => Some(tls::connector(self.tls_ca.as_deref())?),
            false => None,
        };
        Ok(Address {
            user: self.user.as_deref().or(settings.username()).map(str::to_owned),
            password: password.map(str::to_owned),
            database: settings.db(),
            addr: info.addr().clone(),
            tls,
        })
    }

    /// The same at another address: a node of a cluster.
    ///
    /// # Errors
    /// A user error for a url of which only the password could be kept.
    pub(crate) fn at(&self, host: &str, port: u16) -> Result<Self> {
        let odd = || {
            Error::user(format!("the url {} does not lead to the nodes of a Redis Cluster", self.shown_url()))
                .hint("Name one node by host and port: url = 'redis://user@host:6379'.")
        };
        let mut url = redis::parse_redis_url(&self.url).filter(|url| url.has_host()).ok_or_else(odd)?;
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        url.set_host(Some(&host)).map_err(|_| odd())?;
        url.set_port(Some(port)).map_err(|()| odd())?;
        Ok(Self { url: url.to_string(), ..self.clone() })
    }

    /// Where and as whom, as if there were no TLS: the driver is built without it.
    fn info(&self) -> Result<redis::ConnectionInfo> {
        let plain = match self.url.split_once("s:") {
            Some((scheme @ ("redis" | "valkey"), rest)) => format!("{scheme}:{rest}"),
            _ => self.url.clone(),
        };
        plain.as_str().into_connection_info().map_err(|_| {
            // The driver's message may quote the URL, password included.
            Error::user("the url is not a Redis URL").hint("Write url = 'rediss://user@host:6379/0'.")
        })
    }
}

/// Connects to a pipeline's sink, in a single server or a cluster. `schema`: that of the rows to be flushed.
///
/// # Errors
/// User: a key column that the schema lacks, a column without a text form, certificates that cannot be read.
/// External: no server there, or it refuses the user.
pub async fn connect(
    config: &RedisConfig,
    pipeline: &str,
    sink: &str,
    schema: &SchemaRef,
) -> Result<Arc<dyn OnlineStore>> {
    check_schema(schema)?;
    let key_columns = config.key_columns(schema)?;
    let mut fields = Vec::new();
    schema.fields().iter().for_each(|field| bulk(&mut fields, field.name().as_bytes()));
    let prefix = config.prefix.as_bytes().to_vec();
    let layout = Layout { prefix, key_columns, fields, field_count: schema.fields().len() };
    let pool = Pool::new(config, true)?;
    let name = format!("{pipeline}/{sink}");
    Ok(match pool.first().await? {
        false => Arc::new(RedisStore::open(pool, layout, &name).await?),
        true => Arc::new(ClusterStore::open(config, pool, layout, &name).await?),
    })
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
