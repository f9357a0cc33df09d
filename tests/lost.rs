//! Prepared files that somebody removes before their commit (a VACUUM of another writer): noticed by the process that
//! prepared them, if it slept; made again by its successor, dead letters too.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use millstream::state::manifest::Manifest;
use millstream::state::store::StateStore;
use millstream::stream::clock::Clock;

use crate::bootstrap::wait_until_stopped;
use crate::case::{Case, create_topic, services};
use crate::crash::store;

const SIGABRT: i32 = 6;
/// One epoch, at the end.
const ONCE: [&str; 3] = ["--until-end", "--checkpoint", "600s"];

async fn newest(case: &Case) -> Manifest {
    let state = StateStore::new(store(case, &case.state), object_store::path::Path::default(), Clock);
    state.latest().await.unwrap().unwrap()
}

/// Removes what the newest manifest has prepared for these sinks, which is something for each; gives the names.
async fn remove_prepared(case: &Case, sinks: &[&str]) -> Vec<String> {
    let manifest = newest(case).await;
    let mut removed = Vec::new();
    for sink in sinks {
        let commit = manifest.commits.iter().find(|commit| commit.sink == *sink).unwrap();
        assert!(!commit.files.is_empty(), "{sink} has no rows");
        for file in &commit.files {
            fs::remove_file(Path::new(&commit.location).join(&file.path)).unwrap();
            removed.push(file.path.clone());
        }
    }
    removed
}

/// All entries of a table's log.
fn log_of(case: &Case, table: &str) -> String {
    let folder = fs::read_dir(format!("{}/{table}/_delta_log", case.lake)).unwrap();
    let paths = folder.map(|entry| entry.unwrap().path());
    let entries = paths.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    entries.map(|path| fs::read_to_string(path).unwrap()).collect()
}

/// Runs until the process kills itself after its first manifest.
fn killed_after_manifest(case: &Case) {
    let mut command = case.command(&case.run_arguments(&ONCE));
    let out = command.env("MILLSTREAM_CRASH_AT", "manifest.after").output().unwrap();
    assert_eq!(out.status.signal(), Some(SIGABRT), "{}", String::from_utf8_lossy(&out.stderr));
}

/// Runs to the end; the epoch of these sinks was made again.
fn made_again(case: &Case, sinks: &[&str]) {
    let out = case.run(&ONCE);
    let log = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{log}");
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("the epoch is made again")).collect();
    let of = |sink: &&&str| lines.iter().any(|line| line.contains(&format!("sink={sink} ")));
    assert!(lines.len() == sinks.len() && sinks.iter().all(|sink| of(&sink)), "{sinks:?}: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_slept_looks_before_it_commits() {
    let Some(services) = services("a_process_that_slept_looks_before_it_commits") else { return };
    let mut case = Case::new(services, "slept", None).await;
    case.produce(1_000).await;
    let out = case.run(&ONCE);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    case.produce(1_000).await;
    let mut command = case.command(&case.run_arguments(&ONCE));
    let log = fs::File::create(case.path("log")).unwrap();
    command.env("MILLSTREAM_STOP_AT", "delta.commit.before").stderr(log);
    let mut running = command.spawn().unwrap();
    wait_until_stopped(running.id());
    let removed = remove_prepared(&case, &["transactions_backup"]).await;
    // Longer than a commit may take without another look.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(Command::new("kill").args(["-CONT", &running.id().to_string()]).status().unwrap().success());
    let status = running.wait().unwrap();
    let said = fs::read_to_string(case.path("log")).unwrap();
    assert!(status.code() == Some(3) && said.contains("is gone before its commit"), "{status}: {said}");
    assert!(said.contains("Start the pipeline again"), "{said}");
    let log = log_of(&case, "transactions_backup");
    assert!(removed.iter().all(|file| !log.contains(file.rsplit('/').next().unwrap())), "it is committed");
    made_again(&case, &["transactions_backup"]);
    case.finish("2");
    case.verify();
}

/// Tables of letters alone and beside a table of rows, in the first epoch and later; one of them refuses letters itself.
#[tokio::test(flavor = "multi_thread")]
async fn tables_of_dead_letters_are_made_again() {
    let Some(services) = services("tables_of_dead_letters_are_made_again") else { return };
    let mut case = Case::new(services, "lostletters", None).await;
    case.with_letters();
    create_topic(&case.services.kafka, &format!("{}-bad", case.topic), 2).await;
    let picky = "CREATE SINK picky AS
        SELECT partition, \"offset\", ensure(kind, kind <> 'not_json', 'unwanted') AS kind FROM dead_letters
        WITH (connector = 'delta', location = '${LAKE}/picky');";
    let sql = fs::read_to_string(case.path("transactions.sql")).unwrap();
    fs::write(case.path("transactions.sql"), sql + picky).unwrap();
    case.produce(1_000).await;
    case.send_bad(0, 100).await;
    killed_after_manifest(&case);
    remove_prepared(&case, &["bad"]).await;
    made_again(&case, &["bad"]);

    case.produce(1_000).await;
    case.send_bad(100, 100).await;
    killed_after_manifest(&case);
    let lost = ["bad", "picky", "checked", "transactions_backup"];
    remove_prepared(&case, &lost).await;
    made_again(&case, &lost);
    case.finish("2");
    case.verify();

    let sent = format!("SELECT p, o, kind FROM {}", case.read_json("bad.ndjson"));
    let refused = format!(
        "SELECT p, o, 'expression' AS kind FROM {} WHERE amount >= 9000",
        case.read_json("produced.ndjson")
    );
    let found = "SELECT partition AS p, \"offset\" AS o, kind FROM letters";
    case.same("letters=bad", found, &format!("{sent} UNION ALL {refused}"), 200);
    case.same(
        "letters=picky",
        found,
        &format!("SELECT * FROM ({sent} UNION ALL {refused}) WHERE kind <> 'not_json'"),
        120,
    );
    // What was refused is in the state once, whatever was written again.
    let in_state = case.query_state("SELECT count(*) AS n FROM dead_letters WHERE at = 'picky'");
    assert_eq!(in_state, "n\n80\n");
}
