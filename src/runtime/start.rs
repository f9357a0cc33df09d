//! The start of a pipeline: look, claim, replay, restore. Nothing is written before the claim.
//!
//! Order (DESIGN §5): reach every outside system; claim by a manifest with a new generation; create missing tables in
//! commits of their own; replay the last manifest's prepared commits unchanged, or make them again (`remake`); look at the
//! online stores' fences, raise them and read how far they had seen; decide where reading begins, in the topic or in its
//! history ([`history`]); restore operators. Then tasks are spawned.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::RecordBatch;

use crate::connectors::file_source::FileSource;
use crate::connectors::memory::MemoryStore;
use crate::connectors::{OnlineState, OnlineStore, PartitionInfo, SourceConnector, files};
use crate::error::{Error, Result};
use crate::plan::{NodeId, OnlineKind, SinkKind, SourceKind, SourcePlan, StreamPlan};
use crate::runtime::RunOptions;
use crate::runtime::again::Decided;
use crate::runtime::changes::{self, Unlike};
use crate::runtime::flushed::set_back;
use crate::runtime::history::{self, Bootstrap};
use crate::runtime::lookups::{self, Digests, Lookups};
#[cfg(feature = "delta")]
use crate::runtime::remake::Past;
use crate::runtime::staged;

use crate::runtime::tables::Tables;
use crate::state::files::decode;
use crate::state::keys::groups_of;
use crate::state::manifest::{Manifest, SourceProgress, StateFile};
use crate::state::store::{self, StateStore};
use crate::stream::clock::Clock;
use crate::stream::{Place, Positions, crash};

/// Everything outside that a pipeline talks to, reached and claimed.
pub struct World {
    pub store: Arc<StateStore>,
    pub manifest: Manifest,
    /// Epoch of our claim.
    pub claimed: u64,
    /// Files of older generations that nothing refers to.
    pub orphans: Vec<String>,
    pub source: Arc<dyn SourceConnector>,
    /// Facts of the connector that the manifest keeps.
    pub embedded: Option<serde_json::Value>,
    pub positions: Positions,
    /// What is read of the source's backup first.
    pub history: Option<Bootstrap>,
    /// End of each partition as seen at start.
    pub ends: Positions,
    pub tables: Tables,
    pub online: BTreeMap<NodeId, Online>,
    /// Tables of look-up joins.
    pub lookups: Arc<Lookups>,
    /// What is in those that are read once.
    pub digests: Digests,
    /// Of records that are read again.
    pub decided: Option<Arc<Decided>>,
    /// Sinks that are to be built.
    pub unlike: Unlike,
    /// By id of an online sink that replaces another one: what that one served.
    pub served: Vec<StateFile>,
}

/// An online store, reached and, unless it was emptied, fenced.
#[derive(Clone)]
pub struct Online {
    pub store: Arc<dyn OnlineStore>,
    /// How far the store had seen the source.
    pub hold: Positions,
    /// The fence of the process that wrote our state is gone, or what it had acknowledged is forgotten: the store was
    /// emptied or restored from an older copy.
    /// It is raised once a manifest says that every row is to be written.
    pub lost: bool,
}

