//! Commands for the slots of a Redis Cluster: which node has a slot, what goes where, what a node sends elsewhere.
//!
//! The map of slots comes from `CLUSTER SLOTS`, of whichever node answers first, and is asked for again when a node says
//! MOVED, after a failure, and when it is old. Commands for one node go out in one pipeline, those for several at the same
//! time. A command that a node answers with MOVED or ASK was not run; it goes to the node that the answer names. What a
//! slot does not take while it moves (TRYAGAIN) is the caller's to repeat.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{join_all, select_ok};

use super::RedisConfig;
use super::encode::command;
use super::fault::Fault;
use super::slots::SLOTS;
use super::store::{Failure, Pool};
use super::wire::Reply;
use crate::error::{Error, Result};
use crate::stream::clock::Clock;
use crate::stream::crash;

/// How often one command is sent elsewhere.
const REDIRECTS: usize = 5;
/// After that the map is asked for again though nothing says that it changed.
const OLD: Duration = Duration::from_secs(1);
/// Of a slot that no node has.
const NOBODY: u16 = u16::MAX;

/// Commands, each for one slot.
#[derive(Debug, Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// Slot and bytes.
    commands: Vec<(u16, Range<usize>)>,
}

impl Batch {
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.commands.clear();
    }

    /// Adds what `write` appends.
    pub(super) fn push(&mut self, slot: u16, write: impl FnOnce(&mut Vec<u8>)) {
        let from = self.bytes.len();
        write(&mut self.bytes);
        self.commands.push((slot, from..self.bytes.len()));
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = u16> {
        self.commands.iter().map(|(slot, _)| *slot)
    }

    /// The same command for every slot, with the slot's book in the place of the key.
    pub(super) fn of_books(books: &[String], write: impl Fn(&mut Vec<u8>, &str)) -> Self {
        let mut batch = Self::default();
        for (slot, book) in books.iter().enumerate() {
            batch.push(slot as u16, |out| write(out, book));
        }
        batch
    }
}

/// Why commands came to nothing: a node's connection, or for good.
pub(super) struct Trouble {
    pub(super) node: Arc<Pool>,
    pub(super) failure: Failure,
}

/// Which node has which slot.
pub(super) struct Map {
    nodes: Vec<Arc<Pool>>,
    /// By slot, the index of its node.
    slots: Vec<u16>,
    /// By node; each has slots.
    lowest: Vec<u16>,
}

impl Map {
    /// The index of a slot's node.
    pub(super) fn place(&self, slot: u16) -> Option<usize> {
        self.slots.get(usize::from(slot)).copied().filter(|at| *at != NOBODY).map(usize::from)
    }

    pub(super) fn nodes(&self) -> &[Arc<Pool>] {
        &self.nodes
    }

    /// One slot of each node: one of `kept` if it has one, else its lowest.
    pub(super) fn anchors(&self, kept: impl Iterator<Item = u16>) -> Vec<u16> {
        let mut anchors = self.lowest.clone();
        for slot in kept {
            if let Some(at) = self.place(slot) {
                anchors[at] = slot;
            }
        }
        anchors
    }

    /// Whether another map has all nodes of this one.
    pub(super) fn nodes_are_in(&self, other: &Self) -> bool {
        self.nodes.iter().all(|node| other.nodes.iter().any(|kept| Arc::ptr_eq(kept, node)))
    }

    fn same(&self, other: &Self) -> bool {
        let nodes = || self.nodes.iter().zip(&other.nodes);
        self.slots == other.slots
            && self.nodes.len() == other.nodes.len()
            && nodes().all(|(one, other)| Arc::ptr_eq(one, other))
    }
}

pub(super) struct Cluster {
    config: RedisConfig,
    writes: bool,
    /// The server that the url names.
    pub(super) seed: Arc<Pool>,
    known: Mutex<Known>,
}

struct Known {
    map: Arc<Map>,
    looked: Instant,
    /// By address; kept over changes of the map.
    nodes: HashMap<String, Arc<Pool>>,
}

/// A command on its way, and whether its node only imports the slot.
struct Step {
    command: usize,
    node: Arc<Pool>,
    asking: bool,
}

