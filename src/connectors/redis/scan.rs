//! Reads a sink back as rows, for `query`.
//!
//! Every column, key columns included, comes from the hash fields; a missing field is NULL. Hashes under the prefix
//! that lack a key column are not ours and are left out, as are keys that hold no hash. A scan is no snapshot: rows written meanwhile may be old or
//! new, each row by itself is whole.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{Array, ArrayRef, BinaryBuilder, RecordBatch, new_null_array};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, SchemaRef};
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::time::timeout;

use super::cluster::{Batch, Cluster, Map};
use super::encode::{TextColumn, bulk, key};
use super::fault::Fault;
use super::slots::slot_of;
use super::store::{Lane, Pool};
use super::wire::Reply;
use super::{BOOK_PREFIX, RedisConfig, check_schema};
use crate::error::{Error, Result};

/// Rows per batch handed back, about.
const BATCH: usize = 8_192;
/// For one look-up, so that rows do not wait long for a server that hangs.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// Keys that the server looks at per step.
const SCAN_COUNT: &str = "1000";

/// All rows under the prefix, in no particular order.
///
/// # Errors
/// External: no server, or a field that does not have the text form of its column.
pub async fn read_all(config: &RedisConfig, schema: &SchemaRef) -> Result<Vec<RecordBatch>> {
    read(config, schema, usize::MAX).await
}

/// As [`read_all`], until there are `most` rows or a few more.
///
/// # Errors
/// As [`read_all`].
pub async fn read(config: &RedisConfig, schema: &SchemaRef, most: usize) -> Result<Vec<RecordBatch>> {
    let mut reader = Reader::open(config, schema).await?;
    let pattern = pattern(&config.prefix);
    let (mut node, mut cursor) = (0, "0".to_owned());
    // A scan may name a key more than once.
    let mut seen = HashSet::new();
    let mut batches = Vec::new();
    let mut finished = 0;
    loop {
        let words = ["SCAN", &cursor, "MATCH", &pattern, "COUNT", SCAN_COUNT, "TYPE", "hash"];
        let reply = reader.ask_node(node, &words).await?;
        let Reply::Array(mut parts) = reply else { return Err(reader.pool().odd()) };
        let (Some(Reply::Array(found)), Some(next)) = (parts.pop(), parts.pop()) else {
            return Err(reader.pool().odd());
        };
        cursor = next.text().ok_or_else(|| reader.pool().odd())?.to_owned();
        let mut keys = Vec::with_capacity(found.len());
        for name in found {
            let Reply::Bulk(name) = name else { return Err(reader.pool().odd()) };
            if !name.starts_with(BOOK_PREFIX.as_bytes()) && !seen.contains(&name) {
                seen.insert(name.clone());
                keys.push(name);
            }
        }
        reader.fetch(&keys).await?;
        node += usize::from(cursor == "0");
        let done = node == reader.nodes() || finished + reader.rows >= most;
        if reader.rows >= BATCH || done {
            finished += reader.rows;
            batches.extend(reader.finish()?);
        }
        if done {
            return reader.same_nodes().await.map(|()| batches);
        }
    }
}

/// The rows of some keys; keys that are not there are left out. `keys` has the key columns of the config by name.
///
/// # Errors
/// As [`read_all`]; user: `keys` lacks a key column.
pub async fn get(config: &RedisConfig, schema: &SchemaRef, keys: &RecordBatch) -> Result<Vec<RecordBatch>> {
    let mut reader = Reader::open(config, schema).await?;
    reader.get(config, keys).await
}

/// Point look-ups over one connection, which is made anew after a failure.
pub struct Lookup {
    config: RedisConfig,
    schema: SchemaRef,
    reader: Option<Reader>,
}

impl Lookup {
    pub fn new(config: RedisConfig, schema: SchemaRef) -> Self {
        Self { config, schema, reader: None }
    }

    /// As [`get`], within five seconds.
    ///
    /// # Errors
    /// As [`get`]; the connection is then made anew.
    pub async fn get(&mut self, keys: &RecordBatch) -> Result<Vec<RecordBatch>> {
        match timeout(LOOKUP_TIMEOUT, self.ask(keys)).await {
            Ok(answers) => answers,
            Err(_) => {
                let shown = self.config.shown_url();
                let seconds = LOOKUP_TIMEOUT.as_secs();
                Err(Error::external(format!("redis at {shown} did not answer within {seconds} s")))
            }
        }
    }