/// # Errors
/// External: something cannot be reached. User: the state or the tables do not fit the SQL. Fenced: overtaken.
///
/// Nodes of the plan get the ids under which the state knows them.
pub async fn open(plan: &mut StreamPlan, options: &RunOptions) -> Result<World> {
    let (name, state) = (options.name.as_str(), options.state.as_str());
    let (store, latest) = stored(state).await?;
    let looked = match &latest {
        Some(latest) => changes::adopt(plan, latest, options.rebuild).await?,
        None => Unlike::default(),
    };
    let source = plan.source().map(|(_, source)| source.clone());
    let source_plan = &source.ok_or_else(|| Error::user("the pipeline has no sink that reads a source"))?;
    let (source, embedded) = connector(source_plan, name, latest.as_ref()).await?;
    // A gap refuses the start before anything is written.
    let seen = source.partitions().await?;
    let gaps = options.allow_gap;
    let identity = recognised(&source_plan.name, source.as_ref(), latest.as_ref(), gaps).await?;
    let beginning = history::beginning(plan, latest.as_ref(), source.as_ref(), &seen, gaps).await?;
    let continues = plan.sinks().any(|(node, _)| history::continues(plan, node, latest.as_ref()));
    let online = online_stores(plan, name).await?;
    let (lookups, digests) = lookups::open(plan).await?;
    #[cfg_attr(not(feature = "delta"), expect(unused_mut, reason = "nothing to take over"))]
    let mut tables = Tables::open(plan, name, latest.as_ref(), (state, &looked.rebuilt)).await?;
    if let Some(error) = latest.as_ref().and_then(|latest| changes::copied(plan, latest)) {
        return Err(error);
    }
    #[cfg_attr(not(feature = "delta"), expect(unused_mut, reason = "nothing is rebuilt"))]
    let mut manifest = claim(&store, name, tables.newest, &online).await?;
    // Another process may have published more since we looked.
    #[cfg_attr(not(feature = "delta"), expect(unused_mut, reason = "nothing is rebuilt"))]
    let mut unlike = changes::adopt(plan, &manifest, options.rebuild).await?;
    if unlike.rebuilt != looked.rebuilt {
        return Err(Error::external("another process rebuilt sinks meanwhile").hint("Start it again."));
    }
    say_changed(&manifest, &digests);
    let orphans = store.unreferenced(&manifest).await?;
    remove_unfinished(state);
    #[cfg(feature = "delta")]
    {
        let partitions = &seen;
        let past = Past { store: &store, manifest: &manifest, source: &source, partitions, options };
        let unreplaced = tables.take_over(plan, &past).await?;
        changes::build_again(plan, &mut manifest, &mut unlike, unreplaced);
    }
    staged::take_over(plan, &manifest).await?;
    let mut fenced = BTreeMap::new();
    for (node, store) in online {
        fenced.insert(node, claim_online(store, &plan.nodes[node].id, &manifest).await?);
    }
    // Another process may have gone on since we looked, or added to a backup that is ours from the claim on: what was
    // decided before the claim, so that a gap refuses the start in time, is decided again.
    let known = latest.map(|latest| latest.sources).unwrap_or_default();
    let beginning = match known == manifest.sources && !continues {
        true => beginning,
        false => history::beginning(plan, Some(&manifest), source.as_ref(), &seen, gaps).await?,
    };
    let Beginning { partitions, positions, bootstrap: history } = beginning;
    let ends = partitions.iter().map(|p| (Place::new(0, p.topic, p.partition), p.high)).collect();
    Ok(World {
        store,
        claimed: manifest.epoch,
        manifest,
        orphans,
        source,
        embedded: identity.map(Into::into).or(embedded),
        positions,
        history,
        ends,
        tables,
        online: fenced,
        lookups: Arc::new(lookups),
        digests,
        decided: None,
        unlike,
        served: Vec::new(),
    })
}

/// The state, and its newest manifest.
async fn stored(state: &str) -> Result<(Arc<StateStore>, Option<Manifest>)> {
    let located = files::open_private(state)?;
    files::probe(&located).await?;
    let store = Arc::new(StateStore::new(located.store, object_store::path::Path::default(), Clock));
    let latest = store.latest().await?;
    Ok((store, latest))
}

/// Takes the pipeline over, above all that tables and online stores have seen.
async fn claim(
    store: &StateStore,
    name: &str,
    tables: u64,
    online: &[(NodeId, Arc<dyn OnlineStore>)],
) -> Result<Manifest> {
    let mut newest = tables;
    for (_, online) in online {
        newest = newest.max(online.open().await?.fence);
    }
    Ok(store.claim(name, newest + 1).await?.manifest)
}

/// What the manifest is to say of a source that has an identity: it is the one that the state has read.
async fn recognised(
    name: &str,
    source: &dyn SourceConnector,
    latest: Option<&Manifest>,
    allow_gap: bool,
) -> Result<Option<String>> {
    let before = latest.and_then(|manifest| manifest.sources.get(name)?.embedded.as_ref()?.as_str());
    // What is not known now was perhaps known before, and may be again.
    let Some(now) = source.identity().await else { return Ok(before.map(str::to_owned)) };
    if let Some(before) = before.filter(|before| *before != now) {
        let error = another(source, before, &now);
        if !allow_gap {
            return Err(error);
        }
        tracing::warn!("{error}; reading goes on at the same offsets (--allow-gap)");
    }
    Ok(Some(now))
}

/// A source that took the place of the one that was read.
pub(super) fn another(source: &dyn SourceConnector, before: &str, now: &str) -> Error {
    let topic = source.topics().first().cloned().unwrap_or_else(|| "".into());
    let message = format!(
        "topic {topic} is not the one that was read so far: that one's id is {before}, this one's is {now}"
    );
    let hint = "It was deleted and created anew, or bootstrap_servers names another cluster, so its offsets are of other \
                records. Begin anew under another --name with other locations. If it is a copy that kept the offsets, \
                --allow-gap goes on with it.";
    Error::external(message).hint(hint).lasting()
}

