//! The shipped pipelines beside the transactions: clickstream and app events, against DuckDB.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::case::{DUCK, Dice, Services, create_topic, duck_agrees, send, services};

/// Three hours ago: what is older than a ttl is not served.
fn start_millis() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    now as u64 - 10_800_000
}

/// A shipped pipeline in a folder of its own, its topic and keys renamed.
struct Shipped {
    folder: tempfile::TempDir,
    services: Services,
    topic: String,
    file: PathBuf,
}

impl Shipped {
    async fn new(services: Services, name: &str, topic: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let own =
            format!("{topic}-{}", folder.path().file_name().unwrap().to_string_lossy().replace('.', ""));
        let sql = fs::read_to_string(root.join(format!("sql/{name}.sql"))).unwrap();
        let changed = sql
            .replace(&format!("topic             = '{topic}'"), &format!("topic = '{own}'"))
            .replace("prefix = 'session:'", &format!("prefix = '{own}:'"));
        assert!(changed.contains(&own));
        let file = folder.path().join(format!("{name}.sql"));
        fs::write(&file, changed).unwrap();
        create_topic(&services.kafka, &own, 4).await;
        Self { folder, services, topic: own, file }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_string_lossy().into_owned()
    }

    /// A folder of the test, or one of the S3 server.
    fn location(&self, name: &str) -> String {
        match name.starts_with("s3") {
            true => {
                format!("s3://{}/{}/{name}", std::env::var("MILLSTREAM_TEST_S3_BUCKET").unwrap(), self.topic)
            }
            false => self.path(name),
        }
    }

    /// A command that finds the S3 server.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        if let Some(s3) = &self.services.s3 {
            command.env("AWS_ENDPOINT_URL", s3);
        }
        command
    }

    /// Runs a command of millstream over the pipeline, with its lake in `lake`.
    fn millstream(&self, lake: &str, arguments: &[&str]) -> Output {
        let (command, rest) = arguments.split_first().unwrap();
        let out = self
            .command(env!("CARGO_BIN_EXE_millstream"))
            .arg(command)
            .arg(&self.file)
            .args(rest)
            .env("KAFKA_BROKERS", &self.services.kafka)
            .env("REDIS_URL", &self.services.redis)
            .env("LAKE", self.location(lake))
            .env("EXPORT", self.path("export/*.json"))
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        out
    }

    fn run(&self, lake: &str, more: &[&str]) -> String {
        let state = self.location(&format!("{lake}-state"));
        let name = format!("{}-{lake}", self.topic);
        let mut arguments = vec!["run"];
        arguments.extend(more);
        arguments.extend([
            "--until-end",
            "--close",
            "--state",
            &state,
            "--name",
            &name,
            "--checkpoint",
            "300ms",
        ]);
        String::from_utf8_lossy(&self.millstream(lake, &arguments).stderr).into_owned()
    }

    /// DuckDB's word that two queries have the same answer of at least `least` rows.
    fn same(&self, lake: &str, tables: &str, first: &str, second: &str, least: u64) {
        let mut command = self.command(&self.services.python);
        duck_agrees(command.args([DUCK, &self.location(lake), tables, first, second]), least);
    }
}

/// Hits of web logs, disordered by less than the lateness; a few without a ZIP or a session.
fn clicks(count: u64) -> Vec<(String, String)> {
    let (mut dice, start) = (Dice(5), start_millis());
    (0..count)
        .map(|i| {
            let session = (i / 300 * 40 + dice.roll(40)).to_string();
            let millis = start + i * 137 - dice.roll(4_000);
            let zip = match dice.roll(10) {
                0 => "null".to_owned(),
                1 => "\"00727\"".to_owned(),
                2 => "\"10001-1234\"".to_owned(),
                _ => format!("\"{:05}\"", dice.roll(100_000)),
            };
            let of = if dice.roll(100) == 0 { "null".to_owned() } else { format!("\"s{session}\"") };
            let source = format!("{{\"createdDateTime\": {millis}, \"zip\": {zip}, \"session_id\": {of}}}");
            (session, format!("{{\"_index\": \"weblogs\", \"_id\": \"{i}\", \"_source\": {source}}}"))
        })
        .collect()
}

