//! Sinks whose SQL changed, rebuilt in their place: tables and served values are those of sinks that always had the new SQL.
//! Until a table is replaced, in one commit, it is what it was; so is what is served.

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::bootstrap::{crash_at, expire, spawned};
use crate::case::Case;
use crate::crash::Crashes;

/// The views as they are at first, and the sinks that read them. `NAME` is before all names.
const SINKS: &str = "
CREATE SINK NAME_training FROM NAME_spent
WITH (connector = 'delta', location = '${LAKE}/NAME_spent', partition_by = 'day(event_time)');
CREATE SINK NAME_serving FROM NAME_spent
WITH (connector = 'redis', url = '${REDIS_URL}', key = 'user_id', prefix = 'TOPIC-NAME:', ttl = '30 days');
CREATE SINK NAME_now FROM NAME_counts
WITH (connector = 'delta', location = '${LAKE}/NAME_now', mode = 'upsert', key = 'user_id');
CREATE SINK NAME_changes FROM NAME_counts
WITH (connector = 'delta', location = '${LAKE}/NAME_changes', mode = 'changelog');
CREATE SINK NAME_shown FROM NAME_counts
WITH (connector = 'redis', url = '${REDIS_URL}', key = 'user_id', prefix = 'TOPIC-NAME-n:');
";
const OLD: &str = "
CREATE VIEW NAME_spent AS
SELECT user_id, event_time, sum(amount) OVER (PARTITION BY user_id ORDER BY event_time) AS spent
FROM transactions WHERE amount < 9000;
CREATE VIEW NAME_counts AS SELECT user_id, count(*) AS n FROM transactions GROUP BY user_id;
";
/// Fewer users, another sum, one more column.
const NEW: &str = "
CREATE VIEW NAME_spent AS
SELECT user_id, event_time, sum(amount) OVER (PARTITION BY user_id ORDER BY event_time
       RANGE BETWEEN INTERVAL '1 minute' PRECEDING AND CURRENT ROW) AS spent,
       count(*) OVER (PARTITION BY user_id ORDER BY event_time) AS n
FROM transactions WHERE amount > 0 AND user_id % 3 <> 0;
CREATE VIEW NAME_counts AS
SELECT user_id, count(*) AS n, max(event_time) AS last_at FROM transactions WHERE user_id % 5 <> 0 GROUP BY user_id;
";
/// Where a start is killed that rebuilds, one after the other. Each is passed wherever the one before left it.
const ON_THE_WAY: [&str; 7] = [
    "table.after",
    "history.rows:2",
    "history.rows:1",
    "manifest.after:2",
    "barrier.after:3",
    "delta.commit.after:2",
    "upsert.after",
];

/// Between checkpoints: the first one comes before all of the history is read.
const SOON: &str = "1ms";

fn named(sql: &str, name: &str, crashes: &Crashes) -> String {
    sql.replace("NAME", name).replace("TOPIC", &crashes.case.topic)
}

fn write(crashes: &Crashes, base: &str, parts: &[(&str, &str)]) {
    let more: String =
        parts.iter().map(|(sql, name)| named(sql, name, crashes) + &named(SINKS, name, crashes)).collect();
    fs::write(crashes.case.path("transactions.sql"), base.to_owned() + &more).unwrap();
}

/// A pipeline with a state and sinks of the old SQL, whose topic has lost what was read.
async fn begun(name: &str, s3: bool, rows: u64) -> Option<(Crashes, String)> {
    let mut crashes = Crashes::new(name, s3).await?;
    let base = fs::read_to_string(crashes.case.path("transactions.sql")).unwrap();
    write(&crashes, &base, &[(OLD, "mine")]);
    crashes.produce(rows).await;
    assert!(crashes.case.run(&["--until-end", "--checkpoint", "300ms"]).status.success());
    expire(&crashes.case).await;
    crashes.produce(1_000).await;
    Some((crashes, base))
}

fn command(crashes: &mut Crashes, interval: &str, more: &[&str]) -> Command {
    let parallelism = crashes.parallelism();
    let mut arguments = vec!["--checkpoint", interval, "--parallelism", &parallelism];
    arguments.extend(more);
    crashes.case.command(&crashes.case.run_arguments(&arguments))
}

/// What a reader of the rebuilt sinks finds.
fn seen(case: &Case, columns: [&str; 2]) -> Vec<String> {
    let [spent, counts] = columns;
    let tables = [
        format!("SELECT {spent} FROM mine_training ORDER BY 1, 2"),
        format!("SELECT {counts} FROM mine_now ORDER BY 1, 2"),
        format!(
            "SELECT {counts}, sum(_weight) AS w FROM mine_changes GROUP BY {counts} HAVING sum(_weight) <> 0 ORDER BY 1, 2"
        ),
        format!("SELECT {spent} FROM mine_serving ORDER BY 1, 2"),
        format!("SELECT {counts} FROM mine_shown ORDER BY 1, 2"),
    ];
    let answers: Vec<String> = tables.iter().map(|sql| case.query(sql)).collect();
    assert!(answers.iter().all(|answer| answer.lines().count() > 500), "few rows");
    answers
}

