//! `sql/transactions.sql` against a real broker, Redis and S3, compared with DuckDB (`tests/oracle.py`).
//!
//! Without services these tests say so in one line; with `MILLSTREAM_REQUIRE_SERVICES=1` that is a failure.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord};

/// Addresses of the services, or `None` after saying what is skipped.
struct Services {
    kafka: String,
    redis: String,
    python: String,
    s3: Option<String>,
}

fn services(test: &str) -> Option<Services> {
    let get = |name: &str| std::env::var(name).ok();
    let found = (get("MILLSTREAM_TEST_KAFKA"), get("MILLSTREAM_TEST_REDIS"), get("MILLSTREAM_TEST_PYTHON"));
    if let (Some(kafka), Some(redis), Some(python)) = found {
        return Some(Services { kafka, redis, python, s3: get("MILLSTREAM_TEST_S3") });
    }
    let required = get("MILLSTREAM_REQUIRE_SERVICES").is_some_and(|value| value == "1");
    assert!(
        !required,
        "{test} needs Kafka, Redis and Python: docker/services.sh start; eval \"$(docker/services.sh env)\""
    );
    println!("skipped {test}: run docker/services.sh start and eval \"$(docker/services.sh env)\" first");
    None
}

/// One pipeline in a folder of its own: topic, SQL, lake, state.
struct Case {
    folder: tempfile::TempDir,
    services: Services,
    topic: String,
    lake: String,
    state: String,
    produced: u64,
    /// Event time of the first row, ms.
    start: u64,
}

fn rows() -> u64 {
    std::env::var("MILLSTREAM_TEST_ROWS").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000)
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

impl Case {
    async fn new(services: Services, name: &str, lake: Option<String>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let topic = format!("t-{name}-{now}");
        let sql =
            fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("sql/transactions.sql")).unwrap();
        let sql = sql.replace("topic             = 'transactions'", &format!("topic = '{topic}'"));
        let sql = sql.replace("prefix = 'user:'", &format!("prefix = '{topic}:'"));
        assert!(sql.contains(&format!("'{topic}'")) && sql.contains(&format!("'{topic}:'")));
        fs::write(folder.path().join("transactions.sql"), sql).unwrap();
        let admin: AdminClient<DefaultClientContext> =
            ClientConfig::new().set("bootstrap.servers", &services.kafka).create().unwrap();
        let new = NewTopic::new(&topic, 4, TopicReplication::Fixed(1));
        for created in admin.create_topics([&new], &AdminOptions::new()).await.unwrap() {
            created.unwrap();
        }
        let root = folder.path().to_string_lossy().into_owned();
        let (state, local) = (format!("{root}/state"), format!("{root}/lake"));
        let (state, lake) = match lake {
            Some(lake) => (format!("{lake}/{topic}/state"), format!("{lake}/{topic}/lake")),
            None => (state, local),
        };
        let start = (now / 1_000_000) as u64 - 300_000;
        Self { folder, services, topic, lake, state, produced: 0, start }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Produces the next `count` transactions of the last minutes, disordered by less than the lateness.
    async fn produce(&mut self, count: u64) {
        let producer: FutureProducer = ClientConfig::new()
            .set("bootstrap.servers", &self.services.kafka)
            .set("linger.ms", "5")
            .set("queue.buffering.max.messages", "1000000")
            .create()
            .unwrap();
        let mut dice = Dice(self.produced + 17);
        let mut lines = String::new();
        let mut sent = Vec::new();
        for i in 0..count {
            let user = {
                let r = dice.roll(1_000_000) as f64 / 1e6;
                (r * r * 5_000.0) as u64
            };
            let millis = self.start + (self.produced + i) * 200_000 / rows() - dice.roll(4_000);
            let amount = dice.roll(2_000_000) as f64 / 100.0 - 10_000.0;
            let json = format!(
                "{{\"user_id\": {user}, \"transaction_timestamp_millis\": {millis}, \"amount\": {amount:.2}, \"currency\": \"EUR\", \"counterpart_id\": {i}}}"
            );
            let key = user.to_string();
            let record = FutureRecord::to(&self.topic).key(&key).payload(&json);
            sent.push((user, millis, amount, producer.send_result(record).map_err(|(e, _)| e).unwrap()));
        }
        for (user, millis, amount, delivery) in sent {
            let at = delivery.await.unwrap().map_err(|(e, _)| e).unwrap();
            lines.push_str(&format!(
                "{{\"p\":{},\"o\":{},\"user_id\":{user},\"t\":{millis},\"amount\":{amount:.2}}}\n",
                at.partition, at.offset
            ));
        }
        self.produced += count;
        use std::io::Write;
        let mut file =
            fs::OpenOptions::new().create(true).append(true).open(self.path("produced.ndjson")).unwrap();
        file.write_all(lines.as_bytes()).unwrap();
    }

