//! [`RedisStore`]: the [`OnlineStore`] over a single Redis, and the connections to one server.
//!
//! # Lost connections
//! A call that failed on the network is sent again on a new connection, with growing pauses, about 1.5 s in all;
//! then, and at once after a time-out, the flush is an error and the caller keeps its rows dirty. A refused user is a
//! lasting error at once. Sending a flush
//! again is safe: what the server already has is recognised by its number. Whether a flush that failed was written
//! is unknown, so the caller's next flush must have a higher number and contain at least the same keys.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use arrow::array::RecordBatch;
use async_trait::async_trait;
use redis::ConnectionAddr;

use super::encode::{Call, Encoder, Layout};
use super::fault::Fault;
use super::script::{self, KEYS_PER_CALL};
use super::wire::{Address, Reply, Wire};
use super::{BOOK_PREFIX, RedisConfig, tls};
use crate::connectors::{Flushed, OnlineState, OnlineStore, OnlineWrite};
use crate::error::{Error, Result};
use crate::stream::{Positions, crash};

/// Connections that are kept for the next flush; more may be open while more flushes run at once.
const MAX_IDLE: usize = 8;
/// Pauses before each further attempt. The first is short: an idle connection may just have been closed.
const PAUSES_MS: [u64; 6] = [0, 50, 100, 200, 400, 800];

/// A connection with the buffers to fill it.
pub(super) struct Lane {
    pub(super) wire: Wire,
    encoder: Encoder,
    pub(super) buffer: Vec<u8>,
}

/// Connections to one server.
pub(super) struct Pool {
    address: Address,
    /// The URL without its password.
    shown: String,
    /// What the keys begin with, for messages.
    prefix: String,
    /// The script is loaded on every connection; who only reads needs no right to it.
    writes: bool,
    /// Of a node of a cluster.
    pub(super) clustered: bool,
    idle: Mutex<Vec<Lane>>,
}

/// Why an attempt came to nothing.
pub(super) enum Failure {
    /// The network or a passing state of the server: worth another attempt on a new connection.
    Network(io::Error),
    Final(Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Network(error)
    }
}

impl Pool {
    /// # Errors
    /// User: the certificates to trust cannot be read.
    pub(super) fn new(config: &RedisConfig, writes: bool) -> Result<Self> {
        let (address, shown, prefix) = (config.address()?, config.shown_url(), config.prefix.clone());
        Ok(Self { address, shown, prefix, writes, clustered: false, idle: Mutex::default() })
    }

    /// A first connection, without further attempts. Whether it leads to a node of a cluster.
    pub(super) async fn first(&self) -> Result<bool> {
        let lane = self.open().await.map_err(|error| self.unreachable(error))?;
        let clustered = lane.wire.clustered;
        self.put_back(lane);
        Ok(clustered)
    }

    /// Where it leads to, unless that is a socket of this machine.
    pub(super) fn host(&self) -> Option<&str> {
        match &self.address.addr {
            ConnectionAddr::Tcp(host, _) => Some(host),
            _ => None,
        }
    }

    async fn open(&self) -> io::Result<Lane> {
        let mut wire = Wire::connect(&self.address).await?;
        if !self.writes {
            return Ok(Lane { wire, encoder: Encoder::default(), buffer: Vec::new() });
        }
        // Loaded once per connection; should the server forget it, the NOSCRIPT answer leads to a new connection.
        if let Reply::Error(error) = wire.ask(&["SCRIPT", "LOAD", script::WRITE]).await? {
            let kind = match Fault::of(&error).lasts() {
                true => io::ErrorKind::PermissionDenied,
                false => io::ErrorKind::ResourceBusy,
            };
            return Err(io::Error::new(kind, error));
        }
        Ok(Lane { wire, encoder: Encoder::default(), buffer: Vec::new() })
    }

    pub(super) async fn lane(&self) -> io::Result<Lane> {
        let idle = self.idle().pop();
        match idle {
            Some(lane) => Ok(lane),
            None => self.open().await,
        }
    }

