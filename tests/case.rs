//! One pipeline in a folder of its own against the real services, and DuckDB's answer about it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::topic_partition_list::TopicPartitionList;

/// Addresses of the services, or `None` after saying what is skipped.
pub struct Services {
    pub kafka: String,
    pub redis: String,
    pub python: String,
    pub s3: Option<String>,
}

pub fn services(test: &str) -> Option<Services> {
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
pub struct Case {
    pub folder: tempfile::TempDir,
    pub services: Services,
    pub topic: String,
    /// Of the pipeline: Redis keeps a sink's fence by it, so each case has its own.
    pub name: String,
    pub lake: String,
    pub state: String,
    pub produced: u64,
    /// Event time of the first row, ms.
    pub start: u64,
}

pub fn rows() -> u64 {
    std::env::var("MILLSTREAM_TEST_ROWS").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000)
}

pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Compares two queries (`tests/duck.py`).
pub const DUCK: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/duck.py");

/// Runs [`DUCK`]: no row differs, and there are at least `least`.
pub fn duck_agrees(command: &mut Command, least: u64) {
    let out = command.output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    let rows: u64 = said.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
    assert!(said.contains(" rows, 0 differ") && rows >= least, "{said}\n{command:?}");
}

pub async fn create_topic(kafka: &str, topic: &str, partitions: i32) {
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", kafka).create().unwrap();
    let new = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
    for created in admin.create_topics([&new], &AdminOptions::new()).await.unwrap() {
        created.unwrap();
    }
}

/// Sends records (key, payload) in order; gives their partitions and offsets.
pub async fn send(
    kafka: &str,
    topic: &str,
    records: impl Iterator<Item = (Option<&str>, Option<&str>)>,
) -> Vec<(i32, i64)> {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka)
        .set("linger.ms", "5")
        .set("enable.idempotence", "true")
        .set("queue.buffering.max.messages", "1000000")
        .create()
        .unwrap();
    let mut sent = Vec::new();
    for (key, payload) in records {
        let mut record = FutureRecord::<str, str>::to(topic);
        (record.key, record.payload) = (key, payload);
        sent.push(producer.send_result(record).map_err(|(e, _)| e).unwrap());
    }
    let mut places = Vec::new();
    for delivery in sent {
        let at = delivery.await.unwrap().map_err(|(e, _)| e).unwrap();
        places.push((at.partition, at.offset));
    }
    places
}

impl Case {
    pub async fn new(services: Services, name: &str, lake: Option<String>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let topic = format!("t-{name}-{now}");
        let sql =
            fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("sql/transactions.sql")).unwrap();
        let sql = sql.replace("topic             = 'transactions'", &format!("topic = '{topic}'"));
        let sql = sql.replace("prefix = 'user:'", &format!("prefix = '{topic}:'"));
        assert!(sql.contains(&format!("'{topic}'")) && sql.contains(&format!("'{topic}:'")));
        fs::write(folder.path().join("transactions.sql"), sql).unwrap();
        create_topic(&services.kafka, &topic, 4).await;
        let root = folder.path().to_string_lossy().into_owned();
        let (state, local) = (format!("{root}/state"), format!("{root}/lake"));
        let (state, lake) = match lake {
            Some(lake) => (format!("{lake}/{topic}/state"), format!("{lake}/{topic}/lake")),
            None => (state, local),
        };
        let start = (now / 1_000_000) as u64 - 300_000;
        Self { folder, services, name: topic.clone(), topic, lake, state, produced: 0, start }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Produces the next `count` transactions of the last minutes, disordered by less than the lateness.
    pub async fn produce(&mut self, count: u64) {
        let producer: FutureProducer = ClientConfig::new()
            .set("bootstrap.servers", &self.services.kafka)
            .set("linger.ms", "5")
            // A new topic may refuse the first batch for a moment: it must not come behind the second one.
            .set("enable.idempotence", "true")
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

    pub async fn send_raw(&self, payloads: &[Option<&str>]) {
        let producer: FutureProducer =
            ClientConfig::new().set("bootstrap.servers", &self.services.kafka).create().unwrap();
        for payload in payloads {
            let mut record = FutureRecord::<str, str>::to(&self.topic).key("bad").partition(0);
            record.payload = *payload;
            producer.send(record, Duration::from_secs(5)).await.map_err(|(e, _)| e).unwrap();
        }
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
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

    pub fn run_arguments<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        let mut all = vec!["run", "--state", &self.state, "--name", &self.name];
        all.extend(arguments);
        all
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(&self.run_arguments(arguments)).output().unwrap()
    }

    pub fn start(&self, arguments: &[&str]) -> Child {
        self.command(&self.run_arguments(arguments))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Runs to the end and closes; returns stderr.
    pub fn finish(&self, parallelism: &str) -> String {
        let out =
            self.run(&["--until-end", "--close", "--parallelism", parallelism, "--checkpoint", "500ms"]);
        let log = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{log}");
        log
    }

    /// The answer of `millstream query`, as CSV.
    pub fn query(&self, sql: &str) -> String {
        let out = self.command(&["query", "--format", "csv", "-c", sql]).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// Sum of the group's committed offsets over the topic.
    pub fn committed(&self) -> i64 {
        let group = format!("millstream-{}-transactions", self.name);
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.services.kafka).set("group.id", group);
        let consumer: BaseConsumer = config.create().unwrap();
        let mut list = TopicPartitionList::new();
        list.add_partition_range(&self.topic, 0, 3);
        let committed = consumer.committed_offsets(list, Duration::from_secs(10)).unwrap();
        committed.elements().iter().filter_map(|element| element.offset().to_raw()).sum()
    }

    /// DuckDB's word that two queries over tables of the lake have the same answer of at least `least` rows.
    pub fn same(&self, tables: &str, first: &str, second: &str, least: u64) {
        let mut command = Command::new(&self.services.python);
        if let Some(s3) = &self.services.s3 {
            command.env("AWS_ENDPOINT_URL", s3);
        }
        duck_agrees(command.args([DUCK, &self.lake, tables, first, second]), least);
    }

    /// DuckDB's answer.
    pub fn verify(&self) {
        self.verify_with(&[]);
    }

    /// The same with more arguments of the oracle.
    pub fn verify_with(&self, more: &[&str]) {
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
            .arg(self.path("produced.ndjson"))
            .args(more);
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
