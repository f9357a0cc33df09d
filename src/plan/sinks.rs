//! `CREATE SINK` → nodes: which emission, which connector, and what a sink refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use datafusion::logical_expr::LogicalPlan;

use crate::connectors::collect::Collector;
use crate::connectors::console::ConsoleFormat;
#[cfg(feature = "delta")]
use crate::connectors::delta::DeltaConfig;
#[cfg(feature = "kafka")]
use crate::connectors::kafka::KafkaSinkConfig;
use crate::connectors::memory::MemoryStore;
use crate::connectors::ndjson::NdjsonConfig;
use crate::connectors::partition;
#[cfg(feature = "redis")]
use crate::connectors::redis::RedisConfig;
use crate::connectors::reference::{self, Role};
use crate::error::{Error, Result};
use crate::plan::group::contains_group;
use crate::plan::letters;
use crate::plan::lower::{Emission, Lowered, Lowering};
use crate::plan::session::stream_session;
use crate::plan::source::{Backup, all_sources};
use crate::plan::tables::scans;
use crate::plan::targets;
use crate::plan::views::ViewPlanner;
use crate::plan::window::contains_window;
use crate::plan::{Edge, NodeKind, SourcePlan, StreamPlan};
use crate::sql::options::Options;
use crate::sql::{Catalog, CreateSink, SinkInput, interval};

#[derive(Debug, Clone)]
pub enum SinkKind {
    #[cfg(feature = "delta")]
    Delta(DeltaConfig),
    #[cfg(feature = "kafka")]
    Kafka(KafkaSinkConfig),
    /// Newest row per key.
    Online {
        store: OnlineKind,
        ttl_micros: Option<i64>,
    },
    Ndjson(NdjsonConfig),
    Console(ConsoleFormat),
    Blackhole,
    /// In the place of another connector: `millstream test`.
    Collect(Collector),
}

impl SinkKind {
    /// The connector's name in SQL.
    pub fn connector(&self) -> &'static str {
        match self {
            #[cfg(feature = "delta")]
            Self::Delta(_) => "delta",
            #[cfg(feature = "kafka")]
            Self::Kafka(_) => "kafka",
            #[cfg(feature = "redis")]
            Self::Online { store: OnlineKind::Redis(_), .. } => "redis",
            Self::Online { .. } => "memory",
            Self::Ndjson(_) => "ndjson",
            Self::Collect(_) => "collect",
            Self::Console(_) => "console",
            Self::Blackhole => "blackhole",
        }
    }
}

/// Where the newest rows are written.
#[derive(Debug, Clone)]
pub enum OnlineKind {
    /// Of the process; its rows live on in the state.
    Memory,
    /// In the place of another store: whoever started the run reads it.
    Held(Arc<MemoryStore>),
    #[cfg(feature = "redis")]
    Redis(Box<RedisConfig>),
}

#[derive(Debug, Clone)]
pub struct SinkPlan {
    pub name: String,
    pub kind: SinkKind,
    pub emission: Emission,
    /// Schema of the rows that arrive.
    pub schema: SchemaRef,
    /// Key columns of an online sink or of Kafka records; empty for the others.
    pub key: Vec<usize>,
    /// An online store gets what a checkpoint holds, not more: keys may come and go that another cut of the input never
    /// has, and nobody would delete them after a crash.
    pub settled: bool,
    /// A column that never falls along the order of the rows: the event time, or what is left of it.
    pub order: Option<usize>,
    /// The time column: the event time, or that of the windows; `None` where the SQL leaves it out.
    pub time: Option<usize>,
}

impl SinkPlan {
    /// As [`StreamPlan::resolve_secrets`], for one sink.
    ///
    /// # Errors
    /// A user error at the option's place.
    #[cfg_attr(
        not(any(feature = "kafka", feature = "redis")),
        expect(unused_variables, reason = "only servers ask for secrets")
    )]
    pub fn resolve_secrets(&mut self, environment: &dyn Fn(&str) -> Option<String>) -> Result<()> {
        match &mut self.kind {
            #[cfg(feature = "kafka")]
            SinkKind::Kafka(config) => config.settings.resolve_secrets(environment),
            #[cfg(feature = "redis")]
            SinkKind::Online { store: OnlineKind::Redis(config), .. } => config.resolve_secrets(environment),
            _ => Ok(()),
        }
    }
}