    /// Only for a lane on which every reply has been read.
    pub(super) fn put_back(&self, lane: Lane) {
        let mut idle = self.idle();
        if idle.len() < MAX_IDLE {
            idle.push(lane);
        }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Lane>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the connections that are kept.
    pub(super) fn forget(&self) {
        self.idle().clear();
    }

    /// Whether and after which pause to try again after `attempt` failures before this one.
    pub(super) async fn ride_out(&self, attempt: usize, error: io::Error) -> Result<()> {
        // Its siblings are most likely dead too.
        self.forget();
        use io::ErrorKind as Kind;
        let hopeless = [Kind::TimedOut, Kind::PermissionDenied, Kind::InvalidData];
        let hopeless = hopeless.contains(&error.kind());
        match PAUSES_MS.get(attempt) {
            Some(pause) if !hopeless => {
                tracing::debug!(url = %self.shown, attempt, %error, "redis connection lost, trying again");
                tokio::time::sleep(Duration::from_millis(*pause)).await;
                Ok(())
            }
            _ => Err(self.unreachable(error)),
        }
    }

    pub(super) fn unreachable(&self, error: io::Error) -> Error {
        if let Some(fault) = tls::fault(&error) {
            let hint = match tls::is_certificate(fault) {
                true => {
                    "Set tls_ca to the certificate (PEM) of the authority that signed the server's, and use the host \
                         name that is in it."
                }
                false => "Check that the port speaks TLS, or write the url with redis://.",
            };
            let message = format!("no TLS connection to redis at {}: {fault}", self.shown);
            return Error::external(message).hint(hint);
        }
        let text = error.to_string();
        let (what, hint) = match error.kind() {
            io::ErrorKind::PermissionDenied
                if text.starts_with("NOPERM") || Fault::of(&text) == Fault::Unfit =>
            {
                return self.refused(&text);
            }
            io::ErrorKind::PermissionDenied => {
                let hint =
                    "Check user, password and database: the options user and password, or those in the url.";
                let message = format!("redis at {} refused the log-in: {text}", self.shown);
                return Error::external(message).hint(hint).lasting();
            }
            io::ErrorKind::InvalidData => {
                ("answers something else", "Check that the url is that of a Redis server.")
            }
            io::ErrorKind::ResourceBusy => ("is not ready", waits_for(&text)),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset if self.address.tls.is_none() => {
                ("does not answer", "If the server speaks TLS on this port, write the url with rediss://.")
            }
            io::ErrorKind::TimedOut if self.address.tls.is_some() => {
                ("does not answer", "If the server speaks no TLS on this port, write the url with redis://.")
            }
            _ => ("does not answer", "Start the server, or set the option url to where it runs."),
        };
        Error::external(format!("redis at {} {what}", self.shown)).hint(hint).because(error)
    }

    /// One command, on a new connection if one that was kept is dead.
    pub(super) async fn ask_once<A: AsRef<[u8]>>(&self, arguments: &[A]) -> io::Result<Reply> {
        let kept = self.idle().pop();
        if let Some(mut lane) = kept
            && let Ok(reply) = lane.wire.ask(arguments).await
        {
            self.put_back(lane);
            return Ok(reply);
        }
        let mut lane = self.open().await?;
        let reply = lane.wire.ask(arguments).await?;
        self.put_back(lane);
        Ok(reply)
    }

    /// One command that may be repeated without harm.
    pub(super) async fn ask<A: AsRef<[u8]>>(&self, arguments: &[A]) -> Result<Reply> {
        for attempt in 0.. {
            let asked = async {
                let mut lane = self.lane().await?;
                let reply = lane.wire.ask(arguments).await?;
                match reply {
                    Reply::Error(error) if Fault::of(&error) == Fault::Passing => {
                        Err(io::Error::new(io::ErrorKind::ResourceBusy, error))
                    }
                    reply => {
                        self.put_back(lane);
                        Ok(reply)
                    }
                }
            };
            match asked.await {
                Ok(Reply::Error(error)) => return Err(self.refused(&error)),
                Ok(reply) => return Ok(reply),
                Err(error) => self.ride_out(attempt, error).await?,
            }
        }
        Err(Error::internal("redis was asked without end"))
    }

    pub(super) fn refused(&self, error: &str) -> Error {
        let message = format!("redis at {} refused a command: {error}", self.shown);
        match Fault::of(error) {
            Fault::Denied => self.forbidden(error),
            Fault::Cluster => self.of_a_cluster(error),
            Fault::WrongType => {
                let hint = format!(
                    "Another program keeps keys of another type under {}*: delete them, or choose another prefix.",
                    self.prefix
                );
                Error::external(message).hint(hint).lasting()
            }
            Fault::Unfit => {
                let hint = "Use a Redis server (5 or newer), or one that is like it, with scripts.";
                Error::external(message).hint(hint).lasting()
            }
            Fault::Passing | Fault::Full | Fault::Other => Error::external(message).hint(waits_for(error)),
        }
    }

    fn of_a_cluster(&self, what: &str) -> Error {
        Error::external(format!("redis at {} cannot be used: {what}", self.shown))
            .hint("It is a node of a Redis Cluster by now: start again.")
            .lasting()
    }

    /// The user lacks a right.
    fn forbidden(&self, what: &str) -> Error {
        let rights = match self.writes {
            true => "+ping +hget +hgetall +eval +evalsha +script|load +hset +hdel +del +persist +pexpireat",
            false => "+ping +scan +hmget",
        };
        let more = if self.clustered { " +cluster|slots +asking" } else { "" };
        let books = if self.writes { format!(" ~{BOOK_PREFIX}*}}") } else { String::new() };
        Error::external(format!("redis at {} refuses its user: {what}", self.shown))
            .hint(format!(
                "Grant the rights (ACL SETUSER … ~{}*{books} {rights}{more}), or use another user.",
                self.prefix
            ))
            .lasting()
    }

    /// What the answer to [`script::PROBE`] says.
    ///
    /// # Errors
    /// External and lasting: the user may not do what a flush does.
    pub(super) fn check_rights(&self, reply: &Reply) -> Result<()> {
        match reply.text() {
            Some("") => Ok(()),
            Some(command) => {
                Err(self.forbidden(&format!("no right to {command} on {}* and its bookkeeping", self.prefix)))
            }
            None => Err(self.odd()),
        }
    }

    /// What the answer to a script call means. `again`: its flush was sent before, so a call that the server already has
    /// is ours.
    pub(super) fn verdict(&self, reply: &Reply, flush: &str, again: bool) -> Result<Flushed, Failure> {
        let (word, detail) = match reply {
            Reply::Array(parts) => {
                match (parts.first().and_then(Reply::text), parts.get(1).and_then(Reply::text)) {
                    (Some(word), Some(detail)) => (word, detail),
                    _ => return Err(Failure::Final(self.odd())),
                }
            }
            Reply::Error(error) if Fault::of(error) == Fault::Passing => {
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, error.as_str()).into());
            }
            Reply::Error(error) => return Err(Failure::Final(self.refused(error))),
            _ => return Err(Failure::Final(self.odd())),
        };
        match word {
            "DONE" => Ok(Flushed::Done),
            "STALE" if again && detail.starts_with(flush) => Ok(Flushed::Done),
            "STALE" => Ok(Flushed::Stale),
            "LOST" => Ok(Flushed::FenceLost),
            "FENCED" => {
                let by = detail.parse().map_err(|_| Failure::Final(self.odd()))?;
                Ok(Flushed::Fenced { by })
            }
            // The call before it was not run: the server forgot the script in between.
            "GAP" => Err(io::Error::new(io::ErrorKind::Interrupted, "a script call was not run").into()),
            _ => Err(Failure::Final(self.odd())),
        }
    }

    pub(super) fn odd(&self) -> Error {
        Error::external(format!("redis at {} gave an answer of an unknown form", self.shown))
    }
}