const CLICKS: &str = "WITH c AS (SELECT event_time, _source.session_id AS session_id, _source.zip AS zip FROM backup
                       WHERE _source.session_id IS NOT NULL)
    SELECT session_id, epoch_us(event_time) AS t, zip, hour(event_time)::INT AS h, isodow(event_time)::INT AS d,
           dayofyear(event_time)::INT AS y,
           count(*) OVER (PARTITION BY session_id ORDER BY event_time RANGE BETWEEN INTERVAL 5 MINUTE PRECEDING AND CURRENT ROW) AS five,
           count(*) OVER (PARTITION BY session_id ORDER BY event_time RANGE BETWEEN INTERVAL 60 MINUTE PRECEDING AND CURRENT ROW) AS sixty,
           (epoch_us(event_time) - min(epoch_us(event_time)) OVER (PARTITION BY session_id ORDER BY event_time
               RANGE BETWEEN INTERVAL 1 DAY PRECEDING AND CURRENT ROW)) / 1000000.0 AS seconds FROM c";
const CLICK_FEATURES: &str =
    "SELECT session_id, epoch_us(event_time) AS t, zip, hour_of_day AS h, day_of_week AS d, day_of_year AS y,
           clicks_5m AS five, clicks_60m AS sixty, session_seconds AS seconds FROM training";

/// The same views over the topic and over the exported files (an array and lines): one answer, DuckDB's.
#[tokio::test(flavor = "multi_thread")]
async fn clicks_from_a_topic_and_from_files_are_the_same_features() {
    let Some(services) = services("clicks_from_a_topic_and_from_files_are_the_same_features") else { return };
    let case = Shipped::new(services, "clickstream", "clicks").await;
    let hits = clicks(20_000);
    let keyed = hits.iter().map(|(key, hit)| (Some(key.as_str()), Some(hit.as_str())));
    send(&case.services.kafka, &case.topic, keyed).await;
    let export = case.path("export");
    fs::create_dir(&export).unwrap();
    let lines: Vec<&str> = hits.iter().map(|(_, hit)| hit.as_str()).collect();
    fs::write(format!("{export}/1.json"), format!("[\n{}\n]", lines[..12_000].join(",\n"))).unwrap();
    fs::write(format!("{export}/2.json"), lines[12_000..].join("\n")).unwrap();
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/clickstream/export.sql");
    case.run("topic-lake", &["--parallelism", "2"]);
    let newest = "SELECT session_id, event_time, clicks_60m, region FROM click_features_serving ORDER BY 1";
    let served = case.millstream("topic-lake", &["query", "--format", "csv", "-c", newest]);
    let greatest = "SELECT session_id, event_time, clicks_60m, region FROM
        (SELECT *, row_number() OVER (PARTITION BY session_id ORDER BY event_time DESC) AS n FROM click_features_training)
        WHERE n = 1 ORDER BY 1";
    let expected = case.millstream("topic-lake", &["query", "--format", "csv", "-c", greatest]);
    let lines =
        |out: &Output| String::from_utf8_lossy(&out.stdout).lines().map(str::to_owned).collect::<Vec<_>>();
    let (served, expected) = (lines(&served), lines(&expected));
    let odd = served.iter().zip(&expected).find(|(a, b)| a != b);
    assert!(served.len() == expected.len() && odd.is_none(), "{} {} {odd:?}", served.len(), expected.len());
    case.run("file-lake", &[&files.to_string_lossy(), "--parallelism", "2"]);
    let tables = "backup=clicks_backup,training=click_features";
    let mut lakes = vec!["topic-lake", "file-lake"];
    if case.services.s3.is_some() {
        case.run("s3-lake", &["--parallelism", "2"]);
        lakes.push("s3-lake");
    }
    for lake in lakes {
        case.same(lake, tables, CLICK_FEATURES, CLICKS, 19_000);
    }
    fs::rename(case.path("file-lake/click_features"), case.path("topic-lake/from_files")).unwrap();
    let all = "SELECT * EXCLUDE (event_time_day) FROM";
    let both = "a=click_features,b=from_files";
    case.same("topic-lake", both, &format!("{all} a"), &format!("{all} b"), 19_000);
}

