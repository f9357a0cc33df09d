//! Spawns the tasks of a plan: per shard a source thread, a task per OVER, a task per sink, joined by channels.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::watch;

use crate::connectors::SourceReader;
use crate::connectors::collect::CollectSink;
#[cfg(feature = "delta")]
use crate::connectors::delta::{DeltaConfig, DeltaWriter, Mode, upsert::Stager};
use crate::connectors::ndjson::NdjsonWriter;
#[cfg(feature = "redis")]
use crate::connectors::redis::scan::Lookup;
use crate::error::{Error, Result};
use crate::operators::group::{GroupSpec, Panes};
#[cfg(feature = "redis")]
use crate::operators::lookup::LookupSpec;
use crate::operators::newest::Newest;
use crate::operators::over::Over;
#[cfg(feature = "redis")]
use crate::plan::remote::RemoteTable;
use crate::plan::{NodeId, NodeKind, SinkKind, SinkPlan, SourcePlan, StreamPlan};
use crate::runtime::RunOptions;
use crate::runtime::aside;
use crate::runtime::building::is_instead;
use crate::runtime::chain::{Chain, Outlet};
use crate::runtime::discovery::{Discovery, shard_of};
use crate::runtime::gather::Gather;
#[cfg(feature = "delta")]
use crate::runtime::history::floor;
use crate::runtime::inbox::Inbox;
use crate::runtime::keyed::Saver;
use crate::runtime::letters::LetterStage;
use crate::runtime::metrics::{Metrics, SourceMetrics};
use crate::runtime::online::{Fence, FlushState, OnlineTask, Settling};
#[cfg(feature = "redis")]
use crate::runtime::outage::Failing;
use crate::runtime::outage::Losses;
#[cfg(feature = "redis")]
use crate::runtime::remote::{Cache, Remote};
use crate::runtime::report::{Command, Report, caught};
use crate::runtime::silence::{Silence, pulse};
#[cfg(feature = "delta")]
use crate::runtime::sinks::DeltaTask;
use crate::runtime::sinks::{AppendTask, NdjsonTask};
use crate::runtime::source::{SourceState, SourceTask};
use crate::runtime::stage::{Operate, StageTask};
use crate::runtime::start::{World, restore, served};
#[cfg(feature = "delta")]
use crate::runtime::upsert::UpsertTask;
use crate::runtime::watermark::SourceClock;
use crate::state::manifest::Manifest;
use crate::stream::clock::Clock;
use crate::stream::{Message, Micros, Place, Positions, START_OF_TIME};

/// Batches that wait in a channel: a few, so that a slow reader slows its writer down soon.
const CHANNEL: usize = 4;
/// Gathered batches that wait for who writes them.
const GATHERED: usize = 2;

/// What the coordinator needs to talk to the tasks.
pub struct Tasks {
    pub commands: Vec<Sender<Command>>,
    pub reports: Receiver<Report>,
    /// Reports of `Report::State` or `Report::Prepared` per epoch, by node.
    pub shards: BTreeMap<NodeId, usize>,
    /// The sinks of dead letters, if there are some.
    pub letters: Option<LetterStage>,
}

struct Graph<'a> {
    plan: Arc<StreamPlan>,
    world: &'a World,
    console: fn() -> Box<dyn std::io::Write + Send>,
    parallelism: usize,
    metrics: Arc<Metrics>,
    reports: Sender<Report>,
    durable: watch::Receiver<u64>,
    /// Receivers of a node that begins a task, by shard.
    inboxes: BTreeMap<NodeId, Vec<Vec<Receiver<Message>>>>,
}

