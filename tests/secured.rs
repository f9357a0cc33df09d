//! One job of `examples/two-users` in a folder of its own, against the services behind log-in and TLS.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::topic_partition_list::TopicPartitionList;

use crate::case::services;

pub const BACKUP_USER: &str = "transactions-backup-job-user";
pub const FEATURES_USER: &str = "transactions-ml-features-job-user";
const PARTITIONS: i32 = 2;
pub const READ: u8 = 3;
pub const WRITE: u8 = 4;

/// The services behind a log-in, or `None` after saying what is skipped.
pub struct Secured {
    /// Without log-in: everything is allowed there.
    pub plain: String,
    pub sasl: String,
    pub tls: String,
    pub redis: String,
    pub redis_tls: String,
    pub ca: String,
    pub backup_password: String,
    pub features_password: String,
    pub redis_password: String,
}

pub fn secured(test: &str) -> Option<Secured> {
    let services = services(test)?;
    let get = |name: &str| std::env::var(format!("MILLSTREAM_TEST_{name}")).ok();
    let found = || {
        Some(Secured {
            plain: services.kafka.clone(),
            sasl: get("KAFKA_SASL")?,
            tls: get("KAFKA_TLS")?,
            redis: services.redis.clone(),
            redis_tls: get("REDIS_TLS")?,
            ca: get("CA")?,
            backup_password: get("KAFKA_BACKUP_PASSWORD")?,
            features_password: get("KAFKA_FEATURES_PASSWORD")?,
            redis_password: get("REDIS_PASSWORD")?,
        })
    };
    let secured = found();
    if secured.is_none() {
        let required = std::env::var("MILLSTREAM_REQUIRE_SERVICES").is_ok_and(|value| value == "1");
        assert!(!required, "{test} needs the users and TLS of docker/services.sh");
        println!("skipped {test}: start the services with docker/services.sh, which has users and TLS");
    }
    secured
}

/// One job in a folder of its own.
pub struct Job {
    pub folder: tempfile::TempDir,
    pub secured: Secured,
    pub topic: String,
    pub variables: BTreeMap<&'static str, String>,
    /// Event time of the first row, ms.
    pub start: u64,
    produced: u64,
}

impl Job {
    /// `prefix`: of its topic's name, which decides on the users' rights.
    pub async fn new(secured: Secured, prefix: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let topic = format!("{prefix}-{now}");
        create(&secured.plain, &topic).await;
        let folder = tempfile::tempdir().unwrap();
        let lake = folder.path().join("lake").to_string_lossy().into_owned();
        let variables = BTreeMap::from([
            ("KAFKA_BROKERS", secured.tls.clone()),
            ("KAFKA_CA", secured.ca.clone()),
            ("KAFKA_BACKUP_PASSWORD", secured.backup_password.clone()),
            ("KAFKA_FEATURES_PASSWORD", secured.features_password.clone()),
            ("REDIS_URL", secured.redis_tls.clone()),
            ("REDIS_CA", secured.ca.clone()),
            ("REDIS_PASSWORD", secured.redis_password.clone()),
            ("TOPIC", topic.clone()),
            ("FEATURES_TOPIC", format!("features-{topic}")),
            ("PREFIX", format!("features:{topic}:")),
            ("LAKE", lake),
        ]);
        let start = (now / 1_000_000) as u64 - 300_000;
        Self { folder, secured, topic, variables, start, produced: 0 }
    }

