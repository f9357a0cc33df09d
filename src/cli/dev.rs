//! `millstream dev`: everything embedded. An in-process Kafka, the producer pipeline beside the pipeline itself, a
//! local lake, and a memory store where no Redis answers.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::sync::watch;

use super::{Files, live, load_with, pipeline_name, progress};
use crate::connectors::kafka::EmbeddedKafka;
use crate::connectors::kafka::bad::BadRecords;
use crate::error::{Error, Result};
use crate::plan::{NodeKind, OnlineKind, SinkKind, SinkPlan, SourceKind, StreamPlan};
use crate::runtime::{Metrics, RunOptions};

const PARTITIONS: i32 = 4;
/// How long a fetch waits for records; librdkafka's own is 500.
const FETCH_WAIT_MS: &str = "10";

#[derive(Debug, Args)]
pub struct DevArgs {
    #[command(flatten)]
    files: Files,
    /// A line every second instead of the live view, on a terminal too.
    #[arg(long)]
    plain: bool,
    /// Breaks every N-th record of the sample producer, in turn: cut off, a NOT NULL field left out, a text in a field
    /// of another type, an event time in the year 2099. They become dead letters and the pipeline goes on.
    #[arg(long, value_name = "N")]
    inject_bad: Option<NonZeroU64>,
}

/// Runs until Ctrl-C, then says what to try next.
pub async fn run(args: DevArgs) -> Result<()> {
    let files = args.files;
    let broker = EmbeddedKafka::start(PARTITIONS)?;
    let name = format!("{}-dev", pipeline_name(&files, None, &[])?);
    let state = super::state_of(&files, None, &name)?;
    let brokers = [("KAFKA_BROKERS".to_owned(), broker.bootstrap_servers().to_owned())];
    let mut plan = crate::plan::sinks::plan(&load_with(&files, &brokers)?, &[]).await?;
    let memory = prepare(&mut plan, &broker, &state).await?;
    plan.resolve_secrets(&super::environment)?;
    let looked_at = sinks(&plan);
    let mut producer = producer(&files, &brokers).await?;
    if let Some(every) = args.inject_bad {
        match &mut producer {
            Some((producer, _)) => inject_bad(producer, &plan, every),
            None => return Err(no_producer(&files)),
        }
    }
    let metrics = Metrics::of(&plan);
    let (stop, stopped) = watch::channel(false);
    let (stop_producer, producer_stopped) = watch::channel(false);
    let signals = progress::on_signal(stop_producer, Arc::clone(&metrics), true)?;
    eprintln!("dev: embedded kafka at {}, state in {state}", broker.bootstrap_servers());
    if memory {
        eprintln!("dev: no Redis answers, newest values stay in memory and in the state folder");
    }
    let main = crate::runtime::run(plan, options(&name, &state), Arc::clone(&metrics), stopped);
    let show = live::Show { plain: args.plain, title: format!("dev {name}"), sample: true };
    let lines = live::show(Arc::clone(&metrics), show)?;
    // The producer stops first and the pipeline reads on for a moment, as the embedded broker forgets.
    let feed = async {
        let fed = match producer {
            Some((plan, name)) => {
                let options = options(&name, &format!("./.millstream/{name}"));
                crate::runtime::run(plan, options, Arc::default(), producer_stopped).await.map(|_| ())
            }
            None => {
                let mut stopped = producer_stopped;
                stopped
                    .wait_for(|stop| *stop)
                    .await
                    .map(|_| ())
                    .map_err(|_| Error::internal("no signal can come"))
            }
        };
        tokio::time::sleep(Duration::from_millis(500)).await;
        stop.send_replace(true);
        fed
    };
    let both = async { tokio::try_join!(main, feed) };
    tokio::select! {
        done = both => done.map(|_| ())?,
        ended = signals => return Err(ended),
        never = lines => match never {},
    }
    eprintln!("{}", progress::line(&metrics, 0));
    hints(&files, &state, &looked_at);
    Ok(())
}

fn options(name: &str, state: &str) -> RunOptions {
    RunOptions {
        name: name.to_owned(),
        state: state.to_owned(),
        parallelism: 1,
        checkpoint: Duration::from_secs(1),
        until_end: false,
        close: false,
        memory: crate::runtime::memory::default_budget(),
        allow_gap: false,
        rebuild: false,
        console: super::output::console,
    }
}

/// Creates topics, sets the base of their offsets, leaves log-in and TLS of Kafka out, and puts memory in the place of a Redis that does not answer.
async fn prepare(plan: &mut StreamPlan, broker: &EmbeddedKafka, state: &str) -> Result<bool> {
    let positions = crate::runtime::stored_positions(plan, state).await?;
    let mut memory = false;
    for node in &mut plan.nodes {
        match &mut node.kind {
            NodeKind::Source(source) => {
                // The embedded topic is new in each process: its offsets say nothing of an older backup.
                source.backup = None;
                if let SourceKind::Kafka(config) = &mut source.kind {
                    broker.ensure_topic(&config.topic)?;
                    config.settings.without_security();
                    (config.offset_base, config.is_embedded) = (positions.clone(), true);
                    // The embedded broker answers an early fetch at its end only, not when records come.
                    config.settings.extra.insert(
                        0,
                        (
                            "fetch.wait.max.ms".to_owned(),
                            crate::sql::options::Guarded::Plain(FETCH_WAIT_MS.to_owned()),
                        ),
                    );
                }
            }
            NodeKind::Sink(SinkPlan { kind: SinkKind::Kafka(config), .. }) => {
                config.settings.without_security();
            }
            NodeKind::Sink(sink) => {
                #[cfg(feature = "redis")]
                if let SinkKind::Online { store, .. } = &mut sink.kind
                    && let OnlineKind::Redis(config) = store
                    && !answers(&config.url).await
                {
                    *store = OnlineKind::Memory;
                    memory = true;
                }
            }
            _ => {}
        }
    }
    Ok(memory)
}