/// `durable`: the newest epoch whose manifest is published. A plan without source has letters alone.
///
/// # Errors
/// External: state files or readers cannot be opened.
pub async fn spawn(
    plan: Arc<StreamPlan>,
    world: &World,
    options: &RunOptions,
    metrics: Arc<Metrics>,
    durable: watch::Receiver<u64>,
) -> Result<Tasks> {
    let (reports, receiver) = channel(1_024);
    let source = plan.source().map(|(source, _)| source);
    let parallelism = options.parallelism;
    let mut graph = Graph {
        plan: Arc::clone(&plan),
        world,
        console: options.console,
        parallelism,
        metrics,
        reports,
        durable,
        inboxes: BTreeMap::new(),
    };
    let source_chains = source.map(|source| graph.chains(source, parallelism)).unwrap_or_default();
    let mut letters = plan.letters().map(|node| {
        let chain = graph.chains(node, 1).remove(0);
        LetterStage { node, chain, reports: 0 }
    });
    let mut shards = BTreeMap::new();
    for (id, node) in plan.nodes.iter().enumerate() {
        match &node.kind {
            NodeKind::Over(_) => graph.spawn_over(id).await?,
            NodeKind::Group(spec) => graph.spawn_group(id, spec).await?,
            #[cfg(feature = "redis")]
            NodeKind::Remote { spec, table, view } => graph.spawn_remote(id, spec, table, view)?,
            NodeKind::Sink(sink) => graph.spawn_sink(id, sink).await?,
            _ => continue,
        }
        match &mut letters {
            Some(stage) if plan.reads_letters(id) => {
                stage.reports += 1;
                shards.insert(id, 1);
            }
            _ => {
                shards.insert(id, parallelism);
            }
        }
    }
    let commands = match source {
        Some(source) => graph.spawn_source(source, source_chains).await?,
        None => Vec::new(),
    };
    Ok(Tasks { commands, reports: receiver, shards, letters })
}

