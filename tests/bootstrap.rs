//! Bootstrap from history on a real broker: the topic has lost its beginning, the backup has it. What comes of it is what
//! a pipeline would have that had read everything: training rows, totals, values served and the late ledger (DuckDB).

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use millstream::stream::crash::{Of, points};
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::case::{Case, create_topic, services};
use crate::crash::Crashes;

/// Longest wait for a process to come to an end by itself.
const PATIENCE: Duration = Duration::from_secs(120);
const SIGABRT: i32 = 6;

/// Where a bootstrap is killed, one after the other.
const ON_THE_WAY: [&str; 7] = [
    "claim.after",
    "history.rows:2",
    "manifest.after:2",
    "history.rows:2",
    "history.end",
    "history.handoff",
    "barrier.after:3",
];
/// Where one is killed that takes its own backup over.
const TAKING_OVER: [&str; 4] = ["adopt.before", "adopt.after", "history.rows:3", "history.handoff"];

#[test]
fn a_bootstrap_is_killed_at_every_point_of_its_own() {
    let killed =
        |point: &str| ON_THE_WAY.iter().chain(&TAKING_OVER).any(|at| at.split(':').next() == Some(point));
    assert_eq!(points(Of::History).find(|point| !killed(point)), None);
}

fn admin(case: &Case) -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", &case.services.kafka).create().unwrap()
}

/// The broker forgets what it has.
pub async fn expire(case: &Case) {
    let mut offsets = TopicPartitionList::new();
    for partition in 0..4 {
        offsets.add_partition_offset(&case.topic, partition, Offset::End).unwrap();
    }
    admin(case).delete_records(&offsets, &AdminOptions::new()).await.unwrap();
}

/// The job that writes the backup, a pipeline of its own.
fn backup(case: &Case, more: &[&str]) -> Command {
    let state = format!("{}-backup", case.state);
    let mut arguments = vec!["run", "--sink", "transactions_backup", "--state", &state, "--name", &case.name];
    arguments.extend(more);
    case.command(&arguments)
}

/// The job that is built from it: final rows, values served, totals.
fn features(case: &Case, more: &[&str]) -> Command {
    let sinks = ["--sink", "user_features_serving", "--sink", "totals_now", "--sink", "totals_serving"];
    training(case, &[&sinks, more].concat())
}

/// Only the final rows.
fn training(case: &Case, more: &[&str]) -> Command {
    let mut arguments = vec!["run", "--state", &case.state, "--name", &case.name];
    arguments.extend(["--sink", "user_features_training"]);
    arguments.extend(more);
    case.command(&arguments)
}

/// Runs to its own end; gives what it said.
fn done(mut command: Command) -> String {
    let out = command.output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{said}");
    said
}

