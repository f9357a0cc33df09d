//! Kills at every step of the protocol (`stream::crash`), with Kafka, Redis, Delta, NDJSON, lake and state local or on S3.
//!
//! After the kills: every table is the batch answer (DuckDB), the accounts of the last manifest add up, the state
//! folder holds nothing that nobody needs, and a reader that polled Redis all the time saw no value go backward or
//! vanish. `MILLSTREAM_CRASH=all` kills at each step three times and at 50 moments more (CONTRIBUTING).

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::TryStreamExt;
use millstream::state::manifest::{FOLDERS, Manifest};
use millstream::state::store::StateStore;
use millstream::stream::clock::Clock;
use millstream::stream::crash::{Of, points};
use object_store::{ObjectStore, ObjectStoreExt};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{ClientConfig, Message};

use crate::case::{Case, Dice, create_topic, send, services};

/// Enough that one flush of all of them takes several script calls.
const USERS: u64 = 3_000;
const CHUNK: u64 = 1_500;
/// Longest wait for a step to be reached, rows arriving all the time.
const REACHED_WITHIN: Duration = Duration::from_secs(120);
const SIGABRT: i32 = 6;
const CRASH_AT: &str = "MILLSTREAM_CRASH_AT";

/// Beside the backup, the training table and the values served: totals as they change, in three ways, files, a topic.
const MORE: &str = "
CREATE VIEW user_totals AS
SELECT user_id, count(*) AS n, sum(amount) AS amount, max(event_time) AS last_at FROM transactions GROUP BY user_id;
CREATE SINK totals_now FROM user_totals
WITH (connector = 'delta', location = '${LAKE}/totals_now', mode = 'upsert', key = 'user_id');
CREATE SINK totals_changes FROM user_totals
WITH (connector = 'delta', location = '${LAKE}/totals_changes', mode = 'changelog');
CREATE SINK totals_serving FROM user_totals
WITH (connector = 'redis', url = '${REDIS_URL}', key = 'user_id', prefix = 'TOPIC-total:');
CREATE SINK feature_files FROM user_transaction_features
WITH (connector = 'ndjson', location = '${LAKE}/feature_files', partition_by = 'minute(event_time)');
CREATE SINK again FROM transactions
WITH (connector = 'kafka', bootstrap_servers = '${KAFKA_BROKERS}', topic = 'TOPIC-again', format = 'json');
";

/// What [`Crashes::produce`] has sent that is no row.
const BAD_PER_CHUNK: u64 = 3;

pub struct Crashes {
    pub case: Case,
    pub dice: Dice,
    chunks: u64,
    /// Between the checkpoints of [`Crashes::start`].
    interval: &'static str,
    watch: Option<Watch>,
}

impl Crashes {
    pub async fn new(name: &str, s3: bool) -> Option<Self> {
        let services = services(name)?;
        let bucket =
            std::env::var("MILLSTREAM_TEST_S3_BUCKET").unwrap_or_else(|_| "millstream-test".to_owned());
        if s3 && services.s3.is_none() {
            assert!(std::env::var("MILLSTREAM_REQUIRE_SERVICES").is_err(), "an S3 server is needed");
            println!("skipped {name}: no S3 server");
            return None;
        }
        let case = Case::new(services, name, s3.then(|| format!("s3://{bucket}"))).await;
        create_topic(&case.services.kafka, &format!("{}-again", case.topic), 2).await;
        let sql = fs::read_to_string(case.path("transactions.sql")).unwrap();
        fs::write(case.path("transactions.sql"), sql + &MORE.replace("TOPIC", &case.topic)).unwrap();
        let seed = std::env::var("MILLSTREAM_CRASH_SEED").ok().and_then(|seed| seed.parse().ok());
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        let seed = seed.unwrap_or_else(now);
        println!("{name}: MILLSTREAM_CRASH_SEED={seed}");
        let watch = Watch::start(&case.services.redis, &case.topic);
        Some(Self { case, dice: Dice(seed), chunks: 0, interval: "100ms", watch: Some(watch) })
    }