const OLD_COLUMNS: [&str; 2] = ["user_id, event_time, spent", "user_id, n"];

/// The rebuilt sinks have what twins have that never had other SQL.
fn same(case: &Case) {
    let of = |table: &str| format!("SELECT user_id, event_time, round(spent, 4) AS spent, n FROM {table}");
    case.same("mine=mine_spent,twin=twin_spent", &of("mine"), &of("twin"), 1_000);
    let of = |table: &str| format!("SELECT user_id, n, last_at FROM {table}");
    case.same("mine=mine_now,twin=twin_now", &of("mine"), &of("twin"), 500);
    let of = |table: &str| {
        format!(
            "SELECT user_id, n, last_at, sum(_weight) AS w FROM {table} GROUP BY ALL HAVING sum(_weight) <> 0"
        )
    };
    case.same("mine=mine_changes,twin=twin_changes", &of("mine"), &of("twin"), 500);
    for (sink, columns) in
        [("serving", "user_id, event_time, round(spent, 4) AS spent, n"), ("shown", "user_id, n, last_at")]
    {
        let of = |name: &str| case.query(&format!("SELECT {columns} FROM {name}_{sink} ORDER BY user_id"));
        let (mine, twin) = (of("mine"), of("twin"));
        assert!(twin.lines().count() > 500 && mine == twin, "{sink}: other keys or values are served");
    }
}

