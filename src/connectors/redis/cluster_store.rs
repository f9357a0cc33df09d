//! [`ClusterStore`]: the [`OnlineStore`] over a Redis Cluster.
//!
//! # What is where
//! A script may touch one slot only, so every slot has a bookkeeping hash of its own ([`books`](super::slots::books)) with
//! fence and flush numbers. The key of a row has the name that it has in a single Redis; a row is written by a script call
//! for its slot, which checks the fence in the same slot: whoever raised that is obeyed wherever the slot is. Calls go to
//! their nodes in pipelines. Each flush also writes a *seal* at every node, in the bookkeeping hash of one of its slots,
//! the *anchor*:
//!
//! | step | what is sent | why |
//! |---|---|---|
//! | 1 | to every anchor: the open seal of the flush, and the offsets | no row is shown beyond offsets that the store holds; no single node's loss takes them away |
//! | 2 | rows, by slot | |
//! | 3 | to every anchor: the closed seal | whoever has it has everything of the flush |
//!
//! Each step is acknowledged before the next one begins; what fails is sent again, as in a single Redis, and so is a flush
//! during which another node took the place of one.
//!
//! # What a node has lost
//! A node that was set back to an older copy (restarted from its last snapshot, a replica that was promoted) lacks an end
//! of what it was sent. So it has everything that was acknowledged if it has the last seal: step 1 looks for that, an epoch
//! without rows does too, and a start compares the seals of all nodes with what the manifest knows. A node that was emptied
//! has no fence. In either case every key of the sink is written again, also in the slots that nobody writes any more; the
//! offsets that the other nodes hold keep newer values there from being replaced by older ones. A node that joins while no
//! process runs has no seal, and counts as one that lost it.
//!
//! # Slots that move
//! A bookkeeping hash moves like any key. A call names all its keys, so that a node runs it only if it has all of them;
//! while some are here and some there it answers TRYAGAIN and is asked again. A slot that comes to a node which dies before
//! its replica has it is noticed if its bookkeeping hash is gone with it and a row of it is written.
//!
//! # What is not kept
//! While a node does not answer nothing is written to the others either: step 1 needs all of them.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::RedisConfig;
use super::cluster::{Batch, Cluster, Map, Trouble};
use super::encode::{Call, Encoder, Layout, command};
use super::script::{self, KEYS_PER_CALL};
use super::slots::{SLOTS, books, slot_of};
use super::store::Pool;
use super::wire::Reply;
use crate::connectors::{Flushed, OnlineState, OnlineStore, OnlineWrite};
use crate::error::{Error, Result};
use crate::stream::{Positions, crash};

/// The call of an open seal; those of closed ones are higher.
const OPEN: usize = 0;
/// Seals of one flush while nodes come and go.
const SEALS: usize = 5;

/// A pipeline's sink in a Redis Cluster.
pub(super) struct ClusterStore {
    cluster: Cluster,
    layout: Layout,
    /// By slot.
    books: Vec<String>,
    /// By shard, since the fence was raised.
    shards: Mutex<HashMap<u32, Arc<tokio::sync::Mutex<Shard>>>>,
}

/// What the cluster acknowledged of a shard, and the buffers of its flushes.
#[derive(Default)]
struct Shard {
    /// By slot, the newest flush that wrote to it; 0 is none.
    written: Vec<u64>,
    /// By anchor, the newest flush that it has a closed seal of.
    sealed: HashMap<u16, u64>,
    encoder: Encoder,
    rows: Batch,
    seals: Batch,
}

/// A flush on its way.
struct Flight<'a> {
    generation: u64,
    shard: u32,
    number: u64,
    fence: &'a str,
    /// What the numbers of its calls begin with.
    flush: &'a str,
    consumed: &'a Positions,
    /// Closed seals so far: each is a write of its own.
    closings: usize,
    /// When its seals were opened.
    opened: Arc<Map>,
    /// It was sent before.
    again: bool,
}

impl ClusterStore {
    /// `name`: `<pipeline>/<sink>`.
    ///
    /// # Errors
    /// External: a node is missing, or it refuses the user.
    pub(super) async fn open(config: &RedisConfig, seed: Pool, layout: Layout, name: &str) -> Result<Self> {
        let cluster = Cluster::open(config, seed, true).await?;
        let store = Self { cluster, layout, books: books(name), shards: Mutex::default() };
        let key = [&store.layout.prefix, script::PROBE_KEY.as_bytes()].concat();
        let slot = slot_of(&key);
        let book = store.books[usize::from(slot)].as_bytes();
        let mut batch = Batch::default();
        batch.push(slot, |out| {
            command(out, &[b"EVAL".as_slice(), script::PROBE.as_bytes(), b"2", book, &key])
        });
        for reply in store.cluster.ask(&batch).await? {
            store.cluster.seed.check_rights(&reply)?;
        }
        Ok(store)
    }

