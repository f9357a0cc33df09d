//! A Redis Cluster as sink and table: the promises of a single Redis hold per key while nodes, slots and processes fail.
//! Every cluster is one of the test's own.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{sleep, spawn};
use std::time::Duration;

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use millstream::connectors::redis::{RedisConfig, connect};
use millstream::connectors::{Flushed, OnlineStore, OnlineWrite};
use millstream::sql::options::Options;
use millstream::stream::{Place, Positions};
use redis::cluster::{ClusterClient, ClusterConnection};

use crate::case::{Case, Dice, services};
use crate::online::OwnRedis;

const MASTERS: usize = 3;
const LOST: &str = "the online store lost what it had";

/// Three masters with a third of the slots each, and a replica of the first one.
struct OwnCluster {
    nodes: Vec<OwnRedis>,
    buses: Vec<u16>,
    folders: Vec<tempfile::TempDir>,
}

fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn start_node(port: u16, bus: u16, folder: &tempfile::TempDir) -> OwnRedis {
    let (bus, folder) = (bus.to_string(), folder.path().to_string_lossy().into_owned());
    let words = ["--dir", &folder, "--cluster-enabled", "yes", "--cluster-port", &bus].to_vec();
    // A failover within seconds; a node that is slow for a moment is not given up.
    let patient = ["--cluster-node-timeout", "3000", "--repl-diskless-sync-delay", "0"].to_vec();
    OwnRedis::start_with(port, &[words, patient].concat())
}

impl OwnCluster {
    fn start() -> Self {
        let folders: Vec<_> = (0..=MASTERS).map(|_| tempfile::tempdir().unwrap()).collect();
        let buses: Vec<u16> = folders.iter().map(|_| port()).collect();
        let nodes =
            folders.iter().zip(&buses).map(|(folder, bus)| start_node(port(), *bus, folder)).collect();
        let cluster = Self { nodes, buses, folders };
        let mut words: Vec<String> = ["--cluster", "create"].map(str::to_owned).to_vec();
        words.extend(cluster.nodes[..MASTERS].iter().map(|node| format!("127.0.0.1:{}", node.port())));
        words.push("--cluster-yes".to_owned());
        cluster.cli(&words.iter().map(String::as_str).collect::<Vec<_>>());
        wait_for("the cluster", || cluster.nodes[..MASTERS].iter().all(|node| knows(node, MASTERS)));
        cluster
    }

    /// Makes the last node a replica of the first, and waits until it has everything.
    fn replicate(&self) {
        let (first, replica) = (&self.nodes[0], &self.nodes[MASTERS]);
        let bus = self.buses[0];
        assert_eq!(replica.ask(&format!("CLUSTER MEET 127.0.0.1 {} {bus}", first.port())), "+OK");
        wait_for("the meeting", || knows(replica, MASTERS + 1));
        assert_eq!(replica.ask(&format!("CLUSTER REPLICATE {}", self.id(0))), "+OK");
        wait_for("the replica", || info(replica, "INFO replication").contains("master_link_status:up"));
        wait_for("word of it", || self.nodes.iter().all(|node| knows(node, MASTERS + 1)));
    }

