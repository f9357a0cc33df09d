//! Processes that stop in the middle of a step, are taken over, and wake up: they write nothing any more and say why.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use millstream::state::manifest::generation_of;
use millstream::stream::crash::{Of, points};
use object_store::ObjectStoreExt;

use crate::crash::{Crashes, all, store};

/// Everything that a reader or a successor can see.
#[derive(Debug, PartialEq)]
struct Seen {
    /// Logs of the Delta tables, visible files of the NDJSON sink, manifests: by path.
    files: BTreeMap<String, u64>,
    /// Rows and bookkeeping in Redis.
    redis: BTreeMap<String, BTreeMap<String, String>>,
}

/// Parts of the paths of what a process writes to the lake and to its state.
const WRITTEN: [&str; 3] = ["_delta_log/", "manifest/", ".ndjson"];

fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// The newest version of each table, by the folder of its log.
async fn versions(crashes: &Crashes) -> BTreeMap<String, u64> {
    let mut newest = BTreeMap::<String, u64>::new();
    for meta in store(&crashes.case, &crashes.case.lake).list(None).try_collect::<Vec<_>>().await.unwrap() {
        let Some((folder, name)) = meta.location.as_ref().rsplit_once('/') else { continue };
        if let Some(version) = name.strip_suffix(".json").and_then(|version| version.parse().ok()) {
            let known: &mut u64 = newest.entry(folder.to_owned()).or_insert(version);
            *known = version.max(*known);
        }
    }
    newest
}

/// Whether a file is a checkpoint of a log that a process which stopped at these versions may have been writing.
fn begun(path: &str, stopped_at: &BTreeMap<String, u64>) -> bool {
    let Some((folder, name)) = path.rsplit_once('/') else { return false };
    // It names a checkpoint, and that is compared.
    let Some(version) = name.split('.').next().and_then(|version| version.parse::<u64>().ok()) else {
        return name == "_last_checkpoint";
    };
    name.contains(".checkpoint") && stopped_at.get(folder).is_some_and(|newest| version <= *newest)
}

/// What there is, and the paths of all state files.
async fn look(crashes: &Crashes, stopped_at: &BTreeMap<String, u64>) -> (Seen, Vec<String>) {
    let case = &crashes.case;
    let mut files = BTreeMap::new();
    let mut state_files = Vec::new();
    for (name, location) in [("lake", &case.lake), ("state", &case.state)] {
        let located = store(case, location);
        for meta in located.list(None).try_collect::<Vec<_>>().await.unwrap() {
            let path = meta.location.to_string();
            if generation_of(&path).is_some() && name == "state" {
                state_files.push(path);
            } else if begun(&path, stopped_at) {
                // Between the fence and the write: it repeats what the log said then.
            } else if WRITTEN.iter().any(|part| path.contains(part)) {
                let bytes = located.get(&meta.location).await.unwrap().bytes().await.unwrap();
                files.insert(format!("{name}/{path}"), hash(&bytes));
            }
        }
    }
    let mut connection = redis::Client::open(case.services.redis.as_str()).unwrap().get_connection().unwrap();
    let mut redis = BTreeMap::new();
    for pattern in [format!("{}*", case.topic), format!("millstream:{{{}/*", case.topic)] {
        let keys: Vec<String> = redis::cmd("KEYS").arg(pattern).query(&mut connection).unwrap();
        for key in keys {
            let row = redis::cmd("HGETALL").arg(&key).query(&mut connection).unwrap();
            redis.insert(key, row);
        }
    }
    // How many there are is the machine's speed; that none of them is looked at in vain is not.
    for part in WRITTEN {
        assert!(files.keys().any(|path| path.contains(part)), "no {part} among {:?}", files.keys());
    }
    assert!(redis.len() > 1_000, "{} keys", redis.len());
    (Seen { files, redis }, state_files)
}

fn signal(process: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &process.id().to_string()]).status().unwrap().success());
}

fn is_stopped(process: &Child) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.id())).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
}