/// Plans the sinks of a catalog (all, or those named), and everything below them.
///
/// # Errors
/// The first user error found, with its place.
pub async fn plan(catalog: &Catalog, only: &[String]) -> Result<StreamPlan> {
    let session = stream_session()?;
    let sources = all_sources(&session, catalog)?;
    if let Some(unknown) = only.iter().find(|name| catalog.sink(name).is_none()) {
        let known: Vec<String> = catalog.sinks.iter().map(|sink| sink.name.clone()).collect();
        let hint = match crate::sql::options::nearest(unknown, &known) {
            Some(near) => format!("Did you mean {near}?"),
            None => format!("The sinks are {}.", known.join(", ")),
        };
        return Err(Error::user(format!("there is no sink {unknown}")).hint(hint));
    }
    check_history(catalog, &sources)?;
    let mut views = ViewPlanner::new(&session, catalog, &sources);
    let mut lowering = Lowering::new(&session, &catalog.tables);
    let mut source: Option<String> = None;
    for sink in catalog.sinks.iter().filter(|sink| only.is_empty() || only.contains(&sink.name)) {
        let plan = sink_input(&mut views, sink).await?;
        if letters::read_by(&plan) {
            letters::check(&plan, sink)?;
            lowering.add_letters();
        }
        for name in scans(&plan).into_iter().filter(|name| sources.contains_key(name)) {
            match &source {
                Some(known) if *known != name => {
                    let message = format!("the sinks of one pipeline read two sources, {known} and {name}");
                    let hint = "Run one pipeline per source with --sink for now.";
                    return Err(Error::user(message).hint(hint).at(sink.place.clone()));
                }
                Some(_) => {}
                None => {
                    if let Some(plan) = sources.get(&name) {
                        let backup = backup(catalog, plan)?;
                        lowering.add_source(SourcePlan { backup, ..plan.as_ref().clone() });
                        source = Some(name);
                    }
                }
            }
        }
        add_sink(&mut lowering, sink, &plan, &sources)?;
    }
    letters::check_pipeline(&lowering.plan, catalog)?;
    targets::check(&lowering.plan, catalog)?;
    Ok(lowering.plan)
}

/// Checks views that no sink reads, so that `check` finds their faults too.
///
/// # Errors
/// The first user error found, with its place.
pub async fn check_views(catalog: &Catalog) -> Result<()> {
    let session = stream_session()?;
    let sources = all_sources(&session, catalog)?;
    let mut views = ViewPlanner::new(&session, catalog, &sources);
    for view in &catalog.views {
        let plan = views.relation(&view.name, &view.place).await?;
        let mut lowering = Lowering::new(&session, &catalog.tables);
        if letters::read_by(&plan) {
            letters::check_shape(&plan, &view.name, &view.place)?;
            lowering.add_letters();
        }
        for name in scans(&plan) {
            if let Some(source) = sources.get(&name) {
                lowering.add_source(source.as_ref().clone());
            }
        }
        lowering.lower(&plan, Emission::Final, &view.name, &view.place)?;
    }
    Ok(())
}

fn check_history(catalog: &Catalog, sources: &BTreeMap<String, Arc<SourcePlan>>) -> Result<()> {
    for source in &catalog.sources {
        let Some(history) = sources.get(&source.name).and_then(|plan| plan.history.clone()) else { continue };
        if catalog.sink(&history).is_none() && catalog.table(&history).is_none() {
            let message = format!("source {}: history = '{history}' names no sink or table", source.name);
            let hint =
                format!("Add CREATE SINK {history} FROM {} WITH (connector = 'delta', …).", source.name);
            return Err(Error::user(message).hint(hint).at(source.place.clone()));
        }
    }
    Ok(())
}

/// A source's backup, whether its sink is among those that are planned or not.
fn backup(catalog: &Catalog, source: &SourcePlan) -> Result<Option<Backup>> {
    let Some(history) = &source.history else { return Ok(None) };
    let table = catalog.table(history);
    let sink = catalog.sink(history).map(|sink| &sink.options);
    let Some(options) = sink.or_else(|| table.map(|table| &table.options)) else { return Ok(None) };
    let mut options = options.clone();
    Ok(match options.string("connector")?.as_deref() {
        Some("delta") => options.string("location")?.map(Backup::Delta),
        Some("parquet" | "csv" | "ndjson") => table.map(|table| Backup::Table(Box::new(table.clone()))),
        _ => None,
    })
}

async fn sink_input(views: &mut ViewPlanner<'_>, sink: &CreateSink) -> Result<LogicalPlan> {
    match &sink.input {
        SinkInput::Relation { name, place } => views.relation(name, place).await,
        SinkInput::Query(query) => views.query(query, &sink.place).await,
    }
}