    fn id(&self, node: usize) -> String {
        self.nodes[node].ask("CLUSTER MYID").lines().last().unwrap().to_owned()
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.nodes[1].port())
    }

    /// redis-cli, which must succeed.
    fn cli(&self, words: &[&str]) {
        let out = Command::new("redis-cli").args(words).output().unwrap();
        let said =
            format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{words:?}: {said}");
    }

    /// Begins to move slots with all that is in them.
    fn reshard(&self, from: usize, to: usize, slots: u64) -> Child {
        let at = format!("127.0.0.1:{}", self.nodes[to].port());
        let agreed = || {
            Command::new("redis-cli")
                .args(["--cluster", "check", &at])
                .stdout(Stdio::null())
                .status()
                .unwrap()
        };
        wait_for("nodes that agree", || agreed().success());
        let (from, to, slots) = (self.id(from), self.id(to), slots.to_string());
        let words = ["--cluster", "reshard", &at, "--cluster-from", &from, "--cluster-to", &to];
        let mut command = Command::new("redis-cli");
        command.args(words).args(["--cluster-slots", &slots, "--cluster-yes"]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    fn client(&self) -> ClusterConnection {
        let urls: Vec<String> =
            self.nodes.iter().map(|node| format!("redis://127.0.0.1:{}", node.port())).collect();
        ClusterClient::new(urls).unwrap().get_connection().unwrap()
    }

    /// Rows of every master, bookkeeping left out.
    fn rows(&self, prefix: &str) -> Vec<usize> {
        self.nodes[..MASTERS].iter().map(|node| names(node, &format!("{prefix}:*")).len()).collect()
    }
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..1_200 {
        if done() {
            return;
        }
        sleep(Duration::from_millis(100));
    }
    panic!("{what}: not within 120 s");
}

/// The whole answer to a command.
fn info(node: &OwnRedis, command: &str) -> String {
    let words: Vec<&str> = command.split(' ').collect();
    let out = Command::new("redis-cli").args(["-p", &node.port().to_string()]).args(words).output().unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn names(node: &OwnRedis, pattern: &str) -> Vec<String> {
    info(node, &format!("KEYS {pattern}"))
        .lines()
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect()
}

/// It takes commands and has heard of all.
fn knows(node: &OwnRedis, nodes: usize) -> bool {
    let facts = info(node, "CLUSTER INFO");
    facts.contains("cluster_state:ok") && facts.contains(&format!("cluster_known_nodes:{nodes}\r"))
}

/// What is served of a user, if the cluster answers.
fn count(connection: &mut ClusterConnection, key: &str) -> Option<u64> {
    redis::cmd("HGET").arg(key).arg("total_transactions_count").query(connection).ok().flatten()
}

/// Looks at the counts of some users again and again: none ever falls. One that is away for a while is none.
struct Reader {
    done: Arc<AtomicBool>,
    looks: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<Vec<String>>,
}

impl Reader {
    fn start(cluster: &OwnCluster, prefix: &str) -> Self {
        let (done, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stop, seen, prefix) = (Arc::clone(&done), Arc::clone(&looks), prefix.to_owned());
        let mut connection = cluster.client();
        let thread = spawn(move || {
            let (mut last, mut faults) = (HashMap::<u64, u64>::new(), Vec::new());
            while !stop.load(Ordering::Relaxed) {
                for user in 0..40 {
                    let Some(count) = count(&mut connection, &format!("{prefix}:{user}")) else { continue };
                    let before = last.insert(user, count).unwrap_or(0);
                    if count < before {
                        faults.push(format!("user {user}: {before}, then {count}"));
                    }
                    seen.fetch_add(1, Ordering::Relaxed);
                }
                sleep(Duration::from_millis(5));
            }
            faults
        });
        Self { done, looks, thread }
    }

    fn stop(self) {
        let looks = || self.looks.load(Ordering::Relaxed);
        let enough = looks() + 200;
        wait_for("a reader", || looks() >= enough);
        println!("a reader saw {} values", looks());
        self.done.store(true, Ordering::Relaxed);
        let faults = self.thread.join().unwrap();
        assert!(faults.is_empty(), "{faults:?}");
    }
}

/// A pipeline over a cluster.
struct Trial {
    case: Case,
    cluster: OwnCluster,
    runs: Mutex<Option<Child>>,
}

impl Trial {
    async fn new(name: &str) -> Option<Self> {
        let mut services = services(name)?;
        let cluster = OwnCluster::start();
        services.redis = cluster.url();
        let case = Case::new(services, name, None).await;
        Some(Self { case, cluster, runs: Mutex::default() })
    }

    fn start(&self, crash: Option<(&str, &str)>) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.case.path("run.log")).unwrap();
        let mut command = self.case.command(&self.case.run_arguments(&[
            "--checkpoint",
            "300ms",
            "--parallelism",
            "2",
            "--plain",
        ]));
        command.stderr(log).stdout(Stdio::null()).envs(crash);
        *self.runs.lock().unwrap() = Some(command.spawn().unwrap());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.case.path("run.log")).unwrap()
    }

    fn said(&self, what: &str) -> usize {
        self.log().matches(what).count()
    }

    fn signal(&self, signal: &str) {
        let id = self.runs.lock().unwrap().as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    /// How it ended.
    fn ended(&self) -> std::process::ExitStatus {
        self.runs.lock().unwrap().take().unwrap().wait().unwrap()
    }

    /// Feeds the pipeline until something is so.
    async fn feed_until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        for _ in 0..400 {
            if done(self) {
                return;
            }
            let ended =
                self.runs.lock().unwrap().as_mut().is_some_and(|run| run.try_wait().unwrap().is_some());
            assert!(!ended, "{what}: it ended\n{}", self.log());
            self.case.produce(40).await;
            sleep(Duration::from_millis(200));
        }
        panic!("{what}: not within 80 s\n{}", self.log());
    }

    /// Whatever is produced last is served.
    fn serves(&self) -> impl FnMut(&Self) -> bool + use<> {
        let mut connection = self.cluster.client();
        let (key, mut first) = (format!("{}:0", self.case.topic), None);
        move |_| {
            let Some(count) = count(&mut connection, &key) else { return false };
            count > *first.get_or_insert(count)
        }
    }

    fn finish(&self) {
        let log = self.case.finish("2");
        assert!(!log.contains(LOST), "{log}");
        self.case.verify();
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if let Some(mut process) = self.runs.lock().unwrap().take() {
            process.kill().ok();
            process.wait().ok();
        }
    }
}