/// And what `verify` computes.
fn verified(case: &Case) {
    for sink in ["mine_training", "mine_now"] {
        let out =
            case.command(&["verify", sink, "--state", &case.state, "--name", &case.name]).output().unwrap();
        let said =
            format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_sinks_are_rebuilt_over_kills_and_have_what_twins_have() {
    let Some((mut crashes, base)) = begun("rebuilt", false, 20_000).await else { return };
    let before = seen(&crashes.case, OLD_COLUMNS);
    write(&crashes, &base, &[(NEW, "mine"), (NEW, "twin")]);
    let refused = crashes.case.run(&["--until-end"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && said.contains("run --rebuild"), "{said}");
    let plan = |crashes: &Crashes| {
        let arguments = ["plan", "--state", &crashes.case.state, "--name", &crashes.case.name];
        let out = crashes.case.command(&arguments).output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned())
    };
    let (code, said) = plan(&crashes);
    assert!(
        code == Some(1) && said.matches("changed: run --rebuild computes it anew from history").count() == 5,
        "{said}"
    );
    let mut building = 0;
    for at in ON_THE_WAY {
        crashes.produce(300).await;
        // Told once; whoever goes on with it knows.
        let told: &[&str] = if building == 0 { &["--rebuild"] } else { &[] };
        let command = command(&mut crashes, SOON, told);
        crash_at(at, command, &crashes.case);
        if crashes.manifest().await.building.is_some() {
            building += 1;
            let (code, said) = plan(&crashes);
            assert!(code == Some(0) && said.contains("its rebuild is under way"), "{said}");
            // The SQL is the new one; tables and store have the old columns and rows.
            write(&crashes, &base, &[(OLD, "mine")]);
            let now = seen(&crashes.case, OLD_COLUMNS);
            let changed: Vec<usize> = (0..now.len()).filter(|which| now[*which] != before[*which]).collect();
            assert!(changed.is_empty(), "{at}: changed before their time: {changed:?}");
            write(&crashes, &base, &[(NEW, "mine"), (NEW, "twin")]);
        }
    }
    assert!(building > 0, "no manifest was in the middle of it");
    for _ in 0..2 {
        let mut running = spawned(command(&mut crashes, "50ms", &[]), "rebuilt.log", &crashes.case);
        crashes.produce(300).await;
        std::thread::sleep(Duration::from_millis(crashes.dice.roll(1_500)));
        let log = fs::read_to_string(crashes.case.path("rebuilt.log")).unwrap();
        assert!(running.try_wait().unwrap().is_none(), "{log}");
        running.kill().unwrap();
        running.wait().unwrap();
    }
    crashes.finish().await;
    same(&crashes.case);
    verified(&crashes.case);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_can_be_left_and_what_was_rebuilt_rebuilt_again_on_s3() {
    let Some((mut crashes, base)) = begun("rebuilt-left", true, 12_000).await else { return };
    write(&crashes, &base, &[(NEW, "mine")]);
    let killed = command(&mut crashes, SOON, &["--rebuild"]);
    crash_at("delta.commit.after:2", killed, &crashes.case);
    assert!(crashes.manifest().await.building.is_some_and(|building| building.stand_ins.len() == 3));
    // Back: the pipeline goes on with the old SQL as if nothing had been.
    write(&crashes, &base, &[(OLD, "mine"), (OLD, "twin")]);
    crashes.produce(1_000).await;
    let out = crashes.case.run(&["--until-end"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(crashes.manifest().await.building.is_none());
    for sink in ["training", "now", "serving", "shown"] {
        let columns = if ["training", "serving"].contains(&sink) { OLD_COLUMNS[0] } else { OLD_COLUMNS[1] };
        let columns = columns.replace("spent", "round(spent, 4) AS spent");
        let of =
            |name: &str| crashes.case.query(&format!("SELECT {columns} FROM {name}_{sink} ORDER BY 1, 2"));
        assert!(of("mine") == of("twin"), "{sink}");
    }
    // Forward in one epoch: its manifest has the replacements when its rows are in no table yet.
    write(&crashes, &base, &[(NEW, "mine"), (OLD, "twin")]);
    for (at, interval) in [("delta.commit.before", "1h"), ("swap.before:2", SOON), ("swap.after:2", SOON)] {
        crashes.produce(300).await;
        let killed = command(&mut crashes, interval, &["--rebuild"]);
        crash_at(at, killed, &crashes.case);
    }
    // Something else and back again, with rows between.
    for sql in
        [NEW.to_owned(), NEW.replace("% 3", "% 4").replace("1 minute", "2 minutes").replace("% 5", "% 6")]
    {
        write(&crashes, &base, &[(&sql, "mine"), (OLD, "twin")]);
        crashes.produce(500).await;
        let out = crashes.case.run(&["--until-end", "--rebuild"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    write(&crashes, &base, &[(NEW, "mine"), (NEW, "twin")]);
    let out = crashes.case.run(&["--until-end", "--rebuild"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    crashes.finish().await;
    same(&crashes.case);
    verified(&crashes.case);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_lost_on_the_way_is_built_once_more_and_nothing_unknown_is_left_served() {
    let Some((mut crashes, base)) = begun("rebuilt-lost", false, 12_000).await else { return };
    // Rows of some users cannot be computed: they are dead letters, of other users before than after.
    let old = OLD.replace("WHERE amount", "WHERE 100 / (user_id % 100) < 1000 AND amount");
    let new = NEW.replace("WHERE amount", "WHERE 100 / (user_id % 70) < 1000 AND amount");
    write(&crashes, &base, &[(&old, "mine")]);
    assert!(crashes.case.run(&["--until-end", "--rebuild"]).status.success());
    crashes.produce(500).await;
    // A process that is killed has shown rows that no checkpoint has.
    let mut running = spawned(command(&mut crashes, "1h", &[]), "ahead.log", &crashes.case);
    let shown = |crashes: &Crashes| crashes.case.query("SELECT sum(n) AS n FROM mine_shown");
    let before = shown(&crashes);
    crate::online::wait_for("a row that is shown", || shown(&crashes) != before);
    running.kill().unwrap();
    running.wait().unwrap();
    write(&crashes, &base, &[(&new, "mine"), (&new, "twin")]);
    let refused = crashes.case.run(&["--until-end", "--rebuild"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && said.contains("is ahead of the newest checkpoint"), "{said}");
    write(&crashes, &base, &[(&old, "mine")]);
    assert!(crashes.case.run(&["--until-end"]).status.success());

    // The stand-in loses a file when all is built and nothing is replaced; the rest as ever. The plan's nodes have other
    // numbers than before.
    write(&crashes, &base, &[(&new, "twin"), (&new, "mine")]);
    let killed = command(&mut crashes, "1h", &["--rebuild"]);
    crash_at("swap.before", killed, &crashes.case);
    let lost = glob(&crashes.case, "mine_spent");
    fs::remove_file(&lost[0]).unwrap();
    let killed = command(&mut crashes, SOON, &[]);
    crash_at("delta.commit.after:2", killed, &crashes.case);
    assert!(crashes.manifest().await.building.is_some_and(|building| building.stand_ins.len() == 1));
    crashes.produce(500).await;
    crashes.case.finish("2");
    crashes.unwatch();
    let manifest = crashes.check_state().await;
    assert!(
        manifest.letters["mine_spent"]["expression"] > 0 && manifest.rebuilt["mine_spent"] > 0,
        "{manifest:?}"
    );
    same(&crashes.case);
}

/// Files of the stand-in of a table.
fn glob(case: &Case, table: &str) -> Vec<std::path::PathBuf> {
    let inside = |path: std::path::PathBuf| -> Vec<std::path::PathBuf> {
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let folders = inside(format!("{}/{table}", case.lake).into());
    let folders = folders
        .into_iter()
        .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("rebuilt-"));
    let days = folders.flat_map(inside).filter(|path| path.is_dir() && !path.ends_with("_delta_log"));
    let files: Vec<_> = days.flat_map(inside).collect();
    assert!(!files.is_empty(), "no stand-in of {table}");
    files
}