/// Each event once, undeclared names kept aside, NDJSON and Delta alike, through kills.
#[tokio::test(flavor = "multi_thread")]
async fn events_are_distinct_and_checked() {
    let Some(services) = services("events_are_distinct_and_checked") else { return };
    let case = Shipped::new(services, "events", "app_events").await;
    let (mut dice, start) = (Dice(3), start_millis());
    let (mut records, mut unknown) = (Vec::new(), 0);
    for i in 0..10_000u64 {
        let at = (start + i * 700 - dice.roll(4_000)) as f64 / 1_000.0;
        let name = match dice.roll(40) {
            0 => "app:crash",
            1..15 => "app:open",
            15..30 => "lesson:finish",
            _ => "shop:buy",
        };
        unknown += u64::from(name == "app:crash");
        let language = ["\"de\"", "\"en\"", "null"][dice.roll(3) as usize];
        let record = format!(
            "{{\"event_uuid\": \"u{i}\", \"created_at\": {at:.3}, \"event_name\": \"{name}\", \"event_specifics\": \
             {{\"language_id\": {language}, \"screen\": \"s\", \"duration_ms\": {i}}}}}"
        );
        records.push((format!("u{i}"), record.clone()));
        if dice.roll(8) == 0 && name != "app:crash" {
            // Sent again, with the same time.
            records.push((format!("u{i}"), record));
        }
    }
    let half = records.len() / 2;
    let state = case.path("lake-state");
    let name = format!("{}-lake", case.topic);
    for part in [&records[..half], &records[half..]] {
        let keyed = part.iter().map(|(key, record)| (Some(key.as_str()), Some(record.as_str())));
        send(&case.services.kafka, &case.topic, keyed).await;
        let mut child = Command::new(env!("CARGO_BIN_EXE_millstream"))
            .arg("run")
            .arg(&case.file)
            .args(["--state", &state, "--name", &name, "--checkpoint", "100ms"])
            .env("KAFKA_BROKERS", &case.services.kafka)
            .env("LAKE", case.path("lake"))
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(900 + dice.roll(900))).await;
        child.kill().unwrap();
        child.wait().unwrap();
    }
    case.run("lake", &["--parallelism", "2"]);
    let log = case.run("undisturbed", &["--parallelism", "3"]);
    assert!(log.contains(&format!("dead letters {unknown} ")), "{unknown} unknown names: {log}");
    let first = "SELECT event_uuid, epoch_us(event_time) AS t, event_type || ':' || event_subtype AS name, language_id, duration_ms";
    let staged = format!(
        "{first} FROM read_json('{}/**/*.ndjson', format = 'newline_delimited', columns = {{event_uuid: 'VARCHAR',
         event_time: 'TIMESTAMP', event_type: 'VARCHAR', event_subtype: 'VARCHAR', language_id: 'VARCHAR', duration_ms: 'BIGINT'}})",
        case.path("lake/events_staging")
    );
    case.same("lake", "events=events", &format!("{first} FROM events"), &staged, 9_000);
    let sent = format!(
        "SELECT DISTINCT event_uuid, (round(created_at * 1000000))::BIGINT AS t, event_name AS name,
                coalesce(event_specifics.language_id, 'unknown') AS language_id, event_specifics.duration_ms AS duration_ms
         FROM read_json('{}', format = 'newline_delimited', columns = {{event_uuid: 'VARCHAR', created_at: 'DOUBLE', event_name: 'VARCHAR',
              event_specifics: 'STRUCT(language_id VARCHAR, duration_ms BIGINT)'}}) WHERE event_name <> 'app:crash'",
        case.path("sent.ndjson")
    );
    let lines: Vec<&str> = records.iter().map(|(_, record)| record.as_str()).collect();
    fs::write(case.path("sent.ndjson"), lines.join("\n")).unwrap();
    case.same("lake", "events=events", &format!("{first} FROM events"), &sent, 9_000);
    if case.services.s3.is_some() {
        case.run("s3-lake", &["--parallelism", "2"]);
        case.same("s3-lake", "events=events", &format!("{first} FROM events"), &sent, 9_000);
    }
}