impl Graph<'_> {
    /// Reader nodes at the edges of the stage that begins at `root`.
    fn edges(&self, root: NodeId, found: &mut Vec<(NodeId, Option<Vec<usize>>)>) {
        for (reader, edge) in self.plan.readers(root) {
            match &self.plan.nodes[reader].kind {
                NodeKind::Filter { .. }
                | NodeKind::Project { .. }
                | NodeKind::Lookup { .. }
                | NodeKind::Unnest { .. }
                | NodeKind::Union => {
                    self.edges(reader, found);
                }
                // Reached through every branch of a UNION, but joined to the stage once.
                _ if found.iter().any(|(known, _)| *known == reader) => {}
                _ => found.push((reader, edge.exchange.clone())),
            }
        }
    }

    /// The chain of each shard of a stage, with channels to every reader at its edges, which has as many shards.
    fn chains(&mut self, root: NodeId, shards: usize) -> Vec<Chain> {
        let mut edges = Vec::new();
        self.edges(root, &mut edges);
        let topics = self.world.source.topics();
        let mut outlets: Vec<Vec<(NodeId, Outlet)>> = (0..shards).map(|_| Vec::new()).collect();
        for (reader, keys) in edges {
            let inboxes =
                self.inboxes.entry(reader).or_insert_with(|| (0..shards).map(|_| Vec::new()).collect());
            for (shard, outlets) in outlets.iter_mut().enumerate() {
                let targets = if keys.is_some() { 0..shards } else { shard..shard + 1 };
                let senders = targets
                    .map(|target| {
                        let (sender, receiver) = channel(CHANNEL);
                        inboxes[target].push(receiver);
                        sender
                    })
                    .collect::<Vec<_>>();
                self.metrics.watch_queue(&self.plan.nodes[reader].id, senders.iter());
                outlets.push((reader, Outlet { senders, keys: keys.clone() }));
            }
        }
        outlets
            .into_iter()
            .map(|outlets| {
                let lookups = Arc::clone(&self.world.lookups);
                Chain::new(Arc::clone(&self.plan), outlets, topics.clone(), lookups)
            })
            .collect()
    }

    fn saver(&self, node: NodeId, shard: usize) -> Saver {
        Saver {
            store: Arc::clone(&self.world.store),
            node: self.plan.nodes[node].id.clone(),
            generation: self.world.manifest.generation,
            shard,
        }
    }

    /// Runs a task; its failure becomes a report.
    fn run(&self, task: impl Future<Output = Result<()>> + Send + 'static) {
        #[expect(clippy::disallowed_methods, reason = "this is where the runtime spawns its tasks")]
        tokio::spawn(watched(self.reports.clone(), task));
    }

    /// As [`Graph::run`], for a task whose rows nobody waits for.
    fn run_aside(&self, task: impl Future<Output = Result<()>> + Send + 'static) {
        aside::spawn(watched(self.reports.clone(), task));
    }

    /// The input of a task aside, in large batches.
    fn gathered(&self, node: NodeId, inbox: Inbox) -> Inbox {
        let (sender, receiver) = channel(GATHERED);
        self.metrics.watch_queue(&self.plan.nodes[node].id, std::iter::once(&sender));
        let watermark = inbox.watermark();
        self.run(Gather::new(inbox, sender).run());
        Inbox::new(vec![receiver], watermark)
    }

    /// Runs one shard of a stage.
    fn stage(&self, node: NodeId, shard: usize, operator: impl Operate, inbox: Inbox, chain: Chain) {
        let (reports, saver) = (self.reports.clone(), self.saver(node, shard));
        self.run(StageTask { node, operator, inbox, chain, reports, saver }.run());
    }

    /// The watermark that a node had reached.
    fn watermark(&self, id: &str) -> Micros {
        let progress = self.world.manifest.nodes.get(id);
        progress.and_then(|progress| progress.watermark).unwrap_or(START_OF_TIME)
    }

    async fn spawn_over(&mut self, node: NodeId) -> Result<()> {
        let chains = self.chains(node, self.parallelism);
        let NodeKind::Over(spec) = &self.plan.nodes[node].kind else { return Ok(()) };
        let id = &self.plan.nodes[node].id;
        let rows = restore(self.world, id, "rows", self.parallelism).await?;
        let keys = restore(self.world, id, "keys", self.parallelism).await?;
        let watermark = self.watermark(id);
        let inboxes = self.inboxes.remove(&node).unwrap_or_default();
        for (shard, (chain, receivers)) in chains.into_iter().zip(inboxes).enumerate() {
            let mut over = Over::new(spec.clone())?;
            over.restore(&rows.shards[shard], &keys.shards[shard], watermark)?;
            let inbox = Inbox::new(receivers, watermark);
            self.stage(node, shard, over, inbox, chain);
        }
        Ok(())
    }

    async fn spawn_group(&mut self, node: NodeId, spec: &GroupSpec) -> Result<()> {
        let chains = self.chains(node, self.parallelism);
        let inboxes = self.inboxes.remove(&node).unwrap_or_default();
        let id = &self.plan.nodes[node].id;
        let rows = restore(self.world, id, "groups", self.parallelism).await?;
        let watermark = self.watermark(id);
        for (shard, (chain, receivers)) in chains.into_iter().zip(inboxes).enumerate() {
            let mut group = Panes::new(spec.clone())?;
            group.restore(&rows.shards[shard], watermark)?;
            let inbox = Inbox::new(receivers, watermark);
            self.stage(node, shard, group, inbox, chain);
        }
        Ok(())
    }

    #[cfg(feature = "redis")]
    fn spawn_remote(
        &mut self,
        node: NodeId,
        spec: &LookupSpec,
        table: &RemoteTable,
        view: &Arc<str>,
    ) -> Result<()> {
        let Some(edge) = self.plan.nodes[node].inputs.first().cloned() else { return Ok(()) };
        let chains = self.chains(node, self.parallelism);
        let inboxes = self.inboxes.remove(&node).unwrap_or_default();
        let failing = Arc::new(Failing::default());
        for (shard, (chain, receivers)) in chains.into_iter().zip(inboxes).enumerate() {
            let remote = Remote {
                port: edge.port,
                view: Arc::clone(view),
                topics: self.world.source.topics(),
                spec: spec.clone(),
                client: Lookup::new(table.config.clone(), Arc::clone(&table.schema)),
                cache: Cache::new(table.clone(), shard as u32, Clock, Arc::clone(&failing))?,
                dead: Vec::new(),
            };
            self.stage(node, shard, remote, Inbox::new(receivers, START_OF_TIME), chain);
        }
        Ok(())
    }

    async fn spawn_sink(&mut self, node: NodeId, sink: &SinkPlan) -> Result<()> {
        let inboxes = self.inboxes.remove(&node).unwrap_or_default();
        let restored = restore(self.world, &self.plan.nodes[node].id, "newest", self.parallelism).await?;
        let served = served(self.world, &self.plan.nodes[node].id, self.parallelism).await?;
        if let SinkKind::Collect(collector) = &sink.kind {
            collector.take_over(self.world.manifest.generation, self.world.manifest.epoch);
        }
        let losses = Arc::new(Losses::new(inboxes.len()));
        for (shard, receivers) in inboxes.into_iter().enumerate() {
            let inbox = Inbox::new(receivers, START_OF_TIME);
            let (reports, metrics) = (self.reports.clone(), self.metrics.sink(node));
            match &sink.kind {
                #[cfg(feature = "delta")]
                SinkKind::Delta(config) => self.spawn_table(node, shard, sink, config, inbox)?,
                SinkKind::Ndjson(config) => {
                    let writer = NdjsonWriter::open(config.clone(), self.world.manifest.generation, shard)?;
                    let inbox = self.gathered(node, inbox);
                    self.run_aside(NdjsonTask { node, writer, inbox, reports, metrics }.run());
                }
                SinkKind::Online { ttl_micros, .. } => {
                    let mut newest = Newest::new(Arc::clone(&sink.schema), sink.key.clone(), *ttl_micros)?;
                    // Also when the pipeline goes on: then its rows are written for the first time.
                    let was_rebuilt = self.world.manifest.rebuilt.contains_key(&sink.name);
                    if was_rebuilt || is_instead(&self.plan.nodes[node].id) {
                        newest.take_over();
                    }
                    newest.bury(&served.shards[shard])?;
                    newest.restore(&restored.shards[shard])?;
                    let online = self.world.online.get(&node).cloned().ok_or_else(|| {
                        Error::internal(format!("the online sink {} was not opened", sink.name))
                    })?;
                    // Values of the past are not shown as the newest.
                    let mut hold = online.hold;
                    self.world.history.iter().for_each(|history| hold.raise_all(history.until()));
                    let task = OnlineTask {
                        node,
                        sink: sink.name.as_str().into(),
                        topics: self.world.source.topics(),
                        shard: shard as u32,
                        generation: self.world.manifest.generation,
                        key: sink.key.clone(),
                        newest,
                        store: online.store,
                        hold,
                        quiet: is_instead(&self.plan.nodes[node].id),
                        inbox,
                        reports,
                        saver: self.saver(node, shard),
                        metrics,
                        clock: Clock,
                        flushes: FlushState::at(self.world.positions.clone()),
                        settling: sink.settled.then(Settling::default),
                        fence: if online.lost { Fence::Lost } else { Fence::Ours },
                        losses: Arc::clone(&losses),
                        durable: self.durable.clone(),
                    };
                    self.run(task.run());
                }
                other => {
                    let sink = append_sink(other, sink, self.console, &self.world.manifest).await?;
                    self.run(AppendTask { node, sink, inbox, reports, metrics }.run());
                }
            }
        }
        Ok(())
    }

    #[cfg(feature = "delta")]
    fn spawn_table(
        &self,
        node: NodeId,
        shard: usize,
        sink: &SinkPlan,
        config: &DeltaConfig,
        inbox: Inbox,
    ) -> Result<()> {
        let (reports, metrics) = (self.reports.clone(), self.metrics.sink(node));
        let tag = format!("g{:08}-s{shard}", self.world.manifest.generation);
        if let Mode::Upsert { .. } = config.mode {
            let (key, topics) = (sink.key.clone(), self.world.source.topics());
            let changes = Newest::new(Arc::clone(&sink.schema), key.clone(), None)?;
            let stager = Stager::new(config, &sink.schema, tag)?;
            let sink = sink.name.as_str().into();
            self.run_aside(
                UpsertTask { node, sink, topics, key, changes, stager, inbox, reports, metrics }.run(),
            );
            return Ok(());
        }
        let writer = DeltaWriter::new(config.clone(), &config.stored_rows(&sink.schema)?, tag)?;
        let (config, epoch) = (config.clone(), self.world.manifest.epoch + 1);
        let floor = floor(&self.plan, node, self.world.history.as_ref());
        let inbox = self.gathered(node, inbox);
        self.run_aside(DeltaTask { node, config, writer, epoch, floor, inbox, reports, metrics }.run());
        Ok(())
    }

    /// Begins to read the history, if there is some to read; the readers of the shards.
    fn read_history(&self, plan: &SourcePlan, counted: &Arc<SourceMetrics>) -> Vec<Box<dyn SourceReader>> {
        let World { source, positions, ends, .. } = self.world;
        let Some(history) = &self.world.history else { return Vec::new() };
        let (feeder, readers) = history.readers(plan, (positions, ends), self.parallelism, source, counted);
        self.run(feeder.run());
        readers
    }

    /// The clock of the source where the manifest left it.
    fn clock(&self, plan: &SourcePlan) -> SourceClock {
        let stored = self.world.manifest.sources.get(&plan.name);
        let known = |place: Place| {
            let partitions = stored.map(|s| s.partitions.as_slice()).unwrap_or_default();
            partitions
                .iter()
                .find(|p| p.topic == place.topic() && p.partition == place.partition())?
                .watermark
        };
        let places = self.world.positions.iter().map(|(place, _)| (place, known(place)));
        let clock = SourceClock::new(plan.lateness, places, stored.and_then(|s| s.watermark));
        match &self.world.decided {
            Some(decided) => clock.below(decided.watermark.unwrap_or(START_OF_TIME)),
            None => clock,
        }
    }

    /// Source threads, partitions dealt out in turn.
    async fn spawn_source(&mut self, node: NodeId, chains: Vec<Chain>) -> Result<Vec<Sender<Command>>> {
        let Some((_, plan)) = self.plan.source() else { return Ok(Vec::new()) };
        let plan = Arc::new(plan.clone());
        let watermarks = self.clock(&plan);
        let counted = self.metrics.source(node);
        counted.watch(watermarks.clone());
        let mut commands: Vec<Sender<Command>> = Vec::new();
        let mut readers = self.read_history(&plan, &counted).into_iter();
        // An epoch that runs again ends where it ended.
        let discovery = self.world.source.discovery().filter(|_| self.world.decided.is_none());
        let pulse = discovery.map(|every| pulse(every, plan.idle_timeout));
        for (shard, chain) in chains.into_iter().enumerate() {
            let mine = |(place, _): &(Place, i64)| shard_of(*place, self.parallelism) == shard;
            let positions: Positions = self.world.positions.iter().filter(mine).collect();
            let ends = self.world.ends.iter().filter(|(place, _)| positions.get(*place).is_some()).collect();
            let (sender, receiver) = channel(4);
            commands.push(sender);
            let reader = match readers.next() {
                Some(reader) => reader,
                None => self.world.source.reader(positions.clone()).await?,
            };
            let task = SourceTask {
                node,
                shard,
                plan: Arc::clone(&plan),
                topics: self.world.source.topics(),
                source: Arc::clone(&self.world.source),
                reader,
                runtime: tokio::runtime::Handle::current(),
                clock: Clock,
                watermarks: watermarks.clone(),
                decided: self.world.decided.clone(),
                chain,
                positions,
                ends,
                commands: receiver,
                reports: self.reports.clone(),
                metrics: Arc::clone(&self.metrics),
                counted: Arc::clone(&counted),
                state: SourceState::new(Silence::new(pulse)),
            };
            let reports = self.reports.clone();
            let thread = std::thread::Builder::new().name(format!("source-{shard}"));
            let spawned = thread.spawn(move || {
                if let Err(error) = task.run() {
                    reports.blocking_send(Report::Failed(error)).ok();
                }
            });
            spawned.map_err(|error| Error::external("a thread cannot be started").because(error))?;
        }
        if let (Some(every), Some(pulse)) = (discovery, pulse) {
            let known = self.world.positions.iter().map(|(place, _)| place).collect();
            let source = Arc::clone(&self.world.source);
            let commands = commands.iter().map(Sender::downgrade).collect();
            let identity = self.world.embedded.as_ref().and_then(|kept| kept.as_str()).map(str::to_owned);
            let reports = self.reports.downgrade();
            #[expect(clippy::disallowed_methods, reason = "the runtime spawns; nobody waits for this one")]
            tokio::spawn(Discovery { source, every, pulse, known, commands, identity, reports }.run());
        }
        Ok(commands)
    }
}

async fn watched(reports: Sender<Report>, task: impl Future<Output = Result<()>>) {
    if let Err(error) = caught(task).await {
        // Nobody listens any more when the pipeline is already going down.
        reports.send(Report::Failed(error)).await.ok();
    }
}

async fn append_sink(
    kind: &SinkKind,
    sink: &SinkPlan,
    console: fn() -> Box<dyn std::io::Write + Send>,
    manifest: &Manifest,
) -> Result<Box<dyn crate::connectors::AppendSink>> {
    match kind {
        #[cfg(feature = "kafka")]
        SinkKind::Kafka(config) => {
            Ok(Box::new(crate::connectors::kafka::KafkaSink::open(config.clone()).await?))
        }
        SinkKind::Collect(collector) => {
            Ok(Box::new(CollectSink::new(collector.clone(), manifest.generation)))
        }
        SinkKind::Console(format) => {
            Ok(Box::new(crate::connectors::console::ConsoleSink::new(*format, console())))
        }
        SinkKind::Blackhole => Ok(Box::new(crate::connectors::blackhole::BlackholeSink::default())),
        _ => Err(Error::user(format!("sink {}: this connector cannot run yet", sink.name))),
    }
}