fn add_sink(
    lowering: &mut Lowering<'_>,
    sink: &CreateSink,
    plan: &LogicalPlan,
    sources: &BTreeMap<String, Arc<SourcePlan>>,
) -> Result<()> {
    let placed = |error: Error| error.at(sink.place.clone());
    let mut options = sink.options.clone();
    let connector = options.required("connector").map_err(placed)?;
    options.declare(reference::options(&connector, Role::Sink));
    let shape = Shape::of(lowering, plan, sink)?;
    let emission = emission(sink, &connector, &mut options, &shape)?;
    let relation = source_of(sink, sources);
    let metadata =
        connector == "delta" && options.choice("metadata", &["all", "none"]).map_err(placed)? != Some(1);
    let lowered = lowering.lower(plan, emission, view_name(sink), &sink.place)?;
    let lowered = match relation {
        Some(source) if source.has_metadata() && !metadata => visible_only(lowering, &lowered, source)?,
        _ => lowered,
    };
    let lowered = lowering.storable(&lowered, &sink.name)?;
    let schema = Arc::clone(&lowering.plan.nodes[lowered.node].schema);
    let (kind, key) = connector_of(&connector, sink, &mut options, &schema)?;
    options.finish().map_err(placed)?;
    let key = key_columns(sink, &schema, &key)?;
    let online = matches!(kind, SinkKind::Online { .. });
    let keyed = online || emission == Emission::Latest || lowered.updating && !key.is_empty();
    let exchange = if keyed { online_exchange(sink, &lowered, &key)? } else { None };
    let edge = Edge { from: lowered.node, port: lowered.port, exchange, branch: 0 };
    let sink_plan = SinkPlan {
        name: sink.name.clone(),
        kind,
        emission,
        schema: Arc::clone(&schema),
        key,
        settled: lowered.retracts,
        order: lowered.time.or_else(|| lowered.closes.iter().position(Option::is_some)),
        time: lowered.time,
    };
    lowering.add(sink.name.clone(), NodeKind::Sink(sink_plan), Some(edge), schema);
    Ok(())
}

/// What decides on a view's emissions.
struct Shape {
    /// It has a GROUP BY.
    grouped: bool,
    /// Its rows never close.
    updating: bool,
    /// It has an OVER.
    windowed: bool,
}

impl Shape {
    /// Whether groups close is known once they are lowered: in a plan of their own, as the real one depends on it.
    fn of(lowering: &Lowering<'_>, plan: &LogicalPlan, sink: &CreateSink) -> Result<Self> {
        let grouped = contains_group(plan);
        let updating = grouped
            && lowering.scratch().lower(plan, Emission::Final, view_name(sink), &sink.place)?.updating;
        Ok(Self { grouped, updating, windowed: contains_window(plan) })
    }
}

/// Which rows the sink takes: what its option says, else what fits connector and view (DESIGN §3 *Emissions*).
fn emission(sink: &CreateSink, connector: &str, options: &mut Options, shape: &Shape) -> Result<Emission> {
    let refused = |message: &str, hint: &str, option: &str| {
        let place = sink.options.place(option).unwrap_or_else(|| sink.place.clone());
        Err(Error::user(format!("sink {}: {message}", sink.name)).hint(hint).at(place))
    };
    let online = matches!(connector, "redis" | "memory");
    let updating = shape.updating;
    let mode = sink.options.shown("mode").unwrap_or_default();
    let by_mode = matches!(mode.as_str(), "upsert" | "changelog");
    if connector == "delta" && updating && !by_mode {
        let hint =
            "Write mode = 'upsert' with key = '…' (one row per key) or mode = 'changelog' (every change).";
        return refused("rows of a GROUP BY change, so they cannot be appended", hint, "mode");
    }
    if connector == "delta" && by_mode && !shape.grouped {
        let message = format!("mode = '{mode}' is for a view with GROUP BY; these rows never change");
        return refused(&message, "Leave the option mode out.", "mode");
    }
    let all = matches!(connector, "kafka" | "console") || by_mode;
    let default = match (online, updating) {
        (true, _) => Emission::Latest,
        (false, true) => Emission::Changes,
        (false, false) if shape.grouped && all => Emission::Changes,
        (false, false) => Emission::Final,
    };
    let wanted = match options.choice("emission", &["final", "latest", "changes", "arrival"])? {
        None => default,
        Some(0) => Emission::Final,
        Some(1) => Emission::Latest,
        Some(2) => Emission::Changes,
        Some(_) => {
            return refused("the emission 'arrival' cannot run yet", "Leave the option out.", "emission");
        }
    };
    let hint = "Leave the option emission out.";
    match (wanted, online, updating) {
        (Emission::Final | Emission::Changes, true, _) => {
            refused("an online store takes the emission 'latest'", hint, "emission")
        }
        (Emission::Final, false, true) => refused("rows of a GROUP BY are never final", hint, "emission"),
        (Emission::Latest, false, true) => {
            refused("only an online store takes the newest rows of a GROUP BY", hint, "emission")
        }
        (Emission::Final | Emission::Latest, false, false) if by_mode => {
            refused("a table with a mode takes the emission 'changes'", hint, "emission")
        }
        (Emission::Changes, false, false) if shape.grouped => Ok(Emission::Changes),
        (Emission::Changes, false, false) if shape.windowed => refused(
            "the emission 'changes' of a window cannot run yet",
            "Use 'final' or 'latest'.",
            "emission",
        ),
        // Rows without a state below are the same in every emission.
        (Emission::Changes, false, false) => Ok(Emission::Final),
        (wanted, _, _) => Ok(wanted),
    }
}