pub fn spawned(mut command: Command, log: &str, case: &Case) -> Child {
    let log = fs::File::create(case.path(log)).unwrap();
    command.stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

/// SIGTERM, a last checkpoint, the end.
fn stop(mut running: Child) {
    assert!(running.try_wait().unwrap().is_none(), "it has ended");
    assert!(Command::new("kill").arg(running.id().to_string()).status().unwrap().success());
    assert!(running.wait().unwrap().success());
}

/// Waits until a process has stopped itself.
pub fn wait_until_stopped(process: u32) {
    let begun = Instant::now();
    let state = || fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    while !state().rsplit(") ").next().unwrap().starts_with('T') {
        assert!(begun.elapsed() < PATIENCE, "it does not stop: {}", state());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs until the process kills itself at a point of `stream::crash`.
pub fn crash_at(at: &str, mut command: Command, case: &Case) {
    println!("  {at}");
    command.env("MILLSTREAM_CRASH_AT", at);
    let mut process = spawned(command, "crash.log", case);
    let said = || fs::read_to_string(case.path("crash.log")).unwrap();
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = process.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > PATIENCE {
            process.kill().unwrap();
            process.wait().unwrap();
            panic!("{at} is never passed\n{}", said());
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.signal(), Some(SIGABRT), "{at}: {status}\n{}", said());
}

/// Everything is as if the topic had been read from its beginning.
async fn check(crashes: &mut Crashes) {
    crashes.unwatch();
    let manifest = crashes.check_state().await;
    let case = &crashes.case;
    let source = &manifest.sources["transactions"];
    assert!(source.accounts.balanced() && source.history.is_none(), "{source:?}");
    let late: u64 = manifest.ledger.iter().map(|segment| segment.rows).sum();
    assert!(late > 0 && late == source.accounts.late, "{late} of {:?}", source.accounts);
    case.verify_with(&["--ledger", case.path("ledger").to_str().unwrap()]);
    let totals =
        "SELECT user_id, count(*) AS n, round(sum(amount), 2) AS amount FROM backup GROUP BY user_id";
    let now = "SELECT user_id, n, round(amount, 2) AS amount FROM now";
    case.same("backup=transactions_backup,now=totals_now", now, totals, 1_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_view_is_built_from_the_backup_and_goes_on_in_the_topic() {
    let Some(mut crashes) = Crashes::new("bootstrap-new", false).await else { return };
    crashes.produce(6_000).await;
    done(backup(&crashes.case, &["--until-end"]));
    expire(&crashes.case).await;
    crashes.produce(2_000).await;
    // Rows keep coming while it is built. When it has read the backup, the topic no longer holds what follows: the
    // backup's job has it by then.
    let mut command = features(&crashes.case, &["--checkpoint", "100ms"]);
    command.env("MILLSTREAM_STOP_AT", "history.end");
    let running = spawned(command, "features.log", &crashes.case);
    wait_until_stopped(running.id());
    done(backup(&crashes.case, &["--until-end"]));
    expire(&crashes.case).await;
    crashes.produce(2_000).await;
    assert!(Command::new("kill").args(["-CONT", &running.id().to_string()]).status().unwrap().success());
    crashes.produce(2_000).await;
    stop(running);
    // It stands still for longer than the topic keeps; the backup's job does not.
    crashes.produce(2_000).await;
    done(backup(&crashes.case, &["--until-end"]));
    expire(&crashes.case).await;
    crashes.produce(1_000).await;
    done(features(&crashes.case, &["--until-end", "--close", "--parallelism", "3"]));
    done(backup(&crashes.case, &["--until-end"]));
    check(&mut crashes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_on_the_way_and_a_backup_that_lags_change_nothing() {
    let Some(mut crashes) = Crashes::new("bootstrap-kills", false).await else { return };
    crashes.produce(20_000).await;
    done(backup(&crashes.case, &["--until-end"]));
    expire(&crashes.case).await;
    let lagging = spawned(backup(&crashes.case, &["--checkpoint", "2s"]), "backup.log", &crashes.case);
    let mut in_history = 0;
    for at in ON_THE_WAY {
        crashes.produce(500).await;
        let parallelism = crashes.parallelism();
        let arguments = ["--checkpoint", "20ms", "--parallelism", &parallelism];
        crash_at(at, features(&crashes.case, &arguments), &crashes.case);
        let manifest = crashes.manifest().await;
        in_history += usize::from(manifest.sources.get("transactions").is_some_and(|s| s.history.is_some()));
    }
    assert!(in_history >= 2, "a manifest was in the middle of history {in_history} times");
    for _ in 0..4 {
        let parallelism = crashes.parallelism();
        let arguments = ["--checkpoint", "50ms", "--parallelism", &parallelism];
        let mut running = spawned(features(&crashes.case, &arguments), "features.log", &crashes.case);
        crashes.produce(500).await;
        std::thread::sleep(Duration::from_millis(crashes.dice.roll(1_500)));
        let log = fs::read_to_string(crashes.case.path("features.log")).unwrap();
        assert!(running.try_wait().unwrap().is_none(), "{log}");
        running.kill().unwrap();
        running.wait().unwrap();
    }
    stop(lagging);
    done(backup(&crashes.case, &["--until-end"]));
    let parallelism = crashes.parallelism();
    done(features(&crashes.case, &["--until-end", "--close", "--parallelism", &parallelism]));
    check(&mut crashes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_state_is_built_anew_while_its_backup_goes_on() {
    let Some(mut crashes) = Crashes::new("bootstrap-lost", false).await else { return };
    crashes.produce(8_000).await;
    assert!(crashes.case.run(&["--until-end"]).status.success());
    expire(&crashes.case).await;
    crashes.produce(2_000).await;
    fs::remove_dir_all(&crashes.case.state).unwrap();
    // Only the backup is taken over: a table of views would have its rows twice.
    let refused = crashes.case.run(&["--until-end"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && said.contains("belongs to another state"), "{said}");
    assert!(!said.contains("transactions_backup"), "{said}");
    for table in ["user_features", "totals_now", "totals_changes"] {
        fs::remove_dir_all(format!("{}/{table}", crashes.case.lake)).unwrap();
    }
    let arguments = |parallelism| ["--checkpoint", "50ms", "--parallelism", parallelism];
    for (at, parallelism) in TAKING_OVER.into_iter().zip(["2", "1", "3", "2"]) {
        let command = crashes.case.command(&crashes.case.run_arguments(&arguments(parallelism)));
        crash_at(at, command, &crashes.case);
        crashes.produce(500).await;
    }
    crashes.case.finish("2");
    check(&mut crashes).await;
    let status = [
        "status",
        "--state",
        &crashes.case.state,
        "--name",
        &crashes.case.name,
        "--max-dead-letters",
        "1000000",
    ];
    let out = crashes.case.command(&status).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn gaps_and_topics_made_anew_are_errors_with_numbers() {
    let Some(services) = services("gaps_and_topics_made_anew_are_errors_with_numbers") else { return };
    let mut case = Case::new(services, "bootstrap-gaps", None).await;
    case.produce(2_000).await;
    done(backup(&case, &["--until-end"]));
    let held = case.query("SELECT count(*) AS n FROM transactions_backup");
    case.produce(2_000).await;
    expire(&case).await;
    let failed = |more: &[&str]| {
        let out = training(&case, more).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(3), "{said}");
        said
    };
    let said = failed(&["--until-end"]);
    for part in [&case.topic, "partition 0: its backup ends at offset", "are in neither", "--allow-gap"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let manifests = std::path::Path::new(&case.state).join("manifest");
    assert!(!manifests.exists(), "a refused start claims nothing");
    let said = done(training(&case, &["--until-end", "--close", "--allow-gap"]));
    assert_eq!(said.matches("are lost (--allow-gap)").count(), 4, "{said}");
    // What the backup has is there.
    assert_eq!(case.query("SELECT count(*) AS n FROM user_features_training"), held);

    for deleted in admin(&case).delete_topics(&[&case.topic], &AdminOptions::new()).await.unwrap() {
        deleted.unwrap();
    }
    std::thread::sleep(Duration::from_secs(1));
    create_topic(&case.services.kafka, &case.topic, 4).await;
    fs::remove_dir_all(&case.state).unwrap();
    fs::remove_dir_all(format!("{}/user_features", case.lake)).unwrap();
    let said = failed(&["--until-end", "--allow-gap"]);
    assert!(said.contains("but the topic ends at 0"), "{said}");
    assert!(said.contains("hint: The topic was emptied or created anew"), "{said}");
}

/// Somebody's VACUUM takes files between the manifest that names them and their commit, and the topic loses the epoch's
/// records before the next start: the epoch is made again from the backup.
#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_of_which_only_the_backup_is_left_is_made_again() {
    let Some(mut crashes) = Crashes::new("bootstrap-again", false).await else { return };
    crashes.produce(4_000).await;
    done(backup(&crashes.case, &["--until-end"]));
    expire(&crashes.case).await;
    crashes.produce(2_000).await;
    done(features(&crashes.case, &["--until-end"]));
    crashes.produce(2_000).await;
    done(backup(&crashes.case, &["--until-end"]));
    // One epoch, with all that is new.
    crash_at(
        "manifest.after",
        features(&crashes.case, &["--until-end", "--checkpoint", "600s"]),
        &crashes.case,
    );
    expire(&crashes.case).await;
    let manifest = crashes.manifest().await;
    let lost: Vec<_> = manifest.commits.iter().filter(|commit| !commit.files.is_empty()).collect();
    assert_eq!(lost.len(), 2, "final rows and totals: {lost:?}");
    for (commit, file) in lost.iter().flat_map(|commit| commit.files.iter().map(move |file| (commit, file))) {
        fs::remove_file(std::path::Path::new(&commit.location).join(&file.path)).unwrap();
    }
    let parallelism = crashes.parallelism();
    let said = done(features(&crashes.case, &["--until-end", "--parallelism", &parallelism]));
    assert_eq!(said.matches("the epoch is made again").count(), 2, "{said}");
    done(features(&crashes.case, &["--until-end", "--close"]));
    check(&mut crashes).await;
}