impl Cluster {
    /// # Errors
    /// External: no node answers, or it refuses the user.
    pub(super) async fn open(config: &RedisConfig, mut seed: Pool, writes: bool) -> Result<Self> {
        seed.clustered = true;
        let seed = Arc::new(seed);
        let map = Arc::new(Map { nodes: Vec::new(), slots: vec![NOBODY; SLOTS], lowest: Vec::new() });
        let known = Mutex::new(Known { map, looked: Clock.instant(), nodes: HashMap::new() });
        let cluster = Self { config: config.clone(), writes, seed, known };
        let map = cluster.refresh().await?;
        match map.slots.iter().filter(|at| **at == NOBODY).count() {
            0 => Ok(cluster),
            homeless => Err(cluster.homeless(homeless)),
        }
    }

    fn homeless(&self, slots: usize) -> Error {
        Error::external(format!(
            "redis at {}: {slots} slots of the cluster have no node",
            self.config.shown_url()
        ))
        .hint("See redis-cli --cluster check: every slot needs a node.")
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn map(&self) -> Arc<Map> {
        Arc::clone(&self.known().map)
    }

    /// Asks for the map if that was a while ago.
    ///
    /// # Errors
    /// As [`Cluster::refresh`].
    pub(super) async fn keep_up(&self) -> Result<()> {
        let looked = self.known().looked;
        if Clock.instant().saturating_duration_since(looked) > OLD {
            self.refresh().await?;
        }
        Ok(())
    }

    /// Asks all nodes, and the server of the url, for the map; the first answer counts.
    ///
    /// # Errors
    /// External: nobody answers, or the user may not ask.
    pub(super) async fn refresh(&self) -> Result<Arc<Map>> {
        let mut pools: Vec<Arc<Pool>> = self.known().nodes.values().map(Arc::clone).collect();
        pools.push(Arc::clone(&self.seed));
        let asked = pools.into_iter().map(|pool| {
            async move {
                let reply = pool.ask_once(&["CLUSTER", "SLOTS"]).await?;
                Ok::<_, io::Error>((pool, reply))
            }
            .boxed()
        });
        let ((pool, reply), _) = select_ok(asked).await.map_err(|error| self.seed.unreachable(error))?;
        let ranges = match &reply {
            Reply::Error(error) => return Err(pool.refused(error)),
            reply => ranges(reply).ok_or_else(|| pool.odd())?,
        };
        let (mut nodes, mut slots) = (Vec::<Arc<Pool>>::new(), vec![NOBODY; SLOTS]);
        for (range, host, port) in ranges {
            let node = self.node(&pool, host, port)?;
            let at = nodes.iter().position(|other| Arc::ptr_eq(other, &node)).unwrap_or_else(|| {
                nodes.push(node);
                nodes.len() - 1
            });
            slots[range].fill(at as u16);
        }
        let lowest = |at| slots.iter().position(|slot| usize::from(*slot) == at).unwrap_or_default() as u16;
        let map = Map { lowest: (0..nodes.len()).map(lowest).collect(), nodes, slots };
        let mut known = self.known();
        known.looked = Clock.instant();
        if !known.map.same(&map) {
            known.map = Arc::new(map);
            let map = Arc::clone(&known.map);
            known.nodes.retain(|_, node| map.nodes.iter().any(|kept| Arc::ptr_eq(kept, node)));
        }
        Ok(Arc::clone(&known.map))
    }

    /// A node as another one names it; without a host it is on that one's.
    fn node(&self, told_by: &Pool, host: &str, port: u16) -> Result<Arc<Pool>> {
        let host = if host.is_empty() || host == "?" { told_by.host().unwrap_or_default() } else { host };
        let mut known = self.known();
        let address = format!("{host}:{port}");
        if let Some(node) = known.nodes.get(&address) {
            return Ok(Arc::clone(node));
        }
        let mut pool = Pool::new(&self.config.at(host, port)?, self.writes)?;
        pool.clustered = true;
        let node = Arc::new(pool);
        known.nodes.insert(address, Arc::clone(&node));
        Ok(node)
    }

    /// Sends every command to its slot's node; the answers in the order of the commands. None of them is MOVED.
    pub(super) async fn run(&self, batch: &Batch) -> Result<Vec<Reply>, Trouble> {
        let map = self.map();
        let mut replies = vec![Reply::Null; batch.commands.len()];
        let mut steps = Vec::with_capacity(batch.commands.len());
        for (command, (slot, _)) in batch.commands.iter().enumerate() {
            let Some(at) = map.place(*slot) else {
                return Err(self.in_motion("CLUSTERDOWN a slot of the cluster has no node"));
            };
            steps.push(Step { command, node: Arc::clone(&map.nodes[at]), asking: false });
        }
        for _ in 0..=REDIRECTS {
            steps = self.round(batch, steps, &mut replies).await?;
            if steps.is_empty() {
                return Ok(replies);
            }
        }
        Err(self.in_motion("slots of the cluster keep moving"))
    }

    pub(super) fn in_motion(&self, what: &str) -> Trouble {
        let failure = Failure::Network(io::Error::new(io::ErrorKind::ResourceBusy, what));
        Trouble { node: Arc::clone(&self.seed), failure }
    }

    /// What an error among the answers comes to.
    pub(super) fn fault(&self, reply: &Reply) -> Option<Trouble> {
        let Reply::Error(error) = reply else { return None };
        match Fault::of(error) {
            Fault::Passing => return Some(self.in_motion(error)),
            Fault::WrongType => return None,
            _ => {}
        }
        Some(Trouble { node: Arc::clone(&self.seed), failure: Failure::Final(self.seed.refused(error)) })
    }

    /// Sends commands, and tells those that are to be sent elsewhere.
    async fn round(
        &self,
        batch: &Batch,
        steps: Vec<Step>,
        replies: &mut [Reply],
    ) -> Result<Vec<Step>, Trouble> {
        let mut talks: Vec<(Arc<Pool>, Vec<Step>)> = Vec::new();
        for step in steps {
            match talks.iter_mut().find(|(node, _)| Arc::ptr_eq(node, &step.node)) {
                Some((_, steps)) => steps.push(step),
                None => talks.push((Arc::clone(&step.node), vec![step])),
            }
        }
        let answers = join_all(talks.iter().map(|(node, steps)| talk(node, batch, steps))).await;
        let (mut again, mut moved, mut trouble) = (Vec::new(), false, None);
        for ((node, steps), answers) in talks.into_iter().zip(answers) {
            let answers = match answers {
                Ok(answers) => answers,
                Err(error) => {
                    trouble.get_or_insert(Trouble { node, failure: Failure::Network(error) });
                    continue;
                }
            };
            for (step, reply) in steps.into_iter().zip(answers) {
                let Some((asking, host, port)) = elsewhere(&reply) else {
                    replies[step.command] = reply;
                    continue;
                };
                moved |= !asking;
                match self.node(&node, host, port) {
                    Ok(node) => again.push(Step { command: step.command, node, asking }),
                    Err(error) => {
                        let node = Arc::clone(&node);
                        trouble.get_or_insert(Trouble { node, failure: Failure::Final(error) });
                    }
                }
            }
        }
        if moved && let Err(error) = self.refresh().await {
            tracing::debug!(%error, "the map of a cluster's slots is not known");
        }
        trouble.map_or(Ok(again), Err)
    }

    /// Commands that may be repeated without harm. Among the answers are errors of a key's type.
    ///
    /// # Errors
    /// External: a node does not answer, or refuses.
    pub(super) async fn ask(&self, batch: &Batch) -> Result<Vec<Reply>> {
        for attempt in 0.. {
            let trouble = match self.run(batch).await {
                Ok(replies) => match replies.iter().find_map(|reply| self.fault(reply)) {
                    None => return Ok(replies),
                    Some(trouble) => trouble,
                },
                Err(trouble) => trouble,
            };
            self.ride_out(attempt, trouble).await?;
        }
        Err(Error::internal("a redis cluster was asked without end"))
    }

    /// As [`Pool::ride_out`]; the next attempt begins with new connections and the map as it is then.
    ///
    /// # Errors
    /// External: that was the last attempt, or there is no use in another one.
    pub(super) async fn ride_out(&self, attempt: usize, trouble: Trouble) -> Result<()> {
        match trouble.failure {
            Failure::Network(error) => trouble.node.ride_out(attempt, error).await?,
            Failure::Final(error) => return Err(error),
        }
        self.start_over().await
    }

    /// After a failure: new connections everywhere, and the map as it is now.
    ///
    /// # Errors
    /// Final: the user may no longer ask.
    async fn start_over(&self) -> Result<()> {
        self.map().nodes.iter().for_each(|node| node.forget());
        match self.refresh().await {
            Err(error) if error.is_lasting() => Err(error),
            // The next try says what is wrong.
            _ => Ok(()),
        }
    }
}

/// One node's commands over one connection.
async fn talk(node: &Pool, batch: &Batch, steps: &[Step]) -> io::Result<Vec<Reply>> {
    let mut lane = node.lane().await?;
    lane.buffer.clear();
    for step in steps {
        if step.asking {
            command(&mut lane.buffer, &["ASKING"]);
        }
        lane.buffer.extend_from_slice(&batch.bytes[batch.commands[step.command].1.clone()]);
    }
    lane.wire.send(&lane.buffer).await?;
    crash::point("redis.flush.between");
    let mut replies = Vec::with_capacity(steps.len());
    for step in steps {
        if step.asking {
            lane.wire.reply().await?;
        }
        replies.push(lane.wire.reply().await?);
    }
    // A server that forgot the script is told it again on a new connection.
    let sound = |reply: &Reply| !matches!(reply, Reply::Error(error) if Fault::of(error) == Fault::Passing);
    if replies.iter().all(sound) {
        node.put_back(lane);
    }
    Ok(replies)
}

/// Where a command is to be sent instead, and whether for this time only.
fn elsewhere(reply: &Reply) -> Option<(bool, &str, u16)> {
    let Reply::Error(error) = reply else { return None };
    let mut words = error.split(' ');
    let asking = match words.next()? {
        "MOVED" => false,
        "ASK" => true,
        _ => return None,
    };
    let (host, port) = words.nth(1)?.rsplit_once(':')?;
    Some((asking, host.trim_start_matches('[').trim_end_matches(']'), port.parse().ok()?))
}

/// The ranges of slots in the answer to `CLUSTER SLOTS`, and the master of each.
fn ranges(reply: &Reply) -> Option<Vec<(Range<usize>, &str, u16)>> {
    let Reply::Array(ranges) = reply else { return None };
    ranges.iter().map(range).collect()
}

fn range(reply: &Reply) -> Option<(Range<usize>, &str, u16)> {
    let Reply::Array(parts) = reply else { return None };
    let [Reply::Integer(from), Reply::Integer(to), Reply::Array(master), ..] = parts.as_slice() else {
        return None;
    };
    let (host, Some(Reply::Integer(port))) = (master.first()?.text(), master.get(1)) else { return None };
    let (from, to) = (usize::try_from(*from).ok()?, usize::try_from(*to).ok()?);
    let port = u16::try_from(*port).ok()?;
    (from <= to && to < SLOTS).then(|| (from..to + 1, host.unwrap_or_default(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_send_elsewhere_are_understood() {
        let error = |text: &str| {
            elsewhere(&Reply::Error(text.to_owned()))
                .map(|(asking, host, port)| (asking, host.to_owned(), port))
        };
        let to = |asking, host: &str, port| Some((asking, host.to_owned(), port));
        assert_eq!(error("MOVED 3999 127.0.0.1:6381"), to(false, "127.0.0.1", 6381));
        assert_eq!(error("ASK 3999 redis-2.local:6381"), to(true, "redis-2.local", 6381));
        assert_eq!(error("MOVED 3999 :6381"), to(false, "", 6381));
        assert_eq!(error("MOVED 3999 ::1:6381"), to(false, "::1", 6381));
        for other in
            ["TRYAGAIN Multiple keys request during rehashing of slot", "MOVED", "MOVED 1 x", "ASK 1 h:y"]
        {
            assert_eq!(error(other), None, "{other}");
        }
        assert_eq!(elsewhere(&Reply::Integer(1)), None);
    }

    #[test]
    fn ranges_of_slots_are_read_or_refused() {
        let node =
            |host: Reply, port| Reply::Array(vec![host, Reply::Integer(port), Reply::Bulk(b"id".to_vec())]);
        let of = |from, to, host, port| {
            Reply::Array(vec![
                Reply::Integer(from),
                Reply::Integer(to),
                node(host, port),
                node(Reply::Null, 9),
            ])
        };
        let named = |name: &str| Reply::Bulk(name.as_bytes().to_vec());
        let reply = Reply::Array(vec![of(0, 5_460, named("a"), 1), of(5_461, 16_383, Reply::Null, 2)]);
        assert_eq!(ranges(&reply), Some(vec![(0..5_461, "a", 1), (5_461..16_384, "", 2)]));
        for odd in
            [of(0, 16_384, named("a"), 1), of(2, 1, named("a"), 1), of(0, 1, named("a"), 70_000), Reply::Null]
        {
            assert_eq!(ranges(&Reply::Array(vec![odd])), None);
        }
        assert_eq!(ranges(&Reply::Null), None);
    }
}