fn view_name(sink: &CreateSink) -> &str {
    match &sink.input {
        SinkInput::Relation { name, .. } => name,
        SinkInput::Query(_) => &sink.name,
    }
}

/// The source, if the sink stores it directly (a backup).
fn source_of<'s>(
    sink: &CreateSink,
    sources: &'s BTreeMap<String, Arc<SourcePlan>>,
) -> Option<&'s SourcePlan> {
    match &sink.input {
        SinkInput::Relation { name, .. } => sources.get(name).map(AsRef::as_ref),
        SinkInput::Query(_) => None,
    }
}

fn visible_only(lowering: &mut Lowering<'_>, lowered: &Lowered, source: &SourcePlan) -> Result<Lowered> {
    let columns: Vec<usize> = (0..source.visible).collect();
    lowering.select(lowered, &columns, &source.name)
}

fn connector_of(
    connector: &str,
    sink: &CreateSink,
    options: &mut Options,
    schema: &SchemaRef,
) -> Result<(SinkKind, Vec<String>)> {
    let placed = |error: Error| error.at(sink.place.clone());
    let list = |text: Option<String>| -> Vec<String> {
        text.map(|t| t.split(',').map(|k| k.trim().to_owned()).collect()).unwrap_or_default()
    };
    match connector {
        #[cfg(feature = "delta")]
        "delta" => {
            let place = options.place("partition_by").unwrap_or_else(|| sink.place.clone());
            let config = DeltaConfig::from_options(options).map_err(placed)?;
            let stored = config.stored_rows(schema).map_err(placed)?;
            config.table_schema(&stored).map_err(|error| error.at(place))?;
            let key = config.mode.key().to_vec();
            Ok((SinkKind::Delta(config), key))
        }
        #[cfg(feature = "redis")]
        "redis" => {
            let config = RedisConfig::from_options(options).map_err(placed)?;
            let (key, ttl_micros) = (config.key.clone(), config.ttl_micros());
            Ok((SinkKind::Online { store: OnlineKind::Redis(Box::new(config)), ttl_micros }, key))
        }
        "memory" => {
            let key = list(Some(options.required("key").map_err(placed)?));
            let ttl = options.duration("ttl").map_err(placed)?;
            let ttl_micros = ttl.and_then(|ttl| i64::try_from(ttl.as_micros()).ok());
            Ok((SinkKind::Online { store: OnlineKind::Memory, ttl_micros }, key))
        }
        #[cfg(feature = "kafka")]
        "kafka" => {
            let config = KafkaSinkConfig::from_options(options).map_err(placed)?;
            let key = config.key.clone();
            Ok((SinkKind::Kafka(config), key))
        }
        "ndjson" => {
            let place = options.place("partition_by").unwrap_or_else(|| sink.place.clone());
            let config = NdjsonConfig::from_options(options).map_err(placed)?;
            partition::check(&config.partition_by, schema).map_err(|error| error.at(place))?;
            Ok((SinkKind::Ndjson(config), Vec::new()))
        }
        "console" => {
            let format = ConsoleFormat::from_options(options).map_err(placed)?;
            Ok((SinkKind::Console(format), Vec::new()))
        }
        "blackhole" => Ok((SinkKind::Blackhole, Vec::new())),
        other => Err(Error::user(format!("sink {}: connector '{other}' is not known", sink.name))
            .hint(reference::hint(other, Role::Sink))
            .at(options.place("connector").unwrap_or_else(|| sink.place.clone()))),
    }
}