/// Kills between the nodes' parts of a flush, and anywhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_over_kills_serves_what_the_batch_says() {
    let Some(mut trial) = Trial::new("a_cluster_over_kills").await else { return };
    trial.case.produce(4_000).await;
    trial.start(None);
    wait_for("the first values", || trial.cluster.rows(&trial.case.topic).iter().sum::<usize>() > 1_000);
    let reader = Reader::start(&trial.cluster, &trial.case.topic);
    let serves = trial.serves();
    trial.feed_until("values", serves).await;
    trial.signal("-KILL");
    trial.ended();
    let points = ["redis.fence.before", "redis.fence.after", "redis.flush.before", "redis.flush.after"];
    // While the fence is raised; open seals, rows, closed seals of the first flushes.
    let between = [6, 11, 14, 18].map(|nth| format!("redis.flush.between:{nth}"));
    for point in points.map(str::to_owned).into_iter().chain(between) {
        trial.case.produce(300).await;
        trial.start(Some(("MILLSTREAM_CRASH_AT", &point)));
        for _ in 0..300 {
            if trial.runs.lock().unwrap().as_mut().unwrap().try_wait().unwrap().is_some() {
                break;
            }
            trial.case.produce(20).await;
            sleep(Duration::from_millis(100));
        }
        let ended = trial.runs.lock().unwrap().as_mut().unwrap().try_wait().unwrap();
        assert!(ended.is_some_and(|status| !status.success()), "{point}: {ended:?}\n{}", trial.log());
        trial.ended();
    }
    reader.stop();
    assert_eq!(trial.said(LOST), 0, "{}", trial.log());
    trial.finish();
    let rows = trial.cluster.rows(&trial.case.topic);
    assert!(rows.iter().all(|rows| *rows > 100), "every node has rows: {rows:?}");
    // By the name that it has in a single Redis, and by the key alone.
    let key = format!("{}:0", trial.case.topic);
    let count = count(&mut trial.cluster.client(), &key).unwrap();
    let answer =
        trial.case.query("SELECT total_transactions_count AS n FROM user_features_serving WHERE user_id = 0");
    assert_eq!(answer.trim(), format!("n\n{count}"));
}

