//! Bootstrap from a backup that somebody else wrote: plain Parquet files, as Kafka Connect lays them out, with offsets in
//! a column of another name or with none at all. Features over all records are DuckDB's over what was produced.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::bootstrap::{crash_at, expire};
use crate::case::{Case, services};

const SQL: &str = "
CREATE SOURCE transactions (
    user_id BIGINT NOT NULL, transaction_timestamp_millis BIGINT NOT NULL, amount DOUBLE,
    event_time TIMESTAMP AS (to_timestamp_millis(transaction_timestamp_millis)),
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (connector = 'kafka', bootstrap_servers = '${KAFKA_BROKERS}', topic = 'TOPIC', format = 'json', history = 'old', HOW);
CREATE TABLE old WITH (connector = 'parquet', location = '${LAKE}/old');
CREATE VIEW features AS
SELECT user_id, event_time, count(*) OVER w AS n, sum(amount) OVER w AS amount FROM transactions
WINDOW w AS (PARTITION BY user_id ORDER BY event_time RANGE BETWEEN INTERVAL '30 seconds' PRECEDING AND CURRENT ROW);
CREATE SINK training FROM features WITH (connector = 'delta', location = '${LAKE}/training');
";

/// Folders kp=0, kp=1, … of the records produced so far; `columns`: what stands beside the record's own.
const WRITE: &str = "
import sys, duckdb
produced, folder, columns = sys.argv[1:]
db = duckdb.connect()
db.execute(f\"\"\"COPY (SELECT user_id, t AS transaction_timestamp_millis, amount, p AS kp{columns}
    FROM read_json_auto('{produced}') ORDER BY random()) TO '{folder}' (FORMAT parquet, PARTITION_BY (kp))\"\"\")
ends = db.execute(f\"SELECT p, max(o) + 1 FROM read_json_auto('{produced}') GROUP BY p ORDER BY p\").fetchall()
print(', '.join(f'{p}:{end}' for p, end in ends))
";

struct Foreign {
    case: Case,
}

impl Foreign {
    async fn new(name: &str) -> Option<Self> {
        Some(Self { case: Case::new(services(name)?, &name.replace('_', "-"), None).await })
    }

    fn old(&self) -> PathBuf {
        PathBuf::from(&self.case.lake).join("old")
    }

    /// How the history is read, as options of the source.
    fn sql(&self, how: &str) {
        let sql = SQL.replace("TOPIC", &self.case.topic).replace("HOW", how);
        fs::write(self.case.path("transactions.sql"), sql).unwrap();
    }

    /// The backup of everything so far; gives the next offsets, as `history.end_offsets` has them.
    fn write(&self, columns: &str) -> String {
        fs::create_dir_all(&self.case.lake).unwrap();
        let mut python = Command::new(&self.case.services.python);
        python.args(["-c", WRITE]).arg(self.case.path("produced.ndjson")).arg(self.old()).arg(columns);
        let out = python.output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    }

    /// Kills on the way, then to the end; gives what the first start and the last one said.
    async fn through_kills(&mut self) -> [String; 2] {
        let log = |case: &Case| fs::read_to_string(case.path("crash.log")).unwrap();
        let mut first = None;
        for at in ["history.rows:2", "manifest.after", "history.end", "history.handoff"] {
            // A manifest may say that all is read by then.
            if first.is_some() && !self.in_history() {
                println!("  {at}: through already");
                continue;
            }
            let arguments = self.case.run_arguments(&["--checkpoint", "20ms", "--parallelism", "2"]);
            crash_at(at, self.case.command(&arguments), &self.case);
            first.get_or_insert_with(|| log(&self.case));
            self.case.produce(200).await;
        }
        let out = self.case.run(&["--until-end", "--close"]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}");
        [first.unwrap(), said]
    }

    /// Whether the newest manifest, or that there is none, says that there is more to read of the history.
    fn in_history(&self) -> bool {
        let manifests = fs::read_dir(PathBuf::from(&self.case.state).join("manifest")).unwrap();
        let newest = manifests.map(|file| file.unwrap().path()).max().unwrap();
        let text = fs::read_to_string(newest).unwrap();
        let manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
        let source = &manifest["sources"]["transactions"];
        source["partitions"].as_array().is_none_or(Vec::is_empty) || source["history"].is_object()
    }

    /// Every record counts once.
    fn check(&self) {
        let produced = format!("read_json_auto('{}')", self.case.path("produced.ndjson").display());
        let found = "SELECT user_id, epoch_ms(event_time) AS t, n, round(amount, 2) AS amount FROM training";
        let wanted = format!(
            "SELECT user_id, t, count(*) OVER w AS n, round(sum(amount) OVER w, 2) AS amount FROM {produced}
             WINDOW w AS (PARTITION BY user_id ORDER BY t RANGE BETWEEN 30000 PRECEDING AND CURRENT ROW)"
        );
        self.case.same("training=training", found, &wanted, self.case.produced);
    }

    /// A start that is refused; it has claimed nothing.
    fn refused(&self, how: &str, code: i32, parts: &[&str]) {
        self.sql(how);
        let out = self.case.run(&["--until-end"]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{how}: {said}");
        parts.iter().for_each(|part| assert!(said.contains(part), "{how}: {part}: {said}"));
        assert!(!PathBuf::from(&self.case.state).join("manifest").exists(), "{how}");
    }
}

const COLUMNS: &str = "'history.partition_column' = 'kp', 'history.offset_column' = 'ko'";

#[tokio::test(flavor = "multi_thread")]
async fn a_history_with_offsets_of_its_own_is_gone_on_with() {
    let Some(mut foreign) = Foreign::new("foreign_offsets").await else { return };
    foreign.case.produce(60_000).await;
    foreign.write(", o AS ko");
    expire(&foreign.case).await;
    foreign.case.produce(2_000).await;
    foreign.sql(COLUMNS);
    foreign.through_kills().await;
    foreign.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_history_without_offsets_is_taken_on_the_users_word() {
    let Some(mut foreign) = Foreign::new("foreign_ends").await else { return };
    foreign.case.produce(60_000).await;
    let ends = foreign.write("");
    expire(&foreign.case).await;
    foreign.case.produce(2_000).await;
    let how = format!("'history.partition_column' = 'kp', 'history.end_offsets' = '{ends}'");
    foreign.sql(&how);
    let [first, _] = foreign.through_kills().await;
    assert!(first.contains("on your word (history.end_offsets)") && first.contains(&ends), "{first}");
    foreign.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_foreign_history_lacks_is_said_with_numbers() {
    let Some(mut foreign) = Foreign::new("foreign_gaps").await else { return };
    foreign.case.produce(2_000).await;
    let ends = foreign.write(", o AS ko");
    foreign.refused("on_error = 'fail'", 2, &["has no column _partition", "history.partition_column"]);
    let partition = "'history.partition_column' = 'kp'";
    foreign.refused(partition, 2, &["has no column _offset", "history.end_offsets"]);
    foreign.refused(
        "'history.offset_column' = 'nothing', 'history.partition_column' = 'kp'",
        2,
        &["no column nothing"],
    );
    foreign.refused("'history.end_offsets' = 'soon'", 2, &["is no list of offsets"]);
    let one = format!("{partition}, 'history.end_offsets' = '{}'", ends.split(", ").next().unwrap());
    foreign.refused(&one, 2, &["which history.end_offsets does not name"]);
    let few = format!("{partition}, 'history.end_offsets' = '0:10, 1:10, 2:10, 3:10'");
    foreign.refused(&few, 3, &["rows of partition 0, more than there are offsets below 10"]);
    let many = format!("{partition}, 'history.end_offsets' = '0:9000, 1:9000, 2:9000, 3:9000'");
    foreign.refused(&many, 3, &["up to 9000, but the topic ends at"]);

    // A file that stands there twice.
    let folder = foreign.old().join("kp=1");
    let file = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    fs::copy(&file, folder.join("again.parquet")).unwrap();
    foreign.refused(COLUMNS, 3, &["rows of partition 1 more than once, offset 0 first"]);

    // Records in neither: the topic has lost them, and the backup lacks one.
    fs::remove_dir_all(foreign.old()).unwrap();
    fs::write(foreign.case.path("all.ndjson"), fs::read(foreign.case.path("produced.ndjson")).unwrap())
        .unwrap();
    let produced = fs::read_to_string(foreign.case.path("produced.ndjson")).unwrap();
    let lines: Vec<&str> = produced.lines().filter(|line| !line.starts_with("{\"p\":2,\"o\":7,")).collect();
    assert_eq!(lines.len(), 1_999);
    fs::write(foreign.case.path("produced.ndjson"), lines.join("\n") + "\n").unwrap();
    foreign.write(", o AS ko");
    foreign.refused(COLUMNS, 3, &["lacks 1 offsets of partition 2", "offset 7 first", "--allow-gap"]);
    foreign.case.produce(400).await;
    expire(&foreign.case).await;
    foreign.refused(COLUMNS, 3, &["lacks 1 offsets of partition 2"]);
    let out = foreign.case.run(&["--until-end", "--close", "--allow-gap"]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && said.contains("offset 7 first"), "{said}");
    assert!(said.contains("are lost (--allow-gap)"), "{said}");
    let rows = foreign.case.query("SELECT count(*) AS n FROM training");
    assert_eq!(rows, "n\n1999\n");
}