/// Says which look-up tables have other rows than in the run before.
fn say_changed(manifest: &Manifest, digests: &Digests) {
    for table in lookups::changed(&manifest.lookups, digests) {
        tracing::warn!(
            "look-up table {table} has other rows than in the run before: what was joined stays, what comes is joined with \
             the new ones"
        );
    }
}

/// What killed processes left behind in a local state.
fn remove_unfinished(state: &str) {
    let now = Clock.unix_millis();
    for folder in store::folders() {
        files::remove_unfinished(&format!("{state}/{folder}"), now);
    }
}

/// Opens the source; a generator keeps the start of its first run, files their names.
pub(super) async fn connector(
    source: &SourcePlan,
    #[cfg_attr(not(feature = "kafka"), expect(unused_variables, reason = "the name of a consumer group"))]
    name: &str,
    latest: Option<&Manifest>,
) -> Result<Opened> {
    match &source.kind {
        #[cfg(feature = "kafka")]
        SourceKind::Kafka(config) => {
            let mut config = config.clone();
            // Kept so that rows which fail later can be dead letters with their bytes, and for the backup's `_key`.
            (config.keep_key, config.keep_payload) = (true, true);
            let group = format!("millstream-{name}-{}", source.name);
            Ok((Arc::new(crate::connectors::kafka::KafkaSource::new(&source.name, &group, config)?), None))
        }
        SourceKind::Files(config) => {
            let kept = latest.and_then(|manifest| manifest.sources.get(&source.name)?.embedded.clone());
            let known: Vec<String> =
                kept.and_then(|names| serde_json::from_value(names).ok()).unwrap_or_default();
            let files = FileSource::open(&source.name, config.clone(), &known).await?;
            let names = files.names().into();
            Ok((Arc::new(files), Some(names)))
        }
        SourceKind::Generator(config) => {
            let kept =
                latest.and_then(|manifest| manifest.sources.get(&source.name)?.embedded.as_ref()?.as_i64());
            let start = kept.unwrap_or_else(|| Clock.unix_millis() * 1_000);
            let generator = crate::connectors::generator::GeneratorSource::new(config.clone(), start, Clock);
            Ok((Arc::new(generator), Some(start.into())))
        }
        SourceKind::Records(topic) => Ok((Arc::new(topic.clone()), None)),
    }
}

/// A source and what the manifest keeps of it.
pub(super) type Opened = (Arc<dyn SourceConnector>, Option<serde_json::Value>);

/// Offsets of the newest manifest of a state; empty when there is none.
///
/// # Errors
/// External: the state cannot be read.
pub async fn stored_positions(plan: &StreamPlan, state: &str) -> Result<Positions> {
    let store =
        StateStore::new(files::open_private(state)?.store, object_store::path::Path::default(), Clock);
    let manifest = store.latest().await?;
    let progress = plan.source().and_then(|(_, source)| manifest.as_ref()?.sources.get(&source.name));
    Ok(progress.map(|progress| progress.positions(0)).unwrap_or_default())
}

async fn online_stores(
    plan: &StreamPlan,
    #[cfg_attr(not(feature = "redis"), expect(unused_variables, reason = "memory needs no name"))] name: &str,
) -> Result<Vec<(NodeId, Arc<dyn OnlineStore>)>> {
    let mut stores: Vec<(NodeId, Arc<dyn OnlineStore>)> = Vec::new();
    for (node, sink) in plan.sinks() {
        let SinkKind::Online { store, .. } = &sink.kind else { continue };
        let store: Arc<dyn OnlineStore> = match store {
            #[cfg(feature = "redis")]
            OnlineKind::Redis(config) => {
                crate::connectors::redis::connect(config, name, &sink.name, &sink.schema).await?
            }
            OnlineKind::Held(store) => Arc::clone(store) as Arc<dyn OnlineStore>,
            OnlineKind::Memory => Arc::new(MemoryStore::new(Arc::clone(&sink.schema), sink.key.clone())?),
        };
        stores.push((node, store));
    }
    Ok(stores)
}