/// While rows come slots move to and fro; then a node is emptied, and its rows are there again.
#[tokio::test(flavor = "multi_thread")]
async fn slots_move_and_a_node_is_emptied() {
    let Some(mut trial) = Trial::new("slots_move_and_a_node_is_emptied").await else { return };
    trial.case.produce(4_000).await;
    trial.start(None);
    wait_for("the first values", || trial.cluster.rows(&trial.case.topic).iter().sum::<usize>() > 1_000);
    let reader = Reader::start(&trial.cluster, &trial.case.topic);
    for (from, to) in [(0, 1), (1, 2)] {
        let serves = trial.serves();
        let mut moves = trial.cluster.reshard(from, to, 2_500);
        trial.feed_until("the end of a move", |_| moves.try_wait().unwrap().is_some()).await;
        assert!(moves.wait().unwrap().success());
        trial.feed_until("values behind a move", serves).await;
    }
    assert_eq!(trial.said(LOST), 0, "{}", trial.log());
    reader.stop();
    let before = trial.cluster.rows(&trial.case.topic);
    trial.cluster.nodes[2].ask("FLUSHALL");
    wait_for("word of it", || trial.said(LOST) == 1);
    let full = |trial: &Trial| {
        trial.cluster.rows(&trial.case.topic).iter().zip(&before).all(|(now, then)| now >= then)
    };
    wait_for("all rows", || full(&trial));
    assert_eq!(trial.said(LOST), 1, "{}", trial.log());
    trial.signal("-INT");
    assert!(trial.ended().success(), "{}", trial.log());
    // While no process runs.
    trial.cluster.nodes[0].ask("FLUSHALL");
    trial.case.produce(50).await;
    let log = trial.case.finish("1");
    assert!(log.contains(LOST), "{log}");
    trial.case.verify();
}

/// A node that comes back as it was a while ago, and a replica that takes over.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_set_back_and_a_replica_promoted() {
    let Some(mut trial) = Trial::new("a_node_set_back_and_a_replica_promoted").await else { return };
    trial.case.produce(4_000).await;
    trial.start(None);
    wait_for("the first values", || trial.cluster.rows(&trial.case.topic).iter().sum::<usize>() > 1_000);
    // Snapshots by hand only; what comes later is not in it.
    assert_eq!(trial.cluster.nodes[2].ask("SAVE"), "+OK");
    let serves = trial.serves();
    trial.feed_until("more", serves).await;
    let port = trial.cluster.nodes[2].port();
    trial.cluster.nodes[2].signal("-KILL");
    trial.cluster.nodes[2].ended();
    trial.cluster.nodes[2] = start_node(port, trial.cluster.buses[2], &trial.cluster.folders[2]);
    trial.feed_until("word of an older copy", |trial| trial.said(LOST) == 1).await;
    let serves = trial.serves();
    trial.feed_until("values", serves).await;
    // A replica that has everything: nothing is lost.
    trial.cluster.replicate();
    let replica = trial.cluster.nodes.swap_remove(MASTERS);
    trial.cluster.nodes[0].signal("-KILL");
    trial.feed_until("the replica takes over", |_| info(&replica, "ROLE").starts_with("master")).await;
    trial.cluster.nodes[0] = replica;
    trial
        .feed_until("the cluster", |trial| {
            info(&trial.cluster.nodes[1], "CLUSTER INFO").contains("cluster_state:ok")
        })
        .await;
    let serves = trial.serves();
    trial.feed_until("values behind a failover", serves).await;
    trial.signal("-INT");
    assert!(trial.ended().success(), "{}", trial.log());
    trial.finish();
}