    fn shard(&self, shard: u32) -> Arc<tokio::sync::Mutex<Shard>> {
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(shards.entry(shard).or_default())
    }

    /// Encodes the rows of a flush, a call per slot.
    fn encode(&self, flight: &Flight<'_>, shard: &mut Shard, write: &OnlineWrite) -> Result<()> {
        shard.written.resize(SLOTS, 0);
        shard.encoder.fill(&self.layout, &write.rows, write.deletes.as_ref())?;
        shard.rows.clear();
        let field = script::shard_field(flight.shard);
        let (none, mut number, mut before, mut known) =
            (Positions::default(), String::new(), String::new(), String::new());
        let mut last = None;
        let mut call_of_slot = 0;
        for group in shard.encoder.by_slot(&self.layout, KEYS_PER_CALL) {
            let slot = usize::from(group.slot);
            call_of_slot = if last == Some(group.slot) { call_of_slot + 1 } else { 1 };
            [&mut before, &mut known].into_iter().for_each(String::clear);
            if call_of_slot > 1 {
                script::put_call(&mut before, flight.flush, call_of_slot - 1);
            } else if shard.written[slot] > 0 {
                // Whatever its last call was, it is higher than this.
                script::put_flush(&mut known, flight.generation, shard.written[slot]);
            }
            number.clear();
            script::put_call(&mut number, flight.flush, call_of_slot);
            let call = Call {
                book: self.books[slot].as_bytes(),
                guard: [flight.fence, &field, &number, &before, &known].map(str::as_bytes),
                rows: group.rows,
                deletes: group.deletes,
                expire_at_ms: write.expire_at_ms.as_ref(),
                consumed: &none,
            };
            let encoder = &mut shard.encoder;
            shard.rows.push(group.slot, |out| encoder.call(out, &self.layout, &call));
            last = Some(group.slot);
        }
        Ok(())
    }

    /// Writes a seal at every node; again when the nodes have changed meanwhile.
    async fn seal(
        &self,
        flight: &mut Flight<'_>,
        shard: &mut Shard,
        close: bool,
    ) -> Result<Flushed, Trouble> {
        let (field, none) = (script::seal_field(flight.shard), Positions::default());
        for round in 0..SEALS {
            let map = self.cluster.map();
            let anchors = map.anchors(shard.sealed.keys().copied());
            flight.closings += usize::from(close);
            let number = script::call_text(flight.flush, if close { flight.closings } else { OPEN });
            shard.seals.clear();
            shard.encoder.empty();
            for slot in &anchors {
                let known = match shard.sealed.get(slot) {
                    Some(flush) if !close => {
                        script::call_text(&script::flush_text(flight.generation, *flush), OPEN + 1)
                    }
                    _ => String::new(),
                };
                let call = Call {
                    book: self.books[usize::from(*slot)].as_bytes(),
                    guard: [flight.fence, &field, &number, "", &known].map(str::as_bytes),
                    rows: 0..0,
                    deletes: 0..0,
                    expire_at_ms: None,
                    consumed: if close { &none } else { flight.consumed },
                };
                let encoder = &mut shard.encoder;
                shard.seals.push(*slot, |out| encoder.call(out, &self.layout, &call));
            }
            let flushed = self.send(&shard.seals, flight.flush, flight.again || round > 0).await?;
            if flushed != Flushed::Done {
                return Ok(flushed);
            }
            if !Arc::ptr_eq(&map, &self.cluster.map()) {
                continue;
            }
            if !close {
                flight.opened = map;
            } else if flight.opened.nodes_are_in(&map) {
                shard.sealed = anchors.into_iter().map(|slot| (slot, flight.number)).collect();
            } else {
                // What took a node's place may lack rows that the node acknowledged: all of them again.
                return Err(self.cluster.in_motion("a node of the cluster was replaced"));
            }
            return Ok(Flushed::Done);
        }
        Err(self.cluster.in_motion("the nodes of the cluster keep changing"))
    }