    /// Rows of a few seconds, disordered by less than the lateness but for one in fifty, and records that are no rows.
    pub async fn produce(&mut self, count: u64) {
        let (case, dice) = (&mut self.case, &mut self.dice);
        let mut rows = Vec::new();
        for i in case.produced..case.produced + count {
            let user = dice.roll(USERS);
            let late = if dice.roll(50) == 0 { 120_000 } else { 0 };
            let millis = case.start + i * 10 - dice.roll(4_000) - late;
            let cents = dice.roll(2_000_000) as i64 - 1_000_000;
            let amount =
                format!("{}{}.{:02}", if cents < 0 { "-" } else { "" }, cents.abs() / 100, cents.abs() % 100);
            let json = format!(
                "{{\"user_id\": {user}, \"transaction_timestamp_millis\": {millis}, \"amount\": {amount}, \
                 \"currency\": \"EUR\", \"counterpart_id\": {i}}}"
            );
            let line = format!("\"user_id\":{user},\"t\":{millis},\"amount\":{amount}");
            rows.push((user.to_string(), json, line));
        }
        let places = send(
            &case.services.kafka,
            &case.topic,
            rows.iter().map(|(key, json, _)| (Some(key.as_str()), Some(json.as_str()))),
        )
        .await;
        let lines =
            rows.iter().zip(places).map(|((_, _, line), (p, o))| format!("{{\"p\":{p},\"o\":{o},{line}}}\n"));
        use std::io::Write;
        let path = case.path("produced.ndjson");
        let mut file = fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
        file.write_all(lines.collect::<String>().as_bytes()).unwrap();
        case.produced += count;
        self.chunks += 1;
        case.send_raw(&[Some("not json"), Some(r#"{"user_id": "x"}"#), Some("{\"user_id\": 1.5")]).await;
    }

    pub fn parallelism(&mut self) -> String {
        (1 + self.dice.roll(3)).to_string()
    }

    /// Starts the pipeline, with a step in an environment variable of `stream::crash`.
    pub fn start(&mut self, variable: &str, at: Option<&str>) -> Child {
        // One shard writes all keys: a flush takes several calls.
        let parallelism =
            if at.is_some_and(|at| at.contains("between")) { "1".to_owned() } else { self.parallelism() };
        let arguments = ["--checkpoint", self.interval, "--parallelism", &parallelism];
        let mut command = self.case.command(&self.case.run_arguments(&arguments));
        if let Some(at) = at {
            command.env(variable, at);
        }
        let log = fs::File::create(self.case.path("stderr.log")).unwrap();
        command.stdout(Stdio::null()).stderr(log).spawn().unwrap()
    }

    /// Runs until the process kills itself at a step, rows arriving all the time.
    async fn crash_at(&mut self, at: &str) {
        println!("  {at}");
        let many = at.contains("between");
        self.produce(if many { 5 * CHUNK } else { CHUNK }).await;
        let mut process = self.start(CRASH_AT, Some(at));
        let begun = Instant::now();
        loop {
            for _ in 0..20 {
                if let Some(status) = process.try_wait().unwrap() {
                    let log = fs::read_to_string(self.case.path("stderr.log")).unwrap();
                    assert_eq!(status.signal(), Some(SIGABRT), "{at}: {status}\n{log}");
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            if begun.elapsed() > REACHED_WITHIN {
                process.kill().unwrap();
                process.wait().unwrap();
                panic!("{at} is never passed\n{}", fs::read_to_string(self.case.path("stderr.log")).unwrap());
            }
            // Epochs of a second shall have rows for every table: a chunk is longer than the lateness.
            self.produce(if self.interval == "1s" { CHUNK } else { CHUNK / 10 }).await;
        }
    }

    /// Kills at some moment, the start included.
    async fn crash_somewhere(&mut self) {
        let wait = self.dice.roll(1_800);
        println!("  after {wait} ms");
        let mut process = self.start(CRASH_AT, None);
        self.produce(CHUNK / 10).await;
        tokio::time::sleep(Duration::from_millis(wait)).await;
        assert!(
            process.try_wait().unwrap().is_none(),
            "{}",
            fs::read_to_string(self.case.path("stderr.log")).unwrap()
        );
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Runs to the end and checks everything.
    pub async fn finish(&mut self) {
        self.produce(CHUNK).await;
        let parallelism = self.parallelism();
        self.case.finish(&parallelism);
        self.unwatch();
        let manifest = self.check_state().await;
        let read = self.case.produced + self.chunks * BAD_PER_CHUNK;
        let accounts = manifest.sources["transactions"].accounts;
        assert!(accounts.balanced(), "{accounts:?}");
        assert_eq!((accounts.read, accounts.accepted), (read, self.case.produced), "{accounts:?}");
        assert_eq!(accounts.dead_letters, self.chunks * BAD_PER_CHUNK, "{accounts:?}");
        let letters: u64 = manifest.dead_letters.iter().map(|segment| segment.rows).sum();
        let late: u64 = manifest.ledger.iter().map(|segment| segment.rows).sum();
        assert_eq!((letters, late), (accounts.dead_letters, accounts.late), "segments against accounts");
        assert!(late > 0, "no row was late");
        self.check_tables().await;
        self.check_topic();
    }

    /// The state folder holds what the last manifest names and the manifests kept; gives that manifest, its ledger
    /// lies in the case's folder then.
    pub async fn check_state(&self) -> Manifest {
        let located = store(&self.case, &self.case.state);
        let state = StateStore::new(Arc::clone(&located), object_store::path::Path::default(), Clock);
        let manifest = self.manifest().await;
        assert!(manifest.closed);
        let mut found = BTreeSet::new();
        for folder in FOLDERS {
            let below = object_store::path::Path::from(folder);
            let listed: Vec<_> = located.list(Some(&below)).try_collect().await.unwrap();
            found.extend(listed.into_iter().map(|meta| meta.location.to_string()));
        }
        let needed: BTreeSet<String> = manifest.referenced().into_iter().map(str::to_owned).collect();
        assert_eq!(found, needed, "files of the state folder against those that the last manifest names");
        fs::create_dir_all(self.case.path("ledger")).unwrap();
        for (at, segment) in manifest.ledger.iter().enumerate() {
            let bytes = state.get_file(&segment.path).await.unwrap();
            fs::write(self.case.path(&format!("ledger/{at}.parquet")), bytes).unwrap();
        }
        manifest
    }

    /// The newest one.
    pub async fn manifest(&self) -> Manifest {
        let located = store(&self.case, &self.case.state);
        let state = StateStore::new(located, object_store::path::Path::default(), Clock);
        state.latest().await.unwrap().unwrap()
    }

    /// No value that was served went backward or vanished.
    pub fn unwatch(&mut self) {
        if let Some(watch) = self.watch.take() {
            watch.stop();
        }
    }

    async fn check_tables(&self) {
        let case = &self.case;
        case.verify_with(&["--ledger", case.path("ledger").to_str().unwrap()]);
        let totals = "SELECT user_id, count(*) AS n, round(sum(amount), 2) AS amount, max(event_time) AS last_at FROM backup
                      GROUP BY user_id";
        let now = "SELECT user_id, n, round(amount, 2) AS amount, last_at FROM now";
        case.same("backup=transactions_backup,now=totals_now", now, totals, 1_000);
        let accumulated = "SELECT user_id, n, round(amount, 2) AS amount, last_at FROM changes GROUP BY ALL HAVING sum(_weight) <> 0";
        case.same("backup=transactions_backup,changes=totals_changes", accumulated, totals, 1_000);
        let served = case
            .query("SELECT user_id, n, round(amount, 2) AS amount, last_at FROM totals_serving ORDER BY 1");
        let expected =
            case.query("SELECT user_id, n, round(amount, 2) AS amount, last_at FROM totals_now ORDER BY 1");
        assert!(served == expected, "totals served are not those of the table");
        let lines = self.lines().await;
        fs::write(case.path("features.ndjson"), &lines).unwrap();
        let columns = "user_id, epoch_us(event_time) AS t, total_transactions_count AS n, round(amount_7d, 4) AS amount";
        let from_files = format!(
            "SELECT {columns} FROM read_json('{}', format = 'newline_delimited', columns = {{user_id: 'BIGINT',
             event_time: 'TIMESTAMP', total_transactions_count: 'BIGINT', amount_7d: 'DOUBLE'}})",
            case.path("features.ndjson").display()
        );
        case.same("training=user_features", &from_files, &format!("SELECT {columns} FROM training"), 1_000);
    }

    /// All lines of the NDJSON sink, as a reader finds them; nothing is left staged.
    async fn lines(&self) -> Vec<u8> {
        let located = store(&self.case, &format!("{}/feature_files", self.case.lake));
        let listed: Vec<_> = located.list(None).try_collect().await.unwrap();
        let mut lines = Vec::new();
        for meta in listed {
            assert!(meta.location.as_ref().ends_with(".ndjson"), "{} is left", meta.location);
            lines.extend_from_slice(&located.get(&meta.location).await.unwrap().bytes().await.unwrap());
        }
        lines
    }

    /// At least once: each row is in the topic.
    fn check_topic(&self) {
        let topic = format!("{}-again", self.case.topic);
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.case.services.kafka).set("group.id", &self.case.topic);
        let consumer: BaseConsumer = config.create().unwrap();
        let (mut list, mut left) = (rdkafka::TopicPartitionList::new(), HashMap::new());
        for partition in 0..2 {
            let (low, high) = consumer.fetch_watermarks(&topic, partition, Duration::from_secs(20)).unwrap();
            list.add_partition_offset(&topic, partition, rdkafka::Offset::Offset(low)).unwrap();
            // Records without a key go to one partition for some time: all of a short run may be in the other.
            if high > low {
                left.insert(partition, high);
            }
        }
        consumer.assign(&list).unwrap();
        let (mut seen, begun) = (BTreeSet::new(), Instant::now());
        while !left.is_empty() {
            assert!(begun.elapsed() < REACHED_WITHIN, "{topic} is not read to its end: {left:?}");
            let Some(message) = consumer.poll(Duration::from_secs(5)) else { continue };
            let message = message.unwrap();
            let row: serde_json::Value = serde_json::from_slice(message.payload().unwrap()).unwrap();
            seen.insert(row["counterpart_id"].as_u64().unwrap());
            left.retain(|partition, high| *partition != message.partition() || message.offset() + 1 < *high);
        }
        assert_eq!(seen.len() as u64, self.case.produced, "rows in the topic of the Kafka sink");
    }
}

/// A store at a location of the case.
pub fn store(case: &Case, location: &str) -> Arc<dyn ObjectStore> {
    let Some(path) = location.strip_prefix("s3://") else {
        return millstream::connectors::files::open(location).unwrap().store;
    };
    let (bucket, prefix) = path.split_once('/').unwrap();
    let store = object_store::aws::AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_endpoint(case.services.s3.as_ref().unwrap())
        .with_allow_http(true)
        .build()
        .unwrap();
    Arc::new(object_store::prefix::PrefixStore::new(store, prefix))
}

/// Reads every user's features and totals again and again: time and count never fall, and who was seen stays.
struct Watch {
    done: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<(u64, Vec<String>)>,
}

impl Watch {
    fn start(url: &str, prefix: &str) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let (stop, client, prefix) =
            (Arc::clone(&done), redis::Client::open(url).unwrap(), prefix.to_owned());
        let thread = std::thread::spawn(move || {
            let mut connection = client.get_connection().unwrap();
            let mut ask = redis::pipe();
            for user in 0..USERS {
                ask.cmd("HMGET")
                    .arg(format!("{prefix}:{user}"))
                    .arg("event_time")
                    .arg("total_transactions_count");
                ask.cmd("HMGET").arg(format!("{prefix}-total:{user}")).arg("last_at").arg("n");
            }
            let (mut looks, mut faults) = (0, Vec::new());
            // Twice a user's number, plus one for its total.
            let mut last: HashMap<usize, (String, u64)> = HashMap::new();
            while !stop.load(Ordering::Relaxed) {
                let rows: Vec<(Option<String>, Option<u64>)> = ask.query(&mut connection).unwrap();
                looks += 1;
                for (user, row) in rows.into_iter().enumerate() {
                    match (row, last.get(&user)) {
                        ((Some(time), Some(count)), before) => {
                            // Without its `Z` the text of an instant sorts as the instant does:
                            // a whole second has no fraction.
                            let time = time.trim_end_matches('Z').to_owned();
                            if before.is_some_and(|(at, n)| time < *at || count < *n) {
                                faults.push(format!("{user}: {before:?}, then {time} {count}"));
                            }
                            last.insert(user, (time, count));
                        }
                        (_, Some(before)) => faults.push(format!("{user}: {before:?}, then nothing")),
                        _ => {}
                    }
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            assert!(last.len() as u64 > USERS, "the reader saw {} values only", last.len());
            (looks, faults)
        });
        Self { done, thread }
    }

    fn stop(self) {
        self.done.store(true, Ordering::Relaxed);
        let (looks, faults) = self.thread.join().unwrap();
        assert!(
            faults.is_empty(),
            "values went backward {} times in {looks} looks: {:?}",
            faults.len(),
            &faults[..faults.len().min(5)]
        );
        println!("  a reader looked {looks} times and saw no value go backward");
    }
}

/// Whether to run everything, which takes long.
pub fn all() -> bool {
    std::env::var("MILLSTREAM_CRASH").is_ok_and(|value| value == "all")
}

/// The steps in a random order, those of a first start in front.
fn shuffled(steps: impl Iterator<Item = &'static str>, dice: &mut Dice) -> Vec<&'static str> {
    let first = |name: &&str| ["claim", "table", "redis.fence"].iter().any(|start| name.starts_with(start));
    let (mut all, mut rest): (Vec<_>, Vec<_>) = steps.partition(first);
    // A table is created once.
    all.sort_by_key(|name| !name.starts_with("claim"));
    for at in (1..rest.len()).rev() {
        rest.swap(at, dice.roll(at as u64 + 1) as usize);
    }
    all.extend(rest);
    all
}

async fn matrix(name: &str, s3: bool) {
    let Some(mut crashes) = Crashes::new(name, s3).await else { return };
    let begun = Instant::now();
    let all = all();
    let steps =
        points(Of::Epoch).enumerate().filter(|(at, _)| all || (at % 2 == 1) == s3).map(|(_, name)| name);
    let mut cases = 0;
    for step in shuffled(steps, &mut crashes.dice) {
        // Before the tables are there nothing else may make them.
        let once = step.starts_with("claim") || step.starts_with("table");
        let times = match step {
            _ if once || !all => 1,
            // Once per online sink.
            "redis.fence.before" | "redis.fence.after" => 2,
            _ => 3,
        };
        if step.starts_with("replay") {
            // The steps before it may all lie before the first manifest that has something to replay.
            crashes.crash_at("manifest.after:2").await;
            cases += 1;
        }
        for nth in 1..=times {
            crashes.crash_at(&format!("{step}:{nth}")).await;
            cases += 1;
            if !once && crashes.dice.roll(3) == 0 {
                crashes.crash_somewhere().await;
                cases += 1;
            }
        }
    }
    for _ in 0..if all { 25 } else { 0 } {
        crashes.crash_somewhere().await;
        cases += 1;
    }
    crashes.finish().await;
    println!("{name}: {cases} kills in {:.0} s", begun.elapsed().as_secs_f64());
}

/// The newest manifest, and what it has prepared for a table: (sink, location, file).
async fn prepared(case: &Case) -> (Manifest, Vec<(String, String, String)>) {
    let state = StateStore::new(store(case, &case.state), object_store::path::Path::default(), Clock);
    let manifest = state.latest().await.unwrap().unwrap();
    let tables = ["transactions_backup", "user_features_training", "totals_now", "totals_changes"];
    let ours = manifest.commits.iter().filter(|commit| tables.contains(&commit.sink.as_str()));
    let files = ours.flat_map(|commit| {
        commit.files.iter().map(|file| (commit.sink.clone(), commit.location.clone(), file.path.clone()))
    });
    let files = files.collect();
    (manifest, files)
}

/// All entries of a table's log.
async fn log_of(table: &Arc<dyn ObjectStore>) -> String {
    let folder = object_store::path::Path::from("_delta_log");
    let listed: Vec<_> = table.list(Some(&folder)).try_collect().await.unwrap();
    let mut text = String::new();
    for meta in listed.iter().filter(|meta| meta.location.as_ref().ends_with(".json")) {
        let bytes = table.get(&meta.location).await.unwrap().bytes().await.unwrap();
        text.push_str(&String::from_utf8_lossy(&bytes));
    }
    text
}

/// Kills at a step until the epoch that it falls into has rows for every table.
async fn crash_with_rows(crashes: &mut Crashes, at: &str) -> (Manifest, Vec<(String, String, String)>) {
    for _ in 0..10 {
        crashes.crash_at(at).await;
        let (manifest, files) = prepared(&crashes.case).await;
        let sinks: BTreeSet<&str> = files.iter().map(|(sink, _, _)| sink.as_str()).collect();
        if sinks.len() == 4 && manifest.previous_data_epoch.is_some() {
            return (manifest, files);
        }
    }
    panic!("{at}: no epoch had rows for every table");
}

/// Somebody else's VACUUM takes files away between the manifest that names them and their commit: the epoch is made
/// again, for all tables or for those that have not committed it, also if that is interrupted.
#[tokio::test(flavor = "multi_thread")]
async fn prepared_files_that_are_gone_are_made_again() {
    let Some(mut crashes) = Crashes::new("lost", false).await else { return };
    crashes.interval = "1s";
    crashes.produce(CHUNK).await;
    let out = crashes.case.run(&["--until-end", "--checkpoint", "100ms"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let mut made_again = BTreeSet::new();
    let rounds = [
        "manifest.after:1",
        "delta.commit.after:1",
        "delta.commit.after:3",
        "upsert.after:1",
        "manifest.after:2",
    ];
    for (round, at) in rounds.into_iter().enumerate() {
        let (manifest, files) = crash_with_rows(&mut crashes, at).await;
        let mut left = Vec::new();
        for (_, location, path) in &files {
            let table = store(&crashes.case, location);
            // What is committed belongs to the table.
            if !log_of(&table).await.contains(path.rsplit('/').next().unwrap()) {
                left.push((table, object_store::path::Path::parse(path).unwrap()));
            }
        }
        for (nth, (table, path)) in left.iter().enumerate() {
            // All of them, or some; the table that comes last is never committed yet.
            if round % 2 == 0 || nth % 2 == 0 || nth + 1 == left.len() {
                // A MERGE that is done has removed its files.
                table.delete(path).await.ok();
            }
        }
        if round == 2 {
            // Interrupted, it leaves all as it was.
            crashes.crash_at("state.after:1").await;
        }
        let parallelism = crashes.parallelism();
        let log = crashes.case.run(&["--until-end", "--checkpoint", "100ms", "--parallelism", &parallelism]);
        let log = String::from_utf8_lossy(&log.stderr).into_owned();
        let (after, _) = prepared(&crashes.case).await;
        assert!(after.data_epoch > manifest.data_epoch, "{at}: it did not go on\n{log}");
        let lines: Vec<&str> = log.lines().filter(|line| line.contains("the epoch is made again")).collect();
        assert!(!lines.is_empty(), "{at}: nothing was made again\n{log}");
        for line in lines {
            assert!(line.contains(&format!("epoch={}", manifest.data_epoch.unwrap())), "{at}: {line}");
            let sink =
                files.iter().map(|(sink, _, _)| sink).find(|sink| line.contains(&format!("sink={sink} ")));
            made_again.extend(sink.cloned());
        }
    }
    assert_eq!(made_again.len(), 4, "{made_again:?}");
    crashes.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_step_changes_nothing() {
    matrix("crash", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_step_changes_nothing_on_s3() {
    matrix("crash_s3", true).await;
}