/// A process that slept through the takeover writes to no node.
#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_writes_to_no_node() {
    let Some(mut trial) = Trial::new("a_zombie_writes_to_no_node").await else { return };
    let mut dice = Dice(7);
    trial.case.produce(500).await;
    assert!(trial.case.run(&["--until-end"]).status.success());
    for nth in [6, 12, 12 + dice.roll(12)] {
        trial.case.produce(1_500).await;
        trial.start(Some(("MILLSTREAM_STOP_AT", &format!("redis.flush.between:{nth}"))));
        let id = trial.runs.lock().unwrap().as_ref().unwrap().id();
        let stopped = || {
            let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
        };
        trial.feed_until("it stops", |_| stopped()).await;
        let out = trial.case.run(&["--until-end", "--checkpoint", "100ms"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        trial.case.produce(500).await;
        let before = content(&trial);
        trial.signal("-CONT");
        wait_for("its end", || trial.runs.lock().unwrap().as_mut().unwrap().try_wait().unwrap().is_some());
        assert_eq!(trial.ended().code(), Some(3), "{}", trial.log());
        assert_eq!(content(&trial), before, "a zombie wrote");
    }
    trial.finish();
}

/// Everything in the cluster.
fn content(trial: &Trial) -> BTreeMap<String, BTreeMap<String, String>> {
    let mut connection = trial.cluster.client();
    let mut all = BTreeMap::new();
    for node in &trial.cluster.nodes[..MASTERS] {
        for name in names(node, "*") {
            let row = redis::cmd("HGETALL").arg(&name).query(&mut connection).unwrap();
            all.insert(name, row);
        }
    }
    assert!(all.len() > 16_384 + 500, "{}", all.len());
    all
}

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("user_id", DataType::Int64, true),
        Field::new("n", DataType::Int64, true),
    ]))
}

fn rows(users: std::ops::Range<i64>, n: i64) -> OnlineWrite {
    let users: Int64Array = users.collect::<Vec<_>>().into();
    let columns: Vec<ArrayRef> =
        vec![Arc::new(users.clone()), Arc::new(Int64Array::from(vec![n; users.len()]))];
    OnlineWrite { rows: RecordBatch::try_new(schema(), columns).unwrap(), expire_at_ms: None, deletes: None }
}

fn at(offset: i64) -> Positions {
    Positions::from_iter([(Place::new(0, 0, 3), offset)])
}

async fn store(cluster: &OwnCluster, prefix: &str) -> Arc<dyn OnlineStore> {
    let url = cluster.url();
    let entries = [("url", url.as_str()), ("key", "user_id"), ("prefix", prefix)];
    let config = RedisConfig::from_options(&mut Options::of("sink x", &entries)).unwrap();
    connect(&config, "test", "x", &schema()).await.unwrap()
}

