//! TUMBLE and HOP through the binary: every emission against the same SQL as a batch over the backup.

use std::fs;

use crate::case::{Case, Dice, services};

/// One minute windows, and windows whose slide does not divide their size.
const VIEWS: &str = "
CREATE VIEW minutes AS
SELECT user_id, window_start, window_end, count(*) AS n, sum(amount) AS amount, min(currency) AS currency
FROM TUMBLE(transactions, event_time, INTERVAL '1 minute') GROUP BY user_id, window_start, window_end;
CREATE VIEW hops AS
SELECT window_start, count(*) AS n, count(DISTINCT user_id) AS users, max(amount) AS amount
FROM HOP(transactions, event_time, INTERVAL '20 seconds', INTERVAL '50 seconds') GROUP BY window_start;
CREATE VIEW busy AS SELECT window_start, n FROM hops WHERE n > 100;
CREATE VIEW per_minute AS
SELECT window_start AS minute, count(*) AS n FROM TUMBLE(transactions, event_time, INTERVAL '1 minute')
GROUP BY window_start;
CREATE VIEW per_five AS
SELECT window_start AS five, sum(n) AS n, count(*) AS minutes FROM TUMBLE(per_minute, minute, INTERVAL '5 minutes')
GROUP BY window_start;
CREATE VIEW running AS
SELECT user_id, window_start, sum(n) OVER (PARTITION BY user_id ORDER BY window_start) AS so_far FROM minutes;
CREATE SINK minutes_final FROM minutes WITH (connector = 'delta', location = '${LAKE}/minutes_final');
CREATE SINK minutes_changes FROM minutes
WITH (connector = 'delta', location = '${LAKE}/minutes_changes', mode = 'changelog');
CREATE SINK minutes_now FROM minutes
WITH (connector = 'delta', location = '${LAKE}/minutes_now', mode = 'upsert', key = 'user_id, window_start, window_end');
CREATE SINK minutes_newest FROM minutes
WITH (connector = 'redis', url = '${REDIS_URL}', key = 'user_id', prefix = 'TOPIC-newest:');
CREATE SINK minutes_each FROM minutes
WITH (connector = 'redis', url = '${REDIS_URL}', key = 'user_id, window_start, window_end', prefix = 'TOPIC-each:');
CREATE SINK hops_final FROM hops WITH (connector = 'delta', location = '${LAKE}/hops_final');
CREATE SINK busy_final FROM busy WITH (connector = 'delta', location = '${LAKE}/busy_final');
CREATE SINK per_five_final FROM per_five WITH (connector = 'delta', location = '${LAKE}/per_five_final');
CREATE SINK running_final FROM running WITH (connector = 'delta', location = '${LAKE}/running_final');
";

/// Names of views and sinks → the SQL of the views over the backup.
fn over_backup(view: &str) -> String {
    let start = VIEWS.find(&format!("CREATE VIEW {view} AS")).unwrap();
    let body = VIEWS[start..].split(" AS\n").nth(1).or_else(|| VIEWS[start..].split(" AS ").nth(1)).unwrap();
    body.split(';').next().unwrap().replace("(transactions,", "(transactions_backup,")
}

async fn case(name: &str) -> Option<Case> {
    let case = Case::new(services(name)?, name, None).await;
    let path = case.path("transactions.sql");
    let sql = fs::read_to_string(&path).unwrap();
    let source_and_backup = sql.split("CREATE VIEW").next().unwrap();
    fs::write(path, format!("{source_and_backup}{}", VIEWS.replace("TOPIC", &case.topic))).unwrap();
    Some(case)
}

/// DataFusion's answer over the backup; nothing is late in these.
fn check(case: &Case, closed: bool) {
    let columns = "user_id, window_start, window_end, n, round(amount, 2) AS amount, currency";
    let same = |found: &str, expected: &str, what: &str| {
        let (found, expected) = (case.query(found), case.query(expected));
        assert!(expected.lines().count() > 3, "{what}: {expected}");
        assert_eq!(found, expected, "{what}");
    };
    let batch = format!("({})", over_backup("minutes"));
    let order = "ORDER BY user_id, window_start";
    let expected = format!("SELECT {columns} FROM {batch} {order}");
    same(&format!("SELECT {columns} FROM minutes_now {order}"), &expected, "upserted");
    same(&format!("SELECT {columns} FROM minutes_each {order}"), &expected, "served by window");
    let accumulated = format!(
        "SELECT {columns} FROM minutes_changes GROUP BY user_id, window_start, window_end, n, amount, currency
         HAVING sum(_weight) <> 0 {order}"
    );
    same(&accumulated, &expected, "accumulated changes");
    let newest = format!(
        "SELECT {columns} FROM (SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY window_start DESC) AS r
         FROM {batch}) WHERE r = 1 {order}"
    );
    same(&format!("SELECT {columns} FROM minutes_newest {order}"), &newest, "newest");
    if !closed {
        return;
    }
    same(&format!("SELECT {columns} FROM minutes_final {order}"), &expected, "final");
    same("SELECT * FROM hops_final ORDER BY 1", &format!("{} ORDER BY 1", over_backup("hops")), "hops");
    let five = format!("WITH per_minute AS ({}) {}", over_backup("per_minute"), over_backup("per_five"));
    let found = case.query("SELECT * FROM per_five_final ORDER BY 1");
    assert!(found.lines().count() > 1);
    assert_eq!(found, case.query(&format!("{five} ORDER BY 1")), "windows of windows");
    let busy = format!("SELECT window_start, n FROM ({}) WHERE n > 100 ORDER BY 1", over_backup("hops"));
    same("SELECT * FROM busy_final ORDER BY 1", &busy, "busy");
    let running = over_backup("running").replace("FROM minutes", &format!("FROM {batch}"));
    same(
        "SELECT * FROM running_final ORDER BY 1, 2",
        &format!("SELECT * FROM ({running}) ORDER BY 1, 2"),
        "running",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn windows_are_the_batch_answer() {
    let Some(mut case) = case("windows_are_the_batch_answer").await else { return };
    for parallelism in ["2", "1", "3"] {
        case.produce(4_000).await;
        let out = case.run(&["--until-end", "--parallelism", parallelism, "--checkpoint", "200ms"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        check(&case, false);
    }
    case.finish("2");
    check(&case, true);
}

#[tokio::test(flavor = "multi_thread")]
async fn windows_survive_kills() {
    let Some(mut case) = case("windows_survive_kills").await else { return };
    let mut dice = Dice(7);
    for round in 0..5u64 {
        case.produce(2_000).await;
        let parallelism = (1 + round % 3).to_string();
        let mut child = case.start(&["--checkpoint", "150ms", "--parallelism", &parallelism]);
        tokio::time::sleep(std::time::Duration::from_millis(500 + dice.roll(1_500))).await;
        child.kill().unwrap();
        child.wait().unwrap();
    }
    case.finish("2");
    check(&case, true);
}
