//! `run --memory`: a partition far behind, a state that is too large.

use std::collections::HashSet;
use std::fs;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rdkafka::config::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::types::RDKafkaErrorCode;

use crate::case::{create_topic, services};

/// Rows of the partition that is ahead; each waits for the watermark with its note.
const AHEAD: i64 = 300_000;
/// Rows of the partition that is behind: as long to read, little event time.
const BEHIND: i64 = 150_000;
const NOTE: usize = 400;

struct Skewed {
    folder: tempfile::TempDir,
    kafka: String,
    topic: String,
}

impl Skewed {
    async fn new(test: &str, sql: &str) -> Option<Self> {
        let services = services(test)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let topic = format!("t-memory-{now}");
        create_topic(&services.kafka, &topic, 2).await;
        let folder = tempfile::tempdir().unwrap();
        let source = format!(
            "CREATE SOURCE t (user_id BIGINT NOT NULL, at BIGINT NOT NULL, note VARCHAR,
                event_time TIMESTAMP AS (to_timestamp_millis(at)), WATERMARK FOR event_time AS event_time - INTERVAL '1 second'
             ) WITH (connector = 'kafka', bootstrap_servers = '{}', topic = '{topic}', format = 'json',
                     idle_timeout = '1 second', kafka.queued.max.messages.kbytes = '4096');\n",
            services.kafka
        );
        fs::write(folder.path().join("p.sql"), source + sql).unwrap();
        Some(Self { folder, kafka: services.kafka, topic })
    }

    /// Rows of one user, into the partition of the user's number.
    fn produce(&self, user: i32, times: impl Iterator<Item = i64>) {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.kafka).set("linger.ms", "5");
        let producer: BaseProducer = config.create().unwrap();
        let note = "x".repeat(NOTE);
        for at in times {
            let json = format!("{{\"user_id\": {user}, \"at\": {at}, \"note\": \"{note}\"}}");
            let mut record = BaseRecord::<str, str>::to(&self.topic).partition(user).payload(&json);
            while let Err((error, again)) = producer.send(record) {
                assert_eq!(error.rdkafka_error_code(), Some(RDKafkaErrorCode::QueueFull));
                producer.poll(Duration::from_millis(20));
                record = again;
            }
        }
        producer.flush(Duration::from_secs(60)).unwrap();
    }

    /// Runs to the end; its output and the peak of its resident memory in MiB.
    fn run(&self, name: &str, arguments: &[&str]) -> (Output, u64) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
        command.args([
            "run",
            "p.sql",
            "--plain",
            "--until-end",
            "--close",
            "--parallelism",
            "1",
            "--name",
            name,
        ]);
        command.args(arguments).env("OUT", format!("./out-{name}")).current_dir(self.folder.path());
        let mut process: Child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let status = format!("/proc/{}/status", process.id());
        let mut peak = 0;
        while process.try_wait().unwrap().is_none() {
            let text = fs::read_to_string(&status).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            peak =
                line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(peak).max(peak);
            std::thread::sleep(Duration::from_millis(50));
        }
        (process.wait_with_output().unwrap(), peak / 1024)
    }

    /// Rows, and how many different numbers each of the two users has.
    fn answer(&self, name: &str) -> (i64, i64, i64) {
        let (mut rows, mut numbers) = (0, [HashSet::new(), HashSet::new()]);
        for entry in fs::read_dir(self.folder.path().join(format!("out-{name}"))).unwrap() {
            let path = entry.unwrap().path();
            // What is not published yet lies in a folder beside.
            if path.is_dir() {
                continue;
            }
            for line in fs::read_to_string(path).unwrap().lines() {
                let number =
                    line.split("\"n\":").nth(1).unwrap().trim_end_matches('}').parse::<i64>().unwrap();
                numbers[usize::from(line.contains("\"user_id\":1"))].insert(number);
                rows += 1;
            }
        }
        (rows, numbers[0].len() as i64, numbers[1].len() as i64)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_ahead_wait_when_memory_is_short() {
    let sql = "CREATE SINK o AS SELECT user_id, note, count(*) OVER (PARTITION BY user_id ORDER BY event_time) AS n FROM t
               WITH (connector = 'ndjson', location = '${OUT}');";
    let Some(skewed) = Skewed::new("partitions_ahead_wait_when_memory_is_short", sql).await else { return };
    let start = 1_767_571_200_000;
    skewed.produce(0, (0..AHEAD).map(|i| start + i * 1_000));
    skewed.produce(1, (0..BEHIND).map(|i| start + i));
    let (out, free) = skewed.run("free", &["--memory", "64GB"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && !said.contains("memory is short"), "{said}");
    let expected = (AHEAD + BEHIND, AHEAD, BEHIND);
    assert_eq!(skewed.answer("free"), expected);

    // How high it gets depends on how much becomes final at once, so it is printed only.
    // A budget between what the program is without rows and what it was with all of them.
    let budget = free * 3 / 10;
    let (out, peak) = skewed.run("tight", &["--memory", &format!("{budget}MB")]);
    let said = String::from_utf8_lossy(&out.stderr);
    println!("peak {free} MiB without, {peak} MiB with a budget of {budget} MiB");
    assert!(out.status.success(), "{said}");
    assert!(said.contains("memory is short") && said.contains("1 partitions ahead wait"), "{said}");
    assert_eq!(skewed.answer("tight"), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_larger_than_the_budget_is_refused_with_numbers() {
    let sql = "CREATE VIEW per_row AS SELECT at, note, count(*) AS n FROM t GROUP BY at, note;
               CREATE SINK o FROM per_row WITH (connector = 'blackhole');";
    let Some(skewed) = Skewed::new("a_state_larger_than_the_budget_is_refused_with_numbers", sql).await
    else {
        return;
    };
    skewed.produce(0, (0..AHEAD).map(|i| 1_767_571_200_000 + i * 1_000));
    let (out, _) = skewed.run("large", &["--memory", "120MB", "--checkpoint", "200ms"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{said}");
    for part in
        ["larger than the budget of memory", "120 MiB are allowed", "per_row.group", "rows,", "--memory"]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
    // With enough it goes on from its last checkpoint to the end.
    let (out, _) = skewed.run("large", &["--memory", "64GB"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && said.contains("closed"), "{said}");
}
