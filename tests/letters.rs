//! Dead letters: exactly once in the sinks that read them, whatever is killed; listed, shown and replayed.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Header, Message, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::case::{Case, Dice, create_topic, services};

/// Sinks beside those of the shipped pipeline: three that read all letters, and a view of which some rows fail.
const SINKS: &str = r#"
CREATE SINK bad FROM dead_letters
WITH (connector = 'delta', location = '${LAKE}/bad', partition_by = 'day(timestamp)');
CREATE SINK bad_lines FROM dead_letters WITH (connector = 'ndjson', location = '${LAKE}/bad_lines');
CREATE SINK bad_records AS SELECT topic, partition, "offset", kind, payload FROM dead_letters WHERE stage = 'decode'
WITH (connector = 'kafka', bootstrap_servers = '${KAFKA_BROKERS}', topic = 'TOPIC-bad', key = 'kind');
CREATE SINK checked AS SELECT user_id, event_time, ensure(amount, amount < 9000, 'too much') AS amount FROM transactions
WITH (connector = 'delta', location = '${LAKE}/checked');
"#;

fn seed() -> Dice {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    Dice(seed)
}

impl Case {
    pub fn with_letters(&self) {
        let sql = fs::read_to_string(self.path("transactions.sql")).unwrap();
        fs::write(self.path("transactions.sql"), sql + &SINKS.replace("TOPIC", &self.topic)).unwrap();
    }