/// What an error answer that need not last waits for.
fn waits_for(error: &str) -> &'static str {
    let has = |word: &str| error.contains(word);
    if has("OOM") {
        "Raise maxmemory of the server, or set a shorter ttl; what waits is written then."
    } else if has("READONLY") || has("MASTERDOWN") {
        "The server is a replica: point url at the one that takes writes, or promote it."
    } else if has("MISCONF") {
        "The server cannot save to its disk: see its log."
    } else if has("max number of clients") {
        "Raise maxclients of the server."
    } else {
        "See the server's log."
    }
}

/// A pipeline's sink in a single Redis.
pub(super) struct RedisStore {
    pool: Pool,
    layout: Layout,
    book: String,
    /// By shard, the number of the last call that the server acknowledged since the fence was raised.
    acknowledged: Mutex<HashMap<u32, String>>,
}

impl RedisStore {
    /// `name`: `<pipeline>/<sink>`.
    ///
    /// # Errors
    /// External: the server refuses the user.
    pub(super) async fn open(pool: Pool, layout: Layout, name: &str) -> Result<Self> {
        let book = format!("{BOOK_PREFIX}{name}}}");
        let key = [&layout.prefix, script::PROBE_KEY.as_bytes()].concat();
        let words = [b"EVAL".as_slice(), script::PROBE.as_bytes(), b"2", book.as_bytes(), &key];
        pool.check_rights(&pool.ask(&words).await?)?;
        Ok(Self { pool, layout, book, acknowledged: Mutex::default() })
    }

