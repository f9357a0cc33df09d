//! GROUP BY through the binary: the number of transactions per user, to Redis, a changelog and an upserted table.

use std::fs;

use crate::case::{Case, Dice, services};

/// The user's own case, and HAVING over the same groups.
const VIEWS: &str = "
CREATE VIEW user_totals AS
SELECT user_id, count(*) AS total_transactions_count, sum(amount) AS amount, max(event_time) AS last_at
FROM transactions GROUP BY user_id;
CREATE VIEW big_spenders AS
SELECT user_id, sum(amount) AS amount FROM transactions GROUP BY user_id HAVING sum(amount) > 0;
CREATE SINK totals_changes FROM user_totals
WITH (connector = 'delta', location = '${LAKE}/totals_changes', mode = 'changelog');
CREATE SINK totals_serving FROM user_totals
WITH (connector = 'redis', url = '${REDIS_URL}', key = 'user_id', prefix = 'TOPIC-total:');
CREATE SINK spenders_serving FROM big_spenders
WITH (connector = 'redis', url = '${REDIS_URL}', key = 'user_id', prefix = 'TOPIC-spender:');
";

async fn case(name: &str) -> Option<Case> {
    let case = Case::new(services(name)?, name, None).await;
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
    let accumulated = "SELECT user_id, total_transactions_count AS n, round(amount, 2) AS amount, last_at
                       FROM totals_changes GROUP BY 1, 2, 3, 4 HAVING sum(_weight) <> 0 ORDER BY user_id";
    assert_eq!(case.query(accumulated), expected, "accumulated changes");
    let more = "SELECT count(*) AS n FROM (SELECT user_id FROM totals_changes GROUP BY user_id
                HAVING sum(_weight) <> 1 OR min(_epoch) < 1)";
    assert_eq!(case.query(more), "n\n0\n", "one row per user holds");
    let spenders = "SELECT user_id, round(sum(amount), 2) AS amount FROM transactions_backup
                    GROUP BY user_id HAVING sum(amount) > 0 ORDER BY user_id";
    let found =
        case.query("SELECT user_id, round(amount, 2) AS amount FROM spenders_serving ORDER BY user_id");
    assert_eq!(found, case.query(spenders), "who fell below HAVING is deleted");
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