    /// Sends bad records, every second one with headers, and notes what must become of each.
    pub async fn send_bad(&self, from: u64, count: u64) {
        let config = |key: &str, value: &str| ClientConfig::new().set(key, value).clone();
        let producer: FutureProducer = config("bootstrap.servers", &self.services.kafka).create().unwrap();
        let mut lines = String::new();
        for n in from..from + count {
            let (kind, payload) = match n % 5 {
                0 => ("not_json", format!("no json {n}").into_bytes()),
                1 => ("not_json", vec![0xFF, 0, (n % 256) as u8]),
                2 => ("missing_field", self.without_user(n).into_bytes()),
                3 => (
                    "wrong_type",
                    format!(r#"{{"user_id":"x{n}","transaction_timestamp_millis":1}}"#).into_bytes(),
                ),
                _ => (
                    "future",
                    format!(r#"{{"user_id":{n},"transaction_timestamp_millis":4070908800000}}"#).into_bytes(),
                ),
            };
            let key = format!("k{n}");
            let mut record =
                FutureRecord::to(&self.topic).partition((n % 4) as i32).key(&key).payload(&payload);
            let mut expected = "null".to_owned();
            if n % 2 == 1 {
                let trace = n.to_string();
                let headers = OwnedHeaders::new()
                    .insert(Header { key: "trace", value: Some(&trace) })
                    .insert(Header { key: "raw", value: Some(&[0xFF_u8, 1]) })
                    .insert(Header { key: "none", value: None::<&str> });
                record = record.headers(headers);
                let all = format!(
                    r#"[{{"key":"trace","value":"{n}"}},{{"key":"raw","value":"\\xff01"}},{{"key":"none","value":null}}]"#
                );
                expected = serde_json::Value::from(all).to_string();
            }
            let at = producer.send(record, Duration::from_secs(5)).await.map_err(|(e, _)| e).unwrap();
            let hex: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
            lines.push_str(&format!(
                "{{\"p\":{},\"o\":{},\"kind\":\"{kind}\",\"k\":\"{key}\",\"hex\":\"{hex}\",\"headers\":{expected}}}\n",
                at.partition, at.offset
            ));
        }
        self.note("bad.ndjson", &lines);
    }

    /// A record that lacks its user; its time is of the pipeline's own rows.
    fn without_user(&self, n: u64) -> String {
        format!(r#"{{"transaction_timestamp_millis":{},"amount":{n}}}"#, self.start + n)
    }

    fn note(&self, file: &str, lines: &str) {
        use std::io::Write;
        let mut file = fs::OpenOptions::new().create(true).append(true).open(self.path(file)).unwrap();
        file.write_all(lines.as_bytes()).unwrap();
    }

    pub fn read_json(&self, file: &str) -> String {
        format!("read_json_auto('{}')", self.path(file).display())
    }

    fn dead_letters(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(&[&["dead-letters"], arguments].concat());
        command.args(["--state", &self.state, "--name", &self.name]);
        command
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_letter_is_in_every_sink_once_whatever_is_killed() {
    let Some(services) = services("each_letter_is_in_every_sink_once_whatever_is_killed") else { return };
    let mut case = Case::new(services, "letters", None).await;
    case.with_letters();
    create_topic(&case.services.kafka, &format!("{}-bad", case.topic), 2).await;
    let mut dice = seed();
    let mut sent = 0;
    for round in 0..6 {
        case.produce(2_000).await;
        case.send_bad(sent, 100).await;
        sent += 100;
        let parallelism = ["1", "2", "3"][round % 3];
        let mut process = case.start(&["--parallelism", parallelism, "--checkpoint", "100ms"]);
        case.produce(500).await;
        case.send_bad(sent, 50).await;
        sent += 50;
        tokio::time::sleep(Duration::from_millis(300 + dice.roll(1_500))).await;
        process.kill().unwrap();
        process.wait().unwrap();
    }
    case.finish("2");
    case.verify();

    let bad = case.read_json("bad.ndjson");
    let expected = format!("SELECT p, o, kind, k, hex, headers FROM {bad}");
    let of_source = "\"at\" = 'transactions' AND topic IS NOT NULL AND timestamp IS NOT NULL";
    let found = format!(
        "SELECT partition AS p, \"offset\" AS o, kind, decode(key) AS k, lower(hex(payload)) AS hex, headers
         FROM bad WHERE {of_source}"
    );
    case.same("bad=bad", &found, &expected, sent);
    // Rows that a view refuses: as often as there are records, and of those that DuckDB says.
    let produced = case.read_json("produced.ndjson");
    let refused = format!("SELECT p, o FROM {produced} WHERE amount >= 9000");
    let found =
        "SELECT partition AS p, \"offset\" AS o FROM bad WHERE \"at\" = 'checked' AND stage = 'expression'";
    case.same("bad=bad", found, &refused, 100);
    // Their records were still at hand.
    let found = "SELECT partition AS p, \"offset\" AS o, CAST(decode(payload)::JSON ->> 'user_id' AS BIGINT) AS u,
                 CAST(decode(payload)::JSON ->> 'amount' AS DOUBLE) AS amount, decode(key) AS k, timestamp IS NULL AS old
                 FROM bad WHERE \"at\" = 'checked'";
    let wanted = format!(
        "SELECT p, o, user_id AS u, amount, user_id::VARCHAR AS k, false AS old FROM {produced} WHERE amount >= 9000"
    );
    case.same("bad=bad", found, &wanted, 100);
    let in_state = case.query_state("SELECT count(*) AS n FROM dead_letters");
    let in_table = case.query("SELECT count(*) AS n FROM bad");
    assert_eq!(in_state, in_table, "the state folder holds the same letters");
    lines_are_the_same(&case);
    assert_eq!(records_of(&case), case.decode_letters(), "the topic holds each record of the stage decode");
}

impl Case {
    pub fn query_state(&self, sql: &str) -> String {
        let arguments = ["query", "--state", &self.state, "--format", "csv", "-c", sql];
        let out = self.command(&arguments).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    /// (partition, offset) of the bad records that cannot be decoded.
    fn decode_letters(&self) -> BTreeSet<(i64, i64)> {
        let text = fs::read_to_string(self.path("bad.ndjson")).unwrap();
        let rows = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        rows.filter(|row| row["kind"] != "future")
            .map(|row| (row["p"].as_i64().unwrap(), row["o"].as_i64().unwrap()))
            .collect()
    }
}

/// Python reads the NDJSON files: the same letters, with bytes as text where they are, else as `\x` and digits.
fn lines_are_the_same(case: &Case) {
    let script = r#"
import glob, json, sys
lake, bad = sys.argv[1:]
rows = [json.loads(line) for file in glob.glob(lake + "/bad_lines/**/*.ndjson", recursive=True) for line in open(file)]
def raw(text):
    return text[2:] if text.startswith("\\x") else text.encode().hex()
found = sorted((r["partition"], r["offset"], r["kind"], raw(r["payload"]), r["headers"] or "") for r in rows if r["at"] == "transactions")
wanted = sorted((r["p"], r["o"], r["kind"], r["hex"], r["headers"] or "") for r in map(json.loads, open(bad)))
assert found == wanted, (len(found), len(wanted), [x for x in found if x not in wanted][:3])
assert all(json.loads(r["payload"])["amount"] >= 9000 and r["stage"] == "expression" for r in rows if r["at"] == "checked")
print(len(found), "lines")
"#;
    let mut python = Command::new(&case.services.python);
    python.args(["-c", script, &case.lake]).arg(case.path("bad.ndjson"));
    let out = python.output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// What lies in the topic of dead letters.
fn records_of(case: &Case) -> BTreeSet<(i64, i64)> {
    let topic = format!("{}-bad", case.topic);
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &case.services.kafka).set("group.id", "letters");
    config.set("enable.partition.eof", "true");
    let consumer: BaseConsumer = config.create().unwrap();
    let mut list = TopicPartitionList::new();
    for partition in 0..2 {
        list.add_partition_offset(&topic, partition, Offset::Beginning).unwrap();
    }
    consumer.assign(&list).unwrap();
    let (mut found, mut ended) = (BTreeSet::new(), 0);
    while ended < 2 {
        match consumer.poll(Duration::from_secs(10)).expect("the topic answers") {
            Ok(message) => {
                let row: serde_json::Value = serde_json::from_slice(message.payload().unwrap()).unwrap();
                assert_eq!(row["kind"].as_str().unwrap().as_bytes(), message.key().unwrap());
                found.insert((row["partition"].as_i64().unwrap(), row["offset"].as_i64().unwrap()));
            }
            Err(rdkafka::error::KafkaError::PartitionEOF(_)) => ended += 1,
            Err(error) => panic!("{error}"),
        }
    }
    found
}

/// Without any service: what a sink of dead letters refuses is a letter too, in the state and in no sink; the relation can
/// be described and queried.
#[test]
fn what_a_sink_of_letters_refuses_is_in_the_state_only() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("in")).unwrap();
    let lines = "{\"id\":1}\nno json\n{\"id\":\"x\"}\n{\"id\":2}\n";
    fs::write(folder.path().join("in/a.ndjson"), lines).unwrap();
    let sql = "CREATE SOURCE s (id BIGINT NOT NULL) WITH (connector = 'files', path = './in/*.ndjson');
        CREATE SINK rows FROM s WITH (connector = 'ndjson', location = './rows');
        CREATE SINK bad FROM dead_letters WITH (connector = 'ndjson', location = './bad');
        CREATE VIEW texts AS SELECT kind, payload FROM dead_letters WHERE payload IS NOT NULL;
        CREATE SINK picky AS SELECT ensure(kind, kind <> 'not_json', 'unwanted') AS kind FROM dead_letters
        WITH (connector = 'console');";
    fs::write(folder.path().join("p.sql"), sql).unwrap();
    let millstream = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
        let out = command.current_dir(folder.path()).args(arguments).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let printed = millstream(&["run", "p.sql", "--state", "./state", "--until-end", "--close"]);
    assert_eq!(printed, "{\"kind\":\"wrong_type\"}\n");
    let files = fs::read_dir(folder.path().join("bad")).unwrap().map(|file| file.unwrap().path());
    let files = files.filter(|path| path.is_file());
    let bad: String = files.map(|file| fs::read_to_string(file).unwrap()).collect();
    let payloads: Vec<_> = bad.lines().map(|line| line.split("\"payload\":").nth(1).unwrap()).collect();
    assert_eq!(payloads, [r#""no json","headers":null}"#, r#""{\"id\":\"x\"}","headers":null}"#]);
    let query = |sql| millstream(&["query", "p.sql", "--state", "./state", "--format", "csv", "-c", sql]);
    let all = query("SELECT at, stage, kind, \"offset\", payload FROM dead_letters ORDER BY at, \"offset\"");
    let wanted = "at,stage,kind,offset,payload\npicky,expression,expression,1,\ns,decode,not_json,1,no json\n\
                  s,decode,wrong_type,2,\"{\"\"id\"\":\"\"x\"\"}\"\n";
    assert_eq!(all, wanted);
    // The accounts add up, those of the sinks of letters too.
    let status = millstream(&["status", "p.sql", "--state", "./state", "--format", "json"]);
    assert!(status.contains("picky"), "{status}");
    assert_eq!(query("SELECT count(*) AS n FROM texts"), "n\n2\n");
    assert!(query("DESCRIBE dead_letters").contains("payload,BYTEA,true\nheaders,VARCHAR,true\n"));
}

/// Letters are replayed by mended SQL while the pipeline runs, by two at once, and again: each is in the backup once, and
/// the pipeline goes on.
#[tokio::test(flavor = "multi_thread")]
async fn replay_appends_once_beside_the_running_pipeline() {
    let Some(services) = services("replay_appends_once_beside_the_running_pipeline") else { return };
    let mut case = Case::new(services, "replay", None).await;
    case.produce(2_000).await;
    case.send_bad(0, 200).await;
    let out = case.run(&["--until-end", "--checkpoint", "200ms"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));

    let listed = case.dead_letters(&["ls", "--format", "csv", "--limit", "1000"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&listed.stdout).lines().count(), 201);
    let none = case.dead_letters(&["replay"]).output().unwrap();
    let said = String::from_utf8_lossy(&none.stderr);
    assert!(none.status.code() == Some(1) && none.stdout.is_empty(), "the SQL is as it was: {said}");

    let sql = fs::read_to_string(case.path("transactions.sql")).unwrap();
    let mended = sql.replace("user_id                      BIGINT NOT NULL", "user_id BIGINT");
    assert_ne!(sql, mended);
    let running = case
        .command(&case.run_arguments(&["--checkpoint", "100ms", "--parallelism", "2"]))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // The pipeline has read its SQL when it commits.
    let before = versions(&case);
    case.produce(500).await;
    while versions(&case) == before {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    fs::write(case.path("transactions.sql"), mended).unwrap();
    let dry = case.dead_letters(&["replay", "--dry-run", "--kind", "missing_field"]).output().unwrap();
    assert!(dry.status.success(), "{}", String::from_utf8_lossy(&dry.stderr));
    let appended = replayed_at_once(&mut case).await;
    assert_eq!(appended, 40);
    let again = case.dead_letters(&["replay", "--kind", "missing_field"]).output().unwrap();
    let said = String::from_utf8_lossy(&again.stderr);
    assert!(again.status.success() && said.contains("0 appended, 40 there already"), "{said}");

    // The pipeline commits behind the replays.
    let before = versions(&case);
    case.produce(500).await;
    while versions(&case) == before {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Command::new("kill").args(["-INT", &running.id().to_string()]).status().unwrap();
    let out = running.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    fs::write(case.path("transactions.sql"), sql).unwrap();
    case.finish("1");
    replayed_rows_are_in_the_backup(&case);
}

/// Three replays while records come in; how many rows they appended together.
async fn replayed_at_once(case: &mut Case) -> u64 {
    let replays: Vec<_> = (0..3)
        .map(|_| {
            let mut command = case.dead_letters(&["replay", "--kind", "missing_field", "--kind", "not_json"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    case.produce(2_000).await;
    let mut appended = 0;
    for replay in replays {
        let out = replay.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "what is no JSON fails still: {said}");
        assert!(said.contains("still no rows, not_json: 80"), "{said}");
        let count = said.split("transactions_backup: ").nth(1).unwrap().split(' ').next().unwrap();
        let count: u64 = count.parse().unwrap();
        // Two views of the source in Delta; only the one who appended names intervals.
        let lines = String::from_utf8_lossy(&out.stdout);
        assert_eq!(
            count > 0,
            lines.starts_with("millstream backfill user_features_training --from "),
            "{lines}"
        );
        appended += count;
    }
    appended
}

/// DuckDB: every record is in the backup once, the replayed ones with what their payloads say, and named in the state.
fn replayed_rows_are_in_the_backup(case: &Case) {
    let (produced, bad) = (case.read_json("produced.ndjson"), case.read_json("bad.ndjson"));
    let replayed = format!("SELECT p, o FROM {bad} WHERE kind = 'missing_field'");
    let origins = "SELECT _partition AS p, _offset AS o FROM backup";
    let all = format!("SELECT p, o FROM {produced} UNION ALL {replayed}");
    case.same("backup=transactions_backup", origins, &all, 5_040);
    let rows = "SELECT _partition AS p, _offset AS o, amount, epoch_us(event_time) AS t,
                       epoch_us(event_time_day::TIMESTAMP) AS d, decode(_key) AS k FROM backup WHERE user_id IS NULL";
    let wanted = format!(
        "SELECT p, o, n AS amount, ({start} + n) * 1000 AS t, (({start} + n) // 86400000) * 86400000000 AS d, k FROM (
         SELECT *, CAST(substr(k, 2) AS BIGINT) AS n FROM {bad} WHERE kind = 'missing_field')",
        start = case.start
    );
    case.same("backup=transactions_backup", rows, &wanted, 40);
    let named = format!(
        "SELECT DISTINCT partition AS p, \"offset\" AS o FROM read_parquet('{}/replayed/*.parquet') WHERE topic = '{}'",
        case.state, case.topic
    );
    case.same("backup=transactions_backup", &named, &replayed, 40);
}

/// Commits of the backup.
fn versions(case: &Case) -> usize {
    fs::read_dir(format!("{}/transactions_backup/_delta_log", case.lake)).map_or(0, Iterator::count)
}

/// What lies in no backup is shown whole; late rows come with their time.
#[tokio::test(flavor = "multi_thread")]
async fn letters_and_late_rows_are_listed_and_shown() {
    let Some(services) = services("letters_and_late_rows_are_listed_and_shown") else { return };
    let mut case = Case::new(services, "show", None).await;
    case.produce(500).await;
    case.send_bad(0, 10).await;
    let out = case.run(&["--until-end"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    // An hour behind, after the watermark is known.
    let late = format!(r#"{{"user_id":1,"transaction_timestamp_millis":{}}}"#, case.start - 3_600_000);
    case.send_raw(&[Some(&late), Some(&late)]).await;
    case.finish("1");
    let text = |arguments: &[&str]| {
        let out = case.dead_letters(arguments).output().unwrap();
        assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
        out.stdout
    };
    let listed = String::from_utf8(text(&["ls", "--late", "--format", "csv"])).unwrap();
    let rows: Vec<&str> = listed.lines().collect();
    let time = chrono::DateTime::from_timestamp_millis(case.start as i64 - 3_600_000).unwrap();
    let time = time.format("%Y-%m-%dT%H:%M:%S%.3fZ").to_string();
    assert_eq!(rows[0], "topic,partition,offset,event_time");
    assert!(rows.len() == 3 && rows[1..].iter().all(|row| row.ends_with(&time)), "{listed}");

    let bad = fs::read_to_string(case.path("bad.ndjson")).unwrap();
    let bad: Vec<serde_json::Value> = bad.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let place = |n: usize| format!("{}/{}/{}", case.topic, bad[n]["p"], bad[n]["o"]);
    let shown = String::from_utf8(text(&["show", &place(1)])).unwrap();
    for line in
        ["kind       not_json", "key        k1", r#"{"key":"raw","value":"\\xff01"}"#, "payload\n\\xff0001\n"]
    {
        assert!(shown.contains(line), "{line}\n{shown}");
    }
    assert_eq!(text(&["show", "--raw", &place(1)]), [0xFF, 0, 1]);
    assert_eq!(text(&["show", "--raw", &place(2)]), case.without_user(2).into_bytes());
    let kinds =
        String::from_utf8(text(&["ls", "--kind", "future", "--limit", "1", "--format", "ndjson"])).unwrap();
    let row: serde_json::Value = serde_json::from_str(&kinds).unwrap();
    assert_eq!((&row["stage"], &row["at"]), (&"future".into(), &"transactions".into()));
    let out = case.dead_letters(&["show", "nowhere/0/1"]).output().unwrap();
    assert_eq!(out.status.code(), Some(2));
}

/// Two views refuse a row beside the source: their letters have the whole record. A view above OVER refuses it too: that
/// letter says where the record lies, and its row is shown from the backup.
#[tokio::test(flavor = "multi_thread")]
async fn letters_of_views_have_their_record_or_its_row() {
    let Some(services) = services("letters_of_views_have_their_record_or_its_row") else { return };
    let case = Case::new(services, "views", None).await;
    let views = r#"
        CREATE SINK small AS SELECT user_id, event_time, ensure(amount, amount < 100, 'much') AS amount FROM transactions
        WITH (connector = 'delta', location = '${LAKE}/small');
        CREATE SINK tiny AS SELECT user_id, event_time, ensure(amount, amount < 50, 'too much') AS amount FROM transactions
        WITH (connector = 'delta', location = '${LAKE}/tiny');
        CREATE SINK first AS SELECT user_id, event_time,
               ensure(total_transactions_count, total_transactions_count < 2, 'not the first') AS n
        FROM user_transaction_features WITH (connector = 'delta', location = '${LAKE}/first');"#;
    let sql = fs::read_to_string(case.path("transactions.sql")).unwrap();
    fs::write(case.path("transactions.sql"), sql + views).unwrap();
    let config = ClientConfig::new().set("bootstrap.servers", &case.services.kafka).clone();
    let producer: FutureProducer = config.create().unwrap();
    let payload = |n: u64, amount| {
        format!(r#"{{"user_id":7,"transaction_timestamp_millis":{},"amount":{amount}}}"#, case.start + n)
    };
    for (n, amount) in [(0, 10), (1, 500)] {
        let headers = OwnedHeaders::new().insert(Header { key: "n", value: Some(&n.to_string()) });
        let payload = payload(n, amount);
        let record = FutureRecord::to(&case.topic).partition(0).key("k").payload(&payload).headers(headers);
        producer.send(record, Duration::from_secs(30)).await.map_err(|(e, _)| e).unwrap();
    }
    case.finish("2");

    let all = case.query_state(
        "SELECT at, stage, partition, \"offset\", \"timestamp\" IS NULL AS old, key, payload IS NULL AS gone, headers
         FROM dead_letters ORDER BY at",
    );
    let headers = r#""[{""key"":""n"",""value"":""1""}]""#;
    let wanted = format!(
        "at,stage,partition,offset,old,key,gone,headers\nfirst,expression,0,1,true,,true,\n\
         small,expression,0,1,false,k,false,{headers}\ntiny,expression,0,1,false,k,false,{headers}\n"
    );
    assert_eq!(all, wanted);
    let show = |more: &[&str]| {
        let place = format!("{}/0/1", case.topic);
        let out = case.dead_letters(&[&["show", &place], more].concat()).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    assert_eq!(show(&["--raw"]), payload(1, 500));
    let shown = show(&[]);
    let (letters, row) = shown.split_once("\nrow in the backup\n").expect(&shown);
    assert_eq!(letters.matches(&format!("payload\n{}\n", payload(1, 500))).count(), 2, "{shown}");
    assert_eq!(letters.matches("payload    not kept").count(), 1, "{shown}");
    let row: serde_json::Value = serde_json::from_str(row).unwrap();
    assert_eq!((&row["user_id"], &row["amount"], &row["_offset"]), (&7.into(), &500.0.into(), &1.into()));
}
