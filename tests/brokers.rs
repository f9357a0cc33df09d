//! What a broker does to a running pipeline: partitions are added, the topic is made anew, records expire, the broker is
//! away for a while or starts again.

use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rdkafka::TopicPartitionList;
use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::topic_partition_list::Offset;

use crate::case::{Case, create_topic, services};

fn admin(kafka: &str) -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", kafka).create().unwrap()
}

/// Waits until the backup holds as many rows.
fn wait_for(case: &Case, running: &mut Child, rows: u64) {
    let begun = Instant::now();
    loop {
        let table = PathBuf::from(&case.lake).join("transactions_backup/_delta_log");
        let count = || case.query("SELECT count(*) AS n FROM transactions_backup");
        if table.exists() && count().lines().nth(1).and_then(|n| n.parse().ok()) == Some(rows) {
            return;
        }
        assert!(running.try_wait().unwrap().is_none(), "the pipeline has ended");
        assert!(begun.elapsed() < Duration::from_secs(90), "{} of {rows} rows", count());
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Sets how often the source asks the broker for partitions and their ends.
fn ask_every(case: &Case, interval: &str) {
    let sql = std::fs::read_to_string(case.path("transactions.sql")).unwrap();
    let option = format!("format = 'json', partition_discovery_interval = '{interval}'");
    let sql = sql.replace("format            = 'json'", &option);
    std::fs::write(case.path("transactions.sql"), sql).unwrap();
}

/// SIGTERM, a last checkpoint, the end.
fn stop(running: &mut Child) {
    let killed = Command::new("kill").arg(running.id().to_string()).status().unwrap();
    assert!(killed.success() && running.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_that_are_added_are_found_while_running() {
    let Some(services) = services("partitions_that_are_added_are_found_while_running") else { return };
    let mut case = Case::new(services, "added", None).await;
    ask_every(&case, "300 ms");
    case.produce(5_000).await;
    let log = std::fs::File::create(case.path("log")).unwrap();
    let arguments = ["--checkpoint", "300ms", "--parallelism", "2"];
    let mut running = case.command(&case.run_arguments(&arguments)).stderr(log).spawn().unwrap();
    wait_for(&case, &mut running, 5_000);
    let more = NewPartitions::new(&case.topic, 7);
    admin(&case.services.kafka).create_partitions([&more], &AdminOptions::new()).await.unwrap();
    // What comes before they are found may be late: the watermark does not wait for what nobody knows.
    let found =
        || std::fs::read_to_string(case.path("log")).unwrap().matches("a partition was added").count();
    let begun = Instant::now();
    while found() < 3 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{} partitions were found", found());
        std::thread::sleep(Duration::from_millis(50));
    }
    // The producers make new clients, which know the new partitions.
    case.produce(5_000).await;
    wait_for(&case, &mut running, 10_000);
    let partitions = case.query("SELECT count(DISTINCT _partition) AS n FROM transactions_backup");
    assert_eq!(partitions, "n\n7\n");
    running.kill().unwrap();
    running.wait().unwrap();
    case.produce(5_000).await;
    case.finish("3");
    case.verify();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_made_anew_stops_the_pipeline_with_a_way_out() {
    let Some(services) = services("a_topic_that_is_made_anew_stops_the_pipeline") else { return };
    let mut case = Case::new(services, "anew", None).await;
    case.produce(2_000).await;
    let out = case.run(&["--until-end", "--checkpoint", "300ms"]);
    assert!(out.status.success());
    let kafka = case.services.kafka.clone();
    for deleted in admin(&kafka).delete_topics(&[&case.topic], &AdminOptions::new()).await.unwrap() {
        deleted.unwrap();
    }
    let gone = case.run(&["--until-end"]);
    let said = String::from_utf8_lossy(&gone.stderr);
    assert!(
        gone.status.code() == Some(3) && said.contains(&format!("there is no topic {}", case.topic)),
        "{said}"
    );
    create_topic(&kafka, &case.topic, 4).await;
    let manifests = || std::fs::read_dir(format!("{}/manifest", case.state)).unwrap().count();
    let refused = |more: &[&str]| {
        let out = case.run(&[&["--until-end"], more].concat());
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(3), "{said}");
        said
    };
    let another = format!("topic {} is not the one that was read so far", case.topic);
    assert!(refused(&[]).contains(&another));
    let said = refused(&["--allow-gap"]);
    assert!(said.contains(&another) && said.contains("but the topic ends at 0"), "{said}");
    assert!(said.contains("hint: The topic was emptied or created anew."), "{said}");
    // Every offset that comes next is there again, of another record.
    grow(&case).await;
    let known = manifests();
    let said = refused(&[]);
    assert!(said.contains(&another) && said.contains("Begin anew under another --name"), "{said}");
    assert_eq!(manifests(), known, "a refused start writes nothing");
    // A copy of a topic that keeps its offsets has another id too.
    let out = case.run(&["--until-end", "--allow-gap"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && said.contains(&another), "{said}");
    let out = case.run(&["--until-end"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && !said.contains(&another), "{said}");
}

/// More records in each partition than it ever had.
async fn grow(case: &Case) {
    let records: Vec<String> = (0..2_000)
        .map(|n| format!(r#"{{"user_id":1,"transaction_timestamp_millis":{}}}"#, case.start + n))
        .collect();
    let producer: FutureProducer =
        ClientConfig::new().set("bootstrap.servers", &case.services.kafka).create().unwrap();
    let mut sent = Vec::new();
    for partition in 0..4 {
        for record in &records {
            let record = FutureRecord::<str, str>::to(&case.topic).partition(partition).payload(record);
            sent.push(producer.send_result(record).map_err(|(e, _)| e).unwrap());
        }
    }
    for delivery in sent {
        delivery.await.unwrap().map_err(|(e, _)| e).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_expired_before_they_were_read_are_a_gap_with_numbers() {
    let Some(services) = services("records_that_expired_before_they_were_read") else { return };
    let mut case = Case::new(services, "expired", None).await;
    case.produce(2_000).await;
    assert!(case.run(&["--until-end"]).status.success());
    case.produce(2_000).await;
    let mut offsets = TopicPartitionList::new();
    (0..4).for_each(|partition| {
        offsets.add_partition_offset(&case.topic, partition, Offset::End).unwrap();
    });
    admin(&case.services.kafka).delete_records(&offsets, &AdminOptions::new()).await.unwrap();
    let out = case.run(&["--until-end"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(3) && said.contains("records are in neither"), "{said}");
    assert!(
        said.contains(&format!("topic {}, partition 0: its backup ends at offset", case.topic)),
        "{said}"
    );
    // A source without history says so, too.
    const HISTORY: &str = "history           = 'transactions_backup'";
    let sql = std::fs::read_to_string(case.path("transactions.sql")).unwrap();
    std::fs::write(case.path("transactions.sql"), sql.replace(HISTORY, "idle_timeout = '1 minute'")).unwrap();
    let out = case.run(&["--until-end"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(3) && said.contains("records are gone"), "{said}");
    assert!(said.contains(&format!("topic {}, partition 0: the next offset is", case.topic)), "{said}");
}

/// librdkafka may leave partitions unfetched for good after an outage; here it is made to.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_gets_nothing_any_more_is_opened_anew() {
    let Some(services) = services("a_client_that_gets_nothing_any_more_is_opened_anew") else { return };
    let mut case = Case::new(services, "deaf", None).await;
    ask_every(&case, "1 second");
    case.produce(5_000).await;
    let log = std::fs::File::create(case.path("log")).unwrap();
    let arguments = case.run_arguments(&["--checkpoint", "300ms", "--parallelism", "2"]);
    let mut command = case.command(&arguments);
    // One of the two shards, once it has read for a while.
    let mut running = command.env("MILLSTREAM_DEAF_AT", "kafka.poll:3000").stderr(log).spawn().unwrap();
    wait_for(&case, &mut running, 5_000);
    let path = case.path("log");
    let said = || std::fs::read_to_string(&path).unwrap().contains("a new client reads it");
    let (begun, mut rows) = (Instant::now(), 5_000);
    while !said() {
        assert!(begun.elapsed() < Duration::from_secs(60), "nobody noticed");
        case.produce(500).await;
        rows += 500;
    }
    wait_for(&case, &mut running, rows);
    stop(&mut running);
    case.finish("2");
    case.verify();
}

/// A broker of this test's own, by `docker/services.sh` with other ports and another folder; ended when dropped.
struct Broker {
    run: tempfile::TempDir,
    port: u16,
}

impl Broker {
    fn services(&self, word: &str) -> Command {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/docker/services.sh"));
        command.args([word, "kafka"]).env("MILLSTREAM_RUN", self.run.path()).env("MILLSTREAM_KEEP", "1");
        for (name, more) in [("KAFKA", 0), ("KAFKA_CONTROLLER", 1), ("KAFKA_SASL", 2), ("KAFKA_TLS", 3)] {
            command.env(format!("MILLSTREAM_{name}_PORT"), (self.port + more).to_string());
        }
        command
    }

    fn start() -> Self {
        // Four ports in a row that nobody has.
        let free = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
        let first = 10_000 + (std::process::id() % 2_000) as u16 * 4;
        let port = (first..32_000).step_by(4).find(|port| (0..4).all(|more| free(port + more))).unwrap();
        let broker = Self { run: tempfile::tempdir().unwrap(), port };
        broker.again();
        broker
    }

    /// Starts it, on the data that it has.
    fn again(&self) {
        let out = self.services("start").output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }

    fn signal(&self, signal: &str) {
        let pid = std::fs::read_to_string(self.run.path().join("kafka.pid")).unwrap();
        let pid = pid.split(' ').next().unwrap();
        assert!(Command::new("kill").args([signal, pid]).status().unwrap().success());
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Nobody hears of a failure any more.
        self.services("stop").output().ok();
    }
}

/// Seconds of an outage: a minute by hand, `MILLSTREAM_OUTAGE=60`.
fn outage() -> Duration {
    Duration::from_secs(std::env::var("MILLSTREAM_OUTAGE").ok().and_then(|s| s.parse().ok()).unwrap_or(3))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_away_or_starts_again_loses_nothing() {
    let Some(mut services) = services("a_broker_that_is_away_or_starts_again_loses_nothing") else { return };
    let broker = Broker::start();
    services.kafka = format!("127.0.0.1:{}", broker.port);
    let mut case = Case::new(services, "away", None).await;
    case.produce(5_000).await;
    let mut running = case.start(&["--checkpoint", "300ms"]);
    wait_for(&case, &mut running, 5_000);
    broker.signal("-STOP");
    std::thread::sleep(outage());
    broker.signal("-CONT");
    case.produce(5_000).await;
    wait_for(&case, &mut running, 10_000);
    broker.signal("-KILL");
    std::thread::sleep(Duration::from_secs(1));
    broker.again();
    case.produce(5_000).await;
    wait_for(&case, &mut running, 15_000);
    stop(&mut running);
    case.finish("2");
    case.verify();
}