/// Waits until a process has stopped itself, rows arriving all the time.
async fn stopped(crashes: &mut Crashes, process: &mut Child, at: &str) {
    let begun = Instant::now();
    while !is_stopped(process) {
        let gone = process.try_wait().unwrap().is_some();
        if gone || begun.elapsed() > Duration::from_secs(120) {
            process.kill().ok();
            process.wait().unwrap();
            panic!("{at} is never passed\n{}", fs::read_to_string(crashes.case.path("stderr.log")).unwrap());
        }
        crashes.produce(100).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// A successor claims, cleans up and goes on to the end of the topic; then the zombie wakes up.
async fn wakes_up(crashes: &mut Crashes, mut zombie: Child, at: &str) {
    println!("  {at}");
    let stopped_at = versions(crashes).await;
    let said = crashes.case.path("zombie.log");
    fs::rename(crashes.case.path("stderr.log"), &said).unwrap();
    crashes.produce(500).await;
    let parallelism = crashes.parallelism();
    let out = crashes.case.run(&["--until-end", "--checkpoint", "100ms", "--parallelism", &parallelism]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    // What a zombie could write: rows that its successor has not seen.
    crashes.produce(500).await;
    let (before, state_before) = look(crashes, &stopped_at).await;
    signal(&zombie, "-CONT");
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = zombie.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > Duration::from_secs(60) {
            zombie.kill().unwrap();
            zombie.wait().unwrap();
            panic!("{at}: the zombie goes on\n{}", fs::read_to_string(&said).unwrap());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let said = fs::read_to_string(&said).unwrap();
    assert_eq!(status.code(), Some(3), "{at}: {status}\n{said}");
    assert!(
        said.contains("error:") && (said.contains("newer process") || said.contains("generation")),
        "{at}: {said}"
    );
    let (after, state_after) = look(crashes, &stopped_at).await;
    for (path, content) in &after.files {
        assert_eq!(before.files.get(path), Some(content), "{at}: {path} was written by a zombie\n{said}");
    }
    for (key, row) in &after.redis {
        assert_eq!(before.redis.get(key), Some(row), "{at}: {key} was written by a zombie\n{said}");
    }
    assert_eq!(before, after, "{at}: something was removed by a zombie\n{said}");
    let lost: Vec<_> = state_before.iter().filter(|path| !state_after.contains(path)).collect();
    assert!(lost.is_empty(), "{at}: removed by a zombie: {lost:?}");
    // Files that nothing refers to and the next claim removes.
    let newest = state_before.iter().filter_map(|path| generation_of(path)).max();
    let odd = |path: &&String| !state_before.contains(path) && generation_of(path) >= newest;
    assert_eq!(state_after.iter().find(odd), None, "{at}: a state file under its successor's generation");
}

async fn zombies(name: &str, s3: bool, steps: &[&str], anywhere: usize) {
    let Some(mut crashes) = Crashes::new(name, s3).await else { return };
    let begun = Instant::now();
    crashes.produce(3_000).await;
    let out = crashes.case.run(&["--until-end"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    for step in steps {
        crashes.produce(if step.contains("between") { 6_000 } else { 500 }).await;
        let mut process = crashes.start("MILLSTREAM_STOP_AT", Some(step));
        stopped(&mut crashes, &mut process, step).await;
        wakes_up(&mut crashes, process, step).await;
    }
    // And some that are stopped from outside, under load.
    for _ in 0..anywhere {
        let process = crashes.start("MILLSTREAM_STOP_AT", None);
        for _ in 0..10 + crashes.dice.roll(10) {
            crashes.produce(300).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        signal(&process, "-STOP");
        wakes_up(&mut crashes, process, "anywhere").await;
    }
    crashes.finish().await;
    println!("{name}: {} zombies in {:.0} s", steps.len() + anywhere, begun.elapsed().as_secs_f64());
}

/// Every step after the claim; before it, a process that wakes up is no zombie but the newest claimant.
fn all_steps() -> Option<Vec<&'static str>> {
    let first = |step: &&str| !step.starts_with("table") && *step != "claim.before";
    all().then(|| points(Of::Epoch).filter(first).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_writes_nothing() {
    let some = [
        "claim.after",
        "ndjson.file.before:2",
        "manifest.before:2",
        "manifest.after:2",
        "upsert.before",
        "delete",
    ];
    let steps = all_steps().unwrap_or(some.to_vec());
    zombies("zombie", false, &steps, if all() { 5 } else { 1 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_writes_nothing_on_s3() {
    let steps =
        all_steps().unwrap_or(vec!["delta.commit.before:3", "upsert.before:2", "ndjson.rename.after"]);
    zombies("zombie_s3", true, &steps, if all() { 5 } else { 0 }).await;
}
