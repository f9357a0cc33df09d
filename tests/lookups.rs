//! Look-ups in Redis: what is served while Redis is there, and what the option promises while it is not.

use std::fs;

use crate::case::{Case, send, services};
use crate::online::{OwnRedis, wait_for};

pub const USERS: u64 = 50;

/// A pipeline that joins transactions with scores in a Redis of the test's own.
pub async fn case(name: &str, on_error: &str) -> Option<(Case, OwnRedis)> {
    let redis = OwnRedis::start();
    let case = Case::new(services(name)?, name, None).await;
    fill(&redis);
    let path = case.path("transactions.sql");
    let sql = fs::read_to_string(&path).unwrap();
    let source = sql
        .split("CREATE SINK")
        .next()
        .unwrap()
        .replace("history", "-- history")
        .replace("format            = 'json',", "format            = 'json'");
    let scores = format!(
        "CREATE TABLE scores (user_id BIGINT, score DOUBLE, since TIMESTAMP) WITH (connector = 'redis',
             url = 'redis://127.0.0.1:{0}', key = 'user_id', prefix = 'score:', cache = '200ms', on_lookup_error = '{on_error}');
         CREATE SINK scored AS SELECT t.user_id, t.amount AS phase, s.score FROM transactions t
         LEFT JOIN scores s ON t.user_id = s.user_id WITH (connector = 'delta', location = '${{LAKE}}/scored');
         CREATE SINK served AS SELECT user_id, event_time, amount AS phase FROM transactions
         WITH (connector = 'redis', url = 'redis://127.0.0.1:{0}', key = 'user_id', prefix = 'served:');",
        redis.port()
    );
    fs::write(path, format!("{source}{scores}")).unwrap();
    Some((case, redis))
}

/// Every other user has a score.
pub fn fill(redis: &OwnRedis) {
    for user in (0..USERS).step_by(2) {
        redis.ask(&format!("HSET score:{user} user_id {user} score {}.5", user * 10));
    }
}

/// A row per user.
pub async fn phase(case: &Case, number: u64) {
    let rows: Vec<(String, String)> = (0..USERS)
        .map(|user| {
            let millis = case.start + number * 1_000 + user;
            let row = format!(
                "{{\"user_id\": {user}, \"transaction_timestamp_millis\": {millis}, \"amount\": {number}}}"
            );
            (user.to_string(), row)
        })
        .collect();
    send(
        &case.services.kafka,
        &case.topic,
        rows.iter().map(|(key, row)| (Some(key.as_str()), Some(row.as_str()))),
    )
    .await;
}

/// The newest value that is served of a user, without the length in front.
fn value(redis: &OwnRedis, user: u64) -> String {
    redis.ask(&format!("HGET served:{user} phase")).lines().last().unwrap_or_default().to_owned()
}

/// Rows and scores of a phase.
pub fn found(case: &Case, number: u64) -> (u64, u64) {
    let sql = format!("SELECT count(*) AS n, count(score) AS s FROM scored WHERE phase = {number}");
    let out = case.command(&["query", "--format", "csv", "-c", &sql]).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let mut parts = text.lines().nth(1).unwrap_or("0,0").split(',').map(|n| n.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

/// Three phases: Redis there, gone, there again. Returns what came of the second one.
async fn outage(name: &str, on_error: &str) -> Option<((u64, u64), String)> {
    let (case, redis) = case(name, on_error).await?;
    let port = redis.port();
    phase(&case, 1).await;
    let log = case.path("run.log");
    let mut child = case
        .command(&case.run_arguments(&["--checkpoint", "150ms", "--plain"]))
        .stderr(fs::File::create(&log).unwrap())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the first phase", || found(&case, 1).0 == USERS);
    assert_eq!(found(&case, 1), (USERS, USERS / 2), "every other user has a score");
    drop(redis);
    tokio::time::sleep(std::time::Duration::from_millis(400)).await;
    phase(&case, 2).await;
    let kept = if on_error == "dead_letter" { 0 } else { USERS };
    if kept > 0 {
        wait_for("the second phase", || found(&case, 2).0 == kept);
    }
    // `MILLSTREAM_OUTAGE=20` for the full length by hand.
    let seconds = std::env::var("MILLSTREAM_OUTAGE").ok().and_then(|n| n.parse().ok()).unwrap_or(1.5);
    tokio::time::sleep(std::time::Duration::from_secs_f64(seconds)).await;
    let second = found(&case, 2);
    let redis = OwnRedis::start_at(port);
    fill(&redis);
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    phase(&case, 3).await;
    wait_for("the third phase", || found(&case, 3).0 == USERS);
    assert_eq!(found(&case, 3), (USERS, USERS / 2), "Redis is asked again");
    // It came back empty: every newest value is written again, those of the outage too.
    wait_for("the newest values", || (0..USERS).all(|user| value(&redis, user) == "3.0"));
    std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(child.wait().unwrap().success());
    Some((second, fs::read_to_string(log).unwrap()))
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_answers_serve_an_outage() {
    let Some((second, log)) = outage("stale_answers_serve_an_outage", "stale").await else { return };
    assert_eq!(second, (USERS, USERS / 2), "what was last seen");
    assert!(log.contains("look-ups go on without Redis"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn null_serves_an_outage() {
    let Some((second, _)) = outage("null_serves_an_outage", "null").await else { return };
    assert_eq!(second, (USERS, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_keep_what_an_outage_met() {
    let Some((second, log)) = outage("dead_letters_keep_what_an_outage_met", "dead_letter").await else {
        return;
    };
    assert_eq!(second, (0, 0));
    assert!(log.contains(&format!("dead letters {USERS}")), "{log}");
}
