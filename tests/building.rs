//! Sinks that are new to a pipeline which has a state: built from the backup, as the topic has lost what was read, while rows
//! keep coming. What comes of them is what the sinks have that were there from the beginning.

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::bootstrap::{crash_at, expire, spawned};
use crate::case::Case;
use crate::crash::Crashes;

/// A view like one that was there, sinks that read views with state, and a view that is another.
const NEW: &str = "
CREATE VIEW second_features AS
SELECT user_id, event_time,
       count(*)    OVER (PARTITION BY user_id ORDER BY event_time) AS total_transactions_count,
       sum(amount) OVER (PARTITION BY user_id ORDER BY event_time RANGE BETWEEN INTERVAL '7 days' PRECEDING AND CURRENT ROW) AS amount_7d,
       hour_of_day(event_time) AS hour_of_day, day_of_week(event_time) AS day_of_week
FROM transactions;
CREATE SINK second_training FROM second_features
WITH (connector = 'delta', location = '${LAKE}/second_features', partition_by = 'day(event_time)');
CREATE SINK second_serving FROM user_transaction_features
WITH (connector = 'redis', url = '${REDIS_URL}', key = 'user_id', prefix = 'TOPIC-second:', ttl = '30 days');
CREATE SINK second_totals FROM user_totals
WITH (connector = 'delta', location = '${LAKE}/second_totals', mode = 'upsert', key = 'user_id');
CREATE VIEW minutes AS
SELECT user_id, event_time, count(*) OVER (PARTITION BY user_id ORDER BY event_time
       RANGE BETWEEN INTERVAL '1 minute' PRECEDING AND CURRENT ROW) AS n, amount
FROM transactions WHERE amount > 0;
CREATE SINK minute_counts FROM minutes WITH (connector = 'delta', location = '${LAKE}/minutes');
";

/// Where a start is killed that builds, one after the other. Each is passed wherever the one before left it.
const ON_THE_WAY: [&str; 7] = [
    "claim.after",
    "history.rows:2",
    "history.rows:1",
    "history.end",
    "manifest.after:2",
    "barrier.after:3",
    "delta.commit.after:2",
];

/// A pipeline with a state, whose topic has lost what was read.
async fn begun(name: &str) -> Option<Crashes> {
    let mut crashes = Crashes::new(name, false).await?;
    crashes.produce(15_000).await;
    assert!(crashes.case.run(&["--until-end", "--checkpoint", "300ms"]).status.success());
    expire(&crashes.case).await;
    Some(crashes)
}

fn sql(case: &Case) -> String {
    fs::read_to_string(case.path("transactions.sql")).unwrap()
}

fn with_new(crashes: &Crashes) {
    let case = &crashes.case;
    fs::write(case.path("transactions.sql"), sql(case) + &NEW.replace("TOPIC", &case.topic)).unwrap();
}

fn command(crashes: &mut Crashes, interval: &str) -> Command {
    let parallelism = crashes.parallelism();
    crashes.case.command(&crashes.case.run_arguments(&[
        "--checkpoint",
        interval,
        "--parallelism",
        &parallelism,
    ]))
}

fn log(case: &Case) -> String {
    fs::read_to_string(case.path("built.log")).unwrap()
}

/// The new sinks have what the others have, and what `verify` computes.
fn same(case: &Case) {
    let columns = "user_id, event_time, total_transactions_count, round(amount_7d, 6) AS amount_7d, hour_of_day, day_of_week";
    let of = |table: &str| format!("SELECT {columns} FROM {table}");
    case.same("first=user_features,second=second_features", &of("second"), &of("first"), 1_000);
    let of = |table: &str| format!("SELECT user_id, n, round(amount, 4) AS amount, last_at FROM {table}");
    case.same("first=totals_now,second=second_totals", &of("second"), &of("first"), 1_000);
    let served = |sink: &str| {
        case.query(&format!(
            "SELECT user_id, event_time, total_transactions_count, amount_7d FROM {sink} ORDER BY user_id"
        ))
    };
    let first = served("user_features_serving");
    assert!(first.lines().count() > 1_000 && served("second_serving") == first, "other values are served");
    let verify = ["verify", "minute_counts", "--state", &case.state, "--name", &case.name];
    let out = case.command(&verify).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{said}");
}

fn refuses(case: &Case, message: &str) {
    let refused = case.run(&["--until-end"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        refused.status.code() == Some(2) && said.contains(message) && said.contains("remove the table"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn new_sinks_are_built_over_kills_and_have_what_the_others_have() {
    let Some(mut crashes) = begun("building").await else { return };
    crashes.produce(2_000).await;
    with_new(&crashes);
    let plan = ["plan", "--state", &crashes.case.state, "--name", &crashes.case.name];
    let plan = crashes.case.command(&plan).output().unwrap();
    let said = String::from_utf8_lossy(&plan.stdout).into_owned();
    assert!(plan.status.success() && said.matches("new: built from history").count() == 4, "{said}");
    let mut building = 0;
    for at in ON_THE_WAY {
        crashes.produce(300).await;
        let command = command(&mut crashes, "20ms");
        crash_at(at, command, &crashes.case);
        building += usize::from(crashes.manifest().await.building.is_some());
    }
    assert!(building >= 1, "no manifest was in the middle of it");
    for _ in 0..3 {
        let mut running = spawned(command(&mut crashes, "50ms"), "built.log", &crashes.case);
        crashes.produce(300).await;
        std::thread::sleep(Duration::from_millis(crashes.dice.roll(1_500)));
        assert!(running.try_wait().unwrap().is_none(), "{}", log(&crashes.case));
        running.kill().unwrap();
        running.wait().unwrap();
    }
    crashes.finish().await;
    assert!(crashes.manifest().await.building.is_none());
    same(&crashes.case);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_begun_can_be_left_and_begun_anew() {
    let Some(mut crashes) = begun("building-left").await else { return };
    let before = sql(&crashes.case);
    with_new(&crashes);
    let killed = command(&mut crashes, "20ms");
    crash_at("delta.commit.after:2", killed, &crashes.case);
    let manifest = crashes.manifest().await;
    assert!(manifest.building.is_some_and(|building| building.sources.contains_key("transactions")));
    // Other new sinks beside those that were begun: they would have their rows twice.
    let others =
        format!("{}CREATE SINK another FROM minutes WITH (connector = 'blackhole');", sql(&crashes.case));
    fs::write(crashes.case.path("transactions.sql"), others).unwrap();
    refuses(&crashes.case, "has rows of a build that was begun with other SQL");

    // The SQL goes back: the pipeline goes on, and nothing of it is left in the state.
    fs::write(crashes.case.path("transactions.sql"), &before).unwrap();
    crashes.produce(1_000).await;
    assert!(crashes.case.run(&["--until-end"]).status.success());
    assert!(crashes.manifest().await.building.is_none());

    // And forward again: what was written of it is not written on.
    with_new(&crashes);
    refuses(&crashes.case, "none of those that the pipeline read without it");
    for table in ["second_features", "second_totals", "minutes"] {
        fs::remove_dir_all(format!("{}/{table}", crashes.case.lake)).unwrap();
    }
    crashes.produce(1_000).await;
    assert!(crashes.case.run(&["--until-end"]).status.success());
    crashes.finish().await;
    same(&crashes.case);
}