async fn answers(url: &str) -> bool {
    let Ok(url) = url::Url::parse(url) else { return false };
    let address = (url.host_str().unwrap_or("localhost").to_owned(), url.port().unwrap_or(6379));
    let connect = tokio::net::TcpStream::connect(address);
    matches!(tokio::time::timeout(Duration::from_millis(500), connect).await, Ok(Ok(_)))
}

/// The plan of the first `F_producer.sql` that lies beside an `F.sql`.
async fn producer(files: &Files, brokers: &[(String, String)]) -> Result<Option<(StreamPlan, String)>> {
    let beside = |file: &PathBuf| {
        let stem = file.file_stem()?.to_string_lossy().into_owned();
        let path = file.with_file_name(format!("{stem}_producer.sql"));
        path.is_file().then_some((path, stem))
    };
    let Some((path, stem)) = files.files.iter().find_map(beside) else { return Ok(None) };
    let files = Files { files: vec![path], set: files.set.clone(), sandbox: files.sandbox.clone() };
    let mut plan = crate::plan::sinks::plan(&load_with(&files, brokers)?, &[]).await?;
    for node in &mut plan.nodes {
        if let NodeKind::Sink(SinkPlan { kind: SinkKind::Kafka(config), .. }) = &mut node.kind {
            config.settings.without_security();
        }
    }
    Ok(Some((plan, format!("{stem}_producer-dev"))))
}

fn no_producer(files: &Files) -> Error {
    let first = files.files.first().and_then(|file| file.file_stem());
    let name = first.map_or("F".into(), |stem| stem.to_string_lossy());
    Error::user("--inject-bad breaks records of the sample producer, and there is none")
        .hint(format!("Name the SQL file beside which {name}_producer.sql lies."))
}

/// Makes the producer's sinks break records that the source of `plan` reads.
fn inject_bad(producer: &mut StreamPlan, plan: &StreamPlan, every: NonZeroU64) {
    let Some((_, source)) = plan.source() else { return };
    let SourceKind::Kafka(read) = &source.kind else { return };
    let fields = || source.physical.fields().iter();
    let required = fields().find(|field| !field.is_nullable());
    let textual = |field: &&arrow::datatypes::FieldRef| {
        use arrow::datatypes::DataType;
        matches!(field.data_type(), DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View)
    };
    let typed = fields().find(|field| !textual(field));
    let bad = BadRecords {
        every,
        required: required.map(|field| field.name().clone()),
        typed: typed.map(|field| field.name().clone()),
        time: source.fields_of_event_time(),
    };
    for node in &mut producer.nodes {
        if let NodeKind::Sink(SinkPlan { kind: SinkKind::Kafka(config), .. }) = &mut node.kind
            && config.topic == read.topic
        {
            config.bad = Some(bad.clone());
        }
    }
}

/// What there is to look at afterwards: every sink whose rows can be queried, and where a table lies.
fn sinks(plan: &StreamPlan) -> Vec<(String, Option<String>)> {
    let readable = |sink: &SinkPlan| match &sink.kind {
        #[cfg(feature = "delta")]
        SinkKind::Delta(config) => {
            // The files of an upserted table hold rows that were replaced: not for readers of plain Parquet.
            let plain = config.mode == crate::connectors::delta::Mode::Append;
            Some((sink.name.clone(), plain.then(|| config.location.clone())))
        }
        SinkKind::Online { .. } => Some((sink.name.clone(), None)),
        _ => None,
    };
    plan.sinks().filter_map(|(_, sink)| readable(sink)).collect()
}

/// The commands to try next, as this program was started.
fn hints(files: &Files, state: &str, sinks: &[(String, Option<String>)]) {
    #[expect(clippy::disallowed_methods, reason = "cargo run sets CARGO; the hint should work as it stands")]
    let program = match std::env::var_os("CARGO") {
        Some(_) => "cargo run -q --release --".to_owned(),
        None => std::env::args().next().unwrap_or_else(|| "millstream".to_owned()),
    };
    let shown: Vec<String> = files.files.iter().map(|file| file.display().to_string()).collect();
    let files = shown.join(" ");
    eprintln!("\nTry next:");
    for (sink, _) in sinks {
        eprintln!("  {program} query {files} --state {state} -c 'SELECT * FROM {sink} LIMIT 5'");
    }
    // The last table is the one furthest down the pipeline.
    if let Some(location) = sinks.iter().rev().find_map(|(_, location)| location.as_ref()) {
        eprintln!(
            "  duckdb -c \"SELECT * FROM read_parquet('{location}/**/*.parquet', hive_partitioning = false) LIMIT 5\""
        );
        eprintln!(
            "  python3 -c \"from deltalake import DeltaTable, QueryBuilder; t = DeltaTable('{location}'); \
             print(QueryBuilder().register('t', t).execute('SELECT * FROM t LIMIT 5').read_all())\""
        );
    }
}