fn key_columns(sink: &CreateSink, schema: &SchemaRef, key: &[String]) -> Result<Vec<usize>> {
    key.iter()
        .map(|name| {
            schema.index_of(name).map_err(|_| {
                let known: Vec<String> = schema.fields().iter().map(|field| field.name().clone()).collect();
                let hint = match crate::sql::options::nearest(name, &known) {
                    Some(near) => format!("Did you mean {near}?"),
                    None => format!("Its columns are {}.", known.join(", ")),
                };
                let place = sink.options.place("key").unwrap_or_else(|| sink.place.clone());
                Error::user(format!("sink {}: key = '{name}' is no column of its rows", sink.name))
                    .hint(hint)
                    .at(place)
            })
        })
        .collect()
}

/// An online sink sees all rows of a key in one shard: by its own exchange below a stateless view; above OVER and GROUP
/// BY its key must be theirs, as otherwise the newest row of a sink key is not the newest row of a window key. It may
/// leave out windows that close: the newest row is that of the newest window.
fn online_exchange(sink: &CreateSink, lowered: &Lowered, key: &[usize]) -> Result<Option<Vec<usize>>> {
    let placed = |error: Error| error.at(sink.options.place("key").unwrap_or_else(|| sink.place.clone()));
    if lowered.filtered_above_window {
        let message =
            format!("sink {}: WHERE above a window is not kept by the emission 'latest'", sink.name);
        let hint = "Filter the source rows below the window, or write to a sink with the emission 'final'.";
        return Err(placed(Error::user(message).hint(hint)));
    }
    let Some(keys) = &lowered.keys else { return Ok(Some(key.to_vec())) };
    let known = |keys: &[Option<usize>]| keys.iter().copied().collect::<Option<BTreeSet<usize>>>();
    let (all, dealt, wanted) = (known(keys), known(&lowered.dealt), key.iter().copied().collect());
    let whole = all.as_ref() == Some(&wanted);
    let without_windows =
        dealt.is_some_and(|dealt| dealt.is_subset(&wanted)) && all.is_none_or(|all| wanted.is_subset(&all));
    if !whole && !without_windows {
        let clause = if lowered.updating { "GROUP BY" } else { "PARTITION BY" };
        let message = format!("sink {}: its key is not the {clause} of its view", sink.name);
        let hint = format!("Use the columns of {clause} as key, and keep them in the SELECT list.");
        return Err(placed(Error::user(message).hint(hint)));
    }
    if !whole && lowered.having {
        let message =
            format!("sink {}: HAVING above windows is not kept by a key without the window", sink.name);
        let hint = "Add window_start to the key, or write to a sink with the emission 'final'.";
        return Err(placed(Error::user(message).hint(hint)));
    }
    // Rows stay in their shard if it is the sink's too.
    let there = lowered.dealt.iter().copied().eq(key.iter().copied().map(Some));
    Ok((!there).then(|| key.to_vec()))
}

impl fmt::Display for SinkPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let emission = match self.emission {
            Emission::Final => "final",
            Emission::Latest => "latest",
            Emission::Changes => "changes",
        };
        match &self.kind {
            #[cfg(feature = "delta")]
            SinkKind::Delta(config) => {
                write!(f, "delta {}", config.stands_for.as_ref().unwrap_or(&config.location))?;
            }
            #[cfg(feature = "kafka")]
            SinkKind::Kafka(config) => write!(f, "kafka topic {}", config.topic)?,
            #[cfg(feature = "redis")]
            SinkKind::Online { store: OnlineKind::Redis(_), .. } => f.write_str("redis")?,
            SinkKind::Online { .. } => f.write_str("memory")?,
            SinkKind::Ndjson(config) => write!(f, "ndjson {}", config.location)?,
            SinkKind::Console(_) => f.write_str("console")?,
            SinkKind::Blackhole => f.write_str("blackhole")?,
            SinkKind::Collect(_) => f.write_str("collect")?,
        }
        write!(f, ", emission {emission}")?;
        if self.settled && self.emission == Emission::Latest {
            f.write_str(" at checkpoints")?;
        }
        if let SinkKind::Online { ttl_micros: Some(ttl), .. } = &self.kind {
            write!(f, ", ttl {}", interval::display_micros(*ttl))?;
        }
        if !self.key.is_empty() {
            let names: Vec<&str> =
                self.key.iter().map(|key| self.schema.field(*key).name().as_str()).collect();
            write!(f, ", key {}", names.join(", "))?;
        }
        Ok(())
    }
}
