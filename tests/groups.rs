//! GROUP BY through the binary: the number of transactions per user, to Redis, a changelog and an upserted table.

use std::fs;
use std::process::{Command, Stdio};

use crate::case::{Case, Dice, Services, services};

/// The user's own case, and HAVING over the same groups.
const VIEWS: &str = "
CREATE VIEW user_totals AS
SELECT user_id, count(*) AS total_transactions_count, sum(amount) AS amount, max(event_time) AS last_at
FROM transactions GROUP BY user_id;
CREATE VIEW big_spenders AS
SELECT user_id, sum(amount) AS amount FROM transactions GROUP BY user_id HAVING sum(amount) > 0;
CREATE VIEW distribution AS
SELECT total_transactions_count AS n, count(*) AS users, sum(total_transactions_count) AS transactions,
       avg(user_id) AS mean, count(*) FILTER (WHERE user_id < 1000) AS early, min(user_id) AS first,
       max(last_at) AS last, count(DISTINCT last_at) AS times
FROM user_totals GROUP BY total_transactions_count;
CREATE VIEW counts_seen AS SELECT DISTINCT users FROM distribution;
CREATE SINK distribution_now FROM distribution
WITH (connector = 'delta', location = '${LAKE}/distribution_now', mode = 'upsert', key = 'n');
CREATE SINK distribution_moved FROM distribution
WITH (connector = 'delta', location = '${LAKE}/distribution_moved', mode = 'upsert', key = 'n', partition_by = 'users');
CREATE SINK distribution_serving FROM distribution
WITH (connector = 'redis', url = '${REDIS_URL}', key = 'n', prefix = 'TOPIC-distribution:');
CREATE SINK counts_changes FROM counts_seen
WITH (connector = 'delta', location = '${LAKE}/counts_changes', mode = 'changelog');
CREATE SINK totals_changes FROM user_totals
WITH (connector = 'delta', location = '${LAKE}/totals_changes', mode = 'changelog');
CREATE SINK totals_now FROM user_totals
WITH (connector = 'delta', location = '${LAKE}/totals_now', mode = 'upsert', key = 'user_id');
CREATE SINK totals_moved FROM user_totals
WITH (connector = 'delta', location = '${LAKE}/totals_moved', mode = 'upsert', key = 'user_id', partition_by = 'minute(last_at)');
CREATE SINK spenders_now FROM big_spenders
WITH (connector = 'delta', location = '${LAKE}/spenders_now', mode = 'upsert', key = 'user_id');
CREATE SINK totals_serving FROM user_totals
WITH (connector = 'redis', url = '${REDIS_URL}', key = 'user_id', prefix = 'TOPIC-total:');
CREATE SINK spenders_serving FROM big_spenders
WITH (connector = 'redis', url = '${REDIS_URL}', key = 'user_id', prefix = 'TOPIC-spender:');
";

async fn case(name: &str) -> Option<Case> {
    case_in(services(name)?, name, None).await
}

async fn case_in(services: Services, name: &str, lake: Option<String>) -> Option<Case> {
    let case = Case::new(services, name, lake).await;
    let path = case.path("transactions.sql");
    let sql = fs::read_to_string(&path).unwrap();
    let source_and_backup = sql.split("CREATE VIEW").next().unwrap();
    fs::write(path, format!("{source_and_backup}{}", VIEWS.replace("TOPIC", &case.topic))).unwrap();
    Some(case)
}