/// The store by itself: fence, numbers, offsets, deletes, and a slot whose keys are here and there.
#[tokio::test(flavor = "multi_thread")]
async fn flushes_are_fenced_and_whole() {
    if services("flushes_are_fenced_and_whole").is_none() {
        return;
    }
    let cluster = OwnCluster::start();
    let mut client = cluster.client();
    let mut n = |user: i64| -> Option<i64> {
        redis::cmd("HGET").arg(format!("u:{user}")).arg("n").query(&mut client).unwrap()
    };
    let first = store(&cluster, "u:").await;
    assert_eq!(first.open().await.unwrap().fence, 0);
    assert_eq!(first.flush(4, 0, 1, &rows(0..10, 0), &at(1)).await.unwrap(), Flushed::FenceLost);
    assert_eq!(first.raise_fence(4).await.unwrap(), 4);
    assert_eq!(first.flush(4, 0, 50, &rows(0..3_000, 1), &at(50)).await.unwrap(), Flushed::Done);
    assert_eq!(first.flush(4, 1, 1, &rows(3_000..3_100, 1), &at(40)).await.unwrap(), Flushed::Done);
    let state = first.open().await.unwrap();
    assert_eq!((state.fence, state.consumed), (4, at(50)));
    assert_eq!(state.flushed, BTreeMap::from([(0, (4, 50)), (1, (4, 1))]));
    assert_eq!(first.flush(4, 0, 49, &rows(0..10, 0), &at(60)).await.unwrap(), Flushed::Stale);
    let gone = OnlineWrite { deletes: Some(rows(100..3_000, 0).rows), ..rows(0..0, 0) };
    assert_eq!(first.flush(4, 0, 51, &gone, &at(51)).await.unwrap(), Flushed::Done);
    assert_eq!((n(0), n(99), n(100), n(2_999), n(3_050)), (Some(1), Some(1), None, None, Some(1)));
    // A successor: the older one is refused in every slot, the numbers begin anew.
    let second = store(&cluster, "u:").await;
    assert_eq!(second.raise_fence(5).await.unwrap(), 5);
    assert_eq!(first.raise_fence(4).await.unwrap(), 5);
    assert_eq!(first.flush(4, 0, 52, &rows(0..100, 9), &at(90)).await.unwrap(), Flushed::Fenced { by: 5 });
    assert_eq!(second.open().await.unwrap().consumed, at(51), "the refused one raised nothing");
    assert_eq!(second.flush(5, 0, 1, &rows(0..100, 2), &at(52)).await.unwrap(), Flushed::Done);
    assert_eq!((n(0), n(99)), (Some(2), Some(2)));

    // A slot that is moving: one of its keys is there, the others are here.
    let slot: u16 =
        redis::cmd("CLUSTER").arg("KEYSLOT").arg("u:7").query(&mut redis_of(&cluster, 0)).unwrap();
    let from =
        cluster.nodes[..MASTERS].iter().position(|node| !node.ask("HGET u:7 n").starts_with('-')).unwrap();
    let to = (from + 1) % MASTERS;
    let steps = |words: String| assert_eq!(cluster.nodes[to].ask(&words), "+OK", "{words}");
    steps(format!("CLUSTER SETSLOT {slot} IMPORTING {}", cluster.id(from)));
    let steps = |words: String| assert_eq!(cluster.nodes[from].ask(&words), "+OK", "{words}");
    steps(format!("CLUSTER SETSLOT {slot} MIGRATING {}", cluster.id(to)));
    steps(format!("MIGRATE 127.0.0.1 {} u:7 0 5000", cluster.nodes[to].port()));
    let error = second.flush(5, 0, 2, &rows(0..100, 3), &at(53)).await.unwrap_err();
    assert!(!error.is_lasting() && error.message().ends_with("is not ready"), "{error}");
    // The rest moves; nobody has told the store.
    for key in info(&cluster.nodes[from], &format!("CLUSTER GETKEYSINSLOT {slot} 1000")).lines() {
        if !key.is_empty() {
            steps(format!("MIGRATE 127.0.0.1 {} {key} 0 5000", cluster.nodes[to].port()));
        }
    }
    for node in &cluster.nodes[..MASTERS] {
        assert_eq!(node.ask(&format!("CLUSTER SETSLOT {slot} NODE {}", cluster.id(to))), "+OK");
    }
    assert_eq!(second.flush(5, 0, 3, &rows(0..100, 4), &at(54)).await.unwrap(), Flushed::Done);
    assert_eq!((n(0), n(7), n(99)), (Some(4), Some(4), Some(4)));
    assert_eq!(second.open().await.unwrap().flushed[&0], (5, 3));

    // A node that forgot the last seal, and one that lost the fence of a single slot.
    let books = |node: &OwnRedis| {
        names(node, "millstream:*")
            .into_iter()
            .find(|book| node.ask(&format!("HEXISTS {book} seal:0")) == ":1")
            .unwrap()
    };
    let book = books(&cluster.nodes[1]);
    let older = format!("{:020}-{:020}-{:010}", 5, 2, 1);
    cluster.nodes[1].ask(&format!("HSET {book} seal:0 {older}"));
    assert_eq!(second.open().await.unwrap().flushed[&0], (5, 2), "a start would see it");
    assert_eq!(second.flush(5, 0, 4, &rows(0..0, 0), &at(54)).await.unwrap(), Flushed::FenceLost);
    assert_eq!(second.open().await.unwrap().fence, 0, "known to whoever comes next");
    assert_eq!(second.raise_fence(5).await.unwrap(), 5);
    assert_eq!(second.flush(5, 0, 5, &rows(0..100, 5), &at(55)).await.unwrap(), Flushed::Done);
    cluster.nodes[2].ask("FLUSHALL");
    assert_eq!(second.flush(5, 0, 6, &rows(0..0, 0), &at(55)).await.unwrap(), Flushed::FenceLost);
    let state = second.open().await.unwrap();
    assert_eq!((state.fence, state.consumed), (0, at(55)), "the other nodes hold the offsets");
}

fn redis_of(cluster: &OwnCluster, node: usize) -> redis::Connection {
    let url = format!("redis://127.0.0.1:{}", cluster.nodes[node].port());
    redis::Client::open(url).unwrap().get_connection().unwrap()
}