    async fn ask(&mut self, keys: &RecordBatch) -> Result<Vec<RecordBatch>> {
        if let Some(mut reader) = self.reader.take() {
            match reader.get(&self.config, keys).await {
                Ok(answers) => {
                    self.reader = Some(reader);
                    return Ok(answers);
                }
                Err(error) if error.is_lasting() => return Err(error),
                // It may only have been idle for too long: a new connection decides.
                Err(error) => tracing::debug!(%error, "a connection for look-ups was lost"),
            }
        }
        let mut reader = Reader::open(&self.config, &self.schema).await?;
        let answers = reader.get(&self.config, keys).await?;
        self.reader = Some(reader);
        Ok(answers)
    }

    /// Makes connections beside the look-ups, for [`Lookup::adopt`].
    pub fn connector(&self) -> impl Fn() -> BoxFuture<'static, Result<Reader>> + Send + 'static {
        let (config, schema) = (self.config.clone(), Arc::clone(&self.schema));
        move || {
            let (config, schema) = (config.clone(), Arc::clone(&schema));
            async move { Reader::open(&config, &schema).await }.boxed()
        }
    }

    /// Goes on with this connection.
    pub fn adopt(&mut self, reader: Reader) {
        self.reader = Some(reader);
    }
}

/// What is read from.
enum Server {
    One {
        pool: Pool,
        lane: Lane,
    },
    Many {
        cluster: Cluster,
        /// As it was when the reader was opened.
        map: Arc<Map>,
    },
}

/// A connection, and what is read over it.
pub struct Reader {
    server: Server,
    schema: SchemaRef,
    key_columns: Vec<usize>,
    columns: Vec<BinaryBuilder>,
    rows: usize,
    /// The field names of a `HMGET`, encoded.
    fields: Vec<u8>,
}

impl Reader {
    async fn get(&mut self, config: &RedisConfig, keys: &RecordBatch) -> Result<Vec<RecordBatch>> {
        let mut parts = Vec::new();
        for column in config.key_columns(keys.schema_ref())? {
            let mut text = TextColumn::default();
            text.fill(keys.column(column))?;
            parts.push(text);
        }
        let mut batches = Vec::new();
        let mut names = Vec::new();
        for row in 0..keys.num_rows() {
            if !parts.iter().any(|part| part.is_null(row)) {
                let mut name = Vec::new();
                key(&mut name, config.prefix.as_bytes(), parts.iter().map(|part| part.cell(row)));
                names.push(name);
            }
        }
        for names in names.chunks(BATCH) {
            self.fetch(names).await?;
            batches.extend(self.finish()?);
        }
        Ok(batches)
    }

    async fn open(config: &RedisConfig, schema: &SchemaRef) -> Result<Self> {
        check_schema(schema)?;
        let key_columns = config.key_columns(schema)?;
        let pool = Pool::new(config, false)?;
        let lane = pool.lane().await.map_err(|error| pool.unreachable(error))?;
        let server = match lane.wire.clustered {
            false => Server::One { pool, lane },
            true => {
                pool.put_back(lane);
                let cluster = Cluster::open(config, pool, false).await?;
                Server::Many { map: cluster.map(), cluster }
            }
        };
        let mut fields = Vec::new();
        schema.fields().iter().for_each(|field| bulk(&mut fields, field.name().as_bytes()));
        let columns = schema.fields().iter().map(|_| BinaryBuilder::new()).collect();
        Ok(Self { server, schema: schema.clone(), key_columns, columns, rows: 0, fields })
    }

    fn pool(&self) -> &Pool {
        match &self.server {
            Server::One { pool, .. } => pool,
            Server::Many { cluster, .. } => &cluster.seed,
        }
    }

    fn nodes(&self) -> usize {
        match &self.server {
            Server::One { .. } => 1,
            Server::Many { map, .. } => map.nodes().len(),
        }
    }

    /// A scan of a cluster finds every key only if no slot has moved behind it.
    ///
    /// # Errors
    /// External: one has.
    async fn same_nodes(&self) -> Result<()> {
        match &self.server {
            Server::Many { cluster, map } if !Arc::ptr_eq(map, &cluster.refresh().await?) => {
                let message = "slots of the Redis Cluster moved while it was read";
                Err(Error::external(message).hint("Ask again when they have settled."))
            }
            _ => Ok(()),
        }
    }