    /// Sends all calls of a flush on one connection and reads their answers. The next call is encoded while the
    /// server works on the ones before.
    async fn attempt(
        &self,
        lane: &mut Lane,
        flush: &str,
        guard: [&str; 3],
        write: &OnlineWrite,
        consumed: &Positions,
    ) -> Result<Vec<Reply>, Failure> {
        let none = Positions::default();
        let (mut calls, mut row, mut delete) = (0, 0, 0);
        let deletes = write.deletes.as_ref().map_or(0, RecordBatch::num_rows);
        crash::point("redis.flush.before");
        loop {
            let rows = KEYS_PER_CALL.min(write.rows.num_rows() - row);
            let gone = (KEYS_PER_CALL - rows).min(deletes - delete);
            let last = row + rows == write.rows.num_rows() && delete + gone == deletes;
            let number = script::call_text(flush, calls + 1);
            let before = if calls == 0 { String::new() } else { script::call_text(flush, calls) };
            // The first call looks whether the server remembers the flush before.
            let known = if calls == 0 { guard[2] } else { "" };
            let expire_at_ms = write.expire_at_ms.as_ref().map(|expiry| expiry.slice(row, rows));
            let deletes = write.deletes.as_ref().filter(|_| gone > 0).map(|batch| batch.slice(delete, gone));
            let rows_of_call = write.rows.slice(row, rows);
            lane.encoder.fill(&self.layout, &rows_of_call, deletes.as_ref()).map_err(Failure::Final)?;
            let (with_key, gone_with_key) = lane.encoder.all();
            let call = Call {
                book: self.book.as_bytes(),
                guard: [guard[0], guard[1], &number, &before, known].map(str::as_bytes),
                rows: with_key,
                deletes: gone_with_key,
                expire_at_ms: expire_at_ms.as_ref(),
                // With the first call: a kill between two leaves rows that a replay must not go behind.
                consumed: if calls == 0 { consumed } else { &none },
            };
            lane.buffer.clear();
            lane.encoder.call(&mut lane.buffer, &self.layout, &call);
            lane.wire.send(&lane.buffer).await?;
            (calls, row, delete) = (calls + 1, row + rows, delete + gone);
            if last {
                break;
            }
            crash::point("redis.flush.between");
        }
        let mut replies = Vec::with_capacity(calls);
        for _ in 0..calls {
            replies.push(lane.wire.reply().await?);
        }
        crash::point("redis.flush.after");
        Ok(replies)
    }

    fn acknowledged(&self) -> std::sync::MutexGuard<'_, HashMap<u32, String>> {
        self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn verdict(&self, replies: &[Reply], flush: &str, again: bool) -> Result<Flushed, Failure> {
        for reply in replies {
            let flushed = self.pool.verdict(reply, flush, again)?;
            if flushed != Flushed::Done {
                return Ok(flushed);
            }
        }
        Ok(Flushed::Done)
    }
}

#[async_trait]
impl OnlineStore for RedisStore {
    async fn open(&self) -> Result<OnlineState> {
        let Reply::Array(items) = self.pool.ask(&["HGETALL", &self.book]).await? else {
            return Err(self.pool.odd());
        };
        let mut state = OnlineState::default();
        for pair in items.chunks_exact(2) {
            let (Some(field), Some(value)) = (pair[0].text(), pair[1].text()) else { continue };
            if field == "fence" {
                state.fence = value.parse().map_err(|_| self.pool.odd())?;
            } else if let Some((shard, flush)) = script::parse_flush(field, value) {
                state.flushed.insert(shard, flush);
            } else if let Some(place) = script::parse_offset_field(field) {
                state.consumed.raise(place, value.parse().map_err(|_| self.pool.odd())?);
            }
        }
        Ok(state)
    }

    async fn raise_fence(&self, generation: u64) -> Result<u64> {
        self.acknowledged().clear();
        let fence = script::fence_text(generation);
        let reply = self.pool.ask(&["EVAL", script::RAISE, "1", &self.book, &fence]).await?;
        reply.text().and_then(|fence| fence.parse().ok()).ok_or_else(|| self.pool.odd())
    }

    async fn flush(
        &self,
        generation: u64,
        shard: u32,
        number: u64,
        write: &OnlineWrite,
        consumed: &Positions,
    ) -> Result<Flushed> {
        if write.rows.num_columns() != self.layout.field_count {
            return Err(Error::internal("a flush has other columns than its Redis sink"));
        }
        let flush = script::flush_text(generation, number);
        let known = self.acknowledged().get(&shard).cloned().unwrap_or_default();
        let guard = [script::fence_text(generation), script::shard_field(shard), known];
        let guard = [guard[0].as_str(), &guard[1], &guard[2]];
        for attempt in 0.. {
            let tried = async {
                let mut lane = self.pool.lane().await?;
                let replies = self.attempt(&mut lane, &flush, guard, write, consumed).await?;
                let flushed = self.verdict(&replies, &flush, attempt > 0)?;
                self.pool.put_back(lane);
                Ok((flushed, replies.len()))
            };
            match tried.await {
                Ok((flushed, calls)) => {
                    if flushed == Flushed::Done {
                        self.acknowledged().insert(shard, script::call_text(&flush, calls));
                    }
                    return Ok(flushed);
                }
                Err(Failure::Network(error)) => self.pool.ride_out(attempt, error).await?,
                Err(Failure::Final(error)) => return Err(error),
            }
        }
        Err(Error::internal("a redis flush was tried without end"))
    }
}