    async fn send_raw(&self, payloads: &[Option<&str>]) {
        let producer: FutureProducer =
            ClientConfig::new().set("bootstrap.servers", &self.services.kafka).create().unwrap();
        for payload in payloads {
            let record = FutureRecord::<str, str>::to(&self.topic).key("bad").partition(0);
            let record = match payload {
                Some(payload) => record.payload(payload),
                None => record,
            };
            producer.send(record, Duration::from_secs(5)).await.map_err(|(e, _)| e).unwrap();
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
        command
            .args(arguments)
            .arg(self.path("transactions.sql"))
            .env("KAFKA_BROKERS", &self.services.kafka)
            .env("REDIS_URL", &self.services.redis)
            .env("LAKE", &self.lake)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(s3) = &self.services.s3 {
            command.env("AWS_ENDPOINT_URL", s3);
        }
        command
    }

    /// Redis keeps a sink's fence by the pipeline's name, so each case has its own.
    fn run_arguments<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        let mut all = vec!["run", "--state", &self.state, "--name", &self.topic];
        all.extend(arguments);
        all
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(&self.run_arguments(arguments)).output().unwrap()
    }

    fn start(&self, arguments: &[&str]) -> Child {
        self.command(&self.run_arguments(arguments))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Runs to the end and closes; returns stderr.
    fn finish(&self, parallelism: &str) -> String {
        let out =
            self.run(&["--until-end", "--close", "--parallelism", parallelism, "--checkpoint", "500ms"]);
        let log = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{log}");
        log
    }

    /// DuckDB's answer.
    fn verify(&self) {
        let served = self
            .command(&["query", "--format", "ndjson", "-c", "SELECT * FROM user_features_serving"])
            .output()
            .unwrap();
        assert!(served.status.success(), "{}", String::from_utf8_lossy(&served.stderr));
        fs::write(self.path("serving.ndjson"), served.stdout).unwrap();
        let oracle = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle.py");
        let mut command = Command::new(&self.services.python);
        command
            .arg(oracle)
            .arg(&self.lake)
            .arg(self.path("serving.ndjson"))
            .arg(self.path("produced.ndjson"));
        if let Some(s3) = &self.services.s3 {
            command.env("AWS_ENDPOINT_URL", s3);
        }
        let done = command.output().unwrap();
        let said =
            format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success(), "{said}");
        println!("{}: {}", self.topic, said.trim());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_and_redis_are_what_duckdb_says() {
    let Some(services) = services("tables_and_redis_are_what_duckdb_says") else { return };
    let mut case = Case::new(services, "plain", None).await;
    case.produce(rows()).await;
    let log = case.finish("2");
    assert!(log.contains("closed: every row is final"), "{log}");
    case.verify();
    let again = case.run(&["--until-end", "--close"]);
    assert!(again.status.success());
    assert!(String::from_utf8_lossy(&again.stderr).contains("was closed before"));
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_kills_and_three_parallelisms_change_nothing() {
    let Some(services) = services("ten_kills_and_three_parallelisms_change_nothing") else { return };
    let mut case = Case::new(services, "kill", None).await;
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut dice = Dice(seed);
    for round in 0..10 {
        case.produce(rows() / 10).await;
        let parallelism = ["1", "2", "3"][round % 3];
        let mut process = case.start(&["--parallelism", parallelism, "--checkpoint", "100ms"]);
        tokio::time::sleep(Duration::from_millis(300 + dice.roll(1_500))).await;
        process.kill().unwrap();
        process.wait().unwrap();
    }
    case.finish("2");
    case.verify();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_stop_and_another_parallelism_go_on() {
    let Some(services) = services("a_clean_stop_and_another_parallelism_go_on") else { return };
    let mut case = Case::new(services, "stop", None).await;
    for parallelism in ["1", "2"] {
        case.produce(rows() / 10).await;
        let out = case.run(&["--until-end", "--parallelism", parallelism]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    case.finish("1");
    case.verify();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_older_of_two_processes_stops_with_an_error() {
    let Some(services) = services("the_older_of_two_processes_stops_with_an_error") else { return };
    let mut case = Case::new(services, "fence", None).await;
    case.produce(2_000).await;
    let older = case.command(&case.run_arguments(&["--checkpoint", "200ms"])).spawn().unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut newer = case.start(&["--checkpoint", "200ms"]);
    let out = tokio::task::spawn_blocking(move || older.wait_with_output().unwrap());
    let out =
        tokio::time::timeout(Duration::from_secs(30), out).await.expect("the older one goes on").unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{said}");
    assert!(said.contains("error:") && said.contains("newer") || said.contains("generation"), "{said}");
    newer.kill().unwrap();
    newer.wait().unwrap();
    case.finish("2");
    case.verify();
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_records_are_kept_and_change_nothing() {
    let Some(services) = services("bad_records_are_kept_and_change_nothing") else { return };
    let mut case = Case::new(services, "bad", None).await;
    case.produce(1_000).await;
    case.send_raw(&[
        Some("not json"),
        Some(r#"{"user_id": 1}"#),
        Some(r#"{"user_id": "x", "transaction_timestamp_millis": 1}"#),
        Some(r#"{"user_id": 1.5, "transaction_timestamp_millis": 1}"#),
        Some(r#"{"user_id": 1, "transaction_timestamp_millis": 4070908800000}"#),
        None,
    ])
    .await;
    case.produce(1_000).await;
    let log = case.finish("2");
    assert!(log.contains("dead letters 5"), "{log}");
    case.verify();
}

#[tokio::test(flavor = "multi_thread")]
async fn lake_and_state_on_s3() {
    let Some(services) = services("lake_and_state_on_s3") else { return };
    let bucket = std::env::var("MILLSTREAM_TEST_S3_BUCKET").unwrap_or_else(|_| "millstream-test".to_owned());
    if services.s3.is_none() {
        assert!(std::env::var("MILLSTREAM_REQUIRE_SERVICES").is_err(), "an S3 server is needed");
        println!("skipped lake_and_state_on_s3: no S3 server");
        return;
    }
    let mut case = Case::new(services, "s3", Some(format!("s3://{bucket}"))).await;
    case.produce(10_000).await;
    case.finish("2");
    case.verify();
}

#[test]
fn a_missing_broker_is_one_line_and_exit_3() {
    let folder = tempfile::tempdir().unwrap();
    let sql = Path::new(env!("CARGO_MANIFEST_DIR")).join("sql/transactions.sql");
    let out = Command::new(env!("CARGO_BIN_EXE_millstream"))
        .args(["run", "--state"])
        .arg(folder.path().join("state"))
        .arg(sql)
        .env("KAFKA_BROKERS", "127.0.0.1:9")
        .env("LAKE", folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{said}");
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error:")).collect();
    assert!(errors.len() == 1 && errors[0].contains("127.0.0.1:9"), "{said}");
}
