//! Delta tables that are merged, vacuumed and changed, by the pipeline itself and by others, while it runs and is
//! killed: afterwards they hold what DuckDB makes of the topic.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::case::{Case, Dice, Services, rows, services};

/// Merges, deletes and writes checkpoints all the time.
const EAGER: &str =
    "target_file_size = '200KB', compact_interval = '300 milliseconds', vacuum_retention = '1 second'";

const TOTALS: &str = "
CREATE VIEW user_totals AS
SELECT user_id, count(*) AS n, max(event_time) AS last_at FROM transactions GROUP BY user_id;
CREATE SINK totals_now FROM user_totals
WITH (connector = 'delta', location = '${LAKE}/totals_now', mode = 'upsert', key = 'user_id', EAGER);
";

const TABLES: [&str; 3] = ["transactions_backup", "user_features", "totals_now"];

async fn eager(services: Services, name: &str, lake: Option<String>) -> Case {
    let case = Case::new(services, name, lake).await;
    let path = case.path("transactions.sql");
    let sql = fs::read_to_string(&path).unwrap();
    let by = "partition_by = 'day(event_time)'";
    assert_eq!(sql.matches(by).count(), 2);
    let sql = sql.replace(by, &format!("{by}, {EAGER}"));
    fs::write(path, format!("{sql}{}", TOTALS.replace("EAGER", EAGER))).unwrap();
    case
}

/// Another program that merges files and deletes what was removed, again and again; conflicts are its own matter.
const STRANGER: &str = r#"
import sys, time
from deltalake import DeltaTable
lake, done = sys.argv[1], {}
options = {"AWS_ALLOW_HTTP": "true"} if lake.startswith("s3://") else None
while True:
    for name in sys.argv[2:]:
        try:
            DeltaTable(f"{lake}/{name}", storage_options=options).optimize.compact()
            DeltaTable(f"{lake}/{name}", storage_options=options).vacuum(
                retention_hours=0, enforce_retention_duration=False, dry_run=False)
        except Exception as error:
            print(name, type(error).__name__, flush=True)
        time.sleep(0.5)
"#;

fn stranger(case: &Case) -> Child {
    let mut command = Command::new(&case.services.python);
    if let Some(s3) = &case.services.s3 {
        command.env("AWS_ENDPOINT_URL", s3);
    }
    let arguments = ["-c", STRANGER, &case.lake];
    command.args(arguments).args(TABLES).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Of each table: entries by us, entries of compactions by us, by others, checkpoints, progress in the log.
const LOOK: &str = r#"
import glob, json, os, sys
from deltalake import DeltaTable
lake, app = sys.argv[1], sys.argv[2]
options = {"AWS_ALLOW_HTTP": "true"} if lake.startswith("s3://") else None
for name, sink in (pair.split("=") for pair in sys.argv[3:]):
    table = DeltaTable(f"{lake}/{name}", storage_options=options)
    history = table.history()
    ours = [e for e in history if str(e.get("engineInfo", "")).startswith("millstream/")]
    merged = sum(e["operation"] == "OPTIMIZE" for e in ours)
    foreign = sum(e["operation"] == "OPTIMIZE" for e in history) - merged
    files = len(table.file_uris())
    of = lambda what: table.transaction_version(f"{app}/{sink}{what}")
    assert of("") and of("/generation") and of("/complete_until"), name
    offsets = sum(of(f"/offset/{app}/{p}") for p in range(4))
    # Entries stay, so each removed file has its name there.
    entries = (json.loads(line) for path in glob.glob(f"{lake}/{name}/_delta_log/*.json") for line in open(path))
    removed = [entry["remove"]["path"] for entry in entries if "remove" in entry]
    gone = sum(not os.path.exists(f"{lake}/{name}/{path}") for path in removed)
    print(name, "versions", len(history), "merged", merged, "foreign", foreign, "files", files, "offsets", offsets, "deleted", gone)
"#;

/// (merged, foreign, deleted) of each table; files are counted in a local lake only.
fn look(case: &Case) -> Vec<[u64; 3]> {
    let mut command = Command::new(&case.services.python);
    if let Some(s3) = &case.services.s3 {
        command.env("AWS_ENDPOINT_URL", s3);
    }
    let pairs = [
        "transactions_backup=transactions_backup",
        "user_features=user_features_training",
        "totals_now=totals_now",
    ];
    let out = command.args(["-c", LOOK, &case.lake, &case.name]).args(pairs).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{said}{}", String::from_utf8_lossy(&out.stderr));
    println!("{said}");
    let numbers = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        assert_eq!(words[10].parse::<u64>().unwrap(), case.produced, "{line}");
        [4, 6, 12].map(|at| words[at].parse().unwrap())
    };
    said.lines().map(numbers).collect()
}

fn check(case: &Case) {
    case.verify();
    let totals = "SELECT user_id, count(*) AS n, max(event_time) AS last_at FROM b GROUP BY user_id";
    case.same("b=transactions_backup,n=totals_now", totals, "SELECT user_id, n, last_at FROM n", 100);
}