/// Looks at the fence, raises it unless the store lost what it had, then reads how far the store had seen the source.
async fn claim_online(store: Arc<dyn OnlineStore>, node: &str, manifest: &Manifest) -> Result<Online> {
    let OnlineState { fence: found, flushed, .. } = store.open().await?;
    // The generation under which the sink's state was written had raised its fence before.
    let building = manifest.building.as_ref();
    let progress = manifest.nodes.get(node).or_else(|| building?.nodes.get(node));
    let expected = progress.map_or(0, |progress| progress.generation.unwrap_or(1));
    let lost = found < expected || set_back(progress.and_then(|progress| progress.facts.as_ref()), &flushed);
    crash::point("redis.fence.before");
    let fence = if lost { found } else { store.raise_fence(manifest.generation).await? };
    crash::point("redis.fence.after");
    if fence > manifest.generation {
        return Err(Error::fenced(format!(
            "the online store belongs to generation {fence}, this process has {}",
            manifest.generation
        ))
        .hint("Another state writes this sink; give the sink another prefix, or stop the other pipeline."));
    }
    if lost {
        tracing::warn!(sink = node, "the online store lost what it had, every key is written again");
    }
    let hold = if lost { Positions::default() } else { store.open().await?.consumed };
    Ok(Online { store, hold, lost })
}

/// Where a start begins.
#[derive(Debug)]
pub struct Beginning {
    pub partitions: Vec<PartitionInfo>,
    pub positions: Positions,
    pub bootstrap: Option<Bootstrap>,
}

/// The progress of a state that has read something.
pub(super) fn progress_of<'m>(
    latest: Option<&'m Manifest>,
    source: &SourcePlan,
) -> Option<&'m SourceProgress> {
    latest?.sources.get(&source.name).filter(|progress| !progress.partitions.is_empty())
}

/// A start without history: the manifest's offsets, else `scan_startup`; a new partition from its beginning.
pub(super) async fn from_topic(
    plan: &SourcePlan,
    progress: Option<&SourceProgress>,
    source: &dyn SourceConnector,
    seen: &[PartitionInfo],
    allow_gap: bool,
) -> Result<Beginning> {
    let partitions = seen.to_vec();
    let place = |p: &PartitionInfo| Place::new(0, p.topic, p.partition);
    let Some(progress) = progress else {
        let positions = source.start_positions(&partitions).await?;
        let skipped = |p: &PartitionInfo| positions.get(place(p)).unwrap_or(p.low) - p.low;
        let skipped: i64 = partitions.iter().map(skipped).filter(|skipped| *skipped > 0).sum();
        if skipped > 0 {
            tracing::warn!(source = %plan.name, skipped, "records before scan_startup are not read");
        }
        return Ok(Beginning { partitions, positions, bootstrap: None });
    };
    let stored = progress.positions(0);
    let topic = source.topics().first().cloned().unwrap_or_else(|| "".into());
    let at = |p: &PartitionInfo| {
        let next = stored.get(place(p)).unwrap_or(p.low);
        if allow_gap && next < p.low {
            say_lost(&topic, p.partition, next, p.low);
        }
        (place(p), if allow_gap { next.max(p.low) } else { next })
    };
    let positions = partitions.iter().map(at).collect();
    Ok(Beginning { partitions, positions, bootstrap: None })
}

pub(super) fn say_lost(topic: &str, partition: i32, from: i64, to: i64) {
    let lost = to - from;
    tracing::warn!(
        "topic {topic}, partition {partition}: offsets {from} to {to} are in neither the topic nor its history; \
                    {lost} records are lost (--allow-gap)"
    );
}

/// State files of a node, decoded for each shard; `__group` is dropped.
pub struct Restored {
    /// By shard, in epoch order.
    pub shards: Vec<Vec<RecordBatch>>,
}

/// # Errors
/// External: a file is missing or damaged.
pub async fn restore(world: &World, node: &str, kind: &str, shards: usize) -> Result<Restored> {
    let files = world.manifest.files.iter().filter(|file| file.node == node && file.kind == kind).collect();
    decoded(world, files, shards).await
}

/// What the sink served which an online sink replaces.
///
/// # Errors
/// As [`restore`].
pub async fn served(world: &World, node: &str, shards: usize) -> Result<Restored> {
    decoded(world, world.served.iter().filter(|file| file.node == node).collect(), shards).await
}

async fn decoded(world: &World, mut files: Vec<&StateFile>, shards: usize) -> Result<Restored> {
    files.sort_by_key(|file| (file.epoch, file.path.as_str()));
    let mut restored = Restored { shards: vec![Vec::new(); shards] };
    for file in files {
        let bytes = match world.store.get_file(&file.path).await {
            Ok(bytes) => bytes,
            Err(error) => {
                // Whoever overtook us meanwhile may have removed it.
                world.store.check_fence(world.claimed).await?;
                return Err(error);
            }
        };
        for (shard, batches) in restored.shards.iter_mut().enumerate() {
            for mut batch in
                decode(bytes.clone(), groups_of(shard, shards)).map_err(|e| e.context(&file.path))?
            {
                batch.remove_column(0);
                batches.push(batch);
            }
        }
    }
    Ok(restored)
}