    async fn send(&self, batch: &Batch, flush: &str, again: bool) -> Result<Flushed, Trouble> {
        let seed = &self.cluster.seed;
        let mut all = Flushed::Done;
        for reply in self.cluster.run(batch).await? {
            let failed = |failure| Trouble { node: Arc::clone(seed), failure };
            match seed.verdict(&reply, flush, again).map_err(failed)? {
                Flushed::Done => {}
                // The one that ends the pipeline before those that do not.
                Flushed::Fenced { by } => return Ok(Flushed::Fenced { by }),
                other => all = other,
            }
        }
        Ok(all)
    }

    async fn attempt(&self, flight: &mut Flight<'_>, shard: &mut Shard) -> Result<Flushed, Trouble> {
        crash::point("redis.flush.before");
        let opened = self.seal(flight, shard, false).await?;
        if opened != Flushed::Done {
            return Ok(opened);
        }
        let written = self.send(&shard.rows, flight.flush, flight.again).await?;
        if written != Flushed::Done {
            return Ok(written);
        }
        let closed = self.seal(flight, shard, true).await?;
        if closed == Flushed::Done {
            for slot in shard.rows.slots() {
                shard.written[usize::from(slot)] = flight.number;
            }
            crash::point("redis.flush.after");
        }
        Ok(closed)
    }
}

#[async_trait]
impl OnlineStore for ClusterStore {
    /// The lowest fence of all slots, the highest offsets, and what every node has of a shard's flushes.
    async fn open(&self) -> Result<OnlineState> {
        let batch = Batch::of_books(&self.books, |out, book| command(out, &["HGETALL", book]));
        self.cluster.keep_up().await?;
        let replies = self.cluster.ask(&batch).await?;
        let map = self.cluster.map();
        let seed = &self.cluster.seed;
        let mut seals: Vec<BTreeMap<u32, (u64, u64)>> = vec![BTreeMap::new(); map.nodes().len()];
        let mut state = OnlineState { fence: u64::MAX, ..OnlineState::default() };
        for (slot, reply) in replies.iter().enumerate() {
            let Reply::Array(items) = reply else { return Err(seed.odd()) };
            let mut fence = 0;
            for pair in items.chunks_exact(2) {
                let (Some(field), Some(value)) = (pair[0].text(), pair[1].text()) else { continue };
                if field == "fence" {
                    fence = value.parse().map_err(|_| seed.odd())?;
                } else if let Some((shard, flush)) = script::parse_seal(field, value) {
                    let Some(at) = map.place(slot as u16) else { continue };
                    let newest = seals[at].entry(shard).or_default();
                    *newest = flush.max(*newest);
                } else if let Some(place) = script::parse_offset_field(field) {
                    state.consumed.raise(place, value.parse().map_err(|_| seed.odd())?);
                }
            }
            state.fence = state.fence.min(fence);
        }
        let shards: Vec<u32> = seals.iter().flat_map(BTreeMap::keys).copied().collect();
        for shard in shards {
            let of_nodes: Option<Vec<_>> = seals.iter().map(|seals| seals.get(&shard).copied()).collect();
            if let Some(flush) = of_nodes.and_then(|flushes| flushes.into_iter().min()) {
                state.flushed.insert(shard, flush);
            }
        }
        Ok(state)
    }

    async fn raise_fence(&self, generation: u64) -> Result<u64> {
        self.shards.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let fence = script::fence_text(generation);
        let batch = Batch::of_books(&self.books, |out, book| {
            command(out, &["EVAL", script::RAISE, "1", book, &fence])
        });
        let mut highest = 0;
        for reply in self.cluster.ask(&batch).await? {
            let fence = reply.text().and_then(|fence| fence.parse().ok());
            highest = highest.max(fence.ok_or_else(|| self.cluster.seed.odd())?);
        }
        Ok(highest)
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
        let of_shard = self.shard(shard);
        let mut of_shard = of_shard.lock().await;
        let (fence, flush) = (script::fence_text(generation), script::flush_text(generation, number));
        let (fence, flush) = (fence.as_str(), flush.as_str());
        // A node that is new to the cluster is sealed too.
        if let Err(error) = self.cluster.keep_up().await
            && error.is_lasting()
        {
            return Err(error);
        }
        let (opened, closings, again) = (self.cluster.map(), 0, false);
        let mut flight =
            Flight { generation, shard, number, fence, flush, consumed, closings, opened, again };
        self.encode(&flight, &mut of_shard, write)?;
        for attempt in 0.. {
            match self.attempt(&mut flight, &mut of_shard).await {
                Ok(flushed) => return Ok(flushed),
                Err(trouble) => self.cluster.ride_out(attempt, trouble).await?,
            }
            flight.again = true;
        }
        Err(Error::internal("a redis flush was tried without end"))
    }
}