async fn kills(mut case: Case, rounds: u64, alone: bool) {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut dice = Dice(seed);
    let mut other = (!alone).then(|| stranger(&case));
    for round in 0..rounds {
        let parallelism = ["1", "2"][round as usize % 2];
        let mut process = case.start(&["--parallelism", parallelism, "--checkpoint", "200ms"]);
        // A few rows for each epoch, so that there are many small files.
        for _ in 0..16 {
            case.produce(rows() / 400).await;
            tokio::time::sleep(Duration::from_millis(100 + dice.roll(200))).await;
        }
        process.kill().unwrap();
        process.wait().unwrap();
    }
    case.finish("2");
    if let Some(other) = &mut other {
        other.kill().unwrap();
        other.wait().unwrap();
    }
    let found = look(&case);
    let sum = |at: usize| found.iter().map(|table| table[at]).sum::<u64>();
    // Files that a stranger has merged all the time need no merge by us.
    assert!(sum(0) > 0 || !alone, "the pipeline merged nothing: {found:?}");
    assert_eq!(sum(1) > 0, !alone, "{found:?}");
    assert!(sum(2) > 0 || case.lake.starts_with("s3://"), "nothing was deleted: {found:?}");
    check(&case);
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_amid_compaction_and_vacuum_change_nothing() {
    let Some(services) = services("kills_amid_compaction_and_vacuum_change_nothing") else { return };
    kills(eager(services, "upkeep", None).await, 5, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn optimize_and_vacuum_by_others_change_nothing() {
    let Some(services) = services("optimize_and_vacuum_by_others_change_nothing") else { return };
    kills(eager(services, "strangers", None).await, 4, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_and_vacuum_on_s3_change_nothing() {
    let Some(services) = services("compaction_and_vacuum_on_s3_change_nothing") else { return };
    let bucket = std::env::var("MILLSTREAM_TEST_S3_BUCKET").unwrap_or_else(|_| "millstream-test".to_owned());
    if services.s3.is_none() {
        assert!(std::env::var("MILLSTREAM_REQUIRE_SERVICES").is_err(), "an S3 server is needed");
        println!("skipped compaction_and_vacuum_on_s3_change_nothing: no S3 server");
        return;
    }
    kills(eager(services, "upkeep-s3", Some(format!("s3://{bucket}"))).await, 3, true).await;
}

fn stop_at_end(case: &Case) {
    let out = case.run(&["--until-end", "--checkpoint", "500ms"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// A backup gets a column, loses one, and refuses one of another type; the features beside it go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_gets_the_columns_of_the_changed_sql() {
    let Some(services) = services("a_backup_gets_the_columns_of_the_changed_sql") else { return };
    let mut case = Case::new(services, "evolve", None).await;
    let path = case.path("transactions.sql");
    let sql = fs::read_to_string(&path).unwrap();
    let source = sql.split("CREATE VIEW").next().unwrap();
    let (currency, counterpart) =
        ("    currency                     VARCHAR,\n", "    counterpart_id               BIGINT,\n");
    let view = "CREATE VIEW amounts AS SELECT user_id, event_time, amount FROM transactions WHERE amount > 0;
        CREATE SINK positive FROM amounts
        WITH (connector = 'delta', location = '${LAKE}/positive', on_schema_change = 'add_columns');";
    let growing = "partition_by = 'day(event_time)', on_schema_change = 'add_columns'";
    let all = format!("{}{view}", source.replace("partition_by = 'day(event_time)'", growing));
    let without = |column: &str, sql: &str| {
        assert!(sql.contains(column));
        sql.replace(column, "")
    };
    let write = |sql: &str| fs::write(&path, sql).unwrap();
    write(&without(counterpart, &all));
    case.produce(2_000).await;
    stop_at_end(&case);
    write(&all.replace("event_time, amount FROM", "event_time, currency, amount * 2 AS twice, amount FROM"));
    case.produce(2_000).await;
    stop_at_end(&case);
    write(&without(currency, &all));
    case.produce(2_000).await;
    stop_at_end(&case);
    let counts =
        "SELECT count(*), count(user_id), count(currency), count(counterpart_id), count(amount) FROM b";
    case.same("b=transactions_backup", counts, "SELECT 6000, 6000, 4000, 4000, 6000", 1);
    let rows = "SELECT user_id, event_time, amount FROM b WHERE amount > 0";
    case.same("b=transactions_backup,p=positive", rows, "SELECT user_id, event_time, amount FROM p", 1_000);
    let later = "SELECT count(*) FROM p WHERE twice IS NOT NULL AND twice = 2 * amount AND currency = 'EUR'";
    let expected =
        "SELECT count(*) FROM b WHERE amount > 0 AND currency IS NOT NULL AND counterpart_id IS NOT NULL";
    case.same("b=transactions_backup,p=positive", later, expected, 1);
    for (from, to, word) in [
        ("counterpart_id               BIGINT", "counterpart_id VARCHAR", "as long, the sink writes string"),
        ("WHERE amount > 0", "WHERE amount > 1", "is not what it was"),
        ("event_time, amount FROM", "event_time, amount + 1 AS amount FROM", "is not what it was"),
    ] {
        assert!(all.contains(from));
        write(&all.replace(from, to));
        let out = case.run(&["--until-end"]);
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{to}: {said}");
        assert!(said.contains(word) && said.contains("hint:"), "{to}: {said}");
    }
}