    pub fn with(&mut self, changes: &[(&'static str, &str)]) -> &mut Self {
        self.variables.extend(changes.iter().map(|(name, value)| (*name, (*value).to_owned())));
        self
    }

    /// Writes the next rows: 10 users, amount 1.5 each.
    pub fn produce(&mut self, rows: u64) {
        let producer: BaseProducer =
            ClientConfig::new().set("bootstrap.servers", &self.secured.plain).create().unwrap();
        for i in self.produced..self.produced + rows {
            let (user, millis) = (i % 10, self.start + i);
            let json = format!(
                r#"{{"user_id": {user}, "transaction_timestamp_millis": {millis}, "amount": 1.5, "currency": "EUR"}}"#
            );
            let (key, partition) = (user.to_string(), (user % 2) as i32);
            let record = BaseRecord::to(&self.topic).key(&key).payload(&json).partition(partition);
            producer.send(record).map_err(|(error, _)| error).unwrap();
        }
        producer.flush(Duration::from_secs(20)).unwrap();
        self.produced += rows;
    }

    pub fn example(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/two-users").join(name)
    }

    pub fn command(&self, arguments: &[&str], file: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
        command
            .args(arguments)
            .arg(file)
            .current_dir(self.folder.path())
            .envs(&self.variables)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// The pipeline's name: Redis keeps the fence by it.
    pub fn name(&self, file: &Path) -> String {
        format!("{}-{}", self.topic, file.file_stem().unwrap().to_string_lossy())
    }

    pub fn run(&self, file: &Path, arguments: &[&str]) -> Output {
        let name = self.name(file);
        self.command(&[&["run", "--name", &name], arguments].concat(), file).output().unwrap()
    }

    pub fn finish(&self, file: &Path) -> String {
        let out = self.run(file, &["--until-end", "--close", "--parallelism", "2"]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}");
        said
    }

    pub fn query(&self, file: &Path, sql: &str) -> String {
        let out = self.command(&["query", "--format", "csv", "-c", sql], file).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// Runs, and is refused: exit code 3, one error line, a hint, no password.
    pub fn refused(&self, file: &Path, error: &str, hint: &str) {
        let out = self.run(file, &["--until-end", "--close"]);
        self.is_refused(&out, error, hint);
    }

    pub fn is_refused(&self, out: &Output, error: &str, hint: &str) {
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(3), "{said}");
        let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error:")).collect();
        assert_eq!(errors, [format!("error: {error}")], "{said}");
        let hinted = said.lines().any(|line| line.contains("hint:") && line.contains(hint));
        assert!(hinted && !said.contains("trying again"), "{said}");
        self.no_password_in("stderr", &out.stderr);
    }

    pub fn no_password_in(&self, place: &str, content: &[u8]) {
        let secured = &self.secured;
        for password in [&secured.backup_password, &secured.features_password, &secured.redis_password] {
            let found = content.windows(password.len()).any(|window| window == password.as_bytes());
            assert!(!found, "{place} has the password {password}");
        }
    }

    /// Starts without an end and waits until it has read what is there.
    pub fn start(&self, file: &Path, ready: impl Fn(&Self) -> bool) -> Child {
        let name = self.name(file);
        let arguments = ["run", "--name", &name, "--checkpoint", "300ms", "--parallelism", "1"];
        let mut process = self.command(&arguments, file).spawn().unwrap();
        for _ in 0..200 {
            if ready(self) {
                return process;
            }
            if process.try_wait().unwrap().is_some() {
                let out = process.wait_with_output().unwrap();
                panic!("it ended: {}", String::from_utf8_lossy(&out.stderr));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        process.kill().unwrap();
        panic!("not ready within 20 s");
    }

    /// A running process stops by itself, refused.
    pub fn stops(&self, process: Child, error: &str, hint: &str) {
        self.is_refused(&ends(process), error, hint);
    }

    /// Records in a topic, as its offsets say.
    pub fn records(&self, topic: &str) -> i64 {
        let consumer: BaseConsumer =
            ClientConfig::new().set("bootstrap.servers", &self.secured.plain).create().unwrap();
        let metadata = consumer.fetch_metadata(Some(topic), Duration::from_secs(10)).unwrap();
        let ids = metadata.topics()[0].partitions().iter().map(|partition| partition.id());
        ids.map(|id| consumer.fetch_watermarks(topic, id, Duration::from_secs(10)).unwrap().1).sum()
    }

    /// Sum of a group's committed offsets.
    pub fn committed(&self, group: &str) -> i64 {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.secured.plain).set("group.id", group);
        let consumer: BaseConsumer = config.create().unwrap();
        let mut list = TopicPartitionList::new();
        list.add_partition_range(&self.topic, 0, PARTITIONS - 1);
        let committed = consumer.committed_offsets(list, Duration::from_secs(10)).unwrap();
        committed.elements().iter().filter_map(|element| element.offset().to_raw()).filter(|at| *at > 0).sum()
    }

    /// An administrator's word to Redis, as an inline command.
    pub fn redis(&self, words: &str) -> String {
        let mut stream = TcpStream::connect(self.secured.redis.trim_start_matches("redis://")).unwrap();
        stream.write_all(format!("{words}\r\n").as_bytes()).unwrap();
        let mut answer = [0; 512];
        let length = stream.read(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[..length]).trim().to_owned()
    }

    pub fn served(&self) -> usize {
        let answer = self.redis(&format!("HGET features:{}:1 total_transactions_count", self.topic));
        answer.lines().nth(1).and_then(|count| count.parse().ok()).unwrap_or(0)
    }
}

pub async fn create(servers: &str, topic: &str) {
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", servers).create().unwrap();
    let new = NewTopic::new(topic, PARTITIONS, TopicReplication::Fixed(1));
    for created in admin.create_topics([&new], &AdminOptions::new()).await.unwrap() {
        created.unwrap();
    }
}

/// Gives or takes a user's right on exactly one topic: CreateAcls or DeleteAcls, version 1, which the client library
/// does not have.
pub fn right(servers: &str, give: bool, user: &str, operation: u8, topic: &str) {
    fn text(body: &mut Vec<u8>, text: &str) {
        body.extend((text.len() as u16).to_be_bytes());
        body.extend(text.as_bytes());
    }
    const TOPIC: u8 = 2;
    const LITERAL: u8 = 3;
    const ALLOW: u8 = 3;
    let mut body = Vec::new();
    body.extend(if give { 30_u16 } else { 31 }.to_be_bytes());
    body.extend(1_u16.to_be_bytes());
    body.extend(7_u32.to_be_bytes());
    text(&mut body, "tests");
    body.extend(1_u32.to_be_bytes());
    body.push(TOPIC);
    text(&mut body, topic);
    body.push(LITERAL);
    text(&mut body, &format!("User:{user}"));
    text(&mut body, "*");
    body.extend([operation, ALLOW]);
    let mut stream = TcpStream::connect(servers).unwrap();
    stream.write_all(&(body.len() as u32).to_be_bytes()).unwrap();
    stream.write_all(&body).unwrap();
    let mut size = [0; 4];
    stream.read_exact(&mut size).unwrap();
    let mut answer = vec![0; u32::from_be_bytes(size) as usize];
    stream.read_exact(&mut answer).unwrap();
    // Correlation, throttling, one answer, its error code.
    assert_eq!(answer[12..14], [0, 0], "{answer:?}");
    // The broker learns of it a moment later.
    std::thread::sleep(Duration::from_millis(500));
}

/// The output of a process that must end by itself.
pub fn ends(mut process: Child) -> Output {
    for _ in 0..200 {
        if process.try_wait().unwrap().is_some() {
            return process.wait_with_output().unwrap();
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    process.kill().unwrap();
    panic!("it goes on: {}", String::from_utf8_lossy(&process.wait_with_output().unwrap().stderr));
}