/// DataFusion's answer over the backup, late rows and all.
fn check(case: &Case) {
    let totals = "SELECT user_id, count(*) AS n, round(sum(amount), 2) AS amount, max(event_time) AS last_at
                  FROM transactions_backup GROUP BY user_id ORDER BY user_id";
    let expected = case.query(totals);
    assert!(expected.lines().count() > 1_000);
    let served = "SELECT user_id, total_transactions_count AS n, round(amount, 2) AS amount, last_at
                  FROM totals_serving ORDER BY user_id";
    assert_eq!(case.query(served), expected, "served");
    assert_eq!(case.query(&served.replace("totals_serving", "totals_now")), expected, "upserted");
    assert_eq!(case.query(&served.replace("totals_serving", "totals_moved")), expected, "upserted by minute");
    let accumulated = "SELECT user_id, total_transactions_count AS n, round(amount, 2) AS amount, last_at
                       FROM totals_changes GROUP BY 1, 2, 3, 4 HAVING sum(_weight) <> 0 ORDER BY user_id";
    assert_eq!(case.query(accumulated), expected, "accumulated changes");
    let more = "SELECT count(*) AS n FROM (SELECT user_id FROM totals_changes GROUP BY user_id
                HAVING sum(_weight) <> 1 OR min(_epoch) < 1)";
    assert_eq!(case.query(more), "n\n0\n", "one row per user holds");
    let distribution = "SELECT n, count(*) AS users, sum(n) AS transactions, avg(user_id) AS mean,
            count(*) FILTER (WHERE user_id < 1000) AS early, min(user_id) AS first, max(last_at) AS last,
            count(DISTINCT last_at) AS times
        FROM (SELECT user_id, count(*) AS n, max(event_time) AS last_at FROM transactions_backup GROUP BY user_id) GROUP BY n ORDER BY n";
    for sink in ["distribution_now", "distribution_moved", "distribution_serving"] {
        let sql =
            format!("SELECT n, users, transactions, mean, early, first, last, times FROM {sink} ORDER BY n");
        assert_eq!(case.query(&sql), case.query(distribution), "{sink}: groups of groups");
    }
    let seen = format!("SELECT DISTINCT users FROM ({distribution}) ORDER BY users");
    let accumulated =
        "SELECT users FROM counts_changes GROUP BY users HAVING sum(_weight) <> 0 ORDER BY users";
    assert_eq!(case.query(accumulated), case.query(&seen), "DISTINCT over groups of groups");
    let spenders = "SELECT user_id, round(sum(amount), 2) AS amount FROM transactions_backup
                    GROUP BY user_id HAVING sum(amount) > 0 ORDER BY user_id";
    for sink in ["spenders_serving", "spenders_now"] {
        let sql = format!("SELECT user_id, round(amount, 2) AS amount FROM {sink} ORDER BY user_id");
        assert_eq!(case.query(&sql), case.query(spenders), "{sink}: who fell below HAVING is deleted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn totals_per_user_are_the_batch_answer() {
    let Some(mut case) = case("totals_per_user_are_the_batch_answer").await else { return };
    for parallelism in ["2", "1", "3"] {
        case.produce(4_000).await;
        let out = case.run(&["--until-end", "--parallelism", parallelism, "--checkpoint", "200ms"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        check(&case);
    }
    let found = "SELECT user_id, total_transactions_count AS n, last_at, last_at_minute AS minute FROM moved";
    let expected = "SELECT user_id, count(*) AS n, max(event_time) AS last_at,
                        date_trunc('minute', max(event_time)) AS minute FROM backup GROUP BY user_id";
    case.same("backup=transactions_backup,moved=totals_moved", found, expected, 1_000);
}

/// Lake and state on S3: MERGE and its conditional commits too.
#[tokio::test(flavor = "multi_thread")]
async fn totals_per_user_on_s3() {
    let Some(services) = services("totals_per_user_on_s3") else { return };
    let bucket = std::env::var("MILLSTREAM_TEST_S3_BUCKET").unwrap_or_else(|_| "millstream-test".to_owned());
    let Some(mut case) = case_in(services, "totals_s3", Some(format!("s3://{bucket}"))).await else { return };
    for parallelism in ["2", "1"] {
        case.produce(3_000).await;
        let out = case.run(&["--until-end", "--parallelism", parallelism, "--checkpoint", "500ms"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        check(&case);
    }
    let found = "SELECT user_id, total_transactions_count AS n, round(amount, 2) AS amount, last_at FROM now";
    let expected =
        "SELECT user_id, count(*) AS n, round(sum(amount), 2) AS amount, max(event_time) AS last_at
                    FROM backup GROUP BY user_id";
    case.same("backup=transactions_backup,now=totals_now", found, expected, 1_000);
}

/// Both sides of each transaction, as one view: rows of UNION ALL, a window and a GROUP BY over it.
#[tokio::test(flavor = "multi_thread")]
async fn union_all_is_the_batch_answer() {
    let Some(services) = services("union_all_is_the_batch_answer") else { return };
    let mut case = Case::new(services, "union_all", None).await;
    let path = case.path("transactions.sql");
    let sql = fs::read_to_string(&path).unwrap();
    let union = "SELECT user_id AS account, event_time, amount FROM FROM_HERE WHERE amount < 5000
                 UNION ALL SELECT counterpart_id, event_time, -amount FROM FROM_HERE
                 UNION ALL SELECT user_id, event_time, amount FROM FROM_HERE WHERE amount < 5000";
    let sums =
        "SELECT account, event_time, count(*) OVER (PARTITION BY account ORDER BY event_time) AS n FROM";
    let views = format!(
        "CREATE VIEW sides AS {};
         CREATE VIEW counted AS {sums} sides;
         CREATE SINK sides_table FROM sides WITH (connector = 'delta', location = '${{LAKE}}/sides');
         CREATE SINK counted_table FROM counted WITH (connector = 'delta', location = '${{LAKE}}/counted');
         CREATE SINK totals AS SELECT account, count(*) AS n FROM sides GROUP BY account
         WITH (connector = 'delta', location = '${{LAKE}}/totals', mode = 'upsert', key = 'account');",
        union.replace("FROM_HERE", "transactions")
    );
    fs::write(path, format!("{}{views}", sql.split("CREATE VIEW").next().unwrap())).unwrap();
    case.produce(3_000).await;
    let out = case.run(&["--until-end", "--parallelism", "3", "--checkpoint", "200ms"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    case.produce(3_000).await;
    case.finish("2");
    let batch = union.replace("FROM_HERE", "transactions_backup");
    let sides = |from: &str| {
        format!("SELECT account, event_time, round(amount, 2) AS a FROM {from} ORDER BY 1, 2, 3")
    };
    assert_eq!(case.query(&sides("sides_table")), case.query(&sides(&format!("({batch})"))));
    let counted = |from: &str| format!("SELECT account, event_time, n FROM {from} ORDER BY 1, 2, 3");
    assert_eq!(case.query(&counted("counted_table")), case.query(&counted(&format!("({sums} ({batch}))"))));
    let totals = |from: &str| format!("SELECT account, n FROM {from} ORDER BY account");
    let expected = format!("(SELECT account, count(*) AS n FROM ({batch}) GROUP BY account)");
    assert_eq!(case.query(&totals("totals")), case.query(&totals(&expected)));
}

/// `dev` with two files: no service, and the totals are there.
#[test]
fn dev_keeps_totals_per_user() {
    let folder = tempfile::tempdir().unwrap();
    let sql = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("sql");
    for name in ["transactions.sql", "transactions_producer.sql", "user_totals.sql"] {
        fs::copy(sql.join(name), folder.path().join(name)).unwrap();
    }
    let command = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
        command
            .args(arguments)
            .current_dir(folder.path())
            .env("REDIS_URL", "redis://127.0.0.1:9")
            .env_remove("LAKE");
        command
    };
    let files = ["transactions.sql", "user_totals.sql"];
    let dev =
        command(&["dev", files[0], files[1]]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(8));
    Command::new("kill").args(["-INT", &dev.id().to_string()]).status().unwrap();
    let out = dev.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    let ask = |sql: &str| {
        let state = "./.millstream/transactions-dev";
        let arguments = ["query", files[0], files[1], "--state", state, "--format", "csv", "-c", sql];
        let out = command(&arguments).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let columns = "user_id, total_transactions_count, round(total_amount, 2)";
    let served = ask(&format!("SELECT {columns} FROM user_totals_serving ORDER BY user_id"));
    let upserted = ask(&format!("SELECT {columns} FROM user_totals_table ORDER BY user_id"));
    let backup =
        "SELECT user_id, count(*), round(sum(amount), 2) FROM transactions_backup GROUP BY 1 ORDER BY 1";
    let rows = |csv: &str| csv.lines().skip(1).map(str::to_owned).collect::<Vec<_>>();
    assert!(served.lines().count() > 1_000, "{said}");
    assert_eq!(rows(&served), rows(&upserted));
    assert_eq!(rows(&ask(backup)), rows(&served));
}

#[tokio::test(flavor = "multi_thread")]
async fn totals_per_user_survive_kills() {
    let Some(mut case) = case("totals_per_user_survive_kills").await else { return };
    let mut dice = Dice(u64::from(std::process::id()));
    println!("seed {}", std::process::id());
    for round in 0..5 {
        case.produce(3_000).await;
        let parallelism = ["1", "2", "3"][round % 3];
        let mut process = case.start(&["--parallelism", parallelism, "--checkpoint", "100ms"]);
        tokio::time::sleep(std::time::Duration::from_millis(300 + dice.roll(1_200))).await;
        process.kill().unwrap();
        process.wait().unwrap();
    }
    case.finish("2");
    check(&case);
}