    /// One command for a node.
    async fn ask_node(&mut self, node: usize, words: &[&str]) -> Result<Reply> {
        let (pool, lane) = match &mut self.server {
            Server::One { pool, lane } => (pool, lane),
            Server::Many { map, .. } => return map.nodes()[node].ask(words).await,
        };
        match lane.wire.ask(words).await {
            Ok(Reply::Error(error)) => Err(pool.refused(&error)),
            Ok(reply) => Ok(reply),
            Err(error) => Err(pool.unreachable(error)),
        }
    }

    /// Appends the hashes of these keys, all asked for in one go.
    async fn fetch(&mut self, keys: &[Vec<u8>]) -> Result<()> {
        if let Server::Many { cluster, .. } = &self.server {
            let mut batch = Batch::default();
            for key in keys {
                batch.push(slot_of(key), |bytes| self.hmget(bytes, key));
            }
            let replies = cluster.ask(&batch).await?;
            return replies.into_iter().try_for_each(|reply| self.append(reply));
        }
        let mut bytes = Vec::new();
        keys.iter().for_each(|key| self.hmget(&mut bytes, key));
        let Server::One { pool, lane } = &mut self.server else { return Ok(()) };
        lane.wire.send(&bytes).await.map_err(|error| pool.unreachable(error))?;
        for _ in keys {
            let Server::One { pool, lane } = &mut self.server else { return Ok(()) };
            let reply = lane.wire.reply().await.map_err(|error| pool.unreachable(error))?;
            self.append(reply)?;
        }
        Ok(())
    }

    fn hmget(&self, bytes: &mut Vec<u8>, key: &[u8]) {
        super::encode::array_header(bytes, 2 + self.schema.fields().len());
        bulk(bytes, b"HMGET");
        bulk(bytes, key);
        bytes.extend_from_slice(&self.fields);
    }

    /// Appends the answer to a [`Reader::hmget`].
    fn append(&mut self, reply: Reply) -> Result<()> {
        let values = match reply {
            Reply::Array(values) if values.len() == self.columns.len() => values,
            Reply::Error(error) if Fault::of(&error) == Fault::WrongType => return Ok(()),
            Reply::Error(error) => return Err(self.pool().refused(&error)),
            _ => return Err(self.pool().odd()),
        };
        // Expired since, or not written by us.
        if self.key_columns.iter().any(|&column| values[column] == Reply::Null) {
            return Ok(());
        }
        for (column, value) in self.columns.iter_mut().zip(values) {
            match value {
                Reply::Bulk(bytes) => column.append_value(bytes),
                _ => column.append_null(),
            }
        }
        self.rows += 1;
        Ok(())
    }

    fn finish(&mut self) -> Result<Option<RecordBatch>> {
        if std::mem::take(&mut self.rows) == 0 {
            return Ok(None);
        }
        let mut columns = Vec::with_capacity(self.columns.len());
        for (builder, field) in self.columns.iter_mut().zip(self.schema.fields()) {
            let texts: ArrayRef = Arc::new(builder.finish());
            let values = decode(&texts, field.data_type()).map_err(|error| {
                Error::external(format!(
                    "the Redis field {} does not hold {}",
                    field.name(),
                    field.data_type()
                ))
                .hint("The hash was written by another program or an older version of the sink.")
                .because(error)
            })?;
            columns.push(values);
        }
        // Whatever the schema says of NULL: a field may be missing.
        let fields = self.schema.fields().iter().zip(&columns);
        let nullable: Vec<_> = fields
            .map(|(field, column)| {
                let nullable = field.is_nullable() || column.null_count() > 0;
                field.as_ref().clone().with_nullable(nullable)
            })
            .collect();
        let schema = Arc::new(arrow::datatypes::Schema::new(nullable));
        Ok(Some(RecordBatch::try_new(schema, columns)?))
    }
}

/// The inverse of [`TextColumn::fill`].
pub(super) fn decode(texts: &ArrayRef, to: &DataType) -> Result<ArrayRef, arrow::error::ArrowError> {
    let strict = CastOptions { safe: false, ..CastOptions::default() };
    match to {
        DataType::Null => Ok(new_null_array(to, texts.len())),
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            cast_with_options(texts, to, &strict)
        }
        _ => cast_with_options(&cast_with_options(texts, &DataType::Utf8, &strict)?, to, &strict),
    }
}

/// Matches exactly the keys that begin with `prefix`.
fn pattern(prefix: &str) -> String {
    let mut pattern = String::with_capacity(prefix.len() + 1);
    for c in prefix.chars() {
        if matches!(c, '*' | '?' | '[' | ']' | '\\' | '^') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern.push('*');
    pattern
}
